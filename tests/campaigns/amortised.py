"""Compares amortised posteriors with reference draws of five benchmark tasks, and with exact draws
of six models, by C2ST. Two of the tasks are also fitted as simulators without a density, and all
five from tables of 10,000 finished pairs.

    .venv/bin/python -m tests.campaigns.amortised runs/amortised --seconds 1800 --seeds 0 1 2

Each fit and each observation has a file, and finished ones are not repeated. Each task runs in a
separate process, because TensorFlow never frees its graphs. `table.md` has the means over
observations.
"""

import argparse
import json
import time
from pathlib import Path

from tests.campaigns import processes

OWN = ("gaussian_linear", "hierarchy", "rows", "image", "sir", "lotka_volterra")  # exact draws
SIMULATORS = {"two_moons_simulator": "two_moons", "slcp_simulator": "slcp"}
BENCHMARK = ("two_moons", "gaussian_mixture", "gaussian_linear_uniform", "slcp", "bernoulli_glm")
TABLES = {f"{task}_table": task for task in BENCHMARK}
DENSITIES = SIMULATORS | TABLES  # the same models with their densities
PAIRS = 10_000  # in a table
PLANTED = 20  # data sets with each fault
FAULTS = ("none", "outlier", "shift", "noise")
WRONG = 0.55  # a verdict "trust" with a C2ST above this is false
GOALS = {
    "two_moons": 0.52,
    "gaussian_mixture": 0.52,
    "gaussian_linear_uniform": 0.51,
    "slcp": 0.62,
    "bernoulli_glm": 0.53,
    "two_moons_simulator": 0.54,
    "slcp_simulator": 0.65,
}  # C2ST of a single pass, mean over observations


def targets() -> dict:
    """Returns the models with exact draws by name."""
    from tests.campaigns import amortised_odes, amortised_targets

    return amortised_targets.TARGETS | amortised_odes.TARGETS


def defined(name: str):
    """Returns the model of a task and the arguments of its fit."""
    from tests.campaigns.sbibm import TASKS

    if name in OWN:
        target = targets()[name]()
        return target.model, dict(target.arguments)
    if name in SIMULATORS:
        return without_density(SIMULATORS[name])
    if name in TABLES:
        joint = TASKS[TABLES[name]]().model
        drawn = joint.sample(PAIRS, seed=(5, 5))
        pairs = drawn["theta"].numpy(), drawn["y"].numpy()
        return pairs, {"prior": joint.model["theta"]}
    return TASKS[name]().model, {}


def without_density(task: str):
    """Returns a benchmark task as a function that simulates y, and the arguments of its fit."""
    from tensorflow_probability import distributions as tfd

    from tests.campaigns.sbibm import TASKS

    joint = TASKS[task]().model
    parts = joint.model

    def simulator(theta, seed):
        data = parts["y"](theta)
        return (data.distribution if isinstance(data, tfd.Sample) else data).sample(seed=seed)

    arguments = {"prior": parts["theta"]}
    shape = joint.event_shape["y"]
    if shape.rank == 2:  # of a function, nothing but the argument says that y is a set of rows
        arguments["rows"] = (shape[0], shape[0])
    return simulator, arguments


def observed(name: str, number: int, draws: int) -> tuple:
    """Returns an observed data set, and draws of its posterior by name."""
    import numpy as np

    from tests.campaigns.sbibm import TASKS, references

    if name in OWN:
        target = targets()[name]()
        y = target.observation(number)
        return y, target.exact(y, draws, np.random.default_rng(number))
    name = DENSITIES.get(name, name)
    data = references(name)
    shape = TASKS[name]().model.event_shape["y"]
    y = data["observations"][number].reshape(shape)
    return y, {"theta": data["reference"][number][:draws]}


def stacked(parameters, names):
    """Joins draws by name to [n, dim], in float64."""
    import numpy as np

    parts = [np.asarray(parameters[name], np.float64) for name in names]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def fitted(directory: Path, name: str, seconds: float, seed: int):
    """Returns the fit of a task, trained or loaded, and its folder."""
    import avb_tf
    from avb_tf.amortised.fit import simulation_of

    folder = directory / f"{name}-{seconds:g}s-{seed}"
    model, arguments = defined(name)
    if (folder / "amortised.json").exists():
        fit = avb_tf.AmortisedFit.load(folder)
        if name in TABLES:  # the fit is saved without its pairs
            fit = fit.with_model(simulation_of(model, arguments["prior"], ("y",), None))
        return fit, folder
    fit = avb_tf.fit_amortised(model, seconds=seconds, seed=seed, verbose=False, **arguments)
    fit.save(folder)
    return fit, folder


def measured(fit, name: str, observation: int, draws: int) -> dict:
    """Compares a single pass of the network and its escalation with the reference draws."""
    from avb_tf.posteriors.comparison import c2st

    y, exact = observed(name, observation, draws)
    names = sorted(exact)
    reference = stacked(exact, names)

    def compared(parameters):
        named = parameters if isinstance(parameters, dict) else {"theta": parameters}
        return c2st(stacked(named, names), reference)

    fit.sample(y, draws)  # traces the graph
    began = time.monotonic()
    single = fit.sample(y, draws)
    milliseconds = 1e3 * (time.monotonic() - began)
    row = {
        "milliseconds": milliseconds,
        "c2st": compared(single),
        "unlike": fit.surprise(y).p_value,
    }
    if not fit.simulation.has_density:
        return row
    began = time.monotonic()
    posterior = fit.posterior(y)
    answer = posterior.answer(draws)
    row |= {
        "verdict": answer.diagnostics.verdict,
        "distance": answer.diagnostics.distance,
        "method": answer.method,
        "evidence": list(posterior.evidence),
        "seconds_of_escalation": time.monotonic() - began,
    }
    if answer.method != "network":
        row["c2st_escalated"] = compared(answer.parameters)
    return row


def calibration(fit) -> dict:
    """Returns simulation-based calibration, coverage and TARP."""
    check = fit.check()
    return {
        "steps": fit.steps,
        "seconds": fit.seconds,
        "log_q": fit.history["log_q"][-20:],
        "p_values": check.p_values,
        "coverage_90": check.coverage(0.9).tolist(),
    }


def twins(model, arguments, number: int) -> list:
    """Returns two data sets with the same parameters, of as many rows as the observation."""
    import tensorflow as tf

    from tests.campaigns.amortised_targets import SIZES

    drawn = model.sample(seed=(number, 1))
    given = {name: value for name, value in drawn.items() if name != "y"}
    if "rows" in arguments:
        size = SIZES[number % len(SIZES)]
        given = {name: tf.repeat(value[tf.newaxis], size, 0) for name, value in given.items()}
    return [model.sample(seed=(number, seed), value=given)["y"].numpy() for seed in (2, 3)]


def misspecification(fit, name: str) -> dict[str, int]:
    """Counts how many of `PLANTED` data sets `surprise` flags, for each kind of fault.

    `outlier` moves one number by ten standard deviations of the simulated data, and `shift` moves
    all by three. `noise` is the data plus twice their difference from others with the same
    parameters. `none` are the model's own data, where the test promises one alarm in twenty.
    """
    import numpy as np

    model, arguments = defined(DENSITIES.get(name, name))
    spread = np.std([twins(model, arguments, 1000 + 10 * i)[0] for i in range(100)], 0)
    if "rows" in arguments:  # each of these data sets has two rows
        spread = spread.mean(0)
    flagged = dict.fromkeys(FAULTS, 0)
    for i in range(PLANTED):
        y, other = twins(model, arguments, 100 + i)
        rng = np.random.default_rng(i)
        single = np.zeros(y.size)
        single[rng.integers(y.size)] = 10.0
        changed = {
            "none": y,
            "outlier": y + single.reshape(y.shape) * spread,
            "shift": y + 3.0 * spread,
            "noise": y + 2.0 * (y - other),
        }
        for fault, data in changed.items():
            flagged[fault] += bool(fit.surprise(data).flagged)
    return flagged


def table(directory: Path) -> str:
    """Returns all finished observations as a Markdown table with a row for each fit."""
    import numpy as np

    from avb_tf import tables

    rows = []
    for folder in sorted(directory.glob("*-*s-*")):
        files = [json.loads(f.read_text()) for f in sorted(folder.glob("observation-*.json"))]
        if not files:
            continue
        name, seconds, seed = folder.name.rsplit("-", 2)
        calibrated = json.loads((folder / "calibration.json").read_text())
        faults = json.loads((folder / "misspecification.json").read_text())
        c2st = np.array([row["c2st"] for row in files])
        escalated = [row.get("c2st_escalated", row["c2st"]) for row in files]
        judged = "verdict" in files[0]  # a simulator has no density for a verdict
        trusted = np.array([row.get("verdict") == "trust" for row in files])
        rows.append({
            "task": name,
            "training": seconds,
            "seed": seed,
            "steps": str(calibrated["steps"]),
            "observations": str(len(files)),
            "draws": str(files[0]["draws"]),
            "C2ST": f"{c2st.mean():.3f}",
            "largest": f"{c2st.max():.3f}",
            "asked": f"{GOALS[name]:.2f}" if name in GOALS else "",
            "escalated": f"{np.mean(escalated):.3f}" if judged else "",
            "its largest": f"{np.max(escalated):.3f}" if judged else "",
            "trusted": str(trusted.sum()) if judged else "",
            "false trust": str((trusted & (c2st > WRONG)).sum()) if judged else "",
            "least SBC p": f"{min(calibrated['p_values'].values()):.3f}",
            "90% intervals": f"{np.mean(calibrated['coverage_90']):.3f}",
            "flagged": ", ".join(str(faults[fault]) for fault in FAULTS),
        })  # fmt: skip
    if not rows:
        return "Nothing is finished.\n"
    return tables.aligned([[k, *(row[k] for row in rows)] for k in rows[0]]) + "\n"


def run(options) -> None:
    """Runs the missing tasks and seeds in this process."""
    for name in options.only:
        for seed in options.seeds:
            fit, folder = fitted(options.directory, name, options.seconds, seed)
            for part, result in (
                ("calibration", lambda fit=fit: calibration(fit)),
                ("misspecification", lambda fit=fit, name=name: misspecification(fit, name)),
            ):
                file = folder / f"{part}.json"
                if not file.exists():
                    file.write_text(json.dumps(result()) + "\n")
            for i in range(options.observations):
                file = folder / f"observation-{i}.json"
                if not file.exists():
                    row = measured(fit, name, i, options.draws)
                    row |= {"observation": i, "draws": options.draws}
                    file.write_text(json.dumps(row) + "\n")
                    print(name, seed, json.dumps(row), flush=True)


def main() -> None:
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--draws", type=int, default=10_000)
    tasks = [*GOALS, *OWN, *TABLES]
    parser.add_argument("--only", nargs="+", default=tasks, help="names of tasks")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.here:
        run(options)
        return
    left = processes.unfinished("tests.campaigns.amortised", options.only)
    processes.report(options.directory, table(options.directory), left)


if __name__ == "__main__":
    main()
