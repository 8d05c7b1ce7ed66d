"""The files of a dataset: one guarded way to read, list and find them, for all readers.

Only regular files of a plausible size are read. Hidden files, files of the operating system and
`runs` folders are no part of a dataset. A name stated in an annotation is looked up in the listing
of its folder, in any Unicode form and letter case, and inside the dataset.
"""

import collections
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from keras_resnest.data.dataset import Problem
from keras_resnest.images import IMAGE_SUFFIXES, is_hidden

SPLIT_SYNONYMS = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
SPLIT_NAMES = tuple(name for names in SPLIT_SYNONYMS for name in names)
SPLIT_KEYS = ("split", "set", "subset", "usage", "partition", "ml_use")  # of rows and images
_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})[-_ ]?\d*", re.IGNORECASE)
_IMAGE = re.compile("|".join(rf"\{suffix}\b" for suffix in IMAGE_SUFFIXES))
ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "json")  # in lower case
SMALL, LARGE = 16 << 20, 4 << 30  # bytes: files of one image, files of a whole dataset
LONGEST = 400  # characters of a file or number in a message
_NO_DATA = ("runs", "__macosx", "thumbs.db", "desktop.ini", "@eadir")  # in lower case


class FileError(ValueError):
    """A fault in a file, which stops the reader or skips an image, depending on `on_error`."""

    def __init__(self, file: str | os.PathLike, what: str, detail: str = ""):
        what, detail = what[:LONGEST], detail[: 2 * LONGEST]
        super().__init__(f"{file}: {what}{': ' * bool(detail)}{detail}")
        self.problem = Problem(Path(file).name, what, "image skipped", detail)


# === Reading ===


def read_bytes(path: str | os.PathLike, what: str, limit: int = SMALL) -> bytes:
    """Reads a regular file of at most `limit` bytes, or raises `FileError`; `what` describes it."""
    detail = ""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe waits, a device never ends
            detail = "it is not a regular file"
        elif status.st_size > limit:
            detail = f"it has {status.st_size} bytes; expected at most {limit}"
        else:
            with open(path, "rb") as file:
                return file.read(limit)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        detail = getattr(error, "strerror", None) or str(error)
    raise FileError(path, f"unreadable {what}", detail)


def read_start(path: str | os.PathLike, size: int) -> bytes:
    """Reads the first bytes of a file; none if it cannot be read."""
    try:
        with open(path if os.path.isfile(path) else os.devnull, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def read_text(path: str | os.PathLike, what: str, limit: int = SMALL) -> str:
    """Reads UTF-8, with or without a byte order mark, or UTF-16."""
    encoded = read_bytes(path, what, limit)
    is_utf16 = encoded[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return encoded.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"it is not UTF-8 text: byte {error.start} is {encoded[error.start]:#04x}"
        raise FileError(path, f"unreadable {what}", detail) from None


# === Listing ===


def check_folder(folder: str | os.PathLike, argument: str) -> Path:
    """Returns an existing folder as an absolute path, or raises a `ValueError` that names it."""
    if not Path(folder).is_dir():
        raise ValueError(f"`{argument}` must be a folder. Received: {folder} (no such folder)")
    return Path(os.path.abspath(folder))


def _scan(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            shown = [e for e in found if not is_hidden(e.name) and e.name.lower() not in _NO_DATA]
    except OSError as error:
        raise FileError(folder, "unreadable folder", error.strerror or "") from error
    return sorted(shown, key=lambda entry: entry.name)


def _has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes


def entries(folder: str | os.PathLike, suffixes: Sequence[str] | None = None) -> list[Path]:
    """What is in a folder and belongs to a dataset, sorted by name; all, or with these suffixes."""
    found = _scan(folder)
    return [Path(e.path) for e in found if suffixes is None or _has_suffix(e.name, suffixes)]


def folders_in(folder: str | os.PathLike) -> list[Path]:
    return [Path(entry.path) for entry in _scan(folder) if entry.is_dir()]


def walk(folder: str | os.PathLike, suffixes: Sequence[str] | None = None) -> Iterator[Path]:
    """Files, all or with these suffixes, in a folder and its subfolders, sorted by path."""
    for entry in _scan(folder):
        if entry.is_dir():
            # Links to folders could form a cycle.
            yield from () if entry.is_symlink() else walk(entry.path, suffixes)
        elif suffixes is None or _has_suffix(entry.name, suffixes):
            yield Path(entry.path)


def is_split_name(name: str) -> bool:
    """Whether a name is that of a usual split, maybe with a year: "Train" or "val2017"."""
    return _SPLIT.fullmatch(name) is not None


def split_in(name: str) -> str | None:
    """The only split in a name: "train2017" in "instances_train2017"; None if there is no such."""
    words = [name] if is_split_name(name) else re.split(r"[-_. ]+", name)
    found = list(filter(is_split_name, words))
    return found[0] if len(found) == 1 else None


def split_of(file: Path) -> str:
    """Name of the split of an annotation file, or its stem."""
    return split_in(file.stem) or re.sub(r"^(instances|person_keypoints)_", "", file.stem)


def by_split(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by split; by their stems if several are of the same split."""
    names = {path: split_of(path) for path in paths}
    counts = collections.Counter(names.values())
    return {name if counts[name] == 1 else path.stem: path for path, name in names.items()}


def split_lists(folder: Path, tree: "FileTree") -> dict[str, Path]:
    """Lists of images by split: in `ImageSets`, or "train.txt", "val_list.txt", ... beside it."""
    for place in ("ImageSets/Main", "ImageSets"):
        sets = tree.find(folder, place, shortest=None)
        if found := entries(sets, (".txt",)) if sets else ():
            return {path.stem: path for path in found}

    def is_list(path):
        first = read_start(path, 1000).partition(b"\n")[0].decode(errors="replace").lower()
        return is_split_name(path.stem) or (split_in(path.stem) and _IMAGE.search(first))

    return by_split(filter(is_list, entries(folder, (".txt",))))


def annotation_files(folder: Path, suffix: str) -> list[Path]:
    """Files with a suffix in a folder and its folders of annotations."""
    inner = [path for path in folders_in(folder) if path.name.lower() in ANNOTATION_FOLDERS]
    return [path for place in (folder, *inner) for path in entries(place, (suffix,))]


def find_split(split: str, known: Collection[str]) -> str | None:
    """The split of this name or its synonym: "valid" for "val"; None if there is none."""
    synonyms = next((names for names in SPLIT_SYNONYMS if split.lower() in names), ())
    for name in (split, *synonyms):
        if len(found := closest(name, [k for k in known if unified(k) == unified(name)])) == 1:
            return found[0]
    return None


# === Finding ===


def composed(name: str) -> str:
    """A name in the usual form of Unicode; macOS decomposes the names of files."""
    return unicodedata.normalize("NFC", name)


def unified(name: str) -> str:
    """A name without its Unicode form and letter case, as a key."""
    return composed(name).casefold()


def closest(name: str, candidates: Iterable[str]) -> list[str]:
    """Those of some equal `unified` names that are most like `name`."""
    candidates = list(candidates)
    exact = [other for other in candidates if other == name]
    return exact or [n for n in candidates if composed(n) == composed(name)] or candidates


class FileTree:
    """Finds the files that the annotations of a dataset name.

    Args:
        roots: Absolute folders of the dataset.
        allow_outside: Whether a stated path may lead out of these folders.
    """

    def __init__(self, *roots: Path, allow_outside: bool = False):
        self.roots, self.allow_outside = roots, allow_outside
        self._listings: dict[str, dict[str, list[str]]] = {}

    def named(
        self, folder: str | os.PathLike, name: str, suffixes: Sequence[str] = ()
    ) -> list[str]:
        """Names in a folder that mean `name`, or else `name` with one of the suffixes.

        If there is none, `name` may be encoded as in an address: "a%20b.jpg".
        """
        listing, key = self._listing(os.fspath(folder)), unified(name)
        if names := closest(name, listing.get(key, ())):
            return names
        found = [n for suffix in suffixes for n in listing.get(key + suffix, ())]
        stems = closest(name, [os.path.splitext(n)[0] for n in found])
        decoded = unquote(name)
        if not found and decoded != name:
            return self.named(folder, decoded, suffixes)
        return [n for n in found if os.path.splitext(n)[0] in stems]

    def child(
        self, folder: str | os.PathLike, name: str, suffixes: Sequence[str] = ()
    ) -> Path | None:
        """Path of the file or folder that `name` means; None if there is none or several."""
        names = self.named(folder, name, suffixes)
        return Path(folder, names[0]) if len(names) == 1 else None

    def find(
        self,
        folder: Path,
        text: str,
        suffixes: Sequence[str] = (),
        shortest: int | None = 1,
    ) -> Path | None:
        r"""Finds the file or folder that an annotation names, by a path with "/" or "\".

        For paths of another computer, such as "C:\data\a.jpg", "s3://bucket/a.jpg" and
        "../media/a.jpg", the longest end of the path that exists in `folder` counts.

        Args:
            folder: Folder that relative paths start from.
            text: The stated path.
            suffixes: Suffixes to try if the name has none.
            shortest: Number of names that the end of a path must have. None: only whole paths.
        """
        text = text.strip()
        path = self.child(folder, text, suffixes)  # maybe with a backslash in its name
        if path or not re.search(r"[/\\]|^\.+$", text):
            return path
        text = text.replace("\\", "/")
        if "?d=" in text:  # Label Studio: /data/local-files/?d=folder%2Fa.jpg
            text = unquote(text.rpartition("?d=")[2])
        full = Path(os.path.normpath(folder / text))
        if root := next((root for root in self.roots if full.is_relative_to(root)), None):
            if path := self.descend(root, full.relative_to(root).parts, suffixes):
                return path
        elif self.allow_outside and os.path.exists(full):
            return full
        names = [name for name in text.split("/") if name not in ("", ".", "..")]
        first = names and self.child(folder, names[0])
        is_foreign = re.match(r"/|\.\./|\w+:", text)
        if not names or shortest is None or (first and first.is_dir() and not is_foreign):
            return None  # or its folder is here, and it is not
        ends = (names[i:] for i in range(max(0, len(names) - 20), len(names) - shortest + 1))
        return next(filter(None, (self.descend(folder, end, suffixes) for end in ends)), None)

    def image(self, folder: Path, text: str, file: str | os.PathLike) -> Path:
        """Returns the image that `file` names, or raises `FileError`."""
        path = self.find(folder, text, IMAGE_SUFFIXES)
        if path is None or path.is_dir():
            detail = f"no {text.strip()[:LONGEST]!r} in {folder}{self.hint(folder, text)}"
            raise FileError(file, "missing image", detail)
        return path

    def hint(self, folder: Path, text: str) -> str:
        """What to say about a path that was not found, but is ambiguous or outside the dataset."""
        full = Path(os.path.normpath(folder / text.strip().replace("\\", "/")))
        if any(full.is_relative_to(root) for root in self.roots):
            names = sorted(self.named(full.parent, full.name, IMAGE_SUFFIXES))
            return f". It could be {' or '.join(names)}" if len(names) > 1 else ""
        if not os.path.exists(full):
            return ""
        return ". It is outside of the dataset: allow_outside=True reads it"

    def class_names(
        self, folder: Path, named: Iterable[str], source: str | os.PathLike
    ) -> list[str]:
        """The lines of `classes.txt`, if there is one, and all others that are named, sorted."""
        path = self.child(folder, "classes.txt")
        listed = self.read_lines(path, "list of classes") if path else []
        if names := list(dict.fromkeys([*listed, *sorted(named)])):
            return names
        raise ValueError(f"No objects in {source}: give `class_names`")

    def read_lines(self, path: Path, what: str, keep_empty: bool = False) -> list[str]:
        """Reads a list in a text file; links must not lead out."""
        real = Path(os.path.realpath(path))
        is_inside = any(real.is_relative_to(os.path.realpath(root)) for root in self.roots)
        if not (is_inside or self.allow_outside):
            detail = "it is a link out of the dataset: allow_outside=True reads it"
            raise FileError(path, f"unreadable {what}", detail)
        lines = (line.strip() for line in read_text(path, what).splitlines())
        return [line for line in lines if line or keep_empty]

    def descend(
        self, folder: Path, names: Sequence[str], suffixes: Sequence[str] = ()
    ) -> Path | None:
        """Path of a file or folder below a folder, name by name."""
        path: Path | None = folder
        for i, name in enumerate(names, start=1):
            path = self.child(path, name, suffixes if i == len(names) else ())
            if path is None:
                break
        return path

    def _listing(self, folder: str) -> dict[str, list[str]]:
        """Names in a folder by `unified` name; none if there is no such folder."""
        if folder not in self._listings:
            listing = collections.defaultdict(list)
            try:
                for name in os.listdir(folder):
                    listing[unified(name)].append(name)
            except OSError:
                pass
            self._listings[folder] = listing
        return self._listings[folder]
