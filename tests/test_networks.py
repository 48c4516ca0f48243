"""Tests networks: shapes, leading dimensions, adversaries against numpy, and restoring."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from avb_tf import AVB, UserError, build, encoders, flows
from avb_tf.adversaries import (
    ConcatenatingAdversary,
    FactorisedAdversary,
    FourTrunkAdversary,
    ResidualAdversary,
)
from avb_tf.networks import (
    BatchNorm,
    ConvDecoder,
    ConvTrunk,
    DenseDecoder,
    DenseStack,
    DenseTrunk,
    ResidualTrunk,
)

SAMPLES, BATCH, LATENT = 4, 3, 2
IMAGES = [(28, 28, 1), (17, 23, 3), (5, 4, 2)]
RANDOM = np.random.default_rng(0)
CONDITION = RANDOM.random((BATCH, 5), np.float32)
Z = RANDOM.standard_normal((SAMPLES, BATCH, LATENT), np.float32)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def randomise(network, scale=0.4):
    for i, weight in enumerate(network.weights):
        weight.assign(scale * tf.random.stateless_normal(weight.shape, [i, 7]))
    return network


def dense(layer, inputs):
    kernel, *bias = (np.asarray(w, np.float64) for w in layer.weights)
    return np.asarray(inputs, np.float64) @ kernel + sum(bias)


def relu(values):
    return np.maximum(values, 0.0)


# Trunks and decoders.

TRUNKS = {
    "dense": lambda: DenseTrunk(6, 2, "tanh"),
    "conv": lambda: ConvTrunk((3, 4), 6, activation="tanh"),
    "normalised": lambda: ConvTrunk((3, 4), 6, activation="tanh", batch_norm=True),
}


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_sees_every_pixel_of_its_own_image(name, image):
    trunk = TRUNKS[name]()
    x = tf.constant(np.random.default_rng(1).random((2, *image), np.float32))
    with tf.GradientTape() as tape:
        tape.watch(x)
        features = trunk(x)
        first = tf.reduce_sum(features[0])
    assert features.shape == (2, 6)
    gradient = np.asarray(tape.gradient(first, x))
    assert (gradient[0] != 0).all()
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_centres_x_before_its_first_layer(name):
    grey = np.full((1, 5, 4, 2), 0.5, np.float32)
    np.testing.assert_array_equal(TRUNKS[name]()(grey), np.zeros((1, 6)))


def test_the_dense_trunk_is_its_layers():
    x = np.random.default_rng(2).random((3, 2, 2), np.float32)
    trunk = DenseTrunk(6, 2)
    trunk(x)
    first, second = randomise(trunk).stack.hidden
    expected = relu(dense(second, relu(dense(first, 2 * x.reshape(3, 4) - 1))))
    np.testing.assert_allclose(trunk(x), expected, rtol=1e-5, atol=1e-6)


def test_residual_blocks_begin_as_one_layer_and_add_layers_of_normalised_features():
    x = np.random.default_rng(2).random((3, 2, 2), np.float32)
    trunk = ResidualTrunk(DenseTrunk(6, 0), 6, 2)
    trunk(x)
    first = dense(trunk.first, 2 * x.reshape(3, 4) - 1)
    np.testing.assert_allclose(trunk(x), relu(first), rtol=1e-5, atol=1e-6)
    randomise(trunk)
    features = dense(trunk.first, 2 * x.reshape(3, 4) - 1)
    for norm, hidden, change in zip(trunk.norms, trunk.hidden, trunk.changes, strict=True):
        centred = features - features.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
        normalised = norm.gamma.numpy() * scaled + norm.beta.numpy()
        features = features + dense(change, relu(dense(hidden, normalised)))
    np.testing.assert_allclose(trunk(x), relu(features), rtol=1e-4, atol=1e-5)


def test_residual_blocks_stand_for_dense_layers_and_after_convolutions():
    sizes = dict(width=6, depth=3, latent_dim=2, filters=(3, 4), residual_blocks=2)
    for network, of_images in (("dense", DenseTrunk), ("conv", ConvTrunk)):
        trunk = build("vae", (8, 8, 1), network=network, **sizes).encoder.trunk
        assert isinstance(trunk, ResidualTrunk)
        assert isinstance(trunk.trunk, of_images)
        assert len(trunk.hidden) == 2
        assert trunk(tf.zeros([3, 8, 8, 1])).shape == (3, 6)
        assert network == "conv" or not trunk.trunk.weights


def test_convolutions_without_a_dense_layer_are_flattened():
    trunk = ConvTrunk((3, 4), 0, (1, 2))
    assert trunk(np.zeros((2, 5, 4, 1), np.float32)).shape == (2, 3 * 2 * 4)


# Batch normalisation.

ROWS = np.random.default_rng(3).normal(2.0, 3.0, (4, 5, 6, 3)).astype(np.float32)


def test_batch_norm_in_training_has_the_moments_of_gain_and_offset():
    norm = BatchNorm()
    norm(ROWS)
    norm.gain.assign([1.0, 2.0, 3.0])
    norm.offset.assign([0.0, -1.0, 5.0])
    outputs = np.asarray(norm(ROWS, training=True), np.float64).reshape(-1, 3)
    variance = ROWS.reshape(-1, 3).var(0)
    expected = np.array([1.0, 2.0, 3.0]) * np.sqrt(variance / (variance + norm.EPSILON))
    np.testing.assert_allclose(outputs.mean(0), [0.0, -1.0, 5.0], atol=1e-5)
    np.testing.assert_allclose(outputs.std(0), expected, rtol=1e-5)


def test_running_averages_approach_the_moments_and_serve_outside_training():
    norm = BatchNorm()
    norm(ROWS)
    for _ in range(10_000):
        norm._update(norm.mean, tf.constant(ROWS.mean((0, 1, 2))))
        norm._update(norm.variance, tf.constant(ROWS.var((0, 1, 2))))
    np.testing.assert_allclose(norm(ROWS), norm(ROWS, training=True), rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(norm(ROWS)[:1], norm(ROWS[:1]))  # the batch does not matter


def test_one_step_moves_a_running_average_by_a_thousandth():
    norm = BatchNorm()
    norm(ROWS)
    norm(ROWS, training=True)
    np.testing.assert_allclose(norm.mean, 1e-3 * ROWS.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(norm.variance, 1.0 + 1e-3 * (ROWS.var((0, 1, 2)) - 1.0), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_leaves_the_running_averages_finite(value):
    norm, broken = BatchNorm(), ROWS.copy()
    broken[0, 0, 0, 1] = value
    norm(ROWS)
    norm(broken, training=True)
    for average, start in ((norm.mean, 0.0), (norm.variance, 1.0)):
        assert average.numpy()[1] == start
        assert np.isfinite(average).all()
        assert (average.numpy()[[0, 2]] != start).all()


DECODERS = [
    ("dense", (7,)),
    *[("dense", image) for image in IMAGES],
    *[("conv", image) for image in IMAGES],
]


def decoder_for(name, event, parameters=2):
    if name == "dense":
        decoder = DenseDecoder(event, parameters, 6, 2, "tanh")
    else:
        decoder = ConvDecoder(event, parameters, (3, 4), activation="tanh")
    decoder(Z)
    return randomise(decoder)


@pytest.mark.parametrize(("name", "event"), DECODERS, ids=str)
def test_a_decoder_takes_any_leading_dimensions(name, event):
    decoder = decoder_for(name, event)
    outputs = decoder(Z)
    assert outputs.shape == (SAMPLES, BATCH, *event, 2)
    one_by_one = [[decoder(Z[s, b : b + 1])[0] for b in range(BATCH)] for s in range(SAMPLES)]
    np.testing.assert_allclose(outputs, one_by_one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decoder(Z[np.newaxis])[0], outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "event"), DECODERS, ids=str)
def test_every_output_of_a_decoder_depends_on_z(name, event):
    outputs = decoder_for(name, event)(Z)
    assert (np.ptp(outputs, axis=(0, 1)) > 0).all()


def test_a_convolutional_decoder_crops_the_end_of_the_next_larger_image():
    cropped, whole = (decoder_for("conv", event) for event in [(5, 6, 2), (8, 8, 2)])
    np.testing.assert_allclose(cropped(Z), whole(Z)[:, :, :5, :6], rtol=1e-5, atol=1e-6)


def test_a_convolutional_decoder_mirrors_the_trunk_of_its_filters():
    decoder = ConvDecoder((8, 8, 2), 3, (4, 5, 6))
    decoder(Z)
    channels = [tuple(c.kernel.shape[:1:-1]) for c in [*decoder.convolutions, decoder.head]]
    assert channels == [(6, 5), (5, 4), (4, 2 * 3)]  # (in, out)


def test_the_dense_decoder_is_its_layers():
    decoder = decoder_for("dense", (3, 1, 2))
    first, second = decoder.stack.hidden
    flat = dense(decoder.head, np.tanh(dense(second, np.tanh(dense(first, Z)))))
    expected = flat.reshape(SAMPLES, BATCH, 3, 1, 2, 2)
    np.testing.assert_allclose(decoder(Z), expected, rtol=1e-5, atol=1e-5)


# Adversaries.

ADVERSARIES = {
    "residual": lambda: ResidualAdversary(DenseTrunk(6, 1, "tanh"), 8, 2),
    "concatenating": lambda: ConcatenatingAdversary(DenseTrunk(6, 1, "tanh"), 8, 3),
    "four_trunk": lambda: FourTrunkAdversary(8, 2, 5),
    "factorised": lambda: FactorisedAdversary(DenseTrunk(6, 1, "tanh"), 8, 2, 5),
}
every_adversary = pytest.mark.parametrize("name", ADVERSARIES)


def adversary_for(name):
    adversary = ADVERSARIES[name]()
    adversary(CONDITION, Z)
    return randomise(adversary)


@every_adversary
def test_calling_an_adversary_is_its_logits_of_its_features(name):
    adversary = adversary_for(name)
    t = adversary.logits(adversary.features(CONDITION), Z)
    assert t.shape == (SAMPLES, BATCH)
    np.testing.assert_allclose(adversary(CONDITION, Z), t, rtol=1e-5, atol=1e-6)


@every_adversary
def test_t_depends_on_each_entry_of_its_own_condition(name):
    adversary, condition = adversary_for(name), tf.constant(CONDITION)
    with tf.GradientTape() as tape:
        tape.watch(condition)
        first = tf.reduce_sum(adversary(condition, Z)[:, 0])
    gradient = np.asarray(tape.gradient(first, condition))
    assert (gradient[0] != 0).all()
    assert (gradient[1:] == 0).all()


@every_adversary
def test_t_depends_on_each_entry_of_its_own_z(name):
    adversary, z = adversary_for(name), tf.constant(Z)
    with tf.GradientTape() as tape:
        tape.watch(z)
        one = adversary(CONDITION, z)[2, 1]
    gradient = np.asarray(tape.gradient(one, z))
    assert (gradient[2, 1] != 0).all()
    assert np.count_nonzero(gradient) == LATENT


@every_adversary
def test_samples_of_z_pass_as_if_alone(name):
    adversary = adversary_for(name)
    alone = [adversary(CONDITION, z[np.newaxis])[0] for z in Z]
    np.testing.assert_allclose(adversary(CONDITION, Z), alone, rtol=1e-5, atol=1e-5)


def test_the_residual_adversary_starts_at_zero():
    np.testing.assert_array_equal(
        ADVERSARIES["residual"]()(CONDITION, 10 * Z), np.zeros((SAMPLES, BATCH))
    )


def test_the_residual_adversary_is_its_blocks():
    adversary = adversary_for("residual")
    hidden = dense(adversary.from_z, np.concatenate([Z, Z**2], -1))
    hidden = hidden + dense(adversary.from_features, adversary.trunk(CONDITION))
    for block in adversary.blocks:
        hidden = hidden + dense(block, hidden / (1 + np.exp(-hidden)))
    expected = dense(adversary.head, hidden / (1 + np.exp(-hidden)))[..., 0]
    np.testing.assert_allclose(adversary(CONDITION, Z), expected, rtol=1e-4, atol=1e-5)


def test_the_concatenating_adversary_is_a_dense_network_of_features_and_z_side_by_side():
    adversary = adversary_for("concatenating")
    features = np.broadcast_to(adversary.trunk(CONDITION), (SAMPLES, BATCH, 6))
    kernel = np.concatenate([adversary.from_features.kernel, adversary.from_z.kernel])
    hidden = np.concatenate([features, Z], -1) @ kernel + adversary.from_features.bias
    for layer in [*adversary.stack.hidden, adversary.head]:
        hidden = dense(layer, relu(hidden))
    assert len(adversary.stack.hidden) == 2
    np.testing.assert_allclose(adversary(CONDITION, Z), hidden[..., 0], rtol=1e-4, atol=1e-5)


def leaky(values):
    return np.where(values > 0, values, 0.2 * values)


def stacked(stack, inputs, activation):
    for layer in stack.hidden:
        inputs = activation(dense(layer, inputs))
    return inputs


def test_the_four_trunk_adversary_is_the_formula_of_the_authors():
    adversary = adversary_for("four_trunk")
    of_x = stacked(adversary.theta_stack, CONDITION, leaky)
    theta = of_x @ np.transpose(adversary.theta.kernel) + np.asarray(adversary.theta.bias)
    theta = np.where(theta > 0, theta, np.expm1(theta))
    of_z = stacked(adversary.s_stack, Z, leaky)
    s = of_z @ np.asarray(adversary.s.kernel) + np.asarray(adversary.s_bias.kernel)[:, 0]
    t_x = dense(adversary.t_x, stacked(adversary.t_x_stack, CONDITION, leaky))
    t_z = dense(adversary.t_z, stacked(adversary.t_z_stack, Z, leaky))
    expected = (theta * s).sum(-1) + t_x[:, 0] + t_z[..., 0] + 0.5 * (Z**2).sum(-1)
    assert theta.shape[-1] == 5
    np.testing.assert_allclose(adversary(CONDITION, Z), expected, rtol=1e-4, atol=1e-5)


def test_the_four_trunk_adversary_starts_at_half_the_square_of_z():
    t = FourTrunkAdversary(64, 3, 256)(CONDITION, Z)
    np.testing.assert_allclose(t, 0.5 * (Z**2).sum(-1), atol=1e-3)


def test_the_factorised_adversary_of_earlier_versions_is_its_formula():
    adversary = adversary_for("factorised")
    x, hidden = adversary.trunk(CONDITION), Z
    for layer in adversary.stack.hidden:
        hidden = relu(dense(layer, hidden))
    theta = np.asarray(x) @ np.transpose(adversary.theta.kernel) + np.asarray(adversary.theta.bias)
    s = (
        np.asarray(hidden) @ np.asarray(adversary.s.kernel)
        + np.asarray(adversary.s_bias.kernel)[:, 0]
    )
    t_x, t_z = dense(adversary.t_features, x), dense(adversary.t_z, hidden)
    expected = (theta * s).sum(-1) + t_x[:, 0] + t_z[..., 0] + 0.5 * (Z**2).sum(-1)
    assert theta.shape[-1] == 5
    np.testing.assert_allclose(adversary(CONDITION, Z), expected, rtol=1e-4, atol=1e-5)


# Restoring.

FLAT = RANDOM.random((BATCH, 6), np.float32)
IMAGE = RANDOM.random((BATCH, 5, 4, 2), np.float32)
NOISE = RANDOM.standard_normal((SAMPLES, BATCH, 6), np.float32)


def small_model(**kwargs):
    encoder = encoders.JointBasisEncoder(DenseTrunk(6, 1, "tanh"), 2, 6, 3, 4)
    adversary = ResidualAdversary(DenseStack(4, 1), 8, 1)
    decoder = DenseDecoder((6,), 2, 5, 1)
    return AVB((6,), encoder, decoder, adversary, "normal", ema_decay=0.9, **kwargs)


RESTORABLE = {
    "DenseStack": (lambda: DenseStack(4, 2, "tanh"), [FLAT]),
    "DenseTrunk": (lambda: DenseTrunk(4, 2, "tanh"), [FLAT]),
    "ConvTrunk": (lambda: ConvTrunk([3, 4], 6, activation="tanh"), [IMAGE]),
    "ResidualTrunk": (lambda: ResidualTrunk(DenseTrunk(4, 1, "tanh"), 4, 2), [FLAT]),
    "NormalisedConvTrunk": (
        lambda: ConvTrunk([3, 4], 0, activation="elu", batch_norm=True),
        [IMAGE],
    ),
    "DenseDecoder": (lambda: DenseDecoder((3, 2), 2, 6, 2, "tanh"), [Z]),
    "LinearDenseDecoder": (lambda: DenseDecoder((3, 2), 2, 6, 2, "tanh", linear=True), [Z]),
    "ConvDecoder": (lambda: ConvDecoder((5, 4, 2), 1, [3, 4], [1, 2], "tanh"), [Z]),
    **{name: (lambda maker=maker: maker(), [CONDITION, Z]) for name, maker in ADVERSARIES.items()},
    "ConvolutionalAdversary": (
        lambda: ResidualAdversary(ConvTrunk((3,), 6, activation="tanh"), width=8, depth=1),
        [IMAGE, Z],
    ),
    "GaussianEncoder": (
        lambda: encoders.GaussianEncoder(DenseTrunk(4, 1, "tanh"), 6, full_covariance=True),
        [FLAT, NOISE],
    ),
    "BlackBoxEncoder": (
        lambda: encoders.BlackBoxEncoder(DenseTrunk(4, 1), 2, 6, 8, 2, inject_every_layer=True),
        [FLAT, NOISE],
    ),
    "NoiseBasisEncoder": (
        lambda: encoders.NoiseBasisEncoder(DenseTrunk(4, 1), 2, 2, bases=3, width=4),
        [FLAT, NOISE],
    ),
    "PublishedBasisEncoder": (
        lambda: encoders.NoiseBasisEncoder(DenseTrunk(4, 1), 2, 2, 3, 4, "elu", "positive"),
        [FLAT, NOISE],
    ),
    "JointBasisEncoder": (
        lambda: encoders.JointBasisEncoder(DenseTrunk(4, 1), 2, 6, bases=3, width=4),
        [FLAT, NOISE],
    ),
    "FlowEncoder": (
        lambda: flows.FlowEncoder(
            DenseTrunk(4, 1, "tanh"),
            encoders.JointBasisEncoder(keras.layers.Identity(), 2, 6, bases=3, width=4),
            steps=2,
            width=5,
        ),
        [FLAT, NOISE],
    ),
    "AVB": (small_model, [FLAT]),
}


@pytest.mark.parametrize("name", RESTORABLE)
def test_a_configuration_restores_the_architecture_and_no_weights(name):
    make, inputs = RESTORABLE[name]
    network = make()
    network(*inputs)
    randomise(network)
    config = json.loads(json.dumps(network.get_config()))
    restored = type(network).from_config(config)
    expected = network(*inputs)
    assert not np.allclose(restored(*inputs)[0], expected[0])
    restored.set_weights(network.get_weights())
    tf.nest.map_structure(assert_close, restored(*inputs), expected)


def test_a_model_of_the_networks_of_earlier_versions_survives_saving(tmp_path):
    """Files hold only the arguments given, and earlier versions had only the arguments below."""
    adversary = FactorisedAdversary(DenseTrunk(6, 1), width=8, depth=2, products=5)
    encoder = encoders.NoiseBasisEncoder(DenseTrunk(4, 1), 2, 3, 4, 5)
    model = AVB((6,), encoder, DenseDecoder((6,), 1, 5, 1), adversary, contrast="diagonal",
                condition="x", adversary_draws=4)  # fmt: skip
    model.compile()
    model.fit(np.round(FLAT), batch_size=3, verbose=0)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    for x in (FLAT, np.round(FLAT)):
        np.testing.assert_array_equal(restored.encode(x, 3), model.encode(x, 3))
        np.testing.assert_array_equal(restored.log_ratios(x, 3), model.log_ratios(x, 3))


# The authors' networks.

AUTHORS = {  # trained weights, counted in the authors' code for 8 latents and images of 28 x 28
    "dense": {"encoder": 979_216, "decoder": 328_984, "adversary": 26_818_562},
    "conv": {"encoder": 8_328_392, "decoder": 4_528_641, "adversary": 26_818_562},
}


@pytest.mark.parametrize("network", AUTHORS)
def test_the_papers_method_has_the_weights_of_the_authors_networks(network):
    model = build("avb_ac_paper", (28, 28, 1), latent_dim=8, network=network)
    counts = {
        name: sum(int(np.prod(w.shape)) for w in getattr(model, name).trainable_variables)
        for name in AUTHORS[network]
    }
    assert counts == AUTHORS[network]
    running = 2 * (64 + 128 + 256) if network == "conv" else 0
    assert sum(int(np.prod(w.shape)) for w in model.encoder.non_trainable_variables) == running


@pytest.mark.parametrize("network", AUTHORS)
def test_the_papers_method_starts_where_the_authors_do(network):
    """z0 is near 0 and each a(x) near exp(-5), so z is small compared with draws of the prior."""
    model = build("avb_ac_paper", (8, 8, 1), latent_dim=2, network=network, adversary_width=8)
    x = np.round(np.random.default_rng(1).random((6, 8, 8, 1))).astype(np.float32)
    z0, a = (np.asarray(v) for v in model.encoder.parameters(x))
    assert np.abs(z0).max() < 1e-2
    assert a.shape == (6, 16, 2)
    assert (a > 0.0).all()
    assert np.exp(-6.5) < np.median(a) < np.exp(-3.5)
    assert model.posterior(x, 100).z.numpy().std() < 0.1


def test_residual_blocks_do_not_fit_the_authors_networks():
    with pytest.raises(UserError, match="residual_blocks is 2"):
        build("avb_ac_paper", (6,), residual_blocks=2)


@pytest.mark.parametrize(
    "make", [lambda name: DenseStack(4, 2, name=name), lambda name: small_model(name=name)]
)
def test_a_name_is_restored(make):
    network = make("mine")
    assert type(network).from_config(network.get_config()).name == network.name == "mine"


def assert_close(actual, expected):
    if expected is not None:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def plain_trunk(kind):
    if kind == "functional":
        inputs = keras.Input((3, 2))
        return keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
    layers = [keras.layers.Flatten(), keras.layers.Dense(4, activation="tanh")]
    return keras.Sequential([keras.Input((3, 2)), *layers] if kind == "built" else layers)


@pytest.mark.parametrize("kind", ["deferred", "built", "functional"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_model_with_a_plain_keras_trunk_trains_and_survives_saving(kind, ema_decay, tmp_path):
    x = np.random.default_rng(4).integers(0, 2, (8, 3, 2)).astype(np.float32)
    encoder = encoders.GaussianEncoder(plain_trunk(kind), 2)
    model = AVB((3, 2), encoder, DenseDecoder((3, 2), 1, 5, 1), ema_decay=ema_decay)
    kernel = encoder.trunk.weights[0]
    start = np.array(kernel)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    model.fit(x, batch_size=4, verbose=0)
    assert (np.array(kernel) != start).any()
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert type(restored.encoder.trunk) is type(encoder.trunk)
    np.testing.assert_array_equal(restored.encoder.trunk.weights[0], kernel)
    np.testing.assert_allclose(restored(x), model(x), rtol=1e-5)
