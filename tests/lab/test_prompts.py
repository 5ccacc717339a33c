"""Encoded pictures are kept for the next method as far as there is room, counted by what they really take."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.lab.own import OwnQuestions, drawn_examples
from foveate.lab.prompts import room
from foveate.lab.scoring import score_of
from foveate.loading import load

METHODS = (("divprune", 0.2), ("prumerge+", 0.25), ("vispruner", 0.1))  # the last two read attention of encoder layers
ROWS, CHUNK = 6, 2


@pytest.fixture(scope="module")
def loaded():
    return load("pocket")


@pytest.fixture(scope="module")
def examples(loaded):
    return drawn_examples(loaded, ROWS, 0).items


def answers(loaded, examples, space: int | None):
    """Texts of all methods, and the bytes that were kept at most."""
    prompts = OwnQuestions(loaded, examples, score_of("exact"), CHUNK, 4).prompts
    if space is not None:
        prompts.room = space
    texts, most = [], 0
    for name, budget in METHODS:
        for part in prompts.answers(foveate.get(name, budget=budget)):
            texts.append((name, part.numbers, part.texts))
            most = max(most, sum(pictures.nbytes for pictures, _ in prompts._kept.values()))
    return texts, most


def test_what_is_kept_fits_and_changes_no_answer(loaded, examples):
    free, most = answers(loaded, examples, None)
    third, little = answers(loaded, examples, most // 3)
    none, nothing = answers(loaded, examples, 0)
    assert free == third == none
    assert 0 < little <= most // 3
    assert nothing == 0


def test_pictures_weigh_what_methods_had_recorded(loaded, examples):
    prompts = OwnQuestions(loaded, examples, score_of("exact"), CHUNK, 4).prompts
    inputs = prompts.inputs([0, 1])
    pictures = foveate.Pictures(loaded.model, **inputs)
    tokens = sum(each.nbytes for each in pictures.embeds)  # encoded, and nothing recorded yet
    before = pictures.nbytes
    assert before >= inputs["pixel_values"].nbytes + tokens
    pictures.reduce("prumerge+")
    width = loaded.model.config.vision_config.hidden_size
    assert pictures.nbytes >= before + 2 * 577 * width * 4  # keys of both pictures, [CLS] included


def test_there_is_room(loaded):
    assert 2**20 < room(torch.device("cpu")) < 2**50
