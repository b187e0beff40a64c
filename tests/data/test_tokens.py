"""Text becomes one stream of token ids: every kind of source, every kind of bad input."""

import builtins
import hashlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from bitquilt.data import documents, tokens
from bitquilt.data.documents import content_hash, read_documents
from bitquilt.data.tokens import token_stream, windows
from bitquilt.errors import UserError

BOS = 256


def by_bytes(document: str, *, add_special_tokens: bool, truncation: bool, verbose: bool) -> dict[str, Any]:
    """A tokenizer whose ids can be read: a token a byte, after a BOS where special tokens are wanted."""
    assert truncation is False
    assert verbose is False
    ids = list(document.encode())
    return {"input_ids": [BOS, *ids] if add_special_tokens else ids}


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def ids_of(stream: torch.Tensor) -> str:
    """The stream as text, BOS shown as `^`."""
    return "".join("^" if token == BOS else chr(token) for token in stream.tolist())


def test_a_text_file_is_one_stream_without_special_tokens(tmp_path: Path) -> None:
    stream = token_stream(written(tmp_path / "a.txt", "one\n\ntwo\r\n"), by_bytes)
    assert stream.dtype == torch.int64
    assert ids_of(stream) == "one\n\ntwo\r\n"


def test_the_lines_of_a_jsonl_are_documents_with_special_tokens(tmp_path: Path) -> None:
    lines = '{"text": "one", "id": 3}\n\n"two"\n{"text": ""}\n{"text": "three"}'
    assert ids_of(token_stream(written(tmp_path / "a.jsonl", lines), by_bytes)) == "^one^two^three"


def test_a_parquet_file_is_a_document_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert ids_of(token_stream(path, by_bytes)) == "^one^two"


def test_a_folder_is_its_files_in_order_each_by_its_kind(tmp_path: Path) -> None:
    written(tmp_path / "b.txt", "second ")
    written(tmp_path / "a" / "deep.jsonl", '"first"')
    written(tmp_path / "c.jsonl", '"third"')
    written(tmp_path / "README.md", "no text of ours")
    written(tmp_path / ".cache" / "d.txt", "nor this")
    assert ids_of(token_stream(tmp_path, by_bytes)) == "^firstsecond ^third"


def test_an_unknown_suffix_is_text_when_it_decodes(tmp_path: Path) -> None:
    assert ids_of(token_stream(written(tmp_path / "notes.rst", "\ufeffhello"), by_bytes)) == "hello"


def test_max_tokens_cuts_the_stream_and_stops_the_reading(tmp_path: Path) -> None:
    broken_later = written(tmp_path / "a.jsonl", '"one"\n"two"\n{broken')
    assert ids_of(token_stream(broken_later, by_bytes, max_tokens=5)) == "^one^"
    with pytest.raises(UserError, match="line 3"):
        token_stream(broken_later, by_bytes, max_tokens=100)


def test_a_large_file_comes_in_pieces_cut_after_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    content = "\ufeff" + "".join(f"líne {n}\n" for n in range(40)) + "a " * 100 + "é" * 200
    path = written(tmp_path / "a.txt", content)
    pieces = [piece.text for piece in read_documents(path)]
    assert "".join(pieces) == content[1:]
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces[:5])
    assert len(token_stream(path, by_bytes, max_tokens=50)) == 50


def test_the_offset_of_a_bad_byte_is_that_in_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "WHOLE_BYTES", 10)
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    path = written(tmp_path / "a.txt", b"abcd\n" * 7 + b"x\xffy")
    with pytest.raises(UserError, match="0xff at offset 36 "):
        token_stream(path, by_bytes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"abc\xff", "byte 0xff at offset 3 "),
        ("a.bin", b"ab\x00c", "byte 0x00 at offset 2 "),
        ("a.jsonl", b'"fine"\n"\xff"', "byte 0xff at offset 8 "),
        ("a.jsonl", b'"fine"\n{"text": ', "line 2: broken JSON"),
        ("a.jsonl", b'{"content": "x", "id": 1}', r"content \(str\), id \(int\); name .* --column"),
        ("a.jsonl", b'{"text": null}', r"0 tokens \(1 of 1 rows are skipped: 1 with no text in them\)"),
        ("a.jsonl", b"[1]", 'row 1: no string under "text", found a int'),
        ("a.jsonl", b'"ok"\n"\\ud83d"', "line 2: .*half a character"),
        ("a.jsonl", b'""\n\n', "gives 0 tokens"),
        ("a.parquet", b"PAR1 and no more", "not a whole parquet file"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_stream(written(tmp_path / name, content), by_bytes)


def test_a_parquet_without_text_is_named(tmp_path: Path) -> None:
    other = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"content": ["x"]}), other)
    with pytest.raises(UserError, match=r"no column text, found content \(string\)"):
        token_stream(other, by_bytes)


def test_a_folder_without_text_and_a_file_that_does_not_exist(tmp_path: Path) -> None:
    written(tmp_path / "image.png", b"\x89PNG")
    with pytest.raises(UserError, match="folder without"):
        token_stream(tmp_path, by_bytes)
    for missing in (tmp_path / "none", "none.txt", "./none", "a/b/c", "none.safetensors"):
        with pytest.raises(UserError, match="does not exist"):
            token_stream(missing, by_bytes)


def test_text_needs_a_tokenizer_and_a_positive_max_tokens(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "abc")
    with pytest.raises(UserError, match=r"no tokenizer.*\.safetensors.*`self`"):
        token_stream(path, None)
    with pytest.raises(UserError, match="max_tokens is 0"):
        token_stream(path, by_bytes, max_tokens=0)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '"abc"')
    assert len(token_stream(path, by_bytes, vocab_size=257)) == 4
    with pytest.raises(UserError, match="ids from 97 to 256; wanted 0 to 255"):
        token_stream(path, by_bytes, vocab_size=256)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_ids_come_from_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(6, dtype=dtype).view(2, 3), "attention_mask": torch.ones(2, 3)}, path)
    stream = token_stream(path, None, max_tokens=5, vocab_size=6)
    assert stream.dtype == torch.int64
    assert stream.tolist() == [0, 1, 2, 3, 4]
    save_file({"any": torch.arange(3, dtype=dtype)}, path)
    assert token_stream(path, None).tolist() == [0, 1, 2]


def test_a_tensor_of_ids_is_a_source() -> None:
    ids = torch.arange(6, dtype=torch.int32)
    assert token_stream(ids, None, max_tokens=4, vocab_size=6).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="the tensor given gives token ids from 0 to 5; wanted 0 to 4"):
        token_stream(ids, None, vocab_size=5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.arange(3), "b": torch.arange(3)}, r"\['a', 'b'\]"),
        ({"input_ids": torch.rand(3)}, "wanted integer token ids"),
        ({"input_ids": torch.ones(3, dtype=torch.bool)}, "wanted integer token ids"),
        ({"input_ids": torch.zeros(1, 1, 1, dtype=torch.int64)}, "1-D or 2-D"),
        ({"input_ids": torch.zeros(0, dtype=torch.int64)}, "is empty"),
        ({"input_ids": torch.tensor([3, -1])}, "from -1 to 3; wanted ids from 0"),
    ],
)
def test_bad_token_ids_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(UserError, match=message):
        token_stream(tmp_path / "ids.safetensors", None)


def test_a_truncated_safetensors_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        token_stream(path, None)


Hub = Callable[..., Iterator[dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hub], None]:
    """Puts a function in the place of `datasets.load_dataset`: there is no hub in a test."""

    def place(load_dataset: Hub) -> None:
        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    return place


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("name", ("name", None, "train", None)),
        ("org/na.me:config-1", ("org/na.me", "config-1", "train", None)),
        ("org/name@test", ("org/name", None, "test", None)),
        ("name:c@validation#0a1b", ("name", "c", "validation", "0a1b")),
    ],
)
def test_a_hub_id_is_streamed_as_far_as_needed(
    hub: Callable[[Hub], None], source: str, asked: tuple[str | None, ...]
) -> None:
    def load(name: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        assert (name, config, split, revision) == asked
        assert streaming
        yield {"text": "one"}
        yield {"text": "two"}
        raise AssertionError("read further than needed")

    hub(load)
    assert ids_of(token_stream(source, by_bytes, max_tokens=8)) == "^one^two"


def test_a_path_that_exists_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "wikitext", "from here")
    monkeypatch.chdir(tmp_path)
    assert ids_of(token_stream("wikitext", by_bytes)) == "from here"


def test_a_hub_that_fails_and_a_row_without_text(hub: Callable[[Hub], None]) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route")

    hub(fail)
    with pytest.raises(UserError, match=r"org/name .*split test.*cannot be read: no route"):
        token_stream("org/name@test", by_bytes)
    hub(lambda *args, **kwargs: iter([{"content": "x"}]))
    with pytest.raises(UserError, match=r"org/name, row 1.*content \(str\)"):
        token_stream("org/name", by_bytes)


@pytest.mark.parametrize(("package", "source"), [("datasets", "org/name"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.parquet", b"x")
    really = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'bitquilt\[datasets\]'"):
        token_stream(source, by_bytes)


def test_windows_without_a_seed_follow_each_other() -> None:
    stream = torch.arange(10)
    assert windows(stream, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows(stream, 3, count=2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_seeded_windows_are_disjoint_runs_that_reach_everywhere() -> None:
    stream = torch.arange(1000)
    seen = set()
    for seed in range(40):
        chosen = windows(stream, 7, count=11, seed=seed)
        assert chosen.shape == (11, 7)
        assert (chosen[:, 1:] - chosen[:, :-1] == 1).all()
        assert (chosen[1:, 0] > chosen[:-1, -1]).all()
        seen |= set(chosen[:, 0].tolist())
    assert min(seen) < 20
    assert max(seen) > 973
    assert len(seen) > 250


def test_windows_depend_on_the_seed_and_leave_the_global_generator_alone() -> None:
    stream = torch.arange(1000)
    before = torch.get_rng_state()
    first = windows(stream, 7, count=11, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, windows(stream, 7, count=11, seed=1))
    assert not torch.equal(first, windows(stream, 7, count=11, seed=2))


def test_windows_that_fill_the_stream_exactly() -> None:
    assert windows(torch.arange(12), 3, count=4, seed=5).flatten().tolist() == list(range(12))


def test_windows_of_a_stream_too_short() -> None:
    with pytest.raises(UserError, match=r"has 11 tokens; 4 windows of 3 need 12; .* at most 3 samples"):
        windows(torch.arange(11), 3, count=4, seed=0)
    with pytest.raises(UserError, match=r"has 2 tokens; 1 windows of 3 need 3; .* a shorter window"):
        windows(torch.arange(2), 3)
    with pytest.raises(UserError, match="seq_len is 0"):
        windows(torch.arange(2), 0)


def test_the_hash_follows_bytes_and_names_not_places(tmp_path: Path) -> None:
    one = written(tmp_path / "one" / "a.txt", "abc")
    assert content_hash(one) == hashlib.sha256(b"abc").hexdigest()
    written(tmp_path / "two" / "a.txt", "abc")
    written(tmp_path / "two" / "image.png", "ignored")
    written(tmp_path / "three" / "b.txt", "abc")
    written(tmp_path / "four" / "a.txt", "abd")
    hashes = [content_hash(tmp_path / name) for name in ("one", "two", "three", "four")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_hash_of_a_hub_id_is_that_of_what_it_resolves_to() -> None:
    assert content_hash("org/name") == content_hash("org/name@train")
    different = ["org/name", "org/name@test", "org/name:c", "org/name#1", "org/other"]
    assert len({content_hash(source) for source in different}) == len(different)
    with pytest.raises(UserError, match="does not exist"):
        content_hash("none.jsonl")


def test_jsonl_lines_may_end_in_carriage_returns(tmp_path: Path) -> None:
    lines = "\r\n".join(json.dumps({"text": word}) for word in ("é", "b"))
    path = written(tmp_path / "a.JSON", "\ufeff" + lines)
    assert [document.text for document in read_documents(path)] == ["é", "b"]


def test_a_long_row_is_tokenized_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer takes 160 bytes of memory per byte of text: one line of 100 MB would end a run without a word."""
    monkeypatch.setattr(tokens, "WHOLE_BYTES", 20)
    monkeypatch.setattr(tokens, "PIECE_BYTES", 8)
    seen: list[str] = []

    def listening(document: str, **options: bool) -> dict[str, Any]:
        seen.append(document)
        return by_bytes(document, **options)

    row = "some words\nand alineofletters only"
    source = written(tmp_path / "rows.jsonl", json.dumps({"text": row}))
    assert token_stream(source, listening).tolist() == [BOS, *row.encode()]
    assert max(map(len, seen)) <= 8
    seen.clear()
    assert token_stream(source, listening, max_tokens=4).tolist() == [BOS, *b"som"]
    assert seen == ["some"]
