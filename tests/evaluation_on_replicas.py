"""Program of test_distribution: evaluation of a detector on two replicas."""

from distributed_training import replicas
from test_callbacks import NAMES, as_dataset, compiled, expected_map, planted

from keras_resnest.evaluation import collect_detections, evaluate_detections


def main(folder):
    with replicas(2).scope():
        model = compiled(shift=3.0)
        model.build((None, 64, 64, 3))
    truth, found = collect_detections(model, as_dataset(*planted()))
    assert [len(t["labels"]) for t in truth] == [len(f["labels"]) for f in found]
    value = evaluate_detections(model, as_dataset(*planted()), NAMES).mAP
    assert abs(value - expected_map(3.0)) < 1e-9, value
