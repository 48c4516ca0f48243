"""Tests user-defined parts: examples in docstrings run, and wrong parts are refused by name."""

import inspect
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import avb_tf
from avb_tf import likelihoods
from avb_tf.adversaries import Adversary, ResidualAdversary
from avb_tf.encoders import BlackBoxEncoder, Encoder, GaussianEncoder, Posterior
from avb_tf.flows import FlowEncoder
from avb_tf.likelihoods import Likelihood
from avb_tf.networks import DenseDecoder, DenseTrunk
from avb_tf.settings.methods import SETTINGS

X = np.random.default_rng(0).integers(0, 2, [32, 6]).astype(np.float32)


def example(documented):
    """Runs the indented code of a docstring and returns its namespace."""
    paragraphs = (inspect.getdoc(documented) or "").split("\n\n")
    code = [p for p in paragraphs if all(line.startswith("    ") for line in p.split("\n"))]
    namespace = {"avb_tf": avb_tf, "keras": keras, "tf": tf, "tfp": tfp}
    exec(textwrap.dedent("\n\n".join(code)), namespace)
    return namespace


@pytest.mark.parametrize("documented", [Encoder, Adversary, Likelihood])
def test_a_documented_example_trains_and_survives_saving(documented, tmp_path):
    known = dict(likelihoods.LIKELIHOODS)
    try:
        model = example(documented)["model"]
        model.compile()
        history = model.fit(X, batch_size=16, epochs=2, verbose=0).history
        assert np.isfinite(history["elbo"]).all()
        model.save(tmp_path / "model.keras")
        loaded = avb_tf.load_model(tmp_path / "model.keras")
    finally:
        likelihoods.LIKELIHOODS.clear()
        likelihoods.LIKELIHOODS.update(known)
    np.testing.assert_allclose(loaded.encode(X, 3), model.encode(X, 3), rtol=1e-5)


def test_the_documented_encoder_has_the_moments_and_density_that_it_states():
    encoder = example(Encoder)["encoder"]
    noise = tf.random.stateless_normal([100_000, 1, 2], [0, 1])
    posterior = encoder(X[:1], noise)
    z, scale = posterior.z[:, 0].numpy(), np.diag(posterior.scale_tril[0])
    error = scale / np.sqrt(len(z))
    assert (np.abs(z.mean(0) - posterior.mean[0]) < 5 * error).all()
    assert (np.abs(z.std(0) / scale - 1.0) < 0.03).all()  # the standard error is 0.004
    # The entropy of a Laplace distribution is 1 + log(2 b), with b = sd / sqrt(2).
    entropy = np.sum(1.0 + np.log(2.0**0.5 * scale))
    log_prob = posterior.log_prob[:, 0].numpy()
    assert abs(log_prob.mean() + entropy) < 5 * log_prob.std() / np.sqrt(len(z))


def black_box(latent_dim=2):
    return BlackBoxEncoder(DenseTrunk(8, 1), latent_dim, noise_dim=3, width=8, depth=2)


def gaussian(latent_dim=2):
    return GaussianEncoder(DenseTrunk(8, 1), latent_dim)


def adversary():
    return ResidualAdversary(DenseTrunk(8, 1), 8, 1)


def model(encoder, decoder=None, **settings):
    return avb_tf.AVB((6,), encoder, decoder or DenseDecoder((6,), 1, 8, 1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likelihood": "bernouli"}, "likelihood is 'bernouli'; expected one of bernoulli, normal"),
        ({"contrast": "adaptive"}, "contrast is 'adaptive'; expected one of prior, diagonal, full"),
        ({"condition": "posteror"}, "condition is 'posteror'; expected one of x, posterior, none"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(settings, message):
    with pytest.raises(avb_tf.UserError, match=message):
        model(gaussian(), **settings)


@pytest.mark.parametrize(
    ("contrast", "draws", "fits"),
    [
        ("prior", 1, True), ("diagonal", 1, False), ("diagonal", 2, True), ("full", 2, False),
        ("full", 3, True),
    ],
)  # fmt: skip
def test_moments_of_draws_need_enough_draws(contrast, draws, fits):
    def make():
        settings = {"contrast": contrast, "adversary_draws": draws, "condition": "x"}
        return model(black_box(), adversary=adversary(), **settings)

    if fits:
        assert make().samples == draws
    else:
        with pytest.raises(avb_tf.UserError, match=f"adversary_draws {draws}; expected at least"):
            make()


class Wrong(GaussianEncoder):
    """A Gaussian encoder with a field of the wrong shape."""

    def __init__(self, field, change):
        super().__init__(DenseTrunk(8, 1), 2)
        self.field, self.change = field, change

    def draw(self, parameters, noise, training=False):
        posterior = super().draw(parameters, noise, training)
        return posterior._replace(**{self.field: self.change(getattr(posterior, self.field))})


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("z", lambda z: tf.transpose(z, [1, 0, 2]), r"z is \[2, 3, 2\]; expected \[3, 2, 2\]"),
        ("z", lambda z: z[..., :1], r"z is \[3, 2, 1\]; expected .*\[samples, batch, latent\]"),
        ("mean", lambda mean: mean[0], r"mean is \[2\]; expected .*\[batch, latent\]"),
        ("scale_tril", lambda scale: scale[0, 0], r"scale_tril is .*\[batch, latent, latent\]"),
        ("log_prob", lambda log: log[..., None], r"log_prob is .*\[samples, batch\]"),
    ],
)
def test_an_encoder_of_other_shapes_is_named(field, change, message):
    with pytest.raises(avb_tf.UserError, match=rf"encoder Wrong: {message}"):
        model(Wrong(field, change))


def test_an_encoder_without_a_posterior_is_named():
    class Bare(GaussianEncoder):
        def draw(self, parameters, noise, training=False):
            return super().draw(parameters, noise, training).z

    with pytest.raises(avb_tf.UserError, match=r"encoder Bare returns .*; expected a Posterior"):
        model(Bare(DenseTrunk(8, 1), 2))


@pytest.mark.parametrize(
    ("event_shape", "parameters"), [((5,), 1), ((6,), 2), ((6, 1), 1)], ids=str
)
def test_a_decoder_of_other_shapes_is_named(event_shape, parameters):
    wrong = DenseDecoder(event_shape, parameters, 8, 1)
    message = r"decoder DenseDecoder: output is .*; expected \[3, 2, 6, 1\]"
    with pytest.raises(avb_tf.UserError, match=message):
        model(gaussian(), wrong)


def test_an_adversary_of_other_shapes_is_named():
    class Trailing(ResidualAdversary):
        def logits(self, features, z):
            return super().logits(features, z)[..., tf.newaxis]

    wrong = Trailing(DenseTrunk(8, 1), 8, 1)
    message = r"adversary Trailing: T is \[3, 2, 1\]; expected \[3, 2\], \[samples, batch\]"
    with pytest.raises(avb_tf.UserError, match=message):
        model(gaussian(), adversary=wrong, condition="x")


def test_a_flow_narrower_than_z_is_refused():
    with pytest.raises(avb_tf.UserError, match="flow_width is 1; expected at least latent_dim, 2"):
        FlowEncoder(DenseTrunk(8, 1), gaussian(), steps=2, width=1)


def test_help_shows_the_settings_of_build():
    parameters = inspect.signature(avb_tf.build).parameters
    assert list(parameters) == ["method", "event_shape", *SETTINGS]
    assert {name: parameters[name].default for name in SETTINGS} == SETTINGS


def test_a_posterior_documents_the_shape_of_every_field():
    assert all(f"{field}: " in Posterior.__doc__ for field in Posterior._fields)
