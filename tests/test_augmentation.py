"""Training augmentation against pixels, brute force, and the standard library."""

import colorsys
import itertools

import numpy as np
import pytest
import reference
import tensorflow as tf

from keras_resnest.data.augmentation.detection import (
    MEAN_COLOR,
    PhotometricDistortion,
    RandomExpand,
    RandomFlip,
    RandomIoUCrop,
    RandomRotate90,
    Resize,
    TrainingAugmentation,
    drop_empty_boxes,
)

PRIMARIES = np.eye(3) * 255.0  # red, green, and blue: the colors of rectangles 0, 1, and 2
NEUTRAL = {"brightness": 0.0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0.0}
THREE_BOXES = [[20, 15, 75, 50], [90, 40, 130, 95], [35, 60, 70, 100]]


def make_element(height=110, width=150, boxes=THREE_BOXES, background=0, labels=None):
    """An image with one filled rectangle per box: red, green, blue on a plain background."""
    image = np.full((height, width, 3), background, np.uint8)
    for (x1, y1, x2, y2), color in zip(boxes, itertools.cycle(PRIMARIES)):
        image[int(y1) : int(y2), int(x1) : int(x2)] = color
    labels = np.arange(len(boxes)) if labels is None else np.asarray(labels)
    return {
        "images": tf.constant(image),
        "image_id": tf.constant("image"),
        "bounding_boxes": {
            "boxes": tf.constant(np.asarray(boxes, np.float32).reshape(-1, 4)),
            "labels": tf.constant(labels, tf.int32),
            "difficult": tf.constant(labels % 2 == 1, tf.bool),
        },
    }


def run(operation, element, count=60):
    """The results of `operation` in a tf.data graph for `count` seeds, as numpy."""
    seeds = tf.data.Dataset.range(count).map(lambda i: tf.stack([i, 7]))
    # Tracing without AutoGraph is faster; test_batches.py uses AutoGraph.
    trace = tf.autograph.experimental.do_not_convert(lambda seed: operation(element, seed))
    return list(seeds.map(trace).as_numpy_iterator())


def pixel_extent(image, color):
    """(x1, y1, x2, y2) of the pixels that are closer to this primary than to black, or None."""
    others = [c for c in range(3) if c != color]
    is_color = image[..., color] - image[..., others].max(axis=-1) > 127.5
    ys, xs = np.nonzero(is_color)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def assert_boxes_match_pixels(result, tolerance=1.0):
    image, rows = result["images"].astype(np.float32), result["bounding_boxes"]
    for box, label in zip(rows["boxes"], rows["labels"], strict=True):
        extent = pixel_extent(image, label)
        if extent is None:  # no pixel center hit
            assert min(box[2] - box[0], box[3] - box[1]) < 1.5
        else:
            np.testing.assert_allclose(box, extent, atol=tolerance)


class TestPixels:
    """The boxes match the rectangles in the image."""

    @pytest.mark.parametrize(
        "operation",
        [
            RandomExpand(probability=1.0),
            RandomIoUCrop(),
            RandomFlip(0.5, 0.5),
            RandomRotate90(),
            Resize((64, 96)),
            Resize((200, 130, 3)),
        ],
        ids=lambda operation: type(operation).__name__,
    )
    def test_single_operations(self, operation):
        results = run(operation, make_element())
        for result in results:
            assert_boxes_match_pixels(result)
        assert sum(len(result["bounding_boxes"]["boxes"]) for result in results) > 60

    @pytest.mark.parametrize(
        ("image_shape", "options"),
        [
            ((96, 96), {}),
            ((320, 320, 3), {}),
            ((60, 140), {"rotation": RandomRotate90(), "flip": RandomFlip(0.5, 0.5)}),
            ((96, 96), {"antialias": False, "min_box_size": 0.0}),
            ((75, 45), {"crop": None}),
            ((90, 110), {"expand": None, "dtype": "uint8"}),
        ],
    )
    def test_composed_pipeline(self, image_shape, options):
        augmentation = TrainingAugmentation(image_shape, photometric=None, **options)
        results = run(augmentation, make_element(), count=150)
        for result in results:
            assert result["images"].shape == (*image_shape[:2], 3)
            assert_boxes_match_pixels(result)
        assert sum(len(result["bounding_boxes"]["boxes"]) for result in results) > 150

    def test_very_wide_image(self):
        element = make_element(20, 500, [[100, 2, 220, 18], [300, 5, 330, 15]])
        for result in run(TrainingAugmentation((128, 128), photometric=None), element, 100):
            assert_boxes_match_pixels(result)

    def test_every_seen_rectangle_with_its_center_inside_keeps_its_box(self):
        augmentation = TrainingAugmentation(
            (150, 150), photometric=None, expand=None, flip=None, min_box_size=0.0
        )
        element = make_element()
        boxes, image = element["bounding_boxes"]["boxes"], tf.constant([110, 150])
        for i, result in enumerate(run(augmentation, element, 100)):
            seed = tf.random.split(tf.constant([i, 7], tf.int64), 5)[1]
            window = RandomIoUCrop().window(tf.constant([0, 0, 150, 110]), image, boxes, seed)
            x1, y1, x2, y2 = window.numpy()
            centers = (boxes.numpy()[:, :2] + boxes.numpy()[:, 2:]) / 2
            wanted = [k for k, (x, y) in enumerate(centers) if x1 <= x < x2 and y1 <= y < y2]
            assert result["bounding_boxes"]["labels"].tolist() == wanted
            assert result["bounding_boxes"]["difficult"].tolist() == [k % 2 == 1 for k in wanted]


class TestExpand:
    def test_image_lies_unchanged_on_a_plain_canvas(self):
        element = make_element(background=40)
        color, ratios = (10.0, 200.0, 30.0), []
        for result in run(RandomExpand(3.0, 1.0, color), element, 100):
            canvas, box = result["images"], result["bounding_boxes"]["boxes"][0]
            x, y = (box[:2] - THREE_BOXES[0][:2]).astype(int)
            np.testing.assert_allclose(canvas[y : y + 110, x : x + 150], element["images"])
            outside = np.ones(canvas.shape[:2], bool)
            outside[y : y + 110, x : x + 150] = False
            assert np.ptp(canvas[outside] - color) == 0 if outside.any() else True
            ratios.append(canvas.shape[1] / 150)
            assert canvas.shape[0] / 110 == pytest.approx(ratios[-1], abs=0.01)
        assert 1.0 <= min(ratios) < 1.2 and 2.8 < max(ratios) <= 3.0
        assert np.mean(ratios) == pytest.approx(2.0, abs=0.2)

    def test_probability(self):
        sizes = [r["images"].shape for r in run(RandomExpand(probability=0.5), make_element(), 400)]
        assert sizes.count((110, 150, 3)) / 400 == pytest.approx(0.5, abs=0.08)


class TestCrop:
    def windows(self, crop, element, count=150):
        size, boxes = tf.shape(element["images"])[:2], element["bounding_boxes"]["boxes"]
        canvas = tf.stack([0, 0, size[1], size[0]])
        seeds = tf.data.Dataset.range(count).map(lambda i: tf.stack([i, 3]))
        return list(
            seeds.map(lambda seed: crop.window(canvas, size, boxes, seed)).as_numpy_iterator()
        )

    @pytest.mark.parametrize("min_iou", [0.0, 0.1, 0.3, 0.5, 0.7])
    def test_constraint_holds(self, min_iou):
        boxes = [[10, 10, 300, 200], [400, 250, 470, 380], [320, 20, 600, 240]]
        element = make_element(400, 640, boxes)
        windows = self.windows(RandomIoUCrop((min_iou,)), element)
        crops = [w for w in windows if w.tolist() != [0, 0, 640, 400]]
        assert len(crops) > 25  # no trial succeeded for the others
        for x1, y1, x2, y2 in crops:
            assert 0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 400
            assert reference.iou((x1, y1, x2, y2), boxes).max() >= min_iou - 1e-6
            centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
            assert any(x1 <= x < x2 and y1 <= y < y2 for x, y in centers)
            width, height = (x2 - x1) / 640, (y2 - y1) / 400
            assert 0.29 <= np.sqrt(width * height) <= 1.0
            assert 0.49 <= width / height <= 2.04

    def test_options_are_equally_likely_when_all_are_possible(self):
        # The box fills the image, so the IoU is the area of the crop.
        element = make_element(100, 100, [[0, 0, 100, 100]])
        crop = RandomIoUCrop((None, 0.0, 0.8), trials=200)
        windows = np.array(self.windows(crop, element, 600))
        area = np.prod((windows[:, 2:] - windows[:, :2]) / 100, axis=1)
        assert np.mean(area == 1.0) == pytest.approx(1 / 3, abs=0.06)
        assert np.mean(area < 0.8) == pytest.approx(1 / 3 * 0.8, abs=0.1)

    def test_impossible_constraint_keeps_the_image(self):
        element = make_element(400, 400, [[0, 0, 3, 3]])
        assert {tuple(w) for w in self.windows(RandomIoUCrop((0.9,)), element, 30)} == {
            (0, 0, 400, 400)
        }

    def test_probability_and_none(self):
        windows = self.windows(RandomIoUCrop((0.0,), probability=0.3), make_element(), 400)
        assert np.mean([w.tolist() != [0, 0, 150, 110] for w in windows]) == pytest.approx(
            0.3, abs=0.08
        )
        whole = {tuple(w) for w in self.windows(RandomIoUCrop((None,)), make_element(), 20)}
        assert whole == {(0, 0, 150, 110)}

    def test_image_without_objects_is_cropped_too(self):
        windows = self.windows(RandomIoUCrop((0.9,)), make_element(boxes=[]), 20)
        assert len({tuple(w) for w in windows}) > 10

    def test_labels_and_difficult_follow_their_boxes(self):
        rng = np.random.default_rng(0)
        corners = rng.uniform(0, 180, (300, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(1, 20, (300, 2))], axis=1)
        element = make_element(200, 200, boxes)
        size, all_boxes = tf.constant([200, 200]), element["bounding_boxes"]["boxes"]
        crop = RandomIoUCrop()
        for i, result in enumerate(run(crop, element, 20)):
            seed = tf.constant([i, 7], tf.int64)
            x1, y1, x2, y2 = crop.window(tf.constant([0, 0, 200, 200]), size, all_boxes, seed)
            centers = (all_boxes[:, :2] + all_boxes[:, 2:]) / 2
            x, y = centers[:, 0].numpy(), centers[:, 1].numpy()
            wanted = np.flatnonzero((x >= x1) & (x < x2) & (y >= y1) & (y < y2))
            rows = result["bounding_boxes"]
            assert rows["labels"].tolist() == wanted.tolist()
            assert rows["difficult"].tolist() == (wanted % 2 == 1).tolist()
            clipped = np.clip(boxes[wanted], [x1, y1, x1, y1], [x2, y2, x2, y2])
            np.testing.assert_allclose(rows["boxes"], clipped - [x1, y1, x1, y1], atol=1e-4)


class TestOrientation:
    def test_flips_and_rotations_are_numpys(self):
        rng = np.random.default_rng(1)
        image = rng.integers(0, 255, (5, 7, 3)).astype(np.uint8)
        element = make_element(5, 7, [[1, 1, 3, 4]])
        element["images"] = tf.constant(image)
        flips = {"none": image, "x": image[:, ::-1], "y": image[::-1], "xy": image[::-1, ::-1]}
        turns = {k: np.rot90(image, k) for k in range(4)}
        for operation, candidates, wanted in [
            (RandomFlip(0.5, 0.25), flips, [0.375, 0.375, 0.125, 0.125]),
            (RandomRotate90(0.6), turns, [0.4, 0.2, 0.2, 0.2]),
        ]:
            counts = dict.fromkeys(candidates, 0)
            for result in run(operation, element, 400):
                same = [k for k, v in candidates.items() if np.array_equal(v, result["images"])]
                counts[same[0]] += 1
            np.testing.assert_allclose(np.array(list(counts.values())) / 400, wanted, atol=0.08)


class TestPhotometric:
    def image(self, low=0, high=256):
        rng = np.random.default_rng(2)
        element = make_element(12, 16)
        element["images"] = tf.constant(rng.integers(low, high, (12, 16, 3)).astype(np.uint8))
        return element

    def hsv(self, image):
        return np.array([colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255.0])

    def test_brightness_adds_one_amount(self):
        element = self.image(60, 190)
        operation = PhotometricDistortion(**{**NEUTRAL, "brightness": 32.0, "probability": 1.0})
        shifts = []
        for result in run(operation, element, 100):
            difference = result["images"] - element["images"].numpy()
            assert np.ptp(difference) < 1e-3
            shifts.append(difference.mean())
        assert -32 <= min(shifts) < -25 and 25 < max(shifts) <= 32
        assert abs(np.mean(shifts)) < 6

    def test_contrast_multiplies(self):
        element = self.image(10, 160)
        operation = PhotometricDistortion(**{**NEUTRAL, "contrast": (0.5, 1.5)}, probability=1.0)
        factors = []
        for result in run(operation, element, 100):
            ratio = result["images"] / element["images"].numpy()
            assert np.ptp(ratio) < 1e-3
            factors.append(ratio.mean())
        assert 0.5 <= min(factors) < 0.6 and 1.4 < max(factors) <= 1.5

    def test_saturation_is_that_of_hsv(self):
        element = self.image()
        operation = PhotometricDistortion(**{**NEUTRAL, "saturation": (1.4, 1.4)}, probability=1.0)
        wanted = self.hsv(element["images"].numpy())
        wanted[:, 1] = np.minimum(1.0, wanted[:, 1] * 1.4)
        wanted = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in wanted]) * 255.0
        result = run(operation, element, 1)[0]["images"]
        np.testing.assert_allclose(result.reshape(-1, 3), wanted, atol=0.01)

    def test_hue_turns_by_one_angle(self):
        element = self.image()
        operation = PhotometricDistortion(**{**NEUTRAL, "hue": 18.0}, probability=1.0)
        before, angles = self.hsv(element["images"].numpy()), []
        colored = before[:, 1] > 0.2
        for result in run(operation, element, 60):
            after = self.hsv(result["images"])
            np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=1e-3)
            turn = (after[colored, 0] - before[colored, 0] + 0.5) % 1.0 - 0.5
            assert np.ptp(turn) < 1e-3
            angles.append(turn.mean() * 360)
        assert -18.01 <= min(angles) < -14 and 14 < max(angles) <= 18.01

    def test_channel_orders(self):
        element = self.image()
        operation = PhotometricDistortion(probability=0.0, channel_probability=0.5)
        image = element["images"].numpy()
        orders = list(itertools.permutations(range(3)))
        counts = dict.fromkeys(orders, 0)
        for result in run(operation, element, 600):
            same = [o for o in orders if np.array_equal(image[..., list(o)], result["images"])]
            counts[same[0]] += 1
        fractions = np.array(list(counts.values())) / 600
        np.testing.assert_allclose(fractions, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], atol=0.06)

    def test_contrast_comes_early_or_late(self):
        element = self.image()
        settings = {**NEUTRAL, "contrast": (1.5, 1.5), "saturation": (0.5, 0.5)}
        operation = PhotometricDistortion(**settings, probability=1.0)

        def fade(image):
            highest = image.max(axis=-1, keepdims=True)
            return highest - (highest - image) * 0.5

        image = element["images"].numpy().astype(np.float32)
        early, late = fade(np.minimum(image * 1.5, 255)), np.minimum(fade(image) * 1.5, 255)
        is_early = []
        for result in run(operation, element, 200):
            distances = [np.abs(result["images"] - wanted).max() for wanted in (early, late)]
            assert min(distances) < 0.01 < max(distances)
            is_early.append(distances[0] < distances[1])
        assert np.mean(is_early) == pytest.approx(0.5, abs=0.12)

    def test_each_step_has_its_own_chance(self):
        element = self.image(60, 160)
        for name, value in [("brightness", 32.0), ("contrast", (0.5, 1.5)), ("hue", 18.0)]:
            operation = PhotometricDistortion(**{**NEUTRAL, name: value}, probability=0.3)
            changed = [
                np.abs(result["images"] - element["images"].numpy()).max() > 1e-2
                for result in run(operation, element, 300)
            ]
            assert np.mean(changed) == pytest.approx(0.3, abs=0.09)

    def test_values_stay_in_range_and_boxes_stay(self):
        element = self.image()
        operation = PhotometricDistortion(brightness=200, contrast=(0.1, 4), saturation=(0, 5))
        for result in run(operation, element, 100):
            assert result["images"].dtype == np.float32
            assert result["images"].min() >= 0.0 and result["images"].max() <= 255.0
            assert np.isfinite(result["images"]).all()
            for name, rows in element["bounding_boxes"].items():
                np.testing.assert_array_equal(result["bounding_boxes"][name], rows)

    def test_mean_color_of_the_canvas_is_not_distorted(self):
        augmentation = TrainingAugmentation(
            (64, 64), PhotometricDistortion(probability=1.0), RandomExpand(4.0, 1.0), crop=None
        )
        seen = 0
        for result in run(augmentation, make_element(background=255, boxes=[]), 40):
            canvas = np.abs(result["images"] - MEAN_COLOR).max(axis=-1) < 1e-3
            seen += canvas.mean() > 0.3
        assert seen > 20


class TestTrainingAugmentation:
    def test_same_as_one_step_after_the_other(self):
        height, width, size = 120, 160, (200, 240)
        ys, xs = np.mgrid[:height, :width]
        element = make_element(height, width)
        smooth = np.stack([128 + 100 * np.sin(xs / 20), 255 * ys / height, xs * 1.5], axis=-1)
        element["images"] = tf.constant(smooth.astype(np.uint8))
        expand = RandomExpand(2.0, 0.7)
        together = TrainingAugmentation(size, None, expand, min_box_size=0.0)

        def one_by_one(element, seed):
            seeds = tf.random.split(seed, 5)
            element = RandomIoUCrop()(expand(element, seeds[0]), seeds[1])
            return Resize(size)(RandomFlip()(element, seeds[3]))

        pairs = zip(run(together, element, 60), run(one_by_one, element, 60), strict=True)
        for got, wanted in pairs:
            got_rows, wanted_rows = got["bounding_boxes"], wanted["bounding_boxes"]
            assert got_rows["labels"].tolist() == wanted_rows["labels"].tolist()
            np.testing.assert_allclose(got_rows["boxes"], wanted_rows["boxes"], atol=0.6)
            assert np.median(np.abs(got["images"] - wanted["images"])) < 1.5

    def test_without_changes_it_is_resize(self):
        element = make_element(background=77)
        plain = TrainingAugmentation((50, 64), None, None, None, None)
        got, wanted = run(plain, element, 1)[0], run(Resize((50, 64)), element, 1)[0]
        np.testing.assert_array_equal(got["images"], wanted["images"])
        np.testing.assert_allclose(
            got["bounding_boxes"]["boxes"], wanted["bounding_boxes"]["boxes"], atol=1e-4
        )

    def test_seed_decides_everything(self):
        element = make_element(background=90)
        augmentation = TrainingAugmentation((64, 64), rotation=RandomRotate90())
        first, again = run(augmentation, element, 12), run(augmentation, element, 12)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a["images"], b["images"])
            np.testing.assert_array_equal(
                a["bounding_boxes"]["boxes"], b["bounding_boxes"]["boxes"]
            )
        assert len({a["images"].tobytes() for a in first}) == 12
        eager = augmentation(element, (3, 7))
        np.testing.assert_allclose(eager["images"], first[3]["images"], atol=1e-3)

    def test_small_boxes_are_dropped_only_below_the_threshold(self):
        boxes = [[10, 10, 12, 50], [30, 30, 34, 60], [50, 50, 100, 100]]  # sides 2, 4, 50
        element = make_element(100, 100, boxes)
        for min_box_size, labels in [(0.0, [0, 1, 2]), (1.5, [1, 2]), (2.5, [2])]:
            augmentation = TrainingAugmentation(
                (50, 50), None, None, None, None, min_box_size=min_box_size
            )
            rows = augmentation(element, (1, 2))["bounding_boxes"]
            assert rows["labels"].numpy().tolist() == labels
            assert rows["difficult"].numpy().tolist() == [k % 2 == 1 for k in labels]

    def test_antialiasing_averages_zoomed_out_images(self):
        stripes = np.zeros((256, 256, 3), np.uint8)
        stripes[:, ::2] = 254
        element = make_element(256, 256, [])
        element["images"] = tf.constant(stripes)
        settings = {"photometric": None, "expand": RandomExpand(4.0, 1.0), "crop": None}
        deviations = {}
        for antialias in (True, False):
            augmentation = TrainingAugmentation((64, 64), **settings, antialias=antialias)
            values = []
            for result in run(augmentation, element, 20):
                seen = np.abs(result["images"] - MEAN_COLOR).max(axis=-1) > 1e-3
                values.append(np.abs(result["images"][seen] - 127.0).max() if seen.any() else 0)
            deviations[antialias] = np.median(values)
        assert deviations[True] < 40 < 60 < deviations[False]

    def test_uint8_is_the_rounded_float(self):
        element = make_element(background=33)
        floats = run(TrainingAugmentation((40, 40)), element, 10)
        integers = run(TrainingAugmentation((40, 40), dtype="uint8"), element, 10)
        for a, b in zip(floats, integers, strict=True):
            assert b["images"].dtype == np.uint8
            assert np.abs(a["images"] - b["images"]).max() <= 0.5

    @pytest.mark.parametrize(
        ("size", "boxes"),
        [((1, 1), []), ((1, 1), [[0.2, 0.3, 0.9, 0.6]]), ((1, 90), [[0.2, 0.3, 20.0, 0.6]])],
    )
    def test_tiny_images(self, size, boxes):
        element = make_element(*size, [])
        element["bounding_boxes"] = make_element(9, 99, boxes)["bounding_boxes"]
        augmentation = TrainingAugmentation((32, 32), rotation=RandomRotate90(), min_box_size=0.0)
        for result in run(augmentation, element, 40):
            assert result["images"].shape == (32, 32, 3)
            assert np.isfinite(result["images"]).all()
            rows = result["bounding_boxes"]["boxes"]
            assert len(rows) <= len(boxes) and (rows >= 0).all() and (rows <= 32).all()

    def test_no_boxes_and_many_boxes(self):
        rng = np.random.default_rng(5)
        corners = rng.uniform(0, 100, (400, 2))
        many = np.concatenate([corners, corners + rng.uniform(0.1, 40, (400, 2))], axis=1)
        for boxes in ([], many):
            element = make_element(boxes=boxes)
            for result in run(TrainingAugmentation((64, 64)), element, 20):
                rows = result["bounding_boxes"]
                assert len(rows["boxes"]) == len(rows["labels"]) == len(rows["difficult"])
                sides = rows["boxes"][:, 2:] - rows["boxes"][:, :2]
                assert (sides >= 1.0).all()
                assert (rows["boxes"] >= 0).all() and (rows["boxes"] <= 64).all()

    def test_float_images_are_taken_too(self):
        element = make_element(background=50)
        as_float = dict(element, images=tf.cast(element["images"], tf.float32))
        augmentation = TrainingAugmentation((32, 32))
        for a, b in zip(run(augmentation, element, 8), run(augmentation, as_float, 8), strict=True):
            np.testing.assert_allclose(a["images"], b["images"], atol=1e-3)


def test_drop_empty_boxes():
    boxes = [[-5, -5, 20, 20], [30, 30, 30, 60], [200, 10, 220, 20], [1, 2, 3, 4], [5, 5, 9, 9]]
    element = make_element(110, 150, boxes, labels=[0, 1, 2, -1, 4])
    rows = drop_empty_boxes(element)["bounding_boxes"]
    np.testing.assert_array_equal(rows["boxes"], [[0, 0, 20, 20], [5, 5, 9, 9]])
    assert rows["labels"].numpy().tolist() == [0, 4]


def test_resize_is_bilinear_with_half_pixel_centers_and_keeps_all_boxes():
    from PIL import Image

    rng = np.random.default_rng(6)
    image = rng.integers(0, 256, (11, 13, 3)).astype(np.uint8)
    element = make_element(11, 13, [[0, 0, 0, 0], [-4, 2, 30, 5]], labels=[-1, 1])
    result = Resize((33, 52))(dict(element, images=tf.constant(image)))
    wanted = np.asarray(Image.fromarray(image).resize((52, 33), Image.Resampling.BILINEAR))
    assert np.abs(result["images"].numpy() - wanted).max() <= 1.0
    rows = result["bounding_boxes"]
    np.testing.assert_allclose(rows["boxes"], [[0, 0, 0, 0], [-16, 6, 120, 15]])
    assert rows["labels"].numpy().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: TrainingAugmentation(320), "image_shape"),
        (lambda: TrainingAugmentation((320, 320, 1)), "image_shape"),
        (lambda: TrainingAugmentation((32, 32), dtype="float16"), "dtype"),
        (lambda: TrainingAugmentation((32, 32), min_box_size=-1), "min_box_size"),
        (lambda: Resize((0, 32)), "image_shape"),
        (lambda: RandomExpand(0.5), "max_ratio"),
        (lambda: RandomExpand(fill_color=(0, 0)), "fill_color"),
        (lambda: RandomIoUCrop((1.5,)), "min_ious"),
        (lambda: RandomIoUCrop(()), "min_ious"),
        (lambda: RandomIoUCrop(scale=(0.5, 2.0)), "scale"),
        (lambda: RandomIoUCrop(aspect_ratio=(1.5, 2.0)), "aspect_ratio"),
        (lambda: RandomIoUCrop(trials=0), "trials"),
        (lambda: RandomFlip(vertical=2), "vertical"),
        (lambda: RandomRotate90(-0.1), "probability"),
        (lambda: PhotometricDistortion(contrast=(1.5, 0.5)), "contrast"),
        (lambda: PhotometricDistortion(hue=300), "hue"),
        (lambda: PhotometricDistortion(hue=None), "hue"),
        (lambda: RandomFlip(vertical="0.5"), "vertical"),
        (lambda: RandomIoUCrop(trials=None), "trials"),
    ],
)
def test_errors_name_the_argument(build, argument):
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: {argument}="):
        build()
