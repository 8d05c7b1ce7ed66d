"""Presets: folders with which a model is shared, laid out like KerasHub's.

`config.json` describes the model, `model.safetensors` holds its weights, `metadata.json` the format
and the checksums of both, and `README.md` is the model card. All of it is data: a config that names
anything but objects of this package and of Keras' own initializers, regularizers and constraints is
refused before an object is made.
"""

import contextlib
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Self

import keras
from safetensors.numpy import save_file

from keras_resnest.atomic import atomic_file
from keras_resnest.backbones.model_card import model_card
from keras_resnest.backbones.weights.fetching import (
    HUB_FILE,
    fetch_hub_file,
    import_hub,
    load_arrays_of_file,
    read_state_dict,
    remove_from_cache,
    sha256_of,
)
from keras_resnest.backbones.weights.torch_names import to_state_dict
from keras_resnest.checks import checked, one_line
from keras_resnest.version import __version__

FORMAT = 1  # of the files; older versions of the package refuse presets with a higher number
CONFIG, METADATA, CARD = "config.json", "metadata.json", "README.md"
_DATA_FILES = (METADATA, CONFIG, HUB_FILE)
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)")
_OWN = "keras_resnest>"  # begins the names under which our classes are registered
_KERAS_MODULES = ("keras.initializers", "keras.regularizers", "keras.constraints")
_RULE = "Presets hold objects of keras_resnest and initializers, regularizers, constraints of Keras"


class SharedAsPreset:
    """Mix-in of models that are saved as presets and loaded from them."""

    def save_to_preset(self, folder: str | os.PathLike, license: str = "unknown") -> None:
        """Saves the model in a folder to share: everything but the optimizer.

        The model card, `README.md`, has the classes and how the model is loaded, and the data, the
        command and the figures of a `result.json` in the folder, such as that of
        `keras-resnest train`.

        Args:
            folder: a new folder, the output folder of a training, or an older preset, which is
                replaced. Other files stay as they are.
            license: name of the license, as the Hugging Face hub spells it, such as `"apache-2.0"`.

        Raises:
            ValueError: if an argument is unusable, the folder has files of the same names that are
                no preset, `result.json` is not of this model, or the model has parts that are
                neither of this package nor of Keras.

        Example:
            >>> model.save_to_preset("runs/train", license="apache-2.0")
        """
        _save(self, folder, license)

    @classmethod
    def from_preset(cls, preset: str | os.PathLike) -> Self:
        """Loads a model with its weights: that of `save_to_preset`, with the same frozen layers.

        Args:
            preset: a folder, or `"hf://user/name"` for a repository of the Hugging Face hub. Its
                files are cached, and fetched again when they have changed.

        Raises:
            ValueError: if the preset does not exist, has a missing or damaged file, is of a newer
                version or of another class.
            ConnectionError: if the hub cannot be reached, and the files are not in the cache.
            ImportError: if `huggingface_hub` is needed and not installed.

        Example:
            >>> model = kr.RefineDet.from_preset("hf://user/cells")
            >>> backbone = kr.backbones.Backbone.from_preset("my_backbone")
        """
        return load_preset(preset, cls)


def is_preset(name: str) -> bool:
    """Whether a name is that of the hub, or of a folder with a file of a preset."""
    return name.startswith("hf://") or any(Path(name, file).is_file() for file in _DATA_FILES)


def load_preset(preset: str | os.PathLike, kind: type[keras.Model]) -> keras.Model:
    """Loads the preset of a model that is a `kind`; see `SharedAsPreset.from_preset`."""
    with _reporting(preset):
        cls, config, weights = _read(preset, kind)
        model = cls.from_config(config)
        load_arrays_of_file(model, read_state_dict(weights), weights)
        return model


@checked
def upload_preset(folder: str | os.PathLike, uri: str) -> None:
    """Uploads a preset to the Hugging Face hub, as one commit.

    Only the four files of the preset are uploaded. Log in first (`hf auth login`), or set HF_TOKEN.

    Args:
        folder: folder that `save_to_preset` has written.
        uri: `"hf://user/name"`. The repository is created if it does not exist.

    Raises:
        ValueError: if the folder is not a whole preset, or `uri` has another form.
        ConnectionError: if the hub cannot be reached, or refuses.
        ImportError: if `huggingface_hub` is not installed.

    Example:
        >>> model.save_to_preset("cells", license="apache-2.0")
        >>> kr.upload_preset("cells", "hf://user/cells")
    """
    if not (match := _HUB.fullmatch(str(uri))):
        raise ValueError(f"`uri` must be hf://user/name. Received: {uri!r}")
    folder = _local(folder)
    with _reporting(folder):
        _read(folder, keras.Model)
        paths = {name: _path_of(folder, name) for name in (*_DATA_FILES, CARD)}
    hub = import_hub()
    try:
        hub.create_repo(match[1], exist_ok=True)
        files = [hub.CommitOperationAdd(name, path) for name, path in paths.items()]
        hub.create_commit(match[1], files, commit_message="Upload a preset of keras_resnest")
    except Exception as error:
        raise ConnectionError(f"{folder} is not uploaded to {uri}: {one_line(error)}") from error


# === Reading ===


@contextlib.contextmanager
def _reporting(preset):
    """Turns all errors into one sentence: each kind of damage raises another type."""
    try:
        yield
    except (ConnectionError, ImportError):
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 400) or type(error).__name__
        raise ValueError(f"{preset} is not a usable preset. {reason}") from error


def _read(preset, kind) -> tuple[type, dict, str]:
    """Returns class, config and path of the weights, whose checksums are right."""
    metadata = _read_json(_path_of(preset, METADATA))
    if (version := metadata.get("format_version")) != FORMAT:
        raise ValueError(
            f"{METADATA} must have format_version={FORMAT}; higher ones need a newer "
            f"keras_resnest. Received: {version!r}"
        )
    config = _data_alone(_read_json(_checked(preset, CONFIG, metadata)))
    cls = keras.saving.get_registered_object(config.get("registered_name"))
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ValueError(f"It holds a {config.get('class_name')}, not a {kind.__name__}")
    return cls, config["config"], _checked(preset, HUB_FILE, metadata)


def _checked(preset, name: str, metadata: dict) -> str:
    """Returns the path of a file that has the checksum of the metadata."""
    path, expected = _path_of(preset, name), str(metadata.get("sha256", {}).get(name))
    if (found := sha256_of(path)) != expected:
        if _HUB.fullmatch(str(preset)):
            remove_from_cache(path)  # the next call fetches it again
        raise ValueError(
            f"{name} is not the file that was saved: its sha256 starts with {found[:16]} instead "
            f"of {expected[:16]}"
        )
    return path


def _path_of(preset, name: str) -> str:
    if not (match := _HUB.fullmatch(str(preset))):
        path = _local(preset) / name
        if not path.is_file():
            raise ValueError(f"There is no file {name}")
        return str(path)
    try:
        # The metadata tell whether the other files have changed.
        return fetch_hub_file(match[1], name, may_change=name == METADATA)
    except ConnectionError as error:
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(f"It has no {name}, does not exist or is not public") from error
        raise


def _local(folder) -> Path:
    is_path = isinstance(folder, str | os.PathLike) and "://" not in str(folder)
    if not is_path or os.path.isfile(folder):
        raise ValueError(
            "A preset is saved in a folder, and loaded from a folder or hf://user/name. "
            f"Received: {folder!r}"
        )
    return Path(folder)


def _read_json(path) -> dict:
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: a {type(content).__name__}")
    return content


def _data_alone(config):
    """A part of a config without how it was compiled; raises ValueError for foreign objects."""
    if isinstance(config, list | tuple):
        return [_data_alone(value) for value in config]
    if isinstance(config, dict):
        if "class_name" in config:
            _check_object(config)
        skipped = ("build_config", "compile_config")
        return {key: _data_alone(value) for key, value in config.items() if key not in skipped}
    is_name = isinstance(config, str) and keras.saving.get_registered_object(config) is not None
    if is_name and not config.startswith(_OWN):  # Keras would put the object in place of its name
        raise ValueError(f"{_RULE}. Received: {config}")
    return config


def _check_object(config: dict) -> None:
    module, name, registered = map(config.get, ("module", "class_name", "registered_name"))
    if registered is None:
        known = module in _KERAS_MODULES or (module, name) == ("keras", "DTypePolicy")
    else:
        cls = keras.saving.get_registered_object(registered)
        known = registered.startswith(_OWN) and getattr(cls, "__name__", None) == name
    if not known:
        raise ValueError(f"{_RULE}. Received: {registered or f'{module}.{name}'}")


# === Writing ===


def _save(model, folder, license: str) -> None:
    folder = _local(folder)
    if not re.fullmatch(r"[\w.-]+", str(license)):
        raise ValueError(f"`license` must be a name such as 'apache-2.0'. Received: {license!r}")
    config = _data_alone(keras.saving.serialize_keras_object(model))
    arrays = to_state_dict(model)
    existing = [name for name in (*_DATA_FILES, CARD) if (folder / name).exists()]
    if existing and (
        METADATA not in existing or "format_version" not in _read_json(folder / METADATA)
    ):
        raise ValueError(f"`folder` must have no other {existing[0]}. Received: {folder}")
    result = folder / "result.json"
    result = _read_json(result) if result.exists() else {}
    if result.get("parameters", model.count_params()) != model.count_params():
        raise ValueError(
            f"{folder / 'result.json'} must be that of this model, which has "
            f"{model.count_params()} parameters. Received: {result['parameters']}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / METADATA) as file:
        (file.parent / CONFIG).write_text(json.dumps(config, indent=2))
        save_file(arrays, file.parent / HUB_FILE)
        checksums = {name: sha256_of(file.parent / name) for name in (CONFIG, HUB_FILE)}
        card = model_card(model, license, checksums[HUB_FILE], result)
        (file.parent / CARD).write_text(card, encoding="utf-8")
        metadata = {"format_version": FORMAT, "sha256": checksums}
        metadata |= {"keras_resnest_version": __version__, "keras_version": keras.version()}
        metadata["parameter_count"] = model.count_params()
        file.write_text(json.dumps(metadata, indent=2))
