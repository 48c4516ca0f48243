"""Tests the content of figures, and that they can be saved as PNG files."""

import io

import keras
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.special import ndtri

import avb_tf
from avb_tf import figures
from avb_tf.figures import model as model_figures

LIKELIHOOD = {1: "bernoulli", 3: "normal"}
IMAGES = [(8, 8, 1), (6, 6, 3)]


def model_for(event_shape, latent_dim=2, likelihood="bernoulli"):
    keras.utils.set_random_seed(0)
    return avb_tf.build(
        "vae", event_shape, latent_dim=latent_dim, likelihood=likelihood, width=8, depth=1,
        ema_decay=0.0,
    )  # fmt: skip


def data(event_shape, count=16):
    return np.random.default_rng(0).random((count, *event_shape), np.float32)


@pytest.fixture(scope="module", params=IMAGES, ids=str)
def model(request):
    return model_for(request.param, likelihood=LIKELIHOOD[request.param[-1]])


def pixels(figure):
    """Returns the pixels of the figure's PNG, [height, width, 4]."""
    return matplotlib.image.imread(io.BytesIO(figures.png(figure)), format="png")


def tiles(figure, event_shape):
    """Returns the images of a grid, [rows, columns, *event_shape]."""
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    height, width, channels = event_shape
    canvas = canvas.reshape(*canvas.shape[:2], channels)
    rows = [canvas[top : top + height] for top in range(0, len(canvas), height + 1)]
    return np.array(
        [
            [row[:, left : left + width] for left in range(0, row.shape[1], width + 1)]
            for row in rows
        ]
    )


@pytest.mark.parametrize(
    ("event_shape", "latent_dim", "expected"),
    [
        ((6,), 2, {"latent_space"}),
        ((6,), 3, set()),
        ((8, 8, 1), 3, {"samples", "reconstructions", "interpolations"}),
        (
            (6, 6, 3),
            2,
            {"samples", "reconstructions", "interpolations", "manifold", "latent_space"},
        ),
    ],
    ids=["row-2", "row-3", "monochrome-3", "colour-2"],
)
def test_a_model_has_the_figures_that_its_shapes_allow(event_shape, latent_dim, expected):
    drawn = model_figures.of_model(model_for(event_shape, latent_dim), data(event_shape))
    assert set(drawn) == expected


def test_every_figure_of_an_image_model_is_saved_as_png(model, tmp_path):
    x = data(model.event_shape)
    drawn = model_figures.of_model(model, x, labels=np.arange(len(x)) % 3)
    drawn["posteriors"] = model_figures.posteriors({"model": model}, x[:2], cells=40)
    paths = figures.save(drawn, tmp_path / "new" / "figures")
    assert [path.name for path in paths] == [f"{name}.png" for name in drawn]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        image = matplotlib.image.imread(path)
        assert image.ndim == 3
        assert np.ptp(image[..., :3]) > 0.5
    assert sorted(path.parent.iterdir()) == sorted(paths)  # no temporary file is left


def test_a_figure_that_cannot_be_drawn_leaves_the_file_as_it_was(tmp_path):
    figures.save({"a": Figure()}, tmp_path)
    before = (tmp_path / "a.png").read_bytes()
    broken = Figure()
    broken.savefig = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        figures.save({"a": broken}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_saved_figure_replaces_the_old_file(tmp_path):
    for size in (1, 2):
        figures.save({"a": Figure((size, size))}, tmp_path)
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (240, 240)


@pytest.mark.parametrize("event_shape", IMAGES, ids=str)
def test_an_image_grid_is_filled_row_by_row(event_shape):
    images = data(event_shape, 5)
    grid = tiles(model_figures.image_grid(images, "title", columns=3), event_shape)
    assert grid.shape == (2, 3, *event_shape)
    np.testing.assert_array_equal(grid.reshape(6, *event_shape)[:5], images)


def test_colour_images_keep_their_colours_and_ink_is_dark():
    red = np.broadcast_to([1.0, 0.0, 0.0], (1, 6, 6, 3))
    blank, ink = np.zeros((1, 8, 8, 1)), np.ones((1, 8, 8, 1))
    for images, colour in [(red, "red"), (blank, "white"), (ink, "black")]:
        image = pixels(model_figures.image_grid(images, "", columns=1))
        middle = image[len(image) // 2, image.shape[1] // 2]
        np.testing.assert_allclose(middle, to_rgba(colour), atol=0.01)


@pytest.mark.parametrize("count", [8, 12, 16])
@pytest.mark.parametrize("event_shape", IMAGES, ids=str)
def test_each_reconstruction_stands_below_its_example(event_shape, count):
    model, x = model_for(event_shape), data(event_shape, count)
    model.encoder.log_scale.bias.assign([-20.0, -20.0])  # so that any noise gives the same z
    grid = tiles(model_figures.reconstructions(model, x), model.event_shape)
    examples = grid[::2].reshape(-1, *model.event_shape)[:count]
    below = grid[1::2].reshape(-1, *model.event_shape)[:count]
    np.testing.assert_array_equal(examples, x)
    np.testing.assert_allclose(below, model.reconstruct(x), atol=1e-5)


def test_interpolations_run_from_one_posterior_mean_to_the_other_through_the_middle(model):
    first, last = np.split(data(model.event_shape, 6), 2)
    figure = model_figures.interpolations(model, first, last, steps=5)
    grid = tiles(figure, model.event_shape)
    assert grid.shape == (3, 5, *model.event_shape)
    start, end = (model.posterior(x, 64).mean for x in (first, last))
    for column, z in [(0, start), (2, (start + end) / 2), (4, end)]:
        np.testing.assert_allclose(grid[:, column], model.decode(z), atol=1e-5)


def test_the_manifold_runs_over_the_quantiles_of_the_prior_from_left_to_right_and_upwards(model):
    grid = tiles(model_figures.manifold(model, side=3), model.event_shape)
    high = ndtri(5 / 6)
    corners = {(0, 0): [-high, high], (0, 2): [high, high], (1, 1): [0, 0], (2, 0): [-high, -high]}
    for (row, column), z in corners.items():
        np.testing.assert_allclose(grid[row, column], model.decode([z])[0], atol=1e-5)


def test_the_latent_space_shows_draws_in_the_colour_of_their_label():
    model, x, labels = model_for((6,)), data((6,), 9), np.array([0, 1, 1, 7, 0, 1, 7, 7, 7])
    figure = model_figures.latent_spaces({"one": model, "two": model}, x, labels, draws=90)
    z = np.asarray(model.encode(x, 10))
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    for axes in figure.axes:
        assert len(axes.collections) == 3
        for label, points in zip([0, 1, 7], axes.collections, strict=True):
            expected = z[:, labels == label].reshape(-1, 2)
            np.testing.assert_allclose(points.get_offsets(), expected, atol=1e-5)
            colour = to_rgba(f"C{label}", alpha=0.6)
            np.testing.assert_allclose(points.get_facecolor()[0], colour)


def test_a_latent_space_without_labels_has_one_colour_and_no_legend():
    figure = model_figures.latent_spaces({"": model_for((6,))}, data((6,)))
    assert len(figure.axes[0].collections) == 1
    assert not figure.legends


def test_posteriors_has_a_row_for_each_model_and_a_column_for_each_x():
    model, x = model_for((6,)), data((6,), 3)
    figure = model_figures.posteriors({"one": model, "two": model}, x, cells=30)
    assert len(figure.axes) == 6
    draws = np.asarray(model.posterior(x, 600).z)
    for i, axes in enumerate(figure.axes):
        points = axes.collections[-1].get_offsets()
        np.testing.assert_allclose(points, draws[:, i % 3], atol=1e-5)


@pytest.mark.parametrize(
    "covariance", [[[1.0, 0.0], [0.0, 1.0]], [[2.0, 1.2], [1.2, 0.9]]], ids=["round", "tilted"]
)
def test_contour_levels_enclose_half_and_nine_tenths_of_a_gaussian(covariance):
    side = np.linspace(-8, 8, 200)
    z = np.stack(np.meshgrid(side, side), -1)
    density = np.exp(-0.5 * np.einsum("...i,ij,...j", z, np.linalg.inv(covariance), z))
    outer, inner, top = model_figures._levels(7.0 * density)
    # A Gaussian in two dimensions has the share 1 - h of its mass where its density exceeds h of
    # the peak.
    np.testing.assert_allclose([1 - inner / 7.0, 1 - outer / 7.0], [0.5, 0.9], atol=0.01)
    assert top > 7.0 * density.max()
