"""Predicted bytes are written bytes: every file, every family, every recipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitquilt import Result
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.config import read_layouts
from bitquilt.model.memory import memory_bytes
from bitquilt.model.structure import open_skeleton
from bitquilt.planning.folder_size import Sizes, file_bytes, json_bytes
from bitquilt.stream.workdir import write_json
from bitquilt.stream.writer import write_reports


def test_headers_with_every_type_and_odd_names(tmp_path: Path) -> None:
    tensors = {
        "z.codes_0": torch.zeros(3, 5, dtype=torch.uint8),
        "a.scale_0": torch.zeros(7, 1, dtype=torch.float16),
        "a.bf": torch.zeros(7, dtype=torch.bfloat16),
        "größe": torch.zeros(1, 2, 3, dtype=torch.float32),
        "double": torch.zeros((), dtype=torch.float64),
        "order": torch.zeros(9, dtype=torch.int16),
        "rows": torch.zeros(4, dtype=torch.int32),
        "long": torch.zeros(0, 4, dtype=torch.int64),
        "levels": torch.zeros(2, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    spelled = {
        torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
        torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
    }  # fmt: skip
    stored = [(name, spelled[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    assert file_bytes(stored) == (tmp_path / "x.safetensors").stat().st_size


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        _PLAIN,
        lambda inside: (
            st.lists(inside, max_size=3)
            | st.dictionaries(st.text(max_size=3), inside, max_size=3)
            | st.tuples(inside, inside)
        ),
        max_leaves=12,
    )
)
def test_json_is_counted_as_it_is_written(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "value.json", value)
    assert json_bytes(value) == (tmp_path / "value.json").stat().st_size


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "opt", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("recipe", ["slim-llm", "rtn"])
def test_a_folder_takes_what_is_predicted(
    family: str, recipe: str, make_model: Callable[..., Path], make_quantized: Callable[..., Result]
) -> None:
    folder = make_quantized(family, recipe).folder
    layouts = read_layouts(json.loads((folder / "config.json").read_text()))
    plan = (folder / "plan.json").stat().st_size
    size = Sizes(open_skeleton(open_checkpoint(make_model(family))), list(layouts), plan_text=plan, digits=0).of(
        layouts
    )
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert size.tensors == sum(count for name, count in written.items() if name.endswith(".safetensors"))
    report = written.pop("report.json")
    assert size.tensors + size.small == sum(written.values())
    assert json.loads((folder / "report.json").read_text())["folder_bytes"] == sum(written.values()) + report


def test_a_head_has_a_file_of_its_own(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    folder = quantize_tiny(make_model(), tmp_path / "out", "rtn", include_head=True).folder
    layouts = read_layouts(json.loads((folder / "config.json").read_text()))
    skeleton = open_skeleton(open_checkpoint(make_model()))
    size = Sizes(skeleton, list(layouts), plan_text=0, digits=0).of(layouts)
    assert size.tensors == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_an_embedding_in_few_bits_has_a_file_of_its_own(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    result = quantize_tiny(make_model("llama-tied-bias"), tmp_path / "out", "rtn", embedding_bits=4)
    assert result.report["folder_bytes"] == sum(path.stat().st_size for path in result.folder.iterdir())


def report_of(count: int) -> dict[str, Any]:
    events = [{"layer": "x", "kind": "k", "detail": "d" * 50}] * count
    return {"fingerprint": {}, "events": events, "layers": {}, "folder_bytes": 20_000}


@pytest.mark.parametrize(("count", "kept"), [(3, 3), (150, 150), (400, 200)])
def test_a_report_fills_its_room_and_drops_events_only_for_a_promise(count: int, kept: int, tmp_path: Path) -> None:
    for promised in (True, False):
        folder = tmp_path / str(promised)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
        write_reports(folder, {"layers": {}}, report_of(count), 20_000, promised)
        report = json.loads((folder / "report.json").read_text())
        total = sum(path.stat().st_size for path in folder.iterdir())
        if promised:
            assert total == 20_000
            assert len([e for e in report["events"] if e["kind"] == "k"]) == kept
            assert (report["events"][-1]["kind"] == "events left out") == (kept < count)
        else:
            assert len(report["events"]) == count
        assert report["folder_bytes"] == 20_000 if promised else total - 1 <= report["folder_bytes"] <= total + 1


def test_memory_counts_what_is_loaded(make_quantized: Callable[..., Result], make_model: Callable[..., Path]) -> None:
    folder = make_quantized("llama", "rtn").folder
    layouts = read_layouts(json.loads((folder / "config.json").read_text()))
    stored = sum(info.nbytes for info in open_checkpoint(folder).tensors.values())
    skeleton = open_skeleton(open_checkpoint(make_model("llama")))
    memory = memory_bytes(skeleton, layouts, 100)
    assert memory.weights == stored
    assert memory.cache == 2 * 2 * 2 * (2 * 8) * 100  # keys and values, 16 bits, 2 blocks, 2 heads of 8, 100 tokens
    assert memory.total == memory.weights + memory.cache + memory.workspace
    assert memory_bytes(skeleton, layouts, 200).cache == 2 * memory.cache
