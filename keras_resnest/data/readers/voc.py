"""Reader of Pascal VOC annotations."""

import collections
import dataclasses
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers import common
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation
from keras_resnest.images import IMAGE_SUFFIXES, find_images


def read_voc(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
    one_based_coordinates: bool = True,
) -> DetectionDataset:
    """Reads annotations in Pascal VOC format (Everingham et al., IJCV 2010).

    The folder has the VOC layout (`JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt`), or
    images and XML files side by side. Images and XML files have the same stem. VOC coordinates are
    1-based and inclusive: [xmin, ymin, xmax, ymax] becomes [xmin - 1, ymin - 1, xmax, ymax].

    Degenerate boxes and boxes outside the image are dropped; boxes that cross the border are
    clipped. If `<size>` shows that boxes were drawn before the EXIF rotation of the image, they
    are rotated with it. The dataset's `report` lists all of this and each wrong `<size>`; one
    `UserWarning` summarizes it.

    Args:
        folder: Folder of the dataset.
        split: Name of a file in `ImageSets/Main`, without ".txt"; images with the flag -1 are
            excluded. Default: all images.
        class_names: Names of the labels 0, 1, 2, ... Default: all names in the XML files of all
            splits, sorted.
        on_error: "raise" a ValueError for a missing or unreadable image or XML file, or a class
            that is not in `class_names`; or "skip" the image and report it.
        use_difficult: Whether to keep objects marked as difficult.
        one_based_coordinates: False for files with 0-based coordinates, which are not shifted.

    Raises:
        ValueError: if there is no such folder or split, if there are no images, or see `on_error`.

    Example:
    ```python
    train = read_voc("VOCdevkit/VOC2007", split="trainval")
    test = read_voc("VOCdevkit/VOC2007", split="test", class_names=train.class_names)
    ```
    """
    faults = Faults(on_error)
    source = _VocFolder(folder)
    image_ids = source.image_ids(split, faults)
    every_id = sorted({*source.xml_files, *image_ids}) if class_names is None else image_ids
    annotations = _parse_all(source, every_id, one_based_coordinates, faults)
    if class_names is None:
        class_names = sorted({o.name for a in annotations.values() for o in a.objects})
        if not class_names:
            raise ValueError(f"No objects in the XML files of {source.folder}: give `class_names`")

    def parse(image_id):
        xml = annotations[image_id]
        image = source.image_file(image_id, xml)
        return ImageAnnotation(xml.path, image_id, image, xml.objects, xml.size)

    usable = [image_id for image_id in image_ids if image_id in annotations]
    return common.build_dataset(source.folder, usable, parse, class_names, use_difficult, faults)


def voc_splits(folder: str | os.PathLike) -> list[str]:
    """Names of the files in `ImageSets/Main`."""
    return sorted(path.stem for path in (Path(folder) / "ImageSets" / "Main").glob("*.txt"))


# === Files ===


class _VocFolder:
    """The files of a VOC dataset."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = common.check_folder(folder, "folder")
        has_voc_layout = (self.folder / "Annotations").is_dir()
        xml_folder = self.folder / "Annotations" if has_voc_layout else self.folder
        self.image_folder = self.folder / "JPEGImages" if has_voc_layout else self.folder
        files = sorted(xml_folder.iterdir())
        self.xml_files = {path.stem: path for path in files if path.suffix.lower() == ".xml"}
        # Maybe `folder` is VOCdevkit instead of VOCdevkit/VOC2007.
        inner = sorted([*self.folder.glob("*/Annotations"), *self.folder.glob("*/*/Annotations")])
        if not self.xml_files and inner:
            raise ValueError(f"No XML files in {folder}. Did you mean {inner[0].parent}?")
        self.image_files: dict[str, list[Path]] = collections.defaultdict(list)
        for path in find_images(self.image_folder):
            self.image_files[path.stem].append(path)
        if not self.xml_files:
            raise ValueError(f"No XML files in {xml_folder}, only images")

    def image_ids(self, split: str | None, faults: Faults) -> list[str]:
        """Stems of the files of a split, or of all images and XML files."""
        if split is None:
            return sorted({*self.xml_files, *self.image_files})
        split_folder = self.folder / "ImageSets" / "Main"
        path = split_folder / f"{split}.txt"
        if not path.is_file():
            splits = voc_splits(self.folder)
            known = f"available: {', '.join(splits)}" if splits else f"no .txt in {split_folder}"
            raise ValueError(f"`split` must be in ImageSets/Main. Received: {split!r}; {known}")
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
        """Id from a line "id", "id.jpg" or "id  flag"; "" if the flag excludes the image."""
        if line not in self.xml_files and (match := re.fullmatch(r"(.*\S)\s+(-1|0|1)", line)):
            line = "" if match[2] == "-1" else match[1]
        stem, suffix = os.path.splitext(line)
        return stem if suffix.lower() in (".xml", *IMAGE_SUFFIXES) else line

    def image_file(self, image_id: str, xml: "_VocXml") -> Path:
        """The image with the stem of the XML file, or else the one named in the file."""
        candidates = self.image_files.get(image_id, [])
        if candidates:
            return next((path for path in candidates if path.name == xml.filename), candidates[0])
        path = self.image_folder / Path(xml.filename).name
        if xml.filename and path.is_file():
            return path
        named = f"and {path.name} does not exist" if xml.filename else "and the file names none"
        detail = f"no image {image_id}.* in {self.image_folder}, {named}"
        raise FileError(xml.path, "missing image", detail)


# === XML ===


@dataclasses.dataclass(frozen=True)
class _VocXml:
    path: Path
    filename: str
    size: tuple[int, int] | None  # width, height
    objects: tuple[AnnotatedObject, ...]


def _parse_all(
    source: _VocFolder, image_ids: Iterable[str], one_based: bool, faults: Faults
) -> dict[str, _VocXml]:
    annotations = {}
    for image_id in image_ids:
        with faults.skipping_image():
            if image_id not in source.xml_files:
                image = source.image_files.get(image_id, [image_id])[0]
                detail = "an image without objects needs an XML file without <object>"
                raise FileError(image, "missing XML file", f"no {image_id}.xml ({detail})")
            annotations[image_id] = _parse_xml(source.xml_files[image_id], one_based)
    return annotations


class _NoDoctype(ElementTree.TreeBuilder):
    """Rejects document types, whose entities can expand to gigabytes or read files."""

    def doctype(self, name, pubid, system):
        raise ValueError("document types and entities are not allowed")


def _parse_xml(path: Path, one_based: bool) -> _VocXml:
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        root = ElementTree.fromstring(path.read_bytes(), parser)
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise FileError(path, "unreadable XML", str(error)) from error
    if root.tag != "annotation":
        raise FileError(path, "unreadable XML", f"expected <annotation>, found <{root.tag}>")
    return _VocXml(
        path=path,
        filename=_text(root, "filename"),
        size=common.stated_size(_text(root, "size/width"), _text(root, "size/height")),
        objects=tuple(_object(path, node, one_based) for node in root.findall("object")),
    )


def _object(path: Path, node: ElementTree.Element, one_based: bool) -> AnnotatedObject:
    name = _text(node, "name")
    if not name:
        raise FileError(path, "unreadable XML", "an <object> without <name>")
    corners = [_text(node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = map(common.number, corners)
    border_problem = None
    # A degenerate box is not shifted: it would become one pixel wide.
    if one_based and x1 < x2 and y1 < y2:
        if min(x1, y1) == 0:
            action = "clipped (for 0-based files, set one_based_coordinates=False)"
            border_problem = "coordinate 0 in 1-based coordinates", action
        x1, y1 = x1 - 1, y1 - 1
    return AnnotatedObject(
        name=name,
        box=(x1, y1, x2, y2),
        difficult=common.is_true(_text(node, "difficult")),
        text=f"[{', '.join(corner or 'missing' for corner in corners)}]",
        border_problem=border_problem,
    )


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()
