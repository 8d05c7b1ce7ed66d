"""Bad requests to an exported model: rejected as documented, without effect on other images."""

import functools
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import rectangles
from exported_models import KINDS, encode, load, model_of, saved_model, with_alpha

from keras_resnest.images import center_crop_image, load_image

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf

PROGRAM = Path(__file__).parent / "programs" / "decode_one_by_one.py"
DETECTOR, CLASSIFIER = MODELS = ("detector", "classifier")
CROP = KINDS[CLASSIFIER][1]["image_shape"][0]
MAX_PIXELS = 178_956_970  # the documented limit, which is also Pillow's
GIGABYTE = 2**30


# === Images ===


def scene(seed=4, shape=(96, 200, 3)):
    return rectangles(1, shape, seed=seed)[0][0].astype("uint8")


def pillow(mode="RGB", seed=4):
    from PIL import Image

    return Image.fromarray(scene(seed)).convert(mode)


def chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png_file(size, depth, color, compressed, interlaced=False):
    """A PNG with any header: size (height, width), bits, color type, deflated rows."""
    height, width = size
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, int(interlaced))
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", compressed), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png(array, depth=8, interlaced=False):
    """PNGs that Pillow cannot write: 16 bits with several channels, interlaced."""
    height, width = array.shape[:2]
    samples = array.reshape(height, width, -1).astype(">u2" if depth == 16 else "u1")
    passes = [(0, 0, 1, 1)]
    if interlaced:  # first column, first row, steps
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = (b"\0" + row.tobytes() for x, y, dx, dy in passes for row in samples[y::dy, x::dx])
    color = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    return png_file((height, width), depth, color, zlib.compress(b"".join(rows)), interlaced)


def one_color_png(height, width):
    """A huge image in a small file."""
    compressor = zlib.compressobj(1)
    row = b"\0" + bytes([200, 30, 30]) * width
    rows = b"".join(compressor.compress(row) for _ in range(height))
    return png_file((height, width), 8, 2, rows + compressor.flush())


def patched(encoded, position, form, *values):
    """Some bytes of a file replaced by packed values."""
    new = struct.pack(form, *values)
    return encoded[:position] + new + encoded[position + len(new) :]


def bombs():
    """Small files whose headers claim 60 000 x 60 000 pixels."""
    side = 60_000
    jpeg = encode(scene(), "JPEG")
    return {
        "png": png_file((side, side), 8, 2, zlib.compress(bytes(3 * side + 1))),
        "jpeg": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", side, side),
    }


def cuts():
    """Files truncated in the header and after it."""
    files = {"jpeg": encode(scene(), "JPEG"), "png": encode(scene(), "PNG")}
    files["progressive"] = encode(scene(), "JPEG", progressive=True)
    cut = {}
    for name, encoded in files.items():
        size = len(encoded)
        for length in (2, 3, 8, 20, 33, 60, size // 4, size // 2, 9 * size // 10, size - 30):
            cut[f"{name} {length}"] = encoded[:length]
    return cut


def no_images():
    return {
        "empty": b"",
        "one byte": b"\xff",
        "text": b"no image",
        "zeros": bytes(1000),
        "base64": b"/9j/4AAQSkZJRgABAQEASABIAAD/2wBDAP",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "no size": png_file((0, 0), 8, 2, zlib.compress(b"")),
        "negative size": png_file((2**31, 2**32 - 1), 8, 2, zlib.compress(b"")),
        "wrong sum": encode(scene(), "PNG")[:40] + b"?" + encode(scene(), "PNG")[41:],
    }


def odd_images():
    """Good files of unusual kinds, which the model must decode as Pillow does."""
    image = scene()
    sixteen = image.astype("uint16") * 257  # exactly the 8-bit image
    return {
        "1 x 1 png": encode(image[:1, :1], "PNG"),
        "1 x 1 jpeg": encode(image[:1, :1], "JPEG"),
        "one row": encode(image[:1], "PNG"),
        "one column": encode(image[:, :1], "PNG"),
        "gray": encode(pillow("L"), "PNG"),
        "gray and alpha": png(with_alpha(image[..., :1])),
        "black and white": encode(pillow("1"), "PNG"),
        "palette of 4 bits": encode(pillow().quantize(16), "PNG", bits=4),
        "palette with alpha": encode(pillow().quantize(4), "PNG", transparency=bytes([0, 90, 255])),
        "16 bits": png(sixteen, depth=16),
        "16 bits gray": png(sixteen[..., 0], depth=16),
        "16 bits and alpha": png(with_alpha(image).astype("uint16") * 257, depth=16),
        "interlaced": png(image, interlaced=True),
        "interlaced and alpha": png(with_alpha(image), interlaced=True),
        "interlaced 16 bits": png(sixteen, depth=16, interlaced=True),
        "jpeg gray": encode(pillow("L"), "JPEG"),
        "jpeg cmyk": encode(pillow("CMYK"), "JPEG"),
        "jpeg rgb": encode(pillow(), "JPEG", keep_rgb=True),
        "jpeg and more": encode(image, "JPEG") + b"more" * 99,
        "two jpegs": encode(image, "MPO", save_all=True, append_images=[pillow(seed=5)]),
        "two pngs": encode(image, "PNG", save_all=True, append_images=[pillow(seed=5)]),
    }


def strange_images():
    """Files that few programs write: a decoder must read them right or reject them."""
    image = scene(5, (64, 128, 3))
    cmyk = encode(pillow("CMYK"), "JPEG")
    adobe = cmyk.index(b"\xff\xee")
    return {
        "png gray, one clear": encode(pillow("L"), "PNG", transparency=100),
        "png rgb, one clear": encode(image, "PNG", transparency=tuple(image[0, 0].tolist())),
        "cmyk not of Adobe": cmyk[:adobe] + cmyk[adobe + 16 :],
    }


def other_formats():
    """Images that `detect` reads; the last cost 11 s for each megabyte of its one-byte blocks."""
    formats = ("GIF", "BMP", "WEBP", "TIFF", "PPM")
    gif = encode(pillow().quantize(4), "GIF")
    blocks = gif[:13] + b"\0" * 12 + b"!\xfe" + b"\x01a" * 2**19 + b"\0"
    return {name: encode(pillow(), name) for name in formats} | {"blocks": blocks}


# === Answers ===


def serve(name, files):
    """Sends a list of files to `serve_bytes`."""
    answer = load(name).signatures["serve_bytes"](image_bytes=tf.constant(list(files), tf.string))
    return {output: value.numpy() for output, value in answer.items()}


def serve_images(name, images):
    answer = load(name).signatures["serving_default"](images=tf.constant(images))
    return {output: value.numpy() for output, value in answer.items()}


def images_for(name, count):
    spec = load(name).signatures["serving_default"].structured_input_signature[1]["images"]
    return rectangles(count, tuple(spec.shape[1:]), seed=3, objects=1)[0]


@functools.cache
def served_alone(name):
    """Three good files and the answer to each."""
    good = [encode(scene(), "JPEG"), encode(scene(5), "PNG"), encode(scene(6), "JPEG")]
    return good, [serve(name, [one]) for one in good]


def assert_same(got, want):
    """Compares results of the same images in batches of different sizes."""
    assert set(got) == set(want)
    for output, value in want.items():
        tolerance = {"boxes": 1e-2, "confidence": 1e-5, "predictions": 1e-5, "features": 1e-4}
        np.testing.assert_allclose(
            got[output], value, rtol=0, atol=tolerance.get(output, 0), err_msg=output
        )


def assert_empty(answer):
    """No detections and padding, or zeros."""
    for output, value in answer.items():
        if output not in ("readable", "num_detections"):
            assert (value == (0 if output == "predictions" else -1)).all(), output
    if "num_detections" in answer:
        assert (answer["num_detections"] == 0).all()


def rows(answer, which):
    return {output: value[which] for output, value in answer.items()}


# === Unreadable images ===


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "kind", [cuts, no_images, bombs, other_formats], ids=lambda kind: kind.__name__
)
def test_bad_images_are_empty_and_good_ones_as_if_alone(name, kind):
    bad = kind()
    good, alone = served_alone(name)
    together = serve(name, [good[0], *bad.values(), *good[1:]])
    readable = together["readable"]
    assert readable.dtype == bool and readable.shape == (len(bad) + 3,)
    assert [b for b, r in zip(bad, readable[1:-2], strict=True) if r] == []
    assert_empty(rows(together, slice(1, -2)))
    for place, want in zip((0, -2, -1), alone, strict=True):
        assert want["readable"].all() and want.get("num_detections", 1) > 0
        assert_same(rows(together, [place]), want)


@pytest.mark.parametrize("kind", [cuts, no_images, bombs], ids=lambda kind: kind.__name__)
def test_pillow_rejects_them_too(kind):
    accepted = []
    for name, encoded in kind().items():
        try:
            load_image(encoded)
            accepted.append(name)
        except ValueError:
            pass
    assert accepted == []


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_bad_images(name):
    answer = serve(name, [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
    assert not answer["readable"].any()
    assert_empty(answer)


# === Memory and crashes, in a fresh process ===


REJECTED, READ = tuple(bombs()), ("144 megapixels", "8 megapixels and alpha")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Answers of a fresh process by file name, and the finished process."""
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    files = {"warm up": encode(scene(), "JPEG"), **bombs()}
    files["144 megapixels"] = one_color_png(12_000, 12_000)
    files["8 megapixels and alpha"] = png(np.full((2000, 4000, 4), 99, "uint8"))
    root = tmp_path_factory.mktemp("files")
    paths = [root / name for name in files]
    for path, encoded in zip(paths, files.values(), strict=True):
        path.write_bytes(encoded)
    command = [sys.executable, PROGRAM, saved_model(DETECTOR), *paths]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    return {answer["name"]: answer for answer in answers}, run


@pytest.mark.parametrize("name", REJECTED)
def test_files_of_too_many_pixels_are_rejected_at_once(fresh, name):
    answer = fresh[0][name]
    assert not answer["readable"] and answer["num_detections"] == 0, answer
    assert answer["bytes"] < GIGABYTE / 4, answer


@pytest.mark.parametrize(("name", "pixels"), [(READ[0], 144e6), (READ[1], 8e6)])
def test_large_images_are_read(fresh, name, pixels):
    answer = fresh[0][name]
    assert answer["readable"] and answer["num_detections"] > 0, answer
    assert answer["bytes"] < 24 * pixels, answer


# === Odd images ===


def test_odd_images_give_what_detect_gives():
    files = odd_images()
    got = serve(DETECTOR, files.values())
    assert [name for name, r in zip(files, got["readable"], strict=True) if not r] == []
    want = model_of(DETECTOR).detect(list(files.values()), confidence_threshold=0.0, batch_size=8)
    for i, name in enumerate(files):
        assert_detections(rows(got, i), want[i], name)


def assert_detections(got, want, name):
    count = got["num_detections"]
    assert count == len(want["labels"]), name
    np.testing.assert_array_equal(got["labels"][:count], want["labels"], err_msg=name)
    np.testing.assert_allclose(
        got["confidence"][:count], want["confidence"], atol=1e-4, err_msg=name
    )
    np.testing.assert_allclose(got["boxes"][:count], want["boxes"], atol=1e-2, err_msg=name)


def classified(model, files):
    """Classifies images after Pillow and `center_crop_image`."""
    crops = [center_crop_image(load_image(encoded), CROP) for encoded in files]
    return model.predict(np.stack(crops).astype("float32"), verbose=0)


def test_odd_images_are_classified_alike():
    """Resizing by TensorFlow and by Pillow differs by a gray level here and there."""
    files = odd_images()
    got = serve(CLASSIFIER, files.values())
    assert got["readable"].all()
    want = classified(model_of(CLASSIFIER), files.values())
    assert np.ptp(want, axis=0).max() > 0.2  # of different images
    for name, *pair in zip(files, got["predictions"], want, strict=True):
        np.testing.assert_allclose(*pair, atol=0.02, err_msg=name)


def test_sixteen_bits_between_gray_levels():
    """TensorFlow truncates to 8 bits, Pillow rounds: they differ by at most one gray level."""
    noise = np.random.default_rng(0).integers(0, 257, (96, 200, 3))
    files = [png(scene().astype("uint16") * 256 + noise.clip(0, 255), depth=16)]
    files.append(png(files_gray := (scene()[..., 0].astype("uint16") * 256 + 200), depth=16))
    assert files_gray.max() < 2**16
    got = serve(CLASSIFIER, files)
    assert got["readable"].all()
    np.testing.assert_allclose(
        got["predictions"], classified(model_of(CLASSIFIER), files), atol=0.02
    )


@pytest.mark.parametrize("name", strange_images())
def test_strange_images_are_rejected_or_decoded_as_by_pillow(name):
    encoded = strange_images()[name]
    (want,) = model_of(DETECTOR).detect([encoded], confidence_threshold=0.0)
    answer = rows(serve(DETECTOR, [encoded]), 0)
    if answer["readable"]:
        assert_detections(answer, want, name)
    else:
        assert_empty(answer)


# === Tensors ===


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_values_empty_their_image_alone(name, value):
    images = images_for(name, 3)
    want = serve_images(name, images)
    images[1, 5, 7, 2] = value
    got = serve_images(name, images)
    assert_empty(rows(got, [1]))
    assert_same(rows(got, [0, 2]), rows(want, [0, 2]))
    assert (rows(want, [1]).get("num_detections", np.ones(1)) > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_extreme_values_leave_the_others_alone(name):
    """The network overflows for one image; the results of the others do not change."""
    images = images_for(name, 2)
    want = serve_images(name, images)
    extreme = np.full((1, *images.shape[1:]), 3e38, "float32")
    extreme[:, ::2] *= -1
    got = serve_images(name, np.concatenate([images, extreme]))
    assert_same(rows(got, [0, 1]), want)


@pytest.mark.parametrize("name", MODELS)
def test_batch_of_nothing(name):
    for signature, serve in load(name).signatures.items():
        ((key, spec),) = serve.structured_input_signature[1].items()
        answer = serve(**{key: tf.zeros((0, *spec.shape[1:]), spec.dtype)})
        is_text = spec.dtype == tf.string
        one = tf.constant([b""]) if is_text else tf.zeros((1, *spec.shape[1:]), spec.dtype)
        want = serve(**{key: one})
        assert set(answer) == set(want)
        for output, value in answer.items():
            assert value.dtype == want[output].dtype, (signature, output)
            assert value.shape == (0, *want[output].shape[1:]), (signature, output)


@pytest.mark.parametrize("signature", ["serving_default", "serve_uint8", "raw_outputs"])
@pytest.mark.parametrize("name", MODELS)
def test_wrong_shapes_and_types_are_errors(name, signature):
    serve = load(name).signatures[signature]
    spec = serve.structured_input_signature[1]["images"]
    height, width, _ = spec.shape[1:]
    wrong = [(1, height, width, c) for c in (1, 2, 4)]
    wrong += [(1, height, width + 1, 3), (1, height - 1, width, 3), (1, 3, height, width)]
    wrong += [(height, width, 3), (1, 1, height, width, 3), (0, height, width, 1), (1,)]
    for shape in wrong:
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            serve(images=tf.zeros(shape, spec.dtype))
            pytest.fail(f"{shape} is answered")
    for dtype in {tf.float32, tf.uint8, tf.int32, tf.float64} - {spec.dtype}:
        with pytest.raises((tf.errors.InvalidArgumentError, TypeError)):
            serve(images=tf.zeros((1, height, width, 3), dtype))
            pytest.fail(f"{dtype} is answered")


@pytest.mark.parametrize("name", MODELS)
def test_files_must_be_a_list(name):
    good = encode(scene(), "JPEG")
    for files in (good, [[good]], [[good, good]]):
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            load(name).signatures["serve_bytes"](image_bytes=tf.constant(files))


# === Damaged files ===


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_random_damage(name, image_format):
    """200 files with up to five wrong bytes, half of them in the header; some are cut too."""
    rng = np.random.default_rng(7)
    good = encode(scene(), image_format)
    alone = serve(name, [good])
    readable = 0
    for _ in range(10):
        answer = serve(name, [good, *(damaged(good, rng) for _ in range(20))])
        assert answer["readable"].dtype == bool and answer["readable"].shape == (21,)
        assert all(np.isfinite(v).all() for v in answer.values())
        assert_same(rows(answer, [0]), alone)
        assert_empty(rows(answer, ~answer["readable"]))
        readable += answer["readable"].sum() - 1
    # PNG has check sums; many JPEGs survive with a few wrong blocks.
    assert readable > 50 if image_format == "JPEG" else readable < 10


def damaged(encoded, rng):
    result = bytearray(encoded)
    for _ in range(rng.integers(1, 6)):
        end = 64 if rng.random() < 0.5 else len(result)
        result[rng.integers(end)] = rng.integers(256)
    if rng.random() < 0.1:
        del result[rng.integers(len(result)) :]
    return bytes(result)
