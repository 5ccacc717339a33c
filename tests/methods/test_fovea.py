"""Fovea against a slow reference, its scorers, and what teaches them against the unmodified model."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import foveate
from foveate.errors import InputError
from foveate.methods.fovea import Fovea
from foveate.methods.tools.scorers import WORDS, described, last_words
from foveate.methods.tools.teacher import lessons
from foveate.methods.trained import Host, ModelShape
from foveate.tokens import EncoderTap, Question, VisualTokens

from .. import selector_reference as reference
from .. import zoo
from ..reference import attention_row


def tokens(rows: int = 5, columns: int = 6, images: int = 3, seed: int = 0, cls: bool = True) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    number, lead = rows * columns, int(cls)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    taps = {}
    for layer in range(3):
        query, queries = (make(images, 16), None) if cls else (None, make(images, number, 16))
        taps[layer] = EncoderTap(query, make(images, lead + number, 16), 4, queries=queries)
    question = Question(make(images, number, 12), make(images, 5, 12), torch.rand(images, 5, generator=generator) < 0.7)
    return VisualTokens(make(images, number, 16), (rows, columns), taps, make(images, number, 12), question)


def part(visual: VisualTokens, b: int) -> VisualTokens:
    def row(thing):
        if isinstance(thing, torch.Tensor):
            return thing[b : b + 1]
        if isinstance(thing, EncoderTap | Question):
            return dataclasses.replace(thing, **{f.name: row(getattr(thing, f.name)) for f in dataclasses.fields(thing)})
        return thing

    taps = {name: row(tap) for name, tap in visual.taps.items()}
    return dataclasses.replace(
        visual, features=row(visual.features), taps=taps, projected=row(visual.projected), question=row(visual.question)
    )


def slow(visual: VisualTokens, b: int, count: int, alpha: float) -> list[int]:
    """Tokens in the order they are chosen, with loops."""
    rows = [attention_row(tap.query[b], tap.keys[b], tap.heads, fused=False) for tap in visual.taps.values()]
    product = [math.prod(row[n] for row in rows) ** (1 / len(rows)) for n in range(visual.number)]
    weight = [(value / sum(product)) ** alpha for value in product]
    before, after = reference.cosine_table(visual.features[b]), reference.cosine_table(visual.projected[b])
    table = [[(x + y) / 2 for x, y in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(reference.first_best(reference.scope_gains(table, weight, chosen)))
    return chosen


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("budget", [1, 2, 9, 29])
def test_fovea_equals_greedy_coverage_by_both_cosines(alpha, budget):
    visual = tokens()
    found = Fovea(budget=budget, alpha=alpha).reduce(visual).index.tolist()
    assert found == [sorted(slow(visual, b, budget, alpha)) for b in range(3)]


def test_one_order_serves_all_budgets():
    visual = tokens()
    kept = [set(Fovea(budget=budget).reduce(visual).index[1].tolist()) for budget in (1, 4, 9, 20)]
    assert all(few < many for few, many in itertools.pairwise(kept))


@pytest.mark.parametrize("cls", [True, False])
def test_a_row_of_a_batch_is_the_picture_alone(cls):
    visual, method = tokens(cls=cls), Fovea(budget=9)
    together = method.reduce(visual)
    for b in range(3):
        alone = method.reduce(part(visual, b))
        assert torch.equal(together.index[b], alone.index[0])
        torch.testing.assert_close(together.scores[b], alone.scores[0])


# what teaches the scorer


def conversation(turns: int) -> dict[str, torch.Tensor]:
    """Two rows: words 20 21 before a picture, then questions (30 ...) answered in two words (40 ...) and an end."""
    said = [
        [
            word
            for turn in range(turns)
            for word in ([] if turn == 0 else [20, 21]) + [30 + row + turn, 50 + turn] + [40 + turn, 41 + row, 2]
        ]
        for row in range(2)
    ]
    ids = torch.tensor([[1, 20, 21, *[zoo.IMAGE] * zoo.TOKENS, *row] for row in said])
    answered = (ids >= 40) & (ids < 50) | (ids == 2)
    labels = ids.masked_fill(~answered, -100)
    pixels = zoo.pictures(2, seed=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def slow_worth(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, N] by a forward of the whole prompt with gradients of everything."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model.requires_grad_(True)
    out = model(**inputs, output_attentions=True)
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    gradients = torch.autograd.grad(losses.sum(), out.attentions)
    model.requires_grad_(False)
    first = 3 + zoo.TOKENS
    found = torch.zeros(len(losses), zoo.TOKENS)
    for attention, gradient in zip(out.attentions, gradients, strict=True):
        for b in range(len(losses)):
            for row in range(first, attention.shape[2]):
                for head in range(attention.shape[1]):
                    found[b] += (-attention[b, head, row, 3:first] * gradient[b, head, row, 3:first]).clamp(min=0).detach()
    return found


@pytest.mark.parametrize("decoder", ["llama", "gemma3"])
def test_worth_equals_gradients_of_the_whole_prompt(decoder):
    model, batch = zoo.load("llava", decoder, "eager"), conversation(1)
    found = lessons(model, batch)
    assert found.row.tolist() == [0, 1]
    torch.testing.assert_close(found.worth, slow_worth(model, batch), atol=1e-6, rtol=1e-3)
    assert [ids[asked].tolist() for ids, asked in zip(found.ids, found.asked, strict=True)] == [[30, 50], [31, 50]]


def test_a_turn_is_taught_as_if_it_were_the_first():
    model, batch = zoo.load(), conversation(2)
    found = lessons(model, batch)
    assert found.row.tolist() == [0, 0, 1, 1]
    assert found.ids[1].tolist() == batch["input_ids"][0, -5:].tolist(), "without what stands before the picture already"
    first = 3 + zoo.TOKENS
    for place, some in enumerate([slice(first, first + 5), slice(-5, None)]):
        alone = {
            name: torch.cat([batch[name][:, :first], batch[name][:, some]], 1) for name in ("input_ids", "attention_mask", "labels")
        }
        each = lessons(model, {**alone, "pixel_values": batch["pixel_values"]})
        torch.testing.assert_close(found.worth[place::2], each.worth, atol=1e-6, rtol=1e-3)


def test_the_model_is_left_as_it_was():
    model, batch = zoo.load(), conversation(1)
    with foveate.attach(model, "scope", budget=9) as session:
        attached = lessons(model, batch).worth
        assert session.method.name == "scope"
    torch.testing.assert_close(attached, lessons(model, batch).worth)
    assert model.get_decoder().config._attn_implementation == "sdpa"
    before = len(model.get_input_embeddings()._forward_hooks)
    broken = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(InputError, match="no answer after its picture"):
        lessons(model, broken)
    with pytest.raises(IndexError):
        lessons(model, {**batch, "input_ids": batch["input_ids"].clamp(max=31) + 200 * (batch["input_ids"] == 30)})
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert len(model.get_input_embeddings()._forward_hooks) == before


@pytest.mark.parametrize("guided", [False, True])
def test_what_is_prepared(guided):
    model, batch = zoo.load(), conversation(2)
    method = foveate.get("fovea", budget=9, guided=guided).fresh()
    with foveate.attach(model, method, train=True):
        rows = method.prepare(model, batch)
        loss, _ = method.objective(model, rows)
        loss.backward()
        assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in method.module.parameters())
    found = lessons(model, batch)
    share = found.worth / found.worth.sum(1, keepdim=True)
    expected = share if guided else torch.stack([share[:2].mean(0), share[2:].mean(0)])
    torch.testing.assert_close(rows["target"], expected)
    assert rows["tokens"].shape[:2] == expected.shape
    if guided:
        table = model.get_input_embeddings().weight
        assert rows["valid"].sum(1).tolist() == [2, 2, 2, 2]
        torch.testing.assert_close(rows["words"][0, :2].float(), table[torch.tensor([30, 50])], atol=2e-3, rtol=2e-3)


def test_with_weights_and_without(tmp_path):
    model, inputs = zoo.load(), zoo.batch()
    plain = foveate.get("fovea")
    assert plain.trained() == ()
    assert plain.settings()["weights"] is None
    method = foveate.get("fovea", budget=9, guided=True).fresh(1)
    with method(model):
        expected = model(**inputs).logits
    method.save_pretrained(tmp_path / "w")
    loaded = foveate.get("fovea", budget=9, weights=str(tmp_path / "w"))
    assert loaded.guided
    assert loaded.reads_question
    with loaded(model):
        torch.testing.assert_close(model(**inputs).logits, expected)
    plain.save(tmp_path / "plain.json")
    assert foveate.Method.load(tmp_path / "plain.json") == plain
    with pytest.raises(InputError, match="has to be trained"), foveate.get("fovea", guided=True)(model):
        model(**inputs)


def test_the_question_decides_in_the_guided_form():
    visual = tokens()
    method = foveate.get("fovea", budget=9, guided=True).fresh(0)
    method.bind(_host())
    silent = dataclasses.replace(visual.question, valid=torch.zeros_like(visual.question.valid))
    other = dataclasses.replace(visual.question, text=visual.question.text.flip(1))
    asked, nothing, differently = (
        method.reduce(dataclasses.replace(visual, question=question)).scores for question in (visual.question, silent, other)
    )
    assert bool(torch.isfinite(nothing).all())
    assert not torch.allclose(asked, differently)
    padded = Question(
        visual.question.visual,
        torch.cat([visual.question.text, torch.full((3, 4, 12), float("nan"))], 1),
        torch.cat([visual.question.valid, torch.zeros(3, 4, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(method.reduce(dataclasses.replace(visual, question=padded)).scores, asked)


def _host() -> Host:
    shape = ModelShape("test", 16, 12, 16, 4, 3, 1, 4, (5, 6))
    return Host(shape, torch.device("cpu"), dict)


def test_last_words():
    text = torch.arange(80.0)[None, :, None].expand(2, -1, 3)
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[1] = torch.arange(80) % 40 == 5
    words, real = last_words(text, valid)
    assert words[0, :, 0].tolist() == list(range(80 - WORDS, 80))
    assert real[0].all()
    assert words[1, :2, 0].tolist() == [5, 45]
    assert real[1].tolist() == [True, True] + [False] * (WORDS - 2)


def test_what_a_scorer_reads():
    features, attention = torch.randn(2, 6, 8), torch.rand(2, 3, 6) + 0.1
    found = described(features, attention, (2, 3))
    assert found.shape == (2, 6, 8 + 3 + 2)
    torch.testing.assert_close(found[0, :, 8].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, :, 8].argsort(), attention[0, 0].argsort())
    assert found[0, :, -2:].tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]


def test_the_shipped_weights_fit_the_pocket_model():
    model, _ = foveate.load_pocket()
    method = foveate.get("fovea", weights="pocket", budget=9)
    reduced = foveate.Pictures(model, pixel_values=torch.randn(1, 3, 192, 192)).reduce(method)
    assert reduced.report.after == [9]
    assert reduced.report.warnings == []
    assert sum(value.numel() for value in method.module.parameters()) == 12_993
