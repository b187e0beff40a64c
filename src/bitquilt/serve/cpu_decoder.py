"""One token at a time on a CPU without Python in between: `CpuDecoder(model, length)`.

transformers needs 0.14 ms between two products of a 1.1B Llama, as long as a product itself. `csrc/decoder.cpp` does
the steps between them for models built like Llama (`serve.llama_check`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bitquilt.model.linear import QuantizedLinear
from bitquilt.model.replace import SharedHead, lookup
from bitquilt.model.tables.mixed_rows import MixedRows
from bitquilt.ops import cpu_kernels
from bitquilt.ops.large_pages import place
from bitquilt.ops.stored_weight import Handle
from bitquilt.serve.llama_check import (
    agrees,
    attention_shape,
    head_norms,
    layer_products,
    llama_base,
    read_prompt,
    require,
)

_PAGED_BYTES = 2**20  # a head smaller than this stays in place; larger ones are read in large pages
_paged = WeakTensorKeyDictionary()  # heads that were moved there, with their new addresses


class CpuDecoder:
    """See `generation.TokenDecoder`."""

    name = "native"

    @torch.no_grad()
    def __init__(self, model: Any, length: int) -> None:
        """ValueError: the model is not of this build; the message says where."""
        self.model, self.length, self.position = model, length, 0
        base = llama_base(model)
        on_cpu = cpu_kernels.level() != cpu_kernels.REFERENCE and model.device.type == "cpu"
        require(on_cpu, "there are no kernels for it")
        shape = attention_shape(base)
        self._embed = model.get_input_embeddings()
        head = model.get_output_embeddings()
        require(head.bias is None, "the head has a bias")
        self.dtype = dtype = self._embed(torch.zeros(1, dtype=torch.int64)).dtype
        require(dtype in cpu_kernels.TYPES, f"it computes in {dtype}")
        cache_type = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.cache = torch.zeros(len(base.layers), 2, shape.kv_heads, length, shape.head_width, dtype=cache_type)
        self._digits = 3 if dtype == torch.float32 else 2
        self._logits = torch.empty(head.out_features)
        self._describe()

    def _describe(self) -> None:
        """Tell the native code where everything is; it has the addresses of `_kept`, and of copies in `_handles`."""
        model, base = self.model, llama_base(self.model)
        shape, head = attention_shape(base), model.get_output_embeddings()
        self._kept: list[Tensor] = []
        self._handles: list[Handle] = []
        positions = torch.arange(self.length).unsqueeze(0)
        cosines, sines = (self._floats(t[0]) for t in base.rotary_emb(torch.zeros(1, dtype=torch.float32), positions))
        attention = [shape.heads, shape.kv_heads, shape.head_width, cosines.shape[-1]]
        sizes = [model.config.hidden_size, *attention, model.config.intermediate_size, head.out_features, self.length]
        self._native = cpu_kernels.decoder(sizes, shape.epsilon, shape.scaling)
        for layer, cache in zip(base.layers, self.cache, strict=True):
            self._add(layer, cache)
        norm = self._floats(base.norm.weight)
        self._native.set_ends(norm.data_ptr(), cosines.data_ptr(), sines.data_ptr())
        self._set_head(head)
        self._addresses = self._current_addresses()

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._kept]

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Tensor | None:
        """See `generation.TokenDecoder`. The model reads the prompt; its last token is computed here again."""
        expected = read_prompt(self.model, ids, self.cache)
        self.position = len(ids) - 1
        logits = self.step(int(ids[-1]))
        return logits if agrees(logits, expected, self.dtype) else None

    def step(self, token: int) -> Tensor:
        """See `generation.TokenDecoder`."""
        with torch.no_grad():
            x = lookup(self._embed, torch.tensor([token]))[0].float().contiguous()
            if self._current_addresses() != self._addresses:  # `share_memory` moves a storage in place
                self._describe()
        digits = 1 if cpu_kernels.activations() == "int8" else self._digits
        self._native.step(x.data_ptr(), self.position, self._logits.data_ptr(), digits, torch.get_num_threads())
        self.position += 1
        return self._logits

    def _add(self, layer: Any, cache: Tensor) -> None:
        """Describe one block to `csrc/decoder.h`'s add_layer: its products, and addresses in the order named there."""
        products = layer_products(layer)
        handles = [self._product(product) for product in products]  # settles them, which may move their tensors
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        addresses = [
            *(self._address(product.bias) for product in products),
            *(self._address(norm.weight) for norm in norms),
            *(self._address(weight) for weight in head_norms(layer) or (None, None)),
            *(part.data_ptr() for part in cache),
            *(self._address(product._buffers.get("row_gains")) for product in products),
        ]
        self._native.add_layer(handles, addresses, cpu_kernels.TYPES[cache.dtype])

    def _product(self, layer: Any) -> Any:
        require(isinstance(layer, QuantizedLinear), "a layer is not quantized")
        handle = layer.settle()
        require(handle is not None, "the kernels do not know a layer's format")
        self._kept += [t for t in layer._buffers.values() if t is not None]
        self._handles.append(handle)
        return handle.native

    def _set_head(self, head: Any) -> None:
        """A linear layer, quantized or not, in parts or not, or the quantized embedding that it shares."""
        if type(head) is nn.Linear:
            require(head.weight.dtype in cpu_kernels.TYPES, f"its head is {head.weight.dtype}")
            large = head.weight.numel() * head.weight.itemsize >= _PAGED_BYTES
            if large and _paged.get(head.weight) != head.weight.data_ptr():
                head.weight.data = place([head.weight.data.contiguous()])[0]
                _paged[head.weight] = head.weight.data_ptr()
            weight = head.weight.detach().contiguous()
            self._kept.append(weight)
            self._native.set_head(weight.data_ptr(), cpu_kernels.TYPES[weight.dtype])
            return
        layer = head.table if isinstance(head, SharedHead) else head
        if isinstance(layer, MixedRows):
            self._set_head_in_parts(layer)
        else:
            self._native.set_product_head(self._product(layer), self._address(layer._buffers.get("row_gains")))

    def _set_head_in_parts(self, table: MixedRows) -> None:
        stored, start = table.places[2], 0
        rows = stored.argsort().int()
        self._kept.append(rows)
        for part in table.parts:
            self._native.add_head_part(self._product(part), rows[start:].data_ptr())
            start += part.out_features

    def _address(self, tensor: Tensor | None) -> int:
        return 0 if tensor is None else self._floats(tensor).data_ptr()

    def _floats(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept
