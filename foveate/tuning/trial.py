"""One setting of a tuning, and what came of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..measuring.noise import Ratio
from .answers import Answered
from .bounds import LEVEL, Guess, Losses, upper_bound
from .space import Setting


@dataclass
class Trial:
    """One setting, and what is known of it.

    Attributes
    ----------
    setting : what was tried.
    losses : on examples of the search, or none.
    share : of the visual tokens that decoder layers run.
    cost : over that of all tokens, where it was measured.
    confirmed : losses on the other examples.
    answered : what was said on these.
    verdict : what became of it.
    guess : of its loss.
    level : of its test.
    """

    setting: Setting
    losses: Losses | None = None
    share: float = 1.0
    cost: Ratio | None = None
    confirmed: Losses | None = None
    answered: Answered | None = None
    verdict: str = ""
    guess: Guess | None = None
    level: float = LEVEL

    @property
    def saving(self) -> float:
        """Of the cost, or of the tokens where it was not measured."""
        return 1 - (self.share if self.cost is None else self.cost.median)


@dataclass
class Tuned:
    """What a tuning found.

    Attributes
    ----------
    tolerance : in [0, 1].
    trials : all that was tried, those that got farthest first.
    chosen : the accepted setting that saves most; None keeps all tokens.
    reason : why.
    needed : examples with which something would probably be accepted; None where no number would do.
    searched, confirmed : examples of either part.
    full : score with all tokens, on all examples.
    seconds : that it took.
    """

    tolerance: float
    trials: list[Trial]
    chosen: Trial | None
    reason: str
    needed: int | None
    searched: list[int]
    confirmed: list[int]
    full: float
    seconds: float
    impossible: dict[str, str] = field(default_factory=dict)

    @property
    def bound(self) -> float | None:
        """The loss of what was chosen is below this with 95 % confidence."""
        return (
            None if self.chosen is None or self.chosen.confirmed is None else upper_bound(self.chosen.confirmed, self.chosen.level)
        )
