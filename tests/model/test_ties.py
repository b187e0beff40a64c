"""Which layers a serving engine fuses: found for every family, never across inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import open_skeleton
from bitquilt.model.ties import tied_layers
from bitquilt.stream.job import all_targets, shapes


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]),
        ("opt", [("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")]),
        ("gpt2", []),
        ("phi3", []),
    ],
)
def test_families(family: str, expected: list[tuple[str, ...]], make_model: Callable[..., Path]) -> None:
    skeleton = open_skeleton(open_checkpoint(make_model(family)))
    found = tied_layers(skeleton.model, shapes(all_targets(skeleton, (), False)))
    block = f"{skeleton.blocks[0]}."
    assert [tuple(n.removeprefix(block) for n in names) for names in found if names[0].startswith(block)] == expected
    assert len(found) == 2 * len(expected)


def test_experts_of_one_kind_are_one() -> None:
    class Model:
        config = None

    layers = {
        f"layers.0.experts.{i}.{name}": (8, 16 if name == "w1" else 32) for i in range(3) for name in ("w1", "w2")
    }
    found = tied_layers(Model(), layers)
    assert sorted(map(len, found)) == [3, 3]
    assert {name.rsplit(".", 1)[1] for name in found[0]} == {"w1"}
