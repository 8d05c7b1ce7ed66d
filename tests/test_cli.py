"""The program `keras-resnest` as a whole: help, exit statuses, the installed wheel, examples."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectors import WHOLE, rectangles, small_detector
from PIL import Image

from keras_resnest.cli import COMMANDS, main, parse_arguments
from keras_resnest.version import __version__

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def test_module_is_the_program():
    command = [sys.executable, "-m", "keras_resnest", "predict", "a.keras", "x.jpg"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: no such model: a.keras"
    assert "Traceback" not in done.stderr


def test_warnings_are_one_line(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "x.csv").write_text("a.png,1,1,20,20,cat\na.png,5,5,5,5,cat\n")
    command = ["convert", tmp_path / "x.csv", tmp_path / "voc", "--format", "voc"]
    done = subprocess.run(
        [sys.executable, "-m", "keras_resnest", *command], capture_output=True, text=True
    )
    assert done.returncode == 0 and "1 x degenerate box" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "degenerate" in line]
    assert line.startswith("warning: ") and "warnings.warn" not in done.stderr


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and set(COMMANDS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"\n    keras-resnest {command}" in printed
    assert "\n" not in (usage := printed.split("\n\n")[0]) and "[options]" in usage


@pytest.mark.parametrize("argv", [[], ["fly"], ["list", "--unknown"]])
def test_wrong_commands_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: keras-resnest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words",
    [
        ("convert data new --format voc --seed 0", "--seed: only with --split"),
        ("demo a.keras --no-serve --port 0", "--port: only without --no-serve"),
        ("export a.keras a.onnx --freeze", "--freeze: only for SavedModels"),
        ("train tfds:voc --skip-faulty", "--skip-faulty: only for files, not for TFDS"),
        ("train tfds:mnist --classifier --skip-faulty", "--skip-faulty: only for files"),
        ("train data --classifier --data-dir x", "--data-dir: only for tfds:NAME"),
        ("evaluate resnest50 data --data-dir x", "--data-dir: only for tfds:NAME"),
    ],
)
def test_options_without_effect_are_refused(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_ctrl_c_ends_in_one_sentence(command, capsys, monkeypatch):
    monkeypatch.setattr(COMMANDS[command], "run", lambda _: signal.raise_signal(signal.SIGINT))
    arguments = {"list": [], "train": ["data"], "classify": ["photo.jpg"], "demo": ["model"]}
    arguments["convert"] = ["source", "target", "--format", "voc"]
    assert main([command, *arguments.get(command, ["model", "data"])]) == 130
    said = capsys.readouterr().err.strip()
    assert said == "interrupted: to start over, run the same command"


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.slow
def test_installed_wheel_has_the_program(tmp_path):
    """Everything that the program needs is in the wheel."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    for name in ("keras_resnest", "README.md", "LICENSE", "setup.cfg", "pyproject.toml"):
        (source / name).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "target"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    assert (target / "keras_resnest/py.typed").exists()
    assert (target / "keras_resnest/serving/demo.html").exists()
    # Away from the source, so that the installed package is imported.
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [target / "bin/keras-resnest", "list", "resnest50"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| resnest50 | 27.48 M |" in done.stdout


# === Examples ===


def run_example(name, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def write_images(folder, count=1):
    images = rectangles(count, (64, 128, 3))[0]
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.astype("uint8")).save(folder / f"{i}.png")


@pytest.mark.slow
def test_example_train_detector(tmp_path, capsys):
    write_images(tmp_path, 20)
    boxes = rectangles(20, (64, 128, 3))[1]["boxes"]
    rows = [f"{i}.png,{','.join(map(str, b))},red" for i, bs in enumerate(boxes) for b in bs]
    (tmp_path / "objects.csv").write_text("\n".join(["image,x1,y1,x2,y2,label", *rows]))
    options = ["--epochs", 1, "--output", tmp_path / "out"]
    run_example("train_detector.py", tmp_path / "objects.csv", *options)
    assert "mAP" in capsys.readouterr().out
    for name in ("dataset.png", "history.png", "precision_recall.png", "detector.keras"):
        assert (tmp_path / "out" / name).exists()


@pytest.mark.slow
def test_example_fine_tune_classifier(tmp_path, capsys):
    for i, name in enumerate(("dark", "light")):
        (tmp_path / name).mkdir()
        for j in range(20):
            pixels = np.full((40, 40, 3), 200 * i + j, "uint8")
            Image.fromarray(pixels).save(tmp_path / name / f"{j}.png")
    options = ["--network", "resnest14_tiny", "--weights", "none", "--epochs", 1, "--size", 32]
    run_example("fine_tune_classifier.py", tmp_path, *options, "--output", tmp_path / "out")
    assert (tmp_path / "out/classifier.keras").exists()
    assert "[[(" in capsys.readouterr().out


@pytest.mark.slow
def test_example_serve_and_call(tmp_path, capsys):
    write_images(tmp_path)
    small_detector(heads=WHOLE).save(tmp_path / "detector.keras")
    files = [tmp_path / "detector.keras", tmp_path / "0.png", "--output", tmp_path / "serving/1"]
    run_example("serve_and_call.py", *files)
    assert "Both find the same objects." in capsys.readouterr().out


@pytest.mark.slow
def test_example_use_backbone_elsewhere(capsys):
    options = ["--network", "resnest14_tiny", "--side", 64, "--epochs", 1]
    run_example("use_backbone_elsewhere.py", *options)
    assert "% of the pixels are correct" in capsys.readouterr().out
