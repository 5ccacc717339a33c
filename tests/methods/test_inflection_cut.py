"""First stage of image-text interaction: how many tokens stay, and which."""

import math

import numpy as np
import pytest
import torch

import foveate
from foveate.lab.testset import TestSet
from foveate.methods.inflection_cut import InflectionCut, whole_grids
from foveate.methods.iti import ITI
from foveate.methods.tools.inflection import inflection_counts
from foveate.pictures import Pictures
from foveate.pocket.batches import normalise
from foveate.tokens import EncoderTap, VisualTokens

from .. import reference, selector_reference


@pytest.fixture
def visual() -> VisualTokens:
    """Two pictures of 12 x 12 tokens, attention a few of which get most of."""
    random = torch.Generator().manual_seed(5)
    taps = {}
    for name in ("last", "aligned"):
        keys, query = torch.randn(2, 145, 16, generator=random), 3 * torch.randn(2, 16, generator=random)
        taps[name] = EncoderTap(query, keys, 2)
    return VisualTokens(torch.randn(2, 144, 16, generator=random), (12, 12), taps)


def slow_scores(visual: VisualTokens, row: int) -> list[float]:
    """Geometric mean of both layers."""
    last, aligned = (
        reference.attention_row(visual.taps[name].query[row], visual.taps[name].keys[row], 2, fused=False)
        for name in ("last", "aligned")
    )
    return [math.sqrt(a * b) for a, b in zip(last, aligned, strict=True)]


def slow_knee(scores: list[float]) -> int:
    """How many tokens come before the point of the sorted logarithms that lies farthest below the chord, and that point."""
    curve = sorted((math.log(score) for score in scores), reverse=True)
    chord = [curve[0] + (curve[-1] - curve[0]) * place / (len(curve) - 1) for place in range(len(curve))]
    below = [on - value for on, value in zip(chord, curve, strict=True)]
    return below.index(max(below)) + 1


@pytest.mark.parametrize("choice", ["head", "coverage"])
def test_the_knee_says_how_many(visual, choice):
    reduction = InflectionCut(layer="both", detector="log-knee", min_tokens=1, choice=choice).reduce(visual)
    counts = []
    for row in range(2):
        scores = slow_scores(visual, row)
        assert reduction.scores[row].tolist() == pytest.approx(scores, rel=1e-4)
        counts.append(slow_knee(scores))
        weight = [score**0.3 for score in scores]
        wanted = reference.best(scores, counts[row])
        if choice == "coverage":
            wanted = selector_reference.scope(visual.features[row], weight, counts[row])
        assert reduction.index[row][reduction.mask()[row]].tolist() == sorted(wanted)
    assert 4 < min(counts) < max(counts) < 100


def test_no_attention_is_lost_in_logarithms(visual):
    """A score of 0 is no endless tail: it counts as a millionth of the highest one."""
    scores = torch.cat([torch.logspace(0, -3, 20), torch.full((60,), 1e-3)])[None]
    every = torch.ones_like(scores, dtype=torch.bool)
    assert inflection_counts(scores, every, "log-knee").item() == 20
    scores[0, -1] = 0
    assert inflection_counts(scores, every, "log-knee").item() == 20
    assert inflection_counts(torch.zeros(1, 9), torch.ones(1, 9, dtype=torch.bool), "log-knee").item() == 9


def test_whole_grids():
    counts = torch.tensor([1, 64, 65, 144, 145, 256, 257, 576])
    assert whole_grids(counts, (24, 24)).tolist() == [64, 64, 144, 144, 256, 256, 576, 576]
    assert whole_grids(torch.tensor([1, 7, 30]), (5, 7)).tolist() == [6, 12, 35]


def test_grids_round_the_rule_and_no_budget(visual):
    fields = dict(layer="both", detector="log-knee", min_tokens=1, whole_grid=True)
    plain = InflectionCut(**{**fields, "whole_grid": False}).reduce(visual).mask().sum(1)
    assert InflectionCut(**fields).reduce(visual).mask().sum(1).tolist() == whole_grids(plain, (12, 12)).tolist()
    assert InflectionCut(budget=23, **fields).reduce(visual).index.shape[1] == 23


def test_both_layers_are_a_mean_of_attentions():
    with pytest.raises(foveate.InputError, match="layer='last'"):
        InflectionCut(layer="both", similarity="cosine")
    with pytest.raises(foveate.InputError, match="layer='last'"):
        ITI(similarity="dot")


def test_the_abstract_word_by_word():
    """``paper()`` keeps the head of the curve in both stages, and text leaves, too."""
    front, (second,) = ITI.paper().before_decoder(), ITI.paper().inside_decoder()
    wanted = dict(similarity="attention", layer="last", detector="cumulative", slope=0.4, whole_grid=False, choice="head")
    assert {name: getattr(front, name) for name in wanted} == wanted
    assert (front.positions, second.positions, second.prune_text) == ("original", "original", True)
    assert (second.detector, second.slope, second.layers, second.budget) == ("cumulative", 1.0, (2,), None)
    assert second.choice == "head"


def test_a_budget_of_all_tokens_leaves_the_model_as_it_is():
    assert ITI(budget=1.0).acting(576) == [False]
    assert ITI(budget=64).layer_tokens(576, 6) == [64, 64, 47, 47, 47, 47]
    assert ITI().layer_tokens(576, 6) is None


def test_more_things_more_tokens():
    """On drawn scenes the count grows with the number of things. By the cumulative rule of the last layer it falls."""
    data = TestSet.draw(24, 5, "validation")
    pictures = Pictures(foveate.load_pocket()[0], pixel_values=normalise([scene.image for scene in data.scenes]))
    things = [len(scene.items) for scene in data.scenes]

    def correlation(method: foveate.Method) -> float:
        counts = [len(embeds) for embeds in pictures.reduce(method.before_decoder()).embeds]
        return float(np.corrcoef(counts, things)[0, 1])

    assert correlation(InflectionCut(layer="both", detector="log-knee")) > 0.7
    assert correlation(ITI()) > 0.5
    assert correlation(ITI.paper()) < 0
