"""What goes wrong, who may come in, and every screen: bad pictures, hostile answers, two users, phones, the dark."""

import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from ...serving.conftest import wait_until
from ...serving.pictures import png

HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> '
    '<a href="javascript:window.hacked=1">here</a> ![x](https://evil.example/x.png) '
    "<|ref|><img src=x onerror=window.hacked=1><|/ref|><|det|>[[__import__('os').abort(), 1, 2, 3], "
    "[1, 2, 300, 400]]<|/det|>"
)


def test_nothing_that_a_model_writes_runs_or_is_evaluated(site, tab, picture):
    """The released demo interpolates answers into HTML and calls `eval` on their boxes."""
    site.engine.script = lambda request: HOSTILE
    tab.add(('<img src=x onerror="window.hacked=1">.png', picture[1]))
    tab.ask(HOSTILE)
    tab.page.locator(".answer .box").hover()
    for text in ("<script>window.hacked=1</script>", "![x](https://evil.example/x.png)", "onerror=window.hacked=1"):
        assert text in tab.answers.inner_text()
        assert text in tab.said()[1]
    expect(tab.boxes).to_have_count(1)
    assert tab.page.locator("#chat a:not(.save), #chat script, #chat [onerror]").count() == 0
    assert tab.page.evaluate("window.hacked") is None


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("broken.png", png()[:-30], "Picture 1 cannot be decoded"),
        ("text.png", b"not a picture at all", "Picture 1 is damaged or not one of the accepted formats"),
        ("large.png", png((2000, 1000)), "Picture 1 has 2000 x 1000 = 2,000,000 pixels, more than the limit"),
    ],
)
def test_a_bad_picture_gets_a_sentence_and_the_conversation_goes_on(site, tab, picture, name, data, problem):
    tab.add((name, data))
    tab.ask("What is it?")
    expect(tab.page.get_by_role("alert")).to_contain_text(problem)
    tab.add(picture)
    tab.ask("And this?")
    expect(tab.answers.last).to_have_text("It is a red square.")


def test_a_file_of_too_many_bytes_gets_a_sentence(site, tab, monkeypatch):
    monkeypatch.setattr("vl2_jax.serving.page.talk.MOST_BYTES", 100)
    tab.add(("scene.png", png()))
    tab.question.press("Enter")
    expect(tab.page.get_by_text("bytes, more than the limit of 100; scale it down.")).to_be_visible()
    expect(tab.answers).to_have_count(0)


def test_two_users_at_once_have_their_own_conversations(site, browser):
    def script(request):
        width, _ = request.prompt.image_sizes[0]
        return f"<|ref|>width {width}<|/ref|><|det|>[[0, 0, 500, 500]]<|/det|> " + "and so on " * 30

    site.engine.script, site.engine.seconds = script, 0.03
    tabs = [site.open(browser), site.open(browser)]
    for tab, width in zip(tabs, (200, 300)):
        tab.add(("scene.png", png((width, 200))))
    for tab in tabs:
        tab.ask("How wide?", waits=False)
    expect(tabs[0].writing).to_have_count(1)
    expect(tabs[1].writing).to_have_count(1)
    wait_until(lambda: len(site.engine.running) == 2)
    for tab, width in zip(tabs, (200, 300)):
        tab.wait()
        expect(tab.page.locator(".mention")).to_have_text([f"width {width}"])
        expect(tab.page.locator("#tiles figure")).to_have_count(1)
        tab.page.close()


def test_an_answer_that_nobody_reads_any_more_is_cancelled(site, browser):
    site.engine.script, site.engine.seconds = lambda request: "on and on " * 200, 0.02
    cancelled, tab = site.engine.cancelled, site.open(browser)
    tab.ask("Go on", waits=False)
    expect(tab.answers).to_contain_text("on and on")
    tab.page.close()
    wait_until(lambda: site.engine.cancelled == cancelled + 1)


def test_a_phone_shows_all_of_it_and_asks(site, browser, picture):
    site.engine.script = lambda request: "<|ref|>a star<|/ref|><|det|>[[100, 100, 900, 900]]<|/det|>"
    tab = site.open(browser, 390, 844, has_touch=True, is_mobile=True)
    tab.add(picture)
    tab.ask("Where?")
    for selector in ("#box", "#camera", ".answer .canvas", "#tiles img", "#settings", "#new"):
        frame = tab.page.locator(selector).first.bounding_box()
        assert frame["x"] >= 0, selector
        assert frame["x"] + frame["width"] <= 390, selector
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
    box = tab.page.locator("#box").bounding_box()
    assert box["y"] + box["height"] < 844  # the question is written without scrolling
    tab.boxes.tap()
    expect(tab.boxes.locator("b")).to_be_visible()
    tab.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_dark_or_light_as_the_system_is_or_the_reader_chooses(site, browser, scheme):
    def looks(tab) -> str:
        """By its ground, against which its letters stand out."""
        ground, letters = (
            sum(int(part) for part in re.findall(r"\d+", tab.page.locator(selector).first.evaluate(of))[:3]) / 765
            for selector, of in (
                ("body", "element => getComputedStyle(element).backgroundColor"),
                ("#status b", "element => getComputedStyle(element).color"),
            )
        )
        return "dark" if letters - ground > 0.7 else "light" if ground - letters > 0.7 else "neither"

    other = {"light": "dark", "dark": "light"}[scheme]
    tab = site.open(browser, color_scheme=scheme)
    wait_until(lambda: looks(tab) == scheme)
    tab.page.click("#theme")
    wait_until(lambda: looks(tab) == other)
    tab.page.reload()
    expect(tab.question).to_be_editable()
    wait_until(lambda: looks(tab) == other)
    tab.page.close()


def test_a_model_that_is_compiling_tells_how_far_it_is_and_answers_when_it_is_there(serve_page, browser, processor):
    with serve_page(is_ready=False) as site:
        service = site.running.service
        service.report("compiling", 1, 4)
        tab = site.open(browser)
        expect(tab.page.locator("#status")).to_contain_text("compiling its programs25%")
        tab.ask("What is it?", waits=False)
        expect(tab.answers).to_contain_text("compiling its programs 25%")
        service.report("compiling", 3, 4)
        expect(tab.page.locator("#status")).to_contain_text("75%")
        service.begin(site.engine, processor)
        tab.wait()
        expect(tab.answers).to_have_text("It is a red square.")
        expect(tab.page.locator("#status")).to_contain_text("ready")
        tab.page.close()


def test_the_page_answers_to_names_of_this_machine_alone_and_lets_nothing_in_from_elsewhere(site):
    with httpx.Client(base_url=site.address, trust_env=False) as client:
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
        found = client.get("/")
        policy = found.headers["content-security-policy"]
        assert found.status_code == 200
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        config = client.get("/config").json()
        assert not [one for one in config["dependencies"] if one["api_visibility"] != "private"]
        for path in ("/etc/passwd", __file__):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    assert site.running._listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://{host}", 200),
        ("https://{host}", 403),
        ("http://evil.example", 403),
        ("http://localhost:1", 403),
        ("null", 403),
    ],
)
def test_other_pages_cannot_send_files(site, origin, status):
    """A form of another page is sent without asking whether it may be (no preflight)."""
    headers = {} if origin is None else {"Origin": origin.format(host=site.address.removeprefix("http://"))}
    with httpx.Client(base_url=site.address, trust_env=False) as client:
        sent = client.post("/gradio_api/upload", headers=headers, files={"files": ("scene.png", png())})
    assert sent.status_code == status


def test_files_that_were_sent_are_removed_after_a_while(serve_page, monkeypatch):
    monkeypatch.setattr("vl2_jax.serving.page.app._KEPT", (0.2, 0.2))
    with serve_page() as site, httpx.Client(base_url=site.address, trust_env=False) as client:
        (path,) = client.post("/gradio_api/upload", files={"files": ("scene.png", png())}).json()
        assert Path(path).exists()
        wait_until(lambda: not Path(path).exists())


@pytest.mark.parametrize("path", ["/etc/hostname", "http://127.0.0.1:9/scene.png", "https://example.com/scene.png"])
def test_files_of_this_machine_and_addresses_are_no_pictures_for_a_question(site, path, monkeypatch):
    fetched = []
    monkeypatch.setattr("safehttpx.get", lambda url, **_: fetched.append(url))
    with httpx.Client(base_url=site.address, trust_env=False, timeout=20) as client:
        config = client.get("/config").json()
        asking = next(d for d in config["dependencies"] if any(t[1] == "submit" for t in d["targets"]))
        inputs = [{"text": "What?", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]
        inputs += [None, "", 0, 0.9, 10, "", 0]
        told = {"data": inputs, "fn_index": asking["id"], "session_hash": "x"}
        before = len(site.engine.requests)
        assert client.post("/gradio_api/queue/join", json=told).status_code == 200
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "x"}) as stream:
            last = next(line for line in stream.iter_lines() if "process_completed" in line)
        assert '"success":false' in last
        assert len(site.engine.requests) == before
    assert not fetched
