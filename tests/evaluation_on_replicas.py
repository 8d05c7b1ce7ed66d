"""Program of test_callbacks: evaluation of a detector on two replicas of a MirroredStrategy.

python tests/evaluation_on_replicas.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from test_callbacks import NAMES, as_dataset, compiled, expected_map, planted

from keras_resnest.evaluation import collect_detections, evaluate_detections

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    model = compiled(shift=3.0)
    model.build((None, 64, 64, 3))
truth, found = collect_detections(model, as_dataset(*planted()))
assert [len(t["labels"]) for t in truth] == [len(f["labels"]) for f in found]
value = evaluate_detections(model, as_dataset(*planted()), NAMES).mAP
assert abs(value - expected_map(3.0)) < 1e-9, value
print("two replicas agree")
