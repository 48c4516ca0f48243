"""A posterior's config -> a fit, and its comparison with the usual alternatives."""

import hashlib
import io
import json
import os
import runpy
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import archives, configuration, figures, files, results
from avb_tf.errors import UserError
from avb_tf.figures.pairs import pairs
from avb_tf.posteriors import baselines, comparison, models
from avb_tf.posteriors.coordinates import Start
from avb_tf.posteriors.fit import fit_posterior, load_posterior
from avb_tf.posteriors.result import META, PosteriorFit
from avb_tf.serving import layout

FIT, DRAWS = "fit", "posterior.nc"
_CHAINS = 4
_SEED = 123  # seed of the reference and of the draws for the comparison


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Fits the posterior, then evaluates the fit."""
    train(config, workdir)
    evaluate(config, workdir)


def train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Fits the posterior, unless the workdir has the fit already, and prints the verdict.

    Raises:
      UserError: the model cannot be loaded or fitted.
    """
    problem = load_problem(config.model)
    models.of_problem(problem)  # raises for a wrong model before anything is written
    configuration.save(config, workdir)
    with files.locked(workdir / files.TRAINING):
        fit = _trained(config, workdir, problem)
    print(f"{workdir}: {fit.steps} steps in {fit.seconds:.0f} s")
    print(fit.diagnostics())
    print(f"log evidence {fit.log_evidence} nats")


def _trained(config, workdir, problem) -> PosteriorFit:
    """Returns the fit of the workdir, or fits the posterior and saves the fit there."""
    if files.is_saved(workdir / FIT, META):
        return load_posterior(workdir / FIT)
    fit = fit_posterior(
        problem.model,
        problem.observed,
        shape=problem.shape,
        bijector=problem.bijector,
        dtype=problem.dtype,
        batch_size=problem.batch_size,
        steps=config.steps or None,
        seconds=config.seconds or None,
        seed=config.seed,
        **config.fit,
    )
    fit.save(workdir / FIT)
    return fit


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Compares the fit, Gaussian variational inference and NUTS with the reference.

    The reference is exact if the model's file provides exact draws, and a NUTS run of four times
    the length otherwise. Writes `results.json`, `posterior.nc` for arviz, and pair plots.

    Raises:
      UserError: the workdir has no fit, or is being evaluated.
    """
    fit = _fit(workdir)
    with files.locked(workdir / files.EVALUATION):
        _evaluate(config, workdir, fit)


def _evaluate(config, workdir, fit) -> None:
    problem = load_problem(config.model)
    target = models.of_problem(problem)
    e, name = config.eval, config.model.rpartition(":")[2]
    folder = Path(e.reference) if e.reference else workdir
    others, known = _others(problem, target, fit.start, config, folder / name)
    reference = others["reference"]

    draws, seconds = {"fit": fit.unconstrained(e.draws, _SEED)}, {"fit": fit.seconds}
    verdict = fit.diagnostics()
    if e.refine and verdict.verdict == "use with refinement":
        began = time.perf_counter()
        draws["fit, refined"] = fit.refine(e.refine, e.draws, _SEED).u
        seconds["fit, refined"] = fit.seconds + time.perf_counter() - began
    methods = _measured(draws, seconds, reference) | known["methods"]
    record: dict[str, Any] = {
        "method": config.method,
        "model": name,
        "seed": config.seed,
        "steps": fit.steps,
        "reference": known["reference"],
        "log_evidence": fit.log_evidence._asdict() | {"exact": problem.log_evidence},
        "diagnostics": vars(verdict),
        "statistics": _statistics(problem, target, draws | {"reference": reference}),
        "methods": methods,
    }
    files.write_atomically(workdir / results.FILE, json.dumps(record, indent=2) + "\n")
    print(verdict)
    print(comparison.table(methods))
    for statistic, values in record["statistics"].items():
        print(statistic, *(f"{label} {value:.3f}" for label, value in values.items()), sep=", ")
    write_draws(fit.to_arviz(e.draws), workdir / DRAWS)
    shown = {label: (draws | others)[label] for label in ("fit", "full-rank VI", "reference")}
    drawn = {"pairs": pairs(shown, target.coordinates(), "unconstrained")}
    print(*figures.save(drawn, workdir / "figures"), sep="\n")


def sample(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes 2,000 draws of the fit as `posterior.nc`, for arviz.

    Raises:
      UserError: the workdir has no fit.
    """
    del config
    print(write_draws(_fit(workdir).to_arviz(), workdir / DRAWS))


def export(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Exports the fit as `export/<version>/`, for TensorFlow Serving.

    Raises:
      UserError: the workdir has no fit, or the version exists or cannot be written.
    """
    fit, plain = _fit(workdir), configuration.resolve(config)
    name = config.name or workdir.name
    print(fit.export(workdir / layout.DIRECTORY, **config.export, name=name, config=plain))


def write_draws(draws: Any, path: Path) -> Path:
    """Writes `arviz.InferenceData` as a netCDF file, atomically, and returns the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    files.remove_leftovers(path)
    draws.to_netcdf(str(temporary))
    files.replace(temporary, path)
    return path


def _fit(workdir: Path) -> PosteriorFit:
    if not files.is_saved(workdir / FIT, META):
        raise UserError(f"{workdir} has no fit; train it first")
    return load_posterior(workdir / FIT)


def load_problem(name: str) -> models.Problem:
    """Calls the function "path.py:function" and returns its model as a `Problem`.

    Raises:
      UserError: the file or the function does not exist, or one of them raises.
    """
    problem = returned(name)
    if isinstance(problem, tuple):
        return models.Problem(*problem)
    return problem if isinstance(problem, models.Problem) else models.Problem(problem)


def returned(name: str) -> Any:
    """Calls the function "path.py:function" and returns what it returns.

    Raises:
      UserError: the file or the function does not exist, or one of them raises.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"config.model names '{path}', which is no file; expected path.py:function")
    try:
        namespace = runpy.run_path(path)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{path} raised {type(error).__name__}: {error}") from error
    if not callable(namespace.get(function)):
        raise UserError(f"{path} has no function '{function}'; expected one that returns a model")
    try:
        return namespace[function]()
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{name} raised {type(error).__name__}: {error}") from error


def _others(problem, target, begun: Start, config, stem: Path):
    """Returns the baselines and the reference of a model, and the measures of the baselines.

    Fits of all seeds share them, so they are stored in `stem`.npz and `stem`.json.

    Returns:
      Draws [eval.draws, dim] by name, including "reference"; and a record that describes them and
      has the measures of all others.
    """
    settings = config.eval
    asked = {k: settings[k] for k in ("draws", "gaussian_steps", "nuts_draws")}
    model, _, function = config.model.rpartition(":")
    asked["model"] = f"{function}, {hashlib.sha256(Path(model).read_bytes()).hexdigest()[:16]}"
    arrays, record = stem.with_suffix(".npz"), stem.with_suffix(".json")
    if (kept := _kept(arrays, record, asked)) is not None:
        return kept
    draws, seconds = {}, {}
    for label, make in {
        "mean-field VI": lambda: _gaussian(target, begun, settings, False),
        "full-rank VI": lambda: _gaussian(target, begun, settings, True),
        "NUTS": lambda: baselines.nuts(target, begun, settings.nuts_draws, _CHAINS),
    }.items():
        began = time.perf_counter()
        draws[label] = make()
        seconds[label] = time.perf_counter() - began
    chains, longer = draws["NUTS"], None
    draws["NUTS"] = _thinned(chains.u, settings.draws)
    if problem.exact:
        reference, again = (_exact(problem, target, settings.draws, s) for s in (_SEED, _SEED + 1))
        draws["exact, again"], seconds["exact, again"] = again, 0.0
    else:
        longer = baselines.nuts(target, begun, 4 * settings.nuts_draws, _CHAINS, 1000, seed=_SEED)
        reference = _thinned(longer.u, settings.draws)
        if longer.r_hat > baselines.R_HAT_LIMIT:
            print(f"warning: the reference's R-hat is {longer.r_hat:.3f}; raise eval.nuts_draws")
    known: dict[str, Any] = {
        "settings": asked,
        "reference": f"NUTS, R-hat {longer.r_hat:.4f}" if longer else "exact",
        "nuts": {"r_hat": chains.r_hat, "effective_sample_size": chains.effective_sample_size},
        "methods": _measured(draws, seconds, reference),
    }
    draws["reference"] = reference
    _keep(arrays, record, draws, known)
    return draws, known


def _keep(arrays: Path, record: Path, draws: dict[str, np.ndarray], known: dict[str, Any]) -> None:
    """Writes both files, for `_kept`."""
    files.make_directory(record.parent)
    record.unlink(missing_ok=True)  # it must not describe the arrays of other settings
    files.sync(record.parent)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **draws)
    files.write_atomically(arrays, buffer.getvalue())
    files.write_atomically(record, json.dumps(known, indent=2) + "\n")


def _kept(arrays: Path, record: Path, asked: dict[str, Any]):
    """Returns what an earlier call stored for the same settings; None if missing or damaged."""
    try:
        known = json.loads(record.read_text())
        return (archives.read_arrays(arrays), known) if known["settings"] == asked else None
    except Exception:  # JSON, zipfile and numpy raise exceptions of many types on a damaged file
        return None


def _gaussian(target, begun, settings, full_rank):
    return baselines.gaussian(target, begun, full_rank, settings.draws, settings.gaussian_steps)


def _exact(problem, target, count, seed):
    return target.unconstrain(tf.nest.map_structure(np.asarray, problem.exact(count, seed)))


def _measured(draws, seconds, reference):
    """Returns the measures of each set of draws: label of the draws -> measure -> value."""
    measures = {}
    for label, u in draws.items():
        print(f"comparing {label} with the reference", flush=True)
        measures[label] = comparison.compare(u, reference) | {"seconds": round(seconds[label], 1)}
    return measures


def _statistics(problem, target, draws) -> dict[str, dict[str, float]]:
    """Returns the statistics that the model's file defines: name -> label of the draws -> value."""
    if problem.statistics is None:
        return {}
    values = {}
    for label, u in draws.items():
        parameters = target.constrain(tf.constant(u, target.dtype))
        for name, value in problem.statistics(
            tf.nest.map_structure(np.asarray, parameters)
        ).items():
            values.setdefault(name, {})[label] = float(value)
    return values


def _thinned(u, count):
    return u[np.linspace(0, len(u) - 1, count).astype(int)]
