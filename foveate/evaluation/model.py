"""Our model for lmms-eval: any supported model on stock classes, with a method attached."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..analysis.flops import prefill_flops
from ..api import attach
from ..chat import Prompt, collate, generation
from ..engine.session import Session
from ..errors import InputError
from ..fingerprint import digest
from ..lab.store import Store, key_of
from ..loading import POCKET, Loaded, load, own_device
from ..methods.base import KeepAll, Method
from ..methods.registry import get
from .answers import CostedAnswer
from .prompts import MessageReader, spent

FULL = KeepAll.name
ANSWERS = "answers.jsonl"  # in the folder of answers


@dataclass(frozen=True)
class _Asked:
    """A request of lmms-eval, read."""

    prompt: Prompt
    options: dict[str, Any]
    until: list[str]
    key: str

    @property
    def batch(self) -> str:
        """Requests of one batch have the same."""
        return f"{self.prompt.shape} {sorted(self.options.items())} {self.until}"


class FoveateModel(lmms):
    """``--model foveate``.

    Parameters
    ----------
    pretrained : Hub id or folder; "pocket" is the shipped model.
    method : as listed by ``foveate methods``, ``name:preset`` for a preset; "full" keeps all visual tokens.
    budget : visual tokens kept per image, a count or a share; None = the method's own rule.
    frames : of a video.
    cache : folder of answers; an interrupted run goes on from there. None = none.
    batch_size : questions per batch; the scores do not depend on it.
    device, dtype, attention : as for ``loading.load``.
    loaded : a model that is in memory, instead of ``pretrained``.
    **fields : hyper-parameters of the method.

    Attributes
    ----------
    answers : by task and document, as far as this process has given them.
    session : the attached method.

    Raises
    ------
    InputError : the model cannot be loaded, or the method or one of its fields is unknown.
    UnsupportedModelError : the method does not work on the model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = POCKET,
        method: str | Method = FULL,
        budget: float | None = None,
        frames: int = 8,
        cache: str | Path | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        max_batch_size: int | None = None,
        loaded: Loaded | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _count(batch_size, "batch_size")
        if max_batch_size is not None:
            raise InputError("max_batch_size is for an automatic batch size, which foveate has not. Give batch_size.")
        self.method: Method = _method(method, budget, fields)
        self.frames = _count(frames, "frames")
        self.loaded = loaded or load(pretrained, dtype=dtype, device=own_device(device), attention=attention)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.session: Session = attach(self.loaded.model, self.method)
        self.reader = MessageReader(self.loaded, self.frames)
        self.store = Store(None if cache is None else Path(cache) / ANSWERS, self.setting(), self._rank)
        self.answers: dict[str, dict[int, CostedAnswer]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.loaded.model.device
        return device

    def setting(self) -> dict[str, Any]:
        """Everything that answers depend on, but for the question."""
        from importlib.metadata import version

        from .. import __version__

        model = self.loaded.model
        return {
            "foveate": __version__,
            "transformers": version("transformers"),
            "torch": torch.__version__,
            "weights": self.loaded.weights,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "attention": model.config._attn_implementation,
            "method": key_of(self.method),
            "frames": self.frames,
        }

    def close(self) -> None:
        """Detach the method; the model is as it was."""
        self.session.detach()

    # -- what lmms-eval calls

    def clean(self) -> None:
        """Nothing goes: the model may answer for other methods."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, in batches, as far as the store does not hold them.

        Raises
        ------
        InputError : a request cannot be made a prompt.
        """
        keys = []
        waiting: dict[str, dict[str, _Asked]] = {}
        bar = tqdm(total=len(requests), desc=self.shown, disable=None if self._rank == 0 else True)
        for request in requests:
            asked = self._read(request)
            keys.append(asked.key)
            if self.store.get(asked.key) is None:
                group = waiting.setdefault(asked.batch, {})
                group[asked.key] = asked
                if len(group) == self.batch_size:
                    self._keep(self._answer(waiting.pop(asked.batch)))
            bar.update()
        for group in waiting.values():
            self._keep(self._answer(group))
        bar.close()
        found = [CostedAnswer(**answer) for answer in map(self.store.get, keys) if answer is not None]
        for request, answer in zip(requests, found, strict=True):
            self.answers.setdefault(request.task_name, {})[int(request.doc_id)] = answer
        self._log(found)
        return [GenerationResult(answer.text, TokenCounts(answer.prompt, answer.written)) for answer in found]

    def _keep(self, answers: Mapping[str, CostedAnswer]) -> None:
        self.store.put_all({key: asdict(answer) for key, answer in answers.items()})

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise InputError(f"the task {_task(requests)} asks for likelihoods, and foveate generates answers. Choose another task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise InputError(f"the task {_task(requests)} goes over several rounds, and foveate answers one. Choose another task.")

    # -- parts

    @property
    def shown(self) -> str:
        """The method, in a few letters."""
        return shown(self.method)

    def _read(self, request: Instance) -> _Asked:
        _, to_messages, kwargs, document, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][document])).model_dump()["messages"]
        prompt = self.reader.read(messages)
        options, until = generation(kwargs)
        if options["do_sample"]:
            raise InputError(f"the task {task} draws answers at random (temperature {options['temperature']}); give temperature=0")
        return _Asked(prompt, options, until, digest(task, str(document), prompt.contents, repr(sorted(options.items())), *until))

    def _answer(self, group: Mapping[str, _Asked]) -> dict[str, CostedAnswer]:
        """Answer a batch; all of it has the same options."""
        asked, first = [*group.values()], next(iter(group.values()))
        model, processor = self.loaded.model, self.loaded.processor
        inputs = collate(self.loaded, [each.prompt for each in asked])
        self._synchronise()
        begin = time.perf_counter()
        out = model.generate(**inputs, **first.options)
        self._synchronise()
        seconds = (time.perf_counter() - begin) / len(asked)
        # a prompt without pictures is not reported: the report is of another call then
        shown = any(first.prompt.shape)
        length = inputs["input_ids"].shape[1]
        mask = inputs["attention_mask"]
        texts = processor.batch_decode(out[:, length:], skip_special_tokens=True)
        written = _lengths(out[:, length:], model.generation_config)
        layers = model.config.get_text_config().num_hidden_layers
        costs = spent(self.session.report, mask) if shown else [(0, 0, [0] * layers, int(row.sum())) for row in mask]
        found = {}
        for key, each, text, cost, new in zip(group, asked, texts, costs, written, strict=True):
            items, before, visual, words = cost
            flops = prefill_flops(model.config, [count + words for count in visual])
            mean = statistics.fmean(visual)
            found[key] = CostedAnswer(_until(text, each.until), items, before, mean, flops, seconds, visual[0] + words, new)
        return found

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _log(self, answers: Sequence[CostedAnswer]) -> None:
        """Tell lmms-eval what this process has spent, for the summary of a run."""
        if not answers:
            return
        seconds, written = sum(answer.seconds for answer in answers), sum(answer.written for answer in answers)
        items = max(1, sum(answer.items for answer in answers))
        additional = {
            "visual_tokens_per_image": sum(answer.tokens for answer in answers) / items,
            "visual_tokens_per_image_before": sum(answer.before for answer in answers) / items,
            "prefill_gflops": statistics.fmean(answer.flops for answer in answers) / 1e9,
            "num_requests": len(answers),
            "rank": self._rank,
        }
        log_metrics(seconds, written, written / max(seconds, 1e-9), additional)


def shown(method: Method) -> str:
    """A method and its budget, in a few letters."""
    return method.name if isinstance(method, KeepAll) else f"{method.name} {method.budget or 'own rule'}"


def _method(method: str | Method, budget: Any, fields: dict[str, Any]) -> Method:
    """A method from the arguments of a command line."""
    given = {**({} if budget is None else {"budget": budget}), **fields}
    if isinstance(method, str):
        return get(method, **given)
    if given:
        raise InputError(f"unknown argument {next(iter(given))!r}: fields belong to the name of a method, such as method=prumerge+")
    return method


def _count(value: Any, what: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdigit() or int(text) < 1:
        raise InputError(f"{what}={value!r} is no count. Give a whole number from 1 on.")
    return int(text)


def _task(requests: Sequence[Instance]) -> str:
    return repr(requests[0].task_name) if requests else "of the run"


def _until(text: str, ends: Sequence[str]) -> str:
    """The text before the first of some strings."""
    return text[: min((place for place in map(text.find, ends) if place >= 0), default=None)].strip()


def _lengths(tokens: torch.Tensor, config: Any) -> list[int]:
    """Tokens of each answer [B, T], its end included, the padding after it not."""
    ends = config.eos_token_id
    known = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], device=tokens.device)
    ended = torch.isin(tokens, known.to(tokens.dtype))
    return (ended.cumsum(1) - ended.long() == 0).sum(1).tolist()
