"""Plots as plain SVG: `front_plot` draws quality against size, `scatter` two losses, `error_lines` errors by block.

Colours come from the page's style by class, so they follow light, dark and print. Marks also differ by shape and
filling. Plots are drawn for a width and never scaled, so their text is as large as the page's.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from bitquilt.core.units import size_text
from bitquilt.report.chart_axes import PlotAxis
from bitquilt.report.pareto import Panel

_POLYGONS = {"square": (4, 45), "triangle": (3, 0), "diamond": (4, 0), "down": (3, 180), "hexagon": (6, 0)}
_SHAPES = ("circle", *_POLYGONS)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 26, 40  # pixels around the axes

_LEAST_SPAN = 0.05  # share of the size: checkpoints of nearly the same size stand above each other


def shapes(panel: Panel) -> dict[str, str]:
    """A mark's shape for each recipe; with more recipes than shapes the last ones share one."""
    names = sorted({entry.recipe for entry in panel.entries})
    return {name: _SHAPES[min(i, len(_SHAPES) - 1)] for i, name in enumerate(names)}


def front_plot(panel: Panel, width: int, height: int = 340) -> Markup:
    """Plot quality (down is better) against size. Filled marks and a staircase show the front."""
    drawn = [(e, value) for e in panel.entries if (value := getattr(e, panel.metric)) is not None]
    if not drawn:
        return Markup("")
    x = PlotAxis.around([float(e.bytes) for e, _ in drawn], width - _LEFT - _RIGHT, span=_LEAST_SPAN)
    y = PlotAxis.around([value for _, value in drawn], height - _TOP - _BOTTOM, log=True, flip=True)
    places = [(x.place(e.bytes), y.place(value)) for e, value in drawn]
    front = sorted(place for place, (e, _) in zip(places, drawn, strict=True) if e.front)
    parts = [_frame(x, y, "size on disk", _metric(panel), size_text)]
    if front:
        stairs = "".join(f"H{a}V{b}" for a, b in front[1:])
        parts.append(Markup('<path class="front" d="M{} {}{}"/>').format(*front[0], Markup(stairs)))
    kinds = shapes(panel)
    for (entry, _), (a, b) in zip(drawn, places, strict=True):
        parts.append(mark(kinds[entry.recipe], a, b, filled=entry.front))
    for (entry, _), (a, b) in zip(drawn, _labels(places, x.pixels, y.pixels), strict=True):
        parts.append(Markup('<text class="key" x="{}" y="{}">{}</text>').format(a, b, entry.key))
    return _svg(width, height, f"{_metric(panel)} against size of {len(drawn)} checkpoints", parts)


def scatter(points: Sequence[tuple[float, float]], width: int, titles: tuple[str, str], height: int = 300) -> Markup:
    """Plot (x, y) on logarithmic axes if all are positive. Only the ranks matter, so no line is drawn."""
    x = PlotAxis.around([a for a, _ in points], width - _LEFT - _RIGHT, log=True)
    y = PlotAxis.around([b for _, b in points], height - _TOP - _BOTTOM, log=True, flip=True)
    dots = [mark("circle", x.place(a), y.place(b), filled=True, radius=2.6) for a, b in points]
    return _svg(width, height, f"{titles[1]} against {titles[0]}", [_frame(x, y, *titles, _short), *dots])


def error_lines(values: Sequence[tuple[int, float]], y: PlotAxis, blocks: int, title: str, width: int = 162) -> Markup:
    """Plot (block, error) of one kind of layer from the first block to the last, on an axis shared with other kinds."""
    x = PlotAxis(-0.5, blocks - 0.5, width - 44)
    places = [(x.place(block), y.place(value)) for block, value in values]
    height = int(y.pixels)
    grid = [
        Markup(
            '<path class="grid" d="M0 {0}H{1}"/><text class="tick" x="-4" y="{2}" text-anchor="end">{3}</text>'
        ).format(y.place(tick), x.pixels, y.place(tick) + 3, _short(tick))
        for tick in y.ticks(3)
    ]
    line = "M" + "L".join(f"{a} {b}" for a, b in places)
    parts = [*grid, Markup('<path class="line" d="{}"/>').format(line)]
    if len(places) <= 40:
        parts += [mark("circle", a, b, filled=True, radius=2.2) for a, b in places]
    for at, anchor in ((0, "start"), (blocks - 1, "end")):
        end = 0 if anchor == "start" else x.pixels
        text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
        parts.append(text.format(end, height + 12, anchor, at))
    body = Markup("").join(parts)
    return Markup(
        '<svg width="{0}" height="{1}" viewBox="-40 -6 {0} {1}" role="img" aria-label="{2}">{3}</svg>'
    ).format(width, height + 22, f"error of {title} by block, {len(values)} values", body)


def mark(shape: str, x: float, y: float, *, filled: bool, radius: float = 5.5) -> Markup:
    """One mark, filled or hollow."""
    r, style = radius, "mark" if filled else "mark hollow"
    if shape == "circle":
        outline = f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    else:
        corners, turn = _POLYGONS[shape]
        angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
        outline = "M" + "L".join(f"{1.25 * r * math.sin(a):.1f} {-1.25 * r * math.cos(a):.1f}" for a in angles) + "z"
    return Markup('<path class="{}" transform="translate({} {})" d="{}"/>').format(style, x, y, outline)


def _frame(x: PlotAxis, y: PlotAxis, x_title: str, y_title: str, x_text: object) -> Markup:
    say = x_text if callable(x_text) else _short
    parts = []
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(Markup('<path class="grid" d="M0 {}H{}"/>').format(at, x.pixels))
        parts.append(
            Markup('<text class="tick" x="-6" y="{}" text-anchor="end">{}</text>').format(at + 4, _short(tick))
        )
    for tick in x.ticks(max(3, round(x.pixels / 110))):
        at = x.place(tick)
        parts.append(Markup('<path class="grid" d="M{} {}v5"/>').format(at, y.pixels))
        text = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(text.format(at, y.pixels + 18, say(tick)))
    parts.append(Markup('<path class="axis" d="M0 {}H{}"/>').format(y.pixels, x.pixels))
    title = Markup('<text class="title" x="{}" y="{}" text-anchor="{}">{}</text>')
    parts.append(title.format(x.pixels, y.pixels + 35, "end", x_title))
    parts.append(title.format(2 - _LEFT, 14 - _TOP, "start", y_title))
    return Markup("").join(parts)


def _svg(width: int, height: int, label: str, parts: Sequence[Markup]) -> Markup:
    frame = Markup('<svg width="{0}" height="{1}" viewBox="{2} {3} {0} {1}" role="img" aria-label="{4}">{5}</svg>')
    return frame.format(width, height + 10, -_LEFT, -_TOP - 2, escape(label), Markup("").join(parts))


def _labels(places: Sequence[tuple[float, float]], width: float, height: float) -> list[tuple[float, float]]:
    """Place each mark's key: the first of eight spots around the mark that no other mark or key has taken."""
    taken = [(a, b) for a, b in places]
    found = []
    for a, b in places:
        around = [(9, -7), (9, 13), (-17, -7), (-17, 13), (11, 4), (-20, 4), (-4, -11), (-4, 20)]
        spots = [(round(a + dx, 1), round(b + dy, 1)) for dx, dy in around]
        inside = [(p, q) for p, q in spots if 0 <= p <= width - 10 and 6 <= q <= height + 6] or spots

        def room(spot: tuple[float, float]) -> float:
            middle = (spot[0] + 4, spot[1] - 4)
            return min(abs(middle[0] - p) + abs(middle[1] - q) for p, q in taken)

        best = next((spot for spot in inside if room(spot) >= 13), max(inside, key=room))
        taken.append((best[0] + 4, best[1] - 4))
        found.append(best)
    return found


def _metric(panel: Panel) -> str:
    return "KL, nats per token" if panel.metric == "kl_mean" else "perplexity"


def _short(value: float) -> str:
    """0.0001 -> 1e-4; 0.25 -> 0.25."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"
