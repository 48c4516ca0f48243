"""Sends valid and malformed requests from eight threads to one export; `make load`: 20,000."""

import os
import threading
import time

import keras
import numpy as np
import pytest

import avb_tf
from avb_tf.serving.saved_model import RunError, SavedModel
from tests import serving_fuzz

REQUESTS = int(os.environ.get("AVB_TF_LOAD_REQUESTS", 800))
THREADS = 8
BATCHES = (1, 2, 5, 16, 64)
EVENT = (8, 8, 1)


def resident() -> int:
    """Returns the resident memory of the process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras.utils.set_random_seed(0)
    built = avb_tf.build("avb_ac", EVENT, latent_dim=3, width=32, basis_width=16, bases=8)
    return SavedModel(built.export(tmp_path_factory.mktemp("export"), importance_samples=32))


def test_any_request_is_answered_or_refused(model):
    serving_fuzz.check(model, 25)


def test_no_error_no_wrong_answer_and_constant_memory(model):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, [64, *EVENT]).astype(np.float32)
    inputs = {
        "x": x, "z": rng.normal(size=[64, 3]).astype(np.float32),
        "seed": np.arange(64), "row": np.arange(64),
    }  # fmt: skip
    names = [name for name in model.signatures if not name.endswith("_uint8")]
    fresh = {"encode", "reconstruct", "sample"}
    expected = {
        name: model.run(name, {k: inputs[k] for k in model.signatures[name].inputs})
        for name in names
    }
    wrong = [
        ("encode", {"x": x[:, :4]}),
        ("encode", {"x": x.astype(np.uint8)}),
        ("elbo", {"x": np.full_like(x, np.nan)}),
        ("sample", {"row": np.zeros(5000, np.int64)}),
        ("encode_seeded", {"x": x}),
        ("sample", {"row": np.array(1)}),
        ("train", {"x": x}),
    ]
    failures, counted, after_warmup = [], {"answers": 0, "refusals": 0}, []
    lock = threading.Lock()

    def work(thread):
        rng = np.random.default_rng(thread)
        for i in range(REQUESTS // THREADS):
            if i == REQUESTS // THREADS // 10:
                with lock:
                    after_warmup.append(resident())
            if rng.random() < 0.1:
                name, request = wrong[rng.integers(len(wrong))]
                try:
                    model.run(name, request)
                    failures.append(f"{name} answered what it should refuse")
                except RunError:
                    with lock:
                        counted["refusals"] += 1
                continue
            name, rows = names[rng.integers(len(names))], BATCHES[rng.integers(len(BATCHES))]
            start = rng.integers(65 - rows)
            part = slice(start, start + rows)
            try:
                answer = model.run(
                    name, {k: inputs[k][part] for k in model.signatures[name].inputs}
                )
                for output, values in answer.items():
                    if name in fresh and output != "mean":
                        right = len(values) == rows and np.isfinite(values).all()
                    else:
                        right = np.allclose(values, expected[name][output][part], 1e-5, 1e-5)
                    if not right:
                        failures.append(f"{name} {output} of {rows} rows is wrong")
            except RunError as error:
                failures.append(f"{name}: {error}")
            with lock:
                counted["answers"] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=[i]) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, before, after = time.perf_counter() - began, max(after_warmup), resident()
    print(
        f"\n{counted['answers']} answers and {counted['refusals']} refusals in {seconds:.0f} s; "
        f"memory {before / 2**20:.0f} MiB after warm-up, {after / 2**20:.0f} MiB at the end"
    )
    assert not failures, failures[:5]
    assert sum(counted.values()) == REQUESTS // THREADS * THREADS
    # A short run ends before the allocator's arenas have settled, so it may grow more.
    assert after < before * (1.05 if REQUESTS >= 20_000 else 1.25)
