"""`read_voc`, `read_tfds` and `DetectionDataset`."""

import contextlib
import io
import re
import time
import xml.sax.saxutils

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from keras_resnest.data import DetectionDataset, ImageRecord, load_image, read_tfds, read_voc

# === Writing VOC folders ===


def write_xml(path, objects, size=(60, 40), filename="", head=""):
    """objects: (name, xmin, ymin, xmax, ymax) or (..., difficult)."""
    lines = [head, "<annotation>", f"<filename>{filename}</filename>"]
    if size:
        lines.append(f"<size><width>{size[0]}</width><height>{size[1]}</height></size>")
    for name, *numbers in objects:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), numbers[:4], strict=True)
        lines += [f"<object><name>{xml.sax.saxutils.escape(name)}</name>", "<pose>Left</pose>"]
        lines += [f"<difficult>{n}</difficult>" for n in numbers[4:]]
        box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
        # VOC also has boxes of body parts, which are not objects
        part = "<part><name>hand</name><bndbox><xmin>1</xmin></bndbox></part>"
        lines.append(f"{part}<bndbox>{box}</bndbox></object>")
    path.write_text("\n".join([*lines, "</annotation>"]), encoding="utf-8")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype="uint8")


def make_voc(folder, annotations, size=(60, 40), splits=None):
    """annotations: {stem: objects}; images are PNGs of noise."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i, (stem, objects) in enumerate(annotations.items()):
        Image.fromarray(noise(size[1], size[0], 3, seed=i)).save(folder / f"JPEGImages/{stem}.png")
        write_xml(folder / f"Annotations/{stem}.xml", objects, size)
    for split, text in (splits or {}).items():
        (folder / f"ImageSets/Main/{split}.txt").write_text(text)
    return folder


def only_boxes(folder, **options):
    """Boxes of the first image, and the kinds of problems."""
    with pytest.warns(UserWarning) if options.pop("warns", True) else contextlib.nullcontext():
        dataset = read_voc(folder, **options)
    return dataset.records[0].boxes.tolist(), list(dataset.report.problem_counts)


# === Blood cells (BCCD) ===

CELLS = {  # split: (images, usable boxes), from the README of the dataset
    "train": (205, {"RBC": 2381, "WBC": 214, "Platelets": 209}),
    "val": (87, {"RBC": 967, "WBC": 87, "Platelets": 83}),
    "test": (72, {"RBC": 805, "WBC": 71, "Platelets": 69}),
    "trainval": (292, {"RBC": 3348, "WBC": 301, "Platelets": 292}),
    None: (364, {"RBC": 4153, "WBC": 372, "Platelets": 361}),
}


@pytest.mark.parametrize("split", CELLS)
@pytest.mark.filterwarnings("ignore:.*degenerate box")
def test_counts_of_the_blood_cells(shared, split):
    dataset = read_voc(shared / "data/bccd", split)
    num_images, counts = CELLS[split]
    assert dataset.class_names == ["Platelets", "RBC", "WBC"]
    assert len(dataset) == dataset.report.num_images == num_images
    assert dataset.report.class_counts == counts
    assert dataset.report.num_boxes == sum(counts.values())
    assert dataset.report.num_difficult == dataset.report.num_empty_images == 0


def test_degenerate_boxes_of_the_blood_cells_are_dropped_and_reported(shared):
    with pytest.warns(UserWarning, match="2 x degenerate box"):
        report = read_voc(shared / "data/bccd").report
    found = {problem.file: (problem.what, problem.action) for problem in report.problems}
    assert found == {
        "BloodImage_00343.xml": ("degenerate box", "dropped"),
        "BloodImage_00338.xml": ("degenerate box", "dropped"),
    }
    assert "RBC" in str(report) and "4153" in str(report) and "[181, 329, 181, 329]" in str(report)


def test_boxes_and_pixels_of_the_blood_cells(shared):
    folder = shared / "data/bccd"
    dataset = read_voc(folder, "test", class_names=["WBC", "RBC", "Platelets"])
    ids = (folder / "ImageSets/Main/test.txt").read_text().split()
    elements = list(dataset.as_dataset())
    assert [e["image_id"].numpy().decode() for e in elements] == ids
    for i, element in enumerate(elements):
        text = (folder / f"Annotations/{ids[i]}.xml").read_text()
        numbers = re.findall(r"<(?:xmin|ymin|xmax|ymax)>(\d+)<", text)  # always in this order
        expected = np.array(numbers, "float32").reshape(-1, 4) - [1, 1, 0, 0]
        names = re.findall(r"<name>(\w+)</name>", text)
        boxes = element["bounding_boxes"]
        np.testing.assert_array_equal(boxes["boxes"], expected)
        assert [dataset.class_names[label] for label in boxes["labels"].numpy()] == names
        assert not boxes["difficult"].numpy().any()
        if i % 10 == 0:
            path = folder / f"JPEGImages/{ids[i]}.jpg"
            np.testing.assert_array_equal(element["images"], load_image(path))


def test_element_spec_is_the_contract(tmp_path):
    Image.fromarray(noise(40, 60, 3)).save(tmp_path / "a.jpg")
    write_xml(tmp_path / "a.xml", [("cat", 11, 12, 31, 22)])
    spec = read_voc(tmp_path).as_dataset().element_spec
    found = {
        key: (spec[key].shape.as_list(), spec[key].dtype.name) for key in ("images", "image_id")
    }
    assert found == {"images": ([None, None, 3], "uint8"), "image_id": ([], "string")}
    boxes = {k: (v.shape.as_list(), v.dtype.name) for k, v in spec["bounding_boxes"].items()}
    assert boxes == {
        "boxes": ([None, 4], "float32"),
        "labels": ([None], "int32"),
        "difficult": ([None], "bool"),
    }


# === Layouts and splits ===


def test_plain_folder_and_images_without_objects(tmp_path):
    Image.fromarray(noise(40, 60, 3)).save(tmp_path / "b.jpg")
    Image.fromarray(noise(40, 60, 3)).save(tmp_path / "a.PNG")
    write_xml(tmp_path / "a.xml", [])
    write_xml(tmp_path / "b.xml", [("cat", 11, 12, 31, 22, 1), ("dog", 1, 1, 60, 40)])
    dataset = read_voc(tmp_path)
    assert dataset.class_names == ["cat", "dog"] and dataset.report.num_empty_images == 1
    empty, full = list(dataset.as_dataset())
    assert empty["bounding_boxes"]["boxes"].shape == (0, 4)
    assert full["bounding_boxes"]["boxes"].numpy().tolist() == [[10, 11, 31, 22], [0, 0, 60, 40]]
    assert full["bounding_boxes"]["difficult"].numpy().tolist() == [True, False]
    easy = read_voc(tmp_path, use_difficult=False)
    assert [r.labels.tolist() for r in easy.records] == [[], [1]]
    assert easy.report.num_boxes == 1 and easy.report.num_difficult == 0


def test_splits_with_flags_and_class_names_of_the_whole_dataset(tmp_path):
    annotations = {
        "1": [("dog", 1, 1, 9, 9)],
        "2": [("cat", 1, 1, 9, 9)],
        "3 4": [("cow", 1, 1, 9, 9)],
    }
    splits = {
        "train": "1\n3 4\n\n",
        "dog_train": "1  1\n2 -1\n3 4  0\n",
        "suffix": "1.png\n2.xml\n",
        "twice": "1\n1\n",
        "none": "\n",
    }
    make_voc(tmp_path, annotations, splits=splits)

    def ids(split):
        return [record.image_id for record in read_voc(tmp_path, split).records]

    assert ids("train") == ["1", "3 4"] and ids("dog_train") == ["1", "3 4"]
    assert ids("suffix") == ["1", "2"]
    with pytest.warns(UserWarning, match="repeated line"):
        assert ids("twice") == ["1"]
    assert read_voc(tmp_path, "train").class_names == ["cat", "cow", "dog"]
    with pytest.raises(ValueError, match=r"'valid'.*dog_train, none, suffix, train"):
        read_voc(tmp_path, "valid")
    with pytest.raises(ValueError, match="empty"):
        read_voc(tmp_path, "none")


def test_wrong_folders(tmp_path):
    make_voc(tmp_path / "kit/VOC2007", {"1": [("dog", 1, 1, 9, 9)]})
    with pytest.raises(ValueError, match=r"Did you mean .*VOC2007"):
        read_voc(tmp_path / "kit")
    with pytest.raises(ValueError, match="no such folder"):
        read_voc(tmp_path / "absent")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="No images"):
        read_voc(tmp_path / "void")
    with pytest.raises(ValueError, match=r"No XML files in .*JPEGImages, only images"):
        read_voc(tmp_path / "kit/VOC2007/JPEGImages")
    with pytest.raises(ValueError, match=r"no \.txt"):
        read_voc(tmp_path / "kit/VOC2007", "train")
    with pytest.raises(ValueError, match="on_error"):
        read_voc(tmp_path / "kit/VOC2007", on_error="ignore")
    with pytest.raises(ValueError, match="class_names"):
        read_voc(tmp_path / "kit/VOC2007", class_names=["dog", "dog"])


# === Coordinates ===


@pytest.mark.parametrize(
    ("written", "expected", "problems"),
    [
        ((11, 12, 31, 22), [10, 11, 31, 22], []),
        ((1, 1, 60, 40), [0, 0, 60, 40], []),
        ((11.5, 12.25, 31.5, "2.2e1"), [10.5, 11.25, 31.5, 22], []),
        ((11, 12, 61, 45), [10, 11, 60, 40], ["box across the border"]),
        ((-9, 12, 31, 22), [0, 11, 31, 22], ["box across the border"]),
        ((0, 12, 31, 22), [0, 11, 31, 22], ["coordinate 0 in 1-based coordinates"]),
        ((61, 12, 80, 22), None, ["box outside the image"]),
        ((-9, 12, 0, 22), None, ["box outside the image"]),
        ((11, 12, 11, 22), None, ["degenerate box"]),
        ((31, 12, 11, 22), None, ["degenerate box"]),
        ((11, 22, 31, 22), None, ["degenerate box"]),
        (("nan", 12, 31, 22), None, ["invalid coordinates"]),
        ((11, "inf", 31, 22), None, ["invalid coordinates"]),
        ((11, "twelve", 31, 22), None, ["invalid coordinates"]),
        ((11, "", 31, 22), None, ["invalid coordinates"]),
        ((11, 12, 31, 1e300), None, ["invalid coordinates"]),
    ],
)
def test_coordinates(tmp_path, written, expected, problems):
    make_voc(tmp_path, {"1": [("dog", *written), ("dog", 5, 5, 9, 9)]})
    boxes, found = only_boxes(tmp_path, warns=bool(problems))
    assert found == problems
    assert boxes == [expected, [4, 4, 9, 9]][expected is None :]


def test_zero_based_coordinates(tmp_path):
    make_voc(tmp_path, {"1": [("dog", 0, 0, 60, 40)]})
    boxes, _ = only_boxes(tmp_path, warns=False, one_based_coordinates=False)
    assert boxes == [[0, 0, 60, 40]]


def test_size_in_xml(tmp_path):
    make_voc(tmp_path, {"1": [("dog", 1, 1, 9, 9)]})
    xml_file = tmp_path / "Annotations/1.xml"
    for size in (None, (0, 0)):  # unknown
        write_xml(xml_file, [("dog", 1, 1, 9, 9)], size)
        assert only_boxes(tmp_path, warns=False) == ([[0, 0, 9, 9]], [])
    write_xml(xml_file, [("dog", 21, 11, 40, 30)], (120, 80))  # drawn before the image was halved
    assert only_boxes(tmp_path) == ([[10, 5, 20, 15]], ["wrong size"])
    write_xml(xml_file, [("dog", 1, 1, 9, 9)], (61, 40))  # rounding
    assert only_boxes(tmp_path) == ([[0, 0, 9, 9]], ["wrong size"])
    write_xml(xml_file, [("dog", 1, 1, 9, 9)], (120, 60))
    with pytest.raises(ValueError, match=r"1\.xml: wrong size: 120 x 60, the image has 60 x 40"):
        read_voc(tmp_path)


# === Faults raise, or skip an image ===


def break_image(folder):
    path = folder / "JPEGImages/2.png"
    path.write_bytes(path.read_bytes()[:900])
    return "2.png", "unreadable image"


def remove_image(folder):
    (folder / "JPEGImages/2.png").unlink()
    return "2.xml", "missing image"


def remove_xml(folder):
    (folder / "Annotations/2.xml").unlink()
    return "2.png", "missing XML file"


def break_xml(folder):
    (folder / "Annotations/2.xml").write_text("<annotation><object>")
    return "2.xml", "unreadable XML"


def other_xml(folder):
    (folder / "Annotations/2.xml").write_text("<html></html>")
    return "2.xml", "unreadable XML"


def nameless_object(folder):
    write_xml(folder / "Annotations/2.xml", [(" ", 1, 1, 9, 9)])
    return "2.xml", "unreadable XML"


def unknown_class(folder):
    write_xml(folder / "Annotations/2.xml", [("hores", 1, 1, 9, 9)])
    return "2.xml", "unknown class 'hores'"


def entity_bomb(folder):
    entities = '<!ENTITY a "aaaaaaaaaa">'
    for i in range(1, 12):
        entities += f'<!ENTITY {"a" * (i + 1)} "{("&" + "a" * i + ";") * 10}">'
    head = f"<!DOCTYPE annotation [{entities}]>"
    write_xml(folder / "Annotations/2.xml", [("dog", 1, 1, 9, 9)], filename="x", head=head)
    text = (folder / "Annotations/2.xml").read_text()
    (folder / "Annotations/2.xml").write_text(text.replace(">x<", f">&{'a' * 12};<"))
    return "2.xml", "unreadable XML"


def external_entity(folder):
    head = '<!DOCTYPE annotation [<!ENTITY file SYSTEM "file:///etc/hostname">]>'
    write_xml(folder / "Annotations/2.xml", [("dog", 1, 1, 9, 9)], head=head)
    return "2.xml", "unreadable XML"


FAULTS = [
    break_image,
    remove_image,
    remove_xml,
    break_xml,
    other_xml,
    nameless_object,
    unknown_class,
    entity_bomb,
    external_entity,
]


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_raise_or_skip(tmp_path, fault, split):
    annotations = {name: [("dog", 1, 1, 9, 9)] for name in "123"}
    make_voc(tmp_path, annotations, splits={"train": "1\n2\n3\n"})
    file, what = fault(tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(file)}: {re.escape(what)}"):
        read_voc(tmp_path, split, class_names=["dog", "horse"])
    with pytest.warns(UserWarning, match=re.escape(what)):
        dataset = read_voc(tmp_path, split, class_names=["dog", "horse"], on_error="skip")
    assert [record.image_id for record in dataset.records] == ["1", "3"]
    assert [(p.file, p.what) for p in dataset.report.problems] == [(file, what)]
    assert len(list(dataset.as_dataset())) == 2


def test_nearest_class_names_are_suggested(tmp_path):
    make_voc(tmp_path, {"1": [("Hores", 1, 1, 9, 9)]})
    with pytest.raises(ValueError, match=r"Nearest: 'horse'"):
        read_voc(tmp_path, class_names=["dog", "horse"])
    with pytest.raises(ValueError, match=r"Nearest: 'hores'"):
        read_voc(tmp_path, class_names=["dog", "hores"])
    with pytest.raises(ValueError, match=r"Known: 'aeroplane'"):
        read_voc(tmp_path, class_names=["aeroplane"])


def test_no_usable_image(tmp_path):
    make_voc(tmp_path, {"1": [("cat", 1, 1, 9, 9)], "2": []})
    (tmp_path / "Annotations/2.xml").unlink()
    with pytest.raises(ValueError, match=r"No usable image.*unknown class 'cat'"):
        read_voc(tmp_path, class_names=["dog"], on_error="skip")
    (tmp_path / "JPEGImages/2.png").unlink()
    write_xml(tmp_path / "Annotations/1.xml", [])
    with pytest.raises(ValueError, match="give `class_names`"):
        read_voc(tmp_path)


def test_encodings_and_named_images(tmp_path):
    make_voc(tmp_path, {"1": [], "2": []})
    write_xml(tmp_path / "Annotations/1.xml", [("Käfer & Co", 1, 1, 9, 9)], filename="2.png")
    text = (tmp_path / "Annotations/1.xml").read_text(encoding="utf-8").strip()
    (tmp_path / "Annotations/1.xml").write_text(
        f'<?xml version="1.0" encoding="UTF-16"?>{text}', encoding="utf-16"
    )
    (tmp_path / "JPEGImages/1.png").rename(tmp_path / "JPEGImages/other.png")
    (tmp_path / "JPEGImages/other.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png: image used twice"):  # as 1.xml names it too
        read_voc(tmp_path)
    (tmp_path / "Annotations/2.xml").unlink()
    dataset = read_voc(tmp_path)
    assert dataset.class_names == ["Käfer & Co"]
    assert [record.image.endswith("2.png") for record in dataset.records] == [True]


# === Annotations and pixels agree ===


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_boxes_follow_exif_orientation(tmp_path, drawn_on, kind):
    """A white rectangle on black, stored in all eight orientations."""
    upright = np.zeros((48, 64, 3), "uint8")
    upright[8:24, 16:56] = 255
    # The image as stored: the inverse of the transformation that EXIF asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    swapped = drawn_on == "stored"
    for orientation, pixels in stored.items():
        if swapped and orientation < 5:
            continue  # <size> is the same
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / f"{orientation}.{kind}", exif=exif, quality=95)
        frame = pixels if swapped else upright
        rows, columns = np.nonzero(frame[..., 0])
        box = columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1
        write_xml(tmp_path / f"{orientation}.xml", [("box", *box)], frame.shape[1::-1])
    with pytest.warns(UserWarning, match="EXIF"):
        dataset = read_voc(tmp_path)
    for element in dataset.as_dataset():
        np.testing.assert_allclose(element["images"], upright, atol=20)
        assert element["bounding_boxes"]["boxes"].numpy().tolist() == [[16, 8, 56, 24]]


def test_odd_files_have_the_right_pixels(tmp_path, odd_images):
    names = ("grayscale.jpg", "cmyk.jpg", "rgba.png", "exif_orientation6.jpg", "one_pixel.png")
    for name in names:
        (tmp_path / name).write_bytes((odd_images / name).read_bytes())
        write_xml((tmp_path / name).with_suffix(".xml"), [("thing", 1, 1, 30, 30)], None)
    with pytest.warns(UserWarning, match=r"EXIF|border"):
        dataset = read_voc(tmp_path)
    elements = {e["image_id"].numpy().decode(): e for e in dataset.as_dataset()}
    for name in names:
        element = elements[name.split(".")[0]]
        np.testing.assert_array_equal(element["images"], load_image(tmp_path / name))
    # the box of 30 x 30 pixels is clipped to the only pixel
    assert elements["one_pixel"]["bounding_boxes"]["boxes"].numpy().tolist() == [[0, 0, 1, 1]]
    for name in ("truncated.jpg", "text_not_image.jpg"):
        broken = tmp_path / name
        broken.write_bytes((odd_images / name).read_bytes())
        write_xml(broken.with_suffix(".xml"), [], None)
        with pytest.raises(ValueError, match=name):
            read_voc(tmp_path)
        broken.unlink()
        broken.with_suffix(".xml").unlink()


# === DetectionDataset ===


def records(count=12):
    return [
        ImageRecord(
            image=noise(20 + i, 30, 3, seed=i),
            image_id=f"{i:02d}",
            boxes=[[i, 0, i + 9, 20]] * (i % 3),
            labels=[i % 2] * (i % 3),
        )
        for i in range(count)
    ]


def ids(dataset):
    return [element["image_id"].numpy().decode() for element in dataset]


def test_records_in_memory():
    dataset = DetectionDataset(records(), ["a", "b"])
    for record, element in zip(dataset.records, dataset.as_dataset(), strict=True):
        np.testing.assert_array_equal(element["images"], record.image)
        np.testing.assert_array_equal(element["bounding_boxes"]["boxes"], record.boxes)
    assert dataset.report.class_counts == {"a": 6, "b": 6} and len(dataset) == 12
    assert "12 images, 2 classes: a, b" in repr(dataset)


def test_records_of_files_look_up_their_size(tmp_path):
    pixels = noise(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    made = [
        ImageRecord(im, i, [], [])
        for i, im in {"path": tmp_path / "a.png", "bytes": encoded}.items()
    ]
    assert [(r.height, r.width) for r in made] == [(20, 30), (20, 30)]
    for element in DetectionDataset(made, "cat").as_dataset():
        np.testing.assert_array_equal(element["images"], pixels)


def test_shuffling():
    dataset = DetectionDataset(records(), ["a", "b"])
    shuffled = dataset.as_dataset(shuffle=True, seed=3)
    first, second = ids(shuffled), ids(shuffled)
    assert sorted(first) == sorted(second) == ids(dataset.as_dataset())
    assert first != second
    assert ids(dataset.as_dataset(shuffle=True, seed=3)) == first


def test_shards_share_the_images():
    dataset = DetectionDataset(records(), ["a", "b"])
    shards = [ids(dataset.as_dataset(num_shards=5, shard_index=i)) for i in range(5)]
    together = [image_id for shard in shards for image_id in shard]
    assert sorted(together) == ids(dataset.as_dataset()) and len(shards[4]) == 2
    with pytest.raises(ValueError, match="shard_index"):
        dataset.as_dataset(num_shards=5, shard_index=5)


def test_wrong_records(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        DetectionDataset([], ["a"])
    with pytest.raises(ValueError, match="Labels must be 0 to 0"):
        DetectionDataset(records(), ["a"])
    with pytest.raises(ValueError, match="as many labels"):
        ImageRecord(noise(20, 30), "x", [[1, 2, 3, 4]], [0, 1])
    with pytest.raises(ValueError, match=r"absent\.png"):
        ImageRecord(tmp_path / "absent.png", "x", [], [])
    for box in ([1, 2, 1, 4], [1, 2, 31, 4], [-1, 2, 3, 4], [1, 2, np.nan, 4], [5, 6, 3, 2]):
        wrong = ImageRecord(noise(20, 30), "wrong", [[1, 2, 3, 4], box], [0, 0])
        with pytest.raises(ValueError, match=r"have an area.*'wrong' of 30 x 20"):
            DetectionDataset([*records(), wrong], ["a", "b"])


def test_report_lists_a_few_of_many_problems(tmp_path):
    make_voc(tmp_path, {"1": [("dog", i, 5, i, 9) for i in range(1, 30)] + [("dog", 1, 1, 9, 9)]})
    with pytest.warns(UserWarning, match="29 x degenerate box"):
        report = read_voc(tmp_path).report
    assert "and 24 more" in str(report) and len(str(report).splitlines()) < 12
    assert str(report.problems[0]) == "1.xml: degenerate box dog [1, 5, 1, 9] - dropped"


# === TensorFlow Datasets ===


class ReaderSample(tfds.core.GeneratorBasedBuilder):
    """Images with good, degenerate and difficult boxes."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    SIZES = ((40, 60), (50, 30), (20, 20))

    def _info(self):
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "is_crowd": np.bool_,
        }
        features = {
            "image": tfds.features.Image(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        boxes = [
            [((0.0, 0.5, 1.0, 1.0), 0, False), ((0.1, 0.2, 0.3, 0.4), 1, True)],
            [((0.5, 0.5, 0.5, 0.9), 1, False)],
            [],
        ]
        for i, ((height, width), rows) in enumerate(zip(self.SIZES, boxes, strict=True)):
            stream = io.BytesIO()
            Image.fromarray(noise(height, width, 3, seed=i)).save(stream, "PNG")
            stream.seek(0)
            objects = [
                {"bbox": tfds.features.BBox(*box), "label": label, "is_crowd": crowd}
                for box, label, crowd in rows
            ]
            yield i, {"image": stream, "image/id": 100 + i, "objects": objects}


class ReaderSampleToDownload(ReaderSample):
    url_infos = {"https://no-such-host.invalid/images.zip": None}


class ReaderSampleWithoutBoxes(ReaderSample):
    def _info(self):
        features = {"image": tfds.features.Image(), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    builder = ReaderSample(data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return builder


def by_id(dataset):
    return {element["image_id"].numpy().decode(): element for element in dataset.as_dataset()}


def test_tfds_elements(sample):
    dataset = read_tfds(sample, "train")
    elements = by_id(dataset)
    assert sorted(elements) == ["100", "101", "102"] and len(dataset) == 3
    for i in range(3):
        np.testing.assert_array_equal(
            elements[f"{100 + i}"]["images"], noise(*ReaderSample.SIZES[i], 3, seed=i)
        )
    found = {key: value.numpy() for key, value in elements["100"]["bounding_boxes"].items()}
    np.testing.assert_allclose(found["boxes"], [[30, 0, 60, 40], [12, 4, 24, 12]], rtol=1e-6)
    assert found["labels"].tolist() == [0, 1] and found["difficult"].tolist() == [False, True]
    for empty in ("101", "102"):
        assert elements[empty]["bounding_boxes"]["boxes"].shape == (0, 4)
    spec = dataset.as_dataset().element_spec
    assert spec["images"].shape.as_list() == [None, None, 3]
    assert spec["bounding_boxes"]["labels"].dtype == "int32"


@pytest.mark.parametrize("use_difficult", [True, False])
def test_tfds_records_and_report_agree_with_the_elements(sample, use_difficult):
    dataset = read_tfds(sample, "train", use_difficult=use_difficult)
    elements = by_id(dataset)
    for record in dataset.records:
        boxes = elements[record.image_id]["bounding_boxes"]
        np.testing.assert_array_equal(record.boxes, boxes["boxes"])
        np.testing.assert_array_equal(record.labels, boxes["labels"])
        np.testing.assert_array_equal(record.difficult, boxes["difficult"])
        assert elements[record.image_id]["images"].shape == (record.height, record.width, 3)
    assert dataset.report.class_counts == {"cat": 1, "dog": int(use_difficult)}
    assert dataset.report.problem_counts == {"degenerate box": 1}
    assert "101" in str(dataset.report)


def test_tfds_class_names(sample):
    dataset = read_tfds(sample, "train", class_names=["horse", "dog", "cat"])
    assert by_id(dataset)["100"]["bounding_boxes"]["labels"].numpy().tolist() == [2, 1]
    assert dataset.report.class_counts == {"horse": 0, "dog": 1, "cat": 1}
    with pytest.raises(ValueError, match=r"'dog'.*Nearest: 'dogs'"):
        read_tfds(sample, "train", class_names=["cat", "dogs"])


def test_tfds_from_files_alone(sample):
    dataset = read_tfds(tfds.builder_from_directory(sample.data_dir), "train[:2]")
    assert len(dataset) == len(list(dataset.as_dataset(shuffle=True, seed=0))) == 2


def test_tfds_shards_and_shuffling(sample):
    dataset = read_tfds(sample, "train")
    shards = [ids(dataset.as_dataset(num_shards=2, shard_index=i)) for i in range(2)]
    assert sorted(shards[0] + shards[1]) == ["100", "101", "102"]
    runs = {tuple(ids(dataset.as_dataset(shuffle=True, seed=5))) for _ in range(3)}
    assert len(runs) == 1


def test_tfds_errors(sample, tmp_path):
    with pytest.raises(ValueError, match=r"one of train,.*'test'"):
        read_tfds(sample, "test")
    with pytest.raises(ValueError, match="empty"):
        read_tfds(sample, "train[:0]")
    with pytest.raises(ValueError, match="data_dir"):
        read_tfds(sample, "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no dataset 'shape/tiny'.*'shapes'"):
        read_tfds("shape/tiny", "train", data_dir=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"`objects`.*Received: FeaturesDict\(\{\s+'image': .*\s+'label': \S+\s+\}\)",
    ):
        read_tfds(ReaderSampleWithoutBoxes(data_dir=tmp_path), "train")
    with pytest.raises(ValueError, match="`download` is False"):
        read_tfds(ReaderSample(data_dir=tmp_path), "train", download=False)


def test_tfds_without_network_fails_at_once(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no-such-host\.invalid"):
        read_tfds(ReaderSampleToDownload(data_dir=tmp_path), "train")
    assert time.monotonic() - begin < 30  # TFDS alone: minutes
