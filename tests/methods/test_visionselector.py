"""VisionSelector and IDPruner: scores, the soft choice and both choices against loops, the weight of a loss, training, weights."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate.errors import InputError
from foveate.loading import load
from foveate.methods import registry, trained, weights
from foveate.methods.idpruner import IDPruner
from foveate.methods.networks.selector import Selector, hard_top, soft_top
from foveate.methods.tools.selection import relevant_first
from foveate.methods.visionselector import Softened, VisionSelector
from foveate.tokens import VisualTokens
from foveate.training.run import train
from foveate.training.settings import TrainSettings

from .. import families, zoo
from .. import selector_reference as reference
from ..engine.test_forward import labels_of

ROWS, CELLS, GRID, WIDTH = 3, 30, (5, 6), 12


def drawn(seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    features, projected = (torch.randn(ROWS, CELLS, width, generator=generator) for width in (8, WIDTH))
    return VisualTokens(features, GRID, projected=projected)


def made(cls: type[VisionSelector] = VisionSelector, seed: int = 0, **fields) -> VisionSelector:
    """A method with weights that are far from the first ones, and biases that are not zero."""
    method = cls(**{"budget": 7, **fields}).fresh(seed)
    torch.manual_seed(seed)
    method._state.module = Selector(WIDTH).eval()
    for weight in method.module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return method


def slow_scores(module: Selector, tokens: torch.Tensor) -> list[float]:
    """Of one picture: the mean over all tokens j of q_i . k_j / sqrt(d')."""

    def mapped(layer: torch.nn.Linear, token: torch.Tensor) -> list[float]:
        return [sum(w * x for w, x in zip(row, token.tolist(), strict=True)) + b for row, b in rows_of(layer)]

    def rows_of(layer: torch.nn.Linear):
        return zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)

    queries, keys = ([mapped(layer, token) for token in tokens] for layer in (module.query, module.key))
    size = len(queries[0])
    logits = [[sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(size) for k in keys] for q in queries]
    return [sum(row) / len(row) for row in logits]


def slow_relevant(importance: list[float], table: list[list[float]], count: int, share: float) -> list[int]:
    chosen = [reference.first_best(dict(enumerate(importance)))]
    while len(chosen) < count:
        left = [i for i in range(len(importance)) if i not in chosen]
        gains = {i: share * importance[i] - (1 - share) * max(table[i][j] for j in chosen) for i in left}
        chosen.append(reference.first_best(gains))
    return chosen


# scores and choices


def test_scores_by_loops():
    visual, method = drawn(), made()
    found = method.reduce(visual).scores
    assert method.module.query.out_features == WIDTH // 2
    for b in range(ROWS):
        assert found[b].tolist() == pytest.approx(slow_scores(method.module, visual.projected[b]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 0.5, 29])
def test_the_highest_scores_stay_in_raster_order(budget):
    visual, method = drawn(), made(budget=budget)
    count = round(budget * CELLS) if isinstance(budget, float) else budget
    found = method.reduce(visual).index.tolist()
    for b in range(ROWS):
        scores = slow_scores(method.module, visual.projected[b])
        order = sorted(range(CELLS), key=lambda i: (-scores[i], i))
        assert found[b] == sorted(order[:count])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("budget", [1, 2, 9, 29])
def test_maximal_marginal_relevance_by_a_loop(budget, share):
    visual, method = drawn(1), made(IDPruner, budget=budget, share=share)
    found = method.reduce(visual).index.tolist()
    for b in range(ROWS):
        scores = slow_scores(method.module, visual.projected[b])
        low, high = min(scores), max(scores)
        importance = [(score - low) / (high - low) for score in scores]
        table = reference.cosine_table(visual.projected[b])
        assert found[b] == sorted(slow_relevant(importance, table, budget, share))


def test_importance_alone_is_visionselector():
    visual = drawn(2)
    assert torch.equal(made(IDPruner, share=1.0).reduce(visual).index, made().reduce(visual).index)
    assert not torch.equal(made(IDPruner).reduce(visual).index, made().reduce(visual).index)


def test_scores_of_any_scale_and_none_at_all():
    """Importance is from 0 to 1 in each picture: scales and offsets do not count; equal scores leave diversity."""
    tokens, scores = drawn().projected, torch.randn(ROWS, CELLS)
    method = made(IDPruner)
    for other in (1e-9 * scores, 1e6 * scores, scores + 3):
        assert torch.equal(method.chosen(tokens, other, 7), method.chosen(tokens, scores, 7))
    alike = method.chosen(tokens, torch.zeros(ROWS, CELLS), 7)
    for b in range(ROWS):
        assert alike[b].tolist() == sorted(slow_relevant([0.0] * CELLS, reference.cosine_table(tokens[b]), 7, 0.5))


def test_equal_tokens_go_by_their_place():
    importance = torch.zeros(1, 5)
    order = relevant_first(importance, lambda index: torch.zeros(1, 1, 5), 4, 0.5)
    assert order.tolist() == [[0, 1, 2, 3]]
    assert hard_top(importance, 2).tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("cls", [VisionSelector, IDPruner])
def test_a_row_of_a_batch_is_the_picture_alone(cls):
    visual, method = drawn(), made(cls)
    together = method.reduce(visual)
    for b in range(ROWS):
        alone = method.reduce(VisualTokens(visual.features[b : b + 1], GRID, projected=visual.projected[b : b + 1]))
        assert torch.equal(together.index[b], alone.index[0])
        torch.testing.assert_close(together.scores[b], alone.scores[0])


# the soft choice


@given(st.integers(2, 40), st.floats(1e-6, 1e4), st.integers(0, 2**31), st.data())
def test_the_soft_choice_sums_to_the_count_and_rises_with_the_scores(number, scale, seed, data):
    count = data.draw(st.integers(1, number - 1))
    scores = scale * torch.randn(2, number, generator=torch.Generator().manual_seed(seed)).double()
    logits = soft_top(scores, count)
    assert logits.sigmoid().sum(-1).tolist() == pytest.approx([count] * 2, rel=1e-6)
    order = scores.argsort(-1)
    assert bool((logits.gather(1, order).diff(dim=-1) >= 0).all())
    torch.testing.assert_close(logits - scores, (logits - scores)[:, :1].expand_as(scores), rtol=0, atol=1e-9 * scale)


def test_far_scores_make_a_hard_choice():
    scores = 1000 * torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_top(scores, 6).sigmoid(), hard_top(scores, 6), atol=1e-6, rtol=0)
    assert hard_top(scores, 6).sum(-1).tolist() == [6.0] * 3


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_its_gradient_against_differences(scale):
    scores = scale * torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradcheck(lambda s: soft_top(s, 3).sigmoid(), scores.requires_grad_(), eps=1e-5, atol=1e-6)
    # a change of all scores changes nothing, whatever is made of the parts
    weight = torch.randn(2, 9).double()
    (gradient,) = torch.autograd.grad((soft_top(scores, 3).sigmoid() * weight).sum(), scores)
    assert gradient.sum(-1).abs().max() < 1e-12
    assert gradient.abs().max() > 0


def test_scores_that_are_decided_have_a_gradient_that_is_a_number():
    scores = torch.tensor([[1e6, 1e6, -1e6, -1e6]], requires_grad=True)
    soft_top(scores, 2).sigmoid().square().sum().backward()
    assert bool(torch.isfinite(scores.grad).all())


# training


@pytest.fixture
def model():
    return zoo.load(decoder="llama-deep").requires_grad_(False)


def labelled() -> dict[str, torch.Tensor]:
    inputs = zoo.batch("right")
    return {**inputs, "labels": labels_of(inputs)}


def randomise(method: VisionSelector) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in method.module.parameters():
            torch.nn.init.normal_(weight, std=0.3, generator=generator)


def test_all_tokens_stay_in_training_each_times_its_part(model):
    """The loss is that of a model whose projector's outputs are multiplied by hand, plus the cross-entropy of the parts."""
    batch, method = labelled(), VisionSelector(budget=13).fresh(0)
    with foveate.attach(model, method, train=True):
        randomise(method)
        method.progress = 0.5
        loss, told = method.objective(model, batch)
    parts = []

    def times(_, __, output):
        scores = method.module(output.float())
        parts.append((soft_top(scores, 13).sigmoid(), hard_top(scores, 13)))
        return output * parts[-1][0][..., None]

    handle = model.model.multi_modal_projector.register_forward_hook(times)
    answers = model(**batch).loss
    handle.remove()
    soft, hard = parts[0]
    assert soft.shape == (4, zoo.TOKENS)
    entropy = torch.nn.functional.binary_cross_entropy(soft, hard)
    assert told["answers"] == pytest.approx(float(answers), rel=1e-5)
    assert told["undecided"] == pytest.approx(float(entropy), rel=1e-4)
    assert told["w"] == pytest.approx(1.55)
    assert float(loss.detach()) == pytest.approx(float(answers + 1.55 * entropy), rel=1e-5)


def test_the_weight_of_the_choice_grows_with_the_steps():
    method = VisionSelector()
    found = []
    for share in (0.0, 0.25, 0.5, 1.0):
        method.progress = share
        found.append(method.pull)
    assert found == pytest.approx([0.1, 0.825, 1.55, 3.0])
    method = VisionSelector(begin=2.0, end=1.0)
    method.progress = 0.5
    assert method.pull == pytest.approx(1.5)
    assert method.with_fields(budget=9).pull == pytest.approx(1.5), "copies are in the same training"


def test_gradients_reach_every_weight_that_counts(model):
    """The bias of the query adds the same to all scores of a picture, and no choice depends on that."""
    batch, method = labelled(), VisionSelector(budget=13).fresh(1)
    with foveate.attach(model, method, train=True):
        randomise(method)
        method.progress = 0.5
        method.objective(model, batch)[0].backward()
        assert float(method.module.query.bias.grad.abs().max()) < 1e-5
        for weight in (method.module.query.weight, method.module.key.weight, method.module.key.bias):
            steep = float(weight.grad.norm())
            step, sides = weight.grad / steep * 1e-3 / steep, []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.add_(sign * step)
                    sides.append(method.objective(model, batch)[0].item())
                    weight.sub_(sign * step)
            assert sides[0] - sides[1] == pytest.approx(2e-3, rel=0.03)


def test_validation_is_answered_with_what_is_chosen(model):
    batch, method = labelled(), VisionSelector(budget=13).fresh(1)
    with foveate.attach(model, method, train=True) as session:
        method.module.eval()
        loss, told = method.objective(model, batch)
        assert session.report.after == [13] * 4
    assert told == {}
    with method(model):
        assert float(model(**batch).loss) == pytest.approx(float(loss), rel=1e-6)


def test_batches_that_teach_no_choice(model):
    """Without pictures, or with pictures of no more tokens than the budget, weights get a gradient of zero."""
    text = {"input_ids": torch.tensor([[1, 20, 30, 40]]), "labels": torch.tensor([[-100, 20, 30, 40]])}
    method = VisionSelector(budget=zoo.TOKENS).fresh(1)
    with foveate.attach(model, method, train=True):
        for batch in (text, labelled()):
            loss, told = method.objective(model, batch)
            loss.backward()
            assert told == {}
            assert all(float(weight.grad.abs().max()) == 0 for weight in method.module.parameters())
    whole = VisionSelector(budget=1.0).fresh(1)
    with foveate.attach(model, whole, train=True), pytest.raises(InputError, match="nothing to choose"):
        whole.objective(model, labelled())


@pytest.mark.parametrize("cls", [VisionSelector, IDPruner])
def test_steps_lower_the_loss(model, cls):
    batch, method = labelled(), cls(budget=13).fresh(1)
    with foveate.attach(model, method, train=True) as session:
        optimizer = torch.optim.AdamW(session.parameters(), 3e-3)
        losses = []
        for step in range(12):
            method.progress = step / 12
            loss, told = method.objective(model, batch)
            losses.append((told["answers"], told["undecided"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_training_on_other_families():
    """Also where visual tokens are merged patches, without a projector; what adds features inside the decoder is refused."""
    for family, refused in (("qwen2_5_vl", False), ("qwen3_vl", True)):
        model, inputs = families.load(family).requires_grad_(False), families.batch(family, side="right")
        batch = {**inputs, "labels": inputs["input_ids"].clone()}
        method = VisionSelector(budget=0.3).fresh(0)
        with foveate.attach(model, method, train=True):
            if refused:
                with pytest.raises(foveate.UnsupportedModelError, match="inside the decoder"):
                    method.objective(model, batch)
                continue
            loss, told = method.objective(model, batch)
            loss.backward()
            assert told["undecided"] > 0
            assert bool(method.module.query.weight.grad.abs().max() > 0)


def test_a_run_that_goes_on_has_the_weight_that_it_had(tmp_path, monkeypatch):
    """Interrupted after two of four steps: what is logged and saved is what an unbroken run logs and saves."""
    settings = TrainSettings(batch=1, steps=4, save_every=2, turns=2, checked=1, lr=1e-4, accumulate=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(VisionSelector(), settings, whole, lambda _: None)
    with monkeypatch.context() as patch:
        step = VisionSelector.objective

        def interrupted(self, model, batch):
            if self.module.training and self.progress >= 0.5:
                raise KeyboardInterrupt
            return step(self, model, batch)

        patch.setattr(VisionSelector, "objective", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(VisionSelector(), settings, parts, lambda _: None)
    train(VisionSelector(), settings, parts, lambda _: None)
    logs = [[json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()] for place in (whole, parts)]
    told = [[(line["step"], line["w"], line["undecided"]) for line in log if "w" in line] for log in logs]
    assert [w for _, w, _ in told[0]] == pytest.approx([(0.1 + 0.825) / 2, (1.55 + 2.275) / 2])
    assert told[0] == told[1]
    one, other = (weights.Weights(str(place)).tensors() for place in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    summary = json.loads((parts / "config.json").read_text())
    assert summary["method"] == "visionselector"
    assert summary["fields"]["begin"] == 0.1


# weights


@pytest.fixture
def folder(tmp_path, model):
    method = VisionSelector(budget=13).fresh(5)
    with method(model):
        method.save_pretrained(tmp_path / "selector")
    return str(tmp_path / "selector")


def test_both_take_the_weights_of_visionselector(model, folder, tmp_path):
    scores = []
    for name in ("visionselector", "idpruner"):
        method = foveate.get(name, weights=folder)
        assert method.budget == 13
        reduction = foveate.encode(model, method, **zoo.batch()).reduction
        scores.append(reduction.scores)
        assert method.settings()["weights"].startswith("selector@")
    assert torch.equal(*scores)
    method.save_pretrained(tmp_path / "own")
    again = foveate.get("idpruner", weights=str(tmp_path / "own"), share=0.3)
    assert again.share == 0.3
    assert torch.equal(foveate.encode(model, again, **zoo.batch()).reduction.scores, scores[0])
    with pytest.raises(InputError, match="holds weights of 'idpruner', and this is 'visionselector'"):
        foveate.get("visionselector", weights=str(tmp_path / "own"))
    with pytest.raises(InputError, match="has to be trained"):
        foveate.attach(model, "idpruner", budget=9)


def test_shipped_weights_serve_both(folder, tmp_path, monkeypatch):
    """The folder of ``visionselector`` in the package is also what "idpruner:pocket" stands for."""
    shipped = tmp_path / "shipped"
    shutil.copytree(folder, shipped / "visionselector")
    for module in (weights, trained):
        monkeypatch.setattr(module, "SHIPPED", shipped)
    for name, cls in (("visionselector", VisionSelector), ("idpruner", IDPruner)):
        assert registry.shipped(cls) == {"pocket": "pocket/visionselector"}
        assert type(foveate.get(f"{name}:pocket")) is cls
        assert type(foveate.get(name, weights="pocket")) is cls
        with pytest.raises(InputError, match='weights="pocket"'):
            foveate.attach(load("pocket").model, name)


def test_weights_of_another_width(folder):
    with pytest.raises(InputError, match="do not fit the model"):
        foveate.attach(load("pocket").model, "visionselector", weights=folder)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("visionselector", {"begin": -0.1}, "begin=-0.1"),
        ("visionselector", {"end": -1.0}, "end=-1.0"),
        ("visionselector", {"end": float("nan")}, "end"),
        ("visionselector", {"budget": None}, "Give a budget"),
        ("visionselector", {"budget": 0}, "no visual token"),
        ("idpruner", {"share": 1.5}, "share=1.5; expected a number from 0 to 1"),
        ("idpruner", {"share": -0.5}, "share=-0.5"),
        ("idpruner", {"share": "much"}, "share"),
    ],
)
def test_wrong_fields(name, fields, match):
    with pytest.raises(InputError, match=match):
        foveate.get(name, **fields)


def test_what_the_engine_owes():
    visual = VisualTokens(torch.zeros(1, CELLS, 8), GRID)
    with pytest.raises(foveate.FoveateError, match="fault of the engine"):
        made().reduce(visual)


def test_costs():
    """Two maps to half the width of one token of each picture, and for IDPruner the similarities."""
    from foveate.analysis.cost import cost

    width = 4096
    (line,) = cost(method="visionselector", new_tokens=1).select("prefill", "method")
    assert line.flops == pytest.approx(2 * 2 * width * (width // 2), rel=0.01)
    assert line.weights / 4 == 2 * (width // 2) * (width + 1)
    (other,) = cost(method="idpruner", new_tokens=1).select("prefill", "method")
    assert other.flops > 10 * line.flops


def test_one_order_serves_all_budgets():
    visual = drawn()
    for cls in (VisionSelector, IDPruner):
        kept = [set(made(cls, budget=budget).reduce(visual).index[1].tolist()) for budget in (1, 4, 9, 20)]
        assert all(few < many for few, many in itertools.pairwise(kept))


def test_the_soft_method_is_in_no_table():
    assert "Softened" not in registry.registered()
    assert Softened(made()).trained() == ()
