"""Export as a SavedModel that TensorFlow Serving runs, and that needs nothing but TensorFlow."""

import json
import os
import pathlib

from keras_resnest.atomic import atomic_folder
from keras_resnest.replicas import call_with_rows
from keras_resnest.serving.graph import check_backend, deployment_function, with_variables
from keras_resnest.serving.tasks import task_of
from keras_resnest.serving.warmup import write_warmup_requests

BATCHING_PARAMETERS = """\
# Of TensorFlow Serving, with --enable_batching --batching_parameters_file=THIS_FILE: requests that
# come within 2 ms are run together, at most 8 images at a time.
max_batch_size { value: 8 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 100 }
num_batch_threads { value: 2 }
"""


def export_saved_model(
    model,
    filepath: str | os.PathLike,
    precision: str = "float32",
    verbose: bool = False,
    freeze: bool = True,
    **options,
) -> None:
    """Writes a SavedModel with folded weights, for TensorFlow Serving.

    Signatures, each with any batch size:

    - `serving_default`: `images` (batch, height, width, 3) of the model's size, float32,
      RGB, 0 to 255.
    - `serve_uint8`: the same, `images` uint8.
    - `serve_bytes`: `image_bytes` (batch,), encoded JPEG, PNG, GIF (first frame), BMP or
      WebP images of any size. A detector stretches them to its size, and the boxes are
      in the pixels of each image; for a classifier the shorter side is resized and the
      middle is cut, as `center_crop_image` does. Pixels, and so results, are those of
      `detect`, transparent PNGs over white included, with two exceptions: TensorFlow has
      no op for the EXIF orientation of a photograph, and it ignores the transparency of
      GIFs. Send such images upright and as PNG.
    - `raw_outputs`: `images` as in `serving_default`; the outputs of the network itself.

    Outputs of a detector are those of `model.predict`: `"boxes"` (batch, max_detections,
    4) float32, `"confidence"` (batch, max_detections) float32, `"labels"` (batch,
    max_detections) int32, `"num_detections"` (batch,) int32. That of a classifier is
    `"predictions"` (batch, classes), of a backbone without classifier `"features"`.
    `serve_bytes` has `"readable"` (batch,), bool, beside them.

    An image that cannot be read (no image, cut, empty, larger than 178 megapixels), or
    float images with NaN or infinite values, have an empty result: no detections, or
    zeros. The other images of the batch have theirs.

    The `serve` attribute of the loaded object takes images of both types. In
    `assets.extra` lie `model.json` with what a client must know (image shape, box format,
    class names), `class_names.txt` if there are names, requests that warm the server up,
    and `batching_parameters.txt`. The folder appears at once, complete: a server that
    polls its parent never sees half a model.

    Args:
        model: a `RefineDet`, or a network of `keras_resnest.backbones`.
        filepath: folder to write; TensorFlow Serving wants a number as its last part. A
            SavedModel that is there is replaced.
        precision: `"float32"` or `"bfloat16"`, which processors with AMX or
            AVX-512-BF16, and GPUs, compute faster. Inputs and outputs stay float32.
        verbose: whether to print the signatures.
        freeze: whether weights are constants of the graph: the fastest, but TensorFlow
            copies them a dozen times while it loads. False leaves them in variables: a
            fraction of the memory, and at batch 1 on a CPU about a fifth more time, unless
            the environment variable TF_ONEDNN_ASSUME_FROZEN_WEIGHTS is 1.
        **options: of a classifier `image_shape`, (height, width, 3), where the model
            leaves them open; without it tensors of any size are taken, and encoded
            images are cut to 224. `class_names`; `crop_share`, default 0.875.

    Raises:
        ValueError: if Keras does not run on TensorFlow, or an argument is wrong.

    Example:

    >>> export_saved_model(model, "serving/1")
    >>> detect = tf.saved_model.load("serving/1").signatures["serve_bytes"]
    >>> detect(image_bytes=tf.constant([open("photo.jpg", "rb").read()]))["boxes"]
    """
    check_backend()
    import tensorflow as tf

    task = task_of(model, **options)
    module, signatures = _signatures(task, precision, freeze)
    with atomic_folder(filepath) as folder:
        tf.saved_model.save(module, str(folder), signatures=signatures)
        extra = folder / "assets.extra"
        extra.mkdir()
        write_facts(task, extra / "model.json", precision=precision)
        if task.facts()["class_names"]:
            names = "\n".join(task.facts()["class_names"]) + "\n"
            (extra / "class_names.txt").write_text(names, encoding="utf-8")
        (extra / "batching_parameters.txt").write_text(BATCHING_PARAMETERS, encoding="utf-8")
        write_warmup_requests(extra / "tf_serving_warmup_requests", task.image_shape)
    if verbose:
        for name, function in signatures.items():
            outputs = {key: tuple(x.shape) for key, x in function.structured_outputs.items()}
            print(f"{name}: {function.structured_input_signature[1]} -> {outputs}")


def write_facts(task, path: pathlib.Path, **facts) -> None:
    """Writes what a client must know and the signatures do not tell, as JSON."""
    text = json.dumps({**task.facts(), **facts}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def _signatures(task, precision: str, freeze: bool):
    """A trackable object with `serve`, and the concrete function of each signature."""
    import tensorflow as tf

    shape = (None, *task.signature_shape)
    floats, integers = (tf.TensorSpec(shape, t, name="images") for t in (tf.float32, tf.uint8))
    encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")
    # The network is in the file once; all signatures call this function.
    network, variables = deployment_function(task.network, floats, precision), []
    if not freeze:
        network, variables = with_variables(network)

    def serve(images):
        images = tf.ensure_shape(images, shape)  # sessions do not compare it
        finite = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3))
        images = tf.where(finite[:, None, None, None], images, 0.0)
        return empty_where_not(finite, task.results(never_empty(images)))

    def raw_outputs(images):
        return never_empty(tf.ensure_shape(images, shape))

    def never_empty(images):
        return call_with_rows(network, images)

    def empty_where_not(good, results):
        return {
            name: tf.where(
                tf.reshape(good, (-1,) + (1,) * (value.shape.rank - 1)),
                value,
                tf.cast(task.empty(name), value.dtype),
            )
            for name, value in results.items()
        }

    def serve_uint8(images):
        return task.results(never_empty(tf.cast(tf.ensure_shape(images, shape), tf.float32)))

    def serve_bytes(image_bytes):
        from keras_resnest.serving.image_bytes import decode_images

        images, sizes, readable = decode_images(image_bytes, task.fit_image, task.image_shape)
        results = task.in_own_pixels(task.results(never_empty(images)), sizes)
        return {**empty_where_not(readable, results), "readable": readable}

    def serve_any(images):
        return serve(images) if images.dtype == tf.float32 else serve_uint8(images)

    module = tf.Module()
    module.network_variables = variables
    module.serve = tf.function(serve_any, autograph=False)
    module.serve.get_concrete_function(integers)
    concrete = {
        "serving_default": module.serve.get_concrete_function(floats),
        "serve_uint8": tf.function(serve_uint8, autograph=False).get_concrete_function(integers),
        "serve_bytes": tf.function(serve_bytes, autograph=False).get_concrete_function(encoded),
        "raw_outputs": tf.function(raw_outputs, autograph=False).get_concrete_function(floats),
    }
    return module, concrete
