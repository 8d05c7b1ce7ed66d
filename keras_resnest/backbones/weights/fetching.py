"""Loads published weights and weight files: all or nothing, never executing a pickle."""

import base64
import contextlib
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np

from keras_resnest.backbones.weights.caffe import (
    caffe_state_dict,
    check_caffe_form,
    is_caffe_file,
    read_caffemodel,
)
from keras_resnest.backbones.weights.detector_files import models_folder
from keras_resnest.backbones.weights.table import PRETRAINED, PretrainedWeights
from keras_resnest.backbones.weights.torch_names import load_torch_state_dict
from keras_resnest.checks import checked, one_line

HUB_FILE = "model.safetensors"
TORCH_ENDINGS = (".pth", ".pt", ".bin", ".tar")
FILE_ENDINGS = (".safetensors", ".weights.h5", ".caffemodel", *TORCH_ENDINGS)
# PyTorch modules that a model without a classifier skips.
TOP_MODULES = ("fc", "fc1000", "head", "classifier", "pre_logits", "LastSE")
# In older versions, a file can make `torch.load(weights_only=True)` execute code
# (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = "2.10"
# Types of safetensors that numpy has; integers are counters.
_PLAIN_TYPES = re.compile("F(16|32|64)|BF16|[IU](8|16|32|64)|BOOL")
# Keys under which training programs save a state dict.
_WRAPPERS = ("state_dict", "model", "model_state_dict")


@checked
def load_pretrained(model: keras.Model, weights, variant: str, ignore=()) -> None:
    """Loads published weights or a weight file into a network.

    Every array of the file must match one of the network, and vice versa, except for the
    classifier if the network has none.

    Args:
        model: a network of this package.
        weights: `"imagenet"`, a tag such as `"a1_in1k"`, or the path of a file: `.safetensors`,
            a PyTorch `state_dict` (`.pth`, `.pt`, `.bin`, `.tar`), Keras' `.weights.h5` or
            Caffe's `.caffemodel`.
        variant: name of the network, as in `list_models()`.
        ignore: further PyTorch modules to skip.

    Raises:
        ValueError: if `weights` is unknown, or the file does not fit the network, is broken or
            has the wrong checksum.
        ConnectionError: if the file cannot be fetched.
        ImportError: if a PyTorch file is read without PyTorch 2.10 or newer.

    Example:
        >>> model = ResNeSt50(weights=None)
        >>> load_pretrained(model, "imagenet", "resnest50")
    """
    if not isinstance(weights, str | os.PathLike):
        raise ValueError(
            f"`weights` must be None, a tag or the path of a file. Received: weights={weights!r}"
        )
    weights = os.fspath(weights)
    # Tags take precedence: many users have a folder "imagenet".
    is_tag = weights in ("imagenet", *PRETRAINED.get(variant, {}))
    looks_like_path = weights.endswith(FILE_ENDINGS) or os.sep in weights
    if not is_tag and (os.path.isfile(weights) or looks_like_path):
        _load_file(model, weights, variant, ignore)
        return
    published = _published(weights, variant)
    _check_fits_published(model, weights, variant)
    path = _fetch(published, variant)
    try:
        state_dict = read_state_dict(path)
    except ValueError:
        remove_from_cache(path)
        raise
    load_arrays_of_file(model, state_dict, path, ignore)


@checked
def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a `.safetensors`, `.caffemodel` or PyTorch `state_dict` file.

    Nothing in the file is executed. Half precision becomes float32. Wrappers of training
    programs (`{"state_dict": ...}`, the prefix `module.`) are removed. Caffe's layers have the
    names of the file, its statistics of batch normalization are divided by their factor, and its
    first convolution reads RGB.

    Args:
        path: a file that ends in `.safetensors`, `.caffemodel`, `.pth`, `.pt`, `.bin` or `.tar`.

    Returns:
        Dict of arrays by PyTorch name, in PyTorch's layout.

    Raises:
        ValueError: if the file does not exist, is broken, or holds anything but arrays.
        ImportError: if a PyTorch file is read without PyTorch 2.10 or newer.

    Example:
        >>> read_state_dict("resnest50-528c19ca.pth")["fc.weight"].shape
        (1000, 2048)
    """
    path = os.fspath(path)
    _check_exists(path)
    if is_caffe_file(path):
        return caffe_state_dict(read_caffemodel(path))
    read = _read_safetensors if path.endswith(".safetensors") else _read_torch
    half = ("float16", "bfloat16")
    arrays = {n: a.astype("float32") if a.dtype.name in half else a for n, a in read(path).items()}
    if arrays and all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


# === Files ===


def _check_exists(path):
    if not os.path.isfile(path):
        raise ValueError(f"The weight file does not exist. Received: {path!r}")


def _load_file(model, path, variant, ignore):
    _check_exists(path)
    if not path.endswith(FILE_ENDINGS):
        raise ValueError(
            "`weights` must be a tag, or the path of a .safetensors, .caffemodel, .weights.h5 or "
            f"PyTorch file ({', '.join(TORCH_ENDINGS)}). Received: {path!r}"
        )
    if path.endswith(".weights.h5"):
        model.load_weights(path)
    else:
        check_caffe_form(model, path, variant)
        load_arrays_of_file(model, read_state_dict(path), path, ignore)


def load_arrays_of_file(model: keras.Model, state_dict: dict, path, ignore=()) -> None:
    """Loads what `read_state_dict` returned; an error names the file."""
    if not getattr(model, "include_top", True):
        ignore = (*ignore, *TOP_MODULES)
    try:
        load_torch_state_dict(model, state_dict, ignore=ignore)
    except ValueError as error:
        if not is_caffe_file(path):
            raise ValueError(f"{path} does not fit. {error}") from error
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        examples = {line.split(":")[0]: line for line in reversed(problems)}
        raise ValueError(
            f"{path} is for another network than {model.name}: {len(problems)} arrays differ, such "
            f"as {'; '.join(reversed(examples.values()))}"
        ) from error


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            _refuse_arrays(path, {n: k for n, k in kinds.items() if not _PLAIN_TYPES.fullmatch(k)})
            return {name: file.get_tensor(name) for name in kinds}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete .safetensors file: {error}") from error


def _refuse_arrays(path, kinds: dict):
    """Raises ValueError if there are arrays of unusable kinds, by name."""
    if kinds:
        name, kind = next(iter(kinds.items()))
        raise ValueError(
            f"{path} must hold dense arrays of 16 to 64-bit floating-point numbers. Received: "
            f"{len(kinds)} others, such as {name!r} ({kind})"
        )


def _read_torch(path):
    torch = _import_torch(path)
    try:
        # Reads tensors and plain containers; refuses any other pickled object.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch's own message recommends disabling the protection.
        raise ValueError(
            f"{path} is broken, or holds pickled objects other than tensors, which are never "
            "executed: save only its state_dict, or a .safetensors file"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} must hold a state dict: tensors by name")
    arrays, refused = {}, {}
    for name, value in content.items():
        try:
            half = value.dtype in (torch.bfloat16, torch.float16)
            arrays[name] = (value.float() if half else value).detach().numpy()
        except (TypeError, RuntimeError):  # float8, sparse, quantized, meta, nested
            refused[name] = f"{value.dtype}, {value.layout}, {value.device}"
    _refuse_arrays(path, refused)
    return arrays


def _import_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file: install PyTorch (pip install torch), or convert the file "
            "to .safetensors"
        ) from error
    if torch.__version__ < _SAFE_TORCH:
        raise ImportError(
            f"A weight file can make PyTorch {torch.__version__} execute code. "
            f"Reading {path} requires {_SAFE_TORCH} or newer (pip install -U torch)"
        )
    return torch


# === Published weights ===


def _published(weights, variant):
    tags = PRETRAINED.get(variant, {})
    tag = next(iter(tags), None) if weights == "imagenet" else weights
    if tag in tags:
        return tags[tag]
    if not tags:
        raise ValueError(
            f"There are no published weights of {variant}. `weights` must be None or the path of "
            "a .safetensors, .caffemodel, .weights.h5 or PyTorch file. "
            f"Received: weights={weights!r}"
        )
    nearest = difflib.get_close_matches(weights, tags, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"`weights` of {variant} must be None, 'imagenet', a tag ({', '.join(tags)}) or the path "
        f"of an existing file. Received: weights={weights!r}. Nearest tag: {nearest!r}"
    )


def _check_fits_published(model, weights, variant):
    if _classes(model) not in (None, 1000):
        raise ValueError(
            f"The published weights of {variant} are for classes=1000. Load them with "
            "include_top=False, or with classes=1000 and then `model.replace_top(classes)`. "
            f"Received: weights={weights!r}, classes={_classes(model)}"
        )
    axis = -1 if model.data_format == "channels_last" else 0
    if model.image_shape[axis] != 3:
        raise ValueError(
            f"The published weights of {variant} are for images of 3 channels. "
            f"Received: weights={weights!r}, image_shape={model.image_shape}"
        )


def _classes(model):
    return model.classes if getattr(model, "include_top", False) else None


def _fetch(published: PretrainedWeights, variant):
    """Returns the path of the cached file after checking its checksum."""
    fetch = _fetch_from_hub if published.on_hub else _fetch_from_url
    try:
        path, expected = fetch(published.source)
    except ConnectionError as error:
        raise ConnectionError(
            f"The weights of {variant} are not available. {error} (weights=<path> loads a file "
            "without network)"
        ) from error
    expected = published.sha256 or expected
    found = sha256_of(path)
    if expected and not found.startswith(expected):
        remove_from_cache(path)
        raise ValueError(
            f"The file of {variant} from {published.source} is not the published one: its sha256 "
            f"starts with {found[:16]} instead of {expected[:16]}. It was removed from the cache"
        )
    return path


def _fetch_from_hub(source):
    path = fetch_hub_file(source, HUB_FILE)
    # The cache names large files by their checksum on the hub.
    name = Path(path).resolve().name
    return path, name if len(name) == 64 else None


def _fetch_from_url(source):
    path = models_folder() / source.rsplit("/", 1)[-1]
    if path.exists():
        return path, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Move the complete file into place: other processes may look for it.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fetched = keras.utils.get_file(
                path.name, origin=source, cache_dir=folder, cache_subdir=""
            )
            os.replace(fetched, path)
    except Exception as error:
        raise ConnectionError(_fetch_failure(path.name, source, error)) from error
    return path, None


def fetch_hub_file(repository: str, name: str, may_change: bool = False) -> str:
    """Returns the path of a file of the Hugging Face hub, which is cached.

    Args:
        repository: `"user/name"`.
        name: file name.
        may_change: whether the hub is asked if it has a newer version than the cache; without
            network, the cached one is used.

    Raises:
        ConnectionError: if the file cannot be fetched; nothing incomplete stays in the cache.
        ImportError: if `huggingface_hub` is not installed.

    Example:
        >>> path = fetch_hub_file("timm/resnet18.a1_in1k", "model.safetensors")
    """
    hub = import_hub()
    verbosity = hub.utils.logging.get_verbosity()
    hub.utils.logging.set_verbosity_error()  # two lines for each of its retries; the error says why
    try:
        cached = isinstance(path := hub.try_to_load_from_cache(repository, name), str)
        if cached and not may_change:
            return path
        if not cached:  # without network, `hf_hub_download` would try again for 24 s
            with contextlib.suppress(hub.errors.HfHubHTTPError):
                hub.get_hf_file_metadata(hub.hf_hub_url(repository, name))
        return hub.hf_hub_download(repository, name)
    except Exception as error:
        folder = hub.file_download.repo_folder_name(repo_id=repository, repo_type="model")
        for incomplete in Path(hub.constants.HF_HUB_CACHE, folder).glob("blobs/*.incomplete"):
            incomplete.unlink()
        raise ConnectionError(_fetch_failure(name, repository, error)) from error
    finally:
        hub.utils.logging.set_verbosity(verbosity)


def fetch_npm_package(name: str, version: str, integrity: str) -> Path:
    """Returns the path of a package of npm's registry, a `.tgz` file that is cached.

    Args:
        name: name of the package.
        version: exact version.
        integrity: `"sha512-"` and the checksum in base 64, as in `package-lock.json`.

    Raises:
        ConnectionError: if npm is not installed or cannot fetch the package.
        ValueError: if the file has another checksum.

    Example:
        >>> path = fetch_npm_package("onnxruntime-web", "1.30.0", integrity="sha512-...")
    """
    path = models_folder() / f"{name}-{version}.tgz"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [shutil.which("npm") or "npm", "pack", f"{name}@{version}", "--loglevel=error"]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or "npm, which comes with Node.js, is missing"
            raise ConnectionError(_fetch_failure(path.name, "npm", ValueError(reason))) from error
        (fetched,) = Path(folder).iterdir()
        found = base64.b64encode(hashlib.sha512(fetched.read_bytes()).digest()).decode()
        if f"sha512-{found}" != integrity:
            raise ValueError(
                f"{path.name} from npm is not the published file: its checksum is sha512-{found} "
                f"instead of {integrity}"
            )
        os.replace(fetched, path)
    return path


def import_hub():
    """Returns the module `huggingface_hub`, which takes a while to import."""
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.file_download

    return huggingface_hub


def _fetch_failure(name, source, error):
    return f"{name} could not be fetched from {source}: {one_line(error)}"


def sha256_of(path: str | os.PathLike) -> str:
    """Returns the checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_from_cache(path: str | os.PathLike) -> None:
    """Removes a file and the one that it links to, as the hub's cache does."""
    real = os.path.realpath(path)
    for name in {real, os.path.abspath(path)}:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
