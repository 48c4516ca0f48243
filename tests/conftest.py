import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # pytest does not capture TensorFlow's log
# Tests run two at a time, and their layers are small.
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import numpy as np
import pytest

from tests import linear_gaussian as linear_gaussian_model

# Full garbage collections are rare, because hundreds of traced graphs make them slow.
gc.set_threshold(100_000, 50, 1000)

# The variable is read here, because tests of the data remove it from their environment.
DATA_FOLDERS = (os.environ.get("AVB_TF_DATA_DIR"), Path(__file__).parents[2] / "shared/data")

# Files whose tests train, export or start processes; `make test-fast` leaves them out.
SLOW = (
    "ais", "amortised*", "annealing", "baselines", "benchmarks_*", "checkpoints", "columns",
    "command_line", "compare", "documents", "draw", "estimates", "evaluate", "explore", "export*",
    "faults", "figures", "flows", "golden", "guard", "hub", "inference_gap", "keras", "loops",
    "mistakes", "model", "model_card", "monitor", "parts", "posterior*", "precision", "replicas",
    "serving_*", "signatures", "tensorboard", "train",
)  # fmt: skip

# Slow tests of which CI runs a quicker counterpart; `make test-long` runs them.
LONG = (
    "amortised_rows.py::test_a_process_without_this_package",
    "amortised_rows.py::test_rows_are_independent_given_the_parameters[True]",
    "amortised_runs.py::test_a_run_killed_at_its_first_stage",
    "amortised_targets.py::test_exact_draws_are_of_the_posterior_by_its_density[lotka",
    "auxiliary.py::test_the_trained_bound_is_below_log_p_by_quadrature",
    "baselines.py::test_a_gaussian_of_full_rank_finds_the_gaussian",
    "baselines.py::test_nuts_draws_from_the_posterior[False",
    "baselines.py::test_nuts_draws_from_the_posterior[True",
    "benchmarks_scaling.py::test_every_size",
    "benchmarks_scaling.py::test_the_measured_size_of_ais",
    "benchmarks_step.py::test_a_benchmark_is_written_and_compared",
    "command_line.py::test_compare_prints_all_methods",
    "command_line.py::test_threads_of_small_networks",
    "command_line.py::test_three_examples_are_enough_data",
    "configs.py::test_celeba_trains",
    "configs.py::test_mnist_conv_trains_with_narrow",
    "documents.py::test_python_blocks_run_one_after_another[amortised",
    "documents.py::test_python_blocks_run_one_after_another[posteriors",
    "draw.py::test_every_figure_is_written",
    "evaluate.py::test_a_diverging_run_stops",
    "evaluate.py::test_a_quantised_likelihood",
    "evaluate.py::test_runs_without_checkpoints_stay_in_the_table",
    "export.py::test_a_row_has_the_same_answer_in_batches_of_1_7_and_64[aae]",
    "export.py::test_a_row_has_the_same_answer_in_batches_of_1_7_and_64[auxvae]",
    "export.py::test_a_row_has_the_same_answer_in_batches_of_1_7_and_64[avb]",
    "export.py::test_a_row_has_the_same_answer_in_batches_of_1_7_and_64[avb_ac_paper",
    "export.py::test_a_row_has_the_same_answer_in_batches_of_1_7_and_64[iaf]",
    "export.py::test_a_row_has_the_same_answer_in_batches_of_1_7_and_64[vae",
    "export.py::test_an_export_answers_like_the_keras_model[aae]",
    "export.py::test_an_export_answers_like_the_keras_model[auxvae]",
    "export.py::test_an_export_answers_like_the_keras_model[avb]",
    "export.py::test_an_export_answers_like_the_keras_model[avb_ac]",
    "export.py::test_an_export_answers_like_the_keras_model[avb_ac_paper",
    "export.py::test_an_export_answers_like_the_keras_model[iaf]",
    "export.py::test_an_export_answers_like_the_keras_model[vae",
    "export.py::test_every_signature_passes_its_check[aae",
    "export.py::test_every_signature_passes_its_check[auxvae]",
    "export.py::test_every_signature_passes_its_check[avb]",
    "export.py::test_every_signature_passes_its_check[avb_flow",
    "export.py::test_every_signature_passes_its_check[iaf]",
    "export_posterior.py::test_an_export_of_a_loaded_fit",
    "export_posterior.py::test_from_the_command_line",
    "faults.py::test_a_disturbed_run",
    "faults.py::test_full_logs",
    "faults.py::test_who_loses_a_worker",
    "golden.py::test_a_model_gives_the_same_values_and_trains_further[0.1.0-1",
    "golden.py::test_a_model_gives_the_same_values_and_trains_further[0.1.0-2",
    "golden.py::test_a_model_gives_the_same_values_and_trains_further[0.1.0-3",
    "golden.py::test_a_model_gives_the_same_values_and_trains_further[0.1.0-5",
    "guard.py::test_a_batch_with_nan_every_50_steps",
    "guard.py::test_a_finite_explosion_at_the_end_of_an_epoch_costs_no_good_checkpoint[False",
    "guard.py::test_a_learning_rate_of_one_stops",
    "importance.py::test_every_method_has_weights_that_its_seed_fixes[avb]",
    "importance.py::test_every_method_has_weights_that_its_seed_fixes[avb_ac_paper]",
    "importance.py::test_every_method_has_weights_that_its_seed_fixes[avb_flow]",
    "importance.py::test_every_method_has_weights_that_its_seed_fixes[iaf]",
    "inference_gap.py::test_on_four_points_the_shape_part",
    "loops.py::test_a_compiled_step_is_the_step",
    "loops.py::test_compiled_data_on_the_device",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[aae]",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[auxvae]",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[avb]",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[avb_ac]",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[avb_ac_paper]",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[avb_flow]",
    "model.py::test_a_loaded_model_continues_like_the_saved_one[iaf]",
    "model.py::test_each_objective_moves_its_own_networks[3",
    "model.py::test_three_lines_of_keras_improve_the_bound[aae]",
    "model.py::test_three_lines_of_keras_improve_the_bound[auxvae]",
    "model.py::test_three_lines_of_keras_improve_the_bound[avb]",
    "model.py::test_three_lines_of_keras_improve_the_bound[avb_ac_paper]",
    "model.py::test_three_lines_of_keras_improve_the_bound[avb_flow]",
    "model.py::test_three_lines_of_keras_improve_the_bound[iaf]",
    "monitor.py::test_it_warns_of_prior_contrast_on_mnist",
    "monitor.py::test_the_difference_of_the_bounds_has_an_interval",
    "networks.py::test_running_averages_approach_the_moments",
    "posterior_groups.py::test_a_thousand_groups",
    "posterior_models.py::test_a_density_of_several_parameters_by_name_with_bijectors",
    "posterior_models.py::test_minibatches_recover_a_conjugate_posterior",
    "posterior_start.py::test_student_t_with_two_degrees_has_its_quantiles[False",
    "posterior_start.py::test_the_noise_of_an_estimated_covariance",
    "posteriors.py::test_means_of_targets_of_inference_gym_are_its_ground_truth",
    "posteriors.py::test_modes_that_no_network_reaches_are_fitted_by_a_mixture[None",
    "precision.py::test_a_loaded_model_continues_in_float32",
    "precision.py::test_training_reaches_the_same_bound[avb-mixed_float16]",
    "precision.py::test_training_reaches_the_same_bound[avb_ac_paper-mixed_bfloat16]",
    "properties.py::test_a_resumed_run_sees_the_batches",
    "replicas.py::test_a_run_is_the_same_on_one_device_on_two_and_on_two_workers[avb_ac_paper:conv",
    "sbibm.py::test_reference_draws_are_of_the_posterior_by_its_density[bernoulli_glm",
    "sbibm.py::test_reference_draws_are_of_the_posterior_by_its_density[slcp",
    "train.py::test_200_steps_on_mnist_beat_independent_pixels[avb_ac-full",
    "train.py::test_200_steps_on_mnist_beat_independent_pixels[vae",
)


def pytest_collection_modifyitems(items):
    """Marks the tests in slow files and the long tests."""
    for item in items:
        if any(item.path.match(f"test_{name}.py") for name in SLOW):
            item.add_marker(pytest.mark.slow)
        if any(f"test_{start}" in item.nodeid for start in LONG):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def few_components():
    """Limits the components for two latents; tests of the interval set their own number."""
    from avb_tf.likelihood_estimation import inference_gap

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference_gap, "PLANAR_COMPONENTS", inference_gap.COMPONENTS)
        yield


@pytest.fixture
def linear_gaussian(monkeypatch):
    """Returns a model whose log p(x) has a closed form, and the distribution of x."""
    return linear_gaussian_model.make(monkeypatch)


@pytest.fixture(scope="session")
def artefacts():
    """Returns the folder for screenshots."""
    return Path(os.environ.get("AVB_TF_ARTEFACTS", "runs/artefacts")).absolute()


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """Writes a file in MNIST's format with 1,500 and 297 enlarged digits of scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.kron(pixels.reshape(-1, 8, 8) * 255 / 16, np.ones((1, 3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    path = tmp_path_factory.mktemp("mnist") / "mnist.npz"
    parts = {"train": slice(1500), "test": slice(1500, None)}
    x = {f"x_{name}": images[part] for name, part in parts.items()}
    y = {f"y_{name}": labels[part].astype(np.uint8) for name, part in parts.items()}
    np.savez(path, **x, **y)
    return path


@pytest.fixture(scope="session")
def full_mnist():
    """Returns the path of the full MNIST; skips the test if there is none."""
    files = [Path(folder) / "mnist.npz" for folder in DATA_FOLDERS if folder]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        pytest.skip("no mnist.npz in $AVB_TF_DATA_DIR or ../shared/data")
    return path


@pytest.fixture(params=["small", "full"])
def mnist_path(request):
    """Returns the path of the small and of the full MNIST, in turn."""
    return request.getfixturevalue(f"{request.param}_mnist")
