"""Two ways to put the questions of a test set to a model.

``Evaluator`` answers all questions about a picture in one forward, with the tokens that a method leaves of it: fast, for the pocket
model and methods that never see the question. ``Asker`` gives every question a prompt of its own and calls ``generate``: for any
method, and any model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..chat import Prompt, question_about
from ..engine.model.anatomy import innermost
from ..errors import InputError
from ..loading import Loaded
from ..methods.base import FrontReducer, KeepAll, Method
from ..pictures import Pictures
from ..pocket.answers import text_states
from ..pocket.batches import LANGUAGE, normalise, text_rows
from ..pocket.native.clips import RATE, Clip
from ..pocket.rows import IGNORE
from ..pocket.scenes import Scene
from ..pocket.worlds import world_of
from ..video import Video
from .prompts import Prompts
from .scoring import begins
from .testset import Shown, TestSet

LONGEST = 5  # tokens of an answer of the pocket model, its end included
WORDS = 32  # tokens of an answer of another model


@dataclass
class Result:
    """How one method did.

    Attributes
    ----------
    right : [questions] bool, or shares from 0 to 1.
    tokens : [scenes] visual tokens that enter the decoder.
    layers : visual tokens of a picture in each decoder layer, the mean over questions.
    """

    right: NDArray[Any]
    tokens: list[int] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)


class Evaluator:
    """Encodes the pictures of a test set once, and answers all questions for any method that acts before the decoder.

    Parameters
    ----------
    model : a pocket model.
    data : the test set.
    chunk : scenes at a time.
    """

    def __init__(self, model: Any, data: TestSet[Scene], chunk: int = 12) -> None:
        self.model: Any = innermost(model)
        self.data, self.chunk = data, chunk
        self.depth = int(model.config.get_text_config().num_hidden_layers)
        self.pictures: list[Pictures] = []
        self.text: list[dict[str, Tensor]] = []
        for part in data.chunks(chunk):
            pixels = normalise([scene.image for scene in data.scenes[part]]).to(model.device, model.dtype)
            self.pictures.append(Pictures(model, pixel_values=pixels))
            rows = LANGUAGE.collated([text_rows(asked) for asked in data.questions[part]])
            self.text.append({name: value.to(model.device) for name, value in rows.items()})

    @torch.no_grad()
    def run(self, method: FrontReducer | None, *, wrong_picture: bool = False) -> Result:
        """Answer everything with the tokens a method leaves; None = all of them.

        With ``wrong_picture`` each question is asked about another picture of the chunk: what remains is what can be guessed.

        Raises
        ------
        InputError : the method reads the question, and all questions of a picture share one reduction here.
        """
        if method is not None and method.reads_question:
            raise InputError(f"{method.name} reads the question, and here all questions of a picture share its tokens. Use Asker.")
        right, tokens = [], []
        for pictures, text in zip(self.pictures, self.text, strict=True):
            embeds = pictures.reduce(method or KeepAll()).embeds
            if wrong_picture:
                embeds = embeds[1:] + embeds[:1]
            tokens += [len(visual) for visual in embeds]
            right += self.answers(embeds, text)
        return Result(np.array(right, bool), tokens, [float(np.mean(tokens))] * self.depth)

    def answers(self, embeds: list[Tensor], text: dict[str, Tensor]) -> list[bool]:
        """Per question of a chunk whether every token of the answer, its end included, is the most likely one."""
        visual = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        counts = torch.tensor([len(each) for each in embeds], device=visual.device)
        real = torch.arange(visual.shape[1], device=visual.device) < counts[:, None]
        hidden = text_states(self.model, visual, real, text)[-1]
        labels, block = text["labels"], text["block"]
        asked = labels != IGNORE
        wrong = torch.zeros_like(asked)
        wrong[asked] = self.model.lm_head(hidden[asked]).argmax(-1) != labels[asked]
        return [
            not bool(wrong[row][block[row] == question].any())
            for row in range(len(block))
            for question in range(int(block[row].max()) + 1)
        ]


class Asker:
    """Every question of a test set as a prompt of its own. Pictures are encoded once, as far as memory for them is set aside.

    Parameters
    ----------
    loaded : any supported model.
    data : the test set.
    chunk : questions at a time.
    """

    def __init__(self, loaded: Loaded, data: TestSet[Any], chunk: int = 16) -> None:
        self.loaded, self.asked = loaded, data.asked
        self.shown = [as_shown(scene) for scene in data.scenes]
        self.exact = world_of(loaded.processor) is not None
        clips = [isinstance(self.shown[number], Video) for number, _ in self.asked]
        shapes = [(not clip, clip) for clip in clips]
        self.prompts = Prompts(loaded, shapes, self.prompt, chunk, LONGEST if self.exact else WORDS)

    def prompt(self, index: int) -> Prompt:
        """The question of that index."""
        number, question = self.asked[index]
        return question_about(self.loaded.processor, self.loaded.model, self.shown[number], question.text)

    def run(self, method: Method) -> Result:
        """Answer everything with a method attached.

        Raises
        ------
        InputError, UnsupportedModelError : the method cannot do that.
        """
        right: list[bool] = []
        layers = np.zeros(int(self.loaded.model.config.get_text_config().num_hidden_layers))
        for part in self.prompts.answers(method):
            right += [self.judged(text, self.asked[i][1].answer) for i, text in zip(part.numbers, part.texts, strict=True)]
            layers += part.layers
        return Result(np.array(right, bool), [], (layers / len(self.asked)).tolist())

    def judged(self, text: str, answer: str) -> bool:
        """Whether an answer is right: word by word of the pocket model, by its beginning of others."""
        return text == answer if self.exact else begins(text, answer)


def as_shown(scene: Shown) -> Image.Image | Video:
    """A scene as a question can be about it."""
    if isinstance(scene, Clip):
        frames = tuple(Image.fromarray(frame) for frame in scene.frames)
        times = tuple(number / RATE for number in range(len(frames)))
        return Video(frames, times, RATE, len(frames) / RATE, ())
    return Image.fromarray(scene.image)
