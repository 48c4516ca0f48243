"""`PosteriorFit`: draws, evidence, how far to believe them, and what to do where one should not."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import contrast, objectives
from avb_tf import diagnostics as weighing
from avb_tf.errors import UserError
from avb_tf.figures.pairs import pairs
from avb_tf.files import write_atomically
from avb_tf.model import AVB
from avb_tf.posteriors import hmc
from avb_tf.posteriors.sampler import Chart
from avb_tf.posteriors.start import Start
from avb_tf.posteriors.target import Structure, Target

META, WEIGHTS, MODEL = "fit.json", "fit.weights.h5", "model"  # what a saved fit consists of
_DIAGNOSTIC_DRAWS = 4000
_DIAGNOSTIC_SEED = 2**30  # of draws that no `sample` is likely to ask for
_TRUSTED, _REFINABLE = 0.1, 0.4  # distances, see `diagnose`
_IMPOSSIBLE = -0.2  # nats, below what errors do to an estimate of KL(q || posterior)
_EQUAL = 0.99  # effective sample size, as a share: the tail of equal weights has any shape


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    standard_error: float


class Draws(NamedTuple):
    """Draws of q with what the model and q say of them, in nats."""

    u: np.ndarray  # [n, dim], unconstrained
    log_density: np.ndarray  # [n], log p(data, parameters), of u
    log_q: np.ndarray  # [n], log r + T, of u

    @property
    def log_weights(self):
        """[n], whose exponentials average to the evidence."""
        return self.log_density - self.log_q


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """Whether to believe a fit. Printed, it is the verdict in one line.

    It rests on where the start's chains have been: a mode that is many scales away from them is
    unknown to the fit and to its verdict.
    """

    pareto_k: float  # of the importance weights; above 0.7 they cannot be trusted
    effective_sample_size: float  # of the weights, as a share of the draws
    distance: float  # total variation between q and the posterior: 0 to 1
    missing: float  # share of the posterior where q has less than a tenth of the density it should
    kl: float  # KL(q || posterior) in nats
    adversary_accuracy: float  # between q and its Gaussian contrast: 1/2 for a Gaussian q
    verdict: str  # trust, use with refinement, do not trust
    reason: str

    def __str__(self):
        return f"{self.verdict}: {self.reason}"


class Refinement(NamedTuple):
    """Chains that started from a fit, after their last step."""

    parameters: Structure  # [chains, ...], in the model's structure
    u: np.ndarray  # [chains, dim], the same unconstrained
    r_hat: np.ndarray  # [dim], rank-normalised, of the steps that were kept
    effective_sample_size: np.ndarray  # [dim], of all chains and kept steps together
    acceptance: float


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


def diagnose(at_q: np.ndarray, at_p: np.ndarray, adversary_accuracy: float) -> Diagnostics:
    """The verdict on log p(data, z) - log q(z) at draws of q [n] and of the posterior [m].

    Those of the posterior are rough, the start's chains; what matters is that they are where q is
    not. An ideal classifier between q and the posterior is right with probability
    1/2 + distance / 2.
    """
    k = float(weighing.pareto_k(at_q))
    size = float(weighing.effective_sample_size(at_q)) / len(at_q)
    distance, log_evidence = total_variation(at_q, at_p)
    missing = float(np.mean(at_p - log_evidence > np.log(10.0)))
    kl = float(log_evidence - at_q.mean())
    reason = f"fit and posterior differ by {distance:.2f} in total variation"
    if kl < _IMPOSSIBLE:  # then log q = log r + T is wrong, and with it all of the above
        distance, reason = 1.0, f"the adversary has lost the fit, whose KL would be {kl:.2f} nats"
    if missing > _TRUSTED:
        reason += f", {missing:.2f} of it where the fit has next to nothing"
    rare = k > weighing.PARETO_K_LIMIT and size < _EQUAL
    if distance <= _TRUSTED and not rare:
        verdict = "trust"
    elif distance <= _REFINABLE:
        verdict = "use with refinement"
        if rare:
            reason = f"some draws are rarer than they should be, Pareto k {k:.2f}; {reason}"
    else:
        verdict = "do not trust"
        reason += "; more steps may help"
    return Diagnostics(k, size, distance, missing, kl, adversary_accuracy, verdict, reason)


class PosteriorFit:
    """A sampler of a model's posterior, fitted by `avb_tf.fit_posterior`.

    Attributes:
      target: the model in unconstrained space.
      model: the `AVB` over z, where u = start.mean + start.scale_tril @ chart(z).
      start: location and scale of the posterior, as found before the fit.
      seconds: that the fit took, all included.
      steps: of AVB's training, after the chart's.
      seed: of the fit.
      settings: of the fit.
      history: the bound in nats and its terms, by name, as training went.
    """

    def __init__(
        self,
        target: Target,
        start: Start,
        model: AVB,
        seconds: float,
        seed: int,
        settings: dict[str, Any],
        history: dict[str, list[float]],
    ):
        self.target, self.start, self.model = target, start, model
        self.seconds, self.seed, self.settings = seconds, seed, settings
        self.steps = int(model.step.value)
        self.history = history
        self._diagnosed: Diagnostics | None = None
        self._weights: np.ndarray | None = None

    def sample(self, n: int, seed: int = 0) -> Structure:
        """`n` draws of the posterior, in the model's own structure and dtypes, [n, ...]."""
        return self.constrain(self._z(n, seed))

    def constrain(self, z) -> Structure:
        """The model's parameters for the sampler's z, [n, dim] -> [n, ...]."""
        return self.target.constrain(self._charted(z)[0])

    def unconstrained(self, n: int, seed: int = 0) -> np.ndarray:
        """`n` draws before the constraint, [n, dim], the space of the fit and of comparisons."""
        return np.asarray(self._charted(self._z(n, seed))[0], np.float64)

    def draws(self, n: int, seed: int = 0) -> Draws:
        """`n` draws with the log densities of the model and of q.

        log q = log r + T is what the adversary has learned, not exact.
        """
        return self._described(self._z(n, seed))

    @property
    def log_evidence(self) -> Estimate:
        """log p(data) in nats by importance sampling from q; believe it as far as the verdict."""
        log_weights = self._log_weights()
        weights = np.exp(log_weights - log_weights.max())
        mean, error = weights.mean(), weights.std(ddof=1) / np.sqrt(len(weights))
        return Estimate(float(np.log(mean) + log_weights.max()), float(error / mean))

    def diagnostics(self) -> Diagnostics:
        """Whether to believe the fit, from 4,000 draws kept for it and the start's chains."""
        if self._diagnosed is None:
            z = self._z(_DIAGNOSTIC_DRAWS, _DIAGNOSTIC_SEED)
            r = self._contrast()
            at_r = r.sample(_DIAGNOSTIC_DRAWS, [_DIAGNOSTIC_SEED, 1])
            accuracy = objectives.adversary_accuracy(self._t(z, r), self._t(at_r[:, 0], r))
            self._diagnosed = diagnose(
                self._log_weights(), self._chains().log_weights, float(np.mean(accuracy))
            )
        return self._diagnosed

    def refine(self, steps: int = 100, chains: int = 1000, seed: int = 0) -> Refinement:
        """Hamiltonian Monte Carlo from the fit's draws.

        A posterior p is min(p, q), which draws of q make up if each is taken with probability
        min(1, p / q), and what q lacks, which the start's chains make up with probabilities
        max(0, 1 - q / p): so the chains here begin in every mode by its mass. The first half of
        the steps sets the step size and is thrown away.

        Args:
          steps: transitions of each chain, of 8 leapfrogs.
          chains: parallel chains, of which the last states are the draws returned.
          seed: of draws and chains.
        """
        rng = np.random.default_rng(seed)
        drawn, found = self.draws(2 * chains, seed + 1), self._chains()
        _, log_evidence = total_variation(drawn.log_weights, found.log_weights)
        taken = np.exp(np.minimum(0.0, drawn.log_weights - log_evidence)) / len(drawn.u)
        lacking = -np.expm1(np.minimum(0.0, log_evidence - found.log_weights)) / len(found.u)
        weights = np.concatenate([taken, lacking])
        rows = rng.choice(len(weights), chains, p=weights / weights.sum())
        u = np.concatenate([drawn.u, found.u])[rows]
        scores = hmc.scores(self.target.log_density, self.target.dtype)
        root = hmc.root(np.cov(u.T))
        first = hmc.run_chains(scores, u, root, (steps + 1) // 2, 8, 0.3, rng, adapt=True)
        kept = hmc.run_chains(
            scores, first.states[-1], root, (steps + 1) // 2, 8, first.step_size, rng
        )
        return Refinement(
            self.target.constrain(tf.constant(kept.states[-1], self.target.dtype)),
            kept.states[-1],
            *weighing.convergence(np.moveaxis(kept.states, 0, 1)),
            float(kept.acceptance.mean()),
        )

    def to_arviz(self, draws: int = 2000, seed: int = 0):
        """`arviz.InferenceData` with posterior, log density, sample stats and observed data.

        The draws are independent and make one chain. `.to_netcdf(path)` writes it.
        """
        drawn = self.draws(draws, seed)
        parameters = self.target.constrain(tf.constant(drawn.u, self.target.dtype))
        return weighing.inference_data(
            dict(zip(self.target.names, map(np.asarray, tf.nest.flatten(parameters)), strict=True)),
            {"lp": drawn.log_density, "log_q": drawn.log_q, "log_weight": drawn.log_weights},
            self.target.observed,
        )

    def plot(self, draws: int = 2000, seed: int = 0):
        """Every pair of the last six coordinates at most, unconstrained: a matplotlib figure."""
        return pairs({"fit": self.unconstrained(draws, seed)}, self.target.coordinates())

    def save(self, path) -> None:
        """Writes the fit, for `avb_tf.load_posterior`: a directory, nothing in it pickled.

        Raises:
          UserError: the path cannot be written.
        """
        path = Path(path)
        meta = {
            "seed": self.seed,
            "seconds": self.seconds,
            "settings": self.settings,
            "history": self.history,
            "charted": isinstance(self.model.decoder, Chart),
            **{name: value.tolist() for name, value in self.start._asdict().items()},
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.model.save_weights(path / WEIGHTS)
            self.target.save(path / MODEL)
            write_atomically(path / META, json.dumps(meta) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}; choose another path") from error

    def export(self, directory, **settings) -> Path:
        """Writes `<directory>/<version>/` for TensorFlow Serving, with the signature `sample`.

        The settings are those of `serving.writing.export_posterior`. Needs the extra [serving].
        """
        from avb_tf.serving import writing

        return writing.export_posterior(self, directory, **settings)

    def _log_weights(self):
        if self._weights is None:
            self._weights = self.draws(_DIAGNOSTIC_DRAWS, _DIAGNOSTIC_SEED).log_weights
        return self._weights

    def _z(self, n, seed):
        """[n, dim]; by the averaged encoder, each a function of its own noise."""
        return self.model.averaged_encoder.z(self._noise(n, seed))

    def _noise(self, n, seed):
        return tf.random.stateless_normal([n, self.model.encoder.noise_dim], [seed, 0])

    def _contrast(self):
        """r, the Gaussian of q's moments."""
        noise = self._noise(1, 0)[:, tf.newaxis]
        return contrast.full_contrast(self.model.averaged_encoder(tf.zeros([1, 1]), noise))

    def _t(self, z, r):
        """T at z [n, dim]."""
        adversary: Any = self.model.adversary
        return adversary(tf.zeros([1, 1]), contrast.whiten(z[:, tf.newaxis], r))[:, 0]

    def _described(self, z, highest=np.inf) -> Draws:
        """The draws of given z [n, dim], with T cut off at `highest`."""
        r = self._contrast()
        u, volume = self._charted(z)
        volume += np.linalg.slogdet(self.start.scale_tril)[1]
        log_q = r.log_prob(z[:, tf.newaxis])[:, 0] + np.minimum(self._t(z, r), highest) - volume
        found = u, self.target.log_density(u), log_q
        u, density, log_q = (np.asarray(v, np.float64) for v in found)
        # Outside the model's support, and beyond what the chart's inverse reaches.
        density, log_q = (np.where(np.isnan(v), -np.inf, v) for v in (density, log_q))
        return Draws(u, density, log_q)

    def _chains(self) -> Draws:
        """The states of the start's chains, as q sees them.

        Beyond the draws of q and r nothing has trained T, which might make up for any distance
        there: it counts for no more than at q's draws.
        """
        chart: Any = self.model.averaged_decoder
        highest = np.max(self._t(self._z(_DIAGNOSTIC_DRAWS, _DIAGNOSTIC_SEED), self._contrast()))
        return self._described(chart.inverse(tf.constant(self.start.z, tf.float32)), highest)

    def _charted(self, z):
        """u for z [n, dim], and the log Jacobian determinant of the chart.

        In the model's precision: far from 0 float32 has few digits left.
        """
        outputs = self.model.averaged_decoder(tf.cast(z, tf.float32))
        mean, factor = self.start.mean, self.start.scale_tril
        mean, factor = (tf.constant(v, self.target.dtype) for v in (mean, factor))
        u = mean + tf.linalg.matvec(factor, tf.cast(outputs[:, :-1], self.target.dtype))
        return u, outputs[:, -1]
