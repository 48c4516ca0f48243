import keras
import numpy as np
import pytest
import tensorflow as tf

from avb_tf.errors import UserError
from avb_tf.training.optimizers import Adam

SHAPES = [(3, 4), (4,), (4, 2)]


def run(cls, rate, steps=20, **settings):
    rng = np.random.default_rng(0)
    weights = [keras.Variable(rng.normal(size=s).astype(np.float32)) for s in SHAPES]
    optimizer = cls(rate, **settings)
    optimizer.build(weights)
    for _ in range(steps):
        gradients = [tf.constant(rng.normal(size=s), tf.float32) for s in SHAPES]
        optimizer.apply(gradients, weights)
    return [w.numpy() for w in weights + optimizer.variables]


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
@pytest.mark.parametrize(
    "rate", [1e-2, keras.optimizers.schedules.CosineDecay(1e-2, 15)], ids=["constant", "schedule"]
)
def test_steps_are_those_of_keras(rate, clip):
    settings = {"beta_1": 0.5, "global_clipnorm": clip}
    mine, keras_own = (run(cls, rate, **settings) for cls in (Adam, keras.optimizers.Adam))
    for a, b in zip(mine, keras_own, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_it_compiles_under_xla():
    weight = keras.Variable(np.ones([2], np.float32))
    optimizer = Adam(0.1)
    optimizer.build([weight])
    tf.function(lambda g: optimizer.apply([g], [weight]), jit_compile=True)(
        tf.constant([1.0, -1.0])
    )
    np.testing.assert_allclose(weight.numpy(), [0.9, 1.1], rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"clipnorm": 1.0}, {"clipvalue": 0.5}, {"amsgrad": True}, {"weight_decay": 1e-2}]
)
def test_settings_that_it_would_ignore_are_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"Adam got {name}=.*keras.optimizers.Adam"):
        Adam(1e-3, **settings)


def test_its_config_makes_it_anew():
    made = Adam(1e-3, 0.5, global_clipnorm=2.0)
    again = Adam.from_config(made.get_config())
    assert again.get_config() == made.get_config()
