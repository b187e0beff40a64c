"""Exports to GGUF: values by `gguf`, logits by llama.cpp. `pip install gguf llama-cpp-python` installs them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import bitquilt
from bitquilt.core.budget import Budget
from bitquilt.engines.engine import ModelSettings
from bitquilt.engines.gguf_model import GgufModel
from bitquilt.engines.known import ENGINES
from bitquilt.errors import UserError
from bitquilt.ops.block_types import BLOCK_TYPES
from tests.engines.test_affine import stored

GGUF = ENGINES["gguf"]
WIDE = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 64}
# the name of the tests' family -> fields besides WIDE, options of the run
FAMILIES = {
    "llama": ({}, {"include_head": True}),
    "llama-tied-bias": ({"rope_parameters": LLAMA3}, {"embedding_bits": 4}),
    "mistral": ({"sliding_window": 64}, {"head_bits": 6}),
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "gemma2": (GEMMA, {}),
    "gemma3": ({**GEMMA, "layer_types": ["sliding_attention"] * 2}, {}),
    "phi3": ({}, {}),
    "olmo2": ({}, {}),
}


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_our_logits(family, make_model, quantize_tiny, tmp_path, gguf):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    fields, options = FAMILIES[family]
    model = make_model(family, dtype=torch.float16, **{**WIDE, **fields})
    quantize_tiny(model, tmp_path / "ours", "gptq", bits=4, group_size=32, engine="gguf", **options)
    done = bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "gguf")
    assert done.difference.absolute == 0
    ids = torch.tensor([[5, 9, 33, 21, 60, 7, 12, 50]])
    with torch.no_grad():
        ours = bitquilt.load(tmp_path / "ours", dtype=torch.float32)(ids).logits[0].log_softmax(-1)
    path = str(tmp_path / "theirs" / "model.gguf")
    found = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    found.eval(ids[0].tolist())
    theirs = torch.tensor(np.array(found.scores[: ids.shape[1]])).log_softmax(-1)
    found.close()
    apart = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert apart < 0.01  # it rounds inputs to 8 bits; another order of rows, or no 1 in Gemma's norms, gives over 0.5


def test_llama_3s_rotary_divisors_are_those_of_transformers(tmp_path):
    config = LlamaConfig(head_dim=64, rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    known = {"model_type": "llama", "head_dim": 64, "rope_parameters": config.rope_parameters}
    divisors = GgufModel(ModelSettings({}, known, ()), tmp_path).rotary_divisors
    plain = 1e4 ** -(torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / divisors, theirs, rtol=1e-5)
    assert set(divisors.tolist()) >= {1.0, 8.0}


def test_every_type_in_a_plan_takes_the_bytes_that_were_promised(make_model, token_file, tmp_path, gguf):
    model = make_model("llama", dtype=torch.float16, **WIDE)
    budget = Budget("bpw", 5.2)
    planned = bitquilt.plan(model, "gptq", budget=budget, engine="gguf").planned
    made = bitquilt.quantize(
        model, "gptq", token_file, tmp_path / "ours", budget=budget, engine="gguf", samples=6, seq_len=16
    )
    done = bitquilt.export(made.folder, tmp_path / "theirs", "gguf")
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "theirs").iterdir())
    again = bitquilt.plan(model, "gptq", budget=Budget("size", done.bytes), engine="gguf").planned
    assert planned.exported_bytes <= again.exported_bytes <= done.bytes
    kinds = {held.kind for held in done.layers.values()}
    assert len(kinds) > 1  # 64 inputs: blocks of 32; 256 inputs: of 256
    stored_kinds = {
        str(t.tensor_type.name).lower() for t in gguf.GGUFReader(tmp_path / "theirs" / "model.gguf").tensors
    }
    assert kinds <= stored_kinds


@pytest.mark.parametrize(
    ("bits", "kind", "apart"), [(2, "q4_1", 1e-3), (4, "q4_1", 1e-3), (5, "q5_1", 1e-3), (7, "q8_0", 0)]
)
def test_uniform_steps_fit_in_wider_blocks(bits, kind, apart, gguf):
    weight = stored((bits,) * 2, 32, 64)
    held = GGUF.container(weight.layout)
    assert held.kind == kind
    made = GGUF.converted(weight, held, torch.float16)
    assert made["weight"].shape[1] == 64 // 32 * BLOCK_TYPES[kind].block_bytes
    from bitquilt.engines.affine import affine

    ours = affine(weight, 32).decode()
    assert float((GGUF.decode(made, held) - ours).abs().max()) <= apart * float(ours.abs().max())


def test_what_gguf_cannot_hold_is_refused_before_work(make_model, quantize_tiny, tmp_path, gguf):
    narrow = make_model("llama", dtype=torch.float16)  # 48 inputs
    with pytest.raises(UserError, match="no multiple of 32"):
        quantize_tiny(narrow, tmp_path / "a", "gptq", bits=4, group_size=32, engine="gguf")
    wide = make_model("llama", dtype=torch.float16, **WIDE)
    with pytest.raises(UserError, match="slim-llm has no grids for GGUF"):
        quantize_tiny(wide, tmp_path / "b", "slim-llm", bits=4, group_size=32, engine="gguf")
    with pytest.raises(UserError, match="group_size is 64"):
        quantize_tiny(wide, tmp_path / "c", "gptq", bits=4, group_size=64, engine="gguf")
    with pytest.raises(UserError, match="compared with gemma2"):
        quantize_tiny(make_model("gpt2"), tmp_path / "d", "gptq", bits=4, group_size=32, engine="gguf")
    assert not list(tmp_path.iterdir())


def test_settings_that_llama_cpp_does_not_read_are_refused(make_model, quantize_tiny, tmp_path, gguf):
    model = make_model("gemma3", dtype=torch.float16, **{**WIDE, **GEMMA})  # every second layer without a window
    quantize_tiny(model, tmp_path / "ours", "rtn", bits=4, group_size=32)
    with pytest.raises(UserError, match="layer_types is"):
        bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path, gguf):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    demo = Path(bitquilt.__file__).parent / "demo"
    bitquilt.quantize(demo, "rtn", out=tmp_path / "ours", bits=4, engine="gguf", keep_embedding=True)
    bitquilt.export(tmp_path / "ours", tmp_path / "theirs", "gguf")
    text = "The 12 cats' toys,  don't\n\n\tfall <|endoftext|>in 2026: \u00e9\u00df\u4f60!"
    wanted = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    found = llama_cpp.Llama(str(tmp_path / "theirs" / "model.gguf"), vocab_only=True, verbose=False)
    assert found.tokenize(text.encode(), add_bos=False, special=True) == wanted
    found.close()
