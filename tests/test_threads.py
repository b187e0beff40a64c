"""Loops over small matrices run on one thread, whatever the pools are set to; idle threads do not spin for long."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import bitquilt.cli.app  # noqa: F401
from bitquilt.allocation import graph_network
from bitquilt.laws import fit
from bitquilt.laws.bootstrap import bootstrap
from bitquilt.laws.formula import NAMES, form
from bitquilt.threads import one_thread, sleep_at_barriers
from tests.laws.published import TRUE_LAW


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture
def two_threads():
    """Pools of two threads, as on a user's machine; the other tests have one."""
    torch.set_num_threads(2)
    with threadpool_limits(limits=2, user_api="blas"):
        yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_a_law_is_fitted_and_refitted_on_one_thread() -> None:
    calls: list[int] = []
    seen: list[set[int]] = []
    plain = form(NAMES)

    def evaluate(theta, x):
        if calls.append(1) or len(calls) % 20 == 1:  # asking takes a millisecond
            seen.append(blas_threads())
        return plain.evaluate(theta, x)

    watched = dataclasses.replace(plain, evaluate=evaluate)
    size, ratio = np.meshgrid((1.0, 4.0, 16.0), (0.0, 0.25, 0.5, 1.0))
    x = np.stack([np.ones(12), size.ravel(), ratio.ravel()], axis=1)
    loss = TRUE_LAW.value(*x.T)
    found = fit.solve(watched, x, loss, starts=1)
    assert set.union(*seen) == {1}
    seen.clear()
    bootstrap(watched, x, loss * (1 + 1e-3 * np.sin(np.arange(12))), found, np.arange(12), draws=2)
    assert set.union(*seen) == {1}
    assert blas_threads() == {2}


@pytest.mark.usefixtures("two_threads")
def test_the_graph_network_is_trained_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    plain = graph_network.network

    def network(*given):
        seen.add(torch.get_num_threads())
        return plain(*given)

    monkeypatch.setattr(graph_network, "network", network)
    table = torch.tensor([[4.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    training = graph_network.GraphTraining(steps=2, rounds=0)
    graph_network.graph_bits(table, (1, 2), [1, 1], 3, torch.eye(2), torch.eye(2), training, lambda bits: 0.0)
    assert seen == {1, 2}  # a single pass after training reads the choices
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_come_back_after_an_error_and_from_a_nested_limit() -> None:
    seen: list[int] = []

    @one_thread()
    def fails() -> None:
        with one_thread():
            seen.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == [1]
    assert torch.get_num_threads() == 2
    assert blas_threads() == {2}


def test_idle_threads_stop_spinning_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"OMP_WAIT_POLICY": "active"}
    sleep_at_barriers(chosen)
    assert chosen == {"OMP_WAIT_POLICY": "active"}
    empty: dict[str, str] = {}
    sleep_at_barriers(empty)
    assert empty == {"GOMP_SPINCOUNT": "2000"}
    called: list[str] = []
    app = sys.modules["bitquilt.cli.app"]  # the package has a value of that name
    monkeypatch.setattr(app, "sleep_at_barriers", lambda: called.append("limit"))
    app.main(lambda: called.append("verb"))
    assert called == ["limit", "verb"]
