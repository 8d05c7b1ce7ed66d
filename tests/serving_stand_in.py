"""REST and gRPC interfaces of model servers on this machine, answered by exported models."""

import base64
import concurrent.futures
import contextlib
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2


class RequestError(Exception):
    """The server refuses a request."""


class ServingStandIn:
    """Answers the requests that TensorFlow Serving answers, in its formats."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.loaded = tf.saved_model.load(str(folder))

    def rest(self, path: str, body: bytes | None) -> bytes:
        """Answers a GET (without body) or a POST."""
        if path == f"/v1/models/{self.name}/metadata" and body is None:
            return json.dumps(self.metadata()).encode()
        if path == f"/v1/models/{self.name}:predict" and body is not None:
            request = json.loads(body)
            instances = [{k: from_json(v) for k, v in i.items()} for i in request["instances"]]
            columns = {name: [row[name] for row in instances] for name in instances[0]}
            outputs = self.run(request.get("signature_name", "serving_default"), columns)
            rows = zip(*(value.numpy().tolist() for value in outputs.values()), strict=True)
            predictions = [dict(zip(outputs, row, strict=True)) for row in rows]
            return json.dumps({"predictions": predictions}).encode()
        raise RequestError(f'{{"error": "Malformed request: {path}"}}')

    def grpc(self, request: bytes) -> bytes:
        """Answers a serialized PredictRequest with a serialized PredictResponse."""
        from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

        message, response = PredictRequest.FromString(request), PredictResponse()
        inputs = {name: tf.make_ndarray(value) for name, value in message.inputs.items()}
        outputs = self.run(message.model_spec.signature_name, inputs)
        response.model_spec.CopyFrom(message.model_spec)
        for name, value in outputs.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response.SerializeToString()

    def run(self, signature: str, inputs: dict) -> dict:
        if signature not in self.loaded.signatures:
            raise RequestError(f'{{"error": "Serving signature name not found: {signature}"}}')
        function = self.loaded.signatures[signature]
        specs = function.structured_input_signature[1]
        return function(**{k: tf.constant(v, specs[k].dtype) for k, v in inputs.items()})

    def metadata(self) -> dict:
        proto = saved_model_pb2.SavedModel.FromString((self.folder / "saved_model.pb").read_bytes())
        signatures = {
            name: json_format.MessageToDict(signature, preserving_proto_field_name=True)
            for name, signature in proto.meta_graphs[0].signature_def.items()
        }
        return {"metadata": {"signature_def": {"signature_def": signatures}}}


class KServeStandIn:
    """Answers requests of KServe's protocol v2 in JSON, as its specification has them."""

    def __init__(self, path: Path, name: str):
        import openvino

        self.name = name
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        self.network = openvino.Core().compile_model(path, "CPU", options)

    def rest(self, path: str, body: bytes | None) -> bytes:
        """Answers a GET (without body) or a POST."""
        if path == f"/v2/models/{self.name}" and body is None:
            sides = [
                d.get_length() if d.is_static else -1 for d in self.network.input(0).partial_shape
            ]
            inputs = [{"name": "images", "datatype": "FP32", "shape": sides}]
            return json.dumps(
                {"name": self.name, "platform": "openvino", "inputs": inputs}
            ).encode()
        if path == f"/v2/models/{self.name}/infer" and body is not None:
            request = json.loads(body)
            (images,) = request["inputs"]
            if (images["name"], images["datatype"]) != ("images", "FP32"):
                raise RequestError('{"error": "unexpected input"}')
            array = np.array(images["data"], "float32").reshape(images["shape"])
            found = self.network(array)
            outputs = [self.tensor(o["name"], found[o["name"]]) for o in request["outputs"]]
            return json.dumps({"model_name": self.name, "outputs": outputs}).encode()
        raise RequestError(f'{{"error": "unknown: {path}"}}')

    def tensor(self, name: str, array) -> dict:
        datatype = {"float32": "FP32", "int32": "INT32"}[array.dtype.name]
        shape, data = list(array.shape), array.ravel().tolist()
        return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def from_json(value):
    is_bytes = isinstance(value, dict) and set(value) == {"b64"}
    return base64.b64decode(value["b64"]) if is_bytes else value


@contextlib.contextmanager
def rest_server(stand_in: ServingStandIn):
    """Yields the URL of a web server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body):
            try:
                status, text = 200, stand_in.rest(self.path, body)
            except RequestError as error:
                status, text = 400, str(error).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            self.answer(self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def grpc_server(stand_in: ServingStandIn):
    """Yields the address of a gRPC server."""
    import grpc

    method = grpc.unary_unary_rpc_method_handler(lambda request, context: stand_in.grpc(request))
    service = grpc.method_handlers_generic_handler(
        "tensorflow.serving.PredictionService", {"Predict": method}
    )
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)
