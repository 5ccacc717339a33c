"""Cuts inside the decoder against an unmodified model in which the dropped tokens are only masked, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import foveate
from foveate.methods.tools.scoring import prompt_attention

from ... import reference, zoo

STEPS = 16
OPTIONS = dict(
    max_new_tokens=STEPS,
    min_new_tokens=STEPS,
    suppress_tokens=[zoo.IMAGE],
    do_sample=False,
    return_dict_in_generate=True,
    output_logits=True,
)
EXACT, CLOSE = dict(atol=2e-5, rtol=1e-5), dict(atol=4e-4, rtol=4e-4)  # generate returns float32


@dataclass(kw_only=True)
class Ragged(foveate.DecoderReducer):
    """Keeps what is above the mean of its image, a different number everywhere."""

    name = "ragged"
    layers: tuple[int, ...] = (1, 3)

    def cuts(self, layers):
        return self.layers

    def cut(self, tokens):
        scores = prompt_attention(tokens, tokens.last[:, None]).mean(1)[:, 0]
        mine = tokens.of_image
        mean = (scores[:, None] * mine).sum(-1) / mine.sum(-1).clamp(min=1)
        return foveate.Cut(((scores[:, None] > mean[..., None]) & mine).any(1), scores)


METHODS = {
    "fastv": foveate.FastV(layer=1),
    "fastv-3": foveate.FastV(layer=3, budget=5),
    "fastv-compact": foveate.FastV(layer=2, budget=0.3, positions="compact"),
    "pyramiddrop": foveate.PyramidDrop(),
    "pyramiddrop-original": foveate.PyramidDrop(positions="original"),
    "ragged": Ragged(),
    "ragged-compact": Ragged(positions="compact"),
    "compose": foveate.Compose(foveate.PruMergePlus(), Ragged()),
    "compose-two": foveate.Compose(foveate.Spatial(budget=20, positions="original"), foveate.FastV(layer=1), Ragged(layers=(3,))),
}


@pytest.fixture(scope="module")
def models() -> dict:
    return {}


@pytest.fixture
def load(models):
    def get(decoder: str = "llama", attn: str = "sdpa", dtype: torch.dtype = torch.float32):
        key = (decoder, "eager" if decoder == "gemma2" else attn, dtype)  # transformers has no SDPA for the bound of its products
        if key not in models:
            models[key] = zoo.load("llava", *key)
        return models[key]

    return get


def expected(model, method, inputs, row: int, report, encoded, tokens: list[int]) -> torch.Tensor:
    """The logits before each of ``tokens`` by the masked reference; which tokens stay is taken from the report."""
    images = [image for image in report.images if image.row == row]
    mine = [i for i, image in enumerate(report.images) if image.row == row]
    front = [image.kept for image in images]
    embeddings, places = reference.spliced_embeddings(
        model, inputs, row, front, [encoded.embeds[i].to(model.dtype) for i in mine], zoo.IMAGE
    )
    real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
    text, columns, number, at = [], [], 0, 0  # column of each text token, columns of each image by cell
    column = 0
    while at < len(real):
        if real[at] == zoo.IMAGE:
            columns.append({cell: column + i for i, cell in enumerate(front[number])})
            column, at, number = column + len(front[number]), at + zoo.TOKENS, number + 1
        else:
            text.append(column)
            column, at = column + 1, at + 1
    layers = [stage.layer for stage in images[0].stages] if images else []
    kept = {}
    for order, layer in enumerate(layers):
        left = [columns[i][cell] for i, image in enumerate(images) for cell in image.stages[order].kept]
        kept[layer] = sorted(text + left)
    inside = method.inside_decoder()
    compact = {reducer.positions for reducer in inside} == {"compact"}
    if method.before_decoder().positions == "compact":
        places = torch.arange(embeddings.shape[1])[None]
    return reference.Masked(model, kept, embeddings.shape[1], compact).logits(embeddings, tokens, places)


def run(model, method, inputs, **options):
    encoded = foveate.encode(model, method.before_decoder(), **inputs)
    with method(model) as session:
        out = model.generate(**inputs, **{**OPTIONS, **options})
    return out, torch.stack(out.logits, 1), session.report, encoded


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
@pytest.mark.parametrize("name", METHODS)
def test_t3_a_cut_equals_masking_from_that_layer_on(load, decoder, name):
    """One prompt with two images, prefill and 16 steps, in float64."""
    method, inputs = METHODS[name], zoo.batch(rows=(1,), dtype=torch.float64)
    model, plain = load(decoder, "sdpa", torch.float64), load(decoder, "eager", torch.float64)
    out, logits, report, encoded = run(model, method, inputs)
    assert any(stage.kept for image in report.images for stage in image.stages)
    assert report.layers[-1] < report.layers[0]
    wanted = expected(plain, method, inputs, 0, report, encoded, out.sequences[0, -STEPS:].tolist())
    torch.testing.assert_close(logits[0], wanted.float(), **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
@pytest.mark.parametrize("name", ["ragged", "pyramiddrop", "compose"])
def test_t2_and_t3_padded_batches(load, decoder, attn, name, side):
    """Rows with one, two, no and one image keep different counts; each equals the masked reference of that row alone."""
    method, inputs = METHODS[name], zoo.batch(side)
    model, plain = load(decoder, attn), load(decoder, "eager", torch.float64)
    out, logits, report, encoded = run(model, method, inputs)
    assert name != "ragged" or len({len(image.stages[0].kept) for image in report.images}) > 1
    for row in range(4):
        tokens = out.sequences[row, -STEPS:].tolist()
        wanted = expected(plain, method, inputs, row, report, encoded, tokens)
        torch.testing.assert_close(logits[row].double(), wanted, **CLOSE)


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
def test_t7_sdpa_and_eager_keep_the_same(load, decoder):
    reports = []
    for attn in ("sdpa", "eager"):
        _, _, report, _ = run(load(decoder, attn, torch.float64), METHODS["ragged"], zoo.batch(rows=(1,), dtype=torch.float64))
        reports.append([image.stages for image in report.images])
    for one, other in zip(*reports, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.kept == b.kept
            # eager attention is computed in float32
            assert list(a.scores.values()) == pytest.approx(list(b.scores.values()), rel=1e-4)


def keys_held(cache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


def test_caches_hold_what_layers_ran(load):
    """KV bytes of each layer: full before the cut, kept tokens and text behind it."""
    model, inputs = load(), zoo.batch(rows=(0,))
    text = inputs["input_ids"].shape[1] - zoo.TOKENS
    plain = model.generate(**inputs, **OPTIONS).past_key_values
    with foveate.PyramidDrop()(model) as session:
        cut = model.generate(**inputs, **OPTIONS).past_key_values
    assert session.report.layers == [64, 32, 16, 8]
    assert keys_held(cut) == [count + text + STEPS - 1 for count in session.report.layers]
    bytes_of = [[layer.keys.nbytes + layer.values.nbytes for layer in cache.layers] for cache in (plain, cut)]
    for layer, count in enumerate(session.report.layers):
        assert bytes_of[1][layer] / bytes_of[0][layer] == (count + text + STEPS - 1) / (zoo.TOKENS + text + STEPS - 1)


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
@pytest.mark.parametrize("name", ["ragged", "pyramiddrop", "compose-two"])
def test_without_a_cache_and_with_prompt_lookup(load, decoder, name):
    """Every step as a full forward, and several guessed tokens per step, give the same logits as step by step."""
    model, inputs, method = load(decoder), zoo.batch(rows=(1,)), METHODS[name]
    out, logits, _, _ = run(model, method, inputs)
    again, uncached, _, _ = run(model, method, inputs, use_cache=False)
    torch.testing.assert_close(uncached, logits, **CLOSE)
    assert torch.equal(again.sequences, out.sequences)
    with method(model):
        guessed = model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed.sequences, out.sequences)
    torch.testing.assert_close(torch.stack(guessed.logits, 1), logits, **CLOSE)


@pytest.mark.parametrize("name", ["ragged", "pyramiddrop", "compose"])
def test_beams_equal_beams_without_a_cache(load, name):
    model, inputs = load(), zoo.batch()
    options = dict(num_beams=3, output_logits=False, output_scores=True, num_return_sequences=2)
    native = [model.generate(**inputs, **{**OPTIONS, **options}, use_cache=cached).sequences for cached in (True, False)]
    if not torch.equal(*native):
        pytest.skip("this version of transformers itself mixes up the pictures of beams (5.18)")
    with METHODS[name](model) as session:
        out = model.generate(**inputs, **{**OPTIONS, **options})
        layers = session.report.layers
        again = model.generate(**inputs, **{**OPTIONS, **options}, use_cache=False)
        assert session.report.layers == layers
        model.generate(**inputs, **OPTIONS)
        assert session.report.layers == layers
    assert torch.equal(out.sequences, again.sequences)
    torch.testing.assert_close(out.sequences_scores, again.sequences_scores, **CLOSE)


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("second", ["text", "picture"])
def test_conversations(load, decoder, positions, second):
    """A second turn on the same cache, with text or another picture, against the masked reference of the whole conversation."""
    model, plain = load(decoder, "sdpa", torch.float64), load(decoder, "eager", torch.float64)
    method = foveate.FastV(layer=2, budget=9, positions=positions)
    first = zoo.batch(rows=(0,), dtype=torch.float64)
    with method(model) as session:
        cache = DynamicCache(config=model.config.get_text_config())
        out = model.generate(**first, **OPTIONS, past_key_values=cache)
        kept_first = session.report.images[0].stages[0].kept
        extra = zoo.prompt(1, 3, 4, seed=9) if second == "picture" else zoo.prompt(0, 7, 0, seed=9)
        ids = torch.cat([out.sequences, torch.tensor([extra])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if second == "picture":
            inputs["pixel_values"] = zoo.pictures(1, seed=3, dtype=torch.float64)
        turn = model.generate(**inputs, **OPTIONS, past_key_values=cache)
        kept_second = session.report.images[0].stages[0].kept if second == "picture" else []
    pictures = [first["pixel_values"], *([inputs["pixel_values"]] if second == "picture" else [])]
    features = [model.get_image_features(p, return_dict=True).pooler_output[0] for p in pictures]
    embeddings, number, columns = [], 0, []
    for column, token in enumerate(ids[0].tolist()):
        if token == zoo.IMAGE:
            embeddings.append(features[number // zoo.TOKENS][number % zoo.TOKENS])
            columns.append(column)
            number += 1
        else:
            embeddings.append(model.get_input_embeddings()(torch.tensor(token)))
    kept = {*(columns[cell] for cell in kept_first), *(columns[zoo.TOKENS + cell] for cell in kept_second)}
    left = [column for column in range(ids.shape[1]) if column not in columns or column in kept]
    wanted = reference.Masked(plain, {2: left}, ids.shape[1], positions == "compact").logits(
        torch.stack(embeddings)[None], turn.sequences[0, -STEPS:].tolist()
    )
    torch.testing.assert_close(torch.stack(turn.logits, 1)[0], wanted.float(), **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
def test_training(load, decoder, side):
    """The loss and its gradients equal those of the masked model; with gradient checkpointing too."""
    # eager attention of transformers gives NaN for padding in float64
    dtype, attn = (torch.float32, "eager") if decoder == "gemma2" else (torch.float64, "sdpa")
    plain, inputs = load(decoder, "eager", torch.float64), zoo.batch(side, rows=(0, 3), dtype=dtype)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == zoo.IMAGE), -100)
    visual = (inputs["input_ids"] == zoo.IMAGE).cumsum(1) == zoo.TOKENS
    question = visual & ((visual.cumsum(1)) <= 4)
    labels = labels.masked_fill(~visual | question, -100)
    # transformers counts padding as positions, which attention that reads them tells apart
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model = zoo.load("llava", decoder, attn, dtype).train()
    method = Ragged()
    grads, losses = [], []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with method(model) as session:
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])
    pixels = {"pixel_values": inputs["pixel_values"].double()}
    encoded = foveate.encode(plain, method.before_decoder(), **{**inputs, **pixels, "position_ids": None})
    total, number = 0.0, 0
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        ids, wanted = inputs["input_ids"][row][real], labels[row][real]
        answer = int((wanted != -100).nonzero()[0])
        cut = {"input_ids": ids[None, :answer], "attention_mask": torch.ones(1, answer, dtype=torch.long)}
        report = _only(session.report, row)
        logits = expected(plain, method, cut, 0, report, _only_encoded(encoded, row), ids[answer:].tolist())
        total += torch.nn.functional.cross_entropy(logits, ids[answer:], reduction="sum").item()
        number += len(ids) - answer
    assert float(losses[0]) == pytest.approx(total / number, rel=1e-5)  # transformers computes losses in float32


class _only:
    def __init__(self, report, row):
        from dataclasses import replace

        self.images = [replace(image, row=0) for image in report.images if image.row == row]


class _only_encoded:
    def __init__(self, encoded, row):
        self.embeds = [encoded.embeds[i] for i, r in enumerate(encoded.report.rows) if r == row]
