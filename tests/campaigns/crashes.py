"""Generates the states that a power loss may leave, from the system calls of a run.

A recording by strace is a list of operations on files and directories of a POSIX file system. A
power loss is simulated after each prefix of this list. Synced data survive. Of the rest:

- the data of a file are complete, absent, replaced by zeros, or cut to the first half;
- any subset of the changes of names in a directory has taken effect, but changes of the same name
  keep their order, and a rename is atomic.

In each state, every file that was renamed to its final name must be complete, and no older than the
last version that the program regarded as saved. A version counts as saved once the program
continues with the next operation.
"""

import codecs
import dataclasses
import hashlib
import itertools
import os
import re
import shutil
from pathlib import Path

STRACE = shutil.which("strace")
_CALLS = (
    "openat,creat,open,write,pwrite64,lseek,ftruncate,fsync,fdatasync,rename,renameat,renameat2,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir"
)
_LINE = re.compile(rb"(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)", re.S)
_HANDLE = re.compile(rb"(?:AT_FDCWD|(?P<number>\d+))(?:<(?P<path>(?:[^<>\\]|\\.)*)>)?")
_TEXT = re.compile(rb'"((?:[^"\\]|\\.)*)"')
# Up to this many subsets and contents of one prefix are all tried; of more, a sample is tried.
_SUBSETS = 32


def under(log):
    """Returns the strace command that precedes the recorded command and writes to `log`."""
    return [STRACE, "-f", "-y", "--seccomp-bpf", "-s", str(2**26), "-e", f"trace={_CALLS}",
            "-o", str(log)]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """A change of a file or directory.

    Attributes:
      kind: create, write, truncate, rename, unlink or sync.
      node: number of the file or directory that changes or gets a name.
      directory: number of the directory whose names change.
      name: the name in that directory.
      target: number of the directory after a rename.
      new: the name after a rename.
      offset: position of the data, or the size of a truncated file.
      data: the data written.
    """

    kind: str
    node: int
    directory: int = -1
    name: str = ""
    target: int = -1
    new: str = ""
    offset: int = 0
    data: bytes = b""


class Recording:
    """The operations inside a folder, which must be empty when the recording begins.

    Args:
      log: the output file of strace.
      folder: the recorded folder, which is node 0.
      ignored: names of files and folders that are left out.
    """

    def __init__(self, log, folder, ignored=("logs",)):
        self.folder, self.ignored = os.fsencode(folder), {os.fsencode(name) for name in ignored}
        self.operations, self.directories = [], {0}
        self._nodes, self._offsets, self._count = {self.folder: 0}, {}, itertools.count(1)
        begun = {}
        for line in Path(log).read_bytes().split(b"\n"):
            pid, _, rest = line.partition(b" ")
            if rest.endswith(b" <unfinished ...>"):
                begun[pid] = line.removesuffix(b" <unfinished ...>")
                continue
            if resumed := re.match(rb"\s*<\.\.\. \w+ resumed>", rest):
                line = begun.pop(pid) + rest[resumed.end() :]
            if self.folder in line and (call := _LINE.match(line)) and int(call["result"]) >= 0:
                self._add(call["call"].decode(), call["arguments"], int(call["result"]))

    def _add(self, call, arguments, result):
        handle = _HANDLE.match(arguments)
        texts = [codecs.escape_decode(text)[0] for text in _TEXT.findall(arguments)]
        if call in ("write", "pwrite64", "lseek", "ftruncate", "fsync", "fdatasync"):
            node = self._nodes.get(codecs.escape_decode(handle["path"])[0])
            if node is not None:
                numbers = re.findall(rb", (-?\d+)", arguments)
                self._data(call, int(handle["number"]), node, texts, numbers, result)
            return
        base = handle["path"] if handle else None
        base = codecs.escape_decode(base)[0] if base else b"/"
        paths = [os.path.normpath(os.path.join(base, text)) for text in texts]
        if not all(self._counts(path) for path in paths):
            return
        if call in ("open", "openat", "creat"):
            self._open(paths[0], arguments, result)
        elif call in ("mkdir", "mkdirat"):
            self.directories.add(self._create(paths[0]))
        elif call.startswith("rename"):
            self._rename(*paths)
        else:
            node = self._nodes.pop(paths[0])
            self._named("unlink", node, paths[0])

    def _counts(self, path):
        parts = path.removeprefix(self.folder + b"/").split(b"/")
        inside = path.startswith(self.folder + b"/") and self.ignored.isdisjoint(parts)
        return inside and not path.endswith(b".lock")

    def _named(self, kind, node, *paths):
        places = [
            (self._nodes[os.path.dirname(path)], os.fsdecode(os.path.basename(path)))
            for path in paths
        ]
        self.operations.append(Operation(kind, node, *itertools.chain(*places)))

    def _create(self, path):
        self._nodes[path] = node = next(self._count)
        self._named("create", node, path)
        return node

    def _open(self, path, arguments, number):
        self._offsets[number] = 0
        if path not in self._nodes:
            if b"O_CREAT" in arguments:
                self._create(path)
        elif b"O_TRUNC" in arguments:
            self.operations.append(Operation("truncate", self._nodes[path]))

    def _rename(self, old, new):
        self._named("rename", self._nodes[old], old, new)
        moved = {p: n for p, n in self._nodes.items() if p == old or p.startswith(old + b"/")}
        for path in moved:
            del self._nodes[path]
        self._nodes |= {new + path.removeprefix(old): node for path, node in moved.items()}

    def _data(self, call, number, node, texts, numbers, result):
        if call in ("fsync", "fdatasync"):
            self.operations.append(Operation("sync", node))
        elif call == "ftruncate":
            self.operations.append(Operation("truncate", node, offset=int(numbers[-1])))
        elif call == "lseek":
            self._offsets[number] = result
        else:
            offset = int(numbers[-1]) if call == "pwrite64" else self._offsets.get(number, 0)
            self.operations.append(Operation("write", node, offset=offset, data=texts[0][:result]))
            if call == "write":
                self._offsets[number] = offset + result


def _applied(content, operation):
    """Returns the content of a file after an operation on its data."""
    if operation.kind == "truncate":
        return content[: operation.offset].ljust(operation.offset, b"\0")
    content = content.ljust(operation.offset, b"\0")
    end = operation.offset + len(operation.data)
    return content[: operation.offset] + operation.data + content[end:]


def _torn(durable, whole):
    """Returns possible contents of a file with pending data: all, none, zeros, the first half."""
    old = durable[: len(whole)].ljust(len(whole), b"\0")
    half = len(whole) // 2
    return [whole, durable, old, whole[:half] + old[half:]]


def _subsets(pending, chance):
    """Yields subsets of pending changes of names; changes of the same name keep their order."""
    count = len(pending)
    masks = (
        itertools.product((True, False), repeat=count)
        if 2**count <= _SUBSETS
        else itertools.chain(
            ([i < n for i in range(count)] for n in range(count + 1)),
            ([i != n for i in range(count)] for n in range(count)),
            ([chance.random() < 0.5 for _ in range(count)] for _ in range(8)),
        )
    )
    for mask in masks:
        applied = [change for change, taken in zip(pending, mask, strict=True) if taken]
        left = [change for change, taken in zip(pending, mask, strict=True) if not taken]
        if not any(
            pending.index(a) < pending.index(b) and _names(a) & _names(b)
            for a in left
            for b in applied
        ):
            yield applied


def _names(change):
    places = {(change.directory, change.name)}
    return places | {(change.target, change.new)} if change.kind == "rename" else places


def _with(entries, changes):
    """Returns the names of all directories, {directory: {name: node}}, after changes."""
    entries = {directory: dict(names) for directory, names in entries.items()}
    for change in changes:
        names = entries.setdefault(change.directory, {})
        if change.kind == "create":
            names[change.name] = change.node
        else:
            node = names.pop(change.name, None)
            if change.kind == "rename" and node is not None:
                entries.setdefault(change.target, {})[change.new] = node
    return entries


class Disk:
    """The synced and the pending state of a disk after a prefix of the operations.

    Args:
      directories: numbers of the nodes that are directories.
    """

    def __init__(self, directories):
        self.directories = directories
        self.entries, self.pending_names = {}, []
        self.contents, self.unsynced = {}, {}

    def apply(self, operation):
        node = operation.node
        if operation.kind in ("write", "truncate"):
            before = self.unsynced.get(node, self.contents.get(node, b""))
            self.unsynced[node] = _applied(before, operation)
        elif operation.kind != "sync":
            self.pending_names.append(operation)
        elif node in self.directories:
            synced = []  # a rename from another directory also syncs the changes that led to it
            for change in reversed(self.pending_names):
                if node in (change.directory, change.target) or any(
                    _names(change) & _names(later) for later in synced
                ):
                    synced.insert(0, change)
            self.entries = _with(self.entries, synced)
            self.pending_names = [c for c in self.pending_names if c not in synced]
        else:
            self.contents[node] = self.unsynced.pop(node, self.contents.get(node, b""))

    def states(self, chance):
        """Yields trees that a crash may leave now: {path: content, or None for a directory}."""
        torn = {n: _torn(self.contents.get(n, b""), c) for n, c in self.unsynced.items()}
        for changes in _subsets(self.pending_names, chance):
            entries = _with(self.entries, changes)
            unsynced = [n for n in torn if any(n in e.values() for e in entries.values())]
            versions = range(4)
            choices = (
                itertools.product(versions, repeat=len(unsynced))
                if 4 ** len(unsynced) <= _SUBSETS
                else itertools.chain(
                    ([v] * len(unsynced) for v in versions),
                    (chance.choices(versions, k=len(unsynced)) for _ in range(2)),
                )
            )
            for choice in choices:
                contents = {n: torn[n][v] for n, v in zip(unsynced, choice, strict=True)}
                yield self._tree(entries, self.contents | contents)

    def live(self):
        """Returns the tree if nothing is lost."""
        return self._tree(_with(self.entries, self.pending_names), self.contents | self.unsynced)

    def _tree(self, entries, contents, directory=0, above=""):
        tree = {}
        for name, node in entries.get(directory, {}).items():
            path = f"{above}{name}"
            if node in self.directories:
                tree[path] = None
                tree |= self._tree(entries, contents, node, f"{path}/")
            else:
                tree[path] = contents.get(node, b"")
        return tree


def _below(tree, path):
    """Returns a hash of the file or of the directory's content, or None if the path is absent."""
    if path not in tree:
        return None
    inside = {k.removeprefix(path): v for k, v in tree.items() if k.startswith(f"{path}/")}
    return digest({"": tree[path], **inside})


def digest(tree):
    """Returns a hash of a tree."""
    parts = hashlib.sha256()
    for path, content in sorted(tree.items()):
        parts.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        parts.update(content or b"")
    return parts.digest()


def crash(operations, directories, chance):
    """Simulates a crash after every operation.

    Args:
      operations: the operations of a `Recording`.
      directories: numbers of the nodes that are directories.
      chance: random generator that selects states if there are too many to try all.
    Yields:
      (number of the operation, tree, losses): each state once. The losses are the final names in it
      with content that is older than the saved version, or incomplete.
    """
    disk, seen = Disk(directories), set()
    paths = {0: ""}  # of directories
    # Final path -> versions since the last one that counts as saved, oldest first. None: deleted.
    allowed, renamed = {}, []
    for number, operation in enumerate(operations):
        if operation.kind != "sync":  # the program has continued, so its renamed files are saved
            for path in renamed:
                allowed[path] = allowed[path][-1:]
            renamed = []
        disk.apply(operation)
        if operation.directory >= 0:
            above = paths[operation.directory]
            if operation.kind == "create" and operation.node in disk.directories:
                paths[operation.node] = f"{above}{operation.name}/"
            elif operation.kind == "rename":
                path = f"{paths[operation.target]}{operation.new}"
                if operation.node in disk.directories:
                    paths[operation.node] = f"{path}/"
                ours = operation.name.startswith((".", "partial."))  # TensorFlow uses other names
                if ours and not any(part.startswith(".") for part in path.split("/")):
                    allowed.setdefault(path, [None]).append(_below(disk.live(), path))
                    renamed.append(path)
            elif operation.kind == "unlink" and (path := f"{above}{operation.name}") in allowed:
                allowed[path].append(None)
        for tree in disk.states(chance):
            losses = [p for p, versions in allowed.items() if _below(tree, p) not in versions]
            key = digest(tree)
            if losses or key not in seen:
                seen.add(key)
                yield number, tree, losses


def write(tree, folder):
    """Writes a tree into an empty folder."""
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
