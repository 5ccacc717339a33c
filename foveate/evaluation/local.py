"""The benchmarks in the files that their authors released, as data sets for the tasks of lmms-eval: no download, no Hub.

====================== ======================= =================================================================================
task                   folder                  files
====================== ======================= =================================================================================
pope                   pope                    coco_pope_{adversarial,popular,random}.json, val2014/COCO_val2014_*.jpg
mme                    mme                     one folder for each category, with pictures and .txt files, in one or two folders
mmbench_en_dev_static  mmbench                 one .tsv file of the dev split, pictures inside
scienceqa_img          scienceqa               problems.json, pid_splits.json, images/test/ID/image.png
vqav2_val              vqav2                   v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json,
                                               val2014/COCO_val2014_*.jpg
textvqa_val            textvqa                 TextVQA_0.5.1_val.json, train_images/*.jpg
gqa                    gqa                     testdev_balanced_questions.json, images/*.jpg
msvd_qa                msvd_qa                 test_qa.json, youtube_mapping.txt, YouTubeClips/*.avi
msrvtt_qa              msrvtt_qa               test_qa.json, TestVideo/video*.mp4
activitynet_qa         activitynet_qa          test_q.json, test_a.json, all_test/v_*.mp4 (or .mkv, .webm)
====================== ======================= =================================================================================
"""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..fingerprint import digest
from ..jsonl import parsed

Row = dict[str, Any]
PICTURES = frozenset((".jpg", ".jpeg", ".png"))
FILMS = (".mp4", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class Release:
    """How a benchmark was released.

    Attributes
    ----------
    folder : of its files.
    split : that the task of lmms-eval reads.
    rows : reads the folder.
    options : of the task, that its own data set needs and this one does not.
    """

    folder: str
    split: str
    rows: Callable[[Path], Iterator[Row]]
    options: tuple[tuple[str, Any], ...] = ()


def _file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {path}. 'foveate eval --list' shows which files a task needs, and where.")
    return path


def _json(path: Path) -> Any:
    try:
        return parsed(_file(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}. Use the file that the authors of the benchmark released.") from error


def _lines(path: Path) -> list[Any]:
    """A file of JSON lines."""
    try:
        return [parsed(line) for line in _file(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} holds no JSON lines: {error}. Use the file that the authors released.") from error


def _pope(folder: Path) -> Iterator[Row]:
    for category in ("adversarial", "popular", "random"):
        for row in _lines(folder / f"coco_pope_{category}.json"):
            picture = str(_file(folder / "val2014" / row["image"]))
            known = {"question_id": str(row["question_id"]), "question": row["text"], "answer": row["label"]}
            yield {"image": picture, **known, "category": category}


def _mme(folder: Path) -> Iterator[Row]:
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        pictures = {path.stem: path for path in sorted(category.rglob("*")) if path.suffix.lower() in PICTURES}
        for text in sorted(category.rglob("*.txt")):
            if text.stem not in pictures:
                raise InputError(f"{text} has questions, and there is no picture {text.stem} in {category}")
            for line in filter(str.strip, text.read_text(encoding="utf-8").splitlines()):
                question, _, answer = line.partition("\t")
                known = {"question_id": f"{category.name}/{text.stem}", "category": category.name}
                yield {"image": str(pictures[text.stem]), "question": question, "answer": answer.strip(), **known}


def _mmbench(folder: Path) -> Iterator[Row]:
    files = sorted(folder.glob("*.tsv"))
    if len(files) != 1:
        raise InputError(f"{folder} holds {len(files)} .tsv files; one was expected, of the dev split of MMBench")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # pictures are in it
    with files[0].open(encoding="utf-8", newline="") as opened:
        rows = [*csv.DictReader(opened, delimiter="\t")]
    pictures: dict[int, bytes] = {}
    for row in rows:
        index, shown = int(row["index"]), row["image"]
        try:
            # a short text is the index of the row that holds the picture
            pictures[index] = pictures[int(shown)] if len(shown) < 64 else base64.b64decode(shown, validate=True)
        except (binascii.Error, KeyError, ValueError) as error:
            raise InputError(f"{files[0]}: the picture of question {index} cannot be read") from error
        yield {
            "image": {"bytes": pictures[index], "path": None},
            "index": index,
            "question": row["question"],
            "hint": row.get("hint") or "nan",
            "answer": row["answer"],
            **{letter: row.get(letter) or None for letter in "ABCD"},
            "category": row.get("category") or "",
            "L2-category": row.get("l2-category") or row.get("L2-category") or "",
            "source": row.get("source") or "",
            "split": row.get("split") or "dev",
        }


def _scienceqa(folder: Path) -> Iterator[Row]:
    problems, splits = _json(folder / "problems.json"), _json(folder / "pid_splits.json")
    for number in splits["test"]:
        problem = problems[number]
        if problem.get("image"):
            picture = str(_file(folder / "images" / "test" / str(number) / problem["image"]))
            yield {"image": picture, **{name: problem[name] for name in ("question", "choices", "answer", "hint")}}


def _vqav2(folder: Path) -> Iterator[Row]:
    told = _json(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
    answers = {row["question_id"]: row for row in told}
    for row in _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]:
        picture = str(_file(folder / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg"))
        known = answers[row["question_id"]]
        # numbered, since the soft accuracy of lmms-eval takes equal entries for one
        each = [{"answer": other["answer"], "answer_id": number} for number, other in enumerate(known["answers"], 1)]
        yield {"image": picture, "question_id": row["question_id"], "question": row["question"], "answers": each}


def _textvqa(folder: Path) -> Iterator[Row]:
    for row in _json(folder / "TextVQA_0.5.1_val.json")["data"]:
        picture = str(_file(folder / "train_images" / f"{row['image_id']}.jpg"))
        known = {name: row[name] for name in ("question_id", "question", "answers")}
        yield {"image": picture, **known, "ocr_tokens": row.get("ocr_tokens", [])}


def _gqa(folder: Path) -> Iterator[Row]:
    for number, row in _json(folder / "testdev_balanced_questions.json").items():
        picture = str(_file(folder / "images" / f"{row['imageId']}.jpg"))
        yield {"image": picture, "question_id": number, "question": row["question"], "answer": row["answer"]}


def _msvd(folder: Path) -> Iterator[Row]:
    clips = dict(line.split()[::-1] for line in _file(folder / "youtube_mapping.txt").read_text().splitlines() if line.strip())
    for row in _json(folder / "test_qa.json"):
        name = clips[f"vid{row['video_id']}"]
        yield _video_row(row["id"], row["question"], row["answer"], folder / "YouTubeClips", name)


def _msrvtt(folder: Path) -> Iterator[Row]:
    for row in _json(folder / "test_qa.json"):
        yield _video_row(row["id"], row["question"], row["answer"], folder / "TestVideo", f"video{row['video_id']}")


def _activitynet(folder: Path) -> Iterator[Row]:
    answers = {row["question_id"]: row["answer"] for row in _json(folder / "test_a.json")}
    for row in _json(folder / "test_q.json"):
        number, name = row["question_id"], f"v_{row['video_name']}"
        yield _video_row(number, row["question"], answers[number], folder / "all_test", name)


def _video_row(number: Any, question: str, answer: str, folder: Path, name: str) -> Row:
    found = [path for path in (folder / f"{name}{suffix}" for suffix in FILMS) if path.is_file()]
    if not found:
        raise InputError(f"there is no video {name} in {folder} ({', '.join(FILMS)})")
    return {"question_id": str(number), "question": question, "answer": answer, "video": str(found[0].resolve())}


RELEASES = {
    "pope": Release("pope", "test", _pope),
    "mme": Release("mme", "test", _mme),
    "mmbench_en_dev_static": Release("mmbench", "dev", _mmbench),
    "scienceqa_img": Release("scienceqa", "test", _scienceqa),
    "vqav2_val": Release("vqav2", "validation", _vqav2),
    "textvqa_val": Release("textvqa", "validation", _textvqa),
    "gqa": Release("gqa", "testdev", _gqa, (("process_docs", None),)),  # which loads the pictures from the Hub
    "msvd_qa": Release("msvd_qa", "test", _msvd),
    "msrvtt_qa": Release("msrvtt_qa", "test", _msrvtt),
    "activitynet_qa": Release("activitynet_qa", "test", _activitynet),
}


def prepare(task: str, data: Path) -> dict[str, Any]:
    """Make a data set of released files, once, in ``data/prepared``; pictures and videos stay where they are.

    Parameters
    ----------
    task : one of ``RELEASES``.
    data : the folder with the folders of the benchmarks.

    Returns
    -------
    Options for the task of lmms-eval.

    Raises
    ------
    InputError : a file is missing or is not as it was released.
    """
    from datasets import Dataset, DatasetDict, Image

    release = RELEASES[task]
    folder, made = data / release.folder, data / "prepared" / task
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with the files of {task}. 'foveate eval --list' shows what is expected.")
    known = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    state = digest(str(folder.resolve()), *(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in known.items()))
    mark = made.with_suffix(".made")
    if not (made.is_dir() and mark.is_file() and mark.read_text() == state):
        try:
            rows = [*release.rows(folder)]
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"the files of {task} in {folder} are not as released: {error!r} was not found") from error
        if not rows:
            raise InputError(f"the files of {task} in {folder} hold no question")
        dataset = Dataset.from_list(rows)
        if "image" in rows[0]:
            dataset = dataset.cast_column("image", Image())
        DatasetDict({release.split: dataset}).save_to_disk(made)
        mark.write_text(state)
    return {"dataset_path": str(made), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}, **dict(release.options)}
