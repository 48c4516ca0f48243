"""The experiments: `--config=digits:avb_ac` runs `digits.py` of this folder by the method `avb_ac`.

A file has a function `get_config(method)`, which starts from `configuration.default`.
"""

from pathlib import Path


def names() -> list[str]:
    """Those that the package brings."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def file(name: str) -> Path | None:
    """The file that `name` means: a path, or an experiment of the package; None for neither."""
    if Path(name).is_file():
        return Path(name)
    return Path(__file__).with_name(f"{name}.py") if name in names() else None
