"""Program of test_saving: loads the models of a folder; an import and a plain load_model must do.

Detectors run on `batch.npz`, another model NAME on NAME.npy. Writes `found.npz` and `configs.json`.
"""

import json
import pathlib
import sys

import keras
import numpy as np

import keras_resnest

root, found, configs = pathlib.Path(sys.argv[1]), {}, {}
batch = dict(np.load(root / "batch.npz"))
for path in root.glob("*.keras"):
    model = keras.saving.load_model(path)
    configs[path.stem] = json.loads(json.dumps(model.get_config()))
    if path.with_suffix(".npy").exists():
        found[path.stem] = model.predict(np.load(path.with_suffix(".npy")), verbose=0)
        found[f"{path.stem}/levels"] = [*getattr(model, "pyramid_outputs", ())]
        continue
    assert type(model) is keras_resnest.RefineDet
    for output, value in model.predict(batch["images"], verbose=0).items():
        found[f"{path.stem}/{output}"] = value
    if path.stem == "trained":
        truth = {"boxes": batch["boxes"], "labels": batch["labels"]}
        found["iterations"] = model.optimizer.iterations.numpy()
        found["next losses"] = model.train_on_batch(batch["images"], truth)
        found["next kernel"] = model.get_layer("conv6_1").kernel.numpy()
np.savez(root / "found.npz", **found)
(root / "configs.json").write_text(json.dumps(configs))
