"""Runs small versions of the fault campaigns: a few trials of each kind, without an adversary."""

import random
import shutil
import signal

import pytest

from tests.campaigns import crashes, durability, faults, jobs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns an undisturbed run, recorded if strace is installed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "root").mkdir()
    workdir = folder / "root/whole"
    under = crashes.under(folder / "strace.txt") if crashes.STRACE else ()
    job = jobs.Job(workdir, method="vae", under=under, output=folder / "out.txt")
    status, error = job.finish()
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


@pytest.mark.skipif(crashes.STRACE is None, reason="strace, which records the run, is missing")
def test_no_power_loss_costs_what_was_saved(whole):
    recording = crashes.Recording(whole.parents[1] / "strace.txt", whole.parent)
    disk = crashes.Disk(recording.directories)
    for operation in recording.operations:
        disk.apply(operation)
    files = {path: content for path, content in disk.live().items() if content is not None}
    assert files
    assert all((whole.parent / p).read_bytes() == c for p, c in files.items())
    crashed = durability.crashed(recording, random.Random(0), 20)
    assert not [loss for _, losses in crashed for loss in losses]
    # If the syncs are removed from the recording, the replay must detect losses.
    for left_out in ("files", "directories"):
        operations = [
            one
            for one in recording.operations[:60]
            if one.kind != "sync"
            or (one.node in recording.directories) != (left_out == "directories")
        ]
        unsafe = crashes.crash(operations, recording.directories, random.Random(0))
        assert any(losses for *_, losses in unsafe)


@pytest.mark.parametrize("kind", ["checkpoints", "chunks", "configs"])
def test_a_flipped_bit_is_found(tmp_path, whole, chance, kind):
    count = 15 if kind == "checkpoints" else 100
    assert not list(getattr(durability, f"flipped_{kind}")(tmp_path, whole, count, chance))
