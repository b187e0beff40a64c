"""Pictures show exactly the given bits, and stay small."""

import random
import re

import pytest

from bitquilt.report.bitmap import UNIT, columns_for, picture


def area(path: str) -> float:
    """The area under a path of M, v, V, h, H, z above the base line: shoelace over its corners."""
    total = 0.0
    for part in filter(None, path.split("z")):
        x = y = 0.0
        corners = []
        for command, numbers in re.findall(r"([MvVhH])([-\d. ]+)", part):
            values = [float(v) for v in numbers.split()]
            if command == "M":
                x, y = values
            elif command == "v":
                y += values[0]
            elif command == "V":
                y = values[0]
            elif command == "h":
                x += values[0]
            else:
                x = values[0]
            corners.append((x, y))
        pairs = zip(corners, corners[1:] + corners[:1], strict=True)
        total += abs(sum(a * d - b * c for (a, b), (c, d) in pairs)) / 2
    return total


def test_few_runs_are_drawn_exactly() -> None:
    width, paths = picture([(2, 64), (3, 32), (2, 32), (1, 7)], 160)
    assert width == 135
    assert dict(paths) == {
        1: f"M128 0v-{UNIT}h7V0z",
        2: f"M0 0v-{2 * UNIT}h64V0zM96 0v-{2 * UNIT}h32V0z",
        3: f"M64 0v-{3 * UNIT}h32V0z",
    }


def test_neighbours_of_equal_bits_are_one() -> None:
    assert picture([(2, 8)] * 1000, 24) == (8000, [(2, f"M0 0v-{2 * UNIT}h8000V0z")])


@pytest.mark.parametrize("columns", [24, 100, 160])
def test_many_runs_keep_the_area_of_each_width(columns: int) -> None:
    chance = random.Random(0)
    runs = [(chance.choice([2, 2, 2, 3, 5]), 1) for _ in range(11008)]
    width, paths = picture(runs, columns)
    assert width == columns
    assert [bits for bits, _ in paths] == [2, 3, 5]  # painted over each other, the most bits last
    skylines = [area(path) for _, path in paths]
    for (bits, _), mine, above in zip(paths, skylines, [*skylines[1:], 0.0], strict=True):
        wanted = UNIT * bits * sum(b == bits for b, _ in runs) / len(runs)
        assert (mine - above) / columns == pytest.approx(wanted, abs=0.1)  # heights are whole units


def test_pictures_of_a_large_model_stay_within_their_budget() -> None:
    chance = random.Random(1)
    layers = [[(chance.choice([2, 3, 4]), 1) for _ in range(2048)] for _ in range(560)]
    columns = columns_for(layers)
    sample = [picture(layer, columns) for layer in layers[:20]]
    drawn = sum(len(path) for _, paths in sample for _, path in paths) * len(layers) / len(sample)
    assert columns >= 100
    assert drawn < 1_700_000
    assert columns_for([[(2, 8)]]) == 160
    assert columns_for(layers * 40) == 24
