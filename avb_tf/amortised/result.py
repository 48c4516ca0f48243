"""`AmortisedFit`: the posterior of any data set in milliseconds, and the verdict on it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import diagnostics as weighing
from avb_tf import files
from avb_tf.amortised import calibration, saving, training
from avb_tf.amortised.calibration import Check, Surprise, Typical
from avb_tf.amortised.judging import Compiled, Given, Judgement, judge
from avb_tf.amortised.network import ConditionalMixture
from avb_tf.amortised.rows import Rows
from avb_tf.amortised.simulation import DataSet, Simulation
from avb_tf.errors import UserError
from avb_tf.posteriors import hmc
from avb_tf.posteriors.evidence import Evidence
from avb_tf.posteriors.result import Refinement
from avb_tf.posteriors.sampling import LEAPFROGS
from avb_tf.posteriors.target import Structure
from avb_tf.posteriors.verdict import Diagnostics
from avb_tf.settings import fits
from avb_tf.settings.amortised import SINCE
from avb_tf.settings.posterior import LEAST_REFINED

META, WEIGHTS, MODEL = "amortised.json", "q.weights.h5", "model"  # the files of a saved fit
_BANK = 20_000  # simulated pairs; those nearest to y show where its posterior is
_BANK_NUMBERS = 2**25  # largest number of entries of their data
_FEWEST = 0.05  # smallest effective sample size, as a share, for importance resampling
_OVERSAMPLED = 4  # effective draws for each resampled one
_CHAINS = 1000  # chains of a refinement
NETWORK, RESAMPLED, CHAINS = "network", "importance resampling", "Hamiltonian Monte Carlo"


class Answer(NamedTuple):
    """Draws, the method that made them, and the verdict that led to this method.

    The verdict is on the network's draws, before any repair.
    """

    parameters: Structure  # [n, ...], in the model's structure
    method: str  # "network", "importance resampling" or "Hamiltonian Monte Carlo"
    diagnostics: Diagnostics


class AmortisedFit:
    """One network for the posteriors of all data sets, by `avb_tf.fit_amortised`.

        fit = avb_tf.fit_amortised(model, observed=("y",), seconds=300)
        fit.sample(y, 10_000)           # draws of p(parameters | y), in milliseconds
        print(fit.posterior(y).verdict)  # trust: ...

    Attributes:
      simulation: the model as a source of simulated pairs.
      q: the conditional density of unconstrained parameters.
      settings: settings of the fit.
      seed: seed of the fit.
      steps: number of training steps.
      seconds: time that the fit took.
      history: "log_q", the mean log density in nats of new pairs during training. If the model is a
        table of pairs, these are not new, and "log_q_held_out" has that of the pairs held out.
    """

    def __init__(
        self,
        simulation: Simulation,
        q: ConditionalMixture,
        settings: dict[str, Any],
        seed: int,
        steps: int,
        seconds: float,
        history: dict[str, list[float]],
    ):
        self.simulation, self.q, self.settings, self.seed = simulation, q, settings, seed
        self.steps, self.seconds, self.history = steps, seconds, history
        self.compiled = Compiled(q, simulation)
        # Only the latest size of data sets is kept.
        self._banks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._typical: dict[int, Typical] = {}

    def sample(self, y: DataSet, n: int, seed: int = 0, escalate: bool = False) -> Any:
        """Returns `n` draws of the posterior given y.

        Args:
          y: the observed data set: a dict of arrays by name, or an array for a single part.
          n: number of draws.
          seed: seed of the draws.
          escalate: whether to repair draws that the verdict does not trust, by importance
            resampling or else by Hamiltonian Monte Carlo. The verdict takes seconds.
        Returns:
          The parameters in the model's structure, [n, ...]; with `escalate`, an `Answer`.
        Raises:
          UserError: y does not fit the model, or `escalate` is set and the model has no density.
        """
        if escalate:
            return self.posterior(y).answer(n, seed)
        row = tf.constant(self.simulation.flat(y))
        return self.compiled.parameters(row, tf.constant(n), tf.constant([seed, 0]))

    def log_prob(self, parameters: Structure, y: DataSet) -> np.ndarray:
        """Returns log q(parameters|y) in nats, [n], for parameters [n, ...] in their structure."""
        u = self.simulation.unconstrain(parameters)
        log_q = Given(self.compiled, self.simulation.flat(y)).log_density(u)
        volume = np.asarray(self.simulation.log_volume(u), np.float64)
        return np.where(np.isneginf(log_q), log_q, log_q - volume)  # outside the support

    def posterior(self, y: DataSet, seed: int = 0) -> "AmortisedPosterior":
        """Returns the posterior of one data set: `.sample`, `.verdict`, `.evidence`, `.refine`."""
        return AmortisedPosterior(self, self.simulation.flat(y), seed)

    def check(
        self, pairs: int = 1000, draws: int = 99, seed: int = 0, rows: int | None = None
    ) -> Check:
        """Tests the calibration over simulated data sets: ranks, coverage and TARP.

        It simulates `pairs` data sets, and an outcome of each draw; with a slow simulator, fewer
        pairs and draws save time. If the model is a table, it takes pairs that were held out, one
        for each of their parameters, and predicts no outcomes.

        Args:
          pairs: number of simulated data sets.
          draws: number of draws for each data set.
          seed: seed of the data sets and the draws.
          rows: number of rows of each data set; None: all sizes that the fit was trained for.
        Raises:
          UserError: an argument is out of range, the fit was not trained for this number of rows,
            or hardly any simulated data set is finite.
        """
        fits.check_number("pairs", pairs)
        fits.check_number("draws", draws)
        simulation = self.simulation
        if rows is not None:
            if not isinstance(simulation, Rows):
                raise UserError(f"rows is {rows}; expected None for data sets of a fixed shape")
            simulation = simulation.of(rows)
        return calibration.check(self.compiled, simulation, pairs, draws, _away(seed))

    def surprise(self, y: DataSet) -> Surprise:
        """Tests whether y looks like data of the model, at a false alarm rate of 5%.

        Raises:
          UserError: y does not fit the model, or hardly any simulated data set is finite.
        """
        row, seed = self.simulation.flat(y), _away(self.seed)
        if (size := row.shape[1]) not in self._typical:
            like = self.simulation.like(row)
            self._typical = {size: calibration.typical(self.compiled, like, seed)}
        return calibration.surprise(self.compiled, row, self._typical[size], seed)

    def to_arviz(self, y: DataSet, draws: int = 2000, seed: int = 0) -> Any:
        """Returns `arviz.InferenceData` of independent draws, as one chain.

        It also has log q and the data and, if the model has a density, log densities and weights.

        Args:
          y: the observed data set: a dict of arrays by name, or an array for a single part.
          draws: number of draws.
          seed: seed of the draws.
        """
        posterior = self.posterior(y)
        u = posterior.unconstrained(draws, seed)
        parameters = self.simulation.constrain(tf.constant(u, self.simulation.dtype))
        stats = {"log_q": posterior.given.log_density(u)}
        if self.simulation.has_density:
            stats["lp"] = posterior.given.scores(u)[0]
            stats["log_weight"] = stats["lp"] - stats["log_q"]
        names, values = self.simulation.names, map(np.asarray, tf.nest.flatten(parameters))
        observed = {
            name: np.asarray(value)
            for name, value in self.simulation.parts(posterior.given.y[0]).items()
        }
        return weighing.inference_data(dict(zip(names, values, strict=True)), stats, observed)

    def save(self, path: str | Path) -> None:
        """Writes the fit as a directory without pickled files; `AmortisedFit.load` reads it.

        Raises:
          UserError: the path cannot be written.
        """
        meta = {
            "seed": self.seed,
            "steps": self.steps,
            "seconds": self.seconds,
            "settings": self.settings,
            "history": self.history,
        }
        with files.saving(Path(path), META, json.dumps(meta) + "\n", WEIGHTS, MODEL) as new:
            self.q.save_weights(new / WEIGHTS)
            saving.save(self.simulation, new / MODEL)

    def export(self, directory: str | Path, **settings: Any) -> Path:
        """Writes `<directory>/<version>/` for TensorFlow Serving; the data are an input.

        Its signatures are `sample`, `sample_seeded` and `log_prob`. It needs the extra [serving].

        Args:
          directory: directory of the versions.
          **settings: arguments of `serving.writing.export_amortised`, such as `draws`.
        Returns:
          The version's directory.
        Raises:
          UserError: the version exists or cannot be written.
        """
        from avb_tf.serving import writing

        return writing.export_amortised(self, directory, **settings)

    @classmethod
    def load(cls, path: str | Path) -> "AmortisedFit":
        """Loads a fit that `save` wrote, without the model's own code.

        Load only directories from sources that you trust: the model is stored as a TensorFlow
        SavedModel, a program that may read and write files.

        Raises:
          UserError: the directory is not a saved fit, or it is damaged.
        """
        path = Path(path)
        with files.loading(path, "AmortisedFit.save"):
            meta = json.loads((path / META).read_text())
            model = saving.load(path / MODEL)
            q = training.build(model, SINCE["fit"] | meta["settings"])
            q.load_weights(path / WEIGHTS)
            return cls(model, q, **meta)

    def with_model(self, simulation: Simulation) -> "AmortisedFit":
        """Returns the fit with its model's code, or its table of pairs, which `save` leaves out.

        Raises:
          UserError: the table is not the one that the fit was trained on.
        """
        if simulation.digest != self.simulation.digest:
            raise UserError(
                f"the fit was trained on another table of pairs, {self.simulation.digest or 'none'}"
                f" and not {simulation.digest or 'none'}; expected the same: choose another workdir"
            )
        known = (self.settings, self.seed, self.steps, self.seconds, self.history)
        return AmortisedFit(simulation, self.q, *known)

    def bank(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns simulated u [n, dim] and summaries [n, statistics] of data sets of y's size."""
        if (size := y.shape[1]) not in self._banks:
            pairs = min(_BANK, _BANK_NUMBERS // size)
            u, others = calibration.simulated(self.simulation.like(y), pairs, _away(self.seed))
            self._banks = {size: (u, self.simulation.summary(others))}
        return self._banks[size]


class AmortisedPosterior:
    """The posterior of one data set, from an amortised fit.

    Attributes:
      fit: the amortised fit.
      given: the fit's density of unconstrained parameters given this data set.
    """

    def __init__(self, fit: AmortisedFit, y: np.ndarray, seed: int):
        self.fit, self.given, self._seed = fit, Given(fit.compiled, y), seed
        self._judged: Judgement | None = None

    def sample(self, n: int, seed: int = 0) -> Structure:
        """Returns `n` draws of the network, [n, ...] in the model's structure."""
        y = tf.constant(self.given.y)
        return self.fit.compiled.parameters(y, tf.constant(n), tf.constant([seed, 0]))

    def unconstrained(self, n: int, seed: int = 0) -> np.ndarray:
        """Returns `n` unconstrained draws of the network, [n, dim]."""
        return self.given.draw(n, np.random.default_rng(seed))

    @property
    def verdict(self) -> Diagnostics:
        """The verdict on the network's draws, from their weights and from chains.

        It takes seconds the first time.

        Raises:
          UserError: the model is a simulator, which has no density to compare with.
        """
        return self._judgement().diagnostics

    @property
    def evidence(self) -> Evidence:
        """log p(y) in nats, by a bridge between q, with modes that it lacks, and the chains."""
        return self._judgement().log_evidence

    def answer(self, n: int, seed: int = 0) -> Answer:
        """Returns `n` draws, repaired unless the verdict is "trust"."""
        diagnostics = self.verdict
        if diagnostics.verdict == "trust":
            return Answer(self.sample(n, seed), NETWORK, diagnostics)
        u = self._resampled(n, seed)
        method = RESAMPLED
        if u is None:
            u, method = self.refine(chains=n, seed=seed).u, CHAINS
        parameters = self.fit.simulation.constrain(tf.constant(u, self.fit.simulation.dtype))
        return Answer(parameters, method, diagnostics)

    def refine(self, steps: int = 60, chains: int = _CHAINS, seed: int = 0) -> Refinement:
        """Runs Hamiltonian Monte Carlo from the states of the verdict's chains.

        Jumps are proposed from q and from the modes that it lacks. The first half of the steps is
        discarded.

        Args:
          steps: number of transitions of each chain.
          chains: number of parallel chains; their last states are the draws returned.
          seed: seed of the chains.
        Raises:
          UserError: an argument is out of range.
        """
        fits.check_number("steps", steps, low=LEAST_REFINED)
        fits.check_number("chains", chains)
        fits.check_number("seed", seed, low=0)
        judged, rng = self._judgement(), np.random.default_rng(seed)
        states = judged.states.reshape(-1, judged.states.shape[-1])
        x = states[rng.integers(len(states), size=chains)]
        jumps: Any = judged.proposal
        half = (steps + 1) // 2
        step_size = float(np.median(judged.step_size))

        def run(x):
            return hmc.run_chains(
                self.given.scores, x, judged.root, half, LEAPFROGS, step_size, rng, jumps=jumps
            )

        kept = run(run(x).states[-1])
        u = kept.states[-1]
        return Refinement(
            self.fit.simulation.constrain(tf.constant(u, self.fit.simulation.dtype)),
            u,
            *weighing.convergence(np.moveaxis(kept.states, 0, 1)),
            float(kept.acceptance.mean()),
        )

    def _resampled(self, n, seed):
        """Returns draws [n, dim] by importance resampling, or None if weights are unreliable."""
        proposal, rng = self._judgement().proposal, np.random.default_rng(seed)
        x = proposal.draw(max(n, 1000), rng)
        log_weights = self._log_weights(proposal, x)
        share = float(weighing.effective_sample_size(log_weights)) / len(x)
        if weighing.pareto_k(log_weights) > weighing.PARETO_K_LIMIT or share < _FEWEST:
            return None
        more = proposal.draw(int(_OVERSAMPLED * n / share), rng)
        x = np.concatenate([x, more])
        log_weights = np.concatenate([log_weights, self._log_weights(proposal, more)])
        cumulated = np.cumsum(np.exp(log_weights - log_weights.max()))
        # Evenly spaced places repeat only draws of large weight, whereas independent ones repeat a
        # tenth of all draws.
        places = cumulated[-1] * (np.arange(n) + rng.uniform()) / n
        return x[rng.permutation(np.searchsorted(cumulated, places))]

    def _log_weights(self, proposal, x):
        log_weights = self.given.scores(x)[0] - proposal.log_density(x)
        return np.where(np.isnan(log_weights), -np.inf, log_weights)

    def _judgement(self) -> Judgement:
        if self._judged is None:
            if not self.fit.simulation.has_density:
                raise UserError(
                    "the model is a simulator without a density; expected a joint distribution for "
                    "a verdict, evidence or refinement of one data set: use `fit.check()` and "
                    "`fit.surprise(y)`"
                )
            u, others = self.fit.bank(self.given.y)
            own = self.fit.simulation.summary(self.given.y)
            z = calibration.standardised(np.concatenate([own, others]))
            nearest = np.argsort(((z[1:] - z[0]) ** 2).sum(1), kind="stable")
            self._judged = judge(self.given, u[nearest], u, self._seed)
        return self._judged


def _away(seed: int) -> int:
    """Returns a seed for pairs that training has not used."""
    return (seed + 2**30) % 2**31
