"""Untrusted archives: zip bombs, paths that lead outside, links and giant headers."""

import io
import resource
import stat
import zipfile

import numpy as np
import pytest

from avb_tf import archives


def archive(folder, *members, **arguments):
    """Writes a zip file from pairs (name or ZipInfo, content)."""
    file = folder / "a.npz"
    with zipfile.ZipFile(file, "w", **arguments) as made:
        for name, content in members:
            made.writestr(name, content)
    return file


def npy(shape, dtype="<f8", content=b""):
    """Returns the bytes of an array file whose header claims `shape`."""
    buffer = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue() + content


def link():
    info = zipfile.ZipInfo("x.npy")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_arrays_are_those_that_numpy_reads(tmp_path):
    arrays = {
        "x": np.arange(12.0).reshape(3, 4), "fortran": np.asfortranarray(np.ones([2, 3])),
        "empty": np.zeros([0, 3]), "scalar": np.array(5), "bytes": np.arange(3, dtype=np.uint8),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        with np.load(tmp_path / "a.npz") as expected:
            for source in (tmp_path / "a.npz", (tmp_path / "a.npz").read_bytes()):
                actual = archives.read_arrays(source)
                assert actual.keys() == set(expected)
                for name, array in actual.items():
                    np.testing.assert_array_equal(array, expected[name])


REFUSED = {
    "absolute": ([("/etc/x.npy", npy((0,)))], "outside"),
    "above": ([("../x.npy", npy((0,)))], "outside"),
    "above, by backslash": ([("..\\x.npy", npy((0,)))], "outside"),
    "drive": ([("C:/x.npy", npy((0,)))], "outside"),
    "link": ([(link(), "/etc/passwd")], "link"),
    "1e15 numbers": ([("x.npy", npy((10**15,)))], "claims 8,000,000,000,000,000 bytes and holds 0"),
    "more than int64": ([("x.npy", npy((2**62, 2**62)))], "claims"),
    "negative size": ([("x.npy", npy((-1, -8), content=bytes(64)))], "claims"),
    "too few": ([("x.npy", npy((8,), content=bytes(56)))], "claims 64 bytes and holds 56"),
    "too many": ([("x.npy", npy((8,), content=bytes(72)))], "claims 64 bytes and holds 72"),
    "pickled": ([("x.npy", npy((1,), "|O", b"cos\nsystem\n"))], "pickled"),
    "a long header": ([("x.npy", npy((1,) * 10_000))], "is large"),
    "no array": ([("x.npy", b"text")], "magic"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    members, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        archives.read_arrays(archive(tmp_path, *members))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path):
    members = [("x.npy", npy((0,))), ("x.npy", npy((0,)))]
    with pytest.raises(ValueError, match="twice"):
        archives.read_arrays(archive(tmp_path, *members))


def test_a_bomb_is_refused_before_it_expands(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 2**20)
    bomb = npy((2**22,), content=bytes(2**25))
    file = archive(tmp_path, ("x.npy", bomb), compression=zipfile.ZIP_DEFLATED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"its .* bytes would expand to 33,"):
        archives.read_arrays(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**13  # KiB
    monkeypatch.undo()
    assert archives.read_arrays(file)["x"].shape == (2**22,)


def test_flipped_bits_are_noticed_or_harmless(tmp_path):
    x = np.random.default_rng(0).normal(size=40)
    np.savez(tmp_path / "a.npz", x=x)
    content = (tmp_path / "a.npz").read_bytes()
    rng, noticed = np.random.default_rng(1), 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        try:
            arrays = archives.read_arrays(bytes(flipped))
        except Exception:  # zipfile, zlib and numpy raise many kinds
            noticed += 1
        else:  # the flip hit a field that does not matter, such as a date, or the name
            assert len(arrays) == 1
            np.testing.assert_array_equal(next(iter(arrays.values())), x)
    assert noticed > 200
