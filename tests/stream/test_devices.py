"""Blocks on another device: nothing is left on the host by mistake, the next block is prefetched."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import transformers

import bitquilt
from bitquilt import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.structure import linear_layers, open_skeleton
from bitquilt.recipes import make_recipe
from bitquilt.stream import model_training
from bitquilt.stream.devices import choose_device, stays_on_device, to_device
from bitquilt.stream.job import Job
from bitquilt.stream.prefetch import BlockReader, open_blocks

CPU = torch.device("cpu")
COMMON = {"samples": 4, "seq_len": 8, "skip": ("*.1.*", "*.self_attn.*")}  # as in tests.stream.on_second_device
BEST = {"effort": "best", "epochs": 1, "tune_epochs": 1}
RECIPES = {  # every operation goes through Python there: one recipe for what several share
    "slim-llm+": {"bits": 2, "group_size": 8, "epochs": 1, "error_outliers": 0.01, "act_outliers": 0.01},
    "cmpq+": {"bits": 2.5, "effort": "normal", "epochs": 1},
    "quilt": {"bits": 2, "group_size": 8, **BEST, "embedding_bits": 8, "head_bits": 6},
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
    with pytest.raises(UserError, match="no GPU"):
        bitquilt.measure_model(tmp_path / "missing", tmp_path / "file", device="cuda")


def test_a_device_too_small_to_train_a_model_is_refused_first(make_model, token_file, tmp_path, monkeypatch):
    """With what `plan` predicts, and what fits."""
    model, gpu = make_model("llama"), torch.device("cuda", 0)
    wanted = bitquilt.plan(model, "quilt", effort="best", bits=2, seq_len=8).summary["estimate"]["training_bytes"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(model_training, "free_bytes", lambda device: wanted - 1 if device == gpu else wanted)
    asked = {"out": tmp_path / "out", "device": "cuda", "effort": "best", "bits": 2, "seq_len": 8}
    takes = f"takes {wanted / 1e9:.1f} GB and .* of cuda:0's memory are free; effort=normal .*, in 0.0 GB; or the host"
    with pytest.raises(UserError, match=takes):
        bitquilt.quantize(model, "quilt", token_file, **asked)
    monkeypatch.setattr(model_training, "free_bytes", lambda device: wanted - 1)
    with pytest.raises(UserError, match=r"in 0\.0 GB$"):  # nor does the host fit
        bitquilt.quantize(model, "quilt", token_file, **asked)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(model_training, "free_bytes", lambda device: wanted if device == gpu else 0)
    skeleton, recipe = open_skeleton(open_checkpoint(model)), make_recipe("quilt", effort="best", bits=2)
    shapes = {"model.layers.0.mlp.up_proj": (32, 32)}
    memory = model_training.TrainingMemory(recipe, skeleton, shapes, 8)
    memory.check(gpu)
    with pytest.raises(UserError, match="memory are free"):
        memory.check()


def test_where_a_model_is_loaded(make_quantized, monkeypatch):
    """The device becomes transformers' device map; a processor's needs none."""
    folder = make_quantized().folder
    seen = []
    kind = transformers.LlamaForCausalLM
    monkeypatch.setattr(kind, "from_pretrained", lambda folder, **kwargs: seen.append(kwargs))
    bitquilt.load(folder, device="cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bitquilt.load(folder, device="cuda:1")
    assert [asked.get("device_map") for asked in seen] == [None, {"": torch.device("cuda", 1)}]
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
        [sys.executable, "-m", "tests.stream.on_second_device", model, token_file, tmp_path / "there", *asked],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
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
        assert (report["tuning"] is not None) == (options.get("effort") == "best")
        assert counted[name] > 1000, name
        if "bpw" in options:
            assert json.loads((here / "plan.json").read_text()) == json.loads(
                (tmp_path / "there" / name / "plan.json").read_text()
            )


def job_of(folder: Path) -> Job:
    skeleton = open_skeleton(open_checkpoint(folder))
    return Job(skeleton=skeleton, recipe=make_recipe("rtn"), folder=folder)


def weights(reader: BlockReader, i: int) -> dict[str, torch.Tensor]:
    with reader.open(i) as block:
        return {name: value.clone() for name, value in block.module.state_dict().items()}


def test_the_next_block_is_read_while_this_one_is_computed(make_model, monkeypatch):
    job = job_of(make_model("llama", num_hidden_layers=3))
    plain = [weights(BlockReader(job), i) for i in range(3)]
    readers: list[str] = []
    second = threading.Event()
    original = Checkpoint.read

    def read(self, names):
        readers.append(threading.current_thread().name)
        if len(readers) == 2:
            second.set()
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    reader = BlockReader(job_of(make_model("llama", num_hidden_layers=3)), prefetch=True)
    for i in range(3):
        with reader.open(i) as block:
            if i == 0:  # nobody asked for the second block yet
                assert second.wait(timeout=30)
            assert all(torch.equal(plain[i][k], v) for k, v in block.module.state_dict().items())
            assert set(block.linears) == {f"{block.path}.{name}" for name in linear_layers(block.module)}
    reader.close()
    assert readers[0] == "MainThread"
    assert len(readers) == 3
    assert all(name.startswith("next-block") for name in readers[1:])


def test_an_error_while_prefetching_belongs_to_its_block(make_model, monkeypatch):
    job = job_of(make_model("llama"))
    bad = job.skeleton.sources[job.skeleton.blocks[1]]
    original = Checkpoint.read

    def read(self, names):
        if names is bad:
            raise UserError("model.safetensors is damaged")
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    reader = BlockReader(job, prefetch=True)
    weights(reader, 0)
    with pytest.raises(UserError, match="is damaged"):
        weights(reader, 1)
    reader.close()


def test_an_interruption_waits_for_the_reader_and_forgets_it(make_model, monkeypatch):
    job = job_of(make_model("llama"))
    reading, go = threading.Event(), threading.Event()
    original = Checkpoint.read

    def read(self, names):
        if threading.current_thread().name.startswith("next-block"):
            reading.set()
            assert go.wait(timeout=30)
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(BlockReader, "__init__", partialmethod(BlockReader.__init__, prefetch=True))

    def interrupted(other):
        with open_blocks(job) as reader, reader.open(0):
            assert reading.wait(timeout=30)
            other.submit(go.set)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as other, pytest.raises(KeyboardInterrupt):
        interrupted(other)
    assert not any(t.name.startswith("next-block") and t.is_alive() for t in threading.enumerate())
    assert all(parameter.is_meta for parameter in job.skeleton.model.model.layers.parameters())


def test_blocks_out_of_order_are_read_when_asked_for(make_model):
    reader = BlockReader(job_of(make_model("llama", num_hidden_layers=3)), prefetch=True)
    first, third = weights(reader, 0), weights(reader, 2)
    assert not torch.equal(first["mlp.up_proj.weight"], third["mlp.up_proj.weight"])
    reader.close()
