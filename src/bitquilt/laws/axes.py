"""The axes of the data: `identify` says which terms of a law they support, `notes_on` which questions they do not.

A term without variation in the data is dropped and its value merged into E (no variation in N, or in r) or into B
(none in D); predictions along that axis are then refused instead of invented.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitquilt.errors import UserError
from bitquilt.laws.data import Runs
from bitquilt.laws.fit import Array
from bitquilt.laws.summary import FitReport

LABELS = {"n": "N (n_params, in 1e9)", "d": "D (n_tokens, in 1e9)", "ratio": "ratio"}
FAR = 2.0  # times the largest, or below half the smallest, fitted N or D
_SAME = 1e-6


class LawWarning(UserWarning):
    """A prediction that the data hardly support: an extrapolation, or a parameter that nothing identifies."""


@dataclass(frozen=True)
class Axes:
    """`free` parameters of the D-CPT form, fitted `ranges` (low, high) of n, d, ratio, the constant value of every
    `dropped` axis, and one sentence for each parameter that the data cannot identify."""

    free: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]]
    dropped: Mapping[str, float]
    warnings: tuple[str, ...]


def identify(runs: Runs) -> Axes:
    """Find the axes of the runs of one domain. Raises UserError when neither N nor D nor the ratio varies."""
    values = {"n": runs.n, "d": runs.d, "ratio": runs.ratio}
    ranges = {axis: (float(column.min()), float(column.max())) for axis, column in values.items()}
    dropped = {axis: low for axis, (low, high) in ranges.items() if high - low <= _SAME * high}
    if len(dropped) == 3:
        raise UserError(
            f"nothing varies in the {len(runs)} points: got one N, one D and one ratio, wanted at least one of "
            "them to differ between rows; there is no law to fit"
        )
    free = ["E"]
    free += [] if "n" in dropped else ["A", "alpha"]
    free += [] if "d" in dropped and "ratio" in dropped else ["B"]
    free += [] if "d" in dropped else ["beta"]
    free += [] if "ratio" in dropped else ["eta", "C", "eps", "gamma"]
    return Axes(tuple(free), ranges, dropped, tuple(_doubts(runs, dropped, len(free))))


def _doubts(runs: Runs, dropped: Mapping[str, float], free: int) -> list[str]:
    """One sentence for each parameter that the points cannot identify."""
    said = []
    if "n" in dropped:
        said.append(
            f"all points have N = {dropped['n']:g}e9: A and alpha cannot be identified, their term is merged into "
            "E, and other sizes are refused"
        )
    elif (sizes := _distinct(runs.n)) < 3:
        said.append(f"{sizes} model sizes, wanted at least 3: alpha (and with it A) cannot be told from E")
    if "d" in dropped:
        said.append(
            f"all points have D = {dropped['d']:g}e9: beta cannot be identified, D^-beta is merged into B, and other "
            "token counts are refused"
        )
    elif (tokens := _distinct(runs.d)) < 3:
        said.append(f"{tokens} token counts, wanted at least 3: beta (and with it B) cannot be told from E")
    if "ratio" in dropped:
        said.append(
            f"all points have ratio {dropped['ratio']:g}: eta, C, eps and gamma cannot be identified, their terms "
            "are merged into B and E, and other ratios are refused"
        )
    elif (ratios := _distinct(runs.ratio)) < 4:
        said.append(f"{ratios} ratios, wanted at least 4: eta, C, eps and gamma cannot be told apart")
    if len(runs) < free:
        said.append(
            f"{len(runs)} points for {free} free parameters: no parameter is identified; trust the spread, not "
            "the value"
        )
    return said


def _distinct(column: Array) -> int:
    """The number of values that differ by more than rounding."""
    return 1 + int(np.sum(np.diff(np.sort(column)) > _SAME * column.max()))


def notes_on(report: FitReport | None, **point: Array) -> list[str]:
    """One sentence for each axis, such as `n`, on which some point is far outside the fitted range.

    Raises UserError for points off an axis that the data did not vary.
    """
    if report is None:
        return []
    for axis, value in report.dropped.items():
        off = np.abs(point[axis] - value) > 1e-3 * max(abs(value), _SAME)
        if off.any():
            raise UserError(
                f"the law knows one {LABELS[axis]} only: got {point[axis][off][0]:g}, wanted {value:g}, the value of "
                "every fitted point; fit runs that vary it"
            )
    said = []
    for axis, column in point.items():
        low, high = report.ranges[axis]
        reach = (low / FAR, high * FAR) if axis != "ratio" else (low - 0.01, high + 0.01)
        far = (column < reach[0]) | (column > reach[1])
        if far.any():
            lowest, highest = float(column[far].min()), float(column[far].max())
            asked = f"{lowest:.4g}" if lowest == highest else f"{lowest:.4g} to {highest:.4g}"
            many = f"{int(far.sum())} of {far.size} points extrapolate" if far.size > 1 else "extrapolates"
            said.append(f"{many} in {LABELS[axis]}: asked {asked}, fitted on {low:.4g} to {high:.4g}")
    return said
