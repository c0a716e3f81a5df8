"""Pictures as clients send them."""

import base64
import io

from PIL import Image


def png(size=(100, 50), colour="red", kind="PNG", mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **options)
    return file.getvalue()


def address(data: bytes | None = None, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(png() if data is None else data).decode()}"


def part(data: bytes | None = None, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": address(data), **more}}


def question(*parts) -> list[dict]:
    """One message; texts are parts of text."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]
