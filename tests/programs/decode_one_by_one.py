"""Sends files to `serve_bytes`, one after the other; prints answers and memory as JSON lines.

Usage: decode_one_by_one.py SAVED_MODEL FILE...
A fresh process shows crashes, and the memory of each request alone.
"""

import json
import os
import pathlib
import sys

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # oneDNN's allocator never returns memory

import tensorflow as tf


def memory(name):
    status = pathlib.Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines[name].split()[0]) * 1024


serve = tf.saved_model.load(sys.argv[1]).signatures["serve_bytes"]
for path in map(pathlib.Path, sys.argv[2:]):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    answer = serve(image_bytes=tf.constant([path.read_bytes()]))
    result = {
        "name": path.name,
        "readable": bool(answer["readable"][0]),
        "num_detections": int(answer["num_detections"][0]),
        "bytes": memory("VmHWM") - before,
    }
    print(json.dumps(result), flush=True)
