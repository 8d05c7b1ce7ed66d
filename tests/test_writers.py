"""`write_detection`: every format holds the same data; what it cannot hold is refused."""

import csv
import io
import itertools
import os
import re
import shutil
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from test_readers import ReaderSample

from keras_resnest.cli import main
from keras_resnest.data import (
    DetectionDataset,
    ImageRecord,
    load_image,
    read_all_splits,
    read_detection,
    read_tfds,
    write_detection,
)
from keras_resnest.data.readers.detect_format import FORMATS

SIZE = (64, 48)
CLASSES = ["zebra", "cat, dog", '<b> & "x"', "yes", "1", "grüne Äpfel: #2 👩‍🔬", "never used"]
# image: rows of label, x1, y1, x2, y2, difficult
TRUTH = {
    "a.png": [(0, 1.5, 2.25, 33.37, 40.01, False), (1, 0, 0, 64, 48, True)],
    "sub folder/a.png": [(2, 10, 5, 12.5, 7.5, False), (2, 11, 5, 12.5, 7.5, False)],
    "sub folder/deeper/Übung (1).png": [(3, 60.1, 40.2, 64, 48, False)],
    "x.png.png": [(4, 3, 4, 20, 30, False)],
    "frame.001.png": [],
    "train/photo 1.png": [(5, 7, 7, 9.9, 30, True)],
}
SPLITS = {"train": ["a.png", "sub folder/a.png"], "test": ["frame.001.png"]}
SPLITS["default"] = [name for name in TRUTH if name not in SPLITS["train"] + SPLITS["test"]]


def pixels(name):
    rng = np.random.default_rng(len(name))
    return rng.integers(0, 256, (*SIZE[::-1], 3), dtype="uint8")


def make_record(name, image):
    rows = np.reshape(TRUTH[name], (-1, 6))
    return ImageRecord(image, name, rows[:, 1:5], rows[:, 0], rows[:, 5])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dataset of files for each split."""
    root = tmp_path_factory.mktemp("source")
    for name in TRUTH:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(name)).save(root / name)
    return {
        split: DetectionDataset([make_record(n, str(root / n)) for n in names], CLASSES)
        for split, names in SPLITS.items()
    }


def one(dataset):
    """All splits as one dataset."""
    return DetectionDataset([r for part in dataset.values() for r in part.records], CLASSES)


def names_of(dataset, folder):
    root = folder / ("JPEGImages" if (folder / "JPEGImages").exists() else "images")
    return [os.path.relpath(record.image, root) for record in dataset.records]


def assert_truth(dataset, folder, names, difficult=True):
    """A dataset has exactly these images of TRUTH, with their files."""
    assert dataset.class_names == CLASSES
    assert sorted(names_of(dataset, folder)) == sorted(names)
    for name, record in zip(names_of(dataset, folder), dataset.records, strict=True):
        rows = np.reshape(TRUTH[name], (-1, 6))
        np.testing.assert_allclose(record.boxes, rows[:, 1:5], rtol=0, atol=0.01)
        assert record.labels.tolist() == rows[:, 0].tolist()
        assert record.difficult.tolist() == (rows[:, 5] * difficult).tolist()
        np.testing.assert_array_equal(load_image(record.image), pixels(name))


# === Round trips ===


@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, FORMATS)), ids="-".join)
@pytest.mark.filterwarnings("ignore:YOLO has no difficult")
def test_all_pairs_hold_the_same(source, tmp_path, formats):
    """Splits, class names in their order, boxes, difficult objects and names of files."""
    write_detection(source, tmp_path / "first", formats[0])
    write_detection(read_all_splits(tmp_path / "first"), tmp_path / "second", formats[1])
    parts = read_all_splits(tmp_path / "second")
    assert parts.keys() == SPLITS.keys()
    for split, names in SPLITS.items():
        assert_truth(parts[split], tmp_path / "second", names, "yolo" not in formats)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:YOLO has no difficult")
def test_without_splits(source, tmp_path, format):
    names = [name for name in TRUTH if not name.startswith("train/")]  # which is a split
    records = [record for record in one(source).records if record.image_id in names]
    write_detection(DetectionDataset(records, CLASSES), tmp_path / "out", format)
    dataset = read_detection(tmp_path / "out")
    assert_truth(dataset, tmp_path / "out", names, format != "yolo")
    assert list(read_all_splits(tmp_path / "out")) == ["default"]
    assert dataset.report.problems == []


# === What other programs see ===


def assert_objects(found, name):
    """Rows (class name, x1, y1, x2, y2) of an image are those of TRUTH."""
    wanted = TRUTH[name]
    assert [row[0] for row in found] == [CLASSES[row[0]] for row in wanted]
    boxes = np.reshape([row[1:] for row in found], (-1, 4)).astype(float)
    np.testing.assert_allclose(boxes, np.reshape(wanted, (-1, 6))[:, 1:5], rtol=0, atol=0.01)


def test_coco_in_pycocotools(source, tmp_path):
    write_detection(source, tmp_path / "out", "coco")
    coco = COCO(tmp_path / "out/annotations/instances_default.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == CLASSES
    assert {image["file_name"] for image in coco.imgs.values()} == set(SPLITS["default"])
    for key, image in coco.imgs.items():
        rows = coco.loadAnns(coco.getAnnIds(key))
        names = [coco.cats[row["category_id"]]["name"] for row in rows]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows)]
        assert_objects([(n, *b) for n, b in zip(names, boxes, strict=True)], image["file_name"])
        assert [row["iscrowd"] for row in rows] == [row[5] for row in TRUTH[image["file_name"]]]
        assert [row["area"] for row in rows] == pytest.approx(
            [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes], abs=1e-3
        )


def test_voc_in_elements(source, tmp_path):
    write_detection(source, tmp_path / "out", "voc")
    lists = (tmp_path / "out/ImageSets/Main/train.txt").read_text()
    assert lists == "a\nsub folder/a\n"
    text = (tmp_path / "out/Annotations/a.xml").read_text()
    assert "<xmin>2.5</xmin>" in text and "<xmin>1</xmin>" in text  # other readers want integers
    for name in TRUTH:
        path = (tmp_path / "out/Annotations" / name).with_suffix(".xml")
        root = ElementTree.parse(path).getroot()
        assert root.findtext("filename") == name.split("/")[-1]
        assert [root.findtext(f"size/{side}") for side in ("width", "height")] == ["64", "48"]
        found = []
        for item in root.iter("object"):
            corners = (item.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax"))
            x1, y1, x2, y2 = map(float, corners)
            found.append((item.findtext("name"), x1 - 1, y1 - 1, x2, y2))
        assert_objects(found, name)


@pytest.mark.filterwarnings("ignore:YOLO has no difficult")
def test_yolo_in_ultralytics(source, tmp_path):
    """Its rules: "./" is the folder of the list, the last "images" becomes "labels"."""
    parts = {"train": source["train"], "validation": source["test"]}
    write_detection(parts, tmp_path / "out", "yolo")
    settings = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert list(settings["names"].values()) == CLASSES
    assert settings["train"] == "train.txt" and settings["val"] == "validation.txt"
    lines = (tmp_path / "out" / settings["train"]).read_text().splitlines()
    for line, name in zip(lines, SPLITS["train"], strict=True):
        image = line.replace("./", f"{tmp_path}/out/", 1)
        assert image == f"{tmp_path}/out/images/{name}"
        file = "/labels/".join(image.rsplit("/images/", 1)).removesuffix(".png") + ".txt"
        rows = np.loadtxt(file, ndmin=2)
        x, y, w, h = rows[:, 1:].T * [[64], [48], [64], [48]]
        columns = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        names = [CLASSES[int(label)] for label in rows[:, 0]]
        assert_objects(list(zip(names, *columns, strict=True)), name)


def test_csv_in_rows(source, tmp_path):
    write_detection(one(source), tmp_path / "out", "csv")
    with open(tmp_path / "out/default.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in TRUTH:
        own = [row for row in rows if row["image"] == f"images/{name}" and row["label"]]
        assert_objects([[row[k] for k in ("label", "x1", "y1", "x2", "y2")] for row in own], name)
        assert [bool(int(row["difficult"])) for row in own] == [row[5] for row in TRUTH[name]]
    assert [row["x1"] for row in rows if not row["label"]] == [""]


# === Images ===


def test_images_in_memory(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(pixels("b")).save(stream, "WEBP", lossless=True)
    records = [
        ImageRecord(pixels("a"), "a", [[1, 2, 30, 40]], [0]),
        ImageRecord(stream.getvalue(), "/deep/../b", [], []),
        ImageRecord(pixels("c.jpg"), "c.jpg", [], []),
    ]
    write_detection(DetectionDataset(records, ["x"]), tmp_path / "out", "yolo", link=True)
    dataset = read_detection(tmp_path / "out")
    assert names_of(dataset, tmp_path / "out") == ["a.png", "c.jpg", "deep/b.webp"]
    found = [load_image(record.image) for record in dataset.records]
    for image, key in zip(found, ("a", "c.jpg", "b"), strict=True):
        np.testing.assert_array_equal(image, pixels(key))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_images_of_tfds(tmp_path):
    builder = ReaderSample(data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    dataset = read_tfds(builder, "train")
    write_detection({"train": dataset}, tmp_path / "out", "voc")
    again = read_detection(tmp_path / "out", "train")
    for record, copy in zip(dataset.records, again.records, strict=True):
        assert copy.image_id == record.image_id and copy.image.endswith(".png")
        np.testing.assert_allclose(copy.boxes, record.boxes, atol=0.01)
        assert copy.difficult.tolist() == record.difficult.tolist()


def test_links(source, tmp_path):
    write_detection(source, tmp_path / "out", "coco", link=True)
    for record in one(source).records:
        link = tmp_path / "out/images" / record.image_id
        assert link.is_symlink() and os.readlink(link) == record.image
    parts = read_all_splits(tmp_path / "out")
    assert_truth(parts["train"], tmp_path / "out", SPLITS["train"])


def test_folders_of_splits_are_not_lost(tmp_path):
    """Roboflow's layout: images of the same name in the folders of two splits."""
    for split in ("train", "valid"):
        (tmp_path / f"in/{split}/images").mkdir(parents=True)
        Image.fromarray(pixels(split)).save(tmp_path / f"in/{split}/images/a.png")
        (tmp_path / f"in/{split}/labels").mkdir()
        (tmp_path / f"in/{split}/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "in/data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\nnames: [x]\n"
    )
    for format in FORMATS:
        write_detection(read_all_splits(tmp_path / "in"), tmp_path / format, format)
        parts = read_all_splits(tmp_path / format)
        assert parts.keys() == {"train", "val"}
        for split, folder in (("train", "train"), ("val", "valid")):
            (record,) = parts[split].records
            assert names_of(parts[split], tmp_path / format) == [f"{folder}/a.png"]
            np.testing.assert_array_equal(load_image(record.image), pixels(folder))


def test_upright_boxes_of_turned_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels("a")).save(tmp_path / "a.jpg", exif=exif)  # upright: 48 x 64
    record = ImageRecord(str(tmp_path / "a.jpg"), "a", [[1, 2, 40, 60]], [0])
    for format in FORMATS:
        write_detection(DetectionDataset([record], ["x"]), tmp_path / format, format)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # YOLO states no size
            (again,) = read_detection(tmp_path / format).records
        np.testing.assert_allclose(again.boxes, record.boxes, atol=0.01)


def test_equal_boxes_and_shared_images(source, tmp_path):
    """Equal boxes are written, and reported when read; an image may be in several splits."""
    record = source["train"].records[0]
    double = ImageRecord(record.image, "a", [[1, 2, 9, 9]] * 2, [0, 0])
    part = DetectionDataset([double], CLASSES)
    for format in FORMATS:
        write_detection({"train": part, "test": part}, tmp_path / format, format)
        with pytest.warns(UserWarning, match="1 x repeated box"):
            parts = read_all_splits(tmp_path / format)
        assert [len(part.records[0].boxes) for part in parts.values()] == [1, 1]


# === What cannot be written ===


def dataset_of(names=("a",), class_names=("x",), box=(1, 2, 9, 9)):
    records = [ImageRecord(pixels(name), name, [box], [0]) for name in names]
    return DetectionDataset(records, class_names)


REFUSED = {  # name: (data, formats, message)
    "line in a class": (dataset_of(class_names=["a\nb"]), "voc yolo csv", "several lines"),
    "blank at the end": (dataset_of(class_names=["a "]), FORMATS, "classes .* become"),
    "no XML character": (dataset_of(class_names=["a\x07"]), "voc", "not well-formed|invalid"),
    "one stem": (dataset_of(["a.png", "a.jpg"]), "voc yolo", "several images|text file of several"),
    "one name": (
        DetectionDataset([ImageRecord(pixels(x), "a", [], []) for x in ("1", "22")], ["x"]),
        FORMATS,
        "several images need the file .*a.png",
    ),
    "hidden": (dataset_of([".a/b"]), "voc yolo", "No |not found"),
    "folder of runs": (dataset_of(["b", "runs/b"]), "voc yolo", "not found"),
    "blank before a name": (dataset_of([" a"]), "coco", "no image is in"),
    "box of a pixel": (dataset_of(box=[1, 2, 2, 9]), "voc", "a.png has a box of a pixel or less"),
    "split": ({"fold1": dataset_of()}, "yolo", "YOLO's splits must be .*'fold1'"),
    "path as split": ({"../x": dataset_of()}, FORMATS, "names of files.*'../x'"),
    "no name of a split": ({"": dataset_of()}, FORMATS, "names of files.*''"),
    "other classes": (
        {"train": dataset_of(), "test": dataset_of(class_names=["y"])},
        FORMATS,
        "same class names",
    ),
    "no splits": ({}, FORMATS, "same class names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold(tmp_path, name):
    """It is refused in one sentence, and nothing is left."""
    data, formats, message = REFUSED[name]
    for format in formats.split() if isinstance(formats, str) else formats:
        with pytest.raises(ValueError) as caught:
            write_detection(data, tmp_path / "out", format)
        assert re.search(message, str(caught.value)), (format, caught.value)
        assert "\n" not in str(caught.value) and "/new" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"`format` must be one of voc, .*'xml'"):
        write_detection(dataset_of(), tmp_path / "out", "xml")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "."):
        with pytest.raises(ValueError, match="`folder` must not exist"):
            write_detection(dataset_of(), tmp_path / name, "voc")


def test_an_interrupted_write_leaves_nothing(source, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        write_detection(source, tmp_path / "out", "voc")
    assert not list(tmp_path.iterdir())


# === The program ===


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_convert_and_split_at_random(source, tmp_path, capsys):
    write_detection(source, tmp_path / "in", "coco")
    options = ["--format", "csv", "--split", 0.5, 0.3, 0.2, "--seed", 3]
    assert convert(tmp_path / "in", tmp_path / "one", *options) == 0
    assert "train: 3 images" in capsys.readouterr().out
    assert convert(tmp_path / "in", tmp_path / "two", *options, "--link") == 0
    assert convert(tmp_path / "in", tmp_path / "three", *options[:-1], 4) == 0
    found = []
    for name in ("one", "two", "three"):
        parts = read_all_splits(tmp_path / name)
        found.append({k: names_of(part, tmp_path / name) for k, part in parts.items()})
        assert {k: len(v) for k, v in found[-1].items()} == {"train": 3, "val": 2, "test": 1}
        for part, names in zip(parts.values(), found[-1].values(), strict=True):
            assert_truth(part, tmp_path / name, names)
        assert sorted(name for names in found[-1].values() for name in names) == sorted(TRUTH)
    assert found[0] == found[1] != found[2]


def test_convert_keeps_the_splits_of_voc(tmp_path, capsys):
    """Without lists that repeat images, and with images in no list."""
    write_detection({x: dataset_of([x]) for x in ("train", "val", "cat")}, tmp_path / "in", "voc")
    lists = {"train": "train", "val": "val", "trainval": "train\nval", "x_train": "train 1\nval -1"}
    (tmp_path / "in/ImageSets/Main/cat.txt").unlink()
    for name, text in lists.items():
        (tmp_path / f"in/ImageSets/Main/{name}.txt").write_text(text)
    assert convert(tmp_path / "in", tmp_path / "out", "--format", "yolo") == 0
    parts = read_all_splits(tmp_path / "out")
    found = {k: names_of(part, tmp_path / "out") for k, part in parts.items()}
    assert found == {"train": ["train.png"], "val": ["val.png"], "default": ["cat.png"]}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--split", 0.5], "--split takes 2 or 3 fractions above 0 with the sum 1"),
        (["--split", 0.5, 0.4], "with the sum 1. Received: [0.5, 0.4]"),
        (["--split", 0.9, 0.1, 0.0], "Received: [0.9, 0.1, 0.0]"),
        (["--split", 0.5, 0.5], "both parts need an image. Received: 1"),
        (["--source-format", "yolo"], "None of the 1 images has a text file"),
    ],
)
def test_wrong_commands(tmp_path, options, message, capsys):
    write_detection(dataset_of(), tmp_path / "in", "csv")
    assert convert(tmp_path / "in", tmp_path / "out", "--format", "voc", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_splits_of_tfds_stay(tmp_path, capsys):
    arguments = ["tfds:shapes", tmp_path / "out", "--format", "voc", "--split", 0.5, 0.5]
    assert convert(*arguments) == 2
    assert "--split: only for files" in capsys.readouterr().err


def test_a_target_that_exists(tmp_path, capsys):
    write_detection(dataset_of(), tmp_path / "in", "csv")
    assert convert(tmp_path / "in", tmp_path / "in", "--format", "csv") == 2
    assert "must not exist" in capsys.readouterr().err
    assert len(read_detection(tmp_path / "in")) == 1
