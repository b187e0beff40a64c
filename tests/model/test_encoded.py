"""Folders that other tools quantized: written here in each format, read as the matrices that their codes make."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import bitquilt
from bitquilt import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.encoded.weights import AwqWeight, Fp4Pairs, GptqWeight, PackedIntegers, ScaledCodes
from bitquilt.model.structure import open_skeleton
from bitquilt.model.transformers_model import class_of, load_pretrained
from bitquilt.report.evaluation import model_size

MakeModel = Callable[..., Path]
Quantize = Callable[..., bitquilt.Result]
Encode = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def numbers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack the rows of `codes` into int32, by Python's own integers."""
    packed = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    size = -(-codes.shape[1] * bits // 32) * 4
    return torch.from_numpy(np.stack([np.frombuffer(row.to_bytes(size, "little"), np.int32) for row in packed]).copy())


def per_weight(grid: Tensor, rows: int, columns: int, down: int, right: int) -> Tensor:
    """The value of each weight's block, one by one."""
    return torch.stack([torch.stack([grid[i // down, j // right] for j in range(columns)]) for i in range(rows)])


def fp8(block: tuple[int, int] | None, name: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Encode:
    """fp8 or int8 codes with a scale per block; None for one scale without dimensions."""

    def encode(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        down, right = (rows, columns) if block is None else (block[0] or rows, block[1] or columns)
        grid = 2e-3 * (
            1 + torch.rand(-(-rows // down), -(-columns // right), generator=torch.Generator().manual_seed(5))
        )
        scale = per_weight(grid, rows, columns, down, right)
        codes = weight.float() / scale
        codes = codes.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else codes.to(dtype)
        decoded = (codes.float() * scale).bfloat16()
        stored = grid.squeeze() if block is None else grid
        return {f"{path}.weight": codes, f"{path}.{name}": stored, f"{path}.input_scale": torch.ones(())}, decoded

    return encode


def int8_with_zeros(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale, zero = torch.full((len(weight), 1), 4e-3), numbers(-20, 20, len(weight), 1).to(torch.int8)
    codes = (weight.float() / scale + zero).round().clamp(-128, 127).to(torch.int8)
    stored = {"weight": codes, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
    decoded = (codes.float() - zero.float()) * scale.bfloat16().float()
    return {f"{path}.{name}": tensor for name, tensor in stored.items()}, decoded.bfloat16()


def gptq(bits: int, v2: bool, act_order: bool = False, group: int = 16) -> Encode:
    def encode(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        groups = columns // group
        codes, zero = numbers(0, 2**bits, rows, columns), numbers(0 if v2 else 1, 2**bits, rows, groups, seed=1)
        scale = (2.0**-bits * (1 + torch.rand(rows, groups, generator=torch.Generator().manual_seed(2)))).half()
        index = torch.arange(columns) // group
        if act_order:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        stored = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": words(zero.t() - (0 if v2 else 1), bits),
            "scales": scale.t().contiguous(),
            "g_idx": index.int(),
        }
        decoded = (codes - zero[:, index]).float() * scale.float()[:, index]
        return {f"{path}.{name}": tensor for name, tensor in stored.items()}, decoded.bfloat16()

    return encode


def awq(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    codes, zero = numbers(0, 16, columns, rows), numbers(0, 16, columns // 16, rows, seed=1)
    scale = (0.05 * (1 + torch.rand(columns // 16, rows, generator=torch.Generator().manual_seed(2)))).half()
    order = torch.tensor([8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(rows)])
    stored = {"qweight": words(codes[:, order], 4), "qzeros": words(zero[:, order], 4), "scales": scale}
    decoded = torch.stack([(codes[j] - zero[j // 16]).float() * scale[j // 16].float() for j in range(columns)], 1)
    return {f"{path}.{name}": tensor for name, tensor in stored.items()}, decoded.bfloat16()


def packed(bits: int, symmetric: bool, group: int = 16) -> Encode:
    def encode(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        half = 2 ** (bits - 1)
        codes, zero = numbers(-half, half, rows, columns), numbers(-half, half, rows, columns // group, seed=1)
        scale = (2.0**-bits * (1 + torch.rand(zero.shape, generator=torch.Generator().manual_seed(2)))).bfloat16()
        index = torch.arange(columns) // group
        stored = {
            "weight_packed": words(codes + half, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if symmetric:
            zero = torch.zeros_like(zero)
        else:
            stored["weight_zero_point"] = words((zero + half).t(), bits).t().contiguous()
        decoded = (codes - zero[:, index]).float() * scale.float()[:, index]
        return {f"{path}.{name}": tensor for name, tensor in stored.items()}, decoded.bfloat16()

    return encode


TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp4(pairs: Tensor) -> Tensor:
    """Numbers of 4 bits, the lower half of a byte first."""
    value = torch.tensor([*TABLE, *(-one for one in TABLE)])
    return torch.stack([value[(pairs & 15).long()], value[(pairs >> 4).long()]], -1).flatten(-2)


def pairs(codes_name: str, common: str | None) -> Encode:
    """MXFP4 with exponents, or NVFP4 with scales in fp8 and the number `common`."""

    def encode(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        size = 32 if common is None else 16
        codes = numbers(0, 256, rows, columns // 2).to(torch.uint8)
        stored = {codes_name: codes}
        if common is None:
            scale = numbers(120, 126, rows, columns // size, seed=1).to(torch.uint8)
            factors = 2.0 ** (scale.float() - 127)
        else:
            scale = torch.rand(rows, columns // size, generator=torch.Generator().manual_seed(1)).to(
                torch.float8_e4m3fn
            )
            stored[common] = torch.tensor(0.125 if common.endswith("_2") else 8.0)
            factors = scale.float() * 0.125
        decoded = fp4(codes) * factors.repeat_interleave(size, 1)
        stored["weight_scale"] = scale
        return {f"{path}.{name}": tensor for name, tensor in stored.items()}, decoded.bfloat16()

    return encode


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"a": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def method(name: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **settings}}


# how a layer is written, what config.json says, what the source is called, bits per weight with scales
FORMATS: dict[str, tuple[Encode, dict[str, Any], str]] = {
    "fp8 blocks": (
        fp8((24, 24), "weight_scale_inv"), method("fp8", weight_block_size=[24, 24]), "fp8 in blocks of 24 x 24"
    ),
    "fp8 without config": (fp8(None, "weight_scale"), {}, "fp8 with a scale per matrix"),
    "fp8 rows": (fp8((1, 0), "weight_scale"), method("fbgemm_fp8"), "fp8 with a scale per row"),
    "fp8 in e5m2": (fp8((0, 0), "weight_scale_inv", torch.float8_e5m2), {}, "fp8 with a scale per matrix"),
    "int8 rows": (fp8((1, 0), "weight_scale", torch.int8), compressed(num_bits=8), "int8 with a scale per row"),
    "int8 with zeros": (int8_with_zeros, compressed(num_bits=8), "int8 with a scale per row"),
    "gptq": (gptq(4, v2=False), method("gptq", bits=4, group_size=16), "GPTQ with 4 bits"),
    "gptq v2 in act order": (
        gptq(3, v2=True, act_order=True), method("gptq", checkpoint_format="gptq_v2", bits=3), "GPTQ with 3 bits"
    ),
    "gptq of 8 bits": (gptq(8, v2=False), {}, "GPTQ with 8 bits"),
    "awq": (awq, method("awq", bits=4, group_size=16, version="gemm"), "AWQ with 4 bits"),
    "packed": (packed(4, True), compressed(num_bits=4, group_size=16), "int4 of compressed-tensors"),
    "mxfp4 of compressed-tensors": (pairs("weight_packed", None), method("compressed-tensors"), "MXFP4"),
    "nvfp4 of compressed-tensors": (
        pairs("weight_packed", "weight_global_scale"), method("compressed-tensors"), "NVFP4"
    ),
    "nvfp4 of modelopt": (pairs("weight", "weight_scale_2"), {}, "NVFP4"),
    "packed with zeros": (packed(3, False), compressed(num_bits=3, group_size=16), "int3 of compressed-tensors"),
}  # fmt: off


@pytest.fixture(scope="module")
def plain(make_model: MakeModel) -> Path:
    return make_model("llama", dtype=torch.bfloat16, intermediate_size=64)


def write(source: Path, at: Path, encode: Encode, config: dict[str, Any]) -> tuple[Path, Path]:
    """The model in two folders: its layers encoded, and what they decode to in 16 bits."""
    folders = at / "encoded", at / "decoded"
    tensors = load_file(source / "model.safetensors")
    parts: tuple[dict[str, Tensor], ...] = ({}, {})
    for name, tensor in tensors.items():
        if "_proj." in name:
            stored, decoded = encode(name.removesuffix(".weight"), tensor)
            parts[0].update(stored)
            parts[1][name] = decoded.contiguous()
        else:
            parts[0][name] = parts[1][name] = tensor
    for folder, kept, entries in zip(folders, parts, (config, {}), strict=True):
        shutil.copytree(source, folder)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **entries}))
    return folders


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_reads_as_its_decoded_twin(kind: str, plain: Path, tmp_path: Path) -> None:
    encode, config, label = FORMATS[kind]
    one, twin = (open_checkpoint(folder) for folder in write(plain, tmp_path, encode, config))
    assert {n: (i.shape, i.dtype, i.nbytes) for n, i in one.tensors.items()} == {
        n: (i.shape, i.dtype, i.nbytes) for n, i in twin.tensors.items()
    }
    read, expected = one.read(one.tensors), twin.read(twin.tensors)
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert one.source.name == label
    assert one.stored_bytes < one.nbytes == twin.nbytes == twin.stored_bytes
    assert twin.source.to_json() is None
    skeletons = open_skeleton(one), open_skeleton(twin)
    assert {p: sorted(n) for p, n in skeletons[0].sources.items()} == {
        p: sorted(n) for p, n in skeletons[1].sources.items()
    }


def test_a_run_makes_of_it_what_it_makes_of_the_twin(
    plain: Path, quantize_tiny: Quantize, tmp_path: Path, read_tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    encode, config, label = FORMATS["fp8 blocks"]
    folders = write(plain, tmp_path, encode, config)
    (folders[0] / "quantize_config.json").write_text("{}")
    runs = [quantize_tiny(folder, tmp_path / f"out-{folder.name}", "rtn", skip=("*.down_proj",)) for folder in folders]
    one, twin = (read_tensors(run.folder) for run in runs)
    assert one.keys() == twin.keys()
    assert all(torch.equal(one[name], twin[name]) for name in one)
    entry = json.loads((runs[0].folder / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "bitquilt"
    assert "weight_block_size" not in entry
    assert not (runs[0].folder / "quantize_config.json").exists()
    assert runs[0].report["model"]["source"]["format"] == label
    assert "source" not in runs[1].report["model"]
    assert runs[0].report["fingerprint"]["model"] != runs[1].report["fingerprint"]["model"]


def test_transformers_gets_the_same_weights(plain: Path, tmp_path: Path) -> None:
    """The reference of an evaluation and the model that writes calibration text."""
    folders = write(plain, tmp_path, *FORMATS["gptq"][:2])
    for dtype in ("auto", torch.float32):
        models = []
        for checkpoint in map(open_checkpoint, folders):
            kind = class_of(checkpoint.model_config.architectures)
            model, info = load_pretrained(kind, checkpoint, dtype=dtype, output_loading_info=True)
            assert not info["missing_keys"]
            models.append(model.state_dict())
            assert model.generation_config.pad_token_id == 0
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_bits_of_the_source_count_its_scales(plain: Path, tmp_path: Path) -> None:
    folder, _ = write(plain, tmp_path, *FORMATS["gptq"][:2])
    source = open_checkpoint(folder).source
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    groups = layers / 16
    index = 2 * (6 * 32 + 64)
    assert source.bits_per_weight == (4 * layers + (16 + 4) * groups + 32 * index) / layers
    size = model_size(folder)
    assert size is not None
    assert (size.bpw, size.nominal_bits) == (source.bits_per_weight, 4)


def test_experts_in_mxfp4(plain: Path, tmp_path: Path) -> None:
    codes, exponents = numbers(0, 256, 2, 6, 3, 16).to(torch.uint8), numbers(120, 130, 2, 6, 3, seed=1).to(torch.uint8)
    expected = (fp4(codes) * 2.0 ** (exponents.float() - 127).unsqueeze(-1)).flatten(-2).transpose(1, 2)
    shutil.copytree(plain, tmp_path / "model")
    stored = {"experts.up_proj_blocks": codes, "experts.up_proj_scales": exponents}
    save_file(stored, tmp_path / "model" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert list(checkpoint.tensors) == ["experts.up_proj"]
    assert checkpoint.tensors["experts.up_proj"].shape == (2, 96, 6)
    assert torch.equal(checkpoint.read(["experts.up_proj"])["experts.up_proj"].float(), expected)
    assert checkpoint.source.bits_per_weight == 4.25
    decoded = Fp4Pairs((6, 96)).decode({"codes": codes[0].flatten(1).view(torch.int8), "scale": exponents[0]})
    assert torch.equal(decoded.float(), expected[0].t())


def test_a_block_may_not_divide_the_matrix() -> None:
    """DeepSeek-V3 stores 576 rows with 5 rows of scales, each for 128."""
    codes = torch.ones(576, 256).to(torch.float8_e4m3fn)
    grid = torch.arange(10.0).view(5, 2)
    decoded = ScaledCodes("F8_E4M3", (576, 256), (128, 128)).decode({"codes": codes, "scale": grid})
    assert torch.equal(decoded, grid.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1))


def test_blocks_of_fp8_are_what_transformers_makes_of_them() -> None:
    codes, grid = (
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn),
        torch.rand(4, 2),
    )
    theirs = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": grid})["weight"]
    theirs = theirs[0] if isinstance(theirs, list) else theirs  # transformers 5.16 returns a list
    assert torch.equal(ScaledCodes("F8_E4M3", (64, 32), (16, 16)).decode({"codes": codes, "scale": grid}), theirs)


def test_scales_may_be_exponents() -> None:
    codes, exponents = torch.ones(2, 4).to(torch.float8_e4m3fn), torch.tensor([[127], [129]], dtype=torch.uint8)
    encoding = ScaledCodes("F8_E4M3", (2, 4), (1, 4))
    for stored in (exponents, exponents.view(torch.float8_e8m0fnu)):
        assert encoding.decode({"codes": codes, "scale": stored})[:, 0].tolist() == [1, 4]


def test_packed_words_may_have_gaps() -> None:
    """compressed-tensors before 0.18 left bits of a word unused where the width does not divide 32."""
    codes = numbers(0, 8, 2, 24)
    gaps = torch.cat([words(codes[:, i : i + 10], 3) for i in (0, 10, 20)], 1)
    assert gaps.shape == (2, 3)
    decoded = PackedIntegers(3, (2, 24), 24, 10).decode({"codes": gaps, "scale": torch.ones(2, 1)})
    assert torch.equal(decoded, codes.float() - 4)


def test_a_group_outside_the_scales_is_refused() -> None:
    parts = {"codes": words(numbers(0, 16, 8, 8), 4).t(), "scale": torch.ones(1, 8), "group": torch.full((8,), 2)}
    with pytest.raises(UserError, match="g_idx names groups outside 0 to 0"):
        GptqWeight(4, (8, 8), 8, minus_one=True).decode(parts)


def test_a_zero_of_all_ones_was_zero() -> None:
    parts = {
        "codes": words(torch.full((8, 8), 3), 4).t(),
        "scale": torch.ones(1, 8),
        "zero": words(torch.full((1, 8), 15), 4),
    }
    assert set(GptqWeight(4, (8, 8), 8, minus_one=True).decode(parts).flatten().tolist()) == {3.0}
    assert AwqWeight((8, 8), 8).decode({**parts, "codes": words(torch.full((8, 8), 3), 4)}).unique().tolist() == [-12.0]


LAYER = "model.layers.0.mlp.up_proj"


def without(encode: Encode, suffix: str) -> Encode:
    def left_out(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, decoded = encode(path, weight)
        return {name: tensor for name, tensor in stored.items() if not name.endswith(suffix)}, decoded

    return left_out


def refused(folder: Path, reason: str) -> None:
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UserError, match=reason):
        open_skeleton(checkpoint)


@pytest.mark.parametrize(
    ("suffix", "tensor", "reason"),
    [
        ("weight", torch.ones(64, 32).to(torch.float8_e4m3fn), r"up_proj.weight is F8_E4M3 \[64, 32\]"),
        ("weight", torch.ones(64, 16, dtype=torch.uint8), r"up_proj.weight is U8 .* give the full-precision model"),
        ("weight_scale", torch.ones(64, 1), r"up_proj.weight_scale is F32"),
        ("SCB", torch.ones(64), r"quantized \(bitsandbytes int8\)"),
        ("codes", torch.ones(64, 4, dtype=torch.int16), r"up_proj.codes is I16"),
        ("weight_scale_2", torch.ones(()), r"quantized \(NVFP4\)"),
        ("qweight", torch.ones(4, 64, dtype=torch.int32), r"up_proj.qweight is I32"),
        ("weight_packed", torch.ones(64, 4, dtype=torch.uint8), r"up_proj.weight_packed is U8"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(
    suffix: str, tensor: Tensor, reason: str, plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "model")
    stored = load_file(plain / "model.safetensors")
    save_file({**stored, f"{LAYER}.{suffix}": tensor}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "model", reason)
    with pytest.raises(UserError, match="quantized"):  # transformers would take the codes for weights
        load_pretrained(class_of(["LlamaForCausalLM"]), open_checkpoint(tmp_path / "model"))


def test_settings_that_contradict_the_tensors_are_refused(plain: Path, tmp_path: Path) -> None:
    marlin, _ = write(plain, tmp_path / "a", gptq(4, v2=False), method("gptq", checkpoint_format="marlin"))
    refused(marlin, r"qweight is \[8, 32\] with scales \[4, 32\] \(marlin\)")
    unknown, _ = write(plain, tmp_path / "b", packed(4, True), {})
    refused(unknown, "config.json does not say how many bits")
    wrong, _ = write(plain, tmp_path / "c", packed(4, True), compressed(num_bits=3, group_size=16))
    refused(wrong, "3 bits and 4 groups of 16 do not fill")
    for at, encode, config, left_out in [
        ("e", packed(4, True), compressed(num_bits=4, group_size=16, symmetric=False), "weight_zero_point"),
        ("f", fp8((1, 0), "weight_scale", torch.int8), compressed(num_bits=8, symmetric=False), "weight_zero_point"),
        ("g", without(gptq(4, v2=False), "qzeros"), method("gptq", bits=4), "qzeros"),
        ("h", without(gptq(4, v2=False, act_order=True), "g_idx"), method("gptq", bits=4, desc_act=True), "g_idx"),
    ]:
        refused(write(plain, tmp_path / at, encode, config)[0], f"has no model.*{left_out}, which the settings")
    _, full = write(plain, tmp_path / "d", packed(4, True), {})
    (full / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    refused(full, r"hf_quant_config.json says that the model is quantized \(FP8\), but no tensor is")


def test_two_widths_by_the_names_of_their_layers(plain: Path, tmp_path: Path) -> None:
    wide, narrow = packed(4, True), packed(2, True)
    config = compressed(num_bits=4, group_size=16)
    groups = config["quantization_config"]["config_groups"]
    groups["b"] = {"targets": ["re:.*v_proj$"], "weights": {"num_bits": 2, "group_size": 16}}
    folders = write(plain, tmp_path, lambda path, w: (narrow if "v_proj" in path else wide)(path, w), config)
    one, twin = map(open_checkpoint, folders)
    read, expected = one.read(one.tensors), twin.read(twin.tensors)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_tensors_that_do_not_fit_together_are_an_error_that_names_the_layer(plain: Path, tmp_path: Path) -> None:
    def broken(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, decoded = packed(4, False)(path, weight)
        return {**stored, f"{path}.weight_zero_point": torch.ones(1, 1, dtype=torch.int32)}, decoded

    checkpoint = open_checkpoint(write(plain, tmp_path, broken, compressed(num_bits=4, group_size=16))[0])
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj.weight in .* do not fit together"):
        checkpoint.read([f"{LAYER}.weight"])
    empty = {f"{LAYER}.qweight": torch.ones(4, 8).int(), f"{LAYER}.scales": torch.ones(0, 64)}
    save_file({**empty, f"{LAYER}.qzeros": torch.ones(0, 8).int()}, checkpoint.folder / "model.safetensors")
    assert "do not fit together" in str(open_checkpoint(checkpoint.folder).source.refusal)
