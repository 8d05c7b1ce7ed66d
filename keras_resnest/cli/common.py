"""What several commands share: types of arguments, images, models."""

import argparse
import glob
import sys
from pathlib import Path
from typing import NamedTuple

import keras_resnest as kr


class Failure(Exception):
    """A command ran, but without a usable result: exit status 1."""


# === Arguments ===


def positive(kind=int):
    """An argparse type: a number above 0."""

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


def given_options(arguments, names) -> list[str]:
    """Which of some options without a default are on the command line, as `--some-option`."""
    given = [name for name in names if getattr(arguments, name) is not None]
    return [f"--{name.replace('_', '-')}" for name in given]


# === Images ===


def collect_images(arguments: list[str]) -> list[Path]:
    """Files, the images in folders and what matches patterns such as "photos/*.jpg", each once."""
    found = []
    for argument in arguments:
        # A file whose name looks like a pattern is that file.
        is_path = Path(argument).exists() or not glob.has_magic(argument)
        paths = [argument] if is_path else sorted(glob.glob(argument, recursive=True))
        if not paths:
            raise ValueError(f"nothing matches the pattern {argument!r}")
        for path in map(Path, paths):
            found += kr.data.find_images(path) if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def load_images(paths: list[Path], batch_size: int):
    """Yields batches of readable images, as lists of paths and of arrays; reports the others."""
    for start in range(0, len(paths), batch_size):
        readable, images = [], []
        for path in paths[start : start + batch_size]:
            try:
                images.append(kr.data.load_image(path))
                readable.append(path)
            except ValueError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if images:
            yield readable, images


# === Models ===


class Crop(NamedTuple):
    """How the images of a classifier are cut, as `center_crop_image` takes it."""

    size: int
    ratio: float = 0.875
    interpolation: str = "bilinear"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a classifier that is given by name."""
    parser.add_argument("--weights", help="tag or file for a named network; default: imagenet")
    parser.add_argument("--crop-size", type=positive(), help="side of a classifier's crop, pixels")


def load_model(name: str, weights: str | None = None, classes: int | None = None):
    """A model from a `.keras` file, or a classifier by the name of its network."""
    if name.endswith(".keras"):
        if weights is not None:
            raise ValueError(f"--weights is for a network that is named; {name} has its own")
        return load_keras_file(name)
    weights = weights or "imagenet"
    options = {} if classes is None or weights == "imagenet" else {"classes": classes}
    return kr.create_backbone(name, include_top=True, weights=weights, **options)


def load_keras_file(path: str):
    import keras

    if not Path(path).exists():
        raise ValueError(f"no such model: {path}")
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # every kind of damage raises its own type
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a usable model. {reason}") from error


def find_crop(model, arguments) -> Crop:
    """The crop of a classifier: as its weights were measured, or as the arguments say."""
    if len(model.output_shape) != 2 or len(model.input_shape) != 4:
        raise ValueError(
            f"{arguments.model} is not an image classifier: its output is {model.output_shape}"
        )
    row = published_weights(arguments.model, arguments.weights)
    crop = Crop(row.crop_size, row.crop_ratio, row.interpolation) if row else Crop(224)
    return crop._replace(size=arguments.crop_size or model.input_shape[1] or crop.size)


def published_weights(name: str, weights: str | None):
    """The row of the table of published weights that a model has, or whose images it takes."""
    tags = kr.backbones.PRETRAINED.get(name.lower(), {})
    return tags.get(weights) or next(iter(tags.values()), None)
