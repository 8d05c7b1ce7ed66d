"""Uploads and loads presets and prints a line of JSON for each.

`share_preset.py TASK...`; a task is `FOLDER,hf://user/name` to upload or `hf://user/name` to load.
"""

import hashlib
import json
import sys
import time

import keras_resnest as kr

time.sleep = lambda seconds: None  # huggingface_hub waits half a minute for a lost server
for task in sys.argv[1:]:
    try:
        if "," in task:
            answer = kr.upload_preset(*task.split(","))
        else:
            weights = kr.RefineDet.from_preset(task).get_weights()
            answer = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
    except Exception as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    print("\n" + json.dumps({"answer": answer}))
