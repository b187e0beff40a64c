"""Fit the law on some sizes and ratios of `runs.csv` and compare its predictions with the runs left out.

Left out of the fit: the largest size, and the mixture with 25 % of the domain text. Beside the law stands what one
would guess without it: the next smaller size's loss, or the straight line between the neighbouring ratios.

    python examples/dcpt_law/check_law.py examples/dcpt_law/runs.csv
"""

import argparse
from pathlib import Path

import numpy as np

from bitquilt.laws import DCPTLaw, Runs, goodness, read_runs

HELD_OUT_SHARE = 0.25  # of the domain


def loss_at(runs: Runs, n: float, d: float, ratio: float) -> float:
    """The measured loss of one point."""
    found = runs.loss[(runs.n == n) & (runs.d == d) & (np.abs(runs.ratio - ratio) < 1e-9)]
    return float(found[0])


def next_smaller_size(runs: Runs, point: tuple[float, float, float]) -> float:
    n, d, ratio = point
    return loss_at(runs, float(runs.n[runs.n < n].max()), d, ratio)


def straight_line(runs: Runs, point: tuple[float, float, float]) -> float:
    n, d, ratio = point
    below, above = (
        float(runs.ratio[runs.ratio < ratio - 1e-9].max()),
        float(runs.ratio[runs.ratio > ratio + 1e-9].min()),
    )
    part = (ratio - below) / (above - below)
    return (1 - part) * loss_at(runs, n, d, below) + part * loss_at(runs, n, d, above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--domain", default="shakespeare")
    parser.add_argument("--starts", type=int, default=60)
    args = parser.parse_args()
    everything = read_runs(args.runs)
    print(
        f"{'loss of':12} {'held out':12} {'points':>6}   {'law: rms':>9} {'largest':>8} {'R2':>7}   {'guess: rms':>10}"
    )
    for name in everything.domains:
        runs = everything.of_domain(name)
        share = HELD_OUT_SHARE if name == args.domain else 1 - HELD_OUT_SHARE
        largest, mixture = runs.n == runs.n.max(), np.abs(runs.ratio - share) < 1e-9
        law = DCPTLaw.fit(runs.where(~(largest | mixture)), starts=args.starts, draws=0)
        for label, mask, guess in (
            ("size", largest & ~mixture, next_smaller_size),
            ("ratio", mixture & ~largest, straight_line),
            ("both", mixture & largest, None),
        ):
            out = runs.where(mask)
            found = goodness(out.loss, law.value(out.n, out.d, out.ratio))
            simple = "-"
            if guess is not None:
                guessed = np.array([guess(runs, tuple(point)) for point in out.x.tolist()])
                simple = f"{goodness(out.loss, guessed).rmse:.4f}"
            print(
                f"{name:12} {label:12} {found.points:6}   {found.rmse:9.4f} {found.max_error:8.4f} {found.r2:7.4f}"
                f"   {simple:>10}"
            )


if __name__ == "__main__":
    main()
