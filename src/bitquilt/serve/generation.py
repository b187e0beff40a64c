"""Fast generation: `start_generation` reads a prompt with the decoder of the model's device or says why not.

A `TokenDecoder` then returns the logits of one token after another, without transformers' own loop.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bitquilt.serve.cpu_decoder import CpuDecoder
from bitquilt.serve.cuda_graph_decoder import GraphDecoder


class TokenDecoder(Protocol):
    """A decoder with a cache for one text, which computes what `model` computes."""

    name: str
    model: Any

    def begin(self, ids: Tensor) -> Tensor | None:
        """Return logits fp32 `[vocabulary]` after `ids` int64 `[tokens]`, or None if the model computes others."""
        ...

    def step(self, token: int) -> Tensor:
        """Return the logits after `token`, the next of the text; the next step overwrites them."""
        ...


@dataclass(frozen=True, eq=False)
class Generation:
    """The logits after the prompt and the decoder that continues; without one, `why` transformers has to."""

    decoder: TokenDecoder | None
    logits: Tensor | None
    why: str = ""


def start_generation(model: Any, ids: Tensor, length: int) -> Generation:
    """Start a text of up to `length` tokens with the prompt `ids` int64 `[tokens]`.

    The native decoder serves a CPU, a CUDA graph a GPU.
    """
    try:
        decoder: TokenDecoder = CpuDecoder(model, length) if model.device.type == "cpu" else GraphDecoder(model, length)
    except AttributeError:
        return Generation(None, None, "the model is not built like Llama")
    except (ValueError, torch.OutOfMemoryError) as error:
        return Generation(None, None, str(error).splitlines()[0])
    logits = decoder.begin(ids)
    if logits is None:
        return Generation(None, None, "it looks like Llama and computes something else")
    return Generation(decoder, logits)
