"""Datasets in the layouts of other tools, and hostile files; every box is known."""

import itertools
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_resnest import data
from keras_resnest.cli import parse_arguments, train_classifier
from keras_resnest.data import find_splits, read_detection, read_image_folder, read_train_test

SIZE = (64, 48)
BOXES = [(8, 6, 40, 30), (16, 12, 48, 36), (4, 6, 20, 42)]
NFC, NFD = (unicodedata.normalize(form, "Übung") for form in ("NFC", "NFD"))
MAKESENSE = "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height\n"


def row(i, more=""):
    x1, y1, x2, y2 = BOXES[i]
    return f"0 {(x1 + x2) / 128} {(y1 + y2) / 96} {(x2 - x1) / 64} {(y2 - y1) / 48}{more}\n"


def xml(i, filename="", size=SIZE):
    x1, y1, x2, y2 = BOXES[i]
    return (
        f"<annotation><filename>{filename}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height></size><object><name>cat</name><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object></annotation>"
    )


def coco(*names, **changes):
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    objects = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], **changes}
        for i, (x1, y1, x2, y2) in enumerate(BOXES[: len(names)])
    ]
    categories = [{"id": 1, "name": "cat"}]
    return json.dumps({"images": images, "annotations": objects, "categories": categories})


def coco_with_splits(*names, key="subset"):
    content = json.loads(coco("a.png", "b.png"))
    images = [i | ({key: n} if n else {}) for i, n in zip(content["images"], names, strict=True)]
    return json.dumps({**content, "images": images})


def write(folder, tree):
    """Writes files by path: text, bytes, or None for an image."""
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.fromarray(np.zeros((*SIZE[::-1], 3), "uint8")).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def boxes(dataset, folder):
    """The index in BOXES of every image's boxes, by path."""
    return {
        unicodedata.normalize("NFC", os.path.relpath(record.image, folder)): [
            BOXES.index(tuple(np.round(box, 2))) for box in record.boxes.tolist()
        ]
        for record in dataset.records
    }


def yolo(*names, images="images", labels="labels", first=0):
    """Images with text files."""
    tree = {}
    for i, name in enumerate(names, start=first):
        tree |= {f"{images}/{name}.png": None, f"{labels}/{name}.txt": row(i)}
    return tree


CLASSES = {"classes.txt": "cat\n"}
TRAIN = yolo("a", images="train/images", labels="train/labels")
LAYOUTS = {  # name: (files, split, {image: boxes})
    "YOLO CVAT": (
        {
            "obj.data": "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n",
            "obj.names": "cat\n",
            "train.txt": "data/obj_train_data/a.png\n",
            **yolo("a", "b", images="obj_train_data", labels="obj_train_data"),
        },
        "train",
        {"obj_train_data/a.png": [0]},
    ),
    "YOLO darknet of Roboflow": (
        {
            **yolo("a", images="train", labels="train"),
            **yolo("b", images="valid", labels="valid", first=1),
            **{f"{split}/_darknet.labels": "cat\n" for split in ("train", "valid")},
        },
        "val",
        {"valid/b.png": [1]},
    ),
    "YOLO darknet of the authors": (
        {**yolo("a", images="obj", labels="obj"), "voc.names": "cat\n"},
        None,
        {"obj/a.png": [0]},
    ),
    "YOLO of Label Studio": (
        {**yolo("a"), **CLASSES, "notes.json": '{"categories": [], "info": {}}'},
        None,
        {"images/a.png": [0]},
    ),
    "YOLO side by side": (
        {**yolo("a", images=".", labels="."), **CLASSES, "b.png": None},
        None,
        {"a.png": [0], "b.png": []},
    ),
    "YOLO beside runs and hidden files": (
        {
            **yolo("a", images=".", labels="."),
            **{name: None for name in ("runs/p.png", ".ipynb_checkpoints/a.png")},
            **{"._a.png": b"\0", "._a.txt": b"\xff", "Thumbs.db": b"\xff", **CLASSES},
        },
        None,
        {"a.png": [0]},
    ),
    "YOLO with paths of another computer": (
        {**TRAIN, "data.yaml": "train: C:\\sets\\cells\\train\\images\nnames: [cat]\n"},
        "train",
        {"train/images/a.png": [0]},
    ),
    "YOLO in capitals": (
        {**yolo("a", images="Images", labels="Labels"), **CLASSES},
        None,
        {"Images/a.png": [0]},
    ),
    "YOLO decomposed": (
        {f"images/{NFD}.png": None, f"labels/{NFC}.txt": row(0), **CLASSES},
        None,
        {f"images/{NFC}.png": [0]},
    ),
    "YOLO with text files named a.png.txt": (
        yolo("a") | CLASSES | {"images/b.png": None, "labels/b.png.txt": row(1)},
        None,
        {"images/a.png": [0], "images/b.png": [1]},
    ),
    "YOLO with the folder itself as a split": (
        yolo("a") | {"data.yaml": "train: .\nval: images\nkpt_shape:\nnames: [cat]"},
        "train",
        {"images/a.png": [0]},
    ),
    "YOLO with keypoints": (
        {**TRAIN, "train/labels/a.txt": row(0, " 0.9 0.9 2" * 2)}
        | {"data.yaml": "train: train/images\nkpt_shape: [2, 3]\nnames: [cat]\n"},
        None,
        {"train/images/a.png": [0]},
    ),
    "YOLO with splits in capitals": (
        {
            **yolo("a", images="Training/images", labels="Training/labels"),
            **yolo("b", images="Valid/images", labels="Valid/labels", first=1),
            **CLASSES,
        },
        "val",
        {"Valid/images/b.png": [1]},
    ),
    "VOC in one Annotation folder": (
        {"Images/a.png": None, "Annotation/a.xml": xml(0)},
        None,
        {"Images/a.png": [0]},
    ),
    "VOC in short names": (
        {"imgs/a.png": None, "annots/a.xml": "\n<?xml version='1.0'?>\n" + xml(0)},
        None,
        {"imgs/a.png": [0]},
    ),
    "VOC in GBK": (
        {
            "图.png": None,
            "a.xml": ('<?xml version="1.0" encoding="gbk"?>' + xml(0, "图.png")).encode("gbk"),
        },
        None,
        {"图.png": [0]},
    ),
    "VOC in lower case": (
        {"images/a.png": None, "annotations/a.xml": xml(0)},
        None,
        {"images/a.png": [0]},
    ),
    "VOC with subfolders": (
        {
            f"{name}/{i}/a.{end}": content
            for i in (0, 1)
            for name, end, content in (("JPEGImages", "png", None), ("Annotations", "xml", xml(i)))
        }
        | {"ImageSets/Main/train.txt": "1/a\n"},
        "train",
        {"JPEGImages/1/a.png": [1]},
    ),
    "VOC of Roboflow": (
        {"train/a.png": None, "train/a.xml": xml(0), "valid/b.png": None, "valid/b.xml": xml(1)},
        "val",
        {"valid/b.png": [1]},
    ),
    "VOC with other letters": (
        {"A.PNG": None, "a.xml": xml(0), f"{NFD}.png": None, f"{NFC}.xml": xml(1)},
        None,
        {"A.PNG": [0], f"{NFC}.png": [1]},
    ),
    "COCO of FiftyOne": (
        {"data/a.png": None, "labels.json": coco("a.png")},
        None,
        {"data/a.png": [0]},
    ),
    "COCO with paths of Label Studio": (
        {f"images/{name}.png": None for name in "abc"}
        | {"result.json": coco("..\\..\\media\\a.png", "s3://bucket/x/b.png", "/data/?d=x/c.png")},
        None,
        {"images/a.png": [0], "images/b.png": [1], "images/c.png": [2]},
    ),
    "COCO decomposed": (
        {f"images/{NFD}.png": None, "x.json": coco(f"{NFC}.PNG")},
        None,
        {f"images/{NFC}.png": [0]},
    ),
    "CSV of Kaggle": (
        {
            "images/v1.a.png": None,
            "x.csv": "image_id,class,xmin,ymin,xmax,ymax\nv1.a,cat,8,6,40,30",
        },
        None,
        {"images/v1.a.png": [0]},
    ),
    "CSV of SKU-110K": (
        {"images/a.png": None, "x.csv": "a.png,8,6,40,30,object,64,48\n"},
        None,
        {"images/a.png": [0]},
    ),
    "CSV of Open Images": (
        {
            "a.png": None,
            "x.csv": "ImageID,LabelName,XMin,XMax,YMin,YMax\na,/m/1,.125,.625,.125,.625",
        },
        None,
        {"a.png": [0]},
    ),
    "CSV of makesense.ai": (
        {"a.png": None, "labels_my-project.csv": f"{MAKESENSE}cat,8,6,32,24,a.png,64,48\n"},
        None,
        {"a.png": [0]},
    ),
    "CSV of pandas": (
        {
            **{"a.png": None, "b.png": None},
            "x.csv": ",path,class,xmin,ymin,xmax,ymax\n"
            "0,a.png,NaN,NaN,NaN,NaN,NaN\n1,b.png,cat,8,6,40,30",
        },
        None,
        {"a.png": [], "b.png": [0]},
    ),
    "names encoded as in addresses": (
        {"images/x y.png": None, f"images/{NFC}.png": None, "images/c%20d.png": None}
        | {"x.json": coco("x%20y.png", "/data/local-files/?d=set%2F%C3%9Cbung.png", "c%20d.png")},
        None,
        {"images/x y.png": [0], f"images/{NFC}.png": [1], "images/c%20d.png": [2]},
    ),
    "CSV with decimal commas": (
        {"a.png": None}
        | {"x.csv": "sep=;\r\nimage;x1;y1;x2;y2;label\na.png;8,0;6,0;40,0;30,00;cat\n"},
        None,
        {"a.png": [0]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_tools(tmp_path, name):
    tree, split, wanted = LAYOUTS[name]
    dataset = read_detection(write(tmp_path, tree), split)
    assert boxes(dataset, tmp_path) == wanted and not dataset.report.problems
    assert split is None or find_splits(tmp_path)


# === Guesses and failed look-ups ===


def test_own_files_win_and_sets_are_not_mixed(tmp_path):
    own = yolo("a", images="set/train/images", labels="set/train/labels")
    other = yolo("b", "c", images="valid/images", labels="valid/labels", first=1)
    other |= yolo("b", images="train/images", labels="train/labels", first=1)
    settings = "train: ../train/images\nval: ../valid/images\nnames: [cat]\n"
    folder = write(tmp_path, {**own, **other, "set/data.yaml": settings}) / "set"
    assert find_splits(folder) == ["train"]
    with pytest.warns(UserWarning, match="missing images"):
        assert boxes(read_detection(folder, "train"), folder) == {"train/images/a.png": [0]}
    for split in ("val", None):
        with pytest.raises(ValueError, match=r"data\.yaml: missing images: val: '../valid/images'"):
            read_detection(folder, split)
    # A folder that says "../train/images" and has none means the one beside it.
    write(tmp_path, {"config/data.yaml": settings})
    assert len(read_detection(tmp_path / "config", "val")) == 2


def test_folder_of_most_images_and_names_that_lead_to_one_image(tmp_path):
    write(tmp_path, {"images/1/a.png": None, "images/b.png": None, "a.png": None})
    names = [f"{i}/a.png" for i in range(1, 3)]
    (tmp_path / "x.json").write_text(coco(*names, "b.png"))
    with pytest.warns(UserWarning, match="missing image"):
        dataset = read_detection(tmp_path / "x.json", on_error="skip")
    assert boxes(dataset, tmp_path) == {"images/1/a.png": [0], "images/b.png": [2]}
    (tmp_path / "images/1/a.png").rename(tmp_path / "images/a.png")
    (tmp_path / "images/1").rmdir()
    with pytest.raises(ValueError, match=r"images/a\.png: image used twice"):
        read_detection(tmp_path / "x.json")
    write(tmp_path, {"set/y.json": coco("b.png")})  # the image of that name is of the set above
    with pytest.raises(ValueError, match="give `image_folder`"):
        read_detection(tmp_path / "set/y.json")


@pytest.mark.parametrize(
    ("more", "expected"),
    [(" 0.9", [0]), (" 17", [0]), (" 0.9 17", [0]), (" 0.9 1", None), (" 0.9 0.9 2 1 1 2", None)],
)
def test_numbers_behind_a_box(tmp_path, more, expected):
    folder = write(tmp_path, {**yolo("a"), **CLASSES, "labels/a.txt": row(0, more)})
    if expected is None:  # it could be a polygon
        with pytest.raises(ValueError, match=r"a\.txt: (unreadable line|coordinates above 1)"):
            read_detection(folder)
        return
    with pytest.warns(UserWarning, match="numbers behind the box"):
        assert boxes(read_detection(folder), folder) == {"images/a.png": expected}


def test_a_format_chosen_by_hand(tmp_path):
    folder = write(tmp_path, {"a.png": None, "a.xml": xml(0), "a.txt": row(1), **CLASSES})
    with pytest.raises(ValueError, match='VOC and YOLO: give format="voc" or format="yolo"'):
        read_detection(folder)
    assert boxes(read_detection(folder, format="voc"), folder) == {"a.png": [0]}
    assert boxes(read_detection(folder, format="yolo"), folder) == {"a.png": [1]}
    assert find_splits(folder, "voc") == []
    with pytest.raises(ValueError, match="`format` must be one of voc, coco, yolo, csv"):
        read_detection(folder, format="pascal")


def test_splits_of_other_letters_and_names(tmp_path):
    splits = {"Training": "a", "Validation": "b"}
    write(tmp_path, {f"{split}/{name}.png": None for split, name in splits.items()})
    write(tmp_path, {f"instances_{k}.json": coco(f"{name}.png") for k, name in splits.items()})
    train, test = read_train_test(tmp_path)
    assert boxes(train, tmp_path) == {"Training/a.png": [0]}
    assert boxes(test, tmp_path) == {"Validation/b.png": [0]}


PAIR = {**yolo("a", "b", images="images/all", labels="labels/all"), **CLASSES}
SIDES = {"a.png": None, "a.xml": xml(0), "b.png": None, "b.xml": xml(1)}
HEADER = "x1,y1,x2,y2,label,image"
AUTOML = "{},gs://bucket/{}.png,cat,{},{},,,{},{},,\n"
AUTOML_ROWS = [
    AUTOML.format(use, name, *(f"{side:.9f}" for side in np.divide(box, SIZE * 2)))
    for use, name, box in (("TRAIN", "a", BOXES[0]), ("VALIDATION", "b", BOXES[1]))
]
STATED_SPLITS = {  # name: (files, splits, {split: {image: boxes}})
    "lists of darknet": (
        {**PAIR, "train.txt": "/home/me/set/images/all/a.png\n", "val.txt": "./images/all/b.png"},
        ["train", "val"],
        {"train": {"images/all/a.png": [0]}, "valid": {"images/all/b.png": [1]}},
    ),
    "lists of ultralytics": (
        {
            **PAIR,
            "autosplit_train.txt": "all/a.png\n",
            "autosplit_test.txt": "./images/all/b.png\n",
        },
        ["test", "train"],
        {"test": {"images/all/b.png": [1]}},
    ),
    "one list beside folders": (
        {**yolo("a"), **yolo("b", images="images/val", labels="labels/val", first=1), **CLASSES}
        | {"Train2017.txt": "images\\a.png"},
        ["Train2017", "val"],
        {"Train2017": {"images/a.png": [0]}, "val": {"images/val/b.png": [1]}},
    ),
    "lists beside XML files": (
        {**SIDES, "train.txt": "a.png a.xml\n", "test.txt": "./b.png ./b.xml\n"},
        ["test", "train"],
        {"train": {"a.png": [0]}, "test": {"b.png": [1]}},
    ),
    "lists of VOC without Main": (
        {**SIDES, "ImageSets/train.txt": "a\n", "ImageSets/val.txt": ".\\b.png\r\n"},
        ["train", "val"],
        {"val": {"b.png": [1]}},
    ),
    "lists of darknet's VOC": (
        {**PAIR, "train.txt": "/x/images/all/a.png\n", "2007_test.txt": "/x/images/all/b.png\n"},
        ["test", "train"],
        {"test": {"images/all/b.png": [1]}},
    ),
    "lists of VOC beside text files": (
        {**yolo("a", "b"), **CLASSES, "ImageSets/Main/train.txt": "a\n"}
        | {"ImageSets/Main/val.txt": "b\n", "train_log.txt": "epoch 1\n"},
        ["train", "val"],
        {"val": {"images/b.png": [1]}},
    ),
    "folders of images only": (
        {"images/train/a.png": None, "images/val/b.png": None}
        | {"annotations/a.xml": xml(0), "annotations/b.xml": xml(1)},
        ["train", "val"],
        {"train": {"images/train/a.png": [0]}, "valid": {"images/val/b.png": [1]}},
    ),
    "COCO with splits in long names": (
        {"a.png": None, "b.png": None, "annotations/train_annotations.coco.json": coco("a.png")}
        | {"annotations/annotations_val.json": coco("b.png")},
        ["train", "val"],
        {"train": {"a.png": [0]}},
    ),
    "CSV with splits in long names": (
        {"images/a.png": None, "images/b.png": None}
        | {"annotations/annotations_train.csv": "a.png,8,6,40,30,cat\n"}
        | {"annotations/oidv6-validation-bbox.csv": "b.png,16,12,48,36,cat\n"},
        ["train", "validation"],
        {"val": {"images/b.png": [1]}},
    ),
    "column of CSV": (
        {"a.png": None, "b.png": None}
        | {"x.csv": f"{HEADER},Split\n8,6,40,30,cat,a,Train\n16,12,48,36,cat,b,valid\n"},
        ["Train", "valid"],
        {"train": {"a.png": [0]}, "val": {"b.png": [1]}},
    ),
    "entries of COCO": (
        {"a.png": None, "b.png": None, "x.json": coco_with_splits("Train", "valid")},
        ["Train", "valid"],
        {"train": {"a.png": [0]}, "val": {"b.png": [1]}},
    ),
    "CSV of AutoML": (
        {"a.png": None, "b.png": None, "x.csv": "".join(AUTOML_ROWS)},
        ["TRAIN", "VALIDATION"],
        {"train": {"a.png": [0]}, "val": {"b.png": [1]}},
    ),
}


@pytest.mark.parametrize("name", STATED_SPLITS)
def test_lists_and_columns_are_splits(tmp_path, name):
    tree, splits, wanted = STATED_SPLITS[name]
    sources = [write(tmp_path, tree), *tmp_path.glob("*.csv"), *tmp_path.glob("*.json")]
    for source in sources:
        assert find_splits(source) == splits
        for split, images in wanted.items():
            assert boxes(read_detection(source, split), tmp_path) == images
        if len(wanted) > 1:  # all images, also those of no list
            assert len(data.read_detection(source)) == 2
        with pytest.raises(ValueError, match=r"`split` must be (in|one of).*'exam'"):
            read_detection(source, "exam")
    assert [len(part) for part in read_train_test(tmp_path)] == [1, 1]


def test_folders_of_splits_that_are_links(tmp_path):
    write(tmp_path, {**yolo("a", images="set/train", labels="set/train"), "set/classes.txt": "cat"})
    write(tmp_path, yolo("b", images="far", labels="far", first=1))
    (tmp_path / "set/val").symlink_to(tmp_path / "far")
    wanted = {"set/train/a.png": [0], "set/val/b.png": [1]}
    assert boxes(read_detection(tmp_path / "set"), tmp_path) == wanted


def test_files_of_one_split_keep_their_names(tmp_path):
    names = ("train.csv", "train_old.csv", "val_labels.csv", "test-2.csv")
    write(tmp_path, {"a.png": None, **{name: "a.png,8,6,40,30,cat\n" for name in names}})
    assert find_splits(tmp_path) == ["test-2", "train", "train_old", "val"]


def test_images_in_both_sets(tmp_path):
    write(tmp_path, {**PAIR, "train.txt": "all/a.png\nall/b.png\n", "test.txt": "all/b.png\n"})
    with pytest.warns(UserWarning, match="1 test images are also training images"):
        _, test = read_train_test(tmp_path)
    assert [problem.file for problem in test.report.problems] == ["b.png"]


def test_a_list_is_not_the_text_file_of_an_image(tmp_path):
    tree = {**yolo("train", "b", images=".", labels="."), **CLASSES}
    assert boxes(read_detection(write(tmp_path, tree)), tmp_path) == {
        "b.png": [1],
        "train.png": [0],
    }
    assert find_splits(tmp_path) == []
    write(tmp_path, {"val.txt": "b.png\nc.png\n"})
    with pytest.raises(ValueError, match=r"val\.txt: missing image: no 'c\.png'"):
        read_detection(tmp_path, "val")


def test_entries_of_coco_without_a_split(tmp_path):
    write(tmp_path, {"a.png": None, "b.png": None, "x.json": coco_with_splits("train", None)})
    with pytest.warns(UserWarning, match="1 x images without a split"):
        assert boxes(read_detection(tmp_path, "train"), tmp_path) == {"a.png": [0]}
    content = json.loads((tmp_path / "x.json").read_text())
    del content["annotations"][0]
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert find_splits(tmp_path) == []  # no object in it
    write(tmp_path, {"x.json": coco_with_splits("lego", "lego")})  # of another meaning
    with pytest.raises(ValueError, match="has no splits"):
        read_detection(tmp_path / "x.json", "lego")


def test_contradicting_columns_of_splits(tmp_path):
    rows = "a,8,6,40,30,cat,{}\nb,8,6,40,30,cat,{}\na,16,12,48,36,cat,{}\n"
    write(tmp_path, {"a.png": None, "b.png": None})

    def read(values, split, **options):
        text = f"image,x1,y1,x2,y2,label,set\n{rows.format(*values)}"
        (tmp_path / "x.csv").write_text(text)
        return read_detection(tmp_path / "x.csv", split, **options)

    assert boxes(read(("train", "VAL", "TRAIN"), "train"), tmp_path) == {"a.png": [0, 1]}
    assert len(data.read_csv(tmp_path / "x.csv", split="validation")) == 1
    with pytest.raises(ValueError, match=r"different splits of one image: a: 'test', 'train'"):
        read(("train", "val", "test"), "train")
    with pytest.warns(UserWarning, match="images without a split"):
        assert len(read(("train", "", "train"), "train")) == 1
    with pytest.raises(ValueError, match="has no splits"):  # a column of another meaning
        read(("lego", "1", "lego"), "lego")
    with pytest.raises(ValueError, match=r"`split` must be in .*they are not named"):
        data.read_csv(tmp_path / "x.csv", split="lego")


NOTHING = json.loads(coco("b.png"))
NOTHING = json.dumps({**NOTHING, "annotations": []})
UNLABELED = {  # name: files of an annotated "train", an annotated "val" and a bare "test"
    "yolo": {
        **yolo("a", images="images/train", labels="labels/train"),
        **yolo("v", images="images/val", labels="labels/val"),
        **{"images/test/b.png": None, **CLASSES},
    },
    "yolo settings": {
        **{**TRAIN, **yolo("v", images="val/images", labels="val/labels")},
        **{"test/images/b.png": None},
        "data.yaml": "train: train/images\nval: val/images\ntest: test/images\nnames: [cat]\n",
    },
    "voc": {
        **{**SIDES, "c.png": None, "ImageSets/Main/test.txt": "c\n"},
        **{"ImageSets/Main/train.txt": "a\n", "ImageSets/Main/val.txt": "b\n"},
    },
    "coco": {
        **{name: None for name in ("train/a.png", "val/v.png", "test/b.png")},
        "train/_annotations.coco.json": coco("a.png"),
        "val/_annotations.coco.json": coco("v.png"),
        "test/_annotations.coco.json": NOTHING,
    },
    "csv": {
        **{f"{name}.png": None for name in "avb"},
        **{"train.csv": "a.png,8,6,40,30,cat\n", "val.csv": "v.png,8,6,40,30,cat\n"},
        "test.csv": "b.png,,,,,\n",
    },
    "yolo of empty files": {
        **{**TRAIN, **yolo("v", images="val/images", labels="val/labels")},
        **{"test/images/b.png": None, "test/labels/b.txt": "\n", **CLASSES},
    },
    "voc of empty files": {
        **{"train/a.png": None, "train/a.xml": xml(0), "val/b.png": None, "val/b.xml": xml(1)},
        **{"test/c.png": None, "test/c.xml": "<annotation></annotation>"},
    },
    "csv column": {
        **{f"{name}.png": None for name in "avb"},
        "x.csv": f"set,{HEADER}\ntrain,8,6,40,30,cat,a\nval,8,6,40,30,cat,v\ntest,,,,,,b\n",
    },
}


@pytest.mark.parametrize("name", UNLABELED)
def test_a_split_without_annotations_is_not_measured(tmp_path, name):
    write(tmp_path, UNLABELED[name])
    assert find_splits(tmp_path) == ["train", "val"]
    train, test = read_train_test(tmp_path)
    assert (len(train), len(test)) == (1, 1) and test.report.num_boxes == 1
    if name in ("yolo", "yolo settings"):  # nor are its images background
        with pytest.warns(UserWarning, match="1 x split without"):
            dataset = read_detection(tmp_path)
        assert len(dataset) == 2 and dataset.report.problems[0].file == "test"


UNKNOWN = {  # name: (files, what the message says)
    "a folder around it": ({"set/v1/x.json": coco("a.png")}, r"Did you mean \S*/set/v1\?"),
    "CSV of Kaggle's wheat": (
        {"train.csv": 'image_id,bbox,class\na,"[8.0, 6.0, 32.0, 24.0]",cat\n'},
        r"train\.csv: unknown columns: .*Received: image_id, bbox, class",
    ),
    "CSV of bytes": ({"x.csv": b"a.png,8,6,40,30,K\xe4fer\n"}, r"x\.csv: .*not UTF-8"),
    "JSON of labelme": ({"a.json": '{"shapes": []}'}, r"a\.json: not a COCO file of objects"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_folders_of_no_known_format(tmp_path, name):
    tree, message = UNKNOWN[name]
    with pytest.raises(ValueError, match=f"not a folder of a known format.*{message}"):
        read_detection(write(tmp_path, tree))


SIZES = coco("a.png", "a.png")
for side, name in (("64", '"id": 0, "f'), ("32", '"id": 1, "f')):
    SIZES = SIZES.replace(name, f'"width": {side}, "height": {side}, {name}')
CONTRADICTIONS = {  # name: (files, what the message says)
    "text file of two images": (
        {**yolo("a"), **CLASSES, "images/a.jpg": None},
        r"a\.txt: text file of several images",
    ),
    "two text files of an image": (
        {**yolo("a"), **CLASSES, "labels/a.png.txt": row(1)},
        r"a\.png\.txt: missing image",
    ),
    "COCO without file_name": (
        {"a.png": None, "x.json": coco("a.png").replace("file_name", "filename")},
        r"x\.json: unreadable image entry: .*'filename': 'a\.png'",
    ),
    "key used twice": (
        {**TRAIN, "data.yaml": "train: train/images\nnames:\n  0: cat\n  0: dog\n"},
        r"data\.yaml: unreadable YAML file: '0' twice in line 3",
    ),
    "empty line in a list of classes": (
        {**yolo("a"), "labels/a.txt": row(0).replace("0", "1", 1), "classes.txt": "cat\n\ndog\n"},
        r"class 1 in line 1\. Known: 0 \(cat\), 2 \(dog\)",
    ),
    "two sizes in CSV": (
        {
            "a.png": None,
            "x.csv": "image,x1,y1,x2,y2,label,width,height\n"
            "a.png,8,6,40,30,cat,64,48\na.png,32,24,96,72,cat,128,96\n",
        },
        r"x\.csv: different sizes of one image: a\.png: 64 x 48, 128 x 96",
    ),
    "two sizes in COCO": (
        {"a.png": None, "x.json": SIZES},
        r"x\.json: image listed twice with different sizes: a\.png",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(tmp_path, name):
    tree, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        read_detection(write(tmp_path, tree))


def test_a_file_name_of_another_image(tmp_path):
    write(tmp_path, {**SIDES, "a.xml": xml(0, "b.png")})
    with pytest.warns(UserWarning, match="1 x <filename> of another image"):
        dataset = read_detection(tmp_path)
    assert boxes(dataset, tmp_path) == {"a.png": [0], "b.png": [1]}  # the stem counts
    (problem,) = dataset.report.problems
    assert str(problem).startswith("a.xml: <filename> of another image b.png - boxes assumed")


@pytest.mark.parametrize("folder", ["", "images/"])
def test_a_name_without_suffix_of_two_images(tmp_path, folder):
    tree = {f"{folder}a.png": None, f"{folder}a.jpg": None, "x.csv": "a,8,6,40,30,cat\n"}
    with pytest.raises(ValueError, match=r"x\.csv: .*It could be a\.jpg or a\.png"):
        read_detection(write(tmp_path, tree))
    write(tmp_path, {f"{folder}b.png": None, "x.json": coco("b", "a")})
    with pytest.raises(ValueError, match=r"x\.json: .*'a'.*It could be a\.jpg or a\.png"):
        read_detection(tmp_path / "x.json")


@pytest.mark.filterwarnings("ignore:.*invalid coordinates")
def test_numbers_of_python_are_none(tmp_path):
    rows = "image,x1,y1,x2,y2,label\na.png,8,6,4_0,30,cat\na.png,8,6,40,30,cat\n"
    dataset = read_detection(write(tmp_path, {"a.png": None, "x.csv": rows}))
    assert boxes(dataset, tmp_path) == {"a.png": [0]} and len(dataset.report.problems) == 1


# === Totals ===


def test_no_usable_box_at_all(tmp_path):
    write(tmp_path, {"a.png": None, "b.png": None, "x.json": coco("a.png", "b.png", bbox=[])})
    with pytest.raises(ValueError, match=r"No usable box in the 2 images of .*2 x invalid"):
        read_detection(tmp_path / "x.json")
    content = json.loads(coco("a.png", "b.png"))
    (tmp_path / "x.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ValueError, match="No box to train on"):
        read_train_test(tmp_path / "x.json", holdout=0.5)


def test_fractions_in_place_of_pixels(tmp_path):
    corners = [f"<xmin>{x}</xmin><ymin>.1</ymin><xmax>.9</xmax><ymax>1</ymax>" for x in (0.2, 0)]
    names = [("a", corners[0]), ("b", corners[1])]
    start, end = xml(0).split("<xmin>")[0], xml(0).split("</ymax>")[1]
    write(tmp_path, {f"{name}.xml": start + box + end for name, box in names})
    write(tmp_path, {"a.png": None, "b.png": None})
    with pytest.raises(ValueError, match=r"must be in pixels.*within 0 to 1: \[0.2, .1, .9, 1\]"):
        read_detection(tmp_path)


@pytest.mark.filterwarnings("ignore:.*degenerate box")
def test_parts_keep_the_problems_of_the_whole(tmp_path):
    names = [f"{i}.png" for i in range(3)]
    write(tmp_path, {name: None for name in names})
    content = json.loads(coco(*names))
    content["annotations"][1]["bbox"][2] = 0
    (tmp_path / "x.json").write_text(json.dumps(content))
    dataset = read_detection(tmp_path / "x.json")
    parts = [*dataset.hold_out(0.4), dataset.shard(2, 0), dataset.shard(2, 1)]
    assert [problem.file for problem in dataset.report.problems] == ["1.png"]
    assert all(part.report.problems == dataset.report.problems for part in parts)


# === Images without annotation, polygons, masks ===

UNANNOTATED = {
    "voc": {"a.png": None, "a.xml": xml(0), "b.png": None},
    "yolo": {**yolo("a"), **CLASSES, "images/b.png": None},
    "coco": {"a.png": None, "b.png": None},
    "csv": {"a.png": None, "b.png": None, "x.csv": "a.png,8,6,40,30,cat\nb.png,,,,,\n"},
}


@pytest.mark.parametrize("name", UNANNOTATED)
def test_images_without_annotation(tmp_path, name):
    content = json.loads(coco("a.png", "b.png"))
    del content["annotations"][1]
    tree = {"x.json": json.dumps(content)} if name == "coco" else {}
    folder = write(tmp_path, {**UNANNOTATED[name], **tree})
    dataset = read_detection(folder, unannotated="background")
    assert list(boxes(dataset, folder).values()) == [[0], []] and not dataset.report.problems
    with pytest.raises(ValueError, match=r'b\.png: .*unannotated="background"'):
        read_detection(folder, unannotated="error")
    for options in ({"unannotated": "skip"}, {"unannotated": "error", "on_error": "skip"}):
        with pytest.warns(UserWarning, match="1 x "):
            dataset = read_detection(folder, **options)
        assert [Path(record.image).name for record in dataset.records] == ["a.png"]
        assert [problem.file for problem in dataset.report.problems] == ["b.png"]
    with pytest.raises(ValueError, match="`unannotated` must be one of"):
        read_detection(folder, unannotated="empty")


def test_images_without_xml_file_of_one_split(tmp_path):
    tree = {f"{split}/{name}": None for split in ("train", "valid") for name in ("a.png", "b.png")}
    write(tmp_path, {**tree, "train/a.xml": xml(0), "valid/a.xml": xml(1)})
    dataset = read_detection(tmp_path, "val", unannotated="background")
    assert boxes(dataset, tmp_path) == {"valid/a.png": [1], "valid/b.png": []}
    with pytest.raises(ValueError, match=r"train/b\.png: missing XML file"):
        read_detection(tmp_path, "train")


def test_boxes_of_polygons_and_masks(tmp_path):
    from pycocotools import mask as reference

    rng, objects = np.random.default_rng(0), []
    for i in range(40):
        mask = np.zeros(SIZE[::-1], "uint8", order="F")
        x, y = rng.integers(0, SIZE[0] - 1), rng.integers(0, SIZE[1] - 1)
        mask[y : y + rng.integers(1, 50), x : x + rng.integers(1, 60)] = rng.random() > 0.3
        mask |= np.asfortranarray(rng.random(mask.shape) > 0.999).astype("uint8")
        mask[0, 0] |= not mask.any()
        encoded = reference.encode(mask)
        runs = [len(list(run)) for _, run in itertools.groupby(mask.ravel("F"))]
        counts = encoded["counts"].decode() if i % 2 else [0] * int(mask[0, 0]) + runs
        left, top, width, height = reference.toBbox(encoded)
        objects.append(({"size": encoded["size"], "counts": counts}, left, top, width, height))
    objects.append(([[8, 6, 20, 6, 20, 30], [30, 8, 40, 8, 40, 20]], 8, 6, 32, 24))
    faulty = [{"size": [48, 64], "counts": "~"}, {"size": [-1, 1], "counts": [-1]}, [[1, 2]], "x"]
    content = json.loads(coco("a.png"))
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": i, "segmentation": part}
        for i, part in enumerate([o[0] for o in objects] + faulty)
    ]
    content["categories"] = [{"id": i, "name": f"{i}"} for i in range(len(objects) + len(faulty))]
    write(tmp_path, {"a.png": None, "x.json": json.dumps(content)})
    with pytest.warns(UserWarning, match="4 x invalid coordinates"):
        found = read_detection(tmp_path / "x.json").records[0].boxes
    wanted = [(x, y, x + width, y + height) for _, x, y, width, height in objects]
    np.testing.assert_array_equal(found, wanted)


# === Hostile files ===

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
HOSTILE = {  # name: (files, what the message says)
    "alias bomb": ({"data.yaml": f"{BOMB}names: [*a59]"}, r"data\.yaml: unreadable class names"),
    "bomb as a path": (
        {"data.yaml": f"{BOMB}names: [c]\ntrain: *a59"},
        "unreadable setting 'train'",
    ),
    "deep YAML": ({"data.yaml": "[" * 2000}, r"data\.yaml: unreadable YAML"),
    "large YAML": ({"data.yaml": "#" * 2_000_000}, "it has 2000000 bytes"),
    "number as a path": ({"data.yaml": "train: 5\nnames: [c]"}, "train: '5' is not in"),
    "long path": ({"data.yaml": f"train: {'x' * 5000}\nnames: [c]"}, "missing images: train: 'xx"),
    "the whole disk": ({"data.yaml": "train: /\nnames: [c]"}, "'/' is not in .*allow_outside=True"),
    "foreign list": ({"data.yaml": "train: /etc/passwd\nnames: [c]"}, "outside of the dataset"),
    "foreign names": ({"data.yaml": "names: /etc/passwd"}, "there is no '/etc/passwd'"),
    "list of bytes": (
        {"data.yaml": "train: l.txt\nnames: [c]", "l.txt": b"\xe4"},
        r"l\.txt: .*UTF-8",
    ),
    "open quote": (
        {"x.csv": 'a.png,1,2,3,4,"c\n' + "a.png,1,2,3,4,c\n" * 20_000},
        r"x\.csv: .*after line 0",
    ),
    "open quote in a small file": (
        {"x.csv": 'a.png,1,2,3,4,c\na.png,1,2,3,4,"c\n'},
        "after line 1",
    ),
    "long name": ({"x.json": coco("x" * 5000)}, "give `image_folder`"),
    "null character": ({"x.json": coco("a\0.png", "a.png"), "a.png": None}, r"no 'a\\x00.png'"),
    "folder above": ({"x.json": coco("../b.png", "a.png"), "a.png": None}, "allow_outside=True"),
    "absolute name": (
        {"x.json": coco("ROOT/../b.png", "a.png"), "a.png": None},
        "allow_outside=True",
    ),
    "XML of bytes": (
        {"a.xml": xml(0, "\xe4").encode("latin-1"), "a.png": None},
        r"a\.xml: unreadable",
    ),
    "split of bytes": (
        {"Annotations/a.xml": xml(0), "images/a.png": None, "ImageSets/Main/train.txt": b"\xe4"},
        r"train\.txt: unreadable list of images: it is not UTF-8",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    tree, message = HOSTILE[name]
    folder = tmp_path / "set"
    tree = {k: v.replace("ROOT", str(folder)) if type(v) is str else v for k, v in tree.items()}
    write(folder, tree)
    write(tmp_path, {"b.png": None})
    source = next((folder / file for file in tree if file[0] == "x"), folder)
    with pytest.raises(ValueError, match=message) as caught:
        read_detection(source, "train" if "ImageSets/Main/train.txt" in tree else None)
    assert "root:" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize("file", ["a.xml", "x.json", "x.csv", "labels/a.txt", "data.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_pipes_devices_and_giants(tmp_path, file, kind):
    tree = yolo("a") | CLASSES if file[0] in "ld" else {"a.png": None}
    path = write(tmp_path, tree) / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    source = path if path.name[0] == "x" else tmp_path
    with pytest.raises(ValueError, match=rf"{file}: unreadable .*(not a regular file|bytes)"):
        read_detection(source)


def test_files_outside_on_request(tmp_path):
    write(tmp_path, {"b.png": None, "set/x.json": coco("../b.png")})
    dataset = read_detection(tmp_path / "set/x.json", allow_outside=True)
    assert boxes(dataset, tmp_path) == {"b.png": [0]}
    tree = {**yolo("a", images="far/images", labels="far/labels")}
    settings = f"path: {tmp_path}/far\ntrain: images\nnames: [cat]\n"
    write(tmp_path, {**tree, "yaml/data.yaml": settings})
    with pytest.raises(ValueError, match="allow_outside=True"):
        data.read_yolo(tmp_path / "yaml")
    dataset = data.read_yolo(tmp_path / "yaml", allow_outside=True)
    assert boxes(dataset, tmp_path) == {"far/images/a.png": [0]}


def test_lists_that_are_links_out_of_the_dataset(tmp_path):
    tree = {**yolo("a"), "JPEGImages/a.png": None, "Annotations/a.xml": xml(0)}
    folder = write(tmp_path / "set", tree)
    secret = write(tmp_path, {"secret.txt": "secret\n"}) / "secret.txt"
    (folder / "ImageSets/Main").mkdir(parents=True)
    for link in ("classes.txt", "ImageSets/Main/train.txt"):
        (folder / link).symlink_to(secret)
    for options in ({"format": "yolo"}, {"format": "voc", "split": "train"}):
        with pytest.raises(ValueError, match="allow_outside=True") as caught:
            read_detection(folder, **options)
        assert "secret" not in str(caught.value)
    assert read_detection(folder, format="yolo", allow_outside=True).class_names == ["secret"]


def test_class_folders_of_splits_in_any_letters(tmp_path):
    tmp_path = tmp_path / "outer/flowers"
    write(tmp_path, {f"{split}/cat/a.png": None for split in ("Train", "VALID", "docs")})
    for split, found in (("train", "Train"), ("Training", "Train"), ("val", "VALID")):
        (record,) = read_image_folder(tmp_path, split).records
        assert Path(record.image) == tmp_path / found / "cat/a.png"
    with pytest.raises(ValueError, match="`split` must be given if folders are named Train, VALID"):
        read_image_folder(tmp_path)
    with pytest.raises(ValueError, match=f"Did you mean {tmp_path}"):
        read_image_folder(tmp_path.parent)
    arguments = parse_arguments(["train", "--classifier", str(tmp_path)])
    assert [len(part) for part in train_classifier.read_train_test(arguments)] == [1, 1]


def test_class_folders_of_another_system(tmp_path):
    write(tmp_path, {f"{NFD}/a.png": None, ".cache/b.png": None, "runs/c.png": None})
    write(tmp_path / NFD, {"._a.png": b"\0", "Thumbs.db": b"\0"})
    assert [path.name for path in data.find_images(tmp_path / NFD)] == ["a.png"]
    dataset = read_image_folder(tmp_path)
    assert dataset.class_names == [NFC] and not dataset.report.problems
    assert read_image_folder(tmp_path, class_names=[NFD, "b"]).records[0].label == 0
