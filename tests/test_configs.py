"""Tests that config files are valid, and that those for an accelerator train a few small steps."""

import keras
import numpy as np
import pytest

from avb_tf import checkpoints, configuration
from avb_tf.commands import train
from avb_tf.settings import methods
from configs import celeba, mnist, mnist_4x4, mnist_conv

NARROW = {
    "filters": (4, 8, 8, 8), "width": 16, "adversary_width": 16, "bases": 4, "basis_width": 8,
}  # fmt: skip


def shorten(config, steps=2):
    config.steps = config.log_every = config.checkpoint_every = steps
    config.figures_every, config.batch_size = 0, 4
    return config


@pytest.mark.parametrize("module", [celeba, mnist, mnist_4x4, mnist_conv])
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_a_valid_config(module, method):
    config = module.get_config(method)
    configuration.validate(config)
    assert config.name == f"{module.__name__.split('.')[-1]}-{method}"


def test_celeba_trains_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "faces").mkdir()
    for i in range(20):
        image = rng.integers(0, 256, (78, 64, 3), np.uint8)
        keras.utils.save_img(tmp_path / "faces" / f"{i}.png", image, scale=False)
    config = shorten(celeba.get_config())
    config.model.update(NARROW)
    config.data.path = str(tmp_path / "faces")
    train.train(config, tmp_path / "run")
    model = checkpoints.load(tmp_path / "run")
    assert int(model.step.value) == 2
    assert model.sample(2).shape == (2, 64, 64, 3)


@pytest.mark.parametrize("variant", ["avb_ac_paper", "avb_ac_paper-32", "avb_flow-32"])
def test_mnist_conv_trains_with_narrow_networks(variant, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x_train=rng.integers(0, 256, (30, 28, 28, 1), np.uint8))
    config = shorten(mnist_conv.get_config(variant))
    config.model.update(NARROW | {"products": 16, "adversary_depth": 1})
    config.model.filters = (4,) * len(config.model.strides)
    config.monitor.examples, config.monitor.samples = 2, 4
    config.data.name, config.data.path = "npz", str(tmp_path / "x.npz")
    train.train(config, tmp_path / "run")
    model = checkpoints.load(tmp_path / "run")
    assert int(model.step.value) == 2
    assert model.encode(rng.random((3, 28, 28, 1), np.float32)).shape == (
        1,
        3,
        int(variant.partition("-")[2] or 8),
    )
