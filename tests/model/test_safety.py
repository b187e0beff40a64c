"""What a folder by someone else may not do: run code, read outside itself, have two answers, command a terminal."""

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitquilt
from bitquilt import UserError
from bitquilt.data.calibration import load_tokenizer, sample_from_model
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.safety import trusted_text
from bitquilt.model.structure import open_skeleton
from bitquilt.report.evaluation.loading import as_model

MakeModel = Callable[..., Path]
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit('code of the folder ran')"


class _Ran:
    """What a hostile pickle holds: opening it ends the process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("the pickle ran",)


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    shutil.copytree(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def halves(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's tensors in two parts; its folder has lost them. `UP` is in the first."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    middle = names.index(UP) + 1
    return {n: tensors[n] for n in names[:middle]}, {n: tensors[n] for n in names[middle:]}


def write_index(folder: Path, **files: dict[str, torch.Tensor]) -> None:
    weight_map = {name: f"{file}.safetensors" for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_tokenizers_own_code_never_runs_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}, "tokenizer_class": "Tok"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tok.py").write_text(CODE)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # `yes | bitquilt quantize`
    text = folder.with_name("text.txt")
    text.write_text("words " * 99)
    with pytest.raises(UserError, match=r"Python code of its own, which was not run.*--trust-remote-code"):
        bitquilt.quantize(folder, "gptq", text, folder.with_name("out"), bits=3, group_size=8, samples=2, seq_len=8)
    assert not list(folder.rglob("ran"))
    with pytest.raises(SystemExit, match="code of the folder ran"):
        load_tokenizer(folder, trust_remote_code=True)


def test_a_models_own_code_never_runs_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, model_type="own")
    (folder / "own.py").write_text(CODE)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError):
        open_skeleton(open_checkpoint(folder))
    with pytest.raises(UserError, match="trust_remote_code"):
        as_model(folder, "cpu", None)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_from_the_hub_is_refused(folder: Path, key: str, nested: bool) -> None:
    value: dict[str, Any] = {key: "org/kernel"}
    edit(folder / "config.json", **({"text_config": value} if nested else value))
    with pytest.raises(UserError, match=rf"config\.json sets {key} to 'org/kernel'.*download and run"):
        open_checkpoint(folder)
    edit(folder / "config.json", **{"text_config": None, key: "eager"})
    open_checkpoint(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with (folder / "pytorch_model.bin").open("wb") as stream:
        pickle.dump(_Ran(), stream)
    checkpoint = open_checkpoint(folder)
    ids = sample_from_model(checkpoint, samples=1, seq_len=4, seed=0, vocabulary=64, progress=lambda _: None)
    assert ids.shape == (1, 4)
    loaded = as_model(folder, "cpu", None)
    assert torch.equal(loaded.state_dict()[UP], checkpoint.read([UP])[UP])


def test_an_index_cannot_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "outside" / "x.safetensors")
    for entry in ("../outside/x.safetensors", str(tmp_path / "outside" / "x.safetensors")):
        (folder / INDEX).write_text(json.dumps({"weight_map": {UP: entry}}))
        with pytest.raises(UserError, match="outside the model's folder"):
            open_checkpoint(folder)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "model.safetensors", "config.json"])
def test_a_link_cannot_lead_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    private = tmp_path / "private"
    shutil.copyfile(folder / name, private) if (folder / name).exists() else private.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(UserError, match=rf"{name} leads to .*private, which is outside the model's folder"):
        bitquilt.quantize(folder, "rtn", out=tmp_path / "out", bits=3, group_size=8)


def test_the_hubs_cache_is_links_to_its_own_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_checkpoint(snapshot).tensors.keys() == open_checkpoint(folder).tensors.keys()
    (tmp_path / "link").symlink_to(folder)  # a link to a whole folder is the user's own
    assert open_checkpoint(tmp_path / "link").tensors.keys() == open_checkpoint(folder).tensors.keys()


def test_a_stale_model_beside_an_index_is_refused(folder: Path, halves: Any) -> None:
    write_index(folder, one=halves[0], two=halves[1])
    open_checkpoint(folder)
    save_file({n: 5 * t for part in halves for n, t in part.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"two models: model\.safetensors.*one\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [True, False])
def test_two_values_of_a_tensor_are_refused_and_copies_are_not(folder: Path, halves: Any, index: bool) -> None:
    for factor in (1, 5):
        write_index(folder, one=halves[0], two=halves[1] | {UP: factor * halves[0][UP]})
        if not index:
            (folder / INDEX).unlink()
        if factor == 1:
            assert torch.equal(open_checkpoint(folder).read([UP])[UP], halves[0][UP])
            continue
        with pytest.raises(UserError, match=rf"two values.*{UP} in one\.safetensors.*in two\.safetensors"):
            open_checkpoint(folder)


def test_a_tensor_with_and_without_prefix_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    short = UP.removeprefix("model.")
    for factor in (1, 5):
        save_file(tensors | {short: factor * tensors[UP]}, folder / "model.safetensors", {"format": "pt"})
        checkpoint = open_checkpoint(folder)
        if factor == 1:
            open_skeleton(checkpoint)
            continue
        with pytest.raises(UserError, match=rf"two values of one parameter: .*{short}"):
            open_skeleton(checkpoint)


def test_every_reader_takes_the_same_files(folder: Path, halves: Any) -> None:
    save_file(halves[0], folder / "a.safetensors")
    save_file(halves[1], folder / "b.safetensors")
    checkpoint = open_checkpoint(folder)
    loaded = as_model(folder, "cpu", None).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in checkpoint.read(checkpoint.tensors).items())


@pytest.mark.parametrize("entry", [3, None, "model.bin", ["x"]])
def test_an_index_of_something_else_is_refused(folder: Path, entry: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {UP: entry}}))
    with pytest.raises(UserError, match=r"wanted the name of a \.safetensors file"):
        open_checkpoint(folder)


def test_control_characters_are_removed() -> None:
    assert trusted_text("a\x1b[31mb\x9bc\r\x07\u202ed\u2066") == "a[31mbcd"
    assert trusted_text("ümlaut\tand\nline 💾") == "ümlaut\tand\nline 💾"
