"""`measure` finds what each width of every column group costs the model's loss, with one block in memory at a time.

forward:   the inputs of every block go to the work directory
loss:      labels are sampled from the model's own logits, which gives the gradient at the last block's output
backward:  block by block from the last, recomputed from its stored input; squared gradients at the outputs of the
           linear layers and the Hessians of their inputs become loss tables, then the block is dropped
one bit:   for recipes with one-bit groups, each layer is first solved at one bit, after one more forward pass, because
           no statistic shows what that costs

Blocks are computed on the job's device, the loss on the host.
"""

import shutil
from collections import ChainMap, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bitquilt.core.events import Observer, Stage
from bitquilt.core.packing import tensor_specs
from bitquilt.core.plan_file import read_plan
from bitquilt.core.recipe import Plannable, RoundsInputs
from bitquilt.core.types import LayerStats, all_finite
from bitquilt.errors import UserError, not_plannable
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import read_layouts
from bitquilt.model.free_tables import TABLE_WIDTHS, Table
from bitquilt.model.hooks import hooked
from bitquilt.model.linear import QuantizedLinear, linear_weight
from bitquilt.model.structure import vocabulary_size
from bitquilt.model.tables.embedding import lookup_scale
from bitquilt.planning.output_gradients import squared_gradients
from bitquilt.planning.sensitivities import RowLosses, Sensitivities, measured_for, measured_tokens
from bitquilt.planning.table_use import TableUse
from bitquilt.planning.tabulate import LossTables
from bitquilt.stream.block import SAMPLE_TOKENS
from bitquilt.stream.block_calls import learn_calls
from bitquilt.stream.calls.routed_inputs import ExpertStats, RoutedInputs, routed_inputs
from bitquilt.stream.job import CalibratedJob, LoadedBlock, all_targets, check_weights, head_path, open_block, shapes
from bitquilt.stream.statistics import collect
from bitquilt.stream.workdir import ActivationFile, check_disk

MAX_SEQUENCE = 512
# Logits in memory at once, in numbers; the loss holds three such matrices. SmolLM2's (49152 tokens) take 100 MB for a
# sequence of 512, where batches of 2048 tokens took a peak of 2.3 GB.
_MOST_LOGITS = 2**24
_ROWS = 64  # logits of so many tokens at a time for what is computed from them


def measure(
    job: CalibratedJob,
    observe: Observer,
    *,
    seed: int = 0,
    at: Path | None = None,
    tables: Sequence[Table] = (),
) -> Sensitivities:
    """Return loss tables for every layer of `job` and the rows of `tables`, for its recipe and calibration ids.

    `at`: a quantized checkpoint of the model, in which inputs and gradients are measured instead of in the
    full-precision model. Raises UserError where the recipe cannot be planned, the disk is too small, or numbers are not
    finite.
    """
    if not isinstance(job.recipe, Plannable):
        raise not_plannable(job.recipe.name)
    widest = max(
        (width for _, width in shapes(all_targets(job.skeleton, job.skip, job.include_head)).values()), default=0
    )
    ids = _subset(job.ids, widest)
    first = None if at is None else read_plan(at / "plan.json").plans
    layers, use = LossTables(job.recipe, len(ids) * ids.shape[1], first), TableUse(job.skeleton, tables)
    folder = job.folder / "sensitivity"
    folder.mkdir(exist_ok=True)
    try:
        perplexity, rows = _Measurement(job, ids, folder, observe, seed, at, use).run(layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    losses = {name: layers.losses[name] for name in sorted(layers.losses)}
    about = measured_for(job.skeleton.checkpoint, job.recipe)
    return Sensitivities(losses, layers.widths, job.recipe.plan_terms.unit_columns, perplexity, about, rows)


def _subset(ids: Tensor, widest: int) -> Tensor:
    """Return the part of `[samples, tokens]` that is measured, spread evenly; `widest`: most inputs of a layer."""
    length = min(ids.shape[1], MAX_SEQUENCE)
    count = min(len(ids), -(-measured_tokens(ids.numel(), widest) // length))
    return ids[torch.linspace(0, len(ids) - 1, count).long(), :length]


class _Measurement:
    """Forward and backward pass over all blocks. The inputs of all blocks stay on disk until the backward pass."""

    def __init__(
        self,
        job: CalibratedJob,
        ids: Tensor,
        folder: Path,
        observe: Observer,
        seed: int,
        at: Path | None,
        use: TableUse,
    ) -> None:
        self.stored = None if at is None else StoredLayers(at)
        self.job, self.ids, self.folder, self.observe, self.use = job, ids, folder, observe, use
        # where each label is drawn in the cumulated probabilities: the same labels in batches of any size
        self.draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        count = max(1, 2048 // ids.shape[1])  # a block's graph keeps a dozen activations per token
        self.batches = [slice(s, min(s + count, len(ids))) for s in range(0, len(ids), count)]

    def run(self, tables: LossTables) -> tuple[float | None, dict[str, RowLosses]]:
        """Fill `tables`; return the model's perplexity on the calibration ids and the losses of embedding and head."""
        job, skeleton = self.job, self.job.skeleton
        self._open()
        for i in range(len(skeleton.blocks)):
            self.observe(Stage(f"sensitivity: forward through block {i + 1} of {len(skeleton.blocks)}"))
            self._forward(i)
        self.observe(Stage("sensitivity: the gradient of the loss"))
        gradients, perplexity = self._loss(tables)
        for i in reversed(range(len(skeleton.blocks))):
            self.observe(Stage(f"sensitivity: backward through block {i + 1} of {len(skeleton.blocks)}"))
            with open_block(job, i) as block:
                gradients = self._measure(block, gradients, tables)
        return perplexity, self._rows(gradients) if self.use.tables else {}

    def _rows(self, gradients: ActivationFile) -> dict[str, RowLosses]:
        """Pass the gradients back to the embedding and return the losses of its rows and of the head's."""
        skeleton, use = self.job.skeleton, self.use
        self.observe(Stage("sensitivity: the rows of embedding and head"))
        with skeleton.resident(""):
            if use.embedding is not None:
                for rows in self.batches:
                    looked_up: list[Tensor] = []

                    def watch(_ids: Tensor, output: Tensor, looked_up: list[Tensor] = looked_up) -> Tensor:
                        looked_up.append(output.detach().requires_grad_())
                        return looked_up[0]

                    module = skeleton.model.get_submodule(use.embedding.path)
                    with hooked(after=[(module, watch)]):
                        hidden = self.calls.start(self.ids[rows], gradient=True)
                    hidden.backward(gradients.read(rows).to(hidden.dtype))
                    assert looked_up[0].grad is not None
                    use.add_lookups(self.ids[rows], looked_up[0].grad * (lookup_scale(module) or 1.0))
            return use.losses(TABLE_WIDTHS)

    def _measure(self, block: LoadedBlock, gradients: ActivationFile, tables: LossTables) -> ActivationFile:
        """Add the layers of one block to the tables and return the gradients of its inputs, given its outputs'."""
        with routed_inputs(self.folder, block.module) as routed:
            return self._tabulate(block, gradients, tables, routed)

    def _tabulate(
        self, block: LoadedBlock, gradients: ActivationFile, tables: LossTables, routed: RoutedInputs
    ) -> ActivationFile:
        """`_measure`, with the inputs of the block's experts going to `routed`."""
        linears = block.linears
        check_weights(linears)
        weights, errors = self._weights(linears)
        experts = ExpertStats(block, routed, hessian=True, sample=self._sample, device=self.job.device)
        stats: Mapping[str, LayerStats] = {}
        tried: dict[str, Tensor] = {}
        if tables.tries_one_bit and linears:
            stats = self._of_block(block, self._again(block), routed, experts)
            tried = tables.one_bit_errors(weights, stats)
        wrong = {name: [found[name] for found in (errors, tried) if name in found] for name in weights}
        inputs = self._inputs(block.number)
        # in place, unless the block receives more or less than it hands on besides the hidden states
        before = gradients if gradients.shape == inputs.shape else self._new_gradients(block.number)
        with squared_gradients(linears, wrong) as (squares, made):
            back = self._backward(block, gradients, before)
            if stats:  # those of the one-bit trial, of the same inputs
                deque(back, maxlen=0)
            else:
                stats = self._of_block(block, back, routed, experts)
        tables.add(weights, stats, experts.smoothed(squares), made)
        if before is not gradients:
            gradients.path.unlink()
        return before

    def _open(self) -> None:
        skeleton, ids = self.job.skeleton, self.ids
        with skeleton.resident(""):
            self.calls = learn_calls(skeleton, [ids[rows] for rows in self.batches], self.job.device)
            widths = [self.calls.width(i) for i in range(len(skeleton.blocks) + 1)]
            largest = max(widths) * (1 if len(set(widths)) == 1 else 2)  # of the gradients
            wanted = 4 * ids.numel() * (sum(widths) + largest)
            check_disk(self.folder, wanted, "the inputs of all blocks")
            inputs = ActivationFile.create(self._path(0), self._shape(0))
            for rows in self.batches:
                inputs.write(rows, self.calls.start(ids[rows]))

    @torch.no_grad()
    def _forward(self, i: int) -> None:
        with open_block(self.job, i) as block:
            if self.stored is not None:
                self.stored.put(block.linears)
            inputs = self._inputs(i)
            outputs = ActivationFile.create(self._path(i + 1), self._shape(i + 1))
            for rows in self.batches:
                outputs.write(rows, self.calls.run(block.number, block.module, inputs.read(rows).to(self.job.device)))

    def _loss(self, tables: LossTables) -> tuple[ActivationFile, float | None]:
        """Return gradients at the last block's output and the perplexity; add the head's table if it is quantized."""
        skeleton, count = self.job.skeleton, len(self.job.skeleton.blocks)
        gradients = self._new_gradients(count)
        inputs = self._inputs(count)
        losses: list[Tensor] = []

        def passes() -> Iterator[None]:
            for rows in self._loss_batches():
                hidden = inputs.read(rows).requires_grad_()
                logits = self.calls.finish(self.ids[rows], hidden, gradient=True).float()
                if not all_finite(logits):
                    raise UserError(
                        "the full-precision model's logits hold NaN or Inf: its weights are damaged; fetch it again"
                    )
                flat = logits.reshape(-1, logits.shape[-1])
                with torch.no_grad():
                    if not skeleton.config.encoder_decoder:  # its logits are of the token itself
                        losses.extend(_next_token_losses(logits, self.ids[rows]))
                    slope = flat.softmax(-1)
                    self.use.add_logits(slope)
                    drawn = _draw(slope, self.draws[rows])
                    slope[torch.arange(len(drawn)), drawn] -= 1.0  # of the cross-entropy of the drawn labels
                flat.backward(slope)
                assert hidden.grad is not None
                gradients.write(rows, hidden.grad)
                del logits, flat, slope  # before the next ones are made
                yield

        with skeleton.resident(""), self.use.watching():
            if self.job.include_head:
                path = head_path(skeleton)
                linears = {path: skeleton.model.get_submodule(path)}
                check_weights(linears)
                with squared_gradients(linears, {}) as (squares, made):
                    stats = self._collect(linears, passes())
                tables.add({path: linear_weight(linears[path]).float()}, stats, squares, made)
            else:
                deque(passes(), maxlen=0)
        mean = float(torch.cat(losses).double().mean()) if losses else None
        return gradients, None if mean is None else float(np.exp(min(mean, 700.0)))

    def _loss_batches(self) -> list[slice]:
        """Rows of the ids whose logits are in memory at once."""
        tokens, vocabulary = self.ids.shape[1], vocabulary_size(self.job.skeleton.model)
        count = min(max(1, _MOST_LOGITS // (tokens * vocabulary)), self.batches[0].stop)
        return [slice(start, min(start + count, len(self.ids))) for start in range(0, len(self.ids), count)]

    def _backward(self, block: LoadedBlock, gradients: ActivationFile, before: ActivationFile) -> Iterator[None]:
        inputs = self._inputs(block.number)
        for rows in self.batches:
            hidden = inputs.read(rows).to(self.job.device).requires_grad_()
            with torch.enable_grad():
                output = self.calls.run(block.number, block.module, hidden)
            output.backward(gradients.read(rows).to(output.device))
            assert hidden.grad is not None
            before.write(rows, hidden.grad)
            yield

    def _again(self, block: LoadedBlock) -> Iterator[None]:
        """Pass forward once more through a loaded block."""
        inputs = self._inputs(block.number)
        for rows in self.batches:
            with torch.no_grad():
                self.calls.run(block.number, block.module, inputs.read(rows).to(self.job.device))
            yield

    def _weights(self, linears: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return full-precision weights and, in a quantized model, the errors of the weights put in their place."""
        if self.stored is not None:
            weights = self.stored.put(linears)
            return weights, {name: linear_weight(linears[name]).float() - weights[name] for name in weights}
        return {name: linear_weight(module).float() for name, module in linears.items()}, {}

    def _of_block(
        self, block: LoadedBlock, passes: Iterator[None], routed: RoutedInputs, experts: ExpertStats
    ) -> Mapping[str, LayerStats]:
        """Statistics of a block's layers; those of experts are made when they are asked for."""
        others = {name: module for name, module in block.linears.items() if name not in experts}
        return ChainMap(self._collect(others, routed.during(passes)), experts)  # type: ignore[arg-type]

    @property
    def _sample(self) -> int:
        return SAMPLE_TOKENS if isinstance(self.job.recipe, RoundsInputs) else 0

    def _collect(self, linears: Mapping[str, nn.Module], passes: Iterator[None]) -> dict[str, LayerStats]:
        return collect(linears, passes, hessian=True, sample=self._sample, tokens=self.ids.numel())

    def _inputs(self, i: int) -> ActivationFile:
        return ActivationFile(self._path(i), self._shape(i))

    def _new_gradients(self, i: int) -> ActivationFile:
        return ActivationFile.create(self.folder / f"gradients-{i:05d}.f32", self._shape(i))

    def _shape(self, i: int) -> tuple[int, int, int]:
        return (*self.ids.shape, self.calls.width(i))

    def _path(self, i: int) -> Path:
        return self.folder / f"inputs-{i:05d}.f32"


def _draw(probabilities: Tensor, places: Tensor) -> Tensor:
    """Draw labels `[n]` from `probabilities` `[n, classes]`: where `places`, from 0 to 1 and one a token, fall."""
    # a model without a logit per token, such as a classifier, takes the first token's place
    chosen = places.flatten()[torch.arange(len(probabilities)) * places.numel() // len(probabilities)]
    drawn = []
    for part, place in zip(probabilities.split(_ROWS), chosen.split(_ROWS), strict=True):
        reached = part.cumsum(-1)
        wanted = place.unsqueeze(1).to(reached) * reached[:, -1:]
        drawn.append(torch.searchsorted(reached, wanted).squeeze(1).clamp_(max=reached.shape[-1] - 1))
    return torch.cat(drawn)


def _next_token_losses(logits: Tensor, ids: Tensor) -> list[Tensor]:
    """Cross-entropy of each next token, in a list; empty where the logits are not over the vocabulary."""
    shifted, following = logits[:, :-1], ids[:, 1:]
    if shifted.shape[-1] <= int(following.max() if following.numel() else 0):
        return []
    flat = shifted.reshape(-1, shifted.shape[-1])
    return [nn.functional.cross_entropy(flat, following.reshape(-1), reduction="none")]


class StoredLayers:
    """Layers of a quantized checkpoint of the same model, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.layouts = read_layouts(self.checkpoint.config)

    def put(self, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Put dequantized weights into `linears` (by full path); return the weights before, fp32 `[out, in]`."""
        before = {}
        for name, module in linears.items():
            weight = linear_weight(module)
            before[name] = weight.float().clone()
            layout = self.layouts[name]
            stored = self.checkpoint.read(f"{name}.{key}" for key in tensor_specs(layout))
            tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items()}
            weight.copy_(QuantizedLinear.from_tensors(tensors, layout).dequantize())
        return before
