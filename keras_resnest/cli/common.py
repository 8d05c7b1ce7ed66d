"""Arguments, images and models that several commands use."""

import argparse
import contextlib
import glob
import itertools
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import keras_resnest as kr
from keras_resnest.atomic import naming_path
from keras_resnest.backbones.presets import is_preset, load_preset
from keras_resnest.checks import (
    check_finite_weights,
    check_layers_of_file,
    class_thresholds,
    one_line,
)
from keras_resnest.data.readers.common import UNANNOTATED
from keras_resnest.data.readers.detect_format import FORMATS
from keras_resnest.data.readers.files import read_text

READING_OPTIONS = ("format", "unannotated", "allow_outside")
CLASSIFIER_OPTIONS = ("weights", "crop_size", "classes", "data_dir", "limit")


class Failure(Exception):
    """A command ran without a usable result: exit status 1."""


@contextlib.contextmanager
def writing_results(path: Path):
    """Turns errors of writing to `path` into a `Failure` that names a file."""
    try:
        with naming_path(path):
            yield
    except OSError as error:
        raise Failure(str(error)) from error


def check_output(path: Path) -> None:
    """Raises ValueError, before the work, if `path` cannot be a folder of results."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        reason = "cannot be written" if existing.is_dir() else "is not a folder"
        raise ValueError(f"--output must be a folder. Received: {path} ({existing} {reason})")


def printable(text: str) -> str:
    """Escapes what could control a terminal: strangers choose file names and servers' answers."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


# === Arguments ===


def positive(kind=int):
    """Returns an argparse type: a number above 0."""

    def read(text: str):
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return number

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def confidence(text: str) -> float | dict[str, float]:
    """An argparse type: a number from 0 to 1, or a JSON file with one for each class name."""
    if not Path(text).is_file():
        with contextlib.suppress(ValueError):
            return fraction(text)
        raise argparse.ArgumentTypeError(f"must be a number or an existing file, not {text}")
    try:
        content = json.loads(Path(text).read_text("utf-8"))
        class_thresholds(content, list(content))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} must hold a number by class. {error}") from error
    return content


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a model given as a .keras file, preset or name of a classifier."""
    parser.add_argument("--weights", help="tag or file for a named network; default: imagenet")
    parser.add_argument("--crop-size", type=positive(), help="side of a classifier's crop, pixels")


def add_reading_arguments(parser: argparse.ArgumentParser, format: str = "--format") -> None:
    """Adds the options of reading a detection dataset; `format` is the name of that option."""
    add = parser.add_argument
    add("--skip-faulty", action="store_true", help="leave out images that cannot be used")
    add(format, dest="format", choices=FORMATS, help="of the data; default: recognized")
    text = "images without annotation; default: error for VOC, else background"
    add("--unannotated", choices=UNANNOTATED, help=text)
    add("--allow-outside", action="store_true", help="read files outside DATA that DATA names")


def add_tile_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of detecting in tiles."""
    add = parser.add_argument
    text = "detect also in tiles of this size, multiples of 64: for small objects in large images"
    add("--tiles", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=text)
    text = "of neighboring --tiles, as a fraction of their size; default: 0.2"
    add("--overlap", type=float, metavar="FRACTION", help=text)


def tile_options(arguments) -> dict:
    """Returns the arguments of `detect` for tiles from the command line."""
    if arguments.tiles is None:
        refuse_options(arguments, ["overlap"], "with --tiles")
    given = {"tiles": arguments.tiles, "overlap": arguments.overlap}
    return {name: value for name, value in given.items() if value is not None}


def reading_options(arguments) -> dict:
    """Returns the arguments of `read_detection` from the command line."""
    if (getattr(arguments, "data", None) or arguments.source).startswith("tfds:"):
        refuse_options(arguments, ("skip_faulty", "allow_outside"), "for files, not for TFDS")
    options = {name: getattr(arguments, name) for name in READING_OPTIONS}
    return {**options, "on_error": "skip" if arguments.skip_faulty else "raise"}


def refuse_options(arguments, names, requirement: str) -> None:
    """Raises ValueError if any of these options is used."""
    values = {name: getattr(arguments, name, None) for name in names}
    used = [v is not None and v is not False for v in values.values()]
    used = [f"--{name.replace('_', '-')}" for name in itertools.compress(values, used)]
    if used:
        raise ValueError(f"{', '.join(used)}: only {requirement}")


# === Images ===


def collect_images(arguments: list[str]) -> list[Path]:
    """Lists files, images in folders and matches of patterns, each once."""
    found = []
    for argument in arguments:
        # An existing file is not a pattern, even if its name looks like one.
        is_path = Path(argument).exists() or not glob.has_magic(argument)
        paths = [argument] if is_path else sorted(glob.glob(argument, recursive=True))
        if not paths:
            raise ValueError(f"nothing matches the pattern {argument!r}")
        for path in map(Path, paths):
            found += kr.data.find_images(path) if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def load_images(paths: list[Path], batch_size: int):
    """Yields batches of readable images, as (paths, arrays); reports the others."""
    for start in range(0, len(paths), batch_size):
        readable, images = [], []
        for path in paths[start : start + batch_size]:
            try:
                images.append(kr.data.load_image(path))
                readable.append(path)
            except ValueError as error:
                print(f"skipped: {printable(str(error))}", file=sys.stderr)
        if images:
            yield readable, images


# === Figures ===


def print_figures(voc, coco) -> None:
    """Prints average precision by class and size, and the headline."""
    shown = {"mAP@[.5:.95]": coco.metrics["AP"], "mAP@0.5": voc.mAP}
    shown |= {"mAP@0.75": coco.metrics["AP75"]}
    shown |= {size: coco.metrics[f"AP{size}"] for size in ("small", "medium", "large")}
    print(f"{voc}\n{coco}")
    print(", ".join(f"{k} {'-' if np.isnan(v) else format(v, '.3f')}" for k, v in shown.items()))


def figures(voc, coco) -> dict:
    """Returns average precision as JSON: None where a class or size has no object."""
    metrics = {name: None if np.isnan(v) else v for name, v in coco.metrics.items()}
    return {
        "mAP": metrics["AP"],
        "mAP50": None if np.isnan(voc.mAP) else voc.mAP,
        "mAP75": metrics["AP75"],
        "AP": coco.per_class(),
        "AP50": voc.per_class(),
        "COCO": metrics,
    }


# === Models ===


class Crop(NamedTuple):
    """Arguments of `center_crop_image`."""

    size: int
    ratio: float = 0.875
    interpolation: str = "bilinear"


def load_model(name: str, weights: str | None = None, classes: int | None = None):
    """Loads a .keras file or a preset, or creates the classifier with this name."""
    if is_saved_model(name):
        if weights is not None:
            raise ValueError(f"--weights is for a named network; {name} has its own")
        return load_keras_file(name)
    weights = weights or "imagenet"
    options = {} if classes is None or weights == "imagenet" else {"classes": classes}
    return kr.create_backbone(name, include_top=True, weights=weights, **options)


def is_saved_model(name: str) -> bool:
    """Whether a model is a .keras file or a preset, not the name of a network."""
    return name.endswith(".keras") or is_preset(name)


def load_keras_file(path: str):
    """Loads a .keras file, or a preset: its folder or hf://user/name."""
    import keras

    if is_preset(path):
        return load_preset(path, keras.Model)
    if not Path(path).exists():
        raise ValueError(f"no such model: {path}")
    with reporting_unusable_model(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("It is damaged, or no .keras file")
        model = keras.saving.load_model(path, compile=False)
        check_layers_of_file(model, path)
        check_finite_weights(model)
        return model


def open_detector(source: str, builder: str | None = None):
    """Opens a .keras file or a preset, or the published weights (file or tag) of a builder."""
    if builder is not None:
        return getattr(kr.builders, builder)(weights=source)
    model = load_keras_file(source)
    if not isinstance(model, kr.RefineDet):
        kind = type(model).__name__
        raise ValueError(f"{source} is not a usable model. It holds a {kind}, not a RefineDet")
    return model


@contextlib.contextmanager
def reporting_unusable_model(path: str):
    """Turns all errors into a ValueError; each kind of damage raises another type."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is not a usable model. {one_line(error)}") from error


def find_crop(model, arguments) -> Crop:
    """Returns the crop of a classifier: that of its published accuracy, or from the arguments."""
    if len(model.output_shape) != 2 or len(model.input_shape) != 4:
        raise ValueError(
            f"{arguments.model} is not an image classifier: its output is {model.output_shape}"
        )
    row = published_weights(arguments.model, arguments.weights)
    crop = Crop(row.crop_size, row.crop_ratio, row.interpolation) if row else Crop(224)
    return crop._replace(size=arguments.crop_size or model.input_shape[1] or crop.size)


def published_weights(name: str, weights: str | None):
    """Returns the row of these weights in the table of published weights, else the first row."""
    tags = kr.backbones.PRETRAINED.get(name.lower(), {})
    return tags.get(weights) or next(iter(tags.values()), None)


def read_class_names(path: Path) -> list[str]:
    return [name for name in read_text(path, "list of classes").splitlines() if name.strip()]
