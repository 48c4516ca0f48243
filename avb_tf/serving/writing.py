"""Writes signatures as one version of a servable, `<directory>/<version>/`."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from avb_tf import files, model_card
from avb_tf.errors import UserError
from avb_tf.serving import layout, signatures
from avb_tf.serving.protos import PredictionLog, PredictRequest, to_tensor

_WARMUP_BATCHES = (1, 8)
_BATCH = 64  # most rows that a server should merge into one batch
_USAGE = """\
import tensorflow as tf

signatures = tf.saved_model.load("{version}").signatures  # or TensorFlow Serving
signatures["{signature}"]({arguments})  # a dict of tensors"""

_MODELS = """\
# tensorflow_model_server --model_config_file=/models/{name}/models.config
model_config_list {{
  config {{
    name: "{name}"
    base_path: "/models/{name}"
    model_platform: "tensorflow"
    model_version_policy {{ latest {{ num_versions: 1 }} }}
  }}
}}
"""
_BATCHING = """\
# tensorflow_model_server --enable_batching \\
#   --batching_parameters_file=/models/{name}/batching_parameters.txt
max_batch_size {{ value: {batch} }}
batch_timeout_micros {{ value: 1000 }}
max_enqueued_batches {{ value: 100 }}
"""


def export(
    model: Any,
    directory: Path,
    importance_samples: int = 256,
    max_batch: int = 1024,
    **settings: Any,
) -> Path:
    """Exports an `AVB` with the signatures of `signatures.of_model`.

    Args:
      model: an `AVB`.
      directory: folder that holds the versions; created if missing.
      importance_samples: draws of z for each x in the signature `log_likelihood`.
      max_batch: most rows in a request.
      **settings: further arguments of `write`.
    Returns:
      The version's directory.
    Raises:
      UserError: the version exists or cannot be written.
    """
    functions = signatures.of_model(model, importance_samples, max_batch)
    known = {"step": int(model.step.value), "importance_samples": importance_samples}
    facts = model_card.facts(model, settings.get("config"))
    encoder, weights = model.averaged_encoder, _weights(model)
    with encoder.freezing():
        return write(directory, weights, functions, max_batch, facts, **known, **settings)


def export_posterior(fit: Any, directory: Path, max_batch: int = 1024, **settings: Any) -> Path:
    """Exports a `PosteriorFit` with the signatures of `signatures.of_posterior`.

    Args:
      fit: a `PosteriorFit`.
      directory: folder that holds the versions; created if missing.
      max_batch: most rows in a request.
      **settings: further arguments of `write`.
    Returns:
      The version's directory.
    Raises:
      UserError: the version exists or cannot be written.
    """
    functions = signatures.of_posterior(fit, max_batch)
    known = {"steps": fit.steps, "diagnostics": vars(fit.diagnostics())}
    facts = {"training steps": fit.steps, "verdict": fit.diagnostics()}
    return write(directory, _weights(fit.model), functions, max_batch, facts, **known, **settings)


def export_amortised(
    fit: Any, directory: Path, draws: int = 1000, max_batch: int = 64, **settings: Any
) -> Path:
    """Exports an `AmortisedFit` with the signatures of `signatures.of_amortised`.

    Args:
      fit: an `AmortisedFit`.
      directory: directory of the versions.
      draws: number of draws of the posterior of each data set.
      max_batch: largest number of data sets in a request.
      **settings: further arguments of `write`.
    Returns:
      The version's directory.
    Raises:
      UserError: the version exists or cannot be written, or names of the model's parts are equal.
    """
    if draws < 1:
        raise UserError(f"draws is {draws}; expected 1 or more for each data set")
    functions = signatures.of_amortised(fit, draws, max_batch)
    weights = [variable.value for variable in fit.q.variables]
    facts = {
        "training steps": fit.steps,
        "observed": "; ".join(f"{k} {shape}" for k, shape in fit.simulation.shapes.items()),
        "parameters": ", ".join(fit.simulation.names),
        "draws of each data set": draws,
    }
    known = {"steps": fit.steps, "draws": draws}
    return write(directory, weights, functions, max_batch, facts, **known, **settings)


def _weights(model) -> list[tf.Variable]:
    networks = [model.averaged_encoder, model.averaged_decoder, model.adversary]
    return [v.value for network in networks if network for v in network.variables]


def write(
    directory: Path,
    weights: Sequence[tf.Variable],
    functions: Mapping[str, Callable[..., Any]],
    max_batch: int,
    facts: Mapping[str, Any],
    version: int = 0,
    name: str = "avb",
    **metadata: Any,
) -> Path:
    """Writes a version atomically, and the server's configs into `directory`.

    Args:
      directory: folder that holds the versions; created if missing.
      weights: all variables that the signatures read.
      functions: name -> signature, as `signatures.signature` returns them.
      max_batch: most rows in a request.
      facts: the first table of the model card.
      version: number of the version; 0 means one more than the newest.
      name: name of the servable.
      **metadata: JSON values that are saved with the model.
    Returns:
      The version's directory.
    Raises:
      UserError: the version exists or cannot be written.
    """
    directory = Path(directory).absolute()
    version = version or max(layout.versions(directory), default=0) + 1
    final = directory / str(version)
    if final.exists():
        raise UserError(
            f"{final} exists; expected a new version; leave out the version to use the next one"
        )
    made = next((p for p in (*reversed(directory.parents), directory) if not p.exists()), None)
    partial = directory / f".{version}.{os.getpid()}"  # a server ignores it: it is not a number
    try:
        files.make_directory(directory)
        files.remove_leftovers(final)
        _save(partial, weights, functions)
        _describe(partial / layout.EXTRA, functions, max_batch, name, metadata)
        _write_card(partial / layout.EXTRA, version, functions, name, facts, metadata)
        files.write_atomically(directory / layout.MODELS, _MODELS.format(name=name))
        batch = min(_BATCH, max_batch)
        files.write_atomically(
            directory / layout.BATCHING, _BATCHING.format(name=name, batch=batch)
        )
        files.write_checksums(partial, *(path.name for path in partial.iterdir()))
        files.replace(partial, final)
    except (OSError, tf.errors.OpError) as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        message = getattr(error, "message", None) or error
        raise UserError(
            f"cannot write {final} ({message!s:.200}); check that path, and the space on its disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _save(path: Path, weights, functions):
    # The module holds bare weights, and the signatures are concrete functions, because TensorFlow
    # would trace `tf.function`s and Keras objects again.
    module: Any = tf.Module()
    module.weights = list(weights)
    concrete = {name: function.get_concrete_function() for name, function in functions.items()}
    tf.saved_model.save(module, str(path), signatures=concrete)


def _describe(extra: Path, functions, max_batch, name, metadata):
    """Writes the warmup requests and the model's metadata."""
    extra.mkdir()
    with tf.io.TFRecordWriter(str(extra / layout.WARMUP)) as writer:
        for signature, function in sorted(functions.items()):
            for rows in _WARMUP_BATCHES:
                log = PredictionLog()
                request = _request(name, signature, function.input_signature, rows)
                log.predict_log.request.CopyFrom(request)
                writer.write(log.SerializeToString())
    described = {
        "name": name,
        "max_batch": max_batch,
        "git_revision": _git_revision(),
        "packages": model_card.packages(),
        **metadata,
    }
    (extra / layout.METADATA).write_text(json.dumps(described, indent=2) + "\n")


def _write_card(extra: Path, version, functions, name, facts, metadata):
    signature = "encode" if "encode" in functions else "sample_seeded"
    names = [spec.name for spec in functions[signature].input_signature]
    arguments = ", ".join(f"{name}={name}" for name in names)
    usage = _USAGE.format(version=version, signature=signature, arguments=arguments)
    known = {key: metadata.get(key) for key in ("config", "results")}
    (extra / model_card.FILE).write_text(model_card.text(name, facts, usage, **known))


def _request(name: str, signature: str, specs, rows: int):
    """Returns a request with random zeros and ones, which every signature accepts."""
    request = PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    rng = np.random.default_rng(0)
    for spec in specs:
        scale = 255 if spec.dtype == tf.uint8 else 1
        values = scale * rng.integers(0, 2, [rows, *spec.shape[1:]])
        request.inputs[spec.name].CopyFrom(to_tensor(values.astype(spec.dtype.as_numpy_dtype)))
    return request


def _git_revision() -> str | None:
    """Returns the git revision of this program if it runs from a checkout, else None."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return described.stdout.strip() or None
