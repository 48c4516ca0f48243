"""Tests bounds on the log density of smoothed draws where the smoothed entropy is known."""

import functools

import numpy as np
import pytest
import scipy.integrate
import scipy.spatial
import scipy.special
import scipy.stats

from avb_tf.likelihood_estimation import entropy

POINTS = 400


def cube(generator, count, n):
    """Draws from a uniform distribution with variance 1 in each of n dimensions."""
    return generator.uniform(-np.sqrt(3.0), np.sqrt(3.0), (count, n))


def ring(generator, count, n):
    """Draws from a circle without width in two dimensions, and normal in the others."""
    angle = generator.uniform(0.0, 2.0 * np.pi, count)
    circle = np.sqrt(2.0) * np.stack([np.cos(angle), np.sin(angle)], -1)
    return np.concatenate([circle, generator.standard_normal((count, n - 2))], -1)


def sheet(generator, count, n):
    """Draws uniformly in the first half of the dimensions, without width in the other half."""
    flat = cube(generator, count, n)
    flat[:, n - n // 2 :] = 0.0
    return flat


def tilted_sheet(generator, count, n):
    """Draws from a rotated `sheet`."""
    rotation = scipy.stats.ortho_group.rvs(n, random_state=1)
    return sheet(generator, count, n) @ rotation


def integral(density, low, high):
    """Returns -int p log p of a density."""
    return scipy.integrate.quad(lambda t: -scipy.special.xlogy(p := density(t), p), low, high,
                                limit=500)[0]  # fmt: skip


@functools.cache
def smoothed_uniform(scale):
    """Returns the entropy of sqrt(1 - s^2) times a uniform of variance 1, plus N(0, s^2)."""
    half = np.sqrt(3.0 * (1.0 - scale**2))

    def density(t):
        cdf = scipy.stats.norm.cdf
        return (cdf((t + half) / scale) - cdf((t - half) / scale)) / (2.0 * half)

    return 2.0 * integral(density, 0.0, half + 10.0 * scale)


@functools.cache
def smoothed_circle(scale):
    """Returns the entropy in the plane; the density depends only on the radius."""
    r = np.sqrt(2.0 * (1.0 - scale**2))

    def density(t):
        bessel = scipy.special.ive(0, t * r / scale**2)
        return np.exp(-0.5 * ((t - r) / scale) ** 2) * bessel / (2.0 * np.pi * scale**2)

    low, high = max(0.0, r - 10.0 * scale), r + 10.0 * scale
    return scipy.integrate.quad(
        lambda t: -2.0 * np.pi * t * scipy.special.xlogy(p := density(t), p), low, high, limit=500
    )[0]


def normal(scale):
    return 0.5 * np.log(2.0 * np.pi * np.e * scale**2)


EXACT = {
    cube: lambda n, s: n * smoothed_uniform(s),
    ring: lambda n, s: smoothed_circle(s) + (n - 2) * normal(1.0),
    sheet: lambda n, s: (n - n // 2) * smoothed_uniform(s) + n // 2 * normal(s),
    tilted_sheet: lambda n, s: (n - n // 2) * smoothed_uniform(s) + n // 2 * normal(s),
}
SHAPES = [(shape, n) for shape in EXACT for n in (2, 3, 5, 8, 16)]


def interval(shape, n, components, scale, seed=0, points=POINTS):
    """Returns the ends of the interval of the entropy, each with its standard error."""
    generator = np.random.default_rng(seed)
    own, others = (shape(generator, count, n) for count in (points, components))
    noise = generator.standard_normal((points, n))
    bounds = entropy.log_density_bounds(own, others, noise, scale)
    return [(-b.mean(), b.std(ddof=1) / np.sqrt(points)) for b in (bounds.upper, bounds.lower)]


@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_interval_contains_the_entropy(shape, n):
    scale = entropy.noise_scale(10_000, n)
    exact = EXACT[shape](n, scale)
    (low, low_error), (high, high_error) = interval(shape, n, 10_000, scale)
    assert low - 4.0 * low_error < exact < high + 4.0 * high_error
    assert high > low
    assert high - low < 0.3


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("shape", [cube, ring])
def test_more_components_narrow_the_interval(shape, n):
    scale = entropy.noise_scale(5_000, n)
    widths = []
    for components in (500, 2_500, 12_500):
        (low, _), (high, _) = interval(shape, n, components, scale)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 1.5**2 * widths[2] > 0.0


@pytest.mark.parametrize("shape", EXACT, ids=lambda v: v.__name__)
def test_few_components_still_bound_the_entropy(shape):
    """The bounds hold in the mean over many sets of components, each of which is far too small."""
    scale = 0.05
    sets = [interval(shape, 2, 40, scale, seed, 50) for seed in range(60)]
    ends = np.array([[low[0], high[0]] for low, high in sets])
    low, high = ends.mean(0)
    low_error, high_error = ends.std(0, ddof=1) / np.sqrt(len(ends))
    exact = EXACT[shape](2, scale)
    assert low + 4.0 * low_error < exact < high - 4.0 * high_error


def test_far_components_are_bounded_as_if_all_were_summed(monkeypatch):
    """In the plane a k-d tree leaves out distant ones of many components."""
    generator = np.random.default_rng(0)
    own, others, noise = (ring(generator, count, 2) for count in (200, 5000, 200))
    every = entropy.log_density_bounds(own, others, noise, 0.05)
    monkeypatch.setattr(entropy, "_SEARCHED", 0)
    near = entropy.log_density_bounds(own, others, noise, 0.05)
    np.testing.assert_allclose(near.lower, every.lower, atol=1e-4)
    assert (near.lower <= every.lower + 1e-9).all()
    assert (near.upper >= every.upper - 1e-9).all()
    np.testing.assert_allclose(near.upper, every.upper, atol=1e-4)


@pytest.mark.parametrize("searched", [0, 1000], ids=["near ones", "all pairs"])
def test_a_point_far_from_all_components_has_finite_bounds(searched, monkeypatch):
    monkeypatch.setattr(entropy, "_SEARCHED", searched)
    others = np.zeros((100, 2))
    bounds = entropy.log_density_bounds(np.full((3, 2), 50.0), others, np.zeros((3, 2)), 0.1)
    assert np.isfinite(bounds.lower).all()
    assert (bounds.lower < bounds.upper).all()


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_log_sums_are_those_of_all_distances(count, monkeypatch):
    monkeypatch.setattr(entropy, "_PAIRS", 1000)  # several parts
    generator = np.random.default_rng(count)
    points, centres = (generator.standard_normal((n, 3)) for n in (5, count))
    points *= 30.0  # far from most of the centres
    squares = scipy.spatial.distance.cdist(points, centres, "sqeuclidean")
    expected = scipy.special.logsumexp(-0.5 * squares, axis=1)
    np.testing.assert_allclose(entropy._all_pairs(points, centres), expected, rtol=1e-12)


def test_the_noise_keeps_a_normal_and_shrinks_with_components():
    generator = np.random.default_rng(0)
    w, noise = generator.standard_normal((2, 50_000, 2))
    v = entropy.smoothed(w, noise, 0.6)
    assert scipy.stats.kstest(v.ravel(), "norm").pvalue > 0.01
    scales = [entropy.noise_scale(k, 4) for k in (10, 1000, 100_000)]
    assert 1.0 > scales[0] > scales[1] > scales[2] > 0.0
