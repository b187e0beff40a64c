"""`Sensitivities`: what every width of every column group costs the model, as a value and as a file.

`read_sensitivities` reads the file; `load_sensitivities` also checks that it was measured for this model and recipe.
The file is one safetensors file with a table per layer; everything else is JSON in its metadata.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bitquilt.core.recipe import Plannable, Recipe
from bitquilt.errors import UserError
from bitquilt.layer.table import RowUse
from bitquilt.model.checkpoint import Checkpoint
from bitquilt.model.remote import RemoteCheckpoint
from bitquilt.stream.run_report import recipe_json
from bitquilt.stream.workdir import replace_file, tensors_sum

FORMAT, _METHOD = 1, "kfac"  # tables by other methods, which older versions could measure, have no unit
# At most 16 k tokens are measured, which keeps the inputs of 80 blocks 8192 wide at 43 GB of disk, and a quarter of
# those that calibrate: a token costs twice what it does in a quantization, and fewer serve as well
# (docs/lab/sensitivities.md), down to the rank that the widest layer's Hessian needs.
_MOST, _SHARE, _LEAST = 16_384, 0.25, 2048
# Fields of a recipe that the tables do not depend on: how many bits there are, and who allocates them.
_BUDGETED = ("bits", "bpw", "allocation")
# Few bits cost rows more than their table says: held-out text has more of the rare tokens than the model expects. With
# these factors SmolLM2's tied table at 4.0 bits has KL 0.038 against 0.042 without, 0.043 with the importance of rows
# to the power of 0.75, and 0.055 with a tenth of the mean as the least (3,072 tokens of WikiText-2, blocks in full
# precision); cmpq+ at 70 MB has 0.180 against 0.211.
_TOGETHER = {2: 4.0, 3: 3.5, 4: 3.0, 5: 2.0, 6: 1.3}
_ROWS = "rows of "  # prefix of the tensors of embedding and head
_USE = tuple(field.name for field in fields(RowUse))


def measured_tokens(tokens: int, widest: int) -> int:
    """Number of calibration tokens that are measured; `widest`: inputs of the widest layer."""
    return min(tokens, _MOST, max(int(_SHARE * tokens), _LEAST, widest))


def has_one_bit(recipe: Plannable) -> bool:
    """Whether a plan of `recipe` may hold one-bit groups."""
    return 1 in recipe.widths(2**10)


@dataclass(frozen=True, eq=False)
class RowLosses:
    """What widths cost the rows of an embedding or head: `losses` fp32 `[rows, widths]` in nats per token.

    `widths`: ascending. `order` int32 `[rows]`: the rows from the most important on. `use`: what the solver needs.
    """

    losses: NDArray[np.float32]
    widths: tuple[int, ...]
    order: NDArray[np.int32]
    use: RowUse

    def expected(self, widths: Sequence[int]) -> NDArray[np.float32]:
        """What these widths cost the rows once all rows are stored, `[rows, widths]`."""
        factors = np.array([_TOGETHER.get(bits, 1.0) for bits in widths], np.float32)
        return self.losses[:, [self.widths.index(bits) for bits in widths]] * factors


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Loss tables of all layers. `losses`: per layer fp32 `[groups, widths]`, in nats per token.

    `widths`: per layer, ascending. `perplexity`: of the full-precision model on the calibration text; None where the
    model has no next-token logits. `about`: what `check` compares before the tables are used again. `tables`: embedding
    and head by path, where they can share a budget.
    """

    losses: dict[str, NDArray[np.float32]]
    widths: dict[str, tuple[int, ...]]
    group_size: int
    perplexity: float | None
    about: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, RowLosses] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one file, replacing it in one step."""
        arrays: dict[str, NDArray[Any]] = dict(self.losses)
        for name, table in self.tables.items():
            arrays |= {f"{_ROWS}{name}.losses": table.losses, f"{_ROWS}{name}.order": table.order}
            arrays |= {f"{_ROWS}{name}.{part}": np.ascontiguousarray(getattr(table.use, part)) for part in _USE}
        meta = {
            "format": FORMAT,
            "widths": self.widths,
            "group_size": self.group_size,
            "method": _METHOD,
            "perplexity": self.perplexity,
            "about": self.about,
            "tables": {name: table.widths for name, table in self.tables.items()},
        }
        meta["sum"] = _sum(arrays, meta)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: save_file(arrays, temporary, {"sensitivities": json.dumps(meta)}))

    def check(self, about: Mapping[str, Any], where: str) -> None:
        """Raise UserError naming the first entry of `about` that differs; `where`: the file, for the message."""
        for key, wanted in about.items():
            if (got := self.about.get(key)) != wanted:
                raise UserError(
                    f"the sensitivities in {where} were measured for another {key}: {_short(got)}, now it is "
                    f"{_short(wanted)}; measure again with `bitquilt plan --measure`"
                )


def measured_for(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What sensitivities depend on: the value of `Sensitivities.about`."""
    values = {key: value for key, value in recipe_json(recipe).items() if key not in _BUDGETED}
    found = {"recipe": json.loads(json.dumps(values))}
    if isinstance(recipe, Plannable) and has_one_bit(recipe):
        found["way to see one-bit groups"] = "each layer solved at one bit"  # older tables only guessed them
    if not isinstance(checkpoint, RemoteCheckpoint):  # headers alone have no fingerprint
        found["model"] = checkpoint.fingerprint()
    return found


def load_sensitivities(path: str | Path, checkpoint: Checkpoint, recipe: Recipe) -> Sensitivities:
    """Read saved tables. Raises UserError if they belong to another model or another recipe."""
    found = read_sensitivities(path)
    found.check(measured_for(checkpoint, recipe), str(path))
    return found


def read_sensitivities(path: str | Path) -> Sensitivities:
    """Read a file that `Sensitivities.save` wrote. Raises UserError if it is missing, damaged or something else."""
    try:
        with safe_open(path, framework="np") as handle:
            meta = json.loads((handle.metadata() or {})["sensitivities"])
            losses = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if "sum" in meta and meta.pop("sum") != _sum(losses, meta):  # earlier versions wrote none
            raise UserError(f"{path} is damaged: it does not hold what was written; measure again")
        if (meta["format"], meta["method"]) != (FORMAT, _METHOD):
            raise UserError(
                f"{path} has sensitivities of format {meta['format']} by {meta['method']}; this bitquilt reads format "
                f"{FORMAT} by {_METHOD}; measure again"
            )
        tables = _tables(losses, meta.get("tables", {}))
        widths = {name: tuple(map(int, value)) for name, value in meta["widths"].items()}
        if widths.keys() != losses.keys() or any(losses[n].shape[1:] != (len(w),) for n, w in widths.items()):
            raise UserError(f"{path} is damaged: its tables do not have the widths that it names; measure again")
        return Sensitivities(losses, widths, meta["group_size"], meta["perplexity"], meta["about"], tables)
    except FileNotFoundError:
        raise UserError(f"no sensitivities at {path}; `bitquilt plan MODEL --measure` writes them") from None
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of sensitivities, or it is damaged ({error}); measure again") from None


def _tables(arrays: dict[str, NDArray[Any]], widths: Mapping[str, Any]) -> dict[str, RowLosses]:
    """Take the tensors of embedding and head out of `arrays`. Raises KeyError or ValueError for a damaged file."""
    found = {}
    for name, own in widths.items():
        losses, order, *use = (arrays.pop(f"{_ROWS}{name}.{part}") for part in ("losses", "order", *_USE))
        if losses.shape != (len(order), len(own)) or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ValueError(f"the rows of {name} do not fit together")
        parts = {key: torch.from_numpy(value) for key, value in zip(_USE, use, strict=True)}
        found[name] = RowLosses(losses, tuple(map(int, own)), order, RowUse(**parts))
    return found


def file_hash(path: Path) -> str:
    """sha256 of a file, for a fingerprint. Raises UserError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _sum(losses: Mapping[str, NDArray[np.float32]], meta: Mapping[str, Any]) -> str:
    """Hash of all that the file holds."""
    tables = tensors_sum({name: torch.from_numpy(table) for name, table in losses.items()})
    return hashlib.sha256(f"{tables} {json.dumps(meta, sort_keys=True)}".encode()).hexdigest()


def _short(value: Any) -> str:
    text = "not recorded" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
