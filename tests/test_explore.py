"""Tests the content of the latent explorer, and that it decodes like the model in a browser."""

import json
import re

import keras
import numpy as np
import pytest

import avb_tf
from avb_tf.commands import explore
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


def test_an_unknown_decoder_is_refused():
    model, _ = make("rows")
    model.averaged_decoder = keras.Sequential([keras.layers.Dense(7)])
    with pytest.raises(UserError, match="Sequential"):
        explore.layers(model.averaged_decoder)


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
        page.screenshot(artefacts / f"explorer-{name.replace(', ', '-').replace(' ', '-')}.png")
        assert not page.errors
