"""Tests that the numbers of model cards match the results, and that their code runs."""

import json
import re

import numpy as np
import pytest
import tensorflow as tf

import avb_tf
from avb_tf import checkpoints, model_card
from tests.commands import run, trained


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the workdir of a finished run, evaluated and exported."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trained(root)
        before = (root / "run/checkpoints" / model_card.FILE).read_text()
        assert "has not been evaluated" in before
        run("--workdir=run --mode=evaluate")
        run("--workdir=run --mode=export")
    return root / "run"


def card(folder):
    return (folder / model_card.FILE).read_text()


def code(text):
    return re.search(r"```python\n(.*?)\n```", text, re.DOTALL).group(1)


def rows(text):
    """Returns {first cell: other cells} of all tables."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize("place", ["checkpoints", "export/1/assets.extra"])
def test_a_card_has_the_results_the_config_and_the_versions(place, workdir):
    text = card(workdir / place)
    cells = rows(text)
    estimates = json.loads((workdir / "results.json").read_text())["estimates"]
    assert estimates
    for name, estimate in estimates.items():
        mean, error, count = cells[name]
        assert mean == f"{estimate['mean']:.4f}"
        assert error == f"{estimate['standard_error']:.4f}"
        assert int(count) == estimate["count"]
    assert cells["training data"] == ["digits"]
    assert cells["method"] == ["vae"]
    assert cells["tensorflow"] == [tf.__version__]
    assert cells["avb_tf"] == [avb_tf.__version__]
    config = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL).group(1))
    saved = json.loads((workdir / "config.json").read_text())
    assert config == {name: value for name, value in saved.items() if name != "sha256"}


@pytest.mark.parametrize(
    ("place", "shape"), [("checkpoints", (100, 3, 2)), ("export/1/assets.extra", (3, 2))]
)
def test_the_code_of_a_card_runs(place, shape, workdir, monkeypatch):
    *lines, last = code(card(workdir / place)).splitlines()
    monkeypatch.chdir(workdir / place.removesuffix("1/assets.extra"))
    names = {"x": tf.zeros([3, 8, 8, 1])}
    exec("\n".join([*lines, f"result = {last}" if "=" not in last.split("(")[0] else last]), names)
    z = names["z"] if "z" in names else names["result"]["z"]
    assert z.shape == shape


def test_a_damaged_results_file_does_not_stop_a_checkpoint(workdir, tmp_path):
    model = checkpoints.load(workdir)
    (tmp_path / "results.json").write_text("{")
    checkpoints.save(model, tmp_path, keep=1)
    assert "has not been evaluated" in card(tmp_path / "checkpoints")


# Loading.


def test_a_model_loads_from_a_workdir_a_file_and_a_folder(workdir, tmp_path):
    expected = avb_tf.load_model(workdir)
    file = checkpoints.latest(workdir)
    expected.save(tmp_path / "folder", zipped=False)
    x = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    for path in (str(workdir), file, str(file), tmp_path / "folder"):
        model = avb_tf.load_model(path)
        assert int(model.step.numpy()) == 20
        np.testing.assert_array_equal(model.encode(x, 2), expected.encode(x, 2))
        assert int(model.optimizer.iterations.numpy()) == 20


@pytest.mark.parametrize(
    ("path", "expected"),
    [("nothing", "nothing"), ("nothing.keras", "nothing.keras"), ("", "no checkpoint")],
)
def test_a_path_without_a_model_gives_one_line(path, expected, tmp_path):
    with pytest.raises(avb_tf.UserError, match=expected) as error:
        avb_tf.load_model(tmp_path / path)
    assert "\n" not in str(error.value)
