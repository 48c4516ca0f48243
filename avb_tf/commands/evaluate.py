"""Evaluates a trained run: writes results.json and figures, and prints a table."""

import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from avb_tf import checkpoints, configuration, data, diagnostics, figures, files, replicas, results
from avb_tf.callbacks import tensorboard, writing
from avb_tf.commands import train
from avb_tf.data import pipeline
from avb_tf.figures import estimates as estimate_figures
from avb_tf.figures import model as model_figures
from avb_tf.likelihood_estimation import estimates
from avb_tf.likelihood_estimation.estimates import Estimate
from avb_tf.settings import run


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Trains a run and evaluates it; with several workers only the chief evaluates."""
    train.train(config, workdir)
    if replicas.is_chief():
        evaluate(config, workdir)


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Evaluates the newest checkpoint and prints it next to the sibling runs.

    A bound that uses the adversary is always accompanied by an estimate of log p(x). With two
    latents log p(x) is exact, and KL(q(z|x) || p(z|x)) is computed for a subset. With more latents
    AIS estimates log p(x) of a subset, and data simulated from the model check AIS itself.
    `config.eval.budget` sets the sizes. An interrupted evaluation resumes where it stopped.

    Raises:
      UserError: there is no checkpoint, the data cannot be used, or the workdir is being evaluated.
    """
    model = checkpoints.load(workdir)
    source = data.load(config.data, model.likelihood)
    with files.locked(workdir / files.EVALUATION):
        _evaluate(config, workdir, model, source)


def _evaluate(config, workdir, model, source) -> None:
    began = time.perf_counter()
    split = getattr(source, config.eval.split)
    count = min(config.eval.examples or split.size, split.size)
    x = pipeline.examples(split, count, model.likelihood.binary)

    by_name, drawn = _estimates(model, x, config.eval, workdir / results.EVALUATION)
    summaries = {
        name: results.estimate(e.values, e.repeats, **e.settings) for name, e in by_name.items()
    }
    if model.likelihood.bits_per_dim:
        summaries |= _bits_per_dim(summaries, int(np.prod(model.event_shape)))
    warnings = _warnings(summaries)
    values = {name: e.values for name, e in by_name.items() if e.of_examples}
    results.save_values(workdir, x, values)
    plain = configuration.resolve(config)
    results.save(
        workdir,
        {
            "method": config.method,
            "data": config.data.name,
            "event_shape": list(model.event_shape),
            "split": config.eval.split,
            "step": int(model.step.value),
            "seconds": round(time.perf_counter() - began, 2),
            "config_hash": configuration.digest(plain),
            "family": configuration.digest(plain, without=("model.seed",)),  # same for all seeds
            "budget": config.eval.budget,
            "warnings": warnings,
            "estimates": summaries,
        },
    )
    checkpoints.write_card(model, workdir)
    means = {f"{config.eval.split}/{name}": e["mean"] for name, e in summaries.items()}
    with writing.logged():
        tensorboard.write_metrics(workdir, int(model.step.value), means)
    runs = results.siblings(workdir)
    print(results.table(runs), results.quality(runs[workdir.name]), sep="\n\n")
    print(*(f"Warning: {warning}" for warning in warnings), sep="\n")
    labels = None if split.labels is None else split.labels[:count]
    drawn |= model_figures.of_model(model, x, labels)
    print(*figures.save(drawn, workdir / "figures"), sep="\n")


def _estimates(model, x, settings, directory) -> tuple[dict[str, Estimate], dict[str, Figure]]:
    """Returns all estimates by name, and figures that show how they were obtained."""
    elbo, reconstruction_error = estimates.bound(model, x)
    name = "elbo" if model.adversary is None else "elbo_adversary"
    by_name = {name: elbo, "reconstruction_error": reconstruction_error}
    by_name |= estimates.latent_space(model, x)
    planar = model.encoder.latent_dim == 2
    if planar:
        by_name |= estimates.exact(model, x, settings.grid)
    sizes = run.sizes(settings)
    subset = x[: sizes["subset"]]
    posteriors = settings.posteriors if planar else 0
    gap = min(sizes["gap"], len(subset))
    own = None
    if count := min(max(posteriors, gap), len(x)):
        own = estimates.own_bounds(model, x[:count], elbo.first(count), directory)
        by_name |= estimates.smoothed_elbo(own)
    if own and posteriors:
        exact = by_name["log_likelihood_quadrature"].values[:posteriors]
        by_name |= estimates.posterior_divergence(own.first(len(exact)), exact)
    chains = {name: sizes[f"ais.{name}"] for name in ("temperatures", "chains", "leapfrog_steps")}
    if planar and settings.ais.temperatures == -1:
        chains["temperatures"] = 0  # quadrature is exact
    drawn, weights = {}, {}
    if len(subset):
        by_name["elbo_of_the_same_examples"] = elbo.first(len(subset))
        weighted, kept = estimates.importance_weighted(model, subset, sizes["repeats"], directory)
        by_name |= weighted
        weights["importance sampling"] = kept.log_weights
        if chains["temperatures"]:
            annealed, kept_chains = estimates.annealed(model, subset, chains, directory)
            by_name |= annealed
            weights["AIS"] = kept_chains.log_weights
            drawn["annealing"] = estimate_figures.annealing(kept_chains.acceptance)
        drawn["convergence"] = estimate_figures.convergence(
            estimates.CURVE, kept.bounds, {k: v.values[: len(subset)] for k, v in by_name.items()}
        )
        drawn["weights"] = estimate_figures.weights(weights)
    if sizes["simulated"] and chains["temperatures"]:
        by_name |= estimates.bidirectional(model, sizes["simulated"], chains, directory)
    if own and gap:
        known = [by_name[name].values for name in results.LOG_LIKELIHOODS if name in by_name]
        # AIS and importance sampling both bound log p(x) from below: the higher mean is closer.
        best = known[0][:gap] if planar else max((v[:gap] for v in known), key=np.mean)
        by_name |= estimates.inference_gap(model, subset[:gap], best, own.first(gap), directory)
    return by_name, drawn


def _bits_per_dim(summaries, dimensions) -> dict[str, Any]:
    """Returns the estimates in bits per dimension; lower is better."""
    bits = 1.0 / (np.log(2.0) * dimensions)
    converted = {}
    for name, summary in summaries.items():
        if name.startswith(("elbo", "log_likelihood")):
            scaled = {k: bits * v for k, v in summary.items() if k.startswith("standard_error")}
            converted[f"bits_per_dim_{name}"] = summary | scaled | {"mean": -bits * summary["mean"]}
    return converted


def _warnings(summaries) -> list[str]:
    """Returns reasons not to trust some of the estimates."""
    warnings = []
    best = results.best_log_likelihood(summaries)
    if best and "elbo_adversary" in summaries:
        both = summaries[results.bound_of_same_examples(summaries)], summaries[best]
        excess = both[0]["mean"] - both[1]["mean"]
        error = np.hypot(*[each.get("standard_error_over_repeats", 0.0) for each in both])
        if excess > 0.05 + 2.0 * error:
            warnings.append(
                f"the adversary's bound lies {excess:.2f} nats above log p(x): the adversary is "
                "wrong, so trust only log p(x)"
            )
    for name in ("log_likelihood_iwae_5000", "log_likelihood_ais"):
        share = summaries.get(name, {}).get("pareto_k_above_0.7")
        if share and share > diagnostics.PARETO_K_SHARE:
            warnings.append(
                f"{name}: Pareto k is above 0.7 for {share:.0%} of the examples: a few draws "
                "dominate the weights, and the true log p(x) is likely higher"
            )
    gap = summaries.get("bdmc_gap")
    if gap and gap["mean"] > 0.5:
        warnings.append(
            f"bdmc_gap is {gap['mean']:.2f} nats, so AIS may lie that far below log p(x); raise "
            "config.eval.ais.temperatures or use --config.eval.budget=paper"
        )
    return warnings
