"""Reader of YOLO's text files."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnest.checks import check_class_names
from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers import common
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation
from keras_resnest.images import IMAGE_SUFFIXES

YAML_SUFFIXES = (".yaml", ".yml")
_SYNONYMS = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("val", "valid")}


def read_yolo(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads a folder of images with YOLO's text files.

    The text file of an image has one object per line: "class x y width height", with classes from
    0 and the center and sides of the box as fractions of the image; or a polygon,
    "class x1 y1 x2 y2 x3 y3 ...", read as its bounding box. An image whose text file is empty or
    missing has no objects.

    `data.yaml`, if present, names the images ("train:", "val:", "test:": folders, or a text file
    that lists images); otherwise they are in "images/<split>" or "<split>/images". Text files are
    in the folder with "labels" in place of the last "images", or beside the images. `image_id` is
    the path of the image in the folder.

    Boxes belong to the upright image. They are dropped, clipped and reported as in `read_coco`.

    Args:
        folder: Folder of the dataset, or its `data.yaml`.
        split: "train", "val", "test" or another name. Default: all images.
        class_names: Names of the labels 0, 1, 2, ... Classes are matched by name if the folder has
            class names. Default: `names` in `data.yaml`, or the lines of `classes.txt`.
        on_error: "raise" a ValueError for an unreadable image or text file, a text file without
            image, or a class without a name; or "skip" the image and report it.
        use_difficult: No effect: the format has no difficult objects.

    Raises:
        ValueError: if there is no such folder or split, there are no images, text files or class
            names, or see `on_error`.

    Example: `test = read_yolo("data", "val", class_names=train.class_names)`
    """
    faults = Faults(on_error)
    source = _YoloFolder(folder)
    images = source.images(split, faults)
    names = source.names
    if names is None:
        if class_names is None:
            raise ValueError(
                f"{source.folder} has no class names (`names:` in data.yaml, or classes.txt): give "
                "`class_names`"
            )
        names = dict(enumerate(check_class_names(class_names)))
    if class_names is None:
        class_names = list(dict.fromkeys(names.values()))

    def parse(path):
        if path.suffix == ".txt":
            raise FileError(path, "missing image", f"no image {path.stem}.*")
        file = source.label_file(path)
        lines = common.read_text(file, "text file").splitlines() if file.is_file() else []
        rows = [(i, line.split()) for i, line in enumerate(lines, start=1) if line.strip()]
        objects = tuple(_object(file, i, cells, names) for i, cells in rows)
        return ImageAnnotation(file, source.image_id(path), path, objects, is_relative=True)

    paths = [*images, *source.labels_without_image(images)]
    return common.build_dataset(source.folder, paths, parse, class_names, use_difficult, faults)


def yolo_splits(folder: str | os.PathLike) -> list[str]:
    """Names of the splits of a folder or `data.yaml`."""
    return sorted(_YoloFolder(folder).splits())


# === Files ===


class _YoloFolder:
    """The files of a YOLO dataset."""

    def __init__(self, folder: str | os.PathLike):
        path = Path(folder)
        is_yaml = path.is_file() and path.suffix.lower() in YAML_SUFFIXES
        self.folder = path.absolute().parent if is_yaml else common.check_folder(folder, "folder")
        self.yaml_file = path if is_yaml else find_yaml(path)
        self.settings = read_yaml(self.yaml_file) if self.yaml_file else {}
        self.names = self._names()

    def images(self, split: str | None, faults: Faults) -> list[Path]:
        """Unique paths of the images of a split, or of all images, in a fixed order."""
        splits = self.splits()
        if split is None:
            places = self._all_places()
        else:
            key = next((s for s in (split, *_SYNONYMS.get(split, ())) if s in splits), None)
            if key is None:
                known = f"available: {', '.join(splits)}" if splits else "there are no splits"
                raise ValueError(f"`split` must be in {self.folder}. Received: {split!r}; {known}")
            places = splits[key]
        images = [path for place in places for path in self._images_in(place, faults)]
        images = list(dict.fromkeys(images))
        if not images:
            raise ValueError(f"No images in {', '.join(map(str, places))}")
        if not any(self.label_file(path).is_file() for path in images):
            expected = self.label_file(images[0])
            raise ValueError(f"None of the {len(images)} images has a text file like {expected}")
        return images

    def label_file(self, image: Path) -> Path:
        """Text file of an image: in "labels" instead of the last "images", or beside it."""
        beside = image.with_suffix(".txt")
        reversed_parts = list(beside.parts[-2::-1])
        if "images" not in reversed_parts:
            return beside
        reversed_parts[reversed_parts.index("images")] = "labels"
        file = Path(*reversed_parts[::-1], beside.name)
        return file if file.is_file() or not beside.is_file() else beside

    def labels_without_image(self, images: list[Path]) -> list[Path]:
        """Text files in "labels" folders that belong to no image."""
        stems: dict[Path, set[str]] = collections.defaultdict(set)
        for folder in sorted({path.parent for path in images}):
            place = self.label_file(folder / "x").parent
            if "labels" in place.parts and place.is_dir():
                files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
                stems[place] |= {path.stem for path in files}
        return [
            path
            for place, known in stems.items()
            for path in sorted(place.glob("*.txt"))
            if path.stem not in known and path.name != "classes.txt"
        ]

    def image_id(self, image: Path) -> str:
        try:
            return image.relative_to(self.folder).as_posix()
        except ValueError:  # data.yaml may name other folders
            return image.as_posix()

    def splits(self) -> dict[str, list[Path]]:
        """Folders and lists of images by split, from data.yaml or the usual layout."""
        return self._yaml_places() or self._usual_places()

    def _all_places(self) -> list[Path]:
        places = [path for paths in self._yaml_places().values() for path in paths]
        images = [path for path in [self.folder / "images"] if path.is_dir()]
        return places or [*images, *sorted(self.folder.glob("*/images"))] or [self.folder]

    def _yaml_places(self) -> dict[str, list[Path]]:
        splits: dict[str, list[Path]] = {}
        root = self.folder / str(self.settings.get("path") or "")
        for key in ("train", "val", "test"):
            places = self.settings.get(key) or []
            places = [places] if isinstance(places, str) else places
            found = [self._place(root, str(place)) for place in places]
            if found := [path for path in found if path is not None]:
                splits[key] = found
        return splits

    def _usual_places(self) -> dict[str, list[Path]]:
        images = self.folder / "images"
        inner = sorted(p for p in images.iterdir() if p.is_dir()) if images.is_dir() else []
        splits = {path.name: [path] for path in inner}
        for path in sorted(self.folder.glob("*/images")):
            splits.setdefault(path.parent.name, []).append(path)
        return splits

    def _place(self, root: Path, text: str) -> Path | None:
        """Finds a folder or list from data.yaml, which may be relative to another folder."""
        text = text.strip().replace("\\", "/")
        # In exported datasets, "../train/images" means "train/images".
        tried = [root / text, self.folder / text, self.folder / text.removeprefix("../")]
        return next((Path(os.path.normpath(path)) for path in tried if path.exists()), None)

    def _images_in(self, place: Path, faults: Faults) -> Iterator[Path]:
        """Images in a folder and its subfolders, or in a text file that lists them."""
        if place.is_dir():
            files = (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            yield from sorted(path for path in files if path.is_file())
            return
        for line in filter(str.strip, common.read_text(place, "list of images").splitlines()):
            image = None
            with faults.skipping_image():
                image = common.find_image(place.parent, line, place)
            if image is not None:
                yield Path(os.path.normpath(image))

    def _names(self) -> dict[int, str] | None:
        """Class names by number; None if the folder has none."""
        names = self.settings.get("names")
        if names is None:
            files = [self.folder / "classes.txt", self.folder / "labels" / "classes.txt"]
            file = next((file for file in files if file.is_file()), None)
            if file is None:
                return None
            names = list(filter(str.strip, common.read_text(file, "list of classes").splitlines()))
        if isinstance(names, list):
            names = dict(enumerate(names))
        where = self.yaml_file or self.folder
        if not isinstance(names, dict) or not names or not all(map(_is_class, names)):
            detail = f"expected `names: [cat, dog]` or `names: {{0: cat, 1: dog}}`, found {names!r}"
            raise FileError(where, "unreadable class names", detail)
        names = {int(key): str(name).strip() for key, name in names.items()}
        repeated = [n for n, count in collections.Counter(names.values()).items() if count > 1]
        if repeated:
            raise FileError(where, "class name used twice", ", ".join(repeated))
        return dict(sorted(names.items()))


def find_yaml(folder: Path) -> Path | None:
    """Returns `data.yaml` or the only YAML file of a folder; None if there is no such file."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in YAML_SUFFIXES)
    named = [path for path in files if path.stem.lower() in ("data", "dataset")]
    return (named or files)[0] if named or len(files) == 1 else None


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file, or raises `FileError`."""
    import yaml

    try:
        settings = yaml.safe_load(common.read_text(path, "YAML file"))
    except yaml.YAMLError as error:
        raise FileError(path, "unreadable YAML file", str(error)) from error
    if not isinstance(settings, dict):
        raise FileError(path, "unreadable YAML file", f"expected a mapping, found {settings!r}")
    return settings


# === Lines ===


def _is_class(value: Any) -> bool:
    return common.number(value) >= 0 and common.number(value).is_integer()


def _object(file: Path, line: int, cells: list[str], names: dict[int, str]) -> AnnotatedObject:
    is_polygon = len(cells) >= 7 and len(cells) % 2 == 1
    if len(cells) != 5 and not is_polygon:
        detail = f"line {line} has {len(cells)} numbers, not 5 (or a polygon's 7, 9, ...)"
        raise FileError(file, "unreadable line", detail)
    if not _is_class(cells[0]):
        raise FileError(file, "unreadable line", f"line {line} begins with {cells[0]!r}")
    name = names.get(int(common.number(cells[0])))
    if name is None:
        detail = f"class {cells[0]} in line {line}. {common.known_classes(names)}"
        raise FileError(file, "class without a name", detail)
    values = np.asarray([common.number(cell) for cell in cells[1:]])
    if np.isfinite(values).all() and np.abs(values).max() > 2:
        detail = f"line {line} has pixels, not fractions of the image: {' '.join(cells[1:])}"
        raise FileError(file, "coordinates above 1", detail)
    if is_polygon:
        points = values.reshape(-1, 2)
        box = (*points.min(axis=0), *points.max(axis=0))  # NaN of a point stays NaN
    else:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    text = f"[{' '.join(cells[1:5])}{' ...' * is_polygon}] in line {line}"
    return AnnotatedObject(name=name, box=tuple(map(float, box)), text=text)
