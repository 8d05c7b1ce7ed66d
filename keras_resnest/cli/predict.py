"""Finds objects in images, draws them, and writes them as JSON or CSV.

    keras-resnest predict detector.keras photos/ cat.jpg --output found
    keras-resnest predict serving/detector/1 photos/ --confidence 0.5 --format csv --no-images
    keras-resnest predict http://localhost:8501 photos/ --name detector --class-names names.txt
    keras-resnest predict http://localhost:8501 photos/ --grpc localhost:8500

MODEL is a .keras file, a SavedModel folder that was exported, or the address of TensorFlow
Serving's REST interface. Each image gets a line on the screen and a PNG of its own size with the
boxes. EXIF orientation is applied: boxes belong to the upright image.

detections.json   [{"file", "width", "height", "detections": [
                     {"box": [x1, y1, x2, y2], "label", "class_name", "confidence"}]}]
detections.csv    file,width,height,x1,y1,x2,y2,label,class_name,confidence; a row per object

Boxes are in pixels of the image: [0, 0, width, height] is the whole image. Unreadable images are
reported and skipped.
"""

import collections
import csv
import json
import time
from pathlib import Path

from keras_resnest.cli.common import (
    Failure,
    collect_images,
    fraction,
    given_options,
    load_images,
    positive,
)
from keras_resnest.cli.detectors import SIGNATURES, load_detector
from keras_resnest.cli.drawing import ImageWriter

CSV_COLUMNS = ("file", "width", "height", "x1", "y1", "x2", "y2", "label", "class_name")
CSV_COLUMNS += ("confidence",)
SERVER_OPTIONS = ("name", "grpc", "class_names", "box_format")


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file, SavedModel folder, or URL of a server")
    add("images", metavar="IMAGE", nargs="+", help="file, folder of files, or pattern")
    add("--confidence", type=fraction, default=0.3, help="lowest, 0 to 1; default: %(default)s")
    add("--batch-size", type=positive(), default=8, help="images at a time; default: %(default)s")
    add("--output", type=Path, default=Path("detections"), help="folder; default: %(default)s")
    add("--format", choices=("json", "csv", "both"), default="json", help="default: %(default)s")
    add("--no-images", action="store_true", help="draw nothing")
    add(
        "--signature",
        choices=SIGNATURES,
        help="of a SavedModel or server. serve_bytes: encoded images (default of a server); "
        "serving_default: pixels in the size of the model (default of a SavedModel)",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--name", help="of the model; default: detector")
    server.add_argument("--grpc", metavar="HOST:PORT", help="predict over gRPC instead of REST")
    server.add_argument("--class-names", type=Path, metavar="FILE", help="one name per line")
    server.add_argument("--box-format", help="bounding_box_format of the model; default: xyxy")


def run(arguments) -> int:
    is_server = "://" in arguments.model
    if not is_server and (wrong := given_options(arguments, SERVER_OPTIONS)):
        raise ValueError(f"{', '.join(wrong)} of a server, but MODEL is not an address")
    if not is_server and not Path(arguments.model).exists():
        raise ValueError(f"no such model: {arguments.model}")
    paths = collect_images(arguments.images)
    detect = load_detector(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records = []
    writer = None if arguments.no_images else ImageWriter(arguments.output, paths)
    for readable, images in load_images(paths, arguments.batch_size):
        found = detect(readable, images, arguments.confidence)
        for path, image, detections in zip(readable, images, found, strict=True):
            records.append(make_record(path, image, detections))
            print_record(records[-1], writer and writer.write(path, image, records[-1]))
    if not records:
        raise Failure(f"none of the {len(paths)} images could be read")
    if arguments.format in ("json", "both"):
        write_json(records, arguments.output / "detections.json")
    if arguments.format in ("csv", "both"):
        write_csv(records, arguments.output / "detections.csv")
    print_summary(records, len(paths), time.perf_counter() - start, arguments.output)
    return 0


def make_record(path: Path, image, detections: dict) -> dict:
    """The detections of one image, ready for JSON."""
    columns = ("boxes", "labels", "class_names", "confidence")
    return {
        "file": str(path),
        "width": image.shape[1],
        "height": image.shape[0],
        "detections": [
            {
                "box": [round(float(x), 2) for x in box],
                "label": int(label),
                "class_name": class_name,
                "confidence": round(float(confidence), 4),
            }
            for box, label, class_name, confidence in zip(
                *(detections[name] for name in columns), strict=True
            )
        ],
    }


def print_record(record: dict, drawn: Path | None) -> None:
    counts = collections.Counter(d["class_name"] for d in record["detections"])
    objects = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing found"
    print(f"{record['file']}: {objects}" + (f" -> {drawn}" if drawn else ""))


def print_summary(records: list[dict], num_images: int, seconds: float, output: Path) -> None:
    objects = sum(len(record["detections"]) for record in records)
    skipped = num_images - len(records)
    print(
        f"{len(records)} images, {objects} objects{f', {skipped} skipped' if skipped else ''}, "
        f"{seconds / len(records):.2f} s per image, written to {output}"
    )


def write_json(records: list[dict], path: Path) -> None:
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")  # an image per line


def write_csv(records: list[dict], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(CSV_COLUMNS)
        for r in records:
            for d in r["detections"]:
                image = (r["file"], r["width"], r["height"])
                table.writerow((*image, *d["box"], d["label"], d["class_name"], d["confidence"]))
