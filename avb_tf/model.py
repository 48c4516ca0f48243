"""The Keras model: one training step for every method.

A method is an encoder, a contrast and an adversary (none where q's density is known). Primal means
encoder and decoder, dual means the adversary, as in the paper's Algorithm 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import auxiliary, columns, flows, objectives, optimizers, parts, replicas, schedules
from avb_tf import contrast as contrasts
from avb_tf.data import checks
from avb_tf.data.table import Table, is_frame
from avb_tf.encoders import Encoder, Posterior
from avb_tf.errors import UserError
from avb_tf.likelihood_estimation import annealing
from avb_tf.likelihood_estimation.annealing import LogLikelihood
from avb_tf.likelihoods import Likelihood, log_likelihood
from avb_tf.networks import Adversary, Restorable
from avb_tf.training import Trained

# Imported so that Keras has registered every class that a saved model may hold.
__all__ = ["AVB", "auxiliary", "flows", "schedules"]

# Streams of randomness within a step. Noises come in pairs; further dual steps go on from _TRAIN.
_BINARISE, _TEST, _, _TRAIN = range(4)
_NOT_TAKEN = {"loss", "metrics", "weighted_metrics", "loss_weights"}  # arguments of `compile`


@keras.saving.register_keras_serializable("avb_tf")
class AVB(Restorable, Trained):
    """A latent-variable model trained by Adversarial Variational Bayes, or as a VAE.

    Trains on x [batch, *event] in [0, 1], unless the likelihood is of other numbers; labels that
    come with x are ignored. A binary likelihood binarises x anew at each step; x that is binary
    already stays as it is.

    Args:
      event_shape: shape of one example.
      encoder: (x, noise) -> `Posterior`.
      decoder: z [..., latent] -> likelihood parameters [..., *event, parameters].
      adversary: (condition, z) -> T, or None where the encoder knows its density.
      likelihood: a name in `likelihoods.LIKELIHOODS`, a `Likelihood`, or the `Table` of the
        rows x.
      contrast: a name in `contrast.CONTRASTS`; an adaptive one goes through the encoder's flow.
      condition: what the adversary reads beside z: "x", "posterior" for the encoder's own
        description of q(z|x) (`objectives.description`), or "none".
      draws: z per x that are decoded in a primal step.
      adversary_draws: z per x that the adversary sees, and in moments taken over draws; at least
        those that are decoded.
      adversary_steps: dual steps for each primal step, the last of them simultaneous with it.
      kl_annealing_steps: steps over which the weight of the KL rises from 0 to 1.
      ema_decay: averages the weights of encoder and decoder over about 1 / (1 - decay) steps, for
        everything but training; 0 does without.
      skip_non_finite: whether to skip a step with a non-finite loss or gradient. `skipped`
        counts these.
      seed: of all noise drawn in training.
      prior: p(z) is the standard normal; without one the likelihood is log p(x, z).
    Raises:
      UserError: parts that do not fit each other.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        encoder: Encoder,
        decoder: keras.Model,
        adversary: Adversary | None = None,
        likelihood: str | Likelihood | Table = "bernoulli",
        contrast: str = "full",
        condition: str = "posterior",
        draws: int = 1,
        adversary_draws: int = 1,
        adversary_steps: int = 1,
        kl_annealing_steps: int = 0,
        ema_decay: float = 0.0,
        skip_non_finite: bool = True,
        seed: int = 0,
        prior: bool = True,
        **kwargs,
    ):
        policy = keras.config.dtype_policy().name
        if policy in ("float64", "float16", "bfloat16"):
            raise UserError(
                f"Keras's dtype policy is '{policy}'; moments and densities are float32; expected "
                "'float32', 'mixed_float16' or 'mixed_bfloat16' in keras.config.set_dtype_policy"
            )
        super().__init__(autocast=False, **kwargs)  # the parts cast what they compute
        self.event_shape = tuple(event_shape)
        parts.check_names(likelihood, contrast, condition)
        # With a flow, an adaptive contrast has the moments of the base.
        contrasted = encoder.base if isinstance(encoder, flows.FlowEncoder) else encoder
        if contrasted.moments_from_draws:
            name, latent_dim = type(encoder).__name__, encoder.latent_dim
            learned = adversary is not None
            parts.check_draws(draws, adversary_draws, learned, contrast, latent_dim, name)
        self.likelihood = columns.likelihood_of(likelihood)
        self.contrast = contrasts.CONTRASTS[contrast]
        self.condition = condition
        self.draws = draws
        self.samples = draws if adversary is None else max(draws, adversary_draws)
        self.adversary_steps = adversary_steps
        self.kl_annealing_steps = kl_annealing_steps
        self.ema_decay = ema_decay
        self.skip_non_finite = skip_non_finite
        self.patience = 2**31 - 1  # skipped steps in a row that end training (`callbacks.guard`)
        self.seed = seed
        self.prior = contrasts.prior(encoder.latent_dim) if prior else None
        self.encoder, self.decoder, self.adversary = encoder, decoder, adversary
        self.averaged_encoder = _copy(encoder) if ema_decay else encoder
        self.averaged_decoder = _copy(decoder) if ema_decay else decoder
        # Counts steps, not an optimizer's iterations: noise must go on where it stopped.
        self.step = self._counter("step")
        self.skipped = self._counter("skipped")  # steps whose loss or gradient was no number
        self.skipped_in_a_row = self._counter("skipped_in_a_row")  # up to now
        self.rollbacks = self._counter("rollbacks")  # to a checkpoint, with lower learning rates
        names = ["elbo", "log_likelihood", "kl"]
        names += ["adversary_loss", "adversary_accuracy"] if adversary else []
        self.means = {name: keras.metrics.Mean(name=name) for name in names}
        self._create_weights()

    def _counter(self, name):
        # TensorFlow keeps int32 variables in the host's memory, where a step that XLA compiles for
        # a GPU cannot read them.
        return self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False, name=name,
            aggregation="only_first_replica",
        )  # fmt: skip

    def _create_weights(self):
        """Runs every part once to create all weights, and checks the shapes of the outputs."""
        # A fitted posterior, without a prior, is that of a single x.
        samples, batch = self.encoder.latent_dim + 1, 2 if self.prior is not None else 1
        x = tf.zeros([batch, *self.event_shape])
        noise = tf.zeros([samples, batch, self.encoder.noise_dim])
        for training in (False, True):
            encoder, decoder = self._networks(training)
            posterior = encoder(x, noise)
            parts.check_posterior(encoder, posterior, samples, batch)
            outputs = decoder(posterior.z)
        posterior = self.encoder(x, noise)
        if self.likelihood.parameters:  # 0: the likelihood reads any output
            expected = [samples, batch, *self.event_shape, self.likelihood.parameters]
            name = f"decoder {type(self.decoder).__name__}: output"
            parts.check_shape(name, outputs, expected, "[samples, batch, *event, parameters]")
        if self.adversary is None and posterior.log_prob is None:
            raise UserError(
                f"{type(self.encoder).__name__} does not know its density and there is no "
                "adversary to learn it. Pass an adversary, or use a GaussianEncoder."
            )
        if self.adversary is not None:
            q, r = contrasts.compare(posterior, self.contrast)
            if self.condition == "posterior" and q.columns is None:
                raise UserError(
                    f"condition 'posterior' needs an encoder that describes q(z|x), with a flow an "
                    f"adaptive contrast too; {type(self.encoder).__name__} gives no description "
                    "here. Use condition 'x'."
                )
            t = self.adversary(self.condition_of(x, q, r), q.z)
            name = f"adversary {type(self.adversary).__name__}: T"
            parts.check_shape(name, t, [samples, batch], "[samples, batch]")
        for weight, average in self._averages():
            average.assign(weight)
        self.built = True

    def _averages(self):
        """Pairs (weight, its running average)."""
        if not self.ema_decay:
            return []
        trained = self.encoder.weights + self.decoder.weights
        return zip(
            trained, self.averaged_encoder.weights + self.averaged_decoder.weights, strict=True
        )

    @property
    def primal_variables(self):
        """Trainable weights of encoder and decoder."""
        return self.encoder.trainable_variables + self.decoder.trainable_variables

    def get_config(self):
        """The constructor's arguments, and which layers are not to be trained."""
        layers = self._flatten_layers()
        frozen = [i for i, layer in enumerate(layers) if not layer.trainable]
        return {**super().get_config(), "frozen": frozen}

    @classmethod
    def from_config(cls, config):
        """The model that `get_config` described."""
        frozen = set(config.get("frozen", ()))
        model = super().from_config({k: v for k, v in config.items() if k != "frozen"})
        for i, layer in enumerate(model._flatten_layers()):
            if i in frozen:
                layer.trainable = False
        return model

    def compile(self, optimizer: Any = None, adversary_optimizer: Any = None, **kwargs):
        """Configures training.

        Args:
          optimizer: of encoder and decoder; Adam at 5e-4 unless given.
          adversary_optimizer: of the adversary, which must keep ahead; Adam at 1.5e-3 unless given.
          **kwargs: of `keras.Model.compile`, such as steps_per_execution.
        Raises:
          UserError: a loss or metrics, which a model that is its own loss has no use for.
        """
        for name in _NOT_TAKEN & kwargs.keys():
            if kwargs[name] is not None:
                raise UserError(
                    f"compile({name}=...) has no use here: the loss is -ELBO, and the metrics are "
                    f"its terms; leave {name} out"
                )
        super().compile(optimizer=optimizer or optimizers.Adam(5e-4), **kwargs)
        # Built here, each over its own weights: Keras would build one over all of them.
        self.optimizer.build(self.primal_variables)
        self.adversary_optimizer = None
        if self.adversary is not None:
            optimizer = keras.optimizers.get(adversary_optimizer or optimizers.Adam(1.5e-3))
            scaled = keras.optimizers.LossScaleOptimizer
            if isinstance(self.optimizer, scaled) and not isinstance(optimizer, scaled):
                optimizer = scaled(optimizer)  # as Keras scales the primal one in mixed_float16
            self.adversary_optimizer = optimizer
            self.adversary_optimizer.build(self.adversary.trainable_variables)

    def get_compile_config(self):
        """Both optimizers, for `.keras` files; None of a model that is not compiled."""
        if not self.compiled:
            return None
        both = {"optimizer": self.optimizer, "adversary_optimizer": self.adversary_optimizer}
        return {k: keras.saving.serialize_keras_object(v) for k, v in both.items()}

    def compile_from_config(self, config: dict[str, Any]):
        """Compiles as saved; the optimizers' state is loaded next."""
        self.compile(**{k: keras.saving.deserialize_keras_object(v) for k, v in config.items()})

    # The bound.

    def terms(
        self, x: np.ndarray | tf.Tensor, noise: np.ndarray | tf.Tensor, training: bool = False
    ) -> objectives.Terms:
        """The terms of the bound, with the averaged networks unless in training.

        Args:
          x: [batch, *event].
          noise: [samples, batch, noise_dim], standard normal.
          training: whether to use the trained networks, as a training step does.
        """
        encoder, decoder = self._networks(training)
        posterior = encoder(x, noise, training=training)
        return self._terms(x, posterior, decoder, noise.shape[0])[0]

    def _terms(self, x, posterior: Posterior, decoder, draws, contrast_noise=None):
        """Terms with `draws` of the posterior's z decoded, and T at z ~ r(z|x), [samples, batch].

        Both sides pass through the adversary in one product, its condition's branch once.
        """
        q, r = contrasts.compare(posterior, self.contrast)
        t, t_contrast = self._t(x, q, r, contrast_noise)
        outputs = decoder(posterior.z[:draws])
        reconstruction = log_likelihood(self.likelihood, outputs, x)
        after_flow = None if q is posterior else posterior
        contrast_kl = contrasts.divergence(r, self.prior, after_flow)
        return objectives.Terms(reconstruction, contrast_kl, t), t_contrast

    def _t(self, x, q: Posterior, r, contrast_noise=None) -> Any:
        """T at the z of q and, where r is N(0, I), at `contrast_noise`."""
        if self.adversary is None:
            return objectives.exact_t(q, r), None
        features = self.adversary.features(self.condition_of(x, q, r))
        z = contrasts.whiten(q.z, r)
        if contrast_noise is None:
            return self.adversary.logits(features, z), None
        return tf.split(self.adversary.logits(features, tf.concat([z, contrast_noise], 0)), 2)

    def _networks(self, training):
        if training:
            return self.encoder, self.decoder
        return self.averaged_encoder, self.averaged_decoder

    def condition_of(self, x: np.ndarray | tf.Tensor, posterior: Posterior, r: Any):
        """What the adversary reads beside z."""
        if self.condition == "none":
            return tf.zeros([tf.shape(x)[0], 1])  # the same for all
        return objectives.description(posterior, r) if self.condition == "posterior" else x

    def _noise(self, x, stream, dim):
        """Standard normal, [samples, batch, dim]."""
        shape = [self.samples, tf.shape(x)[0], dim]
        seed = replicas.stream_seed(self.seed, self.step.value, stream)
        return replicas.rows(tf.random.stateless_normal, shape, seed, axis=1)

    def noises(self, x: np.ndarray | tf.Tensor, stream: int):
        """The encoder's noise, and the whitened draws of the contrast."""
        return (
            self._noise(x, stream, self.encoder.noise_dim),
            self._noise(x, stream + 1, self.encoder.latent_dim),
        )

    def _inputs(self, data):
        x = self._as_examples(keras.utils.unpack_x_y_sample_weight(data)[0])
        if self.likelihood.binary:
            seed = replicas.stream_seed(self.seed, self.step.value, _BINARISE)
            uniform = replicas.rows(
                tf.random.stateless_uniform, tf.unstack(tf.shape(x)), seed, axis=0
            )
            x = tf.where(uniform < x, 1.0, 0.0 * x)  # a nan stays one, or nobody would know of it
        return x

    def _examples(self, x):
        """x as float32 [batch, *event], bytes scaled to [0, 1]; checked where it has a value."""
        if not tf.is_symbolic_tensor(x):
            x = self.checked(x)
        return self._as_examples(x)

    def _as_examples(self, x):
        return checks.as_examples(x, self.event_shape, self.likelihood.support == "unit")

    # Training.

    def train_step(self, data: Any):
        """Algorithm 1: dual steps, the last of them together with the primal step.

        The encoder does not move before the primal step, so x passes through it once. What each
        step does not share is its noise.
        """
        x, weights = self._inputs(data), _weights(data)
        dual = self.adversary.trainable_variables if self.adversary is not None else []
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in self.primal_variables])
            parameters = self.encoder.parameters(x, training=True)
            with tape.stop_recording():
                for i in range(1, self.adversary_steps if dual else 1):
                    self.dual_step(x, parameters, _TRAIN + 2 * i, weights)
            tape.watch([v.value for v in dual])
            noise, contrast_noise = self.noises(x, _TRAIN)
            posterior = self.encoder.draw(parameters, noise, training=True)
            terms, t_contrast = self._terms(x, posterior, self.decoder, self.draws, contrast_noise)
            kl = self._kl_weight() * objectives.mean(terms.kl, weights)
            log_likelihood = objectives.mean(terms.log_likelihood, weights)
            penalty = _penalty(self.encoder, self.decoder)
            loss: Any = self._share() * (kl - log_likelihood + penalty)
            loss = self.optimizer.scale_loss(loss)
            if dual:
                adversary_loss = self._adversary_loss(terms.t, t_contrast, weights)
        # T counts as fixed in the first, z in the second: neither's gradient is of the other.
        gradients = self._gradients(tape, loss, self.primal_variables)
        dual_gradients = self._gradients(tape, adversary_loss, dual) if dual else []
        applied = self._all_finite(x, loss, *gradients, *dual_gradients)
        if dual:
            self._apply(self.adversary_optimizer, dual_gradients, dual, applied)
        self._apply(self.optimizer, gradients, self.primal_variables, applied)
        self.average(applied)
        self.step.assign_add(1)
        skipped = tf.cast(~applied, tf.int64)
        self.skipped.assign_add(skipped)
        # As many as the guard's patience stay, or it would not see those that a call leaves behind.
        row = self.skipped_in_a_row.value
        over = applied & (row < self.patience)
        self.skipped_in_a_row.assign(tf.where(over, tf.zeros_like(row), row + skipped))
        self._record(terms, t_contrast, weights, applied)
        return self.get_metrics_result()

    def dual_step(
        self, x: np.ndarray | tf.Tensor, parameters: Any, stream: int, weights: Any = None
    ):
        """One step of the adversary, for the encoder's `parameters` of x."""
        noise, contrast_noise = self.noises(x, stream)
        posterior = self.encoder.draw(parameters, noise, training=True)
        variables = self.adversary.trainable_variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in variables])
            q, r = contrasts.compare(posterior, self.contrast)
            t_posterior, t_contrast = self._t(x, q, r, contrast_noise)
            loss = self._adversary_loss(t_posterior, t_contrast, weights)
        gradients = self._gradients(tape, loss, variables)
        applied = self._all_finite(x, loss, *gradients)
        self._apply(self.adversary_optimizer, gradients, variables, applied)

    def _gradients(self, tape, loss, variables):
        """Those of each variable or, in a compiled loop, of groups of them."""
        gradients = tape.gradient(loss, [v.value for v in variables])
        return optimizers.gathered(gradients) if self.loop_is_compiled else gradients

    def _apply(self, optimizer, gradients, variables, applied):
        if self.loop_is_compiled:
            optimizer.apply_where(applied, gradients)
        else:
            replicas.apply(optimizer, gradients, variables, applied)

    @property
    def loop_is_compiled(self) -> bool:
        """Whether a call of the training graph is one program of XLA (`loops`).

        Its steps select results and do not branch: at a condition in a program for a GPU the host
        waits for the device.
        """
        own = all(
            type(optimizer) is optimizers.Adam
            for optimizer in (self.optimizer, self.adversary_optimizer)
            if optimizer is not None
        )
        single = self.distribute_strategy.num_replicas_in_sync == 1
        return bool(self.jit_compile) and own and single and not self.run_eagerly

    def state_groups(self) -> list[list[keras.Variable]]:
        """All variables that a step may change; those of a group are updated together."""
        both = [o for o in (self.optimizer, self.adversary_optimizer) if o is not None]
        together = [variables for optimizer in both for variables in optimizer.states]
        together.append([average for _, average in self._averages()])
        groups = [group for variables in together for group in optimizers.grouped(variables)]
        known = {id(variable) for group in groups for variable in group}
        others = [self, *both, *self.means.values()]
        rest = {id(v): v for other in others for v in other.variables if id(v) not in known}
        return groups + [[variable] for variable in rest.values()]

    def _all_finite(self, x, *tensors) -> Any:
        """Whether a step may be applied: there is no inf and no nan in any replica's `tensors`.

        x is among them, because a relu may turn a NaN into a number, unless values may be missing.
        """
        tensors = tensors if self.table is not None and self.table.missing else (x, *tensors)
        return replicas.all_finite(*tensors) if self.skip_non_finite else tf.constant(True)

    def _adversary_loss(self, t_posterior, t_contrast, weights) -> Any:
        losses = objectives.adversary_loss(t_posterior, t_contrast)
        loss = self._share() * (objectives.mean(losses, weights) + _penalty(self.adversary))
        return self.adversary_optimizer.scale_loss(loss)  # float16 has no small gradients

    def average(self, applied: tf.Tensor):
        """Moves the averaged weights towards the trained ones, unless the step was skipped."""
        if not self.ema_decay:
            return
        weights, averages = zip(*self._averages(), strict=True)
        # A short memory at first, or the average would keep the initial weights for long.
        step = tf.cast(self.step.value, tf.float32)
        decay = tf.minimum(self.ema_decay, (1.0 + step) / (10.0 + step))
        if self.loop_is_compiled:
            share = tf.where(applied, 1.0 - decay, 0.0)
            for targets, group in zip(*map(optimizers.grouped, (weights, averages)), strict=True):
                before = optimizers.value(group)
                after = before + share * (optimizers.value(targets) - before)
                optimizers.assign(group, after)
        else:
            replicas.update(_move, weights, averages, tf.where(applied, decay, 1.0))

    def _share(self):
        """Optimizers sum gradients over replicas, so each contributes its share of the mean."""
        return 1.0 / self.distribute_strategy.num_replicas_in_sync

    def _kl_weight(self):
        if not self.kl_annealing_steps:
            return 1.0
        return tf.minimum(1.0, tf.cast(self.step + 1, tf.float32) / self.kl_annealing_steps)

    def _record(self, terms: objectives.Terms, t_contrast, weights=None, applied=True):
        reconstruction = tf.reduce_mean(terms.log_likelihood, 0)
        kl = tf.reduce_mean(terms.kl, 0)
        values = {"elbo": reconstruction - kl, "log_likelihood": reconstruction, "kl": kl}
        if self.adversary is not None:
            for name in ("adversary_loss", "adversary_accuracy"):
                of_draws = getattr(objectives, name)(terms.t, t_contrast)
                values[name] = tf.reduce_mean(of_draws, 0)
        for name, value in values.items():
            # Of a step that is skipped no number is left.
            value = tf.where(applied, value, 0.0)
            weight = tf.ones_like(value) if weights is None else weights
            self.means[name].update_state(value, tf.where(applied, weight, 0.0))

    def test_step(self, data: Any):
        """The bound, its terms and the adversary's state, by the averaged networks."""
        x = self._inputs(data)
        noise, contrast_noise = self.noises(x, _TEST)
        posterior = self.averaged_encoder(x, noise)
        terms = self._terms(x, posterior, self.averaged_decoder, self.samples, contrast_noise)
        self._record(*terms, _weights(data))
        return self.get_metrics_result()

    def get_metrics_result(self):
        """The running means since the epoch began, NaN where no step counted; loss is -ELBO."""
        means = {
            name: tf.where(mean.count.value > 0, mean.result(), np.nan)
            for name, mean in self.means.items()
        }
        return {"loss": -means["elbo"], **means}

    # Use. All by the averaged networks; the same seed gives the same draws.

    def call(self, x: np.ndarray | tf.Tensor, training: bool = False):
        """Reconstructions of x, [batch, *event]; `predict` calls this.

        In training they are of the trained networks and have new noise at every call, so that
        another model or a loop of one's own can train these.
        """
        if not training:
            return self.reconstruct(x)
        examples = self._examples(x)
        noise = tf.random.normal([1, tf.shape(examples)[0], self.encoder.noise_dim])
        posterior = self.encoder(examples, noise, training=True)
        return self.likelihood.predictive_mean(self.decoder(posterior.z), examples)

    def posterior(self, x: np.ndarray | tf.Tensor, samples: int = 1, seed: int = 0) -> Posterior:
        """Draws of q(z|x) with its moments and, if known, its density.

        Args:
          x: [batch, *event] in [0, 1].
          samples: draws for each x.
          seed: the same seed gives the same draws.
        """
        return self._posterior(self._examples(x), samples, seed)

    def _posterior(self, x, samples, seed):
        shape = [samples, tf.shape(x)[0], self.encoder.noise_dim]
        noise = tf.random.stateless_normal(shape, [seed, 0])
        return self.averaged_encoder(x, noise)

    def encode(self, x: np.ndarray | tf.Tensor, samples: int = 1, seed: int = 0):
        """z ~ q(z|x), [samples, batch, latent].

        Args:
          x: [batch, *event] in [0, 1].
          samples: draws for each x.
          seed: the same seed gives the same draws.
        """
        return self.posterior(x, samples, seed).z

    def log_ratios(self, x: np.ndarray | tf.Tensor, samples: int = 1, seed: int = 0):
        """T at z ~ q(z|x) and at z ~ r(z|x), each [samples, batch]; needs an adversary.

        Args:
          x: [batch, *event] in [0, 1].
          samples: draws for each x.
          seed: the same seed gives the same draws.
        """
        posterior = self.posterior(x, samples, seed)
        noise = tf.random.stateless_normal(tf.shape(posterior.z), [seed, 2])
        q, r = contrasts.compare(posterior, self.contrast)
        return self._t(self._examples(x), q, r, noise)

    def decode(self, z: np.ndarray | tf.Tensor):
        """E[x|z] for z [..., latent], [..., *event]; of a category the likeliest code."""
        return self.likelihood.mean(self.averaged_decoder(tf.convert_to_tensor(z, tf.float32)))

    def sample(self, count: int, seed: int | None = None):
        """E[x|z] for `count` draws of z from the prior, [count, *event].

        A seed gives the same draws at every call; without one every call draws anew.
        """
        seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1) if seed is None else seed
        shape = [count, self.encoder.latent_dim]
        return self.decode(tf.random.stateless_normal(shape, [seed, 1]))

    def reconstruct(self, x: Any, seed: int = 0, samples: int = 1) -> Any:
        """E[x'|z] at z ~ q(z|x), the mean over `samples` draws of z: [batch, *event].

        Where x is missing (NaN in a table that allows it) these are imputed values. A data frame
        gives a data frame, so `frame.fillna(model.reconstruct(frame, samples=100))` fills it.

        Args:
          x: [batch, *event], or a pandas data frame with the table's columns.
          seed: the same seed gives the same draws.
          samples: draws for each x.
        """
        examples = self._examples(x)
        outputs = self.averaged_decoder(self._posterior(examples, samples, seed).z)
        means = self.likelihood.predictive_mean(outputs, examples)
        if not is_frame(x):
            return means
        # Under the labels of x, or `fillna` would fill nothing where these are numbers.
        labels = {str(label): label for label in x.columns}
        return self.table.frame(means, x.index).rename(columns=labels)

    def log_likelihood(
        self,
        x: Any,
        temperatures: int = 100,
        chains: int = 32,
        leapfrog_steps: int = 10,
        verbose: bool = True,
    ) -> LogLikelihood:
        """log p(x) of each example in nats, by annealed importance sampling.

            log_p = model.log_likelihood(x_test)
            print(log_p)  # the mean, its standard error and diagnostics
            log_p.values  # [examples]

        The adversary has no part in it. In expectation each value is a lower bound, which more
        temperatures tighten. The same x give the same values. Of a table it is the log density of
        the values that are there, in the user's units.

        Args:
          x: [examples, *event], binary where the likelihood is; or a data frame.
          temperatures: from the start of the chains, a Gaussian near q(z|x), to p(x, z).
          chains: for each example.
          leapfrog_steps: of Hamiltonian Monte Carlo at each temperature.
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
                "x has values between 0 and 1, and the model is of binary x; expected 0 and 1; "
                "round x, or draw it: numpy.random.random(x.shape) < x, as float32"
            )
        return annealing.log_likelihood(self, x, **sizes, verbose=verbose)

    def save(self, filepath: str | Path, *args, **kwargs):
        """As `keras.Model.save`, in Keras's own format.

        Raises:
          UserError: the name asks for HDF5, which Keras cannot load such a model from.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise UserError(
                f"{filepath} asks for HDF5, from which Keras cannot load this model; expected a "
                "name that ends in .keras"
            )
        super().save(filepath, *args, **kwargs)

    def export(self, directory: str | Path, **settings: Any):
        """Writes `<directory>/<version>/` for TensorFlow Serving, in place of Keras's one endpoint.

        The settings are those of `serving.writing.export`. Needs the extra [serving].
        """
        from avb_tf.serving import writing

        return writing.export(self, directory, **settings)


def _weights(data):
    """The weights of the examples that Keras passes as `data`, float32 [batch], or None."""
    weights = keras.utils.unpack_x_y_sample_weight(data)[2]
    return None if weights is None else tf.cast(weights, tf.float32)


def _penalty(*parts) -> Any:
    """Sum of the losses that layers add, such as those of their regularizers; 0 without any."""
    return sum(tf.cast(loss, tf.float32) for part in parts for loss in part.losses)


def _move(strategy, weights, averages, decay):
    decay = strategy.experimental_local_results(decay)[0]
    for weight, average in zip(weights, averages, strict=True):
        strategy.extended.update(
            average.value,
            lambda average, weight: average.assign_add((1.0 - decay) * (weight - average)),
            args=(weight.value,),
        )


def _copy(network):
    """The same architecture with its own weights, none of them trainable."""
    copy = type(network).from_config(network.get_config())
    copy.trainable = False
    return copy
