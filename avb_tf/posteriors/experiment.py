"""A posterior's config -> a fit, and its comparison with what users would reach for otherwise."""

import json
import runpy
import time
from pathlib import Path

import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import configuration, figures
from avb_tf.errors import UserError
from avb_tf.posteriors import baselines, comparison, plots, start, target
from avb_tf.posteriors.fit import fit_posterior, load_posterior
from avb_tf.posteriors.result import PosteriorFit
from avb_tf.serving import layout

RESULTS, FIT, REFERENCE = "results.json", "fit", "reference-{}.npz"
_CHAINS = 4
_SEED = 123  # of the reference and of draws for the comparison


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Both, in this order."""
    train(config, workdir)
    evaluate(config, workdir)


def train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Fits the posterior, unless the workdir has the fit already, and prints the verdict.

    Raises:
      UserError: a model that cannot be loaded or fitted.
    """
    problem = load_problem(config.model)
    target.of_problem(problem)  # a mistake in it comes before anything is written
    configuration.save(config, workdir)
    if (workdir / FIT).exists():
        fit = load_posterior(workdir / FIT)
    else:
        fit = fit_posterior(
            problem.model,
            problem.observed,
            shape=problem.shape,
            bijector=problem.bijector,
            dtype=problem.dtype,
            steps=config.steps or None,
            seconds=config.seconds or None,
            seed=config.seed,
            **config.fit,
        )
        fit.save(workdir / FIT)
    evidence = fit.log_evidence
    print(f"{workdir}: {fit.steps} steps in {fit.seconds:.0f} s")
    print(fit.diagnostics())
    print(f"log evidence {evidence.value:.3f} +- {evidence.standard_error:.3f} nats")


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """The fit beside Gaussian variational inference and NUTS, each against the reference.

    The reference is exact where the model's file brings exact draws, and NUTS at four times the
    length otherwise. Writes `results.json`, `posterior.nc` for arviz, and pair plots.

    Raises:
      UserError: no fit.
    """
    fit = _fit(workdir)
    problem = load_problem(config.model)
    goal = target.of_problem(problem)
    e = config.eval
    name = config.model.rpartition(":")[2]
    folder = Path(e.reference) if e.reference else workdir
    reference, r_hat = _reference(problem, goal, fit.start, e, folder / REFERENCE.format(name))

    draws, seconds = {"fit": fit.unconstrained(e.draws, _SEED)}, {"fit": fit.seconds}
    verdict = fit.diagnostics()
    if e.refine and verdict.verdict == "use with refinement":
        began = time.perf_counter()
        draws["fit, refined"] = fit.refine(e.refine, e.draws, _SEED).u
        seconds["fit, refined"] = fit.seconds + time.perf_counter() - began
    for label, full_rank in (("mean-field VI", False), ("full-rank VI", True)):
        began = time.perf_counter()
        draws[label] = baselines.gaussian(
            goal, fit.start, full_rank, e.draws, e.gaussian_steps, config.seed
        )
        seconds[label] = time.perf_counter() - began
    began = time.perf_counter()
    chains = baselines.nuts(goal, fit.start, e.nuts_draws, _CHAINS, seed=config.seed)
    draws["NUTS"] = _thinned(chains.u, e.draws)
    seconds["NUTS"] = time.perf_counter() - began

    methods = {
        label: comparison.compare(u, reference) | {"seconds": round(seconds[label], 1)}
        for label, u in draws.items()
    }
    results = {
        "method": config.method,
        "model": name,
        "seed": config.seed,
        "steps": fit.steps,
        "reference": "exact" if problem.exact else f"NUTS, R-hat {r_hat:.4f}",
        "log_evidence": fit.log_evidence._asdict(),
        "diagnostics": vars(verdict),
        "nuts": {"r_hat": chains.r_hat, "effective_sample_size": chains.effective_sample_size},
        "methods": methods,
    }
    configuration.write_atomically(workdir / RESULTS, json.dumps(results, indent=2) + "\n")
    print(verdict)
    print(comparison.table(methods))
    fit.to_arviz(e.draws).to_netcdf(str(workdir / "posterior.nc"))
    shown = {label: draws[label] for label in ("fit", "full-rank VI")} | {"reference": reference}
    drawn = {"pairs": plots.pairs(shown, goal.coordinates())}
    print(*figures.save(drawn, workdir / "figures"), sep="\n")


def sample(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """2,000 draws of the fit as `posterior.nc`, for arviz.

    Raises:
      UserError: no fit.
    """
    del config
    _fit(workdir).to_arviz().to_netcdf(str(workdir / "posterior.nc"))
    print(workdir / "posterior.nc")


def export(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """The fit as `export/<version>/`, for TensorFlow Serving.

    Raises:
      UserError: no fit, or the version exists or cannot be written.
    """
    fit, plain = _fit(workdir), configuration.resolve(config)
    name = config.name or workdir.name
    print(fit.export(workdir / layout.DIRECTORY, **config.export, name=name, config=plain))


def _fit(workdir: Path) -> PosteriorFit:
    if not (workdir / FIT).exists():
        raise UserError(f"{workdir} has no fit; train it first")
    return load_posterior(workdir / FIT)


def load_problem(name: str) -> target.Problem:
    """What the function "path.py:function" returns.

    Raises:
      UserError: no such file or function, or one that raises or returns something else.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"config.model names '{path}', which is no file; expected path.py:function")
    try:
        namespace = runpy.run_path(path)
    except Exception as error:  # whatever a user's code raises
        raise UserError(f"{path} raised {type(error).__name__}: {error}") from error
    if not callable(namespace.get(function)):
        raise UserError(f"{path} has no function '{function}'; expected one that returns a model")
    try:
        found = namespace[function]()
    except Exception as error:  # whatever a user's code raises
        raise UserError(f"{name} raised {type(error).__name__}: {error}") from error
    if isinstance(found, tuple):
        return target.Problem(*found)
    return found if isinstance(found, target.Problem) else target.Problem(found)


def _reference(problem, goal, found: start.Start, settings, file: Path):
    """Draws [eval.draws, dim] that count as the posterior's, and R-hat if they are of chains.

    Kept in `file`, since long chains take minutes.
    """
    if problem.exact:
        exact = tf.nest.map_structure(np.asarray, problem.exact(settings.draws, _SEED))
        return goal.unconstrain(exact), 0.0
    if file.exists():
        with np.load(file, allow_pickle=False) as kept:
            return kept["u"], float(kept["r_hat"])
    chains = baselines.nuts(goal, found, 4 * settings.nuts_draws, _CHAINS, 1000, seed=_SEED)
    if chains.r_hat > baselines.R_HAT_LIMIT:
        print(f"warning: the reference's R-hat is {chains.r_hat:.3f}; raise config.eval.nuts_draws")
    u = _thinned(chains.u, settings.draws)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, u=u, r_hat=chains.r_hat)
    return u, chains.r_hat


def _thinned(u, count):
    return u[np.linspace(0, len(u) - 1, count).astype(int)]
