"""Writers: annotated images as a dataset in VOC, COCO, YOLO or CSV format.

All formats have one folder of images, `images` or VOC's `JPEGImages`, and lists or files of splits.
A dataset is read back before it appears: what its format cannot hold is refused.
"""

import csv
import io
import json
import os
import shutil
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from keras_resnest.atomic import atomic_folder
from keras_resnest.checks import checked
from keras_resnest.data.dataset import DetectionDataset, ImageRecord
from keras_resnest.data.readers.csv import COLUMNS
from keras_resnest.data.readers.detect_format import DEFAULT_SPLIT, FORMATS, read_detection
from keras_resnest.data.readers.files import (
    SPLIT_SYNONYMS,
    is_split_name,
    unified,
)
from keras_resnest.images import IMAGE_SUFFIXES, encode_image, is_hidden, load_image

TOLERANCE = 0.01  # pixels that a box may move
_IMAGE_FOLDERS = {"voc": "JPEGImages", **dict.fromkeys(("coco", "yolo", "csv"), "images")}
_DROPPED = {name.lower() for name in _IMAGE_FOLDERS.values()}

Rows = dict[str, list[tuple[str, ImageRecord]]]  # (name of the image, record) by split


@checked
def write_detection(
    dataset: DetectionDataset | Mapping[str, DetectionDataset],
    folder: str | os.PathLike,
    format: str,
    link: bool = False,
) -> None:
    """Writes annotated images as a dataset in VOC, COCO, YOLO or CSV format.

    `read_detection` reads the same from it: boxes to 0.01 pixel, class names, difficult objects
    (crowds in COCO; YOLO has none, and a warning counts them), images without objects, and the
    names of image files with their subfolders. The folder appears when it is complete, or not at
    all.

    Args:
        dataset: A `DetectionDataset`, or several by split, with the same class names.
        folder: Folder to create.
        format: "voc", "coco", "yolo" or "csv".
        link: Whether to write symbolic links to image files instead of copies. Images in memory
            are written in any case.

    Raises:
        ValueError: if `folder` exists, an argument is unusable, or the format cannot hold the
            data: a name of a class, image or split, two images of one name, or, in VOC, a box of
            a pixel or less.

    Example:
        >>> train, test = read_detection("my_folder").hold_out(0.2)
        >>> write_detection({"train": train, "val": test}, "for_yolo", "yolo")
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}. Received: {format!r}")
    target = Path(folder).absolute()
    if os.path.lexists(target):
        raise ValueError(f"`folder` must not exist. Received: {folder}")
    splits = dict(dataset) if isinstance(dataset, Mapping) else {DEFAULT_SPLIT: dataset}
    class_names = _check_splits(splits, format)
    with atomic_folder(target) as temporary:
        try:
            rows = _write_images(splits, temporary / _IMAGE_FOLDERS[format], link)
            _WRITERS[format](temporary, rows, class_names)
            _check_written(temporary, rows, class_names, format)
        except ValueError as error:
            reason = str(error).replace(str(temporary), str(folder))
            raise ValueError(f"{format.upper()} cannot hold these data: {reason}") from error


def _check_splits(splits: dict[str, DetectionDataset], format: str) -> list[str]:
    """Returns the class names of all splits."""
    for name in splits:
        is_usable = isinstance(name, str) and name and Path(name).name == name
        if not is_usable or is_hidden(name):
            raise ValueError(f"The names of splits must be names of files. Received: {name!r}")
        if format == "yolo" and name != DEFAULT_SPLIT and not is_split_name(name):
            raise ValueError(f"YOLO's splits must be train, val or test. Received: {name!r}")
    names = [part.class_names for part in splits.values()]
    if not names or any(other != names[0] for other in names):
        raise ValueError(f"All splits must have the same class names. Received: {names}")
    difficult = sum(int(r.difficult.sum()) for part in splits.values() for r in part.records)
    if format == "yolo" and difficult:
        text = f"YOLO has no difficult objects: {difficult} become objects like others"
        warnings.warn(text, stacklevel=3)
    return names[0]


# === Images ===


def _write_images(splits: dict[str, DetectionDataset], folder: Path, link: bool) -> Rows:
    root = _common_folder(splits.values())
    rows: Rows = {split: [] for split in splits}
    for split, part in splits.items():
        for record, image in zip(part.records, part.images(), strict=True):
            if isinstance(image, str):
                image = Path(os.path.abspath(image))
                name = image.relative_to(root)
            else:
                image, suffix = _encoded(image)
                name = _named(record.image_id, suffix)
            folders = (x for x in name.parts[:-1] if x != ".." and unified(x) not in _DROPPED)
            rows[split].append((PurePosixPath(*folders, name.name).as_posix(), record))
            _write(folder / rows[split][-1][0], image, link)
    return rows


def _common_folder(parts: Iterable[DetectionDataset]) -> str | None:
    """The folder where the names of image files start; None without files."""
    folders: set[str] = set()
    for part in parts:
        paths = (r.image for r in part.records if isinstance(r.image, str))
        inner = {os.path.dirname(os.path.abspath(path)) for path in paths}
        own = part.image_folder
        is_above = own and all(Path(path).is_relative_to(own) for path in inner)
        folders |= {own} if is_above else inner
    return os.path.commonpath(folders) if folders else None


def _encoded(image: bytes | np.ndarray) -> tuple[bytes, str]:
    """The bytes of an image file, and a suffix for its format."""
    from PIL import Image

    if isinstance(image, bytes):
        kind = Image.open(io.BytesIO(image)).format.lower()
        return image, f".{kind.replace('mpo', 'jpeg')}"
    return encode_image(load_image(image), "PNG"), ".png"


def _named(image_id: str, suffix: str) -> PurePosixPath:
    """An id as a relative path with the suffix of an image."""
    name = image_id if image_id.lower().endswith(IMAGE_SUFFIXES) else f"{image_id}{suffix}"
    return PurePosixPath(name.lstrip("/"))


def _write(path: Path, content: str | bytes | Path, link: bool = False) -> None:
    """Writes a file that may come again, for another split, but not with another content."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if path.read_bytes() != (content if isinstance(content, bytes) else content.read_bytes()):
            raise ValueError(f"several images need the file {path}")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif link:
        path.symlink_to(content)
    else:
        shutil.copyfile(content, path)


# === Formats ===


def _write_voc(folder: Path, rows: Rows, class_names: list[str]) -> None:
    for split, images in rows.items():
        for name, record in images:
            path = (folder / "Annotations" / name).with_suffix(".xml")
            _write(path, _xml(name, record, class_names))
        lines = (f"{PurePosixPath(name).with_suffix('')}\n" for name, _ in images)
        _write(folder / f"ImageSets/Main/{split}.txt", "".join(lines))
    _write_classes(folder, class_names)


def _xml(name: str, record: ImageRecord, class_names: list[str]) -> bytes:
    """Corners are 1-based and inclusive: a box begins at the next pixel."""
    root = ElementTree.Element("annotation")

    def add(parent, tag, text=None):
        node = ElementTree.SubElement(parent, tag)
        node.text = None if text is None else str(text)
        return node

    add(root, "filename", PurePosixPath(name).name)
    size = add(root, "size")
    for tag, value in (("width", record.width), ("height", record.height), ("depth", 3)):
        add(size, tag, value)
    for label, (x1, y1, x2, y2), difficult in _objects(record):
        if min(x2 - x1, y2 - y1) <= 1:
            raise ValueError(f"{name} has a box of a pixel or less: {[x1, y1, x2, y2]}")
        node = add(root, "object")
        add(node, "name", class_names[label])
        add(node, "difficult", int(difficult))
        box = add(node, "bndbox")
        corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
        for tag, value in corners.items():
            add(box, tag, _shortest(value))
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8")


def _write_coco(folder: Path, rows: Rows, class_names: list[str]) -> None:
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)]
    for split, images in rows.items():
        entries, objects = [], []
        for number, (name, record) in enumerate(images, start=1):
            size = {"width": record.width, "height": record.height}
            entries.append({"id": number, "file_name": name, **size})
            for label, (x1, y1, x2, y2), difficult in _objects(record):
                width, height = _shortest(x2 - x1), _shortest(y2 - y1)
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": number,
                        "category_id": label + 1,
                        "bbox": [x1, y1, width, height],
                        "area": _shortest(width * height),
                        "iscrowd": int(difficult),
                        "segmentation": [],
                    }
                )
        content = {"info": {}, "licenses": [], "images": entries}
        content |= {"annotations": objects, "categories": categories}
        _write(folder / f"annotations/instances_{split}.json", json.dumps(content))


def _write_yolo(folder: Path, rows: Rows, class_names: list[str]) -> None:
    import yaml

    # Stated splits hide others, such as "train2017".
    known = {name: names[0] for names in SPLIT_SYNONYMS for name in names}
    stated = {known[split]: f"{split}.txt" for split in rows} if rows.keys() <= known.keys() else {}
    settings = {**stated, "names": dict(enumerate(class_names))}
    for split, images in rows.items():
        for name, record in images:
            lines = "".join(_yolo_line(record, *row) for row in _objects(record))
            _write((folder / "labels" / name).with_suffix(".txt"), lines)
        if split != DEFAULT_SPLIT:  # "./" means the folder of the list, to Ultralytics too
            _write(folder / f"{split}.txt", "".join(f"./images/{name}\n" for name, _ in images))
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    _write(folder / "data.yaml", text)
    _write_classes(folder, class_names)  # for Label Studio


def _yolo_line(record: ImageRecord, label: int, box: list[float], difficult: bool) -> str:
    x1, y1, x2, y2 = box
    x, width = (x1 + x2) / 2 / record.width, (x2 - x1) / record.width
    y, height = (y1 + y2) / 2 / record.height, (y2 - y1) / record.height
    return f"{label} {x:.9g} {y:.9g} {width:.9g} {height:.9g}\n"


def _write_csv(folder: Path, rows: Rows, class_names: list[str]) -> None:
    for split, images in rows.items():
        stream = io.StringIO(newline="")
        table = csv.writer(stream)
        table.writerow((*COLUMNS, "difficult", "width", "height"))
        for name, record in images:
            found = [(*box, class_names[label], int(hard)) for label, box, hard in _objects(record)]
            for row in found or [("", "", "", "", "", "")]:
                table.writerow((f"images/{name}", *row, record.width, record.height))
        _write(folder / f"{split}.csv", stream.getvalue())
    _write_classes(folder, class_names)


_WRITERS = {"voc": _write_voc, "coco": _write_coco, "yolo": _write_yolo, "csv": _write_csv}


def _objects(record: ImageRecord) -> list[tuple[int, list[float], bool]]:
    """(label, box, difficult) of each object, with no more digits than float32 has."""
    boxes = [[_shortest(str(x)) for x in box] for box in record.boxes]
    return list(zip(record.labels.tolist(), boxes, record.difficult.tolist(), strict=True))


def _shortest(number: str | float) -> float:
    """A number for a file: six digits after the point, and an integer where it is one."""
    number = round(float(number), 6)
    return int(number) if number.is_integer() else number


def _write_classes(folder: Path, class_names: list[str]) -> None:
    text = "".join(f"{name}\n" for name in class_names)
    if text.splitlines() != class_names:
        raise ValueError(f"a class name has several lines: {class_names}")
    _write(folder / "classes.txt", text)


# === Reading back ===


def _check_written(folder: Path, rows: Rows, class_names: list[str], format: str) -> None:
    """Raises `ValueError` unless the written dataset is read as it was given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repeated boxes, EXIF orientation
        for split, images in rows.items():
            is_whole = split == DEFAULT_SPLIT and (format == "yolo" or len(rows) == 1)
            found = read_detection(folder, None if is_whole else split, format=format)
            if found.class_names != class_names:
                raise ValueError(f"the classes {class_names} become {found.class_names}")
            records = {Path(record.image): record for record in found.records}
            for name, record in images:
                path = folder / _IMAGE_FOLDERS[format] / name
                _check_same(name, record, records.get(path), format)


def _check_same(name: str, record: ImageRecord, found: ImageRecord | None, format: str) -> None:
    if found is None:
        raise ValueError(f"the image {name!r} is not found under this name")
    (wanted, wanted_difficult), (rows, difficult) = map(_unique_rows, (record, found))
    is_same = wanted.shape == rows.shape and np.allclose(wanted, rows, rtol=0, atol=TOLERANCE)
    if not is_same or (format != "yolo" and wanted_difficult != difficult):
        lists = ", ".join(f"{x.tolist()} (label, box)" for x in (wanted, rows))
        raise ValueError(f"the objects of {name!r} change: {lists}")


def _unique_rows(record: ImageRecord) -> tuple[np.ndarray, list[bool]]:
    """(label, x1, y1, x2, y2) and `difficult`; a reader keeps the first of equal boxes."""
    rows: dict[tuple, bool] = {}
    for label, box, difficult in _objects(record):
        rows.setdefault((label, *box), difficult)
    return np.reshape(list(rows), (-1, 5)), list(rows.values())
