"""Detectors for `keras-resnest predict`: a Keras model, a SavedModel, a server.

Each is a function `(paths, images, confidence) -> list of detections`, one dictionary per image,
with "xyxy" boxes in pixels of the image.
"""

import base64
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.cli.common import Failure, load_keras_file, reporting_unusable_model
from keras_resnest.images import read_image_info

SIGNATURES = ("serve_bytes", "serving_default")
OUTPUTS = ("boxes", "confidence", "labels")
GRPC_METHOD = "/tensorflow.serving.PredictionService/Predict"
TIMEOUT = 60  # seconds
MAX_MESSAGE = 256 * 2**20  # bytes; gRPC's default of 4 MiB does not fit a few photographs


def load_detector(arguments):
    """Returns the detector for a .keras file, a SavedModel folder or a server URL."""
    name, signature = arguments.model, arguments.signature
    if "://" in name:
        server = RestServer(name, arguments.name or "detector")
        if arguments.grpc:
            server = GrpcServer(arguments.grpc, server)
        names = arguments.class_names and arguments.class_names.read_text("utf-8").splitlines()
        box_format = arguments.box_format or "xyxy"
        return ServedDetector(server, signature or "serve_bytes", box_format, names)
    if not Path(name).is_dir():
        if signature:
            raise ValueError("--signature: only for SavedModels and servers")
        return keras_detector(name)
    with reporting_unusable_model(name):
        model, assets = SavedModel(name), Path(name, "assets.extra")
        facts = json.loads((assets / "model.json").read_text("utf-8"))
        file = assets / "class_names.txt"
        names = file.read_text("utf-8").splitlines() if file.exists() else None
    # Pixels by default, because TensorFlow ignores EXIF orientation.
    return ServedDetector(
        model, signature or "serving_default", facts["bounding_box_format"], names
    )


def keras_detector(path: str):
    model = load_keras_file(path)
    if not isinstance(model, kr.RefineDet):
        kind = type(model).__name__
        raise ValueError(f"{path} is not a usable model. It holds a {kind}, not a RefineDet")

    def detect(paths, images, confidence: float) -> list[dict]:
        found = model.detect(images, confidence, batch_size=len(images))
        for image, detections in zip(images, found, strict=True):
            size = image.shape[:2]
            detections["boxes"] = to_xyxy(detections["boxes"], model.bounding_box_format, size)
        return found

    return detect


class ServedDetector:
    """A detector behind a serving signature.

    Args:
        model: `SavedModel`, `RestServer` or `GrpcServer`.
        signature: `"serve_bytes"` or `"serving_default"`.
        box_format: `bounding_box_format` of the model.
        class_names: class names, if known.
    """

    def __init__(self, model, signature: str, box_format: str, class_names: list[str] | None):
        self.model, self.signature = model, signature
        self.box_format, self.class_names = box_format, class_names

    def __call__(self, paths, images, confidence: float) -> list[dict]:
        if self.signature == "serve_bytes":
            sizes = [image.shape[:2] for image in images]
            inputs = {"image_bytes": list(map(encode_image, paths, images))}
        else:
            size = self.model.image_size()
            sizes = [size] * len(images)
            inputs = {"images": [kr.data.resize_image(image, *size) for image in images]}
        answers = self.model.predict(self.signature, inputs)
        found = []
        for answer, image, (height, width) in zip(answers, images, sizes, strict=True):
            # Rows with label -1 are padding.
            keep = (answer["labels"] >= 0) & (answer["confidence"] >= confidence)
            boxes, confidences, labels = (answer[name][keep] for name in OUTPUTS)
            boxes = to_xyxy(boxes, self.box_format, (height, width))
            scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
            names = [self.class_names[i] if self.class_names else str(i) for i in labels]
            values = (boxes * scale, confidences, labels, names)
            found.append(dict(zip((*OUTPUTS, "class_names"), values, strict=True)))
        return found


def to_xyxy(boxes, box_format: str, size: tuple[int, int]) -> np.ndarray:
    return np.array(convert_boxes(boxes, box_format, "xyxy", *size))


def encode_image(path: Path, image: np.ndarray) -> bytes:
    """Returns the file itself if TensorFlow decodes the same pixels, else an upright PNG."""
    from PIL import Image

    info = read_image_info(path)
    if info.plain and info.orientation == 1:
        return path.read_bytes()
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def split_rows(columns: dict) -> list[dict]:
    """Splits a batch into one dictionary per image."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def as_batch(column: list):
    """Stacks arrays; leaves bytes in a list, because numpy strips their trailing zeros."""
    return column if isinstance(column[0], bytes) else np.stack(column).astype("float32")


class SavedModel:
    """A SavedModel in this process."""

    def __init__(self, folder: str):
        import tensorflow as tf

        self.loaded = tf.saved_model.load(folder)
        signature = self.loaded.signatures["serving_default"]
        inputs = signature.structured_input_signature[1]
        if set(inputs) != {"images"} or not set(OUTPUTS) <= set(signature.structured_outputs):
            raise ValueError("Its serving_default is not that of a keras_resnest detector")
        self.input_shape = inputs["images"].shape

    def image_size(self) -> tuple[int, int]:
        return tuple(self.input_shape[1:3])

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        import tensorflow as tf

        inputs = {name: tf.constant(as_batch(column)) for name, column in inputs.items()}
        outputs = self.loaded.signatures[signature](**inputs)
        return split_rows({name: outputs[name].numpy() for name in OUTPUTS})


class RestServer:
    """A model behind TensorFlow Serving's REST interface."""

    def __init__(self, url: str, name: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the URL must begin with http:// or https://, not {url}")
        self.url, self.name = url.rstrip("/"), name

    def image_size(self) -> tuple[int, int]:
        answer = json.loads(self.request(f"/v1/models/{self.name}/metadata"))
        signatures = answer["metadata"]["signature_def"]["signature_def"]
        shape = signatures["serving_default"]["inputs"]["images"]["tensor_shape"]["dim"]
        return int(shape[1]["size"]), int(shape[2]["size"])

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        body = rest_request(signature, inputs)
        return read_rest_response(self.request(f"/v1/models/{self.name}:predict", body))

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """Sends a POST request with a body, or a GET request."""
        url, headers = self.url + path, {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise Failure(f"{url} answers {error.code}: {text[:500]}") from error
        except OSError as error:
            raise Failure(f"{self.url} cannot be reached: {error}") from error


def rest_request(signature: str, inputs: dict) -> bytes:
    """Returns JSON in row format: one dictionary per image."""

    def to_json(value):
        is_bytes = isinstance(value, bytes)
        return {"b64": base64.b64encode(value).decode()} if is_bytes else value.tolist()

    rows = [{k: to_json(value) for k, value in row.items()} for row in split_rows(inputs)]
    return json.dumps({"signature_name": signature, "instances": rows}).encode()


def read_rest_response(body: bytes) -> list[dict]:
    try:
        predictions = json.loads(body)["predictions"]
        return [{name: np.array(p[name]) for name in OUTPUTS} for p in predictions]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"the answer is not that of a detector: {body[:200]!r}") from error


class GrpcServer:
    """A model behind TensorFlow Serving's gRPC interface; REST supplies its image size."""

    def __init__(self, address: str, rest: RestServer):
        import grpc

        self.address, self.name, self.image_size = address, rest.name, rest.image_size
        options = [(f"grpc.max_{way}_message_length", MAX_MESSAGE) for way in ("send", "receive")]
        self.call = grpc.insecure_channel(address, options=options).unary_unary(GRPC_METHOD)

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        import grpc

        request = grpc_request(self.name, signature, inputs)
        try:
            return read_grpc_response(self.call(request, timeout=TIMEOUT))
        except grpc.RpcError as error:
            raise Failure(f"{self.address}: {error.code().name}, {error.details()}") from error


def grpc_request(name: str, signature: str, inputs: dict) -> bytes:
    """Returns a serialized PredictRequest."""
    import tensorflow as tf
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    request = PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, column in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(as_batch(column)))
    return request.SerializeToString()


def read_grpc_response(response: bytes) -> list[dict]:
    import tensorflow as tf
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    outputs = PredictResponse.FromString(response).outputs
    if not set(OUTPUTS) <= set(outputs):
        raise Failure(f"the answer is not that of a detector: it holds {sorted(outputs)}")
    return split_rows({name: tf.make_ndarray(outputs[name]) for name in OUTPUTS})
