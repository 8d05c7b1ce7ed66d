"""The detectors of `keras-resnest predict`: a Keras model, a SavedModel, a server.

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
from keras_resnest.cli.common import Failure, load_keras_file
from keras_resnest.images import read_image_info

SIGNATURES = ("serve_bytes", "serving_default")
OUTPUTS = ("boxes", "confidence", "labels")
GRPC_METHOD = "/tensorflow.serving.PredictionService/Predict"
TIMEOUT = 60  # seconds
MAX_MESSAGE = 256 * 2**20  # bytes; the default of gRPC, 4 MiB, is less than a few photographs


def load_detector(arguments):
    """The detector for a .keras file, the folder of a SavedModel or the URL of a server."""
    if "://" in arguments.model:
        server = RestServer(arguments.model, arguments.name or "detector")
        if arguments.grpc:
            server = GrpcServer(arguments.grpc, server)
        names = arguments.class_names and arguments.class_names.read_text("utf-8").splitlines()
        signature, box_format = arguments.signature or "serve_bytes", arguments.box_format or "xyxy"
        return ServedDetector(server, signature, box_format, names)
    if not Path(arguments.model).is_dir():
        if arguments.signature:
            raise ValueError("--signature is for SavedModels and servers")
        return KerasDetector(arguments.model)
    try:
        model = SavedModel(Path(arguments.model))
        facts = read_extra_assets(Path(arguments.model))
    except Exception as error:  # every kind of damage raises its own type
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{arguments.model} is not a usable model. {reason}") from error
    # By default pixels, because TensorFlow ignores EXIF orientation.
    return ServedDetector(model, arguments.signature or "serving_default", *facts)


def read_extra_assets(folder: Path) -> tuple[str, list[str] | None]:
    """Box format and class names, which an export keeps beside the model."""
    facts, names = folder / "assets.extra/model.json", folder / "assets.extra/class_names.txt"
    box_format = json.loads(facts.read_text("utf-8"))["bounding_box_format"]
    return box_format, names.read_text("utf-8").splitlines() if names.exists() else None


class KerasDetector:
    """A detector from a .keras file."""

    def __init__(self, path: str):
        self.model = load_keras_file(path)
        if not isinstance(self.model, kr.RefineDet):
            raise ValueError(
                f"{path} is not a usable model. "
                f"It holds a {type(self.model).__name__}, not a RefineDet"
            )

    def __call__(self, paths, images, confidence: float) -> list[dict]:
        found = self.model.detect(images, confidence, batch_size=len(images))
        for image, detections in zip(images, found, strict=True):
            box_format = self.model.bounding_box_format
            detections["boxes"] = to_xyxy(detections["boxes"], box_format, *image.shape[:2])
        return found


class ServedDetector:
    """A detector behind a signature.

    Args:
        model: `SavedModel`, `RestServer` or `GrpcServer`.
        signature: `"serve_bytes"` or `"serving_default"`.
        box_format: `bounding_box_format` of the model.
        class_names: names of the classes, if known.
    """

    def __init__(self, model, signature: str, box_format="xyxy", class_names=None):
        self.model, self.signature = model, signature
        self.box_format, self.class_names = box_format, class_names

    def __call__(self, paths, images, confidence: float) -> list[dict]:
        if self.signature == "serve_bytes":
            sizes = [image.shape[:2] for image in images]
            inputs = {"image_bytes": list(map(encode_image, paths, images))}
        else:
            sizes = [self.model.image_size()] * len(images)
            inputs = {"images": list(map(resize, images, sizes))}
        answers = self.model.predict(self.signature, inputs)
        found = []
        for answer, image, (height, width) in zip(answers, images, sizes, strict=True):
            detections = select(answer, confidence, self.class_names)
            boxes = to_xyxy(detections["boxes"], self.box_format, height, width)
            scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
            found.append({**detections, "boxes": boxes * scale})
        return found


def to_xyxy(boxes, box_format: str, height: int, width: int) -> np.ndarray:
    return np.array(convert_boxes(boxes, box_format, "xyxy", height, width))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return kr.data.resize_image(image, *size)


def select(answer: dict, confidence: float, class_names: list[str] | None) -> dict:
    """The detections of one image without padding and doubtful ones, with class names."""
    keep = (answer["labels"] >= 0) & (answer["confidence"] >= confidence)
    chosen = {name: answer[name][keep] for name in OUTPUTS}
    names = [class_names[label] if class_names else str(label) for label in chosen["labels"]]
    return {**chosen, "class_names": names}


def encode_image(path: Path, image: np.ndarray) -> bytes:
    """The file itself if TensorFlow decodes the same pixels from it, else an upright PNG."""
    from PIL import Image

    info = read_image_info(path)
    if info.plain and info.orientation == 1:
        return path.read_bytes()
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def split_rows(columns: dict) -> list[dict]:
    """One dictionary per image from arrays with images as first axis."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def as_batch(column: list):
    """Encoded images as they are, because numpy would cut their trailing zeros; arrays stacked."""
    return column if isinstance(column[0], bytes) else np.stack(column).astype("float32")


class SavedModel:
    """A SavedModel in this process."""

    def __init__(self, folder: Path):
        import tensorflow as tf

        self.loaded = tf.saved_model.load(str(folder))
        signature = self.loaded.signatures["serving_default"]
        inputs = signature.structured_input_signature[1]
        if set(inputs) != {"images"} or not set(OUTPUTS) <= set(signature.structured_outputs):
            raise ValueError("Its serving_default is not that of a detector of keras_resnest")
        self.input_shape = inputs["images"].shape

    def image_size(self) -> tuple[int, int]:
        return tuple(self.input_shape[1:3])

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        import tensorflow as tf

        outputs = self.loaded.signatures[signature](
            **{name: tf.constant(as_batch(column)) for name, column in inputs.items()}
        )
        return split_rows({name: outputs[name].numpy() for name in OUTPUTS})


# === TensorFlow Serving over REST ===


class RestServer:
    """A model behind the REST interface of TensorFlow Serving."""

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
        """GET, or POST of a body."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise Failure(f"{self.url}{path} answers {error.code}: {text[:500]}") from error
        except OSError as error:
            raise Failure(f"{self.url} cannot be reached: {error}") from error


def rest_request(signature: str, inputs: dict) -> bytes:
    """JSON in the row format: one dictionary per image."""

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


# === TensorFlow Serving over gRPC ===


class GrpcServer:
    """A model behind PredictionService/Predict; the size of its images comes over REST."""

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
            text = f"{self.address}: {error.code().name}, {error.details()}"
            raise Failure(text) from error


def grpc_request(name: str, signature: str, inputs: dict) -> bytes:
    """A serialized PredictRequest."""
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
