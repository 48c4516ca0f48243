"""Fits models of inference_gym and compares means and deviations with its ground truth.

    .venv/bin/python -m tests.campaigns.gym runs/gym

The ground truth is of long chains of Stan's NUTS. Each fit has a file, and finished fits are not
repeated. Each fit runs in a separate process, because TensorFlow never frees its graphs. `table.md`
lists all fits.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from tests.campaigns import processes

# Those with a ground truth whose data come with the package, but for stochastic volatility of 2,516
# days, which has more dimensions than a fit takes.
TARGETS = (
    "BrownianMotionMissingMiddleObservations",
    "BrownianMotionUnknownScalesMissingMiddleObservations",
    "ConvectionLorenzBridge",
    "ConvectionLorenzBridgeUnknownScales",
    "EightSchools",
    "StochasticVolatilitySP500Small",
    "SyntheticItemResponseTheory",
    "SyntheticLogGaussianCoxProcess",
    "VectorizedStochasticVolatilityLogSP500Small",
    "VectorizedStochasticVolatilitySP500Small",
)
DRAWS = 20_000


def measured(name: str, seconds: float, seed: int) -> dict:
    """Fits a model and compares the fit with the ground truth."""
    from inference_gym import using_tensorflow as gym

    import avb_tf

    truth = getattr(gym.targets, name)()
    model = gym.targets.VectorModel(truth, flatten_sample_transformations={"identity": "identity"})
    known = model.sample_transformations["identity"]
    mean, sd = map(np.asarray, (known.ground_truth_mean, known.ground_truth_standard_deviation))
    began = time.monotonic()
    fit = avb_tf.fit_posterior(
        model.unnormalized_log_prob,
        shape=model.event_shape,
        bijector=model.default_event_space_bijector,
        seconds=seconds,
        seed=seed,
        verbose=False,
    )
    taken = time.monotonic() - began
    diagnostics = fit.diagnostics()

    def compared(parameters):
        draws = np.asarray(known(parameters), np.float64)
        off = np.abs(draws.mean(0) - mean) / sd
        return float(off.max()), float(np.abs(np.log(draws.std(0) / sd)).max())

    row = {"dim": fit.target.dim, "kind": fit.kind, "verdict": diagnostics.verdict}
    row |= {"distance": diagnostics.distance, "r_hat": diagnostics.r_hat, "seconds": taken}
    row |= {"fitted": compared(fit.sample(DRAWS, seed=1)), "refined": None}
    if diagnostics.verdict == "use with refinement":
        row["refined"] = compared(fit.refine().parameters)
    return row


def table(directory: Path) -> str:
    """Returns a Markdown table of all finished fits."""
    from avb_tf import tables

    head = ["model", "dim", "fit", "verdict", "distance", "R-hat", "mean off", "sd off"]
    head += ["mean off, refined", "sd off, refined", "taken"]
    cells = []
    for path in sorted(directory.glob("*.json")):
        row = json.loads(path.read_text())
        errors = [f"{error:.2f}" for error in row["fitted"] + (row["refined"] or [])]
        errors += [""] * (4 - len(errors))
        named = [path.stem, str(row["dim"]), row["kind"], row["verdict"]]
        numbers = [f"{row['distance']:.2f}", f"{row['r_hat']:.2f}", *errors]
        cells.append([*named, *numbers, f"{row['seconds']:.0f} s"])
    return tables.aligned([list(column) for column in zip(head, *cells, strict=True)])


def main() -> None:
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=TARGETS, help="names of models")
    parser.add_argument("--jobs", type=int, default=2, help="models fitted at a time")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    files = {name: options.directory / f"{name}.json" for name in options.only}
    begun = [name for name in options.only if not files[name].exists()]
    if options.here:
        for name in begun:
            row = measured(name, options.seconds, options.seed)
            files[name].write_text(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return
    left = processes.unfinished("tests.campaigns.gym", begun, options.jobs)
    processes.report(options.directory, table(options.directory) + "\n", left)


if __name__ == "__main__":
    main()
