"""The Shapes dataset: boxes against pixels, repeatability, variety, and TFDS."""

import dataclasses
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_resnest.data import (
    Shapes,
    find_splits,
    read_detection,
    read_shapes,
    read_train_test,
    shapes,
)
from keras_resnest.data.shapes import CLASS_NAMES, draw_scene, plan_scene


def with_figures(scene, figures):
    return dataclasses.replace(scene, figures=tuple(figures))


def difference(scene, figures, other_figures):
    """Pixels (bool) that differ between two choices of figures."""
    a, b = (draw_scene(with_figures(scene, chosen)) for chosen in (figures, other_figures))
    return (a != b).any(axis=-1)


def extent(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.fixture(scope="module", params=[192, 320])
def scenes(request):
    return [plan_scene((11, i), request.param) for i in range(25)]


def test_boxes_are_tight_around_the_pixels(scenes):
    """An image with a figure differs from one without it exactly inside the box."""
    errors = []
    for scene in scenes:
        for figure, box in zip(scene.figures, scene.boxes, strict=True):
            errors.append(extent(difference(scene, [figure], [])) - box)
    errors = np.abs(errors)
    assert len(errors) > 50
    # half a pixel for rounding, one more for a thin corner that hardly tints its pixel
    assert errors.max() < 1.6 and (errors > 1.0).mean() < 0.02


def test_images_differ_only_inside_the_box_of_a_figure(scenes):
    for scene in scenes:
        for i, box in enumerate(scene.boxes):
            others = [f for k, f in enumerate(scene.figures) if k != i]
            left, top, right, bottom = extent(difference(scene, scene.figures, others))
            assert left >= box[0] - 1 and top >= box[1] - 1
            assert right <= box[2] + 1 and bottom <= box[3] + 1


def test_enough_of_every_figure_is_visible(scenes):
    for scene in scenes:
        for i, figure in enumerate(scene.figures):
            others = [f for k, f in enumerate(scene.figures) if k != i]
            whole = difference(scene, [figure], []).sum()
            visible = difference(scene, scene.figures, others).sum() / whole
            assert visible > 0.35
            if abs(visible - 0.6) > 0.06:
                assert scene.difficult[i] == (visible < 0.6)


def test_same_seed_same_image():
    for size in (64, 192):
        first, second = plan_scene((5, 6), size), plan_scene((5, 6), size)
        np.testing.assert_array_equal(draw_scene(first), draw_scene(second))
        np.testing.assert_array_equal(first.boxes, second.boxes)
    images = {draw_scene(plan_scene((5, i))).tobytes() for i in range(10)}
    assert len(images) == 10
    image = draw_scene(plan_scene(0, 100))
    assert image.shape == (100, 100, 3) and image.dtype == np.uint8


def test_variety():
    many = [plan_scene((2, i)) for i in range(600)]
    counts = np.bincount([len(scene.figures) for scene in many], minlength=7)
    assert 0.01 < counts[0] / 600 < 0.08 and counts[1:].min() > 30
    labels = np.concatenate([scene.labels for scene in many])
    frequencies = np.bincount(labels, minlength=len(CLASS_NAMES)) / len(labels)
    assert frequencies.min() > 0.8 / len(CLASS_NAMES) and frequencies.max() < 1.2 / len(CLASS_NAMES)
    boxes = np.concatenate([scene.boxes for scene in many])
    assert boxes.min() >= 0 and boxes.max() <= 192
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / 192
    assert sides.min() > 0.75 * 16 / 192 and sides.max() < 0.601
    assert (sides < 0.12).mean() > 0.1 and (sides > 0.4).mean() > 0.1
    difficult = np.concatenate([scene.difficult for scene in many])
    assert 0.01 < difficult.mean() < 0.1


def test_figures_stand_out_from_what_is_behind_them():
    """A figure changes its pixels by more than the noise does."""
    changes = []
    for i in range(40):
        scene = plan_scene((3, i))
        empty = draw_scene(with_figures(scene, [])).astype(float)
        for figure in scene.figures:
            image = draw_scene(with_figures(scene, [figure])).astype(float)
            mask = (image != empty).any(axis=-1)
            changes.append(np.linalg.norm(image[mask].mean(axis=0) - empty[mask].mean(axis=0)))
    assert np.min(changes) > 25 and np.median(changes) > 90


def test_too_small_an_image():
    with pytest.raises(ValueError, match="at least 48"):
        plan_scene(0, 32)


# === TFDS ===


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folder with the configuration "tiny", generated without network."""
    folder = tmp_path_factory.mktemp("shapes")

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        tfds.load("shapes/tiny", data_dir=folder)
    return folder


def test_tfds_load(data_dir):
    dataset, info = tfds.load("shapes/tiny", split="test", data_dir=data_dir, with_info=True)
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 48,
        "validation": 16,
        "test": 16,
    }
    assert info.features["objects"].feature["label"].names == list(CLASS_NAMES)
    for example in dataset:
        boxes = example["objects"]["bbox"].numpy()
        assert example["image"].shape == (96, 96, 3)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min(initial=0) >= 0


def test_what_is_read_is_what_was_drawn(data_dir):
    numbers = {"size": 96, "num_train": 48, "num_validation": 16, "num_test": 16}
    dataset = read_shapes("validation", data_dir=data_dir, **numbers)
    assert len(dataset) == 16 and dataset.class_names == list(CLASS_NAMES)
    for element in dataset.as_dataset():
        split, index = element["image_id"].numpy().decode().split("_")
        scene = plan_scene((0, 1, int(index)), 96)
        boxes = element["bounding_boxes"]
        assert split == "validation"
        np.testing.assert_allclose(boxes["boxes"], scene.boxes, atol=1e-4)
        np.testing.assert_array_equal(boxes["labels"], scene.labels)
        np.testing.assert_array_equal(boxes["difficult"], scene.difficult)
        image = element["images"].numpy().astype(float)
        assert np.abs(image - draw_scene(scene)).mean() < 6  # JPEG
    assert dataset.report.num_images == 16 and not dataset.report.problems
    # the predefined configuration was recognized, nothing was drawn again
    assert [path.name for path in (data_dir / "shapes").glob("[!.]*")] == ["tiny"]


def test_tfds_names_are_read(data_dir):
    tfds.core.add_data_dir(data_dir)
    assert find_splits("tfds:shapes/tiny") == ["test", "train", "validation"]
    assert len(read_detection("tfds:shapes/tiny", "train[:5]")) == 5
    train, test = read_train_test("tfds:shapes/tiny")
    assert (len(train), len(test)) == (48, 16) and train.class_names == test.class_names
    train, test = read_train_test(
        "tfds:shapes/tiny", train_split="train+test", test_split="validation[:4]"
    )
    assert (len(train), len(test)) == (64, 4)


def test_custom_numbers(data_dir):
    numbers = {"size": 64, "num_train": 3, "num_validation": 1, "num_test": 1}
    datasets = [read_shapes("train", seed=s, data_dir=data_dir, **numbers) for s in (1, 2)]
    first, second = ([e["images"].numpy() for e in d.as_dataset()] for d in datasets)
    assert len(first) == 3 and first[0].shape == (64, 64, 3)
    assert not any(np.array_equal(a, b) for a in first for b in second)


def test_builder_with_a_custom_configuration(tmp_path):
    config = shapes.ShapesConfig(name="mine", size=48, num_train=2, num_validation=0, num_test=1)
    builder = Shapes(config=config, data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.info.features["image"].shape == (48, 48, 3)
    assert len(list(builder.as_dataset(split="train+test"))) == 3
    assert list(builder.info.splits) == ["train", "test"]
