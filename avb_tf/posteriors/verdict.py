"""The distance between a fit and the posterior, and the verdict on the fit.

Two independent estimates of the total variation between q and the posterior are made, and the
larger one counts:

 - the overlap of both densities, over draws of q and over states of the start's chains. It depends
   on T, which is wrong if the adversary can no longer follow the fit;
 - the accuracy of a classifier between draws of q and states of the chains, on held-out draws. It
   does not depend on T.
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
R_HAT_LIMIT = 1.1  # short chains of a larger R-hat have not mixed and are no reference
_IMPOSSIBLE = -0.2  # nats: sampling errors do not make an estimate of KL(q || posterior) so low
_LEVELS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
# Effective sample size, as a share, above which Pareto k is ignored: the tail of nearly equal
# weights may have any shape.
_EQUAL = 0.99
_COORDINATES = 40  # most coordinates used for gradient boosting
_FAR = 8.0  # standard deviations at which a classifier's inputs are clipped


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """The verdict on a fit and the numbers behind it. `print` shows the verdict in one line.

    Attributes:
      pareto_k: Pareto k of the importance weights; above 0.7 the weights cannot be trusted.
      effective_sample_size: effective sample size of the weights, as a share of the draws.
      distance: total variation between q and the posterior, 0 to 1: the largest of the estimates
        by the overlap and by the classifier, and of the share that the chains are known to lack.
      classified: the classifier's estimate of the distance.
      missing: share of the posterior where q has less than a tenth of the posterior's density.
      kl: KL(q || posterior) in nats.
      adversary_accuracy: accuracy of the adversary between q and its Gaussian contrast: 1/2 for a
        Gaussian q.
      r_hat: largest R-hat of any coordinate, over the start's chains.
      points: number of points that were searched for modes, within about 12 standard deviations.
      verdict: "trust", "use with refinement" or "do not trust".
      reason: reason for the verdict, in one line.
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
    """Returns the total variation distance between q and p, and the log normaliser of p.

    The overlap, 1 - distance = int min(p, q), is an expectation under q and also under p. The
    normaliser is the value for which both estimates agree (a bridge; Meng and Wong, 1996). Draws of
    q alone would not show a mode that q lacks.

    Args:
      at_q: log p - log q at draws of q, [n]; p need not be normalised.
      at_p: log p - log q at draws of p, [m].
    """
    at_q, at_p = _against(at_q, at_p)
    finite = np.concatenate([at_q, at_p])[np.isfinite(np.concatenate([at_q, at_p]))]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    by_q = by_p = 0.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        by_q = np.exp(np.minimum(0.0, at_q - middle)).mean()
        by_p = np.exp(np.minimum(0.0, middle - at_p)).mean()
        low, high = (middle, high) if by_q > by_p else (low, middle)
    return float(1.0 - min(by_q, by_p)), float(0.5 * (low + high))


def _against(at_q, at_p):
    """Counts NaN against the fit: a draw of q without posterior mass, a state where q has none."""
    return np.where(np.isnan(at_q), -np.inf, at_q), np.where(np.isnan(at_p), np.inf, at_p)


def classified(q: np.ndarray, p: np.ndarray, chains: int, seed: int = 0) -> float:
    """Returns the total variation between q and p as estimated by classifiers.

    Gradient boosting and a small network learn from one half of the draws and are scored on the
    other half; the better one counts. The best possible classifier is right with probability
    1/2 + distance / 2. Each score is therefore a lower bound of the distance, up to an error of
    0.03 for 2,000 draws of each kind. If q and p are alike, the estimate is about 0.

    Args:
      q: draws of q, [n, features].
      p: states of chains of p, chain after chain, [chains * kept, features]. No chain is in both
        halves.
      chains: number of chains.
      seed: seed of the classifiers and the halves.
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
    # In many dimensions, boosting uses the coordinates that differ most and the last feature, which
    # is the log density.
    quantiles = [np.quantile(x[mask & (y == side)], _LEVELS, axis=0) for side in (0, 1)]
    differing = np.argsort(-np.abs(quantiles[0] - quantiles[1]).max(0))[:_COORDINATES]
    columns = np.union1d(differing, [x.shape[1] - 1])
    boosting = HistGradientBoostingClassifier(max_iter=80, random_state=seed)
    network = MLPClassifier((64, 64), max_iter=40, random_state=seed, learning_rate_init=3e-3)
    accuracies = []
    for classifier, inputs in ((boosting, x[:, columns]), (network, x)):
        # On a busy machine, threads that wait for each other take ten times as long as one alone.
        with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the network stops after 40 epochs
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
    """Returns the verdict on a fit.

    The draws of the posterior may be rough, such as states of short chains, but they must cover
    regions that q lacks.

    Args:
      at_q: log p(data, z) - log q(z) at draws of q, [n], in nats.
      at_p: log p(data, z) - log q(z) at draws of the posterior, [m], in nats.
      adversary_accuracy: accuracy of the adversary between q and its Gaussian contrast.
      classified: the classifier's estimate of the distance.
      r_hat: largest R-hat of the chains whose states are the draws of the posterior.
      points: number of points that were searched for modes.
      lacking: share of the posterior that the search found and the chains lack.
    """
    at_q, at_p = _against(at_q, at_p)
    k = float(weighing.pareto_k(at_q))
    size = float(weighing.effective_sample_size(at_q)) / len(at_q)
    overlap, log_evidence = total_variation(at_q, at_p)
    distance = max(overlap, classified, lacking)
    missing = float(np.mean(at_p - log_evidence > np.log(10.0)))
    kl = float(log_evidence - at_q.mean())
    reason = f"fit and posterior differ by {distance:.2f} in total variation"
    if kl < _IMPOSSIBLE:  # then log q = log r + T is wrong, and so are the numbers above
        distance, reason = 1.0, f"the adversary has lost the fit, whose KL would be {kl:.2f} nats"
    elif missing > TRUSTED:
        reason += f", {missing:.2f} of it where the fit has next to nothing"
    if lacking > 0.05:
        reason += f", {lacking:.2f} of it in regions that the reference chains have not visited"
    rare = k > weighing.PARETO_K_LIMIT and size < _EQUAL
    mixed = r_hat < R_HAT_LIMIT
    if distance <= TRUSTED and not rare and mixed:
        verdict = "trust"
    elif distance <= REFINABLE:
        verdict = "use with refinement"
        if rare:
            reason = f"some draws are rarer than they should be, Pareto k {k:.2f}; {reason}"
        if not mixed:
            reason = f"the reference chains have not mixed, R-hat {r_hat:.2f}; {reason}"
    else:
        verdict = "do not trust"
        reason += "; more steps may help"
    if points:
        reason += f"; modes were sought at {points:,} points within 12 standard deviations"
    return Diagnostics(
        k, size, distance, classified, missing, kl, adversary_accuracy, r_hat, points, verdict,
        reason,
    )  # fmt: skip
