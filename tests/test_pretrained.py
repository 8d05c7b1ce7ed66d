"""Pretrained weights: downloads from a server on loopback, and weight files."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import golden_data
import keras
import numpy as np
import pytest
from fresh_process import PACKAGE
from hub_server import running
from safetensors.numpy import save, save_file

from keras_resnest.backbones import (
    PRETRAINED,
    VARIANTS,
    ResNet18,
    VGG16Reduced,
    create_backbone,
    load_pretrained,
    read_state_dict,
)

WAYS = {
    "resnet18.a1_in1k": "right",
    "resnet18.gluon_in1k": "redirect",
    "resnet18.a2_in1k": "wrong hash",
    "resnet18.a3_in1k": "truncated",
    "resnet18.tv_in1k": "cut",
    "resnet34.a1_in1k": "right",  # the file of another network
}
PROGRAM = Path(__file__).parent / "programs" / "fetch_weights.py"


@pytest.fixture(scope="module")
def weights():
    entry = golden_data.load_cases("networks")["timm.resnet18"]
    return golden_data.state_dict("timm.resnet18", entry)


@pytest.fixture(scope="module")
def golden_case():
    facts = golden_data.load_cases("networks")["timm.resnet18"]["cases"]["main"]
    logits = golden_data.load_arrays("networks")["timm.resnet18/main_logits"]
    return golden_data.input_images(facts, 1), logits


def fetch(folder, address, sha256, image, *requests):
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hub"),
        "KERAS_HOME": str(folder / "keras"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(PACKAGE),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    np.save(folder / "image.npy", image)
    command = [sys.executable, str(PROGRAM), address, sha256, str(folder / "image.npy")]
    result = subprocess.run(
        [*command, *requests], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def cached_files(folder):
    """Whole or partial weight files anywhere below."""
    files = [path for name in ("hub", "keras") for path in (folder / name).rglob("*")]
    return sorted({p.resolve() for p in files if p.is_file() and p.stat().st_size > 10_000})


def check_logits(result, want):
    assert "logits" in result, result
    assert np.abs(np.array(result["logits"]) - want).max() < 1e-5 * np.abs(want).max()


def check_sentence(result, kind, *parts):
    assert result["kind"] == kind, result
    assert "\n" not in result["error"].strip(), result
    for part in parts:
        assert part in result["error"], result


GOOD = ("resnet18:imagenet", "resnet18:gluon_in1k", "resnet18:tv_in1k", "resnet18:url")
FAULTY = (
    *("resnet18:a2_in1k", "resnet18:a3_in1k", "resnet34:a2_in1k", "resnet34:a1_in1k"),
    *("resnet18:url_wrong_hash", "resnet18:url_cut", "resnet18:url_absent"),
)
AGAIN = ("resnet18:imagenet", "resnet18:url")
UNCACHED = ("resnet34:tv_in1k", "resnet18:url_cut")


@pytest.fixture(scope="module")
def fetched(weights, golden_case, tmp_path_factory):
    """Folder, address of the server, its requests, and answers while it runs and after."""
    folder = tmp_path_factory.mktemp("fetched")
    with running(save(weights), WAYS) as server:
        facts = server.address, server.sha256, golden_case[0]
        online = fetch(folder, *facts, *GOOD, *FAULTY, *AGAIN)
    kept = cached_files(folder)
    offline = fetch(folder, *facts, *AGAIN, *UNCACHED)
    assert cached_files(folder) == kept
    return folder, server, online, offline


def test_servers_give_weights(fetched, golden_case):
    _, _, online, _ = fetched
    for answer in online[: len(GOOD)]:
        check_logits(answer, golden_case[1])


def test_servers_give_a_sentence(fetched):
    folder, _, online, _ = fetched
    answers = dict(zip(FAULTY, online[len(GOOD) :], strict=False))
    wrong_hash, truncated, absent, other, url_wrong_hash, url_cut, url_absent = answers.values()
    check_sentence(wrong_hash, "ValueError", "not the published one", "ffffffff", "removed")
    check_sentence(truncated, "ConnectionError", "resnet18.a3_in1k", "could not be fetched")
    check_sentence(absent, "ConnectionError", "resnet34.a2_in1k", "weights=<path>")
    assert other["kind"] == "ValueError" and "missing: layer4_2_conv2" in other["error"]
    check_sentence(url_wrong_hash, "ValueError", "not the published one", "00000000")
    check_sentence(url_cut, "ConnectionError", "could not be fetched")
    check_sentence(url_absent, "ConnectionError", "404")
    # The file of another network is complete and has the right checksum.
    assert len(cached_files(folder)) == len(GOOD) + 1
    # Interrupted downloads leave nothing behind.
    assert [path.name for path in (folder / "keras").rglob("*") if path.is_dir()] == [
        "models",
        "keras_resnest",
    ]


def test_without_network_the_cache_serves(fetched, golden_case):
    _, server, online, offline = fetched
    for answer in (*online[-len(AGAIN) :], *offline[: len(AGAIN)]):
        check_logits(answer, golden_case[1])
    # Cached files are not fetched again.
    url = f"/files/right/resnet18-right-{server.sha256[:8]}.safetensors"
    asked = [p for m, p in server.requests if p == url or "/resnet18.a1_in1k/" in p if m == "GET"]
    assert len(set(asked)) == len(asked) > 1


def test_without_network_and_cache_there_is_a_sentence(fetched):
    _, server, _, offline = fetched
    hub, url = offline[len(AGAIN) :]
    # The first refusal is said, not that of half a minute of attempts.
    check_sentence(
        hub, "ConnectionError", "resnet34.tv_in1k", "Connection refused", "weights=<path>"
    )
    refused = (server.address, "Connection refused", "weights=<path>")
    check_sentence(url, "ConnectionError", *refused)


# === Files ===


def logits_of(weights, image, **options):
    model = ResNet18(
        weights=weights, include_rescaling=False, classifier_activation=None, **options
    )
    return np.asarray(model(image, training=False))


def test_safetensors_file(weights, golden_case, tmp_path):
    image, want = golden_case
    path = tmp_path / "resnet18.safetensors"
    save_file(weights, path)
    assert np.abs(logits_of(path, image) - want).max() < 1e-5 * np.abs(want).max()
    # A network without a classifier skips the file's.
    features = ResNet18(include_top=False, weights=path, include_rescaling=False)
    whole = ResNet18(weights=path, include_rescaling=False)
    assert np.array_equal(
        features(image, training=False),
        keras.Model(whole.input, whole.pyramid_outputs["P5"])(image, training=False),
    )
    # Half precision becomes float32, and the prefix of data-parallel training is removed.
    half = {f"module.{name}": array.astype("float16") for name, array in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    assert np.abs(logits_of(tmp_path / "half.safetensors", image) - want).max() < 0.02
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"not a complete \.safetensors file"):
        ResNet18(weights=path)


def test_torch_files(weights, golden_case, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    image, want = golden_case
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    tensors["bn1.num_batches_tracked"] = torch.tensor(7)
    for name, content in {
        "plain.pth": tensors,
        "wrapped.pth.tar": {"epoch": 3, "state_dict": tensors},
        "model.pt": {"model": {f"module.{k}": v for k, v in tensors.items()}},
        "parameters.bin": {**tensors, "fc.bias": torch.nn.Parameter(tensors["fc.bias"])},
    }.items():
        torch.save(content, tmp_path / name)
        assert np.abs(logits_of(tmp_path / name, image) - want).max() < 1e-5 * np.abs(want).max()
    torch.save({"weight": "text"}, tmp_path / "text.pth")
    with pytest.raises(ValueError, match="must hold a state dict"):
        read_state_dict(tmp_path / "text.pth")
    whole = (tmp_path / "plain.pth").read_bytes()
    for name, content in (("empty.pth", b""), ("half.pth", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is broken"):
            read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read_state_dict(tmp_path / "absent.pth")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"])
def test_safetensors_of_unusual_types_are_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    size = {"F4": 4, "C64": 64}.get(kind, 8)
    facts = {"dtype": kind, "shape": [8], "data_offsets": [0, size]}
    header = json.dumps({"fc.weight": facts}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ValueError, match=rf"model.safetensors must hold .*'fc.weight' \({kind}\)"):
        read_state_dict(path)


def test_torch_tensors_of_unusual_kinds_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    one, path = torch.ones(2, 2), tmp_path / "model.pth"
    for tensor in (
        one.to(torch.float8_e4m3fn),
        one.to_sparse(),
        one.bfloat16().to_sparse_csr(),
        torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
        one.to("meta"),
        torch.nested.nested_tensor([one[0], one[0, :1]]),
    ):
        torch.save({"good": one, "fc.weight": tensor}, path)
        with pytest.raises(ValueError, match=r"model.pth must hold .* 1 others.*'fc.weight'"):
            read_state_dict(path)


@pytest.mark.parametrize("value", ["nan", "above float32", "int8"])
def test_arrays_that_are_no_weights_are_refused(weights, tmp_path, value):
    changed = weights["fc.bias"].astype("int8" if value == "int8" else "float64")
    changed[3] = {"nan": np.nan, "above float32": 1e300, "int8": 1}[value]
    save_file({**weights, "fc.bias": changed}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not (finite|floating-point numbers): fc.bias"):
        ResNet18(weights=tmp_path / "x.safetensors")


def test_a_keras_file_with_nan_is_refused(tmp_path):
    model = create_backbone("resnest14_tiny", classes=5)
    model.get_layer("fc").bias.assign([0.0, np.nan, 0.0, 0.0, 0.0])
    model.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match=r"x.weights.h5 .*1 arrays hold NaN .*fc/bias"):
        create_backbone("resnest14_tiny", classes=5, weights=tmp_path / "x.weights.h5")


def test_a_torch_that_executes_files_is_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    with pytest.raises(ImportError, match=r"2\.9\.1.*execute code.*2\.10 or newer"):
        read_state_dict(tmp_path / "weights.pth")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("with_torch", [True, False])
def test_no_pickle_is_ever_executed(tmp_path, monkeypatch, with_torch):
    if with_torch:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    else:
        monkeypatch.setitem(sys.modules, "torch", None)  # makes the import fail
    error, advice = (ValueError, "never executed") if with_torch else (ImportError, "pip install")
    target, content = tmp_path / "executed", {"fc.weight": Malicious(tmp_path / "executed")}
    for name in ("evil.pth", "evil.pt", "evil.bin", "evil.pth.tar"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
        with pytest.raises(error, match=rf"{name}.*{advice}"):
            ResNet18(weights=tmp_path / name)
        assert not target.exists()
    for name in ("evil.safetensors", "evil.weights.h5"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=name):
            ResNet18(weights=tmp_path / name)
        assert not target.exists()
    pickle.loads((tmp_path / "evil.pth").read_bytes())  # it would have worked
    assert target.exists()


def test_keras_files(tmp_path):
    model = create_backbone("resnest14_tiny", classes=5)
    path = str(tmp_path / "tiny.weights.h5")
    model.save_weights(path)
    loaded = create_backbone("resnest14_tiny", classes=5, weights=path)
    for ours, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)
    features = create_backbone("resnest14_tiny", include_top=False, weights=path)
    assert np.array_equal(features.layers[5].get_weights(), model.layers[5].get_weights())
    for name, options in (
        ("resnest14_tiny", {"classes": 7}),
        ("resnet18", {}),
        ("skresnet18", {"include_top": False}),
    ):
        with pytest.raises(ValueError, match=r"tiny\.weights\.h5 cannot be loaded: A total of"):
            create_backbone(name, weights=path, **options)
    # All or nothing, also for an existing network.
    other = create_backbone("resnest14_tiny", classes=7)
    before = other.get_weights()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*\(7,\)|\(512, 7\)"):
        load_pretrained(other, path, "resnest14_tiny")
    for ours, theirs in zip(other.get_weights(), before, strict=True):
        assert np.array_equal(ours, theirs)


def test_keras_files_of_networks_with_and_without_dropout(tmp_path):
    paths = {}
    for rate in (0.0, 0.2):
        model = create_backbone("resnest14_tiny", classes=5, dropout_rate=rate)
        paths[rate] = str(tmp_path / f"{rate}.weights.h5")
        model.save_weights(paths[rate])
        for other in (0.0, 0.2):
            options = {"classes": 5, "dropout_rate": other, "weights": paths[rate]}
            loaded = create_backbone("resnest14_tiny", **options)
            for ours, theirs in zip(loaded.trainable_weights, model.trainable_weights, strict=True):
                assert np.array_equal(ours, theirs)


# === Wrong arguments, before anything is fetched ===


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("resnet18", {"weights": "a1_in2k"}, r"Nearest tag: 'a1_in1k'"),
        ("resnet18", {"weights": "nothing"}, "must be None, 'imagenet', a tag"),
        ("resnest14_tiny", {"weights": "imagenet"}, "no published weights of resnest14_tiny"),
        ("resnet18", {"weights": "imagenet", "classes": 5}, r"model\.replace_top\(classes\)"),
        ("resnet18", {"weights": "imagenet", "input_shape": (64, 64, 1)}, "3 channels"),
        ("resnet18", {"weights": True}, "`weights` must be str"),
        ("resnet18", {"weights": ["imagenet"]}, "`weights` must be str"),
        ("resnet18", {"weights": "absent.safetensors"}, "does not exist"),
        ("resnet18", {"weights": "absent/resnet18.h5"}, "does not exist"),
    ],
)
def test_refuses(name, options, match):
    with pytest.raises(ValueError, match=match) as error:
        create_backbone(name, **options)
    if "weights" in match:
        assert "Received" in str(error.value)


def test_a_folder_hides_no_tag(tmp_path, monkeypatch):
    (tmp_path / "imagenet").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"classes=1000.*weights='imagenet'"):
        ResNet18(weights="imagenet", classes=5)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match=r"the path of a .safetensors, .caffemodel"):
        ResNet18(weights=path)


def test_other_classes_keep_the_backbone():
    model = create_backbone("resnest14_tiny", classes=5)
    image = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    other = model.replace_top(classes=3)
    assert other(image).shape == (2, 3) and other.classes == 3
    level = {name: m.pyramid_outputs["P5"] for name, m in (("a", model), ("b", other))}
    a = keras.Model(model.input, level["a"])(image, training=False)
    b = keras.Model(other.input, level["b"])(image, training=False)
    assert np.array_equal(a, b)
    grown = create_backbone("resnest14_tiny", include_top=False).replace_top(4, None)
    logits = np.asarray(grown(image))  # no activation: not probabilities
    assert logits.shape == (2, 4) and not np.allclose(logits.sum(axis=1), 1.0)
    with pytest.raises(ValueError, match="no classifier"):
        VGG16Reduced().replace_top(3)


# === The table ===


def test_the_table_names_networks_and_complete_facts():
    assert set(PRETRAINED) <= set(VARIANTS)
    for name, tags in PRETRAINED.items():
        for tag, row in tags.items():
            where = (name, tag)
            assert row.on_hub or row.source.startswith("https://"), where
            assert row.license and 128 <= row.crop_size <= 448 and 0.8 < row.crop_ratio <= 1, where
            assert row.top1 is None or 60 < row.top1 < 90, where
            assert row.interpolation in ("bilinear", "bicubic"), where
            if row.sha256 is not None:  # the authors put it into the name
                assert f"-{row.sha256}.pth" in row.source, where
            if row.on_hub:
                assert row.source.endswith(f".{tag}"), where
