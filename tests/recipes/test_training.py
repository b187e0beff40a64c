"""Recipes that train blocks, end to end on tiny models: laws of SliM-LLM+, resume, events, and the trained quilt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitquilt
from bitquilt import UserError
from bitquilt.recipes import make_recipe
from bitquilt.recipes.quilt import Quilt
from bitquilt.runtime.progress import BlockDone, Stage
from bitquilt.types import BlockProblem, BlockSolution

PLUS: dict[str, Any] = {"recipe": "slim-llm+", "epochs": 6, "rate": 5e-2, "batch": 2}
NORMAL: dict[str, Any] = {"recipe": "quilt", "bits": 2, "effort": "normal", "epochs": 8, "batch": 2}


def training_of(work: Path) -> list[dict[str, Any]]:
    """What the blocks' records say about training."""
    return [json.loads(path.read_text())["training"] for path in sorted(work.glob("block-*.json"))]


def kept_work(run: Callable[..., Any], out: Path) -> list[dict[str, Any]]:
    """Run, and read the records just before the work directory goes."""
    found: list[dict[str, Any]] = []

    def watch(event: object) -> None:
        if isinstance(event, Stage) and event.text.startswith("writing the checkpoint"):
            found.extend(training_of(out.with_name(f"{out.name}.work")))

    run(out, observer=watch)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [PLUS, NORMAL], ids=["slim-llm+", "quilt"])
def test_blocks_get_better_and_the_checkpoint_is_what_was_trained(
    family: str,
    options: dict[str, Any],
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
) -> None:
    told = kept_work(lambda out, **o: quantize_tiny(make_model(family), out, **options, **o), tmp_path / "out")
    assert len(told) == 2
    for training in told:
        assert training["loss"] <= training["start_loss"]
        assert training["loss"] == pytest.approx(min([training["start_loss"], *training["losses"]]))
    if (
        options is PLUS
    ):  # random weights of 32 columns leave trained rounding little to find: tests/solvers has its gain
        assert any(training["loss"] < 0.98 * training["start_loss"] for training in told)
    model = bitquilt.load(tmp_path / "out")
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(3, 13).unsqueeze(0)).logits).all())


def test_training_continues_with_the_same_bytes_after_an_interruption(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(event: object) -> None:
        if isinstance(event, BlockDone):
            raise Interrupted

    whole = quantize_tiny(make_model(), tmp_path / "whole", **NORMAL).folder
    with pytest.raises(Interrupted):
        quantize_tiny(make_model(), tmp_path / "out", **NORMAL, observer=interrupt)
    out = quantize_tiny(make_model(), tmp_path / "out", **NORMAL).folder
    for path in whole.iterdir():
        if path.name != "report.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_epochs_is_the_published_start_without_training(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    """Factors of sigmoid(4) where nothing is trained; the map is the same whatever is trained."""
    one = quantize_tiny(make_model(), tmp_path / "one", **{**PLUS, "epochs": 0})
    other = quantize_tiny(make_model(), tmp_path / "other", **{**PLUS, "rate": 0.0})
    tensors, again = read_tensors(one.folder), read_tensors(other.folder)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    trained = quantize_tiny(make_model(), tmp_path / "trained", **PLUS)
    assert trained.report["bpw"] == one.report["bpw"]
    assert (trained.folder / "plan.json").read_text().split('"layers"')[1] == (
        one.folder / "plan.json"
    ).read_text().split('"layers"')[1]


def test_one_bit_groups_are_trained_too(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    source = make_model()
    plain = quantize_tiny(source, tmp_path / "plain", **{**PLUS, "epochs": 0, "bits": 2})
    plan = json.loads((plain.folder / "plan.json").read_text())
    for layer in plan["layers"].values():
        layer["bits"] = ("13" + layer["bits"][2:])[: len(layer["bits"])]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = {**PLUS, "bits": 2, "plan": tmp_path / "plan.json"}
    told = kept_work(lambda out, **o: quantize_tiny(source, out, **options, **o), tmp_path / "out")
    assert any(training["loss"] < training["start_loss"] for training in told)
    mixed = {**NORMAL, "plan": tmp_path / "plan.json"}
    assert quantize_tiny(source, tmp_path / "mixed", **mixed).report["logit_difference"] < 1e-4


class Falling(Quilt):
    """Training reports an event, as it does when a loss is not finite."""

    def train_block(self, problem: BlockProblem) -> BlockSolution:
        forward = problem.forward
        calls = []

        def breaking(weights: Any, hidden: Tensor) -> Tensor:
            calls.append(1)
            return forward(weights, hidden) * (float("nan") if len(calls) > 5 else 1.0)

        broken = BlockProblem(**{**vars(problem), "forward": breaking})
        return super().train_block(broken)


def test_a_loss_that_breaks_is_in_the_report_and_the_block_keeps_its_start(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    settings = {"bits": 2, "group_size": 8}
    recipe = Falling(**settings, effort="normal", epochs=8, batch=2)
    result = quantize_tiny(make_model(), tmp_path / "out", recipe)
    kinds = {(event["layer"], event["kind"]) for event in result.report["events"]}
    assert kinds == {(f"model.layers.{i}", "training loss not finite") for i in range(2)}
    fast = read_tensors(quantize_tiny(make_model(), tmp_path / "fast", Quilt(**settings)).folder)
    found = read_tensors(result.folder)
    assert all(torch.equal(found[name], fast[name]) for name in fast)


def test_one_sample_is_too_few(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0: 1 sample to train on; wanted at least 2"):
        quantize_tiny(make_model(), tmp_path / "out", **NORMAL, samples=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slim-llm+", {"batch": 3}, "batch is 3; wanted a power of two"),
        ("slim-llm+", {"epochs": -1}, "epochs is -1"),
        ("slim-llm+", {"rate": -0.1}, r"rate is -0\.1"),
        ("quilt", {"effort": "hard"}, "option 'effort': got 'hard'"),
        ("quilt", {"alpha": 2.0}, r"alpha is 2\.0"),
        ("quilt", {"passes": -1}, "passes is -1"),
        ("gptq", {"act_order": True, "group_order": True}, "two orders of the columns"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(name, **options)
