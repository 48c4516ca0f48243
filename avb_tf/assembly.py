"""Builds the model that a method and its settings describe."""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import keras

from avb_tf import adversaries, auxiliary, columns, encoders, flows, networks, parts
from avb_tf.data.table import Table
from avb_tf.errors import UserError
from avb_tf.likelihoods import LIKELIHOODS
from avb_tf.model import AVB
from avb_tf.settings import methods

_TRAINING = (
    "draws", "adversary_draws", "adversary_steps", "kl_annealing_steps", "ema_decay", "hide",
    "seed",
)  # fmt: skip

# Encoders whose moments are estimated from their draws (`Encoder.moments_from_draws`).
_SAMPLE_MOMENTS = ("black_box", "injected", "auxiliary")


def build(method: str, event_shape: Sequence[int] | Table, **changes: Any) -> AVB:
    """Builds a model from the name of its method, ready for `compile` and `fit`.

        model = avb_tf.build("avb_ac", (28, 28, 1), latent_dim=8, network="conv")
        model.compile()
        model.fit(x)  # x [examples, 28, 28, 1] in [0, 1]

    Args:
      method: vae, avb, avb_ac, avb_flow, avb_ac_paper, iaf, auxvae or aae.
      event_shape: shape of one example, (features,) or (height, width, channels). If the examples
        are rows of a table, the `Table`, which has a likelihood for each column.
      **changes: settings that differ from the method's. `avb_tf.settings.methods.SETTINGS` lists
        all settings with their defaults.
    Returns:
      An `AVB`.
    Raises:
      UserError: a name is unknown, or the parts do not fit each other.
    """
    table = event_shape if isinstance(event_shape, Table) else None
    if table is not None:
        event_shape = (len(table.columns),)
        changes = {"likelihood": "table"} | changes
    s = checked(method, **changes)
    if (s.likelihood == "table") != (table is not None):
        raise UserError(
            f"likelihood is '{s.likelihood}' with {'a' if table else 'no'} table; expected 'table' "
            "for the columns of a Table: avb_tf.build(method, avb_tf.Table.of(frame))"
        )
    s.table = table
    if s.network == "conv" and len(event_shape) != 3:
        raise UserError(
            f"network 'conv' needs x of (height, width, channels), found {tuple(event_shape)}; "
            "use network 'dense'"
        )
    return AVB(
        tuple(event_shape),
        _encoder(s),
        _decoder(s, event_shape),
        _adversary(s),
        likelihood=table or s.likelihood,
        contrast=s.contrast,
        condition=s.condition,
        **{name: getattr(s, name) for name in _TRAINING},
    )


def checked(method: str, **changes: Any) -> SimpleNamespace:
    """Returns all settings of `method` with `changes`, after the checks that need no data.

    Args:
      method: a name in `settings.methods.METHODS`.
      **changes: settings that differ from the method's.
    Raises:
      UserError: a name is unknown, or the parts do not fit each other.
    """
    s = SimpleNamespace(**methods.settings(method, **changes))
    parts.check_choice("likelihood", s.likelihood, [*LIKELIHOODS, "table"])
    parts.check_names(LIKELIHOODS.get(s.likelihood), s.contrast, s.condition)
    parts.check_choice("network", s.network, ("dense", "conv"))
    if _as_published(s) and s.residual_blocks:
        raise UserError(
            f"residual_blocks is {s.residual_blocks} with encoder 'noise_basis'; expected 0, "
            "because the authors' networks have none"
        )
    if s.likelihood == "table" and (_as_published(s) or s.adversary == "factorised"):
        raise UserError(
            f"method '{method}' has the authors' networks for images; expected another for a "
            "table, such as 'avb_ac'"
        )
    if s.encoder in _SAMPLE_MOMENTS:
        learned = s.adversary != "none"
        parts.check_draws(s.draws, s.adversary_draws, learned, s.contrast, s.latent_dim, s.encoder)
    if s.flow_steps:
        parts.check_flow(s.flow_width, s.latent_dim)
    return s


def _signature() -> inspect.Signature:
    """Returns `build`'s signature with every setting as a keyword, for `help` and editors."""
    positional = list(inspect.signature(build).parameters.values())[:2]
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
        for name, value in methods.SETTINGS.items()
    ]
    return inspect.Signature([*positional, *keywords], return_annotation=AVB)


setattr(build, "__signature__", _signature())  # noqa: B010 (pyright rejects the attribute)


def _as_published(s) -> bool:
    """Returns whether the encoder and the decoder are those of the authors' code."""
    return s.encoder == "noise_basis"


def _activation(s) -> str:
    if not _as_published(s):
        return "relu"
    return "elu" if s.network == "conv" else "softplus"


def _trunk(s, width, depth) -> keras.layers.Layer:
    if s.table is not None:
        return columns.TableTrunk(s.table, width, depth, linear=True)
    support = LIKELIHOODS[s.likelihood].support
    if s.network == "conv":
        return networks.ConvTrunk(s.filters, width, s.strides, support=support)
    return networks.DenseTrunk(width, depth, support=support)


def _encoder_trunk(s) -> keras.layers.Layer:
    if _as_published(s) and s.network == "conv":  # no dense layer after the convolutions
        return networks.ConvTrunk(s.filters, 0, s.strides, _activation(s), batch_norm=True)
    if _as_published(s):
        return networks.DenseTrunk(s.width, s.depth, _activation(s))
    if not s.residual_blocks:
        return _trunk(s, s.width, s.depth)
    return networks.ResidualTrunk(_trunk(s, s.width, 0), s.width, s.residual_blocks)


def _decoder(s, event_shape) -> keras.Model:
    if s.table is not None:
        size = columns.TableLikelihood(s.table).outputs
        return networks.DenseDecoder((), size, s.width, s.depth, linear=True)
    parameters, activation = LIKELIHOODS[s.likelihood].parameters, _activation(s)
    if s.network == "conv":
        return networks.ConvDecoder(event_shape, parameters, s.filters, s.strides, activation)
    return networks.DenseDecoder(event_shape, parameters, s.width, s.depth, activation)


def _encoder(s) -> encoders.Encoder:
    trunk = _encoder_trunk(s)
    if s.flow_steps:
        base = _base(s, keras.layers.Identity())  # the base reads the trunk's features
        return flows.FlowEncoder(trunk, base, s.flow_steps, s.flow_width)
    return _base(s, trunk)


def _base(s, trunk) -> encoders.Encoder:
    noise_dim = s.noise_dim or s.latent_dim
    black_box = (trunk, s.latent_dim, noise_dim, s.width, s.depth)
    basis = (trunk, s.latent_dim, noise_dim, s.bases, s.basis_width)
    makers = {
        "gaussian": lambda: encoders.GaussianEncoder(trunk, s.latent_dim),
        "gaussian_full": lambda: encoders.GaussianEncoder(trunk, s.latent_dim, True),
        "black_box": lambda: encoders.BlackBoxEncoder(*black_box),
        "injected": lambda: encoders.BlackBoxEncoder(*black_box, inject_every_layer=True),
        "noise_basis": lambda: encoders.NoiseBasisEncoder(*basis, "elu", "positive"),
        "joint_basis": lambda: encoders.JointBasisEncoder(*basis, s.basis_activation),
        "auxiliary": lambda: auxiliary.AuxiliaryEncoder(*black_box),
    }
    parts.check_choice("encoder", s.encoder, makers)
    return makers[s.encoder]()


def _adversary(s) -> adversaries.Adversary | None:
    width, depth = s.adversary_width, s.adversary_depth
    trunk = networks.DenseStack(width, 1) if s.condition != "x" else _trunk(s, width, depth)
    makers = {
        "none": lambda: None,
        "residual": lambda: adversaries.ResidualAdversary(trunk, width, depth),
        "concatenating": lambda: adversaries.ConcatenatingAdversary(trunk, width, depth),
        "factorised": lambda: adversaries.FourTrunkAdversary(width, depth, s.products),
    }
    parts.check_choice("adversary", s.adversary, makers)
    return makers[s.adversary]()
