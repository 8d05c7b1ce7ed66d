"""`keras-resnest train` and `evaluate` of a detector, on a small VOC folder."""

import contextlib
import csv
import io
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_detector
from PIL import Image

import keras_resnest
from keras_resnest.cli import main, parse_arguments
from keras_resnest.cli.common import reading_options
from keras_resnest.cli.train import print_data
from keras_resnest.cli.train_detector import weigh_classes
from keras_resnest.data import AnnotationReport, read_splits, read_train_test, read_voc
from keras_resnest.detection import AnchorGenerator, RefineDetLoss, fit_anchors

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


SPLITS = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}


@pytest.fixture(scope="module")
def voc_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    images, truth = rectangles(12, (64, 128, 3))
    for i, (image, boxes, labels) in enumerate(
        zip(images, truth["boxes"], truth["labels"], strict=True)
    ):
        Image.fromarray(image.astype("uint8")).save(folder / f"JPEGImages/{i}.jpg")
        objects = [
            OBJECT.format(CLASS_NAMES[k], int(x1) + 1, int(y1) + 1, int(x2), int(y2))
            for k, (x1, y1, x2, y2) in zip(labels, boxes, strict=True)
        ]
        xml = f"<annotation><filename>{i}.jpg</filename>{''.join(objects)}</annotation>"
        (folder / f"Annotations/{i}.xml").write_text(xml)
    for split, numbers in SPLITS.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(map(str, numbers)))
    return folder


# The graph of this recipe's optimizer is the smaller one; starting from a detector uses the other.
OPTIONS = ["--image-size", 64, 128, "--epochs", 1, "--batch-size", 4, "--recipe", "refinedet_voc"]


@pytest.fixture(scope="module")
def trained(voc_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", voc_folder, *OPTIONS, "--output", folder]) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


def assert_plots(folder, *names):
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 50, f"{name}.png is empty"


def test_trains_and_writes_everything(trained):
    assert_plots(trained, "dataset", "history", "precision_recall", "detections")
    assert list((trained / "progress").iterdir())
    assert (trained / "detector.keras").exists()
    assert (trained / "serving/1/saved_model.pb").exists()
    summary = json.loads((trained / "result.json").read_text())
    assert set(summary["AP50"]) == set(summary["AP"]) == set(CLASS_NAMES)
    assert all(0 <= summary[name] <= 1 for name in ("mAP", "mAP50"))
    assert summary["mAP75"] == summary["COCO"]["AP75"] and "APsmall" in summary["COCO"]
    assert summary["validation"]["epoch"] == 1
    with (trained / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["val_mAP"]) == pytest.approx(summary["validation"]["mAP"])
    printed = (trained / "printed.txt").read_text()
    assert "Trained 1 of 1 epochs; " in printed
    assert " loss: " in printed and "Epoch 1: val_mAP " in printed
    assert "val_mAP: " not in printed  # not again, with all the others, in the progress bar
    assert {"val_mAP50", "val_COCO/AP75", "val_AP/red", "val_AP50/red"} <= set(row)
    assert summary["arguments"]["epochs"] == 1 and summary["epochs_before_timing"] == 0


def test_the_anchors_fit_the_training_images(voc_folder, trained):
    """As those of refinedet_tiny do unless sizes are given."""
    fitted = fit_anchors(read_voc(voc_folder, "train"), (64, 128))
    model = keras.saving.load_model(trained / "detector.keras")
    assert model.anchor_generator.get_config() == fitted.get_config()
    assert fitted.sizes != AnchorGenerator().sizes


@pytest.mark.slow
def test_rerunning_the_command_resumes(voc_folder, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert main(["train", voc_folder, *OPTIONS, "--epochs", 2, "--output", tmp_path]) == 0
    printed = capsys.readouterr().out
    assert "after epoch 1" in printed and "8 images" in printed and "mAP@0.5" in printed
    assert json.loads((tmp_path / "result.json").read_text())["epochs_before_timing"] == 1
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1"]


def test_the_checkpoint_of_another_model_ends_the_training(voc_folder, trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "result.json").write_text("of the other model")
    options = [*OPTIONS, "--anchor-sizes", 16, 32, 64, 128, "--output", tmp_path]
    assert main(["train", voc_folder, *options]) == 1
    errors = capsys.readouterr().err
    assert "checkpoint of another model" in errors and "anchor_generator" in errors
    assert (tmp_path / "result.json").read_text() == "of the other model"


def test_the_checkpoint_of_other_data_and_settings(voc_folder, trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    (voc_folder / "ImageSets/Main/fewer.txt").write_text("0\n1\n2\n3\n4\n5\n")
    (voc_folder / "ImageSets/Main/one.txt").write_text("8\n")
    data = ["--train-split", "fewer", "--test-split", "train", "--validation-split", "one"]
    data += ["--batch-size", 2, "--seed", 2]
    recipe = ["--learning-rate", 0.1, "--recipe", "detector_from_scratch", "--mosaic", 0.5]
    options = [*OPTIONS, *data, *recipe, "--epochs", 2, "--output", tmp_path]
    assert main(["train", voc_folder, *options]) == 1
    errors = capsys.readouterr().err
    for words in (
        "images: 8, here 6",
        "test images: 2, here 8",
        "validation images: 2, here 1",
        'names of images: "checksum ',
        "steps_per_epoch: 2, here 3",
        "batch_size: 4, here 2",
        "seed: 1, here 2",
        'recipe: "refinedet_voc", here "detector_from_scratch"',
        "learning_rate: ",
        "mosaic: 0.0, here 0.5",
    ):
        assert words in errors, words
    assert "epochs" not in errors and "output" not in errors


def test_start_from_a_detector(voc_folder, tmp_path, capsys):
    """Its size and anchors, and the classes that it knows; the frozen stages do not change."""
    folder = shutil.copytree(voc_folder, tmp_path / "voc")
    for path in folder.glob("Annotations/*.xml"):
        path.write_text(path.read_text().replace(f"<name>{CLASS_NAMES[0]}<", "<name>zebra<"))
    source = tmp_path / "source.keras"
    small_detector((64, 128, 3)).save(source)
    options = ["--start-from", source, "--freeze-stages", 2, "--backbone-learning-rate-factor", 0.5]
    options += ["--ema-momentum", 0.5, "--time-limit", 60, "--patience", 3, "--tensorboard"]
    options += ["--epochs", 1, "--batch-size", 4, "--output", tmp_path / "out"]
    assert main(["train", folder, *options]) == 0
    printed = capsys.readouterr().out
    assert "zebra new" in printed and f"{CLASS_NAMES[1]} from {CLASS_NAMES[1]}" in printed
    assert "Frozen: all but " in printed and list((tmp_path / "out/tensorboard").iterdir())
    old, new = map(keras.saving.load_model, (source, tmp_path / "out/detector.keras"))
    assert new.image_shape == old.image_shape == (64, 128, 3)
    assert new.anchor_generator.get_config() == old.anchor_generator.get_config()
    assert new.class_names == sorted(["zebra", *CLASS_NAMES[1:]])
    same = [
        np.array_equal(a, b)
        for a, b in zip(old.backbone.get_weights(), new.backbone.get_weights(), strict=True)
    ]
    count = len([w for w in new.backbone.weights if not w.trainable and "moving" not in w.path])
    assert all(same[: same.index(False)]) and same.index(False) > count > 10


def test_start_from_something_else(voc_folder, tmp_path, capsys):
    classifier = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    classifier.save(tmp_path / "classifier.keras")
    two = keras_resnest.detection.AnchorGenerator(sizes=[(16, 32)] * 4)
    for name, options in {
        "unnamed": {"class_names": None},
        "anchors": {"anchor_generator": two},
    }.items():
        small_detector((64, 64, 3), **options).save(tmp_path / f"{name}.keras")
    for start, words in (
        (["absent.keras"], "no such model: absent.keras"),
        (["classifier.keras"], "It holds a Sequential, not a RefineDet"),
        (["unnamed.keras"], "unnamed.keras: `replace_classes` needs a model with `class_names`"),
        (["anchors.keras", "--anchor-sizes", 8, 16, 32, 64], "anchors per cell of each level"),
        (["absent.caffemodel"], "needs --model, the network of these weights"),
        (["absent.caffemodel", "--model", "refinedet320_vgg16"], "absent.caffemodel"),
        (["coco", "--model", "refinedet_tiny"], "`weights` of refinedet_tiny must be None"),
        (["a.keras", "--model", "refinedet_tiny"], "has its own network"),
        (["a.keras", "--backbone-weights", "imagenet"], "--backbone-weights: not with"),
        (["anchors.keras", "--freeze-stages", 5], "`num_stages` must be None or one of 1, 2, 3, 4"),
        (["a.keras", "--unfreeze-after", 5], "--unfreeze-after: only with --freeze-stages"),
    ):
        path = tmp_path / start[0] if (tmp_path / start[0]).exists() else start[0]
        command = ["train", voc_folder, "--start-from", path, *start[1:]]
        assert main([*command, "--output", tmp_path / "out"]) == 2, start
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error, error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_folder"], "no_such_folder"),
        (["FOLDER", "--test-split", "absent"], "absent"),
        (["FOLDER", "--format", "coco"], "has no COCO file"),
        (["FOLDER", "--model", "refinedet1"], "--model must be one of refinedet320_vgg16"),
        (["FOLDER", "--class-weight", "balance"], "--class-weight must be balanced, effective or"),
        (["FOLDER", "--restarts", "2"], "--restarts: only with --workers"),
        (["FOLDER", "--accumulate", "3"], "--accumulate must divide the 8 images of a device"),
    ],
)
def test_faulty_data_is_one_sentence(voc_folder, tmp_path, capsys, arguments, words):
    arguments = [voc_folder if a == "FOLDER" else a for a in arguments]
    assert main(["train", *arguments, "--output", tmp_path / "out"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and words in errors
    assert not (tmp_path / "out").exists()


def test_class_weights(voc_folder, tmp_path):
    """Of the training set, by method and from a file."""
    counts = read_train_test(voc_folder)[0].report.class_counts
    (tmp_path / "weights.json").write_text(json.dumps({"blue": 2}))

    def weights(method):
        options = ["--class-weight", str(method), *map(str, OPTIONS)]
        arguments = parse_arguments(["train", str(voc_folder), *options])
        loss = weigh_classes(RefineDetLoss(), arguments, read_train_test(voc_folder)[0])
        return dict(zip(counts, loss.class_weights, strict=True))

    assert weights(tmp_path / "weights.json") == {**dict.fromkeys(counts, 1.0), "blue": 2.0}
    balanced = [weights("balanced")[name] * count for name, count in counts.items()]
    assert balanced == pytest.approx([sum(counts.values()) / 3] * 3)
    for content in ("{", "[1, 2, 3]", '{"bleu": 2}', '{"blue": "2"}'):
        (tmp_path / "weights.json").write_text(content)
        with pytest.raises(ValueError, match=r"--class-weight must be .*weights\.json: "):
            weights(tmp_path / "weights.json")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--epochs", "0"], "--epochs: must be above 0"),
        (["--learning-rate", "0"], "--learning-rate: must be above 0"),
        (["--epochs", "some"], "invalid int value"),
        (["--workers", "0"], "--workers: must be above 0"),
        (["--weights", "imagenet"], "unrecognized arguments: --weights"),
        (["--classifier", "--fit-anchors"], "unrecognized arguments: --fit-anchors"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
    ],
)
def test_wrong_options(capsys, arguments, words):
    """Options of the other kind of model are wrong too."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "folder", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_an_unusable_output_folder_is_one_sentence(voc_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    commands = [["train", voc_folder], ["evaluate", "a.keras", voc_folder], ["predict", "a", "b"]]
    for command in commands:
        for output in ("file", "file/out"):
            assert main([*command, "--output", tmp_path / output]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: --output must be a folder. Received: ")
            assert f"({tmp_path / 'file'} is not a folder)" in error


def test_an_image_damaged_behind_its_header_is_named(voc_folder, trained, tmp_path, capsys):
    folder = shutil.copytree(voc_folder, tmp_path / "voc")
    datasets = read_splits(folder, seed=1)  # training, validation and test set
    paths = [Path(dataset.records[0].image) for dataset in (datasets[0], datasets[-1])]
    for path in paths:
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
        content = path.with_suffix(".png").read_bytes()
        middle = len(content) // 2
        path.with_suffix(".png").write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    output = tmp_path / "out"
    commands = ["train"], ["evaluate", trained / "detector.keras"]
    for command, path in zip(commands, paths, strict=True):
        assert main([*command, folder, "--output", output]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: Cannot read the image '{path.with_suffix('.png')}'")


# === evaluate ===


def test_evaluate_gives_what_the_training_gave(voc_folder, trained, tmp_path, capsys):
    command = ["evaluate", trained / "detector.keras", voc_folder, "--output", tmp_path]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*CLASS_NAMES, "AP75", "ARlarge"))
    assert_plots(tmp_path, "precision_recall", "detections", "worst")
    result = json.loads((tmp_path / "result.json").read_text())
    want = json.loads((trained / "result.json").read_text())
    assert result["split"] == "test" and result["images"] == 2
    assert result["mAP50"] == pytest.approx(want["mAP50"], abs=1e-6)
    assert set(result["AP50"]) == set(CLASS_NAMES) and "AP" in result["COCO"]
    assert "the model was trained on" not in printed
    whole = shutil.copytree(voc_folder, tmp_path / "whole", ignore=lambda *_: {"ImageSets"})
    assert main([*command[:2], whole, "--output", tmp_path]) == 0
    assert "those that the model was trained on" in capsys.readouterr().out
    images = json.loads((tmp_path / "result.json").read_text())["images"]
    assert images == len(list((whole / "JPEGImages").iterdir())) > 2


@pytest.mark.parametrize(
    "options, words",
    [
        (["--split", "absent"], "absent"),
        (["--weights", "imagenet"], "has its own"),
        (["--overlap", "0.5"], "--overlap: only with --tiles"),
        (["--limit", "3", "--crop-size", "64"], "--crop-size, --limit: only for classifiers"),
    ],
)
def test_evaluate_says_what_is_wrong(voc_folder, trained, tmp_path, capsys, options, words):
    command = ["evaluate", trained / "detector.keras", voc_folder, "--output", tmp_path / "out"]
    assert main([*command, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and words in errors and not (tmp_path / "out").exists()


def test_export_a_detector_with_options_of_a_classifier(trained, tmp_path, capsys):
    command = ["export", trained / "detector.keras", tmp_path / "detector.onnx"]
    assert main([*command, "--crop-size", 64]) == 2
    assert "--crop-size: only for classifiers" in capsys.readouterr().err
    assert main([*command, "--precision", "int8"]) == 2
    assert "--precision int8 and --images belong together" in capsys.readouterr().err
    assert main([*command, "--precision", "bfloat16"]) == 2
    assert "`precision` of onnx must be one of" in capsys.readouterr().err


# === Splits ===


def ids(*datasets):
    return [[record.image_id for record in dataset.records] for dataset in datasets]


def test_a_dataset_without_splits_is_split(voc_folder):
    """Never is the model tested on images that it was trained on."""
    rows = [f"JPEGImages/{i}.jpg,1,2,30,40,{CLASS_NAMES[i % 3]}" for i in range(10)]
    file = voc_folder / "objects.csv"
    file.write_text("\n".join(["image,x1,y1,x2,y2,label", *rows]))
    try:
        first, again = ids(*read_train_test(str(file))), ids(*read_train_test(str(file)))
        other = ids(*read_train_test(str(file), seed=5))
    finally:
        file.unlink()
    assert [len(part) for part in first] == [8, 2] and len({*first[0], *first[1]}) == 10
    assert first == again and first != other


def test_options_of_reading(voc_folder, tmp_path):
    folder = shutil.copytree(voc_folder, tmp_path / "voc")
    (folder / "Annotations/0.xml").unlink()
    options = ["--format", "voc", "--unannotated", "background", "--allow-outside"]
    arguments = parse_arguments(["train", str(folder), *options])
    train, _ = read_train_test(folder, **reading_options(arguments))
    assert [record.boxes.size > 0 for record in train.records[:2]] == [False, True]


@pytest.fixture
def splits(voc_folder, tmp_path):
    return shutil.copytree(voc_folder, tmp_path / "voc") / "ImageSets/Main"


@pytest.mark.parametrize("test_split", ["test", "val", "valid"])
def test_splits_are_found(splits, test_split):
    (splits / "val.txt").unlink()
    (splits / "test.txt").rename(splits / f"{test_split}.txt")
    data = splits.parent.parent
    assert ids(*read_train_test(data)) == [[str(i) for i in range(8)], ["10", "11"]]
    # The only other split is for the test: nothing may be chosen by it.
    train, validation, test = ids(*read_splits(data))
    assert test == ["10", "11"] and len(validation) == 1
    assert sorted(train + validation) == [str(i) for i in range(8)]
    assert ids(*read_splits(data)) == [train, validation, test]
    assert ids(*read_splits(data, seed=3))[1] != validation


def test_validation_split(splits):
    data, whole = splits.parent.parent, [str(i) for i in range(8)]
    assert ids(*read_splits(data)) == [whole, ["8", "9"], ["10", "11"]]
    with pytest.warns(UserWarning, match="2 validation images are also training images"):
        assert ids(*read_splits(data, train_split="val", validation_split="val"))[1] == ["8", "9"]
    with pytest.warns(UserWarning, match="2 test images are also validation images"):
        read_splits(data, validation_split="valid", test_split="val")
    assert ids(*read_splits(data, test_split="valid"))[2] == ["8", "9"]
    assert set(ids(*read_splits(data, test_split="valid"))[1]) <= set(whole)
    # As in the VOC devkit, where "trainval" contains "val".
    (splits / "trainval.txt").write_text("\n".join(map(str, range(10))))
    train, validation, _ = ids(*read_splits(data, train_split="trainval"))
    assert len(validation) == 1 and len(train) == 9


def test_a_validation_split_without_objects(splits):
    data = splits.parent.parent
    for i in (8, 9):
        path = data / f"Annotations/{i}.xml"
        path.write_text(re.sub("<object>.*</object>", "", path.read_text()))
    with pytest.raises(ValueError, match="No box to choose a model by in the 2 validation images"):
        read_splits(data, validation_split="val")
    assert ids(*read_splits(data))[1] < ["8"]  # held out of the training images


def test_classes_without_objects_are_named(capsys):
    report = AnnotationReport(2, 3, {"cat": 3, "dog": 0, "bee": 0})
    print_data("Validation", report)
    print_data("Training", report)
    printed = capsys.readouterr().out
    assert "Validation data: no objects of dog, bee: not part of the means" in printed
    assert "Training data: no objects of dog, bee: cannot be learned" in printed


@pytest.mark.parametrize("options, words", [([], "--anchor-sizes"), (["--classifier"], "--mixup")])
def test_help_shows_the_options_of_the_kind(capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["train", *options, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and words in printed and "keras-resnest train my_folder" in printed
