"""Data sets as people have them: conversations, instructions, JSON arrays, CSV, rows without text, other columns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitquilt import Calibration
from bitquilt.data.calibration import check_calibration
from bitquilt.data.documents import read_documents
from bitquilt.data.tokens import token_stream, window_bos
from bitquilt.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'referee' %}{{ raise_exception('no referees') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
CHAT = "^<user>hi<assistant>yo"


def make_tokenizer(template: str | None = TEMPLATE, bos: bool = True) -> PreTrainedTokenizerFast:
    """A token a character; BOS is shown as `^`."""
    letters = {"^": 0, "?": 1} | {chr(code): code for code in range(32, 127) if chr(code) not in "^?"} | {"\n": 2}
    made = Tokenizer(models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        made.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="^", unk_token="?")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    def decoded(path: Path, **options: Any) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(token_stream(path, tokenizer, **options).tolist()))

    return decoded


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"conversations": SHAREGPT}, TURNS, {"id": 1, "messages": TURNS}])
@pytest.mark.parametrize("write", ["jsonl", "array", "parquet"])
def test_conversations_pass_through_the_chat_template(
    row: Any, write: str, read: Callable[..., str], tmp_path: Path
) -> None:
    if write == "parquet":
        path, row = tmp_path / "a.parquet", {"messages": row} if isinstance(row, list) else row
        parquet.write_table(pa.Table.from_pylist([row, row]), path)
    elif write == "array":
        path = written(tmp_path / "a.json", json.dumps([row, row], indent=1))
    else:
        path = written(tmp_path / "a.jsonl", f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert read(path) == CHAT * 2


def test_one_list_of_messages_is_one_conversation(read: Callable[..., str], tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.json", json.dumps(TURNS, indent=2))) == CHAT


def test_content_in_parts_is_joined(read: Callable[..., str], tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yo"}]}
    assert read(written(tmp_path / "a.jsonl", json.dumps(row))) == CHAT
    picture = {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}
    with pytest.raises(UserError, match=r"line 1, message 1: wanted .*found the fields role \(str\), content \(list\)"):
        read(written(tmp_path / "a.jsonl", json.dumps(picture)))


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": TURNS}))
    with pytest.raises(UserError, match=r"line 1 is a conversation, .* no chat template; put chat_template\.jinja"):
        token_stream(path, make_tokenizer(None))


def test_conversations_that_the_template_refuses_are_skipped_and_counted(
    read: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "referee", "content": "x"}]}, {"messages": TURNS}, {"messages": None}]
    path, said = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), list[str]()
    assert read(path, notify=said.append) == CHAT
    assert said == [
        f"{path}: 2 of 3 rows are skipped: 1 with a conversation that the chat template refuses (no referees); "
        "1 with no text in them"
    ]


def test_instructions_are_joined_by_alpacas_template(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", json.dumps([ALPACA, ALPACA | {"input": ""}, ALPACA | {"output": None}]))
    first, second, third = (document.text for document in read_documents(path))
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n"
        "### Response:\n3"
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Response:\n3"
    )
    assert third == ""


@pytest.mark.parametrize("indent", [None, 1])
def test_json_arrays_hold_a_document_per_value(indent: int | None, read: Callable[..., str], tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", "\n" + json.dumps([{"text": "one"}, "two", {"text": None}], indent=indent))
    assert read(path) == "^one^two"


def test_a_broken_array_is_named(read: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3: broken JSON array"):
        read(written(tmp_path / "a.json", '[\n "one",\n {"text" "two"}\n]'))


def test_null_rows_are_skipped_and_counted(read: Callable[..., str], tmp_path: Path) -> None:
    path, said = tmp_path / "a.parquet", list[str]()
    parquet.write_table(pa.table({"text": pa.array(["one", None, "two", ""])}), path)
    assert read(path, notify=said.append) == "^one^two"
    assert said == [f"{path}: 2 of 4 rows are skipped: 2 with no text in them"]


def test_csv_is_parsed(read: Callable[..., str], tmp_path: Path) -> None:
    content = '\ufefflabel,text\r\n1,"one, ""two""\nthree"\r\n\r\n2,\r\n3,four\r\n'
    assert read(written(tmp_path / "a.csv", content)) == '^one, "two"\nthree^four'
    assert read(written(tmp_path / "a.tsv", "text\tlabel\none, two\t1\n")) == "^one, two"
    assert len(read(written(tmp_path / "long.csv", "text\n" + "a" * 200_000))) == 200_001


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("body,label\nx,1\n", r"row 1: no string under \"text\", found the fields body \(str\), label \(str\)"),
        ("text,label\none, two,1\n", "row 1: 3 cells, but the first line names 2 columns .*quotes"),
        ('text\n"never closed\n', "line 2: broken CSV"),
    ],
)
def test_bad_csv_is_named(content: str, message: str, read: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(written(tmp_path / "a.csv", content))


def test_a_column_is_read_by_its_name(read: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["x"], "content": ["one"], "data": [{"text": "deep"}]}), path)
    assert read(path, column="content") == "^one"
    assert read(path, column="data.text") == "^deep"
    assert read(written(tmp_path / "a.csv", "text,body\nx,one\n"), column="body") == "^one"
    assert read(written(tmp_path / "a.jsonl", json.dumps({"text": "x", "chat": TURNS})), column="chat") == CHAT


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_wrong_column_is_refused_before_a_model_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pa.table({"text": ["x"], "n": ["1"]}), path)
    else:
        written(path, '{"text": "x", "n": "1"}' if name == "a.jsonl" else "text,n\nx,1")
    with pytest.raises(UserError, match=r"no column body, found .*text \(\w+\), n \(\w+\); name .*--column"):
        check_calibration(Calibration(path, column="body"))
    check_calibration(Calibration(path, column="n"))


def test_a_column_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no columns, so --column body does not apply"):
        check_calibration(Calibration(written(tmp_path / "a.txt", "text"), column="body"))
    with pytest.raises(UserError, match="column is body, but the model writes its own text"):
        Calibration("self", column="body")


def test_windows_begin_with_the_bos_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    assert window_bos("a.txt", tokenizer) == 0
    assert window_bos("a.txt", make_tokenizer(bos=False)) is None
    assert window_bos("ids.safetensors", tokenizer) is None
