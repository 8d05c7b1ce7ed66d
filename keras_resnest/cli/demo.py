"""Writes and serves a page that runs a detector in the browser.

    keras-resnest demo runs/train/detector.keras
    keras-resnest demo detector.onnx --output site --no-serve
    keras-resnest demo detector.keras --runtime onnxruntime-web-1.30.0.tgz

Drop an image on the page or use the camera: it shows boxes with class names and the time for each
image, computed by onnxruntime-web, which npm fetches once. The folder needs no network and can be
served by any web server for files.
"""

import argparse
import contextlib
import errno
import functools
import http.server
from pathlib import Path

from keras_resnest.cli.common import check_output, open_detector, refuse_options, writing_results
from keras_resnest.serving.demo import write_demo

HOST = "127.0.0.1"


def port(text: str) -> int:
    """An argparse type: a port, 0 for any free one."""
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"must be between 0 and 65535, not {text}")
    return number


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file or preset of a detector, or exported .onnx")
    add("--output", type=Path, default=Path("runs/demo"), help="folder; default: %(default)s")
    add("--port", type=port, help="0: any that is free; default: 8000")
    add("--no-serve", action="store_true", help="only write the folder")
    text = "folder or .tgz of the npm package onnxruntime-web; default: fetched once by npm"
    add("--runtime", type=Path, metavar="FOLDER|FILE", help=text)


def run(arguments) -> int:
    check_output(arguments.output)
    if arguments.no_serve:
        refuse_options(arguments, ["port"], "without --no-serve")
        write(arguments)
        return 0
    # The server is there before the work, so that a used port is noticed.
    port = 8000 if arguments.port is None else arguments.port
    with create_server(arguments.output, port) as server:
        write(arguments)
        print(f"http://{HOST}:{server.server_port} until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def write(arguments) -> None:
    model = arguments.model
    if not model.endswith(".onnx"):
        model = open_detector(model)
    with writing_results(arguments.output):
        write_demo(model, arguments.output, arguments.runtime)
    print(f"The page is in {arguments.output}")


class Handler(http.server.SimpleHTTPRequestHandler):
    # The registry of Windows may hold other types, which browsers refuse.
    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self):
        # Browsers let only isolated pages use several threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments):
        pass


def create_server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Returns a server of a folder that listens on this machine alone."""
    try:
        return http.server.ThreadingHTTPServer(
            (HOST, port), functools.partial(Handler, directory=folder)
        )
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"is unusable ({error})"
        raise ValueError(f"--port {port} {reason}: choose another one, or 0 for any") from error
