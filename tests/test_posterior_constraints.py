"""Tests bijectors of constrained parameters against autodiff and closed forms."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, special, stats
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from avb_tf import UserError
from avb_tf.posteriors import bijectors, constraints, models, start
from avb_tf.posteriors.functions import value_and_gradient

EYE = np.eye(3, dtype=np.float64)


def pulled_back(distribution, bijector, u):
    """Returns the log density of the unconstrained parameter, [n]."""
    ranks = bijector.inverse_event_ndims(distribution.event_shape.rank)
    volume = bijector.forward_log_det_jacobian(u, event_ndims=ranks)
    return distribution.log_prob(bijector.forward(u)) + volume


@pytest.mark.parametrize(
    ("distribution", "edge"),
    [
        (tfd.LKJ(2, np.float64(1.0)), 30.0),
        (tfd.LKJ(2, np.float64(2.5)), 30.0),
        (tfd.CholeskyLKJ(2, np.float64(1.5)), 30.0),
        (tfd.Dirichlet(np.array([2.0, 3.0])), 60.0),
        (tfd.WishartTriL(np.float64(5.0), scale_tril=EYE[:1, :1]), 60.0),
        (tfd.TruncatedNormal(np.float64(0.0), np.float64(1.0), np.float64(0.5), np.inf), 60.0),
        (tfd.MixtureSameFamily(
            tfd.Categorical(probs=np.array([0.3, 0.7])), tfd.Gamma(np.array([2.0, 5.0]), 1.0)
        ), 60.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_a_density_of_one_unconstrained_number_integrates_to_one(distribution, edge):
    bijector = constraints.checked("x", distribution)
    vector = bijector.forward_min_event_ndims > 0
    u = np.linspace(-edge, edge, 40_001)
    log_density = pulled_back(distribution, bijector, u[:, np.newaxis] if vector else u)
    density = np.nan_to_num(np.exp(log_density))
    assert integrate.simpson(density, x=u) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize(
    ("make", "lower"),
    [
        (bijectors.correlation, -1),
        (bijectors.covariance, 0),
        (bijectors.cholesky_factor, 0),
        (bijectors.simplex, None),
    ],
)
def test_log_determinants_are_those_of_automatic_differentiation(make, lower, size):
    free = size if lower is None else size * (size + 1 + 2 * lower) // 2
    u = tf.constant(np.random.default_rng(size).normal(size=free))
    bijector = make()
    with tf.GradientTape() as tape:
        tape.watch(u)
        value = bijector.forward(u)
    jacobian = tape.jacobian(value, u).numpy()
    jacobian = jacobian[:-1] if lower is None else jacobian[np.tril_indices(size, lower)]
    stated = bijector.forward_log_det_jacobian(tf.identity(u), event_ndims=1)
    assert float(stated) == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-8)
    np.testing.assert_allclose(bijector.inverse(tf.identity(value)), u, atol=1e-6)


def test_tfps_own_bijectors_of_these_are_still_wrong():
    """When this test fails, TFP's bijectors are right and ours can be removed."""
    lkj = tfd.LKJ(3, np.float64(1.0))
    with pytest.raises(UserError, match="the density is not that of its own draws"):
        constraints._check_volume("R", lkj, lkj.experimental_default_event_space_bijector())
    wishart = tfd.WishartTriL(5.0, scale_tril=tf.eye(2))
    with pytest.raises(UserError, match="does not give its own draws back"):
        constraints._check_inverse(
            "P", wishart, wishart.experimental_default_event_space_bijector()
        )
    with pytest.raises(TypeError, match="newshape"):
        tfd.Dirichlet([1.0, 1.0]).experimental_default_event_space_bijector()
    # The last probability at u = 30 is 9e-14, which float32 has.
    assert float(tfb.IteratedSigmoidCentered().forward(tf.constant([30.0]))[1]) == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_probabilities_keep_their_digits(dtype):
    u = np.array([[60.0, 0.0], [-60.0, 0.0], [0.0, 1000.0], [-40.0, -50.0]], dtype)
    padded = np.concatenate([u.astype(np.float64), np.zeros([4, 1])], 1)
    logs = padded - special.logsumexp(padded, axis=1, keepdims=True)
    bijector = bijectors.simplex()
    with np.errstate(under="ignore"):
        exact = np.exp(logs).astype(dtype)
    np.testing.assert_allclose(bijector.forward(tf.constant(u)), exact, rtol=2e-5, atol=1e-37)
    stated = bijector.forward_log_det_jacobian(tf.constant(u), event_ndims=1)
    np.testing.assert_allclose(stated, logs.sum(1), rtol=1e-6)
    p = tf.constant(exact[:2])
    np.testing.assert_allclose(bijector.inverse(p), u[:2], rtol=1e-5, atol=1e-4)
    volume = bijector.inverse_log_det_jacobian(p, event_ndims=1)
    np.testing.assert_allclose(volume, -logs[:2].sum(1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_correlations_are_never_singular(size, dtype):
    lkj = tfd.LKJ(size, dtype(1.0))
    bijector = constraints.of_distribution(lkj)
    rng = np.random.default_rng(size)
    u = tf.constant(rng.normal(size=[200, size * (size - 1) // 2]) * 50.0, dtype)

    def density(u):
        return lkj.log_prob(bijector.forward(u)) + bijector.forward_log_det_jacobian(u, 1)

    with tf.GradientTape() as tape:
        tape.watch(u)
        far = density(u)
    gradient = tape.gradient(far, u)  # it inverts the matrix, which raises an error if it cannot
    assert np.isfinite(far).all()
    assert np.isfinite(gradient).all()
    farther = density(2.0 * u)
    assert np.mean(farther < far) > 0.99  # the posterior is proper


@pytest.mark.parametrize("dim", [3, 10])
@pytest.mark.parametrize("concentration", [0.1, 1.0])
def test_a_sparse_dirichlet_and_counts_have_the_closed_forms(dim, concentration):
    counts = np.zeros(dim, np.float32)
    counts[:2] = 7.0, 2.0
    prior = np.full(dim, concentration, np.float32)
    joint = tfd.JointDistributionNamed(
        {"p": tfd.Dirichlet(prior), "y": lambda p: tfd.Multinomial(9.0, probs=p)}
    )
    target = models.make(joint, {"y": counts})
    begun = start.find(target)
    after = prior + counts
    exact = (
        special.gammaln(10.0) - special.gammaln(counts + 1.0).sum()
        + special.gammaln(prior.sum()) - special.gammaln(after.sum())
        + (special.gammaln(after) - special.gammaln(prior)).sum()
    )  # fmt: skip
    value, error = begun.log_evidence
    assert abs(value - exact) < max(4.0 * error, 0.02)
    u, _ = begun.place(begun.z, target.dtype)
    p = target.constrain(u)["p"].numpy()
    np.testing.assert_allclose(p.mean(0), after / after.sum(), atol=0.03)


def test_moments_of_priors_by_quadrature_and_by_draws():
    """Tests E[R_12] of LKJ(2, 1) with data and E[P] of a Wishart, by unconstrained densities."""
    x = np.array([[1.0, 0.8], [-0.5, -0.9], [0.3, 0.2]])
    joint = tfd.JointDistributionNamed(
        {
            "R": tfd.LKJ(2, np.float64(1.0)),
            "y": lambda R: tfd.Sample(
                tfd.MultivariateNormalTriL(np.zeros(2), tf.linalg.cholesky(R)), 3
            ),
        }
    )
    target = models.make(joint, {"y": x})
    u = np.linspace(-9.0, 9.0, 20_001)[:, np.newaxis]
    log_density = target.log_density(tf.constant(u)).numpy()
    correlation = target.constrain(tf.constant(u))["R"].numpy()[:, 0, 1]
    weights = np.exp(log_density)
    evidence = integrate.simpson(weights, x=u[:, 0])
    assert np.log(evidence) == pytest.approx(-5.996, abs=1e-3)
    mean = integrate.simpson(weights * correlation, x=u[:, 0]) / evidence
    assert mean == pytest.approx(0.672, abs=1e-3)


@pytest.mark.parametrize(
    "distribution",
    [
        tfd.Sample(tfd.Dirichlet(np.array([0.7, 1.0, 2.0])), 2),
        tfd.Sample(tfd.LKJ(3, np.float64(1.0)), 2),
        tfd.Independent(tfd.WishartTriL(np.float64(5.0), scale_tril=np.stack([EYE, EYE])), 1),
        tfd.TransformedDistribution(
            tfd.WishartTriL(np.float64(5.0), scale_tril=EYE, input_output_cholesky=True),
            tfb.Chain([tfb.CholeskyOuterProduct(), tfb.CholeskyToInvCholesky()]),
        ),
        tfd.WishartTriL(np.float64(5.0), scale_tril=EYE, input_output_cholesky=True),
        tfd.LKJ(3, np.float64(2.0), input_output_cholesky=True),
        tfd.CholeskyLKJ(4, np.float64(0.7)),
        tfd.ExpRelaxedOneHotCategorical(np.float64(0.5), probs=np.array([0.2, 0.3, 0.5])),
        tfd.TransformedDistribution(tfd.Dirichlet(np.ones(3)), tfb.Scale(np.float64(2.0))),
        tfd.WishartLinearOperator(np.float64(4.0), tf.linalg.LinearOperatorLowerTriangular(EYE)),
        tfd.RelaxedOneHotCategorical(np.float64(0.5), probs=np.array([0.2, 0.8])),
        tfd.Blockwise([tfd.Normal(np.float64(0.0), 1.0), tfd.Gamma(np.float64(2.0), 1.0)]),
        tfd.TruncatedNormal(np.float64(0.0), np.float64(1.0), -np.inf, np.float64(0.5)),
        tfd.LKJ(5, np.float64(2.0)),
        tfd.LKJ(20, np.float64(2.0)),
        tfd.Dirichlet(np.ones(100)),
    ],
    ids=lambda distribution: distribution.name,
)
def test_the_density_of_an_unconstrained_prior_is_that_of_its_draws(distribution):
    """Any density satisfies E[score] = 0 and E[u score] = -1 in each coordinate."""
    bijector = constraints.checked("x", distribution)
    draws = distribution.sample(4000, seed=(0, 1))
    u = np.asarray(bijector.inverse(draws))
    flat = u.reshape(len(u), -1)
    score = value_and_gradient(
        lambda v: pulled_back(distribution, bijector, tf.reshape(v, [-1, *u.shape[1:]])),
        tf.constant(flat),
    )[1].numpy()
    kept = np.isfinite(flat).all(1) & np.isfinite(score).all(1)
    flat, score = flat[kept], score[kept]
    error = 5.0 / np.sqrt(len(flat))
    np.testing.assert_array_less(np.abs(score.mean(0)), error * score.std(0))
    virial = flat * score
    np.testing.assert_array_less(np.abs(virial.mean(0) + 1.0), error * virial.std(0))


@pytest.mark.parametrize(
    ("distribution", "match"),
    [
        (tfd.VonMisesFisher([1.0, 0.0, 0.0], 2.0), "lies on a sphere"),
        (tfd.SphericalUniform(3), "lies on a sphere"),
        (tfd.Poisson(3.0), "no default bijector"),
        (tfd.Deterministic(1.0), "fails"),
        (tfd.MixtureSameFamily(
            tfd.Categorical([0.0, 0.0]), tfd.Uniform([-3.0, 3.0], 5.0)), "no default bijector"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_what_has_no_bijector_is_refused_by_name(distribution, match):
    with pytest.raises(UserError, match=match) as caught:
        constraints.checked("x", distribution)
    assert "'x'" in str(caught.value)


def test_a_bijector_of_a_users_own_distribution_is_checked():
    class Shrunk(tfd.Exponential):
        def _default_event_space_bijector(self):
            return tfb.Chain([tfb.Shift(0.5), tfb.Softplus()])

    with pytest.raises(UserError, match="does not give its own draws back"):
        constraints.checked("rate", Shrunk(1.0))

    class WrongVolume(tfb.Exp):
        def _forward_log_det_jacobian(self, x):
            return 2.0 * x

    class Wrong(tfd.Exponential):
        def _default_event_space_bijector(self):
            return WrongVolume()

    with pytest.raises(UserError, match="log determinant"):
        constraints.checked("rate", Wrong(1.0))


def test_a_wishart_precision_has_its_exact_mean():
    """With 25 rows the posterior is Wishart(30, (I + S)^-1), with mean 30 (I + S)^-1."""
    rows = 3.0 * np.random.default_rng(0).normal(size=[25, 2])
    joint = tfd.JointDistributionNamed(
        {
            "P": tfd.WishartTriL(np.float64(5.0), scale_tril=np.eye(2)),
            "y": lambda P: tfd.Sample(
                tfd.MultivariateNormalTriL(
                    np.zeros(2), tf.linalg.cholesky(tf.linalg.inv(P))
                ), 25),
        }
    )  # fmt: skip
    target = models.make(joint, {"y": rows})
    scale = np.linalg.inv(np.eye(2) + rows.T @ rows)
    draws = stats.wishart(30, scale).rvs(5000, random_state=1)
    u = target.unconstrain({"P": draws})
    log_ratio = target.log_density(tf.constant(u)).numpy() - stats.wishart(30, scale).logpdf(
        np.moveaxis(draws, 0, -1)
    )
    volume = bijectors.covariance().forward_log_det_jacobian(tf.constant(u), event_ndims=1)
    np.testing.assert_allclose(np.ptp(log_ratio - volume), 0.0, atol=1e-6)
