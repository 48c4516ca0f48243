"""Zip archives from untrusted sources, checked before their content takes memory or disk."""

import io
import math
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

# Weights and images compress to a tenth of their size at best, blank ones to a thousandth.
LARGEST_RATIO = 100  # of content to archive size, for the content beyond `FREE`
FREE = 2**30  # bytes of content that are allowed for every archive


def check(archive: zipfile.ZipFile) -> None:
    """Checks the members' names and declared sizes.

    The declared sizes suffice, because `zipfile` never reads more of a member than its size.

    Raises:
      ValueError: a member is a link, lies outside the archive or is named twice, or the content is
        too large for the archive's size.
    """
    names = set()
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in member.filename:
            raise ValueError(f"its member {member.filename!r:.80} lies outside the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"its member {member.filename!r:.80} is a link")
        if member.filename in names:
            raise ValueError(f"its member {member.filename!r:.80} is there twice")
        names.add(member.filename)
    content = sum(member.file_size for member in archive.infolist())
    size = archive.fp.seek(0, os.SEEK_END)
    if content > FREE + LARGEST_RATIO * size:
        raise ValueError(f"its {size:,} bytes would expand to {content:,}")


def read_arrays(source: Path | bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz` file by name, without unpickling anything.

    Args:
      source: the file, or its content.
    Raises:
      Exception: any error of `zipfile`, `zlib` or numpy, if the archive is damaged or holds
        anything but arrays.
    """
    with (
        io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file,
        zipfile.ZipFile(file) as archive,
    ):
        check(archive)
        return {
            member.filename.removesuffix(".npy"): _array(archive, member)
            for member in archive.infolist()
        }


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Reads an array if the member holds as many bytes as its header claims.

    The check comes first, because numpy allocates the claimed size before it reads.
    """
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in read_header:
            raise ValueError(f"{member.filename} has the unknown format {version}")
        shape, _, dtype = read_header[version](file)
        claimed, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled objects")
        if claimed != held or min(shape, default=0) < 0:
            raise ValueError(f"{member.filename} claims {claimed:,} bytes and holds {held:,}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
