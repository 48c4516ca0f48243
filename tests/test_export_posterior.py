"""Tests exports of fitted posteriors in the C library against the fits they came from."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import command_line
from avb_tf.serving.saved_model import RunError, SavedModel

CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 64)
MODEL = """
import numpy as np
from tensorflow_probability import distributions as tfd

def model():
    joint = tfd.JointDistributionNamed({
        "rate": tfd.Gamma(2.0, 1.0), "n": lambda rate: tfd.Sample(tfd.Poisson(rate), 3)
    })
    return joint, {"n": np.array([1.0, 3.0, 2.0], np.float32)}
"""


@pytest.fixture(scope="module")
def fit():
    zero, one, two = np.float64([0.0, 1.0, 2.0])
    joint = tfd.JointDistributionNamed(
        {
            "rate": tfd.Gamma(two, one),
            "loc": tfd.Sample(tfd.Normal(zero, one), 2),
            "n": lambda rate: tfd.Sample(tfd.Poisson(rate), 3),
        }
    )
    return avb_tf.fit_posterior(
        joint, {"n": np.array([1.0, 3.0, 2.0])}, steps=50, verbose=False, draws=128,
        adversary_steps=1, blocks=1, chart_steps=1, chart_width=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(fit, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    return SavedModel(fit.export(directory, max_batch=100, name="rate"))


def by_the_fit(fit, seeds):
    size = fit.model.encoder.noise_dim
    pairs = [tf.constant([seed, 0], tf.int64) for seed in seeds]
    noise = tf.stack([tf.random.stateless_normal([size], pair, alg="philox") for pair in pairs])
    return fit.constrain(fit.model.averaged_encoder.z(noise))


def test_draws_are_those_of_the_fit_by_name_and_in_its_dtype(fit, served):
    answer = served.run("sample_seeded", {"seed": SEEDS})
    expected = by_the_fit(fit, SEEDS)
    assert set(answer) == {"rate", "loc"}
    for name, values in answer.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-5)


def test_a_row_is_answered_alike_in_batches_of_1_7_and_64(served):
    full = served.run("sample_seeded", {"seed": SEEDS})
    for rows in (slice(3, 4), slice(1, 8)):
        for name, values in served.run("sample_seeded", {"seed": SEEDS[rows]}).items():
            np.testing.assert_allclose(values, full[name][rows], rtol=1e-6, atol=1e-6)


def test_draws_without_a_seed_are_fresh(served):
    first, second = (served.run("sample", {"row": np.arange(8)})["loc"] for _ in range(2))
    assert len(np.unique(np.concatenate([first, second]))) == 32


def test_too_many_rows_are_refused(served):
    with pytest.raises(RunError, match="at most 100"):
        served.run("sample", {"row": np.arange(101)})


def test_an_export_of_a_loaded_fit_answers_alike(fit, served, tmp_path):
    fit.save(tmp_path / "fit")
    path = avb_tf.load_posterior(tmp_path / "fit").export(tmp_path / "export")
    again = SavedModel(path).run("sample_seeded", {"seed": SEEDS})
    for name, values in served.run("sample_seeded", {"seed": SEEDS}).items():
        np.testing.assert_allclose(again[name], values, rtol=1e-6, atol=1e-6)


def test_from_the_command_line(tmp_path, capsys):
    (tmp_path / "model.py").write_text(MODEL)
    run = f"--workdir={tmp_path / 'run'}"
    config = [f"--config={CONFIGS}/posteriors.py", f"--config.model={tmp_path}/model.py:model"]
    small = ["--config.steps=25", "--config.seconds=0.0", "--config.fit.draws=64"]
    command_line.main(["avb-tf", *config, *small, run])
    command_line.main(["avb-tf", run, "--mode=export"])
    command_line.main(["avb-tf", run, "--mode=serve_check"])
    assert "2 signatures" in capsys.readouterr().out


def test_a_run_that_was_not_trained_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "model.py").write_text(MODEL)
    config = [f"--config={CONFIGS}/posteriors.py", f"--config.model={tmp_path}/model.py:model"]
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["avb-tf", *config, f"--workdir={tmp_path / 'run'}", "--mode=export"])
    assert exit_.value.code == 2
    assert "has no fit; train it first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
