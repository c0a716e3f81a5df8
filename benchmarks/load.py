"""What a server holds: many streams, four times too much, clients that leave, equal answers under load. Loopback alone.

    make load                                              # vl2-nano, a few minutes
    .venv/bin/python benchmarks/load.py --requests 4096 --streams 256 --seconds 30 --leavers 500
    .venv/bin/python benchmarks/load.py --server http://127.0.0.1:8000   # one that runs already

Clients run in this process, on the same cores as the server, and take a part of them. A row is measured or it fails;
the command ends with code 1 if a measure is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import urlopen

from PIL import Image, ImageDraw

_NEW_TOKENS = 24
_GIVE_UP = 300.0  # seconds after which a request counts as hung


@dataclass
class Told:
    """What became of a request: seconds are from its beginning."""

    status: int = 0
    text: str = ""
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0


@dataclass
class Bench:
    """A server, and the rows that were measured."""

    host: str
    port: int
    model: str
    pid: int | None = None
    failed: list[str] = field(default_factory=list)

    def row(self, name: str, measured: str, holds: bool, wanted: str) -> None:
        print(f"{name:44} {measured:52} {'' if holds else 'MISSED: '}{wanted}", flush=True)
        if not holds:
            self.failed.append(name)

    async def ask(self, number: int, leave_after: float | None = None, **fields: object) -> Told:
        """A streamed answer to question `number`, which has none to two pictures."""
        told, begun = Told(), time.perf_counter()
        body = {"model": self.model, "max_tokens": _NEW_TOKENS, "temperature": 0, "stream": True, **fields}
        body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()[:-1] + b', "messages": ' + question(number) + b"}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        writer = None
        try:
            async with asyncio.timeout(leave_after or _GIVE_UP):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
                told.status = int((await reader.readline()).split()[1])
                while line := await reader.readline():
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    told.status = 500 if "error" in chunk else told.status
                    told.tokens = (chunk.get("usage") or {}).get("completion_tokens", told.tokens)
                    for choice in chunk.get("choices", ()):
                        text = choice["delta"].get("content") or ""
                        told.first = told.first or (time.perf_counter() - begun if text else 0.0)
                        told.text += text
        except TimeoutError:
            told.status = told.status if leave_after else -1
        finally:
            if writer is not None:
                writer.transport.abort()
        told.end = time.perf_counter() - begun
        return told

    def gauge(self, name: str) -> float:
        with urlopen(f"http://{self.host}:{self.port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def memory(self) -> float:
        """Megabytes that the server's process holds."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vl2-nano")
    parser.add_argument("--server", default="", help="of this address, in place of one that is started")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--leavers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    options = parser.parse_args()
    process, address = None, options.server
    if not address:
        process, address = started(options.model)
    parts = urlsplit(address)
    bench = Bench(parts.hostname or "", parts.port or 80, options.model, process and process.pid)
    try:
        asyncio.run(measure(bench, options))
        if process is not None:
            process.send_signal(signal.SIGTERM)
            begun = time.perf_counter()
            code = process.wait(60)
            bench.row("SIGTERM", f"code {code} after {time.perf_counter() - begun:.1f} s", code == 0, "code 0")
    finally:
        if process is not None:
            process.kill()
    sys.exit(1 if bench.failed else 0)


def started(model: str) -> tuple[subprocess.Popen[str], str]:
    """`vl2 serve` on a free port, when it is ready."""
    command = [sys.executable, "-m", "vl2_jax.cli", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = last = time.perf_counter()
    silence, address = 0.0, ""
    assert process.stderr is not None
    for line in process.stderr:
        silence, last = max(silence, time.perf_counter() - last), time.perf_counter()
        if "is ready at" in line:
            address = line.split("is ready at")[1].strip().removesuffix("/v1")
            break
    if not address:
        sys.exit("the server ended before it was ready")
    os.set_blocking(process.stderr.fileno(), False)
    threading.Thread(target=_drop, args=(process.stderr.fileno(),), daemon=True).start()
    print(f"ready after {time.perf_counter() - begun:.0f} s, longest silence {silence:.1f} s")
    return process, address


def _drop(pipe: int) -> None:
    """Reads the log, so that its writer does not wait."""
    while True:
        try:
            if not os.read(pipe, 65536):
                return
        except BlockingIOError:
            time.sleep(0.05)


async def measure(bench: Bench, options: argparse.Namespace) -> None:
    alone = [await bench.ask(number) for number in range(24)]
    idle = median([told.first for told in alone])
    rate = sum(told.tokens for told in alone) / sum(told.end for told in alone)
    measured = f"first token {idle * 1e3:.0f} ms, {rate:.0f} tokens/s"
    bench.row("alone", measured, all(told.status == 200 for told in alone), "all answered")

    texts = {number: told.text for number, told in enumerate(alone)}
    numbers = [number % 24 for number in range(96)]
    random.Random(0).shuffle(numbers)
    together = await at_once([lambda n=n: bench.ask(n) for n in numbers], 32)
    same = sum(told.text == texts[number] for number, told in zip(numbers, together))
    bench.row("R9 answers among 32, in other orders", f"{same} of 96 equal to those alone", same == 96, "all")

    before = bench.memory() if bench.pid else 0.0
    begun = time.perf_counter()
    seen: list[float] = []
    watching = asyncio.ensure_future(watch_health(bench, seen))
    many = await at_once([lambda n=n: bench.ask(n % 24) for n in range(options.requests)], options.streams)
    seconds = time.perf_counter() - begun
    watching.cancel()
    statuses = Counter(told.status for told in many)
    goodput = statuses[200] / seconds
    held = set(statuses) <= {200, 429} and statuses[200] > 0
    name = f"L1 {options.requests} requests over {options.streams} streams"
    bench.row(name, f"{dict(statuses)}, {goodput:.1f} answers/s", held, "200 or 429, none hung")
    memory = bench.memory() if bench.pid else 0.0  # the most is open now: what comes later finds room
    health = quantile(seen, 0.99)
    bench.row("L2 /health meanwhile", f"p99 {health * 1e3:.0f} ms", health < 0.1, "below 100 ms")

    usual = await arriving(bench, 0.8 * goodput, options.seconds)
    first = [told.first for told in usual if told.status == 200]
    ratio = quantile(first, 0.99) / median(first)
    measured = f"first token p50 {median(first) * 1e3:.0f}, p99 {quantile(first, 0.99) * 1e3:.0f} ms: {ratio:.1f}"
    bench.row("L2 at 80 % of what it can", measured, ratio <= 3, "p99 / p50 at most 3")

    begun = time.perf_counter()
    burst = await arriving(bench, 4 * goodput, options.seconds)
    seconds = time.perf_counter() - begun
    refused = [told.end for told in burst if told.status == 429]
    answered = sum(told.status == 200 for told in burst) / seconds
    late = quantile(refused, 0.99) if refused else 0.0
    statuses = Counter(told.status for told in burst)
    measured = f"{dict(statuses)}, refused in p99 {late * 1e3:.0f} ms"
    bench.row("L3 four times too much", measured, set(statuses) <= {200, 429} and late < 0.05, "429 in 50 ms")
    share = answered / goodput
    bench.row("L3 answers/s meanwhile", f"{share:.0%} of those of L1", share >= 0.9, "at least 90 %")
    begun = time.perf_counter()
    while (await bench.ask(0)).first > 2 * idle and time.perf_counter() - begun < 60:
        pass
    recovery = time.perf_counter() - begun
    bench.row("L3 first token as alone again", f"after {recovery:.1f} s", recovery < 5, "5 s")

    draw = random.Random(1)
    leaving = [draw.choice((0.001, 0.02, 0.1, 0.5, 1.0)) * draw.random() for _ in range(options.leavers)]
    await at_once([lambda s=s: bench.ask(0, leave_after=s, max_tokens=400, ignore_eos=True) for s in leaving], 32)
    begun = time.perf_counter()
    while bench.gauge("num_requests_running") and time.perf_counter() - begun < 60:
        await asyncio.sleep(0.02)
    seconds, pages = time.perf_counter() - begun, bench.gauge("kv_cache_usage_perc")
    name, measured = f"L4 {options.leavers} clients leave", f"all free after {seconds:.2f} s, pages held: {pages:.0%}"
    bench.row(name, measured, seconds < 1 and pages == 0, "1 s, none")

    seeded = {"temperature": 1, "seed": 7}
    repeats = await at_once([lambda: bench.ask(3, **seeded)] * 100 + [lambda n=n: bench.ask(n) for n in range(24)], 32)
    different = len({told.text for told in repeats[:100]})
    bench.row("R10 one seed, 100 times, under load", f"{different} answer(s)", different == 1, "1")
    compiled = bench.gauge("compilations_total")
    bench.row("L5 programs compiled since it was ready", f"{compiled:.0f}", compiled == 0, "none")
    if bench.pid:
        grown = memory - before
        bench.row("L5 memory of L1", f"{grown:+.0f} of {before:.0f} MB", grown < 0.1 * before, "below 10 % more")
        grown = bench.memory() - memory
        bench.row("L5 memory since L1", f"{grown:+.0f} of {memory:.0f} MB", grown < 0.01 * memory, "below 1 % more")


async def at_once(work: list[Callable[[], Awaitable[Told]]], most: int) -> list[Told]:
    """All of it, so much at a time."""
    room = asyncio.Semaphore(most)

    async def one(ask: Callable[[], Awaitable[Told]]) -> Told:
        async with room:
            return await ask()

    return await asyncio.gather(*map(one, work))


async def arriving(bench: Bench, rate: float, seconds: float) -> list[Told]:
    """Requests that come at a rate, whatever becomes of those before, at times of a Poisson process."""
    draw, asked = random.Random(2), []
    begun = due = time.perf_counter()
    while due < begun + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asked.append(asyncio.ensure_future(bench.ask(len(asked) % 24)))
        due += draw.expovariate(rate)
    return await asyncio.gather(*asked)


async def watch_health(bench: Bench, seen: list[float]) -> None:
    while True:
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection(bench.host, bench.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        seen.append(time.perf_counter() - begun)
        await asyncio.sleep(0.05)


@functools.cache
def question(number: int) -> bytes:
    """The same messages for a number each time: a third of them are text, the others have a picture or two."""
    draw = random.Random(number)
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": picture(draw)}} for _ in range(number % 3)]
    asked = ("What is written here?", "<|grounding|>What do you see?", "How many are there?", "What colour is it?")
    text = {"type": "text", "text": f"{draw.choice(asked)} ({number})"}
    return json.dumps([{"role": "user", "content": [*parts, text]}]).encode()


def picture(draw: random.Random) -> str:
    image = Image.new("RGB", (draw.randint(60, 400), draw.randint(60, 400)), "white")
    for _ in range(4):
        x, y = draw.randrange(image.width - 20), draw.randrange(image.height - 20)
        colour = tuple(draw.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).rectangle((x, y, x + draw.randint(5, 90), y + draw.randint(5, 90)), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def median(values: list[float]) -> float:
    return quantile(values, 0.5)


if __name__ == "__main__":
    main()
