"""Bijectors from R^n to supports for which TFP's bijectors are wrong or fail.

These are correlation matrices (wrong log determinant), Wishart matrices (softplus applied twice),
simplexes (`SoftmaxCentered` fails with current numpy, and `IteratedSigmoidCentered` loses small
probabilities to cancellation) and intervals with one infinite end (NaN).
"""

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb

_TINY = np.finfo(np.float32).tiny  # smallest probability


class CorrelationOuterProduct(tfb.Bijector):
    """Correlation matrices R = L L^T from their Cholesky factors L, whose rows have norm 1.

        bijector = tfb.Chain([CorrelationOuterProduct(), tfb.CorrelationCholesky()])
        bijector.forward(tf.zeros([3]))  # the identity, [3, 3]

    TFP's `CholeskyOuterProduct` counts the diagonal of L as free, but here the other entries
    determine it. The log determinant is that of the strictly lower entries, because the density of
    `tfd.LKJ` is defined over them: dR_ij / dL_ij = L_jj for i > j, and the Jacobian is triangular.
    """

    def __init__(self, name: str = "correlation_outer_product"):
        parameters = dict(locals())
        super().__init__(forward_min_event_ndims=2, parameters=parameters, name=name)

    def _forward(self, x):
        product = tf.matmul(x, x, transpose_b=True)
        return tf.linalg.set_diag(product, tf.ones_like(tf.linalg.diag_part(product)))

    def _inverse(self, y):
        return tf.linalg.cholesky(y)

    def _forward_log_det_jacobian(self, x):
        diagonal = tf.linalg.diag_part(x)
        size = diagonal.shape[-1]
        return tf.linalg.matvec(
            tf.math.log(diagonal)[..., tf.newaxis, :],
            tf.range(size - 1, -1, -1, dtype=diagonal.dtype),
        )[..., 0]


class LimitedSinh(tfb.Bijector):
    """sinh, limited so that a correlation tanh(u) never rounds to 1.

    Such a correlation makes a matrix singular, and TensorFlow's inverse then raises an error for
    the whole batch. Beyond the limit, where a posterior has next to no mass, the value stays and
    the volume falls, so that the posterior stays proper.

        LimitedSinh().forward(tf.constant([1.0, 50.0]))  # [1.175, 197.4]
    """

    def __init__(self, name: str = "limited_sinh"):
        parameters = dict(locals())
        super().__init__(forward_min_event_ndims=0, parameters=parameters, name=name)

    def _forward(self, x):
        limit = self._limit(x)
        return tf.sinh(tf.clip_by_value(x, -limit, limit))

    def _inverse(self, y):
        return tf.asinh(y)

    def _forward_log_det_jacobian(self, x):
        size, limit = tf.abs(x), self._limit(x)
        inside = tf.math.log(tf.cosh(tf.minimum(size, limit)))
        return inside - tf.nn.relu(size - limit)

    @staticmethod
    def _limit(x):
        return -0.375 * np.log(np.finfo(x.dtype.as_numpy_dtype).eps)


class LogRatios(tfb.Bijector):
    """Probabilities from the logarithms of their ratios to the last one: p = softmax([u, 0]).

        LogRatios().forward(tf.zeros([2]))  # [1/3, 1/3, 1/3]

    The log determinant is that of all entries but the last, over which TFP defines densities. It is
    the sum of all log p.
    """

    def __init__(self, name: str = "log_ratios"):
        parameters = dict(locals())
        super().__init__(forward_min_event_ndims=1, parameters=parameters, name=name)

    def _forward(self, x):
        # A probability of 0 would have an infinite density under a sparse Dirichlet.
        return tf.maximum(tf.exp(self._log_forward(x)), x.dtype.as_numpy_dtype(_TINY))

    def _log_forward(self, x):
        return tf.nn.log_softmax(tf.concat([x, tf.zeros_like(x[..., :1])], -1))

    def _inverse(self, y):
        logs = tf.math.log(y)
        return logs[..., :-1] - logs[..., -1:]

    def _forward_log_det_jacobian(self, x):
        return tf.reduce_sum(self._log_forward(x), -1)

    def _forward_event_shape(self, input_shape):
        return input_shape[:-1].concatenate(
            [None if input_shape[-1] is None else input_shape[-1] + 1]
        )

    def _inverse_event_shape(self, output_shape):
        return output_shape[:-1].concatenate(
            [None if output_shape[-1] is None else output_shape[-1] - 1]
        )

    def _forward_event_shape_tensor(self, input_shape):
        return tf.concat([input_shape[:-1], input_shape[-1:] + 1], 0)

    def _inverse_event_shape_tensor(self, output_shape):
        return tf.concat([output_shape[:-1], output_shape[-1:] - 1], 0)


class VolumeOf(tfb.Bijector):
    """The identity with another bijector's log determinant.

    TFP's distributions with `input_output_cholesky` need it: their draws are Cholesky factors, but
    their `log_prob` is the density of the matrix.

    Args:
      bijector: the bijector from the Cholesky factor to the matrix.
      name: name of this bijector.
    """

    def __init__(self, bijector: tfb.Bijector, name: str = "volume_of"):
        parameters = dict(locals())
        self._bijector = bijector
        super().__init__(forward_min_event_ndims=2, parameters=parameters, name=name)

    def _forward(self, x):
        return x

    def _inverse(self, y):
        return y

    def _forward_log_det_jacobian(self, x):
        return self._bijector.forward_log_det_jacobian(x, event_ndims=2)


def simplex() -> tfb.Bijector:
    """Returns the bijector from R^n to n + 1 probabilities, uniform at 0."""
    return LogRatios()


def cholesky_factor() -> tfb.Bijector:
    """Returns the bijector from R^(n (n + 1) / 2) to triangles [n, n] with a positive diagonal."""
    return tfb.FillScaleTriL(diag_bijector=tfb.Softplus(), diag_shift=None)


def covariance() -> tfb.Bijector:
    """Returns the bijector from R^(n (n + 1) / 2) to positive definite matrices [n, n]."""
    return tfb.Chain([tfb.CholeskyOuterProduct(), cholesky_factor()])


def correlation_factor() -> tfb.Bijector:
    """Returns the bijector from R^(n (n - 1) / 2) to Cholesky factors of correlation matrices.

    With `CorrelationCholesky` alone, a uniform correlation has tails as heavy as those of Student's
    t with 2 degrees of freedom. With sinh before it, r = tanh(u) and the tails are exponential.
    """
    return tfb.Chain([tfb.CorrelationCholesky(), LimitedSinh()])


def correlation() -> tfb.Bijector:
    """Returns the bijector from R^(n (n - 1) / 2) to correlation matrices [n, n]."""
    return tfb.Chain([CorrelationOuterProduct(), correlation_factor()])


def interval(low: tf.Tensor, high: tf.Tensor) -> tfb.Bijector | None:
    """Returns the bijector from R to (low, high) if an end is infinite.

    TFP's sigmoid gives NaN in this case. The result is None if both ends are finite or if an end is
    not known statically; TFP's bijector serves then.
    """
    lowest, highest = (tf.get_static_value(end) for end in (low, high))
    if lowest is None or highest is None:
        return None
    below, above = np.isneginf(lowest).all(), np.isposinf(highest).all()
    if below and above:
        return tfb.Identity()
    if above and np.isfinite(lowest).all():
        return tfb.Chain([tfb.Shift(lowest), tfb.Softplus()])
    if below and np.isfinite(highest).all():
        minus = tfb.Scale(np.array(-1.0, highest.dtype))
        return tfb.Chain([tfb.Shift(highest), minus, tfb.Softplus()])
    return None
