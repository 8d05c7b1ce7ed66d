"""Measures every network and writes `figures.py`, `docs/zoo.md` and the table of the README."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import keras

import keras_resnest as kr
from keras_resnest.backbones import figures, zoo

ROOT = Path(__file__).resolve().parents[1]
IN_README = "resnest[0-9]*"
MARKS = ("<!-- zoo:start -->\n", "<!-- zoo:end -->")
INTRODUCTION = """# Networks

Parameters are trainable parameters. GFLOPs are billions of multiply-adds for one image of the
given size. Top-1 is the ImageNet accuracy published with the first of the weights, which
`weights="imagenet"` selects. `docs/generate_zoo.py` writes this table.

"""
DETECTORS = """
## Detectors of the RefineDet authors

The files are not downloaded: the authors have them on Google Drive, one archive each.
[How to load them](detector.md#weights-of-the-authors). mAP is the published one for one image size,
at IoU 0.5 for VOC and 0.5 to 0.95 for COCO.

"""


def figures_of(name: str) -> tuple[int, float]:
    size = zoo.crop_size(name)
    model = kr.create_backbone(name, input_shape=(size, size, 3))
    figures = zoo.count_parameters(model), zoo.count_multiply_adds(model, (size, size, 3)) / 1e9
    keras.backend.clear_session()
    return figures


def write_figures() -> None:
    rows = []
    for name in kr.backbones.VARIANTS:
        parameters, gflops = figures_of(name)
        print(f"{name}: {parameters:,} parameters, {gflops:.3f} GFLOPs", flush=True)
        rows.append(f'    "{name}": ({parameters}, {gflops:.4f}),\n')
    docstring = f'"""{figures.__doc__}"""\n\n'
    table = "# (trainable parameters, billions of multiply-adds at the crop size)\n"
    table += f"FIGURES: dict[str, tuple[int, float]] = {{\n{''.join(rows)}}}\n"
    Path(figures.__file__).write_text(docstring + table)


def tables() -> tuple[str, str]:
    """Returns the text of `docs/zoo.md` and the table of the README."""
    whole = f"{INTRODUCTION}{zoo.list_models()}\n{DETECTORS}{zoo.list_models(kind='detector')}\n"
    return whole, f"{zoo.list_models(IN_README)}\n"


def write_tables() -> None:
    whole, part = tables()
    (ROOT / "docs" / "zoo.md").write_text(whole)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    readme.write_text(before + MARKS[0] + part + MARKS[1] + rest.split(MARKS[1])[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables-only", action="store_true", help="do not build the networks")
    if not parser.parse_args().tables_only:
        write_figures()
        importlib.reload(figures)
        importlib.reload(zoo)
        subprocess.run([sys.executable, "-m", "ruff", "format", "-q", figures.__file__], check=True)
    write_tables()


if __name__ == "__main__":
    main()
