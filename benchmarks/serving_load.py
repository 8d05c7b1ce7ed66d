"""Loads an exported detector with requests: throughput, latency, memory.

Several clients send one image per request, each as soon as it has the previous answer. Without
`--url` the SavedModel runs in this process, in two modes: "alone" runs every request as a batch of
one; "batched" runs requests that arrive within a few milliseconds together, as TensorFlow Serving
does with --enable_batching. "CPU" is the processor time per image, which depends less on other
load of the machine. The second table shows the resident memory after each tenth of the requests
and its growth after the first tenth: a leak grows with every request.

    python benchmarks/serving_load.py
    python benchmarks/serving_load.py --requests 10000 --size 128 --clients 16
    python benchmarks/serving_load.py --model serving/detector/1 --images photos --mode batched
    python benchmarks/serving_load.py --url http://127.0.0.1:8501 --name detector --pid 4242

Without `--model`, a RefineDet with random weights is exported first; its detections are
meaningless, and `--confidence` determines their number. Without `--images`, sixteen JPEGs of 640 x
480 are generated. `--url` sends the requests to a server over REST, on this machine only, and
`--pid`, its process, lets the program read its memory. Memory is read on Linux only.

Exit status: 0 if every request was answered, 1 if some failed, 2 if the command is invalid.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import io
import ipaddress
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

TIMEOUT = 60  # seconds, for an answer over REST
TENTHS = 10


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a SavedModel with the signature serve_bytes")
    add("--size", type=int, default=320, help="without --model: side, pixels (%(default)s)")
    add("--confidence", type=float, default=0.05, help="without --model: threshold (%(default)s)")
    add("--images", type=Path, metavar="FOLDER", help="files to send; default: generated ones")
    add("--requests", type=int, default=2000, help="number of requests in each mode (%(default)s)")
    add("--clients", type=int, default=8, help="concurrent clients (%(default)s)")
    add("--mode", choices=("alone", "batched", "both"), default="both")
    add("--max-batch-size", type=int, default=8, help="batched: images of a batch (%(default)s)")
    add(
        "--batch-timeout",
        type=float,
        default=2.0,
        metavar="MS",
        help="batched: timeout (%(default)s)",
    )
    add("--batch-threads", type=int, default=2, help="batched: concurrent batches (%(default)s)")
    add("--threads", type=int, default=0, help="TensorFlow threads, intra and inter; 0: all")
    add("--url", type=local_server, help="REST address of a server, http://127.0.0.1:8501")
    add("--name", default="detector", help="with --url: name of the model (%(default)s)")
    add("--pid", type=int, help="with --url: process of the server, to read its memory")
    arguments = parser.parse_args()
    for name in ("requests", "clients", "max_batch_size", "batch_threads", "size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if arguments.url and arguments.model:
        parser.error("--model runs in this process; --url asks a server")
    if arguments.model and not (arguments.model / "saved_model.pb").exists():
        parser.error(f"no SavedModel in {arguments.model}")
    return arguments


def local_server(url: str) -> tuple[str, int]:
    """Returns host and port of a URL; rejects other machines than this one."""
    parts = urllib.parse.urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port or 80
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if parts.scheme != "http" or not is_local:
        raise argparse.ArgumentTypeError(
            "must be http:// and a loopback address, http://127.0.0.1:8501, http://localhost:8501 "
            f"or http://[::1]:8501: this is a load generator. Received: {url}"
        )
    return host, port


# === Requests ===


def read_images(folder: Path | None) -> list[bytes]:
    if folder is None:
        return generate_images(16)
    from keras_resnest.images import find_images

    return [path.read_bytes() for path in find_images(folder)]


def generate_images(count: int, width: int = 640, height: int = 480) -> list[bytes]:
    """Generates JPEGs as large as photographs: smooth colors and a little noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        colors = Image.fromarray(rng.integers(0, 256, (12, 16, 3), "uint8"))
        smooth = np.asarray(colors.resize((width, height), Image.Resampling.BICUBIC), "float32")
        noisy = (smooth + rng.normal(0.0, 6.0, smooth.shape)).clip(0, 255).astype("uint8")
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=85)
        images.append(stream.getvalue())
    return images


def export_tiny(folder: str, size: int, confidence: float) -> None:
    """Exports a small detector, in a process of its own, whose memory does not count."""
    import keras_resnest as kr
    from keras_resnest.detection.decoding import DetectionDecoder

    decoder = DetectionDecoder(confidence_threshold=confidence)
    model = kr.builders.refinedet_tiny(20, image_shape=(size, size, 3), decoder=decoder)
    model.export(folder)


# === Servers ===


def load_serve_bytes(folder, threads: int):
    """Returns the signature as a function: a list of files to a dictionary of arrays."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    loaded = tf.saved_model.load(str(folder))
    if "serve_bytes" not in loaded.signatures:
        raise ValueError(f"the SavedModel in {folder} has no signature serve_bytes")
    signature = loaded.signatures["serve_bytes"]

    def serve(files: list[bytes]) -> dict:
        answer = signature(image_bytes=tf.constant(files, tf.string))
        return {name: value.numpy() for name, value in answer.items()}

    serve.loaded = loaded  # keeps its variables alive
    return serve


@contextlib.contextmanager
def alone(serve):
    """Yields a function that answers one file, as a batch of one."""
    yield lambda image: {name: value[0] for name, value in serve([image]).items()}


@contextlib.contextmanager
def batched(serve, max_batch_size: int, timeout: float, threads: int):
    """Yields a function that answers one file, batched with those of other threads.

    Args:
        serve: function of a list of files.
        max_batch_size: files of a batch.
        timeout: seconds from the first file of a batch until it is run, full or not.
        threads: batches at a time.
    """
    waiting, collecting = queue.Queue(), threading.Lock()

    def collect():
        """Returns the next batch, None at the end. It also takes files that came in meanwhile."""
        batch = [waiting.get()]
        while batch[-1] and len(batch) < max_batch_size:
            left = batch[0][2] + timeout - time.perf_counter()
            try:
                batch.append(waiting.get(timeout=max(0.0, left)))
            except queue.Empty:
                break
        if batch[-1] is None:
            waiting.put(None)  # for the other threads
            batch.pop()
        return batch

    def work():
        while True:
            with collecting:
                batch = collect()
            if not batch:
                return
            files, futures, _ = zip(*batch, strict=True)
            try:
                answer = serve(list(files))
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
                continue
            for i, future in enumerate(futures):
                future.set_result({name: value[i] for name, value in answer.items()})

    def ask(image: bytes) -> dict:
        future = concurrent.futures.Future()
        waiting.put((image, future, time.perf_counter()))
        return future.result()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield ask
    finally:
        waiting.put(None)
        for worker in workers:
            worker.join()


@contextlib.contextmanager
def over_rest(address: tuple[str, int], model_name: str):
    """Yields a function that sends one file to a server; each client keeps its connection."""
    own = threading.local()
    path = f"/v1/models/{urllib.parse.quote(model_name)}:predict"

    def ask(image: bytes) -> dict:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
        row = {"image_bytes": {"b64": base64.b64encode(image).decode()}}
        body = json.dumps({"signature_name": "serve_bytes", "instances": [row]})
        try:
            own.connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = own.connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            own.connection.close()  # the next request reopens it
            raise
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {answer[:200].decode(errors='replace')}")
        return json.loads(answer)["predictions"][0]

    yield ask


# === The load ===


def resident_mib(pid="self") -> float:
    """Returns the resident memory of a process in MiB, nan if it cannot be read."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Load:
    """Sends requests from several threads and records latencies and memory.

    Args:
        ask: function of one file that returns the answer to it.
        images: files, sent in turns.
        memory: function that returns the resident memory in MiB.

    Attributes:
        latencies: seconds of every request that was answered.
        memories: MiB at the start and after each tenth of the requests.
        failures, unreadable: requests that raised; answers that the image is none.
        last_error: the last one that was raised.
    """

    def __init__(self, ask, images: list[bytes], memory=resident_mib):
        self.ask, self.images, self.memory = ask, images, memory
        self.lock = threading.Lock()
        self.latencies, self.memories = [], []
        self.failures = self.unreadable = self.done = 0
        self.last_error = None

    def run(self, requests: int, clients: int) -> "Load":
        """Sends all requests and waits for the answers."""
        self.memories.append(self.memory())
        marks = {-(-requests * tenth // TENTHS) for tenth in range(1, TENTHS + 1)}
        numbers = iter(range(requests))
        threads = [
            threading.Thread(target=self._client, args=(numbers, marks), daemon=True)
            for _ in range(clients)
        ]
        start, cpu_start = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.perf_counter() - start
        self.cpu_seconds = time.process_time() - cpu_start
        return self

    def _client(self, numbers, marks) -> None:
        while True:
            with self.lock:
                number = next(numbers, None)
            if number is None:
                return
            answer, error, start = None, None, time.perf_counter()
            try:
                answer = self.ask(self.images[number % len(self.images)])
            except Exception as caught:
                error = caught
            self._note(answer, error, time.perf_counter() - start, marks)

    def _note(self, answer, error, seconds: float, marks) -> None:
        with self.lock:
            self.done += 1
            if error is None:
                self.latencies.append(seconds)
                self.unreadable += not answer.get("readable", True)
            else:
                self.failures, self.last_error = self.failures + 1, error
            if self.done in marks:
                self.memories.append(self.memory())


def print_tables(loads: dict[str, Load], requests: int, own_process: bool) -> None:
    columns = ("images/s", "p50 ms", "p95 ms", "p99 ms", "CPU ms", "failed", "unreadable")
    print(f"{'':9}" + "".join(f"{column:>12}" for column in columns))
    for name, load in loads.items():
        percentiles = 1e3 * np.percentile(load.latencies or [np.nan], [50, 95, 99])
        cpu = 1e3 * load.cpu_seconds / requests if own_process else np.nan
        values = [len(load.latencies) / load.seconds, *percentiles, cpu]
        row = "".join("-".rjust(12) if np.isnan(v) else f"{v:12.1f}" for v in values)
        print(f"{name:9}{row}{load.failures:12d}{load.unreadable:12d}")
    if len(loads) == 2:
        rates = [len(load.latencies) / load.seconds for load in loads.values()]
        print(f"batched / alone: {rates[1] / rates[0]:.2f} times the images per second")
    if np.isnan([load.memories[-1] for load in loads.values()]).any():
        return
    print("\nresident memory, MiB, at the start and after each tenth of the requests")
    for name, load in loads.items():
        print(f"{name:9}" + "".join(f"{value:7.0f}" for value in load.memories))
    for name, load in loads.items():
        growth = load.memories[-1] - load.memories[1]
        print(f"{name}: growth after the first tenth {growth:+.1f} MiB")


# === Modes ===


def run_here(arguments, images) -> dict[str, Load]:
    """Runs both modes in this process, one after the other."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or export_elsewhere(f"{temporary}/1", arguments)
        serve = load_serve_bytes(folder, arguments.threads)
    largest, timeout = arguments.max_batch_size, arguments.batch_timeout / 1e3
    ways = {
        "alone": alone(serve),
        "batched": batched(serve, largest, timeout, arguments.batch_threads),
    }
    for size in range(1, largest + 1):  # the first batch of each size is slow
        serve(images[:1] * size)
    loads = {}
    for name, way in ways.items():
        if arguments.mode in (name, "both"):
            with way as ask:
                loads[name] = Load(ask, images).run(arguments.requests, arguments.clients)
    return loads


def export_elsewhere(folder: str, arguments) -> str:
    options = (folder, arguments.size, arguments.confidence)
    process = multiprocessing.get_context("spawn").Process(target=export_tiny, args=options)
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"no detector of --size {arguments.size} could be exported, see above")
    return folder


def run_against_server(arguments, images) -> dict[str, Load]:
    def memory():
        return resident_mib(arguments.pid) if arguments.pid else np.nan

    with over_rest(arguments.url, arguments.name) as ask:
        with contextlib.suppress(Exception):  # failures are counted below
            ask(images[0])  # warm-up
        return {"REST": Load(ask, images, memory).run(arguments.requests, arguments.clients)}


def main() -> int:
    arguments = parse_arguments()
    try:
        images = read_images(arguments.images)
        run = run_against_server if arguments.url else run_here
        loads = run(arguments, images)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = [len(image) / 2**10 for image in images]
    print(
        f"{arguments.requests} requests from {arguments.clients} clients, "
        f"{len(images)} files of {min(sizes):.0f} to {max(sizes):.0f} KiB"
    )
    print_tables(loads, arguments.requests, own_process=not arguments.url)
    failed = [load for load in loads.values() if load.failures]
    for load in failed:
        print(f"error: {load.failures} requests failed: {load.last_error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
