"""Binarised MNIST, eight latents, dense networks (compare Section 5.2 of the paper).

  avb-tf --config=mnist:avb_flow --config.data.path=mnist.npz

Without a path, the file is read from $AVB_TF_DATA_DIR or downloaded. On one core, expect a log
p(x) by AIS, for the first 500 test images, of -95.7 to -96.1 nats with avb_flow, in 14 to 16
minutes, and of -96.9 to -97.3 nats with vae, in 7 minutes (three seeds, `make mnist`).
"""

import ml_collections

from avb_tf import configuration


def get_config(method: str = "avb_flow") -> ml_collections.ConfigDict:
    sizes = {}
    if method != "avb_ac_paper":  # which has the authors' own dense networks
        sizes = dict(width=300, residual_blocks=6, bases=32, adversary_width=256, adversary_draws=4)
    config = configuration.default(method, latent_dim=8, **sizes)
    config.name = f"mnist-{method}"
    config.data.name = "mnist"
    config.steps = 20_000
    config.threads_per_op = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.adversary_learning_rate = 3e-3
    config.log_every = 1000
    config.checkpoint_every = config.figures_every = 5000
    config.eval.ais.chains = 16  # enough for a BDMC gap below 0.1 nats
    return config
