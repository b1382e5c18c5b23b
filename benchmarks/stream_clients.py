"""Many clients of event streams in a process of their own, which also sends the requests whose way to them it measures.

`python -m benchmarks.stream_clients PORT` reads what to do as JSON from its input, says `ready` once every client has
its first frame, and ends with its measurements as JSON. Its clients look at bytes, so that they cost little themselves.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

import httpx2
import msgspec

READY_SECONDS = 120.0
SETTLE_SECONDS = 2.0
"""Until what is on its way has arrived: the rest of the histories, the frames of the last requests."""
FRAME = b"\ndata: {"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients do."""

    trained: str
    """The job whose steps arrive meanwhile."""
    trained_clients: int
    others: tuple[str, ...]
    """Paused jobs; requests resume and pause them in turn."""
    other_clients: int
    """Of all of them together."""
    requests_per_second: float
    seconds: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients saw; times in seconds."""

    answers: list[float]
    """From each request to its own answer."""
    arrivals: list[float]
    """From each request to its frame at each client of that job."""
    expected: int
    """Arrivals that there should be."""
    step_frames: int
    """Frames that the clients of the trained job received in all."""
    step_spread: list[float]
    """Of each burst of steps: from the first client that has it to the last."""
    ended_early: int
    """Streams that the server ended."""


class Client(asyncio.Protocol):
    """One event stream."""

    def __init__(self, job_id: str, crowd: Crowd) -> None:
        self._job_id = job_id
        self._crowd = crowd

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        path = f"/v1/fine_tuning/jobs/{self._job_id}/events?stream=true"
        transport.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        if count := data.count(FRAME):
            self._crowd.take(self._job_id, self, count)

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.ended += 1


class Crowd:
    """All clients, and what they have seen."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.ended = 0
        self._waiting: set[Client] = set()
        self.all_there = asyncio.Event()
        self._sent: dict[str, float] = {}
        self.arrivals: list[float] = []
        self.step_frames = 0
        self._bursts: list[list[float]] = []

    def connect(self, job_id: str) -> Client:
        """Return a new client, which is waited for."""
        client = Client(job_id, self)
        self._waiting.add(client)
        return client

    def take(self, job_id: str, client: Client, count: int) -> None:
        """Note that frames have come."""
        now = time.perf_counter()
        if client in self._waiting:
            self._waiting.discard(client)
            if not self._waiting:
                self.all_there.set()
        if job_id == self.load.trained:
            self.step_frames += count
            if not self._bursts or now - self._bursts[-1][0] > 0.5:
                self._bursts.append([now, now])
            self._bursts[-1][1] = now
        elif job_id in self._sent:
            self.arrivals.append(now - self._sent[job_id])

    async def request(self, port: int) -> list[float]:
        """Send the requests at their pace, whether or not the former are answered; return how long each took."""
        load = self.load
        answers: list[float] = []

        async def send(http: httpx2.AsyncClient, job_id: str, what: str) -> None:
            self._sent[job_id] = begin = time.perf_counter()
            answer = await http.post(f"/v1/fine_tuning/jobs/{job_id}/{what}")
            answer.raise_for_status()
            answers.append(time.perf_counter() - begin)

        async with (
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
            asyncio.TaskGroup() as tasks,
        ):
            await http.get("/health")  # opens what the first request would open
            began = time.perf_counter()
            self._bursts.clear()
            self.step_frames = 0
            for number in range(int(load.seconds * load.requests_per_second)):
                await asyncio.sleep(max(0.0, began + number / load.requests_per_second - time.perf_counter()))
                turn, index = divmod(number, len(load.others))
                tasks.create_task(send(http, load.others[index], "pause" if turn % 2 else "resume"))
        return answers

    def measured(self, answers: list[float]) -> Measured:
        """Return what was seen."""
        return Measured(
            answers=answers,
            arrivals=self.arrivals,
            expected=len(answers) * self.load.other_clients // len(self.load.others),
            step_frames=self.step_frames,
            step_spread=[last - first for first, last in self._bursts],
            ended_early=self.ended,
        )


async def run(port: int, load: Load) -> Measured:
    """Connect, wait for everybody, send the requests, and wait until their frames are there."""
    crowd = Crowd(load)
    loop = asyncio.get_running_loop()
    jobs = [load.trained] * load.trained_clients
    jobs += [load.others[number % len(load.others)] for number in range(load.other_clients)]
    async with asyncio.timeout(READY_SECONDS):
        for job_id in jobs:
            await loop.create_connection(lambda job_id=job_id: crowd.connect(job_id), "127.0.0.1", port)
        await crowd.all_there.wait()
    await asyncio.sleep(SETTLE_SECONDS)
    print("ready", flush=True)
    answers = await crowd.request(port)
    await asyncio.sleep(SETTLE_SECONDS)
    return crowd.measured(answers)


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return median, 99th percentile and worst, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return 1000 * cuts[49], 1000 * cuts[98], 1000 * max(seconds)


def main() -> None:
    """Do what the input says."""
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)
    measured = asyncio.run(run(int(sys.argv[1]), load))
    sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")


if __name__ == "__main__":
    main()
