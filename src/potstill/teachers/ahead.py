"""Send requests from a thread, some of them before their replies are needed."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

REPLIES_AHEAD = 2
"""Replies that are requested, or received, before they are taken."""
MOST_ANNOUNCED = 256


@dataclass
class _Request:
    body: bytes
    reply: Future[bytes] = field(default_factory=Future)
    is_sent: bool = False


class RequestsAhead:
    """Send requests with ``post``, in order, from one thread.

    One at a time: a server does not combine two batches of one client, so that its states are bit
    for bit those of a local teacher. Call `announce` and `take` from one thread.
    """

    def __init__(self, post: Callable[[bytes], bytes]) -> None:
        self._sent: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._announced: deque[_Request] = deque(maxlen=MOST_ANNOUNCED)
        # A daemon: an interrupted run does not wait for the reply.
        threading.Thread(target=_send_all, args=(post, self._sent), daemon=True).start()
        weakref.finalize(self, self._sent.put, None)

    def announce(self, body: bytes) -> None:
        """Send a request that will be taken, as soon as fewer than `REPLIES_AHEAD` wait."""
        self._announced.append(_Request(body))
        self._send_next()

    def take(self, body: bytes) -> bytes:
        """Return the reply to ``body``. Drops what was announced before it and not taken."""
        taken = _Request(body)
        if any(one.body == body for one in self._announced):
            while (taken := self._announced.popleft()).body != body:
                taken.reply.cancel()
        self._send(taken)
        self._send_next()
        return taken.reply.result()

    def _send_next(self) -> None:
        for one in list(self._announced)[:REPLIES_AHEAD]:
            self._send(one)

    def _send(self, one: _Request) -> None:
        if not one.is_sent:
            one.is_sent = True
            self._sent.put(one)


def _send_all(post: Callable[[bytes], bytes], sent: queue.SimpleQueue[_Request | None]) -> None:
    while (one := sent.get()) is not None:
        if one.reply.set_running_or_notify_cancel():
            try:
                one.reply.set_result(post(one.body))
            except BaseException as error:  # raised again where the reply is taken
                one.reply.set_exception(error)
