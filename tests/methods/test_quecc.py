"""QueCC: against a loop over regions, what a token may depend on, how the question is read, training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import foveate
from foveate.methods import quecc
from foveate.methods.networks.compressor import Compressor, level_layers, new_pictures, regions
from foveate.methods.quecc import QueCC
from foveate.methods.tools.strides import strides_of
from foveate.tokens import EncoderTap, Question, VisualTokens

from .. import zoo
from ..trained_methods import slopes

READERS = ("decoder", "embeddings", "none")
GRID, CHANNELS, DECODER, LEVELS, ROWS = (6, 8), 32, 24, 3, 3
CELLS = GRID[0] * GRID[1]


def shape(**changes) -> foveate.ModelShape:
    sizes = dict(model_type="llava", features=CHANNELS, width=DECODER, encoder_width=CHANNELS, encoder_heads=4, encoder_layers=4)
    return foveate.ModelShape(**{**sizes, "feature_layer": LEVELS - 1, "decoder_layers": 4, "grid": GRID, **changes})


def made(reader="none", stride=2, seed=0, **fields) -> QueCC:
    """A method with random weights, for tokens as ``drawn`` makes them."""
    method = QueCC(reader=reader, stride=stride, **fields).fresh(seed)
    torch.manual_seed(seed)
    method._state.module = method.build(shape()).eval()
    return method


def drawn(seed=0, rows=ROWS) -> VisualTokens:
    random = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(rows, *sizes, generator=random)

    taps = {layer: EncoderTap(draw(CHANNELS), draw(1 + CELLS, CHANNELS), 4, draw(1 + CELLS, CHANNELS)) for layer in range(LEVELS)}
    text, valid = draw(5, DECODER), torch.arange(5) < torch.tensor([[5], [2], [3]])[:rows]
    return VisualTokens(draw(CELLS, CHANNELS), GRID, taps, question=Question(None, text, valid, state=draw(DECODER)))


@torch.no_grad()
def by_hand(method: QueCC, tokens: VisualTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, T, C] and attention [B, T, N], region by region and head by head."""
    module, stride, (rows, columns) = method.module, method.stride, tokens.grid
    heads, inner = method.heads, CHANNELS // method.heads
    (wq, wk, wv), (bq, bk, bv) = module.clip_attn.in_proj_weight.chunk(3), module.clip_attn.in_proj_bias.chunk(3)
    outputs, attention = [], []
    for row in range(len(tokens.features)):
        x = tokens.features[row]
        if method.reader == "decoder":
            x = x + module.text_projection(tokens.question.state[row])
        elif method.reader == "embeddings":
            x = x + module.text_projection(tokens.question.text[row][tokens.question.valid[row]].mean(0))
        levels = torch.cat([tokens.taps[layer].states[row, 1:] for layer in range(LEVELS)], 1)
        query, key, value = module.q_proj(x), module.k_proj(levels), module.v_proj(levels)
        for top in range(0, rows, stride):
            for left in range(0, columns, stride):
                cells = [(top + i) * columns + left + j for i in range(stride) for j in range(stride)]
                kernel = module.q_downsample.weight.view(CHANNELS, -1)
                mine = sum(kernel[:, k] * query[cell] for k, cell in enumerate(cells)) + module.q_downsample.bias
                q, joined, shares = wq @ mine + bq, [], torch.zeros(CELLS)
                for head in range(heads):
                    part = slice(head * inner, (head + 1) * inner)
                    keys = torch.stack([(wk @ key[cell] + bk)[part] for cell in cells])
                    values = torch.stack([(wv @ value[cell] + bv)[part] for cell in cells])
                    weights = (keys @ q[part] / math.sqrt(inner)).softmax(0)
                    shares[cells] += weights / heads
                    joined.append(weights @ values)
                outputs.append(module.clip_attn.out_proj(torch.cat(joined)))
                attention.append(shares)
    return torch.stack(outputs).view(ROWS, -1, CHANNELS), torch.stack(attention).view(ROWS, -1, CELLS)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reader", READERS)
def test_a_loop_over_regions(reader, stride):
    method, tokens = made(reader, stride), drawn()
    reduction = method.reduce(tokens)
    outputs, attention = by_hand(method, tokens)
    torch.testing.assert_close(reduction.made, outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reduction.attention, attention, atol=1e-5, rtol=1e-5)


def test_numbers_of_the_released_sizes():
    """Weights at CLIP-L and a 7B model, and on the pocket model; levels are hidden states 12, 16, 22 and 23 of CLIP-L."""
    assert [layer + 1 for layer in level_layers(22)] == [12, 16, 22, 23]
    assert level_layers(4) == (1, 2, 3, 4)
    assert level_layers(5) == (1, 2, 3, 5)
    assert (level_layers(0), level_layers(1), level_layers(2)) == ((0,), (0, 1), (0, 1, 2))

    def count(*sizes):
        return sum(weight.numel() for weight in Compressor(*sizes).parameters())

    assert [count(128, 128, 192, (1, 2, 3, 4), stride, 4) for stride in (4, 6, 3)] == [291_328, 293_888, 290_432]
    with torch.device("meta"):
        assert round(count(1024, 1024, 4096, (11, 15, 21, 22), 4, 8) / 1e6, 1) == 21.0


@pytest.mark.parametrize("stride", [1, 2])
def test_one_token_for_each_region(stride):
    method, tokens = made(stride=stride), drawn()
    reduction = method.reduce(tokens)
    number = CELLS // stride**2
    assert reduction.made.shape == (ROWS, number, CHANNELS)
    torch.testing.assert_close(reduction.attention.sum(-1), torch.ones(ROWS, number))
    owner = reduction.source_map(CELLS)
    for row, column in ((r, c) for r in range(GRID[0]) for c in range(GRID[1])):
        region = row // stride * (GRID[1] // stride) + column // stride
        seen = reduction.attention[:, :, row * GRID[1] + column] > 0
        assert seen.sum(1).tolist() == [1] * ROWS
        assert seen[:, region].all()
        at = reduction.index[0, region]
        assert (at // GRID[1] // stride, at % GRID[1] // stride) == (row // stride, column // stride)
    assert (owner[reduction.attention.amax(1) > 0.5 / CELLS] >= 0).all()
    assert (reduction.index.diff(dim=1) > 0).all()


def test_a_cell_changes_its_region_only():
    method, tokens = made(), drawn()
    before = method.reduce(tokens).made
    for cell in (0, 13, 47):
        changed = tokens.features.clone()
        changed[:, cell] += 1
        taps = {}
        for layer, tap in tokens.taps.items():
            states = tap.states.clone()
            states[:, 1 + cell] -= 1
            taps[layer] = EncoderTap(tap.query, tap.keys, tap.heads, states)
        after = method.reduce(VisualTokens(changed, GRID, taps)).made
        region = cell // GRID[1] // 2 * (GRID[1] // 2) + cell % GRID[1] // 2
        others = torch.arange(before.shape[1]) != region
        assert torch.equal(before[:, others], after[:, others])
        assert (before[:, region] != after[:, region]).any(-1).all()


def some(tokens: VisualTokens, rows: list[int]) -> VisualTokens:
    """Those rows of a batch, whose text is as long as it has to be."""
    taps = {name: EncoderTap(tap.query[rows], tap.keys[rows], 4, tap.states[rows]) for name, tap in tokens.taps.items()}
    text, valid, state = tokens.question.text[rows], tokens.question.valid[rows], tokens.question.state[rows]
    length = int(valid.sum(1).max())
    question = Question(None, text[:, :length], valid[:, :length], state=state)
    return VisualTokens(tokens.features[rows], tokens.grid, taps, question=question)


@pytest.mark.parametrize("reader", READERS)
def test_rows_do_not_depend_on_the_batch(reader):
    method, tokens = made(reader), drawn()
    together = method.reduce(tokens)
    for row in range(ROWS):
        alone = method.reduce(some(tokens, [row]))
        torch.testing.assert_close(alone.made[0], together.made[row], atol=1e-5, rtol=1e-5)
    twice = method.reduce(some(tokens, [1, 1])).made
    assert torch.equal(twice[0], twice[1])


@pytest.mark.parametrize("reader", READERS[:2])
def test_the_question_acts_through_its_projection(reader):
    """With a norm of zeros there is no question; with another question there are other tokens."""
    method, tokens, plain = made(reader), drawn(), made("none")
    plain.module.load_state_dict({k: v for k, v in method.module.state_dict().items() if "text_projection" not in k})
    without = plain.reduce(tokens).made
    assert (method.reduce(tokens).made - without).abs().max() > 1e-3
    asked = tokens.question
    other = Question(None, asked.text.roll(1, 0), asked.valid.roll(1, 0), state=asked.state.roll(1, 0))
    wrong = method.reduce(VisualTokens(tokens.features, GRID, tokens.taps, question=other)).made
    assert (wrong - method.reduce(tokens).made).abs().max() > 1e-4
    for weight in method.module.text_projection[1].parameters():
        nn.init.zeros_(weight)
    assert torch.equal(method.reduce(tokens).made, without)


def test_strides_that_do_not_divide_are_refused():
    assert strides_of((24, 24)) == [2, 3, 4, 6, 8, 12, 24]
    with pytest.raises(
        foveate.InputError, match=r"stride=4 does not divide a picture of 6 x 8 tokens. Strides .*: 2 \(12 tokens\)."
    ):
        made(stride=4).reduce(drawn())
    with pytest.raises(foveate.InputError, match="stride=0; it must be at least 1"):
        QueCC(stride=0)
    with pytest.raises(foveate.InputError, match="heads=5 do not divide the 32 channels"):
        QueCC(heads=5).build(shape())
    model, inputs = zoo.load(), zoo.batch()
    with pytest.raises(foveate.InputError, match=r"does not divide .* 2 \(16 tokens\), 4 \(4 tokens\), 8 \(1 tokens\)"):
        foveate.encode(model, QueCC(stride=3).fresh(), **inputs)


@pytest.mark.parametrize(("budget", "count"), [(None, 4), (1, 1), (5, 4), (15, 4), (16, 16), (0.25, 16), (1.0, 64), (64, 64)])
def test_a_budget_is_the_most_tokens(budget, count):
    method = QueCC(budget=budget, reader="none").fresh()
    encoded = foveate.encode(zoo.load(), method, **zoo.batch())
    assert [len(each) for each in encoded.embeds] == [count] * 4
    assert (method.stride or 4) ** 2 * count == 64 or count == 64


def test_budgets_that_cannot_be_had():
    model, inputs = zoo.load(), zoo.batch()
    method = QueCC(reader="none").fresh()
    foveate.encode(model, method, **inputs)
    with pytest.raises(foveate.InputError, match="stride=4, which leaves 4 of a picture of 8 x 8 tokens, and budget=2 is less"):
        foveate.encode(model, method.with_budget(2), **inputs)
    assert len(foveate.encode(model, method.with_budget(20), **inputs).embeds[0]) == 4
    with pytest.raises(foveate.InputError, match="grids of many sizes"):
        QueCC(budget=16)._stride(shape(grid=None))
    with pytest.raises(foveate.InputError, match="budget=3 cannot be had of a picture of 6 x 8"):
        QueCC(budget=3)._stride(shape())


def test_at_equal_counts():
    assert [QueCC().at_budget(tokens, 576, 6).stride for tokens in (64, 36, 16, 1)] == [3, 4, 6, 24]
    assert QueCC(stride=6).at_budget(16, 576, 6).layer_tokens(576, 6) == [16] * 6
    with pytest.raises(foveate.InputError, match="100 of 576 visual tokens cannot be had: a square"):
        QueCC().at_budget(100, 576, 6)
    with pytest.raises(foveate.InputError, match="stride=4 leaves 36"):
        QueCC(stride=4).at_budget(16, 576, 6)
    assert QueCC(budget=1.0).layer_tokens(576, 2) == [576, 576]


def test_weights_belong_to_a_stride_and_a_reader(tmp_path):
    model, inputs = zoo.load(), zoo.batch()
    method = QueCC(budget=16, reader="embeddings", heads=4).fresh(3)
    expected = foveate.encode(model, method, **inputs).embeds
    method.save_pretrained(tmp_path / "weights")
    again = foveate.get("quecc", weights=str(tmp_path / "weights"))
    assert (again.stride, again.reader, again.heads) == (2, "embeddings", 4)
    for ours, theirs in zip(foveate.encode(model, again, **inputs).embeds, expected, strict=True):
        assert torch.equal(ours, theirs)
    for field, value in (("stride", 4), ("reader", "none"), ("heads", 2)):
        with pytest.raises(foveate.InputError, match=f"{field}={value!r}, and .* was trained with"):
            foveate.get("quecc", weights=str(tmp_path / "weights"), **{field: value})
    with pytest.raises(foveate.InputError, match="quecc has to be trained and has no weights"):
        foveate.attach(model, "quecc")


def test_reports_tell_who_read_the_question():
    model, inputs = zoo.load(), zoo.batch()
    notes, seconds = {}, {}
    for reader in READERS:
        with QueCC(reader=reader).fresh()(model) as session:
            model(**inputs)
        notes[reader], seconds[reader] = " ".join(session.report.notes), session.report.seconds
        assert all(image.made for image in session.report.images)
    assert "a pass of the decoder over it" in notes["decoder"]
    assert "is ours" in notes["embeddings"]
    assert "the decoder's input embeddings" in notes["embeddings"]
    assert "it is no QueCC" in notes["none"]
    assert "question was read" not in notes["none"]
    assert seconds["decoder"]["question"] > 0
    assert all("question" not in seconds[reader] for reader in READERS[1:])


@pytest.mark.parametrize("reader", READERS)
def test_gradients_reach_every_weight(reader):
    """Those of the loss, by central differences."""
    model, inputs = zoo.load(), zoo.batch()
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == zoo.IMAGE) | (inputs["attention_mask"] == 0), -100)
    labels[:, :-3] = -100
    method = QueCC(reader=reader).fresh(1)
    session = foveate.attach(model, method, train=True)
    try:
        weights = dict(method.module.named_parameters())
        loss, log = method.objective(model, {**inputs, "labels": labels})
        loss.backward()
        assert log == {}
        # a bias of keys changes no softmax
        dead = [name for name, weight in weights.items() if weight.grad is None or not weight.grad.abs().max() > 1e-9]
        assert dead == []
        for name in ("q_downsample.weight", "v_proj.2.weight", "clip_attn.out_proj.weight"):
            found, gradient = slopes(weights[name], lambda: method.objective(model, {**inputs, "labels": labels})[0], 1e-2)
            assert found == pytest.approx(gradient, rel=0.1), name
    finally:
        session.detach()
    assert method.learns == ("module", "projector", "lora")
    assert method.single_turns


@pytest.mark.parametrize("reader", READERS)
def test_training_begins_as_average_pooling(reader, monkeypatch):
    model, inputs = zoo.load(), zoo.batch()
    monkeypatch.setattr(quecc, "PICTURES", 4)
    method = QueCC(stride=2, reader=reader).fresh(1)
    with foveate.attach(model, method, train=True) as session:

        def far() -> float:
            module = method.module
            with torch.no_grad():
                with module.listening() as heard:
                    model(**inputs)
                ((features, levels, text, grid),) = heard
                wanted = regions(features, grid, 2).mean(2)
                return float((module(features, levels, text, grid)[0] - wanted).square().mean() / wanted.var())

        before = far()
        method.initialise(model, [])
        assert far() == before
        taken = []
        method.initialise(model, (taken.append(number) or inputs for number in range(400)))
        assert len(taken) == 1, "of 4 pictures, which are enough"
        assert before > 0.8
        assert far() < 0.1
        assert method.module.heard is None
        assert all(weight.requires_grad for weight in session.parameters())


def test_a_picture_counts_once_however_often_it_is_asked_about():
    features, levels = torch.randn(6, 4, 3), torch.randn(6, 4, 12)
    same = torch.tensor([0, 0, 0, 1, 2, 2])
    known: set = set()
    (piece,) = new_pictures((features[same], levels[same], None, (2, 2)), known)
    assert torch.equal(piece[0], features[:3])
    assert new_pictures((features[same], levels[same], None, (2, 2)), known) == []
    assert len(new_pictures((torch.randn(20, 4, 3), torch.randn(20, 4, 12), None, (2, 2)), known)) == 3


def test_regions_are_in_raster_order():
    cells = torch.arange(24).view(1, 24, 1)
    assert regions(cells, (4, 6), 2)[0, :, :, 0].tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]
