"""`stream` quantizes a model block by block, one in memory at a time, and commits each when it is done.

for block in blocks:
    stats   = collect(block, inputs)      # of the full-precision block, on the quantized blocks' outputs
    weights = solve(layers, recipe)
    inputs  = forward(quantized block)    # later blocks see the errors of earlier ones
    commit(block)                         # tensors and activations, by atomic renames
"""

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bitquilt.core.events import BlockDone, Observer, Stage
from bitquilt.core.types import LayerStats
from bitquilt.stream.block import input_statistics, paired_statistics, quantize_block
from bitquilt.stream.drift import InputStage
from bitquilt.stream.embedding_and_head import committed_tables, put_head
from bitquilt.stream.first_pass import planned
from bitquilt.stream.hidden_states import CalibratedStates, HiddenStates, open_states
from bitquilt.stream.job import Job, LoadedBlock, check_weights, head_path
from bitquilt.stream.layers import SolvedLayers, quantize_layers
from bitquilt.stream.model_training import committed_tuning, tuned
from bitquilt.stream.prefetch import open_blocks
from bitquilt.stream.records import HEAD_STEM, LOGITS_FILE, BlockRecord, block_stem, read_record, write_record
from bitquilt.stream.workdir import ActivationFile, read_tensors, tensors_of, tensors_sum, write_state, write_tensors

_HEAD_FILE, _HEAD_RECORD = f"{HEAD_STEM}.safetensors", f"{HEAD_STEM}.json"


def stream(job: Job, observe: Observer) -> list[BlockRecord]:
    """Quantize every block, and the head if asked, and return their records; continue after the last committed block.

    Raises UserError naming layer or block where weights or activations are not finite.
    """
    count = len(job.skeleton.blocks)
    records, head = committed(job.folder, count), read_record(job.folder / _HEAD_RECORD)
    if (job.folder / LOGITS_FILE).exists():
        records = committed_tuning(job.folder) or records
    else:
        observe(Stage("reading the embedding and making the first block's inputs"))
        states = open_states(job, resumed=bool(records))
        with open_blocks(states.job) as blocks:
            states.job = planned(states, blocks, observe)
            for i in range(len(records), count):
                started = time.perf_counter()
                with blocks.open(i) as block:
                    record = quantize_block(states, block, observe)
                record = record.model_copy(update={"seconds": round(time.perf_counter() - started, 3)})
                write_record(job.folder / f"{block_stem(i)}.json", record)
                states.delete(i)
                records.append(record)
                observe(BlockDone(i, count, record.mean_output_error, record.seconds))
        records = tuned(states, records, observe)
        if job.include_head and head is None:
            head = _quantize_head(states, observe)
        observe(Stage("computing the quantized model's logits on the probe"))
        _write_logits(states, head)
    return records + ([] if head is None else [head]) + committed_tables(job.folder)


def committed(folder: Path, blocks: int) -> list[BlockRecord]:
    """Return the records of the blocks that are done, in order."""
    records: list[BlockRecord] = []
    while len(records) < blocks and (record := read_record(folder / f"{block_stem(len(records))}.json")) is not None:
        records.append(record)
    return records


@torch.no_grad()
def _quantize_head(states: HiddenStates, observe: Observer) -> BlockRecord:
    """Quantize the head on the last block's outputs; its files are in place on return."""
    job, skeleton, count = states.job, states.job.skeleton, len(states.job.skeleton.blocks)
    path = head_path(skeleton)
    observe(Stage(f"quantizing the head {path}"))
    started, solved = time.perf_counter(), SolvedLayers()
    with skeleton.resident("") as model:
        head = LoadedBlock(count, path, model, {path: model.get_submodule(path)})
        check_weights(head.linears)
        stats = _head_statistics(states, head) if isinstance(states, CalibratedStates) else {}
        quantize_layers(job, head, stats, observe, solved)
        write_tensors(job.folder / _HEAD_FILE, solved.tensors)
    record = BlockRecord(
        block=path,
        file=_HEAD_FILE,
        tensors_sum=tensors_sum(solved.tensors),
        layers=solved.records,
        events=tuple(solved.events),
        seconds=round(time.perf_counter() - started, 3),
    )
    write_record(job.folder / _HEAD_RECORD, record)
    if isinstance(states, CalibratedStates):
        states.delete_activations(count)
    return record


def _head_statistics(states: CalibratedStates, head: LoadedBlock) -> dict[str, LayerStats]:
    job = states.job

    def run(inputs: ActivationFile, rows: slice) -> Tensor:
        return states.calls.finish(job.ids[rows], inputs.read(rows).cpu())

    here, needs = states.inputs(head.number), job.recipe.needs
    if not needs.drift:
        return input_statistics(job, head.linears, (run(here, rows) for rows in job.batches), hessian=needs.hessian)
    there, stage = states.inputs(head.number, "full"), InputStage((head.path,), True, {})
    return paired_statistics(job, stage, (head.module, partial(run, there)), (head.module, partial(run, here)))


def _write_logits(states: HiddenStates, head: BlockRecord | None) -> None:
    """Compute the quantized model's logits on the probe, with the head of `head` if there is one."""
    job, skeleton = states.job, states.job.skeleton
    with skeleton.resident(""):
        if head is not None:
            tensors = tensors_of(head.block, read_tensors(job.folder / head.file))
            put_head(skeleton, head.block, tensors, head.layers[head.block].layout)
        logits = states.calls.finish(states.probe_ids, states.probe(len(skeleton.blocks)))
    write_state(job.folder / LOGITS_FILE, {"ids": states.probe_ids, "logits": logits.float()})
