"""Arrays as PNG data URIs, by the standard library alone: a report needs no imaging package."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["data_uri", "encode_png"]

_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
"""Channels -> PNG's colour type: grey, RGB, RGBA."""


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """An image as the bytes of a PNG file.

    Args:
        pixels: ``[H, W, C]`` with 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    Returns:
        The file.
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = np.ascontiguousarray(pixels).reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """An image ``[H, W, C]`` as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")
