"""Requests to a loaded export that no client of ours would send, found by hypothesis."""

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from avb_tf.errors import UserError
from avb_tf.serving.protos import PredictRequest, TensorProto, from_tensor
from avb_tf.serving.saved_model import RunError

_NUMBERS = (np.float32, np.float64, np.uint8, np.int64, np.int32, np.float16, np.bool_)
_SHAPES = stn.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=9)
_FLOATS = st.floats(width=32) | st.sampled_from([0.0, 1.0, -0.0, 1e38, -1e38])


@st.composite
def tensors(draw):
    """A TensorProto of any type, shape and content."""
    tensor = TensorProto(dtype=draw(st.integers(0, 30)))
    for size in draw(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9), max_size=5)):
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = draw(st.binary(max_size=64))
    tensor.float_val.extend(draw(st.lists(st.floats(width=32), max_size=4)))
    tensor.int_val.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)))
    tensor.int64_val.extend(draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)))
    return tensor


@st.composite
def requests(draw, signatures):
    """A signature and inputs; each input is as expected, nearly, or of any type and shape."""
    name = draw(st.sampled_from(sorted(signatures)) | st.text(max_size=9))
    known = signatures[name].inputs if name in signatures else {}
    names = draw(st.just(list(known)) | st.lists(st.text(max_size=5), max_size=3))
    inputs = {}
    for one in names:
        shape = draw(_SHAPES)
        if one in known and draw(st.integers(0, 3)):
            rows = draw(st.sampled_from([0, 1, 3, 1025]))
            shape = (rows, *known[one].shape[1:])
        dtype = known[one].dtype if one in known and draw(st.integers(0, 3)) else None
        dtype = np.dtype(dtype or draw(st.sampled_from(_NUMBERS)))
        elements = _FLOATS if dtype == np.float32 else None
        inputs[one] = draw(stn.arrays(dtype, shape, elements=elements, fill=st.just(dtype.type(1))))
    return name, inputs


def check(model, examples, number=None):
    """Sends what hypothesis finds: each request is answered or refused, and the model goes on.

    Args:
      model: a `SavedModel`.
      examples: number of each kind.
      number: seed of the examples; without it they are always the same.
    """
    some = settings(
        max_examples=examples, deadline=None, derandomize=number is None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    seeded = (lambda test: test) if number is None else seed(number)

    @seeded
    @some
    @given(st.binary(max_size=200))
    def bytes_are_a_request_or_none(content):
        try:
            request = PredictRequest.FromString(content)
        except DecodeError:
            return
        for tensor in request.inputs.values():
            _converted(tensor)

    @seeded
    @some
    @given(tensors())
    def a_tensor_is_an_array_or_refused(tensor):
        _converted(tensor)

    @seeded
    @some
    @given(requests(model.signatures))
    def a_request_is_answered_or_refused(request):
        name, inputs = request
        try:
            answer = model.run(name, inputs)
        except RunError:
            return
        (rows,) = {values.shape[0] for values in inputs.values()}
        for output, values in answer.items():
            assert values.shape[0] == rows, (name, output, values.shape, rows)

    bytes_are_a_request_or_none()
    a_tensor_is_an_array_or_refused()
    a_request_is_answered_or_refused()


def _converted(tensor):
    try:
        array = from_tensor(tensor)
    except UserError:
        return
    assert list(array.shape) == [dim.size for dim in tensor.tensor_shape.dim]
