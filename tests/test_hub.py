"""Tests that a model downloaded from a local double of the Hub equals the uploaded model."""

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import keras
import numpy as np
import pytest

import avb_tf
from avb_tf import checkpoints
from tests.commands import trained


class Hub(ModuleType):
    """A local folder with the interface that the documentation of huggingface_hub describes."""

    def __init__(self, root):
        super().__init__("huggingface_hub")
        self.root = root
        self.HfApi = lambda library_name=None, library_version=None: self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        owner, _, name = repo_id.partition("/")
        if owner != "me" or not name:
            raise PermissionError(f"403 Forbidden\nfor {repo_id}")
        Path(self.root, repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id, private=private)

    def upload_folder(self, *, repo_id, folder_path, commit_message=None):
        shutil.copytree(folder_path, Path(self.root, repo_id), dirs_exist_ok=True)
        return f"https://hub.example/{repo_id}/tree/main"

    def snapshot_download(self, repo_id, *, revision=None, library_name=None, library_version=None):
        if not Path(self.root, repo_id, revision or "").is_dir():
            raise FileNotFoundError(f"404 Client Error.\nRepository Not Found: {repo_id}")
        return str(Path(self.root, repo_id, revision or ""))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    double = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", double)
    return double


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trained(root)
    return root / "run"


X = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)


def test_a_downloaded_model_equals_the_uploaded_one(hub, workdir):
    address = avb_tf.push_to_hub(workdir, "me/digits")
    assert address.endswith("me/digits/tree/main")
    assert "hf://me/digits" in (hub.root / "me/digits/README.md").read_text()
    model = avb_tf.from_hub("me/digits")
    expected = checkpoints.load(workdir)
    np.testing.assert_array_equal(model.encode(X, 2), expected.encode(X, 2))
    assert int(model.optimizer.iterations.numpy()) == 20


def test_keras_loads_an_uploaded_model(hub, workdir):
    avb_tf.push_to_hub(checkpoints.latest(workdir), "me/digits")
    model = keras.saving.load_model(hub.root / "me/digits")
    np.testing.assert_array_equal(model.encode(X), checkpoints.load(workdir).encode(X))


def test_a_model_that_keras_saved_as_a_folder_is_uploaded(hub, workdir, tmp_path):
    checkpoints.load(workdir).save(tmp_path / "folder", zipped=False)  # with Keras's config.json
    avb_tf.push_to_hub(tmp_path / "folder", "me/digits")
    card = (hub.root / "me/digits/README.md").read_text()
    assert "This model has not been evaluated" in card
    np.testing.assert_array_equal(
        avb_tf.from_hub("me/digits").encode(X), checkpoints.load(workdir).encode(X)
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda workdir: avb_tf.push_to_hub(workdir, "other/digits"),
        lambda workdir: avb_tf.push_to_hub(workdir, "digits"),
        lambda workdir: avb_tf.from_hub("me/nothing"),
        lambda workdir: avb_tf.from_hub("me/nothing", revision="v1"),
    ],
)
def test_a_refusal_is_one_line(hub, workdir, call):
    with pytest.raises(avb_tf.UserError, match="the Hub refuses") as error:
        call(workdir)
    assert "\n" not in str(error.value)


def test_a_repository_without_a_model_is_refused(hub, workdir):
    (hub.root / "me/notes").mkdir(parents=True)
    (hub.root / "me/notes/README.md").write_text("notes")
    with pytest.raises(avb_tf.UserError, match="no checkpoint"):
        avb_tf.from_hub("me/notes")


def test_without_huggingface_hub_the_extra_is_named(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(avb_tf.UserError, match=r"avb_tf\[hub\]"):
        avb_tf.push_to_hub(workdir, "me/digits")
