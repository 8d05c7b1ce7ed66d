"""Tiles: what is seen, what is merged, what is cut, in detection, evaluation and training."""

from pathlib import Path

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from detectors import rectangles, small_detector
from PIL import Image

import keras_resnest as kr
from keras_resnest.detection import DetectionDecoder, TiledDetector
from keras_resnest.detection.detect import _tile_starts

TILE = (64, 128)
NAMES = ("boxes", "confidence", "labels")


@pytest.fixture(scope="module")
def detector():
    """Random weights, which find objects of every class everywhere; no box is clipped."""
    model = small_detector(decoder=DetectionDecoder(clip_to_image=False, max_detections=20))
    for weight in model.trainable_weights:  # make predictions vary
        if "odm" in weight.path and weight.path.endswith("kernel"):
            weight.assign(weight * 2.0)
    return model


# === Where the tiles are ===


@pytest.mark.parametrize("side, tile, overlap", [(1600, 320, 0.2), (321, 320, 0.0), (999, 64, 0.5)])
def test_tiles_cover_the_image_and_overlap(side, tile, overlap):
    starts = _tile_starts(side, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == side
    assert (starts[:-1] + tile - starts[1:] >= overlap * tile).all()
    fewer = len(starts) - 1  # could not cover the side with this overlap
    assert fewer * tile - (fewer - 1) * overlap * tile < side


# === One image ===


@pytest.mark.parametrize("shape", [(64, 128), (50, 100), (64, 90)])
def test_an_image_that_is_one_tile_is_not_tiled(detector, shape):
    image = rectangles(1, (*shape, 3), seed=3)[0][0]
    want = detector.detect(image, 0.0)
    got = detector.detect(image, 0.0, tiles=TILE)
    assert len(want["boxes"]) and got["class_names"] == want["class_names"]
    for name in NAMES:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tiles_and_the_whole_image_are_seen_and_merged(detector, monkeypatch, batch_size):
    """Each tile through `detect`, moved and merged by loops; nothing is cut where nothing joins."""
    monkeypatch.setattr("keras_resnest.detection.detect.CUT_MARGIN", -np.inf)
    image = rectangles(1, (100, 300, 3), seed=4)[0][0]
    found = [detector.detect(image, 0.0)]
    for top in (0, 36):
        for left in (0, 86, 172):  # at least 0.2 * 128 pixels in common
            rows = detector.detect(image[top : top + 64, left : left + 128], 0.0)
            found.append({**rows, "boxes": rows["boxes"] + [left, top, left, top]})
    rows = {name: np.concatenate([f[name] for f in found]) for name in NAMES}
    kept = reference.suppress(**rows, iou_threshold=0.45)
    got = detector.detect(image, 0.0, batch_size, tiles=TILE, overlap=0.2)
    assert len(kept) > 20
    np.testing.assert_array_equal(got["labels"], rows["labels"][kept])
    np.testing.assert_allclose(got["confidence"], rows["confidence"][kept], atol=1e-5)
    np.testing.assert_allclose(got["boxes"], rows["boxes"][kept], atol=1e-2)


def test_a_side_shorter_than_a_tile_is_filled_up(detector, monkeypatch):
    monkeypatch.setattr(detector, "decoder", DetectionDecoder(max_detections=20))
    seen = []
    detect = detector.compiled_detector.__call__
    monkeypatch.setattr(
        detector, "compiled_detector", lambda images: seen.append(images) or detect(images)
    )
    image = rectangles(1, (40, 300, 3), seed=4)[0][0]
    boxes = detector.detect(image, 0.0, tiles=TILE)["boxes"]
    tiles = np.concatenate(seen[1:])
    np.testing.assert_array_equal(tiles[0, :40], image[:, :128])
    np.testing.assert_allclose(tiles[:, 40:], np.broadcast_to((123, 117, 104), (3, 24, 128, 3)))
    assert len(boxes) and boxes.min() >= 0 and (boxes.max(axis=0)[2:] <= (300, 40)).all()


def test_formats_files_and_several_images(detector, tmp_path):
    relative = small_detector(bounding_box_format="rel_yxyx", decoder=detector.decoder)
    relative.set_weights(detector.get_weights())
    images = [rectangles(1, (100, 300, 3), seed=s)[0][0].astype("uint8") for s in (5, 6)]
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"b\.png"):
        first, none = relative.detect(tmp_path, 0.4, tiles=TILE)
    assert none is None
    want = detector.detect(images, 0.4, tiles=TILE)
    assert len(want) == 2 and len(want[1]["boxes"])
    got = first["boxes"][:, [1, 0, 3, 2]] * [300, 100, 300, 100]
    np.testing.assert_allclose(got, want[0]["boxes"], atol=1e-2)


# === Cut boxes ===

LEFT, RIGHT, BELOW = [0, 0, 100, 100], [80, 0, 180, 100], [0, 80, 100, 180]
RIGHT_BELOW = [80, 80, 180, 180]


def joined(detector, *parts):
    """Joins parts (box, confidence, tile) of class 0 in an image of 180 x 180 with four tiles."""
    borders = np.array([tile for *_, tile in parts], float)
    borders = np.where(borders == 0, -np.inf, np.where(borders == 180, np.inf, borders))
    rows = {
        "boxes": np.array([box for box, *_ in parts], float),
        "confidence": np.array([confidence for _, confidence, _ in parts], "float32"),
        "labels": np.zeros(len(parts), int),
        "passes": np.arange(len(parts)),
    }
    rows = TiledDetector(detector, TILE)._join_cut_boxes(rows, borders)
    order = np.argsort(-rows["confidence"])
    return rows["boxes"][order].tolist(), rows["confidence"].astype(float)[order].round(3).tolist()


def test_parts_of_an_object_are_joined(detector):
    parts = ([20, 30, 99, 60], 0.7, LEFT), ([81, 31, 150, 62], 0.9, RIGHT)
    assert joined(detector, *parts) == ([[20, 30, 150, 62]], [0.9])
    parts = ([30, 20, 60, 99], 0.9, LEFT), ([31, 81, 62, 150], 0.7, BELOW)
    assert joined(detector, *parts) == ([[30, 20, 62, 150]], [0.9])
    corner = (
        *(([50, 50, 99, 99], 0.8, LEFT), ([81, 50, 130, 99], 0.7, RIGHT)),
        *(([50, 81, 99, 140], 0.6, BELOW), ([81, 81, 130, 140], 0.5, RIGHT_BELOW)),
    )
    assert joined(detector, *corner) == ([[50, 50, 130, 140]], [0.8])


def test_other_boxes_are_not_joined(detector):
    cut = [20, 30, 99, 60], 0.7, LEFT
    for other in (
        ([81, 61, 150, 95], 0.7, RIGHT),  # beside it, not behind
        ([90, 31, 150, 62], 0.7, RIGHT),  # whole: it does not reach the border of its tile
        ([81, 31, 150, 62], 0.2, RIGHT),  # far less confident
        ([81, 31, 150, 62], 0.7, [*LEFT[:2], 180, 180]),  # of a tile that ends with the image
    ):
        boxes, _ = joined(detector, cut, other)
        assert sorted(boxes) == sorted([cut[0], other[0]])


def test_parts_of_an_object_that_was_found_are_dropped(detector):
    whole = [85, 30, 130, 60], 0.6, RIGHT
    part = [84, 31, 100, 59], 0.9, LEFT
    assert joined(detector, whole, part) == ([whole[0]], [0.6])
    assert len(joined(detector, ([85, 30, 130, 60], 0.3, RIGHT), part)[0]) == 2  # hardly found
    assert len(joined(detector, ([10, 30, 90, 60], 0.6, RIGHT), part)[0]) == 2  # elsewhere
    inner = [60, 31, 90, 59], 0.9, LEFT  # cut by no tile: an object of its own
    assert len(joined(detector, ([50, 20, 130, 70], 0.6, [0, 0, 180, 180]), inner)[0]) == 2


# === Evaluation ===


def test_evaluates_images_of_any_size(detector):
    sizes = [(100, 300), (64, 128), (70, 200)]
    elements = []
    for seed, size in enumerate(sizes):
        images, truth = rectangles(1, (*size, 3), seed=seed)
        rows = {"boxes": truth["boxes"][0], "labels": truth["labels"][0]}
        elements.append({"images": images[0], "bounding_boxes": rows})
    spec = {
        "images": tf.TensorSpec((None, None, 3)),
        "bounding_boxes": {
            "boxes": tf.TensorSpec((None, 4)),
            "labels": tf.TensorSpec((None,), tf.int32),
        },
    }
    dataset = tf.data.Dataset.from_generator(lambda: elements, output_signature=spec)
    batches = kr.data.evaluation_batches(dataset, None, 1, max_boxes=4)
    assert [tuple(b["images"].shape[1:3]) for b in batches] == sizes
    tiled = TiledDetector(detector, TILE)
    truth, found = kr.evaluation.collect_detections(tiled, batches)
    for element, objects, rows in zip(elements, truth, found, strict=True):
        np.testing.assert_array_equal(objects["boxes"], element["bounding_boxes"]["boxes"])
        want = detector.detect(element["images"], 0.0, tiles=TILE)
        assert len(want["boxes"])
        np.testing.assert_allclose(rows["boxes"], want["boxes"], atol=1e-3)
    assert 0.0 <= kr.evaluation.evaluate_detections(tiled, batches).mAP <= 1.0
    with pytest.raises(ValueError, match=r"batch_size.*8"):
        kr.data.evaluation_batches(dataset, None, 8)


# === Training ===


def elements_of(images, truth):
    return tf.data.Dataset.from_tensor_slices({"images": images, "bounding_boxes": truth})


def test_trains_on_tiles_at_native_resolution():
    """Every tile is a part of its image, and holds the objects that are mostly in it."""
    images, truth = rectangles(8, (150, 260, 3), seed=1, objects=5)
    images += np.random.default_rng(0).random(images.shape).astype("float32")  # no two parts equal
    batches = kr.data.training_batches(
        elements_of(images, truth), TILE, 8, None, tiles=TILE, shuffle_buffer=0, seed=1
    )
    epochs = [next(iter(batches)) for _ in range(6)]
    corners, shown = [], 0
    for batch in epochs:
        for i, tile in enumerate(batch["images"].numpy()):
            first = np.abs(images[i, :87, :133] - tile[0, 0]).max(axis=-1) < 1e-4
            ((y, x),) = np.argwhere(first)
            corners.append((i, x, y))
            np.testing.assert_allclose(tile, images[i, y : y + 64, x : x + 128], atol=1e-3)
            boxes = truth["boxes"][i] - [x, y, x, y]
            inside = boxes.clip(0, [128, 64] * 2)
            area, visible = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, inside))
            kept = batch["bounding_boxes"]["labels"][i].numpy() >= 0
            got = batch["bounding_boxes"]["boxes"][i].numpy()[kept]
            np.testing.assert_allclose(got, inside[visible >= 0.5 * area], atol=1e-3)
            shown += len(got) > 0
    assert len(set(corners)) > 40 and shown > 24  # new tiles in each epoch, at least half not empty


def test_tiles_without_objects_and_beyond_the_image():
    image = np.full((1, 40, 200, 3), 7.0, "float32")
    nothing = {"boxes": np.zeros((1, 1, 4), "float32"), "labels": np.full((1, 1), -1, "int32")}
    batches = kr.data.training_batches(elements_of(image, nothing), TILE, 1, None, tiles=TILE)
    (batch,) = batches
    np.testing.assert_allclose(batch["images"][0, :40], 7.0, atol=1e-4)
    np.testing.assert_allclose(
        batch["images"][0, 40:], np.broadcast_to((123, 117, 104), (24, 128, 3))
    )
    assert batch["bounding_boxes"]["labels"].numpy().tolist() == [[-1]]


def test_max_boxes_with_several_image_sizes():
    images, truth = rectangles(2)
    sizes = [(64, 64), (64, 128)]
    batches = kr.data.training_batches(
        elements_of(images, truth), TILE, 2, None, image_sizes=sizes, max_boxes=5
    )
    (batch,) = batches
    assert tuple(batch["images"].shape[1:3]) in sizes
    assert batch["bounding_boxes"]["boxes"].shape == (2, 5, 4)


# === Other packages ===


def test_supervision_gets_the_same_detections(detector):
    supervision = pytest.importorskip("supervision")
    found = detector.detect(rectangles(1)[0][0], 0.4)
    got = kr.detection.to_supervision(found)
    assert isinstance(got, supervision.Detections) and len(got) == len(found["boxes"]) > 0
    np.testing.assert_array_equal(got.xyxy, found["boxes"])
    np.testing.assert_array_equal(got.confidence, found["confidence"])
    assert got["class_name"].tolist() == found["class_names"]
    empty = {name: values[:0] for name, values in found.items()}
    assert len(kr.detection.to_supervision(empty)) == 0


def test_sahi_uses_the_adapter_of_the_documentation(detector):
    """One slice as large as the image gives what `detect` gives."""
    pytest.importorskip("sahi")
    from sahi.predict import get_prediction, get_sliced_prediction

    text = (Path(__file__).parents[1] / "docs/detector.md").read_text()
    code = text[text.index("from sahi.models.base") :]
    names = {"keras": keras, "np": np}
    exec(code[: code.index("```")], names)
    image = rectangles(1)[0][0].astype("uint8")
    adapter = names["SahiRefineDet"](model=detector, confidence_threshold=0.4, device="cpu")
    predictions = get_prediction(image, adapter).object_prediction_list
    found = detector.detect(image, 0.4)
    assert len(predictions) == len(found["boxes"]) > 0
    got = [p.bbox.to_xyxy() for p in predictions]
    np.testing.assert_allclose(got, found["boxes"].clip(0, [128, 64] * 2), atol=1e-3)
    assert [p.category.name for p in predictions] == found["class_names"]
    large, size = np.tile(image, (2, 1, 1)), {"slice_height": 64, "slice_width": 128}
    options = {"overlap_height_ratio": 0, "perform_standard_pred": False, "verbose": 0}
    sliced = get_sliced_prediction(large, adapter, **size, **options, postprocess_type="NMS")
    tops = [p.bbox.miny for p in sliced.object_prediction_list]
    assert min(tops) < 64 < max(tops)  # slices are moved to their places


# === Bad input ===


@pytest.mark.parametrize(
    "options, word",
    [
        ({"tiles": (64, 100)}, r"`tiles`.*multiples of 64.*\(64, 100\)"),
        ({"tiles": 64}, "`tiles`.*64"),
        ({"tiles": (0, 64)}, "`tiles`"),
        ({"tiles": TILE, "overlap": 1.0}, "`overlap` must be below 1.*1.0"),
        ({"tiles": TILE, "overlap": 1.5}, "`overlap`.*1.5"),
        ({"tiles": TILE, "overlap": -0.1}, "`overlap`.*-0.1"),
        ({"tiles": TILE, "batch_size": 0}, "`batch_size`.*0"),
    ],
)
def test_bad_arguments(detector, options, word):
    with pytest.raises(ValueError, match=word):
        detector.detect(np.zeros((100, 300, 3), "uint8"), **options)


def test_bad_tiles_for_training():
    images, truth = rectangles(1)
    with pytest.raises(ValueError, match="`tiles` must be"):
        kr.data.training_batches(elements_of(images, truth), TILE, 1, tiles=(64.5, 64))


def test_an_image_too_large_to_read_is_refused(detector, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png.*pixels.*max_pixels"):
        detector.detect(tmp_path / "huge.png", tiles=TILE)


def test_config(detector):
    tiled = TiledDetector(detector, (128, 64), overlap=0.3, batch_size=2)
    again = TiledDetector.from_config(tiled.get_config())
    assert (again.tiles, again.overlap, again.batch_size) == ((128, 64), 0.3, 2)
    assert again.class_names == detector.class_names and again.num_classes == 3
    assert isinstance(keras.saving.serialize_keras_object(tiled), dict)
