"""Shared vocabulary of methods, baselines, registry, budgets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.methods.registry import REGISTRY
from foveate.methods.tools.merging import nearest_neighbours
from foveate.methods.tools.scoring import cls_attention
from foveate.methods.tools.selection import iqr_fence, ranks, take_in_order, uniform_lattice, uniform_stride
from foveate.tokens import EncoderTap, Reduction, VisualTokens, resolve_budget

from .. import reference, zoo


def visual(rows: int = 6, columns: int = 8, images: int = 2) -> VisualTokens:
    return VisualTokens(torch.randn(images, rows * columns, 4), (rows, columns))


@pytest.mark.parametrize("heads", ["fused", "per_head_mean"])
def test_cls_attention_is_one_row_of_the_full_attention(heads):
    query, keys = torch.randn(2, 12), torch.randn(2, 10, 12)
    scores = cls_attention(EncoderTap(query, keys, 3), heads)
    for b in range(2):
        expected = reference.attention_row(query[b], keys[b], 3, fused=heads == "fused")
        np.testing.assert_allclose(scores[b], expected, rtol=1e-5)


@pytest.mark.parametrize("layer", ["last", "aligned", 0, -3])
def test_the_taps_hold_what_the_encoder_computes(layer):
    """Against the attention weights of an eager encoder, which the package itself never asks for."""
    model = zoo.load(attn="eager")
    pixels = zoo.pictures(3)

    class Probe(foveate.Sequential):
        def encoder_layers(self, depth):
            return (layer,)

        def reduce(self, tokens):
            self.seen = cls_attention(tokens.taps[layer])
            return super().reduce(tokens)

    probe = Probe(budget=3)
    foveate.encode(model, probe, **zoo.pad([zoo.prompt(1, 2, 2, s) for s in range(3)]), pixel_values=pixels)
    attentions = model.model.vision_tower(pixels, output_attentions=True).attentions
    index = {"last": -1, "aligned": -2}.get(layer, layer)
    torch.testing.assert_close(probe.seen, attentions[index][:, :, 0, 1:].mean(1), atol=1e-6, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.floats(0, 3))
def test_iqr_fence_is_numpys(scores, factor):
    q1, q3 = np.percentile(np.array(scores, np.float64), [25, 75])
    fence = iqr_fence(torch.tensor([scores], dtype=torch.float64), factor)
    np.testing.assert_allclose(fence.item(), q3 + factor * (q3 - q1), rtol=1e-6, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_ranks_give_ties_to_the_earlier_token(values):
    expected = [sorted(range(len(values)), key=lambda i: (-values[i], i)).index(n) for n in range(len(values))]
    assert ranks(torch.tensor([values], dtype=torch.float32))[0].tolist() == expected


def test_take_in_order():
    key = torch.tensor([[5, 0, 9, 8, 3], [10, 10, 1, 10, 10]])
    index, valid = take_in_order(key, 3)
    assert index[0].tolist() == [1, 4, 0]
    assert valid.tolist() == [[True] * 3, [True, False, False]]
    assert index[1, 0] == 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 900))
def test_uniform_lattice_is_even_on_any_grid(rows, columns, count):
    cells = uniform_lattice(rows, columns, count)
    assert len(cells) == len(set(cells.tolist())) == min(count, rows * columns)
    assert cells.tolist() == sorted(cells.tolist())
    if len(cells):
        assert 0 <= cells.min() <= cells.max() < rows * columns
        per_row = torch.bincount(cells // columns, minlength=rows)  # rows that hold cells share them evenly
        used = per_row[per_row > 0]
        assert used.max() - used.min() <= 1


def test_uniform_lattice_of_a_square_number_is_the_regular_pattern():
    cells = uniform_lattice(24, 24, 64)
    assert sorted(set((cells // 24).tolist())) == sorted(set((cells % 24).tolist())) == list(range(1, 24, 3))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 300))
def test_uniform_stride(tokens, count):
    cells = uniform_stride(tokens, min(count, tokens)).tolist()
    assert len(set(cells)) == len(cells) == min(count, tokens)
    assert all(0 <= cell < tokens for cell in cells)


def test_nearest_neighbours_never_leave_the_allowed_tokens():
    keys, index = torch.randn(2, 7, 5), torch.tensor([[0, 1, 6], [2, 4, 5]])
    allowed = torch.zeros(2, 7, dtype=torch.bool)
    allowed[:, [1, 4]] = True
    near, real = nearest_neighbours(keys, index, allowed, "cosine", 5)
    for b in range(2):
        for m, own in enumerate(index[b].tolist()):
            assert set(near[b, m][real[b, m]].tolist()) == {1, 4} - {own}
    assert not nearest_neighbours(keys, index, allowed & False, "dot", 5)[1].any()
    near, real = nearest_neighbours(keys, index, allowed | True, "dot", 4)
    assert real.all()
    products = (keys @ keys.mT).masked_fill(torch.eye(7, dtype=torch.bool), float("-inf"))
    assert torch.equal(near, products.gather(1, index[..., None].expand(-1, -1, 7)).topk(4).indices)


def test_links_are_the_matrix_that_they_stand_for():
    """Sums, their gradients and the source map, with links that lead nowhere and outputs without links."""
    sources, into = torch.tensor([[3, 0, 1, 3, 2], [0, 1, 2, 3, 4]]), torch.tensor([[0, 0, 2, 2, 3], [0, 1, 1, 2, 2]])
    weights = torch.tensor([[0.5, 0.25, 1.0, 0.75, 9.0], [1.0, 0.0, 0.5, 0.5, 0.5]])
    index, valid = torch.tensor([[3, 4, 1], [0, 2, 4]]), torch.tensor([[True, True, True], [True, True, False]])
    links = Reduction(index, valid, weights, sources=sources, into=into)
    matrix = links.matrix(5)
    assert matrix[0].tolist() == [[0.25, 0, 0, 0.5, 0], [0] * 5, [0, 1, 0, 0.75, 0]]
    dense = Reduction(index, valid, matrix)
    assert torch.equal(links.source_map(5), dense.source_map(5))
    assert links.source_map(5).tolist() == [[0, 2, -1, 0, 1], [0, -1, 1, -1, -1]]
    for dtype in (torch.float32, torch.float64):
        features = torch.randn(2, 5, 4, dtype=dtype, requires_grad=True)
        gradients = []
        for reduction in (links, dense):
            torch.testing.assert_close(reduction.apply(features), (matrix.to(dtype) @ features), atol=1e-6, rtol=1e-6)
            gradients += torch.autograd.grad(reduction.apply(features).square().sum(), features)
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    half = torch.randn(2, 5, 4).bfloat16()
    torch.testing.assert_close(links.apply(half).float(), matrix @ half.float(), atol=0.05, rtol=0.02)
    assert torch.equal(Reduction(index).matrix(5), torch.eye(5)[index])


def test_baselines():
    tokens = visual()
    sequential = foveate.Sequential(budget=5).reduce(tokens)
    assert sequential.index.tolist() == [[0, 1, 2, 3, 4]] * 2
    shaped = foveate.Spatial(shape=(2, 3)).reduce(tokens)
    assert shaped.index[0].tolist() == [1 * 8 + 1, 1 * 8 + 4, 1 * 8 + 6, 4 * 8 + 1, 4 * 8 + 4, 4 * 8 + 6]
    one, again, other = (foveate.Random(budget=9, seed=s).reduce(tokens).index for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one[0].tolist() == sorted(set(one[0].tolist()))


def test_pool_is_average_pooling():
    tokens = visual(6, 8)
    pooled = foveate.Pool(budget=12).reduce(tokens)
    features = tokens.features.transpose(1, 2).reshape(2, 4, 6, 8)
    expected = torch.nn.functional.avg_pool2d(features, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled.apply(tokens.features), expected)
    torch.testing.assert_close(pooled.matrix(48).sum(-1), torch.ones(2, 12))
    assert ((pooled.matrix(48) > 0).sum(1) == 1).all(), "every token goes to exactly one"


@pytest.mark.parametrize("shape", [(0, 3), (3,), (1, 2, 3)])
def test_spatial_refuses_impossible_shapes(shape):
    with pytest.raises(foveate.InputError, match="shape"):
        foveate.Spatial(shape=shape)
    with pytest.raises(foveate.InputError, match="does not fit"):
        foveate.Spatial(shape=(7, 7)).reduce(visual(6, 8))


@pytest.mark.parametrize(("budget", "kept"), [(None, None), (1, 1), (99, 64), (1.0, 64), (0.5, 32), (0.001, 1), (np.int64(7), 7)])
def test_budgets(budget, kept):
    assert resolve_budget(budget, 64) == kept


@pytest.mark.parametrize("budget", [0, -3, 0.0, -0.5, 1.5, 2.0, math.nan, math.inf, True, False, "12", [3]])
def test_bad_budgets_say_what_to_use(budget):
    for make in (lambda: foveate.PruMerge(budget=budget), lambda: foveate.get("spatial", budget=budget)):
        with pytest.raises(foveate.InputError, match="int >= 1"):
            make()


def test_registry_errors_name_what_exists():
    with pytest.raises(foveate.InputError, match=r"unknown method 'prune' .*; available: .*prumerge"):
        foveate.get("prune")
    with pytest.raises(foveate.InputError, match=r"no field 'ratio'; its fields: .*budget"):
        foveate.get("prumerge", ratio=0.5)
    with pytest.raises(foveate.InputError, match="no preset 'best'; available: paper, released"):
        foveate.get("prumerge:best")
    with pytest.raises(foveate.InputError, match="no rule of its own"):
        foveate.get("random")


def test_a_method_registers_itself_by_being_defined():
    class Corner(foveate.ProjectorReducer, name="test-corner", paper="here"):
        def reduce(self, tokens):
            return Reduction(torch.zeros(len(tokens.features), 1, dtype=torch.long))

    try:
        assert isinstance(foveate.get("test-corner"), Corner)
        model = zoo.load()
        with foveate.get("test-corner")(model) as session:
            model.generate(**zoo.batch(), max_new_tokens=1)
            assert session.report.after == [1] * 4
        with pytest.raises(foveate.InputError, match="already registered"):

            class Another(foveate.ProjectorReducer, name="test-corner"):
                pass
    finally:
        REGISTRY.pop("test-corner")


def test_a_method_that_breaks_the_contract_is_caught():
    class Nothing(foveate.ProjectorReducer):
        def reduce(self, tokens):
            index = torch.zeros(len(tokens.features), 1, dtype=torch.long)
            return Reduction(index, torch.zeros_like(index, dtype=torch.bool))

    class Outside(foveate.ProjectorReducer):
        def reduce(self, tokens):
            return Reduction(torch.full((len(tokens.features), 1), tokens.number - 1), scores=None, weights=None)

    model = zoo.load()
    with pytest.raises(foveate.FoveateError, match="kept no token"):
        foveate.encode(model, Nothing(), **zoo.batch())
    assert foveate.encode(model, Outside(), **zoo.batch()).embeds[0].shape == (1, 64)
    with pytest.raises(TypeError, match="does not implement"):
        foveate.encode(model, foveate.ProjectorReducer(), **zoo.batch())


def returning(base, name, value):
    """A method of somebody else's whose one function returns this."""
    return type("Theirs", (base,), {"cuts": lambda self, layers: (2,), name: lambda self, given: value(given)})(budget=0.5)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda index: None, "Theirs returned NoneType and no foveate.Reduction"),
        (lambda index: Reduction(index.int()), "int64"),
        (lambda index: Reduction(index[0]), "int64"),
        (lambda index: Reduction(index[:1]), r"shape \[4, tokens kept\]"),
        (lambda index: Reduction(index.tolist()), "int64"),
        (lambda index: Reduction(index + 900), "cannot be applied to 64 tokens"),
        (lambda index: Reduction(index, valid=index), r"Reduction.valid has to be a bool tensor of shape \[4, 3\]"),
        (
            lambda index: Reduction(index, weights=torch.ones(4, 2, 64)),
            r"Reduction.weights has to be a tensor of shape \[4, 3, 64\]",
        ),
        (lambda index: Reduction(index, scores=torch.ones(4, 3)), r"Reduction.scores has to be a tensor of shape \[4, 64\]"),
        (lambda index: Reduction(index, threshold=0.5), r"Reduction.threshold has to be a tensor of shape \[4\]"),
        (lambda index: Reduction(index, made=torch.ones(4, 3, 48), space="x"), "expected 'features' or 'decoder'"),
    ],
)
def test_what_is_no_reduction(value, match):
    method = returning(foveate.ProjectorReducer, "reduce", lambda tokens: value(torch.arange(3).expand(len(tokens.features), -1)))
    with pytest.raises(foveate.FoveateError, match=match), method(zoo.load()) as session:
        session.model.generate(**zoo.batch(), max_new_tokens=1)


@pytest.mark.parametrize(
    ("function", "value", "match"),
    [
        ("cut", lambda tokens: None, "Theirs returned no Cut"),
        ("cut", lambda tokens: foveate.Cut(tokens.valid[:, :3]), "Theirs returned no Cut"),
        ("cut", lambda tokens: foveate.Cut(tokens.valid, scores=torch.ones(3)), "Cut.scores have to be"),
        ("cuts", lambda layers: None, r"cuts\(layers\) returned None; expected"),
        ("cuts", lambda layers: "2", r"cuts\(layers\) returned '2'; expected"),
        ("cuts", lambda layers: (2.0,), "numbers of decoder layers"),
    ],
)
def test_what_is_no_cut(function, value, match):
    with (
        pytest.raises(foveate.FoveateError, match=match),
        returning(foveate.DecoderReducer, function, value)(zoo.load()) as session,
    ):
        session.model.generate(**zoo.batch(), max_new_tokens=1)


def test_methods_lists_every_method_with_its_paper():
    table = {info.name: info for info in foveate.methods()}
    assert {"prumerge", "prumerge+", "random", "spatial", "sequential", "pool"} <= set(table)
    assert table["prumerge"].reads_cls
    assert not table["pool"].reads_cls
    assert table["prumerge+"].presets == ("paper", "released")
    ours = {"fovea"}  # whose page says how it works
    assert all(info.paper.startswith("https://arxiv.org/") for name, info in table.items() if name not in ours)
    assert all(info.paper.startswith("https://") and info.summary for info in table.values())


def test_source_map_of_a_merge():
    weights = torch.tensor([[[1.0, 0.2, 0.0, 0.0], [0.0, 0.3, 0.0, 1.0]]])
    reduction = Reduction(torch.tensor([[0, 3]]), weights=weights)
    assert reduction.source_map(4).tolist() == [[0, 1, -1, 1]]
    half = Reduction(torch.tensor([[0, 3]]), torch.tensor([[True, False]]), weights)
    assert half.source_map(4).tolist() == [[0, 0, -1, -1]]


@pytest.mark.parametrize(
    "fields",
    [
        dict(k=2.5),
        dict(k=True),
        dict(k="3"),
        dict(k=0),
        dict(include_self="no"),
        dict(iqr_factor="x"),
        dict(iqr_factor=float("nan")),
        dict(iqr_factor=-1.0),
        dict(min_tokens=2.5),
        dict(similarity="euclid"),
    ],
)
def test_fields_are_checked_when_a_method_is_built(fields):
    with pytest.raises(foveate.InputError, match=next(iter(fields))):
        foveate.PruMerge(**fields)


def test_numbers_of_numpy_are_numbers():
    method = foveate.PruMergePlus(budget=np.int64(5), k=np.int32(3))
    assert json.dumps(method.settings()["budget"]) == "5"
    assert foveate.Spatial(budget=np.float32(0.5)).budget == 0.5
