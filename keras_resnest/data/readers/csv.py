"""Reader of CSV files with one object per row."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from math import isnan
from pathlib import Path

from keras_resnest.checks import checked
from keras_resnest.data.dataset import DetectionDataset, nearest
from keras_resnest.data.readers import common, files
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation

COLUMNS = ("image", "x1", "y1", "x2", "y2", "label")  # of a file without a header
_SIZE = ("width", "height")  # may follow them (SKU-110K)
_OPEN_IMAGES = {"imageid", "labelname"}  # boxes are fractions of the image
# Google AutoML has no header, and four corners, of which two may be empty, as fractions
_ML_USE = (*files.SPLIT_NAMES, "unassigned")
_AUTOML = ("split", "image", "label", "x1", "y1", "", "", "x2", "y2", "", "")
_SYNONYMS = {
    "image": (
        *("filename", "file_name", "file", "path", "image_path", "image_name", "image_id"),
        *("imageid", "img"),
    ),
    "x1": ("xmin", "x_min", "left", "bbox_x"),
    "y1": ("ymin", "y_min", "top", "bbox_y"),
    "x2": ("xmax", "x_max", "right", "bbox_width"),  # x1 is added to a width
    "y2": ("ymax", "y_max", "bottom", "bbox_height"),
    "label": ("class", "class_name", "name", "category", "labelname", "label_name"),
    "width": ("image_width",),
    "height": ("image_height",),
    "difficult": ("is_difficult", "isgroupof"),
    "split": files.SPLIT_KEYS[1:],
}


@checked
def read_csv(
    file: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    on_error: common.OnError = "raise",
    use_difficult: bool = True,
    unannotated: common.Unannotated = "background",
    allow_outside: bool = False,
    split: str | None = None,
) -> DetectionDataset:
    """Reads annotations in a CSV file with one object per row.

    Without a header, the columns are image, x1, y1, x2, y2, label (the format of keras-retinanet),
    and perhaps width and height of the image; or those of Google AutoML. With a header, they may be
    in any order and have other common names (`filename`, `xmin`, ..., `class`), also those of Open
    Images; `difficult` is read too, and a column `split`, `set`, `subset` or `usage` of "train",
    "val", ... makes splits. Commas, semicolons or tabs separate columns; after the latter two,
    numbers may have decimal commas. Coordinates are 0-based, continuous pixels of the upright
    image. `image_id` is the name of the image in the file. Boxes are dropped, clipped and reported,
    and images found, as in `read_coco`; names may lack the suffix.

    Args:
        file: The CSV file.
        image_folder: Folder of the images. Default: as in `read_coco`.
        class_names: Names of the labels 0, 1, 2, ... Default: the lines of a `classes.txt` beside
            the file, if there is one, and all other names in the file, sorted.
        on_error: "raise" a ValueError for a missing or unreadable image, a row with a wrong number
            of columns or no label, or a class that is not in `class_names`; or "skip" the image
            and report it.
        use_difficult: Whether to keep objects marked as difficult.
        unannotated: Images with an empty box and label: an "error" (see `on_error`), "skip" and
            report them, or "background": they have no objects.
        allow_outside: Whether the file may name images outside of its folder and `image_folder`.
        split: A split of the column of splits. Default: all images.

    Raises:
        ValueError: if there is no such file or folder, columns are unknown, there are no rows, no
            box is usable, or see `on_error`.

    Example: `train = read_csv("data/train.csv", image_folder="data/images")`
    """
    faults = Faults(on_error, unannotated)
    path = Path(file)
    if not path.exists():
        raise ValueError(f"`file` must be a CSV file. Received: {file} (no such file)")
    given = None if image_folder is None else files.check_folder(image_folder, "image_folder")
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in _rows(path):
        images.setdefault(common.normalize_path(row["image"]), []).append((line, row))
    if not images:
        raise ValueError(f"{path}: no rows")
    tree, folder = common.find_images_of(path, list(images), given, allow_outside)
    if class_names is None:
        rows = (row for rows in images.values() for _, row in rows)
        named = {row["label"] for row in rows if row.get("label")}
        class_names = tree.class_names(path.parent, named, path)

    splits = _splits_of(row for rows in images.values() for _, row in rows)
    if split is not None:
        named = {  # a faulty row has no split
            name: [s for _, row in rows for s in ([row["split"]] if "split" in row else splits)]
            for name, rows in (images if splits else {}).items()
        }
        images = {n: images[n] for n in common.images_of_split(path, named, split, faults)}

    def parse(name):
        objects = [_object(path, line, row) for line, row in images[name]]
        objects = tuple(item for item in objects if item is not None)
        row = images[name][0][1]
        sizes = {common.stated_size(r.get("width"), r.get("height")) for _, r in images[name]}
        if splits and len(named := {row["split"] for _, row in images[name]}) > 1:
            detail = f"{name}: {', '.join(map(repr, sorted(named)))}"
            raise FileError(path, "different splits of one image", detail)
        if len(sizes - {None}) > 1:
            detail = ", ".join(f"{width} x {height}" for width, height in sorted(sizes - {None}))
            raise FileError(path, "different sizes of one image", f"{name}: {detail}")
        return ImageAnnotation(
            file=name,
            image_id=name,
            image=tree.image(folder, row["image"], path),
            objects=objects,
            size=next(iter(sizes - {None}), None),
            is_relative="relative" in row,
            missing="" if objects else "image without box",
        )

    return common.build_dataset(path, images, parse, class_names, use_difficult, faults, folder)


def _splits_of(rows: Iterable[dict[str, str]]) -> list[str]:
    """Names in the column of splits, also ""; none without such a column."""
    found: dict[str, None] = {}
    for row in rows:
        if "fault" not in row:
            if "split" not in row:
                return []
            found[row["split"]] = None
    return list(found) if any(map(files.is_split_name, found)) else []


def csv_files(source: Path) -> dict[str, Path] | None:
    """Files by split, of a folder or a column of splits; None if a folder is no CSV dataset."""
    if not source.is_dir():
        return dict.fromkeys(filter(None, _splits_of(row for _, row in _rows(source))), source)
    found = files.by_split(filter(_has_known_columns, files.annotation_files(source, ".csv")))
    for inner in files.folders_in(source):
        if (path := inner / "_annotations.csv").is_file() and _has_known_columns(path):
            found[inner.name] = path
    in_column = csv_files(*found.values()) if len(found) == 1 else {}
    return in_column or found or None


def csv_has_objects(path: Path, split: str) -> bool:
    """Whether a split, of the column or the whole file, has objects."""
    is_in_column = has_others = False
    for _, row in _rows(path):
        is_own, has_object = row.get("split", split) == split, bool(row.get("label"))
        if is_own and has_object:
            return True
        is_in_column, has_others = is_in_column or is_own, has_others or has_object
    return has_others and not is_in_column


def _has_known_columns(path: Path) -> bool:
    try:
        return next(_rows(path), None) is not None
    except FileError:
        return False


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, cells by column); rows of wrong length have only image and fault."""
    text = files.read_text(path, "CSV file", files.LARGE)
    text = re.sub(r"\Asep=.(?=[\r\n])", "", text)  # of Excel
    first = next(iter(text.strip().splitlines()), "")
    delimiter = max(",;\t", key=first.count)
    options = {"delimiter": delimiter, "skipinitialspace": delimiter != "\t", "strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    columns: Sequence[str] | None = None
    has_sizes = False
    spelling: dict[str, str] = {}
    line = 0
    try:
        for cells in reader:
            line, cells = reader.line_num, [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if columns is None:
                is_automl = len(cells) == len(_AUTOML) and cells[0].lower() in _ML_USE
                is_relative = is_automl or {c.lower() for c in cells} >= _OPEN_IMAGES
                columns = _AUTOML if is_automl else _header(path, cells)
                if columns and not is_automl:
                    has_sizes = cells[columns.index("x2")].lower() == "bbox_width"
                    continue
                columns = columns or (*COLUMNS, *_SIZE)[: len(cells)]
            row = dict(zip(columns, cells, strict=False))
            if len(cells) != len(columns):
                row = {"image": row.get("image", cells[0]), "fault": f"{len(cells)} columns"}
            else:
                row |= {"relative": ""} if is_relative else {}
                if "split" in row:  # in the first of its spellings
                    row["split"] = spelling.setdefault(files.unified(row["split"]), row["split"])
                for name in COLUMNS[1:5] if delimiter != "," else ():
                    row[name] = re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", row[name])
                if all(row[name].lower() in ("", "nan") for name in COLUMNS[1:5]):  # of pandas
                    no_label = row["label"].lower() == "nan"
                    row |= dict.fromkeys(COLUMNS[1:5], "") | ({"label": ""} if no_label else {})
                elif has_sizes:
                    for start, end in (("x1", "x2"), ("y1", "y2")):
                        row[end] = str(common.number(row[start]) + common.number(row[end]))
            yield line, row
    except csv.Error as error:  # a quote that is not closed
        raise FileError(path, "unreadable CSV file", f"after line {line}: {error}") from None


def _header(path: Path, cells: list[str]) -> list[str] | None:
    """Names of the columns; None if the first row is not a header."""
    found = [cell.lower() for cell in cells]
    names = [f"other {i}" for i in range(len(found))]
    for name, others in _SYNONYMS.items():  # the first that is there counts
        if cell := next((cell for cell in (name, *others) if cell in found), None):
            names[found.index(cell)] = name
    missing = [name for name in COLUMNS if name not in names]
    if not missing:
        return names
    numbers = [cell.replace(",", ".") for cell in (*found[1:5], *found[6:])]
    are_numbers = all(cell in ("", "nan") or not isnan(common.number(cell)) for cell in numbers)
    if len(cells) in (len(COLUMNS), len(COLUMNS) + len(_SIZE)) and are_numbers:
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
