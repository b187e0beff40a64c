"""`most_bytes` bounds the folder of a recipe that gives out its own bits by a rule which needs calibration data.

Which column gets how many bits is then unknown before the run, but the mean is known. The bound is the largest mixture
of the rule's widths within that mean (its linear relaxation), with the largest maps, tables and headers.
"""

import numpy as np

from bitquilt.allocation.path import Ints, steepest
from bitquilt.core.budget import Budget
from bitquilt.core.packing import storage_bits
from bitquilt.planning.planner import Planner
from bitquilt.planning.unit_costs import Units

_RUN = 4  # neighbouring widths that a rule mixes in one layer at most: one below to two above its mean


def most_bytes(planner: Planner, budget: Budget) -> int:
    """Return the most bytes of the folder within `budget`, the recipe's own mean in `bits` or `bpw`."""
    terms, shapes = planner.recipe.plan_terms, planner.shapes
    units = Units(planner.recipe, shapes, palette=terms.own_widths)
    rows, last = np.arange(units.count), len(units.palette) - 1
    blocks = tuple(f"{path}." for path in planner.skeleton.blocks)
    outside = {name for name in shapes if not name.startswith(blocks)}  # they may take the widest
    if budget.kind == "bpw":
        widest = units.layouts(np.full(units.count, last, np.int8))
        bits = budget.value * sum(float(np.prod(shapes[name])) for name in shapes if name not in outside)
        bits += sum(storage_bits(widest[name]) for name in outside)
    else:
        bits = _most_bits(units, budget.value, outside, terms.overshoot) + _lone_channels(units)

    def others(choices: Ints) -> float:
        """Bytes of the folder that are not in `bits`."""
        layouts = units.layouts(choices)
        total = planner.sizes.of(planner.with_outer(layouts)).total
        if budget.kind == "bpw":
            return total - sum(map(storage_bits, layouts.values())) / 8
        return total - float(units.costs[rows, choices].sum(dtype=np.float64)) / 8

    mixtures = [np.zeros_like(rows), np.full_like(rows, last)]
    if terms.scope != "layers":
        mixtures += [low + rows % min(_RUN, last + 1) for low in range(max(1, last + 2 - _RUN))]
    return int(np.ceil(bits / 8 + max(others(choices.astype(np.int8)) for choices in mixtures)))


def _most_bits(units: Units, mean: float, outside: set[str], overshoot: int) -> float:
    """Most bits that units take whose codes have a mean of `mean`; layers `outside` may have the widest codes."""
    nominal, costs = units.nominal().astype(np.float64), units.costs.astype(np.float64)
    allowed = 0.0
    for name, (rows, width) in units.shapes.items():
        allowed += rows * width * (units.palette[-1] if name in outside else mean)
        allowed += rows * min(overshoot, width) * (units.palette[-1] - units.palette[0])
    path = steepest(-costs, nominal)
    steps = min(len(path), path.within(allowed - float(nominal[:, 0].sum())) + 1)  # the last one in part
    return float(costs[:, 0].sum()) + (float(path.gain[steps - 1]) if steps else 0.0)


def _lone_channels(units: Units) -> float:
    """Bits of one channel of each width in each layer, where channels have widths of their own.

    Costs take a channel as one among many; a width that few have pads its rows to bytes and may begin another group.
    """
    if units.group_size % 8 == 0:
        return 0.0
    return sum(float(storage_bits(units.bare(rows, 1, b))) for rows, _ in units.shapes.values() for b in units.palette)
