"""Reading the images of question files, which nobody has checked.

What cannot be read costs one sample and is reported with its name.

An image name comes from a question file and may come from anywhere, so it may not climb out of the image folder
(`..`, absolute paths). What lies in the folder is the user's own arrangement: symbolic links in it are followed, also
out of it, as caches and data sets on other disks need it. The content decides about the format, not the extension.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from llava.eval.common.arguments import MAX_IMAGE_PIXELS
from llava.mm_utils import to_rgb


class SampleError(Exception):
    """One sample cannot be answered (its image is missing or damaged); the others can."""


def decode_image(open_source: Callable[[], Any], name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image fully, as RGB; raises `SampleError` with `name` and the reason.

    open_source: gives what PIL can open (a path, a stream); what it raises is a reason too. max_pixels: images with
    more are refused before they are decoded.
    """
    previous = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, palettes, bombs: what matters is an error
            Image.MAX_IMAGE_PIXELS = None  # PIL refuses only twice its limit, and without naming an option
            with Image.open(open_source()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ValueError(f"{width} x {height} pixels are more than --max-image-pixels {max_pixels}")
                if width < 1 or height < 1:
                    raise ValueError("no pixels")
                image.load()
                return to_rgb(image)
    except Exception as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, MemoryError):
            reason = "out of memory"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise SampleError(f"image {name} cannot be read ({reason})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def image_path(folder: Path, name: str) -> Path:
    """Where the image `name` lies; raises `SampleError` if it is no name or leads out of `folder`."""
    if "\0" in name:
        raise SampleError(f"image path {name!r} holds a null character")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or os.path.isabs(name):
        raise SampleError(f"image path {name!r} leaves the image folder")
    return folder / name


def open_image(folder: Path, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image file `name` below `folder`, as RGB; raises `SampleError` with the reason."""
    path = image_path(folder, name)

    def existing() -> Path:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("a folder, not a file")
        if not stat.S_ISREG(mode):  # a pipe would block
            raise ValueError("not a regular file")
        return path

    return decode_image(existing, str(path), max_pixels)
