"""The native kernels at every instruction set of this processor, against the reference."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from bitquilt import ops
from bitquilt.core.types import Outliers, Permutation, QuantizedWeight, Segment
from bitquilt.errors import UserError
from bitquilt.model.linear import QuantizedLinear
from bitquilt.ops import cpu_kernels, reference
from bitquilt.ops.stored_weight import StoredWeight, describe
from tests.weights import KINDS, arguments, codebook_segment, make_weight, uniform_segment

pytestmark = pytest.mark.skipif(not cpu_kernels.built(), reason="the package was installed without its kernels")
LEVELS = cpu_kernels._kernels.levels() if cpu_kernels.built() else ["none"]
ROWS = 70  # more than one block of 64 rows, and no whole number of bytes of packed zeros at odd widths


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "level", lambda: request.param)
    return request.param


def outliers(columns, count=9):
    """Random entries, several in some rows and none in most."""
    g = torch.Generator().manual_seed(5)
    counts = torch.bincount(torch.randint(0, ROWS, (count,), generator=g), minlength=ROWS)
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    where = torch.randint(0, columns, (count,), generator=g).to(torch.int16)
    return Outliers(torch.randn(count, generator=g).half() * 4, where, rows)


def inputs(tokens, columns, dtype=torch.float32, seed=1):
    """Channels of very different size, and a mean: what zeros and fixed-point activations find hard."""
    g = torch.Generator().manual_seed(seed)
    return ((torch.randn(tokens, columns, generator=g) + 0.5) * torch.exp(torch.randn(columns, generator=g))).to(dtype)


def check(weight, x, bias=None):
    """Within the rounding of the input's dtype of the product in double precision."""
    module = QuantizedLinear.from_weight(weight, bias)
    stored = module._stored()
    dense = reference.dequantize(*stored, module.out_features)
    assert torch.equal(module.dequantize(), dense)
    output = module(x)
    assert output.dtype == x.dtype
    exact = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ dense.double().abs().t() + 1.0
    # fp32: sums of some hundred terms, zeros taken off afterwards. bf16, fp16: 16-bit activations, then one rounding;
    # with many tokens the weight is rounded first, as in the reference.
    rounding = {torch.float32: 1e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[x.dtype]
    noise = 2e-6 if x.dtype == torch.float32 else 2**-14
    if len(x) > cpu_kernels._kernels.MAX_TOKENS:
        noise += rounding
    assert ((output.double() - exact).abs() <= noise * size + rounding * exact.abs()).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("width", "group_size"), [(512, 128), (520, 64), (200, 8), (333, 24), (75, 100), (296, 40)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_uniform_grids(level, bits, width, group_size, symmetric):
    weight = QuantizedWeight((uniform_segment(bits, width, group_size, symmetric=symmetric, rows=ROWS),))
    check(weight, inputs(1, width))


@pytest.mark.parametrize(
    ("width", "group_size"), [(512, 32), (1000, 32), (1000, 64), (1480, 128), (700, 700), (1100, 512), (2048, 1024)]
)
@pytest.mark.parametrize("tokens", [1, 6])
def test_three_bits_in_wide_rows(level, width, group_size, tokens):
    """512 columns at a time, whole and cut short, groups smaller and larger than that; a segment that is behind."""
    parts = (uniform_segment(2, 64, 32, 1, rows=ROWS), uniform_segment(3, width, group_size, 2, rows=ROWS))
    for dtype in (torch.float32, torch.bfloat16):
        check(QuantizedWeight(parts), inputs(tokens, width + 64, dtype))


@pytest.mark.parametrize("tokens", range(1, 18))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_and_dtypes(level, tokens, dtype):
    segments = (uniform_segment(2, 256, 64, 1, rows=ROWS), uniform_segment(3, 100, 32, 2, rows=ROWS))
    check(QuantizedWeight(segments), inputs(tokens, 356, dtype), torch.linspace(-1, 1, ROWS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_every_kind_of_storage(level, kind, tokens):
    weight = make_weight(kind)
    check(weight, inputs(tokens, weight.layout.in_features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 3])
def test_scale_dtypes(level, bits, dtype):
    check(QuantizedWeight((uniform_segment(bits, 264, 8, scale_dtype=dtype, rows=ROWS),)), inputs(2, 264))


def test_everything_at_once(level):
    parts = (
        uniform_segment(1, 128, 64, 1, rows=ROWS),
        uniform_segment(2, 128, 64, 2, rows=ROWS),
        codebook_segment(3, 64, 3, rows=ROWS),
        uniform_segment(4, 93, 64, 4, symmetric=True, rows=ROWS),
    )
    order = Permutation(torch.tensor([3, 5, 1, 0, 2, 4, 6]), 64)
    weight = QuantizedWeight(parts, order, outliers(413))
    check(weight, inputs(6, 413, torch.bfloat16), torch.ones(ROWS))


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize(("width", "rows"), [(64, 64), (333, 70), (600, 5), (7, 9)])
def test_codebooks(level, bits, width, rows):
    """Ragged strips of columns, blocks of rows that are no multiple of eight, infinite and missing numbers."""
    weight = QuantizedWeight((codebook_segment(bits, width, rows=rows),))
    for dtype in (torch.float32, torch.bfloat16):
        check(weight, inputs(3, width, dtype))
    x = inputs(2, width)
    x[0] = 0
    module = QuantizedLinear.from_weight(weight)
    assert not module(x)[0].any()
    x[1, width // 2] = float("nan")
    assert module(x)[0].isfinite().all()
    assert module(x)[1].isnan().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("grid", ["uniform", "codebook"])
def test_activations_in_eight_bits(level, bits, grid):
    """Within 1/254 of the largest activation, or product, of each group; exact where the level has no such mode."""
    segment = uniform_segment(bits, 512, 64, rows=ROWS) if grid == "uniform" else codebook_segment(bits, 512, rows=ROWS)
    weight = QuantizedWeight((segment,))
    module = QuantizedLinear.from_weight(weight)
    x = inputs(2, 512)
    exact = module(x)
    cpu_kernels.use_activations("int8")
    try:
        rounded = module(x)
    finally:
        cpu_kernels.use_activations(None)
    distance = float((rounded - exact).norm() / exact.norm())
    assert distance < (0.02 if grid == "uniform" else 0.05)  # one group of 64 columns, one strip of 256
    assert (distance > 1e-6) == (level == "avx512" and (grid == "uniform" or bits <= 4))


def test_an_unknown_way_to_round_activations_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'int4'; known are exact, int8"):
        cpu_kernels.use_activations("int4")
    monkeypatch.setenv("BITQUILT_ACTIVATIONS", "fp8")
    with pytest.raises(UserError, match="BITQUILT_ACTIVATIONS is 'fp8'; known are exact, int8"):
        cpu_kernels._mode_of_environment.__wrapped__()


def test_a_weight_that_was_written_to_is_described_again(level):
    """The order of the channels and the outliers were checked when the handle was made."""
    order = Permutation(torch.tensor([1, 0, 2]), 8)
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(3, 24, 8, rows=ROWS),), order))
    x = inputs(1, 24)
    module(x)
    module.permutation.copy_(torch.tensor([2, 0, 1], dtype=module.permutation.dtype))
    check_module = reference.quantized_matmul(x, *module._stored(), None, ROWS)
    torch.testing.assert_close(module(x), check_module)
    torch.testing.assert_close(ops.quantized_matmul(x, *module._stored(), None, ROWS), check_module)
    module.permutation[0] = 7
    with pytest.raises(ValueError, match="out of range"):
        module(x)


def test_a_large_weight_moves_once_and_stays_itself(level):
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(4, 1024, 128, rows=200),)))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    x = inputs(2, 1024)
    first = module(x)
    places = [t.data_ptr() for t in module.state_dict().values()]
    assert torch.equal(module(x), first)
    assert places == [t.data_ptr() for t in module.state_dict().values()]
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), first)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), first)
    module.load_state_dict({name: t.flip(0) for name, t in before.items()})
    assert not torch.equal(module(x), first)
    assert torch.equal(twin(x), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacking_for_many_tokens_equals_the_reference(level, dtype):
    weight = QuantizedWeight((uniform_segment(3, 300, 64, rows=ROWS),), None, outliers(300))
    module = QuantizedLinear.from_weight(weight)
    x = inputs(40, 300, dtype)
    assert torch.equal(module(x), reference.quantized_matmul(x, *module._stored(), None, ROWS))


def sorted_outliers(columns, rows=ROWS):
    """Three entries in every row, at rising columns: as recipes store them."""
    g = torch.Generator().manual_seed(6)
    where = torch.stack([torch.randperm(columns, generator=g)[:3].sort().values for _ in range(rows)]).view(-1)
    values = torch.randn(3 * rows, generator=g).half() * 4
    return Outliers(values, where.to(torch.int32), (3 * torch.arange(rows + 1)).to(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize(("width", "rows"), [(640, 70), (333, 137), (7, 3)])
def test_codebooks_unpacked_to_halves_equal_the_reference(level, bits, width, rows, dtype):
    """Strips of columns and blocks of rows that end anywhere, a segment behind, outliers before the rounding."""
    behind = codebook_segment(2, 13, 5, rows) if (bits + width) % 2 else uniform_segment(3, 13, 8, rows=rows)
    parts = (codebook_segment(bits, width, rows=rows), behind)
    for extra in (None, sorted_outliers(width + 13, rows)):
        module = QuantizedLinear.from_weight(QuantizedWeight(parts, None, extra))
        expected = reference.dequantize(*module._stored(), rows).to(dtype)
        for first in (0, rows // 2):
            out = torch.empty(rows - first, width + 13, dtype=dtype)
            assert torch.equal(
                cpu_kernels.dense(cpu_kernels.handle(module._stored(), rows), out, first), expected[first:]
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extra", [None, outliers(300), sorted_outliers(300)])
def test_many_tokens_of_a_weight_in_another_order(level, dtype, extra):
    """The input is put in order, not the weight; columns as stored and as they were are the same weight."""
    parts = tuple(codebook_segment(bits, width, bits, ROWS) for bits, width in ((2, 50), (1, 30), (3, 200), (4, 20)))
    if dtype == torch.float16:
        parts = (uniform_segment(2, 80, 24, 1, rows=ROWS), *parts[2:])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    weight = QuantizedWeight(parts, Permutation(order, 1), extra)
    module = QuantizedLinear.from_weight(weight)
    check(weight, inputs(40, 300, dtype))
    handle = cpu_kernels.handle(module._stored(), ROWS)
    expected = reference.dequantize(*module._stored(), ROWS).to(dtype)
    assert torch.equal(cpu_kernels.dense(handle, torch.empty(ROWS, 300, dtype=dtype)), expected)
    assert torch.equal(
        cpu_kernels.dense(handle, torch.empty(ROWS, 300, dtype=dtype), as_stored=True), expected[:, order]
    )
    x = inputs(3, 300, dtype)
    assert torch.equal(cpu_kernels.in_stored_order(x, handle), x[:, order])
    assert torch.equal(cpu_kernels.in_stored_order(x[:, ::2].repeat(1, 2), handle), x[:, ::2].repeat(1, 2)[:, order])


def test_unpacking_some_rows_at_a_time(level, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_TILE_ROWS", 64)
    weight = QuantizedWeight((uniform_segment(3, 300, 64, rows=150),))
    module = QuantizedLinear.from_weight(weight, torch.arange(150.0))
    x = inputs(40, 300).view(2, 20, 300)
    expected = reference.quantized_matmul(x, *module._stored(), module.bias, 150)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="rows 5 to 151 are not among the layer's 150"):
        cpu_kernels.dense(cpu_kernels.handle(module._stored(), 150), torch.empty(146, 300), 5)


def test_half_precision_rounds_as_torch_does(level):
    """Subnormal, huge, infinite and missing numbers, through codebooks of every fp16 and through fp32 levels."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).t().contiguous()
    layout = [reference.GRID_CODEBOOK, 8, 1, 256]
    numbers = torch.cat([every.view(256, 256).float(), torch.exp2(torch.linspace(-160, 130, 2**16)).view(256, 256)])
    for levels in (every.view(256, 256), numbers[:256], numbers[256:], -numbers[256:] * 1.0001):
        arguments = ([codes], [levels], [torch.empty(0)], layout, None, 0, None, None, None, 256)
        expected = reference.dequantize(*arguments)
        assert torch.equal(ops.dequantize(*arguments).nan_to_num(7.0, 8.0, -8.0), expected.nan_to_num(7.0, 8.0, -8.0))
        for dtype in (torch.bfloat16, torch.float16):
            handle = cpu_kernels.handle(StoredWeight(*arguments[:-1]), 256)
            dense = cpu_kernels.dense(handle, torch.empty(256, 256, dtype=dtype))
            assert torch.equal(dense.nan_to_num(7.0, 8.0, -8.0), expected.to(dtype).nan_to_num(7.0, 8.0, -8.0))


def test_small_and_large_activations(level):
    """Groups of zeros, of tiny and of huge numbers beside each other; each keeps its precision."""
    weight = QuantizedWeight((uniform_segment(4, 512, 128, rows=ROWS),))
    x = inputs(2, 512)
    x[:, :128] = 0
    x[0, 128:256] *= 1e-20
    x[1, 128:] = 0
    check(weight, x)
    x[1, 300] = float("inf")
    output = QuantizedLinear.from_weight(weight)(x)
    assert torch.isfinite(output[0]).all()
    assert not torch.isfinite(output[1]).any()


def test_shapes_of_the_input(level):
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(2, 264, 8, rows=ROWS),)))
    assert module(torch.randn(0, 264)).shape == (0, ROWS)
    assert module(torch.randn(2, 0, 264)).shape == (2, 0, ROWS)
    assert module(torch.randn(264)).shape == (ROWS,)
    x = torch.randn(264, 6).t()
    torch.testing.assert_close(module(x), module(x.contiguous()), rtol=0, atol=0)
    wide = torch.randn(3, 528)[:, ::2]
    torch.testing.assert_close(module(wide), module(wide.contiguous()), rtol=0, atol=0)


def test_stored_tensors_that_are_not_contiguous(level):
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(3, 64, 8, rows=ROWS),)))
    x = torch.randn(2, 64)
    expected = module(x)
    module.codes_0 = module.codes_0.t().contiguous().t()
    assert torch.equal(module(x), expected)


def test_stored_tensors_at_odd_addresses(level):
    module = QuantizedLinear.from_weight(QuantizedWeight((uniform_segment(3, 64, 8, rows=ROWS),)))
    x = torch.randn(2, 64)
    expected = module(x)
    memory = torch.zeros(2 * module.scale_0.numel() + 1, dtype=torch.uint8)
    memory[1:] = module.scale_0.view(-1).view(torch.uint8)
    shifted = torch.frombuffer(memory.numpy(), dtype=torch.float16, offset=1).view(ROWS, 8)
    assert shifted.data_ptr() % 2
    module.scale_0 = shifted
    assert torch.equal(module(x), expected)


def test_threads_do_not_change_the_result(level):
    """Large enough to be shared out; then from several Python threads at once."""
    weight = QuantizedWeight((uniform_segment(4, 1024, 128, rows=1000),))
    module = QuantizedLinear.from_weight(weight)
    x = inputs(3, 1024)
    expected = module(x)
    outputs = [None] * 6

    def work(index):
        for _ in range(5):
            outputs[index] = module(x)

    before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    torch.set_num_threads(2)
    try:
        assert torch.equal(module(x), expected)
        if before:  # one worker beside each caller's own thread, whoever calls
            assert len(os.listdir("/proc/self/task")) <= before + 1
        assert torch.equal(module.dequantize(), reference.dequantize(*module._stored(), 1000))
        many = len(os.listdir("/proc/self/task")) if before else 0
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(outputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 10  # a thread that was joined is listed a moment longer
        while before and len(os.listdir("/proc/self/task")) > many:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(output, expected) for output in outputs)


def test_gradients_pass_the_kernels(level):
    weight = QuantizedWeight((uniform_segment(3, 64, 8, rows=ROWS),))
    module = QuantizedLinear.from_weight(weight)
    x = torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, ROWS)
    module(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ reference.dequantize(*module._stored(), ROWS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 23)}, r"x is \[2, 23\]; the layer takes \[\.\.\., 24\]"),
        ({"bias": torch.zeros(4)}, "bias holds 4 entries; the layer has 5 outputs"),
        ({"codes": [torch.zeros(5, 5, dtype=torch.uint8)]}, "codes_0 holds 25 entries; 5 rows of 24 2-bit"),
        ({"codes": [torch.zeros(5, 6, dtype=torch.int16)]}, "codes_0 has the wrong dtype; wanted uint8"),
        ({"codes": [torch.zeros(5, 6, dtype=torch.int64)]}, "int64; known are"),
        ({"codes": []}, "0 codes, 1 scales"),
        ({"scales": [torch.ones(5, 2)]}, "scale_0 holds 10 entries; 5 rows of 3 groups take 15"),
        ({"scales": [torch.ones(5, 3, dtype=torch.uint8)]}, "scale_0 has the wrong dtype"),
        ({"zeros": [torch.zeros(2, 2, dtype=torch.uint8)]}, "zero_0 holds 4 entries; packed zeros"),
        ({"zeros": [torch.zeros(3, 2, dtype=torch.int16)]}, "zero_0 has the wrong dtype"),
        ({"layout": [0, 9, 8, 24]}, "codes_0: a code takes 1 to 8 bits, not 9"),
        ({"layout": [0, 0, 8, 24]}, "codes_0: a code takes 1 to 8 bits, not 0"),
        ({"layout": [2, 2, 8, 24]}, "grid 2 with 2 bits is unknown"),
        ({"layout": [0, 2, 0, 24]}, "group_size 0"),
        ({"layout": [0, 2, 8]}, "a layout of 3 numbers"),
        ({"layout": [1, 2, 1, 24]}, "scale_0 holds 15 entries; 24 codebooks take 96"),
        ({"permutation": torch.tensor([2, 0, 3], dtype=torch.int16)}, "block 3 of 3 is out of range or stored twice"),
        ({"permutation": torch.tensor([2, 0, 2], dtype=torch.int32)}, "block 2 of 3 is out of range or stored twice"),
        ({"permutation": torch.tensor([2, 0], dtype=torch.int16)}, "permutation holds 2 entries; 3 blocks take 3"),
        ({"permutation": torch.tensor([2.0, 0, 1])}, "permutation has the wrong dtype"),
        ({"block": 0}, "blocks of 0 channels"),
        ({"outlier_columns": torch.tensor([3, 24], dtype=torch.int16)}, "entry 1 is 24; the layer has 24 columns"),
        ({"outlier_columns": torch.tensor([-1, 2], dtype=torch.int32)}, "entry 0 is -1"),
        ({"outlier_columns": None}, "outlier_columns has the wrong dtype"),
        ({"outlier_rows": torch.tensor([0, 1, 0, 2, 2, 2], dtype=torch.int32)}, "outlier_rows decrease at row 1"),
        ({"outlier_rows": torch.tensor([0, 1, 1, 2, 2, 3], dtype=torch.int32)}, "outlier_rows end at 3"),
        ({"out_features": 6}, "codes_0 holds 30 entries; 6 rows of 24 2-bit codes take 36"),
        ({"out_features": -1}, "out_features is -1"),
    ],
)
def test_what_does_not_fit_is_named(level, changes, message):
    assert ops.quantized_matmul(*arguments()).shape == (2, 5)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.quantized_matmul(*arguments(**changes))


def test_wide_outlier_columns_and_order(level):
    good = arguments()
    names = {
        "outlier_columns": torch.tensor([3, 4], dtype=torch.int32),
        "permutation": torch.tensor([2, 0, 1], dtype=torch.int32),
    }
    assert torch.equal(ops.quantized_matmul(*arguments(x=good[0], **names)), ops.quantized_matmul(*good))


def test_the_module_checks_what_the_operator_cannot_pass(level):
    weight = StoredWeight(*arguments()[1:-2])  # held: a description is addresses
    good, _copies = describe(weight, 5)
    x, out = torch.randn(2, 24), torch.empty(2, 5)

    def run(name=level, description=good, kind=0, tokens=2, columns=24, digits=3, threads=1):
        handle = cpu_kernels._kernels.Handle(name, description)
        handle.matmul(x.data_ptr(), kind, tokens, columns, 0, out.data_ptr(), digits, threads)

    for changes, message in (
        ({"name": "mmx"}, "instruction set 'mmx' is not one this processor has"),
        ({"description": good[:5]}, "at least 15 numbers"),
        ({"description": good[:-1]}, "do not go together"),
        ({"kind": 3}, "x type is 0, 1 or 2, not 3"),
        ({"tokens": 17}, "17 tokens; the kernels take 1 to 16"),
        ({"tokens": 0}, "0 tokens"),
        ({"columns": 23}, "23 features"),
        ({"digits": 4}, "digits is 1, 2 or 3"),
        ({"digits": 0}, "digits is 1, 2 or 3"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 5000}, "threads is 5000; wanted 1 to 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changes)


@pytest.mark.parametrize("wanted", [*LEVELS, cpu_kernels.REFERENCE])
def test_the_environment_forces_a_level(monkeypatch, wanted):
    monkeypatch.setenv("BITQUILT_ISA", wanted)
    assert cpu_kernels.level.__wrapped__() == wanted
    monkeypatch.setattr(cpu_kernels, "level", lambda: wanted)
    check(make_weight("mixed"), inputs(3, 48))


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("BITQUILT_ISA", "sse9")
    with pytest.raises(ValueError, match=r"BITQUILT_ISA is 'sse9'; this processor has .*portable, reference"):
        cpu_kernels.level.__wrapped__()


def test_a_package_without_kernels_computes_through_the_reference():
    """As after an installation without a compiler."""
    program = """
import sys
sys.modules["bitquilt._kernels"] = None
from bitquilt.cli.doctor import self_test, _body
from bitquilt.ops import cpu_kernels
assert not cpu_kernels.built() and cpu_kernels.level() == "reference"
assert self_test() is None
assert "installed without its kernels" in _body("CPU"), _body("CPU")
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("BITQUILT_ISA", "LD_PRELOAD")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_codebooks_in_eight_bits_go_through_the_reference():
    segment = codebook_segment(3, 16)
    eight = torch.float8_e4m3fn
    narrow = Segment(replace(segment.format, scale_dtype=eight), segment.codes, segment.scale.to(eight))
    module = QuantizedLinear.from_weight(QuantizedWeight((narrow,)))
    x = torch.randn(2, 16)
    torch.testing.assert_close(module(x), x @ module.dequantize().t())


def test_a_grid_that_the_kernels_do_not_know_is_left_to_the_reference_body() -> None:
    weight = StoredWeight(*arguments()[1:-2])
    grid = weight.layout[0]
    assert weight.plain().known()
    for other in {grid, reference.GRID_MX, 12} - {grid}:
        assert not weight._replace(layout=[other, *weight.layout[1:]]).plain().known()
