"""Reader of TensorFlow Datasets."""

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_resnest.checks import check_class_names
from keras_resnest.data.dataset import (
    AnnotationReport,
    DetectionDataset,
    ImageRecord,
    Problem,
    decode_plain_image,
    nearest,
    summarize,
    usable_boxes,
    without_difficult,
)
from keras_resnest.images import ImageInfo, orientation_flags, read_image_info


def read_tfds(
    name_or_builder: Any,
    split: str,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    use_difficult: bool = True,
    download: bool = True,
) -> DetectionDataset:
    """Reads a detection dataset of TensorFlow Datasets, e.g. "voc/2007" or "coco/2017".

    It needs a feature `image` and a sequence `objects` of `bbox` (relative yxyx) and `label`;
    `is_difficult` (VOC) or `is_crowd` (COCO) of an object become `difficult`. The images stay in
    the TFDS files, decoded as TFDS does: EXIF orientation is not applied and alpha is dropped. So
    `records` hold no pixels; they and the `report` are read on first use, in one pass over the
    files. Boxes without area are dropped.

    Args:
        name_or_builder: Name of a dataset ("shapes" is the one of this package), or a
            `tfds.core.DatasetBuilder`.
        split: E.g. "train", "test[:10%]" or "train+validation".
        class_names: Names of the labels 0, 1, 2, ...: all names of the dataset in the order
            wanted, and possibly more. Default: as in the dataset.
        data_dir: Folder of prepared datasets. Default: that of TFDS (`TFDS_DATA_DIR`, or
            "~/tensorflow_datasets").
        use_difficult: Keep boxes marked as difficult; False leaves them out.
        download: Download or generate the dataset where `data_dir` has not got it. Nothing is
            fetched from Google Cloud Storage.

    Returns:
        `DetectionDataset`.

    Raises:
        ValueError: No such dataset or split, not a detection dataset, a class is not in
            `class_names`, or it is not in `data_dir` and `download` is False.
        ConnectionError: It must be downloaded and its server is unknown or not to be reached
            (found out at once, while TFDS itself would try for minutes).

    Example: `train = read_tfds("voc/2007", split="train+validation")`
    """
    import tensorflow_datasets as tfds

    if isinstance(name_or_builder, tfds.core.DatasetBuilder):
        if data_dir is not None:
            raise ValueError(f"A builder has its own `data_dir`. Received: data_dir={data_dir}")
        builder = name_or_builder
    else:
        builder = tfds_builder(name_or_builder, data_dir)
    _tfds_label_names(builder)  # nothing is downloaded that cannot be used
    prepare(builder, download)
    label_names = _tfds_label_names(builder)  # COCO's names are known only now
    if class_names is not None:
        class_names = check_class_names(class_names)
        for name in label_names:
            if name not in class_names:
                raise ValueError(
                    f"{builder.info.full_name} has the class {name!r}, which is not in "
                    f"`class_names`. {nearest(name, class_names)}"
                )
    return _TfdsDataset(builder, split, label_names, class_names or label_names, use_difficult)


def tfds_splits(name: str) -> list[str]:
    """Names of the splits of a dataset that is on disk."""
    builder = tfds_builder(name, data_dir=None)
    prepare(builder, download=False)
    return sorted(builder.info.splits)


def tfds_builder(name: str, data_dir: str | os.PathLike | None):
    """Builder of a TFDS dataset by name; a ValueError names the nearest ones."""
    import tensorflow_datasets as tfds

    from keras_resnest.data import shapes  # noqa: F401 (the import registers "shapes")

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(re.split("[/:]", name)[0], known)
        raise ValueError(f"TFDS has no dataset {name!r}. {hint}") from error


def _tfds_label_names(builder) -> list[str]:
    """Class names of a detection dataset; a ValueError says what another one lacks."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    objects = getattr(features.get("objects"), "feature", None)
    objects = dict(objects.items()) if isinstance(objects, tfds.features.FeaturesDict) else {}
    is_detection = (
        isinstance(features.get("image"), tfds.features.Image)
        and features["image"].dtype == np.uint8
        and "bbox" in objects
        and getattr(objects["bbox"], "bbox_format", None) is not None
        and objects["bbox"].bbox_format.value == "REL_YXYX"
        and isinstance(objects.get("label"), tfds.features.ClassLabel)
    )
    if not is_detection:
        raise ValueError(
            f"{builder.info.full_name} is not a detection dataset. Wanted: `image` (Image) and "
            "`objects`, a sequence of `bbox` (BBoxFeature, relative yxyx) and `label` "
            "(ClassLabel). "
            f"Received: {', '.join(features)}; objects: {', '.join(objects) or 'none'}"
        )
    label = objects["label"]
    return list(label.names or map(str, range(label.num_classes)))


def prepare(builder, download: bool) -> None:
    """Makes sure that the dataset is on disk; fails at once without a network."""
    import tensorflow_datasets as tfds

    if builder.data_path.exists():
        return
    if not download:
        raise ValueError(
            f"{builder.info.full_name} is not in {builder.data_dir}, and `download` is False"
        )
    _check_hosts(builder)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


def _check_hosts(builder) -> None:
    """Fails at once where no server of the downloads has an address: TFDS retries for minutes."""
    import socket
    import urllib.parse
    import urllib.request

    hosts = {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or ()} - {None}
    if not hosts or urllib.request.getproxies():  # a proxy looks the names up itself
        return
    for host in sorted(hosts):
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            continue
    raise ConnectionError(
        f"{builder.info.full_name} is not in {builder.data_dir} and cannot be downloaded: no "
        f"address found for {', '.join(sorted(hosts))}. Is there a network?"
    )


def split_size(builder, split: str) -> int:
    """Number of images in a split of a prepared dataset, which must have some."""
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(
            f"`split` must be one of {', '.join(builder.info.splits)}, or a part of them. "
            f"Received: {split!r}"
        ) from error
    if not size:
        raise ValueError(f"The split {split!r} of {builder.info.full_name} is empty")
    return size


class _TfdsDataset(DetectionDataset):
    """A split of a prepared TFDS dataset."""

    def __init__(self, builder, split, label_names, class_names, use_difficult):
        self.class_names = list(class_names)
        self._builder, self._split, self._use_difficult = builder, split, use_difficult
        self._label_names = label_names
        self._label_map = np.asarray([self.class_names.index(n) for n in label_names], "int32")
        self._size = split_size(builder, split)

    def __len__(self) -> int:
        return self._size

    @property
    def records(self) -> list[ImageRecord]:
        return self._records_and_report[0]

    @property
    def report(self) -> AnnotationReport:
        return self._records_and_report[1]

    def as_dataset(self, shuffle=False, seed=None, num_shards=1, shard_index=0):
        import tensorflow as tf

        part = self.shard(num_shards, shard_index)
        examples = part._examples(shuffle, seed)
        if shuffle:  # encoded images: of COCO about 300 MB
            examples = examples.shuffle(min(len(part), 2048), seed=seed)
        return examples.map(self._to_element, num_parallel_calls=tf.data.AUTOTUNE)

    as_dataset.__doc__ = DetectionDataset.as_dataset.__doc__

    def _part(self, num_shards: int, shard_index: int) -> DetectionDataset:
        import tensorflow_datasets as tfds

        return _TfdsDataset(
            self._builder,
            tfds.even_splits(self._split, num_shards)[shard_index],
            self._label_names,
            self.class_names,
            self._use_difficult,
        )

    def element_loader(self):
        return None  # the files of TFDS are read from their beginning

    def _examples(self, shuffle: bool, seed: int | None):
        """Encoded image, id, relative yxyx boxes, TFDS labels and `difficult`, unbatched."""
        import tensorflow_datasets as tfds

        features = self._builder.info.features
        objects = features["objects"].feature
        hard = next((key for key in ("is_difficult", "is_crowd") if key in objects), None)
        id_keys = ("image/filename", "filename", "image/id", "image_id", "id")
        id_key = next((key for key in id_keys if key in features), "tfds_id")

        def select(example):
            return _tfds_example(example, id_key, hard)

        examples = self._builder.as_dataset(
            split=self._split,
            shuffle_files=shuffle,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(
                shuffle_seed=seed, add_tfds_id=id_key == "tfds_id", try_autocache=False
            ),
        )
        return examples.map(select)

    def _to_element(self, example):
        import tensorflow as tf

        image = decode_plain_image(example["image"])
        boxes = tf.clip_by_value(tf.gather(example["bbox"], (1, 0, 3, 2), axis=1), 0.0, 1.0)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if not self._use_difficult:
            keep &= ~example["difficult"]
        size = tf.cast(tf.shape(image), tf.float32)
        boxes *= tf.stack([size[1], size[0], size[1], size[0]])
        labels = tf.gather(self._label_map, example["label"])
        bounding_boxes = {"boxes": boxes, "labels": labels, "difficult": example["difficult"]}
        return {
            "images": image,
            "image_id": example["image_id"],
            "bounding_boxes": {key: value[keep] for key, value in bounding_boxes.items()},
        }

    @functools.cached_property
    def _records_and_report(self) -> tuple[list[ImageRecord], AnnotationReport]:
        records, problems = [], []
        for example in self._examples(shuffle=False, seed=None).as_numpy_iterator():
            records.append(self._record(example, problems))
        return records, summarize(records, self.class_names, problems)

    def _record(self, example, problems: list[Problem]) -> ImageRecord:
        info = read_image_info(example["image"])
        # TFDS leaves images as they are stored.
        is_turned = orientation_flags(info.orientation)[0]
        height, width = (info.width, info.height) if is_turned else (info.height, info.width)
        boxes, verdicts = usable_boxes(example["bbox"][:, [1, 0, 3, 2]], 1.0, 1.0)
        image_id, labels = example["image_id"].decode(), self._label_map[example["label"]]
        keep = np.asarray([verdict in ("", "clipped") for verdict in verdicts], bool)
        for box, label, verdict in zip(example["bbox"], labels, verdicts, strict=True):
            if verdict:
                detail = f"{self.class_names[label]} {box.tolist()} (relative yxyx)"
                action = "clipped" if verdict == "clipped" else "dropped"
                what = "box across the border" if verdict == "clipped" else verdict
                problems.append(Problem(image_id, what, action, detail))
        record = ImageRecord(
            image=None,
            image_id=image_id,
            boxes=boxes[keep] * np.asarray([width, height, width, height], "float32"),
            labels=labels[keep],
            difficult=example["difficult"][keep],
            info=ImageInfo(height, width),
        )
        return record if self._use_difficult else without_difficult(record)


def _tfds_example(example: dict, id_key: str, difficult_key: str | None) -> dict:
    import tensorflow as tf

    image_id, objects = example[id_key], example["objects"]
    if image_id.dtype != tf.string:
        image_id = tf.strings.as_string(image_id)
    if difficult_key is None:
        difficult = tf.zeros(tf.shape(objects["label"]), tf.bool)
    else:
        difficult = tf.cast(objects[difficult_key], tf.bool)
    return {
        "image": example["image"],
        "image_id": image_id,
        "bbox": objects["bbox"],
        "label": objects["label"],
        "difficult": difficult,
    }


def read_shapes(
    split: str = "train",
    size: int = 192,
    num_train: int = 1600,
    num_validation: int = 200,
    num_test: int = 200,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
):
    """Draws the Shapes dataset, or reads it where it has been drawn before.

    Args:
        split: "train", "validation" or "test", or parts like "train[:50]".
        size: Side of the images in pixels.
        num_train: Images of the split "train".
        num_validation: Images of the split "validation".
        num_test: Images of the split "test".
        seed: Start of all random numbers; another one gives other images.
        data_dir: Folder to keep it in. Default: that of TFDS (`TFDS_DATA_DIR`, or
            "~/tensorflow_datasets").

    Returns:
        `DetectionDataset` with six classes.

    Example: `train = read_shapes("train", size=320, num_train=200, data_dir="/tmp/shapes")`
    """
    from keras_resnest.data.shapes import Shapes, ShapesConfig

    config = ShapesConfig(
        size=size,
        num_train=num_train,
        num_validation=num_validation,
        num_test=num_test,
        seed=seed,
    )
    # A ready-made configuration of the same numbers is the same dataset.
    known = (c for c in Shapes.BUILDER_CONFIGS if c.numbers == config.numbers)
    return read_tfds(Shapes(config=next(known, config), data_dir=data_dir), split)
