"""Tests masks and densities of flows by Jacobians, and the contrast that goes through a flow."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import avb_tf
from avb_tf.encoders import GaussianEncoder
from avb_tf.flows import MADE, FlowEncoder
from avb_tf.networks import DenseTrunk

BATCH, LATENT = 4, 5
X = np.random.default_rng(0).random((BATCH, 6), np.float32)


def randomise(layer):
    for i, weight in enumerate(layer.weights):
        weight.assign(0.5 * tf.random.stateless_normal(weight.shape, [i, 7]))


def make(steps=3, latent=LATENT):
    base = GaussianEncoder(keras.layers.Identity(), latent)
    encoder = FlowEncoder(DenseTrunk(8, 1), base, steps, width=16)
    encoder(X, noise_for(encoder, 2))
    return encoder


def noise_for(encoder, samples, seed=0):
    shape = (samples, BATCH, encoder.noise_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def jacobian(function, z):
    """Returns d function / dz at z [samples, batch, latent]: [samples * batch, latent, latent]."""
    flat = tf.reshape(z, [-1, z.shape[-1]])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(flat)
        value = tf.reshape(function(tf.reshape(flat, z.shape)), flat.shape)
        columns = tf.unstack(value, axis=-1)
    slopes = [tape.gradient(c, flat, unconnected_gradients="zero") for c in columns]
    return np.stack(slopes, 1)


@pytest.mark.parametrize(
    ("latent", "width", "depth"), [(5, 16, 2), (5, 12, 1), (2, 8, 3), (1, 4, 2)]
)
def test_an_output_reads_all_inputs_before_it_and_no_other(latent, width, depth):
    network = MADE(latent, 2, width, depth)
    rng = np.random.default_rng(1)
    z = rng.standard_normal((20, BATCH, latent), np.float32)
    context = rng.standard_normal((BATCH, width), np.float32)
    network(z, context)
    randomise(network)
    before = np.tri(latent, k=-1, dtype=bool)
    for kind in range(2):
        reads = np.abs(jacobian(lambda z: network(z, context)[kind], z)).max(0)  # noqa: B023
        assert (reads[~before] == 0).all()
        assert (reads[before] > 1e-3).all()


def test_the_context_reaches_every_output():
    network = MADE(LATENT, 2, 16, 2)
    z, context = tf.zeros([1, 50, LATENT]), tf.random.stateless_normal([50, 16], [0, 1])
    network(z, context)
    randomise(network)
    for output in network(z, context):
        assert (np.ptp(output, axis=1) > 0.1).all()


def test_at_first_the_flow_only_scales_a_gaussian():
    encoder = make(steps=2)
    noise = noise_for(encoder, 3)
    start = encoder.base(encoder.trunk(X), noise).z
    gate = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(encoder(X, noise).z, gate**2 * start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_density_is_that_of_the_change_of_variables(steps):
    encoder = make(steps)
    randomise(encoder)
    noise = noise_for(encoder, 10)
    posterior = encoder(X, noise)
    x = np.tile(X, (10, 1))  # a separate example for each draw
    flat = noise.reshape(1, -1, LATENT)
    slopes = jacobian(lambda noise: encoder(x, noise).z, flat)
    assert (np.abs(slopes[:, ~np.eye(LATENT, dtype=bool)]) > 0).any()
    log_noise = scipy.stats.norm.logpdf(flat[0].astype(np.float64)).sum(-1)
    expected = log_noise - np.linalg.slogdet(slopes.astype(np.float64))[1]
    np.testing.assert_allclose(np.ravel(posterior.log_prob), expected, rtol=1e-4, atol=1e-3)


def test_the_density_weighs_draws_to_an_integral_of_one():
    # E_q[p(z) / q(z|x)] = 1 for a p narrow enough to lie within q.
    encoder = make(2, latent=2)
    for i, weight in enumerate(encoder.weights):
        weight.assign_add(0.2 * tf.random.stateless_normal(weight.shape, [i, 7]))
    posterior = encoder(X, noise_for(encoder, 20_000))
    z = np.asarray(posterior.z, np.float64)
    for i in range(BATCH):
        p = scipy.stats.multivariate_normal(z[:, i].mean(0), 0.5 * np.cov(z[:, i].T))
        weights = np.exp(p.logpdf(z[:, i]) - posterior.log_prob[:, i])
        assert abs(weights.mean() - 1) < 5 * weights.std() / np.sqrt(len(weights))


def test_every_draw_is_of_its_own_noise_and_x():
    encoder = make()
    randomise(encoder)
    noise = noise_for(encoder, 6)
    samples, batch = [4, 0, 5, 1, 3, 2], [2, 0, 3, 1]
    whole, permuted = encoder(X, noise), encoder(X[batch], noise[samples][:, batch])
    for actual, of_all in ((permuted.z, whole.z), (permuted.log_prob, whole.log_prob)):
        expected = np.asarray(of_all)[samples][:, batch]
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    z = np.asarray(whole.z, np.float64)
    np.testing.assert_allclose(whole.mean, z.mean(0), rtol=1e-4, atol=1e-4)
    assert keras.ops.shape(whole.scale_tril) == (BATCH, LATENT, LATENT)


# An adaptive contrast that goes through the flow's steps with q.


def flowed(encoder, contrast, **changes):
    """Returns a model with fixed, nontrivial flow steps, and noise for many draws."""
    keras.utils.set_random_seed(0)
    sizes = dict(latent_dim=LATENT, width=8, flow_steps=3, flow_width=16, ema_decay=0.0)
    model = avb_tf.build("iaf", (6,), encoder=encoder, contrast=contrast, **sizes, **changes)
    for i, weight in enumerate(model.weights):
        if weight.trainable:
            weight.assign_add(0.2 * tf.random.stateless_normal(weight.shape, [i, 7]))
    shape = (20_000, BATCH, model.encoder.noise_dim)
    return model, np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.mark.parametrize("encoder", ["gaussian", "gaussian_full"])
@pytest.mark.parametrize("contrast", ["diagonal", "full"])
def test_the_bound_is_the_same_by_a_contrast_that_the_flow_carries(encoder, contrast):
    models, (noise, _) = zip(*(flowed(encoder, name) for name in (contrast, "prior")), strict=True)
    carried, by_prior = (
        np.asarray(model.terms(tf.constant(X), noise).kl, np.float64) for model in models
    )
    assert (by_prior.mean(0) > 0.5).all()
    error = by_prior.std(0) / len(noise) ** 0.5
    np.testing.assert_array_less(np.abs(carried.mean(0) - by_prior.mean(0)), 5 * error)


def test_the_divergence_of_a_carried_contrast_is_the_one_of_q_where_they_are_the_same():
    model, noise = flowed("gaussian_full", "full")
    terms = model.terms(tf.constant(X), noise)
    np.testing.assert_allclose(terms.t, np.zeros_like(terms.t), atol=2e-3)
    posterior = model.encoder(X, noise)
    log_p = scipy.stats.norm.logpdf(np.asarray(posterior.z, np.float64)).sum(-1)
    sampled = np.asarray(posterior.log_prob, np.float64) - log_p
    error = sampled.std(0) / len(noise) ** 0.5
    np.testing.assert_array_less(np.abs(sampled.mean(0) - terms.contrast_kl), 5 * error)


def test_the_adversary_sees_q_and_its_contrast_before_the_steps():
    sizes = dict(bases=4, basis_width=8, adversary_width=8)
    settings = dict(adversary="residual", condition="posterior", **sizes)
    (model, _), (other, _) = (flowed("joint_basis", "full", **settings) for _ in range(2))
    for step in other.encoder.steps:
        for weight in step.weights:
            weight.assign(-weight)  # another flow
    assert np.abs(model.encode(X, 6) - other.encode(X, 6)).max() > 0.1
    expected = model.log_ratios(X, 6)
    assert np.ptp(expected[0]) > 0.1
    for actual, ratio in zip(other.log_ratios(X, 6), expected, strict=True):
        np.testing.assert_allclose(actual, ratio, rtol=1e-5)


def test_moments_freeze_with_those_of_the_base():
    model, _ = flowed("joint_basis", "full", adversary="residual")
    assert model.encoder.base.frozen is None
    with model.encoder.freezing():
        assert model.encoder.base.frozen is not None
    assert model.encoder.base.frozen is None
