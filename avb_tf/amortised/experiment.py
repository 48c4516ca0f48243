"""Fits a model by its config, checks the calibration, and judges observed data sets."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from avb_tf import configuration, figures, files, results
from avb_tf.amortised.fit import fit_amortised, simulation_of
from avb_tf.amortised.result import META, AmortisedFit
from avb_tf.errors import UserError
from avb_tf.posteriors.experiment import FIT, returned, write_draws
from avb_tf.serving import layout
from avb_tf.training import termination


@dataclasses.dataclass(frozen=True)
class AmortisedProblem:
    """A model with its observed data sets, which a function of a model file may return.

    Attributes:
      model: what `fit_amortised` takes: a TFP joint distribution, a simulator, or a table of pairs.
      observed: names of the observed parts.
      prior: TFP distribution of a simulator's parameters.
      rows: smallest and largest number of rows, if data sets have several.
      observations: data sets for `evaluate` and `sample`, each as `AmortisedFit.sample` takes it.
    """

    model: Any
    observed: Sequence[str] = ("y",)
    prior: Any = None
    rows: tuple[int, int] | None = None
    observations: Sequence[Any] = ()


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs `train`, then `evaluate`."""
    train(config, workdir)
    evaluate(config, workdir)


def train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Fits the model unless the workdir has a fit; resumes from the workdir's checkpoint.

    Raises:
      UserError: the model cannot be loaded or fitted.
      SystemExit: with status 143 after SIGTERM; the same command continues.
    """
    problem = load_problem(config.model)
    # A mistake in the model is reported before anything is written.
    simulation_of(problem.model, problem.prior, problem.observed, problem.rows)
    configuration.save(config, workdir)
    with files.locked(workdir / files.TRAINING), termination.listening():
        fit = _trained(config, workdir, problem)
        if termination.asked():  # while the fit was being saved
            raise SystemExit(termination.STATUS)
    print(f"{workdir}: {fit.steps} steps in {fit.seconds:.0f} s")


def _trained(config, workdir, problem) -> AmortisedFit:
    """Loads the fit of the workdir, or trains and saves one."""
    if files.is_saved(workdir / FIT, META):
        return AmortisedFit.load(workdir / FIT)
    fit = fit_amortised(
        problem.model,
        problem.observed,
        prior=problem.prior,
        rows=problem.rows,
        steps=config.steps or None,
        seconds=config.seconds or None,
        seed=config.seed,
        workdir=workdir,
        **config.fit,
    )
    fit.save(workdir / FIT)
    return fit


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Checks the calibration, and judges the posterior of each observed data set.

    It writes `results.json` and a figure.

    Raises:
      UserError: the workdir has no fit, or is being evaluated.
    """
    problem, fit = _fit(config, workdir)
    with files.locked(workdir / files.EVALUATION):
        _evaluate(config, workdir, problem, fit)


def _evaluate(config, workdir, problem, fit) -> None:
    check = fit.check(pairs=config.eval.pairs)
    print(check)
    record = {
        "method": config.method,
        "model": config.model.rpartition(":")[2],
        "seed": config.seed,
        "steps": fit.steps,
        "seconds": fit.seconds,
        "p_values": check.p_values,
        "coverage_90": dict(zip(check.coordinates, check.coverage(0.9).tolist(), strict=True)),
        "observations": [_observed(fit, y) for y in problem.observations],
    }
    files.write_atomically(workdir / results.FILE, json.dumps(record, indent=2) + "\n")
    print(*figures.save({"calibration": check.plot()}, workdir / "figures"), sep="\n")


def _observed(fit: AmortisedFit, y) -> dict[str, Any]:
    """Returns verdict, evidence and surprise of one data set."""
    surprise = fit.surprise(y)
    print(surprise)
    known: dict[str, Any] = {"surprise": surprise._asdict()}
    if fit.simulation.has_density:
        posterior = fit.posterior(y)
        print(posterior.verdict)
        print(f"log evidence {posterior.evidence} nats")
        known["diagnostics"] = vars(posterior.verdict)
        known["log_evidence"] = posterior.evidence._asdict()
    return known


def sample(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes draws of the posterior of each observed data set as `posterior-<i>.nc`, for arviz.

    Raises:
      UserError: the workdir has no fit, or the model has no observed data sets.
    """
    problem, fit = _fit(config, workdir)
    if not len(problem.observations):
        raise UserError(
            f"{config.model} has no observations; expected an `AmortisedProblem` with some, to "
            "draw from their posteriors"
        )
    for i, y in enumerate(problem.observations):
        print(write_draws(fit.to_arviz(y, config.eval.draws), workdir / f"posterior-{i}.nc"))


def export(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes the fit as `export/<version>/`, for TensorFlow Serving.

    Raises:
      UserError: the workdir has no fit, or the version exists or cannot be written.
    """
    _, fit = _fit(config, workdir)
    name, plain = config.name or workdir.name, configuration.resolve(config)
    print(fit.export(workdir / layout.DIRECTORY, **config.export, name=name, config=plain))


def _fit(config, workdir: Path) -> tuple[AmortisedProblem, AmortisedFit]:
    """Loads the model and its fit. The fit uses the model's code, for numpy simulators."""
    if not files.is_saved(workdir / FIT, META):
        raise UserError(f"{workdir} has no fit; train it first")
    fit, problem = AmortisedFit.load(workdir / FIT), load_problem(config.model)
    source = simulation_of(problem.model, problem.prior, problem.observed, problem.rows)
    return problem, fit.with_model(source)


def load_problem(name: str) -> AmortisedProblem:
    """Calls the function "path.py:function" and returns its model as an `AmortisedProblem`.

    Raises:
      UserError: the file or the function does not exist, or one of them raises.
    """
    problem = returned(name)
    return problem if isinstance(problem, AmortisedProblem) else AmortisedProblem(problem)
