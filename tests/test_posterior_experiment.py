import json

import numpy as np
import pytest
from scipy import stats

from avb_tf import UserError
from avb_tf.posteriors import comparison, experiment, overview
from avb_tf.settings import posterior

MODEL = """
import numpy as np
from avb_tf.posteriors.models import Problem

def normal():
    return Problem(
        lambda x: -0.5 * x[..., 0] ** 2,
        shape=[1],
        exact=lambda count, seed: np.random.default_rng(seed).normal(size=[count, 1]),
        statistics=lambda x: {"share above 0": np.mean(x > 0)},
        log_evidence=0.919,
    )
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Returns a directory with two evaluated seeds of one model."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "model.py").write_text(MODEL)
    for seed in (0, 1):
        config = posterior.config(f"{directory / 'model.py'}:normal")
        config.update(seed=seed, steps=50, seconds=0.0)
        config.fit.update(draws=128, adversary_steps=1, blocks=1, chart_steps=0)
        config.eval.update(draws=200, nuts_draws=50, gaussian_steps=1000)
        config.eval.reference = str(directory / "references")
        experiment.train_and_evaluate(config, directory / f"normal-{seed}")
    return directory


def test_a_fit_stands_beside_gaussians_and_nuts(evaluated):
    record = json.loads((evaluated / "normal-0" / "results.json").read_text())
    assert record["diagnostics"]["verdict"] == "trust"
    assert record["reference"] == "exact"
    methods = ["mean-field VI", "full-rank VI", "NUTS", "exact, again"]
    assert list(record["methods"]) == ["fit", *methods]
    for measures in record["methods"].values():  # with 400 draws C2ST has a standard error of 0.025
        assert measures["c2st"] == pytest.approx(0.5, abs=0.1)
        assert measures["sliced_wasserstein"] < 0.5
    shares = record["statistics"]["share above 0"]
    assert shares["fit"] == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(200))
    assert record["log_evidence"]["value"] == pytest.approx(
        record["log_evidence"]["exact"], abs=0.01
    )
    assert (evaluated / "normal-0" / "figures" / "pairs.png").exists()
    assert (evaluated / "normal-0" / "posterior.nc").exists()


def test_all_seeds_share_what_they_are_compared_with(evaluated):
    both = [
        json.loads((evaluated / f"normal-{seed}" / "results.json").read_text())["methods"]
        for seed in (0, 1)
    ]
    assert both[0]["NUTS"] == both[1]["NUTS"]
    assert both[0]["fit"] != both[1]["fit"]
    assert sorted(path.name for path in (evaluated / "references").iterdir()) == [
        "normal.json", "normal.npz",
    ]  # fmt: skip


def test_one_table_of_all_models_and_seeds(evaluated, capsys):
    from avb_tf.commands.compare import compare

    compare(None, evaluated)
    table = (evaluated / "posteriors.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| normal")]
    assert [row.split("|")[2].strip() for row in rows] == ["0", "1"]
    assert all("trust" in row for row in rows)
    assert table.splitlines()[0] in capsys.readouterr().out
    assert len(json.loads((evaluated / "posteriors.json").read_text())) == 2
    assert overview.find(evaluated / "references") == []


def test_a_workdir_without_a_fit(tmp_path):
    with pytest.raises(UserError, match="has no fit"):
        experiment.evaluate(posterior.config("model.py:normal"), tmp_path)


def test_the_measures_between_halves_of_the_same_draws_and_of_shifted_ones():
    x = np.random.default_rng(0).normal(size=[1200, 2])
    same, apart = comparison.compare(x[:600], x[600:]), comparison.compare(x[:600] + 2.0, x[600:])
    assert 0.44 < same["c2st"] < 0.56
    assert same["sliced_wasserstein"] < 0.15
    assert abs(same["mmd2"]) < 0.01
    assert apart["sliced_wasserstein"] == pytest.approx(2.0, abs=0.2)
    # The Gaussians are 2 sqrt(2) apart, so the best classifier has an accuracy of Phi(sqrt 2).
    assert apart["c2st"] == pytest.approx(stats.norm.cdf(np.sqrt(2.0)), abs=0.03)
    table = comparison.table({"fit": same, "other": apart})
    assert len(table.splitlines()) == 4
    assert json.dumps(same)
