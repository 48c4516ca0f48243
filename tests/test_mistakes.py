"""Tests that users' mistakes give one line that names the mistake, and change no files."""

import json
import os
import shutil

import keras
import numpy as np
import pytest

from avb_tf import command_line, configuration, files
from avb_tf.settings import posterior
from tests.commands import content, run, trained

DIGITS = "--config=configs/digits.py:vae --workdir=new"
AVB = "--config=configs/digits.py:avb --workdir=new"
TABLE = "--config=configs/table.py:vae --workdir=new"
POINTS = "--config=configs/four_points.py:vae --workdir=new"
NO_DATA = f"{DIGITS} --config.data.name=npz --config.data.path=no.npz"
POSTERIOR = "--workdir=new --config=configs/posteriors.py"
TWO = '{"cluster":{"worker":["a:1","b:1"]}'
FIRST = TWO + ',"task":{"type":"worker","index":0}}'

CONFIGS = {
    "no_function": "STEPS = 3",
    "raises": "def get_config(): return 1 / 0",
    "no_python": "steps: 3, {",
    "a_list": "def get_config(): return [1, 2]",
    "no_field": "def get_config(): import ml_collections as m; return m.ConfigDict({'steps': 3})",
    "fewer_fields": "from avb_tf import configuration\n"
    "def get_config():\n  c = configuration.default('vae'); del c.data.path; return c",
    "models": "import tensorflow_probability as tfp\nd = tfp.distributions\n"
    "def raises(): return 1 / 0\n"
    "def number(): return 5\n"
    "def unobserved(): return d.JointDistributionNamed({'a': d.Normal(0.0, 1.0)})\n"
    "def discrete(): return unobserved_pair(), {'b': 1.0}\n"
    "def unobserved_pair(): return d.JointDistributionNamed("
    "{'a': d.Poisson(1.0), 'b': lambda a: d.Normal(a, 1.0)})",
    "no_name": "from avb_tf import configuration\n"
    "def get_config(): return configuration.default('vae')",
}

# Command line -> words that the message must contain.
FLAGS = {
    "": "no --config and no --workdir",
    "--config.steps=5": "no --config and no --workdir",
    "--workdir": "--workdir",
    "--config": "--config",
    "--config= --workdir=new": "''",
    "--config=configs/nothing.py": "configs/nothing.py",
    "--config=configs": "configs",
    "--config=digit:vae": "'digit', which is neither a file nor an experiment",
    "--config=../digits:vae": "'../digits'",
    "--config=__init__": "'__init__'",
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
}
FIELDS = {
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
    f"{DIGITS} --config.profile_steps=('a','b')": "config.profile_steps is ('a', 'b')",
    f"{DIGITS} --config.profile_steps=20,10": "config.profile_steps is (20, 10)",
    f"{DIGITS} --config.export.max_batch=0": "config.export.max_batch is 0",
    f"{DIGITS} --config.export.version=-1": "config.export.version is -1",
    f"{DIGITS} --config.model.likelihood=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.encoder=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.contrast=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.adversary=cauchy": "'cauchy'",
    f"{DIGITS} --config.model.condition=z": "'z'",
    f"{DIGITS} --config.model.network=transformer": "'transformer'",
    # These are checked before the data are loaded, which may take long.
    f"{NO_DATA} --config.model.likelihood=cauchy": "'cauchy'",
    f"{NO_DATA} --config.model.contrast=cauchy": "'cauchy'",
    f"{NO_DATA} --config.model.network=transformer": "'transformer'",
    f"{AVB} --config.model.condition=posterior": "BlackBoxEncoder",
    f"{AVB} --config.model.adversary=none": "BlackBoxEncoder",
    f"{POINTS} --config.model.network=conv": "(4,)",
    f"{DIGITS} --config.model.flow_steps=2 --config.model.flow_width=1": "flow_width is 1",
    "--config=configs/digits.py:auxvae --config.model.contrast=full --config.model.latent_dim=4": (
        "draws is 4, without an adversary; expected at least 5"
    ),
    "--config=configs/digits.py:avb_flow --config.model.contrast=prior": "FlowEncoder",
    f"{DIGITS} --config.optimizer.learning_rate=0": "learning_rate is 0.0",
    f"{DIGITS} --config.guard.patience=0": "config.guard.patience is 0",
    f"{DIGITS} --config.guard.factor=1": "config.guard.factor is 1",
    f"{DIGITS} --config.monitor.samples=0": "config.monitor.samples is 0",
    f"{DIGITS} --config.model.strides=(2,)": "strides (2,)",
    f"{DIGITS} --config.eval.budget=huge": "'huge'",
    f"{DIGITS} --config.eval.ais.temperatures=-2": "config.eval.ais.temperatures is -2",
    f"{DIGITS} --config.strategy=horovod": "'horovod'",
}
DATA = {
    f"{DIGITS} --config.data.name=faces": "'faces'",
    f"{DIGITS} --config.data.name=tfds:no_such_data": "tfds:no_such_data",
    f"{DIGITS} --config.data.name=npz": "config.data.path is empty",
    f"{DIGITS} --config.batch_size=100000000": "there are 1297 examples",
    f"{DIGITS} --config.data.name=table --config.data.path=text.csv": "config.model.likelihood",
    f"{TABLE} --config.data.path=text.csv": "column 'city' has 'Oslo' in row 0",
    f"{TABLE} --config.data.path=text.csv --config.data.columns=town=skip": "no column 'town'",
    f"{TABLE} --config.data.path=text.csv --config.data.columns=city=skip": "has no value in row 2",
    f"{TABLE} --config.data.path=ragged.csv": "1 values in row 1",
    f"{TABLE} --config.data.path=good.npz": "is not a .csv or .parquet file",
    f"{TABLE}": "config.data.path is empty",
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
    f"{DIGITS} --config.data.name=npz --config.data.path=labels.npz": "y_train",
    f"{DIGITS} --config.data.name=npz --config.data.path=unknown.npz": "z_train",
    f"{DIGITS} --config.data.name=npz --config.data.path=no_train.npz": "x_test",
    f"{DIGITS} --config.data.name=npz --config.data.path=single.npy": "single .npy array",
    f"{DIGITS} --config.data.name=npz --config.data.path=.": ".npz files; expected one",
    f"{DIGITS} --mode=benchmark --config.data.name=npz": "config.data.path is empty",
    f"{DIGITS} --mode=scaling --config.data.name=npz": "config.data.path is empty",
}
WORKDIRS = {
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
    "--workdir=damaged --mode=train_and_evaluate": "only damaged checkpoints",
    "--workdir=damaged --mode=evaluate": "only damaged checkpoints",
    "--workdir=damaged --mode=sample": "only damaged checkpoints",
    "--workdir=blocked --mode=sample": "blocked/samples.npy",
    "--workdir=not_json --mode=evaluate": "not_json/config.json",
    "--workdir=a_list --mode=evaluate": "a_list/config.json",
    "--workdir=missing --mode=evaluate": "config.model has no field 'width'",
    "--workdir=text --mode=evaluate": "config.steps is 'many'",
    "--workdir=bytes --mode=evaluate": "bytes/config.json",
    "--workdir=checkpoint_folder": "only damaged checkpoints",
    "--workdir=checkpoints_file": "checkpoints",
    "--workdir=other_model --mode=evaluate": "a Sequential",
    "--workdir=changed --mode=evaluate": "remove the line sha256",
    "--workdir=deep --mode=evaluate": "deep/config.json",
    "--workdir=in_use": "in_use is in use by process",
    "--workdir=in_use --mode=evaluate": "in_use is in use by process",
    "--workdir=wider": "step_000000020.keras cannot be loaded",
}
MODES = {
    "--mode=compare": "found neither",
    "--mode=compare --config=configs/digits.py:vae": "found --config=configs/digits.py:vae",
    "--mode=compare --workdir=run stray": "found stray",
    "--mode=compare --workdir=run --config.steps=5": "--config.steps=5",
    "--mode=compare --workdir=run --baseline=b.json": "found --mode=compare",
    "--mode=sample --workdir=run --image=x.png": "--image is for --mode=explore",
    "--mode=compare --workdir=nothing": "nothing holds no finished runs",
    "--mode=compare --workdir=run": "run holds no finished runs",
    "--mode=figures --workdir=untrained": "no checkpoint",
    "--mode=figures --workdir=blocked": "blocked/figures",
    "--mode=explore --workdir=untrained": "no checkpoint",
    "--mode=explore --workdir=blocked": "blocked/explorer.html",
    "--mode=export --workdir=untrained": "no checkpoint",
    "--mode=export --workdir=nothing": "has no config.json",
    "--mode=export --workdir=blocked": "blocked/export",
    "--mode=export --workdir=exported --config.export.version=7": "export/7 exists",
    "--mode=serve_check --workdir=run": "export holds no version",
    "--mode=serve_check --workdir=nothing": "has no config.json",
    "--mode=serve_check --workdir=exported": "export/7 would not serve",
    f"{DIGITS} --baseline=before.json": "found --mode=train",
    f"{DIGITS} --mode=benchmark --baseline=nothing.json": "nothing.json",
    f"{DIGITS} --mode=benchmark --baseline=empty": "--baseline=empty",
    f"{DIGITS} --mode=benchmark --baseline=run/config.json": "run/config.json",
}
POSTERIORS = {
    f"{POSTERIOR}:nothing": "no function 'nothing'",
    f"{POSTERIOR} --config.model=none": "config.model is 'none'",
    f"{POSTERIOR} --config.model=nothing.py:f": "'nothing.py'",
    f"{POSTERIOR} --config.model=no_python.py:f": "no_python.py raised SyntaxError",
    f"{POSTERIOR} --config.model=models.py:raises": "ZeroDivisionError",
    f"{POSTERIOR} --config.model=models.py:number": "expected",
    f"{POSTERIOR} --config.model=models.py:unobserved": "observed",
    f"{POSTERIOR} --config.model=models.py:discrete": "expected",
    f"{POSTERIOR} --config.steps=0 --config.seconds=0": "config.seconds",
    f"{POSTERIOR} --config.eval.draws=1": "config.eval.draws is 1",
    f"{POSTERIOR} --config.eval.refine=7": "config.eval.refine is 7; expected 0",
    f"{POSTERIOR} --config.fit.draws=0": "config.fit.draws is 0",
    f"{POSTERIOR} --config.fit.learning_rate=nan": "config.fit.learning_rate is nan",
    f"{POSTERIOR} --config.batch_size=5": "'batch_size'",
    f"{POSTERIOR} --mode=export": "has no fit; train it first",
    f"{POSTERIOR} --mode=benchmark": "--mode=benchmark does not apply to method 'posterior'",
    "--config=configs/digits.py --workdir=unfitted": "config.method = posterior, found avb_ac",
    "--config=configs/posteriors.py --workdir=run": "config.method = vae, found posterior",
    "--workdir=unfitted --mode=evaluate": "unfitted has no fit",
    "--workdir=unfitted --mode=sample": "has no fit; train it first",
    "--workdir=half_fitted": "half_fitted/fit cannot be loaded",
}
CLUSTERS = {
    f"TF_CONFIG={{ {DIGITS}": "not JSON of that form",
    f"TF_CONFIG=[1] {DIGITS}": "not JSON of that form",
    f'TF_CONFIG={TWO[:-1]},"ps":["c:1"]}}}} {DIGITS}': "tasks of type 'ps'",
    f"TF_CONFIG={TWO}}} {DIGITS}": "the task {}",
    f'TF_CONFIG={TWO},"task":{{"type":"worker","index":2}}}} {DIGITS}': "'index': 2",
    f'TF_CONFIG={TWO},"task":{{"type":"chief","index":0}}}} {DIGITS}': "'chief'",
    f"TF_CONFIG={FIRST} {DIGITS} --config.strategy=one": "names 2 tasks",
    f"TF_CONFIG={FIRST} {DIGITS} --config.strategy=mirrored": "names 2 tasks",
    f"TF_CONFIG={{}} {DIGITS} --config.strategy=multi_worker": "names no cluster",
    f"{DIGITS} --config.strategy=multi_worker": "names no cluster",
    f"{DIGITS} --config.strategy=tpu": "no TPU answers",
}
MISTAKES = FLAGS | FIELDS | DATA | WORKDIRS | MODES | POSTERIORS | CLUSTERS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Returns a folder with a finished run, `run`, and with broken runs and data."""
    root = tmp_path_factory.mktemp("root")
    for name, text in CONFIGS.items():
        (root / f"{name}.py").write_text(text)
    (root / "a_file").write_text("kept")
    (root / "empty").mkdir()
    _bad_data(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("AVB_TF_DATA_DIR", raising=False)
        trained(root)
        _bad_configs(root)
        _bad_runs(root)
        with (
            files.locked(root / "in_use" / files.TRAINING),
            files.locked(root / "in_use" / files.EVALUATION),
        ):
            yield root


def _bad_configs(root):
    """Writes workdirs that contain only a config."""
    config = (root / "run/config.json").read_text()
    wider = json.loads(config)
    del wider["sha256"]
    wider["model"]["width"] = 32
    without_width = json.loads(config)
    del without_width["model"]["width"]
    fit = posterior.config("configs/posteriors.py:banana")
    fit.name = "banana"
    fit = configuration.text(configuration.resolve(fit))
    for name, text in {
        "untrained": config,
        "damaged": config,
        "not_json": config[:50],
        "a_list": "[1, 2]",
        "missing": json.dumps(without_width),
        "text": config.replace('"steps": 20', '"steps": "many"'),
        "bytes": b"\xff\xfe",
        "unfitted": fit,
        "half_fitted": fit,
        "checkpoints_file": config,
        "checkpoint_folder": config,
        "other_model": config,
        "changed": config.replace('"log_every": 10,', '"log_every": 20,'),
        "deep": "[" * 100_000,
        "wider": configuration.text(wider),
    }.items():
        (root / name).mkdir()
        (root / name / "config.json").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )


def _bad_runs(root):
    """Writes workdirs with unexpected content."""
    newest = "checkpoints/step_000000020.keras"
    shutil.copytree(root / "run/checkpoints", root / "damaged/checkpoints")
    for file in (root / "damaged/checkpoints").iterdir():
        os.truncate(file, 1000)
    (root / "checkpoints_file/checkpoints").write_text("kept")
    (root / "checkpoint_folder" / newest).mkdir(parents=True)
    (root / "other_model/checkpoints").mkdir()
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(root / "other_model" / newest)
    shutil.copytree(root / "run/checkpoints", root / "wider/checkpoints")
    (root / "half_fitted/fit").mkdir()
    (root / "half_fitted/fit/fit.json").write_text("{")
    shutil.copytree(root / "run", root / "in_use")
    shutil.copytree(root / "run", root / "exported")
    (root / "exported/export/7").mkdir(parents=True)
    shutil.copytree(root / "run", root / "blocked")
    shutil.rmtree(root / "blocked/figures")
    for name in ("figures", "export"):
        (root / "blocked" / name).write_text("kept")
    for name in ("samples.npy", "explorer.html"):
        (root / "blocked" / name).mkdir()


def _bad_data(root):
    x = np.full([6, 2, 2], 0.5)
    np.savez(root / "good.npz", x_train=x)
    (root / "empty.npz").touch()
    (root / "text.csv").write_text("city,age\nOslo,1\nRome,2\nRome,\nOslo,4\nRome,5\n")
    (root / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (root / "truncated.npz").write_bytes((root / "good.npz").read_bytes()[:200])
    np.savez(root / "shape.npz", x_train=x[:, 0, 0])
    np.savez(root / "nan.npz", x_train=np.where(x == x[0, 0, 0], np.nan, x))
    np.savez(root / "range.npz", x_train=x * 510)
    np.savez(root / "objects.npz", x_train=np.array([{}, []], object))
    np.savez(root / "labels.npz", x_train=x, y_train=np.arange(5))
    np.savez(root / "unknown.npz", x_train=x, z_train=x)
    np.savez(root / "no_train.npz", x_test=x)
    np.save(root / "single.npy", x)
    (root / "images").mkdir()
    for i in range(1, 4):
        (root / f"images/{i}.png").write_text("no image")


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(root, monkeypatch, capsys, line):
    arguments = line
    if line.startswith("TF_CONFIG="):
        value, _, arguments = line.removeprefix("TF_CONFIG=").partition(" ")
        monkeypatch.setenv("TF_CONFIG", value)
    before = content(root)
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("avb-tf: ")
    assert message.endswith("\n")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert MISTAKES[line] in message
    assert content(root) == before


def test_the_table_covers_all_modes():
    assert len(MISTAKES) >= 60
    shown = " ".join(MISTAKES)
    assert all(f"--mode={mode}" in shown for mode in command_line.MODES if mode != "train")
