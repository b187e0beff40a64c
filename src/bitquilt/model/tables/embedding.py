"""Token embeddings in few bits, all rows in one format: `QuantizedEmbedding`.

The table is stored like a `QuantizedLinear` of `[vocabulary, width]`; a lookup unpacks only the rows that are read.
"""

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bitquilt.core.types import Layout
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops.bits import unpack_bits
from bitquilt.ops.block_types import BLOCK_TYPES, decode_blocks
from bitquilt.ops.reference import decode_uniform


def lookup_scale(table: object) -> float | None:
    """Return the constant by which an embedding multiplies its rows: 1, or what Gemma and BART have; else None.

    The embedding is asked, with a small weight in place of its own, so no family needs to be known.
    """
    if type(table) is nn.Embedding and table.max_norm is None:
        return 1.0
    if not isinstance(table, nn.Embedding) or table.max_norm is not None or set(table._parameters) != {"weight"}:
        return None
    try:
        with torch.device("cpu"):  # models are built on the meta device
            rows = torch.linspace(1, 2, 8).view(2, 4)
            probe = copy.copy(table)
            probe._parameters, probe.padding_idx = {"weight": nn.Parameter(rows, requires_grad=False)}, None
            # transformers fills such buffers after loading, from the number next to them
            probe._buffers = {
                name: torch.tensor(getattr(table, f"scalar_{name}")) if value is not None and value.is_meta else value
                for name, value in table._buffers.items()
            }
            ratios = probe(torch.arange(2)) / rows
            scale = float(ratios.flatten()[0])
            return scale if bool((ratios - scale).abs().max() <= 1e-6 * abs(scale)) and scale != 0 else None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def scaled(rows: Tensor, scale: float) -> Tensor:
    """Return `rows` times the `scale`, rounded to their type first as a buffer of the model is."""
    return rows if scale == 1.0 else rows * float(torch.tensor(scale).to(rows.dtype))


class QuantizedEmbedding(QuantizedLinear):
    """A table of one symmetric uniform segment, or of blocks. Input: ids `[...]`; output `[..., width]` in the model's
    dtype."""

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(layout.segments) != 1 or not layout.segments[0][0].symmetric or layout.ordering != "identity":
            raise ValueError("a table of embeddings is one symmetric segment in the order of its columns")
        super().__init__(layout, bias, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = layout.out_features, layout.in_features
        self.dtype = dtype or torch.float32
        self.lookup_scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., width]` of `ids` `[...]`."""
        form, width = self.layout.segments[0]
        flat = ids.reshape(-1)
        codes = unpack_bits(self.get_buffer("codes_0")[flat], form.bits, width)
        scale = self.get_buffer("scale_0")[flat]
        if form.grid in BLOCK_TYPES:
            rows = decode_blocks(codes, scale, BLOCK_TYPES[form.grid])
        else:
            rows = decode_uniform(codes, scale, scale.new_empty(0), form.bits, form.group_size)
        return scaled(rows.to(self.dtype), self.lookup_scale).view(*ids.shape, width)

    def arrange(self) -> None:
        """Do nothing: rows are looked up in the stored order."""

    def project(self, x: Tensor) -> Tensor:
        """Return x W^T `[..., vocabulary]` of x `[..., width]`, the product of a tied head."""
        return super().forward(x)

    @property
    def weight(self) -> Tensor:
        """The table, dequantized on each access, for model code that reads `embedding.weight`."""
        return self.dequantize().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer("scale_0").device)).dtype
        return super()._apply(fn, recurse)
