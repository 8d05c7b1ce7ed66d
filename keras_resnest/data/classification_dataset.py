"""Datasets of labeled images, as the readers of classification data return them.

`ClassificationDataset.as_dataset()` returns a `tf.data.Dataset` of

    {"images": uint8 (h, w, 3), "image_id": string, "labels": int32 scalar}

Images are RGB, 0 to 255, of any size; labels are 0 to num_classes - 1.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from keras_resnest.data.dataset import ImageDataset, Problem, count_problems, image_reader
from keras_resnest.images import ImageInfo


@dataclasses.dataclass(slots=True)
class LabeledImage:
    """One image and its class."""

    image: Any  # path, encoded bytes, or array, as for `load_image`
    image_id: str  # unique name of the image
    label: int  # 0 to num_classes - 1
    info: ImageInfo  # size and orientation of the image


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


class ClassificationDataset(ImageDataset):
    """A classification dataset: labels in memory, images read on demand.

    Args:
        records: List of `LabeledImage`, at least one.
        class_names: Names of the labels 0, 1, 2, ...
        report: `ClassificationReport`. Default: counted from the records.

    Raises:
        ValueError: if there is no record, or a label has no class name.

    Example: `train, test = ClassificationDataset(records, class_names=["cat", "dog"]).hold_out()`
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

    def element_loader(self):
        """Returns a function from the index of an image (int64 tensor) to its element."""
        import tensorflow as tf

        with tf.device("CPU:0"):  # keep these tables off the GPU
            image_ids = tf.constant([record.image_id for record in self.records])
            labels = tf.constant([record.label for record in self.records], tf.int32)
        read_image = image_reader(self.records)
        return lambda index: {
            "images": read_image(index),
            "image_id": image_ids[index],
            "labels": labels[index],
        }
