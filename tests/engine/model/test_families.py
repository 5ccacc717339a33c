"""The conformance matrix of families: every registered one, with a representative method of each kind.

Models and prompts are in ``families``, what they must answer is worked out in ``family_reference``. The numbers T1 to T11 are the
invariants the project promises; ``test_conformance`` has them for every method on LLaVA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import date

import pytest
import torch
from torch import Tensor

import foveate
from foveate.engine.model import anatomy
from foveate.families import FAMILIES
from foveate.methods.base import EncoderReducer, ProjectorReducer

from ... import families, reference
from ... import family_reference as by_hand
from ...family_prompts import IMAGE, VIDEO
from ...trained_methods import SEED, Gate, Learnt

NEW, BUDGET = 5, 7
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
GREEDY |= dict(return_dict_in_generate=True, output_logits=True)
INSIDE_ENCODER = ("llava", "video_llava", "paligemma")  # where one grid enters the prompt as a CLIP or SigLIP encoder made it
REFUSED = {"vipllava": "several encoder layers"}
JOINED = ("llava", "llava_next", "llava_next_video", "video_llava")  # whose features are what one layer of such an encoder puts out
MROPE = tuple(family for family, spec in families.SPECS.items() if spec.types == "mrope")
ROWS = [(family, row) for family in families.SPECS for row in families.row_numbers(family)]


def method_of(name: str, family: str) -> foveate.Method:
    layer = families.LEVELS.get(family, 2)
    methods = {
        "prumerge+": lambda: foveate.PruMergePlus(),
        "divprune": lambda: foveate.DivPrune(budget=BUDGET),
        "vtc-cls": lambda: foveate.VTCCls(budget=BUDGET),
        "spatial": lambda: foveate.Spatial(budget=0.3),
        "iti": lambda: foveate.ITI(budget=0.6, layers=(layer,)),
        "fastv": lambda: foveate.FastV(budget=0.5, layer=layer),
        "tome": lambda: foveate.ToMe(budget=0.5),
        "learnt": lambda: Learnt().fresh(SEED),
        "learnt (decoder)": lambda: Learnt(space="decoder").fresh(SEED),
        "gate": lambda: Gate(first=layer).fresh(SEED),
    }
    return methods[name]()


METHODS = ("prumerge+", "divprune", "vtc-cls", "spatial", "iti", "fastv", "tome", "learnt", "learnt (decoder)", "gate")
INSIDE = ("iti", "fastv", "gate")
FRONT = ("prumerge+", "divprune", "vtc-cls", "spatial", "learnt")
MODELS = (*FAMILIES, *families.APART)
CASES = [(f, name) for f in MODELS for name in METHODS if name != "tome" or f in INSIDE_ENCODER]
CASES = [(f, name) for f, name in CASES if name not in INSIDE or f not in families.UNCUT]
FRONT_CASES = [(f, name) for f in MODELS for name in FRONT]


def generate(family: str, inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Sequences and logits [B, NEW, V]."""
    output = families.load(family).generate(**inputs, **GREEDY, **options)
    return output.sequences, torch.stack(output.logits, 1)


@functools.cache
def plain(family: str) -> tuple[Tensor, Tensor]:
    """What the unmodified model generates for the batch."""
    return generate(family, families.batch(family))


def row_kept(report: foveate.Report, row: int) -> list[int]:
    """Which of the placeholders of a row stay."""
    found, start = [], 0
    for mine, kept, before in zip(report.rows, report.kept, report.before, strict=True):
        if mine == row:
            found += [start + place for place in kept]
            start += before
    return found


def row_embeds(encoded: foveate.Encoded, row: int) -> Tensor:
    mine = [embeds for embeds, r in zip(encoded.embeds, encoded.report.rows, strict=True) if r == row]
    return torch.cat(mine) if mine else torch.zeros(0, 64)


def test_every_family_has_a_small_model():
    assert set(MODELS) == set(families.SPECS)


def test_families_that_need_a_newer_transformers_say_so(monkeypatch):
    model = families.load("vipllava")
    monkeypatch.setattr(anatomy.transformers, "__version__", "5.22.2")
    with pytest.raises(foveate.UnsupportedModelError, match=r"VipLLaVA needs transformers 5\.23 or newer, and this is 5\.22\.2"):
        foveate.attach(model, "prumerge+")
    monkeypatch.setattr(anatomy.transformers, "__version__", "5.23.0")
    foveate.attach(model, "prumerge+").detach()


@pytest.mark.parametrize("family", families.SPECS)
def test_unmodified_models_answer_as_worked_out_by_hand(family):
    """The small models, their batches and the reference itself: without any method, in a batch or alone."""
    model, (sequences, logits) = families.load(family), plain(family)
    for row in families.row_numbers(family):
        inputs = families.batch(family, rows=(row,))
        torch.testing.assert_close(generate(family, inputs)[1][0], logits[row], atol=1e-4, rtol=1e-4)
        features, deep = by_hand.whole_features(model, inputs)
        spliced = by_hand.splice(family, model, inputs, range(len(features)), features, compact=True, deep=deep)
        wanted = by_hand.logits(model, spliced, sequences[row, -NEW:].tolist())
        torch.testing.assert_close(logits[row], wanted, atol=1e-4, rtol=1e-4)
        laid = families.laid_row(family, families.SPECS[family].rows[row])
        assert sum(len(item) for medium in laid for item in medium.items) == len(features)
        if len(features):  # pictures matter, all of their tokens together and the last one alone
            for changed in (-features, torch.cat([features[:-1], -features[-1:]])):
                other = by_hand.splice(family, model, inputs, range(len(features)), changed, compact=True, deep=deep)
                assert (by_hand.logits(model, other, [0]) - wanted[:1]).abs().max() > 0.01


@pytest.mark.parametrize(("family", "row"), [(family, row) for family, row in ROWS if family in MROPE])
def test_positions_by_hand_are_those_of_the_model(family, row):
    inputs = families.batch(family, rows=(row,))
    if not families.SPECS[family].rows[row]:
        assert by_hand.rope_positions(family, inputs).tolist() == [list(range(inputs["input_ids"].shape[1]))] * 3
        return
    known = {name: value for name, value in inputs.items() if "pixel" not in name}
    found = families.load(family).model.get_rope_index(**known)[0]
    assert torch.equal(found[:, 0], by_hand.rope_positions(family, inputs))


@functools.cache
def beams_of(family: str) -> Tensor:
    """What the unmodified model generates for the batch with two beams; of embeddings, where it loses pictures on the way."""
    model, inputs = families.load(family), families.batch(family)
    if family not in families.LATE:
        return model.generate(**inputs, **GREEDY, num_beams=2).sequences
    with pytest.raises(Exception, match="do not match"):
        model.generate(**inputs, **GREEDY, num_beams=2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeddings = model.get_input_embeddings()(ids).detach()
    for row in families.row_numbers(family):
        embeddings[row, ids[row] == IMAGE] = by_hand.whole_features(model, families.batch(family, rows=(row,)))[0]
    return model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY, num_beams=2).sequences


@pytest.mark.parametrize(("family", "name"), CASES)
def test_t1_a_budget_of_everything_changes_nothing(family, name):
    model, inputs = families.load(family), families.batch(family)
    sequences, logits = plain(family)
    beams = beams_of(family)
    direct = model(**inputs).logits
    for budget in (1.0, 10_000):
        with method_of(name, family).with_budget(budget)(model) as session:
            after, after_logits = generate(family, inputs)
            assert torch.equal(after, sequences)
            assert torch.equal(after_logits, logits)
            assert session.report.after == session.report.before
            assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=2).sequences[:, -NEW:], beams[:, -NEW:])
            assert torch.equal(model(**inputs).logits, direct)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_t2_a_row_of_a_batch_equals_the_row_alone(family, name, side):
    method = method_of(name, family)
    with method(families.load(family)) as session:
        sequences, logits = generate(family, families.batch(family, side=side))
        report = session.report
        for row in families.row_numbers(family):
            alone, alone_logits = generate(family, families.batch(family, rows=(row,), side=side))
            torch.testing.assert_close(logits[row], alone_logits[0], atol=2e-4, rtol=2e-4)
            assert torch.equal(sequences[row, -NEW:], alone[0, -NEW:])
            assert row_kept(report, row) == row_kept(session.report, 0)


@torch.no_grad()
def made_by_hand(model: torch.nn.Module, heard: list, features: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The kept tokens of a row [M, D], and of what they are made [M, P], from what the method answered for each grid.

    Where a cell of a grid stands in the row is told by the vector that the unmodified model has there.
    """
    made, mix = features[list(kept)], torch.eye(len(features))[list(kept)]
    for tokens, answer in heard if len(features) else ():
        early = tokens.features.shape[-1] != features.shape[-1]
        projector = model.base_model.multi_modal_projector if early else torch.nn.Identity()
        for b, grid in enumerate(tokens.features):
            near = torch.cdist(projector(grid[None])[0], features, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            if near.values.max() > 1e-3:
                continue  # of another row
            weights = answer.matrix(len(grid))[b]
            outputs = weights @ grid
            if answer.made is not None:
                weights, outputs = answer.attention[b], answer.made[b]
            outputs = projector(outputs[None])[0] if answer.space == "features" else outputs
            for j in answer.mask()[b].nonzero().flatten().tolist():
                at = kept.index(int(near.indices[answer.index[b, j]]))
                made[at], mix[at] = outputs[j], torch.zeros(len(features)).scatter(0, near.indices, weights[j])
    return made, mix


@pytest.mark.parametrize(("family", "name"), CASES)
def test_t3_generate_equals_the_spliced_row(family, name, monkeypatch):
    """Prefill and decoding with a cache, in a batch, against one row at a time without either."""
    model, inputs, method = families.load(family), families.batch(family), method_of(name, family)
    inside, compact = method.inside_decoder(), method.before_decoder().positions == "compact"
    heard = reference.overheard(type(inside[0]), monkeypatch) if inside else []
    reduced = overheard_reductions(monkeypatch, method)
    encoded = foveate.encode(model, method.before_decoder(), **inputs)
    with method(model) as session:
        sequences, logits = generate(family, inputs)
    report = session.report
    assert report.kept == encoded.report.kept
    assert report.layers[-1] < sum(report.before)
    for row in families.row_numbers(family):
        alone, kept, visual = families.batch(family, rows=(row,)), row_kept(report, row), row_embeds(encoded, row)
        features, deep = by_hand.whole_features(model, alone)
        made, mix = made_by_hand(model, reduced, features, kept)
        if name != "tome":
            torch.testing.assert_close(made, visual, atol=1e-4, rtol=1e-4)
        deep = [mix @ layer for layer in deep]
        spliced = by_hand.splice(family, model, alone, kept, visual, compact=compact, deep=deep)
        left = {}
        if heard:
            offset = heard[0][0].columns.shape[1] - spliced.embeddings.shape[1]
            left = {layer: cut.left for layer, cut in reference.cuts_of_row(heard, row, offset).items()}
        wanted = by_hand.logits(model, spliced, sequences[row, -NEW:].tolist(), left)
        torch.testing.assert_close(logits[row], wanted, atol=3e-4, rtol=3e-4)


def overheard_reductions(monkeypatch: pytest.MonkeyPatch, method: foveate.Method) -> list:
    """What the token reducer of a method is asked and what it answers, from now on."""
    heard: list = []
    kind = type(method.before_decoder())
    if issubclass(kind, ProjectorReducer):
        reduce = kind.reduce

        def overhear(self, tokens):
            answer = reduce(self, tokens)
            heard.append((tokens, answer))
            return answer

        monkeypatch.setattr(kind, "reduce", overhear)
    return heard


@pytest.mark.parametrize("name", ["divprune", "vtc-cls", "spatial"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_the_models_own(family, name):
    """A method that only selects hands on the features of the unmodified model."""
    model, inputs = families.load(family), families.batch(family)
    encoded = foveate.encode(model, method_of(name, family), **inputs)
    for row in families.row_numbers(family):
        features, _ = by_hand.whole_features(model, families.batch(family, rows=(row,)))
        torch.testing.assert_close(row_embeds(encoded, row), features[row_kept(encoded.report, row)], atol=1e-4, rtol=1e-4)


def state(model: torch.nn.Module) -> dict[str, object]:
    return {
        name: (sorted(vars(module)), *(len(getattr(module, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks")))
        for name, module in model.named_modules()
    }


def interrupted(*_: object) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] in ("prumerge+", "fastv", "tome")])
def test_t4_leaving_restores_the_model(family, name):
    model, inputs, (_, logits) = families.load(family), families.batch(family), plain(family)
    before, method = state(model), method_of(name, family)
    with method(model):
        assert not torch.equal(generate(family, inputs)[1], logits)
    assert state(model) == before
    with pytest.raises(RuntimeError, match="on purpose"), method(model):
        generate(family, inputs, logits_processor=[interrupted])
    assert state(model) == before
    assert torch.equal(generate(family, inputs)[1], logits)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in INSIDE_ENCODER])
def test_methods_inside_the_encoder_are_refused_with_the_reason(family):
    model = families.load(family)
    before = state(model)
    with pytest.raises(foveate.UnsupportedModelError, match=REFUSED.get(family, "inside the vision encoder")):
        foveate.attach(model, "tome", budget=0.5)
    assert state(model) == before


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("family", families.UNCUT)
def test_cuts_inside_other_decoders_are_refused_with_the_reason(family, name):
    model = families.load(family)
    before = state(model)
    with pytest.raises(foveate.UnsupportedModelError, match=r"none can leave between layers\. Use a method"):
        foveate.attach(model, method_of(name, family))
    assert state(model) == before


@pytest.mark.parametrize("budget", [None, 1, BUDGET, 0.3])
@pytest.mark.parametrize(("family", "name"), FRONT_CASES)
def test_t6_contract_of_items(family, name, budget):
    """Counts, order, structure tokens and text."""
    model, inputs, method = families.load(family), families.batch(family), method_of(name, family)
    if budget is None and method.needs_budget():
        return
    method.budget = budget
    encoded = foveate.encode(model, method, **inputs)
    report, rows = encoded.report, families.SPECS[family].rows
    laid = [
        (row, medium, item) for row in range(len(rows)) for medium in families.laid_row(family, rows[row]) for item in medium.items
    ]
    assert report.rows == [row for row, _, _ in laid]
    assert report.before == [len(item) for _, _, item in laid]
    assert report.after == [len(kept) for kept in report.kept] == [len(embeds) for embeds in encoded.embeds]
    for (_, _, item), kept in zip(laid, report.kept, strict=True):
        assert kept == sorted(set(kept))
        stays = set(kept)
        for at, place in enumerate(item):
            if place.kind == "newline":
                line = {n for n, other in enumerate(item) if other == ("cell", place.line)}
                assert (at in stays) == bool(line & stays)
            elif place.kind != "cell":
                assert at in stays
        total, left = (sum(item[at].kind == "cell" for at in places) for places in (range(len(item)), kept))
        if budget is None:
            assert 0 < left < total
        else:
            assert left == (budget if isinstance(budget, int) else round(budget * total))
    for number, (_, _, item) in enumerate(laid):
        grids = [image for image in report.images if image.item == number]
        assert [image.part for image in grids] == list(range(len(grids)))
        fixed = 0 if len(grids) > 1 else sum(place.kind != "cell" for place in item)  # a picture of one grid counts them, too
        assert sum(image.after for image in grids) == sum(item[at].kind == "cell" for at in report.kept[number]) + fixed
    for row in range(len(rows)):
        full, short = (ids["input_ids"][row][ids["attention_mask"][row].bool()] for ids in (inputs, encoded.inputs))
        stays = ~by_hand.placeholders(full)
        stays[by_hand.placeholders(full).nonzero().flatten()[row_kept(report, row)]] = True
        assert torch.equal(full[stays], short)


# of each family whose grids in these batches a stride of quecc divides, that stride
SQUARES = dict(llava=2, vipllava=3, video_llava=2, gemma3=2, paligemma=2, internvl=3, idefics3=3, smolvlm=3, aya_vision=3)
EXPERTS = ("qwen3_vl_moe", "glm4v_moe")
SQUARES |= dict(qianfan_ocr=3, cohere2_vision=3, ovis2=3)


def every_method(family: str) -> list[foveate.Method]:
    """All registered methods, with half of the tokens."""
    found = []
    for info in foveate.methods():
        own = {"quecc": {"stride": SQUARES.get(family, 2)}, "dyvte": {"threshold": 0.3}, "pixelprune": {}}
        fields = own.get(info.name, {"budget": 0.5})
        method = foveate.get(info.name, **fields)
        method = method.fresh(SEED) if method.trained() else method
        if family in families.LEVELS and method.inside_decoder():
            first = families.LEVELS[family]
            places = {"layer": first, "layers": (first,)}
            method = method.with_fields(**{name: at for name, at in places.items() if hasattr(method, name)})
        found.append(method)
    return found


DAY = date.today().toordinal()  # ``make test`` sweeps over another sixth of the families every day
SWEEP = [pytest.param(family, marks=[pytest.mark.slow] if (n + DAY) % 6 else []) for n, family in enumerate(MODELS)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SWEEP)
def test_every_method_on_every_family(family, side):
    """T2 and T4 for all that is registered."""
    model, inputs = families.load(family), families.batch(family, side=side)
    generate(family, inputs)  # the first run installs transformers' own hooks
    for method in every_method(family):
        before = state(model)
        if isinstance(method.before_decoder(), EncoderReducer) and family not in INSIDE_ENCODER:
            with pytest.raises(foveate.UnsupportedModelError, match=REFUSED.get(family, "inside the vision encoder")):
                foveate.attach(model, method)
            continue
        if isinstance(method.before_decoder(), foveate.PixelReducer):
            if not anatomy.anatomy(model).tower_kind.packs:
                with pytest.raises(foveate.UnsupportedModelError, match="before the vision encoder"):
                    foveate.attach(model, method)
            continue  # pictures here repeat nothing: tests/engine/vision/test_packed.py has some that do
        if method.before_decoder().joins_encoder and family not in JOINED:
            with pytest.raises(foveate.UnsupportedModelError, match="tokens of its own through the vision encoder"):
                foveate.attach(model, method)
            continue
        cuts = [layer for reducer in method.inside_decoder() for layer in reducer.cuts(6)]
        if method.name == "quecc" and family not in SQUARES:
            with method(model), pytest.raises(foveate.InputError, match="stride=2 does not divide a picture of"):
                generate(family, inputs)
            continue
        if family in families.UNCUT and (method.inside_decoder() or method.first_tokens() is not None):
            with pytest.raises(foveate.UnsupportedModelError, match="none can leave between layers"):
                foveate.attach(model, method)
            assert state(model) == before, method
            continue
        if family in EXPERTS and method.name == "yopo":  # it leaves out neurons of one MLP
            with pytest.raises(foveate.UnsupportedModelError, match="has no MLP that could be found"):
                foveate.attach(model, method)
            continue
        if min(cuts, default=6) < families.LEVELS.get(family, 0):
            with pytest.raises(foveate.InputError, match="after its first 3 layers"):
                foveate.attach(model, method)
            continue
        with method(model) as session:
            logits = generate(family, inputs)[1]
            report = session.report
            assert sum(report.layers) < sum(report.before) * len(report.layers), method
            for row in families.row_numbers(family):
                alone = generate(family, families.batch(family, rows=(row,), side=side))[1]
                torch.testing.assert_close(logits[row], alone[0], atol=2e-4, rtol=2e-4, msg=lambda m, name=method.name: name + m)
                assert row_kept(report, row) == row_kept(session.report, 0), method
        assert state(model) == before, method
