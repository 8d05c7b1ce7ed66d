"""Batches of detection: order, seeds, padding, formats, and errors."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnest.data.augmentation.detection import (
    DETECTION_AUGMENTATIONS,
    RandomExpand,
    RandomFlip,
    RandomIoUCrop,
    Resize,
    TrainingAugmentation,
)
from keras_resnest.data.batches import evaluation_batches, training_batches

resized_batches = functools.partial(training_batches, augmentation=None)

FLIP = {"photometric": None, "expand": None, "crop": None, "flip": RandomFlip(0.5)}
MILD = {
    "expand": RandomExpand(max_ratio=1.5, probability=0.3),
    "crop": RandomIoUCrop((None, 0.5, 0.7, 0.9), scale=(0.5, 1.0)),
}
SHAPE = (32, 48)
SPEC = {
    "images": tf.TensorSpec((None, None, 3), tf.uint8),
    "image_id": tf.TensorSpec((), tf.string),
    "bounding_boxes": {
        "boxes": tf.TensorSpec((None, 4), tf.float32),
        "labels": tf.TensorSpec((None,), tf.int32),
        "difficult": tf.TensorSpec((None,), tf.bool),
    },
}


def element(i, boxes=None):
    """Image i: of color 10 i, of its own size, with i % 4 boxes labeled 0, 1, 2."""
    height, width = 20 + i, 40
    boxes = [[2, 3, 12 + k, 13 + k] for k in range(i % 4)] if boxes is None else boxes
    count = len(boxes)
    return {
        "images": np.full((height, width, 3), 10 * i, np.uint8),
        "image_id": f"image{i}",
        "bounding_boxes": {
            "boxes": np.asarray(boxes, np.float32).reshape(-1, 4),
            "labels": np.arange(count, dtype=np.int32),
            "difficult": np.arange(count) == 1,
        },
    }


def brightened(item, seed):
    """A fast augmentation: a random brightness."""
    item = Resize(SHAPE)(item)
    return dict(item, images=item["images"] * tf.random.stateless_uniform([], seed))


def make_dataset(count=8, elements=None, calls=None):
    elements = [element(i) for i in range(count)] if elements is None else elements

    def generate():
        for item in elements:
            if calls is not None:
                calls.append(item["image_id"])
            yield item

    return tf.data.Dataset.from_generator(generate, output_signature=SPEC)


def flat(batches):
    return [np.asarray(leaf) for batch in batches for leaf in tf.nest.flatten(batch)]


def same(a, b):
    return len(a) == len(b) and all(
        x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


def indices(batches):
    """The indices of the images, in order (from their colors)."""
    return [round(float(np.mean(image)) / 10) for batch in batches for image in batch["images"]]


class TestTraining:
    def test_seed_decides_batches_and_epochs_differ(self):
        def two_epochs(seed):
            batches = training_batches(make_dataset(), SHAPE, 2, brightened, seed=seed)
            return [flat(batches), flat(batches)]

        first, again, other = two_epochs(5), two_epochs(5), two_epochs(6)
        assert same(first[0], again[0]) and same(first[1], again[1])
        assert not same(first[0], first[1]) and not same(first[0], other[0])

    def test_default_seed_follows_keras(self):
        runs = []
        for _ in range(2):
            keras.utils.set_random_seed(11)
            batches = training_batches(make_dataset(), SHAPE, 2, brightened)
            runs.append(flat(batches))
        assert same(*runs)

    def test_every_image_once_per_epoch_in_a_new_order(self):
        batches = resized_batches(make_dataset(9), SHAPE, 2, seed=1, drop_remainder=False)
        epochs = [indices(batches) for _ in range(3)]
        assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3

    def test_dropped_remainder_changes_with_the_epoch(self):
        batches = resized_batches(make_dataset(9), SHAPE, 2, seed=1)
        epochs = [indices(batches) for _ in range(8)]
        assert all(len(set(epoch)) == 8 for epoch in epochs)
        assert len({(set(range(9)) - set(epoch)).pop() for epoch in epochs}) > 2

    def test_augmentation_is_drawn_anew_in_every_epoch(self):
        dataset = make_dataset(elements=[element(i) for i in range(1, 9)])  # none of them black
        batches = training_batches(dataset, SHAPE, 4, brightened, seed=2, shuffle_buffer=0)
        first, second = (np.concatenate([b["images"] for b in batches]) for _ in range(2))
        assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize(("cache", "reads"), [(True, 8), (False, 24), ("files", 8)])
    def test_cache(self, cache, reads, tmp_path):
        calls = []
        path = str(tmp_path / "images") if cache == "files" else cache
        # With a known cardinality, nothing is read to count the images.
        dataset = make_dataset(calls=calls).apply(tf.data.experimental.assert_cardinality(8))
        batches = resized_batches(dataset, SHAPE, 4, cache=path)
        for _ in range(3):
            assert sorted(indices(batches)) == list(range(8))
        assert len(calls) == reads

    def test_padding_to_the_longest_and_keys(self):
        batches = resized_batches(make_dataset(4), SHAPE, 4, seed=0, shuffle_buffer=0)
        (batch,) = list(batches)
        assert set(batch) == {"images", "bounding_boxes"}
        assert set(batch["bounding_boxes"]) == {"boxes", "labels"}
        boxes, labels = batch["bounding_boxes"]["boxes"], batch["bounding_boxes"]["labels"]
        assert labels.numpy().tolist() == [[-1, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2]]
        assert boxes.shape == (4, 3, 4) and not boxes.numpy()[labels == -1].any()
        wanted = np.array([2, 3, 14, 15]) * np.array([48 / 40, 32 / 23] * 2)
        np.testing.assert_allclose(boxes[3, 2], wanted, rtol=1e-5)
        assert batch["images"].dtype == tf.float32 and batch["images"].shape == (4, *SHAPE, 3)

    def test_max_boxes(self):
        batches = resized_batches(make_dataset(4), SHAPE, 2, max_boxes=5, seed=0)
        assert batches.element_spec["bounding_boxes"]["boxes"].shape == (2, 5, 4)
        assert all(batch["bounding_boxes"]["labels"].shape == (2, 5) for batch in batches)
        too_few = resized_batches(make_dataset(4), SHAPE, 2, max_boxes=2, seed=0)
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=r"more boxes than max_boxes=2.*image3"
        ):
            list(too_few)

    def test_batch_without_any_box_has_one_padding_row(self):
        dataset = make_dataset(elements=[element(0), element(4)])
        (batch,) = list(training_batches(dataset, SHAPE, 2, TrainingAugmentation(SHAPE)))
        assert batch["bounding_boxes"]["labels"].numpy().tolist() == [[-1], [-1]]

    def test_boxes_without_area_and_difficult_boxes(self):
        boxes = [[5, 5, 5, 9], [3, 3, 9, 9], [2, 2, 30, 18]]
        dataset = make_dataset(elements=[element(1, boxes)])
        for use_difficult, wanted in [(True, [[1, 2]]), (False, [[2]])]:
            batches = resized_batches(dataset, SHAPE, 1, use_difficult=use_difficult)
            labels = [b["bounding_boxes"]["labels"].numpy().tolist() for b in batches]
            assert labels == [wanted]

    def test_own_function_and_as_dataset(self):
        class Reader:
            def as_dataset(self):
                return make_dataset(4)

        def own(item, seed):
            draw = tf.random.stateless_uniform([1, 1, 3], seed) * 255.0
            return dict(item, images=tf.broadcast_to(draw, [*SHAPE, 3]))

        batches = training_batches(Reader(), SHAPE, 4, own, seed=0)
        epochs = [next(iter(batches))["images"].numpy() for _ in range(2)]
        assert len({image.tobytes() for epoch in epochs for image in epoch}) == 8

    def test_augmentation_by_name(self):
        for name, options in [("flip", FLIP), ("ssd", {}), ("mild", MILD)]:
            named = TrainingAugmentation(SHAPE, **DETECTION_AUGMENTATIONS[name])
            assert named == TrainingAugmentation(SHAPE, **options)

        def epoch(*augmentation):
            return flat(training_batches(make_dataset(4), SHAPE, 2, *augmentation, seed=1))

        assert same(epoch("flip"), epoch(TrainingAugmentation(SHAPE, **FLIP)))
        assert same(epoch(), epoch("mild"))
        assert same(epoch("none"), epoch(Resize(SHAPE))) and same(epoch(None), epoch("none"))

    def test_uint8_images(self):
        augmentation = TrainingAugmentation(SHAPE, dtype="uint8")
        batches = training_batches(make_dataset(), SHAPE, 2, augmentation)
        assert batches.element_spec["images"].dtype == tf.uint8


class TestEvaluation:
    def test_keeps_order_images_and_boxes(self):
        boxes = [[5, 5, 5, 9], [3, 3, 9, 9], [-4, 2, 60, 18]]
        dataset = make_dataset(elements=[element(i) for i in range(6)] + [element(6, boxes)])
        batches = evaluation_batches(dataset, SHAPE, 3)
        for _ in range(2):
            result = list(batches)
            assert [len(batch["images"]) for batch in result] == [3, 3, 1]
            assert indices(result) == list(range(7))
            last = result[-1]["bounding_boxes"]
            assert set(result[0]) == {"images", "bounding_boxes"}
            assert last["labels"].numpy().tolist() == [[0, 1, 2]]
            assert last["difficult"].numpy().tolist() == [[False, True, False]]
            wanted = np.array(boxes) * np.array([48 / 40, 32 / 26] * 2)
            np.testing.assert_allclose(last["boxes"][0], wanted, rtol=1e-5)

    def test_include_source(self):
        batches = list(evaluation_batches(make_dataset(3), SHAPE, 2, include_source=True))
        assert [b.decode() for batch in batches for b in batch["image_id"].numpy()] == [
            "image0",
            "image1",
            "image2",
        ]
        assert [s for batch in batches for s in batch["image_size"].numpy().tolist()] == [
            [20, 40],
            [21, 40],
            [22, 40],
        ]

    def test_padding_rows_of_the_source_are_not_boxes(self):
        item = element(3)
        item["bounding_boxes"]["labels"] = np.array([2, -1, 0], np.int32)
        item["bounding_boxes"]["boxes"][1] = [9, 9, 1, 1]  # to be ignored
        (batch,) = list(evaluation_batches(make_dataset(elements=[item]), SHAPE, 1))
        assert batch["bounding_boxes"]["labels"].numpy().tolist() == [[2, 0]]

    def test_missing_difficult_and_id(self):
        def bare(item):
            rows = {name: item["bounding_boxes"][name] for name in ("boxes", "labels")}
            return {"images": item["images"], "bounding_boxes": rows}

        batches = evaluation_batches(make_dataset(3).map(bare), SHAPE, 3)
        (batch,) = list(batches)
        assert not batch["bounding_boxes"]["difficult"].numpy().any()

    def test_uint8(self):
        (batch,) = list(evaluation_batches(make_dataset(3), SHAPE, 3, dtype="uint8"))
        assert batch["images"].dtype == tf.uint8


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (resized_batches, "yxyx"),
        (resized_batches, "rel_center_xywh"),
        (evaluation_batches, "center_xywh"),
        (evaluation_batches, "rel_yxyx"),
    ],
)
def test_formats(make, name):
    x1, y1, x2, y2 = np.array([2, 3, 12, 13]) * np.array([48 / 40, 32 / 21] * 2)
    width, height = x2 - x1, y2 - y1
    wanted = {
        "yxyx": [y1, x1, y2, x2],
        "rel_yxyx": [y1 / 32, x1 / 48, y2 / 32, x2 / 48],
        "center_xywh": [x1 + width / 2, y1 + height / 2, width, height],
        "rel_center_xywh": [(x1 + x2) / 96, (y1 + y2) / 64, width / 48, height / 32],
    }
    dataset = make_dataset(elements=[element(1)])
    (batch,) = list(make(dataset, SHAPE, 1, bounding_box_format=name))
    np.testing.assert_allclose(batch["bounding_boxes"]["boxes"][0, 0], wanted[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": make_dataset(3)}, "at least 4 image.*3 image"),
        ({"dataset": tf.data.Dataset.from_tensors(element(1))}, "at least 4 image.*1 image"),
        ({"dataset": make_dataset(0), "drop_remainder": False}, "at least 1 image"),
        ({"dataset": make_dataset(4).repeat()}, "`cache` must be False"),
        ({"dataset": make_dataset(8).padded_batch(2)}, "`dataset` must give unbatched"),
        ({"dataset": tf.data.Dataset.range(9)}, "`dataset` must give unbatched"),
        ({"dataset": [1, 2]}, "`dataset` must be a tf.data.Dataset"),
        ({"augmentation": TrainingAugmentation((64, 64))}, "`augmentation` must make"),
        ({"augmentation": lambda item: item}, "`augmentation` must be a function"),
        ({"augmentation": 3}, "`augmentation` must be str"),
        ({"augmentation": "wild"}, "one of 'none', 'flip', 'mild', 'ssd', or a function"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"max_boxes": 0}, "`max_boxes` must be"),
        ({"shuffle_buffer": -1}, "`shuffle_buffer` must be"),
        ({"image_shape": 32}, "`image_shape` must be"),
        ({"bounding_box_format": "coco"}, "`bounding_box_format` must be"),
    ],
)
def test_errors_before_training(arguments, message):
    defaults = {"dataset": make_dataset(8), "image_shape": SHAPE, "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        training_batches(**{**defaults, **arguments})


def test_batches_carry_class_names_and_an_epoch_counter():
    class Named:
        class_names = ["cat", "dog", "emu"]

        def as_dataset(self):
            return make_dataset(4)

    for make in (resized_batches, evaluation_batches):
        assert make(Named(), SHAPE, 2).class_names == Named.class_names
        assert make(make_dataset(8), SHAPE).class_names is None
        assert hasattr(make(make_dataset(8), SHAPE), "epoch_counter")


def test_evaluation_without_images():
    with pytest.raises(ValueError, match="at least 1 image"):
        evaluation_batches(make_dataset(0), SHAPE, 4)


@pytest.mark.parametrize(
    ("make", "boxes", "message"),
    [
        (resized_batches, [[12, 3, 4, 9]], "x1 <= x2"),
        (resized_batches, [[0.1, 0.2, 0.5, 0.9]], "within 0 to 1"),
        (evaluation_batches, [[1, 2, float("nan"), 9]], "x1 <= x2"),
    ],
)
def test_errors_of_boxes_name_the_image(make, boxes, message):
    dataset = make_dataset(elements=[element(1), element(2, boxes)])
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{message}.*image2"):
        list(make(dataset, SHAPE, 1))


def test_endless_dataset_without_cache():
    batches = resized_batches(
        make_dataset(4).repeat(), SHAPE, 4, cache=False, shuffle_buffer=4, max_boxes=3
    )
    assert len(list(batches.take(5))) == 5


def test_image_of_wrong_size_from_own_augmentation_is_an_error():
    batches = training_batches(make_dataset(4), SHAPE, 2, lambda item, seed: item)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        list(batches)


def test_flips_happen_in_the_pipeline():
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :24] = 200
    item = dict(element(1, [[0, 0, 24, 32]]), images=image)
    augmentation = TrainingAugmentation(SHAPE, None, None, None, RandomFlip(0.5))
    batches = training_batches(make_dataset(elements=[item] * 64), SHAPE, 64, augmentation, seed=0)
    (batch,) = list(batches)
    flipped = 0
    for image, box in zip(batch["images"], batch["bounding_boxes"]["boxes"][:, 0], strict=True):
        columns = np.flatnonzero(image.numpy()[0, :, 0] == 200)
        assert box.numpy().tolist() == [columns[0], 0, columns[-1] + 1, 32]
        flipped += columns[0] > 0
    assert 18 <= flipped <= 46
