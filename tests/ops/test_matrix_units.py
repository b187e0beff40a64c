"""Many tokens on the matrix units, against the reference and against torch's own product."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bitquilt.core.types import Permutation, QuantizedWeight
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import cpu_kernels
from tests.ops.test_cpu_kernels import ROWS, check, inputs, outliers
from tests.weights import codebook_segment, uniform_segment

usable = cpu_kernels.built() and cpu_kernels._kernels.matrix_units() and "avx512" in cpu_kernels._kernels.levels()
pytestmark = pytest.mark.skipif(not usable, reason="no matrix units here")


@pytest.fixture(autouse=True)
def level(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "level", lambda: "avx512")


def mixed():
    """Every grid, in another order, with outliers."""
    parts = (
        uniform_segment(1, 128, 64, 1, rows=ROWS),
        codebook_segment(3, 64, 3, rows=ROWS),
        uniform_segment(4, 93, 64, 4, symmetric=True, rows=ROWS),
        uniform_segment(3, 512, 32, 5, rows=ROWS),
    )
    blocks = -(-797 // 64)
    order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(2))
    order = Permutation(torch.cat([order, torch.tensor([blocks - 1])]), 64)
    return QuantizedWeight(parts, order, outliers(797))


@pytest.mark.parametrize(
    ("rows", "width", "tokens"),
    [(70, 520, 17), (5, 75, 40), (33, 301, 513), (96, 256, 64), (400, 64, 530), (1, 8, 33), (64, 1032, 1025)],
)
def test_ragged_shapes(rows, width, tokens):
    """Tiles, slabs and blocks that are cut short at every edge."""
    weight = QuantizedWeight((uniform_segment(2, width, 8, rows=rows),))
    check(weight, inputs(tokens, width, torch.bfloat16), torch.linspace(-1, 1, rows))


@pytest.mark.parametrize("tokens", [17, 100])
def test_every_grid_on_one_thread_and_two(tokens):
    weight, x = mixed(), inputs(tokens, 797, torch.bfloat16)
    check(weight, x)
    module = QuantizedLinear.from_weight(weight)
    alone = module(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(module(x), alone)
        assert torch.equal(module(x.view(2, -1, 797)).view(tokens, -1) if tokens % 2 == 0 else module(x), alone)
    finally:
        torch.set_num_threads(1)


def test_several_python_threads_at_once():
    module, x = QuantizedLinear.from_weight(mixed()), inputs(40, 797, torch.bfloat16)
    expected = module(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(output, expected) for output in pool.map(lambda _: module(x), range(12)))


def test_some_tokens_at_a_time(monkeypatch):
    module, x = QuantizedLinear.from_weight(mixed()), inputs(150, 797, torch.bfloat16)
    whole = module(x)
    monkeypatch.setattr(cpu_kernels, "_MOST_TOKENS", 64)
    assert torch.equal(module(x), whole)


def test_a_token_that_is_no_number_stays_alone():
    module, x = QuantizedLinear.from_weight(mixed()), inputs(40, 797, torch.bfloat16)
    expected = module(x)
    x[7, 3], x[9, 700] = float("nan"), float("inf")
    output = module(x)
    assert output[7].isnan().all()
    assert not output[9].isfinite().any()
    others = [t for t in range(40) if t not in (7, 9)]
    assert torch.equal(output[others], expected[others])


def test_beside_torchs_own_use_of_the_units(monkeypatch):
    """Both configure the tiles of the thread they run on."""
    module, x = QuantizedLinear.from_weight(mixed()), inputs(64, 797, torch.bfloat16)
    dense = module.dequantize().to(torch.bfloat16)
    for _ in range(3):
        expected = torch.nn.functional.linear(x, dense)
        torch.testing.assert_close(module(x), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))
        assert torch.equal(torch.nn.functional.linear(x, dense), expected)
    monkeypatch.setattr(cpu_kernels._kernels, "matrix_units", lambda: False)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_what_does_not_fit_is_named():
    module = QuantizedLinear.from_weight(mixed())
    native, x = module.settle().native, torch.zeros(20, 797, dtype=torch.bfloat16)
    memory, out = torch.zeros(native.prefill_bytes(20, 1) + 64, dtype=torch.uint8), torch.zeros(20, ROWS).bfloat16()
    place = memory.data_ptr() + -memory.data_ptr() % 64
    native.prefill(x.data_ptr(), 20, 797, 0, out.data_ptr(), place, 1)
    for tokens, columns, threads, message in (
        (20, 796, 1, "796 features; the layer takes 797"), (0, 797, 1, "0 tokens"), (20, 797, 0, "threads is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            native.prefill(x.data_ptr(), tokens, columns, 0, out.data_ptr(), place, threads)
