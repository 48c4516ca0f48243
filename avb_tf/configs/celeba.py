"""Faces at 64 x 64 pixels, 64 latents, convolutional networks; needs an accelerator; not tested.

  avb-tf --config=celeba:avb_ac --config.data.path=img_align_celeba

The path is a folder of PNG or JPEG files. Batch size, learning rates, number of steps and filters
are from the authors' CelebA experiment, which uses the prior as the contrast (`:avb`).
"""

import ml_collections

from avb_tf import configuration


def get_config(method: str = "avb_ac") -> ml_collections.ConfigDict:
    config = configuration.default(
        method, latent_dim=64, likelihood="normal", network="conv", filters=(64, 128, 256, 512),
        strides=(2, 2, 2, 2), width=512, bases=64, adversary_width=512, adversary_draws=4,
    )  # fmt: skip
    if method == "avb":
        config.model.noise_dim = 128
    config.name = f"celeba-{method}"
    config.data.name = "images"
    config.data.image_size = 64
    config.steps = 2_500_000
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.adversary_learning_rate = 2e-4
    config.optimizer.beta_1 = 0.5
    config.monitor.examples, config.monitor.samples = 16, 64
    config.log_every = 1000
    config.checkpoint_every = config.figures_every = 10_000
    return config
