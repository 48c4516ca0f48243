"""Binarised MNIST with convolutional networks and the authors' schedule: needs an accelerator.

  avb-tf --config=mnist_conv:avb_ac_paper --config.data.path=mnist.npz

`avb_ac_paper` is the authors' experiment, with as many weights in every part of the networks
(docs/reference/published.md compares them). Other methods have convolutions with the same
numbers of filters. `:avb_ac_paper-32`, or `:<method>-32`, has 32 latents instead of 8. The tests
run only a few steps of narrow networks. The paper reports a log p(x) of -89.6 nats with 8 latents
and of -80.2 nats with 32.
"""

import ml_collections

from avb_tf import configuration


def get_config(variant: str = "avb_ac_paper") -> ml_collections.ConfigDict:
    method, _, latents = variant.partition("-")
    latent_dim = int(latents or 8)
    config = configuration.default(
        method, latent_dim=latent_dim, network="conv", filters=(64, 128, 256, 512),
        strides=(1, 1, 2, 2), width=300, bases=32 if latent_dim > 8 else 16, adversary_draws=1,
        ema_decay=0.0,
    )  # fmt: skip
    if method == "avb_ac_paper":
        config.model.noise_dim = 64 if latent_dim > 8 else 32
        config.optimizer.clip_norm = 0.0  # the authors do not clip
    config.name = f"mnist_conv-{variant}"
    config.data.name = "mnist"
    config.steps = 2_500_000
    config.optimizer.learning_rate = 5e-5
    config.optimizer.adversary_learning_rate = 1e-4
    config.optimizer.beta_1 = 0.5
    config.optimizer.decay = "none"
    config.log_every = 1000
    config.monitor.examples, config.monitor.samples = 16, 64  # the decoder is slow
    config.checkpoint_every = config.figures_every = 10_000
    return config
