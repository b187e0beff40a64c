"""Every launch of the GPU's body as far as it goes without a GPU: `python -m tests.ops.launched` binds the arguments,
specialises and compiles for sm_90 by Triton's own launcher, and stops before the driver."""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops.decoder_ops import AttentionShape, RotaryPosition
from bitquilt.ops.gpu import launch
from bitquilt.ops.gpu.decoder_kernels import FusedDecoderOps
from tests.weights import make_weight


class Driver:
    """Names a target; there is no device behind it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def main() -> None:
    compiled: list[str] = []
    run = JITFunction.run

    def stop_before_the_driver(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(self.__name__)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = stop_before_the_driver
    launch._takes_ptx = lambda: True
    for kind, tokens, dtype in (("two_bits", 1, torch.bfloat16), ("outliers", 600, torch.float16)):
        module = QuantizedLinear.from_weight(make_weight(kind), torch.zeros(12))
        x = torch.zeros(tokens, module.in_features, dtype=dtype)
        launch.quantized_matmul(x, *module._stored(), module.bias, 12)
    _decode()
    print(*compiled)


def _decode() -> None:
    x, table = (torch.zeros(rows, 64, dtype=torch.bfloat16) for rows in (1, 200))
    cache, rotary = torch.zeros(2, 1, 200, 32), RotaryPosition(table, table, torch.zeros(1, dtype=torch.int64))
    fused = FusedDecoderOps(AttentionShape(2, 1, 32, 0.2, 1e-5), 200, torch.device("cpu"))
    fused.add_norm(x, x, x[0])
    fused.attend((x, x, x), (x, x), rotary, cache.bfloat16())
    fused.gated(x, x)


if __name__ == "__main__":
    main()
