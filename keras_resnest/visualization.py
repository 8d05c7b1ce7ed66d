"""Plots images with boxes, training history and the numbers of evaluation with Matplotlib.

`explain` returns the heat map of a detection. Every `plot_` function returns a
`matplotlib.figure.Figure` that pyplot does not manage: notebooks show it as the last value of a
cell, `path=` writes it to a file, and no display is needed.
"""

import colorsys
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.formats import check_box_format, clip_boxes, convert_boxes
from keras_resnest.boxes.overlap import pairwise_iou
from keras_resnest.checks import (
    check_box_dictionary,
    check_counts,
    check_fractions,
    checked,
    unpack_batch,
    value_errors,
)
from keras_resnest.images import load_image, resize_image

DPI = 100  # pixels of the figure per inch; 1 point is DPI / 72 pixels
GAP = 10  # pixels between the images of a grid
MAX_LABELS = 40  # per image; more would hide it
LABEL_PADDING = 0.2  # around the text of a label, in font sizes
TITLE_HEIGHT = 24  # pixels above an image with a title
FOOTER_HEIGHT = 22  # pixels below the images, for the legend

# Saturated, well separated colors, visible on light and dark images.
COLORS = bytes.fromhex(
    "e6194b 1f77ff 18b24b ff9f00 b13ee6 00c8d7 f25cc8 8a5a2b c6e000 3a3aa8"
    "ff6f61 00806b 20f020 733359 1010ff 006699 e8c34a 597300 00ffcc ff2600"
)

LEGEND = {"fontsize": 8, "edgecolor": "none", "framealpha": 0.8, "loc": "best"}

LOSSES = (
    *("loss", "arm_box_loss", "arm_classification_loss"),
    *("odm_box_loss", "odm_classification_loss"),
)
CLASS_CURVES = ("precision", "recall", "f1")
MAX_POINTS = 150  # of a curve

CURVES = (*LOSSES, "odm_iou_loss")  # the last only if the network predicts the IoU


@checked
def class_color(label: int) -> tuple[float, float, float]:
    """Returns the color of a class in all plots: red, green, blue in 0..1."""
    if 3 * label < len(COLORS):
        return tuple(value / 255 for value in COLORS[3 * label : 3 * label + 3])
    # Steps of the golden ratio spread any number of hues; alternating saturation and brightness
    # tell similar hues apart.
    step = label - len(COLORS) // 3
    hue = (0.05 + 0.6180339887 * step) % 1.0
    return colorsys.hsv_to_rgb(hue, (0.95, 0.55, 0.8)[step % 3], (0.95, 0.95, 0.6)[step % 3])


# === Images with boxes ===


@checked
def plot_detections(
    image,
    detections: Mapping | Sequence[Mapping],
    class_names: Sequence[str] | None = None,
    *,
    ground_truth: Mapping | Sequence[Mapping] | None = None,
    confidence_threshold: float = 0.3,
    bounding_box_format: str = "xyxy",
    columns: int | None = None,
    size: int | None = None,
    titles: Sequence[str] | None = None,
    ax=None,
    path: str | os.PathLike | None = None,
):
    """Draws boxes with class and confidence into one image or a grid of images.

    Only the 40 most confident boxes of each image are labeled.

    Args:
        image: one image, as an array (H, W, 3) or (H, W), 0 to 255, or a path; or several, as a
            list or an array (B, H, W, 3).
        detections: for one image a dictionary with `"boxes"` (n, 4), `"labels"` (n,) and
            optionally `"confidence"` (n,) and `"class_names"` (n names), as returned by
            `RefineDet.detect`; for several images a list of these, or the arrays of `predict`
            with images as first axis. Rows with label -1 are padding.
        class_names: names in the order of the labels; default those in `detections`, else the
            labels.
        ground_truth: true `"boxes"` and `"labels"` in the same form, drawn dashed.
        confidence_threshold: lowest confidence of the drawn detections.
        bounding_box_format: format of all boxes, in pixels of the image or `"rel_*"`.
        columns: number of columns of the grid.
        size: longer side of each image in the figure, in pixels; default 640 for one image, 400
            in a grid. Small images are enlarged by an integer factor, without blur.
        titles: one line above each image.
        ax: matplotlib axes to draw into, for one image only.
        path: file to write, `.png`, `.pdf`, `.svg`, ...

    Raises:
        ValueError: if images, boxes or their numbers do not match.

    Example:
        >>> detections = model.detect("horses.jpg")
        >>> plot_detections("horses.jpg", detections, path="horses_boxes.png")
    """
    check_box_format(bounding_box_format)
    check_fractions(confidence_threshold=confidence_threshold)
    check_counts(columns=columns, size=size)
    images = _load_images(image)
    found = _boxes_of_images(detections, "detections", len(images))
    truths = [None] * len(images)
    if ground_truth is not None:
        truths = _boxes_of_images(ground_truth, "ground_truth", len(images))
    if titles is not None and len(titles) != len(images):
        raise ValueError(
            f"`titles` must name every image. Received: {len(titles)} for {len(images)} images"
        )
    if ax is not None and not hasattr(ax, "imshow"):
        raise ValueError(f"`ax` must be matplotlib axes. Received: {ax!r}")
    if ax is not None and len(images) != 1:
        raise ValueError(f"`ax` takes one image. Received: {len(images)} images")
    if ax is None:
        size = size or (640 if len(images) == 1 else 400)
        title = 0 if titles is None else TITLE_HEIGHT
        footer = 0 if ground_truth is None else FOOTER_HEIGHT
        figure, all_axes = _grid([i.shape[:2] for i in images], columns, size, title, footer)
    else:
        figure, all_axes = ax.figure, [ax]
    for i, (axes, pixels) in enumerate(zip(all_axes, images, strict=True)):
        _show_image(axes, pixels, exact=ax is None)
        if titles is not None:
            axes.set_title(str(titles[i]), fontsize=9, pad=4, parse_math=False)
        options = (class_names, bounding_box_format, pixels.shape)
        boxes, labels, texts = _select_boxes(found[i], *options, confidence_threshold)
        _draw_boxes(axes, boxes, labels, dashed=False)
        if truths[i] is not None:
            _draw_boxes(axes, *_select_boxes(truths[i], *options)[:2], dashed=True)
        _draw_labels(axes, texts[:MAX_LABELS], boxes[:MAX_LABELS], labels[:MAX_LABELS])
    return _save(figure, path)


@checked
def plot_dataset(
    dataset,
    class_names: Sequence[str] | None = None,
    rows: int = 3,
    columns: int = 3,
    *,
    bounding_box_format: str = "xyxy",
    size: int = 320,
    path: str | os.PathLike | None = None,
):
    """Draws the first images of a dataset with their boxes.

    Args:
        dataset: a `tf.data.Dataset` or other iterable of `{"images", "bounding_boxes":
            {"boxes", "labels"}}` or `(images, {"boxes", "labels"})`, batched or not; or an
            object with `.as_dataset()` and `.class_names`.
        class_names: names in the order of the labels; default those of the dataset.
        rows: number of rows of the grid.
        columns: number of columns.
        bounding_box_format: format of the boxes.
        size: as in `plot_detections`.
        path: file to write.

    Raises:
        ValueError: if the dataset is empty or its elements have another structure.

    Example:
        >>> plot_dataset(training_dataset, ["RBC", "WBC"], rows=2, columns=4, path="train.png")
    """
    check_counts(rows=rows, columns=columns)
    if class_names is None:
        class_names = getattr(dataset, "class_names", None)
    if hasattr(dataset, "as_dataset"):
        dataset = dataset.as_dataset()
    if not isinstance(dataset, Iterable):
        raise ValueError(f"`dataset` must have elements. Received: {dataset!r}")
    with value_errors():
        images = list(itertools.islice(_images_of(dataset), rows * columns))
    if not images:
        raise ValueError("`dataset` must hold at least one image. Received: an empty dataset")
    return plot_detections(
        [image for image, _ in images],
        [boxes for _, boxes in images],
        class_names,
        bounding_box_format=bounding_box_format,
        columns=columns,
        size=size,
        path=path,
    )


def _images_of(dataset):
    """Yields single `(image, boxes)` pairs of batched or unbatched elements."""
    for element in dataset:
        images, boxes, _ = unpack_batch(element)
        check_box_dictionary(boxes)
        boxes = {name: boxes[name] for name in ("boxes", "labels")}
        if len(images.shape) == 3:
            yield images, boxes
        else:
            for i in range(len(images)):
                yield images[i], {name: values[i] for name, values in boxes.items()}


def _load_images(image) -> list[np.ndarray]:
    """The images as uint8 arrays (H, W, 3)."""
    is_list = isinstance(image, list | tuple) or len(getattr(image, "shape", ())) == 4
    images = list(image) if is_list else [image]
    if not images:
        raise ValueError("`image` must be at least one image. Received: an empty list")
    return [load_image(ops.convert_to_numpy(i) if hasattr(i, "shape") else i) for i in images]


def _boxes_of_images(boxes, argument: str, num_images: int) -> list[Mapping]:
    """One dictionary per image, from any accepted form."""
    if isinstance(boxes, Mapping):
        missing = {"boxes", "labels"} - set(boxes)
        if missing:
            raise ValueError(
                f"`{argument}` lacks {', '.join(sorted(missing))}. Received: {sorted(boxes)}"
            )
        if np.ndim(boxes["labels"]) == 2:
            names = [name for name in ("boxes", "labels", "confidence") if name in boxes]
            rows = zip(*(boxes[name] for name in names), strict=True)
            boxes = [dict(zip(names, row, strict=True)) for row in rows]
        else:
            boxes = [boxes]
    if len(boxes) != num_images:
        raise ValueError(
            f"`{argument}` must hold one entry per image. "
            f"Received: {len(boxes)} for {num_images} images"
        )
    return list(boxes)


def _select_boxes(boxes: Mapping, class_names, source: str, shape, confidence_threshold=0.0):
    """The boxes to draw, by decreasing confidence: `("xyxy" boxes, labels, texts)`."""
    coordinates = np.asarray(boxes["boxes"], dtype="float32").reshape(-1, 4)
    labels = np.asarray(boxes["labels"], dtype=int).reshape(-1)
    confidence, own_names = boxes.get("confidence"), boxes.get("class_names")
    for name, column in (("boxes", coordinates), ("confidence", confidence)):
        if column is not None and len(column) != len(labels):
            raise ValueError(
                f"An image must have as many `{name}` as `labels`. "
                f"Received: {len(column)} {name} and {len(labels)} labels"
            )
    if source != "xyxy":
        coordinates = ops.convert_to_numpy(
            convert_boxes(coordinates, source, "xyxy", height=shape[0], width=shape[1])
        )
    rows = np.flatnonzero(labels >= 0)
    if confidence is not None:
        confidence = np.asarray(confidence, dtype="float32")
        rows = rows[confidence[rows] >= confidence_threshold]
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
    texts = []
    for row in rows:
        text = str(labels[row])
        if class_names is not None and labels[row] < len(class_names):
            text = str(class_names[labels[row]])
        elif class_names is None and own_names is not None:
            text = str(own_names[row])
        texts.append(text if confidence is None else f"{text} {confidence[row]:.2f}")
    return coordinates[rows], labels[rows], texts


def _grid(shapes, columns: int | None, size: int, title: int, footer: int):
    """A figure with exactly sized axes for images of these shapes."""
    columns = min(columns or int(np.ceil(np.sqrt(len(shapes)))), len(shapes))
    shown = [_shown_size(shape, size) for shape in shapes]
    cell_width = max(width for _, width in shown)
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    row_heights = [max(height for height, _ in row) for row in rows]
    gap = GAP if len(shapes) > 1 else 0
    width = columns * cell_width + (columns + 1) * gap
    height = sum(row_heights) + len(row_heights) * (title + gap) + gap + footer
    # Matplotlib rounds the number of pixels down: ask for slightly more.
    full = np.array([width, height]) + 0.01
    figure = _new_figure(*full / DPI)
    if footer:
        legend = "solid: detections    dashed: ground truth"
        style = {"size": 8, "color": "0.3", "ha": "center", "va": "center"}
        figure.text(0.5, 0.5 * footer / height, legend, **style)
    all_axes = []
    for i, (own_height, own_width) in enumerate(shown):
        row, column = divmod(i, columns)
        left = gap + column * (cell_width + gap) + (cell_width - own_width) // 2
        top = gap + title + sum(row_heights[:row]) + row * (title + gap)
        top += (row_heights[row] - own_height) // 2
        bottom = height - top - own_height
        corner, extent = np.array([left, bottom]) / full, np.array([own_width, own_height]) / full
        all_axes.append(figure.add_axes((*corner, *extent)))
    return figure, all_axes


def _show_image(axes, image: np.ndarray, exact: bool) -> None:
    """Fills the axes with an image; without Matplotlib's resampling if `exact`."""
    from PIL import Image

    # Pixel i extends from i to i + 1, as in the coordinates of the boxes.
    extent = (0, image.shape[1], image.shape[0], 0)
    frame = axes.get_window_extent()
    shown = (round(frame.width), round(frame.height))
    if exact and shown[0] < image.shape[1]:  # Pillow does not fade the borders
        image = np.asarray(Image.fromarray(image).resize(shown, Image.Resampling.LANCZOS))
    options = {"interpolation": "nearest", "aspect": "auto"} if exact else {}
    axes.imshow(image, extent=extent, **options)
    axes.set_axis_off()


def _shown_size(shape, size: int) -> tuple[int, int]:
    """Height and width in the figure: an integer multiple, or reduced to `size` if larger."""
    factor = size / max(shape)
    if factor > 0.8:
        factor = max(1, round(factor))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _draw_boxes(axes, boxes: np.ndarray, labels: np.ndarray, dashed: bool) -> None:
    """Draws outlines in the colors of the classes, the first box on top."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    linewidth = 1.4 if dashed else 1.8 if len(boxes) <= MAX_LABELS else 0.9
    # A dark outline around solid lines and a white one around dashed lines keep both visible on
    # any image, and dashed lines on solid ones.
    color = (1, 1, 1, 0.9) if dashed else (0, 0, 0, 0.35)
    stroke = withStroke(linewidth=linewidth + 1.4, foreground=color)
    for rank, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        rectangle = Rectangle(
            *(box[:2], *(box[2:] - box[:2])),
            fill=False,
            edgecolor=class_color(int(label)),
            linewidth=linewidth,
            linestyle=(0, (4, 3)) if dashed else "solid",
            path_effects=[stroke],
            zorder=(3.5 if dashed else 3) - rank / 1000,
        )
        axes.add_patch(rectangle)


def _draw_labels(axes, texts: list[str], boxes: np.ndarray, labels: np.ndarray) -> None:
    """Writes each text at the corner of its box where it covers other texts least."""
    axes.apply_aspect()  # updates transData
    to_figure, bounds = axes.transData, axes.get_window_extent()
    placed = np.zeros((0, 4))  # left, bottom, right, top in pixels, y upwards
    for text, box, label in zip(texts, boxes, labels, strict=True):
        color = class_color(int(label))
        brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
        box_style = {"boxstyle": f"square,pad={LABEL_PADDING}", "facecolor": color}
        drawn = axes.text(
            *(0, 0, text),
            fontsize=8,
            color="black" if brightness > 0.6 else "white",
            bbox={**box_style, "edgecolor": "none"},
            parse_math=False,
            verticalalignment="baseline",
            clip_on=True,
            zorder=4 - len(placed) / 1000,
        )
        padding = LABEL_PADDING * drawn.get_fontsize() * axes.figure.dpi / 72
        extent = drawn.get_window_extent().padded(padding)
        origin = to_figure.transform((0, 0)) - (extent.x0, extent.y0)
        (left, top), (right, bottom) = to_figure.transform(box.reshape(2, 2))
        corner = _label_corner(left, bottom, right, top, extent.size, bounds, placed)
        placed = np.concatenate([placed, [[*corner, *(corner + extent.size)]]])
        drawn.set_position(to_figure.inverted().transform(corner + origin))


def _label_corner(left, bottom, right, top, size, bounds, placed: np.ndarray) -> np.ndarray:
    """Lower left corner for the text of a box; all in pixels of the figure, y upwards."""
    width, height = size
    xs = np.array([left, left, left, left, right - width, right - width, right - width])
    ys = np.array([top, top - height, bottom - height, bottom, top, top - height, bottom])
    xs = np.clip(xs, bounds.x0, max(bounds.x0, bounds.x1 - width))
    inside = np.clip(ys, bounds.y0, max(bounds.y0, bounds.y1 - height))
    hidden = np.zeros(len(xs))
    for other in placed:
        across = np.minimum(xs + width, other[2]) - np.maximum(xs, other[0])
        down = np.minimum(inside + height, other[3]) - np.maximum(inside, other[1])
        hidden += np.maximum(across, 0) * np.maximum(down, 0)
    # Positions outside the image come last; ties go to the first.
    cost = hidden + width * height * (np.abs(inside - ys) > 1)
    best = int(np.argmin(cost))
    return np.array([xs[best], inside[best]])


# === Why a box ===


@checked
def explain(model: keras.Model, image, detection: Mapping) -> np.ndarray:
    """Shows what in the image made a detection: a class activation map (Layer-CAM).

    Takes the feature map of the level whose anchor became the box, before the transfer connection,
    and weights each value by the gradient of the confidence of this class with respect to it.

    Args:
        model: a `RefineDet`, on TensorFlow, JAX or PyTorch.
        image: one image as `RefineDet.detect` takes it: a path, an array (H, W, 3), ...; the tile,
            if the detection is from a tile.
        detection: one detection of `model.detect(image)`: `"boxes"` (4,) in the format of the model
            and pixels of the image, and `"labels"`, an integer.

    Returns:
        float32 heat (H, W), 0 to 1.

    Raises:
        ValueError: if `detection` is not one detection, or the model does not find it.

    Example:
        >>> found = model.detect("photo.jpg")
        >>> best = {name: values[:1] for name, values in found.items()}
        >>> heat = explain(model, "photo.jpg", best)
        >>> plot_detections(overlay_heat("photo.jpg", heat), best, path="why.png")

    Source: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
    IEEE TIP 2021.
    """
    pixels, size = load_image(image), model.image_shape[:2]
    box, label = _one_detection(detection, model, pixels.shape)
    images = ops.convert_to_tensor(resize_image(pixels, *size)[None])
    maps, outputs_of = _cut_at_source_maps(model)
    maps = maps(images, training=False)
    boxes, confidence = model.decoder.candidates(outputs_of(maps, training=False), model.anchors)
    if model.decoder.clip_to_image:
        boxes = clip_boxes(boxes, *size)
    boxes = ops.convert_to_numpy(boxes)[0]
    overlaps = pairwise_iou(box[None], boxes)[0]
    overlaps[np.abs(boxes - box).max(axis=1) < 1.0] = 1.0  # also of boxes at a border, without area
    confidence = ops.convert_to_numpy(confidence)[0, :, label]
    anchor = int(np.argmax(overlaps * confidence))
    if not (overlaps[anchor] >= 0.5 and confidence[anchor] > 0):
        raise ValueError(
            "`detection` must be one that the model finds in this image. Received: label "
            f'{label} at {box.round(1).tolist()}, "xyxy" in the image resized to {size}'
        )
    ends = np.cumsum(model.anchor_generator.level_sizes(size))
    level = int(np.searchsorted(ends, anchor, side="right"))

    def confidence_of(level_map):
        outputs = outputs_of([*maps[:level], level_map, *maps[level + 1 :]], training=False)
        return model.decoder.candidates(outputs, model.anchors)[1][0, anchor, label]

    gradient = ops.cast(_gradient(confidence_of, maps[level]), "float32")
    heat = ops.relu(ops.sum(ops.relu(gradient) * ops.cast(maps[level], "float32"), axis=-1))
    heat = ops.convert_to_numpy(heat)[0, ..., None]
    heat = resize_image(heat, *pixels.shape[:2])[..., 0]
    return heat / max(heat.max(), np.finfo("float32").tiny)


@checked
def overlay_heat(image, heat: np.ndarray) -> np.ndarray:
    """Returns the image (H, W, 3), uint8, with the heat (H, W) of `explain` in color.

    Example:
        >>> plot_detections(overlay_heat("photo.jpg", heat), detections)
    """
    from matplotlib import colormaps

    pixels, heat = load_image(image), np.asarray(heat)
    if heat.shape != pixels.shape[:2]:
        raise ValueError(
            f"`heat` must have the shape of the image, {pixels.shape[:2]}. Received: {heat.shape}"
        )
    color = colormaps["inferno"](heat)[..., :3]
    return np.rint(pixels * (1 - 0.6 * heat[..., None]) + 153 * color * heat[..., None]).astype(
        "uint8"
    )


def _one_detection(detection: Mapping, model, shape) -> tuple[np.ndarray, int]:
    """The "xyxy" box in pixels of the model's images, and the label."""
    check_box_dictionary(detection)
    boxes, labels = np.asarray(detection["boxes"], "float32"), np.ravel(detection["labels"])
    if boxes.size != 4 or len(labels) != 1:
        raise ValueError(
            "`detection` must be a single one: {name: values[i] for name, values in "
            f"detections.items()}}. Received: boxes {boxes.shape}, {len(labels)} labels"
        )
    if not 0 <= labels[0] < model.num_classes:
        raise ValueError(
            f"`detection` must have a label of 0 to {model.num_classes - 1}. Received: {labels[0]}"
        )
    source = model.bounding_box_format
    boxes = convert_boxes(boxes.reshape(1, 4), source, "rel_xyxy", *shape[:2])
    boxes = convert_boxes(boxes, "rel_xyxy", "xyxy", *model.image_shape[:2])
    return ops.convert_to_numpy(boxes)[0], int(labels[0])


def _cut_at_source_maps(model) -> tuple[keras.Model, keras.Model]:
    """The network up to the maps that the transfer connection reads, and from there on."""
    heads = model.heads
    if heads.use_transfer_connection or heads.use_residual_blocks:
        name = "tcb_p{}" if heads.use_transfer_connection else "odm_p{}_conv1"
        inputs = [model.get_layer(name.format(level)).input for level in (3, 4, 5, 6)]
        maps = [keras.tree.flatten(tensors)[0] for tensors in inputs]
    else:
        maps = model.get_layer("odm").input[:4]
    return keras.Model(model.inputs, maps), keras.Model(maps, model.output)


def _gradient(function, x):
    """The gradient of a function of one tensor, which returns a scalar."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(function)(x)
    if keras.backend.backend() == "torch":
        import torch

        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


# === Curves ===


@checked
def plot_history(history, path: str | os.PathLike | None = None, *, log_scale: bool = False):
    """Draws the losses of a training run and, next to them, average precision.

    Training losses are solid, validation losses dashed; `val_mAP...` is thick and
    `val_AP/<class name>`, or else `val_AP.../<class name>`, thin. Epochs without a value (None or
    nan) are skipped.

    Args:
        history: the result of `model.fit`, a dictionary of lists (optionally with `"epoch"`,
            from 0), a `DetectionEvaluation` callback, or a list of these. A Keras `History` does
            not record the epochs of values that are not computed in every epoch: these are spread
            evenly up to the last epoch. `[history, evaluation]` places them correctly.
        path: file to write.
        log_scale: whether the loss axis is logarithmic.

    Raises:
        ValueError: if there is neither a loss nor an average precision.

    Example:
        >>> history = model.fit(dataset, callbacks=[evaluation])
        >>> plot_history([history, evaluation], path="history.png")
    """
    curves = {}
    for part in history if isinstance(history, list | tuple) else [history]:
        curves |= _history_curves(part)
    losses = [name for name in CURVES if name in curves or f"val_{name}" in curves]
    means = [name for name in curves if name.startswith("val_mAP")]
    prefix = "val_AP/" if "val_mAP" in curves else "val_AP"
    classes = [name for name in curves if name.startswith(prefix) and "/" in name]
    panels = [names for names in (losses, means + classes) if names]
    if not panels:
        raise ValueError(
            f"`history` must hold losses ({', '.join(LOSSES)}) or val_mAP values. "
            f"Received: {', '.join(curves) or 'no values'}"
        )
    figure = _new_figure(6.4 * len(panels), 4.2, layout="constrained")
    for number, names in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        if names is losses:
            _draw_losses(axes, curves, losses, log_scale)
        else:
            _draw_precisions(axes, curves, means, classes)
        axes.set_xlabel("epoch")
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _style_axes(axes)
    return _save(figure, path)


@checked
def plot_precision_recall(
    result, path: str | os.PathLike | None = None, *, iou_threshold: float | None = None
):
    """Draws precision over recall of every class with objects.

    The solid line is the highest precision at this or any higher recall, whose area is the
    average precision; the faint line is the measured precision.

    Args:
        result: an `AveragePrecision`.
        path: file to write.
        iou_threshold: one of the thresholds of `result`; required if it has several.

    Example:
        >>> plot_precision_recall(evaluate_detections(model, dataset), path="precision.png")
    """
    _check_result("result", result, "iou_thresholds")
    per_class = result.per_class(iou_threshold)
    figure = _new_figure(6.4, 4.8, layout="constrained")
    axes = figure.add_subplot()
    for label, (name, numbers) in enumerate(per_class.items()):
        if numbers["average_precision"] is None:
            continue
        curve = result.curve(name, iou_threshold)
        recall, precision = curve["recall"], curve["precision"]
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        last = recall[-1:]  # precision is 0 beyond the highest recall
        axes.plot(
            np.concatenate([[0.0], recall, last]),
            np.concatenate([envelope[:1] if len(envelope) else [0.0], envelope, 0 * last]),
            drawstyle="steps-pre",
            color=class_color(label),
            linewidth=1.8,
            label=f"{name} {numbers['average_precision']:.3f}",
        )
        axes.plot(recall, precision, color=class_color(label), linewidth=0.8, alpha=0.35)
    threshold = result.iou_thresholds[0] if iou_threshold is None else iou_threshold
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.02))
    mean = result.at(threshold).mAP
    mean = "undefined, no objects" if np.isnan(mean) else f"{mean:.3f}"
    axes.set_title(f"IoU {threshold:g}: mAP {mean}", fontsize=10, loc="left")
    _style_axes(axes)
    num_curves = len(axes.get_legend_handles_labels()[0])
    if num_curves:
        figure.legend(
            loc="outside right upper", fontsize=8, frameon=False, ncols=-(-num_curves // 24)
        )
    return _save(figure, path)


@checked
def plot_class_curves(report, kind: str, path: str | os.PathLike | None = None):
    """Draws precision, recall or F1 over confidence, or precision over recall, for every class.

    Dots mark the best threshold of each class.

    Args:
        report: a `DetectionReport`.
        kind: `"precision"`, `"recall"`, `"f1"` or `"precision over recall"`.
        path: file to write.

    Example:
        >>> plot_class_curves(kr.evaluation.analyze(model, dataset), "f1", path="f1.png")
    """
    value, _, base = kind.partition(" over ")
    if value not in CLASS_CURVES or base not in ("", "recall"):
        raise ValueError(
            f"`kind` must be {', '.join(CLASS_CURVES)} or precision over recall. Received: {kind!r}"
        )
    _check_result("report", report, "best_thresholds")
    base = base or "confidence"
    figure, axes = _small_figure(base, value.replace("f1", "F1"), xlim=(0, 1), ylim=(0, 1.02))
    for label, name in enumerate(report.class_names):
        curve = report.curves[label]
        if not len(curve["recall"]) or np.isnan(curve["recall"][0]):
            continue
        last = len(curve[base]) - 1
        rows = np.unique(np.linspace(0, last, min(last + 1, MAX_POINTS)).astype(int))
        style = {"color": class_color(label)}
        axes.plot(curve[base][rows], curve[value][rows], linewidth=1.6, **style)
        best = max(np.sum(curve["confidence"] >= report.best_thresholds[name]) - 1, 0)
        axes.plot(curve[base][best], curve[value][best], "o", markersize=4, **style)
    return _save(figure, path)


@checked
def plot_confusion_matrix(
    matrix, class_names: Sequence[str], path: str | os.PathLike | None = None
):
    """Draws a confusion matrix; colors are shares of the true class, numbers are counts.

    Args:
        matrix: `DetectionReport.confusion_matrix`; the last row and column are background.
        class_names: names of the classes, without background.
        path: file to write.

    Example:
        >>> plot_confusion_matrix(report.confusion, report.class_names, path="confusion.png")
    """
    matrix, count = np.asarray(matrix), len(class_names)
    if matrix.shape != (count + 1, count + 1):
        raise ValueError(
            f"`matrix` must have a row and a column for each of {count} classes and background. "
            f"Received: shape {matrix.shape}"
        )
    figure, axes = _small_figure("detected", "true", height=4.4)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cells = np.full((*matrix.shape, 4), (*class_color(1), 0.0))
    cells[..., 3] = shares  # opacity, for a light and a dark page
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    axes.grid(False)
    names = [name if len(name) <= 12 else f"{name[:11]}…" for name in class_names]
    style = {"fontsize": 9 if count <= 12 else 4, "parse_math": False}
    axes.set_xticks(range(count + 1), [*names, "missed"], rotation=90, **style)
    axes.set_yticks(range(count + 1), [*names, "background"], **style)
    if count <= 12:  # more numbers would not be readable
        for row, column in np.argwhere(matrix > 0).tolist():
            style = {"ha": "center", "va": "center", "fontsize": 8}
            axes.text(column, row, str(matrix[row, column]), **style)
    return _save(figure, path)


@checked
def plot_calibration(calibration: Mapping, path: str | os.PathLike | None = None):
    """Draws the precision of detections over their confidence, and their number.

    Args:
        calibration: `DetectionReport.calibration`.
        path: file to write.

    Example:
        >>> plot_calibration(report.calibration, path="calibration.png")
    """
    if not {"count", "precision"} <= set(calibration):
        raise ValueError(f"`calibration` must be that of a report. Received: {calibration!r}")
    figure, axes = _small_figure("confidence", "precision", xlim=(0, 1), ylim=(0, 1.02))
    edges = np.linspace(0, 1, len(calibration["count"]) + 1)
    heights = np.nan_to_num(calibration["precision"])
    axes.bar(edges[:-1], heights, edges[1], align="edge", color=class_color(1), alpha=0.75)
    for left, height, number in zip(edges, heights, calibration["count"], strict=False):
        style = {"ha": "center", "fontsize": 7, "clip_on": True}
        axes.text(left + edges[1] / 2, min(height + 0.02, 0.97), str(int(number)), **style)
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="dashed", linewidth=1.2)
    return _save(figure, path)


@checked
def plot_bars(values: Mapping[str, float], label: str, path: str | os.PathLike | None = None):
    """Draws one horizontal bar for each number.

    Args:
        values: number by name; nan is left out.
        label: what the numbers are.
        path: file to write.

    Example:
        >>> plot_bars(report.errors.costs, "AP50 lost", path="errors.png")
    """
    figure, axes = _small_figure(label, "", height=0.9 + 0.32 * len(values))
    axes.barh(list(values), np.nan_to_num(list(values.values())), color=class_color(1))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    for row, value in enumerate(values.values()):
        text = "no objects" if np.isnan(value) else f"{value:.3f}"
        axes.text(np.nan_to_num(value), row, f" {text}", va="center", fontsize=9)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    return _save(figure, path)


def _check_result(name: str, value, attribute: str) -> None:
    if not hasattr(value, attribute):
        raise ValueError(
            f"`{name}` must be a result of `keras_resnest.evaluation`. Received: {value!r}"
        )


def _small_figure(xlabel: str, ylabel: str, height: float = 3.3, **limits):
    """A figure that is still readable on a phone, and its axes."""
    figure = _new_figure(4.4, height, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
    _style_axes(axes)
    return figure, axes


def _history_curves(part) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{name: (epochs from 1, values)}` of one history, in any accepted form."""
    values = getattr(part, "history", part)
    if not isinstance(values, Mapping) or not all(hasattr(v, "__len__") for v in values.values()):
        raise ValueError(
            "`history` must be the result of `model.fit` or a dictionary of lists. "
            f"Received: {type(part).__name__}"
        )
    series = {
        name: np.array([np.nan if v is None else v for v in column], dtype=float)
        for name, column in values.items()
        if name != "epoch"
    }
    longest = max(map(len, series.values()), default=0)
    given = getattr(part, "epoch", None) or values.get("epoch") or range(longest)
    epochs = np.asarray(list(given)) + 1
    curves = {}
    for name, column in series.items():
        # Spread fewer values than epochs evenly, the last one at the end.
        at = np.ceil((np.arange(len(column)) + 1) * len(epochs) / max(len(column), 1)) - 1
        known = ~np.isnan(column)
        if known.any():
            curves[name] = epochs[at.astype(int)][known], column[known]
    return curves


def _draw_losses(axes, curves, losses, log_scale: bool) -> None:
    dashes = (0, (4, 2))
    for name in losses:
        color = "black" if name == "loss" else class_color(CURVES.index(name) - 1)
        label = name  # of the first of the two lines
        for prefix, linestyle in (("", "solid"), ("val_", dashes)):
            if prefix + name in curves:
                _draw_curve(axes, curves[prefix + name], label, color, linestyle)
                label = None
    if any(f"val_{name}" in curves for name in losses):
        axes.plot([], [], color="0.4", linestyle=dashes, label="validation")
    axes.set_ylabel("loss")
    axes.set_yscale("log" if log_scale else "linear")
    axes.legend(**LEGEND)


def _draw_precisions(axes, curves, means, classes) -> None:
    for label, name in enumerate(classes):
        # More than 10 names would hide the curves.
        shown = name.split("/", 1)[1] if len(classes) <= 10 else None
        _draw_curve(axes, curves[name], shown, class_color(label), "solid", linewidth=1.0)
    for name, linestyle in zip(means, itertools.cycle(["solid", "dashed", "dotted"]), strict=False):
        _draw_curve(axes, curves[name], name, "black", linestyle, linewidth=2.2)
    axes.set(ylabel="average precision", ylim=(0, 1.02))
    axes.legend(**LEGEND)


def _draw_curve(axes, curve, label, color, linestyle, linewidth: float = 1.6) -> None:
    marker = "o" if len(curve[0]) <= 20 else None  # makes a single point visible
    style = {"color": color, "linestyle": linestyle, "linewidth": linewidth}
    axes.plot(*curve, label=label, marker=marker, markersize=3, **style)


def _new_figure(width: float, height: float, **options):
    """A figure of this size in inches, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _style_axes(axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, path):
    if path is not None:
        os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
        figure.savefig(path, dpi=figure.dpi)
    return figure
