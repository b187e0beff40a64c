"""`Traits` is what a recipe class says about itself before it is made; `check_*` refuse options shared by recipes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from bitquilt.core.recipe import Recipe
from bitquilt.core.types import MAX_BITS

MIN_TARGET_BITS, MAX_TARGET_BITS = 2, 8


@dataclass(frozen=True)
class Traits:
    """Facts about a recipe that hold for all its options.

    `fractional`: the mean of its bits may be any number. `own_allocations`: the values of its option `allocation`.
    `why_not_clipped`: the reason it has no option `clipping`, completing "it ...".
    """

    fractional: bool = False
    own_allocations: tuple[str, ...] = ()
    why_not_clipped: str = ""


class NamedRecipe(Recipe, Protocol):
    """A recipe that users choose by name and set option by option."""

    traits: ClassVar[Traits]

    def check(self) -> None:
        """Raise ValueError naming the first option that cannot work, before any layer is read."""
        ...


def check_whole_bits(bits: int) -> None:
    """Raise ValueError unless `bits` is a width that a layer of uniform bits can have."""
    if not MIN_TARGET_BITS <= bits <= MAX_TARGET_BITS:
        raise ValueError(f"bits is {bits}; wanted a whole number from {MIN_TARGET_BITS} to {MAX_TARGET_BITS}")


def check_bpw(bpw: float | None) -> None:
    """Raise ValueError for a budget in true bits per weight that is not positive."""
    if bpw is not None and not bpw > 0:
        raise ValueError(f"bpw is {bpw}; wanted true bits per weight above 0, such as 2.5")


def check_palette(palette: Sequence[int], least: int) -> None:
    """Raise ValueError unless `palette` holds ascending widths from `least` to the widest code."""
    if not palette or list(palette) != sorted(set(palette)):
        raise ValueError(f"palette is {palette}; wanted ascending bits, each once, such as (2, 4)")
    if not least <= palette[0] <= palette[-1] <= MAX_BITS:
        raise ValueError(f"palette is {palette}; wanted widths from {least} to {MAX_BITS}")


def check_mean(bits: float, palette: Sequence[int]) -> None:
    """Raise ValueError unless some mixture of the palette has `bits` as its mean."""
    if not palette[0] <= bits <= palette[-1]:
        raise ValueError(f"bits is {bits:g}; the palette {palette} reaches {palette[0]} to {palette[-1]}")
