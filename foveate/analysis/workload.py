"""What a generation runs: numbers that somebody asks for, or those of a run that was reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, shown
from .architecture import Architecture
from .operators import Precision

if TYPE_CHECKING:
    from .own import Own

MOST = 10**9  # tokens, or patches of a picture
PICTURES = 10**6  # of a batch, each of which is counted
Convention = Literal["foveate", "llm-viewer"]


@dataclass(frozen=True)
class Run:
    """Tokens and pictures.

    Attributes
    ----------
    visual : visual tokens of a prompt in each decoder layer; means where the prompts of a batch differ.
    batch : prompts.
    pictures : pictures, tiles or frames of the whole batch, by the patches that enter the vision encoder.
    encoder : patches of a picture that each of the first encoder layers leaves, where they become fewer inside.
    question : tokens of a prompt that the decoder reads alone before it reads the prompt, for methods that ask for that.
    """

    visual: tuple[float, ...]
    batch: int
    pictures: tuple[int, ...]
    encoder: tuple[int, ...] = ()
    question: float = 0


@dataclass(frozen=True)
class Workload:
    """A run, the text and the new tokens of each prompt, how all of it is computed, and what the method itself does."""

    run: Run
    text: int
    new_tokens: int
    precision: Precision
    fused: bool
    convention: Convention
    own: Own | None = None

    @property
    def tokens(self) -> list[float]:
        """Of a prompt, in each decoder layer."""
        return [self.text + visual for visual in self.run.visual]

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self.run),
            "text": self.text,
            "new_tokens": self.new_tokens,
            "precision_bits": vars(self.precision),
            "flash": self.fused,
            "convention": self.convention,
            "method": None if self.own is None else vars(self.own),
        }


def whole_number(name: str, value: Any, least: int, most: int = MOST) -> int:
    """The value, if it is a whole number that is large enough, and not too large to count with.

    Raises
    ------
    InputError : it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={shown(value)}; expected a whole number of {least} or more")
    if value > most:
        raise InputError(f"{name}={shown(value)}; expected a whole number from {least} to {most:,}")
    return value


def asked_for(
    shape: Architecture,
    visual: int | Sequence[float] | None,
    batch: int | None,
    pictures: int | None,
    patches: int | None,
    question: int | None = None,
) -> Run:
    """A run by its numbers; see ``foveate.cost``.

    Raises
    ------
    InputError : one is out of range, or one that is needed is missing.
    """
    batch = 1 if batch is None else whole_number("batch", batch, 1, PICTURES)
    question = 0 if question is None else whole_number("question", question, 0)
    layers = shape.decoder.stack.layers
    nothing = visual == 0 or shape.tower is None
    pictures = (0 if nothing else 1) if pictures is None else whole_number("pictures", pictures, 0, PICTURES // batch)
    size = 0
    if pictures:
        if shape.tower is None:
            raise InputError(f"{shape.name} has no vision encoder for pictures={pictures}. Leave pictures out.")
        size = _patches(shape, patches)
    if visual is None:
        visual = pictures * (_merged(shape, size) if patches or shape.picture_tokens is None else shape.picture_tokens)
    if isinstance(visual, int) or not isinstance(visual, Sequence):
        return Run((whole_number("visual", visual, 0),) * layers, batch, (size,) * pictures * batch, (), question)
    if len(visual) != layers:
        raise InputError(f"visual has {len(visual)} numbers; {shape.name} has {layers} decoder layers. Give one for each.")
    for count in visual:
        if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count <= MOST:
            raise InputError(f"visual holds {shown(count)}; expected numbers of tokens from 0 to {MOST:,}")
    return Run(tuple(visual), batch, (size,) * pictures * batch, (), question)


def _merged(shape: Architecture, patches: int) -> int:
    """Visual tokens that a picture becomes."""
    return patches // (shape.projectors[0].merge if shape.projectors else 1)


def _patches(shape: Architecture, patches: int | None) -> int:
    """Of a picture."""
    fixed = shape.tower.patches if shape.tower else None
    if patches is not None:
        return whole_number("patches", patches, 1)
    if fixed is None:
        merge = shape.projectors[0].merge
        raise InputError(
            f"the vision encoder of {shape.name} takes pictures of any size. Give patches=, the patches of a picture: "
            f"{merge} for each visual token before any reduction."
        )
    return fixed


def reported(shape: Architecture, report: Any, batch: int | None, pictures: int | None, patches: int | None) -> Run:
    """The run that a report is about.

    Parameters
    ----------
    shape : of the model that ran.
    report : ``session.report``, or what its ``to_dict`` returns.
    batch : prompts, where some without pictures come last: the report does not know of them.
    pictures : of a prompt, where the encoder sees a picture in tiles that the report does not tell apart (LLaVA-OneVision).
    patches : of each picture, where it is not what the model's full size makes (``resize``).

    Raises
    ------
    InputError : it is no report, one of another model, or one without pictures; or ``pictures`` is needed.
    """
    document = report.to_dict() if hasattr(report, "to_dict") else report
    try:
        counts = [int(count) for count in document["layers"]]
        images = [(int(image["row"]), math.prod(image["grid"])) for image in document["images"]]
        encoder = [max(map(int, layer)) for layer in document["encoder_layers"]]
        question = int(document.get("question_tokens", 0))  # reports of earlier versions have none
    except (KeyError, TypeError, ValueError) as error:
        kind = "a JSON object" if isinstance(report, Mapping) else type(report).__name__
        raise InputError(
            f"{kind} is no report of a session ({type(error).__name__}: {error}). Give session.report or its JSON."
        ) from error
    if not images:
        raise InputError("the report is about a call without pictures. Price it by its numbers, with visual=0.")
    depth, tower = shape.decoder.stack.layers, shape.tower
    if tower is None or len(counts) != depth or len(encoder) > tower.stack.layers:
        raise InputError(
            f"the report is about a model with {len(counts)} decoder layers; {shape.name} has {depth}. Give the model that ran."
        )
    seen = 1 + max(row for row, _ in images)
    batch = seen if batch is None else whole_number("batch", batch, seen, PICTURES)
    if tower.patches is None:
        sizes = [patches or cells * shape.projectors[0].merge for _, cells in images]
    else:
        largest = max(cells for _, cells in images)
        if largest > tower.patches and pictures is None:
            raise InputError(
                f"a picture of the report has {largest} visual tokens, and the encoder makes {tower.patches} at a time. "
                "Give pictures=, the number of tiles of a prompt."
            )
        number = len(images) if pictures is None else batch * whole_number("pictures", pictures, 1, PICTURES // batch)
        sizes = [patches or tower.patches] * number
    return Run(tuple(count / batch for count in counts), batch, tuple(sizes), tuple(encoder), question / batch)


def unreduced(document: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the same run with all of its visual tokens, as far as ``reported`` reads it."""
    whole = document.get("items") or document["images"]  # items count tokens that are in no grid, too
    tokens = sum(int(each["before"]) for each in whole)
    return {**document, "layers": [tokens] * len(document["layers"]), "encoder_layers": [], "question_tokens": 0}
