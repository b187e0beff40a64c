"""Pages in a real browser: nothing is wider than a phone, pictures are painted, print unfolds."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitquilt.report import compare, compare_page, read_facts, report_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")


def chromium(tmp_path: Path, *arguments: str) -> str:
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}/profile",
    )
    ran = subprocess.run([str(CHROMIUM), *flags, *arguments], capture_output=True, text=True, timeout=240, check=True)
    return ran.stdout


@pytest.fixture(scope="module")
def pages(measured: Path) -> dict[str, str]:
    facts = [read_facts(measured / name) for name in ("slim", "rtn", "rtn-4")]
    panels = compare(facts)
    return {"report": report_page(facts[0], panels), "compare": compare_page(panels)}


def test_nothing_is_wider_than_the_screen_and_the_bits_are_painted(pages: dict[str, str], tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe title="{name} {width}" width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (360, 1280)
    )
    script = """
    addEventListener("load", () => {
      const found = {};
      for (const frame of document.querySelectorAll("iframe")) {
        const page = frame.contentDocument, root = page.documentElement, map = page.querySelector(".quilt .map");
        const path = page.querySelector("symbol path");
        found[frame.title] = {
          wide: root.scrollWidth, view: root.clientWidth, high: root.scrollHeight,
          map: map && [map.getBoundingClientRect().width, map.getBoundingClientRect().height],
          fill: path && getComputedStyle(path).fill,
          font: Math.min(...[...page.querySelectorAll("p, td, th, svg text")]
            .filter(e => e.getClientRects().length).map(e => parseFloat(getComputedStyle(e).fontSize))),
          plots: [...page.querySelectorAll("figure svg")].filter(e => e.getClientRects().length).length,
        };
      }
      document.body.textContent = JSON.stringify(found);
    });"""
    wrapper = tmp_path / "frames.html"
    wrapper.write_text(f"<!DOCTYPE html><title>t</title><script>{script}</script>{frames}", encoding="utf-8")
    dom = chromium(tmp_path, "--dump-dom", wrapper.as_uri())
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", dom, re.DOTALL)[1]))  # type: ignore[index]
    assert found.keys() == {f"{name} {width}" for name in pages for width in (360, 1280)}
    for seen in found.values():
        assert seen["wide"] <= seen["view"]
        assert seen["high"] > 500
        assert seen["font"] >= 10
        assert seen["plots"] == 1  # the one drawn for this width
    for width, least in ((360, 30), (1280, 100)):
        seen = found[f"report {width}"]
        assert seen["map"][0] > least
        assert seen["map"][1] > 15
        assert seen["fill"].startswith("rgb(")
        assert seen["fill"] != "rgb(0, 0, 0)"


def test_print_shows_what_is_folded_away(pages: dict[str, str], tmp_path: Path) -> None:
    """A PDF of the page is as long as one whose details were open, and longer than one without them."""

    def sheets(name: str, page: str) -> int:
        source, target = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
        source.write_text(page, encoding="utf-8")
        chromium(tmp_path, f"--print-to-pdf={target}", "--no-pdf-header-footer", source.as_uri())
        written = target.read_bytes()
        assert written.startswith(b"%PDF")
        return len(re.findall(rb"/Type\s*/Page\b", written))

    folded = re.sub(r"<details open>", "<details>", pages["report"])
    table = re.search(r"<details>.*?</details>", folded, re.DOTALL)
    assert table is not None
    many = folded.replace(table[0], 12 * table[0])
    assert sheets("folded", many) == sheets("open", many.replace("<details>", "<details open>"))
    assert sheets("folded", many) > sheets("none", folded.replace(table[0], ""))
