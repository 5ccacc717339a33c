"""Token selectors against slow references written from their papers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.cuts import DecoderTap, PromptTokens
from foveate.methods.base import ProjectorReducer
from foveate.methods.cdpruner import CDPruner, determinant_first
from foveate.methods.dart import DART
from foveate.methods.divprune import DivPrune
from foveate.methods.scope import Scope, coverage_first
from foveate.methods.tools.selection import STEPS, cosine_rows, cosines, farthest_first, rows_of, unpacked
from foveate.methods.visionzip import VisionZip
from foveate.methods.vispruner import VisPruner
from foveate.methods.vtc_cls import FasterVLM
from foveate.tokens import EncoderTap, Question, Reduction, VisualTokens

from .. import selector_reference as reference
from ..reference import attention_row

SELECTORS = [VisionZip, VisionZip.released, DivPrune, CDPruner, Scope, VisPruner]
KINDS = ["random", "constant", "signs", "few", "zeros"]


def vectors(kind: str, *shape: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors of which some, or all, are alike; the length of "signs" and "few" is a power of two, so that cosines are exact."""
    if kind in ("constant", "zeros"):
        return torch.full(shape, 1.0 if kind == "constant" else 0.0)
    if kind == "random":
        return torch.randn(shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    return signs if kind == "signs" else signs[:, :3].repeat(1, -(-shape[1] // 3), 1)[:, : shape[1]]


def tokens(rows: int = 6, columns: int = 7, images: int = 3, kind: str = "random", seed: int = 0, cls: bool = True) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    number, lead = rows * columns, int(cls)

    def make(*shape: int) -> torch.Tensor:
        return vectors(kind, *shape, generator=generator)

    keys, states = make(images, lead + number, 16), torch.randn(images, lead + number, 16, generator=generator)
    query = torch.randn(images, 16, generator=generator) if cls else None
    queries = None if cls else torch.randn(images, number, 16, generator=generator)
    tap = EncoderTap(query, keys, 4, states, queries)
    text, valid = make(images, 5, 16), torch.rand(images, 5, generator=generator) < 0.7
    question = Question(make(images, number, 16), text, valid, paired=seed % 2 == 0)
    return VisualTokens(make(images, number, 16), (rows, columns), {"aligned": tap}, make(images, number, 16), question)


def alone(visual: VisualTokens, b: int) -> VisualTokens:
    def part(value):
        return value[b : b + 1] if isinstance(value, torch.Tensor) else value

    def parts(thing):
        return dataclasses.replace(thing, **{field.name: part(getattr(thing, field.name)) for field in dataclasses.fields(thing)})

    return dataclasses.replace(
        parts(visual), taps={name: parts(tap) for name, tap in visual.taps.items()}, question=parts(visual.question)
    )


def scores_of(visual: VisualTokens, b: int) -> list[float]:
    tap = visual.taps["aligned"]
    return attention_row(tap.query[b], tap.keys[b], tap.heads, fused=False)


def chosen(method: ProjectorReducer, visual: VisualTokens) -> list[list[int]]:
    reduction = method.reduce(visual)
    assert reduction.valid is None
    return reduction.index.tolist()


# VisionZip


@pytest.mark.parametrize(("budget", "share"), [(12, 10 / 64), (12, 0.5), (20, 0.3), (1, 10 / 64), (5, 1.0), (9, 0.0)])
def test_visionzip_equals_the_paper(budget, share):
    visual = tokens()
    tap = visual.taps["aligned"]
    reduction = VisionZip(budget=budget, contextual=share).reduce(visual)
    out = reduction.apply(visual.features)
    merged = min(round(share * budget), budget - 1)
    for b in range(3):
        kept, groups = reference.visionzip(visual.features[b], tap.query[b], tap.keys[b], 4, budget - merged, merged)
        cells = sorted([*kept, *groups])
        assert reduction.index[b].tolist() == cells
        expected = [reference.merged(visual.features[b], cell, groups.get(cell, []), normalise=True) for cell in cells]
        torch.testing.assert_close(out[b].double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert sorted(n for group in groups.values() for n in group) == (sorted(set(range(42)) - set(cells)) if merged else []), (
            "everything that is dropped is merged"
        )


@pytest.mark.parametrize(("budget", "share"), [(12, 10 / 64), (12, 0.5), (20, 0.3), (1, 10 / 64), (5, 1.0), (41, 0.5)])
def test_visionzip_released_puts_cls_first_and_merged_tokens_last(budget, share):
    visual = tokens()
    tap = visual.taps["aligned"]
    reduction = VisionZip.released(budget=budget, contextual=share).reduce(visual)
    out = reduction.apply(visual.features)
    merged = min(round(share * budget), budget - 1)
    for b in range(3):
        kept, groups = reference.visionzip(visual.features[b], tap.query[b], tap.keys[b], 4, budget - merged - 1, merged)
        first, *cells = reduction.index[b].tolist()
        assert cells == [*kept, *groups]
        assert first not in cells
        assert torch.equal(out[b, 0], tap.states[b, 0])
        expected = [reference.merged(visual.features[b], cell, groups.get(cell, []), normalise=False) for cell in cells]
        if expected:
            torch.testing.assert_close(out[b, 1:].double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_visionzip_as_published_is_54_and_10_tokens():
    visual = tokens(24, 24, images=1)
    reduction = VisionZip.released(budget=64).reduce(visual)
    assert reduction.index.shape == (1, 64)
    assert reduction.added.shape == (1, 1, 16)
    of = (reduction.matrix(576) != 0).sum(-1)[0]
    assert of[0] == 0, "[CLS] is made of no patch"
    assert (of[1:54] == 1).all()
    assert (of[54:] > 1).all()
    assert of.sum() == 576, "every patch is in one output"
    plain = VisionZip(budget=64).reduce(visual)
    assert (plain.matrix(576) != 0).sum(-1).gt(1).sum() == 10
    torch.testing.assert_close(plain.matrix(576).sum(-1), torch.ones(1, 64))


def test_visionzip_without_cls_is_made_of_patches_only():
    reduction = VisionZip.released(budget=12).reduce(tokens(cls=False))
    assert reduction.added is None
    assert reduction.index.shape == (3, 12)
    assert (reduction.matrix(64) != 0).any(-1).all()


def test_visionzip_refuses_features_that_cls_does_not_fit():
    visual = tokens()
    wide = dataclasses.replace(visual, features=visual.features.repeat(1, 1, 2))
    with pytest.raises(foveate.InputError, match="keep_cls"):
        VisionZip.released(budget=12).reduce(wide)


@pytest.mark.parametrize("block", [1, 5, 7, 384])
def test_cosines(block):
    points = torch.randn(2, 14, 6)
    points[0, 3] = 0
    expected = torch.tensor([reference.cosine_table(image) for image in points])
    torch.testing.assert_close(cosines(points, block), expected.float(), atol=1e-6, rtol=0)


# DivPrune


def test_the_similarities_of_many_tokens_take_16_bits_and_choose_the_same(monkeypatch):
    visual, index = tokens(images=2), torch.tensor([[3], [40]])
    exact, weight = cosines(visual.features), torch.rand(2, 42, generator=torch.Generator().manual_seed(0))
    chosen = [farthest_first(exact.clone(), 20)[0], coverage_first(exact, weight, 20, few=True)]
    monkeypatch.setattr("foveate.methods.tools.selection.LARGE", 42)
    packed = cosines(visual.features, 16)
    assert packed.dtype == torch.int16
    torch.testing.assert_close(unpacked(packed), exact, atol=0.51 / STEPS, rtol=0)
    torch.testing.assert_close(rows_of(packed, index), rows_of(exact, index), atol=0.51 / STEPS, rtol=0)
    torch.testing.assert_close(cosine_rows(visual.features)(index), rows_of(exact, index), atol=1e-6, rtol=0)
    assert torch.equal(coverage_first(packed, weight, 20, few=True), chosen[1])
    assert torch.equal(farthest_first(packed, 20)[0], chosen[0])


@pytest.mark.parametrize("kind", ["random", "signs", "few", "constant"])
@pytest.mark.parametrize("budget", [1, 2, 9, 41])
def test_divprune_equals_greedy_max_min(kind, budget):
    visual = tokens(kind=kind)
    order, _ = farthest_first(cosines(visual.projected), budget)
    for b in range(3):
        expected = reference.divprune(visual.projected[b], budget)
        assert order[b].tolist() == expected
        assert chosen(DivPrune(budget=budget), visual)[b] == sorted(expected)


def test_divprune_as_published_keeps_56_of_576():
    assert len(chosen(DivPrune(budget=0.098), tokens(24, 24, images=1))[0]) == 56


def test_the_first_token_of_divprune_is_the_loneliest_and_scores_say_so():
    visual = tokens()
    scores = DivPrune(budget=1).reduce(visual).scores
    for b in range(3):
        table = reference.cosine_table(visual.projected[b])
        lonely = [min(1 - table[i][j] for j in range(42) if j != i) for i in range(42)]
        torch.testing.assert_close(scores[b].double(), torch.tensor(lonely, dtype=torch.float64), atol=1e-5, rtol=0)
        assert chosen(DivPrune(budget=1), visual)[b] == [lonely.index(max(lonely))]


# CDPruner


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["auto", "negative", "positive"])
def test_cdpruner_equals_the_greedy_determinant(seed, mode):
    visual = tokens(4, 4, seed=seed)
    question = visual.question
    reduction = CDPruner(budget=7, relevance=mode).reduce(visual)
    for b in range(3):
        text = [row for row, real in zip(question.text[b], question.valid[b], strict=True) if real]
        negative = {"auto": question.paired, "negative": True, "positive": False}[mode]
        weight = reference.relevance(question.visual[b], text, negative)
        torch.testing.assert_close(reduction.scores[b].double(), torch.tensor(weight).double(), atol=1e-4, rtol=0)
        assert reduction.index[b].tolist() == sorted(reference.cdpruner(visual.projected[b], weight, 7))


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(1, 9),
    width=st.integers(1, 6),
    count=st.integers(1, 9),
    kind=st.sampled_from(KINDS[:4]),
    seed=st.integers(0, 99),
)
def test_each_choice_of_cdpruner_has_the_largest_determinant(number, width, count, kind, seed):
    """Also beyond the rank of the features, where all determinants are 0."""
    generator, count = torch.Generator().manual_seed(seed), min(count, number)
    points = vectors(kind, 1, number, width, generator=generator)
    weight = torch.rand(1, number, generator=generator) ** 3
    order = determinant_first(cosine_rows(points), weight.square(), count)[0].tolist()
    assert len(set(order)) == count
    for step in range(count):
        found = reference.determinants(points[0], weight[0].tolist(), order[:step])
        scale = max(1e-12, float(weight[0][order[:step]].prod()) ** 2)
        assert found[order[step]] >= max(found.values()) - 3e-6 * scale


def test_cdpruner_beyond_the_rank_takes_the_earlier_token():
    visual = tokens(4, 4, kind="constant")
    assert chosen(CDPruner(budget=5), visual) == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("seed", range(5))
def test_what_cdpruner_takes_beyond_the_rank_is_not_noise(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(1, 12, 3, generator=generator)
    order = determinant_first(cosine_rows(points), torch.rand(1, 12, generator=generator), 12)[0].tolist()
    assert order[3:] == sorted(order[3:])


def test_an_image_nothing_is_asked_about_gets_the_most_diverse_tokens():
    visual = tokens()
    valid = visual.question.valid.clone()
    valid[1] = False
    silent = dataclasses.replace(visual, question=dataclasses.replace(visual.question, valid=valid))
    reduction = CDPruner(budget=7).reduce(silent)
    assert (reduction.scores[1] == 1).all()
    assert reduction.index[1].tolist() == sorted(reference.cdpruner(visual.projected[1], [1.0] * 42, 7))
    assert (reduction.scores[0] < 1).any()


def test_what_pads_the_text_does_not_matter():
    visual = tokens()
    question = visual.question
    text = torch.cat([question.text.masked_fill(~question.valid[..., None], float("nan")), torch.full((3, 4, 16), 9.0)], 1)
    padded = Question(question.visual, text, torch.cat([question.valid, torch.zeros(3, 4, dtype=torch.bool)], 1), question.paired)
    reduction, expected = CDPruner(budget=7).reduce(dataclasses.replace(visual, question=padded)), CDPruner(budget=7).reduce(visual)
    torch.testing.assert_close(reduction.scores, expected.scores)
    assert torch.equal(reduction.index, expected.index)


# SCOPE


@pytest.mark.parametrize("kind", ["random", "few"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("budget", [1, 2, 9, 41])
def test_scope_equals_greedy_coverage(kind, alpha, budget):
    visual = tokens(kind=kind)
    for b in range(3):
        weight = [score**alpha for score in scores_of(visual, b)]
        expected = reference.scope(visual.features[b], weight, budget)
        if kind == "random" or budget <= 2:
            assert chosen(Scope(budget=budget, alpha=alpha), visual)[b] == sorted(expected)
        table = reference.cosine_table(visual.features[b])
        order = coverage_first(cosines(visual.features[b : b + 1]), torch.tensor(weight)[None], budget, few=True)[0].tolist()
        assert len(set(order)) == budget
        for step in range(budget):
            gains = reference.scope_gains(table, weight, order[:step])
            assert gains[order[step]] >= max(gains.values()) * (1 - 1e-4) - 1e-6


def test_scope_over_all_tokens_chooses_what_scope_over_few_does():
    similar, weight = cosines(tokens(images=2).features), torch.rand(2, 42)
    assert torch.equal(coverage_first(similar, weight, 20, few=True), coverage_first(similar, weight, 20, few=False))


# VisPruner


@pytest.mark.parametrize("kind", ["random", "signs", "few", "constant"])
@pytest.mark.parametrize(
    ("budget", "important", "remove"), [(9, 0.5, 8), (12, 0.3, 3), (1, 0.5, 8), (7, 1.0, 8), (6, 0.0, 1), (4, 0.5, 40)]
)
def test_vispruner_equals_the_paper(kind, budget, important, remove):
    visual = tokens(kind=kind)
    method = VisPruner(budget=budget, important=important, remove=remove)
    for b in range(3):
        scores = scores_of(visual, b)
        if kind != "random":  # the reference adds in another order: its ties are others
            scores = VisPruner(budget=budget).reduce(visual).scores[b].tolist()
        assert chosen(method, visual)[b] == reference.vispruner(visual.features[b], scores, budget, important, remove)


def test_vispruner_with_important_tokens_only_is_fastervlm():
    visual = tokens()
    layered = dataclasses.replace(visual, taps={3: visual.taps["aligned"]})
    assert chosen(VisPruner(budget=9, important=1.0), visual) == chosen(FasterVLM(budget=9), layered)


# all of them


@pytest.mark.parametrize("build", SELECTORS)
@pytest.mark.parametrize("budget", [1, 9, 0.5])
@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no cls"])
def test_a_batch_equals_its_images(build, budget, cls):
    visual, method = tokens(cls=cls), build(budget=budget)
    whole = method.reduce(visual)
    out = whole.apply(visual.features)
    for b in range(3):
        single = method.reduce(alone(visual, b))
        assert torch.equal(whole.index[b : b + 1], single.index)
        torch.testing.assert_close(whole.scores[b : b + 1], single.scores, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out[b : b + 1], single.apply(visual.features[b : b + 1]), atol=1e-5, rtol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    build=st.sampled_from(SELECTORS),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    share=st.floats(0.01, 1),
    kind=st.sampled_from(KINDS),
    cls=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_any_grid_any_budget_any_ties(build, rows, columns, share, kind, cls, dtype, seed):
    visual = in_dtype(tokens(rows, columns, 2, kind, seed, cls), dtype)
    count = max(1, round(share * rows * columns))
    reduction = build(budget=count).reduce(visual)
    released = build == VisionZip.released  # a bound method: each is a new one
    for cells in reduction.index.tolist():
        assert len(set(cells)) == count
        assert set(cells) <= set(range(rows * columns))
        assert released or cells == sorted(cells)
    assert reduction.scores.dtype == torch.float32
    out = reduction.apply(visual.features)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert torch.isfinite(reduction.scores).all()


def in_dtype(visual: VisualTokens, dtype: torch.dtype) -> VisualTokens:
    def cast(thing):
        changed = {
            name: value.to(dtype)
            for name, value in vars(thing).items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return dataclasses.replace(thing, **changed)

    return dataclasses.replace(
        cast(visual), taps={name: cast(tap) for name, tap in visual.taps.items()}, question=cast(visual.question)
    )


@pytest.mark.parametrize("build", SELECTORS)
def test_half_precision_is_only_that_of_the_inputs(build):
    visual = in_dtype(tokens(), torch.bfloat16)
    low, high = build(budget=12).reduce(visual), build(budget=12).reduce(in_dtype(visual, torch.float32))
    assert torch.equal(low.index, high.index)
    assert torch.equal(low.scores, high.scores)


@pytest.mark.parametrize("build", SELECTORS)
def test_nan_gives_distinct_tokens_and_is_not_hidden(build):
    visual = tokens()
    for value in (visual.features, visual.projected, visual.question.visual, visual.taps["aligned"].keys):
        value[0, 5] = float("nan")
    reduction = build(budget=9).reduce(visual)
    for cells in reduction.index.tolist():
        assert len(set(cells)) == 9
        assert set(cells) <= set(range(42))
    assert torch.isnan(reduction.scores[0]).any()
    assert torch.isfinite(reduction.scores[1:]).all()
    assert torch.equal(reduction.index[1:], torch.cat([build(budget=9).reduce(alone(visual, b)).index for b in (1, 2)]))


@pytest.mark.parametrize("build", SELECTORS)
@pytest.mark.parametrize("budget", [13, 0.25])
def test_no_value_from_the_device_is_needed(build, budget):
    """On the meta device tensors have no values, and reading one raises."""

    def away(thing):
        return dataclasses.replace(
            thing, **{name: value.to("meta") for name, value in vars(thing).items() if isinstance(value, torch.Tensor)}
        )

    visual = tokens()
    visual = dataclasses.replace(
        away(visual), taps={name: away(tap) for name, tap in visual.taps.items()}, question=away(visual.question)
    )
    reduction: Reduction = build(budget=budget).reduce(visual)
    assert reduction.apply(visual.features).shape == (3, foveate.tokens.resolve_budget(budget, 42), 16)


@pytest.mark.parametrize("build", [VisionZip, DivPrune, CDPruner, Scope, VisPruner])
def test_a_budget_has_to_be_given(build):
    with pytest.raises(foveate.InputError, match="budget"):
        build()


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (VisionZip, {"contextual": 1.1}),
        (VisionZip, {"contextual": -0.1}),
        (VisionZip, {"order": "any"}),
        (CDPruner, {"relevance": "both"}),
        (Scope, {"alpha": -1.0}),
        (VisPruner, {"important": 1.5}),
        (VisPruner, {"remove": 0}),
        (DART, {"layer": 0}),
        (DART, {"visual_pivots": 0}),
        (DART, {"text_pivots": -1}),
    ],
)
def test_wrong_fields_are_refused(build, fields):
    with pytest.raises(foveate.InputError, match=next(iter(fields))):
        build(budget=9, **fields)


# DART


def prompt(
    layout: list[str], heads: int = 2, cached: int = 3, left: int = 0, seed: int = 0, kind: str = "random", width: int | None = None
) -> PromptTokens:
    """Rows of a prompt: "t" text, "q" question, a digit an image; ``left`` more places of padding in front."""
    width = (width or max(map(len, layout))) + left
    image, question, valid, rows = [], [], [], []
    hidden, keys = torch.zeros(len(layout), width, 16), torch.zeros(len(layout), heads, cached + width, 4)
    for row, text in enumerate(layout):
        generator = torch.Generator().manual_seed(seed + row)
        text = "." * (width - len(text)) + text
        image.append([int(place) if place.isdigit() else -1 for place in text])
        question.append([place == "q" for place in text])
        valid.append([place != "." for place in text])
        real = sum(valid[-1])
        hidden[row, width - real :] = vectors(kind, real, 16, generator=generator)
        keys[row, :, -real:] = torch.randn(heads, real, 4, generator=generator) if kind == "random" else 1.0
        keys[row, :, : cached + width - real] = 50.0
        hidden[row, : width - real] = float("nan")
        rows.append([sum(place == str(number) for place in text) for number in range(3)])
    columns = torch.arange(width).expand(len(layout), -1)
    tap = DecoderTap(
        torch.zeros(len(layout), heads, width, 4), keys, 0.5, None, torch.zeros(len(layout), cached + width).long(), None
    )
    valid, question = torch.tensor(valid), torch.tensor(question)
    last = torch.full((len(layout),), width - 1)
    return PromptTokens(
        hidden, torch.tensor(image), valid, question, ~question & valid, last, columns, torch.tensor(rows), 2, 4, tap
    )


def kept_of(method: DART, tokens: PromptTokens, row: int) -> list[int]:
    return torch.where(method.cut(tokens).keep[row])[0].tolist()


PROMPTS = [
    "ttt" + "0" * 30 + "qqqqqqq",
    "t" + "0" * 20 + "qq" + "1" * 9 + "q" + "2" * 3 + "qqqqtqq",
    "t" + "0" * 5 + "q",
    "tttt",
    "0" * 12,
]


@pytest.mark.parametrize("kind", ["random", "signs", "constant"])
@pytest.mark.parametrize("budget", [0.222, 0.7, 1, 4, 11, 25])
@pytest.mark.parametrize(("pivots", "norm"), [((4, 4), "l1"), ((4, 4), "l2"), ((1, 0), "l1"), ((2, 7), "l2"), ((9, 9), "l1")])
def test_dart_equals_the_paper(kind, budget, pivots, norm):
    tokens = prompt(PROMPTS, kind=kind)
    method = DART(budget=budget, visual_pivots=pivots[0], text_pivots=pivots[1], norm=norm)
    cut = method.cut(tokens)
    for row in range(len(PROMPTS)):
        expected, question = [], torch.where(tokens.question[row])[0].tolist()
        hidden = tokens.hidden[row].nan_to_num()
        for number in range(3):
            visual = torch.where(tokens.image[row] == number)[0].tolist()
            if visual:
                count = foveate.tokens.resolve_budget(budget, len(visual))
                found = reference.dart(hidden, tokens.tap.keys[row, :, 3:], visual, question, count, pivots, int(norm[1]))
                assert len(found) == count
                expected += found
        assert torch.where(cut.keep[row])[0].tolist() == sorted(expected)
    assert torch.isfinite(cut.scores[tokens.visual]).all()


@pytest.mark.parametrize("budget", [0.222, 7])
def test_rows_and_padding_do_not_change_dart(budget):
    method, together = DART(budget=budget), prompt(PROMPTS)
    for row, text in enumerate(PROMPTS):
        single = prompt([text], seed=row)
        padding = together.hidden.shape[1] - len(text)
        assert [place - padding for place in kept_of(method, together, row)] == kept_of(method, single, 0)
        assert [place - 5 for place in kept_of(method, prompt([text], seed=row, left=5), 0)] == kept_of(method, single, 0)


def test_rotating_all_keys_does_not_change_dart():
    """Rows that are padded on the left, by callers that give no position ids."""
    tokens = prompt(PROMPTS)
    angle = torch.rand(len(PROMPTS), 1, 1, 2) * 6
    pairs = torch.view_as_complex(tokens.tap.keys.unflatten(-1, (2, 2)).contiguous()) * torch.exp(1j * angle)
    turned = dataclasses.replace(tokens, tap=dataclasses.replace(tokens.tap, keys=torch.view_as_real(pairs).flatten(-2)))
    assert torch.equal(DART().cut(turned).keep, DART().cut(tokens).keep)
    assert not torch.equal(DART(norm="l1").cut(turned).keep, DART(norm="l1").cut(tokens).keep)


def test_dart_keeps_128_of_576_exactly():
    tokens = prompt(["t" * 35 + "0" * 576 + "q" * 20])
    assert len(kept_of(DART(), tokens, 0)) == 128
    assert len(kept_of(DART(visual_pivots=5, text_pivots=2), tokens, 0)) == 128


def test_dart_after_an_earlier_cut_keeps_no_more_than_there_are():
    tokens = prompt(["t" + "0" * 6 + "qqq"])
    earlier = dataclasses.replace(tokens, initial=torch.tensor([[40, 0, 0]]))
    assert len(kept_of(DART(budget=5), earlier, 0)) == 5
    assert len(kept_of(DART(budget=0.5), earlier, 0)) == 6
    tokens = prompt(["t00qqq"], left=5)
    cut = DART(budget=9).cut(dataclasses.replace(tokens, initial=torch.tensor([[40, 0, 0]])))
    assert cut.keep[0].tolist() == tokens.visual[0].tolist()
    assert torch.isfinite(cut.scores[tokens.visual]).all(), "no place without a token is a pivot"


def test_dart_needs_no_value_from_the_device():
    tokens = prompt(PROMPTS)

    def away(thing):
        return dataclasses.replace(
            thing, **{name: value.to("meta") for name, value in vars(thing).items() if isinstance(value, torch.Tensor)}
        )

    cut = DART().cut(dataclasses.replace(away(tokens), tap=away(tokens.tap)))
    assert cut.keep.shape == tokens.valid.shape


def test_dart_acts_before_its_layer_and_has_a_budget_of_its_own():
    assert DART().cuts(32) == (2,)
    assert DART(layer=5).cuts(32) == (5,)
    assert DART().budget == 0.222
