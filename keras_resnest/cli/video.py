"""Video for `keras-resnest predict`: files, cameras and streams, through PyAV (FFmpeg).

OpenCV does not tell a damaged frame from the end of a video; PyAV does, and its wheels are kept up
with FFmpeg.
"""

import contextlib
import fractions
import itertools
import json
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_resnest.atomic import atomic_file
from keras_resnest.cli.common import Failure
from keras_resnest.cli.detectors import detection_rows
from keras_resnest.cli.drawing import draw_detections

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
_CAMERAS = {
    "linux": ("v4l2", "/dev/video0"),
    "darwin": ("avfoundation", "0"),
    "win32": ("dshow", ""),
}
_CLOCK = 90_000  # ticks per second of the written video


class Frame(NamedTuple):
    """One decoded frame."""

    number: int  # 0, 1, ... of all frames, also of those left out
    seconds: float
    pixels: np.ndarray  # uint8 (height, width, 3), RGB

    def to_json(self, rows: list[dict]) -> str:
        height, width = self.pixels.shape[:2]
        facts = {"frame": self.number, "seconds": round(self.seconds, 3)}
        facts |= {"width": width, "height": height, "detections": rows}
        return json.dumps(facts, ensure_ascii=False)


def is_video(name: str) -> bool:
    """Whether an argument is a video file, a camera or the URL of a stream."""
    return is_live(name) or "://" in name or name.lower().endswith(SUFFIXES)


def is_live(name: str) -> bool:
    """Whether frames come in real time."""
    return re.match(r"camera(:|$)|(rtsps?|rtmps?|udp|tcp|srt)://", name) is not None


class VideoReader:
    """Decodes a video; counts what it leaves out.

    Args:
        name: Path, URL, "camera", or "camera:" and the name of a device.
        every: Only each `every`-th frame is decoded to pixels, from the first on.

    Raises:
        ValueError: if the video cannot be opened.
    """

    def __init__(self, name: str, every: int = 1):
        try:
            import av
        except ImportError as error:
            raise ImportError('Video needs PyAV: pip install "keras_resnest[video]"') from error
        self.name, self.every, self.is_live = name, every, is_live(name)
        self.count = self.corrupt = self.dropped = 0
        self.seconds = 0.0  # of the last frame
        self.stopped = ""  # why decoding ended early
        path, options = name, {"options": {"rtsp_transport": "tcp"} if name[:4] == "rtsp" else {}}
        if name.partition(":")[0] == "camera":
            options["format"], default = _CAMERAS[sys.platform]
            path = name.partition(":")[2] or default
        try:
            self._container = av.open(path, timeout=10 if self.is_live else None, **options)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            reason = getattr(error, "strerror", None) or "it has no video stream"
            raise ValueError(f"{name} cannot be opened as a video: {reason}") from error
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.options = {"err_detect": "explode"}
        self.rate = float(self._stream.average_rate or 25)  # frames per second

    def __iter__(self) -> Iterator[Frame]:
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:  # of the file or connection
                self.stopped = error.strerror
                return
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.corrupt += 1
                continue
            for frame in frames:
                number, self.count = self.count, self.count + 1
                self.seconds = number / self.rate if frame.time is None else frame.time
                if frame.is_corrupt:
                    self.corrupt += 1
                elif number % self.every == 0:
                    pixels = frame.to_ndarray(format="rgb24")
                    turns = round(frame.rotation / 90)  # counterclockwise, as of a phone
                    pixels = np.ascontiguousarray(np.rot90(pixels, turns))
                    yield Frame(number, self.seconds, pixels)

    def faults(self) -> str:
        """What was left out, for the summary."""
        # What the header states; sound may be a little longer.
        missing = self._stream.frames - self.count - self.corrupt
        seconds = (self._container.duration or 0) / 1e6 - self.seconds
        is_short = not self._stream.frames and seconds > 1
        counts = {
            f"{self.corrupt} corrupt frames skipped": self.corrupt,
            f"{self.dropped} frames dropped": self.dropped,
            f"{missing} frames missing at the end": missing > 0,
            f"{seconds:.1f} s missing at the end": is_short,
            f"stopped: {self.stopped}": self.stopped,
        }
        return "".join(f", {text}" for text, is_fault in counts.items() if is_fault)


def read_ahead(reader: VideoReader, size: int) -> Iterator[Frame]:
    """Decodes up to `size` frames ahead, in another thread; drops old ones of a live video."""
    waiting: queue.Queue = queue.Queue(size)
    is_closed = threading.Event()

    def put(item) -> None:
        while not is_closed.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=0 if reader.is_live else 0.1)
            if reader.is_live:
                with contextlib.suppress(queue.Empty):
                    reader.dropped += waiting.get_nowait() is not None

    def decode() -> None:
        end = None
        try:
            for frame in reader:
                put(frame)
                if is_closed.is_set():
                    return
        except Exception as error:
            end = error
        put(end)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    try:
        while isinstance(item := waiting.get(), Frame):
            yield item
        if item is not None:
            raise item
    finally:
        is_closed.set()
        thread.join(1)  # a stream that stalls may keep it longer


@contextlib.contextmanager
def video_writer(path: Path, size: tuple[int, int], rate: float):
    """Yields a function that writes Pillow images at their seconds, resized to (width, height)."""
    import av

    last = -1
    size = tuple(max(2, side // 2 * 2) for side in size)  # H.264 needs even sides
    with av.open(str(path), "w") as container:
        rate = fractions.Fraction(rate).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, width=size[0], height=size[1])
        stream.codec_context.time_base = fractions.Fraction(1, _CLOCK)

        def write(image, seconds: float) -> None:
            nonlocal last
            frame = av.VideoFrame.from_image(image if image.size == size else image.resize(size))
            last = frame.pts = max(last + 1, round(seconds * _CLOCK))
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode())


def make_tracker(rate: float, confidence: float | dict) -> Callable[[list[dict]], None]:
    """Returns a function that adds "track" to the detections of the next frame (ByteTrack)."""
    try:
        import supervision
        from trackers import ByteTrackTracker
    except ImportError as error:
        text = f'--track needs trackers: pip install "keras_resnest[track]" ({error})'
        raise ImportError(text) from error
    lowest = min(confidence.values()) if isinstance(confidence, dict) else confidence
    tracker = ByteTrackTracker(
        frame_rate=rate, track_activation_threshold=lowest, high_conf_det_threshold=lowest
    )

    def track(rows: list[dict]) -> None:
        found = tracker.update(
            supervision.Detections(
                xyxy=np.reshape([row["box"] for row in rows], (-1, 4)).astype(float),
                confidence=np.array([row["confidence"] for row in rows], float),
                data={"row": np.arange(len(rows))},
            )
        )
        for row in rows:
            row["track"] = None  # until it is seen a second time
        for row, number in zip(found.data.get("row", ()), found.tracker_id, strict=False):
            rows[row]["track"] = int(number) if number >= 0 else None

    return track


def predict_video(detect: Callable, reader: VideoReader, arguments) -> None:
    """Detects in all frames; writes JSON lines, and the video with boxes."""
    batch_size = 1 if reader.is_live else arguments.batch_size
    frames = read_ahead(reader, 2 * batch_size)
    first = next(frames, None)
    if first is None:
        raise Failure(f"{reader.name} has no readable frame{reader.faults()}")
    rate, (height, width) = reader.rate / reader.every, first.pixels.shape[:2]
    track = make_tracker(rate, arguments.confidence) if arguments.track else None
    stem = arguments.output / f"{Path(reader.name).stem}_detections"
    count = objects = 0
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.callback(frames.close)
        # Lines are written at once, for programs that follow a camera.
        lines = stack.enter_context(open(f"{stem}.jsonl", "w", buffering=1, encoding="utf-8"))
        if not arguments.no_images:
            file = stack.enter_context(atomic_file(f"{stem}.mp4"))
            write = stack.enter_context(video_writer(file, (width, height), rate))
        if reader.is_live:  # it ends with Ctrl-C
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        for batch in _batches(itertools.chain([first], frames), batch_size):
            images = [frame.pixels for frame in batch]
            found = detect([None] * len(batch), images, arguments.confidence)
            for frame, detections in zip(batch, found, strict=True):
                rows = detection_rows(detections)
                if track:
                    track(rows)
                print(frame.to_json(rows), file=lines)
                if not arguments.no_images:
                    write(draw_detections(frame.pixels, list(map(_shown, rows))), frame.seconds)
                objects += len(rows)
            count += len(batch)
            speed = count / (time.perf_counter() - start)
            print(f"\r{count} frames, {speed:.1f} frames/s", end="", flush=True)
    print(f", {objects} objects{reader.faults()}, written to {arguments.output}")


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    frames = iter(frames)
    while batch := list(itertools.islice(frames, size)):
        yield batch


def _shown(row: dict) -> dict:
    """A detection with its track in the label."""
    mark = "" if row.get("track") is None else f" #{row['track']}"
    return {**row, "class_name": row["class_name"] + mark}
