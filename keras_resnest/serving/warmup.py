"""Requests that TensorFlow Serving plays to itself before it answers the first client."""

import io
import os

import numpy as np


def write_warmup_requests(path: str | os.PathLike, image_shape) -> None:
    """Writes a file `tf_serving_warmup_requests`: each signature with one image.

    Without it the first requests wait for memory, kernels and packed weights.

    Args:
        path: file to write, in `assets.extra` of a SavedModel.
        image_shape: (height, width, 3) of the model's images.
    """
    import tensorflow as tf

    image = np.full((1, *image_shape), 128)
    requests = {
        "serving_default": {"images": image.astype("float32")},
        "serve_uint8": {"images": image.astype("uint8")},
        "serve_bytes": {"image_bytes": np.array([_jpeg(image[0])], object)},
    }
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for signature, inputs in requests.items():
            writer.write(_prediction_log(signature, inputs).SerializeToString())


def _prediction_log(signature: str, inputs: dict):
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return prediction_log_pb2.PredictionLog(
        predict_log=prediction_log_pb2.PredictLog(request=request)
    )


def _jpeg(image) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image.astype("uint8").squeeze()).save(stream, "JPEG")
    return stream.getvalue()
