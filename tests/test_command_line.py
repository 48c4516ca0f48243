"""Tests the flags of the command line, and its commands in sequence."""

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import avb_tf
from avb_tf import command_line, configs
from avb_tf.command_line import main
from avb_tf.errors import UserError
from tests.commands import REPOSITORY, TINY, content, run, trained


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Returns a folder with a finished run, `run`, and an unfinished run, `untrained`."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trained(root)
        (root / "untrained").mkdir()
        shutil.copy(root / "run/config.json", root / "untrained")
        yield root


def test_a_mistake_in_a_shell(root):
    command = [sys.executable, REPOSITORY / "main.py", "--workdir=untrained", "--mode=evaluate"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("avb-tf: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_debug_shows_the_traceback(root):
    with pytest.raises(UserError, match="'gan'"):
        run("--config=configs/digits.py:gan --debug")


class ResourceExhaustedError(Exception):
    """Named like TensorFlow's."""


def within(error):
    """Returns an error that hides another, as TensorFlow's errors of a graph do."""
    try:
        try:
            raise error
        except type(error):
            raise RuntimeError("in user code") from None
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        MemoryError(),
        ResourceExhaustedError("OOM when allocating tensor\nof shape [1]"),
        within(MemoryError()),
        ValueError("Error parsing message with type 'tensorflow.FunctionDef': Arena alloc failed"),
        within(within(ResourceExhaustedError("OOM"))),
    ],
    ids=str,
)
def test_too_little_memory_is_told_in_one_line(error, tmp_path, monkeypatch, capsys):
    def train(config, workdir):
        raise error

    monkeypatch.setattr(command_line, "_imported", lambda module: SimpleNamespace(train=train))
    with pytest.raises(SystemExit) as stop:
        main(["avb-tf", "--config=digits:vae", f"--workdir={tmp_path}"])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("avb-tf: not enough memory: ")
    assert text.count("\n") == 1


def test_an_unknown_error_keeps_its_traceback(tmp_path, monkeypatch):
    def train(config, workdir):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(command_line, "_imported", lambda module: SimpleNamespace(train=train))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["avb-tf", "--config=digits:vae", f"--workdir={tmp_path}"])


def test_help_needs_no_tensorflow():
    code = (
        "import sys; from avb_tf.command_line import main; main(['avb-tf', '--help'])\n"
        "assert not {'tensorflow', 'keras'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("--config", "--workdir", "--mode", "--[no]debug", *command_line.MODES):
        assert word in shown.stdout


def test_all_entry_points_call_the_same_function():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="avb-tf")
    assert script.load() is main
    assert runpy.run_path(str(REPOSITORY / "main.py"))["main"] is main
    assert runpy.run_module("avb_tf")["main"] is main


@pytest.mark.parametrize("command", ["--version", "--mode=train --version"])
def test_the_version_flag_prints_the_package_version(command, capsys):
    run(command)
    assert capsys.readouterr().out == f"avb-tf {avb_tf.__version__}\n"
    assert importlib.metadata.version("avb_tf") == avb_tf.__version__


def test_the_package_lists_its_public_names_without_tensorflow():
    code = (
        "import sys, avb_tf\n"
        "assert set(avb_tf.__all__) <= set(dir(avb_tf))\n"
        "assert not {'tensorflow', 'keras'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(avb_tf, name) for name in avb_tf.__all__)


# Arguments of a mode: the config and the workdir.


@pytest.fixture
def called(root, monkeypatch):
    """Returns a function that parses a command line and returns the arguments of its mode."""

    def record(line):
        calls = []
        mode = SimpleNamespace(train=lambda *arguments: calls.extend(arguments))
        monkeypatch.setattr(command_line, "_imported", lambda module: mode)
        run(line)
        return calls

    return record


def test_the_default_workdir_is_named_after_the_config(called, root):
    config, workdir = called("--config=configs/digits.py:avb_ac")
    assert config.method == "avb_ac"
    assert workdir == root / "runs/digits-avb_ac"


@pytest.mark.parametrize("name", configs.names())
def test_an_experiment_of_the_package_needs_no_path(name, called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir = called(f"--config={name}")
    assert workdir == tmp_path / "runs" / config.name
    assert config.name.replace("posterior-", "posteriors-").startswith(f"{name}-")


def test_a_file_comes_before_an_experiment_of_that_name(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = (REPOSITORY / "configs/digits.py").read_text()
    (tmp_path / "digits").write_text(source.replace("8000", "17"))
    assert called("--config=digits:vae")[0].steps == 17
    (tmp_path / "digits").unlink()
    (tmp_path / "digits").mkdir()
    assert called("--config=digits:vae")[0].steps == 8000


def test_settings_in_every_flag_syntax(called):
    config, _ = called(
        "--mode train --workdir new --config configs/digits.py:vae -config.steps 30 "
        "--config.model.filters=(8,16) --config.optimizer.learning_rate=1 --config.steps=40"
    )
    assert (config.steps, config.model.filters) == (40, (8, 16))
    assert config.optimizer.learning_rate == 1.0


def test_a_workdir_knows_its_config(called, root):
    config, workdir = called("--workdir=run --config.eval.grid=50")
    assert (config.method, config.steps, config.eval.grid) == ("vae", 20, 50)
    assert isinstance(config.model.filters, tuple)
    assert workdir == root / "run"


def test_modes_other_than_training_run_only_on_the_first_worker(tmp_path, monkeypatch, capsys):
    cluster = {"worker": ["a:1", "b:1"]}
    task = {"cluster": cluster, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(task))
    for mode in ("evaluate", "sample", "export"):
        command_line.main(
            ["avb-tf", "--config=configs/digits.py:vae", f"--workdir={tmp_path}", f"--mode={mode}"]
        )
        assert f"--mode={mode} runs only on the first worker" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_threads_of_small_networks_are_set_before_tensorflow_starts(root):
    """TensorFlow has no getter for this setting, so the test counts its threads."""
    code = (
        "import os, sys, types; from avb_tf import command_line\n"
        "def count(config, workdir):\n"
        "    import tensorflow as tf\n"
        "    big = tf.random.normal([3000, 3000]); (big @ big).numpy()\n"
        "    print(len(os.listdir('/proc/self/task')))\n"
        "command_line._imported = lambda module: types.SimpleNamespace(train=count)\n"
        "command_line.main(['avb-tf', *sys.argv[1:]])"
    )
    config = f"--config={REPOSITORY}/configs/digits.py:vae"

    def threads(count):
        command = [sys.executable, "-c", code, config, f"--config.threads_per_op={count}"]
        other = {k: v for k, v in os.environ.items() if k != "TF_NUM_INTRAOP_THREADS"}
        done = subprocess.run(
            command, cwd=root, env=other, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert threads(9) - threads(1) == 8


# Commands in sequence.


@pytest.fixture
def workdir(root, tmp_path):
    """Returns a copy of the finished run in a separate folder."""
    return shutil.copytree(root / "run", tmp_path / "vae")


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_training_writes_all_files_of_a_run(root):
    names = {path.name for path in (root / "run").iterdir()}
    assert names == {".train.lock", "config.json", "checkpoints", "figures", "logs"}
    checkpoints = {path.name for path in (root / "run/checkpoints").iterdir()}
    # A run that diverges early returns to the checkpoint from before the first step.
    saved = {f"step_{step:09d}.keras" for step in (0, 10, 20)}
    assert checkpoints == {"README.md", "first_elbo.json"} | saved


def test_a_finished_run_is_not_trained_again(workdir, capsys):
    before = content(workdir)
    run(f"--config=configs/digits.py:vae --workdir={workdir} {TINY}")
    assert "at step 20 of 20" in capsys.readouterr().out
    assert content(workdir) == before


def test_later_commands_need_only_the_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    run("--workdir=. --mode=evaluate")
    evaluation = results(workdir)
    assert evaluation.keys() >= {
        "method", "data", "event_shape", "split", "step", "seconds", "config_hash", "estimates",
    }  # fmt: skip
    assert (evaluation["method"], evaluation["data"], evaluation["split"]) == (
        "vae",
        "digits",
        "test",
    )
    assert evaluation["step"] == 20
    counts = {"elbo": 20, "log_likelihood_quadrature": 20, "kl_q_exact_posterior": 2}
    assert evaluation["estimates"].keys() >= counts.keys()
    for estimate in evaluation["estimates"].values():
        assert np.isfinite([estimate["mean"], estimate["standard_error"]]).all()
    assert {name: evaluation["estimates"][name]["count"] for name in counts} == counts

    before = (workdir / "config.json").read_bytes()
    run("--config.eval.grid=50 --workdir=. --mode=evaluate")
    again = results(workdir)
    assert again["estimates"]["log_likelihood_quadrature"]["grid"] == 50
    assert again["config_hash"] == evaluation["config_hash"]
    assert again["estimates"]["elbo"] == evaluation["estimates"]["elbo"]
    assert (workdir / "config.json").read_bytes() == before

    run("--workdir=. --mode=sample")
    samples = np.load(workdir / "samples.npy", allow_pickle=False)
    assert samples.shape == (64, 8, 8, 1)
    assert samples.min() >= 0
    assert samples.max() <= 1


def test_compare_prints_all_methods(workdir, capsys):
    (workdir.parent / "broken").mkdir()
    (workdir.parent / "broken/results.json").write_text("{")
    run(f"--workdir={workdir} --mode=evaluate")
    second = workdir.parent / "avb_ac"
    run(f"--config=configs/digits.py:avb_ac --workdir={second} {TINY} --mode=train_and_evaluate")
    assert results(second)["estimates"].keys() > {"elbo_adversary", "log_likelihood_quadrature"}
    header = next(line for line in capsys.readouterr().out.splitlines() if "avb_ac  " in line)
    assert header.split()[-4:] == ["avb_ac", "|", "vae", "|"]
    assert not (workdir.parent / "figures").exists()
    run(f"--workdir={workdir.parent} --mode=compare")
    drawn = {"comparison", "training_digits", "latent_spaces_digits_test", "posteriors_digits_test"}
    assert {path.stem for path in workdir.parent.glob("*.png")} == drawn


def test_three_examples_are_enough_data(root, tmp_path):
    np.savez(tmp_path / "three.npz", x_train=np.eye(3))
    run(
        f"--config=configs/four_points.py:avb --workdir={tmp_path}/run --mode=train_and_evaluate "
        f"--config.data.name=npz --config.data.path={tmp_path}/three.npz {TINY}"
    )
    assert results(tmp_path / "run")["estimates"]["elbo_adversary"]["count"] == 1
