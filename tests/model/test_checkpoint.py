"""Which folders open, what is read, and every damaged folder by its message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitquilt import UserError
from bitquilt.model.checkpoint import Checkpoint, open_checkpoint
from bitquilt.model.outline import open_outline
from bitquilt.model.structure import find_blocks, linear_layers, open_skeleton
from bitquilt.stream.writer import streamed_logits

MakeModel = Callable[..., Path]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny Llama, to be damaged."""
    shutil.copytree(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(build_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    build_model().save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    for key, change in changes.items():
        if change is None:
            del value[key]
        else:
            value[key] = change
    path.write_text(json.dumps(value))


def test_a_sharded_checkpoint_is_the_same_tensors(folder: Path, sharded: Path) -> None:
    one, many = open_checkpoint(folder), open_checkpoint(str(sharded))
    assert one.tensors.keys() == many.tensors.keys()
    assert one.nbytes == many.nbytes == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert len({info.file for info in many.tensors.values()}) > 3
    read_one, read_many = one.read(one.tensors), many.read(one.tensors)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(read_one[name], tensor)
        assert torch.equal(read_many[name], tensor)
        assert one.tensors[name].shape == tuple(tensor.shape)


def test_what_is_read_belongs_to_the_caller(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    name = "model.norm.weight"
    checkpoint.read([name])[name].zero_()
    assert float(checkpoint.read([name])[name].abs().sum()) > 0


def test_other_files_beside_the_model_are_not_read_as_weights(folder: Path) -> None:
    save_file({"lora.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    save_file({"model.norm.weight": torch.ones(9)}, folder / "consolidated.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == load_file(folder / "model.safetensors").keys()
    assert checkpoint.tensors["model.norm.weight"].shape == (32,)


def test_weights_under_another_name_are_found(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "model.norm.weight" in open_checkpoint(folder).tensors


def test_companions_are_the_small_files_that_are_no_weights(folder: Path) -> None:
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "vocab.txt",
        "pytorch_model.bin",
        "x.gguf",
        ".hidden",
        "README.md",
    ):
        (folder / name).write_text("x")
    (folder / "original").mkdir()
    names = {path.name for path in open_checkpoint(folder).companions()}
    assert names == {"generation_config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt"}


def test_the_fingerprint_tells_models_apart(folder: Path, make_model: MakeModel) -> None:
    first = open_checkpoint(folder).fingerprint()
    assert first == open_checkpoint(make_model()).fingerprint()  # wherever it lies
    assert first != open_checkpoint(make_model(seed=1)).fingerprint()
    assert first != open_checkpoint(make_model(dtype=torch.bfloat16)).fingerprint()
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert first != open_checkpoint(folder).fingerprint()


def test_the_fingerprint_sees_every_byte(folder: Path) -> None:
    """Samples of 64 places missed edits of most of a file."""
    save_file({"x": torch.zeros(2**21)}, folder / "model.safetensors")
    before = open_checkpoint(folder).fingerprint()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    last = open_checkpoint(folder).fingerprint()
    content[-1] ^= 1
    content[len(content) // 64 - 9999] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert len({before, last, open_checkpoint(folder).fingerprint()}) == 3


@pytest.mark.parametrize("name", ["nothing/here/at-all", "/nothing", "./nothing", "nothing"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"no folder at '{name}'"):
        open_checkpoint(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        open_checkpoint(folder / "config.json")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model has no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00", b""])
def test_a_config_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json (is not JSON|holds a list)"):
        open_checkpoint(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model has no \.safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=rf"pickled weights only \({name}\).*save_pretrained"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated"):
        open_checkpoint(folder)


def test_an_index_that_names_a_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"{INDEX} names {gone.name}, which is not in"):
        open_checkpoint(sharded)


def test_an_index_that_names_a_missing_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    file = index["weight_map"]["lm_head.weight"]
    edit_json(sharded / INDEX, weight_map={**index["weight_map"], "model.extra.weight": file})
    with pytest.raises(UserError, match=rf"{INDEX} names tensor model\.extra\.weight"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match=rf"{INDEX} (is not JSON|has no weight_map)"):
        open_checkpoint(sharded)


def test_a_config_without_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type=None)
    with pytest.raises(UserError, match=r"config\.json has no model_type"):
        open_skeleton(open_checkpoint(folder))


def test_an_unknown_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama-from-the-future")
    with pytest.raises(UserError, match=r"does not know this model.*llama-from-the-future"):
        open_skeleton(open_checkpoint(folder))


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "sine"}, {"num_hidden_layers": -1}]
)
def test_a_config_no_model_can_be_built_from(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(UserError, match=r"config\.json|no blocks"):
        open_skeleton(open_checkpoint(folder))


def test_a_model_class_transformers_does_not_have(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForTelepathy"])
    assert type(open_skeleton(open_checkpoint(folder)).model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named_before_the_run(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"tensor {name} is missing .* incomplete"):
        open_skeleton(open_checkpoint(folder))


def test_a_missing_expert_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    shutil.copytree(make_model("mixtral"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name or "experts" not in name}
    assert len(kept) == len(tensors) - 12
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.experts\.\w+ is missing"):
        open_skeleton(open_checkpoint(tmp_path / "model"))


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(40, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    skeleton = open_skeleton(open_checkpoint(folder))
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight has shape .*40, 32.* wants"):
        skeleton.load("model.layers.1")


def test_blocks_are_found_not_listed(make_model: MakeModel) -> None:
    expected = {
        "llama": "model.layers.",
        "opt": "model.decoder.layers.",
        "gpt2": "transformer.h.",
        "bert": "bert.encoder.layer.",
    }
    for family, prefix in expected.items():
        skeleton = open_skeleton(open_checkpoint(make_model(family)))
        assert skeleton.blocks == (f"{prefix}0", f"{prefix}1")
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential has no blocks \(a ModuleList of modules with nn\.Linear\)"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(8, 8)))


def test_the_largest_list_of_modules_is_the_models_body() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
            block = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))})
            self.body = torch.nn.ModuleList([block, block])
            self.empty = torch.nn.ModuleList(torch.nn.LayerNorm(99) for _ in range(9))

    model = Model()
    assert find_blocks(model) == ("body.0", "body.1")
    assert list(linear_layers(model.body[0])) == ["experts.0", "experts.1", "experts.2"]


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "opt"])
def test_weights_go_when_they_are_released(family: str, make_model: MakeModel) -> None:
    skeleton = open_skeleton(open_checkpoint(make_model(family)))

    def held() -> list[str]:
        return [name for name, p in skeleton.model.named_parameters(remove_duplicate=False) if not p.is_meta]

    for _ in range(2):
        with skeleton.resident(""):
            assert held()
            assert not any(name.startswith(skeleton.blocks) for name in held())
            assert not any(p.requires_grad for p in skeleton.model.parameters())
        assert held() == []
    before = list(skeleton.model.modules())  # what a caller that looked at the layers goes on holding

    def fail_in_the_block() -> None:
        with skeleton.resident(skeleton.blocks[0]):
            assert held()
            assert all(p.is_meta for module in before for p in module.parameters(recurse=False))
            assert all(name.startswith(f"{skeleton.blocks[0]}.") for name in held())
            assert not any(p.requires_grad for p in skeleton.model.parameters())
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail_in_the_block()
    assert held() == []


@pytest.mark.parametrize("stored", ["both", "head only"])
def test_ties_are_as_transformers_makes_them(stored: str, make_model: MakeModel, tmp_path: Path) -> None:
    """A config that says `tied` over two different tensors, and a tie stored under the head's name."""
    shutil.copytree(make_model("llama-tied-bias"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(path)
    if stored == "both":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    else:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, {"format": "pt"})
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    checkpoint: Checkpoint = open_checkpoint(tmp_path / "model")
    torch.testing.assert_close(streamed_logits(open_skeleton(checkpoint), ids), expected)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1e\+09, and the checkpoint holds \d+ tensors"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is not a number of layers"),
        ({"vocab_size": 10**30}, "no model can be built"),
        ({"hidden_size": 10**30}, "no model can be built"),
        ({"hidden_size": "wide"}, "no model can be built"),
        ({"model_type": ["llama"]}, r"does not know this model: model_type is \['llama'\]"),
    ],
)
def test_config_values_that_make_no_model_are_refused(
    make_model: Callable[..., Path], tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    folder = _with_config(make_model(), tmp_path, changed)
    with pytest.raises(UserError, match=match):
        open_outline(open_checkpoint(folder))


@pytest.mark.parametrize("names", [None, [None], [1, {}, "two"], "LlamaForCausalLM", 7])
def test_damaged_architectures_are_as_none(make_model: Callable[..., Path], tmp_path: Path, names: object) -> None:
    """The model type says which class it is."""
    folder = _with_config(make_model(), tmp_path, {"architectures": names})
    assert type(open_outline(open_checkpoint(folder)).model).__name__ == "LlamaForCausalLM"


def _with_config(model: Path, target: Path, changed: dict[str, Any]) -> Path:
    shutil.copytree(model, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changed))
    return target
