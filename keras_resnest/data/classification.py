"""Labeled images: readers, and batches for training and evaluating classifiers.

`ClassificationDataset.as_dataset()` is a `tf.data.Dataset` of

    {"images": uint8 (h, w, 3), "image_id": string, "labels": int32 scalar}

Images are RGB, 0 to 255, of any size; labels are 0 to num_classes - 1.
"""

import collections
import dataclasses
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow as tf

from keras_resnest.checks import check_class_names
from keras_resnest.data.augmentation.rand_augment import (
    RandAugment,
    as_uint8,
    brighten,
    contrast,
    saturate,
)
from keras_resnest.data.dataset import (
    ImageDataset,
    Problem,
    count_problems,
    decode_plain_image,
    image_reader,
    nearest,
)
from keras_resnest.data.epochs import EpochCounter, epoch_passes, fold_in
from keras_resnest.data.readers.common import Faults, FileError
from keras_resnest.data.readers.tfds import prepare, split_size, tfds_builder
from keras_resnest.images import IMAGE_SUFFIXES, ImageInfo, center_crop_image, read_image_info

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_CACHE_LIMIT = 1_000_000_000  # bytes of decoded images that are kept without being asked to


@dataclasses.dataclass(slots=True)
class LabeledImage:
    """One image and its class.

    Attributes:
        image: Path, encoded bytes or array of the image, as `load_image` takes them.
        image_id: Name of the image, different for every image of the dataset.
        label: 0 to num_classes - 1.
        info: Size and orientation of the image.
    """

    image: Any
    image_id: str
    label: int
    info: ImageInfo


@dataclasses.dataclass
class ClassificationReport:
    """Counts and faults of a dataset; `print` it before training.

    Attributes:
        class_counts: Images of each class, by class name, in the order of the labels.
        problems: List of `Problem`.
    """

    class_counts: dict[str, int]
    problems: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Images that are used."""
        return sum(self.class_counts.values())

    def __str__(self) -> str:
        counts = self.class_counts
        lines = [f"{self.num_images} images, {len(counts)} classes"]
        lines += [f"  {name}  {count}" for name, count in list(counts.items())[:20]]
        if len(counts) > 20:
            lines.append(f"  ... {min(counts.values())} to {max(counts.values())} images a class")
        lines += [f"  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  ... {count_problems(self.problems)}, see `report.problems`")
        return "\n".join(lines)


class ClassificationDataset(ImageDataset):
    """Labeled images, read when they are needed.

    Args:
        records: List of `LabeledImage`, at least one.
        class_names: Names of the labels 0, 1, 2, ...
        report: `ClassificationReport`. Default: counted from the records.

    Raises:
        ValueError: There is no record, or a label has no class name.

    Example:
        ```python
        record = LabeledImage("cat.jpg", "cat", 0, read_image_info("cat.jpg"))
        dataset = ClassificationDataset([record], class_names=["cat", "dog"])
        ```
    """

    def __init__(
        self,
        records: Sequence[LabeledImage],
        class_names: Sequence[str],
        report: ClassificationReport | None = None,
    ):
        self.records, self.class_names = list(records), check_class_names(class_names)
        if not self.records:
            raise ValueError("A dataset needs at least one image. Received: no records")
        labels = collections.Counter(record.label for record in self.records)
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong:
            raise ValueError(
                f"Labels must be 0 to {self.num_classes - 1} ({self.num_classes} class names). "
                f"Received: {wrong}"
            )
        counts = {name: labels[i] for i, name in enumerate(self.class_names)}
        self.report = report or ClassificationReport(counts)

    def element_loader(self) -> Callable[[tf.Tensor], dict]:
        """A function from the number of an image (int64 tensor) to its element."""
        with tf.device("CPU:0"):  # else the tables would live on the GPU
            image_ids = tf.constant([record.image_id for record in self.records])
            labels = tf.constant([record.label for record in self.records], tf.int32)
        read_image = image_reader(self.records)
        return lambda index: {
            "images": read_image(index),
            "image_id": image_ids[index],
            "labels": labels[index],
        }


# === Folders ===


def read_image_folder(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
) -> ClassificationDataset:
    """Reads a folder with a folder of images for each class, as ImageNet's.

    Images may lie in folders inside those of the classes. Reported and left out: files that are
    no images by their suffix, and images outside of the class folders. Names that begin with
    a dot are passed over. One `UserWarning` tells that there are problems.

    Args:
        folder: Folder of the dataset.
        split: Folder in `folder` that holds the class folders, such as "train". Default: `folder`
            itself holds them.
        class_names: Names of the labels 0, 1, 2, ... Default: the names of the class folders,
            sorted.
        on_error: What to do with an unreadable image, and with a class folder that is not in
            `class_names`: "raise" a ValueError naming the file, or "skip" it with a line in the
            report.

    Returns:
        `ClassificationDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: No such folder or split, no class folders, no images, or see `on_error`.

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
    paths, labels = [], []
    for path in class_folders:
        with faults.skipping_image():
            if path.name not in names:
                detail = f"not in `class_names`. {nearest(path.name, names)}"
                raise FileError(path, "unknown class", detail)
            found = list(_images(path, faults))
            paths += found
            labels += [names.index(path.name)] * len(found)
    records = []
    # Threads, because most of the time is spent waiting for the disk.
    with ThreadPoolExecutor(16) as pool:
        for path, label, info in zip(paths, labels, pool.map(_info_or_error, paths), strict=True):
            with faults.skipping_image():
                if isinstance(info, FileError):
                    raise info
                image_id = path.relative_to(folder).as_posix()
                records.append(LabeledImage(str(path), image_id, label, info))
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
    """The folders of the classes, sorted; what else lies there is reported."""
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
            f"`split` must be given where folders are named {', '.join(names)}, and hold the "
            f"folders of the classes. Received: split=None for {folder}"
        )
    for path in found:
        if not path.is_dir():
            faults.add(path, "file outside of the class folders", "left out")
    return class_folders


def _images(folder: Path, faults: Faults) -> Iterator[Path]:
    """All images of a class, in the order of their names."""
    for path in _visible(folder):
        if path.is_dir():
            # Links of folders could lead round in a circle.
            yield from () if path.is_symlink() else _images(path, faults)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path
        else:
            faults.add(path, "not an image", "left out", f"in {folder.name}")


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


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

    It needs the features `image` and `label`. The images stay in the TFDS files, decoded as TFDS
    does; gray ones become RGB. `records` is empty and the `report` is counted on first use.

    Args:
        name_or_builder: Name of a dataset, or a `tfds.core.DatasetBuilder`.
        split: E.g. "train", "test[:10%]".
        class_names: Names of the labels 0, 1, 2, ...: all names of the dataset in the order
            wanted, and possibly more. Default: as in the dataset.
        data_dir: Folder of prepared datasets. Default: that of TFDS (`TFDS_DATA_DIR`, or
            "~/tensorflow_datasets").
        download: Download or generate the dataset where `data_dir` has not got it.

    Returns:
        `ClassificationDataset`.

    Raises:
        ValueError: No such dataset or split, not a classification dataset, a class is not in
            `class_names`, or it is not in `data_dir` and `download` is False.
        ConnectionError: It must be downloaded and its server is not to be reached.

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
        return None  # the files of TFDS are read from their beginning

    def _examples(self, shuffle: bool = False, seed: int | None = None) -> tf.data.Dataset:
        import tensorflow_datasets as tfds

        return self._builder.as_dataset(
            split=self._split,
            shuffle_files=shuffle,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(shuffle_seed=seed, add_tfds_id=True, try_autocache=False),
        )


# === Augmentation ===


@dataclasses.dataclass(frozen=True)
class ClassificationAugmentation:
    """A random part of an image, mirrored or not, with changed colors.

    Called on an image (h, w, 3), uint8, and a `seed`, an integer tensor of shape (2,): the same
    image and seed always give the same result.

    Args:
        image_shape: (height, width) or (height, width, 3) of the result in pixels.
        area: (low, high) of the part's area as a share of the image's.
        aspect_ratio: (low, high) of the part's width divided by its height.
        flip: chance of mirroring.
        rand_augment: a `RandAugment`, or None.
        color_jitter: brightness, contrast and saturation get factors of 1 plus or minus at most
            this.
        lighting: standard deviation of AlexNet's noise along the main colors of ImageNet.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> augmentation = ClassificationAugmentation((224, 224), color_jitter=0.4)
        >>> image = augmentation(load_image("photo.jpg"), seed=(1, 2))

    Source: the part as in GoogLeNet (arXiv 1409.4842, section 6), drawn as torchvision's
    `RandomResizedCrop`; the order of the steps is that of torchvision's reference training.
    """

    image_shape: tuple[int, ...]
    area: tuple[float, float] = (0.08, 1.0)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: RandAugment | None = None
    color_jitter: float = 0.0
    lighting: float = 0.0

    def __post_init__(self):
        _square(self.image_shape)
        low, high = self.area
        narrow, wide = self.aspect_ratio
        if not 0 < low <= high <= 1 or not 0 < narrow <= wide:
            raise ValueError(
                "`area` must lie within 0 to 1, `aspect_ratio` above 0, lower bound first. "
                f"Received: area={self.area}, aspect_ratio={self.aspect_ratio}"
            )
        if not 0 <= self.flip <= 1 or not 0 <= self.color_jitter <= 1 or self.lighting < 0:
            raise ValueError(
                "`flip` and `color_jitter` must lie within 0 to 1, `lighting` must not be "
                f"negative. Received: flip={self.flip}, color_jitter={self.color_jitter}, "
                f"lighting={self.lighting}"
            )

    def __call__(self, image: tf.Tensor, seed) -> tf.Tensor:
        """Returns the image for training: float32 of `image_shape`, 0 to 255."""
        image = tf.convert_to_tensor(image)
        seeds = tf.unstack(tf.random.split(tf.cast(seed, tf.int64), 5))
        top, left, height, width = tf.unstack(self.window(tf.shape(image)[:2], seeds[0]))
        image = image[top : top + height, left : left + width]
        # Antialiased, as evaluation shrinks its images.
        image = tf.image.resize(image, self.image_shape[:2], antialias=True)
        mirrored = tf.random.stateless_uniform([], seeds[1]) < self.flip
        image = tf.cond(mirrored, lambda: image[:, ::-1], lambda: image)
        if self.rand_augment is not None:
            image = tf.cast(self.rand_augment(as_uint8(image), seeds[2]), tf.float32)
        if self.color_jitter:
            factors = 1.0 + self.color_jitter * tf.random.stateless_uniform([3], seeds[3], -1.0)
            image = brighten(image, factors[0])
            image = saturate(contrast(image, factors[1]), factors[2])
        if self.lighting:
            image = image + _lighting(tf.random.stateless_normal([3], seeds[4], 0, self.lighting))
        return tf.ensure_shape(tf.clip_by_value(image, 0.0, 255.0), (*self.image_shape[:2], 3))

    def window(self, size: tf.Tensor, seed) -> tf.Tensor:
        """Draws the part of an image.

        Args:
            size: (height, width) of the image, int32.
            seed: integer tensor (2,).

        Returns:
            (top, left, height, width) in pixels, int32. If none of ten draws fits into the
            image, the largest part in its middle that `aspect_ratio` allows.
        """
        height, width = tf.unstack(tf.cast(size, tf.float32))
        draws = tf.random.stateless_uniform([10, 4], seed)
        narrow, wide = self.aspect_ratio
        areas = height * width * (self.area[0] + (self.area[1] - self.area[0]) * draws[:, 0])
        log_range = math.log(wide) - math.log(narrow)
        ratios = tf.exp(math.log(narrow) + log_range * draws[:, 1])
        sizes = tf.round(tf.sqrt(tf.stack([areas / ratios, areas * ratios], axis=1)))
        sizes = tf.maximum(sizes, 1.0)  # (10, 2), height and width
        largest = tf.stack(
            [tf.minimum(height, tf.round(width / narrow)), tf.minimum(width, height * wide)]
        )
        sizes = tf.concat([sizes, tf.maximum(tf.round(largest), 1.0)[None]], axis=0)
        places = tf.concat([draws[:, 2:], [[0.5, 0.5]]], axis=0)
        chosen = tf.argmax(tf.reduce_all(sizes <= [height, width], axis=1))
        room = [height, width] - sizes[chosen]
        corner = tf.minimum(tf.floor(places[chosen] * (room + 1.0)), room)
        return tf.cast(tf.concat([corner, sizes[chosen]], axis=0), tf.int32)


def _lighting(amounts):
    # Principal components of the colors of ImageNet's images (AlexNet, section 4.1).
    values = tf.constant([55.46, 4.794, 1.148])
    vectors = tf.constant(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    return tf.linalg.matvec(vectors, amounts * values)


#: Arguments of `ClassificationAugmentation` by name. "none" cuts as evaluation does.
CLASSIFICATION_AUGMENTATIONS: dict[str, dict | None] = {
    "none": None,
    "mild": {"area": (0.5, 1.0)},
    "inception": {"color_jitter": 0.4, "lighting": 0.1},
    "rand_augment": {"color_jitter": 0.4, "lighting": 0.1, "rand_augment": RandAugment()},
}


def mix_up(images: tf.Tensor, labels: tf.Tensor, alpha: float, seed) -> tuple:
    """Mixes each image of a batch with the one before it, and their labels alike.

    `keras.layers.MixUp` mixes the same way, but its draws depend on how many batches came before:
    a resumed training would see others.

    Args:
        images: (B, h, w, 3), float.
        labels: (B, classes), float, one-hot.
        alpha: parameter of the beta distribution of the weights; each image draws its own.
        seed: integer tensor (2,).

    Returns:
        Mixed images and labels.

    Source: https://arxiv.org/abs/1710.09412
    """
    count = tf.shape(images)[0]
    # In float64: with a small alpha both gamma variables may be tiny.
    gammas = tf.random.stateless_gamma(
        [count, 2], seed, tf.cast(alpha, tf.float64), dtype="float64"
    )
    weights = gammas[:, 0] / tf.maximum(tf.reduce_sum(gammas, axis=1), 1e-300)

    def mixed(values):
        shape = [-1] + [1] * (values.shape.rank - 1)
        own = tf.reshape(tf.cast(weights, values.dtype), shape)
        return own * values + (1 - own) * tf.roll(values, 1, axis=0)

    return mixed(images), mixed(labels)


# === Batches ===


def classification_batches(
    dataset,
    image_shape: Sequence[int],
    batch_size: int,
    *,
    training: bool,
    augmentation: str | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = "inception",
    mixup: float = 0.0,
    num_classes: int | None = None,
    seed: int | None = None,
    initial_epoch: int = 0,
    crop_share: float = 0.875,
    interpolation: str = "bilinear",
    cache: bool | str | None = None,
    drop_remainder: bool | None = None,
    num_parallel_calls: int = tf.data.AUTOTUNE,
    deterministic: bool = True,
) -> tf.data.Dataset:
    """Batches for training or evaluating a classifier.

    For training, images are shuffled and augmented anew in every epoch. Order, augmentation and
    mixup of epoch k depend on `seed`, k and the images only, so a stopped training goes on with
    `initial_epoch=k`, or `set_epoch`, as if it had not been stopped. For evaluation, every image
    comes once and in order, resized and cut in the middle as `center_crop_image` does.

    On many machines, give each worker its own part, `dataset.shard(num_workers, worker)`; an epoch
    of a shard has as many batches as the smallest shard can fill.

    Args:
        dataset: a `ClassificationDataset`, or a `tf.data.Dataset` of unbatched elements
            `{"images": (h, w, 3) uint8, "labels": integer}`.
        image_shape: (height, width) or (height, width, 3) of the network; a square.
        batch_size: images per batch.
        training: whether the batches are for training, or for evaluation.
        augmentation: for training, one of `CLASSIFICATION_AUGMENTATIONS`, a
            `ClassificationAugmentation`, or a function of an image and a seed (int64 tensor of
            shape (2,)) that returns an image of `image_shape`.
        mixup: for training, parameter of `mix_up`; 0 for none.
        num_classes: number of classes. Default: that of `dataset`.
        seed: start of all random numbers. Default: drawn from Python's `random`, which
            `keras.utils.set_random_seed` sets.
        initial_epoch: epoch of the first pass, from 0; later passes are the epochs after it.
        crop_share: for evaluation, the crop as a share of the resized shorter side.
        interpolation: for evaluation, `"bilinear"` or `"bicubic"`.
        cache: keep images in memory, or in files that begin with a path: for training as they
            are, for evaluation cut. Default: in memory if that takes up to 1 GB, else not.
        drop_remainder: leave out the last, smaller batch. Default: for training.
        num_parallel_calls: images that are read and augmented at the same time.
        deterministic: False lets a faster image overtake a slower one.

    Returns:
        Dataset of `(images, labels)`: (B, height, width, 3) float32 of 0 to 255, and
        (B, num_classes) float32, one-hot or mixed.

    Raises:
        ValueError: if an argument is unusable, or an epoch would have no batch.

    Example:
        >>> batches = classification_batches(train, (224, 224), 32, training=True, mixup=0.2)
        >>> model.fit(batches, epochs=10)
    """
    side = _square(image_shape)
    classes = num_classes or getattr(dataset, "num_classes", None)
    if not classes:
        raise ValueError("`num_classes` is needed with a tf.data.Dataset. Received: None")
    drop_remainder = training if drop_remainder is None else drop_remainder
    stored, load = _stored(dataset, batch_size, drop_remainder)

    def cut(image):
        return _cut(image, side, crop_share, interpolation)

    counter = EpochCounter(initial_epoch)
    if training:
        augment = _augmentation(augmentation, side, cut)
        if _keeps(dataset, cache, None):
            stored, load = _cached(stored.map(load, num_parallel_calls), cache), _as_it_is
        seed = random.randrange(2**31) if seed is None else seed
        passes = epoch_passes(stored, counter, seed, _shuffle_buffer(stored, load))
        elements = passes.map(_augmenter(load, augment), num_parallel_calls)
    else:
        elements = stored.map(load, num_parallel_calls)
        elements = elements.map(lambda e: dict(e, images=cut(e["images"])), num_parallel_calls)
        elements = _cached(elements, cache) if _keeps(dataset, cache, side) else elements

    def pair(element):
        image = tf.ensure_shape(tf.cast(element["images"], tf.float32), (side, side, 3))
        label = tf.one_hot(tf.cast(element["labels"], tf.int32), classes)
        return image, label, element.get("seed", tf.zeros([2], tf.int64))

    def mix(images, labels, seeds):
        if training and mixup:
            return mix_up(images, labels, mixup, seeds[0] + 1)
        return images, labels

    batches = elements.map(pair, num_parallel_calls).batch(batch_size, drop_remainder).map(mix)
    batches = _as_long_as_the_smallest_shard(batches, dataset, batch_size, drop_remainder)
    batches = batches.prefetch(tf.data.AUTOTUNE).with_options(_options(deterministic))
    batches.epoch_counter = counter  # for `set_epoch`
    return batches


def _cut(image: tf.Tensor, side: int, crop_share: float, interpolation: str) -> tf.Tensor:
    def cut(pixels):
        return center_crop_image(pixels, side, crop_share, interpolation)

    return tf.ensure_shape(tf.numpy_function(cut, [image], tf.uint8), (side, side, 3))


def _augmenter(load: Callable, augment: Callable) -> Callable:
    def prepare(epoch_seed, position, number, item):
        element, seed = load(item), fold_in(epoch_seed, number)
        return dict(element, images=augment(element["images"], seed), seed=seed)

    return prepare


def _as_it_is(element: dict) -> dict:
    return element


def _as_long_as_the_smallest_shard(batches, dataset, batch_size: int, drop_remainder: bool):
    images = getattr(dataset, "smallest_shard", None)
    if images is None or images == len(dataset):
        return batches
    return batches.take(images // batch_size if drop_remainder else -(-images // batch_size))


def _options(deterministic: bool) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = deterministic
    # One thread per image: quicker than all threads on one image, and leaves cores to fit().
    options.threading.max_intra_op_parallelism = 1
    return options


def _stored(dataset, batch_size: int, whole_batch: bool) -> tuple[tf.data.Dataset, Callable]:
    """What is shuffled, and the function that makes an element of it.

    These are the numbers of images where they can be read in any order, else elements.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}"
        )
    load = getattr(dataset, "element_loader", lambda: None)()
    if load is not None:
        stored = tf.data.Dataset.range(len(dataset))
    else:
        stored = dataset.as_dataset() if hasattr(dataset, "as_dataset") else dataset
        if not isinstance(stored, tf.data.Dataset) or not _fits(stored.element_spec):
            raise ValueError(
                "`dataset` must be a ClassificationDataset or give unbatched elements "
                '{"images": (h, w, 3), "labels": integer}. '
                f"Received: {getattr(stored, 'element_spec', dataset)!r}"
            )
        load = _with_channels
    count, needed = int(stored.cardinality()), batch_size if whole_batch else 1
    if 0 <= count < needed:
        raise ValueError(
            f"`dataset` must have at least {needed} image(s): with fewer, an epoch would have "
            f"no batch (batch_size={batch_size}). Received: a dataset of {count} image(s)"
        )
    return stored, load


def _with_channels(element: dict) -> dict:
    return dict(element, images=tf.ensure_shape(element["images"], (None, None, 3)))


def _fits(spec) -> bool:
    try:
        return spec["images"].shape.rank in (None, 3) and spec["labels"].shape.rank in (None, 0)
    except (KeyError, TypeError, AttributeError):
        return False


def _augmentation(augmentation, side: int, cut: Callable) -> Callable:
    if callable(augmentation):
        own_shape = getattr(augmentation, "image_shape", None)
        if own_shape is not None and _square(own_shape) != side:
            raise ValueError(
                f"`augmentation` must make images of {side} x {side} pixels. "
                f"Received: augmentation.image_shape={own_shape}"
            )
        return augmentation
    if augmentation not in CLASSIFICATION_AUGMENTATIONS:
        names = ", ".join(map(repr, CLASSIFICATION_AUGMENTATIONS))
        raise ValueError(
            f"`augmentation` must be one of {names}, or a function. Received: {augmentation!r}"
        )
    options = CLASSIFICATION_AUGMENTATIONS[augmentation]
    if options is None:
        return lambda image, seed: cut(image)
    return ClassificationAugmentation((side, side), **options)


def _keeps(dataset, cache: bool | str | None, side: int | None) -> bool:
    """Whether images are kept; `side` is that of cut images, None where they are whole."""
    if cache is not None:
        return bool(cache)
    records = getattr(dataset, "records", None)
    if side is not None and hasattr(dataset, "__len__"):
        return len(dataset) * side * side * 3 <= _CACHE_LIMIT
    if not records:
        return False
    return sum(r.info.height * r.info.width * 3 for r in records) <= _CACHE_LIMIT


def _cached(elements: tf.data.Dataset, cache: bool | str | None) -> tf.data.Dataset:
    return elements.cache(cache) if isinstance(cache, str) else elements.cache()


def _shuffle_buffer(stored: tf.data.Dataset, load: Callable) -> int:
    """Number of items among which the next one is drawn; all, unless they are pixels."""
    count = int(stored.cardinality())
    if load is _with_channels:  # decoded images, which take memory in the buffer
        return min(count, 2048) if count > 0 else 2048
    return count if count > 0 else 100_000


def _square(image_shape: Sequence[int]) -> int:
    shape = tuple(image_shape)
    whole = all(isinstance(side, int) and side > 0 for side in shape)
    if len(shape) not in (2, 3) or not whole or shape[0] != shape[1] or shape[2:] not in ((), (3,)):
        raise ValueError(
            "`image_shape` must be (side, side) or (side, side, 3) in pixels. "
            f"Received: image_shape={image_shape!r}"
        )
    return shape[0]
