"""How examples come to a tuning: in what order, how many, and what is asked of the model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.lab.own import drawn_examples, read_examples
from foveate.lab.prompts import Prompts
from foveate.lab.scoring import score_of
from foveate.loading import load
from foveate.tuning.answers import AnswerBook
from foveate.tuning.bounds import Losses, fewest
from foveate.tuning.run import ordered
from foveate.tuning.tune import Tuner

PICTURE, CLIP = (True, False), (False, True)


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


def test_either_part_has_pictures_and_clips():
    """The order is random whatever the kind: what is tested is like what was searched on."""
    items = [SimpleNamespace(group=f"{number // 2}", shape=PICTURE if number < 30 else CLIP) for number in range(60)]
    for seed in range(20):
        found = ordered(items, seed)
        half = [item.shape for item in found[:30]]
        assert 5 <= half.count(CLIP) <= 25
        places: dict[str, list[int]] = {}
        for place, item in enumerate(found):
            places.setdefault(item.group, []).append(place)
        assert all(numbers == [*range(numbers[0], numbers[0] + len(numbers))] for numbers in places.values())
    assert [item.group for item in ordered(items, 1)] != [item.group for item in ordered(items, 2)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prompts_of_one_shape_run_together(chunk):
    random = np.random.default_rng(0)
    shapes = [PICTURE if each else CLIP for each in random.random(100) < 0.7]
    parts = Prompts(None, shapes, lambda _: None, chunk).parts  # type: ignore[arg-type, return-value]
    assert sorted(number for part in parts for number in part) == [*range(100)]
    assert all(len({shapes[number] for number in part}) == 1 and len(part) <= chunk for part in parts)
    assert len(parts) <= 100 / chunk + 2 * (100 / (8 * chunk) + 1)
    assert all(max(part) - min(part) < 8 * chunk for part in parts)


def test_what_is_right_is_asked_first(pocket):
    """Without answers, those with all tokens are asked for by themselves: no answer is ever compared with nothing."""
    examples = drawn_examples(pocket, 6, 1).items
    bare = [example.__class__(**{**vars(example), "answers": ()}) for example in examples]
    book = AnswerBook(pocket, bare, score_of("exact"), None, 4, 5)
    blind = book.ask(foveate.get("sequential", budget=1), range(6))
    full = book.ask(None, range(6))
    assert full.scores.tolist() == [1.0] * 6
    assert blind.scores.tolist() == [float(a == b) for a, b in zip(blind.texts, full.texts, strict=True)]
    assert blind.scores.mean() < 1
    assert blind.share == pytest.approx(1 / 576)


def test_losses_are_scores_less_scores(pocket):
    book = AnswerBook(pocket, drawn_examples(pocket, 8, 2).items, score_of("exact"), None, 3, 5)
    method = foveate.get("spatial", budget=0.05)
    losses, found = book.losses(method, [1, 4, 6])
    assert losses.values.tolist() == (book.ask(None, [1, 4, 6]).scores - found.scores).tolist()
    assert losses.groups.tolist() == [1, 4, 6]
    everything = book.ask(method, range(8)).texts
    assert found.texts == [everything[number] for number in (1, 4, 6)]


def test_rows_are_drawn_and_what_counts_for_nothing_is_said(pocket, tmp_path):
    Image.new("RGB", (192, 192), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"what {number} ?", "answer": "x"} for number in range(40)]
    rows[7] |= {"method": "prumerge"}
    rows[31] |= {"max_new_tokens": 3}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = read_examples(tmp_path / "rows.jsonl", pocket, limit=10)
    assert [item.line for item in first.items] == [*range(1, 11)]
    assert first.notes()[0] == "30 further rows are not used"
    assert "1 rows name a method" in first.notes()[1]
    drawn = read_examples(tmp_path / "rows.jsonl", pocket, limit=10, seed=3)
    lines = [item.line for item in drawn.items]
    assert lines == sorted(set(lines))
    assert len(lines) == 10
    assert max(lines) > 20
    assert read_examples(tmp_path / "rows.jsonl", pocket, limit=40, seed=3).left == 0


class SlowBook:
    """Answers that take a second each, on a clock of their own; two examples of 600 are lost by every setting."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.examples, self.groups, self.chunks = [None] * 600, np.arange(600), [tuple(range(8))]
        self.clock, self.known = clock, set()  # type: ignore[var-annotated]

    def ask(self, method, numbers):
        fresh = {(method is None, number) for number in numbers} - self.known
        self.known |= fresh
        self.clock.now += len(fresh)
        return SimpleNamespace(scores=np.ones(len(numbers)), texts=[""] * len(numbers), share=0.5)

    def losses(self, method, numbers):
        found = self.ask(method, numbers)
        return Losses(np.isin(numbers, (5, 400)).astype(float), self.groups[list(numbers)]), found


@pytest.mark.parametrize("minutes", [2, 5, 20, 600])
def test_a_time_limit_is_kept(monkeypatch, minutes):
    """Also where all answers would take hours: fewer examples are tested then, and those that were seen still decide."""
    from foveate.measuring.noise import Ratio
    from foveate.tuning import tune

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock.now)
    book = SlowBook(clock)
    costs = SimpleNamespace(is_timed=False, measure=lambda methods, *_: {name: Ratio(0.5, (0.5, 0.5)) for name in methods})
    setting = tune.Setting(foveate.get("spatial", budget=0.5), "spatial", "spatial", 0)
    space = tune.Space([setting], {}, {})
    tuned = Tuner(book, costs, 0.05, lambda _: None, minutes).run(space)  # type: ignore[arg-type]
    assert clock.now <= 60 * minutes + 32  # a step of the test
    assert (tuned.chosen is not None) == (len(tuned.confirmed) >= fewest(0.05))
    if tuned.chosen is None:
        assert "time" in tuned.reason or "too few" in tuned.reason or "shown" in tuned.reason
    assert (minutes == 2) == (tuned.chosen is None)
