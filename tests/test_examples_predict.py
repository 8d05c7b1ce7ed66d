"""The programs that find objects in images: examples/predict.py and examples/serve_client.py."""

import concurrent.futures
import csv
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_detector
from PIL import Image

from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.images import load_image
from keras_resnest.visualization import class_color

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import predict  # noqa: E402
import serve_client  # noqa: E402

CONFIDENCE = 0.95
ORIENTATION = 0x0112  # the EXIF tag

# The same messages, built and serialized with tensorflow-serving-api 2.21.0.
OFFICIAL_REQUEST = (
    "0a170a086465746563746f721a0b73657276655f627974657312200a0b696d6167655f62797465731211080712"
    "041202080242036162634202ff00"
)
OFFICIAL_RESPONSE = (
    "0a2b0a05626f78657312220801120c12020801120208011202080422100000803f000000400000404000009040"
    "0a200a0a636f6e666964656e636512120801120812020801120208012a040000003f0a190a066c6162656c73120f"
    "0803120812020801120208013a01020a1d0a0e6e756d5f646574656374696f6e73120b08031204120208013a0101"
    "121b0a086465746563746f72120208011a0b73657276655f6279746573"
)


@pytest.fixture(scope="module")
def model():
    return small_detector(decoder=DetectionDecoder(max_detections=30))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A `.keras` file, a SavedModel of the same weights in another box format, and images."""
    root = tmp_path_factory.mktemp("examples")
    model.save(root / "detector.keras")
    relative = small_detector(decoder=model.decoder, bounding_box_format="rel_yxyx")
    relative.set_weights(model.get_weights())
    relative.export(root / "serving/1")
    for name in ("images", "others", "empty"):
        (root / name).mkdir()
    wide, tall = (
        rectangles(1, (96, 200, 3), seed=4)[0][0],
        rectangles(1, (150, 90, 3), seed=5)[0][0],
    )
    wide, tall = (Image.fromarray(array.astype("uint8")) for array in (wide, tall))
    wide.save(root / "images/a.jpg")
    tall.save(root / "images/b.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    tall.save(root / "images/turned.jpg", exif=exif)
    (root / "images/broken.jpg").write_bytes((root / "images/a.jpg").read_bytes()[:900])
    (root / "images/notes.txt").write_text("no image")
    tall.save(root / "others/a.png")
    return root


def good_images(folder):
    names = ("images/a.jpg", "images/b.png", "images/turned.jpg", "others/a.png")
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def want(model, folder):
    """File to what `model.detect` finds in it."""
    paths = good_images(folder)
    found = dict(zip(paths, model.detect(paths, confidence_threshold=CONFIDENCE), strict=True))
    assert sum(len(one["labels"]) for one in found.values()) > 8
    return found


def program(name, *arguments):
    """Runs an example as a user does."""
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def assert_record(record, path, one):
    assert Path(record["file"]) == path
    assert (record["height"], record["width"]) == load_image(path).shape[:2]
    found = record["detections"]
    np.testing.assert_allclose(
        np.reshape([d["box"] for d in found], (-1, 4)), one["boxes"], atol=0.02
    )
    np.testing.assert_allclose([d["confidence"] for d in found], one["confidence"], atol=2e-4)
    assert [d["label"] for d in found] == one["labels"].tolist()
    assert [d["class_name"] for d in found] == one["class_names"]


def assert_drawn(path, image_path):
    """A PNG of the size of the upright image that is not just a copy."""
    drawn, image = np.asarray(Image.open(path)), load_image(image_path)
    assert Image.open(path).format == "PNG" and drawn.shape == image.shape
    changed = (drawn != image).any(axis=-1).mean()
    assert changed > 0.01


# === predict.py ===


def test_keras_file_with_everything(folder, want, tmp_path):
    done = program(
        *("predict.py", folder / "detector.keras", folder / "images", folder / "others/a.png"),
        *("--output", tmp_path, "--confidence", CONFIDENCE, "--format", "both"),
        *("--batch-size", 3),
    )
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stderr and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [str(p) for p in want]
    total = sum(len(one["labels"]) for one in want.values())
    assert f"4 images, {total} objects, 1 skipped" in lines[-1]

    records = json.loads((tmp_path / "detections.json").read_text())
    for record, (path, one) in zip(records, want.items(), strict=True):
        assert_record(record, path, one)
    names = ("a_detections", "b_detections", "turned_detections", "a_detections_2")
    for name, path in zip(names, want, strict=True):
        assert_drawn(tmp_path / f"{name}.png", path)
    assert_table(tmp_path / "detections.csv", records)


def assert_table(path, records):
    """The CSV says what the JSON says."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    flat = [(record, d) for record in records for d in record["detections"]]
    assert len(rows) == len(flat)
    for row, (record, d) in zip(rows, flat, strict=True):
        assert row["file"] == record["file"] and row["class_name"] == d["class_name"]
        assert [float(row[k]) for k in ("x1", "y1", "x2", "y2")] == d["box"]
        assert (int(row["width"]), int(row["height"])) == (record["width"], record["height"])
        assert float(row["confidence"]) == d["confidence"] and int(row["label"]) == d["label"]


def test_saved_model(folder, want, tmp_path, capsys):
    """The same detections, though this model speaks "rel_yxyx"; and nothing but what was asked."""
    files = good_images(folder)
    options = ["--output", tmp_path / "out", "--confidence", CONFIDENCE, "--no-images"]
    arguments = [folder / "serving/1", *files, *options, "--format", "json"]
    assert predict.main([str(a) for a in arguments]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["detections.json"]
    records = json.loads((tmp_path / "out/detections.json").read_text())
    for record, (path, one) in zip(records, want.items(), strict=True):
        assert_record(record, path, one)
    assert "skipped" not in capsys.readouterr().out


def test_odd_images(folder, shared, tmp_path, capsys):
    odd = shared / "data/photos/odd"
    arguments = [folder / "detector.keras", odd, "--output", tmp_path, "--confidence", "0.9"]
    assert predict.main([str(a) for a in arguments]) == 0
    records = json.loads((tmp_path / "detections.json").read_text())
    sizes = {Path(r["file"]).name: (r["width"], r["height"]) for r in records}
    assert sizes == {
        "cmyk.jpg": (320, 240),
        "exif_orientation6.jpg": (320, 212),
        "grayscale.jpg": (320, 213),
        "one_pixel.png": (1, 1),
        "rgba.png": (240, 160),
    }
    for name, size in sizes.items():
        with Image.open(tmp_path / f"{Path(name).stem}_detections.png") as drawn:
            assert drawn.size == size
    errors = capsys.readouterr().err
    assert "truncated.jpg" in errors and "text_not_image.jpg" in errors


def test_no_image_can_be_read(folder, tmp_path, capsys):
    broken = [folder / "images/broken.jpg", tmp_path / "missing.jpg"]
    arguments = [folder / "serving/1", *broken, "--output", tmp_path / "out"]
    assert predict.main([str(a) for a in arguments]) == 1
    errors = capsys.readouterr().err
    assert "broken.jpg" in errors and "missing.jpg" in errors
    assert errors.splitlines()[-1] == "error: none of the 2 images could be read"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "model_name, images, word",
    [
        ("nothing.keras", "images", "no such model: .*nothing.keras"),
        ("detector.keras", "empty", "No images in .*empty"),
        ("images/notes.txt", "images", "notes.txt is not a usable model"),
        ("images", "images", "images is not a usable model"),
    ],
)
def test_wrong_commands(folder, model_name, images, word, tmp_path, capsys):
    arguments = [folder / model_name, folder / images, "--output", tmp_path / "out"]
    assert predict.main([str(a) for a in arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert re.match(f"error: .*{word}", printed.err)


def test_wrong_commands_end_at_once_without_traceback(folder):
    """Before TensorFlow is imported."""
    done = program("predict.py", folder / "nothing.keras", folder / "images")
    assert done.returncode == 2 and done.stderr.startswith("error: no such model")
    done = program("predict.py", folder / "detector.keras", "x.jpg", "--confidence", "30")
    assert done.returncode == 2 and "must be between 0 and 1, not 30" in done.stderr
    done = program("serve_client.py", "x.jpg")
    assert done.returncode == 2 and "--saved-model" in done.stderr


def test_another_model_is_refused(folder, tmp_path, capsys):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "other.keras")
    arguments = [tmp_path / "other.keras", folder / "images", "--output", tmp_path / "out"]
    assert predict.main([str(a) for a in arguments]) == 2
    assert "not a RefineDet" in capsys.readouterr().err


def test_drawing_touches_boxes_and_labels_alone():
    image = np.full((200, 300, 3), 128, "uint8")
    detection = {"box": [100, 80, 180, 160], "label": 1, "class_name": "green", "confidence": 0.5}
    drawn = np.asarray(predict.draw_detections(image, [detection])).astype(int)
    color = np.round(255 * np.array(class_color(1)))
    for row, column in ((81, 140), (158, 140), (120, 101), (120, 178)):
        np.testing.assert_allclose(drawn[row, column], color, atol=1)
    assert (drawn[90:150, 110:170] == 128).all()  # inside
    assert (drawn[170:] == 128).all() and (drawn[:, :90] == 128).all()
    assert (drawn[62:78, 101:120] != 128).any()  # the label above


def test_labels_stay_inside_and_apart():
    text_box, placed = (0, 0, 60, 12), []
    for _ in range(4):
        placed.append(predict.place_label(text_box, [0, 0, 200, 100], (200, 100), placed))
    for i, a in enumerate(placed):
        assert min(a) >= 0 and a[2] <= 200 and a[3] <= 100
        assert all(predict._overlap(a, b) == 0 for b in placed[:i])


def test_images_are_never_overwritten(tmp_path):
    image = np.zeros((20, 20, 3), "uint8")
    inputs = [tmp_path / "x.png", tmp_path / "x_detections.png"]
    writer = predict.ImageWriter(tmp_path, inputs)
    record = {"detections": []}
    names = [writer.write(path, image, record).name for path in [inputs[0], *inputs]]
    assert names == [
        "x_detections_2.png",
        "x_detections_3.png",
        "x_detections_detections.png",
    ]


# === serve_client.py ===


@pytest.fixture(scope="module")
def local_server(folder):
    return serve_client.LocalServer(folder / "serving/1", "detector")


@pytest.fixture(scope="module")
def url(local_server):
    """A web server on this machine that answers with the SavedModel."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body):
            try:
                status, text = 200, local_server.rest(self.path, body)
            except serve_client.ServingError as error:
                status, text = 400, str(error).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            self.answer(self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def grpc_address(local_server):
    """A gRPC server on this machine that answers with the SavedModel."""
    grpc = pytest.importorskip("grpc")
    predict_method = grpc.unary_unary_rpc_method_handler(
        lambda request, context: local_server.grpc(request)
    )
    service = grpc.method_handlers_generic_handler(
        "tensorflow.serving.PredictionService", {"Predict": predict_method}
    )
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def names_file(folder):
    path = folder / "names.txt"
    path.write_text("\n".join(CLASS_NAMES) + "\n")
    return path


@pytest.mark.parametrize("signature", ["serve_bytes", "serving_default"])
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_every_way_to_the_server_gives_what_detect_gives(
    url, grpc_address, no_proxy, want, protocol, signature
):
    """Over sockets: HTTP with JSON, and gRPC."""
    grpc = serve_client.grpc_channel(grpc_address) if protocol == "grpc" else None
    rest = serve_client.HttpChannel(url)
    client = serve_client.Client(rest, grpc, "detector", signature, "rel_yxyx", CLASS_NAMES)
    answers = client.detect(list(want), [load_image(path) for path in want])
    for answer, path in zip(answers, want, strict=True):
        found = predict.select(answer, CONFIDENCE, CLASS_NAMES)
        assert_record(predict.make_record(path, load_image(path), found), path, want[path])


def test_client_over_http(folder, url, want, tmp_path):
    done = program(
        *("serve_client.py", folder / "images", folder / "others/a.png", "--url", url),
        *("--class-names", names_file(folder), "--box-format", "rel_yxyx"),
        *("--confidence", CONFIDENCE, "--output", tmp_path, "--batch-size", 2),
    )
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stderr and "Traceback" not in done.stderr
    objects = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    names = [name for one in want.values() for name in one["class_names"]]
    assert [line.split()[0] for line in objects] == names
    assert_drawn(tmp_path / "turned_detections.png", folder / "images/turned.jpg")


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_client_without_a_server(folder, want, capsys, protocol):
    path = folder / "images/turned.jpg"
    arguments = [path, "--saved-model", folder / "serving/1", "--protocol", protocol]
    assert serve_client.main([*map(str, arguments), "--confidence", str(CONFIDENCE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: ")
    boxes = want[path]["boxes"]
    assert len(lines) == 1 + len(boxes)
    x1, y1, x2, y2 = boxes[0]
    assert lines[1].endswith(f"x {x1:.1f} to {x2:.1f}, y {y1:.1f} to {y2:.1f}")


def test_client_says_what_went_wrong(folder, url, no_proxy, capsys):
    image, broken = str(folder / "images/a.jpg"), str(folder / "images/broken.jpg")
    assert serve_client.main([image, "--url", url, "--name", "other"]) == 1
    assert "answers 400" in capsys.readouterr().err
    assert serve_client.main([image, "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert serve_client.main([image, "--url", url, "--grpc", "127.0.0.1:9"]) == 1
    assert "127.0.0.1:9: UNAVAILABLE" in capsys.readouterr().err
    assert serve_client.main([broken, "--url", url]) == 1
    assert "none of the 1 images" in capsys.readouterr().err
    for arguments in (
        [image, "--saved-model", str(folder / "images")],
        [str(folder / "empty"), "--url", url],
        [image, "--url", "localhost:8501"],
    ):
        assert serve_client.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_refused_requests(local_server):
    """The stand-in refuses what the server refuses; what is no image has an empty answer."""
    request = serve_client.rest_request("serve_bytes", {"image_bytes": [b"no image"]})
    answer = json.loads(local_server.rest("/v1/models/detector:predict", request))
    (one,) = answer["predictions"]
    assert one["readable"] is False and one["num_detections"] == 0
    request = serve_client.rest_request("unknown", {"image_bytes": [b""]})
    with pytest.raises(serve_client.ServingError, match="signature name not found"):
        local_server.rest("/v1/models/detector:predict", request)


def test_rest_format():
    """As the documentation of TensorFlow Serving's REST interface has it."""
    body = serve_client.rest_request("serve_bytes", {"image_bytes": [b"abc", b"\xff"]})
    assert json.loads(body) == {
        "signature_name": "serve_bytes",
        "instances": [{"image_bytes": {"b64": "YWJj"}}, {"image_bytes": {"b64": "/w=="}}],
    }
    answer = b"""{"predictions": [
        {"num_detections": 1, "labels": [2, -1], "confidence": [0.5, -1.0],
         "boxes": [[1.0, 2.0, 3.0, 4.5], [-1.0, -1.0, -1.0, -1.0]]}]}"""
    (one,) = serve_client.read_rest_response(answer)
    assert one["boxes"].shape == (2, 4) and one["labels"].tolist() == [2, -1]
    with pytest.raises(serve_client.ServingError, match="not that of a detector"):
        serve_client.read_rest_response(b'{"error": "no"}')


def test_grpc_format():
    """The same bytes as the official package makes, without it."""
    request = serve_client.grpc_request(
        "detector", "serve_bytes", {"image_bytes": [b"abc", b"\xff\x00"]}
    )
    assert request.hex() == OFFICIAL_REQUEST
    (one,) = serve_client.read_grpc_response(bytes.fromhex(OFFICIAL_RESPONSE))
    assert one["boxes"].tolist() == [[1.0, 2.0, 3.0, 4.5]]
    assert (one["confidence"].tolist(), one["labels"].tolist()) == ([0.5], [2])
