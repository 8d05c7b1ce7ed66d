"""Boxes of many images in one validated table, the input of all metrics."""

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np

from keras_resnest.checks import check_class_names

OPTIONAL_COLUMNS = {  # name: (default, dtype)
    "confidence": (0.0, "float64"),
    "difficult": (False, bool),
    "iscrowd": (False, bool),
    "area": (np.nan, "float64"),
}


@dataclasses.dataclass(frozen=True)
class BoxTable:
    """The N boxes of all images, without padding."""

    boxes: np.ndarray  # (N, 4) "xyxy"
    labels: np.ndarray  # (N,)
    image: np.ndarray  # (N,) index of the image
    confidence: np.ndarray  # (N,), 0 for ground truth
    difficult: np.ndarray  # (N,) bool
    iscrowd: np.ndarray  # (N,) bool
    area: np.ndarray  # (N,)
    num_images: int

    def take(self, rows: np.ndarray) -> "BoxTable":
        """Returns the table of the given rows, in this order."""
        columns = {name: v[rows] for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **columns)


def read_tables(ground_truth, detections, num_classes: int) -> tuple[BoxTable, BoxTable]:
    """Checks ground truth and detections and returns a table of each."""
    objects = _read_table(ground_truth, "ground_truth", ("boxes", "labels"), num_classes)
    found = _read_table(detections, "detections", ("boxes", "labels", "confidence"), num_classes)
    if objects.num_images != found.num_images:
        raise ValueError(
            "`ground_truth` and `detections` must have the same images. Received: "
            f"{objects.num_images} and {found.num_images} images"
        )
    highest = [table.boxes.max(initial=0.0) for table in (objects, found)]
    if 0.0 < min(highest) <= 1.0 and max(highest) > 2.0:
        warnings.warn(
            "Both `ground_truth` and `detections` must be in pixels. Received: coordinates up to "
            f"{highest[0]:g} and {highest[1]:g}, of which one is between 0 and 1",
            stacklevel=4,
        )
    return objects, found


def check_classes(class_names, num_classes: int | None) -> tuple[str, ...]:
    """Returns the class names, or the labels as names if there are none."""
    if class_names is not None:
        return tuple(check_class_names(class_names, num_classes))
    if num_classes is None or num_classes < 1:
        raise ValueError(
            "`class_names` or a positive `num_classes` must be given. "
            f"Received: class_names=None, num_classes={num_classes}"
        )
    return tuple(map(str, range(int(num_classes))))


def _read_table(images, argument: str, required: tuple[str, ...], num_classes: int) -> BoxTable:
    if isinstance(images, Mapping):
        images = _split_images(images, argument, required)
    columns = [_read_image(boxes, f"{argument}[{i}]", required) for i, boxes in enumerate(images)]
    image = np.repeat(np.arange(len(columns)), [len(c["labels"]) for c in columns])
    empty = _read_image(dict.fromkeys(required, ()), argument, required)  # for zero images
    table = {name: np.concatenate([*(c[name] for c in columns), empty[name]]) for name in empty}
    keep = table["labels"] != -1
    table = {name: values[keep] for name, values in table.items()}
    _check_table(table, image[keep], argument, num_classes)
    box_area = (table["boxes"][:, 2:] - table["boxes"][:, :2]).prod(axis=1)
    table["area"] = np.where(np.isnan(table["area"]), box_area, table["area"])
    return BoxTable(**table, image=image[keep], num_images=len(columns))


def _split_images(batch: Mapping, argument: str, required: tuple[str, ...]) -> list[dict]:
    """Splits arrays whose first axis is the image into one dictionary per image."""
    names = [*required, *(name for name in ("difficult", "iscrowd", "area") if name in batch)]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(
            f"`{argument}` lacks {missing[0]!r}. Received: {', '.join(map(str, batch))}"
        )
    arrays = {name: np.asarray(batch[name]) for name in names}
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"`{argument}` must hold as many images in each array. Received: {lengths}"
        )
    return [dict(zip(arrays, rows, strict=True)) for rows in zip(*arrays.values(), strict=True)]


def _read_image(boxes: Mapping, where: str, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The columns of one image, with defaults for absent ones."""
    missing = [name for name in required if name not in boxes]
    if missing:
        raise ValueError(f"`{where}` lacks {', '.join(missing)}. Received: {sorted(boxes)}")
    coordinates = np.atleast_1d(np.asarray(boxes["boxes"], dtype="float64"))
    labels = np.atleast_1d(np.asarray(boxes["labels"]))
    if coordinates.size == 0:
        coordinates = coordinates.reshape(0, 4)
    if labels.size == 0:
        labels = labels.reshape(0).astype(int)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{where}['labels']` must be integers. Received: dtype={labels.dtype}")
    count = len(coordinates)
    columns = {"boxes": coordinates, "labels": labels}
    for name, (default, dtype) in OPTIONAL_COLUMNS.items():
        given = boxes.get(name)
        columns[name] = np.full(count, default) if given is None else np.asarray(given, dtype)
    for name, values in columns.items():
        if values.shape != ((count, 4) if name == "boxes" else (count,)):
            wanted = "(n, 4)" if name == "boxes" else f"({count},)"
            raise ValueError(
                f"`{where}[{name!r}]` must have shape {wanted}. Received: shape={values.shape}"
            )
    return columns


def _check_table(table: dict, image: np.ndarray, argument: str, num_classes: int) -> None:
    """Raises ValueError that names the first invalid row."""
    boxes, labels = table["boxes"], table["labels"]
    checks = (
        ("boxes", "finite", np.isfinite(boxes).all(axis=1)),
        ("boxes", "'xyxy' with x1 <= x2 and y1 <= y2", (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)),
        ("labels", f"0 to {num_classes - 1}, or -1", (labels >= 0) & (labels < num_classes)),
        ("confidence", "finite", np.isfinite(table["confidence"])),
    )
    for name, wanted, valid in checks:
        if not valid.all():
            row = int(np.argmin(valid))
            raise ValueError(
                f"`{argument}[{image[row]}][{name!r}]` must be {wanted}. "
                f"Received: {table[name][row].tolist()}"
            )
