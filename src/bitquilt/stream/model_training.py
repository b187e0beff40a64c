"""How is a model handed to a recipe that trains all its blocks together? tuned(job, flow, records, observe) -> records.

After the last block is committed: the quantized layers are read back from the work directory, the model's output is
compared with that of the full-precision model, whose last hidden states lie there too. What comes of it is written
beside the blocks (tuned-00003.safetensors), and `tuned.json`, written last, is the commit mark. A run that is killed
before tunes again: seeded, the same bytes. Everything is computed on the job's device, the head and its loss too; the
solved layers are read one at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.events import Observer, Stage
from bitquilt.core.packing import layout_from_json, unpack
from bitquilt.core.recipe import TrainsBlocks, TunesModel
from bitquilt.core.training import ModelProblem, TrainedLayers
from bitquilt.core.types import Layer, LayerPlan, Solution
from bitquilt.errors import UserError
from bitquilt.model.linear import linear_weight
from bitquilt.model.structure import Skeleton, vocabulary_size
from bitquilt.stream.activations import Flow
from bitquilt.stream.block import statistics
from bitquilt.stream.block_calls import embed, finish
from bitquilt.stream.block_training import Telling, kept_file, of_weights, read_samples
from bitquilt.stream.devices import free_bytes, move, to_device
from bitquilt.stream.job import Job, targets
from bitquilt.stream.layers import Done, put_in_place, tunes
from bitquilt.stream.workdir import read_tensors, write_json, write_tensors

_RECORDS, _HOST = "tuned.json", torch.device("cpu")
# Logits of a sample that are alive at once: ours and the full model's, their log-softmax, the gradients.
_LOGITS_ALIVE = 6
# fp32 numbers per weight of a block in training: where it is, its offset, the best, the gradient, steps, weight and the
# weight's gradient; and per token and layer width: what backward keeps.
_PER_WEIGHT, _PER_WIDTH = 7, 2


def tuned(job: Job, flow: Flow, records: list[dict[str, Any]], observe: Observer) -> list[dict[str, Any]]:
    """The blocks' records, of trained layers where the recipe tunes the model. Raises UserError if it cannot."""
    if not tunes(job):
        return records
    if (done := committed_tuning(job.folder)) is not None:
        return done
    told = Telling("the whole model", observe, "KL")
    observe(Stage("training all blocks together"))
    solved = _train(job, flow, records, told)
    entry = told.finish(solved)
    found = []
    for i, record in enumerate(records):
        observe(Stage(f"writing the trained layers of block {i + 1} of {len(records)}"))
        found.append(_commit(job, flow, i, record, solved.solutions))
    found[-1]["events"] += [asdict(event) for event in solved.events]
    found[-1]["tuning"] = entry
    write_json(job.folder / _RECORDS, found)
    return found


def committed_tuning(folder: Path) -> list[dict[str, Any]] | None:
    """The records of the tuned blocks, if that is done."""
    path = folder / _RECORDS
    return json.loads(path.read_text()) if path.is_file() else None


def check_memory(
    recipe: object,
    skeleton: Skeleton,
    shapes: Mapping[str, tuple[int, int]],
    seq_len: int,
    device: torch.device = _HOST,
) -> None:
    """Raise UserError if tuning the layers of these `[out, in]` will not find the memory that it takes on `device`."""
    wanted, free = tuning_bytes(recipe, skeleton, shapes, seq_len), free_bytes(device)
    if wanted <= free:
        return
    block = _block_bytes(recipe, skeleton, shapes, seq_len)
    fits = [f"effort=normal trains one block at a time, in {block / 1e9:.1f} GB"]
    if device != _HOST and wanted <= (there := free_bytes(_HOST)):
        fits.append(f"the host has {there / 1e9:.1f} GB free: leave out the device")
    where = "of memory" if device == _HOST else f"of {device}'s memory"
    raise UserError(
        f"training all blocks together takes {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB {where} are free; "
        + "; or ".join(fits)
    )


def tuning_bytes(recipe: object, skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]], seq_len: int) -> int:
    """What tuning takes at least: the state of all layers, one block's weights and their gradients, and one sample in
    that block, before every block and at the output; 0 for a recipe that does not tune."""
    if not isinstance(recipe, TunesModel) or not recipe.tune_batch:
        return 0
    weights, widths = _largest_block(skeleton, shapes)
    logits = vocabulary_size(skeleton.model) * seq_len
    hidden = skeleton.config.hidden_size * seq_len * (len(skeleton.blocks) + 1)
    outer = sum(skeleton.checkpoint.tensors[name].nbytes for name in skeleton.sources[""])
    alive = 3 * weights + _PER_WIDTH * widths * seq_len + hidden + _LOGITS_ALIVE * logits
    every = sum(rows * width for rows, width in shapes.values())
    return recipe.tune_bytes * every + 4 * alive + 2 * outer


def training_bytes(recipe: object, skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]], seq_len: int) -> int:
    """What training takes beside everything else: of the largest block with a whole batch, or of the model; 0 for a
    recipe that does not train."""
    return max(
        _block_bytes(recipe, skeleton, shapes, seq_len),
        tuning_bytes(recipe, skeleton, shapes, seq_len),
    )


def _block_bytes(recipe: object, skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]], seq_len: int) -> int:
    if not isinstance(recipe, TrainsBlocks) or not recipe.train_batch:
        return 0
    weights, widths = _largest_block(skeleton, shapes)
    return 4 * (_PER_WEIGHT * weights + _PER_WIDTH * widths * seq_len * recipe.train_batch)


def _largest_block(skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Weights of the block that has most, and the sum of the widths of what its layers read and write."""
    found = []
    for path in skeleton.blocks:
        inside = [shape for name, shape in shapes.items() if name.startswith(f"{path}.")]
        found.append((sum(rows * width for rows, width in inside), sum(map(sum, inside))))
    return max(found)


def _train(job: Job, flow: Flow, records: Sequence[Mapping[str, Any]], told: Telling) -> TrainedLayers:
    skeleton, count = job.skeleton, len(records)
    assert isinstance(job.recipe, TunesModel)
    assert job.ids is not None
    ids = job.ids
    flow.kept.clear()  # the memory that they take on the device is wanted for the layers
    there = flow.inputs(count, full=True)
    assert there is not None
    blocks = []
    templates = {}
    for i in range(count):
        path = skeleton.blocks[i]
        templates[path] = skeleton.template(path)
        block = skeleton.load(path)
        linears = targets(skeleton, path, block, job.skip)
        for module in linears.values():  # only what is not trained is needed of the block
            empty = torch.empty_like(module.get_parameter("weight"), device="meta")
            module.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
        blocks.append((of_weights(job, flow, i, block, linears), tuple(linears)))
    skeleton.load("")
    move(skeleton.model, job.device)
    solved = _Solved(job, records)
    try:
        problem = ModelProblem(
            solved.plans,
            solved,
            tuple(blocks),
            len(ids),
            lambda chosen: embed(skeleton, ids[list(chosen)].to(job.device)),
            lambda chosen: read_samples(there, chosen).to(job.device),
            _divergence(job, flow),
            told,
        )
        return job.recipe.tune(problem)
    except (ValueError, MemoryError) as error:
        raise UserError(f"training all blocks together: {error}") from None
    finally:
        skeleton.release_outer()
        for path, template in templates.items():
            skeleton.reset(path, template)
        move(skeleton.model, _HOST)


def _divergence(job: Job, flow: Flow) -> Callable[[Tensor, Tensor], Tensor]:
    """KL of the model's output, from the last block's: nats per token."""
    assert job.ids is not None
    ids, extras = job.ids.to(job.device), to_device(flow.extras, job.device)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        some = ids[: len(hidden)]  # the model's loop wants some; its blocks do not compute here
        with torch.no_grad():
            right = torch.log_softmax(finish(job.skeleton, some, target, extras).float(), dim=-1)
        ours = torch.log_softmax(
            finish(job.skeleton, some, hidden, extras, gradient=torch.is_grad_enabled()).float(), dim=-1
        )
        total = torch.nn.functional.kl_div(ours, right, reduction="sum", log_target=True)
        return total / right[..., 0].numel()

    return loss


class _Solved(Mapping[str, Solution]):
    """The solved layers on the job's device, read from the work directory when asked for: one block is held. `plans`:
    of all."""

    def __init__(self, job: Job, records: Sequence[Mapping[str, Any]]) -> None:
        self._job, self._records = job, records
        self._block = {name: i for i, record in enumerate(records) for name in record["layers"]}
        entries = {name: entry for record in records for name, entry in record["layers"].items()}
        self.plans = {n: LayerPlan(tuple(map(int, e["bits"])), e["group_size"]) for n, e in entries.items()}
        self._read: tuple[int, dict[str, Tensor], dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Solution:
        i, folder = self._block[name], self._job.folder
        record = self._records[i]
        if self._read is None or self._read[0] != i:
            self._read = i, read_tensors(folder / record["file"]), read_tensors(folder / kept_file(i))
        stored, kept = (to_device(_below(tensors, name), self._job.device) for tensors in self._read[1:])
        stored.pop("bias", None)
        weight = unpack(stored, layout_from_json(record["layers"][name]["layout"], name), name)
        return Solution(weight, None, (), kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._block)

    def __len__(self) -> int:
        return len(self._block)


def _commit(
    job: Job, flow: Flow, i: int, record: Mapping[str, Any], solutions: Mapping[str, Solution]
) -> dict[str, Any]:
    """Write block i with its trained layers, and make what the next one reads."""
    skeleton, path = job.skeleton, job.skeleton.blocks[i]
    template = skeleton.template(path)
    block = skeleton.load(path).to(job.device)
    linears = targets(skeleton, path, block, job.skip)
    here = flow.inputs(i)
    assert here is not None
    passes = (flow.run(i, block, here.read(rows)) for rows in job.batches())
    stats = statistics(job, linears, passes, path, sample_only=True)
    done = Done()
    for name, module in linears.items():
        before = record["layers"][name]
        weight = linear_weight(module).float()
        plan = LayerPlan(tuple(map(int, before["bits"])), before["group_size"])
        entry = put_in_place(job, Layer(name, weight, None, stats.get(name)), plan, solutions[name], module, done)
        done.record["layers"][name] = {**before, **entry}
    flow.pass_on(i, block)
    flow.pass_probe_on(i, block)
    flow.drop(i)
    replaced = {f"{name}.weight" for name in linears}
    kept = [s for s in skeleton.sources[path] if skeleton.parameters.get(s) not in replaced]
    file = f"tuned-{i:05d}.safetensors"
    write_tensors(job.folder / file, done.tensors | skeleton.checkpoint.read(kept))
    skeleton.reset(path, template)
    return {**record, "file": file, "layers": done.record["layers"], "events": list(record["events"])}


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
