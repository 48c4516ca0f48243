"""TensorFlow Serving's messages and the conversion of arrays to tensors, without TensorFlow.

The official package converts with `tf.make_tensor_proto`, which imports all of TensorFlow;
`to_tensor` and `from_tensor` need only protobuf and numpy.
"""

import contextlib
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt

from avb_tf.errors import UserError


@contextlib.contextmanager
def _bare_tensorflow() -> Generator[None]:
    """Replaces `tensorflow` by a package without its `__init__`, which the messages do not need."""
    spec = importlib.util.find_spec("tensorflow")
    if "tensorflow" in sys.modules or spec is None:
        yield
        return
    bare = types.ModuleType("tensorflow")
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["tensorflow"] = bare
    try:
        yield
    finally:
        del sys.modules["tensorflow"]  # so that a later import loads all of TensorFlow


def _message(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


try:
    with _bare_tensorflow():
        TensorProto = _message("tensorflow.core.framework.tensor_pb2", "TensorProto")
        MetaGraphDef = _message("tensorflow.core.protobuf.meta_graph_pb2", "MetaGraphDef")
        PredictRequest = _message("tensorflow_serving.apis.predict_pb2", "PredictRequest")
        PredictionLog = _message("tensorflow_serving.apis.prediction_log_pb2", "PredictionLog")
        ModelServerConfig = _message(
            "tensorflow_serving.config.model_server_config_pb2", "ModelServerConfig"
        )
except ImportError as error:
    raise UserError(
        f"exported models need TensorFlow Serving's messages ({error}); "
        "pip install 'avb_tf[serving]'"
    ) from error

# TensorFlow's type numbers, the numpy types, and the fields that hold repeated values.
_FLOAT, _DOUBLE, _UINT8, _INT64 = 1, 2, 4, 9
DTYPES = {
    _FLOAT: np.dtype(np.float32),
    _DOUBLE: np.dtype(np.float64),
    _UINT8: np.dtype(np.uint8),
    _INT64: np.dtype(np.int64),
}
_FIELDS = {_FLOAT: "float_val", _DOUBLE: "double_val", _UINT8: "int_val", _INT64: "int64_val"}


def to_tensor(array: npt.ArrayLike) -> Any:
    """Returns the `TensorProto` of an array of float32, float64, uint8 or int64.

    Raises:
      UserError: the array has another type.
    """
    array = np.asarray(array)
    numbers = {dtype: number for number, dtype in DTYPES.items()}
    if array.dtype not in numbers:
        known = ", ".join(map(str, numbers))
        raise UserError(f"a tensor of {array.dtype}; expected one of {known}")
    tensor = TensorProto(dtype=numbers[array.dtype], tensor_content=array.tobytes())
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


def from_tensor(tensor: Any) -> np.ndarray:
    """Returns the array in a `TensorProto`.

    Raises:
      UserError: the type is unknown, a value is too large for it, or the values do not fill the
        shape.
    """
    if tensor.dtype not in DTYPES:
        raise UserError(f"a tensor of type {tensor.dtype}; expected one of {sorted(DTYPES)}")
    dtype, shape = DTYPES[tensor.dtype], [dim.size for dim in tensor.tensor_shape.dim]
    content = tensor.tensor_content
    try:
        if content and len(content) % dtype.itemsize == 0:
            values = np.frombuffer(content, dtype)
        else:
            # Of a list, since of protobuf's own sequence numpy would cut large values off.
            values = np.array(list(getattr(tensor, _FIELDS[tensor.dtype])), dtype)
    except OverflowError as error:
        raise UserError(f"a tensor of {dtype} with a larger value ({error})") from error
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count != len(values):
        raise UserError(f"a tensor of shape {shape} with {len(values)} values; expected {count}")
    try:
        return values.reshape(shape)
    except ValueError as error:  # more dimensions, or larger ones beside a 0, than numpy has
        raise UserError(f"a tensor of shape {shape!s:.100}: {error}") from error
