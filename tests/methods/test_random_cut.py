"""A random choice inside the decoder: a function of the place in the image alone."""

from __future__ import annotations

import torch

import foveate
from foveate.methods.random_cut import RandomCut

from .. import zoo


def kept(model, inputs, **fields) -> list[set[int]]:
    with RandomCut(budget=20, **fields)(model) as session:
        model(**inputs)
    return [
        set(image.stages[1]) if isinstance(image.stages, dict) else set(image.stages[-1].kept) for image in session.report.images
    ]


def test_all_images_of_one_size_lose_the_same_places():
    model, inputs = zoo.load(), zoo.batch()
    found = kept(model, inputs)
    assert all(each == found[0] for each in found)
    assert len(found[0]) == 20
    other = kept(model, inputs, seed=1)
    assert other[0] != found[0]
    assert all(0 < sum(at < zoo.TOKENS // 2 for at in each) < 20 for each in (found[0], other[0]))


def test_the_choice_does_not_depend_on_how_many_are_drawn():
    """Of which pictures of several sizes in one batch make use."""
    draws = [torch.rand(number, generator=torch.Generator().manual_seed(3)) for number in (3, 15, 16, 17, 1000)]
    assert all(torch.equal(draws[-1][: len(draw)], draw) for draw in draws)


def test_it_is_measured_as_the_mean_of_seeds():
    assert [method.seed for method in foveate.get("random-cut").repeats()] == [0, 1, 2]
    assert foveate.get("random-cut", budget=10, layer=3).layer_tokens(64, 6) == [64, 64, 64, 10, 10, 10]
