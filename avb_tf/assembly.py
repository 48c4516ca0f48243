"""Names -> parts: the model that a method and its settings describe."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import keras

from avb_tf import auxiliary, encoders, flows, networks
from avb_tf.contrast import CONTRASTS
from avb_tf.errors import UserError
from avb_tf.likelihoods import LIKELIHOODS
from avb_tf.model import AVB
from avb_tf.settings.methods import settings

_TRAINING = (
    "draws", "adversary_draws", "adversary_steps", "kl_annealing_steps", "ema_decay", "seed",
)  # fmt: skip


# Encoders of whose moments nothing is known but what their draws tell.
_MOMENTS_OF_DRAWS = ("black_box", "injected", "auxiliary")


def build(method: str, event_shape: Sequence[int], **changes: Any) -> AVB:
    """A model by name, ready for `compile` and `fit`.

    Args:
      method: a name in `settings.methods.METHODS`.
      event_shape: shape of one example: (features,) or (height, width, channels).
      **changes: to the settings in `settings.methods.SETTINGS`, which says what each means.
    Raises:
      UserError: a name that does not exist, or parts that do not fit each other.
    """
    s = checked(method, **changes)
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
        likelihood=s.likelihood,
        contrast=s.contrast,
        condition=s.condition,
        **{name: getattr(s, name) for name in _TRAINING},
    )


def checked(method: str, **changes: Any) -> SimpleNamespace:
    """All settings of `method`, with `changes`, as far as they fit whatever the data.

    Raises:
      UserError: a name that does not exist, or parts that do not fit each other.
    """
    s = SimpleNamespace(**settings(method, **changes))
    _check(s, "likelihood", LIKELIHOODS)
    _check(s, "contrast", CONTRASTS)
    _check(s, "condition", ("x", "posterior", "none"))
    _check(s, "network", ("dense", "conv"))
    if _as_published(s) and s.residual_blocks:
        raise UserError(
            f"residual_blocks is {s.residual_blocks} with encoder 'noise_basis'; expected 0, as "
            "the authors' networks have none"
        )
    needed = {"prior": 1, "diagonal": 2, "full": s.latent_dim + 1}[s.contrast]
    samples = s.draws if s.adversary == "none" else max(s.draws, s.adversary_draws)
    if s.encoder in _MOMENTS_OF_DRAWS and samples < needed:
        raise UserError(
            f"draws is {s.draws} and adversary_draws {s.adversary_draws}, with adversary "
            f"'{s.adversary}' {samples} an example; expected at least {needed} for the moments of "
            f"encoder '{s.encoder}' under contrast '{s.contrast}'"
        )
    if s.flow_steps and s.flow_width < s.latent_dim:
        raise UserError(
            f"flow_width is {s.flow_width}; expected at least the {s.latent_dim} of latent_dim, "
            "or a step reads some of the latents nowhere"
        )
    return s


def _check(s, name, known):
    if getattr(s, name) not in known:
        raise UserError(f"{name} is '{getattr(s, name)}'; expected one of {', '.join(known)}")


def _as_published(s) -> bool:
    """Whether encoder and decoder are those of the authors' code."""
    return s.encoder == "noise_basis"


def _activation(s) -> str:
    if not _as_published(s):
        return "relu"
    return "elu" if s.network == "conv" else "softplus"


def _trunk(s, width, depth) -> keras.layers.Layer:
    if s.network == "conv":
        return networks.ConvTrunk(s.filters, width, s.strides)
    return networks.DenseTrunk(width, depth)


def _encoder_trunk(s) -> keras.layers.Layer:
    if _as_published(s) and s.network == "conv":  # no dense layer after the convolutions
        return networks.ConvTrunk(s.filters, 0, s.strides, _activation(s), batch_norm=True)
    if _as_published(s):
        return networks.DenseTrunk(s.width, s.depth, _activation(s))
    if not s.residual_blocks:
        return _trunk(s, s.width, s.depth)
    return networks.ResidualTrunk(_trunk(s, s.width, 0), s.width, s.residual_blocks)


def _decoder(s, event_shape) -> keras.Model:
    parameters, activation = LIKELIHOODS[s.likelihood].parameters, _activation(s)
    if s.network == "conv":
        return networks.ConvDecoder(event_shape, parameters, s.filters, s.strides, activation)
    return networks.DenseDecoder(event_shape, parameters, s.width, s.depth, activation)


def _encoder(s) -> encoders.Encoder:
    trunk = _encoder_trunk(s)
    if s.flow_steps:
        base = _base(s, keras.layers.Identity())  # of the trunk's features
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
    _check(s, "encoder", makers)
    return makers[s.encoder]()


def _adversary(s) -> networks.Adversary | None:
    width, depth = s.adversary_width, s.adversary_depth
    trunk = networks.DenseStack(width, 1) if s.condition != "x" else _trunk(s, width, depth)
    makers = {
        "none": lambda: None,
        "residual": lambda: networks.ResidualAdversary(trunk, width, depth),
        "concatenating": lambda: networks.ConcatenatingAdversary(trunk, width, depth),
        "factorised": lambda: networks.FourTrunkAdversary(width, depth, s.products),
    }
    _check(s, "adversary", makers)
    return makers[s.adversary]()
