"""One token at a time without Python in between: `Decoder.of(model, length) -> Decoder | None`.

transformers needs 0.14 ms between two products of a 1.1B Llama, as long as a product itself. `csrc/decoder.cpp` does
what stands between them for models of one build: RMS norms, rotary positions, grouped attention, a gated MLP with SiLU.
Which those are is found by looking at the modules, and then by trying: the first logits must be the model's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache

from bitquilt.models.embedding import SharedHead, lookup
from bitquilt.models.linear import QuantizedLinear
from bitquilt.ops import kernels
from bitquilt.ops.pages import place

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ROPES = {"default", "linear", "llama3", "yarn"}  # whose angles do not depend on the length of the text
# Relative distance of the logits that still is rounding: measured on a random 1.1B Llama 0.006 in bf16, 1e-6 in fp32.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


_PAGED_BYTES = 2**20  # a head smaller than this stays where it is; the others are read in large pages
_paged = WeakTensorKeyDictionary()  # heads that were moved there, and where to


class Decoder:
    """A model ready to write: `begin(ids)`, then `step(token)` for each, both -> logits fp32 `[vocabulary]`."""

    @torch.no_grad()
    def __init__(self, model: Any, length: int) -> None:
        """ValueError: the model is not of this build; the message says where."""
        self.model, self.length, self.position = model, length, 0
        self._kept: list[Tensor] = []
        config, base = model.config, _body(model)
        first = base.layers[0].self_attn
        self._embed = model.get_input_embeddings()
        head = model.get_output_embeddings()
        _want(head.bias is None, "the head has a bias")
        self.dtype = dtype = self._embed(torch.zeros(1, dtype=torch.int64)).dtype
        _want(dtype in kernels.TYPES, f"it computes in {dtype}")
        kv = first.k_proj.out_features // first.head_dim
        heads = first.q_proj.out_features // first.head_dim
        positions = torch.arange(length).unsqueeze(0)
        cosines, sines = (self._floats(t[0]) for t in base.rotary_emb(torch.zeros(1, dtype=torch.float32), positions))
        cache_type = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.cache = torch.zeros(len(base.layers), 2, kv, length, first.head_dim, dtype=cache_type)
        sizes = [config.hidden_size, heads, kv, first.head_dim, cosines.shape[-1], config.intermediate_size,
                 head.out_features, length]  # fmt: skip
        self._native = kernels.decoder(sizes, _epsilon(base.norm), float(first.scaling))
        for layer, cache in zip(base.layers, self.cache, strict=True):
            self._add(layer, cache)
        norm = self._floats(base.norm.weight)
        self._native.set_ends(norm.data_ptr(), cosines.data_ptr(), sines.data_ptr())
        self._set_head(head)
        self._digits = 3 if dtype == torch.float32 else 2
        self._logits = torch.empty(head.out_features)

    @classmethod
    def of(cls, model: Any, length: int) -> "Decoder | None":
        """A decoder for texts of up to `length` tokens; None where the model is not of this build."""
        try:
            return cls(model, length)
        except (AttributeError, ValueError):
            return None

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Tensor | None:
        """Logits after `ids` int64 `[tokens]`, at most `length`; None if they are not what the model computes.

        The model itself reads the prompt; its last token is then computed here once more and compared."""
        cache = DynamicCache(config=self.model.config)
        expected = self.read(ids, cache)
        for own, layer in zip(self.cache, cache.layers, strict=True):
            own[0, :, : len(ids)], own[1, :, : len(ids)] = layer.keys[0], layer.values[0]
        self.position = len(ids) - 1
        logits = self.step(int(ids[-1]))
        distance = float((logits - expected).norm() / expected.norm().clamp(min=1e-20))
        return logits if distance <= _ROUNDING[self.dtype] else None

    @torch.no_grad()
    def read(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """The model's own logits fp32 `[vocabulary]` after `ids` int64 `[tokens]`; fills `cache`."""
        embedded = lookup(self._embed, ids)[None]
        out = self.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1].float()
        return logits

    def step(self, token: int) -> Tensor:
        """Logits after `token`, the next of the text; overwritten by the next step."""
        with torch.no_grad():
            x = lookup(self._embed, torch.tensor([token]))[0].float().contiguous()
        digits = 1 if kernels.activations() == "int8" else self._digits
        self._native.step(x.data_ptr(), self.position, self._logits.data_ptr(), digits, torch.get_num_threads())
        self.position += 1
        return self._logits

    def _add(self, layer: Any, cache: Tensor) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        _children(layer, _BLOCK)
        _children(attention, _ATTENTION, _HEAD_NORMS)
        _children(mlp, _MLP, {"act_fn"})
        _want(isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation", "its MLP has no SiLU")
        products = [
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        ]  # fmt: skip
        handles, addresses, gains = [], [], []
        for product in products:
            handles.append(self._product(product))
            addresses.append(self._address(product.bias))
            gains.append(self._address(product._buffers.get("row_gains")))
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        addresses += [self._floats(norm.weight).data_ptr() for norm in norms]
        for name in ("q_norm", "k_norm"):
            addresses.append(self._address(getattr(getattr(attention, name, None), "weight", None)))
        addresses += [*(part.data_ptr() for part in cache), *gains]
        self._native.add_layer(handles, addresses, kernels.TYPES[cache.dtype])

    def _product(self, layer: Any) -> Any:
        _want(isinstance(layer, QuantizedLinear), "a layer is not quantized")
        handle = layer.settle()
        _want(handle is not None, "the kernels do not know a layer's format")
        self._kept += [t for t in layer._buffers.values() if t is not None]
        return handle.native

    def _set_head(self, head: Any) -> None:
        """A linear layer, quantized or not, or the quantized embedding that it shares."""
        if type(head) is nn.Linear:
            _want(head.weight.dtype in kernels.TYPES, f"its head is {head.weight.dtype}")
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


def _body(model: Any) -> Any:
    config, base = model.config, getattr(model, "model", None)
    _want(base is not None and _names(base) == _MODEL, "it is built otherwise")
    _want(kernels.level() != kernels.REFERENCE and model.device.type == "cpu", "there are no kernels for it")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    _want(window is None, "its attention has a window")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    _want(rope in _ROPES, f"its positions are of type {rope}")
    return base


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _children(module: nn.Module, wanted: set[str], optional: set[str] | None = None) -> None:
    names = _names(module)
    _want(wanted <= names <= wanted | (optional or set()), f"a {type(module).__name__} has {sorted(names)}")


def _want(right: bool, reason: str) -> None:
    if not right:
        raise ValueError(f"no decoding without Python for this model: {reason}")


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if epsilon is None else epsilon)
