"""Detectors for `keras-resnest predict`: a Keras model, a SavedModel, a server.

Each is a function `(paths, images, confidence) -> list of detections`, one dictionary per image,
with "xyxy" boxes in pixels of the image.
"""

import base64
import http.client
import json
import multiprocessing
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.backbones.presets import is_preset
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.checks import class_thresholds
from keras_resnest.cli.common import (
    Failure,
    open_detector,
    read_class_names,
    refuse_options,
    reporting_unusable_model,
    tile_options,
)
from keras_resnest.images import encode_image, read_image_info

SIGNATURES = ("serve_bytes", "serving_default")
OUTPUTS = ("boxes", "confidence", "labels")
ANSWERED = (*OUTPUTS, "readable")  # the last by `serve_bytes` alone
GRPC_METHOD = "/tensorflow.serving.PredictionService/Predict"
TIMEOUT = 60  # seconds for a whole answer
MAX_REQUEST = 256 * 2**20  # bytes; gRPC's default of 4 MiB does not fit a few photographs
MAX_ANSWER = 32 * 2**20  # bytes
MAX_COORDINATE = 2**24  # pixels; no image is so large, and Pillow draws nothing beyond 2**31


def load_detector(arguments):
    """Returns the detector for a .keras file, a preset, a SavedModel folder or a server URL."""
    name, signature = arguments.model, arguments.signature
    is_keras = is_preset(name) or not ("://" in name or Path(name).is_dir())
    if not is_keras:
        refuse_options(arguments, ["tiles", "overlap"], "for .keras files and presets")
    if "://" in name and not is_preset(name):
        is_kserve = arguments.protocol == "kserve"
        if is_kserve and (arguments.grpc or signature == "serve_bytes"):
            raise ValueError("--protocol kserve: without --grpc and --signature serve_bytes")
        server = (KServeServer if is_kserve else RestServer)(name, arguments.name or "detector")
        if arguments.grpc:
            server = GrpcServer(arguments.grpc, server)
        signature = signature or ("serving_default" if is_kserve else "serve_bytes")
        names = arguments.class_names and read_class_names(arguments.class_names)
        box_format = arguments.box_format or "xyxy"
        return ServedDetector(server, signature, box_format, names)
    if is_keras:
        if signature:
            raise ValueError("--signature: only for SavedModels and servers")
        return keras_detector(name, arguments.batch_size, tile_options(arguments))
    with reporting_unusable_model(name):
        model, assets = SavedModel(name), Path(name, "assets.extra")
        facts = json.loads((assets / "model.json").read_text("utf-8"))
        file = assets / "class_names.txt"
        names = file.read_text("utf-8").splitlines() if file.exists() else None
    # Pixels by default, because TensorFlow ignores EXIF orientation.
    return ServedDetector(
        model, signature or "serving_default", facts["bounding_box_format"], names
    )


def keras_detector(path: str, batch_size: int, tiles: dict):
    model = open_detector(path)

    def detect(paths, images, confidence) -> list[dict]:
        found = model.detect(images, confidence, batch_size, **tiles)
        for image, detections in zip(images, found, strict=True):
            size = image.shape[:2]
            detections["boxes"] = to_xyxy(detections["boxes"], model.bounding_box_format, size)
        return found

    detect.class_names = [model.class_name(label) for label in range(model.num_classes)]
    return detect


class ServedDetector:
    """A detector behind a serving signature.

    Args:
        model: `SavedModel`, `RestServer`, `GrpcServer` or `KServeServer`.
        signature: `"serve_bytes"` or `"serving_default"`.
        box_format: `bounding_box_format` of the model.
        class_names: class names, if known.
    """

    def __init__(self, model, signature: str, box_format: str, class_names: list[str] | None):
        self.model, self.signature = model, signature
        self.box_format, self.class_names = box_format, class_names

    def __call__(self, paths, images, confidence) -> list[dict]:
        is_per_class = isinstance(confidence, dict)
        if is_per_class and not self.class_names:
            raise ValueError("--confidence with a file needs --class-names")
        if self.signature == "serve_bytes":
            sizes = [image.shape[:2] for image in images]
            inputs = {"image_bytes": list(map(file_of, paths, images))}
        else:
            size = self.model.image_size()
            sizes = [size] * len(images)
            inputs = {"images": [kr.data.resize_image(image, *size) for image in images]}
        answers = self.model.predict(self.signature, inputs)
        classes = len(self.class_names) if self.class_names else 2**31
        answers = [check_answer(answer, classes) for answer in answers]
        if len(answers) != len(images):
            raise Failure(f"the answer has {len(answers)} results for {len(images)} images")
        found, limit = [], confidence
        for answer, image, (height, width) in zip(answers, images, sizes, strict=True):
            # Rows with label -1 are padding.
            if is_per_class:
                limit = np.array(class_thresholds(confidence, self.class_names))[answer["labels"]]
            keep = (answer["labels"] >= 0) & (answer["confidence"] >= limit)
            boxes, confidences, labels = (answer[name][keep] for name in OUTPUTS)
            boxes = to_xyxy(boxes, self.box_format, (height, width))
            scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
            names = [self.class_names[i] if self.class_names else str(i) for i in labels]
            values = (boxes * scale, confidences, labels, names)
            found.append(dict(zip((*OUTPUTS, "class_names"), values, strict=True)))
        return found


def check_answer(answer: dict, classes: int) -> dict:
    """Returns the arrays of one image, whatever a server sent."""
    try:
        boxes, confidence, labels = (np.asarray(answer[name], "float64") for name in OUTPUTS)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise Failure(f"the answer is not that of a detector: {error}") from error
    if not answer.get("readable", True):
        raise Failure("the server cannot read the image")
    count = labels.shape
    boxes = boxes if boxes.size else boxes.reshape(-1, 4)  # JSON has no shape for no boxes
    if len(count) != 1 or confidence.shape != count or boxes.shape != (*count, 4):
        shapes = [list(array.shape) for array in (boxes, confidence, labels)]
        raise Failure(f"the answer is not that of a detector: shapes {shapes}")
    whole = labels == np.rint(labels)
    if not (np.isfinite(boxes).all() and np.isfinite(confidence).all() and whole.all()):
        raise Failure("the answer is not that of a detector: it has values that are no numbers")
    if (confidence > 1).any():
        raise Failure(f"the answer has a confidence of {confidence.max():g}")
    if (np.abs(boxes) > MAX_COORDINATE).any():
        raise Failure(f"the answer has a box at {boxes.flat[np.abs(boxes).argmax()]:g}")
    if (labels >= classes).any():
        raise Failure(f"the answer has label {labels.max():g}, but there are {classes} classes")
    return dict(zip(OUTPUTS, (boxes, confidence, labels.astype(int)), strict=True))


def detection_rows(detections: dict) -> list[dict]:
    """Returns the detections of one image, ready for JSON."""
    columns = (detections[name] for name in ("boxes", "labels", "class_names", "confidence"))
    return [
        {
            "box": [round(float(x), 2) for x in box],
            "label": int(label),
            "class_name": class_name,
            "confidence": round(float(confidence), 4),
        }
        for box, label, class_name, confidence in zip(*columns, strict=True)
    ]


def to_xyxy(boxes, box_format: str, size: tuple[int, int]) -> np.ndarray:
    return np.array(convert_boxes(boxes, box_format, "xyxy", *size))


def file_of(path: Path | None, image: np.ndarray) -> bytes:
    """Returns the file itself if TensorFlow decodes the same pixels, else an upright PNG."""
    info = path and read_image_info(path)  # a frame of a video has no path
    if info and info.plain and info.orientation == 1:
        return path.read_bytes()
    return encode_image(image, "PNG")


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
        return split_rows({name: outputs[name].numpy() for name in ANSWERED if name in outputs})


class RestServer:
    """A model behind TensorFlow Serving's REST interface."""

    def __init__(self, url: str, name: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the URL must begin with http:// or https://, not {url}")
        self.url, self.name = url.rstrip("/"), name

    def image_size(self) -> tuple[int, int]:
        answer = read_json(self.request(f"/v1/models/{self.name}/metadata"))
        try:
            signatures = answer["metadata"]["signature_def"]["signature_def"]
            shape = signatures["serving_default"]["inputs"]["images"]["tensor_shape"]["dim"]
            return check_size([int(dim["size"]) for dim in shape])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failure(f"{self.url} does not describe a detector: {answer!s:.200}") from error

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        body = rest_request(signature, inputs)
        return read_rest_response(self.request(f"/v1/models/{self.name}:predict", body))

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """Sends a POST request with a body, or a GET request."""
        url, headers = self.url + path, {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(url, data=body, headers=headers)
            # The timeout of a socket does not bound an answer that comes byte by byte.
            with ThreadPool(1) as pool:
                answer = pool.apply_async(_read_answer, [request]).get(TIMEOUT)
        except urllib.error.HTTPError as error:
            text = error.read(500).decode(errors="replace")
            raise Failure(f"{url} answers {error.code}: {text!r}") from error
        except multiprocessing.TimeoutError as error:
            raise Failure(f"{self.url} did not answer within {TIMEOUT} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Failure(f"{self.url} cannot be reached: {error!r}") from error
        if len(answer) > MAX_ANSWER:
            raise Failure(f"{self.url} answers with more than {MAX_ANSWER} bytes")
        return answer


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Images go to the host that was named, and to no other."""

    def redirect_request(self, *arguments):
        return None


def _read_answer(request) -> bytes:
    opener = urllib.request.build_opener(NoRedirects)
    with opener.open(request, timeout=TIMEOUT) as response:
        return response.read(MAX_ANSWER + 1)


def read_json(body: bytes):
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failure(f"the answer is not JSON: {body[:200]!r}") from error


def check_size(shape: list[int]) -> tuple[int, int]:
    """Returns the height and width of an input (batch, height, width, 3)."""
    if len(shape) != 4 or shape[3] != 3 or not all(0 < side <= 2**14 for side in shape[1:3]):
        raise ValueError(f"Images of shape {shape}")
    return shape[1], shape[2]


def rest_request(signature: str, inputs: dict) -> bytes:
    """Returns JSON in row format: one dictionary per image."""

    def to_json(value):
        is_bytes = isinstance(value, bytes)
        return {"b64": base64.b64encode(value).decode()} if is_bytes else value.tolist()

    rows = [{k: to_json(value) for k, value in row.items()} for row in split_rows(inputs)]
    return json.dumps({"signature_name": signature, "instances": rows}).encode()


def read_rest_response(body: bytes) -> list[dict]:
    try:
        rows = read_json(body)["predictions"]
        return [{name: row[name] for name in ANSWERED if name in row} for row in rows]
    except (KeyError, TypeError) as error:
        raise Failure(f"the answer is not that of a detector: {body[:200]!r}") from error


class KServeServer(RestServer):
    """A model behind KServe's protocol v2 in JSON: Triton, OpenVINO Model Server, KServe."""

    def image_size(self) -> tuple[int, int]:
        answer = read_json(self.request(f"/v2/models/{self.name}"))
        try:
            (images,) = answer["inputs"]
            return check_size([int(side) for side in images["shape"]])
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"{self.url} does not describe a detector: {answer!s:.200}") from error

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        body = kserve_request(as_batch(inputs["images"]))
        return read_kserve_response(self.request(f"/v2/models/{self.name}/infer", body))


def kserve_request(images: np.ndarray) -> bytes:
    tensor = {"name": "images", "shape": images.shape, "datatype": "FP32"}
    tensor["data"] = images.ravel().tolist()
    outputs = [{"name": name} for name in OUTPUTS]
    return json.dumps({"inputs": [tensor], "outputs": outputs}).encode()


def read_kserve_response(body: bytes) -> list[dict]:
    try:
        tensors = {tensor["name"]: tensor for tensor in read_json(body)["outputs"]}
        columns = {
            name: np.asarray(tensors[name]["data"]).reshape(tensors[name]["shape"])
            for name in OUTPUTS
        }
        return split_rows(columns)
    except (KeyError, TypeError, ValueError) as error:
        raise Failure(f"the answer is not that of a detector: {body[:200]!r}") from error


class GrpcServer:
    """A model behind TensorFlow Serving's gRPC interface; REST supplies its image size."""

    def __init__(self, address: str, rest: RestServer):
        import grpc

        self.address, self.name, self.image_size = address, rest.name, rest.image_size
        options = [("grpc.max_send_message_length", MAX_REQUEST)]
        options += [("grpc.max_receive_message_length", MAX_ANSWER)]
        self.call = grpc.insecure_channel(address, options=options).unary_unary(GRPC_METHOD)

    def predict(self, signature: str, inputs: dict) -> list[dict]:
        import grpc

        request = grpc_request(self.name, signature, inputs)
        try:
            return read_grpc_response(self.call(request, timeout=TIMEOUT))
        except grpc.RpcError as error:
            raise Failure(f"{self.address}: {error.code().name}, {error.details()!r}") from error


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
    from google.protobuf.message import DecodeError
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    try:
        outputs = PredictResponse.FromString(response).outputs
        names = [name for name in ANSWERED if name in OUTPUTS or name in outputs]
        for name in names:  # a few bytes may stand for a huge array of equal numbers
            shape = tf.TensorShape(outputs[name].tensor_shape)
            if not shape.rank or shape.num_elements() > MAX_ANSWER // 4:
                raise ValueError(f"{name} of shape {shape}, of {sorted(outputs)}")
        return split_rows({name: tf.make_ndarray(outputs[name]) for name in names})
    except (DecodeError, ValueError, TypeError) as error:
        raise Failure(f"the answer is not that of a detector: {error}") from error
