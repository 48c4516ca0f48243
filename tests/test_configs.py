"""The configs for an accelerator: a few steps of each, with networks of their kind but narrow."""

import keras
import numpy as np
import pytest

from avb_tf import checkpoints, configuration, methods, training
from configs import celeba

NARROW = {"filters": (4, 8, 8, 8), "width": 16, "adversary_width": 16, "bases": 4, "basis_width": 8}


def shorten(config, steps=2):
    config.steps = config.log_every = config.checkpoint_every = steps
    config.figures_every, config.batch_size = 0, 4
    return config


@pytest.mark.parametrize("module", [celeba])
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
    training.train(config, tmp_path / "run")
    model = checkpoints.load(tmp_path / "run")
    assert int(model.step.value) == 2
    assert model.sample(2).shape == (2, 64, 64, 3)
