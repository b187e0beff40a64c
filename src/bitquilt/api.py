"""The Python interface: `quantize` and `load`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquilt.core.budget import Budget
from bitquilt.core.events import Observer, silent
from bitquilt.core.plan_file import OuterBits, read_plan
from bitquilt.core.recipe import Recipe
from bitquilt.data.calibration import SELF
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import QUANT_METHOD
from bitquilt.request import Request, Result, same_outer, wish, wish_for_plan
from bitquilt.run import run
from bitquilt.stream.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Result", "load", "quantize"]


def quantize(
    model: str | Path,
    recipe: str | Recipe | None = None,
    calibration: str | Path = SELF,
    out: str | Path | None = None,
    *,
    samples: int = 128,
    self_samples: int = 0,
    seq_len: int = 2048,
    seed: int = 0,
    batch_size: int | None = None,
    work_dir: str | Path | None = None,
    skip: Sequence[str] = (),
    include_head: bool = False,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    plan: str | Path | None = None,
    budget: Budget | None = None,
    scope: str | None = None,
    sensitivities: str | Path | None = None,
    rounds: int = 1,
    device: str = "cpu",
    observer: Observer = silent,
    **options: Any,
) -> Result:
    """Quantize a model folder (or hub id) into the folder `out`, block by block; interrupted, it continues.

    `recipe`: a name, whose fields are taken from `options` (`bits=2, group_size=32, ...`), or a recipe; without, the
    plan's, else slim-llm. `calibration`: text, jsonl, parquet, a folder of them, a hub data set, token ids in a
    safetensors file, or "self": the model writes its own. `self_samples`: so many sequences of the model's own beside
    those of the text, for recipes that train. `skip`: patterns of layers to leave alone. `include_head`: quantize the
    layer that makes logits too, where it is not tied to the embedding. `embedding_bits`: round the token embedding to
    so many bits (2 to 8; groups of 32, one scale each), and with it a head that is tied to it; `head_bits`: the
    same for a head of its own; a budget counts both.
    `plan`: a plan.json to follow, made for this recipe, embedding and head or for ones that take the same bytes.
    `budget`: what the whole model may take, such as `Budget.of(size="6.5GiB")`, given out where it hurts least;
    `scope`: "global" (any column group of any layer), "layers" (one width a layer), "layer" (every layer the same
    bits per weight), "pairs" (inside it N-1, N, N+1 in pairs, as SliM-LLM), "uniform". What a width costs is measured
    first, unless `sensitivities` names a file of it. `rounds`: 2 = quantize once, measure again what the errors really
    made there cost, plan and quantize again: twice the time, less loss where a first plan trusts its tables too far.
    `device`: "cuda", "cuda:N", or "auto" (a GPU where there is one) computes the blocks there, one at a time, the next
    one's weights being read meanwhile; embedding and head stay on the processor, but where all blocks are trained
    together. Sums are rounded differently, so a few codes in ten thousand may differ.
    Raises UserError for anything the caller can mend, VerificationError if the reloaded checkpoint disagrees.
    """
    where = choose_device(device)
    file, outer = None if plan is None else read_plan(plan), OuterBits(embedding_bits, head_bits)
    if file is None:
        wanted = wish(recipe or "slim-llm", options, budget, scope)
    else:
        wanted = wish_for_plan(file.recipe, recipe, options, budget, scope)
        outer = same_outer(file.outer, outer)
    request = Request(
        model=model,
        wanted=wanted,
        calibration=calibration,
        out=None if out is None else Path(out),
        samples=samples,
        self_samples=self_samples,
        seq_len=seq_len,
        seed=seed,
        batch_size=batch_size,
        work_dir=None if work_dir is None else Path(work_dir),
        skip=tuple(skip),
        include_head=include_head,
        outer=outer,
        plan=plan,
        file=file,
        sensitivities=sensitivities,
        rounds=rounds,
        device=where,
    )
    return run(request, observer)


def load(folder: str | Path, *, device: str | None = None, **kwargs: Any) -> "PreTrainedModel":
    """The quantized model in `folder`, ready to run; keyword arguments go to `from_pretrained`.

    `device`: "cuda", "cuda:N" or "auto" puts the packed weights on a GPU, where Triton's kernels read them as they are;
    more than one GPU: leave it out and give `device_map`.
    Raises UserError if the folder is not a bitquilt checkpoint or is damaged, or the device is not here.
    """
    from transformers import AutoModelForCausalLM

    from bitquilt.model.transformers_model import architecture

    checkpoint = open_checkpoint(folder)
    method = checkpoint.model_config.quantized_by
    if method != QUANT_METHOD:
        raise UserError(f"{folder} is no bitquilt checkpoint (quant_method is {method!r}); quantize the model first")
    if device is not None and "device_map" in kwargs:
        raise UserError(f"device={device!r} and device_map both say where the model goes; give one")
    if device is not None and (where := choose_device(device)).type != "cpu":
        kwargs["device_map"] = {"": where}
    kind = architecture(checkpoint.model_config.architectures) or AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(checkpoint.folder, **kwargs)
    return model
