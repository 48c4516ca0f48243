"""Tests encoders: moments against draws and numpy, densities against scipy."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from closed_forms import assert_moments

from avb_tf.encoders import (
    VARIANCE_FLOOR,
    BlackBoxEncoder,
    GaussianEncoder,
    JointBasisEncoder,
    NoiseBasisEncoder,
)
from avb_tf.networks import DenseTrunk

BATCH, LATENT = 4, 3
X = np.random.default_rng(0).random((BATCH, 6), np.float32)

ENCODERS = {
    "gaussian": lambda: GaussianEncoder(DenseTrunk(8, 1), LATENT),
    "gaussian_full": lambda: GaussianEncoder(DenseTrunk(8, 1), LATENT, full_covariance=True),
    "black_box": lambda: BlackBoxEncoder(DenseTrunk(8, 1), LATENT, 4, 16, 3),
    "injected": lambda: BlackBoxEncoder(DenseTrunk(8, 1), LATENT, 4, 16, 3, True),
    "noise_basis": lambda: NoiseBasisEncoder(DenseTrunk(8, 1), LATENT, 2, 4, 8),
    "published_basis": lambda: NoiseBasisEncoder(
        DenseTrunk(8, 1), LATENT, 2, 4, 8, "elu", "positive"
    ),
    "joint_basis": lambda: JointBasisEncoder(DenseTrunk(8, 1), LATENT, 4, 5, 8),
    "joint_basis_of_little_noise": lambda: JointBasisEncoder(DenseTrunk(8, 1), LATENT, 2, 5, 8),
}
GAUSSIAN = ["gaussian", "gaussian_full"]
NOISE_BASES = ["noise_basis", "published_basis"]
JOINT = ["joint_basis", "joint_basis_of_little_noise"]
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def noise_for(encoder, samples, seed=0):
    shape = (samples, BATCH, encoder.noise_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def fresh(name):
    keras.utils.set_random_seed(0)
    encoder = ENCODERS[name]()
    encoder(X, noise_for(encoder, 2))
    return encoder


def randomised(name):
    """Returns an encoder without zero weights, as after training."""
    encoder = fresh(name)
    for i, weight in enumerate(encoder.weights):
        weight.assign(0.5 * tf.random.stateless_normal(weight.shape, [i, 7]))
    return encoder


def covariance(posterior):
    scale = np.asarray(posterior.scale_tril, np.float64)
    return scale @ scale.transpose(0, 2, 1)


def dense(layer, inputs):
    kernel, bias = (np.asarray(w, np.float64) for w in layer.weights)
    return np.asarray(inputs, np.float64) @ kernel + bias


def relu(values):
    return np.maximum(values, 0.0)


def affine_residual(encoder):
    """Returns the largest residual of z after the best affine fit in the noise."""
    noise = noise_for(encoder, 200)
    z = np.asarray(encoder(X, noise).z)
    residuals = []
    for i in range(BATCH):
        design = np.concatenate([noise[:, i], np.ones((len(noise), 1))], 1)
        residuals.append(z[:, i] - design @ np.linalg.lstsq(design, z[:, i])[0])
    return np.abs(residuals).max()


@every_encoder
def test_shapes_are_those_of_the_contract(name):
    encoder = randomised(name)
    posterior = encoder(X, noise_for(encoder, 5))
    assert posterior.z.shape == (5, BATCH, LATENT)
    assert posterior.mean.shape == (BATCH, LATENT)
    assert posterior.scale_tril.shape == (BATCH, LATENT, LATENT)
    assert (posterior.log_prob is not None) == (name in GAUSSIAN)


@pytest.mark.parametrize("name", [*GAUSSIAN, *NOISE_BASES, *JOINT])
@pytest.mark.parametrize("training", [True, False])
def test_closed_form_moments_are_those_of_independent_draws(name, training):
    # In training the moments of the bases come from the batch, otherwise from 4096 Sobol points.
    encoder, draws = randomised(name), 100_000
    noise = noise_for(encoder, draws // BATCH if training else 1, seed=1)
    known = encoder(X, noise, training=training)
    z = encoder(X, noise_for(encoder, draws, seed=2)).z
    known_from = np.inf if name in GAUSSIAN else draws
    for i in range(BATCH):
        assert_moments(z[:, i], known.mean[i], covariance(known)[i], known_from)


@pytest.mark.parametrize("name", [*GAUSSIAN, *NOISE_BASES, *JOINT])
def test_outside_training_an_example_does_not_depend_on_its_batch_mates(name):
    encoder = randomised(name)
    noise = noise_for(encoder, 5)
    together, alone = encoder(X, noise), encoder(X[:1], noise[:1, :1])
    np.testing.assert_allclose(together.z[:1, :1], alone.z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together.mean[:1], alone.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together.scale_tril[:1], alone.scale_tril, rtol=1e-4, atol=1e-5)
    assert np.abs(alone.z[0] - alone.mean).max() > 0.01  # a single draw is not its own mean


@pytest.mark.parametrize("name", ["black_box", "injected"])
def test_a_black_box_has_the_moments_of_its_draws(name):
    encoder = randomised(name)
    posterior = encoder(X, noise_for(encoder, 50))
    z = np.asarray(posterior.z, np.float64)
    np.testing.assert_allclose(posterior.mean, z.mean(0), rtol=1e-5, atol=1e-5)
    expected = [np.cov(z[:, i].T, ddof=0) + VARIANCE_FLOOR * np.eye(LATENT) for i in range(BATCH)]
    np.testing.assert_allclose(covariance(posterior), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["black_box", "injected"])
def test_a_single_draw_of_a_black_box_has_the_floor_for_covariance(name):
    encoder = randomised(name)
    expected = [VARIANCE_FLOOR * np.eye(LATENT)] * BATCH
    single = encoder(X, noise_for(encoder, 1))
    np.testing.assert_allclose(covariance(single), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("gain", [1.0, 10.0, 100.0])
def test_the_moments_of_fewer_draws_than_latents_are_finite(gain):
    encoder = BlackBoxEncoder(DenseTrunk(8, 1), 8, 8, 16, 2)
    noise = noise_for(encoder, 4)
    encoder(X, noise)
    for i, weight in enumerate(encoder.weights):
        weight.assign(0.5 * tf.random.stateless_normal(weight.shape, [i, 7]))
    encoder.head.kernel.assign(gain * encoder.head.kernel)
    posterior = encoder(X, noise)
    variances = np.diagonal(covariance(posterior), axis1=1, axis2=2)
    np.testing.assert_allclose(variances, np.var(posterior.z, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_gaussian_density_is_that_of_scipy(name):
    encoder = randomised(name)
    posterior = encoder(X, noise_for(encoder, 20))
    for i in range(BATCH):
        q = scipy.stats.multivariate_normal(posterior.mean[i], covariance(posterior)[i])
        expected = q.logpdf(np.asarray(posterior.z)[:, i])
        np.testing.assert_allclose(posterior.log_prob[:, i], expected, rtol=1e-4, atol=1e-4)


def test_only_the_full_covariance_correlates_latents():
    off_diagonal = ~np.eye(LATENT, dtype=bool)
    diagonal, full = (
        covariance(encoder(X, noise_for(encoder, 2)))[:, off_diagonal]
        for encoder in map(randomised, GAUSSIAN)
    )
    assert (diagonal == 0).all()
    assert (full != 0).all()


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_scale_of_a_gaussian_is_positive_on_its_diagonal(name):
    encoder = randomised(name)
    scale = np.exp(dense(encoder.log_scale, encoder.trunk(X))) + np.sqrt(VARIANCE_FLOOR)
    diagonals = np.diagonal(encoder(X, noise_for(encoder, 2)).scale_tril, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonals, scale, rtol=1e-5)


@every_encoder
def test_z_is_a_function_of_noise_and_x(name):
    encoder = randomised(name)
    noise = noise_for(encoder, 2)
    z = np.asarray(encoder(X, noise).z)
    np.testing.assert_allclose(encoder(X, noise).z, z, rtol=1e-5, atol=1e-5)
    for other in [encoder(X, noise_for(encoder, 2, seed=1)).z, encoder(1.0 - X, noise).z]:
        assert (np.linalg.norm(other - z, axis=-1) > 0.01).all()


@every_encoder
def test_each_z_comes_of_its_own_noise_and_x(name):
    encoder = randomised(name)
    noise = noise_for(encoder, 6)
    posterior = encoder(X, noise)
    samples, batch = [4, 0, 5, 1, 3, 2], [2, 0, 3, 1]
    permuted = encoder(X[batch], noise[samples][:, batch])
    z = np.asarray(posterior.z)[samples][:, batch]
    np.testing.assert_allclose(permuted.z, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(permuted.mean, np.asarray(posterior.mean)[batch], atol=1e-5)
    np.testing.assert_allclose(covariance(permuted), covariance(posterior)[batch], atol=1e-4)


@pytest.mark.parametrize(("name", "reached"), [("black_box", False), ("injected", True)])
def test_injected_noise_reaches_z_past_the_first_layer(name, reached):
    encoder = randomised(name)
    encoder.from_noise[0].kernel.assign(tf.zeros_like(encoder.from_noise[0].kernel))
    z = encoder(X, noise_for(encoder, 20)).z
    assert (np.ptp(z, axis=0) > 0.1).all() == reached
    assert (np.ptp(z, axis=0) == 0).all() != reached


def test_the_black_box_is_a_dense_network_of_features_and_noise_side_by_side():
    encoder = randomised("black_box")
    noise = noise_for(encoder, 5)
    features = np.broadcast_to(encoder.trunk(X), (5, BATCH, 8))
    kernel = np.concatenate([encoder.from_features.kernel, encoder.from_noise[0].kernel])
    hidden = np.concatenate([features, noise], -1) @ kernel + encoder.from_features.bias
    for layer in [*encoder.hidden, encoder.head]:
        hidden = dense(layer, relu(hidden))
    np.testing.assert_allclose(encoder(X, noise).z, hidden, rtol=1e-4, atol=1e-5)


def elu(values):
    return np.where(values > 0, values, np.expm1(values))


@pytest.mark.parametrize("name", NOISE_BASES)
def test_noise_basis_is_the_sum_of_the_paper(name):
    encoder = randomised(name)
    noise, features = noise_for(encoder, 5), encoder.trunk(X)
    a = dense(encoder.coefficients, features).reshape(BATCH, 4, LATENT)
    activation = relu if name == "noise_basis" else elu
    if name == "published_basis":
        a = elu(a - 5.0) + 1.0
    expected = dense(encoder.mean, features)
    weights = list(zip(encoder.kernels, encoder.biases, strict=True))
    for m, noise_m in enumerate(np.split(noise, 4, -1)):
        v = noise_m
        for i, (kernels, biases) in enumerate(weights):
            v = (activation(v) if i else v) @ kernels[m] + biases[m]
        expected = expected + a[:, m] * v
    np.testing.assert_allclose(encoder(X, noise).z, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", JOINT)
def test_columns_of_the_joint_basis_make_z_and_its_covariance_of_the_features(name):
    encoder = randomised(name)
    noise = noise_for(encoder, 40)
    posterior = encoder(X, noise, training=True)
    first, second = encoder.stack.hidden
    basis = dense(encoder.basis, np.tanh(dense(second, np.tanh(dense(first, noise)))))
    v = np.concatenate([noise, basis], -1)
    v -= v.mean((0, 1))
    columns = np.asarray(posterior.columns, np.float64)
    z = posterior.mean + np.einsum("bij,sbj->sbi", columns, v)
    np.testing.assert_allclose(posterior.z, z, rtol=1e-4, atol=1e-5)
    v_covariance = np.cov(v.reshape(-1, v.shape[-1]).T, ddof=0)
    expected = columns @ v_covariance @ columns.transpose(0, 2, 1)
    floor = VARIANCE_FLOOR * (1.0 + np.trace(expected, axis1=1, axis2=2))
    expected += floor[:, np.newaxis, np.newaxis] * np.eye(LATENT)
    np.testing.assert_allclose(covariance(posterior), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", JOINT)
def test_the_joint_basis_is_gaussian_at_first_and_not_for_ever(name):
    assert affine_residual(fresh(name)) < 1e-5
    assert affine_residual(randomised(name)) > 0.1


def test_the_joint_basis_starts_with_independent_latents_of_the_scale_that_it_says():
    encoder = fresh("joint_basis")
    posterior = encoder(X, noise_for(encoder, 2))
    scale = np.exp(dense(encoder.log_scale, encoder.trunk(X)))
    expected = scale[:, :, np.newaxis] * np.eye(LATENT, posterior.columns.shape[-1])
    np.testing.assert_allclose(posterior.columns, expected, rtol=1e-5)


def test_sobol_points_of_a_process_that_can_open_no_more_files():
    program = """
import os, resource
from avb_tf import encoders
count = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
points = encoders.sobol_normal(256, 2)
print(*points.mean(0), *points.std(0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    moments = np.array(done.stdout.split(), float)
    np.testing.assert_allclose(moments, [0.0, 0.0, 1.0, 1.0], atol=0.05)
