"""Quantised, adapted and offloaded models: the same invariants as for a model that is loaded plainly.

Kinds of weights that cannot run here are skipped with the reason.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    TorchAoConfig,
)

import foveate
from foveate.lab.exam import Evaluator
from foveate.lab.testset import TestSet
from foveate.pocket.batches import normalise

from ... import reference, zoo
from ...methods.test_yopo import HEADS, Simulated
from ..decoder.test_hooks import expected
from ..test_forward import labels_of

NEW = 4
CLOSE = dict(atol=3e-4, rtol=3e-4)
METHODS = {
    "prumerge+": foveate.PruMergePlus(),
    "tome": foveate.ToMe(budget=20),
    "resize": foveate.Resize(budget=12),
    "cdpruner": foveate.get("cdpruner", budget=9),
    "iti": foveate.ITI(),
    "fastv": foveate.FastV(layer=2, budget=9),
    "yopo": foveate.YOPO(layer_cut=2),
}


@functools.cache
def folder() -> Path:
    """The zoo's LLaVA with widths that 4-bit kernels take: multiples of 64."""
    torch.manual_seed(0)
    config = zoo.build_llava("llama", tower=zoo.clip_config(hidden_size=64, intermediate_size=128)).config
    config.text_config.intermediate_size = 128
    model, path = LlavaForConditionalGeneration(config), Path(tempfile.mkdtemp(prefix="foveate-loading-"))
    model.generation_config.update(pad_token_id=zoo.PAD, eos_token_id=zoo.EOS)
    model.save_pretrained(path)
    return path


def load(path: Path | None = None, **options: Any) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(path or folder(), **{"dtype": torch.float32, **options}).eval()


def generate(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences, and the logits before each new token [B, NEW, V]."""
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=[zoo.IMAGE], do_sample=False)
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


def fingerprint(model: torch.nn.Module) -> dict[str, object]:
    """What stands in the place of methods, and the hooks of torch and accelerate, module by module."""
    names = ("forward", "_old_forward", "_hf_hook", "generate", "config")
    return {
        name: ([id(m.__dict__.get(each)) for each in names], sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


@pytest.fixture
def heads_file(tmp_path) -> str:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"heads": HEADS}))
    return str(file)


# -- quantised


def int8() -> Any:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def int8_dynamic() -> Any:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8DynamicActivationInt8WeightConfig())


def int4() -> Any:
    """Of torchao's packings the one that has a kernel for CPUs."""
    return TorchAoConfig(pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=32))


def bits_and_bytes(bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")


KINDS: dict[str, Callable[[], Any]] = {
    "int8": int8,
    "int8-dynamic": int8_dynamic,
    "int4": int4,
    "bnb-8bit": functools.partial(bits_and_bytes, 8),
    "bnb-4bit": functools.partial(bits_and_bytes, 4),
}
SAVED = ("int8-saved", "bnb-8bit-saved", "bnb-4bit-saved")  # a checkpoint that holds quantised weights; torchao cannot write int4


@functools.cache
def quantised(kind: str, attn: str = "sdpa") -> PreTrainedModel:
    config = KINDS[kind.removesuffix("-saved")]()
    if kind not in SAVED:
        return load(quantization_config=config, attn_implementation=attn)
    path = Path(tempfile.mkdtemp(prefix="foveate-loading-"))
    load(quantization_config=config).save_pretrained(path)
    return load(path, attn_implementation=attn)


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters, packed ones too."""

    def size(tensor: Any) -> int:
        packed = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        return sum(size(getattr(tensor, name)) for name in packed) or tensor.nbytes

    return sum(size(p) for p in model.parameters())


@functools.cache
def rounding(kind: str) -> float:
    """How far the unmodified model's ``generate`` is from full forwards without a cache, for the prompt that is compared below.

    About 1e-5, but 0.3 where activations are rounded to 8 bits: their last bits then decide which way.
    """
    model, inputs = quantised(kind), zoo.batch(rows=(1,))
    sequences, logits = generate(model, inputs)
    with torch.no_grad():
        embeds = list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output)
    every = [list(range(zoo.TOKENS))] * 2
    embeddings, places = reference.spliced_embeddings(model, inputs, 0, every, embeds, zoo.IMAGE)
    whole = reference.Masked(quantised(kind, "eager"), {}, embeddings.shape[1], compact=False)
    return float((whole.logits(embeddings, sequences[0, -NEW:].tolist(), places) - logits[0]).abs().max())


def assert_as_close(kind: str, logits: Tensor, wanted: Tensor, plain: Tensor) -> None:
    """Equal but for rounding, and far closer than to what the model says without a method."""
    assert rounding(kind) < (0.5 if kind.startswith(("int8-dynamic", "bnb")) else 1e-4)
    torch.testing.assert_close(logits, wanted, atol=3e-4 + 3 * rounding(kind), rtol=3e-4)
    assert (logits - wanted).abs().mean() < 0.1 * (logits - plain).abs().mean()


@pytest.mark.parametrize("kind", [*KINDS, *SAVED])
def test_the_weights_really_are_quantised(kind):
    """Embeddings, norms and the head stay float32."""
    assert weight_bytes(quantised(kind)) < (0.37 if "4" in kind else 0.45) * weight_bytes(load())


@pytest.mark.parametrize("kind", [*KINDS, *SAVED])
def test_quantised_a_budget_of_everything_changes_nothing(kind):
    model, inputs = quantised(kind), zoo.batch()
    plain, before = generate(model, inputs), fingerprint(model)
    for name in METHODS:
        with foveate.get(name, budget=1.0)(model) as session:
            same = generate(model, inputs)
            assert session.report.after == [zoo.TOKENS] * 4
        assert all(torch.equal(*pair) for pair in zip(same, plain, strict=True)), name
        assert fingerprint(model) == before, name


@pytest.mark.parametrize("name", [name for name in METHODS if name != "yopo"])
@pytest.mark.parametrize("kind", [*KINDS, *SAVED])
def test_quantised_logits_equal_the_spliced_prompt(kind, name):
    """The same quantised weights, full forwards without cache or ``generate``, over a prompt that was spliced by hand."""
    model, inputs, method = quantised(kind), zoo.batch(rows=(1,)), METHODS[name]
    plain = generate(model, inputs)
    before, encoded = fingerprint(model), foveate.encode(model, method.before_decoder(), **inputs)
    with method(model) as session:
        sequences, logits = generate(model, inputs)
    assert session.report.layers[-1] < 2 * zoo.TOKENS
    wanted = expected(quantised(kind, "eager"), method, inputs, 0, session.report, encoded, sequences[0, -NEW:].tolist())
    assert_as_close(kind, logits[0], wanted, plain[1][0])
    assert fingerprint(model) == before
    assert all(torch.equal(*pair) for pair in zip(generate(model, inputs), plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_yopo_equals_its_simulation(kind, heads_file):
    model, inputs = quantised(kind), zoo.batch(rows=(0,))
    embeds, plain = foveate.encode(model, foveate.Spatial(budget=1.0), **inputs).embeds, generate(model, inputs)
    before = fingerprint(model)
    with foveate.YOPO(layer_cut=2, heads=heads_file)(model):
        sequences, logits = generate(model, inputs)
    embeddings, _ = reference.spliced_embeddings(model, inputs, 0, [list(range(zoo.TOKENS))], embeds, zoo.IMAGE)
    columns = (inputs["input_ids"][0] == zoo.IMAGE).nonzero().flatten().tolist()
    simulated = Simulated(quantised(kind, "eager"), columns, 5, HEADS, 0.5, 2)
    assert_as_close(kind, logits[0], simulated.logits(embeddings, sequences[0, -NEW:].tolist()), plain[1][0])
    assert fingerprint(model) == before


def test_int4_and_prumerge_plus_on_the_pocket_model():
    """Both savings at once, as in Table 2 of arXiv 2403.15388: answers, and which tokens stay."""
    data, found, kept, size = TestSet.draw(12), [], [], []
    for options in ({}, {"quantization_config": int4()}):
        model, _ = foveate.load_pocket(dtype=torch.bfloat16, **options)
        evaluator = Evaluator(model, data)
        found.append((evaluator.run(None), evaluator.run(foveate.PruMergePlus())))
        ids = torch.full((12, 576), model.config.image_token_id)
        encoded = foveate.encode(
            model, "prumerge+", input_ids=ids, pixel_values=normalise([scene.image for scene in data.scenes[:12]]).to(model.dtype)
        )
        kept.append([set(image.kept) for image in encoded.report.images])
        size.append(weight_bytes(model))
    assert size[1] < 0.36 * size[0]
    (whole, _), (packed, both) = found
    assert len(whole.right) > 150
    assert abs(packed.right.mean() - whole.right.mean()) < 0.03
    assert abs(both.right.mean() - packed.right.mean()) < 0.03
    assert sum(both.tokens) < 0.4 * sum(packed.tokens)
    shared = [len(a & b) / len(a | b) for a, b in zip(*kept, strict=True)]
    assert 0.85 < sum(shared) / 12 < 1


# -- adapted


def tuned(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes})
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", [*METHODS, "heads"])
@pytest.mark.parametrize("order", ["wrapped first", "attached first", "merged while attached", "taken off while attached"])
def test_adapters_come_and_go(order, name, heads_file):
    """A method acts on the weights that the model has when it runs: those of the model with its adapters merged."""
    method, inputs = METHODS.get(name) or foveate.YOPO(layer_cut=4, window=None, neurons=1.0, heads=heads_file), zoo.batch()
    alike = zoo.load() if order == "taken off while attached" else tuned(zoo.load()).merge_and_unload().eval()
    plain = generate(alike, inputs)[1]
    with method(alike):
        wanted = generate(alike, inputs)[1]
    assert not torch.allclose(wanted, plain, atol=0.1)
    model = zoo.load() if order == "attached first" else tuned(zoo.load())
    handle = foveate.attach(model, method)
    if order == "attached first":
        model = tuned(model)
    elif order == "merged while attached":
        model = model.merge_and_unload()
    elif order == "taken off while attached":
        model = model.unload()
    torch.testing.assert_close(generate(model, inputs)[1], wanted, **CLOSE)
    handle.detach()
    torch.testing.assert_close(generate(model, inputs)[1], plain, **CLOSE)


@pytest.mark.parametrize("name", ["prumerge+", "tome", "fastv"])
def test_a_projector_that_was_trained_in_full(name):
    """modules_to_save: a copy of the projector stands beside the original, and which one runs depends on the adapter."""
    inputs, method, base = zoo.batch(), METHODS[name], zoo.load()
    model = tuned(copy.deepcopy(base), target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    copied = model.get_base_model().model.multi_modal_projector.modules_to_save["default"]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    alike = model.get_base_model().model.language_model  # the same adapters, the new projector put in by hand
    by_hand = copy.deepcopy(base)
    by_hand.model.language_model, by_hand.model.multi_modal_projector = alike, copied
    with method(by_hand):
        wanted = generate(by_hand, inputs)[1]
    with method(base):
        before = generate(base, inputs)[1]
    with method(model):
        torch.testing.assert_close(generate(model, inputs)[1], wanted, **CLOSE)
        with model.disable_adapter():
            torch.testing.assert_close(generate(model, inputs)[1], before, **CLOSE)
    assert not torch.allclose(wanted, before, atol=0.1)


def spliced_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor, weights: Tensor) -> Tensor:
    """By hand, for one prompt with one picture: the encoder, the merge matrix [M, N], the projector, the spliced prompt."""
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
    visual, table, ids = model.model.multi_modal_projector(weights @ hidden), model.get_input_embeddings(), inputs["input_ids"][0]
    first = int((ids == zoo.IMAGE).nonzero()[0])
    parts = [table(ids[:first]), visual, table(ids[first + zoo.TOKENS :])]
    targets = torch.cat([labels[0, :first], torch.full((len(visual),), -100), labels[0, first + zoo.TOKENS :]])
    states = model.get_decoder()(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(states)[0, :-1], targets[1:])


@pytest.mark.parametrize("kind", ["float32", "int8", "bnb-4bit"])
def test_gradients_of_adapters_equal_the_spliced_prompt(kind):
    """LoRA on all layers of encoder, projector and decoder, over weights in full precision or quantised (QLoRA)."""
    base = load(**({} if kind == "float32" else {"quantization_config": KINDS[kind]()}))
    model, inputs = tuned(base).train(), zoo.batch(rows=(0,))
    labels = labels_of(inputs)
    with foveate.PruMergePlus()(model) as session:
        model(**inputs, labels=labels).loss.backward()
    assert session.report.after[0] < zoo.TOKENS
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    reduction = session.report.reduction
    spliced_loss(model.get_base_model(), inputs, labels, reduction.matrix(zoo.TOKENS)[0][reduction.mask()[0]]).backward()
    for part in ("vision_tower.encoder.layers.1.mlp", "multi_modal_projector", "language_model.layers.3"):
        mine = [name for name in got if part in name]
        assert len(mine) >= 4
        for name in mine:
            wanted = model.get_parameter(name).grad
            assert wanted.abs().sum() > 0
            torch.testing.assert_close(got[name], wanted, atol=1e-5, rtol=1e-3)


# -- offloaded

CPU = torch.device("cpu")
PLACES = {
    **{f"model.{part}": "cpu" for part in ("vision_tower", "language_model.norm", "language_model.rotary_emb")},
    **{f"model.{part}": "disk" for part in ("multi_modal_projector", "language_model.embed_tokens")},
    **{f"model.language_model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(4)},
    "lm_head": "disk",
}
OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, _: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, path: disk_offload(model, path, execution_device=CPU),
    "dispatch_model": lambda model, path: dispatch_model(model, dict(PLACES), offload_dir=path),
    "hooks only": lambda model, _: dispatch_model(model, {"": "cpu"}, force_hooks=True),
}
LOADED: dict[str, dict[str, Any]] = {
    "auto": dict(device_map="auto", max_memory={"cpu": 500_000}),  # of 1.2 MB; the rest goes to the disk
    "disk": dict(device_map={"": "disk"}),
}


@functools.cache
def in_memory(name: str) -> Tensor:
    """Logits of the model as it is loaded plainly, with a method."""
    model = zoo.load()
    with METHODS.get(name, foveate.Resize(budget=12, where="features"))(model):
        return generate(model, zoo.batch())[1]


def wanted_of(name: str, report: foveate.Report) -> Tensor:
    """Position embeddings that are brought in later cannot be interpolated: features are shrunk then, and the report says so."""
    return in_memory("features" if any("were shrunk instead" in note for note in report.notes) else name)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", [*OFFLOADED, *LOADED])
def test_offloaded(how, name, tmp_path):
    if how in LOADED:
        model = load(zoo.saved("llava", "llama"), **LOADED[how], offload_folder=str(tmp_path))
    else:
        model = OFFLOADED[how](zoo.load(), tmp_path)
    places = {p.device.type for p in model.parameters()}
    assert places == {"hooks only": {"cpu"}, "auto": {"cpu", "meta"}, "dispatch_model": {"cpu", "meta"}}.get(how, {"meta"})
    inputs = zoo.batch()
    plain, before = generate(model, inputs)[1], fingerprint(model)
    with METHODS[name](model) as session:
        logits = generate(model, inputs)[1]
    torch.testing.assert_close(logits, wanted_of(name, session.report), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits, plain, atol=0.1)
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs)[1], plain)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_while_attached(how, name, tmp_path):
    """Hooks of accelerate that come after ours: they find what they need, and stay when we leave."""
    inputs, (first, second) = zoo.batch(), (tmp_path / "first", tmp_path / "second")
    alike = OFFLOADED[how](zoo.load(), first)
    plain = generate(alike, inputs)[1]
    model = zoo.load()
    handle = foveate.attach(model, METHODS[name])
    model = OFFLOADED[how](model, second)
    logits = generate(model, inputs)[1]
    torch.testing.assert_close(logits, wanted_of(name, handle.report), atol=2e-5, rtol=1e-5)
    handle.detach()
    assert torch.equal(generate(model, inputs)[1], plain)
    mine, theirs = ({n: found[1:] for n, found in fingerprint(each).items()} for each in (model, alike))
    assert mine == theirs
    with METHODS[name](model) as session:  # and again
        torch.testing.assert_close(generate(model, inputs)[1], wanted_of(name, session.report), atol=2e-5, rtol=1e-5)
