"""`keras-resnest predict` of videos, which are written here: decoding, tracks, damage."""

import argparse
import contextlib
import json
import socket
import sys
import threading
import time

import numpy as np
import pytest
from detectors import small_detector

from keras_resnest.cli import main
from keras_resnest.cli.video import VideoReader, is_video, predict_video, read_ahead
from keras_resnest.detection.decoding import DetectionDecoder

av = pytest.importorskip("av")

WIDTH, HEIGHT, RATE, COUNT = 128, 64, 10, 20
CODECS = {"avi": "mjpeg", "mp4": "libx264", "mkv": "libx264", "ts": "libx264"}


def red_box(i):
    """The box of the red rectangle in frame i; a second one stands still."""
    return [4 + 4 * i, 10, 28 + 4 * i, 40]


def make_frame(i, size=(WIDTH, HEIGHT)):
    pixels = np.full((size[1], size[0], 3), 110, "uint8")
    for x1, y1, x2, y2 in (red_box(i), [100, 48, 120, 60]):
        pixels[y1:y2, x1:x2] = (220, 10, 10)
    return pixels


def write_video(path, count=COUNT, size=(WIDTH, HEIGHT), **options):
    codec = CODECS[path.suffix[1:]]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=RATE, width=size[0], height=size[1])
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(make_frame(i, size), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def packets(path):
    """(position, size) of the encoded frames."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def damage(path, which):
    """Overwrites a part of some packets."""
    content, places = bytearray(path.read_bytes()), packets(path)
    for position, size in (places[i] for i in which):
        content[position + size // 3 : position + 2 * size // 3] = bytes(2 * size // 3 - size // 3)
    path.write_bytes(content)


def red_detector(paths, images, confidence):
    """Finds red rectangles by their columns."""
    results = []
    for image in images:
        is_red = (image[..., 0] > 165) & (image[..., 1] < 60)
        columns = np.flatnonzero(np.diff(np.pad(is_red.any(0), 1).astype(int)))
        boxes = []
        for x1, x2 in columns.reshape(-1, 2):
            rows = np.flatnonzero(is_red[:, x1:x2].any(1))
            boxes.append([x1, rows[0], x2, rows[-1] + 1])
        count = len(boxes)
        results.append(
            {
                "boxes": np.reshape(boxes, (-1, 4)),
                "labels": np.zeros(count, int),
                "class_names": ["red"] * count,
                "confidence": np.full(count, 0.9),
            }
        )
    return results


def options(output, **changes):
    usual = {"confidence": 0.3, "batch_size": 3, "no_images": False, "track": False}
    return argparse.Namespace(output=output, **{**usual, **changes})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# === Decoding ===


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_those_that_were_written(tmp_path, suffix):
    reader = VideoReader(str(write_video(tmp_path / f"a.{suffix}")))
    frames = list(reader)
    assert [frame.number for frame in frames] == list(range(COUNT)) and reader.rate == RATE
    start = frames[0].seconds  # not 0 in MPEG-TS
    np.testing.assert_allclose([f.seconds - start for f in frames], np.arange(COUNT) / RATE)
    for i, frame in enumerate(frames):
        assert frame.pixels.dtype == np.uint8
        assert np.abs(frame.pixels.astype(int) - make_frame(i)).mean() < 6
    assert reader.faults() == ""


def test_every_third_frame(tmp_path):
    frames = list(VideoReader(str(write_video(tmp_path / "a.mp4")), every=3))
    assert [frame.number for frame in frames] == [0, 3, 6, 9, 12, 15, 18]
    assert np.abs(frames[2].pixels.astype(int) - make_frame(6)).mean() < 6


def test_a_turned_video(tmp_path):
    """A phone held upright: its MP4 has the matrix of a quarter turn clockwise."""
    path = write_video(tmp_path / "a.mp4")
    one, minus, last = (x.to_bytes(4, "big", signed=True) for x in (1 << 16, -1 << 16, 1 << 30))
    none = bytes(4)
    upright = b"".join((one, none, none, none, one, none, none, none, last))
    turned = b"".join((none, one, none, minus, none, none, none, none, last))
    head, track, rest = path.read_bytes().partition(b"tkhd")
    path.write_bytes(head + track + rest.replace(upright, turned, 1))
    frame = next(iter(VideoReader(str(path))))
    assert frame.pixels.shape == (WIDTH, HEIGHT, 3)
    assert np.abs(frame.pixels.astype(int) - np.rot90(make_frame(0), -1)).mean() < 6


def test_decoding_runs_a_few_frames_ahead(tmp_path):
    reader = VideoReader(str(write_video(tmp_path / "a.avi")))
    frames = read_ahead(reader, 4)
    assert next(frames).number == 0
    for _ in range(100):  # until the other thread waits
        if reader.count == 6:
            break
        time.sleep(0.02)
    time.sleep(0.3)
    assert reader.count == 6  # one is taken, four wait, one does not fit
    assert [frame.number for frame in frames] == list(range(1, COUNT))


# === Damage ===


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_corrupt_frames_are_skipped_and_counted(tmp_path, suffix, capsys):
    damage(path := write_video(tmp_path / f"a.{suffix}"), [7, 12])
    reader = VideoReader(str(path))
    predict_video(red_detector, reader, options(tmp_path, no_images=True))
    found = lines_of(tmp_path / "a_detections.jsonl")
    assert COUNT - 6 <= len(found) < COUNT and reader.corrupt == COUNT - len(found)
    assert f", {reader.corrupt} corrupt frames skipped" in capsys.readouterr().out
    if suffix == "avi":  # every frame stands alone
        assert reader.corrupt == 2


@pytest.mark.parametrize(
    "suffix, message",
    [
        ("avi", "frames missing at the end"),
        ("faststart.mp4", "frames missing at the end"),
        ("mkv", "s missing at the end"),
    ],
)
def test_truncated_videos(tmp_path, suffix, message):
    flags = {"movflags": "faststart"} if "fast" in suffix else {}
    path = write_video(tmp_path / f"a.{suffix}", 40, **flags)
    path.write_bytes(path.read_bytes()[: packets(path)[20][0]])
    reader = VideoReader(str(path))
    assert 15 < len(list(reader)) < 21 and message in reader.faults()


def test_a_video_that_changes_its_size(tmp_path):
    """Boxes are in the pixels of each frame; the drawn video keeps the first size."""
    first, second = (
        write_video(tmp_path / f"{size[0]}.ts", 4, size) for size in ((128, 64), (160, 96))
    )
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    predict_video(red_detector, VideoReader(str(path)), options(tmp_path))
    found = lines_of(tmp_path / "both_detections.jsonl")
    sizes = [(128, 64)] * 4 + [(160, 96)] * 4
    assert [(line["width"], line["height"]) for line in found] == sizes
    for i, line in enumerate(found):
        np.testing.assert_allclose(line["detections"][0]["box"], red_box(i % 4), atol=3)
    drawn = [frame.pixels.shape for frame in VideoReader(str(tmp_path / "both_detections.mp4"))]
    assert drawn == [(64, 128, 3)] * 8


# === The program ===


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "detector.keras"
    small_detector(decoder=DetectionDecoder(max_detections=3)).save(path)
    return path


def test_predict_writes_lines_and_a_video(model_file, tmp_path, capsys):
    path = write_video(tmp_path / "a clip.mp4")
    output = tmp_path / "out"
    assert main(["predict", model_file, path, "--every", 2, "--output", output]) == 0
    assert sorted(p.name for p in output.iterdir()) == [
        "a clip_detections.jsonl",
        "a clip_detections.mp4",
    ]
    found = lines_of(output / "a clip_detections.jsonl")
    assert [line["frame"] for line in found] == list(range(0, COUNT, 2))
    drawn = list(VideoReader(str(output / "a clip_detections.mp4")))
    original = list(VideoReader(str(path), every=2))
    assert [frame.seconds for frame in drawn] == [frame.seconds for frame in original]
    assert np.abs(drawn[0].pixels.astype(int) - original[0].pixels).mean() > 5  # boxes
    said = capsys.readouterr().out
    assert "10 frames, " in said and " frames/s, " in said


@pytest.mark.parametrize(
    "content, status, message",
    [
        (None, 2, "a.mp4 cannot be opened as a video: No such file"),
        (b"", 2, "a.mp4 cannot be opened as a video: Invalid data"),
        (b"no video" * 99, 2, "a.mp4 cannot be opened as a video: Invalid data"),
        ("no moov", 2, "a.mp4 cannot be opened as a video: Invalid data"),
        ("no frame", 1, "a.avi has no readable frame, 2 corrupt frames skipped"),
    ],
)
def test_videos_that_cannot_be_read(model_file, tmp_path, capsys, content, status, message):
    path = tmp_path / "a.mp4"
    if content == "no moov":
        path.write_bytes(write_video(path).read_bytes()[:-2000])
    elif content == "no frame":
        damage(path := write_video(tmp_path / "a.avi", 2), [0, 1])
    elif content is not None:
        path.write_bytes(content)
    assert main(["predict", model_file, path, "--output", tmp_path / "out"]) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.mp4", "b.mp4"], "a video comes alone. Received: a.mp4, b.mp4"),
        (["a.mp4", "--format", "csv"], "--format: only JSON lines"),
        (["a.mp4", "--save-annotations", "voc"], "--save-annotations: only for images"),
        (["a.jpg", "--track"], "--track: only for videos"),
        (["a.jpg", "--every", 2], "--every: only for videos"),
        (["camera:/dev/null"], "camera:/dev/null cannot be opened as a video"),
    ],
)
def test_wrong_commands(model_file, tmp_path, arguments, message, capsys):
    assert main(["predict", model_file, *arguments, "--output", tmp_path / "out"]) == 2
    assert message in capsys.readouterr().err


def test_names_of_videos():
    videos = ("a.MP4", "camera", "camera:1", "rtsp://host/a", "https://host/a")
    assert all(map(is_video, videos)) and not any(map(is_video, ("a.jpg", "camera.png", "cameras")))


def test_a_failure_leaves_no_half_video(tmp_path):
    def fail_late(paths, images, confidence):
        if images[0][10, 4, 0] < 165:  # the rectangle has moved on
            raise ValueError("no more")
        return red_detector(paths, images, confidence)

    path = write_video(tmp_path / "a.mp4")
    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        predict_video(fail_late, VideoReader(str(path)), options(tmp_path, batch_size=1))
    assert not list(tmp_path.glob("*_detections.mp4")) and threading.active_count() == before


# === Streams ===


def test_a_live_stream_drops_what_is_too_fast_and_ends_with_ctrl_c(tmp_path, capsys):
    content = write_video(tmp_path / "a.ts", 60).read_bytes()
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(content)
            connection.recv(1)  # stays open until the reader has left

    threading.Thread(target=serve, daemon=True).start()
    seen = []

    def slow(paths, images, confidence):
        assert len(images) == 1
        seen.append(1)
        time.sleep(0.1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return red_detector(paths, images, confidence)

    reader = VideoReader(f"tcp://127.0.0.1:{server.getsockname()[1]}/a")
    predict_video(slow, reader, options(tmp_path))
    assert " frames dropped" in capsys.readouterr().out and reader.dropped > 20
    assert len(lines_of(tmp_path / "a_detections.jsonl")) == 4
    assert len(list(VideoReader(str(tmp_path / "a_detections.mp4")))) == 4


# === Tracks ===


def test_tracks_keep_their_numbers(tmp_path):
    pytest.importorskip("trackers")
    path = write_video(tmp_path / "a.mp4", 15)
    predict_video(red_detector, VideoReader(str(path)), options(tmp_path, track=True))
    tracks = [
        [row["track"] for row in line["detections"]]
        for line in lines_of(tmp_path / "a_detections.jsonl")
    ]
    assert tracks[0] == [None, None]
    moving, still = tracks[1]
    assert None not in (moving, still) and moving != still
    assert all(row == [moving, still] for row in tracks[1:])


def test_tracks_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    path = write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(ImportError, match=r'pip install "keras_resnest\[track\]"'):
        predict_video(red_detector, VideoReader(str(path)), options(tmp_path, track=True))
    assert not list(tmp_path.glob("*_detections*"))
