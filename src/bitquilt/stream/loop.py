"""The loop: one block in memory at a time, from the first to the last, each committed when it is done.

for block in blocks:
    stats   = collect(block, inputs)      # of the full-precision block, on the quantized blocks' outputs
    weights = solve(layers, recipe)
    inputs  = forward(quantized block)    # errors of earlier blocks are seen by later ones
    commit(block)                         # tensors and activations, by atomic renames
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.events import BlockDone, Observer, Stage
from bitquilt.core.packing import layout_from_json
from bitquilt.core.types import LayerStats
from bitquilt.stream.activations import Flow, open_flow
from bitquilt.stream.block import compares, look_at_block, paired_statistics, quantize_block, statistics
from bitquilt.stream.block_calls import finish
from bitquilt.stream.drift import Stage as Measured
from bitquilt.stream.drift import observe_pass
from bitquilt.stream.embedding_and_head import committed_tables, put_head
from bitquilt.stream.first_pass import planned
from bitquilt.stream.job import Job, head_path
from bitquilt.stream.layers import check_weights, mean_output_error, quantize_layers
from bitquilt.stream.model_training import committed_tuning, tuned
from bitquilt.stream.prefetch import open_blocks
from bitquilt.stream.workdir import Activations, read_tensors, write_json, write_tensors

HEAD_FILE, _HEAD_RECORD = "head.safetensors", "head.json"


def stream(job: Job, observe: Observer) -> list[dict[str, Any]]:
    """Quantize every block; returns their records. Continues after the last committed block.

    Raises UserError naming layer or block where weights or activations are not finite.
    """
    skeleton, blocks = job.skeleton, job.skeleton.blocks
    records = committed(job.folder, len(blocks))
    head = committed_head(job.folder)
    if (job.folder / "logits.safetensors").exists():
        return _all_records(job, committed_tuning(job.folder) or records, head)
    observe(Stage("reading the embedding and making the first block's inputs"))
    flow = open_flow(job, resumed=bool(records))
    with open_blocks(skeleton, job.device) as loaded:
        job = planned(job, partial(look_at_block, job, flow, loaded), observe)
        for i in range(len(records), len(blocks)):
            started = time.perf_counter()
            record = quantize_block(job, flow, i, loaded, observe)
            record["seconds"] = round(time.perf_counter() - started, 3)
            write_json(job.folder / f"block-{i:05d}.json", record)
            flow.drop(i)
            records.append(record)
            observe(BlockDone(i, len(blocks), mean_output_error(record), record["seconds"]))
    records = tuned(job, flow, records, observe)
    if job.include_head and not head:
        head = [_head(job, flow, observe)]
    observe(Stage("computing the quantized model's logits on the probe"))
    skeleton.load("")
    if head:
        _quantized_head(job, head[0])
    logits = finish(skeleton, flow.probe_ids, flow.probe(len(blocks)), flow.extras)
    skeleton.release_outer()
    write_tensors(job.folder / "logits.safetensors", {"ids": flow.probe_ids, "logits": logits.float()})
    return _all_records(job, records, head)


def _all_records(job: Job, blocks: list[dict[str, Any]], head: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return blocks + head + committed_tables(job.folder)


def committed(folder: Path, blocks: int) -> list[dict[str, Any]]:
    """Records of the blocks that are done, in order."""
    records = []
    for i in range(blocks):
        path = folder / f"block-{i:05d}.json"
        if not path.is_file():
            break
        records.append(json.loads(path.read_text()))
    return records


def committed_head(folder: Path) -> list[dict[str, Any]]:
    """The head's record, if it is done."""
    path = folder / _HEAD_RECORD
    return [json.loads(path.read_text())] if path.is_file() else []


@torch.no_grad()
def _head(job: Job, flow: Flow, observe: Observer) -> dict[str, Any]:
    """Quantize the head on the last block's outputs; its files are in place when this returns."""
    skeleton, folder = job.skeleton, job.folder
    path, count = head_path(skeleton), len(skeleton.blocks)
    observe(Stage(f"quantizing the head {path}"))
    started = time.perf_counter()
    skeleton.load("")
    linears = {path: skeleton.model.get_submodule(path)}
    check_weights(linears)
    done = quantize_layers(job, count, linears, _head_statistics(job, flow, path), observe)
    record = done.record
    write_tensors(folder / HEAD_FILE, done.tensors)
    skeleton.release_outer()
    record["seconds"] = round(time.perf_counter() - started, 3)
    record = {"block": path, "file": HEAD_FILE, **record}
    write_json(folder / _HEAD_RECORD, record)
    flow.drop_activations(count)
    return record


def _head_statistics(job: Job, flow: Flow, path: str) -> dict[str, LayerStats]:
    model, ids, count = job.skeleton.model, job.ids, len(job.skeleton.blocks)
    here = flow.inputs(count)
    if ids is None or here is None:
        return {}

    def run(inputs: Activations, rows: slice) -> Tensor:
        return finish(job.skeleton, ids[rows], inputs.read(rows).cpu(), flow.extras)

    if not compares(job):
        linears = {path: model.get_submodule(path)}
        return statistics(job, linears, (run(here, rows) for rows in job.batches()), path)
    there, stage = flow.inputs(count, full=True), Measured((path,), True, {})
    assert there is not None
    passes = (
        (observe_pass(model, stage, partial(run, there, rows)), observe_pass(model, stage, partial(run, here, rows)))
        for rows in job.batches()
    )
    return paired_statistics(job, stage, passes, path)


def _quantized_head(job: Job, record: dict[str, Any]) -> None:
    """Put the stored head into the model."""
    path = record["block"]
    prefix = f"{path}."
    tensors = {key.removeprefix(prefix): value for key, value in read_tensors(job.folder / HEAD_FILE).items()}
    put_head(job.skeleton, path, tensors, layout_from_json(record["layers"][path]["layout"], path))
