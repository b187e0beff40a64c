"""A tiny checkpoint with an evaluation, to read, to change and to show."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitquilt
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.report import describe_evaluation, remember
from bitquilt.report.evaluation import evaluate


@pytest.fixture(scope="session")
def measured(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    token_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with three checkpoints of one model, each with its evaluation.json. Do not write there."""
    study = tmp_path_factory.mktemp("study")
    source = make_model("llama")
    for name, recipe, options in (
        ("slim", "slim-llm", {}),
        ("rtn", "rtn", {}),
        ("rtn-4", "rtn", {"bits": 4}),
    ):
        quantize_tiny(source, study / name, recipe, **options)
        figures = evaluate(study / name, token_file, reference=source, seq_len=16)
        record = describe_evaluation(name, figures, text=token_file, reference=open_checkpoint(source))
        assert remember(open_checkpoint(study / name), record) == study / name / "evaluation.json"
    return study


@pytest.fixture
def slim(measured: Path, tmp_path: Path) -> Path:
    """A copy of one of them, free to change."""
    folder = tmp_path / "slim"
    shutil.copytree(measured / "slim", folder)
    return folder


@pytest.fixture
def change() -> Callable[..., None]:
    """`(file, **keys)`: set top-level keys of a JSON file; None removes."""

    def change(path: Path, **keys: Any) -> None:
        value = json.loads(path.read_text()) | keys
        path.write_text(json.dumps({key: inner for key, inner in value.items() if inner is not None}))

    return change
