"""Requests by eight threads while new versions of an export are written and loaded."""

import contextlib
import shutil
import threading

import numpy as np

from avb_tf import checkpoints
from avb_tf.serving import layout
from avb_tf.serving.saved_model import RunError, SavedModel
from tests.campaigns import memory
from tests.campaigns.jobs import Job

THREADS = 8
ROWS = 16  # most rows of a request
SIGNATURES = ("encode_seeded", "reconstruct_seeded", "sample_seeded", "decode")


class Version:
    """A loaded version, what it answers in a quiet moment, and the requests that it is running."""

    def __init__(self, directory):
        self.model, self.running = SavedModel(directory), 0
        rng = np.random.default_rng(0)
        self.requests, self.expected = {}, {}
        for name in SIGNATURES:
            self.requests[name] = {
                k: rng.integers(0, 2, [64, *tensor.shape[1:]]).astype(tensor.dtype)
                for k, tensor in self.model.signatures[name].inputs.items()
            }
            self.expected[name] = self.model.run(name, self.requests[name])


class Server:
    """Serves the newest version; an older one is closed after its last request."""

    def __init__(self, version):
        self.version, self._lock = version, threading.Lock()

    @contextlib.contextmanager
    def serving(self):
        """The newest version, which stays open inside the block."""
        with self._lock:
            version = self.version
            version.running += 1
        try:
            yield version
        finally:
            with self._lock:
                version.running -= 1
                last = version is not self.version and not version.running
            if last:
                version.model.close()

    def replace(self, version):
        """Serves another version from now on."""
        with self._lock:
            before, self.version = self.version, version
            idle = not before.running
        if idle:
            before.model.close()


def reloaded(write, requests, versions):
    """Loads so many versions, one after the other, while threads send requests.

    Args:
      write: function of the version's number, from 1, that writes it and returns its directory;
        other weights in each, so that an answer of the wrong one is noticed.
      requests: of all threads together.
      versions: written in equal distances of requests.
    Returns:
      (losses, note): wrong answers, requests that were neither answered nor refused rightly, and
      memory that grows.
    """
    server = Server(Version(write(1)))
    lost, counts, megabytes = [], [0] * THREADS, []
    threads = [
        threading.Thread(target=_work, args=(server, requests // THREADS, counts, i, lost))
        for i in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for number in range(2, versions + 1):
        _wait(lambda due=(number - 1) * requests // versions: sum(counts) >= due, threads)
        megabytes.append(memory.resident())
        version, before = Version(write(number)), server.version
        if np.array_equal(*(v.expected["decode"]["x"] for v in (version, before))):
            lost.append(f"version {number} answers as the one before")
        server.replace(version)
    for thread in threads:
        thread.join()
    server.version.model.close()
    megabytes.append(memory.resident())
    if megabytes[-1] > memory.GROWTH * megabytes[0]:
        lost.append("memory grows")
    shown = ", ".join(f"{size:.0f}" for size in megabytes)
    return lost, f"{THREADS} threads, {versions} versions; MB before each: {shown}"


def exported(folder, whole, number):
    """Version `number` of a finished run's checkpoint, written by another process."""
    workdir = folder / "reloaded"
    if number == 1:
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(whole, workdir)
    files = sorted((whole / checkpoints.DIRECTORY).glob("*.keras"))
    shutil.rmtree(workdir / checkpoints.DIRECTORY)
    (workdir / checkpoints.DIRECTORY).mkdir()
    shutil.copy(files[number % len(files)], workdir / checkpoints.DIRECTORY)
    status, error = Job(workdir, "--mode=export", forked=True).finish()
    assert status == 0, error
    return workdir / layout.DIRECTORY / str(number)


def _wait(condition, threads):
    pause = threading.Event()
    while not condition() and any(thread.is_alive() for thread in threads):
        pause.wait(0.05)


def _work(server, requests, counts, thread, lost):
    """One of ten requests has too many dimensions and must be refused."""
    rng = np.random.default_rng(thread)
    for number in range(1, requests + 1):
        name, rows = SIGNATURES[rng.integers(len(SIGNATURES))], rng.integers(1, ROWS)
        begin = rng.integers(64 - rows)
        wrong = rng.random() < 0.1
        with server.serving() as version:
            request = {k: v[begin : begin + rows] for k, v in version.requests[name].items()}
            if wrong:
                request = {k: values[..., np.newaxis] for k, values in request.items()}
            try:
                answer = version.model.run(name, request)
            except RunError as error:
                if not wrong:
                    lost.append(f"{name}: {error!s:.200}")
            else:
                right = all(
                    np.allclose(v, version.expected[name][k][begin : begin + rows], 1e-5, 1e-5)
                    for k, v in answer.items()
                )
                if wrong or not right:
                    lost.append(f"{name}, {rows} rows: a wrong answer")
        counts[thread] = number
