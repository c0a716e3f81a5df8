"""The page in headless Chromium (`make web-test`), before an engine that follows a script."""

import contextlib
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from vl2_jax.serving.http.decoding import PictureLimits
from vl2_jax.serving.page.gallery import Gallery

from ...serving.conftest import Running
from ...serving.pictures import png

_CHROMIUM = [
    "--no-sandbox",  # the tests may run as root, and open nothing but the page
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
expect.set_options(timeout=60_000)  # a busy machine too


class Site:
    """A running page, as a user of the browser sees it."""

    def __init__(self, running: Running, folder: Path):
        self.running, self.engine, self.address = running, running.engine, running.address
        self.folder = folder  # of pictures that are shown

    def open(self, browser: Browser, width=1280, height=860, **options) -> "Tab":
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        tab = Tab(page, self.address)
        expect(tab.question).to_be_editable()
        return tab


class Tab:
    """One tab, and what it asked of other machines or complained about."""

    def __init__(self, page: Page, address: str):
        self.page, self.elsewhere, self.errors = page, [], []
        page.on(
            "request",
            lambda asked: asked.url.startswith((address, "data:", "blob:")) or self.elsewhere.append(asked.url),
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        self.question = page.locator("#box textarea")
        self.answers, self.boxes = page.locator(".answer"), page.locator(".answer .box")
        self.writing = page.locator(".answer.writing")

    def add(self, *files, count=None) -> None:
        """Pictures into the question, as (name, bytes)."""
        kind = {"png": "image/png", "jpg": "image/jpeg"}
        sent = [{"name": name, "mimeType": kind[name[-3:]], "buffer": data} for name, data in files]
        self.page.set_input_files("#box input[type=file]", sent)
        expect(self.page.locator("#box .thumbnail-item, #box .thumbnail-wrapper")).not_to_have_count(0)

    def ask(self, text: str, waits: bool = True) -> None:
        before = self.answers.count()
        self.question.fill(text)
        self.question.press("Enter")
        expect(self.answers).to_have_count(before + 1)
        expect(self.question).to_have_value("")  # else what is typed next may be taken away with it
        if waits:
            self.wait()

    def wait(self) -> None:
        """Until the answer is written, and another question can be asked."""
        expect(self.writing).to_have_count(0)
        expect(self.page.locator("#box .submit-button")).to_be_visible()

    def said(self) -> list[str]:
        return [row.inner_text().strip() for row in self.page.locator("#chat .message-row").all()]

    def press(self, title: str, number: int = -1) -> None:
        self.page.locator(f"#chat button[title={title}]").nth(number).click()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def serve_page(make_server, tmp_path_factory):
    """`serve_page()` is a page whose model is ready, `serve_page(is_ready=False)` one that waits for `begin`."""

    @contextlib.contextmanager
    def serve(is_ready=True):
        folder = tmp_path_factory.mktemp("demo")
        with pytest.MonkeyPatch.context() as patch:  # Gradio reads these where it is imported, the first time
            patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
            patch.setenv("GRADIO_TEMP_DIR", str(folder / "sent"))
            from vl2_jax.serving.page.app import make_app

        gallery = Gallery(folder / "shown")
        limits = PictureLimits(pixels=1_000_000)
        with make_server(app=lambda service: make_app(service, gallery), is_ready=is_ready, pictures=limits) as running:
            yield Site(running, gallery.folder)

    return serve


@pytest.fixture(scope="session")
def shared_site(serve_page):
    with serve_page() as site:
        yield site


@pytest.fixture
def site(shared_site):
    shared_site.engine.script, shared_site.engine.seconds = lambda request: "It is a red square.", 0.01
    return shared_site


@pytest.fixture
def tab(site, browser):
    tab = site.open(browser)
    yield tab
    tab.page.close()
    assert tab.errors == []
    assert tab.elsewhere == []


@pytest.fixture
def picture() -> tuple[str, bytes]:
    return "scene.png", png((300, 200), "white")
