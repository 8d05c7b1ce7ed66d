"""Order and augmentation of every epoch, resuming, and shards for workers."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnest.data import DetectionDataset, ImageRecord, set_epoch
from keras_resnest.data.augmentation.detection import Resize, TrainingAugmentation
from keras_resnest.data.augmentation.mixing import MixUp, Mosaic
from keras_resnest.data.batches import training_batches
from keras_resnest.data.epochs import EpochCounter, fold_in

SHAPE = (32, 48)


def records(count=11):
    """Images of noise, all different, with none to three boxes."""
    rng = np.random.default_rng(0)
    return [
        ImageRecord(
            image=rng.integers(0, 256, (30, 40 + i, 3), dtype="uint8"),
            image_id=f"{i:02d}",
            boxes=[[5 + k, 4, 25 + k, 24] for k in range(i % 4)],
            labels=[k % 2 for k in range(i % 4)],
        )
        for i in range(count)
    ]


def dataset(count=11):
    return DetectionDataset(records(count), ["a", "b"])


def images_and_boxes(batch):
    return batch["images"], batch["bounding_boxes"]["boxes"]


def one_pass(batches):
    return [np.asarray(leaf) for batch in batches for leaf in tf.nest.flatten(batch)]


def same(first, second):
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(first, second, strict=True)
    )


def plain_dataset(count):
    """Image i has the color 10 i and one box."""
    return DetectionDataset(
        [
            ImageRecord(np.full((30, 40, 3), 10 * i, "uint8"), str(i), [[5, 5, 20, 20]], [0])
            for i in range(count)
        ],
        ["a"],
    )


def indices(images):
    """Which images of `plain_dataset` these are."""
    return [round(float(np.mean(image)) / 10) for image in images]


def ssd_batches(**options):
    augmentation = TrainingAugmentation(SHAPE)
    return training_batches(dataset(), SHAPE, 3, augmentation, seed=4, initial_epoch=2, **options)


def digest(batches):
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in one_pass(batches))).hexdigest()


def drawn(element, seed, image_size=SHAPE):
    """A fast augmentation: a random brightness."""
    element = Resize(SHAPE)(element, image_size=tf.stack(image_size))
    return dict(element, images=element["images"] * tf.random.stateless_uniform([], seed))


VARIANTS = {
    "cached": {"augmentation": TrainingAugmentation(SHAPE)},
    "files": {"cache": "files"},
    "uncached": {"cache": False},
    "in order": {"shuffle_buffer": 0},
    "small buffer, last batch": {"shuffle_buffer": 4, "drop_remainder": False},
    "mixed": {"mosaic": Mosaic(0.5), "mixup": MixUp(0.5)},
    "repeated": {"repeat_threshold": 1.0},
    "repeated, uncached": {"repeat_threshold": 1.0, "cache": False},
    "sizes": {"image_sizes": [(32, 32), (32, 64), (64, 48)]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_epochs_are_the_same_bit_for_bit(name, tmp_path):
    def make(run, **options):
        options = {"augmentation": drawn, **VARIANTS[name], **options}
        if options.get("cache") == "files":
            options["cache"] = str(tmp_path / run)
        return training_batches(dataset(), SHAPE, 3, seed=4, **options)

    whole = make("whole")
    epochs = [one_pass(whole) for _ in range(4)]
    assert not any(same(a, b) for i, a in enumerate(epochs) for b in epochs[:i])
    tf.random.set_seed(99)  # global seeds do not matter
    keras.utils.set_random_seed(0)
    resumed = make("resumed", initial_epoch=2)
    assert same(one_pass(resumed), epochs[2]) and same(one_pass(resumed), epochs[3])
    # Resumed within an epoch, and after an interrupted pass:
    set_epoch(resumed, 1)
    leaves = len(epochs[1]) // len(resumed)
    assert same(one_pass(resumed.skip(2)), epochs[1][2 * leaves :])
    set_epoch(whole, 1)
    next(iter(whole))
    assert same(one_pass(whole), epochs[1]) and same(one_pass(whole), epochs[1])


@pytest.fixture(scope="module")
def other_process():
    """What programs/other_process.py prints."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    environment["CUDA_VISIBLE_DEVICES"] = "-1"
    command = [sys.executable, str(tests / "programs" / "other_process.py")]
    output = subprocess.check_output(command, text=True, env=environment, timeout=300)
    return json.loads(output.splitlines()[-1])


def test_another_process_and_another_thread_count_give_the_same(other_process):
    assert other_process["digest"] == digest(ssd_batches())


def test_two_replicas_divide_each_batch(other_process):
    replicas = other_process["replicas"]
    assert all(len(part) == 2 for batch in replicas for part in batch)
    assert sorted(i for batch in replicas for part in batch for i in part) == list(range(8))


def test_uncached_images_are_shuffled_all_at_once():
    """Not through a buffer of 512, from which no late image would come early."""
    many = [
        ImageRecord(np.zeros((1, 1300, 3), "uint8"), f"{i}", [[i, 0, i + 50, 1]], [0])
        for i in range(1200)
    ]
    batches = training_batches(
        DetectionDataset(many, ["a"]), (1, 1300), 60, augmentation=None, seed=1, cache=False
    )
    epoch = [np.round(b["bounding_boxes"]["boxes"][:, 0, 0].numpy()).astype(int) for b in batches]
    assert sorted(np.concatenate(epoch)) == list(range(1200))
    assert (epoch[0] > 900).sum() > 5 and (epoch[-1] < 300).sum() > 5


def test_an_augmentation_depends_on_the_image_not_on_its_place():
    """The same draws for an image at any place in the epoch, other draws for other images."""

    def draws(**options):
        seen = {}

        def own(element, seed):
            color = tf.random.stateless_uniform([1, 1, 3], seed) * 255.0
            return dict(element, images=tf.broadcast_to(color, [*SHAPE, 3]))

        # A box identifies the image: x1 is its index.
        made = [
            ImageRecord(np.zeros((30, 60, 3), "uint8"), f"{i}", [[i, 0, i + 9, 9]], [0])
            for i in range(9)
        ]
        batches = training_batches(DetectionDataset(made, ["a"]), SHAPE, 3, own, seed=4, **options)
        for batch in batches:
            for image, boxes in zip(*images_and_boxes(batch), strict=True):
                seen[round(float(boxes[0, 0]))] = image.numpy()[0, 0].tolist()
        return seen

    shuffled, in_order = draws(), draws(shuffle_buffer=0)
    assert shuffled == in_order and len({tuple(v) for v in shuffled.values()}) == 9
    assert draws(initial_epoch=1) != shuffled


def test_fit_with_set_epoch_sees_the_epochs_of_fit():
    """Passes of `fit` over the dataset outside its epochs make no difference."""
    seen = []

    class Recorder(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(1)

        def train_step(self, data):
            total = tf.reduce_sum(tf.cast(data["images"], tf.float64))
            tf.numpy_function(lambda value: seen.append(float(value)), [total], [])
            return {"loss": total}

    batches = training_batches(dataset(), SHAPE, 3, drawn, seed=4)
    expected = []
    for _ in range(3):
        expected.append([float(np.sum(b["images"].numpy().astype("float64"))) for b in batches])
    callback = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: set_epoch(batches, epoch)
    )
    model = Recorder()
    model.compile("sgd")
    list(batches)  # a pass outside `fit`
    model.fit(batches, initial_epoch=1, epochs=3, callbacks=[callback], verbose=0)
    np.testing.assert_allclose(np.reshape(seen, (2, -1)), expected[1:], rtol=1e-12)


def test_counter_and_errors():
    counter = EpochCounter(3)
    assert [counter.next_epoch() for _ in range(3)] == [3, 4, 5]
    counter.set_epoch(1)
    assert [counter.next_epoch() for _ in range(2)] == [1, 1]
    for wrong in (-1, 1.5, None, True):
        with pytest.raises(ValueError, match=r"`initial_epoch`.*Received"):
            training_batches(dataset(), SHAPE, 3, initial_epoch=wrong)
    batches = training_batches(dataset(), SHAPE, 3, augmentation=None)
    with pytest.raises(ValueError, match="`epoch` must be"):
        set_epoch(batches, -1)
    with pytest.raises(ValueError, match="`batches` must be"):
        set_epoch(batches.take(1), 1)


def test_fold_in_gives_different_seeds_for_different_numbers():
    base = tf.constant([5, 0], tf.int64)
    numbers = [(i, j) for i in range(40) for j in (0, 1, -1, 2**62 - 1)]
    seeds = {tuple(fold_in(base, *n).numpy().tolist()) for n in numbers}
    assert len(seeds) == len(numbers)
    draws = [float(tf.random.stateless_uniform([], fold_in(base, i, 3))) for i in range(400)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.06)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.15


# === Shards ===


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 11])
def test_shards_are_disjoint_complete_and_of_equal_size(num_shards):
    shards = [dataset().shard(num_shards, i) for i in range(num_shards)]
    ids = [[record.image_id for record in shard.records] for shard in shards]
    together = [image_id for shard in ids for image_id in shard]
    assert sorted(together) == [f"{i:02d}" for i in range(11)]
    assert max(map(len, ids)) - min(map(len, ids)) <= 1
    assert all(shard.class_names == ["a", "b"] for shard in shards)
    assert sum(shard.report.num_boxes for shard in shards) == dataset().report.num_boxes
    again = [dataset().shard(num_shards, i) for i in range(num_shards)]
    assert [[record.image_id for record in shard.records] for shard in again] == ids
    assert {shard.smallest_shard for shard in shards} == {min(map(len, ids))}


def test_shard_of_a_shard():
    parts = [dataset().shard(2, i).shard(3, j) for i in range(2) for j in range(3)]
    assert sorted(r.image_id for part in parts for r in part.records) == [
        record.image_id for record in dataset().records
    ]
    assert all(part.smallest_shard == min(map(len, parts)) for part in parts)


@pytest.mark.parametrize(
    ("batch_size", "drop_remainder"), [(1, True), (2, True), (1, False), (3, False)]
)
def test_workers_make_the_same_number_of_steps(batch_size, drop_remainder):
    # 11 images on 4 workers: 3, 3, 3, and 2
    steps = set()
    for worker in range(4):
        batches = training_batches(
            dataset().shard(4, worker),
            SHAPE,
            batch_size,
            augmentation=None,
            seed=1,
            drop_remainder=drop_remainder,
        )
        passes = [len(list(batches)) for _ in range(2)]
        assert passes[0] == passes[1] == len(batches)
        steps.add(passes[0])
    expected = 2 // batch_size if drop_remainder else -(-2 // batch_size)
    assert steps == {expected}


def test_smallest_shard_without_a_full_batch_is_an_error():
    with pytest.raises(ValueError, match=r"at least 3 image.*smallest shard of 2"):
        training_batches(dataset().shard(4, 0), SHAPE, 3)


def test_wrong_shards():
    with pytest.raises(ValueError, match=r"`num_shards`.*images, 11.*Received: num_shards=12"):
        dataset().shard(12, 0)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"`shard_index`.*shard_index={index}"):
            dataset().shard(2, index)
