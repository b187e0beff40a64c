"""`Engine`: what the file format of another program holds and how layers get there; `Container`: the form of one layer.

Layouts alone decide whether a layer can be held, so that plans are limited and exports refused before a weight is read.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitquilt.core.packing import TensorSpec
from bitquilt.core.types import Format, Layout, QuantizedWeight
from bitquilt.engines.affine import Affine, affine
from bitquilt.errors import UserError
from bitquilt.layer.grids.uniform import ZeroRule


@dataclass(frozen=True)
class Container:
    """Form of one layer in an engine: `bits` of every code, and `group_size` columns to a scale.

    `middle`: all zeros are 2^(bits - 1), and engines without biases store none. `kind`: name of the block type in GGUF.
    """

    bits: int
    group_size: int
    middle: bool = False
    kind: str = ""


@dataclass(frozen=True)
class ModelSettings:
    """What config.json is made of: `stated`, the source's entries, and `known`, those with all defaults of the model's
    class. `plain`: paths of linear layers that are not quantized."""

    stated: Mapping[str, Any]
    known: Mapping[str, Any]
    plain: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """Widths and group sizes of one engine, each the same in all of a layer, and its files.

    `title`: the engine in messages. `bits`, `group_sizes`: what it computes with, ascending. `families`: `model_type`
    of the models whose exports were compared with ours in the engine itself. `windows`: those whose sliding windows it
    has, None for all; it attends to all tokens in the others.
    `zeros`: "free" engines add a number of 16 bits to each group, "integer" ones subtract a code, and those with
    "middle" always half the range. `alike`: layers that share one form: "none", what it fuses ("fused"), or "all".
    `tables`: whether it can hold embedding and head in few bits. `zero_rule`: the recipes' option for it.
    `tensors` converts a layer, with scales in the type given, and `decode` reads it back as the engine does; `specs` is
    its size, from `[out, in]`. `config` makes config.json for the layers by path.
    `metadata`: the format that its safetensors name.
    """

    title: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    families: tuple[str, ...]
    windows: tuple[str, ...] | None
    zeros: Literal["free", "integer", "middle"]
    alike: Literal["none", "fused", "all"]
    tables: bool
    zero_rule: ZeroRule
    tensors: Callable[[Affine, Container, torch.dtype], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], Container], Tensor]
    specs: Callable[[tuple[int, int], Container, torch.dtype], dict[str, TensorSpec]]
    config: Callable[[ModelSettings, Mapping[str, Container]], dict[str, Any]]
    metadata: str

    def container(self, layout: Layout, middle: bool = False) -> Container:
        """Return the smallest form that holds the layout exactly, except that scales and biases are rounded.

        Codes of fewer bits fit in a wider form with the same scales, and a group can be cut into equal groups.
        `middle`: all zeros of the layer are half its range. Raises ValueError that says what stands in the way, and
        what would fit.
        """
        if odd := next((form.grid for form, _ in layout.segments if form.grid != "uniform"), None):
            raise ValueError(f"its grid is {odd}, {self.title} holds uniform steps; quantize with rtn, gptq or quilt")
        if layout.outliers:
            raise ValueError(f"it has {layout.outliers} outliers, {self.title} holds none; quantize without outliers")
        if layout.row_gain_dtype is not None:
            raise ValueError(f"it has a gain per row, {self.title} holds none; quantize with another recipe")
        widest = max(self._width(form, middle) for form, _ in layout.segments)
        bits = next((width for width in self.bits if width >= widest), None)
        if bits is None:
            raise ValueError(
                f"its codes take {widest} bits with their zeros, {self.title} holds up to {self.bits[-1]}; "
                f"quantize with --set zeros={self.zero_rule}"
            )
        runs = {layout.in_features, *(form.group_size for form, _ in layout.segments)}
        runs |= {width for _, width in layout.segments} | ({layout.block} if layout.block else set())
        # a group as wide as the layer is one run, whatever its nominal size
        runs = {min(run, layout.in_features) for run in runs}
        sizes = [size for size in self.group_sizes if all(run % size == 0 for run in runs)]
        if not sizes:
            allowed = ", ".join(map(str, self.group_sizes))
            raise ValueError(
                f"its {layout.in_features} inputs are in groups of {layout.segments[0][0].group_size}, {self.title} "
                f"holds equal groups of {allowed} inputs; quantize with --group-size {self.group_sizes[0]}, or leave "
                "the layer out with --skip"
            )
        if self.zeros == "middle" and layout.out_features * bits % 32:
            raise ValueError(
                f"its {layout.out_features} outputs of {bits} bits do not fill whole words; leave the layer out"
            )
        exact = all(form.bits == bits and not form.symmetric for form, _ in layout.segments)
        return Container(bits, sizes[-1], self.zeros == "middle" or (self.zeros == "integer" and middle and exact))

    def _width(self, form: Format, middle: bool) -> int:
        """Bits that codes of a format take in this engine: code - zero may need one more bit than the code alone, and
        so do steps without a level at zero, which are every second of the steps of half their size."""
        if self.zeros == "free" or (not form.symmetric and (self.zeros == "integer" or middle)):
            return form.bits
        if form.bits == 1 and not form.symmetric:
            raise ValueError(f"its groups of 1 bit have two free levels, {self.title} holds steps from zero")
        return form.bits + 1

    def converted(self, weight: QuantizedWeight, held: Container, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a layer by name, scales as `dtype`."""
        return self.tensors(affine(weight, held.group_size), held, dtype)

    def check_family(self, family: object) -> None:
        """Raise UserError for a `model_type` that is not in `families`."""
        if family not in self.families:
            raise UserError(
                f"exports for {self.title} were compared with {', '.join(self.families)} models and no others; this "
                f"one is {family}"
            )

    def containers(
        self,
        layouts: Mapping[str, Layout],
        middle: Collection[str] = (),
        alike: Sequence[Sequence[str]] = (),
        tables: Collection[str] = (),
    ) -> dict[str, Container]:
        """Return the form of every layer; those in `alike` share one. `middle`: see `container`; `tables`: embedding
        and head.

        Raises UserError that counts the layers that the engine cannot hold and says of the first what is in the way.
        """
        held: dict[str, Container] = {}
        refused: dict[str, str] = {}
        for path, layout in layouts.items():
            try:
                if path in tables and not self.tables:
                    raise ValueError(f"{self.title} holds embedding and head in 16 bits; leave out --embedding-bits")
                held[path] = self.container(layout, path in middle)
            except ValueError as error:
                refused[path] = str(error)
        if refused:
            path, reason = next(iter(refused.items()))
            raise UserError(f"{self.title} cannot hold {len(refused)} of {len(layouts)} layers. {path}: {reason}")
        for paths in [list(held)] if self.alike == "all" else alike if self.alike == "fused" else []:
            held |= dict.fromkeys(paths, _common([held[path] for path in paths], self.zeros == "middle"))
        return held

    def layer_specs(
        self, layout: Layout, dtype: torch.dtype = torch.float16, held: Container | None = None
    ) -> dict[str, TensorSpec]:
        """Tensors of the layer in the engine's file, by default in the smallest form. Raises as `container` does."""
        return self.specs((layout.out_features, layout.in_features), held or self.container(layout), dtype)

    def storage_bits(self, layout: Layout, middle: bool = False) -> int:
        """Bits that the layer takes in the engine's file. Raises ValueError as `container` does."""
        specs = self.layer_specs(layout, held=self.container(layout, middle))
        return 8 * sum(spec.nbytes for spec in specs.values())


def _common(forms: Sequence[Container], always: bool) -> Container:
    """The smallest form that holds what each of `forms` does; `always`: its zeros are in the middle whatever its width.

    Group sizes are powers of two.
    """
    bits = max(form.bits for form in forms)
    middle = all(form.middle for form in forms) and (always or len({form.bits for form in forms}) == 1)
    return Container(bits, min(form.group_size for form in forms), middle)
