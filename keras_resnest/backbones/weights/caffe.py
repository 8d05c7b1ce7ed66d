"""Reads Caffe's weight files without Caffe.

A `.caffemodel` is one protocol buffer, the message NetParameter of Caffe's `caffe.proto`.
"""

import math
import mmap
import os
import re

import numpy as np

# Fields of NetParameter that hold layers, new and old: fields of the layer's name and arrays.
_LAYER_FIELDS = {100: (1, 7), 2: (4, 6)}
# Fields of an array that hold its values, and bytes of one.
_VALUE_FIELDS = {5: 4, 8: 8}
_MAX_ARRAYS, _MAX_AXES = 10_000, 32  # Caffe's own limit of axes; networks have few hundred arrays
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Unpacked values and gradients (fields 5, 6, 8, 9) follow each other by the million.
_RUNS = {
    field << 3 | wire: re.compile(b"(?s:%c.{%d})*+" % (field << 3 | wire, width))
    for field, wire, width in ((5, 5, 4), (6, 5, 4), (8, 1, 8), (9, 1, 8))
}

_RESNET_FORM = {"stride_in_1x1": True, "caffe_stem": True}
# Arguments that make our networks those of the published files.
CAFFE_FORMS = {
    "vgg16_reduced": {"reduced_top": True},
    "resnet50": _RESNET_FORM,
    "resnet101": _RESNET_FORM,
    "resnet152": _RESNET_FORM,
}


def is_caffe_file(weights) -> bool:
    return isinstance(weights, str | os.PathLike) and os.fspath(weights).endswith(".caffemodel")


def caffe_form(weights, variant: str) -> dict:
    """Returns the arguments of a network that reads `weights`: none unless it is a Caffe file."""
    if not is_caffe_file(weights):
        return {}
    if variant not in CAFFE_FORMS:
        raise ValueError(
            f"Caffe files are for {', '.join(CAFFE_FORMS)}. Received: {os.fspath(weights)!r} "
            f"for {variant}"
        )
    return CAFFE_FORMS[variant]


def check_caffe_form(network, path: str | os.PathLike, variant: str) -> None:
    """Raises ValueError if a Caffe file is for a network with other arguments."""
    wanted = caffe_form(path, variant)
    found = {name: getattr(network, name, None) for name in wanted}
    if found != wanted:
        raise ValueError(f"{path} is for a network with {wanted}. Received: one with {found}")


def read_caffemodel(path: str | os.PathLike) -> dict[str, list[np.ndarray]]:
    """Reads the arrays of a `.caffemodel` file, in the new or the old format.

    Args:
        path: the file.

    Returns:
        For every layer with weights its arrays, float32 or float64, in Caffe's layout and order.
        Arrays with the four dimensions of old files lose the leading ones.

    Raises:
        ValueError: if the file is broken or holds no weights.

    Example:
        >>> [a.shape for a in read_caffemodel("vgg16.caffemodel")["conv1_1"]]
        [(64, 3, 3, 3), (64,)]

    Source: https://github.com/BVLC/caffe/blob/master/src/caffe/proto/caffe.proto
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as buffer,
        ):
            layers = _layers(buffer)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a complete .caffemodel file: {error}") from error
    if not layers:
        raise ValueError(f"{path} is a .caffemodel file without weights")
    return layers


def caffe_state_dict(layers: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Names the arrays of `read_caffemodel` as PyTorch does, for networks that read RGB images."""
    arrays = {}
    for name, blobs in layers.items():
        if len(blobs) == 3 and blobs[2].size == 1:  # BatchNorm: sums, and how much was summed
            factor = blobs[2].item()
            with np.errstate(all="ignore"):  # the values are checked later
                mean, variance = (b / factor if factor else np.zeros_like(b) for b in blobs[:2])
            arrays[f"{name}.running_mean"], arrays[f"{name}.running_var"] = mean, variance
            continue
        if name in ("conv1", "conv1_1") and blobs[0].ndim == 4:
            blobs = [blobs[0][:, ::-1], *blobs[1:]]  # from BGR
        names = ("weight", "bias", *range(2, len(blobs)))
        arrays |= {f"{name}.{n}": blob for n, blob in zip(names, blobs, strict=False)}
    return arrays


# === Protocol buffers ===


def _layers(buffer) -> dict:
    layers, count = {}, 0
    for field, wire, value in _fields(buffer, 0, len(buffer)):
        if field not in _LAYER_FIELDS:
            continue
        _check_wire("a layer", wire, _BYTES)
        name, blobs = "", []
        name_field, blob_field = _LAYER_FIELDS[field]
        for inner, inner_wire, inner_value in _fields(buffer, *value):
            if inner not in (name_field, blob_field):
                continue
            _check_wire("a layer's name or array", inner_wire, _BYTES)
            if inner == name_field:
                name = str(buffer[slice(*inner_value)], "utf-8", "replace")
                continue
            count += 1
            if count > _MAX_ARRAYS:
                raise ValueError(f"more than {_MAX_ARRAYS} arrays")
            blobs.append(_blob(buffer, *inner_value))
        if blobs and name in layers:
            raise ValueError(f"two layers {name!r} with weights")
        if blobs:
            layers[name] = blobs
    return layers


def _blob(buffer, start: int, stop: int) -> np.ndarray:
    values, legacy, shape = {5: bytearray(), 8: bytearray()}, {}, None
    for field, wire, value in _fields(buffer, start, stop):
        if field in _VALUE_FIELDS:
            _append_values(values[field], buffer, wire, value, _VALUE_FIELDS[field])
        elif field == 7:
            _check_wire("a shape", wire, _BYTES)
            shape = _shape(buffer, *value)
        elif field < 5:
            _check_wire("a dimension", wire, _VARINT)
            legacy[field] = value
    if shape is None and legacy:
        shape = [legacy.get(field, 0) for field in range(1, 5)]
        if shape[:2] == [1, 1]:  # a vector or a matrix; kernels of one channel do not occur
            shape = shape[3:] if shape[2] == 1 else shape[2:]
    field = 8 if values[8] else 5
    array = np.frombuffer(values[field], f"<f{_VALUE_FIELDS[field]}")
    shape = tuple(shape or ())
    if math.prod(shape) != array.size or not array.size:
        raise ValueError(f"an array of shape {shape} has {array.size} values")
    return array.reshape(shape)


def _shape(buffer, start: int, stop: int) -> list:
    dimensions = []
    for field, wire, value in _fields(buffer, start, stop):
        if field != 1:
            continue
        if wire == _VARINT:
            dimensions.append(value)
        else:
            _check_wire("a shape", wire, _BYTES)
            place, end = value
            while place < end and len(dimensions) <= _MAX_AXES:
                dimension, place = _varint(buffer, place, end)
                dimensions.append(dimension)
        if len(dimensions) > _MAX_AXES:
            raise ValueError(f"an array of more than {_MAX_AXES} dimensions")
    return dimensions


def _append_values(values: bytearray, buffer, wire: int, where: tuple, width: int):
    """Appends packed values, or a run of single ones without the byte before each."""
    _check_wire("a value", wire, _BYTES, _FIXED32 if width == 4 else _FIXED64)
    start, stop = where
    if wire != _BYTES:
        with buffer[start - 1 : stop] as records:
            values += np.frombuffer(records, np.uint8).reshape(-1, 1 + width)[:, 1:].tobytes()
        return
    if (stop - start) % width:
        raise ValueError(f"{stop - start} bytes are no values of {width} bytes")
    with buffer[start:stop] as packed:
        values += packed


def _fields(buffer, start: int, stop: int):
    """Yields number, wire type and value of the fields of a message.

    The value is an integer, or the place (start, stop) of the bytes.
    """
    while start < stop:
        tag, start = _varint(buffer, start, stop)
        field, wire = tag >> 3, tag & 7
        if field == 0 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"no field begins with {tag}, at byte {start}")
        if wire == _VARINT:
            value, start = _varint(buffer, start, stop)
            yield field, wire, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if size is None:
            size, start = _varint(buffer, start, stop)
        end = start + size
        if end > stop:
            raise ValueError(f"{size} bytes are announced at byte {start}, {stop - start} remain")
        if tag in _RUNS:
            end = _RUNS[tag].match(buffer, end, stop).end()
        yield field, wire, (start, end)
        start = end


def _varint(buffer, start: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if start >= stop:
            raise ValueError(f"it ends inside a number, at byte {start}")
        byte = buffer[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
    raise ValueError(f"a number of more than 64 bits, at byte {start}")


def _check_wire(what: str, wire: int, *wanted: int):
    if wire not in wanted:
        raise ValueError(f"{what} of wire type {wire}")
