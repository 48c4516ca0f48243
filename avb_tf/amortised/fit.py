"""`fit_amortised`: one conditional density for the posteriors of all data sets of a model.

These are the stages of a fit and its use:

    model -> simulated pairs -> whitening given y -> mixtures in whitened coordinates
          -> draws for any y -> a verdict for each y
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorflow_probability import distributions as tfd

from avb_tf.amortised import sources, training
from avb_tf.amortised.checkpoint import Workdir
from avb_tf.amortised.result import AmortisedFit
from avb_tf.amortised.rows import check_sizes
from avb_tf.amortised.rows import of as of_rows
from avb_tf.amortised.simulation import Simulation
from avb_tf.amortised.stored import of_pairs
from avb_tf.errors import UserError
from avb_tf.posteriors.fit import seeded
from avb_tf.posteriors.training import Clock
from avb_tf.settings import fits
from avb_tf.settings.amortised import STEPS, resolved


def fit_amortised(
    model: Any,
    observed: Sequence[str] = ("y",),
    *,
    prior: Any = None,
    rows: tuple[int, int] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    workdir: Path | str | None = None,
    verbose: bool = True,
    **settings: Any,
) -> AmortisedFit:
    """Trains a network that represents the posterior of any data set of a model.

        fit = fit_amortised(joint, observed=("y",), seconds=300)
        fit.sample(y, 1000)              # {"mu": [1000, 2], ...}, in milliseconds
        print(fit.posterior(y).verdict)  # whether to believe it, for this y

    Args:
      model: a TFP joint distribution; or a simulator, a function of a batch of parameters [n, ...]
        and a seed [2] that returns data [n, ...], as an array or a dict by name; or what a slow
        simulator has left, a tuple (parameters, data) with n of both. A tenth of these pairs is
        held out: they decide which weights are kept, and `check` uses them.
      observed: names of the parts that will be observed; all others are inferred.
      prior: TFP distribution of a simulator's parameters; only for a simulator.
      rows: smallest and largest number of rows of a data set. The model is then a model of one row;
        the rows of a data set are independent given the parameters, and y is [rows, ...]. Without
        it, an observed `tfd.Sample` is read as a set of a fixed number of rows.
      steps: number of training steps, each with new pairs; 10,000 if `seconds` is not given either.
        A table is passed through 150 times at most, in steps of at most a 20th of it.
      seconds: time that the whole call may take. The number of training steps then depends on the
        machine, so the fit is not determined by `seed` alone.
      seed: seed of the initial weights and the pairs. TensorFlow's global seed is set.
      workdir: directory for a checkpoint of the training and for TensorBoard's scalars. The same
        call resumes from the checkpoint. With `steps` it ends as if it had not been interrupted,
        except for AutoBatched joint distributions, which cannot be drawn by step.
      verbose: whether to show a progress bar.
      **settings: changes to `settings.amortised.SETTINGS`.
    Returns:
      The fit. `fit.check()` tests its calibration over simulated data sets, and
      `fit.posterior(y).verdict` is the verdict for one data set.
    Raises:
      UserError: the model cannot be fitted; the message says what to do about it.
    Source: neural posterior estimation (Papamakarios and Murray, 2016; Greenberg, Nonnenmacher and
    Macke, 2019), with the density of this package's `network.ConditionalMixture`.
    """
    began = time.monotonic()
    fits.check_effort(steps, seconds, seed)
    if steps is None and seconds is None:
        steps = STEPS
    resolved_settings = resolved(**settings)
    with seeded(seed):
        source = simulation_of(model, prior, observed, rows)
        clock = Clock(steps, seconds, began, verbose)
        clock.start_training(0.0)
        q = training.build(source, resolved_settings)
        identity = {
            "parameters": source.coordinates(),
            "observed": source.shapes,
            "row": source.row,
            "rows": rows,
            "table": source.digest,
            "steps": steps,
            "seconds": seconds,
            "seed": seed,
            **resolved_settings,
        }
        kept = Workdir(None if workdir is None else Path(workdir), identity)
        history = training.train(q, source, resolved_settings, clock, seed, kept)
    return AmortisedFit(source, q, resolved_settings, seed, clock.step, clock.elapsed(), history)


def simulation_of(
    model: Any, prior: Any, observed: Sequence[str], rows: tuple[int, int] | None
) -> Simulation:
    """Returns the simulation of a user's model; the arguments are those of `fit_amortised`.

    Raises:
      UserError: the model cannot be fitted; the message says what to change.
    """
    if rows is not None:
        check_sizes(rows)
    if isinstance(model, tfd.JointDistribution):
        if prior is not None:
            raise UserError(
                "a joint distribution came with a `prior`; expected a `prior` only with a simulator"
            )
        source = sources.of_joint(model, observed)
    elif isinstance(model, tuple) and len(model) == 2:
        if rows is not None:
            raise UserError(
                f"rows is {rows} with a table of finished pairs; expected None: all its data sets "
                "have the same shape"
            )
        source = of_pairs(*model, prior, observed)
    elif not callable(model) or isinstance(model, tfd.Distribution):
        raise UserError(
            f"the model is of type {type(model).__name__}; expected a TFP joint distribution, not "
            "pinned, a simulator (a function of parameters and a seed), or a tuple (parameters, "
            "data) of what it has simulated"
        )
    else:
        source = sources.of_simulator(model, prior, observed)
    return source if rows is None else of_rows(source, *rows)
