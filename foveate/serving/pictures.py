"""Gets the pictures of requests: from data URLs, and from hosts that are allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from ..errors import InputError, shown
from ..heads import opening
from ..images import as_rgb, check_scaled, check_size, reading
from .gateway.limits import BusyError, Limits, RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG is also that of phones with previews
# bytes for each pixel while a picture is opened and made ready: Pillow's own and its copies, and arrays of a processor
PLAIN, CLEAR, DEEP = 18, 24, 32
PIECE = 2**16  # characters
HEADERS = {"Accept-Encoding": "identity"}  # what is packed may be any size when unpacked


def from_data_url(url: str, where: str, kinds: Collection[str] = ("image",)) -> bytes:
    """The contents of a data URL.

    Parameters
    ----------
    kinds : first parts of the types of media that are taken; "image" for pictures.

    Raises
    ------
    RequestError : it is of none of these, or damaged.
    """
    head, comma, data = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma or kind.partition("/")[0] not in kinds:
        what, example = ("picture", "image/png") if "video" not in kinds else ("video", "video/mp4")
        raise RequestError(f"{where}: the data URL is none of a {what}. It begins with data:{example};base64, or the like.")
    if "base64" not in options:
        return _unquoted(data)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: the data URL is not valid base64 ({error})") from error


def _unquoted(data: str) -> bytes:
    """A text with escapes such as %20 as bytes; in pieces, since Python makes an object of each escape."""
    found, begin = bytearray(), 0
    while begin < len(data):
        end = begin + PIECE
        escape = data.rfind("%", max(end - 2, begin + 1), end)  # which is not cut in two
        end = end if escape < 0 else escape
        found += unquote_to_bytes(data[begin:end])
        begin = end
    return bytes(found)


def is_data_url(url: str) -> bool:
    """Whether a URL brings its contents along."""
    return url[:5].lower() == "data:"


class Loader:
    """Loads the pictures of one request from hosts that are allowed.

    Parameters
    ----------
    hosts : from which pictures may be loaded; "example.org", or "example.org:8080" for another port.
    limits : of the request; all of its pictures together may have the bytes and seconds of a body.
    client : of httpx; redirections are not followed, and what hosts send must not be packed.
    held : told of bytes as they come.
    """

    def __init__(self, hosts: Collection[str], limits: Limits, client: Any, held: Callable[[int], None]) -> None:
        self.hosts, self.limits, self.client, self.held = hosts, limits, client, held
        self.bytes = 0

    async def load(self, url: str, where: str) -> bytes:
        """The contents of a picture's URL.

        Raises
        ------
        RequestError : it is of none of the hosts, or cannot be loaded.
        """
        import httpx

        try:
            parts = urlsplit(url)
            host = parts.netloc.rpartition("@")[2].lower()
        except ValueError as error:
            raise RequestError(f"{where}: the URL {shown(url)} is damaged") from error
        if parts.scheme not in ("http", "https") or host not in self.hosts:
            what = "pictures are taken from data URLs" + (f" and from {', '.join(sorted(self.hosts))}" if self.hosts else "")
            raise RequestError(f"{where}: {shown(url)} cannot be loaded: {what}.")
        try:
            return await asyncio.wait_for(self._read(url, where, host), self.limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestError(f"{where}: the picture cannot be loaded from {host} ({type(error).__name__})") from error

    async def _read(self, url: str, where: str, host: str) -> bytes:
        data = bytearray()
        timeout = self.limits.body_seconds
        async with self.client.stream("GET", url, headers=HEADERS, follow_redirects=False, timeout=timeout) as response:
            if response.status_code != 200:
                raise RequestError(f"{where}: {host} answered with status {response.status_code}")
            packed = response.headers.get("content-encoding", "identity").strip().lower()
            if packed not in ("", "identity"):
                raise RequestError(f"{where}: {host} sends the picture packed ({shown(packed)}), though it was asked not to")
            async for chunk in response.aiter_raw():
                self.bytes += len(chunk)
                if self.bytes > self.limits.body_bytes:
                    raise RequestError(f"{where}: the pictures are larger than {self.limits.body_bytes} bytes", 413)
                self.held(len(chunk))
                data += chunk
        return bytes(data)


@dataclass(frozen=True)
class Unopened:
    """A picture as it came.

    Attributes
    ----------
    data : its contents.
    where : its name in messages.
    bytes : that it takes while it is opened.
    """

    data: bytes
    where: str
    bytes: int


def measured(data: bytes, where: str, limits: Limits, scaler: Any, together: bool) -> Unopened:
    """A picture of which only the head is read.

    Parameters
    ----------
    scaler : the processor of images, which may make it larger.
    together : whether the request has other pictures, too.

    Raises
    ------
    RequestError : it is no picture, or too large or small.
    """
    try:
        with reading(Path(where)), opening(data, FORMATS) as opened:
            pixels, mode = opened.width * opened.height, opened.mode
            clear = "transparency" in opened.info or mode in ("RGBA", "LA", "PA", "La", "RGBa")
            if pixels > limits.pixels:
                raise RequestError(
                    f"{where} is {opened.width} x {opened.height} pixels; at most {limits.pixels} are allowed. Scale it down."
                )
            check_size(Path(where), opened)
            check_scaled(opened.size, where, scaler, together)
    except (InputError, MemoryError) as error:
        raise refused(error) from error
    deep = mode.startswith("I") or mode == "F"
    return Unopened(data, where, pixels * (DEEP if deep else CLEAR if clear else PLAIN))


def decoded(picture: Unopened) -> Image.Image:
    """A picture as 8-bit RGB, upright; of moving ones the first frame.

    Raises
    ------
    RequestError : it is damaged.
    """
    place = Path(picture.where)
    try:
        with reading(place), opening(picture.data, FORMATS) as opened:
            image = as_rgb(opened)
            check_size(place, image)
    except (InputError, MemoryError) as error:
        raise refused(error) from error
    return image


def refused(error: BaseException) -> RequestError:
    """An error about a picture or a prompt as one of the gateway: a lack of memory is not the client's fault."""
    return BusyError("there is no memory for the pictures now. Try again later.") if no_memory(error) else RequestError(str(error))


def no_memory(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is a lack of memory."""
    import torch

    while error is not None:
        # torch has a class for GPUs, and words for CPUs
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
