"""PruMerge and PruMerge+ against slow references written from the paper and from the description of the released code (T5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.methods.prumerge import PruMerge
from foveate.methods.prumerge_plus import PruMergePlus
from foveate.methods.tools.selection import uniform_lattice
from foveate.tokens import EncoderTap, VisualTokens

from .. import reference

LAYERS = ("last", "aligned")


def tokens(images: int = 3, rows: int = 8, columns: int = 8, channels: int = 16, heads: int = 4, seed: int = 0) -> VisualTokens:
    """Random tokens with a few keys that [CLS] likes, a different number for each image."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    number = rows * columns
    taps = {}
    for layer in LAYERS:
        query, keys = random(images, channels), random(images, 1 + number, channels)
        for b in range(images):
            liked = torch.randperm(number, generator=generator)[: 2 + 3 * b] + 1
            keys[b, liked] += query[b] * 0.4
        taps[layer] = EncoderTap(query, keys, heads)
    return VisualTokens(random(images, number, channels), (rows, columns), taps)


def alone(visual: VisualTokens, b: int) -> VisualTokens:
    taps = {name: EncoderTap(t.query[b : b + 1], t.keys[b : b + 1], t.heads) for name, t in visual.taps.items()}
    return VisualTokens(visual.features[b : b + 1], visual.grid, taps)


def outputs(method: foveate.ProjectorReducer, visual: VisualTokens) -> list[tuple[list[int], torch.Tensor]]:
    """Per image: grid cells in output order, and output tokens."""
    reduction = method.reduce(visual)
    out, valid = reduction.apply(visual.features), reduction.mask()
    return [(reduction.index[b][valid[b]].tolist(), out[b][valid[b]]) for b in range(len(out))]


GRIDS = [(8, 8), (6, 9), (24, 24), (3, 3)]


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_released_equals_the_released_procedure(rows, columns, plus):
    visual = tokens(rows=rows, columns=columns)
    method = (PruMergePlus if plus else PruMerge).released()
    for b in range(3):  # the released code works on one image at a time
        ((cells, out),) = outputs(method, alone(visual, b))
        tap = visual.taps["last"]
        kept, expected = reference.released(visual.features[b], tap.query[b], tap.keys[b], tap.heads, plus)
        assert cells[: len(kept)] == kept, "attention order, uniform tokens behind"
        assert len(cells) == len(kept) + 1, "and one token for everything that was dropped"
        assert cells[-1] not in kept
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_released_pools_its_fence_over_the_batch():
    visual = tokens()
    tap = visual.taps["last"]
    pooled = [s for b in range(3) for s in reference.attention_row(tap.query[b], tap.keys[b], tap.heads, fused=True)]
    ratio = reference.outliers(pooled) / len(pooled)
    counts = [len(cells) - 1 for cells, _ in outputs(PruMerge.released(), visual)]
    assert counts == [int(64 * ratio)] * 3
    each = [len(cells) - 1 for cells, _ in outputs(PruMerge.released(iqr_scope="image"), visual)]
    assert len(set(each)) == 3, "one fence per image gives each image a count of its own"


def test_released_truncates_the_ratio_on_grids_that_are_no_square_of_two():
    # 27 x 27 tokens, as SigLIP has: int(N * (m / N)) loses one for some m
    lost = [m for m in range(1, 729) if int(729 * (m / 729)) == m - 1]
    method = PruMerge.released()
    for m in (lost[0], lost[5], 10):
        scores = torch.arange(729.0)[None] * 1e-7
        scores[0, :m] += 1
        assert method.outliers(scores)[0].item() == max(1, int(729 * (m / 729)))
    assert len(lost) == 49


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_paper_equals_algorithm_1(rows, columns, plus):
    visual = tokens(rows=rows, columns=columns)
    tap = visual.taps["aligned"]
    for b, (cells, out) in enumerate(outputs((PruMergePlus if plus else PruMerge).paper(), visual)):
        scores = reference.attention_row(tap.query[b], tap.keys[b], tap.heads, fused=False)
        m = max(1, reference.outliers(scores))
        pattern = uniform_lattice(rows, columns, m).tolist() if plus else None
        last = visual.taps["last"].keys[b]
        kept, expected = reference.paper(visual.features[b], tap.query[b], tap.keys[b], last, tap.heads, pattern)
        assert cells == kept
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_the_plain_constructor(rows, columns, plus):
    visual = tokens(rows=rows, columns=columns)
    tap, number = visual.taps["last"], rows * columns
    for b, (cells, out) in enumerate(outputs((PruMergePlus if plus else PruMerge)(), visual)):
        scores = reference.attention_row(tap.query[b], tap.keys[b], tap.heads, fused=False)
        m = max(4, reference.outliers(scores))
        pattern = uniform_lattice(rows, columns, round(min(0.25 * number, 3 * m))).tolist() if plus else []
        kept, expected = reference.plain(visual.features[b], tap.query[b], tap.keys[b], tap.heads, pattern, k=32, minimum=4)
        assert cells == kept
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("outliers", "centres"),
    [(16, 63), (24, 93), (32, 123), (36, 144), (40, 174), (48, 180), (52, 227), (60, 232), (68, 322), (72, 324), (96, 336)],
)
def test_the_published_staircase(outliers, centres):
    """Centres of the released PruMerge+ on 24 x 24, where as many outliers as expected by chance lie on the pattern."""
    number = 576
    pattern = reference.released_plus_pattern(number, outliers)
    overlap = round(len(pattern) * outliers / number)
    off = [cell for cell in range(number) if cell not in pattern]
    liked = pattern[:overlap] + off[: outliers - overlap]
    query = torch.ones(1, 16)
    keys = torch.randn(1, 1 + number, 16) * 0.01
    keys[0, torch.tensor(liked) + 1] += 1.5
    visual = VisualTokens(torch.randn(1, number, 16), (24, 24), {"last": EncoderTap(query, keys, 4)})
    ((cells, _),) = outputs(PruMergePlus.released(), visual)
    assert len(cells) == centres + 1


def test_more_than_97_outliers_keep_all_but_the_last_token():
    assert len(set(reference.released_plus_pattern(576, 97))) == 575
    scores = torch.zeros(1, 576)
    scores[0, :97] = 1 + torch.arange(97) * 0.01
    choice = PruMergePlus.released(iqr_scope="image").choose(scores, (24, 24), None)
    assert choice.kept.sum() == 575
    assert not choice.kept[0, 575]


def test_an_image_of_which_nothing_is_dropped_has_no_rest_token():
    """More than 97 outliers, the last token among them: everything stays, and the column of the rest token is empty."""
    query, keys = torch.ones(2, 16), torch.randn(2, 577, 16) * 0.01
    keys[0, -100:] += 1.5
    keys[1, 1:20] += 1.5
    visual = VisualTokens(torch.randn(2, 576, 16), (24, 24), {"last": EncoderTap(query, keys, 4)})
    reduction = PruMergePlus.released(iqr_scope="image").reduce(visual)
    assert reduction.mask().sum(1)[0] == 576
    assert reduction.mask().sum(1)[1] < 200


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("preset", ["plain", "paper", "released"])
def test_a_batch_equals_its_images(cls, preset):
    build = cls if preset == "plain" else getattr(cls, preset)
    visual = tokens()
    for fields in ({}, {"budget": 11}, {"budget": 0.5}):
        method = build(iqr_scope="image", **fields)
        for b, (cells, out) in enumerate(outputs(method, visual)):
            ((single, single_out),) = outputs(method, alone(visual, b))
            assert cells == single
            torch.testing.assert_close(out, single_out, atol=1e-6, rtol=1e-5)


def test_merge_false_copies_tokens():
    visual = tokens()
    for b, (cells, out) in enumerate(outputs(PruMergePlus(merge=False, append_rest=True), visual)):
        assert torch.equal(out, visual.features[b][cells])


def test_normalised_weights_sum_to_one_and_keep_constant_features():
    visual = tokens()
    method = PruMergePlus(append_rest=True)
    reduction = method.reduce(visual)
    sums = reduction.matrix(64).sum(-1)[reduction.mask()]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    constant = VisualTokens(torch.full_like(visual.features, 3.0), visual.grid, visual.taps)
    for _, out in outputs(method, constant):
        torch.testing.assert_close(out, torch.full_like(out, 3.0))


def test_pruned_pool_merges_only_dropped_tokens_and_all_pool_others_too():
    visual = tokens()
    for pool, expected in (("pruned", False), ("all", True)):
        reduction = PruMerge(neighbour_pool=pool, k=60, normalise_weights=False).reduce(visual)
        for b in range(3):
            kept = reduction.index[b][reduction.mask()[b]]
            rows = reduction.matrix(64)[b][reduction.mask()[b]][:, kept]
            assert bool((rows - torch.diag(torch.diag(rows)) != 0).any()) is expected


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    kind=st.sampled_from(["random", "constant", "one peak", "two values"]),
    plus=st.booleans(),
    preset=st.sampled_from(["plain", "paper", "released"]),
    budget=st.one_of(st.none(), st.integers(1, 90), st.floats(0.01, 1.0)),
    k=st.integers(1, 40),
)
def test_any_grid_any_scores_any_budget(rows, columns, kind, plus, preset, budget, k):
    """One token, ties, no outliers, fewer tokens than neighbours: never fails, never keeps nothing, counts are as promised."""
    number = rows * columns
    query, keys = torch.ones(2, 8), torch.zeros(2, 1 + number, 8)
    if kind == "random":
        keys = torch.randn(2, 1 + number, 8)
    elif kind == "one peak":
        keys[:, 1] = 2.0
    elif kind == "two values":
        keys[:, 1::2] = 1.0
    visual = VisualTokens(torch.randn(2, number, 8), (rows, columns), dict.fromkeys(LAYERS, EncoderTap(query, keys, 2)))
    cls = PruMergePlus if plus else PruMerge
    method = (cls if preset == "plain" else getattr(cls, preset))(k=k, budget=budget)
    if foveate.tokens.resolve_budget(budget, number) == number:
        return  # the engine then leaves the image alone
    for cells, out in outputs(method, visual):
        assert len(set(cells)) == len(cells) == len(out) >= 1
        assert torch.isfinite(out).all()
        if budget is not None:
            assert len(cells) == foveate.tokens.resolve_budget(budget, number)
        elif preset == "plain":
            assert len(cells) >= min(4, number)


@pytest.mark.parametrize("fields", [{"budget": 13}, {"budget": 0.25}, {"budget": 13, "merge": False}])
@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("preset", ["plain", "paper", "released"])
def test_fixed_budgets_need_no_value_from_the_device(cls, preset, fields):
    """No host synchronisation: on the meta device tensors have no values, and reading one raises."""
    visual = tokens()
    taps = {name: EncoderTap(tap.query.to("meta"), tap.keys.to("meta"), tap.heads) for name, tap in visual.taps.items()}
    method = (cls if preset == "plain" else getattr(cls, preset))(**fields)
    reduction = method.reduce(VisualTokens(visual.features.to("meta"), visual.grid, taps))
    assert reduction.valid is None
    assert reduction.apply(visual.features.to("meta")).shape == (3, foveate.tokens.resolve_budget(method.budget, 64), 16)
    with pytest.raises((RuntimeError, NotImplementedError)):
        type(method)().reduce(VisualTokens(visual.features.to("meta"), visual.grid, taps))  # adaptive counts do read one


def test_wrong_fields_are_refused():
    for fields in ({"k": 0}, {"min_tokens": 0}, {"order": "random"}, {"attn_mode": "max"}):
        with pytest.raises(foveate.InputError):
            PruMerge(**fields)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(foveate.InputError, match="max_uniform"):
            PruMergePlus(max_uniform=share)
    for factor in (0, -1.0, math.nan):
        with pytest.raises(foveate.InputError, match="grid_factor"):
            PruMergePlus(grid_factor=factor)
