"""Asking an engine as callers do, from a thread of their own."""

import threading

from vl2_jax.api import open_answer
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.serving.requests import Failed, Finished, Piece, Request, Started


class Asked:
    """One request, and what comes back."""

    def __init__(self, engine, vl2, conversation, top_logprobs=0, salt="", on_event=None, **options):
        self.events = []
        self.ended = threading.Event()
        self._on_event = on_event
        prompt = vl2.processor.encode(open_answer(conversation))
        request = Request(prompt, SamplingOptions(**options), top_logprobs, salt)
        self.submission = engine.submit(request, self._listen)

    def _listen(self, event):
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()
        if self._on_event:
            self._on_event(event)

    def last(self, seconds=120):
        assert self.ended.wait(seconds), f"no end after {self.events[-1:]}"
        return self.events[-1]

    def answer(self, seconds=120):
        """The answer, after looking at how the events fit together."""
        last = self.last(seconds)
        if isinstance(last, Failed):
            raise last.error
        pieces = [event for event in self.events if isinstance(event, Piece)]
        assert "".join(piece.text for piece in pieces) == last.answer.text
        tokens = [token for piece in pieces for token in piece.tokens]
        assert [token.id for token in tokens] == last.answer.token_ids
        assert [token.logprob for token in tokens] == last.answer.logprobs
        assert not tokens or isinstance(self.events[0], Started)
        return last.answer

    @property
    def tokens(self):
        return [token for event in self.events if isinstance(event, Piece) for token in event.tokens]
