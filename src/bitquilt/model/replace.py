"""Quantized modules put into a model: `replace_layers` for a checkpoint's layouts, `put_embedding` for one table.

`SharedHead` multiplies by the codes of the embedding that it is tied to. `lookup` reads rows without keeping the pages
of a mapped file. `guard_resizing` keeps the number of rows.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitquilt.core.types import Layout
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear, is_linear, linear_weight, replace_linears, replace_module
from bitquilt.model.shared_layers import share_layers, shared_layers
from bitquilt.model.tables.embedding import QuantizedEmbedding, lookup_scale
from bitquilt.model.tables.mixed_rows import MixedEmbedding, MixedHead, MixedRows
from bitquilt.ops.large_pages import let_go

_AROUND = 2**21  # the most bytes that Linux maps around a page of a file: the largest piece in which it caches files
_AT_ONCE = 8


class SharedHead(nn.Module):
    """A head whose logits are products with the embeddings: it has no weight of its own, and may have a bias."""

    def __init__(self, embedding: QuantizedEmbedding | MixedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._shared = (embedding,)  # not a submodule: its tensors are stored once, under the embedding's name
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def table(self) -> QuantizedEmbedding | MixedEmbedding:
        """The embedding whose codes the head multiplies by."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """See `QuantizedEmbedding.weight`."""
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[..., vocabulary]` of x `[..., width]`."""
        logits = self.table.project(x)
        return logits if self.bias is None else logits + self.bias


def lookup(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Return `embedding(ids)` of ids int64 `[tokens]`; on a CPU some at a time, and free the pages mapped for them.

    In a table mapped from a checkpoint's file, reading one row maps up to 2 MB around it: a prompt of 512 random tokens
    made 126 MB of a 131 MB table count as this process's memory. A smaller table is left alone: it would be mapped
    whole again at once, and freeing takes 0.1 ms a token, as long as such a model's own step.
    """
    mapped = any(True for _ in _mapped(embedding, ids[:1]))
    if ids.device.type != "cpu" or not mapped:
        found: Tensor = embedding(ids)
        return found
    parts = []
    for part in ids.split(_AT_ONCE):
        parts.append(embedding(part))
        for table, rows in _mapped(embedding, part):
            around = _AROUND // max(1, table.stride(0) * table.itemsize) + 1
            let_go([table.detach()[max(0, row - around) : row + around + 1] for row in rows.tolist()])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mapped(embedding: nn.Module, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each table that is large enough to be let go, with its rows that a lookup of `ids` reads."""
    read = embedding.read(ids) if isinstance(embedding, MixedEmbedding) else ((embedding, ids),)
    for module, rows in read:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dim() == 2 and tensor.numel() * tensor.itemsize > _AROUND:
                yield tensor, rows


def embedding_path(model: Any) -> str | None:
    """Return the path of the token embedding if it only looks rows up, and scales them perhaps; else None."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if lookup_scale(table) is None:
        return None
    return next(name for name, module in model.named_modules() if module is table)


def replace_layers(model: Any, layouts: Mapping[str, Layout], dtype: torch.dtype | None = None) -> None:
    """Put an empty quantized module at each path of `layouts`, the embedding included; a tied head shares it.

    Parts of one table, such as "lm_head.rows_4", are put at the table's path together.

    Raises ValueError for a layer that does not exist, is of another kind, or has another shape.
    """
    path = embedding_path(model)
    linear = {name: layout for name, layout in layouts.items() if not layout.of_rows}
    for home, parts in _tables(layouts).items():
        _replace_table(model, home, parts, dtype, embedding=home == path)
    if path is not None and path in linear:
        table, layout = model.get_submodule(path), linear.pop(path)
        if tuple(table.weight.shape) != (layout.out_features, layout.in_features):
            raise ValueError(
                f"{path} is {list(table.weight.shape)} in the model, but the checkpoint's layout says "
                f"[{layout.out_features}, {layout.in_features}]"
            )
        put_embedding(
            model, path, QuantizedEmbedding(layout, device=table.weight.device, dtype=dtype or table.weight.dtype)
        )
    shared = shared_layers(model)
    replace_linears(model, linear, dtype)
    share_layers(model, shared, linear)


def guard_resizing(model: Any) -> None:
    """Let the model's `resize_token_embeddings` refuse before it changes anything, where a table is quantized."""
    if _quantized_tables(model):
        model.resize_token_embeddings = partial(_resize, model)  # no closure: models are pickled


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *more: Any, **options: Any
) -> Any:
    """`PreTrainedModel.resize_token_embeddings` for a model with quantized tables. Raises UserError for another size.

    transformers' own raises TypeError; of a quantized head it does so once the embedding is resized.
    """
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows and (names := _quantized_tables(model)):
        raise UserError(
            f"the token {' and '.join(names)} of this model {'are' if len(names) > 1 else 'is'} quantized and cannot "
            f"grow or shrink from {rows} to {wanted} rows; resize the full-precision model and quantize it again, or "
            "quantize without bits for embedding and head"
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *more, **options)


def _quantized_tables(model: Any) -> list[str]:
    tables = {"embedding": model.get_input_embeddings, "head": model.get_output_embeddings}
    found = []
    for name, get in tables.items():
        with contextlib.suppress(AttributeError, NotImplementedError):  # a model without such a table
            found += [name] * isinstance(get(), QuantizedLinear | MixedRows | SharedHead)
    return found


def put_embedding(model: Any, path: str, table: QuantizedEmbedding | MixedEmbedding) -> None:
    """Replace the embedding at `path` by `table`, and every module whose weight is tied to it by a `SharedHead`."""
    tied = [name for name, source in model.all_tied_weights_keys.items() if source == f"{path}.weight"]
    table.lookup_scale = lookup_scale(model.get_submodule(path)) or 1.0
    replace_module(model, path, table)
    for name in tied:
        owner = name.removesuffix(".weight")
        replace_module(model, owner, SharedHead(table, getattr(model.get_submodule(owner), "bias", None)))
        del model.all_tied_weights_keys[name]
    # otherwise transformers would tie a weight that is no longer a parameter
    model._tied_weights_keys = {
        name: source for name, source in (model._tied_weights_keys or {}).items() if name not in tied
    }


def replaced_weights(layouts: Mapping[str, Layout]) -> set[str]:
    """Return the names of the parameters whose place the layers in `layouts` take; parts of a table take its own."""
    return {f"{table_path(name) if layout.of_rows else name}.weight" for name, layout in layouts.items()}


def table_path(part: str) -> str:
    """Return the path of the table that the part at the path `part` belongs to."""
    return part.rpartition(".")[0]


def _tables(layouts: Mapping[str, Layout]) -> dict[str, dict[str, Layout]]:
    """The parts of each table, by the table's path and their own name."""
    found: dict[str, dict[str, Layout]] = {}
    for path, layout in layouts.items():
        if layout.of_rows:
            found.setdefault(table_path(path), {})[path.rpartition(".")[2]] = layout
    return found


def _replace_table(
    model: Any, path: str, parts: Mapping[str, Layout], dtype: torch.dtype | None, *, embedding: bool
) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the checkpoint quantizes the table {path}, but the model has none there") from None
    if not embedding and not is_linear(module):
        raise ValueError(
            f"the checkpoint quantizes the table {path}, but the model has a {type(module).__name__} there"
        )
    weight = module.weight if embedding else linear_weight(module)
    first = next(iter(parts.values()))
    if tuple(weight.shape) != (first.of_rows, first.in_features):
        raise ValueError(
            f"{path} is {list(weight.shape)} in the model, but the checkpoint's layout says [{first.of_rows}, "
            f"{first.in_features}]"
        )
    dtype = dtype or weight.dtype
    if embedding:
        put_embedding(model, path, MixedEmbedding(parts, device=weight.device, dtype=dtype))
    else:
        replace_module(model, path, MixedHead(parts, module.bias, device=weight.device, dtype=dtype))
