"""Prints, as JSON, the batches of test_epochs.py as another process and two replicas see them.

PYTHONPATH=tests python tests/programs/other_process.py
"""

import json

import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import test_epochs as epochs  # noqa: E402 (the devices come first)


def images_of_replicas() -> list[list[list[int]]]:
    """Indices of the images that each of two replicas gets, batch by batch."""
    batches = epochs.training_batches(
        epochs.plain_dataset(8), epochs.SHAPE, 4, augmentation=None, seed=3, max_boxes=1
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    return [
        [epochs.indices(part) for part in strategy.experimental_local_results(batch["images"])]
        for batch in strategy.experimental_distribute_dataset(batches)
    ]


if __name__ == "__main__":
    digest = epochs.digest(epochs.ssd_batches(num_parallel_calls=1))
    print(json.dumps({"digest": digest, "replicas": images_of_replicas()}))
