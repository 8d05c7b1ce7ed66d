"""One reader for all formats: detects the format and calls its reader."""

import contextlib
import os
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from keras_resnest.checks import checked
from keras_resnest.data.dataset import DetectionDataset, Problem
from keras_resnest.data.readers.coco import coco_files, coco_has_objects, read_coco
from keras_resnest.data.readers.common import OnError, Unannotated
from keras_resnest.data.readers.csv import csv_files, csv_has_objects, read_csv
from keras_resnest.data.readers.files import (
    entries,
    find_split,
    folders_in,
    is_split_name,
)
from keras_resnest.data.readers.tfds import read_tfds, tfds_splits
from keras_resnest.data.readers.voc import read_voc, voc_splits
from keras_resnest.data.readers.yolo import SETTINGS_SUFFIXES, read_yolo, yolo_splits

# Name of a format: (the splits of a folder, or None if it has another layout; the reader). The
# splits of COCO and CSV are in files, which their readers take.
_FORMATS = {
    "voc": (voc_splits, read_voc),
    "coco": (coco_files, read_coco),
    "yolo": (yolo_splits, read_yolo),
    "csv": (csv_files, read_csv),
}
_HAS_OBJECTS = {"coco": coco_has_objects, "csv": csv_has_objects}
FORMATS = tuple(_FORMATS)
_SUFFIXES = {".json": "coco", ".csv": "csv", **dict.fromkeys(SETTINGS_SUFFIXES, "yolo")}
_EXPECTED = """
  VOC:  a folder with Annotations/*.xml and JPEGImages/ or images/, or with images and XML files
        side by side, also in <split>/
  COCO: a .json file, or a folder with annotations/instances_<split>.json or
        <split>/_annotations.coco.json
  YOLO: a folder with data.yaml or obj.data, or with images/ and labels/, <split>/images and
        <split>/labels, or images and text files side by side
  CSV:  a .csv file, or a folder with <split>.csv, of rows image,x1,y1,x2,y2,label
  TFDS: "tfds:NAME", such as "tfds:voc/2007" """

DEFAULT_SPLIT = "default"  # CVAT's name of images in no split
VALIDATION_SPLITS = ("val", "valid", "validation")  # first choice first
TEST_SPLITS = ("test", *VALIDATION_SPLITS)


@checked
def read_detection(
    source: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    on_error: OnError = "raise",
    use_difficult: bool = True,
    format: str | None = None,
    unannotated: Unannotated | None = None,
    allow_outside: bool = False,
) -> DetectionDataset:
    """Reads annotated images in any known format: VOC, COCO, YOLO, CSV or TFDS.

    Args:
        source: Folder or file, or "tfds:" and a name of TensorFlow Datasets. See `read_voc`,
            `read_coco`, `read_yolo`, `read_csv` and `read_tfds` for what they read and report.
        split: Name of a file in `ImageSets/Main` (VOC), `<split>` in `instances_<split>.json` or
            `<split>.csv` (a year after it may be omitted), a value in a CSV file's column of
            splits or in COCO's entries of images, a folder or a list (YOLO, VOC), or a TFDS split
            (then required). Default: all images, or the only file.
        class_names: Names of the labels 0, 1, 2, ... Default: as in the dataset.
        image_folder: Folder of the images of a COCO or CSV file. Default: see their readers.
        on_error: "raise" a ValueError for a faulty image, or "skip" and report it; unused by TFDS.
        use_difficult: Whether to keep objects marked as difficult.
        format: "voc", "coco", "yolo" or "csv". Default: recognized.
        unannotated: Images without annotation: an "error" (the default for VOC), "skip" and report
            them, or "background" (the default for the others): they have no objects. Not for TFDS.
        allow_outside: Whether files may name files outside of the dataset.

    Raises:
        ValueError: if no format or several are recognized, or see the reader.

    Example:
    ```python
    train = read_detection("my_folder", "train")
    test = read_detection("my_folder", "test", class_names=train.class_names)
    ```
    """
    options: dict[str, Any] = {"class_names": class_names, "use_difficult": use_difficult}
    if (name := _tfds_name(source)) is not None:
        if split is None:
            raise ValueError('TFDS needs a `split`, such as "train". Received: split=None')
        if format is not None or unannotated is not None:
            raise ValueError("`format` and `unannotated` are for files, not for TFDS")
        return read_tfds(name, split, **options)
    options |= {"on_error": on_error, "allow_outside": allow_outside}
    if unannotated is not None:
        options["unannotated"] = unannotated
    path, kind = Path(source), _format_of(source, format)
    splits_of, read = _FORMATS[kind]
    if kind not in ("coco", "csv"):
        if image_folder is not None:
            raise ValueError(
                f"`image_folder` is for COCO and CSV files; {path} looks like {kind.upper()}. "
                f"Received: image_folder={image_folder!r}"
            )
        return read(path, split, **options)
    file = _file_of_split(path, splits_of(path), split, kind) if path.is_dir() else path
    named = splits_of(file) if split is not None else {}  # in the file
    matches = _matching_splits(split, named) if named else []
    if named and (matches or not path.is_dir()):
        options["split"] = matches[0] if len(matches) == 1 else split
    elif split is not None and not path.is_dir():
        raise ValueError(
            f"A single {kind.upper()} file has no splits: omit `split`, and split the dataset with "
            f"`hold_out`. Received: split={split!r}, {path}"
        )
    return read(file, image_folder, **options)


@checked
def read_train_test(
    source: str | os.PathLike,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    holdout: float = 0.2,
    seed: int = 0,
    **options,
) -> tuple[DetectionDataset, DetectionDataset]:
    """Reads a training set and a test set with the same class names.

    A dataset without splits is split at random.

    Args:
        source: As in `read_detection`.
        train_split: Default: "train".
        test_split: Default: the first of "test", "val", "valid" and "validation" that has
            annotations. A year may follow the name, as in "val2017".
        holdout: Fraction of the images to hold out for testing, if the dataset has no splits.
        seed: Seed of the random split.
        **options: Arguments of `read_detection`: `on_error`, `format`, ...

    Raises:
        ValueError: if `holdout` is not above 0 and below 1, or as in `read_detection`.

    Example: `train, test = read_train_test("my_folder")`
    """
    if not 0 < holdout < 1:
        raise ValueError(f"`holdout` must be above 0 and below 1. Received: holdout={holdout}")
    if _tfds_name(source) is None:
        splits = find_splits(source, options.get("format"))
        if len(splits) < 2 and not (train_split or test_split):
            whole = read_detection(source, first_split(("train",), splits), **options)
            return _checked(source, *whole.hold_out(holdout, seed))
        train_split = train_split or first_split(("train",), splits)
        test_split = test_split or first_split(TEST_SPLITS, splits)
    train = read_detection(source, train_split or "train", **options)
    if _tfds_name(source) is not None and test_split is None:  # reading has prepared it
        test_split = first_split(TEST_SPLITS, find_splits(source))
    names = {"class_names": train.class_names}
    test = read_detection(source, test_split or "test", **{**options, **names})
    return (train, test) if _tfds_name(source) else _checked(source, train, test)


def _checked(source, train: DetectionDataset, test: DetectionDataset, role="test") -> tuple:
    if not train.report.num_boxes:
        raise ValueError(f"No box to train on in the {len(train)} training images of {source}")
    if shared := _shared_images(train, test):
        what = "image of the training set"
        test.report.problems += [Problem(Path(p).name, what, "kept") for p in sorted(shared)]
        text = f"{source}: {len(shared)} {role} images are also training images"
        warnings.warn(text, stacklevel=4)
    return train, test


def _shared_images(one: DetectionDataset, other: DetectionDataset) -> set:
    return {r.image for r in one.records} & {r.image for r in other.records}


@checked
def read_splits(
    source: str | os.PathLike,
    *,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_holdout: float = 0.1,
    seed: int = 0,
    **options,
) -> tuple[DetectionDataset, DetectionDataset, DetectionDataset]:
    """Reads a training set, a validation set to choose a model by, and a test set.

    The validation set is a split of its own, or held out of the training set. It never is the test
    set: figures of images that a model was chosen by are too high.

    Args:
        source: As in `read_detection`.
        train_split: As in `read_train_test`.
        validation_split: Default: the first of "val", "valid" and "validation" that has
            annotations, is not the test split and shares no image with the training split. If
            there is none, images are held out of the training split.
        test_split: As in `read_train_test`.
        validation_holdout: Fraction of the training images to hold out, if there is no such split.
        seed: Seed of all random splits.
        **options: Arguments of `read_detection`: `on_error`, `format`, ...

    Raises:
        ValueError: as in `read_train_test`, or if the validation set has no box.

    Example: `train, validation, test = read_splits("my_folder")`
    """
    given = {"train_split": train_split, "test_split": test_split}
    train, test = read_train_test(source, **given, seed=seed, **options)
    options |= {"class_names": train.class_names}
    if validation_split is not None:
        validation = read_detection(source, validation_split, **options)
        if _tfds_name(source) is None:
            _checked(source, train, validation, "validation")
            if shared := _shared_images(test, validation):
                text = f"{source}: {len(shared)} test images are also validation images"
                warnings.warn(text, stacklevel=2)
    else:
        validation = _unused_split(source, train, train_split or "train", test_split, options)
    if validation is None:
        # At least one image, however few there are.
        fraction = min(0.5, max(validation_holdout, 1.0 / len(train)))
        if _tfds_name(source) is None:
            train, validation = train.hold_out(fraction, seed)
        else:
            train, validation = _halves(source, train_split or "train", fraction, options)
    if not validation.report.num_boxes:
        raise ValueError(
            f"No box to choose a model by in the {len(validation)} validation images of {source}: "
            "choose another `validation_split` or `seed`"
        )
    return train, validation, test


def _unused_split(source, train, train_split: str, test_split: str | None, options: dict):
    """The validation set that is neither tested nor trained on, or None."""
    splits = find_splits(source, options.get("format"))
    used = [first_split((test_split,) if test_split else TEST_SPLITS, splits)]
    used += [first_split((part,), splits) for part in re.split(r"[+\[]", train_split)]
    name = first_split(VALIDATION_SPLITS, [split for split in splits if split not in used])
    if name is None or len(splits) < 2:
        return None
    validation = read_detection(source, name, **options)
    is_tfds = _tfds_name(source) is not None
    return None if not is_tfds and _shared_images(train, validation) else validation


def _halves(source, split: str, fraction: float, options: dict) -> tuple:
    """The beginning and the end of a TFDS split."""
    if "[" in split:
        raise ValueError(
            "TFDS: a slice of a split needs a `validation_split`, such as another slice. "
            f"Received: train_split={split!r}"
        )
    cut = round(100 * (1 - fraction))
    ranges = f"[:{cut}%]", f"[{cut}%:]"
    slices = ("+".join(name + part for name in split.split("+")) for part in ranges)
    return tuple(read_detection(source, part, **options) for part in slices)


@checked
def read_all_splits(source: str | os.PathLike, **options) -> dict[str, DetectionDataset]:
    """Reads all images of a dataset, by split.

    Args:
        source: As in `read_detection`.
        **options: Arguments of `read_detection`: `on_error`, `format`, ...

    Returns:
        The splits, also those without objects, all with the same class names. "default" has the
        images that are in no split. Lists that only repeat images of "train", "val" and "test",
        such as VOC's "trainval" and "cat_train", are left out, and of the folders in YOLO's
        `images`, only those with usual names are splits.

    Raises:
        ValueError: as in `read_detection`.

    Example: `write_detection(read_all_splits("my_folder"), "for_yolo", "yolo")`
    """
    format, is_tfds = options.get("format"), _tfds_name(source) is not None
    names = find_splits(source, format, empty=True)
    found = None if is_tfds else _FORMATS[_format_of(source, format)][0](Path(source))
    has_several_files = isinstance(found, dict) and len(set(found.values())) > 1
    if is_tfds or has_several_files:
        parts = {name: read_detection(source, name, **options) for name in names}
        own = [part.class_names for part in parts.values()]
        options["class_names"] = list(dict.fromkeys(name for names in own for name in names))
        if all(names == options["class_names"] for names in own):
            return parts
        return {name: read_detection(source, name, **options) for name in names}
    whole = read_detection(source, **options)
    options["class_names"] = whole.class_names
    if _format_of(source, format) == "yolo":  # other folders in "images" have another meaning
        names = list(filter(is_split_name, names))
    parts = {name: read_detection(source, name, **options) for name in names}
    images = {name: {r.image for r in part.records} for name, part in parts.items()}
    usual = set().union(*(images[name] for name in filter(is_split_name, names)))
    parts = {k: part for k, part in parts.items() if is_split_name(k) or not images[k] <= usual}
    used = set().union(*images.values())
    if unused := [record for record in whole.records if record.image not in used]:
        listed = parts[DEFAULT_SPLIT].records if DEFAULT_SPLIT in parts else []
        parts[DEFAULT_SPLIT] = whole.with_records(listed + unused)
    return parts


@checked
def find_splits(
    source: str | os.PathLike, format: str | None = None, empty: bool = False
) -> list[str]:
    """Returns the sorted names of the splits that have annotations, if any.

    Args:
        source: As in `read_detection`.
        format: As in `read_detection`.
        empty: Whether splits whose images have no objects count as annotated.

    Raises:
        ValueError: if the format is not recognized, or if a TFDS dataset is not on disk or not for
            detection.

    Example: `find_splits("tfds:voc/2007")` returns `["test", "train", "validation"]`.
    """
    if (name := _tfds_name(source)) is not None:
        return tfds_splits(name)
    kind = _format_of(source, format)
    has_objects = _HAS_OBJECTS.get(kind)
    if has_objects is None:
        return _FORMATS[kind][0](Path(source), empty) or []
    found = _FORMATS[kind][0](Path(source)) or {}
    if not empty:
        found = [split for split, file in found.items() if has_objects(file, split)]
    return sorted(found)


# === Formats ===


def _tfds_name(source: str | os.PathLike) -> str | None:
    """The name after "tfds:"; None for a path."""
    is_name = isinstance(source, str) and source.startswith("tfds:")
    return source.removeprefix("tfds:") if is_name else None


def _format_of(source: str | os.PathLike, given: str | None) -> str:
    """The format of a file or folder, as given or recognized."""
    if given is not None and given not in _FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}. Received: {given!r}")
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder. Expected:{_EXPECTED}")
    if given is not None:
        return given
    if not path.is_dir():
        if kind := _SUFFIXES.get(path.suffix.lower()):
            return kind
        raise ValueError(f"{path} is not a file of a known format. Expected:{_EXPECTED}")
    kinds = _kinds(path)
    if not kinds:
        hint = _hint(path)
        raise ValueError(f"{path} is not a folder of a known format. {hint}Expected:{_EXPECTED}")
    if len(kinds) > 1:
        found = " and ".join(kind.upper() for kind in kinds)
        formats = " or ".join(f'format="{kind}"' for kind in kinds)
        readers = " or ".join(f"`read_{kind}`" for kind in kinds)
        raise ValueError(f"{path} looks like {found}: give {formats}, or call {readers} instead")
    return kinds[0]


def _kinds(folder: Path) -> list[str]:
    return [kind for kind, (splits_of, _) in _FORMATS.items() if splits_of(folder) is not None]


def _hint(folder: Path) -> str:
    """A dataset inside of a folder that is none, or what is wrong with a file in it."""
    inner = folders_in(folder)
    for path in [*inner, *(deeper for place in inner for deeper in folders_in(place))][:100]:
        with contextlib.suppress(ValueError):
            if _kinds(path):
                return f"Did you mean {path}? "
    for path in entries(folder, (".json", ".csv"))[:1]:
        try:
            _FORMATS[_SUFFIXES[path.suffix.lower()]][1](path)
        except ValueError as error:
            return f"{error}. "
    return ""


# === Files of splits ===


def _file_of_split(
    folder: Path, files: dict[str, Path] | None, split: str | None, kind: str
) -> Path:
    if files is None:
        raise ValueError(f"{folder} has no {kind.upper()} file. Expected:{_EXPECTED}")
    matches = list(files) if split is None else _matching_splits(split, files)
    if len({files[match] for match in matches}) != 1:
        raise ValueError(
            f"`split` must be one of those in {folder} ({kind.upper()}): {', '.join(files)}. "
            f"Received: split={split!r}"
        )
    return files[matches[0]]


def _matching_splits(name: str, splits: Collection[str]) -> list[str]:
    """Splits with this name, or with this name and a year: "train2017" for "train"."""
    if same := find_split(name, splits):
        return [same]
    year = re.compile(rf"{re.escape(name)}[-_ ]?\d+", re.IGNORECASE)
    return list(filter(year.fullmatch, splits))


def first_split(names: Sequence[str], splits: list[str]) -> str | None:
    """Returns the split of the first name that matches any; a year may follow, as in "val2017"."""
    for name in names:
        if matches := _matching_splits(name, splits):
            return matches[0] if len(matches) == 1 else name  # several years: the reader raises
    return None
