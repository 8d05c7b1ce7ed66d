"""Mosaic, mixup, and multi-scale batches against pixels, numpy, and exact distributions."""

import numpy as np
import pytest
import tensorflow as tf

from keras_resnest.data.augmentation.detection import RandomFlip, TrainingAugmentation
from keras_resnest.data.augmentation.mixing import MixUp, Mosaic, compact_rows
from keras_resnest.data.batches import training_batches

PRIMARIES = np.eye(3) * 255.0  # red, green, and blue: the colors of labels 0, 1, and 2
BOXES = np.array([[20, 15, 75, 50], [90, 40, 130, 95], [35, 60, 70, 100]], "float32")
HEIGHT, WIDTH = 110, 150


def make_batch(count=4, dtype=np.uint8, boxes=BOXES):
    """Images with filled rectangles in the colors of their labels; image i has i % 4 rows."""
    images = np.zeros((count, HEIGHT, WIDTH, 3), dtype)
    labels = np.full((count, 4), -1, "int32")
    all_boxes = np.zeros((count, 4, 4), "float32")
    for i in range(count):
        images[i, :3, :3] = 20 + 10 * i  # all images differ
        for row in range(min(3, 1 + i % 3)):
            x1, y1, x2, y2 = boxes[row].astype(int)
            images[i, y1:y2, x1:x2] = PRIMARIES[row]
            all_boxes[i, row + (i % 2)] = boxes[row]  # padding may come first
            labels[i, row + (i % 2)] = row
    rows = {"boxes": tf.constant(all_boxes), "labels": tf.constant(labels)}
    return {"images": tf.constant(images), "bounding_boxes": rows}


def run(mix, batch, count=25):
    """Results in a tf.data graph for `count` seeds, as numpy."""
    seeds = tf.data.Dataset.range(count).map(lambda i: tf.stack([i, 7]))
    # Tracing without AutoGraph is faster; the tests of the pipeline below use AutoGraph.
    trace = tf.autograph.experimental.do_not_convert(lambda seed: mix(batch, seed))
    return list(seeds.map(trace).as_numpy_iterator())


def extent(mask):
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) else None


def images_of(result):
    """(image, boxes, labels) of each image of a result, without padding."""
    rows = result["bounding_boxes"]
    for image, boxes, labels in zip(result["images"], rows["boxes"], rows["labels"], strict=True):
        yield image, boxes[labels >= 0], labels[labels >= 0]


class TestMosaic:
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_boxes_match_the_rectangles(self, dtype):
        seen = 0
        for result in run(Mosaic(1.0), make_batch(dtype=dtype)):
            assert result["images"].shape == (4, HEIGHT, WIDTH, 3)
            assert result["images"].dtype == dtype
            for image, boxes, labels in images_of(result):
                for box, label in zip(boxes, labels, strict=True):
                    # Inside the box all pixels have its color (apart from a blended border) ...
                    x1, y1, x2, y2 = np.round(box).astype(int)
                    inner = image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].astype(float)
                    assert (np.abs(inner - PRIMARIES[label]) < 2).all()
                    # ... and just outside none has, unless a neighbor touches.
                    others = np.ones(image.shape[:2], bool)
                    for other in boxes[labels == label]:
                        a1, b1, a2, b2 = np.round(other).astype(int)
                        others[max(b1 - 1, 0) : b2 + 1, max(a1 - 1, 0) : a2 + 1] = False
                    # (An object whose center is cut off leaves pixels, but no box.)
                    rim = np.zeros_like(others)
                    rim[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = True
                    is_color = image[..., label].astype(float) > 200
                    assert (is_color & others & rim).sum() <= 0.5 * rim.sum()
                    seen += 1
        assert seen > 200

    def test_quadrants_are_the_four_images_at_the_covering_scale(self):
        """Plain images of four gray values, each with one box around the whole image."""
        images = np.ones((4, HEIGHT, WIDTH, 3), "float32") * np.array([40, 90, 140, 190.0])[
            :, None, None, None
        ].astype("float32")
        boxes = np.tile(np.array([0, 0, WIDTH, HEIGHT], "float32"), (4, 1, 1))
        rows = {"boxes": tf.constant(boxes), "labels": tf.range(4)[:, None]}
        batch = {"images": tf.constant(images), "bounding_boxes": rows}
        centers, kept = [], 0
        for result in run(Mosaic(1.0, center=(0.25, 0.6)), batch, 40):
            used = []
            for image, boxes, labels in images_of(result):
                owner = np.rint((image[..., 0] - 40) / 50).astype(int)
                np.testing.assert_allclose(
                    image, (40 + 50 * owner)[..., None] + np.zeros(3), atol=0.01
                )
                corners = [owner[0, 0], owner[0, -1], owner[-1, 0], owner[-1, -1]]
                assert sorted(corners) == [0, 1, 2, 3]  # all four, none twice
                parts = {label: extent(owner == label) for label in corners}
                x, y = parts[corners[0]][2:]
                wanted = [[0, 0, x, y], [x, 0, WIDTH, y], [0, y, x, HEIGHT], [x, y, WIDTH, HEIGHT]]
                assert [parts[label].tolist() for label in corners] == wanted
                # A box whose center is cut off is dropped; the others are the quadrants.
                for box, label in zip(boxes, labels, strict=True):
                    np.testing.assert_allclose(box, parts[label], atol=1e-3)
                kept += len(labels)
                centers.append([x / WIDTH, y / HEIGHT])
                used.append(corners[0])
            assert sorted(used) == [0, 1, 2, 3]  # each once in each corner
        centers = np.array(centers)
        assert kept > 0.7 * 4 * len(centers)
        assert (centers > 0.24).all() and (centers < 0.61).all()
        assert np.ptp(centers[:, 0]) > 0.25 and np.ptp(centers[:, 1]) > 0.25
        assert abs(np.corrcoef(centers.T)[0, 1]) < 0.3  # height and width are drawn independently

    def test_aspect_ratio_is_kept(self):
        boxes = np.array([[55, 35, 95, 75]], "float32")  # a central square: never cut much
        batch = make_batch(boxes=np.repeat(boxes, 3, axis=0))
        squares = []
        for result in run(Mosaic(1.0, center=(0.4, 0.6)), batch):
            for _, kept, _ in images_of(result):
                sides = kept[:, 2:] - kept[:, :2]
                squares += [s for s in sides if s.min() > 15]
        squares = np.array(squares)
        assert len(squares) > 100
        assert np.median(np.abs(np.log(squares[:, 0] / squares[:, 1]))) < 0.05
        assert 0.4 * 40 - 1 < np.median(squares) < 0.65 * 40  # about half the size

    def test_objects_are_kept_if_their_center_is_visible(self):
        """The center of a box is visible exactly if the box is kept."""
        image = np.zeros((4, HEIGHT, WIDTH, 3), "float32")
        image[:, :, :] = [0, 80, 0]
        x1, y1, x2, y2 = box = np.array([10, 10, 40, 40])
        image[:, y1:y2, x1:x2] = [80, 0, 0]
        image[:, 23:27, 23:27] = [255, 0, 0]  # the center
        rows = {
            "boxes": tf.constant(np.tile(box.astype("float32"), (4, 1, 1))),
            "labels": tf.zeros([4, 1], tf.int32),
        }
        kept = lost = 0
        for result in run(Mosaic(1.0, min_box_size=0.0), {"images": image, "bounding_boxes": rows}):
            for seen, boxes, _ in images_of(result):
                marks = np.argwhere(seen[..., 0] > 150)
                for mark_y, mark_x in marks:
                    inside = (boxes[:, 0] - 1 <= mark_x) & (mark_x <= boxes[:, 2] + 1)
                    inside &= (boxes[:, 1] - 1 <= mark_y) & (mark_y <= boxes[:, 3] + 1)
                    kept += inside.any()
                    lost += not inside.any()
        assert kept > 500 and lost < 0.05 * kept  # half of the mark may be cut off with the box

    def test_probability_and_unchanged_images(self):
        batch = make_batch(8)
        changed = []
        for result in run(Mosaic(0.4), batch, 30):
            same = [
                np.array_equal(a, b) for a, b in zip(result["images"], batch["images"], strict=True)
            ]
            changed += [not s for s in same]
            for i in np.flatnonzero(same):
                wanted = batch["bounding_boxes"]["labels"][i].numpy()
                found = result["bounding_boxes"]["labels"][i]
                assert found[found >= 0].tolist() == wanted[wanted >= 0].tolist()
        assert np.mean(changed) == pytest.approx(0.4, abs=0.1)

    def test_small_boxes_are_dropped_and_empty_images_kept(self):
        batch = make_batch()
        for result in run(Mosaic(1.0, min_box_size=20.0), batch, 10):
            for _, boxes, _ in images_of(result):
                assert (boxes[:, 2:] - boxes[:, :2] >= 20).all()
        batch["bounding_boxes"]["labels"] = tf.fill([4, 4], -1)
        for result in run(Mosaic(1.0), batch, 3):
            assert result["bounding_boxes"]["labels"].tolist() == [[-1]] * 4

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_small_batches(self, count):
        for result in run(Mosaic(1.0), make_batch(count), 5):
            assert result["images"].shape == (count, HEIGHT, WIDTH, 3)


class TestMixUp:
    def test_both_images_are_visible_and_keep_their_boxes(self):
        first, second = np.zeros((2, HEIGHT, WIDTH, 3), "float32")
        first[15:50, 20:75] = PRIMARIES[0]
        second[40:95, 60:130] = PRIMARIES[1]
        boxes = np.array([[[20, 15, 75, 50]], [[60, 40, 130, 95]]], "float32")
        rows = {"boxes": tf.constant(boxes), "labels": tf.constant([[0], [1]])}
        batch = {"images": tf.constant(np.stack([first, second])), "bounding_boxes": rows}
        weights = []
        for result in run(MixUp(1.0), batch, 60):
            for number, (image, found, labels) in enumerate(images_of(result)):
                assert labels.tolist() == [number, 1 - number]
                for box, label in zip(found, labels, strict=True):
                    np.testing.assert_array_equal(box, extent(image[..., label] > 10))
                weight = image[20, 25, 0] / 255  # only the first image has color here
                wanted = weight * first + (1 - weight) * second
                np.testing.assert_allclose(image, wanted, atol=1e-2)
                weights.append(weight if number == 0 else 1 - weight)
        # Beta(32, 32): mean 1/2, variance 1 / (4 * 65)
        assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
        assert np.std(weights) == pytest.approx((4 * 65) ** -0.5, rel=0.3)

    def test_weights_follow_the_beta_distribution(self):
        images = np.zeros((64, 8, 8, 3), "float32")
        images[::2] = 255.0
        rows = {"boxes": tf.zeros([64, 1, 4]), "labels": tf.fill([64, 1], -1)}
        batch = {"images": tf.constant(images), "bounding_boxes": rows}
        weights = []
        for result in run(MixUp(1.0, alpha=0.5), batch, 20):
            values = result["images"][::2, 0, 0, 0] / 255
            if (values < 1).mean() > 0.9:  # partners were black
                weights += values.tolist()
        # Beta(1/2, 1/2): variance 1/8, a third of it within 1/4 .. 3/4
        assert len(weights) > 150 and np.var(weights) == pytest.approx(1 / 8, rel=0.25)
        middle = np.mean((np.array(weights) > 0.25) & (np.array(weights) < 0.75))
        assert middle == pytest.approx(1 / 3, abs=0.1)

    def test_unmixed_images_are_untouched(self):
        batch = make_batch(8)
        changed = []
        for result in run(MixUp(0.3), batch, 30):
            for i, (image, _, labels) in enumerate(images_of(result)):
                wanted = batch["bounding_boxes"]["labels"][i].numpy()
                wanted = wanted[wanted >= 0]
                if np.array_equal(image, batch["images"][i]):
                    assert labels.tolist() == wanted.tolist()
                    changed.append(False)
                else:
                    assert len(labels) > len(wanted)
                    assert labels[: len(wanted)].tolist() == wanted.tolist()
                    changed.append(True)
        assert np.mean(changed) == pytest.approx(0.3, abs=0.1)
        assert result["images"].dtype == np.uint8

    def test_a_single_image_is_not_mixed_with_itself(self):
        batch = make_batch(1)
        (result,) = run(MixUp(1.0), batch, 1)
        np.testing.assert_array_equal(result["images"], batch["images"])
        assert (result["bounding_boxes"]["labels"] >= 0).sum() == 1


def test_compact_rows():
    labels = tf.constant([[-1, 3, -1, 1, -1], [-1, -1, 2, -1, -1]])
    boxes = tf.reshape(tf.range(40.0), [2, 5, 4])
    rows = compact_rows({"boxes": boxes, "labels": labels})
    assert rows["labels"].numpy().tolist() == [[3, 1], [2, -1]]
    assert rows["boxes"].numpy().tolist() == [
        [[4, 5, 6, 7], [12, 13, 14, 15]],
        [[28, 29, 30, 31], [0, 0, 0, 0]],
    ]


@pytest.mark.parametrize("mix", [Mosaic(0.7), MixUp(0.7)])
def test_seed_decides_everything(mix):
    batch = make_batch(5)
    first, again = run(mix, batch, 6), run(mix, batch, 6)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])
        np.testing.assert_array_equal(a["bounding_boxes"]["boxes"], b["bounding_boxes"]["boxes"])
    assert len({a["images"].tobytes() for a in first}) == 6


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: Mosaic(1.5), "probability"),
        (lambda: Mosaic(center=(0.0, 0.5)), "center"),
        (lambda: Mosaic(center=0.5), "center"),
        (lambda: Mosaic(min_box_size=-1), "min_box_size"),
        (lambda: MixUp(-0.1), "probability"),
        (lambda: MixUp(alpha=0.0), "alpha"),
    ],
)
def test_errors_name_the_argument(build, argument):
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: {argument}="):
        build()


# === In the pipeline ===


def dataset(count=12):
    """Images with one rectangle each, in the color of its label, at different places."""

    def element(i):
        i = tf.cast(i, tf.int32)
        label, x, y = i % 3, 4 + 3 * i, 6 + 2 * i
        ys, xs = tf.meshgrid(tf.range(80), tf.range(100), indexing="ij")
        inside = (xs >= x) & (xs < x + 40) & (ys >= y) & (ys < y + 30)
        color = tf.one_hot(label, 3) * 255.0
        image = tf.cast(inside[..., None], tf.float32) * color
        box = tf.cast(tf.stack([x, y, x + 40, y + 30]), tf.float32)
        rows = {"boxes": box[None], "labels": label[None]}
        return {"images": tf.cast(image, tf.uint8), "bounding_boxes": rows}

    return tf.data.Dataset.range(count).map(element)


def assert_rectangles(batch, tolerance=1.6):
    """A box that is the only one of its color matches the pixels of that color."""
    checked = 0
    rows = batch["bounding_boxes"]
    for image, boxes, labels in zip(batch["images"], rows["boxes"], rows["labels"], strict=True):
        for label in range(3):
            if np.count_nonzero(labels == label) == 1:
                mask = image[..., label] > 40
                np.testing.assert_allclose(boxes[labels == label][0], extent(mask), atol=tolerance)
                checked += 1
    return checked


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": MixUp(1.0)},
        {"image_sizes": [(64, 64), (96, 128), (160, 128)]},
        {"image_sizes": [[64, 96], [128, 64]], "mixup": MixUp(0.5), "max_boxes": 5},
    ],
)
def test_boxes_of_training_batches_match_the_rectangles(options):
    shape = (96, 96)
    augmentation = TrainingAugmentation(shape, None, None, None, RandomFlip(0.5, 0.5))
    batches = training_batches(dataset(), shape, 4, augmentation, seed=3, **options)
    checked = 0
    for _ in range(4):
        for batch in batches.as_numpy_iterator():
            assert set(batch) == {"images", "bounding_boxes"}
            checked += assert_rectangles(batch)
            if "max_boxes" in options:
                assert batch["bounding_boxes"]["labels"].shape == (4, 5)
    assert checked > 30


def test_mosaic_and_mixup_in_batches_depend_on_the_seed_only():
    def epochs():
        augmentation = TrainingAugmentation((64, 96), None, None)
        batches = training_batches(
            dataset(), (64, 96), 4, augmentation, seed=3, mosaic=Mosaic(0.5), mixup=MixUp(0.5)
        )
        assert batches.element_spec["images"].shape == (4, 64, 96, 3) and len(batches) == 3
        return [[b["images"].numpy() for b in batches] for _ in range(2)]

    first, again = epochs(), epochs()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_sizes_are_drawn_for_whole_batches():
    sizes = [(64, 64), (96, 64), (128, 192)]
    batches = training_batches(
        dataset(24), (64, 64), 4, augmentation=None, image_sizes=sizes, seed=1
    )
    assert batches.element_spec["images"].shape.as_list() == [4, None, None, 3]
    epochs = [[tuple(b["images"].shape[1:3]) for b in batches] for _ in range(12)]
    drawn = [size for epoch in epochs for size in epoch]
    assert all(drawn.count(size) / len(drawn) == pytest.approx(1 / 3, abs=0.17) for size in sizes)
    assert len({tuple(epoch) for epoch in epochs}) > 6


def test_relative_boxes_of_drawn_sizes():
    sizes = [(64, 64), (96, 64), (128, 192)]
    options = {"augmentation": None, "image_sizes": sizes, "seed": 1, "shuffle_buffer": 0}
    pixels = training_batches(dataset(), (64, 64), 4, **options)
    relative = training_batches(dataset(), (64, 64), 4, bounding_box_format="rel_yxyx", **options)
    for a, b in zip(pixels, relative, strict=True):
        height, width = a["images"].shape[1:3]
        wanted = a["bounding_boxes"]["boxes"].numpy()[..., [1, 0, 3, 2]]
        wanted = wanted / [height, width, height, width]
        np.testing.assert_allclose(b["bounding_boxes"]["boxes"], wanted, rtol=1e-5)


def test_too_many_mixed_boxes_are_an_error():
    batches = training_batches(
        dataset(), (64, 64), 4, augmentation=None, mixup=MixUp(1.0), max_boxes=1
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="mixed image has more boxes"):
        list(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mosaic": 0.5}, "`mosaic` must be Mosaic"),
        ({"mixup": Mosaic()}, "`mixup` must be MixUp"),
        ({"image_sizes": []}, "`image_sizes` must be a list"),
        ({"image_sizes": [64, 96]}, "`image_sizes` must be"),
        ({"image_sizes": [(64, 64)], "deterministic": False}, "`image_sizes` needs"),
        (
            {"image_sizes": [(64, 64)], "augmentation": lambda element, seed: element},
            "a function of element, seed, image_size",
        ),
    ],
)
def test_errors_of_the_pipeline(options, message):
    with pytest.raises(ValueError, match=message):
        training_batches(dataset(), (64, 64), 4, **options)
