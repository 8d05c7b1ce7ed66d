"""Reader of Pascal VOC annotations."""

import collections
import contextlib
import dataclasses
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from keras_resnest.checks import checked
from keras_resnest.data.dataset import DetectionDataset
from keras_resnest.data.readers import common, files
from keras_resnest.data.readers.common import AnnotatedObject, Faults, FileError, ImageAnnotation
from keras_resnest.images import IMAGE_SUFFIXES

_XML = (".xml",)
# Encodings of several bytes per character, which the parser does not know.
_ASIAN = re.compile(rb"<\?xml[^>]*\sencoding=.(gb\w+|big5|shift_jis|euc-\w+)", re.IGNORECASE)
# Folders of XML files and of images, in lower case; first choice first.
_XML_FOLDERS = ("annotations", "annotation", "annots", "anns", "labels", "label", "xmls", "xml")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "data", "imgs", "img")


@checked
def read_voc(
    folder: str | os.PathLike,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    on_error: common.OnError = "raise",
    use_difficult: bool = True,
    one_based_coordinates: bool = True,
    unannotated: common.Unannotated = "error",
    allow_outside: bool = False,
) -> DetectionDataset:
    """Reads annotations in Pascal VOC format (Everingham et al., IJCV 2010).

    The folder has the VOC layout (`JPEGImages` or `images`, `Annotations`, and perhaps
    `ImageSets/Main/<split>.txt`), or images and XML files side by side. It may have subfolders; one
    for each split ("train", "valid", "test") makes splits, as do lists "<split>.txt" in the folder.
    Images and XML files have the same stem, or else `<filename>` names the image. Where it names
    another image of the folder, the stem counts: `<filename>` goes stale when files are copied or
    renamed. VOC coordinates are 1-based and inclusive: [xmin, ymin, xmax, ymax] becomes
    [xmin - 1, ymin - 1, xmax, ymax].

    Degenerate boxes and boxes outside the image are dropped; boxes that cross the border are
    clipped. If `<size>` shows that boxes were drawn before the EXIF rotation of the image or at
    another scale, they are rotated or scaled with it. The dataset's `report` lists all of this; one
    `UserWarning` summarizes it.

    Args:
        folder: Folder of the dataset.
        split: Name of a list, without ".txt" (images with the flag -1 are excluded), or of the
            folder of a split. Default: all images.
        class_names: Names of the labels 0, 1, 2, ... Default: the lines of `classes.txt`, if there
            is one, and all other names in the XML files of all splits, sorted.
        on_error: "raise" a ValueError for a missing or unreadable image or XML file, a `<size>` of
            another shape than the image, or a class that is not in `class_names`; or "skip" the
            image and report it.
        use_difficult: Whether to keep objects marked as difficult.
        one_based_coordinates: False for files with 0-based coordinates, which are not shifted.
        unannotated: Images without XML file: an "error" (see `on_error`), "skip" and report them,
            or "background": they have no objects.
        allow_outside: Whether lists of images may be links to files outside of the folder.

    Raises:
        ValueError: if there is no such folder or split, no image or box is usable, or see
            `on_error`.

    Example:
    ```python
    train = read_voc("VOCdevkit/VOC2007", split="trainval")
    test = read_voc("VOCdevkit/VOC2007", split="test", class_names=train.class_names)
    ```
    """
    faults = Faults(on_error, unannotated)
    source = _VocFolder(folder, allow_outside)
    split = source.known_split(split)
    wanted = source.listed_ids(split, faults) or source.ids_in(split)
    annotations = {}
    for image_id in source.xml_files if class_names is None else wanted:
        if image_id in source.xml_files:
            with faults.skipping_image():
                annotations[image_id] = _parse_xml(
                    source.xml_files[image_id], one_based_coordinates
                )
    if class_names is None:
        named = {o.name for a in annotations.values() for o in a.objects}
        where = f"the XML files of {source.folder}"
        class_names = source.tree.class_names(source.folder, named, where)
    images = {key: source.image_file(key, xml) for key, xml in annotations.items()}
    if source.splits.get(split) is None:  # no list says which images belong to it
        wanted = sorted({*wanted, *source.unused_images(split, images, faults)})

    def parse(image_id):
        xml = annotations.get(image_id)
        if xml is None:
            if image_id not in source.images:
                name = f"{image_id[: files.LONGEST]}.xml"
                raise FileError(name, "missing image and XML file")
            image = source.images[image_id][0]
            return ImageAnnotation(image, image_id, image, (), missing="missing XML file")
        image, named = images[image_id], re.split(r"[\\/]", xml.filename)[-1]
        if image is None:
            named = repr(xml.filename) if xml.filename else "a <filename>"
            detail = f"not one image {image_id}.* in {source.folder}, nor {named}"
            raise FileError(xml.path, "missing image", detail)
        if source.tree.child(image.parent, named, IMAGE_SUFFIXES) not in (None, image):
            action = f"boxes assumed to belong to {image.name}"
            faults.add(xml.path, "<filename> of another image", action, named)
        return ImageAnnotation(xml.path, image_id, image, xml.objects, xml.size)

    usable = [key for key in wanted if key in annotations or key not in source.xml_files]
    image_folder = source.roots[""][1] if "" in source.roots else source.folder
    return common.build_dataset(
        source.folder, usable, parse, class_names, use_difficult, faults, image_folder
    )


def voc_splits(folder: str | os.PathLike, empty: bool = False) -> list[str] | None:
    """Names of the splits with objects, or also of `empty` ones; None if it is no VOC dataset."""
    source = _VocFolder(folder)
    wanted = None if empty else source.has_objects
    return sorted(filter(wanted, source.splits)) if source.xml_files else None


def inner_voc_folder(folder: Path) -> Path | None:
    """A VOC dataset inside: VOCdevkit/VOC2007 for VOCdevkit."""
    inner = sorted([*folder.glob("*/Annotations"), *folder.glob("*/*/Annotations")])
    return inner[0].parent if inner else None


# === Files ===


def _roots(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Folders of XML files and of images: one pair "", or one for each folder of a split."""
    if pair := _pair(folder):
        return {"": pair}
    inner = files.folders_in(folder)
    pairs = {path.name: _pair(path) for path in inner if files.is_split_name(path.name)}
    if found := {name: pair for name, pair in pairs.items() if pair}:
        return found
    return {"": (folder, folder)} if any(map(_has_xml, inner)) else {}


def _pair(folder: Path) -> tuple[Path, Path] | None:
    inner = {path.name.lower(): path for path in files.folders_in(folder)}
    for name in _XML_FOLDERS:
        if name in inner and next(files.walk(inner[name], _XML), None):
            return inner[name], next((inner[n] for n in _IMAGE_FOLDERS if n in inner), folder)
    return (folder, folder) if _has_xml(folder) else None


def _has_xml(folder: Path) -> bool:
    return bool(files.entries(folder, _XML))


class _VocFolder:
    """The files of a VOC dataset; an id is the path in the folder of XML files or images."""

    def __init__(self, folder: str | os.PathLike, allow_outside: bool = False):
        self.folder = files.check_folder(folder, "folder")
        self.tree = files.FileTree(self.folder, allow_outside=allow_outside)
        self.roots = _roots(self.folder)
        self.xml_files: dict[str, Path] = {}
        self.images: dict[str, list[Path]] = collections.defaultdict(list)
        for split, (xml_root, image_root) in self.roots.items():
            for path in files.walk(xml_root, _XML):
                self.xml_files[_id(split, path, xml_root)] = path
            for path in files.walk(image_root, IMAGE_SUFFIXES):
                self.images[_id(split, path, image_root)].append(path)
        self._image_ids, self._xml_ids = _Ids(self.images), _Ids(self.xml_files)
        self.splits = self._find_splits()

    def _find_splits(self) -> dict[str, Path | None]:
        """Lists of images by split; None for a folder of a split."""
        first = {key.partition("/")[0] for key in (*self.xml_files, *self.images) if "/" in key}
        folders = {name: None for name in first if files.is_split_name(name)}
        lists = files.split_lists(self.folder, self.tree)
        # Beside lists, folders inside of "JPEGImages" have another meaning.
        return folders if not lists else lists if "" in self.roots else {**folders, **lists}

    def ids_in(self, split: str | None) -> list[str]:
        """Ids of the XML files in the folder of a split, or whose images are there."""
        found = self._image_ids.find
        return [k for k in self.xml_files if _is_in(split, k) or _is_in(split, found(k) or "")]

    def known_split(self, split: str | None) -> str | None:
        """Checks the dataset and the name of a split, which may be a synonym."""
        if not self.xml_files:
            inner = inner_voc_folder(self.folder)
            has_images = next(files.walk(self.folder, IMAGE_SUFFIXES), None) is not None
            hint = f". Did you mean {inner}?" if inner else ", only images" * has_images
            what = "XML files" if hint else "images and XML files"
            raise ValueError(f"No {what} in {self.folder}{hint}")
        found = split and files.find_split(split, self.splits)
        if split is not None and found is None:
            known = ", ".join(sorted(self.splits)) or f"no .txt in {self.folder}/ImageSets/Main"
            raise ValueError(
                "`split` must be one of the lists of images, or a folder such as train. "
                f"Received: {split!r}; available: {known}"
            )
        return found

    def has_objects(self, split: str) -> bool:
        """Whether any image of a split has an object, or is missing: not if none is annotated."""
        path = self.splits[split]
        with contextlib.suppress(FileError):  # is raised when the split is read
            lines = self.tree.read_lines(path, "list of images") if path else ()
            ids = map(self._listed_id, lines) if path else self.ids_in(split)
            return any(map(self._has_object, filter(None, ids)))
        return True

    def _has_object(self, image_id: str) -> bool:
        """Whether an image has an object, or is missing."""
        if image_id not in self.xml_files:
            return image_id not in self.images
        return b"<object" in files.read_start(self.xml_files[image_id], 1 << 16).replace(b"\0", b"")

    def listed_ids(self, split: str | None, faults: Faults) -> list[str]:
        """Ids in the list of a split; none if there is no list."""
        path = self.splits.get(split)
        if path is None:
            return []
        image_ids: dict[str, None] = {}
        for line in self.tree.read_lines(path, "list of images"):
            image_id = self._listed_id(line)
            if image_id in image_ids:
                faults.add(path, "repeated line", "used once", image_id)
            elif image_id:
                image_ids[image_id] = None
        if not image_ids:
            raise ValueError(f"{path}: the split is empty")
        return list(image_ids)

    def _listed_id(self, line: str) -> str:
        """Id from a line "id", "id.jpg", "id.jpg id.xml" or "id  flag"; "" if the flag is -1."""
        if line in self.xml_files:  # such as "a.jpg" of a.jpg.xml
            return line
        first = line.partition(" ")[0]
        if line.endswith(_XML) and first.lower().endswith(IMAGE_SUFFIXES):
            line = first
        if match := re.fullmatch(r"(.*\S)\s+(-1|0|1)", line):
            line = "" if match[2] == "-1" else match[1]
        stem, suffix = os.path.splitext(line)
        line = stem if suffix.lower() in (*_XML, *IMAGE_SUFFIXES) else line
        line = line and common.normalize_path(line)
        return line and (self._xml_ids.find(line) or self._image_ids.find(line) or line)

    def image_file(self, image_id: str, xml: "_VocXml") -> Path | None:
        """The image with the path and stem of the XML file, or else the one named in the file."""
        candidates = self._images_of(image_id)
        named = [path for path in candidates if path.name == re.split(r"[\\/]", xml.filename)[-1]]
        if len(named or candidates) == 1:
            return (named or candidates)[0]
        root = next(pair[1] for split, pair in self.roots.items() if _is_in(split, image_id))
        return self.tree.find(root, xml.filename, IMAGE_SUFFIXES)

    def unused_images(self, split: str | None, images: dict, faults: Faults) -> list[str]:
        """Ids of the images without XML file; reports others of the same name as an image."""
        used = set(images.values())
        for key in self.xml_files.keys() - images:  # not read, or unreadable
            used.update(self._images_of(key))
        unused = []
        for image_id, paths in self.images.items():
            rest = [path for path in paths if path not in used and _is_in(split, image_id)]
            if rest and rest == paths:
                unused.append(image_id)
            for path in rest[rest == paths :]:
                faults.add(path, "image of the same name as another", "left out")
        return unused

    def _images_of(self, image_id: str) -> list[Path]:
        return self.images.get(self._image_ids.find(image_id) or "", [])


def _id(split: str, path: Path, root: Path) -> str:
    return PurePosixPath(split, path.relative_to(root)).with_suffix("").as_posix()


def _is_in(split: str | None, image_id: str) -> bool:
    return not split or image_id.startswith(f"{split}/")


class _Ids:
    """Finds ids in any Unicode form and letter case, and where only one side has folders."""

    def __init__(self, ids):
        self._by_name, self._by_stem = (collections.defaultdict(list) for _ in range(2))
        for key in ids:
            self._by_name[files.unified(key)].append(key)
            self._by_stem[files.unified(key.rpartition("/")[2])].append(key)

    def find(self, name: str) -> str | None:
        """The id that means the same file; None if there is none or several."""
        wanted = files.unified(name)
        found = files.closest(name, self._by_name.get(wanted, ()))
        for key in () if found else self._by_stem.get(wanted.rpartition("/")[2], ()):
            other = files.unified(key)
            if other.endswith(f"/{wanted}") or wanted.endswith(f"/{other}"):
                found.append(key)
        return found[0] if len(found) == 1 else None


# === XML ===


@dataclasses.dataclass(frozen=True)
class _VocXml:
    path: Path
    filename: str
    size: tuple[int, int] | None  # width, height
    objects: tuple[AnnotatedObject, ...]


class _NoDoctype(ElementTree.TreeBuilder):
    """Rejects document types, whose entities can expand to gigabytes or read files."""

    def doctype(self, name, pubid, system):
        raise ValueError("document types and entities are not allowed")


def _parse_xml(path: Path, one_based: bool) -> _VocXml:
    encoded = files.read_bytes(path, "XML").lstrip()
    asian = _ASIAN.match(encoded)
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        text = encoded.decode(asian[1].decode()) if asian else encoded
        root = ElementTree.fromstring(text, parser)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise FileError(path, "unreadable XML", str(error)) from error
    if root.tag != "annotation":
        raise FileError(path, "unreadable XML", f"expected <annotation>, found <{root.tag}>")
    return _VocXml(
        path=path,
        filename=_text(root, "filename"),
        size=common.stated_size(_text(root, "size/width"), _text(root, "size/height")),
        objects=tuple(_object(path, node, one_based) for node in root.findall("object")),
    )


def _object(path: Path, node: ElementTree.Element, one_based: bool) -> AnnotatedObject:
    name = _text(node, "name")
    if not name:
        raise FileError(path, "unreadable XML", "an <object> without <name>")
    corners = [_text(node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = map(common.number, corners)
    border_problem = None
    # A degenerate box is not shifted: it would become one pixel wide.
    if one_based and x1 < x2 and y1 < y2:
        if min(x1, y1) == 0:
            action = "clipped (for 0-based files, set one_based_coordinates=False)"
            border_problem = "coordinate 0 in 1-based coordinates", action
        x1, y1 = x1 - 1, y1 - 1
    return AnnotatedObject(
        name=name,
        box=(x1, y1, x2, y2),
        difficult=common.is_true(_text(node, "difficult")),
        text=f"[{', '.join(corner or 'missing' for corner in corners)}]",
        border_problem=border_problem,
    )


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()
