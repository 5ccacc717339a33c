"""Methods inside the decoder, and the selectors that belong to them, against slow references written from the papers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foveate
from foveate.cuts import DecoderTap, PromptTokens
from foveate.methods.aim import AIM, AIMPrune
from foveate.methods.aim_merge import AIMMerge
from foveate.methods.g_search import GSearch
from foveate.methods.inflection_cut import InflectionCut
from foveate.methods.iti import ITI
from foveate.methods.p_sigmoid import PSigmoid
from foveate.methods.sparsevlm import SparseVLM
from foveate.methods.text_relevance import TextRelevanceCut
from foveate.methods.tools.inflection import inflection_counts
from foveate.methods.tools.merging import cluster_weights
from foveate.methods.tools.raters import raters
from foveate.methods.tools.scoring import cls_attention, page_rank, prompt_attention, question_attention
from foveate.methods.vtc_cls import FasterVLM, VTCCls
from foveate.tokens import EncoderTap, VisualTokens

from .. import reference, selector_reference

HEADS, GROUPS, WIDTH = 4, 2, 8


def prompt(
    layout: str, layer: int = 2, layers: int = 8, seed: int = 0, sharp: float = 1.0, window: int | None = None
) -> PromptTokens:
    """One row drawn as text: ``_`` padding, ``s`` special, ``t`` text, digits the tokens of that image."""
    random = torch.Generator().manual_seed(seed)
    length = len(layout)
    image = torch.tensor([[int(c) if c.isdigit() else -1 for c in layout]])
    valid = torch.tensor([[c != "_" for c in layout]])
    visual, column = image >= 0, torch.arange(length)[None]
    behind = visual.long().cumsum(1) > 0
    special = torch.tensor([[c == "s" for c in layout]])
    last = int((column * valid).max())
    question = valid & ~visual & behind & ~special
    protected = valid & ~visual & (special | ~behind | (column >= last))
    initial = (image[:, None] == torch.arange(max(int(image.max()) + 1, 1))[:, None]).sum(-1)
    query = torch.randn(1, HEADS, length, WIDTH, generator=random) * sharp
    keys = torch.randn(1, GROUPS, length, WIDTH, generator=random) * sharp
    tap = DecoderTap(query, keys, WIDTH**-0.5, None, torch.where(valid, column, -1), window)
    hidden = torch.randn(1, length, 12, generator=random)
    base = dict(valid=valid, question=question, protected=protected, last=torch.tensor([last]), columns=column, initial=initial)
    start = PromptTokens(torch.randn(1, length, 12, generator=random), image, layer=0, layers=layers, **base)
    return PromptTokens(hidden, image, layer=layer, layers=layers, tap=tap, start=start, **base)


def slow_attention(tokens: PromptTokens, row: int, temperature: float = 1.0) -> list[list[float]]:
    """[H][S] attention of one token, one head and one key after the other."""
    tap, found = tokens.tap, []
    for head in range(HEADS):
        logits = {}
        for at in range(tokens.valid.shape[1]):
            near = tap.window is None or at > row - tap.window
            if at <= row and tokens.valid[0, at] and near:
                product = float(tap.query[0, head, row].double() @ tap.keys[0, head // (HEADS // GROUPS), at].double())
                logits[at] = product * tap.scale / temperature
        top = max(logits.values())
        total = sum(math.exp(x - top) for x in logits.values())
        found.append([math.exp(logits[at] - top) / total if at in logits else 0.0 for at in range(tokens.valid.shape[1])])
    return found


def kept(cut, tokens) -> list[int]:
    return (cut.keep & tokens.visual)[0].nonzero().flatten().tolist()


def best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda at: (-scores[at], at))[:count])


TWO = "__stt" + "0" * 24 + "tt" + "1" * 16 + "ttstt"


@pytest.mark.parametrize("window", [None, 12])
def test_prompt_attention_is_attention(window):
    tokens = prompt(TWO, window=window)
    rows = torch.tensor([[9, 30, len(TWO) - 1]])
    found = prompt_attention(tokens, rows)
    for place, row in enumerate(rows[0].tolist()):
        torch.testing.assert_close(found[0, :, place].double(), torch.tensor(slow_attention(tokens, row), dtype=torch.double))


@pytest.mark.parametrize(("budget", "counts"), [(0.5, (12, 8)), (5, (5, 5)), (20, (20, 16)), (0.01, (1, 1))])
def test_fastv(budget, counts):
    tokens = prompt(TWO)
    row = np.mean(slow_attention(tokens, len(TWO) - 1), axis=0)
    wanted = []
    for image, count in enumerate(counts):
        wanted += best({at: row[at] for at, c in enumerate(TWO) if c == str(image)}, count)
    assert kept(foveate.FastV(budget=budget).cut(tokens), tokens) == wanted


def test_pyramiddrop_published_counts():
    """Stages 8, 16, 24 of 32 with a half each: 288, 144, 72 of 576, on average 270 (CVPR 2025, section 4)."""
    method = foveate.PyramidDrop()
    assert method.cuts(32) == (8, 16, 24)
    counts = [len(kept(method.cut(tokens), tokens)) for tokens in (prompt("t" + "0" * 576 + "tt", at, 32) for at in (8, 16, 24))]
    assert counts == [288, 144, 72]
    assert (8 * 576 + 8 * sum(counts)) / 32 == 270


@given(st.floats(0.3, 1.0), st.integers(4, 48))
@settings(max_examples=40, deadline=None)
def test_budgets_of_stages_are_means_over_layers(budget, layers):
    for method in (foveate.PyramidDrop(budget=budget), SparseVLM(budget=budget, recycle=0)):
        cuts = (0, *method.cuts(layers), layers)
        if cuts[1] / layers > budget:
            continue
        counts = [576]
        for layer in cuts[1:-1]:
            tokens = prompt("t" + "0" * 576 + "tt", layer, layers)
            counts.append(len(kept(method.cut(tokens), tokens)))
        mean = sum(count * (end - begin) for count, begin, end in zip(counts, cuts, cuts[1:], strict=False)) / layers
        assert mean == pytest.approx(576 * budget, abs=1.01)


def test_budgets_below_what_the_first_layers_run_are_refused():
    for method in (foveate.PyramidDrop(budget=0.1), SparseVLM(budget=4, layers=(3, 5))):
        with pytest.raises(foveate.InputError, match="mean over layers"):
            method.cut(prompt(TWO, method.cuts(8)[0]))


# -- AIM


def slow_merge(keys: torch.Tensor, number: int, count: int) -> list[list[int]]:
    """The released procedure: groups of source tokens as plain nested means, in raster order of where they sit."""
    groups = [{i: 1.0} for i in range(number)]
    metric = [keys[i].double() for i in range(number)]
    places = list(range(number))
    while len(groups) > count:
        merges = min(len(groups) - count, len(groups) // 2)
        even, odd = range(0, len(groups), 2), range(1, len(groups), 2)

        def cosine(a, b, metric=metric):
            return float(metric[a] @ metric[b] / (metric[a].norm() * metric[b].norm()))

        match = {a: max(odd, key=lambda b, a=a: (cosine(a, b), -b)) for a in even}
        merging = sorted(even, key=lambda a: (-cosine(a, match[a]), a))[:merges]
        new = []
        for i in range(len(groups)):
            if i in merging:
                continue
            parts = [i, *(a for a in merging if match[a] == i)]
            weights: dict[int, float] = {}
            for part in parts:
                for source, weight in groups[part].items():
                    weights[source] = weights.get(source, 0) + weight / len(parts)
            new.append((weights, sum(metric[p] for p in parts) / len(parts), places[i]))
        groups, metric, places = ([entry[k] for entry in new] for k in range(3))
    return [[group.get(i, 0.0) for i in range(number)] for group in groups], places


@pytest.mark.parametrize("budget", [63, 32, 20, 9, 1])
def test_aim_merges_like_the_loop(budget):
    random = torch.Generator().manual_seed(1)
    keys = torch.randn(3, 65, 16, generator=random)
    tap = EncoderTap(keys[:, 0], keys, 2)
    reduction = AIMMerge(budget=budget).reduce(VisualTokens(torch.randn(3, 64, 16, generator=random), (8, 8), {"last": tap}))
    for b in range(3):
        weights, places = slow_merge(keys[b, 1:], 64, budget)
        assert reduction.index[b].tolist() == places
        torch.testing.assert_close(reduction.matrix(64)[b], torch.tensor(weights))


def test_aim_released_order_and_counts():
    keys = torch.randn(2, 577, 16, generator=torch.Generator().manual_seed(2))
    visual = VisualTokens(torch.randn(2, 576, 16), (24, 24), {"last": EncoderTap(keys[:, 0], keys, 2)})
    for budget, count in ((252 / 576, 252), (72 / 576, 72)):
        plain = AIM(budget=budget).before_decoder().reduce(visual)
        released = AIM.released(budget=budget).before_decoder().reduce(visual)
        assert plain.index.shape[1] == released.index.shape[1] == count
        assert torch.equal(plain.index, plain.index.sort().values)
        torch.testing.assert_close(plain.matrix(576).sum(-1), torch.ones(2, count))
    # one round leaves the tokens at odd places behind those that did not merge
    part = AIMMerge(budget=500, order="released").reduce(visual).index
    assert torch.equal(part[0, -288:], torch.arange(1, 576, 2))
    assert (part[0, :-288] % 2 == 0).all()


def test_aim_schedule():
    """Vicuna: first cut behind layer 13, an eighth less each time, none behind layer 20; Qwen2-7B: from 14 to 22."""
    method = AIMPrune()
    assert method.cuts(32) == tuple(range(14, 22))
    counts = [len(kept(method.cut(tokens), tokens)) for tokens in (prompt("t" + "0" * 252 + "tt", at, 32) for at in range(14, 22))]
    assert counts == [252 * k // 8 for k in (7, 6, 5, 4, 3, 2, 1, 0)]
    assert AIMPrune(begin=14, end=22).cuts(28) == tuple(range(15, 23))
    with pytest.raises(foveate.InputError, match="begin"):
        AIMPrune(begin=5, end=5).cuts(8)


def test_aim_page_rank_walks():
    tokens = prompt("__t" + "0" * 9 + "ttt", sharp=0.5)
    real = [at for at in range(tokens.valid.shape[1]) if tokens.valid[0, at]]
    walk = {row: slow_attention(tokens, row, temperature=0.1) for row in real}
    total = np.zeros(tokens.valid.shape[1])
    for head in range(HEADS):
        mass = np.array([1 / len(real) if at in real else 0.0 for at in range(tokens.valid.shape[1])])
        for _ in range(5):
            mass = sum(mass[row] * np.array(walk[row][head]) for row in real)
        total += mass**2
    found = page_rank(tokens, 0.1, 5)[0]
    torch.testing.assert_close(found.double(), torch.tensor(np.sqrt(total / HEADS)), rtol=1e-4, atol=1e-6)


# -- SparseVLM


def test_sparsevlm_raters():
    tokens = prompt(TWO)
    start = tokens.start
    words = start.question[0].nonzero().flatten().tolist()
    share = dict.fromkeys(words, 0.0)
    visual = start.visual[0].nonzero().flatten().tolist()
    for v in visual:
        logits = [float(start.hidden[0, v].double() @ start.hidden[0, w].double()) for w in words]
        total = sum(math.exp(x - max(logits)) for x in logits)
        for w, x in zip(words, logits, strict=True):
            share[w] += math.exp(x - max(logits)) / total / len(visual)
    mean = sum(share.values()) / len(words)
    rows, rating = raters(tokens)
    assert rows[0][rating[0]].tolist() == [w for w in words if share[w] >= mean]


def test_sparsevlm_released_counts():
    for budget, counts in ((192, (300, 200, 110)), (128, (303, 110, 36)), (96, (238, 48, 26)), (64, (66, 30, 17))):
        method = SparseVLM.released(budget=budget, recycle=0)
        assert method.cuts(32) == (3, 7, 16)
        found = [len(kept(method.cut(tokens), tokens)) for tokens in (prompt("t" + "0" * 576 + "tt", at, 32) for at in (3, 7, 16))]
        assert tuple(found) == counts
    assert SparseVLM.released(budget=0.5).budget == 0.5


def test_sparsevlm_rank_rule_and_recycling():
    tokens = prompt(TWO)
    rows, rating = raters(tokens)
    lines = [np.mean(slow_attention(tokens, row), axis=0) for row, rates in zip(rows[0].tolist(), rating[0], strict=True) if rates]
    matrix = np.array(lines)
    method = SparseVLM()
    cut = method.cut(tokens)
    scores = matrix.mean(0)
    for image in range(2):
        mine = [at for at, c in enumerate(TWO) if c == str(image)]
        rank = np.linalg.matrix_rank(matrix[:, mine].astype(np.float32))
        count = len(mine) - int(0.5 * (len(mine) - rank))
        stay = best({at: scores[at] for at in mine}, count)
        deleted = [at for at in mine if at not in stay]
        pool = best({at: scores[at] for at in deleted}, min(len(deleted), int(0.3 * len(deleted) + 1)))
        centres = [at for at in kept(cut, tokens) if at in mine and at not in stay]
        assert set(stay) <= set(kept(cut, tokens))
        assert len(centres) == min(len(pool), len(pool) // 10 + 1)
        owned = [
            s
            for r in range(cut.mix.shape[1])
            if int(cut.target[0, r]) in centres
            for s in cut.mix[0, r].nonzero().flatten().tolist()
        ]
        assert sorted(owned) == pool, "every recycled token goes to one cluster"
    torch.testing.assert_close(cut.mix.sum(-1)[cut.mix.any(-1)], torch.ones(int(cut.mix.any(-1).sum())))


def slow_clusters(points: np.ndarray, clusters: int) -> tuple[list[int], list[int]]:
    number = len(points)
    apart = np.array([[np.linalg.norm(a - b) / math.sqrt(len(a)) for b in points] for a in points])
    density = [math.exp(-np.mean(np.sort(apart[i])[:clusters] ** 2)) for i in range(number)]
    gap = []
    for i in range(number):
        denser = [apart[i, j] for j in range(number) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        gap.append(min(denser) if denser else max(apart[i]))
    peak = {i: gap[i] * density[i] for i in range(number)}
    centres = best(peak, clusters)
    owner = [i if i in centres else min(centres, key=lambda c, i=i: apart[i, c]) for i in range(number)]
    return centres, owner


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_clusters(first, second, seed):
    random = np.random.default_rng(seed)
    length = first + second + 3
    points = torch.tensor(random.normal(size=(1, length, 5)), dtype=torch.float32)
    order = random.permutation(length)
    groups = [sorted(order[:first].tolist()), sorted(order[first : first + second].tolist())]
    pool = torch.zeros(1, 2, length, dtype=torch.bool)
    for i, group in enumerate(groups):
        pool[0, i, group] = True
    counts = torch.tensor([[int(random.integers(1, first + 1)), int(random.integers(1, second + 1))]])
    centres, target, weights = cluster_weights(points, pool, counts)
    assert int(centres.sum()) == int(counts.sum())
    for i, group in enumerate(groups):
        middle, owner = slow_clusters(points[0, group].double().numpy(), int(counts[0, i]))
        assert [at for at in centres[0].nonzero().flatten().tolist() if at in group] == [group[m] for m in middle]
        for place, at in enumerate(group):
            holder = int(target[0, int(weights[0, :, at].argmax())])
            assert weights[0, :, at].sum() == 1
            assert holder == group[owner[place]]


# -- inflection


def slow_inflection(scores: list[float], detector: str, slope: float) -> int:
    curve, number = sorted(scores, reverse=True), len(scores)
    if curve[0] == curve[-1]:
        return number
    if detector == "cumulative":
        return max(1, sum(s > slope * float(np.mean(scores)) for s in scores))
    if detector == "knee":
        below = [1 - i / (number - 1) - (s - curve[-1]) / (curve[0] - curve[-1]) for i, s in enumerate(curve)]
        return below.index(max(below)) + 1 if max(below) > 1e-6 else number
    if detector == "log-knee":
        return slow_inflection([math.log(max(s, 1e-6 * curve[0])) for s in scores], "knee", slope)
    if detector == "derivative":
        half = number // 40
        smooth = [float(np.mean(curve[max(0, i - half) : i + half + 1])) for i in range(number)]
        falls = [a - b for a, b in itertools.pairwise(smooth)]
        return falls.index(max(falls)) + 1
    if detector == "iqr":
        q1, q3 = np.percentile(scores, 25), np.percentile(scores, 75)
        return max(1, sum(s > q3 + 1.5 * (q3 - q1) for s in scores))
    k = min(10, number - 1)
    near = [sorted((abs(a - b), j) for j, b in enumerate(curve) if j != i)[:k] for i, a in enumerate(curve)]
    reach = [each[-1][0] for each in near]
    density = [1 / (np.mean([max(d, reach[j]) for d, j in each]) + 1e-10) for each in near]
    factor = [np.mean([density[j] for _, j in each]) / density[i] for i, each in enumerate(near)]
    return max(1, sum(f > 1.5 for f in factor))


@pytest.mark.parametrize("detector", ["cumulative", "knee", "log-knee", "derivative", "lof", "iqr"])
@given(
    values=hnp.arrays(np.float32, st.integers(2, 90), elements=st.integers(0, 400).map(lambda x: np.float32(x / 16)), unique=True),
    padding=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_inflection_detectors(detector, values, padding):
    """On any curve, with padding of any kind between the values."""
    random = np.random.default_rng(len(values))
    if detector == "lof":  # equal distances make its neighbours a matter of taste
        values = random.lognormal(sigma=1.5, size=len(values)).astype(np.float32)
    curve = np.concatenate([values, np.full(padding, 9e9, np.float32)])
    valid = np.concatenate([np.ones(len(values), bool), np.zeros(padding, bool)])
    order = random.permutation(len(curve))
    found = inflection_counts(torch.tensor(curve[order])[None], torch.tensor(valid[order])[None], detector, slope=0.7)
    wanted = slow_inflection([float(v) for v in values], detector, 0.7)
    if detector == "derivative":  # two falls may be equal but for rounding
        smooth = sorted(values.astype(float), reverse=True)
        half = len(smooth) // 40
        mean = [float(np.mean(smooth[max(0, i - half) : i + half + 1])) for i in range(len(smooth))]
        falls = [a - b for a, b in itertools.pairwise(mean)]
        assert falls[int(found) - 1] == pytest.approx(max(falls), rel=1e-5)
    elif "knee" in detector and int(found) != wanted:  # nor need two points equally far below the chord be told apart
        steps = len(values) - 1
        curve = sorted(values.astype(float), reverse=True)
        curve = curve if detector == "knee" else [math.log(max(value, 1e-6 * curve[0])) for value in curve]
        below = [1 - i / steps - (value - curve[-1]) / (curve[0] - curve[-1]) for i, value in enumerate(curve)]
        assert below[int(found) - 1] == pytest.approx(max(below), abs=1e-5)
    elif detector == "cumulative" and int(found) != wanted:  # nor a score from the bound it lies on
        bound = 0.7 * float(np.mean(values.astype(float)))
        assert sum(values > bound * (1 + 1e-5)) <= int(found) <= sum(values > bound * (1 - 1e-5))
    else:
        assert int(found) == wanted


@pytest.mark.parametrize("detector", ["cumulative", "knee", "log-knee", "derivative", "lof", "iqr"])
def test_inflection_of_nothing(detector):
    flat = torch.full((2, 30), 0.25)
    assert inflection_counts(flat, flat > 0, detector).tolist() == [30, 30], "a constant curve has no bend"
    one = torch.tensor([[0.3, 9.0]])
    assert inflection_counts(one, torch.tensor([[True, False]]), detector).tolist() == [1]
    assert inflection_counts(one, torch.tensor([[False, False]]), detector, 4).tolist() == [0]
    skewed = torch.linspace(0, 1, 30)[None] ** 8
    assert int(inflection_counts(skewed, skewed >= 0, detector, 29)) >= 29


def test_iti_first_stage():
    random = torch.Generator().manual_seed(3)
    keys, query = torch.randn(2, 65, 16, generator=random), 2 * torch.randn(2, 16, generator=random)
    states = torch.randn(2, 65, 16, generator=random)
    visual = VisualTokens(torch.randn(2, 64, 16, generator=random), (8, 8), {"last": EncoderTap(query, keys, 2, states)})
    for kind in ("attention", "cosine", "dot"):
        reduction = InflectionCut(similarity=kind, min_tokens=1, slope=1.0).reduce(visual)
        for b in range(2):
            if kind == "attention":
                scores = reference.attention_row(query[b], keys[b], 2, fused=False)
            else:
                rows, own = states[b, 1:].double(), states[b, 0].double()
                scores = (rows @ own).tolist()
                if kind == "cosine":
                    scores = [s / float(r.norm() * own.norm()) for s, r in zip(scores, rows, strict=True)]
            count = max(1, sum(s > float(np.mean(scores)) for s in scores))
            assert reduction.index[b][reduction.mask()[b]].tolist() == sorted(reference.best(scores, count))
    assert InflectionCut(budget=7).reduce(visual).index.shape[1] == 7


def slow_relevance(tokens: PromptTokens) -> list[float]:
    words = tokens.question[0].nonzero().flatten().tolist() or [int(tokens.last[0])]
    found = []
    for at in range(tokens.valid.shape[1]):
        later = [np.mean(slow_attention(tokens, word), axis=0)[at] for word in words if word > at]
        found.append(float(np.mean(later)) if later else 0.0)
    return found


def test_iti_second_stage():
    tokens = prompt(TWO)
    scores = slow_relevance(tokens)
    assert question_attention(tokens)[0].tolist() == pytest.approx(scores, abs=1e-6)
    cut = TextRelevanceCut(slope=1.0, min_tokens=1).cut(tokens)
    wanted = []
    for image in range(2):
        mine = {at: scores[at] for at, c in enumerate(TWO) if c == str(image)}
        wanted += best(mine, sum(s > float(np.mean(list(mine.values()))) for s in mine.values()))
    assert kept(cut, tokens) == wanted
    words = [at for at in tokens.question[0].nonzero().flatten().tolist() if not tokens.protected[0, at]]
    stay = best({at: scores[at] for at in words}, sum(scores[at] > np.mean([scores[a] for a in words]) for at in words))
    literal = TextRelevanceCut(slope=1.0, min_tokens=1, prune_text=True)
    assert literal.removes_text
    assert [at for at in words if literal.cut(tokens).keep[0, at]] == stay


@pytest.mark.parametrize("budget", [0.5, 9])
def test_iti_second_stage_by_coverage(budget):
    """Each image by itself, its own tokens alone cover it; images of different sizes do not disturb each other."""
    tokens = prompt(TWO)
    cut = TextRelevanceCut(budget=budget, choice="coverage").cut(tokens)
    scores, wanted = slow_relevance(tokens), []
    for image in range(2):
        mine = [at for at, c in enumerate(TWO) if c == str(image)]
        count = budget if budget == 9 else len(mine) // 2
        found = selector_reference.scope(tokens.hidden[0, mine], [scores[at] ** 0.3 for at in mine], count)
        wanted += sorted(mine[place] for place in found)
    assert kept(cut, tokens) == wanted != kept(TextRelevanceCut(budget=budget).cut(tokens), tokens)


def test_iti_coverage_of_tokens_that_are_all_alike():
    """After the first nothing is left to cover; the count is kept all the same, and of each image."""
    tokens = prompt(TWO)
    alike = dataclasses.replace(tokens, hidden=torch.ones_like(tokens.hidden))
    places = kept(TextRelevanceCut(budget=7, choice="coverage").cut(alike), alike)
    assert [TWO[at] for at in places] == ["0"] * 7 + ["1"] * 7


def test_iti_without_a_question_asks_the_last_token():
    tokens = prompt("st" + "0" * 20 + "s")
    assert not tokens.question.any()
    last = np.mean(slow_attention(tokens, 22), axis=0)
    assert question_attention(tokens)[0, :22].tolist() == pytest.approx(last[:22].tolist(), abs=1e-6)


def test_iti_says_that_it_is_a_reconstruction():
    for method in (ITI(), GSearch(budget=0.5), PSigmoid(), foveate.Compose(ITI(), foveate.FastV(layer=3))):
        assert any("reconstruction" in note for note in method.notes())
    assert "reconstruction" in (ITI.__doc__ or "") + ITI.reconstruction
    assert foveate.FastV().notes() == []


# -- schedules


def test_g_search_plans(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"rates": [1, 1, 0.5, 0.5, 0.25, 0.0, 0.0, 0.0]}))
    method = GSearch(plan=str(plan))
    assert method.cuts(8) == (2, 4, 5)
    counts = [len(kept(method.cut(tokens), tokens)) for tokens in (prompt(TWO, layer) for layer in (2, 4, 5))]
    assert counts == [20, 10, 0]
    assert GSearch(budget=0.25).cuts(8) == (2,)
    for wrong in ([1, 0.5, 0.6], [0.9, 0.5], [1, 2, 0], []):
        with pytest.raises(foveate.InputError, match="not increasing"):
            GSearch(rates=tuple(wrong))
    with pytest.raises(foveate.InputError, match="give one of them"):
        GSearch(rates=(1, 0.5), budget=0.25)
    assert GSearch(budget=10).cuts(8) == (2,)
    with pytest.raises(foveate.InputError, match="needs a plan"):
        GSearch()
    with pytest.raises(foveate.InputError, match="search on this model"):
        method.cuts(6)
    for text in ("[]", '{"rates": "100000"}', '{"rates": {"1": 2}}', '{"rates": [true]}'):
        plan.write_text(text)
        with pytest.raises(foveate.InputError, match="no plan"):
            GSearch(plan=str(plan))
    with pytest.raises(foveate.InputError, match="no plan"):
        GSearch(plan=str(tmp_path / "missing.json"))


@given(st.integers(4, 48), st.floats(0.01, 1.0), st.floats(0.05, 4.0), st.floats(0.0, 0.3))
@settings(max_examples=80, deadline=None)
def test_p_sigmoid_keeps_its_budget(layers, budget, steepness, low):
    method = PSigmoid(budget=budget, steepness=steepness, low=low)
    least = (2 + (layers - 2) * low) / layers
    if budget < least - 1e-9:
        with pytest.raises(foveate.InputError, match="mean over"):
            method.cuts(layers)
        return
    rates = method.keep_rates(layers, None)
    assert sum(rates) / layers == pytest.approx(budget, abs=1e-6)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates))
    assert rates[:2] == (1.0, 1.0)


def test_p_sigmoid_refuses_what_its_upper_end_cannot_give():
    with pytest.raises(foveate.InputError, match="between"):
        PSigmoid(budget=0.9, high=0.5).cuts(8)
    assert PSigmoid(budget=8, low=0.0).cuts(8) == tuple(range(2, 8))


def test_schedules_and_layers_are_checked():
    for build, fields in (
        (SparseVLM, dict(layers=())),
        (SparseVLM, dict(layers=(3, 1, 2))),
        (SparseVLM, dict(counts=(300, 200))),
        (SparseVLM, dict(layers=(1.5,))),
        (TextRelevanceCut, dict(layers=2)),
        (TextRelevanceCut, dict(layers=(2, 2))),
        (foveate.PyramidDrop, dict(layers=())),
        (foveate.YOPO, dict(window="5")),
        (VTCCls, dict(budget=3, layers=2.0)),
        (ITI, dict(second=1.5)),
        (ITI, dict(budget=1.0, second=0.5)),
        (ITI, dict(alpha=-1.0)),
    ):
        with pytest.raises(foveate.InputError):
            build(**fields)
    with pytest.raises(foveate.InputError, match=r"second=1\.5"):
        ITI(second=1.5)


def test_a_budget_over_several_layers_falls_by_equal_shares():
    method = TextRelevanceCut(layers=(1, 2, 4), budget=3)
    counts = [len(kept(method.cut(tokens), tokens)) for tokens in (prompt("t" + "0" * 24 + "ttt", at) for at in (1, 2, 4))]
    assert counts == [12, 6, 3]


def test_products_are_measured_from_their_lowest_point():
    random = torch.Generator().manual_seed(3)
    states = torch.randn(1, 65, 16, generator=random)
    tap = EncoderTap(torch.randn(1, 16), torch.randn(1, 65, 16), 2, states)
    visual = VisualTokens(torch.randn(1, 64, 16), (8, 8), {"last": tap})
    counts = [
        InflectionCut(similarity="dot", slope=slope, min_tokens=1).reduce(visual).index.shape[1] for slope in (0.1, 0.5, 1.0, 1.5)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_sparsevlm_rank_does_not_depend_on_padding():
    layout = "st" + "0" * 40 + "t" * 20
    for sharp in (0.03, 0.1, 1.0):
        counts = []
        for padding in (0, 300):
            tokens = prompt("_" * padding + layout, sharp=sharp)
            base = prompt(layout, sharp=sharp)
            query, keys, hidden = (
                torch.zeros_like(tokens.tap.query),
                torch.zeros_like(tokens.tap.keys),
                torch.zeros_like(tokens.hidden),
            )
            query[:, :, padding:], keys[:, :, padding:], hidden[:, padding:] = base.tap.query, base.tap.keys, base.start.hidden
            tap = dataclasses.replace(tokens.tap, query=query, keys=keys)
            tokens = dataclasses.replace(tokens, tap=tap, start=dataclasses.replace(tokens.start, hidden=hidden))
            counts.append(len(kept(SparseVLM(recycle=0).cut(tokens), tokens)))
        assert counts[0] == counts[1]


# -- VTC-CLS


def test_vtc_cls():
    random = torch.Generator().manual_seed(5)
    taps = {}
    for layer in (3, 4, 5):
        keys = torch.randn(2, 65, 16, generator=random)
        taps[layer] = EncoderTap(torch.randn(2, 16, generator=random), keys, 2)
    visual = VisualTokens(torch.randn(2, 64, 16), (8, 8), taps)
    reduction = VTCCls(budget=9, layers=3).reduce(visual)
    for b in range(2):
        total = np.sum([reference.attention_row(t.query[b], t.keys[b], 2, fused=False) for t in taps.values()], axis=0)
        assert reduction.index[b].tolist() == sorted(reference.best(total.tolist(), 9))
    alone = VisualTokens(visual.features, (8, 8), {5: taps[5]})
    assert torch.equal(VTCCls(budget=9, layers=1).reduce(alone).index, FasterVLM(budget=9).reduce(alone).index)
    assert torch.equal(FasterVLM(budget=9).reduce(alone).scores, cls_attention(taps[5]))


def test_vtc_cls_layers():
    """Layers 16 to 22 of 24, as in the code; FasterVLM the penultimate one."""
    assert VTCCls(budget=36).encoder_layers(24) == tuple(range(16, 23))
    assert FasterVLM(budget=36).encoder_layers(24) == (22,)
    for depth in range(1, 40):
        layers = VTCCls(budget=36).encoder_layers(depth)
        assert layers
        assert max(layers) == max(0, depth - 2)
    with pytest.raises(foveate.InputError, match="up to the penultimate"):
        VTCCls(budget=36, layers=24).encoder_layers(24)
