"""Reader of annotations in COCO's JSON format."""

import collections
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnest.checks import checked
from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers import common, files
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation

SECTIONS = ("images", "annotations", "categories")
_SPLIT_KEY = re.compile(rf'"({"|".join(files.SPLIT_KEYS)})"\s*:'.encode())


@checked
def read_coco(
    annotation_file: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    on_error: common.OnError = "raise",
    use_difficult: bool = True,
    unannotated: common.Unannotated = "background",
    allow_outside: bool = False,
    split: str | None = None,
) -> DetectionDataset:
    """Reads object annotations in COCO's JSON format (Lin et al., ECCV 2014).

    Boxes are [x, y, width, height] in pixels; without `bbox`, the box around the polygons or the
    mask of `segmentation`. Category ids may have gaps. Crowds (`iscrowd`) become `difficult`:
    evaluation ignores them. `image_id` is the `id` of the image, as text.

    Degenerate and repeated boxes and boxes outside the image are dropped; boxes that cross the
    border by half a pixel or more are clipped. EXIF rotation and scaled images are handled as in
    `read_voc`. The `report` lists all of this, annotation ids used twice (both are kept), and
    images listed twice (their annotations are joined).

    Args:
        annotation_file: File such as "instances_train2017.json".
        image_folder: Folder of the images. Default: the folder of the file, "images", "data", or
            the folder of the split (`train2017` for `instances_train2017.json`), whichever has the
            most of them. Of paths on other computers, the end that exists in the folder counts.
        class_names: Names of the labels 0, 1, 2, ... Default: all categories, ordered by id.
        on_error: "raise" a ValueError for a missing or unreadable image, a stated size of another
            shape, an unknown category, a class that is not in `class_names`, or an annotation of an
            unlisted image; or "skip" the image and report it.
        use_difficult: Whether to keep crowds.
        unannotated: Images without annotation: an "error" (see `on_error`), "skip" and report them,
            or "background": they have no objects.
        allow_outside: Whether the file may name images outside of its folder and `image_folder`.
        split: A split that the entries of images name under "split", "subset", ... Default: all.

    Raises:
        ValueError: if there is no such file or folder, it is not a COCO file, no box is usable, or
            see `on_error`.

    Example: `train = read_coco("coco/annotations/instances_train2017.json", "coco/train2017")`
    """
    faults = Faults(on_error, unannotated)
    path = Path(annotation_file)
    content = _load(path)
    given = None if image_folder is None else files.check_folder(image_folder, "image_folder")
    images = _images(path, content["images"], faults)
    image_names = [image["file_name"] for image in images.values()]
    tree, folder = common.find_images_of(path, image_names, given, allow_outside)
    names = _category_names(path, content["categories"], faults)
    class_names = list(dict.fromkeys(names.values())) if class_names is None else class_names
    objects = _objects_by_image(path, content["annotations"], images, faults)
    images = _join_repeated(path, images, objects, faults)
    if split is not None:
        named = {k: {name} for k, name in zip(images, _splits(images.values()), strict=False)}
        images = {k: images[k] for k in common.images_of_split(path, named, split, faults)}

    def parse(key):
        image = images[key]
        return ImageAnnotation(
            file=common.normalize_path(image["file_name"]),  # more helpful than the one JSON file
            image_id=str(key),
            image=tree.image(folder, image["file_name"], path),
            objects=tuple(_object(path, row, names) for row in objects.get(key, [])),
            size=common.stated_size(image.get("width"), image.get("height")),
            missing="" if objects.get(key) else "image without annotation",
        )

    return common.build_dataset(path, images, parse, class_names, use_difficult, faults, folder)


def coco_files(folder: Path) -> dict[str, Path] | None:
    """Annotation files by split, of a folder or named by images; None if it is no COCO dataset."""
    if not folder.is_dir():
        if not _SPLIT_KEY.search(files.read_bytes(folder, "JSON", files.LARGE).replace(b"\0", b"")):
            return {}  # COCO's files take long to parse
        return dict.fromkeys(filter(None, _splits(_load(folder)["images"])), folder)
    inner = files.folders_in(folder)
    found = list(filter(_is_coco, files.annotation_files(folder, ".json")))
    own = {files.split_of(p): p for p in found if p.name.startswith("instances_")}
    by_split = files.by_split(p for p in found if own.get(files.split_of(p), p) == p)
    for place in inner:
        is_split = files.is_split_name(place.name)
        named = [path] if (path := place / "_annotations.coco.json").is_file() else []
        named = named or (files.entries(place, (".json",)) if is_split else [])
        if len(named := list(filter(_is_coco, named))) == 1:
            by_split[place.name] = named[0]
    named = coco_files(*by_split.values()) if len(by_split) == 1 else {}
    return named or by_split or None


def coco_has_objects(path: Path, split: str) -> bool:
    """Whether a split, as images name it or the whole file, has annotations."""
    if coco_files(path):
        content = _load(path)
        named = zip(_splits(content["images"]), content["images"], strict=True)
        ids = {_key(image.get("id")) for name, image in named if name == split}
        return any(_key(row.get("image_id")) in ids for row in content["annotations"])
    content = files.read_bytes(path, "JSON", files.LARGE).replace(b"\0", b"")  # UTF-16 too
    return re.search(rb'"annotations"\s*:\s*\[\s*\{', content) is not None


def _splits(images: Iterable[dict]) -> list[str]:
    """The split that each image names, or ""; an empty list if there is no key of usual splits."""
    spelling: dict[str, str] = {}
    for key in files.SPLIT_KEYS:
        named = [str(image.get(key) or "").strip() for image in images]
        if any(map(files.is_split_name, named)):
            return [spelling.setdefault(files.unified(name), name) for name in named]
    return []


def _is_coco(path: Path) -> bool:
    """Whether a file starts like a COCO file of objects."""
    if path.name.startswith("captions_"):
        return False
    start = files.read_start(path, 1 << 16)  # COCO's file has 450 MB
    is_whole = len(start) < 1 << 16
    found = [f'"{name}"'.encode() in start.replace(b"\0", b"") for name in SECTIONS]  # UTF-16 too
    return all(found) if is_whole else any(found)


def _load(path: Path) -> dict[str, list[dict]]:
    if not os.path.exists(path):
        raise ValueError(f"`annotation_file` must be a JSON file. Received: {path} (no such file)")
    encoded = files.read_bytes(path, "JSON", files.LARGE)
    try:
        content = json.loads(encoded)  # detects UTF-8 and UTF-16
    except (ValueError, RecursionError) as error:
        raise FileError(path, "unreadable JSON", str(error)) from error
    is_dict = isinstance(content, dict)
    lists = [content.get(name) if is_dict else None for name in SECTIONS]
    if not all(isinstance(x, list) and all(isinstance(row, dict) for row in x) for x in lists):
        found = sorted(content) if is_dict else type(content).__name__
        detail = f"expected lists {', '.join(map(repr, SECTIONS))} of objects, found {found}"
        raise FileError(path, "not a COCO file of objects", detail)
    return content


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
    """An id as a dictionary key, with 7.0 and "7" as 7; None if it is not a number or text."""
    is_number = isinstance(value, float) and value.is_integer()
    if is_number or (isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,17}", value)):
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
    ambiguous = set()
    for key, image in images.items():
        name = common.normalize_path(image["file_name"])
        if name in first:
            with faults.skipping_image():
                pair = images[first[name]], image
                sizes = {common.stated_size(i.get("width"), i.get("height")) for i in pair}
                if len(sizes - {None}) > 1:
                    ambiguous.add(name)
                    raise FileError(path, "image listed twice with different sizes", name)
                faults.add(path, "image listed twice", "annotations joined", name)
                objects[first[name]] += objects.pop(key, [])
        first.setdefault(name, key)
    return {key: images[key] for name, key in first.items() if name not in ambiguous}


def _object(path: Path, row: dict, names: dict[Any, str]) -> AnnotatedObject:
    category = _key(row.get("category_id"))
    if category not in names:
        detail = f"{row.get('category_id')!r} of annotation {row.get('id')}"
        raise FileError(path, "unknown category id", f"{detail}. {common.known_classes(names)}")
    box = row.get("bbox") or row.get("segmentation")
    if row.get("bbox"):
        is_box = isinstance(box, list) and len(box) == 4
        x, y, width, height = map(common.number, box if is_box else [None] * 4)
        corners, text = (x, y, x + width, y + height), f"{box} (x, y, width, height)"
    else:
        corners = _mask_box(box) if isinstance(box, dict) else _polygon_box(box)
        text = "without bbox and usable segmentation"
    return AnnotatedObject(
        name=names[category],
        box=corners,
        difficult=any(row.get(key) in (1, "1") for key in ("iscrowd", "ignore")),
        text=text,
    )


def _polygon_box(polygons: Any) -> tuple[float, float, float, float]:
    """The box around polygons [[x1, y1, x2, y2, ...], ...]; NaN if they are not such lists."""
    is_list = isinstance(polygons, list) and all(isinstance(p, list) for p in polygons)
    if not is_list or not polygons or any(len(p) < 6 or len(p) % 2 for p in polygons):
        return (np.nan,) * 4
    points = np.asarray([common.number(x) for polygon in polygons for x in polygon]).reshape(-1, 2)
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def _mask_box(mask: dict) -> tuple[float, float, float, float]:
    """The box around a mask of run lengths, column by column; NaN if they do not fill its size."""
    counts, size = mask.get("counts"), mask.get("size")
    counts = _decode_counts(counts) if isinstance(counts, str) else counts
    numbers = [*counts, *size] if isinstance(counts, list) and isinstance(size, list) else []
    is_valid = len(numbers) > 2 and len(size) == 2 and all(type(n) is int for n in numbers)
    if not is_valid or min(numbers) < 0 or not sum(counts) == size[0] * size[1] < 1 << 40:
        return (np.nan,) * 4
    height, ends = size[0], np.cumsum(counts)
    begins, ends = ends[:-1:2], ends[1::2]  # every second run is the object
    begins, ends = (edges[ends > begins] for edges in (begins, ends))
    if not len(ends):
        return (np.nan,) * 4
    first, last = begins // height, (ends - 1) // height
    top = np.where(first == last, begins % height, 0)
    bottom = np.where(first == last, (ends - 1) % height, height - 1)
    return tuple(map(float, (first.min(), top.min(), last.max() + 1, bottom.max() + 1)))


def _decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's text: 5 bits a character, differences to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) and 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
