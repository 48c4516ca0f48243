"""The methods: names and the settings of their parts. A new method is a new entry here.

Settings are plain values, so that reading a config needs no TensorFlow; `assembly` makes the parts.
"""

from typing import Any

from avb_tf.errors import UserError

# Every setting of a model with its default, which a method or the user may override.
SETTINGS: dict[str, Any] = {
    "latent_dim": 8,
    "likelihood": "bernoulli",  # bernoulli, normal, logistic
    "network": "dense",  # dense, conv: the encoder's trunk and the decoder
    "width": 256,  # of dense layers
    "depth": 2,
    "filters": (32, 64),  # of convolutions, from the image inwards
    "strides": (),  # of the convolutions; (): 2 each
    "residual_blocks": 0,  # in the encoder's trunk, in place of its dense layers or after conv
    # gaussian, gaussian_full, auxiliary: known density; black_box, injected, joint_basis: implicit;
    # noise_basis: implicit, the authors' encoder, with their trunk and decoder
    "encoder": "gaussian",
    "noise_dim": 0,  # per example; noise_basis: per basis; auxiliary: of a; 0: latent_dim
    "bases": 16,  # functions of the noise
    "basis_width": 128,
    "basis_activation": "tanh",  # of joint_basis: tanh for Gaussian tails, relu for sharp edges
    "flow_steps": 0,  # autoregressive steps after the encoder
    "flow_width": 128,
    "contrast": "full",  # prior, diagonal, full; the last two pass through the flow
    "adversary": "none",  # none, residual, concatenating, factorised
    "condition": "x",  # x, posterior, none: what the adversary reads beside z
    "adversary_width": 128,
    "adversary_depth": 2,
    "products": 1024,  # of the factorised adversary
    "draws": 1,  # z per x that are decoded
    "adversary_draws": 4,  # z per x for the adversary, at least `draws`
    "adversary_steps": 1,  # dual steps per primal step, the last simultaneous with it
    "kl_annealing_steps": 0,
    "ema_decay": 0.999,  # average of encoder and decoder, used outside training; 0: none
    "seed": 0,
}

METHODS: dict[str, dict[str, Any]] = {
    # Kingma and Welling (2014): the baseline of all comparisons.
    "vae": {"encoder": "gaussian", "contrast": "full", "adversary": "none"},
    # Mescheder, Nowozin and Geiger (2017), Algorithm 1.
    "avb": {"encoder": "black_box", "contrast": "prior", "adversary": "residual"},
    # Section 4, with the contrast's covariance in full and an adversary that reads q's description.
    "avb_ac": {
        "encoder": "joint_basis",
        "contrast": "full",
        "adversary": "residual",
        "condition": "posterior",
    },
    # The same before a flow that q and r both pass through.
    "avb_flow": {
        "encoder": "joint_basis",
        "flow_steps": 4,
        "contrast": "full",
        "adversary": "residual",
        "condition": "posterior",
    },
    # Section 4 with the networks of the authors' code for 8 latents, weight for weight: `full0_ac`
    # (dense) or `conv0_ac` with the factorised adversary. For 32 latents they have 32 bases of 64
    # noise dimensions (configs/mnist_conv.py). WORKSPACE.md lists what differs and why.
    "avb_ac_paper": {
        "encoder": "noise_basis",
        "contrast": "diagonal",
        "adversary": "factorised",
        "width": 300,
        "filters": (64, 128, 256, 512),
        "strides": (1, 1, 2, 2),
        "noise_dim": 32,
        "adversary_width": 1024,
        "adversary_depth": 3,
        "products": 8192,
        "adversary_draws": 1,
        "ema_decay": 0.0,
    },
    # Methods that AVB is compared with. Where the density is known T = log q(z|x) - log r(z|x) is
    # exact and r cancels: the prior is the contrast that needs no moments.
    # Inverse autoregressive flow: Kingma et al. (2016).
    "iaf": {
        "encoder": "gaussian",
        "flow_steps": 4,
        "contrast": "prior",
        "adversary": "none",
    },
    # Auxiliary deep generative models: Maaløe et al. (2016).
    "auxvae": {"encoder": "auxiliary", "contrast": "prior", "adversary": "none"},
    # Adversarial autoencoder, Makhzani et al. (2016): `avb` with an adversary of z alone, which
    # matches the aggregate of q(z|x) over x with the prior. Its objective is not a bound.
    "aae": {
        "encoder": "black_box",
        "contrast": "prior",
        "adversary": "residual",
        "condition": "none",
    },
}


def settings(method: str, **changes: Any) -> dict[str, Any]:
    """All settings of `method`, with `changes`.

    Raises:
      UserError: an unknown method or setting.
    """
    if method not in METHODS:
        raise UserError(f"method is '{method}'; expected one of {', '.join(METHODS)}")
    if unknown := sorted(set(changes) - set(SETTINGS)):
        raise UserError(f"unknown setting '{unknown[0]}'; expected one of {', '.join(SETTINGS)}")
    return {**SETTINGS, **METHODS[method], **changes}
