"""Reader of classification data: one folder of images per class."""

import collections
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keras_resnest.checks import check_class_names, checked
from keras_resnest.data.dataset import (
    ClassificationDataset,
    ClassificationReport,
    LabeledImage,
    count_problems,
    nearest,
)
from keras_resnest.data.readers import common
from keras_resnest.data.readers.common import Faults, OnError
from keras_resnest.data.readers.files import (
    FileError,
    check_folder,
    composed,
    entries,
    find_split,
    folders_in,
    is_split_name,
    walk,
)
from keras_resnest.images import IMAGE_SUFFIXES


@checked
def read_image_folder(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: OnError = "raise",
) -> ClassificationDataset:
    """Reads a folder with one folder of images per class, as for ImageNet.

    Subfolders of class folders are searched too. Files without an image suffix and files outside
    the class folders are reported and skipped; hidden files and `runs` are ignored. A
    `UserWarning` summarizes the problems.

    Args:
        folder: Folder of the dataset.
        split: Folder in `folder` with the class folders, e.g. "train", in any letter case, or its
            synonym. Default: `folder` itself.
        class_names: Names of the labels 0, 1, 2, ... Default: the class folders, sorted.
        on_error: "raise" a ValueError for an unreadable image or a class folder that is not in
            `class_names`, or "skip" and report it.

    Raises:
        ValueError: if the folder or split does not exist or has no class folders or images, or see
            `on_error`.

    Example:
        ```python
        train = read_image_folder("flowers", "train")
        val = read_image_folder("flowers", "val", train.class_names)
        print(val.report)
        ```
    """
    faults = Faults(on_error)
    folder = _split_folder(Path(folder), split)
    class_folders = _class_folders(folder, split, faults)
    names = check_class_names(class_names or sorted(composed(path.name) for path in class_folders))
    records = _read_records(folder, _labeled_paths(class_folders, names, faults), faults)
    if not records:
        raise ValueError(f"No usable image in {folder}: {count_problems(faults.problems)}")
    counts = collections.Counter(record.label for record in records)
    for i, name in enumerate(names):
        if not counts[i] and class_names is None:
            faults.add(name, "class without images", "kept as a class")
    faults.warn(folder, stacklevel=3)
    report = ClassificationReport({n: counts[i] for i, n in enumerate(names)}, faults.problems)
    return ClassificationDataset(records, names, report)


def _split_folder(folder: Path, split: str | None) -> Path:
    check_folder(folder, "folder")
    if split is None:
        return folder
    if os.path.isdir(folder / split):  # also a path of several folders
        return folder / split
    known = [path.name for path in folders_in(folder)]
    if (found := find_split(split, known)) is None:
        raise ValueError(
            f"`split` must be a folder in {folder}. Received: {split!r}. {nearest(split, known)}"
        )
    return folder / found


def _class_folders(folder: Path, split: str | None, faults: Faults) -> list[Path]:
    """The class folders, sorted; reports files beside them."""
    found = entries(folder)
    class_folders = [path for path in found if path.is_dir()]
    names = [path.name for path in class_folders]
    if not names:
        raise ValueError(
            f"{folder} must hold one folder of images for each class. Received: {len(found)} files"
        )
    splits = list(filter(is_split_name, names))  # "train" alone may be a class
    if split is None and (len(splits) > 1 or splits == names):
        raise ValueError(
            f"`split` must be given if folders are named {', '.join(splits)}. "
            f"Received: split=None for {folder}"
        )
    if split is None and len(names) == 1 and folders_in(class_folders[0]):
        raise ValueError(f"{folder} holds only one folder. Did you mean {class_folders[0]}?")
    for path in found:
        if not path.is_dir():
            faults.add(path, "file outside of the class folders", "left out")
    return class_folders


def _labeled_paths(
    class_folders: list[Path], names: list[str], faults: Faults
) -> list[tuple[Path, int]]:
    """Path and label of every image."""
    pairs, known = [], [composed(name) for name in names]
    for folder in class_folders:
        with faults.skipping_image():
            name = composed(folder.name)
            if name not in known:
                detail = f"not in `class_names`. {nearest(name, names)}"
                raise FileError(folder, "unknown class", detail)
            for path in walk(folder):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    pairs.append((path, known.index(name)))
                else:
                    faults.add(path, "not an image", "left out", f"in {path.parent.name}")
    return pairs


def _read_records(
    folder: Path, labeled_paths: list[tuple[Path, int]], faults: Faults
) -> list[LabeledImage]:
    records = []
    paths = [path for path, _ in labeled_paths]
    with ThreadPoolExecutor(16) as pool:  # mostly waits for the disk
        infos = [pool.submit(common.read_info, path) for path in paths]
        for (path, label), info in zip(labeled_paths, infos, strict=True):
            with faults.skipping_image():
                image_id = path.relative_to(folder).as_posix()
                records.append(LabeledImage(str(path), image_id, label, info.result()))
    return records
