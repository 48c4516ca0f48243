"""Tests complete runs on real data, and the files that they write."""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avb_tf import checkpoints, command_line, data
from avb_tf.commands import train
from configs import digits, four_points, mnist

ROOT = Path(__file__).parents[1]
TINY = {"width": 16, "bases": 4, "basis_width": 8, "adversary_width": 16}


def command(method, workdir, *flags):
    return [
        str(ROOT / "main.py"), f"--config={ROOT}/configs/digits.py:{method}",
        f"--workdir={workdir}", "--config.steps=200", "--config.log_every=20",
        "--config.checkpoint_every=20", "--config.figures_every=0",
        *(f"--config.model.{k}={v}" for k, v in TINY.items()), *flags,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "mnist_path"), [("vae", "small"), ("avb_ac", "full")], indirect=["mnist_path"]
)
def test_200_steps_on_mnist_beat_independent_pixels(method, mnist_path, tmp_path):
    config = mnist.get_config(method)
    config.data.path, config.steps = str(mnist_path), 200
    config.log_every, config.checkpoint_every = 50, 200
    config.figures_every = 0
    model = train.train(config, tmp_path)
    history = model.history.history
    source = data.load(config.data)
    trained, held_out = (
        part.read(np.arange(part.size)).numpy() for part in (source.train, source.validation)
    )
    mean = np.clip(trained.mean(0), 1e-3, 1 - 1e-3)  # of each pixel
    pixels = held_out * np.log(mean) + (1 - held_out) * np.log(1 - mean)
    independent = pixels.sum((1, 2, 3)).mean()  # nats, in expectation over the binarisation
    assert int(checkpoints.load(tmp_path).step.value) == 200
    assert history["val_elbo"][-1] > max(independent, history["val_elbo"][0])
    if method == "avb_ac":
        assert 1.0 < history["adversary_loss"][-1] < 2 * np.log(2) + 0.1


def test_the_adversary_warms_up_on_a_frozen_encoder():
    config = digits.get_config("avb_ac")
    config.model.update(TINY)
    config.model.adversary_steps, config.optimizer.adversary_warmup = 1, 3
    model = train.create(config, (8, 8, 1))
    x = np.random.default_rng(0).random((16, 8, 8, 1), np.float32)
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.primal_variables]
    moved = []
    for _ in range(4):
        model.train_step((x,))
        after = [keras.ops.convert_to_numpy(v) for v in model.primal_variables]
        moved.append(any((a != b).any() for a, b in zip(before, after, strict=True)))
    assert moved == [False, False, False, True]
    assert int(model.adversary_optimizer.iterations) == 4


@pytest.mark.parametrize(
    ("steps", "log_every", "seconds", "expected"),
    [
        (600, 500, 1e-3, 100), (7, 500, 1e-3, 7), (1009, 500, 1e-3, 1), (300, 20, 1e-3, 20),
        (600, 500, 0.1, 10), (600, 500, 0.24, 4), (600, 500, 5.0, 1),
    ],
)  # fmt: skip
def test_the_steps_of_a_graph_call_divide_all_periods_and_take_little_time(
    steps, log_every, seconds, expected
):
    config = digits.get_config("vae")
    config.steps, config.log_every = steps, log_every
    assert train._steps_per_execution(config, seconds) == expected


def test_logs_and_figures_of_a_run(tmp_path, capsys):
    # 70 steps: the last line of the progress bar is shorter than the others.
    flags = ["--config.steps=70", "--config.figures_every=40"]
    command_line.main(command("avb_ac", tmp_path, *flags))
    scalars = {}
    for side in ("train", "validation"):
        events = EventAccumulator(str(tmp_path / "logs" / side)).Reload()
        tags = events.Tags()
        scalars[side] = {tag: events.Tensors(tag) for tag in tags["tensors"]}
    expected = {"elbo", "log_likelihood", "kl", "adversary_loss", "adversary_accuracy"}
    assert expected | {"steps_per_second"} <= set(scalars["train"])
    images = {"samples", "reconstructions", "interpolations", "manifold", "latent_space"}
    assert expected | images <= set(scalars["validation"])
    assert [e.step for e in scalars["train"]["elbo"]] == [20, 40, 60, 70]
    assert [e.step for e in scalars["validation"]["samples"]] == [40, 70]
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == images
    assert int(checkpoints.load(tmp_path).step.value) == 70


@pytest.mark.parametrize("config", [four_points, digits])
def test_configs_name_their_workdir_and_their_method(config):
    for method in ("vae", "avb_ac"):
        config_of_run = config.get_config(method)
        assert config_of_run.method == method
        assert config_of_run.name == f"{config.__name__.split('.')[-1]}-{method}"
        assert os.sep not in config_of_run.name
