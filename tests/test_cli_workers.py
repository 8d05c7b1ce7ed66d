"""`keras-resnest train` in two processes over loopback, as on two machines."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_resnest.cli import main
from keras_resnest.cli.workers import free_addresses

ONE_PROCESS = Path(__file__).with_name("two_replicas_training.py")
COLORS = {"blue": (50, 80, 230), "red": (220, 60, 40)}
IMAGES, BATCH, EPOCHS = 16, 8, 2


@pytest.fixture
def folder(tmp_path):
    """Squares of two colors on gray grounds."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES // 2), ("val", 4)):
        for name, color in COLORS.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40, 48, 3), rng.integers(90, 160), "uint8")
                (y, x), side = rng.integers(0, 14, 2), rng.integers(14, 26)
                pixels[y : y + side, x : x + side] = color
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def start(command, config=None):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    if config is not None:
        environment["TF_CONFIG"] = json.dumps(config)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(processes):
    """What each process printed; all must succeed."""
    try:
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), "\n".join(text[-2000:] for text in texts)
    return texts


def trained_state(output):
    """Weights and optimizer of the last checkpoint, which the chief wrote."""
    folder = output / "checkpoint" / f"epoch_{EPOCHS:06d}_step_00000000"
    with np.load(folder / "arrays.npz") as arrays:
        count = sum(name.startswith("state_") for name in arrays.files)
        return [arrays[f"state_{i}"] for i in range(count)]


def log_of(output):
    with (output / "log.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def norm(arrays):
    return float(np.sqrt(sum(np.square(array, dtype="float64").sum() for array in arrays)))


@pytest.mark.slow
def test_two_workers_train_one_classifier_on_the_data_of_both(folder, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    options = [folder, "--model", "resnest14_tiny", "--crop-size", 32, "--epochs", EPOCHS]
    options += ["--batch-size", BATCH, "--learning-rate", 5e-3]
    program = ["-m", "keras_resnest", "train", "--classifier"]
    addresses = free_addresses(2)
    workers = [
        start(
            [*program, *options, "--output", many],
            {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}},
        )
        for index in range(2)
    ]
    chief, other = end(workers)
    end([start([ONE_PROCESS, *options, "--output", one])])

    # The chief writes and speaks, the other worker does not.
    result, wanted = (json.loads((path / "result.json").read_text()) for path in (many, one))
    assert f"top-1 {result['top1']:.2%}" in chief and "top-1" not in other
    assert f"{IMAGES} images, 2 classes" in chief
    assert result["class_names"] == sorted(COLORS)
    assert result["steps"] == EPOCHS * IMAGES // BATCH
    written = ["classifier.keras", "class_names.txt", "serving/1", "history.png", "accuracy.png"]
    assert [name for name in written if not (many / name).exists()] == []

    # Losses, accuracy, weights and optimizer are those of one process with the images of both.
    assert [row["epoch"] for row in log_of(many)] == list(range(EPOCHS))
    for got, want in zip(log_of(many), log_of(one), strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    assert result["top1"] == wanted["top1"]
    assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    got, want = trained_state(many), trained_state(one)
    with np.load(one / "start.npz") as arrays:
        begun = [arrays[name] for name in arrays.files]
    moved = [a - b for a, b in zip(want[: len(begun)], begun, strict=True)]
    assert norm(moved) > 1.0
    assert norm(a - b for a, b in zip(got[: len(begun)], want, strict=False)) < 1e-3 * norm(moved)
    rest = slice(len(begun), None)
    difference = [a - b for a, b in zip(got[rest], want[rest], strict=True)]
    assert norm(difference) < 1e-3 * norm(want[rest])


def test_what_workers_cannot_train_is_not_a_lost_worker(tmp_path, capfd):
    arguments = [tmp_path / "nowhere", "--workers", 2, "--restarts", 3]
    assert main(["train", *arguments, "--output", tmp_path / "out"]) == 2
    errors = capfd.readouterr().err
    assert "nowhere" in errors and "restarts" not in errors


def test_workers_must_agree_with_tf_config(tmp_path, monkeypatch, capsys):
    config = {"cluster": {"worker": free_addresses(3)}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert main(["train", tmp_path, "--workers", 2]) == 2
    assert "--workers 2 contradicts TF_CONFIG, which lists 3" in capsys.readouterr().err
