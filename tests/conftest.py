import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # pytest does not capture its log
# Tests run two at a time, and their layers are small.
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from pathlib import Path

import numpy as np
import pytest

from tests import linear_gaussian as linear_gaussian_model

# Read here, since tests of the data remove the variable from their environment.
DATA_FOLDERS = (os.environ.get("AVB_TF_DATA_DIR"), Path(__file__).parents[2] / "shared/data")

# Files whose tests train, export or start processes; `make test-fast` leaves them out.
SLOW = (
    "ais", "amortised*", "baselines", "benchmarks_*", "checkpoints", "command_line", "compare",
    "draw", "estimates", "evaluate", "explore", "export*", "faults", "golden", "guard", "hub",
    "inference_gap", "loops", "mistakes", "model", "monitor", "posterior*", "precision", "replicas",
    "serving_*", "tensorboard", "train",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks all tests of the slow files."""
    for item in items:
        if any(item.path.match(f"test_{name}.py") for name in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def few_components():
    """Evaluations of two latents with fewer components; tests of the interval bring their own."""
    from avb_tf.likelihood_estimation import inference_gap

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference_gap, "PLANAR_COMPONENTS", inference_gap.COMPONENTS)
        yield


@pytest.fixture
def linear_gaussian(monkeypatch):
    """A model with a closed form of log p(x): (model, distribution of x)."""
    return linear_gaussian_model.make(monkeypatch)


@pytest.fixture(scope="session")
def artefacts():
    """Folder for screenshots."""
    return Path(os.environ.get("AVB_TF_ARTEFACTS", "runs/artefacts")).absolute()


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A file in MNIST's format: 1,500 and 297 handwritten digits of scikit-learn, enlarged."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.kron(pixels.reshape(-1, 8, 8) * 255 / 16, np.ones((1, 3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    path = tmp_path_factory.mktemp("mnist") / "mnist.npz"
    parts = {"train": slice(1500), "test": slice(1500, None)}
    x = {f"x_{name}": images[part] for name, part in parts.items()}
    y = {f"y_{name}": labels[part].astype(np.uint8) for name, part in parts.items()}
    np.savez(path, **x, **y)
    return path


@pytest.fixture(scope="session")
def full_mnist():
    """The full MNIST; skips without it."""
    files = [Path(folder) / "mnist.npz" for folder in DATA_FOLDERS if folder]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        pytest.skip("no mnist.npz in $AVB_TF_DATA_DIR or ../shared/data")
    return path


@pytest.fixture(params=["small", "full"])
def mnist_path(request):
    """Path of the small and of the full MNIST, in turn."""
    return request.getfixturevalue(f"{request.param}_mnist")
