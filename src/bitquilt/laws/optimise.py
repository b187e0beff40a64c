"""The three uses of the D-CPT Law (arXiv 2406.01375, "usages"): the best mixture, amount of data and size.

    best_ratio(domain, n, d, bound)            lowest domain loss while the general loss keeps its bound
    best_scarce_ratio(domain, n, domain_d)     domain text is scarce: D = D_d / r
    best_under_compute(domain, compute)        size, tokens and ratio for a budget of 6 N D operations

N, D in 1e9; ratios are the DOMAIN's share r_d, and a general law is asked at 1 - r_d. Everything is searched on a
grid and then polished, never solved by a root that may not exist: L_d may rise in r_d, and L_g may fall.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from bitquilt.errors import UserError
from bitquilt.laws.axes import FAR, notes_on
from bitquilt.laws.dcpt import DCPTLaw
from bitquilt.laws.fit import Array

GRID = 1001
FLOPS_PER_UNIT = 6.0 * 1e18  # 6 N D operations, N and D in 1e9
_SMALLEST_RATIO = 1e-4  # where D = D_d / r would be infinite
_ANYWHERE = (1e-4, 1e4)  # sizes searched for a law without a fitted range

Curve = Callable[[Array], Array]


@dataclass(frozen=True)
class GeneralBound:
    """The general loss must stay at or below `limit` (nats per token); `law` is the law of the general loss."""

    law: DCPTLaw
    limit: float

    @staticmethod
    def tolerance(law: DCPTLaw, n: float, d: float, share: float, general_loss: float | None = None) -> "GeneralBound":
        """Bound by (1 + share) times `general_loss`, by default the prediction for general text alone at N, D."""
        start = float(law.value(n, d, 1.0)) if general_loss is None else general_loss
        if share < 0 or start <= 0:
            raise UserError(f"tolerance {share:g} of a general loss {start:g}: wanted at least 0 of a loss above 0")
        return GeneralBound(law, (1 + share) * start)


@dataclass(frozen=True)
class Choice:
    """The chosen mixture: `ratio` is the domain's share. `feasible` is False when no mixture keeps the bound, and the
    choice is then the one with the least domain text; `warnings` name extrapolations and edges."""

    n: float
    d: float
    ratio: float
    domain_loss: float
    general_loss: float | None
    limit: float | None
    feasible: bool
    warnings: tuple[str, ...]


def best_ratio(domain: DCPTLaw, n: float, d: float, bound: GeneralBound | None = None) -> Choice:
    """Use 1, the trade-off: minimise L_d(N, D, r_d) subject to L_g(N, D, 1 - r_d) <= limit.

    Raises UserError for points along an axis that a fit had to drop.
    """
    ratios = np.linspace(0.0, 1.0, GRID)
    ratio, feasible = _search(ratios, lambda r: domain.value(n, d, r), _excess(bound, n, lambda r: np.full_like(r, d)))
    return _choice(domain, n, d, ratio, bound, feasible)


def best_scarce_ratio(
    domain: DCPTLaw, n: float, domain_d: float, bound: GeneralBound | None = None, max_d: float | None = None
) -> Choice:
    """Use 2: only `domain_d` (1e9) domain tokens exist, used once, so D = domain_d / r_d; minimise L_d.

    `max_d` caps D. The closed form for eps = 0 joins the grid. Raises UserError when the cap leaves no ratio.
    """
    if domain_d <= 0 or (max_d is not None and max_d < domain_d):
        raise UserError(f"got {domain_d:g}e9 domain tokens and at most {max_d}e9 in all, wanted 0 < domain <= all")
    lowest = _SMALLEST_RATIO if max_d is None else domain_d / max_d
    ratios = np.union1d(np.linspace(lowest, 1.0, GRID), np.geomspace(lowest, 1.0, GRID))
    closed = scarce_closed_form(domain, domain_d)
    if closed is not None and lowest < closed < 1:
        ratios = np.union1d(ratios, [closed])
    ratio, feasible = _search(
        ratios, lambda r: domain.value(n, domain_d / r, r), _excess(bound, n, lambda r: domain_d / r)
    )
    return _choice(domain, n, domain_d / ratio, ratio, bound, feasible)


def scarce_closed_form(law: DCPTLaw, domain_d: float) -> float | None:
    """[C gamma D_d^beta / (B (eta + beta))]^(1 / (eta + beta + gamma)), capped at 1: exact for eps = 0."""
    if law.B == 0 or law.C == 0 or law.gamma == 0:
        return None
    inner = law.C * law.gamma * domain_d**law.beta / (law.B * (law.eta + law.beta))
    return float(min(1.0, inner ** (1 / (law.eta + law.beta + law.gamma))))


def compute_closed_form(law: DCPTLaw, compute: float, ratio: float) -> float | None:
    """N_opt = G (compute / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B r^eta))^(1 / (alpha + beta)), at a
    fixed ratio; compute in operations, N in 1e9."""
    exponents = law.alpha + law.beta
    tokens = law.beta * law.B * ratio**law.eta
    if law.A == 0 or law.alpha == 0 or tokens == 0:
        return None
    product = compute / FLOPS_PER_UNIT
    return float((law.alpha * law.A / tokens) ** (1 / exponents) * product ** (law.beta / exponents))


def best_under_compute(
    domain: DCPTLaw,
    compute: float,
    bound: GeneralBound | None = None,
    *,
    ratio: float | None = None,
    extrapolate: bool = False,
) -> Choice:
    """Use 3: the best (N, D, r_d) with 6 N D = `compute` operations; `ratio` fixes r_d.

    N and D stay within twice the fitted range unless `extrapolate`. Raises UserError when the budget lies outside it.
    """
    product = compute / FLOPS_PER_UNIT
    low, high = _sizes(domain, product, extrapolate)
    ratios = np.linspace(0.0, 1.0, GRID) if ratio is None else np.array([ratio])

    def inner(log_n: float) -> tuple[float, float, bool]:
        n = float(np.exp(log_n))
        d = product / n
        best, feasible = _search(
            ratios, lambda r: domain.value(n, d, r), _excess(bound, n, lambda r: np.full_like(r, d))
        )
        # An infeasible size loses against every feasible one.
        return float(domain.value(n, d, best)) + (0.0 if feasible else 1e6), best, feasible

    logs = np.linspace(np.log(low), np.log(high), 81)
    closed = compute_closed_form(domain, compute, 0.5 if ratio is None else ratio)
    if closed is not None and low < closed < high:
        logs = np.union1d(logs, [np.log(closed)])
    losses = np.array([inner(log_n)[0] for log_n in logs])
    at = int(losses.argmin())
    left, right = logs[max(at - 1, 0)], logs[min(at + 1, len(logs) - 1)]
    best_log = float(logs[at])
    if right > left:
        polished = minimize_scalar(
            lambda v: inner(float(v))[0], bounds=(left, right), method="bounded", options={"xatol": 1e-9}
        )
        best_log = float(polished.x) if polished.fun < losses[at] else best_log
    _, best, feasible = inner(best_log)
    n = float(np.exp(best_log))
    choice = _choice(domain, n, product / n, best, bound, feasible)
    if not extrapolate and domain.report and min(n / low, high / n) < 1.01:
        note = "the best size is at the edge of the supported range, twice the fitted one; measure more sizes"
        return replace(choice, warnings=(*choice.warnings, note))
    return choice


def _sizes(law: DCPTLaw, product: float, extrapolate: bool) -> tuple[float, float]:
    """The range of N (1e9) to search: any, or where N and D = product / N are near the fitted ranges."""
    if product <= 0:
        raise UserError(f"the compute budget is {product * FLOPS_PER_UNIT:g} operations, wanted a number above 0")
    if law.report is None or extrapolate:
        return _ANYWHERE
    if "n" in law.report.dropped or "d" in law.report.dropped:
        raise UserError(
            "the best size under a compute budget needs a law fitted on several N and several D: "
            f"{' '.join(law.report.warnings)}; fit runs that vary both"
        )
    (low_n, high_n), (low_d, high_d) = law.report.ranges["n"], law.report.ranges["d"]
    low = max(low_n / FAR, product / (high_d * FAR))
    high = min(high_n * FAR, product / (low_d / FAR))
    if low > high:
        smallest, largest = (v * FLOPS_PER_UNIT for v in (low_n * low_d / FAR**2, high_n * high_d * FAR**2))
        raise UserError(
            f"the budget of {product * FLOPS_PER_UNIT:.3g} operations is outside the fitted runs: wanted "
            f"{smallest:.3g} to {largest:.3g}; measure larger runs, or pass --extrapolate (extrapolate=True)"
        )
    return low, high


def _excess(bound: GeneralBound | None, n: float, tokens: Curve) -> Curve | None:
    """General loss minus its limit as a function of the domain's share."""
    if bound is None:
        return None
    return lambda r: bound.law.value(n, tokens(r), 1.0 - r) - bound.limit


def _search(ratios: Array, loss: Curve, excess: Curve | None) -> tuple[float, bool]:
    """The ratio of the lowest loss where excess <= 0, and whether there is one: grid, then edge, then minimum."""
    losses = loss(ratios)
    allowed = np.ones(len(ratios), dtype=bool) if excess is None else excess(ratios) <= 0
    if not allowed.any():
        return float(ratios[0]), False
    at = int(np.where(allowed, losses, np.inf).argmin())
    centre = float(ratios[at])
    ends = []
    for neighbour in (max(at - 1, 0), min(at + 1, len(ratios) - 1)):
        end = float(ratios[neighbour])
        if excess is not None and not allowed[neighbour]:
            end = _edge(excess, centre, end)
        ends.append(end)
    candidates = [centre, *ends]
    if ends[1] > ends[0]:
        polished = minimize_scalar(
            lambda r: float(loss(np.array([r]))[0]),
            bounds=(ends[0], ends[1]),
            method="bounded",
            options={"xatol": 1e-10},
        )
        candidates.append(float(polished.x))
    values = loss(np.array(candidates))
    return candidates[int(values.argmin())], True


def _edge(excess: Curve, inside: float, outside: float) -> float:
    """The last ratio between `inside` and `outside` that keeps the bound."""

    def at(r: float) -> float:
        return float(excess(np.array([r]))[0])

    if at(inside) == 0:
        return inside
    root = float(brentq(at, inside, outside, xtol=1e-12))
    for step in (0.0, 1e-12, 1e-11, 1e-10):  # the root may be a rounding error beyond the bound
        candidate = root + step * (inside - outside) / abs(inside - outside)
        if at(candidate) <= 0:
            return candidate
    return inside


def _choice(domain: DCPTLaw, n: float, d: float, ratio: float, bound: GeneralBound | None, feasible: bool) -> Choice:
    """The chosen point with the losses and warnings of both laws. Raises UserError along a dropped axis."""
    notes = []
    for law, share, name in ((domain, ratio, "domain"), (bound.law if bound else None, 1 - ratio, "general")):
        if law is None or law.report is None:
            continue
        if "ratio" in law.report.dropped:
            raise UserError(f"the {name} law was fitted on one ratio and cannot choose another; fit several ratios")
        questions = notes_on(law.report, n=np.array([n]), d=np.array([d]), ratio=np.array([share]))
        far = [f"{name} law: {note}" for note in questions]
        if far:
            far[-1] += f"; the best starts differ by {law.interval(n, d, share).spread.item():.4f} nats there"
        notes += far
    general = None if bound is None else float(bound.law.value(n, d, 1 - ratio))
    if bound is not None and not feasible:
        notes.append(
            f"no mixture keeps the general loss at or below {bound.limit:.4f}: it is {general:.4f} at ratio {ratio:g}"
        )
    return Choice(
        n=n,
        d=d,
        ratio=ratio,
        domain_loss=float(domain.value(n, d, ratio)),
        general_loss=general,
        limit=bound.limit if bound else None,
        feasible=feasible,
        warnings=tuple(notes),
    )
