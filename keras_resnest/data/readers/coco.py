"""Reader of annotation files in the JSON format of COCO."""

import collections
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_resnest.checks import check_class_names
from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers.common import (
    AnnotatedObject,
    Faults,
    FileError,
    ImageAnnotation,
    build_dataset,
    find_image,
    number,
    plain_path,
    stated_size,
)

SECTIONS = ("images", "annotations", "categories")


def read_coco(
    annotation_file: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads object annotations in COCO's JSON format (Lin et al., ECCV 2014).

    Boxes are [x, y, width, height] in pixels. Labels go by the names of the categories, so their
    ids may have gaps and begin anywhere. A crowd (`iscrowd`) is `difficult`: evaluation does not
    count it. Images without annotations are kept. `image_id` is the image's `id`, as text.

    Dropped and reported: boxes without area, with coordinates that are no numbers, wholly outside
    their image, or repeated. Clipped and reported: boxes that cross the border by half a pixel
    or more. Reported: a size that is not that of the image, ids of annotations that are used
    twice (both stay), images listed twice (their annotations are joined). EXIF rotation as in
    `read_voc`, with `width` and `height` in the place of `<size>`.

    Args:
        annotation_file: File such as "instances_train2017.json".
        image_folder: Folder of the images. Default: looked for beside the file, in "images", and
            in the folder of the split (`train2017` of `instances_train2017.json`).
        class_names: Names of the labels 0, 1, 2, ...; may be more, and in another order, than the
            categories that the annotations use. Default: all categories, by their ids.
        on_error: What to do with a missing or unreadable image, a category that is unknown or
            not in `class_names`, or an annotation of an image that is not listed: "raise" a
            ValueError naming the file, or "skip" the image with a line in the report.
        use_difficult: Keep crowds, marked as difficult; False leaves them out.

    Returns:
        `DetectionDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: No such file or folder, not such a JSON file, or see `on_error`.

    Example:

    ```python
    train = read_coco("coco/annotations/instances_train2017.json", "coco/train2017")
    print(train.report)
    ```
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
    pictures = [
        functools.partial(_annotation, path, folder, image, objects, names)
        for image in _joined(path, images, objects, faults)
    ]
    return build_dataset(path, pictures, class_names, use_difficult, faults)


def _load(path: Path) -> dict[str, list]:
    if not path.is_file():
        raise ValueError(f"`annotation_file` must be a JSON file. Received: {path} (no such file)")
    try:
        content = json.loads(path.read_bytes())  # finds UTF-8 (with or without a mark) and UTF-16
    except (ValueError, OSError, RecursionError) as error:
        raise FileError(path, "unreadable JSON", str(error)) from error
    found = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) and all(isinstance(row, dict) for row in content[name])
        for name in SECTIONS
    ):
        raise FileError(
            path,
            "not a COCO file of objects",
            f"expected lists {', '.join(map(repr, SECTIONS))} of objects, found {found}",
        )
    return content


def _image_folder(path: Path, images: list[dict], given: str | os.PathLike | None) -> Path:
    if given is not None:
        if not Path(given).is_dir():
            raise ValueError(f"`image_folder` must be a folder. Received: {given} (no such folder)")
        return Path(given)
    here, above = path.absolute().parent, path.absolute().parent.parent
    split = path.stem.removeprefix("instances_")
    places = [here, here / "images", here / split, above / split]
    places += [above / "images" / split, above / "images"]
    for place in places:
        for image in images[:20]:  # some of them may be missing
            try:
                find_image(place, str(image.get("file_name", "")), path)
                return place
            except FileError:
                continue
    tried = ", ".join(str(place) for place in places)
    raise ValueError(f"{path}: give `image_folder`; its images are in none of {tried}")


def _category_names(path: Path, categories: list[dict], faults: Faults) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in categories:
        key, name = _key(category.get("id")), category.get("name")
        if key is None or not isinstance(name, str) or not name.strip():
            raise FileError(path, "unreadable category", str(category)[:200])
        if names.get(key, name.strip()) != name.strip():
            raise FileError(path, "category id used twice", f"{key}: {names[key]!r}, {name!r}")
        if name.strip() in names.values():
            faults.add(path, "repeated category name", "used as one class", name)
        names[key] = name.strip()
    if not names:
        raise FileError(path, "no categories")
    by_number = all(isinstance(key, int) for key in names)
    return {key: names[key] for key in (sorted(names) if by_number else names)}


def _key(value: Any) -> Any:
    """An id as a dictionary's key: 7 and 7.0 are the same; None for what cannot be an id."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _images(path: Path, images: list[dict], faults: Faults) -> dict[Any, dict]:
    """Entries of the images by id."""
    found: dict[Any, dict] = {}
    ambiguous = set()
    for image in images:
        key = _key(image.get("id"))
        with faults.skipping_image():
            if key is None or not isinstance(image.get("file_name"), str):
                raise FileError(path, "unreadable image entry", str(image)[:200])
            if key not in found:
                found[key] = image
            elif found[key]["file_name"] == image["file_name"]:
                faults.add(path, "repeated image entry", "used once", f"id {key}")
            else:
                ambiguous.add(key)
                detail = f"{key}: {found[key]['file_name']}, {image['file_name']}"
                raise FileError(path, "image id used twice", detail)
    return {key: image for key, image in found.items() if key not in ambiguous}


def _objects_by_image(
    path: Path, annotations: list[dict], images: Mapping[Any, dict], faults: Faults
) -> dict[Any, list[dict]]:
    objects: dict[Any, list[dict]] = collections.defaultdict(list)
    seen = set()
    for row in annotations:
        key, own = _key(row.get("image_id")), _key(row.get("id"))
        if own is not None and own in seen:
            faults.add(path, "annotation id used twice", "both kept", f"{own}")
        seen.add(own)
        with faults.skipping_image():
            if key not in images:
                detail = f"annotation {own} of image_id {row.get('image_id')!r}"
                raise FileError(path, "annotation of an image that is not listed", detail)
            objects[key].append(row)
    return objects


def _joined(
    path: Path, images: dict[Any, dict], objects: dict[Any, list[dict]], faults: Faults
) -> list[dict]:
    """Entries of different files; the annotations of others go to the first of the same file."""
    first: dict[str, Any] = {}
    for key, image in images.items():
        name = plain_path(image["file_name"])
        if name in first:
            faults.add(path, "image listed twice", "annotations joined", name)
            objects[first[name]] += objects.pop(key, [])
        first.setdefault(name, key)
    return [images[key] for key in first.values()]


def _annotation(
    path: Path, folder: Path, image: dict, objects: dict[Any, list[dict]], names: dict[Any, str]
) -> ImageAnnotation:
    picture = find_image(folder, image["file_name"], path)
    key = _key(image["id"])
    return ImageAnnotation(
        # Faults are told by the image: the one JSON file says little.
        file=plain_path(image["file_name"]),
        image_id=str(key),
        image=picture,
        objects=tuple(_object(path, row, names) for row in objects.get(key, [])),
        size=stated_size(image.get("width"), image.get("height")),
    )


def _object(path: Path, row: dict, names: dict[Any, str]) -> AnnotatedObject:
    category = _key(row.get("category_id"))
    if category not in names:
        known = ", ".join(f"{key} ({name})" for key, name in list(names.items())[:20])
        detail = f"{row.get('category_id')!r} of annotation {row.get('id')}. Known: {known}"
        raise FileError(path, "unknown category id", detail)
    box = row.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4
    x, y, width, height = (number(value) for value in (box if is_box else [None] * 4))
    return AnnotatedObject(
        name=names[category],
        box=(x, y, x + width, y + height),
        difficult=any(row.get(key) in (1, "1") for key in ("iscrowd", "ignore")),
        text=f"{box} (x, y, width, height)",
    )
