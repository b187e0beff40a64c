"""The three uses: the published optimum, the closed forms, and the cases without an answer."""

import dataclasses

import numpy as np
import pytest

from bitquilt.errors import UserError
from bitquilt.laws import DCPTLaw, GeneralBound, best_ratio, best_scarce_ratio, best_under_compute
from bitquilt.laws.optimise import FLOPS_PER_UNIT, compute_closed_form, scarce_closed_form
from tests.laws.published import (
    CHEMISTRY_GENERAL_BEFORE,
    TRUE_LAW,
    chemistry_domain,
    chemistry_general,
    synthetic,
)

SCARCE = dataclasses.replace(TRUE_LAW, B=0.6, C=0.05, eps=0.0)


@pytest.fixture(scope="module")
def chemistry() -> tuple[DCPTLaw, DCPTLaw]:
    return DCPTLaw.fit(chemistry_domain(), starts=20, draws=0), DCPTLaw.fit(chemistry_general(), starts=20, draws=0)


def test_the_published_optimum(chemistry: tuple[DCPTLaw, DCPTLaw]) -> None:
    domain, general = chemistry
    bound = GeneralBound.tolerance(general, 1.8, 10.0, 0.03, CHEMISTRY_GENERAL_BEFORE)
    choice = best_ratio(domain, 1.8, 10.0, bound)
    assert choice.ratio == pytest.approx(0.924, abs=0.002)
    assert choice.general_loss is not None
    assert choice.general_loss <= bound.limit == pytest.approx(2.946006)
    assert choice.feasible
    assert choice.warnings == ()


def test_more_tolerance_never_means_less_domain_text(chemistry: tuple[DCPTLaw, DCPTLaw]) -> None:
    domain, general = chemistry
    start = float(general.value(1.8, 10.0, 0.08))
    ratios = [
        best_ratio(domain, 1.8, 10.0, GeneralBound.tolerance(general, 1.8, 10.0, tol, start)).ratio
        for tol in (0.0, 0.01, 0.02, 0.05, 0.1, 0.3)
    ]
    assert ratios[0] == pytest.approx(0.92, abs=1e-6)  # tolerance 0: the largest share that keeps the loss
    assert ratios == sorted(ratios)
    assert ratios[-1] == 1.0


def test_an_impossible_bound_is_reported(chemistry: tuple[DCPTLaw, DCPTLaw]) -> None:
    domain, general = chemistry
    choice = best_ratio(domain, 1.8, 10.0, GeneralBound(general, 1.0))
    assert not choice.feasible
    assert choice.ratio == 0.0
    assert any("no mixture keeps the general loss at or below 1.0000" in note for note in choice.warnings)


def test_a_loss_that_rises_again_is_searched_not_solved() -> None:
    """With a strong token term the domain loss has its minimum inside, below what the bound would allow."""
    bumpy = dataclasses.replace(TRUE_LAW, B=1.0, eta=1.5, C=0.3)
    free = best_ratio(bumpy, 1.8, 10.0)
    fine = np.linspace(0, 1, 200001)
    assert 0 < free.ratio < 1
    assert free.ratio == pytest.approx(fine[bumpy.value(1.8, 10.0, fine).argmin()], abs=1e-5)
    bounded = best_ratio(bumpy, 1.8, 10.0, GeneralBound(TRUE_LAW, 100.0))
    assert bounded.ratio == pytest.approx(free.ratio, abs=1e-6)


def test_scarce_text_meets_the_closed_form() -> None:
    assert scarce_closed_form(SCARCE, 5.0) == pytest.approx(0.134107, abs=1e-6)
    choice = best_scarce_ratio(SCARCE, 1.8, 5.0)
    assert choice.ratio == pytest.approx(0.134107, abs=1e-5)
    assert choice.d == pytest.approx(5.0 / choice.ratio)


def test_scarce_text_with_a_cap_on_all_tokens() -> None:
    assert best_scarce_ratio(SCARCE, 1.8, 5.0, max_d=20.0).ratio == pytest.approx(0.25)
    with pytest.raises(UserError, match="wanted 0 < domain <= all"):
        best_scarce_ratio(SCARCE, 1.8, 5.0, max_d=4.0)


def test_compute_meets_the_closed_form() -> None:
    compute = 1.8 * 10.0 * FLOPS_PER_UNIT
    choice = best_under_compute(TRUE_LAW, compute, ratio=0.5)
    assert choice.n == pytest.approx(33.941, abs=1e-2)
    assert choice.d == pytest.approx(0.5303, abs=1e-3)
    assert choice.domain_loss == pytest.approx(2.391241, abs=1e-6)
    assert compute_closed_form(TRUE_LAW, compute, 0.5) == pytest.approx(33.941, abs=1e-3)


def test_compute_with_a_bound_keeps_it_and_beats_a_grid() -> None:
    compute, limit = 18.0 * FLOPS_PER_UNIT, 2.6
    choice = best_under_compute(TRUE_LAW, compute, GeneralBound(TRUE_LAW, limit))
    assert choice.feasible
    assert choice.general_loss is not None
    assert choice.general_loss <= limit
    n, r = np.meshgrid(np.geomspace(0.01, 1000, 400), np.linspace(0, 1, 401), indexing="ij")
    losses = np.where(TRUE_LAW.value(n, 18.0 / n, 1 - r) <= limit, TRUE_LAW.value(n, 18.0 / n, r), np.inf)
    assert choice.domain_loss <= losses.min() + 1e-9
    assert 6 * choice.n * choice.d == pytest.approx(6 * 18.0)


def test_a_fitted_law_stays_near_its_data_unless_told() -> None:
    law = DCPTLaw.fit(synthetic(tokens=(1.0, 4.0, 16.0)), starts=10, draws=0)
    near = best_under_compute(law, 18.0 * FLOPS_PER_UNIT)
    assert near.n == pytest.approx(8.0, rel=0.01)
    assert any("edge of the supported range" in note for note in near.warnings)
    far = best_under_compute(law, 18.0 * FLOPS_PER_UNIT, extrapolate=True)
    assert far.domain_loss < near.domain_loss
    assert any("extrapolates in N" in note and "best starts differ by" in note for note in far.warnings)
    with pytest.raises(UserError, match="is outside the fitted runs"):
        best_under_compute(law, 1e30)


def test_a_law_of_one_size_cannot_choose_one(chemistry: tuple[DCPTLaw, DCPTLaw]) -> None:
    with pytest.raises(UserError, match="needs a law fitted on several N and several D"):
        best_under_compute(chemistry[0], 1e20)
    with pytest.raises(UserError, match=r"one N .* only"):
        best_ratio(chemistry[0], 4.0, 10.0)
