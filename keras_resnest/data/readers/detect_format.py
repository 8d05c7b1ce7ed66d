"""One reader for all formats: detects the format and calls its reader."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers.coco import SECTIONS, read_coco
from keras_resnest.data.readers.csv import has_known_columns, read_csv
from keras_resnest.data.readers.tfds import read_tfds, tfds_splits
from keras_resnest.data.readers.voc import read_voc, voc_splits
from keras_resnest.data.readers.yolo import YAML_SUFFIXES, find_yaml, read_yolo, yolo_splits

_EXPECTED = """
  VOC:  a folder with Annotations/*.xml and JPEGImages/, or with images and XML files side by side
  COCO: a .json file, or a folder with annotations/instances_<split>.json or
        <split>/_annotations.coco.json
  YOLO: a folder with data.yaml, or with images/ and labels/, or with <split>/images and
        <split>/labels
  CSV:  a .csv file, or a folder with <split>.csv, of rows image,x1,y1,x2,y2,label
  TFDS: "tfds:NAME", such as "tfds:voc/2007" """

TEST_SPLITS = ("test", "val", "valid", "validation")  # first choice first


def read_detection(
    source: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads annotated images in any known format: VOC, COCO, YOLO, CSV or TFDS.

    Args:
        source: Folder or file, or "tfds:" and a name of TensorFlow Datasets. See `read_voc`,
            `read_coco`, `read_yolo`, `read_csv` and `read_tfds` for what they read and report.
        split: Name of a file in `ImageSets/Main` (VOC), `<split>` in `instances_<split>.json` or
            `<split>.csv` (a year after it may be omitted), a folder (YOLO), or a TFDS split (then
            required). A single COCO or CSV file has none. Default: all images, or the only file.
        class_names: Names of the labels 0, 1, 2, ... Default: as in the dataset.
        image_folder: Folder of the images of a COCO or CSV file. Default: see their readers.
        on_error: "raise" a ValueError for a faulty image, or "skip" and report it; unused by TFDS.
        use_difficult: Whether to keep objects marked as difficult.

    Raises:
        ValueError: if no format or several are recognized, or see the reader.

    Example:
    ```python
    train = read_detection("my_folder", "train")
    test = read_detection("my_folder", "test", class_names=train.class_names)
    ```
    """
    options = {"class_names": class_names, "use_difficult": use_difficult}
    if (name := _tfds_name(source)) is not None:
        if split is None:
            raise ValueError('TFDS needs a `split`, such as "train". Received: split=None')
        return read_tfds(name, split, **options)
    options["on_error"] = on_error
    path, kind = Path(source), _kind(source)
    if image_folder is not None and kind not in _FILES:
        raise ValueError(
            f"`image_folder` is for COCO and CSV files; {path} looks like {kind}. "
            f"Received: image_folder={image_folder!r}"
        )
    if kind in ("VOC", "YOLO"):
        return {"VOC": read_voc, "YOLO": read_yolo}[kind](path, split, **options)
    if split is not None and path.is_file():
        raise ValueError(
            f"A single {kind} file has no splits: omit `split`, and split the dataset with "
            f"`hold_out`. Received: split={split!r}, {path}"
        )
    file = path if path.is_file() else _file_of_split(path, _FILES[kind](path), split, kind)
    return {"COCO": read_coco, "CSV": read_csv}[kind](file, image_folder, **options)


def read_train_test(
    source: str | os.PathLike,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    holdout: float = 0.2,
    seed: int = 0,
    on_error: str = "raise",
) -> tuple[DetectionDataset, DetectionDataset]:
    """Reads a training set and a test set with the same class names.

    A dataset without splits is split at random.

    Args:
        source: As in `read_detection`.
        train_split: Default: "train".
        test_split: Default: the first of "test", "val", "valid" and "validation" that exists; for
            TFDS, "test". A year may follow the name, as in "val2017".
        holdout: Fraction of the images to hold out for testing, if the dataset has no splits.
        seed: Seed of the random split.
        on_error: As in `read_detection`.

    Raises:
        ValueError: if `holdout` is not above 0 and below 1, or as in `read_detection`.

    Example: `train, test = read_train_test("my_folder")`
    """
    if not 0 < holdout < 1:
        raise ValueError(f"`holdout` must be above 0 and below 1. Received: holdout={holdout}")
    if _tfds_name(source) is None:
        splits = find_splits(source)
        if len(splits) < 2 and not (train_split or test_split):
            return read_detection(source, on_error=on_error).hold_out(holdout, seed)
        train_split = train_split or first_split(("train",), splits)
        test_split = test_split or first_split(TEST_SPLITS, splits)
    train = read_detection(source, train_split or "train", on_error=on_error)
    test = read_detection(source, test_split or "test", train.class_names, on_error=on_error)
    return train, test


def find_splits(source: str | os.PathLike) -> list[str]:
    """Returns the sorted names that `read_detection` accepts as `split`, if any.

    Args:
        source: As in `read_detection`.

    Raises:
        ValueError: if the format is not recognized, or if a TFDS dataset is not on disk.

    Example: `find_splits("tfds:voc/2007")` returns `["test", "train", "validation"]`.
    """
    if (name := _tfds_name(source)) is not None:
        return tfds_splits(name)
    path, kind = Path(source), _kind(source)
    if kind in _FILES:
        return [] if path.is_file() else sorted(_FILES[kind](path))
    return {"VOC": voc_splits, "YOLO": yolo_splits}[kind](path)


# === Formats ===


def _tfds_name(source: str | os.PathLike) -> str | None:
    """The name after "tfds:"; None for a path."""
    is_name = isinstance(source, str) and source.startswith("tfds:")
    return source.removeprefix("tfds:") if is_name else None


def _kind(source: str | os.PathLike) -> str:
    path = Path(source)
    if path.is_file():
        kinds = {".json": "COCO", ".csv": "CSV", **dict.fromkeys(YAML_SUFFIXES, "YOLO")}
        if kind := kinds.get(path.suffix.lower()):
            return kind
        raise ValueError(f"{path} is not a file of a known format. Expected:{_EXPECTED}")
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder. Expected:{_EXPECTED}")
    tests = {"VOC": _is_voc, "COCO": _coco_files, "YOLO": _is_yolo, "CSV": _csv_files}
    kinds = [kind for kind, test in tests.items() if test(path)]
    if not kinds:
        raise ValueError(f"{path} is not a folder of a known format. Expected:{_EXPECTED}")
    if len(kinds) > 1:
        readers = " or ".join(f"`read_{kind.lower()}`" for kind in kinds)
        raise ValueError(f"{path} looks like {' and '.join(kinds)}: call {readers} instead")
    return kinds[0]


def _is_voc(folder: Path) -> bool:
    patterns = ("Annotations", "*/Annotations", "*/*/Annotations", "*.xml", "*.XML")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _is_yolo(folder: Path) -> bool:
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    has_both = any((path / "images").is_dir() and (path / "labels").is_dir() for path in folders)
    return has_both or find_yaml(folder) is not None


# === Files of splits ===


def _coco_files(folder: Path) -> dict[str, Path]:
    """Annotation files by split."""
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    files = [path for path in files if not re.match(r"captions_|person_keypoints_", path.stem)]
    found = {path.stem.removeprefix("instances_"): path for path in sorted(files)}
    found |= {path.parent.name: path for path in sorted(folder.glob("*/_annotations.coco.json"))}
    return {name: path for name, path in found.items() if _mentions_sections(path)}


def _mentions_sections(path: Path) -> bool:
    with open(path, "rb") as file:  # read only the beginning, as COCO's file has 450 MB
        start = file.read(1 << 16).replace(b"\0", b"")  # UTF-16 too
    return any(f'"{name}"'.encode() in start for name in SECTIONS)


def _csv_files(folder: Path) -> dict[str, Path]:
    """Annotation files by split."""
    found = {path.stem: path for path in sorted(folder.glob("*.csv"))}
    found |= {path.parent.name: path for path in sorted(folder.glob("*/_annotations.csv"))}
    return {name: path for name, path in found.items() if has_known_columns(path)}


_FILES = {"COCO": _coco_files, "CSV": _csv_files}


def _file_of_split(folder: Path, files: dict[str, Path], split: str | None, kind: str) -> Path:
    matches = list(files) if split is None else _matching_splits(split, files)
    if len(matches) != 1:
        raise ValueError(
            f"`split` must be one of those in {folder} ({kind}): {', '.join(files)}. "
            f"Received: split={split!r}"
        )
    return files[matches[0]]


def _matching_splits(name: str, splits: Iterable[str]) -> list[str]:
    """Splits with this name, or with this name and a year: "train2017" for "train"."""
    if name in splits:
        return [name]
    return [split for split in splits if re.fullmatch(rf"{re.escape(name)}[-_ ]?\d+", split)]


def first_split(names: Sequence[str], splits: list[str]) -> str | None:
    """Returns the split of the first name that matches any; a year may follow, as in "val2017"."""
    for name in names:
        if matches := _matching_splits(name, splits):
            return matches[0] if len(matches) == 1 else name  # several years: the reader raises
    return None
