"""The processes that `deploy_latency.py` starts, one for each runtime.

Makers write exported models to a folder. A worker is given the part of the benchmark, its runtime
and that folder. It prints the labels of the calls that it can run; for each line with a label and
a batch size on standard input it then prints a line with times.
"""

import argparse
import copy
import functools
import io
import json
import os
import pathlib
import sys
import time

import numpy as np

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], "float32") * 255
IMAGENET_STANDARD_DEVIATION = np.array([0.229, 0.224, 0.225], "float32") * 255
NUM_CLASSES = 20
# Networks that the PyTorch package `resnest` also has.
PEERS = ("resnest50", "resnest101", "resnest200", "resnest269")
RAW_OUTPUTS = ("arm_boxes", "arm_objectness", "odm_boxes", "odm_logits")
# Folder: arguments of `export`.
SAVED_MODELS = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "frozen": {"freeze": True},
}
OBJECTS = 10  # in a synthetic image
FOREGROUND_RATIO = 0.03  # of its anchors

# As in `keras_resnest.detection.DetectionDecoder`; half of --top-k are kept after NMS.
OBJECTNESS_THRESHOLD, CONFIDENCE_THRESHOLD, IOU_THRESHOLD = 0.01, 0.01, 0.45


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="make or time")
    parser.add_argument("part", help="classifier, detector, postprocess, export or load")
    parser.add_argument("runtime", help="torch, tensorflow, openvino, onnxruntime or litert")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="exported models")
    parser.add_argument("--formats", nargs="*", default=[], help="formats to export")
    parser.add_argument("--model", default="resnest50", help="name of the backbone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="image sizes")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[21], help="classes, with background"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="images")
    parser.add_argument("--top-k", type=int, default=400, help="boxes per class before NMS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", help="saved detector")
    return parser.parse_args()


# --- Images and synthetic outputs ----------------------------------------------------------


def random_images(batch, side):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, side, side, 3)).astype("float32")


def for_torch(images):
    """Normalizes and transposes images for PyTorch's network."""
    images = (images - IMAGENET_MEAN) / IMAGENET_STANDARD_DEVIATION
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), "float32")


def jpeg(height=480, width=640):
    """Returns a smooth random image with some noise, which compresses like a photograph."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), "uint8"))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), "float32")
    noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype("uint8")
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def image_of(encoded, height, width):
    """Decodes a file as a client does if the graph cannot; returns a batch of one image."""
    from PIL import Image

    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, "float32")[None]


def synthetic_outputs(anchors, side, classes, crowded):
    """Returns raw outputs of one image like those of a trained network, or the worst case.

    The image has ten objects; the 3 % of the anchors that overlap them most are not background.
    In the worst case (`crowded`) every anchor is a candidate of every class and none overlap.
    """
    rng = np.random.default_rng(0)
    count = len(anchors)
    raw = {"arm_boxes": np.zeros((count, 4)), "odm_boxes": rng.normal(0, 0.5, (count, 4))}
    if crowded:
        raw["odm_boxes"] = np.tile([0.0, 0.0, -10.0, -10.0], (count, 1))
        raw["arm_objectness"] = np.zeros((count, 2))
        raw["odm_logits"] = rng.normal(0, 0.05, (count, classes))
    else:
        best_iou, best = overlap_with_objects(anchors, side, rng)
        found = best_iou >= np.quantile(best_iou, 1 - FOREGROUND_RATIO)
        raw["arm_objectness"] = np.where(found[:, None], [0.0, 2.0], [0.0, -6.0])
        raw["odm_logits"] = rng.normal(-2, 1, (count, classes))
        raw["odm_logits"][np.arange(count), 1 + best % (classes - 1)] += 6
    return {name: value[None].astype("float32") for name, value in raw.items()}


def overlap_with_objects(anchors, side, rng):
    """Returns the highest IoU of each anchor, and the index of that object."""
    corners = rng.uniform(0, 0.6, (OBJECTS, 2)) * side
    objects = np.concatenate([corners, corners + rng.uniform(0.1, 0.4, (OBJECTS, 2)) * side], 1)
    top_left = np.maximum(anchors[:, None, :2], objects[:, :2])
    bottom_right = np.minimum(anchors[:, None, 2:], objects[:, 2:])
    intersection = np.maximum(bottom_right - top_left, 0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (anchors, objects)]
    iou = intersection / (areas[0][:, None] + areas[1] - intersection)
    return iou.max(1), iou.argmax(1)


# --- Makers ----------------------------------------------------------------------------------


def make_classifier_torch(arguments):
    """Writes random weights, PyTorch's outputs and its network in OpenVINO's format."""
    import torch

    network = torch_classifier(arguments)
    randomize_torch(network)
    np.savez(weights_file(arguments), **{k: v.numpy() for k, v in network.state_dict().items()})
    images = for_torch(random_images(max(arguments.batch_sizes), arguments.sizes[0]))
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    np.save(arguments.folder / "expected.npy", expected)
    if "openvino" in arguments.formats:
        import openvino

        model = openvino.convert_model(network, example_input=torch.from_numpy(images[:1]))
        path = arguments.folder / "theirs.xml"
        openvino.save_model(model, path, compress_to_fp16=False)


def torch_classifier(arguments):
    import resnest.torch

    return getattr(resnest.torch, arguments.model)().eval()


def randomize_torch(network):
    """Sets statistics as in a trained network; initial zeros and ones would fold to nothing."""
    import torch

    torch.manual_seed(0)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5).mul_(0.3 if name.endswith("bn3") else 1.0)
                module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


def weights_file(arguments):
    return arguments.folder / "weights.npz"


def make_classifier_tensorflow(arguments):
    """Writes our exports, and a SavedModel as Keras writes it."""
    import keras

    from keras_resnest.backbones import create_backbone

    side = arguments.sizes[0]
    model = create_backbone(arguments.model, include_top=True, classifier_activation=None)
    set_weights(model, weights_file(arguments))
    archive = keras.export.ExportArchive()
    archive.track(model)
    specification = keras.InputSpec(shape=(None, side, side, 3), dtype="float32")
    archive.add_endpoint("serve", lambda x: model(x, training=False), [specification])
    archive.write_out(str(arguments.folder / "plain"), verbose=False)
    for name, options in SAVED_MODELS.items():
        model.export(arguments.folder / name / "1", image_shape=(side, side, 3), **options)
    for file_format, path in files(arguments).items():
        model.export(path, format=file_format, image_shape=(side, side, 3))


def files(arguments):
    """Returns the paths of single-file exports by format."""
    names = {"openvino": "ours.xml", "onnx": "ours.onnx", "litert": "ours.tflite"}
    return {f: arguments.folder / n for f, n in names.items() if f in arguments.formats}


def set_weights(model, path):
    """Loads the weights of PyTorch's network, or sets random ones."""
    import keras

    if path.exists():
        from keras_resnest.backbones import load_torch_state_dict

        with np.load(path) as weights:
            return load_torch_state_dict(model, weights)
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built:
            n = layer.gamma.shape[0]
            scale = rng.uniform(0.5, 1.5, n) * (0.3 if layer.name.endswith("bn3") else 1.0)
            shift, mean = rng.normal(0, 0.2, (2, n))
            layer.set_weights([scale, shift, mean, rng.uniform(0.5, 1.5, n)])


def make_detector_torch(arguments):
    """Writes random weights."""
    import torch
    import torch_refinedet

    torch.manual_seed(0)
    network = torch_refinedet.RefineDet(NUM_CLASSES, arguments.model)
    randomize_torch(network)
    np.savez(weights_file(arguments), **{k: v.numpy() for k, v in network.state_dict().items()})


def make_detector_tensorflow(arguments):
    """Writes our exports, and the outputs of the network for the image."""
    model = make_detector(arguments)
    height, width = model.image_shape[:2]
    images = image_of(jpeg(), height, width)
    raw = {name: np.asarray(value) for name, value in model(images, training=False).items()}
    np.savez(arguments.folder / "raw.npz", images=images, anchors=model.anchors, **raw)
    for precision in ("float32", "bfloat16"):
        model.export(arguments.folder / precision / "1", precision=precision)
    for file_format, path in files(arguments).items():
        model.export(path, format=file_format)
    return {
        "classes": model.num_classes + 1,
        "anchors": len(model.anchors),
        "size": f"{height}x{width}",
        "candidates": candidates(model, raw),
    }


def make_detector(arguments):
    import keras

    from keras_resnest import RefineDet

    if arguments.weights:
        return keras.saving.load_model(arguments.weights)
    keras.utils.set_random_seed(0)
    side = arguments.sizes[0]
    decoder = our_decoder(arguments.top_k)
    model = RefineDet(NUM_CLASSES, arguments.model, (side, side, 3), decoder=decoder)
    set_weights(model, weights_file(arguments))
    return model


def our_decoder(top_k):
    from keras_resnest.detection import DetectionDecoder

    return DetectionDecoder(pre_nms_top_k=top_k, max_detections=top_k // 2)


def candidates(model, raw):
    """Counts the pairs of anchor and class above the thresholds."""
    _, confidence = model.decoder.candidates(raw, model.anchors)
    return int(np.sum(np.asarray(confidence) > model.decoder.confidence_threshold))


def make_export_tensorflow(arguments):
    """Returns seconds, bytes and memory of an export, and the words that run it in C."""
    from tensorflow.core.protobuf import saved_model_pb2
    from training_step import memory

    model, (name,) = make_detector(arguments), arguments.formats
    folder = arguments.folder / name / "1"
    start, cpu_start = time.perf_counter(), time.process_time()
    model.export(folder, **SAVED_MODELS[name])
    facts = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "MB": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6,
        "peak": memory("VmHWM"),
    }
    image = arguments.folder / "image.jpg"
    image.write_bytes(jpeg())
    proto = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    signature = proto.meta_graphs[0].signature_def["serve_bytes"]
    outputs = [output.name for output in signature.outputs.values()]
    words = [folder, "bytes", signature.inputs["image_bytes"].name, image, "--", *outputs]
    return facts, list(map(str, words))


def make_load_tensorflow(arguments):
    """Loads an exported detector in a fresh process and answers two requests."""
    from training_step import memory

    clock = [time.perf_counter()]

    def lap():
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    tf = limited_tensorflow(arguments)
    facts = {"import": lap()}
    loaded = tf.saved_model.load(str(arguments.folder / arguments.formats[0] / "1"))
    facts["load"] = lap()
    request = tf.constant([jpeg()])
    lap()
    for name in ("first", "second", "third"):
        loaded.signatures["serve_bytes"](image_bytes=request)["boxes"].numpy()
        facts[name] = lap()
    return {**facts, "peak": memory("VmHWM")}


# --- Runtimes --------------------------------------------------------------------------------


def limited_tensorflow(arguments):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    return tf


def tensorflow_signature(tf, path, name):
    """Returns a function of one tensor that returns a dictionary of arrays."""
    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures[name]
    (argument,) = signature.structured_input_signature[1]

    def call(value, keep=loaded):  # the signature alone does not keep its weights alive
        return {k: v.numpy() for k, v in signature(**{argument: value}).items()}

    return call


def openvino_network(arguments, path, precision):
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": arguments.threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    return openvino.Core().compile_model(str(path), "CPU", options)


def onnxruntime_session(arguments, path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def limited_torch(arguments):
    import torch

    torch.set_num_threads(arguments.threads)
    return torch


# --- Classifier ------------------------------------------------------------------------------


def time_classifier_tensorflow(arguments):
    tf = limited_tensorflow(arguments)
    paths = {
        "SavedModel as Keras writes it": arguments.folder / "plain",
        "our SavedModel, float32": arguments.folder / "float32" / "1",
        "our SavedModel, bfloat16": arguments.folder / "bfloat16" / "1",
        "our SavedModel, frozen": arguments.folder / "frozen" / "1",
    }

    def prepare(path, batch):
        call = tensorflow_signature(tf, path, "serving_default")
        images = tf.constant(random_images(batch, arguments.sizes[0]))
        return lambda: next(iter(call(images).values()))

    return {label: functools.partial(prepare, path) for label, path in paths.items()}


def time_classifier_torch(arguments):
    torch = limited_torch(arguments)
    network = torch_classifier(arguments)
    with np.load(weights_file(arguments)) as weights:
        network.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})

    def prepare(layout, batch):
        images = torch.from_numpy(for_torch(random_images(batch, arguments.sizes[0])))
        images = images.contiguous(memory_format=layout)
        own = copy.deepcopy(network).to(memory_format=layout)

        def call():
            with torch.inference_mode():
                return own(images).numpy()

        return call

    return {
        "PyTorch eager, float32": functools.partial(prepare, torch.contiguous_format),
        "PyTorch eager, channels_last": functools.partial(prepare, torch.channels_last),
    }


def time_classifier_openvino(arguments):
    def prepare(name, precision, batch):
        network = openvino_network(arguments, arguments.folder / f"{name}.xml", precision)
        images = random_images(batch, arguments.sizes[0])
        if name == "theirs":
            images = for_torch(images)
        return lambda: network(images)[0]

    names = {"ours": "our OpenVINO", "theirs": "OpenVINO of PyTorch"}
    return {
        f"{names[name]}, {label}": functools.partial(prepare, name, precision)
        for label, precision in (("float32", "f32"), ("bfloat16", "bf16"))
        for name in names
        if (arguments.folder / f"{name}.xml").exists()
    }


def time_classifier_onnxruntime(arguments):
    session = onnxruntime_session(arguments, files(arguments)["onnx"])

    def prepare(batch):
        images = random_images(batch, arguments.sizes[0])
        return lambda: session.run(None, {"images": images})[0]

    return {"onnxruntime, our ONNX": prepare}


# --- Detector --------------------------------------------------------------------------------


def time_detector_tensorflow(arguments):
    tf = limited_tensorflow(arguments)
    with np.load(arguments.folder / "raw.npz") as arrays:
        images, anchors = tf.constant(arrays["images"]), arrays["anchors"]
    inputs = {
        "file to detections": ("serve_bytes", tf.constant([jpeg()])),
        "pixels to detections": ("serving_default", images),
        "network alone": ("raw_outputs", images),
    }

    def prepare(precision, signature, value, batch):
        call = tensorflow_signature(tf, arguments.folder / precision / "1", signature)
        return lambda: call(value)

    contenders = {
        f"SavedModel {precision}, {label}": functools.partial(prepare, precision, *signature)
        for precision in ("float32", "bfloat16")
        for label, signature in inputs.items()
    }
    if not arguments.weights:
        case = arguments.sizes[0], NUM_CLASSES + 1, False, False, arguments.top_k
        decode = tensorflow_decoder(tf, anchors, *case)
        contenders["decoding + NMS, as trained"] = lambda batch: decode
    return contenders


def tensorflow_decoder(tf, anchors, side, classes, crowded, portable, top_k):
    """Returns a function without arguments that decodes synthetic outputs."""
    decoder = our_decoder(top_k)
    raw = synthetic_outputs(anchors, side, classes, crowded)
    specification = {k: tf.TensorSpec((None, *v.shape[1:]), v.dtype) for k, v in raw.items()}
    function = tf.function(
        lambda raw: decoder(raw, anchors, (side, side), portable=portable),
        input_signature=[specification],
        autograph=False,
    )
    raw = {name: tf.constant(value) for name, value in raw.items()}
    return lambda: {name: value.numpy() for name, value in function(raw).items()}


def time_detector_torch(arguments):
    torch = limited_torch(arguments)
    with np.load(arguments.folder / "raw.npz") as arrays:
        arrays = {name: torch.from_numpy(value) for name, value in arrays.items()}
    raw = {name: arrays[name] for name in RAW_OUTPUTS}
    decoder = functools.partial(torch_decoder, torch, arrays, arguments.top_k)
    contenders = {"PyTorch, decoding + NMS": lambda batch: decoder(raw)}
    if arguments.weights:
        return contenders
    synthetic = synthetic_outputs(
        arrays["anchors"].numpy(), arguments.sizes[0], NUM_CLASSES + 1, False
    )
    synthetic = {name: torch.from_numpy(value) for name, value in synthetic.items()}
    contenders["PyTorch, decoding + NMS, as trained"] = lambda batch: decoder(synthetic)
    forward = torch_detector(torch, arguments, arrays["images"].numpy())
    for name, value in forward().items():
        np.testing.assert_allclose(value, raw[name], rtol=0.05, atol=0.05, err_msg=name)
    return {"PyTorch, network alone": lambda batch: forward, **contenders}


def torch_detector(torch, arguments, images):
    import torch_refinedet

    network = torch_refinedet.RefineDet(NUM_CLASSES, arguments.model).eval()
    with np.load(weights_file(arguments)) as weights:
        network.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def call():
        with torch.inference_mode():
            return {name: value.numpy() for name, value in network(images).items()}

    return call


def torch_decoder(torch, arrays, top_k, raw):
    def call():
        with torch.inference_mode():
            return decode_like_the_ports(raw, arrays["anchors"], top_k)

    return call


def decode_like_the_ports(raw, anchors, top_k=400):
    """Decodes like the class `Detect` of the PyTorch ports of RefineDet.

    Like the ports it loops over images and classes in Python and suppresses box by box; only the
    best of all classes are chosen with one `topk`, which is faster.
    """
    import torch
    import torch_refinedet

    objectness = raw["arm_objectness"].softmax(-1)[..., 1:]
    confidence = raw["odm_logits"].softmax(-1)
    confidence = torch.where(objectness > OBJECTNESS_THRESHOLD, confidence, 0.0)
    results = []
    for i in range(len(confidence)):
        refined = torch_refinedet.decode_boxes(raw["arm_boxes"][i], anchors)
        boxes = torch_refinedet.decode_boxes(raw["odm_boxes"][i], refined)
        rows = []
        for label in range(1, confidence.shape[-1]):
            scores = confidence[i, :, label]
            mask = scores > CONFIDENCE_THRESHOLD
            if not mask.any():
                continue
            scores, of_class = scores[mask], boxes[mask]
            kept = suppress_as_the_ports_do(of_class, scores, top_k)
            labels = torch.full((len(kept), 1), float(label - 1))
            rows.append(torch.cat([of_class[kept], scores[kept, None], labels], dim=1))
        rows = torch.cat(rows) if rows else boxes.new_zeros((0, 6))
        results.append(rows[rows[:, 4].topk(min(top_k // 2, len(rows))).indices])
    return results


def suppress_as_the_ports_do(boxes, scores, top_k):
    import torch

    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    order = scores.argsort()[-top_k:]
    kept = []
    while len(order):
        best, order = order[-1], order[:-1]
        kept.append(best)
        if not len(order):
            break
        left, right = x1[order].clamp(min=x1[best]), x2[order].clamp(max=x2[best])
        top, bottom = y1[order].clamp(min=y1[best]), y2[order].clamp(max=y2[best])
        intersection = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
        iou = intersection / (areas[order] - intersection + areas[best])
        order = order[iou <= IOU_THRESHOLD]
    return torch.stack(kept)


def time_detector_openvino(arguments):
    network = openvino_network(arguments, files(arguments)["openvino"], "f32")
    return file_and_pixels("OpenVINO", arguments, lambda images: network(images))


def time_detector_onnxruntime(arguments):
    session = onnxruntime_session(arguments, files(arguments)["onnx"])
    return file_and_pixels("ONNX", arguments, lambda x: session.run(None, {"images": x}))


def time_detector_litert(arguments):
    from ai_edge_litert.interpreter import Interpreter

    path = str(files(arguments)["litert"])
    interpreter = Interpreter(path, num_threads=arguments.threads)
    run = interpreter.get_signature_runner()
    return file_and_pixels("LiteRT", arguments, lambda images: run(images=images))


def file_and_pixels(name, arguments, run):
    """Times graphs that decode boxes, after Pillow has decoded the image."""
    with np.load(arguments.folder / "raw.npz") as arrays:
        height, width = arrays["images"].shape[1:3]
    encoded = jpeg()

    def prepare(batch):
        return lambda: run(image_of(encoded, height, width))

    return {f"{name}, file to detections": prepare}


# --- Post-processing -------------------------------------------------------------------------


def time_postprocess_tensorflow(arguments):
    tf = limited_tensorflow(arguments)

    def prepare(implementation, side, classes, crowded, batch):
        anchors = our_anchors(side)
        if implementation == "numpy":
            return numpy_decoder(anchors, side, classes, crowded)
        portable = implementation == "portable"
        return tensorflow_decoder(tf, anchors, side, classes, crowded, portable, arguments.top_k)

    return postprocess_cases(arguments, ("TensorFlow", "portable", "numpy"), prepare)


def time_postprocess_torch(arguments):
    torch = limited_torch(arguments)
    import torch_refinedet

    def prepare(implementation, side, classes, crowded, batch):
        anchors = torch_refinedet.make_anchors(side)
        raw = synthetic_outputs(anchors.numpy(), side, classes, crowded)
        raw = {name: torch.from_numpy(value) for name, value in raw.items()}
        return torch_decoder(torch, {"anchors": anchors}, arguments.top_k, raw)

    return postprocess_cases(arguments, ("PyTorch port",), prepare)


def postprocess_cases(arguments, implementations, prepare):
    return {
        f"{implementation}|{side}|{crowded}|{classes}": functools.partial(
            prepare, implementation, side, classes, crowded
        )
        for implementation in implementations
        for side in arguments.sizes
        for crowded in (False, True)
        for classes in arguments.classes
    }


def our_anchors(side):
    from keras_resnest.detection import AnchorGenerator

    return np.asarray(AnchorGenerator()((side, side)))


def numpy_decoder(anchors, side, classes, crowded):
    from keras_resnest.serving import NumpyDetectionDecoder

    decoder = NumpyDetectionDecoder(anchors, (side, side, 3))
    raw = synthetic_outputs(anchors, side, classes, crowded)
    return lambda: decoder(raw)


# --- Processes -------------------------------------------------------------------------------


def expected_outputs(arguments, batch):
    path = arguments.folder / "expected.npy"
    if arguments.part != "classifier" or not path.exists():
        return None
    return np.load(path)[:batch]


class Timed:
    """The calls that a worker can run, prepared at first use."""

    def __init__(self, arguments, contenders):
        self.arguments = arguments
        self.contenders = contenders
        self.ready = {}

    def prepare(self, label, batch):
        """Returns the largest difference from PyTorch, relative to its standard deviation."""
        self.ready = {key: call for key, call in self.ready.items() if key[1] == batch}
        call = self.ready[label, batch] = self.contenders[label](batch)
        result, expected = call(), expected_outputs(self.arguments, batch)
        if expected is None:
            return {"difference": None}
        return {"difference": float(np.max(np.abs(result - expected)) / np.std(expected))}

    def run(self, label, batch):
        """Times a call after a warm-up call of the same kind."""
        call = self.ready[label, batch]
        call()
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        cpu_seconds = time.process_time() - cpu_start
        return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds}


def main():
    arguments = parse_arguments()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # messages of libraries must not mix with the answers
    act = globals()[f"{arguments.task}_{arguments.part}_{arguments.runtime}"]
    made = act(arguments)
    timed = Timed(arguments, made) if arguments.task == "time" else None
    print(json.dumps(list(made) if timed else made), file=channel, flush=True)
    for line in sys.stdin if timed else ():
        request = json.loads(line)
        answer = getattr(timed, request.pop("do"))(**request)
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
