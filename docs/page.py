"""Draws the pictures of the web page: `python docs/page.py` (needs the `web` extra and Chromium).

It starts `vl2 demo vl2-nano`, asks its examples as a person would, and writes what the page looks like then.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

OUT = Path(__file__).parent / "pictures"
_SECONDS = 300  # for loading and compiling
_COLOURS = 128  # of a picture: fewer than 150 kB each


@contextmanager
def demo() -> Iterator[str]:
    """The address of a page that is being served."""
    command = [sys.executable, "-m", "vl2_jax.cli", "demo", "vl2-nano", "--port", "0", "--max-num-seqs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        lines = iter(process.stderr or ())
        yield next(found[0] for line in lines if (found := re.search(r"http://[0-9.]+:[0-9]+", line)))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def open_page(browser, address: str, width: int, height: int, **options) -> Page:
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("ready", timeout=1000 * _SECONDS)
    return page


def ask_example(page: Page, skill: str) -> None:
    page.get_by_text(skill, exact=True).click()
    expect(page.locator(".answer").last).to_be_visible()
    expect(page.locator("#box .submit-button")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(500)  # what moves has come to rest


def keep(page: Page, name: str) -> None:
    path = OUT / f"page-{name}.png"
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    with demo() as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = open_page(chromium, address, 1280, 800)
        keep(page, "examples")
        ask_example(page, "Describe with boxes")
        page.locator(".answer .box").first.hover()
        page.wait_for_timeout(500)
        keep(page, "boxes")
        page = open_page(chromium, address, 1280, 800, color_scheme="dark")
        ask_example(page, "Two pictures")
        keep(page, "dark")
        page = open_page(chromium, address, 390, 844)
        ask_example(page, "Locate")
        keep(page, "phone")
