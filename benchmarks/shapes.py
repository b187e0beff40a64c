"""What sizes are compared at: the layers of a shared model, and what they take in one plain uniform grid."""

from collections.abc import Sequence

from benchmarks.common import SHARED
from bitquilt.core.packing import storage_bits
from bitquilt.core.types import Format, Layout
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.linear import linear_weight
from bitquilt.model.structure import open_skeleton
from bitquilt.stream.job import targets

Shapes = dict[str, tuple[int, int]]


def layer_shapes(model: str, skip: Sequence[str] = ()) -> Shapes:
    """`[out, in]` of every layer a run quantizes that leaves those of the patterns in `skip` alone."""
    skeleton = open_skeleton(open_checkpoint(SHARED / "models" / model))
    shapes = {}
    for path in skeleton.blocks:
        for name, module in targets(skeleton, path, skeleton.model.get_submodule(path), skip).items():
            rows, columns = linear_weight(module).shape
            shapes[name] = (rows, columns)
    return shapes


def grid_bpw(shapes: Shapes, bits: int, group_size: int, symmetric: bool = False) -> float:
    """True bits per weight over all layers, scales included, zeros where it is not symmetric: what RTN and GPTQ
    take, and slim-llm to 0.001."""
    form = Format(bits, group_size, symmetric=symmetric)
    total = sum(storage_bits(Layout(rows, columns, ((form, columns),))) for rows, columns in shapes.values())
    return total / sum(rows * columns for rows, columns in shapes.values())
