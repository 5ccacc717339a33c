"""SeTok: against loops over tokens and clusters, how many tokens stay, the mean variant, training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import foveate
from foveate.methods.networks.merger import Clusters, Merger
from foveate.methods.setok import SeTok
from foveate.methods.setok_mean import SeTokMean, placed
from foveate.methods.tools.density import distances, members_of, peak_scores, position_code
from foveate.tokens import VisualTokens

from .. import zoo
from ..trained_methods import slopes

GRID, CHANNELS, ROWS, NEAR = (5, 6), 16, 3, 4
CELLS = GRID[0] * GRID[1]


def drawn(seed=0, rows=ROWS, by=0.7) -> VisualTokens:
    return VisualTokens(by * torch.randn(rows, CELLS, CHANNELS, generator=torch.Generator().manual_seed(seed)), GRID)


def made(seed=0, **fields) -> SeTok:
    """A method with random weights whose biases are not zero."""
    method = SeTok(**{"neighbours": NEAR, "threshold": 0.5, "least": 5, **fields}).fresh(seed)
    torch.manual_seed(seed)
    method._state.module = Merger(CHANNELS).eval()
    for weight in method.module.parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, std=0.5)
    return method


def mean(**fields) -> SeTokMean:
    return SeTokMean(**{"neighbours": NEAR, "threshold": 0.5, "least": 5, **fields})


def scores_by_hand(x: torch.Tensor, near: int) -> list[float]:
    """Of the tokens [N, C] of one picture, one by one."""
    number, channels = x.shape
    far = [[math.dist(x[i].tolist(), x[j].tolist()) / math.sqrt(channels) for j in range(number)] for i in range(number)]
    density = [math.exp(-sum(d * d for d in sorted(row)[:near]) / near) for row in far]
    largest = max(max(row) for row in far)
    found = []
    for i in range(number):
        denser = [far[i][j] for j in range(number) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        found.append(density[i] * min(denser, default=largest))
    return found


def code_by_hand(row: int, column: int) -> list[float]:
    found = []
    for place in (row, column):
        for pair in range(CHANNELS // 4):
            angle = place / 10_000 ** (2 * pair / (CHANNELS // 2))
            found += [math.sin(angle), math.cos(angle)]
    return found


def attend(x: torch.Tensor, encoder: nn.Module, number: int) -> torch.Tensor:
    """[S, C], one attention of two heads over all of them."""
    normed = encoder.norm1(x)
    parts = zip(encoder.qkv[number].weight.chunk(3), encoder.qkv[number].bias.chunk(3), strict=True)
    q, k, v = (normed @ weight.T + bias for weight, bias in parts)
    half, joined = CHANNELS // 2, []
    for head in range(2):
        part = slice(head * half, (head + 1) * half)
        joined.append((q[:, part] @ k[:, part].T / math.sqrt(half)).softmax(-1) @ v[:, part])
    return encoder.proj[number](torch.cat(joined, 1))


def encode(x: torch.Tensor, encoder: nn.Module) -> torch.Tensor:
    for number in range(2):
        x = x + attend(x, encoder, number)
    hidden = torch.nn.functional.gelu(encoder.mlp[0](encoder.norm2(x)))
    return x + encoder.mlp[3](hidden)


@torch.no_grad()
def by_hand(method: SeTok, tokens: VisualTokens, row: int) -> tuple[list[int], torch.Tensor, list[list[int]]]:
    """Centres, tokens [M, C] and members of one picture, cluster by cluster."""
    x = torch.stack([tokens.features[row, i] + torch.tensor(code_by_hand(*divmod(i, GRID[1]))) for i in range(CELLS)])
    scores = scores_by_hand(x, method.neighbours)
    centres = [i for i in range(CELLS) if scores[i] > method.threshold]
    order = sorted(range(CELLS), key=lambda i: (-scores[i], i))
    centres = sorted(order[: method.least] if not centres else order[: min(len(centres), CELLS // 4)])
    members: list[list[int]] = [[] for _ in centres]
    for i in range(CELLS):
        near = min(range(len(centres)), key=lambda m: float((x[i] - x[centres[m]]).norm()))
        members[centres.index(i) if i in centres else near].append(i)
    concepts = []
    for centre, mine in zip(centres, members, strict=True):
        inside = encode(x[mine], method.module.inner)
        concepts.append(inside.mean(0) if method.readout == "mean" else inside[mine.index(centre)])
    return centres, method.module.out(encode(torch.stack(concepts), method.module.inter)), members


@pytest.mark.parametrize("readout", ["mean", "centre"])
@pytest.mark.parametrize("threshold", [0.05, 0.49, 0.55, 5.0])
def test_a_loop_over_clusters(threshold, readout):
    method, tokens = made(threshold=threshold, readout=readout), drawn()
    reduction = method.reduce(tokens)
    for row in range(ROWS):
        centres, outputs, members = by_hand(method, tokens, row)
        valid = reduction.mask()[row]
        assert reduction.index[row][valid].tolist() == centres
        torch.testing.assert_close(reduction.made[row][valid], outputs, atol=2e-5, rtol=2e-5)
        for number, mine in enumerate(members):
            shares = torch.zeros(CELLS)
            shares[mine] = 1 / len(mine)
            torch.testing.assert_close(reduction.attention[row, number], shares)


def test_the_loop_sees_pictures_with_different_counts():
    counts = made(threshold=0.49).reduce(drawn()).mask().sum(1)
    assert len(set(counts.tolist())) > 1
    assert made(threshold=5.0).reduce(drawn()).mask().sum(1).tolist() == [5] * ROWS
    assert (made(threshold=0.0).reduce(drawn()).mask().sum(1) == CELLS // 4).all()


def test_scores_and_codes():
    tokens = drawn()
    found = peak_scores(distances(placed(tokens)), NEAR)
    for row in range(ROWS):
        torch.testing.assert_close(found[row], torch.tensor(scores_by_hand(placed(tokens)[row], NEAR)), atol=1e-5, rtol=1e-4)
    code = position_code(*GRID, CHANNELS)
    for cell in range(CELLS):
        torch.testing.assert_close(code[cell], torch.tensor(code_by_hand(*divmod(cell, GRID[1]))))
    assert position_code(2, 3, 7).shape == (6, 7)


@pytest.mark.parametrize("build", [made, mean])
def test_rows_do_not_depend_on_the_batch(build):
    method, tokens = build(threshold=0.49), drawn()
    together = method.reduce(tokens)
    for row in range(ROWS):
        alone = method.reduce(VisualTokens(tokens.features[row : row + 1], GRID))
        valid = together.mask()[row]
        assert torch.equal(alone.index[0], together.index[row][valid])
        ours, theirs = alone.apply(tokens.features[row : row + 1])[0], together.apply(tokens.features)[row][valid]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [made, mean])
def test_counts_fall_with_the_threshold(build):
    """To ``least`` where nothing is above it."""
    tokens = drawn()
    counts = [build(threshold=each, least=1).reduce(tokens).mask().sum(1) for each in (0.0, 0.1, 0.48, 0.5, 0.52, 1.0, 1e30)]
    assert all((before >= after).all() for before, after in itertools.pairwise(counts))
    assert counts[0].min() > counts[4].max() > counts[5].max() == 1
    assert build(threshold=1e30, least=4).reduce(tokens).mask().sum(1).tolist() == [4] * ROWS
    assert build(threshold=1e30, least=99).reduce(tokens).mask().sum(1).tolist() == [CELLS // 4] * ROWS
    assert build(threshold=1e30, least=99, most=99).reduce(tokens).mask().sum(1).tolist() == [CELLS] * ROWS
    for budget, count in ((1, 1), (6, 6), (0.5, 15), (99, CELLS)):
        chosen = build(budget=budget).reduce(tokens)
        assert chosen.mask().sum(1).tolist() == [count] * ROWS
        best = chosen.scores.argsort(dim=1, descending=True)[:, :count].sort(dim=1).values
        assert torch.equal(chosen.index, best)


@pytest.mark.parametrize("build", [made, mean])
def test_equal_features(build):
    """Only the codes of positions differ, or nothing at all."""
    same = VisualTokens(torch.full((2, CELLS, CHANNELS), 0.3), GRID)
    for method in (build(threshold=1e30, least=5), build(threshold=0.0)):
        reduction = method.reduce(same)
        assert torch.isfinite(reduction.apply(same.features)).all()
        assert torch.equal(reduction.index[0], reduction.index[1])
    flat = distances(torch.zeros(1, 9, CHANNELS))
    scores = peak_scores(flat, 4)
    assert not scores.any()
    assert mean(least=3, most=9).counts(scores).tolist() == [3]


def test_the_same_again():
    method, tokens = made(threshold=0.49), drawn()
    first, second = method.reduce(tokens), method.reduce(tokens)
    assert torch.equal(first.made, second.made)
    assert torch.equal(first.index, second.index)


def test_means_of_clusters():
    tokens = drawn()
    reduction = mean(threshold=0.49).reduce(tokens)
    valid = reduction.mask()
    torch.testing.assert_close(reduction.weights.sum(-1)[valid], torch.ones(int(valid.sum())))
    assert ((reduction.weights > 0) & valid[..., None]).sum(1).eq(1).all(), "each cell is in one cluster"
    source = reduction.source_map(CELLS)
    for row in range(ROWS):
        for place in valid[row].nonzero().flatten().tolist():
            mine = source[row] == place
            assert mine[reduction.index[row, place]], "a centre belongs to itself"
            torch.testing.assert_close(reduction.apply(tokens.features)[row, place], tokens.features[row][mine].mean(0))


def test_cells_in_another_order_give_the_same_tokens():
    """With their codes: as a set."""
    method, x = made(), placed(drawn(rows=1))
    order = torch.randperm(CELLS, generator=torch.Generator().manual_seed(1))
    found = []
    for points in (x, x[:, order]):
        far = distances(points)
        scores = peak_scores(far, NEAR)
        index = scores.topk(6).indices.sort(dim=1).values
        valid = torch.ones_like(index, dtype=torch.bool)
        clusters = Clusters(index, valid, members_of(far, index, valid), scores)
        with torch.no_grad():
            tokens = method.module(points, clusters, "mean")[0]
        found.append((set(index[0].tolist()) if points is x else {int(order[i]) for i in index[0]}, tokens))
    assert found[0][0] == found[1][0]
    assert torch.cdist(*(tokens for _, tokens in found)).amin(1).max() < 1e-4
    assert torch.cdist(found[0][1], found[0][1]).fill_diagonal_(9).min() > 1e-2


def test_weights_of_the_sizes_of_the_pocket_model():
    assert sum(weight.numel() for weight in Merger(128).parameters()) == 2 * (2 * 66_048 + 131_712 + 4 * 128) + 16_512
    linears = [part for part in Merger(16).modules() if isinstance(part, nn.Linear)]
    assert len(linears) == 13
    assert all(not part.bias.any() for part in linears)
    bounds = [math.sqrt(6 / sum(part.weight.shape)) for part in linears]
    assert all(0.8 * bound < float(part.weight.detach().abs().max()) <= bound for part, bound in zip(linears, bounds, strict=True))


def test_a_threshold_for_a_mean():
    scores = torch.rand(40, CELLS, generator=torch.Generator().manual_seed(2)) ** 3
    for goal in (2, 5, 6.5):
        method = mean(least=1)
        threshold, reached = method.threshold_for(scores, goal)
        assert reached == pytest.approx(float(mean(least=1, threshold=threshold).counts(scores).float().mean()))
        assert goal - 0.2 < reached <= goal
    assert mean(least=7).threshold_for(scores, 0.5)[1] > 0.5  # which cannot be had: pictures without a centre have seven


def test_training_chooses_the_threshold():
    model, inputs = zoo.load(), zoo.batch()
    method = SeTok(goal=9, least=2, most=40).fresh()
    with method(model):
        fields = method.calibrate(model, [inputs, inputs], 0.0)
        assert method.module.heard is None
    with method.with_fields(**fields)(model) as session:
        model(**inputs)
        assert sum(session.report.after) / 4 == pytest.approx(9, abs=0.5)
    with method.with_budget(5)(model):
        assert method.with_budget(5).calibrate(model, [inputs], 0.0) == {}


def test_weights_bring_their_threshold(tmp_path):
    model, inputs = zoo.load(), zoo.batch()
    method = SeTok(threshold=0.001, readout="centre", neighbours=7).fresh(3)
    expected = foveate.encode(model, method, **inputs).embeds
    assert len({len(each) for each in expected}) > 1
    method.save_pretrained(tmp_path / "weights")
    again = foveate.get("setok", weights=str(tmp_path / "weights"))
    assert (again.threshold, again.readout, again.neighbours) == (0.001, "centre", 7)
    for ours, theirs in zip(foveate.encode(model, again, **inputs).embeds, expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(foveate.InputError, match="neighbours=9, and"):
        foveate.get("setok", weights=str(tmp_path / "weights"), neighbours=9)
    with pytest.raises(foveate.InputError, match="setok has to be trained and has no weights"):
        foveate.attach(model, "setok")


@pytest.mark.parametrize(("field", "value"), [("threshold", -1.0), ("neighbours", 0), ("least", 0), ("most", 0), ("goal", 0)])
def test_fields_out_of_range(field, value):
    with pytest.raises(foveate.InputError, match=f"{field}="):
        SeTok(**{field: value})


@pytest.mark.parametrize("readout", ["mean", "centre"])
def test_gradients_reach_every_weight(readout):
    """Those of the loss, by central differences."""
    model, inputs = zoo.load(), zoo.batch()
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == zoo.IMAGE) | (inputs["attention_mask"] == 0), -100)
    labels[:, :-3] = -100
    method = SeTok(readout=readout, budget=9).fresh(1)
    session = foveate.attach(model, method, train=True)
    try:
        method.module.eval()  # without dropout
        weights = dict(method.module.named_parameters())
        loss, _ = method.objective(model, {**inputs, "labels": labels})
        loss.backward()
        assert [name for name, weight in weights.items() if weight.grad is None or not weight.grad.abs().max() > 1e-9] == []
        for name in ("inner.qkv.0.weight", "inter.mlp.0.weight", "out.weight"):
            found, gradient = slopes(weights[name], lambda: method.objective(model, {**inputs, "labels": labels})[0], 3e-3)
            assert found == pytest.approx(gradient, rel=0.1), name
    finally:
        session.detach()
    assert method.learns == ("module", "projector", "lora")


def test_training_begins_as_the_means_of_clusters():
    model = zoo.load()
    method = SeTok(budget=9).fresh(1)
    with foveate.attach(model, method, train=True):
        method.module.eval()
        method.initialise(model, [])
        tokens = VisualTokens(torch.randn(2, CELLS, 48, generator=torch.Generator().manual_seed(0)), GRID)
        made = method.reduce(tokens).made
        code = position_code(*GRID, 48)
        for row, given in enumerate(tokens.features):
            owner = method.clusters(tokens).owner[row]
            for cluster in range(9):
                torch.testing.assert_close(made[row, cluster], (given + code)[owner == cluster].mean(0), atol=1e-5, rtol=1e-5)


def test_equally_dense_tokens():
    """Two pairs of equal tokens, as dense as each other: the earlier of each pair is the peak."""
    apart = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    assert peak_scores(apart[None], 2).tolist() == [[1, 0, 1, 0]]
    owner = members_of(apart[None], torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]]))
    assert owner.tolist() == [[0, 0, 1, 1]]
