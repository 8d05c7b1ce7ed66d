"""Common parts of the detection readers.

A reader parses its file format into `ImageAnnotation`s. `build_dataset` reads the image headers,
converts, checks and clips the boxes, maps class names to labels, and reports the problems.
"""

import contextlib
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from keras_resnest.checks import check_class_names
from keras_resnest.data.dataset import (
    DetectionDataset,
    ImageRecord,
    Problem,
    count_problems,
    nearest,
    summarize,
    usable_boxes,
    without_difficult,
)
from keras_resnest.images import ImageInfo, orientation_flags, read_image_info

ROUNDING = 0.5  # boxes that cross the border by fewer pixels are not reported


class FileError(ValueError):
    """A fault in a file, which stops the reader or skips an image, depending on `on_error`."""

    def __init__(self, file: str | os.PathLike, what: str, detail: str = ""):
        super().__init__(f"{file}: {what}{': ' * bool(detail)}{detail}")
        self.problem = Problem(Path(file).name, what, "image skipped", detail)


@dataclasses.dataclass(frozen=True)
class AnnotatedObject:
    """One object, as annotated in a file."""

    name: str
    # (x1, y1, x2, y2), continuous pixels or fractions of the image; NaN if not a number
    box: tuple[float, float, float, float]
    difficult: bool = False
    text: str = ""  # the box in the file, for the report
    border_problem: tuple[str, str] | None = None  # (problem, action) if it crosses the border


@dataclasses.dataclass(frozen=True)
class ImageAnnotation:
    """One image and its objects, as annotated in a file."""

    file: str | os.PathLike  # annotation file, for messages
    image_id: str
    image: Path
    objects: tuple[AnnotatedObject, ...]
    size: tuple[int, int] | None = None  # (width, height) in pixels, if annotated
    is_relative: bool = False  # boxes are fractions of the image


class Faults:
    """Collects problems; `on_error` is "raise" or "skip" for faulty images."""

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip". Received: {on_error!r}')
        self.on_error = on_error
        self.problems: list[Problem] = []

    def add(self, file: str | os.PathLike, what: str, action: str, detail: str = "") -> None:
        """Adds a problem that does not affect a whole image."""
        self.problems.append(Problem(Path(file).name, what, action, detail))

    @contextlib.contextmanager
    def skipping_image(self) -> Iterator[None]:
        """Reports a `FileError` in the block instead of raising it, for `on_error="skip"`."""
        try:
            yield
        except FileError as error:
            if self.on_error == "raise":
                raise
            self.problems.append(error.problem)


def build_dataset(
    source: str | os.PathLike,
    items: Iterable,
    parse: Callable[[Any], ImageAnnotation],
    class_names: Sequence[str],
    use_difficult: bool,
    faults: Faults,
) -> DetectionDataset:
    """Builds a dataset of one image per item, and warns once if there are problems.

    `parse` returns the annotation of an item, or raises `FileError`. `source` is for messages.
    """
    class_names = check_class_names(class_names)
    records, pixel_boxes = [], []
    for item in items:
        with faults.skipping_image():
            annotation = parse(item)
            records.append(_record(annotation, class_names, faults))
            if not annotation.is_relative:
                pixel_boxes += [item.box for item in annotation.objects]
    _check_pixels(source, pixel_boxes)
    if not records:
        raise ValueError(f"No usable image in {source}: {count_problems(faults.problems)}")
    if not use_difficult:
        records = [without_difficult(record) for record in records]
    report = summarize(records, class_names, faults.problems)
    if faults.problems:
        warnings.warn(
            f"{source}: {count_problems(faults.problems)}. See the `report` of the dataset",
            stacklevel=3,
        )
    return DetectionDataset(records, class_names, report)


# === Parsing ===


def check_folder(folder: str | os.PathLike, argument: str) -> Path:
    """Returns an existing folder as a path; raises a `ValueError` that names the argument."""
    if not Path(folder).is_dir():
        raise ValueError(f"`{argument}` must be a folder. Received: {folder} (no such folder)")
    return Path(folder)


def known_classes(names: Mapping[Any, str]) -> str:
    """The first classes by number, for messages."""
    return "Known: " + ", ".join(f"{key} ({name})" for key, name in list(names.items())[:20])


def find_image(folder: Path, name: str, file: str | os.PathLike) -> Path:
    """Returns the image that `file` names, see `locate_image`, or raises `FileError`."""
    path = locate_image(folder, name)
    if path is None:
        raise FileError(file, "missing image", f"no {name.strip()!r} in {folder}")
    return path


def locate_image(folder: Path, name: str) -> Path | None:
    r"""Finds an image by its absolute path or its path in `folder`, with "/" or "\"; else None.

    For an absolute path that does not exist, looks for the file name in `folder`.
    """
    name = name.strip()
    posix = name.replace("\\", "/")
    candidates = [folder / name, folder / posix]
    if re.match(r"/|[A-Za-z]:/", posix):
        candidates.append(folder / posix.rsplit("/", 1)[-1])
    return next((path for path in candidates if name and path.is_file()), None)


def normalize_path(name: str) -> str:
    r"""Normalizes a path: "a/b.jpg" for ".\a\b.jpg"."""
    return str(PurePosixPath(name.strip().replace("\\", "/")))


def number(value: Any) -> float:
    """Converts a value to float, or to NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_true(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """Returns an annotated (width, height) as integers; None if it is missing or invalid."""
    size = number(width), number(height)
    is_known = all(math.isfinite(side) and side >= 1 for side in size)
    return (round(size[0]), round(size[1])) if is_known else None


def read_text(path: Path, what: str) -> str:
    """Reads UTF-8, with or without a byte order mark, or UTF-16; `what` describes the file."""
    try:
        encoded = path.read_bytes()
        is_utf16 = encoded[:2] in (b"\xff\xfe", b"\xfe\xff")
        return encoded.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"unreadable {what}", str(error)) from error


# === From annotation to record ===


def _record(annotation: ImageAnnotation, class_names: Sequence[str], faults: Faults) -> ImageRecord:
    for item in annotation.objects:
        if item.name not in class_names:
            hint = f"not in `class_names`. {nearest(item.name, class_names)}"
            raise FileError(annotation.file, f"unknown class {item.name!r}", hint)
    try:
        info = read_image_info(annotation.image)
    except ValueError as error:
        raise FileError(annotation.image, "unreadable image", str(error)) from error
    boxes, keep = _usable(annotation, info, faults)
    labels = np.asarray([class_names.index(item.name) for item in annotation.objects], "int32")
    difficult = np.asarray([item.difficult for item in annotation.objects], bool)
    rows = boxes[keep], labels[keep], difficult[keep]
    return ImageRecord(str(annotation.image), annotation.image_id, *rows, info)


def _usable(
    annotation: ImageAnnotation, info: ImageInfo, faults: Faults
) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes (n, 4), clipped to the upright image, and which (n,) to keep."""
    boxes = np.asarray([item.box for item in annotation.objects], "float64").reshape(-1, 4)
    if annotation.is_relative:
        boxes = boxes * ([info.width, info.height] * 2)
    with np.errstate(over="ignore"):  # float32 overflows to infinity, which is dropped below
        boxes = boxes.astype("float32")
    if _is_stored_frame(annotation, info, faults):
        boxes = rotate_boxes(boxes, info)
    clipped, verdicts = usable_boxes(boxes, info.width, info.height)
    keep, seen = np.ones(len(boxes), bool), set()
    for i, (item, verdict) in enumerate(zip(annotation.objects, verdicts, strict=True)):
        key, detail = (item.name, *clipped[i].tolist()), f"{item.name} {item.text}"
        problem, action = "", "dropped"
        if verdict == "clipped":
            is_rounding = np.abs(clipped[i] - boxes[i]).max() < ROUNDING
            detail += f" in {info.width} x {info.height}"
            if item.border_problem or not is_rounding:
                problem, action = item.border_problem or ("box across the border", "clipped")
        elif verdict or key in seen:
            problem, keep[i] = verdict or "repeated box", False
        seen.add(key)
        if problem:
            faults.add(annotation.file, problem, action, detail)
    return clipped, keep


def _is_stored_frame(annotation: ImageAnnotation, info: ImageInfo, faults: Faults) -> bool:
    """Whether the boxes are in pixels of the stored image, before its EXIF rotation."""
    upright = (info.width, info.height)
    stored = upright[::-1] if orientation_flags(info.orientation)[0] else upright
    file, size = annotation.file, annotation.size
    if info.orientation != 1 and size == stored != upright:
        detail = f"{info.orientation}, and the stated size is that of the image before rotation"
        faults.add(file, "EXIF orientation", "boxes rotated with the image", detail)
        return True
    if info.orientation != 1 and (size is None or stored == upright):
        action = "boxes assumed to belong to the upright image"
        faults.add(file, "EXIF orientation", action, f"{info.orientation}")
    if size is not None and size != upright:
        detail = f"{size[0]} x {size[1]}, the image has {upright[0]} x {upright[1]}"
        faults.add(file, "wrong size", "boxes kept as pixels of the image", detail)
    return False


def rotate_boxes(boxes: np.ndarray, info: ImageInfo) -> np.ndarray:
    """Converts boxes (n, 4) of the stored image to boxes of the upright image."""
    transpose, flip_columns, flip_rows = orientation_flags(info.orientation)
    x1, y1, x2, y2 = boxes.T[[1, 0, 3, 2]] if transpose else boxes.T
    if flip_columns:
        x1, x2 = info.width - x2, info.width - x1
    if flip_rows:
        y1, y2 = info.height - y2, info.height - y1
    return np.stack([x1, y1, x2, y2], axis=1)


def _check_pixels(source: str | os.PathLike, boxes: list) -> None:
    """Raises `ValueError` if all boxes in pixels are within 0 to 1."""
    boxes = np.asarray(boxes, "float64").reshape(-1, 4)
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if len(boxes) and 0 < boxes.max() <= 1 and boxes.min() >= 0:
        raise ValueError(
            f"{source}: boxes must be in pixels. Received numbers within 0 to 1: "
            f"{boxes[0].tolist()}"
        )
