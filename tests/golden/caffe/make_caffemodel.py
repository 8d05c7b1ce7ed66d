"""Writes deterministic random `.caffemodel` files.  Only numpy is needed.

A `.caffemodel` is a protocol buffer message `NetParameter`.  The few message
fields that carry weights are encoded by hand here, so neither Caffe nor a
protobuf compiler is needed.

Command line::

    python make_caffemodel.py MANIFEST.json OUT.caffemodel --seed 1

As a module::

    manifest = load_manifest("manifests/vgg16_voc_320.json")
    blobs = make_blobs(manifest, seed=1)      # {"conv1_1": [w, b], ...}
    write_caffemodel("out.caffemodel", manifest, blobs)
    image = make_image(320, 320, seed=1)      # uint8, height x width x BGR
    x = preprocess(image)                     # float32, 1 x 3 x height x width

A manifest is a dict with `name` (of the net), `format` ("layer" or the old
"layers") and `layers`, an ordered list of `{"name", "type", "blobs"}`; `blobs`
is a list of `{"shape", "kind"}` and may be empty.

Every blob has its own random stream keyed by `(seed, crc32("layer/index"))`,
so values depend on the seed, the layer name, the blob index, the shape and the
kind only.  Kinds (N: normal with mean and standard deviation, U: uniform):

=============== ============================ ===================================
kind            caffe shape                  values
=============== ============================ ===================================
conv            (out, in / group, kh, kw)    N(0, sqrt(2 / fan_in)), the mean of
                                             every filter w[o] subtracted
conv_plain      same                         N(0, sqrt(2.9 / fan_in)), likewise
conv_input      same                         like conv_plain, divided by 64
deconv          (in, out / group, kh, kw)    N(0, sqrt(2.9 / in)), the mean over
                                             `in` subtracted
dense           (out, in)                    N(0, sqrt(1 / in))
bias            (out,)                       N(0, 0.05)
l2norm          (channels,)                  U(8, 12)
scale_weight    (channels,)                  U(0.7, 1.2)
scale_weight_r  (channels,)                  U(0.1, 0.3), end of a residual branch
scale_bias      (channels,)                  N(0, 0.1)
bn_mean         (channels,)                  N(0, 0.1) times the layer's factor
bn_var          (channels,)                  U(0.5, 1.5) times the layer's factor
bn_factor       (1,)                         the factor: FACTORS[crc32(layer) % 3]
=============== ============================ ===================================

All arithmetic is float32, means are taken in float64.
"""

import argparse
import json
import struct
import zlib

import numpy as np

FACTORS = (1.0, 999.98236, 37.5)
MEAN_BGR = (104.0, 117.0, 123.0)

_NORMAL = {"bias": 0.05, "scale_bias": 0.1, "bn_mean": 0.1}
_UNIFORM = {
    "l2norm": (8.0, 12.0),
    "scale_weight": (0.7, 1.2),
    "scale_weight_r": (0.1, 0.3),
    "bn_var": (0.5, 1.5),
}


# ---------------------------------------------------------------- numbers


def _rng(seed, name):
    key = zlib.crc32(name.encode("utf-8"))
    return np.random.Generator(np.random.PCG64([int(seed), key]))


def bn_factor(layer):
    """Third blob of a BatchNorm layer; mean and variance are divided by it."""
    return np.float32(FACTORS[zlib.crc32(layer.encode("utf-8")) % len(FACTORS)])


def _std(kind, shape):
    if kind == "conv":
        return np.sqrt(2.0 / np.prod(shape[1:]))
    if kind == "conv_plain":
        return np.sqrt(2.9 / np.prod(shape[1:]))
    if kind == "conv_input":
        return np.sqrt(2.9 / np.prod(shape[1:])) / 64.0
    if kind == "deconv":
        return np.sqrt(2.9 / shape[0])
    if kind == "dense":
        return np.sqrt(1.0 / shape[1])
    if kind in _NORMAL:
        return _NORMAL[kind]
    raise ValueError(f"unknown kind {kind!r}")


def make_blob(layer, index, shape, kind, seed):
    """Float32 array of one blob, as stored in the file."""
    shape = tuple(int(s) for s in shape)
    if kind == "bn_factor":
        return np.full(shape, bn_factor(layer), np.float32)
    rng = _rng(seed, f"{layer}/{index}")
    if kind in _UNIFORM:
        low, high = _UNIFORM[kind]
        w = np.float32(low) + np.float32(high - low) * rng.random(shape, dtype=np.float32)
    else:
        w = rng.standard_normal(shape, dtype=np.float32) * np.float32(_std(kind, shape))
    axes = None
    if kind in ("conv", "conv_plain", "conv_input") and w[0].size > 1:
        axes = tuple(range(1, w.ndim))
    elif kind == "deconv":
        axes = (0,)
    if axes:
        w -= w.mean(axis=axes, keepdims=True, dtype=np.float64).astype(np.float32)
    if kind in ("bn_mean", "bn_var"):
        w *= bn_factor(layer)
    return w


def make_blobs(manifest, seed):
    """All blobs: {layer name: [array, ...]}, in the order of the manifest."""
    return {
        layer["name"]: [
            make_blob(layer["name"], i, b["shape"], b["kind"], seed)
            for i, b in enumerate(layer["blobs"])
        ]
        for layer in manifest["layers"]
        if layer["blobs"]
    }


def crc32_of(arrays):
    """crc32 over the little-endian float32 bytes of the arrays, one after another."""
    crc = 0
    for a in arrays:
        crc = zlib.crc32(np.ascontiguousarray(a, "<f4").tobytes(), crc)
    return crc


def make_image(height, width, seed, name="image"):
    """Random uint8 image, height x width x 3, channels blue, green, red."""
    rng = _rng(seed, name)
    fine = rng.standard_normal((3, height, width), dtype=np.float32)
    coarse = rng.standard_normal((3, -(-height // 16), -(-width // 16)), dtype=np.float32)
    coarse = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    x = np.float32(36) * fine + np.float32(48) * coarse
    offset = np.array([90, 117, 140], np.float32)[:, None, None]
    x = np.clip(np.rint(x + offset), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(x.transpose(1, 2, 0))


def preprocess(image_bgr):
    """BGR image to network input: subtract (104, 117, 123), no scaling, NCHW."""
    x = image_bgr.astype(np.float32) - np.array(MEAN_BGR, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


def load_manifest(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


# ---------------------------------------------------------- wire format

VARINT, BYTES, FIXED32 = 0, 2, 5

# V1LayerParameter.LayerType
V1_TYPES = {
    "Concat": 3,
    "Convolution": 4,
    "Data": 5,
    "Dropout": 6,
    "Flatten": 8,
    "InnerProduct": 14,
    "LRN": 15,
    "Pooling": 17,
    "ReLU": 18,
    "Softmax": 20,
    "SoftmaxWithLoss": 21,
    "Split": 22,
    "Eltwise": 25,
    "Deconvolution": 39,
}


def varint(n):
    out = bytearray()
    while True:
        byte = n & 0x7F
        n >>= 7
        if n:
            out.append(byte | 0x80)
        else:
            out.append(byte)
            return bytes(out)


def tag(field, wire):
    return varint(field << 3 | wire)


def field_varint(field, n):
    return tag(field, VARINT) + varint(n)


def field_bytes(field, data):
    return tag(field, BYTES) + varint(len(data)) + data


def field_text(field, text):
    return field_bytes(field, text.encode("utf-8"))


def field_float(field, value):
    return tag(field, FIXED32) + struct.pack("<f", value)


def encode_blob(a, dims="shape", values="float", values_first=False, diff=False):
    """BlobProto.

    dims: "shape" (field 7, packed), "shape_unpacked" (field 7, the sizes one by
        one) or "legacy" (num, channels, height, width, fields 1 to 4, missing
        leading axes filled with 1).
    values: "float" (field 5, packed), "unpacked" (field 5, one by one) or
        "double" (field 8, packed).
    values_first: write the numbers before the dimensions.
    diff: also write a gradient (field 6), which a reader has to ignore.
    """
    if dims == "legacy":
        four = (1,) * (4 - a.ndim) + a.shape
        d = b"".join(field_varint(i + 1, s) for i, s in enumerate(four))
    elif dims == "shape_unpacked":
        d = field_bytes(7, b"".join(field_varint(1, s) for s in a.shape))
    else:
        d = b"".join(varint(s) for s in a.shape)
        d = field_bytes(7, field_bytes(1, d) if d else b"")
    if values == "float":
        v = field_bytes(5, a.astype("<f4").tobytes())
    elif values == "double":
        v = field_bytes(8, a.astype("<f8").tobytes())
    else:
        v = b"".join(field_float(5, x) for x in a.ravel().tolist())
    if diff:
        v += field_bytes(6, np.full(a.size, -7.5, "<f4").tobytes())
    return v + d if values_first else d + v


def encode_layer(name, kind, blobs, **blob_options):
    """LayerParameter (new style), as field 100 of NetParameter.

    Besides name, type and blobs it has a top, a phase and learning rates,
    which a reader has to skip.
    """
    body = field_text(1, name) + field_text(2, kind) + field_text(4, name)
    for _ in blobs:
        body += field_bytes(6, field_float(3, 1.0) + field_float(4, 0.5))
    body += b"".join(field_bytes(7, encode_blob(b, **blob_options)) for b in blobs)
    body += field_varint(10, 0)
    return field_bytes(100, body)


def encode_v1_layer(name, kind, blobs, **blob_options):
    """V1LayerParameter (old style), as field 2 of NetParameter."""
    body = field_text(3, name) + field_text(4, name) + field_varint(5, V1_TYPES[kind])
    body += b"".join(field_bytes(6, encode_blob(b, **blob_options)) for b in blobs)
    for _ in blobs:
        body += field_float(7, 1.0)
    for _ in blobs:
        body += field_float(8, 0.5)
    return field_bytes(2, body)


def write_caffemodel(path, manifest, blobs, **blob_options):
    """Writes the file.  `blobs` maps layer names to lists of float32 arrays."""
    old = manifest["format"] == "layers"
    encode = encode_v1_layer if old else encode_layer
    if old:
        blob_options.setdefault("dims", "legacy")
    with open(path, "wb") as f:
        f.write(field_text(1, manifest["name"]))
        for layer in manifest["layers"]:
            values = blobs.get(layer["name"], [])
            f.write(encode(layer["name"], layer["type"], values, **blob_options))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest")
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    manifest = load_manifest(args.manifest)
    blobs = make_blobs(manifest, args.seed)
    write_caffemodel(args.out, manifest, blobs)
    crc = crc32_of(b for layer in blobs.values() for b in layer)
    print(f"{args.out}: {sum(map(len, blobs.values()))} blobs, weights_crc32 {crc}")


if __name__ == "__main__":
    main()
