"""Tests the comparison of runs: seeds are grouped, and methods are paired by example."""

import json

import numpy as np
import pytest
import tensorflow as tf

from avb_tf import command_line, results
from avb_tf.commands import compare
from avb_tf.figures import comparison as comparison_figures
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
    table, printed = (tmp_path / "comparison.md").read_text(), capsys.readouterr().out
    assert table in printed
    assert printed.splitlines()[-1] == str(tmp_path / "comparison.png")
    assert "| +0." in table
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def sentences(directory):
    """The lines below the table."""
    compared(directory)
    lines = (directory / "comparison.md").read_text().splitlines()
    return [line for line in lines if not line.startswith("|") and line][1:]


def test_the_end_says_which_method_is_better_and_how_sure_that_is(tmp_path):
    noise = np.random.default_rng(1).normal(0.0, 0.5, 40)
    for method, shift in (("vae", 0.0), ("avb", 0.4), ("iaf", 0.03), ("aae", -2.0)):
        make(tmp_path / method, method)
        values = 10.0 * X[:, 0] + (0.0 if method == "vae" else shift + noise)
        results.save_values(tmp_path / method, X, {"log_likelihood_ais": values})
    error = np.std(noise, ddof=1) / np.sqrt(40)
    avb, iaf, aae = (shift + noise.mean() for shift in (0.4, 0.03, -2.0))
    assert abs(iaf) < 2 * error < abs(avb)
    of = "(paired over 40 examples, one seed each, by ais)"
    assert sentences(tmp_path)[:3] == [
        f"digits (test): log p(x) of avb is {avb:.3f} +- {error:.3f} nats above vae: "
        f"{avb / error:.1f} standard errors {of}",
        f"digits (test): log p(x) of iaf is {abs(iaf):.3f} +- {error:.3f} nats "
        f"{'above' if iaf > 0 else 'below'} vae: {abs(iaf) / error:.1f} standard errors, no clear "
        f"difference {of}",
        f"digits (test): log p(x) of aae is {-aae:.3f} +- {error:.3f} nats below vae: "
        f"{-aae / error:.1f} standard errors {of}",
    ]


def test_warnings_stand_beside_the_number(tmp_path):
    pareto = "log_likelihood_ais: Pareto k is above 0.7 for 40% of the examples"
    make(tmp_path / "vae")
    for seed in (1, 2):
        make(tmp_path / f"avb-{seed}", "avb", seed, 0.5, warnings=[pareto])
    make(tmp_path / "alone", data="faces", warnings=["a reason"])
    said = sentences(tmp_path)
    assert said[0].startswith("digits (test): log p(x) of avb is 0.5")
    assert "(paired over 40 examples, 2 and 1 seeds, by ais)" in said[0]
    assert said[1:3] == [f"  warning, avb-1: {pareto}", f"  warning, avb-2: {pareto}"]
    assert said[3].startswith("faces (test): nothing to compare log p(x) of vae with")
    assert said[4] == "  warning, alone: a reason"


def test_of_several_vaes_the_best_is_the_baseline(tmp_path):
    make(tmp_path / "narrow", family="narrow")
    make(tmp_path / "wide", family="wide", shift=1.0)
    make(tmp_path / "avb", "avb", shift=1.5)
    rows = {row["label"]: row for row in compared(tmp_path)}
    assert rows.keys() == {"vae (narrow)", "vae (wide)", "avb"}
    assert rows["vae (wide)"]["above_vae"] is None
    assert rows["avb"]["baseline"] == rows["vae (narrow)"]["baseline"] == ["wide"]
    assert rows["avb"]["above_vae"]["mean"] == pytest.approx(0.5, abs=0.01)
    assert rows["vae (narrow)"]["above_vae"]["mean"] == pytest.approx(-1.0, abs=0.01)


def test_equal_values_are_no_difference(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", "avb")
    assert (
        "is 0.000 +- 0.000 nats below vae: 0.0 standard errors, no clear" in sentences(tmp_path)[0]
    )


def test_the_figure_draws_the_paired_differences(tmp_path):
    make(tmp_path / "vae")
    make(tmp_path / "avb", "avb", 1, shift=0.5)
    make(tmp_path / "alone", "iaf", data="faces")
    rows = compared(tmp_path)
    figure = comparison_figures.log_likelihoods(rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "digits (test): log p(x) minus that of vae"
    differences = figure.axes[0].lines
    row = next(row for row in rows if row["method"] == "avb")
    means = [line.get_xdata()[0] for line in differences if line.get_marker() == "o"]
    assert means == [row["above_vae"]["mean"]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["avb (1)"]
    assert "no other method" in figure.axes[1].texts[0].get_text()
    widths = [
        np.ptp(np.concatenate(bars.get_segments())[:, 0]) for bars in figure.axes[0].collections
    ]
    error = row["above_vae"]["standard_error"]
    np.testing.assert_allclose(sorted(widths), [2 * error, 4 * error])


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
