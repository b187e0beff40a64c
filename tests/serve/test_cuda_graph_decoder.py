"""The decoder of static state computes what the model computes. On a GPU its graph is CUDA's; here it is a list of
torch operations recorded once, which knows no Python of ours either."""

from contextlib import contextmanager

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

pytest.importorskip("triton")

from bitquilt.ops import cpu_kernels, gpu
from bitquilt.ops.decoder_ops import AttentionShape
from bitquilt.ops.gpu.decoder_kernels import FusedDecoderOps
from bitquilt.serve import cuda_graph_decoder as graphed
from bitquilt.serve import decoder_step as static
from bitquilt.serve import generation
from bitquilt.serve.cuda_graph_decoder import GraphDecoder

from .test_cpu_decoder import FAMILIES, SIZES, quantized

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not GPU and not cpu_kernels.built(), reason="the package was installed without its kernels"
)


def recorded(work, device):
    """What `static.captured` does with CUDA: later calls repeat the operations of this one on the same tensors."""
    if GPU:
        return static.captured(work, device)
    work()
    graph = make_fx(lambda: work())()
    assert not any("local_scalar" in str(node.target) for node in graph.graph.nodes)  # nothing is read back
    return graph


def written(decoder, ids, count):
    logits = decoder.begin(ids)
    assert logits is not None
    found = ids.tolist()
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = decoder.step(found[-1])
    return found


def by_transformers(model, ids, count):
    mask = torch.ones_like(ids)[None]
    return model.generate(ids[None], attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)[
        0
    ].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_recorded_once_writes_what_transformers_writes(name, monkeypatch):
    monkeypatch.setattr(graphed, "captured", recorded)
    model = quantized(*FAMILIES[name]).to(DEVICE)
    ids = torch.tensor([5, 17, 3, 99], device=DEVICE)
    decoder = GraphDecoder(model, 24)
    logits = decoder._step.logits
    with monkeypatch.context() as patch:
        if not GPU:  # a replay runs none of it
            patch.setattr(static.DecoderStep, "__call__", lambda self: pytest.fail("computed again"))
        assert written(decoder, ids, 20) == by_transformers(model, ids, 20)
        assert decoder._step.logits is logits
        with pytest.raises(ValueError, match="position is 24; the cache has 24 places"):
            decoder.step(1)
        assert written(decoder, ids[:2], 20) == by_transformers(model, ids[:2], 20)  # another text, the same cache


@torch.no_grad()
def test_a_step_whose_weights_moved_is_recorded_again():
    model = quantized(*FAMILIES["llama"]).to(DEVICE)
    decoder = GraphDecoder(model, 24)
    ids = torch.tensor([5, 17, 3, 99], device=DEVICE)
    expected, before = written(decoder, ids, 12), decoder._replay
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    decoder._replay = None  # the old one reads memory that is gone
    assert written(decoder, ids, 12) == expected
    assert before is not None
    assert decoder._replay is not None


def test_the_kernels_between_the_products():
    """The whole step by Triton, the products among it."""
    model = quantized(*FAMILIES["qwen3"], torch.float32).to(DEVICE)
    ids = torch.tensor([5, 17, 3, 99], device=DEVICE)
    fused = FusedDecoderOps(AttentionShape(4, 2, 32, 32**-0.5, model.config.rms_norm_eps), 12, DEVICE)
    decoder = GraphDecoder(model, 12, fused)
    assert written(decoder, ids, 7) == by_transformers(model, ids, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    model = quantized(*FAMILIES["llama"], dtype).to(DEVICE)
    ids = torch.arange(10, device=DEVICE)
    logits = GraphDecoder(model, 10).begin(ids)
    expected = model(ids[None]).logits[0, -1].float()
    assert logits is not None
    assert float((logits - expected).norm() / expected.norm()) < 0.03


@torch.no_grad()
def test_layers_that_are_not_quantized_are_recorded_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().to(DEVICE)
    ids = torch.arange(6, device=DEVICE)
    assert written(GraphDecoder(model, 12), ids, 6) == by_transformers(model, ids, 6)


def test_what_cannot_be_recorded_is_named(monkeypatch):
    model = quantized(*FAMILIES["llama"])
    with pytest.raises(ValueError, match="its attention has a window"):
        GraphDecoder(quantized(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=8)), 10)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "in_use", lambda: False)
        with pytest.raises(ValueError, match="Triton is not here"):
            GraphDecoder(model, 10)
    with monkeypatch.context() as patch:
        patch.setattr("bitquilt.ops.gpu.prepared_weight.prepared", lambda *_: None)
        with pytest.raises(ValueError, match="the kernels do not know a layer's format"):
            GraphDecoder(model, 10)
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x * self.weight)
    assert GraphDecoder(model.to(DEVICE), 10).begin(torch.arange(5, device=DEVICE)) is None


def test_who_writes_is_decided_by_the_device(monkeypatch):
    """A model that says it lies on a GPU; where it computes is not asked here."""
    model = quantized(*FAMILIES["llama"]).to(DEVICE)
    ids = torch.arange(4, device=DEVICE)
    if not GPU:
        assert generation.start_generation(model, ids, 8).decoder.name == "native"
        monkeypatch.setattr(generation, "CpuDecoder", GraphDecoder)
    assert generation.start_generation(model, ids, 8).decoder.name == "graph"

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(generation, "CpuDecoder" if not GPU else "GraphDecoder", full)
    assert generation.start_generation(model, ids, 8).why == "CUDA out of memory."


def test_what_is_captured_was_called_once_before(monkeypatch):
    """The order of CUDA's own part, by stand-ins that only take notes."""
    notes = []

    class Graph:
        def replay(self):
            notes.append("replay")

    @contextmanager
    def inside(what):
        notes.append(f"{type(what).__name__} begins")
        yield
        notes.append("ends")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", inside)
    monkeypatch.setattr(torch.cuda, "device", inside)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: notes.append("wait"))
    replay = static.captured(lambda: notes.append("work"), torch.device("cuda", 0))
    replay()
    assert notes == ["work", "device begins", "wait", "Graph begins", "work", "ends", "ends", "replay"]


def test_branches_wait_for_their_input_and_are_waited_for(monkeypatch):
    """The order of launches and waits, by streams that only take notes."""
    notes = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            notes.append(f"{self.name} waits for {other.name}")

    main, names = Stream("main"), iter("ab")
    current = [main]

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current[-1])

    def product(k):
        return lambda x: notes.append(f"{k} on {current[-1].name}") or x * k

    branches = static.Branches(torch.device("cpu"))
    assert [int(v) for v in branches([product(1), product(2), product(3)], torch.tensor(5))] == [5, 10, 15]
    assert notes == ["a waits for main", "2 on a", "b waits for main", "3 on b", "1 on main",
                     "main waits for a", "main waits for b"]  # fmt: skip
    notes.clear()
    assert [int(v) for v in branches([product(4), product(5)], torch.tensor(1))] == [4, 5]
    assert notes == ["a waits for main", "5 on a", "4 on main", "main waits for a"]
