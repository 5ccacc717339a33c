"""The data of a training run: conversations of files, or drawn scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset

from ..loading import POCKET, Loaded
from ..methods.base import Method
from ..methods.trained import Trained
from ..pocket.worlds import World, world_of
from .answers import with_answers
from .batches import Sample, Samples
from .conversations import Conversation, read_conversations
from .drawn import DrawnSamples
from .prepared import prepares
from .settings import TrainSettings, processes

HELD_OUT = 20  # without data for validation, one of so many conversations is held out, and ``checked`` at most
DRAWN = 1000  # steps on drawn scenes, and conversations of which something is prepared, where nothing else is asked for
Rows = tuple[list[Conversation], list[Conversation]]  # to train on, and for validation
Tell = Callable[[str], None]


def read_rows(method: Method, learner: Trained | None, settings: TrainSettings, tell: Tell) -> Rows | None:
    """The conversations to train on, and those for validation; None where scenes are drawn.

    Parameters
    ----------
    method : that is attached.
    learner : the same, where its weights are trained.
    settings, tell : of the run.
    """
    if settings.data == POCKET:
        return None
    answers = learner is None or learner.needs_answers
    images = None if settings.images is None else Path(settings.images)

    def read(file: str) -> list[Conversation]:
        found, broken = read_conversations(Path(file), images, answers=answers, skip_broken=settings.skip_broken)
        for line in broken[:20]:
            tell(f"left out: {line}")
        if broken:
            tell(f"{len(broken)} of {len(found) + len(broken)} entries of {file} were left out")
        return found

    data = read(settings.data)[: settings.limit]
    if settings.eval_data is not None:
        held_out = read(settings.eval_data)
    else:
        held_out = data[::HELD_OUT][: settings.checked] if len(data) >= HELD_OUT else []
        kept = {id(row) for row in held_out}
        data = [row for row in data if id(row) not in kept]
    if _single(method, learner):
        data, held_out = ([turn for row in each for turn in row.single_turns()] for each in (data, held_out))
        tell(f"{method.name} learns from one question at a time: there are {len(data)}")
    return data, held_out[: settings.checked]


def _single(method: Method, learner: Trained | None) -> bool:
    """Whether every question needs a prompt of its own."""
    if learner is not None and learner.single_turns is not None:
        return learner.single_turns
    return method.before_decoder().reads_question


def datasets(
    method: Method,
    learner: Trained | None,
    settings: TrainSettings,
    rows: Rows | None,
    loaded: Loaded,
    out: Path,
    tell: Tell,
) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Samples to train on, and for validation; ``rows`` are what ``read_rows`` gave."""
    if rows is None:
        number = (settings.steps or DRAWN) * settings.batch * settings.accumulate * processes()
        single = _single(method, learner)
        scenes = settings.limit
        prepared = learner is not None and prepares(learner)
        if prepared:
            number, scenes = settings.limit or DRAWN, None
        world: World = world_of(loaded.processor) or "pocket"
        turns = settings.turns if single or prepared else 1
        return (
            DrawnSamples(number, settings.seed, settings.turns, single=single, scenes=scenes, world=world),
            DrawnSamples(settings.checked, 0, turns, "validation", single=single, world=world),
        )
    data, held_out = (
        with_answers(each, loaded, out / f"answers-{name}.jsonl", tell) for name, each in zip("ab", rows, strict=True)
    )
    return Samples(data), Samples(held_out)
