"""A recipe whose statistics tests look at: `watching_recipe`."""

from typing import Any

from bitquilt.core.types import Layer, LayerPlan, LayerStats, Solution
from bitquilt.recipes.gptq import GPTQ


def watching_recipe(**options: Any) -> tuple[GPTQ, dict[str, LayerStats]]:
    """GPTQ at two bits, and the statistics it is handed, by layer."""
    seen: dict[str, LayerStats] = {}

    class Watching(GPTQ):
        def quantize(self, layer: Layer, plan: LayerPlan, prepared: Any) -> Solution:
            assert layer.stats is not None
            seen[layer.name] = layer.stats
            return super().quantize(layer, plan, prepared)

    return Watching(bits=2, group_size=8, **options), seen
