"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("foveate_requests", "Requests that ended, by status of HTTP.", ["status"], registry=registry)
        self.running = Gauge("foveate_requests_running", "Requests that are being worked on or wait.", registry=registry)
        self.queue = Gauge("foveate_encoder_queue", "Requests whose pictures no encoder has begun.", registry=registry)
        self.held = Gauge("foveate_held_bytes", "Bodies, loaded pictures and embeddings of all requests.", registry=registry)
        self.opened = Gauge("foveate_opened_bytes", "Part of the budget of opened pictures that is taken.", registry=registry)
        self.engine = Gauge("foveate_engine_up", "Whether the engine answered when last asked.", registry=registry)
        self.pictures = Counter("foveate_pictures", "Pictures that were sent.", ["method"], registry=registry)
        self.remembered = Counter("foveate_pictures_remembered", "Of these, those that were not encoded again.", registry=registry)
        self.before = Counter("foveate_visual_tokens_before", "Visual tokens without reduction.", ["method"], registry=registry)
        self.after = Counter("foveate_visual_tokens", "Visual tokens that were sent.", ["method"], registry=registry)
        self.prompt = Counter("foveate_prompt_tokens", "Tokens of prompts, as the engine counts them.", registry=registry)
        self.written = Counter("foveate_completion_tokens", "Tokens of answers, as the engine counts them.", registry=registry)
        self.mismatches = Counter(
            "foveate_prompt_mismatches", "Prompts whose length is another in the engine than here.", registry=registry
        )
        self.batch = Histogram("foveate_encoder_batch", "Pictures per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.waited = Histogram("foveate_encoder_wait_seconds", "Until an encoder begins.", buckets=_SECONDS, registry=registry)
        self.encoded = Histogram("foveate_encoder_seconds", "Encoding of a batch.", buckets=_SECONDS, registry=registry)
        self.first = Histogram("foveate_first_token_seconds", "Until a stream begins.", buckets=_SECONDS, registry=registry)
        self.whole = Histogram("foveate_request_seconds", "Until an answer is complete.", buckets=_SECONDS, registry=registry)

    def observe_batch(self, pictures: int, seconds: float, waited: Sequence[float]) -> None:
        """Note a batch of an encoder."""
        self.batch.observe(pictures)
        self.encoded.observe(seconds)
        for each in waited:
            self.waited.observe(each)

    def observe_reduction(self, method: str, before: Sequence[int], after: Sequence[int]) -> None:
        """Note the visual tokens of the pictures of a request."""
        self.pictures.labels(method).inc(len(after))
        self.before.labels(method).inc(sum(before))
        self.after.labels(method).inc(sum(after))
