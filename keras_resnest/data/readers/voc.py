"""Reader of annotation files in Pascal VOC format."""

import collections
import dataclasses
import functools
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from keras_resnest.data.dataset import DetectionDataset, usable_boxes
from keras_resnest.data.readers.common import (
    AnnotatedObject,
    Faults,
    FileError,
    ImageAnnotation,
    build_dataset,
    number,
    stated_size,
)
from keras_resnest.images import IMAGE_SUFFIXES, find_images


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
    plain folder with images and XML files side by side. An image belongs to the XML file of the
    same stem. VOC's own coordinates are 1-based and inclusive, so [xmin, ymin, xmax, ymax] becomes
    [xmin - 1, ymin - 1, xmax, ymax].

    Dropped and reported: boxes with xmax <= xmin or ymax <= ymin, with coordinates that are no
    numbers, or wholly outside their image. Clipped and reported: boxes that cross the border.
    Reported: a `<size>` that is not that of the image. Images are always upright: where
    `<size>` shows that the boxes were drawn on the stored, not yet rotated image, they are
    rotated with it. One `UserWarning` tells that there are problems.

    Args:
        folder: Folder of the dataset.
        split: Name of a file in `ImageSets/Main`, without ".txt"; in files with a flag in each line
            ("cat_train") the images marked -1 are left out. Default: all images.
        class_names: Names of the labels 0, 1, 2, ... Default: all names in all XML files of the
            folder (not only of the split, so that all splits agree), sorted.
        on_error: What to do with a missing or unreadable image, a missing or unreadable XML
            file, and a class that is not in `class_names`: "raise" a ValueError naming the file, or
            "skip" the image with a line in the report.
        use_difficult: Keep boxes marked as difficult; False leaves them out.
        one_based_coordinates: False for files with 0-based coordinates: they are used as they are.

    Returns:
        `DetectionDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: No such folder or split, no images, or see `on_error`.

    Example:

    ```python
    train = read_voc("VOCdevkit/VOC2007", split="trainval")
    test = read_voc("VOCdevkit/VOC2007", split="test", class_names=train.class_names)
    print(test.report)
    ```
    """
    faults = Faults(on_error)
    source = _VocFolder(folder)
    image_ids = source.image_ids(split, faults)
    every_id = sorted({*source.xml_files, *image_ids}) if class_names is None else image_ids
    annotations = _parse_all(source, every_id, faults)
    if class_names is None:
        class_names = sorted({o.name for a in annotations.values() for o in a.objects})
        if not class_names:
            raise ValueError(f"No objects in the XML files of {source.folder}: give `class_names`")
    images = (
        functools.partial(_annotation, source, i, annotations[i], one_based_coordinates)
        for i in image_ids
        if i in annotations
    )
    return build_dataset(source.folder, images, class_names, use_difficult, faults)


def voc_splits(folder: str | os.PathLike) -> list[str]:
    """Names of the files in `ImageSets/Main`."""
    return sorted(path.stem for path in (Path(folder) / "ImageSets" / "Main").glob("*.txt"))


class _VocFolder:
    """Where the files of a VOC dataset are."""

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
            raise ValueError(f"No XML files in {xml_folder}, only images")

    def image_ids(self, split: str | None, faults: Faults) -> list[str]:
        """Stems of the files of a split; of all images and XML files where split is None."""
        if split is None:
            return sorted({*self.xml_files, *self.image_files})
        split_folder = self.folder / "ImageSets" / "Main"
        path = split_folder / f"{split}.txt"
        if not path.is_file():
            splits = voc_splits(self.folder)
            known = f"available: {', '.join(splits)}" if splits else f"no .txt in {split_folder}"
            raise ValueError(
                f"`split` must be a file in ImageSets/Main. Received: {split!r}; {known}"
            )
        image_ids: dict[str, None] = {}
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            image_id = self._image_id(line.strip())
            if image_id in image_ids:
                faults.add(path, "repeated line", "used once", image_id)
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
        """The image of an annotation: the one of the same stem, else the named one."""
        candidates = self.image_files.get(image_id, [])
        named = [path for path in candidates if path.name == annotation.filename]
        if named or candidates:
            return (named or candidates)[0]
        path = self.image_folder / Path(annotation.filename or image_id).name
        if not annotation.filename or not path.is_file():
            tried = f"nor is there {path.name}" if annotation.filename else "and names no image"
            raise FileError(
                annotation.path,
                "missing image",
                f"no image {image_id}.* in {self.image_folder}, {tried}",
            )
        return path


def _parse_all(
    source: _VocFolder, image_ids: Iterable[str], faults: Faults
) -> dict[str, _VocAnnotation]:
    annotations = {}
    for image_id in image_ids:
        with faults.skipping_image():
            if image_id not in source.xml_files:
                raise FileError(
                    source.image_files.get(image_id, [image_id])[0],
                    "missing XML file",
                    f"no {image_id}.xml (an image without objects has an XML file without "
                    "<object>)",
                )
            annotations[image_id] = _parse_voc_xml(source.xml_files[image_id])
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
        raise FileError(path, "unreadable XML", str(error)) from error
    if root.tag != "annotation":
        raise FileError(path, "unreadable XML", f"expected <annotation>, found <{root.tag}>")
    objects = []
    for node in root.findall("object"):
        name = _text(node, "name")
        if not name:
            raise FileError(path, "unreadable XML", "an <object> without <name>")
        corners = tuple(
            _text(node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        difficult = _text(node, "difficult").lower() in ("1", "true", "yes")
        objects.append(_VocObject(name, corners, difficult))
    return _VocAnnotation(
        path=path,
        filename=_text(root, "filename"),
        size=stated_size(_text(root, "size/width"), _text(root, "size/height")),
        objects=tuple(objects),
    )


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _annotation(
    source: _VocFolder, image_id: str, annotation: _VocAnnotation, one_based: bool
) -> ImageAnnotation:
    return ImageAnnotation(
        file=annotation.path,
        image_id=image_id,
        image=source.image_file(image_id, annotation),
        objects=tuple(_object(item, one_based) for item in annotation.objects),
        size=annotation.size,
        size_name="<size>",
    )


def _object(item: _VocObject, one_based: bool) -> AnnotatedObject:
    written = [number(text) for text in item.corners]
    # Judged as written: after the shift below, a box of xmin = xmax would be one pixel wide.
    (verdict,) = usable_boxes(np.asarray([written]), np.inf, np.inf)[1]
    shift = (1, 1, 0, 0) if one_based else (0, 0, 0, 0)
    hint = None
    if one_based and 0 in written[:2] and min(written[:2]) >= 0:
        action = "clipped (if the files are 0-based: one_based_coordinates=False)"
        hint = ("coordinate 0 in 1-based coordinates", action)
    return AnnotatedObject(
        name=item.name,
        box=tuple(value - by for value, by in zip(written, shift, strict=True)),
        difficult=item.difficult,
        text=f"[{', '.join(text or 'missing' for text in item.corners)}]",
        verdict=verdict if verdict in ("invalid coordinates", "degenerate box") else "",
        hint=hint,
    )
