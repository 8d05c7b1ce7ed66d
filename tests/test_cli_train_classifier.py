"""`keras-resnest train --classifier` on small folders of shapes."""

import json
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from PIL import Image, ImageDraw

from keras_resnest.cli import main, parse_arguments
from keras_resnest.cli.train_classifier import limit_batch_size, read_train_test
from keras_resnest.data import center_crop_image, find_images, load_image

CLASSES = {"circle": (220, 60, 40), "cross": (40, 200, 70), "square": (50, 80, 230)}


def draw(name, rng):
    """A shape in the color of its class, somewhere on a gray ground."""
    image = Image.new("RGB", (48, 40), (int(rng.integers(90, 160)),) * 3)
    pen, size = ImageDraw.Draw(image), int(rng.integers(16, 26))
    x, y = int(rng.integers(2, 46 - size)), int(rng.integers(2, 38 - size))
    box = (x, y, x + size, y + size)
    if name == "circle":
        pen.ellipse(box, fill=CLASSES[name])
    elif name == "square":
        pen.rectangle(box, fill=CLASSES[name])
    else:
        pen.line(box, fill=CLASSES[name], width=6)
        pen.line((x, y + size, x + size, y), fill=CLASSES[name], width=6)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                draw(name, rng).save(root / split / name / f"{i}.png")
    (root / "train" / "cross" / "notes.txt").write_text("not an image")
    (root / "train" / "cross" / "broken.jpg").write_bytes(b"\xff\xd8 and nothing else")
    return root


OPTIONS = ["--model", "resnest14_tiny", "--crop-size", "32", "--batch-size", "16"]


def train(*arguments):
    return main(["train", "--classifier", *arguments])


def kill_after_an_epoch(arguments, log):
    """Starts a training and kills it when it has written one epoch of its log."""
    command = [sys.executable, "-m", "keras_resnest", "train", "--classifier"]
    command += map(str, arguments)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, deadline = subprocess.Popen(command, **quiet), time.monotonic() + 300
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_learns_shapes_killed_and_restarted(folder, tmp_path, capsys):
    options = ["--epochs", 8, "--learning-rate", 3e-3, "--skip-faulty", "--output", tmp_path]
    command, log = [folder, *OPTIONS, *options], tmp_path / "log.csv"
    kill_after_an_epoch(command, log)
    assert train(*command) == 0
    printed = capsys.readouterr().out
    assert "Resuming the training" in printed
    assert "96 images, 3 classes" in printed and "broken.jpg" in printed
    epochs = [int(line.split(",")[0]) for line in log.read_text().splitlines()[1:]]
    assert sorted(set(epochs)) == list(range(8)) and len(epochs) <= 9
    summary = json.loads((tmp_path / "result.json").read_text())
    assert summary["top1"] >= 0.9, printed[-2000:]
    assert summary["class_names"] == sorted(CLASSES) and summary["steps"] == 8 * 6
    for name in ("history", "accuracy"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 50, f"{name}.png is empty"
    # The saved models say the same of images that were never trained on.
    model = keras.saving.load_model(tmp_path / "classifier.keras")
    images, labels = [], []
    for label, name in enumerate((tmp_path / "class_names.txt").read_text().split()):
        for path in find_images(folder / "val" / name):
            images.append(center_crop_image(load_image(path), 32))
            labels.append(label)
    images = np.stack(images).astype("float32")
    predictions = model.predict(images, verbose=0)
    assert (predictions.argmax(axis=1) == labels).mean() == pytest.approx(summary["top1"])
    served = keras.layers.TFSMLayer(tmp_path / "serving" / "1", "serve")(images)
    np.testing.assert_allclose(served["predictions"], predictions, atol=1e-4)


def when_written(path, action):
    """Starts a thread that does something as soon as a file exists."""

    def wait():
        deadline = time.monotonic() + 200
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_interrupted_then_its_folder_is_removed(folder, tmp_path, capsys):
    output = tmp_path / "out"
    command = [folder, *OPTIONS, "--skip-faulty", "--epochs", 200, "--output", output]
    program = [sys.executable, "-m", "keras_resnest", "train", "--classifier", *map(str, command)]
    process = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    interrupt = when_written(
        output / "checkpoint/epoch_000001_step_00000000",
        lambda: process.send_signal(signal.SIGINT),
    )
    said = process.communicate()[1]
    interrupt.join()
    assert process.returncode == 130 and "Traceback" not in said
    wanted = f"interrupted: to resume from the last checkpoint in {output}, run the same command"
    assert said.splitlines()[-1] == wanted

    # Without its folder, a training leaves nothing to resume from.
    newest = int(max(path.name for path in output.glob("checkpoint/epoch_*"))[6:12])
    command[command.index(200)] = 300  # more epochs are allowed
    remove = when_written(
        output / f"checkpoint/epoch_{newest + 1:06d}_step_00000000",
        lambda: output.rename(tmp_path / "elsewhere"),
    )
    assert train(*command) == 1
    remove.join()
    printed = capsys.readouterr()
    assert f"Resuming the training in {output} after epoch {newest}" in printed.out
    assert "removed" in printed.err or "No such file" in printed.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_folder"], "no_such_folder"),
        (["FOLDER"], "broken.jpg"),
        (["FOLDER", "--skip-faulty", "--test-split", "exam"], "exam"),
        (["FOLDER", "--skip-faulty", "--train-split", "exam"], "no folder 'exam'"),
        (["FOLDER", "--skip-faulty", "--model", "resnest51"], "resnest51"),
        (["FOLDER", "--skip-faulty", "--weights", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_unusable_data_and_arguments_are_one_sentence(folder, tmp_path, capsys, arguments, words):
    arguments = [folder if a == "FOLDER" else a for a in arguments]
    options = OPTIONS[2:] if "--model" in arguments else OPTIONS
    assert train(*arguments, *options, "--output", tmp_path / "out") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if words in line]
    assert said[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_fifth_of_every_class_is_held_out(folder):
    arguments = parse_arguments(["train", "--classifier", str(folder / "val")])
    train_set, test_set = read_train_test(arguments)
    assert (len(train_set), len(test_set)) == (18, 6)
    assert test_set.report.class_counts == dict.fromkeys(CLASSES, 2)  # a fifth of 8


def test_the_batch_is_not_larger_than_the_data(capsys):
    assert limit_batch_size(16, 34, 2) == 16 and not capsys.readouterr().out
    assert limit_batch_size(64, 35, 2) == 34
    assert "There are 35 images" in capsys.readouterr().out
    assert limit_batch_size(8, 1, 2) == 8  # the error of the dataset is clearer


def test_a_training_that_diverges_ends_with_a_sentence(folder, tmp_path, capsys):
    options = ["--epochs", 2, "--learning-rate", 1e9, "--skip-faulty", "--output", tmp_path]
    assert train(folder, *OPTIONS, *options) == 1
    errors = capsys.readouterr().err
    assert "The learning rate is " in errors and "became" in errors
    assert (tmp_path / "last_finite.weights.h5").exists()
