"""Times VOC's and COCO's average precision on a large random dataset.

python benchmarks/average_precision.py --images 5000 --detections 100 --classes 20
"""

import argparse
import time

import numpy as np

from keras_resnest.evaluation import coco_average_precision, voc_average_precision


def random_images(count: int, rows: int, classes: int, seed: int, confidence: bool) -> list[dict]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        corner, size = rng.uniform(0, 400, (rows, 2)), rng.uniform(10, 100, (rows, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        image = {"boxes": boxes, "labels": rng.integers(0, classes, rows)}
        images.append(image | ({"confidence": rng.random(rows)} if confidence else {}))
    return images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=5, help="per image")
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--classes", type=int, default=20)
    arguments = parser.parse_args()

    count, classes = arguments.images, arguments.classes
    objects = random_images(count, arguments.objects, classes, 0, confidence=False)
    detections = random_images(count, arguments.detections, classes, 1, confidence=True)
    for name, function in (("VOC", voc_average_precision), ("COCO", coco_average_precision)):
        begin = time.perf_counter()
        function(objects, detections, num_classes=classes)
        print(f"{name}: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
