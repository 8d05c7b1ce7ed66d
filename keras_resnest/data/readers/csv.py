"""Reader of CSV files with one object per row."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from math import isnan
from pathlib import Path

from keras_resnest.data.dataset import DetectionDataset, nearest
from keras_resnest.data.readers import common
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation

COLUMNS = ("image", "x1", "y1", "x2", "y2", "label")  # of a file without a header
_SYNONYMS = {
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
    """Reads annotations in a CSV file with one object per row.

    Without a header, the columns are image, x1, y1, x2, y2, label (the format of keras-retinanet).
    With a header, they may be in any order and have other common names (`filename`, `xmin`, ...,
    `class`); `width` and `height` of the image and `difficult` are read too. Commas, semicolons or
    tabs separate columns. A row with an empty box and label is an image without objects.
    Coordinates are 0-based, continuous pixels of the upright image. `image_id` is the name of the
    image in the file. Boxes are dropped, clipped and reported as in `read_coco`.

    Args:
        file: The CSV file.
        image_folder: Folder of the images. Default: the folder of the file, or "images" in it.
        class_names: Names of the labels 0, 1, 2, ... Default: all names in the file, sorted.
        on_error: "raise" a ValueError for a missing or unreadable image, a row with a wrong number
            of columns or no label, or a class that is not in `class_names`; or "skip" the image
            and report it.
        use_difficult: Whether to keep objects marked as difficult.

    Raises:
        ValueError: if there is no such file or folder, columns are unknown, there are no rows, or
            see `on_error`.

    Example: `train = read_csv("data/train.csv", image_folder="data/images")`
    """
    faults = Faults(on_error)
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"`file` must be a CSV file. Received: {file} (no such file)")
    folder = None if image_folder is None else common.check_folder(image_folder, "image_folder")
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in _rows(path):
        images.setdefault(common.normalize_path(row["image"]), []).append((line, row))
    if not images:
        raise ValueError(f"{path}: no rows")
    folder = folder or _usual_folder(path, images)
    if class_names is None:
        rows = (row for rows in images.values() for _, row in rows)
        class_names = sorted({row["label"] for row in rows if row.get("label")})
        if not class_names:
            raise ValueError(f"No objects in {path}: give `class_names`")

    def parse(name):
        objects = [_object(path, line, row) for line, row in images[name]]
        row = images[name][0][1]
        return ImageAnnotation(
            file=name,
            image_id=name,
            image=common.find_image(folder, row["image"], path),
            objects=tuple(item for item in objects if item is not None),
            size=common.stated_size(row.get("width"), row.get("height")),
        )

    return common.build_dataset(path, images, parse, class_names, use_difficult, faults)


def has_known_columns(path: Path) -> bool:
    """Whether a file starts like a CSV file of objects."""
    try:
        return next(_rows(path), None) is not None
    except FileError:
        return False


def _usual_folder(path: Path, names: Iterable[str]) -> Path:
    """The folder of the file, or "images" in it if the first images are not beside the file."""
    images = path.parent / "images"
    is_beside = any((path.parent / name).is_file() for name in list(names)[:20])
    return images if not is_beside and images.is_dir() else path.parent


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, cells by column); rows of wrong length have only image and fault."""
    text = common.read_text(path, "CSV file")
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
            if columns:
                continue
            columns = COLUMNS
        row = {"image": cells[0], "fault": f"{len(cells)} columns"}
        if len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
        yield reader.line_num, row


def _header(path: Path, cells: list[str]) -> list[str] | None:
    """Names of the columns; None if the first row is not a header."""
    known = {other: name for name, others in _SYNONYMS.items() for other in (name, *others)}
    found = [cell.lower() for cell in cells]
    names = [known.get(cell, f"other {i}") for i, cell in enumerate(found)]
    missing = [name for name in COLUMNS if name not in names]
    if not missing:
        # The first synonym counts, e.g. of "filename" and "path".
        return [n if n not in names[:i] else f"other {i}" for i, n in enumerate(names)]
    corners = [cell.lower() for cell in cells[1:5]]
    are_numbers = all(cell in ("", "nan") or not isnan(common.number(cell)) for cell in corners)
    if len(cells) == len(COLUMNS) and are_numbers:
        return None
    expected = f"expected rows of {', '.join(COLUMNS)}, or a header with these names in any order"
    received = f"Received: {', '.join(cells)}. For {missing[0]!r}: {nearest(missing[0], found)}"
    raise FileError(path, "unknown columns", f"{expected}. {received}")


def _object(path: Path, line: int, row: dict[str, str]) -> AnnotatedObject | None:
    """The object of a row; None for an image without objects."""
    if "fault" in row:
        raise FileError(path, "unreadable row", f"line {line} has {row['fault']}")
    corners = [row[corner] for corner in COLUMNS[1:5]]
    if not row["label"] and not any(corners):
        return None
    if not row["label"]:
        raise FileError(path, "unreadable row", f"line {line} has a box without a label")
    return AnnotatedObject(
        name=row["label"],
        box=tuple(map(common.number, corners)),
        difficult=common.is_true(row.get("difficult", "")),
        text=f"[{', '.join(corner or 'missing' for corner in corners)}] in line {line}",
    )
