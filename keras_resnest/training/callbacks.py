"""Callbacks that evaluate and plot a detector during training."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np

from keras_resnest.checks import check_counts, checked, value_errors
from keras_resnest.divergence import TerminateOnDivergence
from keras_resnest.evaluation.coco import COCOAveragePrecision, coco_average_precision
from keras_resnest.evaluation.collect import (
    collect_detections,
    resolve_class_names,
    unpack_labeled_batch,
)
from keras_resnest.evaluation.voc import AveragePrecision, voc_average_precision
from keras_resnest.replicas import gather_over_replicas
from keras_resnest.training.pacing import TimeLimit, UnfreezeStages
from keras_resnest.training.resume import ResumeTraining
from keras_resnest.visualization import plot_detections

__all__ = [
    "DetectionEvaluation",
    "DetectionPlot",
    "ResumeTraining",
    "TerminateOnDivergence",
    "TimeLimit",
    "UnfreezeStages",
]

MAX_CLASSES_PER_LINE = 5  # more are printed as a table
TABLE_WIDTH = 100  # characters


@checked
class DetectionEvaluation(keras.callbacks.Callback):
    """Measures average precision at the end of epochs and adds it to the logs.

    Logs `val_mAP50` and `val_AP50/<class name>` (50 stands for IoU threshold 0.5), and COCO's
    `val_mAP` and `val_AP/<class name>` (means over IoU 0.50:0.95) and `val_COCO/AP75`,
    `val_COCO/APsmall`, ..., for History, the progress bar, `TensorBoard`, `CSVLogger` and
    `ModelCheckpoint(monitor="val_mAP", mode="max")`. Put those callbacks *after* this one:
    Keras calls callbacks in order. Undefined values (of classes without objects) are not logged,
    because `ModelCheckpoint` would keep a first value of `nan` as the best. With a `frequency`, the
    epochs between log the last values again, and all log `val_evaluated_epoch`, the epoch from 1
    that the values are from.

    Models of this package whose optimizer averages the weights (`use_ema`) are evaluated, and
    remembered, with the averages.

    Args:
        validation_data: evaluation batches as for `evaluate_detections`; objects marked
            `"difficult"` are ignored as in VOC. May be the `validation_data` of `fit`.
        class_names: names of the classes; default `model.class_names`.
        iou_threshold: lowest IoU of a true positive; or several, each logged as its `val_mAP...`.
        interpolation: `"every_point"` or `"eleven_point"`, see `voc_average_precision`.
        frequency: interval in epochs. The first epoch, which determines `CSVLogger`'s columns, and
            the last one are always evaluated.
        coco: whether to add COCO's values, of which twelve as `val_COCO/AP`, `val_COCO/AP50`, ...
            See `collect_detections` for the sizes of small and large objects.
        per_class: whether to log `val_AP50/<class name>` and `val_AP/<class name>`.
        bounding_box_format: format of the boxes in `validation_data`; default the model's.
        steps: number of batches; required for an infinite dataset.
        verbose: 1 prints a line per evaluation, or a table for more than five classes; 0 is silent.
        restore_best_weights: whether `fit` ends with the weights of the evaluation with the highest
            `val_mAP`; without `coco`, with the highest mAP at `iou_threshold`.
        patience: number of epochs without a higher mAP after which training stops, at the next
            evaluation; None to train all epochs.

    Attributes:
        result: the latest `AveragePrecision`, None before the first evaluation.
        coco_result: the latest `COCOAveragePrecision`, if `coco`.
        epoch: the evaluated epochs, from 0.
        history: `{name: list of values}`; an undefined value has no entry.
        best: the highest mAP, None before the first one.
        best_epoch: its epoch, from 0.
        stopped: whether `patience` has ended the training.

    Raises:
        ValueError: if an argument or the structure of the data is invalid.

    Example:
        >>> best = kr.callbacks.DetectionEvaluation(
        ...     val_ds, frequency=5, restore_best_weights=True, patience=30)
        >>> model.fit(train_ds, epochs=100, callbacks=[best])
        >>> model.save("best.keras")
    """

    def __init__(
        self,
        validation_data: Iterable,
        class_names: Sequence[str] | None = None,
        iou_threshold: float | Sequence[float] = 0.5,
        interpolation: str = "every_point",
        frequency: int = 1,
        coco: bool = True,
        per_class: bool = True,
        bounding_box_format: str | None = None,
        steps: int | None = None,
        verbose: int | bool = 1,
        restore_best_weights: bool = False,
        patience: int | None = None,
    ):
        super().__init__()
        check_counts(frequency=frequency, patience=patience)
        if isinstance(validation_data, Iterator):
            raise ValueError(
                "`validation_data` is read repeatedly, so it must not be an iterator or generator. "
                f"Received: {type(validation_data).__name__}"
            )
        self.validation_data = validation_data
        self.class_names = class_names
        self.iou_threshold = iou_threshold
        self.interpolation = interpolation
        self.frequency = int(frequency)
        self.coco = coco
        self.per_class = per_class
        self.bounding_box_format = bounding_box_format
        self.steps = steps
        self.verbose = verbose
        self.restore_best_weights = restore_best_weights
        self.patience = patience
        self.result = None
        self.coco_result = None
        self._begin()
        # Raises for invalid arguments now, not after the first epoch.
        voc_average_precision(
            [], [], num_classes=1, iou_threshold=iou_threshold, interpolation=interpolation
        )

    def _begin(self) -> None:
        self.epoch, self.history = [], {}
        self.best = self.best_epoch = self.best_weights = None
        self.stopped = False

    def on_train_begin(self, logs=None):
        self._begin()
        # Raises for invalid data now, not after the first epoch.
        resolve_class_names(self.model, self.class_names, self.validation_data)
        next(_first_batches(self.validation_data, 1), None)

    def on_epoch_end(self, epoch, logs=None):
        if _is_due(epoch, self.frequency, self.params, first=not self.epoch):
            start = time.perf_counter()
            with _averaged_weights(self.model):
                values = self._evaluate()
                self._remember_best(epoch)
            self.epoch.append(epoch)
            for name, value in values.items():
                self.history.setdefault(name, []).append(value)
            if self.verbose:
                text = _summary(self.result, self.coco_result, time.perf_counter() - start)
                # Start below the unfinished line of the progress bar.
                print(f"\nEpoch {epoch + 1}: {text}", flush=True)
        if logs is not None:
            logs.update({name: values[-1] for name, values in self.history.items()})
            if self.frequency > 1:
                logs["val_evaluated_epoch"] = self.epoch[-1] + 1

    def _remember_best(self, epoch: int) -> None:
        mean = self.coco_result.metrics["AP"] if self.coco else self.result.mAP
        # Workers may round differently, but must stop together.
        strategy = getattr(self.model, "distribute_strategy", None)
        mean = float(gather_over_replicas(strategy, [float(mean)])[0, 0])
        if not np.isnan(mean) and (self.best is None or mean > self.best):
            self.best, self.best_epoch = mean, epoch
            if self.restore_best_weights:
                self.best_weights = self.model.get_weights()
        if self.patience is not None and self.best is not None:
            self.stopped = epoch - self.best_epoch >= self.patience
            self.model.stop_training |= self.stopped

    def on_train_end(self, logs=None):
        if self.best_weights is not None:
            self.model.set_weights(self.best_weights)

    def _evaluate(self) -> dict[str, float]:
        class_names = resolve_class_names(self.model, self.class_names)
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
            values["val_mAP"] = self.coco_result.metrics["AP"]
            if self.per_class:
                means = self.coco_result.per_class()
                values |= {f"val_AP/{n}": np.nan if v is None else v for n, v in means.items()}
            values |= {f"val_COCO/{name}": v for name, v in self.coco_result.metrics.items()}
        return {name: value for name, value in values.items() if not np.isnan(value)}


@checked
class DetectionPlot(keras.callbacks.Callback):
    """Plots the detections in a few validation images at the end of epochs.

    Writes `epoch_0001.png`, `epoch_0002.png`, ... with solid detections and dashed ground truth.
    All files show the same images.

    Args:
        dataset: evaluation batches as for `evaluate_detections`.
        folder: folder of the files; created if needed.
        class_names: names of the classes; default `model.class_names`.
        frequency: interval in epochs. The first and the last epoch are always plotted.
        num_images: number of images per file, the first ones of `dataset`.
        confidence_threshold: lowest confidence of the plotted detections.
        bounding_box_format: format of the boxes in `dataset`; default the model's.

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
        check_counts(frequency=frequency, num_images=num_images)
        self.dataset = dataset
        self.folder = folder
        self.class_names = class_names
        self.frequency = int(frequency)
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
        with _averaged_weights(self.model):
            ground_truth, detections = collect_detections(
                self.model, self._batches, bounding_box_format=self.bounding_box_format
            )
        plot_detections(
            [image for images, _ in self._batches for image in images],
            detections,
            self.class_names or getattr(self.model, "class_names", None),
            ground_truth=ground_truth,
            confidence_threshold=self.confidence_threshold,
            path=os.path.join(self.folder, f"epoch_{epoch + 1:04d}.png"),
        )
        self._written = True


def _averaged_weights(model):
    return getattr(model, "averaged_weights", contextlib.nullcontext)()


def _is_due(epoch: int, frequency: int, params: dict | None, first: bool) -> bool:
    """Every `frequency`-th epoch, the first of this training and the last one planned."""
    last = (params or {}).get("epochs")
    return first or (epoch + 1) % frequency == 0 or epoch + 1 == last


def _first_batches(dataset, num_images: int):
    """Yields `(images, boxes)` batches of arrays with `num_images` images at most in total."""
    with value_errors():
        for batch in dataset:
            images, boxes = unpack_labeled_batch(batch)
            count = min(num_images, len(images))
            boxes = {name: np.asarray(values)[:count] for name, values in boxes.items()}
            yield np.asarray(images)[:count], boxes
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


def _summary(result: AveragePrecision, coco: COCOAveragePrecision | None, seconds: float) -> str:
    """One line, and a table for many classes; classes at IoU 0.5:0.95, or the first threshold."""
    num_objects = result.num_objects.sum()
    if not num_objects:
        return f"the validation data has no objects, so mAP is undefined ({seconds:.1f} s)"
    means, averages = _log_values(result, per_class=False), result.average_precision[0]
    if coco is not None:
        sizes = ("AP75", "APsmall", "APmedium", "APlarge")
        means = {"val_mAP": coco.metrics["AP"], **means, **{n: coco.metrics[n] for n in sizes}}
        averages = [np.nan if value is None else value for value in coco.per_class().values()]
    text = ", ".join(f"{name} {_shown(value, 4)}" for name, value in means.items())
    text = f"{text} ({seconds:.1f} s, {num_objects} objects)"
    names = [name.replace("\n", " ") for name in result.class_names]
    values = [_shown(value, 3) for value in averages]
    if len(names) <= MAX_CLASSES_PER_LINE:
        return f"{text}: " + ", ".join(map(" ".join, zip(names, values, strict=True)))
    width = max(map(len, names))
    entries = [f"{n:{width}} {v:>5}" for n, v in zip(names, values, strict=True)]
    columns = max(1, TABLE_WIDTH // (width + 9))
    rows = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    return "\n".join([text, *("  " + "   ".join(row) for row in rows)])


def _shown(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"
