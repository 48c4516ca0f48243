"""The Keras model: one training step for every method.

A method is an encoder, a contrast and an adversary; an encoder with a known density needs no
adversary. As in the paper's Algorithm 1, "primal" refers to encoder and decoder, and "dual" to the
adversary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from avb_tf import auxiliary, columns, flows, objectives, parts, replicas
from avb_tf import contrast as contrasts
from avb_tf.adversaries import Adversary
from avb_tf.data.table import Table
from avb_tf.encoders import Encoder, Posterior
from avb_tf.errors import UserError
from avb_tf.inference import Inference
from avb_tf.likelihoods import Likelihood, log_likelihood
from avb_tf.networks import Restorable
from avb_tf.training import optimizers, schedules

# Imported so that Keras has registered every class that a saved model may hold.
__all__ = ["AVB", "auxiliary", "flows", "schedules"]

# Streams of randomness within a step. `AVB.noises` takes two consecutive streams; further dual
# steps take the pairs of streams after the pair of _TRAIN.
_EXAMPLES, _TEST, _, _TRAIN = range(4)
_MOMENT_DRAWS = 64  # fewest draws whose moments define a contrast
_NOT_TAKEN = {"loss", "metrics", "weighted_metrics", "loss_weights"}  # arguments of `compile`


@keras.saving.register_keras_serializable("avb_tf")
class AVB(Restorable, Inference):
    """Latent-variable model that is trained by Adversarial Variational Bayes or as a VAE.

    The model trains on x [batch, *event] in [0, 1], or on the values of the likelihood's support.
    Labels that come with x are ignored. With a binary likelihood, each step binarises x at random
    again; x that is already binary does not change.

    Args:
      event_shape: shape of one example.
      encoder: function of (x, noise) that returns a `Posterior`.
      decoder: function of z [..., latent] that returns the likelihood's parameters
        [..., *event, parameters].
      adversary: function of (condition, z) that returns T, or None if the encoder gives the density
        of q.
      likelihood: a name in `likelihoods.LIKELIHOODS`, a `Likelihood`, or the `Table` of the
        columns if x are the rows of a table.
      contrast: a name in `contrast.CONTRASTS`. "diagonal" and "full", the adaptive contrasts, pass
        through the encoder's flow if it has one.
      condition: the adversary's input besides z: "x", "posterior" for the encoder's own
        description of q(z|x) (`objectives.description`), or "none".
      draws: z for each x that are decoded in a primal step.
      adversary_draws: z for each x that the adversary reads and that moments are estimated from. If
        it is below `draws`, `draws` are used.
      adversary_steps: dual steps for each primal step; the last one is simultaneous with it.
      kl_annealing_steps: steps in which the weight of the KL term rises from 0 to 1.
      ema_decay: the weights of encoder and decoder are averaged over about 1 / (1 - decay) steps.
        Everything but training uses the averages. 0 turns averaging off.
      skip_non_finite: whether to skip a step with a non-finite loss or gradient. `skipped`
        counts these steps.
      seed: seed of all noise drawn in training.
      prior: whether the model has the prior p(z), the standard normal. If not, the likelihood is
        log p(x, z).
      hide: share of a table's known values that each training step hides at random, so that the
        model learns to fill in what is missing. The terms of such a step are those of the values
        that are left.
    Raises:
      UserError: the parts do not fit each other.
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
        hide: float = 0.0,
        **kwargs: Any,
    ):
        policy = keras.config.dtype_policy().name
        if policy in ("float64", "float16", "bfloat16"):
            raise UserError(
                f"Keras's dtype policy is '{policy}'; moments and densities are float32; expected "
                "'float32', 'mixed_float16' or 'mixed_bfloat16' in keras.config.set_dtype_policy"
            )
        super().__init__(autocast=False, **kwargs)  # the parts cast their own inputs
        self.event_shape = tuple(event_shape)
        parts.check_names(likelihood, contrast, condition)
        # An adaptive contrast has the moments of q before the flow, which the base encoder gives.
        contrasted = encoder.base if isinstance(encoder, flows.FlowEncoder) else encoder
        if contrasted.moments_from_draws:
            name, latent_dim = type(encoder).__name__, encoder.latent_dim
            learned = adversary is not None
            parts.check_draws(draws, adversary_draws, learned, contrast, latent_dim, name)
        self.likelihood = columns.likelihood_of(likelihood)
        parts.check_hide(hide, self.table)
        self.hide = hide
        self.contrast = contrasts.CONTRASTS[contrast]
        self.condition = condition
        self.draws = draws
        self.samples = draws if adversary is None else max(draws, adversary_draws)
        self.adversary_steps = adversary_steps
        self.kl_annealing_steps = kl_annealing_steps
        self.ema_decay = ema_decay
        self.skip_non_finite = skip_non_finite
        self.patience = 2**31 - 1  # skipped steps in a row before `callbacks.guard` intervenes
        self.seed = seed
        self.prior = contrasts.prior(encoder.latent_dim) if prior else None
        self.encoder, self.decoder, self.adversary = encoder, decoder, adversary
        self.averaged_encoder = _copy(encoder) if ema_decay else encoder
        self.averaged_decoder = _copy(decoder) if ema_decay else decoder
        # Noise depends on this counter, so that a resumed run continues with the next step's noise.
        # An optimizer's iterations leave out skipped steps and restart with a new optimizer.
        self.step = self._counter("step")
        self.skipped = self._counter("skipped")  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = self._counter("skipped_in_a_row")  # the latest consecutive ones
        self.rollbacks = self._counter("rollbacks")  # returns to a checkpoint with lower rates
        names = ["elbo", "log_likelihood", "kl"]
        names += ["adversary_loss", "adversary_accuracy"] if adversary else []
        self.means = {name: keras.metrics.Mean(name=name) for name in names}
        self._create_weights()

    def _counter(self, name):
        # The counters are int64, because TensorFlow keeps int32 variables in the host's memory, and
        # a step that XLA compiles for a GPU cannot read them there.
        return self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False, name=name,
            aggregation="only_first_replica",
        )  # fmt: skip

    def _create_weights(self):
        """Runs every part once to create all weights, and checks the shapes of the outputs."""
        # A model without a prior is a fitted posterior, which has a single x.
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
        """Returns pairs (weight, its running average)."""
        if not self.ema_decay:
            return []
        trained = self.encoder.weights + self.decoder.weights
        return zip(
            trained, self.averaged_encoder.weights + self.averaged_decoder.weights, strict=True
        )

    @property
    def primal_variables(self) -> list[keras.Variable]:
        """Trainable weights of encoder and decoder."""
        return self.encoder.trainable_variables + self.decoder.trainable_variables

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the indices of the layers that are frozen."""
        layers = self._flatten_layers()
        frozen = [i for i, layer in enumerate(layers) if not layer.trainable]
        return {**super().get_config(), "frozen": frozen}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AVB":
        """Returns the model of a config that `get_config` returned."""
        frozen = set(config.get("frozen", ()))
        model = super().from_config({k: v for k, v in config.items() if k != "frozen"})
        for i, layer in enumerate(model._flatten_layers()):
            if i in frozen:
                layer.trainable = False
        return model

    def compile(
        self, optimizer: Any = None, adversary_optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Configures training.

        Args:
          optimizer: optimizer of encoder and decoder; by default Adam with learning rate 5e-4.
          adversary_optimizer: optimizer of the adversary; by default Adam with learning rate
            1.5e-3, which is higher because the adversary must keep ahead of the encoder.
          **kwargs: arguments of `keras.Model.compile`, such as steps_per_execution.
        Raises:
          UserError: a loss or metrics are given; the model defines its own.
        """
        for name in _NOT_TAKEN & kwargs.keys():
            if kwargs[name] is not None:
                raise UserError(
                    f"compile({name}=...) has no use here: the loss is -ELBO, and the metrics are "
                    f"its terms; leave {name} out"
                )
        super().compile(optimizer=optimizer or optimizers.Adam(5e-4), **kwargs)
        # Each optimizer is built here for its own weights; Keras would build one for all of them.
        self.optimizer.build(self.primal_variables)
        self.adversary_optimizer = None
        if self.adversary is not None:
            optimizer = keras.optimizers.get(adversary_optimizer or optimizers.Adam(1.5e-3))
            scaled = keras.optimizers.LossScaleOptimizer
            if isinstance(self.optimizer, scaled) and not isinstance(optimizer, scaled):
                optimizer = scaled(optimizer)  # Keras scales only the primal one in mixed_float16
            self.adversary_optimizer = optimizer
            self.adversary_optimizer.build(self.adversary.trainable_variables)

    def get_compile_config(self) -> dict[str, Any] | None:
        """Returns both optimizers for `.keras` files, or None if the model is not compiled."""
        if not self.compiled:
            return None
        both = {"optimizer": self.optimizer, "adversary_optimizer": self.adversary_optimizer}
        return {k: keras.saving.serialize_keras_object(v) for k, v in both.items()}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model with the saved optimizers; Keras loads their state afterwards."""
        self.compile(**{k: keras.saving.deserialize_keras_object(v) for k, v in config.items()})

    # The bound.

    def terms(
        self, x: np.ndarray | tf.Tensor, noise: np.ndarray | tf.Tensor, training: bool = False
    ) -> objectives.Terms:
        """Returns the terms of the bound.

        Args:
          x: [batch, *event].
          noise: [samples, batch, noise_dim], standard normal.
          training: whether to use the trained networks, as a training step does, or the averaged
            ones.
        """
        encoder, decoder = self._networks(training)
        posterior = encoder(x, noise, training=training)
        return self._terms(x, posterior, decoder, noise.shape[0])[0]

    def _terms(self, x, posterior: Posterior, decoder, draws, contrast_noise=None):
        """Returns the terms and T at z ~ r(z|x), [samples, batch]; the first `draws` z are decoded.

        The z of q and of r pass through the adversary in one call, and the condition passes once.
        """
        q, r = contrasts.compare(posterior, self.contrast)
        t, t_contrast = self._t(x, q, r, contrast_noise)
        outputs = decoder(posterior.z[:draws])
        reconstruction = log_likelihood(self.likelihood, outputs, x)
        after_flow = None if q is posterior else posterior
        contrast_kl = contrasts.divergence(r, self.prior, after_flow)
        return objectives.Terms(reconstruction, contrast_kl, t), t_contrast

    def _t(self, x, q: Posterior, r, contrast_noise=None) -> Any:
        """Returns T at the z of q and, in coordinates where r is N(0, I), at `contrast_noise`."""
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

    def condition_of(
        self, x: np.ndarray | tf.Tensor, posterior: Posterior, r: Any
    ) -> np.ndarray | tf.Tensor:
        """Returns the adversary's input besides z, [batch, ...].

        Args:
          x: [batch, *event].
          posterior: q(z|x) in the coordinates where T compares it (`contrast.compare`).
          r: the contrast, a Gaussian with batch [batch] and event [latent].
        """
        if self.condition == "none":
            return tf.zeros([tf.shape(x)[0], 1])  # a constant
        return objectives.description(posterior, r) if self.condition == "posterior" else x

    def _noise(self, x, stream, dim):
        """Draws standard normal noise, [samples, batch, dim], for this step and `stream`."""
        shape = [self.samples, tf.shape(x)[0], dim]
        seed = replicas.stream_seed(self.seed, self.step.value, stream)
        return replicas.rows(tf.random.stateless_normal, shape, seed, axis=1)

    def noises(self, x: np.ndarray | tf.Tensor, stream: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws the encoder's noise and whitened draws of the contrast for this step.

        Args:
          x: [batch, *event].
          stream: number of the first of two streams of randomness.
        Returns:
          (noise [samples, batch, noise_dim], draws [samples, batch, latent]).
        """
        return (
            self._noise(x, stream, self.encoder.noise_dim),
            self._noise(x, stream + 1, self.encoder.latent_dim),
        )

    def _inputs(self, data):
        x = self._as_examples(keras.utils.unpack_x_y_sample_weight(data)[0])
        if self.likelihood.binary:
            # 0 * NaN stays NaN, so the step is skipped
            x = tf.where(self._uniform(x) < x, 1.0, 0.0 * x)
        return x

    def _uniform(self, x):
        """Draws numbers from 0 to 1 of x's shape for this step."""
        seed = replicas.stream_seed(self.seed, self.step.value, _EXAMPLES)
        return replicas.rows(tf.random.stateless_uniform, tf.unstack(tf.shape(x)), seed, axis=0)

    # Training.

    def train_step(self, data: Any) -> dict[str, Any]:
        """Runs Algorithm 1: dual steps, the last of them together with the primal step.

        The encoder does not change before the primal step, so x passes through it only once. Each
        dual step draws its own noise.
        """
        x, weights = self._inputs(data), _weights(data)
        if self.hide:
            x = self.likelihood.hidden(x, self._uniform(x) < self.hide)
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
        # The primal loss has no gradient for the adversary, and the dual loss none for the encoder:
        # T is fixed in the first, and z in the second.
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
        # A good step does not reset a count that has reached the guard's patience, because the
        # guard looks only after a call of several steps.
        row = self.skipped_in_a_row.value
        over = applied & (row < self.patience)
        self.skipped_in_a_row.assign(tf.where(over, tf.zeros_like(row), row + skipped))
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            # A gradient that overflows because of the loss scale says nothing against the terms.
            applied = self._all_finite(x, terms.log_likelihood, terms.kl, terms.t)
        self._record(terms, t_contrast, weights, applied)
        return self.get_metrics_result()

    def dual_step(
        self, x: np.ndarray | tf.Tensor, parameters: Any, stream: int, weights: Any = None
    ) -> None:
        """Runs one step of the adversary.

        Args:
          x: [batch, *event].
          parameters: the result of `Encoder.parameters` for x.
          stream: number of the first of two streams of randomness, for the noise.
          weights: [batch], weights of the examples, or None.
        """
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
        """Returns the gradient of each variable or, in a compiled loop, of each group of them."""
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

        A skipped step in such a program selects the old values instead of branching, because at a
        branch in a program for a GPU the host waits for the device.
        """
        own = all(
            type(optimizer) is optimizers.Adam
            for optimizer in (self.optimizer, self.adversary_optimizer)
            if optimizer is not None
        )
        single = self.distribute_strategy.num_replicas_in_sync == 1
        return bool(self.jit_compile) and own and single and not self.run_eagerly

    def state_groups(self) -> list[list[keras.Variable]]:
        """Returns all variables that a step may change, in groups that are updated together."""
        both = [o for o in (self.optimizer, self.adversary_optimizer) if o is not None]
        together = [variables for optimizer in both for variables in optimizer.states]
        together.append([average for _, average in self._averages()])
        groups = [group for variables in together for group in optimizers.grouped(variables)]
        known = {id(variable) for group in groups for variable in group}
        others = [self, *both, *self.means.values()]
        rest = {id(v): v for other in others for v in other.variables if id(v) not in known}
        return groups + [[variable] for variable in rest.values()]

    def _all_finite(self, x, *tensors) -> Any:
        """Returns whether a step may be applied: no replica's `tensors` hold an inf or a NaN.

        x is checked too, because a relu may turn a NaN into a number. It is not checked for a table
        with missing values, where NaN is allowed.
        """
        tensors = tensors if self.table is not None and self.table.missing else (x, *tensors)
        return replicas.all_finite(*tensors) if self.skip_non_finite else tf.constant(True)

    def _adversary_loss(self, t_posterior, t_contrast, weights) -> Any:
        losses = objectives.adversary_loss(t_posterior, t_contrast)
        loss = self._share() * (objectives.mean(losses, weights) + _penalty(self.adversary))
        return self.adversary_optimizer.scale_loss(loss)  # small gradients underflow in float16

    def average(self, applied: tf.Tensor) -> None:
        """Moves the averaged weights towards the trained ones, unless the step was skipped."""
        if not self.ema_decay:
            return
        weights, averages = zip(*self._averages(), strict=True)
        # The decay is smaller at first; otherwise the average would keep the initial weights long.
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
        """Returns the factor of a replica's loss: optimizers sum gradients over the replicas."""
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
            # A skipped step does not count, and its values may be NaN.
            value = tf.where(applied, value, 0.0)
            weight = tf.ones_like(value) if weights is None else weights
            self.means[name].update_state(value, tf.where(applied, weight, 0.0))

    def test_step(self, data: Any) -> dict[str, Any]:
        """Computes the bound, its terms and the adversary's loss and accuracy.

        It uses the averaged networks.
        """
        x = self._inputs(data)
        noise, contrast_noise = self.noises(x, _TEST)
        posterior = self.averaged_encoder(x, noise)
        terms = self._terms(x, posterior, self.averaged_decoder, self.samples, contrast_noise)
        self._record(*terms, _weights(data))
        return self.get_metrics_result()

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns the means since the epoch began, with loss = -ELBO; NaN if no step counted."""
        means = {
            name: tf.where(mean.count.value > 0, mean.result(), np.nan)
            for name, mean in self.means.items()
        }
        return {"loss": -means["elbo"], **means}

    # Use. `Inference` has the methods that do not need the adversary.

    def log_ratios(
        self, x: np.ndarray | tf.Tensor, samples: int = 1, seed: int = 0
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns T at z ~ q(z|x) and at z ~ r(z|x), each [samples, batch].

        The second is None if the model has no adversary.

        Args:
          x: [batch, *event] in [0, 1], or in the likelihood's support.
          samples: draws for each x.
          seed: the same seed gives the same draws.
        """
        # An adaptive contrast may take its moments from these draws.
        count = max(samples, _MOMENT_DRAWS) if self.encoder.moments_from_draws else samples
        posterior = self.posterior(x, count, seed)
        noise = tf.random.stateless_normal(tf.shape(posterior.z), [seed, 2])
        q, r = contrasts.compare(posterior, self.contrast)
        t, t_contrast = self._t(self._examples(x), q, r, noise)
        return t[:samples], None if t_contrast is None else t_contrast[:samples]

    def save(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
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

    def export(self, directory: str | Path, **settings: Any) -> Path:
        """Exports the model to `<directory>/<version>/` for TensorFlow Serving.

        It replaces the method of Keras, whose exports have a single endpoint. The extra [serving]
        is needed.

        Args:
          directory: the directory of all versions.
          **settings: arguments of `serving.writing.export`.
        """
        from avb_tf.serving import writing

        return writing.export(self, directory, **settings)


def _weights(data):
    """Returns the weights of the examples in Keras's `data`, float32 [batch], or None."""
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
    """Returns a network of the same architecture with its own weights, none of them trainable."""
    copy = type(network).from_config(network.get_config())
    copy.trainable = False
    return copy
