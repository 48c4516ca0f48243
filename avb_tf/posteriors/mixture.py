"""Mixtures of Student t distributions, fitted to draws, whose density is known.

They replace a posterior where an exact density is needed: as the proposal of jumps between modes,
as the known density that a mode not yet found would exceed, and as the proposal of bridge sampling.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import special

DEGREES = 5.0  # degrees of freedom: tails heavier than a Gaussian's, and a finite covariance
_LIGHTER = (5.0, 10.0, 20.0, 50.0, 100.0)  # degrees of freedom, see `with_likely_tails`
_LARGEST_WORK = 2 * 10**5  # largest product of components and squared dimensions
_ROUNDS = 4  # rounds of expectation maximisation


class Mixture(NamedTuple):
    """A mixture of Student t distributions with the same degrees of freedom.

    mixture = Mixture(np.ones(1), np.zeros([1, 2]), np.eye(2)[np.newaxis])
    mixture.log_density(mixture.draw(10, np.random.default_rng(0)))  # [10]
    """

    weights: np.ndarray  # [components], which sum to 1
    means: np.ndarray  # [components, dim]
    roots: np.ndarray  # [components, dim, dim], lower triangular: covariance = root root^T
    degrees: float = DEGREES  # degrees of freedom; infinity: Gaussians

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Returns independent draws, [count, dim]."""
        component = rng.choice(len(self.weights), count, p=self.weights)
        noise = rng.normal(size=[count, self.means.shape[1]])
        if np.isfinite(self.degrees):
            noise *= np.sqrt(self._scale(rng.chisquare(self.degrees, [count, 1])))
        moved = np.empty_like(noise)
        for k in np.unique(component):
            moved[component == k] = noise[component == k] @ self.roots[k].T
        return self.means[component] + moved

    def _scale(self, chi_square):
        """Returns the factor of the noise, given that the roots are those of covariances.

        The scale matrix of a Student t differs from its covariance by (degrees - 2) / degrees.
        """
        return (self.degrees - 2.0) / chi_square

    def merged(self) -> "Mixture":
        """Returns a single component with the mixture's mean and covariance."""
        mean = self.weights @ self.means
        away = self.means - mean
        covariance = np.einsum(
            "k,kij->ij", self.weights, self.roots @ np.swapaxes(self.roots, 1, 2)
        )
        covariance += np.einsum("k,ki,kj->ij", self.weights, away, away)
        return self._replace(
            weights=np.ones(1), means=mean[np.newaxis], roots=lower(covariance)[np.newaxis]
        )

    def components(self) -> "list[Mixture]":
        """Returns each component as a mixture of its own."""
        parts = zip(self.means, self.roots, strict=True)
        return [Mixture(np.ones(1), m[np.newaxis], r[np.newaxis], self.degrees) for m, r in parts]

    def standardised(self, mean: np.ndarray, scale_tril: np.ndarray) -> "Mixture":
        """Returns the mixture of z, where x = mean + scale_tril @ z.

        Args:
          mean: [dim].
          scale_tril: lower triangular, [dim, dim].
        """
        return self._replace(
            means=np.linalg.solve(scale_tril, (self.means - mean).T).T,
            roots=np.linalg.solve(scale_tril, self.roots),
        )

    def log_densities(self, x: np.ndarray) -> np.ndarray:
        """Returns log(weight * density) of each component in nats, [n, dim] -> [components, n]."""
        # One product serves all components: solving for each separately takes ten times as long.
        white = (x - self.means[:, np.newaxis]) @ np.swapaxes(np.linalg.inv(self.roots), 1, 2)
        kernels = self._log_kernel((white**2).sum(-1), x.shape[1])
        volumes = np.log(np.diagonal(self.roots, axis1=1, axis2=2)).sum(1)
        return (np.log(self.weights) - volumes)[:, np.newaxis] + kernels

    @property
    def log_peak(self) -> float:
        """Log density in nats, at its mean, of a component with covariance I."""
        return float(self._log_kernel(0.0, self.means.shape[1]))

    def _log_kernel(self, squares, dim):
        if not np.isfinite(self.degrees):
            return -0.5 * squares - 0.5 * dim * np.log(2.0 * np.pi)
        nu = self.degrees
        constant = special.gammaln(0.5 * (nu + dim)) - special.gammaln(0.5 * nu)
        constant -= 0.5 * dim * np.log((nu - 2.0) * np.pi)
        return constant - 0.5 * (nu + dim) * np.log1p(squares / (nu - 2.0))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Returns the log density of the mixture in nats, [n, dim] -> [n]."""
        return np.logaddexp.reduce(self.log_densities(x))


def degrees(dim: int) -> float:
    """Returns the degrees of freedom of components fitted to draws in `dim` dimensions.

    The distance from the centre of a Student t varies by about sqrt(1 / (2 degrees)) of itself, and
    that of a Gaussian by sqrt(1 / (2 dim)). With few degrees in many dimensions, the two would
    hardly overlap.
    """
    return max(DEGREES, 0.25 * dim)


def largest(dim: int) -> int:
    """Returns the largest number of components that is affordable in `dim` dimensions."""
    return int(np.clip(_LARGEST_WORK // dim**2, 1, 64))


def of_gaussians(
    gaussians: Iterable[tuple[np.ndarray, np.ndarray]], degrees: float = np.inf
) -> Mixture:
    """Returns the mixture of Gaussians, given as (mean, root), with equal weights.

    Args:
      gaussians: pairs of a mean [dim] and the symmetric root of a covariance [dim, dim].
      degrees: degrees of freedom of the components; infinity for Gaussians.
    """
    means, roots = map(np.stack, zip(*gaussians, strict=True))
    lowered = np.stack([lower(root @ root.T) for root in roots])
    return Mixture(np.full(len(means), 1.0 / len(means)), means, lowered, degrees)


def lower(covariance: np.ndarray) -> np.ndarray:
    """Returns the Cholesky factor of a matrix that rounding may have made indefinite."""
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    root = vectors * np.sqrt(np.maximum(values, max(1e-15 * values[-1], 1e-300)))
    factor = np.linalg.qr(root.T)[1].T
    return factor * np.sign(np.diag(factor))


def fitted(x: np.ndarray, initial: Mixture) -> Mixture:
    """Fits a mixture to draws x [n, dim] by expectation maximisation from `initial`.

    The covariance of a component shrinks towards its initial covariance, which counts as dim + 2
    draws, so that a component with few draws stays a proper density. Every component keeps some
    weight, so that chains can still jump to a mode that the draws miss.
    """
    count, dim = x.shape
    trust = dim + 2.0
    weights, means, roots = initial.weights, initial.means, initial.roots
    priors = roots @ np.swapaxes(roots, 1, 2)
    for _ in range(_ROUNDS):
        joint = Mixture(weights, means, roots, np.inf).log_densities(x)
        responsibility = np.exp(joint - np.logaddexp.reduce(joint))
        mass = responsibility.sum(1)
        new_means, covariances = [], []
        for share, total, mean, prior in zip(responsibility, mass, means, priors, strict=True):
            middle = (share @ x + mean) / (total + 1.0)
            centred = x - middle
            scatter = (share[:, np.newaxis] * centred).T @ centred
            new_means.append(middle)
            covariances.append((scatter + trust * prior) / (total + trust))
        means = np.stack(new_means)
        roots = np.stack([lower(covariance) for covariance in covariances])
        weights = mass / count + 0.02 / len(mass)
        weights /= weights.sum()
    return Mixture(weights, means, roots, degrees(dim))


def weighted(mixture: Mixture, x: np.ndarray) -> Mixture:
    """Returns the Gaussians of the mixture that have some of the draws x [n, dim], so weighted."""
    mixture = mixture._replace(degrees=np.inf)
    joint = mixture.log_densities(x)
    weights = np.exp(joint - np.logaddexp.reduce(joint)).mean(1)
    kept = weights > 1.0 / len(x)
    kept_weights = weights[kept] / weights[kept].sum()
    return Mixture(kept_weights, mixture.means[kept], mixture.roots[kept], np.inf)


def with_likely_tails(mixture: Mixture, x: np.ndarray) -> Mixture:
    """Returns the mixture with the degrees of freedom that are likeliest for draws x [n, dim].

    As a proposal, a mixture needs heavy tails. As the known density of a search, it would hide
    narrow modes far out by them.
    """
    candidates = [mixture._replace(degrees=degrees) for degrees in _LIGHTER]
    return max(candidates, key=lambda one: one.log_density(x).mean())
