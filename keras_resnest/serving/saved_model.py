"""Export as a SavedModel, for TensorFlow and TensorFlow Serving."""

import os

from keras_resnest.atomic import atomic_folder
from keras_resnest.checks import checked
from keras_resnest.replicas import call_with_rows
from keras_resnest.serving.graph import check_backend, deployment_function
from keras_resnest.serving.tasks import create_task, write_metadata
from keras_resnest.serving.warmup import write_warmup_requests

BATCHING_PARAMETERS = """\
# For TensorFlow Serving: --enable_batching --batching_parameters_file=THIS_FILE
# Runs requests that arrive within 2 ms together, at most 8 images at a time.
max_batch_size { value: 8 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 100 }
num_batch_threads { value: 2 }
"""


@checked
def export_saved_model(
    model,
    filepath: str | os.PathLike,
    precision: str = "float32",
    verbose: bool = False,
    freeze: bool = False,
    **options,
) -> None:
    """Exports a model as a SavedModel with folded weights, for TensorFlow Serving.

    Signatures, each for any batch size:

    - `serving_default`: `images` (batch, height, width, 3), float32, RGB, 0 to 255.
    - `serve_uint8`: the same as uint8.
    - `serve_bytes`: `image_bytes` (batch,), JPEG or PNG files of any size. A detector stretches
      images to its size and returns boxes in the pixels of each original; a classifier resizes the
      shorter side and crops the center. Results equal those of `detect`, but TensorFlow ignores
      EXIF orientation.
    - `raw_outputs`: `images` as in `serving_default`; returns the outputs of the network itself.

    A detector returns what `model.predict` returns: `"boxes"` (batch, max_detections, 4) float32,
    `"confidence"` (batch, max_detections) float32, `"labels"` (batch, max_detections) int32 and
    `"num_detections"` (batch,) int32. A classifier returns `"predictions"` (batch, classes), a
    backbone without classifier `"features"`. `serve_bytes` adds `"readable"` (batch,), bool.

    Invalid files (not a JPEG or PNG, truncated, empty, above 178 megapixels) and float images with
    NaN or infinite values get no detections, or zeros, and do not affect others in their batch.

    The loaded object's `serve` takes float32 and uint8 images. `assets.extra` holds `model.json`
    (image shape, box format, class names, decoder), `class_names.txt`, warm-up requests and
    `batching_parameters.txt`. The folder is written atomically, so that a server that polls its
    parent never loads half a model.

    Args:
        model: a `RefineDet`, or a network of `keras_resnest.backbones`.
        filepath: folder to write; TensorFlow Serving requires a number as its name. An existing
            SavedModel is replaced.
        precision: `"float32"`, or `"bfloat16"`, which is faster on GPUs and on processors with
            AMX or AVX-512-BF16. Inputs and outputs stay float32.
        verbose: whether to print the signatures.
        freeze: whether weights are constants of the graph instead of variables. TensorFlow then
            takes six times the memory to export and load them, but is a fifth faster at batch 1 on
            a CPU where the environment variable TF_ONEDNN_ASSUME_FROZEN_WEIGHTS is not 1.
        **options: for classifiers: `image_shape` (height, width, 3) of a model that accepts any
            (default: tensors of any size, files cropped to 224); `class_names`; `crop_ratio`,
            default 0.875.

    Raises:
        ValueError: if Keras does not run on TensorFlow, or an argument is invalid.

    Example:
        >>> export_saved_model(model, "serving/1")
        >>> detect = tf.saved_model.load("serving/1").signatures["serve_bytes"]
        >>> detect(image_bytes=tf.constant([open("photo.jpg", "rb").read()]))["boxes"]
    """
    check_backend()
    import tensorflow as tf

    task = create_task(model, **options)
    module, signatures = _build_signatures(task, precision, freeze)
    with atomic_folder(filepath) as folder:
        tf.saved_model.save(module, str(folder), signatures=signatures)
        _write_extra_assets(task, folder / "assets.extra", precision=precision, freeze=freeze)
    if verbose:
        for name, function in signatures.items():
            outputs = {key: tuple(x.shape) for key, x in function.structured_outputs.items()}
            print(f"{name}: {function.structured_input_signature[1]} -> {outputs}")


def _write_extra_assets(task, folder, **entries) -> None:
    folder.mkdir()
    write_metadata(task, folder / "model.json", **entries)
    if task.class_names:
        names = "".join(f"{name}\n" for name in task.class_names)
        (folder / "class_names.txt").write_text(names, encoding="utf-8")
    (folder / "batching_parameters.txt").write_text(BATCHING_PARAMETERS, encoding="utf-8")
    write_warmup_requests(folder / "tf_serving_warmup_requests", task.image_shape)


def _build_signatures(task, precision: str, freeze: bool):
    """Returns the trackable object to save, and the concrete function of each signature."""
    import tensorflow as tf

    from keras_resnest.serving.image_bytes import decode_images

    shape = (None, *task.signature_shape)
    float_images = tf.TensorSpec(shape, tf.float32, name="images")
    uint8_images = tf.TensorSpec(shape, tf.uint8, name="images")
    encoded_images = tf.TensorSpec((None,), tf.string, name="image_bytes")
    # All signatures share this function, so that the network is stored once.
    network = deployment_function(task.network, float_images, precision, freeze)

    def raw_outputs(images):
        images = tf.ensure_shape(images, shape)  # a session does not check shapes
        return call_with_rows(network, images)

    def serve(images):
        if images.dtype == tf.uint8:
            return task.results(raw_outputs(tf.cast(images, tf.float32)))
        finite = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3))  # (batch,)
        images = tf.where(finite[:, None, None, None], images, 0.0)
        return blank_unless(finite, task.results(raw_outputs(images)))

    def serve_bytes(image_bytes):
        images, sizes, readable = decode_images(image_bytes, task.preprocess, task.image_shape)
        results = task.rescale_boxes(task.results(raw_outputs(images)), sizes)
        return {**blank_unless(readable, results), "readable": readable}

    def blank_unless(valid, results):
        """Replaces the results of invalid images; `valid` is (batch,)."""
        blank = {}
        for name, value in results.items():
            rows = tf.reshape(valid, (-1,) + (1,) * (value.shape.rank - 1))
            blank[name] = tf.where(rows, value, tf.cast(task.fill_value(name), value.dtype))
        return blank

    def concrete(function, specification):
        return tf.function(function, autograph=False).get_concrete_function(specification)

    module = tf.Module()
    module.network_variables = network.network_variables
    module.serve = tf.function(serve, autograph=False)
    return module, {
        "serving_default": module.serve.get_concrete_function(float_images),
        "serve_uint8": module.serve.get_concrete_function(uint8_images),
        "serve_bytes": concrete(serve_bytes, encoded_images),
        "raw_outputs": concrete(raw_outputs, float_images),
    }
