"""Weights of classes, repeat factors, and epochs that repeat images, against their formulas."""

import collections
import math

import numpy as np
import pytest
import tensorflow as tf

from keras_resnest.data import (
    ClassificationDataset,
    DetectionDataset,
    ImageRecord,
    LabeledImage,
    class_weights,
    repeat_factors,
)
from keras_resnest.data.batches import training_batches
from keras_resnest.data.epochs import epoch_length, round_at_random
from keras_resnest.images import ImageInfo

SHAPE = (64, 64)
NAMES = ["common", "rare", "rarest", "absent"]
# "rare" is in 3 of 24 images, once as a difficult object, "rarest" in one of them.
LABELS = [[0, 0], [0, 1], [1, 1, 2], [0], [], [1]] + [[0]] * 18
DIFFICULT = {5: [True]}


def dataset(labels=LABELS):
    """The left edge of its first box tells which image it is."""
    records = [
        ImageRecord(
            np.zeros((64, 64, 3), "uint8"),
            f"{i}",
            [[i, 0, i + 9, 9] for _ in own],
            own,
            DIFFICULT.get(i),
        )
        for i, own in enumerate(labels)
    ]
    return DetectionDataset(records, NAMES)


def factor_by_hand(labels, all_labels, threshold):
    """Gupta et al., eq. 1, for one image."""
    found = [sum(c in own for own in all_labels) / len(all_labels) for c in range(len(NAMES))]
    return max([max(1.0, math.sqrt(threshold / found[c])) for c in labels], default=1.0)


# === Weights ===


def test_balanced_weights():
    counts = collections.Counter(label for own in LABELS for label in own)
    weights = class_weights(dataset())
    assert weights == pytest.approx([counts.total() / (3 * counts[c]) for c in range(3)] + [1.0])
    assert sum(weights[c] * counts[c] for c in range(3)) == pytest.approx(counts.total())


@pytest.mark.parametrize("beta", [0.5, 0.999, 1 - 1e-9])
def test_effective_weights(beta):
    """The effective number is a geometric series, and the sum the number of classes."""
    counts = collections.Counter(label for own in LABELS for label in own)
    numbers = [sum(beta**j for j in range(counts[c])) for c in range(3)]
    scale = 3 / sum(1 / n for n in numbers)
    want = [scale / n for n in numbers] + [1.0]
    assert class_weights(dataset(), "effective", beta) == pytest.approx(want, rel=1e-6)


def test_weights_by_name_and_of_shards():
    assert class_weights(dataset(), {"rarest": 4.0, "common": 0}) == [0, 1.0, 4.0, 1.0]
    assert class_weights(dataset().shard(3, 1).shard(2, 0)) == class_weights(dataset())
    assert class_weights(dataset([[], []])) == [1.0] * 4


def test_weights_of_a_classification_dataset():
    images = [LabeledImage(b"", f"{i}", i // 3, ImageInfo(9, 9)) for i in range(4)]
    assert class_weights(ClassificationDataset(images, ["a", "b"])) == pytest.approx([2 / 3, 2.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((tf.data.Dataset.range(3),), "`dataset` must be DetectionDataset"),
        (
            (dataset(), "inverse"),
            "`method` must be 'balanced' or 'effective', or a dict.*'inverse'",
        ),
        ((dataset(), [1.0, 2.0]), "`method` must be"),
        ((dataset(), {"rares": 2.0}), "'rares'. Nearest: 'rarest', 'rare'"),
        ((dataset(), "effective", 1.0), "`beta` must be above 0 and below 1.*1.0"),
    ],
)
def test_wrong_arguments_of_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_weights(*arguments)


# === Repeat factors ===


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 1.0])
def test_repeat_factors(threshold):
    want = [factor_by_hand(own, LABELS, threshold) for own in LABELS]
    np.testing.assert_allclose(repeat_factors(dataset(), threshold), want, rtol=1e-12)
    easy = [[] if i in DIFFICULT else own for i, own in enumerate(LABELS)]
    want = [factor_by_hand(own, easy, threshold) for own in easy]
    np.testing.assert_allclose(repeat_factors(dataset(), threshold, False), want, rtol=1e-12)


def test_shards_have_the_factors_of_the_whole():
    for i in range(3):
        part = repeat_factors(dataset().shard(3, i), 0.5)
        assert part.tolist() == repeat_factors(dataset(), 0.5)[i::3].tolist()


# === Epochs ===


def make_batches(threshold=0.5, data=None, batch_size=1, **options):
    options = {"augmentation": None, "seed": 3, "repeat_threshold": threshold, **options}
    return training_batches(data or dataset(), SHAPE, batch_size, **options)


def images_of(batches):
    """Which images an epoch shows; the one without objects is -1."""
    shown = []
    for batch in batches:
        rows = batch["bounding_boxes"]
        shown += np.where(rows["labels"] < 0, -1, np.round(rows["boxes"][:, :, 0]))[:, 0].tolist()
    return [int(i) for i in shown]


def test_fractions_are_rounded_up_as_often_as_they_say():
    repeats = np.random.default_rng(0).uniform(1, 4, 30)
    rounded = tf.function(lambda seed: round_at_random(repeats, seed))
    draws = np.array([rounded(tf.constant([5, i], tf.int64)) for i in range(1000)])
    assert {row.sum() for row in draws} == {math.floor(repeats.sum())} == {epoch_length(repeats)}
    np.testing.assert_allclose(draws.mean(axis=0), repeats, atol=0.07)
    assert (draws <= np.ceil(repeats)).all()
    # One item, a random one, may lack a copy, so that all epochs are equally long.
    lacking = np.floor(repeats) - draws
    assert lacking.max() <= 1 and (lacking > 0).sum(axis=1).max() == 1
    assert np.abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.15


@pytest.mark.parametrize("options", [{}, {"cache": False}, {"shuffle_buffer": 0}])
def test_epochs_repeat_images(options):
    want = {i: factor_by_hand(own, LABELS, 0.5) for i, own in enumerate(LABELS) if own}
    want[-1] = 1.0  # image 4
    batches = make_batches(batch_size=14, **options)
    assert len(batches) == 2 and math.floor(sum(want.values())) == 28
    epochs = [collections.Counter(images_of(batches)) for _ in range(8)]
    assert {epoch.total() for epoch in epochs} == {28}
    for i, factor in want.items():
        counts = [epoch[i] for epoch in epochs]
        assert math.floor(factor) - 1 <= min(counts) <= max(counts) == math.ceil(factor)
    assert len({epoch[2] for epoch in epochs}) == 2  # 3 and 4 times


def test_copies_are_spread_over_the_epoch_and_augmented_on_their_own():
    def colored(element, seed):
        color = tf.random.stateless_uniform([1, 1, 3], seed) * 255.0
        return dict(element, images=tf.broadcast_to(color, [*SHAPE, 3]))

    epoch = list(make_batches(augmentation=colored))
    assert len({batch["images"].numpy()[0, 0, 0].tobytes() for batch in epoch}) == len(epoch)
    places = np.flatnonzero(np.array(images_of(epoch)) == 2)  # of the rarest class
    assert len(places) >= 3 and np.diff(places).max() > 1


def test_without_repetitions_the_epoch_is_the_usual_one():
    """No class is rare: the same images in the same order with the same augmentation."""
    usual, repeated = (
        list(make_batches(threshold, augmentation="flip")) for threshold in (None, 1e-3)
    )
    for a, b in zip(usual, repeated, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


def test_difficult_boxes_do_not_count_if_they_are_dropped():
    """Image 5 has only a difficult object, so that its class is none of the epoch."""
    easy = [[] if i in DIFFICULT else own for i, own in enumerate(LABELS)]
    batches = make_batches(use_difficult=False)
    length = math.floor(sum(factor_by_hand(own, easy, 0.5) for own in easy))
    assert len(batches) == len(images_of(batches)) == length


def test_workers_make_the_same_number_of_steps():
    """Although one shard has all rare classes, and the shards are equally large."""
    labels = [[2] if i % 2 == 0 and i < 8 else [0] for i in range(16)]
    shards = [dataset(labels).shard(2, i) for i in range(2)]
    batches = [make_batches(1.0, shard, 2) for shard in shards]
    assert [len(b) for b in batches] == [len(list(b)) for b in batches] == [4, 4]
    first, second = (repeat_factors(shard, 1.0).sum() for shard in shards)
    assert first > second + 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"threshold": 0.0}, "`repeat_threshold` must be.*above 0 and at most 1.*0.0"),
        ({"threshold": 1.5}, "`repeat_threshold` must be"),
        ({"deterministic": False}, "`repeat_threshold` needs `deterministic=True`"),
        ({"data": dataset().as_dataset()}, "`dataset` must be DetectionDataset"),
    ],
)
def test_wrong_arguments_of_epochs(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_batches(**arguments)


def test_a_checkpoint_belongs_to_a_threshold():
    assert make_batches(0.5).identity != make_batches(0.6).identity
    assert make_batches(0.5).identity == make_batches(0.5).identity
