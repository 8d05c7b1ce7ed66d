"""Warm-up requests, which TensorFlow Serving runs before it answers clients."""

import io
import os

import numpy as np


def write_warmup_requests(path: str | os.PathLike, image_shape) -> None:
    """Writes `tf_serving_warmup_requests`: one image for each signature.

    They allocate memory, choose kernels and pack weights, which would delay the first client.

    Args:
        path: file to write, in the folder `assets.extra` of a SavedModel.
        image_shape: (height, width, 3) of the model's images.
    """
    import tensorflow as tf

    image = np.full((1, *image_shape), 128, "uint8")
    requests = {
        "serving_default": {"images": image.astype("float32")},
        "serve_uint8": {"images": image},
        "serve_bytes": {"image_bytes": np.array([_encode_jpeg(image[0])], object)},
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
    log = prediction_log_pb2.PredictLog(request=request)
    return prediction_log_pb2.PredictionLog(predict_log=log)


def _encode_jpeg(image) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, "JPEG")
    return stream.getvalue()
