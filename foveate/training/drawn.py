"""Training data of the pocket world: conversations about scenes that are drawn when they are needed."""

from __future__ import annotations

from random import Random

from PIL import Image
from torch.utils.data import Dataset

from ..pocket.native import questions as native
from ..pocket.native.pictures import Picture, draw_picture, draw_size
from ..pocket.questions import PocketQuestion, ask
from ..pocket.scenes import Scene, draw_scene
from ..pocket.worlds import World
from .batches import Sample
from .conversations import Message

KEPT = 5000  # scenes that are held, 0.1 MB each; others are drawn anew
LARGEST = 300  # visual tokens of pictures of the second world


class DrawnSamples(Dataset[Sample]):
    """Sample ``index`` is a function of (split, seed, index); test scenes are of another split and other random streams.

    Parameters
    ----------
    number : of samples.
    turns : questions about a scene, at most: those of one conversation, or each a sample of its own where ``single``.
    split : "train" or "validation".
    scenes : after how many the first one comes again, with other questions; None = never.
    world : "native" draws the pictures of the second pocket model.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        turns: int,
        split: str = "train",
        *,
        single: bool = False,
        scenes: int | None = None,
        world: World = "pocket",
    ) -> None:
        self.number, self.seed, self.turns, self.split, self.single = number, seed, turns, split, single
        self.world = world
        visited = -(-number // turns) if single else number
        self.scenes = min(scenes or visited, visited)
        self._comes_again = self.scenes < visited
        self._drawn: dict[int, Scene | Picture] = {}  # those that come again, at most KEPT
        self._last: tuple[int, Image.Image, list[PocketQuestion]] | None = None

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Sample:
        scene = index // self.turns if self.single else index
        image, questions = self._scene(scene)
        asked = [questions[index % self.turns % len(questions)]] if self.single else questions
        messages: list[Message] = []
        for number, question in enumerate(asked):
            shown = [] if number else [{"type": "image"}]
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        return Sample(tuple(messages), (image,), f"drawn scene {scene}")

    def _scene(self, number: int) -> tuple[Image.Image, list[PocketQuestion]]:
        if self._last is None or self._last[0] != number:
            visit, which = divmod(number, self.scenes)
            if visit:
                first = self._drawn.get(which) or self._draw(which)[0]
                questions = self._asked(first, Random(f"finetune/{self.split}/{self.seed}/{which}/{visit}"))
                questions = questions or self._draw(which)[1]
            else:
                first, questions = self._draw(which)
            if self._comes_again and which < KEPT:
                self._drawn[which] = first
            self._last = number, Image.fromarray(first.image), questions
        return self._last[1:]

    def _draw(self, number: int) -> tuple[Scene | Picture, list[PocketQuestion]]:
        random = Random(f"finetune/{self.split}/{self.seed}/{number}")
        while True:
            scene: Scene | Picture
            if self.world == "native":
                scene = draw_picture(random, draw_size(random, most=LARGEST), split=self.split)
            else:
                scene = draw_scene(random, split=self.split)
            questions = self._asked(scene, random)
            if questions:
                return scene, questions

    def _asked(self, scene: Scene | Picture, random: Random) -> list[PocketQuestion]:
        return ask(scene, random, self.turns) if isinstance(scene, Scene) else native.ask(scene, random, self.turns)
