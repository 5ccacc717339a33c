"""The conformance matrix: every registered method on LLaVA, with every decoder, padding and attention implementation.

The numbers T1 to T11 are the invariants the project promises. Methods come from ``foveate.methods()`` with their presets:
registering one is what puts it here; two small ones with weights are beside them. ``test_families`` does the same for every family.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import foveate

from .. import reference, trained_methods, zoo

NEW = 4
GREEDY = dict(
    max_new_tokens=NEW,
    min_new_tokens=NEW,
    suppress_tokens=[zoo.IMAGE],
    do_sample=False,
    return_dict_in_generate=True,
    output_logits=True,
)
BUDGET = 13


def _variants() -> list[str]:
    names = []
    for info in foveate.methods():
        if info.stage == "before the vision encoder":  # which LLaVA's does not allow: tests/engine/vision/test_packed.py
            continue
        names += [info.name, *(f"{info.name}:{preset}" for preset in info.presets)]
    return [*names, *trained_methods.VARIANTS]


FIELDS: dict[str, dict[str, object]] = {
    "tome": dict(budget=20),  # two blocks cannot leave fewer than 16
    "p-sigmoid": dict(budget=0.7),  # its default, a mean over layers, is below what four layers can do
    "sparsevlm:released": dict(budget=0.9, counts=(300, 200, 110)),  # of 576; 192 tokens would be all here
    "vistog": dict(budget=BUDGET),  # it has as many semantic tokens as the pictures here have patches
    **{name: dict(threshold=0.001, neighbours=7) for name in ("setok", "setok-mean")},  # pictures then have different counts
    **trained_methods.VARIANTS,
}


def _build(variant: str, **fields: object) -> foveate.Method:
    """A method; batch-pooled rules, which make an image depend on its neighbours by design, are set to their image form."""
    fields = {**FIELDS.get(variant, {}), **fields}
    name = variant.partition(" ")[0]  # " (...)" are its fields
    try:
        method = foveate.get(name, **fields)
    except foveate.InputError:
        if "budget" in fields:
            raise
        method = foveate.get(name, budget=BUDGET, **fields)
    if method.trained():
        return method.fresh(trained_methods.SEED)
    if hasattr(method, "iqr_scope"):
        method.iqr_scope = "image"
    return method


LEAST = {"tome": 16, "crossget": 16, "crossget+": 16}  # two blocks merge half of the patches each
FEWER = {  # methods that leave fewer tokens than some budgets: those of a smaller picture, and of squares of the grid
    "resize": {1: 1, 5: 4, BUDGET: 12, 19: 16},
    "quecc": {1: 1, 5: 4, BUDGET: 4, 19: 16},
}
VARIANTS = _variants()
PLAIN = [variant for variant in VARIANTS if ":" not in variant]  # without presets
INSIDE = [variant for variant in VARIANTS if _build(variant).inside_decoder()]
BEFORE = [variant for variant in VARIANTS if variant not in INSIDE]  # these act before the projector only
FAMILY_DECODERS = [("llava", decoder) for decoder in zoo.DECODERS]


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str, str], torch.nn.Module]:
    return {}


@pytest.fixture
def load(models):
    def get(family: str = "llava", decoder: str = "llama", attn: str = "sdpa"):
        key = (family, decoder, attn)
        if key not in models:
            models[key] = zoo.load(*key)
        return models[key]

    return get


def _generate(model, inputs, **options):
    torch.manual_seed(1)
    out = model.generate(**inputs, **{**GREEDY, **options})
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "decoder"), FAMILY_DECODERS)
@pytest.mark.parametrize(
    "options",
    [{}, dict(num_beams=3, output_logits=False, output_scores=True), dict(do_sample=True, temperature=0.7)],
    ids=["greedy", "beams", "sampling"],
)
def test_t1_a_budget_of_everything_changes_nothing(load, family, decoder, attn, options):
    model, inputs = load(family, decoder, attn), zoo.batch()
    torch.manual_seed(1)
    before = model.generate(**inputs, **{**GREEDY, **options})
    logits = model(**inputs).logits
    name = "scores" if "num_beams" in options else "logits"
    budgets = (1.0, zoo.TOKENS, 10_000)
    pairs = itertools.product(VARIANTS, budgets) if not options else zip(VARIANTS, itertools.cycle(budgets), strict=False)
    for variant, budget in pairs:
        with _build(variant, budget=1.0 if variant in ("yopo", "dyvte") else budget)(model) as session:
            torch.manual_seed(1)
            after = model.generate(**inputs, **{**GREEDY, **options})
            assert torch.equal(before.sequences, after.sequences), variant
            assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)), variant
            assert session.report.after == session.report.before == [zoo.TOKENS] * 4
            assert set(session.report.layers) == {4 * zoo.TOKENS}
            if not options:
                assert torch.equal(model(**inputs).logits, logits), variant


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "decoder"), FAMILY_DECODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_t2_a_row_of_a_batch_equals_the_row_alone(load, family, decoder, variant, side):
    model = load(family, decoder)
    with _build(variant)(model) as session:
        sequences, logits = _generate(model, zoo.batch(side))
        together = [sum(a for a, r in zip(session.report.after, session.report.rows, strict=True) if r == row) for row in range(4)]
        stages = [[image.stages for image in session.report.images if image.row == row] for row in range(4)]
        for row in range(4):
            inputs = zoo.batch(side, rows=(row,))
            alone, alone_logits = _generate(model, inputs)
            torch.testing.assert_close(logits[row], alone_logits[0], atol=2e-4, rtol=2e-4)
            assert sum(session.report.after) == together[row]
            for image, other in zip(session.report.images, stages[row], strict=True):
                assert _left(image.kept, image.stages) == _left(image.kept, other)
            assert torch.equal(sequences[row, -NEW:], alone[0, -NEW:])


def _left(kept, stages):
    """What each of the four decoder layers runs of a picture; a cut that changes no row of its batch is not recorded."""
    found = [kept] * 4
    for stage in stages:
        found[stage.layer :] = [stage.kept] * (4 - stage.layer)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_t2_forward_of_a_batch_equals_the_row_alone(load, variant, side):
    model = load()
    with _build(variant)(model) as session:
        inputs = zoo.batch(side)
        together = model(**inputs).logits
        lengths = [
            inputs["attention_mask"].sum(1)[row]
            - sum(
                b - a for b, a, r in zip(session.report.before, session.report.after, session.report.rows, strict=True) if r == row
            )
            for row in range(4)
        ]
        for row in range(4):
            alone = model(**zoo.batch(side, rows=(row,))).logits[0]
            assert len(alone) == lengths[row]
            mine = reference.row_end(together, inputs, row, len(alone))
            torch.testing.assert_close(mine, alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "decoder"), FAMILY_DECODERS)
@pytest.mark.parametrize(
    "cache",
    [{}, dict(use_cache=False), dict(cache_implementation="static", disable_compile=True)],
    ids=["dynamic", "none", "static"],
)
def test_t3_generate_equals_a_forward_over_the_spliced_prompt(load, family, decoder, attn, positions, cache):
    """Prefill and decode on the reduced cache against hand-spliced embeddings, full forwards, no cache and no ``generate``."""
    model, inputs = load(family, decoder, attn), zoo.batch()
    method = _build("prumerge+", positions=positions)
    encoded = foveate.encode(model, method, **inputs)
    with method(model) as session:
        sequences, logits = _generate(model, inputs, **cache)
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    images = session.report.images
    assert len({image.after for image in images}) > 1, "the pictures should differ in their counts"
    for row in range(4):
        mine = [i for i, image in enumerate(images) if image.row == row]
        embeddings, places = reference.spliced_embeddings(
            model, inputs, row, [images[i].kept for i in mine], [encoded.embeds[i] for i in mine], zoo.IMAGE
        )
        if positions == "compact":
            places = torch.arange(embeddings.shape[1])[None]
        expected = reference.run_spliced(model, embeddings, places, sequences[row, -NEW:].tolist())
        torch.testing.assert_close(logits[row], expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("variant", BEFORE)
def test_t3_for_every_method(load, variant):
    """The same for each method and preset, with the cache that ``generate`` makes itself."""
    model, inputs = load(), zoo.batch()
    method = _build(variant)
    encoded = foveate.encode(model, method, **inputs)
    with method(model) as session:
        sequences, logits = _generate(model, inputs)
    images = session.report.images
    for row in range(4):
        mine = [i for i, image in enumerate(images) if image.row == row]
        kept, embeds = [images[i].kept for i in mine], [encoded.embeds[i] for i in mine]
        embeddings, _ = reference.spliced_embeddings(model, inputs, row, kept, embeds, zoo.IMAGE)
        expected = reference.run_spliced(model, embeddings, torch.arange(embeddings.shape[1])[None], sequences[row, -NEW:].tolist())
        torch.testing.assert_close(logits[row], expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("tower", ["siglip", "clip with its [CLS] handed on"])
@pytest.mark.parametrize("variant", BEFORE)
def test_other_towers(variant, tower):
    """T1, T2 and T3 where the encoder has no [CLS], and where [CLS] is one of the visual tokens."""
    model = zoo.tower(tower)
    lead = 0 if tower == "siglip" else 1
    inputs = zoo.batch(tokens=zoo.TOKENS + lead)
    plain = _generate(model, inputs)[1]
    with _build(variant, budget=1.0)(model):
        assert torch.equal(_generate(model, inputs)[1], plain)
    method = _build(variant)
    encoded = foveate.encode(model, method, **inputs)
    with method(model) as session:
        sequences, logits = _generate(model, inputs)
    images = session.report.images
    said = any("no [CLS] token" in note for note in session.report.notes)
    assert said == (method.before_decoder().reads_cls and not lead)
    for row in range(4):
        mine = [i for i, image in enumerate(images) if image.row == row]
        kept = [[*range(lead), *(cell + lead for cell in images[i].kept)] for i in mine]
        embeddings, _ = reference.spliced_embeddings(model, inputs, row, kept, [encoded.embeds[i] for i in mine], zoo.IMAGE)
        places = torch.arange(embeddings.shape[1])[None]
        expected = reference.run_spliced(model, embeddings, places, sequences[row, -NEW:].tolist())
        torch.testing.assert_close(logits[row], expected, atol=3e-4, rtol=3e-4)
        alone = foveate.encode(model, method, **zoo.batch(rows=(row,), tokens=zoo.TOKENS + lead)) if mine else None
        for i, embeds in zip(mine, alone.embeds if alone else [], strict=True):
            torch.testing.assert_close(embeds, encoded.embeds[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", [variant for variant in INSIDE if variant != "yopo"])  # test_yopo.py
@pytest.mark.parametrize(("family", "decoder"), [("llava", d) for d in ("llama", "mistral", "gemma3")])
def test_t3_for_every_method_inside_the_decoder(load, family, decoder, variant, monkeypatch):
    """Against the unmodified model, masked; methods are overheard for what they keep and mix."""
    model, plain, inputs = load(family, decoder), load(family, decoder, "eager"), zoo.batch()
    method = _build(variant)
    heard = reference.overheard(type(method.inside_decoder()[0]), monkeypatch)
    encoded = foveate.encode(model, method.before_decoder(), **inputs)
    with method(model) as session:
        sequences, logits = _generate(model, inputs)
    planned = list(method.inside_decoder()[0].cuts(4))
    assert [tokens.layer for tokens, _ in heard] == planned[: len(heard)]
    # nobody is asked about a batch without visual tokens
    assert len(heard) == len(planned) or not (heard[-1][1].keep & heard[-1][0].visual).any()
    images, compact = session.report.images, method.inside_decoder()[0].positions == "compact"
    width = heard[0][0].columns.shape[1]
    for row in range(4):
        mine = [i for i, image in enumerate(images) if image.row == row]
        kept, embeds = [images[i].kept for i in mine], [encoded.embeds[i] for i in mine]
        embeddings, places = reference.spliced_embeddings(model, inputs, row, kept, embeds, zoo.IMAGE)
        if method.before_decoder().positions == "compact":
            places = torch.arange(embeddings.shape[1])[None]
        cuts = reference.cuts_of_row(heard, row, offset=width - embeddings.shape[1])
        wanted = reference.Masked(plain, cuts, embeddings.shape[1], compact).logits(
            embeddings, sequences[row, -NEW:].tolist(), places
        )
        torch.testing.assert_close(logits[row], wanted, atol=4e-4, rtol=4e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_t8_compiled_and_static(load, variant):
    model, inputs = zoo.load(), zoo.batch()
    with _build(variant)(model):
        expected = _generate(model, inputs)[0]
        if variant in INSIDE:
            with pytest.raises(foveate.InputError, match="static cache"):
                _generate(model, inputs, cache_implementation="static", disable_compile=True)
        else:
            static = _generate(model, inputs, cache_implementation="static", disable_compile=True)[0]
            assert torch.equal(static, expected)
        logits = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(compiled, logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_t10_broken_pictures_are_refused(load, variant):
    model, inputs = load(), zoo.batch()
    inputs["pixel_values"][1, 0, 3, 3] = float("nan")
    with _build(variant)(model), pytest.raises(foveate.InputError, match="NaN or infinite"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("variant", BEFORE)
def test_t11_positions(load, variant, positions):
    """Compact positions count what is left; original ones are where a token was in its row without padding."""
    inputs = zoo.batch()
    encoded = foveate.encode(load(), _build(variant, positions=positions), **inputs)
    for row in range(4):
        real = encoded.inputs["attention_mask"][row].bool()
        found = encoded.inputs["position_ids"][row][real].tolist()
        if positions == "compact":
            assert found == list(range(len(found)))
            continue
        images = [image for image in encoded.report.images if image.row == row]
        expected, number, at = [], 0, 0
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        while at < len(ids):
            if ids[at] == zoo.IMAGE:
                expected += [at + cell for cell in images[number].kept]
                number, at = number + 1, at + zoo.TOKENS
            else:
                expected.append(at)
                at += 1
        assert found == expected


def test_nothing_asks_for_attention_matrices(load):
    """Under SDPA an attention module that is asked for its weights returns them; none is."""
    model, asked = load(), []

    def look(_, __, kwargs, output):
        asked.append(kwargs.get("output_attentions") or output[1] is not None)

    handles = [
        module.register_forward_hook(look, with_kwargs=True) for name, module in model.named_modules() if name.endswith("self_attn")
    ]
    for variant in VARIANTS:
        with _build(variant)(model):
            model.generate(**zoo.batch(), max_new_tokens=2)
    for handle in handles:
        handle.remove()
    assert len(asked) > 6 * len(VARIANTS)
    assert not any(asked)


def _fingerprint(model) -> dict[str, object]:
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for name, m in model.named_modules()
    }
    members = {cls: dict(vars(cls)) for cls in type(model).__mro__ if cls.__module__.startswith("transformers")}
    return {"dict": sorted(model.__dict__), "hooks": hooks, "state": sorted(model.state_dict()), "classes": members}


@pytest.mark.parametrize("variant", VARIANTS)
def test_t4_leaving_restores_the_model(load, variant):
    model, inputs = load(), zoo.batch()
    output = _generate(model, inputs)[1]  # the first run installs transformers' own hooks
    before = _fingerprint(model)
    with _build(variant, positions="original")(model):
        _generate(model, inputs)
    assert _fingerprint(model) == before
    with pytest.raises(RuntimeError, match="on purpose"), _build(variant)(model):
        model.generate(**inputs, max_new_tokens=1, logits_processor=[_fail])
    assert _fingerprint(model) == before
    assert torch.equal(_generate(model, inputs)[1], output)


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")


def test_t4_nested_blocks_and_two_models(load):
    model, other, inputs = load(), load(decoder="qwen2"), zoo.batch()
    plain, plain_other = _generate(model, inputs)[1], _generate(other, inputs)[1]
    with foveate.Spatial(budget=10)(model) as outer, foveate.PruMerge()(other) as beside:
        first = _generate(model, inputs)[1]
        with foveate.Spatial(budget=20)(model) as inner:
            _generate(model, inputs)
            assert inner.report.after == [20] * 4
        assert torch.equal(_generate(model, inputs)[1], first)
        assert outer.report.after == [10] * 4
        assert not torch.equal(_generate(other, inputs)[1], plain_other)
        assert beside.report.method["name"] == "prumerge"
    assert torch.equal(_generate(model, inputs)[1], plain)
    assert torch.equal(_generate(other, inputs)[1], plain_other)


@pytest.mark.parametrize("variant", INSIDE)
@pytest.mark.parametrize("decoder", zoo.DECODERS)
def test_t6_text_stays_and_order_too(load, decoder, variant, monkeypatch):
    """Text is never removed, but where the method says so; then never what is protected. What the report says is what ran."""
    model, inputs, method = load(decoder=decoder), zoo.batch(), _build(variant)
    kind = type(method.inside_decoder()[0])
    heard, ran = reference.overheard(kind, monkeypatch), {}
    handles = [
        layer.register_forward_hook(lambda _, __, out, n=number: ran.setdefault(n, out[0] if isinstance(out, tuple) else out))
        for number, layer in enumerate(model.get_decoder().layers[:-1])
    ]
    with method(model) as session:
        model.generate(**inputs, max_new_tokens=1)
    for handle in handles:
        handle.remove()
    text = inputs["attention_mask"].sum(1) - (inputs["input_ids"] == zoo.IMAGE).sum(1)
    for tokens, cut in heard:
        left = reference.stays(method.inside_decoder()[0], tokens, cut)
        words = (left & ~tokens.visual).sum(1)
        assert torch.equal(words, text) or (variant == "iti:paper" and bool((words <= text).all()))
        if tokens.layer < 3:
            assert ran[tokens.layer].shape[1] == int(left.sum(1).max())
        assert session.report.layers[tokens.layer] == int((left & tokens.visual).sum())
    for image in session.report.images:
        before = image.kept
        for stage in image.stages:
            assert stage.kept == sorted(stage.kept)
            assert set(stage.kept) <= set(before)
            before = stage.kept


@pytest.mark.parametrize("budget", [None, 1, 5, BUDGET, 0.3])
@pytest.mark.parametrize("variant", BEFORE)
def test_t6_contract_of_a_reduction(load, variant, budget):
    model, inputs = load(), zoo.batch()
    method = _build(variant) if budget is None else _build(variant, budget=budget)
    expected = round(budget * zoo.TOKENS) if isinstance(budget, float) else budget
    if expected is not None and expected < LEAST.get(variant, 1):
        with pytest.raises(foveate.InputError, match=f"leave {LEAST[variant]} of {zoo.TOKENS}"):
            foveate.encode(model, method, **inputs)
        return
    encoded = foveate.encode(model, method, **inputs)
    reduction, counts = encoded.reduction, [len(e) for e in encoded.embeds]
    if expected is not None:
        assert counts == [FEWER.get(variant, {}).get(expected, expected)] * 4
    valid = reduction.mask()
    source = reduction.source_map(zoo.TOKENS)
    for i, count in enumerate(counts):
        place = {int(reduction.index[i, j]): j for j in valid[i].nonzero().flatten().tolist()}
        kept = list(place)
        assert len(kept) == int(valid[i].sum()) == count, "one output per grid cell"
        added = 0 if reduction.added is None else reduction.added.shape[1]  # these are made of no patch
        if reduction.made is None:
            of_cells = kept[added : len(kept) - getattr(method, "escorts", False)]
            assert all(source[i, cell] == place[cell] for cell in of_cells), "a kept cell belongs to itself"
        else:
            assert source[i].tolist() == reference.strongest(reduction.attention[i])
        assert set(source[i].unique().tolist()) <= {-1, *valid[i].nonzero().flatten().tolist()}
    # text is never removed and stays in order
    for row in range(4):
        full = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        short = encoded.inputs["input_ids"][row][encoded.inputs["attention_mask"][row].bool()]
        assert torch.equal(full[full != zoo.IMAGE], short[short != zoo.IMAGE])
        mine = sum(c for c, r in zip(counts, encoded.report.rows, strict=True) if r == row)
        assert (short == zoo.IMAGE).sum() == mine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision(variant, dtype):
    model, inputs = zoo.load(dtype=dtype), zoo.batch(dtype=dtype)
    with _build(variant)(model) as session:
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
        assert sum(session.report.layers) < sum(session.report.before) * len(session.report.layers)


@pytest.mark.parametrize("decoder", zoo.DECODERS)
@pytest.mark.parametrize("variant", INSIDE)
def test_t7_inside_the_decoder_the_same_tokens_under_sdpa_and_eager(load, decoder, variant):
    kept = []
    for attn in ("sdpa", "eager"):
        model = load(decoder=decoder, attn=attn)
        with _build(variant)(model) as session:
            model.generate(**zoo.batch(), max_new_tokens=1)
            kept.append([[stage.kept for stage in image.stages] for image in session.report.images])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("variant", BEFORE)
def test_t7_the_same_tokens_under_sdpa_and_eager(load, variant):
    inputs = zoo.batch()
    kept = [foveate.encode(load(attn=attn), _build(variant), **inputs).reduction for attn in ("sdpa", "eager")]
    assert torch.equal(kept[0].index, kept[1].index)
    assert torch.equal(kept[0].mask(), kept[1].mask())
