"""Decode the content of an image file."""

import io

from PIL import Image


def decode_rgb(content: bytes) -> Image.Image:
    """Decode an image as RGB."""
    image: Image.Image = Image.open(io.BytesIO(content))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` copies RGB too


def is_16_bit_color(header: bytes) -> bool:
    """Whether the first 26 bytes of a file are those of a colour PNG with 16 bits per channel.

    Pillow opens it as `RGB`, like one with 8 bits. Grey ones have a mode of their own.
    """
    return header[:8] == b"\x89PNG\r\n\x1a\n" and header[24:25] == b"\x10" and header[25:26] != b"\0"
