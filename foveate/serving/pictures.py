"""Gets the pictures of requests: from data URLs, and from hosts that are allowed."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from ..errors import InputError
from ..images import as_rgb, check_size, reading
from .gateway.requests import Limits, RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG is also that of phones with previews


def from_data_url(url: str, where: str) -> bytes:
    """The contents of a data URL.

    Raises
    ------
    RequestError : it is none of a picture, or damaged.
    """
    head, comma, data = url.partition(",")
    kind, *options = head.removeprefix("data:").split(";")
    if not comma or not kind.lower().startswith("image/"):
        raise RequestError(f"{where}: the data URL is none of a picture. It begins with data:image/png;base64, or the like.")
    if "base64" not in options:
        return unquote_to_bytes(data)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: the data URL is not valid base64 ({error})") from error


async def fetched(url: str, where: str, hosts: Collection[str], limits: Limits, client: Any) -> bytes:
    """The contents of a picture's URL.

    Parameters
    ----------
    hosts : from which pictures may be loaded; "example.org", or "example.org:8080" for another port.
    client : of httpx; redirections are not followed.

    Raises
    ------
    RequestError : it is neither a data URL nor of one of these hosts, or cannot be loaded.
    """
    import httpx

    if url[:5].lower() == "data:":
        return from_data_url(url, where)
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2].lower()
    except ValueError as error:
        raise RequestError(f"{where}: the URL is damaged ({error})") from error
    if parts.scheme not in ("http", "https") or host not in hosts:
        what = "pictures are taken from data URLs" + (f" and from {', '.join(sorted(hosts))}" if hosts else "")
        raise RequestError(f"{where}: {url[:80]!r} cannot be loaded: {what}.")
    data = bytearray()
    try:
        async with client.stream("GET", url, follow_redirects=False, timeout=limits.body_seconds) as response:
            if response.status_code != 200:
                raise RequestError(f"{where}: {host} answered with status {response.status_code}")
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > limits.body_bytes:
                    raise RequestError(f"{where}: the picture is larger than {limits.body_bytes} bytes", 413)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestError(f"{where}: the picture cannot be loaded from {host} ({type(error).__name__})") from error
    return bytes(data)


def decoded(data: bytes, where: str, limits: Limits) -> Image.Image:
    """A picture as 8-bit RGB, upright; of moving ones the first frame.

    Raises
    ------
    RequestError : it is no picture, damaged, or too large or small.
    """
    name = Path(where)
    try:
        with reading(name), Image.open(BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > limits.pixels:
                raise RequestError(
                    f"{where} is {opened.width} x {opened.height} pixels; at most {limits.pixels} are allowed. Scale it down."
                )
            image = as_rgb(opened)
            check_size(name, image)
    except InputError as error:
        raise RequestError(str(error)) from error
    return image
