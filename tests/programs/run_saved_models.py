"""Runs the SavedModels of a folder, where Keras and this package cannot be imported.

Usage: run_saved_models.py ROOT. ROOT holds `models/NAME/`, `NAME.npy` (images for tensors) and
`images/` (files). Writes `found.npz`, the arrays "NAME/CALL/OUTPUT", and `facts.json`, what the
graphs are made of.
"""

import json
import pathlib
import sys

EVERY_WAY = ("detector", "classifier")  # models of which all signatures are called
BLOCKED = ("keras", "tf_keras", "keras_resnest")
for name in BLOCKED:
    sys.modules[name] = None  # so that importing it fails

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.core.protobuf import saved_model_pb2  # noqa: E402


def describe(folder, loaded):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    ops = {node.op for node in nodes}
    return {
        "ops": sorted(ops),
        "not in TensorFlow": sorted(op for op in ops if not hasattr(tf.raw_ops, op)),
        "attributes": sorted({a for n in (*nodes, *graph.library.function) for a in n.attr}),
        "largest": max(node.ByteSize() for node in nodes if node.op == "Const"),
        "signatures": {
            name: {
                argument: [spec.dtype.name, spec.shape.as_list()]
                for argument, spec in signature.structured_input_signature[1].items()
            }
            for name, signature in loaded.signatures.items()
        },
    }


def call(loaded, images, files, every_way):
    floats, integers = tf.constant(images, tf.float32), tf.constant(images, tf.uint8)
    signatures = loaded.signatures
    results = {
        "float 3": signatures["serving_default"](images=floats),
        "bytes": signatures["serve_bytes"](image_bytes=tf.constant(files)),
        "raw": signatures["raw_outputs"](images=floats),
    }
    if every_way:
        results |= {
            "float 1": signatures["serving_default"](images=floats[:1]),
            "uint8": signatures["serve_uint8"](images=integers),
            "serve float": loaded.serve(floats),
            "serve uint8": loaded.serve(integers),
        }
    return results


root, found, facts = pathlib.Path(sys.argv[1]), {}, {}
files = [path.read_bytes() for path in sorted((root / "images").iterdir())]
for folder in (root / "models").iterdir():
    loaded = tf.saved_model.load(str(folder))
    facts[folder.name] = describe(folder, loaded)
    images, every_way = np.load(root / f"{folder.name}.npy"), folder.name in EVERY_WAY
    for name, outputs in call(loaded, images, files, every_way).items():
        for output, value in outputs.items():
            found[f"{folder.name}/{name}/{output}"] = value.numpy()
assert all(sys.modules[name] is None for name in BLOCKED)
np.savez(root / "found.npz", **found)
(root / "facts.json").write_text(json.dumps(facts))
