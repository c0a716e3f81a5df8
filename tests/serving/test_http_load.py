"""Many clients at once, patient and not: each gets an answer or a refusal, and those who go leave nothing behind."""

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter

import psutil
import pytest

from vl2_jax.serving.requests import Limits

from .conftest import NAME, wait_until
from .pictures import part, png, question

TEXT = [{"role": "user", "content": "hi"}]


async def post(server, body: dict, leave_after: float | None = None) -> tuple[int, bytes]:
    """Status and bytes of an answer; with `leave_after`, whatever came in so many seconds."""
    host, port = server.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = bytearray()
        try:
            async with asyncio.timeout(leave_after if leave_after is not None else 120):
                while piece := await reader.read(65536):
                    answer += piece
        except TimeoutError:
            if leave_after is None:
                raise
        return int(answer[9:12] or 0), bytes(answer)
    finally:
        writer.transport.abort()


async def health(server, seen: list[float], ended: asyncio.Event) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    while not ended.is_set():
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        seen.append(time.perf_counter() - begun)
        await asyncio.sleep(0.02)


def storm(server, count: int, open_at_once: int, with_pictures: float) -> Counter:
    """Statuses of so many requests, of which so many are open at once; every whole one is checked."""
    picture = part(png((64, 64)))

    async def all_of_them() -> Counter:
        statuses: Counter = Counter()
        room = asyncio.Semaphore(open_at_once)

        async def one(number: int) -> None:
            messages = question(picture, "?") if random.Random(number).random() < with_pictures else TEXT
            async with room:
                status, answer = await post(server, {"model": NAME, "messages": messages, "stream": number % 2 == 0})
            statuses[status] += 1
            if status == 200:
                end = b"\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" if number % 2 == 0 else b"}}"
                assert answer.endswith(end), answer[-200:]
                assert b'"finish_reason":"stop"' in answer

        await asyncio.gather(*(one(number) for number in range(count)))
        return statuses

    return asyncio.run(all_of_them())


def leavers(server, count: int, seed: int) -> None:
    """Clients that leave at a random instant: before the engine has their request, while it waits, while it is read."""
    rng = random.Random(seed)

    async def all_of_them() -> None:
        room = asyncio.Semaphore(32)

        async def one() -> None:
            messages = question(part(png((64, 64))), "?") if rng.random() < 0.3 else TEXT
            body = {"model": NAME, "messages": messages, "stream": rng.random() < 0.7, "n": rng.choice((1, 1, 3))}
            async with room:
                await post(server, body, leave_after=rng.choice((0.0, 0.01, 0.05, 0.3)))

        await asyncio.gather(*(one() for _ in range(count)))

    asyncio.run(all_of_them())
    wait_until(lambda: not server.engine.running and not server.engine.waiting, 5)


def left_behind(server) -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture
def busy(make_server):
    with make_server(seconds=0.002, limits=Limits(max_running=32, max_waiting=4096)) as running:
        yield running


def test_sixty_four_streams_at_once_are_all_answered(busy):
    assert storm(busy, 192, 64, with_pictures=0.3) == {200: 192}


def test_clients_that_leave_leave_nothing_behind(busy):
    busy.engine.script = lambda request: "word " * 300
    leavers(busy, 40, seed=0)
    before = left_behind(busy)
    leavers(busy, 60, seed=1)
    wait_until(lambda: left_behind(busy)[0] <= before[0] + 3 and left_behind(busy)[1] <= before[1] + 3)


def test_more_than_is_taken_on_is_refused_and_the_rest_is_answered(make_server):
    with make_server(seconds=0.01, limits=Limits(max_running=4, max_waiting=8)) as running:
        statuses = storm(running, 200, 64, with_pictures=0.0)
        assert set(statuses) == {200, 429}
        assert statuses.total() == 200
        assert running.service.engine.load.waiting == 0
        assert storm(running, 10, 2, with_pictures=0.0) == {200: 10}


@pytest.mark.slow
def test_four_thousand_requests_over_256_streams_are_all_accounted_for(busy):
    seen: list[float] = []

    def ask_health() -> None:
        async def until_ended() -> None:
            asking = asyncio.ensure_future(health(busy, seen, ended))
            while not stop.is_set():
                await asyncio.sleep(0.05)
            ended.set()
            await asking

        ended = asyncio.Event()
        asyncio.run(until_ended())

    stop = threading.Event()
    asking = threading.Thread(target=ask_health)
    asking.start()
    try:
        assert storm(busy, 4096, 256, with_pictures=0.5) == {200: 4096}
    finally:
        stop.set()
        asking.join()
    seen.sort()
    print(f"/health: median {seen[len(seen) // 2] * 1e3:.1f} ms, p99 {seen[int(len(seen) * 0.99)] * 1e3:.1f} ms")


@pytest.mark.slow
def test_five_hundred_clients_that_leave_leave_nothing_behind(busy):
    busy.engine.script = lambda request: "word " * 300
    leavers(busy, 100, seed=2)
    before, memory = left_behind(busy), psutil.Process().memory_info().rss
    leavers(busy, 500, seed=3)
    wait_until(lambda: left_behind(busy)[0] <= before[0] + 3 and left_behind(busy)[1] <= before[1] + 3)
    assert psutil.Process().memory_info().rss - memory < 50e6
