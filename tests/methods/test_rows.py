"""A row of a batch is the image alone, to the last bit: every method on equal inputs, alone and in batches of 2 to 8."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

import foveate
from foveate.cuts import DecoderTap, PromptTokens
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision import beside
from foveate.methods.base import EncoderReducer
from foveate.tokens import BlockTokens, EncoderTap, Question, VisualTokens

from .. import zoo
from .test_conformance import VARIANTS, _build

ROWS, NUMBER, GRID, WIDTH, HEADS = 8, 576, (24, 24), 512, 8
LAYERS, DECODER, TEXT = 8, 512, 24


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(generator, *shape, by=1.0):
    return torch.randn(*shape, generator=generator) * by


def encoder_tap(generator, number, inside=False):
    shape = (ROWS, number + 1, WIDTH)
    queries, values = (draw(generator, *shape), draw(generator, *shape)) if inside else (None, None)
    query = draw(generator, ROWS, WIDTH, by=0.05) if queries is None else queries[:, 0]
    return EncoderTap(query, draw(generator, *shape, by=0.05), HEADS, draw(generator, *shape), queries=queries, values=values)


def visual_tokens(generator, method):
    projected = draw(generator, ROWS, NUMBER, DECODER) if method.reads_projected else None
    question = None
    if method.reads_question:
        text = draw(generator, ROWS, TEXT, DECODER)
        valid = torch.arange(TEXT) < torch.randint(4, TEXT, (ROWS, 1), generator=generator)
        state = draw(generator, ROWS, DECODER) if method.reads_question_state else None
        question = Question(projected, text, valid, state=state)
    taps = {name: encoder_tap(generator, NUMBER) for name in method.encoder_layers(24)}
    joined = encoder(generator) if method.joins_encoder else None
    return VisualTokens(draw(generator, ROWS, NUMBER, WIDTH), GRID, taps, projected, question, joined)


def encoder(generator):
    """Two layers that tokens run through beside the patches."""
    parts = zoo.build_llava("llama", tower=zoo.clip_config(hidden_size=WIDTH, num_attention_heads=HEADS))
    taps = {layer: encoder_tap(generator, NUMBER, inside=True) for layer in range(2)}
    return beside.beside(anatomy(parts), taps, draw(generator, ROWS, NUMBER, WIDTH))


def prompt_tokens(generator, reducer):
    length = NUMBER + TEXT
    column = torch.arange(length).expand(ROWS, -1)
    visual = (column >= 4) & (column < NUMBER + 4)
    tap = None
    if reducer.reads != "nothing":
        query, keys = draw(generator, ROWS, HEADS, length, 64), draw(generator, ROWS, HEADS // 2, length, 64)
        tap = DecoderTap(query, keys, 64**-0.5, None, column, None)
    hidden, every, after = draw(generator, ROWS, length, DECODER), torch.ones_like(visual), column >= NUMBER + 4
    last, initial = column[:, -1], torch.full((ROWS, 1), NUMBER)
    start = PromptTokens(hidden, torch.where(visual, 0, -1), every, after, ~visual, last, column, initial, 0, LAYERS)
    layer = reducer.cuts(LAYERS)[0]
    return replace(start, layer=layer, tap=tap, start=start)


def chosen(value, rows):
    """Some rows of everything."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == ROWS else value
    if isinstance(value, dict):
        return {name: chosen(each, rows) for name, each in value.items()}
    if is_dataclass(value):
        return replace(value, **{field.name: chosen(getattr(value, field.name), rows) for field in fields(value)})
    return value


def same(found, wanted, what):
    """All tensors of two answers, to the last bit."""
    for field in fields(wanted):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(theirs, torch.Tensor) and field.name in ("index", "valid", "threshold", "scores", "owner", "keep"):
            if field.name == "index" and getattr(wanted, "valid", None) is not None:
                ours, theirs = ours[found.valid], theirs[wanted.valid]  # a batch is as wide as its widest row
            if field.name != "valid":
                assert torch.equal(ours, theirs), f"{what}: {field.name}"


def jobs():
    for variant in VARIANTS:
        method = _build(variant)
        front = method.before_decoder()
        if not isinstance(front, foveate.KeepAll) and variant != "resize":
            yield pytest.param(variant, "front", id=f"{variant}-front")
        for number, inside in enumerate(method.inside_decoder()):
            if inside.pattern(LAYERS) is None:
                yield pytest.param(variant, number, id=f"{variant}-inside")


@pytest.mark.parametrize(("variant", "part"), jobs())
def test_a_row_alone_and_in_batches(variant, part):
    generator = torch.Generator().manual_seed(7)
    method = _build(variant)
    for trained in method.trained():
        shape = foveate.ModelShape("llava", WIDTH, DECODER, WIDTH, HEADS, 24, 22, LAYERS, GRID)
        trained._state.module = trained.build(shape).eval()
    if part != "front":
        reducer = method.inside_decoder()[part]
        tokens, ask = prompt_tokens(generator, reducer), reducer.cut
    else:
        reducer = method.before_decoder()
        if isinstance(reducer, EncoderReducer):
            reducer = reducer.with_budget(200) if reducer.budget is not None else reducer
            layer, goal = next(iter(reducer.plan(23, NUMBER).items()))
            valid = torch.ones(ROWS, NUMBER, dtype=torch.bool)
            tokens = BlockTokens(encoder_tap(generator, NUMBER, inside=True), valid, valid.float(), layer, goal)
            ask = reducer.shrink
        else:
            reducer = reducer.with_budget(64) if reducer.budget is not None else reducer
            tokens, ask = visual_tokens(generator, reducer), reducer.reduce
    alone = [ask(chosen(tokens, slice(row, row + 1))) for row in range(ROWS)]
    for size in (2, 3, 8):
        together = ask(chosen(tokens, slice(0, size)))
        for row in range(size):
            mine = type(together)(
                **{
                    field.name: getattr(together, field.name)[row : row + 1]
                    if isinstance(getattr(together, field.name), torch.Tensor) and len(getattr(together, field.name)) == size
                    else getattr(together, field.name)
                    for field in fields(together)
                }
            )
            same(mine, alone[row], f"row {row} of {size}")
