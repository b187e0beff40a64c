"""Where does a page go? What `report` and `compare` share."""

from pathlib import Path

from bitquilt.errors import UserError
from bitquilt.report.page import check_ready

_ENDINGS = (".html", ".htm")


def check_target(path: Path) -> Path:
    """Before the expensive step. Raises UserError for a folder, a missing folder, a file that is no page, no jinja2."""
    check_ready()
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --out a file, such as {path / 'report.html'}")
    if path.suffix.lower() not in _ENDINGS:
        raise UserError(f"{path} does not end in .html; a page is written there, so nothing else is overwritten")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to; make it, or give another --out")
    return path


def write_page(path: Path, page: str) -> None:
    """Write beside, then rename: a reader sees the old page or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --out") from None
