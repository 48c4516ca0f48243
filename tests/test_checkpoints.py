"""Tests checkpoints: rotation, damaged files, atomic writes, and loading without running code."""

import io
import json
import os
import pickle
import resource
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest

from avb_tf import archives, build, checkpoints, model_card
from avb_tf.errors import UserError

STEPS = (1, 2, 10)


@pytest.fixture(scope="module")
def model():
    model = build(
        "avb_ac", (8, 8, 1), latent_dim=2, width=8, adversary_width=8, bases=4, basis_width=8
    )
    model.compile()
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Returns a workdir with checkpoints at `STEPS`."""
    workdir = tmp_path_factory.mktemp("saved")
    for step in STEPS:
        model.step.assign(step)
        checkpoints.save(model, workdir, keep=len(STEPS))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def path(workdir, step):
    return workdir / f"checkpoints/step_{step:09d}.keras"


def names(workdir):
    names = sorted(file.name for file in (workdir / "checkpoints").iterdir())
    return [name for name in names if name != model_card.FILE]


def test_only_the_newest_checkpoints_are_kept(model, workdir):
    model.step.assign(11)
    kept = checkpoints.save(model, workdir, keep=2)
    assert kept == path(workdir, 11)
    assert names(workdir) == [path(workdir, 10).name, path(workdir, 11).name]


def test_the_checkpoint_before_is_kept_until_the_next(model, workdir):
    model.step.assign(11)
    checkpoints.save(model, workdir, keep=1)
    assert names(workdir) == [path(workdir, 10).name, path(workdir, 11).name]


def test_steps_of_ten_digits_are_newer_than_those_of_nine(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (999_999_999, 1_000_000_000):
        path(tmp_path, step).touch()
    assert checkpoints.newest_step(tmp_path) == 1_000_000_000
    assert checkpoints._paths(tmp_path) == [path(tmp_path, s) for s in (10**9, 10**9 - 1)]


def test_a_link_in_place_of_the_partial_file_is_not_followed(model, workdir):
    (workdir / "kept").write_text("kept")
    (workdir / "checkpoints/partial.keras").symlink_to(workdir / "kept")
    model.step.assign(11)
    checkpoints.save(model, workdir, keep=2)
    assert (workdir / "kept").read_text() == "kept"


def test_a_checkpoint_that_vanishes_while_it_is_loaded_is_left_to_the_next(workdir, monkeypatch):
    """This happens when another process trains and deletes its old checkpoints."""
    load = keras.models.load_model

    def load_late(file, **arguments):
        if file == path(workdir, 10):
            file.unlink()
        return load(file, **arguments)

    monkeypatch.setattr(keras.models, "load_model", load_late)
    assert int(checkpoints.load(workdir).step.value) == 2


def test_a_workdir_that_is_gone_is_not_made_again(model, tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*gone is gone"):
        checkpoints.save(model, tmp_path / "gone", keep=1)
    assert not list(tmp_path.iterdir())


def test_unrelated_files_are_not_deleted(model, workdir):
    (workdir / "checkpoints/step_best.keras").write_text("mine")
    checkpoints.save(model, workdir, keep=1)
    assert (workdir / "checkpoints/step_best.keras").read_text() == "mine"


def test_a_loaded_model_equals_the_saved_one(model, saved):
    model.step.assign(STEPS[-1])
    loaded = checkpoints.load(saved)
    for variables in ("variables", "optimizer.variables", "adversary_optimizer.variables"):
        pairs = zip(_get(model, variables), _get(loaded, variables), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model.sample(3, seed=0), loaded.sample(3, seed=0))


def _get(model, name):
    for part in name.split("."):
        model = getattr(model, part)
    return model


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_renamed(workdir, caplog, damage):
    damage(path(workdir, 10))
    damaged = path(workdir, 10).read_bytes()
    with caplog.at_level("WARNING", "absl"):
        assert checkpoints.latest(workdir) == path(workdir, 2)
    assert f"{path(workdir, 10)} is damaged" in caplog.text
    assert path(workdir, 10).with_suffix(".damaged").read_bytes() == damaged
    assert int(checkpoints.load(workdir).step.value) == 2


def test_no_checkpoint_is_renamed_if_all_are_damaged(workdir):
    for step in STEPS:
        truncate(path(workdir, step))
    before = names(workdir)
    with pytest.raises(UserError, match="only damaged"):
        checkpoints.latest(workdir)
    assert names(workdir) == before


def test_a_run_without_checkpoints(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.load(tmp_path)


def test_a_failed_save_keeps_the_other_checkpoints(model, workdir, monkeypatch):
    def full_disk(file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    before = {file: file.read_bytes() for file in (workdir / "checkpoints").iterdir()}
    model.step.assign(11)
    monkeypatch.setattr(model, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(model, workdir, keep=1)
    assert {file: file.read_bytes() for file in (workdir / "checkpoints").iterdir()} == before


# Checkpoints are untrusted: no code in them may run.


def _lambda():
    layer = keras.layers.Lambda(lambda x: x, output_shape=(2,))
    return keras.saving.serialize_keras_object(layer)


def _function(module, name):
    return {
        "module": module, "class_name": "function", "config": name, "registered_name": name,
    }  # fmt: skip


@pytest.mark.parametrize(
    "part", [_lambda(), _function("os", "system"), _function("subprocess", "run")]
)
def test_code_in_a_checkpoint_is_refused(workdir, part):
    with zipfile.ZipFile(path(workdir, 10)) as archive:
        config = json.loads(archive.read("config.json"))
    config["config"]["encoder"]["config"]["trunk"] = part
    _replace(path(workdir, 10), "config.json", json.dumps(config).encode())
    with pytest.raises(UserError, match=r"cannot be loaded.*(Lambda|deserialized)"):
        checkpoints.load(workdir)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_a_pickle_is_not_unpickled(workdir, tmp_path, member):
    _replace(path(workdir, 10), member, pickle.dumps(_Touch(str(tmp_path / "touched"))))
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(workdir)
    assert not (tmp_path / "touched").exists()


def _huge_h5(claimed):
    """Returns an HDF5 file with a dataset that claims `claimed` numbers and stores none."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("vars/0", [claimed], "f4", chunks=(1024,))
    return buffer.getvalue()


HOSTILE = {
    "huge dataset": ("model.weights.h5", _huge_h5(10**13), "cannot be loaded"),
    "deep config": ("config.json", b"[" * 100_000, "cannot be loaded"),
    "outside": ("../evil.txt", b"evil", "lies outside the archive"),
    "absolute": ("/tmp/evil.txt", b"evil", "lies outside the archive"),
    "bomb": ("assets/zeros", bytes(2**26), "would expand to"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_in_bounded_memory(workdir, monkeypatch, case):
    member, content, message = HOSTILE[case]
    monkeypatch.setattr(archives, "FREE", 2**20)
    file = path(workdir, 10)
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()} | {member: content}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load_model(file)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert not (workdir / "evil.txt").exists()


def test_another_model_is_refused(workdir):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path(workdir, 10))
    with pytest.raises(UserError, match="a Sequential"):
        checkpoints.load(workdir)


class _Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def _replace(file, member, content):
    """Replaces one member of the archive by `content`, with a valid checksum."""
    changed = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == member else old.read(name))
    file.write_bytes(changed.getvalue())
