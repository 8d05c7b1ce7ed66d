"""Warm-up requests, which TensorFlow Serving runs before it answers clients."""

import os

import numpy as np

from keras_resnest.images import encode_image


def write_warmup_requests(path: str | os.PathLike, image_shape) -> None:
    """Writes the file `tf_serving_warmup_requests`, with one image for each signature.

    They allocate memory, choose kernels and pack weights, which would delay the first client.
    """
    import tensorflow as tf

    image = np.full((1, *image_shape), 128, "uint8")
    jpeg = encode_image(image[0].squeeze(), "JPEG")
    requests = {
        "serving_default": {"images": image.astype("float32")},
        "serve_uint8": {"images": image},
        "serve_bytes": {"image_bytes": np.array([jpeg], object)},
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
