"""`bitquilt bench DIR`: how fast does it write, and how close is that to what the memory allows?"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from typer import Argument, Option

from bitquilt.cli.machines import Gpu, Host
from bitquilt.cli.options import WhereDevice
from bitquilt.cli.output import Json, calm, print_json, size_text, stderr, stdout
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import config_of
from bitquilt.model.embedding import SharedHead
from bitquilt.model.linear import QuantizedLinear, replace_module
from bitquilt.ops import cpu_kernels, gpu, reference
from bitquilt.report.evaluation.loading import as_model
from bitquilt.serve.decoder_step import captured
from bitquilt.serve.generation import start_generation
from bitquilt.serve.llama_check import prompt_logits
from bitquilt.stream.devices import choose_device, free_bytes

_SPARE = 2**30  # bytes that must stay free beside a model unpacked for comparison


def bench(
    folder: Annotated[str, Argument(metavar="DIR", help="Folder of a quantized model.")],
    threads: Annotated[
        int | None, Option(min=1, max=1024, help="Threads (default: as torch decides).", show_default=False)
    ] = None,
    tokens: Annotated[int, Option(min=2, help="Tokens to write.")] = 64,
    prompt: Annotated[int, Option(min=2, help="Tokens of the prompt.")] = 512,
    compare: Annotated[bool, Option(help="Measure the bf16 model and the reference body too.")] = True,
    device: WhereDevice = "cpu",
    json_output: Json = False,
) -> None:
    """Tokens per second of prompt and text, share of the memory's speed, peak memory; random token ids."""
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
        print_json(figures)
    else:
        _print(folder, figures)


def _measure(folder: str, tokens: int, prompt: int, compare: bool, where: torch.device) -> dict[str, Any]:
    if not (cpu_kernels.built() if where.type == "cpu" else gpu.has_triton()):
        raise UserError(
            f"there are no kernels for {where}, so nothing to measure: install with a compiler, or Triton for a GPU"
        )
    checkpoint = open_checkpoint(folder)
    machine = Host() if where.type == "cpu" else Gpu(where)
    model = as_model(checkpoint.folder, where, "auto")
    layers = [(name, m) for name, m in model.named_modules() if type(m) is QuantizedLinear]
    if not layers:
        raise UserError(f"{folder} holds no quantized layers; give a folder that `bitquilt quantize` has written")
    config = config_of(model)
    room = config.context_length
    if room is not None and room < prompt + tokens:
        prompt, tokens = max(2, room - tokens), min(tokens, room - 2)
        stderr.print(f"the model's context holds {room} tokens: a prompt of {prompt}, {tokens} written")
    started = time.perf_counter()
    for _, layer in layers:
        layer.settle()
    settled = time.perf_counter() - started
    ids = torch.randint(0, config.vocabulary or 2, (prompt,), generator=torch.Generator().manual_seed(0)).to(where)
    speeds = _speeds(model, ids, tokens, machine)
    peak = machine.peak()
    matmuls = _sum_of_products(model, machine, recorded=speeds.decoder == "graph")
    bandwidth = machine.bandwidth()
    read = _bytes_per_token(model)
    figures: dict[str, Any] = {
        "device": str(where),
        "machine": machine.title,
        "threads": torch.get_num_threads(),
        "isa": cpu_kernels.level() if where.type == "cpu" else "triton",
        "activations": cpu_kernels.activations(),
        "decoder": speeds.decoder,
        "why_transformers": speeds.why or None,
        "prompt_tokens": prompt,
        "written_tokens": tokens,
        "decode_tokens_per_s": 1 / speeds.token,
        "prefill_tokens_per_s": prompt / speeds.prompt,
        "bytes_per_token": read,
        "read_bandwidth_bytes_per_s": bandwidth,
        "bandwidth_share": read / speeds.token / bandwidth,
        "share_of_matmuls": matmuls / speeds.token,
        "ready_seconds": settled if where.type == "cpu" else speeds.first,
        "peak_bytes": peak,
        "file_bytes": sum(f.stat().st_size for f in Path(checkpoint.folder).glob("*.safetensors")),
        "kv_cache_bytes": config.cache_bytes(prompt + tokens, model.dtype.itemsize),
        "reference_decode_tokens_per_s": None,
        "bf16_decode_tokens_per_s": None,
        "bf16_prefill_tokens_per_s": None,
    }
    if compare:
        figures |= _comparison(model, layers, ids, tokens, machine)
    return figures


@dataclass(frozen=True)
class _Speeds:
    """Seconds of the first prompt (with one-time work), of a later prompt and of a token; the decoder, and why it is
    transformers' own."""

    first: float
    prompt: float
    token: float
    decoder: str
    why: str


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
    return _Speeds(first, prompt, _typical(times), name, generation.why)


def _typical(times: list[float]) -> float:
    """The median: a neighbour's interruption is not the model's speed."""
    return sorted(times)[len(times) // 2]


def _sum_of_products(model: PreTrainedModel, machine: Host | Gpu, recorded: bool) -> float:
    """Seconds of all linear layers for one token, each called once in their order, the best of five rounds. `recorded`:
    in a CUDA graph."""
    layers = _products(model)
    inputs = {m.in_features: torch.randn(1, m.in_features).to(machine.device, model.dtype) for m in layers}

    def every() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return _best(captured(every, machine.device) if recorded else every, machine)


def _products(model: PreTrainedModel) -> list[Any]:
    """Every layer that one token is multiplied by: an embedding in few bits is one where the head shares it."""
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
    """Bytes of weights that one token reads: all linear layers; of the embedding one row."""
    tensors = {}
    for module in _products(model):
        stored = module.table if isinstance(module, SharedHead) else module
        for t in (*stored.parameters(recurse=False), *stored.buffers(recurse=False)):
            tensors[t.data_ptr()] = t.numel() * t.itemsize
    return sum(tensors.values())


def _comparison(
    model: PreTrainedModel, layers: list[tuple[str, QuantizedLinear]], ids: Tensor, tokens: int, machine: Host | Gpu
) -> dict[str, Any]:
    """The reference body, one token; then the same weights in bf16 through torch, where they fit."""
    figures: dict[str, Any] = {}
    x = {layer.in_features: torch.randn(1, layer.in_features).to(machine.device, model.dtype) for _, layer in layers}

    def through_reference() -> None:
        for _, layer in layers:
            reference.quantized_matmul(x[layer.in_features], *layer._stored(), None, layer.out_features)

    figures["reference_decode_tokens_per_s"] = 1 / _best(through_reference, machine, 1)
    needed = sum(2 * layer.in_features * layer.out_features for _, layer in layers) + _SPARE
    if free_bytes(machine.device) < needed:
        stderr.print(f"the bf16 model needs {size_text(needed)} of memory, more than is free: not measured")
        return figures
    for name, layer in layers:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.dequantize().to(torch.bfloat16), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)
        replace_module(model, name, dense)
    layers.clear()
    model.to(torch.bfloat16)
    speeds = _speeds(model, ids, min(tokens, 16), machine)
    return figures | {
        "bf16_decode_tokens_per_s": 1 / speeds.token,
        "bf16_prefill_tokens_per_s": len(ids) / speeds.prompt,
    }


def _print(folder: str, figures: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("figure", "value", ""):
        table.add_column(name, justify="right" if name == "value" else "left")
    share, products = figures["bandwidth_share"], figures["share_of_matmuls"]
    table.add_row("writing", f"{figures['decode_tokens_per_s']:.1f} tokens/s", f"{figures['decoder']} decoder")
    table.add_row("", f"{100 * products:.0f} %", "of the speed of its matrix products alone")
    table.add_row("prompt", f"{figures['prefill_tokens_per_s']:.0f} tokens/s", f"{figures['prompt_tokens']} tokens")
    read = figures["bytes_per_token"] * figures["decode_tokens_per_s"]
    table.add_row("weights read", f"{size_text(read)}/s", f"{100 * share:.0f} % of the memory's "
                  f"{size_text(figures['read_bandwidth_bytes_per_s'])}/s")  # fmt: skip
    first = "moving the layers into large pages" if figures["device"] == "cpu" else "checks, compiling, a graph made"
    table.add_row("first use", f"{figures['ready_seconds']:.2f} s", first)
    table.add_row("peak memory", size_text(figures["peak_bytes"]), f"files {size_text(figures['file_bytes'])}, "
                  f"cache {size_text(figures['kv_cache_bytes'])}")  # fmt: skip
    for key, name in (("bf16", "bf16"), ("reference", "reference body")):
        speed = figures[f"{key}_decode_tokens_per_s"]
        if speed is not None:
            times = figures["decode_tokens_per_s"] / speed
            table.add_row(f"{name}, writing", f"{speed:.3g} tokens/s", f"{times:.1f} times slower")
    stdout.print(f"{folder}, {figures['machine']}", style="bold", markup=False)
    stdout.print(table)
    if figures["why_transformers"]:
        stdout.print(f"transformers wrote: {figures['why_transformers']}", markup=False)
