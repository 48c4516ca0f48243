"""Matplotlib figures, one module for each subject; the caller decides where to save them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from avb_tf import files


def save(
    figures: Mapping[str, Figure], directory: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Writes each figure in every format, each file atomically.

    Args:
      figures: file name without suffix -> figure.
      directory: folder for the files; created if missing.
      formats: any of "png" and "pdf".
    Returns:
      The paths of the files.
    """
    files.make_directory(directory)
    paths = []
    for name, figure in figures.items():
        for kind in formats:
            paths.append(directory / f"{name}.{kind}")
            files.write_atomically(paths[-1], rendered(figure, kind))
    return paths


def png(figure: Figure) -> bytes:
    """Returns the figure as the bytes of a PNG file."""
    return rendered(figure, "png")


def rendered(figure: Figure, kind: str) -> bytes:
    """Returns the figure as the bytes of a file of kind "png" or "pdf"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    return buffer.getvalue()
