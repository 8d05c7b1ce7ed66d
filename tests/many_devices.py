"""Program of test_distribution: calls functions of a folder in a process with four CPU devices.

    python tests/many_devices.py FOLDER clipped_gradients.main distributed_training.main

The error of each function, or nothing, goes to FOLDER/<module>.<function>.txt.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        module, function = name.split(".")
        error = ""
        try:
            getattr(importlib.import_module(module), function)(folder)
        except Exception:
            error = traceback.format_exc()
        (folder / f"{name}.txt").write_text(error)
