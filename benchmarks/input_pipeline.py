"""Pictures per second of the input pipeline, on generated pictures of 640x480.

Prints, for each number of threads, the speed and the processor time per picture of each step:
decoding JPEG, resizing, the training augmentation, and complete batches (from the memory cache,
and with decoding in every epoch).

    python benchmarks/input_pipeline.py --pictures 400 --threads 1 2
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from keras_resnest.data.augmentation import Resize, TrainingAugmentation
from keras_resnest.data.pipeline import training_batches

DISTINCT = 16  # pictures that are generated; they are repeated to the wanted number


def generated_jpegs(height: int, width: int) -> list[bytes]:
    """Smooth random pictures with some noise, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (DISTINCT, height // 40, width // 40, 3))
    smooth = tf.image.resize(coarse, (height, width), method="bicubic")
    noisy = tf.clip_by_value(smooth + rng.normal(0, 6, smooth.shape), 0, 255)
    return [tf.io.encode_jpeg(tf.cast(image, tf.uint8)).numpy() for image in noisy]


def decoded(jpegs: list[bytes], boxes_per_picture: int, threads: int) -> tf.data.Dataset:
    """Elements as the readers give them; each picture is decoded when it is asked for."""
    height, width = tf.io.decode_jpeg(jpegs[0]).shape[:2]
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 0.8, (len(jpegs), boxes_per_picture, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.05, 0.2, corners.shape)], axis=-1)
    boxes = (boxes * [width, height, width, height]).astype(np.float32)

    def decode(jpeg, boxes):
        labels = tf.zeros([boxes_per_picture], tf.int32)
        rows = {"boxes": boxes, "labels": labels, "difficult": tf.cast(labels, tf.bool)}
        return {
            "images": tf.io.decode_jpeg(jpeg, channels=3),
            "image_id": "",
            "bounding_boxes": rows,
        }

    return tf.data.Dataset.from_tensor_slices((jpegs, boxes)).map(decode, threads)


def measure(dataset: tf.data.Dataset, threads: int, pictures_per_element: int = 1):
    """Returns (pictures per second, processor milliseconds per picture) of one pass."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    iterator = iter(dataset.with_options(options))
    next(iterator)  # starting up, filling caches and buffers
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    for _ in iterator:
        count += pictures_per_element
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return count / wall, 1000 * cpu / count


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=480, help="pictures per measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--source", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--image-shape", type=int, nargs=2, default=[320, 320], metavar=("H", "W"))
    parser.add_argument("--boxes", type=int, default=12, help="boxes per picture")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()

    shape, batch_size = tuple(arguments.image_shape), arguments.batch_size
    repeats = max(1, arguments.pictures // DISTINCT)
    augmentation = TrainingAugmentation(shape)
    jpegs = generated_jpegs(*arguments.source)
    print(f"source {arguments.source}, image_shape {shape}, {arguments.boxes} boxes per picture")
    print(f"{'step':34s}{'threads':>8s}{'pictures/s':>12s}{'CPU ms/picture':>16s}")
    for threads in arguments.threads:
        source = decoded(jpegs, arguments.boxes, threads)
        in_memory = source.cache().repeat(repeats)
        seeds = tf.data.Dataset.random(0).batch(2)
        common = {"cache": False, "shuffle_buffer": 64, "seed": 0, "num_parallel_calls": threads}
        steps = {
            "decode JPEG": (source.repeat(repeats), 1),
            "Resize (evaluation)": (in_memory.map(Resize(shape), threads), 1),
            "TrainingAugmentation": (
                tf.data.Dataset.zip(in_memory, seeds).map(augmentation, threads),
                1,
            ),
            f"training batches of {batch_size}, cached": (
                training_batches(in_memory, shape, batch_size, augmentation, **common),
                batch_size,
            ),
            f"training batches of {batch_size}, decoding": (
                training_batches(source.repeat(repeats), shape, batch_size, augmentation, **common),
                batch_size,
            ),
        }
        for name, (dataset, pictures) in steps.items():
            speed, cpu = measure(dataset, threads, pictures)
            print(f"{name:34s}{threads:8d}{speed:12.0f}{cpu:16.2f}", flush=True)


if __name__ == "__main__":
    main()
