"""Files and folders that appear complete or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike):
    """Gives a folder to write into; at the end it is moved to `path` in one step.

    The folder lies beside `path`, under a name that no model server takes for a version. If
    something fails, nothing is left of it, and what was at `path` stays as it was.

    Args:
        path: folder to be made or replaced. Folders above it are made.

    Raises:
        ValueError: if `path` is a file, or a folder that holds something else than a model.

    Example:

    >>> with atomic_folder("serving/1") as folder:
    ...     (folder / "model.json").write_text("{}")
    """
    path = pathlib.Path(os.path.abspath(path))
    _check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        if path.exists():
            path.rename(temporary / "old")
        folder.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(path: pathlib.Path) -> None:
    if path.is_file():
        raise ValueError(f"`filepath` must be a folder. Received: the file {path}")
    known = ("saved_model.pb", "assets.extra")
    if path.is_dir() and any(path.iterdir()) and not any((path / k).exists() for k in known):
        raise ValueError(
            f"`filepath` must be a new or empty folder, or one with a SavedModel. Received: {path}"
        )
