"""Reader of annotation files in Pascal VOC format."""

import collections
import dataclasses
import math
import os
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from keras_resnest.data.dataset import (
    DetectionDataset,
    ImageRecord,
    Problem,
    check_class_names,
    count_problems,
    nearest,
    summarize,
    usable_boxes,
    without_difficult,
)
from keras_resnest.data.images import (
    IMAGE_SUFFIXES,
    PictureInfo,
    find_images,
    orientation_flags,
    read_picture_info,
)


class _FileError(ValueError):
    """A fault that stops the reader, or costs a picture with `on_error="skip"`."""

    def __init__(self, file: str | os.PathLike, what: str, detail: str = ""):
        super().__init__(f"{file}: {what}{': ' * bool(detail)}{detail}")
        self.problem = Problem(Path(file).name, what, "picture left out", detail)


@dataclasses.dataclass(frozen=True)
class _VocObject:
    name: str
    corners: tuple[str, ...]  # texts of xmin, ymin, xmax, ymax
    difficult: bool


@dataclasses.dataclass(frozen=True)
class _VocAnnotation:
    path: Path
    filename: str
    size: tuple[int, int] | None  # width, height
    objects: tuple[_VocObject, ...]


def read_voc(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
    one_based_coordinates: bool = True,
) -> DetectionDataset:
    """Reads annotations in Pascal VOC format (Everingham et al., IJCV 2010).

    Two layouts: the one of VOC (`JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt`), and a
    plain folder with pictures and XML files side by side. A picture belongs to the XML file of the
    same stem. VOC's own coordinates are 1-based and inclusive, so [xmin, ymin, xmax, ymax] becomes
    [xmin - 1, ymin - 1, xmax, ymax].

    Dropped and reported: boxes with xmax <= xmin or ymax <= ymin, with coordinates that are no
    numbers, or wholly outside their picture. Clipped and reported: boxes that cross the border.
    Reported: a `<size>` that is not that of the picture. Pictures are always upright: where
    `<size>` shows that the boxes were drawn on the stored, not yet rotated picture, they are
    rotated with it. One `UserWarning` tells that there are problems.

    Args:
        folder: Folder of the data set.
        split: Name of a file in `ImageSets/Main`, without ".txt"; in files with a flag in each line
            ("cat_train") the pictures marked -1 are left out. Default: all pictures.
        class_names: Names of the labels 0, 1, 2, ... Default: all names in all XML files of the
            folder (not only of the split, so that all splits agree), sorted.
        on_error: What to do with a missing or unreadable picture, a missing or unreadable XML
            file, and a class that is not in `class_names`: "raise" a ValueError naming the file, or
            "skip" the picture with a line in the report.
        use_difficult: Keep boxes marked as difficult; False leaves them out.
        one_based_coordinates: False for files with 0-based coordinates: they are used as they are.

    Returns:
        `DetectionDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: No such folder or split, no pictures, or see `on_error`.

    Example:

    ```python
    train = read_voc("VOCdevkit/VOC2007", split="trainval")
    test = read_voc("VOCdevkit/VOC2007", split="test", class_names=train.class_names)
    print(test.report)
    ```
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'`on_error` must be "raise" or "skip". Received: {on_error!r}')
    source = _VocFolder(folder)
    problems: list[Problem] = []
    image_ids = source.image_ids(split, problems)
    every_id = sorted({*source.xml_files, *image_ids}) if class_names is None else image_ids
    annotations = _parse_all(source, every_id, on_error, problems)
    if class_names is None:
        class_names = sorted({o.name for a in annotations.values() for o in a.objects})
        if not class_names:
            raise ValueError(f"No objects in the XML files of {source.folder}: give `class_names`")
    class_names = check_class_names(class_names)

    records = []
    for image_id in image_ids:
        if image_id not in annotations:
            continue
        try:
            records.append(
                _voc_record(
                    source.image_file(image_id, annotations[image_id]),
                    annotations[image_id],
                    class_names,
                    one_based_coordinates,
                    problems,
                )
            )
        except _FileError as error:
            if on_error == "raise":
                raise
            problems.append(error.problem)
    if not records:
        raise ValueError(f"No usable picture in {source.folder}: {count_problems(problems)}")
    if not use_difficult:
        records = [without_difficult(record) for record in records]
    report = summarize(records, class_names, problems)
    if problems:
        warnings.warn(
            f"{source.folder}: {count_problems(problems)}. See the `report` of the data set",
            stacklevel=2,
        )
    return DetectionDataset(records, class_names, report)


class _VocFolder:
    """Where the files of a VOC data set are."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"`folder` must be a folder. Received: {folder} (no such folder)")
        self.has_voc_layout = (self.folder / "Annotations").is_dir()
        xml_folder = self.folder / "Annotations" if self.has_voc_layout else self.folder
        self.image_folder = self.folder / "JPEGImages" if self.has_voc_layout else self.folder
        self.xml_files = {
            path.stem: path
            for path in sorted(xml_folder.iterdir())
            if path.suffix.lower() == ".xml"
        }
        self.image_files: dict[str, list[Path]] = collections.defaultdict(list)
        # Those who name VOCdevkit instead of VOCdevkit/VOC2007 are told so.
        inner = sorted([*self.folder.glob("*/Annotations"), *self.folder.glob("*/*/Annotations")])
        if not self.xml_files and inner:
            raise ValueError(f"No XML files in {folder}. Did you mean {inner[0].parent}?")
        for path in find_images(self.image_folder):
            self.image_files[path.stem].append(path)
        if not self.xml_files:
            raise ValueError(f"No XML files in {xml_folder}, only pictures")

    def image_ids(self, split: str | None, problems: list[Problem]) -> list[str]:
        """Stems of the files of a split; of all pictures and XML files where split is None."""
        if split is None:
            return sorted({*self.xml_files, *self.image_files})
        split_folder = self.folder / "ImageSets" / "Main"
        path = split_folder / f"{split}.txt"
        if not path.is_file():
            splits = sorted(p.stem for p in split_folder.glob("*.txt"))
            known = f"available: {', '.join(splits)}" if splits else f"no .txt in {split_folder}"
            raise ValueError(
                f"`split` must be a file in ImageSets/Main. Received: {split!r}; {known}"
            )
        image_ids: dict[str, None] = {}
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            image_id = self._image_id(line.strip())
            if image_id in image_ids:
                problems.append(Problem(path.name, "repeated line", "used once", image_id))
            elif image_id:
                image_ids[image_id] = None
        if not image_ids:
            raise ValueError(f"{path}: the split is empty")
        return list(image_ids)

    def _image_id(self, line: str) -> str:
        """Id in a line "id", "id.jpg" or "id  flag"; "" where the flag says: not in this split."""
        if line not in self.xml_files and (match := re.fullmatch(r"(.*\S)\s+(-1|0|1)", line)):
            line = "" if match[2] == "-1" else match[1]
        stem, suffix = os.path.splitext(line)
        return stem if suffix.lower() in (".xml", *IMAGE_SUFFIXES) else line

    def image_file(self, image_id: str, annotation: _VocAnnotation) -> Path:
        """The picture of an annotation: the one of the same stem, else the named one."""
        candidates = self.image_files.get(image_id, [])
        named = [path for path in candidates if path.name == annotation.filename]
        if named or candidates:
            return (named or candidates)[0]
        path = self.image_folder / Path(annotation.filename or image_id).name
        if not annotation.filename or not path.is_file():
            tried = f"nor is there {path.name}" if annotation.filename else "and names no picture"
            raise _FileError(
                annotation.path,
                "missing picture",
                f"no picture {image_id}.* in {self.image_folder}, {tried}",
            )
        return path


def _parse_all(
    source: _VocFolder, image_ids: Iterable[str], on_error: str, problems: list[Problem]
) -> dict[str, _VocAnnotation]:
    annotations = {}
    for image_id in image_ids:
        try:
            if image_id not in source.xml_files:
                raise _FileError(
                    source.image_files.get(image_id, [image_id])[0],
                    "missing XML file",
                    f"no {image_id}.xml (a picture without objects has an XML file without "
                    "<object>)",
                )
            annotations[image_id] = _parse_voc_xml(source.xml_files[image_id])
        except _FileError as error:
            if on_error == "raise":
                raise
            problems.append(error.problem)
    return annotations


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types, and with them entities that expand to gigabytes or read files."""

    def doctype(self, name, pubid, system):
        raise ValueError("document types and entities are not allowed")


def _parse_voc_xml(path: Path) -> _VocAnnotation:
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        root = ElementTree.fromstring(path.read_bytes(), parser)
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise _FileError(path, "unreadable XML", str(error)) from error
    if root.tag != "annotation":
        raise _FileError(path, "unreadable XML", f"expected <annotation>, found <{root.tag}>")
    objects = []
    for node in root.findall("object"):
        name = _text(node, "name")
        if not name:
            raise _FileError(path, "unreadable XML", "an <object> without <name>")
        corners = tuple(
            _text(node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        difficult = _text(node, "difficult").lower() in ("1", "true", "yes")
        objects.append(_VocObject(name, corners, difficult))
    size = _number(_text(root, "size/width")), _number(_text(root, "size/height"))
    known_size = all(math.isfinite(side) and side >= 1 for side in size)
    return _VocAnnotation(
        path=path,
        filename=_text(root, "filename"),
        size=(round(size[0]), round(size[1])) if known_size else None,
        objects=tuple(objects),
    )


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _voc_record(
    image_path: Path,
    annotation: _VocAnnotation,
    class_names: Sequence[str],
    one_based_coordinates: bool,
    problems: list[Problem],
) -> ImageRecord:
    for item in annotation.objects:
        if item.name not in class_names:
            raise _FileError(
                annotation.path,
                f"unknown class {item.name!r}",
                f"not in `class_names`. {nearest(item.name, class_names)}",
            )
    try:
        info = read_picture_info(image_path)
    except ValueError as error:
        raise _FileError(image_path, "unreadable picture", str(error)) from error
    boxes, keep = _voc_boxes(annotation, info, one_based_coordinates, problems)
    labels = [class_names.index(item.name) for item in annotation.objects]
    return ImageRecord(
        image=str(image_path),
        image_id=annotation.path.stem,
        boxes=boxes[keep],
        labels=np.asarray(labels, "int32")[keep],
        difficult=np.asarray([item.difficult for item in annotation.objects], bool)[keep],
        info=info,
    )


def _voc_boxes(
    annotation: _VocAnnotation, info: PictureInfo, one_based: bool, problems: list[Problem]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) in the upright picture, and which of them (bool (n,)) are usable."""
    file = annotation.path.name
    written = [[_number(text) for text in item.corners] for item in annotation.objects]
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is dropped
        written = np.asarray(written, "float32").reshape(-1, 4)
    # Judged as written: after the shift below, a box of xmin = xmax would be one pixel wide.
    _, verdicts_as_written = usable_boxes(written, np.inf, np.inf)
    boxes = written - np.asarray([1, 1, 0, 0], "float32") * one_based
    if _is_stored_frame(annotation, info, problems):
        boxes = _rotate_boxes(boxes, info)
    boxes, verdicts = usable_boxes(boxes, info.width, info.height)
    keep = np.ones(len(boxes), bool)
    for i, item in enumerate(annotation.objects):
        verdict = verdicts[i]
        if verdicts_as_written[i] in ("invalid coordinates", "degenerate box"):
            verdict = verdicts_as_written[i]
        keep[i] = verdict in ("", "clipped")
        detail = f"{item.name} [{', '.join(text or 'missing' for text in item.corners)}]"
        if not keep[i]:
            problems.append(Problem(file, verdict, "dropped", detail))
        elif verdict and one_based and 0 in written[i, :2] and written[i, :2].min() >= 0:
            what = "coordinate 0 in 1-based coordinates"
            action = "clipped (if the files are 0-based: one_based_coordinates=False)"
            problems.append(Problem(file, what, action, detail))
        elif verdict:
            detail += f" in {info.width} x {info.height}"
            problems.append(Problem(file, "box across the border", "clipped", detail))
    return boxes, keep


def _is_stored_frame(
    annotation: _VocAnnotation, info: PictureInfo, problems: list[Problem]
) -> bool:
    """Whether the boxes were drawn on the picture as stored, before its EXIF rotation."""
    upright = (info.width, info.height)
    stored = upright[::-1] if orientation_flags(info.orientation)[0] else upright
    file, size = annotation.path.name, annotation.size
    if info.orientation != 1 and size == stored != upright:
        action = "boxes rotated with the picture"
        detail = f"{info.orientation}, and <size> is that of the picture before rotation"
        problems.append(Problem(file, "EXIF orientation", action, detail))
        return True
    if info.orientation != 1 and (size is None or stored == upright):
        action = "boxes taken as those of the upright picture"
        problems.append(Problem(file, "EXIF orientation", action, f"{info.orientation}"))
    if size is not None and size != upright:
        action = "boxes kept as pixels of the picture"
        detail = f"{size[0]} x {size[1]}, the picture has {upright[0]} x {upright[1]}"
        problems.append(Problem(file, "wrong <size>", action, detail))
    return False


def _rotate_boxes(boxes: np.ndarray, info: PictureInfo) -> np.ndarray:
    """Boxes of the stored picture -> boxes of the upright picture."""
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
