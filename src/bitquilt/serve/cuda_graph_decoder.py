"""One token at a time on a GPU, every step one replay of a CUDA graph: `GraphDecoder(model, length)`.

transformers launches some hundred kernels a token one by one, and each waits for Python. Here a static cache and
`decoder_step.DecoderStep` let one graph record all of them. Layers may be quantized or not, as long as Triton's kernels
or torch's own compute them; the model must be built like Llama (`serve.llama_check`).
"""

from typing import Any

import torch
from torch import Tensor

from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import gpu
from bitquilt.ops.decoder_ops import DecoderOps
from bitquilt.ops.stored_weight import StoredWeight
from bitquilt.serve.decoder_step import DecoderBlock, DecoderEnds, DecoderStep, captured
from bitquilt.serve.llama_check import (
    agrees,
    attention_shape,
    head_norms,
    layer_products,
    llama_base,
    read_prompt,
    require,
)

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class GraphDecoder:
    """See `generation.TokenDecoder`. The graph knows tensors by their addresses; if one moves, it is captured again."""

    name = "graph"

    @torch.no_grad()
    def __init__(self, model: Any, length: int, ops: DecoderOps | None = None) -> None:
        """ValueError: the model is not of this build, or a layer has no kernel; the message says where."""
        base = llama_base(model)
        device = model.device
        self.model, self.length, self.position = model, length, 0
        require(all(t.device == device for t in model.parameters()), "its layers are on several devices")
        require(gpu.in_use(), "Triton is not here, or BITQUILT_ISA asks for the reference")
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.dtype = embed(torch.zeros(1, dtype=torch.int64, device=device)).dtype
        require(self.dtype in _TYPES, f"it computes in {self.dtype}")
        shape = attention_shape(base)
        positions = torch.arange(length, device=device).unsqueeze(0)
        cosines, sines = base.rotary_emb(torch.zeros(1, dtype=self.dtype, device=device), positions)
        turned = cosines.shape[-1]
        require(turned == shape.head_width, f"positions turn {turned} of {shape.head_width} numbers of a head")
        ends = DecoderEnds(embed, base.norm.weight, head, cosines[0].contiguous(), sines[0].contiguous())
        blocks = [_block(layer) for layer in base.layers]
        self._step = DecoderStep(blocks, ends, shape, head.out_features, self.dtype, ops=ops)
        self._kept = [*model.parameters(), *model.buffers()]
        self._capture()

    def _capture(self) -> None:
        """Compute the step that was put, and record it."""
        self._replay = captured(self._step, self.model.device)
        self._addresses = self._current_addresses()

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._kept]

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Tensor | None:
        """See `generation.TokenDecoder`. The model reads the prompt; its last token is computed here again."""
        expected = read_prompt(self.model, ids, self._step.cache)
        self.position = len(ids) - 1
        logits = self.step(int(ids[-1]))
        return logits if agrees(logits, expected, self.dtype) else None

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """See `generation.TokenDecoder`; the logits are on the model's device."""
        if self.position >= self.length:
            raise ValueError(f"position is {self.position}; the cache has {self.length} places")
        self._step.put(token, self.position)
        if self._current_addresses() == self._addresses:
            self._replay()
        else:
            self._capture()
        self.position += 1
        return self._step.logits


def _block(layer: Any) -> DecoderBlock:
    products = layer_products(layer)
    for product in products:
        known = not isinstance(product, QuantizedLinear) or _has_kernel(product)
        require(known, "the kernels do not know a layer's format")
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return DecoderBlock(products[:4], products[4:], norms, head_norms(layer))


def _has_kernel(layer: QuantizedLinear) -> bool:
    """Whether Triton computes the layer; the reference may read numbers back, which a graph cannot."""
    from bitquilt.ops.gpu.prepared_weight import prepared

    return prepared(StoredWeight(*layer._stored()), layer.out_features) is not None
