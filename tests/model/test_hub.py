"""A model by its hub id, from a small server on this machine that speaks as much of the hub's language as it takes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitquilt
from bitquilt import Budget, Result, UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.remote import open_headers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folders[repo]`; remembers which files were fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders: dict[str, Path] = {}
        self.fetched: list[str] = []
        self.sent: dict[str, int] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repo, rest = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]), parts[4 if parts[0] == "api" else 2 :]
        folder = self.server.folders.get(repo)
        if folder is None:
            self._send(404, b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and rest[:1] == ["revision"]:
            files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files}).encode(), body)
        elif parts[0] == "api":
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path)}
                for path in sorted(folder.iterdir())
            ]
            self._send(200, json.dumps(tree).encode(), body)
        else:
            path = folder / rest[-1]
            content, status = path.read_bytes() if path.is_file() else b"", 200 if path.is_file() else 404
            headers = (
                {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT} if content else {"X-Error-Code": "EntryNotFound"}
            )
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted and content:
                content, status = content[int(wanted[1]) : int(wanted[2]) + 1], 206
            if body:
                self.server.fetched.append(path.name)
                self.server.sent[path.name] = self.server.sent.get(path.name, 0) + len(content)
            self._send(status, content, body, headers)

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Only the environment names the server, as users do, after everything has been imported."""
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_comes_from_the_hub(
    hub: Hub, make_model: Callable[..., Path], quantize_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    hub.folders["org/tiny"] = folder = tmp_path / "served"
    folder.mkdir()
    for path in make_model().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.name == "org/tiny"
    expected = load_file(folder / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    assert checkpoint.read(["model.norm.weight"])["model.norm.weight"].equal(expected["model.norm.weight"])
    assert sorted(hub.fetched) == ["config.json", "generation_config.json", "model.safetensors"]
    assert checkpoint.fingerprint() == open_checkpoint(folder).fingerprint()

    result = quantize_tiny("org/tiny", tmp_path / "out", "rtn")
    assert hub.fetched.count("model.safetensors") == 1
    assert (result.folder / "generation_config.json").is_file()


def test_the_output_is_named_after_the_model_not_its_commit(
    hub: Hub,
    make_model: Callable[..., Path],
    quantize_tiny: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.folders["org/tiny"] = make_model()
    monkeypatch.chdir(tmp_path)
    assert quantize_tiny("org/tiny", None, "rtn").folder == Path("tiny-rtn")


def test_a_plan_reads_headers_only(hub: Hub, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    hub.folders["org/big"] = folder = tmp_path / "served"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("not copied")
    (folder / "merges.txt").write_text("copied along")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    least, most = bitquilt.plan(folder, "gptq", group_size=32).summary["reachable_bytes"]
    there = bitquilt.plan("org/big", "gptq", budget=Budget.of(size=(least + most) // 2), group_size=32)
    here = bitquilt.plan(folder, "gptq", budget=Budget.of(size=(least + most) // 2), group_size=32)
    assert set(hub.fetched) == {"config.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] <= 2 * 100_001 < (folder / "model.safetensors").stat().st_size
    assert there.plan_json() == here.plan_json()
    assert there.summary["bytes"] == here.summary["bytes"]


@pytest.mark.parametrize("name", ["org/nothing", "org/old", "org/broken"])
def test_a_plan_of_what_is_not_there(name: str, hub: Hub, make_model: Callable[..., Path], tmp_path: Path) -> None:
    for repo in ("org/old", "org/broken"):
        hub.folders[repo] = folder = tmp_path / repo
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((make_model() / "config.json").read_bytes())
    (tmp_path / "org/broken/model.safetensors").write_bytes(b"\x07 no header")
    with pytest.raises(UserError, match=r"org/"):
        bitquilt.plan(name, "gptq")


def test_a_repository_that_does_not_exist(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"'org/nothing' is neither a folder nor a hub repository"):
        open_checkpoint("org/nothing")


def test_a_repository_with_pickled_weights_only(hub: Hub, make_model: Callable[..., Path], tmp_path: Path) -> None:
    hub.folders["org/old"] = folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_bytes((make_model() / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(UserError, match=r"no \.safetensors file.*Pickled ones.*convert first: .*save_pretrained"):
        open_checkpoint("org/old")
    assert hub.fetched == ["config.json"]


def test_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no folder at 'org/tiny', and downloading it from the hub failed"):
        open_checkpoint("org/tiny")


def test_a_name_the_hub_would_not_take(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"no folder at 'org/-bad--name-'"):
        open_checkpoint("org/-bad--name-")


def test_headers_show_what_codes_decode_to(hub: Hub, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """A model that another tool quantized is planned like the full-precision one; only its headers are fetched."""
    hub.folders["org/fp8"] = folder = tmp_path / "served"
    folder.mkdir()
    model = make_model()
    tensors, scales = load_file(model / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], scales[f"{name}_scale"] = tensors[name].to(torch.float8_e4m3fn), torch.ones(())
    save_file(tensors | scales, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    there, here = open_headers("org/fp8"), open_checkpoint(folder)
    assert {n: (i.shape, i.dtype) for n, i in there.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in here.tensors.items()
    }
    assert there.source.name == here.source.name == "fp8 with a scale per matrix"
    assert "hf_quant_config.json" in hub.fetched
