"""Values are placed where they belong, and ticks are round and inside."""

import pytest

from bitquilt.report.chart_axes import PlotAxis


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([0.001, 3.0], True),
        ([0.11, 0.12], True),
        ([5.0], True),
        ([0.0, 1.0], True),
        ([3.6e6, 4.3e6], False),
        ([0.0], False),
    ],
)
def test_ticks_and_places(values: list[float], log: bool) -> None:
    axis = PlotAxis.around(values, 300, log=log)
    assert all(0 < axis.place(value) < 300 for value in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert all(0 <= axis.place(tick) <= 300 for tick in ticks)
    assert axis.log == (log and values == [0.001, 3.0])


def test_flipped_the_largest_is_on_top() -> None:
    axis = PlotAxis.around([1.0, 100.0], 300, log=True, flip=True)
    assert axis.place(100) < axis.place(10) < axis.place(1)
    assert axis.place(10) == pytest.approx(150)


def test_a_trifle_is_not_made_large() -> None:
    axis = PlotAxis.around([1000.0, 1001.0], 300, span=0.05)
    assert 0 < axis.place(1001) - axis.place(1000) < 10
    assert axis.place(1000.5) == pytest.approx(150)
