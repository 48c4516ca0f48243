"""Tests the layering of the package: each module imports only from modules above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "avb_tf"
ORDER = [
    "avb_tf.version",
    "avb_tf.errors",
    "avb_tf.files",
    "avb_tf.archives",
    "avb_tf.tables",
    "avb_tf.model_card",
    "avb_tf.diagnostics",
    "avb_tf.settings",
    "avb_tf.settings.methods",
    "avb_tf.settings.run",
    "avb_tf.settings.fits",
    "avb_tf.settings.posterior",
    "avb_tf.settings.amortised",
    "avb_tf.configuration",
    "avb_tf.data.table",
    "avb_tf.data.source",
    "avb_tf.data.arrays",
    "avb_tf.data.checks",
    "avb_tf.data.digits",
    "avb_tf.data.four_points",
    "avb_tf.data.images",
    "avb_tf.data.npz",
    "avb_tf.data.mnist",
    "avb_tf.data.table_files",
    "avb_tf.data.tfds",
    "avb_tf.data",
    "avb_tf.data.pipeline",
    "avb_tf.data.resident",
    "avb_tf.replicas",
    "avb_tf.networks",
    "avb_tf.adversaries",
    "avb_tf.encoders",
    "avb_tf.contrast",
    "avb_tf.proposal",
    "avb_tf.likelihoods",
    "avb_tf.columns",
    "avb_tf.parts",
    "avb_tf.flows",
    "avb_tf.auxiliary",
    "avb_tf.objectives",
    "avb_tf.training",
    "avb_tf.training.termination",
    "avb_tf.training.optimizers",
    "avb_tf.training.schedules",
    "avb_tf.training.epochs",
    "avb_tf.training.loops",
    "avb_tf.training.fit",
    "avb_tf.serving",
    "avb_tf.serving.layout",
    "avb_tf.serving.protos",
    "avb_tf.serving.saved_model",
    "avb_tf.serving.check",
    "avb_tf.serving.signatures",
    "avb_tf.serving.writing",
    "avb_tf.likelihood_estimation",
    "avb_tf.likelihood_estimation.chunks",
    "avb_tf.likelihood_estimation.joint",
    "avb_tf.likelihood_estimation.ais",
    "avb_tf.likelihood_estimation.annealing",
    "avb_tf.inference",
    "avb_tf.model",
    "avb_tf.assembly",
    "avb_tf.figures",
    "avb_tf.figures.pairs",
    "avb_tf.figures.calibration",
    "avb_tf.figures.comparison",
    "avb_tf.figures.estimates",
    "avb_tf.figures.training",
    "avb_tf.posteriors",
    "avb_tf.posteriors.cost",
    "avb_tf.posteriors.functions",
    "avb_tf.posteriors.target",
    "avb_tf.posteriors.bijectors",
    "avb_tf.posteriors.constraints",
    "avb_tf.posteriors.models",
    "avb_tf.posteriors.mixture",
    "avb_tf.posteriors.hmc",
    "avb_tf.posteriors.matching",
    "avb_tf.posteriors.search",
    "avb_tf.posteriors.tails",
    "avb_tf.posteriors.evidence",
    "avb_tf.posteriors.sampling",
    "avb_tf.posteriors.large",
    "avb_tf.posteriors.coordinates",
    "avb_tf.posteriors.start",
    "avb_tf.posteriors.verdict",
    "avb_tf.posteriors.sampler",
    "avb_tf.posteriors.building",
    "avb_tf.posteriors.training",
    "avb_tf.posteriors.result",
    "avb_tf.posteriors.fit",
    "avb_tf.amortised",
    "avb_tf.amortised.simulation",
    "avb_tf.amortised.sources",
    "avb_tf.amortised.rows",
    "avb_tf.amortised.stored",
    "avb_tf.amortised.saving",
    "avb_tf.amortised.trunks",
    "avb_tf.amortised.network",
    "avb_tf.amortised.checkpoint",
    "avb_tf.amortised.training",
    "avb_tf.amortised.judging",
    "avb_tf.amortised.calibration",
    "avb_tf.amortised.result",
    "avb_tf.amortised.fit",
    "avb_tf.results",
    "avb_tf.checkpoints",
    "avb_tf.hub",
    "avb_tf",
    "avb_tf.likelihood_estimation.entropy",
    "avb_tf.likelihood_estimation.importance",
    "avb_tf.likelihood_estimation.inference_gap",
    "avb_tf.likelihood_estimation.quadrature",
    "avb_tf.likelihood_estimation.estimates",
    "avb_tf.figures.model",
    "avb_tf.callbacks",
    "avb_tf.callbacks.guard",
    "avb_tf.callbacks.monitor",
    "avb_tf.callbacks.progress",
    "avb_tf.callbacks.tensorboard",
    "avb_tf.callbacks.writing",
    "avb_tf.posteriors.baselines",
    "avb_tf.posteriors.comparison",
    "avb_tf.posteriors.experiment",
    "avb_tf.posteriors.overview",
    "avb_tf.amortised.experiment",
    "avb_tf.commands",
    "avb_tf.commands.train",
    "avb_tf.commands.evaluate",
    "avb_tf.commands.sample",
    "avb_tf.commands.draw",
    "avb_tf.commands.explore",
    "avb_tf.commands.export",
    "avb_tf.commands.compare",
    "avb_tf.benchmarks",
    "avb_tf.benchmarks.device",
    "avb_tf.benchmarks.step",
    "avb_tf.benchmarks.ais",
    "avb_tf.benchmarks.replicas",
    "avb_tf.benchmarks.scaling",
    "avb_tf.configs",
    "avb_tf.configs.amortised",
    "avb_tf.configs.benchmark",
    "avb_tf.configs.celeba",
    "avb_tf.configs.digits",
    "avb_tf.configs.four_points",
    "avb_tf.configs.mnist",
    "avb_tf.configs.mnist_4x4",
    "avb_tf.configs.mnist_conv",
    "avb_tf.configs.posteriors",
    "avb_tf.configs.table",
    "avb_tf.command_line",
    "avb_tf.__main__",
]


def file(module):
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module):
    """Yields modules of the package that `module` imports, anywhere in its text."""
    for node in ast.walk(ast.parse(file(module).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if file(name).exists() else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE.name)


def test_every_module_is_listed_once():
    files = [file.relative_to(PACKAGE.parent).with_suffix("") for file in PACKAGE.rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in files]
    assert sorted(names) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_above_it(module):
    above = ORDER[: ORDER.index(module)]
    assert set(imported(module)) <= set(above)


def test_only_diagnostics_uses_arviz():
    users = [f.stem for f in PACKAGE.rglob("*.py") if "import arviz" in f.read_text()]
    assert users == ["diagnostics"]
