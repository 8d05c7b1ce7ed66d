"""A forked process of a program that has built a model gets an error; it would wait forever."""

import os
import signal
import time

import numpy as np
import pytest
from detectors import small_backbone, small_detector

IMAGES = np.full((1, 64, 64, 3), 100, "uint8")
DETECTOR, BACKBONE = small_detector((64, 64, 3)), small_backbone()


@pytest.mark.parametrize(
    "action",
    [
        lambda: DETECTOR.predict(IMAGES, verbose=0),
        lambda: DETECTOR.predict_on_batch(IMAGES),
        lambda: DETECTOR.detect(IMAGES[0]),
        lambda: DETECTOR.evaluate(IMAGES, verbose=0),
        lambda: DETECTOR.fit(IMAGES, verbose=0),
        lambda: BACKBONE(IMAGES),
        lambda: BACKBONE.predict(IMAGES, verbose=0),
        lambda: BACKBONE.predict_on_batch(IMAGES),
        small_backbone,
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_is_told_so(action):
    process = os.fork()
    if not process:
        status = 1
        try:
            action()
        except RuntimeError as error:
            status = 42 if 'get_context("spawn")' in str(error) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 42
