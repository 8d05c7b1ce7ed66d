"""Measures the images per second of the input pipeline, on generated images of 640 x 480.

Prints, for each number of threads, the speed and the processor time per image of each step:
decoding JPEG, resizing, the training augmentation, and complete batches (from the memory cache,
and with decoding in every epoch; with mosaic and mixup; with sizes drawn for each batch).

With --feed, measures whether the pipeline keeps up with a training step of `refinedet_tiny`. Steps
on batches of the pipeline and on one constant batch take turns; their best rounds are compared. A
ratio near 1 means that the step never waits. (On a CPU, both share the cores.)

    python benchmarks/input_pipeline.py --images 400 --threads 1 2
    python benchmarks/input_pipeline.py --feed --batch-size 8 --steps 20
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from keras_resnest.data.augmentation.detection import Resize, TrainingAugmentation
from keras_resnest.data.augmentation.mixing import MixUp, Mosaic
from keras_resnest.data.batches import training_batches

UNMEASURED = 4  # first steps of a round: their batches were prepared while the others ran
DISTINCT = 16  # images that are generated; they are repeated to the wanted number


def generated_jpegs(height: int, width: int) -> list[bytes]:
    """Smooth random images with some noise, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (DISTINCT, height // 40, width // 40, 3))
    smooth = tf.image.resize(coarse, (height, width), method="bicubic")
    noisy = tf.clip_by_value(smooth + rng.normal(0, 6, smooth.shape), 0, 255)
    return [tf.io.encode_jpeg(tf.cast(image, tf.uint8)).numpy() for image in noisy]


def decoded(jpegs: list[bytes], boxes_per_image: int, threads: int) -> tf.data.Dataset:
    """Elements as the readers give them; each image is decoded when it is asked for."""
    height, width = tf.io.decode_jpeg(jpegs[0]).shape[:2]
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 0.8, (len(jpegs), boxes_per_image, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.05, 0.2, corners.shape)], axis=-1)
    boxes = (boxes * [width, height, width, height]).astype(np.float32)

    def decode(jpeg, boxes):
        labels = tf.zeros([boxes_per_image], tf.int32)
        rows = {"boxes": boxes, "labels": labels, "difficult": tf.cast(labels, tf.bool)}
        return {
            "images": tf.io.decode_jpeg(jpeg, channels=3),
            "image_id": "",
            "bounding_boxes": rows,
        }

    return tf.data.Dataset.from_tensor_slices((jpegs, boxes)).map(decode, threads)


def measure(dataset: tf.data.Dataset, threads: int, images_per_element: int = 1):
    """Returns (images per second, processor milliseconds per image) of one pass."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    iterator = iter(dataset.with_options(options))
    next(iterator)  # starting up, filling caches and buffers
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    for _ in iterator:
        count += images_per_element
    if not count:
        raise SystemExit("--images must be several times --batch-size: nothing is left to time")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return count / wall, 1000 * cpu / count


def print_speeds(arguments):
    """The table of steps of the pipeline."""
    shape, batch_size = tuple(arguments.image_shape), arguments.batch_size
    repeats = max(1, arguments.images // DISTINCT)
    augmentation = TrainingAugmentation(shape)
    jpegs = generated_jpegs(*arguments.source)
    print(f"source {arguments.source}, image_shape {shape}, {arguments.boxes} boxes per image")
    print(f"{'step':34s}{'threads':>8s}{'images/s':>12s}{'CPU ms/image':>16s}")
    for threads in arguments.threads:
        source = decoded(jpegs, arguments.boxes, threads)
        in_memory = source.cache().repeat(repeats)
        seeds = tf.data.Dataset.random(0).batch(2)
        common = {"cache": False, "shuffle_buffer": 64, "seed": 0, "num_parallel_calls": threads}
        sizes = [(side * shape[0] // 4, side * shape[1] // 4) for side in (3, 4, 5)]

        def batches(dataset, common=common, **options):
            made = training_batches(dataset, shape, batch_size, augmentation, **common, **options)
            return made, batch_size

        steps = {
            "decode JPEG": (source.repeat(repeats), 1),
            "Resize (evaluation)": (in_memory.map(Resize(shape), threads), 1),
            "TrainingAugmentation": (
                tf.data.Dataset.zip(in_memory, seeds).map(augmentation, threads),
                1,
            ),
            f"training batches of {batch_size}, cached": batches(in_memory),
            "  with mosaic and mixup": batches(in_memory, mosaic=Mosaic(), mixup=MixUp()),
            "  with 3 sizes": batches(in_memory, image_sizes=sizes),
            f"training batches of {batch_size}, decoding": batches(source.repeat(repeats)),
        }
        for name, (dataset, images) in steps.items():
            speed, cpu = measure(dataset, threads, images)
            print(f"{name:34s}{threads:8d}{speed:12.0f}{cpu:16.2f}", flush=True)


def print_feed(arguments):
    """Time of a training step with the pipeline, and with one batch that is always there."""
    import keras_resnest as kr

    shape, batch_size = tuple(arguments.image_shape), arguments.batch_size
    source = decoded(generated_jpegs(*arguments.source), arguments.boxes, tf.data.AUTOTUNE)
    batches = training_batches(
        source.repeat(),
        shape,
        batch_size,
        TrainingAugmentation(shape),
        cache=False,  # every image is decoded when it is needed: the dearest case
        seed=0,
        max_boxes=arguments.boxes,
    )
    fixed = tf.data.Dataset.from_tensors(next(iter(batches))).repeat()
    model = kr.builders.refinedet_tiny(num_classes=1, image_shape=(*shape, 3))
    model.compile("sgd")
    sources = {"fixed batch": iter(fixed), "pipeline": iter(batches)}
    for iterator in sources.values():
        model.fit(next(iterator), epochs=1, verbose=0)  # tracing
    train = model.make_train_function()
    seconds = {name: [] for name in sources}
    for _ in range(arguments.rounds):
        for name, iterator in sources.items():
            for _ in range(UNMEASURED):
                train(iterator)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                logs = train(iterator)
            float(logs["loss"])  # waits for the device
            seconds[name].append((time.perf_counter() - start) / arguments.steps)
    best = {name: min(values) for name, values in seconds.items()}  # least disturbed by others
    for name, value in best.items():
        print(f"{name:12s} {1000 * value:8.1f} ms/step {batch_size / value:8.1f} images/s")
    print(f"ratio pipeline / fixed batch: {best['pipeline'] / best['fixed batch']:.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=480, help="images per measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--source", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--image-shape", type=int, nargs=2, default=[320, 320], metavar=("H", "W"))
    parser.add_argument("--boxes", type=int, default=12, help="boxes per image")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--feed", action="store_true", help="compare with a training step")
    parser.add_argument("--steps", type=int, default=10, help="steps per round of --feed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of --feed")
    arguments = parser.parse_args()
    print_feed(arguments) if arguments.feed else print_speeds(arguments)


if __name__ == "__main__":
    main()
