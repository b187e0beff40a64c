"""Numbers as text for people, on the command line and pages: `size_text`, `time_text`, `ratio_text`, `percent_text`."""


def size_text(count: float) -> str:
    """Format bytes in decimal units: 3600000 -> "3.6 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def time_text(seconds: float) -> str:
    """Format seconds: 75 -> "1 min 15 s"; below ten seconds with one decimal."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ratio_text(ratio: float) -> str:
    """Format a size ratio: 0.28 -> "28 % of fp16, 3.6 times smaller"; a ratio near 1 gets only the share."""
    share = f"{percent_text(ratio)} of fp16"
    return f"{share}, {1 / ratio:.1f} times smaller" if ratio < 0.95 else share


def percent_text(share: float, digits: int = 3) -> str:
    """Format a share with `digits` significant digits: 0.5 -> "50 %". A large share gets no exponent."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10**digits else f"{percent:.{digits}g} %"
