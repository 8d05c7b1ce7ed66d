"""The page of `keras-resnest demo` in a real browser, its runtime from npm, and bad input."""

import base64
import hashlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from browser import open_page
from detectors import WHOLE, rectangles, small_detector
from PIL import Image

from keras_resnest.backbones.weights.fetching import fetch_npm_package
from keras_resnest.cli import main
from keras_resnest.cli.demo import create_server
from keras_resnest.data import load_image
from keras_resnest.detection import DetectionDecoder
from keras_resnest.serving.demo import RUNTIME_FILES, write_demo

MESSAGE = "document.getElementById('message').innerText"
ROWS = "[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
CANVAS = """(() => { const canvas = document.querySelector("canvas");
  return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]; })()"""


@pytest.fixture(scope="module")
def model():
    """Finds many boxes of different confidence, in a format whose axes are exchanged."""
    model = small_detector(
        heads=WHOLE,
        bounding_box_format="center_yxhw",
        decoder=DetectionDecoder(confidence_threshold=0.1, max_detections=20),
    )
    rng = np.random.default_rng(0)
    heads = model.get_layer("odm")
    heads.set_weights([rng.normal(size=w.shape) / 5 for w in heads.weights])
    return model


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    """The folder of the demo; the test is skipped where the runtime cannot be had."""
    folder = tmp_path_factory.mktemp("demo") / "site"
    try:
        write_demo(model, folder)
    except ConnectionError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def address(site):
    with create_server(site, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with open_page(address, profile, "--window-size=1280,900") as page:
        page.wait(f"{MESSAGE}.startsWith('Drop an image')")
        yield page
        assert page.errors == []
        assert all(url.startswith((address, "blob:", "data:")) for url in page.addresses)


def choose(page, file) -> str:
    """Returns the message after a file was chosen."""
    page.choose("#file", file)
    return page.wait(
        f"{MESSAGE}.startsWith({json.dumps(file.name)}) && !/…$/.test({MESSAGE}) && {MESSAGE}"
    )


def set_confidence(page, value: float) -> None:
    page.run(
        "(() => { const slider = document.getElementById('confidence');"
        f"slider.value = {value}; slider.dispatchEvent(new Event('input')) }})()"
    )


def write_image(kind: str, folder: Path) -> Path:
    """Writes an image whose pixels browsers and Pillow could read differently."""
    pixels = rectangles(1, (150, 210, 3))[0][0].astype("uint8")
    image, path = Image.fromarray(pixels), folder / f"{kind}.png"
    if kind == "transparent":
        alpha = Image.fromarray(np.where(pixels[..., 0] > 110, 255, 0).astype("uint8"))
        image.putalpha(alpha)
    if kind == "turned":
        path, exif = path.with_suffix(".jpg"), Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif, quality=95)
        return path
    image.resize((30, 20)).save(path) if kind == "small" else image.save(path)
    return path


def check_boxes(page, model, path: Path) -> None:
    """The boxes on the page are those of `detect`, to 1 pixel."""
    found = model.detect(load_image(path))
    set_confidence(page, 0.2)
    message, rows = choose(page, path), page.run(ROWS)
    kept = found["confidence"] >= 0.2
    assert 5 < len(rows) == kept.sum(), message
    assert message.split(" ms")[0].startswith(f"{path.name}: {len(rows)} objects, ")
    assert [row[0] for row in rows] == [found["class_names"][i] for i in np.flatnonzero(kept)]
    np.testing.assert_allclose(
        [float(row[1]) for row in rows], found["confidence"][kept], atol=2e-3
    )
    y, x, height, width = found["boxes"][kept].T
    wanted = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    assert np.abs(np.array([row[2:] for row in rows], "float64") - wanted).max() < 1.0


def test_boxes_on_a_photograph_are_those_of_detect(page, model, shared):
    check_boxes(page, model, shared / "data/bccd/JPEGImages/BloodImage_00000.jpg")


@pytest.mark.parametrize("kind", ["plain", "transparent", "turned", "small"])
def test_boxes_are_those_of_detect(page, model, tmp_path, kind):
    check_boxes(page, model, write_image(kind, tmp_path))


def test_the_slider_hides_boxes(page, model, tmp_path):
    path = write_image("plain", tmp_path)
    choose(page, path)
    confidence, pixels = model.detect(path)["confidence"], load_image(path)
    for threshold in (0.0, float(np.median(confidence).round(2)), 1.0):
        set_confidence(page, threshold)
        count = int((confidence >= threshold).sum())
        assert len(page.run(ROWS)) == count
        assert f"{count} object" in page.run(MESSAGE)
        shown = np.array(page.run(CANVAS)).reshape(*pixels.shape[:2], 4)[..., :3]
        assert np.array_equal(shown, pixels) == (count == 0)


def test_a_dropped_image_is_like_a_chosen_one(page, tmp_path):
    path = write_image("plain", tmp_path)
    set_confidence(page, 0.2)
    choose(page, path)
    chosen = page.run(ROWS)
    drop = """(parts, name) => { const dataTransfer = new DataTransfer();
      if (name) dataTransfer.items.add(new File(parts, name));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true })); }"""
    page.run(f"({drop})([Uint8Array.from({list(path.read_bytes())})], 'dropped.png')")
    page.wait(f"{MESSAGE}.startsWith('dropped.png: ')")
    assert page.run(ROWS) == chosen != []
    page.run(f"({drop})([], '')")
    assert page.run(MESSAGE) == "What was dropped is not a file."


def test_mistakes_are_one_sentence_on_the_page(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    sentence = "broken.png is not an image that this browser can read."
    assert choose(page, broken) == sentence
    page.run("document.getElementById('camera').click()")
    assert page.wait(f"{MESSAGE} != {json.dumps(sentence)} && {MESSAGE}") == "There is no camera."
    assert page.run("document.getElementById('message').className") == "error"


def test_the_camera(address, tmp_path):
    options = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with open_page(address, tmp_path, *options) as page:
        page.wait(f"{MESSAGE}.startsWith('Drop an image')")
        page.run("document.getElementById('camera').click()")
        first = page.wait(f"{MESSAGE}.startsWith('Camera: ') && {MESSAGE}")
        page.wait(f"{MESSAGE} != {json.dumps(first)}")  # another frame took another time
        # A chosen file stops the camera.
        choose(page, write_image("plain", tmp_path))
        assert page.run("document.getElementById('camera').innerText") == "Use the camera"
        assert page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_any_screen(page, tmp_path, width, scheme):
    page.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=800,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    set_confidence(page, 0.2)
    choose(page, write_image("plain", tmp_path))
    wide = "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right >"
    assert page.run(f"{wide} innerWidth + 1).map(e => e.outerHTML)") == []
    color = page.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, color[4:-1].split(","))) < 80) == (scheme == "dark")


# === The runtime from npm ===


class Registry(BaseHTTPRequestHandler):
    """A loopback registry for npm, with one package."""

    def do_GET(self):
        content, name = self.server.content, self.path.strip("/")
        if not name.endswith(".tgz"):
            checksum = base64.b64encode(hashlib.sha512(content).digest()).decode()
            dist = {"integrity": f"sha512-{checksum}"}
            dist["tarball"] = f"http://127.0.0.1:{self.server.server_port}/{name}.tgz"
            versions = {"1.2.3": {"name": name, "version": "1.2.3", "dist": dist}}
            content = json.dumps({"name": name, "dist-tags": {}, "versions": versions}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def package(folder: Path, names=RUNTIME_FILES) -> Path:
    """Writes an archive as npm's, with short files."""
    files = {"package.json": b'{"name": "some", "version": "1.2.3"}'}
    files |= {f"dist/{name}": name.encode() for name in names}
    with tarfile.open(folder / "package.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "package.tgz"


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_fetches_the_package_once_and_its_checksum_counts(tmp_path, monkeypatch):
    content = package(tmp_path).read_bytes()
    integrity = f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        server.content = content
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match=r"some-1.2.3.tgz .* not the published file"):
            fetch_npm_package("some", "1.2.3", "sha512-other")
        with pytest.raises(ConnectionError, match=r"some-9.9.9.tgz could not be fetched"):
            fetch_npm_package("some", "9.9.9", integrity)
        path = fetch_npm_package("some", "1.2.3", integrity)
        server.shutdown()
    assert path.read_bytes() == content and [*path.parent.iterdir()] == [path]
    assert fetch_npm_package("some", "1.2.3", integrity) == path  # without the server
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"npm, .*missing.*--runtime takes"):
        write_demo("some.onnx", tmp_path / "site")


# === The command ===


@pytest.fixture
def exported(tmp_path):
    """An .onnx file with metadata; nothing but the page reads the first."""
    facts = {"task": "detection", "decode": True, "image_shape": [64, 128, 3]}
    facts |= {"bounding_box_format": "rel_xywh", "class_names": ["a"], "decoder": {}}
    (tmp_path / "some.onnx").write_bytes(b"onnx")
    (tmp_path / "some.onnx.json").write_text(json.dumps(facts))
    return tmp_path / "some.onnx"


def test_the_command_writes_again_and_serves_until_ctrl_c(exported, tmp_path):
    output, archive = tmp_path / "site", package(tmp_path)
    command = ["demo", exported, "--output", output]
    assert main([*command, "--no-serve", "--runtime", archive]) == 0
    assert json.loads((output / "demo.json").read_text())["title"] == "Detector for a"
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    folder.mkdir(parents=True)
    (output / RUNTIME_FILES[0]).rename(folder / RUNTIME_FILES[0])
    (output / RUNTIME_FILES[1]).rename(folder / RUNTIME_FILES[1])
    options = [*command, "--port", 0, "--runtime", folder]
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_resnest", *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = next(line for line in process.stdout if line.startswith("http://127.0.0.1:"))
        for name in (*RUNTIME_FILES, "model.onnx", "demo.json", ""):
            with urllib.request.urlopen(f"{line.split()[0]}/{name}") as answer:
                content, kind = answer.read(), answer.headers["Content-Type"]
            assert content == (output / (name or "index.html")).read_bytes()
            assert name not in RUNTIME_FILES or kind in ("text/javascript", "application/wasm")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
    # Boxes (left, top, width, height), as fractions of 128 x 64 pixels.
    matrix = json.loads((output / "demo.json").read_text())["to_xyxy"]
    np.testing.assert_allclose(np.array([0.25, 0.5, 0.5, 0.25]) @ matrix, [32, 32, 96, 48])


def test_bad_input(exported, tmp_path, capsys):
    output, archive = tmp_path / "site", package(tmp_path)

    def error(model=exported, *options, runtime=archive):
        arguments = ["--output", output, "--runtime", runtime, *options]
        assert main(["demo", model, *arguments]) == 2
        assert not output.exists() or output == tmp_path
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert f"--port {port} is in use" in error(exported, "--port", port)
    options = (exported, "--no-serve")
    assert "no.onnx" in error(tmp_path / "no.onnx", "--no-serve")
    assert "no such model" in error(tmp_path / "no.keras", "--no-serve")
    assert RUNTIME_FILES[0] in error(*options, runtime=tmp_path)
    assert RUNTIME_FILES[1] in error(*options, runtime=package(tmp_path, RUNTIME_FILES[:1]))
    assert "nothing.tgz" in error(*options, runtime=tmp_path / "nothing.tgz")
    archive.write_bytes(package(tmp_path).read_bytes()[:100])
    assert "package.tgz" in error(*options)
    package(tmp_path)
    metadata = exported.with_name("some.onnx.json")
    facts = json.loads(metadata.read_text())
    for change, words in (({"decode": False}, "raw outputs"), ({"task": "classification"}, "for")):
        metadata.write_text(json.dumps({**facts, **change}))
        assert words in error(*options)
    metadata.unlink()
    assert "some.onnx.json" in error(*options)
    output, before = tmp_path, sorted(tmp_path.iterdir())
    assert "new or empty folder" in error(*options)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(SystemExit):
        main(["demo", exported, "--port", 70000])
    assert "must be between 0 and 65535" in capsys.readouterr().err
