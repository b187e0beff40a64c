"""What do the tables of single layers add up to when everything is quantized at once? together(widths) -> factors.

To second order losses add; at few bits an error meets those of the layers before it and the sum is too small. How much
depends on the width that made the error, hardly on the model: measured KL over the sum of the tables, everything at one
width (slim-llm, groups of 32, 60,000 tokens held out), is 1.79, 1.90, 2.15 at 2 bits and 1.20, 1.22, 1.30 at 3 bits on
demo, babyllama-1m-chars and stories260k; layer by layer it is 1.0 to 1.2 and 0.9 to 1.0. So

    KL = constant * sum over widths b of factor(b) * (the tables' sum over the groups at b bits)

The constant is 1 by this; 58 runs that the factors were not taken from (gptq, slim-llm, cmpq; global, published and
uniform plans of 2.25 to 4.5 true bits; three models) put it at 1.2: plans lean on their tables. Where later layers are
solved for what repairs the earlier ones (`quilt`), errors no longer add up: 0.64 (26 runs). It changes no plan.

Plain numbers, no tensors.
"""

import math
from collections.abc import Sequence

_CONSTANT, _REPAIRED = 1.2, 0.64
# Geometric means of the above; at 4 bits a guess between them and 1. At one bit the tables hold what solving the layer
# so really cost; of 1.94, 4 and 1000 (no one-bit groups) 4 is the one never much worse than none and better in six of
# nine cases on the calibration text: KL 2.32, 1.87, 1.96 on stories260k (cmpq, 2.45 bpw), 0.389, 0.466, 0.566 on
# babyllama-1m-chars (slim-llm, groups of 64, 2.31), 0.166, 0.169, 0.196 on the demo model (128, 2.14).
_FACTORS = {1: 4.0, 2: 1.94, 3: 1.24, 4: 1.05}
# What measured KL was of the predicted one, each model predicted with the constant of the two others, was 0.72 to 2.06,
# with repair 0.59 to 1.72 (docs/benchmarks.md, python -m benchmarks.prediction); with a margin.
RANGE = (0.55, 2.1)


def together(widths: Sequence[int], repaired: bool = False) -> list[float]:
    """Constant times factor, for each width. `repaired`: later layers are solved for what the earlier ones did."""
    constant = _REPAIRED if repaired else _CONSTANT
    return [constant * _FACTORS.get(bits, 1.0) for bits in widths]


def perplexity_range(kl: float, perplexity: float) -> tuple[float, float]:
    """From the predicted KL and the full-precision perplexity on the same text: cross-entropy rises by about the KL."""
    low, high = (min(700.0, math.log(perplexity) + bound * kl) for bound in RANGE)
    return math.exp(low), math.exp(high)
