"""A folder with one page that runs an exported detector in the browser."""

import json
import os
import pathlib
import shutil
import tarfile
import tempfile
import zlib

import numpy as np

from keras_resnest.atomic import atomic_folder
from keras_resnest.backbones.weights.fetching import fetch_npm_package
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.serving.export import export_model
from keras_resnest.visualization import class_color

RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_INTEGRITY = (
    "sha512-"
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
FACTS = "demo.json"
MAX_NAMES = 6  # in the title
# Places of `RUNTIME_FILES` in a folder: itself, an installed package, an unpacked one.
RUNTIME_FOLDERS = ("", "dist", "package/dist", f"node_modules/{RUNTIME}/dist")


def write_demo(model, folder: str | os.PathLike, runtime: str | os.PathLike | None = None) -> None:
    """Writes a page that detects objects in files and in the camera's images.

    The model runs in the browser. The folder holds all that the page needs, onnxruntime's
    WebAssembly build too; any web server for files can serve it.

    Args:
        model: a `RefineDet`, or the `.onnx` file of one from `export_model`, beside its
            `.onnx.json`.
        folder: new or empty folder, or one that this function has written.
        runtime: folder or `.tgz` file of the npm package onnxruntime-web. If None, npm fetches it
            once, to Keras' cache.

    Raises:
        ValueError: if the file does not decode boxes or is of no detector, `folder` has other
            content, or files are missing in `runtime`.
        ConnectionError: if npm is missing or cannot fetch the package.
        ModuleNotFoundError: if a package for exporting is missing.

    Example:
        >>> write_demo(model, "demo")  # then: python -m http.server --directory demo
    """
    with tempfile.TemporaryDirectory() as exported, atomic_folder(folder, [FACTS]) as new:
        _copy_runtime(runtime, new)
        if not isinstance(model, str | os.PathLike):
            file = os.path.join(exported, f"{model.name}.onnx")
            export_model(model, file, "onnx")
            model = file
        (new / FACTS).write_text(json.dumps(_page_facts(pathlib.Path(model))), "utf-8")
        shutil.copyfile(model, new / "model.onnx")
        shutil.copyfile(pathlib.Path(__file__).with_name("demo.html"), new / "index.html")


def _page_facts(model: pathlib.Path) -> dict:
    """Returns the metadata of a model with what the page needs besides."""
    facts = _read_metadata(model)
    labels = range(len(facts["class_names"] or range(100)))
    colors = [[round(255 * value) for value in class_color(label)] for label in labels]
    # Every box format is a linear map of the others: its matrix, to pixels of the model's image.
    height, width, _ = facts["image_shape"]
    matrix = convert_boxes(np.eye(4), facts["bounding_box_format"], "xyxy", height, width)
    return {
        **facts,
        "title": _title(facts["class_names"]) or model.stem,
        "colors": [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colors],
        "to_xyxy": np.asarray(matrix).tolist(),
    }


def _title(class_names: list[str] | None) -> str:
    if not class_names:
        return ""
    more = f" and {len(class_names) - MAX_NAMES} more" if len(class_names) > MAX_NAMES else ""
    return f"Detector for {', '.join(class_names[:MAX_NAMES])}{more}"


def _read_metadata(model: pathlib.Path) -> dict:
    if model.suffix != ".onnx" or not model.is_file():
        raise ValueError(f"The model must be an existing .onnx file. Received: {model}")
    file = model.with_name(f"{model.name}.json")
    try:
        facts = json.loads(file.read_text("utf-8"))
        is_detector = facts["task"] == "detection"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{model} needs the file {file.name} that `export` writes beside it: {error}"
        ) from error
    if not (is_detector and facts["decode"]):
        received = "raw outputs (decode=False)" if is_detector else f"a model for {facts['task']}"
        raise ValueError(f"{model} must be a detector that decodes boxes. Received: {received}")
    return facts


def _copy_runtime(runtime, folder: pathlib.Path) -> None:
    """Copies `RUNTIME_FILES` from a folder, or from an archive of npm."""
    if runtime is None:
        try:
            runtime = fetch_npm_package(RUNTIME, RUNTIME_VERSION, RUNTIME_INTEGRITY)
        except ConnectionError as error:
            hint = f"--runtime takes a folder or .tgz file of {RUNTIME} without network"
            raise ConnectionError(f"{error}. {hint}") from error
    runtime = pathlib.Path(runtime)
    try:
        if runtime.is_dir():
            places = [runtime / place for place in RUNTIME_FOLDERS]
            place = next((p for p in places if (p / RUNTIME_FILES[0]).is_file()), runtime)
            for name in RUNTIME_FILES:
                shutil.copyfile(place / name, folder / name)
        else:
            with tarfile.open(runtime) as archive:
                for name in RUNTIME_FILES:
                    content = archive.extractfile(f"package/dist/{name}").read()
                    (folder / name).write_bytes(content)
    except (FileNotFoundError, KeyError, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f"The runtime must be a folder or .tgz file of {RUNTIME} with "
            f"{' and '.join(RUNTIME_FILES)}. Received: {runtime} ({error})"
        ) from error
