"""Callbacks that measure and show a detector while it is trained.

A learning rate that warms up needs nothing of our own:
`keras.optimizers.schedules.CosineDecay(0.0, decay_steps, warmup_target=1e-3,
warmup_steps=500)` rises linearly to 1e-3 in 500 steps and then decays.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np

from keras_resnest.divergence import TerminateOnDivergence
from keras_resnest.evaluation.average_precision import (
    AveragePrecision,
    classes_of,
    coco_average_precision,
    collect_detections,
    unpack_batch,
    voc_average_precision,
)
from keras_resnest.training.resume import ResumeTraining
from keras_resnest.visualization import plot_detections

__all__ = ["DetectionEvaluation", "DetectionPlot", "ResumeTraining", "TerminateOnDivergence"]

CLASSES_ON_ONE_LINE = 5  # more are printed as a table
TABLE_WIDTH = 100  # characters


class DetectionEvaluation(keras.callbacks.Callback):
    """Measures average precision at the end of epochs and adds it to the logs.

    The logs get `val_mAP50` and `val_AP50/<class name>` (50 stands for the IoU
    threshold 0.5), so History, the progress bar, `TensorBoard`, `CSVLogger`,
    `ModelCheckpoint(monitor="val_mAP50", mode="max")` and `EarlyStopping` see them. Place
    those callbacks *after* this one in the list: Keras calls callbacks in order.

    Ground truth and predictions are read in one pass over the data, with the model's
    compiled predict function, which is not traced again from epoch to epoch. Undefined
    values (a class without objects, no objects at all) stay out of the logs: `nan` as a
    first value would remain the best one of `ModelCheckpoint` for ever.

    Args:
        validation_data: evaluation batches as for `evaluate_detections`; objects marked
            `"difficult"` are ignored as in VOC. May be the dataset given to `fit` as
            `validation_data`.
        class_names: names of the classes, by default `model.class_names`.
        iou_threshold: lowest IoU of a true positive, or several; each gives its own
            `val_mAP...`.
        interpolation: `"every_point"` or `"eleven_point"`, see `voc_average_precision`.
        frequency: evaluate at the end of every so many epochs. The first and the last
            epoch of a training are evaluated too: `CSVLogger` knows only the columns it
            sees first, and the last value is the result.
        coco: whether to add COCO's twelve numbers as `val_COCO/AP`, `val_COCO/AP50`, ...
            (small and large objects in pixels as `collect_detections` says).
        per_class: whether `val_AP50/<class name>` goes into the logs; False keeps the
            progress bar short with many classes.
        bounding_box_format: format of the boxes in `validation_data`, by default
            that of the model.
        steps: number of batches; needed for a dataset without end.
        verbose: 0 prints nothing, 1 one line for each evaluation, or a table with more
            than five classes.

    Attributes:
        result: the latest `AveragePrecision`, None before the first evaluation.
        coco_result: the latest `COCOAveragePrecision`, if `coco`.
        epoch: epochs evaluated, counted from 0.
        history: `{name: list of values}`, one value per entry of `epoch`.

    Raises:
        ValueError: if an argument or the structure of the data is not as described.

    Example:

    >>> evaluation = kr.callbacks.DetectionEvaluation(val_ds, frequency=5)
    >>> best = keras.callbacks.ModelCheckpoint(
    ...     "best.keras", monitor="val_mAP50", mode="max", save_best_only=True)
    >>> model.fit(train_ds, epochs=100, callbacks=[evaluation, best])
    """

    def __init__(
        self,
        validation_data: Iterable,
        class_names: Sequence[str] | None = None,
        iou_threshold: float | Sequence[float] = 0.5,
        interpolation: str = "every_point",
        frequency: int = 1,
        coco: bool = False,
        per_class: bool = True,
        bounding_box_format: str | None = None,
        steps: int | None = None,
        verbose: int = 1,
    ):
        super().__init__()
        _check_reusable(validation_data, "validation_data")
        self.validation_data = validation_data
        self.class_names = class_names
        self.iou_threshold = iou_threshold
        self.interpolation = interpolation
        self.frequency = _check_frequency(frequency)
        self.coco = coco
        self.per_class = per_class
        self.bounding_box_format = bounding_box_format
        self.steps = steps
        self.verbose = verbose
        self.result = None
        self.coco_result = None
        self.epoch = []
        self.history = {}
        # A wrong argument shows here, not after the first epoch.
        voc_average_precision(
            [], [], num_classes=1, iou_threshold=iou_threshold, interpolation=interpolation
        )

    def on_train_begin(self, logs=None):
        self.epoch, self.history = [], {}
        # Data that do not fit must not come to light after a long first epoch.
        classes_of(self.model, self.class_names, self.validation_data)
        next(_first_batches(self.validation_data, 1), None)

    def on_epoch_end(self, epoch, logs=None):
        if not _is_due(epoch, self.frequency, self.params, first=not self.epoch):
            return
        start = time.perf_counter()
        values = self._evaluate()
        if logs is not None:
            logs.update(values)
        self.epoch.append(epoch)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)
        if self.verbose:
            text = _describe(self.result, time.perf_counter() - start)
            # Begins below the unfinished line of the progress bar.
            print(f"\nEpoch {epoch + 1}: {text}", flush=True)

    def _evaluate(self) -> dict[str, float]:
        class_names = classes_of(self.model, self.class_names)
        ground_truth, detections = collect_detections(
            self.model,
            self.validation_data,
            bounding_box_format=self.bounding_box_format,
            steps=self.steps,
        )
        self.result = voc_average_precision(
            ground_truth,
            detections,
            class_names,
            iou_threshold=self.iou_threshold,
            interpolation=self.interpolation,
        )
        values = _log_values(self.result, self.per_class)
        if self.coco:
            self.coco_result = coco_average_precision(ground_truth, detections, class_names)
            values |= {f"val_COCO/{name}": v for name, v in self.coco_result.metrics.items()}
        return {name: value for name, value in values.items() if not np.isnan(value)}


class DetectionPlot(keras.callbacks.Callback):
    """Writes an image of the detections on a few validation images, every so many epochs.

    The files are `epoch_0001.png`, `epoch_0002.png`, ...; detections are solid, ground
    truth is dashed. The images are read once, at the start, so that all files show the
    same ones.

    Args:
        dataset: evaluation batches as for `evaluate_detections`.
        folder: where the files go; created if needed.
        class_names: names of the classes, by default `model.class_names`.
        frequency: a file at the end of every so many epochs; the first and the last
            epoch of a training get one too.
        num_images: number of images in each file, the first ones of `dataset`.
        confidence_threshold: detections below are not drawn.
        bounding_box_format: format of the boxes in `dataset`, by default the model's.

    Example:

    >>> model.fit(train_ds, callbacks=[kr.callbacks.DetectionPlot(val_ds, "runs/plots")])
    """

    def __init__(
        self,
        dataset: Iterable,
        folder: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        frequency: int = 1,
        num_images: int = 6,
        confidence_threshold: float = 0.3,
        bounding_box_format: str | None = None,
    ):
        super().__init__()
        if num_images < 1:
            raise ValueError(f"`num_images` must be positive. Received: num_images={num_images}")
        self.dataset = dataset
        self.folder = folder
        self.class_names = class_names
        self.frequency = _check_frequency(frequency)
        self.num_images = num_images
        self.confidence_threshold = confidence_threshold
        self.bounding_box_format = bounding_box_format
        self._batches = None
        self._written = False

    def on_train_begin(self, logs=None):
        self._written = False
        if self._batches is None:
            self._batches = list(_first_batches(self.dataset, self.num_images))

    def on_epoch_end(self, epoch, logs=None):
        if not _is_due(epoch, self.frequency, self.params, first=not self._written):
            return
        ground_truth, detections = collect_detections(
            self.model, self._batches, bounding_box_format=self.bounding_box_format
        )
        images = [image for batch in self._batches for image in np.asarray(batch[0])]
        names = self.class_names
        shown = slice(self.num_images)
        plot_detections(
            images[shown],
            detections[shown],
            getattr(self.model, "class_names", None) if names is None else names,
            ground_truth=ground_truth[shown],
            confidence_threshold=self.confidence_threshold,
            path=os.path.join(self.folder, f"epoch_{epoch + 1:04d}.png"),
        )
        self._written = True


def _is_due(epoch: int, frequency: int, params: dict | None, first: bool) -> bool:
    """Every `frequency`-th epoch, the first one of this training and the last planned one."""
    last = (params or {}).get("epochs")
    return first or (epoch + 1) % frequency == 0 or epoch + 1 == last


def _check_frequency(frequency: int) -> int:
    if int(frequency) != frequency or frequency < 1:
        raise ValueError(f"`frequency` must be a positive integer. Received: frequency={frequency}")
    return int(frequency)


def _check_reusable(dataset, argument: str) -> None:
    if isinstance(dataset, Iterator):
        raise ValueError(
            f"`{argument}` is read once per evaluation, so it must not be an iterator or "
            f"generator. Received: {type(dataset).__name__}"
        )


def _first_batches(dataset, num_images: int):
    """`(images, boxes)` batches with `num_images` images at most, as arrays in memory."""
    for batch in dataset:
        images, boxes = unpack_batch(batch)
        count = min(num_images, len(images))
        yield (
            np.asarray(images)[:count],
            {name: np.asarray(values)[:count] for name, values in boxes.items()},
        )
        num_images -= count
        if num_images == 0:
            return


def _log_values(result: AveragePrecision, per_class: bool) -> dict[str, float]:
    values = {}
    for row, threshold in enumerate(result.iou_thresholds):
        percent = f"{100 * threshold:g}"
        values[f"val_mAP{percent}"] = result.at(threshold).mAP
        if per_class:
            names = zip(result.class_names, result.average_precision[row].tolist(), strict=True)
            values |= {f"val_AP{percent}/{name}": value for name, value in names}
    return values


def _describe(result: AveragePrecision, seconds: float) -> str:
    """One line; with many classes a table below it. Classes at the first IoU threshold."""
    if not result.num_objects.sum():
        return f"the validation data have no objects, so mAP is undefined ({seconds:.1f} s)"
    means = _log_values(result, per_class=False)
    text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    text = f"{text} ({seconds:.1f} s, {result.num_objects.sum()} objects)"
    names = [name.replace("\n", " ") for name in result.class_names]
    values = ["-" if np.isnan(v) else f"{v:.3f}" for v in result.average_precision[0]]
    if len(names) <= CLASSES_ON_ONE_LINE:
        return f"{text}: " + ", ".join(map(" ".join, zip(names, values, strict=True)))
    width = max(map(len, names))
    entries = [f"{n:{width}} {v:>5}" for n, v in zip(names, values, strict=True)]
    columns = max(1, TABLE_WIDTH // (width + 9))
    rows = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    return "\n".join([text, *("  " + "   ".join(row) for row in rows)])
