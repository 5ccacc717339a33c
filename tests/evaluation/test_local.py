"""Benchmarks in tiny files of the released formats, scored by the real evaluator against examples worked out by hand."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from foveate.errors import InputError

pytest.importorskip("lmms_eval", reason="needs lmms-eval: docs/evaluation.md says how to install it")

from lmms_eval.api.instance import Instance
from lmms_eval.api.metrics import anls
from lmms_eval.api.model import lmms

from foveate.analysis.flops import prefill_flops
from foveate.evaluation.local import RELEASES, prepare
from foveate.evaluation.running import TaskRun, load_tasks, scored
from foveate.evaluation.scoring import normalised, score
from foveate.loading import load
from foveate.methods.registry import get


class Scripted(lmms):
    """Answers what a test says, by task and number of the question, and looks at what it is asked."""

    is_simple = False

    def __init__(self, answers: dict[str, list[str]]) -> None:
        super().__init__()
        self.answers, self.asked = answers, {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        found = []
        for request in requests:
            _, messages, _, number, task, split = request.args
            self.asked.setdefault(task, []).append(messages(self.task_dict[task][split][number])[0]["content"])
            found.append(self.answers[task][number])
        return found

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


def write(path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def color(name: str) -> Image.Image:
    return Image.new("RGB", (16, 12), name)


def encoded(name: str) -> str:
    file = io.BytesIO()
    color(name).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All benchmarks, a few questions each."""
    root = tmp_path_factory.mktemp("benchmarks")
    coco = "COCO_val2014_000000000001.jpg"
    write(root / "pope" / "val2014" / coco, color("red"))
    write(root / "vqav2" / "val2014" / coco, color("red"))
    for category, labels in (("adversarial", "yes no"), ("popular", "yes no"), ("random", "yes yes no no")):
        rows = [
            {"question_id": n, "image": coco, "text": "Is there a cat in the image?", "label": label}
            for n, label in enumerate(labels.split(), 1)
        ]
        write(root / "pope" / f"coco_pope_{category}.json", "\n".join(map(json.dumps, rows)) + "\n")
    # MME comes with pictures and questions together, or in folders of their own
    for name in ("a", "b"):
        write(root / "mme" / "color" / f"{name}.png", color("red"))
        write(
            root / "mme" / "color" / f"{name}.txt",
            "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n",
        )
    write(root / "mme" / "OCR" / "images" / "c.jpg", color("white"))
    write(
        root / "mme" / "OCR" / "questions_answers_YN" / "c.txt",
        "Is it A? Please answer yes or no.\tYes\nIs it B? Please answer yes or no.\tNo\n",
    )
    write(root / "mme" / "code_reasoning" / "d.png", color("white"))
    write(
        root / "mme" / "code_reasoning" / "d.txt",
        "Is it Python? Please answer yes or no.\tYes\nIs it C? Please answer yes or no.\tNo\n",
    )
    # MMBench: question 1 in two rotations, question 2 in one
    head = "index question hint A B C D answer category l2-category split image".split()
    lines = [
        [1, "What is it?", "", "a dog", "a cat", "a cow", "", "B", "x", "y", "dev", encoded("red")],
        [1000001, "What is it?", "", "a cat", "a cow", "a dog", "", "A", "x", "y", "dev", "1"],
        [2, "What colour?", "Look.", "red", "blue", "", "", "A", "x", "y", "dev", encoded("blue")],
        [3, "What else?", "", "sun", "moon", "", "", "B", "x", "y", "dev", encoded("blue")],
    ]
    write(root / "mmbench" / "MMBench_DEV_EN.tsv", "\n".join("\t".join(map(str, row)) for row in [head, *lines]) + "\n")
    problem = {"question": "Which?", "choices": ["left", "right"], "answer": 1, "hint": "", "image": "image.png"}
    problems = {"1": problem, "2": problem | {"image": None}, "3": problem | {"answer": 0, "hint": "Look."}, "4": problem}
    write(root / "scienceqa" / "problems.json", problems)
    write(root / "scienceqa" / "pid_splits.json", {"train": ["4"], "test": ["1", "2", "3"]})
    for number in (1, 3):
        write(root / "scienceqa" / "images" / "test" / str(number) / "image.png", color("red"))
    # of ten people, six say 2, three say 3 and one says 4
    ten = ["2"] * 6 + ["3"] * 3 + ["4"]
    questions = [{"image_id": 1, "question": "How many?", "question_id": n} for n in range(4)]
    told = [{"question_id": n, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(ten, 1)]} for n in range(4)]
    write(root / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(root / "vqav2" / "v2_mscoco_val2014_annotations.json", {"annotations": told})
    rows = [{"question_id": n, "image_id": "abc", "question": "how many?", "answers": ten} for n in range(4)]
    write(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": rows})
    write(root / "textvqa" / "train_images" / "abc.jpg", color("red"))
    write(
        root / "gqa" / "testdev_balanced_questions.json",
        {str(n): {"imageId": "n1", "question": "What?", "answer": "table"} for n in range(4)},
    )
    write(root / "gqa" / "images" / "n1.jpg", color("red"))
    rows = [{"id": n, "video_id": 7, "question": "what is a man doing?", "answer": "cook"} for n in range(3)]
    write(root / "msvd_qa" / "test_qa.json", rows)
    write(root / "msvd_qa" / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid7\n")
    write(root / "msvd_qa" / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi", "")
    write(
        root / "msrvtt_qa" / "test_qa.json",
        [{"id": 1, "video_id": 7010, "question": "what is shown?", "answer": "two", "category_id": 1}],
    )
    write(root / "msrvtt_qa" / "TestVideo" / "video7010.mp4", "")
    asked = [{"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "question_id": "v_1QIUV7WYKXg_3"}]
    write(root / "activitynet_qa" / "test_q.json", asked)
    write(root / "activitynet_qa" / "test_a.json", [{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}])
    write(root / "activitynet_qa" / "all_test" / "v_1QIUV7WYKXg.mkv", "")
    return root


ANSWERS = {
    # adversarial, popular, random; right, hit or miss: 2 true and 1 false positive, 2 false negatives, 3 true negatives
    "pope": "yes no no no Yes No yes no".split(),
    # OCR: both right; code_reasoning: one right; color: both right, then none
    "mme": ["Yes", "No", "yes.", "yes", "Yes", "no", "No", "Yes"],
    "mmbench_en_dev_static": ["B", "A. a cat", "(B)", "the moon"],
    "scienceqa_img": ["B", "B. right"],
    "vqav2_val": ["two", "3", "4", "five"],
    "textvqa_val": ["2", "3", "4", "five"],
    "gqa": ["table", "Table.", "the table", "chair"],
    "msvd_qa": ["cook", "The man will cook.", "cooking"],
    "msrvtt_qa": ["Two"],
    "activitynet_qa": ["no"],
}
# soft accuracy: an answer counts min(number of the other nine people who gave it / 3, 1), averaged over whom to leave out
TWO, THREE, FOUR = 1.0, (3 * 2 / 3 + 7 * 1) / 10, (1 * 0 + 9 * 1 / 3) / 10
SCORES = {
    # precision 2 of 3, recall 2 of 4
    "pope": {
        "pope_f1_score": 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2),
        "pope_accuracy": 5 / 8,
        "pope_precision": 2 / 3,
        "pope_recall": 1 / 2,
    },
    # of each category accuracy and accuracy of whole pictures, in %: OCR 200, color (100 + 0 + 100 + 0) / 2; code_reasoning 50
    "mme": {"mme_perception_score": 200 + 100, "mme_cognition_score": 50},
    # question 1 is right in both rotations, 2 is wrong, 3 is right by its text
    "mmbench_en_dev_static": {"gpt_eval_score": 100 * 2 / 3},
    "scienceqa_img": {"exact_match": 1 / 2},
    "vqav2_val": {"exact_match": (TWO + THREE + FOUR + 0) / 4},
    "textvqa_val": {"exact_match": (TWO + THREE + FOUR + 0) / 4},
    "gqa": {"exact_match": 2 / 4},
    "msvd_qa": {"exact_match": 1 / 3, "contains": 2 / 3},
    "msrvtt_qa": {"exact_match": 1, "contains": 1},
    "activitynet_qa": {"exact_match": 0, "contains": 0},
}


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    model = Scripted(ANSWERS)
    found = scored(model, load_tasks([*RELEASES], data), output=tmp_path_factory.mktemp("output"))
    return model, found


@pytest.mark.parametrize("task", list(RELEASES))
def test_scores(evaluated, task):
    results = evaluated[1][task]
    for metric, expected in SCORES[task].items():
        assert results[f"{metric},none"] == pytest.approx(expected), metric


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("pope", "Is there a cat in the image?\nAnswer the question using a single word or phrase."),
        (
            "mmbench_en_dev_static",
            "A. a dog\nB. a cat\nC. a cow\n\nAnswer with the option's letter from the given choices directly.",
        ),
        ("scienceqa_img", "Which?\nA. left\nB. right\nAnswer with the option's letter from the given choices directly."),
        ("gqa", "What?\nAnswer the question using a single word or phrase."),
        ("activitynet_qa", "Is the athlete wearing trousers? Answer the question using a single word or phrase."),
    ],
)
def test_prompts(evaluated, task, text):
    shown, asked = evaluated[0].asked[task][0]
    assert asked["text"].endswith(text)
    if task == "activitynet_qa":
        assert shown["url"].endswith("v_1QIUV7WYKXg.mkv")
    else:
        assert shown["url"].size == (16, 12)


def test_pictures_of_rotations(evaluated):
    """A rotation of MMBench refers to the picture of its question."""
    shown = [content[0]["url"].getpixel((3, 3)) for content in evaluated[0].asked["mmbench_en_dev_static"]]
    assert shown == [(255, 0, 0), (255, 0, 0), (0, 0, 255), (0, 0, 255)]


def test_anls():
    """1 - edit distance / length where that is at least a half, of the nearest answer (ST-VQA)."""
    assert anls(references=["hello", "hi"], predictions=["helo"])["anls"] == pytest.approx(1 - 1 / 5)
    assert anls(references=["hello"], predictions=["jelly bean"])["anls"] == 0


def test_frames_as_pictures_of_one_prompt(tmp_path):
    """The pocket model takes no videos: the frames of a film are pictures in its prompt, 576 tokens each."""
    pytest.importorskip("av", reason="needs PyAV: pip install 'foveate[video]'")
    from ..test_video import write as film

    rows = [{"id": 1, "video_id": 7, "question": "how many objects are there?", "answer": "two"}]
    write(tmp_path / "msrvtt_qa" / "test_qa.json", rows)
    (tmp_path / "msrvtt_qa" / "TestVideo").mkdir()
    file = film(tmp_path / "msrvtt_qa" / "TestVideo" / "video7.mp4", count=9)
    (task,) = load_tasks(["msrvtt_qa"], tmp_path).values()
    assert task.test_docs()[0]["video"] == str(file)
    loaded = load()
    (row,) = TaskRun(loaded, frames=3).answers(get("spatial", budget=16), {"msrvtt_qa": task})
    assert (row["tokens"], row["tokens_before"], row["questions"]) == (16, 576, 1)
    words = loaded.processor.tokenizer(task.doc_to_text(task.test_docs()[0]))["input_ids"]
    assert row["flops"] == prefill_flops(loaded.model.config, 3 * 16 + len(words) + 3)  # <s> user: ... assistant:


def test_answers_about_videos():
    assert normalised("The  Two, dogs!") == "2 dogs"
    assert score({"answer": "no"}, ["Nobody knows"]) == {"exact_match": 0.0, "contains": 0.0}
    assert score({"answer": "hot dog"}, ["a hot dog."]) == {"exact_match": 1.0, "contains": 1.0}
    assert score({"answer": "hot dog"}, ["a dog is hot"]) == {"exact_match": 0.0, "contains": 0.0}


def test_a_changed_release_is_read_again(tmp_path, data):
    root = tmp_path / "data"
    write(root / "gqa" / "images" / "n1.jpg", color("red"))
    for answer in ("table", "chair"):
        write(
            root / "gqa" / "testdev_balanced_questions.json", {"1": {"imageId": "n1", "question": "What is it?", "answer": answer}}
        )
        (task,) = load_tasks(["gqa"], root).values()
        assert task.test_docs()[0]["answer"] == answer


@pytest.mark.parametrize("task", list(RELEASES))
def test_missing_files(tmp_path, data, task):
    folder = RELEASES[task].folder
    with pytest.raises(InputError, match="there is no folder"):
        prepare(task, tmp_path)
    (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=r"there is no file|hold no question|one was expected"):
        prepare(task, tmp_path)


def test_damaged_files(tmp_path):
    write(tmp_path / "gqa" / "testdev_balanced_questions.json", "{")
    with pytest.raises(InputError, match="is no JSON"):
        prepare("gqa", tmp_path)
    write(tmp_path / "gqa" / "testdev_balanced_questions.json", {"1": {"question": "What?"}})
    with pytest.raises(InputError, match="'imageId'"):
        prepare("gqa", tmp_path)
    write(
        tmp_path / "mmbench" / "dev.tsv",
        "index\tquestion\timage\tanswer\n1\tWhat?\tno picture at all, but long enough to be one " + "x" * 80 + "\tA\n",
    )
    with pytest.raises(InputError, match="picture of question 1"):
        prepare("mmbench_en_dev_static", tmp_path)
