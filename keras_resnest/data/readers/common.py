"""What the readers of annotation files have in common.

Each reader brings a file format into `ImageAnnotation`s; `build_dataset` does the rest: looks at
the images, turns, clips and judges the boxes, maps names to labels, and reports.
"""

import contextlib
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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

ROUNDING = 0.5
"""Pixels by which a box may cross the border without a word: files hold rounded numbers."""

_DROPPED = ("invalid coordinates", "degenerate box", "box outside the image")


class FileError(ValueError):
    """A fault that stops the reader, or costs an image with `on_error="skip"`."""

    def __init__(self, file: str | os.PathLike, what: str, detail: str = ""):
        super().__init__(f"{file}: {what}{': ' * bool(detail)}{detail}")
        self.problem = Problem(Path(file).name, what, "image left out", detail)


@dataclasses.dataclass(frozen=True)
class AnnotatedObject:
    """One object as a file has it.

    Attributes:
        name: Name of its class.
        box: (x1, y1, x2, y2) in pixels with continuous coordinates, NaN for what is no number;
            or as parts of the image where `ImageAnnotation.is_relative`.
        difficult: Not to be counted by evaluation.
        text: The box as it is written, for the report.
        verdict: Why the box as written is unusable, where the conversion to `box` hides it.
        hint: What to say where the box crosses the border, instead of what is always said:
            (kind of problem, action).
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    text: str = ""
    verdict: str = ""
    hint: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class ImageAnnotation:
    """One image and its objects as a file has them.

    Attributes:
        file: Where it is written, for messages.
        image_id: Name of the image, different for every image of the dataset.
        image: Path of the image.
        objects: Its objects.
        size: (width, height) that the file states, in pixels, or None.
        size_name: What the file calls `size`, for the report.
        is_relative: Boxes are parts of the image, 0 to 1.
    """

    file: str | os.PathLike
    image_id: str
    image: Path
    objects: tuple[AnnotatedObject, ...]
    size: tuple[int, int] | None = None
    size_name: str = "size"
    is_relative: bool = False


class Faults:
    """Collects problems; decides whether a fault stops the reader.

    Args:
        on_error: "raise", or "skip" to leave images with faults out.
    """

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip". Received: {on_error!r}')
        self.on_error = on_error
        self.problems: list[Problem] = []

    def add(self, file: str | os.PathLike, what: str, action: str, detail: str = "") -> None:
        """Notes a problem that costs no image."""
        self.problems.append(Problem(Path(file).name, what, action, detail))

    @contextlib.contextmanager
    def skipping_image(self) -> Iterator[None]:
        """A `FileError` in here is raised, or noted and then forgotten."""
        try:
            yield
        except FileError as error:
            if self.on_error == "raise":
                raise
            self.problems.append(error.problem)


def build_dataset(
    source: str | os.PathLike,
    annotations: Iterable[ImageAnnotation | Callable[[], ImageAnnotation]],
    class_names: Sequence[str],
    use_difficult: bool,
    faults: Faults,
) -> DetectionDataset:
    """Makes a dataset of annotations, in their order, and warns of problems once.

    Args:
        source: Folder or file, for messages.
        annotations: The annotations, or functions that make them and may raise a `FileError`.
        class_names: Names of the labels 0, 1, 2, ...
        use_difficult: False leaves difficult objects out.
        faults: The problems up to now, and what to do with faults.

    Raises:
        ValueError: No usable image, all coordinates look relative where pixels are wanted, or a
            fault with `on_error="raise"`.
    """
    class_names = check_class_names(class_names)
    records, pixel_boxes = [], []
    for annotation in annotations:
        with faults.skipping_image():
            annotation = annotation() if callable(annotation) else annotation
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


def find_image(folder: Path, name: str, file: str | os.PathLike) -> Path:
    """The image that a file names: relative to `folder`, or absolute, with "/" or "\\\\".

    An absolute path of another machine gives way to the image of that name in `folder`.

    Raises:
        FileError: There is none.
    """
    plain = name.strip().replace("\\", "/")
    candidates = [folder / name.strip(), folder / plain]
    if plain.startswith("/") or re.match(r"[A-Za-z]:/", plain):
        candidates.append(folder / plain.rsplit("/", 1)[-1])
    for path in candidates:
        if name.strip() and path.is_file():
            return path
    raise FileError(file, "missing image", f"no {name!r} in {folder}")


def plain_path(name: str) -> str:
    """A path of a file as one text for all ways to write it: "a/b.jpg" for ".\\a\\b.jpg"."""
    return str(PurePosixPath(name.strip().replace("\\", "/")))


def number(value: Any) -> float:
    """A number out of a file; NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_text(path: Path, what: str) -> str:
    """Text of a file in UTF-8, with or without a byte order mark; other encodings with one.

    Raises:
        FileError: It cannot be read; `what` says what it was to be.
    """
    try:
        encoded = path.read_bytes()
        is_utf16 = encoded[:2] in (b"\xff\xfe", b"\xfe\xff")
        return encoded.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"unreadable {what}", str(error)) from error


def stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """(width, height) of an image as a file states it; None where it states none."""
    size = number(width), number(height)
    is_known = all(math.isfinite(side) and side >= 1 for side in size)
    return (round(size[0]), round(size[1])) if is_known else None


def _record(annotation: ImageAnnotation, class_names: Sequence[str], faults: Faults) -> ImageRecord:
    for item in annotation.objects:
        if item.name not in class_names:
            raise FileError(
                annotation.file,
                f"unknown class {item.name!r}",
                f"not in `class_names`. {nearest(item.name, class_names)}",
            )
    try:
        info = read_image_info(annotation.image)
    except ValueError as error:
        raise FileError(annotation.image, "unreadable image", str(error)) from error
    boxes, keep = _usable(annotation, info, faults)
    labels = [class_names.index(item.name) for item in annotation.objects]
    return ImageRecord(
        image=str(annotation.image),
        image_id=annotation.image_id,
        boxes=boxes[keep],
        labels=np.asarray(labels, "int32")[keep],
        difficult=np.asarray([item.difficult for item in annotation.objects], bool)[keep],
        info=info,
    )


def _usable(
    annotation: ImageAnnotation, info: ImageInfo, faults: Faults
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) in the upright image, and which of them (bool (n,)) are usable."""
    boxes = [item.box for item in annotation.objects]
    if annotation.is_relative:
        boxes = np.asarray(boxes, "float64").reshape(-1, 4) * ([info.width, info.height] * 2)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is dropped
        boxes = np.asarray(boxes, "float32").reshape(-1, 4)
    if _is_stored_frame(annotation, info, faults):
        boxes = rotate_boxes(boxes, info)
    clipped, verdicts = usable_boxes(boxes, info.width, info.height)
    keep, seen = np.ones(len(boxes), bool), set()
    for i, item in enumerate(annotation.objects):
        verdict = item.verdict or verdicts[i]
        detail, action = f"{item.name} {item.text}", "clipped"
        if verdict == "clipped":
            verdict = "box across the border"
            detail += f" in {info.width} x {info.height}"
            if item.hint:
                (verdict, action), detail = item.hint, f"{item.name} {item.text}"
            elif np.abs(clipped[i] - boxes[i]).max() < ROUNDING:
                verdict = ""
        elif not verdict and (item.name, *clipped[i].tolist()) in seen:
            verdict = "repeated box"
        if verdict in (*_DROPPED, "repeated box"):
            keep[i], action = False, "dropped"
        seen.add((item.name, *clipped[i].tolist()))
        if verdict:
            faults.add(annotation.file, verdict, action, detail)
    return clipped, keep


def _is_stored_frame(annotation: ImageAnnotation, info: ImageInfo, faults: Faults) -> bool:
    """Whether the boxes were drawn on the image as stored, before its EXIF rotation."""
    upright = (info.width, info.height)
    stored = upright[::-1] if orientation_flags(info.orientation)[0] else upright
    file, size, name = annotation.file, annotation.size, annotation.size_name
    if info.orientation != 1 and size == stored != upright:
        action = "boxes rotated with the image"
        detail = f"{info.orientation}, and {name} is that of the image before rotation"
        faults.add(file, "EXIF orientation", action, detail)
        return True
    if info.orientation != 1 and (size is None or stored == upright):
        action = "boxes taken as those of the upright image"
        faults.add(file, "EXIF orientation", action, f"{info.orientation}")
    if size is not None and size != upright:
        action = "boxes kept as pixels of the image"
        detail = f"{size[0]} x {size[1]}, the image has {upright[0]} x {upright[1]}"
        faults.add(file, f"wrong {name}", action, detail)
    return False


def rotate_boxes(boxes: np.ndarray, info: ImageInfo) -> np.ndarray:
    """Boxes of the stored image -> boxes of the upright image."""
    transpose, flip_columns, flip_rows = orientation_flags(info.orientation)
    if transpose:
        boxes = boxes[:, [1, 0, 3, 2]]
    if flip_columns:
        boxes = np.stack(
            [info.width - boxes[:, 2], boxes[:, 1], info.width - boxes[:, 0], boxes[:, 3]], axis=1
        )
    if flip_rows:
        boxes = np.stack(
            [boxes[:, 0], info.height - boxes[:, 3], boxes[:, 2], info.height - boxes[:, 1]], axis=1
        )
    return boxes


def _check_pixels(source: str | os.PathLike, boxes: list) -> None:
    boxes = np.asarray(boxes, "float64").reshape(-1, 4)
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if len(boxes) and 0 < boxes.max() <= 1 and boxes.min() >= 0:
        raise ValueError(
            f"{source}: boxes must be in pixels. Received only numbers within 0 to 1, such as "
            f"{boxes[0].tolist()}"
        )
