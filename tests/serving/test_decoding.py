"""Pictures of strangers: refused from their headers, decoded in processes that may hang, crash or run out of memory."""

import asyncio
import io
import json
import multiprocessing
import os
import random
import re
import signal
import struct
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import psutil
import pytest
from PIL import Image

from vl2_jax.errors import ImageError, RequestError, VL2Error
from vl2_jax.serving.http import decoding
from vl2_jax.serving.http.decoding import Decoders, PictureLimits, encode
from vl2_jax.serving.requests import Limits

from .conftest import NAME, ask, wait_until
from .pictures import part, png, question
from .test_http_streams import raw

ONE = [{"role": "user", "content": "<image>\n?", "images": [0]}, {"role": "assistant", "content": "", "images": []}]
LIMITS = PictureLimits()


def several(count: int) -> list[dict]:
    question = {"role": "user", "content": "<image>" * count, "images": list(range(count))}
    return [question, {"role": "assistant", "content": "", "images": []}]


@pytest.fixture(scope="module")
def decoders(processor):
    made = Decoders(processor, LIMITS, processes=1)
    yield made
    made.close()


def decoded(decoders, *files, messages=None):
    return asyncio.run(decoders.encode(messages or several(len(files)), files))


def header_of_png(width: int, height: int) -> bytes:
    """A picture of that size by its header, and a few bytes of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000_000, 9)  # 10 kB that become 10 MB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_process_gives_what_the_library_gives(decoders, processor):
    files = [png((700, 300), "red"), png((40, 90), "blue", "JPEG")]
    got, expected = decoded(decoders, *files), encode(processor, LIMITS, several(2), files)
    for name in ("input_ids", "labels", "visual_index", "tiles", "crops"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert np.array_equal(ours, theirs), name
    assert (got.image_sizes, got.tokens_per_tile) == (((700, 300), (40, 90)), expected.tokens_per_tile)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (6325, 6325), (1, 20_000), (20_000, 1)])
def test_a_bomb_is_refused_from_its_header(processor, size):
    begun = time.perf_counter()
    with pytest.raises((RequestError, ImageError), match="picture 1"):
        encode(processor, LIMITS, ONE, [header_of_png(*size)])
    assert time.perf_counter() - begun < 1


def test_sizes_are_summed_before_any_picture_is_decoded(processor, monkeypatch):
    monkeypatch.setattr(decoding, "load_image", None)
    with pytest.raises(RequestError, match="pixels together, more than the limit of 80,000,000"):
        encode(processor, LIMITS, several(3), [header_of_png(6000, 6000)] * 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 200), (200, 1)])
def test_the_smallest_pictures_are_seen(processor, size):
    assert encode(processor, LIMITS, ONE, [png(size)]).image_sizes == (size,)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "SGI"])
def test_formats_that_are_not_needed_are_not_opened(processor, kind):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, kind)
    with pytest.raises(ImageError, match="not one of the accepted formats"):
        encode(processor, LIMITS, ONE, [file.getvalue()])


@pytest.mark.parametrize("text", ["/etc/passwd", "file:///etc/passwd", "~/.ssh/id_rsa", "http://127.0.0.1/", "."])
def test_a_name_of_a_file_is_no_picture(processor, text):
    with pytest.raises(ImageError):
        encode(processor, LIMITS, ONE, [text.encode()])


def test_what_pillow_says_of_a_damaged_file_is_not_told(processor):
    for file in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        png()[:60],
        png(kind="JPEG")[:200],
        png(kind="GIF")[:20],
        b"RIFF" + b"\0" * 40,
    ):
        with pytest.raises(VL2Error) as caught:
            encode(processor, LIMITS, ONE, [file])
        assert re.fullmatch(r"picture 1 (is damaged or not|cannot be|has).*", str(caught.value))
        assert not re.search(r"0x[0-9a-f]{4}|object at|Error|/", str(caught.value))


def test_what_a_human_sees_is_what_the_model_sees(processor):
    """Turned by the camera, transparent, grey of 16 bits, of inks, of a palette, animated: as a viewer shows them."""

    def tiles(image: Image.Image, kind="PNG", **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return encode(processor, LIMITS, ONE, [file.getvalue()])

    wide = Image.new("RGB", (120, 40), "red")
    exif = Image.Exif()
    exif[274] = 6
    assert tiles(wide, exif=exif).image_sizes == ((40, 120),)
    white = tiles(Image.new("RGB", (50, 50), "white")).tiles
    assert (tiles(Image.new("RGBA", (50, 50), (255, 0, 0, 0))).tiles == white).all()
    assert (tiles(Image.new("LA", (50, 50), (0, 0))).tiles == white).all()
    assert (tiles(Image.fromarray(np.full((50, 50), 65535, np.uint16))).tiles == white).all()
    assert (tiles(Image.new("CMYK", (50, 50), (0, 0, 0, 0)), "JPEG", quality=100).tiles == white).all()
    palette = Image.new("P", (50, 50), 1)
    palette.putpalette([255, 255, 255, 0, 0, 0])
    assert (tiles(palette, transparency=1).tiles == white).all()
    frames = [Image.new("RGB", (50, 50), colour) for colour in ("black", "red")]
    first = tiles(Image.new("RGB", (50, 50), "white"), "GIF", save_all=True, append_images=frames).tiles
    assert (first == white).all()


def mutated(file: bytes, rng: random.Random) -> bytes:
    data = bytearray(file)
    for _ in range(rng.randint(1, 6)):
        kind, at = rng.randrange(5), rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4)))
        elif kind == 2:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            data = data[: max(1, at)]
        data = data or bytearray(b"x")
    return bytes(data)


def files(rng: random.Random) -> list[bytes]:
    noise = Image.fromarray(np.frombuffer(rng.randbytes(60 * 80 * 3), np.uint8).reshape(60, 80, 3))
    made = []
    kinds = [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("PNG", {"optimize": True})]
    for kind, options in [*kinds, ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})]:
        file = io.BytesIO()
        noise.save(file, kind, **options)
        made.append(file.getvalue())
    return made


def check_hostile(decoders, count: int, seed: int) -> None:
    rng = random.Random(seed)
    good, seen = files(rng), 0
    for number in range(count):
        file = mutated(good[number % len(good)], rng)
        begun, told = time.perf_counter(), ""
        try:
            seen += len(decoded(decoders, file).tiles) > 0
        except VL2Error as error:
            told = str(error)
        assert len(told) < 250
        assert "0x" not in told
        assert time.perf_counter() - begun < 5  # seconds, on a machine that is busy
    assert 0 < seen < count


def test_damaged_files_are_seen_or_refused(decoders):
    before = decoders._processes[0]._process.pid if decoders._processes[0]._process else None
    check_hostile(decoders, 200, 0)
    assert before in (None, decoders._processes[0]._process.pid)  # and not one of them ended the process


@pytest.mark.slow
def test_five_thousand_damaged_files_are_seen_or_refused_in_little_memory(decoders):
    check_hostile(decoders, 100, 1)
    process = psutil.Process(decoders._processes[0]._process.pid)
    before = process.memory_info().rss
    check_hostile(decoders, 5000, 2)
    assert process.is_running()
    assert process.memory_info().rss - before < 256e6


def test_a_decoder_that_hangs_loses_one_request(processor):
    made = Decoders(processor, replace(LIMITS, seconds=0.3), processes=1)
    try:
        decoded(made, png())
        os.kill(made._processes[0]._process.pid, signal.SIGSTOP)
        with pytest.raises(ImageError, match="take longer than"):
            decoded(made, png())
        assert len(decoded(made, png()).tiles) == 1
    finally:
        made.close()


def test_a_decoder_that_crashes_loses_one_request(processor):
    made = Decoders(processor, LIMITS, processes=1)
    try:
        decoded(made, png())
        process = made._processes[0]._process
        os.kill(process.pid, signal.SIGSTOP)

        async def crash():
            asked = asyncio.ensure_future(made.encode(ONE, [png()]))
            await asyncio.sleep(0.2)
            os.kill(process.pid, signal.SIGKILL)
            await asked

        with pytest.raises(ImageError, match="cannot be decoded"):
            asyncio.run(crash())
        assert len(decoded(made, png()).tiles) == 1
    finally:
        made.close()


def test_a_process_that_was_ended_between_requests_is_not_missed(processor):
    made = Decoders(processor, LIMITS, processes=1)
    try:
        decoded(made, png())
        os.kill(made._processes[0]._process.pid, signal.SIGKILL)
        made._processes[0]._process.join()
        assert len(decoded(made, png()).tiles) == 1
    finally:
        made.close()


def test_a_picture_that_takes_more_memory_than_a_process_has_loses_one_request(processor):
    made = Decoders(processor, replace(LIMITS, memory=64 << 20), processes=1)
    try:
        assert len(decoded(made, png()).tiles) == 1
        pid = made._processes[0]._process.pid
        with pytest.raises(ImageError):
            decoded(made, png((6000, 6000)))
        assert len(decoded(made, png()).tiles) == 1
        assert made._processes[0]._process.pid == pid
    finally:
        made.close()


@pytest.mark.slow
def test_the_largest_pictures_are_seen_in_the_memory_and_time_that_they_have(decoders):
    for mode, size in (("RGBA", (8000, 5000)), ("RGB", (8000, 5000)), ("LA", (5000, 8000))):
        assert len(decoded(decoders, png(size, 0, mode=mode)).tiles) > 0


def test_what_waits_to_be_read_takes_places_of_the_queue(make_server, monkeypatch):
    """So a request is refused at once, and not after its pictures were decoded."""

    async def for_ever(*_):
        await asyncio.sleep(60)

    with make_server(limits=Limits(max_running=2, max_waiting=1)) as running, running.client() as client:
        monkeypatch.setattr(running.service.decoders, "encode", for_ever)
        body = {"model": NAME, "messages": question(part(), "?")}
        waiting = [raw(running, body) for _ in range(3)]
        wait_until(lambda: client.get("/ready").status_code == 503)
        begun = time.perf_counter()
        assert ask(client).status_code == 429
        assert time.perf_counter() - begun < 1
        for connection in waiting:
            connection.close()
        wait_until(lambda: running.service._being_read == 0)
        assert client.get("/ready").status_code == 200
        assert ask(client, n=3).status_code == 200
        assert ask(client, n=4).status_code == 429


def test_text_is_answered_while_pictures_take_long(make_server):
    """Texts are read by threads of their own."""
    with make_server() as running, running.client() as client:
        process = running.service.decoders._processes
        wait_until(lambda: all(one._process is not None and one._pipe is not None for one in process), 60)
        ask(client, messages=question(part()))
        for one in process:
            os.kill(one._process.pid, signal.SIGSTOP)
        begun = time.perf_counter()
        assert ask(client).status_code == 200
        assert time.perf_counter() - begun < 5
        for one in process:
            os.kill(one._process.pid, signal.SIGCONT)
        assert ask(client, messages=question(part())).status_code == 200


def test_frames_between_processes_are_json_and_bare_arrays(processor):
    ours, theirs = multiprocessing.Pipe()
    sending = threading.Thread(target=decoding._send, args=(theirs, encode(processor, LIMITS, ONE, [png()])))
    sending.start()
    head, *arrays = (ours.recv_bytes() for _ in range(6))
    sending.join()
    told = json.loads(head)["arrays"]
    assert list(told) == ["input_ids", "labels", "visual_index", "tiles", "crops"]
    assert [len(data) for data in arrays] == [np.dtype(d).itemsize * int(np.prod(s)) for d, s in told.values()]
