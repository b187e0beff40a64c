"""SliM-LLM's constraint set over the whole model: paired(choices, ...) -> choices, every layer's mean untouched.

In every layer the p groups that lose least give one bit each to the p that lose most (arXiv 2405.14917, section 3.2);
p from 0 to half of the groups. The publication ranks groups by salience and tries p at the layer's output; here both
are the tables that the other scopes use, so that only the constraint differs. numpy only, no tensors.
"""

from collections.abc import Sequence

import numpy as np

from bitquilt.allocation.path import Floats, Ints


def paired(choices: Ints, losses: Floats, costs: Floats, members: Sequence[Ints]) -> Ints:
    """`choices` `[units]`, `losses`, `costs` `[units, widths]`; `members[l]`: the units of layer l. The p of least loss
    that costs no more; the smallest wins a tie."""
    found = choices.copy()
    for units in members:
        low, high = _ranked(units, choices, losses)
        here, there = choices[low], choices[high]
        room = (here > 0) & (there < losses.shape[1] - 1)
        last = len(room) if room.all() else int(room.argmin())
        low, high, here, there = low[:last], high[:last], here[:last], there[:last]
        change = losses[low, here - 1] - losses[low, here] + losses[high, there + 1] - losses[high, there]
        price = costs[low, here - 1] - costs[low, here] + costs[high, there + 1] - costs[high, there]
        total = np.concatenate([[0.0], np.cumsum(change, dtype=np.float64)])
        total[1:][np.cumsum(price, dtype=np.float64) > 0] = np.inf
        count = int(total.argmin())
        found[low[:count]] -= 1
        found[high[:count]] += 1
    return found


def _ranked(units: Ints, choices: Ints, losses: Floats) -> tuple[Ints, Ints]:
    """The units that lose least, and those that lose most, each from the outside in."""
    order = units[np.argsort(losses[units, choices[units]], kind="stable")]
    half = len(units) // 2
    return order[:half], order[::-1][:half]
