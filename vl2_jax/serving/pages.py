"""Pages of the cache: who has which, and which hold prompts that are known. On the host.

A page is free, or used by so many sequences, or used by none but known: it holds rows of a prompt that may come again,
and is given away last, the one first that was used longest ago. Page 0 is nobody's: what is written past the end of a
sequence goes there.

    sequence a   [ 3 ][ 7 ][ 4 ]        page 3 and 7 are of a beginning that both have
    sequence b   [ 3 ][ 7 ][ 9 ]
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.processing.batch import TEXT, Encoded
from vl2_jax.processing.tiling import FIRST_TOKEN_ROW

SCRATCH = 0


class PagePool:
    """Pages 1 to `count` - 1."""

    def __init__(self, count: int):
        self.count = count
        self._free = deque(range(1, count))
        self._users = [0] * count
        self._known: dict[bytes, int] = {}  # digest of a beginning -> the page that holds its end
        self._digest: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, used by nobody; the oldest first

    @property
    def used(self) -> int:
        return self.count - 1 - self.available

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones and those that are only known."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """So many pages for one sequence, or none at all where there are fewer."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._digest.pop(page)]
        self._users[page] = 1
        return page

    def known(self, digests: Sequence[bytes]) -> list[int]:
        """The pages that hold a beginning, as long as they are known, for one more sequence."""
        pages = []
        for digest in digests:
            page = self._known.get(digest)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def remember(self, page: int, digest: bytes) -> None:
        """A page is filled, with the end of this beginning. Where another page holds the same, that one is known."""
        if digest not in self._known and page not in self._digest:
            self._known[digest] = page
            self._digest[page] = digest

    def give_back(self, pages: Sequence[int]) -> None:
        """A sequence needs its pages no more. The last ones are forgotten first, as beginnings are shared more."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] < 0:
                raise ValueError(f"page {page} was given back more often than it was taken.")
            if not self._users[page]:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Nothing is known any more."""
        for page in self._idle:
            self._free.append(page)
        self._idle.clear()
        self._known.clear()
        self._digest.clear()


class Beginnings:
    """Digests of the beginnings of a sequence, one for each page that it fills.

    SHA-256 of the digest before and of all that the page's positions feed to the model: ids, and the pixels behind
    positions that show a picture. So equal digests mean equal rows of the cache, whoever asked.
    """

    def __init__(self, root: bytes, prompt: Encoded, tiles: Sequence[bytes]):
        """
        Args:
          root: of everything else that rows depend on, and of who may share them.
          tiles: digest of each tile of the prompt.
        """
        self._prompt, self._tiles = prompt, tiles
        self.digests: list[bytes] = []
        self._last = root

    def reach(self, ids: Sequence[int], pages: int) -> list[bytes]:
        """Digests of the first `pages` pages of a sequence whose ids these are, the answer's behind the prompt's."""
        while len(self.digests) < pages:
            begin = len(self.digests) * PAGE
            part = hashlib.sha256(self._last)
            part.update(np.asarray(ids[begin : begin + PAGE], np.int32).tobytes())
            index = self._prompt.visual_index[begin : begin + PAGE]
            shown = np.flatnonzero(index != TEXT)
            if len(shown):
                tile, token = np.divmod(index[shown] - FIRST_TOKEN_ROW, self._prompt.tokens_per_tile)
                part.update(shown.astype(np.int32).tobytes() + token.astype(np.int32).tobytes())
                part.update(b"".join(self._tiles[t] if t >= 0 else bytes(32) for t in tile))
            self._last = part.digest()
            self.digests.append(self._last)
        return self.digests[:pages]


def tile_digests(prompt: Encoded) -> list[bytes]:
    """SHA-256 of the pixels of each tile."""
    return [hashlib.sha256(np.ascontiguousarray(tile).data).digest() for tile in prompt.tiles]
