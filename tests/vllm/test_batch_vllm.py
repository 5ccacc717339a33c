"""``foveate batch`` with a real vLLM, alone and on Ray, beside transformers: both pocket models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from foveate.pocket.scenes import draw_scene

QUESTIONS = ("what color is the star ?", "how many objects are there ?", "is there a red circle ?", "what shape is the object ?")
ROWS = 24


METHODS = {"pocket": ("prumerge+",), "pocket-qwen": ("divprune", "--budget", "0.25")}  # another count for each picture


@pytest.fixture(scope="module", params=METHODS)
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def questions(tmp_path_factory, model) -> Path:
    """Rows with one picture, with two and three, and without; and three that fail."""
    folder = tmp_path_factory.mktemp("batch")
    for number in range(5):
        scene = Image.fromarray(draw_scene(Random(number), split="test", level=number % 3).image)
        size = scene.size if model == "pocket" else (128 + 32 * number, 192)
        scene.resize(size).save(folder / f"{number}.png")
    documents: list[dict] = []
    for n in range(ROWS):
        row = {"id": f"r{n}", "question": QUESTIONS[n % 4]}
        if n % 6 == 4:
            row["images"] = [f"{(n + shift) % 5}.png" for shift in range(2 + n % 4 // 2)]
        elif n % 6 != 5:
            row["image"] = f"{n % 5}.png"
        documents.append(row)
    documents[2]["budget"] = 40
    documents[9] |= {"method": "full", "max_new_tokens": 1}
    documents += [{"id": "missing", "image": "none.png", "question": "what ?"}, {"id": "long", "question": "red " * 8300}]
    lines = [json.dumps(each) for each in documents]
    (folder / "questions.jsonl").write_text("\n".join([*lines[:7], "{no JSON", *lines[7:]]) + "\n")
    return folder / "questions.jsonl"


def answered(questions: Path, model: str, name: str, *options: str) -> dict:
    """The output of the command, by id."""
    out = questions.parent / f"{name}.jsonl"
    export = () if name == "transformers" else ("--export", str(questions.parent / "text"))
    command = [sys.executable, "-m", "foveate", "batch", str(questions), str(out), "--engine", name, *export, *options]
    command += ["--model", model, "--method", *METHODS[model]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == f"{out}: {ROWS} answered, 3 failed (--retry-failed answers them again)"
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in found}) == len(found) == ROWS + 3
    return {row["id"]: row for row in found}


@pytest.fixture(scope="module")
def expected(questions, model) -> dict:
    found = answered(questions, model, "transformers")
    assert {name for name, row in found.items() if "error" in row} == {"missing", "long", 8}
    counts = {count["visual_tokens"] for row in found.values() if "usage" in row for count in row["usage"]["pictures"]}
    assert len(counts) > 4  # adaptive ones, 40 and all
    return found


def test_vllm_answers_as_transformers(questions, model, expected):
    assert answered(questions, model, "vllm") == expected


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")
def test_ray_answers_as_transformers(questions, model, expected):
    assert answered(questions, model, "ray", "--encoders", "2", "--engines", "1", "--batch-size", "8") == expected
