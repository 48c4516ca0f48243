"""The file results.json, which summarises an evaluation, and tables of its content."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from avb_tf import archives, files, tables

FILE = "results.json"
EVALUATION = "evaluation"  # folder in the workdir for each example's values and finished chunks
VALUES = "per_example.npz"
# Estimates of log p(x) that do not use the adversary, the most trustworthy first.
LOG_LIKELIHOODS = (
    "log_likelihood_quadrature", "log_likelihood_ais", "log_likelihood_iwae_5000",
)  # fmt: skip
# Estimates for data simulated from the model, not for the split. They check AIS itself.
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


def estimate(
    values: npt.ArrayLike, repeats: npt.ArrayLike | None = None, **settings: Any
) -> dict[str, Any]:
    """Summarises per-example values: their mean with its standard errors, in nats.

    Args:
      values: [examples].
      repeats: [repeats, examples] or None, repeated estimates from independent draws. The spread of
        their means shows the error of the estimator, without the error from the choice of examples.
      **settings: added to the summary.
    """
    values = np.asarray(values, np.float64)
    summary = {
        "mean": float(values.mean()),
        "standard_error": standard_error(values),
        "count": len(values),
    }
    if repeats is not None and len(means := np.asarray(repeats, np.float64).mean(-1)) > 1:
        summary |= {"standard_error_over_repeats": standard_error(means), "repeats": len(means)}
    return summary | settings


def standard_error(values: npt.ArrayLike) -> float:
    """Returns the standard error of the mean of `values` [count]; 0 for a single value."""
    values = np.asarray(values)
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def save(workdir: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`."""
    files.write_atomically(workdir / FILE, json.dumps(results, indent=2) + "\n")


def read(file: Path) -> dict[str, Any] | None:
    """Returns the results in `file`, or None if it is missing or does not hold a run's results."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not (isinstance(content, dict) and content.keys() >= FIELDS and _well_formed(content)):
        return None
    content["estimates"] = {_RENAMED.get(k, k): v for k, v in content["estimates"].items()}
    return content


def _well_formed(content: dict[str, Any]) -> bool:
    """Returns whether the fields that tables use have the right types."""
    estimates = content["estimates"]
    return (
        all(isinstance(content[name], str) for name in ("method", "data", "split"))
        and isinstance(content["event_shape"], list)
        and isinstance(content["step"], int)
        and isinstance(estimates, dict)
        and all(
            isinstance(summary, dict)
            and all(isinstance(summary.get(k), int | float) for k in ("mean", "standard_error"))
            for summary in estimates.values()
        )
    )


def save_values(workdir: Path, x: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
    """Writes each example's values of the estimates.

    Args:
      workdir: the run's directory.
      x: [count, *event]; a hash of each example is saved, so that runs can be compared example by
        example.
      values: estimate -> [n], its values for the first n examples.
    """
    names = [hashlib.sha256(one.tobytes()).digest()[:8] for one in np.ascontiguousarray(x)]
    buffer = io.BytesIO()
    example = np.frombuffer(b"".join(names), np.uint64)
    np.savez_compressed(buffer, allow_pickle=False, example=example, **values)
    files.make_directory(workdir / EVALUATION)
    files.write_atomically(workdir / EVALUATION / VALUES, buffer.getvalue())


def load_values(workdir: Path) -> dict[str, np.ndarray]:
    """Reads the file that `save_values` wrote; returns {} if it is missing or damaged."""
    try:
        values = archives.read_arrays(workdir / EVALUATION / VALUES)
    except Exception:  # zipfile, zlib and numpy raise many types on a damaged file
        return {}
    return values if "example" in values else {}


def best_log_likelihood(estimates: Mapping[str, Any]) -> str | None:
    """Returns the name of the most trustworthy estimate of log p(x) in `estimates`, or None."""
    return next((name for name in LOG_LIKELIHOODS if name in estimates), None)


def siblings(workdir: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of `workdir` and of all runs next to it that evaluated the same data.

    Args:
      workdir: an evaluated run's directory.
    Returns:
      Name of the directory -> its results.
    """
    runs = {}
    for file in sorted(workdir.parent.glob(f"*/{FILE}")):
        if (run := read(file)) is not None:
            runs[file.parent.name] = run
    same = ("data", "event_shape", "split")
    own = runs[workdir.name]
    return {name: run for name, run in runs.items() if all(run[k] == own[k] for k in same)}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Returns a Markdown table of estimates in nats, mean +- standard error, a column for each run.

    Estimates for data simulated from the model come last, below a row that says so.

    Args:
      runs: name of a run -> content of its results.json.
    """
    names = list(dict.fromkeys(n for run in runs.values() for n in run["estimates"]))
    simulated = [name for name in names if name in SIMULATED]
    names = [name for name in names if name not in SIMULATED]
    if simulated:
        names += ["of data simulated from the model:", *simulated]
    columns = [["nats per example", *names, "steps"]]
    for name_of_run, run in runs.items():
        cells = [_cell(run["estimates"].get(name)) for name in names]
        columns.append([name_of_run, *cells, f"{run['step']:,}"])
    return tables.aligned(columns)


def quality(run: dict[str, Any]) -> str:
    """Returns a Markdown table of how reliable one run's estimates are.

    Args:
      run: content of results.json.
    """
    columns = {
        "standard_error_over_repeats": ("error of repeats", ".4f"),
        "effective_sample_size": ("effective samples", ".1f"),
        "pareto_k": ("Pareto k, median", ".2f"),
        "pareto_k_above_0.7": ("above 0.7", ".0%"),
        "seconds": ("seconds", ".1f"),
    }
    rows = {
        name: row
        for name, row in run["estimates"].items()
        if row.keys() & columns.keys() and not name.startswith("bits_per_dim")
    }
    cells = [["reliability", *rows]]
    for name, (title, form) in columns.items():
        values = [row.get(name) for row in rows.values()]
        cells.append([title, *("" if v is None else format(v, form) for v in values)])
    return tables.aligned(cells)


def _cell(summary: dict[str, Any] | None) -> str:
    return f"{summary['mean']:.4f} +- {summary['standard_error']:.4f}" if summary else ""
