"""Times exported models against PyTorch and the other runtimes, in one run.

Each runtime has its own process. They take turns, call by call, and an untimed call of the same
kind precedes every timed one. The program prints three ratios: the median of the ratios within a
turn, the ratio of the fastest turns ("min"), and the ratio of CPU times. On a busy machine trust
"min", or "CPU" with `--threads 1`: PyTorch's threads spin while they wait for one without a core,
and take ten times as long.

PyTorch, OpenVINO, onnxruntime and LiteRT are skipped where they are not installed:
`pip install torch resnest "keras_resnest[export]"`.

    python benchmarks/deploy_latency.py
    python benchmarks/deploy_latency.py --parts classifier --runs 30
    python benchmarks/deploy_latency.py --parts detector --weights detector.keras
    python benchmarks/deploy_latency.py --fast --model resnest14_tiny

- `classifier`: ResNeSt-50, 224, the same random weights everywhere; "diff" is the largest
  difference from PyTorch's logits, relative to their standard deviation. Images are normalized and
  transposed before PyTorch's network and inside ours.
- `detector`: RefineDet320 on ResNeSt-50, one image, 20 classes. With random weights all anchors
  are candidates of all classes, unlike with any trained network: close to the most work for
  decoding and NMS. The rows "as trained" decode synthetic outputs of an image with ten objects,
  where 3 % of the anchors are not background: once with the paper's limits, 400 per class before
  NMS and 200 detections, and once with those of the Caffe code and its ports, 1000 and 500.
  `--weights` takes a trained detector, with its own limits.
- `postprocess`: decoding and NMS alone, of such outputs and of the worst case ("crowded": all
  anchors are candidates of all classes and none overlap). PyTorch's ports loop over the classes in
  Python; `deploy_workers.py` does the same in code of its own.
- `export`: RefineDet320 on ResNeSt-50 and RefineDet512 on ResNeSt-101: time, size and memory of an
  export; a fresh process that loads it; a C program that loads it and answers one request.

The worker processes inherit TF_ONEDNN_ASSUME_FROZEN_WEIGHTS, which makes variables as fast as
constants.

`--model` selects another backbone for all parts; `--fast` uses small images and few turns, to try
the program. Linux only.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from deploy_workers import NUM_CLASSES, PEERS, SAVED_MODELS

WORKERS = pathlib.Path(__file__).with_name("deploy_workers.py")
LOADER = WORKERS.parents[1] / "tests" / "programs" / "saved_model_loader.c"
# Packages that each runtime and its export need.
PACKAGES = {
    "torch": ("torch", "resnest"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx", "tf2onnx"),
    "litert": ("ai_edge_litert",),
}
FORMATS = {"openvino": "openvino", "onnxruntime": "onnx", "litert": "litert"}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
# Spinning threads would take the cores of the next process.
PAUSE = 0.02
AS_TRAINED = "decoding + NMS, as trained"
IMPLEMENTATIONS = ("TensorFlow", "portable", "numpy", "PyTorch port")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="The docstring of the program describes the parts.",
    )
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--runs", type=int, help="turns per runtime (15, with --fast 3)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of each runtime (%(default)s)"
    )
    parser.add_argument(
        "--runtimes",
        nargs="*",
        choices=PACKAGES,
        default=list(PACKAGES),
        help="in addition to TensorFlow",
    )
    parser.add_argument("--weights", help="a saved detector instead of random weights")
    parser.add_argument("--fast", action="store_true", help="small images, few turns")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or (3 if arguments.fast else 15)
    if arguments.weights:
        arguments.weights = os.path.abspath(arguments.weights)
    return arguments


def cpu_facts():
    """Returns the name and the instruction sets of the processor."""
    with open("/proc/cpuinfo") as file:
        lines = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
    facts = {key.strip(): value.split() for key, value in lines.items()}
    flags = [f"{'' if flag in facts['flags'] else 'no '}{flag}" for flag in FLAGS]
    return f"{' '.join(facts['model name'])}: {', '.join(flags)}"


def available(arguments, runtimes, model):
    """Returns the installed runtimes that have the network; prints why others are skipped."""
    result = ["tensorflow"]
    for runtime in runtimes:
        if runtime not in arguments.runtimes:
            continue
        missing = [p for p in PACKAGES[runtime] if importlib.util.find_spec(p) is None]
        if missing:
            print(f"skipped {runtime}: not installed: {', '.join(missing)}")
        elif runtime == "torch" and model is not None and model not in PEERS:
            print(f"skipped {runtime}: its package has no {model}")
        else:
            result.append(runtime)
    return result


# --- Processes -------------------------------------------------------------------------------


def process(arguments, log, task, part, runtime, folder, **options):
    """Starts `deploy_workers.py`, whose standard error goes to the file `log`."""
    words = [f"--folder={folder}", f"--threads={arguments.threads}"]
    if arguments.weights:
        words.append(f"--weights={arguments.weights}")
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "KERAS_BACKEND": "tensorflow",
    }
    command = [sys.executable, str(WORKERS), task, part, runtime, *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with open(log, "w") as stderr:
        return subprocess.Popen(command, stderr=stderr, env=environment, **pipes)


def make(arguments, part, runtime, folder, **options):
    """Runs a maker, which exports models; returns what it reports."""
    log = folder / f"{part}_{runtime}.log"
    maker = process(arguments, log, "make", part, runtime, folder, **options)
    output, _ = maker.communicate()
    if maker.returncode:
        raise SystemExit(f"The maker of {part} failed:\n{log.read_text()}")
    return json.loads(output)


class Worker:
    """A process that runs and times calls on request."""

    def __init__(self, arguments, part, runtime, folder, **options):
        self.log = folder / f"{part}_{runtime}.log"
        self.process = process(arguments, self.log, "time", part, runtime, folder, **options)
        self.labels = None

    def start(self):
        self.labels = self._read()

    def ask(self, do, label, batch):
        self.process.stdin.write(json.dumps({"do": do, "label": label, "batch": batch}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SystemExit(f"A worker ended:\n{self.log.read_text()}")
        return json.loads(line)

    def close(self):
        self.process.communicate()


@contextlib.contextmanager
def working(arguments, part, runtimes, folder, **options):
    """Yields the workers of a part, started in parallel."""
    workers = [Worker(arguments, part, r, folder, **options) for r in runtimes]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            worker.close()


# --- Times -----------------------------------------------------------------------------------


class Times:
    """Wall and CPU seconds of every turn, by label."""

    def __init__(self, workers, batch, runs):
        pairs = [(worker, label) for worker in workers for label in worker.labels]
        self.differences = {
            label: worker.ask("prepare", label, batch)["difference"] for worker, label in pairs
        }
        self.turns = {label: [] for _, label in pairs}
        for _ in range(runs):
            for worker, label in pairs:
                time.sleep(PAUSE)
                answer = worker.ask("run", label, batch)
                self.turns[label].append((answer["seconds"], answer["cpu_seconds"]))
        self.fastest = {label: min(turns)[0] for label, turns in self.turns.items()}

    def add(self, label, *parts, sign=1):
        """Adds a row that is the sum of others, or the first minus the rest."""
        rows = [self.turns[part] for part in parts]
        self.turns[label] = [
            tuple(a + sign * sum(rest) for a, *rest in zip(*turn, strict=True))
            for turn in zip(*rows, strict=True)
        ]
        first, *rest = (self.fastest[part] for part in parts)
        self.fastest[label] = first + sign * sum(rest)

    def milliseconds(self, label, what=0):
        return 1000 * statistics.median(turn[what] for turn in self.turns[label])

    def ratios(self, label, peer):
        """Returns the median ratio within a turn, that of the fastest turns, that of CPU times."""
        pairs = list(zip(self.turns[label], self.turns[peer], strict=True))
        medians = [statistics.median(a[i] / max(b[i], 1e-9) for a, b in pairs) for i in (0, 1)]
        return medians[0], self.fastest[label] / self.fastest[peer], medians[1]

    def print_table(self, reference):
        print(f"{'':40}{'ms':>9}{'min':>9}{'CPU ms':>9}{'ratio':>8}{'min':>8}{'CPU':>8}{'diff':>9}")
        for label in self.turns:
            row = f"{self.milliseconds(label):9.1f}{1000 * self.fastest[label]:9.1f}"
            row += f"{self.milliseconds(label, 1):9.1f}"
            row += "".join(f"{ratio:8.3f}" for ratio in self.ratios(label, reference))
            difference = self.differences.get(label)
            print(f"{label:40}{row}{'' if difference is None else f'{difference:9.1e}'}")

    def print_goal(self, label, peer, goal, name=None):
        ratios = "".join(f"{ratio:8.3f}" for ratio in self.ratios(label, peer))
        print(f"{name or f'{label} / {peer}':67}{ratios}   goal <= {goal}", flush=True)


# --- Parts -----------------------------------------------------------------------------------


def classifier(arguments, folder):
    """Times one network in all runtimes."""
    model, side = arguments.model or "resnest50", 64 if arguments.fast else 224
    batches = [1, 2] if arguments.fast else [1, 8]
    runtimes = available(arguments, ("torch", "openvino", "onnxruntime"), model)
    options = {"model": model, "sizes": side, "batch_sizes": batches}
    formats = [FORMATS[r] for r in runtimes if r in FORMATS]
    if "torch" in runtimes:
        make(arguments, "classifier", "torch", folder, formats=formats, **options)
    make(arguments, "classifier", "tensorflow", folder, formats=formats, **options)
    with working(arguments, "classifier", runtimes, folder, formats=formats, **options) as workers:
        for batch in batches:
            print(f"\nclassifier: {model}, {batch} x {side} x {side}, {arguments.threads} threads")
            report_classifier(Times(workers, batch, arguments.runs), batch)


def report_classifier(times, batch):
    peer = "PyTorch eager, float32"
    times.print_table(peer if peer in times.turns else "SavedModel as Keras writes it")
    if peer in times.turns:
        ours = "our SavedModel, float32"
        times.print_goal(ours, peer, 0.95 if batch == 1 else 0.70)
        if batch > 1:
            times.print_goal("our SavedModel, bfloat16", peer, 0.40)
    if os.environ.get("TF_ONEDNN_ASSUME_FROZEN_WEIGHTS") == "1":
        times.print_goal("our SavedModel, float32", "our SavedModel, frozen", 1.05)
    for precision in ("float32", "bfloat16"):
        ours, theirs = f"our OpenVINO, {precision}", f"OpenVINO of PyTorch, {precision}"
        if theirs in times.turns:
            times.print_goal(ours, theirs, 1.05)


def detector(arguments, folder):
    """Times the way from a file to detections, and the network alone."""
    # With --weights, PyTorch decodes the outputs of our network.
    model = arguments.model or "resnest50"
    known = None if arguments.weights else model
    runtimes = available(arguments, ("torch", "openvino", "onnxruntime", "litert"), known)
    detector_of(arguments, folder, model, runtimes, top_k=400)
    if "torch" in runtimes and not arguments.weights:
        detector_of(arguments, folder, model, ["tensorflow", "torch"], top_k=1000)


def detector_of(arguments, folder, model, runtimes, top_k):
    side, folder = 128 if arguments.fast else 320, folder / str(top_k)
    folder.mkdir()
    formats = [FORMATS[r] for r in runtimes if r in FORMATS]
    options = {"model": model, "sizes": side, "formats": formats, "top_k": top_k}
    if "torch" in runtimes and not arguments.weights:
        make(arguments, "detector", "torch", folder, **options)
    facts = make(arguments, "detector", "tensorflow", folder, **options)
    name = arguments.weights and os.path.basename(arguments.weights)
    print(
        f"\ndetector: {name or f'RefineDet on {model}, random weights'}, 1 x {facts['size']}, "
        f"{arguments.threads} threads; {facts['anchors']} anchors x {facts['classes']} classes, "
        f"{facts['candidates']} candidates; {top_k} of a class before NMS, {top_k // 2} after"
    )
    with working(arguments, "detector", runtimes, folder, **options) as workers:
        report_detector(Times(workers, 1, arguments.runs))


def report_detector(times):
    for precision in ("float32", "bfloat16"):
        name = f"SavedModel {precision}"
        whole, network = f"{name}, pixels to detections", f"{name}, network alone"
        times.add(f"{name}, decoding + NMS", whole, network, sign=-1)
        if AS_TRAINED in times.turns:
            times.add(f"{name}, whole, as trained", network, AS_TRAINED)
    has_peer = "PyTorch, network alone" in times.turns
    if has_peer:
        for end in ("", ", as trained"):
            parts = "PyTorch, network alone", f"PyTorch, decoding + NMS{end}"
            times.add(f"PyTorch, whole{end}", *parts)
    reference = "PyTorch, whole" if has_peer else "SavedModel float32, file to detections"
    times.print_table(reference)
    for precision in ("float32", "bfloat16"):
        name = f"SavedModel {precision}"
        whole = f"{name}, pixels to detections"
        what = f"{name}, decoding + NMS / whole"
        times.print_goal(f"{name}, decoding + NMS", whole, 0.10, what)
        if AS_TRAINED in times.turns:
            whole = f"{name}, whole, as trained"
            times.print_goal(AS_TRAINED, whole, 0.10, f"{what}, as trained")
    if has_peer:
        for ours, end in (("file to detections", ""), ("whole, as trained", ", as trained")):
            times.print_goal(f"SavedModel float32, {ours}", f"PyTorch, whole{end}", 0.35)


def postprocess(arguments, folder):
    """Times decoding and NMS alone."""
    sizes = [64] if arguments.fast else [320, 512]
    options = {"sizes": sizes, "classes": [NUM_CLASSES + 1, 81]}
    runtimes = available(arguments, ("torch",), None)
    with working(arguments, "postprocess", runtimes, folder, **options) as workers:
        times = Times(workers, 1, arguments.runs)
    few, many = options["classes"]
    print(
        f"\npostprocess: ms of decoding + NMS of one image, {few} and {many} classes, and "
        f"growth: their ratio / ({many} / {few})"
    )
    known = {label.split("|")[0] for label in times.turns}
    implementations = [name for name in IMPLEMENTATIONS if name in known]
    print(f"{'':18}" + "".join(f"{name:>25}" for name in implementations))
    for side in sizes:
        for crowded in (False, True):
            what = f"{side}|{crowded}"
            row = "".join(growth(times, f"{i}|{what}", few, many) for i in implementations)
            print(f"{side:4}, {'crowded' if crowded else 'as trained':12}{row}", flush=True)


def growth(times, label, few, many):
    labels = f"{label}|{few}", f"{label}|{many}"
    milliseconds = "".join(f"{times.milliseconds(label):9.2f}" for label in labels)
    return f"{milliseconds}{times.ratios(labels[1], labels[0])[0] * few / many:7.2f}"


def export(arguments, folder):
    """Exports detectors and loads each export in fresh processes."""
    cases = [("resnest50", 320), ("resnest101", 512)]
    if arguments.weights or arguments.model or arguments.fast:
        cases = [(arguments.model or "resnest50", 128 if arguments.fast else 320)]
    program = build_loader(folder)
    for model, side in cases:
        name = arguments.weights and os.path.basename(arguments.weights)
        print(f"\nexport: {name or f'RefineDet{side} on {model}'}; seconds, MB, MiB of memory")
        columns = ("export", "CPU", "MB", "peak", "import", "load", "first", "second", "third")
        columns = (*columns, "peak", "C", "peak")
        print(f"{'':10}" + "".join(f"{column:>9}" for column in columns))
        for kind in SAVED_MODELS:
            options = {"formats": kind, "model": model, "sizes": side}
            facts, words = make(arguments, "export", "tensorflow", folder, **options)
            loads = [
                make(arguments, "load", "tensorflow", folder, formats=kind)
                for _ in range(1 if arguments.fast else 3)
            ]
            medians = [statistics.median(load[key] for load in loads) for key in loads[0]]
            in_c = run_loader(program, words)
            row = "".join(f"{value:9.2f}" for value in (*facts.values(), *medians, *in_c))
            print(f"{kind:10}{row}", flush=True)


def build_loader(folder):
    """Compiles the C program of the tests; returns None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("skipped C: there is no compiler")
        return None
    (package,) = importlib.util.find_spec("tensorflow").submodule_search_locations
    libraries = [f"{package}/libtensorflow_{name}.so.2" for name in ("cc", "framework")]
    command = [compiler, "-isystem", f"{package}/include", LOADER, *libraries]
    subprocess.run([*command, f"-Wl,-rpath,{package}", "-o", folder / "loader"], check=True)
    return folder / "loader"


def run_loader(program, words):
    """Returns the seconds and the MiB of a C program that loads an export and runs it once."""
    if program is None:
        return ()
    start = time.perf_counter()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    null = subprocess.DEVNULL
    process = subprocess.Popen([program, *words], stdout=null, stderr=null, env=environment)
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    if status:
        raise SystemExit(f"The C program failed: {program} {' '.join(words)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


PARTS = {
    "classifier": classifier,
    "detector": detector,
    "postprocess": postprocess,
    "export": export,
}


def main():
    arguments = parse_arguments()
    print(f"{cpu_facts()}; load {os.getloadavg()[0]:.1f}")
    for part in PARTS:
        if part in arguments.parts:
            with tempfile.TemporaryDirectory() as folder:
                PARTS[part](arguments, pathlib.Path(folder))


if __name__ == "__main__":
    main()
