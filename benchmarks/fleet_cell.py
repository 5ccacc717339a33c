"""A few encoders and engines that answer requests, simulated step by step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any

import numpy as np
import simpy

from foveate.errors import InputError

SIMULATED, LEFT_OUT = 3000, 300  # requests of an open load, and the first of them, which find an empty service
Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Times:
    """Service times, in seconds, and limits of an engine.

    Attributes
    ----------
    encode : of a picture. An encoder takes all that wait as one batch, which takes as long as its pictures one by one.
    other : of a request on its way, on average: client, gateway, and what else keeps neither encoder nor engine busy. Requests
        that are sent together come one after the other, so it is drawn for each (exponential).
    step : of a step of the engine with nothing in it.
    prompt : what each token of a prompt adds to a step.
    written : what each answer that runs adds to a step.
    batched : tokens of a step, at most.
    running : requests of an engine that run at a time, at most.
    pictures : of a batch of an encoder, at most.
    """

    encode: float
    other: float
    step: float
    prompt: float
    written: float
    batched: int = 4096
    running: int = 16
    pictures: int = 16

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise InputError(f"{each.name} is {value!r}; expected a number of 0 or more")
        if min(self.batched, self.running, self.pictures) < 1 or self.step + self.prompt <= 0:
            raise InputError(
                "an engine needs steps that take time, and there must be room for one token, one request and one picture"
            )


@dataclass(eq=False)
class Request:
    """One request: tokens that are to be read and written, and what tells of its first and its last one."""

    unread: int
    unwritten: int
    first: simpy.Event
    done: simpy.Event


@dataclass
class Engine:
    """Continuous batching with prompts in pieces."""

    env: simpy.Environment
    times: Times
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    came: simpy.Event | None = None

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        if self.came is not None and not self.came.triggered:
            self.came.succeed()

    def work(self) -> Process:
        """Steps without end."""
        while True:
            if not self.waiting and not self.running:
                self.came = self.env.event()
                yield self.came
            while self.waiting and len(self.running) < self.times.running:
                self.running.append(self.waiting.popleft())
            writing = [request for request in self.running if not request.unread]
            room, read = self.times.batched - len(writing), 0
            whole = []
            for request in self.running:
                if piece := min(request.unread, room - read):
                    request.unread -= piece
                    read += piece
                    if not request.unread:  # its last piece gives the first token
                        whole.append(request)
            yield self.env.timeout(self.times.step + self.times.prompt * read + self.times.written * len(writing))
            for request in (*writing, *whole):
                request.unwritten -= 1
                if not request.first.triggered:
                    request.first.succeed()
                if request.unwritten <= 0:
                    request.done.succeed()
            self.running = [request for request in self.running if request.unwritten > 0]


class Cell:
    """Some encoders and engines.

    Parameters
    ----------
    times : of all of them.
    encoders, engines : how many.
    tokens : of a prompt.
    answer : tokens of an answer.
    seed : of what is random.
    """

    def __init__(self, times: Times, encoders: int, engines: int, tokens: int, answer: int, seed: int = 0) -> None:
        self.random = Random(seed)
        self.env, self.times, self.tokens, self.answer = simpy.Environment(), times, tokens, answer
        self.pictures = simpy.Store(self.env)
        for _ in range(encoders):
            self.env.process(self.encode())
        self.engines = [Engine(self.env, times) for _ in range(engines)]
        for engine in self.engines:
            self.env.process(engine.work())
        self.firsts: list[float] = []
        self.ends: list[float] = []

    def encode(self) -> Process:
        """Batches of pictures without end; those of a batch are done together."""
        while True:
            batch = [(yield self.pictures.get())]
            while self.pictures.items and len(batch) < self.times.pictures:
                batch.append((yield self.pictures.get()))
            yield self.env.timeout(self.times.encode * len(batch))
            for picture in batch:
                picture.succeed()

    def serve(self) -> Process:
        """One request, from its picture to the end of its answer."""
        came = self.env.now
        yield self.env.timeout(self.random.expovariate(1 / self.times.other) if self.times.other else 0)
        encoded = self.env.event()
        self.pictures.put(encoded)
        yield encoded
        request = Request(self.tokens, self.answer, self.env.event(), self.env.event())
        min(self.engines, key=lambda engine: len(engine.waiting) + len(engine.running)).add(request)
        yield request.first
        self.firsts.append(self.env.now - came)
        yield request.done
        self.ends.append(self.env.now)

    def closed(self, at_once: int, number: int) -> tuple[float, float]:
        """Requests per second, and the median seconds to the first token, where ``at_once`` clients ask one after the other."""
        left = [number]

        def client() -> Process:
            while left[0]:
                left[0] -= 1
                yield self.env.process(self.serve())

        clients = [self.env.process(client()) for _ in range(at_once)]
        self.env.run(simpy.AllOf(self.env, clients))
        return number / max(self.ends), float(np.median(self.firsts))

    def open(self, rate: float) -> tuple[float, float]:
        """Seconds to the first token, of half and of 95 % of the requests, where ``rate`` of them come each second at random."""

        def arrivals() -> Process:
            for _ in range(SIMULATED):
                yield self.env.timeout(self.random.expovariate(rate))
                self.env.process(self.serve())

        self.env.process(arrivals())
        patience = 20 * SIMULATED / rate  # where so many are late, the rest does not matter
        while len(self.firsts) < SIMULATED and self.env.peek() < patience:
            self.env.step()
        seen = self.firsts[LEFT_OUT:] + [math.inf] * (SIMULATED - len(self.firsts))
        half, most = np.quantile(seen, (0.5, 0.95), method="inverted_cdf")
        return float(half), float(most)
