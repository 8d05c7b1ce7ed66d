"""Measures how well anchors cover the objects of a dataset, and fits anchors to them.

An object that no anchor overlaps at an IoU of 0.5 is learned only from its best anchor, which is
far off. `anchor_coverage` counts such objects; `fit_anchors` finds sizes that leave fewer of them.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.checks import (
    check_box_dictionary,
    check_counts,
    check_image_shape,
    checked,
    unpack_batch,
)

# Sizes in strides of their level: smaller anchors leave gaps between the cells, larger ones reach
# beyond what the level's features see. RefineDet has 4.
SIZE_IN_STRIDES = (1.5, 8.0)
SIZE_STEPS = 20
ASPECT_RATIOS = np.exp2(np.arange(-8, 9) / 4.0)  # 1/4 to 4


@dataclass(frozen=True)
class AnchorCoverage:
    """The result of `anchor_coverage`; `print` shows it as a table.

    Example:
        >>> anchor_coverage(train, AnchorGenerator(), (320, 320)).per_class()["Platelets"]
        0.531
    """

    image_shape: tuple[int, int]  # (height, width) that the boxes were scaled to
    iou_threshold: float  # lowest IoU at which an anchor covers an object
    class_names: tuple[str, ...]
    counts: np.ndarray  # objects per class
    covered: np.ndarray  # covered objects per class
    mean_iou: np.ndarray  # mean IoU with the best anchor per class, nan without objects
    # (5 %, 50 %) quantiles of the objects' size per class, the square root of their area in pixels;
    # nan without objects
    size_quantiles: np.ndarray
    best_iou: np.ndarray  # IoU of each object with its best anchor

    @property
    def coverage(self) -> float:
        """Fraction of all objects that some anchor covers; nan without objects."""
        return float(_ratio(self.covered.sum(), self.counts.sum()))

    def per_class(self) -> dict[str, float]:
        """Returns the covered fraction of each class; nan for a class without objects."""
        return dict(zip(self.class_names, _ratio(self.covered, self.counts).tolist(), strict=True))

    def __str__(self) -> str:
        height, width = self.image_shape
        lines = [
            f"Objects that some anchor covers at IoU >= {self.iou_threshold:g}, "
            f"at {height} x {width}",
            f"{'class':<20} {'objects':>8} {'covered':>8} {'mean IoU':>9} {'size 5 %':>9} "
            f"{'50 %':>7}",
        ]
        for row, (name, coverage) in enumerate(self.per_class().items()):
            low, middle = self.size_quantiles[row]
            lines.append(
                f"{name:<20} {self.counts[row]:>8} {coverage:>8.3f} {self.mean_iou[row]:>9.3f} "
                f"{low:>9.1f} {middle:>7.1f}"
            )
        mean = self.best_iou.mean() if len(self.best_iou) else np.nan
        lines.append(f"{'all':<20} {self.counts.sum():>8} {self.coverage:>8.3f} {mean:>9.3f}")
        lines.append("size: root of the area in pixels; 5 % and 50 % of the objects are smaller")
        return "\n".join(lines)


@checked
def anchor_coverage(
    dataset, anchor_generator: AnchorGenerator, image_shape, iou_threshold: float = 0.5
) -> AnchorCoverage:
    """Counts the objects of a dataset that some anchor covers.

    Args:
        dataset: a `DetectionDataset`; an iterable, such as a `tf.data.Dataset`, of its elements
            or of batches; or a dictionary `{"boxes": (..., 4), "labels": (...)}` of `"xyxy"`
            boxes in pixels of `image_shape`. Rows with label -1 and boxes without area are
            ignored. Images are not decoded if the dataset knows their sizes.
        anchor_generator: the anchors.
        image_shape: (height, width, ...) that images are stretched to.
        iou_threshold: lowest IoU at which an anchor covers an object, as in `BoxMatcher`.

    Returns:
        `AnchorCoverage`.

    Raises:
        ValueError: if `dataset` is none of the above or the threshold is not in (0, 1].

    Example:
        >>> print(anchor_coverage(train, AnchorGenerator(), (320, 320)))

    Source: the matching rule of RefineDet (arXiv 1711.06897) section 3.3.
    """
    shape = _check(image_shape, iou_threshold)
    boxes, labels, names = _labeled_boxes(dataset, shape)
    best = _best_iou(boxes, shape, anchor_generator)
    count = len(names)
    sizes = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    quantiles = [_quantiles(sizes[labels == label]) for label in range(count)]
    covered = best >= iou_threshold
    counts = np.bincount(labels, minlength=count)
    return AnchorCoverage(
        image_shape=shape,
        iou_threshold=float(iou_threshold),
        class_names=names,
        counts=counts,
        covered=np.bincount(labels[covered], minlength=count),
        mean_iou=_ratio(np.bincount(labels, best, minlength=count), counts),
        size_quantiles=np.array(quantiles).reshape(count, 2),
        best_iou=best,
    )


@checked
def fit_anchors(
    dataset,
    image_shape,
    anchor_generator: AnchorGenerator | None = None,
    iou_threshold: float = 0.5,
    fit_aspect_ratios: bool = False,
    max_boxes: int = 10_000,
    restarts: int = 3,
    seed: int = 0,
) -> AnchorGenerator:
    """Fits anchor sizes, and optionally aspect ratios, to the objects of a dataset.

    Coordinate search starts from the given anchors, from the quantiles of the objects' sizes and
    from random points. It maximizes the sum of two means over the classes: the fraction of covered
    objects, and the IoU with the best anchor. All classes count the same, as in mAP. Neither the
    fraction of all covered objects nor its mean over the classes falls below that of the given
    anchors. Fit to training images only.

    Args:
        dataset: as in `anchor_coverage`.
        image_shape: as in `anchor_coverage`.
        anchor_generator: where to start, by default `AnchorGenerator()`; its strides, offset and
            numbers of sizes and ratios are kept.
        iou_threshold: as in `anchor_coverage`.
        fit_aspect_ratios: whether ratios are fitted too, between 1/4 and 4.
        max_boxes: number of objects to draw at random from a larger dataset.
        restarts: number of random starting points.
        seed: seed of all random numbers.

    Returns:
        `AnchorGenerator` with sizes between 1.5 and 8 strides of their level that do not fall
        from level to level, or the given one.

    Raises:
        ValueError: as in `anchor_coverage`, or if there is no object to fit to.

    Example:
        >>> generator = fit_anchors(train, (320, 320))
        >>> model = kr.RefineDet(3, anchor_generator=generator)
    """
    check_counts(max_boxes=max_boxes)
    shape = _check(image_shape, iou_threshold)
    start = anchor_generator or AnchorGenerator()
    boxes, labels, _ = _labeled_boxes(dataset, shape)
    if not len(boxes):
        raise ValueError("`dataset` must have objects to fit anchors to. Received: none")
    rng = np.random.default_rng(seed % 2**64)
    rows = np.sort(rng.permutation(len(boxes))[:max_boxes])
    search = _Search(boxes[rows], labels[rows], shape, start, iou_threshold)
    best = search.climb(search.start, fit_aspect_ratios)
    for point in [search.quantiles(), *(search.random(rng) for _ in range(restarts))]:
        best = max(best, search.climb(point, fit_aspect_ratios), key=search.score)
    fitted = search.generator(best)
    # The search used a sample; the guarantee must hold for all objects.
    before, after = (
        _coverage(_best_iou(boxes, shape, g) >= iou_threshold, labels) for g in (start, fitted)
    )
    return fitted if (after >= before).all() else start


class _Search:
    """Coordinate search over points (sizes of all levels in one tuple, aspect ratios)."""

    def __init__(self, boxes, labels, shape, start: AnchorGenerator, iou_threshold: float):
        self.boxes, self.labels, self.shape = boxes, labels, shape
        self.generator_config, self.iou_threshold = start.get_config(), iou_threshold
        self.levels = [i for i, sizes in enumerate(start.sizes) for _ in sizes]
        self.start = (tuple(s for sizes in start.sizes for s in sizes), start.aspect_ratios)
        self.grids = [
            np.round(np.geomspace(*(stride * b for b in SIZE_IN_STRIDES), SIZE_STEPS), 1)
            for stride in (start.strides[level] for level in self.levels)
        ]
        self.iou_of = functools.cache(self._iou_of)
        self.score = functools.cache(self._score)
        self.floor = self._coverages(self._best(self.start))

    def generator(self, point) -> AnchorGenerator:
        sizes = [
            tuple(sorted(s for s, of in zip(point[0], self.levels, strict=True) if of == level))
            for level in range(len(self.generator_config["strides"]))
        ]
        return AnchorGenerator(
            **{**self.generator_config, "sizes": sizes, "aspect_ratios": point[1]}
        )

    def quantiles(self):
        """Sizes that divide the objects evenly, within the range of their level."""
        sizes = np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))
        fractions = (np.arange(len(self.levels)) + 0.5) / len(self.levels)
        return self._on_grid(np.quantile(sizes, fractions)), self.start[1]

    def random(self, rng):
        return self._on_grid(sorted(rng.choice(grid) for grid in self.grids)), self.start[1]

    def _on_grid(self, sizes) -> tuple[float, ...]:
        return tuple(_nearest(g, size) for g, size in zip(self.grids, sizes, strict=True))

    def climb(self, point, with_ratios: bool):
        """Improves one number after the other until no change helps."""
        while True:
            before = point
            for i, grid in enumerate(self.grids):
                changed = [(_replace(point[0], i, float(size)), point[1]) for size in grid]
                point = max([point, *changed], key=self.score)
            for i in range(len(point[1]) if with_ratios else 0):
                changed = [(point[0], _replace(point[1], i, float(r))) for r in ASPECT_RATIOS]
                point = max([point, *changed], key=self.score)
            if point == before:
                return point

    def _score(self, point) -> tuple[float, float]:
        """Coverage lost relative to the start, then the sum of the two means over the classes.

        Coarser levels are for larger objects: sizes that fall from level to level count as lost.
        """
        best = self._best(point)
        coverages = self._coverages(best)
        lost = np.minimum(coverages - self.floor, 0.0).sum() - (np.diff(point[0]) < 0).sum()
        return float(lost), float(coverages[1] + _class_means(best, self.labels).mean())

    def _coverages(self, best_iou):
        return _coverage(best_iou >= self.iou_threshold, self.labels)

    def _best(self, point):
        shapes = [
            self.iou_of(level, size, ratio)
            for level, size in zip(self.levels, point[0], strict=True)
            for ratio in point[1]
        ]
        return np.max(shapes, axis=0)

    def _iou_of(self, level: int, size: float, ratio: float):
        return _best_iou_of_shape(
            self.boxes, self.shape, self.generator_config, level, size, ratio
        ).astype("float32")


def _replace(values: tuple, index: int, value: float) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


def _nearest(grid: np.ndarray, value: float) -> float:
    return float(grid[np.abs(np.log(grid / value)).argmin()])


# === Arithmetic ===


def _best_iou(boxes: np.ndarray, shape, generator: AnchorGenerator) -> np.ndarray:
    """IoU of each box with its best anchor, without forming all pairs."""
    best = np.zeros(len(boxes))
    config = generator.get_config()
    for level, sizes in enumerate(generator.sizes):
        for size in sizes:
            for ratio in generator.aspect_ratios:
                found = _best_iou_of_shape(boxes, shape, config, level, size, ratio)
                best = np.maximum(best, found)
    return best


def _best_iou_of_shape(boxes, shape, config: dict, level: int, size: float, ratio: float):
    """IoU of each box with the nearest anchor of one shape, which overlaps it most.

    The intersection is the product of two overlaps, each of which falls with the distance of the
    centers along its axis; the areas are the same for all cells.
    """
    areas, overlap = 1.0, 1.0
    stride, sides = config["strides"][level], (size * np.sqrt(ratio), size / np.sqrt(ratio))
    for axis, (length, side) in enumerate(zip((shape[1], shape[0]), sides, strict=True)):
        centers = (np.arange(-(-length // stride)) + config["offset"]) * stride
        if config["clip"]:
            centers, side = np.clip(centers, 0, length), min(side, length)
        low, high = boxes[:, axis], boxes[:, axis + 2]
        middle = (low + high) / 2
        right = np.searchsorted(centers, middle).clip(1, max(1, len(centers) - 1))
        near = [centers[np.minimum(i, len(centers) - 1)] for i in (right - 1, right)]
        center = np.where(np.abs(near[0] - middle) <= np.abs(near[1] - middle), *near)
        common = np.minimum(high, center + side / 2) - np.maximum(low, center - side / 2)
        overlap = overlap * np.maximum(common, 0.0)
        areas = areas * side
    return overlap / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + areas - overlap)


def _class_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of each class that has objects."""
    counts = np.bincount(labels)
    return np.bincount(labels, values)[counts > 0] / counts[counts > 0]


def _coverage(covered: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Covered fraction of all objects, and its mean over the classes."""
    return np.array([covered.mean(), _class_means(covered, labels).mean()])


def _ratio(part, whole):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(whole) > 0, np.divide(part, whole), np.nan)


def _quantiles(sizes: np.ndarray) -> tuple[float, float]:
    return tuple(np.quantile(sizes, (0.05, 0.5))) if len(sizes) else (np.nan, np.nan)


# === Input ===


def _check(image_shape, iou_threshold: float) -> tuple[int, int]:
    if not 0.0 < iou_threshold <= 1.0:
        raise ValueError(
            f"`iou_threshold` must be in (0, 1]. Received: iou_threshold={iou_threshold}"
        )
    return check_image_shape(image_shape)


def _labeled_boxes(dataset, shape: tuple[int, int]):
    """All boxes with an area, "xyxy" in pixels of `shape`, their labels, and the class names."""
    names = getattr(dataset, "class_names", None)
    if isinstance(dataset, Mapping) and {"boxes", "labels"} <= set(dataset):
        images = [(dataset["boxes"], dataset["labels"], shape)]
    elif isinstance(dataset, Mapping):  # one batch
        images = [_boxes_of(dataset)]
    elif hasattr(dataset, "records"):
        images = [(r.boxes, r.labels, (r.height, r.width)) for r in dataset.records]
    else:
        source = dataset.as_dataset() if hasattr(dataset, "as_dataset") else dataset
        if not isinstance(source, Iterable):
            raise ValueError(f"`dataset` must be a dataset. Received: {dataset!r}")
        images = [_boxes_of(element) for element in source]
    boxes, labels = [np.zeros((0, 4))], [np.zeros(0, int)]
    for image_boxes, image_labels, (height, width) in images:
        scale = np.array([shape[1] / width, shape[0] / height] * 2)
        boxes.append(np.asarray(image_boxes, "float64").reshape(-1, 4) * scale)
        labels.append(np.asarray(image_labels, int).reshape(-1))
    boxes, labels = np.concatenate(boxes), np.concatenate(labels)
    real = (labels >= 0) & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
    boxes, labels = boxes[real], labels[real]
    count = len(names) if names else int(labels.max(initial=-1)) + 1
    if labels.max(initial=-1) >= count:
        raise ValueError(
            f"Labels must be 0 to {count - 1}, or -1 for padding. Received: {labels.max()}"
        )
    return boxes, labels, tuple(names or map(str, range(count)))


def _boxes_of(element):
    """Boxes, labels and (height, width) of an element or a batch, in either of its layouts."""
    images, boxes, _ = unpack_batch(element)
    check_box_dictionary(boxes)
    return boxes["boxes"], boxes["labels"], tuple(images.shape)[-3:-1]
