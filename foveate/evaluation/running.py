"""Methods and baselines on tasks of lmms-eval: what ``foveate eval`` runs, one row for each method and task."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InputError, MissingExtraError, UnsupportedModelError
from ..loading import Loaded
from ..methods.base import KeepAll, Method
from ..methods.baselines import BASELINES, BESIDE
from ..methods.registry import get
from . import TASKS
from .answers import CostedAnswer
from .local import RELEASES, prepare

with redirect_stdout(sys.stderr):  # from its import on, lmms-eval logs to what is stdout then
    try:
        import torch
        from accelerate import PartialState
        from lmms_eval.api.task import ConfigurableMessagesTask
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
        from lmms_eval.utils import load_yaml_config
    except ImportError as error:
        raise MissingExtraError(f"lmms-eval, or {error.name} that it needs,", "eval") from error

from .model import FoveateModel, shown

MAIN = {  # metric that stands for a task, where it is not the first one
    "pope": "pope_f1_score",
    "pocket_pope": "pope_f1_score",
    "mmbench_en_dev_static": "gpt_eval_score",  # whose letters lmms-eval reads without a judge there
}
MEANS = frozenset(("exact_match", "contains"))  # over questions, so that a standard error is that of a mean
PERCENT = MEANS | {"pope_f1_score", "pope_accuracy"}  # lmms-eval gives them as shares
Tell = Callable[[str], None]


@dataclass(frozen=True)
class TaskRun:
    """How tasks are run.

    Parameters
    ----------
    loaded : the model.
    batch_size : questions per batch.
    limit : questions of each task; None = all.
    frames : of a video.
    cache : folder of answers; None = none.
    output : folder for what tasks of lmms-eval write, such as submissions.
    """

    loaded: Loaded
    batch_size: int = 1
    limit: int | None = None
    frames: int = 8
    cache: Path | None = None
    output: Path | None = None

    def answers(self, method: Method, tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows of one method, one for each task; in several processes all get the same, but for scores, which the first one has.

        Raises
        ------
        UnsupportedModelError : the method does not work on the model.
        """
        model = FoveateModel(loaded=self.loaded, method=method, batch_size=self.batch_size, frames=self.frames, cache=self.cache)
        try:
            results = scored(model, tasks, limit=self.limit, batch_size=self.batch_size, output=self.output)
        finally:
            model.close()
        every = _merged(model.answers)
        return [row(name, method, every[name], results.get(name, {})) for name in tasks]


def scored(
    model: Any, tasks: Mapping[str, Any], *, limit: int | None = None, batch_size: int = 1, output: Path | None = None
) -> dict[str, Any]:
    """Run the evaluator of lmms-eval: by task, what it found; in several processes, nothing but in the first one."""
    arguments = SimpleNamespace(output_path=None if output is None else str(output), process_with_media=False)
    with redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=model,
            tasks=[*tasks.values()],
            task_manager=_index(False),  # of which nothing is needed; without, it would look for all tasks
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            cli_args=arguments,
        )
    return {} if found is None else dict(found["results"])


def _merged(mine: dict[str, dict[int, CostedAnswer]]) -> dict[str, dict[int, CostedAnswer]]:
    """Answers of all processes, by task and document."""
    parts = [mine]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, mine)
    found: dict[str, dict[int, CostedAnswer]] = {}
    for part in parts:
        for task, answers in part.items():
            found.setdefault(task, {}).update(answers)
    return found


def row(task: str, method: Method, answers: Mapping[int, CostedAnswer], results: Mapping[str, Any]) -> dict[str, Any]:
    """One line: scores and costs of a method on a task.

    Parameters
    ----------
    answers : by document.
    results : what lmms-eval found for the task; empty but in the first process.
    """
    scores = {key.partition(",")[0]: value for key, value in results.items() if "," in key and isinstance(value, int | float)}
    plain = {name: float(value) for name, value in scores.items() if "_stderr" not in name and math.isfinite(value)}
    main = MAIN.get(task) if MAIN.get(task) in plain else next(iter(plain), None)
    factor = 100 if main in PERCENT else 1
    error = scores.get(f"{main}_stderr_clt") if main in MEANS else None
    each = answers.values()
    items, number = max(1, sum(answer.items for answer in each)), max(1, len(answers))
    return {
        "task": task,
        "method": method.name,
        "budget": None if isinstance(method, KeepAll) else method.budget,
        "metric": main,
        "score": None if main is None else factor * plain[main],
        "stderr": None if error is None or not math.isfinite(error) else factor * error,
        "scores": plain,
        "questions": len(answers),
        "tokens": math.fsum(answer.tokens for answer in each) / items,
        "tokens_before": sum(answer.before for answer in each) / items,
        "flops": sum(answer.flops for answer in each) / number,
        "seconds": math.fsum(answer.seconds for answer in each) / number,
        "settings": method.settings(),
    }


@functools.lru_cache(maxsize=2)
def _index(everything: bool) -> TaskManager:
    """All tasks that lmms-eval can find, which takes seconds, or ours."""
    return TaskManager(model_name="foveate", include_path=str(TASKS), include_defaults=everything)


def load_tasks(names: Sequence[str], data: Path | None = None) -> dict[str, Any]:
    """Tasks by name; a group, such as "pocket", becomes its tasks.

    Parameters
    ----------
    names : tasks and groups of lmms-eval, and ours.
    data : folder of released files, which the tasks of ``local.RELEASES`` read then instead of the Hub.

    Raises
    ------
    InputError : there is no such task, or its data cannot be had.
    """
    known = set(_index(False).all_tasks)
    manager = _index(not known >= set(names))
    found: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"lmms-eval has no task {name!r}, and foveate neither. 'foveate eval --list' shows those of foveate.")
        try:
            if name in RELEASES and (data is not None or name in known):
                found[name] = _local(manager, name, data)
            else:
                with redirect_stdout(sys.stderr):
                    found |= _flat(manager.load_task_or_group([name], task_type="chat"))
        except InputError:
            raise
        except Exception as error:  # what the Hub, the cache of data sets and the code of a task lead to
            raise InputError(f"the task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return found


def _local(manager: TaskManager, name: str, data: Path | None) -> Any:
    """A task on released files."""
    if data is None:
        raise InputError(f"{name} is not on the Hub. Give the folder with its files by --data; 'foveate eval --list' shows them.")
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    with PartialState().main_process_first() if parallel else nullcontext():
        options = prepare(name, data)
    config = {**load_yaml_config(manager.task_index[name]["yaml_path"], mode="full"), **options}
    return ConfigurableMessagesTask(config=config, model_name="foveate")


def _flat(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, task in loaded.items():
        found |= _flat(task) if isinstance(task, Mapping) else {str(name): task}
    return found


def evaluate(
    run: TaskRun, tasks: Mapping[str, Any], methods: Sequence[Method], *, baselines: bool = True, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """All methods on all tasks, all visual tokens first, and baselines at the cost of each; a JSON-able report.

    Parameters
    ----------
    run : how.
    tasks : as ``load_tasks`` returned them.
    methods : to compare.
    baselines : whether ``BESIDE`` run beside each method, at the tokens that its decoder layers run on average.
    tell : is told what comes next.
    """
    rows, missing = [], []

    def add(method: Method, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        tell(f"{shown(method)} on {', '.join(mine)}")
        try:
            found = run.answers(method, mine)
        except UnsupportedModelError as error:
            missing.append({"method": shown(method), "tasks": [*mine], "reason": str(error)})
            return []
        rows.extend(found)
        return found

    add(KeepAll(), tasks)
    asked: dict[tuple[str, float | None], dict[str, Any]] = {}
    for method in methods:
        lines = add(method, tasks)
        for line in lines if baselines and method.name not in BASELINES else ():
            budget = level(line, method)
            for name in BESIDE if budget is not None else ():
                asked.setdefault((name, budget), {})[line["task"]] = tasks[line["task"]]
    for (name, budget), mine in asked.items():
        add(get(name, budget=budget), mine)
    order = [*tasks]
    rows.sort(key=lambda line: order.index(line["task"]))  # stable: methods, then baselines
    return {
        "model": run.loaded.name,
        "weights": run.loaded.weights,
        "batch_size": run.batch_size,
        "limit": run.limit,
        "frames": run.frames,
        "rows": rows,
        "missing": missing,
    }


def level(line: Mapping[str, Any], method: Method) -> float | None:
    """The budget at which baselines cost as much as a row: a count, or a share where the method's budget is one; None = all."""
    if line["tokens_before"] == 0 or line["tokens"] > 0.995 * line["tokens_before"]:
        return None
    if isinstance(method.budget, float):
        return float(round(line["tokens"] / line["tokens_before"], 4))
    return max(1, round(line["tokens"]))
