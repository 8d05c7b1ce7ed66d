"""Measures the accuracy of training on BCCD from random weights, and compares with YOLOv8n.

DATA is the blood cell dataset (github.com/Shenggan/BCCD_Dataset) in Pascal VOC layout, or `shapes`,
the synthetic images of examples/quickstart.py with their settings. Anchors are fitted only to the
training split; the test split is evaluated once, after training.

    python benchmarks/bccd_accuracy.py --data bccd
    python benchmarks/bccd_accuracy.py --data bccd --model refinedet320_resnest50 --split val
    python benchmarks/bccd_accuracy.py --data bccd --ablation --seeds 1 2 3
    python benchmarks/bccd_accuracy.py --data bccd --ablation paper --seeds 1 2 3
    python benchmarks/bccd_accuracy.py --data shapes --ablation second_stage --decomposition

`--ablation` removes one part of RefineDet at a time; `--ablation paper` one after another, as in
table 3 of the paper; `--ablation second_stage` tries settings of boxes and confidence. CPU seconds
are those of this process, from fitting the anchors to the end of training; latency is the median
time of `predict_on_batch` with one image. A run takes minutes.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages

import keras
import numpy as np

import keras_resnest as kr
from keras_resnest.detection.class_transfer import copy_weights

# ultralytics' YOLOv8n, 3.2 M parameters, from random weights, 320 pixels, batches of 8, measured
# on the test split of the same data on two CPU cores.
YOLOV8N = (
    {
        "variant": "YOLOv8n, 30 epochs",
        "mAP50": 0.597,
        "AP50": {"Platelets": 0.093, "RBC": 0.763, "WBC": 0.936},
        "cpu_seconds": 567,
        "parameters": 3.2e6,
    },
    {
        "variant": "YOLOv8n, 100 epochs",
        "mAP50": 0.872,
        "mAP": 0.546,
        "AP50": {"Platelets": 0.808, "RBC": 0.835, "WBC": 0.971},
        "cpu_seconds": 1860,
        "parameters": 3.2e6,
    },
)

SHAPES = {"epochs": 12, "batch_size": 16, "learning_rate": 4e-3, "image_size": 128}  # quickstart's


def _stages(**switches) -> dict:
    """Switches that loss and decoder share."""
    return {"loss": switches, "decoder": switches}


_ODM_AT_06 = {"odm_matcher": kr.detection.BoxMatcher(0.6)}
_VOTING = {"decoder": {"voting_iou": 0.6}}
_EXCLUSIVE = {**_VOTING["decoder"], "exclusive_classes": True}


# Arguments of heads, loss, decoder and recipe that differ from the published ones, by variant.
_ABLATIONS = {
    "single": {
        "full": {},
        "without negative anchor filtering": _stages(negative_anchor_filtering=False),
        "without two-step regression": _stages(two_step_regression=False),
        "without TCB": {"heads": {"use_transfer_connection": False}},
    },
    "paper": {
        "full": {},
        "without negative anchor filtering": _stages(negative_anchor_filtering=False),
        "... and two-step regression": _stages(
            negative_anchor_filtering=False, two_step_regression=False
        ),
        "... and TCB": {
            **_stages(negative_anchor_filtering=False, two_step_regression=False),
            "heads": {"use_transfer_connection": False},
        },
    },
    "second_stage": {
        "full": {},
        "without two-step regression": _stages(two_step_regression=False),
        "ODM matched at IoU 0.6": {"loss": _ODM_AT_06},
        "ODM matched at IoU 0.7": {"loss": {"odm_matcher": kr.detection.BoxMatcher(0.7)}},
        "ATSS": {"loss": {"matcher": kr.detection.ATSSMatcher()}},
        "GIoU": {"loss": {"box_loss": "giou", "box_loss_weight": 2.0}},
        "smooth L1 with a knee of 0.1": {"loss": {"smooth_l1_knee": 0.1}},
        "predicted IoU": {"heads": {"predict_iou": True}},
        "aligned": {"heads": {"use_alignment": True}},
        "averaged weights": {"recipe": {"ema_momentum": 0.99}},
        "joint regression": {"loss": {"joint_regression": True}},
        "box voting": _VOTING,
        "box voting, exclusive classes": {"decoder": _EXCLUSIVE},
        "box voting, class-agnostic": {"decoder": {"class_agnostic": True, **_VOTING["decoder"]}},
        "box voting, joint regression": {"loss": {"joint_regression": True}, **_VOTING},
        "box voting, ODM matched at IoU 0.6": {"loss": _ODM_AT_06, **_VOTING},
        "all of refinedet_tiny's": {"loss": _ODM_AT_06, "decoder": _EXCLUSIVE},
        "box voting without two-step regression": {
            "loss": {"two_step_regression": False},
            "decoder": {"two_step_regression": False, **_VOTING["decoder"]},
        },
    },
}


def _published(heads=None, loss=None, decoder=None, recipe=None) -> dict:
    """Options of a variant, whose second stage is as published where they say nothing else."""
    return {
        "heads": heads or {},
        "loss": {"odm_matcher": None, **(loss or {})},
        "decoder": {"voting_iou": None, "exclusive_classes": False, **(decoder or {})},
        "recipe": recipe or {},
    }


ABLATIONS = {"none": {"as built": {}}} | {
    kind: {variant: _published(**options) for variant, options in rows.items()}
    for kind, rows in _ABLATIONS.items()
}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="BCCD in Pascal VOC layout, or shapes")
    add("--split", default="test", help="split that is measured (default: %(default)s)")
    add(
        "--model",
        default="refinedet_tiny",
        choices=sorted(kr.builders.BUILDERS),
        help="default: %(default)s",
    )
    add("--epochs", type=int, default=30, help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[1], help="one training each (default: 1)")
    add(
        "--ablation",
        nargs="?",
        default="none",
        const="single",
        choices=sorted(ABLATIONS),
        help="single: one part off at a time; paper: one after the other (table 3); "
        "second_stage: settings of boxes and confidence",
    )
    add("--batch-size", type=int, default=8, help="default: %(default)s")
    add("--learning-rate", type=float, default=1e-3, help="highest (default: %(default)s)")
    add("--image-size", type=int, default=320, metavar="PIXELS", help="default: %(default)s")
    add("--anchors", choices=("fitted", "default"), default="fitted", help="default: %(default)s")
    add("--max-images", type=int, metavar="N", help="of each split, to try the program out")
    add("--dtype", help='precision, such as "mixed_bfloat16"')
    add("--ema-momentum", type=float, help="of a moving average of the weights, such as 0.998")
    add("--decomposition", action="store_true", help="print the oracle table of the last run")
    add("--verbose", type=int, default=2, help="of fit (default: one line per epoch)")
    add("--output", type=Path, default=Path("runs/bccd.json"), help="default: %(default)s")
    if parser.parse_args(arguments).data == "shapes":
        parser.set_defaults(**SHAPES)
    return parser.parse_args(arguments)


def read_data(arguments):
    """Training set and measured set."""
    if arguments.data == "shapes":
        size, count = arguments.image_size, arguments.max_images
        first = f"[:{count}]" if count else ""
        splits = ("train", arguments.split)
        return tuple(kr.data.read_shapes(split + first, size=size) for split in splits)
    train = kr.data.read_voc(arguments.data, "train")
    test = kr.data.read_voc(arguments.data, arguments.split, train.class_names)
    if arguments.max_images:
        train, test = (
            kr.data.DetectionDataset(d.records[: arguments.max_images], d.class_names)
            for d in (train, test)
        )
    return train, test


def build(arguments, train, switches: dict, steps_per_epoch: int) -> kr.RefineDet:
    """The compiled detector with one set of switches."""
    shape = (arguments.image_size, arguments.image_size, 3)
    generator = kr.detection.AnchorGenerator()
    if arguments.anchors == "fitted":
        generator = kr.detection.fit_anchors(train, shape)
    row = kr.builders.BUILDERS[arguments.model]
    options = {part: switches.get(part, {}) for part in ("heads", "loss", "decoder", "recipe")}
    model = getattr(kr.builders, arguments.model)(
        num_classes=len(train.class_names),
        image_shape=shape,
        class_names=train.class_names,
        anchor_generator=generator,
        # Random weights need batch normalization.
        heads=kr.detection.RefineDetHeads(
            **{**row.heads, "use_batch_norm": True, **options["heads"]}
        ),
        detection_loss=kr.detection.RefineDetLoss(**{**row.loss, **options["loss"]}),
        decoder=kr.detection.DetectionDecoder(**{**row.decoder, **options["decoder"]}),
        dtype=arguments.dtype,
    )
    given = {"learning_rate": arguments.learning_rate, "batch_size": arguments.batch_size}
    if arguments.ema_momentum:
        given["ema_momentum"] = arguments.ema_momentum
    recipe = kr.recipes.RECIPES["detector_from_scratch"]
    recipe = dataclasses.replace(recipe, **{**given, **options["recipe"]})
    recipe = recipe.scaled(arguments.batch_size, steps_per_epoch, arguments.epochs)
    # Rounded down, as in the trainings whose results are published.
    recipe = dataclasses.replace(recipe, warmup=max(1, recipe.duration // 20))
    model.compile(recipe.optimizer())
    return model


def most_boxes(dataset) -> int | None:
    """One shape for all batches where XLA would compile each shape anew."""
    if keras.backend.backend() == "tensorflow":
        return None
    return max(len(record.boxes) for record in dataset.records)


def augmentation(data: str, shape) -> kr.data.TrainingAugmentation:
    flip = kr.data.RandomFlip(vertical=0.5)  # neither cells nor shapes have up and down
    if data == "shapes":  # with this many images, no other augmentation helps
        options = {"photometric": None, "expand": None, "crop": None}
    else:
        options = {
            "expand": kr.data.RandomExpand(max_ratio=1.5, probability=0.3),
            "crop": kr.data.RandomIoUCrop(min_ious=(None, 0.5, 0.7, 0.9), scale=(0.5, 1.0)),
        }
    return kr.data.TrainingAugmentation(shape, flip=flip, **options)


def latency(model: kr.RefineDet) -> float:
    """Median milliseconds of `predict_on_batch` with one image."""
    image = np.random.default_rng(0).uniform(0, 255, (1, *model.image_shape)).astype("float32")
    times = []
    for _ in range(33):
        begin = time.perf_counter()
        model.predict_on_batch(image)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[3:])  # the first calls trace and warm up


def train_detector(
    arguments, train, switches: dict, seed: int, start_from: kr.RefineDet | None = None
) -> kr.RefineDet:
    """One training, from random weights or from those of a detector for other classes."""
    keras.utils.set_random_seed(seed)
    steps_per_epoch = max(1, len(train) // arguments.batch_size)
    model = build(arguments, train, switches, steps_per_epoch)
    if start_from is not None:
        copy_weights(start_from, model, [None] * model.num_classes)
    batches = kr.data.training_batches(
        train,
        model.image_shape,
        arguments.batch_size,
        augmentation(arguments.data, model.image_shape),
        seed=seed,
        max_boxes=most_boxes(train),
        **switches.get("batches", {}),
    )
    options = {"epochs": arguments.epochs, "verbose": arguments.verbose}
    # Repeated images make an epoch of the data longer, not the training.
    model.fit(batches, steps_per_epoch=steps_per_epoch, **options)
    return model


def false_positives(voc: kr.evaluation.AveragePrecision, confidence: float = 0.3) -> float:
    """Number of false detections of at least this confidence."""
    kept = [np.count_nonzero(curve["confidence"] >= confidence) for curve in voc.curves[0]]
    rows = [(n, c["precision"][n - 1]) for n, c in zip(kept, voc.curves[0], strict=True) if n]
    return sum(n * (1.0 - precision) for n, precision in rows)


def train_and_measure(
    arguments, train, test, switches: dict, seed: int, start_from: kr.RefineDet | None = None
) -> tuple[dict, tuple]:
    """One training: its figures, and the ground truth and detections."""
    start, cpu_start = time.perf_counter(), time.process_time()
    model = train_detector(arguments, train, switches, seed, start_from)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start

    evaluation = kr.data.evaluation_batches(test, model.image_shape, arguments.batch_size)
    pair = kr.evaluation.collect_detections(model, evaluation)
    voc = kr.evaluation.voc_average_precision(*pair, model.class_names)
    coco = kr.evaluation.coco_average_precision(*pair, model.class_names)
    figures = {
        "seed": seed,
        "mAP50": float(voc.mAP),
        "mAP75": float(coco.metrics["AP75"]),
        "mAP": float(coco.metrics["AP"]),
        "AP50": dict(zip(voc.class_names, voc.average_precision[0].tolist(), strict=True)),
        "AP": coco.per_class(),
        "false_positives": false_positives(voc) / len(test),
        "cpu_seconds": round(cpu_seconds, 1),
        "wall_seconds": round(seconds, 1),
        "latency_ms": round(latency(model), 2),
        "parameters": model.count_params(),
        "anchor_sizes": model.anchor_generator.sizes,
    }
    return figures, pair


def summary(variant: str, runs: list[dict]) -> dict:
    """Means over the seeds, and the standard deviations of mAP@0.5 and mAP@[.5:.95]."""
    averaged = ("mAP50", "mAP75", "mAP", "false_positives", "cpu_seconds", "latency_ms")
    row = {name: statistics.fmean(r[name] for r in runs) for name in averaged}
    if len(runs) > 1:
        row |= {
            f"{name}_spread": statistics.stdev(r[name] for r in runs) for name in ("mAP50", "mAP")
        }
    row["AP50"] = {n: statistics.fmean(r["AP50"][n] for r in runs) for n in runs[0]["AP50"]}
    return {"variant": variant, **row, "parameters": runs[0]["parameters"], "runs": runs}


def table(rows, class_names) -> str:
    figures = {
        "mAP50": "mAP@0.5",
        "mAP50_spread": "+-",
        "mAP75": "mAP@0.75",
        "mAP": "mAP@[.5:.95]",
        "mAP_spread": "+-",
        "false_positives": "false/image",
    }
    head = ["", *figures.values(), *class_names, "CPU s", "latency ms", "parameters"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        values = [*map(row.get, figures), *(row["AP50"][n] for n in class_names)]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        cells.append(f"{row['cpu_seconds']:.0f}")
        cells.append(f"{row['latency_ms']:.1f}" if "latency_ms" in row else "")
        lines.append(" | ".join([row["variant"], *cells, f"{row['parameters'] / 1e6:.2f} M"]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    arguments = parse_arguments()
    train, test = read_data(arguments)
    title = f"{arguments.model}, {arguments.epochs} epochs"
    rows = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for variant, switches in ABLATIONS[arguments.ablation].items():
        runs = []
        for seed in arguments.seeds:
            figures, pair = train_and_measure(arguments, train, test, switches, seed)
            runs.append(figures)
            print(f"{variant}, seed {seed}: {json.dumps(runs[-1])}", flush=True)
            keras.backend.clear_session()
            gc.collect()
        rows.append(summary(f"{title}, {variant}", runs))
        result = {"arguments": vars(arguments), "rows": rows, "yolov8n": YOLOV8N}
        # After every variant: a run that is stopped keeps what it has.
        arguments.output.write_text(json.dumps(result, indent=2, default=str))
    print(f"{arguments.data}, {arguments.split} split, {len(test)} images, seeds {arguments.seeds}")
    others = YOLOV8N if arguments.split == "test" and arguments.data != "shapes" else ()
    print(table([*rows, *others], train.class_names))
    if arguments.decomposition:
        print(kr.evaluation.oracle_decomposition(*pair, train.class_names))
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
