"""Training that is killed and resumed, and the command line, on a simulator of numpy."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorflow_probability import distributions as tfd

import avb_tf
from avb_tf import UserError, command_line
from avb_tf.amortised import checkpoint
from avb_tf.amortised.checkpoint import State, Workdir

CONFIG = Path(__file__).parents[1] / "configs/amortised.py"
MODEL = """
import numpy as np
from tensorflow_probability import distributions as tfd
from avb_tf.amortised.experiment import AmortisedProblem

def simulate(parameters, seed):
    rng = np.random.default_rng(np.asarray(seed))
    return np.asarray(parameters) + rng.normal(size=np.shape(parameters))

def model():
    return AmortisedProblem(simulate, prior=tfd.Normal(0.0, 1.0), observations=[0.3])
"""
TINY = {
    "width": 8, "trunk_width": 8, "depth": 1, "trunk_depth": 1, "components": 2, "batch_size": 32,
    "whitening_share": 0.4,
}  # fmt: skip
STEPS = 100
names: dict = {}
exec(MODEL, names)
simulate = names["simulate"]
FIT = {"prior": tfd.Normal(0.0, 1.0), "steps": STEPS, "verbose": False, **TINY}


class Killed(Exception):
    pass


def killed_at(monkeypatch, step):
    """Saves at every chunk, and stops as if killed right after one."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    save = Workdir.save

    def stop(self, state):
        save(self, state)
        if state.step == step:
            raise Killed

    monkeypatch.setattr(Workdir, "save", stop)


def run(folder, *arguments):
    (folder / "model.py").write_text(MODEL)
    settings = [f"--config.fit.{name}={value}" for name, value in TINY.items()]
    settings += [f"--config.steps={STEPS}", "--config.seconds=0.0", "--config.eval.pairs=50"]
    model = f"--config.model={folder}/model.py:model"
    workdir = f"--workdir={folder / 'run'}"
    command_line.main(["avb-tf", f"--config={CONFIG}", model, workdir, *settings, *arguments])


@pytest.fixture(scope="module")
def whole():
    return avb_tf.fit_amortised(simulate, **FIT)


def assert_equal(fit, other):
    for mine, others in zip(fit.q.get_weights(), other.q.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, others)
    assert fit.history == other.history
    assert fit.steps == other.steps == STEPS


def test_a_killed_training_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_at(patched, 75)
        with pytest.raises(Killed):
            avb_tf.fit_amortised(simulate, **FIT, workdir=tmp_path)
    with pytest.raises(UserError, match=f"a training with steps = {STEPS}, found 300"):
        avb_tf.fit_amortised(simulate, **{**FIT, "steps": 300}, workdir=tmp_path)
    assert_equal(avb_tf.fit_amortised(simulate, **FIT, workdir=tmp_path), whole)
    events = EventAccumulator(str(tmp_path / checkpoint.LOGS)).Reload()
    assert {"log_student", "log_q", "learning_rate"} <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Tensors("log_q")] == [75, 100]


def test_sigterm_saves_the_state_and_the_same_command_continues(whole, tmp_path, monkeypatch):
    log = Workdir.log

    def terminated(self, step, values):
        log(self, step, values)
        if step == 50:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Workdir, "log", terminated)
        with pytest.raises(SystemExit, match="143"):
            run(tmp_path, "--mode=train")
    assert Workdir(tmp_path / "run", {}).state().step == 50
    run(tmp_path, "--mode=train")
    assert_equal(avb_tf.AmortisedFit.load(tmp_path / "run/fit"), whole)


def test_a_run_killed_at_its_first_stage_and_its_evaluation(whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        killed_at(patched, 25)
        with pytest.raises(Killed):
            run(tmp_path)
    run(tmp_path, "--mode=train_and_evaluate")
    assert_equal(avb_tf.AmortisedFit.load(tmp_path / "run/fit"), whole)
    assert "over 50 simulated data sets" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/results.json").read_text())
    assert 0.0 < record["observations"][0]["surprise"]["p_value"] <= 1.0
    assert (tmp_path / "run/figures/calibration.png").exists()
    run(tmp_path, "--mode=sample", "--config.eval.draws=20")
    assert (tmp_path / "run/posterior-0.nc").exists()


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    workdir = Workdir(tmp_path, {"seed": 0})
    state = State(1, 50, 2.0, 0.1, [0.5], [np.ones(3)], [np.zeros(2)], [], [], [])
    workdir.save(state)
    again = workdir.state()
    assert again._replace(weights=[], moments=[]) == state._replace(weights=[], moments=[])
    np.testing.assert_array_equal(again.weights[0], np.ones(3))
    with pytest.raises(UserError, match="holds a training with seed = 0, found 1"):
        Workdir(tmp_path, {"seed": 1}).state()
    content = (tmp_path / checkpoint.FILE).read_bytes()
    for damaged in (content[:-30], b"", content[:60] + b"x" + content[61:]):
        (tmp_path / checkpoint.FILE).write_bytes(damaged)
        with pytest.raises(UserError, match="remove it to train anew"):
            workdir.state()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=amortised:nothing"], "no function 'nothing'"),
        (["--config=amortised", "--config.steps=0", "--config.seconds=0"], "both 0"),
        (["--config=amortised", "--config.fit.width=0"], "width is 0"),
        (["--config=amortised", "--config.eval.pairs=3"], "config.eval.pairs is 3"),
        (["--config=amortised", "--mode=evaluate"], "has no fit; train it first"),
        (["--config=amortised", "--mode=benchmark"], "does not apply to method 'amortised'"),
    ],
)
def test_mistakes_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["avb-tf", *arguments])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
