"""What an exported model does before and after its network: one class for each kind of model."""

from keras import ops

from keras_resnest.boxes.formats import scale_boxes
from keras_resnest.serving.graph import computing_in_float32

PADDING = -1  # of detections, as in `DetectionDecoder`


def task_of(model, **options):
    """The task of a model: `DetectionTask` if it decodes, `ImageTask` otherwise.

    Args:
        model: a detector with `decode`, or a network of one tensor.
        **options: arguments of the task, see there.

    Raises:
        ValueError: if the task does not know an option.
    """
    task = DetectionTask if hasattr(model, "decode") else ImageTask
    known = task.options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"`export` of {type(model).__name__} takes the options {', '.join(known) or 'none'} "
            f"beside its own arguments. Received: {', '.join(unknown)}"
        )
    return task(model, **options)


class DetectionTask:
    """A detector: images in, decoded detections out.

    Args:
        model: a model with `decode`, `image_shape`, `bounding_box_format`, `class_names`.
    """

    options = ()

    def __init__(self, model):
        self.model = model
        self.image_shape = self.signature_shape = model.image_shape

    def network(self, images) -> dict:
        """Raw outputs."""
        with computing_in_float32(self.model):
            return self.model(images, training=False)

    def results(self, raw: dict, portable: bool = False) -> dict:
        """What `predict` returns, from raw outputs."""
        return self.model.decode(raw, portable=portable)

    def fit_image(self, picture):
        """One uint8 image (height, width, 3), stretched to float32 of the model's size."""
        import tensorflow as tf

        return tf.image.resize(picture, self.image_shape[:2])

    def in_own_pixels(self, results: dict, sizes) -> dict:
        """Boxes in the pixels of each image; `sizes` are (batch, 2), height and width."""
        height, width = self.image_shape[:2]
        scale = ops.cast(sizes, "float32")[:, None, :] / ops.convert_to_tensor(
            [height, width], "float32"
        )
        boxes, box_format = results["boxes"], self.model.bounding_box_format
        scaled = scale_boxes(boxes, box_format, scale[..., 1], scale[..., 0])
        real = results["labels"][..., None] >= 0
        return {**results, "boxes": ops.where(real, scaled, boxes)}

    def empty(self, name: str) -> int:
        """What an output holds for an image that cannot be read: no detections."""
        return 0 if name == "num_detections" else PADDING

    def facts(self) -> dict:
        """What a client must know and the signatures do not tell, for a JSON file."""
        model = self.model
        return {
            "task": "detection",
            "image_shape": list(model.image_shape),
            "bounding_box_format": model.bounding_box_format,
            "class_names": model.class_names,
            "decoder": model.decoder.get_config(),
        }


class ImageTask:
    """A classifier, or a backbone without classifier: images in, one tensor out.

    Args:
        model: a network of one tensor of images.
        image_shape: (height, width, 3) of the images, where the model leaves them open. If
            not given, tensors of any size are taken, and encoded images are cut to 224.
        class_names: names of the classes, to be written beside the model.
        crop_share: the crop as a share of the resized shorter side of an encoded image.
    """

    options = ("image_shape", "class_names", "crop_share")

    def __init__(self, model, image_shape=None, class_names=None, crop_share: float = 0.875):
        self.model = model
        self.signature_shape, self.image_shape = _shapes(model, image_shape)
        self.crop_share = _check_crop_share(crop_share)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.output_name = "predictions" if getattr(model, "include_top", False) else "features"
        classes = model.output_shape[-1]
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(
                f"`class_names` must hold {classes} names. Received: {len(self.class_names)}"
            )

    def network(self, images) -> dict:
        if self.model.data_format == "channels_first":
            images = ops.transpose(images, (0, 3, 1, 2))
        with computing_in_float32(self.model):
            return {self.output_name: self.model(images, training=False)}

    def results(self, raw: dict, portable: bool = False) -> dict:
        return raw

    def fit_image(self, image):
        """The middle of an image, as classifiers are evaluated: see `center_crop_image`."""
        import tensorflow as tf

        crop = tf.constant(self.image_shape[:2])
        size = tf.shape(image)[:2]
        # As `center_crop_image` rounds, for crops that are not square too.
        target = tf.cast(tf.cast(crop, tf.float32) / self.crop_share + 1e-3, tf.int32)
        ratios = tf.cast(target, tf.float64) / tf.cast(size, tf.float64)
        enlarged = tf.cast(tf.cast(size, tf.float64) * tf.reduce_max(ratios) + 1e-6, tf.int32)
        enlarged = tf.maximum(enlarged, target)
        start = tf.cast(tf.round(tf.cast(enlarged - crop, tf.float64) / 2.0), tf.int32)
        # Resizes and cuts in one operation, which never makes the whole resized image.
        scale = tf.cast(enlarged, tf.float32) / tf.cast(size, tf.float32)
        cut = tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=crop,
            scale=scale,
            translation=-tf.cast(start, tf.float32),
            kernel_type="triangle",
            antialias=True,
        )[0]
        return tf.clip_by_value(tf.round(cut), 0.0, 255.0)

    def in_own_pixels(self, results: dict, sizes) -> dict:
        return results

    def empty(self, name: str) -> int:
        """What an output holds for an image that cannot be read."""
        return 0

    def facts(self) -> dict:
        return {
            "task": "classification" if self.output_name == "predictions" else "features",
            "image_shape": list(self.image_shape),
            "class_names": self.class_names,
            "crop_share": self.crop_share,
        }


def _shapes(model, image_shape) -> tuple[tuple, tuple]:
    """(height, width, channels) of tensors, None for any, and of encoded images."""
    own = tuple(model.input_shape[1:])
    if model.data_format == "channels_first":
        own = (*own[1:], own[0])
    given = tuple(image_shape) if isinstance(image_shape, (list, tuple)) else ()
    shape = own if image_shape is None else given
    fits = len(shape) == 3 and all(
        (side is None and image_shape is None) or (isinstance(side, int) and side > 0)
        for side in shape
    )
    if not fits or any(k not in (None, s) for s, k in zip(shape, own, strict=True)):
        raise ValueError(
            f"`image_shape` must be (height, width, channels) and fit the model's {own}. "
            f"Received: image_shape={image_shape}"
        )
    return shape, tuple(side or 224 for side in shape)


def _check_crop_share(crop_share: float) -> float:
    if not 0.0 < crop_share <= 1.0:
        raise ValueError(
            f"`crop_share` must be above 0 and at most 1. Received: crop_share={crop_share}"
        )
    return float(crop_share)
