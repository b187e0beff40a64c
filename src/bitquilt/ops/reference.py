"""The definition of a quantized matmul, which every faster body is tested against: `quantized_matmul`, `dequantize`.

Arguments, as in the op's schema (one entry per column segment in the three lists):
  codes[i]   uint8 [out, ceil(width_i * bits_i / 8)], the bit streams of `ops.bits`
  scales[i]  uniform: step between levels [out, groups_i];  codebook: the levels [groups_i, 2^bits_i]
  zeros[i]   uniform, bits >= 2: integer zeros, packed along the rows: uint8 [groups_i, ceil(out * bits_i / 8)];
             uniform, bits = 1: the lower level [out, groups_i], same dtype as the step;
             codebook: a factor per column [width_i], or empty;  mx, or a symmetric uniform grid: empty
  layout     per segment four integers: grid (0 uniform, 1 codebook, from 2 on mx, see `mx_grid`), bits, group_size,
             width. mx: `scales` are E8M0 bytes, codes are elements (`ops.microscaling`). With `ops.gpu_order.ARRANGED`
             added to the grid the codes are in another order. Grids of `ops.block_types`: `scales` are heads
  permutation, block
             order of the input channels in storage, in blocks of that many neighbours; None = unchanged.
             int16 or int32: stored position -> original block.  uint8: the segment of each original block, packed
             at the width of the largest segment index; blocks keep their order inside a segment
  outlier_*  compressed sparse rows that are added to the dense weight, original channel order; None = nothing.
             Columns and row pointers in any integer type that holds them
"""

import torch
from torch import Tensor

from bitquilt.ops.bits import unpack_bits
from bitquilt.ops.block_types import BY_GRID
from bitquilt.ops.block_types import decode_blocks as decode_block_type
from bitquilt.ops.gpu_order import ARRANGED, restore
from bitquilt.ops.microscaling import E2M1, E2M3, E3M2, E4M3, Element, decode_blocks, quantize_blocks

GRID_UNIFORM, GRID_CODEBOOK, GRID_MX = 0, 1, 2
LAYOUT_FIELDS = 4
ACTIVATIONS = ("none", "ceil", "paper", "ocp")  # how an mx segment's input is quantized: not, or by a scale rule
_ELEMENTS = {4: E2M1, 6: E3M2, 8: E4M3}


def mx_grid(e2m3: bool, activation: str) -> int:
    """Return the layout's number of an mx grid: 2 + the index of the activation rule, + 4 where 6 bits are E2M3."""
    return GRID_MX + ACTIVATIONS.index(activation) + len(ACTIVATIONS) * e2m3


def is_mx(grid: int, bits: int) -> bool:
    """Whether a segment's grid and bits name an mx grid that exists."""
    e2m3 = (grid - GRID_MX) // len(ACTIVATIONS)
    return (e2m3 == 0 and bits in _ELEMENTS) or (e2m3 == 1 and bits == E2M3.bits)


def _mx(grid: int, bits: int) -> tuple[Element, str]:
    """Invert `mx_grid`: element and activation rule."""
    if not is_mx(grid, bits):
        raise ValueError(f"grid {grid} with {bits} bits is unknown")
    e2m3, activation = divmod(grid - GRID_MX, len(ACTIVATIONS))
    return E2M3 if e2m3 else _ELEMENTS[bits], ACTIVATIONS[activation]


def as_stored(codes: list[Tensor], layout: list[int], out_features: int) -> tuple[list[Tensor], list[int]]:
    """Return codes and layout in the stored order."""
    grids = layout[::LAYOUT_FIELDS]
    if all(grid < ARRANGED for grid in grids):
        return codes, layout
    codes, layout = list(codes), list(layout)
    for i, grid in enumerate(grids):
        if grid >= ARRANGED:
            _, bits, _, width = layout[LAYOUT_FIELDS * i : LAYOUT_FIELDS * (i + 1)]
            codes[i] = restore(codes[i], grid - ARRANGED, bits, out_features, width)
            layout[LAYOUT_FIELDS * i] = grid - ARRANGED
    return codes, layout


def map_bits(segments: int) -> int:
    """Bits of one entry of a segment map."""
    return max(1, (segments - 1).bit_length())


def expand_permutation(stored: Tensor, block: int, segments: int, in_features: int) -> Tensor:
    """Expand a stored permutation (see above) to the order of channels int64 `[in]`; the last block may be narrower."""
    order = stored
    if stored.dtype == torch.uint8:
        blocks = -(-in_features // block)
        order = unpack_bits(stored.unsqueeze(0), map_bits(segments), blocks).squeeze(0).argsort(stable=True)
    channels = order.to(torch.int64).unsqueeze(1) * block + torch.arange(block, device=order.device)
    channels = channels.view(-1)
    return channels[channels < in_features] if in_features % block else channels


def decode_uniform(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """Decode codes `[out, width]` on per-row, per-group grids: fp32 `[out, width]`.

    bits >= 2: scale * (code - zero), integer zero.  bits = 1: zero + scale * code, zero is the lower level.
    Empty zero: scale * (code - (2^bits - 1) / 2).
    `scale` and `zero` are `[out, groups]`; the last group may be narrower.
    """
    width = codes.shape[1]
    step = scale.float().repeat_interleave(group_size, dim=1)[:, :width]
    if zero.numel() == 0:
        return step * (codes - (2**bits - 1) / 2)
    base = zero.float().repeat_interleave(group_size, dim=1)[:, :width]
    return base + step * codes if bits == 1 else step * (codes - base)


def column_levels(codebook: Tensor, gain: Tensor, group_size: int, width: int) -> Tensor:
    """Levels of every column fp32 `[width, 2^bits]`: those of its group, `[groups, 2^bits]`, times its gain."""
    levels = codebook.float()
    if group_size > 1:
        levels = levels.repeat_interleave(group_size, dim=0)[:width]
    return levels * gain.float().unsqueeze(1) if gain.numel() else levels


def decode_codebook(codes: Tensor, levels: Tensor) -> Tensor:
    """Look codes `[out, width]` up in one table per column, fp32 `[width, 2^bits]`: fp32 `[out, width]`."""
    return levels.t().gather(0, codes.to(torch.int64))


def dequantize(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    layout: list[int],
    permutation: Tensor | None,
    block: int,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    out_features: int,
) -> Tensor:
    """Return the weight fp32 `[out, in]` in the original channel order, outliers included."""
    codes, layout = as_stored(codes, layout, out_features)
    dense = _stored_order(codes, scales, zeros, layout, out_features)
    in_features = dense.shape[1]
    if permutation is not None:
        channels = expand_permutation(permutation, block, len(codes), in_features)
        dense = torch.empty_like(dense).index_copy_(1, channels, dense)
    if outlier_values is not None and outlier_columns is not None and outlier_rows is not None:
        counts = outlier_rows.to(torch.int64).diff()
        rows = torch.repeat_interleave(torch.arange(out_features, device=dense.device), counts)
        dense.index_put_((rows, outlier_columns.to(torch.int64)), outlier_values.float(), accumulate=True)
    return dense


def quantized_matmul(
    x: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    layout: list[int],
    permutation: Tensor | None,
    block: int,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """Return x W^T + bias `[..., out]` in the dtype of x `[..., in]`; the weight is rounded to that dtype once.

    Where a segment quantizes its input too, the product is fp32 and only its result is rounded.
    """
    codes, layout = as_stored(codes, layout, out_features)
    outliers = (outlier_values, outlier_columns, outlier_rows)
    weight = dequantize(codes, scales, zeros, layout, permutation, block, *outliers, out_features)
    if rounds_input(layout):
        channels = None
        if permutation is not None:
            channels = expand_permutation(permutation, block, len(codes), weight.shape[1])
        rounded = quantize_input(x, layout, channels)
        return torch.nn.functional.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rounds_input(layout: list[int]) -> bool:
    """Whether a segment quantizes its input."""
    grids = layout[::LAYOUT_FIELDS]
    return any(GRID_MX < grid < ARRANGED and (grid - GRID_MX) % len(ACTIVATIONS) for grid in grids)


def quantize_input(x: Tensor, layout: list[int], channels: Tensor | None) -> Tensor:
    """Round x `[..., in]` in the segments that quantize their input: fp32, in the original order of the channels.

    `channels` int64 `[in]`: the channel at each stored position, None = unchanged. Blocks follow the stored order.
    """
    stored = x.float() if channels is None else x.float()[..., channels]
    parts, start = [], 0
    for i in range(0, len(layout), LAYOUT_FIELDS):
        grid, bits, _group_size, width = layout[i : i + LAYOUT_FIELDS]
        part = stored[..., start : start + width]
        start += width
        if GRID_MX <= grid < ARRANGED:
            element, rule = _mx(grid, bits)
            if rule != "none":
                part = quantize_blocks(part, element, rule)  # type: ignore[arg-type]
        parts.append(part)
    rounded = torch.cat(parts, dim=-1)
    return rounded if channels is None else torch.empty_like(rounded).index_copy_(-1, channels, rounded)


def _stored_order(
    codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], layout: list[int], out_features: int
) -> Tensor:
    parts = []
    for i, (stream, scale, zero) in enumerate(zip(codes, scales, zeros, strict=True)):
        grid, bits, group_size, width = layout[LAYOUT_FIELDS * i : LAYOUT_FIELDS * (i + 1)]
        unpacked = unpack_bits(stream, bits, width)
        if grid == GRID_CODEBOOK:
            parts.append(decode_codebook(unpacked, column_levels(scale, zero, group_size, width)))
        elif grid in BY_GRID:
            parts.append(decode_block_type(unpacked, scale, BY_GRID[grid]))
        elif grid >= GRID_MX:
            parts.append(decode_blocks(unpacked, scale, _mx(grid, bits)[0], group_size))
        else:
            base = zero if bits == 1 or zero.numel() == 0 else unpack_bits(zero, bits, out_features).t()
            parts.append(decode_uniform(unpacked, scale, base, bits, group_size))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
