"""Loads an export as a server would and runs every signature."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from tensorboard.compat.tensorflow_stub.errors import OpError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from avb_tf.errors import UserError
from avb_tf.serving import layout
from avb_tf.serving.protos import ModelServerConfig, PredictionLog, from_tensor
from avb_tf.serving.saved_model import RunError, SavedModel, Signature

BATCHES = (1, 5, 64)
TOLERANCE = 1e-5  # largest difference between a row's answers in two batches; relative above 1


def serve_check(config: Any, workdir: Path) -> None:
    """Checks the newest version in the workdir's `export/` and prints a table of its signatures.

    Raises:
      UserError: there is no export, or a server could not serve it.
    """
    directory = workdir / layout.DIRECTORY
    if not (versions := layout.versions(directory)):
        raise UserError(f"{directory} holds no version; export the model first, --mode=export")
    print(check(directory, versions[-1]))


def check(directory: Path, version: int) -> str:
    """Checks `<directory>/<version>` and the server's configs; returns a Markdown table.

    Args:
      directory: folder that holds the versions.
      version: number of the version to check.
    Raises:
      UserError: a server could not serve it.
    """
    servable = directory / str(version)
    try:
        _check_configs(directory)
        model = SavedModel(servable)
        try:
            replayed = replay(model, servable)
            rows = [check_signature(model, name) for name in model.signatures]
        finally:
            model.close()
    except (RunError, OSError, OpError, text_format.ParseError, ValueError) as error:
        raise UserError(f"{servable} would not serve: {error}; export the model again") from error
    header = ["signature", "inputs", "outputs", *[f"ms, {n} rows" for n in BATCHES], "repeats"]
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([*lines, f"{servable}: {len(rows)} signatures, {replayed} warmup requests"])


def _check_configs(directory: Path):
    models = text_format.Parse((directory / layout.MODELS).read_text(), ModelServerConfig())
    if not any(model.name and model.base_path for model in models.model_config_list.config):
        raise ValueError(f"{layout.MODELS} names no model")
    text_format.Parse((directory / layout.BATCHING).read_text(), _batching_parameters())


def check_signature(model: SavedModel, name: str) -> list[str]:
    """Runs a signature and returns its row of the table.

    Args:
      model: a loaded export.
      name: name of the signature.
    Raises:
      ValueError: the signature breaks a promise of `signatures`: an answer has the wrong number of
        rows, contains NaN or depends on the batch, or the same seeds give different draws.
    """
    signature = model.signatures[name]
    requests = {rows: _request(signature, rows) for rows in BATCHES}
    answers, milliseconds = {}, []
    for rows, request in requests.items():
        model.run(name, request)  # not timed: the first call of each size initialises the session
        began = time.perf_counter()
        answers[rows] = model.run(name, request)
        milliseconds.append(f"{1000 * (time.perf_counter() - began):.1f}")
        for output, values in answers[rows].items():
            if len(values) != rows or np.isnan(values).any():
                raise ValueError(f"{name} answers {rows} rows with {output} {values.shape}")
    again = model.run(name, requests[BATCHES[-1]])
    repeats = _largest_difference(again, answers[BATCHES[-1]]) == 0.0
    if "seed" in signature.inputs and not repeats:
        raise ValueError(f"{name} answers the same seeds differently")
    for rows, answer in answers.items() if repeats else ():
        full = {output: values[:rows] for output, values in answers[BATCHES[-1]].items()}
        if (difference := _largest_difference(answer, full)) > TOLERANCE:
            raise ValueError(f"{name} depends on the batch: by {difference:.1e} among {rows} rows")
    described = [_described(tensors) for tensors in signature]
    return [name, *described, *milliseconds, "yes" if repeats else "fresh"]


def _request(signature: Signature, rows: int) -> dict[str, np.ndarray]:
    """Returns random zeros and ones, which every model accepts.

    The first rows of a larger request are the rows of a smaller one.
    """
    request = {}
    for name, tensor in signature.inputs.items():
        scale = 255 if tensor.dtype == np.uint8 else 1
        values = np.random.default_rng(0).integers(0, 2, [rows, *tensor.shape[1:]])
        request[name] = (scale * values).astype(tensor.dtype)
    return request


def _largest_difference(answer, other) -> float:
    largest = 0.0
    for name, values in answer.items():
        unequal = values != other[name]  # the difference of equal infinities would be NaN
        scale = np.maximum(1.0, np.abs(other[name][unequal]))
        change = np.abs(values[unequal] - other[name][unequal]) / scale
        largest = max(largest, float(change.max(initial=0.0)))
    return largest


def _described(tensors) -> str:
    def sizes(tensor):
        return ", ".join("rows" if size < 0 else str(size) for size in tensor.shape)

    return ", ".join(f"{name} {t.dtype} [{sizes(t)}]" for name, t in tensors.items())


def replay(model: SavedModel, servable: Path) -> int:
    """Runs the warmup requests, as a server does when it loads, and returns their number.

    Args:
      model: a loaded export.
      servable: folder of the version.
    Raises:
      ValueError: there are no requests, or more than a server replays.
    """
    reader = PyRecordReader_New(str(servable / layout.EXTRA / layout.WARMUP))
    count = 0
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            break
        request = PredictionLog.FromString(reader.record()).predict_log.request
        inputs = {name: from_tensor(tensor) for name, tensor in request.inputs.items()}
        model.run(request.model_spec.signature_name, inputs)
        count += 1
    if not 0 < count <= layout.MAX_WARMUP:
        raise ValueError(f"{count} warmup requests; expected 1 to {layout.MAX_WARMUP}")
    return count


def _batching_parameters():
    """Returns an empty BatchingParameters message, which TensorFlow Serving's package lacks."""
    file = descriptor_pb2.FileDescriptorProto(
        name="avb_tf/batching_parameters.proto",
        dependency=["google/protobuf/wrappers.proto"],
        syntax="proto3",
    )
    message = file.message_type.add(name="BatchingParameters")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, field in enumerate(
        ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"), 1
    ):
        message.field.add(
            name=field, number=number, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_OPTIONAL,
            type_name=".google.protobuf.Int64Value",
        )  # fmt: skip
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("BatchingParameters"))()
