"""`recognize` tells from headers which weights of a checkpoint are stored encoded, and how.

The names and types of the tensors decide. config.json is asked only for what headers leave open, such as the size of
blocks, and cannot make a checkpoint full precision.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping

from bitquilt.model.encoded.source_format import SourceFormat
from bitquilt.model.encoded.stated_format import StatedFormat
from bitquilt.model.encoded.weights import (
    AwqWeight,
    EncodedWeight,
    Encoding,
    Fp4Pairs,
    GptqWeight,
    Mxfp4Blocks,
    PackedIntegers,
    ScaledCodes,
)
from bitquilt.model.tensor_info import TensorInfo

_READABLE = (
    "bitquilt reads fp8, int8, GPTQ, AWQ (gemm), MXFP4, NVFP4 and compressed-tensors (float-, int- and "
    "pack-quantized); give the full-precision model"
)
# Types in which no full-precision weight is stored.
_CODES = re.compile(r"[FIU](4|6|8|16|32|64)(_.*)?|BOOL")
FLOATS = ("F64", "F32", "F16", "BF16")
# They describe activations and the cache: a decoded weight needs none.
_OF_ACTIVATIONS = re.compile(
    r"(\.|_)(input_scale|input_zero_point|input_global_scale|output_scale|activation_scale|"
    r"[qkv]_scale|[kv]_zero_point|kv_scale|prob_scale)$"
)
# Tensors that only quantized checkpoints have, and who writes them; some names count only where codes are stored.
_FOREIGN = {
    r"\.SCB$": "bitsandbytes int8",
    r"\.(absmax|quant_map|nested_absmax)$|\.quant_state": "bitsandbytes 4-bit",
    r"\.(weight_scale_2|weight_global_scale)$": "NVFP4",
    r"\.weight_scales$": "EETQ",
    r"\.weight\._(data|scale)$": "quanto",
    r"\.pre_quant_scale$": "AWQ of ModelOpt",
    r"\.(qweight|qzeros)$": "",
    r"\.weight_(packed|shape|scale|scale_inv|zero_point|g_idx)$|_scale_inv$": "",
}
# Types of what belongs to codes; scales in U8 and E8M0 are exponents.
_TYPES = {"scale": ("F", "BF16", "U8"), "zero": ("I8", "I32"), "group": ("I32", "I64"), "shape": ("I32", "I64")}
_EXPONENTS = ("U8", "F8_E8M0")
_FOREIGN_CODES = re.compile(r"\.(codes|Qidxs|W_q)$")  # AQLM, QuIP#, HQQ


class _Undecodable(Exception):
    """The message says what stands in the way."""


def recognize(tensors: Mapping[str, TensorInfo], stated: StatedFormat) -> tuple[dict[str, TensorInfo], SourceFormat]:
    """Return the tensors as readers see them, encoded ones as the matrices that they make, and the format."""
    weights, used = dict[str, EncodedWeight](), set[str]()
    try:
        for name in tensors:
            for suffix, encode in _RULES.items():
                if name.endswith(suffix) and (found := _encoded(encode, tensors, name, stated)) is not None:
                    target, weight = found
                    weights[target] = weight
                    used.update(weight.names.values())
        seen = _decoded_view(tensors, weights, used, stated)
        _refuse_leftovers(seen, weights, stated)
    except _Undecodable as error:
        return dict(tensors), SourceFormat(refusal=f"{error}; {_READABLE}")
    return seen, SourceFormat(weights)


def _encoded(encode: "_Rule", tensors: Mapping[str, TensorInfo], name: str, stated: StatedFormat) -> "_Found":
    try:
        return encode(tensors, name, stated)
    except (ZeroDivisionError, IndexError, ValueError):  # sides of length 0, or too few of them
        raise _Undecodable(f"the shapes of {name}, its scales and zeros do not fit together") from None


def _decoded_view(
    tensors: Mapping[str, TensorInfo], weights: Mapping[str, EncodedWeight], used: Container[str], stated: StatedFormat
) -> dict[str, TensorInfo]:
    """The tensors with each decoded matrix where its codes are, without its parts and the scales of activations."""
    at = {weight.names["codes"]: name for name, weight in weights.items()}
    seen = {}
    for name, info in tensors.items():
        if (target := at.get(name)) is not None:
            shape = weights[target].encoding.shape
            seen[target] = TensorInfo(
                info.file, shape, stated.dtype, math.prod(shape) * (4 if stated.dtype == "F32" else 2)
            )
        elif name in weights:
            raise _Undecodable(f"{name} is stored twice, in full precision and as {weights[name].encoding.label}")
        elif name not in used and not (weights and _OF_ACTIVATIONS.search(name)):
            seen[name] = info
    return seen


def _refuse_leftovers(
    seen: Mapping[str, TensorInfo], weights: Mapping[str, EncodedWeight], stated: StatedFormat
) -> None:
    """Refuse what is neither full precision nor decoded."""
    for name, info in seen.items():
        if name in weights:
            continue
        plain = name.endswith((".weight", ".bias"))  # nearly all names: 50,000 experts take no time
        foreign = None if plain else next((who for pattern, who in _FOREIGN.items() if re.search(pattern, name)), None)
        codes = _CODES.fullmatch(info.dtype) and info.dtype not in FLOATS
        matrix = len(info.shape) > 1 and (name.endswith(("weight", "_proj")) or _FOREIGN_CODES.search(name))
        if foreign is not None or (codes and (matrix or info.dtype.startswith(("F4", "F6", "F8")))):
            raise _Undecodable(
                f"the model is quantized ({foreign or stated.name or 'in an unknown format'}): tensor {name} is "
                f"{info.dtype} {list(info.shape)}, and nothing says how to decode it"
            )
    if stated.by_file and not weights:
        raise _Undecodable(
            f"{stated.by_file} says that the model is quantized ({stated.name}), but no tensor is; remove the file if "
            "it is out of date"
        )


def _parts(
    tensors: Mapping[str, TensorInfo], encoding: Encoding, names: Mapping[str, str], wanted: Iterable[str] = ()
) -> EncodedWeight:
    kept = {role: name for role, name in names.items() if name in tensors}
    for role, types in _TYPES.items():
        if role in kept and not tensors[kept[role]].dtype.startswith(types):
            raise _Undecodable(f"{kept[role]} is {tensors[kept[role]].dtype}; wanted {' or '.join(types)}")
    for role in wanted:
        if role not in kept:
            raise _Undecodable(f"{kept['codes']} has no {names[role]}, which the settings in config.json want")
    return EncodedWeight(encoding, kept, {role: tensors[name] for role, name in kept.items()})


_Found = tuple[str, EncodedWeight] | None


def _scaled(tensors: Mapping[str, TensorInfo], name: str, stated: StatedFormat) -> _Found:
    """`X` in fp8 or int8 with `X_scale_inv` or `X_scale`, or `weight` with `scale`."""
    codes, base = tensors[name], name.removesuffix("weight")
    if codes.dtype == "U8" and f"{name}_scale_2" in tensors and f"{name}_scale" in tensors:
        return name, _pairs(tensors, {"codes": name, "scale": f"{name}_scale", "factor": f"{name}_scale_2"})
    if not codes.dtype.startswith(("F8_E4M3", "F8_E5M2", "I8")) or len(codes.shape) < 2:
        return None
    scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale", f"{base}scale") if s in tensors), None)
    if scale is None:
        return None
    names = {"codes": name, "scale": scale, "zero": f"{name}_zero_point"}
    grid = tensors[scale]
    if codes.dtype == "I8" and grid.dtype in _EXPONENTS:
        return name, _pairs(tensors, names)
    extent = _extent(codes.shape, grid.shape, stated)
    if extent is None:
        raise _Undecodable(f"{name} has shape {list(codes.shape)} and {scale} {list(grid.shape)}: no blocks fit both")
    wanted = ["zero"] if codes.dtype == "I8" and stated.wants_zeros(base.removesuffix(".")) else []
    return name, _parts(tensors, ScaledCodes(codes.dtype, codes.shape, extent), names, wanted)


def _pairs(tensors: Mapping[str, TensorInfo], names: Mapping[str, str]) -> EncodedWeight:
    """Two numbers of 4 bits per byte: MXFP4 with exponents for scales, NVFP4 with scales in fp8 and one for all."""
    codes, scale = tensors[names["codes"]], tensors[names["scale"]]
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if codes.shape[:-1] != scale.shape[:-1] or shape[-1] % scale.shape[-1]:
        raise _Undecodable(f"{names['codes']} is {list(codes.shape)} with scales {list(scale.shape)}")
    return _parts(tensors, Fp4Pairs(shape, "MXFP4" if scale.dtype in _EXPONENTS else "NVFP4"), names)


def _extent(shape: tuple[int, ...], grid: tuple[int, ...], stated: StatedFormat) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the shapes do not fit."""
    (rows, columns), lead = shape[-2:], shape[:-2]
    count = math.prod(grid)
    if 0 in shape:
        return None
    if count == 1:
        return (rows, columns) if not lead else None
    if lead and count == lead[0] == grid[0]:
        return rows, columns
    if grid == (rows,):
        return 1, columns
    if len(grid) != len(shape) or grid[:-2] != lead:
        return None
    down, right = (
        _block(size, n, block) for size, n, block in zip((rows, columns), grid[-2:], stated.block, strict=True)
    )
    return None if down is None or right is None else (down, right)


def _block(size: int, count: int, stated: int | None) -> int | None:
    """Weights per scale along one side. Blocks at the edge may be smaller, so a division alone does not tell."""
    if stated is not None and -(-size // stated) == count:
        return stated
    if count in (1, size):
        return size // count
    return 128 if -(-size // 128) == count else size // count if size % count == 0 else None


def _gptq_or_awq(tensors: Mapping[str, TensorInfo], name: str, stated: StatedFormat) -> _Found:
    """`qweight` with `scales`, perhaps `qzeros` and `g_idx`. AWQ packs along the outputs, GPTQ along the inputs."""
    base = name.removesuffix("qweight")
    parts = {"codes": name, "zero": f"{base}qzeros", "scale": f"{base}scales", "group": f"{base}g_idx"}
    codes, scale, zero = tensors[name], tensors.get(parts["scale"]), tensors.get(parts["zero"])
    if scale is None or len(scale.shape) != 2 or len(codes.shape) != 2 or codes.dtype != "I32":
        return None
    groups, rows = scale.shape
    if zero is not None and codes.shape[1] * 8 == rows and zero.shape == (groups, rows // 8):
        if codes.shape[0] % groups:
            raise _Undecodable(f"{name} has {codes.shape[0]} inputs in {groups} groups")
        del parts["group"]
        return f"{base}weight", _parts(tensors, AwqWeight((rows, codes.shape[0]), codes.shape[0] // groups), parts)
    if codes.shape[1] != rows or stated.layout not in ("", "gptq", "gptq_v2"):
        raise _Undecodable(
            f"{name} is {list(codes.shape)} with scales {list(scale.shape)} ({stated.layout or 'unknown'})"
        )
    group = tensors.get(parts["group"])
    bits = _gptq_bits(codes, zero, group, stated)
    if bits is None:
        raise _Undecodable(f"neither the shapes of its tensors nor config.json say how many bits {name} has")
    columns = codes.shape[0] * 32 // bits if group is None else group.shape[0]
    size = stated.block[1] if stated.block[1] and -(-columns // stated.block[1]) == groups else -(-columns // groups)
    encoding = GptqWeight(bits, (rows, columns), size, minus_one=stated.layout != "gptq_v2")
    settings = stated.settings
    wanted = [
        *(["group"] if settings.get("desc_act") is True else []),
        *([] if settings.get("sym") is True else ["zero"]),
    ]
    return f"{base}weight", _parts(tensors, encoding, parts, wanted)


def _gptq_bits(
    codes: TensorInfo, zero: TensorInfo | None, group: TensorInfo | None, stated: StatedFormat
) -> int | None:
    """Bits of a code, from the widths of what is packed; the same model may have layers of different widths."""
    words, rows = codes.shape
    fitting = [
        bits
        for bits in range(2, 9)
        if (group is None or 32 * words == bits * group.shape[0])
        and (zero is None or zero.shape[1] in (rows * bits // 32, -(-rows * bits // 32)))
    ]
    known = stated.bits()
    return known if known in fitting else fitting[0] if len(fitting) == 1 else None


def _packed(tensors: Mapping[str, TensorInfo], name: str, stated: StatedFormat) -> _Found:
    """`weight_packed` of compressed-tensors with `weight_scale`."""
    base = name.removesuffix("weight_packed")
    roles = {"scale": "weight_scale", "zero": "weight_zero_point", "shape": "weight_shape", "group": "weight_g_idx"}
    parts = {"codes": name, **{role: base + suffix for role, suffix in roles.items()}}
    codes, scale = tensors[name], tensors.get(parts["scale"])
    common = f"{base}weight_global_scale"
    if codes.dtype == "U8" and scale is not None and (scale.dtype in _EXPONENTS) != (common in tensors):
        return f"{base}weight", _pairs(tensors, {"codes": name, "scale": parts["scale"], "divisor": common})
    if codes.dtype != "I32" or scale is None or len(codes.shape) != 2:
        return None
    bits, size = stated.of_module(base.removesuffix("."))
    if bits is None:
        raise _Undecodable(f"config.json does not say how many bits {name} has")
    (rows, words), groups = codes.shape, scale.shape[1] if len(scale.shape) == 2 else 1
    columns = groups * size if size and groups > 1 else words * 32 // bits
    sparse = 32 // bits
    per_word = sparse if 32 % bits and -(-columns // sparse) == words else None
    if per_word is None and -(-columns * bits // 32) != words:
        raise _Undecodable(
            f"{name} is {list(codes.shape)}, which {bits} bits and {groups} groups of {size} do not fill"
        )
    encoding = PackedIntegers(bits, (rows, columns), -(-columns // groups), per_word)
    wanted = ["zero"] if stated.wants_zeros(base.removesuffix(".")) else []
    return f"{base}weight", _parts(tensors, encoding, parts, wanted)


def _mxfp4(tensors: Mapping[str, TensorInfo], name: str, stated: StatedFormat) -> _Found:
    """`X_blocks` with `X_scales`."""
    base = name.removesuffix("_blocks")
    codes, scale = tensors[name], tensors.get(f"{base}_scales")
    if scale is None or codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[:-1] != scale.shape:
        return None
    experts, rows, blocks, half = codes.shape
    encoding = Mxfp4Blocks((experts, blocks * half * 2, rows))
    return base, _parts(tensors, encoding, {"codes": name, "scale": f"{base}_scales"})


_Rule = Callable[[Mapping[str, TensorInfo], str, StatedFormat], _Found]
_RULES: Mapping[str, _Rule] = {
    "qweight": _gptq_or_awq,
    "weight_packed": _packed,
    "_blocks": _mxfp4,
    "": _scaled,
}
