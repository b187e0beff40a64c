"""`SourceFormat` is what a checkpoint's files hold: full precision, weights that can be decoded, or neither."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitquilt.model.encoded.weights import EncodedWeight


@dataclass(frozen=True)
class SourceFormat:
    """`weights`: matrices by name that are decoded when they are read. `refusal`: why some cannot be, or None."""

    weights: Mapping[str, EncodedWeight] = field(default_factory=dict)
    refusal: str | None = None

    @property
    def name(self) -> str | None:
        """The encodings with the most frequent first; None for full precision."""
        counts: dict[str, int] = {}
        for weight in self.weights.values():
            counts[weight.encoding.label] = counts.get(weight.encoding.label, 0) + 1
        return ", ".join(sorted(counts, key=lambda label: -counts[label])) or None

    @property
    def nbytes(self) -> int:
        """Stored bytes of the encoded matrices, scales included."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of an encoded matrix's weight, scales included; None for full precision."""
        return 8 * self.nbytes / self._numbers if self.weights else None

    @property
    def code_bits(self) -> float | None:
        """Mean bits of a code; None for full precision."""
        spent = sum(weight.encoding.bits * math.prod(weight.encoding.shape) for weight in self.weights.values())
        return spent / self._numbers if self.weights else None

    @property
    def _numbers(self) -> int:
        return sum(math.prod(weight.encoding.shape) for weight in self.weights.values())

    def to_json(self) -> dict[str, object] | None:
        """What report.json says about the source; None for full precision."""
        if not self.weights:
            return None
        return {"format": self.name, "bits_per_weight": self.bits_per_weight, "matrices": len(self.weights)}
