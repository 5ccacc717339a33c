"""What methods say of the tokens that decoder layers run, against what the report of a call says that they ran."""

from statistics import fmean

import pytest

import foveate

from .. import trained_methods, zoo
from .test_conformance import FIELDS, VARIANTS, _build

LAYERS = 4
# rules that look at the picture; and inside the decoder, at the attention
UNKNOWN = {"iti", "iti:paper", "text-relevance", "gate", "dyvte"}


@pytest.fixture(scope="module")
def model():
    return zoo.load()


def ran(model, method) -> list[float]:
    """Visual tokens of a picture that each layer ran, on average over the pictures of a batch."""
    with method(model) as session:
        model.generate(**zoo.batch(), max_new_tokens=1)
        return [count / len(session.report.before) for count in session.report.layers]


@pytest.mark.parametrize("budget", [13, 0.3, 1.0, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_tokens(model, variant, budget):
    try:
        method = _build(variant, **({} if budget is None else {"budget": budget}))
        said = method.layer_tokens(zoo.TOKENS, LAYERS)
        found = ran(model, method)
    except foveate.InputError:
        return  # the method cannot have this budget: test_conformance knows which can
    if said is None:
        assert budget is None or variant in UNKNOWN, "a budget of a number of tokens gives a number of tokens"
        return
    assert len(said) == LAYERS
    if variant == "quecc":  # as many as squares of the grid, at most what was asked for
        assert max(found) <= max(said)
        return
    assert found == pytest.approx(said, abs=1)


@pytest.mark.parametrize("at", ["mean", "last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_budget(model, variant, at):
    """The setting that is found runs as many tokens as was asked for, or the message says what can be had."""
    method, said = _build(variant), []
    for tokens in (50, 30):
        try:
            setting = method.at_budget(tokens, zoo.TOKENS, LAYERS, at)
        except foveate.InputError as error:
            said.append(str(error))
            continue
        each = ran(model, setting)
        # of a sigmoid the mean is meant; of aim, which leaves nothing in the last layer, what enters the decoder
        reached = fmean(each) if at == "mean" or variant == "p-sigmoid" else each[0] if variant.startswith("aim") else each[-1]
        if variant == "resize":  # there are only as many grids
            assert 0.8 * tokens <= reached <= tokens
            continue
        assert reached == pytest.approx(tokens, abs=1.5), setting
        assert type(setting) is type(method)
    assert all(message.startswith(f"{method.name}: ") for message in said)
    why = ("cannot be had; the nearest it can do is", "looks at the picture", "a square of cells becomes one token")
    assert all(any(reason in message for reason in why) for message in said)
    assert len(said) < 2 or variant in {"yopo", "aim-prune", "gate", "dyvte", "quecc"}


def test_what_cannot_be_had_is_named():
    with pytest.raises(foveate.InputError, match=r"fastv: 8 of 64 visual tokens on average over 4 decoder layers cannot be had"):
        foveate.get("fastv").at_budget(8, 64, 4)
    with pytest.raises(foveate.InputError, match="its rule looks at the picture"):
        trained_methods.Gate().fresh().at_budget(8, 64, 4)


def test_with_budget_replaces_what_else_says_how_many():
    for name, fields in (("tome", {"r": (3,)}), ("g-search", {"rates": (1.0, 1.0, 0.5, 0.5)})):
        method = foveate.get(name, **fields)
        changed = method.with_budget(0.9)
        assert changed.budget == 0.9
        assert method.budget is None
        assert type(changed) is type(method)
        for field in fields:
            assert getattr(changed, field) != fields[field]
    kept = foveate.PruMerge(iqr_factor=2.0, positions="original").with_budget(7)
    assert (kept.iqr_factor, kept.positions, kept.budget) == (2.0, "original", 7)
    with pytest.raises(foveate.InputError, match="budget=0 would keep no"):
        kept.with_budget(0)
    assert FIELDS


def test_compositions():
    """The budget of what acts before the decoder; at_budget counts what enters and what each layer runs."""
    method = foveate.Compose(foveate.PruMergePlus(), foveate.FastV(budget=0.5, layer=2))
    assert method.with_budget(20).layer_tokens(64, 4) == [20, 20, 10, 10]
    assert method.at_budget(15, 64, 4).layer_tokens(64, 4) == [20, 20, 10, 10]
    assert method.at_budget(10, 64, 4, "last").layer_tokens(64, 4)[-1] == 10
    assert foveate.Compose(foveate.FastV(layer=2)).with_budget(0.25).layer_tokens(64, 4) == [64, 64, 16, 16]
    with pytest.raises(foveate.InputError, match="no field 'x' of its own"):
        method.with_fields(x=1)
    assert [each.seed for each in foveate.Random(budget=4).repeats()] == [0, 1, 2]
    assert foveate.PruMerge().repeats() == (foveate.PruMerge(),)
