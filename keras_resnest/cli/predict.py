"""Detects objects in images or a video, draws them, and writes them as JSON or CSV.

    keras-resnest predict detector.keras photos/ cat.jpg --output found
    keras-resnest predict detector.keras satellite.png --tiles 320 320
    keras-resnest predict serving/detector/1 photos/ --confidence 0.5 --format csv --no-images
    keras-resnest predict detector.keras photos/ --save-annotations coco
    keras-resnest predict detector.keras traffic.mp4 --every 2 --track
    keras-resnest predict detector.keras rtsp://camera.local/stream --no-images
    keras-resnest predict http://localhost:8501 photos/ --name detector --class-names names.txt
    keras-resnest predict http://localhost:8501 photos/ --grpc localhost:8500
    keras-resnest predict http://localhost:8000 photos/ --protocol kserve

MODEL is a .keras file, a preset (a folder or hf://user/name), an exported SavedModel folder, or the
URL of the REST interface of TensorFlow Serving or, with --protocol kserve, of Triton or OpenVINO
Model Server. For each image, the command prints a line and writes a PNG with the boxes. EXIF
orientation is applied: boxes refer to the upright image.

detections.json   [{"file", "width", "height", "detections": [
                     {"box": [x1, y1, x2, y2], "label", "class_name", "confidence"}]}]
detections.csv    file,width,height,x1,y1,x2,y2,label,class_name,confidence; one row per object

annotations/      with --save-annotations, the images with the detections as a dataset, a start for
                  annotating in CVAT (coco), Label Studio (yolo) or LabelImg (voc)

VIDEO_detections.jsonl  {"frame", "seconds", "width", "height", "detections"}; one line per frame;
                        with --track, each detection has a "track" from its second frame on
VIDEO_detections.mp4    the video with boxes

Boxes are in pixels: [0, 0, width, height] is the whole image. Unreadable images are reported and
skipped; corrupt frames are skipped and counted. A camera or stream ends with Ctrl-C; what comes
faster than it is processed is dropped. Video needs `pip install "keras_resnest[video]"`, and
--track "keras_resnest[track]".
"""

import collections
import csv
import json
import time
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.atomic import atomic_file
from keras_resnest.backbones.presets import is_preset
from keras_resnest.cli.common import (
    Failure,
    add_tile_arguments,
    check_output,
    collect_images,
    confidence,
    load_images,
    positive,
    printable,
    refuse_options,
    writing_results,
)
from keras_resnest.cli.detectors import SIGNATURES, detection_rows, load_detector
from keras_resnest.cli.drawing import draw_detections, unused_path
from keras_resnest.cli.video import VideoReader, is_video, predict_video
from keras_resnest.data.dataset import usable_boxes
from keras_resnest.data.readers.detect_format import FORMATS

VIDEO_OPTIONS = ("every", "track")
SERVER_OPTIONS = ("name", "protocol", "grpc", "class_names", "box_format")


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file, preset, SavedModel folder, or URL of a server")
    text = "file, folder or pattern; or a video: file, URL, camera or camera:DEVICE"
    add("images", metavar="IMAGE", nargs="+", help=text)
    text = "lowest of the detections, or the thresholds.json of `analyze`; default: %(default)s"
    add("--confidence", type=confidence, default=0.3, metavar="NUMBER|FILE", help=text)
    add("--batch-size", type=positive(), default=8, help="images at a time; default: %(default)s")
    add("--output", type=Path, default=Path("detections"), help="folder; default: %(default)s")
    add("--format", choices=("json", "csv", "both"), default="json", help="default: %(default)s")
    add("--no-images", action="store_true", help="draw nothing")
    add("--save-annotations", choices=FORMATS, help="write OUTPUT/annotations, a new folder")
    text = "serve_bytes: send encoded images (default for servers); serving_default: send pixels, "
    add("--signature", choices=SIGNATURES, help=f"{text}resized (default for SavedModels)")
    add_tile_arguments(parser)
    video = parser.add_argument_group("video")
    video.add_argument("--every", type=positive(), metavar="N", help="only each N-th frame")
    video.add_argument("--track", action="store_true", help="number the objects (ByteTrack)")
    server = parser.add_argument_group("server")
    server.add_argument("--name", help="model name; default: detector")
    protocols = ("tensorflow", "kserve")
    server.add_argument("--protocol", choices=protocols, help="of the URL; default: tensorflow")
    server.add_argument("--grpc", metavar="HOST:PORT", help="use gRPC instead of REST")
    server.add_argument("--class-names", type=Path, metavar="FILE", help="one name per line")
    server.add_argument("--box-format", help="bounding_box_format of the model; default: xyxy")


def run(arguments) -> int:
    check_output(arguments.output)
    if is_preset(arguments.model) or "://" not in arguments.model:
        refuse_options(arguments, SERVER_OPTIONS, "for servers")
        if not (is_preset(arguments.model) or Path(arguments.model).exists()):
            raise ValueError(f"no such model: {arguments.model}")
    if arguments.save_annotations and (arguments.output / "annotations").exists():
        raise ValueError(f"--save-annotations: {arguments.output / 'annotations'} exists")
    if any(map(is_video, arguments.images)):
        return run_video(arguments)
    refuse_options(arguments, VIDEO_OPTIONS, "for videos")
    paths = collect_images(arguments.images)
    detect = load_detector(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with writing_results(arguments.output):
        records = detect_and_write(detect, paths, arguments)
    objects = sum(len(record["detections"]) for record in records)
    skipped = f", {len(paths) - len(records)} skipped" if len(records) < len(paths) else ""
    seconds = time.perf_counter() - start
    print(
        f"{len(records)} images, {objects} objects{skipped}, in {seconds:.1f} s, "
        f"written to {arguments.output}"
    )
    return 0


def run_video(arguments) -> int:
    name, *others = arguments.images
    if others:
        raise ValueError(f"a video comes alone. Received: {', '.join(arguments.images)}")
    refuse_options(arguments, ("save_annotations",), "for images")
    if arguments.format != "json":
        raise ValueError("--format: only JSON lines are written for a video")
    reader = VideoReader(name, arguments.every or 1)
    detect = load_detector(arguments)
    with writing_results(arguments.output):
        arguments.output.mkdir(parents=True, exist_ok=True)
        predict_video(detect, reader, arguments)
    return 0


def detect_and_write(detect, paths: list[Path], arguments) -> list[dict]:
    """Returns the records of all readable images, and writes images and tables."""
    records, used = [], {path.resolve() for path in paths}
    for readable, images in load_images(paths, arguments.batch_size):
        found = detect(readable, images, arguments.confidence)
        for path, image, detections in zip(readable, images, found, strict=True):
            records.append(record := make_record(path, image, detections))
            counts = collections.Counter(d["class_name"] for d in record["detections"])
            text = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing found"
            if not arguments.no_images:
                target = unused_path(arguments.output, path.stem, used)
                draw_detections(image, record["detections"]).save(target, compress_level=3)
                text += f" -> {target}"
            print(printable(f"{path}: {text}"))
    if not records:
        raise Failure(f"none of the {len(paths)} images could be read")
    if arguments.format in ("json", "both"):
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        with atomic_file(arguments.output / "detections.json") as file:
            file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if arguments.format in ("csv", "both"):
        with atomic_file(arguments.output / "detections.csv") as file:
            write_csv(records, file)
    if arguments.save_annotations:
        dataset = make_dataset(records, getattr(detect, "class_names", None))
        kr.data.write_detection(
            dataset, arguments.output / "annotations", arguments.save_annotations
        )
    return records


def make_record(path: Path, image, detections: dict) -> dict:
    height, width = image.shape[:2]
    rows = detection_rows(detections)
    return {"file": str(path), "width": width, "height": height, "detections": rows}


def make_dataset(records: list[dict], class_names: list[str] | None):
    """Returns the records as annotated images, without boxes outside of them."""
    highest = max((d["label"] for record in records for d in record["detections"]), default=0)
    found = []
    for record in records:
        boxes = np.reshape([d["box"] for d in record["detections"]], (-1, 4)).astype("float32")
        boxes, verdicts = usable_boxes(boxes, record["width"], record["height"])
        keep = np.isin(verdicts, ("", "clipped"))
        labels = np.array([d["label"] for d in record["detections"]], int)
        path = record["file"]
        found.append(kr.data.ImageRecord(path, path, boxes[keep], labels[keep]))
    return kr.data.DetectionDataset(found, class_names or [str(i) for i in range(highest + 1)])


def write_csv(records: list[dict], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write("file,width,height,x1,y1,x2,y2,label,class_name,confidence\r\n")
        table = csv.writer(file)
        for r in records:
            for d in r["detections"]:
                image = (r["file"], r["width"], r["height"])
                table.writerow((*image, *d["box"], d["label"], d["class_name"], d["confidence"]))
