"""results.json: what an evaluation found, and tables of it."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from avb_tf import files, tables

FILE = "results.json"
EVALUATION = "evaluation"  # below the workdir: values for each example, and finished chunks
VALUES = "per_example.npz"
# log p(x) without the adversary, the most trustworthy first.
LOG_LIKELIHOODS = (
    "log_likelihood_quadrature", "log_likelihood_ais", "log_likelihood_iwae_5000",
)  # fmt: skip
# Estimates of data simulated from the model, not of the split. They check AIS itself.
SIMULATED = (
    "log_likelihood_simulated_bdmc_lower", "log_likelihood_simulated_bdmc_upper", "bdmc_gap",
)  # fmt: skip
_RENAMED = {  # names in the files of earlier versions
    "log_likelihood_bdmc_lower": "log_likelihood_simulated_bdmc_lower",
    "log_likelihood_bdmc_upper": "log_likelihood_simulated_bdmc_upper",
}
FIELDS = {
    "method", "data", "event_shape", "split", "step", "seconds", "config_hash", "estimates",
}  # fmt: skip


def estimate(values, repeats=None, **settings: Any) -> dict[str, Any]:
    """Mean of per-example `values` in nats, its standard errors, and settings.

    Args:
      values: [examples].
      repeats: [repeats, examples] or None, the same by independent draws; how far their means
        differ is the error of the estimate itself, apart from the choice of the examples.
      **settings: kept beside.
    """
    values = np.asarray(values, np.float64)
    found = {
        "mean": float(values.mean()),
        "standard_error": standard_error(values),
        "count": len(values),
    }
    if repeats is not None and len(repeats) > 1:
        means = np.mean(repeats, -1, np.float64)
        found |= {"standard_error_over_repeats": standard_error(means), "repeats": len(means)}
    return found | settings


def standard_error(values) -> float:
    """Of the mean of `values` [count]; 0 for a single one."""
    count = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else 0.0


def save(workdir: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`."""
    files.write_atomically(workdir / FILE, json.dumps(results, indent=2) + "\n")


def read(file: Path) -> dict[str, Any] | None:
    """The results in `file`, or None where it holds no run's."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not (isinstance(found, dict) and found.keys() >= FIELDS):
        return None
    if isinstance(found["estimates"], dict):
        found["estimates"] = {_RENAMED.get(k, k): v for k, v in found["estimates"].items()}
    return found


def save_values(workdir: Path, x, values: Mapping[str, np.ndarray]) -> None:
    """Writes the values of each example, by estimate.

    Args:
      workdir: of the run.
      x: [count, *event]; the hash of an example tells whether that of another run is the same.
      values: by estimate, [n], those of the first n examples.
    """
    names = [hashlib.sha256(one.tobytes()).digest()[:8] for one in np.ascontiguousarray(x)]
    buffer = io.BytesIO()
    example = np.frombuffer(b"".join(names), np.uint64)
    np.savez_compressed(buffer, allow_pickle=False, example=example, **values)
    (workdir / EVALUATION).mkdir(exist_ok=True)
    files.write_atomically(workdir / EVALUATION / VALUES, buffer.getvalue())


def load_values(workdir: Path) -> dict[str, np.ndarray]:
    """What `save_values` wrote; empty where it is lost or damaged."""
    try:
        content = (workdir / EVALUATION / VALUES).read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            found = dict(archive)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
    return found if "example" in found else {}


def best_log_likelihood(estimates: Mapping[str, Any]) -> str | None:
    """The name of the most trustworthy estimate of log p(x) there is."""
    return next((name for name in LOG_LIKELIHOODS if name in estimates), None)


def siblings(workdir: Path) -> dict[str, dict[str, Any]]:
    """Results of all runs beside `workdir`, itself included, that evaluated the same data.

    By the name of their directory. What is not the results of a run is left out.
    """
    found = {}
    for file in sorted(workdir.parent.glob(f"*/{FILE}")):
        if (run := read(file)) is not None:
            found[file.parent.name] = run
    same = ("data", "event_shape", "split")
    own = found[workdir.name]
    return {name: run for name, run in found.items() if all(run[k] == own[k] for k in same)}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The estimates of `runs` in nats, mean +- standard error, as Markdown: a column for a run.

    Estimates of data simulated from the model come last, below a row that says so.
    """
    names = list(dict.fromkeys(n for run in runs.values() for n in run["estimates"]))
    simulated = [name for name in names if name in SIMULATED]
    names = [name for name in names if name not in SIMULATED]
    if simulated:
        names += ["of data simulated from the model:", *simulated]
    columns = [["nats per example", *names, "steps"]]
    for run, found in runs.items():
        cells = [_cell(found["estimates"].get(name)) for name in names]
        columns.append([run, *cells, f"{found['step']:,}"])
    return tables.aligned(columns)


def quality(found: dict[str, Any]) -> str:
    """What the estimates of one run rest on, as Markdown: a row for each that says so."""
    columns = {
        "standard_error_over_repeats": ("error of repeats", ".4f"),
        "effective_sample_size": ("effective samples", ".1f"),
        "pareto_k": ("Pareto k, median", ".2f"),
        "pareto_k_above_0.7": ("above 0.7", ".0%"),
        "seconds": ("seconds", ".1f"),
    }
    rows = {
        name: row
        for name, row in found["estimates"].items()
        if row.keys() & columns.keys() and not name.startswith("bits_per_dim")
    }
    cells = [["what it rests on", *rows]]
    for name, (title, form) in columns.items():
        values = [row.get(name) for row in rows.values()]
        cells.append([title, *("" if v is None else format(v, form) for v in values)])
    return tables.aligned(cells)


def _cell(found: dict[str, Any] | None) -> str:
    return f"{found['mean']:.4f} +- {found['standard_error']:.4f}" if found else ""
