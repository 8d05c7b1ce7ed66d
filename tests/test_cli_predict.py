"""`keras-resnest predict`: a .keras file, a SavedModel, and a server over REST and gRPC."""

import contextlib
import csv
import json
import re
import socketserver
import threading
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_detector
from PIL import Image

from keras_resnest.cli import detectors, drawing, main
from keras_resnest.cli.common import Failure
from keras_resnest.data import read_detection
from keras_resnest.data.readers.detect_format import FORMATS
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.images import load_image
from keras_resnest.visualization import class_color

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf
from serving_stand_in import (
    KServeStandIn,
    RequestError,
    ServingStandIn,
    grpc_server,
    rest_server,
)

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
    root = tmp_path_factory.mktemp("predict")
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
    (root / "names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    return root


@pytest.fixture(scope="module")
def want(model, folder):
    """What `model.detect` finds in each readable file."""
    names = ("images/a.jpg", "images/b.png", "images/turned.jpg", "others/a.png")
    paths = [folder / name for name in names]
    found = dict(zip(paths, model.detect(paths, confidence_threshold=CONFIDENCE), strict=True))
    assert sum(len(one["labels"]) for one in found.values()) > 8
    return found


def predict(*arguments):
    return main(["predict", *arguments, "--confidence", CONFIDENCE])


def assert_records(folder, want):
    """detections.json holds the wanted detections."""
    records = json.loads((folder / "detections.json").read_text())
    for record, (path, one) in zip(records, want.items(), strict=True):
        assert Path(record["file"]) == path
        assert (record["height"], record["width"]) == load_image(path).shape[:2]
        found = record["detections"]
        np.testing.assert_allclose(
            np.reshape([d["box"] for d in found], (-1, 4)), one["boxes"], atol=0.02
        )
        np.testing.assert_allclose([d["confidence"] for d in found], one["confidence"], atol=2e-4)
        assert [d["label"] for d in found] == one["labels"].tolist()
        assert [d["class_name"] for d in found] == one["class_names"]
    return records


def assert_drawn(path, image_path):
    """A PNG of the size of the upright image that is not just a copy."""
    drawn, image = np.asarray(Image.open(path)), load_image(image_path)
    assert Image.open(path).format == "PNG" and drawn.shape == image.shape
    changed = (drawn != image).any(axis=-1).mean()
    assert changed > 0.01


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


def test_keras_file_with_everything(folder, want, tmp_path, capsys):
    arguments = [folder / "detector.keras", folder / "images", folder / "others/a.png"]
    options = ["--output", tmp_path, "--format", "both", "--batch-size", 3]
    assert predict(*arguments, *options) == 0
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err
    lines = [line for line in printed.out.splitlines() if line.startswith(str(folder))]
    assert [line.split(":")[0] for line in lines] == [str(p) for p in want]
    total = sum(len(one["labels"]) for one in want.values())
    assert f"4 images, {total} objects, 1 skipped" in printed.out.splitlines()[-1]

    records = assert_records(tmp_path, want)
    names = ("a_detections", "b_detections", "turned_detections", "a_detections_2")
    for name, path in zip(names, want, strict=True):
        assert_drawn(tmp_path / f"{name}.png", path)
    assert_table(tmp_path / "detections.csv", records)


@pytest.mark.parametrize("format", FORMATS)
def test_annotations_for_other_tools(folder, want, tmp_path, capsys, format):
    """The detections as a dataset, with the images in their folders."""
    options = ["--output", tmp_path, "--no-images", "--save-annotations", format]
    assert predict(folder / "detector.keras", *want, *options) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the turned image
        dataset = read_detection(tmp_path / "annotations")
    assert dataset.class_names == CLASS_NAMES and len(dataset) == len(want)
    copies = {Path(record.image).read_bytes(): record for record in dataset.records}
    for path, one in want.items():
        record = copies[path.read_bytes()]
        np.testing.assert_allclose(record.boxes, one["boxes"], atol=0.02)
        assert record.labels.tolist() == one["labels"].tolist()
    assert predict(folder / "detector.keras", *want, *options) == 2
    assert "--save-annotations: " in capsys.readouterr().err


def test_annotations_of_a_model_that_finds_nothing(folder, tmp_path):
    arguments = [folder / "serving/1", folder / "images/a.jpg", "--output", tmp_path]
    assert main(["predict", *arguments, "--confidence", 1, "--save-annotations", "voc"]) == 0
    dataset = read_detection(tmp_path / "annotations")
    assert dataset.class_names == CLASS_NAMES and dataset.report.num_boxes == 0


@pytest.mark.parametrize("signature", ["serving_default", "serve_bytes"])
def test_saved_model(folder, want, tmp_path, capsys, signature):
    """The same detections, though this model has the box format "rel_yxyx"; no other files."""
    options = ["--output", tmp_path / "out", "--no-images", "--format", "json"]
    assert predict(folder / "serving/1", *want, *options, "--signature", signature) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["detections.json"]
    assert_records(tmp_path / "out", want)
    assert "skipped" not in capsys.readouterr().out


def test_odd_images(folder, odd_images, tmp_path, capsys):
    assert predict(folder / "detector.keras", odd_images, "--output", tmp_path) == 0
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
    assert predict(folder / "serving/1", *broken, "--output", tmp_path / "out") == 1
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
        ("other.keras", "images", "not a RefineDet"),
    ],
)
def test_wrong_models_and_images(folder, model_name, images, word, tmp_path, capsys):
    if model_name == "other.keras":
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(folder / model_name)
        capsys.readouterr()
    arguments = [folder / model_name, folder / images, "--output", tmp_path / "out"]
    assert predict(*arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert re.match(f"error: .*{word}", printed.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["detector.keras", "x.jpg", "--confidence", "30"], "must be between 0 and 1, not 30"),
        (["x.keras", "x.jpg", "--confidence", "x.json"], "number or an existing file, not x.json"),
        (["detector.keras", "x.jpg", "--batch-size", "0"], "must be above 0, not 0"),
        (["detector.keras"], "required: IMAGE"),
    ],
)
def test_wrong_commands(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", *arguments])
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_a_model_with_nan_is_refused(model, folder, tmp_path, capsys):
    broken = small_detector(decoder=model.decoder)
    broken.variables[3].assign(broken.variables[3] * np.nan)
    broken.save(tmp_path / "broken.keras")
    assert predict(tmp_path / "broken.keras", folder / "images") == 2
    assert "broken.keras is not a usable model. 1 arrays hold NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, word",
    [
        (["--grpc", "localhost:8500"], "--grpc: only for servers"),
        (["--signature", "serve_bytes"], "--signature: only for SavedModels"),
        (["--overlap", "0"], "--overlap: only with --tiles"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(folder, options, word, capsys):
    assert predict(folder / "detector.keras", folder / "images", *options) == 2
    assert word in capsys.readouterr().err


# === Drawing ===


def test_drawing_touches_boxes_and_labels_alone():
    image = np.full((200, 300, 3), 128, "uint8")
    detection = {"box": [100, 80, 180, 160], "label": 1, "class_name": "green", "confidence": 0.5}
    drawn = np.asarray(drawing.draw_detections(image, [detection])).astype(int)
    color = np.round(255 * np.array(class_color(1)))
    for row, column in ((81, 140), (158, 140), (120, 101), (120, 178)):
        np.testing.assert_allclose(drawn[row, column], color, atol=1)
    assert (drawn[90:150, 110:170] == 128).all()  # inside
    assert (drawn[170:] == 128).all() and (drawn[:, :90] == 128).all()
    assert (drawn[62:78, 101:120] != 128).any()  # the label above


def test_labels_stay_inside_and_apart():
    text_box, placed = (0, 0, 60, 12), []
    for _ in range(4):
        placed.append(drawing.place_label(text_box, [0, 0, 200, 100], (200, 100), placed))
    for i, a in enumerate(placed):
        assert min(a) >= 0 and a[2] <= 200 and a[3] <= 100
        assert all(drawing.overlap_area(a, b) == 0 for b in placed[:i])


def test_images_are_never_overwritten(tmp_path):
    inputs = [tmp_path / "x.png", tmp_path / "x_detections.png"]
    used = {path.resolve() for path in inputs}
    paths = [drawing.unused_path(tmp_path, path.stem, used) for path in [inputs[0], *inputs]]
    names = [path.name for path in paths]
    assert names == [
        "x_detections_2.png",
        "x_detections_3.png",
        "x_detections_detections.png",
    ]


# === Servers ===


def test_tiles(model, folder, tmp_path, capsys):
    image, options = folder / "images/a.jpg", ("--output", tmp_path, "--no-images")
    assert predict(folder / "detector.keras", image, "--tiles", 64, 128, *options) == 0
    (record,) = json.loads((tmp_path / "detections.json").read_text())
    want = model.detect(image, CONFIDENCE, tiles=(64, 128))
    assert len(want["boxes"]) != len(model.detect(image, CONFIDENCE)["boxes"])
    np.testing.assert_allclose([d["box"] for d in record["detections"]], want["boxes"], atol=0.01)
    for name, tiles in (("detector.keras", (64, 100)), ("serving/1", (64, 128))):
        assert predict(folder / name, image, "--tiles", *tiles, *options) == 2
    errors = capsys.readouterr().err
    assert "multiples of 64" in errors and "--tiles: only for .keras files and presets" in errors


@pytest.fixture(scope="module")
def stand_in(folder):
    return ServingStandIn(folder / "serving/1", "detector")


@pytest.fixture(scope="module")
def url(stand_in):
    with rest_server(stand_in) as url:
        yield url


@pytest.fixture(scope="module")
def grpc_address(stand_in):
    pytest.importorskip("grpc")
    with grpc_server(stand_in) as address:
        yield address


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("signature", ["serve_bytes", "serving_default"])
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_every_way_to_the_server_gives_what_detect_gives(
    folder, url, grpc_address, want, tmp_path, protocol, signature
):
    """Over sockets: HTTP with JSON, and gRPC."""
    options = ["--signature", signature, "--class-names", folder / "names.txt"]
    options += ["--box-format", "rel_yxyx", "--output", tmp_path, "--no-images"]
    options += ["--grpc", grpc_address] if protocol == "grpc" else []
    assert predict(url, *want, *options) == 0
    assert_records(tmp_path, want)


def test_kserve_gives_what_detect_gives(model, folder, want, tmp_path, capsys):
    """The protocol of Triton and OpenVINO Model Server, answered by OpenVINO."""
    pytest.importorskip("openvino")
    model.export(tmp_path / "detector.xml", format="openvino")
    options = ["--protocol", "kserve", "--output", tmp_path, "--no-images"]
    with rest_server(KServeStandIn(tmp_path / "detector.xml", "detector")) as url:
        names = ["--class-names", folder / "names.txt"]
        assert predict(url, *want, *options, *names) == 0
        assert_records(tmp_path, want)
        assert predict(url, *want, *options, "--name", "other") == 1
        assert predict(url, *want, *options, "--signature", "serve_bytes") == 2
    assert "answers 400" in (errors := capsys.readouterr().err) and "--protocol kserve" in errors


def test_server_with_broken_images_and_drawing(folder, url, want, tmp_path, capsys):
    options = ["--class-names", folder / "names.txt", "--box-format", "rel_yxyx"]
    images = [folder / "images", folder / "others/a.png"]
    assert predict(url, *images, *options, "--output", tmp_path, "--batch-size", 2) == 0
    assert "broken.jpg" in capsys.readouterr().err
    assert_records(tmp_path, want)
    assert_drawn(tmp_path / "turned_detections.png", folder / "images/turned.jpg")


@pytest.mark.parametrize(
    "address, options, status, word",
    [
        ("URL", ["--name", "other"], 1, "answers 400"),
        ("http://127.0.0.1:9", [], 1, "http://127.0.0.1:9 cannot be reached"),
        ("URL", ["--grpc", "127.0.0.1:9"], 1, "127.0.0.1:9: UNAVAILABLE"),
        ("ftp://localhost:8501", [], 2, "must begin with http"),
    ],
)
def test_servers_that_fail(folder, url, tmp_path, capsys, address, options, status, word):
    image = folder / "images/a.jpg"
    address = url if address == "URL" else address
    assert predict(address, image, *options, "--output", tmp_path) == status
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and word in errors


def http_answer(body, status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def one_prediction(**changes):
    row = {"boxes": [[1.0, 2.0, 3.0, 4.0]], "confidence": [0.9], "labels": [0], **changes}
    return http_answer(json.dumps({"predictions": [row]}).encode())


ELSEWHERE = "127.0.0.1:1"
STRANGE_ANSWERS = {
    "none": (b"", "cannot be reached"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be reached"),
    "cut short": (http_answer(b"{}" * 99)[:-50], "is not JSON"),
    "no JSON": (http_answer(b"\x1b]0;title\x07"), "is not JSON"),
    "deep JSON": (http_answer(b"[" * 4000), "is not JSON"),
    "another object": (http_answer(b'["predictions"]'), "not that of a detector"),
    "no images": (http_answer(b'{"predictions": []}'), "0 results for 1 images"),
    "ragged": (one_prediction(boxes=[[1.0, 2.0], [3.0]]), "not that of a detector"),
    "three sides": (one_prediction(boxes=[[1.0, 2.0, 3.0]]), "shapes [[1, 3], [1], [1]]"),
    "fewer labels": (one_prediction(labels=[]), "shapes"),
    "words": (one_prediction(labels=["\x1b[2Jcat"]), "not that of a detector"),
    "NaN": (one_prediction(confidence=[float("nan")]), "no numbers"),
    "a box as large as numbers go": (one_prediction(boxes=[[0, 0, 1e308, 1]]), "box at 1e+308"),
    "a box that cannot be drawn": (one_prediction(boxes=[[-1e10, 0, 1, 1]]), "box at -1e+10"),
    "more than certain": (one_prediction(confidence=[2.0]), "a confidence of 2"),
    "unreadable": (one_prediction(readable=False), "the server cannot read the image"),
    "half a label": (one_prediction(labels=[0.5]), "no numbers"),
    "unknown label": (one_prediction(labels=[7]), "label 7, but there are 2 classes"),
    "escapes": (http_answer(b"\x1b[31mred\n", "500 Oops"), r"answers 500: '\x1b[31mred\n'"),
    "redirected": (http_answer(b"", "307 Go", f"Location: http://{ELSEWHERE}/"), "answers 307"),
    "moved": (http_answer(b"", "302 Go", f"Location: http://{ELSEWHERE}/"), "answers 302"),
    "too large": (http_answer(b" " * 5000), "more than 4096 bytes"),
    "byte by byte": (None, "did not answer within 1 s"),
}


@contextlib.contextmanager
def answering(answer):
    """URL of a server that sends these bytes, or one byte after the other for ever."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            self.wfile.write(answer if answer is not None else b"HTTP/1.1 200 OK\r\nX: ")
            with contextlib.suppress(OSError):
                while answer is None:
                    self.wfile.write(b"x")
                    time.sleep(0.2)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("kind", STRANGE_ANSWERS)
def test_strange_answers_end_in_one_sentence(folder, tmp_path, capsys, monkeypatch, kind):
    answer, words = STRANGE_ANSWERS[kind]
    monkeypatch.setattr(detectors, "MAX_ANSWER", 4096)
    monkeypatch.setattr(detectors, "TIMEOUT", 1 if answer is None else 30)
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    options = ["--class-names", tmp_path / "names.txt", "--output", tmp_path]
    with answering(answer) as url:
        assert predict(url, folder / "images/a.jpg", *options) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and words in errors
    assert errors.count("\n") == 1 and errors.rstrip("\n").isprintable()


@pytest.mark.parametrize("protocol", ["tensorflow", "kserve"])
@pytest.mark.parametrize("answer", [b"", b"7", b'{"metadata": 3}', b'{"inputs": [{"shape": "x"}]}'])
def test_strange_descriptions_of_models(folder, tmp_path, capsys, protocol, answer):
    options = ["--signature", "serving_default", "--protocol", protocol, "--output", tmp_path]
    with answering(http_answer(answer)) as url:
        assert predict(url, folder / "images/a.jpg", *options) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_grpc_answers_that_are_strange():
    """The last stands for 2**40 numbers in a few bytes."""
    pytest.importorskip("grpc")
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    huge = PredictResponse()
    for name in ("boxes", "confidence", "labels"):
        huge.outputs[name].CopyFrom(tf.make_tensor_proto(np.zeros(1, "float32")))
        huge.outputs[name].tensor_shape.dim[0].size = 2**40
    for answer in (b"\xff\xff", b"", huge.SerializeToString()):
        with pytest.raises(Failure, match="not that of a detector"):
            detectors.read_grpc_response(answer)


def test_refused_requests(stand_in):
    """A file that is not an image has an empty answer; an unknown signature is an error."""
    request = detectors.rest_request("serve_bytes", {"image_bytes": [b"no image"]})
    answer = json.loads(stand_in.rest("/v1/models/detector:predict", request))
    (one,) = answer["predictions"]
    assert one["readable"] is False and one["num_detections"] == 0
    request = detectors.rest_request("unknown", {"image_bytes": [b""]})
    with pytest.raises(RequestError, match="signature name not found"):
        stand_in.rest("/v1/models/detector:predict", request)


def test_rest_format():
    """As the documentation of TensorFlow Serving's REST interface has it."""
    body = detectors.rest_request("serve_bytes", {"image_bytes": [b"abc", b"\xff"]})
    assert json.loads(body) == {
        "signature_name": "serve_bytes",
        "instances": [{"image_bytes": {"b64": "YWJj"}}, {"image_bytes": {"b64": "/w=="}}],
    }
    answer = b"""{"predictions": [
        {"num_detections": 1, "labels": [2, -1], "confidence": [0.5, -1.0],
         "boxes": [[1.0, 2.0, 3.0, 4.5], [-1.0, -1.0, -1.0, -1.0]]}]}"""
    (one,) = detectors.read_rest_response(answer)
    one = detectors.check_answer(one, 3)
    assert one["boxes"].shape == (2, 4) and one["labels"].tolist() == [2, -1]
    with pytest.raises(Failure, match="not that of a detector"):
        detectors.read_rest_response(b'{"error": "no"}')


def test_grpc_format():
    """The same bytes as the official package makes, without it."""
    request = detectors.grpc_request(
        "detector", "serve_bytes", {"image_bytes": [b"abc", b"\xff\x00"]}
    )
    assert request.hex() == OFFICIAL_REQUEST
    (one,) = detectors.read_grpc_response(bytes.fromhex(OFFICIAL_RESPONSE))
    assert one["boxes"].tolist() == [[1.0, 2.0, 3.0, 4.5]]
    assert (one["confidence"].tolist(), one["labels"].tolist()) == ([0.5], [2])
