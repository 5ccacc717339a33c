"""DyVTE's gates: what they read, when they fire, what teaches them, and what is chosen after training."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.cuts import PromptTokens
from foveate.errors import InputError
from foveate.loading import load
from foveate.methods.dyvte import DyVTE
from foveate.methods.exit_at import ExitAt
from foveate.methods.networks.gates import Gates, gate_input
from foveate.methods.tools.exits import agreement, answers, correct, is_safe
from foveate.training.batches import Collator
from foveate.training.drawn import DrawnSamples

from .. import zoo
from .test_inside_decoder import prompt

LAYERS = 4
GREEDY = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)


@pytest.fixture
def model():
    return zoo.load()


# -- what a gate reads


def slow_input(tokens: PromptTokens, row: int) -> list[torch.Tensor]:
    """One token after the other: text after the first picture, without the last token."""
    seen, rest = False, []
    last = int(tokens.last[row])
    for place in range(tokens.hidden.shape[1]):
        visual = bool(tokens.image[row, place] >= 0)
        seen = seen or visual
        if seen and not visual and place != last and bool(tokens.valid[row, place]):
            rest.append(tokens.hidden[row, place])
    end = tokens.hidden[row, last]
    return [torch.stack(rest).mean(0) if rest else end, end]


@pytest.mark.parametrize("layout", ["st00ttst", "s00t", "__st000tt11tst", "s00s"])
def test_gates_read_text_after_the_picture(layout):
    tokens = prompt(layout)
    text = tokens.valid & ~tokens.visual & (tokens.visual.long().cumsum(1) > 0)
    tokens = PromptTokens(**{**vars(tokens), "prompt_text": text})
    found = gate_input(tokens)
    torch.testing.assert_close(found[0], torch.cat(slow_input(tokens, 0)).float())
    assert bool(torch.isfinite(found).all())
    # what visual tokens hold is not read
    other = torch.where(tokens.visual[..., None], torch.randn_like(tokens.hidden), tokens.hidden)
    assert torch.equal(gate_input(PromptTokens(**{**vars(tokens), "hidden": other})), found)


def test_the_shape_of_a_gate():
    """Two layers without biases, one gate after each decoder layer but the last; the logits are W2 GELU(W1 x)."""
    gates = Gates(192, 64, 6)
    assert sum(weight.numel() for weight in gates.parameters()) == 5 * (64 * 384 + 2 * 64)
    assert sum(w.numel() for w in Gates(4096, 2048, 32).parameters()) == 31 * (2048 * 8192 + 2 * 2048)
    first, _, second = gates.gates[2]
    x = torch.randn(3, 384)
    inner = x @ first.weight.T
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(gates(x, 3), inner @ second.weight.T)


# -- in the engine


def test_gates_that_never_fire_change_nothing(model):
    inputs = zoo.batch()
    before = model.generate(**inputs, **GREEDY)
    method = foveate.get("dyvte", hidden=8, threshold=1.0).fresh(1)
    with method(model) as session:
        after = model.generate(**inputs, **GREEDY)
        assert set(session.report.layers) == {4 * zoo.TOKENS}
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(one, other) for one, other in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_leave_at_their_own_layers(model, side):
    """In a batch as alone, over all steps; the tokens of two pictures of a row leave together."""
    method = foveate.get("dyvte", hidden=8).fresh(4)
    with method(model) as session:
        together = model.generate(**zoo.batch(side), **GREEDY)
        stages = [[(stage.layer, len(stage.kept)) for stage in image.stages] for image in session.report.images]
        rows = list(session.report.rows)
        left = {row: {tuple(s) for s, r in zip(map(tuple, stages), rows, strict=True) if r == row} for row in set(rows)}
        assert all(len(each) == 1 for each in left.values()), "pictures of one prompt leave together"
        assert len({next(iter(each)) for each in left.values()}) > 1, "rows differ, or the test shows nothing"
        for row in range(4):
            alone = model.generate(**zoo.batch(side, rows=(row,)), **GREEDY)
            for one, other in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(one[row], other[0], atol=2e-4, rtol=2e-4)


def test_a_prompt_without_pictures_asks_no_gate(model, monkeypatch):
    method = foveate.get("dyvte", hidden=8).fresh(4)
    with method(model):
        model.generate(**zoo.batch(), max_new_tokens=1)
        monkeypatch.setattr(Gates, "forward", lambda *_: pytest.fail("a gate was asked"))
        model.generate(input_ids=torch.tensor([[1, 21, 22, 23]]), max_new_tokens=2)


# -- labels


def slow_safe(full, exited, labels, floor) -> list[bool]:
    """Row by row, token by token, from the paper: agreement on more than 99 % and a loss below 1.03 times that with all tokens."""
    found = []
    for a, b, wanted in zip(full, exited, labels, strict=True):
        same, losses = [], ([], [])
        for place in range(len(wanted) - 1):
            target = int(wanted[place + 1])
            if target == -100:
                continue
            same.append(int(a[place].argmax()) == int(b[place].argmax()))
            for logits, into in ((a, losses[0]), (b, losses[1])):
                into.append(-float(logits[place].double().log_softmax(-1)[target]))
        all_of, left = (sum(each) / len(each) for each in losses)
        found.append(sum(same) / len(same) > 0.99 and left < max(1.03 * all_of, all_of + floor))
    return found


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_which_exits_are_safe(floor):
    random = torch.Generator().manual_seed(2)
    full = torch.randn(40, 9, 12, generator=random) * 3
    exited = full + torch.randn(40, 9, 12, generator=random) * torch.linspace(0, 0.4, 40)[:, None, None]
    labels = torch.randint(0, 12, (40, 9), generator=random)
    labels[:, :5] = -100
    labels[::3, 7:] = -100
    best = full[:, :-1].argmax(-1)
    labels[:, 1:] = torch.where((labels[:, 1:] != -100) & (torch.rand(40, 8, generator=random) < 0.8), best, labels[:, 1:])
    (words, loss), (others, after) = (answers(each, labels) for each in (full, exited))
    agree = torch.stack([agreement(words, each, labels) for each in (words, others)], 1)
    found = is_safe(agree, torch.stack([loss, after], 1), floor)[:, 0]
    assert found.tolist() == slow_safe(full, exited, labels, floor)
    assert 3 < int(found.sum()) < 37
    right = correct(words, labels)
    assert right.tolist() == [
        all(int(words[row, i]) == int(labels[row, i + 1]) for i in range(8) if int(labels[row, i + 1]) != -100) for row in range(40)
    ]


def test_all_exits_are_tried_at_once():
    """What is prepared from one pass is what a pass for each exit gives, by a method that is attached."""
    loaded = load("pocket")
    data = DrawnSamples(4, 5, 4, single=True)
    batch = Collator(loaded)([data[index] for index in range(4)])
    method = foveate.get("dyvte", hidden=8).fresh(0)
    model = loaded.model.eval()
    with foveate.attach(model, method, train=True):
        found = method.prepare(model, batch)
        with torch.no_grad():
            words, full = answers(_plain(model, batch), batch["labels"])
        assert found["right"][:, 0].tolist() == correct(words, batch["labels"]).tolist()
        safe = is_safe(found["agree"], found["loss"], 0.05)
        for layer in range(1, 6):
            with torch.no_grad(), ExitAt(layer=layer)(model) as session:
                exited, loss = answers(model(**batch).logits, batch["labels"])
                assert session.report.layers == [4 * 576.0] * layer + [0.0] * (6 - layer)
            assert found["right"][:, layer].tolist() == correct(exited, batch["labels"]).tolist()
            torch.testing.assert_close(found["loss"][:, layer], loss, atol=1e-5, rtol=1e-4)
            agree = torch.stack([torch.ones(4), agreement(words, exited, batch["labels"])], 1)
            assert safe[:, layer - 1].tolist() == is_safe(agree, torch.stack([full, loss], 1), 0.05)[:, 0].tolist()
    assert not any("forward" in layer.__dict__ for layer in model.get_decoder().layers), "the layers compute again"
    assert found["inputs"].shape == (4, 5, 384)


def _plain(model, batch) -> torch.Tensor:
    """Logits of the model with nothing attached inside."""
    with foveate.KeepAll()(model):
        return model(**batch).logits


@pytest.mark.parametrize("layer", [0, LAYERS])
def test_exits_that_cannot_be(model, layer):
    with pytest.raises(InputError, match="expected 1 to 3"):
        ExitAt(layer=layer)(model).__enter__()


def test_a_budget_is_refused():
    with pytest.raises(InputError, match="the gates decide"):
        foveate.get("dyvte", budget=64)
    assert foveate.get("dyvte", budget=1.0).keeps_all


# -- training


def rows(seed: int, shuffled: bool) -> dict[str, torch.Tensor]:
    """Safe where the sum of some channels is positive; shuffled labels have nothing to do with what a gate reads."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, 2, 16, generator=random)
    safe = inputs[:, :, :4].sum(-1) > 0
    if shuffled:
        safe = safe[torch.randperm(512, generator=random)]
    loss = torch.ones(512, 3)
    loss[:, 1:] = torch.where(safe, 1.0, 2.0)
    return {"inputs": inputs, "agree": torch.ones(512, 3), "loss": loss}


@pytest.mark.parametrize("shuffled", [False, True])
def test_gates_learn_what_there_is_to_learn_and_no_more(shuffled):
    method = DyVTE(hidden=16)
    torch.manual_seed(0)
    method._state.module = gates = Gates(8, 16, 3)
    optimizer = torch.optim.AdamW(gates.parameters(), 0.01)
    for step in range(60):
        loss, _ = method.objective(None, rows(step, shuffled))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, told = method.objective(None, rows(999, False))
    assert (told["agree"] > 0.9) != shuffled
    assert not shuffled or abs(told["agree"] - 0.5) < 0.15


def test_the_threshold_is_the_smallest_that_loses_little():
    """Against trying every threshold by hand."""
    random, method = torch.Generator().manual_seed(5), DyVTE(hidden=4)
    torch.manual_seed(1)
    method._state.module = gates = Gates(4, 4, 4)
    inputs = torch.randn(300, 3, 8, generator=random) * 4
    right = torch.rand(300, 4, generator=random) < torch.tensor([0.95, 0.6, 0.8, 0.9])
    batches = [{"inputs": inputs[part], "right": right[part]} for part in (slice(0, 128), slice(128, 300))]

    def lost(threshold: float) -> float:
        total = 0
        for row in range(300):
            leaves = 0
            for layer in range(3, 0, -1):
                logits = gates(inputs[row, layer - 1][None], layer)[0]
                leaves = layer if float(F.softmax(logits, -1)[1]) > threshold else leaves
            total += int(right[row, 0]) - int(right[row, leaves])
        return total / 300

    for tolerance in (0.0, 0.1):
        chosen = method.calibrate(None, batches, tolerance)["threshold"]
        assert lost(chosen) <= tolerance
        assert chosen == 0.5 or lost(chosen - 0.002) > tolerance
    assert method.calibrate(None, [], 0.1) == {}


def test_weights_and_threshold_are_saved_together(tmp_path, model):
    method = foveate.get("dyvte", hidden=8).fresh(Random(0).randrange(100))
    with foveate.attach(model, method):
        method.with_fields(threshold=0.875).save_pretrained(tmp_path)
    found = foveate.get("dyvte", weights=str(tmp_path))
    assert (found.threshold, found.hidden) == (0.875, 8)
    assert foveate.get("dyvte", weights=str(tmp_path), threshold=0.5).threshold == 0.5
    with pytest.raises(InputError, match="was trained with 8"):
        foveate.get("dyvte", weights=str(tmp_path), hidden=16)
