"""VOC and COCO of TensorFlow Datasets: its builders, run on small archives in their layout.

Only the downloads are replaced, by folders written here.
"""

import io
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pycocotools.coco import COCO

from keras_resnest.checks import value_errors
from keras_resnest.data import find_splits, read_tfds, read_train_test, read_voc
from keras_resnest.data.batches import training_batches

VOC_NAMES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]
WIDTH, HEIGHT = 60, 40


def jpeg(seed):
    """A smooth image (noise would not survive JPEG), as bytes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype="uint8")
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def prepare(monkeypatch, name, data_dir, folders):
    """Runs the TFDS builder `name` with `folders(key)` as its downloads."""

    def download_and_extract(self, urls):
        return {key: str(folders(key)) for key in urls}

    with monkeypatch.context() as patch:
        manager = tfds.download.DownloadManager
        patch.setattr(manager, "download_and_extract", download_and_extract)
        tfds.builder(name, data_dir=data_dir).download_and_prepare()


# === VOC ===

OBJECTS = {  # image: (name, xmin, ymin, xmax, ymax, difficult)
    "000001": [("dog", 10, 5, 40, 25, 0), ("person", 3, 4, 50, 39, 1)],
    "000002": [("tvmonitor", 1, 1, 60, 40, 0), ("aeroplane", 5, 6, 7, 9, 0)],
    "000003": [("cat", 5, 6, 25, 30, 1)],
}
SETS = {"train": ["000001"], "val": ["000002"], "trainval": ["000001", "000002"]}


def write_voc(root, year):
    folder = root / f"VOCdevkit/VOC{year}"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i, (stem, objects) in enumerate(OBJECTS.items()):
        (folder / f"JPEGImages/{stem}.jpg").write_bytes(jpeg(i))
        rows = "".join(
            f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for name, x1, y1, x2, y2, difficult in objects
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        text = f"<annotation>{size}{rows}</annotation>"
        (folder / f"Annotations/{stem}.xml").write_text(text)
    for split, stems in {**SETS, "test": ["000003"]}.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{s}\n" for s in stems))
    return folder


@pytest.fixture(scope="module", params=["2007", "2012"])
def voc(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"voc{request.param}")
    folder = write_voc(root, request.param)
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, f"voc/{request.param}", root / "tfds", lambda key: root)
    return request.param, root / "tfds", folder


@pytest.mark.parametrize(("split", "voc_split"), [("train", "train"), ("validation", "val")])
def test_voc_equals_read_voc(voc, split, voc_split):
    """Same images, names and objects as `read_voc`; TFDS keeps 1-based corners."""
    year, data_dir, folder = voc
    dataset = read_tfds(f"voc/{year}", split, data_dir=data_dir)
    reference = read_voc(folder, voc_split, class_names=VOC_NAMES)
    assert dataset.class_names == VOC_NAMES and dataset.num_classes == 20
    for ours, theirs in zip(dataset.as_dataset(), reference.as_dataset(), strict=True):
        np.testing.assert_array_equal(ours["images"], theirs["images"])
        for key in ("labels", "difficult"):
            np.testing.assert_array_equal(
                ours["bounding_boxes"][key], theirs["bounding_boxes"][key]
            )
        shifted = np.add(theirs["bounding_boxes"]["boxes"], [1, 1, 0, 0])
        np.testing.assert_allclose(ours["bounding_boxes"]["boxes"], shifted, atol=1e-3)
        assert ours["image_id"].numpy().decode().startswith(theirs["image_id"].numpy().decode())


def test_voc_combined_splits_and_difficult(voc):
    year, data_dir, _ = voc
    both = read_tfds(f"voc/{year}", "train+validation", data_dir=data_dir)
    assert len(both) == 2 and both.report.num_boxes == 4 and both.report.num_difficult == 1
    easy = read_tfds(f"voc/{year}", "train", data_dir=data_dir, use_difficult=False)
    assert easy.report.class_counts["person"] == 0 and easy.report.class_counts["dog"] == 1
    test = read_tfds(f"voc/{year}", "test", data_dir=data_dir)  # 2012 publishes no objects
    assert test.report.num_boxes == (1 if year == "2007" else 0)


def test_an_image_that_cannot_be_decoded_is_named(monkeypatch, tmp_path):
    folder = write_voc(tmp_path, "2007")
    bad = folder / "JPEGImages/000002.jpg"
    bad.write_bytes(bad.read_bytes()[:-300])
    prepare(monkeypatch, "voc/2007", tmp_path / "tfds", lambda key: tmp_path)
    data = read_tfds("voc/2007", "train+validation", data_dir=tmp_path / "tfds")
    named = r"^Cannot read the image '000002.jpg' of voc/2007/[\d.]+, split 'train\+validation', "
    named += r"record voc-validation.tfrecord-00000-of-00001__0: .* truncated"
    batches = [training_batches(data, (64, 64), 2, seed=1, cache=cache) for cache in (True, False)]
    for failing in (data.as_dataset(), *batches):
        with pytest.raises(ValueError, match=named), value_errors():  # as `fit` does
            list(failing)
    with pytest.raises(ValueError, match=named):
        _ = data.report


def test_a_damaged_file_is_named(monkeypatch, tmp_path):
    write_voc(tmp_path, "2007")
    prepare(monkeypatch, "voc/2007", tmp_path / "tfds", lambda key: tmp_path)
    (file,) = tmp_path.glob("tfds/**/voc-train.tfrecord*")
    whole = file.read_bytes()
    for content in (b"", whole[:-100]):
        file.write_bytes(content)
        data = read_tfds("voc/2007", "train+validation", data_dir=tmp_path / "tfds")
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is damaged.*0 of its 1 "):
            _ = data.report
    with pytest.raises(ValueError, match="`report` of the data names it"), value_errors():
        list(training_batches(data, (64, 64), 1, seed=1))


# === COCO ===

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids 1 to 90 that COCO does not use
IDS = [i for i in range(1, 91) if i not in GAPS]
CATEGORIES = [{"id": i, "name": f"class {i}", "supercategory": "x"} for i in IDS]
ROWS = {  # image id: (category id, x, y, width, height, iscrowd)
    7: [(1, 10.0, 5.0, 30.0, 20.0, 0), (90, 0.0, 0.0, 60.0, 40.0, 1)],
    3: [(13, 2.5, 4.25, 20.0, 10.5, 0), (31, 30.0, 10.0, 0.0, 9.0, 0)],
    9: [],
}


def write_coco(root):
    for split in ("train2017", "val2017", "test2017"):
        (root / split).mkdir(parents=True)
        for key in ROWS:
            (root / split / f"{key:012d}.jpg").write_bytes(jpeg(key))
    (root / "annotations").mkdir()
    images = [
        {"id": key, "file_name": f"{key:012d}.jpg", "width": WIDTH, "height": HEIGHT}
        for key in ROWS
    ]
    rows = [
        {
            "id": 10 * key + j,
            "image_id": key,
            "category_id": row[0],
            "bbox": list(row[1:5]),
            "area": row[3] * row[4],
            "iscrowd": row[5],
        }
        for key, objects in ROWS.items()
        for j, row in enumerate(objects)
    ]
    content = {"images": images, "annotations": rows, "categories": CATEGORIES}
    for name in ("instances_train2017", "instances_val2017", "image_info_test2017"):
        (root / "annotations" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_coco(root)
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, "coco/2017", root / "tfds", lambda key: root)
    return root


def test_coco_equals_pycocotools(coco):
    dataset = read_tfds("coco/2017", "train", data_dir=coco / "tfds")
    reference = COCO(coco / "annotations" / "instances_train2017.json")
    names = [category["name"] for category in reference.loadCats(reference.getCatIds())]
    assert dataset.class_names == names and dataset.num_classes == 80
    seen = {}
    for element in dataset.as_dataset():
        seen[element["image_id"].numpy().decode()] = element
    assert len(seen) == len(ROWS)
    for key in ROWS:
        element = seen[f"{key:012d}.jpg"]
        rows = [r for r in reference.loadAnns(reference.getAnnIds([key])) if r["bbox"][2] > 0]
        boxes = np.array([r["bbox"] for r in rows], "float32").reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = {k: v.numpy() for k, v in element["bounding_boxes"].items()}
        np.testing.assert_allclose(found["boxes"], boxes, atol=1e-3)
        wanted = [reference.cats[r["category_id"]]["name"] for r in rows]
        assert [dataset.class_names[k] for k in found["labels"]] == wanted
        assert found["difficult"].tolist() == [bool(r["iscrowd"]) for r in rows]
        image = np.asarray(Image.open(io.BytesIO(jpeg(key))))
        np.testing.assert_array_equal(element["images"], image)


def test_coco_crowds_and_report(coco):
    dataset = read_tfds("coco/2017", "validation", data_dir=coco / "tfds")
    assert dataset.report.num_difficult == 1 and dataset.report.num_boxes == 3
    assert dataset.report.num_empty_images == 1
    assert dataset.report.problem_counts == {"degenerate box": 1}
    easy = read_tfds("coco/2017", "validation", data_dir=coco / "tfds", use_difficult=False)
    assert easy.report.class_counts["class 90"] == 0 and easy.report.num_difficult == 0


def test_a_split_without_annotations_is_not_measured(coco):
    tfds.core.add_data_dir(coco / "tfds")
    assert find_splits("tfds:coco/2017") == ["train", "validation"]
    train, test = read_train_test("tfds:coco/2017")
    assert test.report.num_boxes == train.report.num_boxes == 3


def test_names_are_known_in_the_run_that_prepares(monkeypatch, tmp_path):
    """The builder of COCO learns the names while it generates the dataset."""
    write_coco(tmp_path)

    def download_and_extract(self, urls):
        return {key: str(tmp_path) for key in urls}

    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download_and_extract", download_and_extract)
    monkeypatch.setattr("keras_resnest.data.readers.tfds._check_hosts", lambda builder: None)
    dataset = read_tfds("coco/2017", "train", data_dir=tmp_path / "tfds")
    assert dataset.class_names == [category["name"] for category in CATEGORIES]


@pytest.mark.parametrize("num_shards", [2, 3])
def test_shards(coco, num_shards):
    dataset = read_tfds("coco/2017", "train", data_dir=coco / "tfds")
    shards = [dataset.shard(num_shards, i) for i in range(num_shards)]
    ids = [[e["image_id"].numpy() for e in shard.as_dataset()] for shard in shards]
    assert [len(shard) for shard in shards] == list(map(len, ids))
    assert sorted(image_id for shard in ids for image_id in shard) == sorted(
        e["image_id"].numpy() for e in dataset.as_dataset()
    )
    assert max(map(len, ids)) - min(map(len, ids)) <= 1
    with pytest.raises(ValueError, match=r"`num_shards`.*images, 3"):
        dataset.shard(4, 0)


def test_epochs_resume(coco):
    def batches(**options):
        dataset = read_tfds("coco/2017", "train", data_dir=coco / "tfds")
        return training_batches(dataset, (20, 30), 1, augmentation=None, seed=2, **options)

    whole = batches(cache=False)
    epochs = [[b["images"].numpy() for b in whole] for _ in range(3)]
    for cache in (False, True):
        resumed = [b["images"].numpy() for b in batches(initial_epoch=2, cache=cache)]
        np.testing.assert_array_equal(resumed, epochs[2])


def test_mock_data_has_the_real_features():
    """The feature specifications that TFDS ships are recognized for all three datasets."""
    from keras_resnest.data.readers.tfds import _label_names

    with tfds.testing.mock_data(num_examples=1):
        counts = {
            name: len(_label_names(tfds.builder(name)))
            for name in ("voc/2007", "voc/2012", "coco/2017")
        }
    assert counts == {"voc/2007": 20, "voc/2012": 20, "coco/2017": 80}
