"""Reader of YOLO's text files."""

import collections
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnest.checks import check_class_names, checked
from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers import common, files
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation
from keras_resnest.images import IMAGE_SUFFIXES

YAML_SUFFIXES = (".yaml", ".yml")
SETTINGS_SUFFIXES = (*YAML_SUFFIXES, ".data")  # obj.data: "train = data/train.txt"
_SPLITS = ("train", "val", "valid", "test")
_CLASS_LISTS = ("classes.txt", "_darknet.labels")  # and *.names
_MAX_YAML = 1 << 20  # bytes; the parser takes seconds per megabyte


@checked
def read_yolo(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: common.OnError = "raise",
    use_difficult: bool = True,
    unannotated: common.Unannotated = "background",
    allow_outside: bool = False,
) -> DetectionDataset:
    """Reads a folder of images with YOLO's text files.

    The text file of an image has one object per line: "class x y width height", with classes from
    0 and the center and sides of the box as fractions of the image; or a polygon,
    "class x1 y1 x2 y2 x3 y3 ...", read as its bounding box. Keypoints (`kpt_shape` in `data.yaml`),
    a confidence and a track id behind a box are not read. An image whose text file is empty has no
    objects.

    `data.yaml` or `obj.data`, if present, names the images ("train:", "val:", "test:": folders, or
    a text file that lists images); otherwise they are in "images/<split>", "<split>/images",
    "<split>" or the folder itself, and lists "<split>.txt" in the folder are splits. Stated paths
    are first looked for in the folder of the dataset, all of them, also if they were written for
    another place. Text files are in the folder with "labels" in place of the last "images", or
    beside the images. `image_id` is the path of the image in the folder.

    Boxes belong to the upright image. They are dropped, clipped and reported as in `read_coco`.

    Args:
        folder: Folder of the dataset, or its `data.yaml`.
        split: "train", "val", "test" or another name. Default: all images, without splits that
            have no text file at all, which the report lists.
        class_names: Names of the labels 0, 1, 2, ... Classes are matched by name if the folder has
            class names. Default: `names` in `data.yaml`, or the lines of `classes.txt`,
            `obj.names` or the like, or `_darknet.labels`.
        on_error: "raise" a ValueError for an unreadable image or text file, a text file without
            image, a class without a name, or a stated folder that does not exist; or "skip" it and
            report it.
        use_difficult: No effect: the format has no difficult objects.
        unannotated: Images without text file: an "error" (see `on_error`), "skip" and report them,
            or "background": they have no objects.
        allow_outside: Whether `data.yaml` and lists may name files outside of the dataset.

    Raises:
        ValueError: if there is no such folder or split, there are no images, text files, usable
            boxes or class names, or see `on_error`.

    Example: `test = read_yolo("data", "val", class_names=train.class_names)`
    """
    faults = Faults(on_error, unannotated)
    source = _YoloFolder(folder, allow_outside)
    names, keypoints = source.class_names(), source.keypoints()
    places = source.places(split, faults)
    images = source.images(places, faults)
    if split is None:
        images = source.without_unlabeled_splits(images, faults)
    if names is None:
        if class_names is None:
            raise ValueError(
                f"{source.folder} has no class names (`names:` in data.yaml, or classes.txt): give "
                "`class_names`"
            )
        names = dict(enumerate(check_class_names(class_names)))
    if class_names is None:
        class_names = list(dict.fromkeys(names.values()))

    uses = collections.Counter(map(source.label_file, images))

    def parse(path):
        if path.suffix.lower() == ".txt":
            raise FileError(path, "missing image", f"no image {path.stem}.*")
        file = source.label_file(path)
        if file and uses[file] > 1:
            raise FileError(file, "text file of several images", f"also of {path.name}")
        lines = files.read_text(file, "text file").splitlines() if file else []
        rows = [(i, line.split()) for i, line in enumerate(lines, start=1) if line.strip()]
        objects = tuple(_object(file, i, cells, names, keypoints) for i, cells in rows)
        if more := [i for i, cells in rows if keypoints is None and _has_box_and_more(cells)]:
            faults.add(
                file, "numbers behind the box", "left out", f"in {len(more)} of {len(rows)} lines"
            )
        missing = "" if file else "missing text file"
        image_id = source.image_id(path)
        return ImageAnnotation(
            file or path, image_id, path, objects, is_relative=True, missing=missing
        )

    paths = [*images, *source.labels_without_image(places, images)]
    return common.build_dataset(
        source.folder, paths, parse, class_names, use_difficult, faults, source.folder
    )


def yolo_splits(source: str | os.PathLike, empty: bool = False) -> list[str] | None:
    """Names of the splits with objects, or also of those with empty text files only (`empty`).

    None if a folder or `data.yaml` is no YOLO dataset.
    """
    folder = _YoloFolder(source)
    wanted = folder.is_labeled if empty else folder.has_objects
    return sorted(filter(wanted, folder.splits())) if folder.is_yolo() else None


# === Files ===


class _YoloFolder:
    """The files of a YOLO dataset."""

    def __init__(self, source: str | os.PathLike, allow_outside: bool = False):
        path = Path(source)
        is_file = path.exists() and not path.is_dir()
        self.folder = files.check_folder(path.parent if is_file else path, "folder")
        self.tree = files.FileTree(self.folder, allow_outside=allow_outside)
        self.file = path if is_file else next(iter(_settings(self.folder)), None)
        self.settings = read_settings(self.file) if self.file else {}
        self._label_folders: dict[Path, Path | None] = {}
        self._stated = self._find_stated()

    def is_yolo(self) -> bool:
        """Whether there are settings, or an image with a text file."""
        if self.file is not None:
            return True
        for folder in (self.folder, *self._inner_folders()):
            images, labels = (self.tree.child(folder, name) for name in ("images", "labels"))
            inner = [labels, *files.folders_in(labels)] if images and labels else ()
            if any(next(files.walk(path, (".txt",)), None) for path in inner):
                return True
            texts = files.entries(folder, (".txt",))
            if any(self.tree.named(folder, text.stem, IMAGE_SUFFIXES) for text in texts):
                return True
        return False

    def splits(self) -> list[str]:
        """Names of the splits, from the settings or the usual layout, that have a place."""
        stated = [split for split, found in self._stated.items() if any(p for _, p in found)]
        return stated if self._stated else list(filter(None, self._usual_places()))

    def places(self, split: str | None, faults: Faults) -> list[Path]:
        """Folders and lists of the images of a split, or of all images."""
        if not self._stated:
            usual = self._usual_places()
            return usual[split and self._known_split(split, self.splits())]
        wanted = list(self._stated) if split is None else [self._known_split(split, self._stated)]
        found = []
        is_elsewhere = not self.splits()
        for key, places in self._stated.items():
            for text, path in places:
                if path is not None:
                    found += [path] * (key in wanted)
                    continue
                hint = self.tree.hint(self.folder / self._base(), text) if is_elsewhere else ""
                detail = f"{key}: {text!r} is not in {self.folder}{hint}"
                if key not in wanted:
                    faults.add(self.file, "missing images", "split left out", detail)
                    continue
                with faults.skipping_image():
                    raise FileError(self.file, "missing images", detail)
        return found

    def images(self, places: list[Path], faults: Faults) -> list[Path]:
        """Unique paths of the images in a fixed order."""
        images = list(dict.fromkeys(p for place in places for p in self._images_in(place, faults)))
        if not images:
            reasons = "".join(f". {problem.detail}" for problem in faults.problems[:1])
            raise ValueError(f"No images in {', '.join(map(str, places)) or self.folder}{reasons}")
        if not any(self.label_file(path) for path in images):
            base, inner = _split_at_images(images[0].parent)
            place = base if inner is None else Path(base, "labels", *inner)
            expected = place / f"{images[0].stem}.txt"
            raise ValueError(f"None of the {len(images)} images has a text file like {expected}")
        return images

    def has_objects(self, split: str) -> bool:
        """Whether any image of a split has an object, or is missing: not if none is annotated."""
        faults = Faults("skip")
        label_files = filter(None, map(self.label_file, self._images_of(split, faults)))
        return any(files.read_start(f, 1000).strip() for f in label_files) or bool(faults.problems)

    def is_labeled(self, split: str) -> bool:
        """Whether any image of a split has a text file."""
        return any(map(self.label_file, self._images_of(split, Faults("skip"))))

    def without_unlabeled_splits(self, images: list[Path], faults: Faults) -> list[Path]:
        """Leaves out the images of splits that are not annotated: they are not background."""
        for split in filter(files.is_split_name, self.splits()):
            if self.is_labeled(split):
                continue
            if own := set(self._images_of(split, Faults("skip"))):
                faults.add(split, "split without text files", "left out")
                images = [path for path in images if path not in own]
        return images

    def _images_of(self, split: str | None, faults: Faults) -> Iterator[Path]:
        for place in self.places(split, faults):
            yield from self._images_in(place, faults)

    def label_file(self, image: Path) -> Path | None:
        """Text file of an image: in "labels" instead of the last "images", or beside it."""
        folders = filter(None, (self._label_folder(image.parent), image.parent))
        names = f"{image.stem}.txt", f"{image.name}.txt"
        found = (self.tree.child(folder, name) for folder in folders for name in names)
        return next(filter(None, found), None)

    def labels_without_image(self, places: list[Path], images: list[Path]) -> list[Path]:
        """Text files of rows that belong to no image."""
        folders = {path for path in places if path.is_dir()}
        if len(folders) < len(places):  # lists
            folders |= {path.parent for path in images}
        used = set(map(self.label_file, images))
        lost: dict[Path, None] = {}
        for folder in sorted(folders):
            labels = self._label_folder(folder)
            for file in files.walk(labels or folder, (".txt",)):
                beside = folder / file.parent.relative_to(labels or folder)
                if file in used or not _starts_with_row(file):
                    continue
                owners = self.tree.named(beside, file.stem, IMAGE_SUFFIXES)
                if not any(self.label_file(beside / name) == file for name in owners):
                    lost[file] = None
        return list(lost)

    def image_id(self, image: Path) -> str:
        is_inside = image.is_relative_to(self.folder)
        return (image.relative_to(self.folder) if is_inside else image).as_posix()

    def keypoints(self) -> int | None:
        """How many numbers of keypoints follow a box; None if no `kpt_shape` is stated."""
        shape = self.settings.get("kpt_shape")
        if shape in (None, "", "~", "null"):
            return None
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_class, shape)):
            raise FileError(self.file, "unreadable kpt_shape", "expected `kpt_shape: [17, 3]`")
        return int(shape[0]) * int(shape[1])

    def class_names(self) -> dict[int, str] | None:
        """Class names by number; None if the folder has none."""
        names, where = self.settings.get("names"), self.file
        if names is None or isinstance(names, str):
            lists = self._class_lists(names)
            if not lists:
                return None
            where, names = lists[0], self.tree.read_lines(lists[0], "list of classes", True)
            names = {i: name for i, name in enumerate(names) if name}  # an empty line has a number
        if isinstance(names, list):
            names = dict(enumerate(names))
        is_valid = isinstance(names, dict) and names and all(map(_is_class, names))
        if not is_valid or not all(isinstance(name, str) for name in names.values()):
            detail = "expected `names: [cat, dog]` or `names: {0: cat, 1: dog}`"
            raise FileError(where, "unreadable class names", detail)
        names = {int(common.number(key)): name.strip() for key, name in names.items()}
        repeated = [n for n, count in collections.Counter(names.values()).items() if count > 1]
        if repeated:
            raise FileError(where, "class name used twice", ", ".join(repeated))
        return dict(sorted(names.items()))

    def _class_lists(self, stated: str | None) -> list[Path]:
        """The stated list of classes, or that of the dataset, or those of its splits."""
        if stated:
            if path := self.tree.find(self.folder, stated):
                return [path]
            detail = f"expected a list, or the file of a list; there is no {stated!r}"
            raise FileError(self.file, "unreadable class names", detail)
        own = [self.folder, self.folder / "labels"]
        inner = [path for folder in own if folder.is_dir() for path in files.folders_in(folder)]
        found = []
        for folder in (*own, *inner, *(path / "labels" for path in inner)):
            found += filter(None, (self.tree.child(folder, name) for name in _CLASS_LISTS))
            found += files.entries(folder, (".names",)) if folder.is_dir() else ()
            if found and folder in own:
                break
        if len({tuple(self.tree.read_lines(path, "list of classes")) for path in found}) > 1:
            detail = ", ".join(map(str, found))
            raise FileError(self.folder, "different lists of classes", detail)
        return found

    def _known_split(self, split: str, known) -> str:
        key = files.find_split(split, known)
        if key is None:
            available = f"available: {', '.join(known)}" if known else "there are no splits"
            raise ValueError(f"`split` must be in {self.folder}. Received: {split!r}; {available}")
        return key

    def _usual_places(self) -> dict[str | None, list[Path]]:
        """Folders and lists of images by split; None has all images."""
        places = self._usual_folders()
        base = places.pop("", [])
        inner = (path for paths in places.values() for path in paths)
        images = base + [path for path in inner if not base or path.is_symlink()]  # see `walk`
        lists = files.split_lists(self.folder, self.tree).items()
        named = {}
        for name, path in lists:
            has_image = self.tree.named(path.parent, path.stem, IMAGE_SUFFIXES)
            if not has_image and not _starts_with_row(path):  # no label file
                named[name] = [path]
        if named:  # folders may have another meaning
            places = {name: paths for name, paths in places.items() if files.is_split_name(name)}
        return {None: images, **places, **named}

    def _usual_folders(self) -> dict[str, list[Path]]:
        """Folders of images by split; "" has those of all splits, if there are more."""
        images = self.tree.child(self.folder, "images")
        if images is not None and images.is_dir():
            return {"": [images], **{path.name: [path] for path in files.folders_in(images)}}
        inner = self._inner_folders()
        pairs = [(path.name, self.tree.child(path, "images")) for path in inner]
        if found := {name: [path] for name, path in pairs if path and path.is_dir()}:
            return found
        named = {path.name: [path] for path in inner if files.is_split_name(path.name)}
        others = (path for path in files.folders_in(self.folder) if path not in inner)
        is_mixed = any(next(files.walk(path, IMAGE_SUFFIXES), None) for path in others)
        return named if is_mixed else {"": [self.folder], **named}

    def _inner_folders(self) -> list[Path]:
        """Folders in the folder, without those of other datasets."""
        return [path for path in files.folders_in(self.folder) if not _settings(path, named=True)]

    def _find_stated(self) -> dict[str, list[tuple[str, Path | None]]]:
        """Stated folders and lists by split: all in the dataset, or else all at another place."""
        stated = {split: self._texts(split) for split in _SPLITS}
        found = {}
        for look in (self._inside, self._beside, self._outside):
            found = {
                s: [(text, look(text)) for text in texts] for s, texts in stated.items() if texts
            }
            if any(path for pairs in found.values() for _, path in pairs):
                break
        return found

    def _texts(self, key: str) -> list[str]:
        """The paths in a setting."""
        value = self.settings.get(key) or []
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError(self.file, f"unreadable setting {key!r}", "expected a path or paths")
        return [text for text in texts if text.strip().lower() not in ("", "~", "null")]

    def _inside(self, text: str) -> Path | None:
        tree = files.FileTree(self.folder)
        base = self._base()
        if base and (path := tree.find(self.folder, os.path.join(base, text), shortest=None)):
            return path
        # In exported datasets, "../train/images" means "train/images".
        names = [name for name in re.split(r"[\\/]", text) if name not in ("", ".", "..")]
        path = tree.find(self.folder, text, shortest=min(2, len(names)))
        list_file = tree.find(self.folder, text)
        return path or (list_file if list_file and list_file.is_file() else None)

    def _beside(self, text: str) -> Path | None:
        """A folder beside that of the settings, as in "config/data.yaml"."""
        path = Path(os.path.normpath(self.folder / self._base() / text.replace("\\", "/")))
        above = self.folder.parent
        is_stated = not os.path.isabs(text) and not os.path.isabs(self._base())
        is_near = above.parent != above != path and path.is_relative_to(above)
        return path if is_stated and is_near and os.path.isdir(path) else None

    def _outside(self, text: str) -> Path | None:
        path = Path(os.path.normpath(self.folder / self._base() / text))
        return path if self.tree.allow_outside and os.path.exists(path) else None

    def _base(self) -> str:
        return next(iter(self._texts("path")), "")

    def _label_folder(self, folder: Path) -> Path | None:
        if folder not in self._label_folders:
            base, inner = _split_at_images(folder)
            found = None if inner is None else self.tree.descend(base, ["labels", *inner])
            self._label_folders[folder] = found
        return self._label_folders[folder]

    def _images_in(self, place: Path, faults: Faults) -> Iterator[Path]:
        """Images in a folder and its subfolders, or in a text file that lists them."""
        if place.is_dir():
            yield from files.walk(place, IMAGE_SUFFIXES)
            return
        images = self.tree.child(self.folder, "images") or self.folder
        for line in self.tree.read_lines(place, "list of images"):
            image = None
            with faults.skipping_image():
                found = (self.tree.find(f, line, IMAGE_SUFFIXES) for f in (place.parent, images))
                image = next(filter(None, found), None)
                image = image or self.tree.image(self.folder, line, place)
            if image is not None:
                yield image


def _split_at_images(folder: Path) -> tuple[Path, tuple[str, ...] | None]:
    """The path before the last "images" and the names behind it; None if there is none."""
    parts = folder.parts
    last = max((i for i, part in enumerate(parts) if files.unified(part) == "images"), default=None)
    return (folder, None) if last is None else (Path(*parts[:last]), parts[last + 1 :])


def _settings(folder: Path, named: bool = False) -> list[Path]:
    """`data.yaml` or the like, or else, unless `named`, the only file that could be such."""
    found = files.entries(folder, SETTINGS_SUFFIXES)
    usual = [p for p in found if p.stem.lower() in ("data", "dataset", "obj")]
    if usual or named:
        return usual
    found = [path for path in found if _states_dataset(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has several datasets: give one of {names} instead")
    return found


def _states_dataset(path: Path) -> bool:
    try:
        settings = read_settings(path)
    except FileError:
        return False
    places = (settings.get(split) for split in _SPLITS)
    return "names" in settings or any(isinstance(place, str | list) for place in places)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML or .data file, of texts; raises `FileError`."""
    import yaml

    text = files.read_text(path, "YAML file", _MAX_YAML)
    if path.suffix.lower() not in YAML_SUFFIXES:
        pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
        return {key.strip(): value.strip() for key, _, value in pairs}

    class Loader(yaml.BaseLoader):  # creates only texts, lists and dictionaries
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := [key for key, count in collections.Counter(keys).items() if count > 1]:
                mark = node.start_mark
                raise yaml.MarkedYAMLError(problem=f"{repeated[0]!r} twice", problem_mark=mark)
            return super().construct_mapping(node, deep)

    try:
        settings = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        detail = getattr(error, "problem", None) or type(error).__name__
        where = f" in line {mark.line + 1}" if mark else ""
        raise FileError(path, "unreadable YAML file", f"{detail}{where}") from None
    if not isinstance(settings, dict):
        found = type(settings).__name__
        raise FileError(path, "unreadable YAML file", f"expected a mapping, found a {found}")
    return settings


# === Lines ===


def _is_class(value: Any) -> bool:
    return common.number(value) >= 0 and common.number(value).is_integer()


def _starts_with_row(file: Path) -> bool:
    """Whether a text file is not something else, such as a list of classes or images."""
    if file.name in _CLASS_LISTS:
        return False
    cells = files.read_start(file, 1000).partition(b"\n")[0].split()
    return not cells or (len(cells) >= 5 and all(common.number(c) < np.inf for c in cells[:5]))


def _has_box_and_more(cells: list[str]) -> bool:
    """Whether a confidence, a track id or both follow the box, as no polygon has these numbers."""
    is_counted = len(cells) == 7 and cells[6].isdecimal() and int(cells[6]) > 1
    return len(cells) == 6 or is_counted


def _object(
    file: Path, line: int, cells: list[str], names: dict[int, str], keypoints: int | None
) -> AnnotatedObject:
    is_box = len(cells) == 5 or _has_box_and_more(cells)
    is_polygon = not is_box and len(cells) >= 7 and len(cells) % 2 == 1
    detail = f"line {line} has {len(cells)} numbers, not 5 (or a polygon's 7, 9, ...)"
    if keypoints is not None:
        is_box, is_polygon = len(cells) in (5, 5 + keypoints), False
        detail = f"line {line} has {len(cells)} numbers, not 5 or {5 + keypoints} as in `kpt_shape`"
    elif len(cells) == 7 and cells[6] in ("0", "1"):
        is_polygon = False
        detail = f"line {line} could be a triangle, or a box with confidence and track id"
    if not (is_box or is_polygon):
        raise FileError(file, "unreadable line", detail)
    if not _is_class(cells[0]):
        raise FileError(file, "unreadable line", f"line {line} begins with {cells[0]!r}")
    name = names.get(int(common.number(cells[0])))
    if name is None:
        detail = f"class {cells[0]} in line {line}. {common.known_classes(names)}"
        raise FileError(file, "class without a name", detail)
    values = np.asarray([common.number(cell) for cell in cells[1 : None if is_polygon else 5]])
    if np.isfinite(values).all() and np.abs(values).max() >= 2:
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
