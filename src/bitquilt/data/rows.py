"""A row of a data set becomes a `Document`: `row_document` takes its text, its conversation, or an instruction and its
answer.

    {"text": "..."}, or a bare string                                           text
    {"messages": [{"role": "user", "content": "..."}, ...]}                     a conversation, as OpenAI writes it
    {"conversations": [{"from": "human", "value": "..."}, ...]}                 a conversation, as ShareGPT writes it
    {"instruction": "...", "input": "...", "output": "..."}                     Alpaca; joined by Alpaca's template

The first that a row has is taken. A column that is named takes its place; `data.text` is the field `text` inside the
field `data`. A row whose value is null holds no text: it gives an empty document, which the reader skips and counts.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from bitquilt.errors import UserError

Message = Mapping[str, Any]

_CHATS = ("messages", "conversations", "conversation")
_ASKED, _ANSWERED = "instruction", "output"
# ShareGPT's names of who speaks, and what chat templates call them; other names are left as they are.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# JSON can spell half a character ("\ud83d"), which no tokenizer reads.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

# https://github.com/tatsu-lab/stanford_alpaca#data-release
_ALPACA = """Below is an instruction that describes a task{context}. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}
{input}
### Response:
{output}"""
_ALPACA_CONTEXT = ", paired with an input that provides further context"


class Document(NamedTuple):
    """A piece of text, or a conversation for the tokenizer's chat template.

    `plain` text is tokenized without special tokens. `where`: the file and the row, for messages. An empty document
    stands for a row without text.
    """

    text: str
    plain: bool
    messages: tuple[Message, ...] = ()
    where: str = ""


def row_document(row: object, where: str, column: str | None = None) -> Document:
    """Return the document of a row. Raises UserError for a row that lacks what is wanted, with the fields it has."""
    if column is not None and isinstance(row, Mapping):
        return _document(_field(row, column, where), where, f'under "{column}"')
    if not isinstance(row, Mapping):
        return _document(row, where, 'under "text"')
    if "text" in row:
        return _document(row["text"], where, 'under "text"', row)
    if chat := next((name for name in _CHATS if name in row), None):
        return _document(row[chat], where, f'under "{chat}"')
    if _ASKED in row and _ANSWERED in row:
        return _document(_instruction(row, where), where, f'under "{_ASKED}"')
    raise UserError(f'{where}: no string under "text", found {fields_text(row)}; name the right one with --column')


def fields_text(row: Mapping[Any, object]) -> str:
    """The names and types of a row's fields, for messages."""
    return "the fields " + (", ".join(f"{name} ({type(held).__name__})" for name, held in row.items()) or "none")


def _document(value: object, where: str, place: str, row: Mapping[Any, object] | None = None) -> Document:
    if value is None:
        return Document("", plain=False, where=where)
    if isinstance(value, str):
        return Document(_whole(value, where), plain=False, where=where)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        messages = tuple(_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1))
        return Document("", plain=False, messages=messages, where=where)
    if isinstance(value, list) and not value and place != 'under "text"':
        return Document("", plain=False, where=where)
    got = f"a {type(value).__name__}" if row is None else fields_text(row)
    raise UserError(
        f'{where}: no string {place}, found {got}; write {{"text": "..."}} or a bare string, or a list of messages, '
        "or name the right field with --column"
    )


def _field(row: Mapping[Any, object], column: str, where: str) -> object:
    """Return the field `column`; where there is none of that name, follow its dots."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(f"{where}: no column {column}, found {fields_text(row)}; name one of these with --column")
        value = value[name]
        if value is None:
            return None
    return value


def _message(item: Mapping[Any, Any], where: str) -> Message:
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise UserError(
            f'{where}: wanted {{"role": "...", "content": "..."}} or {{"from": "...", "value": "..."}} with text, '
            f"found {fields_text(item)}; remove the row or write it so"
        )
    # parquet fills the fields that a message lacks with null
    others = {k: v for k, v in item.items() if v is not None and k not in ("role", "from", "content", "value")}
    return {"role": _ROLES.get(role, role), "content": _whole(content or "", where), **others}


def _instruction(row: Mapping[Any, object], where: str) -> str | None:
    """The row in Alpaca's template; None where instruction or output is null."""
    asked, more, answered = row[_ASKED], row.get("input"), row[_ANSWERED]
    if asked is None or answered is None:
        return None
    if not (isinstance(asked, str) and isinstance(more, str | None) and isinstance(answered, str)):
        raise UserError(f"{where}: wanted strings under instruction, input and output, found {fields_text(row)}")
    given = f"\n### Input:\n{more}\n" if more else ""
    context = _ALPACA_CONTEXT if more else ""
    return _ALPACA.format(context=context, instruction=asked, input=given, output=answered)


def _whole(text: str, where: str) -> str:
    if half := _HALF_CHARACTER.search(text):
        raise UserError(f"{where}: {half[0]!r} is half a character; remove it from the text")
    return text
