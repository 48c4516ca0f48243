"""The authors' networks on MNIST's shapes, for timing steps.

python main.py --config=configs/benchmark.py:mlp --mode=benchmark

`mlp` has dense networks, `conv` convolutional ones; both use the authors' noise bases and
factorised adversary.
"""

from avb_tf import configuration


def get_config(networks="mlp"):
    config = configuration.default(
        "avb_ac_paper", latent_dim=8, network="conv" if networks == "conv" else "dense", width=300,
        filters=(64, 128, 256, 512), strides=(1, 1, 2, 2), adversary_width=1024, adversary_depth=3,
        products=8192, adversary_draws=1,
    )  # fmt: skip
    config.name = f"benchmark-{networks}"
    config.data.name = "mnist"
    if networks == "conv":  # otherwise the monitor takes a minute of a twenty-minute epoch
        config.monitor.examples, config.monitor.samples = 16, 64
    return config
