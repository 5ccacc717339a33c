"""foveate export: the language model does alone what it does in its place, and its template writes what the processor writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from typer.testing import CliRunner

import foveate
from foveate import UnsupportedModelError
from foveate.chat import Prompt, collate
from foveate.cli.main import app
from foveate.engine.model.anatomy import anatomy, innermost
from foveate.errors import InputError
from foveate.families import FAMILIES
from foveate.loading import load, load_encoder
from foveate.pocket import WEIGHTS, load_pocket
from foveate.serving.checks import check_servable
from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.export import MARK, ExportError, compared, described, export, language_model, ready_export, write_tokenizer
from foveate.serving.template import PLACEHOLDER, chat_template, collapsed

from .. import families

SERVED = {kind for kind, family in FAMILIES.items() if not (family.mrope or family.two_way or family.marks)}
# as many people have it in their folders: all pictures of a message first, no first token, text in capitals
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INLINE = (
    "{% for message in messages %}[{{ message['role'] }}] {% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %} {% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "lm"
    export("pocket", folder, dtype="float32")
    return folder


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_is_exported_exactly_or_refused(kind: str, tmp_path: Path) -> None:
    model = families.load(kind)
    parts = anatomy(model)
    if kind not in SERVED:
        with pytest.raises(
            UnsupportedModelError, match=r"positions|both directions|embeddings of some words|embeddings of their own"
        ):
            check_servable(parts)
        return
    check_servable(parts)
    text = language_model(parts)
    assert compared(model, text) == 0
    text.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(10, 100, (2, 9))
    embeds = torch.randn(2, 9, alone.config.hidden_size)
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(alone(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)


def test_weights_that_change_on_the_way_are_noticed() -> None:
    model = families.load("llava")
    text = language_model(anatomy(model))
    text.lm_head.weight = torch.nn.Parameter(text.lm_head.weight + 0.01)
    with pytest.raises(ExportError, match="other logits"):
        compared(model, text)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = families.load("llava")
    model.lm_head.weight = model.get_input_embeddings().weight
    text = language_model(anatomy(model))
    assert text.config.tie_word_embeddings
    text.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert alone.lm_head.weight is alone.get_input_embeddings().weight


def test_a_folder_for_vllm(exported: Path) -> None:
    names = {file.name for file in exported.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", MARK),
    }
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    told = described(exported)
    assert (told.source, told.width, told.dtype, told.conversations, told.no_chat) == ("pocket", 192, "float32", 6, "")
    # 132 words and 192 channels, twice; 6 layers of 4 x 192 x 192 and 3 x 192 x 384 and two norms; a norm
    assert told.parameters == 2 * 132 * 192 + 6 * (4 * 192**2 + 3 * 192 * 384 + 2 * 192) + 192
    assert all(file.stat().st_mode & 0o044 for file in exported.iterdir())


def test_the_placeholder_keeps_its_id(exported: Path) -> None:
    tokenizer, own = AutoTokenizer.from_pretrained(exported), load_pocket()[1].tokenizer
    assert tokenizer.convert_tokens_to_ids(PLACEHOLDER) == own.convert_tokens_to_ids("<image>") == 4
    assert PLACEHOLDER in tokenizer.all_special_tokens
    assert len(tokenizer) == len(own)
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})  # as vLLM does
    assert len(tokenizer) == len(own)
    assert tokenizer("a red star").input_ids == own("a red star").input_ids


def processor(template: str | None, *, bos: bool = False, kind: str = "llava") -> Any:
    """A processor with another chat template; ``bos``: its tokenizer begins every text with <s>."""
    found = load_pocket()[1]
    tokenizer = found.tokenizer
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    if kind == "llava":
        return LlavaProcessor(found.image_processor, tokenizer, 8, "default", template, num_additional_image_tokens=1)
    from transformers import LlavaNextImageProcessorPil

    size = {"height": 192, "width": 192}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 192}, crop_size=size, image_grid_pinpoints=[[192, 384], [384, 384]])
    return LlavaNextProcessor(images, tokenizer, 8, "default", template, num_additional_image_tokens=1)


CONVERSATIONS = [
    [("user", ["#", "what is this ?"])],
    [("user", ["what is", "#", "this", "#"])],
    [("user", ["is there a star ?"])],
    [("user", ["#", "what is this ?"]), ("assistant", ["a red star"]), ("user", ["and", "#"])],
]


def messages(conversation: list[tuple[str, list[str]]], picture: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": [picture if word == "#" else {"type": "text", "text": word} for word in words]}
        for role, words in conversation
    ]


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [LLAVA, INLINE, None])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_written_template_gives_the_processors_tokens(
    conversation: list[tuple[str, list[str]]], template: str | None, bos: bool, kind: str, tmp_path: Path
) -> None:
    made = processor(template, bos=bos, kind=kind)
    assert write_tokenizer(made, tmp_path) == ""
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    picture = Image.new("RGB", (300, 500))
    expected = collapsed(made, messages(conversation, {"type": "image", "image": picture}))
    shown = messages(conversation, {"type": "text", "text": PLACEHOLDER})  # as vLLM shows it to a template
    found = tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert found == expected
    assert found.count(4) == sum(words.count("#") for _, words in conversation)
    assert (found[0] == 1) == bos


def test_words_around_a_picture_are_written_by_the_template(tmp_path: Path) -> None:
    class Marked(LlavaProcessor):
        """Puts words around the visual tokens of a picture, as InternVL does."""

        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            return super().__call__(images, [each.replace("<image>", "red <image> star") for each in texts], **kwargs)

    plain = processor(INLINE)
    made = Marked(plain.image_processor, plain.tokenizer, 8, "default", INLINE, num_additional_image_tokens=1)
    assert "red<prompt_embeds>star" in chat_template(made).replace(" ", "")
    write_tokenizer(made, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    told = [("user", ["what is", "#", "?"])]
    found = tokenizer.apply_chat_template(messages(told, {"type": "text", "text": PLACEHOLDER}), tokenize=True)["input_ids"]
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    assert found == collapsed(made, messages(told, picture))


def test_text_inside_a_picture_leaves_no_chat_template(tmp_path: Path) -> None:
    class Broken(LlavaProcessor):
        """Writes a word between the visual tokens of a picture, as Mistral does."""

        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            found = super().__call__(images, text, **kwargs)
            found["input_ids"] = [[*ids[:-3], 7, *ids[-3:]] for ids in found["input_ids"]]
            return found

    plain = processor(INLINE)
    made = Broken(plain.image_processor, plain.tokenizer, 8, "default", INLINE, num_additional_image_tokens=1)
    assert "between the visual tokens" in write_tokenizer(made, tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert (tmp_path / "tokenizer.json").exists()


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(processor: Any) -> str:
        return "{% for message in messages %}<prompt_embeds> {% endfor %}"

    monkeypatch.setattr("foveate.serving.export.chat_template", other)
    with pytest.raises(ExportError, match="other tokens than the processor"):
        export("pocket", tmp_path / "lm")
    assert not [*tmp_path.iterdir()]


def test_only_an_export_is_written_over(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is no export"):
        export("pocket", tmp_path)
    assert (tmp_path / "mine.txt").exists()
    again = tmp_path / "lm"
    export("pocket", again)
    export("pocket", again, dtype="bfloat16")
    assert described(again).dtype == "bfloat16"
    with pytest.raises(InputError, match="is no export"):
        described(tmp_path)


def test_an_export_is_made_once(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = ready_export("pocket", dtype="float32")
    mark = (first / MARK).stat().st_mtime_ns
    assert ready_export("pocket", dtype="float32") == first
    assert (first / MARK).stat().st_mtime_ns == mark
    assert ready_export("pocket", dtype="bfloat16") != first
    assert ready_export("pocket", exported) == exported
    with pytest.raises(InputError, match="in float32 and not in bfloat16"):
        ready_export("pocket", exported, dtype="bfloat16")


def test_an_export_of_other_weights_is_not_used(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "lm"
    shutil.copytree(WEIGHTS, model)
    assert ready_export(str(model), folder) == folder
    assert ready_export("pocket", folder) == folder  # the same files
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vision_feature_layer": -1}))
    with pytest.raises(InputError, match="are others now"):
        ready_export(str(model), folder)
    with pytest.raises(InputError, match=r"and not of 'pocket\+prumerge'"):
        ready_export("pocket+prumerge", folder)


def test_adapters_are_merged(tmp_path: Path) -> None:
    """The exported decoder and the encoder of a fine-tuned model together say what the fine-tuned model says."""
    export("pocket+prumerge", tmp_path, dtype="float32")
    text = AutoModelForCausalLM.from_pretrained(tmp_path)
    encoder = PictureEncoder(load_encoder("pocket+prumerge", dtype="float32"))
    assert len(encoder.parts.decoder.layers) == 0
    picture = Image.effect_mandelbrot((192, 192), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what color is the star ?"}]
    conversation = [{"role": "user", "content": content}]
    (made,) = encoder.encode([conversation], method_of("prumerge"))
    embeds = text.get_input_embeddings()(torch.tensor(made.ids))
    embeds[torch.tensor(made.visual)] = made.embeds[0]
    tuned = load("pocket+prumerge", dtype="float32")
    with torch.no_grad(), method_of("prumerge")(innermost(tuned.model)):
        expected = tuned.model(**collate(tuned, [Prompt(conversation, "", [picture], [], "")])).logits[0, -1]
        plain = load_pocket()[0]
        other = plain(inputs_embeds=embeds[None]).logits[0, -1]
        torch.testing.assert_close(text(inputs_embeds=embeds[None]).logits[0, -1], expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(other, expected, atol=0.1)


def test_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "pocket", str(tmp_path / "lm"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["architecture"] == "LlamaForCausalLM"
    assert (tmp_path / "lm" / "model.safetensors").is_file()
    shown = CliRunner().invoke(app, ["export", "pocket", str(tmp_path / "lm")])
    assert "6 conversations" in shown.stdout
    assert "--enable-prompt-embeds" in shown.stdout


def test_a_method_with_weights_goes_along(tmp_path: Path) -> None:
    told = export("pocket", tmp_path / "out", method=foveate.get("fovea:pocket"))
    weights = tmp_path / "out" / "method"
    assert told.method.split() == ["fovea", foveate.get("fovea:pocket").settings()["weights"]]
    assert described(tmp_path / "out") == told
    model, processor = foveate.load_pocket()
    inputs = processor(images=Image.new("RGB", (192, 192), "red"), text="<image> what color is it ?", return_tensors="pt")
    ours, shipped = (
        foveate.encode(model, foveate.get("fovea", weights=name, budget=36), **inputs).embeds[0]
        for name in (str(weights), "pocket")
    )
    assert torch.equal(ours, shipped)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = export("pocket", tmp_path / "plain")
    assert plain.method == ""
    for method, message in (
        (foveate.get("prumerge"), "has no weights"),
        (foveate.get("fovea"), "has no weights"),
    ):
        with pytest.raises(InputError, match=message):
            export("pocket", tmp_path / "none", method=method)
    assert not (tmp_path / "none").exists()


def test_weights_of_another_model_are_not_exported(tmp_path: Path) -> None:
    model, processor = foveate.load_pocket()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another model"):
        export(str(tmp_path / "other"), tmp_path / "out", method=foveate.get("fovea:pocket"))
    assert not (tmp_path / "out").exists()
