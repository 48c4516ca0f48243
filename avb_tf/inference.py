"""Uses of a trained model: encode, decode, sample, reconstruct, estimate log p(x)."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import likelihoods, proposal
from avb_tf.data import checks
from avb_tf.data.table import is_frame
from avb_tf.encoders import Encoder, Posterior
from avb_tf.errors import UserError
from avb_tf.likelihood_estimation import annealing
from avb_tf.likelihood_estimation.annealing import LogLikelihood
from avb_tf.training.fit import Trained

_NUMBERS = 2**22  # in one of the decoder's layers, for all draws of a part of x
_WIDTH = 256  # units of a layer, at least, for the size of these parts


class Inference(Trained):
    """Keras model of an encoder and a decoder.

    All methods use the averaged networks, and the same seed gives the same draws. Subclasses set
    the attributes below.
    """

    encoder: Encoder
    decoder: keras.Model
    averaged_encoder: Encoder  # running averages of the weights, or the encoder itself
    averaged_decoder: keras.Model
    prior: Any

    def call(self, x: np.ndarray | tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns reconstructions of x, [batch, *event]; `predict` calls this.

        In training they come from the trained networks with new noise at every call, so that an
        enclosing model or a custom loop can train these networks.
        """
        if not training:
            return self.reconstruct(x)
        examples = self._examples(x)
        noise = tf.random.normal([1, tf.shape(examples)[0], self.encoder.noise_dim])
        posterior = self.encoder(examples, noise, training=True)
        return self.likelihood.predictive_mean(self.decoder(posterior.z), examples)

    def posterior(self, x: np.ndarray | tf.Tensor, samples: int = 1, seed: int = 0) -> Posterior:
        """Draws from q(z|x) and returns its moments and, if known, its density.

        If the encoder's `moments_from_draws` is True, the moments are estimated from these draws.

        Args:
          x: [batch, *event] in [0, 1], or in the likelihood's support.
          samples: draws for each x.
          seed: the same seed gives the same draws.
        """
        return self._posterior(self._examples(x), samples, [seed, 0])

    def _posterior(self, x, samples, seed):
        shape = [samples, tf.shape(x)[0], self.encoder.noise_dim]
        noise = tf.random.stateless_normal(shape, seed)
        return self.averaged_encoder(x, noise)

    def encode(self, x: np.ndarray | tf.Tensor, samples: int = 1, seed: int = 0) -> tf.Tensor:
        """Draws z ~ q(z|x), [samples, batch, latent].

        Args:
          x: [batch, *event] in [0, 1], or in the likelihood's support.
          samples: draws for each x.
          seed: the same seed gives the same draws.
        """
        return self.posterior(x, samples, seed).z

    def decode(self, z: np.ndarray | tf.Tensor) -> tf.Tensor:
        """Returns E[x|z], [..., *event], for z [..., latent]; for a category its likeliest code."""
        return self.likelihood.mean(self.averaged_decoder(tf.convert_to_tensor(z, tf.float32)))

    def sample(self, count: int, seed: int | None = None) -> tf.Tensor:
        """Draws z from the prior and returns E[x|z], [count, *event].

        Args:
          count: number of draws.
          seed: the same seed gives the same draws; None gives different draws at each call.
        """
        seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1) if seed is None else seed
        shape = [count, self.encoder.latent_dim]
        return self.decode(tf.random.stateless_normal(shape, [seed, 1]))

    def reconstruct(self, x: Any, seed: int = 0, samples: int = 1) -> Any:
        """Returns E[x'|z] averaged over draws z ~ q(z|x), [batch, *event].

        Where a value of x is missing (NaN in a table that allows it), the result is an imputed
        value. For such a table several draws are weighted by p(x, z) / q(z|x), so that with more of
        them the result approaches E[x'|x] of the model itself (Mattei and Frellsen, 2019). A data
        frame gives a data frame, so `frame.fillna(model.reconstruct(frame, samples=100))` fills it.

        Args:
          x: [batch, *event], or a pandas data frame with the table's columns.
          seed: the same seed gives the same draws.
          samples: draws for each x.
        Raises:
          UserError: x does not fit the model, or there are no samples.
        """
        if samples < 1:
            raise UserError(f"samples is {samples}; expected 1 or more")
        examples = self._examples(x)
        if tf.is_symbolic_tensor(examples):
            means = self._reconstructed(examples, samples, [seed, 0])
        else:  # in parts, because the decoder computes all draws of a part at once
            size = max(1, _NUMBERS // (samples * max(_WIDTH, math.prod(self.event_shape))))
            parts = range(0, max(1, len(examples)), size)
            means = tf.concat(
                [
                    self._reconstructed(examples[i : i + size], samples, [seed, i // size])
                    for i in parts
                ],
                0,
            )
        if not is_frame(x):
            return means
        # Under the labels of x, or `fillna` would fill nothing where these are numbers.
        labels = {str(label): label for label in x.columns}
        return self.table.frame(means, x.index).rename(columns=labels)

    def _reconstructed(self, x, samples, seed):
        """Returns E[x'|x] by draws z ~ q(z|x), weighted if values may be missing."""
        posterior = self._posterior(x, samples, seed)
        z, log_q = posterior.z, posterior.log_prob
        if self.table is None or not self.table.missing or samples == 1:
            return self.likelihood.predictive_mean(self.averaged_decoder(z), x)
        if log_q is None:
            gaussian = proposal.widened_gaussian(self.averaged_encoder, x)
            z = gaussian.sample(samples, seed=seed)
            log_q = gaussian.log_prob(z)
        outputs = self.averaged_decoder(z)
        log_p = likelihoods.log_likelihood(self.likelihood, outputs, x) + self.prior.log_prob(z)
        return self.likelihood.predictive_mean(outputs, x, tf.nn.softmax(log_p - log_q, 0))

    def log_likelihood(
        self,
        x: Any,
        temperatures: int = 100,
        chains: int = 32,
        leapfrog_steps: int = 10,
        verbose: bool = True,
    ) -> LogLikelihood:
        """Estimates log p(x) of each example in nats by annealed importance sampling.

            log_p = model.log_likelihood(x_test)
            print(log_p)  # the mean, its standard error and diagnostics
            log_p.values  # [examples]

        The estimate does not use the adversary. In expectation each value is a lower bound, which
        more temperatures tighten. The same x give the same values. For a table, the value is the
        log density of the values that are not missing, in the user's units.

        Args:
          x: [examples, *event], binary if the likelihood is; or a data frame.
          temperatures: number of temperatures on the path from the start of the chains, a
            Gaussian near q(z|x), to p(x, z).
          chains: chains for each example.
          leapfrog_steps: leapfrog steps of Hamiltonian Monte Carlo at each temperature.
          verbose: whether to show a progress bar.
        Raises:
          UserError: x does not fit the model, or a size is below 1.
        Source: Neal (2001); `likelihood_estimation.ais`.
        """
        sizes = {"temperatures": temperatures, "chains": chains, "leapfrog_steps": leapfrog_steps}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} is {size}; expected 1 or more")
        x = self._examples(x)
        if self.likelihood.binary and not np.isin(x, (0.0, 1.0)).all():
            raise UserError(
                "x has values between 0 and 1, but the likelihood is binary; expected 0 and 1; "
                "round x, or sample it: numpy.random.random(x.shape) < x, as float32"
            )
        return annealing.log_likelihood(self, x, **sizes, verbose=verbose)

    def _examples(self, x):
        """Returns x as float32 [batch, *event], with bytes scaled to [0, 1].

        x is checked unless it is a symbolic tensor, which has no values.
        """
        if not tf.is_symbolic_tensor(x):
            x = self.checked(x)
        return self._as_examples(x)

    def _as_examples(self, x):
        return checks.as_examples(x, self.event_shape, self.likelihood.support == "unit")
