"""The models of posteriordb that have reference draws, as a user of TensorFlow would write them.

Source of the models, the data and the draws: Magnusson et al. (2025), "posteriordb: Testing,
Benchmarking and Developing Bayesian Inference Algorithms",
https://github.com/stan-dev/posteriordb. Some are joint distributions, others log densities, which
may have flat priors. They are in float32 unless float64 is needed. Of the posteriors with reference
draws, only `mcycle_gp-accel_gp` is left out.
"""

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

Draws = dict[str, Any]
_POSITIVE = tfb.Exp()


class Case(NamedTuple):
    """A posterior of the database.

    Attributes:
      arguments: arguments of `fit_posterior`.
      columns: names of the reference's parameters that are compared.
      of_draws: function from draws [n, ...] by name to these columns, [n, columns]; None: they are
        the model's parameters.
    """

    arguments: dict[str, Any]
    columns: list[str]
    of_draws: Callable[[Draws], np.ndarray] | None = None

    def compared(self, draws: Draws) -> np.ndarray:
        """Returns the columns of draws [n, ...] by name, [n, columns]."""
        if self.of_draws:
            return self.of_draws(draws)
        names = dict.fromkeys(column.split("[")[0] for column in self.columns)
        return np.column_stack([draws[name] for name in names])


def content(path: Path) -> Any:
    """Returns the content of a zipped JSON file."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _entries(name: str, count: int) -> list[str]:
    return [f"{name}[{i + 1}]" for i in range(count)]


def _regression(y, columns, prior=None) -> Case:
    """A linear regression with flat priors, but for one of the noise's sd if it is given."""
    y = np.asarray(y, np.float32)
    x = np.stack([np.broadcast_to(c, y.shape) for c in (1.0, *columns)], -1).astype(np.float32)

    def log_density(beta, sigma):
        mean = tf.linalg.matvec(x, beta)
        likelihood = tf.reduce_sum(tfd.Normal(mean, sigma).log_prob(y))
        return likelihood if prior is None else likelihood + prior.log_prob(sigma)

    count = x.shape[1]
    return Case(
        {
            "model": log_density,
            "shape": {"beta": [count], "sigma": []},
            "bijector": {"sigma": _POSITIVE},
        },
        [*_entries("beta", count), "sigma"],
    )


def _earnings(d):
    earn, height, male = (np.array(d[k], float) for k in ("earn", "height", "male"))
    z = (height - height.mean()) / height.std(ddof=1)
    log = np.log(earn)
    return {
        "earn_height": (earn, [height]),
        "log10earn_height": (np.log10(earn), [height]),
        "logearn_height": (log, [height]),
        "logearn_height_male": (log, [height, male]),
        "logearn_interaction": (log, [height, male, height * male]),
        "logearn_interaction_z": (log, [z, male, z * male]),
        "logearn_logheight_male": (log, [np.log(height), male]),
    }


def _kidiq(d):
    score, school, iq = (np.array(d[k], float) for k in ("kid_score", "mom_hs", "mom_iq"))
    prior = tfd.HalfCauchy(0.0, 2.5)
    return {
        "kidscore_momhs": (score, [school], prior),
        "kidscore_momiq": (score, [iq], prior),
        "kidscore_momhsiq": (score, [school, iq], prior),
        "kidscore_interaction": (score, [school, iq, school * iq], prior),
    }


def _kidiq_with_work(d):
    score, school, iq, work = (
        np.array(d[k], float) for k in ("kid_score", "mom_hs", "mom_iq", "mom_work")
    )

    def both(school, iq):
        return score, [school, iq, school * iq]

    def halved(x):
        return (x - x.mean()) / (2.0 * x.std(ddof=1))

    return {
        "kidscore_interaction_c": both(school - school.mean(), iq - iq.mean()),
        "kidscore_interaction_c2": both(school - 0.5, iq - 100.0),
        "kidscore_interaction_z": both(halved(school), halved(iq)),
        "kidscore_mom_work": (score, [work == 2, work == 3, work == 4]),
    }


def _mesquite(d):
    x = {name: np.array(value, float) for name, value in d.items()}
    log = {name: np.log(np.where(value > 0, value, 1.0)) for name, value in x.items()}
    area = log["diam1"] + log["diam2"]
    volume, shape = area + log["canopy_height"], log["diam1"] - log["diam2"]
    sizes = "diam1", "diam2", "canopy_height", "total_height", "density"
    far = [log["total_height"], log["density"], x["group"]]
    return {
        "mesquite": (x["weight"], [*(x[k] for k in sizes), x["group"]]),
        "logmesquite": (log["weight"], [*(log[k] for k in sizes), x["group"]]),
        "logmesquite_logva": (log["weight"], [volume, area, x["group"]]),
        "logmesquite_logvas": (log["weight"], [volume, area, shape, *far]),
        "logmesquite_logvash": (log["weight"], [volume, area, shape, far[0], far[2]]),
        "logmesquite_logvolume": (log["weight"], [volume]),
    }


def _nes(d):
    ages = [np.equal(d["age_discrete"], k) for k in (2, 3, 4)]
    columns = [d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"]]
    return {"nes": (d["partyid7"], columns)}


_REGRESSIONS = {
    "earnings": _earnings,
    "kidiq": _kidiq,
    "kidiq_with_mom_work": _kidiq_with_work,
    "mesquite": _mesquite,
    **{f"nes{year}": _nes for year in (1972, 1976, 1980, 1984, 1988, 1992, 1996, 2000)},
}


def _kilpisjarvi(d) -> Case:
    """A regression on uncentred years, with a correlation of -0.9999 between both coefficients."""
    x, y = (np.array(d[k]) for k in ("x", "y"))

    def log_density(alpha, beta, sigma):
        prior = tfd.Normal(np.float64(d["pmualpha"]), d["psalpha"]).log_prob(alpha)
        prior += tfd.Normal(np.float64(d["pmubeta"]), d["psbeta"]).log_prob(beta)
        return prior + tf.reduce_sum(tfd.Normal(alpha + beta * x, sigma).log_prob(y))

    shape = {"alpha": [], "beta": [], "sigma": []}
    return Case(
        {
            "model": log_density,
            "shape": shape,
            "bijector": {"sigma": _POSITIVE},
            "dtype": "float64",
        },
        list(shape),
    )


def _blr(d) -> Case:
    """A regression by a joint distribution."""
    x = np.array(d["X"], np.float32)
    joint = tfd.JointDistributionNamed(
        {
            "beta": tfd.Sample(tfd.Normal(0.0, 10.0), 5),
            "sigma": tfd.HalfNormal(10.0),
            "y": lambda beta, sigma: tfd.Independent(
                tfd.Normal(tf.linalg.matvec(x, beta), sigma[..., tf.newaxis]), 1
            ),
        }
    )
    observed = {"y": np.array(d["y"], np.float32)}
    return Case({"model": joint, "observed": observed}, [*_entries("beta", 5), "sigma"])


def _diamonds(d) -> Case:
    """A regression of 5,000 prices on 24 correlated columns."""
    x = np.array(d["X"])[:, 1:]
    x -= x.mean(0)
    of_t = functools.partial(tfd.StudentT, np.float64(3.0))

    @tfd.JointDistributionCoroutineAutoBatched
    def joint():
        b = yield tfd.Sample(tfd.Normal(np.float64(0.0), 1.0), 24, name="b")
        intercept = yield of_t(8.0, 10.0, name="Intercept")
        sigma = yield tfd.HalfStudentT(np.float64(3.0), 0.0, 10.0, name="sigma")
        mean = intercept + tf.linalg.matvec(x, b)
        yield tfd.Independent(tfd.Normal(mean, sigma), 1, name="y")

    return Case(
        {"model": joint, "observed": {"y": np.array(d["Y"])}},
        [*_entries("b", 24), "Intercept", "sigma"],
    )


def _eight_schools(d) -> Case:
    y, errors = (np.array(d[k], np.float32) for k in ("y", "sigma"))
    joint = tfd.JointDistributionNamed(
        {
            "z": tfd.Sample(tfd.Normal(0.0, 1.0), 8),
            "mu": tfd.Normal(0.0, 5.0),
            "tau": tfd.HalfCauchy(0.0, 5.0),
            "y": lambda z, mu, tau: tfd.Independent(
                tfd.Normal(mu[..., tf.newaxis] + tau[..., tf.newaxis] * z, errors), 1
            ),
        }
    )

    def of_draws(draws):
        theta = draws["mu"][:, np.newaxis] + draws["tau"][:, np.newaxis] * draws["z"]
        return np.column_stack([theta, draws["mu"], draws["tau"]])

    return Case(
        {"model": joint, "observed": {"y": y}}, [*_entries("theta", 8), "mu", "tau"], of_draws
    )


def _autoregression(d) -> Case:
    y, order = np.array(d["y"], np.float32), d["K"]
    lags = np.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)

    @tfd.JointDistributionCoroutineAutoBatched
    def joint():
        alpha = yield tfd.Normal(0.0, 10.0, name="alpha")
        beta = yield tfd.Sample(tfd.Normal(0.0, 10.0), order, name="beta")
        sigma = yield tfd.HalfCauchy(0.0, 2.5, name="sigma")
        mean = alpha + tf.linalg.matvec(lags, beta)
        yield tfd.Independent(tfd.Normal(mean, sigma), 1, name="y")

    return Case(
        {"model": joint, "observed": {"y": y[order:]}}, ["alpha", *_entries("beta", order), "sigma"]
    )


def _moving_average(d) -> Case:
    """ARMA(1, 1), whose errors follow one after the other in a scan."""
    y = np.array(d["y"], np.float32)

    def log_density(mu, phi, theta, sigma):
        def error_of(before, pair):
            return pair[1] - mu - phi * pair[0] - theta * before

        first = y[0] - mu - phi * mu
        errors = tf.scan(error_of, np.stack([y[:-1], y[1:]], -1), first)
        errors = tf.concat([first[tf.newaxis], errors], 0)
        prior = tfd.Normal(0.0, 10.0).log_prob(mu) + tfd.Normal(0.0, 2.0).log_prob(phi)
        prior += tfd.Normal(0.0, 2.0).log_prob(theta) + tfd.HalfCauchy(0.0, 2.5).log_prob(sigma)
        return prior + tf.reduce_sum(tfd.Normal(0.0, sigma).log_prob(errors))

    shape = {"mu": [], "phi": [], "theta": [], "sigma": []}
    return Case(
        {"model": log_density, "shape": shape, "bijector": {"sigma": _POSITIVE}}, list(shape)
    )


def _volatility(d) -> Case:
    """GARCH(1, 1): beta1 is uniform on (0, 1 - alpha1), so its share of that range is fitted."""
    y, first = np.array(d["y"], np.float32), float(d["sigma1"])

    def log_density(mu, alpha0, alpha1, share):
        beta1 = share * (1.0 - alpha1)

        def variance_of(before, y):
            return alpha0 + alpha1 * (y - mu) ** 2 + beta1 * before

        variances = tf.scan(variance_of, y[:-1], tf.constant(first**2))
        sigma = tf.sqrt(tf.concat([[first**2], variances], 0))
        return tf.reduce_sum(tfd.Normal(mu, sigma).log_prob(y)) + tf.math.log1p(-alpha1)

    bijector = {"alpha0": _POSITIVE, "alpha1": tfb.Sigmoid(), "share": tfb.Sigmoid()}
    shape: dict[str, Any] = {"mu": [], "alpha0": [], "alpha1": [], "share": []}

    def of_draws(draws):
        beta1 = draws["share"] * (1.0 - draws["alpha1"])
        return np.stack([draws["mu"], draws["alpha0"], draws["alpha1"], beta1], -1)

    return Case(
        {"model": log_density, "shape": shape, "bijector": bijector},
        ["mu", "alpha0", "alpha1", "beta1"],
        of_draws,
    )


def _gaussian_process(d) -> Case:
    x, y = np.array(d["x"], np.float32)[:, np.newaxis], np.array(d["y"], np.float32)
    kernel = tfp.math.psd_kernels.ExponentiatedQuadratic
    joint = tfd.JointDistributionNamed(
        {
            "rho": tfd.Gamma(25.0, 4.0),
            "alpha": tfd.HalfNormal(2.0),
            "sigma": tfd.HalfNormal(1.0),
            "y": lambda rho, alpha, sigma: tfd.GaussianProcess(
                kernel(alpha, rho), x, observation_noise_variance=sigma, jitter=0.0
            ),
        }
    )
    return Case({"model": joint, "observed": {"y": y}}, ["rho", "alpha", "sigma"])


def _poisson_process(d) -> Case:
    """Counts with a Gaussian process as the log rate; `tf.linalg.cholesky` needs float64."""
    x, k = np.array(d["x"], np.float64), np.array(d["k"], np.float64)
    squares = (x[:, np.newaxis] - x) ** 2
    one = np.float64(1.0)

    def rate(rho, alpha, z):
        rho, alpha = rho[..., tf.newaxis, tf.newaxis], alpha[..., tf.newaxis, tf.newaxis]
        covariance = alpha**2 * tf.exp(-0.5 * squares / rho**2) + 1e-10 * np.eye(len(x))
        return tf.linalg.matvec(tf.linalg.cholesky(covariance), z)

    joint = tfd.JointDistributionNamed(
        {
            "rho": tfd.Gamma(25.0 * one, 4.0),
            "alpha": tfd.HalfNormal(2.0 * one),
            "z": tfd.Sample(tfd.Normal(0.0 * one, 1.0), len(x)),
            "k": lambda rho, alpha, z: tfd.Independent(
                tfd.Poisson(log_rate=rate(rho, alpha, z)), 1
            ),
        }
    )

    def of_draws(draws):
        f = rate(*(tf.constant(draws[name]) for name in ("rho", "alpha", "z")))
        return np.column_stack([draws["rho"], draws["alpha"], f])

    return Case(
        {"model": joint, "observed": {"k": k}}, ["rho", "alpha", *_entries("f", len(x))], of_draws
    )


def _hidden_markov(d) -> Case:
    """Two states with ordered means; each row of the transition matrix has one parameter."""
    y = np.array(d["y"], np.float32)

    def log_density(stay, mu):
        chain = tfd.HiddenMarkovModel(
            tfd.Categorical(probs=[0.5, 0.5]), tfd.Categorical(probs=_transitions(stay)),
            tfd.Normal(mu, 1.0), len(y),
        )  # fmt: skip
        return chain.log_prob(y) + tf.reduce_sum(tfd.Normal([3.0, 10.0], 1.0).log_prob(mu))

    # The means are positive and ordered: sums of positive numbers.
    ordered = tfb.Chain([tfb.Cumsum(), tfb.Exp()])
    return Case(
        {
            "model": log_density,
            "shape": {"stay": [2], "mu": [2]},
            "bijector": {"stay": tfb.Sigmoid(), "mu": ordered},
        },
        ["theta1[1]", "theta2[2]", "mu[1]", "mu[2]"],
        lambda draws: np.column_stack([draws["stay"], draws["mu"]]),
    )


def _transitions(stay):
    """Returns the matrix of two states that stay what they are with these probabilities."""
    return tf.linalg.diag(stay) + tf.reverse(tf.linalg.diag(1.0 - stay), [-1])


def _drive(d, exponential: bool) -> Case:
    """A player on the way to the basket or not, from his speed and his distance."""
    data = np.stack([d["u"], d["v"]], -1).astype(np.float32)

    def log_density(stay, phi, lambda_):
        of_state = tf.stack([phi, lambda_], -1)
        parts = tfd.Exponential(of_state) if exponential else tfd.Normal(of_state, 0.1)
        chain = tfd.HiddenMarkovModel(
            tfd.Categorical(probs=[0.5, 0.5]), tfd.Categorical(probs=_transitions(stay)),
            tfd.Independent(parts, 1), len(data),
        )  # fmt: skip
        prior = tfd.Beta(4.0, 2.0).log_prob(stay)
        means = tfd.Normal([0.0, 3.0], 1.0)
        prior += means.log_prob(phi) + means.log_prob(lambda_)
        return chain.log_prob(data) + tf.reduce_sum(prior)

    ordered = tfb.Chain([tfb.Cumsum(), tfb.Exp()]) if exponential else tfb.Ascending()
    return Case(
        {
            "model": log_density,
            "shape": {"stay": [2], "phi": [2], "lambda_": [2]},
            "bijector": {"stay": tfb.Sigmoid(), "phi": ordered, "lambda_": ordered},
        },
        ["theta1[1]", "theta2[2]", "phi[1]", "phi[2]", "lambda[1]", "lambda[2]"],
        lambda draws: np.column_stack([draws["stay"], draws["phi"], draws["lambda_"]]),
    )


def _mixture(d) -> Case:
    y = np.array(d["y"], np.float32)

    def log_density(mu, sigma, theta):
        parts = tfd.MixtureSameFamily(
            tfd.Categorical(probs=tf.stack([theta, 1.0 - theta])), tfd.Normal(mu, sigma)
        )
        prior = tfd.Normal(0.0, 2.0).log_prob(mu) + tfd.HalfNormal(2.0).log_prob(sigma)
        prior = tf.reduce_sum(prior) + tfd.Beta(5.0, 5.0).log_prob(theta)
        return prior + tf.reduce_sum(parts.log_prob(y))

    bijector = {"mu": tfb.Ascending(), "sigma": _POSITIVE, "theta": tfb.Sigmoid()}
    return Case(
        {
            "model": log_density,
            "shape": {"mu": [2], "sigma": [2], "theta": []},
            "bijector": bijector,
        },
        [*_entries("mu", 2), *_entries("sigma", 2), "theta"],
    )


def _integrated(slope, first, times, steps):
    """Returns the states at `times` [n, ...] by the fourth-order Runge-Kutta method.

    Args:
      slope: function from (state, time) to the state's derivative.
      first: state at time 0.
      times: equally spaced times, starting after 0.
      steps: steps from one time to the next.
    """
    width = np.float32(times[0] / steps)

    def step(state, t):
        one = slope(state, t)
        two = slope(state + 0.5 * width * one, t + 0.5 * width)
        three = slope(state + 0.5 * width * two, t + 0.5 * width)
        four = slope(state + width * three, t + width)
        return state + width / 6.0 * (one + 2.0 * (two + three) + four)

    starts = width * np.arange(len(times) * steps, dtype=np.float32)
    return tf.scan(step, starts, first)[steps - 1 :: steps]


def _lotka_volterra(d) -> Case:
    """Lynxes and hares over 20 years."""
    y = np.array([d["y_init"], *d["y"]], np.float32)

    def log_density(theta, z_init, sigma):
        alpha, beta, gamma, delta = tf.unstack(theta)

        def slope(z, t):
            del t
            prey, predator = tf.unstack(z)
            return tf.stack([(alpha - beta * predator) * prey, (delta * prey - gamma) * predator])

        z = _integrated(slope, z_init, d["ts"], 10)
        z = tf.concat([z_init[tf.newaxis], z], 0)
        prior = tfd.LogNormal(tf.math.log(10.0), 1.0).log_prob(z_init)
        prior += tfd.LogNormal(-1.0, 1.0).log_prob(sigma)
        of_theta = tfd.Normal([1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05])
        likelihood = tfd.LogNormal(tf.math.log(z), sigma).log_prob(y)
        return sum(map(tf.reduce_sum, (prior, of_theta.log_prob(theta), likelihood)))

    names = ["theta", "z_init", "sigma"]
    return Case(
        {
            "model": log_density,
            "shape": {"theta": [4], "z_init": [2], "sigma": [2]},
            "bijector": dict.fromkeys(names, _POSITIVE),
        },
        [*_entries("theta", 4), *_entries("z_init", 2), *_entries("sigma", 2)],
    )


def _elimination(d) -> Case:
    """A drug that is absorbed at one rate and eliminated at another, which saturates."""
    concentrations = np.array(d["C_hat"], np.float32)
    dose, volume = float(d["D"]), float(d["V"])

    def log_density(k_a, K_m, V_m, sigma):  # the names of the literature
        def slope(c, t):
            return tf.exp(-k_a * t) * dose * k_a / volume - V_m / volume * c / (K_m + c)

        c = _integrated(slope, tf.constant(0.0), d["times"], 10)
        parameters = tf.stack([k_a, K_m, V_m, sigma])
        prior = tfd.HalfCauchy(0.0, 1.0).log_prob(parameters)
        likelihood = tfd.LogNormal(tf.math.log(c), sigma).log_prob(concentrations)
        return tf.reduce_sum(prior) + tf.reduce_sum(likelihood)

    names = ["k_a", "K_m", "V_m", "sigma"]
    return Case(
        {
            "model": log_density,
            "shape": {name: [] for name in names},
            "bijector": dict.fromkeys(names, _POSITIVE),
        },
        names,
    )


_OTHERS: dict[str, Callable[[Any], Case]] = {
    "arK-arK": _autoregression,
    "arma-arma11": _moving_average,
    "garch-garch11": _volatility,
    "gp_pois_regr-gp_regr": _gaussian_process,
    "gp_pois_regr-gp_pois_regr": _poisson_process,
    "hmm_example-hmm_example": _hidden_markov,
    "bball_drive_event_0-hmm_drive_0": functools.partial(_drive, exponential=True),
    "bball_drive_event_1-hmm_drive_1": functools.partial(_drive, exponential=False),
    "hudson_lynx_hare-lotka_volterra": _lotka_volterra,
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": _elimination,
    "low_dim_gauss_mix-low_dim_gauss_mix": _mixture,
    "kilpisjarvi_mod-kilpisjarvi": _kilpisjarvi,
    "sblrc-blr": _blr,
    "sblri-blr": _blr,
    "eight_schools-eight_schools_noncentered": _eight_schools,
    "diamonds-diamonds": _diamonds,
}


def case(database: Path, name: str) -> Case:
    """Returns the case of a posterior such as "arK-arK".

    Args:
      database: the folder `posterior_database` of a copy of the repository.
      name: name of the posterior: of its data and its model.
    """
    data, model = name.split("-")
    facts = content(database / "data/data" / f"{data}.json.zip")
    if data in _REGRESSIONS:
        return _regression(*_REGRESSIONS[data](facts)[model])
    return _OTHERS[name](facts)


def reference(database: Path, name: str, columns: list[str]) -> np.ndarray:
    """Returns the reference draws of these parameters, [10,000, columns]."""
    path = database / "reference_posteriors/draws/draws" / f"{name}.json.zip"
    chains = content(path)
    return np.concatenate([np.stack([chain[c] for c in columns], -1) for chain in chains])


def names(database: Path) -> list[str]:
    """Returns the names of the posteriors that have reference draws here and a model above."""
    folder = database / "reference_posteriors/draws/draws"
    found = sorted(path.name.removesuffix(".json.zip") for path in folder.glob("*.zip"))
    return [n for n in found if n in _OTHERS or n.split("-")[0] in _REGRESSIONS]
