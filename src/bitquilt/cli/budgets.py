"""Flags that say how much a model may take: the same words for `plan` and `quantize`."""

from typing import Annotated, Any

from typer import Option

from bitquilt.core.budget import SCOPES, Budget
from bitquilt.errors import UserError

Bits = Annotated[
    float | None,
    Option(help="Mean bits per code, 2 to 8; a fraction is shared out over the whole model.", metavar="N"),
]
Bpw = Annotated[
    float | None, Option(help="True bits per weight, everything stored included, instead of --bits.", metavar="N")
]
Size = Annotated[
    str | None, Option(help="Of the whole output folder, such as 6.5GiB, 800MB.", metavar="BYTES", show_default=False)
]
Vram = Annotated[
    str | None,
    Option(help="Memory for weights, cache and workspace, with --ctx.", metavar="BYTES", show_default=False),
]
Ctx = Annotated[int | None, Option(help="Tokens of context that --vram must hold.", metavar="N", show_default=False)]
Allocation = Annotated[
    str | None,
    Option(
        help="Who shares the bits: global (column groups of the whole model), layers (one width a layer), layer (every "
        "layer the same), pairs (every layer the same, N-1, N and N+1 in pairs), uniform; or the recipe's own: sba, dp "
        "for slim-llm.",
        show_default=False,
    ),
]


def size_budget(
    bits: float | None, bpw: float | None, size: str | None, vram: str | None, ctx: int | None
) -> Budget | None:
    """The budget of --size or --vram; --bits and --bpw are left to the recipe. Raises UserError for two of the four."""
    if size is None and vram is None and ctx is None:
        return None
    try:
        found = Budget.of(bits=bits, bpw=bpw, size=size, vram=vram, ctx=ctx)
    except ValueError as error:
        raise UserError(str(error)) from None
    return found if found is not None and found.kind in ("size", "vram") else None


def split_allocation(allocation: str | None, recipe_values: tuple[str, ...], whole: bool) -> dict[str, Any]:
    """--allocation as a scope or as the recipe's option: {"scope": ...} or {"allocation": ...}.

    `whole`: a budget for the whole model is given, so that "uniform" is a scope and not the recipe's own."""
    if allocation is None:
        return {}
    if allocation in recipe_values and not (whole and allocation in SCOPES):
        return {"allocation": allocation}
    if allocation in SCOPES:
        return {"scope": allocation}
    known = sorted({*SCOPES, *recipe_values})
    raise UserError(f"unknown allocation {allocation!r}; wanted one of {', '.join(known)}")
