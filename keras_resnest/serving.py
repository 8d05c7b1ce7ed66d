"""Export of a detector as a SavedModel that needs nothing but TensorFlow."""

import json
import os
import pathlib

import keras
from keras import ops

from keras_resnest.detection.boxes import scale_boxes


def export_saved_model(model, filepath: str | os.PathLike, verbose: bool = False) -> None:
    """Writes a SavedModel that returns decoded detections.

    Signatures, each with any batch size and with the outputs of `model.predict`
    (`"boxes"`, `"confidence"`, `"labels"`, `"num_detections"`):

    - `serving_default`: `images` (batch, height, width, 3) of the model's size,
      float32, RGB, 0 to 255.
    - `serve_uint8`: the same, `images` uint8.
    - `serve_bytes`: `image_bytes` (batch,), encoded JPEG, PNG, GIF (first frame), BMP
      or WebP pictures of any size. They are stretched to the model's size; the boxes
      are in the pixels of each picture. Pixels, and so detections, are those of
      `model.detect`, transparent PNGs over white included, with two exceptions:
      TensorFlow has no op for the EXIF orientation of a photograph, and it ignores
      the transparency of GIFs. Send such pictures upright and as PNG.

    The `serve` attribute of the loaded object takes images of both types. Beside the
    model lie `assets.extra/detector.json`, which holds `"bounding_box_format"` and
    `"image_shape"`, and, if the classes have names, `assets.extra/class_names.txt`.

    Args:
        model: a model with `decode`, `image_shape`, `bounding_box_format`, `class_names`.
        filepath: folder to write; TensorFlow Serving wants a number as its last part.
        verbose: whether to print the signatures.

    Raises:
        ValueError: if Keras does not run on TensorFlow.

    Example:

    >>> export_saved_model(model, "serving/1")
    >>> detect = tf.saved_model.load("serving/1").signatures["serve_bytes"]
    >>> detect(image_bytes=tf.constant([open("photo.jpg", "rb").read()]))["boxes"]
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "A SavedModel can be exported with the TensorFlow backend only. Received: "
            f"backend={keras.backend.backend()!r}. Save with model.save, set "
            "KERAS_BACKEND=tensorflow, load and export"
        )
    import tensorflow as tf

    shape = (None, *model.image_shape)
    floats, integers = (tf.TensorSpec(shape, t, name="images") for t in (tf.float32, tf.uint8))

    def detect(images):
        # TensorFlow's oneDNN convolutions give an empty batch a wrong shape: one black
        # picture is sent in its place, and taken away again.
        count = tf.shape(images)[0]
        images = tf.pad(images, [[0, tf.maximum(0, 1 - count)], [0, 0], [0, 0], [0, 0]])
        detections = model.decode(model(images, training=False))
        return {name: value[:count] for name, value in detections.items()}

    # The network is traced once; all signatures call this function.
    detect = tf.function(detect, autograph=False).get_concrete_function(floats)

    def serve_any(images):
        return detect(tf.cast(images, tf.float32))

    def serve_bytes(image_bytes):
        images, sizes = _decode_images(image_bytes, model.image_shape)
        return _to_own_pixels(detect(images), sizes, model)

    serve = tf.function(serve_any, autograph=False)
    serve.get_concrete_function(floats)  # the first trace becomes `serving_default`
    serve.get_concrete_function(integers)

    archive = keras.export.ExportArchive()
    archive.add_endpoint("serve", serve)
    archive.add_endpoint("serve_uint8", serve_any, [integers])
    encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")
    archive.add_endpoint("serve_bytes", serve_bytes, [encoded])
    archive.write_out(filepath, verbose=verbose)
    _write_extra_assets(filepath, model)


def _decode_images(image_bytes, image_shape):
    """Encoded pictures to (batch, height, width, 3) of the model, and their sizes (batch, 2)."""
    import tensorflow as tf

    def decode(encoded):
        # TensorFlow's default JPEG decoding is fast and up to 7 grey levels off.
        image = tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"),
            lambda: tf.io.decode_image(encoded, expand_animations=False),
        )
        image.set_shape((None, None, None))
        has_alpha = tf.shape(image)[2] % 2 == 0  # grey, grey + alpha, RGB or RGB + alpha
        image = tf.cond(has_alpha, lambda: _over_white(image), lambda: image)
        resized = tf.image.resize(image, image_shape[:2])
        return tf.broadcast_to(resized, image_shape), tf.shape(image)[:2]  # grey to RGB

    signature = (tf.TensorSpec(image_shape, tf.float32), tf.TensorSpec((2,), tf.int32))
    return tf.map_fn(decode, image_bytes, fn_output_signature=signature)


def _over_white(image):
    """Lays uint8 (h, w, colours + alpha) over white, as `load_image` does."""
    import tensorflow as tf

    image = tf.cast(image, tf.float32)
    alpha = image[..., -1:] / 255.0
    return tf.cast(tf.round(image[..., :-1] * alpha + 255.0 * (1.0 - alpha)), tf.uint8)


def _to_own_pixels(detections: dict, sizes, model) -> dict:
    """Scales boxes from the model's pixels to those of each picture; sizes are (batch, 2)."""
    height, width = model.image_shape[:2]
    scale = ops.cast(sizes, "float32")[:, None, :] / ops.convert_to_tensor(
        [height, width], "float32"
    )
    boxes = detections["boxes"]
    scaled = scale_boxes(boxes, model.bounding_box_format, scale[..., 1], scale[..., 0])
    real = detections["labels"][..., None] >= 0
    return {**detections, "boxes": ops.where(real, scaled, boxes)}


def _write_extra_assets(filepath, model) -> None:
    """What a client must know and the signatures do not tell."""
    folder = pathlib.Path(filepath) / "assets.extra"
    folder.mkdir(exist_ok=True)
    facts = {"bounding_box_format": model.bounding_box_format, "image_shape": model.image_shape}
    (folder / "detector.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    names = folder / "class_names.txt"
    names.unlink(missing_ok=True)  # of a model that was here before
    if model.class_names:
        names.write_text("\n".join(model.class_names) + "\n", encoding="utf-8")
