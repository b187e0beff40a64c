"""Every recipe on every family of models: quantize, save, load, equal logits, bytes as planned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitquilt import Result
from bitquilt.core.packing import storage_bits
from bitquilt.core.plan_file import read_plan
from bitquilt.core.recipe import Plannable
from bitquilt.model.config import read_layouts
from bitquilt.model.linear import QuantizedLinear
from bitquilt.recipes import RECIPES, make_recipe, takes_option
from tests.conftest import FAMILIES
from tests.model.test_families import linear_names, load, logits, with_quantized_weights

OPTIONS: dict[str, dict[str, Any]] = {
    "micromix": {},  # its elements have 4, 6 and 8 bits
    "slim-llm+": {"bits": 3, "epochs": 1},
}
FEW: dict[str, Any] = {"samples": 4, "seq_len": 8}  # windows of the families are shorter


def options_of(recipe: str) -> dict[str, Any]:
    own = dict(OPTIONS.get(recipe, {"bits": 3}))
    return own | ({"group_size": 16} if takes_option(recipe, "group_size") else {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_stored_is_what_was_solved_and_planned(
    family: str,
    name: str,
    make_model: Callable[..., Path],
    tmp_path: Path,
    quantize_tiny: Callable[..., Result],
    read_tensors: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    recipe, source = make_recipe(name, **options_of(name)), make_model(family)
    result = quantize_tiny(source, tmp_path / "out", recipe, **FEW)
    quantized = load(result.folder)
    found = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    full = with_quantized_weights(source, quantized)
    assert set(found) == linear_names(full)
    rounded = logits(full)
    if name == "micromix":  # the input is rounded too
        assert bool(torch.isfinite(logits(quantized)).all())
    else:
        torch.testing.assert_close(logits(quantized), rounded, rtol=1e-4, atol=3e-5)  # sums in another order
    assert result.report["logit_difference"] <= 1e-5

    plans, tensors = read_plan(result.folder / "plan.json").plans, read_tensors(result.folder)
    layouts = read_layouts(quantized.config.to_dict())
    for path, module in found.items():
        layout, plan = module.layout, plans[path]
        assert layouts[path] == layout
        widths = plan.widths(layout.in_features)
        bits = sum(w * b for w, b in zip(widths, plan.bits, strict=True))
        assert layout.nominal_bits * layout.in_features == pytest.approx(bits)
        if isinstance(recipe, Plannable):
            assert recipe.layout(layout.out_features, layout.in_features, plan) == layout
        stored = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{path}.") and not key.endswith(".bias"))
        assert storage_bits(layout) == 8 * stored
