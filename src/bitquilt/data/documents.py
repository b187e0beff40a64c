"""Sources of text: `read_documents` reads one lazily, `check_source` refuses a missing one, `content_hash` names it.

A source is one of

    notes.txt            one plain stream without special tokens, as is any other file that decodes as UTF-8
    stories.jsonl        one document per row, as are .json, .csv, .tsv and .parquet: text in the column `text` or in
                         one that is named, a conversation, or an instruction with its answer (`data/rows.py`)
    folder/              its .txt, .jsonl and .parquet files, recursively, in the order of their paths
    general              text that comes with the package (`general.jsonl`, made by tools/general_text.py)
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

from bitquilt.core.settings import GENERAL
from bitquilt.data.row_files import NEED_DATASETS, ROW_FILES, decode, read_rows
from bitquilt.data.rows import Document, row_document
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


def read_documents(source: str | Path, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of `source` in order, read lazily; a plain file over 8 MiB comes in several pieces.

    `column`: the field of a row to read, instead of the usual ones. Raises UserError for a missing source, an empty
    file or folder, bytes that are not UTF-8 (with their offset), a broken JSON line (with its number) and a row that
    lacks the field.
    """
    files = _files(source)
    if files is None:
        yield from _read_hub(str(source), column)
        return
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; give a file with text in it")
        if file.suffix.lower() in ROW_FILES:
            yield from read_rows(file, column)
        else:
            yield from _read_plain(file)


def check_source(source: str | Path, column: str | None = None) -> None:
    """Raise UserError if `source` is neither on this machine nor a hub id, is a folder without texts, or has a file
    whose first row lacks the wanted column; also for a column where there are no rows."""
    files = _files(source)
    rows = files is None or any(file.suffix.lower() in ROW_FILES for file in files)
    if column is not None and not rows:
        raise UserError(f"{source} has no columns, so --column {column} does not apply; leave it out")
    for file in files or ():
        if file.suffix.lower() in ROW_FILES and file.stat().st_size:
            next(read_rows(file, column), None)


def content_hash(source: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the hashes and relative paths of a folder's files.

    For a hub id it is the hash of the resolved id: only `#revision` pins the content.
    """
    files = _files(source)
    if files is None:
        return hashlib.sha256(json.dumps(_hub_id(str(source))).encode()).hexdigest()
    root = _path(source)
    if root.is_file():
        return _file_hash(root)
    listing = "".join(f"{_file_hash(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _path(source: str | Path) -> Path:
    """Return where a source is, if it is on this machine."""
    return Path(__file__).with_name("general.jsonl") if str(source) == GENERAL else Path(source)


def _files(source: str | Path) -> list[Path] | None:
    """Return the files of a source on this machine, or None for a hub id."""
    path = _path(source)
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
            text = decode(held[:end], path, offset)
            yield Document(text.removeprefix("\ufeff") if offset == 0 else text, plain=True)
            offset, held = offset + end, held[end:]


def _read_hub(source: str, column: str | None) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source} is not a path on this machine; reading it as a hub dataset {NEED_DATASETS}"
        ) from None
    hub = _hub_id(source)
    try:
        where = {"split": hub["split"], "revision": hub["revision"]}
        rows = datasets.load_dataset(hub["name"], hub["config"], **where, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield row_document(row, f"{source}, row {number}", column)
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
