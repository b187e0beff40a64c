"""Tiny random models of the families of transformers, for `test_survey.py`.

`SURVEY` names them, `survey_model` builds one, `chosen_third` says which pairs of family and recipe run today,
`folders` writes models once for many tests.
"""

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

RECIPES = ("rtn", "slim-llm", "cmpq+")
VOCABULARY = 64

# Fields that a config gets if it has them.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_OLD = {"n_layer": 2, "n_head": 4}
_GPT = {**_OLD, "n_embd": 32, "n_positions": 64}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_PER_LAYER = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 1,
    "layer_types": ["full_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
}

# model type -> its own fields; one with "text" is a wrapper of a language model and a tower
_MAMBA = {
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_PLAIN = """llama qwen2 qwen3 mistral ministral ministral3 phi3 gemma gemma2 olmo2 olmo3 smollm3 granite glm glm4 cohere
cohere2 exaone4 nemotron stablelm starcoder2 ernie4_5 hunyuan_v1_dense seed_oss apertus gpt_neox modernbert-decoder
bitnet bert"""
SURVEY: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {**_PER_LAYER, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {**_PER_LAYER, "global_head_dim": 8},
    "minicpm3": _LATENT,
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "bloom": _OLD,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_bigcode": _GPT,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "modernbert": {"global_attn_every_n_layers": 2},
    "mamba": {"state_size": 4, "expand": 2},
    "mamba2": {"state_size": 4, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "bamba": {
        "attn_layer_indices": [1],
        **_MAMBA,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_d_state": 4,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": _LINEAR,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "t5": {
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
}
# Fields that the config of a mixture of experts gets if it has them.
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_LATENT_HEADS = {**_LATENT, "head_dim": 4}
# the same for mixtures of experts
_PLAIN_MOE = """mixtral qwen2_moe olmoe granitemoe phimoe glm4_moe hunyuan_v1_moe dots1 exaone_moe flex_olmo"""
MIXTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN_MOE.split()},
    "qwen3_moe": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 24,
        **_MAMBA,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "deepseek_v2": {**_LATENT_HEADS, "topk_method": "greedy"},
    "deepseek_v3": _LATENT_HEADS,
    "deepseek_v32": {**_LATENT_HEADS, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "gpt_oss": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4_moe_lite": _LATENT_HEADS,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": {"rotary_dim": 4},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "kimi_linear": {**_LATENT_HEADS, "layer_types": ["linear_attention", "full_attention"]},
}
# Experts that stay in 16 bits.
_DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
QWEN_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
# name -> fields of the text config, of the tower's, and of the wrapper's
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"query_pre_attn_scalar": 8},
        TOWER,
        {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 62, "eoi_token_index": 61},
    ),
    "gemma4": (
        {**_PER_LAYER, "global_head_dim": 8},
        {**TOWER, "model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2},
        {"image_token_id": 60, "boi_token_id": 62, "eoi_token_id": 61, "audio_config": None},
    ),
    "qwen2_vl": (
        MROPE,
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        QWEN_TOKENS,
    ),
    "qwen2_5_vl": (MROPE, {**QWEN_TOWER, "patch_size": 14}, QWEN_TOKENS),
    "qwen3_vl": (MROPE, {**QWEN_TOWER, "patch_size": 16, "deepstack_visual_indexes": [0]}, QWEN_TOKENS),
    "qwen3_5": (_LINEAR, {**QWEN_TOWER, "patch_size": 16}, QWEN_TOKENS),
    "llava": ({"model_type": "llama"}, {**TOWER, "model_type": "clip_vision_model"}, {"image_token_index": 60}),
    "mistral3": (
        {"model_type": "mistral"},
        {**TOWER, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 60},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        {"image_token_id": 60, "image_seq_length": 1},
    ),
    "smolvlm": ({"model_type": "llama"}, TOWER, {"image_token_id": 60, "scale_factor": 2}),
}
ENCODER_DECODERS = ("t5", "bart", "mbart", "marian")
_CLASSES = {
    **dict.fromkeys(("bert", "modernbert"), "AutoModelForMaskedLM"),
    **dict.fromkeys(ENCODER_DECODERS, "AutoModelForSeq2SeqLM"),
}


def _config(kind: str, fields: dict[str, Any]) -> Any:
    base = transformers.AutoConfig.for_model(kind)
    aliases = getattr(base, "attribute_map", {})
    known = base.to_dict().keys() | aliases.keys()
    sizes = {**_SIZES, **(_EXPERTS if kind in MIXTURES else {})}
    own = {name: value for name, value in sizes.items() if name in known and aliases.get(name) not in fields}
    return transformers.AutoConfig.for_model(kind, **{**own, **fields})


def survey_config(name: str, **fields: Any) -> Any:
    """The config of a tiny model of a family; `fields` change that of a model without a tower."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name not in WRAPPERS:
        return _config(name, {**{**SURVEY, **MIXTURES, "dbrx": _DBRX}[name], **fields})
    text, tower, own = WRAPPERS[name]
    base = transformers.AutoConfig.for_model(name)
    kind = text.get("model_type") or base.text_config.model_type
    inner = _config(kind, {key: value for key, value in text.items() if key != "model_type"})
    if "model_type" not in tower:
        tower = {**tower, "model_type": base.vision_config.model_type}
    return transformers.AutoConfig.for_model(
        name, text_config=inner.to_dict(), vision_config=tower, tie_word_embeddings=False, **own
    )


def survey_model(name: str, **fields: Any) -> transformers.PreTrainedModel:
    """A random model of a family, its config changed by `fields`.

    No norm is exactly one and no tensor zero, which would hide mistakes.
    """
    auto = "AutoModelForImageTextToText" if name in WRAPPERS else _CLASSES.get(name, "AutoModelForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(survey_config(name, **fields), dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in key and "dt" not in key:
                torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.1)
            elif parameter.dim() > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.05)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 1, 2
    model.eval()
    return model


def chosen_third() -> tuple[str, list[tuple[str, str]]]:
    """Which pairs of family and recipe run, and why. Every family runs with one recipe; after three days with all.

    `BITQUILT_SURVEY=all` takes all pairs, `0`, `1` or `2` a third.
    """
    wanted = os.environ.get("BITQUILT_SURVEY") or str(datetime.date.today().toordinal() % 3)
    families = (*SURVEY, *WRAPPERS, *MIXTURES)
    pairs = [
        (family, recipe)
        for i, family in enumerate(families)
        for j, recipe in enumerate(RECIPES)
        if wanted == "all" or (i + j) % 3 == int(wanted)
    ]
    text = (
        "all pairs" if wanted == "all" else f"third {wanted} of 0 to 2, by the day; BITQUILT_SURVEY=all runs all pairs"
    )
    return f"survey of {len(families)} families: {text}", pairs


def folders(make: Callable[[str], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`name` -> a folder with the model that `make` returns for it, made once: read only."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            make(name).save_pretrained(made[name])
        return made[name]

    return folder


def tokens(rows: int, length: int, seed: int) -> Tensor:
    """Random token ids `[rows, length]` of the small vocabulary."""
    return torch.randint(3, 58, (rows, length), generator=torch.Generator().manual_seed(seed))
