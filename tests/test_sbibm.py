"""Tests the densities of the benchmark's tasks against the reference draws."""

import numpy as np
import pytest
import tensorflow as tf

from avb_tf.posteriors import models
from tests.campaigns import sbibm


@pytest.fixture(params=sbibm.TASKS)
def task(request):
    if sbibm.path_of(request.param) is None:
        pytest.skip(f"no sbibm/{request.param}.npz in $AVB_TF_DATA_DIR or ../shared/data")
    return sbibm.TASKS[request.param](), sbibm.references(request.param)


def test_reference_draws_are_of_the_posterior_by_its_density(task):
    """Uses exact draws if the posterior has edges, else E[score] = 0 and E[u score] = -1."""
    (model, exact), data = task
    for i in (0, 7):
        y, reference = data["observations"][i], data["reference"][i].astype(np.float64)
        if exact is not None:
            draws = exact(y, 10_000, np.random.default_rng(i))
            for moment in (lambda x: x, lambda x: x**2, lambda x: x[:, :1] * x, np.abs):
                a, b = moment(draws), moment(reference)
                error = np.sqrt((a.var(0) + b.var(0)) / len(a))
                assert (np.abs(a.mean(0) - b.mean(0)) / error).max() < 4.5
            continue
        y = y.reshape(model.event_shape["y"])
        target = models.make(model, {"y": y})
        u = tf.constant(target.unconstrain({"theta": reference[:4000].astype(np.float32)}))
        with tf.GradientTape() as tape:
            tape.watch(u)
            density = target.log_density(u)
        score = tape.gradient(density, u).numpy().astype(np.float64)
        assert np.isfinite(density).all()
        for value in (score, u.numpy() * score + 1.0):
            assert (np.abs(value.mean(0)) / value.std(0) * np.sqrt(len(value))).max() < 4.5
