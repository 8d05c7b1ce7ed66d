"""Readers of classification data: folders with one folder per class, and TensorFlow Datasets."""

import collections
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from keras_resnest.checks import check_class_names
from keras_resnest.data.classification_dataset import (
    ClassificationDataset,
    ClassificationReport,
    LabeledImage,
)
from keras_resnest.data.dataset import count_problems, decode_plain_image, nearest
from keras_resnest.data.readers.common import Faults, FileError
from keras_resnest.data.readers.tfds import prepare, split_size, tfds_builder
from keras_resnest.images import IMAGE_SUFFIXES, ImageInfo, read_image_info

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


# === Folders ===


def read_image_folder(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
) -> ClassificationDataset:
    """Reads a folder that holds a folder of images for each class, as for ImageNet.

    Subfolders of class folders are searched too. Files without an image suffix and files outside
    the class folders are reported and skipped; names that start with a dot are ignored. A
    `UserWarning` summarizes the problems.

    Args:
        folder: Folder of the dataset.
        split: Subfolder of `folder` that holds the class folders, such as "train". Default:
            `folder` itself holds them.
        class_names: Names of the labels 0, 1, 2, ... Default: the sorted names of the class
            folders.
        on_error: How to handle an unreadable image, and a class folder that is not in
            `class_names`: "raise" a ValueError that names the file, or "skip" and report it.

    Returns:
        `ClassificationDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: if the folder or split does not exist or holds no class folders or images, or
            for the reasons under `on_error`.

    Example:
        ```python
        train = read_image_folder("flowers", "train")
        val = read_image_folder("flowers", "val", train.class_names)
        print(val.report)
        ```
    """
    faults = Faults(on_error)
    folder = _split_folder(Path(folder), split)
    class_folders = _class_folders(folder, split, faults)
    names = check_class_names(class_names or [path.name for path in class_folders])
    records = _read_records(folder, _labeled_paths(class_folders, names, faults), faults)
    if not records:
        raise ValueError(f"No usable image in {folder}: {count_problems(faults.problems)}")
    counts = collections.Counter(record.label for record in records)
    for i, name in enumerate(names):
        if not counts[i] and class_names is None:
            faults.add(name, "class without images", "kept as a class")
    if faults.problems:
        warnings.warn(
            f"{folder}: {count_problems(faults.problems)}. See the `report` of the dataset",
            stacklevel=2,
        )
    class_counts = {name: counts[i] for i, name in enumerate(names)}
    return ClassificationDataset(
        records, names, ClassificationReport(class_counts, faults.problems)
    )


def _split_folder(folder: Path, split: str | None) -> Path:
    if not folder.is_dir():
        kind = "it is a file" if folder.exists() else "no such folder"
        raise ValueError(f"`folder` must be a folder. Received: {folder} ({kind})")
    if split is None:
        return folder
    if not (folder / split).is_dir():
        known = [path.name for path in _visible(folder) if path.is_dir()]
        raise ValueError(
            f"`split` must be a folder in {folder}. Received: {split!r}. {nearest(split, known)}"
        )
    return folder / split


def _class_folders(folder: Path, split: str | None, faults: Faults) -> list[Path]:
    """The class folders, sorted; reports files beside them."""
    found = _visible(folder)
    class_folders = [path for path in found if path.is_dir()]
    names = [path.name for path in class_folders]
    if not names:
        raise ValueError(
            f"{folder} must hold one folder of images for each class. Received: "
            f"{len(found)} files and no folder"
        )
    if split is None and {name.lower() for name in names} <= _SPLIT_NAMES:
        raise ValueError(
            f"`split` must be given if folders are named {', '.join(names)}, and hold the "
            f"class folders. Received: split=None for {folder}"
        )
    for path in found:
        if not path.is_dir():
            faults.add(path, "file outside of the class folders", "left out")
    return class_folders


def _labeled_paths(
    class_folders: list[Path], names: list[str], faults: Faults
) -> list[tuple[Path, int]]:
    """Path and label of every image."""
    pairs = []
    for folder in class_folders:
        with faults.skipping_image():
            if folder.name not in names:
                detail = f"not in `class_names`. {nearest(folder.name, names)}"
                raise FileError(folder, "unknown class", detail)
            label = names.index(folder.name)
            pairs += [(path, label) for path in _images(folder, faults)]
    return pairs


def _images(folder: Path, faults: Faults) -> Iterator[Path]:
    """All images of a class, sorted by name."""
    for path in _visible(folder):
        if path.is_dir():
            # Links to folders could form a cycle.
            yield from () if path.is_symlink() else _images(path, faults)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path
        else:
            faults.add(path, "not an image", "left out", f"in {folder.name}")


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_records(
    folder: Path, labeled_paths: list[tuple[Path, int]], faults: Faults
) -> list[LabeledImage]:
    records = []
    paths = [path for path, _ in labeled_paths]
    with ThreadPoolExecutor(16) as pool:  # most of the time is spent waiting for the disk
        infos = pool.map(_info_or_error, paths)
        for (path, label), info in zip(labeled_paths, infos, strict=True):
            with faults.skipping_image():
                if isinstance(info, FileError):
                    raise info
                image_id = path.relative_to(folder).as_posix()
                records.append(LabeledImage(str(path), image_id, label, info))
    return records


def _info_or_error(path: Path) -> ImageInfo | FileError:
    try:
        return read_image_info(path)
    except ValueError as error:
        return FileError(path, "unreadable image", str(error))


# === TensorFlow Datasets ===


def read_tfds_classification(
    name_or_builder: Any,
    split: str,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
) -> ClassificationDataset:
    """Reads a classification dataset of TensorFlow Datasets, e.g. "imagenet2012" or "cifar10".

    The dataset needs the features `image` and `label`. Images stay in the TFDS files; gray ones
    become RGB. `records` is empty, and `report` is counted on first use.

    Args:
        name_or_builder: Name of a dataset, or a `tfds.core.DatasetBuilder`.
        split: E.g. "train", "test[:10%]".
        class_names: Names of the labels 0, 1, 2, ...; must include all class names of the
            dataset. Default: those of the dataset.
        data_dir: Folder of prepared datasets. Default: that of TFDS (`TFDS_DATA_DIR`, or
            "~/tensorflow_datasets").
        download: Download or generate the dataset if it is not in `data_dir`.

    Returns:
        `ClassificationDataset`.

    Raises:
        ValueError: if the dataset or split does not exist, it is not a classification dataset, a
            class is not in `class_names`, or it is not in `data_dir` and `download` is False.
        ConnectionError: if it must be downloaded and its server is unreachable.

    Example: `train = read_tfds_classification("cifar10", split="train")`
    """
    import tensorflow_datasets as tfds

    if isinstance(name_or_builder, tfds.core.DatasetBuilder):
        builder = name_or_builder
    else:
        builder = tfds_builder(name_or_builder, data_dir)
    features = dict(builder.info.features.items())
    label = features.get("label")
    is_image = isinstance(features.get("image"), tfds.features.Image)
    if not is_image or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{builder.info.full_name} is not a classification dataset. Wanted: `image` (Image) "
            f"and `label` (ClassLabel). Received: {', '.join(features)}"
        )
    prepare(builder, download)
    label_names = list(label.names or map(str, range(label.num_classes)))
    class_names = check_class_names(class_names or label_names)
    for name in label_names:
        if name not in class_names:
            raise ValueError(
                f"{builder.info.full_name} has the class {name!r}, which is not in "
                f"`class_names`. {nearest(name, class_names)}"
            )
    return _TfdsClassification(builder, split, label_names, class_names)


class _TfdsClassification(ClassificationDataset):
    """A split of a prepared TFDS dataset."""

    def __init__(self, builder, split, label_names, class_names):
        self.records, self.class_names = [], list(class_names)
        self._builder, self._split, self._label_names = builder, split, label_names
        self._size = split_size(builder, split)

    def __len__(self) -> int:
        return self._size

    @property
    def report(self) -> ClassificationReport:
        labels = self._examples().map(lambda example: example["label"])
        counts = collections.Counter(int(label) for label in labels.as_numpy_iterator())
        named = {self._label_names[i]: count for i, count in counts.items()}
        return ClassificationReport({name: named.get(name, 0) for name in self.class_names})

    def as_dataset(self, shuffle=False, seed=None, num_shards=1, shard_index=0):
        import tensorflow as tf

        part = self.shard(num_shards, shard_index)
        examples = part._examples(shuffle, seed)
        if shuffle:
            examples = examples.shuffle(min(len(part), 10_000), seed=seed)
        label_map = tf.constant([self.class_names.index(name) for name in self._label_names])

        def to_element(example):
            return {
                "images": decode_plain_image(example["image"]),
                "image_id": example["tfds_id"],
                "labels": label_map[example["label"]],
            }

        return examples.map(to_element, num_parallel_calls=tf.data.AUTOTUNE)

    as_dataset.__doc__ = ClassificationDataset.as_dataset.__doc__

    def _part(self, num_shards: int, shard_index: int) -> ClassificationDataset:
        import tensorflow_datasets as tfds

        split = tfds.even_splits(self._split, num_shards)[shard_index]
        return _TfdsClassification(self._builder, split, self._label_names, self.class_names)

    def element_loader(self):
        return None  # TFDS reads its files sequentially

    def _examples(self, shuffle: bool = False, seed: int | None = None):
        import tensorflow_datasets as tfds

        return self._builder.as_dataset(
            split=self._split,
            shuffle_files=shuffle,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(shuffle_seed=seed, add_tfds_id=True, try_autocache=False),
        )
