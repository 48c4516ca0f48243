"""Properties that hold for every input, checked on examples that hypothesis searches."""

import json
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_probability import distributions as tfd

from avb_tf import configuration, contrast
from avb_tf.data import pipeline
from avb_tf.posteriors.sampler import Chart

# The same examples in every run; no deadline, because the first call of an operation is slow.
some = settings(max_examples=20, deadline=None, derandomize=True)
few = settings(some, max_examples=6)  # for charts, whose layers run eagerly
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 60)


def order(size, batch_size, seed, first_step, count, shuffle=True):
    """The indices in `count` batches from `first_step` on, [count, batch_size]."""
    indices = pipeline.training_indices(size, batch_size, seed, first_step, shuffle=shuffle)
    return np.stack(list(indices.take(count).as_numpy_iterator()))


@some
@given(SIZES, SIZES, SEEDS, st.booleans())
def test_every_epoch_visits_every_example_once(size, batch_size, seed, shuffle):
    epochs = 3
    count = -(-epochs * size // batch_size)
    visited = order(size, batch_size, seed, 0, count, shuffle).ravel()[: epochs * size]
    for epoch in visited.reshape(epochs, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


@some
@given(SIZES, SIZES, SEEDS, st.integers(0, 300))
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(size, batch_size, seed, step):
    whole = order(size, batch_size, seed, 0, step + 3)
    np.testing.assert_array_equal(order(size, batch_size, seed, step, 3), whole[step:])


@some
@given(st.integers(1, 6), SEEDS)
def test_whitening_is_undone_by_the_contrasts_scale_and_keeps_its_density(latent_dim, seed):
    rng = np.random.default_rng(seed)
    scale = np.tril(0.5 * rng.standard_normal((3, latent_dim, latent_dim)))
    scale += 2.0 * np.eye(latent_dim)
    loc, z = rng.standard_normal((3, latent_dim)), rng.standard_normal((5, 3, latent_dim))
    r = tfd.MultivariateNormalTriL(tf.constant(loc), tf.constant(scale))
    whitened = contrast.whiten(tf.constant(z), r).numpy()
    np.testing.assert_allclose(loc + np.einsum("bij,sbj->sbi", scale, whitened), z, atol=1e-9)
    # The density changes by the volume of the scale.
    standard = -0.5 * np.sum(whitened**2 + np.log(2.0 * np.pi), -1)
    volume = np.linalg.slogdet(scale)[1]
    np.testing.assert_allclose(standard - volume, r.log_prob(z), atol=1e-9)


@few
@given(st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_a_chart_has_its_inverse_and_its_volume(dim, steps, seed):
    chart = Chart(dim, steps, width=8)
    rng = np.random.default_rng(seed)
    z = tf.constant(rng.standard_normal((4, dim)), tf.float32)
    chart(z)  # creates the weights
    chart.set_weights([0.3 * rng.standard_normal(w.shape) for w in chart.get_weights()])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(z)
        *u, volume = tf.unstack(chart(z), axis=-1)
    jacobian = np.stack([tape.gradient(coordinate, z) for coordinate in u], 1)  # [n, dim, dim]
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], volume, atol=1e-3)
    np.testing.assert_allclose(chart.inverse(tf.stack(u, -1)), z, atol=1e-3)


FIELDS = {
    "steps": st.integers(1, 2**31 - 1),
    "optimizer.learning_rate": st.floats(1e-8, 1.0),
    "model.latent_dim": st.integers(1, 512),
    "model.filters": st.lists(st.integers(1, 512), min_size=1, max_size=4).map(tuple),
    "data.path": st.text(st.characters(codec="utf-8"), max_size=20),
    "tf32": st.booleans(),
    "profile_steps": st.just(()) | st.just((3, 8)),
}


@some
@given(st.fixed_dictionaries({}, optional=FIELDS), st.sampled_from(["vae", "avb_ac"]))
def test_a_config_survives_its_file(changes, method):
    config = configuration.default(method)
    config.update_from_flattened_dict(changes)
    with tempfile.TemporaryDirectory() as folder:
        configuration.save(config, Path(folder))
        loaded = configuration.load(Path(folder))
        configuration.check_same_run(loaded, Path(folder))
    assert loaded.to_dict() == config.to_dict()
    plain = configuration.resolve(config)
    assert configuration.resolve(loaded) == plain == json.loads(json.dumps(plain))
    assert configuration.digest(configuration.resolve(loaded)) == configuration.digest(plain)


@some
@given(st.fixed_dictionaries({}, optional={k: FIELDS[k] for k in ("data.path", "tf32")}))
def test_the_hash_of_a_config_ignores_where_and_how_fast_it_runs(changes):
    config = configuration.default("vae")
    before = configuration.digest(configuration.resolve(config))
    config.update_from_flattened_dict(changes)
    assert configuration.digest(configuration.resolve(config)) == before
