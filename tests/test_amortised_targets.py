"""Tests the exact draws of the targets of amortised fits against their densities."""

import numpy as np
import pytest
import scipy.integrate
import tensorflow as tf

from tests.campaigns import amortised_odes
from tests.campaigns.amortised import OWN, targets

TARGETS = targets()

DRAWS = 20_000
POSITIVE = ("tau", "sigma", "size", "alpha", "beta", "gamma", "delta")


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


@pytest.mark.parametrize(("interval", "steps"), [(17.0, 17), (2.1, 40)])
def test_the_integrator_agrees_with_that_of_scipy(interval, steps):
    """A predator and its prey with rates for which a period has about ten units of time."""
    slower = 2.1 / interval

    def rates(s):
        library = tf if isinstance(s, tf.Tensor) else np
        alpha, beta, gamma, delta = (slower * rate for rate in (0.8, 0.05, 0.8, 0.05))
        return library.stack([alpha - beta * library.exp(s[1]), delta * library.exp(s[0]) - gamma])

    start, times = np.log([[30.0], [1.0]]), interval * np.arange(amortised_odes.TIMES)
    exact = scipy.integrate.solve_ivp(
        lambda _, s: rates(s), times[[0, -1]], start[:, 0], t_eval=times, rtol=1e-9, atol=1e-9
    )
    states = amortised_odes.runge_kutta(rates, start, interval, steps)
    np.testing.assert_allclose(states[..., 0], exact.y.T, atol=0.02)
    start = tf.constant(start, tf.float32)
    in_graph = tf.function(amortised_odes.runge_kutta_in_graph)(rates, start, interval, steps)
    np.testing.assert_allclose(in_graph, states, atol=1e-3)
