"""Every way in which programs hand over a picture, and the sentence for what is none."""

import base64
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.processing.picture_files import saved
from vl2_jax.errors import ImageError
from vl2_jax.processing.fetching import fetch
from vl2_jax.processing.images import load_image

COLOUR = (200, 40, 90)
PNG = saved(Image.new("RGB", (6, 4), COLOUR), format="PNG")
JPEG = saved(Image.new("RGB", (6, 4), COLOUR), format="JPEG")
BASE64 = base64.b64encode(PNG).decode()


class Pathlike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


class Readable:
    """Reads, and can do nothing else."""

    def __init__(self, data):
        self.data = data

    def read(self):
        return self.data


class Arraylike:
    """As tensors of other libraries give themselves."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        if isinstance(self.array, Exception):
            raise self.array
        return self.array


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a picture 100%.png"
    path.write_bytes(PNG)
    return path


def is_right(picture):
    return picture.size == (6, 4) and picture.getpixel((2, 2)) == COLOUR


@pytest.mark.parametrize(
    "form",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: Pathlike(str(path)),
        lambda path: Pathlike(os.fsencode(path)),
        lambda path: path.as_uri(),
        lambda path: f"file://localhost{path}",
        lambda path: f"FILE:{path}",
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: {"path": path},
        lambda path: {"bytes": PNG, "path": None},
        lambda path: {"bytes": PNG, "path": "not here.png"},
        lambda path: {"bytes": BASE64, "path": None},
        lambda path: {"url": f"data:image/png;base64,{BASE64}"},
    ],
)
def test_a_picture_in_a_file_is_read(form, path):
    assert is_right(load_image(form(path)))


@pytest.mark.parametrize(
    "source",
    [
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        np.frombuffer(PNG, np.uint8).data,
        Readable(PNG),
        Readable(bytearray(PNG)),
        Readable(BASE64.encode()),
    ],
)
def test_the_bytes_of_a_file_are_read(source):
    assert is_right(load_image(source))


@pytest.mark.parametrize(
    "text",
    [
        BASE64,
        BASE64.encode(),
        BASE64.rstrip("="),
        f"  {BASE64}\n",
        "\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76)),
        base64.urlsafe_b64encode(PNG).decode(),
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;base64,{BASE64}".encode(),
        f"DATA:image/png;charset=utf-8;BASE64, {BASE64}",
        f"data:;base64,{BASE64.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)
def test_base64_is_read_as_programs_write_it(text):
    assert is_right(load_image(text))


def test_base64_that_looks_like_a_path_is_read():
    text = base64.b64encode(JPEG).decode()
    assert text.startswith("/9j/")
    assert load_image(text).size == (6, 4)


def test_a_file_comes_before_its_name_as_base64(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = BASE64.replace("/", "_")[:60]
    Path(name).write_bytes(saved(Image.new("RGB", (9, 9)), format="PNG"))
    assert load_image(name).size == (9, 9)


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_an_open_file_is_read_from_its_beginning_and_left_where_it_was(mode, path):
    with path.open(mode) as stream:
        stream.seek(7)
        assert is_right(load_image(stream))
        assert stream.tell() == 7
        assert not stream.closed


def test_a_stream_at_its_end_is_read():
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), COLOUR).save(stream, format="PNG")
    assert is_right(load_image(stream))
    assert stream.tell() == len(stream.getvalue())


def test_a_pipe_is_read(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, PNG)
    os.close(writing)
    with open(reading, "rb") as stream:
        assert is_right(load_image(stream))
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(PNG,), daemon=True).start()
    assert is_right(load_image(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (np.full((4, 6), 40, np.uint8), (40, 40, 40)),
        (np.full((4, 6, 1), 40, np.uint8), (40, 40, 40)),
        (np.full((4, 6, 2), (40, 255), np.uint8), (40, 40, 40)),
        (np.full((4, 6, 3), COLOUR, np.uint8), COLOUR),
        (np.full((4, 6, 4), (*COLOUR, 255), np.uint8), COLOUR),
        (np.full((4, 6, 4), (*COLOUR, 0), np.uint8), (255, 255, 255)),
        (np.full((4, 6, 3), COLOUR, np.int64), COLOUR),
        (np.full((4, 6, 3), COLOUR, np.uint8)[::-1, ::-1], COLOUR),
        (np.full((4, 6), 40 * 257, np.uint16), (40, 40, 40)),
        (np.full((4, 6, 3), 40 * 257, ">u2"), (40, 40, 40)),
        (np.full((4, 6, 3), np.array(COLOUR) / 255, np.float64), COLOUR),
        (np.full((4, 6, 3), np.array(COLOUR) / 255, np.float32), COLOUR),
        (np.full((4, 6), 40 / 255, np.float16), (40, 40, 40)),
        (np.full((4, 6), 1.0000001, np.float32), (255, 255, 255)),
        (np.full((4, 6), True), (255, 255, 255)),
        (np.full((4, 6, 1), False), (0, 0, 0)),
        (jnp.full((4, 6, 3), 0.5, jnp.bfloat16), (128, 128, 128)),
        (Arraylike(np.full((4, 6, 3), COLOUR, np.uint8)), COLOUR),
    ],
)
def test_arrays_are_read_by_a_rule_for_every_type(array, pixel):
    picture = load_image(array)
    assert picture.size == (6, 4)
    assert picture.getpixel((1, 1)) == pixel


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 40, 60), np.uint8), r"\[3, 40, 60\]: its channels come first; transpose\(1, 2, 0\)"),
        (np.zeros((1, 40, 60, 3), np.uint8), "one picture of the batch"),
        (np.zeros((40, 60, 5), np.uint8), r"\[height, width\] or \[height, width, 1 to 4\], got uint8"),
        (np.zeros(40, np.uint8), r"got uint8 \[40\]"),
        (np.float64(3.5), "got float64"),
        (np.zeros((0, 40, 3), np.uint8), "is empty"),
        (np.full((4, 6, 3), 255, np.float32), "float32 from 255 to 255, and nothing tells which value is white"),
        (np.full((4, 6, 3), -1.0), "from -1 to -1"),
        (np.full((4, 6), np.inf), "from inf to inf"),
        (np.full((4, 6), 256), "int64 from 256 to 256"),
        (np.full((4, 6), -1, np.int8), "int8 from -1 to -1"),
        (np.zeros((4, 6), complex), "holds complex128"),
        (np.zeros((4, 6), object), "holds object"),
        (np.zeros((4, 6), "U3"), "holds <U3"),
        (Arraylike(RuntimeError("Can't call numpy() on Tensor that requires grad")), "Arraylike .*requires grad"),
    ],
)
def test_an_array_that_is_no_picture_is_refused_by_name(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png;base64,!!!!", "holds no picture"),
        ("data:image/png", "holds no picture"),
        ("data:text/plain,hello", "accepted formats"),
        ("gs://bucket/a.png", "gs: is not read; download it"),
        ("ftp://host/a.png", "ftp: is not read"),
        ("https://host/a.png", r"is not fetched: .*allow_urls=True"),
        (" HTTP://host/a.png", "is not fetched"),
        ("file:///nowhere/a.png", "does not exist"),
        ("\0", "does not exist"),
        ("\ud800", "does not exist"),
        ("a" * 5000, "does not exist"),
        ({}, "needs its 'bytes' or its 'path', got an empty one"),
        ({"bytes": None, "path": None}, "got 'bytes', 'path'"),
        (io.StringIO("text"), "StringIO gives str, expected bytes; open the file as 'rb'"),
        (Readable(None), "Readable gives NoneType"),
        (Readable(b""), "accepted formats"),
    ],
)
def test_what_holds_no_picture_gets_one_sentence(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_a_closed_stream_gets_one_sentence():
    stream = io.BytesIO(PNG)
    stream.close()
    with pytest.raises(ImageError, match="closed file"):
        load_image(stream)


# Addresses


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        leads_to = {
            "/moved": "/picture",
            "/file": f"file://{__file__}",
            "/data": f"data:image/png;base64,{BASE64}",
            "/round": "/round",
        }
        if self.path in leads_to:
            self.send_response(302)
            self.send_header("Location", leads_to[self.path])
            self.end_headers()
            return
        if self.path not in ("/picture", "/a%20b", "/long", "/slow"):
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.05)
        else:
            self.wfile.write(b"x" * 100_000 if self.path == "/long" else PNG)

    def log_message(self, *_):
        """Nothing is told."""


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", ["/picture", "/moved", "/a b", "/a%20b"])
def test_an_address_is_fetched_where_that_is_allowed(site, page):
    assert is_right(load_image(site + page, allow_urls=True))
    assert is_right(load_image({"url": site + page}, allow_urls=True))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("/nothing", "404"),
        ("/file", "not followed"),
        ("/data", "not followed"),
        ("/round", "cannot be fetched"),
        ("/long", "more than 50,000 bytes"),
        ("/slow", "takes longer than 0.5 s"),
    ],
)
def test_an_address_that_gives_no_picture_gets_one_sentence(site, page, message):
    begun = time.monotonic()
    with pytest.raises(ImageError, match=message) as caught:
        fetch(site + page, seconds=0.5, most_bytes=50_000)
    assert time.monotonic() - begun < 2
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("address", ["http://", "http://[", "http://127.0.0.1:1/x", "http://127.0.0.1:port/"])
def test_an_address_that_leads_nowhere_gets_one_sentence(address):
    with pytest.raises(ImageError, match="cannot be fetched"):
        load_image(address, allow_urls=True)


def test_a_record_of_json_is_read():
    record = json.loads(json.dumps({"bytes": BASE64, "path": None}))
    assert is_right(load_image(record))
