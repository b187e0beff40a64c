"""Tasks of lm-eval: `run_tasks` scores a loaded model on them."""

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitquilt.errors import UserError


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    limit: int | None = None,
    batch_size: int = 1,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of a loaded causal LM, {task: {"acc,none": 0.5, ...}}, as lm-eval names them.

    A task is a name that lm-eval knows or finds in the yaml files of `include_path`, a yaml file, or a dict. `limit`:
    only the first examples of each task. The tokenizer and the global random state stay as they were.
    Raises UserError without lm-eval, for an unknown task and for one whose data cannot be fetched."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("tasks need lm-eval, which is not installed; run: pip install 'bitquilt[lm-eval]'") from None
    if not tasks:
        raise UserError("no tasks given; name at least one, such as arc_easy")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; wanted at least 1 example")
    training = model.training
    with _random_state_kept():
        names = [task for task in tasks if isinstance(task, str) and not task.endswith(".yaml")]
        own = None if include_path is None else str(include_path)
        manager = TaskManager(include_path=own, include_defaults=False)
        if any(not manager.match_tasks([name]) for name in names):
            manager = TaskManager(include_path=own)  # lm-eval's thousands of yaml files: 5 s, measured
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            raise UserError(f"lm-eval knows no task {', '.join(unknown)}; run `lm-eval ls tasks` to list its tasks")
        try:
            # A copy, because lm-eval sets a padding token on its tokenizer. backend="causal", because lm-eval would
            # otherwise guess by a list of families.
            served = HFLM(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                model=served, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"lm-eval stopped on {', '.join(map(str, tasks))}: {error}; tasks fetch their data from the hub, so "
                "check the connection, or give tasks with local data through include_path"
            ) from error
        finally:
            model.train(training)
    return {name: _numbers(metrics) for name, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global generators of random, numpy and torch, which lm-eval seeds."""
    plain, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the state that lm-eval seeds)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)  # noqa: NPY002
