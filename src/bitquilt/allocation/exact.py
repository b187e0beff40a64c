"""The exact optimum: `exact_choices` solves one choice per unit within a budget as a mixed-integer program.

HiGHS (through scipy) solves it: one binary variable per unit and choice. Beyond some thousand variables, and where the
solver gives up, the answer is that of `path.fill`. Where costs are small whole numbers, `knapsack.least_error` is exact
without a gap and has a rule for ties.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitquilt.allocation.path import Floats, Ints, check_losses, fill, steepest

MAX_VARIABLES = 4096  # up to here the solver's seconds are well spent
_NODES = 500  # a limit in nodes, not seconds: the same plan on every machine, and after a crash


def exact_choices(losses: Floats, costs: Floats, budget: float) -> Ints:
    """Return choices `[units]` with the least summed loss whose summed cost is within `budget`.

    `losses` and `costs` are `[units, choices]`; costs ascend in each row. The result is never worse than that of
    `path.fill`, which is returned beyond `MAX_VARIABLES` and where 500 nodes of the solver find nothing better.

    Raises ValueError if a loss is not finite or the cheapest choices together exceed the budget.
    """
    check_losses(losses)
    costs = np.broadcast_to(np.asarray(costs, dtype=np.float64), losses.shape)
    least = float(costs[:, 0].sum())
    if least > budget:
        raise ValueError(f"budget {budget:g} is below {least:g}, the cheapest choice everywhere")
    start = fill(steepest(losses, costs), budget - least)
    if losses.size > MAX_VARIABLES:
        return start
    found = _solve(losses, costs, budget)
    rows = np.arange(len(losses))
    if found is None or costs[rows, found].sum() > budget:
        return start
    better = losses[rows, found].sum() < losses[rows, start].sum()
    return found.astype(np.int8) if better else start


def _solve(losses: Floats, costs: Floats, budget: float) -> Ints | None:
    # half a second to import, which only small models need
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    units, choices = losses.shape
    flat = losses.astype(np.float64).ravel()
    # HiGHS has absolute tolerances, but losses may be 1e-9 and costs 1e9: scale both
    scale, unit = float(np.abs(flat).max()) or 1.0, float(costs.max()) or 1.0
    once: Any = csr_array((np.ones(flat.size), np.arange(flat.size), np.arange(0, flat.size + 1, choices)))
    paid: Any = csr_array(costs.reshape(1, -1) / unit)
    with _silent_stdout():
        result = milp(
            flat / scale,
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(paid, -np.inf, budget / unit)],
            bounds=Bounds(0, 1),
            integrality=np.ones(flat.size, dtype=np.int64),
            options={"node_limit": _NODES, "mip_rel_gap": 1e-5, "presolve": False},
        )
    if result.x is None:
        return None
    chosen: Ints = result.x.reshape(units, choices).argmax(axis=1)
    return chosen


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep standard output empty: HiGHS always prints a line there from C++, which would break `--json`."""
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
