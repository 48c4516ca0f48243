"""The authors' networks for images of MNIST's shape, for timing steps.

avb-tf --config=benchmark:mlp --mode=benchmark

`mlp` has dense networks, `conv` convolutional ones; both use the authors' noise bases and
factorised adversary.
"""

import ml_collections

from avb_tf import configuration


def get_config(networks: str = "mlp") -> ml_collections.ConfigDict:
    network = "conv" if networks == "conv" else "dense"
    config = configuration.default("avb_ac_paper", latent_dim=8, network=network)
    config.name = f"benchmark-{networks}"
    config.data.name = "mnist"
    if networks == "conv":  # the default takes a minute of a twenty-minute epoch
        config.monitor.examples, config.monitor.samples = 16, 64
    return config
