"""The methods by name, each with its settings. To add a method, add an entry here.

All values are plain, so that a config file can be read without TensorFlow. `assembly` builds the
parts.
"""

from typing import Any

from avb_tf.errors import UserError

# Every setting of a model with its default, which a method or the user may change.
SETTINGS: dict[str, Any] = {
    "latent_dim": 8,
    # For x in [0, 1]: bernoulli, normal (with its mean in [0, 1]), logistic; for real numbers, such
    # as standardised ones: gaussian, student_t; for counts: poisson, negative_binomial; for tables,
    # with a likelihood for each column: table
    "likelihood": "bernoulli",
    "network": "dense",  # dense, conv: the encoder's trunk and the decoder
    "width": 256,  # units of each dense layer in encoder and decoder
    "depth": 2,  # number of these layers
    "filters": (32, 64),  # filters of each convolution, from the image inwards
    "strides": (),  # stride of each convolution; (): 2 each
    "residual_blocks": 0,  # in the encoder's trunk, instead of its dense layers or after conv
    # gaussian, gaussian_full: known density; auxiliary: a bound on the density, so no adversary is
    # needed; black_box, injected, joint_basis: implicit; noise_basis: implicit, the authors'
    # encoder, with their trunk and decoder
    "encoder": "gaussian",
    # Dimensions of the noise (noise_basis: for each basis; auxiliary: of a); 0: latent_dim
    "noise_dim": 0,
    "bases": 16,  # number of functions of the noise, for noise_basis and joint_basis
    "basis_width": 128,  # units of each layer in these functions
    "basis_activation": "tanh",  # joint_basis only: tanh for Gaussian tails, relu for sharp edges
    "flow_steps": 0,  # autoregressive steps applied to the encoder's draws; 0: no flow
    "flow_width": 128,  # units of each hidden layer of the flow, at least latent_dim
    "contrast": "full",  # prior, diagonal, full; diagonal and full pass through the flow
    "adversary": "none",  # none, residual, concatenating, factorised
    "condition": "x",  # x, posterior, none: the adversary's input besides z
    "adversary_width": 128,  # units of each layer of the adversary
    "adversary_depth": 2,  # number of these layers
    "products": 1024,  # length of theta(x) and s(z) in the factorised adversary
    "draws": 1,  # z for each x that the decoder reads
    "adversary_draws": 4,  # z for each x that the adversary reads, at least `draws`
    "adversary_steps": 1,  # dual steps for each primal step; the last one is simultaneous with it
    "kl_annealing_steps": 0,  # steps in which the weight of the KL term rises to 1; 0: none
    "ema_decay": 0.999,  # decay of the averaged weights, used outside training; 0: no averaging
    # Share of a table's known values that each training step hides at random, so that the model
    # learns to fill in what is missing; table only, with missing values allowed
    "hide": 0.0,
    "seed": 0,
}

METHODS: dict[str, dict[str, Any]] = {
    # Kingma and Welling (2014), the baseline of all comparisons.
    "vae": {"encoder": "gaussian", "contrast": "full", "adversary": "none"},
    # Mescheder, Nowozin and Geiger (2017), Algorithm 1.
    "avb": {"encoder": "black_box", "contrast": "prior", "adversary": "residual"},
    # Section 4 with a full covariance and an adversary that reads q's description instead of x.
    "avb_ac": {
        "encoder": "joint_basis",
        "contrast": "full",
        "adversary": "residual",
        "condition": "posterior",
    },
    # `avb_ac` with a flow that both q and the contrast r pass through.
    "avb_flow": {
        "encoder": "joint_basis",
        "flow_steps": 4,
        "contrast": "full",
        "adversary": "residual",
        "condition": "posterior",
    },
    # Section 4 with exactly the networks of the authors' code for 8 latents: `full0_ac` (dense) or
    # `conv0_ac`, with the factorised adversary. For 32 latents the authors use 32 bases of 64 noise
    # dimensions (configs/mnist_conv.py). docs/reference/published.md compares the networks.
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
    # Baselines. If the density is known, T = log q(z|x) - log r(z|x) is exact and r cancels, so
    # the contrast is the prior, which needs no moments.
    # Inverse autoregressive flow: Kingma et al. (2016).
    "iaf": {
        "encoder": "gaussian",
        "flow_steps": 4,
        "contrast": "prior",
        "adversary": "none",
    },
    # Auxiliary deep generative models: Maaløe et al. (2016).
    "auxvae": {"encoder": "auxiliary", "contrast": "prior", "adversary": "none"},
    # Adversarial autoencoder, Makhzani et al. (2016): `avb` with an adversary that reads only z.
    # It matches the aggregate posterior to the prior, and its objective is not a bound.
    "aae": {
        "encoder": "black_box",
        "contrast": "prior",
        "adversary": "residual",
        "condition": "none",
    },
}


def settings(method: str, **changes: Any) -> dict[str, Any]:
    """Returns all settings of `method` with `changes`.

    Args:
      method: a name in `METHODS`.
      **changes: settings that differ from the method's, by their names in `SETTINGS`.
    Raises:
      UserError: the method or a setting is unknown.
    """
    if method not in METHODS:
        raise UserError(f"method is '{method}'; expected one of {', '.join(METHODS)}")
    if unknown := sorted(set(changes) - set(SETTINGS)):
        raise UserError(f"unknown setting '{unknown[0]}'; expected one of {', '.join(SETTINGS)}")
    return {**SETTINGS, **METHODS[method], **changes}
