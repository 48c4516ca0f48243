"""scikit-learn's 8x8 digits with two latents: small enough for exact log-likelihoods.

avb-tf --config=digits:avb_ac --mode=train_and_evaluate

Expect a test log p(x) by quadrature of -22.54 to -22.60 nats with avb_ac, in 3 minutes on two
cores, and of -22.67 to -22.69 nats with vae, within 1 minute (three seeds, `make seeds`).
"""

import ml_collections

from avb_tf import configuration


def get_config(method: str = "avb_ac") -> ml_collections.ConfigDict:
    config = configuration.default(
        method, latent_dim=2, draws=4, adversary_draws=4, adversary_steps=3
    )
    config.name = f"digits-{method}"
    config.data.name = "digits"
    config.steps = 8000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.adversary_learning_rate = 3e-3
    config.log_every = config.checkpoint_every = 1000
    config.figures_every = 0
    config.threads_per_op = 1
    return config
