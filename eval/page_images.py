"""The images of a page: found in a folder by name, decoded, made small and embedded, each once."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.fingerprint import read_picture
from eval.types import ScoreError

MOST = 400
SIDE = 480  # pixels of the longer side of an embedded image
SUFFIXES = ("", *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom", ".nii.gz", ".nii"))
CHOICE = re.compile(r"(.+)(@\w+:-?\d{1,9})")  # "vol.nii.gz@axial:87", a slice or frame of a file

ReadImage = Callable[[str], np.ndarray]  # path, with the choice of a slice → uint8 (H, W) or (H, W, 3) as displayed


class Images:
    """Images of a folder as data URIs. Raises ScoreError where the folder is none."""

    def __init__(self, folder: str | Path | None, read: ReadImage = read_picture):
        self.folder = None if folder is None else Path(folder).resolve()
        if self.folder is not None and not self.folder.is_dir():
            raise ScoreError(f"{folder}: is no folder; give --images the folder of the images")
        self.read = read
        self.encoded: list[str] = []
        self.wanted, self.over = 0, 0
        self.unreadable: list[str] = []
        self._numbers: dict[str, int | None] = {}

    def number(self, names: Sequence[str]) -> int | None:
        """Which of `encoded` shows a sample whose image has one of these names; None without one."""
        found = self._find(names)
        if found is None:
            self.wanted += self.folder is not None
            return None
        if found not in self._numbers:
            self._numbers[found] = self._add(found)
        return self._numbers[found]

    def facts(self) -> list[list[str]]:
        """What the page tells of its images: [name, text]."""
        if self.folder is None:
            return [["images", "none; give --images FOLDER"]]
        parts = [f"{len(self.encoded)} embedded, made small"]
        parts += [f"{self.wanted} samples have none"] if self.wanted else []
        parts += [f"{len(self.unreadable)} cannot be read ({self.unreadable[0]})"] if self.unreadable else []
        return [["images", ", ".join(parts + ([f"{self.over} over the limit of {MOST}"] if self.over else []))]]

    def _find(self, names: Sequence[str]) -> str | None:
        """Path of the first name that is a file of the folder, with what it chooses of that file."""
        for name in names if self.folder is not None else ():
            chosen = CHOICE.fullmatch(name)
            for stem, choice in ((name, ""), *([chosen.groups()] if chosen else [])):
                for suffix in SUFFIXES:
                    if path := self._inside(stem + suffix):
                        return f"{path}{choice}"
        return None

    def _inside(self, name: str) -> Path | None:
        assert self.folder is not None
        if "\0" in name or len(name) > 250:
            return None
        path = (self.folder / name).resolve()
        return path if path.is_relative_to(self.folder) and path.is_file() else None

    def _add(self, path: str) -> int | None:
        if len(self.encoded) >= MOST:
            self.over += 1
            return None
        try:
            self.encoded.append(_encode(self.read(path)))
        except (OSError, ValueError) as error:
            self.unreadable.append(str(error).replace(f"{self.folder}/", ""))
            return None
        return len(self.encoded) - 1


def _encode(pixels: np.ndarray) -> str:
    """JPEG as data URI, the longer side SIDE at most."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
