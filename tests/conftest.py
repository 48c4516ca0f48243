import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # its log goes past pytest's capture
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # tests run two at a time, and their layers are small

from pathlib import Path

import pytest

from tests import linear_gaussian as linear_gaussian_model


@pytest.fixture
def linear_gaussian(monkeypatch):
    """A model with a closed form of log p(x): (model, distribution of x)."""
    return linear_gaussian_model.make(monkeypatch)


@pytest.fixture(scope="session")
def artefacts():
    """Where screenshots are kept."""
    return Path(os.environ.get("AVB_TF_ARTEFACTS", "runs/artefacts")).absolute()
