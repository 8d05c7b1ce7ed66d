"""Configurations of Triton Inference Server and OpenVINO Model Server for exported files."""

import json
import pathlib

TRITON_BACKENDS = {"onnx": "onnxruntime", "openvino": "openvino"}
TRITON_TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}
# As in the batching parameters of TensorFlow Serving.
TRITON_CONFIG = """\
# For Triton: copy this file to models/NAME/config.pbtxt and the model to models/NAME/1/
backend: "{backend}"
default_model_filename: "{file}"
max_batch_size: 8
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
"""


def write_server_configs(path: pathlib.Path, format: str, images, outputs: dict) -> None:
    """Writes the configurations of the servers that run a format, beside the model at `path`.

    `images` is the `tf.TensorSpec` of the input, `outputs` has those of the outputs by name.
    """
    if format not in TRITON_BACKENDS:  # there is no server for LiteRT
        return
    text = TRITON_CONFIG.format(backend=TRITON_BACKENDS[format], file=path.name)
    text += _tensor("input", "images", images)
    text += "".join(_tensor("output", name, spec) for name, spec in outputs.items())
    path.with_name(f"{path.name}.config.pbtxt").write_text(text, encoding="utf-8")
    if format == "openvino":
        # Without `batch_size` and `shape`, the server takes any batch, as the model does.
        config = {"name": path.stem, "base_path": f"/models/{path.stem}"}
        text = json.dumps({"model_config_list": [{"config": config}]}, indent=1)
        path.with_name(f"{path.name}.ovms.json").write_text(text + "\n", encoding="utf-8")


def _tensor(kind: str, name: str, spec) -> str:
    """Returns the entry of a tensor; Triton leaves out the batch, but needs one dimension."""
    sides = [side or -1 for side in spec.shape.as_list()[1:]]
    shape = f"dims: {sides}" if sides else "dims: [1], reshape: { shape: [] }"
    return f'{kind} {{ name: "{name}", data_type: {TRITON_TYPES[spec.dtype.name]}, {shape} }}\n'
