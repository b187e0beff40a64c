"""Tables whose rows differ in width: `MixedEmbedding` looks rows up, `MixedHead` multiplies by all of them.

Frequent tokens earn more bits than rare ones. The rows of one width form a part, a weight like any other with one bit
per row of the table that says which rows it holds. A lookup unpacks only the rows that are read; a product is one per
part, put back into the table's order.
"""

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from bitquilt.core.packing import table_rows
from bitquilt.core.types import Layout
from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.tables.embedding import QuantizedEmbedding, scaled


class MixedRows(nn.Module):
    """A table `[out_features, in_features]` in parts, each a module under its own name."""

    _part: type[QuantizedLinear] = QuantizedLinear

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`layouts`: of the parts, by name. Raises ValueError unless they make up one table."""
        super().__init__()
        sizes = {(layout.of_rows, layout.in_features) for layout in layouts.values()}
        held = sum(layout.out_features for layout in layouts.values())
        if len(sizes) != 1 or held != next(iter(sizes))[0]:
            raise ValueError(f"parts of {held} rows in all do not make up one table of (rows, columns) {sorted(sizes)}")
        self.out_features, self.in_features = next(iter(sizes))
        for name, layout in layouts.items():
            self.add_module(name, self._part(layout, device=device, dtype=dtype))
        self._seen: tuple[object, ...] = ()
        self._places: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, parts: Mapping[str, tuple[Mapping[str, Tensor], Layout]]) -> Self:
        """Make a table of packed parts. Raises ValueError for tensors that disagree with their layout."""
        table = cls({name: layout for name, (_, layout) in parts.items()}, device="meta")
        for name, (tensors, layout) in parts.items():
            table.add_module(name, cls._part.from_tensors(tensors, layout))
        return table

    @property
    def parts(self) -> list[QuantizedLinear]:
        """The parts, in stored order."""
        return [part for part in self.children() if isinstance(part, QuantizedLinear)]

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every row of the table: its part uint8, its row there int64, and its row in all parts one after another.

        Worked out at the first use, and again when the parts have moved. Raises ValueError if a row is in no part or in
        two.
        """
        if torch.compiler.is_compiling():
            return self._located()
        masks = [part.get_buffer("rows") for part in self.parts]
        seen = tuple((id(mask), mask.device, mask._version) for mask in masks)
        if self._places is None or seen != self._seen:
            self._seen, self._places = seen, self._located()
        return self._places

    def _located(self) -> tuple[Tensor, Tensor, Tensor]:
        held = [table_rows({"rows": part.get_buffer("rows")}, part.layout) for part in self.parts]
        members = torch.stack([rows for rows in held if rows is not None])
        # a graph of torch.compile has no branches that depend on values; rows are checked outside of one
        if not torch.compiler.is_compiling() and bool((members.sum(dim=0) != 1).any()):
            row = int((members.sum(dim=0) != 1).nonzero()[0])
            raise ValueError(f"row {row} is in {int(members[:, row].sum())} parts of the table; wanted one")
        owner = members.to(torch.uint8).argmax(dim=0)
        place = (members.cumsum(dim=1) - 1).gather(0, owner.unsqueeze(0)).squeeze(0)
        starts = [sum(part.out_features for part in self.parts[:k]) for k in range(len(self.parts))]
        return owner.to(torch.uint8), place, place + torch.tensor(starts, device=place.device)[owner]

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T `[..., out_features]` of x `[..., in_features]`."""
        found = torch.cat([QuantizedLinear.forward(part, x) for part in self.parts], dim=-1)
        return found.index_select(-1, self.places[2])

    def dequantize(self) -> Tensor:
        """Return the table fp32 `[out_features, in_features]`."""
        return torch.cat([part.dequantize() for part in self.parts])[self.places[2]]

    def extra_repr(self) -> str:
        """Shape; the parts follow."""
        return f"in={self.in_features}, out={self.out_features}"


class MixedEmbedding(MixedRows):
    """A token embedding. Input: ids `[...]`; output `[..., width]` in the model's dtype."""

    _part = QuantizedEmbedding
    lookup_scale = 1.0

    @property
    def num_embeddings(self) -> int:
        """Number of tokens."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., width]` of `ids` `[...]`."""
        flat = ids.reshape(-1)
        owner, place, _ = self.places
        owner, place = owner[flat], place[flat]
        parts = self.parts
        if ids.device.type != "cpu" or torch.compiler.is_compiling():  # a graph's shapes may not depend on the tokens
            rows = parts[0](place.clamp(max=parts[0].out_features - 1))
            for k, part in enumerate(parts[1:], start=1):
                rows = torch.where((owner == k).unsqueeze(-1), part(place.clamp(max=part.out_features - 1)), rows)
        else:
            rows = torch.empty(len(flat), self.in_features, dtype=self.dtype)
            for k, part in enumerate(parts):
                mine = owner == k
                if bool(mine.any()):
                    rows[mine] = part(place[mine])
        return scaled(rows, self.lookup_scale).view(*ids.shape, self.in_features)

    def read(self, ids: Tensor) -> Iterator[tuple[QuantizedLinear, Tensor]]:
        """Yield each part with the rows of it that a lookup of `ids` int64 `[tokens]` reads."""
        owner, place, _ = self.places
        for k, part in enumerate(self.parts):
            yield part, place[ids][owner[ids] == k]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        first = self.parts[0]
        assert isinstance(first, QuantizedEmbedding)
        return first.dtype

    def project(self, x: Tensor) -> Tensor:
        """Return x W^T `[..., vocabulary]` of x `[..., width]`, the product of a tied head."""
        return self.product(x)

    @property
    def weight(self) -> Tensor:
        """The table, dequantized on each access, for model code that reads `embedding.weight`."""
        return self.dequantize().to(self.dtype)


class MixedHead(MixedRows):
    """A head of its own: y = x W^T + b. Input `[..., in]`, output `[..., out]`."""

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        bias: nn.Parameter | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layouts, device=device, dtype=dtype)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b `[..., out]` of x `[..., in]`, in the dtype of x."""
        product = self.product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized on each access, for model code that reads its dtype, device or shape."""
        return self.dequantize()
