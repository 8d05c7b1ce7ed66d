"""Time of the average precision over a large random data set: VOC's rule, and COCO's.

python benchmarks/average_precision.py --pictures 5000 --detections 100 --classes 20
"""

import argparse
import time

import numpy as np

from keras_resnest.evaluation import coco_average_precision, voc_average_precision


def random_pictures(count: int, rows: int, classes: int, seed: int, confidence: bool) -> list[dict]:
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        corner, size = rng.uniform(0, 400, (rows, 2)), rng.uniform(10, 100, (rows, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        picture = {"boxes": boxes, "labels": rng.integers(0, classes, rows)}
        pictures.append(picture | ({"confidence": rng.random(rows)} if confidence else {}))
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=5, help="per picture")
    parser.add_argument("--detections", type=int, default=100, help="per picture")
    parser.add_argument("--classes", type=int, default=20)
    arguments = parser.parse_args()

    count, classes = arguments.pictures, arguments.classes
    objects = random_pictures(count, arguments.objects, classes, 0, confidence=False)
    detections = random_pictures(count, arguments.detections, classes, 1, confidence=True)
    for name, function in (("VOC", voc_average_precision), ("COCO", coco_average_precision)):
        begin = time.perf_counter()
        function(objects, detections, num_classes=classes)
        print(f"{name}: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
