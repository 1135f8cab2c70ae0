"""A bounded waiting line that is fair between clients."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from time import perf_counter

from .failures import Failure
from .failures import gone as left

__all__ = ["Line"]

_LONGEST_RETRY = 60  # seconds


class Line:
    """Lets `places` requests in at once and `waiting` more wait. Belongs to one event loop.

    Clients take turns, however many requests each has waiting. When the line is full, a client that waits with more
    requests than the newcomer loses its latest.
    """

    def __init__(self, places: int, waiting: int):
        self._free = places
        self._places = places
        self._most = waiting
        self._clients: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
        self._began: dict[object, float] = {}
        self._seconds = 1.0  # that one request takes, lately
        self._closed = False

    @property
    def running(self) -> int:
        """Requests that are in."""
        return self._places - self._free

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(line) for line in self._clients.values())

    async def enter(self, client: Hashable, gone: asyncio.Future[None]) -> object:
        """Wait for a place; `leave` takes what this returns.

        Raises Failure: "busy" if the line is full, "unavailable" if it is closed, "gone" when `gone` is done first.
        """
        if self._closed:
            raise _closing()
        if self._free:
            self._free -= 1
            return self._begin()
        if self.waiting >= self._most:
            self._make_room(client)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clients.setdefault(client, deque()).append(turn)

        def give_up(gone: asyncio.Future[None]) -> None:
            if not turn.done():
                turn.set_exception(left())

        gone.add_done_callback(give_up)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()  # the place came with the cancellation
            raise
        finally:
            gone.remove_done_callback(give_up)
            self._forget(client, turn)
        return self._begin()

    def leave(self, place: object) -> None:
        """Give a place back."""
        seconds = perf_counter() - self._began.pop(place)
        self._seconds += 0.1 * (seconds - self._seconds)
        self._pass_on()

    def close(self) -> None:
        """Let nobody in any more, and send away who waits."""
        self._closed = True
        for line in self._clients.values():
            for turn in line:
                if not turn.done():
                    turn.set_exception(_closing())

    def _begin(self) -> object:
        place = object()
        self._began[place] = perf_counter()
        return place

    def _pass_on(self) -> None:
        """A place is free: the first request of the client whose turn it is gets it."""
        while self._clients:
            client, line = self._clients.popitem(last=False)
            turn = line.popleft()
            if line:
                self._clients[client] = line  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, client: Hashable, turn: asyncio.Future[None]) -> None:
        line = self._clients.get(client)
        if line is not None and turn in line:
            line.remove(turn)
            if not line:
                del self._clients[client]

    def _make_room(self, client: Hashable) -> None:
        longest = max(self._clients.values(), key=len, default=deque())
        if len(longest) > len(self._clients.get(client, ())) + 1:
            turn = longest.pop()
            if not turn.done():
                turn.set_exception(self._full())
            return
        raise self._full()

    def _full(self) -> Failure:
        seconds = self._seconds * (self.waiting + 1) / self._places
        return Failure(
            429,
            f"the server is busy: {self._most} requests wait already",
            kind="busy",
            retry_after=max(1, min(_LONGEST_RETRY, round(seconds))),
        )


def _closing() -> Failure:
    return Failure(503, "the server is shutting down", kind="unavailable", retry_after=5)
