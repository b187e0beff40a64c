"""What stands between a decoder's products: the kernels against torch, natively or under Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from bitquilt.ops import cpu_kernels
from bitquilt.ops.decoder_ops import AttentionShape, RotaryPosition, TorchDecoderOps
from bitquilt.ops.gpu.decoder_kernels import FusedDecoderOps

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not GPU and not cpu_kernels.built(), reason="the package was installed without its kernels"
)


def close(one, other, dtype):
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "length", "normed", "dtype"),
    [
        (4, 2, 16, 200, False, torch.float32),
        (6, 2, 24, 130, True, torch.float32),  # no power of two
        (1, 1, 64, 64, False, torch.bfloat16),  # one part, nothing to add up
        (2, 2, 32, 300, True, torch.float16),
    ],
)
def test_the_kernels_do_what_torch_does(heads, kv_heads, width, length, normed, dtype):
    shape = AttentionShape(heads, kv_heads, width, width**-0.5, 1e-5)
    plain, fused = TorchDecoderOps(shape), FusedDecoderOps(shape, length, DEVICE)
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    x, more, weight = random(1, 48), random(1, 48), random(48)
    for added in (None, more):
        for one, other in zip(plain.add_norm(x, added, weight), fused.add_norm(x, added, weight), strict=True):
            close(one, other, dtype)
    close(plain.gated(x, more), fused.gated(x, more), dtype)
    tables = random(length, width), random(length, width)
    norms = (random(width), random(width)) if normed else None
    for position in {0, 5, 63, length // 2, length - 1}:
        rotary = RotaryPosition(*tables, torch.tensor([position], device=DEVICE))
        inputs = random(1, heads * width), random(1, kv_heads * width), random(1, kv_heads * width)
        caches = [random(2, kv_heads, length, width)]
        caches.append(caches[0].clone())
        one, other = (g.attend(inputs, norms, rotary, c) for g, c in zip((plain, fused), caches, strict=True))
        close(one, other, dtype)
        close(*caches, dtype)
        assert torch.equal(fused.attend(inputs, norms, rotary, caches[1]), other)  # however they arrive
        assert not fused.counters.any()
