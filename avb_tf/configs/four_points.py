"""The paper's toy example (Section 5.1, Figures 4 and 5): four points in R^4, two latents.

avb-tf --config=four_points:avb --mode=train_and_evaluate

Expect a mean log p(x) by quadrature of -1.393 to -1.395 nats with avb, in 2 minutes on two cores,
and of -1.568 nats with vae, within 1 minute (three seeds, `make seeds`).
"""

import ml_collections

from avb_tf import configuration


def get_config(method: str = "avb") -> ml_collections.ConfigDict:
    config = configuration.default(
        method, latent_dim=2, width=64, adversary_width=64, draws=4, adversary_draws=8,
        adversary_steps=2, noise_dim=8, bases=64, basis_width=64, basis_activation="relu",
    )  # fmt: skip
    if method == "avb":
        config.model.encoder = "joint_basis"
    config.name = f"four_points-{method}"
    config.data.name = "four_points"
    config.steps = 30_000
    config.batch_size = 64
    config.optimizer.learning_rate = 2e-3
    config.optimizer.adversary_learning_rate = 4e-3
    config.optimizer.beta_1 = 0.5
    config.log_every = config.checkpoint_every = 2500
    config.figures_every = 0
    config.threads_per_op = 1
    return config
