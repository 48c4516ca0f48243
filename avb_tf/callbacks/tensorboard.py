"""TensorBoard panels other than scalars and figures.

`logs/` holds the config as text, the hyperparameters with the final metrics, and the layout of the
custom scalars. `logs/validation/` holds histograms and the projector's latents.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import matplotlib.image
import ml_collections
import numpy as np
import tensorflow as tf
from tensorboard.plugins import projector
from tensorboard.plugins.custom_scalar import layout_pb2 as _layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.hparams import api_pb2 as _api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary

from avb_tf import configuration, files
from avb_tf.model import AVB

layout_pb2: Any = _layout_pb2  # protobuf creates the message classes only at run time
api_pb2: Any = _api_pb2

# The accuracy of an adversary that keeps up with an encoder near its contrast lies in this band.
# Below the band the adversary is worse than chance. Above it q moves away from r, and T begins to
# underestimate the log ratio (compare `monitor.SATURATED_ACCURACY`).
HEALTHY_ACCURACY = (0.5, 0.8)
_BAND = ("healthy_accuracy_low", "healthy_accuracy_high")
# Sections of the config that the HParams panel shows. The others do not change the trained model.
_COMPARED = ("method", "optimizer", "steps", "batch_size", "precision", "model")
_SEED = 0


class Panels(keras.callbacks.Callback):
    """Writes the config, hyperparameters, histograms, projector and layout of the custom scalars.

    This callback must come after the callbacks that add to the logs.

    Args:
      config: the run's config.
      workdir: the run's directory.
      x: [count, *event], held-out examples.
      labels: [count] or None.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        x: np.ndarray,
        labels: np.ndarray | None = None,
    ):
        super().__init__()
        self.config, self.workdir, self.x, self.labels = config, workdir, x, labels
        places = {"": "logs", "train": "logs/train", "validation": "logs/validation"}
        self.writers = {
            name: tf.summary.create_file_writer(str(workdir / place))
            for name, place in places.items()
        }
        with self.writers[""].as_default(0):
            described = json.dumps(configuration.resolve(config), indent=2)
            indented = "".join(f"    {line}\n" for line in described.splitlines())
            tf.summary.text("config", indented)  # Markdown shows indented text as code
            tf.summary.experimental.write_raw_pb(layout().SerializeToString(), 0)
            hparams.hparams(_hyperparameters(config))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes histograms of held-out examples, and the healthy band of the accuracy."""
        step = int(self.model.step.numpy())
        with self.writers["validation"].as_default(step):
            for name, values in histograms(self.model, self.x).items():
                tf.summary.histogram(name, values)
        if self.model.adversary is not None:
            for side in ("train", "validation"):
                with self.writers[side].as_default(step):
                    for name, value in zip(_BAND, HEALTHY_ACCURACY, strict=True):
                        tf.summary.scalar(name, value)
        if step >= self.config.steps:
            self._conclude(step, logs or {})
        for writer in self.writers.values():
            writer.flush()

    def _conclude(self, step, logs):
        """Writes the projector's latents and the final metrics."""
        project(self.workdir / "logs" / "validation", self.model, self.x, self.labels)
        final = {k: v for k, v in logs.items() if k.startswith("val_")}
        named = {k.replace("val_", "validation/", 1): v for k, v in final.items()}
        write_metrics(self.workdir, step, named)
        with self.writers[""].as_default(step):
            ended = hparams_summary.session_end_pb(api_pb2.STATUS_SUCCESS)
            tf.summary.experimental.write_raw_pb(ended.SerializeToString(), step)


class Profile(keras.callbacks.Callback):
    """Profiles a range of steps, extended to whole calls of the training graph.

    TensorBoard needs the plugin tensorboard-plugin-profile to show the profile.

    Args:
      directory: directory of the TensorBoard logs.
      steps: (first, last), or () for no profile.
    """

    def __init__(self, directory: Path, steps: Sequence[int]):
        super().__init__()
        self.directory = directory
        self.first, self.last = steps or (0, 0)
        self.running = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the profiler before the call that includes step `first`."""
        step = int(self.model.step.numpy())
        taken = step + int(self.model.steps_per_execution)
        if not self.running and step < self.last and self.first < taken:
            tf.profiler.experimental.start(str(self.directory))
            self.running = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops the profiler after the call that includes step `last`."""
        if self.running and int(self.model.step.numpy()) >= self.last:
            self._stop()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops the profiler if training ends before step `last`."""
        if self.running:
            self._stop()

    def _stop(self):
        tf.profiler.experimental.stop()
        self.running = False
        self.first = self.last  # do not start again


def write_metrics(workdir: Path, step: int, values: Mapping[str, float]) -> None:
    """Writes a run's final metrics for the HParams panel.

    Args:
      workdir: the run's directory.
      step: training step of the evaluated checkpoint.
      values: "<split>/<estimate>" -> mean over examples, in nats unless the name says otherwise.
    """
    writer = tf.summary.create_file_writer(str(workdir / "logs"))
    with writer.as_default(step):
        for name, value in values.items():
            tf.summary.scalar(f"final/{name}", value)
    writer.close()


def layout() -> Any:
    """Returns the layout of the custom scalars.

    One category shows both bounds in a chart, and the other the adversary in its healthy band.
    """
    bounds = layout_pb2.MultilineChartContent(tag=["^monitored_elbo$", "^importance_bound$"])
    gap = layout_pb2.MarginChartContent.Series(
        value="elbo_minus_importance_bound",
        lower="elbo_minus_importance_bound_lower",
        upper="elbo_minus_importance_bound_upper",
    )
    series = layout_pb2.MarginChartContent.Series(
        value="adversary_accuracy", lower=_BAND[0], upper=_BAND[1]
    )
    accuracy = layout_pb2.MarginChartContent(series=[series])
    loss = layout_pb2.MultilineChartContent(tag=["^adversary_loss$"])
    chart, category = layout_pb2.Chart, layout_pb2.Category
    return custom_scalar.pb(
        layout_pb2.Layout(
            category=[
                category(
                    title="Is the bound valid?",
                    chart=[
                        chart(title="ELBO and importance-weighted bound, nats", multiline=bounds),
                        chart(
                            title="ELBO minus that bound, two standard errors: at most 0",
                            margin=layout_pb2.MarginChartContent(series=[gap]),
                        ),
                    ],
                ),
                category(
                    title="Does the adversary keep up?",
                    chart=[
                        chart(title="accuracy and its healthy band", margin=accuracy),
                        chart(title="loss; 1.386 at T = 0", multiline=loss),
                    ],
                ),
            ]
        )
    )


def histograms(model: AVB, x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the values to plot by name: draws of z, T at draws of q and T at draws of r.

    Args:
      model: an `AVB`.
      x: [count, *event].
    """
    posterior = model.posterior(x, 2, _SEED)
    z = np.asarray(posterior.z)
    values = {"latents/all": z}
    if z.shape[-1] <= 16:  # more would hide the other panels
        values |= {f"latents/{i}": z[..., i] for i in range(z.shape[-1])}
    if model.adversary is not None:
        t_posterior, t_contrast = model.log_ratios(x, 2, _SEED)
        values["adversary/T of q"] = np.asarray(t_posterior)
        values["adversary/T of r"] = np.asarray(t_contrast)
    return values


def project(directory: Path, model: AVB, x: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes the means of q(z|x) for the projector, with labels and thumbnails of images.

    Args:
      directory: directory of the TensorBoard logs; created if missing.
      model: an `AVB`.
      x: [count, *event].
      labels: [count] or None.
    """
    files.make_directory(directory, inside=directory.parent.parent)
    means = np.asarray(model.posterior(x, 64, _SEED).mean)
    # The projector needs at least three dimensions.
    means = np.pad(means, [(0, 0), (0, max(0, 3 - means.shape[1]))])
    np.savetxt(directory / "latents.tsv", means, "%.5g", "\t")
    config = projector.ProjectorConfig()
    embedding = config.embeddings.add(tensor_name="latents", tensor_path="latents.tsv")
    if labels is not None:
        np.savetxt(directory / "labels.tsv", labels, "%s")
        embedding.metadata_path = "labels.tsv"
    if len(model.event_shape) == 3:
        (directory / "sprite.png").write_bytes(sprite(x))
        embedding.sprite.image_path = "sprite.png"
        embedding.sprite.single_image_dim.extend(model.event_shape[1::-1])  # width first
    projector.visualize_embeddings(str(directory), config)


def sprite(x: np.ndarray) -> bytes:
    """Returns a PNG file of images in a square grid, row by row.

    Args:
      x: [count, height, width, channels], in [0, 1].
    """
    count, height, width, channels = x.shape
    side = int(np.ceil(np.sqrt(count)))
    padded = np.concatenate([x, np.zeros([side**2 - count, height, width, channels], x.dtype)])
    rows = padded.reshape(side, side, height, width, channels).swapaxes(1, 2)
    canvas = np.clip(rows.reshape(side * height, side * width, channels), 0.0, 1.0)
    if channels == 1:
        canvas = np.repeat(1.0 - canvas, 3, -1)  # dark on white, like ink on paper
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, canvas.astype(np.float64), format="png")
    return buffer.getvalue()


def _hyperparameters(config: ml_collections.ConfigDict) -> dict[str, bool | int | float | str]:
    """Returns hyperparameters, {"model.width": ...}, in types that the HParams panel accepts."""
    flat = configuration.flat(configuration.resolve(config))
    return {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for section in _COMPARED
        for key, value in flat.items()
        if key == section or key.startswith(f"{section}.")
    }
