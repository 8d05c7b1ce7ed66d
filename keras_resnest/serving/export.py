"""Export to every serving runtime."""

import os

from keras_resnest.checks import checked
from keras_resnest.serving.files import export_file
from keras_resnest.serving.graph import check_backend
from keras_resnest.serving.saved_model import export_saved_model

# Precisions that each format supports.
FORMATS = {
    "tf_saved_model": ("float32", "bfloat16"),
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "int8"),
    "litert": ("float32", "float16", "int8"),
}


@checked
def export_model(
    model,
    filepath: str | os.PathLike,
    format: str = "tf_saved_model",
    precision: str = "float32",
    decode: bool = True,
    representative_images=None,
    verbose: bool = False,
    freeze: bool = False,
    **options,
) -> None:
    """Exports a trained model to a runtime that requires neither Keras nor this package.

    Batch normalization is folded into the convolutions.

    | format | runtime | file | precision |
    | --- | --- | --- | --- |
    | `"tf_saved_model"` | TensorFlow, TensorFlow Serving | folder | float32, bfloat16 |
    | `"onnx"` | onnxruntime and others | `.onnx` | float32, float16, int8 |
    | `"openvino"` | openvino | `.xml` and `.bin` | float32, float16, int8 |
    | `"litert"` | ai-edge-litert | `.tflite` | float32, float16, int8 |

    Every format takes `images` (batch, height, width, 3), RGB, 0 to 255, float32, and returns
    what `predict` returns, under the same names. LiteRT takes one image at a time. SavedModels
    have further signatures, see `export_saved_model`. The other formats write image shape, box
    format and class names to a JSON file named after the model, such as `detector.onnx.json`, and
    ONNX and OpenVINO the configurations of model servers: `detector.onnx.config.pbtxt` for Triton,
    `detector.xml.ovms.json` for OpenVINO Model Server.

    `"float16"` halves the file; ONNX also computes in float16 where the device can, OpenVINO
    chooses. `"int8"` quantizes the network, calibrated on `representative_images`; LiteRT and
    OpenVINO require `decode=False` for int8 detectors. OpenVINO computes in bfloat16 by default on
    processors that support it; compile with `{"INFERENCE_PRECISION_HINT": "f32"}` to avoid this.

    Args:
        model: a `RefineDet`, or a network of `keras_resnest.backbones`.
        filepath: file or folder to write.
        format: a format of the table.
        precision: a precision of the table.
        decode: whether a detector's graph decodes boxes and suppresses duplicates. If False, it
            returns the raw outputs, for `NumpyDetectionDecoder`. SavedModels always have both.
        representative_images: for int8, dozens of typical images (n, height, width, 3) of the
            model's size, 0 to 255.
        verbose: whether to print the path and, for a SavedModel, the signatures.
        freeze: as in `export_saved_model`; the other formats hold constants in any case.
        **options: for classifiers, `image_shape`, `class_names` and `crop_ratio`; see
            `export_saved_model`.

    Raises:
        ValueError: if Keras does not run on TensorFlow, or an argument is invalid.
        ModuleNotFoundError: if a package is missing; `pip install "keras_resnest[export]"`
            installs them all.

    Example:
        >>> export_model(model, "detector.onnx", format="onnx")
        >>> session = onnxruntime.InferenceSession("detector.onnx")
        >>> boxes, confidence, labels, num_detections = session.run(None, {"images": images})
    """
    check_backend()
    _check_arguments(format, precision, decode, representative_images)
    if format == "tf_saved_model":
        export_saved_model(model, filepath, precision, verbose, freeze, **options)
    else:
        export_file(model, filepath, format, precision, decode, representative_images, **options)
    if verbose:
        print(f"Wrote {os.fspath(filepath)}")


def _check_arguments(format, precision, decode, representative_images) -> None:
    if format not in list(FORMATS):
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}. Received: {format!r}")
    if precision not in FORMATS[format]:
        raise ValueError(
            f"`precision` of {format} must be one of {', '.join(FORMATS[format])}. "
            f"Received: precision={precision!r}"
        )
    if (precision == "int8") != (representative_images is not None):
        received = None if representative_images is None else "given"
        raise ValueError(
            '`representative_images` is required for precision="int8" and must be None otherwise. '
            f"Received: precision={precision!r}, representative_images={received}"
        )
    if not decode and format == "tf_saved_model":
        raise ValueError(
            "A SavedModel always decodes; its signature `raw_outputs` returns the raw outputs. "
            "Received: decode=False"
        )
