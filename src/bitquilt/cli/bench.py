"""`bitquilt bench DIR`: how fast a model writes, and how close that is to what the memory allows."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from typer import Option

from bitquilt.cli.machines import Gpu, Host
from bitquilt.cli.options import Device, Quantized
from bitquilt.cli.output import Json, calm, plain_table, print_json, print_line, stderr, stdout
from bitquilt.core.units import percent_text, size_text
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import config_of
from bitquilt.model.linear import QuantizedLinear, replace_module
from bitquilt.model.replace import SharedHead
from bitquilt.ops import cpu_kernels, gpu, reference
from bitquilt.report.evaluation.loading import as_model
from bitquilt.serve.decoder_step import captured
from bitquilt.serve.generation import start_generation
from bitquilt.serve.llama_check import prompt_logits
from bitquilt.stream.devices import choose_device, free_bytes

_SPARE = 2**30  # bytes that must stay free next to a model unpacked for comparison
_COMPARED_TOKENS = 16  # tokens that the bf16 model writes

Layers = list[tuple[str, QuantizedLinear]]


@dataclass(frozen=True)
class BenchFigures:
    """What --json prints: rates per second, sizes in bytes, shares of 1; None where not measured."""

    device: str
    machine: str
    threads: int
    isa: str
    activations: str
    decoder: str
    why_transformers: str | None
    prompt_tokens: int
    written_tokens: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    bytes_per_token: int
    read_bandwidth_bytes_per_s: float
    bandwidth_share: float
    share_of_matmuls: float
    ready_seconds: float
    peak_bytes: int
    file_bytes: int
    kv_cache_bytes: int
    reference_decode_tokens_per_s: float | None
    bf16_decode_tokens_per_s: float | None
    bf16_prefill_tokens_per_s: float | None


@dataclass(frozen=True)
class _Speeds:
    """Seconds of the first prompt (with one-time work), of a later prompt and of a token; the decoder, and why it is
    transformers' own."""

    first: float
    prompt: float
    token: float
    decoder: str
    why: str


def bench(
    folder: Quantized,
    threads: Annotated[int | None, Option(min=1, max=1024, help="Threads to use. Default: torch decides.")] = None,
    tokens: Annotated[int, Option(min=2, help="Tokens to write.")] = 64,
    prompt: Annotated[int, Option(min=2, help="Tokens of the prompt, drawn at random.")] = 512,
    compare: Annotated[bool, Option(help="Measure the reference body and the bf16 model too.")] = True,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure the model and print the figures."""
    where = choose_device(device)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with calm(), torch.no_grad():
            figures = _measure(folder, tokens, prompt, compare, where)
    finally:
        torch.set_num_threads(before)
    if json_output:
        print_json(asdict(figures))
    else:
        _print(folder, figures)


def _measure(folder: str, tokens: int, prompt: int, compare: bool, where: torch.device) -> BenchFigures:
    on_cpu = where.type == "cpu"
    if not (cpu_kernels.built() if on_cpu else gpu.has_triton()):
        fix = "install bitquilt where a compiler is available" if on_cpu else "pip install 'bitquilt[gpu]'"
        raise UserError(f"there are no kernels for {where}, so there is nothing to measure; {fix}")
    checkpoint = open_checkpoint(folder)
    machine = Host() if on_cpu else Gpu(where)
    model = as_model(checkpoint.folder, where, "auto")
    layers = [(name, m) for name, m in model.named_modules() if type(m) is QuantizedLinear]
    if not layers:
        raise UserError(f"{folder} holds no quantized layers; give a folder that `bitquilt quantize` wrote")
    config = config_of(model)
    room = config.context_length
    if room is not None and room < prompt + tokens:
        prompt, tokens = max(2, room - tokens), min(tokens, room - 2)
        print_line(stderr, f"the model's context holds {room} tokens, so the prompt has {prompt} and the text {tokens}")
    started = time.perf_counter()
    for _, layer in layers:
        layer.settle()
    settled = time.perf_counter() - started
    ids = torch.randint(0, config.vocabulary or 2, (prompt,), generator=torch.Generator().manual_seed(0)).to(where)
    speeds = _speeds(model, ids, tokens, machine)
    peak = machine.peak()
    matmuls = _sum_of_products(model, machine, recorded=speeds.decoder == "graph")
    bandwidth, read = machine.bandwidth(), _bytes_per_token(model)
    cache = config.cache_bytes(prompt + tokens, model.dtype.itemsize)
    through_reference = _reference_seconds(model, layers, machine) if compare else None
    dense = _bf16_speeds(model, layers, ids, tokens, machine) if compare else None  # this replaces the layers
    return BenchFigures(
        device=str(where),
        machine=machine.title,
        threads=torch.get_num_threads(),
        isa=cpu_kernels.level() if on_cpu else "triton",
        activations=cpu_kernels.activations(),
        decoder=speeds.decoder,
        why_transformers=speeds.why or None,
        prompt_tokens=prompt,
        written_tokens=tokens,
        decode_tokens_per_s=1 / speeds.token,
        prefill_tokens_per_s=prompt / speeds.prompt,
        bytes_per_token=read,
        read_bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=read / speeds.token / bandwidth,
        share_of_matmuls=matmuls / speeds.token,
        ready_seconds=settled if on_cpu else speeds.first,
        peak_bytes=peak,
        file_bytes=sum(f.stat().st_size for f in Path(checkpoint.folder).glob("*.safetensors")),
        kv_cache_bytes=cache,
        reference_decode_tokens_per_s=None if through_reference is None else 1 / through_reference,
        bf16_decode_tokens_per_s=None if dense is None else 1 / dense.token,
        bf16_prefill_tokens_per_s=None if dense is None else prompt / dense.prompt,
    )


def _speeds(model: PreTrainedModel, ids: Tensor, tokens: int, machine: Host | Gpu) -> _Speeds:
    started = time.perf_counter()
    generation = start_generation(model, ids, len(ids) + tokens)
    machine.done()
    first = time.perf_counter() - started
    started = time.perf_counter()
    cache = DynamicCache(config=model.config)
    if generation.decoder is not None:
        logits = prompt_logits(model, ids, cache)
    else:
        logits = model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    machine.done()
    prompt = time.perf_counter() - started
    if generation.decoder is not None:
        assert generation.logits is not None
        del cache
        logits, step = generation.logits, generation.decoder.step
    else:

        def step(token: int) -> Tensor:
            found = model(ids.new_tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            assert isinstance(found, Tensor)
            return found

    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        logits = step(int(logits.argmax()))
        machine.done()
        times.append(time.perf_counter() - started)
    name = "transformers" if generation.decoder is None else generation.decoder.name
    return _Speeds(
        first, prompt, sorted(times)[len(times) // 2], name, generation.why
    )  # a median ignores interruptions


def _sum_of_products(model: PreTrainedModel, machine: Host | Gpu, recorded: bool) -> float:
    """Seconds of all linear layers for one token, each called once in order. `recorded`: as a CUDA graph."""
    layers = _products(model)
    inputs = {m.in_features: torch.randn(1, m.in_features).to(machine.device, model.dtype) for m in layers}

    def every() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return _best(captured(every, machine.device) if recorded else every, machine)


def _products(model: PreTrainedModel) -> list[Any]:
    """Every layer that multiplies a token, including a rounded embedding that the head shares."""
    return [m for m in model.modules() if type(m) in (QuantizedLinear, SharedHead, nn.Linear)]


def _best(work: Callable[[], Any], machine: Host | Gpu, rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        machine.done()
        best = min(best, time.perf_counter() - started)
    return best


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights read for one token: all linear layers, without the one row of the embedding."""
    tensors = {}
    for module in _products(model):
        stored = module.table if isinstance(module, SharedHead) else module
        for t in (*stored.parameters(recurse=False), *stored.buffers(recurse=False)):
            tensors[t.data_ptr()] = t.numel() * t.itemsize
    return sum(tensors.values())


def _reference_seconds(model: PreTrainedModel, layers: Layers, machine: Host | Gpu) -> float:
    """Seconds of the quantized layers through the reference body, for one token."""
    x = {layer.in_features: torch.randn(1, layer.in_features).to(machine.device, model.dtype) for _, layer in layers}

    def every() -> None:
        for _, layer in layers:
            reference.quantized_matmul(x[layer.in_features], *layer._stored(), None, layer.out_features)

    return _best(every, machine, 1)


def _bf16_speeds(
    model: PreTrainedModel, layers: Layers, ids: Tensor, tokens: int, machine: Host | Gpu
) -> _Speeds | None:
    """Replace the quantized layers by the same weights in bf16 and measure again; None where these do not fit."""
    needed = sum(2 * layer.in_features * layer.out_features for _, layer in layers) + _SPARE
    if free_bytes(machine.device) < needed:
        print_line(stderr, f"not measuring the bf16 model: it needs {size_text(needed)} of memory, more than is free")
        return None
    for name, layer in layers:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.dequantize().to(torch.bfloat16), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)
        replace_module(model, name, dense)
    layers.clear()
    model.to(torch.bfloat16)
    return _speeds(model, ids, min(tokens, _COMPARED_TOKENS), machine)


def _print(folder: str, figures: BenchFigures) -> None:
    speed = figures.decode_tokens_per_s
    table = plain_table("figure", "value", "", right=["value"])
    table.add_row("writing", f"{speed:.1f} tokens/s", f"{figures.decoder} decoder")
    table.add_row("", percent_text(figures.share_of_matmuls, 2), "of the speed of the matrix products alone")
    table.add_row("prompt", f"{figures.prefill_tokens_per_s:.0f} tokens/s", f"{figures.prompt_tokens} tokens")
    share, bandwidth = percent_text(figures.bandwidth_share, 2), size_text(figures.read_bandwidth_bytes_per_s)
    table.add_row(
        "weights read", f"{size_text(figures.bytes_per_token * speed)}/s", f"{share} of the memory's {bandwidth}/s"
    )
    first = "moving layers into large pages" if figures.device == "cpu" else "checks, compiling, recording a graph"
    table.add_row("first use", f"{figures.ready_seconds:.2f} s", first)
    sizes = f"files {size_text(figures.file_bytes)}, cache {size_text(figures.kv_cache_bytes)}"
    table.add_row("peak memory", size_text(figures.peak_bytes), sizes)
    others = {"bf16": figures.bf16_decode_tokens_per_s, "reference body": figures.reference_decode_tokens_per_s}
    for name, other in others.items():
        if other is not None:
            table.add_row(f"{name}, writing", f"{other:.3g} tokens/s", f"{speed / other:.1f} times slower")
    stdout.print(f"{folder}, {figures.machine}", style="bold", markup=False)
    stdout.print(table)
    if figures.why_transformers:
        stdout.print(f"transformers' own loop wrote the text: {figures.why_transformers}", markup=False)
