"""Loads a SavedModel with the C library of the TensorFlow wheel, through ctypes.

TensorFlow Serving uses the same runtime. The loader needs neither TensorFlow's Python package nor
Keras nor the code that made the model.
"""

import ctypes
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avb_tf import files
from avb_tf.serving.protos import DTYPES, MetaGraphDef

INVALID_ARGUMENT, FAILED_PRECONDITION = 3, 9  # status codes of TensorFlow and gRPC


class RunError(RuntimeError):
    """An error that the TensorFlow runtime reports.

    Args:
      code: TensorFlow's status code.
      message: explanation of the error.
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Tensor(NamedTuple):
    """An input or output of a signature.

    Attributes:
      name: name in the graph, "operation:index".
      dtype: type of the values.
      shape: sizes; -1 stands for any size.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


class Signature(NamedTuple):
    """The inputs and outputs of one function of a SavedModel.

    Attributes:
      inputs: name -> tensor.
      outputs: name -> tensor.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class _Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    ]


class SavedModel:
    """A loaded SavedModel; `run` is thread-safe.

        model = SavedModel("runs/digits-avb_ac/export/1")
        model.run("encode", {"x": x})  # {"z": ..., "mean": ...}

    Load a SavedModel only from a source that you trust, because it is a program that may read and
    write files.

    Args:
      directory: folder of one version of the export.
    Raises:
      UserError: a file was changed or damaged since the export.
      RunError: the SavedModel cannot be loaded.
    """

    def __init__(self, directory: Path | str):
        files.verify(Path(directory))
        self._graph = _C.TF_NewGraph()
        options, meta_graph = _C.TF_NewSessionOptions(), _C.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(b"serve")
        with _Status() as status:
            self._session = _C.TF_LoadSessionFromSavedModel(
                options, None, str(directory).encode(), tags, 1, self._graph, meta_graph, status
            )
        buffer = meta_graph.contents
        definitions = MetaGraphDef.FromString(ctypes.string_at(buffer.data, buffer.length))
        _C.TF_DeleteBuffer(meta_graph)
        _C.TF_DeleteSessionOptions(options)
        self.signatures = {
            name: Signature(_tensors(definition.inputs), _tensors(definition.outputs))
            for name, definition in sorted(definitions.signature_def.items())
            if definition.method_name  # the initialiser's signature has none
        }

    def run(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs a signature and returns all its outputs.

        Args:
          signature: name of the signature.
          inputs: name of the input -> array.
        Raises:
          RunError: the signature or an input is unknown, the graph rejects the values, or the
            model is closed.
        """
        if self._session is None:
            raise RunError(FAILED_PRECONDITION, "the model is closed; load it again")
        if signature not in self.signatures:
            known = ", ".join(self.signatures)
            raise RunError(INVALID_ARGUMENT, f"no signature '{signature}'; there are {known}")
        expected, outputs = self.signatures[signature]
        if inputs.keys() != expected.keys():
            raise RunError(
                INVALID_ARGUMENT,
                f"inputs {sorted(inputs)}; signature '{signature}' has {sorted(expected)}",
            )
        feeds = [self._place(tensor) for tensor in expected.values()]
        fetches = [self._place(tensor) for tensor in outputs.values()]
        values = (ctypes.c_void_p * len(feeds))()
        results = (ctypes.c_void_p * len(fetches))()
        try:
            for i, name in enumerate(expected):
                values[i] = self._to_c(np.asarray(inputs[name]))
            with _Status() as status:
                _C.TF_SessionRun(
                    self._session, None,
                    (_Output * len(feeds))(*feeds), values, len(feeds),
                    (_Output * len(fetches))(*fetches), results, len(fetches),
                    None, 0, None, status,
                )  # fmt: skip
            return {name: self._from_c(results[i]) for i, name in enumerate(outputs)}
        finally:
            for tensor in (*values, *results):
                if tensor:
                    _C.TF_DeleteTensor(tensor)

    def close(self) -> None:
        """Frees the session; the model cannot run after this. A second call does nothing."""
        session, self._session = self._session, None
        if session is None:
            return
        with _Status() as status:
            _C.TF_DeleteSession(session, status)
        _C.TF_DeleteGraph(self._graph)

    def _place(self, tensor: Tensor) -> _Output:
        operation, _, index = tensor.name.partition(":")
        return _Output(_C.TF_GraphOperationByName(self._graph, operation.encode()), int(index))

    def _to_c(self, array: np.ndarray):
        numbers = {dtype: number for number, dtype in DTYPES.items()}
        if array.dtype not in numbers:
            known = ", ".join(map(str, numbers))
            raise RunError(INVALID_ARGUMENT, f"an input of {array.dtype}; expected one of {known}")
        array = np.asarray(array, order="C")  # `ascontiguousarray` would add an axis to a scalar
        sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor = _C.TF_AllocateTensor(numbers[array.dtype], sizes, array.ndim, array.nbytes)
        ctypes.memmove(_C.TF_TensorData(tensor), array.ctypes.data, array.nbytes)
        return tensor

    def _from_c(self, tensor) -> np.ndarray:
        shape = [_C.TF_Dim(tensor, i) for i in range(_C.TF_NumDims(tensor))]
        data = ctypes.string_at(_C.TF_TensorData(tensor), _C.TF_TensorByteSize(tensor))
        return np.frombuffer(data, DTYPES[_C.TF_TensorType(tensor)]).reshape(shape)


class _Status:
    """A TF_Status that raises a RunError on exit if it holds an error."""

    def __enter__(self):
        self._status = _C.TF_NewStatus()
        return self._status

    def __exit__(self, *_):
        code = _C.TF_GetCode(self._status)
        message = _C.TF_Message(self._status).decode(errors="replace")
        _C.TF_DeleteStatus(self._status)
        if code:
            raise RunError(code, message)


def _tensors(described) -> dict[str, Tensor]:
    return {
        name: Tensor(
            info.name, DTYPES[info.dtype], tuple(dim.size for dim in info.tensor_shape.dim)
        )
        for name, info in sorted(described.items())
    }


def _load_library() -> ctypes.CDLL:
    """Loads the C library and declares the argument types of the functions used here."""
    spec: Any = importlib.util.find_spec("tensorflow")
    library = ctypes.CDLL(str(Path(spec.origin).with_name("libtensorflow_cc.so.2")))
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    number, buffer = ctypes.c_int, ctypes.POINTER(_Buffer)
    for name, result, arguments in (
        ("TF_NewGraph", pointer, []),
        ("TF_DeleteGraph", None, [pointer]),
        ("TF_NewStatus", pointer, []),
        ("TF_DeleteStatus", None, [pointer]),
        ("TF_GetCode", number, [pointer]),
        ("TF_Message", text, [pointer]),
        ("TF_NewBuffer", buffer, []),
        ("TF_DeleteBuffer", None, [buffer]),
        ("TF_NewSessionOptions", pointer, []),
        ("TF_DeleteSessionOptions", None, [pointer]),
        ("TF_LoadSessionFromSavedModel", pointer,
         [pointer, pointer, text, ctypes.POINTER(text), number, pointer, buffer, pointer]),
        ("TF_DeleteSession", None, [pointer, pointer]),
        ("TF_GraphOperationByName", pointer, [pointer, text]),
        ("TF_SessionRun", None,
         [pointer, pointer, pointer, pointer, number, pointer, pointer, number,
          pointer, number, pointer, pointer]),
        ("TF_AllocateTensor", pointer, [number, pointer, number, size]),
        ("TF_DeleteTensor", None, [pointer]),
        ("TF_TensorData", pointer, [pointer]),
        ("TF_TensorByteSize", size, [pointer]),
        ("TF_TensorType", number, [pointer]),
        ("TF_NumDims", number, [pointer]),
        ("TF_Dim", ctypes.c_int64, [pointer, number]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_C = _load_library()
