"""The methods: a name, and the parts that make it. A new method is a new entry here.

Plain values, so that a config file can be read without TensorFlow; `assembly` makes the parts.
"""

from typing import Any

from avb_tf.errors import UserError

# Every setting of a model, with the value it has where neither method nor user says otherwise.
SETTINGS: dict[str, Any] = {
    "latent_dim": 8,
    "likelihood": "bernoulli",  # bernoulli, normal, logistic
    "network": "dense",  # dense, conv: the encoder's trunk and the decoder
    "width": 256,  # of dense layers
    "depth": 2,
    "filters": (32, 64),  # of convolutions, from the image inwards
    "strides": (),  # of the convolutions; (): 2 each
    "residual_blocks": 0,  # of the encoder's trunk, in place of its dense layers or after conv
    # gaussian, gaussian_full, auxiliary: of known density; black_box, injected, noise_basis,
    # joint_basis: implicit
    "encoder": "gaussian",
    "noise_dim": 0,  # per example, for noise_basis per basis, for auxiliary of a; 0: as latent_dim
    "bases": 16,  # functions of the noise
    "basis_width": 128,
    "basis_activation": "tanh",  # of joint_basis: tanh for Gaussian tails, relu for sharp edges
    "flow_steps": 0,  # autoregressive steps that the encoder's draws go through
    "flow_width": 128,
    "contrast": "full",  # prior, diagonal, full; of these the last two go through the flow
    "adversary": "none",  # none, residual, concatenating, factorised
    "condition": "x",  # x, posterior, none: what the adversary reads beside z
    "adversary_width": 128,
    "adversary_depth": 2,
    "products": 1024,  # of the factorised adversary
    "draws": 1,  # z per x that are decoded
    "adversary_draws": 4,  # z per x that the adversary sees, at least those that are decoded
    "adversary_steps": 1,  # dual steps for each primal step, the last simultaneous with it
    "kl_annealing_steps": 0,
    "ema_decay": 0.999,  # of encoder and decoder, for all but training; 0: none
    "seed": 0,
}

METHODS: dict[str, dict[str, Any]] = {
    # Kingma and Welling (2014): what everything else is compared with.
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
    # The same before a flow, which takes the contrast along: a q and an r that bend with x.
    "avb_flow": {
        "encoder": "joint_basis",
        "flow_steps": 4,
        "contrast": "full",
        "adversary": "residual",
        "condition": "posterior",
    },
    # Section 4 as published: independent noise bases, diagonal contrast, an adversary of x.
    "avb_ac_paper": {
        "encoder": "noise_basis",
        "contrast": "diagonal",
        "adversary": "factorised",
    },
    # What AVB is compared with. Where the density is known T = log q(z|x) - log r(z|x) is exact
    # and r cancels: the prior is the contrast that needs no moments.
    # Inverse autoregressive flow: Kingma et al. (2016).
    "iaf": {
        "encoder": "gaussian",
        "flow_steps": 4,
        "contrast": "prior",
        "adversary": "none",
    },
    # Auxiliary deep generative models: Maaløe et al. (2016).
    "auxvae": {"encoder": "auxiliary", "contrast": "prior", "adversary": "none"},
    # Adversarial autoencoder, Makhzani et al. (2016): `avb` whose adversary sees z alone, so that
    # the aggregate of q(z|x) over x meets the prior, and what it trains is no bound.
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
