"""Methods that decide over whole videos, on every family with videos: counts by frame, positions, batches, reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.engine.vision.videos import by_frame
from foveate.tokens import Reduction, VisualTokens

from ... import families
from ... import family_reference as by_hand
from .test_family_videos import MOVING

NEW = 4
NAMES = [info.name for info in foveate.methods() if foveate.methods.registry.look_up(info.name)[0].__dict__.get("whole_video")]


def prompt(family: str, seed: int = 3) -> tuple[dict[str, Tensor], list[int]]:
    """Inputs of one row with a video, and which of its placeholders are cells of a grid."""
    medium = MOVING[family]
    ids = families.prompt(family, [medium], before=2, after=3, seed=seed)
    inputs = families.inputs_of(family, [ids], [[(medium, families.pixels(family, medium, seed=seed))]])
    (places,) = families.SPECS[family].lay(medium, 0).items
    return inputs, [at for at, place in enumerate(places) if place.kind == "cell"]


def test_they_are_known():
    assert {"evs", "vidcom2", "v-cast", "flashvid"} <= set(NAMES)


@pytest.mark.parametrize("family", MOVING)
def test_evs_equals_a_loop_over_what_the_model_makes_of_the_video(family):
    model, (inputs, cells) = families.load(family), prompt(family)
    features, _ = by_hand.whole_features(model, inputs)
    states = torch.nn.functional.normalize(features[cells].float(), dim=-1)
    with foveate.EVS(budget=0.6)(model) as session:
        model(**inputs)
    frames = len(session.report.images)
    each = len(cells) // frames
    score = dict.fromkeys(range(each), 9.0)
    score |= {at: float(1 - states[at] @ states[at - each]) for at in range(each, len(cells))}
    expected = sorted(sorted(score, key=lambda at: (-score[at], at))[: round(0.6 * len(cells))])
    assert sorted(set(session.report.kept[0]) & set(cells)) == [cells[at] for at in expected]
    by_frame = [sum(at // each == frame for at in expected) for frame in range(frames)]
    assert [image.after for image in session.report.images] == by_frame
    assert len(set(by_frame)) > 1


def recorded(monkeypatch, kind):
    """What a method sees and what it returns."""
    found, reduce = [], kind.reduce

    def recording(self, tokens):
        found.append((tokens, reduce(self, tokens)))
        return found[-1][1]

    monkeypatch.setattr(kind, "reduce", recording)
    return found


def merger(model, tokens, cells, index, shares, kept):
    """What gives features as merging leaves them, at the placeholders ``kept``; what is no cell stays as it is."""

    def left(values):
        values, features = values.clone(), tokens.features[0]
        before = features.shape[-1] != values.shape[-1]  # the projector
        merged = model.model.multi_modal_projector(shares @ features) if before else shares @ values[cells]
        values[[cells[at] for at in index]] = merged
        return values[kept]

    return left


class TemporalMean(foveate.ProjectorReducer, name="temporal-mean", listed=False):
    """The mean of each cell over the frames: the left half of them stands in the first frame, the right half in the last one."""

    whole_video = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        each, columns = tokens.number // tokens.frames, tokens.grid[1]
        cell = torch.arange(each)
        first = cell % columns < columns // 2
        index = torch.where(first, cell, cell + tokens.number - each)
        weights = torch.eye(each).repeat(1, tokens.frames)[index.argsort()] / tokens.frames
        index = index.sort().values
        return Reduction(index.expand(len(tokens.features), -1), weights=weights.expand(len(tokens.features), -1, -1))


@pytest.mark.parametrize("family", MOVING)
def test_tokens_merged_over_frames(family, monkeypatch):
    model, (inputs, cells) = families.load(family), prompt(family)
    found = recorded(monkeypatch, TemporalMean)
    with TemporalMean()(model) as session:
        output = families.generate(model, inputs, NEW)
    images, kept = session.report.images, session.report.kept[0]
    each, columns, last = images[0].grid[0] * images[0].grid[1], images[0].grid[1], len(images) - 1
    left = [cell for cell in range(each) if cell % columns < columns // 2]
    right = [cell for cell in range(each) if cell % columns >= columns // 2]
    assert [image.kept for image in images] == [left, *[[]] * (last - 1), right]
    assert images[0].source == [left.index(cell) if cell in left else -2 for cell in range(each)]
    assert images[last].source == [right.index(cell) if cell in right else -2 for cell in range(each)]
    assert all(image.source == [-2] * each for image in images[1:last]), "frames that keep nothing were merged into others"
    index = [*left, *(last * each + cell for cell in right)]
    shares = torch.tensor([[float(at % each == cell % each) for at in range(len(cells))] for cell in index]) / len(images)
    merging = merger(model, found[0][0], cells, index, shares, kept)
    features, deep = by_hand.whole_features(model, inputs)
    spliced = by_hand.splice(family, model, inputs, kept, merging(features), compact=True, deep=[merging(layer) for layer in deep])
    wanted = by_hand.logits(model, spliced, output.sequences[0, -NEW:].tolist())
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], wanted, atol=3e-4, rtol=3e-4)


def test_merged_elsewhere_and_dropped():
    """Three frames of two tokens: the first token takes in the third, the last one the second; the other two are dropped."""
    weights = torch.zeros(1, 2, 6)
    weights[0, 0, [0, 2]] = weights[0, 1, [5, 1]] = 0.5
    reduction = Reduction(torch.tensor([[0, 5]]), weights=weights)
    framed = by_frame("mine", reduction, torch.zeros(1, 2, 4), 3, torch.arange(6).view(3, 2))
    assert framed.reduction.source_map(2).tolist() == [[0, -2], [-2, -1], [-1, 0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", MOVING)
def test_answers_are_those_of_a_prompt_with_these_tokens_only(family, name, monkeypatch):
    model, (inputs, cells) = families.load(family), prompt(family)
    method = foveate.get(name, budget=0.4)
    found = recorded(monkeypatch, type(method))
    with method(model) as session:
        output = families.generate(model, inputs, NEW)
    report = session.report
    kept = report.kept[0]
    assert len(set(kept) & set(cells)) == round(0.4 * len(cells))
    assert kept == sorted(kept)
    ((tokens, reduction),) = found
    left = merger(model, tokens, cells, reduction.index[0].tolist(), reduction.matrix(len(cells))[0], kept)
    features, deep = by_hand.whole_features(model, inputs)
    spliced = by_hand.splice(family, model, inputs, kept, left(features), compact=True, deep=[left(layer) for layer in deep])
    wanted = by_hand.logits(model, spliced, output.sequences[0, -NEW:].tolist())
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], wanted, atol=3e-4, rtol=3e-4)


class FirstOfLast(foveate.ProjectorReducer, name="first-of-last", listed=False):
    """Keeps cells of the last frame alone."""

    whole_video = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        each = tokens.number // tokens.frames
        assert each == tokens.grid[0] * tokens.grid[1]
        last = torch.arange(tokens.number - each, tokens.number - each + 3, device=tokens.features.device)
        return Reduction(last.expand(len(tokens.features), -1), scores=tokens.features.float().norm(dim=-1))


@pytest.mark.parametrize("family", MOVING)
def test_frames_may_keep_nothing(family):
    model, (inputs, cells) = families.load(family), prompt(family)
    with FirstOfLast(budget=3)(model) as session:
        families.generate(model, inputs, NEW)
    report = session.report
    images = report.images
    each = len(cells) // len(images)
    assert [image.after for image in images] == [0] * (len(images) - 1) + [3]
    assert {number for image in images[:-1] for number in image.source} == {-1}, "dropped, not merged"
    assert set(report.kept[0]) & set(cells) == set(cells[-each:][:3])
    assert report.to_dict()["images"]


@pytest.mark.parametrize("name", [name for name in NAMES if foveate.get(name, budget=0.4).reads_projected])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_projection_that_is_not_finite(name, value):
    """Also where only what a method chooses by is broken, and not what it keeps."""
    method, (inputs, _) = foveate.get(name, budget=0.4), prompt("video_llava")
    model, calls = families.load("video_llava"), []

    def broken(_module, _inputs, out):
        calls.append(out)
        return torch.where(torch.arange(out.shape[-1]) == 3, value, out) if len(calls) == 1 else out

    hook = model.model.multi_modal_projector.register_forward_hook(broken)
    try:
        with pytest.raises(foveate.InputError, match="NaN or infinite"):
            foveate.encode(model, method, **inputs)
    finally:
        hook.remove()


def test_what_cannot_be_done():
    family = next(iter(MOVING))
    model, (inputs, _) = families.load(family), prompt(family)
    with foveate.EVS(budget=0.5, temporal=0.9)(model), pytest.raises(foveate.InputError, match="Leave temporal out"):
        model(**inputs)

    class Made(foveate.ProjectorReducer, name="made-of-video", listed=False):
        whole_video = True

        def reduce(self, tokens: VisualTokens) -> Reduction:
            made = tokens.features.mean(1, keepdim=True)
            return Reduction(torch.zeros(len(made), 1, dtype=torch.long), made=made)

    with Made(budget=1)(model), pytest.raises(foveate.FoveateError, match="cannot tell by frames"):
        model(**inputs)
