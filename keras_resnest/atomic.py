"""Folders that are written completely or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, markers=("saved_model.pb", "assets.extra")):
    """Yields a temporary folder to write into, then renames it to `path`.

    The temporary folder is hidden, next to `path`, so no model server takes it for a version. If
    the body fails, it is removed and `path` stays unchanged.

    Args:
        path: folder to create or replace; its parents are created.
        markers: an existing folder is replaced only if it is empty or contains one of these.

    Raises:
        ValueError: if `path` is a file, or a folder with other content.

    Example:
        >>> with atomic_folder("serving/1") as folder:
        ...     (folder / "model.json").write_text("{}")
    """
    path = pathlib.Path(os.path.abspath(path))
    if path.is_file():
        raise ValueError(f"`filepath` must be a folder. Received: the file {path}")
    is_marked = any((path / name).exists() for name in markers)
    if path.is_dir() and any(path.iterdir()) and not is_marked:
        raise ValueError(
            f"`filepath` must be a new or empty folder, or one with a SavedModel. Received: {path}"
        )
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
