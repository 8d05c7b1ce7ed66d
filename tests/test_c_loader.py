"""The exported SavedModel in a C program: the loader of TensorFlow Serving, without Python."""

import pathlib
import shutil
import subprocess

import keras
import numpy as np
import pytest
from detectors import rectangles
from exported_models import encode, model_of, saved_model

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

SOURCE = pathlib.Path(__file__).parent / "programs" / "saved_model_loader.c"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    include, folder = (pathlib.Path(f()) for f in (tf.sysconfig.get_include, tf.sysconfig.get_lib))
    libraries = [folder / f"libtensorflow_{n}.so.2" for n in ("cc", "framework")]
    for path in (include / "tensorflow/c/c_api.h", *libraries):
        if not path.exists():
            pytest.skip(f"this TensorFlow comes without {path.name}")
    program = tmp_path_factory.mktemp("loader") / "saved_model_loader"
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-isystem", include, SOURCE]
    command += [*libraries, f"-Wl,-rpath,{folder}", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def signature_of(name):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((saved_model("detector") / "saved_model.pb").read_bytes())
    return proto.meta_graphs[0].signature_def[name]


def call(program, signature, kind, *inputs):
    """Sends inputs to a signature of the detector; returns the finished process."""
    (tensor,) = signature_of(signature).inputs.values()
    outputs = [output.name for output in signature_of(signature).outputs.values()]
    command = [program, saved_model("detector"), kind, tensor.name, *inputs, "--", *outputs]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60
    )


def answer(program, signature, kind, *inputs):
    """Sends inputs to a signature; returns its outputs as arrays."""
    done = call(program, signature, kind, *inputs)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    arrays = {}
    for header, values in zip(lines[::2], lines[1::2], strict=True):
        name, dtype, *dims = header.split(" ")
        convert = float if dtype.startswith("float") else int
        flat = np.array([convert(value) for value in values.split()], dtype)
        arrays[name] = flat.reshape([int(d) for d in dims])
    return {key: arrays[out.name] for key, out in signature_of(signature).outputs.items()}


@pytest.mark.parametrize(
    ("signature", "kind", "count"), [("serving_default", "float", 3), ("serve_uint8", "uint8", 1)]
)
def test_images_give_what_predict_gives(program, tmp_path, signature, kind, count):
    model = model_of("detector")
    images, _ = rectangles(count, model.image_shape, seed=3, objects=1)
    images.astype("float32" if kind == "float" else kind).tofile(tmp_path / "images.raw")
    got = answer(program, signature, kind, tmp_path / "images.raw", *model.image_shape)
    want = model.predict(images, verbose=0)
    assert (want["num_detections"] > 0).all()
    for output in ("num_detections", "labels"):
        np.testing.assert_array_equal(got[output], want[output])
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-4)
    np.testing.assert_allclose(got["boxes"], want["boxes"], atol=1e-2)


def test_files_give_what_detect_gives(program, tmp_path):
    """Files that are no images among them do not crash the program."""
    paths = [tmp_path / name for name in ("wide.jpg", "tall.png")]
    paths[0].write_bytes(encode(rectangles(1, (96, 200, 3), seed=4)[0][0], "JPEG"))
    paths[1].write_bytes(encode(rectangles(1, (150, 90, 3), seed=5)[0][0], "PNG"))
    bad = []
    for content in (b"no image", b"", b"\xff\xd8\xff\xe0 cut short", b"\x89PNG\r\n\x1a\n"):
        bad.append(tmp_path / f"bad_{len(bad)}")
        bad[-1].write_bytes(content)
    got = answer(program, "serve_bytes", "bytes", *paths, *bad)
    want = model_of("detector").detect(paths, confidence_threshold=0.0)
    assert got["readable"].tolist() == [1, 1, 0, 0, 0, 0]
    for i, one in enumerate(want):
        n = got["num_detections"][i]
        assert 0 < n == len(one["labels"])
        np.testing.assert_array_equal(got["labels"][i, :n], one["labels"])
        np.testing.assert_allclose(got["confidence"][i, :n], one["confidence"], atol=1e-4)
        np.testing.assert_allclose(got["boxes"][i, :n], one["boxes"], atol=1e-2)
        for output in ("boxes", "confidence", "labels"):
            assert (got[output][i, n:] == -1).all()


def test_images_of_another_size_are_an_error(program, tmp_path):
    """The process ends by itself, not by a signal."""
    np.zeros((1, 64, 64, 3), "float32").tofile(tmp_path / "images.raw")
    done = call(program, "serving_default", "float", tmp_path / "images.raw", 64, 64, 3)
    assert done.returncode == 1 and "run: " in done.stderr and done.stdout == ""
