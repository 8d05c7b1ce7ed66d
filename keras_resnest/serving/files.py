"""Export to ONNX, OpenVINO and LiteRT files."""

import importlib.util
import os
import pathlib
import tempfile
import warnings

import numpy as np

from keras_resnest.atomic import atomic_file
from keras_resnest.serving.graph import deployment_function
from keras_resnest.serving.server_configs import write_server_configs
from keras_resnest.serving.tasks import create_task, write_metadata

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}
# Required packages besides TensorFlow.
PACKAGES = {"onnx": ("onnx", "tf2onnx"), "openvino": ("openvino",), "litert": ()}
ONNX_OPSET = 17
QUANTIZED = ("Conv", "MatMul", "Gemm")
# Reasons why a quantized graph cannot decode.
INT8_LIMITS = {
    "litert": "LiteRT would compute boxes in 8 bits too",
    # OpenVINO 2026.4 then returns other outputs of the same network: mAP 0.65 instead of 0.91.
    "openvino": "OpenVINO computes a quantized network wrongly if decoding follows it",
}


def export_file(
    model, filepath, format: str, precision: str, decode: bool, representative_images, **options
) -> None:
    """Exports a model to a format of `SUFFIXES`; `export_model` describes the arguments."""
    path = pathlib.Path(os.path.abspath(filepath))
    if path.suffix != SUFFIXES[format] or path.is_dir():
        raise ValueError(
            f'`filepath` of format="{format}" must be a file that ends with '
            f"{SUFFIXES[format]!r}. Received: {filepath}"
        )
    task = create_task(model, **options)
    is_detector = task.name == "detection"
    decode = decode and is_detector
    images = _check_representative_images(task, representative_images)
    if precision == "int8" and decode and format in INT8_LIMITS:
        raise ValueError(
            f"{INT8_LIMITS[format]}: export with decode=False and decode with "
            f'NumpyDetectionDecoder. Received: format="{format}", precision="int8", decode=True'
        )
    _check_packages(format, precision)
    convert = {"onnx": _to_onnx, "openvino": _to_openvino, "litert": _to_litert}[format]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        function = convert(task, file, precision, decode, images)
        (specification,), _ = function.structured_input_signature
        write_server_configs(file, format, specification, function.structured_outputs)
        entries = {"precision": precision, "decode": decode}
        if is_detector and not decode:
            entries["anchors"] = f"{path.name}.anchors.npy"
            np.save(file.with_name(entries["anchors"]), np.asarray(model.anchors, "float32"))
        write_metadata(task, file.with_name(f"{path.name}.json"), **entries)


def _check_packages(format: str, precision: str) -> None:
    names = PACKAGES[format]
    if precision == "int8" and format != "litert":
        names = (*names, *PACKAGES["onnx"], "onnxruntime")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f'format="{format}" needs the package {name}: pip install "keras_resnest[export]"',
                name=name,
            )


def _check_representative_images(task, images):
    if images is None:
        return None
    images = np.asarray(images, "float32")
    if images.ndim != 4 or images.shape[1:] != tuple(task.image_shape) or not len(images):
        raise ValueError(
            f"`representative_images` must be (n, {', '.join(map(str, task.image_shape))}). "
            f"Received: {images.shape}"
        )
    return images


def _concrete_function(
    task, decode: bool, batch_size=None, precision: str = "float32", freeze: bool = False
):
    """Returns the function of `images`, with operations that every runtime supports."""
    import tensorflow as tf

    # Only LiteRT has a fixed batch size; it does not support variable image sizes either.
    shape = task.signature_shape if batch_size is None else task.image_shape
    specification = tf.TensorSpec((batch_size, *shape), tf.float32, name="images")
    network = deployment_function(task.network, specification, precision, freeze)

    def infer(images):
        raw = network(images)
        return task.results(raw, portable=True) if decode else raw

    function = tf.function(infer, autograph=False).get_concrete_function(specification)
    function.network_variables = network.network_variables
    return function


def _write_saved_model(function, folder: str) -> str:
    """Writes a SavedModel for a converter and returns its path."""
    import tensorflow as tf

    path, module = os.path.join(folder, "saved_model"), tf.Module()
    module.network_variables = function.network_variables
    tf.saved_model.save(module, path, signatures={"serving_default": function})
    return path


# === ONNX ===


def _to_onnx(task, path, precision: str, decode: bool, images):
    """Writes the file and returns the function in it, as do the other converters."""
    import onnx
    import tensorflow as tf
    import tf2onnx
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    network_precision = "float16" if precision == "float16" else "float32"
    function = _concrete_function(task, decode, precision=network_precision, freeze=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about `np.object`
        patch_tf2onnx()  # Keras' patch for names that numpy 2 removed
    model, _ = tf2onnx.convert.from_function(
        tf.function(lambda images: function(images)),
        list(function.structured_input_signature[0]),
        opset=ONNX_OPSET,
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(model)  # tf2onnx does not reject operations that it does not know
    if precision == "int8":
        _quantize_onnx(model, path, images)
    else:
        onnx.save(model, path)
    return function


def _quantize_onnx(model, path, images) -> None:
    """Quantizes convolutions and matrix products, except the last of each path to an output.

    Eight bits are too few for logits and box offsets.
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
            nodes_to_exclude=_last_quantizable_nodes(onnx.load(prepared).graph),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _last_quantizable_nodes(graph) -> list[str]:
    """Returns the names of the nodes in `QUANTIZED` that no other such node follows."""
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    stack, seen, found = [output.name for output in graph.output], set(), []
    while stack:
        node = producers.get(stack.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in QUANTIZED and constants.intersection(node.input):
            found.append(node.name)
        else:
            stack += _node_inputs(node)
    return found


def _node_inputs(node) -> list[str]:
    """Returns the names of all tensors that a node reads, including the bodies of loops."""
    inner = [inside for attribute in node.attribute for inside in attribute.g.node]
    return [*node.input, *(name for inside in inner for name in _node_inputs(inside))]


# === OpenVINO and LiteRT ===


def _to_openvino(task, path, precision: str, decode: bool, images):
    import openvino

    # `openvino.convert_model` would send usage statistics over the network.
    with tempfile.TemporaryDirectory() as folder:
        if precision == "int8":  # OpenVINO reads networks that onnxruntime has quantized
            source = os.path.join(folder, "int8.onnx")
            function = _to_onnx(task, source, precision, decode, images)
        else:
            function = _concrete_function(task, decode)
            source = _write_saved_model(function, folder)
        model = openvino.Core().read_model(source)
        openvino.save_model(model, path, compress_to_fp16=precision == "float16")
    return function


def _to_litert(task, path, precision: str, decode: bool, images):
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        function = _concrete_function(task, decode, batch_size=1)
        source = _write_saved_model(function, folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(source)
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision == "int8":
            converter.representative_dataset = lambda: ([image[None]] for image in images)
        path.write_bytes(converter.convert())
    return function
