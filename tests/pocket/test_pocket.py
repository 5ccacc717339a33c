"""The pocket world, its model, its training and its evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.lab.exam import Evaluator
from foveate.lab.scores import Scores, majority
from foveate.lab.testset import TestSet
from foveate.pocket import WEIGHTS, batches, questions
from foveate.pocket.answers import answer_mask
from foveate.pocket.assets import load_assets, text_mask
from foveate.pocket.questions import QUESTION_KINDS, PocketQuestion
from foveate.pocket.scenes import GRID, PATCH, SPLITS, backgrounds, draw_scene
from foveate.pocket.vocabulary import COLORS, SHAPES, VOCABULARY, WORDS


@pytest.fixture(scope="module")
def pocket():
    return foveate.load_pocket()


# -- the world -----------------------------------------------------------------------------------------------------------------


def test_splits_never_overlap():
    pools = [set(range(*load_assets().digit_pool(split))) for split in SPLITS]
    assert sum(map(len, pools)) == len(set().union(*pools)) == len(load_assets().digits)
    corners = [{texture[:24, :24].tobytes() for texture in backgrounds(split)} for split in SPLITS]
    assert all(len(c) == 256 for c in corners)
    assert len(set().union(*corners)) == 3 * 256


def test_scenes_are_functions_of_their_seed():
    one, again = (draw_scene(Random(11), split="test", level=2) for _ in range(2))
    assert one.items == again.items
    assert np.array_equal(one.image, again.image)
    assert [q for asked in TestSet.draw(6).questions for q in asked] == [q for asked in TestSet.draw(6).questions for q in asked]
    assert [q.text for q in TestSet.draw(1).questions[0]] != [q.text for q in TestSet.draw(1, seed=1).questions[0]]


def test_levels_have_one_to_twelve_items():
    counts = {level: [len(draw_scene(Random(i), level=level).items) for i in range(80)] for level in range(3)}
    assert (min(counts[0]), max(counts[0])) == (1, 3)
    assert (min(counts[1]), max(counts[1])) == (4, 7)
    assert max(counts[2]) == 12
    assert min(counts[2]) >= 6  # what finds no room in 40 tries is left out


def test_every_word_has_a_neighbour_that_shares_most_letters():
    assert len(set(WORDS)) == len(WORDS) >= 45
    assert not set(WORDS) & (set(SHAPES) | set(COLORS))
    alone = []
    for word in WORDS:
        shared = max(sum(a == b for a, b in zip(word, other, strict=False)) for other in WORDS if other != word)
        if shared < len(word) - 2:
            alone.append(word)
    assert alone == ["news"]


def _check(question: PocketQuestion, scene) -> str:
    """The answer, worked out from the text of the question alone."""
    words, shapes = question.text.split(), scene.of("shape")
    if question.family in ("word", "number", "digit"):
        name = scene.of(question.family)[0].name
        return " ".join(name) if question.family == "number" else name
    if question.family == "choice":
        cut = words.index("(a)")
        options = dict(zip(words[cut::2], words[cut + 1 :: 2], strict=True))
        base = PocketQuestion(
            {"what color": "color", "what shape": "shape"}.get(" ".join(words[:2]), "word"), " ".join(words[:cut]), ""
        )
        return next(letter for letter, option in options.items() if option == _check(base, scene))
    if question.family == "color":
        return next(i.color for i in shapes if i.name == words[4])
    if question.family == "shape":
        return next(i.name for i in shapes if i.color == words[4])
    if question.family == "count":
        what = words[2]
        return str(sum(what in ("objects", i.name, i.color) for i in shapes))
    if question.family == "pair":
        return "yes" if next(i.color for i in shapes if i.name == words[2]) == words[3] else "no"
    if question.family == "where":
        x, y = next(i.center for i in shapes if (i.color, i.name) == (words[3], words[4]))
        return f"{('top', 'middle', 'bottom')[int(3 * y / 192)]} {('left', 'center', 'right')[int(3 * x / 192)]}"
    if question.family == "relation":
        a = next(i.center for i in shapes if (i.color, i.name) == (words[2], words[3]))
        b = next(i.center for i in shapes if (i.color, i.name) == (words[-3], words[-2]))
        holds = {"left": a[0] < b[0], "right": a[0] > b[0], "above": a[1] < b[1], "below": a[1] > b[1]}
        return "yes" if next(truth for word, truth in holds.items() if word in words) else "no"
    if "says" in words:
        return "yes" if any(i.name == words[6] for i in scene.of("word")) else "no"
    wanted = words[3:-4]
    present = any(wanted in ([i.name], [i.color, i.name]) for i in shapes)
    return "yes" if present else "no"


def test_answers_are_true_unambiguous_and_in_the_vocabulary():
    seen = dict.fromkeys(QUESTION_KINDS, 0)
    for seed in range(150):
        random = Random(seed)
        scene = draw_scene(random, split="test")
        for question in [*questions.exam(scene, random), *questions.ask(scene, random, 30)]:
            assert _check(question, scene) == question.answer, question
            batches.LANGUAGE.encode(question.text)
            batches.LANGUAGE.encode(question.answer)
            seen[question.family] += 1
    assert min(seen.values()) > 60, seen


def test_yes_and_no_are_balanced():
    asked = [q for i in range(300) for q in questions.exam(draw_scene(Random(i), split="test"), Random(i))]
    for family in ("existence_random", "existence_adversarial", "relation", "pair"):
        answers = [q.answer for q in asked if q.family == family]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_patch_targets_say_what_is_in_the_picture():
    names = list(batches.PATCH_TARGETS)
    for seed in range(20):
        scene = draw_scene(Random(seed), side=16, level=2)
        targets = batches.patch_targets(scene)
        assert targets.shape == (256, len(names))
        for index, item in enumerate(scene.items):
            mine = targets[scene.owner == index]
            for name, value in (("color", item.color), ("word", item.name if item.kind == "word" else None)):
                table = list(COLORS) if name == "color" else WORDS
                expected = table.index(value) if value else batches.IGNORE
                assert (mine[:, names.index(name)] == expected).all()
            if item.kind == "word" and len(mine):
                read = [batches.CHARACTERS[c] for c in mine[:, names.index("character")]]
                assert set(read) <= set(item.name.upper())
        assert (targets[scene.owner < 0][:, 1:] == batches.IGNORE).all()


def test_wrong_captions_differ_in_one_fact():
    for seed in range(30):
        scene = draw_scene(Random(seed), level=2)
        right, wrong = batches.captions(scene, Random(seed))
        changed = np.abs(wrong - right).sum(1)
        assert changed.min() >= 1
        assert changed.max() <= 2


def test_text_masks_are_sharp_and_scaled():
    mask, starts = text_mask("wine", 0, 14)
    assert mask.shape[0] - 6 in range(13, 17)
    assert mask.max() == 1
    assert len(starts) == 3
    assert list(starts) == sorted(starts)


# -- the model -----------------------------------------------------------------------------------------------------------------


def test_stock_classes_and_a_small_file(pocket):
    model, processor = pocket
    assert type(model).__module__ == "transformers.models.llava.modeling_llava"
    assert type(processor).__module__ == "transformers.models.llava.processing_llava"
    assert model.config.image_seq_length == 576
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 20e6
    assert len(processor.tokenizer) == len(VOCABULARY) == model.config.text_config.vocab_size


def test_the_processor_gives_what_training_used(pocket):
    _, processor = pocket
    scene = draw_scene(Random(3), split="test")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.fromarray(scene.image), return_tensors="pt")
    ids = [
        *batches.LANGUAGE.encode("<s> user:"),
        *batches.LANGUAGE.encode("<image>") * 576,
        *batches.LANGUAGE.encode("what color is the star ? assistant:"),
    ]
    assert inputs["input_ids"][0].tolist() == ids
    torch.testing.assert_close(inputs["pixel_values"], batches.normalise([scene.image]))


def test_one_forward_for_all_questions_equals_generate(pocket):
    """The evaluation's shortcut against greedy decoding through the attached model, question by question."""
    model, processor = pocket
    data = TestSet.draw(6)
    evaluator = Evaluator(model, data, chunk=4)
    for method in (None, foveate.PruMergePlus(), foveate.PruMerge.released(iqr_scope="image"), foveate.Pool(budget=36)):
        fast = evaluator.run(method)
        slow, tokens = [], []
        for scene, asked in zip(data.scenes, data.questions, strict=True):
            prompts = [f"<s> user: <image> {question.text} assistant:" for question in asked]
            pictures = [Image.fromarray(scene.image)] * len(asked)
            inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True, add_special_tokens=False)
            with (method or foveate.Sequential(budget=1.0))(model) as session:
                out = model.generate(**inputs, max_new_tokens=6)
            said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            slow += [text.strip() == question.answer for text, question in zip(said, asked, strict=True)]
            assert len(set(session.report.after)) == 1, "the same picture in every row"
            tokens.append(session.report.after[0])
        assert fast.tokens == tokens
        assert np.mean(fast.right == np.array(slow)) >= 0.99, "at most rounding apart"


def test_answers_need_the_picture(pocket):
    """The full model is far above what can be guessed, on every family; the thresholds are well below the measured figures."""
    data = TestSet.draw(60)
    evaluator, scores = Evaluator(pocket[0], data), Scores.of(data, resamples=200)
    full = scores.per_family(evaluator.run(None).right)
    blind = scores.per_family(evaluator.run(None, wrong_picture=True).right)
    guess = majority(data)
    for family in QUESTION_KINDS:
        assert full[family] > 0.6, family
        assert full[family] > guess[family] + 0.2, family
        assert blind[family] < guess[family] + 0.2, family


def test_accuracy_falls_with_the_tokens_and_selection_beats_the_first_ones(pocket):
    data = TestSet.draw(30)
    evaluator = Evaluator(pocket[0], data)

    def accuracy(method):
        return evaluator.run(method).right.mean()

    full, some, few = (accuracy(foveate.PruMergePlus(budget=b)) for b in (1.0, 64, 8))
    assert full > few + 0.1
    assert some > few
    assert accuracy(foveate.PruMerge(budget=64)) > accuracy(foveate.Sequential(budget=64)) + 0.1


def test_intervals():
    data = TestSet.draw(60)
    scores = Scores.of(data, resamples=500)
    right = np.random.default_rng(0).random(len(scores.scene)) < 0.7
    mean, low, high = scores.interval(right)
    assert low < mean == right.mean() < high
    same, low, high = scores.difference(right, right)
    assert same == 0
    assert low == -high < 0  # scenes that agree do not show that all do
    better = right | (np.random.default_rng(1).random(len(right)) < 0.3)
    gain, low, _ = scores.difference(better, right)
    assert gain == pytest.approx(better.mean() - right.mean())
    assert low > 0


def test_answer_mask():
    mask = answer_mask(torch.tensor([[True, True, False]]), torch.tensor([[0, 0, 1, -1]]))[0, 0]
    seen = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 3, 4}, {0, 1, 5}, {0, 1, 6}]


def test_evaluate_command(tmp_path):
    numbers, curve = tmp_path / "numbers.json", tmp_path / "curve.png"
    command = [sys.executable, "-m", "foveate.lab.evaluate", "--scenes", "9", "--budgets", "16,64"]
    done = subprocess.run([*command, "--json", str(numbers), "--save", str(curve)], capture_output=True, text=True, check=True)
    assert "wrong picture" in done.stdout
    report = json.loads(numbers.read_text())
    assert {"full", "blind", "majority", "methods", "attention", "merging"} <= set(report)
    assert set(report["full"]) <= set(QUESTION_KINDS)
    for row in report["methods"]:
        assert {"name", "mean_tokens", "accuracy", "low", "high", "families"} <= set(row)
        assert row["low"] <= row["accuracy"] <= row["high"]
        if row["budget"] in (16, 64):
            assert row["mean_tokens"] == row["budget"], "equal counts"
    names = {row["name"] for row in report["methods"] if row["budget"] == 16}
    assert {"prumerge", "prumerge+", "prune-only", "random", "spatial", "sequential", "pool"} <= names
    with Image.open(curve) as picture:
        assert picture.width > 800


# -- training ------------------------------------------------------------------------------------------------------------------


def _train(folder, *options: str) -> None:
    command = [sys.executable, "-m", "foveate.pocket.train", "--output", str(folder), "--scale", "0.1"]
    steps = ["--vision-steps", "1", "--joint-steps", "1", "--calm-steps", "1", "--final-steps", "1"]
    subprocess.run([*command, *steps, *options], check=True, capture_output=True, timeout=600)


def test_training_resumes_where_it_stopped(tmp_path):
    """Interrupted after two of four steps and continued, the weights equal those of a run in one piece, but for rounding.

    Rounding is measured against what the two steps changed: Muon makes every direction of a gradient equally long, so
    that the last bit of a sum can show in the fourth digit of a single weight.
    """
    from safetensors.torch import load_file

    _train(tmp_path / "whole", "--save-every", "2")
    _train(tmp_path / "parts", "--save-every", "1", "--stop-after", "2")
    state = json.loads((tmp_path / "parts/checkpoint/step.json").read_text())
    assert state["step"] == 2
    before = load_file(tmp_path / "parts/checkpoint/model.safetensors")
    _train(tmp_path / "parts", "--save-every", "2")
    whole, parts = (load_file(tmp_path / run / "checkpoint/model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() == before.keys()
    for name in whole:
        change = (whole[name] - before[name]).float().norm()
        assert (whole[name] - parts[name]).float().norm() <= 0.05 * change, name
    assert not all(torch.equal(whole[name], before[name]) for name in whole)
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4
    assert foveate.load_pocket(folder=tmp_path / "whole/model")[0].config.image_seq_length == GRID**2
    assert GRID * PATCH == 192
