"""The fault campaign in small: one or two faults of each kind, on a method without adversary."""

import random
import shutil
import signal

import pytest

from tests.campaigns import faults, jobs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "whole"
    status, error = jobs.Job(workdir, method="vae").finish()
    assert status == 0, error
    return workdir


@pytest.fixture
def chance():
    return random.Random(0)


def test_a_disturbed_run_ends_as_if_it_had_not_been(tmp_path, whole, chance):
    sent = [(signal.SIGTERM, "step"), (signal.SIGKILL, "save")]
    assert not list(faults.disturbed(tmp_path, whole, sent, chance, method="vae"))


def test_who_loses_a_worker_says_so_and_leaves(tmp_path, chance):
    assert not list(faults.lost_worker(tmp_path / "pair", 1, chance, method="vae"))


def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path, whole, chance):
    assert not list(faults.damaged(tmp_path, whole, faults.DAMAGES, chance))


def test_full_logs_are_one_line(tmp_path, whole):
    assert not list(faults.full_disks(tmp_path, whole, ["logs"], False, method="vae"))


def test_what_is_lost_is_found(tmp_path, whole):
    workdir = shutil.copytree(whole, tmp_path / "run")
    assert not list(jobs.losses(workdir, whole))
    (workdir / ".results.json.1").write_text("half")
    (workdir / "checkpoints/step_000000400.keras").unlink()
    for file in (workdir / "logs/train").glob("*"):
        file.unlink()
    (workdir / "results.json").write_text('{"estimates": {}}')
    losses = "; ".join(jobs.losses(workdir, whole))
    for word in ("weights differ", ".results.json.1", "logs differ", "results differ"):
        assert word in losses
