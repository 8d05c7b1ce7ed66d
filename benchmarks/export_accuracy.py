"""Measures the accuracy of exports: mAP of a trained detector in every format and precision.

    keras-resnest train bccd --epochs 30 --output runs/bccd
    python benchmarks/export_accuracy.py runs/bccd/detector.keras --data bccd

Each export runs in its own runtime over the test split, one image at a time. int8 is calibrated on
images of the training split. `pip install "keras_resnest[export]"` installs the runtimes.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Format, precision, suffix, whether the graph decodes boxes.
EXPORTS = (
    ("tf_saved_model", "float32", "", True),
    ("tf_saved_model", "bfloat16", "", True),
    ("onnx", "float32", ".onnx", True),
    ("onnx", "float16", ".onnx", True),
    ("onnx", "int8", ".onnx", True),
    ("openvino", "float32", ".xml", True),
    ("openvino", "float16", ".xml", True),
    ("openvino", "int8", ".xml", False),
    ("litert", "float32", ".tflite", True),
    ("litert", "float16", ".tflite", True),
    ("litert", "int8", ".tflite", False),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .keras file of a RefineDet")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="annotated images")
    parser.add_argument("--split", default="test", help="split to evaluate (%(default)s)")
    parser.add_argument(
        "--train-split", default="train", help="split for int8 calibration (%(default)s)"
    )
    parser.add_argument(
        "--max-images", type=int, metavar="N", help="evaluate only the first N images"
    )
    parser.add_argument(
        "--calibration", type=int, default=50, help="images for int8 calibration (%(default)s)"
    )
    parser.add_argument("--formats", nargs="+", choices=sorted({e[0] for e in EXPORTS}))
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import keras

    import keras_resnest  # registers its classes  # noqa: F401

    model = keras.saving.load_model(arguments.model)
    batches = read_split(model, arguments.data, arguments.split, arguments.max_images)
    calibration = read_split(model, arguments.data, arguments.train_split, arguments.calibration)
    calibration = np.concatenate([images for images, _ in calibration])
    print("| format | precision | mAP@0.5 | mAP@[.5:.95] | one image | file |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [measure("Keras", "float32", model.predict_on_batch, model, batches, None)]
    with tempfile.TemporaryDirectory() as folder:
        for format, precision, suffix, decode in EXPORTS:
            if arguments.formats and format not in arguments.formats:
                continue
            path = Path(folder) / f"{format}_{precision}{suffix}"
            options = {} if format == "tf_saved_model" else {"decode": decode}
            if precision == "int8":
                options["representative_images"] = calibration
            model.export(path, format=format, precision=precision, **options)
            run = RUNTIMES[format](path)
            if not decode:
                run = then_decoded(run, path)
            rows.append(measure(format, precision, run, model, batches, path))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_split(model, data, split, max_images) -> list:
    """Returns batches of one resized image and its ground truth."""
    import keras_resnest as kr

    dataset = kr.data.read_detection(data, split, model.class_names)
    batches = kr.data.evaluation_batches(dataset, model.image_shape, 1)
    return [
        (np.asarray(batch["images"], "float32"), batch["bounding_boxes"])
        for batch in itertools.islice(batches, max_images)
    ]


class TimedDetector:
    """A detector as `collect_detections` expects it, which records the time of each call."""

    def __init__(self, run, bounding_box_format: str):
        self.run, self.bounding_box_format, self.seconds = run, bounding_box_format, []

    def predict_on_batch(self, images) -> dict:
        start = time.perf_counter()
        found = self.run(images)
        self.seconds.append(time.perf_counter() - start)
        return {name: np.asarray(value) for name, value in found.items()}


def measure(name, precision, run, model, batches, path) -> dict:
    """Measures accuracy, median time of one image and file size of an export; prints its row."""
    import keras_resnest as kr

    run(batches[0][0])  # warm-up
    detector = TimedDetector(run, model.bounding_box_format)
    pair = kr.evaluation.collect_detections(detector, batches)
    voc = kr.evaluation.voc_average_precision(*pair, model.class_names)
    coco = kr.evaluation.coco_average_precision(*pair, model.class_names)
    row = {
        "format": name,
        "precision": precision,
        "mAP50": float(voc.mAP),
        "mAP": float(coco.metrics["AP"]),
        "ms": 1e3 * float(np.median(detector.seconds)),
        "MB": 0.0 if path is None else size_of(path) / 1e6,
    }
    print(
        f"| {name} | {precision} | {row['mAP50']:.4f} | {row['mAP']:.4f} | "
        f"{row['ms']:.1f} ms | {row['MB']:.1f} MB |",
        flush=True,
    )
    return row


def size_of(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


# === Runtimes: functions of images that return a dictionary of arrays ===


def tensorflow_runtime(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]

    def run(images):
        _ = loaded  # keeps it alive
        return {k: v.numpy() for k, v in signature(images=tf.constant(images)).items()}

    return run


def onnx_runtime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def openvino_runtime(path):
    import openvino

    network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: {k.get_any_name(): v for k, v in network(images).items()}


def litert_runtime(path):
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=os.cpu_count()).get_signature_runner()
    return lambda images: runner(images=images)


def then_decoded(run, path):
    from keras_resnest.serving import NumpyDetectionDecoder

    decoder = NumpyDetectionDecoder.from_files(f"{path}.json")
    return lambda images: decoder(run(images))


RUNTIMES = {
    "tf_saved_model": tensorflow_runtime,
    "onnx": onnx_runtime,
    "openvino": openvino_runtime,
    "litert": litert_runtime,
}

if __name__ == "__main__":
    main()
