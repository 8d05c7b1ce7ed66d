"""Finds objects in images, draws them, and writes them down as JSON or CSV.

    python examples/predict.py detector.keras photos/ cat.jpg --output found
    python examples/predict.py serving/1 photos/ --confidence 0.5 --format csv --no-images

MODEL is a file written by `model.save`, or a SavedModel folder written by `model.export`.
Every image gets a line on the screen and, in the output folder, a PNG of its own size
with the boxes. EXIF orientation is respected: boxes belong to the upright image.

detections.json   [{"file", "width", "height", "detections": [
                     {"box": [x1, y1, x2, y2], "label", "class_name", "confidence"}]}]
detections.csv    file,width,height,x1,y1,x2,y2,label,class_name,confidence; a row per object

Boxes are in pixels of the image: [0, 0, width, height] is all of it. An image that
cannot be read is named, and the others are done.

Exit status: 0 if at least one image worked, 1 if none did, 2 if the command is wrong.
"""

import argparse
import collections
import csv
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # fewer messages of TensorFlow

# Keras and TensorFlow are imported where they are used: --help and errors come at once.

CSV_COLUMNS = ("file", "width", "height", "x1", "y1", "x2", "y2", "label", "class_name")


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        if not arguments.model.exists():
            raise ValueError(f"no such model: {arguments.model}")
        paths = collect_images(arguments.images)
        detect = load_detector(arguments.model)
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    start = time.perf_counter()
    records = []
    writer = None if arguments.no_images else ImageWriter(arguments.output, paths)
    for first in range(0, len(paths), arguments.batch_size):
        readable, images = read_images(paths[first : first + arguments.batch_size])
        found = detect(images, arguments.confidence) if images else []
        for path, image, detections in zip(readable, images, found, strict=True):
            records.append(make_record(path, image, detections))
            report(records[-1], writer and writer.write(path, image, records[-1]))
    return finish(arguments, records, len(paths), time.perf_counter() - start)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help=".keras file or SavedModel")
    add_image_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("detections"), help="folder; default: %(default)s"
    )
    parser.add_argument("--format", choices=("json", "csv", "both"), default="json")
    parser.add_argument("--no-images", action="store_true", help="draw nothing")
    return parser.parse_args(argv)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """What this program and serve_client.py have in common."""
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", type=Path, help="file, or folder of files"
    )
    parser.add_argument(
        "--confidence", type=_fraction, default=0.3, help="lowest, 0 to 1; default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=8, help="images at a time; default: %(default)s"
    )


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


# === Images ===


def collect_images(arguments: list[Path]) -> list[Path]:
    """The files, and the images of the folders, each once."""
    from keras_resnest.images import find_images

    paths = []
    for path in arguments:
        paths += find_images(path) if path.is_dir() else [path]
    return list(dict.fromkeys(paths))


def read_images(paths: list[Path]) -> tuple[list[Path], list[np.ndarray]]:
    """The readable ones of the paths and their upright RGB pixels; the others are reported."""
    from keras_resnest.images import load_image

    readable, pictures = [], []
    for path in paths:
        try:
            pictures.append(load_image(path))
            readable.append(path)
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return readable, pictures


# === Models ===


def load_detector(path: Path):
    """A function `(images, confidence) -> list of detections` with "xyxy" boxes in pixels."""
    try:
        return SavedModelDetector(path) if path.is_dir() else KerasDetector(path)
    except Exception as error:  # each file format fails in its own ways
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a usable model. {reason}") from error


class KerasDetector:
    """A detector from a `.keras` file."""

    def __init__(self, path: Path):
        import keras

        import keras_resnest

        self.model = keras.saving.load_model(path, compile=False)
        if not isinstance(self.model, keras_resnest.RefineDet):
            raise ValueError(f"It holds a {type(self.model).__name__}, not a RefineDet")

    def __call__(self, images: list[np.ndarray], confidence: float) -> list[dict]:
        found = self.model.detect(images, confidence, batch_size=len(images))
        for image, detections in zip(images, found, strict=True):
            detections["boxes"] = to_corners(
                detections["boxes"], self.model.bounding_box_format, *image.shape[:2]
            )
        return found


class SavedModelDetector:
    """A detector from a folder that `model.export` has written.

    `serving_default` is used rather than `serve_bytes`, because the images are decoded
    here anyway, and because TensorFlow does not know EXIF orientation.
    """

    def __init__(self, folder: Path):
        import tensorflow as tf

        self.loaded = tf.saved_model.load(str(folder))  # its variables live as long as this
        self.signature = self.loaded.signatures["serving_default"]
        inputs = self.signature.structured_input_signature[1]
        outputs = set(self.signature.structured_outputs)
        if set(inputs) != {"images"} or not {"boxes", "confidence", "labels"} <= outputs:
            raise ValueError("Its serving_default is not that of a detector of keras_resnest")
        self.height, self.width = inputs["images"].shape[1:3]
        self.box_format, self.class_names = read_extra_assets(folder)

    def __call__(self, pictures: list[np.ndarray], confidence: float) -> list[dict]:
        from keras_resnest.images import resize_image

        resized = [resize_image(image, self.height, self.width) for image in pictures]
        found = {k: v.numpy() for k, v in self.signature(images=np.stack(resized)).items()}
        found["boxes"] = to_corners(found["boxes"], self.box_format, self.height, self.width)
        results = []
        for i, image in enumerate(pictures):
            detections = select({k: v[i] for k, v in found.items()}, confidence, self.class_names)
            detections["boxes"] = stretch(detections["boxes"], image, self.height, self.width)
            results.append(detections)
        return results


def read_extra_assets(folder: Path) -> tuple[str, list[str] | None]:
    """Box format and names of the classes, which an export keeps beside the model."""
    facts, names = folder / "assets.extra/model.json", folder / "assets.extra/class_names.txt"
    box_format = json.loads(facts.read_text("utf-8"))["bounding_box_format"]
    return box_format, names.read_text("utf-8").splitlines() if names.exists() else None


def to_corners(boxes, bounding_box_format: str, height: int, width: int) -> np.ndarray:
    """Boxes as "xyxy" pixels of an image of this size."""
    from keras_resnest.boxes.formats import convert_boxes

    return np.array(convert_boxes(boxes, bounding_box_format, "xyxy", height, width))


def stretch(boxes, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """ "xyxy" boxes from pixels of a resized image to those of the image itself."""
    return boxes * np.array([image.shape[1] / width, image.shape[0] / height] * 2)


def select(detections: dict, confidence: float, class_names: list[str] | None) -> dict:
    """One image's detections without padding and doubtful ones, with names of classes."""
    keep = (detections["labels"] >= 0) & (detections["confidence"] >= confidence)
    chosen = {name: detections[name][keep] for name in ("boxes", "confidence", "labels")}
    names = [class_names[label] if class_names else str(label) for label in chosen["labels"]]
    return {**chosen, "class_names": names}


# === Results ===


def make_record(path: Path, image: np.ndarray, detections: dict) -> dict:
    """What is known of one image, ready for JSON."""
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


def report(record: dict, drawn: Path | None) -> None:
    """One line on the screen."""
    counts = collections.Counter(d["class_name"] for d in record["detections"])
    objects = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing found"
    print(f"{record['file']}: {objects}" + (f" -> {drawn}" if drawn else ""))


def finish(arguments, records: list[dict], num_images: int, seconds: float) -> int:
    """Writes the tables and says how it went; the exit status."""
    failed = num_images - len(records)
    if not records:
        print(f"error: none of the {num_images} images could be read", file=sys.stderr)
        return 1
    if arguments.format in ("json", "both"):
        write_json(records, arguments.output / "detections.json")
    if arguments.format in ("csv", "both"):
        write_csv(records, arguments.output / "detections.csv")
    objects = sum(len(record["detections"]) for record in records)
    skipped = f", {failed} skipped" if failed else ""
    print(
        f"{len(records)} images, {objects} objects{skipped}, "
        f"{seconds / len(records):.2f} s per image, written to {arguments.output}"
    )
    return 0


def write_json(records: list[dict], path: Path) -> None:
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")  # an image per line


def write_csv(records: list[dict], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((*CSV_COLUMNS, "confidence"))
        for r in records:
            for d in r["detections"]:
                head = (r["file"], r["width"], r["height"], *d["box"])
                table.writerow((*head, d["label"], d["class_name"], d["confidence"]))


class ImageWriter:
    """Writes images with boxes as PNG, and never over another image."""

    def __init__(self, folder: Path, inputs: list[Path]):
        self.folder = folder
        self.taken = {path.resolve() for path in inputs}

    def write(self, path: Path, image: np.ndarray, record: dict) -> Path:
        number, target = 1, self.folder / f"{path.stem}_detections.png"
        while target.resolve() in self.taken:
            number += 1
            target = self.folder / f"{path.stem}_detections_{number}.png"
        self.taken.add(target.resolve())
        draw_detections(image, record["detections"]).save(target, compress_level=3)
        return target


# === Drawing ===


def draw_detections(picture: np.ndarray, detections: list[dict]):
    """A Pillow image of the image with boxes and labels, whose size follows the image's."""
    from PIL import Image, ImageDraw

    from keras_resnest.visualization import class_color

    image = Image.fromarray(picture)
    canvas = ImageDraw.Draw(image, "RGBA")
    unit = max(image.size) / 640
    line = max(2, round(3 * unit))
    font = load_font(max(11, round(14 * unit)))
    colors = [tuple(round(255 * c) for c in class_color(d["label"])) for d in detections]
    for detection, color in reversed(list(zip(detections, colors, strict=True))):
        draw_box(canvas, detection["box"], color, line)
    placed = []
    for detection, color in zip(detections, colors, strict=True):  # the most confident first
        text = f"{detection['class_name']} {detection['confidence']:.2f}"
        placed.append(place_label(font.getbbox(text), detection["box"], image.size, placed))
        draw_label(canvas, text, placed[-1], color, font)
    return image


def load_font(size: int):
    """DejaVu Sans, which matplotlib brings along: it has most alphabets."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def draw_box(canvas, box: list[float], color: tuple, line: int) -> None:
    """A colored line with a dark rim, which shows on any image."""
    x1, y1, x2, y2 = (round(x) for x in box)
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)  # the last column and row inside
    rim = max(1, line // 3)
    outer = (x1 - rim, y1 - rim, x2 + rim, y2 + rim)
    canvas.rectangle(outer, outline=(0, 0, 0, 110), width=line + 2 * rim)
    canvas.rectangle((x1, y1, x2, y2), outline=color, width=line)


def place_label(text_box, box: list[float], image_size, placed: list[tuple]) -> tuple:
    """(left, top, right, bottom) of a label: at the box, inside the image, on no other label."""
    padding = max(2, round(0.2 * text_box[3]))
    width, height = text_box[2] + 2 * padding, text_box[3] + 2 * padding
    x1, y1, x2, y2 = box
    spots = [(x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y1)]
    spots += [(x1, y2 - height), (x2 - width, y2 - height), (x2 - width, y2)]
    labels = []
    for x, y in spots:
        x = min(max(0, round(x)), max(0, image_size[0] - width))
        y = min(max(0, round(y)), max(0, image_size[1] - height))
        labels.append((x, y, x + width, y + height))
    return min(labels, key=lambda label: sum(_overlap(label, other) for other in placed))


def _overlap(a: tuple, b: tuple) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def draw_label(canvas, text: str, label: tuple, color: tuple, font) -> None:
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = (0, 0, 0) if brightness > 140 else (255, 255, 255)
    canvas.rectangle((label[0], label[1], label[2] - 1, label[3] - 1), fill=(*color, 225))
    # The anchor "mm" is the middle of the text.
    middle = ((label[0] + label[2]) / 2, (label[1] + label[3]) / 2)
    canvas.text(middle, text, fill=ink, font=font, anchor="mm")


if __name__ == "__main__":
    sys.exit(main())
