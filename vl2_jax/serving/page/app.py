"""The page itself, of Gradio's parts: which there are, where they stand, and which event each of them begins.

What the browser holds is a view. A conversation lives on the server (`Talk`, one a tab), and events bring new
questions, numbers of turns and settings, all of which are checked like those of a request of the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from gradio_client.utils import is_file_obj, is_http_url_like, traverse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vl2_jax.api import SHIPPED
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.serving.http.door import LOOPBACK, host_of, names_of_loopback, respond
from vl2_jax.serving.http.problems import Problem
from vl2_jax.serving.http.service import Service
from vl2_jax.serving.page import view
from vl2_jax.serving.page.events import Events, open_or_close_camera, take_photograph
from vl2_jax.serving.page.examples import EXAMPLES
from vl2_jax.serving.page.gallery import Gallery, side_by_side
from vl2_jax.serving.page.talk import MOST_BYTES, Talk

_HERE = Path(__file__).parent
_FONTS, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # of the reader's machine
_STATUS_SECONDS = 0.5  # between updates of the line that says how far the model is
_KEPT = (600, 3600)  # seconds between looks for files that were sent, and of their age when they are removed
_AT_ONCE = 64  # answers that the page lets run or wait; the engine bounds what is computed
_LONGEST_ANSWER = 4096  # tokens: the context of the released models
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
        server_name=LOOPBACK,
        footer_links=[],
        run_history=False,
        show_error=False,  # errors that are not ours are for the terminal
        allowed_paths=[str(gallery.folder)],
        max_file_size=4 * MOST_BYTES,  # beyond, Gradio itself refuses; below, our sentence says why
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=view.colours_css() + (_HERE / "page.css").read_text(encoding="utf-8"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )
    return _Door(app)


def make_page(service: Service, gallery: Gallery) -> gr.Blocks:
    """The parts and their events."""
    model = service.settings.names[0]
    files = [[gallery.keep(picture) for picture in example.pictures()] for example in EXAMPLES]
    events = Events(service, gallery, list(zip(EXAMPLES, files, strict=True)))
    cards: list[Any] = [
        {"icon": str(gallery.keep(side_by_side(example.pictures()))), "display_text": example.skill}
        for example in EXAMPLES
    ]
    with _Page(title=f"{model} · vl2-jax", analytics_enabled=False, fill_width=True, delete_cache=_KEPT) as page:
        talk, is_open = gr.State(Talk(), delete_callback=events.forget), gr.State(False)  # the latter is the camera
        with gr.Row(elem_id="top"):
            status = gr.HTML(events.status()[0], elem_id="status")
            new = gr.Button("New conversation", size="sm", elem_id="new", min_width=0, scale=0)
            theme = gr.Button("◐", size="sm", elem_id="theme", min_width=0, scale=0)
        if model == SHIPPED:
            gr.HTML(f"<p>{_ABOUT_NANO}</p>", elem_id="about")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=7, min_width=320, elem_id="conversation"):
                chat = gr.Chatbot(
                    show_label=False, elem_id="chat", min_height=360, layout="bubble", buttons=[], editable="user",
                    render_markdown=False, latex_delimiters=[], allow_file_downloads=False, allow_tags=False,
                    feedback_options=None, examples=cards, group_consecutive_messages=False,
                    placeholder="### Ask about pictures\nDrop, paste or photograph some, or begin with an example.",
                )  # fmt: skip
                lens = gr.Image(
                    sources=["webcam"], type="filepath", format="png", visible=False, show_label=False,
                    elem_id="lens", buttons=[], webcam_options=gr.WebcamOptions(mirror=False),
                )  # fmt: skip
                with gr.Row(elem_id="ask"):
                    box = gr.MultimodalTextbox(
                        show_label=False, placeholder="Ask about pictures", scale=1, file_count="multiple",
                        file_types=["image"], elem_id="box", autofocus=True, max_lines=6,
                        max_plain_text_length=100_000,
                    )  # fmt: skip
                    camera = gr.Button("Camera", elem_id="camera", min_width=0, scale=0)
                usage = gr.HTML(view.footer_html(None), elem_id="usage")
            with gr.Column(scale=4, min_width=300, elem_id="side"):
                with gr.Accordion("What the model sees", open=True):
                    tiles = gr.HTML(view.tiles_html(Talk()), elem_id="tiles")
                with gr.Accordion("Settings", open=True, elem_id="settings"):
                    settings = _settings()

        silent = {"show_progress": "hidden", "api_visibility": "private"}  # the parts themselves show what goes on
        quick = {**silent, "queue": False}
        # By default a browser drops what is asked before it was told that the last answer is over, and says nothing.
        asking = {**silent, "concurrency_limit": _AT_ONCE, "trigger_mode": "multiple"}
        wishes, shown = [talk, *settings], [chat, tiles, usage, box]
        box.submit(events.ask, [box, *wishes], shown, **asking)
        chat.retry(events.retry, wishes, shown, **asking)
        chat.edit(events.edit, wishes, shown, **asking)
        chat.example_select(events.show, wishes, shown, **asking)
        box.stop(Talk.stop, talk, None, **quick)
        new.click(events.clear, talk, shown, **quick)
        chat.clear(events.clear, talk, shown, **quick)
        camera.click(open_or_close_camera, is_open, [lens, is_open], **quick)
        lens.change(take_photograph, [lens, box], [box, lens, is_open], **quick)
        theme.click(None, None, None, js="() => vl2SwitchTheme()", **silent)
        timer = gr.Timer(_STATUS_SECONDS)
        timer.tick(events.status, None, [status, timer], **quick)
    return page


def _settings() -> list[gr.components.Component]:
    """The side panel, in the order of `events._wishes`."""
    system = gr.Textbox(label="System message", lines=2, max_lines=6, placeholder="None")
    temperature = gr.Slider(
        0, 2, SamplingOptions.temperature, step=0.05, label="Temperature", info="0 takes the likeliest token"
    )
    top_p = gr.Slider(0.05, 1, SamplingOptions.top_p, step=0.05, label="Top-p")
    longest = gr.Slider(1, _LONGEST_ANSWER, SamplingOptions.max_tokens, step=1, label="Longest answer, in tokens")
    with gr.Row():
        seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1, min_width=100)
        boxes_on = gr.Number(
            0, label="Boxes belong to picture", info="0 is the last", precision=0, minimum=0, min_width=100
        )
    return [system, temperature, top_p, longest, seed, boxes_on]


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


class _Page(gr.Blocks):
    """Gradio's, which takes files that were sent to it and no addresses: those it would ask for itself."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *others: Any, **more: Any) -> list[Any]:
        traverse(inputs, _no_address, is_file_obj)
        return await super().preprocess_data(block_fn, inputs, *others, **more)


def _no_address(file: dict[str, Any]) -> dict[str, Any]:
    if is_http_url_like(file["path"]):
        raise gr.Error("This page fetches nothing; send the picture itself.", print_exception=False)
    return file


class _Door:
    """Lets in what comes from this page itself, by a name of this machine, and tells browsers that nothing of it comes
    from elsewhere, whatever a model writes.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"same-origin")]
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        problem = _why_not(dict(scope["headers"])) if scope["type"] == "http" else None
        await (respond(problem) if problem else self._app)(scope, receive, answer)


def _why_not(headers: Mapping[bytes, bytes]) -> Problem | None:
    """Why a request is not let in, if it is not."""
    if host_of(headers) not in names_of_loopback():
        told = f"this page answers to the names of its own machine alone; open it as {LOOPBACK} or localhost."
        return Problem(400, told, code="invalid_host")
    # Browsers send files elsewhere without asking first, and then say which page does it.
    if headers.get(b"origin", b"http://" + headers[b"host"]) != b"http://" + headers[b"host"]:
        return Problem(403, "this page takes nothing from other pages.", code="invalid_origin")
    return None
