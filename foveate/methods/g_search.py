"""G-Search: "Accelerating Multimodal LLMs by Searching Optimal Vision Token Reduction", Zhao et al., CVPR 2025 (arXiv 2412.00556).

The least keep rates per decoder layer that do not cost accuracy, found offline on a calibration set. No code was released. The
search itself is in ``foveate.tuning.search``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..jsonl import parsed
from ..places import user_path
from .tools.schedule import FILLED, PAPER, Schedule


@dataclass(kw_only=True)
class GSearch(Schedule, name="g-search", paper=PAPER, adaptive=False, reconstruction=FILLED):
    """Keep rates per decoder layer from a search on your model and data (``foveate search``), saved as a small JSON plan.

    Without a plan, ``budget`` is the rate of all layers from ``first`` on.

    Parameters
    ----------
    plan : the file that ``foveate search`` wrote.
    rates : the keep rates themselves, one for each decoder layer, not increasing.
    """

    searched, found_by_search = "rates", "plan"
    instead_of_budget = ("plan", "rates")

    plan: str | None = None
    rates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and self.rates is None:
            self.rates = read_plan(self.plan)
        if self.rates is None and self.budget is None:
            raise InputError(f"{self.name} needs a plan: run 'foveate search' and give plan=, or budget= for one rate.")
        super().__post_init__()
        if self.rates is None:
            return
        falling = all(a >= b for a, b in itertools.pairwise(self.rates))
        if not self.rates or not falling or not all(0 <= rate <= 1 for rate in self.rates) or self.rates[0] < 1:
            raise InputError(
                f"{self.name}: rates={self.rates}; expected one rate in [0, 1] for each decoder layer, beginning with 1 and "
                "not increasing"
            )
        if self.budget is not None:
            raise InputError(f"{self.name}: a plan and budget={self.budget}; give one of them")

    def needs_budget(self) -> bool:
        return self.rates is None

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.first,) if self.rates is None else super().cuts(layers)

    def keep_rates(self, layers: int, tokens: int | None) -> tuple[float, ...]:
        if self.rates is None:
            return tuple(1.0 if layer < self.first else self.share(tokens) for layer in range(layers))
        if len(self.rates) != layers:
            raise InputError(
                f"{self.name}: the plan has {len(self.rates)} rates and this decoder {layers} layers; search on this model"
            )
        return self.rates


def read_plan(path: str | Path) -> tuple[float, ...]:
    """The keep rates in a file that ``foveate search`` wrote.

    Raises
    ------
    InputError : there is no such file, or it is no plan.
    """
    place = user_path(path)
    try:
        rates = parsed(place.read_text())["rates"]
        if not isinstance(rates, list) or not all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates):
            raise TypeError("rates is no list of numbers")
        return tuple(float(rate) for rate in rates)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is no plan of 'foveate search': {type(error).__name__}: {error}") from error
