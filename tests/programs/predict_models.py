"""Loads saved models without custom objects: `predict_models.py FOLDER NAME...`.

Each NAME.keras predicts on NAME.npy; the outputs become NAME_outputs.npy.
"""

import sys
from pathlib import Path

import keras
import numpy as np

import keras_resnest  # noqa: F401  (registers the layers)

folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    model = keras.saving.load_model(folder / f"{name}.keras", safe_mode=True)
    outputs = model.predict(np.load(folder / f"{name}.npy"), verbose=0)
    np.save(folder / f"{name}_outputs.npy", outputs)
    print(type(model).__name__, *getattr(model, "pyramid_outputs", ()))
