"""Asks TensorFlow Serving for the objects in images, over REST or gRPC.

First export a detector, `model.export("serving/detector/1")`, and start a server on it,
for instance with docker:

    docker run -p 8501:8501 -p 8500:8500 -e MODEL_NAME=detector \\
        -v $PWD/serving/detector:/models/detector tensorflow/serving

    python examples/serve_client.py photos/ --url http://localhost:8501 --name detector
    python examples/serve_client.py photos/ --url http://localhost:8501 --grpc localhost:8500

Without a server the same requests can be tried on the exported folder itself. They are
encoded, decoded as the server does it, run, and answered in the server's formats:

    python examples/serve_client.py cat.jpg --saved-model serving/detector/1 --output found
    python examples/serve_client.py cat.jpg --saved-model serving/detector/1 --protocol grpc

Signatures:
  serve_bytes      JPEG and PNG files as they are; boxes come in pixels of each image.
                   Other files, and photographs that EXIF turns, are sent as upright PNG.
  serving_default  images of the model's size, float32. The client resizes them. As JSON
                   one takes megabytes, so this is for gRPC and for tests.

REST is a POST to URL/v1/models/NAME:predict of
  {"signature_name": "serve_bytes", "instances": [{"image_bytes": {"b64": "..."}}, ...]}
answered by
  {"predictions": [{"boxes": [[...], ...], "confidence": [...], "labels": [...],
                    "num_detections": 3, "readable": true}, ...]}
gRPC calls tensorflow.serving.PredictionService/Predict with a PredictRequest: model_spec and
a map of names to TensorProto, of the package tensorflow-serving-api.

Exit status: 0 if at least one image worked, 1 if none did or the server failed, 2 if the
command is wrong.
"""

import argparse
import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import predict  # the neighbor: reading, drawing and reporting are the same

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

OUTPUTS = ("boxes", "confidence", "labels")
GRPC_METHOD = "/tensorflow.serving.PredictionService/Predict"
TIMEOUT = 60  # seconds
MAX_MESSAGE = 256 * 2**20  # bytes; gRPC's own limit of 4 MiB is less than a few photographs


class ServingError(Exception):
    """The server cannot be reached, or refuses a request."""


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        paths = predict.collect_images(arguments.images)
        client = make_client(arguments)
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        succeeded = run(arguments, client, paths)
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not succeeded:
        print(f"error: none of the {len(paths)} images could be read", file=sys.stderr)
    return 0 if succeeded else 1


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    predict.add_image_arguments(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--saved-model", type=Path, metavar="DIR", help="no server: this folder")
    where.add_argument("--url", help="REST address of the server, http://host:8501")
    parser.add_argument("--name", default="detector", help="of the model; default: %(default)s")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="predict over gRPC, not REST")
    parser.add_argument("--protocol", choices=("rest", "grpc"), help="with --saved-model")
    parser.add_argument(
        "--signature", choices=("serve_bytes", "serving_default"), default="serve_bytes"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="draw the images there")
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE", help="one name per line, with --url"
    )
    parser.add_argument(
        "--box-format", default="xyxy", help="bounding_box_format of the model, with --url"
    )
    arguments = parser.parse_args(argv)
    if arguments.url and arguments.protocol == "grpc" and not arguments.grpc:
        parser.error("--protocol grpc needs --grpc HOST:PORT")
    if arguments.saved_model and arguments.grpc:
        parser.error("--saved-model takes --protocol grpc; --grpc is the address of a server")
    return arguments


def run(arguments, client, paths: list[Path]) -> int:
    """Asks for all images, a batch at a time; how many worked."""
    writer = predict.ImageWriter(arguments.output, paths) if arguments.output else None
    succeeded = 0
    for first in range(0, len(paths), arguments.batch_size):
        batch = paths[first : first + arguments.batch_size]
        readable, images = predict.read_images(batch)
        found = client.detect(readable, images) if images else []
        for path, image, answer in zip(readable, images, found, strict=True):
            detections = predict.select(answer, arguments.confidence, client.class_names)
            record = predict.make_record(path, image, detections)
            predict.report(record, writer and writer.write(path, image, record))
            for d in record["detections"]:
                x1, y1, x2, y2 = d["box"]
                print(
                    f"  {d['class_name']:20s} {d['confidence']:.2f}"
                    f"  x {x1:.1f} to {x2:.1f}, y {y1:.1f} to {y2:.1f}"
                )
        succeeded += len(readable)
    return succeeded


# === The client ===


def make_client(arguments) -> "Client":
    if arguments.saved_model:
        if not (arguments.saved_model / "saved_model.pb").exists():
            raise ValueError(f"no SavedModel in {arguments.saved_model}")
        server = LocalServer(arguments.saved_model, arguments.name)
        rest, grpc = server.rest, server.grpc
        box_format, class_names = predict.read_extra_assets(arguments.saved_model)
    else:
        rest, grpc = HttpChannel(arguments.url), None
        if arguments.grpc:
            grpc = grpc_channel(arguments.grpc)
        box_format, class_names = arguments.box_format, None
        if arguments.class_names:
            class_names = arguments.class_names.read_text("utf-8").splitlines()
    use_grpc = bool(arguments.grpc) or arguments.protocol == "grpc"
    return Client(
        rest,
        grpc if use_grpc else None,
        arguments.name,
        arguments.signature,
        box_format,
        class_names,
    )


class Client:
    """Sends images and understands the answers.

    Args:
        rest: function `(path, body or None) -> body` of bytes, to the REST interface.
        grpc: function `request -> response` of bytes, to PredictionService/Predict, or None
            to predict over REST.
        name: name of the model at the server.
        signature: `"serve_bytes"` or `"serving_default"`.
        box_format: `bounding_box_format` of the model.
        class_names: names of the classes, if known.
    """

    def __init__(self, rest, grpc, name, signature, box_format="xyxy", class_names=None):
        self.rest, self.grpc = rest, grpc
        self.name, self.signature = name, signature
        self.box_format, self.class_names = box_format, class_names
        self._image_size = None

    def detect(self, paths: list[Path], pictures: list[np.ndarray]) -> list[dict]:
        """Detections of each image with "xyxy" boxes in its own pixels; padding is left in."""
        if self.signature == "serve_bytes":
            column = [encoded_image(*both) for both in zip(paths, pictures, strict=True)]
            answers = self.predict({"image_bytes": column})
            sizes = [image.shape[:2] for image in pictures]
        else:
            from keras_resnest.images import resize_image

            size = self.image_size()
            answers = self.predict({"images": [resize_image(p, *size) for p in pictures]})
            sizes = [size] * len(pictures)
        for answer, image, size in zip(answers, pictures, sizes, strict=True):
            boxes = predict.to_corners(answer["boxes"], self.box_format, *size)
            answer["boxes"] = predict.stretch(boxes, image, *size)
        return answers

    def predict(self, inputs: dict) -> list[dict]:
        """One batch through the server: columns in, a dictionary of arrays per image out."""
        if self.grpc:
            return read_grpc_response(self.grpc(grpc_request(self.name, self.signature, inputs)))
        path = f"/v1/models/{self.name}:predict"
        return read_rest_response(self.rest(path, rest_request(self.signature, inputs)))

    def image_size(self) -> tuple[int, int]:
        """Height and width that `serving_default` wants, from the metadata of the model."""
        if self._image_size is None:
            answer = json.loads(self.rest(f"/v1/models/{self.name}/metadata", None))
            signatures = answer["metadata"]["signature_def"]["signature_def"]
            shape = signatures["serving_default"]["inputs"]["images"]["tensor_shape"]["dim"]
            self._image_size = (int(shape[1]["size"]), int(shape[2]["size"]))
        return self._image_size


def encoded_image(path: Path, image: np.ndarray) -> bytes:
    """The file as it is where TensorFlow sees the same pixels in it, else an upright PNG."""
    from PIL import Image

    from keras_resnest.images import read_image_info

    info = read_image_info(path)
    if info.plain and info.orientation == 1:
        return path.read_bytes()
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


# === REST ===


def rest_request(signature: str, inputs: dict) -> bytes:
    """JSON body in the row format: one dictionary per image."""
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
    instances = [{name: _to_json(value) for name, value in row.items()} for row in rows]
    return json.dumps({"signature_name": signature, "instances": instances}).encode()


def _to_json(value):
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return value.tolist()


def read_rest_response(body: bytes) -> list[dict]:
    try:
        predictions = json.loads(body)["predictions"]
        return [{name: np.array(p[name]) for name in OUTPUTS} for p in predictions]
    except (ValueError, KeyError, TypeError) as error:
        raise ServingError(f"the answer is not that of a detector: {body[:200]!r}") from error


class HttpChannel:
    """Calls the REST interface at a URL."""

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url must begin with http:// or https://. Received: {url}")
        self.url = url.rstrip("/")

    def __call__(self, path: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ServingError(f"{self.url}{path} answers {error.code}: {text[:500]}") from error
        except OSError as error:
            raise ServingError(f"{self.url} cannot be reached: {error}") from error


# === gRPC ===


def grpc_request(name: str, signature: str, inputs: dict) -> bytes:
    """A serialized PredictRequest."""
    import tensorflow as tf
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    request = PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, column in inputs.items():
        values = column if isinstance(column[0], bytes) else np.stack(column).astype("float32")
        request.inputs[key].CopyFrom(tf.make_tensor_proto(values))
    return request.SerializeToString()


def read_grpc_response(response: bytes) -> list[dict]:
    import tensorflow as tf
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    outputs = PredictResponse.FromString(response).outputs
    if not set(OUTPUTS) <= set(outputs):
        raise ServingError(f"the answer is not that of a detector: it holds {sorted(outputs)}")
    columns = {name: tf.make_ndarray(outputs[name]) for name in OUTPUTS}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def grpc_channel(address: str):
    """A function that sends a serialized PredictRequest to a server."""
    import grpc

    options = [(f"grpc.max_{way}_message_length", MAX_MESSAGE) for way in ("send", "receive")]
    call = grpc.insecure_channel(address, options=options).unary_unary(GRPC_METHOD)

    def send(request: bytes) -> bytes:
        try:
            return call(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise ServingError(f"{address}: {error.code().name}, {error.details()}") from error

    return send


# === A stand-in for the server ===


class LocalServer:
    """Answers requests to a SavedModel in this process, in the formats of TensorFlow Serving."""

    def __init__(self, folder: Path, name: str):
        import tensorflow as tf

        self.folder, self.name = folder, name
        self.loaded = tf.saved_model.load(str(folder))

    def rest(self, path: str, body: bytes | None) -> bytes:
        """Answers a GET (without body) or POST; refuses as the server does."""
        if path == f"/v1/models/{self.name}/metadata" and body is None:
            return json.dumps(self.metadata()).encode()
        if path == f"/v1/models/{self.name}:predict" and body is not None:
            request = json.loads(body)
            signature = request.get("signature_name", "serving_default")
            outputs = self.run(signature, _columns(request["instances"]))
            rows = zip(*(value.numpy().tolist() for value in outputs.values()), strict=True)
            predictions = [dict(zip(outputs, row, strict=True)) for row in rows]
            return json.dumps({"predictions": predictions}).encode()
        raise ServingError(f'{{"error": "Malformed request: {path}"}}')

    def grpc(self, request: bytes) -> bytes:
        """Answers a serialized PredictRequest with a serialized PredictResponse."""
        import tensorflow as tf
        from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

        message, response = PredictRequest.FromString(request), PredictResponse()
        inputs = {name: tf.make_ndarray(value) for name, value in message.inputs.items()}
        outputs = self.run(message.model_spec.signature_name, inputs)
        response.model_spec.CopyFrom(message.model_spec)
        for name, value in outputs.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response.SerializeToString()

    def run(self, signature: str, inputs: dict) -> dict:
        import tensorflow as tf

        if signature not in self.loaded.signatures:
            raise ServingError(f'{{"error": "Serving signature name not found: {signature}"}}')
        function = self.loaded.signatures[signature]
        specs = function.structured_input_signature[1]
        try:
            return function(**{k: tf.constant(v, specs[k].dtype) for k, v in inputs.items()})
        except (KeyError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise ServingError(json.dumps({"error": str(error)})) from error

    def metadata(self) -> dict:
        """What the server tells about the signatures."""
        from google.protobuf import json_format
        from tensorflow.core.protobuf import saved_model_pb2

        proto = saved_model_pb2.SavedModel.FromString((self.folder / "saved_model.pb").read_bytes())
        signatures = {
            name: json_format.MessageToDict(signature, preserving_proto_field_name=True)
            for name, signature in proto.meta_graphs[0].signature_def.items()
        }
        return {
            "model_spec": {"name": self.name},
            "metadata": {"signature_def": {"signature_def": signatures}},
        }


def _columns(instances: list[dict]) -> dict:
    """Rows of JSON to a list of values per input."""
    rows = [{name: _from_json(value) for name, value in row.items()} for row in instances]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _from_json(value):
    if isinstance(value, dict) and set(value) == {"b64"}:
        return base64.b64decode(value["b64"])
    return value


if __name__ == "__main__":
    sys.exit(main())
