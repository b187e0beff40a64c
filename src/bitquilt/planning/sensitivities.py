"""What every width costs, as a value and a file: Sensitivities, read_sensitivities(path). One safetensors file, a table
per layer, the rest as JSON in its metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bitquilt.errors import UserError

Method = Literal["kfac", "activation"]
FORMAT = 1
# Tokens of the pass: at most 16 k, which keep the inputs of 80 blocks 8192 wide at 43 GB of disk; and a quarter of
# those that calibrate: a token costs twice what it does in a quantization, and fewer do as well (docs/benchmarks.md),
# down to the rank that the widest layer's Hessian needs.
_MOST, _SHARE, _LEAST = 16_384, 0.25, 2048


def measured_tokens(tokens: int, widest: int) -> int:
    """Of `tokens` that calibrate, how many are measured where the widest layer has `widest` inputs."""
    return min(tokens, _MOST, max(int(_SHARE * tokens), _LEAST, widest))


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """`losses`: per layer fp32 `[groups, widths]`, nats per token with method "kfac"; `widths` per layer, ascending.

    `perplexity` of the full-precision model on the calibration text, None where it gives no next-token logits.
    `about`: what they were measured of, for `check`."""

    losses: dict[str, NDArray[np.float32]]
    widths: dict[str, tuple[int, ...]]
    group_size: int
    method: Method
    perplexity: float | None
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one file, by a rename."""
        meta = {
            "format": FORMAT,
            "widths": self.widths,
            "group_size": self.group_size,
            "method": self.method,
            "perplexity": self.perplexity,
            "about": self.about,
        }
        temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.losses, temporary, {"sensitivities": json.dumps(meta)})
        temporary.replace(path)

    def check(self, about: Mapping[str, Any], where: str) -> None:
        """Raise UserError naming the first thing that differs from what is wanted."""
        for key, wanted in about.items():
            if (got := self.about.get(key)) != wanted:
                raise UserError(
                    f"the sensitivities in {where} were measured for another {key}: {_short(got)}, now it is "
                    f"{_short(wanted)}; measure again with `bitquilt plan --measure`"
                )


def read_sensitivities(path: str | Path) -> Sensitivities:
    """Raises UserError if the file is missing, damaged, or something else."""
    try:
        with safe_open(path, framework="np") as handle:
            meta = json.loads((handle.metadata() or {})["sensitivities"])
            losses = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if meta["format"] != FORMAT:
            raise UserError(f"{path} has sensitivities of format {meta['format']}; this bitquilt reads {FORMAT}")
        widths = {name: tuple(map(int, value)) for name, value in meta["widths"].items()}
        if widths.keys() != losses.keys() or any(losses[n].shape[1:] != (len(w),) for n, w in widths.items()):
            raise UserError(f"{path} is damaged: its tables do not have the widths it names")
        return Sensitivities(losses, widths, meta["group_size"], meta["method"], meta["perplexity"], meta["about"])
    except FileNotFoundError:
        raise UserError(f"no sensitivities at {path}; `bitquilt plan MODEL --measure` writes them") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no file of sensitivities, or damaged ({error}); measure again") from None


def _short(value: Any) -> str:
    text = "not recorded" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
