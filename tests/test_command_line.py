"""The command line: mistakes of every kind, and the commands one after another."""

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from avb_tf import command_line
from avb_tf.command_line import main
from avb_tf.errors import UserError

REPOSITORY = Path(__file__).parents[1]
TINY = (
    "--config.steps=20 --config.log_every=10 --config.checkpoint_every=10 "
    "--config.model.width=16 --config.model.adversary_width=16 --config.model.basis_width=8 "
    "--config.model.bases=4 --config.eval.examples=20 --config.eval.grid=40 "
    "--config.eval.posteriors=2"
)
DIGITS = "--config=configs/digits.py:vae --workdir=new"
AVB = "--config=configs/digits.py:avb --workdir=new"
POINTS = "--config=configs/four_points.py:vae --workdir=new"

CONFIGS = {
    "no_function": "STEPS = 3",
    "raises": "def get_config(): return 1 / 0",
    "no_python": "steps: 3, {",
    "a_list": "def get_config(): return [1, 2]",
    "no_field": "def get_config(): import ml_collections as m; return m.ConfigDict({'steps': 3})",
    "fewer_fields": "from avb_tf import configuration\n"
    "def get_config():\n  c = configuration.default('vae'); del c.data.path; return c",
    "no_name": "from avb_tf import configuration\n"
    "def get_config(): return configuration.default('vae')",
}

# Command line -> what the message has to name.
MISTAKES = {
    "": "no --config and no --workdir",
    "--config.steps=5": "no --config and no --workdir",
    "--workdir": "--workdir",
    "--config": "--config",
    "--config= --workdir=new": "''",
    "--config=configs/nothing.py": "configs/nothing.py",
    "--config=configs": "configs",
    "--config=no_function.py": "get_config",
    "--config=raises.py": "ZeroDivisionError: division by zero",
    "--config=raises.py:vae": "raises.py raised TypeError",
    "--config=no_python.py": "no_python.py raised SyntaxError",
    "--config=a_list.py": "[1, 2]",
    "--config=no_field.py": "'batch_size'",
    "--config=fewer_fields.py": "config.data has no field 'path'",
    "--config=no_name.py": "config.name is empty",
    "--config=configs/digits.py:gan": "'gan'",
    f"{DIGITS} --wrokdir=x": "'wrokdir'. Did you mean: workdir",
    f"{DIGITS} --mode=tarin": "tarin",
    f"{DIGITS} stray": "'stray'",
    f"--config.steps=5 {DIGITS}": "--config.steps stands before --config",
    f"{DIGITS} --debug=maybe": "maybe",
    f"{DIGITS} --config.setps=5": "'setps'",
    f"{DIGITS} --config.model.wdith=5": "'wdith'",
    f"{DIGITS} --config.steps.model=5": "steps.model",
    f"{DIGITS} --config.=5": "''",
    f"{DIGITS} --config.steps": "--config.steps",
    f"{DIGITS} --noconfig.steps": "noconfig.steps",
    f"{DIGITS} --config.steps=many": "many",
    f"{DIGITS} --config.steps=": "--config.steps=",
    f"{DIGITS} --config.steps=2.5": "2.5",
    f"{DIGITS} --config.steps=true": "true",
    f"{DIGITS} --config.optimizer.learning_rate=fast": "fast",
    f"{DIGITS} --config.data=5": "--config.data=5",
    f"{DIGITS} --config.data={{'name':'digits'}}": "config.data has no field",
    f"{DIGITS} --config.model.filters=('a','b')": "('a', 'b')",
    f"{DIGITS} --config.model.filters=True": "(True,)",
    f"{DIGITS} --config.model.filters=()": "()",
    f"{DIGITS} --config.model.filters=8,-8": "(8, -8)",
    f"{DIGITS} --config.method=avb": "'avb'",
    f"{DIGITS} --config.steps=0": "config.steps is 0",
    f"{DIGITS} --config.batch_size=-1": "config.batch_size is -1",
    f"{DIGITS} --config.model.width=0": "config.model.width is 0",
    f"{DIGITS} --config.model.seed=3000000000": "config.model.seed is 3000000000",
    f"{DIGITS} --config.model.noise_dim=-1": "config.model.noise_dim is -1",
    f"{DIGITS} --config.data.seed=-1": "config.data.seed is -1",
    f"{DIGITS} --config.data.channels=2": "config.data.channels is '2'",
    f"{DIGITS} --config.eval.grid=1": "config.eval.grid is 1",
    f"{DIGITS} --config.eval.examples=-1": "config.eval.examples is -1",
    f"{DIGITS} --config.eval.split=dev": "'dev'",
    f"{DIGITS} --config.model.ema_decay=1": "config.model.ema_decay is 1",
    f"{DIGITS} --config.optimizer.beta_1=nan": "config.optimizer.beta_1 is nan",
    f"{DIGITS} --config.optimizer.final=-0.1": "config.optimizer.final is -0.1",
    f"{DIGITS} --config.optimizer.decay=linear": "'linear'",
    f"{DIGITS} --config.optimizer.learning_rate=nan": "learning_rate is nan",
    f"{DIGITS} --config.optimizer.adversary_learning_rate=inf": "learning_rate is inf",
    f"{DIGITS} --config.optimizer.clip_norm=-1": "config.optimizer.clip_norm is -1",
    f"{DIGITS} --config.optimizer.adversary_warmup=8000": "adversary_warmup is 8000",
    f"{DIGITS} --config.checkpoint_every=750": "config.checkpoint_every is 750",
    f"{DIGITS} --config.figures_every=750": "config.figures_every is 750",
    f"{DIGITS} --config.profile_steps=10": "config.profile_steps is (10,)",
    f"{DIGITS} --config.profile_steps=20,10": "config.profile_steps is (20, 10)",
    f"{DIGITS} --config.export.max_batch=0": "config.export.max_batch is 0",
    f"{DIGITS} --config.export.version=-1": "config.export.version is -1",
    f"{DIGITS} --config.model.likelihood=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.encoder=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.contrast=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.adversary=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.condition=z": "'z'",
    f"{DIGITS} --config.model.network=transformer": "'transformer'",
    f"{AVB} --config.model.condition=posterior": "BlackBoxEncoder",
    f"{AVB} --config.model.adversary=none": "BlackBoxEncoder",
    f"{POINTS} --config.model.network=conv": "(4,)",
    f"{DIGITS} --config.data.name=faces": "'faces'",
    f"{DIGITS} --config.data.name=tfds:no_such_data": "tfds:no_such_data",
    f"{DIGITS} --config.data.name=npz": "config.data.path is empty",
    f"{DIGITS} --config.data.name=npz --config.data.path=nothing.npz": "nothing.npz",
    f"{DIGITS} --config.data.name=npz --config.data.path=empty.npz": "empty.npz",
    f"{DIGITS} --config.data.name=npz --config.data.path=truncated.npz": "truncated.npz",
    f"{DIGITS} --config.data.name=npz --config.data.path=shape.npz": "(6,)",
    f"{DIGITS} --config.data.name=npz --config.data.path=nan.npz": "NaN",
    f"{DIGITS} --config.data.name=npz --config.data.path=range.npz": "255.0",
    f"{DIGITS} --config.data.name=npz --config.data.path=objects.npz": "objects.npz",
    f"{DIGITS} --config.data.name=mnist --config.data.path=shape.npz": "shape.npz",
    f"{DIGITS} --config.data.name=images": "not a folder",
    f"{DIGITS} --config.data.name=images --config.data.path=empty": "empty",
    f"{DIGITS} --config.data.name=images --config.data.path=images": "1.png",
    "--config=configs/digits.py:vae --workdir=a_file": "a_file",
    "--config=configs/digits.py:vae --workdir=a_file/new": "a_file/new",
    "--config=configs/digits.py:avb --workdir=run": "config.",
    "--config=configs/digits.py:avb --workdir=run --mode=evaluate": "config.",
    "--workdir=run --config.steps=30": "config.steps = 20, found 30",
    "--workdir=empty": "has no config.json",
    "--workdir=empty --mode=evaluate": "has no config.json",
    "--workdir=nothing --mode=sample": "has no config.json",
    "--workdir=untrained --mode=evaluate": "no checkpoint",
    "--workdir=untrained --mode=sample": "no checkpoint",
    "--workdir=damaged": "only damaged checkpoints",
    "--workdir=damaged --mode=evaluate": "only damaged checkpoints",
    "--workdir=damaged --mode=sample": "only damaged checkpoints",
    "--workdir=blocked --mode=sample": "blocked/samples.npy",
    "--workdir=not_json --mode=evaluate": "not_json/config.json",
    "--workdir=a_list --mode=evaluate": "a_list/config.json",
    "--workdir=missing --mode=evaluate": "config.model has no field 'width'",
    "--workdir=text --mode=evaluate": "config.steps is 'many'",
    "--workdir=bytes --mode=evaluate": "bytes/config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a finished run, `run`, and with all that can go wrong."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    for name, text in CONFIGS.items():
        (root / f"{name}.py").write_text(text)
    (root / "a_file").write_text("kept")
    (root / "empty").mkdir()
    _bad_data(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("AVB_TF_DATA_DIR", raising=False)
        run(f"--config=configs/digits.py:vae --workdir=run {TINY}")
        config = (root / "run/config.json").read_text()
        without_width = json.loads(config)
        del without_width["model"]["width"]
        for name, text in {
            "untrained": config,
            "damaged": config,
            "not_json": config[:50],
            "a_list": "[1, 2]",
            "missing": json.dumps(without_width),
            "text": config.replace('"steps": 20', '"steps": "many"'),
        }.items():
            (root / name).mkdir()
            (root / name / "config.json").write_text(text)
        (root / "bytes").mkdir()
        (root / "bytes/config.json").write_bytes(b"\xff\xfe")
        shutil.copytree(root / "run/checkpoints", root / "damaged/checkpoints")
        for file in (root / "damaged/checkpoints").iterdir():
            os.truncate(file, 1000)
        shutil.copytree(root / "run", root / "blocked")
        (root / "blocked/samples.npy").mkdir()
        yield root


def _bad_data(root):
    x = np.full([6, 2, 2], 0.5)
    np.savez(root / "good.npz", x_train=x)
    (root / "empty.npz").touch()
    (root / "truncated.npz").write_bytes((root / "good.npz").read_bytes()[:200])
    np.savez(root / "shape.npz", x_train=x[:, 0, 0])
    np.savez(root / "nan.npz", x_train=np.where(x == x[0, 0, 0], np.nan, x))
    np.savez(root / "range.npz", x_train=x * 510)
    np.savez(root / "objects.npz", x_train=np.array([{}, []], object))
    (root / "images").mkdir()
    for i in range(1, 4):
        (root / f"images/{i}.png").write_text("no image")


def run(line):
    main(["avb-tf", *line.split()])


def content(folder):
    """Path -> bytes of all that is below `folder`; None for a folder."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(root, capsys, line):
    before = content(root)
    with pytest.raises(SystemExit) as stop:
        run(line)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("avb-tf: ")
    assert message.endswith("\n")
    assert message.count("\n") == 1
    assert MISTAKES[line] in message
    assert content(root) == before


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


def test_help_needs_no_tensorflow():
    code = (
        "import sys; from avb_tf.command_line import main; main(['avb-tf', '--help'])\n"
        "assert not {'tensorflow', 'keras'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("--config", "--workdir", "--mode", "--[no]debug", *command_line.MODES):
        assert word in shown.stdout


def test_main_py_and_the_console_script_are_one_function():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="avb-tf")
    assert script.load() is main
    assert runpy.run_path(str(REPOSITORY / "main.py"))["main"] is main


# What the flags lead to: the config and the workdir that a mode is called with.


@pytest.fixture
def called(root, monkeypatch):
    """Runs a command line up to its mode; returns what that would be called with."""

    def record(line):
        found = []
        mode = SimpleNamespace(train=lambda *arguments: found.extend(arguments))
        monkeypatch.setattr(command_line, "_imported", lambda module: mode)
        run(line)
        return found

    return record


def test_the_default_workdir_is_the_config_s_name(called, root):
    config, workdir = called("--config=configs/digits.py:avb_ac")
    assert config.method == "avb_ac"
    assert workdir == root / "runs/digits-avb_ac"


def test_settings_come_in_any_form(called):
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


# One command after another.


@pytest.fixture
def workdir(root, tmp_path):
    """A copy of the finished run, alone in its folder."""
    return shutil.copytree(root / "run", tmp_path / "vae")


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_training_leaves_a_whole_run(root):
    names = {path.name for path in (root / "run").iterdir()}
    assert names == {"config.json", "checkpoints", "figures", "logs"}
    checkpoints = {path.name for path in (root / "run/checkpoints").iterdir()}
    # The one before the first step is what a run that fails early goes back to.
    assert checkpoints == {f"step_{step:09d}.keras" for step in (0, 10, 20)}


def test_a_finished_run_is_left_as_it_is(workdir, capsys):
    before = content(workdir)
    run(f"--config=configs/digits.py:vae --workdir={workdir} {TINY}")
    assert "at step 20 of 20" in capsys.readouterr().out
    assert content(workdir) == before


def test_later_commands_need_only_the_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    run("--workdir=. --mode=evaluate")
    found = results(workdir)
    assert found.keys() >= {
        "method", "data", "event_shape", "split", "step", "seconds", "config_hash", "estimates",
    }  # fmt: skip
    assert (found["method"], found["data"], found["split"]) == ("vae", "digits", "test")
    assert found["step"] == 20
    counts = {"elbo": 20, "log_likelihood_quadrature": 20, "kl_q_exact_posterior": 2}
    assert found["estimates"].keys() >= counts.keys()
    for estimate in found["estimates"].values():
        assert np.isfinite([estimate["mean"], estimate["standard_error"]]).all()
    assert {name: found["estimates"][name]["count"] for name in counts} == counts

    before = (workdir / "config.json").read_bytes()
    run("--config.eval.grid=50 --workdir=. --mode=evaluate")
    again = results(workdir)
    assert again["estimates"]["log_likelihood_quadrature"]["grid"] == 50
    assert again["config_hash"] == found["config_hash"]
    assert again["estimates"]["elbo"] == found["estimates"]["elbo"]
    assert (workdir / "config.json").read_bytes() == before

    run("--workdir=. --mode=sample")
    samples = np.load(workdir / "samples.npy", allow_pickle=False)
    assert samples.shape == (64, 8, 8, 1)
    assert samples.min() >= 0
    assert samples.max() <= 1


def test_methods_side_by_side(workdir, capsys):
    (workdir.parent / "broken").mkdir()
    (workdir.parent / "broken/results.json").write_text("{")
    run(f"--workdir={workdir} --mode=evaluate")
    second = workdir.parent / "avb_ac"
    run(f"--config=configs/digits.py:avb_ac --workdir={second} {TINY} --mode=train_and_evaluate")
    assert results(second)["estimates"].keys() > {"elbo_adversary", "log_likelihood_quadrature"}
    header = next(line for line in capsys.readouterr().out.splitlines() if "avb_ac  " in line)
    assert header.split()[-4:] == ["avb_ac", "|", "vae", "|"]
    figures = {path.name for path in (workdir.parent / "figures").iterdir()}
    assert figures == {"latent_spaces.png", "posteriors.png"}


def test_three_examples_are_data_enough(root, tmp_path):
    np.savez(tmp_path / "three.npz", x_train=np.eye(3))
    run(
        f"--config=configs/four_points.py:avb --workdir={tmp_path}/run --mode=train_and_evaluate "
        f"--config.data.name=npz --config.data.path={tmp_path}/three.npz {TINY}"
    )
    assert results(tmp_path / "run")["estimates"]["elbo_adversary"]["count"] == 1
