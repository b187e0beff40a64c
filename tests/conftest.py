"""Tiny random models of every family, made here: nothing is downloaded."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # read when the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitquilt
from tests.model.survey_models import chosen_third

# The same examples on every machine, and no deadline: a busy machine is no bug. HYPOTHESIS_PROFILE=default explores.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

VOCAB = 64
SAMPLES, SEQ_LEN = 6, 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ONE_HEAD_COUNT = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_HEAD_8 = {**_COMMON, "head_dim": 8}
_WINDOW = {"sliding_window": 6}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA3 = {**_HEAD_8, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_QWEN3_MOE = {
    **_HEAD_8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
}

# name -> (model class, config class, fields); the windows are shorter than the calibration sequences
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _COMMON),
    "llama-tied-bias": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEAD_8),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_COMMON, **_WINDOW}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_HEAD_8, **_WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA3, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _COMMON),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt-projected": ("OPTForCausalLM", "OPTConfig", {**_OPT, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _ONE_HEAD_COUNT),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _COMMON),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_MOE),
    "bert": ("BertForMaskedLM", "BertConfig", _ONE_HEAD_COUNT),
}


def pytest_report_header() -> str:
    """Which part of the survey runs: it is another one every day."""
    return chosen_third()[0]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are slower on more threads, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


def build_tiny(family: str, seed: int, dtype: torch.dtype, fields: dict[str, Any]) -> transformers.PreTrainedModel:
    """A random model in memory: a family's `fields`, changed by these."""
    model_class, config_class, own = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**own, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of exactly one and biases of zero would hide mistakes
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., transformers.PreTrainedModel]:
    """`(family, seed=0, dtype=float32, **config fields)` -> a random model in memory."""

    def build(
        family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
    ) -> transformers.PreTrainedModel:
        return build_tiny(family, seed, dtype, fields)

    return build


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`(family, seed=0, dtype=float32, **config fields)` -> a folder with such a model, made once: read only."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
        key = repr((family, seed, dtype, sorted(fields.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"model-{family}") / family
            build_tiny(family, seed, dtype, fields).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration that needs no tokenizer: SAMPLES x SEQ_LEN ids."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    ids = torch.randint(3, VOCAB, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(7))
    save_file({"input_ids": ids}, path)
    return path


@pytest.fixture(scope="session")
def quantize_tiny(token_file: Path) -> Callable[..., bitquilt.Result]:
    """`bitquilt.quantize` with the tests' tokens and tiny groups unless said otherwise."""

    def quantize(model: Path, out: Path, recipe: Any = "slim-llm", **options: Any) -> bitquilt.Result:
        defaults: dict[str, Any] = {"calibration": token_file, "samples": SAMPLES, "seq_len": SEQ_LEN}
        if isinstance(recipe, str):
            defaults |= {"bits": 3, "group_size": 8}
        return bitquilt.quantize(model, recipe, out=out, **{**defaults, **options})

    return quantize


@pytest.fixture(scope="session")
def make_quantized(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., bitquilt.Result]:
    """`(family, recipe, **options)` -> a finished run, made once. Do not write there."""
    made: dict[str, bitquilt.Result] = {}

    def make(family: str = "llama", recipe: str = "slim-llm", **options: Any) -> bitquilt.Result:
        key = repr((family, recipe, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp(f"quantized-{family}") / recipe
            made[key] = quantize_tiny(make_model(family), out, recipe, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor in the safetensors files of a folder."""

    def read(folder: Path) -> dict[str, Tensor]:
        return {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }

    return read
