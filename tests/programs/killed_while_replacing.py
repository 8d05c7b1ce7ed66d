"""Replaces a folder and kills itself before the Nth operation on the file system.

    python killed_while_replacing.py ATOMIC.py FOLDER "exchange" N

`atomic.py` alone starts quickly. With "two steps", the system cannot exchange folders.
"""

import os
import runpy
import signal
import sys

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
OPERATIONS += ("tempfile.mkdtemp", "ctypes.dlsym")

if __name__ == "__main__":
    names = runpy.run_path(sys.argv[1])
    if sys.argv[3] == "two steps":
        names["atomic_folder"].__wrapped__.__globals__["_exchange"] = lambda one, other: False
    count, last = 0, int(sys.argv[4])

    def hook(event, arguments):
        global count
        if event in OPERATIONS:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with names["atomic_folder"](sys.argv[2]) as folder:
        (folder / "saved_model.pb").write_text("second")
        (folder / "assets.extra").mkdir()
        (folder / "assets.extra" / "model.json").write_text("second")
