"""A small file whose picture a processor would scale to gigabytes: refused by the head of the file, alone and among others."""

from __future__ import annotations

import tracemalloc

import pytest
from PIL import Image

from foveate.serving import pictures
from tests.serving_fakes import FakeEngine, data_url, shown

from .asked import body, post, said


@pytest.mark.parametrize("size", [(4, 40_000), (40_000, 4), (4, 6_000_000)])
def test_long_and_thin_pictures(engine: FakeEngine, gateway: str, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    monkeypatch.setattr(pictures, "as_rgb", lambda _: pytest.fail("nothing is to be decoded"))
    thin = shown(data_url(Image.new("L", size)))
    for parts in ([thin], [thin] * 8):
        tracemalloc.start()
        answer = post(gateway, {"model": "pocket", "messages": [{"role": "user", "content": [*parts, said("what is it ?")]}]})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert answer.status_code == 400
        assert f"picture 1 is {size[0]} x {size[1]} pixels, and the processor of this model would make" in answer.text
        assert peak < 100 * 2**20
    monkeypatch.undo()
    assert post(gateway, body(1)).status_code == 200
