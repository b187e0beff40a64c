"""The outline of a model is its skeleton, wherever there is one; everywhere else the model is built."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitquilt.errors import UserError
from bitquilt.model import outline
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.outline import open_outline
from bitquilt.model.replace import embedding_path
from bitquilt.model.structure import Skeleton, open_skeleton
from bitquilt.model.ties import tied_layers
from bitquilt.planning.plan_model import plan
from bitquilt.planning.untouched import untouched_tensors
from bitquilt.stream.job import all_targets, head_path, shapes

MakeModel = Callable[..., Path]
KNOWN = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"head_dim": 12}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
]


def refuse(*_: object, **__: object) -> Skeleton:
    raise AssertionError("the model was built")


def facts(skeleton: Skeleton) -> dict[str, Any]:
    """All that planning reads of a skeleton."""
    layers = all_targets(skeleton, ("*.1.*.down_proj",), include_head=False)
    model = skeleton.model
    own = {name: (tuple(value.shape), value.is_meta) for name, value in model.state_dict().items()}
    return {
        "class": type(model).__name__,
        "blocks": skeleton.blocks,
        "sources": skeleton.sources,
        "parameters": skeleton.parameters,
        "tensors": own,
        "shapes": list(shapes(layers).items()),
        "ties": tied_layers(model, shapes(layers)),
        "survey": untouched_tensors(skeleton, layers),
        "embedding": embedding_path(model),
        "tied": dict(model.all_tied_weights_keys),
    }


@pytest.mark.parametrize(("family", "fields"), KNOWN)
def test_an_outline_says_what_the_skeleton_says(
    family: str, fields: dict[str, Any], make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_model(family, **fields))
    built = open_skeleton(checkpoint)
    monkeypatch.setattr(outline, "open_skeleton", refuse)
    drawn = open_outline(checkpoint)
    assert facts(drawn) == facts(built)
    if fields.get("tie_word_embeddings"):
        for skeleton in (drawn, built):
            with pytest.raises(UserError, match="lm_head shares its weight"):
                head_path(skeleton)
    else:
        assert head_path(drawn) == head_path(built) == "lm_head"


def test_where_the_config_is_silent_transformers_own_defaults_hold(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config as the hub has thousands: no head_dim, no word of ties or biases."""
    for family in ("llama", "mistral", "qwen2"):
        folder = shutil.copytree(make_model(family), tmp_path / family)
        config = json.loads((folder / "config.json").read_text())
        for key in ("head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias"):
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(folder)
        built = facts(open_skeleton(checkpoint))
        with monkeypatch.context() as context:
            context.setattr(outline, "open_skeleton", refuse)
            assert facts(open_outline(checkpoint)) == built


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": None},
        {"model_type": "mistral"},
        {"attention_bias": True},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": True},
        {"num_attention_heads": 3},
        {"num_key_value_heads": None},
        {"hidden_size": 64},
        {"hidden_size": -32},
        {"vocab_size": "64"},
        {"head_dim": 0},
        {"tie_word_embeddings": 1},
        {"tie_word_embeddings": True},
    ],
)
def test_anything_else_is_built_and_looked_at(
    change: dict[str, Any], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    monkeypatch.setattr(outline, "open_skeleton", refuse)
    with pytest.raises(AssertionError, match="the model was built"):
        open_outline(open_checkpoint(folder))


def test_a_tensor_too_many_or_too_few_is_looked_at(make_model: MakeModel, tmp_path: Path) -> None:
    tensors = load_file(make_model("llama") / "model.safetensors")
    more = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    for name, changed in (("more", more), ("fewer", dict(list(tensors.items())[1:]))):
        folder = shutil.copytree(make_model("llama"), tmp_path / name)
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
    assert "not part of this model class" in plan(tmp_path / "more", "rtn", group_size=8).untouched[-1].reason
    with pytest.raises(UserError, match="is missing in"):
        plan(tmp_path / "fewer", "rtn", group_size=8)
