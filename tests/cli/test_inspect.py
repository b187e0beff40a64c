"""`bitquilt inspect`: where the bits went, and what would be quantized."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bitquilt.cli.inspect import group_bar
from bitquilt.cli.inspect import inspect as verb
from bitquilt.report.facts import read_facts
from bitquilt.report.page_values import settings_of

from .conftest import Command


def test_layers_and_totals(command: Command, quantized: Path) -> None:
    ran = command("inspect", quantized, "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    plan = json.loads((quantized / "plan.json").read_text())["layers"]
    report = json.loads((quantized / "report.json").read_text())
    assert value["layers"].keys() == plan.keys()
    assert len(plan) == 14
    for name, layer in value["layers"].items():
        assert layer["groups"] == plan[name]["bits"]
        assert layer["bits"] == {bits: plan[name]["bits"].count(bits) for bits in sorted(set(plan[name]["bits"]))}
        assert layer["output_error"] == report["layers"][name]["output_error"] > 0
    assert value["layers"]["model.layers.0.mlp.up_proj"]["shape"] == [48, 32]
    for key in ("bpw", "nominal_bits", "bytes", "events", "untouched"):
        assert value[key] == report[key]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in value["layers"].values())
    stored = sum(layer["bpw"] * layer["shape"][0] * layer["shape"][1] for layer in value["layers"].values())
    assert value["bpw"] == pytest.approx(stored / weights)


def test_without_a_report_the_layouts_speak(command: Command, quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    told = json.loads(command("inspect", folder, "--json").out)
    (folder / "report.json").unlink()
    value = json.loads(command("inspect", folder, "--json").out)
    assert value["events"] is None
    assert value["bpw"] == told["bpw"]
    assert [layer["bits"] for layer in value["layers"].values()] == [layer["bits"] for layer in told["layers"].values()]
    assert command("inspect", folder).code == 0


def test_a_table_for_people(command: Command, quantized: Path) -> None:
    ran = command("inspect", quantized, "--layer", "*.0.mlp.*")
    rows = [line.split() for line in ran.out.splitlines() if "mlp" in line and "%" not in line]
    assert [row[0] for row in rows] == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert rows[0][1] == "48x32"
    assert "3 nominal" in ran.out
    assert "% of fp16" in ran.out
    assert "slim-llm: bits=3, group_size=16" in ran.out
    none = command("inspect", quantized, "--layer", "*.9.*")
    assert none.code == 2
    assert "no layer matches '*.9.*'; there are 14, such as model.layers.0.self_attn.q_proj" in none.err


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_it_fits(command: Command, quantized: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = Console(force_terminal=True, width=width, color_system="truecolor", highlight=False)
    monkeypatch.setitem(verb.__globals__, "stdout", console)
    ran = command("inspect", quantized)
    assert "\x1b[" in ran.out
    assert "by column" in ran.out
    assert "…" not in ran.out


def test_full_precision_lists_what_would_be_done(command: Command, tiny: Path) -> None:
    value = json.loads(command("inspect", tiny, "--json").out)
    assert value["quantized"] is False
    assert len(value["layers"]) == 14
    reasons = [item["reason"] for item in value["untouched"]]
    assert reasons[0].startswith("outside the blocks")
    assert value["bytes"] == sum(i["nbytes"] for i in value["untouched"]) + sum(
        layer["bytes"] for layer in value["layers"].values()
    )
    assert value["ratio_to_fp16"] == 1.0
    table = command("inspect", tiny).out
    assert "model.layers.1.mlp.down_proj" in table
    assert "100 % of fp16" in table


def test_another_tool_s_model_is_refused(command: Command, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    ran = command("inspect", folder)
    assert ran.code == 2
    assert "another tool (gptq)" in ran.err


def test_the_bar_has_a_digit_per_group_or_the_mean_of_neighbours() -> None:
    assert group_bar("1232", 8).plain == "1232"
    assert group_bar("11334422", 4).plain == "1342"
    assert group_bar("", 8).plain == ""
    colours = {str(span.style) for span in group_bar("12345678", 8).spans}
    assert len(colours) > 4


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e[/nope][bold]"


@pytest.mark.parametrize("flags", [(), ("--map",)])
def test_strings_of_a_checkpoint_do_not_reach_the_terminal_as_commands(
    command: Command, quantized: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    for name in ("config.json", "report.json", "plan.json"):
        text = (folder / name).read_text()
        text = text.replace("mlp.up_proj", f"mlp.{json.dumps(HOSTILE)[1:-1]}").replace('"q_proj', json.dumps(HOSTILE))
        (folder / name).write_text(text)
    report = json.loads((folder / "report.json").read_text())
    report["fingerprint"]["recipe"]["group_size"] = report["fingerprint"]["calibration"]["source"] = HOSTILE
    report["machine"]["cpu"] = HOSTILE
    report["events"] = [{"layer": HOSTILE, "kind": HOSTILE, "detail": HOSTILE}]
    (folder / "report.json").write_text(json.dumps(report))
    ran = command("inspect", folder, *flags)
    assert ran.code == 0
    assert "mlp.]0;owned[2J[/nope][bold]" in ran.out  # in the table and as markup, to the letter
    assert not set("\x1b\x07\u202e") & set(ran.out + ran.err)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": HOSTILE}}))
    ran = command("inspect", folder, *flags)
    assert ran.code == 2
    assert "error:" in ran.err
    assert not set("\x1b\x07\u202e") & set(ran.out + ran.err)


def test_verify_compares_every_byte(command: Command, quantized: Path, tiny: Path, tmp_path: Path) -> None:
    assert "files of weights are as they were written" in command("inspect", quantized, "--verify").out
    assert json.loads(command("inspect", quantized, "--verify", "--json").out)["verified_files"] > 1
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert command("inspect", folder).code == 0
    ran = command("inspect", folder, "--verify")
    assert (ran.code, ran.err.count("is not as it was written")) == (3, 1)
    assert shard.name in ran.err
    (folder / "report.json").unlink()
    assert "has no hashes to compare with" in command("inspect", folder, "--verify").err
    assert "is full precision" in command("inspect", tiny, "--verify").err


def test_a_scale_that_is_no_number_is_named(command: Command, quantized: Path, tmp_path: Path) -> None:
    """By inspect, and when the model is loaded; NaN elsewhere is named when text is written."""
    assert json.loads(command("inspect", quantized, "--json").out)["not_finite"] == []
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    place = "model.layers.1.mlp.up_proj"
    _spoil(folder, f"{place}.scale_0")
    assert json.loads(command("inspect", folder, "--json").out)["not_finite"] == [f"{place}.scale_0"]
    assert f"{place}.scale_0 hold NaN or infinity" in command("inspect", folder).out
    ran = command("generate", folder, "-p", "the", "-n", "2", "--device", "cpu")
    assert (ran.code, f"tensor {place}.scale_0 holds NaN or infinity" in ran.err) == (2, True)


def test_text_of_nan_is_refused_and_the_layer_named(command: Command, quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    _spoil(folder, "model.layers.1.input_layernorm.weight")
    ran = command("generate", folder, "-p", "the dog", "-n", "2", "--device", "cpu")
    assert ran.code == 2
    assert "the output of model.layers.1.input_layernorm is the first that is not" in ran.err


def _spoil(folder: Path, name: str) -> None:
    """Write NaN into a tensor of a checkpoint."""
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, shard, {"format": "pt"})


def test_a_source_that_another_tool_quantized_is_named(
    command: Command, quantized: Path, tiny: Path, tmp_path: Path
) -> None:
    """By inspect of the source, and of what was made of it."""
    shutil.copytree(tiny, tmp_path / "fp8")
    stored, scales = load_file(tiny / "model.safetensors"), {}
    for name in [name for name in stored if "_proj" in name]:
        scales[f"{name}_scale"] = torch.full((), 0.01)
        stored[name] = (stored[name].float() / 0.01).to(torch.float8_e4m3fn)
    save_file(stored | scales, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    ran = command("inspect", tmp_path / "fp8")
    assert "LlamaForCausalLM, quantized by another tool" in ran.out
    assert "fp8 with a scale per matrix, 8.0" in " ".join(ran.out.split())
    told = json.loads(command("inspect", tmp_path / "fp8", "--json").out)
    assert (told["source"]["matrices"], told["nominal_bits"]) == (14, 8)
    assert "was quantized by another tool" in command("inspect", tmp_path / "fp8", "--verify").err
    assert json.loads(command("inspect", tiny, "--json").out)["source"] is None
    shutil.copytree(quantized, tmp_path / "ours")
    report = json.loads((quantized / "report.json").read_text())
    report["model"]["source"] = told["source"]
    (tmp_path / "ours" / "report.json").write_text(json.dumps(report))
    assert "fp8 with a scale per matrix, 8.0" in " ".join(command("inspect", tmp_path / "ours").out.split())
    assert ("quantized source.format", "fp8 with a scale per matrix") in settings_of(read_facts(tmp_path / "ours"))
