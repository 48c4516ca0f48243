"""Times a config on this machine, next to the machine's measured peak and a plain step."""

import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import contrast as contrasts
from avb_tf import data, files, objectives
from avb_tf.adversaries import FourTrunkAdversary
from avb_tf.benchmarks import device
from avb_tf.callbacks import tensorboard, writing
from avb_tf.commands import train
from avb_tf.data import pipeline, resident
from avb_tf.data.source import array_split
from avb_tf.errors import UserError
from avb_tf.likelihood_estimation import ais
from avb_tf.likelihoods import log_likelihood
from avb_tf.model import AVB
from avb_tf.posteriors import fit as posteriors
from avb_tf.serving.saved_model import SavedModel

FILE = "benchmark.json"
REPEATS = 30  # calls of each function that is timed
POSTERIOR_STEPS = 500
_TRAIN = 3  # stream of the noise; any number would do
# Callbacks that do not act at every epoch.
_RARE = (writing.Checkpoints, writing.Figures, tensorboard.Profile)


def benchmark(config: ml_collections.ConfigDict, workdir: Path, baseline: str = "") -> None:
    """Times the config's step and the work around it, prints a table and writes `benchmark.json`.

    Args:
      config: the run's config; nothing is trained.
      workdir: folder for `benchmark.json`.
      baseline: path of an earlier `benchmark.json`, or ''; the table shows ratios to its values.
    Raises:
      UserError: the data or the baseline cannot be used, or the parts of the model do not fit.
    """
    before = _read(Path(baseline)) if baseline else {}
    source = data.load(config.data)
    measured = {f"machine: {name}": value for name, value in _machine().items()}
    if device.gpu():
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
        measured["machine: float32 products are in TF32"] = float(tf32)
    step = _step(config, source.event_shape)
    measured |= {f"step: {name}": value for name, value in step.items()}
    dtype = config.precision.removeprefix("mixed_")
    if peak := measured.get(f"machine: matmul {dtype} GFLOP/s"):  # no peak is measured for float16
        measured[f"step: % of the {dtype} matmul peak"] = 100.0 * step["GFLOP/s"] / peak
    around = _around(config, source, step["seconds"])
    measured |= {f"beside the step: {name}": value for name, value in around.items()}
    measured |= {f"posterior: {name}": value for name, value in _posterior().items()}
    measured |= {
        f"export: {name}": value for name, value in _serving(config, source.event_shape).items()
    }
    measured["AIS: chain-leapfrogs per second"] = _annealing(config, source.event_shape)
    measured |= {f"start-up: {name}": value for name, value in _start_up().items()}
    measured["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / FILE, json.dumps(measured, indent=2) + "\n")
    for name, value in measured.items():
        ratio = f"{value / before[name]:8.2f} x" if before.get(name) else ""
        print(f"{name:56} {value:12.4g} {ratio}")
    print(device.gpu() or "CPU", workdir / FILE)


def _read(file: Path) -> dict[str, float]:
    try:
        measured = json.loads(file.read_text())
        if not all(isinstance(value, float) for value in measured.values()):
            raise ValueError("it holds values other than numbers")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot use --baseline={file}: {error}; expected a {FILE} of --mode=benchmark"
        ) from error
    return measured


def reference_step(model: AVB, x: tf.Tensor) -> None:
    """Takes a training step with one adversary step, written in the obvious way, for comparison.

    It calls the adversary twice on whole inputs, so the branch of x is computed twice, and records
    everything on one tape.
    """
    adversary: Any = model.adversary
    noise, z_contrast = model.noises(x, _TRAIN)
    with tf.GradientTape(persistent=True) as tape:
        posterior = model.encoder(x, noise, training=True)
        q, r = contrasts.compare(posterior, model.contrast)
        condition = model.condition_of(x, q, r)
        t = _plain_t(adversary, condition, contrasts.whiten(q.z, r))
        t_contrast = _plain_t(adversary, condition, z_contrast)
        outputs = model.decoder(posterior.z[: model.draws])
        reconstruction = tf.reduce_mean(log_likelihood(model.likelihood, outputs, x))
        after_flow = None if q is posterior else posterior
        kl = tf.reduce_mean(contrasts.divergence(r, model.prior, after_flow) + t)
        loss = kl - reconstruction
        adversary_loss = tf.reduce_mean(objectives.adversary_loss(t, t_contrast))
    primal, dual = model.primal_variables, adversary.trainable_variables
    model.optimizer.apply(tape.gradient(loss, primal), primal)
    model.adversary_optimizer.apply(tape.gradient(adversary_loss, dual), dual)
    model.average(tf.constant(True))
    model.step.assign_add(1)


def _plain_t(adversary: Any, condition, z):
    """Returns the adversary's T [samples, batch]; a factorised T follows its formula literally."""
    if not isinstance(adversary, FourTrunkAdversary):
        return adversary(condition, z)
    x, h = adversary.flatten(condition), adversary.s_stack(z)
    bias: Any = adversary.s_bias.kernel
    s = tf.cast(tf.matmul(h, tf.cast(adversary.s.kernel, h.dtype)), tf.float32) + bias[:, 0]
    theta = tf.cast(tf.nn.elu(adversary.theta(adversary.theta_stack(x))), tf.float32)
    t = tf.reduce_sum(theta * s, -1) + 0.5 * tf.reduce_sum(z**2, -1)
    t_x, t_z = adversary.t_x(adversary.t_x_stack(x)), adversary.t_z(adversary.t_z_stack(z))
    return t + t_x[:, 0] + t_z[..., 0]


def seconds_of(
    *functions: Callable[[], object], repeats: int = REPEATS, at_most: float = math.inf
) -> list[float]:
    """Returns the median seconds of each function.

    The functions are called in turn, so that other load on the machine affects all of them alike.

    Args:
      *functions: functions without arguments.
      repeats: calls of each function.
      at_most: no further round of calls begins once all calls together took this many seconds.
    """
    times = [[] for _ in functions]
    for function in functions:
        function()  # warm-up: traces the function and allocates its memory
    for _ in range(repeats):
        if sum(map(sum, times)) > at_most:
            break
        for function, own in zip(functions, times, strict=True):
            tf.test.experimental.sync_devices()
            began = time.perf_counter()
            function()
            tf.test.experimental.sync_devices()  # a call returns before the GPU has finished
            own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in times]


def arithmetic(function: Any) -> int:
    """Counts the floating point operations in the products of a traced function.

    All shapes must be known. Only operations that the outputs or the assignments need are counted,
    because a graph also holds gradients that nothing uses and that never run.
    """
    graph = function.graph
    needed, stack = set(), [t.op for t in graph.outputs]
    stack += [op for op in graph.get_operations() if "Apply" in op.type or "Assign" in op.type]
    while stack:
        if (op := stack.pop()) not in needed:
            needed.add(op)
            stack += [t.op for t in op.inputs] + list(op.control_inputs)
    return sum(_products(op) for op in needed)


def _products(op) -> int:
    def size(shape):
        return int(np.prod(shape.as_list()))

    if op.type == "MatMul":
        inner = op.inputs[0].shape[0 if op.get_attr("transpose_a") else 1]
        return 2 * inner * size(op.outputs[0].shape)
    if op.type == "BatchMatMulV2":
        inner = op.inputs[0].shape[-2 if op.get_attr("adj_x") else -1]
        return 2 * inner * size(op.outputs[0].shape)
    kernel_and_image = {
        "Conv2D": lambda: (op.inputs[1].shape, op.outputs[0].shape),
        "Conv2DBackpropInput": lambda: (op.inputs[1].shape, op.inputs[2].shape),
        "Conv2DBackpropFilter": lambda: (_shape_behind(op.inputs[1]), op.inputs[2].shape),
    }
    if op.type in kernel_and_image:
        kernel, image = kernel_and_image[op.type]()
        return 2 * size(image) * size(kernel[:3])
    return 0


def _shape_behind(sizes) -> tf.TensorShape:
    """Returns the shape in `sizes`, a constant or the output of an op Shape or ShapeN."""
    if (value := tf.get_static_value(sizes)) is not None:
        return tf.TensorShape(value)
    return sizes.op.inputs[sizes.value_index].shape


def _machine() -> dict[str, float]:
    """Returns this machine's peaks in GFLOP/s, by a large product and a large convolution."""
    measured = {}
    for dtype in (tf.float32, tf.bfloat16):
        a = tf.cast(tf.random.stateless_normal([4096, 4096], [0, 0]), dtype)
        image = tf.cast(tf.random.stateless_normal([128, 14, 14, 256], [0, 1]), dtype)
        kernel = tf.cast(tf.random.stateless_normal([5, 5, 256, 256], [0, 2]), dtype)
        product = tf.function(lambda a=a: tf.reduce_sum(a @ a))
        convolution = tf.function(
            lambda i=image, k=kernel: tf.reduce_sum(tf.nn.conv2d(i, k, 1, "SAME"))
        )
        for name, function in (("matmul", product), ("convolution", convolution)):
            (seconds,) = seconds_of(lambda f=function: f().numpy(), repeats=7)
            flops = arithmetic(function.get_concrete_function())
            measured[f"{name} {dtype.name} GFLOP/s"] = flops / seconds / 1e9
    return measured


def _step(config: ml_collections.ConfigDict, event_shape) -> dict[str, float]:
    """Measures the step as `fit` takes it, and the steps with which it is compared."""
    x = tf.zeros([config.batch_size, *event_shape])
    model = train.create(config, event_shape)
    flops = arithmetic(tf.function(model.train_step).get_concrete_function(x))
    count = resident.CAPACITY if model.loop_is_compiled else 1  # steps in a call
    began = time.perf_counter()
    call = _fitting(model, x, count)
    call()
    tf.test.experimental.sync_devices()
    measured = {"seconds until the first call is done": time.perf_counter() - began}
    functions = [call]
    if model.adversary is not None:
        dual = _repeated(
            lambda: model.dual_step(x, model.encoder.parameters(x), _TRAIN), count, model
        )
        plain = train.create(config, event_shape)
        plain.compile(*(keras.optimizers.Adam(1e-4, global_clipnorm=100.0) for _ in range(2)))
        functions += [dual, _repeated(lambda: reference_step(plain, x), count, model)]
    repeats = REPEATS if count == 1 else 7  # a call has a hundred steps
    seconds = [each / count for each in seconds_of(*functions, repeats=repeats)]
    measured |= {
        "seconds": seconds[0],
        "examples per second": config.batch_size / seconds[0],
        "GFLOP": flops / 1e9,
        "GFLOP/s": flops / seconds[0] / 1e9,
    }
    if model.adversary is not None:
        measured |= {
            "seconds of a dual step alone": seconds[1],
            "seconds of the plainly written step": seconds[2],
            "ratio to the plainly written step": seconds[0] / seconds[2],
        }
    if device.gpu():
        started = device.kernels(call)
        measured["kernels"] = sum(number for number, _ in started.values()) / count
        busy = sum(each for _, each in started.values()) / count
        measured |= {"seconds of its kernels": busy, "ratio to its kernels": seconds[0] / busy}
        measured["GPU memory, MB"] = device.peak_megabytes()
    return measured


def _fitting(model: AVB, x, count: int) -> Callable[[], object]:
    """Returns a function that calls the graph of `model.fit` for `count` steps."""
    split = array_split(x.numpy())
    model.steps_per_execution = count
    model.fit(split, batch_size=len(x), steps_per_epoch=count, verbose=0)
    model.resident = resident.put(
        split, tf.distribute.get_strategy(), len(x), 0, 0, False, count, count
    )
    calls, train_function = iter(model.resident.calls), model.make_train_function()
    return lambda: train_function(calls)


def _repeated(step: Callable[[], object], count: int, model: AVB) -> Callable[[], object]:
    """Returns a function that takes `count` steps, compiled as `model` compiles its own."""

    def loop():
        tf.while_loop(lambda i: i < count, lambda i: step() or [i + 1], [0])

    return tf.function(loop, autograph=False, jit_compile=model.jit_compile)


def _around(config: ml_collections.ConfigDict, source, step_seconds: float) -> dict[str, float]:
    """Times the work between steps; its share of the wall time follows the config's periods."""
    model = train.create(config, source.event_shape)
    batches = iter(pipeline.training_batches(source.train, config.batch_size, 0, 0))
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory)
        run = train.Training(config, workdir, tf.distribute.get_strategy(), model, source)
        log = model.evaluate(run.validation, verbose=0, return_dict=True)
        logs = log | {f"val_{name}": value for name, value in log.items()}
        each_epoch = [c for c in run.callbacks if not isinstance(c, _RARE)]
        rare: dict[type, Any] = {type(c): c for c in run.callbacks if isinstance(c, _RARE)}
        for callback in run.callbacks:
            callback.set_model(model)
            callback.on_train_begin()

        def epoch():
            for callback in each_epoch:
                callback.on_epoch_begin(0)
                callback.on_epoch_end(0, dict(logs))

        def validation():
            model.evaluate(run.validation, verbose=0, return_dict=True)

        parts = {
            "a batch": (1, lambda: next(batches)),
            "validation": (config.log_every, validation),
            "an epoch's other callbacks": (config.log_every, epoch),
            "a checkpoint": (config.checkpoint_every, rare[writing.Checkpoints].save),
            "figures": (config.figures_every, rare[writing.Figures].draw),
        }
        measured, total = {}, 0.0
        for name, (every, function) in parts.items():
            (seconds,) = seconds_of(function, repeats=3 if every > 1 else 100)
            measured[f"seconds of {name}"] = seconds
            total += seconds / every if every else 0.0
    measured["share of wall time, %"] = 100.0 * total / (total + step_seconds)
    return measured


def _annealing(config: ml_collections.ConfigDict, event_shape) -> float:
    """Returns leapfrog steps per second, summed over all chains, including those of the pilot."""
    sampler = ais.AnnealedSampler(train.create(config, event_shape), 20, chains=16)
    # With a convolutional decoder the chains of one example take half a minute.
    examples = 1 if config.model.network == "conv" else 25
    x = np.zeros([examples, *event_shape], np.float32)
    (seconds,) = seconds_of(lambda: sampler.forward(x), repeats=3, at_most=10.0)
    chains = len(x) * (sampler.chains + ais.PILOT_CHAINS)
    return chains * 20 * sampler.leapfrog_steps / seconds


def _posterior() -> dict[str, float]:
    """Times the fit of a ten-dimensional Gaussian, whose density costs almost nothing."""

    def density(u):
        return -0.5 * tf.reduce_sum(u**2, -1)

    fit = posteriors.fit_posterior(density, shape=[10], steps=POSTERIOR_STEPS, verbose=False)
    began = time.perf_counter()
    fit.sample(100_000)
    seconds = time.perf_counter() - began
    return {
        f"seconds of a fit of {fit.steps} steps": fit.seconds,
        "draws per second": 100_000 / seconds,
    }


def _serving(config: ml_collections.ConfigDict, event_shape) -> dict[str, float]:
    """Returns the requests per second that an export answers in the C library, one at a time."""
    model = train.create(config, event_shape)
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        served = SavedModel(model.export(directory))
        for name in ("encode", "decode", "log_likelihood"):
            ((tensor_name, tensor),) = served.signatures[name].inputs.items()
            for rows in (1, 128):
                request = {tensor_name: np.zeros([rows, *tensor.shape[1:]], np.float32)}
                served_once = functools.partial(served.run, name, request)
                (seconds,) = seconds_of(served_once, repeats=10, at_most=10.0)
                measured[f"{name} of {rows} rows, requests per second"] = 1.0 / seconds
        served.close()
    return measured


def _start_up() -> dict[str, float]:
    """Returns the seconds that fresh processes take."""
    commands = {
        "import tensorflow": ["-c", "import tensorflow"],
        "import avb_tf": ["-c", "import avb_tf; avb_tf.AVB"],
        "--help": ["-c", "from avb_tf.command_line import main; main(['avb-tf', '--help'])"],
    }
    quiet: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "check": True,
    }
    runs = [
        lambda arguments=arguments: subprocess.run([sys.executable, *arguments], **quiet)
        for arguments in commands.values()
    ]
    return {
        f"seconds of {name}": seconds
        for name, seconds in zip(commands, seconds_of(*runs, repeats=3), strict=True)
    }
