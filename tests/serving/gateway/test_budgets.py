"""What all requests together may hold: decoded pictures, and bytes as they came; and what happens where memory ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import tracemalloc
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
import torch
from PIL import Image

from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.gateway import batcher
from foveate.serving.gateway.limits import Budget, Limits
from foveate.serving.pictures import CLEAR, DEEP, PLAIN, Unopened, decoded, from_data_url, measured
from foveate.serving.scaling import scaled
from tests.serving_fakes import FakeEngine, data_url, metric, shown, wait_for

from .asked import ASKED, MESSAGE, body, picture, post, said, started
from .processors import KINDS, loaded


def turns(budget: Budget, *sizes: int) -> tuple[list[int], int]:
    """In which order parts are had that each hold for a while, and how much is taken at most."""
    order: list[int] = []
    most = 0

    async def hold(size: int) -> None:
        nonlocal most
        async with budget.part(size):
            order.append(size)
            most = max(most, budget.taken)
            await asyncio.sleep(0.01)

    async def all_() -> None:
        await asyncio.gather(*map(hold, sizes))

    asyncio.run(all_())
    return order, most


def test_a_budget_is_kept() -> None:
    budget = Budget(100)
    assert turns(budget, *[30] * 10) == ([30] * 10, 90)
    assert turns(budget, 60, 61, 5, 30) == ([60, 61, 5, 30], 96)  # who comes first gets it first
    assert turns(budget, 10, 500, 20) == ([10, 500, 20], 100)  # what is too large has all of it, alone
    assert budget.taken == 0


def test_a_budget_survives_who_leaves() -> None:
    async def run() -> int:
        budget = Budget(100)

        async def hold(size: int) -> None:
            async with budget.part(size):
                await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(hold(size)) for size in (80, 90, 20, 100, 10)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()  # while it waits
        tasks[0].cancel()  # while it holds
        await asyncio.wait(tasks, timeout=5)
        assert all(task.done() for task in tasks)
        return budget.taken

    assert asyncio.run(run()) == 0


class Watched:
    """``decoded``, which counts the bytes of pictures that are being opened at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.most, self.opened, self.budgets = 0, 0, []
        monkeypatch.setattr(batcher, "decoded", self.decode)
        own = Budget.part

        def part(budget: Budget, size: int) -> Any:
            self.budgets.append(budget)
            return own(budget, size)

        monkeypatch.setattr(Budget, "part", part)

    def decode(self, picture: Unopened) -> Image.Image:
        self.opened += 1
        self.most = max(self.most, self.budgets[0].taken)
        assert self.budgets[0].taken >= min(picture.bytes, self.budgets[0].size)
        return decoded(picture)


@pytest.mark.parametrize("kind", ["pocket", "llava_onevision"])
def test_decoded_pictures_stay_within_a_budget(encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where the processor only scales them, those that are being opened; else those of all batches."""
    used = encoder if kind == "pocket" else PictureEncoder(loaded(kind))
    size, words = (400, 300), ASKED if kind == "pocket" else "w40"
    limits = Limits(decoded=5 * PLAIN * 400 * 300)
    watched = Watched(monkeypatch, limits.decoded)

    def ask(number: int) -> int:
        content = [*(shown(data_url(picture(4 * number + i, size))) for i in range(4)), said(words)]
        sent = {"messages": [{"role": "user", "content": content}], "foveate": {"method": "full"}}
        return post(url, sent).status_code

    with started(FakeEngine(), used, limits=limits) as url, concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert [*pool.map(ask, range(6))] == [200] * 6
        assert metric(url, "foveate_opened_bytes") == 0
    assert watched.opened == 24
    assert 0 < watched.most <= limits.decoded


def test_pictures_are_opened_only_when_their_turn_comes(encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(batcher, "decoded", lambda each: opened.append(each.where) or decoded(each))
    gate, own = concurrent.futures.Future(), encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *given: gate.result(30) and own(*given))
    with started(FakeEngine(), encoder, batch=1) as url, concurrent.futures.ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(post, url, body(number)) for number in range(5)]
        wait_for(lambda: metric(url, "foveate_encoder_queue") == 4)
        assert len(opened) == 1
        gate.set_result(True)
        assert [each.result().status_code for each in asked] == [200] * 5


@pytest.mark.parametrize("kind", ["pocket", *KINDS])
def test_scaling_first_changes_no_bit(encoder: PictureEncoder, kind: str) -> None:
    used = encoder if kind == "pocket" else PictureEncoder(loaded(kind))
    assert used.scales_first == (kind in ("pocket", "llava", "vipllava"))
    if not used.scales_first:
        return
    for size in ((1201, 799), (333, 2000), (250, 250), (90, 60), (150, 1000)):
        large = picture(3, size)
        small = scaled(used.loaded.processor, large)
        assert small.width * small.height <= large.width * large.height
        both = [
            used.encode([[{"role": "user", "content": [{"type": "image", "image": image}, said("a")]}]], method_of("full"))[0]
            for image in (large, small)
        ]
        assert torch.equal(both[0].embeds[0], both[1].embeds[0])


def test_a_large_picture_is_what_the_whole_model_sees(engine: FakeEngine, encoder: PictureEncoder) -> None:
    with started(engine, encoder) as url:
        saved = picture(1).resize((1500, 1100))
        answer = post(url, {"messages": [{"role": "user", "content": [shown(data_url(saved)), said(ASKED)]}]}).json()
    made = encoder.encode([[{"role": "user", "content": [{"type": "image", "image": saved}, said(ASKED)]}]], method_of("prumerge+"))
    total = f"{float(made[0].embeds[0].double().abs().sum()):.2f}"
    assert answer["choices"][0]["message"]["content"].split()[0] == f"[{made[0].after[0]}x192:{total}]"


def test_what_a_picture_takes_is_known_before_it_is_opened() -> None:
    for mode, cost in (("RGB", PLAIN), ("L", PLAIN), ("RGBA", CLEAR), ("LA", CLEAR), ("I;16", DEEP)):
        saved = io.BytesIO()
        Image.new(mode, (40, 30)).save(saved, "PNG")
        assert measured(saved.getvalue(), "a", Limits(), None, False).bytes == 1200 * cost


ENDS = {
    "plain": MemoryError(),
    "of torch": RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    "of a GPU": torch.OutOfMemoryError("CUDA out of memory."),
}


@pytest.mark.parametrize("error", ENDS)
@pytest.mark.parametrize("place", ["pictures.as_rgb", "encoding.collate", "gateway.batcher.scaled"])
def test_a_lack_of_memory_is_not_the_clients_fault(
    engine: FakeEngine, encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch, place: str, error: str
) -> None:
    def failing(*_: Any) -> Any:
        raise ENDS[error]

    with started(engine, encoder) as url:
        with monkeypatch.context() as patched:
            patched.setattr(f"foveate.serving.{place}", failing)
            answer = post(url, body(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), answer.text
        assert post(url, body(1)).status_code == 200


def test_requests_hold_a_bounded_number_of_bytes(engine: FakeEngine, encoder: PictureEncoder) -> None:
    engine.pause = 2.0
    long = {"messages": [{**MESSAGE, "content": "a" * 60_000}]}
    with started(engine, encoder, limits=Limits(held=150_000)) as url, concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda _: post(url, long), range(4))]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503]
        engine.pause = 0
        assert post(url, long).status_code == 200
        assert metric(url, "foveate_held_bytes") == 0
        assert post(url, body(1)).status_code == 503  # its embeddings are more than may be held


def test_escapes_of_a_data_url_take_no_more_than_they_are() -> None:
    """Also where they are cut into pieces: none is lost, and those that are none stay as they are."""
    for begin in range(3):
        text = "a" * begin + "%41%zz%4é%" * 20_000
        assert from_data_url(f"data:image/png,{text}", "a") == unquote_to_bytes(text)
    url = f"data:image/png,{'%41' * 1_000_000}"
    tracemalloc.start()
    assert from_data_url(url, "a") == b"A" * 1_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
