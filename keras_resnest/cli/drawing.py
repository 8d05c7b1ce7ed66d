"""Draws detections into images; lines and labels scale with the image.

`kr.visualization.plot_detections` draws figures and takes 20 s for a 12-megapixel photograph.
"""

from pathlib import Path

import numpy as np

from keras_resnest.visualization import class_color

MAX_LABELS = 500  # finding their places takes the square of the time


def unused_path(folder: Path, stem: str, used: set[Path]) -> Path:
    """Returns a PNG path that is not in `used`, and adds it there."""
    number, path = 1, folder / f"{stem}_detections.png"
    while path.resolve() in used:
        number += 1
        path = folder / f"{stem}_detections_{number}.png"
    used.add(path.resolve())
    return path


def draw_detections(pixels: np.ndarray, detections: list[dict]):
    """Returns a Pillow image with boxes, the most confident on top, and the first `MAX_LABELS`."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image, "RGBA")
    unit = max(image.size) / 640
    font = load_font(max(11, round(14 * unit)))
    colors = [tuple(round(255 * c) for c in class_color(d["label"])) for d in detections]
    for detection, color in reversed(list(zip(detections, colors, strict=True))):
        draw_box(canvas, detection["box"], color, max(2, round(3 * unit)))
    placed = []
    for detection, color in list(zip(detections, colors, strict=True))[:MAX_LABELS]:
        text = f"{detection['class_name']} {detection['confidence']:.2f}"
        placed.append(place_label(font.getbbox(text), detection["box"], image.size, placed))
        draw_label(canvas, text, placed[-1], color, font)
    return image


def load_font(size: int):
    """Loads DejaVu Sans, which comes with matplotlib and covers most alphabets."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def draw_box(canvas, box: list[float], color: tuple, line: int) -> None:
    """Draws a colored line with a dark rim, which is visible on any image."""
    x1, y1, x2, y2 = (round(x) for x in box)
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)  # the last column and row in the box
    rim = max(1, line // 3)
    outer = (x1 - rim, y1 - rim, x2 + rim, y2 + rim)
    canvas.rectangle(outer, outline=(0, 0, 0, 110), width=line + 2 * rim)
    canvas.rectangle((x1, y1, x2, y2), outline=color, width=line)


def place_label(text_box, box: list[float], image_size, placed: list[tuple]) -> tuple:
    """Returns (left, top, right, bottom) of a label: at its box, with the least overlap."""
    padding = max(2, round(0.2 * text_box[3]))
    width, height = text_box[2] + 2 * padding, text_box[3] + 2 * padding
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y1)]
    corners += [(x1, y2 - height), (x2 - width, y2 - height), (x2 - width, y2)]
    labels = []
    for x, y in corners:
        x = min(max(0, round(x)), max(0, image_size[0] - width))
        y = min(max(0, round(y)), max(0, image_size[1] - height))
        labels.append((x, y, x + width, y + height))
    return min(labels, key=lambda label: sum(overlap_area(label, other) for other in placed))


def overlap_area(a: tuple, b: tuple) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def draw_label(canvas, text: str, label: tuple, color: tuple, font) -> None:
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = (0, 0, 0) if brightness > 140 else (255, 255, 255)
    canvas.rectangle((label[0], label[1], label[2] - 1, label[3] - 1), fill=(*color, 225))
    middle = ((label[0] + label[2]) / 2, (label[1] + label[3]) / 2)
    canvas.text(middle, text, fill=ink, font=font, anchor="mm")
