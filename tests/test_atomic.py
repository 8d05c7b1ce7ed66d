"""Files and folders are replaced completely or not at all, also by a process that is killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from keras_resnest import atomic
from keras_resnest.atomic import atomic_file, atomic_folder

# Kills itself before the Nth operation on the file system.
PROGRAM = Path(__file__).parent / "programs" / "killed_while_replacing.py"


def write(folder, text):
    (folder / "saved_model.pb").write_text(text)
    (folder / "assets.extra").mkdir()
    (folder / "assets.extra" / "model.json").write_text(text)


def version_of(folder):
    files = [folder / "saved_model.pb", folder / "assets.extra" / "model.json"]
    texts = {file.read_text() for file in files}
    assert len(texts) == 1
    return texts.pop()


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_a_kill_at_any_moment_loses_no_version(tmp_path, way):
    seen, moment, status = [], 0, -signal.SIGKILL
    while status:
        moment += 1
        target = tmp_path / str(moment) / "1"
        with atomic_folder(target) as folder:
            write(folder, "first")
        command = [sys.executable, PROGRAM, atomic.__file__, target, way, str(moment)]
        status = subprocess.run(command).returncode
        assert status in (0, -signal.SIGKILL)
        if way == "exchange":  # nothing has to be put back
            seen.append(version_of(target))
        with pytest.raises(OSError, match="later"), atomic_folder(target):
            seen.append(version_of(target))  # put back by the next call
            raise OSError("later")
        assert os.listdir(target.parent) == ["1"]  # and without leftovers
    assert moment > 10 and {"first", "second"} == set(seen) and seen[-1] == "second"


def test_a_reader_always_finds_a_version(tmp_path):
    target, missing, stop = tmp_path / "1", [], threading.Event()
    with atomic_folder(target) as folder:
        write(folder, "0")

    def read():
        while not stop.is_set():
            missing.extend([1] * (not (target / "saved_model.pb").exists()))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        with atomic_folder(target) as folder:
            write(folder, str(number))
    stop.set()
    reader.join()
    assert version_of(target) == "199"
    if sys.platform == "linux":
        assert not missing


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_a_failed_replacement_is_undone(tmp_path, monkeypatch, way):
    if way == "two steps":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    with atomic_folder(tmp_path / "1") as folder:
        write(folder, "first")
    with pytest.raises(OSError), atomic_folder(tmp_path / "1") as folder:
        folder.rmdir()  # so the last step fails
    assert version_of(tmp_path / "1") == "first" and os.listdir(tmp_path) == ["1"]


def test_a_writer_that_lives_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "1") as one:
        write(one, "first")
        with atomic_folder(tmp_path / "1") as other:
            write(other, "second")
        assert version_of(tmp_path / "1") == "second"
    assert version_of(tmp_path / "1") == "first" and os.listdir(tmp_path) == ["1"]


def test_other_hidden_folders_are_left_alone(tmp_path):
    for name in (".1.notes", ".1.5.abcdefgh", ".12.abcdefgh"):
        (tmp_path / name / "old").mkdir(parents=True)
    (tmp_path / ".1.notes" / "letter.txt").write_text("...")
    with atomic_folder(tmp_path / "1") as folder:
        write(folder, "first")
    assert sorted(os.listdir(tmp_path)) == [".1.5.abcdefgh", ".1.notes", ".12.abcdefgh", "1"]


# === Files ===


def test_files_are_replaced_together(tmp_path):
    with atomic_file(tmp_path / "model.xml") as file:
        file.write_text("1")
        file.with_suffix(".bin").write_text("1")
    with pytest.raises(ValueError), atomic_file(tmp_path / "model.xml") as file:
        file.write_text("2")
        raise ValueError
    (tmp_path / "model.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError), atomic_file(tmp_path / "model.xml") as file:
        for suffix in (".bin", ".json", ".xml"):
            file.with_suffix(suffix).write_text("3")
    assert (tmp_path / "model.xml").read_text() == (tmp_path / "model.bin").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "model.json", "model.xml"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_named(small_disk):
    with atomic_file(small_disk / "result.json") as file:
        file.write_text("first")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*result\.json'"),
        atomic_file(small_disk / "result.json") as file,
    ):
        file.write_bytes(bytes(2**21))
    assert (small_disk / "result.json").read_text() == "first"
    assert os.listdir(small_disk) == ["result.json"]
    import tensorflow as tf

    module = tf.Module()
    module.weights = tf.Variable(tf.zeros([2**19]))
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/1'"),
        atomic_folder(small_disk / "1") as folder,
    ):
        tf.saved_model.save(module, str(folder))
    assert os.listdir(small_disk) == ["result.json"]


def test_errors_keep_their_own_path():
    with pytest.raises(OSError, match="'missing'"), atomic.naming_path("here"):
        Path("missing").read_text()
