"""Who writes a model's text, token by token, if not transformers' own loop? begin(model, ids, length) -> Begun."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bitquilt.serve.cpu_decoder import Decoder
from bitquilt.serve.cuda_graph_decoder import GraphDecoder


class Writer(Protocol):
    """A decoder with a cache for one text of up to `length` tokens, which computes what `model` computes."""

    name: str
    model: Any

    def begin(self, ids: Tensor) -> Tensor | None:
        """Logits fp32 `[vocabulary]` after `ids` int64 `[tokens]`; None if they are not what the model computes."""
        ...

    def step(self, token: int) -> Tensor:
        """Logits after `token`, the next of the text; overwritten by the next step."""
        ...


@dataclass(frozen=True, eq=False)
class Begun:
    """The logits after the prompt and who writes on; or nobody but transformers, and why."""

    writer: Writer | None
    logits: Tensor | None
    why: str = ""


def begin(model: Any, ids: Tensor, length: int) -> Begun:
    """For a text of up to `length` tokens that begins with `ids` int64 `[tokens]`: the native decoder on a CPU, a CUDA
    graph on a GPU."""
    try:
        writer: Writer = Decoder(model, length) if model.device.type == "cpu" else GraphDecoder(model, length)
    except AttributeError:
        return Begun(None, None, "it is built otherwise")
    except (ValueError, torch.OutOfMemoryError) as error:
        return Begun(None, None, str(error).splitlines()[0])
    logits = writer.begin(ids)
    if logits is None:
        return Begun(None, None, "it looks like Llama and computes something else")
    return Begun(writer, logits)
