"""Compares the finished runs below a directory: a table, a figure, and which method is better."""

import collections
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from avb_tf import checkpoints, configuration, data, figures, files, results, tables
from avb_tf.data import pipeline
from avb_tf.errors import UserError
from avb_tf.figures import comparison as comparison_figures
from avb_tf.figures import model as model_figures
from avb_tf.figures import training as training_curves
from avb_tf.posteriors import overview

BASELINE = "vae"  # all other methods are compared with it, example by example
EXAMPLES = 500  # examples in the figures of latent spaces
POSTERIORS = 8  # examples in the figure of exact posteriors, for models with two latents
CLEAR = 2.0  # smallest difference, in standard errors, that is called clear


class EvaluatedRun(NamedTuple):
    """A run whose evaluation is finished.

    Attributes:
      name: the run's directory, relative to the directory that is compared.
      results: content of results.json.
      values: estimate -> [examples]; empty if the file is missing or damaged.
    """

    name: str
    results: dict[str, Any]
    values: dict[str, np.ndarray]


def compare(_: Any, workdir: Path) -> None:
    """Writes `comparison.md`, `comparison.json` and figures of all finished runs below `workdir`.

    Fitted posteriors get a separate table, `posteriors.md` and `posteriors.json`.
    Runs of one method on the same data that differ only in their seed form one row. The row shows
    the mean over seeds with its standard error; with a single seed the standard error is over
    examples. The row also shows the difference from `vae` on the same data, example by example; if
    there are several configurations of `vae`, the one with the highest log p(x) counts. The last
    lines state for each method how far it is above or below, in standard errors, and repeat the
    warnings of the evaluations.

    Raises:
      UserError: there is no finished run below `workdir`.
    """
    runs, posteriors = find(workdir), overview.find(workdir)
    if not (runs or posteriors):
        raise UserError(
            f"{workdir} holds no finished runs; expected {results.FILE} in a directory below it; "
            "run --mode=evaluate on each first"
        )
    if posteriors:
        overview.write(workdir, posteriors)
    if runs:
        _write(workdir, runs)


def _write(workdir: Path, runs: list[EvaluatedRun]) -> None:
    rows = [row(group, runs) for group in grouped(runs)]
    text = f"{markdown(rows)}\n\n{conclusion(rows)}"
    files.write_atomically(workdir / "comparison.json", json.dumps(rows, indent=2) + "\n")
    files.write_atomically(workdir / "comparison.md", text + "\n")
    paths = figures.save(_training(workdir, runs) | _latents(workdir, runs), workdir)
    (figure,) = figures.save({"comparison": comparison_figures.log_likelihoods(rows)}, workdir)
    print(workdir / "comparison.md", workdir / "comparison.json", *paths, sep="\n")
    print("", text, "", figure, sep="\n")  # the answer comes last


def _training(workdir: Path, runs: list[EvaluatedRun]) -> dict[str, Figure]:
    """Returns figures of the logged bounds on log p(x) against the step, one per data set."""
    drawn = {}
    for name in dict.fromkeys(run.results["data"] for run in runs):
        own = {run.name: run for run in runs if run.results["data"] == name}
        curves = {run: training_curves.read(workdir / run) for run in own}
        curves = {run: curve for run, curve in curves.items() if len(curve)}
        if curves:
            methods = {run: own[run].results["method"] for run in curves}
            drawn[f"training_{name}".replace(":", "_")] = training_curves.draw(curves, methods)
    return drawn


def _latents(workdir: Path, runs: list[EvaluatedRun]) -> dict[str, Figure]:
    """Returns figures of the latent spaces and posteriors of two-latent methods, per data set."""
    drawn = {}
    for key in dict.fromkeys(map(_data, runs)):
        models, source = {}, None
        for run in runs:
            method = run.results["method"]
            if _data(run) != key or method in models:
                continue
            try:
                config = configuration.load(workdir / run.name)
                if config.model.latent_dim == 2:
                    models[method] = checkpoints.load(workdir / run.name)
                    likelihood = models[method].likelihood
                    source = source or data.load(config.data, likelihood)
            except UserError as error:  # the results may outlive the checkpoints
                print(f"Left out of the latent spaces: {error}")
        if source is not None and len(models) > 1:
            split = getattr(source, key[2])
            binary = next(iter(models.values())).likelihood.binary
            x = pipeline.examples(split, EXAMPLES, binary)
            labels = None if split.labels is None else split.labels[: len(x)]
            name = f"{key[0]}_{key[2]}".replace(":", "_")
            drawn[f"latent_spaces_{name}"] = model_figures.latent_spaces(models, x, labels)
            drawn[f"posteriors_{name}"] = model_figures.posteriors(models, x[:POSTERIORS])
    return drawn


def find(directory: Path) -> list[EvaluatedRun]:
    """Returns all finished runs below `directory`, sorted by name; ignores other files."""
    runs = []
    for file in sorted(directory.rglob(results.FILE)):
        if (content := results.read(file)) is not None:
            name = str(file.parent.relative_to(directory))
            runs.append(EvaluatedRun(name, content, results.load_values(file.parent)))
    return runs


def grouped(runs: list[EvaluatedRun]) -> list[list[EvaluatedRun]]:
    """Groups runs that differ only in their seed."""
    groups: dict[tuple[Any, ...], list[EvaluatedRun]] = {}
    for run in runs:
        key = (*_data(run), run.results["method"], run.results.get("family", run.name))
        groups.setdefault(key, []).append(run)
    return [groups[key] for key in sorted(groups, key=str)]


def row(group: list[EvaluatedRun], runs: list[EvaluatedRun]) -> dict[str, Any]:
    """Returns the table's row for one method on one data set.

    Args:
      group: runs that differ only in their seed.
      runs: all runs, including those of the baseline.
    """
    first = group[0].results
    same = [r for r in runs if _data(r) == _data(group[0])]
    of_method = [r for r in same if r.results["method"] == first["method"]]
    several = len(of_method) > len(group)  # configurations of this method
    name = results.best_log_likelihood(first["estimates"]) or ""  # "" if no subset was evaluated
    baseline = _baseline(group, same, name)
    return {
        "data": first["data"],
        "split": first["split"],
        "method": first["method"],
        "label": f"{first['method']} ({group[0].name})" if several else first["method"],
        "runs": [run.name for run in group],
        "seeds": len(group),
        "estimate": name,
        "log_likelihood": _over_seeds(group, name),
        "above_vae": _paired(group, baseline, name) if baseline else None,
        "baseline": [run.name for run in baseline],
        "bound": "elbo" if "elbo" in first["estimates"] else "elbo_adversary",
        "elbo": _over_seeds(group, results.bound_of_same_examples(first["estimates"])),
        "gap_inference": _interval(group, "gap_inference"),
        "gap_shape": _over_seeds(group, "gap_shape"),
        "bdmc_gap": _over_seeds(group, "bdmc_gap"),
        "steps": first["step"],
        "warnings": sum(len(run.results.get("warnings", [])) for run in group),
        "warned": [f"{r.name}: {text}" for r in group for text in r.results.get("warnings", [])],
    }


def _baseline(group, same, name) -> list[EvaluatedRun]:
    """The group of vaes among `same` with the highest log p(x); [] if that is `group`."""
    vaes = grouped([run for run in same if run.results["method"] == BASELINE])
    means = [_over_seeds(vae, name) for vae in vaes]
    known = [(mean["mean"], i) for i, mean in enumerate(means) if mean is not None]
    best = vaes[max(known)[1]] if known else []
    return [] if [run.name for run in best] == [run.name for run in group] else best


def conclusion(rows: list[dict[str, Any]]) -> str:
    """For each data set which method has the higher log p(x), by how much, and how sure that is.

    Every method is compared with the `vae`; the evaluations' warnings stand below the sentences.

    Args:
      rows: as `row` makes them.
    """
    lines = []
    for key in dict.fromkeys((row["data"], row["split"]) for row in rows):
        of_data = [row for row in rows if (row["data"], row["split"]) == key]
        others = [row for row in of_data if row["above_vae"]]
        others.sort(key=lambda row: -row["above_vae"]["mean"])
        lines += [_sentence(row) for row in others]
        if not others:
            names = ", ".join(row["label"] for row in of_data)
            lines.append(
                f"{key[0]} ({key[1]}): nothing to compare log p(x) of {names} with; evaluate a "
                f"{BASELINE} on the same examples too"
            )
        warned = [text for row in of_data for text in row["warned"]]
        lines += [f"  warning, {text}" for text in warned]
    note = (
        "Positive differences favour the method. The error is over held-out examples and, where "
        "there are several, over seeds; with one seed it does not say how far another training "
        "run would differ."
    )
    return "\n".join([*lines, "", note] if any(row["above_vae"] for row in rows) else lines)


def _sentence(row) -> str:
    """How far one method is from the vae."""
    difference = row["above_vae"]
    mean, error = difference["mean"], difference["standard_error"]
    errors = abs(mean) / error if error else np.inf if mean else 0.0
    side = "above" if mean > 0.0 else "below"
    verdict = f"{errors:.1f} standard errors" + ("" if errors >= CLEAR else ", no clear difference")
    seeds = f"{row['seeds']} and {len(row['baseline'])} seeds"
    if row["seeds"] == len(row["baseline"]) == 1:
        seeds = "one seed each"
    estimate = row["estimate"].removeprefix("log_likelihood_")
    return (
        f"{row['data']} ({row['split']}): log p(x) of {row['label']} is {abs(mean):.3f} +- "
        f"{error:.3f} nats {side} {BASELINE}: {verdict} (paired over {difference['count']} "
        f"examples, {seeds}, by {estimate})"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, in nats per example."""
    columns = {
        "data": [row["data"] for row in rows],
        "method": [row["label"] for row in rows],
        "seeds": [str(row["seeds"]) for row in rows],
        "log p(x)": [_cell(row["log_likelihood"]) for row in rows],
        "by": [row["estimate"].removeprefix("log_likelihood_") for row in rows],
        "above vae, paired": [_cell(row["above_vae"], "+") for row in rows],
        "bound": [_cell(row["elbo"]) for row in rows],
        "inference gap": [_interval_cell(row["gap_inference"]) for row in rows],
        "due to shape": [_cell(row["gap_shape"]) for row in rows],
        "BDMC gap": [_cell(row["bdmc_gap"]) for row in rows],
        "steps": [f"{row['steps']:,}" for row in rows],
        "warnings": [str(row["warnings"]) for row in rows],
    }
    columns = {k: v for k, v in columns.items() if any(v)}
    note = (
        "Nats per example, mean +- standard error: over seeds if there are several, otherwise "
        "over examples. The bound is on the same examples as log p(x), and uses the adversary if "
        "the method has one."
    )
    return tables.aligned([[k, *v] for k, v in columns.items()]) + "\n\n" + note


def _over_seeds(group: list[EvaluatedRun], name: str) -> dict[str, Any] | None:
    """Returns the mean over the runs that have the estimate, and its standard error."""
    estimates = [r.results["estimates"][name] for r in group if name in r.results["estimates"]]
    if not estimates:
        return None
    means = [estimate["mean"] for estimate in estimates]
    several = len(estimates) > 1
    error = results.standard_error(means) if several else estimates[0]["standard_error"]
    over = "seeds" if several else "examples"
    count = estimates[0]["count"]
    return {"mean": float(np.mean(means)), "standard_error": error, "over": over, "count": count}


def _interval(group: list[EvaluatedRun], name: str) -> dict[str, Any] | None:
    """Returns the estimate, or {"lower": ..., "upper": ...} if the runs have an interval.

    Earlier versions estimated the ELBO of an implicit posterior by nearest neighbours. Those
    estimates have an unknown bias, so they are left out.
    """
    ends = {end: _over_seeds(group, f"{name}_{end}") for end in ("lower", "upper")}
    if all(ends.values()):
        return ends
    known = [run for run in group if name in run.results["estimates"]]
    biased = "nearest neighbours"
    known = [r for r in known if r.results["estimates"][name].get("bound") != biased]
    return _over_seeds(known, name)


def _paired(
    group: list[EvaluatedRun], baseline: list[EvaluatedRun], name: str
) -> dict[str, Any] | None:
    """Returns the difference of the groups' means over the examples that both evaluated.

    The standard error combines two sources of variance: the variation over examples of the
    differences averaged over seeds, and the variation over seeds of each group with several seeds.
    """
    sides = [[_example_values(run, name) for run in side] for side in (group, baseline)]
    known = [[v for v in side if v is not None] for side in sides]
    if not all(known):
        return None
    common = set.intersection(*(set(v) for side in known for v in side))
    if len(common) < 2:
        return None
    order = sorted(common)
    own, other = (np.array([[v[e] for e in order] for v in side]) for side in known)
    difference = own.mean(0) - other.mean(0)
    over_seeds = [results.standard_error(side.mean(1)) for side in (own, other)]
    error = np.sqrt(results.standard_error(difference) ** 2 + np.sum(np.square(over_seeds)))
    return {
        "mean": float(difference.mean()),
        "standard_error": float(error),
        "over": "examples and seeds" if any(over_seeds) else "examples",
        "count": len(order),
    }


def _example_values(run: EvaluatedRun, name: str) -> dict[tuple[int, int], float] | None:
    """Returns {(hash of the example, number of earlier copies): value}, or None if not saved."""
    if name not in run.values or "example" not in run.values:
        return None
    values = run.values[name].tolist()
    copies, by_example = collections.Counter(), {}
    for example, value in zip(run.values["example"][: len(values)].tolist(), values, strict=True):
        by_example[example, copies[example]] = value
        copies[example] += 1
    return by_example


def _data(run: EvaluatedRun) -> tuple[Any, ...]:
    return run.results["data"], tuple(run.results["event_shape"]), run.results["split"]


def _interval_cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None or "lower" not in estimate:
        return _cell(estimate)
    return f"{_cell(estimate['lower'])} to {_cell(estimate['upper'])}"


def _cell(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    return f"{estimate['mean']:{sign}.3f} +- {estimate['standard_error']:.3f}"
