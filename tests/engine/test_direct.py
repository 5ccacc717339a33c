"""Direct calls: rows padded on both sides, labels, inputs with one entry per token, backbones that are called past the model."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs

import foveate
from foveate.engine.model.seams import LAYERED_INPUTS, PACKED_INPUTS, PER_TOKEN_INPUTS
from foveate.families import FAMILIES

from .. import families, zoo
from ..methods.test_conformance import PLAIN, _build
from .test_forward import labels_of

IGNORED = -100


@pytest.fixture
def model():
    return zoo.load()


def both_sides(rows=(0, 3), columns=4, lengths=(4, 2)):
    """Prompts padded on the left, completions on the right, as TRL's GRPO has them."""
    prompts = zoo.batch("left", rows=rows)
    words = torch.randint(10, 128, (len(rows), columns), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    ids = torch.cat([prompts["input_ids"], words * mask], 1)
    return {**prompts, "input_ids": ids, "attention_mask": torch.cat([prompts["attention_mask"], mask], 1)}


@pytest.mark.parametrize(
    ("variant", "lengths"), [*((v, (4, 2)) for v in PLAIN), *((v, (1, 4)) for v in ("prumerge+", "fastv", "tome", "gate"))]
)
def test_rows_padded_on_both_sides(model, variant, lengths):
    """The last columns are those of the full prompt: what ``logits_to_keep`` leaves, and what is read from the end of all."""
    inputs = both_sides(lengths=lengths)
    with _build(variant)(model), torch.no_grad():
        kept = model(**inputs, logits_to_keep=5).logits
        whole = model(**inputs).logits
        assert kept.shape[1] == 5
        torch.testing.assert_close(kept, whole[:, -5:])
        for row, length in enumerate(lengths):
            real = inputs["attention_mask"][row].bool()
            alone = {"input_ids": inputs["input_ids"][row : row + 1, real], "pixel_values": inputs["pixel_values"][row : row + 1]}
            wanted = model(**alone, attention_mask=torch.ones_like(alone["input_ids"])).logits[0, -(length + 1) :]
            torch.testing.assert_close(kept[row, : length + 1], wanted, atol=2e-4, rtol=2e-4)


def test_what_keeps_every_token_before_the_decoder_keeps_the_layout(model):
    inputs = both_sides()
    with foveate.FastV()(model), torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_log_probabilities_of_completions_of_equal_prompts(model):
    """Several completions of one prompt: no padding on the left, and other counts of tokens for other pictures."""
    inputs = both_sides(rows=(0, 1), lengths=(4, 1))
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:1, :-4], inputs["input_ids"][:1, :-4]])
    inputs["input_ids"] = F.pad(inputs["input_ids"], (0, 4), value=33)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -3:] = 0
    inputs["pixel_values"] = zoo.pictures(2)
    with foveate.PruMergePlus()(model) as session, torch.no_grad():
        found = model(**inputs, logits_to_keep=5).logits
        assert len(set(session.report.after)) == 2
        for row, length in ((0, 4), (1, 1)):
            ids = inputs["input_ids"][row : row + 1][:, inputs["attention_mask"][row].bool()]
            alone = model(input_ids=ids, pixel_values=inputs["pixel_values"][row : row + 1]).logits[0, -(length + 1) :]
            torch.testing.assert_close(found[row, : length + 1], alone, atol=2e-4, rtol=2e-4)


# -- labels


def loss_by_hand(model, inputs, method):
    """Cross entropy over the text that is taught, row by row, from logits without labels."""
    total, count = 0.0, 0
    with method(model), torch.no_grad():
        for row in range(len(inputs["input_ids"])):
            real = inputs["attention_mask"][row].bool()
            ids = inputs["input_ids"][row : row + 1, real]
            pictures = int((ids == zoo.IMAGE).sum()) // zoo.TOKENS
            start = int((inputs["input_ids"][:row] == zoo.IMAGE).sum()) // zoo.TOKENS
            given = {"input_ids": ids}
            if pictures:
                given["pixel_values"] = inputs["pixel_values"][start : start + pictures]
            logits, text = model(**given).logits[0], ids[0][ids[0] != zoo.IMAGE]
            behind = ids[0][int((ids[0] == zoo.IMAGE).nonzero()[-1]) + 1 :] if pictures else text[1:]
            if len(behind):
                total += float(F.cross_entropy(logits[-len(behind) - 1 : -1], behind, reduction="sum"))
                count += len(behind)
    return total, count


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("everything", [False, True], ids=["text", "placeholders, too"])
def test_losses_with_a_number_of_items(model, side, everything):
    """Trainers divide by a number that counts labels of placeholders; these teach nothing, and are not counted."""
    inputs = zoo.batch(side, rows=(0, 3))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    before = torch.cumsum((inputs["input_ids"] == zoo.IMAGE).long(), 1) < zoo.TOKENS
    labels = labels.masked_fill(before, IGNORED)  # what follows the picture, and its last placeholder
    if everything:
        labels = torch.where(inputs["input_ids"] == zoo.IMAGE, zoo.IMAGE, labels)
    number = (labels[:, 1:] != IGNORED).sum()
    total, count = loss_by_hand(model, inputs, foveate.PruMergePlus())
    with foveate.PruMergePlus()(model), torch.no_grad():
        for items in (None, number, int(number)):
            options = {} if items is None else {"num_items_in_batch": items}
            assert float(model(**inputs, labels=labels, **options).loss) == pytest.approx(total / count, rel=1e-4)
        half = float(model(**inputs, labels=labels, num_items_in_batch=2 * number).loss)
        assert half == pytest.approx(total / count / 2, rel=1e-4), "a second step of the same size is on its way"


@pytest.mark.parametrize("name", ["prumerge+", "fastv", "spatial"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llava_next"])
def test_shifted_labels(family, name):
    """As sequence-parallel training gives them: the loss is that of the labels themselves."""
    model, inputs = families.load(family), families.batch(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    labels[:, :-6] = IGNORED
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    method = foveate.get(name, **({} if name == "prumerge+" else {"budget": 0.5}))
    with method(model), torch.no_grad():
        wanted = float(model(**inputs, labels=labels).loss)
        assert float(model(**inputs, labels=labels, shift_labels=shifted).loss) == pytest.approx(wanted, rel=1e-5)


# -- inputs with one entry per token

KNOWN = {
    "per token": {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", *PER_TOKEN_INPUTS},
    "of pictures": {
        *(
            "pixel_values",
            "pixel_values_images",
            "pixel_values_videos",
            "pixel_attention_mask",
            "image_sizes",
            "image_sizes_videos",
        ),
        *("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "batch_num_images", "mm_encoder_outputs", "spatial_shapes"),
        *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"),
        *("image_position_ids", "video_position_ids", "num_frames_per_video", "input_features", "input_features_mask"),
    },
    "refused": {LAYERED_INPUTS, *PACKED_INPUTS},
    "of the call": {"self", "kwargs", "cache", "past_key_values", "use_cache", "logits_to_keep", "cache_position", "return_dict"}
    | {"output_attentions", "output_hidden_states", "rope_deltas", "image_hidden_states", "num_items_in_batch", "is_causal"}
    | {"output_router_logits", "token_type_ids"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument_is_known(family):
    """A new one may have an entry for each token, and would have to follow the prompt."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    model = getattr(transformers, name if isinstance(name, str) else name[0])
    assert set(inspect.signature(model.forward).parameters) <= set().union(*KNOWN.values())
    assert set(TransformersKwargs.__annotations__) <= set().union(*KNOWN.values())


def test_losses_take_no_other_argument_per_token():
    from transformers.loss.loss_utils import ForCausalLMLoss

    known = {"logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels", "kwargs"}
    assert set(inspect.signature(ForCausalLMLoss).parameters) == known


def test_embeddings_of_layers_are_refused():
    model, inputs = families.load("gemma4"), families.batch("gemma4")
    given = torch.zeros(*inputs["input_ids"].shape, 1, 1)
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="per_layer_inputs cannot be shortened"):
        model(**inputs, per_layer_inputs=given)


def test_packed_prompts_are_refused(model):
    inputs = zoo.batch(rows=(0,))
    length = inputs["input_ids"].shape[1]
    packed = torch.tensor([0, 20, length], dtype=torch.int32)
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="packed prompts cannot be shortened"):
        model(**inputs, cu_seq_lens_q=packed, cu_seq_lens_k=packed, max_length_q=length, max_length_k=length)


def test_token_types_of_another_length():
    model, inputs = families.load("gemma3"), families.batch("gemma3")
    longer = F.pad(inputs["token_type_ids"], (3, 0))
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="columns, and the prompt has"):
        model(**{**inputs, "token_type_ids": longer})


@pytest.mark.parametrize("variant", PLAIN)
def test_ids_of_32_bits(model, variant):
    inputs = zoo.batch("left")
    short = {**inputs, "input_ids": inputs["input_ids"].int()}
    options = dict(max_new_tokens=3, do_sample=False)
    with _build(variant)(model), torch.no_grad():
        assert torch.equal(model.generate(**inputs, **options), model.generate(**short, **options).long())
        assert torch.equal(model(**inputs).logits, model(**short).logits)


# -- the backbone past the model's forward


def fused(model):
    """A loss that calls backbone and head itself, as trainers put it in the place of ``forward``."""
    original = model.forward

    def forward(*args, fuse=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fuse:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        states = model.base_model(*args, **kwargs).last_hidden_state
        logits, wanted = model.lm_head(states[:, :-1]), labels[:, 1:]
        loss = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="sum")
        return loss / (num_items_in_batch or (wanted != IGNORED).sum())

    model.forward = forward
    return model


@pytest.mark.parametrize("variant", PLAIN)
def test_fused_losses_in_both_orders(variant):
    """A forward that was replaced after the method was attached, and before: both losses are that of the model's own forward."""
    inputs = zoo.batch("left")
    labels = labels_of(inputs)
    losses, reports = [], []
    for order in ("own", "before", "after"):
        model = zoo.load()
        method = _build(variant)
        if order == "before":
            session = foveate.attach(model, method)
            fused(model)
        elif order == "after":
            session = foveate.attach(fused(model), method)
        else:
            session = foveate.attach(model, method)
        output = model(**inputs, labels=labels, **({} if order == "own" else {"fuse": True}))
        loss = output.loss if order == "own" else output
        loss.backward()
        grad = model.lm_head.weight.grad
        losses.append((loss.detach(), grad.clone()))
        reports.append((session.report.after, session.report.layers))
        session.detach()
    assert reports[0] == reports[1] == reports[2]
    for loss, grad in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad, losses[0][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_backbone_alone(model, side):
    """Hidden states in the columns of the full prompt; what the next word is predicted from stands before it."""
    inputs = zoo.batch(side)
    with foveate.PruMergePlus()(model) as session, torch.no_grad():
        states = model.base_model(**inputs, output_hidden_states=True)
        assert any("the backbone was called" in note for note in session.report.notes)
        logits = model(**inputs).logits
        assert not any("the backbone was called" in note for note in session.report.notes)
    assert states.last_hidden_state.shape[:2] == inputs["input_ids"].shape
    assert {each.shape for each in states.hidden_states} == {states.last_hidden_state.shape}
    found = model.lm_head(states.last_hidden_state)
    for row in range(4):
        real = inputs["attention_mask"][row].bool()
        removed = int((inputs["input_ids"][row] == zoo.IMAGE).sum()) - sum(
            after for after, r in zip(session.report.after, session.report.rows, strict=True) if r == row
        )
        trailing = int((~real.flip(0)).long().cumprod(0).sum())
        short = logits[row, : logits.shape[1] - trailing][-(int(real.sum()) - removed) :]
        ids = inputs["input_ids"][row][real]
        after = int((ids == zoo.IMAGE).nonzero()[-1]) + 1 if (ids == zoo.IMAGE).any() else 1
        words = len(ids) - after + 1  # the last token of the picture predicts the first word after it
        torch.testing.assert_close(found[row][real][-words:], short[-words:], atol=1e-4, rtol=1e-4)
    with foveate.PruMergePlus(budget=1.0)(model), torch.no_grad():
        whole = model.base_model(**inputs).last_hidden_state
    assert torch.equal(whole, model.base_model(**inputs).last_hidden_state)


def test_a_backbone_that_raises(model):
    inputs = zoo.batch()
    with foveate.FastV()(model) as session:
        with pytest.raises(Exception):  # noqa: B017, PT011
            model.base_model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :5]})
        model.base_model(**inputs)
        assert session.report.layers[-1] < session.report.layers[0]
    assert not model.base_model._forward_hooks
    assert not model.base_model._forward_pre_hooks
    assert not model._forward_pre_hooks
