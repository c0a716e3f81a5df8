"""Small data sets in the layouts of the public ones, about scenes that the project draws."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.scenes import SceneSizes, scene_conversation

SIZES = SceneSizes(longest_side=224, two_pictures=0.0)
_SHORT = ("count", "colour", "shape", "read", "presence", "size")
_ABOUT = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>")


def png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def questions(count: int, skills: tuple[str, ...] = _SHORT, seed: int = 2_000_000) -> list[dict[str, Any]]:
    """`{"image" (PNG), "question", "answer", "skill", "size"}` of so many scenes."""
    found = []
    for number in range(count):
        conversation = scene_conversation((seed, number), SIZES)
        messages = conversation["messages"]
        (image,) = messages[0]["images"]
        for asked, told, skill in zip(messages[0::2], messages[1::2], conversation["skills"]):
            text = asked["content"].removeprefix("<image>\n")
            if skill in skills:
                row = {"image": png(image), "question": text, "answer": told["content"], "skill": skill}
                found.append(row | {"size": image.size})
    return found


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As VLMEvalKit's: pictures in base64, those that were before by their index."""
    seen: dict[bytes, int] = {}
    with path.open("w", newline="", encoding="utf-8") as stream:
        extra = [name for name in rows[0] if name not in ("image", "skill", "size")]
        table = csv.writer(stream, delimiter="\t")
        table.writerow(["index", "image", "category", *extra])
        for index, row in enumerate(rows):
            image = str(seen[row["image"]]) if row["image"] in seen else base64.b64encode(row["image"]).decode()
            seen.setdefault(row["image"], index)
            table.writerow([index, image, row["skill"], *(row[name] for name in extra)])
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As lmms-eval's: pictures as `datasets` keeps them."""
    pictures = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "question_id": pa.array([str(number) for number in range(len(rows))]),
        "image": pa.array([{"bytes": row["image"], "path": None} for row in rows], pictures),
        "question": pa.array([row["question"] for row in rows]),
        "answer": pa.array([row["answer"] for row in rows], pa.string()),
        "category": pa.array([row["skill"] for row in rows]),
    }
    pq.write_table(pa.table(columns), path)
    return path


def boxes(count: int) -> list[dict[str, Any]]:
    """`{"image", "expression", "box", "size"}` of what can be located."""
    found = []
    for row in questions(count, ("locate",)):
        (expression,) = _ABOUT.findall(row["question"])[:1] or [""]
        parsed = parse_boxes(row["answer"], *row["size"])
        if expression and len(parsed) == 1:
            box = parsed[0]
            found.append(row | {"expression": expression, "box": [box.x1, box.y1, box.x2, box.y2]})
    return found


def write_refcoco(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """As Qwen-VL's: JSON lines with paths of pictures."""
    lines = []
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(row["image"])
        width, height = row["size"]
        line = {"image": f"{number}.png", "sent": row["expression"], "bbox": row["box"]}
        lines.append(json.dumps(line | {"width": width, "height": height}))
    path = folder / "refcoco_val.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
