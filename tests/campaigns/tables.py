"""Measures held-out log p(x) and imputation: `python -m tests.campaigns.tables [--seeds 0 1 2]`.

- scikit-learn's breast cancer table has 30 real columns, standardised, with a fifth of the cells
  removed at random. The reference is scikit-learn's factor analysis, with the number of factors
  that is best on the validation rows. It cannot train with missing cells, so it trains once with
  the columns' means in their place, and once with all cells, including those hidden from the model.
  Its log p(x) is that of the observed cells, like the model's.
- scikit-learn's digits are counts 0 to 16 in 64 columns, with a tenth of the cells removed. The
  reference is a Poisson distribution with each column's mean.

log p(x) of the models is estimated by AIS (`model.log_likelihood`), on test rows that nothing else
has seen. The imputation error is the root mean square error over the removed cells of the test
rows, in standard deviations of the columns. The baseline for it is the column's mean.
"""

import argparse

import keras
import numpy as np
import scipy.stats
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import FactorAnalysis

import avb_tf
from avb_tf import tables
from avb_tf.training.optimizers import Adam

METHODS = ("vae", "avb_ac")
TEST = 100  # rows
FACTORS = (2, 4, 6, 8, 10, 12, 15, 20)


def cut(x, removed, seed):
    """Returns three splits with cells removed, [n, columns] each, and the complete test rows."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    holes = np.where(random.random(x.shape) < removed, np.nan, x)
    train, validation, test = np.split(order, [int(0.6 * len(x)), int(0.8 * len(x))])
    test = test[:TEST]
    return holes[train], holes[validation], holes[test], x[test]


def of_model(method, kind, train, validation, test, seed):
    """Trains a model; returns log p(x) of the test rows by AIS, [n], and the imputed rows."""
    keras.utils.set_random_seed(seed)
    table = avb_tf.Table.of(train, kind, missing=True)
    model = avb_tf.build(
        method, table, latent_dim=12, width=128, depth=2, draws=4, adversary_draws=8,
        adversary_width=64, ema_decay=0.99, hide=0.2, seed=seed,
    )  # fmt: skip
    model.compile(Adam(1e-3), Adam(3e-3))
    model.fit(
        train, batch_size=32, epochs=1000, verbose=0, validation_data=(validation,),
        callbacks=[keras.callbacks.EarlyStopping(patience=100, restore_best_weights=True)],
    )  # fmt: skip
    log_p = model.log_likelihood(test, verbose=False)
    print(f"{method}, {kind}, seed {seed}, {int(model.step.numpy())} steps: {log_p}", flush=True)
    return log_p.values, np.asarray(model.reconstruct(test, samples=200))


def of_factors(fitted, x):
    """Returns log p of the observed cells of x, [n], and x with the missing cells imputed."""
    mean, covariance = fitted.mean_, fitted.get_covariance()
    values, imputed = np.empty(len(x)), x.copy()
    for i, row in enumerate(x):
        known = ~np.isnan(row)
        part = covariance[np.ix_(known, known)]
        values[i] = scipy.stats.multivariate_normal(mean[known], part).logpdf(row[known])
        shift = np.linalg.solve(part, row[known] - mean[known])
        imputed[i, ~known] = mean[~known] + covariance[np.ix_(~known, known)] @ shift
    return values, imputed


def factor_analysis(train, validation, test):
    """Fits factor analyses to complete rows and applies the best one on `validation` to `test`."""
    fits = [FactorAnalysis(n, max_iter=3000).fit(train) for n in FACTORS]
    best = max(fits, key=lambda fitted: of_factors(fitted, validation)[0].mean())
    print(f"factor analysis with {best.n_components} factors")
    return of_factors(best, test)


def real(seed):
    """Returns {name: (log p, imputed test rows)}, the test rows, the truth, means and scales."""
    x = load_breast_cancer().data
    train, validation, test, truth = cut(x, 0.2, seed)
    mean, scale = np.nanmean(train, 0), np.nanstd(train, 0)
    train, validation, test, truth = (
        (part - mean) / scale for part in (train, validation, test, truth)
    )
    complete = cut(x, 0.0, seed)[0]
    estimates = {
        f"{method}, {kind}": of_model(method, kind, train, validation, test, seed)
        for method in METHODS
        for kind in ("gaussian", "student_t")
    }
    estimates["factor analysis"] = factor_analysis(np.nan_to_num(train), validation, test)
    estimates["factor analysis of all cells"] = factor_analysis(
        (complete - mean) / scale, validation, test
    )
    return estimates, test, truth, np.zeros_like(mean), np.ones_like(scale)


def counts(seed):
    """Returns the same as `real`, for the table of counts."""
    x = load_digits().data
    x = x[:, x.std(0) > 0.5]  # removes the border, which is always empty
    train, validation, test, truth = cut(x, 0.1, seed)
    mean = np.nanmean(train, 0)
    poisson = scipy.stats.poisson.logpmf(np.nan_to_num(test), mean)
    estimates = {
        f"{method}, {kind}": of_model(method, kind, train, validation, test, seed)
        for method in METHODS
        for kind in ("poisson", "negative_binomial")
    }
    means = np.broadcast_to(mean, test.shape)
    estimates["Poisson of the means"] = np.where(np.isnan(test), 0.0, poisson).sum(1), means
    return estimates, test, truth, mean, np.nanstd(train, 0)


def rows(estimates, test, truth, mean, scale):
    """Yields rows of the table: model, log p(x), its gain over the reference, imputation error."""
    absent = np.isnan(test)
    reference = list(estimates.values())[-1 if "Poisson of the means" in estimates else -2][0]

    def error(imputed):
        return float(np.sqrt(np.mean((((imputed - truth) / scale)[absent]) ** 2)))

    for name, (values, imputed) in estimates.items():
        gain = values - reference
        yield (
            name,
            f"{values.mean():.2f}",
            f"{gain.mean():.2f} +- {gain.std(ddof=1) / np.sqrt(len(gain)):.2f}",
            f"{error(imputed):.3f}",
        )
    yield "the columns' means", "", "", f"{error(np.broadcast_to(mean, test.shape)):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tables", nargs="+", default=["real", "counts"])
    arguments = parser.parse_args()
    for name in arguments.tables:
        header = ("seed", name, "log p(x)", "less the reference", "imputation error")
        for seed in arguments.seeds:
            made = {"real": real, "counts": counts}[name](seed)
            cells = [(str(seed), *row) for row in rows(*made)]
            columns = [list(column) for column in zip(header, *cells, strict=True)]
            print(tables.aligned(columns), flush=True)


if __name__ == "__main__":
    main()
