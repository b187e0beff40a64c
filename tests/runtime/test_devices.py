"""Blocks on another device: nothing is left on the host by mistake, the next block is read ahead."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

import bitquilt
from bitquilt import UserError
from bitquilt.models.checkpoint import Checkpoint, open_checkpoint
from bitquilt.models.structure import open_skeleton
from bitquilt.runtime.ahead import Blocks, open_blocks
from bitquilt.runtime.devices import choose_device, stays_on_device, to_device

CPU = torch.device("cpu")
COMMON = {"samples": 4, "seq_len": 8, "skip": ("*.1.*", "*.self_attn.*")}  # as in tests.runtime.on_second_device
RECIPES = {
    "slim-llm": {"bits": 2, "group_size": 8, "error_outliers": 0.01, "act_outliers": 0.01},
    "slim-llm+": {"bits": 2, "group_size": 8, "epochs": 1},
    "cmpq+": {"bits": 2.5},
    "quilt": {"bits": 2, "group_size": 8},
    "gptq": {"bpw": 6, "group_size": 8},  # a plan by what every width costs, measured there
}


def test_names_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("cpu") == choose_device("auto") == CPU
    with pytest.raises(UserError, match="device is 'cuda', but this machine has no GPU that torch can use"):
        choose_device("cuda")
    for wrong in ("gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(UserError, match=f"device is '{wrong}'; known are cpu, cuda, cuda:N and auto"):
            choose_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="'cuda:2', but this machine has 2 GPUs"):
        choose_device("cuda:2")


def test_a_device_that_is_not_here_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU"):
        bitquilt.quantize(tmp_path / "missing", "rtn", out=tmp_path / "out", device="cuda")


def test_what_cannot_run_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="trains all blocks together, which the processor does"):
        bitquilt.quantize(tmp_path / "missing", "quilt", out=tmp_path / "out", device="cuda", effort="best", bits=2)
    with pytest.raises(UserError, match="no folder"):
        bitquilt.quantize(tmp_path / "missing", "quilt", out=tmp_path / "out", device="cuda", bits=2)


def test_where_a_model_is_loaded(make_quantized, monkeypatch):
    """The device becomes transformers' device map; a processor's needs none."""
    folder = make_quantized().folder
    seen = []
    kind = transformers.LlamaForCausalLM
    monkeypatch.setattr(kind, "from_pretrained", lambda folder, **kwargs: seen.append(kwargs))
    bitquilt.load(folder, device="cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bitquilt.load(folder, device="cuda:1")
    assert seen == [{}, {"device_map": {"": torch.device("cuda", 1)}}]
    with pytest.raises(UserError, match="device='cuda' and device_map both say where"):
        bitquilt.load(folder, device="cuda", device_map="auto")


def test_activations_stay_where_there_is_room(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 100 * 10**9))
    gpu = torch.device("cuda", 0)
    assert stays_on_device(20 * 10**9, gpu)
    assert not stays_on_device(21 * 10**9, gpu)
    assert not stays_on_device(1, CPU)


def test_nested_values_move():
    mask = torch.ones(2)
    moved = to_device(({"mask": mask, "positions": (mask, None)}, 3), torch.device("meta"))
    assert moved[0]["mask"].is_meta
    assert moved[0]["positions"][0].is_meta
    assert moved[1] == 3


def test_a_run_on_another_device_writes_the_same_bytes(make_model, token_file, tmp_path, read_tensors):
    """A device that refuses to be mixed with the host, so that a tensor made in the wrong place is found without a GPU;
    it computes as the host does, so that every byte must agree. Tried by hand besides: rtn, mg-ptq, micromix."""
    model = make_model("llama", hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    asked = [text for name, options in RECIPES.items() for text in (name, json.dumps(options))]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.runtime.on_second_device", model, token_file, tmp_path / "there", *asked],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    counted = {fact["recipe"]: fact["operations"] for fact in map(json.loads, ran.stdout.splitlines())}
    for name, options in RECIPES.items():
        here = tmp_path / "here" / name
        bitquilt.quantize(model, name, token_file, here, **COMMON, **options)
        one, other = read_tensors(here), read_tensors(tmp_path / "there" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one), name
        report = json.loads((tmp_path / "there" / name / "report.json").read_text())
        assert report["machine"]["device"] == "second:0"
        assert counted[name] > 1000, name
        if "bpw" in options:
            assert json.loads((here / "plan.json").read_text()) == json.loads(
                (tmp_path / "there" / name / "plan.json").read_text()
            )


def skeleton_of(folder: Path):
    return open_skeleton(open_checkpoint(folder))


def test_the_next_block_is_read_while_this_one_is_computed(make_model, monkeypatch):
    skeleton = skeleton_of(make_model("llama", num_hidden_layers=3))
    plain = [{k: v.clone() for k, v in Blocks(skeleton, CPU).load(i).state_dict().items()} for i in range(3)]
    readers: list[str] = []
    second = threading.Event()
    original = Checkpoint.read

    def read(self, names):
        readers.append(threading.current_thread().name)
        if len(readers) == 2:
            second.set()
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    skeleton = skeleton_of(make_model("llama", num_hidden_layers=3))
    blocks = Blocks(skeleton, CPU, ahead=True)
    for i in range(3):
        block = blocks.load(i)
        if i == 0:  # nobody asked for the second block yet
            assert second.wait(timeout=30)
        assert all(torch.equal(plain[i][k], v) for k, v in block.state_dict().items())
    blocks.close()
    assert readers[0] == "MainThread"
    assert len(readers) == 3
    assert all(name.startswith("next-block") for name in readers[1:])


def test_an_error_while_reading_ahead_belongs_to_its_block(make_model, monkeypatch):
    skeleton = skeleton_of(make_model("llama"))
    bad = skeleton.sources[skeleton.blocks[1]]
    original = Checkpoint.read

    def read(self, names):
        if names is bad:
            raise UserError("model.safetensors is damaged")
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    blocks = Blocks(skeleton, CPU, ahead=True)
    blocks.load(0)
    with pytest.raises(UserError, match="is damaged"):
        blocks.load(1)
    blocks.close()


def test_an_interruption_waits_for_the_reader_and_forgets_it(make_model, monkeypatch):
    skeleton = skeleton_of(make_model("llama"))
    reading, go = threading.Event(), threading.Event()
    original = Checkpoint.read

    def read(self, names):
        if threading.current_thread().name.startswith("next-block"):
            reading.set()
            assert go.wait(timeout=30)
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Blocks, "__init__", with_ahead(Blocks.__init__))

    def interrupted(other):
        with open_blocks(skeleton, CPU) as blocks:
            blocks.load(0)
            assert reading.wait(timeout=30)
            other.submit(go.set)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as other, pytest.raises(KeyboardInterrupt):
        interrupted(other)
    assert not any(t.name.startswith("next-block") and t.is_alive() for t in threading.enumerate())


def with_ahead(original):
    return lambda self, skeleton, device: original(self, skeleton, device, ahead=True)


def test_blocks_out_of_order_are_read_when_asked_for(make_model):
    skeleton = skeleton_of(make_model("llama", num_hidden_layers=3))
    blocks = Blocks(skeleton, CPU, ahead=True)
    first = blocks.load(0).state_dict()
    third = blocks.load(2).state_dict()
    assert not torch.equal(first["mlp.up_proj.weight"], third["mlp.up_proj.weight"])
    blocks.close()
