import json

import pytest

from avb_tf import configuration
from avb_tf.benchmarks import scaling
from avb_tf.likelihood_estimation import ais

CONFIG = configuration.default("avb_ac", latent_dim=2, width=8, bases=3, adversary_width=8)


def points(power):
    return [{"value": v, "seconds": 1e-3 * v**power} for v in (2, 4, 8, 16, 32)]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_is_that_of_a_power(power):
    assert scaling.exponent(points(power), "seconds") == pytest.approx(power)


def test_every_size_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "STEP", {("model.draws", "model.adversary_draws"): (1, 2)})
    monkeypatch.setattr(scaling, "AIS", {})
    scaling.scaling(CONFIG, tmp_path)
    measured = json.loads((tmp_path / scaling.FILE).read_text())
    assert [p["value"] for p in measured["model.draws"]] == [1, 2]
    assert all(p["seconds"] > 0 and p["megabytes"] > 100 for p in measured["model.draws"])
    assert (tmp_path / "figures" / "scaling.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "shape"), [("temperatures", (2, 8)), ("chains", (50, 2))], ids=scaling.AIS
)
def test_the_measured_size_of_ais_is_the_size_that_runs(monkeypatch, name, shape):
    sizes = []  # (temperatures, chains) of each call

    class Recorded(ais.AnnealedSampler):
        def forward(self, x, *args, **kwargs):
            result = super().forward(x, *args, **kwargs)
            sizes.append((len(result.acceptance), len(result.log_weights)))
            return result

    monkeypatch.setattr(ais, "AnnealedSampler", Recorded)
    scaling._ais(configuration.resolve(CONFIG), (8, 8, 1), (name,), 2)
    assert set(sizes) == {shape}
