"""Runs the models of a folder where Keras, TensorFlow and this package cannot be imported.

Usage: run_model_files.py DECODER_NUMPY.py FOLDER onnx|openvino|litert. FOLDER holds the models,
`MODEL_images*.npy` for each, and `runtime.json` with the suffix of models and the batch sizes to
run. Writes `found.npz`, the arrays "MODEL/IMAGES/BATCH/OUTPUT".
"""

import importlib.util
import json
import pathlib
import sys

BLOCKED = ("keras", "tensorflow", "tf_keras", "keras_resnest")
for name in BLOCKED:
    sys.modules[name] = None  # so that importing it fails

import numpy as np  # noqa: E402


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    return argument.name, lambda x: dict(
        zip(names, session.run(None, {argument.name: x}), strict=True)
    )


def openvino(path):
    import openvino

    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (argument,) = model.inputs
    names = [output.any_name for output in model.outputs]

    def run(x):
        results = model({argument.any_name: x})
        return {name: results[name] for name in names}

    return argument.any_name, run


def litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    ((argument,),) = [s["inputs"] for s in interpreter.get_signature_list().values()]
    runner = interpreter.get_signature_runner()
    return argument, lambda x: runner(**{argument: x})


source, folder, runtime = sys.argv[1:]
specification = importlib.util.spec_from_file_location("decoder_numpy", source)
decoder_numpy = importlib.util.module_from_spec(specification)
specification.loader.exec_module(decoder_numpy)

folder = pathlib.Path(folder)
suffix, batches = json.loads((folder / "runtime.json").read_text())
found = {}
for path in sorted(folder.glob("*" + suffix)):
    argument, run = globals()[runtime](path)
    assert argument == "images", argument
    for file in sorted(folder.glob(path.stem.split("_")[0] + "_images*.npy")):
        images_name, images = file.stem.split("_")[-1], np.load(file)
        for batch in batches:
            parts = [run(images[i : i + batch]) for i in range(0, len(images), batch)]
            answer = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            for name, value in answer.items():
                found[f"{path.stem}/{images_name}/{batch}/{name}"] = value
            if path.stem.endswith("_raw"):
                decoder = decoder_numpy.NumpyDetectionDecoder.from_files(f"{path}.json")
                for name, value in decoder(answer).items():
                    found[f"{path.stem}_decoded/{images_name}/{batch}/{name}"] = value
assert all(sys.modules[name] is None for name in BLOCKED)
np.savez(folder / "found.npz", **found)
