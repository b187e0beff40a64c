"""What people do with a loaded model: save, cast, copy, compile and generate with it."""

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import bitquilt
from bitquilt import Result, UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import read_layouts
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.structure import open_skeleton
from bitquilt.recipes.cmpq.cmpq import CMPQ

from ..conftest import VOCAB

MakeQuantized = Callable[..., Result]


def logits(model: Any, dtype: torch.dtype | None = None) -> Tensor:
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found if dtype is None else found.to(dtype)


def packed(model: torch.nn.Module) -> dict[str, Tensor]:
    """Everything the quantized layers store, except biases."""
    return {
        f"{path}.{name}": buffer.clone()
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for name, buffer in module.named_buffers()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def folder(make_quantized: MakeQuantized) -> Path:
    return make_quantized("llama-tied-bias").folder


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


def test_a_program_without_bitquilt_stops_and_says_what_is_missing(folder: Path) -> None:
    """transformers alone would fill the quantized layers with random numbers."""
    code = f"""
import sys
sys.modules["bitquilt"] = None
from transformers import AutoModel, AutoModelForCausalLM
for kind in (AutoModelForCausalLM, AutoModel):
    try:
        kind.from_pretrained({str(folder)!r})
    except ValueError as error:
        print(error)
"""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=plain
    )
    assert done.stdout.count("were quantized by bitquilt") == 2
    assert done.stdout.count("Install bitquilt and run `import bitquilt` before from_pretrained") == 2


def test_checkpoints_without_the_guard_load_as_before(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """Those of earlier builds, and copies that save_pretrained writes."""
    shutil.copytree(folder, tmp_path / "earlier")
    config = json.loads((folder / "config.json").read_text())
    assert "bitquilt" in config.pop("transformers_weights")
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "earlier")), logits(model))
    assert not hasattr(model.config, "transformers_weights")


@pytest.mark.parametrize("order", ["bitquilt, torch, transformers", "torch, transformers.quantizers, bitquilt"])
def test_a_fresh_process_needs_the_import_and_from_pretrained_only(order: str, folder: Path) -> None:
    code = f"""
import warnings
warnings.simplefilter("error")
import {order}
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
ids = torch.arange(3, 9)[None]
out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
print([type(model.model.layers[0].mlp.up_proj).__name__, out[0].tolist()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = bitquilt.load(folder)
    ids = torch.arange(3, 9)[None]
    mask = torch.ones_like(ids)
    here = loaded.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=mask)
    assert done.stdout.splitlines()[-1] == str(["QuantizedLinear", here[0].tolist()])
    assert "MISSING" not in done.stderr
    assert "Unknown quantization" not in done.stderr


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gpt2", "phi3", "mixtral", "bert"])
def test_save_pretrained_writes_the_same_model_again(
    family: str, make_quantized: MakeQuantized, tmp_path: Path, read_tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    source = make_quantized(family).folder
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    first = kind.from_pretrained(source)
    first.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    second, written = kind.from_pretrained(tmp_path / "again"), read_tensors(tmp_path / "again")
    assert_same(packed(first), packed(second))
    assert torch.equal(logits(first), logits(second))
    # transformers writes Mixtral's blocks under their older name
    again = {k.replace(".block_sparse_moe.experts.", ".mlp.experts."): t for k, t in written.items()}
    assert_same(read_tensors(source), again)
    entries = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (source, tmp_path / "again")]
    assert entries[0] == entries[1]
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_the_model_never_casts_what_is_packed(model: PreTrainedModel, dtype: torch.dtype) -> None:
    before, exact = packed(model), logits(model)
    # transformers itself refuses `half` and `float` on quantized models, so the casts are torch's own
    plain = torch.nn.Module
    short = {torch.bfloat16: plain.bfloat16, torch.float16: plain.half, torch.float32: plain.float}[dtype]
    for cast in (lambda: model.to(dtype), lambda: short(model), lambda: model.to(device="cpu", dtype=dtype)):
        assert cast() is model
        assert_same(before, packed(model))
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.bias.dtype == dtype
        assert layer.weight.dtype == dtype
        got = logits(model)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))
    if dtype == torch.float32:
        assert torch.equal(logits(model), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype_keeps_the_packed_tensors(make_quantized: MakeQuantized, dtype: torch.dtype) -> None:
    folder = make_quantized("gpt2").folder  # no rotary table, which transformers makes in fp32 and `.to` casts
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    assert_same(packed(model), packed(loaded))
    assert torch.equal(logits(loaded), logits(model.to(dtype)))


def test_device_map(folder: Path, model: PreTrainedModel) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert all(not tensor.is_meta for tensor in packed(loaded).values())


def test_state_dicts_go_from_model_to_model(
    folder: Path, model: PreTrainedModel, make_quantized: MakeQuantized
) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert not torch.equal(logits(other), logits(model))
    assert not any(other.load_state_dict(state))
    assert torch.equal(logits(other), logits(model))


def test_copies_and_pickles(model: PreTrainedModel) -> None:
    expected = logits(model)
    copied = copy.deepcopy(model)
    copied.model.layers[0].mlp.up_proj.scale_0.zero_()
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_generation_with_a_cache_is_generation_without_one(family: str, make_quantized: MakeQuantized) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_quantized(family).folder)
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(8))
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2", "gemma3"])
def test_compiled_is_eager_in_one_graph(family: str, make_quantized: MakeQuantized) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_quantized(family).folder, use_cache=False)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_gradients_reach_the_input_and_not_the_codes(model: PreTrainedModel) -> None:
    embedded = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None
    assert float(embedded.grad.abs().max()) > 0
    assert not any(tensor.requires_grad for tensor in packed(model).values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_base_model_loads_without_its_head(family: str, make_quantized: MakeQuantized, tmp_path: Path) -> None:
    folder = make_quantized(family).folder
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    options = {"add_pooling_layer": False} if family == "bert" else {}
    base, whole = AutoModel.from_pretrained(folder, **options), kind.from_pretrained(folder)
    assert {type(m).__name__ for m in base.modules()} >= {"QuantizedLinear"}
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(base(input_ids=ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base", **options)
    assert_same(packed(again), packed(base))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).last_hidden_state, expected)


def test_another_head_starts_at_random_on_the_quantized_body(folder: Path, model: PreTrainedModel) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert_same(packed(classifier), packed(model))
    assert classifier.score.weight.shape == (3, 32)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_checkpoint_of_a_base_model_loads_under_a_head(
    family: str, make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    AutoModel.from_pretrained(make_model(family)).save_pretrained(tmp_path / "base")
    result = quantize_tiny(tmp_path / "base", tmp_path / "out", "rtn")
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    base, whole = bitquilt.load(tmp_path / "out"), kind.from_pretrained(tmp_path / "out")
    assert len(packed(base)) == len(packed(whole)) >= 2 * len(result.report["layers"])
    assert all(torch.equal(a, b) for a, b in zip(packed(base).values(), packed(whole).values(), strict=True))


def test_load_is_from_pretrained(folder: Path, model: PreTrainedModel) -> None:
    assert torch.equal(logits(bitquilt.load(folder)), logits(model))
    assert bitquilt.load(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_refuses_what_is_not_ours(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a bitquilt checkpoint .quant_method is None"):
        bitquilt.load(make_model())
    with pytest.raises(UserError, match="no folder"):
        bitquilt.load(tmp_path / "nothing")


def test_load_an_encoder(make_quantized: MakeQuantized) -> None:
    folder = make_quantized("bert", "rtn").folder
    expected = logits(AutoModelForMaskedLM.from_pretrained(folder))
    assert torch.equal(logits(bitquilt.load(folder)), expected)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    copied = tmp_path / "damaged"
    shutil.copytree(folder, copied)
    return copied


def _shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def _refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=match):
        bitquilt.load(folder)


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


CODES = "model.layers.1.mlp.up_proj.codes_0"


def test_a_newer_format_is_refused(damaged: Path) -> None:
    _edit_config(damaged, lambda entry: entry.update(format_version=2))
    _refused(damaged, r"format version 2.*reads up to 1.*upgrade")


def test_a_missing_packed_tensor_is_named(damaged: Path) -> None:
    shard = _shard_of(damaged, CODES)
    tensors = load_file(shard)
    del tensors[CODES]
    save_file(tensors, shard, {"format": "pt"})
    _refused(damaged, CODES)
    index_path = damaged / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"][CODES]
    index_path.write_text(json.dumps(index))
    _refused(damaged, f"{CODES} is missing")


def test_a_packed_tensor_that_is_missing_from_a_streamed_block_is_named(damaged: Path) -> None:
    shard = _shard_of(damaged, CODES)
    tensors = load_file(shard)
    del tensors[CODES]
    save_file(tensors, shard, {"format": "pt"})
    (damaged / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(damaged)
    skeleton = open_skeleton(checkpoint, read_layouts(checkpoint.config))
    with pytest.raises(UserError, match=rf"tensor {CODES} is missing"):
        skeleton.load("model.layers.1")


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_packed_tensor_of_another_shape_or_type_is_named(damaged: Path, change: str) -> None:
    shard = _shard_of(damaged, CODES)
    tensors = load_file(shard)
    tensors[CODES] = tensors[CODES][:, :-1].contiguous() if change == "shape" else tensors[CODES].to(torch.int32)
    save_file(tensors, shard, {"format": "pt"})
    _refused(damaged, rf"{CODES} is \[48, .*config\.json wants \[48, ")


UP = "model.layers.1.mlp.up_proj"


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.scale_0"][0, 0] = torch.nan


def _unnamed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.codes_9"] = torch.zeros(3)


def _full_precision(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = torch.zeros(48, 32)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_nan, rf"tensor {UP}\.scale_0 holds NaN or infinity"),
        (_unnamed, rf"tensor {UP}\.codes_9 is in the checkpoint, but config\.json names no such part"),
        (_full_precision, rf"tensor {UP}\.weight is in the checkpoint, but"),
    ],
)
def test_tensors_that_the_layout_does_not_allow_are_refused(
    damaged: Path, damage: Callable[[dict[str, Tensor]], None], match: str
) -> None:
    shard = _shard_of(damaged, CODES)
    tensors = load_file(shard)
    damage(tensors)
    save_file(tensors, shard, {"format": "pt"})
    _refused(damaged, match)


def test_an_order_of_channels_that_the_layout_does_not_allow_is_refused(
    make_quantized: MakeQuantized, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(make_quantized("llama", "mg-ptq", bits=2.5).folder, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if name.endswith(".permutation"))
    tensors = load_file(_shard_of(folder, name))
    tensors[name][0] ^= 1
    save_file(tensors, _shard_of(folder, name), {"format": "pt"})
    match = rf"tensor {name} (gives the segments|is not an order)"
    _refused(folder, match)
    with pytest.raises(UserError, match=match):
        _offloaded(folder, tmp_path / "offloaded")


def _offloaded(folder: Path, to: Path) -> PreTrainedModel:
    """The model with its blocks on disk, buffers too, where transformers leaves them on `meta`."""
    places = {"model.layers": "disk", **dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")}
    places["model.rotary_emb"] = "cpu"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=str(to), offload_buffers=True
    )
    return model


def test_what_is_offloaded_is_checked_in_the_files(
    folder: Path, model: PreTrainedModel, damaged: Path, tmp_path: Path
) -> None:
    loaded = _offloaded(folder, tmp_path / "one")
    assert loaded.get_submodule(UP).get_buffer("scale_0").is_meta
    assert torch.equal(logits(loaded), logits(model))
    shard = _shard_of(damaged, CODES)
    tensors = load_file(shard)
    _nan(tensors)
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=rf"tensor {UP}\.scale_0 holds NaN or infinity"):
        _offloaded(damaged, tmp_path / "other")


def test_a_truncated_shard_is_named(damaged: Path) -> None:
    shard = _shard_of(damaged, CODES)
    shard.write_bytes(shard.read_bytes()[:-100])
    _refused(damaged, rf"{shard.name} is damaged or truncated")


def test_a_missing_tensor_that_is_not_packed_is_named(damaged: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    shard = _shard_of(damaged, name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    _refused(damaged, name)
    index_path = damaged / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"][name]
    index_path.write_text(json.dumps(index))
    _refused(damaged, f"{name} is missing")


def test_layouts_that_disagree_with_the_model_are_refused(damaged: Path) -> None:
    def rename(entry: dict[str, Any]) -> None:
        entry["modules"]["model.layers.7.mlp.up_proj"] = entry["modules"].pop("model.layers.1.mlp.up_proj")

    _edit_config(damaged, rename)
    _refused(damaged, r"model\.layers\.7\.mlp\.up_proj")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda layout: layout.update(out_features=40), r"mlp\.up_proj"),
        (lambda layout: layout["segments"][0].update(bits=9), r"layout of model\.layers\.1\.mlp\.up_proj: bits is 9"),
        (lambda layout: layout["segments"][0].update(width=3), r"mlp\.up_proj: segment widths"),
        (lambda layout: layout["segments"][0].pop("grid"), r"mlp\.up_proj: field 'grid' is missing"),
        (lambda layout: layout["segments"][0].update(grid="spline"), r"mlp\.up_proj: grid is 'spline'"),
        (lambda layout: layout.update(block="x"), r"layout of model\.layers\.1\.mlp\.up_proj"),
    ],
)
def test_damaged_layouts_are_named(damaged: Path, edit: Callable[[dict[str, Any]], None], match: str) -> None:
    _edit_config(damaged, lambda entry: edit(entry["modules"]["model.layers.1.mlp.up_proj"]))
    _refused(damaged, match)


def test_a_config_without_layouts_is_refused(damaged: Path) -> None:
    _edit_config(damaged, lambda entry: entry.update(modules={}))
    _refused(damaged, "lists no quantized modules")


def test_a_model_config_that_disagrees_with_the_tensors_is_refused(damaged: Path) -> None:
    path = damaged / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] = 64
    path.write_text(json.dumps(config))
    _refused(damaged, r"mlp\.\w+_proj is \[")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", b'{"eos_token_id": ' + b"[" * 50_000),
        ("config.json", {"eos_token_id": [None]}),
        ("model.safetensors.index.json", {"metadata": [1, "two"]}),
    ],
)
def test_files_that_transformers_cannot_read_end_in_a_message(
    make_quantized: MakeQuantized, tmp_path: Path, name: str, content: bytes | dict[str, Any]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(make_quantized("llama").folder, folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"copy does not load \(\w+: .*\): a file there is damaged"):
        bitquilt.load(folder)


def test_a_folder_without_its_index_loads(make_quantized: MakeQuantized, tmp_path: Path) -> None:
    """All files are the model then, though transformers knows none of their names."""
    folder = tmp_path / "copy"
    shutil.copytree(make_quantized("llama").folder, folder)
    (folder / "model.safetensors.index.json").unlink()
    ids = torch.arange(8)[None]
    assert torch.equal(bitquilt.load(folder)(ids).logits, bitquilt.load(make_quantized("llama").folder)(ids).logits)


@pytest.mark.parametrize(
    ("family", "recipe", "options"),
    [("llama", CMPQ(bits=3), {}), ("llama-tied-bias", "slim-llm", {"embedding_bits": 8})],
)
def test_models_are_pickled_copied_and_saved(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., Result],
    tmp_path: Path,
    family: str,
    recipe: Any,
    options: dict[str, Any],
) -> None:
    """Gains in float8 too, which pickle does not know."""
    model = bitquilt.load(quantize_tiny(make_model(family), tmp_path / "out", recipe, **options).folder)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(ids).logits, expected)
        dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
        assert {name: buffer.dtype for name, buffer in other.named_buffers()} == dtypes
    if isinstance(recipe, CMPQ):
        assert torch.float8_e4m3fn in dtypes.values()


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("llama", {"embedding_bits": 8}, "embedding of this model is"),
        ("llama-tied-bias", {"embedding_bits": 8}, "embedding and head of this model are"),
        ("llama", {"include_head": True}, "head of this model is"),
    ],
)
def test_quantized_tables_refuse_another_size_before_anything_changes(
    make_quantized: MakeQuantized, family: str, options: dict[str, Any], named: str
) -> None:
    model = bitquilt.load(make_quantized(family, "rtn", **options).folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for asked in ({"new_num_tokens": VOCAB + 6}, {"new_num_tokens": 8}, {"pad_to_multiple_of": 48}):
            with pytest.raises(UserError, match=rf"the token {named} quantized and cannot .* from {VOCAB} to"):
                other.resize_token_embeddings(**asked)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        other.resize_token_embeddings(VOCAB)  # their own size is fine
        other.resize_token_embeddings(pad_to_multiple_of=8)


def test_a_full_precision_table_may_be_resized(make_quantized: MakeQuantized) -> None:
    model = bitquilt.load(make_quantized("llama").folder)
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert model(torch.tensor([[VOCAB + 5]])).logits.shape[-1] == VOCAB + 6
