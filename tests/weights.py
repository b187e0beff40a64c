"""Stored weights of every kind, and their decoding written as plainly as possible."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from bitquilt.core.types import Format, Outliers, Permutation, QuantizedWeight, Segment

KINDS = (
    "one_bit",
    "one_bit_symmetric",
    "two_bits",
    "three_bits",
    "five_bits",
    "eight_bits",
    "ragged",
    "mixed",
    "mixed_ragged",
    "reordered",
    "codebook",
    "shared_table",
    "tables_of_three",
    "outliers",
    "bfloat16_scales",
    "mx",
)
ROWS = 12


def uniform_segment(bits, width, group_size, seed=0, symmetric=False, scale_dtype=torch.float16, rows=ROWS):
    """Random codes on random grids."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-width // group_size)
    codes = torch.randint(0, 2**bits, (rows, width), generator=g, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=g) + 0.1).to(scale_dtype)
    if symmetric:
        zero = None
    elif bits == 1:
        zero = torch.randn(rows, groups, generator=g).to(scale_dtype)
    else:
        zero = torch.randint(0, 2**bits, (rows, groups), generator=g, dtype=torch.uint8)
    return Segment(Format(bits, group_size, "uniform", scale_dtype, symmetric), codes, scale, zero)


def codebook_segment(bits, width, seed=0, rows=ROWS, shared=1, gains=True):
    """Random codes into one table per `shared` columns; shared ones have gains."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), generator=g, dtype=torch.uint8)
    tables = torch.randn(-(-width // shared), 2**bits, generator=g).half()
    if shared == 1 or not gains:
        return Segment(Format(bits, shared, "codebook"), codes, tables)
    factors = (torch.rand(width, generator=g) + 0.1).to(torch.float8_e4m3fn)
    return Segment(Format(bits, shared, "codebook", gain_dtype=torch.float8_e4m3fn), codes, tables, factors)


def mx_segment(bits, width, seed=0, rows=ROWS, grid="mx", activation="none"):
    """Random elements in blocks of 32, scales around one; the codes of NaN stay out."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), generator=g, dtype=torch.uint8)
    if bits == 8:
        codes[(codes & 0x7F) == 0x7F] = 0
    scale = torch.randint(112, 125, (rows, -(-width // 32)), generator=g, dtype=torch.uint8)
    return Segment(Format(bits, 32, grid, torch.uint8, True, activation=activation), codes, scale)


def make_weight(kind: str) -> QuantizedWeight:
    """A weight of 12 rows."""
    if kind == "mixed":
        parts = (uniform_segment(1, 16, 8, 1), uniform_segment(2, 16, 8, 2), uniform_segment(3, 16, 8, 3))
        return QuantizedWeight(parts, Permutation(torch.tensor([2, 4, 0, 5, 1, 3]), 8))
    if kind == "mixed_ragged":  # the narrow last block, original index 4, is stored in the first segment
        parts = (uniform_segment(2, 12, 8, 1), uniform_segment(4, 24, 8, 2))
        return QuantizedWeight(parts, Permutation(torch.tensor([1, 4, 0, 2, 3]), 8))
    if kind == "reordered":  # an order inside the segment: a segment map cannot say it
        return QuantizedWeight((uniform_segment(3, 20, 4),), Permutation(torch.tensor([3, 0, 4, 2, 1]), 4))
    if kind == "codebook":
        parts = (codebook_segment(2, 9, 1), codebook_segment(3, 7, 2))
        return QuantizedWeight(parts, Permutation(torch.randperm(16, generator=torch.Generator().manual_seed(3)), 1))
    if kind == "shared_table":  # one table for all columns of a width, a float8 gain each
        parts = (codebook_segment(2, 9, 1, shared=9), codebook_segment(3, 7, 2, shared=7))
        return QuantizedWeight(parts, Permutation(torch.randperm(16, generator=torch.Generator().manual_seed(3)), 1))
    if kind == "tables_of_three":  # a table per three columns, no gains, the last group narrower
        return QuantizedWeight((codebook_segment(2, 10, 1, shared=3, gains=False),))
    if kind.startswith("mx"):
        activation = "ceil" if kind == "mx_with_inputs" else "none"
        parts = (
            mx_segment(4, 40, 1, activation=activation),
            mx_segment(6, 32, 2, activation=activation),
            mx_segment(6, 33, 3, grid="mx_e2m3", activation=activation),
            mx_segment(8, 64, 4, activation=activation),
        )
        return QuantizedWeight(parts, Permutation(torch.randperm(169, generator=torch.Generator().manual_seed(3)), 1))
    if kind == "outliers":
        rows = torch.tensor([0, 2, 2, 3] + [5] * 9, dtype=torch.uint8)
        columns = torch.tensor([0, 7, 3, 1, 15], dtype=torch.uint8)
        values = torch.tensor([1.5, -2.0, 0.25, 8.0, -1.0], dtype=torch.float16)
        return QuantizedWeight((uniform_segment(2, 16, 8),), None, Outliers(values, columns, rows))
    single = {
        "one_bit": uniform_segment(1, 24, 8),
        "one_bit_symmetric": uniform_segment(1, 24, 8, symmetric=True),
        "two_bits": uniform_segment(2, 24, 8),
        "three_bits": uniform_segment(3, 24, 8),
        "five_bits": uniform_segment(5, 24, 8, symmetric=True),
        "eight_bits": uniform_segment(8, 24, 8),
        "ragged": uniform_segment(3, 21, 8),
        "bfloat16_scales": uniform_segment(3, 24, 8, scale_dtype=torch.bfloat16),
    }
    return QuantizedWeight((single[kind],))


def naive_dense(weight: QuantizedWeight) -> Tensor:
    """Entry by entry, from the definitions."""
    columns: list[Tensor] = []
    for segment in weight.segments:
        bits, group_size = segment.format.bits, segment.format.group_size
        for j in range(segment.codes.shape[1]):
            codes, k = segment.codes[:, j].float(), j // group_size
            if segment.format.grid == "codebook":
                gain = 1.0 if segment.zero is None else segment.zero[j].float()
                columns.append(gain * segment.scale[k].float()[segment.codes[:, j].long()])
                continue
            if segment.format.grid.startswith("mx"):
                name = {4: "float4_e2m1fn", 6: "float6_e3m2fn", 8: "float8_e4m3fn"}[bits]
                name = "float6_e2m3fn" if segment.format.grid == "mx_e2m3" else name
                numbers = segment.codes[:, j].numpy().view(getattr(ml_dtypes, name)).astype(np.float32)
                columns.append(torch.from_numpy(numbers) * 2.0 ** (segment.scale[:, k].float() - 127))
                continue
            scale = segment.scale[:, k].float()
            if segment.zero is None:
                columns.append(scale * (codes - (2**bits - 1) / 2))
            elif bits == 1:
                columns.append(segment.zero[:, k].float() + scale * codes)
            else:
                columns.append(scale * (codes - segment.zero[:, k].float()))
    dense = torch.stack(columns, dim=1)
    if weight.permutation is not None:
        order, block = weight.permutation.order.tolist(), weight.permutation.block
        original = [c for b in order for c in range(b * block, min((b + 1) * block, dense.shape[1]))]
        placed = torch.empty_like(dense)
        for position, column in enumerate(original):
            placed[:, column] = dense[:, position]
        dense = placed
    if weight.outliers is not None:
        pointers = weight.outliers.rows.tolist()
        for row in range(len(pointers) - 1):
            for entry in range(pointers[row], pointers[row + 1]):
                dense[row, int(weight.outliers.columns[entry])] += float(weight.outliers.values[entry])
    if weight.row_gains is not None:
        for row, gain in enumerate(weight.row_gains.float().tolist()):
            dense[row] *= gain
    return dense


def arguments(**changes):
    """What a good product is given: 5 rows, 24 2-bit codes in groups of 8, blocks in another order, two outliers."""
    good = {
        "x": torch.randn(2, 24),
        "codes": [torch.zeros(5, 6, dtype=torch.uint8)],
        "scales": [torch.ones(5, 3, dtype=torch.float16)],
        "zeros": [torch.zeros(3, 2, dtype=torch.uint8)],
        "layout": [0, 2, 8, 24],
        "permutation": torch.tensor([2, 0, 1], dtype=torch.int16),
        "block": 8,
        "outlier_values": torch.ones(2, dtype=torch.float16),
        "outlier_columns": torch.tensor([3, 4], dtype=torch.int16),
        "outlier_rows": torch.tensor([0, 1, 1, 2, 2, 2], dtype=torch.int32),
        "bias": None,
        "out_features": 5,
    }
    return list((good | changes).values())


def put_product(module: torch.nn.Module, x: Tensor, results: Any) -> None:
    """Put module(x) into a queue, in a spawned process, which imports this file and nothing larger."""
    torch.set_num_threads(1)
    results.put(module(x).tolist())
