"""Tests which figures --mode=figures writes, in both formats, and the training curves."""

import numpy as np
import tensorflow as tf

from avb_tf import command_line
from avb_tf.figures import training as training_figures

TINY = [
    "--config.steps=4", "--config.log_every=2", "--config.checkpoint_every=4",
    "--config.model.width=8",
]  # fmt: skip


def test_every_figure_is_written_as_png_and_as_pdf(tmp_path):
    path = tmp_path / "run"
    command_line.main(["x", "--config=configs/digits.py:vae", f"--workdir={path}", *TINY])
    command_line.main(["x", f"--workdir={path}", "--mode=figures"])
    names = ["interpolations", "latent_space", "manifold", "posteriors", "reconstructions",
             "samples", "training"]  # fmt: skip
    names_of_files = sorted(file.name for file in (path / "figures").iterdir())
    assert names_of_files == sorted(f"{name}.{kind}" for name in names for kind in ("png", "pdf"))
    for file in (path / "figures").iterdir():
        assert file.read_bytes().startswith(b"%PDF" if file.suffix == ".pdf" else b"\x89PNG")
    command_line.main(["x", f"--workdir={path}", "--mode=explore"])
    assert "const model = {" in (path / "explorer.html").read_text()


def test_training_curves_show_the_logs_and_need_them(tmp_path):
    assert training_figures.of_run(tmp_path) is None
    writer = tf.summary.create_file_writer(str(tmp_path / "logs" / "validation"))
    for step, value in [(10, -3.0), (20, -2.0)]:
        with writer.as_default(step):
            tf.summary.scalar("elbo", value)
    writer.close()
    (axes,) = training_figures.of_run(tmp_path).axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[10, -3], [20, -2]])
    assert line.get_label() == "validation"
