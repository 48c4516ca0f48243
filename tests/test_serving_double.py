"""Tests clients with the official stubs against a test double, which is not TensorFlow Serving.

If AVB_TF_SERVING_URL=host:port (gRPC), AVB_TF_SERVING_MODEL and AVB_TF_SERVING_EXPORT are set, one
test sends requests to a real server.
"""

import json
import os
from pathlib import Path

import grpc
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

import avb_tf
from avb_tf.errors import UserError
from avb_tf.serving.protos import TensorProto, from_tensor, to_tensor
from avb_tf.serving.saved_model import SavedModel
from tests import serving_double

X = np.random.default_rng(0).integers(0, 2, [5, 6]).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras.utils.set_random_seed(0)
    built = avb_tf.build("vae", (6,), latent_dim=2, width=8, depth=1)
    return SavedModel(built.export(tmp_path_factory.mktemp("export"), importance_samples=32))


@pytest.fixture(scope="module")
def stub(model):
    with serving_double.Server("avb", model) as address, grpc.insecure_channel(address) as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


def predict(signature, name="avb", **inputs):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, values in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(values))  # the official way
    return request


def test_a_grpc_answer_equals_the_models(model, stub):
    answer = stub.Predict(predict("encode_seeded", x=X, seed=np.arange(5)))
    expected = model.run("encode_seeded", {"x": X, "seed": np.arange(5)})
    assert set(answer.outputs) == {"mean", "z"}
    for name, values in expected.items():
        np.testing.assert_array_equal(tf.make_ndarray(answer.outputs[name]), values)


@pytest.mark.parametrize("array", [X, X[:1, :1], np.arange(3), np.zeros([0, 6], np.float32)])
def test_tensors_equal_those_of_the_official_functions(array):
    np.testing.assert_array_equal(from_tensor(tf.make_tensor_proto(array)), array)
    np.testing.assert_array_equal(tf.make_ndarray(to_tensor(array)), array)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"dtype": 9}, (0, 2**60), "too big"),
        ({"dtype": 9}, (0, 2**63 - 1), "a tensor of shape"),
        ({"dtype": 1, "float_val": [1.0]}, (1,) * 70, "a tensor of shape"),
        ({"dtype": 4, "int_val": [300]}, (1,), "larger value"),
        ({"dtype": 4, "int_val": [-5]}, (1,), "larger value"),
        ({"dtype": 1, "float_val": [1.0]}, (-1, -1), "expected 1"),
    ],
)
def test_a_tensor_that_is_no_array_is_refused(fields, shape, message):
    tensor = TensorProto(**fields)
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    with pytest.raises(UserError, match=message):
        from_tensor(tensor)


def with_shape(*sizes, content=b"\0\0\0\0"):
    request = predict("encode", x=X)
    tensor = request.inputs["x"]
    tensor.Clear()
    tensor.dtype, tensor.tensor_content = 1, content
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    return request


MALFORMED = {
    "negative batch": (with_shape(-1, 6), "INVALID_ARGUMENT"),
    "huge batch": (with_shape(2**62, 6), "INVALID_ARGUMENT"),
    "nothing by a huge number": (with_shape(0, 2**60, content=b""), "INVALID_ARGUMENT"),
    "half a number": (with_shape(1, content=b"\0\0"), "INVALID_ARGUMENT"),
    "strings": (predict("encode", x=["a"]), "INVALID_ARGUMENT"),
    "NaN": (predict("encode", x=np.full_like(X, np.nan)), "INVALID_ARGUMENT"),
    "signature": (predict("train", x=X), "INVALID_ARGUMENT"),
    "missing": (predict("encode"), "INVALID_ARGUMENT"),
    "model": (predict("encode", name="other", x=X), "NOT_FOUND"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_gets_a_status(case, stub):
    request, expected = MALFORMED[case]
    with pytest.raises(grpc.RpcError) as error:
        stub.Predict(request)
    assert error.value.code().name == expected
    assert len(stub.Predict(predict("encode", x=X)).outputs["z"].tensor_content) == 5 * 2 * 4


# The REST documentation's own examples: rows and columns of the same three inputs.
ROWS = """{"instances": [
    {"tag": "foo", "signal": [1, 2, 3, 4, 5], "sensor": [[1, 2], [3, 4]]},
    {"tag": "bar", "signal": [3, 4, 1, 2, 5], "sensor": [[4, 5], [6, 8]]}]}"""
COLUMNS = """{"inputs": {
    "tag": ["foo", "bar"],
    "signal": [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]],
    "sensor": [[[1, 2], [3, 4]], [[4, 5], [6, 8]]]}}"""


@pytest.mark.parametrize("body", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_the_documented_request_of_three_inputs(body):
    dtypes = {"tag": np.dtype(object), "signal": np.dtype("i8"), "sensor": np.dtype("f4")}
    inputs = serving_double.rest_request(json.loads(body), dtypes)
    assert inputs["tag"].tolist() == ["foo", "bar"]
    assert inputs["signal"].tolist() == [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]]
    assert inputs["sensor"].tolist() == [[[1, 2], [3, 4]], [[4, 5], [6, 8]]]


def test_the_documented_requests_of_one_input():
    text = serving_double.rest_request(
        {"instances": ["foo", "bar", "baz"]}, {"a": np.dtype(object)}
    )
    assert text["a"].tolist() == ["foo", "bar", "baz"]
    pair = serving_double.rest_request({"instances": [[[1, 2]], [[3, 4]]]}, {"a": np.dtype("f4")})
    assert pair["a"].shape == (2, 1, 2)
    binary = {"instances": [{"b64": "aW1hZ2UgYnl0ZXM="}]}
    assert serving_double.rest_request(binary, {"a": np.dtype(object)})["a"][0] == b"image bytes"


def test_the_documented_answer_of_one_output():
    answer = {"y": np.array([3.5, 4.0, 5.5], np.float32)}
    assert serving_double.rest_response(answer, True) == {"predictions": [3.5, 4.0, 5.5]}


@pytest.mark.parametrize("form", ["instances", "inputs"])
def test_both_rest_forms_of_a_request_with_a_seed(form, model):
    columns = {"x": X.tolist(), "seed": list(range(5))}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    body = json.dumps({form: rows if form == "instances" else columns})
    dtypes = {k: t.dtype for k, t in model.signatures["encode_seeded"].inputs.items()}
    inputs = serving_double.rest_request(json.loads(body), dtypes)
    answer = model.run("encode_seeded", inputs)
    answers = json.loads(json.dumps(serving_double.rest_response(answer, form == "instances")))
    if form == "instances":
        answers = {name: [row[name] for row in answers["predictions"]] for name in answer}
    else:
        answers = answers["outputs"]
    for name, values in answer.items():
        np.testing.assert_allclose(answers[name], values, rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"instances": [], "inputs": []}, {"instances": 1.0}, {"instances": [[1], [1, 2]]},
        {"instances": ["a"]}, {"instances": [{"y": 1}]}, {"inputs": {"x": [1], "y": [2]}},
    ],
)  # fmt: skip
def test_a_malformed_body_is_refused(body):
    with pytest.raises(ValueError):
        serving_double.rest_request(body, {"x": np.dtype("f4")})


@pytest.mark.skipif("AVB_TF_SERVING_URL" not in os.environ, reason="no TensorFlow Serving given")
def test_a_real_server_answers_like_the_c_library():
    export = Path(os.environ["AVB_TF_SERVING_EXPORT"])  # the version that it serves
    served = SavedModel(export)
    with grpc.insecure_channel(os.environ["AVB_TF_SERVING_URL"]) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        name = os.environ.get("AVB_TF_SERVING_MODEL", "avb")
        shape = served.signatures["serving_default"].inputs["x"].shape[1:]
        x = np.random.default_rng(0).integers(0, 2, [5, *shape]).astype(np.float32)
        for signature, inputs in {
            "serving_default": {"x": x},
            "encode_seeded": {"x": x, "seed": np.arange(5)},
            "elbo": {"x": x},
        }.items():
            answer = stub.Predict(predict(signature, name=name, **inputs))
            for output, values in served.run(signature, inputs).items():
                by_grpc = tf.make_ndarray(answer.outputs[output])
                np.testing.assert_allclose(by_grpc, values, rtol=1e-5, atol=1e-5)
