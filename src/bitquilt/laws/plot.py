"""Pictures of a law with its points: `draw_law` draws up to four panels into one file.

The fitted surface with the points in the same colours, loss against ratio with the interval, residuals, and the
trade-off curve between general and domain loss. matplotlib is an extra and is imported only when something is drawn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquilt.errors import UserError
from bitquilt.laws.data import Runs
from bitquilt.laws.dcpt import DCPTLaw
from bitquilt.laws.fit import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET = "#222222", "#777777"
COLOURS = ("#b3cde3", "#6baed6", "#2f7fbc", "#08306b")  # sizes, small to large
DrawPanel = Callable[["Axes"], None]


def draw_law(
    law: DCPTLaw, runs: Runs, path: Path, *, domain: str = "", general: tuple[DCPTLaw, Runs] | None = None
) -> None:
    """Draw `law` over the `runs` of its domain into `path` (png, svg or pdf, by its ending).

    `general` adds the trade-off: the law and runs of the general loss, paired by N, D and ratio. Raises UserError
    without matplotlib, or for an ending it cannot write.
    """
    figure = _figure()
    panels: list[DrawPanel] = []
    varied = {axis: len(np.unique(column)) > 1 for axis, column in (("d", runs.d), ("ratio", runs.ratio))}
    if varied["d"] and varied["ratio"]:
        panels.append(lambda axes: _surface(axes, law, runs, domain))
    if varied["ratio"]:
        panels.append(lambda axes: _against_ratio(axes, law, runs))
    panels.append(lambda axes: _residuals(axes, law, runs))
    if general is not None:
        both = general
        panels.append(lambda axes: _trade_off(axes, law, runs, both))
    elif varied["d"]:
        panels.append(lambda axes: _against_tokens(axes, law, runs))
    rows = (len(panels) + 1) // 2
    figure.set_size_inches(11, 4.2 * rows)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, min(2, len(panels)), i + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
        panel(axes)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot draw {path}: {error}; choose a .png, .svg or .pdf in a folder that exists") from None


def _figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib, which is not installed: pip install 'bitquilt[report]'") from None
    return Figure(layout="constrained")


def _surface(axes: "Axes", law: DCPTLaw, runs: Runs, domain: str) -> None:
    """Loss over (ratio, tokens) at the largest size, its points in the colours of the surface."""
    largest = runs.where(runs.n == runs.n.max())
    ratios = np.linspace(runs.ratio.min(), runs.ratio.max(), 201)
    tokens = np.geomspace(runs.d.min(), runs.d.max(), 120)
    r, d = np.meshgrid(ratios, tokens)
    loss = law.value(float(runs.n.max()), d, r)
    # Cut at the 90th percentile: the steep corner at ratio 0 would take up the whole range of colours.
    low, high = float(min(loss.min(), largest.loss.min())), float(np.quantile(largest.loss, 0.9))
    colours: dict[str, Any] = {"cmap": "viridis_r", "vmin": low, "vmax": high}
    mesh = axes.pcolormesh(r, d * 1e9, loss, shading="gouraud", rasterized=True, **colours)
    levels = np.linspace(low, high, 9)[1:-1]
    axes.contour(r, d * 1e9, loss, levels=levels, colors="white", linewidths=0.6, alpha=0.7)
    points: dict[str, Any] = {"s": 46, "edgecolors": "white", "linewidths": 1.2, "zorder": 3, "clip_on": False}
    axes.scatter(largest.ratio, largest.d * 1e9, c=largest.loss, **colours, **points)
    axes.set_yscale("log")
    axes.figure.colorbar(mesh, ax=axes, label="loss, nats per token", extend="max")
    axes.set(xlabel=_share(domain), ylabel="tokens", title=f"Fitted surface, {_count(runs.n.max())} parameters")


def _against_ratio(axes: "Axes", law: DCPTLaw, runs: Runs) -> None:
    """Loss against ratio at the most tokens, a curve for each size, with the interval of the law."""
    d = float(runs.d.max())
    ratios = np.linspace(runs.ratio.min(), runs.ratio.max(), 401)
    for n, colour in _sizes(runs):
        prediction = law.interval(n, d, ratios)
        axes.fill_between(ratios, prediction.low, prediction.high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(ratios, prediction.loss, color=colour, linewidth=1.6, label=_count(n))
        here = runs.where((runs.n == n) & (runs.d == d))
        axes.scatter(here.ratio, here.loss, color=colour, edgecolors=INK, linewidths=0.6, s=26, zorder=3)
    axes.set(xlabel="share of this text in the mixture", ylabel="loss, nats per token")
    axes.set_title(f"Loss and 90 % interval, {_count(d)} tokens")
    axes.legend(title="parameters", frameon=False, fontsize=9)


def _residuals(axes: "Axes", law: DCPTLaw, runs: Runs) -> None:
    """Relative error of every point: a pattern shows what the law misses."""
    predicted = law.value(runs.n, runs.d, runs.ratio)
    percent = 100 * (predicted / runs.loss - 1)
    for n, colour in _sizes(runs):
        mine = runs.n == n
        axes.scatter(runs.ratio[mine], percent[mine], color=colour, edgecolors=INK, linewidths=0.4, s=22)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    middle = float(np.median(np.abs(percent)))
    axes.set(xlabel="share of this text in the mixture", ylabel="predicted / measured - 1, %")
    axes.set_title(f"Residuals: median {middle:.2f} %, largest {np.abs(percent).max():.1f} %")


def _trade_off(axes: "Axes", law: DCPTLaw, runs: Runs, general: tuple[DCPTLaw, Runs]) -> None:
    """General loss against domain loss along the mixture, at the largest size and the most tokens."""
    other, other_runs = general
    n, d = float(runs.n.max()), float(runs.d.max())
    shares = np.linspace(0.0, 1.0, 401)
    axes.plot(law.value(n, d, shares), other.value(n, d, 1 - shares), color=COLOURS[-1], linewidth=1.6)
    here = runs.where((runs.n == n) & (runs.d == d))
    for share, loss in sorted(zip(here.ratio.tolist(), here.loss.tolist(), strict=True)):
        pair = (other_runs.n == n) & (other_runs.d == d) & (np.abs(other_runs.ratio - (1 - share)) < 1e-9)
        if not pair.any():
            continue
        paired = float(other_runs.loss[pair][0])
        axes.scatter(loss, paired, color=COLOURS[-1], edgecolors=INK, s=26, zorder=3)
        axes.annotate(
            f"{share:.0%}", (loss, paired), xytext=(-5, -11), textcoords="offset points", fontsize=9, ha="right"
        )
    axes.margins(0.12)
    axes.set(xlabel="domain loss, nats per token", ylabel="general loss, nats per token")
    axes.set_title("Trade-off, by share of domain text")


def _against_tokens(axes: "Axes", law: DCPTLaw, runs: Runs) -> None:
    """Loss against tokens at the middle ratio, a curve for each size."""
    ratio = float(np.sort(np.unique(runs.ratio))[len(np.unique(runs.ratio)) // 2])
    tokens: Array = np.geomspace(runs.d.min(), runs.d.max(), 200)
    for n, colour in _sizes(runs):
        axes.plot(tokens * 1e9, law.value(n, tokens, ratio), color=colour, linewidth=1.6, label=_count(n))
        here = runs.where((runs.n == n) & (runs.ratio == ratio))
        axes.scatter(here.d * 1e9, here.loss, color=colour, edgecolors=INK, linewidths=0.6, s=26, zorder=3)
    axes.set_xscale("log")
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=f"Loss at a share of {ratio:g}")
    axes.legend(title="parameters", frameon=False, fontsize=9)


def _sizes(runs: Runs) -> list[tuple[float, str]]:
    """(N, colour) of every size, darker for larger."""
    sizes = np.unique(runs.n).tolist()
    places = np.linspace(0, len(COLOURS) - 1, len(sizes)) if len(sizes) > 1 else [len(COLOURS) - 1]
    return [(n, COLOURS[round(float(place))]) for n, place in zip(sizes, places, strict=True)]


def _share(domain: str) -> str:
    return f"share of {domain} in the mixture" if domain else "share of this text in the mixture"


def _count(billions: float) -> str:
    """A count given in 1e9, in words: 388 k, 1.23 M, 1.8 B."""
    for unit, factor in (("B", 1.0), ("M", 1e-3), ("k", 1e-6)):
        if billions >= factor:
            return f"{billions / factor:.3g} {unit}"
    return f"{billions * 1e9:.0f}"
