"""Binarised MNIST with convolutional networks: needs an accelerator.

  avb-tf --config=mnist_conv:avb_flow --config.data.path=mnist.npz --mode=train_and_evaluate

`avb_flow` and all other methods but `avb_ac_paper` share networks and a schedule that are meant to
take ten minutes on one H100, evaluation included. `avb_ac_paper` is the authors' experiment, with
as many weights in every part of the networks (docs/reference/published.md compares them) and 2.5
million steps. With `:avb_flow-32`, or `:<method>-32`, there are 32 latents instead of 8. The tests
run only a few steps of narrow networks. The paper reports a log p(x) of -89.6 nats with 8 latents
and of -80.2 nats with 32.
"""

import ml_collections

from avb_tf import configuration


def get_config(variant: str = "avb_flow") -> ml_collections.ConfigDict:
    method, _, latents = variant.partition("-")
    make = _as_published if method == "avb_ac_paper" else _ten_minutes
    config = make(method, int(latents or 8))
    config.name = f"mnist_conv-{variant}"
    config.data.name = "mnist"
    config.log_every = 1000
    config.monitor.examples, config.monitor.samples = 16, 64  # the decoder is slow
    config.checkpoint_every = config.figures_every = 10_000
    return config


def _as_published(method, latent_dim):
    config = configuration.default(
        method, latent_dim=latent_dim, network="conv", filters=(64, 128, 256, 512),
        strides=(1, 1, 2, 2), width=300, bases=32 if latent_dim > 8 else 16, adversary_draws=1,
        noise_dim=64 if latent_dim > 8 else 32, ema_decay=0.0,
    )  # fmt: skip
    config.steps = 2_500_000
    config.optimizer.learning_rate = 5e-5
    config.optimizer.adversary_learning_rate = 1e-4
    config.optimizer.beta_1 = 0.5
    config.optimizer.decay = "none"
    config.optimizer.clip_norm = 0.0  # the authors do not clip
    return config


def _ten_minutes(method, latent_dim):
    config = configuration.default(
        method, latent_dim=latent_dim, network="conv", filters=(64, 128, 256), strides=(2, 2, 2),
        width=300, residual_blocks=2, bases=32, adversary_width=256, adversary_draws=4,
    )  # fmt: skip
    config.steps = 200_000
    config.precision = "mixed_bfloat16"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.adversary_learning_rate = 1.5e-3
    config.eval.subset, config.eval.gap = 500, 0
    config.eval.ais.chains = 16
    return config
