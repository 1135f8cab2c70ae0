"""The waiting line: bounded, fair between clients, and nobody is forgotten in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from siglance.engine.server.failures import Failure
from siglance.engine.server.line import Line


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await scene()

    asyncio.run(whole())


async def turns() -> None:
    """Let everybody do what can be done now."""
    for _ in range(10):
        await asyncio.sleep(0)


class Client:
    """Requests of one client: each notes when it is in, and stays until it is told to leave."""

    def __init__(self, line: Line, name: str, log: list[str]):
        self.line, self.name, self.log = line, name, log
        self.gone: list[asyncio.Future[None]] = []
        self.places: list[object] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, count: int = 1) -> None:
        for number in range(count):
            gone = asyncio.get_running_loop().create_future()
            self.gone.append(gone)
            self.tasks.append(asyncio.create_task(self._ask(len(self.tasks) if count == 1 else number, gone)))

    async def _ask(self, number: int, gone: asyncio.Future[None]) -> None:
        place = await self.line.enter(self.name, gone)
        self.log.append(f"{self.name}{number}")
        self.places.append(place)

    def failures(self) -> list[str]:
        errors = [task.exception() for task in self.tasks if task.done() and not task.cancelled()]
        return [error.kind for error in errors if isinstance(error, Failure)]


async def serve_all(line: Line, *clients: Client) -> None:
    """Let requests leave one after another until the line is empty."""
    while line.running:
        client = next(client for client in clients if client.places)
        line.leave(client.places.pop(0))
        await turns()


def test_first_come_first_served_for_one_client():
    async def scene() -> None:
        line, log = Line(1, 10), []
        one = Client(line, "a", log)
        one.ask(4)
        await turns()
        assert (line.running, line.waiting) == (1, 3)
        await serve_all(line, one)
        assert log == ["a0", "a1", "a2", "a3"]
        assert (line.running, line.waiting) == (0, 0)

    run(scene)


def test_clients_take_turns_however_much_each_asks():
    async def scene() -> None:
        line, log = Line(1, 10), []
        greedy, modest, late = (Client(line, name, log) for name in "abc")
        greedy.ask(5)
        await turns()
        modest.ask(2)
        late.ask(1)
        await turns()
        await serve_all(line, greedy, modest, late)
        assert log == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]

    run(scene)


def test_several_places():
    async def scene() -> None:
        line, log = Line(3, 10), []
        one = Client(line, "a", log)
        one.ask(5)
        await turns()
        assert (line.running, line.waiting, log) == (3, 2, ["a0", "a1", "a2"])
        await serve_all(line, one)
        assert len(log) == 5

    run(scene)


def test_a_full_line_refuses_and_says_when_to_come_back():
    async def scene() -> None:
        line, log = Line(1, 2), []
        one = Client(line, "a", log)
        one.ask(4)
        await turns()
        assert one.failures() == ["busy"]
        error = one.tasks[3].exception()
        assert isinstance(error, Failure)
        assert error.status == 429
        assert error.retry_after is not None
        assert 1 <= error.retry_after <= 60
        await serve_all(line, one)
        assert log == ["a0", "a1", "a2"]

    run(scene)


def test_nobody_waits_in_a_line_of_no_length():
    async def scene() -> None:
        line, log = Line(1, 0), []
        one, other = Client(line, "a", log), Client(line, "b", log)
        one.ask()
        await turns()
        other.ask()
        await turns()
        assert other.failures() == ["busy"]
        await serve_all(line, one)
        other.ask()
        await turns()
        assert log == ["a0", "b1"]
        await serve_all(line, other)

    run(scene)


def test_one_client_cannot_keep_the_others_out():
    async def scene() -> None:
        line, log = Line(1, 4), []
        greedy, modest = Client(line, "a", log), Client(line, "b", log)
        greedy.ask(5)
        await turns()
        modest.ask(3)
        await turns()
        assert greedy.failures() == ["busy", "busy"]  # its latest ones made room
        assert modest.failures() == ["busy"]  # both wait with two now
        await serve_all(line, greedy, modest)
        assert log == ["a0", "a1", "b0", "a2", "b1"]

    run(scene)


def test_a_client_that_leaves_is_out_of_the_line_at_once():
    async def scene() -> None:
        line, log = Line(1, 10), []
        one, other = Client(line, "a", log), Client(line, "b", log)
        one.ask(2)
        other.ask()
        await turns()
        one.gone[1].set_result(None)
        await turns()
        assert (line.waiting, one.failures()) == (1, ["gone"])
        await serve_all(line, one, other)
        assert log == ["a0", "b0"]

    run(scene)


def test_a_client_that_has_left_before_it_asks():
    async def scene() -> None:
        line, log = Line(1, 10), []
        one = Client(line, "a", log)
        one.ask(2)
        one.gone[1].set_result(None)
        await turns()
        assert (line.waiting, one.failures()) == (0, ["gone"])
        await serve_all(line, one)

    run(scene)


def test_a_place_is_not_lost_with_a_task_that_is_cancelled():
    async def scene() -> None:
        line, log = Line(1, 10), []
        one = Client(line, "a", log)
        one.ask(3)
        await turns()
        line.leave(one.places.pop())
        one.tasks[1].cancel()  # the place is its own by now, but it has not gone on yet
        await turns()
        assert log == ["a0", "a2"]
        one.ask()
        await turns()
        one.tasks[3].cancel()  # while it waits
        await turns()
        await serve_all(line, one)
        assert (line.running, line.waiting) == (0, 0)

    run(scene)


def test_a_closed_line_sends_everybody_away():
    async def scene() -> None:
        line, log = Line(1, 10), []
        one = Client(line, "a", log)
        one.ask(3)
        await turns()
        line.close()
        one.ask()
        await turns()
        assert one.failures() == ["unavailable"] * 3
        assert line.running == 1  # what runs goes on
        await serve_all(line, one)

    run(scene)


ACTS = st.lists(st.tuples(st.sampled_from(["ask", "leave", "go", "cancel"]), st.integers(0, 3)), max_size=60)


@given(ACTS, st.integers(1, 3), st.integers(0, 5))
def test_places_add_up_whatever_happens(acts, places, waiting):
    """Never more in or waiting than may be, and every request ends: in, refused, gone or cancelled."""

    async def scene() -> None:
        line, log = Line(places, waiting), []
        clients = [Client(line, name, log) for name in "abcd"]
        for index, (act, number) in enumerate(acts):
            client = clients[number]
            if act == "ask":
                client.ask()
            elif act == "leave" and client.places:
                line.leave(client.places.pop(0))
            elif act == "go" and client.gone:
                gone = client.gone[index % len(client.gone)]
                if not gone.done():
                    gone.set_result(None)
            elif act == "cancel" and client.tasks:
                client.tasks[index % len(client.tasks)].cancel()
            if index % 3:
                await turns()
            assert 0 <= line.running <= places
            assert line.waiting <= waiting
        await turns()
        assert line.running == sum(len(client.places) for client in clients)
        assert not line.waiting or line.running == places
        await serve_all(line, *clients)
        assert (line.running, line.waiting) == (0, 0)
        assert all(task.done() for client in clients for task in client.tasks)
        assert not line._clients
        assert not line._began
        for client in clients:
            client.failures()  # asked for, so that nobody calls them forgotten

    run(scene)


def test_the_line_asks_for_patience_as_long_as_requests_take():
    async def scene() -> None:
        line = Line(1, 1)
        line._seconds = 8.0
        one = Client(line, "a", [])
        one.ask(3)
        await turns()
        error = one.tasks[2].exception()
        assert isinstance(error, Failure)
        assert error.retry_after == 16
        await serve_all(line, one)

    run(scene)
