"""Files of rows: `read_rows` reads .jsonl, .json, .csv, .tsv and .parquet, and yields a document for each row.

    .jsonl, .json        a value per line, or one JSON array of values over any number of lines
    .csv, .tsv           a header line, then a row per record; quoted as in RFC 4180
    .parquet             a row per row

`decode` turns bytes into text, strictly.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitquilt.data.rows import Document, row_document
from bitquilt.errors import UserError

ROW_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NEED_DATASETS = "needs a package that is not installed; run: pip install 'bitquilt[datasets]'"
_WANTED = 'wanted one document per line, as {"text": "..."} or a bare string, or one array of these'
_LONGEST_FIELD = 2**31 - 1  # Python's csv stops at 131,072 characters unless told otherwise


def read_rows(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield a document for each row of `path`, by its ending; lines and parquet rows are read lazily.

    Raises UserError for what `row_document` refuses, for broken JSON (with the line), CSV and parquet files.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path, column)
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, column, "," if kind == ".csv" else "\t")
    else:
        yield from _json(path, column)


def decode(raw: bytes, path: Path, offset: int) -> str:
    """Return UTF-8 text. Raises UserError with the offset of the first byte that is not."""
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


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            line = decode(raw, path, offset)
            yield line if number else line.removeprefix("\ufeff")
            offset += len(raw)


def _json(path: Path, column: str | None) -> Iterator[Document]:
    array = _array(path)
    if array is not None:
        for number, value in enumerate(array, start=1):
            yield row_document(value, f"{path}, row {number}", column)
        return
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}); {_WANTED}"
            ) from None
        except RecursionError:
            raise UserError(f"{path}, line {number}: JSON nested too deeply; {_WANTED}") from None
        yield row_document(value, f"{path}, line {number}", column)


def _array(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON array; None for any other file, which is read line by line.

    One list of messages is one row, not one row per message.
    """
    first = next((line for line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        return None
    try:
        found = json.loads("".join(_lines(path)))
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply; {_WANTED}") from None
    except json.JSONDecodeError as error:
        try:
            json.loads(first)
        except json.JSONDecodeError:
            raise UserError(
                f"{path}, line {error.lineno}: broken JSON array ({error.msg} at column {error.colno}); {_WANTED}"
            ) from None
        return None  # the first line is whole: a list of messages per line
    assert isinstance(found, list)
    said = ({"role", "content"}, {"from", "value"})
    if found and all(isinstance(item, dict) and any(keys <= item.keys() for keys in said) for item in found):
        return [found]
    return found


def _csv(path: Path, column: str | None, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for number, cells in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if len(cells) > len(names):
                raise UserError(
                    f"{where}: {len(cells)} cells, but the first line names {len(names)} columns "
                    f'({", ".join(names)}); put text with a separator in it between "quotes"'
                )
            if cells:  # an empty line is no row
                yield row_document(dict(zip(names, (cell or None for cell in cells), strict=False)), where, column)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: broken CSV ({error}); quote the text, or give .jsonl"
        ) from None


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet {NEED_DATASETS}") from None
    try:
        with ParquetFile(path) as table:
            types = {field.name: field.type for field in table.schema_arrow}
            wanted = _parquet_columns(types, column)
            if wanted is None:
                fields = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "none"
                raise UserError(
                    f"{path}: no column {column or 'text'}, found {fields}; name the right one with --column"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                for value in batch.to_pylist():
                    row += 1
                    yield row_document(value, f"{path}, row {row}", column)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); write it again") from None


def _parquet_columns(types: dict[str, Any], column: str | None) -> list[str] | None:
    """Columns to read, so that others need not be decoded; None where none of them is there."""
    if column is not None:
        top = column if column in types else column.partition(".")[0]
        return [top] if top in types else None
    for wanted in (["text"], ["messages"], ["conversations"], ["conversation"], ["instruction", "output"]):
        if all(name in types for name in wanted):
            return [*wanted, "input"] if "output" in wanted and "input" in types else wanted
    return None
