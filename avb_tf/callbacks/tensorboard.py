"""TensorBoard beyond scalars and figures: what a run is, its latents, and what it came to.

In `logs/`: the config as text, the hyperparameters with the final metrics, the layout of the
custom scalars. In `logs/validation/`: histograms, and the projector's latents.
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

from avb_tf import configuration

layout_pb2: Any = _layout_pb2  # messages that exist at run time only
api_pb2: Any = _api_pb2

# Of an adversary that keeps up with an encoder near its contrast. Below, it knows less than chance;
# above, q has left r, and T begins to fall short (compare `monitor.SATURATED_ACCURACY`).
HEALTHY_ACCURACY = (0.5, 0.8)
_BAND = ("healthy_accuracy_low", "healthy_accuracy_high")
_SEED = 0


class Panels(keras.callbacks.Callback):
    """All but scalars and figures; the callbacks before it have put theirs into the logs.

    Args:
      config: of the run.
      workdir: of the run.
      x: [count, *event], held out.
      labels: [count] or None.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, x, labels=None):
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
            tf.summary.text("config", indented)  # Markdown's code
            tf.summary.experimental.write_raw_pb(layout().SerializeToString(), 0)
            hparams.hparams(_flat(config))

    def on_epoch_end(self, epoch, logs=None):
        """Histograms of held-out examples, and the band about the adversary's accuracy."""
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
        """The latents, and what the run came to."""
        project(self.workdir / "logs" / "validation", self.model, self.x, self.labels)
        final = {k: v for k, v in logs.items() if k.startswith("val_")}
        named = {k.replace("val_", "validation/", 1): v for k, v in final.items()}
        write_metrics(self.workdir, step, named)
        with self.writers[""].as_default(step):
            ended = hparams_summary.session_end_pb(api_pb2.STATUS_SUCCESS)
            tf.summary.experimental.write_raw_pb(ended.SerializeToString(), step)


class Profile(keras.callbacks.Callback):
    """Profiles steps (first, last), rounded to whole calls of the training graph; or () none.

    TensorBoard shows it with the plugin tensorboard-plugin-profile.
    """

    def __init__(self, directory: Path, steps: Sequence[int]):
        super().__init__()
        self.directory = directory
        self.first, self.last = steps or (0, 0)
        self.running = False

    def on_train_batch_begin(self, batch, logs=None):
        """Starts with the call that takes step `first`."""
        step = int(self.model.step.numpy())
        taken = step + int(self.model.steps_per_execution)
        if not self.running and step < self.last and self.first < taken:
            tf.profiler.experimental.start(str(self.directory))
            self.running = True

    def on_train_batch_end(self, batch, logs=None):
        """Stops with the call that takes step `last`."""
        if self.running and int(self.model.step.numpy()) >= self.last:
            self._stop()

    def on_train_end(self, logs=None):
        """Stops where training ended before."""
        if self.running:
            self._stop()

    def _stop(self):
        tf.profiler.experimental.stop()
        self.running = False
        self.first = self.last  # not again


def write_metrics(workdir: Path, step: int, values: Mapping[str, float]) -> None:
    """Writes what a run came to, named by split and estimate, for the HParams panel's table."""
    writer = tf.summary.create_file_writer(str(workdir / "logs"))
    with writer.as_default(step):
        for name, value in values.items():
            tf.summary.scalar(f"final/{name}", value)
    writer.close()


def layout():
    """The custom scalars: bounds beside each other, and the adversary within its band."""
    bounds = layout_pb2.MultilineChartContent(tag=["^elbo$", "^importance_bound$"])
    gap = layout_pb2.MultilineChartContent(tag=["^elbo_minus_importance_bound$"])
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
                    title="Is the bound one?",
                    chart=[
                        chart(title="ELBO and importance-sampled bound, nats", multiline=bounds),
                        chart(title="ELBO less that bound: at most 0", multiline=gap),
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


def histograms(model, x) -> dict[str, np.ndarray]:
    """Draws of z for x [count, *event], together and by latent, and T on both its sides."""
    posterior = model.posterior(x, 2, _SEED)
    z = np.asarray(posterior.z)
    found = {"latents/all": z}
    if z.shape[-1] <= 16:  # more would bury the other panels
        found |= {f"latents/{i}": z[..., i] for i in range(z.shape[-1])}
    if model.adversary is not None:
        t_posterior, t_contrast = model.log_ratios(x, 2, _SEED)
        found["adversary/T of q"] = np.asarray(t_posterior)
        found["adversary/T of r"] = np.asarray(t_contrast)
    return found


def project(directory: Path, model, x, labels=None) -> None:
    """Means of q(z|x) for the projector, with class labels and, of images, thumbnails."""
    directory.mkdir(parents=True, exist_ok=True)
    means = np.asarray(model.posterior(x, 64, _SEED).mean)
    # The projector shows three dimensions, and nothing at all of fewer.
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


def sprite(x) -> bytes:
    """Images [count, height, width, channels] in [0, 1] row by row in a square, as a PNG file."""
    count, height, width, channels = x.shape
    side = int(np.ceil(np.sqrt(count)))
    padded = np.concatenate([x, np.zeros([side**2 - count, height, width, channels], x.dtype)])
    rows = padded.reshape(side, side, height, width, channels).swapaxes(1, 2)
    canvas = np.clip(rows.reshape(side * height, side * width, channels), 0.0, 1.0)
    if channels == 1:
        canvas = np.repeat(1.0 - canvas, 3, -1)  # ink on paper
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, canvas.astype(np.float64), format="png")
    return buffer.getvalue()


def _flat(config: ml_collections.ConfigDict) -> dict[str, bool | int | float | str]:
    """{"model.width": ...}, as the HParams panel takes them."""
    flat = {}
    for key, value in configuration.flat(configuration.resolve(config)).items():
        flat[key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat
