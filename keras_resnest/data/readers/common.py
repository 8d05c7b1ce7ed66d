"""Common parts of the detection readers.

A reader parses its file format into `ImageAnnotation`s. `build_dataset` reads the image headers,
converts, checks and clips the boxes, maps class names to labels, and reports the problems.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

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
from keras_resnest.data.readers.files import (
    ANNOTATION_FOLDERS,
    FileError,
    FileTree,
    find_split,
    split_of,
)
from keras_resnest.images import IMAGE_SUFFIXES, ImageInfo, orientation_flags, read_image_info

OnError = Literal["raise", "skip"]
Unannotated = Literal["error", "skip", "background"]
UNANNOTATED = get_args(Unannotated)
ROUNDING = 0.5  # boxes that cross the border by fewer pixels are not reported


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
    missing: str = ""  # such as "missing XML file", if nothing says that it has no objects


class Faults:
    """Collects problems; the arguments are those of the readers."""

    def __init__(self, on_error: OnError, unannotated: Unannotated = "background"):
        self.on_error, self.unannotated = on_error, unannotated
        self.problems: list[Problem] = []

    def warn(self, source: str | os.PathLike, stacklevel: int) -> None:
        """Warns once of all problems."""
        if self.problems:
            text = f"{source}: {count_problems(self.problems)}. See the `report` of the dataset"
            warnings.warn(text, stacklevel=stacklevel + 1)

    def add(self, file: str | os.PathLike, what: str, action: str, detail: str = "") -> None:
        """Adds a problem that does not affect a whole image."""
        self.problems.append(Problem(Path(file).name, what, action, detail))

    def leave_out(self, annotation: ImageAnnotation) -> bool:
        """Whether `unannotated` leaves an image out; raises `FileError` if it is an error."""
        if not annotation.missing or self.unannotated == "background":
            return False
        detail = 'unannotated="background" reads it as an image without objects'
        error = FileError(annotation.image, annotation.missing, detail)
        if self.unannotated == "error":
            raise error
        self.problems.append(error.problem)
        return True

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
    image_folder: Path,
) -> DetectionDataset:
    """Builds a dataset of one image per item, and warns once if there are problems.

    `parse` returns the annotation of an item, or raises `FileError`. `source` is for messages.
    """
    class_names = check_class_names(class_names)
    records, in_pixels, num_objects = [], [], 0
    for item in items:
        with faults.skipping_image():
            annotation = parse(item)
            if faults.leave_out(annotation):
                continue
            records.append(_record(annotation, class_names, faults))
            num_objects += len(annotation.objects)
            if not annotation.is_relative:
                in_pixels += annotation.objects
    _check_pixels(source, in_pixels)
    records = _without_repeated(records, faults)
    if not records:
        raise ValueError(f"No usable image in {source}: {count_problems(faults.problems)}")
    if num_objects and not any(len(record.boxes) for record in records):
        counts = count_problems(faults.problems)
        raise ValueError(f"No usable box in the {len(records)} images of {source}: {counts}")
    if not use_difficult:
        records = [without_difficult(record) for record in records]
    report = summarize(records, class_names, faults.problems)
    faults.warn(source, stacklevel=4)
    dataset = DetectionDataset(records, class_names, report)
    dataset.image_folder = str(image_folder)
    return dataset


# === Parsing ===


def find_images_of(
    file: Path, names: Sequence[str], given: Path | None, allow_outside: bool
) -> tuple[FileTree, Path]:
    """Returns where to look for the images that a file names, and their folder.

    The folder is the one that the user names, or that with the most images among the usual ones:
    beside the file, or else above a folder of annotations.
    """
    here = Path(os.path.abspath(file)).parent
    root = here.parent if here.name.lower() in ANNOTATION_FOLDERS else here
    tree = FileTree(*filter(None, (given, root)), allow_outside=allow_outside)
    if given is not None:
        return tree, given
    split = split_of(file)
    usual = [[], ["images"], ["data"], [split], ["images", split]]
    for base, shortest in itertools.product(dict.fromkeys((here, root)), (None, 1)):
        folders = [path for names in usual if (path := tree.descend(base, names))]
        counts = []
        for folder in folders:
            found = (tree.find(folder, name, IMAGE_SUFFIXES, shortest) for name in names)
            counts.append(sum(map(bool, found)))
        if any(counts):
            return tree, folders[counts.index(max(counts))]
    tried = f"images, data, {split} or images/{split}"
    folders = [path for names in usual if (path := tree.descend(root, names))]
    hint = next(filter(None, (tree.hint(f, name) for f in folders for name in names)), "")
    raise ValueError(f"{file}: give `image_folder`; no image is in {root} or its {tried}{hint}")


def images_of_split(
    path: Path, named: Mapping[str, Iterable[str]], split: str, faults: Faults
) -> list:
    """The images of a split of a file; `named` has the splits of each image, or "" for none."""
    known = list(dict.fromkeys(itertools.chain(*named.values())))
    wanted = find_split(split, known)
    if wanted is None:
        available = ", ".join(filter(None, known)) or "they are not named"
        raise ValueError(f"`split` must be in {path}. Received: {split!r}; available: {available}")
    if "" in known:
        faults.add(path, "images without a split", "left out")
    return [name for name, own in named.items() if wanted in own]


def known_classes(names: Mapping[Any, str]) -> str:
    """The first classes by number, for messages."""
    return "Known: " + ", ".join(f"{key} ({name})" for key, name in list(names.items())[:20])


def normalize_path(name: str) -> str:
    r"""Normalizes a path: "a/b.jpg" for ".\a\b.jpg"."""
    return str(PurePosixPath(name.strip().replace("\\", "/")))


def number(value: Any) -> float:
    """Converts a value to float, or to NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_true(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """Returns an annotated (width, height) as integers; None if it is missing or invalid."""
    size = number(width), number(height)
    is_known = all(math.isfinite(side) and side >= 1 for side in size)
    return (round(size[0]), round(size[1])) if is_known else None


# === From annotation to record ===


def _without_repeated(records: list[ImageRecord], faults: Faults) -> list[ImageRecord]:
    """Leaves out an image that several annotations lead to: it belongs to one of them at most."""
    uses = collections.Counter(record.image for record in records)
    kept = []
    for record in records:
        with faults.skipping_image():
            if uses[record.image] > 1:
                detail = f"{uses[record.image]} annotations lead to it, also {record.image_id!r}"
                raise FileError(record.image, "image used twice", detail)
            kept.append(record)
    return kept


def _record(annotation: ImageAnnotation, class_names: Sequence[str], faults: Faults) -> ImageRecord:
    for item in annotation.objects:
        if item.name not in class_names:
            hint = f"not in `class_names`. {nearest(item.name, class_names)}"
            raise FileError(annotation.file, f"unknown class {item.name!r}", hint)
    info = read_info(annotation.image)
    boxes, keep = _usable(annotation, info, faults)
    labels = np.asarray([class_names.index(item.name) for item in annotation.objects], "int32")
    difficult = np.asarray([item.difficult for item in annotation.objects], bool)
    rows = boxes[keep], labels[keep], difficult[keep]
    return ImageRecord(str(annotation.image), annotation.image_id, *rows, info)


def read_info(path: Path) -> ImageInfo:
    """Reads the header of an image, or raises `FileError`."""
    try:
        return read_image_info(path)
    except ValueError as error:
        raise FileError(path, "unreadable image", str(error)) from error


def _usable(
    annotation: ImageAnnotation, info: ImageInfo, faults: Faults
) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes (n, 4), clipped to the upright image, and which (n,) to keep."""
    boxes = np.asarray([item.box for item in annotation.objects], "float64").reshape(-1, 4)
    if annotation.is_relative:
        boxes = boxes * ([info.width, info.height] * 2)
    boxes = _to_upright(boxes, annotation, info, faults)
    with np.errstate(over="ignore"):  # float32 overflows to infinity, which is dropped below
        boxes = boxes.astype("float32")
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


def _to_upright(
    boxes: np.ndarray, annotation: ImageAnnotation, info: ImageInfo, faults: Faults
) -> np.ndarray:
    """Boxes (n, 4) in pixels of the upright image, drawn at another size or before rotation."""
    upright = (info.width, info.height)
    stored = upright[::-1] if orientation_flags(info.orientation)[0] else upright
    file, size = annotation.file, annotation.size or upright
    frames = sorted((upright, stored), key=lambda frame: frame != size)
    frame = next((frame for frame in frames if _is_same_shape(size, frame)), None)
    detail = f"{size[0]} x {size[1]}, the image has {upright[0]} x {upright[1]}"
    if frame is None:
        raise FileError(file, "wrong size", f"{detail}, another shape: was it cropped or turned?")
    if size != frame:
        is_scaled = max(abs(size[0] - frame[0]), abs(size[1] - frame[1])) > 1
        if is_scaled:
            boxes = boxes * ([frame[0] / size[0], frame[1] / size[1]] * 2)
        action = f"boxes {'scaled with the image' if is_scaled else 'kept as pixels of the image'}"
        faults.add(file, "wrong size", action, detail)
    if frame != upright:
        detail = f"{info.orientation}, and the stated size is that of the image before rotation"
        faults.add(file, "EXIF orientation", "boxes rotated with the image", detail)
        return rotate_boxes(boxes, info)
    if info.orientation != 1 and (annotation.size is None or stored == upright):
        action = "boxes assumed to belong to the upright image"
        faults.add(file, "EXIF orientation", action, f"{info.orientation}")
    return boxes


def _is_same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (width, height) have the same ratio, up to a pixel of rounding."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


def rotate_boxes(boxes: np.ndarray, info: ImageInfo) -> np.ndarray:
    """Converts boxes (n, 4) of the stored image to boxes of the upright image."""
    transpose, flip_columns, flip_rows = orientation_flags(info.orientation)
    x1, y1, x2, y2 = boxes.T[[1, 0, 3, 2]] if transpose else boxes.T
    if flip_columns:
        x1, x2 = info.width - x2, info.width - x1
    if flip_rows:
        y1, y2 = info.height - y2, info.height - y1
    return np.stack([x1, y1, x2, y2], axis=1)


def _check_pixels(source: str | os.PathLike, objects: list[AnnotatedObject]) -> None:
    """Raises `ValueError` if all boxes in pixels are within 0 to 1, before a shift by one pixel."""
    objects = [item for item in objects if np.isfinite(item.box).all()]
    boxes = np.asarray([item.box for item in objects], "float64").reshape(-1, 4)
    if len(boxes) and 0 < boxes.max() <= 1 and boxes.min() >= -1:
        raise ValueError(
            f"{source}: boxes must be in pixels. Received numbers within 0 to 1: {objects[0].text}"
        )
