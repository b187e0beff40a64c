"""One token at a time on a GPU, every step one replay of a CUDA graph: `GraphDecoder(model, length)`.

transformers launches some hundred kernels a token one by one, and each waits for Python. Here a static cache and
`static.Step` let all of them be recorded once. Any layer will do, quantized or not, that Triton's kernels or torch's
own compute; the model must be built like Llama, which is found by looking and by comparing the first logits.
"""

from typing import Any

import torch
from torch import Tensor

from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import gpu
from bitquilt.ops.decoder_ops import Glue, HeadNorms, Shape
from bitquilt.ops.handles import StoredWeight
from bitquilt.serve.decoder_step import Block, Ends, Step, captured
from bitquilt.serve.llama_check import agrees, body, epsilon, products, read_prompt, want

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class GraphDecoder:
    """See `writing.Writer`. The model must stay where it is: the graph knows its tensors by their addresses."""

    name = "graph"

    @torch.no_grad()
    def __init__(self, model: Any, length: int, glue: Glue | None = None) -> None:
        """ValueError: the model is not of this build, or a layer has no kernel; the message says where."""
        base = body(model)
        device = model.device
        self.model, self.length, self.position = model, length, 0
        want(all(t.device == device for t in model.parameters()), "its layers lie on several devices")
        want(gpu.in_use(), "Triton is not here, or BITQUILT_ISA asks for the reference")
        self.dtype = model.get_input_embeddings()(torch.zeros(1, dtype=torch.int64, device=device)).dtype
        want(self.dtype in _TYPES, f"it computes in {self.dtype}")
        first = base.layers[0].self_attn
        width = first.head_dim
        shape = Shape(
            first.q_proj.out_features // width, first.k_proj.out_features // width, width, float(first.scaling),
            epsilon(base.norm),
        )  # fmt: skip
        positions = torch.arange(length, device=device).unsqueeze(0)
        cosines, sines = base.rotary_emb(torch.zeros(1, dtype=self.dtype, device=device), positions)
        turned = cosines.shape[-1]
        want(turned == width, f"positions turn {turned} of {width} numbers of a head")
        head = model.get_output_embeddings()
        ends = Ends(
            model.get_input_embeddings(), base.norm.weight, head, cosines[0].contiguous(), sines[0].contiguous()
        )
        blocks = [_block(layer) for layer in base.layers]
        self._step = Step(blocks, ends, shape, head.out_features, self.dtype, glue=glue)
        self._replay = captured(self._step, device)

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Tensor | None:
        """See `writing.Writer`: the model reads the prompt, its last token is then computed here once more."""
        expected = read_prompt(self.model, ids, self._step.cache)
        self.position = len(ids) - 1
        logits = self.step(int(ids[-1]))
        return logits if agrees(logits, expected, self.dtype) else None

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """See `writing.Writer`; the logits are on the model's device."""
        if self.position >= self.length:
            raise ValueError(f"position is {self.position}; the cache has {self.length} places")
        self._step.put(token, self.position)
        self._replay()
        self.position += 1
        return self._step.logits


def _block(layer: Any) -> Block:
    every = products(layer)
    for product in every:
        want(
            not isinstance(product, QuantizedLinear) or _has_kernel(product), "the kernels do not know a layer's format"
        )
    norms: HeadNorms = None
    if hasattr(layer.self_attn, "q_norm"):
        norms = (layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight)
    return Block(every[:4], every[4:], (layer.input_layernorm.weight, layer.post_attention_layernorm.weight), norms)


def _has_kernel(layer: QuantizedLinear) -> bool:
    """What the reference computes may read numbers back, which a graph cannot."""
    from bitquilt.ops.gpu.weight import prepared

    return prepared(StoredWeight(*layer._stored()), layer.out_features) is not None
