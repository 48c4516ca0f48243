"""A table of your own in a CSV or Parquet file: real numbers, counts and categories.

avb-tf --config=table:avb_ac --config.data.path=patients.csv \\
  --config.data.columns=visits=poisson,city=category,id=skip --config.data.missing=True \\
  --config.model.hide=0.2 --mode=train_and_evaluate
"""

import ml_collections

from avb_tf import configuration


def get_config(method: str = "avb_ac") -> ml_collections.ConfigDict:
    config = configuration.default(
        method, latent_dim=4, likelihood="table", width=64, adversary_width=64, draws=4,
        adversary_draws=8,
    )  # fmt: skip
    config.name = f"table-{method}"
    config.data.name = "table"
    config.steps = 5000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.adversary_learning_rate = 3e-3
    config.log_every = config.checkpoint_every = 500
    config.figures_every = 0
    config.threads_per_op = 1
    return config
