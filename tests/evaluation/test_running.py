# ruff: noqa: E402 (imports behind importorskip)
"""``foveate eval``: our model in the real evaluator of lmms-eval, its ledger, several processes, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.analysis.flops import prefill_flops
from foveate.engine.model.anatomy import innermost
from foveate.errors import InputError
from foveate.evaluation import TASKS
from foveate.lab.exam import Evaluator
from foveate.lab.testset import TestSet

from .. import families
from ..cli.test_main import invoke

REASON = "needs lmms-eval: pip install 'foveate[eval-needs]' && pip install --no-deps lmms-eval==0.7.3"
pytest.importorskip("lmms_eval", reason=REASON)

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from foveate.chat import generation
from foveate.evaluation import pocket
from foveate.evaluation.model import FoveateModel
from foveate.evaluation.plugin import manifest
from foveate.evaluation.running import TaskRun, evaluate, level, load_tasks
from foveate.fingerprint import fingerprint
from foveate.lab.store import Store
from foveate.loading import load

LIMIT = 6
OURS = ("pocket_vqav2", "pocket_textvqa", "pocket_mmbench")  # whose score is the share of right answers


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(["pocket"])


def test_lmms_eval_finds_the_model():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("foveate") is FoveateModel
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nfoveate = "foveate.evaluation.plugin:manifest"' in text


def right_by_evaluator(loaded, task: str, method) -> tuple[float, float]:
    """Share of right answers, and tokens, on the first questions of a task, without lmms-eval and without ``generate``."""
    drawn = TestSet.draw(501)
    first = pocket.questions(task, 501)[:LIMIT]
    scenes = [drawn.scenes[row["scene"]] for row in first]
    asked = [[next(q for q in drawn.questions[row["scene"]] if q.text == row["question"])] for row in first]
    assert [q[0].answer for q in asked] == [row["answer"] for row in first]
    result = Evaluator(innermost(loaded.model), TestSet(scenes, asked)).run(method.before_decoder())
    return float(result.right.mean()), float(np.mean(result.tokens))


@pytest.mark.parametrize("method", [foveate.KeepAll(), foveate.get("prumerge+"), foveate.get("spatial", budget=16)], ids=str)
def test_scores_are_those_of_our_own_evaluator(loaded, tasks, method):
    rows = TaskRun(loaded, batch_size=4, limit=LIMIT).answers(method, {name: tasks[name] for name in OURS})
    for row in rows:
        share, tokens = right_by_evaluator(loaded, row["task"], method)
        assert row["score"] == pytest.approx(100 * share)
        assert row["tokens"] == pytest.approx(tokens)
        assert (row["questions"], row["tokens_before"]) == (LIMIT, 576)
        assert row["stderr"] == pytest.approx(100 * (share * (1 - share) / (LIMIT - 1)) ** 0.5)  # of a share
        assert row["seconds"] > 0
    assert foveate.engine.install.installed_on(loaded.model) is None


def test_the_fine_tuned_model_by_its_name(tasks):
    tuned, method = load("pocket+prumerge"), foveate.get("prumerge")
    (row,) = TaskRun(tuned, batch_size=4, limit=LIMIT).answers(method, {"pocket_textvqa": tasks["pocket_textvqa"]})
    share, tokens = right_by_evaluator(tuned, "pocket_textvqa", method)
    assert row["score"] == pytest.approx(100 * share)
    assert row["tokens"] == pytest.approx(tokens)


def test_pocket_questions_are_those_of_the_test_set():
    drawn = TestSet.draw(5)
    every = {task: pocket.questions(task, 5) for task in pocket.TASKS}
    found = sorted((row["scene"], row["question"]) for rows in every.values() for row in rows)
    assert found == sorted((scene, q.text) for scene, asked in enumerate(drawn.questions) for q in asked)
    pairs = every["pocket_mme"]
    assert all(a["question_id"] == b["question_id"] for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert all({a["answer"], b["answer"]} == {"yes", "no"} for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_the_camera_of_a_clip_moves_and_keeps_all_things():
    scenes, seen = TestSet.draw(60).scenes, set()
    asked = pocket.questions(pocket.CLIP, 60)
    assert {row["family"] for row in asked} == {"color", "shape", "count", "relation"}  # a place in the picture would change
    for document in {row["scene"]: row for row in asked}.values():
        scene, frames = scenes[document["scene"]], [np.asarray(frame) for frame in pocket.clip(document)]
        assert np.array_equal(frames[0], scene.image)
        assert all(np.array_equal(a, b) for a, b in zip(frames, pocket.clip(document), strict=True))
        x, y = pocket.pan(scene, Random(f"pan/{document['seed']}/{document['scene']}"))
        seen.add((np.sign(x), np.sign(y)))
        boxes = np.array([item.box for item in scene.items])
        for number, frame in enumerate(frames[1:], 1):
            place = boxes[:, :2] - (x * number, y * number)
            assert place.min() >= 0
            assert (place + boxes[:, 2:]).max() <= 192
            for (left, top), box in zip(place, boxes, strict=True):  # every thing is there, as it was drawn
                thing = scene.image[box[1] : box[1] + box[3], box[0] : box[0] + box[2]]
                assert np.array_equal(frame[top : top + box[3], left : left + box[2]], thing)
            patches = (frame != frames[number - 1]).reshape(24, 8, 24, 8, 3).any((1, 3, 4))
            assert patches.ravel()[scene.owner >= 0].mean() > 0.5
    assert len(seen) >= 6


def test_rows_of_baselines_and_their_cost(loaded, tasks):
    names = ("pocket_pope", "pocket_mme")
    method = foveate.get("fastv", budget=0.25)  # reads the question, inside the decoder
    report = evaluate(TaskRun(loaded, batch_size=4, limit=4), {name: tasks[name] for name in names}, [method])
    for name in names:
        rows = {row["method"]: row for row in report["rows"] if row["task"] == name}
        assert list(rows) == ["full", "fastv", "random", "spatial", "resize"]
        cost = rows["fastv"]["tokens"]
        assert cost == pytest.approx((2 * 576 + 4 * 144) / 6)
        assert all(rows[base]["tokens"] == pytest.approx(cost, abs=15) for base in ("random", "spatial", "resize"))
        assert rows["full"]["flops"] > rows["fastv"]["flops"] > 0
        assert rows["random"]["budget"] == pytest.approx(cost / 576)
    assert {row["metric"] for row in report["rows"]} == {"pope_f1_score", "mme_perception_score"}
    assert report["missing"] == []


def test_level_of_baselines():
    row = {"tokens": 143.6, "tokens_before": 576}
    assert level(row, foveate.get("prumerge+")) == 144
    assert level(row, foveate.get("prumerge+", budget=0.25)) == 0.2493
    assert level({"tokens": 576, "tokens_before": 576}, foveate.get("prumerge+", budget=1.0)) is None


# -- requests by hand


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def ask(model: FoveateModel, documents: list[dict], **options) -> list[str]:
    def messages(document: dict) -> list[dict]:
        shown = [{"type": "image", "url": image} for image in document["images"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": document["question"]}]}]

    model.task_dict = {"t": {"test": documents}}
    arguments = [("", messages, {"max_new_tokens": 6, **options}, number, "t", "test") for number in range(len(documents))]
    metadata = [{"task": "t", "doc_id": number, "repeats": 1} for number in range(len(documents))]
    requests = [Instance("generate_until", a, 0, m) for a, m in zip(arguments, metadata, strict=True)]
    return [result.text for result in model.generate_until(requests)]


@pytest.fixture(scope="module")
def next_folder():
    return families.next_with_processor()


MIXED = [
    {"images": [picture(84, 150, 0)], "question": "w10 w11"},
    {"images": [picture(160, 90, 1), picture(168, 168, 2)], "question": "w12"},
    {"images": [], "question": "w20 w21 w22"},
    {"images": [picture(90, 160, 3)], "question": "w30 w31 w32 w33 w34"},
]


@pytest.mark.parametrize("method", ["full", "divprune", "fastv"])
def test_batches_answer_as_single_prompts(next_folder, method):
    fields = {} if method == "full" else {"budget": 0.5}
    found = []
    for size in (1, 4):
        model = FoveateModel(str(next_folder), method, batch_size=size, **fields)
        found.append((ask(model, MIXED), [(a.items, a.before, a.tokens, a.flops, a.prompt) for a in model.answers["t"].values()]))
        model.close()
    assert found[0] == found[1]
    assert len({*found[0][0]}) == 4
    items, before, tokens, flops, prompt = found[0][1][1]
    assert items == 2
    assert before == 168 + 144  # (2 x 6 tiles with unpadding, newlines, and the whole picture) of each
    assert tokens == 312 if method == "full" else tokens < 312
    if method == "divprune":
        assert flops == prefill_flops(model.loaded.model.config, int(tokens) + 2)  # <s> and one word
        assert prompt == tokens + 2


def test_answers_are_those_of_generate(next_folder):
    model = FoveateModel(str(next_folder), "divprune", budget=0.5, batch_size=4)
    texts = ask(model, MIXED)
    model.close()
    stock, processor = model.loaded.model, model.loaded.processor
    content = [{"type": "image", "image": image} for image in MIXED[1]["images"]] + [{"type": "text", "text": "w12"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with foveate.get("divprune", budget=0.5)(stock):
        out = stock.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert texts[1] == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ask(FoveateModel(loaded=model.loaded), MIXED[1:2], until=[texts[1].split()[2]])[0].split() != texts[1].split()
    foveate.detach(stock)


def test_generation_options():
    options, until = generation({"temperature": 0, "top_p": 1.0, "until": "END", "image_aspect_ratio": "original"})
    assert until == ["END"]
    assert options == {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": 1024}
    options, _ = generation({"max_new_tokens": 7, "num_beams": 3, "do_sample": True, "temperature": 0})
    assert options["num_beams"] == 3
    assert (options["do_sample"], options["max_new_tokens"]) == (False, 7)
    assert generation({"do_sample": True, "temperature": 0.7})[0]["do_sample"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nonsense"}, "unknown method 'nonsense'"),
        ({"method": "prumerge", "layer": 3}, "no field 'layer'"),
        ({"budget": 144}, "keeps all visual tokens"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"pretrained": "/no/such/folder"}, "there is no folder"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        FoveateModel(**arguments)


def test_bad_requests(loaded):
    model = FoveateModel(loaded=loaded)
    with pytest.raises(InputError, match="stands for a picture"):
        ask(model, [{"images": [picture(192, 192, 0)], "question": "what is <image> ?"}])
    with pytest.raises(InputError, match="draws answers at random"):
        ask(model, [{"images": [picture(192, 192, 0)], "question": "what ?"}], temperature=0.5)
    with pytest.raises(InputError, match="asks for likelihoods"):
        model.loglikelihood([])
    model.close()


# -- the ledger


class Stopped(Exception):
    pass


SCENES = [{"images": [picture(192, 192, seed)], "question": f"how many {color} objects are there ?"} for seed, color in enumerate(
    ("red", "green", "blue", "white", "black")
)]  # fmt: skip


def counted(loaded, documents, monkeypatch, *, stop: int = 99, **arguments) -> tuple[list[str], list[int]]:
    """Answers, and the sizes of the batches that were computed for them; ``stop`` of them end the run."""
    model = FoveateModel(loaded=loaded, **arguments)
    original, sizes = loaded.model.generate, []

    def generate(**inputs):
        if len(sizes) == stop:
            raise Stopped
        sizes.append(len(inputs["input_ids"]))
        return original(**inputs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model, "generate", generate)
            return ask(model, documents), sizes
    finally:
        model.close()


def test_an_interrupted_run_goes_on_and_never_mixes(loaded, monkeypatch, tmp_path):
    arguments = {"method": "prumerge+", "budget": 64, "batch_size": 2}
    whole, _ = counted(loaded, SCENES, monkeypatch, **arguments)
    with pytest.raises(Stopped):
        counted(loaded, SCENES, monkeypatch, stop=1, cache=tmp_path, **arguments)
    file = next(tmp_path.rglob("answers.jsonl"))
    with file.open("a") as opened:
        opened.write('{"key": "torn by a ki')
    assert counted(loaded, SCENES, monkeypatch, cache=tmp_path, **arguments) == (whole, [2, 1])
    assert counted(loaded, SCENES, monkeypatch, cache=tmp_path, **arguments) == (whole, [])
    others = [{"budget": 65}, {"method": "prumerge"}, {"frames": 3}]
    for other in others:
        assert counted(loaded, SCENES[:2], monkeypatch, cache=tmp_path, **(arguments | other))[1] == [2]
    # another picture, another question: neither is answered yet
    assert counted(loaded, [SCENES[0] | {"images": SCENES[1]["images"]}], monkeypatch, cache=tmp_path, **arguments)[1] == [1]
    assert counted(loaded, [SCENES[0] | {"question": "what ?"}], monkeypatch, cache=tmp_path, **arguments)[1] == [1]
    # the answers of several processes are one ledger
    file.rename(file.with_name("answers.jsonl.7"))
    assert counted(loaded, SCENES, monkeypatch, cache=tmp_path, **arguments) == (whole, [])


def test_weights_are_part_of_the_setting(loaded):
    before = fingerprint(loaded.model)
    assert before == fingerprint(loaded.model)
    weight = loaded.model.lm_head.weight
    kept = weight[3, 5].item()
    with torch.no_grad():
        weight[3, 5] += 0.25
        assert fingerprint(loaded.model) != before
        weight[3, 5] = kept
    assert fingerprint(loaded.model) == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Store(tmp_path / "file" / "answers.jsonl", {})


# -- the command


def test_two_processes_give_the_same(loaded, tasks, tmp_path):
    """``accelerate launch`` with an odd number of questions: one process has one more, and the other repeats one."""
    # --multi_gpu is how accelerate says several processes; with --cpu it starts only one of them
    launch = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "foveate", "eval", "--device", "cpu", "--json"]
    launch += [
        "--tasks",
        "pocket_pope,pocket_vqav2",
        "--limit",
        "5",
        "--batch-size",
        "2",
        "--no-baselines",
        "--cache",
        str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launch]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    several = json.loads(done.stdout)["rows"]
    names = ("pocket_pope", "pocket_vqav2")
    single = evaluate(TaskRun(loaded, 2, 5), {name: tasks[name] for name in names}, [foveate.get("prumerge+")], baselines=False)
    same = ("task", "method", "metric", "score", "scores", "questions", "tokens", "tokens_before", "flops")
    assert [[row[name] for name in same] for row in several] == [[row[name] for name in same] for row in single["rows"]]
    assert {path.name for path in tmp_path.rglob("answers.jsonl*")} == {"answers.jsonl", "answers.jsonl.1"}


def test_command(capsys, monkeypatch, tmp_path):
    arguments = (
        "eval",
        "--tasks",
        "pocket_mme",
        "--methods",
        "prumerge",
        "--budget",
        "64",
        "--limit",
        "4",
        "--save",
        str(tmp_path),
    )
    code, out, err = invoke(capsys, monkeypatch, *arguments)
    assert code == 0, err
    assert "mme_perception_score" in out
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["full", "prumerge", "random", "spatial", "resize"]
    text = (tmp_path / "evaluation.md").read_text()
    assert "foveate eval --tasks pocket_mme --methods prumerge" in text
    assert f"| prumerge 64 | 64.0 | {report['rows'][1]['flops'] / 1e9:.2f} |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "no_such_task"), "no task 'no_such_task'"),
        (("--tasks", "msvd_qa"), "--data"),
        (("--methods", "prumerge,"), "empty entry"),
        (("--budget", "0"), "budget"),
        (("--model", "/no/such"), "there is no folder"),
    ],
)
def test_command_refuses(capsys, monkeypatch, arguments, message):
    code, _, err = invoke(capsys, monkeypatch, "eval", *arguments)
    assert code == 2
    assert message in err


def test_list(capsys, monkeypatch):
    code, out, _ = invoke(capsys, monkeypatch, "eval", "--list")
    assert code == 0
    assert all(name in out for name in ("pocket_mme", "msrvtt_qa", "coco_pope", str(TASKS)))
