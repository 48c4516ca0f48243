"""The signatures of a served model: TensorFlow functions with named inputs and outputs.

Every input and output has one row per example, and each output row depends only on its own input
row. A server may therefore batch requests freely, and both REST formats work. In signatures named
`*_seeded`, random draws use the row's own seed. In other signatures they use the machine's entropy,
so that a restarted server does not repeat its draws. Expectations over noise use fixed Sobol
points, which are the same for all rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf import proposal
from avb_tf.encoders import sobol_normal
from avb_tf.errors import UserError
from avb_tf.likelihoods import log_likelihood

ELBO_DRAWS = 64  # draws of z for each x in the bound
_CHUNK = 32  # draws to decode at once, to limit the memory
_POSTERIOR, _PRIOR = 0, 1  # independent streams of one seed


def of_model(model: Any, importance_samples: int, max_batch: int) -> dict[str, Callable[..., Any]]:
    """Returns an `AVB`'s signatures by name, each a `tf.function` of tensors to a dict of tensors.

    A signature of x in [0, 1] has a variant named `*_uint8` for images with values 0..255.

    Args:
      model: an `AVB`; the signatures use its averaged networks.
      importance_samples: draws of z for each x in `log_likelihood`.
      max_batch: most rows in a request.
    """
    density = functools.partial(importance_weighted, samples=importance_samples)
    of_x = {
        "serving_default": (reconstruct_mean, ["x"]),
        "encode": (_unseeded(encode), ["x"]),
        "encode_seeded": (encode, ["x", "seed"]),
        "reconstruct": (_unseeded(reconstruct), ["x"]),
        "reconstruct_seeded": (reconstruct, ["x", "seed"]),
        "elbo": (_of_density(elbo), ["x"]),
        "log_likelihood": (_of_density(density), ["x"]),
    }
    functions = {
        "decode": (decode, ["z"]),
        "sample": (lambda model, row: sample(model, _entropy(row)), ["row"]),
        "sample_seeded": (sample, ["seed"]),
        **of_x,
    }
    specs = {
        "x": tf.TensorSpec([None, *model.event_shape], tf.float32, "x"),
        "z": tf.TensorSpec([None, model.encoder.latent_dim], tf.float32, "z"),
        "seed": tf.TensorSpec([None], tf.int64, "seed"),
        "row": tf.TensorSpec([None], tf.int64, "row"),
    }
    valid = functools.partial(_of_support, model.likelihood)
    signatures = {
        name: signature(functools.partial(f, model), [specs[i] for i in inputs], max_batch, valid)
        for name, (f, inputs) in functions.items()
    }
    if model.likelihood.support != "unit":
        return signatures
    return signatures | {f"{name}_uint8": of_bytes(signatures[name]) for name in of_x}


def of_posterior(fit: Any, max_batch: int) -> dict[str, Callable[..., Any]]:
    """Returns the signatures of a `PosteriorFit`: draws, with one output for each parameter.

    Args:
      fit: a `PosteriorFit`.
      max_batch: most rows in a request.
    """

    def sample(seed):
        noise = normal(seed, _POSTERIOR, fit.model.encoder.noise_dim)
        parameters = fit.constrain(fit.model.averaged_encoder.z(noise))
        return dict(zip(fit.target.names, tf.nest.flatten(parameters), strict=True))

    rows, seeds = (tf.TensorSpec([None], tf.int64, name) for name in ("row", "seed"))
    return {
        "sample": signature(lambda row: sample(_entropy(row)), [rows], max_batch),
        "sample_seeded": signature(sample, [seeds], max_batch),
    }


def of_amortised(fit: Any, draws: int, max_batch: int) -> dict[str, Callable[..., Any]]:
    """Returns the signatures of an `AmortisedFit`; a row of a request is a data set.

    Args:
      fit: an `AmortisedFit`.
      draws: number of draws of the posterior of each data set.
      max_batch: largest number of rows in a request.
    Raises:
      UserError: two parts of the model have the same name, or one is called "seed".
    """
    model, q = fit.simulation, fit.q
    observed, names = list(model.shapes), list(model.names)
    if len({*observed, *names, "seed"}) <= len(observed) + len(names):
        raise UserError(
            f"the parts are {', '.join([*observed, *names])}; expected different names, none of "
            "them seed: rename them"
        )

    def given(parts):
        y = model.side_by_side(parts)
        model.check_in_graph(y)
        return q.given(y)

    def sample(*inputs):
        *parts, seed = inputs
        noise = normal(seed, _POSTERIOR, 2 * draws * q.dim)
        noise = tf.transpose(tf.reshape(noise, [-1, 2, q.dim]), [1, 2, 0])
        uniform = 0.5 * tf.math.erfc(-noise[1, :, :, tf.newaxis] / np.sqrt(2.0))
        u = q.transform(given(parts).repeated(draws), noise[0], uniform)
        parameters = tf.nest.flatten(model.constrain(tf.cast(u, model.dtype)))
        shaped = [tf.reshape(p, [-1, draws, *p.shape[1:]]) for p in parameters]
        return dict(zip(names, shaped, strict=True))

    def log_prob(*inputs):
        parts, parameters = inputs[: len(observed)], inputs[len(observed) :]
        u = model.unconstrain(tf.nest.pack_sequence_as(example, parameters))
        log_q = q.log_prob_given(tf.cast(u, tf.float32), given(parts))
        log_q -= tf.cast(model.log_volume(u), tf.float32)
        # NaN occurs for parameters outside their support.
        return {"log_prob": tf.where(tf.math.is_nan(log_q), -np.inf, log_q)}

    example = model.constrain(tf.zeros([1, model.dim], model.dtype))
    data = [tf.TensorSpec([None, *shape], tf.float32, k) for k, shape in model.shapes.items()]
    parameters = [
        tf.TensorSpec([None, *value.shape[1:]], value.dtype, name)
        for name, value in zip(names, tf.nest.flatten(example), strict=True)
    ]
    seed = tf.TensorSpec([None], tf.int64, "seed")
    make = functools.partial(signature, max_batch=max_batch, data=observed)
    return {
        "sample": make(lambda *parts: sample(*parts, _entropy(parts[0])), data),
        "sample_seeded": make(sample, [*data, seed]),
        "log_prob": make(log_prob, [*data, *parameters]),
    }


def _of_support(likelihood: Any, x: tf.Tensor):
    """Makes the graph fail if x lies outside the support of the likelihood."""
    message = {
        "unit": "x outside [0, 1]; images of 0..255 go to *_uint8",
        "table": "x that the table's columns cannot have",
        "count": "x that is not a count",
    }
    valid = {
        "unit": lambda: tf.reduce_all((x >= 0.0) & (x <= 1.0)),  # false for NaN
        "table": lambda: likelihood.valid(x),
        "count": lambda: tf.reduce_all((x >= 0.0) & tf.math.is_finite(x) & (x == tf.round(x))),
        "real": lambda: tf.reduce_all(tf.math.is_finite(x)),
    }[likelihood.support]()
    tf.debugging.Assert(valid, [message.get(likelihood.support, "x that is not finite")])


def signature(
    function: Callable[..., dict[str, tf.Tensor]],
    specs: Sequence[tf.TensorSpec],
    max_batch: int,
    valid: Callable[[tf.Tensor], None] = lambda x: None,
    data: Sequence[str] = ("x",),
) -> Callable[..., Any]:
    """Wraps `function` in a `tf.function` that rejects invalid values and too many rows.

    Args:
      function: tensors -> dict of tensors.
      specs: specs of the function's inputs.
      max_batch: most rows in a request.
      valid: adds an assertion to the graph that fails for an x that the model cannot have.
      data: names of the inputs that `valid` checks; all others have to be finite.
    """

    def serve(*inputs):
        rows = tf.stack([tf.shape(tensor)[0] for tensor in inputs])
        equal = tf.reduce_all(rows == rows[0])
        tf.debugging.Assert(equal, ["inputs with different numbers of rows:", rows])
        few = rows[0] <= max_batch
        tf.debugging.Assert(few, [f"rows of one request; expected at most {max_batch}:", rows[0]])
        named = zip(specs, inputs, strict=True)
        return function(*[_checked(tensor, spec, data, valid) for spec, tensor in named])

    return tf.function(serve, input_signature=specs, autograph=False)


def of_bytes(function: Any) -> Callable[..., Any]:
    """Returns a variant of a signature that takes x, its first input, as uint8 in 0..255."""
    x, *rest = function.input_signature

    def serve(x, *others):
        return function(tf.cast(x, tf.float32) / 255.0, *others)

    specs = [tf.TensorSpec(x.shape, tf.uint8, x.name), *rest]
    return tf.function(serve, input_signature=specs, autograph=False)


def _checked(tensor, spec, data, valid):
    """Returns the tensor after checking its shape and values against its spec."""
    tensor = tf.ensure_shape(tensor, spec.shape)  # the runtime itself accepts any shape
    if spec.name in data:
        valid(tensor)
    elif tensor.dtype.is_floating:
        finite = tf.reduce_all(tf.math.is_finite(tensor))
        tf.debugging.Assert(finite, [f"{spec.name} that is not finite"])
    return tensor


# One function for each signature.


def encode(model: Any, x: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns z ~ q(z|x) and the mean of q(z|x), each [batch, latent].

    Args:
      model: an `AVB`.
      x: [batch, *event].
      seed: int64 [batch].
    """
    return {"z": _draw(model, x, seed), "mean": _mean(model, x)}


def reconstruct(model: Any, x: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns E[x'|z] for z ~ q(z|x), [batch, *event].

    Args:
      model: an `AVB`.
      x: [batch, *event].
      seed: int64 [batch].
    """
    return {"reconstruction": model.decode(_draw(model, x, seed))}


def reconstruct_mean(model: Any, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns E[x'|z] at the mean of q(z|x), [batch, *event], for x [batch, *event]."""
    return {"reconstruction": model.decode(_mean(model, x))}


def decode(model: Any, z: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns E[x|z], [batch, *event], for z [batch, latent]."""
    return {"x": model.decode(z)}


def sample(model: Any, seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns E[x|z] for z ~ p(z), [batch, *event], for seeds int64 [batch]."""
    return {"x": model.decode(normal(seed, _PRIOR, model.encoder.latent_dim))}


def elbo(model: Any, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the bound on log p(x) in nats, [batch], with the adversary's T if there is one."""
    noise = _points(ELBO_DRAWS, model.encoder.noise_dim, x)
    return {"elbo": tf.reduce_mean(model.terms(x, noise).elbo, 0)}


def importance_weighted(model: Any, x: tf.Tensor, samples: int) -> dict[str, tf.Tensor]:
    """Estimates log p(x) in nats by importance sampling, [batch], without the adversary.

    The proposal is q(z|x) if its density is known, and otherwise `proposal.widened_gaussian`, as in
    the evaluation. The estimate is a lower bound in expectation (Burda et al., 2016).

    Args:
      model: an `AVB`.
      x: [batch, *event].
      samples: draws of z for each x.
    """
    encoder = model.averaged_encoder
    exact = encoder(x, _points(1, encoder.noise_dim, x)).log_prob is not None
    gaussian = None if exact else proposal.widened_gaussian(encoder, x)

    def weigh(noise):
        """Returns log p(x, z) - log q(z), [chunk, batch], for noise [chunk, dim]."""
        noise = _over(noise, x)
        if gaussian is None:
            posterior = encoder(x, noise)
            z, log_q = posterior.z, posterior.log_prob
        else:
            columns = gaussian.scale.matmul(tf.transpose(noise, [1, 2, 0]))
            z = gaussian.loc + tf.transpose(columns, [2, 0, 1])
            log_q = gaussian.log_prob(z)
        log_p = log_likelihood(model.likelihood, model.averaged_decoder(z), x)
        return log_p + model.prior.log_prob(z) - log_q

    dim = encoder.noise_dim if exact else encoder.latent_dim
    noise = sobol_normal(-(-samples // _CHUNK) * _CHUNK, dim).reshape(-1, _CHUNK, dim)
    weights = tf.map_fn(
        weigh, tf.constant(noise), parallel_iterations=1,
        fn_output_signature=tf.TensorSpec([_CHUNK, None]),
    )  # fmt: skip
    return {
        "log_likelihood": tf.reduce_logsumexp(weights, [0, 1]) - np.log(noise.shape[0] * _CHUNK)
    }


def normal(seed: tf.Tensor, stream: int, size: int) -> tf.Tensor:
    """Draws standard normal numbers, [batch, size]; each row is a function of its own seed.

    Args:
      seed: int64 [batch].
      stream: number of an independent stream of the seed.
      size: draws in a row.
    """

    def row(one):
        pair = tf.stack([one, tf.constant(stream, tf.int64)])
        return tf.random.stateless_normal([size], pair, alg="philox")  # the same on every device

    return tf.map_fn(row, seed, fn_output_signature=tf.TensorSpec([size]))


def _entropy(like):
    """Draws fresh seeds, int64 [rows], one for each row of `like`."""
    return tf.raw_ops.NonDeterministicInts(shape=tf.shape(like)[:1], dtype=tf.int64)


def _unseeded(function):
    return lambda model, x: function(model, x, _entropy(x))


def _of_density(function):
    """Adds to `function` of x a check that x is binary if the likelihood is."""

    def refuse(model, x):
        if model.likelihood.binary:
            binary = tf.reduce_all((x == 0.0) | (x == 1.0))
            tf.debugging.Assert(binary, ["x that is neither 0 nor 1; the model expects binary x"])
        return function(model, x)

    return refuse


def _draw(model, x, seed):
    noise = normal(seed, _POSTERIOR, model.encoder.noise_dim)
    return model.averaged_encoder(x, noise[tf.newaxis]).z[0]


def _mean(model, x):
    return proposal.moments(model.averaged_encoder, x)[0]


def _points(count, dim, x):
    return _over(sobol_normal(count, dim), x)


def _over(noise, x):
    """Repeats noise for every row of x: [count, dim] -> [count, batch, dim]."""
    count, dim = noise.shape
    return tf.broadcast_to(noise[:, tf.newaxis], [count, tf.shape(x)[0], dim])
