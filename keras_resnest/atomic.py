"""Files and folders that are written completely or not at all.

A version that was there is there at every moment, for other processes and after a kill.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import sys
import tempfile

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed writers stay
    fcntl = None

NEW, OLD = "new", "old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, markers=("saved_model.pb", "assets.extra")):
    """Yields a temporary folder to write into, then puts it in the place of `path`.

    The temporary folder is hidden, next to `path`, so no model server takes it for a version. If
    the body fails, it is removed and `path` stays unchanged. Linux exchanges both folders in one
    step. Other systems need two, and what a kill between them leaves is put back by the next call.

    Args:
        path: folder to create or replace; its parents are created.
        markers: an existing folder is replaced only if it is empty or contains one of these.

    Raises:
        ValueError: if `path` is a file, or a folder with other content.
        OSError: if it cannot be written; the error names the path.

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
            f"`filepath` must be a new or empty folder, or one with {' or '.join(markers)}. "
            f"Received: {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(path) as temporary:
        folder = temporary / NEW
        folder.mkdir()
        yield folder
        if not path.exists():
            folder.rename(path)
        elif not _exchange(folder, path):
            path.rename(temporary / OLD)
            try:
                folder.rename(path)
            except OSError:
                (temporary / OLD).rename(path)
                raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike):
    """Yields a temporary path to write to, then puts the file in the place of `path`.

    Files that the body writes beside the temporary path are put beside `path`, before it; if one
    of them fails, the earlier ones are put back. If the body fails, nothing changes.

    Args:
        path: file to create or replace, in an existing folder.

    Raises:
        OSError: if it cannot be written; the error names the path.

    Example:
        >>> with atomic_file("result.json") as file:
        ...     file.write_text("{}")
    """
    path = pathlib.Path(os.path.abspath(path))
    with _hidden_folder(path) as temporary:
        folder, exchanged = temporary / NEW, []
        folder.mkdir()
        yield folder / path.name
        try:
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                target = path.parent / file.name
                if target.is_file() and _exchange(file, target):
                    exchanged.append((file, target))
                else:
                    os.replace(file, target)
        except OSError:
            for file, target in exchanged:
                _exchange(file, target)
            raise


@contextlib.contextmanager
def naming_path(path: str | os.PathLike):
    """Adds a path to errors that come without one, such as "No space left on device".

    Args:
        path: file or folder that the body writes.

    Raises:
        OSError: instead of the errors with which other libraries report a full disk.

    Example:
        >>> with naming_path("model.onnx"):
        ...     onnx.save(model, "model.onnx")
    """
    full = os.strerror(errno.ENOSPC)
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
        elif full in str(error):  # TensorFlow, HDF5 and ONNX have their own errors
            raise OSError(errno.ENOSPC, full, str(path)) from error
        raise


@contextlib.contextmanager
def _hidden_folder(path: pathlib.Path):
    """Yields a new folder next to `path`, and removes it and those of killed writers."""
    prefix = f".{path.name}."
    with naming_path(path):
        for leftover in path.parent.iterdir():
            if leftover.name.startswith(prefix) and "." not in leftover.name[len(prefix) :]:
                with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                    _clean(leftover, path)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        try:
            with _locked(temporary):
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _clean(leftover: pathlib.Path, path: pathlib.Path) -> None:
    """Removes what a killed writer of `path` has left; puts an old version back."""
    if not leftover.is_dir() or {child.name for child in leftover.iterdir()} - {NEW, OLD}:
        return
    with _locked(leftover) as is_dead:
        if not is_dead:
            return
        if (leftover / OLD).exists() and not path.exists():
            (leftover / OLD).rename(path)
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
    """Locks a folder until the body or the process ends; yields whether nobody else had."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except OSError:
        is_free = False
    try:
        yield is_free
    finally:
        os.close(descriptor)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchanges two files or two folders in one step; returns False where that is impossible."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    names = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)
    return function is not None and function(*names, RENAME_EXCHANGE) == 0
