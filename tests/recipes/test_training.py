"""Recipes that train blocks, end to end on tiny models: laws of SliM-LLM+, resume, events, and the trained quilt."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bitquilt
from bitquilt import UserError
from bitquilt.core.events import BlockDone, Epoch, Stage
from bitquilt.core.training import BlockProblem, BlockTraining, TrainedLayers, Training
from bitquilt.recipes import make_recipe
from bitquilt.recipes.cmpq.cmpq_plus import CMPQPlus
from bitquilt.recipes.quilt import Quilt
from bitquilt.train.problem import TrainingSettings

PLUS: dict[str, Any] = {"recipe": "slim-llm+", "published": True, "epochs": 12}
SWEPT: dict[str, Any] = {**PLUS, "published": False}
NORMAL: dict[str, Any] = {"recipe": "quilt", "bits": 2, "effort": "normal", "epochs": 8}
BEST: dict[str, Any] = {**NORMAL, "effort": "best", "epochs": 2, "tune_epochs": 4, "tune_rate": 5e-3}
LEVELS: dict[str, Any] = {"recipe": CMPQPlus(bits=2.5, effort="normal", epochs=4)}
LEVELS_BEST: dict[str, Any] = {"recipe": replace(LEVELS["recipe"], effort="best", tune_epochs=4, tune_rate=5e-3)}
CLIPPING: dict[str, Any] = {"recipe": "gptq", "bits": 2, "clipping": "trained"}


def training_of(work: Path) -> list[dict[str, Any]]:
    """The entries on training in the blocks' records."""
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
@pytest.mark.parametrize(
    "options",
    [PLUS, SWEPT, NORMAL, {**NORMAL, "bits": 3}, LEVELS],
    ids=["slim-llm+", "slim-llm+-swept", "quilt", "quilt-3-bits", "cmpq+"],
)
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
        best = min([training["start_loss"], *training["losses"]])
        assert training["loss"] == pytest.approx(training["losses"][-1] if options is PLUS else best)
    if options is PLUS:  # random weights of 32 columns leave trained rounding little to find
        assert any(training["loss"] < 0.98 * training["start_loss"] for training in told)
    model = bitquilt.load(tmp_path / "out")
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(3, 13).unsqueeze(0)).logits).all())


@pytest.mark.parametrize(("family", "bits"), [("llama", 2), ("gpt2", 3), ("llama-tied-bias", 2)])
def test_the_whole_model_does_not_get_worse_and_the_checkpoint_is_what_was_trained(
    family: str,
    bits: int,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
) -> None:
    told: list[Epoch] = []
    result = quantize_tiny(
        make_model(family),
        tmp_path / "out",
        **{**BEST, "bits": bits},
        observer=lambda event: told.append(event) if isinstance(event, Epoch) else None,
    )
    tuning = result.report["tuning"]
    assert tuning["loss"] == min(tuning["start_loss"], *tuning["losses"])
    assert result.report["logit_difference"] < 1e-4
    of_model = [event for event in told if event.where == "the whole model"]
    assert [event.done for event in of_model] == [0, 1, 2, 3, 4]
    assert of_model[-1].loss == tuning["loss"]
    assert all(event.left > 0 for event in of_model[1:-1])
    layers = result.report["layers"].values()
    assert all(layer["output_error"] > 0 and layer["seconds"] >= 0 for layer in layers)


def test_scales_learn_and_codes_stay_where_the_rate_of_these_is_zero(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    settings = {"bits": 2, "group_size": 8}
    fast = read_tensors(quantize_tiny(make_model(), tmp_path / "fast", Quilt(**settings), self_samples=58).folder)
    recipe = Quilt(**settings, effort="best", epochs=0, tune_epochs=4, tune_rate=0.0)
    result = quantize_tiny(make_model(), tmp_path / "scales", recipe, self_samples=58)
    found = read_tensors(result.folder)
    assert result.report["training"] == {}
    assert result.report["tuning"]["loss"] < result.report["tuning"]["start_loss"]
    assert all(torch.equal(found[name], fast[name]) for name in fast if ".codes_" in name)
    assert any(not torch.equal(found[name], fast[name]) for name in fast if ".scale_" in name)


def test_a_head_of_its_own_is_quantized_after_the_model_is_trained(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    result = quantize_tiny(make_model(), tmp_path / "out", **BEST, include_head=True)
    assert "lm_head" in result.report["layers"]
    assert result.report["tuning"]["loss"] <= result.report["tuning"]["start_loss"]
    assert result.report["logit_difference"] < 1e-4


def test_no_memory_for_the_whole_model_is_said_before_anything_is_computed(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5, total=10**6))
    with pytest.raises(
        UserError, match=r"all blocks together takes .* GB and 0\.0 GB of memory are free; effort=normal"
    ):
        quantize_tiny(make_model(), tmp_path / "out", **BEST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [NORMAL, BEST, LEVELS_BEST, CLIPPING], ids=["normal", "best", "levels", "clipping"])
def test_training_continues_with_the_same_bytes_after_every_interruption(
    options: dict[str, Any],
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
) -> None:
    """Killed after the first block, after an epoch of the whole model, between the blocks that it changed, before the
    logits."""

    class Interrupted(Exception):
        pass

    def interrupt(stop: Callable[[Any], bool]) -> None:
        def observe(event: object) -> None:
            if stop(event):
                raise Interrupted

        with pytest.raises(Interrupted):
            quantize_tiny(make_model(), tmp_path / "out", **options, self_samples=4, observer=observe)

    whole = quantize_tiny(make_model(), tmp_path / "whole", **options, self_samples=4).folder
    interrupt(lambda event: isinstance(event, BlockDone))
    if options in (BEST, LEVELS_BEST):
        interrupt(lambda event: isinstance(event, Epoch) and event.where == "the whole model" and event.done == 2)
        interrupt(lambda event: isinstance(event, Stage) and event.text == "writing the trained layers of block 2 of 2")
    interrupt(
        lambda event: isinstance(event, Stage) and event.text.startswith("computing the quantized model's logits")
    )
    out = quantize_tiny(make_model(), tmp_path / "out", **options, self_samples=4).folder
    for path in whole.iterdir():
        if path.name != "report.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_epochs_is_the_published_start_without_training(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    """Nothing is trained without epochs; the map is the same in both cases."""
    one = quantize_tiny(make_model(), tmp_path / "one", **{**PLUS, "epochs": 0})
    assert one.report["training"] == {}
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
    (tmp_path / "map.json").write_text(json.dumps({**plan, "recipe": {}}))  # another recipe, other bytes
    mixed = {**NORMAL, "plan": tmp_path / "map.json"}
    assert quantize_tiny(source, tmp_path / "mixed", **mixed).report["logit_difference"] < 1e-4


class Falling(Quilt):
    """Training reports an event, as it does when a loss is not finite."""

    @property
    def training(self) -> Training:
        return Training(BlockTraining(4, self._break))

    def _break(self, problem: BlockProblem) -> TrainedLayers:
        forward = problem.forward
        calls = []

        def breaking(weights: Any, hidden: Tensor) -> Tensor:
            calls.append(1)
            return forward(weights, hidden) * (float("nan") if len(calls) > 5 else 1.0)

        broken = BlockProblem(**{**vars(problem), "forward": breaking})
        return self.effort_training.train_block(broken)


def test_a_loss_that_breaks_is_in_the_report_and_the_block_keeps_its_start(
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    settings = {"bits": 2, "group_size": 8}
    recipe = Falling(**settings, effort="normal", epochs=8)
    result = quantize_tiny(make_model(), tmp_path / "out", recipe)
    kinds = {(event["layer"], event["kind"]) for event in result.report["events"]}
    assert kinds == {(f"model.layers.{i}", "training loss not finite") for i in range(2)}
    fast = read_tensors(quantize_tiny(make_model(), tmp_path / "fast", Quilt(**settings)).folder)
    found = read_tensors(result.folder)
    assert all(torch.equal(found[name], fast[name]) for name in fast)


@pytest.mark.parametrize("published", [True, False])
def test_as_published_all_samples_are_trained_on_and_the_last_epoch_stands(
    published: bool,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise one of six samples is held out."""
    found: list[TrainingSettings] = []

    class Stopped(Exception):
        pass

    def stop(_links: Any, _samples: Any, training: TrainingSettings, _told: Any) -> None:
        found.append(training)
        raise Stopped

    for module in ("recipes.slim_llm.slim_llm_plus", "recipes.shared.clipping"):
        monkeypatch.setattr(f"bitquilt.{module}.train", stop)
    with pytest.raises(Stopped):
        quantize_tiny(make_model(), tmp_path / "out", "slim-llm+", published=published)
    assert found[0].trained(6) == (6 if published else 5)
    assert found[0].kept_epoch == ("last" if published else "best")


def test_one_sample_is_too_few(
    make_model: Callable[..., Path], quantize_tiny: Callable[..., bitquilt.Result], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0: 1 sample to train on; wanted at least 2"):
        quantize_tiny(make_model(), tmp_path / "out", **NORMAL, samples=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slim-llm+", {"epochs": -1}, "epochs is -1"),
        ("slim-llm+", {"clipping": "solved"}, "option 'clipping': got 'solved'"),
        ("slim-llm+", {"published": True, "passes": 2}, "passes is 2; published=true has no sweep"),
        ("quilt", {"effort": "hard"}, "option 'effort': got 'hard'"),
        ("cmpq+", {"effort": "normal", "error_outliers": 0.01}, r"error_outliers is 0\.01; effort=normal trains codes"),
        ("quilt", {"alpha": 2.0}, r"alpha is 2\.0"),
        ("quilt", {"passes": -1}, "passes is -1"),
        ("quilt", {"tune_rate": -1.0}, r"tune_rate is -1\.0"),
        ("quilt", {"tune_epochs": -1}, "epochs is -1"),
        ("gptq", {"act_order": True, "group_order": True}, "two orders of the columns"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(name, **options)


CLIPPED: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"error_outliers": 0.02, "act_order": True},
    "slim-llm": {"group_order": True},
    "aptq": {"bits": 3.0},
    "mg-ptq": {"bits": 2.5},
}


@pytest.mark.parametrize("name", CLIPPED)
def test_trained_clipping_is_never_worse_and_takes_the_bytes_planned(
    name: str,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., bitquilt.Result],
    read_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    options = {"recipe": name, **CLIPPED[name]}
    plain = quantize_tiny(make_model(), tmp_path / "plain", **options)
    options |= {"clipping": "trained", "plan": plain.folder / "plan.json"}
    whole = quantize_tiny(make_model(), tmp_path / "whole", **options)
    training = whole.report["training"].values()
    assert len(training) == 2
    assert all(block["loss"] <= block["start_loss"] for block in training)
    if name == "rtn":  # of random weights a sweep leaves next to nothing to find
        assert any(block["loss"] < 0.99 * block["start_loss"] for block in training)
    assert whole.report["bpw"] == plain.report["bpw"]
    assert whole.report["logit_difference"] < 1e-4
    solved, trained = read_tensors(plain.folder), read_tensors(whole.folder)
    assert {key: t.shape for key, t in solved.items()} == {key: t.shape for key, t in trained.items()}
    # later blocks read another input
    first = [key for key in solved if key.startswith("model.layers.0.") and ".codes" in key]
    assert first
    assert all(torch.equal(solved[key], trained[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cmpq", "free levels"),
        ("cmpq+", "free levels"),
        ("micromix", "powers of two"),
        ("quilt", "effort=normal"),
    ],
)
def test_recipes_without_a_range_to_train_say_why(name: str, why: str) -> None:
    with pytest.raises(UserError, match=f"{name.replace('+', '.')} takes no clipping='trained': it .*{why}"):
        make_recipe(name, clipping="trained")
