"""Converts annotated images to the VOC, COCO, YOLO or CSV format.

    keras-resnest convert my_folder for_yolo --format yolo
    keras-resnest convert labels.json parts --format voc --split 0.8 0.1 0.1 --seed 1

SOURCE is a folder or file as for `train`, or tfds:NAME. TARGET, a new folder, receives the images
and their annotations. Splits, class names, difficult objects (crowds in COCO; YOLO has none),
images without objects, and the names of the files stay. What the format cannot hold is refused.
"""

from pathlib import Path

import keras_resnest as kr
from keras_resnest.cli.common import (
    add_reading_arguments,
    fraction,
    reading_options,
    refuse_options,
    writing_results,
)
from keras_resnest.data.readers.detect_format import FORMATS

SPLITS = ("train", "val", "test")


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder or file of annotated images, or tfds:NAME")
    add("target", metavar="TARGET", type=Path, help="folder to create")
    text = f"of TARGET: {', '.join(FORMATS)}"
    options = {"choices": FORMATS, "metavar": "FORMAT", "required": True, "help": text}
    add("--format", dest="target_format", **options)
    text = f"split all images at random into {', '.join(SPLITS)}; default: keep the splits"
    add("--split", type=fraction, nargs="+", metavar="FRACTION", help=text)
    add("--seed", type=int, help="of --split; default: 0")
    add("--link", action="store_true", help="write symbolic links instead of copies of the images")
    add_reading_arguments(parser, "--source-format")


def run(arguments) -> int:
    fractions = arguments.split
    if fractions is None:
        refuse_options(arguments, ["seed"], "with --split")
    if fractions and not (
        len(fractions) in (2, 3) and min(fractions) > 0 and abs(sum(fractions) - 1) < 1e-6
    ):
        raise ValueError(
            f"--split takes 2 or 3 fractions above 0 with the sum 1. Received: {fractions}"
        )
    if fractions and arguments.source.startswith("tfds:"):
        raise ValueError("--split: only for files, TFDS has its own splits")
    parts = kr.data.read_all_splits(arguments.source, **reading_options(arguments))
    if fractions:
        parts = split_at_random(parts, fractions, arguments.seed or 0)
    with writing_results(arguments.target):
        kr.data.write_detection(parts, arguments.target, arguments.target_format, arguments.link)
    for name, part in parts.items():
        print(f"{name}: {part.report}")
    print(f"written to {arguments.target}")
    return 0


def split_at_random(parts: dict, fractions: list[float], seed: int) -> dict:
    """Returns splits of all images, each image once."""
    records = {record.image: record for part in parts.values() for record in part.records}
    rest = next(iter(parts.values())).with_records(list(records.values()))
    splits, left = {}, 1.0
    for name, share in zip(SPLITS, fractions[:-1], strict=False):
        splits[name], rest = rest.hold_out((left - share) / left, seed)
        left -= share
    return {**splits, SPLITS[len(fractions) - 1]: rest}
