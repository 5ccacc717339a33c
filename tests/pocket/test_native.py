"""The second pocket model: its pictures, clips and questions, its training forward, and what is shipped."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

import foveate
from foveate.chat import collate, question_about
from foveate.lab.exam import Asker, as_shown
from foveate.lab.testset import TestSet
from foveate.loading import load
from foveate.pocket import MODELS, QWEN
from foveate.pocket.build import PIXEL_MEAN, PIXEL_STD
from foveate.pocket.native.batches import (
    EVENT_CLASSES,
    INTERVALS,
    LANGUAGE,
    PATCH_TARGETS,
    TARGET_NAMES,
    Batch,
    NativeBatches,
    events_of,
    make_batch,
    targets_of,
    text_rows,
)
from foveate.pocket.native.build import build_model
from foveate.pocket.native.clips import FRAMES, MOST, Clip, draw_clip, draw_clip_shape
from foveate.pocket.native.encoding import encode, order
from foveate.pocket.native.grounding import GROUNDING, grounding
from foveate.pocket.native.objectives import NativeTrainee, prefix_layout
from foveate.pocket.native.pictures import CELL, LARGEST, SMALLEST, Picture, draw_picture, draw_size
from foveate.pocket.native.questions import EVENTS, FAMILIES, ask, exam
from foveate.pocket.native.recipe import NATIVE
from foveate.pocket.native.vocabulary import DIRECTIONS, IMAGE, TOKEN_ID, VIDEO
from foveate.pocket.train import phases_of
from foveate.pocket.vocabulary import COLORS, SHAPES, WORDS
from foveate.pocket.worlds import world_of

COLOR_NAMES = tuple(COLORS)


@pytest.fixture(scope="module")
def qwen():
    return load(QWEN)


@pytest.fixture(scope="module")
def random_model():
    """Weights that differ from zero everywhere, so that every part of the forward matters."""
    model = build_model().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def clips(number: int, seed: str = "clips") -> list[Clip]:
    randoms = [Random(f"{seed}/{i}") for i in range(number)]
    return [draw_clip(random, draw_clip_shape(random)) for random in randoms]


def pictures(number: int, style: str | None = None) -> list[Picture]:
    randoms = [Random(f"pictures/{i}") for i in range(number)]
    return [draw_picture(random, draw_size(random), style=style) for random in randoms]


# -- the world -----------------------------------------------------------------------------------------------------------------


def test_pictures_have_many_sizes():
    shown = pictures(60)
    tokens = [picture.size[0] * picture.size[1] // CELL**2 for picture in shown]
    assert min(tokens) >= SMALLEST
    assert max(tokens) <= LARGEST
    assert max(tokens) > 4 * min(tokens)
    assert len({picture.size for picture in shown}) > 30
    assert all(side % CELL == 0 for picture in shown for side in picture.size)
    assert {picture.style for picture in shown} == {"things", "boards", "page"}


def test_clips_have_four_to_sixteen_temporal_patches():
    shapes = [draw_clip_shape(Random(i)) for i in range(200)]
    assert {min(t for t, *_ in shapes), max(t for t, *_ in shapes)} == {4, 16}
    assert max(t * w * h // CELL**2 for t, w, h in shapes) <= MOST


def test_everything_is_a_function_of_its_seed_and_split():
    for draw in (lambda s: draw_picture(Random(5), (160, 128), split=s), lambda s: draw_clip(Random(5), (4, 96, 96), split=s)):
        one, again, other = draw("test"), draw("test"), draw("train")
        images = [shown.frames if isinstance(shown, Clip) else shown.image for shown in (one, again, other)]
        assert np.array_equal(images[0], images[1])
        assert not np.array_equal(images[0], images[2]), "another background"
    first, again = TestSet.draw_native(8), TestSet.draw_native(8)
    assert first.questions == again.questions
    assert [isinstance(scene, Clip) for scene in first.scenes] == [False] * 5 + [True] * 3
    assert first.questions != TestSet.draw_native(8, seed=1).questions
    assert first.questions != TestSet.draw_native(8, split="validation").questions


def test_every_question_uses_words_of_the_model_and_every_family_is_asked():
    asked = [q for i, shown in enumerate([*pictures(150), *clips(150)]) for q in ask(shown, Random(i), 30)]
    assert {q.family for q in asked} == set(FAMILIES)
    assert all(word in TOKEN_ID for q in asked for word in f"{q.text} {q.answer}".split())


def test_pages_are_read_from_top_to_bottom():
    for picture in pictures(20, "page"):
        keys, values = picture.of("key"), picture.of("value")
        assert len(keys) == len(values) >= 1
        assert all(abs(k.center[1] - v.center[1]) < 4 and k.box[0] < v.box[0] for k, v in zip(keys, values, strict=True))
        assert [k.center[1] for k in keys] == sorted(k.center[1] for k in keys)
        assert len({k.name for k in keys}) == len(keys)
        told = {q.text: q.answer for i in range(6) for q in ask(picture, Random(i), 12)}
        for key, value in zip(keys, values, strict=True):
            assert told.get(f"what number is next to {key.name} ?", " ".join(value.name)) == " ".join(value.name)
        assert told.get("how many words are there ?", str(len(keys))) == str(len(keys))


def test_boards_have_colors_of_their_own():
    for picture in pictures(20, "boards"):
        colors = [board.color for board in picture.of("board")]
        assert len(set(colors)) == len(colors) >= 1
        assert not picture.of("word"), "'the sign' would mean two things"


def nearest_color(pixels: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.abs(pixels.mean(0) - COLORS[name]).sum()))


def seen(clip: Clip, shape: str) -> list[np.ndarray]:
    """In each temporal patch, which pixels show a shape; read off the maps alone."""
    index = [actor.name for actor in clip.actors].index(shape)
    return [item_map == index for item_map in clip.item_maps]


def judged(clip: Clip, text: str) -> str | None:
    """The answer to a question as the frames and maps show it; None where something is in the way."""
    words = text.split()
    shape = next((word for word in words if word in SHAPES), None)
    if shape is None or shape not in [actor.name for actor in clip.actors]:
        return None
    maps = seen(clip, shape)
    if text.startswith("where does"):
        whole = [mask for mask in maps if mask.sum() == max(m.sum() for m in maps)]  # where nothing covers it
        if len(whole) < 2:
            return None
        (y0, x0), (y1, x1) = (np.argwhere(mask).mean(0) for mask in (whole[0], whole[-1]))
        along, down = x1 - x0, y1 - y0
        if max(abs(along), abs(down)) < 3:
            return None
        return ("right" if along > 0 else "left") if abs(along) > abs(down) else ("down" if down > 0 else "up")
    if text.startswith("what color"):
        patch = 0 if "start" in words else len(maps) - 1
        frame = clip.frames[patch * FRAMES]
        return nearest_color(frame[maps[patch]]) if maps[patch].sum() > 60 else None
    if text.startswith("is there a ") and words[3] in SHAPES:
        return "yes" if maps[0 if "start" in words else -1].any() else None  # it may be covered
    return None


def test_what_clips_show_is_what_their_questions_say():
    """Against the pixels: direction by where a shape is, colour by its mean, presence by the maps."""
    checked: dict[str, int] = {}
    for number, clip in enumerate(clips(120)):
        for question in ask(clip, Random(number), 20):
            found = judged(clip, question.text)
            if found is not None:
                assert found == question.answer, (number, question)
                checked[question.family] = checked.get(question.family, 0) + 1
    assert min(checked[family] for family in ("direction", "before_after", "moment")) > 40


def test_events_happen_when_they_are_said_to():
    """First and last sight in the maps, of things that nothing covers, give the order of events."""
    compared = 0
    for number, clip in enumerate(clips(150)):
        times = {}
        for actor in clip.actors:
            there = [bool(mask.any()) for mask in seen(clip, actor.name)]
            if actor.role == "appears":
                times[f"the {actor.name} appear"] = there.index(True)
            elif actor.role == "vanishes":
                times[f"the {actor.name} vanish"] = len(there) - there[::-1].index(True)
        for question in ask(clip, Random(number), 30):
            if question.family == "order":
                first, second = question.text.removeprefix("does ").removesuffix(" ?").split(" before ")
                second = second.replace("appears", "appear").replace("vanishes", "vanish")
                if first in times and second in times:
                    assert question.answer == ("yes" if times[first] < times[second] else "no"), (number, question)
                    compared += 1
            if question.family == "appearing":
                assert question.answer == str(sum(actor.role == "appears" for actor in clip.actors))
    assert compared > 20


def test_signs_are_shown_briefly():
    signed = [clip for clip in clips(80) if clip.sign]
    assert len(signed) > 20
    for clip in signed:
        assert clip.sign is not None
        shown = [bool((item_map == len(clip.actors)).any()) for item_map in clip.item_maps]
        assert sum(shown) <= max(1, clip.patches // 3)
        assert [i for i, there in enumerate(shown) if there] == list(range(clip.sign.begin, clip.sign.end))


def test_an_exam_asks_each_family_at_most_twice():
    for shown in (*pictures(20), *clips(20)):
        counts: dict[str, int] = {}
        for question in exam(shown, Random(1)):
            counts[question.family] = counts.get(question.family, 0) + 1
        assert max(counts.values()) <= (4 if set(counts) == {"page"} else 2)


# -- training ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "height", "width"), [(1, 128, 192), (1, 96, 208), (3, 80, 112)])
def test_many_pictures_at_once_equal_the_stock_encoder(random_model, times, height, width):
    """Windows that are whole and that reach over the edge; patches in the order of the documented layout, by slicing."""
    torch.manual_seed(1)
    pixels = torch.randn(2, times, FRAMES, 3, height, width)
    rows = []
    for picture, time, row, column in itertools.product(range(2), range(times), range(height // 16), range(width // 16)):
        for y, x in itertools.product(range(2), range(2)):
            top, left = row * 16 + y * 8, column * 16 + x * 8
            rows.append(pixels[picture, time, :, :, top : top + 8, left : left + 8].transpose(0, 1).flatten())
    tower = random_model.model.visual
    with torch.no_grad():
        stock = tower(torch.stack(rows), grid_thw=torch.tensor([[times, height // 8, width // 8]] * 2))
        patches, tokens = encode(tower, pixels)
    assert torch.allclose(tokens.flatten(0, 1), stock.pooler_output, atol=1e-5)
    assert patches.shape == (2, times * (height // 8) * (width // 8), 128)


@pytest.mark.parametrize(("pictures_", "times", "interval"), [(1, 1, 1.0), (2, 1, 1.0), *((1, 5, each) for each in set(INTERVALS))])
def test_positions_equal_those_of_the_stock_model(random_model, pictures_, times, interval):
    rows, columns = 4, 7
    ids, positions, after = prefix_layout(pictures_, times, rows, columns, interval)
    clip = times > 1
    whole = torch.tensor([[(VIDEO if clip else IMAGE) if number < 0 else number for number in ids] + [9, 9]])
    kinds = torch.tensor([[(2 if clip else 1) if number < 0 else 0 for number in ids] + [0, 0]])
    grid = torch.tensor([[times, rows * 2, columns * 2]] * pictures_)
    seconds = torch.tensor([interval / random_model.config.vision_config.tokens_per_second])
    visual = {"video_grid_thw": grid, "second_per_grid_ts": seconds} if clip else {"image_grid_thw": grid}
    stock, _ = random_model.model.get_rope_index(whole, kinds, **visual)
    assert torch.equal(stock[:, 0, :-2], positions)
    assert stock[:, 0, -2].tolist() == [after] * 3


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_training_sees_what_generate_sees(random_model, qwen, kind):
    """The states of a question among others equal those of the stock forward on the prompt that the processor makes."""
    random = Random(4)
    shown = draw_clip(random, (4, 96, 112)) if kind == "clip" else draw_picture(random, (144, 176), style="things")
    asked = ask(shown, random, 3)
    rows = LANGUAGE.collated([text_rows([(question, shown) for question in asked])])
    patches, tokens = (torch.from_numpy(targets)[None] for targets in targets_of(shown))
    image = shown.frames if isinstance(shown, Clip) else shown.image[None]
    extra = {"interval": torch.tensor(2.0), "events": torch.from_numpy(events_of(shown))[None]}
    batch = Batch(frames=torch.from_numpy(image)[None], patches=patches, tokens=tokens, **extra, **rows)
    pixels = (batch.frames.permute(0, 1, 4, 2, 3).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    pixels = pixels if kind == "clip" else pixels.expand(-1, 2, -1, -1, -1)
    with torch.no_grad():
        visual = encode(random_model.model.visual, pixels.unflatten(1, (-1, 2)).contiguous())[1]
        states = NativeTrainee(random_model)._states(visual, batch, batch.frames.shape[1:4])[0][-1][:, -batch.ids.shape[1] :]
        for number, question in enumerate(asked):
            prompt = question_about(qwen.processor, qwen.model, as_shown(shown), question.text)
            stock = random_model(**collate(qwen, [prompt])).logits[0, -1]
            last = int((batch.block[0] == number).nonzero()[len(question.text.split()) + 2])
            assert torch.allclose(random_model.lm_head(states[0, last]), stock, atol=1e-4)


def test_labels_are_the_tokens_that_come_next():
    """Behind "assistant" the answer and its end, and nothing of the question."""
    shown = draw_picture(Random(4), (144, 176), style="things")
    asked = ask(shown, Random(4), 6)
    row = text_rows([(question, shown) for question in asked])
    words = list(TOKEN_ID)
    for number, question in enumerate(asked):
        mine = [at for at, block in enumerate(row["block"]) if block == number]
        ids, labels = [words[row["ids"][at]] for at in mine], [row["labels"][at] for at in mine]
        answer = [*question.answer.split(), "<|im_end|>"]
        assert ids == [*question.text.split(), "<|im_end|>", "<|im_start|>", "assistant", *answer[:-1]]
        taught = [at for at, label in enumerate(labels) if label >= 0]
        assert ids[taught[0]] == "assistant"
        assert [words[labels[at]] for at in taught] == answer
        assert [row["offset"][at] for at in mine] == list(range(len(mine)))


def test_targets_are_in_the_order_of_the_encoder():
    """By loops over the pixels: the kind of the most frequent thing of each patch, at its place in the encoder's order."""
    picture = draw_picture(Random(2), (160, 128), style="things")
    patches, tokens = targets_of(picture)
    columns = 160 // 8
    for place, number in enumerate(order(128 // 8, columns).tolist()):
        y, x = number // columns * 8, number % columns * 8
        owner = picture.item_map[y : y + 8, x : x + 8]
        counts = [int((owner == index).sum()) for index in range(len(picture.items))]
        expected = 0 if max(counts) < 10 else -1
        if expected and picture.items[int(np.argmax(counts))].kind == "shape":
            item = picture.items[int(np.argmax(counts))]
            assert patches[place, TARGET_NAMES.index("kind")] == 1 + SHAPES.index(item.name)
            assert patches[place, TARGET_NAMES.index("color")] == COLOR_NAMES.index(item.color)
        elif not expected:
            assert patches[place, TARGET_NAMES.index("kind")] == 0
            assert patches[place, TARGET_NAMES.index("row")] == y * 12 // 128, "its own place"
            assert patches[place, TARGET_NAMES.index("column")] == x * 12 // 160
    assert tokens.shape == (80, len(PATCH_TARGETS))


def meant(question, shown, word: str) -> dict[str, int]:
    """Targets that are asked of the last word like this one in a question."""
    classes = grounding(question, shown)[-1 - question.text.split()[::-1].index(word)]
    return {name: value for name, value in zip(GROUNDING, classes, strict=True) if value >= 0}


def test_what_words_mean_agrees_with_the_answers_about_pictures():
    """Answers are made from the picture by other code: what a word means must say the same."""
    checked = Counter()
    for number, picture in enumerate(pictures(60)):
        for question in ask(picture, Random(number), 30):
            words, family, answer = question.text.split(), question.family, question.answer
            if family == "relation":
                says = meant(question, picture, words[-2])
                across = "left" in words or "right" in words
                second_is_after = says["after" if across else "below"] == 1
                assert answer == ("yes" if second_is_after == ("left" in words or "above" in words) else "no")
            elif family == "color":
                assert COLOR_NAMES[meant(question, picture, words[-2])["color"]] == answer
            elif family == "shape":
                assert SHAPES[meant(question, picture, "object")["shape"]] == answer
            elif family == "count":
                word = words[2] if words[2] in SHAPES else "objects"
                assert meant(question, picture, word)["count"] == int(answer)
            elif family.startswith("existence"):
                word = words[-2] if "says" in words else next(word for word in words if word in SHAPES)
                assert meant(question, picture, word)["present"] == (answer == "yes")
            elif family == "pair":
                assert meant(question, picture, words[-2])["present"] == (answer == "yes")
            elif family == "choice":
                options = [meant(question, picture, words[words.index(f"({x})") + 1]) for x in "abcd"]
                assert [option["present"] for option in options] == [int(f"({x})" == answer) for x in "abcd"]
            elif family == "where":
                says, (row, column) = meant(question, picture, words[-2]), answer.split()
                assert ("top", "middle", "bottom")[says["row"] * 3 // 12] == row
                assert ("left", "center", "right")[says["column"] * 3 // 12] == column
            elif family == "board" or words[:5] == "what number is next to".split():
                says = meant(question, picture, "sign" if family == "board" else words[-2])
                told = WORDS[says["word"]] if "word" in says and family == "board" else f"{says['tens']} {says['ones']}"
                assert told.removesuffix(" 10") == answer
            else:
                continue
            checked[family] += 1
    assert len(checked) == 11
    assert min(checked.values()) > 10


def test_what_words_mean_agrees_with_the_answers_about_clips():
    checked = Counter()
    for number, clip in enumerate(clips(60)):
        for question in ask(clip, Random(number), 30):
            named = [word for word in question.text.split() if word in SHAPES]
            says = [meant(question, clip, word) for word in named]
            if question.family in ("order", "first"):
                earlier = says[1]["later"] == (says[0]["when"] <= says[1]["when"]) or says[0]["when"] == says[1]["when"]
                assert earlier, "classes of time agree with which is later"
                truth = "yes" if question.family == "order" else named[0]
                assert (question.answer == truth) == bool(says[1]["later"])
            elif question.family == "direction":
                assert DIRECTIONS[says[0]["motion"] - 1] == question.answer
            elif question.family == "moment" and question.text.startswith("is there") and question.answer == "yes":
                assert says[0]["present"] == 1
            elif question.family == "before_after" and "color" in says[0]:
                assert COLOR_NAMES[says[0]["color"]] == question.answer
            else:
                continue
            checked[question.family] += 1
    assert set(checked) == {"order", "first", "direction", "moment", "before_after"}


def test_visual_tokens_are_asked_for_their_own_place(random_model):
    """Two pictures of three by four tokens: rows and columns in twos, after the tokens that open a picture."""
    batch = make_batch(Random(3), "pair", (64, 48), 1, 4, 2.0)
    _, places = NativeTrainee(random_model)._states(torch.zeros(2, 12, 192), batch, batch.frames.shape[1:4])
    shown = [[0, row // 2, column // 2] for row in range(3) for column in range(4)]
    none = [[-100] * 3]
    assert places.tolist() == none * 3 + shown + none * 2 + shown + none
    batch = make_batch(Random(3), "clip", (4, 80, 80), 1, 4, 4.0)
    _, places = NativeTrainee(random_model)._states(torch.zeros(1, 100, 192), batch, batch.frames.shape[1:4])
    assert places[places[:, 0] >= 0][::25, 0].tolist() == [0, 2, 4, 6], "in positions, not in temporal patches"


def test_visual_tokens_are_asked_what_happens_there_and_then():
    """Against the pixels: where something is said to happen, the frames before and after differ, and by whom is known."""
    found = Counter()
    for clip in clips(40, "events"):
        events = events_of(clip).reshape(clip.patches, clip.size[1] // CELL, clip.size[0] // CELL)
        for actor in clip.actors:
            mine = np.argwhere(events[actor.when] == EVENT_CLASSES.index(actor.role)) if actor.role in EVENTS else []
            inside = [np.abs(cell[::-1] * CELL + CELL / 2 - actor.centers[2 * actor.when]).max() <= 24 for cell in mine]
            found[actor.role] += any(inside)
        for patch, row, column in np.argwhere(events > 0):
            area = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            before, after = clip.frames[2 * patch - 1][area].astype(int), clip.frames[2 * patch][area].astype(int)
            assert np.abs(before - after).max() > 20
    assert min(found[role] for role in EVENTS) > 10


@pytest.mark.parametrize(("kind", "shape"), [("picture", (112, 144)), ("pair", (96, 112)), ("clip", (4, 80, 96))])
def test_losses_have_gradients_for_every_weight(kind, shape):
    trainee = NativeTrainee(build_model())
    loss, log = trainee(make_batch(Random(1), kind, shape, 2, 8, 2.0), language=True)
    loss.backward()
    assert torch.isfinite(loss)
    assert float(log["loss"].detach()) > 1
    for name, parameter in trainee.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_batches_are_functions_of_seed_step_and_rank():
    phases = [NATIVE.scaled(mix, 4, 0.2) for mix in NATIVE.phases.values()]
    one, again, other = NativeBatches(phases, 0, 0), NativeBatches(phases, 0, 0), NativeBatches(phases, 0, 1)
    assert len(one) == 12
    for step in (0, 5, 9):
        assert torch.equal(one[step].frames, again[step].frames)
        assert torch.equal(one[step].ids, again[step].ids)
        assert one[step].frames.shape[1:] == other[step].frames.shape[1:], "none waits for another"
        assert not torch.equal(one[step].frames[0], other[step].frames[0])
    assert [one.options(step)["language"] for step in (0, 4, 8)] == [False, True, True]


def test_a_phase_that_a_model_has_not_is_refused():
    import typer

    with pytest.raises(typer.BadParameter, match="no phase 'calm'; it has vision, joint, final"):
        phases_of(NATIVE, {"calm": 3}, 1.0)
    assert [mix.steps for mix in phases_of(NATIVE, {"joint": 7, "calm": None}, 1.0)][1] == 7


def test_training_resumes_where_it_stopped(tmp_path):
    """Interrupted after two of three steps and continued, as in one piece; rounding is measured as for the first model."""

    def train(folder, *options: str) -> None:
        steps = ["--vision-steps", "1", "--joint-steps", "1", "--final-steps", "1", "--scale", "0.1"]
        command = [sys.executable, "-m", "foveate.pocket.train", "--model", "qwen", "--output", str(folder)]
        subprocess.run([*command, *steps, *options], check=True, capture_output=True, timeout=600)

    train(tmp_path / "whole", "--save-every", "3")
    train(tmp_path / "parts", "--stop-after", "2")
    before = load_file(tmp_path / "parts/checkpoint/model.safetensors")
    train(tmp_path / "parts")
    whole, parts = (load_file(tmp_path / run / "checkpoint/model.safetensors") for run in ("whole", "parts"))
    for name in whole:
        change = (whole[name] - before[name]).float().norm()
        assert (whole[name] - parts[name]).float().norm() <= 0.05 * change + 1e-12, name
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    model, processor = foveate.load_pocket(tmp_path / "whole/model")
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert isinstance(processor, Qwen2_5_VLProcessor)


# -- what is shipped -----------------------------------------------------------------------------------------------------------


def test_stock_classes_of_six_million_weights_at_most(qwen):
    model, processor = foveate.load_pocket("qwen")
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert type(processor) is Qwen2_5_VLProcessor
    assert sum(parameter.numel() for parameter in model.parameters()) <= 6e6
    assert model.config.text_config.num_hidden_layers >= 8
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert qwen.weights == load(str(MODELS[QWEN]), dtype="float32").weights
    assert world_of(qwen.processor) == "native"
    assert foveate.load_pocket(QWEN)[0].config.model_type == "qwen2_5_vl"


LEARNT = ("word", "number", "moves", "direction", "brief", "moment", "before_after", "color")  # see the model's card


def test_it_answers_about_pictures_and_clips(qwen):
    """What it has learnt, on a small part of the test set, with all tokens, by ``generate`` in batches of mixed sizes."""
    whole = TestSet.draw_native(48)
    asked = [[question for question in questions if question.family in LEARNT][:3] for questions in whole.questions]
    some = [number for number, questions in enumerate(asked) if questions]
    data = TestSet([whole.scenes[number] for number in some], [asked[number] for number in some])
    right = Asker(qwen, data).run(foveate.get("full")).right
    assert len(right) > 60
    assert right.mean() > 0.8
    assert Asker(qwen, data.wrong()).run(foveate.get("full")).right.mean() < 0.5


def test_several_pictures(qwen):
    """Which picture is meant is told by its number."""
    random, right = Random(3), 0
    for _ in range(12):
        shown = [draw_picture(random, (128, 112), style="page", split="test") for _ in range(2)]
        content = [{"type": "image", "image": Image.fromarray(picture.image)} for picture in shown]
        which = random.randrange(2)
        question = next(q for q in exam(shown[which], random) if "next" in q.text or "word" in q.text)
        text = f"in the {('first', 'second')[which]} image , {question.text}"
        inputs = qwen.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = qwen.model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        right += qwen.processor.decode(out, skip_special_tokens=True).strip() == question.answer
    assert right >= 5


@pytest.mark.parametrize("kind", ["page", "clip"])
def test_what_stays_keeps_its_place(qwen, kind):
    """A quarter of the tokens: exact counts, and (t, h, w) positions that those of the whole prompt have."""
    random = Random(8)
    page = kind == "page"
    shown = draw_picture(random, (192, 224), style="page", split="test") if page else draw_clip(random, (6, 96, 112), split="test")
    times, rows, columns = (1, 14, 12) if page else (6, 7, 6)
    inputs = collate(qwen, [question_about(qwen.processor, qwen.model, as_shown(shown), "what is the first word ?")])
    found = foveate.encode(qwen.model, "spatial", budget=0.25, **inputs)
    (kept,) = found.report.kept
    assert len(kept) == times * rows * columns // 4
    ids, positions, _ = prefix_layout(1, times, rows, columns, 1.0 if page else 2.0)
    visual = torch.tensor([number < 0 for number in ids])
    placed = found.inputs["position_ids"][1:, 0]
    short = (found.inputs["input_ids"][0] == (IMAGE if page else VIDEO)).nonzero().flatten()
    assert torch.equal(placed[:, short], positions[:, visual][:, kept])
