"""Tests exports of every method in the C library against the Keras model."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import avb_tf
from avb_tf import command_line, proposal
from avb_tf.errors import UserError
from avb_tf.serving import check, layout
from avb_tf.serving.saved_model import RunError, SavedModel
from avb_tf.settings import methods
from tests.test_signatures import SMALL

EVENT = (4, 4, 1)
K = 64  # importance samples
DETERMINISTIC = {"serving_default", "elbo", "log_likelihood", "decode"}
SEEDED = {"encode_seeded", "reconstruct_seeded", "sample_seeded"}
FRESH = {"encode", "reconstruct", "sample"}
REPEATABLE = sorted(DETERMINISTIC | SEEDED)

rng = np.random.default_rng(0)
X = rng.integers(0, 2, [64, *EVENT]).astype(np.float32)
INPUTS = {
    "x": X,
    "z": rng.normal(size=[64, SMALL["latent_dim"]]).astype(np.float32),
    "seed": rng.integers(-(2**63), 2**63 - 1, 64),
    "row": np.arange(64),
}


@functools.cache
def model_of(method):
    keras.utils.set_random_seed(1)
    model = avb_tf.build(method, EVENT, **SMALL)
    for seed, weight in enumerate(model.adversary.weights if model.adversary else ()):
        weight.assign_add(
            keras.random.normal(weight.shape, stddev=0.1, seed=seed)
        )  # initially T = 0
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a function that exports a method once and returns the directory of its versions."""

    @functools.cache
    def export(method):
        directory = tmp_path_factory.mktemp("export") / method
        path = model_of(method).export(directory, importance_samples=K, max_batch=100, name=method)
        assert path == directory / "1"
        return directory

    return export


@pytest.fixture(scope="module")
def loaded(exported):
    return functools.cache(lambda method: SavedModel(exported(method) / "1"))


def request(served, name, rows=slice(None)):
    """Returns rows of the inputs that the signature names."""
    inputs = {key: INPUTS[key][rows] for key in served.signatures[name].inputs}
    if name.endswith("_uint8"):
        inputs["x"] = (255 * inputs["x"]).astype(np.uint8)
    return inputs


def points(count, dim):
    """Returns Sobol points as noise for all rows, [count, 64, dim]."""
    sobol = scipy.stats.qmc.MultivariateNormalQMC(np.zeros(dim), rng=0).random(count)
    return np.repeat(sobol.astype(np.float32)[:, None], 64, 1)


def by_keras(model, name):
    """Returns a signature's answer, computed eagerly from the parts of the Keras model."""
    q, noise_dim = model.averaged_encoder, model.encoder.noise_dim

    def noise(stream, size):
        seeds = [tf.constant([seed, stream], tf.int64) for seed in INPUTS["seed"]]
        return np.stack([tf.random.stateless_normal([size], seed, alg="philox") for seed in seeds])

    moments = q(X, points(proposal.POINTS, noise_dim))
    z = q(X, noise(0, noise_dim)[None]).z[0]
    terms = model.terms(tf.constant(X), points(64, noise_dim))
    if name == "log_likelihood":
        return {name: importance_weighted(model, moments)}
    return {
        "serving_default": lambda: {"reconstruction": model.decode(moments.mean)},
        "encode_seeded": lambda: {"z": z, "mean": moments.mean},
        "reconstruct_seeded": lambda: {"reconstruction": model.decode(z)},
        "decode": lambda: {"x": model.decode(INPUTS["z"])},
        "sample_seeded": lambda: {"x": model.decode(noise(1, SMALL["latent_dim"]))},
        "elbo": lambda: {"elbo": np.mean(terms.elbo, 0)},
    }[name]()


def importance_weighted(model, moments):
    """Returns the importance-weighted bound on log p(x), with densities from scipy."""
    latent = model.encoder.latent_dim
    if moments.log_prob is None:
        scale = proposal.WIDENING * np.asarray(moments.scale_tril)
        z = np.asarray(moments.mean) + np.einsum("bij,sbj->sbi", scale, points(K, latent))
        log_q = np.stack([
            scipy.stats.multivariate_normal(m, s @ s.T, allow_singular=True).logpdf(z[:, i])
            for i, (m, s) in enumerate(zip(moments.mean, scale, strict=True))
        ], 1)  # fmt: skip
    else:
        posterior = model.averaged_encoder(X, points(K, model.encoder.noise_dim))
        z, log_q = np.asarray(posterior.z), posterior.log_prob
    log_prior = scipy.stats.norm.logpdf(z).sum(-1)
    p = np.asarray(model.decode(z), np.float64)
    log_x = scipy.stats.bernoulli.logpmf(X, p).sum((-3, -2, -1))
    return np.logaddexp.reduce(log_x + log_prior - log_q, 0) - np.log(K)


@pytest.mark.parametrize("method", methods.METHODS)
def test_an_export_answers_like_the_keras_model(method, loaded):
    served = loaded(method)
    of_x = {
        name for name in DETERMINISTIC | SEEDED | FRESH if "x" in served.signatures[name].inputs
    }
    assert set(served.signatures) == (
        DETERMINISTIC | SEEDED | FRESH | {f"{name}_uint8" for name in of_x}
    )
    for name in REPEATABLE:
        answer = served.run(name, request(served, name))
        for output, expected in by_keras(model_of(method), name).items():
            np.testing.assert_allclose(
                answer[output], expected, rtol=1e-5, atol=1e-5, err_msg=f"{name} {output}"
            )


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_row_has_the_same_answer_in_batches_of_1_7_and_64(method, loaded):
    served = loaded(method)
    for name in REPEATABLE:
        full = served.run(name, request(served, name))
        for rows in (slice(3, 4), slice(1, 8)):
            part = served.run(name, request(served, name, rows))
            for output, values in part.items():
                np.testing.assert_allclose(
                    values, full[output][rows], rtol=1e-5, atol=1e-5, err_msg=name
                )


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_signature_passes_its_check(method, loaded):
    served = loaded(method)
    repeats = {name: check.check_signature(served, name)[-1] for name in [*REPEATABLE, *FRESH]}
    assert {name for name, repeated in repeats.items() if repeated == "fresh"} == FRESH


def test_bytes_and_floats_are_the_same_images(loaded):
    served = loaded("avb_ac")
    for name in REPEATABLE:
        if f"{name}_uint8" in served.signatures:
            floats = served.run(name, request(served, name))
            bytes_ = served.run(f"{name}_uint8", request(served, f"{name}_uint8"))
            for output, values in floats.items():
                np.testing.assert_array_equal(bytes_[output], values)


PROCESS = """
import sys
import numpy as np
from avb_tf.serving.saved_model import SavedModel
served = SavedModel(sys.argv[1])
x, rows = np.zeros([4, 4, 4, 1], np.float32), np.arange(4)
inputs = {"encode": {"x": x}, "reconstruct": {"x": x}, "sample": {"row": rows}}
replies = {name: [served.run(name, i) for _ in range(2)] for name, i in inputs.items()}
seeded = served.run("encode_seeded", {"x": x, "seed": rows})
assert not {"tensorflow", "keras"} & sys.modules.keys()
np.savez(sys.argv[2], seeded=seeded["z"], **{
    f"{name}{i}": answer["z"] if "z" in answer else next(iter(answer.values()))
    for name, answers in replies.items() for i, answer in enumerate(answers)
})
"""


def test_unseeded_answers_differ_between_rows_calls_and_processes(exported, tmp_path):
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    for file in files:
        command = [sys.executable, "-c", PROCESS, exported("avb_ac") / "1", file]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    first, second = (dict(np.load(file)) for file in files)
    np.testing.assert_array_equal(first.pop("seeded"), second.pop("seeded"))
    for name in FRESH:
        rows = [row for f in (first, second) for i in range(2) for row in f[f"{name}{i}"]]
        assert len(np.unique(np.reshape(rows, [len(rows), -1]).round(6), axis=0)) == len(rows)


X4 = X[:4]
MALFORMED = {
    "same size, other shape": ("encode", {"x": X4.reshape(4, 16, 1, 1)}),
    "rank": ("encode", {"x": X4[0]}),
    "scalar": ("encode", {"x": np.float32(1)}),
    "latents": ("decode", {"z": np.zeros([2, 5], np.float32)}),
    "bytes for floats": ("encode", {"x": X4.astype(np.uint8)}),
    "floats for bytes": ("encode_uint8", {"x": X4}),
    "float64": ("encode", {"x": X4.astype(np.float64)}),
    "strings": ("encode", {"x": np.array(["a"])}),
    "NaN": ("encode", {"x": np.where(np.arange(4) == 2, np.nan, X4.T).T.astype(np.float32)}),
    "NaN latents": ("decode", {"z": np.full([2, 3], np.nan, np.float32)}),
    "0..255": ("reconstruct", {"x": 255 * X4}),
    "negative": ("elbo", {"x": -X4}),
    "grey": ("log_likelihood", {"x": X4 / 2}),
    "huge batch": ("sample", {"row": np.zeros(101, np.int64)}),
    "rows": ("encode_seeded", {"x": X4, "seed": np.zeros(1, np.int64)}),
    "missing": ("encode_seeded", {"x": X4}),
    "unknown input": ("encode", {"x": X4, "y": X4}),
    "signature": ("train", {"x": X4}),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_without_side_effects(case, loaded):
    served = loaded("avb_ac")
    before = served.run("elbo", {"x": X})["elbo"]
    with pytest.raises(RunError) as error:
        served.run(*MALFORMED[case])
    assert error.value.code == 3  # INVALID_ARGUMENT
    np.testing.assert_array_equal(served.run("elbo", {"x": X})["elbo"], before)


def test_an_empty_batch_has_an_empty_answer(loaded):
    served = loaded("avb_ac")
    for name in REPEATABLE:
        for values in served.run(name, request(served, name, slice(0))).values():
            assert len(values) == 0


def test_files_of_a_version(exported):
    directory = exported("avb_ac")
    assert sorted(p.name for p in directory.iterdir()) == [
        "1", "batching_parameters.txt", "models.config",
    ]  # fmt: skip
    extra = directory / "1" / "assets.extra"
    assert sorted(p.name for p in extra.iterdir()) == [
        "README.md", "metadata.json", "tf_serving_warmup_requests",
    ]  # fmt: skip
    known = json.loads((extra / "metadata.json").read_text())
    assert known["name"] == "avb_ac"
    assert known["importance_samples"] == K
    assert known["packages"]["tensorflow"] == tf.__version__
    assert len(known["git_revision"]) >= 40


def test_a_damaged_export_does_not_pass(exported, tmp_path):
    for broken in (
        "models.config",
        "batching_parameters.txt",
        "1/saved_model.pb",
        "1/variables/variables.index",
        "1/assets.extra/tf_serving_warmup_requests",
    ):
        directory = tmp_path / broken.replace("/", "-")
        shutil.copytree(exported("vae"), directory)
        whole = (directory / broken).read_bytes()
        (directory / broken).write_bytes(b"{" + whole[: len(whole) // 2])
        with pytest.raises(UserError, match="would not serve"):
            check.check(directory, 1)


# The command line.

TINY = [
    "--config.steps=4", "--config.log_every=4", "--config.checkpoint_every=4",
    "--config.model.width=8", "--config.model.adversary_width=8", "--config.model.basis_width=4",
    "--config.model.bases=2", "--config.export.importance_samples=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    command_line.main(["x", "--config=configs/digits.py:vae", f"--workdir={path}", *TINY])
    return path


def run(*arguments):
    command_line.main(["x", *arguments])


def fails(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def tree(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_versions_count_up_and_serve_check_takes_the_newest(workdir, capsys):
    assert "no version" in fails(capsys, f"--workdir={workdir}", "--mode=serve_check")
    run(f"--workdir={workdir}", "--mode=export", "--config.export.version=9")
    run(f"--workdir={workdir}", "--mode=export")
    assert layout.versions(workdir / "export") == [9, 10]
    run(f"--workdir={workdir}", "--mode=serve_check")
    table = capsys.readouterr().out
    assert table.count("| fresh |") == 5  # three signatures, and the uint8 variants of two of them
    assert table.endswith("export/10: 17 signatures, 34 warmup requests\n")
    known = json.loads((workdir / "export/10/assets.extra/metadata.json").read_text())
    assert known["config"]["method"] == "vae"
    assert known["step"] == 4
    before = tree(workdir)
    message = fails(capsys, f"--workdir={workdir}", "--mode=export", "--config.export.version=9")
    assert "export/9 exists" in message
    assert tree(workdir) == before


def test_a_workdir_without_a_model_is_refused_and_not_changed(workdir, tmp_path, capsys):
    half, foreign, damaged = (tmp_path / name for name in ("half", "foreign", "damaged"))
    for path in (half, foreign, damaged):
        path.mkdir()
        (path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (foreign / "config.json").write_text('{"learning_rate": 1}')
    (damaged / "checkpoints").mkdir()
    (damaged / "checkpoints" / "step_000000004.keras").write_bytes(b"PK half a file")
    for path, expected in [
        (tmp_path / "nowhere", "config.json"),
        (half, "no checkpoint"),
        (foreign, "config.json"),
        (damaged, "damaged"),
    ]:
        before = tree(tmp_path)
        assert expected in fails(capsys, f"--workdir={path}", "--mode=export")
        assert tree(tmp_path) == before


def test_a_full_disk_leaves_nothing_behind(workdir, tmp_path):
    """A limit of 64 KiB on the size of files stands in for a full disk."""
    path = tmp_path / "run"
    shutil.copytree(workdir, path, ignore=shutil.ignore_patterns("export"))
    before = tree(path)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from avb_tf.command_line import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, f"--workdir={path}", "--mode=export"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "cannot write" in done.stderr
    assert tree(path) == before
