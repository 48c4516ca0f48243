"""All estimates of log p(x) and of bounds on it, with their names, values and settings."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import diagnostics, proposal
from avb_tf.likelihood_estimation import ais, chunks, entropy, importance, joint, quadrature
from avb_tf.likelihood_estimation.inference_gap import (
    COMPONENTS,
    DRAWS_PER_STEP,
    FRESH_DRAWS,
    REPEATS,
    best_gaussians,
    smoothed_bounds,
    smoothing_sizes,
)
from avb_tf.model import AVB

DRAWS = 64  # z for each x in one call for the ELBO, at least
ALL_DRAWS = 100_000  # z for all x together, at least: a few x get more draws each
SAMPLES = 5000  # importance samples in the tightest bound
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2500, SAMPLES)  # each divides SAMPLES
REPORTED = (1, 100, SAMPLES)
_KEPT_WEIGHTS = 500  # importance weights of each example that are kept for figures
_EXAMPLES_SMOOTHED = 5  # in a chunk
_COMPUTED = {  # directory of finished chunks -> label of its progress bar
    "smoothed": "ELBO of the posterior with a little noise",
    "importance": "log p(x) by importance sampling",
    "ais": "log p(x) by annealed importance sampling",
    "bidirectional": "check of annealed importance sampling on simulated data",
    "gap": "best Gaussian posterior of each example",
}
_AGGREGATE_REPEATS, _AGGREGATE_POINTS = 4, 500  # of the estimate of KL(q(z) || p(z))
_AGGREGATE_BATCH = 500  # x encoded at a time
_STAGES = 10  # stages of the annealing for which acceptance rates are reported

_importance_sampler = joint.kept_for_the_last_model(importance.ImportanceSampler)


class Estimate(NamedTuple):
    """Values of one quantity, one value for each example."""

    values: np.ndarray  # [examples], in nats
    settings: dict[str, Any]
    repeats: np.ndarray | None = None  # [repeats, examples], from independent draws
    of_examples: bool = True  # whether the values belong to the examples of the split

    def first(self, count: int) -> "Estimate":
        """Returns the estimate for the first `count` examples."""
        repeats = None if self.repeats is None else self.repeats[:, :count]
        return self._replace(values=self.values[:count], repeats=repeats)


class ImportanceWeights(NamedTuple):
    """Results of importance sampling; the last axis is over examples."""

    bounds: np.ndarray  # [len(CURVE), repeats, examples]
    effective_sample_size: np.ndarray  # [examples], over all draws
    pareto_k: np.ndarray  # [examples]
    log_weights: np.ndarray  # [_KEPT_WEIGHTS, examples]


class AnnealedWeights(NamedTuple):
    """Results of AIS; the last axis is over examples."""

    log_weights: np.ndarray  # [chains, examples]
    acceptance: np.ndarray  # [temperatures, examples]
    step_size: np.ndarray  # [temperatures, examples]


class BidirectionalWeights(NamedTuple):
    """Log weights of forward and reverse AIS; the last axis is over examples."""

    forward: np.ndarray  # [chains, examples]
    reverse: np.ndarray  # [chains, examples]


class BestBounds(NamedTuple):
    """ELBOs in nats of Gaussians optimised for each x, [REPEATS, examples] each."""

    diagonal: np.ndarray
    full: np.ndarray


class OwnBounds(NamedTuple):
    """The ELBO of a model's posterior in nats, as an interval or as a value.

    Both ends are the same array if the model has no adversary.
    """

    lower: np.ndarray  # [repeats, examples]
    upper: np.ndarray  # [repeats, examples]
    settings: dict[str, Any]

    @property
    def exact(self) -> bool:
        """Whether the interval is a single value."""
        return self.lower is self.upper

    def first(self, count: int) -> "OwnBounds":
        """Returns the bounds of the first `count` examples."""
        lower = self.lower[:, :count]
        upper = lower if self.exact else self.upper[:, :count]
        return OwnBounds(lower, upper, self.settings)

    def below(self, name: str, values: np.ndarray) -> dict[str, Estimate]:
        """Returns `values` minus the ELBO: one estimate, or `<name>_lower` and `<name>_upper`.

        Args:
          name: name of the estimate.
          values: [examples] or, from independent draws, [repeats, examples], in nats.
        """
        ends = {name: self.lower} if self.exact else {
            f"{name}_lower": self.upper, f"{name}_upper": self.lower,
        }  # fmt: skip
        return {
            end: Estimate(np.mean(values - elbo, 0), self.settings, values - elbo)
            for end, elbo in ends.items()
        }


def bound(
    model: AVB, x: np.ndarray, batch_size: int = 100, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Estimates the ELBO with the model's own T, and the reconstruction error, in nats.

    The reconstruction error is -E_q[log p(x|z)], as in Table 1 of the paper. Both are means over
    the same z: at least `DRAWS` for each x in each of `REPEATS` repeats, and `ALL_DRAWS` in all.

    Args:
      model: any `AVB`.
      x: [count, *event].
      batch_size: examples computed at a time.
      seed: seed of the noise.
    """
    batch_size = min(batch_size, len(x))
    terms, draws = _terms(model), max(DRAWS, 100 * DRAWS // batch_size)
    calls = -(-ALL_DRAWS // (REPEATS * draws * len(x)))  # for each repeat
    elbo, error = np.zeros((2, REPEATS, len(x)))
    for i in chunks.tracked(range(0, len(x), batch_size), f"ELBO of {len(x)} examples"):
        part = slice(i, i + batch_size)
        chunk = tf.convert_to_tensor(x[part])
        for call in range(REPEATS * calls):
            shape = [draws, len(chunk), model.encoder.noise_dim]
            noise = tf.random.stateless_normal(shape, [seed, i * REPEATS * calls + call])
            drawn = terms(chunk, noise)
            elbo[call % REPEATS, part] += tf.reduce_mean(drawn.elbo, 0) / calls
            error[call % REPEATS, part] -= tf.reduce_mean(drawn.log_likelihood, 0) / calls
    settings = {"draws": REPEATS * calls * draws}
    return Estimate(elbo.mean(0), settings, elbo), Estimate(error.mean(0), settings, error)


def exact(model: AVB, x: np.ndarray, grid: int) -> dict[str, Estimate]:
    """Computes log p(x) by quadrature, which is possible for two latents.

    Args:
      model: an `AVB` with latent_dim 2.
      x: [count, *event].
      grid: points along each side of the grid; half as many show the error.
    """
    parts = chunks.tracked(
        np.array_split(x, -(-len(x) // 500)), f"log p(x) of {len(x)} examples by quadrature"
    )
    pairs = [
        [quadrature.log_likelihood(model, part, n) for n in (grid, grid // 2)] for part in parts
    ]
    log_likelihood, coarse = np.concatenate(pairs, 1)
    change = float(np.abs(log_likelihood - coarse).max())
    settings = {"grid": grid, "largest_change_from_half_the_grid": change}
    return {"log_likelihood_quadrature": Estimate(log_likelihood, settings)}


def latent_space(model: AVB, x: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """Estimates KL(q(z) || p(z)) in nats, as in Table 1 of the paper.

    q(z) is the average of q(z|x) over the given x. Its density is unknown, so the KL divergence is
    an interval for q(z) with a little noise added (`entropy`).

    Args:
      model: any `AVB`.
      x: [count, *event].
      seed: seed of the draws.
    """
    encode = tf.function(model.encode, reduce_retracing=True)
    generator, latents = np.random.default_rng(seed), model.encoder.latent_dim

    def draws(count):
        """Draws z for x that are drawn with replacement, [count, latent]."""
        parts = []
        for _ in range(0, count, _AGGREGATE_BATCH):
            rows = generator.integers(len(x), size=_AGGREGATE_BATCH)
            key = tf.constant(generator.integers(2**31 - 1), tf.int32)
            parts.append(encode(tf.constant(x[rows]), 1, key)[0])
        return np.concatenate(parts)[:count].astype(np.float64)

    lower, upper = np.empty((2, _AGGREGATE_REPEATS, _AGGREGATE_POINTS))
    for repeat in range(_AGGREGATE_REPEATS):
        pilot, own, others = map(draws, (4000, _AGGREGATE_POINTS, COMPONENTS))
        noise = generator.standard_normal(own.shape)
        points, log_q = entropy.at_smoothed_points(pilot, own, others, noise)
        log_prior = model.prior.log_prob(tf.constant(points, tf.float32)).numpy()
        lower[repeat], upper[repeat] = log_q.lower - log_prior, log_q.upper - log_prior
    settings = {
        "components": COMPONENTS,
        "noise_scale": round(entropy.noise_scale(COMPONENTS, latents), 4),
    }
    ends = {"lower": lower, "upper": upper}
    return {
        f"kl_aggregate_posterior_{name}": Estimate(end.ravel(), settings, end, False)
        for name, end in ends.items()
    }


def own_bounds(model: AVB, x: np.ndarray, elbo: Estimate, directory: Path) -> OwnBounds:
    """Returns the ELBO of the model's posterior without the adversary.

    For a model without an adversary it is `elbo`. Otherwise it is an interval, for q with a little
    noise added (`inference_gap.smoothed_bounds`). The smoothed q is a posterior like any other, so
    the lower end is also a lower bound on log p(x).

    Args:
      model: any `AVB`.
      x: [count, *event].
      elbo: the model's own bound, from `bound`.
      directory: folder of finished chunks.
    """
    if model.adversary is None:
        return OwnBounds(elbo.repeats, elbo.repeats, {**elbo.settings, "bound": "elbo"})
    latents = model.encoder.latent_dim
    draws, bounds = smoothing_sizes(latents, len(x)), smoothed_bounds(model)

    def compute(index, part):
        return bounds(x[part], **draws, seed=index)

    interval, seconds = _run(
        entropy.Bounds, compute, model, x, draws, directory, "smoothed", _EXAMPLES_SMOOTHED
    )
    settings = {
        **draws,
        "bound": "smoothed",
        "noise_scale": round(entropy.noise_scale(draws["components"], latents), 4),
        "seconds": round(seconds, 2),
    }
    return OwnBounds(interval.lower, interval.upper, settings)


def smoothed_elbo(own: OwnBounds) -> dict[str, Estimate]:
    """Returns the two ends of the interval as estimates, or none if `own` is exact."""
    if own.exact:
        return {}
    return {
        "elbo_smoothed_lower": Estimate(own.lower.mean(0), own.settings, own.lower),
        "elbo_smoothed_upper": Estimate(own.upper.mean(0), own.settings, own.upper),
    }


def posterior_divergence(own: OwnBounds, log_likelihood: np.ndarray) -> dict[str, Estimate]:
    """Returns KL(q(z|x) || p(z|x)) in nats: exact log p(x) minus the ELBO of the posterior.

    Args:
      own: the ELBO of the model's posterior.
      log_likelihood: [count], exact log p(x) of the same examples.
    """
    return own.below("kl_q_exact_posterior", log_likelihood)


def importance_weighted(
    model: AVB, x: np.ndarray, repeats: int, directory: Path
) -> tuple[dict[str, Estimate], ImportanceWeights]:
    """Estimates the bounds with 1, 100 and 5000 importance samples.

    Args:
      model: any `AVB`.
      x: [count, *event].
      repeats: number of independent groups of 5000 importance samples.
      directory: folder of finished chunks.
    Returns:
      (the estimates by name, the results of importance sampling).
    """
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
    weights, seconds = _run(ImportanceWeights, compute, model, x, settings, directory, "importance")
    shared = {
        "proposal": sampler.proposal,
        **_trust(weights.effective_sample_size, weights.pareto_k),
        "seconds": round(seconds, 2),  # for all these bounds together
    }
    estimates = {}
    for samples in REPORTED:
        values = weights.bounds[CURVE.index(samples)]
        settings = {"samples": samples, **shared}
        estimates[f"log_likelihood_iwae_{samples}"] = Estimate(values.mean(0), settings, values)
    return estimates, weights


def annealed(
    model: AVB, x: np.ndarray, sizes: dict[str, int], directory: Path
) -> tuple[dict[str, Estimate], AnnealedWeights]:
    """Estimates the lower bound on log p(x) by AIS.

    Args:
      model: any `AVB`.
      x: [count, *event].
      sizes: temperatures, chains and leapfrog_steps.
      directory: folder of finished chunks.
    Returns:
      (the estimate by name, the results of AIS).
    """
    sampler = ais.kept_sampler(model, **sizes)

    def compute(index, part):
        chains = sampler.forward(x[part], seed=index)
        return AnnealedWeights(chains.log_weights, chains.acceptance, chains.step_size)

    weights, seconds = _run(
        AnnealedWeights, compute, model, x, sizes, directory, "ais",
        ais.examples_at_once(model, sizes["chains"]),
    )  # fmt: skip
    ess = diagnostics.effective_sample_size(weights.log_weights)
    stages = np.array_split(weights.acceptance.mean(-1), min(_STAGES, sizes["temperatures"]))
    settings = {
        **sizes,
        "start": proposal.DESCRIPTION,
        "acceptance_by_temperature": [round(float(stage.mean()), 3) for stage in stages],
        **_trust(ess, diagnostics.pareto_k(weights.log_weights)),
        "seconds": round(seconds, 2),
    }
    values = ais.lower_bound(weights.log_weights)
    estimate = Estimate(values, settings, _groups(ais.lower_bound, weights.log_weights))
    return {"log_likelihood_ais": estimate}, weights


def bidirectional(
    model: AVB, count: int, sizes: dict[str, int], directory: Path
) -> dict[str, Estimate]:
    """Estimates bounds by AIS from below and from above for examples simulated from the model.

    In expectation, log p(x) of the simulated x lies between the two bounds, so AIS underestimates
    log p(x) of such data by at most the gap. The values cannot be compared with those of test data.

    Args:
      model: any `AVB`.
      count: number of simulated examples.
      sizes: temperatures, chains and leapfrog_steps.
      directory: folder of finished chunks.
    Returns:
      The lower bound, the upper bound and the gap between them by name.
    Source: Grosse, Ghahramani and Adams (2015).
    """
    sampler = ais.kept_sampler(model, **sizes)

    def compute(index, part):
        _, forward, reverse = sampler.bidirectional(part.stop - part.start, seed=index)
        return BidirectionalWeights(forward, reverse)

    settings = {**sizes, "simulated": count}
    weights, seconds = _run(
        BidirectionalWeights, compute, model, np.zeros(count), settings, directory,
        "bidirectional", ais.examples_at_once(model, sizes["chains"]),
    )  # fmt: skip
    bounds = [
        (bound(log_weights), _groups(bound, log_weights))
        for bound, log_weights in (
            (ais.lower_bound, weights.forward),
            (ais.upper_bound, weights.reverse),
        )
    ]
    (lower, lowers), (upper, uppers) = bounds
    settings = {**sizes, "seconds": round(seconds, 2)}
    return {
        "log_likelihood_simulated_bdmc_lower": Estimate(lower, settings, lowers, of_examples=False),
        "log_likelihood_simulated_bdmc_upper": Estimate(upper, settings, uppers, of_examples=False),
        "bdmc_gap": Estimate(upper - lower, settings, uppers - lowers, of_examples=False),
    }


def inference_gap(
    model: AVB, x: np.ndarray, log_likelihood: np.ndarray, own: OwnBounds, directory: Path
) -> dict[str, Estimate]:
    """Splits the inference gap, log p(x) minus the ELBO, into amortisation and shape.

    gap_inference = gap_amortisation + gap_shape. gap_shape is the gap that remains for the best
    Gaussian of full covariance, optimised for each x alone. gap_amortisation is the ELBO of that
    Gaussian minus the ELBO of q; it is negative if q is better than any Gaussian.
    `gap_amortisation_diagonal` is the same for the best diagonal Gaussian, which gives the
    amortisation gap of a diagonal q.

    If `own` is an interval, the gaps that depend on it are intervals too, such as
    `gap_inference_lower` and `gap_inference_upper`. They are the gaps of the smoothed posterior.

    Args:
      model: any `AVB`.
      x: [count, *event].
      log_likelihood: [count], the best estimate of log p(x). If it is a lower bound, `gap_shape`
        and `gap_inference` (or its lower end) are lower bounds too.
      own: the ELBO of the model's posterior for the same examples.
      directory: folder of finished chunks.
    Source: Cremer, Li and Duvenaud (2018).
    """
    best = best_gaussians(model)
    settings = {"draws": max(FRESH_DRAWS, ALL_DRAWS // len(x))}

    def compute(index, part):
        diagonal, full = best(x[part], index, **settings)
        return BestBounds(diagonal.bound, full.bound)

    size = ais.examples_at_once(model, DRAWS_PER_STEP)
    gaussians, seconds = _run(BestBounds, compute, model, x, settings, directory, "gap", size)
    shapes = log_likelihood - gaussians.full
    shape = Estimate(shapes.mean(0), {**settings, "seconds": round(seconds, 2)}, shapes)
    return {
        **own.below("gap_inference", log_likelihood),
        **own.below("gap_amortisation", gaussians.full),
        **own.below("gap_amortisation_diagonal", gaussians.diagonal),
        "gap_shape": shape,
    }


@joint.kept_for_the_last_model
def _terms(model):
    return tf.function(model.terms, reduce_retracing=True)


def _run(record, compute, model, x, settings, directory, name, size=None):
    size = size or chunks.EXAMPLES
    key = f"{name}-{chunks.fingerprint(model, x, {**settings, 'chunk': size})}"
    label = f"{_COMPUTED[name]}, {len(x)} examples"
    return chunks.run(record, compute, len(x), directory / key, label, size)


def _groups(bound, log_weights, groups: int = 4) -> np.ndarray:
    """Returns `bound` computed from each of up to `groups` groups of chains, [groups, examples]."""
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
