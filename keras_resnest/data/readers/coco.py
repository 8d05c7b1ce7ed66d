"""Reader of annotations in COCO's JSON format."""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_resnest.checks import check_class_names
from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers import common
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation

SECTIONS = ("images", "annotations", "categories")


def read_coco(
    annotation_file: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads object annotations in COCO's JSON format (Lin et al., ECCV 2014).

    Boxes are [x, y, width, height] in pixels. Category ids may have gaps. Crowds (`iscrowd`) become
    `difficult`: evaluation ignores them. Images without annotations are kept. `image_id` is the
    `id` of the image, as text.

    Degenerate and repeated boxes and boxes outside the image are dropped; boxes that cross the
    border by half a pixel or more are clipped. EXIF rotation is handled as in `read_voc`. The
    `report` lists all of this, wrong image sizes, annotation ids used twice (both are kept), and
    images listed twice (their annotations are joined).

    Args:
        annotation_file: File such as "instances_train2017.json".
        image_folder: Folder of the images. Default: the folder of the file, "images", or the folder
            of the split (`train2017` for `instances_train2017.json`).
        class_names: Names of the labels 0, 1, 2, ... Default: all categories, ordered by id.
        on_error: "raise" a ValueError for a missing or unreadable image, an unknown category, a
            class that is not in `class_names`, or an annotation of an unlisted image; or "skip" the
            image and report it.
        use_difficult: Whether to keep crowds.

    Raises:
        ValueError: if there is no such file or folder, if it is not a COCO file, or see `on_error`.

    Example: `train = read_coco("coco/annotations/instances_train2017.json", "coco/train2017")`
    """
    faults = Faults(on_error)
    path = Path(annotation_file)
    content = _load(path)
    folder = _image_folder(path, content["images"], image_folder)
    names = _category_names(path, content["categories"], faults)
    class_names = list(dict.fromkeys(names.values())) if class_names is None else class_names
    class_names = check_class_names(class_names)
    images = _images(path, content["images"], faults)
    objects = _objects_by_image(path, content["annotations"], images, faults)
    images = _join_repeated(path, images, objects, faults)

    def parse(key):
        image = images[key]
        return ImageAnnotation(
            file=common.normalize_path(image["file_name"]),  # more helpful than the one JSON file
            image_id=str(key),
            image=common.find_image(folder, image["file_name"], path),
            objects=tuple(_object(path, row, names) for row in objects.get(key, [])),
            size=common.stated_size(image.get("width"), image.get("height")),
        )

    return common.build_dataset(path, images, parse, class_names, use_difficult, faults)


def _load(path: Path) -> dict[str, list[dict]]:
    if not path.is_file():
        raise ValueError(f"`annotation_file` must be a JSON file. Received: {path} (no such file)")
    try:
        content = json.loads(path.read_bytes())  # detects UTF-8 and UTF-16
    except (ValueError, OSError, RecursionError) as error:
        raise FileError(path, "unreadable JSON", str(error)) from error
    is_dict = isinstance(content, dict)
    lists = [content.get(name) if is_dict else None for name in SECTIONS]
    if not all(isinstance(x, list) and all(isinstance(row, dict) for row in x) for x in lists):
        found = sorted(content) if is_dict else type(content).__name__
        detail = f"expected lists {', '.join(map(repr, SECTIONS))} of objects, found {found}"
        raise FileError(path, "not a COCO file of objects", detail)
    return content


def _image_folder(path: Path, images: list[dict], given: str | os.PathLike | None) -> Path:
    if given is not None:
        return common.check_folder(given, "image_folder")
    here, above = path.absolute().parent, path.absolute().parent.parent
    split = path.stem.removeprefix("instances_")
    folders = [here, here / "images", here / split, above / split]
    folders += [above / "images" / split, above / "images"]
    names = [str(image.get("file_name", "")) for image in images[:20]]  # some may be missing
    for folder in folders:
        if any(common.locate_image(folder, name) for name in names):
            return folder
    tried = ", ".join(map(str, folders))
    raise ValueError(f"{path}: give `image_folder`; the images are in none of {tried}")


def _category_names(path: Path, categories: list[dict], faults: Faults) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in categories:
        key, name = _key(category.get("id")), category.get("name")
        if key is None or not isinstance(name, str) or not name.strip():
            raise FileError(path, "unreadable category", str(category)[:200])
        name = name.strip()
        if names.get(key, name) != name:
            raise FileError(path, "category id used twice", f"{key}: {names[key]!r}, {name!r}")
        if name in names.values():
            faults.add(path, "repeated category name", "used as one class", name)
        names[key] = name
    if not names:
        raise FileError(path, "no categories")
    are_numbers = all(isinstance(key, int) for key in names)
    return dict(sorted(names.items())) if are_numbers else names


def _key(value: Any) -> int | str | None:
    """An id as a dictionary key, with 7.0 as 7; None if it is not a number or text."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _images(path: Path, images: list[dict], faults: Faults) -> dict[Any, dict]:
    """Image entries by id; an id with several files is a fault."""
    found: dict[Any, dict] = {}
    ambiguous = set()
    for image in images:
        key = _key(image.get("id"))
        with faults.skipping_image():
            if key is None or not isinstance(image.get("file_name"), str):
                raise FileError(path, "unreadable image entry", str(image)[:200])
            first = found.setdefault(key, image)
            if first["file_name"] != image["file_name"]:
                ambiguous.add(key)
                detail = f"{key}: {first['file_name']}, {image['file_name']}"
                raise FileError(path, "image id used twice", detail)
            if first is not image:
                faults.add(path, "repeated image entry", "used once", f"id {key}")
    return {key: image for key, image in found.items() if key not in ambiguous}


def _objects_by_image(
    path: Path, annotations: list[dict], images: Mapping[Any, dict], faults: Faults
) -> dict[Any, list[dict]]:
    objects: dict[Any, list[dict]] = collections.defaultdict(list)
    seen = set()
    for row in annotations:
        key, own = _key(row.get("image_id")), _key(row.get("id"))
        if own is not None and own in seen:
            faults.add(path, "annotation id used twice", "both kept", str(own))
        seen.add(own)
        with faults.skipping_image():
            if key not in images:
                detail = f"annotation {own} of image_id {row.get('image_id')!r}"
                raise FileError(path, "annotation of an image that is not listed", detail)
            objects[key].append(row)
    return objects


def _join_repeated(
    path: Path, images: dict[Any, dict], objects: dict[Any, list[dict]], faults: Faults
) -> dict[Any, dict]:
    """Keeps the first entry of each file, and moves the annotations of the others to it."""
    first: dict[str, Any] = {}
    for key, image in images.items():
        name = common.normalize_path(image["file_name"])
        if name in first:
            faults.add(path, "image listed twice", "annotations joined", name)
            objects[first[name]] += objects.pop(key, [])
        first.setdefault(name, key)
    return {key: images[key] for key in first.values()}


def _object(path: Path, row: dict, names: dict[Any, str]) -> AnnotatedObject:
    category = _key(row.get("category_id"))
    if category not in names:
        detail = f"{row.get('category_id')!r} of annotation {row.get('id')}"
        raise FileError(path, "unknown category id", f"{detail}. {common.known_classes(names)}")
    box = row.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4
    x, y, width, height = map(common.number, box if is_box else [None] * 4)
    return AnnotatedObject(
        name=names[category],
        box=(x, y, x + width, y + height),
        difficult=any(row.get(key) in (1, "1") for key in ("iscrowd", "ignore")),
        text=f"{box} (x, y, width, height)",
    )
