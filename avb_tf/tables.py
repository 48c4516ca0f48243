"""Markdown tables."""


def aligned(columns: list[list[str]]) -> str:
    """Returns a Markdown table with padded cells.

    Args:
      columns: lists of cells of equal length; the first cell of each column is its header.
    """
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in zip(*columns, strict=True)
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
