"""Tests `evaluate` against independent computations."""

import json
import shutil

import numpy as np
import pytest

from avb_tf import UserError, checkpoints, command_line, results
from avb_tf.commands import evaluate, train
from avb_tf.data import digits as digits_data
from avb_tf.data import pipeline
from avb_tf.likelihood_estimation import estimates
from configs import digits

TINY = {"width": 16, "bases": 4, "basis_width": 8, "adversary_width": 16}


def config(method="avb_ac", **changes):
    config_of_run = digits.get_config(method)
    config_of_run.update({"steps": 20, "log_every": 10, "checkpoint_every": 20, "figures_every": 0})
    config_of_run.model.update(TINY | changes)
    config_of_run.eval.update({"grid": 40, "posteriors": 2, "subset": 3, "repeats": 1, "gap": 0})
    return config_of_run


def test_an_estimate_is_a_mean_with_its_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    summary = results.estimate(values, grid=7)
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["standard_error"] == pytest.approx(np.std(values, ddof=1) / 20)
    assert (summary["count"], summary["grid"]) == (400, 7)
    assert results.estimate([1.0])["standard_error"] == 0.0


def test_the_bound_is_the_mean_of_its_terms_for_every_chunk_size():
    model = train.create(config("vae"), (8, 8, 1))
    x = pipeline.examples(digits_data.load().test, 6, binary=True)
    posterior = model.posterior(x, samples=4000)
    logits = model.averaged_decoder(posterior.z)[..., 0].numpy()
    log_likelihood = (x * logits - np.logaddexp(0.0, logits)).sum((2, 3, 4))
    variance = np.asarray(posterior.scale_tril).diagonal(axis1=1, axis2=2) ** 2
    kl = 0.5 * (variance + np.asarray(posterior.mean) ** 2 - 1.0 - np.log(variance)).sum(1)
    expected = log_likelihood.mean(0) - kl
    error = log_likelihood.std(0) * np.sqrt(6 / estimates.ALL_DRAWS + 1 / 4000)
    for batch_size in (6, 4):
        bound, _ = estimates.bound(model, x, batch_size)
        assert (np.abs(bound.values - expected) < 5 * error).all()


AIS = {"temperatures": 10, "chains": 4, "leapfrog_steps": 3}


def test_more_latents_are_estimated_by_ais(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimates.chunks, "EXAMPLES", 2)
    monkeypatch.setattr(estimates.ais, "ROWS", 2 * AIS["chains"])
    changed = config("avb_ac", latent_dim=3)
    changed.eval.update({"subset": 5, "simulated": 4, "gap": 0})
    changed.eval.ais.update(AIS)
    evaluate.train_and_evaluate(changed, tmp_path)
    by_name = json.loads((tmp_path / results.FILE).read_text())["estimates"]
    annealed = by_name["log_likelihood_ais"]
    assert {k: annealed[k] for k in AIS} == AIS
    assert len(annealed["acceptance_by_temperature"]) == 10
    names = ["elbo_of_the_same_examples", "log_likelihood_ais"]
    names += [f"log_likelihood_iwae_{k}" for k in (1, 100, 5000)]
    for name in names:
        assert by_name[name]["count"] == 5
    # The model is untrained, so q is far from the posterior, and even a short AIS is above the
    # bound.
    assert annealed["mean"] > by_name["elbo_of_the_same_examples"]["mean"] - 1.0
    iwae = [by_name[f"log_likelihood_iwae_{k}"]["mean"] for k in (1, 100, 5000)]
    assert iwae[0] < iwae[1] < iwae[2]
    assert by_name["bdmc_gap"]["count"] == 4
    assert by_name["bdmc_gap"]["mean"] == pytest.approx(
        by_name["log_likelihood_simulated_bdmc_upper"]["mean"]
        - by_name["log_likelihood_simulated_bdmc_lower"]["mean"]
    )
    with np.load(tmp_path / "evaluation" / "per_example.npz", allow_pickle=False) as values:
        assert len(np.unique(values["example"])) == len(values["elbo_adversary"])
        for name in names:
            assert values[name].mean() == pytest.approx(by_name[name]["mean"])
    for name in ("convergence", "weights", "annealing"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Pareto k" in capsys.readouterr().out

    # An interrupted evaluation gives the same numbers, whichever chunks were finished.
    lost = list((tmp_path / "evaluation").glob("*/chunk_001.npz"))
    assert len(lost) == 3
    for file in lost:
        file.unlink()
    evaluate.evaluate(changed, tmp_path)
    again = json.loads((tmp_path / results.FILE).read_text())["estimates"]
    for name, before in by_name.items():
        assert again[name] | {"seconds": 0} == before | {"seconds": 0}, name


def test_a_quantised_likelihood_is_reported_in_bits_per_dimension_too(tmp_path):
    evaluate.train_and_evaluate(config("vae", likelihood="logistic"), tmp_path)
    estimates = json.loads((tmp_path / results.FILE).read_text())["estimates"]
    for name in ("elbo", "log_likelihood_quadrature"):
        bits = estimates[f"bits_per_dim_{name}"]
        assert bits["mean"] == pytest.approx(-estimates[name]["mean"] / (64 * np.log(2.0)))
        assert 0.0 < bits["standard_error"] < 1.0
    assert 0.0 < estimates["bits_per_dim_elbo"]["mean"] < 8.5  # a uniform distribution has 8


@pytest.mark.parametrize(
    ("best", "same", "subset", "warned"),
    [
        ("quadrature", -2.0, -1.0, False),  # the subset is easier than the rest
        ("quadrature", -1.0, -2.0, True),  # or harder
        ("quadrature", -1.0, None, True),  # no subset was evaluated
        ("ais", -1.0, -2.0, False),  # AIS is of the subset
        ("ais", -2.0, -1.0, True),
        ("iwae_5000", -2.0, -1.0, True),
    ],
)
def test_the_bound_is_set_against_log_p_of_the_same_examples(best, same, subset, warned):
    summaries = {"elbo_adversary": {"mean": same}, f"log_likelihood_{best}": {"mean": -1.5}}
    if subset is not None:
        summaries["elbo_of_the_same_examples"] = {"mean": subset}
    said = evaluate._warnings(summaries)
    expected = "the adversary's bound lies 0.50 nats above log p(x): the adversary is wrong, "
    assert said == ([f"{expected}so trust only log p(x)"] if warned else [])


@pytest.mark.parametrize("content", ["[]", "{}", "nonsense", '{"estimates": {}}'])
def test_other_files_next_to_a_run_are_ignored(tmp_path, content):
    run = {name: "same" for name in results.FIELDS}
    run |= {"event_shape": [2], "step": 1, "estimates": {}}
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        results.save(tmp_path / name, run | {"data": "other"} if name == "c" else run)
    (tmp_path / "b" / results.FILE).write_text(content)
    assert set(results.siblings(tmp_path / "a")) == {"a"}


def test_runs_without_checkpoints_stay_in_the_table(tmp_path, capsys):
    evaluate.train_and_evaluate(config("vae"), tmp_path / "vae")
    shutil.copytree(tmp_path / "vae", tmp_path / "aae", ignore=shutil.ignore_patterns("*.keras"))
    content = (tmp_path / "aae" / results.FILE).read_text()
    (tmp_path / "aae" / results.FILE).write_text(content.replace('"vae"', '"aae"'))
    capsys.readouterr()
    command_line.main(["avb-tf", f"--workdir={tmp_path}/vae", "--mode=evaluate"])
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("| nats per example"))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["aae", "vae"]


def test_a_diverging_run_stops_before_the_next_checkpoint(tmp_path):
    broken = config("vae")
    broken.optimizer.learning_rate, broken.optimizer.clip_norm = 1e6, 0.0
    broken.guard.patience, broken.guard.rollbacks = 4, 1
    with pytest.raises(UserError, match="learning_rate"):
        train.train(broken, tmp_path)
    for weight in checkpoints.load(tmp_path).weights:
        assert np.isfinite(weight.numpy()).all()
