"""Token embeddings in few bits: `QuantizedEmbedding`, and `SharedHead`, which multiplies by the same codes.

The table is stored like a `QuantizedLinear` of `[vocabulary, width]`; a lookup unpacks only the rows that are read.
`replace_layers` puts quantized modules into a model, `guard_resizing` keeps their number of rows.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitquilt.core.types import Layout
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear, replace_linears, replace_module
from bitquilt.model.shared_layers import share_layers, shared_layers
from bitquilt.ops.bits import unpack_bits
from bitquilt.ops.large_pages import let_go
from bitquilt.ops.reference import decode_uniform

_AROUND = 2**21  # the most bytes that Linux maps around a page of a file: the largest piece in which it caches files
_AT_ONCE = 8


class QuantizedEmbedding(QuantizedLinear):
    """A table of one symmetric uniform segment. Input: ids `[...]`; output `[..., width]` in the model's dtype."""

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(layout.segments) != 1 or not layout.segments[0][0].symmetric or layout.ordering != "identity":
            raise ValueError("a table of embeddings is one symmetric segment in the order of its columns")
        super().__init__(layout, bias, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = layout.out_features, layout.in_features
        self.dtype = dtype or torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., width]` of `ids` `[...]`."""
        form, width = self.layout.segments[0]
        flat = ids.reshape(-1)
        codes = unpack_bits(self.get_buffer("codes_0")[flat], form.bits, width)
        scale = self.get_buffer("scale_0")[flat]
        rows = decode_uniform(codes, scale, scale.new_empty(0), form.bits, form.group_size)
        return rows.to(self.dtype).view(*ids.shape, width)

    def arrange(self) -> None:
        """Do nothing: rows are looked up in the stored order."""

    def project(self, x: Tensor) -> Tensor:
        """Return x W^T `[..., vocabulary]` of x `[..., width]`, the product of a tied head."""
        return super().forward(x)

    @property
    def weight(self) -> Tensor:
        """The table, dequantized on each access, for model code that reads `embedding.weight`."""
        return self.dequantize().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer("scale_0").device)).dtype
        return super()._apply(fn, recurse)


class SharedHead(nn.Module):
    """A head whose logits are products with the embeddings: it has no weight of its own, and may have a bias."""

    def __init__(self, embedding: QuantizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._shared = (embedding,)  # not a submodule: its tensors are stored once, under the embedding's name
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def table(self) -> QuantizedEmbedding:
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
    held = (*embedding.parameters(recurse=False), *embedding.buffers(recurse=False))
    tables = [t for t in held if t.dim() == 2 and t.numel() * t.itemsize > _AROUND]
    if ids.device.type != "cpu" or not tables:
        found: Tensor = embedding(ids)
        return found
    parts = []
    for part in ids.split(_AT_ONCE):
        parts.append(embedding(part))
        for table in tables:
            around = _AROUND // max(1, table.stride(0) * table.itemsize) + 1
            let_go([table.detach()[max(0, row - around) : row + around + 1] for row in part.tolist()])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def embedding_path(model: Any) -> str | None:
    """Return the path of the token embedding if it is a plain `nn.Embedding`, which only looks rows up; else None."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return None
    return next(name for name, module in model.named_modules() if module is table)


def replace_layers(model: Any, layouts: Mapping[str, Layout], dtype: torch.dtype | None = None) -> None:
    """Put an empty quantized module at each path of `layouts`, the embedding included; a tied head shares it.

    Raises ValueError for a layer that does not exist, is of another kind, or has another shape.
    """
    path = embedding_path(model)
    linear = dict(layouts)
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
            found += [name] * isinstance(get(), QuantizedLinear | SharedHead)
    return found


def put_embedding(model: Any, path: str, table: QuantizedEmbedding) -> None:
    """Replace the embedding at `path` by `table`, and every module whose weight is tied to it by a `SharedHead`."""
    tied = [name for name, source in model.all_tied_weights_keys.items() if source == f"{path}.weight"]
    replace_module(model, path, table)
    for name in tied:
        owner = name.removesuffix(".weight")
        replace_module(model, owner, SharedHead(table, getattr(model.get_submodule(owner), "bias", None)))
        del model.all_tied_weights_keys[name]
    # otherwise transformers would tie a weight that is no longer a parameter
    model._tied_weights_keys = {
        name: source for name, source in (model._tied_weights_keys or {}).items() if name not in tied
    }
