"""Tests the exact draws of the targets of amortised fits against their densities."""

import numpy as np
import pytest
import tensorflow as tf

from tests.campaigns.amortised import OWN
from tests.campaigns.amortised_targets import TARGETS

DRAWS = 20_000
POSITIVE = ("tau", "sigma", "size")


def log_density(target, values, y):
    """Returns log p(parameters, y); y is a set of rows if the target's data are."""
    if "rows" not in target.arguments:
        return target.model.log_prob(**values, y=y)
    prior = tf.add_n([target.model.model[name].log_prob(v) for name, v in values.items()])
    row = target.model.model["y"](values["sigma"], values["mu"])
    return prior + tf.add_n([row.log_prob(number) for number in y])


def test_the_campaign_names_all_targets():
    assert set(OWN) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_exact_draws_are_of_the_posterior_by_its_density(name):
    """Uses E[score] = 0 and E[(u - E u) score] = -1, in logs of positive parameters."""
    target = TARGETS[name]()
    y = target.observation(7)  # image: far from the edges of its prior
    draws = target.exact(y, DRAWS, np.random.default_rng(0))
    values = {k: tf.constant(v.astype(np.float32)) for k, v in draws.items()}
    with tf.GradientTape() as tape:
        tape.watch(values)
        density = log_density(target, values, y)
    assert np.isfinite(density).all()
    for k, score in tape.gradient(density, values).items():
        x, score = (np.reshape(v, [DRAWS, -1]).astype(np.float64) for v in (draws[k], score))
        if k in POSITIVE:
            x, score = np.log(x), score * x + 1.0
        for value in (score, (x - x.mean(0)) * score + 1.0):
            assert (np.abs(value.mean(0)) / value.std(0) * np.sqrt(DRAWS)).max() < 4.5, k
