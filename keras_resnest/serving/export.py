"""`export_model`: one call for every runtime."""

import os

from keras_resnest.serving.graph import check_backend

# Precisions of each format; what a format cannot do is refused, never ignored.
FORMATS = {
    "tf_saved_model": ("float32", "bfloat16"),
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "int8"),
    "litert": ("float32", "float16", "int8"),
}


def export_model(
    model,
    filepath: str | os.PathLike,
    format: str = "tf_saved_model",
    precision: str = "float32",
    decode: bool = True,
    representative_images=None,
    verbose: bool = False,
    freeze: bool = True,
    **options,
) -> None:
    """Writes a trained model for a runtime that needs neither Keras nor this package.

    Batch normalization is folded into the convolutions and the weights are constants (but
    see `freeze`).

    | format | runtime | file | precision |
    | --- | --- | --- | --- |
    | `"tf_saved_model"` | TensorFlow, TensorFlow Serving | folder | float32, bfloat16 |
    | `"onnx"` | onnxruntime and others | `.onnx` | float32, float16, int8 |
    | `"openvino"` | openvino | `.xml` and `.bin` | float32, float16, int8 |
    | `"litert"` | ai-edge-litert | `.tflite` | float32, float16, int8 |

    All take `images` (batch, height, width, 3), RGB, 0 to 255, float32, and return what
    `predict` returns under the same names; LiteRT takes one image at a time. A
    SavedModel has more signatures, see `export_saved_model`. Beside the file of another
    format lies one with `.json` behind its name: image shape, box format, class names.

    `precision="float16"` halves the file; OpenVINO stores weights so and computes as it
    finds best, and ONNX computes in float16 where the device can. `"int8"` quantizes the
    network by what it sees in `representative_images`; of a detector, LiteRT and OpenVINO
    with `decode=False` only. For
    bfloat16 in OpenVINO compile with `{"INFERENCE_PRECISION_HINT": "bf16"}`, its default
    on processors that have it; with `"f32"` it computes as this package does.

    Args:
        model: a `RefineDet`, or a network of `keras_resnest.backbones`.
        filepath: file or folder to write.
        format: see the table.
        precision: see the table.
        decode: whether a detector's boxes are decoded and suppressed inside the graph.
            False gives the raw outputs, `"arm_boxes"`, `"arm_objectness"`, `"odm_boxes"`,
            `"odm_logits"`, for `NumpyDetectionDecoder`, which needs numpy alone. Not for
            SavedModels: their signature `raw_outputs` gives the same.
        representative_images: for int8, images (n, height, width, 3) of the model's
            size, 0 to 255, some tens of the kind that will come.
        verbose: whether to say what was written.
        freeze: False writes the weights of a SavedModel as variables, which takes much less
            memory to load; see `export_saved_model`.
        **options: of a classifier `image_shape`, `class_names` and `crop_share`, see
            `export_saved_model`.

    Raises:
        ValueError: if Keras does not run on TensorFlow, or an argument is wrong.
        ModuleNotFoundError: if the format's packages are missing:
            `pip install "keras_resnest[export]"`.

    Example:

    >>> export_model(model, "detector.onnx", format="onnx")
    >>> session = onnxruntime.InferenceSession("detector.onnx")
    >>> boxes, confidence, labels, num_detections = session.run(None, {"images": images})
    """
    check_backend()
    _check(format, precision, decode, representative_images)
    if not freeze and format != "tf_saved_model":
        raise ValueError(f"`freeze=False` is for SavedModels. Received: format={format!r}")
    if format == "tf_saved_model":
        from keras_resnest.serving.saved_model import export_saved_model

        export_saved_model(model, filepath, precision, verbose, freeze, **options)
    else:
        from keras_resnest.serving.files import export_file

        export_file(model, filepath, format, precision, decode, representative_images, **options)
    if verbose:
        print(f"Wrote {os.fspath(filepath)}")


def _check(format, precision, decode, representative_images) -> None:
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}. Received: {format!r}")
    if precision not in FORMATS[format]:
        raise ValueError(
            f"`precision` of {format} must be one of {', '.join(FORMATS[format])}. "
            f"Received: precision={precision!r}"
        )
    if not decode and format == "tf_saved_model":
        raise ValueError(
            "A SavedModel has both: decoded outputs, and raw ones in its signature "
            "`raw_outputs`. Received: decode=False"
        )
    if (precision == "int8") != (representative_images is not None):
        raise ValueError(
            '`representative_images` go with precision="int8" and with nothing else. '
            f"Received: precision={precision!r}, representative_images="
            f"{None if representative_images is None else 'given'}"
        )
