"""Conversations as batches: labels of answers only, found by marks or by prefixes, and data that a model cannot use."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from PIL import Image

import foveate
from foveate.errors import InputError
from foveate.loading import load
from foveate.pocket.questions import ask
from foveate.pocket.scenes import draw_scene
from foveate.training.batches import Collator, Sample, Samples
from foveate.training.conversations import Conversation
from foveate.training.drawn import DrawnSamples
from foveate.training.settings import TrainSettings
from foveate.training.sources import datasets


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


@pytest.fixture
def plain(pocket):
    """The same processor with a template without generation marks."""
    loaded = copy.copy(pocket)
    object.__setattr__(loaded, "processor", copy.deepcopy(pocket.processor))
    template = loaded.processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert template != loaded.processor.chat_template
    loaded.processor.chat_template = template
    return loaded


def said(*turns: str, where: str = "line 1") -> Sample:
    picture = Image.fromarray(draw_scene(Random(3)).image)
    messages = []
    for number, text in enumerate(turns):
        shown = [{"type": "image"}] if number == 0 else []
        messages.append({"role": ("user", "assistant")[number % 2], "content": [*shown, {"type": "text", "text": text}]})
    return Sample(tuple(messages), (picture,), where)


SAMPLES = (
    said("how many red objects are there ?", "3", "where is the red star ?", "top left"),
    said("what color is the star ?", "red", where="line 2"),
)


def test_processors_look_for_answers_in_lists(pocket, monkeypatch):
    """In tensors that takes half of a training step."""
    seen = []
    original = type(pocket.processor)._adjust_assistant_masks_indices

    def looked(self, found, spans):
        seen.append(type(found["offset_mapping"]))
        return original(self, found, spans)

    monkeypatch.setattr(type(pocket.processor), "_adjust_assistant_masks_indices", looked)
    Collator(pocket)(SAMPLES)
    assert seen == [list]
    assert "_adjust_assistant_masks_indices" not in vars(pocket.processor), "the processor stays as it was"


@pytest.mark.parametrize("marks", [True, False])
def test_answers_are_taught_and_nothing_else(pocket, plain, marks):
    collator = Collator(pocket if marks else plain)
    assert collator.marked == marks
    batch = collator(SAMPLES)
    ids, labels = batch["input_ids"], batch["labels"]
    taught = labels != -100
    assert torch.equal(labels[taught], ids[taught])
    decode = pocket.processor.decode
    assert [decode(row[some]) for row, some in zip(ids, taught, strict=True)] == ["3 </s> top left </s>", "red </s>"]
    assert batch["attention_mask"].sum(1).tolist() == [599, 587]
    assert batch["attention_mask"][1, -1] == 0, "padding is on the right"
    assert batch["pixel_values"].shape == (2, 3, 192, 192)
    assert pocket.model(**batch).loss < 15


def test_the_batch_is_what_the_model_is_asked_with(pocket):
    """A prompt for generate ends where the answer begins."""
    collator = Collator(pocket)
    whole = collator(SAMPLES[1:])
    asked = collator.prompts([Sample(SAMPLES[1].messages[:1], SAMPLES[1].images, "x")])
    begin = int((whole["labels"][0] != -100).float().argmax())
    assert torch.equal(whole["input_ids"][0, :begin], asked["input_ids"][0])
    assert torch.equal(whole["pixel_values"], asked["pixel_values"])


def test_what_cannot_be_used(pocket, plain):
    collator = Collator(pocket)
    with pytest.raises(InputError, match=r"line 1: its text holds '<image>'"):
        collator([said("<image> what ?", "red")])
    plain.processor.chat_template = "<image> {% for m in messages %}{{ messages | length }} red {% endfor %}"
    with pytest.raises(InputError, match="writes a conversation otherwise once it goes on"):
        Collator(plain)(SAMPLES[:1])
    plain.processor.chat_template = pocket.processor.chat_template.replace("{{ said(message['content']) }}</s>", "yes </s>")
    with pytest.raises(InputError, match=r"line 2: the answer 'red' is not among the labels"):
        Collator(plain)(SAMPLES[1:])
    plain.processor.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        Collator(plain)


def test_a_picture_that_is_broken_names_its_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    row = Conversation(SAMPLES[1].messages, (tmp_path / "a.png",), "line 7 of data.jsonl")
    with pytest.raises(InputError, match=r"line 7 of data.jsonl: .*a.png"):
        Samples([row])[0]


def test_drawn_data_is_a_function_of_its_seed_and_of_its_own_streams():
    one, again = (DrawnSamples(3, 0, 3)[1] for _ in range(2))
    assert one.messages == again.messages
    assert one.images[0].tobytes() == again.images[0].tobytes()
    others = [DrawnSamples(3, 0, 3)[2], DrawnSamples(3, 1, 3)[1], DrawnSamples(3, 0, 3, "validation")[1]]
    assert all(one.images[0].tobytes() != other.images[0].tobytes() for other in others)


def test_single_turns_of_a_scene_share_its_picture():
    whole, each = DrawnSamples(2, 0, 3)[0], [DrawnSamples(6, 0, 3, single=True)[index] for index in range(3)]
    assert all(part.images[0].tobytes() == whole.images[0].tobytes() for part in each)
    assert [part.answers[0] for part in each] == whole.answers
    assert [part.messages[0]["content"][-1] for part in each] == [message["content"][-1] for message in whole.messages[::2]]
    random = Random("finetune/train/0/0")
    questions = ask(draw_scene(random), random, 3)
    assert [question.answer for question in questions] == whole.answers


@pytest.mark.parametrize(("name", "fields", "turns"), [("fovea", {"guided": True}, 4), ("fovea", {}, 4), ("quecc", {}, 1)])
def test_who_learns_from_whole_conversations(name, fields, turns, tmp_path):
    """A guided fovea reads the question, and still learns from several about a picture that is read once."""
    method = foveate.get(name, **fields).fresh()
    settings = TrainSettings(limit=3, turns=4, checked=4)
    for data in datasets(method, method, settings, None, load("pocket"), tmp_path, print):
        assert [len(data[number].answers) for number in range(2)] == [turns, turns]
