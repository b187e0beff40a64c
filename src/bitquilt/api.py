"""The Python interface to checkpoints: `quantize` makes one and `load` opens it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquilt.core.budget import Budget
from bitquilt.core.events import Observer, silent
from bitquilt.core.plan_file import PlanFile, read_plan
from bitquilt.core.recipe import Recipe
from bitquilt.core.settings import GENERAL, Calibration, Selection, grouped
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import QUANT_METHOD
from bitquilt.request import Request, Result, wish
from bitquilt.run import run
from bitquilt.stream.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Result", "load", "quantize"]


def quantize(
    model: str | Path,
    recipe: str | Recipe | None = None,
    calibration: str | Path | Calibration = GENERAL,
    out: str | Path | None = None,
    *,
    budget: Budget | None = None,
    scope: str | None = None,
    plan: str | Path | PlanFile | None = None,
    engine: str | None = None,
    sensitivities: str | Path | None = None,
    rounds: int = 1,
    selection: Selection = Selection(),
    batch_size: int | None = None,
    work_dir: str | Path | None = None,
    device: str = "cpu",
    observer: Observer = silent,
    **options: Any,
) -> Result:
    """Quantize a model folder or hub id into the folder `out`, block by block. An interrupted run continues.

    - `recipe`: a recipe or its name. Default: that of the plan, else cmpq+ (quilt for an engine).
    - `calibration`: a source of text (see `Calibration`), or a `Calibration`. Default: text of the package.
    - `out`: the output folder. Default: named after the model and the recipe.
    - `budget`: what the whole model may take, such as `Budget.of(size="6.5GiB")`; bits go where they lower the loss
      most.
    - `scope`: which parts may differ in bits: "global" (any column group of any layer), "layers" (one width per
      layer), "layer" (the same bits per weight in every layer), "pairs" (N-1, N, N+1 bits inside every layer, as
      SliM-LLM), "uniform" (no differences).
    - `plan`: a plan.json to follow instead of a budget.
    - `engine`: "mlx" keeps to widths and groups that MLX's files hold, whose bytes the budget counts (see `export`).
    - `sensitivities`: a file that `measure_model` wrote; without it, a run with a budget measures first.
    - `rounds`: 2 quantizes, measures again in the quantized model, then plans and quantizes again, in twice the time.
    - `selection`: the layers to quantize (see `Selection`).
    - `batch_size`: sequences per forward pass; affects speed and memory only.
    - `work_dir`: where the run keeps what it needs to continue. Default: `out` with ".work" appended.
    - `device`: "cpu", "cuda", "cuda:N", or "auto" (a GPU where there is one) computes the blocks. Embedding and head
      stay on the CPU unless all blocks are trained together. A GPU sums in another order, so a few codes in ten
      thousand may differ.
    - `options`: fields of the recipe (`bits=2, group_size=32`), of `Calibration` (`samples, self_samples, seq_len,
      seed, column, bos, trust_remote_code`) and of `Selection` (`skip, include_head, embedding_bits, blocks`, ...).

    Raises UserError for anything that the caller can correct, and VerificationError if the checkpoint, read back from
    disk, disagrees with the run.
    """
    calibration, selection = grouped(options, calibration, selection)
    followed = read_plan(plan) if isinstance(plan, str | Path) else plan
    request = Request(
        model=model,
        wish=wish(recipe, options, budget, scope, followed, engine),
        calibration=calibration,
        selection=selection,
        out=None if out is None else Path(out),
        sensitivities=None if sensitivities is None else Path(sensitivities),
        rounds=rounds,
        batch_size=batch_size,
        work_dir=None if work_dir is None else Path(work_dir),
        device=choose_device(device),
    )
    return run(request, observer)


def load(folder: str | Path, *, device: str | None = None, **kwargs: Any) -> "PreTrainedModel":
    """Load the quantized model in `folder`, ready to run; keyword arguments go to `from_pretrained`.
    Python code in the folder runs only with `trust_remote_code=True`.

    `device`: "cuda", "cuda:N" or "auto" puts the packed weights on a GPU, where Triton kernels read them. For more
    than one GPU, leave `device` out and pass `device_map`.
    Raises UserError if the folder is not a bitquilt checkpoint or is damaged, or if the device does not exist.
    """
    from bitquilt.model.transformers_model import class_of, load_pretrained

    checkpoint = open_checkpoint(folder)
    method = checkpoint.model_config.quantized_by
    if method != QUANT_METHOD:
        raise UserError(
            f"{folder} is not a bitquilt checkpoint (quant_method is {method!r}, wanted {QUANT_METHOD!r}); quantize "
            "the model first"
        )
    if device is not None and "device_map" in kwargs:
        raise UserError(f"device={device!r} and device_map both say where the model goes; give one")
    if device is not None and (where := choose_device(device)).type != "cpu":
        kwargs["device_map"] = {"": where}
    kind = class_of(checkpoint.model_config.architectures)
    model: PreTrainedModel = load_pretrained(kind, checkpoint, **kwargs)
    return model
