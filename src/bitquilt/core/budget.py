"""`Budget`: what a whole checkpoint may take, in bits per weight of some or all weights, bytes on disk or memory.

`parse_bytes` reads sizes as people write them: 6.5GiB, 6500MB, 800000000.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["bits", "bpw", "total-bpw", "size", "vram"]
Scope = Literal["global", "layers", "layer", "pairs", "uniform"]
"""Which column groups may differ in bits; `allocation.scopes` explains each value."""
SCOPES: tuple[Scope, ...] = ("global", "layers", "layer", "pairs", "uniform")
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_BY_CASE = {unit.lower(): factor for unit, factor in _UNITS.items()}


@dataclass(frozen=True)
class Budget:
    """What a whole checkpoint may take. `Budget.of(size="6.5GiB")` makes one.

    Kinds: `bits` is the mean code width over the quantized weights; `bpw` counts everything stored for them, and
    nothing else; `total-bpw` is the bits of the whole folder per parameter of the model; `size` is bytes of the whole
    folder; `vram` is bytes of weights, key-value cache for `ctx` tokens and workspace.

    Raises ValueError for a value that is not a finite number above 0, or for a `ctx` with a kind other than `vram`.
    """

    kind: Kind
    value: float
    ctx: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"the budget {self.kind} is {self.value}; wanted a number above 0")
        if (self.kind == "vram") != (self.ctx is not None):
            raise ValueError(
                f"the budget {self.kind} has ctx {self.ctx}; a context length goes with vram only, such as "
                "Budget.of(vram='8GiB', ctx=8192)"
            )
        if self.ctx is not None and self.ctx < 1:
            raise ValueError(f"the context is {self.ctx} tokens; wanted at least 1")

    @classmethod
    def of(
        cls,
        *,
        bits: float | None = None,
        bpw: float | None = None,
        total_bpw: float | None = None,
        size: int | str | None = None,
        vram: int | str | None = None,
        ctx: int | None = None,
    ) -> "Budget | None":
        """Return the budget that is given, or None. Raises ValueError for more than one."""
        given = {"bits": bits, "bpw": bpw, "total_bpw": total_bpw, "size": size, "vram": vram}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are budgets for the same run; give only one")
        if ctx is not None and vram is None:
            raise ValueError(f"ctx, the context length, is {ctx}, but it goes with vram; give both or neither")
        if vram is not None and ctx is None:
            raise ValueError(f"vram is {vram} without ctx; vram needs ctx, the context length to hold, such as 8192")
        if bits is not None:
            return cls("bits", float(bits))
        if bpw is not None:
            return cls("bpw", float(bpw))
        if total_bpw is not None:
            return cls("total-bpw", float(total_bpw))
        if size is not None:
            return cls("size", parse_bytes(size))
        return None if vram is None else cls("vram", parse_bytes(vram), ctx)

    @property
    def whole(self) -> bool:
        """Whether the budget counts the whole model, embedding and head included."""
        return self.kind in ("total-bpw", "size", "vram")

    @property
    def in_bytes(self) -> bool:
        """Whether the budget is a number of bytes, not of bits per weight."""
        return self.kind in ("size", "vram")

    def __str__(self) -> str:
        if self.kind == "size":
            return f"{self.value:.0f} bytes on disk"
        if self.kind == "vram":
            return f"{self.value:.0f} bytes of memory with {self.ctx} tokens"
        if self.kind == "total-bpw":
            return f"{self.value:g} bits per parameter of the whole folder"
        return f"{self.value:g} {'nominal' if self.kind == 'bits' else 'true'} bits per weight"


def parse_bytes(text: int | float | str) -> int:
    """Return the bytes of a size: "6.5GiB" -> 6979321856. A plain number is bytes. Raises ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    unit = match[2] if match else None
    if match is None or unit not in _BY_CASE:
        raise ValueError(f"{text!r} is not a size; wanted such as 6.5GiB, 800MB or a number of bytes")
    return int(float(match[1]) * _BY_CASE[unit])
