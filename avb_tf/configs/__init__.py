"""The experiments: `--config=digits:avb_ac` runs `digits.py` in this folder with method `avb_ac`.

Each file has a function `get_config(method)`, which starts from `configuration.default`.
"""

from pathlib import Path


def names() -> list[str]:
    """Returns the names of the experiments in the package, sorted."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def file(name: str) -> Path | None:
    """Returns the file that `name` denotes, or None.

    Args:
      name: path of a file, or name of an experiment in the package.
    """
    if Path(name).is_file():
        return Path(name)
    return Path(__file__).with_name(f"{name}.py") if name in names() else None
