"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, footer: Sequence[str] | None = None) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    body = [list(row) for row in rows]
    everything = [list(header), *body, *([list(footer)] if footer else [])]
    widths = [max(len(row[i]) for row in everything) for i in range(len(header))]
    rule = "  ".join("-" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(header), rule, *map(line, body)]
    if footer:
        lines += [rule, line(footer)]
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns without a header; lines after the first of a value are indented below it."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  " + value.replace("\n", "\n" + " " * (width + 2)) for name, value in rows)


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def scores(values: Sequence[float | None]) -> list[str]:
    """The cells of PSNR, SSIM, the start's PSNR and SSIM, and seconds."""
    return [fixed(value, digits) for value, digits in zip(values, (2, 4, 2, 4, 2), strict=True)]


def image_size(height: int, width: int) -> str:
    """Width first, as image viewers write it."""
    return f"{width}x{height}"


def megabytes(count: int | None) -> str:
    """Bytes for people."""
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"
