"""lm-eval gets the model as it is loaded, on a task made here: its own tasks fetch their data from a hub."""

import builtins
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitquilt.errors import UserError
from bitquilt.report.evaluation import run_tasks

from .conftest import tiny_llama

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1} | {word: index for index, word in enumerate("abcdefgh", start=2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task, four questions whose right answer is always `b`."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [{"question": f"a c {word}", "choices": ["b", "e"], "gold": 0} for word in "cdef"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return folder


def biased(word: int) -> torch.nn.Module:
    """A model that says `word` whatever comes before."""
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[word] = 5.0
    return model


def test_the_accuracy_is_that_of_the_model_handed_over(tasks: Path, tokenizer: Any) -> None:
    right = run_tasks(biased(3), tokenizer, ["tiny_choice"], include_path=tasks)
    wrong = run_tasks(biased(6), tokenizer, ["tiny_choice"], include_path=tasks)
    assert right["tiny_choice"]["acc,none"] == 1.0
    assert wrong["tiny_choice"]["acc,none"] == 0.0
    json.dumps(right)


def test_what_was_given_is_left_as_it_was(tasks: Path, tokenizer: Any) -> None:
    model = biased(3).train()
    random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    run_tasks(model, tokenizer, [str(tasks / "tiny_choice.yaml")], limit=2, batch_size=2)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.training
    assert tokenizer.pad_token is None


def test_tasks_that_cannot_be_run(tasks: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="knows no task nosuchtask"):
        run_tasks(biased(3), tokenizer, ["nosuchtask", "tiny_choice"], include_path=tasks)
    with pytest.raises(UserError, match="no tasks given"):
        run_tasks(biased(3), tokenizer, [])
    with pytest.raises(UserError, match="limit is 0"):
        run_tasks(biased(3), tokenizer, ["tiny_choice"], limit=0)
    (tasks.parent / "data.jsonl").unlink()
    with pytest.raises(UserError, match="lm-eval stopped on tiny_choice"):
        run_tasks(biased(3), tokenizer, ["tiny_choice"], include_path=tasks)


def test_without_lm_eval_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    really = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'bitquilt\[lm-eval\]'"):
        run_tasks(None, None, ["arc_easy"])
