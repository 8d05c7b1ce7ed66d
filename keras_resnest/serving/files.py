"""Export as one file: ONNX, OpenVINO and LiteRT, each by its own converter."""

import importlib.util
import os
import pathlib
import tempfile
import warnings

import numpy as np

from keras_resnest.serving.graph import deployment_function
from keras_resnest.serving.saved_model import write_facts
from keras_resnest.serving.tasks import task_of

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}
# What TensorFlow itself does not bring along.
PACKAGES = {"onnx": ("onnx", "tf2onnx"), "openvino": ("openvino",), "litert": ()}
ONNX_OPSET = 17
# Why a detector is not decoded inside of a quantized graph.
INT8_FAULTS = {
    "litert": "LiteRT would compute boxes in 8 bits too",
    # 2026.4 then gives other outputs of the same network: mAP 0.65 instead of 0.91.
    "openvino": "OpenVINO computes a quantized network wrongly if decoding follows it",
}
QUANTIZED = ("Conv", "MatMul", "Gemm")


def export_file(
    model, filepath, format: str, precision: str, decode: bool, representative_images, **options
) -> None:
    """Writes a model in one of `SUFFIXES`; arguments as in `export_model`, checked there."""
    path = pathlib.Path(os.path.abspath(filepath))
    if path.suffix != SUFFIXES[format] or path.is_dir():
        raise ValueError(
            f'`filepath` of format="{format}" must be a file that ends with '
            f"{SUFFIXES[format]!r}. Received: {filepath}"
        )
    task = task_of(model, **options)
    decode = decode and task.facts()["task"] == "detection"
    images = _check_representative(task, representative_images)
    if precision == "int8" and decode and format in INT8_FAULTS:
        raise ValueError(
            f"{INT8_FAULTS[format]}: export with decode=False and decode with "
            f'NumpyDetectionDecoder. Received: format="{format}", precision="int8", decode=True'
        )
    _check_packages(format, precision)
    convert = {"onnx": _to_onnx, "openvino": _to_openvino, "litert": _to_litert}[format]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        folder = pathlib.Path(folder)
        convert(task, folder / path.name, precision, decode, images)
        _write_side_files(task, folder, path.name, precision, decode)
        for file in sorted(folder.iterdir(), key=lambda file: file.suffix == path.suffix):
            os.replace(file, path.parent / file.name)  # the model itself comes last


def _check_packages(format: str, precision: str) -> None:
    names = PACKAGES[format]
    if precision == "int8" and format != "litert":
        names = dict.fromkeys((*names, *PACKAGES["onnx"], "onnxruntime"))
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f'format="{format}" needs the package {name}: pip install "keras_resnest[export]"',
                name=name,
            )


def _check_representative(task, images):
    if images is None:
        return None
    images = np.asarray(images, "float32")
    if images.ndim != 4 or images.shape[1:] != tuple(task.image_shape) or not len(images):
        raise ValueError(
            f"`representative_images` must be (n, {', '.join(map(str, task.image_shape))}). "
            f"Received: {images.shape}"
        )
    return images


def _write_side_files(task, folder, name: str, precision: str, decode: bool) -> None:
    facts = {"precision": precision, "decode": decode}
    if task.facts()["task"] == "detection" and not decode:
        facts["anchors"] = f"{name}.anchors.npy"
        np.save(folder / facts["anchors"], np.asarray(task.model.anchors, "float32"))
    write_facts(task, folder / f"{name}.json", **facts)


def _function(task, decode: bool, batch_size=None, precision: str = "float32"):
    """Concrete function of `images`, frozen, of operations that every runtime has."""
    import tensorflow as tf

    # LiteRT, of one image, knows no open sizes.
    shape = task.signature_shape if batch_size is None else task.image_shape
    specification = tf.TensorSpec((batch_size, *shape), tf.float32, name="images")
    network = deployment_function(task.network, specification, precision)

    def infer(images):
        raw = network(images)
        return task.results(raw, portable=True) if decode else raw

    return tf.function(infer, autograph=False).get_concrete_function(specification)


def _to_onnx(task, path, precision: str, decode: bool, images) -> None:
    import onnx
    import tensorflow as tf
    import tf2onnx

    function = _function(task, decode, precision="float16" if precision == "float16" else "float32")
    specification = function.structured_input_signature[0][0]
    _let_tf2onnx_know_numpy_2()
    model, _ = tf2onnx.convert.from_function(
        tf.function(lambda images: function(images)), [specification], opset=ONNX_OPSET
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(model)  # tf2onnx lets operations pass that it does not know
    if precision != "int8":
        onnx.save(model, path)
        return
    _quantize_onnx(model, path, images)


def _quantize_onnx(model, path, images) -> None:
    """Static quantization of convolutions and products, the last ones of each path excepted.

    Eight bits are few for logits and offsets of boxes.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.rows = iter([{"images": image[None]} for image in images])

        def get_next(self):
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        source, prepared = (os.path.join(folder, name) for name in ("float32.onnx", "shapes.onnx"))
        onnx.save(model, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            os.fspath(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=_last_of(QUANTIZED, onnx.load(prepared).graph),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _last_of(kinds, graph) -> list[str]:
    """Names of the nodes of some kinds behind which no more of them come."""
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    waiting, seen, found = [output.name for output in graph.output], set(), []
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in kinds and constants.intersection(node.input):
            found.append(node.name)
        else:
            waiting += _inputs(node)
    return found


def _inputs(node) -> list[str]:
    """Names of all that a node reads, also inside of its loops."""
    inner = [inside for attribute in node.attribute for inside in attribute.g.node]
    return [*node.input, *(name for inside in inner for name in _inputs(inside))]


def _let_tf2onnx_know_numpy_2() -> None:
    """Keras' own patch of tf2onnx, which uses names that numpy 2 has no more."""
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that there will be an `np.object`
        patch_tf2onnx()


def _to_openvino(task, path, precision: str, decode: bool, images) -> None:
    import openvino

    # Not by `openvino.convert_model`, which sends statistics of use over the network.
    with tempfile.TemporaryDirectory() as folder:
        if precision == "int8":  # OpenVINO runs what onnxruntime has quantized
            source = os.path.join(folder, "int8.onnx")
            _to_onnx(task, source, precision, decode, images)
        else:
            source = _write(_function(task, decode), folder)
        model = openvino.Core().read_model(source)
        openvino.save_model(model, path, compress_to_fp16=precision == "float16")


def _to_litert(task, path, precision: str, decode: bool, images) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        folder = _write(_function(task, decode, batch_size=1), folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision == "int8":
            converter.representative_dataset = lambda: ([image[None]] for image in images)
        path.write_bytes(converter.convert())


def _write(function, folder: str) -> str:
    """Path of a new SavedModel of one function, for converters that read files."""
    import tensorflow as tf

    path = os.path.join(folder, "saved_model")
    tf.saved_model.save(tf.Module(), path, signatures={"serving_default": function})
    return path
