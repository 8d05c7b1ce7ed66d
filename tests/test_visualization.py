"""Plots, read back from the files they write."""

import colorsys
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sample_images import photograph

from keras_resnest.evaluation import voc_average_precision
from keras_resnest.visualization import (
    LOSSES,
    class_color,
    plot_bars,
    plot_calibration,
    plot_class_curves,
    plot_confusion_matrix,
    plot_dataset,
    plot_detections,
    plot_history,
    plot_precision_recall,
)

NOTHING = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "confidence": np.zeros(0)}


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def drawn_pixels(image, label):
    """Mask of the pixels that have (nearly) the color of a class."""
    color = np.round(255 * np.array(class_color(label)))
    return np.abs(image - color).max(axis=-1) < 30


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_images_are_shown_pixel_by_pixel(tmp_path):
    """Small images are enlarged by an integer factor, without blur."""
    rng = np.random.default_rng(0)
    for shape, factor in (((64, 48), 10), ((100, 213), 3), ((480, 640), 1), ((57, 701), 1)):
        image = rng.integers(0, 256, (*shape, 3)).astype("uint8")
        plot_detections(image, NOTHING, path=tmp_path / "a.png")
        shown = read(tmp_path / "a.png")
        np.testing.assert_array_equal(shown, image.repeat(factor, axis=0).repeat(factor, axis=1))


def test_large_images_are_reduced(tmp_path):
    image = np.full((1500, 3000, 3), 130, "uint8")
    plot_detections(image, NOTHING, path=tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (320, 640, 3)
    plot_detections(image, NOTHING, size=900, path=tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (450, 900, 3)


@pytest.mark.parametrize("box_format", ["xyxy", "xywh", "rel_yxyx", "rel_center_xywh"])
def test_position_of_a_box(tmp_path, box_format):
    """The outline surrounds the object, in every box format."""
    from keras_resnest.boxes.formats import convert_boxes

    image = np.full((100, 200, 3), 255, "uint8")
    box = np.array([[50.0, 20.0, 150.0, 70.0]])
    converted = np.asarray(convert_boxes(box, "xyxy", box_format, height=100, width=200))
    found = {"boxes": converted, "labels": [0]}
    plot_detections(image, found, bounding_box_format=box_format, path=tmp_path / "a.png")
    pixels = drawn_pixels(read(tmp_path / "a.png"), 0)
    pixels[:58] = False  # the label, above the upper line
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    factor = 3  # 200 is enlarged to 600
    for line, wanted in (
        (rows.min(), 20),
        (rows.max(), 70),
        (columns.min(), 50),
        (columns.max(), 150),
    ):
        assert abs(line - factor * wanted) <= 2
    assert not pixels[factor * 20 + 5 : factor * 70 - 5, factor * 50 + 5 : factor * 150 - 5].any()


def test_threshold_padding_and_names():
    image = np.zeros((60, 80, 3), "float32")
    found = {
        "boxes": np.array([[5, 5, 30, 30], [20, 20, 60, 50], [0, 0, 9, 9], [-1, -1, -1, -1.0]]),
        "labels": np.array([1, 0, 1, -1]),
        "confidence": np.array([0.51, 0.934, 0.2, -1.0]),
    }
    figure = plot_detections(image, found, ["cat", "dog"])
    assert texts(figure) == ["cat 0.93", "dog 0.51"]
    figure = plot_detections(image, found, ["cat", "dog"], confidence_threshold=0.1)
    assert texts(figure) == ["cat 0.93", "dog 0.51", "dog 0.20"]
    assert texts(plot_detections(image, found)) == ["0 0.93", "1 0.51"]
    assert texts(plot_detections(image, found, ["$5$", "a_$^$"]))[0] == "$5$ 0.93"
    # Names beside the boxes, as in the result of `RefineDet.detect`.
    named = {name: values[:3] for name, values in found.items()}
    named["class_names"] = ["Hund", "Katze", "Hund"]
    assert texts(plot_detections(image, named)) == ["Katze 0.93", "Hund 0.51"]
    # Boxes without confidence are ground truth: all are drawn, with their names.
    assert texts(plot_detections(image, {"boxes": [[1, 1, 9, 9]], "labels": [1]}, "ab")) == ["b"]


def test_labels_stay_inside_and_apart():
    """Labels of boxes at all borders lie within the image and do not overlap."""
    image = np.zeros((120, 160, 3), "uint8")
    boxes = [[0, 0, 40, 40], [0, 0, 42, 44], [120, 0, 160, 30], [130, 80, 160, 120]]
    boxes += [[0, 60, 12, 120], [60, 50, 90, 80], [60, 50, 92, 84]]
    found = {"boxes": boxes, "labels": np.arange(7), "confidence": np.linspace(0.9, 0.5, 7)}
    figure = plot_detections(image, found, [f"long class name {i}" for i in range(7)])
    (axes,) = figure.axes
    frame = axes.get_window_extent()
    extents = [text.get_window_extent() for text in axes.texts]
    assert len(extents) == 7
    for extent in extents:
        assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1
        assert frame.y0 <= extent.y0 and extent.y1 <= frame.y1
    for one, other in itertools.combinations(extents, 2):
        assert not one.overlaps(other)


def test_only_the_most_confident_of_many_boxes_get_labels():
    corner = np.random.default_rng(0).uniform(0, 300, (200, 2))
    boxes = np.concatenate([corner, corner + 20], axis=1)
    found = {"boxes": boxes, "labels": [0] * 200, "confidence": np.linspace(0.4, 0.9, 200)}
    figure = plot_detections(np.zeros((320, 320, 3)), found)
    assert len(figure.axes[0].patches) == 200
    assert texts(figure) == [f"0 {value:.2f}" for value in np.linspace(0.9, 0.4, 200)[:40]]


def test_ground_truth_is_dashed(tmp_path):
    image = np.full((200, 200, 3), 128, "uint8")
    truth = {"boxes": [[20, 20, 180, 180]], "labels": [2]}
    figure = plot_detections(image, NOTHING, ground_truth=truth, path=tmp_path / "a.png")
    assert any("ground truth" in text.get_text() for text in figure.texts)
    line = drawn_pixels(read(tmp_path / "a.png"), 2)[540 - 2 : 540 + 2, 70:530].any(axis=0)
    changes = np.count_nonzero(np.diff(line.astype(int)))
    assert changes > 20 and 0.3 < line.mean() < 0.8
    solid = {"boxes": truth["boxes"], "labels": [2]}
    plot_detections(image, solid, path=tmp_path / "b.png")
    assert drawn_pixels(read(tmp_path / "b.png"), 2)[538:542, 70:530].any(axis=0).all()


def test_grid_of_several_images(tmp_path):
    rng = np.random.default_rng(1)
    images = [np.full((50, 80, 3), 10, "uint8"), np.full((90, 40, 3), (1, 200, 3), "uint8")]
    images.append(rng.integers(0, 255, (70, 70)).astype("uint8"))  # grayscale
    figure = plot_detections(
        images, [NOTHING] * 3, columns=2, titles=["one", "two", "three"], path=tmp_path / "a.png"
    )
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "three"]
    lefts = [round(axes.get_window_extent().x0) for axes in figure.axes]
    tops = [round(axes.get_window_extent().y1) for axes in figure.axes]
    # Enlarged 5, 4 and 6 times; the columns are 420 wide, the images centered in them.
    assert lefts == [10 + 10, 10 + 420 + 10 + 130, 10]
    assert tops[1] - tops[0] == (360 - 250) // 2 and tops[2] < tops[1] - 360
    shown = read(tmp_path / "a.png")
    assert (shown == (1, 200, 3)).all(axis=-1).sum() == 360 * 160
    # A batch as returned by `predict`.
    batch = {
        "boxes": np.full((2, 5, 4), -1.0, "float32"),
        "labels": np.full((2, 5), -1),
        "confidence": np.full((2, 5), -1.0),
        "num_detections": np.array([1, 0]),
    }
    batch["boxes"][0, 0], batch["labels"][0, 0], batch["confidence"][0, 0] = [1, 1, 9, 9], 1, 0.8
    figure = plot_detections(np.zeros((2, 32, 32, 3)), batch, ["a", "b"])
    assert [len(axes.texts) for axes in figure.axes] == [1, 0]


def test_draws_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(1, 2)
    found = {"boxes": [[1, 1, 9, 9]], "labels": [0], "confidence": [0.9]}
    assert plot_detections(np.zeros((20, 20, 3)), found, ax=axes[1]) is figure
    assert len(axes[1].patches) == 1 and not axes[0].images
    with pytest.raises(ValueError, match="`ax` takes one image"):
        plot_detections(np.zeros((2, 20, 20, 3)), [found, found], ax=axes[0])


def test_reads_files(odd_images, tmp_path):
    photograph(300, 451).save(tmp_path / "photograph.jpg")
    plot_detections(tmp_path / "photograph.jpg", NOTHING, path=tmp_path / "a.png")
    wanted = np.asarray(Image.open(tmp_path / "photograph.jpg")).astype(int)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), wanted)
    # Upright by its EXIF orientation: 320 wide, 212 high, enlarged twice.
    plot_detections(str(odd_images / "exif_orientation6.jpg"), NOTHING, path=tmp_path / "b.png")
    assert read(tmp_path / "b.png").shape == (424, 640, 3)


def test_colors_are_distinguishable():
    colors = np.array([class_color(label) for label in range(20)])
    assert colors.min() >= 0 and colors.max() <= 1
    assert np.array_equal(colors[7], class_color(7))
    # Distances in CIE Lab; 2.3 is just noticeable.
    linear = np.where(colors > 0.04045, ((colors + 0.055) / 1.055) ** 2.4, colors / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    root = np.cbrt(linear @ np.transpose(to_xyz) / [0.9505, 1.0, 1.089])
    lab = np.stack([116 * root[:, 1], *(-np.diff(root) * (500, 200)).T], axis=1)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 100 * np.eye(20)
    assert distances.min() > 20
    # None is a gray, white or black that disappears in a photograph.
    assert min(colorsys.rgb_to_hsv(*color)[1] for color in colors) > 0.5
    assert len({class_color(label) for label in range(200)}) == 200


def test_plot_dataset(tmp_path):
    """Batched, unbatched, tuples and dataset objects give the same plot."""
    tf = pytest.importorskip("tensorflow")
    names = ["RBC", "WBC", "Platelets"]
    rng = np.random.default_rng(0)
    images, boxes, labels = [], [], []
    for seed, count in enumerate((5, 1, 3)):
        images.append(np.asarray(photograph(240, 320, seed)))
        boxes.append(np.zeros((8, 4), "float32"))
        labels.append(np.full(8, -1, "int32"))
        boxes[-1][:count, :2] = rng.uniform(0, 200, (count, 2))
        boxes[-1][:count, 2:] = boxes[-1][:count, :2] + rng.uniform(20, 40, (count, 2))
        labels[-1][:count] = rng.integers(0, 3, count)
    truth = {"boxes": np.stack(boxes), "labels": np.stack(labels)}
    elements = {"images": np.stack(images), "bounding_boxes": truth}
    unbatched = tf.data.Dataset.from_tensor_slices(elements)

    class Cells:
        class_names = names

        def as_dataset(self):
            return unbatched

    forms = [
        (unbatched, names),
        (unbatched.batch(2), names),
        (unbatched.batch(3).map(lambda x: (x["images"], x["bounding_boxes"])), names),
        (Cells(), None),
    ]
    written = []
    for dataset, given in forms:
        figure = plot_dataset(dataset, given, rows=1, columns=3, path=tmp_path / "a.png")
        assert len(figure.axes) == 3
        assert [len(axes.texts) for axes in figure.axes] == [int((b >= 0).sum()) for b in labels]
        written.append(read(tmp_path / "a.png"))
    assert all(np.array_equal(plot, written[0]) for plot in written[1:])
    assert len(plot_dataset(unbatched.batch(2), names, rows=1, columns=1).axes) == 1
    with pytest.raises(ValueError, match="at least one image"):
        plot_dataset(unbatched.take(0), names)
    with pytest.raises(ValueError, match="Ground truth must be a dictionary"):
        plot_dataset(unbatched.map(lambda x: x["images"]), names)


# === Curves ===


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_plot_history(tmp_path):
    history = {name: [4.0, 3.0, 2.0, 1.0] for name in LOSSES}
    history |= {f"val_{name}": [5.0, None, 3.0, float("nan")] for name in LOSSES}
    history["learning_rate"] = [0.1] * 4
    figure = plot_history(history, tmp_path / "a.png")
    (axes,) = figure.axes
    assert len(axes.lines) == 11  # and one for the legend of the dashes
    assert lines_of(axes)["arm_box_loss"] == [[1, 4], [2, 3], [3, 2], [4, 1]]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_xydata().tolist() for line in dashed[:5]] == [[[1, 5], [3, 3]]] * 5
    assert read(tmp_path / "a.png").std() > 10

    history |= {"val_mAP50": [0.1, 0.5], "val_AP50/RBC": [0.2, 0.6]}
    losses, precisions = plot_history(history, log_scale=True).axes
    assert losses.get_yscale() == "log"
    # Two values for four epochs: evenly spread, the last one at the end.
    assert lines_of(precisions) == {"val_mAP50": [[2, 0.1], [4, 0.5]], "RBC": [[2, 0.2], [4, 0.6]]}

    # The attributes that DetectionEvaluation has.
    evaluation = SimpleNamespace(epoch=[0, 3], history={"val_mAP50": [0.1, 0.5]})
    _, precisions = plot_history([history, evaluation]).axes
    assert lines_of(precisions)["val_mAP50"] == [[1, 0.1], [4, 0.5]]
    with pytest.raises(ValueError, match="must hold losses"):
        plot_history({"accuracy": [1.0]})
    with pytest.raises(ValueError, match=r"the result of `model.fit`"):
        plot_history(3)


def test_plot_history_of_a_real_training():
    import keras

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    options = {"validation_data": (x, y), "validation_freq": 2, "verbose": 0, "shuffle": False}
    history = model.fit(x, y, epochs=6, initial_epoch=2, **options)
    (axes,) = plot_history(history).axes
    assert [point[0] for point in lines_of(axes)["loss"]] == [3, 4, 5, 6]
    assert axes.lines[1].get_xdata().tolist() == [4, 6]
    assert axes.lines[1].get_ydata() == pytest.approx(history.history["val_loss"])


def test_plot_precision_recall(tmp_path):
    truth = [{"boxes": [[0, 0, 10, 10], [20, 0, 30, 10]], "labels": [0, 0]}]
    found = {
        "boxes": [[20, 0, 30, 10], [50, 50, 60, 60], [0, 0, 10, 10]],
        "labels": [0, 0, 0],
        "confidence": [0.5, 0.7, 0.9],
    }
    result = voc_average_precision(truth, [found], ["cell", "dust"], iou_threshold=[0.5, 0.75])
    figure = plot_precision_recall(result, tmp_path / "a.png", iou_threshold=0.75)
    (axes,) = figure.axes
    lines = lines_of(axes)
    assert "mAP 0.833" in axes.get_title(loc="left")
    wanted = [[0, 1], [0.5, 1], [0.5, 2 / 3], [1, 2 / 3], [1, 0]]
    np.testing.assert_allclose(lines["cell 0.833"], wanted)
    assert not any("dust" in label for label in lines)  # has no objects
    assert read(tmp_path / "a.png").std() > 10
    # A class without detections, and one without objects.
    nothing = voc_average_precision(truth, [NOTHING], ["cell", "dust"])
    assert "cell 0.000" in lines_of(plot_precision_recall(nothing).axes[0])
    empty = voc_average_precision([NOTHING], [NOTHING], ["cell"])
    assert "undefined" in plot_precision_recall(empty).axes[0].get_title(loc="left")


def test_plot_class_curves():
    """Three detections of one class, the second wrong; no object of the other class."""
    curve = {
        "confidence": np.array([0.9, 0.6, 0.3]),
        "precision": np.array([1, 1 / 2, 2 / 3]),
        "recall": np.array([0.5, 0.5, 1.0]),
        "f1": np.array([2 / 3, 1 / 2, 4 / 5]),
    }
    nothing = {name: np.full(1, np.nan) for name in curve}
    report = SimpleNamespace(
        class_names=("cell", "dust"),
        curves=[curve, nothing],
        best_thresholds={"cell": 0.2, "dust": 0.5},
    )
    for kind, value, base in (
        ("f1", "f1", "confidence"),
        ("precision over recall", "precision", "recall"),
    ):
        (axes,) = plot_class_curves(report, kind).axes
        line, best = (line.get_xydata() for line in axes.get_lines())
        np.testing.assert_allclose(line, np.stack([curve[base], curve[value]], axis=1))
        np.testing.assert_allclose(best, [[curve[base][2], curve[value][2]]])
        assert axes.get_xlabel() == base
    with pytest.raises(ValueError, match=r"precision over recall. Received: 'speed'"):
        plot_class_curves(report, "speed")


def test_plot_confusion_matrix():
    figure = plot_confusion_matrix([[3, 1, 0], [0, 0, 2], [5, 0, 0]], ["cell", "$dust$"])
    (axes,) = figure.axes
    shares = axes.get_images()[0].get_array()[..., 3]
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [0, 0, 1], [1, 0, 0]])
    numbers = {t.get_position(): t.get_text() for t in axes.texts}
    assert numbers == {(0, 0): "3", (1, 0): "1", (2, 1): "2", (0, 2): "5"}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cell", "$dust$", "missed"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cell", "$dust$", "background"]


def test_plot_calibration_and_bars():
    precision = np.array([0.1, np.nan, 0.6, 1.0])
    (axes,) = plot_calibration({"count": np.array([9, 0, 5, 2]), "precision": precision}).axes
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0, 0.6, 1.0]
    assert [bar.get_x() for bar in axes.patches] == [0, 0.25, 0.5, 0.75]
    assert [text.get_text() for text in axes.texts] == ["9", "0", "5", "2"]
    (axes,) = plot_bars({"a": 0.25, "b": np.nan}, "AP50 lost").axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0]
    assert [text.get_text().strip() for text in axes.texts] == ["0.250", "no objects"]


# === Bad input and side effects ===


@pytest.mark.parametrize(
    ("image", "found", "options", "message"),
    [
        (np.zeros((5, 5, 5)), NOTHING, {}, r"\(5, 5, 5\)"),
        (np.full((5, 5, 3), 0.5), NOTHING, {}, "0 to 255"),
        ([], [], {}, "at least one image"),
        (np.zeros((5, 5, 3)), {"boxes": []}, {}, "lacks labels"),
        (np.zeros((2, 5, 5, 3)), [NOTHING], {}, "1 for 2 images"),
        (np.zeros((5, 5, 3)), {"boxes": [[0, 0, 1, 1]], "labels": [0, 1]}, {}, "1 boxes and 2 lab"),
        (np.zeros((5, 5, 3)), NOTHING, {"bounding_box_format": "coco"}, "bounding_box_format"),
        (np.zeros((5, 5, 3)), NOTHING, {"titles": ["a", "b"]}, "2 for 1 images"),
    ],
)
def test_bad_input(image, found, options, message):
    with pytest.raises(ValueError, match=message):
        plot_detections(image, found, **options)


def test_plots_stay_out_of_pyplot():
    plot_detections(np.zeros((9, 9, 3)), {"boxes": [[1, 1, 5, 5]], "labels": [0]})
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []
