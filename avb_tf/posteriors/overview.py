"""A table of all fitted posteriors below a directory, with the verdicts and the measures."""

import json
from pathlib import Path
from typing import Any

from avb_tf import configuration, files, results, tables
from avb_tf.settings import posterior

LABELS = ("fit", "fit, refined", "full-rank VI", "mean-field VI", "NUTS", "exact, again")


def find(directory: Path) -> list[dict[str, Any]]:
    """Returns the results of all evaluated posteriors below `directory`, by model and seed."""
    fits = []
    for file in directory.rglob(results.FILE):
        try:
            one = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(one, dict) and configuration.kind(one) is posterior:
            fits.append(one)
    return sorted(fits, key=lambda one: (one["model"], one["seed"]))


def write(directory: Path, fits: list[dict[str, Any]]) -> None:
    """Writes `posteriors.md` and `posteriors.json`, and prints the table."""
    table = markdown(fits)
    files.write_atomically(directory / "posteriors.json", json.dumps(fits, indent=2) + "\n")
    files.write_atomically(directory / "posteriors.md", table + "\n")
    print(table)
    print(directory / "posteriors.md", directory / "posteriors.json", sep="\n")


def markdown(fits: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row for each model and seed.

    It has C2ST / whitened sliced W2 of every method, and the seconds of the fit and of NUTS.
    """
    columns = {
        "model": [one["model"] for one in fits],
        "seed": [str(one["seed"]) for one in fits],
        "verdict": [one["diagnostics"]["verdict"] for one in fits],
        "distance": [f"{one['diagnostics']['distance']:.2f}" for one in fits],
        **{label: [_cell(one["methods"].get(label)) for one in fits] for label in LABELS},
        "steps": [f"{one['steps']:,}" for one in fits],
        "seconds": [f"{one['methods']['fit']['seconds']:.0f}" for one in fits],
        "NUTS, seconds": [f"{one['methods']['NUTS']['seconds']:.0f}" for one in fits],
    }
    note = "C2ST / whitened sliced W2 against the reference; distance: the total variation the "
    note += "verdict rests on, for which the best C2ST is 1/2 + distance / 2."
    return tables.aligned([[k, *v] for k, v in columns.items()]) + "\n\n" + note


def _cell(measures: dict[str, float] | None) -> str:
    return f"{measures['c2st']:.3f} / {measures['sliced_wasserstein']:.3f}" if measures else ""
