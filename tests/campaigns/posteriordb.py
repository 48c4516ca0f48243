"""Fits the models of posteriordb and compares the draws with those of the database.

    .venv/bin/python -m tests.campaigns.posteriordb posteriordb/posterior_database runs/posteriordb

Each fit has a file, and finished fits are not repeated. Each fit runs in a separate process, two at
a time, because TensorFlow never frees its graphs. `table.md` lists all fits.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from tests.campaigns import processes
from tests.campaigns.verdicts import ACCURACY, DRAWS


def measured(database: Path, name: str, seconds: float, seed: int) -> dict:
    """Fits a posterior and compares the fit with the reference draws."""
    import tensorflow as tf

    import avb_tf
    from avb_tf.posteriors import verdict
    from tests.campaigns import posteriordb_models

    case = posteriordb_models.case(database, name)
    began = time.monotonic()
    try:
        fit = avb_tf.fit_posterior(**case.arguments, seconds=seconds, seed=seed, verbose=False)
    except avb_tf.UserError as error:
        return {"verdict": "refused", "reason": str(error), "seconds": time.monotonic() - began}
    taken = time.monotonic() - began
    diagnostics = fit.diagnostics()
    reference = posteriordb_models.reference(database, name, case.columns)

    def compared(parameters):
        draws = tf.nest.map_structure(lambda v: np.asarray(v, np.float64), parameters)
        by_name = draws if isinstance(draws, dict) else draws._asdict()
        u = case.compared(by_name)
        rows = np.random.default_rng(seed).permutation(len(reference))[: len(u)]
        off = np.abs(u.mean(0) - reference.mean(0)) / reference.std(0)
        sds = np.abs(np.log(u.std(0) / reference.std(0)))
        return {
            "c2st": 0.5 + 0.5 * verdict.classified(u, reference[rows], len(u)),
            "mean_off": float(off.max()),
            "sd_off": float(sds.max()),
        }

    row = compared(fit.sample(DRAWS, seed=1))
    if diagnostics.verdict == "use with refinement":
        began = time.monotonic()
        refined = compared(fit.refine().parameters)
        row |= {"refined": refined["c2st"], "refining": time.monotonic() - began}
    return row | {
        "dim": fit.target.dim,
        "kind": fit.kind,
        "verdict": diagnostics.verdict,
        "reason": diagnostics.reason,
        "distance": diagnostics.distance,
        "seconds": taken,
        "steps": fit.steps,
    }


def table(directory: Path) -> str:
    """Returns a Markdown table of all finished fits, with their counts."""
    from avb_tf import tables

    rows = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    head = ["posterior", "dim", "fit", "verdict", "distance", "C2ST", "mean off", "sd off"]
    head += ["C2ST refined", "taken"]
    cells = [_cells(row) for row in rows]
    verdicts = [row["verdict"] for row in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
    wrong = sum(row["verdict"] == "trust" and row["c2st"] > ACCURACY for row in rows)
    columns = [list(column) for column in zip(head, *cells, strict=True)]
    return (
        f"{len(rows)} fits: {counts}; {wrong} of them false trust.\n\n{tables.aligned(columns)}\n"
    )


def _cells(row):
    name = row["posterior"].split("-")
    name = name[-1] if not name[0].startswith(("nes", "sbl")) else "-".join(name)
    if row["verdict"] == "refused":
        return [name, "", "", "refused", "", "", "", "", "", f"{row['seconds']:.0f} s"]
    return [
        name,
        str(row["dim"]),
        row["kind"],
        row["verdict"],
        f"{row['distance']:.2f}",
        f"{row['c2st']:.3f}",
        f"{row['mean_off']:.2f}",
        f"{row['sd_off']:.2f}",
        f"{row['refined']:.3f}" if "refined" in row else "",
        f"{row['seconds']:.0f} s",
    ]


def main() -> None:
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", type=Path, help="folder posterior_database of the repository")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of posteriors")
    parser.add_argument("--jobs", type=int, default=2, help="posteriors fitted at a time")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    from tests.campaigns import posteriordb_models

    names = options.only or posteriordb_models.names(options.database)
    files = {name: options.directory / f"{name}.json" for name in names}
    begun = [name for name in names if not files[name].exists()]
    if options.here:
        for name in begun:
            row = {"posterior": name, "limit": options.seconds, "seed": options.seed}
            row |= measured(options.database, name, options.seconds, options.seed)
            files[name].write_text(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return
    left = processes.unfinished("tests.campaigns.posteriordb", begun, options.jobs)
    processes.report(options.directory, table(options.directory), left)


if __name__ == "__main__":
    main()
