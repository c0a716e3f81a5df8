"""`vl2 generate`: one question about pictures, and its answer."""

from __future__ import annotations

import io
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from vl2_jax.cli.asking import STANDARD_INPUT, read_pictures, read_prompt, readable
from vl2_jax.cli.flags import GREEDY, ONE_DEVICE, Model, OnDevices, Repeated, Sampling, in_all_processes
from vl2_jax.cli.terminal import messages, print_json, streaming, tell, write
from vl2_jax.errors import ImageError, RequestError, shown
from vl2_jax.processing.conversation import with_image_tags
from vl2_jax.processing.grounding import draw_boxes
from vl2_jax.progress import Display


@in_all_processes
def generate(
    model: Model,
    prompt: str = "",
    prompt_file: str | None = None,
    image: Repeated = (),
    system: str = "",
    n: int = 1,
    boxes_on: int | None = None,
    save_boxes: Path | None = None,
    json: bool = False,
    allow_urls: bool = False,
    sampling: Sampling = GREEDY,
    devices: OnDevices = ONE_DEVICE,
) -> None:
    """Answer one question about pictures.

    Example: vl2 generate --model vl2-nano --image photo.jpg --prompt "What is in the picture?"

    Args:
        prompt: The question; - is standard input. `<image>` marks where a picture belongs; by default they come first.
        prompt_file: A file that holds the question.
        image: A picture: a file, - for standard input, a file:// address; may be given several times.
        system: What the conversation begins with, before the question.
        n: So many answers to the question, one after another.
        boxes_on: The picture that boxes are in pixels of and are drawn on, from 1; by default the last.
        save_boxes: Write that picture with the answer's boxes drawn on it.
        json: Print one object for each answer: text, token_ids, boxes (pixels, raw 0 to 999, picture), timings.
        allow_urls: Let --image fetch http:// and https:// addresses.
    """
    if [prompt, prompt_file, *image].count(STANDARD_INPUT) > 1:
        raise RequestError("only one of --prompt and --image can be standard input; give the other as a file.")
    # What cannot be read or written is told before minutes are spent on loading weights.
    question = read_prompt(prompt, prompt_file)
    pictures = read_pictures(image, allow_urls)
    if boxes_on is not None and not 1 <= boxes_on <= len(pictures):
        raise RequestError(
            f"--boxes-on is {boxes_on}; expected the number of a picture, of which {len(pictures)} are given."
        )
    pointed_at = -1 if boxes_on is None else boxes_on - 1
    if save_boxes is not None:
        if n != 1:
            raise RequestError(f"--save-boxes draws one answer, and --n is {n}; leave one of them out.")
        check_picture_file(save_boxes, pictures[pointed_at] if pictures else None)
    turn = {"role": "user", "content": with_image_tags(question, len(pictures)), "images": pictures}
    opening = [{"role": "system", "content": readable(system)}] if system else []
    vl2, seconds = model.load(devices)
    with Display(messages) as display:
        answers = vl2.generate(
            [*opening, turn],
            on_text=None if json or n != 1 else streaming(display),
            report=display,
            boxes_on=pointed_at,
            n=n,
            **sampling.options(),
        )
    for number, answer in enumerate(answers, 1):
        if json:
            print_json(described(answer, seconds))
        else:
            write("" if n == 1 else f"[{number}] {answer.text}")
    if save_boxes is not None and not messages.quiet:
        draw_boxes(pictures[pointed_at], answers[0].boxes).save(save_boxes)
        tell(f"{len(answers[0].boxes)} box(es) drawn on {save_boxes}")


def described(answer: Any, load_seconds: float) -> dict[str, Any]:
    """An answer as JSON has it; pictures are counted from 1, as `--boxes-on` counts them."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "boxes": [asdict(box) | {"picture": box.picture + 1} for box in answer.boxes],
        "timings": asdict(answer.timings) | {"load_seconds": load_seconds},
    }


def check_picture_file(path: Path, picture: Image.Image | None) -> None:
    """Whether boxes can be drawn on a picture and written, asked before the work rather than after it.

    Raises:
      ImageError: there is no picture, no such folder, no permission, or no format of that name that holds the picture.
    """
    if picture is None:
        raise ImageError("--save-boxes needs a picture to draw on; give --image.")
    folder, name = path.absolute().parent, f"--save-boxes {shown(str(path))}"
    if not folder.is_dir():
        raise ImageError(f"{name}: there is no folder {shown(str(folder))}; create it first.")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ImageError(f"{name} cannot be written; choose another file.")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ImageError(f"{name}: {shown(path.suffix)} is not a picture format that can be written; use .png or .jpg.")
    for size in ((picture.width, 16), (16, picture.height)):  # formats have a longest side
        try:
            Image.new("RGB", size).save(io.BytesIO(), kind)
        except (OSError, ValueError, KeyError) as error:
            raise ImageError(f"{name}: {kind} cannot hold this picture ({error}); use .png.") from None
