"""Weights by name or from a file: fetched, checked, and loaded all or nothing."""

import contextlib
import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np

from keras_resnest.backbones.published_weights import PRETRAINED, PretrainedWeights
from keras_resnest.backbones.torch_names import load_torch_state_dict

HUB_FILE = "model.safetensors"
TORCH_ENDINGS = (".pth", ".pt", ".bin", ".tar")
# PyTorch modules that a model without classifier may leave over.
TOP_MODULES = ("fc", "head", "classifier", "pre_logits", "LastSE")
# What training programs wrap a state dict in.
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def load_pretrained(model: keras.Model, weights, variant: str, ignore=()) -> None:
    """Loads published weights, or those of a file, into a network.

    Every array of the file must fit an array of the network and the other way round; the
    classifier alone may be left over, by a network without one.

    Args:
        model: a network of this package.
        weights: `"imagenet"`, a tag such as `"a1_in1k"`, or the path of a file: `.safetensors`,
            a PyTorch `state_dict` (`.pth`, `.pt`, `.bin`, `.tar`) or Keras' `.weights.h5`.
        variant: name of the network in the table.
        ignore: PyTorch modules that may be left over besides the classifier.

    Raises:
        ValueError: if `weights` names nothing, or the file does not fit the network, is broken
            or is not what its publisher promised.
        ConnectionError: if the file cannot be fetched.
        ImportError: if a PyTorch file is read without PyTorch.

    Example:
        >>> model = ResNeSt50(weights=None)
        >>> load_pretrained(model, "imagenet", "resnest50")
    """
    weights = os.fspath(weights)
    if os.path.exists(weights) or _looks_like_path(weights):
        _load_file(model, weights, variant, ignore)
        return
    published = _published(weights, variant)
    _check_fits_published(model, weights, variant)
    path = _fetch(published, variant)
    try:
        state_dict = read_state_dict(path)
    except ValueError:
        _remove_from_cache(path)
        raise
    _load_state_dict(model, state_dict, path, ignore)


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a `.safetensors` file or a PyTorch `state_dict` file.

    Nothing in the file is executed. Half precision numbers become float32. What training
    programs put around a state dict (`{"state_dict": ...}`, names that begin with `module.`) is
    taken off.

    Args:
        path: a file that ends in `.safetensors`, or in `.pth`, `.pt`, `.bin` or `.tar`.

    Returns:
        Dict of arrays by PyTorch name, in PyTorch's layout.

    Raises:
        ValueError: if the file is broken, or holds something else than arrays.
        ImportError: if a PyTorch file is read without PyTorch.

    Example:
        >>> read_state_dict("resnest50-528c19ca.pth")["fc.weight"].shape
        (1000, 2048)
    """
    path = os.fspath(path)
    read = _read_safetensors if path.endswith(".safetensors") else _read_torch
    arrays = {name: _full_precision(array) for name, array in read(path).items()}
    if arrays and all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


# --- Files -----------------------------------------------------------------------------------


def _looks_like_path(weights):
    endings = (".safetensors", ".weights.h5", *TORCH_ENDINGS)
    return weights.endswith(endings) or os.sep in weights


def _load_file(model, path, variant, ignore):
    if not os.path.isfile(path):
        raise ValueError(f"`weights` names a file that does not exist. Received: {path!r}")
    if path.endswith(".weights.h5"):
        _load_keras_file(model, path, variant)
    elif path.endswith((".safetensors", *TORCH_ENDINGS)):
        _load_state_dict(model, read_state_dict(path), path, ignore)
    else:
        raise ValueError(
            "`weights` must be a tag, or the path of a .safetensors, .weights.h5 or PyTorch file "
            f"({', '.join(TORCH_ENDINGS)}). Received: {path!r}"
        )


def _load_keras_file(model, path, variant):
    import h5py

    try:
        with h5py.File(path) as file:
            sizes = []
            file.visititems(lambda _, item: sizes.append(getattr(item, "size", None)))
        found = sum(size for size in sizes if size is not None)
        model.load_weights(path)
    except Exception as error:
        raise ValueError(
            f"{path} does not hold the weights of {variant} with classes={_classes(model)}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    wanted = sum(int(np.prod(variable.shape)) for variable in model.variables)
    if found != wanted and not _may_be_classifier(model, found - wanted):
        raise ValueError(
            f"{path} does not hold the weights of {variant}: it has {found:,} numbers, the "
            f"network {wanted:,}"
        )


def _may_be_classifier(model, surplus):
    """Whether a network without classifier can leave this many numbers over."""
    has_classifier = getattr(model, "include_top", True)
    return not has_classifier and surplus > 0


def _load_state_dict(model, state_dict, path, ignore):
    if not getattr(model, "include_top", True):
        ignore = (*ignore, *TOP_MODULES)
    try:
        load_torch_state_dict(model, state_dict, ignore=ignore)
    except ValueError as error:
        raise ValueError(f"{path} does not fit. {error}") from error


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole .safetensors file: {error}") from error


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file: install PyTorch to read it (pip install torch), or "
            "convert it to .safetensors"
        ) from error
    try:
        # Reads tensors and plain containers; refuses any other pickled object.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is broken, or holds more than arrays, which is never executed: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} must hold a state dict: tensors by name")
    floats = (torch.bfloat16, torch.float16)
    return {
        name: (value.float() if value.dtype in floats else value).numpy()
        for name, value in content.items()
    }


def _full_precision(array):
    half = array.dtype.name in ("float16", "bfloat16")
    return array.astype("float32") if half else array


# --- Published weights -----------------------------------------------------------------------


def _published(weights, variant):
    tags = PRETRAINED.get(variant, {})
    if weights == "imagenet" and tags:
        return next(iter(tags.values()))
    if weights in tags:
        return tags[weights]
    if not tags:
        raise ValueError(
            f"There are no published weights of {variant}. `weights` must be None or the path of "
            f"a .safetensors, .weights.h5 or PyTorch file. Received: weights={weights!r}"
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
    """Path of the file in the cache, its checksum compared with the promised one."""
    fetch = _fetch_from_hub if published.on_hub else _fetch_from_url
    path, promised = fetch(published, variant)
    promised = published.sha256 or promised
    found = _sha256(path)
    if promised and not found.startswith(promised):
        _remove_from_cache(path)
        raise ValueError(
            f"The file of {variant} from {published.source} is not the published one: its sha256 "
            f"begins with {found[:16]}, promised was {promised[:16]}. It was removed from the cache"
        )
    return path


def _fetch_from_hub(published, variant):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=published.source, repo_type="model")
    try:
        path = hf_hub_download(published.source, HUB_FILE)
    except Exception as error:
        for unfinished in folder.glob("blobs/*.incomplete"):
            unfinished.unlink()
        raise ConnectionError(_fetch_failure(published, variant, error)) from error
    # The cache names large files by the checksum that the hub states.
    name = Path(path).resolve().name
    return path, name if len(name) == 64 else None


def _fetch_from_url(published, variant):
    name = published.source.rsplit("/", 1)[-1]
    try:
        path = keras.utils.get_file(
            name, origin=published.source, cache_subdir="models/keras_resnest"
        )
    except Exception as error:
        raise ConnectionError(_fetch_failure(published, variant, error)) from error
    return path, None


def _fetch_failure(published, variant, error):
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"The weights of {variant} could not be fetched from {published.source}: {reason} "
        "(weights=<path> loads a file without network)"
    )


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_from_cache(path):
    real = os.path.realpath(path)
    for name in {real, os.path.abspath(path)}:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
