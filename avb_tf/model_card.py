"""The model card next to a checkpoint or an export: the model, its metrics and its use."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from avb_tf import tables
from avb_tf.version import __version__

FILE = "README.md"  # where model hubs look for it
_PACKAGES = ("tensorflow", "keras", "tensorflow-probability", "numpy")


def packages() -> dict[str, str]:
    """Returns the versions of this package and of the packages that it computes with."""
    return {"avb_tf": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def facts(model: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the first table of an `AVB`'s card, label -> value.

    Args:
      model: an `AVB`.
      config: the run's config, which adds the method, the data and the likelihood; or None.
    """
    kind = {}
    if config:
        kind = {
            "method": config["method"],
            "training data": config["data"]["name"],
            "likelihood": config["model"]["likelihood"],
        }
    shape = f"[batch, {', '.join(map(str, model.event_shape))}]"
    of = {"unit": "in [0, 1]", "real": "of real numbers", "count": "of counts"}
    columns = () if model.table is None else model.table.columns
    described = "; ".join(f"{column.name}: {column.kind}" for column in columns)
    return kind | {
        "x": f"{shape} {of.get(model.likelihood.support, f'of {described}')}",
        "latent dimensions": model.encoder.latent_dim,
        "adversary": "no" if model.adversary is None else "yes",
        "training steps": int(model.step.numpy()),
    }


def text(
    name: str,
    facts: Mapping[str, Any],
    usage: str,
    config: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """Returns a model card in Markdown, with the front matter that model hubs read.

    Args:
      name: name of the model.
      facts: label -> value, for the first table.
      usage: Python code that loads and calls the model.
      config: the config as `configuration.resolve` returns it, or None.
      results: the content of `results.json`, or None.
    """
    versions = {"Python": platform.python_version()} | packages()
    parts = [
        "---\nlibrary_name: keras\ntags: [avb_tf, adversarial-variational-bayes]\n---",
        f"# {name}",
        "A latent-variable model of avb_tf, Adversarial Variational Bayes in TensorFlow and Keras "
        "(Mescheder, Nowozin and Geiger, 2017, arXiv 1701.04722).",
        _table(("", ""), facts.items()),
        "## Metrics\n\n" + _metrics(results),
        f"## Use\n\n```python\n{usage}\n```",
        "## Versions\n\n" + _table(("package", "version"), versions.items()),
    ]
    if config:
        listed = json.dumps(config, indent=2)
        parts.append(f"## Config\n\n```json\n{listed}\n```")
    return "\n\n".join(parts) + "\n"


def _metrics(results) -> str:
    if not results:
        return "This model has not been evaluated: `avb-tf --mode=evaluate` does."
    rows = [
        (name, f"{e['mean']:.4f}", f"{e['standard_error']:.4f}", e["count"])
        for name, e in results["estimates"].items()
    ]
    introduction = (
        f"Split `{results['split']}` of `{results['data']}`, training step {results['step']}; nats "
        "for each example unless a name says otherwise. A bound that rests on the adversary "
        "(`elbo_adversary`) may lie above log p(x); the estimates of the log-likelihood do not use "
        "the adversary."
    )
    warnings = [f"- Warning: {warning}" for warning in results.get("warnings", [])]
    table = _table(("estimate", "mean", "standard error", "examples"), rows)
    return "\n\n".join([introduction, table, *warnings])


def _table(header, rows) -> str:
    columns = zip(header, *rows, strict=True)
    return tables.aligned([[str(cell) for cell in column] for column in columns])
