"""A client that keeps a fixed number of requests under way, and what it saw."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

PATIENCE = 300.0  # seconds of one request


@dataclass
class Seen:
    """One request: seconds to its first and its last token, tokens as the server counts them, and what went wrong."""

    first: float = 0.0
    last: float = 0.0
    prompt: int = 0
    written: int = 0
    error: str | None = None


@dataclass
class Load:
    """What a server did under a load.

    Attributes
    ----------
    seconds : from the first request to the last answer.
    computed : seconds of cores that its processes took, by what they are.
    hits : share of prompt tokens that the prefix cache had.
    """

    seconds: float
    seen: list[Seen] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)
    hits: float = 0.0

    @property
    def good(self) -> list[Seen]:
        return [each for each in self.seen if each.error is None]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.good) / self.seconds

    def figures(self) -> dict[str, Any]:
        """Of one round."""
        good = self.good
        if not good:
            return {"requests_per_s": 0.0, "errors": [each.error for each in self.seen]}
        first = sorted(each.first for each in good)
        return {
            "requests_per_s": self.rate,
            "ttft_median_s": statistics.median(first),
            "ttft_p90_s": first[-(-9 * len(first) // 10) - 1],
            "token_s": statistics.median((each.last - each.first) / max(each.written - 1, 1) for each in good),
            "core_s": {title: seconds / len(good) for title, seconds in self.computed.items() if title},
            "prefix_hits": self.hits,
            "prompt_tokens": sorted({each.prompt for each in good}),
            "answer_tokens": sorted({each.written for each in good}),
            "errors": [each.error for each in self.seen if each.error is not None],
        }


async def ask(client: httpx.AsyncClient, url: str, body: bytes) -> Seen:
    """Send one request and read its stream."""
    seen, begin = Seen(), time.perf_counter()
    try:
        async with client.stream("POST", url, content=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.status_code != 200:
                seen.error = f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:200]}"
                return seen
            done = False
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    note(seen, json.loads(line.removeprefix("data: ")), time.perf_counter() - begin)
            if not done:
                seen.error = seen.error or "the stream ended early"
    except httpx.HTTPError as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


def note(seen: Seen, event: dict[str, Any], now: float) -> None:
    """Take over what one event of a stream tells."""
    if "error" in event:
        seen.error = str(event["error"])[:200]
    if any(choice["delta"].get("content") for choice in event.get("choices", ())):
        seen.first, seen.last = seen.first or now, now
    if event.get("usage"):
        seen.prompt, seen.written = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]


async def _load(url: str, bodies: Sequence[bytes], concurrency: int) -> Load:
    waiting = iter(bodies)
    seen: list[Seen] = []
    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=concurrency)) as client:

        async def work() -> None:
            for body in waiting:
                seen.append(await ask(client, f"{url}/v1/chat/completions", body))

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return Load(time.perf_counter() - begin, seen)


def load(url: str, bodies: Sequence[bytes], concurrency: int) -> Load:
    """Send requests, ``concurrency`` of them at any time while there are as many left."""
    return asyncio.run(_load(url, bodies, concurrency))
