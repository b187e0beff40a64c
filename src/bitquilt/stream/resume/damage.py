"""`drop_damaged` checks every file of a work directory and deletes what is damaged, so that it is made again.

A file of a run carries a sum of its content: marks, states and activations in themselves, the tensors of a block in the
mark that commits it. Runs are deterministic, so whatever is made again has the same bytes.

The inputs of earlier blocks are gone. A damaged block, or damaged inputs of the next one, therefore cost all blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bitquilt.core.recipe import PlansModel, Recipe
from bitquilt.core.types import Event
from bitquilt.stream.block_training import kept_file
from bitquilt.stream.first_pass import SENSED_FILE
from bitquilt.stream.hidden_states import activation_file, probe_file
from bitquilt.stream.model_training import TUNED_FILE, read_tuned
from bitquilt.stream.records import HEAD_STEM, LOGITS_FILE, TABLE_STEMS, BlockRecord, block_stem, read_record
from bitquilt.stream.workdir import DamagedError, check_activations, check_state, delete, read_mark, tensors_sum

_LATER = ("tuned", HEAD_STEM, "logits")


@dataclass(frozen=True)
class WorkFiles:
    """The files that a run has in `folder` for a model of `blocks` blocks.

    `tables`: what is rounded besides the blocks, "embedding" or "head". `planned`: the bits are known before the run.
    `others`: files that no block depends on, with a function that raises DamagedError.
    """

    folder: Path
    blocks: int
    recipe: Recipe
    include_head: bool
    tables: tuple[str, ...]
    planned: bool
    others: Mapping[str, Callable[[Path], object]]
    faults: dict[str, str] = field(default_factory=dict)


def drop_damaged(files: WorkFiles) -> list[Event]:
    """Delete what is damaged and what depends on it; return an event for each damaged file."""
    for name, check in files.others.items():
        _is_sound(files, name, check, optional=True)
    tables = [kind for kind in files.tables if _sound_piece(files, TABLE_STEMS[kind], optional=True) is None]
    for kind in tables:
        _delete(files.folder, f"{TABLE_STEMS[kind]}.*")
    done = _sound_blocks(files)
    tuned = _sound_tuning(files)
    head = _sound_piece(files, HEAD_STEM, optional=True) is not None
    logits = _is_sound(files, LOGITS_FILE, check_state, optional=True)
    if not tuned or done < files.blocks:
        _delete(files.folder, "tuned*")
        head = False
    if not head:
        _delete(files.folder, f"{HEAD_STEM}.*")
    if tables or done < files.blocks or (files.include_head and not head) or (_tunes(files) and not tuned):
        logits = False
    if not logits:
        _delete(files.folder, LOGITS_FILE)
    wanted = () if logits else _needed(files, done, tuned, head)
    kinds: dict[str, Callable[[Path], object]] = {".json": read_mark, ".f32": check_activations}
    explained = bool(files.faults)  # the inputs of a damaged block are gone as a rule
    bad = [n for n in wanted if not _is_sound(files, n, kinds.get(Path(n).suffix, check_state), optional=explained)]
    if bad:
        done = 0
    if done == 0 or not logits:
        _is_sound(files, SENSED_FILE, read_mark, optional=True)
    if done < files.blocks:
        _delete_blocks(files, done)
    return [Event("", "damaged work directory", f"{name} {why}; made again") for name, why in files.faults.items()]


def _sound_blocks(files: WorkFiles) -> int:
    """How many blocks are committed and whole, from the first on."""
    done, last = 0, -1
    for i in range(files.blocks):
        if (files.folder / f"{block_stem(i)}.json").exists():
            last = i
    while done <= last and _sound_piece(files, block_stem(done)) is not None:
        if _tunes(files) and not _is_sound(files, kept_file(done), check_state):
            break
        done += 1
    return done


def _sound_piece(files: WorkFiles, stem: str, optional: bool = False) -> BlockRecord | None:
    """The record of a mark and its file of tensors, if both are whole; None otherwise."""
    mark = files.folder / f"{stem}.json"
    if not _is_sound(files, mark.name, read_mark, optional):
        return None
    record = read_record(mark)
    assert record is not None
    return record if _is_sound(files, record.file, partial(_check_tensors, record=record)) else None


def _sound_tuning(files: WorkFiles) -> bool:
    if not _tunes(files) or not _is_sound(files, TUNED_FILE, read_mark, optional=True):
        return not _tunes(files)
    records = read_tuned(files.folder / TUNED_FILE)
    bad = [r for r in records if not _is_sound(files, r.file, partial(_check_tensors, record=r))]
    return not bad


def _check_tensors(path: Path, record: BlockRecord) -> None:
    if tensors_sum(path) != record.tensors_sum:
        raise DamagedError("does not hold the tensors that were written")


def _is_sound(files: WorkFiles, name: str, check: Callable[[Path], object], optional: bool = False) -> bool:
    """Whether a file is there and whole; what is neither is deleted and noted. `optional`: it may be missing."""
    path = files.folder / name
    if name in files.faults:
        return False
    if not path.exists() and not path.is_symlink():
        if not optional:
            files.faults[name] = "is missing"
        return False
    try:
        if path.is_symlink() or not path.is_file():
            raise DamagedError("is not a file")
        check(path)
    except (DamagedError, OSError) as error:
        files.faults[name] = str(error) if isinstance(error, DamagedError) else f"cannot be read ({error.strerror})"
        delete(path)
        return False
    return True


def _needed(files: WorkFiles, done: int, tuned: bool, head: bool) -> Iterator[str]:
    """Names of the files that the run reads to go on after `done` blocks."""
    recipe, count = files.recipe, files.blocks
    if done == 0:
        return
    yield probe_file(done)
    if isinstance(recipe, PlansModel) and not files.planned:
        yield SENSED_FILE
    if not recipe.needs.calibration:
        return
    if _tunes(files) and not tuned:
        yield from (activation_file(0, "quantized"), probe_file(0))
    if done < count or (files.include_head and not head and tuned):
        yield activation_file(done, "quantized")
    full = recipe.needs.full_model if done < count else _tunes(files) and not tuned
    if full or (done == count and files.include_head and not head and recipe.needs.drift):
        yield activation_file(done, "full")


def _tunes(files: WorkFiles) -> bool:
    return files.recipe.training.model is not None and files.recipe.needs.calibration


def _delete_blocks(files: WorkFiles, first: int) -> None:
    """Delete the blocks from `first` on and what was made after them."""
    for i in range(first, files.blocks):
        _delete(files.folder, f"{block_stem(i)}.*")
        _delete(files.folder, kept_file(i))
    for stem in _LATER:
        _delete(files.folder, f"{stem}*")
    if first == 0:
        for pattern in ("activations-*", "probe-*", "first-*"):
            _delete(files.folder, pattern)


def _delete(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        delete(path)
