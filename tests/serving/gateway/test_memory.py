"""What is remembered of a picture is what it would be encoded to anew: for every family, alone and with others, in every order."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest

from foveate.families import FAMILIES
from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.gateway.memory import Memory
from foveate.serving.scaling import encodes_apart
from foveate.serving.template import PLACEHOLDER, chat_template
from tests.serving_fakes import FakeEngine, data_url, metric, shown

from .asked import picture, post, said, started
from .processors import KINDS, loaded, processor

PICTURES = [picture(1, (150, 90)), picture(2, (80, 170)), picture(3, (200, 190))]
ASKED = [(0,), (1,), (0, 1), (1, 0), (0, 0), (2, 1, 0), (0, 1, 2)]


def test_every_family_that_is_served_is_here() -> None:
    # which are for batches only: a picture is no single span
    told = {"mistral3", "idefics3", "smolvlm", "aya_vision", "cohere2_vision", "lfm2_vl", "llama4"}
    served = {kind for kind, family in FAMILIES.items() if not (family.mrope or family.two_way or family.marks)} - told
    assert served <= {*KINDS}


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest) -> PictureEncoder:
    return PictureEncoder(loaded(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_a_chat_template_with_embeddings(kind: str) -> None:
    assert PLACEHOLDER in chat_template(processor(kind))


def anew(encoder: PictureEncoder, method: str, budget: Any, row: Sequence[int]) -> list[tuple[int, float]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": PICTURES[number]} for number in row]
    (found,) = encoder.encode([[{"role": "user", "content": [*content, said("w40")]}]], method_of(method, budget))
    return [(len(each), float(each.double().abs().sum())) for each in found.embeds]


@pytest.mark.parametrize(("method", "budget"), [("full", None), ("divprune", 7)])
def test_a_picture_is_what_it_would_be_anew(encoder: PictureEncoder, method: str, budget: Any) -> None:
    expected = {row: anew(encoder, method, budget, row) for row in ASKED}
    with started(FakeEngine(), encoder) as url:
        for row in [*ASKED, *reversed(ASKED)]:
            content = [*(shown(data_url(PICTURES[number])) for number in row), said("w40")]
            sent = {"messages": [{"role": "user", "content": content}], "foveate": {"method": method, "budget": budget}}
            answer = post(url, sent)
            assert answer.status_code == 200, answer.text
            words = re.findall(r"\[(\d+)x\d+:([\d.]+)\]", answer.json()["choices"][0]["message"]["content"])
            for (count, total), (number, sum_) in itertools.zip_longest(words, expected[row]):
                assert int(count) == number, row
                assert float(total) == pytest.approx(sum_, rel=1e-4), row
        assert metric(url, "foveate_pictures_remembered_total") > 0


def test_pictures_that_others_change_are_known_as_they_came() -> None:
    assert not encodes_apart(loaded("llava_onevision"))
    method, (a, b) = method_of("full"), (b"a", b"b")
    apart, together = Memory(100), Memory(100, apart=False)
    assert apart.keys([a], method) == apart.keys([a, b], method)[:1] == apart.keys([b, a], method)[1:]
    rows = ([a], [b], [a, b], [b, a], [a, a], [a, b, a])
    keys = [key for row in rows for key in together.keys(row, method)]
    assert len({*keys}) == len(keys)
    assert together.keys([a, b], method) == together.keys([a, b], method)


def test_no_picture_is_known_as_a_video() -> None:
    """Its contents are any bytes, also those by which a video is known, which need no more than a digest of that."""
    memory, method = Memory(100), method_of("full")
    film = b"a film that others sent"
    written = "\0".join(["'file'", "16", hashlib.sha256(film).hexdigest()]).encode()
    assert memory.keys([("file", 16, film)], method) != memory.keys([written], method)
    known = [("file", 16, film), ("file", 8, film), ("frames", 2.0, film), ("frames", 4.0, film), ("frames", 2.0, film, film), film]
    assert len({key for each in known for key in memory.keys([each], method)}) == len(known)
