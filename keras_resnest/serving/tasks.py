"""Preprocessing, postprocessing and metadata of exported detectors and image models."""

import json
import pathlib
from collections.abc import Sequence

import keras
from keras import ops

from keras_resnest.boxes.formats import scale_boxes
from keras_resnest.checks import checked
from keras_resnest.images import check_crop_ratio
from keras_resnest.serving.graph import float32_compute

PADDING = -1  # as in `DetectionDecoder`


def create_task(model, **options):
    """Returns the `DetectionTask` or `ImageTask` of a model; checks the names of the options."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: {model!r}")
    task = DetectionTask if hasattr(model, "decode") else ImageTask
    unknown = sorted(set(options) - set(task.options))
    if unknown:
        raise ValueError(
            f"`export` of {type(model).__name__} takes {', '.join(task.options) or 'nothing'} "
            f"besides the arguments of `export_model`. Received: {', '.join(unknown)}"
        )
    return task(model, **options)


def write_metadata(task, path: pathlib.Path, **entries) -> None:
    """Writes the metadata for clients as JSON."""
    text = json.dumps({**task.metadata(), **entries}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


class DetectionTask:
    """A detector: images in, decoded detections out."""

    name = "detection"
    options = ()

    def __init__(self, model):
        self.model = model
        self.image_shape = self.signature_shape = model.image_shape
        self.class_names = model.class_names

    def network(self, images) -> dict:
        """Returns the raw outputs."""
        with float32_compute(self.model):
            return self.model(images, training=False)

    def results(self, raw: dict, portable: bool = False) -> dict:
        """Returns what `predict` returns, given raw outputs."""
        return self.model.decode(raw, portable=portable)

    def preprocess(self, image):
        """Stretches a uint8 image (height, width, 3) to the model's size, float32."""
        import tensorflow as tf

        return tf.image.resize(image, self.image_shape[:2])

    def rescale_boxes(self, results: dict, sizes) -> dict:
        """Scales boxes to the original images, whose heights and widths are `sizes` (batch, 2)."""
        own_size = ops.convert_to_tensor(self.image_shape[:2], "float32")
        scale = ops.cast(sizes, "float32")[:, None, :] / own_size  # (batch, 1, 2)
        boxes, box_format = results["boxes"], self.model.bounding_box_format
        scaled = scale_boxes(boxes, box_format, scale[..., 1], scale[..., 0])
        is_detection = results["labels"][..., None] >= 0
        return {**results, "boxes": ops.where(is_detection, scaled, boxes)}

    def fill_value(self, name: str) -> int:
        """Returns the value of the output `name` for an invalid image."""
        return 0 if name == "num_detections" else PADDING

    def metadata(self) -> dict:
        model = self.model
        return {
            "task": self.name,
            "image_shape": list(model.image_shape),
            "bounding_box_format": model.bounding_box_format,
            "class_names": model.class_names,
            "decoder": model.decoder.get_config(),
        }


class ImageTask:
    """A classifier, or a backbone without classifier: images in, one tensor out.

    Args:
        model: a network with one input and one output.
        image_shape: (height, width, 3) of a model that accepts any. If None, tensors of any size
            are accepted, and encoded images are cropped to 224.
        class_names: names of the classes, written next to the model.
        crop_ratio: side of the crop, relative to the resized shorter side of an encoded image.
    """

    options = ("image_shape", "class_names", "crop_ratio")

    @checked
    def __init__(
        self,
        model,
        image_shape=None,
        class_names: Sequence[str] | None = None,
        crop_ratio: float = 0.875,
    ):
        check_crop_ratio(crop_ratio)
        classes = model.output_shape[-1]
        if class_names is not None and len(class_names) != classes:
            count = len(class_names)
            raise ValueError(f"`class_names` must hold {classes} names. Received: {count}")
        self.model = model
        self.signature_shape = _fixed_image_shape(model, image_shape)
        self.image_shape = tuple(side or 224 for side in self.signature_shape)
        self.crop_ratio = float(crop_ratio)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        is_classifier = getattr(model, "include_top", False)
        self.name = "classification" if is_classifier else "features"
        self.output_name = "predictions" if is_classifier else "features"

    def network(self, images) -> dict:
        if self.model.data_format == "channels_first":
            images = ops.transpose(images, (0, 3, 1, 2))
        with float32_compute(self.model):
            return {self.output_name: self.model(images, training=False)}

    def results(self, raw: dict, portable: bool = False) -> dict:
        return raw

    def preprocess(self, image):
        """Crops the center of a uint8 image (height, width, 3) as `center_crop_image` does."""
        import tensorflow as tf

        crop = tf.constant(self.image_shape[:2])
        size = tf.shape(image)[:2]
        # The same rounding as in `center_crop_image`, also for crops that are not square.
        target = tf.cast(tf.cast(crop, tf.float32) / self.crop_ratio + 1e-3, tf.int32)
        ratios = tf.cast(target, tf.float64) / tf.cast(size, tf.float64)
        resized = tf.cast(tf.cast(size, tf.float64) * tf.reduce_max(ratios) + 1e-6, tf.int32)
        resized = tf.maximum(resized, target)
        start = tf.cast(tf.round(tf.cast(resized - crop, tf.float64) / 2.0), tf.int32)
        # Resizes and crops in one operation, without making the whole resized image.
        image = tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=crop,
            scale=tf.cast(resized, tf.float32) / tf.cast(size, tf.float32),
            translation=-tf.cast(start, tf.float32),
            kernel_type="triangle",
            antialias=True,
        )[0]
        return tf.clip_by_value(tf.round(image), 0.0, 255.0)

    def rescale_boxes(self, results: dict, sizes) -> dict:
        return results

    def fill_value(self, name: str) -> int:
        return 0

    def metadata(self) -> dict:
        return {
            "task": self.name,
            "image_shape": list(self.image_shape),
            "class_names": self.class_names,
            "crop_ratio": self.crop_ratio,
        }


def _fixed_image_shape(model, image_shape) -> tuple:
    """Returns (height, width, channels) of the model, fixed to `image_shape` if that is given."""
    own = tuple(model.input_shape[1:])
    if model.data_format == "channels_first":
        own = (*own[1:], own[0])
    if image_shape is None:
        return own
    shape = tuple(image_shape) if isinstance(image_shape, list | tuple) else ()
    fits = len(shape) == 3 and all(
        isinstance(side, int) and side > 0 and known in (None, side)
        for side, known in zip(shape, own, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`image_shape` must be (height, width, channels) and fit the model's {own}. "
            f"Received: image_shape={image_shape}"
        )
    return shape
