"""Presets: folders and repositories of the hub with which models are shared."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_backbone, small_detector
from fresh_process import PACKAGE
from hub_server import running
from PIL import Image
from safetensors.numpy import load_file, save_file

import keras_resnest as kr
from keras_resnest.cli import main
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.loss import RefineDetLoss

PROGRAM = Path(__file__).parent / "programs" / "share_preset.py"
FILES = ["README.md", "config.json", "metadata.json", "model.safetensors"]
SIZE = (64, 64, 3)


@pytest.fixture(scope="module")
def model():
    """Nothing as the constructor makes it: frozen layers, a regularizer, another decoder."""
    detector = small_detector(SIZE, detection_loss=RefineDetLoss(negative_ratio=2.0))
    for layer in detector.backbone.layers[:9]:
        layer.trainable = False
    detector.get_layer("conv6_1").trainable = False
    detector.get_layer("conv6_2").kernel_regularizer = keras.regularizers.L2(1e-2)
    detector.decoder = DetectionDecoder(max_detections=7)
    detector.compile("adam")  # is not shared
    return detector


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / "new" / "red"
    model.save_to_preset(folder)
    return folder


@pytest.fixture
def preset(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "preset")


def change(preset, name, content, hashed=True):
    """Writes a file of a preset, with its checksum if `hashed`."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (preset / name).write_bytes(content)
    if hashed and name != "metadata.json":
        metadata = json.loads((preset / "metadata.json").read_text())
        metadata["sha256"][name] = hashlib.sha256(content).hexdigest()
        (preset / "metadata.json").write_text(json.dumps(metadata))


def read(preset, name="config.json"):
    return json.loads((preset / name).read_text())


def refusal(preset, cls=kr.RefineDet, kind=ValueError) -> str:
    with pytest.raises(kind) as error:
        cls.from_preset(preset)
    assert "\n" not in str(error.value) and str(preset) in str(error.value)
    return str(error.value)


def check_same(again, model):
    assert type(again) is type(model) and again.get_config() == model.get_config()
    assert [w.trainable for w in again.weights] == [w.trainable for w in model.weights]
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# === Folders ===


def test_a_detector_is_loaded_as_it_was(model, saved):
    assert sorted(os.listdir(saved)) == FILES
    again = kr.RefineDet.from_preset(str(saved))
    check_same(again, model)
    assert 0 < len(again.trainable_weights) < len(small_detector(SIZE).trainable_weights)
    assert again.class_names == CLASS_NAMES and again.decoder.max_detections == 7
    assert again.detection_loss.negative_ratio == 2.0 and not again.compiled
    images, _ = rectangles(2, SIZE)
    for name, value in model.predict(images, verbose=0).items():
        np.testing.assert_allclose(again.predict(images, verbose=0)[name], value, rtol=1e-5)


SHUFFLENET = {
    "stackwise_num_filters": [16, 32],
    "stackwise_num_blocks": [2, 2],
    "stem_width": 8,
    "include_top": True,
    "classes": 5,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: kr.create_backbone("resnest14_tiny", classes=5, dropout_rate=0.2, trainable=False),
        lambda: kr.create_backbone("resnest14_tiny", include_top=False, dtype="bfloat16"),
        lambda: kr.backbones.ShuffleNet(**SHUFFLENET),
        lambda: kr.backbones.VGG([4, 8, 8], [1, 1, 1]),
    ],
    ids=["classifier", "bfloat16", "depthwise", "VGG"],
)
def test_backbones_are_loaded_as_they_were(make, tmp_path):
    backbone = make()
    for weight in backbone.weights:  # no two arrays are alike
        weight.assign(np.random.default_rng(0).uniform(0.5, 1.0, weight.shape))
    backbone.save_to_preset(tmp_path)
    check_same(kr.backbones.Backbone.from_preset(tmp_path), backbone)
    check_same(type(backbone).from_preset(tmp_path), backbone)
    assert "a RefineDet" in refusal(tmp_path)


def test_the_weights_are_a_file_for_builders(tmp_path):
    backbone = kr.create_backbone("resnest14_tiny", classes=5)
    backbone.save_to_preset(tmp_path)
    weights = tmp_path / "model.safetensors"
    check_same(kr.create_backbone("resnest14_tiny", classes=5, weights=weights), backbone)


# === What is refused ===


def hashed_weights(preset, **changes):
    arrays = {**load_file(preset / "model.safetensors"), **changes}
    save_file({k: v for k, v in arrays.items() if v is not None}, preset / "model.safetensors")
    change(preset, "model.safetensors", (preset / "model.safetensors").read_bytes())


def flip_bit(preset, hashed):
    content = bytearray((preset / "model.safetensors").read_bytes())
    content[-1] ^= 1
    change(preset, "model.safetensors", bytes(content), hashed)


def truncated(preset, hashed):
    content = (preset / "model.safetensors").read_bytes()
    change(preset, "model.safetensors", content[:-100], hashed)


BIAS = "odm_boxes_0_bias"
DAMAGES = {
    "missing weights": (lambda p: (p / "model.safetensors").unlink(), "no file model.safetensors"),
    "missing config": (lambda p: (p / "config.json").unlink(), "no file config.json"),
    "missing metadata": (lambda p: (p / "metadata.json").unlink(), "no file metadata.json"),
    "wrong hash": (lambda p: flip_bit(p, False), "model.safetensors is not the file that was"),
    "truncated": (lambda p: truncated(p, False), "model.safetensors is not the file that was"),
    "truncated, hashed": (lambda p: truncated(p, True), "not a complete .safetensors"),
    "edited": (
        lambda p: change(p, "config.json", {**read(p), "x": 1}, hashed=False),
        "config.json is not the file that was",
    ),
    "no hash": (lambda p: change(p, "metadata.json", {"format_version": 1}), "instead of None"),
    "newer": (
        lambda p: change(p, "metadata.json", {**read(p, "metadata.json"), "format_version": 2}),
        "higher ones need a newer keras_resnest. Received: 2",
    ),
    "of KerasHub": (
        lambda p: change(p, "metadata.json", {"keras_hub_version": "0.32.0"}),
        "must have format_version=1",
    ),
    "no JSON": (lambda p: change(p, "config.json", b"{"), "config.json is not JSON"),
    "deep": (lambda p: change(p, "metadata.json", b"[" * 10**6), "metadata.json is not JSON"),
    "list": (lambda p: change(p, "config.json", []), "must hold a JSON object. Received: a list"),
    "array missing": (lambda p: hashed_weights(p, **{BIAS: None}), f"missing: {BIAS}"),
    "array left over": (lambda p: hashed_weights(p, x=np.zeros(1, "float32")), "left over: x"),
    "NaN": (
        lambda p: hashed_weights(p, **{BIAS: np.full(12, np.nan, "float32")}),
        f"not finite: {BIAS}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_presets_are_refused_in_one_sentence(preset, damage):
    function, message = DAMAGES[damage]
    function(preset)
    assert message in refusal(preset)


@keras.saving.register_keras_serializable("strangers")
class Executed(keras.layers.Layer):
    """What a user may have registered; a preset must not make it."""

    def __init__(self, **kwargs):
        raise AssertionError("executed")


def strange(name, registered=None, module=None, config=None):
    return {
        "module": module,
        "class_name": name,
        "config": config or {},
        "registered_name": registered,
    }


STRANGERS = {
    "registered": strange("Executed", "strangers>Executed", "builtins"),
    "lambda": strange("__lambda__", "keras_resnest>BoxMatcher", config={"value": "gASV"}),
    "layer of Keras": strange("TorchModuleWrapper", None, "keras.layers"),
    "function of Keras": strange("get_file", None, "keras.utils"),
    "function": strange("function", "system", "os", config="system"),
    "unknown": strange("Nothing", "keras_resnest>Nothing", "keras_resnest"),
}


@pytest.mark.parametrize("place", ["whole", "backbone", "matcher", "layer_changes"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_only_objects_of_the_package_are_made(preset, stranger, place):
    config, stranger = read(preset), STRANGERS[stranger]
    if place == "whole":
        config |= stranger
    elif place == "backbone":
        config["config"]["backbone"] = stranger
    elif place == "matcher":
        config["config"]["detection_loss"]["config"]["matcher"] = stranger
    else:
        config["config"]["layer_changes"]["conv6_2"]["kernel_regularizer"] = stranger
    change(preset, "config.json", config)
    assert "Presets hold objects of keras_resnest" in refusal(preset)


@keras.saving.register_keras_serializable("strangers")
def executed(x):
    raise AssertionError("executed")


def test_names_of_functions_that_a_user_has_registered_are_no_data(tmp_path):
    kr.backbones.ShuffleNet(**SHUFFLENET).save_to_preset(tmp_path)
    config = read(tmp_path)
    config["config"]["classifier_activation"] = "strangers>executed"
    change(tmp_path, "config.json", config)
    assert "Received: strangers>executed" in refusal(tmp_path, kr.backbones.Backbone)


def test_how_a_model_is_compiled_is_not_obeyed(preset):
    config = read(preset)
    config["compile_config"] = config["config"]["backbone"]["compile_config"] = {"optimizer": 5}
    change(preset, "config.json", config)
    assert not kr.RefineDet.from_preset(preset).compiled


def test_names_of_files_are_fixed(preset):
    """Names in the metadata lead nowhere."""
    metadata = read(preset, "metadata.json")
    metadata["sha256"] = {f"../{k}": v for k, v in metadata["sha256"].items()}
    change(preset, "metadata.json", metadata)
    shutil.copy(preset / "config.json", preset.parent / "config.json")
    assert "config.json is not the file" in refusal(preset)


def test_names_that_are_no_presets():
    for name in ("hf://me", "hf://me/../x", "hf://../..", "s3://me/x", 5, "absent"):
        refusal(name)


def test_models_that_cannot_be_loaded_are_not_saved(tmp_path):
    top = kr.create_backbone("resnest14_tiny", include_top=True)
    own = small_backbone()
    foreign = keras.Model(own.input, own.output)
    foreign.pyramid_outputs = own.pyramid_outputs
    for backbone, message in ((top, "Received others: fc/kernel"), (foreign, "Presets hold")):
        with pytest.raises(ValueError, match=message):
            kr.RefineDet(3, backbone, SIZE).save_to_preset(tmp_path / "x")
    with pytest.raises(ValueError, match=r"`license` must be .*'a\\nb'"):
        top.save_to_preset(tmp_path / "x", license="a\nb")
    with pytest.raises(ValueError, match="saved in a folder"):
        top.save_to_preset("hf://me/x")
    assert not (tmp_path / "x").exists()


# === Other files of the folder ===


def test_files_that_are_no_preset_stay(model, tmp_path, preset):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"no other README\.md"):
        model.save_to_preset(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (preset / "notes.txt").write_text("mine")
    other = kr.backbones.VGG([4, 8, 8], [1, 1, 1])
    other.save_to_preset(preset)
    check_same(kr.backbones.Backbone.from_preset(preset), other)
    assert sorted(os.listdir(preset)) == sorted([*FILES, "notes.txt"])


def test_a_failing_save_leaves_the_older_preset(model, preset, monkeypatch):
    before = {name: (preset / name).read_bytes() for name in FILES}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(model, "class_names", ["a", "b", "c"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # too little for the weights
    try:
        with pytest.raises(Exception, match="File too large"):
            model.save_to_preset(preset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (preset / name).read_bytes() for name in os.listdir(preset)} == before


RESULT = {
    "mAP50": 0.75,
    "AP50": {"red": {"average_precision": 0.5, "num_objects": 3}},
    "COCO": {"AP": 0.25, "APsmall": None},
    "wall_seconds": 33,
    "arguments": {
        "data": "/home/me/cells | `x`",
        "classifier": False,
        "epochs": 3,
        "image_size": [64, 64],
        "fit_anchors": True,
        "backbone_weights": "/home/me/w.pth",
    },
}


def test_the_card_tells_what_is_known(model, tmp_path):
    result = {**RESULT, "parameters": model.count_params()}
    (tmp_path / "result.json").write_text(json.dumps(result))
    model.save_to_preset(tmp_path, license="apache-2.0")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: keras_resnest\nlicense: apache-2.0\n")
    for line in (
        "| classes | red, green, blue |",
        "| mAP50 | 0.75 |",
        "| AP50 red | 0.5 |",
        "| COCO AP | 0.25 |",
        r"| data | cells \| \`x\` |",
        f"| sha256 of the weights | {read(tmp_path, 'metadata.json')['sha256'][FILES[-1]]} |",
        "    keras-resnest train 'cells | `x`' --epochs 3 --image-size 64 64 --fit-anchors "
        "--backbone-weights w.pth",
    ):
        assert line in card.splitlines()
    assert "/home" not in card and "wall_seconds" not in card
    (tmp_path / "result.json").write_text(json.dumps({**result, "parameters": 5}))
    with pytest.raises(ValueError, match=r"result.json must be that of this model.*Received: 5"):
        model.save_to_preset(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json is not JSON"):
        model.save_to_preset(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def test_names_of_classes_cannot_change_the_card(model, tmp_path, monkeypatch):
    names = ["a\n# b", "| c | d |", "[e](https://f)<script>"]
    monkeypatch.setattr(model, "class_names", names)
    model.save_to_preset(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    row = r"| classes | a # b, \| c \| d \|, \[e](https://f)\<script> |"
    assert row in lines and not any(line.startswith("# b") for line in lines)
    assert read(tmp_path)["config"]["class_names"] == names


# === The hub ===


def share(folder, address, *tasks):
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hub"),
        "HF_TOKEN": "hf_any",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(PACKAGE),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(PROGRAM), *tasks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line)["answer"] for line in lines]


def digest(model):
    return hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()


def check_sentence(answer, kind, *parts):
    assert answer["kind"] == kind and "\n" not in answer["error"], answer
    for part in parts:
        assert part in answer["error"], answer


def test_the_hub(model, saved, tmp_path):
    other, newer = small_detector(SIZE), tmp_path / "newer"
    other.set_weights([w + 1.0 for w in other.get_weights()])
    other.save_to_preset(newer)
    (newer / "secret.txt").write_text("not part of the preset")
    files = {name: (saved / name).read_bytes() for name in FILES}
    repositories = {
        "me/partial": {name: files[name] for name in FILES[1:3]},
        "me/damaged": {**files, "config.json": files["config.json"][:-1] + b" "},
    }
    name = "hf://me/cells"
    with running(b"", {}) as server:
        server.repositories.update(repositories)
        tasks = (f"{saved},{name}", name, name, f"{newer},{name}", name, "hf://me/absent")
        tasks += ("hf://me/partial", "hf://me/damaged", "hf://me/damaged")
        answers = share(tmp_path, server.address, *tasks)
    assert answers[:5] == [None, digest(model), digest(model), None, digest(other)]
    absent, partial, damaged, again = answers[5:]
    check_sentence(absent, "ValueError", "hf://me/absent", "does not exist")
    check_sentence(partial, "ValueError", "hf://me/partial", "no model.safetensors")
    check_sentence(damaged, "ValueError", "hf://me/damaged", "config.json is not the file")
    assert again == damaged
    assert set(server.repositories["me/cells"]) == set(FILES)
    # What has not changed is fetched once; what is damaged does not stay in the cache.
    asked = [path.split("/resolve/main/") for method, path in server.requests if method == "GET"]
    counts = {r: [f for q, f in asked[1:] if q == r] for r in ("/me/cells", "/me/damaged")}
    assert sorted(counts["/me/cells"]) == sorted(2 * FILES[1:])
    assert counts["/me/damaged"].count("config.json") == 2
    cached, uncached, upload = share(
        tmp_path, server.address, name, "hf://me/other", f"{saved},{name}"
    )
    assert cached == digest(other)
    check_sentence(uncached, "ConnectionError", "metadata.json", "me/other")
    check_sentence(upload, "ConnectionError", str(saved), name)


def test_uploads_that_are_refused(saved, preset):
    flip_bit(preset, hashed=False)
    for folder, uri, message in (
        (preset, "hf://me/x", "model.safetensors is not the file"),
        (preset.parent, "hf://me/x", "no file metadata.json"),
        (saved, "me/x", "`uri` must be hf://user/name"),
    ):
        with pytest.raises(ValueError, match=message):
            kr.upload_preset(folder, uri)


# === The program ===


def test_the_program_reads_presets(model, saved, tmp_path, capsys):
    Image.fromarray(rectangles(1, SIZE)[0][0].astype("uint8")).save(tmp_path / "a.png")
    model.save(tmp_path / "x.keras")
    for name in (saved, tmp_path / "x.keras"):
        options = ["--output", tmp_path / Path(name).stem, "--confidence", "0", "--no-images"]
        assert main(["predict", name, tmp_path / "a.png", *options]) == 0
    found = [(tmp_path / name / "detections.json").read_text() for name in ("red", "x")]
    assert found[0] == found[1] and '"label"' in found[0]
    (tmp_path / "metadata.json").write_text("{}")
    for command in (["predict", tmp_path, tmp_path / "a.png"], ["export", tmp_path, "out"]):
        assert main(command) == 2
        assert "must have format_version=1" in capsys.readouterr().err
