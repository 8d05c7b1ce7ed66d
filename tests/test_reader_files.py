"""`read_coco`, `read_yolo`, `read_csv`, `read_detection`: the same dataset in all formats."""

import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from keras_resnest.data import (
    DetectionDataset,
    ImageRecord,
    find_splits,
    read_coco,
    read_csv,
    read_detection,
    read_train_test,
    read_voc,
    read_yolo,
)

SIZE = (60, 40)  # width, height
# image: objects (name, x1, y1, x2, y2), continuous pixels
TRUTH = {
    "a.png": [("dog", 10, 5, 30, 25), ("cat", 0, 0, 60, 40)],
    "b.png": [],
    "c.png": [("cat", 20.5, 10.25, 40.5, 30.75)],
}
NAMES = ["cat", "dog"]


def noise(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype="uint8")


def save_images(folder, names=TRUTH, size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, size)).save(folder / name)
    return folder


# === Writers, independent of the readers ===


def coco(truth=TRUTH, ids=None, **changes):
    """The dictionary of a COCO file; category ids have gaps."""
    ids = ids or {"cat": 17, "dog": 90}
    content = {
        "images": [
            {"id": 100 + i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for i, name in enumerate(truth)
        ],
        "annotations": [
            {
                "id": 10 * i + j,
                "image_id": 100 + i,
                "category_id": ids[name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
            }
            for i, objects in enumerate(truth.values())
            for j, (name, x1, y1, x2, y2) in enumerate(objects)
        ],
        "categories": [{"id": ids[name], "name": name} for name in sorted(ids, key=ids.get)],
    }
    return {**content, **changes}


def write_coco(folder, truth=TRUTH, **changes):
    save_images(folder / "images", truth)
    path = folder / "objects.json"
    path.write_text(json.dumps(coco(truth, **changes)))
    return path


def yolo_lines(objects, names=NAMES):
    width, height = SIZE
    return "".join(
        f"{names.index(name)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
        f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
        for name, x1, y1, x2, y2 in objects
    )


def write_yolo(folder, truth=TRUTH, images="images/train", labels="labels/train"):
    save_images(folder / images, truth)
    (folder / labels).mkdir(parents=True)
    for name, objects in truth.items():
        if objects:  # an image without a file has no objects
            (folder / labels / name).with_suffix(".txt").write_text(yolo_lines(objects))
    (folder / "data.yaml").write_text("names: [cat, dog]\n")
    return folder


def write_csv(folder, truth=TRUTH):
    save_images(folder, truth)
    rows = []
    for image, objects in truth.items():
        rows += [f"{image},{x1},{y1},{x2},{y2},{name}" for name, x1, y1, x2, y2 in objects]
        rows += [f"{image},,,,,"] * (not objects)
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    return folder / "train.csv"


WRITERS = {
    "coco": lambda folder: read_coco(write_coco(folder)),
    "yolo": lambda folder: read_yolo(write_yolo(folder), "train"),
    "csv": lambda folder: read_csv(write_csv(folder)),
}


def found(dataset):
    """[(class name, x1, y1, x2, y2), ...] of every image."""
    return [
        [(dataset.class_names[k], *box) for k, box in zip(r.labels, r.boxes.tolist(), strict=True)]
        for r in dataset.records
    ]


def problems(read):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = read()
    assert bool(caught) == bool(dataset.report.problems)  # and only then a warning
    return dataset, [problem.what for problem in dataset.report.problems]


# === All formats ===


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_data_in_every_format(tmp_path, name):
    dataset, faults = problems(lambda: WRITERS[name](tmp_path))
    assert faults == [] and dataset.class_names == NAMES
    for objects, wanted in zip(found(dataset), TRUTH.values(), strict=True):
        assert [o[0] for o in objects] == [w[0] for w in wanted]
        for box, right in zip(objects, wanted, strict=True):
            np.testing.assert_allclose(box[1:], right[1:], atol=1e-4)
    assert dataset.report.num_empty_images == 1 and dataset.report.num_boxes == 3
    assert len({record.image_id for record in dataset.records}) == 3
    for i, element in enumerate(dataset.as_dataset()):
        np.testing.assert_array_equal(element["images"], noise(i))
        np.testing.assert_array_equal(element["bounding_boxes"]["boxes"], dataset.records[i].boxes)


@pytest.mark.parametrize(
    ("box", "expected", "fault"),
    [
        ((50, 30, 70, 45), (50, 30, 60, 40), "box across the border"),
        ((-5, 10, 20, 20), (0, 10, 20, 20), "box across the border"),
        ((50, 30, 60.3, 40.2), (50, 30, 60, 40), None),  # rounding
        ((70, 10, 80, 20), None, "box outside the image"),
        ((10, 10, 10, 20), None, "degenerate box"),
        ((30, 10, 20, 20), None, "degenerate box"),
        ((float("nan"), 10, 20, 20), None, "invalid coordinates"),
        ((10, 10, float("inf"), 20), None, "invalid coordinates"),
        ((20, 10, 40, 20), None, "repeated box"),
    ],
)
@pytest.mark.parametrize("name", WRITERS)
def test_odd_boxes(tmp_path, monkeypatch, name, box, expected, fault):
    monkeypatch.setitem(TRUTH, "b.png", [("dog", 20, 10, 40, 20), ("dog", *box)])
    dataset, faults = problems(lambda: WRITERS[name](tmp_path))
    assert faults == [fault] * bool(fault)
    boxes = [box for _, *box in found(dataset)[1]]
    wanted = [[20, 10, 40, 20]] + ([list(expected)] if expected else [])
    np.testing.assert_allclose(boxes, wanted, atol=1e-3)
    if fault:
        problem = dataset.report.problems[0]
        assert problem.action == ("clipped" if expected else "dropped") and "dog" in problem.detail


@pytest.mark.parametrize("name", WRITERS)
def test_same_box_of_two_classes_is_kept(tmp_path, monkeypatch, name):
    monkeypatch.setitem(TRUTH, "b.png", [("dog", 20, 10, 40, 20), ("cat", 20, 10, 40, 20)])
    dataset, faults = problems(lambda: WRITERS[name](tmp_path))
    assert faults == [] and len(found(dataset)[1]) == 2


READERS = {
    "coco": lambda folder, **options: read_coco(folder / "objects.json", **options),
    "yolo": lambda folder, **options: read_yolo(folder, "train", **options),
    "csv": lambda folder, **options: read_csv(folder / "train.csv", **options),
}


def image_path(folder, name):
    return next(folder.rglob(name))


@pytest.mark.parametrize("name", READERS)
def test_class_names_give_the_order_of_the_labels(tmp_path, name):
    WRITERS[name](tmp_path)
    dataset = READERS[name](tmp_path, class_names=["cow", "dog", "cat"])
    assert [record.labels.tolist() for record in dataset.records] == [[1, 2], [], [2]]
    assert dataset.report.class_counts == {"cow": 0, "dog": 1, "cat": 2}
    with pytest.raises(ValueError, match=r"unknown class 'dog'.*Nearest: 'dogs'"):
        READERS[name](tmp_path, class_names=["cat", "dogs"])
    with pytest.warns(UserWarning, match="unknown class 'dog'"):
        dataset = READERS[name](tmp_path, class_names=["cat", "dogs"], on_error="skip")
    assert [len(record.boxes) for record in dataset.records] == [0, 1]
    with pytest.raises(ValueError, match="`class_names` must be"):
        READERS[name](tmp_path, class_names=["cat", "cat"])
    with pytest.raises(ValueError, match="on_error"):
        READERS[name](tmp_path, on_error="ignore")


@pytest.mark.parametrize("name", READERS)
def test_broken_image_raises_or_is_skipped(tmp_path, name):
    WRITERS[name](tmp_path)
    broken = image_path(tmp_path, "c.png")
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"c\.png: unreadable image"):
        READERS[name](tmp_path)
    dataset, faults = problems(lambda: READERS[name](tmp_path, on_error="skip"))
    assert faults == ["unreadable image"] and len(dataset) == 2
    assert dataset.report.problems[0].file == "c.png"


@pytest.mark.parametrize("name", ["coco", "csv", "yolo"])
def test_missing_image_raises_or_is_skipped(tmp_path, name):
    WRITERS[name](tmp_path)
    image_path(tmp_path, "c.png").unlink()
    with pytest.raises(ValueError, match=r"missing image: no .*c\."):
        READERS[name](tmp_path)
    dataset, faults = problems(lambda: READERS[name](tmp_path, on_error="skip"))
    assert faults == ["missing image"] and len(dataset) == 2


@pytest.mark.parametrize(
    ("name", "drawn_on"),
    # Only COCO states the size of the image, which reveals its frame.
    [("coco", "upright"), ("coco", "stored"), ("yolo", "upright"), ("csv", "upright")],
)
def test_rotated_images(tmp_path, name, drawn_on):
    """A white rectangle on black; boxes of YOLO and CSV always belong to the upright image."""
    WRITERS[name](tmp_path)
    upright = np.zeros((SIZE[1], SIZE[0], 3), "uint8")
    upright[5:25, 10:30] = 255
    stored = np.rot90(upright)  # EXIF 6 turns it back by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(stored)).save(image_path(tmp_path, "a.png"), exif=exif)
    if drawn_on == "stored":
        rows, columns = np.nonzero(stored[..., 0])
        corner = [int(columns.min()), int(rows.min())]
        box = [*corner, 20, 20]
        content = coco({"a.png": [("dog", *corner, corner[0] + 20, corner[1] + 20)]})
        content["images"][0].update(width=SIZE[1], height=SIZE[0])
        assert content["annotations"][0]["bbox"] == box
        (tmp_path / "objects.json").write_text(json.dumps(content))
    dataset, faults = problems(lambda: READERS[name](tmp_path))
    assert faults == ([] if name == "coco" and drawn_on == "upright" else ["EXIF orientation"])
    element = next(iter(dataset.as_dataset()))
    np.testing.assert_array_equal(element["images"], upright)
    np.testing.assert_allclose(element["bounding_boxes"]["boxes"][0], [10, 5, 30, 25], atol=1e-4)


# === COCO ===


def read_changed(folder, change, **options):
    path = write_coco(folder)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return lambda: read_coco(path, **options)


def test_coco_matches_pycocotools(tmp_path):
    from pycocotools.coco import COCO

    path = write_coco(tmp_path)
    reference, dataset = COCO(path), read_coco(path)
    for record in dataset.records:
        rows = reference.loadAnns(reference.getAnnIds([int(record.image_id)]))
        names = [reference.loadCats([row["category_id"]])[0]["name"] for row in rows]
        assert [dataset.class_names[k] for k in record.labels] == names
        for box, row in zip(record.boxes, rows, strict=True):
            np.testing.assert_allclose(box[2:] - box[:2], row["bbox"][2:])
            np.testing.assert_allclose(box[:2], row["bbox"][:2])
    assert dataset.class_names == [c["name"] for c in reference.loadCats(reference.getCatIds())]


def test_coco_crowds_are_difficult(tmp_path):
    def crowd(content):
        content["annotations"][1]["iscrowd"] = 1

    dataset = read_changed(tmp_path, crowd)()
    assert dataset.records[0].difficult.tolist() == [False, True]
    assert dataset.report.num_difficult == 1
    without = read_coco(tmp_path / "objects.json", use_difficult=False)
    assert without.records[0].labels.tolist() == [1] and without.report.num_difficult == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_coco_encodings_and_windows_paths(tmp_path, encoding):
    content = coco({"sub\\a.png": [("Käfer", 1, 2, 3, 4)]}, ids={"Käfer": 3})
    save_images(tmp_path / "images", ["sub/a.png"])
    (tmp_path / "x.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    dataset = read_coco(tmp_path / "x.json", tmp_path / "images")
    assert found(dataset) == [[("Käfer", 1, 2, 3, 4)]]


def test_coco_looks_for_its_images(tmp_path):
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(coco()))
    with pytest.raises(ValueError, match=r"give `image_folder`.*train2017"):
        read_coco(path)
    save_images(tmp_path / "train2017")
    assert len(read_coco(path)) == 3
    with pytest.raises(ValueError, match="`image_folder` must be a folder"):
        read_coco(path, tmp_path / "absent")


def test_coco_images_in_file_order_and_names_in_id_order(tmp_path):
    def mix_up(content):
        for rows in content.values():
            rows.reverse()

    dataset = read_changed(tmp_path, mix_up)()
    assert [record.image_id for record in dataset.records] == ["102", "101", "100"]
    assert dataset.class_names == ["cat", "dog"]  # 17 before 90


COCO_FAULTS = {  # problem: (change, remaining images)
    "unknown category id": (lambda c: c["annotations"][2].update(category_id=1), 2),
    "annotation of an image that is not listed": (
        lambda c: c["annotations"][2].update(image_id=7),
        3,
    ),
    "image id used twice": (lambda c: c["images"][2].update(id=100), 1),
    "unreadable image entry": (lambda c: c["images"][1].update(file_name=None), 2),
}


@pytest.mark.parametrize("what", COCO_FAULTS)
def test_coco_faults_raise_or_skip(tmp_path, what):
    change, left = COCO_FAULTS[what]
    read = read_changed(tmp_path, change)
    with pytest.raises(ValueError, match=what):
        read()
    with pytest.warns(UserWarning, match=what):
        dataset = read_coco(tmp_path / "objects.json", on_error="skip")
    assert len(dataset) == left


def test_coco_repetitions_are_reported(tmp_path):
    def repeat(content):
        content["images"].append(dict(content["images"][0]))  # the same entry again
        content["images"].append(dict(content["images"][1], id=7, file_name=".\\b.png"))
        new = dict(content["annotations"][0], image_id=7)  # the id of another annotation
        content["annotations"].append(new)
        content["categories"].append({"id": 5, "name": "dog"})

    dataset, faults = problems(read_changed(tmp_path, repeat))
    assert sorted(faults) == [
        "annotation id used twice",
        "image listed twice",
        "repeated category name",
        "repeated image entry",
    ]
    assert dataset.class_names == ["dog", "cat"]  # ids 5, 17 and 90
    assert [len(record.boxes) for record in dataset.records] == [2, 1, 1]


@pytest.mark.parametrize("box", [None, [1, 2, 3], "1 2 3 4", [1, 2, "x", 4], {"x": 1}])
def test_coco_malformed_boxes(tmp_path, box):
    dataset, faults = problems(
        read_changed(tmp_path, lambda c: c["annotations"][0].update(bbox=box))
    )
    assert faults == ["invalid coordinates"] and dataset.report.num_boxes == 2


def test_coco_wrong_size_is_reported(tmp_path):
    _, faults = problems(read_changed(tmp_path, lambda c: c["images"][0].update(width=61)))
    assert faults == ["wrong size"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "unreadable JSON"),
        ("[1, 2]", "not a COCO file.*found list"),
        ('{"images": [], "annotations": []}', r"not a COCO file.*'categories'"),
        ('{"images": [3], "annotations": [], "categories": []}', "not a COCO file"),
        ("[" * 100_000, "unreadable JSON"),
    ],
)
def test_files_that_are_not_coco(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path / "x.json")
    with pytest.raises(ValueError, match="no such file"):
        read_coco(tmp_path / "y.json")


def test_relative_boxes_where_pixels_are_wanted(tmp_path):
    truth = {"a.png": [("dog", 0.1, 0.2, 0.5, 0.9)]}
    with pytest.raises(ValueError, match=r"must be in pixels.*\[0.1, 0.2, 0.5, 0.9\]"):
        read_csv(write_csv(tmp_path, truth))
    with pytest.raises(ValueError, match="must be in pixels"):
        read_coco(write_coco(tmp_path / "coco", truth))


# === YOLO ===


@pytest.mark.parametrize(
    ("images", "labels", "split"),
    [
        ("images/train", "labels/train", "train"),
        ("train/images", "train/labels", "train"),
        ("images/train", "labels/train", None),
        ("images", "labels", None),
        ("valid/images", "valid/labels", "val"),
        (".", ".", None),
    ],
)
def test_yolo_layouts(tmp_path, images, labels, split):
    save_images(tmp_path / images)
    (tmp_path / labels).mkdir(parents=True, exist_ok=True)
    for name, objects in TRUTH.items():
        (tmp_path / labels / name).with_suffix(".txt").write_text(yolo_lines(objects))
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    dataset = read_yolo(tmp_path, split)
    assert [len(record.boxes) for record in dataset.records] == [2, 0, 1]
    if split:
        with pytest.raises(ValueError, match=r"'nothing'; available: (train|valid)"):
            read_yolo(tmp_path, "nothing")


@pytest.mark.parametrize(
    "names",
    [
        "names: [cat, dog]",
        "names: ['cat', \"dog\"]  # two",
        "names:\n- cat\n- dog",
        "names:\n  0: cat\n  1: dog",
        "nc: 2\r\nnames:\r\n  1: dog\r\n  0: cat\r\n",
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_yolo_names(tmp_path, names, mark):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(mark + names, encoding="utf-8", newline="")
    assert read_yolo(tmp_path / "data.yaml").class_names == ["cat", "dog"]


def test_yolo_yaml_says_where_the_images_are(tmp_path):
    write_yolo(tmp_path, images="photos/images/x", labels="photos/labels/x")
    save_images(tmp_path / "more/images", ["d.png"])
    (tmp_path / "more/listed.txt").write_text("./images/d.png\r\n\r\n")
    text = "path: ../nowhere\nnames: [cat, dog]\n"
    text += "train: [photos/images/x, more/listed.txt]\nval: ../more/images\n"
    (tmp_path / "data.yaml").write_text(text)
    (tmp_path / "more/labels").mkdir()
    (tmp_path / "more/labels/d.txt").write_text("1 0.5 0.5 1 1")
    assert [r.image_id for r in read_yolo(tmp_path, "train").records] == [
        "photos/images/x/a.png",
        "photos/images/x/b.png",
        "photos/images/x/c.png",
        "more/images/d.png",
    ]
    assert len(read_yolo(tmp_path, "valid")) == 1 and len(read_yolo(tmp_path)) == 4
    with pytest.raises(ValueError, match="available: train, val"):
        read_yolo(tmp_path, "test")


def test_yolo_polygons_and_line_ends(tmp_path):
    write_yolo(tmp_path)
    polygon = "1 0.5 0.25 0.75 0.5 0.25 0.75 0.4 0.3"
    text = f"\ufeff0 0.5\t0.5 1 1\r\n\r\n{polygon}\r\n"
    (tmp_path / "labels/train/a.txt").write_text(text, encoding="utf-8", newline="")
    boxes = found(read_yolo(tmp_path))[0]
    assert boxes == [("cat", 0, 0, 60, 40), ("dog", 15, 10, 45, 30)]


def test_yolo_without_class_names(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no class names.*give `class_names`"):
        read_yolo(tmp_path)
    assert found(read_yolo(tmp_path, class_names=["x", "y"]))[0][0][0] == "y"
    (tmp_path / "labels/train/classes.txt").write_text("")
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\n", newline="")
    dataset = read_yolo(tmp_path, class_names=["dog", "cat"])  # now matched by name
    assert dataset.records[0].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("2 0.5 0.5 1 1", "class without a name"),
        ("-1 0.5 0.5 1 1", "unreadable line"),
        ("1.5 0.5 0.5 1 1", "unreadable line"),
        ("dog 0.5 0.5 1 1", "unreadable line"),
        ("1 0.5 0.5 1", "unreadable line"),
        ("1 0.5 0.5 1 1 0.9 1", "unreadable line"),  # a triangle, or confidence and track id
        ("1 30 20 10 8", "coordinates above 1"),
    ],
)
def test_yolo_faulty_lines(tmp_path, line, what):
    write_yolo(tmp_path)
    file = tmp_path / "labels/train/c.txt"
    file.write_text("1 0.5 0.5 0.2 0.2\n" + line)
    with pytest.raises(ValueError, match=rf"c\.txt: {what}.*(line 2)"):
        read_yolo(tmp_path)
    dataset, faults = problems(lambda: read_yolo(tmp_path, on_error="skip"))
    assert faults == [what] and len(dataset) == 2


def test_yolo_faulty_folders(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_bytes(b"1 0.5 \xff\xfa 1 1")
    with pytest.raises(ValueError, match="unreadable text file"):
        read_yolo(tmp_path)
    for path in (tmp_path / "labels/train").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"None of the 3 images has a text file.*labels/train"):
        read_yolo(tmp_path)
    for text, message in [
        ("names: [cat, cat]", "class name used twice: cat"),
        ("names: 3", "unreadable class names"),
        ("names: {a: b}", "unreadable class names"),
        ("- cat", "unreadable YAML"),
        ("names: [", "unreadable YAML"),
        ("names: !!python/object/apply:os.getcwd []", "unreadable class names"),
    ]:
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yolo(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_yolo(tmp_path / "absent")


# === CSV ===


@pytest.mark.parametrize(
    "text",
    [
        "image,x1,y1,x2,y2,label\na.png,10,5,30,25,dog\nb.png,,,,,\n",
        "\ufeffimage,x1,y1,x2,y2,label\r\na.png,10,5,30,25,dog\r\nb.png,,,,,\r\n",
        "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        "a.png,60,40,dog,10,5,30,25\nb.png,60,40,,,,,\n",
        "label;y2;x2;y1;x1;note;image\ndog;25;30;5;10;x, y;a.png\n;;;;;;b.png",
        "a.png\t10\t5\t30\t25\tdog\nb.png\t\t\t\t\t",
        '"a.png", 10, 5, 30, 25, "dog"\n\n.\\b.png,,,,,\n',
        "Image,X1,Y1,X2,Y2,Label\r./a.png,1e1,5.0,30,25,dog\rb.png,,,,,",
    ],
)
def test_csv_forms(tmp_path, text):
    save_images(tmp_path)
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    dataset, faults = problems(lambda: read_csv(tmp_path / "x.csv"))
    assert faults == [] and found(dataset) == [[("dog", 10, 5, 30, 25)], []]
    assert [record.image_id for record in dataset.records] == ["a.png", "b.png"]


def test_csv_names_with_commas_and_line_breaks_and_difficult(tmp_path):
    save_images(tmp_path)
    text = 'image,x1,y1,x2,y2,label,difficult\na.png,1,2,3,4,"big, black\ndog",1\nb.png,1,2,3,4,x,0'
    (tmp_path / "x.csv").write_text(text)
    dataset = read_csv(tmp_path / "x.csv")
    assert dataset.class_names == ["big, black\ndog", "x"]
    assert [record.difficult.tolist() for record in dataset.records] == [[True], [False]]


def test_csv_paths(tmp_path):
    save_images(tmp_path / "images", ["a.png", "sub/b.png", "c.png"])
    rows = ["C:\\data\\a.png,1,2,3,4,dog", "sub\\b.png,1,2,3,4,dog", "/home/me/c.png,5,6,7,8,dog"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    dataset = read_csv(tmp_path / "x.csv", tmp_path / "images")
    assert [record.image[-5:] for record in dataset.records] == ["a.png", "b.png", "c.png"]
    (tmp_path / "y.csv").write_text(rows[1])
    assert len(read_csv(tmp_path / "y.csv")) == 1  # "images" beside the file is found


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("c.png,1,2,3,4", "unreadable row.*line 2 has 5 columns"),
        ("c.png,1,2,3,4,dog,dog", "unreadable row.*7 columns"),
        ("c.png,1,2,3,4,", "unreadable row.*without a label"),
    ],
)
def test_csv_faulty_rows(tmp_path, row, what):
    save_images(tmp_path)
    (tmp_path / "x.csv").write_text(f"a.png,10,5,30,25,dog\n{row}\n")
    with pytest.raises(ValueError, match=what):
        read_csv(tmp_path / "x.csv")
    dataset, faults = problems(lambda: read_csv(tmp_path / "x.csv", on_error="skip"))
    assert faults == ["unreadable row"] and len(dataset) == 1


@pytest.mark.parametrize("cells", ["1,,3,4", "1,two,3,4"])
def test_csv_incomplete_boxes(tmp_path, cells):
    save_images(tmp_path)
    (tmp_path / "x.csv").write_text(f"a.png,10,5,30,25,dog\na.png,{cells},dog\n")
    dataset, faults = problems(lambda: read_csv(tmp_path / "x.csv"))
    assert faults == ["invalid coordinates"] and dataset.report.num_boxes == 1


def test_csv_faulty_files(tmp_path):
    save_images(tmp_path)
    for text, message in [
        ("", "no rows"),
        ("image,x1,y1,x2,y2,label\n", "no rows"),
        ("a.png,,,,,\n", "No objects.*give `class_names`"),
        ("image,x1,y1,x2,label\na.png,1,2,3,dog", "unknown columns.*For 'y2'"),
        ("a.png,dog,1,2,3,4", "unknown columns"),
    ]:
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_csv(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="no such file"):
        read_csv(tmp_path / "y.csv")
    with pytest.raises(ValueError, match="`image_folder` must be a folder"):
        read_csv(tmp_path / "x.csv", tmp_path / "absent")


# === Format detection ===


def write_voc(folder):
    save_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, objects in TRUTH.items():
        rows = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, x1, y1, x2, y2 in objects
        )
        path = (folder / "Annotations" / name).with_suffix(".xml")
        path.write_text(f"<annotation>{rows}</annotation>")
    return folder


def write_coco_tree(folder):
    save_images(folder / "train2017")
    (folder / "annotations").mkdir()
    for name in ("instances_train2017", "captions_train2017", "instances_val2017"):
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(coco()))
    return folder


def write_exported(folder):
    save_images(folder / "train")
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(coco()))
    return folder


TREES = {
    "VOC": (write_voc, None),
    "COCO file": (write_coco, None),
    "COCO folder": (write_coco_tree, "train"),
    "COCO year": (write_coco_tree, "train2017"),
    "COCO export": (write_exported, "train"),
    "YOLO": (write_yolo, "train"),
    "YOLO yaml": (lambda folder: write_yolo(folder) / "data.yaml", None),
    "CSV file": (write_csv, None),
    "CSV folder": (lambda folder: write_csv(folder).parent, "train"),
    "CSV only file": (lambda folder: write_csv(folder).parent, None),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("as_text", [True, False])
def test_formats_are_recognized(tmp_path, name, as_text):
    write, split = TREES[name]
    source = write(tmp_path)
    dataset = read_detection(str(source) if as_text else source, split)
    assert dataset.class_names == NAMES
    for objects, wanted in zip(found(dataset), TRUTH.values(), strict=True):
        assert [o[0] for o in objects] == [w[0] for w in wanted]
        for box, right in zip(objects, wanted, strict=True):
            np.testing.assert_allclose(box[1:], right[1:], atol=1e-3)


def test_tfds_names_are_recognized(tmp_path):
    with pytest.raises(ValueError, match="TFDS has no dataset 'no_such_set'"):
        read_detection("tfds:no_such_set", "train")
    with pytest.raises(ValueError, match="TFDS needs a `split`"):
        read_detection("tfds:voc/2007")


def test_options_reach_the_reader(tmp_path):
    options = {"class_names": ["dog", "cow"], "on_error": "skip", "use_difficult": False}
    for name in ("YOLO", "CSV file", "VOC", "COCO file"):
        source = TREES[name][0](tmp_path / name.replace(" ", ""))
        with pytest.warns(UserWarning, match="unknown class 'cat'"):
            dataset = read_detection(source, **options)
        assert dataset.class_names == ["dog", "cow"] and len(dataset) == 1
    moved = (tmp_path / "COCOfile/images").rename(tmp_path / "elsewhere")
    assert len(read_detection(tmp_path / "COCOfile/objects.json", image_folder=moved)) == 3
    with pytest.raises(ValueError, match="`image_folder` is for COCO and CSV"):
        read_detection(tmp_path / "VOC", image_folder=moved)


def test_formats_that_are_not_recognized(tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "notes.md").write_text("x")
    for source in ("void", "notes.md", "absent"):
        with pytest.raises(ValueError, match=r"Expected:(.|\n)*VOC:(.|\n)*CSV:(.|\n)*tfds:"):
            read_detection(tmp_path / source)
    write_voc(tmp_path / "both")
    write_csv(tmp_path / "both")
    with pytest.raises(ValueError, match=r"looks like VOC and CSV.*`read_voc` or `read_csv`"):
        read_detection(tmp_path / "both")
    assert len(read_voc(tmp_path / "both")) == 3
    write_coco_tree(tmp_path / "coco")
    with pytest.raises(ValueError, match=re.escape("(COCO): train2017, val2017. Received: split")):
        read_detection(tmp_path / "coco")


# === Splits ===


def image_ids(dataset):
    return [record.image_id for record in dataset.records]


def write_csv_splits(folder, **splits):
    """Each split is a list of (image, class name)."""
    save_images(folder, sorted({image for rows in splits.values() for image, _ in rows}))
    for name, rows in splits.items():
        text = "".join(f"{image},1,2,3,4,{label}\n" for image, label in rows)
        (folder / f"{name}.csv").write_text(text)
    return folder


A, B, C = ("a.png", "dog"), ("b.png", "cat"), ("c.png", "cat")


@pytest.mark.parametrize(
    ("splits", "test"),
    [
        (("train", "test", "val"), "test"),
        (("train", "val", "valid"), "val"),
        (("train", "validation", "other"), "validation"),
        (("train2017", "val2017", "unlabeled2017"), "val2017"),
        (("train", "train2017", "test-2"), "test-2"),
    ],
)
def test_default_splits_for_training_and_testing(tmp_path, splits, test):
    rows = {name: [("other.png", "dog")] for name in splits}
    write_csv_splits(tmp_path, **{**rows, splits[0]: [A, B], test: [C]})
    train_set, test_set = read_train_test(tmp_path)
    assert image_ids(train_set) == ["a.png", "b.png"] and image_ids(test_set) == ["c.png"]


@pytest.mark.filterwarnings("ignore:.*are also training images")
def test_test_set_has_the_class_names_of_the_training_set(tmp_path):
    write_csv_splits(tmp_path, train=[A, B], test=[A])
    train_set, test_set = read_train_test(str(tmp_path))
    assert train_set.class_names == test_set.class_names == ["cat", "dog"]
    assert test_set.records[0].labels.tolist() == [1]
    write_csv_splits(tmp_path, train=[A], test=[A, B])
    with pytest.raises(ValueError, match="unknown class 'cat'"):
        read_train_test(tmp_path)
    with pytest.warns(UserWarning, match="unknown class 'cat'"):
        _, test_set = read_train_test(tmp_path, on_error="skip")
    assert image_ids(test_set) == ["a.png"]


def test_named_splits_for_training_and_testing(tmp_path):
    write_csv_splits(tmp_path, train=[A, B], test=[A], mine=[C], yours=[B])
    pair = read_train_test(tmp_path, train_split="yours", test_split="mine")
    assert list(map(image_ids, pair)) == [["b.png"], ["c.png"]]
    assert image_ids(read_train_test(tmp_path, test_split="mine")[0]) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match=r"mine, test, train, yours\. Received: split='absent'"):
        read_train_test(tmp_path, train_split="absent")


def test_default_splits_that_do_not_exist_or_are_ambiguous(tmp_path):
    write_csv_splits(tmp_path, train=[A], mine=[A])
    with pytest.raises(ValueError, match="Received: split='test'"):
        read_train_test(tmp_path)
    write_csv_splits(tmp_path, val2014=[A], val2017=[A])
    with pytest.raises(ValueError, match="Received: split='val'"):
        read_train_test(tmp_path)


def test_yolo_splits_of_years_for_training_and_testing(tmp_path):
    for split in ("train2017", "val2017"):
        write_yolo(tmp_path, images=f"images/{split}", labels=f"labels/{split}")
    train_set, test_set = read_train_test(tmp_path)
    assert image_ids(train_set)[0] == "images/train2017/a.png"
    assert image_ids(test_set)[0] == "images/val2017/a.png"


@pytest.mark.parametrize("name", ["VOC", "COCO file", "CSV only file", "YOLO"])
def test_dataset_without_splits_is_split_at_random(tmp_path, name):
    source = TREES[name][0](tmp_path)
    whole = read_detection(source)
    train_set, test_set = read_train_test(source, holdout=0.4, seed=1)
    assert len(train_set) == 2 and len(test_set) == 1
    assert sorted(image_ids(train_set) + image_ids(test_set)) == image_ids(whole)
    assert train_set.class_names == test_set.class_names == NAMES
    assert image_ids(read_train_test(source, holdout=0.4, seed=1)[1]) == image_ids(test_set)
    tests = [image_ids(read_train_test(source, holdout=0.4, seed=i)[1])[0] for i in range(2, 9)]
    assert len(set(tests)) > 1


@pytest.mark.parametrize("holdout", [0, 1, -0.2, 1.5, float("nan")])
def test_wrong_fraction_to_hold_out(tmp_path, holdout):
    with pytest.raises(ValueError, match=f"`holdout` must be.*holdout={holdout}"):
        read_train_test(write_voc(tmp_path), holdout=holdout)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("VOC", ["some"]),
        ("CSV file", []),
        ("COCO file", []),
        ("CSV folder", ["train"]),
    ],
)
def test_find_splits(tmp_path, name, wanted):
    source = TREES[name][0](tmp_path)
    if name == "VOC":
        (source / "ImageSets/Main").mkdir(parents=True)
        (source / "ImageSets/Main/some.txt").write_text("x")
    assert find_splits(source) == wanted
    if not wanted:
        with pytest.raises(ValueError, match="has no splits"):
            read_detection(source, "train")


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 5), (0.5, 12), (0.04, 1)])
def test_a_part_is_held_out(fraction, count):
    records = [
        ImageRecord(np.zeros((4, 4, 3), "uint8"), str(i), boxes=[[0, 0, 2, 2]], labels=[i % 2])
        for i in range(25)
    ]
    dataset = DetectionDataset(records, ["a", "b"])
    rest, held = dataset.hold_out(fraction, seed=3)
    names = [[record.image_id for record in part.records] for part in (rest, held)]
    assert len(held) == count and rest.class_names == held.class_names == ["a", "b"]
    assert sorted(names[0] + names[1], key=int) == [str(i) for i in range(25)]
    again = dataset.hold_out(fraction, seed=3)[1]
    assert [record.image_id for record in again.records] == names[1]
    others = [dataset.hold_out(fraction, seed=i)[1].records[0].image_id for i in range(4, 12)]
    assert len({names[1][0], *others}) > 1


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 0.01])
def test_a_part_that_cannot_be_held_out(fraction):
    record = ImageRecord(np.zeros((4, 4, 3), "uint8"), "x", boxes=[], labels=[])
    with pytest.raises(ValueError, match=r"`fraction` must be|Too few images"):
        DetectionDataset([record] * 3, ["a"]).hold_out(fraction)
