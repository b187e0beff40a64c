"""Embedding and head as tables whose rows share a budget with the layers: `free_tables` finds them in a model."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from bitquilt.core.plan_file import OuterBits
from bitquilt.core.types import Format, Layout
from bitquilt.model.linear import is_linear, linear_weight
from bitquilt.model.replace import embedding_path
from bitquilt.model.structure import Skeleton

# Columns of a row that share a scale.
TABLE_GROUP_SIZE = 64
TABLE_WIDTHS = tuple(range(2, 9))


@dataclass(frozen=True)
class Table:
    """A table whose rows share the budget with the layers. `kind`: "embedding" or "head"; `tied`: it is both."""

    kind: str
    path: str
    rows: int
    columns: int
    tied: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def looked_up(self) -> bool:
        """Whether only single rows are read, never the whole table."""
        return self.kind == "embedding" and not self.tied

    def parts(self, counts: Iterable[int]) -> dict[str, Layout]:
        """Layouts of the parts, by path; `counts`: rows of 0, 1, 2, ... bits."""
        return {
            part_name(self.path, bits): part_layout(int(count), self.columns, bits, self.rows)
            for bits, count in enumerate(counts)
            if count
        }

    @staticmethod
    def widths(palette: tuple[int, ...]) -> tuple[int, ...]:
        """Bits per code at each choice of `palette`: at least 2, for text of another kind uses other rows."""
        return tuple(max(bits, TABLE_WIDTHS[0]) for bits in palette)

    @property
    def config(self) -> dict[str, Any]:
        """Changed entries of config.json besides the layouts."""
        return {"tie_word_embeddings": self.tied}


def part_name(table: str, bits: int) -> str:
    """Return the path of the part of a table that has its rows of `bits` bits."""
    return f"{table}.rows_{bits}"


def part_layout(rows: int, columns: int, bits: int, of_rows: int = 0) -> Layout:
    """Return the layout of a part of `rows` rows of a table of `of_rows`."""
    form = Format(bits, TABLE_GROUP_SIZE, symmetric=True)
    return Layout(rows, columns, ((form, columns),), of_rows=of_rows)


def free_tables(skeleton: Skeleton, outer: OuterBits, layers: Container[str] = ()) -> tuple[Table, ...]:
    """Return the tables that can share a budget: embedding and head but for those with bits of their own in `outer`.

    `layers`: paths of the layers that the recipe solves. What a model stores otherwise stays as it is.
    """
    model, stored = skeleton.model, skeleton.parameters.values()
    tied = set(model.all_tied_weights_keys.values())
    found = []
    path = embedding_path(model)
    if outer.embedding is None and path is not None and f"{path}.weight" in stored:
        found.append(Table("embedding", path, *_shape(skeleton, path), f"{path}.weight" in tied))
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    own = head is not None and is_linear(head) and f"{path}.weight" in stored and not model.config.tie_word_embeddings
    if outer.head is None and own and path is not None and path not in layers:
        found.append(Table("head", path, *_shape(skeleton, path), False))
    return tuple(found)


def _shape(skeleton: Skeleton, path: str) -> tuple[int, int]:
    weight = linear_weight(skeleton.model.get_submodule(path))
    return weight.shape[0], weight.shape[1]
