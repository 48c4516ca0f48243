"""Coordinates in which a posterior is standard, as a start has found them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from avb_tf import archives
from avb_tf.posteriors import evidence
from avb_tf.posteriors import tails as tailing
from avb_tf.posteriors.evidence import Evidence
from avb_tf.posteriors.mixture import Mixture
from avb_tf.posteriors.tails import Tails


class Start(NamedTuple):
    """Coordinates in which a posterior is standard, and states of chains that visited its modes.

        u, volume = start.place(z, tf.float32)  # unconstrained parameters, and log |du / dz|

    In u = tails(mean + scale @ z), z has mean 0 and covariance I over the chains' states. Up to
    200 dimensions the scale is a triangle. Above, it is a stretch along a few directions, followed
    by a diagonal scale.
    """

    mean: np.ndarray  # [dim]
    scale_tril: np.ndarray  # [dim, dim], lower triangular; or [dim], a diagonal
    z: np.ndarray  # [chains * kept, dim], the chains' states standardised, chain after chain
    tails: Tails
    chains: int  # number of chains
    log_evidence: Evidence = evidence.UNKNOWN
    points: int = 0  # number of points that were searched for further modes
    directions: np.ndarray = np.zeros([0, 0])  # [dim, rank], orthonormal
    stretch: np.ndarray = np.zeros(0)  # [rank], standard deviations along them, before the scale
    lacking: float = 0.0  # share of the posterior that the search found and the chains lack
    # Gaussians fitted to the chains, before the tails as `mean` is; None if they are too large.
    mixture: Mixture | None = None

    @property
    def deviations(self) -> np.ndarray:
        """Standard deviations of v = mean + scale @ z, before the tails, [dim]."""
        if self.scale_tril.ndim == 2:
            return np.linalg.norm(self.scale_tril, axis=1)
        return self.scale_tril * np.sqrt(1.0 + self.directions**2 @ (self.stretch**2 - 1.0))

    def place(self, z: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns u [n, dim] and log |du / dz| [n] in nats for z [n, dim], in `dtype`.

        `dtype` should be the model's, because float32 has few significant digits far from 0.
        """
        mean, factor = (tf.constant(v, dtype) for v in (self.mean, self.scale_tril))
        z = tf.cast(z, dtype)
        if self.scale_tril.ndim == 2:
            v = mean + tf.linalg.matvec(factor, z)
            volume = np.log(np.abs(np.diag(self.scale_tril))).sum()
        else:
            directions = tf.constant(self.directions, dtype)
            along = tf.matmul(z, directions) * tf.constant(self.stretch - 1.0, dtype)
            v = mean + factor * (z + tf.matmul(along, directions, transpose_b=True))
            volume = np.log(self.scale_tril).sum() + np.log(self.stretch).sum()
        u, of_tails = self.tails.forward(v)
        return u, of_tails + float(volume)

    def save(self, path: str | Path) -> None:
        """Writes a `.npz` file without pickled arrays; `load` reads it."""
        np.savez(
            path,
            mean=self.mean,
            scale_tril=self.scale_tril,
            z=self.z.astype(np.float32),
            directions=self.directions,
            stretch=self.stretch,
            tukey=np.vstack([self.tails.location, self.tails.scale, self.tails.weight]),
            numbers=[self.chains, *self.log_evidence, self.points, self.lacking],
            **(self.mixture._asdict() if self.mixture else {}),
        )


def load(path: Path) -> Start:
    """Loads a start that `Start.save` wrote."""
    arrays = archives.read_arrays(path)
    location, scale, *weight = arrays["tukey"]
    chains, value, error, points, lacking = arrays["numbers"].tolist()
    return Start(
        arrays["mean"],
        arrays["scale_tril"],
        arrays["z"].astype(np.float64),
        Tails(location, scale, np.stack(weight)),
        int(chains),
        Evidence(value, error),
        int(points),
        arrays["directions"],
        arrays["stretch"],
        lacking,
        _mixture_of(arrays),
    )


def _mixture_of(arrays):
    """Returns the mixture of a saved start; None for a large one, or one of an earlier version."""
    if "weights" not in arrays:
        return None
    return Mixture(*(arrays[name] for name in Mixture._fields))


def of_record(record: dict[str, Any]) -> Start:
    """Returns the start from the JSON record of earlier versions, with 4 states of each chain."""
    mean, scale_tril, z = (np.array(record[name]) for name in ("mean", "scale_tril", "z"))
    z = np.swapaxes(z.reshape(4, -1, len(mean)), 0, 1).reshape(-1, len(mean))
    return Start(mean, scale_tril, z, tailing.light(len(mean)), len(z) // 4)
