"""Export as one file: ONNX, OpenVINO and LiteRT, each by its own converter."""

import os
import pathlib
import shutil
import tempfile

import numpy as np

from keras_resnest.serving.deployment import deployment_function
from keras_resnest.serving.saved_model import write_facts
from keras_resnest.serving.tasks import task_of

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}
ONNX_OPSET = 17


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
    if format == "litert" and precision == "int8" and decode:
        raise ValueError(
            "LiteRT would compute boxes in 8 bits too: export with decode=False and decode with "
            'NumpyDetectionDecoder. Received: format="litert", precision="int8", decode=True'
        )
    convert = {"onnx": _to_onnx, "openvino": _to_openvino, "litert": _to_litert}[format]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        folder = pathlib.Path(folder)
        convert(task, folder / path.name, precision, decode, images)
        _write_side_files(task, folder, path.stem, precision, decode)
        for file in sorted(folder.iterdir(), key=lambda file: file.suffix == path.suffix):
            os.replace(file, path.parent / file.name)  # the model itself comes last


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


def _write_side_files(task, folder, stem: str, precision: str, decode: bool) -> None:
    facts = {"precision": precision, "decode": decode}
    if task.facts()["task"] == "detection" and not decode:
        facts["anchors"] = f"{stem}.anchors.npy"
        np.save(folder / facts["anchors"], np.asarray(task.model.anchors, "float32"))
    write_facts(task, folder / f"{stem}.json", **facts)


def _function(task, decode: bool, batch_size=None, precision: str = "float32"):
    """Concrete function of `images`, frozen, of operations that every runtime has."""
    import tensorflow as tf

    # LiteRT, of one picture, knows no open sizes.
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
    with _numpy_names_of_old():
        model, _ = tf2onnx.convert.from_function(
            tf.function(lambda images: function(images)), [specification], opset=ONNX_OPSET
        )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    if precision != "int8":
        onnx.save(model, path)
        return
    _quantize_onnx(model, path, images)


def _quantize_onnx(model, path, images) -> None:
    """Static quantisation of convolutions and products; boxes and softmax stay in float32."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.rows = iter([{"images": image[None]} for image in images])

        def get_next(self):
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "float32.onnx")
        onnx.save(model, source)
        quantization.quantize_static(
            source,
            os.fspath(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _numpy_names_of_old():
    """Keras' own patch of tf2onnx, which uses names that numpy 2 has no more."""
    import contextlib

    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    patch_tf2onnx()
    return contextlib.nullcontext()


def _to_openvino(task, path, precision: str, decode: bool, images) -> None:
    import openvino

    model = openvino.convert_model(_function(task, decode))
    openvino.save_model(model, path, compress_to_fp16=precision == "float16")


def _to_litert(task, path, precision: str, decode: bool, images) -> None:
    import tensorflow as tf

    function = _function(task, decode, batch_size=1)
    folder = path.parent / "saved_model"
    tf.saved_model.save(tf.Module(), str(folder), signatures={"serving_default": function})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        converter.representative_dataset = lambda: ([image[None]] for image in images)
    path.write_bytes(converter.convert())
    shutil.rmtree(folder)
