"""Tests the start of a fit: modes, tails, scales and evidence, against exact values."""

import time

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, stats
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from avb_tf import UserError
from avb_tf.posteriors import (
    coordinates,
    cost,
    evidence,
    hmc,
    large,
    mixture,
    models,
    sampling,
    search,
    start,
    tails,
)


def states(target, **settings):
    """Returns the chains' unconstrained states, [n, dim], and the start that they belong to."""
    begun = start.find(target, **settings)
    u = begun.place(tf.constant(begun.z, target.dtype), target.dtype)[0]
    return np.asarray(u, np.float64), begun


def right(estimate, exact):
    """Returns whether an estimate is within four standard errors, and its error is small."""
    return abs(estimate.value - exact) < 4.0 * estimate.standard_error < 0.4


def mixture_of(centres, widths, weights):
    centres = np.asarray(centres, np.float32)
    deviations = np.reshape(widths, [-1, 1]) * np.ones_like(centres)
    density = tfd.MixtureSameFamily(
        tfd.Categorical(probs=np.float32(weights)),
        tfd.MultivariateNormalDiag(centres, deviations.astype(np.float32)),
    )
    return models.make(density.log_prob, shape=[centres.shape[1]])


# Modes.


@pytest.mark.parametrize(
    ("centres", "widths", "weights"),
    [
        ([[0, 0], [3, 3]], [1.0, 0.02], [0.5, 0.5]),  # a narrow mode next to a wide one
        ([[0, 0], [0.5, 0.5]], [1.0, 0.03], [0.7, 0.3]),  # a narrow mode inside a wide one
        ([[-30, 0, 0], [30, 0, 0]], [1.0, 0.5], [0.2, 0.8]),  # far apart
        ([[0, 0, 0, 0], [4, 0, 0, 0], [0, 9, 0, 0]], [1.0, 0.5, 2.0], [0.2, 0.3, 0.5]),
    ],
)
def test_modes_of_unequal_widths_have_their_shares(centres, widths, weights):
    u, begun = states(mixture_of(centres, widths, weights))
    distance = np.linalg.norm(u[:, np.newaxis] - np.asarray(centres), axis=-1)
    dim = len(centres[0])
    nearest = (np.log(weights) - 0.5 * (distance / widths) ** 2 - dim * np.log(widths)).argmax(1)
    shares = np.bincount(nearest, minlength=len(weights)) / len(u)
    np.testing.assert_allclose(shares, weights, atol=0.06)
    assert right(begun.log_evidence, 0.0)


def test_twenty_five_modes_on_a_grid():
    centres = [[4.0 * i, 4.0 * j] for i in range(-2, 3) for j in range(-2, 3)]
    u, begun = states(mixture_of(centres, np.full(25, 0.3), np.full(25, 0.04)))
    nearest = np.linalg.norm(u[:, np.newaxis] - np.asarray(centres), axis=-1).argmin(1)
    shares = np.bincount(nearest, minlength=25) / len(u)
    np.testing.assert_allclose(shares, 0.04, atol=0.025)
    assert right(begun.log_evidence, 0.0)


def test_newtons_method_finds_modes_from_afar_whatever_the_units():
    sd = np.array([1e-3, 1.0, 1e3])
    target = models.make(
        lambda x: -0.5 * tf.reduce_sum(((x - 5.0 * sd) / sd) ** 2, -1), shape=[3], dtype="float64"
    )
    scores = hmc.scores(target.log_density, target.dim, target.dtype)
    points = sd * np.random.default_rng(0).normal(size=[10, 3]) * 100.0
    maxima = search.climb(scores, points)
    np.testing.assert_allclose(maxima / sd, 5.0, atol=0.05)
    modes = search.modes(scores, maxima)
    assert len(modes.x) == 1
    np.testing.assert_allclose(modes.roots[0], np.diag(sd), rtol=1e-3, atol=1e-4)
    exact = np.log(sd).sum() + 1.5 * np.log(2.0 * np.pi)
    assert modes.log_mass[0] == pytest.approx(exact, abs=1e-2)


def dirichlet(concentrations, outside=-np.inf):
    """Returns the density of all proportions but the last; it is not 0 at an edge or a corner."""
    free, last = np.float32(concentrations[:-1]), concentrations[-1]

    def log_density(x):
        inside = tf.reduce_all(x > 0.0, -1) & (tf.reduce_sum(x, -1) < 1.0)
        x = tf.where(inside[..., tf.newaxis], x, 0.1)
        rest = 1.0 - tf.reduce_sum(x, -1)
        density = tf.reduce_sum((free - 1.0) * tf.math.log(x), -1)
        return tf.where(inside, density + (last - 1.0) * tf.math.log(rest), outside)

    return log_density


def semicircle(x):
    """NaN outside [-1, 1]^2."""
    return 0.5 * tf.reduce_sum(tf.math.log(1.0 - x**2), -1)


def half_ring(x):
    """Flat where 2 < |x| < 3 and x_0 > 0, a region without its own mean and without 0."""
    radius = tf.norm(x, axis=-1)
    return tf.where((radius > 2.0) & (radius < 3.0) & (x[..., 0] > 0.0), 0.0 * radius, -np.inf)


@pytest.mark.parametrize(
    ("density", "dim", "mean", "log_evidence"),
    [
        # A maximum lies on the edge in the first, in its corner in the second.
        (dirichlet([3, 2, 1]), 2, [1 / 2, 1 / 3], np.log(2 / 120)),
        (dirichlet([1, 1, 5]), 2, [1 / 7, 1 / 7], np.log(24 / 720)),
        (semicircle, 2, [0.0, 0.0], 2 * np.log(np.pi / 2)),
        (half_ring, 2, [(2 / 3) * 19 * 2 / (5 * np.pi), 0.0], np.log(2.5 * np.pi)),
        # "Impossible" as a finite number, of every point, of some, or with a prior added.
        (dirichlet([3, 2, 1], -1e10), 2, [1 / 2, 1 / 3], np.log(2 / 120)),
        (dirichlet([1, 1, 5], -1e4), 2, [1 / 7, 1 / 7], np.log(24 / 720)),
        (lambda x: dirichlet([1, 1, 5], -1e6)(x) - x[..., 0] ** 2 / 1e4, 2, [1 / 7] * 2,
         np.log(24 / 720)),
        (lambda x: tf.maximum(-0.5 * tf.reduce_sum(x**2, -1), -700.0), 2, [0, 0],
         np.log(2 * np.pi)),
    ],
    ids=["edge", "corner", "NaN outside", "half a ring", "-1e10", "-1e4", "a prior", "clipped"],
)  # fmt: skip
def test_densities_with_hard_edges(density, dim, mean, log_evidence):
    u, begun = states(models.make(density, shape=[dim]))
    np.testing.assert_allclose(u.mean(0), mean, atol=0.15 * u.std(0).max())
    assert right(begun.log_evidence, log_evidence)


def test_newtons_starts_fit_into_the_time():
    """An iteration has a gradient for each dimension and for each of eleven trial steps."""
    assert search.affordable(1e-3, np.inf, 4) == search.starts(4) == 256
    assert search.affordable(1e-3, 4.0, 26) == 4000 // (8 * 37)
    assert search.affordable(1e-3, -1.0, 26) == 8  # the fewest, though the time is over


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_share_of_a_mode_does_not_depend_on_the_gaussian_put_there(factor):
    """Laplace's approximation would be off by the square of the factor."""
    weights, widths = np.array([0.3, 0.7]), np.array([0.5, 0.02])
    target = mixture_of([[0.0, 0.0], [9.0, 9.0]], widths, weights)
    scores = hmc.scores(target.log_density, target.dim, target.dtype)
    roots = factor * widths[:, np.newaxis, np.newaxis] * np.eye(2)
    modes = search.Modes(np.array([[0.0, 0.0], [9.0, 9.0]]), roots, np.zeros(2))
    rng = np.random.default_rng(0)
    shares = search.unseen(scores, modes, 0.0, rng)
    # The standard deviation of the weights of 256 draws is 0.4 and 0.9 times their mean.
    np.testing.assert_allclose(shares / weights, 1.0, atol=4 * (0.4 if factor == 1 else 0.9) / 16)


def test_modes_on_one_shell_count_once_and_only_where_the_known_density_is_low():
    """Each point of a shell is a mode, and each of their Gaussians covers the whole shell."""
    radii = np.linspace(0.0, 6.0, 2001)
    mass = 2.0 * np.pi**2 * radii**3 * np.exp(-0.5 * ((radii - 3.0) / 0.3) ** 2)
    evidence = np.log(integrate.trapezoid(mass, radii))
    target = models.make(
        lambda x: -0.5 * ((tf.norm(x, axis=-1) - 3.0) / 0.3) ** 2, shape=[4], dtype="float64"
    )
    scores = hmc.scores(target.log_density, target.dim, target.dtype)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[20, 4])
    x *= 3.0 / np.linalg.norm(x, axis=1, keepdims=True)
    modes = search.Modes(x, np.stack([1.5 * np.eye(4)] * 20), np.zeros(20))

    def known_on_one_side(x):
        return np.where(x[:, 0] > 0, scores(x)[0] - evidence, -np.inf)

    for known, share in ((None, 1.0), (known_on_one_side, 0.5)):
        found = search.unseen(scores, modes, evidence, rng, known).sum()
        assert found == pytest.approx(share, abs=0.08)  # the weights' relative sd is about 1.5


def test_the_neck_of_a_hierarchical_model_is_no_lost_mode():
    """The density has a pole where all slopes agree, but almost no mass there."""
    rng = np.random.default_rng(0)
    hours = rng.normal(size=[10, 8]).astype(np.float32)
    slopes = rng.normal(0.8, 0.4, [10, 1])
    score = (slopes * hours + 0.7 * rng.normal(size=hours.shape)).astype(np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "mean": tfd.Normal(0.0, 2.0),
            "spread": tfd.HalfNormal(1.0),
            "slope": lambda mean, spread: tfd.Sample(tfd.Normal(mean, spread), 10),
            "score": lambda slope: tfd.Independent(
                tfd.Normal(slope[..., tf.newaxis] * hours, 0.7), 2
            ),
        }
    )
    begun = start.find(models.make(joint, {"score": score}), steps=600)
    assert begun.lacking < start.LACKING


# Tails.


def test_coordinates_of_heavy_tails_and_their_inverse():
    one = tails.Tails(np.array([1.0, 0.0]), np.array([2.0, 1.0]), np.array([[0.5, 0.0]] * 2))
    v = np.array([[-4.0, 1.0], [-0.3, 2.0], [0.2, 0.0], [5.0, -3.0]])
    with tf.GradientTape() as tape:
        x = tf.constant(v)
        tape.watch(x)
        u, volume = one.forward(x)
    jacobian = tape.batch_jacobian(u, x)
    np.testing.assert_allclose(volume, np.linalg.slogdet(jacobian)[1], atol=1e-8)
    np.testing.assert_allclose(one.inverse(u.numpy()), v, atol=1e-8)
    np.testing.assert_allclose(one.slope(v), tf.linalg.diag_part(jacobian), rtol=1e-6)
    np.testing.assert_array_equal(u[:, 1], v[:, 1])  # a light tail does not change


@pytest.mark.parametrize("degrees", [1.0, 2.0, 5.0, 10.0])
def test_the_estimated_tails_of_a_student_t_leave_it_nearly_gaussian(degrees):
    distribution = stats.t(degrees)
    draws = distribution.rvs([4096, 2], random_state=0)
    estimate = tails.estimated(draws, np.ones(2, bool), np.zeros([2, 2], bool))
    u = distribution.rvs([100_000, 2], random_state=1)
    v = estimate.inverse(u)
    volume = estimate.forward(tf.constant(v))[1]
    # The coordinates are standardised afterwards, so the location and scale of v do not matter.
    log_q = stats.norm.logpdf(v, v.mean(0), v.std(0)).sum(1) - volume
    assert np.mean(distribution.logpdf(u).sum(1) - log_q) < 2 * 0.01  # nats


def test_light_tails_hardly_change():
    draws = np.random.default_rng(0).normal(size=[4096, 20])
    weights = tails.estimated(draws, np.ones(20, bool), np.zeros([2, 20], bool)).weight
    # The weight of a Gaussian is 0, and its estimate from 2,048 draws has a standard deviation of
    # about 0.01.
    assert weights.max() < 0.06
    assert np.mean(weights > 0) < 0.3
    none = tails.estimated(draws, np.zeros(20, bool), np.ones([2, 20], bool)).weight
    assert np.mean(none > 0) < 0.05


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (tfd.Logistic(np.float64(0.0), 1.0), [True, True]),
        (tfd.Laplace(np.float64(0.0), 1.0), [True, True]),
        (tfd.Gumbel(np.float64(0.0), 1.0), [False, True]),
        (tfd.ExpGamma(np.float64(1.0), 1.0), [True, False]),
        # 1 - p is 0 from a log odds of 37 on: the density is not finite at ten scales.
        (tfb.Invert(tfb.Sigmoid())(tfd.Beta(np.float64(0.5), 0.5)), [True, True]),
        (tfd.StudentT(np.float64(3.0), 0.0, 1.0), [True, True]),
        (tfd.Normal(np.float64(0.0), 1.0), [False, False]),
        (tfd.GeneralizedNormal(np.float64(0.0), 1.0, 4.0), [False, False]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_profile_tells_exponential_tails(distribution, expected):
    scores = hmc.scores(lambda x: distribution.log_prob(x[..., 0]), 1, tf.float64)
    draws = np.asarray(distribution.sample(1000, seed=(0, 0)))
    scale = np.subtract(*np.quantile(draws, [0.84, 0.16])) / 2.0
    x = draws[[scores(draws[:, np.newaxis])[0].argmax()]]
    profile = tails.profile(lambda x: scores(x)[0], x, scale * np.ones([1, 1]))
    np.testing.assert_array_equal(tails.exponential(profile)[:, 0], expected)


@pytest.mark.parametrize("distribution", [stats.laplace, stats.logistic, stats.gumbel_r])
def test_exponential_tails_become_nearly_gaussian(distribution):
    """The divergence of the coordinate from a Gaussian falls by half at the least."""
    draws = distribution.rvs(size=[4096, 1], random_state=0)
    estimate = tails.estimated(draws, np.zeros(1, bool), np.ones([2, 1], bool))
    u = distribution.rvs(size=[100_000, 1], random_state=1)

    def divergence(tails):
        v = tails.inverse(u)
        volume = tails.forward(tf.constant(v))[1]
        log_q = stats.norm.logpdf(v, v.mean(0), v.std(0)).sum(1) - volume
        return np.mean(distribution.logpdf(u).sum(1) - log_q)

    assert divergence(estimate) < 0.5 * divergence(tails.light(1))


def test_a_component_far_out_of_a_heavy_tail_stays_a_density():
    """Its slope was found by differences, which round to 0."""
    heavy = tails.Tails(np.zeros(1), np.ones(1), np.full([2, 1], 0.5))
    far = mixture.Mixture(np.ones(1), np.array([[1e17]]), np.array([[[1e15]]]), np.inf)
    moved = start._moved(far, heavy)
    v = heavy.inverse(np.array([[0.999e17], [1.001e17]]))
    width = np.ptp(v) / 2e14 * 1e15
    assert moved.roots.item() == pytest.approx(width, rel=1e-3)


def test_the_likeliest_degrees_of_freedom_of_a_mixture():
    rng = np.random.default_rng(0)
    one = mixture.Mixture(np.ones(1), np.zeros([1, 2]), np.eye(2)[np.newaxis])
    for degrees, likely in ((5.0, {5.0, 10.0}), (np.inf, {50.0, 100.0})):
        x = one._replace(degrees=degrees).draw(4000, rng)
        assert mixture.with_likely_tails(one, x).degrees in likely


def test_the_divergence_tells_whether_a_mixture_of_the_modes_suffices():
    rng = np.random.default_rng(0)

    def divergence(density):
        target = models.make(density, shape=[2])
        scores = hmc.scores(target.log_density, target.dim, target.dtype)
        draws = rng.normal(size=[sampling.CHAINS[1], 2])
        return sampling.sampled(scores, draws, sampling.around(draws, rng), rng, np.inf).divergence

    assert abs(divergence(lambda x: normal(x[..., 0]) + normal(x[..., 1], x[..., 0]))) < 0.02
    ring = divergence(lambda x: -0.5 * ((tf.norm(x, axis=-1) - 3.0) / 0.05) ** 2)
    assert ring > start.NO_NETWORK


def test_slopes_tell_tails_apart():
    def heaviness(distribution):
        scores = hmc.scores(lambda x: distribution.log_prob(x[..., 0]), 1, tf.float64)
        profile = tails.profile(lambda x: scores(x)[0], np.zeros(1), np.ones([1, 1]))
        assert not tails.improper(profile).any()
        return tails.of_profile(profile, np.zeros(1), np.ones(1)).weight.max()

    one = np.float64(1.0)
    for degrees in (1.0, 2.0, 4.0):
        assert heaviness(tfd.StudentT(degrees * one, 0.0, one)) == pytest.approx(
            1.0 / degrees, rel=0.02
        )
    for light in (tfd.Normal(0.0 * one, one), tfd.Laplace(0.0 * one, one), tfd.Gumbel(one, one)):
        assert heaviness(light) == 0.0


@pytest.mark.parametrize("together", [False, True])
def test_student_t_with_two_degrees_has_its_quantiles(together):
    one = tfd.StudentT(2.0, 0.0, 1.0)
    several = tfd.MultivariateStudentTLinearOperator(
        2.0, tf.zeros(5), tf.linalg.LinearOperatorIdentity(5)
    )
    density = several.log_prob if together else lambda x: tf.reduce_sum(one.log_prob(x), -1)
    u, begun = states(models.make(density, shape=[5]))
    assert begun.tails.heavy.all()
    for level in (0.75, 0.95, 0.99):
        exact = stats.t(2.0).ppf(level)
        error = np.sqrt(level * (1 - level) / 1000.0) / stats.t(2.0).pdf(exact)
        quantile = np.quantile(u, level, axis=0).mean()
        assert quantile == pytest.approx(exact, abs=4.0 * error / np.sqrt(1 if together else 5))
    assert right(begun.log_evidence, 0.0)


def test_a_proper_posterior_with_a_pole_and_heavy_tails_is_not_called_improper():
    y = np.array([0.1, -0.3, 0.2, 0.0, 6.0], np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "w": tfd.Sample(tfd.Horseshoe(0.1), 5),
            "y": lambda w: tfd.Independent(tfd.Normal(w, 1.0), 1),
        }
    )
    u, begun = states(models.make(joint, {"y": y}))
    prior = tfd.Horseshoe(np.float64(0.1))
    half = np.concatenate([np.geomspace(1e-9, 1.0, 4001), np.linspace(1.0, 40.0, 8001)[1:]])
    w = np.concatenate([-half[::-1], half])
    evidences, means = [], []
    for one in y:
        density = np.exp(prior.log_prob(w)) * stats.norm.pdf(one, w)
        evidences.append(integrate.trapezoid(density, w))
        means.append(integrate.trapezoid(w * density, w) / evidences[-1])
    # Chains hardly mix between the pole and the slab, and the error says so.
    value, error = begun.log_evidence
    assert abs(value - np.log(evidences).sum()) < 2.0 * error < 0.4
    np.testing.assert_allclose(u.mean(0), means, atol=0.3)


def normal(x, mean=0.0, deviation=1.0):
    return tfd.Normal(mean, deviation).log_prob(x)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "density",
    [
        lambda x: normal(x[..., 0]) + normal(x[..., 1], 3.0 * (x[..., 0] ** 2 - 1.0), 0.3),
        lambda x: normal(x[..., 0]) + normal(x[..., 1], x[..., 0] ** 3, 0.3),
        lambda x: normal(x[..., 0]) + normal(x[..., 1], 3.0 * tf.sin(x[..., 0]), 0.3),
        lambda x: normal(x[..., 0], 0.0, 3.0) + normal(x[..., 1], 0.0, tf.exp(x[..., 0] / 2.0)),
    ],
    ids=["parabola", "cubic", "sine", "funnel"],
)
def test_a_posterior_with_a_bent_ridge_is_not_called_improper(density, seed):
    assert right(start.find(models.make(density, shape=[2]), seed).log_evidence, 0.0)


def test_a_line_that_climbs_a_ridge_far_out_is_no_sign_of_an_improper_posterior():
    def density(x):
        bent = 3.0 * (x[:, 0] ** 2 - 1.0)
        return stats.norm.logpdf(x[:, 0]) + stats.norm.logpdf(x[:, 1], bent, 0.3)

    def flat(x):
        return np.where(np.abs(x[:, 1]) < 1e6, -0.5 * x[:, 0] ** 2, -np.inf)

    for slope in (1e-1, 1e-2, 1e-3):  # the lines cross the parabola at 30, ..., 3e5
        line = np.array([[slope, 1.0], [-slope, 1.0]])
        assert not tails.improper(tails.profile(density, np.zeros(2), line)).any()

    # A line through a funnel climbs until the density overflows.
    def funnel(x):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            width = np.exp(x[:, 0] / 2.0)
            return (
                stats.norm.logpdf(x[:, 0], 0.0, 3.0)
                + stats.norm.logpdf(x[:, 1] / width)
                - (np.log(width))
            )

    line = np.array([[0.015, 1.0]])
    assert not tails.improper(tails.profile(funnel, np.array([-10.0, 0.0]), line)).any()
    # A density that overflows far out after it was flat, or that grows, is improper.
    assert tails.improper(tails.profile(flat, np.zeros(2), np.eye(2))).tolist() == [False, True]
    assert tails.improper(tails.profile(lambda x: x[:, 1], np.zeros(2), np.eye(2))).all()


@pytest.mark.parametrize(("low", "expected"), [(-5e14, False), (-150.0, False), (-50.0, True)])
def test_a_plateau_without_mass_is_no_sign_of_an_improper_posterior(low, expected):
    """The smallest scale that a model may have leaves such a plateau."""
    profile = tails.profile(lambda x: np.maximum(-(x[:, 0] ** 2), low), np.zeros(1), np.eye(1))
    assert tails.improper(profile).item() == expected


@pytest.mark.parametrize(
    "density",
    [
        lambda x: -tf.square(x[..., 0] + x[..., 1]),  # flat along an oblique line
        lambda x: -tf.math.log1p(tf.reduce_sum(x**2, -1)),  # falls like 1 / r^2 in the plane
        lambda x: -0.5 * tf.math.log1p(x[..., 0] ** 2) - x[..., 1] ** 2,
    ],
)
def test_an_integral_that_diverges_is_refused(density):
    with pytest.raises(UserError, match="runs away"):
        start.find(models.make(density, shape=[2]))


# Scales.


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_unscaled_columns(scale):
    rng = np.random.default_rng(0)
    x = (scale * rng.normal(size=(100, 5))).astype(np.float32)
    y = (x @ np.ones(5, np.float32) + rng.normal(size=100)).astype(np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "b": tfd.Sample(tfd.Normal(0.0, 10.0), 5),
            "s": tfd.HalfNormal(10.0),
            "y": lambda b, s: tfd.Independent(
                tfd.Normal(tf.linalg.matvec(x, b), s[..., tf.newaxis]), 1
            ),
        }
    )
    u, _ = states(models.make(joint, {"y": y}))
    b = u[:, :5]
    x, y = x.astype(np.float64), y.astype(np.float64)
    precision = x.T @ x
    mean = np.linalg.solve(precision, x.T @ y)
    # The posterior is Student's t with 95 degrees of freedom, because the priors are nearly flat.
    sd = np.sqrt(np.diag(np.linalg.inv(precision)) * np.sum((y - x @ mean) ** 2) / 95 * 95 / 93)
    np.testing.assert_allclose((b.mean(0) - mean) / sd, 0.0, atol=0.2)
    np.testing.assert_allclose(b.std(0) / sd, 1.0, atol=0.12)


# The evidence.


def test_the_evidence_of_what_the_prior_hardly_allows():
    """Uniform(0, 1) and an observation at 2 with sd 0.2 give Phi(-5) - Phi(-10) = e^-15.065."""
    joint = tfd.JointDistributionNamed(
        {"p": tfd.Uniform(0.0, 1.0), "y": lambda p: tfd.Normal(p, 0.2)}
    )
    _, begun = states(models.make(joint, {"y": np.float32(2.0)}))
    assert right(begun.log_evidence, np.log(stats.norm.cdf(-5.0) - stats.norm.cdf(-10.0)))


def test_the_error_of_a_bridge_holds_for_correlated_chains():
    """p is N(0, 1) with autocorrelation 0.8, g is N(0.5, 1.2^2), and the normaliser is e^2."""
    proposal = stats.norm(0.5, 1.2)
    off = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=[64, 1])
        chain = [x]
        for _ in range(15):
            chain.append(0.8 * chain[-1] + 0.6 * rng.normal(size=[64, 1]))
        at_states, drawn = np.concatenate(chain, 1), proposal.rvs(1000, random_state=rng)

        def log_ratio(x):
            return 2.0 + stats.norm.logpdf(x) - proposal.logpdf(x)

        estimate = evidence.bridge(log_ratio(drawn), log_ratio(at_states))
        off.append((estimate.value - 2.0) / estimate.standard_error)
    off = np.abs(off)
    assert np.mean(off < 3.0) > 0.97
    assert np.mean(off < 1.0) < 0.9  # the stated error is not too large either


@pytest.mark.parametrize(("r_hat", "least"), [(1.015, 0.0), (1.03, 0.03), (1.04, 0.04)])
def test_chains_that_have_nearly_mixed_add_to_the_error_of_the_evidence(monkeypatch, r_hat, least):
    monkeypatch.setattr(sampling.diagnostics, "largest_r_hat", lambda states: r_hat)
    _, begun = states(mixture_of([[0.0, 0.0]], [1.0], [1.0]))
    assert least <= begun.log_evidence.standard_error < least + 0.01


def test_a_bridge_between_what_does_not_overlap_is_unknown():
    rng = np.random.default_rng(0)
    apart = stats.norm(40.0, 1.0)

    def log_ratio(x):
        return stats.norm.logpdf(x) - apart.logpdf(x)

    x = apart.rvs(1000, random_state=rng)
    estimate = evidence.bridge(log_ratio(x), log_ratio(rng.normal(size=[64, 16])))
    assert estimate == evidence.UNKNOWN or not np.isfinite(estimate.standard_error)
    assert str(evidence.UNKNOWN) == "unknown"


def test_evidences_of_closed_forms_are_within_their_errors():
    off = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        y = rng.normal(size=[4, 2]).astype(np.float32)
        joint = tfd.JointDistributionNamed(
            {
                "m": tfd.Sample(tfd.Normal(0.0, 2.0), 2),
                "y": lambda m: tfd.Sample(tfd.Independent(tfd.Normal(m, 1.0), 1), 4),
            }
        )
        estimate = start.find(models.make(joint, {"y": y}), seed, steps=10).log_evidence
        covariance = np.eye(4) + 4.0 * np.ones([4, 4])
        exact = stats.multivariate_normal(np.zeros(4), covariance).logpdf(y.T).sum()
        off.append((estimate.value - exact) / estimate.standard_error)
    assert np.all(np.abs(off) < 4.0)


# Mixtures and many dimensions.


def test_a_mixture_has_the_density_of_its_draws():
    rng = np.random.default_rng(0)
    two = mixture.Mixture(
        np.array([0.3, 0.7]), np.array([[0.0, 0.0], [3.0, -1.0]]),
        np.stack([np.eye(2), [[0.5, 0.0], [0.4, 0.2]]]),
    )  # fmt: skip
    scipy = [
        stats.multivariate_t(mean, root @ root.T * 3.0 / 5.0, df=5.0)
        for mean, root in zip(two.means, two.roots, strict=True)
    ]
    x = two.draw(1000, rng)
    exact = np.log(sum(w * one.pdf(x) for w, one in zip(two.weights, scipy, strict=True)))
    np.testing.assert_allclose(two.log_density(x), exact, atol=1e-10)
    fitted = mixture.fitted(x, two)
    np.testing.assert_allclose(fitted.weights, two.weights, atol=0.06)
    np.testing.assert_allclose(x.mean(0), two.weights @ two.means, atol=0.15)


def test_a_large_start_takes_its_first_steps_though_its_time_is_over():
    calls = []

    def scores(u):  # N(2, 0.5^2) in each coordinate
        calls.append(len(u))
        return -2.0 * ((u - 2.0) ** 2).sum(1), -4.0 * (u - 2.0)

    rng = np.random.default_rng(0)
    mean, scale = large.gaussian(scores, np.zeros([2, 300]), rng, time.monotonic() - 1.0)
    assert np.isfinite(mean).all()
    assert (scale > 0.0).all()
    assert len(calls) < 60  # not the 1,500 steps of both points


def test_a_large_density_that_is_finite_nowhere_is_refused():
    def scores(u):
        return np.full(len(u), np.nan), np.zeros_like(u)

    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="not finite wherever the fit started"):
        large.states(scores, 300, np.zeros([1, 300]), rng, time.monotonic() + 1.0)


def test_directions_that_stand_out_of_the_noise():
    rng = np.random.default_rng(0)
    direction = np.ones(300) / np.sqrt(300.0)
    z = rng.normal(size=[2000, 300])
    assert large.directions(z)[0].shape == (300, 0)
    z += np.outer(z @ direction, direction) * 4.0  # the sd is about 5 along the direction
    directions, stretch = large.directions(z)
    assert directions.shape == (300, 1)
    assert abs(directions[:, 0] @ direction) > 0.99
    assert stretch[0] == pytest.approx(5.0, rel=0.06)


def test_moments_of_many_dimensions_are_more_exact_than_the_draws():
    """Only the directions' errors are left of a Gaussian's; a skewed density's are less, too."""
    rng = np.random.default_rng(0)
    draws, dim = 2000, 300
    mean, sd = rng.normal(size=dim), np.geomspace(1e-3, 1e3, dim)
    unit = np.ones(dim) / np.sqrt(dim)
    z = rng.normal(size=[draws, dim])
    z += np.outer(z @ unit, unit) * 4.0  # covariance I + 24 unit unit^T
    scores = -(z - np.outer(z @ unit, unit) * (1.0 - 1.0 / 25.0)) / sd
    exact = sd * np.sqrt(1.0 + 24.0 / dim)
    at, scale, directions, stretch = large.fitted(mean + sd * z, scores)
    fitted = scale * np.sqrt(1.0 + directions**2 @ (stretch**2 - 1.0))
    noise = np.sqrt(np.mean(((mean + sd * z).std(0) / exact - 1.0) ** 2))
    assert np.sqrt(np.mean((fitted / exact - 1.0) ** 2)) < 0.5 * noise
    off = ((mean + sd * z).mean(0) - mean) / exact
    assert np.sqrt(np.mean(((at - mean) / exact) ** 2)) < 0.3 * np.sqrt(np.mean(off**2))

    gamma = rng.gamma(20.0, size=[draws, dim])  # log density 19 log x - x, skewed
    at, scale, directions, _ = large.fitted(gamma, 19.0 / gamma - 1.0)
    assert directions.shape == (dim, 0)
    errors = np.sqrt(np.mean((at - 20.0) ** 2)), np.sqrt(np.mean((scale - 20.0**0.5) ** 2))
    assert errors[0] < 0.4 * np.sqrt(np.mean((gamma.mean(0) - 20.0) ** 2))
    assert errors[1] < 0.7 * np.sqrt(np.mean((gamma.std(0) - 20.0**0.5) ** 2))

    flat = rng.uniform(size=[draws, dim])  # the gradient says nothing, and nothing is lost
    at, scale, *_ = large.fitted(flat, np.zeros([draws, dim]))
    np.testing.assert_allclose(at, flat.mean(0))
    np.testing.assert_allclose(scale, flat.std(0))


def test_three_hundred_correlated_dimensions(tmp_path):
    """With scales from 0.1 to 10 and one correlated direction the moments have closed forms."""
    rng = np.random.default_rng(0)
    dim = 300
    direction = rng.normal(size=dim) / np.sqrt(dim)
    mean, sd = rng.normal(size=dim), np.geomspace(0.1, 10.0, dim)

    def log_density(x):  # covariance D (I + 24 v v^T) D for a unit vector v
        z = (x - mean) / sd
        along = tf.linalg.matvec(z, direction / np.linalg.norm(direction))
        return -0.5 * (tf.reduce_sum(z**2, -1) - (1.0 - 1.0 / 25.0) * along**2)

    target = models.make(log_density, shape=[dim], dtype="float64")
    u, begun = states(target, limits=start.Limits(15.0, 0.0, 15.0))
    unit = direction / np.linalg.norm(direction)
    exact = sd * np.sqrt(1.0 + 24.0 * unit**2)
    np.testing.assert_allclose((u.mean(0) - mean) / exact, 0.0, atol=0.2)
    np.testing.assert_allclose(u.std(0) / exact, 1.0, atol=0.15)
    np.testing.assert_allclose(begun.deviations, u.std(0), rtol=0.1)
    begun.save(tmp_path / "start.npz")
    again = coordinates.load(tmp_path / "start.npz")
    z = np.random.default_rng(1).normal(size=[3, dim])
    places = [one.place(tf.constant(z), tf.float64) for one in (begun, again)]
    np.testing.assert_array_equal(places[0][0], places[1][0])
    matrix = np.asarray(begun.place(tf.constant(np.eye(dim)), tf.float64)[0]) - begun.mean
    assert float(places[0][1][0]) == pytest.approx(np.linalg.slogdet(matrix)[1], abs=1e-6)


def test_the_noise_of_an_estimated_covariance_is_no_lost_mode():
    """In 150 dimensions a Gaussian exceeds a mixture fitted to 4,096 states by several nats."""
    dim = 150
    deviations = np.geomspace(0.1, 10.0, dim)
    gaussian = tfd.MultivariateNormalDiag(np.zeros(dim), deviations)
    target = models.make(gaussian.log_prob, shape=[dim], dtype="float64")
    begun = start.find(target)
    assert begun.lacking == 0.0
    assert right(begun.log_evidence, 0.0)


def test_a_slow_density_gets_the_time_of_the_networks_and_fewer_transitions(monkeypatch):
    """A scan over hundreds of rows takes a tenth of a second for all chains, however few."""

    def begun(taken, dim=2):
        target = models.make(lambda x: -0.5 * tf.reduce_sum(x**2, -1), shape=[dim])
        target.cost = taken
        monkeypatch.setattr(cost, "seconds_of", lambda scores, x: taken.of(len(x)))
        monkeypatch.setattr(start, "LOOK_SHARE", 0.0)  # the wide search would take the rest
        monkeypatch.setattr(start, "LEAST_LOOK_SHARE", 0.0)
        found = start.find(target, limits=start.Limits(1.0, 0.0, 60.0))
        return found.chains, len(found.z) // found.chains

    fewest, most = sampling.TRANSITIONS
    # 0.8 of the 60 seconds suffice for 9 transitions in a round: 49 evaluations for each.
    assert begun(cost.Cost(0.1, 0.0)) == (256, 9)
    assert begun(cost.Cost(1.0, 0.0)) == (256, fewest)
    assert begun(cost.Cost(1e-5, 0.0)) == (256, most)
    # Where each draw takes a millisecond, 64 chains run for as long as 256 would.
    assert begun(cost.Cost(0.02, 1e-3)) == (64, 11)
    assert begun(cost.Cost(0.1, 1e-3)) == (100, fewest)
    assert begun(cost.Cost(0.1, 1e-3), dim=120) == (120, fewest)  # for the covariance


def test_modes_that_are_found_after_the_time_is_over_are_not_dropped():
    """The wide search of a cheap density goes on beyond the start's time."""
    means = [[9.0 * i, 0.0] for i in range(10)]
    target = mixture_of(means, np.full(10, 1.0), np.full(10, 0.1))
    scores, rng = hmc.of_target(target), np.random.default_rng(0)
    known = mixture.of_gaussians([(np.zeros(2), np.eye(2))])
    nothing, mass = np.zeros([2, 2, 2]), np.log(0.1)  # of the one mode that is known
    sampled = sampling.Sampled(nothing, known, evidence.UNKNOWN, mass, 0.0, 0.0, 0.0)
    look = search.Look(np.array(means[1:]), 1, 0.0, np.zeros([0, 2]))
    budget = start._budget(target, start.Limits(6.0, 0.0, 6.0))
    late = budget._replace(began=budget.began - 100.0)
    wider, lacking = start._wider(scores, look, sampled, rng, late, target.cost)
    assert wider is not None
    assert len(wider.weights) == 10
    assert lacking == pytest.approx(0.9, abs=0.01)


def test_a_density_with_a_matrix_for_each_draw_is_evaluated_in_batches():
    """Otherwise 32,768 draws of the wide search take ten gigabytes."""
    target = models.make(lambda x: -0.5 * tf.reduce_sum(x**2, -1), shape=[2])
    assert target.cost.rows == cost.ROWS[1]  # a cheap density takes all at once
    target.cost = cost.Cost(0.01, 0.25 / 1000)
    assert target.cost.rows == 1000
    seen = []

    def evaluated(u):
        seen.append(len(u))
        return -0.5 * tf.reduce_sum(u**2, -1), -u

    target.log_density_and_gradient = evaluated
    x = np.random.default_rng(0).normal(size=[2500, 2]).astype(np.float32)
    density, gradient = hmc.of_target(target)(x)
    assert seen == [1000, 1000, 500]
    np.testing.assert_allclose(density, -0.5 * (x**2).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(gradient, -x)
    target.cost = cost.Cost(0.0, 1e-5)  # a busy moment does not change the points of a search
    assert target.cost.rows == cost.ROWS[1]
    target.cost = cost.Cost(1.0, 1.0)
    assert target.cost.rows == cost.ROWS[0]


def test_the_cost_of_a_density_with_much_data_is_measured_at_few_draws(monkeypatch):
    """With a million rows of data, 256 draws would take gigabytes."""
    taken = cost.Cost(0.01, 0.0125)
    evaluated = []

    def seconds_of(_, u):
        evaluated.append(len(u))
        return taken.of(len(u))

    monkeypatch.setattr(cost, "seconds_of", seconds_of)
    measured = cost.measured(lambda u: u, 3, tf.float32)
    np.testing.assert_allclose(measured, taken)
    assert max(evaluated) == 64
    assert measured.rows == 20


def test_chains_that_have_not_mixed_run_twice_as_long_each_time(monkeypatch):
    """A chain that needs a hundred transitions never mixes in twelve, however often they run."""
    lengths = []
    run = hmc.run_chains

    def counted(scores, x, root, transitions, *rest, **settings):
        if not settings.get("adapt"):
            lengths.append(transitions)
        return run(scores, x, root, transitions, *rest, **settings)

    monkeypatch.setattr(hmc, "run_chains", counted)
    monkeypatch.setattr(sampling, "MIXED", 0.0)  # never reached
    target = models.make(lambda x: -0.5 * tf.reduce_sum(x**2, -1), shape=[2])
    begun = start.find(target)
    fewest, most = sampling.THINNED
    thinned = [min(fewest * 2**i, most) for i in range(sampling.ATTEMPTS)]
    assert lengths == [sampling.TRANSITIONS[1] * one for one in thinned]
    assert len(begun.z) == begun.chains * sampling.TRANSITIONS[1]  # as many states as ever
