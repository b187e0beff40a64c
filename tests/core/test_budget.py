"""Budgets: one value, units as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquilt.core.budget import Budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6.5GiB", 6979321856),
        ("6.5 gib", 6979321856),
        ("800MB", 800_000_000),
        ("1kB", 1000),
        ("1KiB", 1024),
        (".5TiB", 2**39),
        ("123", 123),
        (123, 123),
        ("7B", 7),
        (1e9, 10**9),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "6.5 bananas", "1,5GB", "nan", "6.5GiBB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"wanted such as 6\.5GiB"):
        parse_bytes(text)


@given(st.integers(1, 10**15))
def test_whole_bytes_survive(count):
    assert parse_bytes(str(count)) == count == Budget.of(size=count).value


def test_one_budget_a_run():
    assert Budget.of() is None
    assert Budget.of(bpw=2.5) == Budget("bpw", 2.5)
    assert Budget.of(vram="8GiB", ctx=8192) == Budget("vram", 8 * 2**30, 8192)
    for given_, message in [
        ({"bits": 3, "bpw": 3.5}, "bits and bpw are budgets"),
        ({"size": "1GB", "vram": "1GB", "ctx": 1}, "size and vram"),
        ({"vram": "1GB"}, "vram needs ctx"),
        ({"size": "1GB", "ctx": 8}, "goes with vram"),
        ({"bpw": float("nan")}, "wanted a number above 0"),
        ({"size": 0}, "wanted a number above 0"),
        ({"vram": 1, "ctx": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Budget.of(**given_)
