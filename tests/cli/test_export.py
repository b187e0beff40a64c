"""`bitquilt export`, and `--for` of `plan` and `quantize`: what they print, and mistakes."""

import json
from pathlib import Path

import bitquilt

from .conftest import Command

DATA = ("--samples", "4", "--seq-len", "16")


def test_from_a_plan_for_mlx_to_its_folder(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--for", "mlx", "--recipe", "rtn", "--bits", "4", "--group-size", "16")
    ran = command("plan", tiny, *flags)
    assert ran.code == 2
    assert "groups of 16, MLX holds equal groups of 32, 64, 128 inputs; quantize with --group-size 32" in ran.err
    flags = (*flags[:-1], "32", "--skip", "*.down_proj")  # 48 inputs
    promised = json.loads(command("plan", tiny, *flags, "--json").out)["exported_bytes"]
    assert f"exported    {promised} bytes" in command("plan", tiny, *flags).out
    ran = command("quantize", tiny, tmp_path / "q", *flags, *DATA, "--calibration", text)
    assert ran.code == 0
    assert f"bitquilt export {tmp_path}/q {tmp_path}/q-mlx --to mlx" in ran.out
    ran = command("export", tmp_path / "q", tmp_path / "q-mlx", "--to", "mlx")
    assert ran.code == 0
    assert "12 x 4 bits in groups of 32" in ran.out
    assert f"{promised} bytes" in ran.out
    assert "difference  at most 0.00" in ran.out
    assert f"mlx_lm.generate --model {tmp_path}/q-mlx" in ran.out
    assert (tmp_path / "q-mlx" / "tokenizer.json").is_file()
    value = json.loads(command("export", tmp_path / "q", tmp_path / "again", "--to", "mlx", "--json").out)
    assert value["bytes"] == promised
    assert value["layers"]["model.layers.0.mlp.up_proj"] == {"bits": 4, "group_size": 32, "middle": False, "kind": ""}


def test_refusals(command: Command, quantized: Path, tmp_path: Path) -> None:
    ran = command("export", quantized, tmp_path / "out", "--to", "mlx")
    assert ran.code == 2
    assert "MLX cannot hold 14 of 14 layers" in ran.err
    assert not (tmp_path / "out").exists()
    assert command("export", quantized, tmp_path / "out").code == 2  # which engine?
    ran = command("export", quantized, tmp_path / "out", "--to", "lmx")
    assert "no engine is called 'lmx'; wanted mlx or vllm or gptq" in ran.err


def test_a_window_that_mlx_ignores_is_named(command: Command, make_model, token_file: Path, tmp_path: Path) -> None:
    model = make_model("mistral", hidden_size=64, intermediate_size=96)
    bitquilt.quantize(model, "rtn", token_file, tmp_path / "q", bits=4, group_size=32, samples=4, seq_len=16)
    ran = command("export", tmp_path / "q", tmp_path / "out", "--to", "mlx")
    assert "MLX ignores this model's sliding window of 6 tokens" in ran.out
