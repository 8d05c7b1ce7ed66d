"""Reader of folders with YOLO's text files."""

import collections
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    read_text,
)
from keras_resnest.images import IMAGE_SUFFIXES

YAML_SUFFIXES = (".yaml", ".yml")
_OTHER_SPLITS = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("val", "valid")}


def read_yolo(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads a folder of images with YOLO's text files.

    Each image has a file of its name with one object in each line: "class x y width height", the
    center and sides of the box as parts of the image, 0 to 1, with classes from 0. A line
    "class x1 y1 x2 y2 x3 y3 ..." is a polygon; its bounding box is taken. An image without such a
    file, or with an empty one, has no objects. The format knows no difficult objects.

    Where the files are: `data.yaml` says so, if the folder has one ("train:", "val:", "test:" with
    folders or a text file of images); else "images/<split>" or "<split>/images". The text files
    are in the folder whose path has "labels" in place of the last "images", or beside the
    images. `image_id` is the path of the image in the folder.

    Dropped, clipped and reported as in `read_coco`. Boxes are those of the upright image.

    Args:
        folder: Folder of the dataset, or its `data.yaml`.
        split: "train", "val", "test" or another name. Default: all images.
        class_names: Names of the labels 0, 1, 2, ... Where the folder has names of its own, classes
            are mapped by name; else these are the names of the classes in the files. Default: the
            `names` of `data.yaml`, or the lines of `classes.txt`.
        on_error: What to do with an unreadable image or text file, a text file without a
            image, and a class without a name: "raise" a ValueError naming the file, or "skip" the
            image with a line in the report.
        use_difficult: Has no effect; it is here because all readers take the same arguments.

    Returns:
        `DetectionDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: No such folder or split, no images, no text file at all, no class names, or
            see `on_error`.

    Example:

    ```python
    train = read_yolo("data", "train")
    test = read_yolo("data", "val", class_names=train.class_names)
    print(test.report)
    ```
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
    annotations = [functools.partial(_annotation, source, path, names) for path in images]
    annotations += source.labels_without_image(images)
    return build_dataset(source.folder, annotations, class_names, use_difficult, faults)


def yolo_splits(folder: str | os.PathLike) -> list[str]:
    """Names of the splits that a folder or its `data.yaml` has."""
    return sorted(_YoloFolder(folder).splits())


class _YoloFolder:
    """Where the files of a YOLO dataset are."""

    def __init__(self, folder: str | os.PathLike):
        path = Path(folder)
        self.yaml_file: Path | None = None
        if path.is_file() and path.suffix.lower() in YAML_SUFFIXES:
            self.yaml_file, path = path, path.absolute().parent
        if not path.is_dir():
            raise ValueError(f"`folder` must be a folder. Received: {folder} (no such folder)")
        self.folder = path
        self.yaml_file = self.yaml_file or find_yaml(path)
        self.settings = read_yaml(self.yaml_file) if self.yaml_file else {}
        self.names = self._names()

    def images(self, split: str | None, faults: Faults) -> list[Path]:
        """Paths of the images of a split, or of all, each one once, in a fixed order."""
        splits = self.splits()
        if split is None:
            found = self._all_places()
        else:
            key = next((s for s in (split, *_OTHER_SPLITS.get(split, ())) if s in splits), None)
            if key is None:
                known = f"available: {', '.join(splits)}" if splits else "there are no splits"
                raise ValueError(
                    f"`split` must be one of those of {self.folder}. Received: {split!r}; {known}"
                )
            found = splits[key]
        images: dict[Path, None] = {}
        for place in found:
            images.update(dict.fromkeys(self._in_place(place, faults)))
        if not images:
            raise ValueError(f"No images in {', '.join(map(str, found))}")
        if not any(self.label_file(path).is_file() for path in images):
            raise ValueError(
                f"None of the {len(images)} images has a text file with its objects. Expected: "
                f"{self.label_file(next(iter(images)))}"
            )
        return list(images)

    def label_file(self, image: Path) -> Path:
        """The text file of an image: "labels" for the last "images" in its path, or beside it."""
        beside = image.with_suffix(".txt")
        parts = list(image.parts[:-1])
        if "images" not in parts:
            return beside
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
        file = Path(*parts, beside.name)
        return file if file.is_file() or not beside.is_file() else beside

    def labels_without_image(self, images: list[Path]) -> list:
        """For each text file in "labels" without an image: what tells this fault when called."""
        stems: dict[Path, set[str]] = collections.defaultdict(set)
        for folder in sorted({path.parent for path in images}):
            place = self.label_file(folder / "x").parent
            if "labels" in place.parts and place.is_dir():
                files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
                stems[place] |= {path.stem for path in files}

        def fault(path):
            raise FileError(path, "missing image", f"no image {path.stem}.*")

        return [
            functools.partial(fault, path)
            for place, own in stems.items()
            for path in sorted(place.glob("*.txt"))
            if path.stem not in own and path.name != "classes.txt"
        ]

    def image_id(self, image: Path) -> str:
        try:
            return image.relative_to(self.folder).as_posix()
        except ValueError:  # data.yaml may name places elsewhere
            return image.as_posix()

    def splits(self) -> dict[str, list[Path]]:
        """Folders and text files of images, by the names of the splits."""
        return self._named_places() or self._usual_places()

    def _all_places(self) -> list[Path]:
        named = [path for places in self._named_places().values() for path in places]
        images = [path for path in [self.folder / "images"] if path.is_dir()]
        return named or [*images, *sorted(self.folder.glob("*/images"))] or [self.folder]

    def _named_places(self) -> dict[str, list[Path]]:
        """Folders and text files of the splits, by data.yaml."""
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
        """Folders of the splits, by their names."""
        images = self.folder / "images"
        inner = sorted(p for p in images.iterdir() if p.is_dir()) if images.is_dir() else []
        splits = {path.name: [path] for path in inner}
        for path in sorted(self.folder.glob("*/images")):
            splits.setdefault(path.parent.name, []).append(path)
        return splits

    def _place(self, root: Path, text: str) -> Path | None:
        """A folder or text file named by data.yaml; it may be meant from another folder."""
        text = text.strip().replace("\\", "/")
        # Exported datasets say "../train/images" and mean "train/images".
        tried = [root / text, self.folder / text, self.folder / text.removeprefix("../")]
        return next((Path(os.path.normpath(path)) for path in tried if path.exists()), None)

    def _in_place(self, place: Path, faults: Faults) -> Iterator[Path]:
        if place.is_file():
            for line in read_text(place, "list of images").splitlines():
                image = None
                if line.strip():
                    with faults.skipping_image():
                        image = find_image(place.parent, line, place)
                if image is not None:
                    yield Path(os.path.normpath(image))
        elif place.is_dir():
            files = (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            yield from sorted(path for path in files if path.is_file())

    def _names(self) -> dict[int, str] | None:
        """Names of the classes by number, where the folder has them."""
        names = self.settings.get("names")
        if isinstance(names, list):
            names = dict(enumerate(names))
        if names is None:
            places = (self.folder, self.folder / "labels")
            lists = [place / "classes.txt" for place in places if (place / "classes.txt").is_file()]
            if not lists:
                return None
            lines = read_text(lists[0], "list of classes").splitlines()
            names = dict(enumerate(line for line in lines if line.strip()))
        if not isinstance(names, dict) or not names or not all(_is_class(key) for key in names):
            raise FileError(
                self.yaml_file or self.folder,
                "unreadable class names",
                f"expected `names: [cat, dog]` or `names: {{0: cat, 1: dog}}`, found {names!r}",
            )
        names = {int(key): str(name).strip() for key, name in names.items()}
        repeated = [n for n, count in collections.Counter(names.values()).items() if count > 1]
        if repeated:
            raise FileError(
                self.yaml_file or self.folder, "class name used twice", ", ".join(repeated)
            )
        return dict(sorted(names.items()))


def find_yaml(folder: Path) -> Path | None:
    """`data.yaml`, or the only YAML file of a folder; None where there is none of the kind."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in YAML_SUFFIXES)
    named = [path for path in files if path.stem.lower() in ("data", "dataset")]
    return (named or files)[0] if named or len(files) == 1 else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        FileError: It is not YAML, or no mapping.
    """
    import yaml

    try:
        settings = yaml.safe_load(read_text(path, "YAML file"))
    except yaml.YAMLError as error:
        raise FileError(path, "unreadable YAML file", str(error)) from error
    if not isinstance(settings, dict):
        raise FileError(
            path, "unreadable YAML file", f"expected names and values, found {settings!r}"
        )
    return settings


def _is_class(value: Any) -> bool:
    key = number(value)
    return key >= 0 and key.is_integer()


def _annotation(source: _YoloFolder, picture: Path, names: dict[int, str]) -> ImageAnnotation:
    file = source.label_file(picture)
    lines = read_text(file, "text file").splitlines() if file.is_file() else []
    return ImageAnnotation(
        file=file,
        image_id=source.image_id(picture),
        image=picture,
        objects=tuple(
            _object(file, number_of_line, line.split(), names)
            for number_of_line, line in enumerate(lines, start=1)
            if line.strip()
        ),
        is_relative=True,
    )


def _object(file: Path, line: int, cells: list[str], names: dict[int, str]) -> AnnotatedObject:
    is_polygon = len(cells) >= 7 and len(cells) % 2 == 1
    if len(cells) != 5 and not is_polygon:
        detail = f"line {line} has {len(cells)} numbers, not 5 (or a polygon's 7, 9, ...)"
        raise FileError(file, "unreadable line", detail)
    if not _is_class(cells[0]):
        raise FileError(file, "unreadable line", f"line {line} begins with {cells[0]!r}")
    name = names.get(int(number(cells[0])))
    if name is None:
        detail = f"class {cells[0]} in line {line}. Known: " + ", ".join(
            f"{key} ({known})" for key, known in list(names.items())[:20]
        )
        raise FileError(file, "class without a name", detail)
    values = np.asarray([number(cell) for cell in cells[1:]])
    if np.nanmax(np.abs(values), initial=0.0) > 2 and np.isfinite(values).all():
        detail = f"line {line} has pixels, not parts of the image: {' '.join(cells[1:])}"
        raise FileError(file, "coordinates above 1", detail)
    if is_polygon:
        points = values.reshape(-1, 2)
        box = (*points.min(axis=0), *points.max(axis=0))  # NaN of a point stays NaN
    else:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    text = f"[{' '.join(cells[1:5])}{' ...' * is_polygon}] in line {line}"
    return AnnotatedObject(name=name, box=tuple(float(v) for v in box), text=text)
