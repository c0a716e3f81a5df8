"""The page itself, of Gradio's parts: which there are, where they stand, and what happens when they are used.

What the browser holds is a view. A conversation lives on the server (`Talk`, one a tab), and events bring new
questions, numbers of turns and settings, all of which are checked like those of a request of the API.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vl2_jax.api import SHIPPED
from vl2_jax.errors import VL2Error
from vl2_jax.serving.http.door import names_of_loopback
from vl2_jax.serving.http.service import Service
from vl2_jax.serving.page import html
from vl2_jax.serving.page.answering import answer, phase_of
from vl2_jax.serving.page.examples import EXAMPLES
from vl2_jax.serving.page.gallery import Gallery, side_by_side
from vl2_jax.serving.page.talk import MOST_BYTES, Talk

_HERE = Path(__file__).parent
_FONTS, _MONO = (
    ("system-ui", "sans-serif"),
    ("ui-monospace", "monospace"),
)  # of the reader's machine: nothing is fetched
_LOOKS = 0.5  # seconds between looks at a model that is loading
_AT_ONCE = 64  # answers that the page lets run or wait; the engine bounds what is computed
_ABOUT_NANO = (
    "vl2-nano knows scenes of shapes and words that this project draws, and no photographs; for those load a released "
    "model: <code>vl2 demo deepseek-ai/deepseek-vl2-tiny</code>."
)
# Scripts and styles are the page's own and inline, as Gradio writes them; nothing is fetched from elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; connect-src 'self'; worker-src blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(service: Service, gallery: Gallery) -> ASGIApp:
    """The page as an ASGI application, at `/`."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        make_page(service, gallery),
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[str(gallery.folder)],
        max_file_size=4 * MOST_BYTES,  # beyond, Gradio itself refuses; below, our sentence says why
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=html.colours_css() + (_HERE / "page.css").read_text(encoding="utf-8"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )
    hosts = [name for name in names_of_loopback("127.0.0.1") if not name.endswith("]")]
    return TrustedHostMiddleware(_OwnContent(app), allowed_hosts=hosts, www_redirect=False)


def make_page(service: Service, gallery: Gallery) -> gr.Blocks:
    """The parts and their events."""
    model = service.settings.names[0]
    pictures = [[gallery.keep(picture) for picture in example.pictures()] for example in EXAMPLES]
    cards: list[Any] = [
        {"icon": str(gallery.keep(side_by_side(example.pictures()))), "display_text": example.skill}
        for example in EXAMPLES
    ]
    with gr.Blocks(title=f"{model} · vl2-jax", analytics_enabled=False, fill_width=True) as page:
        talk = gr.State(Talk(), delete_callback=lambda old: _forget(gallery, old))
        is_open = gr.State(False)  # the camera
        with gr.Row(elem_id="top"):
            status = gr.HTML(_status(service), elem_id="status")
            again = gr.Button("New conversation", size="sm", elem_id="new", min_width=0, scale=0)
            theme = gr.Button("◐", size="sm", elem_id="theme", min_width=0, scale=0)
        if model == SHIPPED:
            gr.HTML(f"<p>{_ABOUT_NANO}</p>", elem_id="about")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=7, min_width=320, elem_id="conversation"):
                chat = gr.Chatbot(
                    show_label=False, elem_id="chat", min_height=360, layout="bubble", buttons=[],
                    editable="user", render_markdown=False, latex_delimiters=[], allow_file_downloads=False,
                    allow_tags=False, feedback_options=None, examples=cards, group_consecutive_messages=False,
                    placeholder="### Ask about pictures\nDrop, paste or photograph some, or begin with an example.",
                )  # fmt: skip
                lens = gr.Image(
                    sources=["webcam"], type="filepath", format="png", visible=False, show_label=False,
                    elem_id="lens", buttons=[], webcam_options=gr.WebcamOptions(mirror=False),
                )  # fmt: skip
                with gr.Row(elem_id="ask"):
                    box = gr.MultimodalTextbox(
                        show_label=False, placeholder="Ask about pictures", scale=1,
                        file_count="multiple", file_types=["image"], elem_id="box", autofocus=True, max_lines=6,
                        max_plain_text_length=100_000,
                    )  # fmt: skip
                    camera = gr.Button("Camera", elem_id="camera", min_width=0, scale=0)
                usage = gr.HTML(html.footer_html(None), elem_id="usage")
            with gr.Column(scale=4, min_width=300, elem_id="side"):
                with gr.Accordion("What the model sees", open=True):
                    tiles = gr.HTML(html.tiles_html(Talk()), elem_id="tiles")
                with gr.Accordion("Settings", open=True, elem_id="settings"):
                    system = gr.Textbox(label="System message", lines=2, max_lines=6, placeholder="None")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token")
                    top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p")
                    longest = gr.Slider(1, 4096, 512, step=1, label="Longest answer, in tokens")
                    with gr.Row():
                        seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1, min_width=100)
                        boxes_on = gr.Number(0, label="Boxes belong to picture", info="0 is the last", precision=0,
                                             minimum=0, min_width=100)  # fmt: skip

        wishes = [talk, system, temperature, top_p, longest, seed, boxes_on]
        shown = [chat, tiles, usage, box]

        async def write(talk: Talk, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
            async for _ in answer(service, gallery, talk, _wishes(*settings)):
                yield (*_view(talk), _STOPS)
            yield (*_view(talk), _ASKS)

        async def ask(message: dict[str, Any], talk: Talk, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
            with _told():
                talk.ask(message["text"], message["files"])
            yield (*_view(talk), gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True))
            async for update in write(talk, *settings):
                yield update

        async def ask_again(number: int, question: str, talk: Talk, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
            with _told():
                talk.ask_again(number, question)
            yield (*_view(talk), _STOPS)
            async for update in write(talk, *settings):
                yield update

        async def retry(talk: Talk, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
            async for update in ask_again(len(talk.turns) - 1, "", talk, *settings):
                yield update

        async def edit(data: gr.EditData, talk: Talk, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
            async for update in ask_again(
                _turn_of(talk, data.index), html.question_of(str(data.value)), talk, *settings
            ):
                yield update

        async def show(data: gr.SelectData, talk: Talk, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
            number = int(data.index)
            files = pictures[number]
            for question in EXAMPLES[number].questions:
                async for update in ask({"text": question, "files": files}, talk, *settings):
                    yield update
                files = []
                if talk.is_stopped or talk.turns[-1].problem:
                    break

        def clear(talk: Talk) -> tuple[Any, ...]:
            _forget(gallery, talk)
            return (*_view(talk), _ASKS)

        asking = {
            "outputs": shown,
            "show_progress": "hidden",
            "concurrency_limit": _AT_ONCE,
            "api_visibility": "private",
        }
        quick = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        box.submit(ask, [box, *wishes], **asking)
        chat.retry(retry, wishes, **asking)
        chat.edit(edit, wishes, **asking)
        chat.example_select(show, wishes, **asking)
        box.stop(Talk.stop, talk, None, **quick)
        for event in (again.click, chat.clear):
            event(clear, talk, shown, **quick)
        camera.click(_opened_or_closed, is_open, [lens, is_open], **quick)
        lens.change(_photographed, [lens, box], [box, lens, is_open], **quick)
        theme.click(None, None, None, js="() => vl2SwitchTheme()", api_visibility="private")
        timer = gr.Timer(_LOOKS)
        timer.tick(lambda: (_status(service), gr.Timer(active=service.stage.name in ("loading", "compiling"))), None,
                   [status, timer], **quick)  # fmt: skip
    return page


_STOPS = gr.MultimodalTextbox(submit_btn=False, stop_btn=True)
_ASKS = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


class _told:
    """What is wrong with a question is shown on the page."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, VL2Error):
            raise gr.Error(html.escape(html.sentence(str(error))), duration=None, print_exception=False) from None


class _OwnContent:
    """Tells browsers that nothing of this page comes from elsewhere, whatever a model writes."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        await self._app(scope, receive, answer)


def _view(talk: Talk) -> tuple[list[dict[str, Any]], str, str]:
    """The conversation, its tiles and what the last answer took, for the parts that show them."""
    messages = [message for _, message in _messages(talk)]
    return messages, html.tiles_html(talk), html.footer_html(talk.turns[-1] if talk.turns else None)


def _messages(talk: Talk) -> Iterator[tuple[int, dict[str, Any]]]:
    """Messages of each turn, with its number: pictures apart, since Gradio edits messages of text alone."""
    for number, turn in enumerate(talk.turns):
        if turn.pictures:
            yield number, {"role": "user", "content": gr.HTML(html.sent_html(turn.pictures), padding=False)}
        if turn.question or not turn.pictures:
            yield number, {"role": "user", "content": html.question_text(turn.question)}
        yield number, {"role": "assistant", "content": gr.HTML(html.answer_html(turn, talk.pictures), padding=False)}


def _turn_of(talk: Talk, index: Any) -> int:
    """The turn of a message."""
    place = index[0] if isinstance(index, list | tuple) else index
    turns = [number for number, _ in _messages(talk)]
    return turns[place] if isinstance(place, int) and 0 <= place < len(turns) else len(talk.turns)


def _opened_or_closed(is_open: bool) -> tuple[Any, bool]:
    return gr.Image(value=None, visible=not is_open), not is_open


def _photographed(photograph: str | None, message: dict[str, Any] | None) -> tuple[Any, Any, Any]:
    """A photograph into the question that is being written, which closes the camera."""
    if photograph is None:
        return gr.skip(), gr.skip(), gr.skip()
    message = message or {"text": "", "files": []}
    return {"text": message["text"], "files": [*message["files"], photograph]}, *_opened_or_closed(is_open=True)


def _wishes(system: Any, temperature: Any, top_p: Any, longest: Any, seed: str, boxes_on: Any) -> dict[str, Any]:
    """The settings as fields of a request, which is where they are checked."""
    number = int(seed) if re.fullmatch(r"\s*-?[0-9]{1,19}\s*", seed) else seed.strip() or None
    return {"system": system, "temperature": temperature, "top_p": top_p, "max_tokens": longest, "seed": number,
            "boxes_on": boxes_on}  # fmt: skip


def _forget(gallery: Gallery, talk: Talk) -> None:
    gallery.forget([picture for turn in talk.turns for picture in turn.pictures])
    talk.clear()


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=_FONTS, font_mono=_MONO)
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="#134e4a88",
    )


def _status(service: Service) -> str:
    return html.status_html(service.stage, phase_of(service.stage), service.settings.names[0])
