"""The settings of a method that ``foveate tune`` tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar


class Tunable:
    """What every method tells a search; a method with thresholds of its own tells these, too."""

    stage: ClassVar[str]

    @classmethod
    def to_tune(cls, shares: Sequence[float], layers: int) -> list[list[dict[str, Any]]]:
        """Fields of the settings to try: lists that each go from many tokens to few.

        Of methods that cut before one decoder layer, early and in the middle.

        Parameters
        ----------
        shares : of the visual tokens, falling.
        layers : of the decoder.
        """
        own: Any = cls
        if cls.stage != "inside the decoder" or "layer" not in {field.name for field in dataclasses.fields(own)}:
            return [[{"budget": share} for share in shares]]
        places = sorted({min(2, layers - 1), layers // 2} - {0})
        return [[{"layer": layer, "budget": share} for share in shares] for layer in places]
