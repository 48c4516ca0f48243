"""Tests the comparison of runs: seeds are grouped, and methods are paired by example."""

import json

import numpy as np
import pytest
import tensorflow as tf

from avb_tf import command_line, results
from avb_tf.commands import compare
from avb_tf.figures import training as training_curves

X = np.random.default_rng(0).random((40, 3)).astype(np.float32)


def make(directory, method="vae", seed=0, shift=0.0, data="digits", x=X, **changes):
    """Writes a finished run; its log p(x) is that of `vae` with seed 0 plus a shift and noise."""
    noise = np.random.default_rng(seed).normal(0.0, 0.01, len(x))
    values = 10.0 * x[:, 0] + shift + noise
    directory.mkdir(parents=True)
    estimates = {
        "elbo": results.estimate(values - 1.0),
        "log_likelihood_ais": results.estimate(values),
    }
    content = {name: 0 for name in results.FIELDS} | {
        "method": method, "data": data, "event_shape": [3], "split": "test", "step": 7,
        "family": method, "estimates": estimates, **changes,
    }  # fmt: skip
    results.save(directory, content)
    results.save_values(directory, x, {"log_likelihood_ais": values})


def compared(directory):
    command_line.main(["avb-tf", f"--workdir={directory}", "--mode=compare"])
    return json.loads((directory / "comparison.json").read_text())


def test_seeds_are_grouped_and_methods_paired_by_example(tmp_path, capsys):
    for seed in range(3):
        make(tmp_path / "mnist" / f"vae-{seed}", seed=seed)
        make(tmp_path / "mnist" / f"avb-{seed}", "avb", 10 + seed, shift=0.5)
    make(tmp_path / "other", data="other")
    rows = {(row["data"], row["method"]): row for row in compared(tmp_path)}
    avb = rows["digits", "avb"]
    assert avb["seeds"] == 3
    assert avb["log_likelihood"]["over"] == "seeds"
    # Examples differ by about 3 nats, but means over seeds and pairs only by 0.01 / sqrt(40).
    assert avb["log_likelihood"]["standard_error"] < 0.01
    assert avb["above_vae"]["mean"] == pytest.approx(0.5, abs=0.01)
    assert 0.0 < avb["above_vae"]["standard_error"] < 0.01
    assert rows["digits", "vae"]["above_vae"] is None
    assert rows["other", "vae"]["seeds"] == 1
    assert rows["other", "vae"]["log_likelihood"]["over"] == "examples"
    assert rows["other", "vae"]["log_likelihood"]["standard_error"] > 0.3
    table = (tmp_path / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    assert "| +0." in table
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_training_curves_are_drawn_for_each_data_set(tmp_path):
    for data in ("digits", "tfds:mnist", "untrained"):
        make(tmp_path / data.replace(":", "-"), data=data)
    for name in ("digits", "tfds-mnist"):
        writer = tf.summary.create_file_writer(str(tmp_path / name / "logs" / "validation"))
        for step in (1, 2):
            with writer.as_default(step):
                tf.summary.scalar(training_curves.BOUND, -1.0 / step)
        writer.close()
    compared(tmp_path)
    figures = {path.name for path in tmp_path.glob("training_*.png")}
    assert figures == {"training_digits.png", "training_tfds_mnist.png"}


def test_only_common_examples_are_paired(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", "avb", x=X[10:], shift=1.0)
    rows = {row["method"]: row for row in compared(tmp_path)}
    assert rows["avb"]["above_vae"]["count"] == 30
    make(tmp_path / "c", "iaf", x=X + 1.0)
    assert {row["method"]: row for row in compared(tmp_path)}["iaf"]["above_vae"] is None


def test_duplicate_examples_are_paired_one_by_one(tmp_path):
    x = X[np.repeat(np.arange(10), 4)]
    make(tmp_path / "a", x=x)
    make(tmp_path / "b", "avb", x=x, shift=1.0)
    assert {row["method"]: row for row in compared(tmp_path)}["avb"]["above_vae"]["count"] == 40


def test_another_configuration_is_another_row(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", family="wider")
    make(tmp_path / "c", split="train")
    assert len(compared(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["results", "values"])
def test_damaged_results_are_ignored(tmp_path, damage):
    make(tmp_path / "a")
    make(tmp_path / "b", "avb")
    file = results.FILE if damage == "results" else f"{results.EVALUATION}/{results.VALUES}"
    (tmp_path / "b" / file).write_bytes(b"nonsense")
    rows = compared(tmp_path)
    assert [row["method"] for row in rows] == (["vae"] if damage == "results" else ["avb", "vae"])
    assert rows[0].get("above_vae") is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workdir={}"], "holds no finished runs"),
        ([], "takes only --workdir=DIR"),
        (["--workdir={}", "--config=configs/digits.py"], "found --config=configs/digits.py"),
        (["--workdir={}", "stray"], "found stray"),
        (["--workdir={}", "--config.steps=3"], "found --config.steps=3"),
    ],
)
def test_a_mistake_gives_one_line(tmp_path, capsys, flags, said):
    argv = ["avb-tf", "--mode=compare", *(flag.format(tmp_path) for flag in flags)]
    with pytest.raises(SystemExit) as error:
        command_line.main(argv)
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_standard_error_of_a_difference_covers_the_true_value():
    generator, inside = np.random.default_rng(0), 0
    for _ in range(200):
        examples = generator.normal(0.0, 3.0, 60)

        def side(shift, examples=examples):
            return [
                compare.EvaluatedRun("", {"method": ""}, {
                    "example": np.arange(60),
                    "e": examples + shift + generator.normal(0, 0.2) + generator.normal(0, 0.5, 60),
                })
                for _ in range(4)
            ]  # fmt: skip

        difference = compare._paired(side(0.3), side(0.0), "e")
        inside += abs(difference["mean"] - 0.3) < 2.0 * difference["standard_error"]
    assert inside / 200 > 0.88  # a normal distribution would have 0.95; there are few seeds
