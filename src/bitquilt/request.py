"""What a run is asked for, and what comes of it: two values between `api.quantize` and the pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitquilt.runtime.plans import OuterBits, PlanFile
from bitquilt.wish import Wish


@dataclass(frozen=True)
class Result:
    """A finished run: where the checkpoint lies and what report.json says. `already_done`: nothing was computed."""

    folder: Path
    report: dict[str, Any]
    already_done: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """What `api.quantize` is asked for; `wanted` and `file` (of `plan`) say where the bits come from."""

    model: str | Path
    wanted: Wish
    calibration: str | Path
    out: Path | None
    samples: int
    self_samples: int
    seq_len: int
    seed: int
    batch_size: int | None
    work_dir: Path | None
    skip: tuple[str, ...]
    include_head: bool
    outer: OuterBits
    plan: str | Path | None
    file: PlanFile | None
    sensitivities: str | Path | None
    rounds: int
    device: torch.device

    @property
    def by_worth(self) -> bool:
        """Whether tables of loss decide where the bits go."""
        return self.wanted.budget is not None and self.wanted.scope != "uniform"

    @property
    def measures(self) -> bool:
        """Whether the run makes the first round's tables itself."""
        return self.by_worth and self.sensitivities is None

    @property
    def calibrates(self) -> bool:
        """Whether the run reads calibration text at all."""
        return bool(self.wanted.recipe.needs) or self.measures or self.rounds == 2
