"""Bad tables are refused with the row and the reason; good ones keep their meaning."""

from pathlib import Path

import numpy as np
import pytest

from bitquilt.errors import UserError
from bitquilt.laws import Runs, read_points, read_runs

HEADER = "n_params,n_tokens,ratio,loss\n"
GOOD = "1000000000,2000000000,0.5,2.5\n1000000000,2000000000,0.7,2.4\n1e9,2e9,0.8,2.35\n1e9,2e9,1,2.3\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text)
    return path


def test_units_and_defaults(tmp_path: Path) -> None:
    runs = read_runs(written(tmp_path, "\ufeff" + HEADER + GOOD))
    assert runs.n.tolist() == [1.0] * 4
    assert runs.d.tolist() == [2.0] * 4
    assert runs.domains == ("all",)
    assert runs.loss.tolist() == [2.5, 2.4, 2.35, 2.3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: wanted a header"),
        (HEADER, "a header and no rows"),
        ("n_params,ratio\n1,0.5\n", "lacks the columns n_tokens, loss: got n_params, ratio"),
        ("n_params;n_tokens;ratio;loss\n1;1;1;1\n", "separated by commas"),
        (HEADER + GOOD + "1e9,2e9,0.5\n", r"line 6: got 3 cells, wanted 4"),
        (HEADER + GOOD + "1e9,3e9,0.5,0\n", r"line 6 \(row 5\): loss is 0, wanted a loss above 0"),
        (HEADER + GOOD + "1e9,3e9,0.5,-2\n", r"line 6 \(row 5\): loss is -2"),
        (
            HEADER + GOOD + "1e9,3e9,50,2\n",
            r"line 6 \(row 5\): ratio is 50, .* a percentage\? divide the column by 100",
        ),
        (HEADER + GOOD + "1e9,3e9,-0.1,2\n", r"line 6 \(row 5\): ratio is -0.1, wanted a share between 0 and 1"),
        (HEADER + GOOD + "1e9,3e9,0.5,nan\n", r"line 6 \(row 5\): loss is nan, wanted a finite number"),
        (HEADER + GOOD + "1e9,inf,0.5,2\n", r"line 6 \(row 5\): n_tokens is inf"),
        (HEADER + GOOD + "1e9,3e9,half,2\n", r"line 6 \(row 5\): ratio is 'half', wanted a number"),
        (HEADER + GOOD + "1e9,,0.5,2\n", r"line 6 \(row 5\): n_tokens is ''"),
        (HEADER + GOOD + "1e9,0,0.5,2\n", r"n_tokens is 0, .* leave out the evaluation before training"),
        (HEADER + GOOD + "0,1e9,0.5,2\n", r"n_params is 0, wanted a count above 0"),
        (HEADER + GOOD + "1e9,2e9,0.5,2.6\n", r"line 6 \(row 5\) repeats .* line 2 \(row 1\) with another loss"),
        (HEADER + "1e9,2e9,0.5,2.5\n1e9,2e9,1,2\n", "too few rows: got 2, wanted at least 4"),
        ("domain," + HEADER + "".join(f",{line}\n" for line in GOOD.splitlines()), r"row 1\): the domain is empty"),
    ],
)
def test_bad_tables_name_the_row_and_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_runs(written(tmp_path, text))


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.csv"):
        read_runs(tmp_path / "nowhere.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="cannot read"):
        read_runs(tmp_path / "x.csv")


def test_blank_lines_are_skipped_and_lines_still_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 8 \(row 5\): ratio is 3"):
        read_runs(written(tmp_path, HEADER + "\n" + GOOD + "\n1e9,3e9,3,2\n"))


def test_equal_duplicates_and_equal_points_of_other_domains_pass(tmp_path: Path) -> None:
    again = HEADER + GOOD + GOOD.splitlines()[0] + "\n"
    assert len(read_runs(written(tmp_path, again))) == 5
    Runs.of([1, 1], [1, 1], [0.5, 0.5], [2, 3], ["code", "law"])


def test_columns_from_python_are_checked_alike() -> None:
    with pytest.raises(UserError, match="row 2: ratio is 20"):
        Runs.of([1, 1], [1, 1], [0.2, 20], [2, 2])
    with pytest.raises(UserError, match="not equally long"):
        Runs.of([1, 1], [1], [0.2, 0.3], [2, 2])


def test_points_need_no_loss(tmp_path: Path) -> None:
    points = read_points(written(tmp_path, "n_params,n_tokens,ratio\n1e9,2e9,0.5\n"))
    assert np.isnan(points.loss).all()
    with pytest.raises(UserError, match="lacks the column n_tokens"):
        read_points(written(tmp_path, "n_params,ratio\n1e9,0.5\n"))


def test_the_hash_is_of_the_values() -> None:
    runs = Runs.of([1, 2], [1, 1], [0, 1], [2, 3])
    assert runs.sha256 == runs.where(np.array([1, 0])).sha256
    assert runs.sha256 != Runs.of([1, 2], [1, 1], [0, 1], [2, 3.001]).sha256
    assert runs.sha256 != Runs.of([1, 2], [1, 1], [0, 1], [2, 3], "code").sha256


def test_the_decaying_sample_keeps_ends_and_spreads_out() -> None:
    tokens = np.arange(1.0, 21.0)
    runs = Runs.of([1.0] * 20 + [2.0] * 5, [*tokens, *tokens[:5]], [0.5] * 25, np.linspace(3, 2, 25))
    kept = runs.decaying_sample(8)
    long = kept.d[kept.n == 1]
    assert (long[0], long[-1]) == (1.0, 20.0)
    assert len(long) <= 8
    assert np.diff(long)[-1] > 3 * np.diff(long)[0]
    assert (kept.n == 2).sum() == 5
