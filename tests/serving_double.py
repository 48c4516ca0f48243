"""A test double of TensorFlow Serving on the official stubs; it is not TensorFlow Serving.

It answers `Predict` over gRPC for a model in TensorFlow's C library. It also converts REST bodies
to requests and answers to bodies, by the rules of TensorFlow Serving's REST documentation. It has
no batching, no versions and no model management.
"""

import base64
from concurrent import futures

import grpc
import numpy as np
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from avb_tf.errors import UserError
from avb_tf.serving.protos import from_tensor, to_tensor
from avb_tf.serving.saved_model import RunError, SavedModel

CODES = {code.value[0]: code for code in grpc.StatusCode}


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """The method `Predict` for one model."""

    def __init__(self, name: str, model: SavedModel):
        self.name, self.model = name, model

    def Predict(self, request, context):
        if request.model_spec.name != self.name:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model_spec.name}")
        try:
            inputs = {name: from_tensor(tensor) for name, tensor in request.inputs.items()}
            signature = request.model_spec.signature_name or "serving_default"
            answer = self.model.run(signature, inputs)
        except UserError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except RunError as error:
            context.abort(CODES[error.code], str(error))
        response = predict_pb2.PredictResponse()
        response.model_spec.CopyFrom(request.model_spec)
        for name, values in answer.items():
            response.outputs[name].CopyFrom(to_tensor(values))
        return response


class Server:
    """Runs the service on a free port of the loopback interface inside the `with` block."""

    def __init__(self, name: str, model: SavedModel):
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        service = PredictionService(name, model)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def __enter__(self):
        self.server.start()
        return f"127.0.0.1:{self.port}"

    def __exit__(self, *_):
        self.server.stop(None).wait()


# REST.


def rest_request(body: dict, dtypes: dict[str, np.dtype]) -> dict[str, np.ndarray]:
    """Returns the inputs of a body in row ("instances") or column ("inputs") form.

    Args:
      body: the JSON object.
      dtypes: dtypes of the signature's inputs, by name.
    Raises:
      ValueError: the body has neither form or both, or values do not fit the signature.
    """
    if ("instances" in body) == ("inputs" in body):
        raise ValueError("expected either instances or inputs")
    names = list(dtypes)
    if "inputs" in body:
        columns = body["inputs"]
        if not isinstance(columns, dict):
            columns = _single(names, columns)
    else:
        rows = body["instances"]
        if not isinstance(rows, list):
            raise ValueError("expected a list of instances")
        if rows and isinstance(rows[0], dict) and "b64" not in rows[0]:
            if any(not isinstance(row, dict) or row.keys() != rows[0].keys() for row in rows):
                raise ValueError("expected the same names in every instance")
            columns = {name: [row[name] for row in rows] for name in rows[0]}
        else:
            columns = _single(names, rows)
    if columns.keys() != dtypes.keys():
        raise ValueError(f"inputs {sorted(columns)}; expected {sorted(names)}")
    return {name: _array(values, dtypes[name]) for name, values in columns.items()}


def rest_response(outputs: dict[str, np.ndarray], row_form: bool) -> dict:
    """Returns the body of an answer; a single output has no name."""
    columns = {name: values.tolist() for name, values in outputs.items()}
    if len(columns) == 1:
        (values,) = columns.values()
    elif row_form:
        values = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    else:
        values = columns
    return {"predictions" if row_form else "outputs": values}


def _single(names, values):
    if len(names) != 1:
        raise ValueError(f"one unnamed input; expected {sorted(names)}")
    return {names[0]: values}


def _array(values, dtype):
    if dtype.kind == "O":  # strings, or bytes as {"b64": ...}
        decoded = [base64.b64decode(v["b64"]) if isinstance(v, dict) else v for v in values]
        return np.array(decoded, dtype=object)
    array = np.array(values)  # a ragged list raises ValueError
    if array.dtype.kind not in "iuf" or (dtype.kind in "iu" and array.dtype.kind == "f"):
        raise ValueError(f"values of {array.dtype}; expected {dtype}")
    return array.astype(dtype)
