"""Coverage of objects by anchors against all pairs by loops; fitted anchors cover more."""

import numpy as np
import pytest
import reference
from golden_data import load_arrays

from keras_resnest.data import DetectionDataset, ImageRecord
from keras_resnest.detection import AnchorGenerator, anchor_coverage, fit_anchors

SHAPE = (192, 256)


def random_boxes(n=80, seed=0, low=6.0, high=120.0):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(low), np.log(high), (n, 2)))
    corner = rng.uniform(-0.1, 1.0, (n, 2)) * (np.array([256, 192]) - size)
    return np.concatenate([corner, corner + size], axis=1)


def dataset_of(boxes, labels, names, size=(100, 160)):
    """One record per object, in an image of `size`."""
    records = [
        ImageRecord(np.zeros((*size, 3), "uint8"), str(i), box[None], [label])
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
    ]
    return DetectionDataset(records, names)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": True, "sizes": (32, 64, 128, 400)},
        {"offset": 0.2, "aspect_ratios": (1.0, 3.0)},
        {"strides": (16, 100), "sizes": ((20, 50), 150)},
        {"strides": (300,), "sizes": (90,)},
    ],
)
def test_coverage_equals_all_pairs(options):
    generator = AnchorGenerator(**options)
    boxes, labels = random_boxes(), np.arange(80) % 3
    want = reference.iou(boxes, generator(SHAPE)).max(axis=1)
    got = anchor_coverage({"boxes": boxes, "labels": labels}, generator, SHAPE, 0.4)
    np.testing.assert_allclose(got.best_iou, want, atol=1e-4)
    assert got.counts.tolist() == [27, 27, 26]
    assert got.covered.tolist() == [int((want[labels == c] >= 0.4).sum()) for c in range(3)]
    assert got.coverage == pytest.approx((want >= 0.4).mean())
    sizes = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    assert got.size_quantiles[1, 1] == pytest.approx(np.median(sizes[labels == 1]))


def test_an_object_that_is_an_anchor_and_one_that_is_far_from_all():
    generator = AnchorGenerator()
    anchor = generator(SHAPE)[100]
    report = anchor_coverage(
        {"boxes": [anchor, [100, 100, 104, 104]], "labels": [0, 1]}, generator, SHAPE
    )
    assert report.per_class() == {"0": 1.0, "1": 0.0}
    np.testing.assert_allclose(report.best_iou, [1.0, 16 / 1024], atol=1e-5)


def test_datasets_and_arrays_say_the_same():
    """A dataset, its tf.data elements, batches and arrays; boxes stretch as images do."""
    import tensorflow as tf

    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (9, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (9, 2))], axis=1)
    labels, names = np.arange(9) % 2, ["cat", "dog", "cow"]
    dataset = dataset_of(boxes, labels, names)
    scale = np.array([256 / 160, 192 / 100] * 2)
    generator = AnchorGenerator()
    want = anchor_coverage({"boxes": boxes * scale, "labels": labels}, generator, SHAPE)
    got = anchor_coverage(dataset, generator, SHAPE)
    assert got.class_names == ("cat", "dog", "cow")
    assert np.isnan(got.per_class()["cow"]) and got.counts.tolist() == [5, 4, 0]
    padded = {
        "boxes": np.concatenate([boxes, [[9, 9, 99, 99]]])[None] * scale,
        "labels": np.append(labels, -1)[None],
    }
    images = np.zeros((1, *SHAPE, 3), "float32")
    for other in (
        dataset.as_dataset(),
        [(images, padded)],
        {"images": images, "bounding_boxes": padded},
        tf.data.Dataset.from_tensors({"images": images, "bounding_boxes": padded}),
    ):
        report = anchor_coverage(other, generator, SHAPE)
        np.testing.assert_allclose(report.best_iou, want.best_iou, atol=1e-5)
        np.testing.assert_allclose(report.best_iou, got.best_iou, atol=1e-5)
    assert "dog" in str(got) and f"{got.coverage:.3f}" in str(got)


def test_fitted_anchors_cover_small_objects():
    """Two kinds of objects, one too small for the default anchors."""
    rng = np.random.default_rng(2)
    size = np.repeat([[18.0], [70.0]], [30, 300], axis=0) * rng.uniform(0.9, 1.1, (330, 2))
    corner = rng.uniform(0, 1, (330, 2)) * (np.array([256, 192]) - size)
    truth = {
        "boxes": np.concatenate([corner, corner + size], axis=1),
        "labels": np.repeat([0, 1], [30, 300]),
    }
    fitted = fit_anchors(truth, SHAPE)
    before, after = (anchor_coverage(truth, g, SHAPE) for g in (AnchorGenerator(), fitted))
    # 20 x 20 in an anchor of 32 x 32 has an IoU of 0.39 at the most.
    assert before.per_class()["0"] == 0.0 and after.per_class()["0"] > 0.8
    assert after.coverage >= before.coverage
    assert fitted.num_anchors_per_cell == (3, 3, 3, 3)
    assert fit_anchors(truth, SHAPE).get_config() == fitted.get_config()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_ratios", [False, True])
def test_never_below_the_start(seed, with_ratios):
    boxes, labels = random_boxes(120, seed), np.arange(120) % 4
    truth, start = (
        {"boxes": boxes, "labels": labels},
        AnchorGenerator(sizes=((16, 24), 50, 90, 200)),
    )
    fitted = fit_anchors(truth, SHAPE, start, fit_aspect_ratios=with_ratios, max_boxes=70)
    before, after = (reference.iou(boxes, g(SHAPE)).max(axis=1) >= 0.5 for g in (start, fitted))
    assert after.mean() >= before.mean()
    means = [[covered[labels == c].mean() for c in range(4)] for covered in (before, after)]
    assert np.mean(means[1]) >= np.mean(means[0])
    assert fitted.num_anchors_per_cell == start.num_anchors_per_cell
    assert (fitted.aspect_ratios == start.aspect_ratios) or with_ratios
    sizes = [s for level in fitted.sizes for s in level]
    assert sizes == sorted(sizes)


def test_ratios_are_fitted():
    """Objects four times as wide as high."""
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, [150, 150], (60, 2))
    boxes = np.concatenate([corner, corner + np.array([80, 20])], axis=1)
    truth = {"boxes": boxes, "labels": np.zeros(60, int)}
    fitted = fit_anchors(truth, SHAPE, fit_aspect_ratios=True)
    assert max(fitted.aspect_ratios) > 2.5
    plain = anchor_coverage(truth, fit_anchors(truth, SHAPE), SHAPE)
    assert anchor_coverage(truth, fitted, SHAPE).mean_iou[0] > plain.mean_iou[0] + 0.05


def test_platelets():
    """Blood cells at 320: most platelets are met by no default anchor, by fitted ones they are."""
    arrays, scale = load_arrays("blood_cells"), np.array([320 / 640, 320 / 480] * 2)
    train, test = (
        {"boxes": arrays[f"{split}_boxes"] * scale, "labels": arrays[f"{split}_labels"]}
        for split in ("train", "test")
    )
    fitted = fit_anchors(train, (320, 320))
    # Shares of covered platelets, red and white blood cells.
    before, after = (
        list(anchor_coverage(test, generator, (320, 320)).per_class().values())
        for generator in (AnchorGenerator(), fitted)
    )
    assert before[0] < 0.6 and after[0] > 0.9
    assert min(after) > 0.9


def test_bad_input():
    truth, generator = {"boxes": random_boxes(3), "labels": [0, 1, 2]}, AnchorGenerator()
    with pytest.raises(ValueError, match="iou_threshold"):
        anchor_coverage(truth, generator, SHAPE, 0.0)
    with pytest.raises(ValueError, match="image_shape"):
        anchor_coverage(truth, generator, (320,))
    with pytest.raises(ValueError, match="Ground truth"):
        anchor_coverage([[1, 2]], generator, SHAPE)
    empty = {"boxes": np.zeros((0, 4)), "labels": []}
    with pytest.raises(ValueError, match="objects to fit"):
        fit_anchors(empty, SHAPE)
    report = anchor_coverage(empty, generator, SHAPE)
    assert np.isnan(report.coverage) and "nan" in str(report)
    flat = {"boxes": [[5, 5, 5, 50.0]], "labels": [0]}  # no area: left out
    assert anchor_coverage(flat, generator, SHAPE).counts.sum() == 0
