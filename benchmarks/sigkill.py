"""Kills a training again and again, and prints what was lost.

    python benchmarks/sigkill.py --random 20 --worst 10

`keras-resnest train` trains a small classifier. After each SIGKILL, the files that were there must
still be there and whole; then the same command resumes. Random kills come at any CPU second of a
run, the worst right before an operation on files, in the order of `WORST`. In the end, log.csv and
all weights must equal those of a training that nobody killed, without leftovers.
"""

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from PIL import Image

import keras_resnest as kr
from keras_resnest.cli import main as run_command

OPTIONS = ["--classifier", "--model", "resnest14_tiny", "--crop-size", "32", "--batch-size", "8"]
OPTIONS += ["--epochs", "20", "--deterministic"]
# Kill right before the nth such event (of `sys.addaudithook`) with this text in its arguments.
WORST = (
    ("open", "new/arrays.npz", "1"),  # a checkpoint is begun
    ("open", "new/state.json", "1"),  # ... is half written
    ("os.rename", "epoch_", "1"),  # ... is written, but not in its place
    ("open", "new/log.csv", "2"),  # ... is in its place, but the log has no row
    ("ctypes.dlsym", "renameat2", "2"),  # the new log is written, but not in its place
    ("shutil.rmtree", "checkpoint", "1"),  # the oldest checkpoint is not yet removed
    ("open", "new/classifier.keras", "1"),  # the model is begun
    ("open", "new/assets.extra/model.json", "1"),  # the export is half written
    ("shutil.rmtree", ".1.", "1"),  # the export is in its place, the old one not yet removed
    ("open", "new/result.json", "1"),  # all but the summary is there
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--worst", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, whole, output = (Path(folder, name) for name in ("data", "whole", "killed"))
        write_images(data)
        assert run(data, whole) == 0
        seconds = int(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        print(f"a run that nobody kills takes {seconds} CPU seconds")
        rng, problems = random.Random(arguments.seed), []
        kills = [{"after": rng.randint(1, seconds * 4 // 5)} for _ in range(arguments.random)]
        kills += [{"moment": WORST[i % len(WORST)]} for i in range(arguments.worst)]
        for number, kill in enumerate(kills, 1):
            problems += attempt(number, kill, data, output)
        assert run(data, output) == 0
        problems += differences(whole, output)
    print("\n".join(problems) or f"{len(kills)} kills: nothing was lost")
    return bool(problems)


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for channel, name in enumerate(("red", "green")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (40, 40, 3), "uint8")
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def run(data: Path, output: Path, after: int = 0, moment=("", "", "1")) -> int:
    """Runs the command in a process; returns its exit status, that of SIGKILL if it was killed."""
    command = [sys.executable, __file__, "--child", after, *moment, "train", data, *OPTIONS]
    command = [*map(str, command), "--output", str(output)]
    return subprocess.run(command, capture_output=True).returncode


def child(after: str, event: str, text: str, nth: str, *argv: str) -> int:
    """The process that is killed."""
    left = int(nth)
    if int(after):  # the kernel sends SIGKILL at the hard limit
        resource.setrlimit(resource.RLIMIT_CPU, (int(after), int(after)))

    def hook(name, arguments):
        nonlocal left
        if name == event and text in str(arguments):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    if event:
        sys.addaudithook(hook)
    return run_command(argv)


def attempt(number: int, kill: dict, data: Path, output: Path) -> list[str]:
    """Runs and kills; returns what is missing or broken then."""
    finished, moment = epochs(output) == int(OPTIONS[-2]), kill.get("moment")
    if finished and (moment in WORST[:6] or (moment is None and (output / "result.json").exists())):
        shutil.rmtree(output)  # nothing would be trained
    before, epoch = files(output), epochs(output)
    while (status := run(data, output, **kill)) != -signal.SIGKILL:
        assert status == 0, f"the command fails with status {status}"
        shutil.rmtree(output)  # it was finished before the kill
        before, epoch = set(), 0
    when = "before {} {} ({})".format(*moment) if moment else f"after {kill['after']} CPU s"
    problems = [f"lost {name}" for name in sorted(before - files(output))]
    if epochs(output) < epoch:
        problems.append(f"went back from epoch {epoch} to {epochs(output)}")
    if (output / "classifier.keras").exists():
        try:
            zipfile.ZipFile(output / "classifier.keras").testzip()
        except zipfile.BadZipFile:
            problems.append("classifier.keras is broken")
    if (output / "result.json").exists():
        json.loads((output / "result.json").read_text())
    text = ", ".join(problems) or "nothing lost"
    print(f"{number:3} {when:45} epoch {epoch:2} -> {epochs(output):2}: {text}", flush=True)
    return [f"kill {number}: {problem}" for problem in problems]


def files(output: Path) -> set[str]:
    """Those that a reader may use at any time; result.json is deleted when a training begins."""
    names = ("classifier.keras", "log.csv", "serving/1/saved_model.pb", "class_names.txt")
    return {name for name in names if (output / name).exists()}


def epochs(output: Path) -> int:
    return kr.callbacks.ResumeTraining(output / "checkpoint").initial_epoch


def differences(whole: Path, killed: Path) -> list[str]:
    """Compares two complete trainings."""
    logs = [list(csv.reader((folder / "log.csv").open())) for folder in (whole, killed)]
    problems = ["log.csv differs"] * (logs[0] != logs[1])
    newest = [max(folder.glob("checkpoint/epoch_*")) / "arrays.npz" for folder in (whole, killed)]
    with np.load(newest[0]) as one, np.load(newest[1]) as other:
        equal = one.files == other.files and all(
            np.array_equal(one[name], other[name]) for name in one.files
        )
    problems += ["weights differ"] * (not equal)
    return problems + [f"left {path}" for path in killed.rglob(".*")]


if __name__ == "__main__":
    sys.exit(child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
