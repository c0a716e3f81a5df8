"""`vl2 chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from vl2_jax.cli.asking import dropped_files, names_in, read_pictures, readable
from vl2_jax.cli.flags import GREEDY, NO_MODEL, OptionalModel, Sampling
from vl2_jax.cli.remote import Server
from vl2_jax.cli.terminal import messages, on_one_line, streaming, tell, write
from vl2_jax.errors import RequestError, VL2Error, shown
from vl2_jax.processing.conversation import with_image_tags
from vl2_jax.progress import Display
from vl2_jax.sharding.devices import Devices

_HELP = {
    "/image PATH ...": "add pictures to the next message; or drop them on the terminal",
    "/new": "start again",
    "/help": "show this",
    "/quit": "end; so does Ctrl-D",
    "//...": "a message that begins with /",
    "Ctrl-C": "stop the answer",
}
_COMMANDS = "/image, /new, /help and /quit"


def chat(
    model: OptionalModel = NO_MODEL,
    server: str = "",
    api_key: str | None = None,
    system: str = "",
    allow_urls: bool = False,
    sampling: Sampling = GREEDY,
    mesh: str | None = None,
) -> None:
    """Talk in the terminal: `/image PATH` adds a picture to the next message, `/help` shows what else there is.

    Example: vl2 chat --model vl2-nano

    Args:
        server: Address of a running `vl2 serve`, such as http://127.0.0.1:8000, in place of a model that is loaded
            here; --model then names the one that is served, where there are several.
        api_key: Of that server; by default the environment's VL2_API_KEY.
        system: What the conversation begins with, before the first message.
        allow_urls: Let /image fetch http:// and https:// addresses.
        mesh: Spread the model over this machine's devices: auto, expert, or sizes such as expert=4,tensor=2.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # lines can be edited, and typed again
    if server:
        vl2: Any = Server(server, model.model, api_key)
    elif model.model:
        vl2, _ = model.load(Devices(mesh))
    else:
        raise RequestError("chat needs --model, or --server with the address of a running `vl2 serve`.")
    talk = Talk(vl2, readable(system), allow_urls, sampling.options())
    was_interrupted = False
    while True:
        try:
            # A loop in here: Python also looks for signals where a loop jumps back, which would lie outside of the try.
            while (line := _read_line()) is not None:
                was_interrupted = False
                if _is_the_end(talk, line):
                    break
            return
        except KeyboardInterrupt:
            if was_interrupted:
                raise
            was_interrupted = True
            tell("\nCtrl-C again, Ctrl-D or /quit ends.")


def _is_the_end(talk: Talk, line: str) -> bool:
    """Whether a line ended the conversation; what fails is told, and does not."""
    try:
        return talk.hears(line)
    except (VL2Error, RuntimeError) as error:  # the latter from a device that has too little memory
        tell(on_one_line(str(error)), "red")
        return False


class Talk:
    """One conversation, and the pictures that go with its next message."""

    def __init__(self, vl2: Any, system: str, allow_urls: bool, options: dict[str, Any]):
        self._vl2, self._allow_urls, self._options = vl2, allow_urls, options
        self._opening = [{"role": "system", "content": system}] if system else []
        self._begin()

    def hears(self, line: str) -> bool:
        """Does what a line asks for; whether that was the end."""
        command, rest = [*line.split(None, 1), "", ""][:2]
        if command == "/quit":
            return True
        if command == "/new":
            self._begin()
        elif command == "/help":
            tell("\n".join(f"{name:16} {does}" for name, does in _HELP.items()))
        elif command == "/image":
            if not rest:
                raise RequestError("/image needs the path of a picture: /image photo.jpg")
            self._add_pictures(names_in(rest))
        else:
            self._hears_message(line)
        return False

    def _hears_message(self, line: str) -> None:
        names, message = dropped_files(line)
        if message == line and line.startswith("/") and not line.startswith("//"):
            command = line.split()[0]
            raise RequestError(
                f"there is no command {shown(command)}; there are {_COMMANDS}; // begins a message with /."
            )
        self._add_pictures(names)
        if message:
            self._ask(message.removeprefix("/") if message.startswith("//") else message)

    def _begin(self) -> None:
        self._chat = self._vl2.chat()
        self._chat.messages += self._opening
        self._pictures: list[Any] = []

    def _add_pictures(self, names: list[str]) -> None:
        added = read_pictures(names, self._allow_urls)
        self._pictures += added
        for name, picture in zip(names, added):
            tell(f"{shown(name)}, {picture.width} x {picture.height}, goes with the next message")

    def _ask(self, line: str) -> None:
        text, told = with_image_tags(line, len(self._pictures)), ""

        def show(row: int, part: str) -> None:
            nonlocal told
            told += part
            write_text(row, part)

        try:
            with Display(messages) as display:
                write_text = streaming(display)
                self._chat.ask(text, self._pictures, on_text=show, report=display, **self._options)
        except KeyboardInterrupt:
            if not told:
                tell("\nstopped; the message is taken back")
                return
            # What was read on the screen is what was said: the next message can speak of it.
            turn = {"role": "user", "content": text, "images": self._pictures}
            self._chat.messages += [turn, {"role": "assistant", "content": told}]
            tell("\nstopped")
        else:
            write("")
        self._pictures = []


def _read_line() -> str | None:
    """What was typed; `None` at the end of input."""
    try:
        return readable(input("> ")).strip()
    except (EOFError, RuntimeError):  # the latter where standard input is closed
        write("")
        return None
