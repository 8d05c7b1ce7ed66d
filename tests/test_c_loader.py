"""The exported SavedModel in a C program: the loader of TensorFlow Serving, without Python."""

import io
import pathlib
import shutil
import subprocess

import keras
import numpy as np
import pytest
from detectors import rectangles, small_detector

from keras_resnest.detection.decoding import DetectionDecoder

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

# So few that random weights leave no near ties, and the lists end with padding.
DECODER = DetectionDecoder(confidence_threshold=0.9, max_detections=40)
OUTPUTS = ("boxes", "confidence", "labels", "num_detections")  # and more, maybe


class Loader:
    """The compiled program."""

    def __init__(self, program):
        self.program = program

    def run(self, *arguments):
        return subprocess.run(
            [str(a) for a in (self.program, *arguments)], capture_output=True, text=True, timeout=60
        )

    def call(self, folder, signature, kind, *files):
        """Sends files to a signature with one input; returns the finished process."""
        signature = signature_of(folder, signature)
        (tensor,) = signature.inputs.values()
        outputs = [output.name for output in signature.outputs.values()]
        return self.run(folder, kind, tensor.name, *files, "--", *outputs)

    def answer(self, folder, signature, kind, *files):
        """The same; returns the outputs of the signature as arrays."""
        done = self.call(folder, signature, kind, *files)
        assert done.returncode == 0, done.stderr
        arrays = read_arrays(done.stdout)
        outputs = signature_of(folder, signature).outputs
        return {key: arrays[output.name] for key, output in outputs.items()}


def signature_of(folder, name):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    return proto.meta_graphs[0].signature_def[name]


def read_arrays(text):
    """What the program prints: a line with name, type and dimensions, and one with values."""
    lines = text.split("\n")
    assert lines.pop() == "" and len(lines) % 2 == 0
    arrays = {}
    for header, values in zip(lines[::2], lines[1::2], strict=True):
        name, dtype, *dims = header.split(" ")
        convert = float if dtype.startswith("float") else int
        flat = np.array([convert(value) for value in values.split()], dtype)
        arrays[name] = flat.reshape([int(d) for d in dims])
    return arrays


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    include, folder = (pathlib.Path(f()) for f in (tf.sysconfig.get_include, tf.sysconfig.get_lib))
    libraries = [folder / f"libtensorflow_{n}.so.2" for n in ("cc", "framework")]
    for path in (include / "tensorflow/c/c_api.h", *libraries):
        if not path.exists():
            pytest.skip(f"this TensorFlow comes without {path.name}")
    program = tmp_path_factory.mktemp("loader") / "saved_model_loader"
    source = pathlib.Path(__file__).parent / "saved_model_loader.c"
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-isystem", include, source]
    command += [*libraries, f"-Wl,-rpath,{folder}", "-o", program]
    built = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Loader(program)


@pytest.fixture(scope="module")
def model():
    return small_detector(decoder=DECODER)


@pytest.fixture(scope="module")
def detector(model, tmp_path_factory):
    """Folder of the exported detector."""
    folder = tmp_path_factory.mktemp("exported") / "1"
    model.export(folder)
    return folder


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """Folder of a model that answers with constants, and the constants."""
    constants = {
        "float32": np.array([[0.1, -0.0, 1 / 3], [1e-45, 3.4028235e38, 16777217]], "float32"),
        "special": np.array([np.nan, np.inf, -np.inf], "float32"),
        "float64": np.array([0.1, 1 / 3, 5e-324]),
        "int32": np.array([-(2**31), 2**31 - 1], "int32"),
        "int64": np.array([[-(2**63)], [2**63 - 1]]),
        "uint8": np.array([0, 255], "uint8"),
        "bool": np.array([[[True, False]]]),
        "scalar": np.array(7, "int32"),
        "empty": np.zeros((0, 4), "float32"),
    }

    class Constants(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="files")])
        def constants(self, files):
            """All depend on the input, or they could be folded into one tensor."""
            zero = 0 * tf.size(files)
            return {key: tf.gather(value[None], zero) for key, value in constants.items()}

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="files")])
        def lengths(self, files):
            return {"lengths": tf.strings.length(files)}

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="files")])
        def echo(self, files):
            return {"files": tf.identity(files)}

    folder, module = tmp_path_factory.mktemp("types"), Constants()
    names = ("constants", "lengths", "echo")
    tf.saved_model.save(module, folder, signatures={name: getattr(module, name) for name in names})
    return folder, constants


def encode(array, image_format):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array.astype("uint8")).save(stream, image_format)
    return stream.getvalue()


def assert_fails(done, message):
    """By itself, not by a signal."""
    assert done.returncode == 1 and message in done.stderr, (done.returncode, done.stderr)
    assert done.stdout == ""


# === The detector ===


@pytest.mark.parametrize(
    ("signature", "kind", "count"), [("serving_default", "float", 3), ("serve_uint8", "uint8", 1)]
)
def test_images_give_what_predict_gives(loader, model, detector, tmp_path, signature, kind, count):
    images, _ = rectangles(count, model.image_shape, seed=3, objects=1)
    images.astype("float32" if kind == "float" else kind).tofile(tmp_path / "images.raw")
    got = loader.answer(detector, signature, kind, tmp_path / "images.raw", *model.image_shape)
    want = model.predict(images, verbose=0)
    assert (want["num_detections"] > 0).all()
    for output in ("num_detections", "labels"):
        np.testing.assert_array_equal(got[output], want[output])
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-4)
    np.testing.assert_allclose(got["boxes"], want["boxes"], atol=1e-2)


def test_images_give_what_detect_gives(loader, model, detector, tmp_path):
    wide = rectangles(1, (96, 200, 3), seed=4)[0][0]
    tall = rectangles(1, (150, 90, 3), seed=5)[0][0]
    paths = [tmp_path / "wide.jpg", tmp_path / "tall.png"]
    paths[0].write_bytes(encode(wide, "JPEG"))
    paths[1].write_bytes(encode(tall, "PNG"))
    got = loader.answer(detector, "serve_bytes", "bytes", *paths)
    want = model.detect(paths, confidence_threshold=0.0)
    for i, one in enumerate(want):
        n = got["num_detections"][i]
        assert 0 < n == len(one["labels"])
        np.testing.assert_array_equal(got["labels"][i, :n], one["labels"])
        np.testing.assert_allclose(got["confidence"][i, :n], one["confidence"], atol=1e-4)
        np.testing.assert_allclose(got["boxes"][i, :n], one["boxes"], atol=1e-2)
        for output in OUTPUTS[:3]:
            assert (got[output][i, n:] == -1).all()
    assert got.get("readable", np.array(True)).all()


def test_what_is_no_image_does_not_crash(loader, detector, tmp_path):
    contents = (b"no image", b"", b"\xff\xd8\xff\xe0 cut short", b"\x89PNG\r\n\x1a\n")
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    done = loader.call(detector, "serve_bytes", "bytes", *paths)
    if done.returncode != 0:
        assert_fails(done, "run: ")
    else:
        assert len(read_arrays(done.stdout)) >= len(OUTPUTS)


def test_images_of_another_size(loader, detector, tmp_path):
    np.zeros((1, 64, 64, 3), "float32").tofile(tmp_path / "images.raw")
    done = loader.call(detector, "serving_default", "float", tmp_path / "images.raw", 64, 64, 3)
    assert_fails(done, "run: ")


def test_an_image_that_is_cut_short(loader, model, detector, tmp_path):
    np.zeros(1000, "float32").tofile(tmp_path / "images.raw")
    done = loader.call(
        detector, "serving_default", "float", tmp_path / "images.raw", *model.image_shape
    )
    assert_fails(done, "does not hold a whole number of images")


# === The program ===


def test_every_type_is_printed_exactly(loader, every_type):
    folder, want = every_type
    got = loader.answer(folder, "constants", "bytes", __file__)
    assert set(got) == set(want)
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert got[name].tobytes() == value.tobytes() or name == "special"


def test_files_arrive_whole(loader, every_type, tmp_path):
    """Short strings lie inside TensorFlow's, long ones elsewhere; zeros end none."""
    sizes = [0, 1, 22, 23, 2**17 - 1, 2**17, 300_000]
    paths = [tmp_path / f"{size}" for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    got = loader.answer(every_type[0], "lengths", "bytes", *paths)
    assert got["lengths"].tolist() == sizes
    assert loader.answer(every_type[0], "lengths", "bytes")["lengths"].tolist() == []


def test_strings_are_not_printed(loader, every_type):
    assert_fails(loader.call(every_type[0], "echo", "bytes", __file__), "does not print")


def test_a_folder_without_a_model(loader, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert_fails(loader.run(folder, "bytes", "a:0", __file__, "--", "b:0"), str(folder))
    (tmp_path / "saved_model.pb").write_bytes(b"no model")
    assert_fails(loader.run(tmp_path, "bytes", "a:0", __file__, "--", "b:0"), str(tmp_path))


def test_wrong_arguments(loader, every_type, tmp_path):
    folder = every_type[0]
    signature = signature_of(folder, "lengths")
    tensor, output = signature.inputs["files"].name, signature.outputs["lengths"].name
    nowhere = tmp_path / "nowhere.jpg"
    operation = output.split(":")[0]
    for message, arguments in {
        "usage": [folder, "bytes", tensor, __file__, "--"],
        "cannot be opened": [folder, "bytes", tensor, __file__, nowhere, "--", output],
        "cannot be read": [folder, "bytes", tensor, tmp_path, "--", output],
        "none of float": [folder, "double", tensor, __file__, 1, 1, 1, "--", output],
        "takes a file": [folder, "float", tensor, __file__, "--", output],
        "is no height": [folder, "uint8", tensor, __file__, 1, "1x", 1, "--", output],
        "but uint8 is provided": [folder, "uint8", tensor, __file__, 1, 1, 1, "--", output],
        "no tensor": [folder, "bytes", tensor, __file__, "--", f"{operation}:99"],
        "no tensor of": [folder, "bytes", "nothing:0", __file__, "--", output],
        "operation:index": [folder, "bytes", tensor, __file__, "--", operation],
    }.items():
        assert_fails(loader.run(*arguments), message)
