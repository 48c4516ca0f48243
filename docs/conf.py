"""The site: Markdown and executed notebooks (MyST), and a reference from the docstrings."""

import inspect
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
os.environ["PYTHONPATH"] = str(ROOT)  # of the notebooks' kernels

from docutils import nodes  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402

from avb_tf.version import __version__  # noqa: E402

project = "avb_tf"
author = "The avb_tf authors"
project_copyright = "The avb_tf authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]
html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = f"avb_tf {release}"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
html_sidebars = {"index": []}

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # TensorFlow's log while it is imported

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
napoleon_custom_sections = [("Source", "references")]
napoleon_use_rtype = False
napoleon_use_ivar = True  # autodoc lists the fields of a NamedTuple as well
smartquotes = False  # shapes such as [..., latent]
highlight_language = "python"


def _to_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`; an indented paragraph after a blank line is code."""
    text = re.sub(r"(?m)^Source: ", "\nSource:\n  ", "\n".join(lines))
    text = re.sub(r"(?m)(?<=\S)\n((?:Args|Returns|Raises|Source):\n)", r"\n\n\1", text)
    parts = re.split(r"(`[^`]+`)", text)
    for i, part in enumerate(parts):
        parts[i] = f"`{part}`" if i % 2 else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
    text = re.sub(r"(?<=\n)\n((?: {4}\S.*\n?)+)", _code, "".join(parts))
    lines[:] = text.split("\n")


def _code(match):
    return "\n.. code-block:: python\n\n" + re.sub(r"\\([*|\\_])", r"\1", match[1]) + "\n"


def _signature(app, what, name, obj, options, signature, returned):
    """Of `__init__`: Keras's classes have a `__new__` that takes anything."""
    if what != "class":
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters])), None


def _mathml(display):
    """Formulas become MathML, which browsers show without a script from the network."""

    def visit(translator, node):
        formula = convert(node.astext(), display=display)
        # The converter leaves no space between an operator and its argument.
        formula = re.sub("<mi>(log|det)</mi>", r'\g<0><mspace width="0.17em" />', formula)
        translator.body.append(formula if display == "inline" else f"<p>{formula}</p>")
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Docstrings come before napoleon, which has priority 500."""
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
    app.connect("autodoc-process-docstring", _to_rst, priority=400)
    app.connect("autodoc-process-signature", _signature)
