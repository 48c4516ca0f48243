"""How far a fit is from the posterior, and whether to believe it.

Two independent measurements of the total variation between q and the posterior are taken, and the
larger one counts:

 - the overlap of both densities, over draws of q and over the start's chains. It rests on T, which
   an adversary that has lost the fit gets wrong;
 - a classifier that tells draws of q from states of the chains, scored on draws that it has not
   seen. It knows nothing of T.
"""

import dataclasses
import warnings

import numpy as np
import threadpoolctl
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from avb_tf import diagnostics as weighing

TRUSTED, REFINABLE = 0.1, 0.4  # distances, see `diagnose`
R_HAT_LIMIT = 1.1  # of the start's short chains; those that have not mixed are no reference
_IMPOSSIBLE = -0.2  # nats, below what errors do to an estimate of KL(q || posterior)
_LEVELS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
_EQUAL = 0.99  # effective sample size, as a share: the tail of equal weights has any shape
_COORDINATES = 40  # of many, that R-hat and gradient boosting see
_FAR = 8.0  # standard deviations, beyond which a classifier's inputs are cut off


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """Whether to believe a fit. Printed, it is the verdict in one line.

    Attributes:
      pareto_k: of the importance weights; above 0.7 they cannot be trusted.
      effective_sample_size: of the weights, as a share of the draws.
      distance: total variation between q and the posterior, 0 to 1: the largest of the overlap's,
        the classifier's, and the share that the chains are known to lack.
      classified: the distance that the classifier sees.
      missing: share of the posterior where q has less than a tenth of the density it should.
      kl: KL(q || posterior) in nats.
      adversary_accuracy: between q and its Gaussian contrast: 1/2 for a Gaussian q.
      r_hat: of the start's chains, the largest of any coordinate.
      points: that were looked at for modes, within 12 standard deviations.
      verdict: "trust", "use with refinement" or "do not trust".
      reason: in one line.
    """

    pareto_k: float
    effective_sample_size: float
    distance: float
    classified: float
    missing: float
    kl: float
    adversary_accuracy: float
    r_hat: float
    points: int
    verdict: str
    reason: str

    def __str__(self):
        return f"{self.verdict}: {self.reason}"


def total_variation(at_q: np.ndarray, at_p: np.ndarray) -> tuple[float, float]:
    """Total variation distance between q and p, and the log normaliser of p.

    The overlap of both, 1 - distance = int min(p, q), is an expectation under either, and that both
    agree fixes the normaliser (a bridge, Meng and Wong, 1996). Draws of q alone would see neither a
    mode that q lacks nor its mass.

    Args:
      at_q: [n], log p - log q at draws of q, p not normalised.
      at_p: [m], the same at draws of p.
    """
    finite = np.concatenate([at_q, at_p])[np.isfinite(np.concatenate([at_q, at_p]))]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    by_q = by_p = 0.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        by_q = np.exp(np.minimum(0.0, at_q - middle)).mean()
        by_p = np.exp(np.minimum(0.0, middle - at_p)).mean()
        low, high = (middle, high) if by_q > by_p else (low, middle)
    return float(1.0 - min(by_q, by_p)), float(0.5 * (low + high))


def largest_r_hat(states: np.ndarray) -> float:
    """The largest rank-normalised split R-hat of any coordinate of states [chains, kept, dim].

    In many dimensions that of the coordinates whose chains differ most.
    """
    between = states.mean(1).var(0) / np.maximum(states.var(1).mean(0), 1e-300)
    widest = np.argsort(-between)[:_COORDINATES]
    return float(np.max(weighing.convergence(states[..., widest])[0]))


def classified(q: np.ndarray, p: np.ndarray, chains: int, seed: int = 0) -> float:
    """Total variation between q and p as far as classifiers see it, about 0 where they are alike.

    Gradient boosting and a small network learn from a half of the draws and are scored on the
    other; the better one counts. The best classifier is right with probability 1/2 + distance / 2,
    so each bounds the distance from below, but for the error of its score, 0.03 for 2,000
    draws on either side.

    Args:
      q: [n, features], draws of q.
      p: [chains * kept, features], states of chains of p, chain after chain. No chain is in both
        halves.
      chains: of p.
      seed: of classifiers and halves.
    """
    rng = np.random.default_rng(seed)
    of_chain = np.repeat(np.arange(chains), len(p) // chains)
    learned = rng.permutation(chains)[: chains // 2]
    scale = np.quantile(p, 0.75, axis=0) - np.quantile(p, 0.25, axis=0)
    scale = np.where(scale > 0, scale, 1.0) / 1.35
    middle = np.median(p, 0)

    def limited(x):
        return np.nan_to_num(np.clip((x - middle) / scale, -_FAR, _FAR))

    mask = np.concatenate([rng.permutation(len(q)) % 2 == 0, np.isin(of_chain, learned)])
    x = np.concatenate([limited(q), limited(p)])
    y = np.repeat([0, 1], [len(q), len(p)])
    # In many dimensions boosting sees the coordinates that differ most, and the last feature.
    quantiles = [np.quantile(x[mask & (y == side)], _LEVELS, axis=0) for side in (0, 1)]
    differing = np.argsort(-np.abs(quantiles[0] - quantiles[1]).max(0))[:_COORDINATES]
    columns = np.union1d(differing, [x.shape[1] - 1])
    boosting = HistGradientBoostingClassifier(max_iter=80, random_state=seed)
    network = MLPClassifier((64, 64), max_iter=40, random_state=seed, learning_rate_init=3e-3)
    accuracies = []
    for classifier, inputs in ((boosting, x[:, columns]), (network, x)):
        with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1, "blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # it stops after 40 passes
            classifier.fit(inputs[mask], y[mask])
        right = np.asarray(classifier.predict(inputs[~mask])) == y[~mask]
        sides = [right[y[~mask] == side].mean() for side in (0, 1)]
        accuracies.append(np.mean(sides))
    return float(max(0.0, 2.0 * max(accuracies) - 1.0))


def diagnose(
    at_q: np.ndarray,
    at_p: np.ndarray,
    adversary_accuracy: float,
    classified: float = 0.0,
    r_hat: float = 1.0,
    points: int = 0,
    lacking: float = 0.0,
) -> Diagnostics:
    """The verdict on log p(data, z) - log q(z) at draws of q [n] and of the posterior [m].

    Those of the posterior are rough, the start's chains; what matters is that they are where q is
    not. `lacking` is the share of the posterior that was seen and that the chains lack; the other
    arguments are those of `Diagnostics`.
    """
    k = float(weighing.pareto_k(at_q))
    size = float(weighing.effective_sample_size(at_q)) / len(at_q)
    overlap, log_evidence = total_variation(at_q, at_p)
    distance = max(overlap, classified, lacking)
    missing = float(np.mean(at_p - log_evidence > np.log(10.0)))
    kl = float(log_evidence - at_q.mean())
    reason = f"fit and posterior differ by {distance:.2f} in total variation"
    if kl < _IMPOSSIBLE:  # then log q = log r + T is wrong, and with it all of the above
        distance, reason = 1.0, f"the adversary has lost the fit, whose KL would be {kl:.2f} nats"
    if missing > TRUSTED:
        reason += f", {missing:.2f} of it where the fit has next to nothing"
    if lacking > 0.05:
        reason += f", {lacking:.2f} of it seen where the chains that this rests on have not been"
    rare = k > weighing.PARETO_K_LIMIT and size < _EQUAL
    mixed = r_hat < R_HAT_LIMIT
    if distance <= TRUSTED and not rare and mixed:
        verdict = "trust"
    elif distance <= REFINABLE:
        verdict = "use with refinement"
        if rare:
            reason = f"some draws are rarer than they should be, Pareto k {k:.2f}; {reason}"
        if not mixed:
            reason = f"the chains that it rests on have not mixed, R-hat {r_hat:.2f}; {reason}"
    else:
        verdict = "do not trust"
        reason += "; more steps may help"
    if points:
        reason += f"; modes were sought at {points:,} points within 12 standard deviations"
    return Diagnostics(
        k, size, distance, classified, missing, kl, adversary_accuracy, r_hat, points, verdict,
        reason,
    )  # fmt: skip
