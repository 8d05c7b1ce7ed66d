"""Lists networks, detectors or training recipes.

    keras-resnest list
    keras-resnest list "resnest50*" resnet50 regnety_016
    keras-resnest list --kind detectors

The table of networks shows parameters, GFLOPs, published ImageNet accuracy, weights and licenses;
that of detectors, the authors' weights: data, published mAP, file, where it is and its license.
"""

import fnmatch

import keras_resnest as kr
from keras_resnest.backbones.zoo import ModelTable

KINDS = ("networks", "detectors", "recipes")


def add_arguments(parser, argv) -> None:
    parser.add_argument("names", nargs="*", default=["*"], metavar="NAME", help="name or pattern")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="default: %(default)s")


def run(arguments) -> int:
    kind = arguments.kind
    if kind == "networks":
        rows = {model.name: model for model in kr.list_models()}
    elif kind == "detectors":
        rows = {
            name: f"{row.backbone:16} {row.side} x {row.side}"
            for name, row in kr.builders.BUILDERS.items()
        }
    else:
        rows = {name: recipe.source for name, recipe in kr.recipes.RECIPES.items()}
    found = {}
    for pattern in arguments.names:
        matches = fnmatch.filter(rows, pattern.lower())
        if not matches:
            raise ValueError(f"no {kind[:-1]} matches {pattern!r}")
        found |= {name: rows[name] for name in matches}
    if kind == "networks":
        print(ModelTable(found.values()))
    else:
        print("\n".join(f"{name:32} {row}" for name, row in found.items()))
    files = kr.list_models(kind="detector") if kind == "detectors" else []
    if files := [file for file in files if file.name in found]:
        print(f"\n{ModelTable(files)}")
    return 0
