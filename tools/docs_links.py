"""MkDocs hook. Turns links from a page to a file of the repository outside docs/ into links to that file on the
repository's site. Links to files that do not exist are left alone, so that strict mode reports them."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return the page with links outside docs/ rewritten."""
    folder = PurePosixPath("docs", page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        target = (ROOT / folder / match["path"]).resolve()
        inside = target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT)
        if inside or not target.exists():
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(ROOT)}{match['anchor'] or ''})"

    return _LINK.sub(rewritten, markdown)
