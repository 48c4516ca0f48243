"""Checks for `assembly` and `AVB` that the parts of a model are known and fit each other."""

from collections.abc import Iterable, Sequence
from typing import Any

from avb_tf.contrast import CONTRASTS
from avb_tf.data.table import Table
from avb_tf.encoders import Posterior
from avb_tf.errors import UserError
from avb_tf.likelihoods import LIKELIHOODS

CONDITIONS = ("x", "posterior", "none")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Checks a part that is chosen by name.

    Args:
      name: name of the setting.
      value: value of the setting.
      choices: all valid values.
    Raises:
      UserError: the value is not among the choices.
    """
    if value not in choices:
        raise UserError(f"{name} is '{value}'; expected one of {', '.join(choices)}")


def check_names(likelihood: Any, contrast: str, condition: str) -> None:
    """Checks the parts that `AVB` knows by name; a `Likelihood` or a `Table` needs no check.

    Args:
      likelihood: a name in `likelihoods.LIKELIHOODS`, a `Likelihood` or a `Table`.
      contrast: a name in `contrast.CONTRASTS`.
      condition: a name in `CONDITIONS`.
    Raises:
      UserError: a name is unknown.
    """
    if isinstance(likelihood, str):
        check_choice("likelihood", likelihood, LIKELIHOODS)
    check_choice("contrast", contrast, CONTRASTS)
    check_choice("condition", condition, CONDITIONS)


def check_draws(
    draws: int, adversary_draws: int, adversary: bool, contrast: str, latent_dim: int, encoder: str
) -> None:
    """Checks that there are enough draws to estimate q's moments from them.

    Args:
      draws: z for each x that the decoder reads.
      adversary_draws: z for each x that the adversary reads.
      adversary: whether there is one.
      contrast: a name in `contrast.CONTRASTS`.
      latent_dim: dimensions of z.
      encoder: name of an encoder that estimates its moments from its draws.
    Raises:
      UserError: the contrast needs more draws.
    """
    needed = {"prior": 1, "diagonal": 2, "full": latent_dim + 1}[contrast]
    samples = max(draws, adversary_draws) if adversary else draws
    if samples < needed:
        both = f" and adversary_draws {adversary_draws}" if adversary else ", without an adversary"
        raise UserError(
            f"draws is {draws}{both}; expected at least {needed}, because contrast '{contrast}' "
            f"needs the moments of encoder '{encoder}', which are estimated from its draws"
        )


def check_flow(width: int, latent_dim: int) -> None:
    """Checks that every latent reaches a hidden unit of a flow's network.

    Args:
      width: units of the flow's hidden layers.
      latent_dim: dimensions of z.
    Raises:
      UserError: the network is too narrow.
    """
    if width < latent_dim:
        raise UserError(
            f"flow_width is {width}; expected at least latent_dim, {latent_dim}, because a "
            "narrower flow ignores some of the latents"
        )


def check_hide(hide: float, table: Table | None) -> None:
    """Checks the share of a table's values that training hides.

    Args:
      hide: the share.
      table: the columns, or None if x are not the rows of a table.
    Raises:
      UserError: the share is not in [0, 1), or nothing may be missing.
    """
    if not 0.0 <= hide < 1.0:
        raise UserError(f"hide is {hide}; expected 0 or more, and less than 1")
    if hide and (table is None or not table.missing):
        found = "x is no table" if table is None else "the table has no missing values"
        raise UserError(
            f"hide is {hide}, but {found}; expected 0, or a table with missing=True "
            "(config.data.missing)"
        )


def check_shape(part: str, output: Any, expected: Sequence[int], meaning: str) -> None:
    """Checks the static shape of a part's output.

    Args:
      part: description of the part, such as "encoder MyEncoder: z".
      output: the output, a tensor.
      expected: the expected shape.
      meaning: names of the dimensions, such as "[samples, batch, latent]".
    Raises:
      UserError: the output is not a tensor, or has another shape.
    """
    shape = getattr(output, "shape", None)
    if shape is None or tuple(shape) != tuple(expected):
        actual = type(output).__name__ if shape is None else list(shape)
        raise UserError(f"{part} is {actual}; expected {list(expected)}, {meaning}")


def check_posterior(encoder: Any, posterior: Any, samples: int, batch: int) -> None:
    """Checks the shapes of an encoder's output.

    Args:
      encoder: an `Encoder`.
      posterior: the encoder's output.
      samples: number of draws.
      batch: number of examples.
    Raises:
      UserError: the output is not a `Posterior`, or a field has another shape.
    """
    name, latent = type(encoder).__name__, encoder.latent_dim
    if not isinstance(posterior, Posterior):
        raise UserError(f"encoder {name} returns {type(posterior).__name__}; expected a Posterior")
    fields = {
        "z": ([samples, batch, latent], "[samples, batch, latent]"),
        "mean": ([batch, latent], "[batch, latent]"),
        "scale_tril": ([batch, latent, latent], "[batch, latent, latent]"),
    }
    if posterior.log_prob is not None:
        fields["log_prob"] = ([samples, batch], "[samples, batch]")
    for field, (shape, meaning) in fields.items():
        check_shape(f"encoder {name}: {field}", getattr(posterior, field), shape, meaning)
