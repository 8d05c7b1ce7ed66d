"""Checks of what users pass in: class names, image shapes, batches, images, ground truth.

The values of a batch are known only when the graph runs. A TensorFlow graph can raise errors, which
`value_errors` turns into `ValueError`s; a compiled step of JAX cannot, so it checks nothing.
"""

import codecs
import collections
import contextlib
import functools
import inspect
import numbers
import os
import re
import textwrap
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

PREFIX = "keras_resnest:"  # distinguishes errors of these checks from TensorFlow's own
MAX_RELATIVE = 10.0  # a coordinate above this is in pixels


# === Arguments ===


def checked(public):
    """Decorates a public function or class: an argument of another kind raises `ValueError`.

    The kinds are those of the type hints, taken coarsely: 3.0 for `int`, 1 for `bool`, but no NaN;
    any sequence or array for another, but text only for text, and for `Literal` only its words.
    What is given for `int` arrives as an `int`. Keras' constructors have no hints: what fails in an
    inherited one becomes a `ValueError`.

    Example:
        >>> @checked
        ... def resize_image(image: np.ndarray, height: int, width: int): ...
    """
    if isinstance(public, type):
        own = vars(public).get("__init__") or reading_config(public.__name__)(public.__init__)
        public.__init__ = checked(own)
        return public
    signature = inspect.signature(public)
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    hints = {p.name: p.annotation for p in named if p.annotation is not p.empty}
    positional = [p.name for p in named if p.kind != p.KEYWORD_ONLY]

    def fitting(name, value):
        if name not in hints:
            return value
        if not _fits(value, hints[name]):
            received = textwrap.shorten(repr(value), 100)
            raise ValueError(
                f"`{name}` must be {_in_words(hints[name])}. Received: {name}={received}"
            )
        if value is not None and hints[name] in (int, int | None):
            with contextlib.suppress(TypeError):  # a tensor of a graph
                return int(value)
        return value

    @functools.wraps(public)
    def wrapper(*args, **kwargs):
        given = [fitting(*pair) for pair in zip(positional, args, strict=False)]
        kwargs = {name: fitting(name, value) for name, value in kwargs.items()}
        return public(*given, *args[len(given) :], **kwargs)

    wrapper.__signature__ = signature  # Keras reads it without following wrappers
    return wrapper


def _in_words(hint) -> str:
    kind = re.sub(r"[\w.]+\.", "", inspect.formatannotation(hint))
    kind = re.sub(r"Optional\[(.*)\]", r"\1 | None", kind)
    return re.sub(r"Literal\[([^]]*)\]", r"one of \1", kind).replace("'", "")


def _fits(value, hint) -> bool:
    """Whether a value is of the kind of a type hint."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    is_text, is_array = isinstance(value, str | bytes | os.PathLike), hasattr(value, "__array__")
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if kind is typing.Literal:
        return isinstance(value, str) and value in parts
    if kind is None or value is None:
        return value is None and kind in (None, types.NoneType, typing.Any)
    if is_array and kind is np.ndarray:
        return _has_numbers(value)
    is_scalar = getattr(value, "shape", None) == ()
    if is_scalar and isinstance(value, np.ndarray) and kind is not typing.Any:
        return _has_numbers(value) and _fits(value.item(), hint)
    if kind in (int, float, bool):
        if not isinstance(value, numbers.Real):
            return is_scalar and _has_numbers(value)
        if kind is bool or isinstance(value, bool):
            return kind is bool and value in (0, 1)
        return value % 1 == 0 and abs(value) < 2**63 if kind is int else value == value
    if kind in (tuple, list, Sequence, Iterable, np.ndarray):
        if is_array and kind is not Iterable and not is_scalar:
            value = list(value)
        if is_text or not isinstance(value, Sequence):
            unordered = kind is not Iterable and isinstance(value, set | frozenset | Mapping)
            text = is_text and not (isinstance(value, str) and parts == (str,))
            return isinstance(value, Iterable) and not (text or is_scalar or unordered)
        if kind is tuple and Ellipsis not in parts and len(parts) != len(value):
            return not parts
        return not parts or all(_fits(element, parts[0]) for element in value)
    if kind is Callable:
        return callable(value)
    return kind is typing.Any or not isinstance(kind, type) or isinstance(value, kind)


def _has_numbers(array) -> bool:
    """Whether an array or tensor of any library has real numbers."""
    return re.search("bool|int|float", str(getattr(array, "dtype", ""))) is not None


def check_fractions(**arguments: float) -> None:
    """Raises `ValueError` if an argument is not a number between 0 and 1."""
    for name, value in arguments.items():
        if not is_number(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` must be between 0 and 1. Received: {name}={value!r}")


def class_thresholds(confidence_threshold, class_names: Sequence[str]) -> list[float]:
    """Returns the lowest confidence of a detection of each class.

    Args:
        confidence_threshold: 0 to 1, for all classes, or a dictionary with one for each class name.
        class_names: the names, in the order of the labels.

    Raises:
        ValueError: if a class has none, a name is unknown, or a number is not in 0 to 1.
    """
    if not isinstance(confidence_threshold, Mapping):
        check_fractions(confidence_threshold=confidence_threshold)
        return [float(confidence_threshold)] * len(class_names)
    if set(confidence_threshold) != set(class_names):
        raise ValueError(
            "`confidence_threshold` must have a number for each class, "
            f"{', '.join(class_names)}. Received: {confidence_threshold}"
        )
    for name, value in confidence_threshold.items():
        check_fractions(**{f"confidence_threshold[{name!r}]": value})
    return [float(confidence_threshold[name]) for name in class_names]


def check_positive(**arguments: float | None) -> None:
    """Raises `ValueError` if an argument is not None or a number above zero."""
    for name, value in arguments.items():
        if value is not None and (not is_number(value) or not value > 0):
            raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")


def check_counts(minimum: int = 1, **arguments: int | None) -> list[int | None]:
    """Returns the arguments, None or integers, possibly as floats, as integers."""
    wanted = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
    for name, value in arguments.items():
        is_count = is_number(value) and minimum <= value < 2**31 and value % 1 == 0
        if value is not None and not is_count:
            raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
    return [None if value is None else int(value) for value in arguments.values()]


def check_overlap(overlap: float) -> float:
    """Returns the overlap of tiles, a fraction of their sides: at least 0, below 1."""
    check_fractions(overlap=overlap)
    if overlap == 1.0:
        raise ValueError(f"`overlap` must be below 1: tiles have to move. Received: {overlap!r}")
    return float(overlap)


def is_number(value) -> bool:
    """Whether a value is a number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@contextlib.contextmanager
def reading_config(kind: str):
    """Turns what a bad configuration of a `kind` raises into a ValueError: strangers write them."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"The configuration of {kind} is not valid: {type(error).__name__}: {one_line(error)}"
        ) from error


def one_line(error: Exception) -> str:
    """The message of another program's error in one line, or its type if it has none."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def check_class_names(class_names: Sequence[str], num_classes: int | None = None) -> list[str]:
    """Returns `class_names` as a list.

    Args:
        class_names: names of the labels 0, 1, 2, ...; a single name may be a string.
        num_classes: number of classes, without background; None accepts any number.

    Raises:
        ValueError: if the names are not different strings, or not `num_classes` of them.
    """
    if not _fits(class_names, Iterable) and not isinstance(class_names, str):
        raise ValueError(f"`class_names` must be a list of names. Received: {class_names!r}")
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    different = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    if not names or not different or num_classes not in (None, len(names)):
        count = "" if num_classes is None else f"{num_classes} "
        raise ValueError(
            f"`class_names` must be a list of {count}different names, in the order of the labels. "
            f"Received: class_names={class_names}"
        )
    return names


def check_same_classes(data, class_names: Sequence[str] | None) -> None:
    """Raises `ValueError` if a dataset of `keras_resnest.data` has other classes than the model."""
    names = getattr(data, "class_names", None)
    if names and class_names and list(names) != list(class_names):
        raise ValueError(
            "The dataset and the model must have the same classes in the same order: read the "
            f"data with class_names={list(class_names)}. Received: {list(names)}"
        )


def float_policy(dtype) -> keras.DTypePolicy:
    """Returns the policy of a model's `dtype`, by default Keras' own."""
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    if "float" not in policy.variable_dtype:
        raise ValueError(f"`dtype` must be a float type or policy. Received: dtype={dtype!r}")
    return policy


def check_image_shape(
    image_shape: Sequence[int], multiple_of: int = 1, name: str = "image_shape"
) -> tuple[int, int]:
    """Returns (height, width) of an `image_shape` (height, width) or (height, width, 3).

    Args:
        image_shape: sides in pixels.
        multiple_of: number that must divide both sides.
        name: name of the argument, for the message.

    Raises:
        ValueError: if `image_shape` is anything else.
    """
    shape = tuple(image_shape) if isinstance(image_shape, Sequence | np.ndarray) else (image_shape,)
    valid = len(shape) in (2, 3) and all(isinstance(n, int | np.integer) for n in shape)
    if (
        not valid
        or shape[2:] not in ((), (3,))
        or not all(side > 0 and side % multiple_of == 0 for side in shape[:2])
    ):
        unit = (
            "in pixels" if multiple_of == 1 else f"with sides that are multiples of {multiple_of}"
        )
        raise ValueError(
            f"`{name}` must be (height, width) or (height, width, 3) {unit}. "
            f"Received: {name}={image_shape!r}"
        )
    return int(shape[0]), int(shape[1])


# === Weights ===


def check_layers_of_file(model: keras.Model, path) -> None:
    """Raises `ValueError` if a model and a weight file have different layers.

    Keras ignores layers of a file that the model lacks, and leaves out some that the file lacks.

    Args:
        model: a model without a classifier (`include_top=False`) may leave out that of the file.
        path: `.weights.h5` or `.keras` file.
    """
    own, stored = collections.Counter(), _arrays_by_layer(str(path))
    for layer in model._flatten_layers():
        layer.save_own_variables(arrays := {})
        own[layer.name] += len(arrays)
    if not getattr(model, "include_top", True):
        for name in [n for n in stored if n.startswith("fc") and n not in own]:
            del stored[name]
    if own.total() != stored.total():
        only = [sorted(more - less)[:5] or "none" for more, less in ((stored, own), (own, stored))]
        raise ValueError(
            f"The file holds {stored.total()} arrays, the model has {own.total()}. Layers of the "
            f"file alone: {only[0]}; of the model alone: {only[1]}"
        )


def _arrays_by_layer(path: str) -> collections.Counter:
    """Number of arrays of each layer in a weight file, without the optimizer's."""
    import h5py

    found = collections.Counter()

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer/"):
            found[str(item.parent.attrs.get("name", name))] += 1

    with contextlib.ExitStack() as opened:
        if path.endswith(".keras"):
            archive = opened.enter_context(zipfile.ZipFile(path))
            path = opened.enter_context(archive.open("model.weights.h5"))
        opened.enter_context(h5py.File(path)).visititems(visit)
    return found


def check_finite_weights(model: keras.Model) -> None:
    """Raises ValueError if a weight is NaN or infinite."""
    weights = ((variable, ops.convert_to_numpy(variable)) for variable in model.variables)
    bad = [v.path for v, array in weights if not np.isfinite(array.astype("float32")).all()]
    if bad:
        raise ValueError(f"{len(bad)} arrays hold NaN or infinite values, such as {bad[0]}")


# === Batches ===


def unpack_batch(batch) -> tuple:
    """Returns (images, ground truth, sample weight) of a batch in either of its layouts.

    Args:
        batch: `{"images", "bounding_boxes"}`, `(images, ground_truth)`,
            `(images, ground_truth, sample_weight)`, or images alone.

    Returns:
        The three parts; None where the batch has no such part.
    """
    images, boxes, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    if isinstance(images, Mapping):
        if "images" not in images:
            raise ValueError(f'A batch must have the key "images". Received: {list(images)}')
        images, boxes = images["images"], images.get("bounding_boxes", boxes)
    return images, dense_boxes(boxes), sample_weight


def dense_boxes(boxes):
    """Returns ground truth with ragged tensors and lists padded: boxes with 0, labels with -1."""
    if not isinstance(boxes, Mapping):
        return boxes
    return {name: _dense(name, value) for name, value in boxes.items()}


def _dense(name: str, value):
    padding, shape = -1 if name == "labels" else 0, (4,) if name == "boxes" else ()
    if hasattr(value, "to_tensor"):  # tf.RaggedTensor
        return value.to_tensor(padding, shape=(None, None, *shape) if shape else None)
    if not isinstance(value, list | tuple) and str(getattr(value, "dtype", "")) != "object":
        return value
    try:
        rows = [np.asarray(row, "int32" if name == "labels" else "float32") for row in value]
        dense = np.full((len(rows), max(map(len, rows), default=0), *shape), padding, rows[0].dtype)
        for image, row in zip(dense, rows, strict=True):
            image[: len(row)] = row.reshape(-1, *shape)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"`{name}` must be an array, or a list with the rows of each image. Received: "
            f"{type(value).__name__} ({error})"
        ) from None
    return dense


def check_box_dictionary(boxes) -> None:
    """Raises `ValueError` unless ground truth is a dictionary of `"boxes"` and `"labels"`."""
    if not isinstance(boxes, Mapping) or not {"boxes", "labels"} <= set(boxes):
        received = list(boxes) if isinstance(boxes, Mapping) else type(boxes).__name__
        raise ValueError(
            'Ground truth must be a dictionary {"boxes": (batch, objects, 4), "labels": '
            f"(batch, objects)}}. Received: {received}"
        )


def float_outputs(outputs) -> dict:
    """Returns the raw outputs of a detector as float32."""
    names = {"arm_boxes", "arm_objectness", "odm_boxes", "odm_logits"}
    if not isinstance(outputs, Mapping) or not names <= set(outputs):
        received = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"`outputs` must be what the model returns, with {', '.join(sorted(names))}. "
            f"Received: {received}"
        )
    return {name: ops.cast(value, "float32") for name, value in outputs.items()}


def check_box_shapes(boxes: Mapping) -> None:
    """Raises `ValueError` unless a batch has the shapes of ground truth, as far as they are known.

    Args:
        boxes: tensors `"boxes"` and `"labels"`.
    """
    shapes = [ops.convert_to_tensor(boxes[name]).shape for name in ("boxes", "labels")]
    if any(getattr(shape, "rank", 0) is None for shape in shapes):  # of TensorFlow
        return
    box_shape, label_shape = map(tuple, shapes)
    sides = zip(box_shape, (*label_shape, 4), strict=False)
    differs = any(None not in pair and pair[0] != pair[1] for pair in sides)
    if len(box_shape) != 3 or len(label_shape) != 2 or differs:
        raise ValueError(
            "`boxes` must have shape (batch, objects, 4), `labels` (batch, objects). "
            f"Received: {box_shape} and {label_shape}"
        )


def check_images(images):
    """Returns a batch of images once it is known to be finite and not scaled to 0-1.

    Args:
        images: (batch, height, width, 3).

    Returns:
        `images`. What is computed from them waits for the checks.
    """
    values = ops.cast(images, "float32")
    highest, lowest = ops.max(values, initial=0.0), ops.min(values, initial=0.0)
    # A dark image holds zeros and ones; a scaled image, mostly fractions.
    fractions = ops.mean(ops.cast(values != ops.floor(values), "float32")) > 0.5
    finite = ops.isfinite(ops.sum(values))
    images = require(images, finite, "`images` must be finite, 0 to 255. Received NaN or infinity")
    return require(
        images,
        ops.logical_not((highest <= 1.0) & fractions),
        "`images` must be 0 to 255. Received values within 0 to 1: do not scale images; "
        "the network normalizes them itself. Lowest and highest value:",
        lowest,
        highest,
    )


def check_batch_shape(images, image_shape: tuple[int, int, int]):
    """Returns a batch of images of `image_shape` (height, width, 3); checks it inside a graph too.

    Raises:
        ValueError: if the batch has another shape.
    """
    shape = tuple(images.shape)
    wanted = (
        f"`x` must have shape (batch, {', '.join(map(str, image_shape))}); `detect` takes images "
        "of any size. Received:"
    )
    sides = zip(shape[1:], image_shape, strict=False)
    if len(shape) != 4 or any(side not in (None, own) for side, own in sides):
        raise ValueError(f"{wanted} x.shape={shape}")
    if None not in shape[1:]:
        return images
    height, width = ops.shape(images)[1:3]
    if None in (height, width):
        raise ValueError(f"{wanted} images of several sizes (ragged)")
    fits = ops.logical_and(height == image_shape[0], width == image_shape[1])
    return require(images, fits, wanted, height, width)


def check_sample_weight(sample_weight):
    """Returns the weights of the images of a batch as float32 (batch,).

    Args:
        sample_weight: (batch,) or (batch, 1), or a structure of several of them that are equal:
            for arrays, Keras repeats them for every part of the ground truth.

    Raises:
        ValueError: if there is not one weight for each image, or a weight is negative or NaN.
    """
    weight, *_ = keras.tree.flatten(sample_weight) or [None]
    shape = tuple(getattr(weight, "shape", ()))
    if not shape or shape[1:] not in ((), (1,)) or not _has_numbers(weight):
        raise ValueError(
            "`sample_weight` must have one weight for each image, shape (batch,). "
            f"Received: {type(weight).__name__} of shape {shape}"
        )
    weight = ops.reshape(ops.cast(weight, "float32"), (-1,))
    return require(
        weight,
        ops.all((weight >= 0.0) & (weight < float("inf"))),
        "`sample_weight` must be finite and not negative. Received lowest and highest:",
        ops.min(weight, initial=0.0),
        ops.max(weight, initial=0.0),
    )


def check_ground_truth(images, boxes, labels, relative, num_classes: int, box_format: str):
    """Returns a batch of images once its ground truth has passed the checks.

    Args:
        images: images of the batch, any shape.
        boxes: `"xyxy"` in pixels, (batch, objects, 4).
        labels: int, (batch, objects), padding is -1.
        relative: `boxes` as fractions of the image.
        num_classes: classes of the model.
        box_format: the format that was declared, for the messages.

    Returns:
        `images`. What is computed from them waits for the checks, so that a faulty
        batch changes no weight.
    """
    real = (labels >= 0)[..., None]
    boxes, relative = ops.where(real, boxes, 0.0), ops.where(real, relative, 0.0)
    declared = f"bounding_box_format={box_format!r} was declared"
    images = require(
        images,
        ops.all((labels >= -1) & (labels < num_classes)),
        f"`labels` must be 0 to {num_classes - 1}, or -1 for padding. Received lowest and highest:",
        ops.min(labels, initial=0),
        ops.max(labels, initial=0),
    )
    finite = ops.all(ops.isfinite(boxes))
    images = require(images, finite, "`boxes` must be finite. Received NaN or infinity")
    smallest = ops.min(boxes[..., 2:] - boxes[..., :2], initial=0.0)
    images = require(
        images,
        smallest >= 0.0,
        f"`boxes` must not have a negative width or height. {declared}: is it another one? "
        "Received a side, in pixels:",
        smallest,
    )
    extent = ops.max(ops.abs(relative), initial=0.0)
    return require(images, *_unit_check(extent, boxes, real, box_format, declared))


def _unit_check(extent, boxes, real, box_format: str, declared: str):
    """Detects pixels where fractions were declared, and fractions where pixels were."""
    if box_format.startswith("rel_"):
        return (
            extent <= MAX_RELATIVE,
            f"`boxes` must be fractions of the image, as {declared}. Received a coordinate:",
            extent,
        )
    return (
        ops.logical_not(ops.any(real) & (ops.max(ops.abs(boxes), initial=0.0) <= 1.0)),
        f"`boxes` must be in pixels, as {declared}. Received only numbers within 0 to 1: declare "
        "a rel_ format, or multiply by the image's size",
    )


def require(tensor, condition, message: str, *values):
    """Returns `tensor` if `condition` holds; otherwise raises the message with the values."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not tf.executing_eagerly():
            check = tf.debugging.Assert(condition, [f"{PREFIX} {message}", *values])
            with tf.control_dependencies([check]):
                return tf.identity(tensor)
    try:
        failed = not condition
    except TypeError:  # JAX compiles a step: the value is not known
        return tensor
    if failed:
        values = [str(ops.convert_to_numpy(value)) for value in values]
        raise ValueError(" ".join([message, *values]))
    return tensor


@contextlib.contextmanager
def value_errors():
    """Turns what TensorFlow raises for these checks and unreadable images into a `ValueError`."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if not type(error).__module__.startswith("tensorflow."):
            raise
        if PREFIX in text:
            # "assertion failed: [<prefix> message] [value]\n\t [[node ...", with C escapes
            message = text[text.index(PREFIX) + len(PREFIX) :].split("\n")[0].strip()
            message = re.sub(r"\]( \[|$)", r"\1", message, count=1)
            raise ValueError(codecs.escape_decode(message)[0].decode()) from None
        if "Input dataset was expected to contain" in text:  # `_cached` in data/batches.py
            raise ValueError(
                "The cached data lacks an image that could not be used; cache=False names it. Of "
                "data of TFDS, `report` names a damaged file"
            ) from None
        if type(error).__name__ == "DataLossError":
            raise ValueError("A file of TFDS is damaged; `report` of the data names it") from None
        raise
