"""Tests diagnostics on weights with known tails."""

import subprocess
import sys

import numpy as np
import pytest

from avb_tf import diagnostics


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_of_pareto_weights_is_their_shape(k):
    # If U is uniform, U^-k has a Pareto tail of shape k.
    log_weights = -k * np.log(np.random.default_rng(0).uniform(size=(20_000, 8)))
    shapes = diagnostics.pareto_k(log_weights)
    assert shapes.shape == (8,)
    assert abs(shapes.mean() - k) < 0.05


@pytest.mark.parametrize(("width", "flagged"), [(0.5, True), (1.0, False), (1.3, False)])
def test_a_proposal_half_too_narrow_is_flagged(width, flagged):
    # The target is N(0, I) in eight dimensions, the proposal N(0, width^2 I).
    z = width * np.random.default_rng(0).standard_normal((5000, 20, 8))
    log_weights = np.sum(-0.5 * z**2 + 0.5 * (z / width) ** 2, -1)
    k = diagnostics.pareto_k(log_weights)
    assert ((k > diagnostics.PARETO_K_LIMIT) == flagged).all()


def test_pareto_k_without_a_tail():
    log_weights = np.random.default_rng(0).standard_normal((100, 5))
    log_weights[:, 0] = 3.0
    log_weights[7, 1:4] = np.nan, np.inf, -np.inf
    k = diagnostics.pareto_k(log_weights)
    assert k[0] == 0.0
    assert np.isinf(k[1:3]).all()
    assert np.isfinite(k[3:]).all()
    assert np.isnan(diagnostics.pareto_k(log_weights[:16])).all()


def test_pareto_k_of_one_enormous_weight_is_large_and_no_warning():
    log_weights = 0.01 * np.random.default_rng(0).standard_normal(10_000)
    log_weights[3] = 30.0
    assert diagnostics.pareto_k(log_weights) > diagnostics.PARETO_K_LIMIT


def test_effective_sample_size():
    log_weights = np.full((10, 3), -1000.0)
    log_weights[:5, 1] = -np.inf
    log_weights[0, 2] = 0.0
    np.testing.assert_allclose(diagnostics.effective_sample_size(log_weights), [10, 5, 1])


def test_arviz_is_imported_on_first_use_without_a_warning():
    code = (
        "import sys, warnings; warnings.simplefilter('error', FutureWarning)\n"
        "from avb_tf import diagnostics\n"
        "assert 'arviz' not in sys.modules\n"
        "diagnostics.pareto_k([[float(i % 7)] for i in range(50)])\n"
        "assert 'arviz' in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
