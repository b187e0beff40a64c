"""Sources of text: `read_documents` reads one lazily, `check_source` refuses a missing one, `content_hash` names it.

A source is one of

    notes.txt            one plain stream without special tokens, as is any other file that decodes as UTF-8
    stories.jsonl        one document per line: {"text": "..."} or a bare JSON string (.json is read the same way)
    stories.parquet      one document per row, in the string column `text`
    folder/              its .txt, .jsonl and .parquet files, recursively, in the order of their paths
    name[:config][@split][#revision]
                         a dataset of the Hugging Face hub, streamed; the split defaults to `train`,
                         as in `Salesforce/wikitext:wikitext-2-raw-v1@test`. An existing path takes precedence.

Line ends are not translated; only a UTF-8 byte order mark is dropped.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bitquilt.errors import UserError

IN_A_FOLDER = (".jsonl", ".parquet", ".txt")
# A source with such an ending is a file even when it does not exist: a typing error must not become a download.
_FILE_NAME = re.compile(r"\.(txt|md|jsonl?|parquet|safetensors|csv|tsv|arrow|gz|zip|zst)$", re.IGNORECASE)

# A plain file up to this size is tokenized in one go, so that figures are those of the whole text. A larger
# one is tokenized in pieces that end at a line end. The tokenizer takes about 160 bytes of memory per byte of
# text (5.0 GB for 31 MB, measured), nothing is read beyond what is wanted, and a piece's end changes at most a
# token or two (1 to 7 more tokens in 8.8 to 17.5 million for 7 ends, measured).
WHOLE_BYTES = 8 * 2**20
PIECE_BYTES = 2**20

_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[\w.+-]+))?"
    r"(?:@(?P<split>[\w.-]+))?(?:#(?P<revision>[\w./-]+))?"
)
# JSON can spell half a character ("\ud83d"), which no tokenizer reads.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_NEED_DATASETS = "needs a package that is not installed; run: pip install 'bitquilt[datasets]'"


class Document(NamedTuple):
    """A piece of text; `plain` text is tokenized without special tokens."""

    text: str
    plain: bool


def read_documents(source: str | Path) -> Iterator[Document]:
    """Yield the documents of `source` in order, read lazily; a plain file over 8 MiB comes in several pieces.

    Raises UserError for a missing source, an empty file or folder, bytes that are not UTF-8 (with their offset), a
    broken JSON line (with its number) and a document without text.
    """
    files = _files(source)
    if files is None:
        yield from _read_hub(str(source))
        return
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; give a file with text in it")
        kind = file.suffix.lower()
        if kind in (".jsonl", ".json"):
            yield from _read_jsonl(file)
        elif kind == ".parquet":
            yield from _read_parquet(file)
        else:
            yield from _read_plain(file)


def check_source(source: str | Path) -> None:
    """Raise UserError if `source` is neither on this machine nor a hub id, or is a folder without texts."""
    _files(source)


def content_hash(source: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the hashes and relative paths of a folder's files.

    For a hub id it is the hash of the resolved id: only `#revision` pins the content.
    """
    files = _files(source)
    if files is None:
        return hashlib.sha256(json.dumps(_hub_id(str(source))).encode()).hexdigest()
    root = Path(source)
    if root.is_file():
        return _file_hash(root)
    listing = "".join(f"{_file_hash(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _files(source: str | Path) -> list[Path] | None:
    """Return the files of a source on this machine, or None for a hub id."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in IN_A_FOLDER and file.is_file())
        visible = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if not visible:
            raise UserError(f"{path} is a folder without {', '.join(IN_A_FOLDER)} files; give one with some")
        return sorted(visible, key=lambda file: file.relative_to(path).as_posix())
    looks_local = isinstance(source, Path) or _FILE_NAME.search(source) is not None
    if looks_local or not _HUB_ID.fullmatch(str(source)):
        raise UserError(
            f"{source} does not exist; give a file, a folder or a dataset of the hub, "
            "written name[:config][@split][#revision]"
        )
    return None


def _read_plain(path: Path) -> Iterator[Document]:
    size = path.stat().st_size
    piece = size + 1 if size <= WHOLE_BYTES else PIECE_BYTES
    offset, held = 0, b""
    with path.open("rb") as file:
        while block := file.read(piece):
            held += block
            end = len(held) if file.tell() == size else held.rfind(b"\n") + 1 or held.rfind(b" ")
            if end < 1:
                continue
            text = _decode(held[:end], path, offset)
            yield Document(text.removeprefix("\ufeff") if offset == 0 else text, plain=True)
            offset, held = offset + end, held[end:]


def _decode(raw: bytes, path: Path, offset: int) -> str:
    bad = raw.find(b"\0")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.start if bad < 0 else min(bad, error.start)
    if bad >= 0:
        raise UserError(
            f"{path} is not text: byte 0x{raw[bad]:02x} at offset {offset + bad} is not UTF-8 text; "
            "give UTF-8 text, .jsonl, .parquet, or token ids in .safetensors"
        )
    return text


def _read_jsonl(path: Path) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset).removeprefix("\ufeff" if number == 1 else "")
            offset += len(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}); "
                    'wanted one document per line, as {"text": "..."} or a bare string'
                ) from None
            yield Document(_text_of(value, f"{path}, line {number}"), plain=False)


def _text_of(value: object, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if isinstance(text, str):
        if half := _HALF_CHARACTER.search(text):
            raise UserError(f"{where}: {half[0]!r} is half a character; remove it from the text")
        return text
    if isinstance(value, dict):
        fields = ", ".join(f"{key} ({type(held).__name__})" for key, held in value.items()) or "none"
        got, fix = f"the fields {fields}", 'rename the one with the text to "text"'
    else:
        got, fix = f"a {type(value).__name__}", 'write {"text": "..."} or a bare string'
    raise UserError(f'{where}: no string under "text", found {got}; {fix}')


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet {_NEED_DATASETS}") from None
    try:
        with ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                fields = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow) or "none"
                raise UserError(f"{path}: no column text, found {fields}; rename the right one to text")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield Document(_text_of({"text": value}, f"{path}, row {row}"), plain=False)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); write it again") from None


def _read_hub(source: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source} is not a path on this machine; reading it as a hub dataset {_NEED_DATASETS}"
        ) from None
    hub = _hub_id(source)
    try:
        where = {"split": hub["split"], "revision": hub["revision"]}
        rows = datasets.load_dataset(hub["name"], hub["config"], **where, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Document(_text_of(row, f"{source}, row {number}"), plain=False)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source} is not a path on this machine, and the hub dataset {hub['name']} (config {hub['config']}, split "
            f"{hub['split']}) cannot be read: {error}; check the name, or give a local file"
        ) from error


def _hub_id(source: str) -> dict[str, str | None]:
    match = _HUB_ID.fullmatch(source)
    assert match is not None, source  # _files has refused every other form
    return match.groupdict() | {"split": match["split"] or "train"}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
