"""One reader for all formats: it looks at a path and calls the reader of its format."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers.coco import SECTIONS, read_coco
from keras_resnest.data.readers.csv import has_known_columns, read_csv
from keras_resnest.data.readers.tfds import read_tfds, tfds_splits
from keras_resnest.data.readers.voc import read_voc, voc_splits
from keras_resnest.data.readers.yolo import YAML_SUFFIXES, find_yaml, read_yolo, yolo_splits

_LOOKED_FOR = """
  VOC:  a folder with Annotations/*.xml and JPEGImages/, or with images and XML files side by side
  COCO: a .json file, or a folder with annotations/instances_<split>.json or
        <split>/_annotations.coco.json
  YOLO: a folder with data.yaml, or with images/ and labels/, or with <split>/images and
        <split>/labels
  CSV:  a .csv file, or a folder with <split>.csv, of rows image,x1,y1,x2,y2,label
  TFDS: "tfds:NAME", such as "tfds:voc/2007" """


def read_detection(
    source: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads annotated images of any known format: VOC, COCO, YOLO, CSV or TFDS.

    Args:
        source: Folder or file, or "tfds:" and a name of TensorFlow Datasets. See `read_voc`,
            `read_coco`, `read_yolo`, `read_csv` and `read_tfds` for what they read and report.
        split: Name of the part: a file in `ImageSets/Main` (VOC), `<split>` of the names
            `instances_<split>.json` or `<split>.csv` (a year behind it may be left out), a folder
            (YOLO), or what TFDS knows. Default: all images, or the only file; TFDS needs one,
            and a single COCO or CSV file has none.
        class_names: Names of the labels 0, 1, 2, ... Default: as in the dataset.
        image_folder: Folder of the images of a COCO or CSV file. Default: see their readers.
        on_error: "raise" a ValueError for a fault that costs an image, or "skip" the image with
            a line in the report. (TFDS has no such faults.)
        use_difficult: Keep objects marked as difficult; False leaves them out.

    Returns:
        `DetectionDataset`.

    Raises:
        ValueError: The format is not recognized, more than one is, or see the reader of the format.

    Example:

    ```python
    train = read_detection("my_folder", "train")
    test = read_detection("my_folder", "test", class_names=train.class_names)
    everything = read_detection("objects.csv")
    train, test = everything.hold_out(0.2, seed=1)
    ```
    """
    options = {"class_names": class_names, "use_difficult": use_difficult}
    if isinstance(source, str) and source.startswith("tfds:"):
        if split is None:
            raise ValueError('TFDS needs a `split`, such as "train". Received: split=None')
        return read_tfds(source.removeprefix("tfds:"), split, **options)
    options["on_error"] = on_error
    path, kind = Path(source), _kind(source)
    if image_folder is not None and kind not in ("COCO", "CSV"):
        raise ValueError(
            f"`image_folder` is for COCO and CSV files; {path} looks like {kind}. "
            f"Received: image_folder={image_folder!r}"
        )
    if kind == "VOC":
        return read_voc(path, split, **options)
    if kind == "YOLO":
        return read_yolo(path, split, **options)
    if split is not None and path.is_file():
        raise ValueError(
            f"A single {kind} file has no splits: leave `split` out, and part the dataset with "
            f"`hold_out`. Received: split={split!r}, {path}"
        )
    file = path if path.is_file() else _of_split(path, _FILES[kind](path), split, kind)
    return {"COCO": read_coco, "CSV": read_csv}[kind](file, image_folder, **options)


def find_splits(source: str | os.PathLike) -> list[str]:
    """Names that `read_detection` takes as `split` for a dataset.

    Args:
        source: as in `read_detection`.

    Returns:
        Names, sorted; none for a single COCO or CSV file, and for a folder without parts.

    Raises:
        ValueError: The format is not recognized, or a TFDS dataset is not on disk.

    Example: `find_splits("tfds:voc/2007")` gives `["test", "train", "validation"]`.
    """
    if isinstance(source, str) and source.startswith("tfds:"):
        return tfds_splits(source.removeprefix("tfds:"))
    path, kind = Path(source), _kind(source)
    if kind in _FILES:
        return [] if path.is_file() else sorted(_FILES[kind](path))
    return {"VOC": voc_splits, "YOLO": yolo_splits}[kind](path)


def _kind(source: str | os.PathLike) -> str:
    path = Path(source)
    return _kind_of_file(path) if path.is_file() else _kind_of_folder(path)


def _kind_of_file(path: Path) -> str:
    kinds = {".json": "COCO", ".csv": "CSV", **dict.fromkeys(YAML_SUFFIXES, "YOLO")}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is no file of a known format. Looked for:{_LOOKED_FOR}")
    return kind


def _kind_of_folder(path: Path) -> str:
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder. Looked for:{_LOOKED_FOR}")
    tests = {"VOC": _is_voc, "COCO": _coco_files, "YOLO": _is_yolo, "CSV": _csv_files}
    kinds = [kind for kind, test in tests.items() if test(path)]
    if not kinds:
        raise ValueError(f"{path} is a folder of no known format. Looked for:{_LOOKED_FOR}")
    if len(kinds) > 1:
        raise ValueError(
            f"{path} looks like {' and '.join(kinds)}: call the reader that is meant, "
            + " or ".join(f"`read_{kind.lower()}`" for kind in kinds)
        )
    return kinds[0]


def _is_voc(folder: Path) -> bool:
    patterns = ("Annotations", "*/Annotations", "*/*/Annotations", "*.xml", "*.XML")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _is_yolo(folder: Path) -> bool:
    pairs = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    if any((path / "images").is_dir() and (path / "labels").is_dir() for path in pairs):
        return True
    return find_yaml(folder) is not None


def _coco_files(folder: Path) -> dict[str, Path]:
    """Annotation files by the names of their splits."""
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    files = [path for path in files if not re.match(r"captions_|person_keypoints_", path.stem)]
    found = {path.stem.removeprefix("instances_"): path for path in sorted(files)}
    found |= {path.parent.name: path for path in sorted(folder.glob("*/_annotations.coco.json"))}
    return {name: path for name, path in found.items() if _mentions_sections(path)}


def _mentions_sections(path: Path) -> bool:
    with open(path, "rb") as file:  # the file of COCO has 450 MB: only its beginning
        start = file.read(1 << 16).replace(b"\0", b"")  # UTF-16 too
    return any(f'"{name}"'.encode() in start for name in SECTIONS)


def _csv_files(folder: Path) -> dict[str, Path]:
    found = {path.stem: path for path in sorted(folder.glob("*.csv"))}
    found |= {path.parent.name: path for path in sorted(folder.glob("*/_annotations.csv"))}
    return {name: path for name, path in found.items() if has_known_columns(path)}


_FILES = {"COCO": _coco_files, "CSV": _csv_files}


def _of_split(folder: Path, files: dict[str, Path], split: str | None, kind: str) -> Path:
    """The file of a split; of "train", also "train2017", if it is the only such one."""
    if split is None:
        matches = list(files)
    elif split in files:
        matches = [split]
    else:
        matches = [name for name in files if re.fullmatch(rf"{re.escape(split)}[-_ ]?\d+", name)]
    if len(matches) != 1:
        raise ValueError(
            f"`split` must be one of those of {folder} ({kind}): {', '.join(files)}. "
            f"Received: split={split!r}"
        )
    return files[matches[0]]
