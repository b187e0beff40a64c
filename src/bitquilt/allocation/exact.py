"""The least loss within a budget, exactly. exact_choices(losses, costs, budget) -> choice per unit, by a mixed-integer
program (HiGHS through scipy): one binary variable per unit and choice, one choice per unit, one budget.

For some thousand variables; `path.fill` is the way beyond, and the fallback where the solver gives up.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitquilt.allocation.path import Floats, Ints, check_losses, fill, steepest

MAX_VARIABLES = 4096  # where the solver's seconds are well spent
_NODES = 500  # not seconds: the same plan on every machine, and after a crash


def exact_choices(losses: Floats, costs: Floats, budget: float) -> Ints:
    """Choices `[units]` minimising the sum of `losses [units, choices]` with the sum of `costs`, shaped alike,
    ascending in each row, within `budget`. The same or better than `path.fill`, which is returned where the solver
    has nothing better after 500 nodes.

    Raises ValueError if a loss is not finite or the cheapest choices together exceed the budget.
    """
    # half a second to import, which only small models need
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    check_losses(losses)
    costs = np.broadcast_to(np.asarray(costs, dtype=np.float64), losses.shape)
    least = float(costs[:, 0].sum())
    if least > budget:
        raise ValueError(f"budget {budget:g} is below {least:g}, the cheapest choice everywhere")
    start = fill(steepest(losses, costs), budget - least)
    units, choices = losses.shape
    rows = np.arange(units)
    flat = losses.astype(np.float64).ravel()
    # in units of the mean: HiGHS has absolute tolerances, losses may be 1e-9 and costs 1e9
    scale, unit = float(np.abs(flat).max()) or 1.0, float(costs.max()) or 1.0
    once: Any = csr_array((np.ones(flat.size), np.arange(flat.size), np.arange(0, flat.size + 1, choices)))
    paid: Any = csr_array(costs.reshape(1, -1) / unit)
    with _no_chatter():
        result = milp(
            flat / scale,
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(paid, -np.inf, budget / unit)],
            bounds=Bounds(0, 1),
            integrality=np.ones(flat.size, dtype=np.int64),
            options={"node_limit": _NODES, "mip_rel_gap": 1e-5, "presolve": False},
        )
    if result.x is None:
        return start
    found = result.x.reshape(units, choices).argmax(axis=1)
    feasible = costs[rows, found].sum() <= budget
    better = losses[rows, found].sum() < losses[rows, start].sum()
    return found.astype(np.int8) if feasible and better else start


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Within the block nothing reaches the process's standard output: HiGHS prints a line of its own there from C++,
    whatever it is told, which would stand in the middle of `--json`."""
    sys.stdout.flush()
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
