"""What a run keeps about the files it commits: `LayerRecord`, `TrainingRecord` and `BlockRecord`, as JSON on disk.

`read_record` and `write_record` handle the commit mark of one file. report.json repeats most of a record.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

from bitquilt.core.packing import layout_from_json, layout_to_json
from bitquilt.core.types import Event, LayerPlan, Layout
from bitquilt.errors import UserError
from bitquilt.stream.workdir import DamagedError, read_mark, write_mark

# Names of files in a work directory; a stem is that of a mark (.json) and of its tensors (.safetensors).
HEAD_STEM, LOGITS_FILE = "head", "logits.safetensors"
TABLE_STEMS = {"embedding": "embedding", "head": "rounded-head"}

StoredLayout = Annotated[
    Layout,
    PlainValidator(lambda value: value if isinstance(value, Layout) else layout_from_json(value, "a record")),
    PlainSerializer(layout_to_json),
]


class LayerRecord(BaseModel):
    """One stored layer. `bits` has a digit per column group; errors are squared errors relative to the squared value.

    A recipe's own numbers about the layer stand next to the fields; `notes` returns them.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    layout: StoredLayout
    bits: str
    group_size: int
    output_error: float | None
    weight_error: float
    loss: float | None
    seconds: float

    @property
    def plan(self) -> LayerPlan:
        """Where the layer's bits went."""
        return LayerPlan(tuple(map(int, self.bits)), self.group_size)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the recipe says about the layer."""
        return self.model_extra or {}

    def annotated(self, seconds: float, notes: Mapping[str, Any]) -> "LayerRecord":
        """Return the record with the time the layer took and what the recipe says about it."""
        return self.model_copy(update={**notes, "seconds": seconds})


class TrainingRecord(BaseModel):
    """One training of a block or of the model; the recipe's own numbers stand next to the fields."""

    model_config = ConfigDict(frozen=True, extra="allow")
    start_loss: float
    loss: float
    losses: tuple[float, ...]
    seconds: float


class BlockRecord(BaseModel):
    """One committed file: a block, the head or a rounded table. `tensors_sum`: of what the file holds.

    `planned`: whether its bits belong in plan.json. `tied`: for a rounded table, whether embedding and head share it.
    """

    model_config = ConfigDict(frozen=True)
    block: str
    file: str
    tensors_sum: str
    layers: dict[str, LayerRecord]
    events: tuple[Event, ...]
    training: TrainingRecord | None = None
    tuning: TrainingRecord | None = None
    seconds: float = 0.0
    planned: bool = True
    tied: bool | None = None

    @property
    def mean_output_error(self) -> float | None:
        """Mean of the layers' relative output errors, or None without calibration data."""
        errors = [layer.output_error for layer in self.layers.values() if layer.output_error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in the work directory, without fields that say nothing."""
        return self.model_dump(mode="json", exclude_defaults=True)


def block_stem(i: int) -> str:
    """Name of block i's files without their endings."""
    return f"block-{i:05d}"


def read_record(path: Path) -> BlockRecord | None:
    """Return the record at `path`, or None if there is none yet. Raises UserError for a damaged one."""
    if not path.is_file():
        return None
    try:
        return BlockRecord.model_validate(read_mark(path))
    except DamagedError:
        raise UserError(f"{path} is damaged; run the same command again, which makes it again") from None


def write_record(path: Path, record: BlockRecord) -> None:
    """Write the record, which commits the file that it names."""
    write_mark(path, record.to_json())
