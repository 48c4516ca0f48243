"""`PosteriorFit`: draws, evidence, the verdict on them, and their refinement if it is needed."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from avb_tf import contrast, files, objectives
from avb_tf import diagnostics as weighing
from avb_tf.figures.pairs import pairs
from avb_tf.model import AVB
from avb_tf.posteriors import hmc, mixture, sampling, verdict
from avb_tf.posteriors import start as starting
from avb_tf.posteriors.coordinates import Start
from avb_tf.posteriors.evidence import Evidence
from avb_tf.posteriors.sampler import Chart
from avb_tf.posteriors.target import Structure, Target
from avb_tf.posteriors.verdict import Diagnostics
from avb_tf.settings import fits
from avb_tf.settings.posterior import LEAST_REFINED

META, WEIGHTS, MODEL = "fit.json", "fit.weights.h5", "model"  # the files of a saved fit
START = "start.npz"
_DIAGNOSTIC_DRAWS = 4000
_DIAGNOSTIC_SEED = 2**30  # so large that no call of `sample` is likely to use it


class Draws(NamedTuple):
    """Draws with their log densities under the model and under q, in nats."""

    u: np.ndarray  # [n, dim], unconstrained
    log_density: np.ndarray  # [n], log p(data, parameters) as a density of u
    log_q: np.ndarray  # [n], log r + T as a density of u

    @property
    def log_weights(self) -> np.ndarray:
        """Log importance weights, [n]: the mean of their exponentials estimates the evidence."""
        return self.log_density - self.log_q


class Refinement(NamedTuple):
    """The last states of chains that started from a fit, with their diagnostics."""

    parameters: Structure  # [chains, ...], in the model's structure
    u: np.ndarray  # [chains, dim], the same states, unconstrained
    r_hat: np.ndarray  # [dim], rank-normalised, over the steps that were kept
    effective_sample_size: np.ndarray  # [dim], over all chains and kept steps together
    acceptance: float  # mean acceptance rate of the kept steps


class PosteriorFit:
    """A sampler of a model's posterior, fitted by `avb_tf.fit_posterior`.

    Attributes:
      target: the model in unconstrained space.
      model: the `AVB` over z, where u = start.place(chart(z)).
      start: coordinates in which the posterior has mean 0 and covariance I, found before the fit.
      seconds: time that the whole fit took.
      steps: number of AVB's training steps, without those of the chart.
      seed: seed of the fit.
      settings: settings of the fit.
      history: the bound in nats and its terms during training, by name.
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
        self._drawn: Draws | None = None
        self._visited: Draws | None = None

    @property
    def kind(self) -> str:
        """The sampler: "AVB", or "chart", "mixture" or "Gaussian", whose densities are exact."""
        encoder: Any = self.model.encoder
        if self.model.adversary is None:
            return "mixture"
        if encoder.stacks:
            return "AVB"
        return "chart" if isinstance(self.model.decoder, Chart) else "Gaussian"

    def sample(self, n: int, seed: int = 0) -> Structure:
        """Returns `n` draws of the posterior in the model's own structure and dtypes, [n, ...]."""
        return self.constrain(self._z(n, seed))

    def constrain(self, z: tf.Tensor) -> Structure:
        """Maps the sampler's z [n, dim] to the model's parameters [n, ...]."""
        return self.target.constrain(self._charted(z)[0])

    def unconstrained(self, n: int, seed: int = 0) -> np.ndarray:
        """Returns `n` draws in unconstrained space, [n, dim], where fits are compared."""
        return np.asarray(self._charted(self._z(n, seed))[0], np.float64)

    def draws(self, n: int, seed: int = 0) -> Draws:
        """Returns `n` draws with the log densities of the model and of q.

        log q = log r + T is not exact, because the adversary has learned T.
        """
        return self._described(self._z(n, seed))

    @property
    def log_evidence(self) -> Evidence:
        """log p(data) in nats, by a bridge between a mixture of known density and the chains.

        It is unknown, that is NaN with an infinite error, if the two hardly overlap.
        """
        return self.start.log_evidence

    def diagnostics(self) -> Diagnostics:
        """Returns the verdict on the fit, from 4,000 draws of their own and the start's chains."""
        if self._diagnosed is None:
            z = self._z(_DIAGNOSTIC_DRAWS, _DIAGNOSTIC_SEED)
            r = self._contrast()
            at_r = r.sample(_DIAGNOSTIC_DRAWS, [_DIAGNOSTIC_SEED, 1])
            accuracy = objectives.adversary_accuracy(self._t(z, r), self._t(at_r[:, 0], r))
            drawn, chains = self._at_draws(), self._chains()
            states = self.start.z.reshape(self.start.chains, -1, self.target.dim)
            self._diagnosed = verdict.diagnose(
                drawn.log_weights,
                chains.log_weights,
                float(np.mean(accuracy)),
                self._classified(z, drawn, chains),
                weighing.largest_r_hat(states),
                self.start.points,
                self.start.lacking,
            )
        return self._diagnosed

    def overlap(self) -> float:
        """Returns the total variation between q and the posterior, if the adversary is right."""
        drawn, chains = self._at_draws(), self._chains()
        return verdict.total_variation(drawn.log_weights, chains.log_weights)[0]

    def refine(
        self, steps: int = 100, chains: int = 1000, seed: int = 0, verbose: bool = True
    ) -> Refinement:
        """Runs Hamiltonian Monte Carlo from the fit's draws, with jumps between modes.

        The initial states follow p = min(p, q) + max(0, p - q). Draws of q, each taken with
        probability min(1, p / q), make up the first term. States of the start's chains, each taken
        with probability max(0, 1 - q / p), make up the second, which q lacks. The chains therefore
        start in every mode in proportion to its mass. The first half of the steps adapts the step
        size and is discarded.

        Args:
          steps: number of transitions of each chain, of 8 leapfrog steps each; 8 at the least, for
            R-hat needs four states of each chain.
          chains: number of parallel chains, 2 at the least; their last states are the draws.
          seed: seed of the draws and the chains.
          verbose: whether to show a progress bar.
        Raises:
          UserError: an argument is out of range.
        """
        fits.check_number("steps", steps, low=LEAST_REFINED)
        fits.check_number("chains", chains, low=2)
        fits.check_number("seed", seed, low=0)
        rng = np.random.default_rng(seed)
        drawn, states = self.draws(2 * chains, seed + 1), self._chains()
        _, log_evidence = verdict.total_variation(drawn.log_weights, states.log_weights)
        taken = np.exp(np.minimum(0.0, drawn.log_weights - log_evidence)) / len(drawn.u)
        lacking = -np.expm1(np.minimum(0.0, log_evidence - states.log_weights)) / len(states.u)
        weights = np.concatenate([taken, lacking])
        rows = rng.choice(len(weights), chains, p=weights / weights.sum())
        candidates = self.start.tails.inverse(np.concatenate([drawn.u, states.u]))
        v = candidates[rows]
        scores, half = starting.scores_in(self.target, self.start.tails), (steps + 1) // 2
        if self.target.dim <= starting.LARGEST:
            # The covariance is that of all candidates: of fewer chains than dimensions it would be
            # singular. Without jumps, a chain stays in the mode where it starts.
            root = hmc.root(np.cov(candidates.T, aweights=weights))
            jumps = mixture.fitted(v, self.start.mixture or sampling.around(v, rng))
        else:
            mean = np.average(candidates, 0, weights)
            root, jumps = np.sqrt(np.average((candidates - mean) ** 2, 0, weights)), None
        bar = keras.utils.Progbar(2 * half, verbose=int(verbose), unit_name="transition")
        run = functools.partial(hmc.run_chains, scores, told=lambda: bar.add(1))
        first = run(v, root, half, 8, 0.3, rng, adapt=True, jumps=jumps)
        kept = run(first.states[-1], root, half, 8, first.step_size, rng, jumps=jumps)
        u = self.start.tails.forward(tf.constant(kept.states[-1], self.target.dtype))[0]
        return Refinement(
            self.target.constrain(u),
            np.asarray(u, np.float64),
            *weighing.convergence(np.moveaxis(kept.states, 0, 1)),
            float(kept.acceptance.mean()),
        )

    def to_arviz(self, draws: int = 2000, seed: int = 0) -> Any:
        """Returns `arviz.InferenceData` with draws, log densities, log weights and observed data.

        The draws are independent and form one chain. `.to_netcdf(path)` writes the result.
        """
        drawn = self.draws(draws, seed)
        parameters = self.target.constrain(tf.constant(drawn.u, self.target.dtype))
        return weighing.inference_data(
            dict(zip(self.target.names, map(np.asarray, tf.nest.flatten(parameters)), strict=True)),
            {"lp": drawn.log_density, "log_q": drawn.log_q, "log_weight": drawn.log_weights},
            self.target.observed,
        )

    def plot(self, draws: int = 2000, seed: int = 0) -> Any:
        """Returns a matplotlib figure of all pairs of at most the last six parameter entries."""
        values = map(np.asarray, tf.nest.flatten(self.sample(draws, seed)))
        columns: dict[str, np.ndarray] = {}
        for name, value in zip(self.target.names, values, strict=True):
            for i in np.ndindex(*value.shape[1:]):
                column = value[:, *i]
                # A correlation matrix has constant entries, and has every other entry twice.
                known = any(np.array_equal(column, other) for other in columns.values())
                if np.ptp(column) > 0 and not known:
                    columns[f"{name}{list(i)}" if i else name] = column
        return pairs({"fit": np.stack(list(columns.values()), -1)}, list(columns))

    def save(self, path: str | Path) -> None:
        """Writes the fit as a directory without pickled files; `avb_tf.load_posterior` reads it.

        Raises:
          UserError: the path cannot be written.
        """
        meta = {
            "seed": self.seed,
            "seconds": self.seconds,
            "steps": self.steps,
            "settings": self.settings,
            "history": self.history,
            "charted": isinstance(self.model.decoder, Chart),
            "mixed": self.model.adversary is None,
        }
        content = json.dumps(meta) + "\n"
        with files.saving(Path(path), META, content, WEIGHTS, MODEL, START) as new:
            self.model.save_weights(new / WEIGHTS)
            self.target.save(new / MODEL)
            self.start.save(new / START)

    def export(self, directory: str | Path, **settings: Any) -> Path:
        """Writes `<directory>/<version>/` for TensorFlow Serving, with the signature `sample`.

        The settings are those of `serving.writing.export_posterior`. It needs the extra [serving].
        """
        from avb_tf.serving import writing

        return writing.export_posterior(self, directory, **settings)

    def _at_draws(self) -> Draws:
        """Returns the draws reserved for the verdict, made once."""
        if self._drawn is None:
            self._drawn = self.draws(_DIAGNOSTIC_DRAWS, _DIAGNOSTIC_SEED)
        return self._drawn

    def _classified(self, z, drawn: Draws, chains: Draws) -> float:
        """Returns the distance by classifiers of standardised coordinates and the log density."""
        outputs = np.asarray(self.model.averaged_decoder(z))[:, :-1]
        return verdict.classified(
            np.column_stack([outputs, drawn.log_density]),
            np.column_stack([self.start.z, chains.log_density]),
            self.start.chains,
        )

    def _z(self, n, seed):
        """Returns draws z [n, dim] of the averaged encoder."""
        return self.model.averaged_encoder.z(self._noise(n, seed))

    def _noise(self, n, seed):
        return tf.random.stateless_normal([n, self.model.encoder.noise_dim], [seed, 0])

    def _contrast(self):
        """Returns r, the Gaussian with q's mean and covariance."""
        noise = self._noise(1, 0)[:, tf.newaxis]
        return contrast.full_contrast(self.model.averaged_encoder(tf.zeros([1, 1]), noise))

    def _t(self, z, r):
        """Returns T = log q - log r at z, [n, dim] -> [n]; it is exact for a mixture."""
        adversary: Any = self.model.adversary
        if adversary is None:
            encoder: Any = self.model.averaged_encoder
            return encoder.log_density(z) - r.log_prob(z[:, tf.newaxis])[:, 0]
        return adversary(tf.zeros([1, 1]), contrast.whiten(z[:, tf.newaxis], r))[:, 0]

    def _described(self, z) -> Draws:
        """Returns the `Draws` at draws z [n, dim] of q."""
        u, volume = self._charted(z)
        # NaN arises outside the model's support and where the chart overflows. Both count as places
        # where the posterior has no mass.
        density, log_q = self._log_density(u), self._log_q(z, volume)
        return Draws(
            np.asarray(u, np.float64),
            np.where(np.isfinite(density), density, -np.inf),
            np.where(np.isfinite(log_q), log_q, np.inf),
        )

    def _chains(self) -> Draws:
        """Returns the states of the start's chains as `Draws`, with q's density at them.

        A learned T is not trained far from the draws of q and r, where a large value could hide any
        distance. It is therefore limited to the largest value at q's draws. Where the chart's
        inverse overflows, q has no mass. The states are evaluated once.
        """
        if self._visited is not None:
            return self._visited
        chart: Any = self.model.averaged_decoder
        highest = np.inf
        if self.model.adversary is not None:
            z = self._z(_DIAGNOSTIC_DRAWS, _DIAGNOSTIC_SEED)
            highest = np.max(self._t(z, self._contrast()))
        u, _ = self.start.place(self.start.z, self.target.dtype)
        z = chart.inverse(tf.constant(self.start.z, tf.float32))
        log_q = self._log_q(z, self._charted(z)[1], highest)
        self._visited = Draws(
            np.asarray(u, np.float64),
            self._log_density(u),
            np.where(np.isfinite(log_q), log_q, -np.inf),
        )
        return self._visited

    def _log_density(self, u):
        """Returns log p(data, parameters) in nats as a density of u, [n, dim] -> [n]."""
        rows = self.target.cost.rows
        parts = [self.target.log_density(u[i : i + rows]) for i in range(0, len(u), rows)]
        return np.concatenate(parts, dtype=np.float64)

    def _log_q(self, z, volume, highest=np.inf):
        """Returns log q in nats, a density of u, at z [n, dim] -> [n].

        Args:
          z: draws of the sampler.
          volume: log |du / dz| there, [n].
          highest: limit of T.
        """
        r = self._contrast()
        log_q = r.log_prob(z[:, tf.newaxis])[:, 0] + np.minimum(self._t(z, r), highest) - volume
        return np.asarray(log_q, np.float64)

    def _charted(self, z):
        """Returns u [n, dim] for z [n, dim], and log |du / dz| [n]."""
        outputs = self.model.averaged_decoder(tf.cast(z, tf.float32))
        u, volume = self.start.place(outputs[:, :-1], self.target.dtype)
        return u, outputs[:, -1] + tf.cast(volume, tf.float32)
