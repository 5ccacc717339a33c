"""The question that is asked about a picture, as methods before the decoder read it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import foveate
from foveate.loading import load_encoder
from foveate.methods.baselines import Sequential
from foveate.pocket.vocabulary import TOKEN_ID

from ... import families, zoo


class Reader(Sequential):
    """Keeps the first tokens and remembers what it was told."""

    reads_projected = True
    reads_question = True
    tower = None

    def text_encoder(self):
        return self.tower

    def reduce(self, tokens):
        self.seen = tokens
        return super().reduce(tokens)


def words(model, question, image):
    """Token ids of a question, found by their embeddings."""
    table = model.get_input_embeddings().weight
    return [int((table - row).norm(dim=-1).argmin()) for row in question.text[image][question.valid[image]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_image_gets_the_text_behind_the_first_image_of_its_row(side):
    model, inputs, reader = zoo.load(), zoo.batch(side), Reader(budget=9)
    encoded = foveate.encode(model, reader, **inputs)
    question = reader.seen.question
    assert question.visual.shape == (4, zoo.TOKENS, 64)
    assert not question.paired
    asked = []
    for row in range(4):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        first = ids.index(zoo.IMAGE) if zoo.IMAGE in ids else len(ids)
        asked += [[i for i in ids[first:] if i != zoo.IMAGE]] * zoo.ROWS_OF_BATCH[row][0]
    assert [words(model, question, image) for image in range(4)] == asked
    full = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(question.visual, torch.stack(list(full)))
    assert any("the decoder's input embeddings" in note for note in encoded.report.notes)
    for image, embeds in enumerate(encoded.embeds):
        torch.testing.assert_close(embeds, full[image][:9])


def test_a_picture_at_the_end_is_asked_about_by_what_stands_in_front():
    model, reader = zoo.load(), Reader(budget=9)
    ids = torch.tensor([[1, 20, 21, 22, *[zoo.IMAGE] * zoo.TOKENS]])
    foveate.encode(model, reader, input_ids=ids, pixel_values=zoo.pictures(1))
    assert words(model, reader.seen.question, 0) == [20, 21, 22]


def test_what_training_teaches_is_no_question():
    model, reader = zoo.load(), Reader(budget=9)
    ids = torch.tensor([[1, *[zoo.IMAGE] * zoo.TOKENS, 30, 31, 40, 41]])
    labels = torch.where((ids == 40) | (ids == 41), ids, -100)
    with reader(model):
        model(input_ids=ids, pixel_values=zoo.pictures(1), labels=labels)
    assert words(model, reader.seen.question, 0) == [30, 31]


@pytest.mark.parametrize("whole", [True, False])
def test_a_second_turn_asks_its_own_question(whole):
    """With the whole prompt again, or only what is new."""
    model, reader = zoo.load(), Reader(budget=9)
    ids = torch.tensor([[1, *[zoo.IMAGE] * zoo.TOKENS, 30, 31]])
    with reader(model):
        out = model.generate(
            input_ids=ids,
            pixel_values=zoo.pictures(1),
            max_new_tokens=2,
            min_new_tokens=2,
            return_dict_in_generate=True,
            do_sample=False,
            suppress_tokens=[zoo.IMAGE],
        )
        more = torch.tensor([[50, *[zoo.IMAGE] * zoo.TOKENS, 51, 52]])
        everything = torch.cat([out.sequences, more], 1)
        given = everything if whole else everything[:, out.past_key_values.get_seq_length() + zoo.TOKENS - 9 :]
        model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(everything),
            pixel_values=zoo.pictures(1, seed=1),
            max_new_tokens=1,
            past_key_values=out.past_key_values,
        )
    assert words(model, reader.seen.question, 0) == [51, 52]


def test_placeholders_that_do_not_fit_are_named_all_the_same():
    model = zoo.load()
    ids = torch.tensor([[1, 20, 21]])
    with pytest.raises(foveate.InputError, match=r"0 image placeholders and the 1 image\(s\)"):
        foveate.encode(model, Reader(budget=9), input_ids=ids, pixel_values=zoo.pictures(1))


LONGEST = 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model with a vision encoder as wide as the pocket model's, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("clip")
    names = ["<bos>", "<eos>", "<pad>", "<unk>", *"what color is the star ? where cross".split()]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    special = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    small = dict(intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        hidden_size=16, vocab_size=len(names), max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **text},
        vision_config={**small, "hidden_size": 128, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def pocket_inputs(question: str):
    model, _ = foveate.load_pocket()
    asked = [TOKEN_ID[word] for word in f"{question} assistant:".split()]
    ids = torch.tensor([[TOKEN_ID["<s>"], TOKEN_ID["user:"], *[model.config.image_token_id] * 576, *asked]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 192, 192)}


def test_a_clip_text_encoder_reads_the_question(clip):
    model, inputs = pocket_inputs("what color is the star ?")
    reader = Reader(budget=9)
    reader.tower = str(clip)
    encoded = foveate.encode(model, reader, **inputs)
    question, other = reader.seen.question, CLIPModel.from_pretrained(clip).eval()
    # what stands behind the picture is "what color is the star ? assistant :"
    asked = [4, 5, 6, 7, 8, 9, 3]
    with torch.no_grad():
        text = other.get_text_features(torch.tensor([[0, *asked, 1]])).pooler_output
        norm = next(module for name, module in other.named_modules() if name.endswith("post_layernorm"))
        visual = other.visual_projection(norm(reader.seen.features))
    assert question.paired
    torch.testing.assert_close(question.text[0], text)
    torch.testing.assert_close(question.visual, visual)
    assert any(f"the text encoder of {clip}" in note for note in encoded.report.notes)


def test_long_questions_are_read_in_segments(clip):
    model, inputs = pocket_inputs("what color is the star ? where is the cross ?")
    reader = Reader(budget=9)
    reader.tower = str(clip)
    foveate.encode(model, reader, **inputs)
    other = CLIPModel.from_pretrained(clip).eval()
    asked = [4, 5, 6, 7, 8, 9, 10, 6, 7, 11, 9, 3]
    with torch.no_grad():
        parts = [other.get_text_features(torch.tensor([[0, *asked[i : i + 8], 1]])).pooler_output for i in (0, 8)]
    assert reader.seen.question.valid.tolist() == [[True, True]]
    torch.testing.assert_close(reader.seen.question.text[0], torch.cat(parts), atol=1e-5, rtol=1e-4)


def test_text_towers_that_do_not_work(clip, tmp_path):
    model, inputs = pocket_inputs("what color is the star ?")
    reader = Reader(budget=9)
    reader.tower = str(tmp_path / "nowhere")
    with pytest.raises(foveate.InputError, match="cannot be loaded"):
        foveate.encode(model, reader, **inputs)
    reader.tower = str(clip)
    zoo_model = zoo.load()
    ids = torch.tensor([[1, *[zoo.IMAGE] * zoo.TOKENS, 30]])
    with pytest.raises(foveate.InputError, match="the tokenizer of this model cannot be loaded"):
        foveate.encode(zoo_model, reader, input_ids=ids, pixel_values=zoo.pictures(1))
    zoo_model.name_or_path = foveate.load_pocket()[0].name_or_path
    with pytest.raises(foveate.InputError, match=r"vision encoder of 128 channels.*has 48"):
        foveate.encode(zoo_model, reader, input_ids=ids, pixel_values=zoo.pictures(1))


def test_cdpruner_hands_its_text_tower_on(clip):
    """The report names the reader, and the choice differs from that by the decoder's embeddings."""
    model, inputs = pocket_inputs("what color is the star ?")
    by_clip, by_decoder = (
        foveate.encode(model, foveate.CDPruner(budget=20, text_tower=tower), **inputs) for tower in (str(clip), None)
    )
    assert any(f"the text encoder of {clip}" in note for note in by_clip.report.notes)
    assert by_clip.report.images[0].kept != by_decoder.report.images[0].kept


class Listener(Reader):
    """Reads what the decoder makes of the question, and nothing that is projected."""

    reads_projected = False
    reads_question_state = True


@torch.no_grad()
def alone(model, ids):
    """Last hidden state of the last token where the unmodified model reads these tokens and nothing else."""
    return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral", "gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_decoder_makes_of_the_question_alone(side, decoder):
    """Behind the token that begins texts, after the final norm, whatever the padding."""
    model, inputs, reader = zoo.load(decoder=decoder), zoo.batch(side), Listener(budget=9)
    expected = []
    for row in range(4):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        first = ids.index(zoo.IMAGE) if zoo.IMAGE in ids else 0
        question = [i for i in ids[first:] if i != zoo.IMAGE]
        assert ids[0] == 1
        expected += [alone(model, [1, *question])] * zoo.ROWS_OF_BATCH[row][0]
    encoded = foveate.encode(model, reader, **inputs)
    question = reader.seen.question
    torch.testing.assert_close(question.state, torch.stack(expected), atol=2e-5, rtol=2e-5)
    assert question.visual is None
    assert reader.seen.projected is None
    assert encoded.report.seconds["question"] > 0
    assert any("a pass of the decoder over it" in note for note in encoded.report.notes)
    seen = []
    for inside in (None, foveate.FastV(budget=0.5)):  # whose hooks are on the decoder, too
        with (reader if inside is None else foveate.Compose(reader, inside))(model):
            model(**inputs)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        seen.append(reader.seen.question.state)
    for state in seen:
        torch.testing.assert_close(state, question.state, atol=2e-5, rtol=2e-5)


def test_states_of_prompts_that_ask_nothing_or_begin_otherwise():
    model, reader = zoo.load(), Listener(budget=9)
    picture = [zoo.IMAGE] * zoo.TOKENS
    foveate.encode(model, reader, input_ids=torch.tensor([[1, *picture]]), pixel_values=zoo.pictures(1))
    assert not reader.seen.question.state.any()
    foveate.encode(model, reader, input_ids=torch.tensor([[*picture, 30, 31]]), pixel_values=zoo.pictures(1))
    torch.testing.assert_close(reader.seen.question.state[0], alone(model, [30, 31]))


def test_no_gradient_and_no_label_in_the_state():
    model, reader = zoo.load(), Listener(budget=9)
    ids = torch.tensor([[1, *[zoo.IMAGE] * zoo.TOKENS, 30, 31, 40, 41]])
    with reader(model):
        model(input_ids=ids, pixel_values=zoo.pictures(1), labels=torch.where((ids == 40) | (ids == 41), ids, -100))
    assert not reader.seen.question.state.requires_grad
    torch.testing.assert_close(reader.seen.question.state[0], alone(model, [1, 30, 31]))


def test_a_model_without_decoder_layers_cannot_read():
    encoder = load_encoder("pocket")
    inputs = dict(
        pixel_values=torch.randn(1, 3, 192, 192), input_ids=torch.tensor([[1, *[encoder.model.config.image_token_id] * 576, 20]])
    )
    foveate.encode(encoder.model, Reader(budget=9), **inputs)
    with pytest.raises(foveate.UnsupportedModelError, match="loaded without the layers of its decoder"):
        foveate.encode(encoder.model, Listener(budget=9), **inputs)


def test_a_decoder_that_reads_in_both_directions():
    """PaliGemma's, which sees later tokens where nothing is padded: the question is read from left to right in any batch."""
    model, reader = families.load("paligemma"), Listener(budget=9)
    states = []
    for rows in (None, (0,), (1,)):
        inputs = families.batch("paligemma") if rows is None else families.batch("paligemma", rows=rows)
        foveate.encode(model, reader, **inputs)
        states.append(reader.seen.question.state)
    together = states[0]
    counts = [len(state) for state in states[1:]]
    assert min(counts) > 0
    torch.testing.assert_close(torch.cat(states[1:]), together[: sum(counts)], atol=2e-5, rtol=2e-5)
