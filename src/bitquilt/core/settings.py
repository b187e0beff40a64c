"""Groups of a run's settings: `Calibration` is the data that a run reads, `Selection` the layers that it quantizes.

`grouped` sorts the keywords of a simple call into the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitquilt.core.plan_file import OuterBits
from bitquilt.errors import UserError

SELF, GENERAL = "self", "general"
_CALIBRATION = ("samples", "self_samples", "seq_len", "seed", "column", "bos", "trust_remote_code")
_SELECTION = ("skip", "include_head", "embedding_bits", "head_bits", "keep_embedding", "blocks")


@dataclass(frozen=True)
class Calibration:
    """Calibration data of a run.

    `source`: text, jsonl, json, csv, parquet, a folder of files, a hub data set, token ids in a safetensors file,
    "general", which is text that comes with the package, or "self", which lets the model write its own. `samples`
    sequences of `seq_len` tokens are drawn with `seed`; None: as many as the widest layer wants
    (`data.calibration.usual_samples`), or as the text has.
    `self_samples`: sequences that the model writes in addition to the text, for recipes that train. `column`: the
    column of a data set to read, instead of the usual ones. `bos`: begin every sequence of a text with BOS, where the
    tokenizer adds it to a document. `trust_remote_code`: run the Python code of a tokenizer that comes with its own.

    Raises UserError for a count that is too small, or for `self_samples` or a column with the source "self".
    """

    source: str | Path = GENERAL
    samples: int | None = None
    self_samples: int = 0
    seq_len: int = 512
    seed: int = 0
    trust_remote_code: bool = False
    column: str | None = None
    bos: bool = True

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("seq_len", self.seq_len)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; wanted at least 1")
        if self.self_samples < 0:
            raise UserError(f"self_samples is {self.self_samples}; wanted 0 or more")
        if self.self_samples and self.is_self:
            raise UserError(
                f"self_samples is {self.self_samples}, but the model writes all of its calibration text already; "
                "give more samples instead of self_samples, or give a text"
            )
        if self.column is not None and self.is_self:
            raise UserError(f"column is {self.column}, but the model writes its own text; give a data set or no column")

    @property
    def is_self(self) -> bool:
        """Whether the model writes its own text."""
        return str(self.source) == SELF


@dataclass(frozen=True)
class Selection:
    """Parts of the model that a run quantizes.

    `skip`: patterns of layer paths to leave unquantized, such as "model.layers.0.*". `include_head`: solve the layer
    that makes logits like any other layer, unless it is tied to the embedding. `embedding_bits`: round the token
    embedding, and a head tied to it, to 2 to 8 bits in groups of 32 with one scale each. `head_bits`: the same for a
    head of its own. Otherwise the rows of both share a budget for the whole model with the layers, unless
    `keep_embedding` leaves them in 16 bits. `blocks`: path of the list of repeated blocks, such as "model.layers",
    where the language model's is not the one to take.
    """

    skip: Sequence[str] = ()
    include_head: bool = False
    embedding_bits: int | None = None
    head_bits: int | None = None
    keep_embedding: bool = False
    blocks: str | None = None

    def __post_init__(self) -> None:
        if self.keep_embedding and (self.embedding_bits or self.head_bits):
            raise UserError("keep_embedding leaves embedding and head as they are; leave out embedding_bits, head_bits")
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))

    @property
    def outer(self) -> OuterBits:
        """Bits of embedding and head."""
        return OuterBits(self.embedding_bits, self.head_bits)


def grouped(
    options: dict[str, Any], calibration: str | Path | Calibration = GENERAL, selection: Selection = Selection()
) -> tuple[Calibration, Selection]:
    """Take the fields of `Calibration` and `Selection` out of `options` and return both values with them set."""
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)

    def taken(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    return replace(calibration, **taken(_CALIBRATION)), replace(selection, **taken(_SELECTION))
