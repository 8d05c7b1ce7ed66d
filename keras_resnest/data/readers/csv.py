"""Reader of CSV files with one object in each row."""

import csv
import functools
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from keras_resnest.data.dataset import DetectionDataset, nearest
from keras_resnest.data.readers.common import (
    AnnotatedObject,
    Faults,
    FileError,
    ImageAnnotation,
    build_dataset,
    find_image,
    number,
    plain_path,
    read_text,
    stated_size,
)

COLUMNS = ("image", "x1", "y1", "x2", "y2", "label")
"""Columns of a file without a header."""

_OTHER_NAMES = {
    "image": ("filename", "file_name", "file", "path", "image_path", "image_id", "img"),
    "x1": ("xmin", "x_min", "left"),
    "y1": ("ymin", "y_min", "top"),
    "x2": ("xmax", "x_max", "right"),
    "y2": ("ymax", "y_max", "bottom"),
    "label": ("class", "class_name", "name", "category"),
    "width": ("image_width",),
    "height": ("image_height",),
    "difficult": ("is_difficult",),
}


def read_csv(
    file: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    on_error: str = "raise",
    use_difficult: bool = True,
) -> DetectionDataset:
    """Reads annotations in a CSV file with one object in each row.

    Without a header the columns are image, x1, y1, x2, y2, label (the format of keras-retinanet).
    With a header they may be in any order, have the usual other names (`filename`, `xmin`, ...,
    `class`), and there may be more: `width` and `height` of the image and `difficult` are used,
    others ignored. Columns are separated by commas, semicolons or tabs. A row whose box and label
    are empty says that the image has no objects. Coordinates are pixels of the upright image,
    0-based and continuous (x2 - x1 is the width). `image_id` is the image's name as in the file.

    Dropped, clipped and reported as in `read_coco`.

    Args:
        file: The CSV file.
        image_folder: Folder to which the names of the images are relative. Default: that of the
            file, or "images" in it.
        class_names: Names of the labels 0, 1, 2, ... Default: all names in the file, sorted.
        on_error: What to do with a missing or unreadable image, a row with a wrong number of
            columns or no label, and a class that is not in `class_names`: "raise" a ValueError
            naming the file, or "skip" the image with a line in the report.
        use_difficult: Keep boxes marked as difficult; False leaves them out.

    Returns:
        `DetectionDataset`; its `report` holds the counts and all problems.

    Raises:
        ValueError: No such file or folder, unknown columns, no rows, or see `on_error`.

    Example:

    ```python
    train = read_csv("data/train.csv", image_folder="data/images")
    print(train.report)
    ```
    """
    faults = Faults(on_error)
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"`file` must be a CSV file. Received: {file} (no such file)")
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(
            f"`image_folder` must be a folder. Received: {image_folder} (no such folder)"
        )
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in _rows(path):
        name = plain_path(row["image"])
        images.setdefault(name, []).append((line, row))
    if not images:
        raise ValueError(f"{path}: no rows")
    folder = _usual_folder(path, images) if image_folder is None else Path(image_folder)
    if class_names is None:
        rows = (row for rows in images.values() for _, row in rows)
        class_names = sorted({row["label"] for row in rows if row.get("label")})
        if not class_names:
            raise ValueError(f"No objects in {path}: give `class_names`")
    annotations = [
        functools.partial(_annotation, path, folder, name, rows) for name, rows in images.items()
    ]
    return build_dataset(path, annotations, class_names, use_difficult, faults)


def has_known_columns(path: Path) -> bool:
    """Whether a file begins as one of objects does."""
    try:
        return next(_rows(path), None) is not None
    except FileError:
        return False


def _usual_folder(path: Path, names: Iterable[str]) -> Path:
    """Where the images are: the names begin in the folder of the file, or in its "images"."""
    images = path.parent / "images"
    known = any((path.parent / name).is_file() for name in list(names)[:20])
    return images if not known and images.is_dir() else path.parent


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the line and named cells of each row; rows of a wrong length lack "label"."""
    text = read_text(path, "CSV file")
    first = next(iter(text.strip().splitlines()), "")
    delimiter = max(",;\t", key=first.count)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t")
    columns: Sequence[str] | None = None
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if columns is None:
            columns = _header(path, cells)
            if columns is not None:
                continue
            columns = COLUMNS
        if len(cells) != len(columns):
            yield reader.line_num, {"image": cells[0], "fault": f"{len(cells)} columns"}
        else:
            yield reader.line_num, dict(zip(columns, cells, strict=True))


def _header(path: Path, cells: list[str]) -> list[str] | None:
    """Names of the columns, or None where the first row is not a header."""
    known = {other: name for name, others in _OTHER_NAMES.items() for other in (name, *others)}
    found = [cell.lower() for cell in cells]
    missing = [name for name in COLUMNS if name not in [known.get(cell) for cell in found]]
    if not missing:
        names = [known.get(cell, f"other {i}") for i, cell in enumerate(found)]
        # "filename" and "path", "class" and "name": the first one counts.
        return [n if n not in names[:i] else f"other {i}" for i, n in enumerate(names)]
    looks_like_data = len(cells) == len(COLUMNS) and all(
        cell == "" or number(cell) == number(cell) or cell.lower() in ("nan", "inf", "-inf")
        for cell in cells[1:5]
    )
    if looks_like_data:
        return None
    raise FileError(
        path,
        "unknown columns",
        f"expected rows of {', '.join(COLUMNS)}, or a header with these names in any order. "
        f"Received: {', '.join(cells)}. For {missing[0]!r}: {nearest(missing[0], found)}",
    )


def _annotation(
    path: Path, folder: Path, name: str, rows: list[tuple[int, dict[str, str]]]
) -> ImageAnnotation:
    objects = []
    for line, row in rows:
        if "fault" in row:
            raise FileError(path, "unreadable row", f"line {line} has {row['fault']}")
        corners = [row[corner] for corner in COLUMNS[1:5]]
        if not any(corners) and not row["label"]:
            continue  # an image without objects
        if not row["label"]:
            raise FileError(path, "unreadable row", f"line {line} has a box without a label")
        objects.append(
            AnnotatedObject(
                name=row["label"],
                box=tuple(number(corner) for corner in corners),
                difficult=row.get("difficult", "").lower() in ("1", "true", "yes"),
                text=f"[{', '.join(text or 'missing' for text in corners)}] in line {line}",
            )
        )
    row = rows[0][1]
    return ImageAnnotation(
        file=name,
        image_id=name,
        image=find_image(folder, row["image"], path),
        objects=tuple(objects),
        size=stated_size(row.get("width"), row.get("height")),
    )
