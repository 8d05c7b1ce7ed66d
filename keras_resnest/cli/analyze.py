"""Shows where a detector is wrong, what that costs, and which labels look wrong.

    keras-resnest analyze runs/train/detector.keras my_folder
    keras-resnest analyze detector.keras my_folder --split val --confidence 0.5 --output report
    keras-resnest predict detector.keras photo.jpg --confidence runs/analyze/thresholds.json

Writes to OUTPUT: report.html, one page for any browser, with AP by class and size, the kinds of
error and what they cost, confusion matrix, precision and recall over confidence, calibration, the
worst images and suspicious labels; the same numbers in report.json; and in thresholds.json the best
confidence of each class for `predict` and `export`. DATA is as for `train`.
"""

import json
from pathlib import Path

import keras_resnest as kr
from keras_resnest.atomic import atomic_file
from keras_resnest.cli.common import (
    add_reading_arguments,
    check_output,
    confidence,
    open_detector,
    writing_results,
)
from keras_resnest.cli.evaluate import read_test_set


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file or preset of a detector")
    add("data", metavar="DATA", help="folder or file of annotated images, or tfds:NAME")
    add("--split", help="default: test or val, else all images")
    add_reading_arguments(parser)
    text = "of the confusion matrix and the examples; default: the best of each class"
    add("--confidence", type=confidence, metavar="NUMBER|FILE", help=text)
    add("--output", type=Path, default=Path("runs/analyze"), help="folder; default: %(default)s")


def run(arguments) -> int:
    check_output(arguments.output)
    model = open_detector(arguments.model)
    dataset = read_test_set(model, arguments)
    report = kr.evaluation.analyze(
        model, dataset, dataset.class_names, confidence_threshold=arguments.confidence
    )
    output = arguments.output
    with writing_results(output):
        output.mkdir(parents=True, exist_ok=True)
        report.to_json(output / "report.json")
        with atomic_file(output / "thresholds.json") as file:
            file.write_text(json.dumps(report.best_thresholds, indent=1, ensure_ascii=False))
        report.to_html(output / "report.html", f"{Path(arguments.model).name} on {arguments.data}")
    print(f"{report}\nreport.html, report.json and thresholds.json are in {output}")
    return 0
