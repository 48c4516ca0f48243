"""Estimates of log p(x) of a model: what each is called, its values and what they rest on."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import diagnostics
from avb_tf.likelihood_estimation import ais, chunks, importance, joint, quadrature
from avb_tf.likelihood_estimation.inference_gap import (
    DRAWS_PER_STEP,
    LATENTS_LIMIT,
    best_gaussians,
    bound_of_draws,
)
from avb_tf.model import AVB

DRAWS = 64  # of z for each x in the bound
SAMPLES = 5000  # of the tightest importance-weighted bound
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2500, SAMPLES)  # all divide it
REPORTED = (1, 100, SAMPLES)
_KEPT_WEIGHTS = 500  # importance weights of each example, for figures
_STAGES = 10  # of an annealing, whose acceptance is reported
_LARGEST = 2**21  # numbers of x for all chains of a chunk, which bounds the memory

_importance_sampler = joint.kept_for_the_last_model(importance.ImportanceSampler)
_annealed_sampler = joint.kept_for_the_last_model(ais.AnnealedSampler)


class Estimate(NamedTuple):
    """Of one quantity, for each example."""

    values: np.ndarray  # [examples], in nats
    settings: dict[str, Any]
    repeats: np.ndarray | None = None  # [repeats, examples], by independent draws
    simulated: bool = False  # whether its examples were drawn from the model


class ImportanceWeights(NamedTuple):
    """Of importance sampling; the examples last."""

    bounds: np.ndarray  # [len(CURVE), repeats, examples]
    effective_sample_size: np.ndarray  # [examples], of all draws
    pareto_k: np.ndarray  # [examples]
    log_weights: np.ndarray  # [_KEPT_WEIGHTS, examples]


class AnnealedWeights(NamedTuple):
    """Of AIS; the examples last."""

    log_weights: np.ndarray  # [chains, examples]
    acceptance: np.ndarray  # [temperatures, examples]
    step_size: np.ndarray  # [temperatures, examples]


class BidirectionalWeights(NamedTuple):
    """Of AIS from both sides; the examples last."""

    forward: np.ndarray  # [chains, examples]
    reverse: np.ndarray  # [chains, examples]


class BestBounds(NamedTuple):
    """Bounds on log p(x) of Gaussians optimised for each x, and q's own; [examples] each."""

    diagonal: np.ndarray
    full: np.ndarray
    own: np.ndarray


def bound(model: AVB, x, batch_size: int = 100, seed: int = 0) -> np.ndarray:
    """The bound on log p(x) in nats, [count], with T as the model has it; the mean of `DRAWS` z.

    Args:
      model: any.
      x: [count, *event].
      batch_size: of the chunks it is computed in.
      seed: of the noise.
    """
    terms = _terms(model)
    means = []
    for i in chunks.tracked(range(0, len(x), batch_size), "batch of the bound"):
        chunk = tf.convert_to_tensor(x[i : i + batch_size])
        noise = tf.random.stateless_normal(
            [DRAWS, len(chunk), model.encoder.noise_dim], [seed, i // batch_size]
        )
        means.append(tf.reduce_mean(terms(chunk, noise).elbo, 0))
    return np.concatenate(means)


def exact(model: AVB, x, grid: int, posteriors: int) -> dict[str, Estimate]:
    """What only two latents allow: log p(x) by quadrature, and KL(q || p(z|x)) of a subset."""
    parts = chunks.tracked(np.array_split(x, -(-len(x) // 500)), "batch of quadrature")
    pairs = [
        [quadrature.log_likelihood(model, part, n) for n in (grid, grid // 2)] for part in parts
    ]
    log_likelihood, coarse = np.concatenate(pairs, 1)
    change = float(np.abs(log_likelihood - coarse).max())
    settings = {"grid": grid, "largest_change_from_half_the_grid": change}
    found = {"log_likelihood_quadrature": Estimate(log_likelihood, settings)}
    if count := min(posteriors, len(x)):
        divergence = quadrature.posterior_divergence(model, x[:count], log_likelihood)
        found["kl_q_exact_posterior"] = Estimate(divergence, {})
    return found


def importance_weighted(
    model: AVB, x, repeats: int, directory: Path
) -> tuple[dict[str, Estimate], ImportanceWeights]:
    """Bounds with 1, 100 and 5000 importance samples, and the weights that they come from."""
    sampler = _importance_sampler(model)

    def compute(index, part):
        log_weights = sampler.log_weights(x[part], repeats * SAMPLES, seed=index)
        groups = np.split(log_weights, repeats)
        return ImportanceWeights(
            np.stack([[importance.bounds(group, k) for group in groups] for k in CURVE]),
            diagnostics.effective_sample_size(log_weights),
            diagnostics.pareto_k(log_weights),
            log_weights[:_KEPT_WEIGHTS],
        )

    settings = {"repeats": repeats, "draws": SAMPLES, "proposal": sampler.proposal}
    found, seconds = _run(ImportanceWeights, compute, model, x, settings, directory, "importance")
    shared = {
        "proposal": sampler.proposal,
        **_trust(found.effective_sample_size, found.pareto_k),
        "seconds": round(seconds, 2),  # of all these bounds together
    }
    estimates = {}
    for samples in REPORTED:
        values = found.bounds[CURVE.index(samples)]
        settings = {"samples": samples, **shared}
        estimates[f"log_likelihood_iwae_{samples}"] = Estimate(values.mean(0), settings, values)
    return estimates, found


def annealed(
    model: AVB, x, sizes: dict[str, int], directory: Path
) -> tuple[dict[str, Estimate], AnnealedWeights]:
    """AIS from below, and the weights that it comes from.

    Args:
      model: any.
      x: [count, *event].
      sizes: temperatures, chains and leapfrog_steps.
      directory: where finished chunks are kept.
    """
    sampler = _annealed_sampler(model, **sizes)

    def compute(index, part):
        chains = sampler.forward(x[part], seed=index)
        return AnnealedWeights(chains.log_weights, chains.acceptance, chains.step_size)

    found, seconds = _run(
        AnnealedWeights,
        compute,
        model,
        x,
        sizes,
        directory,
        "ais",
        _examples(model, sizes["chains"]),
    )
    ess = diagnostics.effective_sample_size(found.log_weights)
    stages = np.array_split(found.acceptance.mean(-1), min(_STAGES, sizes["temperatures"]))
    settings = {
        **sizes,
        "start": f"Gaussian of q's moments, {joint.WIDENING} times as wide",
        "acceptance_by_temperature": [round(float(stage.mean()), 3) for stage in stages],
        **_trust(ess, diagnostics.pareto_k(found.log_weights)),
        "seconds": round(seconds, 2),
    }
    values = ais.lower_bound(found.log_weights)
    estimate = Estimate(values, settings, _groups(ais.lower_bound, found.log_weights))
    return {"log_likelihood_ais": estimate}, found


def bidirectional(
    model: AVB, count: int, sizes: dict[str, int], directory: Path
) -> dict[str, Estimate]:
    """AIS from below and from above for `count` examples simulated from the model, and the gap.

    It is the only check on AIS itself: log p(x) of the simulated x lies between the two, and on
    data like them AIS is at most the gap below the truth (Grosse et al., 2015).
    """
    sampler = _annealed_sampler(model, **sizes)

    def compute(index, part):
        _, forward, reverse = sampler.bidirectional(part.stop - part.start, seed=index)
        return BidirectionalWeights(forward, reverse)

    settings = {**sizes, "simulated": count}
    found, seconds = _run(
        BidirectionalWeights, compute, model, np.zeros(count), settings, directory,
        "bidirectional", _examples(model, sizes["chains"]),
    )  # fmt: skip
    bounds = [
        (bound(weights), _groups(bound, weights))
        for bound, weights in (
            (ais.lower_bound, found.forward),
            (ais.upper_bound, found.reverse),
        )
    ]
    (lower, lowers), (upper, uppers) = bounds
    settings = {**sizes, "seconds": round(seconds, 2)}
    return {
        "log_likelihood_bdmc_lower": Estimate(lower, settings, lowers, simulated=True),
        "log_likelihood_bdmc_upper": Estimate(upper, settings, uppers, simulated=True),
        "bdmc_gap": Estimate(upper - lower, settings, uppers - lowers, simulated=True),
    }


def inference_gap(model: AVB, x, log_likelihood, elbo, directory: Path) -> dict[str, Estimate]:
    """log p(x) minus the bound, split as Cremer, Li and Duvenaud (2018) do.

    gap_inference = gap_amortisation + gap_shape. The shape's part is what no Gaussian of full
    covariance reaches, though optimised for the one x; amortisation's is what the best Gaussian
    gains on q, below 0 where q is better than any. `gap_amortisation_diagonal` is what the best
    diagonal Gaussian gains: Cremer's amortisation gap of a diagonal q.

    The bound of a q without a density is told by its draws (`bound_of_draws`), since the
    adversary's own would hide the adversary's error in the gap. With too many latents for that
    it is the adversary's, which `bound` says: the whole gap is then as wrong as the adversary.

    Args:
      model: any.
      x: [count, *event].
      log_likelihood: [count], the best estimate of log p(x); the gaps are no better than it.
      elbo: [count], the model's own bound.
      directory: where finished chunks are kept.
    """
    best = best_gaussians(model)
    told = "elbo" if model.adversary is None else "adversary"
    if model.adversary is not None and model.encoder.latent_dim <= LATENTS_LIMIT:
        told = "nearest neighbours"
    of_draws = bound_of_draws(model)

    def compute(index, part):
        diagonal, full = best(x[part], index)
        own = of_draws(x[part], index) if told == "nearest neighbours" else elbo[part]
        return BestBounds(diagonal.bound, full.bound, own)

    settings = {"bound": told}
    found, seconds = _run(
        BestBounds, compute, model, x, settings, directory, "gap",
        _examples(model, DRAWS_PER_STEP),
    )  # fmt: skip
    settings["seconds"] = round(seconds, 2)
    values = {
        "gap_inference": log_likelihood - found.own,
        "gap_amortisation": found.full - found.own,
        "gap_amortisation_diagonal": found.diagonal - found.own,
        "gap_shape": log_likelihood - found.full,
    }
    if told == "nearest neighbours":
        values["elbo_nearest_neighbours"] = found.own
    return {name: Estimate(value, settings) for name, value in values.items()}


@joint.kept_for_the_last_model
def _terms(model):
    return tf.function(model.terms, reduce_retracing=True)


def _run(record, compute, model, x, settings, directory, name, size=None):
    size = size or chunks.EXAMPLES
    key = f"{name}-{chunks.fingerprint(model, x, {**settings, 'chunk': size})}"
    return chunks.run(record, compute, len(x), directory / key, f"chunk of {name}", size)


def _examples(model, rows: int) -> int:
    """Of a chunk with `rows` z for each, by the memory that they need."""
    return max(1, min(ais.ROWS // rows, _LARGEST // (rows * int(np.prod(model.event_shape)))))


def _groups(bound, log_weights, groups: int = 4) -> np.ndarray:
    """`bound` by each of up to four groups of chains, [groups, examples]."""
    return np.stack([bound(g) for g in np.array_split(log_weights, min(groups, len(log_weights)))])


def _trust(effective_sample_size, pareto_k) -> dict[str, float | None]:
    known = np.isfinite(pareto_k).any()
    return {
        "effective_sample_size": round(float(effective_sample_size.mean()), 2),
        "pareto_k": round(float(np.median(pareto_k)), 3) if known else None,
        "pareto_k_above_0.7": (
            float(np.mean(pareto_k > diagnostics.PARETO_K_LIMIT)) if known else None
        ),
    }
