"""Answers for data that have none: those of the model itself, with all visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..jsonl import append, parsed, whole_lines
from ..loading import Loaded
from .batches import Collator, Samples
from .conversations import Conversation
from .settings import number, processes, wait_for_all

BATCH = 8
LONGEST = 64  # new tokens


def with_answers(rows: Sequence[Conversation], loaded: Loaded, path: Path, tell: Callable[[str], None]) -> list[Conversation]:
    """The conversations, those that end with a question with the model's answer.

    Parameters
    ----------
    rows : of one run.
    loaded : the model, with nothing attached.
    path : file of the answers so far, JSON lines, one for each process; a run that goes on does not ask again.
    tell : prints a line.
    """
    asked = [index for index, row in enumerate(rows) if not row.answered]
    if not asked:
        return list(rows)
    path = path.with_suffix(f".{number()}.jsonl")
    said = _answers(path)
    left = [index for index in asked[number() :: processes()] if index not in said]
    if left:
        tell(f"the model answers {len(left)} questions with all visual tokens, for its answers are to be taught")
    collator, samples = Collator(loaded), Samples(rows)
    with path.open("ab") as file:
        for start in range(0, len(left), BATCH):
            part = left[start : start + BATCH]
            inputs = {name: value.to(loaded.model.device) for name, value in collator.prompts([samples[i] for i in part]).items()}
            ids = loaded.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            texts = [text.strip() or "?" for text in loaded.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
            append(file, [{"row": index, "answer": text} for index, text in zip(part, texts, strict=True)])
    wait_for_all()
    for each in path.parent.glob(f"{path.name.partition('.')[0]}.*.jsonl"):
        said |= _answers(each)
    return [row if row.answered else row.with_answer(said[index]) for index, row in enumerate(rows)]


def _answers(path: Path) -> dict[int, str]:
    return {int(entry["row"]): str(entry["answer"]) for entry in (parsed(line) for _, _, line in whole_lines(path))}
