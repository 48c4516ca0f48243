"""Bijectors from R^n to the supports of TFP's distributions, checked before they are used.

    bijector = constraints.checked("R", tfd.LKJ(3, 1.0))  # from R^3

TFP's bijectors are used except for those that are wrong or fail, which `bijectors` replaces.
"""

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from avb_tf.errors import UserError
from avb_tf.posteriors import bijectors
from avb_tf.posteriors.functions import value_and_gradient
from avb_tf.posteriors.target import first_line

_DRAWS = 512  # draws of the prior that the inverse and the bijector must reproduce
_MANY = 2048  # draws that check a density against its own draws
_STANDARD_ERRORS = 7.0  # largest deviation that this check accepts
_LARGEST_JACOBIAN = 64  # rows of the largest Jacobian computed to check a log determinant
_SIMPLEXES = (tfd.Dirichlet, tfd.FlatDirichlet, tfd.RelaxedOneHotCategorical)
_SPHERES = (tfd.VonMisesFisher, tfd.PowerSpherical, tfd.SphericalUniform)
_WISHARTS = (tfd.WishartTriL, tfd.WishartLinearOperator)


def of_distribution(distribution: tfd.Distribution) -> tfb.Bijector | None:
    """Returns the bijector from R^n to the support of a distribution, or None if it has none.

    Ours replace TFP's at any depth, such as in `tfd.Sample(tfd.Dirichlet(...), 3)`.
    """
    return _corrected(distribution).experimental_default_event_space_bijector()


def _own(distribution):
    """Returns our bijector for a distribution's support, or None if TFP's is right."""
    if isinstance(distribution, _SIMPLEXES):
        return bijectors.simplex()
    if isinstance(distribution, tfd.ExpRelaxedOneHotCategorical):
        return tfb.Chain([tfb.Log(), bijectors.simplex()])
    if isinstance(distribution, tfd.CholeskyLKJ):
        return bijectors.correlation_factor()
    if isinstance(distribution, tfd.LKJ):
        if distribution.input_output_cholesky:
            return tfb.Chain(
                [
                    bijectors.VolumeOf(bijectors.CorrelationOuterProduct()),
                    bijectors.correlation_factor(),
                ]
            )
        return bijectors.correlation()
    if isinstance(distribution, _WISHARTS):
        if distribution.input_output_cholesky:
            return tfb.Chain(
                [bijectors.VolumeOf(tfb.CholeskyOuterProduct()), bijectors.cholesky_factor()]
            )
        return bijectors.covariance()
    if isinstance(distribution, tfd.TruncatedNormal | tfd.TruncatedCauchy):
        return bijectors.interval(distribution.low, distribution.high)
    if isinstance(distribution, tfd.Blockwise):
        return _blocks(distribution.distributions)
    if isinstance(distribution, tfd.MixtureSameFamily):
        return _shared([distribution.components_distribution])
    if isinstance(distribution, tfd.Mixture):
        return _shared(distribution.components)
    return None


def _blocks(components):
    """Returns the joined bijectors of a `tfd.Blockwise`, or None if one is not elementwise."""
    parts = [of_distribution(component) for component in components]
    if any(one is None or one.forward_min_event_ndims != 0 for one in parts):
        return None
    sizes = [component.event_shape.num_elements() for component in components]
    return tfb.Blockwise(parts, block_sizes=sizes)


def _shared(components):
    """Returns the bijector that all components of a mixture share, or None if supports differ."""
    parts = [of_distribution(component) for component in components]
    alike = all(type(one) is type(parts[0]) for one in parts)
    if not alike or parts[0] is None:
        return None
    # A bijector with a batch shape, such as for Uniform(0, [1, 2]), differs between components.
    free = [tf.TensorShape(one.experimental_batch_shape()).rank == 0 for one in parts]
    known = not any(tf.nest.flatten([_limits(one) for one in parts]))
    return parts[0] if all(free) and known else None


def _limits(bijector):
    """Returns which parameters of a bijector are numbers, that is neither None, flags nor names."""
    return [
        value is not None and not isinstance(value, bool | str)
        for value in bijector.parameters.values()
    ]


def _corrected(distribution):
    """Returns the distribution with this module's bijectors instead of TFP's."""
    bijector = _own(distribution)
    if bijector is not None:
        methods = {"_default_event_space_bijector": lambda self: bijector}
        kind = type(distribution)
        return type(kind.__name__, (kind,), methods)(**distribution.parameters)
    inner = getattr(distribution, "distribution", None)
    if isinstance(inner, tfd.Distribution) and "distribution" in distribution.parameters:
        corrected = _corrected(inner)
        if corrected is not inner:
            return distribution.copy(distribution=corrected)
    return distribution


def checked(name: str, distribution: tfd.Distribution) -> tfb.Bijector:
    """Returns the bijector from R^n to a distribution's support, after checks.

    The bijector must reproduce draws of the prior from their inverse. Its log determinant must be
    right as well. For an elementwise bijector it is compared with automatic differentiation; for
    one whose numbers depend on each other, such as a matrix, the density is tested against its own
    draws.

    Args:
      name: name of the parameter, for the message.
      distribution: distribution of a single draw.
    Raises:
      UserError: the distribution has no bijector, or the bijector is wrong.
    """
    kind = f"'{name}' ({type(distribution).__name__})"
    if isinstance(distribution, _SPHERES):
        raise UserError(
            f"{kind} lies on a sphere, which has no one-to-one map from R^n; expected an angle, or "
            "a Gaussian vector that the model normalises"
        )
    try:
        bijector = of_distribution(distribution)
        if bijector is not None:
            _check_inverse(kind, distribution, bijector)
            _check_volume(kind, distribution, bijector)
    except UserError:
        raise
    except Exception as error:  # bijectors and distributions raise exceptions of any type
        raise UserError(
            f"the bijector of {kind} fails ({type(error).__name__}: {first_line(error)}); expected "
            "one from R^n to its support: give a log density with `bijector`"
        ) from error
    if bijector is None:
        raise UserError(
            f"{kind} has no default bijector to its support; expected a continuous distribution "
            "with `experimental_default_event_space_bijector`, or a log density with `bijector`"
        )
    return bijector


def _draws(distribution, count):
    """Returns draws of the prior, [count, ...], or None if it cannot be sampled."""
    try:
        draws = distribution.sample(count, seed=(0, 1)).numpy()
    except Exception:  # a user's own distribution may raise anything
        return None
    return draws if np.isfinite(draws).any() else None


def _check_inverse(kind, distribution, bijector):
    """Checks that the bijector reproduces draws of the distribution from their inverse.

    Raises:
      UserError: it does not.
    """
    draws = _draws(distribution, _DRAWS)
    if draws is None:
        return
    free = np.asarray(bijector.inverse(draws))
    back = np.asarray(bijector.forward(tf.constant(free)), np.float64)
    drawn = np.isfinite(draws).reshape(_DRAWS, -1).all(1)
    outside = drawn & np.isnan(free).reshape(_DRAWS, -1).any(1)
    inside = drawn & np.isfinite(free).reshape(_DRAWS, -1).all(1)  # inverses that did not overflow
    wrong = True
    if inside.any():
        scale = np.abs(draws[inside]) + np.std(draws[inside], 0) + 1e-6
        wrong = not (np.abs(back[inside] - draws[inside]) <= 1e-2 * scale).all()
    if wrong or outside.mean() > 0.01:
        raise UserError(
            f"the bijector of {kind} does not give its own draws back; expected one that reaches "
            "the whole support: give a log density with `bijector`"
        )


def _check_volume(kind, distribution, bijector):
    """Checks the bijector's log determinant, by the distribution's draws or by differentiation.

    Raises:
      UserError: the log determinant is wrong.
    """
    shape = bijector.inverse_event_shape(distribution.event_shape)
    if bijector.forward_min_event_ndims != 0:
        size = shape.num_elements()
        draws = _draws(distribution, max(256, min(_MANY, 2 * 10**6 // max(1, size))))
        if draws is not None:
            return _check_own_draws(kind, distribution, bijector, draws)
        if size > _LARGEST_JACOBIAN:
            return None
    free = tf.random.stateless_normal(shape, (0, 1), dtype=distribution.dtype)
    return _check_log_determinant(kind, distribution, bijector, free)


def _check_own_draws(kind, distribution, bijector, draws):
    """Tests a density against its own draws by two identities that hold for every density.

    E[score] = 0 and E[u score] = -1 for each coordinate of unconstrained u. For redundant values,
    such as those of a simplex, the test needs no convention about their volume.
    """
    free = np.asarray(bijector.inverse(draws))
    ranks = bijector.inverse_event_ndims(distribution.event_shape.rank)

    def log_density(u):
        volume = bijector.forward_log_det_jacobian(u, event_ndims=ranks)
        return distribution.log_prob(bijector.forward(u)) + volume

    score = np.asarray(value_and_gradient(log_density, tf.constant(free))[1], np.float64)
    free, score = (v.reshape(len(draws), -1) for v in (free.astype(np.float64), score))
    usable = np.isfinite(free).all(1) & np.isfinite(score).all(1)
    if usable.mean() < 0.99:  # many draws overflow, and means without them would be biased
        return
    for moment, expected in ((score, 0.0), (free * score, -1.0)):
        error = moment[usable].std(0) / np.sqrt(usable.sum()) + 1e-3
        off = np.abs(moment[usable].mean(0) - expected) / error
        if off.max() > _STANDARD_ERRORS:
            raise UserError(
                f"the bijector of {kind} has a wrong log determinant: the density is not that of "
                f"its own draws, by {off.max():.0f} standard errors; expected one that fits: give "
                "a log density with `bijector`"
            )


def _check_log_determinant(kind, distribution, bijector, free):
    """Compares the log determinant at unconstrained `free` with automatic differentiation."""
    ranks = bijector.inverse_event_ndims(distribution.event_shape.rank)
    stated = np.sum(bijector.forward_log_det_jacobian(free, event_ndims=ranks))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(free)
        image = bijector.forward(tf.identity(free))
    if bijector.forward_min_event_ndims == 0:
        with np.errstate(divide="ignore"):
            volume = np.log(np.abs(tape.gradient(image, free))).sum()
    else:
        jacobian = np.asarray(tape.jacobian(image, free, experimental_use_pfor=False), np.float64)
        rows = _independent(np.asarray(image, np.float64), free.shape.num_elements())
        if rows is None:
            return
        volume = np.linalg.slogdet(jacobian.reshape(len(rows), -1)[rows])[1]
    if not np.isfinite(volume) or abs(volume - stated) > 1e-2 * (1.0 + abs(volume)):
        raise UserError(
            f"the bijector of {kind} has the log determinant {stated:.4f} where automatic "
            f"differentiation gives {volume:.4f}; expected the same: give a log density with "
            "`bijector`"
        )


def _independent(image, count):
    """Returns a mask of the entries that determine a constrained value, flat, or None if unknown.

    TFP defines densities over these entries: all but the last of a simplex, and the lower triangle
    of a matrix, without its diagonal if the other entries determine the diagonal.
    """
    mask = np.ones(image.shape, bool)
    if mask.sum() == count:
        return mask.ravel()
    if image.ndim >= 2 and image.shape[-1] == image.shape[-2]:
        for diagonal in (0, -1):
            lower = mask & np.tri(image.shape[-1], k=diagonal, dtype=bool)
            if lower.sum() == count:
                return lower.ravel()
    mask[..., -1] = False
    return mask.ravel() if mask.sum() == count else None
