"""Readers of TensorFlow Datasets, for detection and classification."""

import collections
import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_resnest.checks import check_class_names, check_counts, checked
from keras_resnest.data.dataset import (
    AnnotationReport,
    ClassificationDataset,
    ClassificationReport,
    DetectionDataset,
    ImageRecord,
    LabeledImage,
    Problem,
    check_readable,
    decode_or,
    decode_plain_image,
    image_or_error,
    nearest,
    summarize,
    usable_boxes,
    without_difficult,
)
from keras_resnest.images import ImageInfo, load_image, orientation_flags, read_image_info


@checked
def read_tfds(
    name_or_builder: Any,
    split: str,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    use_difficult: bool = True,
    download: bool = True,
) -> DetectionDataset:
    """Reads a detection dataset of TensorFlow Datasets, such as "voc/2007" or "coco/2017".

    The dataset needs a feature `image` and a sequence `objects` of `bbox` (relative yxyx) and
    `label`; `is_difficult` (VOC) or `is_crowd` (COCO) become `difficult`. Images stay in the TFDS
    files and are decoded as by TFDS: without EXIF rotation and alpha. `records` hold no pixels;
    they and the `report` are read on first use. Boxes without area are dropped.

    Args:
        name_or_builder: Name of a dataset, e.g. "shapes", or a `tfds.core.DatasetBuilder`.
        split: Such as "train", "test[:10%]" or "train+validation".
        class_names: Names of the labels 0, 1, 2, ..., including all classes of the dataset.
            Default: as in the dataset.
        data_dir: Folder of prepared datasets. Default: `TFDS_DATA_DIR` or "~/tensorflow_datasets".
        use_difficult: Whether to keep objects marked as difficult.
        download: Whether to download or generate a dataset that is not in `data_dir`.

    Raises:
        ValueError: if there is no such dataset or split, it is not a detection dataset, a class is
            not in `class_names`, or it is not in `data_dir` and `download` is False.
        ConnectionError: if the download server cannot be reached.

    Example: `train = read_tfds("voc/2007", split="train+validation")`
    """
    builder = _builder(name_or_builder, data_dir)
    _label_names(builder)  # do not download an unusable dataset
    _prepare(builder, download)
    names = _label_names(builder)  # COCO's names are known only now
    return _TfdsDataset(builder, split, names, class_names, use_difficult)


@checked
def read_tfds_classification(
    name_or_builder: Any,
    split: str,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
) -> ClassificationDataset:
    """Reads a classification dataset of TensorFlow Datasets, e.g. "imagenet2012" or "cifar10".

    The dataset needs the features `image` and `label`. Images stay in the TFDS files; gray ones
    become RGB. `records` is empty, and `report` is counted on each access.

    Arguments as in `read_tfds`.

    Example: `train = read_tfds_classification("cifar10", split="train")`
    """
    import tensorflow_datasets as tfds

    builder = _builder(name_or_builder, data_dir)
    features = dict(builder.info.features.items())
    label = features.get("label")
    is_image = isinstance(features.get("image"), tfds.features.Image)
    if not is_image or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{builder.info.full_name} is not a classification dataset. Expected: `image` (Image) "
            f"and `label` (ClassLabel). Received: {', '.join(features)}"
        )
    _prepare(builder, download)
    return _TfdsClassification(builder, split, _names_of(label), class_names or None)


def tfds_splits(name: str) -> list[str]:
    """Names of the splits of a dataset on disk that have objects in the first 100 images."""
    builder = _builder(name, data_dir=None)
    _prepare(builder, download=False)
    names = _label_names(builder)

    def has_objects(split):
        examples = _TfdsDataset(builder, split, names, None)._examples().take(100)
        return any(len(example["label"]) for example in examples.as_numpy_iterator())

    splits = builder.info.splits
    return sorted(name for name in splits if splits[name].num_examples and has_objects(name))


def _builder(name_or_builder: Any, data_dir: str | os.PathLike | None):
    """Returns a builder, or creates it from a name; a `ValueError` suggests known names."""
    import tensorflow_datasets as tfds

    if isinstance(name_or_builder, tfds.core.DatasetBuilder):
        if data_dir is not None:
            raise ValueError(f"A builder has its own `data_dir`. Received: data_dir={data_dir}")
        return name_or_builder
    from keras_resnest.data import shapes  # noqa: F401 (registers "shapes")

    name = name_or_builder
    if not isinstance(name, str):
        raise ValueError(f"`name_or_builder` must be a name or a builder. Received: {name!r}")
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(re.split("[/:]", name)[0], known)
        raise ValueError(f"TFDS has no dataset {name!r}. {hint}") from error


def _label_names(builder) -> list[str]:
    """Class names of a detection dataset; raises ValueError for other datasets."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    try:
        image, objects = features["image"], features["objects"].feature
        label, box_format = objects["label"], objects["bbox"].bbox_format.value
    except (KeyError, TypeError, AttributeError):
        image = label = box_format = None
    if (
        not isinstance(image, tfds.features.Image)
        or image.dtype != np.uint8
        or not isinstance(label, tfds.features.ClassLabel)
        or box_format != "REL_YXYX"
    ):
        raise ValueError(
            f"{builder.info.full_name} is not a detection dataset. Expected: `image` (Image) and "
            "`objects`, a sequence of `bbox` (BBoxFeature, relative yxyx) and `label` "
            f"(ClassLabel). Received: {features}"
        )
    return _names_of(label)


def _names_of(label) -> list[str]:
    return list(label.names or map(str, range(label.num_classes)))


def _prepare(builder, download: bool) -> None:
    """Downloads or generates a dataset that is not on disk; fails at once without a network."""
    import tensorflow_datasets as tfds

    if builder.data_path.exists():
        return
    if not download:
        raise ValueError(
            f"{builder.info.full_name} is not in {builder.data_dir}, and `download` is False"
        )
    _check_hosts(builder)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _check_hosts(builder) -> None:
    """Raises `ConnectionError` if no download server has an address: TFDS retries for minutes."""
    import socket
    import urllib.parse
    import urllib.request

    hosts = {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or ()} - {None}
    if not hosts or urllib.request.getproxies():  # a proxy resolves names itself
        return
    for host in sorted(hosts):
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return
    raise ConnectionError(
        f"{builder.info.full_name} is not in {builder.data_dir} and cannot be downloaded: no "
        f"address found for {', '.join(sorted(hosts))}. Check the network"
    )


class _TfdsSplit:
    """A split of a prepared TFDS dataset; the part that detection and classification share."""

    def __init__(self, builder, split, label_names, class_names, use_difficult=True):
        names = label_names if class_names is None else check_class_names(class_names)
        self.class_names, self._label_names = list(names), label_names
        self._builder, self._split, self._use_difficult = builder, split, use_difficult
        for name in label_names:
            if name not in names:
                raise ValueError(
                    f"{builder.info.full_name} has the class {name!r}, which is not in "
                    f"`class_names`. {nearest(name, names)}"
                )
        self._label_map = np.asarray([self.class_names.index(n) for n in label_names], "int32")
        try:
            self._size = builder.info.splits[split].num_examples
        except (KeyError, ValueError, AssertionError) as error:
            raise ValueError(
                f"`split` must be one of {', '.join(builder.info.splits)}, or a slice of them. "
                f"Received: {split!r}"
            ) from error
        if not self._size:
            raise ValueError(f"The split {split!r} of {builder.info.full_name} is empty")

    def __len__(self) -> int:
        return self._size

    def as_dataset(self, shuffle=False, seed=None, num_shards=1, shard_index=0):
        part = self.shard(num_shards, shard_index)
        return part.unchecked_elements(shuffle, seed).map(check_readable)

    as_dataset.__doc__ = DetectionDataset.as_dataset.__doc__

    def unchecked_elements(self, shuffle: bool = False, seed: int | None = None):
        """`tf.data.Dataset` of elements with an "error", see `check_readable`."""
        import tensorflow as tf

        examples = self._examples(shuffle, seed)
        if shuffle:
            examples = examples.shuffle(min(len(self), self._shuffle_buffer), seed=seed)

        def decode(example):
            image, error = decode_or(
                self._with_pillow, lambda e: decode_plain_image(e["image"]), example
            )
            return {**self._to_element(dict(example, image=image)), "error": error}

        return examples.map(decode, num_parallel_calls=tf.data.AUTOTUNE)

    def _with_pillow(self, example):
        names = example.get("image_id", example["tfds_id"]), example["tfds_id"]
        return image_or_error(functools.partial(self._read, load_image), [example["image"], *names])

    def _read(self, read, encoded: bytes, image_id: bytes, tfds_id: bytes):
        """Returns `read(encoded)`; if that raises, names the image, its file and record."""
        try:
            return read(encoded)
        except ValueError as error:
            name, split = self._builder.info.full_name, str(self._split)
            raise ValueError(
                f"Cannot read the image {image_id.decode()!r} of {name}, split {split!r}, record "
                f"{tfds_id.decode()}: {error.__cause__ or error}"
            ) from error

    def element_loader(self):
        return None  # TFDS files are read sequentially

    def images(self) -> Iterator[bytes]:
        return (example["image"] for example in self._arrays(self._examples()))

    def _arrays(self, examples) -> Iterator:
        """Examples as arrays; a damaged file raises `ValueError`."""
        import tensorflow as tf

        try:
            yield from examples.as_numpy_iterator()
        except tf.errors.OpError as error:
            for part in self._builder.info.splits[self._split].file_instructions:
                count = 0
                with contextlib.suppress(tf.errors.OpError):
                    for _ in tf.data.TFRecordDataset(part.filename):
                        count += 1
                if count < part.examples_in_shard:
                    raise ValueError(
                        f"{part.filename} is damaged or missing: {count} of its "
                        f"{part.examples_in_shard} records can be read. Prepare the dataset again"
                    ) from error
            raise

    def fingerprint(self) -> str:
        names = self._builder.info.full_name, str(self._split), self.class_names
        return repr((*names, self._label_names, self._use_difficult))

    def _image_names(self) -> list[str]:
        return [self._builder.info.full_name, str(self._split)]  # reading all ids takes minutes

    def _annotations(self) -> tuple:
        return ()  # the name has a version

    def _part(self, num_shards: int, shard_index: int):
        import tensorflow_datasets as tfds

        split = tfds.even_splits(self._split, num_shards)[shard_index]
        names = self._label_names, self.class_names
        return type(self)(self._builder, split, *names, self._use_difficult)

    def _examples(self, shuffle: bool = False, seed: int | None = None):
        """`tf.data.Dataset` of the examples, with encoded images."""
        import tensorflow_datasets as tfds

        return self._builder.as_dataset(
            split=self._split,
            shuffle_files=shuffle,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(shuffle_seed=seed, add_tfds_id=True, try_autocache=False),
        )


class _TfdsClassification(_TfdsSplit, ClassificationDataset):
    """A split of a classification dataset."""

    _shuffle_buffer = 10_000
    records: list[LabeledImage] = []

    @property
    def report(self) -> ClassificationReport:
        labels = self._examples().map(lambda example: example["label"])
        counts = collections.Counter(int(label) for label in self._arrays(labels))
        named = {self._label_names[i]: count for i, count in counts.items()}
        return ClassificationReport({name: named.get(name, 0) for name in self.class_names})

    def _to_element(self, example):
        import tensorflow as tf

        return {
            "images": example["image"],
            "image_id": example["tfds_id"],
            "labels": tf.gather(self._label_map, example["label"]),
        }


class _TfdsDataset(_TfdsSplit, DetectionDataset):
    """A split of a detection dataset."""

    _shuffle_buffer = 2048  # encoded images: about 300 MB for COCO

    @property
    def records(self) -> list[ImageRecord]:
        return self._records_and_report[0]

    @property
    def report(self) -> AnnotationReport:
        return self._records_and_report[1]

    def _examples(self, shuffle: bool = False, seed: int | None = None):
        """Encoded images, ids, relative yxyx boxes, labels and difficult."""
        import tensorflow as tf

        features = self._builder.info.features
        objects = features["objects"].feature
        difficult = next((key for key in ("is_difficult", "is_crowd") if key in objects), None)
        id_keys = ("image/filename", "filename", "image/id", "image_id", "id")
        id_key = next((key for key in id_keys if key in features), "tfds_id")

        def select(example):
            image_id, rows = example[id_key], example["objects"]
            is_text = image_id.dtype == tf.string
            hard = rows[difficult] if difficult else tf.zeros_like(rows["label"])
            return {
                "image": example["image"],
                "tfds_id": example["tfds_id"],
                "image_id": image_id if is_text else tf.strings.as_string(image_id),
                "bbox": rows["bbox"],
                "label": rows["label"],
                "difficult": tf.cast(hard, tf.bool),
            }

        return super()._examples(shuffle, seed).map(select)

    def _to_element(self, example):
        import tensorflow as tf

        image = example["image"]  # (h, w, 3)
        boxes = tf.clip_by_value(tf.gather(example["bbox"], (1, 0, 3, 2), axis=1), 0.0, 1.0)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if not self._use_difficult:
            keep &= ~example["difficult"]
        size = tf.cast(tf.shape(image), tf.float32)
        boxes *= tf.stack([size[1], size[0], size[1], size[0]])  # (n, 4) xyxy pixels
        labels = tf.gather(self._label_map, example["label"])
        bounding_boxes = {"boxes": boxes, "labels": labels, "difficult": example["difficult"]}
        return {
            "images": image,
            "image_id": example["image_id"],
            "bounding_boxes": {key: value[keep] for key, value in bounding_boxes.items()},
        }

    @functools.cached_property
    def _records_and_report(self) -> tuple[list[ImageRecord], AnnotationReport]:
        problems: list[Problem] = []
        records = [self._record(example, problems) for example in self._arrays(self._examples())]
        return records, summarize(records, self.class_names, problems)

    def _record(self, example, problems: list[Problem]) -> ImageRecord:
        names = example["image_id"], example["tfds_id"]
        info = self._read(read_image_info, example["image"], *names)
        # TFDS ignores the EXIF orientation.
        is_turned = orientation_flags(info.orientation)[0]
        height, width = (info.width, info.height) if is_turned else (info.height, info.width)
        boxes, verdicts = usable_boxes(example["bbox"][:, [1, 0, 3, 2]], 1.0, 1.0)
        image_id, labels = example["image_id"].decode(), self._label_map[example["label"]]
        keep = np.asarray([verdict in ("", "clipped") for verdict in verdicts], bool)
        for box, label, verdict in zip(example["bbox"], labels, verdicts, strict=True):
            detail = f"{self.class_names[label]} {box.tolist()} (relative yxyx)"
            if verdict == "clipped":
                problems.append(Problem(image_id, "box across the border", "clipped", detail))
            elif verdict:
                problems.append(Problem(image_id, verdict, "dropped", detail))
        record = ImageRecord(
            image=None,
            image_id=image_id,
            boxes=boxes[keep] * np.asarray([width, height, width, height], "float32"),
            labels=labels[keep],
            difficult=example["difficult"][keep],
            info=ImageInfo(height, width),
        )
        return record if self._use_difficult else without_difficult(record)


@checked
def read_shapes(
    split: str = "train",
    size: int = 192,
    num_train: int = 1600,
    num_validation: int = 200,
    num_test: int = 200,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
):
    """Returns the Shapes dataset, a `DetectionDataset` of six classes; draws it on first use.

    Args:
        split: "train", "validation", "test", or a slice such as "train[:50]".
        size: Side of the images in pixels.
        num_train: Number of training images.
        num_validation: Number of validation images.
        num_test: Number of test images.
        seed: Seed of all random numbers.
        data_dir: Folder to store it in. Default: as in `read_tfds`.

    Example: `train = read_shapes("train", size=320, num_train=200, data_dir="/tmp/shapes")`
    """
    from keras_resnest.data.shapes import Shapes, ShapesConfig

    counts = {"num_train": num_train, "num_validation": num_validation, "num_test": num_test}
    check_counts(size=size, **counts)
    config = ShapesConfig(size=size, seed=seed, **counts)
    # Prefer a predefined configuration with the same values.
    known = (c for c in Shapes.BUILDER_CONFIGS if c.numbers == config.numbers)
    return read_tfds(Shapes(config=next(known, config), data_dir=data_dir), split)
