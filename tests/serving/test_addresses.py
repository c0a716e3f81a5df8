"""Addresses of pictures: whatever is written, resolved or redirected, nothing but public addresses of allowed hosts is
dialled. The network of these tests records who would be dialled, and answers from memory.
"""

import asyncio
import ssl

import httpcore
import pytest

from vl2_jax.errors import ImageError
from vl2_jax.serving.http import fetching
from vl2_jax.serving.http.fetching import Fetcher, is_public, look_up, read_address
from vl2_jax.serving.http.problems import Problem

from .conftest import ask
from .pictures import png, question

PUBLIC = "93.184.215.14"
ALLOWED = frozenset({"images.example.org"})
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%s"

INTERNAL_IPS = (
    # this machine and its networks, in every notation that an address has
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1",
    "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.1", "192.0.2.1", "198.18.0.1",
    "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1",
    "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fd12:3456::1", "ff02::1", "2001:db8::1", "100::1",
    # IPv4 inside of IPv6: mapped, compatible, NAT64, 6to4, Teredo
    "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1", "::7f00:1",
    "64:ff9b::7f00:1", "64:ff9b::169.254.169.254", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "2002:a00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001::1", "no address", "",
)  # fmt: skip
LOCAL_NAMES = (  # that this machine's own resolver knows, or reads as numbers
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "0.0.0.0",
    "localhost", "2852039166", "0xa9fea9fe", "169.254.169.254", "192.168.1.1", "10.1", "0xa.0.0.1", "3232235777",
)  # fmt: skip
WRITTEN = (  # forms that parsers read in different ways, and what is no address of a picture
    "file:///etc/passwd", "file://images.example.org/etc/passwd", "ftp://images.example.org/a.png", "gopher://x/_",
    "dict://127.0.0.1:11211/", "ws://images.example.org/", "javascript:alert(1)", "data:text/html,x", "about:blank",
    "//images.example.org/a.png", "/etc/passwd", "images.example.org/a.png", "https:images.example.org/a.png",
    "https:/images.example.org/a.png", "https:///images.example.org/a.png", "https://", "http://", "https://?x",
    "https://#",
    "https://@images.example.org/a.png", "https://user@images.example.org/", "https://u:p@images.example.org/",
    "https://images.example.org@127.0.0.1/", "https://images.example.org:80@127.0.0.1/",
    "https://127.0.0.1#@images.example.org/",
    "https://127.0.0.1\\@images.example.org/", "https://images.example.org\\@127.0.0.1/",
    "https://images.example.org\\.evil.org/",
    "https:\\\\images.example.org/a.png", "https://images.example.org\\a.png", "http:\\127.0.0.1",
    "https://images.example.org:22/", "https://images.example.org:8080/", "https://images.example.org:0/",
    "https://images.example.org:99999/", "https://images.example.org:x/", "https://images.example.org:-1/",
    "https://images.example.org:80/", "http://images.example.org:443/", "http://images.example.org:6379/",
    "https://images.example.org.evil.org/", "https://evil-images.example.org/", "https://evil.org/images.example.org",
    "https://evil.org?images.example.org", "https://evil.org#images.example.org", "https://example.org/",
    "https://org/",
    "https://images.example.org./", "https://.images.example.org/", "https://images..example.org/",
    "https://*.example.org/",
    "https://images.example.org%2f@127.0.0.1/", "https://images%2eexample%2eorg/",
    "https://images.example.org%00.evil.org/",
    "https://images.example.org\x00.evil.org/", "https://images.example.org\t/",
    "https://images.example.org\r\nHost: x/",
    "https://images.example.org/a b.png", "https://images.example.org/\r\nX: y", "https://images.exampl\ne.org/",
    "https://ｉmages.example.org/", "https://images.example。org/", "https://imagеs.example.org/", "https://①②⑦.⓪.⓪.①/",
    "https://images.example.org\u2044a.png", "https://images.example.org\uff0fa", "https://images.ex\u00adample.org/",
    "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[::1%25lo]/", "https://[images.example.org]/",
    "https://[",
    "https://[::1", "https://::1/", "https://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
    "http://0177.0.0.1/", "http://169.254.169.254/latest/meta-data/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://localhost/", "http://localhost:8000/health", "http://kubernetes.default.svc/", "http://0/",
    "HTTP://LOCALHOST/",
    "hTTps://127.0.0.1/", "http://127.0.0.1.nip.io/", "http://spoofed.burpcollaborator.net/",
    "https://images.example.org:443:80/",
)  # fmt: skip


class Network(httpcore.AsyncMockBackend):
    """Remembers what was dialled; each dialled address answers with the same bytes."""

    def __init__(self, *answers: bytes):
        super().__init__([])
        self.dialled: list[str] = []
        self.names: list[str] = []
        self.sent = b""
        self._answers = list(answers)

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.dialled.append(host)
        return Stream(self, list(self._answers))


class Stream(httpcore.AsyncMockStream):
    def __init__(self, network, answers):
        super().__init__(answers)
        self._network = network

    async def write(self, buffer, timeout=None):
        self._network.sent += buffer

    async def start_tls(self, ssl_context: ssl.SSLContext, server_hostname=None, timeout=None):
        assert ssl_context.verify_mode is ssl.CERT_REQUIRED
        assert ssl_context.check_hostname
        self._network.names.append(server_hostname)
        return self


def resolving(*answers: list[str]):
    """A resolver that gives one answer after another, and the last again."""
    left = list(answers)

    async def resolve(host, port):
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


def fetch(text, network, resolve, allowed=ALLOWED):
    return asyncio.run(Fetcher(allowed, resolve, network).fetch(text))


def picture() -> bytes:
    return OK % (len(png()), png())


def test_there_are_many_forms():
    assert len({*INTERNAL_IPS, *LOCAL_NAMES, *WRITTEN}) >= 120


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_not_an_allowed_address_is_refused_and_nothing_is_dialled(text):
    network = Network(picture())
    with pytest.raises(Problem) as caught:
        fetch(text, network, resolving([PUBLIC]))
    assert caught.value.status == 400
    assert len(caught.value.message) < 250
    assert network.dialled == []


@pytest.mark.parametrize("ip", INTERNAL_IPS)
def test_an_allowed_name_that_leads_inside_is_not_dialled(ip):
    network = Network(picture())
    for answers in ([ip], [PUBLIC, ip], [ip, PUBLIC]):
        with pytest.raises(ImageError):
            fetch("http://images.example.org/a.png", network, resolving(answers))
    assert network.dialled == []


@pytest.mark.parametrize("name", LOCAL_NAMES)
def test_numbers_and_local_names_lead_inside_even_where_they_are_allowed(name):
    network = Network(picture())
    with pytest.raises((ImageError, Problem)):
        fetch(f"http://{name}/a.png", network, look_up, frozenset({name}))
    assert network.dialled == []


@pytest.mark.parametrize("ip", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(ip):
    assert is_public(ip)


def test_the_address_that_was_checked_is_the_one_that_is_dialled():
    """A name whose second look-up leads inside: there is no second look-up."""
    network = Network(picture())
    assert fetch("http://images.example.org/a.png?b=c", network, resolving([PUBLIC], ["127.0.0.1"])) == png()
    assert network.dialled == [PUBLIC]
    assert network.sent.startswith(b"GET /a.png?b=c HTTP/1.1\r\nHost: images.example.org\r\n")


def test_the_certificate_is_that_of_the_name():
    network = Network(picture())
    assert fetch("https://images.example.org/a.png", network, resolving([PUBLIC])) == png()
    assert (network.dialled, network.names) == ([PUBLIC], ["images.example.org"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["http://127.0.0.1/", "https://images.example.org/b.png", "file:///etc/passwd"])
def test_no_redirect_is_followed(status, to):
    network = Network(f"HTTP/1.1 {status} X\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())
    with pytest.raises(ImageError):
        fetch("http://images.example.org/a.png", network, resolving([PUBLIC]))
    assert network.dialled == [PUBLIC]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"no HTTP\r\n\r\n",
        b"",
    ],
    ids=["status", "type", "content", "encoding", "cut", "garbage", "nothing"],
)
def test_what_is_no_picture_is_not_taken(answer):
    with pytest.raises(ImageError):
        fetch("http://images.example.org/a.png", Network(answer), resolving([PUBLIC]))


def test_a_download_ends_at_its_limit(monkeypatch):
    monkeypatch.setattr(fetching, "MOST_BYTES", 1000)
    large = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    network = Network(large, *[b"200\r\n" + b"\0" * 512 + b"\r\n"] * 9)
    with pytest.raises(ImageError, match="more than 1,000 bytes"):
        fetch("http://images.example.org/a.png", network, resolving([PUBLIC]))


def test_a_name_that_never_resolves_is_given_up(monkeypatch):
    monkeypatch.setattr(fetching, "_ALL_SECONDS", 0.05)

    async def never(host, port):
        await asyncio.sleep(60)

    with pytest.raises(ImageError):
        fetch("http://images.example.org/a.png", Network(), never)


def test_all_failures_read_alike_so_that_nobody_maps_a_network_with_them():
    told = set()
    for network, resolve in ((Network(b""), resolving([PUBLIC])), (Network(), resolving(["10.0.0.1"]))):
        with pytest.raises(ImageError) as caught:
            fetch("http://images.example.org/a.png", network, resolve)
        told.add(str(caught.value))
    assert len(told) == 1


def test_the_environments_proxies_are_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    network = Network(picture())
    assert fetch("http://images.example.org/a.png", network, resolving([PUBLIC])) == png()


def test_an_allowed_picture_is_answered_about(make_server):
    network = Network(picture())
    fetcher = Fetcher(ALLOWED, resolving([PUBLIC]), network)
    with make_server(fetcher=fetcher) as running, running.client() as client:
        part = {"type": "image_url", "image_url": {"url": "https://images.example.org/a.png"}}
        assert ask(client, messages=question(part)).status_code == 200
        assert running.engine.requests[-1].prompt.image_sizes == ((100, 50),)
        other = {"type": "image_url", "image_url": {"url": "https://evil.org/a.png"}}
        assert ask(client, messages=question(other)).status_code == 400


def test_hosts_are_compared_in_small_letters():
    assert read_address("HTTPS://Images.Example.ORG/A.png", ALLOWED).host == "images.example.org"
