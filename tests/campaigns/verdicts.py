"""Measures the error rate of the verdict on targets with exact draws.

    .venv/bin/python -m tests.campaigns.verdicts runs/verdicts --seeds 0 1 --seconds 60 6

A fit counts as false trust if the verdict is "trust", and either a classifier separates the fit's
draws from exact ones with an accuracy above 0.55, or the share of a mode is off by more than 0.1.
Each fit has a file, and finished fits are not repeated. Each target runs in a separate process,
because TensorFlow never frees its graphs. `table.md` lists all fits.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

from tests.campaigns import processes

ACCURACY, SHARE = 0.55, 0.1
DRAWS = 3000  # one half trains the classifiers, the other half tests them


def measured(name: str, seconds: float, seed: int) -> dict:
    """Fits a target and compares the fit with the truth."""
    import numpy as np
    import tensorflow as tf

    import avb_tf
    from avb_tf.posteriors import comparison, verdict
    from tests.campaigns.users_targets import TARGETS

    truth = TARGETS[name]()
    began = time.monotonic()
    try:
        fit = avb_tf.fit_posterior(
            truth.model, truth.observed, shape=truth.shape, seconds=seconds, seed=seed,
            dtype="float64", verbose=False,
        )  # fmt: skip
    except avb_tf.UserError as error:
        return {"verdict": "refused", "reason": str(error), "seconds": time.monotonic() - began}
    taken = time.monotonic() - began
    diagnostics = fit.diagnostics()
    exact = tf.nest.map_structure(
        np.asarray, truth.draw(DRAWS, np.random.default_rng(10_000 + seed))
    )
    reference, u = fit.target.unconstrain(exact), fit.unconstrained(DRAWS, seed=1)
    shares = None
    if truth.modes is not None:
        nearest = [
            np.linalg.norm(x[:, np.newaxis] - truth.modes, axis=-1).argmin(1)
            for x in (u, reference)
        ]
        counts = [np.bincount(k, minlength=len(truth.modes)) / DRAWS for k in nearest]
        shares = float(np.abs(counts[0] - counts[1]).max())
    return {
        "kind": fit.kind,
        "verdict": diagnostics.verdict,
        "reason": diagnostics.reason,
        "distance": diagnostics.distance,
        "seconds": taken,
        "steps": fit.steps,
        "c2st": 0.5 + 0.5 * verdict.classified(u, reference, DRAWS),
        "sliced_wasserstein": comparison.sliced_wasserstein(u, reference),
        "share_off": shares,
        "log_evidence": list(fit.log_evidence),
        "exact_log_evidence": truth.log_evidence,
    }


def false_trust(row: dict) -> bool:
    """Returns whether the verdict is "trust" although the fit is wrong."""
    off = row.get("share_off") or 0.0
    return row["verdict"] == "trust" and (row["c2st"] > ACCURACY or off > SHARE)


def file_of(directory: Path, name: str, seconds: float, seed: int) -> Path:
    """Returns the file of a fit."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return directory / f"{plain}-{seconds:g}s-{seed}.json"


def table(directory: Path) -> str:
    """Returns a Markdown table of all finished fits, by target and seconds, with their counts.

    A cell has the values of all seeds, in their order. `FALSE` marks false trust.
    """
    from avb_tf import tables
    from tests.campaigns.users_targets import TARGETS

    rows = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    order = list(TARGETS)
    rows.sort(key=lambda row: (-row["limit"], order.index(row["target"]), row["seed"]))
    texts, summaries = [], []
    for seconds, of_limit in itertools.groupby(rows, lambda row: row["limit"]):
        fits = list(of_limit)
        head = ["target", "fit", "verdict", "distance", "C2ST", "SW2", "share off", "evidence"]
        head += ["taken"]
        cells = [
            [name, *(", ".join(filter(None, v)) for v in zip(*map(_cells, same), strict=True))]
            for name, same in itertools.groupby(fits, lambda row: row["target"])
        ]
        columns = [list(column) for column in zip(head, *cells, strict=True)]
        texts.append(f"Fits of {seconds:g} seconds:\n\n{tables.aligned(columns)}")
        summaries.append(f"{seconds:g} seconds: {_summary(fits)}")
    return "\n\n".join([*summaries, *texts]) + "\n"


def _cells(row):
    """Returns the cells of a fit; the evidence is its error in standard errors."""
    short = {"use with refinement": "refine", "do not trust": "no"}.get(
        row["verdict"], row["verdict"]
    )
    if row["verdict"] == "refused":
        return ["", short, "", "", "", "", "", f"{row['seconds']:.0f} s"]
    off = row["share_off"]
    return [
        row.get("kind", ""),
        short + (" FALSE" if false_trust(row) else ""),
        f"{row['distance']:.2f}",
        f"{row['c2st']:.3f}",
        f"{row['sliced_wasserstein']:.3f}",
        "" if off is None else f"{off:.2f}",
        _errors(row),
        f"{row['seconds']:.0f} s",
    ]


def _summary(rows):
    """Returns the counts of the verdicts and of estimates of the evidence, in a sentence."""
    verdicts = [row["verdict"] for row in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
    errors = [abs(float(error)) for error in map(_errors, rows) if error != "unknown"]
    close = sum(error <= 3.0 for error in errors)
    return (
        f"{len(rows)} fits: {counts}; {sum(map(false_trust, rows))} of them false trust. The "
        f"evidence is within three standard errors of the exact one for {close} of the "
        f"{len(errors)} for which both are known."
    )


def _errors(row):
    """Returns the error of the evidence in units of its stated standard error."""
    value, error = row.get("log_evidence", [0.0, float("inf")])
    exact = row.get("exact_log_evidence")
    if exact is None or error == float("inf"):
        return "unknown"
    return f"{(value - exact) / error:+.1f}"


def main() -> None:
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 6.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", help="names of targets")
    parser.add_argument("--jobs", type=int, default=1, help="targets fitted at a time")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    from tests.campaigns.users_targets import TARGETS

    def fits(name):
        """Yields what is not finished yet of a target."""
        for seconds, seed in itertools.product(options.seconds, options.seeds):
            if not file_of(options.directory, name, seconds, seed).exists():
                yield seconds, seed

    names = options.only or list(TARGETS)
    if options.here:
        for name in names:
            for seconds, seed in fits(name):
                row = {"target": name, "limit": seconds, "seed": seed}
                row |= measured(name, seconds, seed)
                file_of(options.directory, name, seconds, seed).write_text(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
        return
    begun = [name for name in names if any(fits(name))]
    left = processes.unfinished("tests.campaigns.verdicts", begun, options.jobs)
    processes.report(options.directory, table(options.directory), left)


if __name__ == "__main__":
    main()
