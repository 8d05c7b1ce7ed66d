"""Datasets of annotated images, as the readers return them.

`as_dataset()` returns a `tf.data.Dataset` of

    {"images": uint8 (h, w, 3), "image_id": string,
     "bounding_boxes": {"boxes": float32 (n, 4), "labels": int32 (n,), "difficult": bool (n,)}}

for detection, and with an int32 scalar "labels" instead of "bounding_boxes" for classification.
Images are RGB, 0 to 255, of any size.

Boxes are "xyxy" in pixels with continuous coordinates (x2 - x1 is the width; the box of the whole
image is [0, 0, w, h]); labels are 0 to num_classes - 1. All boxes are inside their image and have
an area; the `AnnotationReport` lists what the readers clipped or dropped.
"""

import collections
import dataclasses
import difflib
import functools
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_resnest.checks import PREFIX, check_class_names, checked
from keras_resnest.images import ImageInfo, load_image, orientation_flags, read_image_info

# === Reports and records ===


@dataclasses.dataclass(frozen=True)
class Problem:
    """A fault in the annotations, and how the reader handled it."""

    file: str  # name of the file, or id of the image
    what: str  # kind of fault, e.g. "degenerate box"
    action: str  # what the reader did, e.g. "dropped"
    detail: str = ""  # the box, numbers, or text in question

    def __str__(self) -> str:
        return f"{self.file}: {self.what}{' ' * bool(self.detail)}{self.detail} - {self.action}"


@checked
@dataclasses.dataclass
class AnnotationReport:
    """Counts and problems of a dataset; print it before training."""

    num_images: int
    num_boxes: int
    class_counts: dict[str, int]  # boxes per class name, in the order of the labels
    num_difficult: int = 0  # boxes marked as difficult
    num_empty_images: int = 0  # images without boxes
    problems: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def problem_counts(self) -> dict[str, int]:
        """Number of problems of each kind."""
        return dict(collections.Counter(problem.what for problem in self.problems))

    def __str__(self) -> str:
        lines = [
            f"{self.num_images} images ({self.num_empty_images} without boxes), "
            f"{self.num_boxes} boxes ({self.num_difficult} difficult)"
        ]
        width = max((len(name) for name in self.class_counts), default=0)
        lines += [f"  {name:<{width}}  {n:>6}" for name, n in self.class_counts.items()]
        lines.append(f"problems: {len(self.problems)}")
        for what, count in self.problem_counts.items():
            lines.append(f"  {count} x {what}")
            found = [problem for problem in self.problems if problem.what == what]
            lines += [f"      {p.file}: {p.detail} - {p.action}" for p in found[:5]]
            if count > 5:
                lines.append(f"      ... and {count - 5} more, see `report.problems`")
        return "\n".join(lines)


@checked
@dataclasses.dataclass
class ClassificationReport:
    """Counts and problems of a dataset; print it before training."""

    class_counts: dict[str, int]  # images per class name, in the order of the labels
    problems: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return sum(self.class_counts.values())

    def __str__(self) -> str:
        counts = self.class_counts
        lines = [f"{self.num_images} images, {len(counts)} classes"]
        lines += [f"  {name}  {count}" for name, count in list(counts.items())[:20]]
        if len(counts) > 20:
            lines.append(f"  ... {min(counts.values())} to {max(counts.values())} images per class")
        lines += [f"  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  ... {count_problems(self.problems)}, see `report.problems`")
        return "\n".join(lines)


@checked
@dataclasses.dataclass(eq=False)
class ImageRecord:
    """One image and its boxes.

    Args:
        image: Path, encoded bytes, or array, as for `load_image`. None for an image in a TFDS
            file, which needs `info`.
        image_id: Unique name of the image.
        boxes: (n, 4), "xyxy" in pixels of the upright image; stored as float32.
        labels: (n,), 0 to num_classes - 1; stored as int32.
        difficult: (n,), objects that evaluation ignores. Default: none.
        info: Size and orientation of the image. Default: read from the image.

    Raises:
        ValueError: if the numbers of boxes and labels differ, or the image is unreadable.

    Example:
        >>> ImageRecord("cat.jpg", "cat", boxes=[[10, 20, 110, 220]], labels=[0])
    """

    image: str | os.PathLike | bytes | np.ndarray | None
    image_id: str
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray | None = None
    info: ImageInfo | None = None

    def __post_init__(self):
        if isinstance(self.image, os.PathLike):
            self.image = os.fspath(self.image)
        self.boxes = np.asarray(self.boxes, "float32").reshape(-1, 4)
        self.labels = np.asarray(self.labels, "int32")
        if self.difficult is None:
            self.difficult = np.zeros(len(self.boxes))
        self.difficult = np.asarray(self.difficult, bool)
        if not self.labels.shape == self.difficult.shape == (len(self.boxes),):
            raise ValueError(
                f"{self.image_id!r} needs as many labels and `difficult` as boxes. Received: "
                f"{len(self.boxes)} boxes, {self.labels.shape} labels, {self.difficult.shape}"
            )
        if self.info is None:
            if isinstance(self.image, str | bytes):
                self.info = read_image_info(self.image)
            else:
                self.info = ImageInfo(*load_image(self.image).shape[:2])

    @property
    def height(self) -> int:
        """Height of the upright image in pixels."""
        return self.info.height

    @property
    def width(self) -> int:
        """Width of the upright image in pixels."""
        return self.info.width


@checked
@dataclasses.dataclass(slots=True)
class LabeledImage:
    """One image and its class."""

    image: Any  # path, encoded bytes, or array, as for `load_image`
    image_id: str  # unique name of the image
    label: int  # 0 to num_classes - 1
    info: ImageInfo  # size and orientation of the image


# === Datasets ===


class ImageDataset:
    """Base class of the datasets. A subclass adds a `report` and `_annotation_loader`."""

    image_folder: str | None = None  # where the names of the image files start, if it was read

    def __init__(self, records: Sequence, class_names: Sequence[str]):
        self.records, self.class_names = list(records), check_class_names(class_names)
        if not self.records:
            raise ValueError("A dataset needs at least one image. Received: no records")

    @property
    def num_classes(self) -> int:
        """Number of classes, without background."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def images(self) -> Iterator:
        """Yields the images, in the order of `records`: paths, encoded bytes or arrays."""
        return (record.image for record in self.records)

    def __repr__(self) -> str:
        classes = f"{self.num_classes} classes: {', '.join(self.class_names[:10])}"
        return f"<{type(self).__name__.strip('_')}: {len(self)} images, {classes}>"

    @checked
    def as_dataset(
        self,
        shuffle: bool = False,
        seed: int | None = None,
        num_shards: int = 1,
        shard_index: int = 0,
    ):
        """Returns a `tf.data.Dataset` of single images and their annotations.

        TensorFlow decodes JPEG and PNG in parallel, to the same pixels as `load_image`; Pillow
        decodes what TensorFlow gets wrong (alpha, CMYK, 16 bits) or cannot read. EXIF orientation
        is applied. A corrupt file raises a TensorFlow error that names it when it is reached;
        `fit`, `evaluate` and callbacks turn it into a `ValueError`.

        Args:
            shuffle: Whether to shuffle the images, in a new order in every epoch.
            seed: Integer that makes the order repeatable.
            num_shards: As in `shard`.
            shard_index: As in `shard`.
        """
        import tensorflow as tf

        part = self.shard(num_shards, shard_index)
        indices = tf.data.Dataset.range(len(part))
        if shuffle:
            indices = indices.shuffle(len(part), seed=seed)
        load = part.element_loader()
        return indices.map(lambda i: check_readable(load(i)), num_parallel_calls=tf.data.AUTOTUNE)

    @checked
    def shard(self, num_shards: int, shard_index: int) -> "ImageDataset":
        """Returns one of several disjoint shards, for training on several machines.

        The shards are the same in every run, cover all images, differ in size by at most one
        image, and keep all class names. Their `report` lists the problems of the whole dataset. All
        shards yield the same number of training batches.

        Args:
            num_shards: Number of shards, at most the number of images.
            shard_index: Index of the shard, 0 to `num_shards - 1`.

        Raises:
            ValueError: if an argument is out of range.

        Example:
            >>> part = train.shard(num_shards=4, shard_index=worker)
        """
        if not 0 <= shard_index < num_shards:
            raise ValueError(
                "`shard_index` must be 0 to `num_shards - 1`. "
                f"Received: num_shards={num_shards}, shard_index={shard_index}"
            )
        if num_shards > len(self):
            raise ValueError(
                f"`num_shards` must be at most the number of images, {len(self)}. "
                f"Received: num_shards={num_shards}"
            )
        if num_shards == 1:
            return self
        part = self._part(num_shards, shard_index)
        part.smallest_shard = self.smallest_shard // num_shards
        part.identity, part.whole = self.identity, self.whole
        return part

    @checked
    def hold_out(self, fraction: float = 0.2, seed: int = 0) -> tuple:
        """Splits off a random part of the images, e.g. for testing.

        For classification, the part holds the same fraction of every class.

        Args:
            fraction: Fraction of the images to split off, above 0 and below 1.
            seed: Integer; the same seed draws the same images.

        Returns:
            (the remaining images, the images split off), both with all class names and the
            `report.problems` of the whole dataset.

        Raises:
            ValueError: if `fraction` is out of range, a part would be empty, or the dataset is
                from TFDS.

        Example:
            >>> train, test = dataset.hold_out(0.2, seed=1)
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be above 0 and below 1. Received: {fraction}")
        if self.element_loader() is None:
            raise ValueError('For TFDS, use splits such as "train[:80%]" and "train[80%:]"')
        remaining, held_out = [], []
        seen = collections.Counter()
        for i in np.random.default_rng(seed % 2**64).permutation(len(self)):
            record = self.records[i]
            group = getattr(record, "label", None)
            # Hold out round(n * fraction) of the n images of a group, evenly spread.
            count, seen[group] = seen[group], seen[group] + 1
            is_held_out = round((count + 1) * fraction) > round(count * fraction)
            (held_out if is_held_out else remaining).append(record)
        if not (remaining and held_out):
            raise ValueError(
                f"Too few images to hold out {fraction:g} of them: both parts need an image. "
                f"Received: {len(self)}"
            )
        return self.with_records(remaining), self.with_records(held_out)

    def element_loader(self):
        """Returns a function from the index of an image (int64 tensor) to its element and "error".

        Returns None for a dataset that can only be read sequentially. See `check_readable`.
        """
        import tensorflow as tf

        with tf.device("CPU:0"):  # keep these tables off the GPU
            image_ids = tf.constant([record.image_id for record in self.records])
            annotation = self._annotation_loader()
        read_image = image_reader(self.records)

        def load(index):
            image, error = read_image(index)
            element = {"images": image, "error": error, "image_id": image_ids[index]}
            return {**element, **annotation(index)}

        return load

    @functools.cached_property
    def identity(self) -> dict:
        """What tells this data from other data when a training is resumed; all shards have it."""
        contents = {
            "names of images": "\n".join(self._image_names()).encode(errors="surrogateescape"),
            "annotations of images": b"".join(self._annotations()),
        }
        sums = {name: f"checksum {zlib.crc32(content):08x}" for name, content in contents.items()}
        return {"class_names": self.class_names, "images": len(self), **sums}

    def fingerprint(self) -> str:
        """Returns a text that changes with every image, box and label, for names of caches."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for record in self.records:
            for field in dataclasses.fields(record):
                value = getattr(record, field.name)
                if field.name == "image" and isinstance(value, str):
                    status = os.stat(value)
                    value = status.st_size, status.st_mtime_ns
                is_array = isinstance(value, np.ndarray)
                digest.update(value.tobytes() if is_array else repr(value).encode())
        return digest.hexdigest()

    def _image_names(self) -> list[str]:
        return [record.image_id for record in self.records]

    @functools.cached_property
    def smallest_shard(self) -> int:
        """Number of images in the smallest shard; `len(self)` for an unsharded dataset."""
        return len(self)

    @functools.cached_property
    def whole(self) -> "ImageDataset":
        """The dataset that this is a shard of; the dataset itself if it is none."""
        return self

    def _part(self, num_shards: int, shard_index: int) -> "ImageDataset":
        return self.with_records(self.records[shard_index::num_shards])

    def with_records(self, records: list) -> "ImageDataset":
        """Returns a dataset of these records, with the classes and `report.problems` of this."""
        part = type(self)(records, self.class_names)
        part.report.problems = list(self.report.problems)
        part.image_folder = self.image_folder
        return part


@checked
class DetectionDataset(ImageDataset):
    """A detection dataset: annotations in memory, images read on demand.

    Args:
        records: List of `ImageRecord`, at least one.
        class_names: Names of the labels 0, 1, 2, ...
        report: `AnnotationReport`. Default: counted from the records.

    Raises:
        ValueError: if there is no record, a label has no class name, or a box has no area or
            extends beyond its image.

    Example:
        >>> records = [ImageRecord("cat.jpg", "cat", boxes=[[10, 20, 110, 220]], labels=[0])]
        >>> dataset = DetectionDataset(records, class_names=["cat"])
        >>> for element in dataset.as_dataset(shuffle=True, seed=1):
        ...     print(element["images"].shape, element["bounding_boxes"]["boxes"])
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        class_names: Sequence[str],
        report: AnnotationReport | None = None,
    ):
        super().__init__(records, class_names)
        for record in self.records:
            if np.any((record.labels < 0) | (record.labels >= self.num_classes)):
                raise ValueError(
                    f"Labels must be 0 to {self.num_classes - 1}. Received: "
                    f"{record.labels.tolist()} in {record.image_id!r}"
                )
        _check_boxes(self.records)
        self.report = report or summarize(self.records, self.class_names, [])

    def _annotations(self) -> Iterable[bytes]:
        for record in self.records:
            arrays = (record.boxes, record.labels, record.difficult)
            yield b"".join(array.tobytes() for array in arrays)

    def _annotation_loader(self):
        import tensorflow as tf

        counts = [0] + [len(record.boxes) for record in self.records]
        row_splits = tf.constant(np.cumsum(counts), tf.int64)
        columns = {
            name: tf.constant(np.concatenate([getattr(record, name) for record in self.records]))
            for name in ("boxes", "labels", "difficult")
        }

        def load(index):
            start, end = row_splits[index], row_splits[index + 1]
            return {"bounding_boxes": {name: rows[start:end] for name, rows in columns.items()}}

        return load


@checked
class ClassificationDataset(ImageDataset):
    """A classification dataset: labels in memory, images read on demand.

    Args:
        records: List of `LabeledImage`, at least one.
        class_names: Names of the labels 0, 1, 2, ...
        report: `ClassificationReport`. Default: counted from the records.

    Raises:
        ValueError: if there is no record, or a label has no class name.

    Example:
        >>> dataset = ClassificationDataset(records, class_names=["cat", "dog"])
        >>> train, test = dataset.hold_out()
    """

    def __init__(
        self,
        records: Sequence[LabeledImage],
        class_names: Sequence[str],
        report: ClassificationReport | None = None,
    ):
        super().__init__(records, class_names)
        labels = collections.Counter(record.label for record in self.records)
        if wrong := [label for label in labels if not 0 <= label < self.num_classes]:
            raise ValueError(f"Labels must be 0 to {self.num_classes - 1}. Received: {wrong}")
        counts = {name: labels[i] for i, name in enumerate(self.class_names)}
        self.report = report or ClassificationReport(counts)

    def _annotations(self) -> Iterable[bytes]:
        return [np.asarray([record.label for record in self.records], "int32").tobytes()]

    def _annotation_loader(self):
        import tensorflow as tf

        labels = tf.constant([record.label for record in self.records], tf.int32)
        return lambda index: {"labels": labels[index]}


def _check_boxes(records: Sequence[ImageRecord]) -> None:
    counts = [len(record.boxes) for record in records]
    boxes = np.concatenate([record.boxes for record in records])
    sizes = np.repeat([(record.width, record.height) for record in records], counts, axis=0)
    good = (boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= sizes)
    if not good.all():
        worst = int(np.argmin(good.all(axis=1)))
        record = records[np.repeat(np.arange(len(records)), counts)[worst]]
        raise ValueError(
            'Boxes must be "xyxy" in pixels, have an area, and be inside their image. Received: '
            f"{boxes[worst].tolist()} in {record.image_id!r} of {record.width} x {record.height}"
        )


# === Reading images ===


def image_reader(records: Sequence[ImageRecord]):
    """Returns a function for a tf.data graph: from the index of a record to its uint8 image.

    The function also returns why an image cannot be read, for `check_readable`, or "".
    """
    import tensorflow as tf

    by_tensorflow = [r.info.plain and isinstance(r.image, str) for r in records]
    with tf.device("CPU:0"):
        paths = tf.constant([r.image if isinstance(r.image, str) else "" for r in records])
        flags = tf.constant([orientation_flags(record.info.orientation) for record in records])
        is_plain = tf.constant(by_tensorflow)
    is_upright = all(record.info.orientation == 1 for record in records)

    def decode(index):
        image = decode_plain_image(tf.io.read_file(paths[index]))
        return image if is_upright else _turn_upright(image, flags[index])

    def with_pillow(index):
        return image_or_error(lambda i: load_image(records[i].image), [index])

    def with_tensorflow(index):
        return decode_or(with_pillow, decode, index)

    if all(by_tensorflow):
        return with_tensorflow
    if not any(by_tensorflow):
        return with_pillow
    return lambda i: tf.cond(is_plain[i], lambda: with_tensorflow(i), lambda: with_pillow(i))


def image_or_error(read, inputs: list):
    """In a graph, returns (`read(*inputs)`, ""), or a black pixel and why that raises."""
    import tensorflow as tf

    def load(*values):
        try:
            return read(*values), b""
        except ValueError as error:
            return np.zeros((1, 1, 3), "uint8"), str(error).encode(errors="surrogateescape")

    image, error = tf.numpy_function(load, inputs, (tf.uint8, tf.string))
    return tf.ensure_shape(image, (None, None, 3)), tf.ensure_shape(error, ())


def decode_or(otherwise, decode, source):
    """In a graph, returns (`decode(source)`, ""), or `otherwise(source)` if that raises."""
    import tensorflow as tf

    # Inside a graph, only tf.data can continue after an error.
    nothing = tf.data.Dataset.from_tensors(tf.zeros((0, 0, 3), tf.uint8))
    decoded = tf.data.Dataset.from_tensors(source).map(decode).ignore_errors()
    image = decoded.concatenate(nothing).take(1).get_single_element()
    return tf.cond(tf.size(image) > 0, lambda: (image, ""), lambda: otherwise(source))


def check_readable(element: dict) -> dict:
    """Returns an element of an `element_loader` without its "error", or raises that, in a graph.

    Call it after caching: a cache would lose an element that raises.
    """
    import tensorflow as tf

    element = dict(element)
    error = element.pop("error", "")
    check = tf.debugging.Assert(tf.equal(error, ""), [tf.strings.join([PREFIX, error])])
    with tf.control_dependencies([check]):
        return dict(element, images=tf.identity(element["images"]))


def decode_plain_image(encoded):
    """Decodes JPEG or PNG bytes (string tensor) to the uint8 RGB pixels that Pillow gives.

    The image must be plain, see `ImageInfo.plain`.
    """
    import tensorflow as tf

    # The op reads PNG too. TensorFlow's default for JPEG, a fast inverse cosine transform, differs
    # from Pillow, and so from `load_image` and `detect`, by up to 7 gray levels.
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    return tf.ensure_shape(image, (None, None, 3))


def _turn_upright(image, flags):
    import tensorflow as tf

    image = tf.cond(flags[0], lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    image = tf.cond(flags[1], lambda: image[:, ::-1], lambda: image)
    return tf.cond(flags[2], lambda: image[::-1], lambda: image)


# === Helpers of the readers ===


def summarize(
    records: Iterable[ImageRecord], class_names: Sequence[str], problems: list[Problem]
) -> AnnotationReport:
    records = list(records)
    labels = np.concatenate([record.labels for record in records])
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    return AnnotationReport(
        num_images=len(records),
        num_boxes=len(labels),
        class_counts=dict(zip(class_names, counts, strict=True)),
        num_difficult=int(sum(record.difficult.sum() for record in records)),
        num_empty_images=sum(len(record.boxes) == 0 for record in records),
        problems=problems,
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggests known names for an unknown one."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    by_case = [n for n in names if n.lower() == name.lower() and n not in close]
    if close or by_case:
        return f"Nearest: {', '.join(map(repr, by_case + close))}"
    return f"Known: {', '.join(map(repr, names[:20]))}{', ...' * (len(names) > 20)}"


def usable_boxes(boxes: np.ndarray, width: float, height: float) -> tuple[np.ndarray, list[str]]:
    """Clips boxes (n, 4) "xyxy" to an image of `width` and `height` in the same unit.

    Returns:
        The clipped boxes (n, 4), and for each "" (unchanged), "clipped", or the reason to drop it.
    """
    clipped = np.clip(boxes, 0, np.asarray([width, height, width, height], boxes.dtype))
    verdicts = []
    for box, inside in zip(boxes, clipped, strict=True):
        if not np.isfinite(box).all():
            verdicts.append("invalid coordinates")
        elif box[2] <= box[0] or box[3] <= box[1]:
            verdicts.append("degenerate box")
        elif inside[2] <= inside[0] or inside[3] <= inside[1]:
            verdicts.append("box outside the image")
        else:
            verdicts.append("" if np.array_equal(box, inside) else "clipped")
    return clipped, verdicts


def without_difficult(record: ImageRecord) -> ImageRecord:
    keep = ~record.difficult
    rows = {name: getattr(record, name)[keep] for name in ("boxes", "labels", "difficult")}
    return dataclasses.replace(record, **rows)


def count_problems(problems: list[Problem]) -> str:
    counts = collections.Counter(problem.what for problem in problems)
    return ", ".join(f"{count} x {what}" for what, count in counts.items()) or "no images"
