"""What does a quantized checkpoint have in a layer's place? StandIn(folder).put(linears) -> the weights it replaced."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from bitquilt.models.checkpoint import open_checkpoint
from bitquilt.models.config import read_layouts
from bitquilt.models.linear import QuantizedLinear, linear_weight
from bitquilt.packing import tensor_specs


class StandIn:
    """The layers of a quantized checkpoint of the same model, read when their turn comes."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.layouts = read_layouts(self.checkpoint.config)

    def put(self, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Put dequantized weights into `linears`, by full path; returns what was there, fp32 `[out, in]`."""
        before = {}
        for name, module in linears.items():
            weight = linear_weight(module)
            before[name] = weight.float().clone()
            layout = self.layouts[name]
            stored = self.checkpoint.read(f"{name}.{key}" for key in tensor_specs(layout))
            tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items()}
            weight.copy_(QuantizedLinear.from_tensors(tensors, layout).dequantize())
        return before
