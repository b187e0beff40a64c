"""One token at a time on a CPU without Python in between: `Decoder(model, length)`.

transformers needs 0.14 ms between two products of a 1.1B Llama, as long as a product itself. `csrc/decoder.cpp` does
what stands between them for models of one build: RMS norms, rotary positions, grouped attention, a gated MLP with SiLU.
Which those are is found by looking at the modules, and then by trying: the first logits must be the model's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bitquilt.model.embedding import SharedHead, lookup
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import kernels
from bitquilt.ops.large_pages import place
from bitquilt.serve.llama_check import agrees, body, epsilon, products, read_prompt, want

_PAGED_BYTES = 2**20  # a head smaller than this stays where it is; the others are read in large pages
_paged = WeakTensorKeyDictionary()  # heads that were moved there, and where to


class Decoder:
    """See `writing.Writer`."""

    name = "native"

    @torch.no_grad()
    def __init__(self, model: Any, length: int) -> None:
        """ValueError: the model is not of this build; the message says where."""
        self.model, self.length, self.position = model, length, 0
        self._kept: list[Tensor] = []
        config, base = model.config, body(model)
        want(kernels.level() != kernels.REFERENCE and model.device.type == "cpu", "there are no kernels for it")
        first = base.layers[0].self_attn
        self._embed = model.get_input_embeddings()
        head = model.get_output_embeddings()
        want(head.bias is None, "the head has a bias")
        self.dtype = dtype = self._embed(torch.zeros(1, dtype=torch.int64)).dtype
        want(dtype in kernels.TYPES, f"it computes in {dtype}")
        kv = first.k_proj.out_features // first.head_dim
        heads = first.q_proj.out_features // first.head_dim
        positions = torch.arange(length).unsqueeze(0)
        cosines, sines = (self._floats(t[0]) for t in base.rotary_emb(torch.zeros(1, dtype=torch.float32), positions))
        cache_type = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.cache = torch.zeros(len(base.layers), 2, kv, length, first.head_dim, dtype=cache_type)
        sizes = [config.hidden_size, heads, kv, first.head_dim, cosines.shape[-1], config.intermediate_size,
                 head.out_features, length]  # fmt: skip
        self._native = kernels.decoder(sizes, epsilon(base.norm), float(first.scaling))
        for layer, cache in zip(base.layers, self.cache, strict=True):
            self._add(layer, cache)
        norm = self._floats(base.norm.weight)
        self._native.set_ends(norm.data_ptr(), cosines.data_ptr(), sines.data_ptr())
        self._set_head(head)
        self._digits = 3 if dtype == torch.float32 else 2
        self._logits = torch.empty(head.out_features)

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Tensor | None:
        """See `writing.Writer`: the model reads the prompt, its last token is then computed here once more."""
        expected = read_prompt(self.model, ids, self.cache)
        self.position = len(ids) - 1
        logits = self.step(int(ids[-1]))
        return logits if agrees(logits, expected, self.dtype) else None

    def step(self, token: int) -> Tensor:
        """See `writing.Writer`."""
        with torch.no_grad():
            x = lookup(self._embed, torch.tensor([token]))[0].float().contiguous()
        digits = 1 if kernels.activations() == "int8" else self._digits
        self._native.step(x.data_ptr(), self.position, self._logits.data_ptr(), digits, torch.get_num_threads())
        self.position += 1
        return self._logits

    def _add(self, layer: Any, cache: Tensor) -> None:
        handles, addresses, gains = [], [], []
        for product in products(layer):
            handles.append(self._product(product))
            addresses.append(self._address(product.bias))
            gains.append(self._address(product._buffers.get("row_gains")))
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        addresses += [self._floats(norm.weight).data_ptr() for norm in norms]
        for name in ("q_norm", "k_norm"):
            addresses.append(self._address(getattr(getattr(layer.self_attn, name, None), "weight", None)))
        addresses += [*(part.data_ptr() for part in cache), *gains]
        self._native.add_layer(handles, addresses, kernels.TYPES[cache.dtype])

    def _product(self, layer: Any) -> Any:
        want(isinstance(layer, QuantizedLinear), "a layer is not quantized")
        handle = layer.settle()
        want(handle is not None, "the kernels do not know a layer's format")
        self._kept += [t for t in layer._buffers.values() if t is not None]
        return handle.native

    def _set_head(self, head: Any) -> None:
        """A linear layer, quantized or not, or the quantized embedding that it shares."""
        if type(head) is nn.Linear:
            want(head.weight.dtype in kernels.TYPES, f"its head is {head.weight.dtype}")
            large = head.weight.numel() * head.weight.itemsize >= _PAGED_BYTES
            if large and _paged.get(head.weight) != head.weight.data_ptr():
                head.weight.data = place([head.weight.data.contiguous()])[0]
                _paged[head.weight] = head.weight.data_ptr()
            weight = head.weight.detach().contiguous()
            self._kept.append(weight)
            self._native.set_head(weight.data_ptr(), kernels.TYPES[weight.dtype])
        else:
            layer = head.table if isinstance(head, SharedHead) else head
            self._native.set_product_head(self._product(layer), self._address(layer._buffers.get("row_gains")))

    def _address(self, tensor: Tensor | None) -> int:
        return 0 if tensor is None else self._floats(tensor).data_ptr()

    def _floats(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept
