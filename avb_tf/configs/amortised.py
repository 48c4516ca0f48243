"""Amortised posteriors: one network for every data set of a model, by `avb_tf.fit_amortised`.

avb-tf --config=amortised:decay --mode=train_and_evaluate
avb-tf --config=amortised --config.model=path.py:function

The name after the colon is a function in this file that returns a model. A function in your own
file may return a TFP joint distribution with a part "y", or an `AmortisedProblem`.
"""

from typing import TYPE_CHECKING

import ml_collections
import numpy as np

from avb_tf.settings import amortised

if TYPE_CHECKING:
    from avb_tf.amortised.experiment import AmortisedProblem

TIMES = np.array([0.5, 1.0, 2.0, 4.0, 6.0, 8.0], np.float32)  # hours


def get_config(model: str = "decay") -> ml_collections.ConfigDict:
    return amortised.config(f"{__file__}:{model}")


def decay() -> "AmortisedProblem":
    """Concentrations of a drug at six times, with unknown rate of decay and noise."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.amortised.experiment import AmortisedProblem

    def concentrations(rate, noise):
        mean = 10.0 * tf.exp(-rate[..., tf.newaxis] * TIMES)
        return tfd.Independent(tfd.Normal(mean, noise[..., tf.newaxis]), 1)

    joint = tfd.JointDistributionNamed(
        {"rate": tfd.LogNormal(-1.0, 0.5), "noise": tfd.HalfNormal(0.5), "y": concentrations}
    )
    patients = np.array([[8.9, 7.6, 6.1, 3.5, 2.4, 1.1], [7.1, 5.6, 2.1, 0.6, -0.2, 0.3]])
    return AmortisedProblem(joint, observations=patients)


def regression() -> "AmortisedProblem":
    """A line through 5 to 50 points of unknown noise, each with a covariate of its own."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from avb_tf.amortised.experiment import AmortisedProblem

    def line(x, noise, slope, intercept):
        return tfd.Normal(intercept + slope * x, noise)

    joint = tfd.JointDistributionNamed(
        {
            "intercept": tfd.Normal(0.0, 2.0),
            "slope": tfd.Normal(0.0, 2.0),
            "noise": tfd.HalfNormal(1.0),
            "x": tfd.Normal(tf.zeros([]), 1.0),
            "y": line,
        }
    )
    rng = np.random.default_rng(0)
    observations = []
    for rows in (8, 40):
        x = rng.normal(size=rows)
        observations.append({"x": x, "y": 0.5 - 1.2 * x + 0.4 * rng.normal(size=rows)})
    return AmortisedProblem(joint, observed=("x", "y"), rows=(5, 50), observations=observations)
