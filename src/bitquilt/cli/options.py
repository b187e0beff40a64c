"""Flags that `plan` and `quantize` share, said once."""

from typing import Annotated

from typer import Argument, Option

Model = Annotated[str, Argument(metavar="MODEL", help="Folder of a Hugging Face model, or its hub id (org/name).")]
GroupSize = Annotated[int | None, Option(help="Input channels per scale, a multiple of 8 (default: the recipe's).")]
Samples = Annotated[int, Option(help="Calibration sequences.")]
SeqLen = Annotated[int, Option(help="Tokens per calibration sequence.")]
Seed = Annotated[int, Option(help="Of everything that is drawn at random.")]
Skip = Annotated[
    list[str] | None, Option(metavar="PATTERN", help="Leave these layers alone, such as '*.down_proj'; repeatable.")
]
EmbeddingBits = Annotated[
    int | None,
    Option(help="Round the token embedding, and a head tied to it, to N bits.", metavar="N", show_default=False),
]
HeadBits = Annotated[
    int | None,
    Option(help="Round the layer that makes logits to N bits, where it is not tied.", metavar="N", show_default=False),
]
Device = Annotated[str, Option(help="Where blocks are computed: cpu, cuda, cuda:N, or auto: a GPU where there is one.")]
WhereDevice = Annotated[str, Option("--device", help="Where the model runs: cpu, cuda, cuda:N, or auto.")]
Published = Annotated[bool, Option("--published", help="The settings of the public implementation.")]
Settings = Annotated[
    list[str] | None, Option("--set", metavar="NAME=VALUE", help="Any other field of the recipe; repeatable.")
]
