"""Tests every panel over the HTTP interface of a real TensorBoard server and in a browser."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.image import imread

from avb_tf import command_line
from avb_tf.callbacks import tensorboard, writing
from tests import browser

SETTINGS = [
    "--config.steps=40", "--config.log_every=20", "--config.checkpoint_every=40",
    "--config.model.width=16", "--config.model.adversary_width=16", "--config.model.basis_width=8",
    "--config.model.bases=4", "--config.eval.examples=20", "--config.eval.grid=40",
    "--config.eval.posteriors=2", "--config.eval.repeats=1", "--config.eval.gap=2",
    "--config.profile_steps=20,25",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns a directory of runs that contains one run."""
    path = tmp_path_factory.mktemp("runs")
    command_line.main(
        ["x", "--config=configs/digits.py:avb_ac", f"--workdir={path / 'digits'}",
         "--mode=train_and_evaluate", *SETTINGS]
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def server(runs):
    """Yields the address of a TensorBoard server for the runs, on the loopback interface."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", runs, "--host", "127.0.0.1",
         "--port", "0", "--load_fast", "false"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    for line in process.stderr:
        if urls := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise RuntimeError("TensorBoard did not start")
    end = time.monotonic() + 120
    while "digits/logs" not in get(urls[0], "data/runs"):
        assert time.monotonic() < end
        time.sleep(0.5)
    yield urls[0]
    process.terminate()
    process.wait()
    process.stderr.close()


def get(server, path, **query):
    """Returns the body of an answer, parsed if it is JSON."""
    query = urllib.parse.urlencode(query)
    with urllib.request.urlopen(f"{server}/{path}?{query}", timeout=60) as reply:
        body = reply.read()
    return (
        json.loads(body) if reply.headers["Content-Type"].startswith("application/json") else body
    )


def post(server, path, body):
    request = urllib.request.Request(
        f"{server}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


HELD_OUT = 200  # number of digits
ROOT, TRAIN, VALIDATION = "digits/logs", "digits/logs/train", "digits/logs/validation"


def test_train_and_validation_are_on_the_same_scalar_charts(server):
    tags = get(server, "data/plugin/scalars/tags")
    both = set(tags[TRAIN]) & set(tags[VALIDATION])
    assert both >= {"elbo", "kl", "log_likelihood", "adversary_loss", "adversary_accuracy"}
    assert {"importance_bound", "monitored_elbo"} <= set(tags[VALIDATION])
    points = get(server, "data/plugin/scalars/scalars", run=VALIDATION, tag="elbo")
    assert [step for _, step, _ in points] == [20, 40]
    for name in ("elbo", "elbo_minus_importance_bound"):  # the first group of the page
        first = get(server, "data/plugin/scalars/scalars", run=VALIDATION, tag=f"Bound/{name}")
        plain = get(server, "data/plugin/scalars/scalars", run=VALIDATION, tag=name)
        assert [point[1:] for point in first] == [point[1:] for point in plain]
    bounds = {tag for tag in tags[VALIDATION] if tag.startswith("Bound/")}
    assert min(tags[VALIDATION]) in bounds
    assert len(bounds) == 2


def test_images(server):
    tags = get(server, "data/plugin/images/tags")[VALIDATION]
    assert {"samples", "reconstructions", "interpolations", "manifold", "latent_space"} <= set(tags)
    shown = get(server, "data/plugin/images/images", run=VALIDATION, tag="samples", sample=0)
    assert shown[-1]["step"] == 40
    image = urllib.request.urlopen(
        f"{server}/data/plugin/images/individualImage?{shown[-1]['query']}", timeout=60
    ).read()
    assert image.startswith(b"\x89PNG")


def test_histograms_of_latents_and_of_both_sides_of_t(server):
    tags = get(server, "data/plugin/histograms/tags")[VALIDATION]
    assert set(tags) >= {
        "latents/all", "latents/0", "latents/1", "adversary/T of q", "adversary/T of r",
    }  # fmt: skip
    steps = get(server, "data/plugin/histograms/histograms", run=VALIDATION, tag="latents/all")
    _, step, bins = steps[-1]
    assert step == 40
    assert sum(count for _, _, count in bins) == pytest.approx(2 * 2 * HELD_OUT)


def test_the_projector_has_latents_labels_and_thumbnails(server, runs):
    assert VALIDATION in get(server, "data/plugin/projector/runs")
    (embedding,) = get(server, "data/plugin/projector/info", run=VALIDATION)["embeddings"]
    assert embedding["tensorShape"] == [HELD_OUT, 3]  # the third dimension is zero
    assert embedding["sprite"]["singleImageDim"] == [8, 8]
    query = {"run": VALIDATION, "name": "latents"}
    tensor = np.frombuffer(get(server, "data/plugin/projector/tensor", **query), np.float32)
    assert np.isfinite(tensor).all()
    assert tensor.size == HELD_OUT * 3
    labels = get(server, "data/plugin/projector/metadata", **query).split()
    assert set(map(int, labels)) == set(range(10))
    assert len(labels) == HELD_OUT
    image = get(server, "data/plugin/projector/sprite_image", **query)
    assert image == (runs / VALIDATION / "sprite.png").read_bytes()


def test_hparams_contain_the_settings_and_the_final_metrics(server):
    experiment = post(server, "data/plugin/hparams/experiment", {"experimentName": ""})
    names = {h["name"] for h in experiment["hparamInfos"]}
    assert {"method", "model.width", "optimizer.learning_rate"} <= names
    assert "optimizer.adversary_learning_rate" in names
    assert not {name for name in names if name.startswith(("data.", "eval.", "export."))}
    metrics = [m["name"] for m in experiment["metricInfos"]]
    tags = {m["tag"] for m in metrics}
    assert {"final/validation/elbo", "final/test/elbo_adversary",
            "final/test/log_likelihood_quadrature"} <= tags  # fmt: skip
    final = [m for m in experiment["metricInfos"] if m["name"]["tag"].startswith("final/")]
    groups = post(
        server,
        "data/plugin/hparams/session_groups",
        {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS"],
            "colParams": [{"metric": m["name"]} for m in final],
            "startIndex": 0,
            "sliceSize": 10,
        },
    )["sessionGroups"]
    assert len(groups) == 1
    assert groups[0]["hparams"]["method"] == "avb_ac"
    values = {m["name"]["tag"]: m["value"] for m in groups[0]["metricValues"]}
    assert np.isfinite(values["final/test/log_likelihood_quadrature"])


def test_the_config_is_text(server):
    assert "config" in get(server, "data/plugin/text/tags")[ROOT]
    (shown,) = get(server, "data/plugin/text/text", run=ROOT, tag="config")
    assert "learning_rate" in shown["text"]
    assert "<code>" in shown["text"]


def test_the_layout_of_custom_scalars_names_tags_that_exist(server):
    layout = get(server, "data/plugin/custom_scalars/layout")
    charts = [chart for category in layout["category"] for chart in category["chart"]]
    tags = get(server, "data/plugin/scalars/tags")[VALIDATION]
    for chart in charts:
        patterns = chart.get("multiline", {}).get("tag", [])
        for series in chart.get("margin", {}).get("series", []):
            patterns += [f"^{series[key]}$" for key in ("value", "lower", "upper")]
        assert patterns
        for pattern in patterns:
            assert any(re.search(pattern, tag) for tag in tags), pattern


def test_the_requested_steps_are_profiled(runs):
    assert list((runs / ROOT).glob("plugins/profile/*/*.xplane.pb"))


def test_a_sprite_is_a_square_of_thumbnails(tmp_path):
    x = np.random.default_rng(0).random((5, 4, 6, 3), np.float32)
    (tmp_path / "sprite.png").write_bytes(tensorboard.sprite(x))
    sprite = imread(tmp_path / "sprite.png")[..., :3]
    assert sprite.shape == (12, 18, 3)
    np.testing.assert_allclose(sprite[4:8, 6:12], x[4], atol=1 / 255)


PANELS = {  # panel -> text that it shows once its data are loaded
    "": "Bound",  # the page that opens
    "timeseries": "importance_bound",
    "images": "reconstructions",
    "custom_scalars": "Does the adversary keep up?",
    "hparams": "optimizer.learning_rate",
    "projector": "200",
}
TEXT = """(function text(node) {
  let content = node.nodeType === Node.TEXT_NODE ? node.textContent : "";
  for (const child of [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes])
    content += text(child) + " ";
  const page = node.tagName === "IFRAME" && node.contentDocument?.body;  // none while it loads
  if (page) content += text(page);
  return content;
})(document.body)"""


@pytest.mark.browser
@pytest.mark.parametrize("panel", PANELS)
def test_panels_render_without_errors(panel, server, tmp_path, artefacts):
    with browser.Page(tmp_path / "profile") as page:
        page.open(f"{server}/#{panel}")
        try:
            page.wait(f"{TEXT}.includes({json.dumps(PANELS[panel])})", 90)
            time.sleep(3)  # the plots appear after the text
        finally:
            page.screenshot(artefacts / f"tensorboard-{panel or 'first'}.png")
        assert "NaN" not in page.evaluate(
            TEXT
        )  # text that the projector generates but does not show
        assert not page.errors


def test_logs_that_cannot_be_opened_are_an_os_error(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OSError, match="cannot write logs"), writing.logged():
        tf.summary.create_file_writer(str(tmp_path / "logs/train"))
