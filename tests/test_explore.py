"""Tests the content of the latent explorer, and that it decodes like the model in a browser."""

import base64
import dataclasses
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import avb_tf
from avb_tf.commands import explore
from avb_tf.data import images
from avb_tf.errors import UserError
from tests import browser

MODELS = {
    "dense, 2 latents": ("vae", (8, 8, 1), {"latent_dim": 2}),
    "dense, colour": ("vae", (6, 5, 3), {"latent_dim": 4, "likelihood": "normal"}),
    "rows": ("vae", (7,), {"latent_dim": 3}),
    "conv": ("vae", (9, 7, 1), {"latent_dim": 3, "network": "conv", "filters": (4, 6)}),
}


def make(name):
    keras.utils.set_random_seed(0)
    method, event, changes = MODELS[name]
    model = avb_tf.build(method, event, width=16, depth=2, **changes)
    for seed, weight in enumerate(model.averaged_decoder.weights):  # moves biases away from 0
        weight.assign_add(keras.random.normal(weight.shape, stddev=0.2, seed=seed))
    x = np.random.default_rng(0).random((30, *event), np.float32)
    return model, x


def described(page):
    """Returns the model in the page."""
    return json.loads(re.search(r"const model = (.*);\n", page)[1])


@pytest.mark.parametrize("name", MODELS)
def test_the_page_contains_the_decoder_and_the_means(name):
    model, x = make(name)
    content = described(explore.page(model, x, np.arange(30) % 3, "a title"))
    weights = sum(int(np.prod(w.shape)) for w in model.averaged_decoder.weights)
    stored = sum(len(layer[key]) for layer in content["layers"] for key in ("kernel", "bias"))
    assert stored >= weights * 4 * 4 / 3
    assert content["labels"] == [i % 3 for i in range(30)]
    assert content["latents"] == model.encoder.latent_dim


def test_the_page_loads_nothing_and_does_not_end_its_script_early():
    page = explore.page(*make("rows"), title="</script><script>alert(1)</script>")
    assert page.count("</script>") == 1
    assert not re.search(r"https?:|src=|href=|fetch\(|import ", page)


def floats(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_the_page_has_draws_of_the_examples_and_of_images_of_ones_own(tmp_path):
    model, x = make("dense, colour")
    picture = np.random.default_rng(1).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "<my> cat.png")
    own = explore._own(model, [str(tmp_path / "<my> cat.png")])
    content = described(explore.page(model, x, own=own))
    assert content["names"][:2] == ["<my> cat.png", "example 0"]
    shown = floats(content["shown"]).reshape(-1, *model.event_shape)
    np.testing.assert_allclose(shown[0], images.read(tmp_path / "<my> cat.png", (6, 5, 3)))
    np.testing.assert_allclose(shown[1:], x[: len(shown) - 1])
    draws = floats(content["draws"]).reshape(len(shown), -1, 4)
    np.testing.assert_allclose(draws[0], model.encode(shown, draws.shape[1])[:, 0], atol=1e-5)
    assert np.ptp(draws, axis=1).min() > 0.0


def test_an_own_image_of_a_binary_model_is_binary(tmp_path):
    model, _ = make("dense, 2 latents")
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "grey.png")
    (x,) = explore._own(model, [str(tmp_path / "grey.png")]).values()
    assert set(np.unique(x)) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["none.png", "text.png"])
def test_a_file_that_is_no_image_is_refused(name, of_rows, tmp_path):
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match=f"{name} cannot be decoded"):
        images.read(tmp_path / name, (6, 5, 3))
    with pytest.raises(UserError, match=r"is an image, and the model's x has shape \(7,\)"):
        explore._own(of_rows[0], [str(tmp_path / name)])


def test_an_unknown_decoder_is_refused():
    model, _ = make("rows")
    model.averaged_decoder = keras.Sequential([keras.layers.Dense(7)])
    with pytest.raises(UserError, match="Sequential"):
        explore.layers(model.averaged_decoder)


MEANS = {
    "identity": (1, lambda outputs: outputs[..., 0]),
    "exponential": (1, lambda outputs: tf.exp(outputs[..., 0])),
    "the second output": (2, lambda outputs: tf.sigmoid(outputs[..., 1])),
    "a softmax over x": (1, lambda outputs: tf.nn.softmax(outputs[..., 0])),
    "half of the sigmoid": (1, lambda outputs: 0.5 * tf.sigmoid(outputs[..., 0])),
}


@pytest.fixture(scope="module")
def of_rows():
    return make("rows")


@pytest.mark.parametrize("name", MEANS)
def test_a_likelihood_with_another_mean_is_refused(of_rows, name):
    model, x = of_rows
    parameters, mean = MEANS[name]
    known = model.likelihood
    model.likelihood = dataclasses.replace(known, parameters=parameters, mean=mean)
    with pytest.raises(UserError, match="another mean; use --mode=figures"):
        explore.page(model, x)
    own = dataclasses.replace(known, mean=lambda outputs: tf.sigmoid(outputs[..., 0]))
    model.likelihood = own  # of one's own, with the same mean
    assert described(explore.page(model, x))["latents"] == 3


@pytest.mark.browser
@pytest.mark.parametrize("name", MODELS)
def test_the_page_decodes_like_the_model(name, tmp_path, artefacts):
    model, x = make(name)
    file = tmp_path / "explorer.html"
    file.write_text(explore.page(model, x, np.arange(30) % 3, name))
    with browser.Page(tmp_path / "profile") as page:
        page.open(file.as_uri())
        for z in np.random.default_rng(1).normal(size=[3, model.encoder.latent_dim]):
            decoded = page.evaluate(f"Array.from(decode({z.tolist()}))")
            np.testing.assert_allclose(decoded, np.ravel(model.decode([z])), atol=1e-5)
        before = page.evaluate("z")
        page.evaluate("element('draw').click()")
        assert page.evaluate("z") != before
        page.evaluate(
            "(s => { s.value = 1.5; s.oninput() })([...document.querySelectorAll('input')].pop())"
        )
        assert abs(page.evaluate("z[z.length - 1]") - 1.5) < 1e-6
        page.evaluate("choose(3)")
        assert page.evaluate("element('shown').selectedOptions[0].textContent") == "example 3"
        page.evaluate("element('posterior').click()")
        draws = np.asarray(model.encode(x[:24], 100))[:, 3]
        np.testing.assert_allclose(page.evaluate("z"), draws[1], atol=1e-5)
        spread = max(np.abs(draws).max(), 3.0)
        assert page.evaluate("RANGE") >= spread
        file = f"explorer-{name.replace(', ', '-').replace(' ', '-')}"
        page.screenshot(artefacts / f"{file}.png")
        phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        page.call("Emulation.setDeviceMetricsOverride", **phone)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.screenshot(artefacts / f"{file}-phone.png")
        assert not page.errors
