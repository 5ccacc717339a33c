"""The cheapest setting whose answers are not worse than a tolerance: searched on some examples, confirmed on the others.

The search sees a part of the examples, at most half of them. Settings are compared on a few; the better half goes on to twice as
many, and so on. What is left is put in an order, the likeliest to pass first, and tested on the other examples in that order. The
tests share a level of 5 %: one that passes hands its part on to the next (the fallback procedure of Wiens; Learn then Test, arXiv
2110.01052). So the chance that an accepted setting loses the tolerance or more is at most 5 %, whatever the search did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import InputError, UnsupportedModelError
from .answers import AnswerBook
from .bounds import LEVEL, Guess, Losses, falling, fewest, hopeless, p_value
from .costs import Costs
from .space import Setting, Space
from .trial import Trial, Tuned

LEAST = 20  # examples
FIRST = 16  # examples of the first round
MOST = 300  # examples for the search, and twice those of the least test where the tolerance is small
FINALISTS = 12  # settings whose cost is measured
PATH = 6  # settings that are tested at most
ROUNDS, MORE_ROUNDS, LAST_ROUNDS = 3, 7, 9  # in which costs are measured: in the search, of the best, and of what is accepted
SEARCHING = 0.5  # share of a time limit that the search may take
SUREST = 4  # settings that are looked at because they will pass, however little they save
KINDS = 3  # kinds of settings that are looked at more closely
MORE, FEWER = 4, 2  # places with more and fewer tokens than the best of a kind that are looked at
SURE = 2  # places from the most tokens on that are looked at in any case, so that the tests have something to begin with
ALIKE = 1.6  # factor between shares of tokens up to which settings are asked what is usual
STEP = 0.93  # of the cost of one setting that is tested, what the next one costs at most
LATE = "not tried: the time was over"
Tell = Callable[[str], None]


class Tuner:
    """One tuning.

    Parameters
    ----------
    book : of the examples, in random order.
    costs : measures settings.
    tolerance : loss that is allowed, in (0, 1).
    tell : is told what happens.
    minutes : to take at most; None = as long as it takes.
    begun : when it began, by ``time.monotonic``; None = now.

    Raises
    ------
    InputError : there are too few examples.
    """

    def __init__(
        self, book: AnswerBook, costs: Costs, tolerance: float, tell: Tell, minutes: float | None = None, begun: float | None = None
    ) -> None:
        number = len(book.examples)
        if number < LEAST:
            raise InputError(f"{number} examples can be used; expected {LEAST} or more, and some hundreds are better")
        self.book, self.costs, self.tolerance, self.tell = book, costs, tolerance, tell
        self.begun = time.monotonic() if begun is None else begun
        self.limit = None if minutes is None else 60 * minutes
        cut = self._cut(number)
        self.searched, self.confirmed = [*range(cut)], [*range(cut, number)]
        self.trials: list[Trial] = []

    def _cut(self, number: int) -> int:
        """Where the examples of the search end: at a half, but before where the others would be too few to accept much."""
        enough = round(1.5 * fewest(self.tolerance))
        most = max(MOST, 2 * fewest(self.tolerance))  # to tell losses apart that are a part of a small tolerance
        wanted = min(most, number // 2, max(number // 4, number - enough))
        if number - wanted < fewest(self.tolerance):
            wanted = max(number // 8, min(wanted, number - fewest(self.tolerance)))
        groups = self.book.groups
        while wanted < number - 1 and groups[wanted] == groups[wanted - 1]:  # examples of a picture stay together
            wanted += 1
        return wanted

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begun

    def _late(self, share: float = 1.0) -> bool:
        return self.limit is not None and self.seconds > share * self.limit

    def run(self, space: Space) -> Tuned:
        """Search, confirm, choose.

        Raises
        ------
        InputError : the time limit is too short for one round.
        """
        self.tell("all tokens")
        begun = self.seconds
        self.book.ask(None, self.searched[:FIRST])
        if self._late(0.25):
            raise InputError(
                f"a quarter of the time limit is over after {FIRST} answers with all tokens ({self.seconds:.0f} s). Give "
                f"--minutes {max(1, round(self.seconds / 60 * 4 * len(self.book.examples) / FIRST)):d} or more."
            )
        if self.limit is not None and (each := (self.seconds - begun) / FIRST) > 0:
            self.searched = self.searched[: max(FIRST, int(self.limit * SEARCHING / 2 / each))]
        begun = self.seconds
        self.book.ask(None, self.searched)
        each = (self.seconds - begun) / len(self.searched)
        left = self._halve([Trial(setting) for setting in space.first])
        path = self._path(self._refine(left, space))
        self._affordable(each)
        if self.confirmed:
            self.book.ask(None, self.confirmed)
        return self._result(self._confirm(path), space)

    def _affordable(self, each: float) -> None:
        """Leave out examples of the test for which there is no time; none of them has been seen yet.

        Parameters
        ----------
        each : seconds that an answer with all tokens takes; an answer of a setting takes no longer, and two are to be tested.
        """
        if self.limit is not None:
            number = int((self.limit - self.seconds) / (3 * each)) if each > 0 else len(self.confirmed)
            self.confirmed = self.confirmed[: max(0, number)]

    # -- searching

    def _try(self, trial: Trial, number: int) -> bool:
        """Answer the first ``number`` examples of the search; whether the setting works."""
        self.tell(f"{trial.setting.label} on {number} examples{self._best()}")
        try:
            losses, found = self.book.losses(trial.setting.method, self.searched[:number])
        except (InputError, UnsupportedModelError) as error:
            trial.verdict = f"cannot be done: {error}"
            return False
        trial.losses, trial.share, trial.guess = losses, found.share, Guess.of(losses)
        return True

    def _best(self) -> str:
        known = [trial for trial in self.trials if trial.guess is not None and not trial.verdict]
        best = max(known, key=self._value, default=None)
        if best is None or best.losses is None:
            return ""
        return f"; best so far: {best.setting.label}, {100 * best.losses.mean:+.1f} points, saves {best.saving:.0%}"

    def _value(self, trial: Trial) -> float:
        """What can be expected of a setting: its saving, if it is accepted."""
        if trial.guess is None:
            return 0.0
        return max(0.0, trial.saving) * max(self._power(trial), 1e-6 * (1 - trial.guess.mean))

    def _power(self, trial: Trial) -> float:
        """How likely a setting passes its test."""
        return 0.0 if trial.guess is None else trial.guess.power(self._testing, self.tolerance)

    @property
    def _testing(self) -> int:
        """Examples that a test will have; as many as would be needed where these are too few to accept anything."""
        return max(len(self.confirmed), 2 * fewest(self.tolerance))

    def _halve(self, trials: list[Trial]) -> list[Trial]:
        """Successive halving: the better half of the settings goes on to twice as many examples."""
        self.trials += trials
        alive, number = trials, min(FIRST, len(self.searched))
        while True:
            tried = []
            for trial in alive:
                if self._late(SEARCHING):
                    trial.verdict = trial.verdict or LATE
                elif self._try(trial, number):
                    tried.append(trial)
            self._smooth(tried)
            for trial in tried:
                if trial.guess is not None and trial.guess.surely_loses(self.tolerance):
                    trial.verdict = f"dropped after {number} examples: it loses too much"
                elif trial.saving <= 0:
                    trial.verdict = f"dropped after {number} examples: it saves nothing"
            good = sorted((trial for trial in tried if not trial.verdict), key=self._value, reverse=True)
            if number >= len(self.searched) or not good or self._late(SEARCHING):
                return good
            alive = good[: max(FINALISTS, -(-len(good) // 2))]
            for trial in good[len(alive) :]:
                trial.verdict = f"dropped after {number} examples: others promise more"
            if self.costs.is_timed and all(trial.cost is None for trial in alive) and len(alive) <= 2 * FINALISTS:
                self._measure(alive)
            number = min(2 * number, len(self.searched))

    def _smooth(self, trials: Sequence[Trial]) -> None:
        """Guess losses: drawn towards the median of settings with about as many tokens; of one kind, fewer tokens lose no less."""
        for trial in trials:
            if trial.losses is not None:
                near = [
                    other.losses.mean
                    for other in trials
                    if other.losses is not None and 1 / ALIKE <= other.share / trial.share <= ALIKE
                ]
                trial.guess = Guess.of(trial.losses, max(0.0, float(np.median(near))))
        for kind in {trial.setting.kind for trial in trials}:
            mine = sorted((t for t in trials if t.setting.kind == kind), key=lambda t: t.setting.place, reverse=True)
            guesses = [trial.guess for trial in mine if trial.guess is not None]
            means = falling([guess.mean for guess in guesses], [float(guess.number) for guess in guesses])
            for trial, guess, mean in zip(mine, guesses, means, strict=True):
                trial.guess = Guess(mean, guess.spread, guess.number)

    def _measure(self, trials: Sequence[Trial], rounds: int = ROUNDS) -> None:
        names = {str(number): trial.setting.method for number, trial in enumerate(trials)}

        def tell(what: str) -> None:
            self.tell(f"measuring {len(trials)} settings: {_shown(trials, what)}")

        found = self.costs.measure(names, rounds, tell)
        doubted = {name: names[name] for name, cost in found.items() if cost.median >= 1}
        if doubted and self.costs.is_timed and rounds < MORE_ROUNDS:  # a machine that was busy for a moment drops nothing
            found = {**found, **self.costs.measure(doubted, MORE_ROUNDS, tell)}
        for number, trial in enumerate(trials):
            trial.cost = found.get(str(number))
            if trial.cost is not None and trial.cost.median >= 1:
                trial.verdict = f"costs {trial.cost.median:.2f} of what all tokens cost"

    def _refine(self, left: list[Trial], space: Space) -> list[Trial]:
        """Of the kinds that do best, what is between the settings that were tried, and what was dropped for saving less."""
        best: dict[str, int] = {}  # place of the best setting of a kind
        for trial in left:
            best.setdefault(trial.setting.kind, trial.setting.place)
        best = dict([*best.items()][:KINDS])

        def near(setting: Setting) -> bool:
            return setting.kind in best and (setting.place < SURE or -MORE <= setting.place - best[setting.kind] <= FEWER)

        again = [trial for trial in self.trials if near(trial.setting) and trial.verdict.endswith("others promise more")]
        new = [Trial(setting) for kind in best for setting in space.further.get(kind, ()) if near(setting)]
        self.trials += new
        good = []
        for trial in [*again, *new]:
            if self._late(SEARCHING):
                trial.verdict = trial.verdict or LATE
                continue
            trial.verdict = ""
            if self._try(trial, len(self.searched)):
                good.append(trial)
        found = [*left, *good]
        self._smooth(found)
        found = sorted((trial for trial in found if self._value(trial) > 0), key=self._value, reverse=True)
        surest = sorted(found[2 * FINALISTS :], key=self._power, reverse=True)[:SUREST]
        found = [*found[: 2 * FINALISTS], *surest]
        unknown = [trial for trial in found if trial.cost is None]
        if unknown:
            self._measure(unknown)
        good = [trial for trial in found if not trial.verdict]
        finalists = good[:FINALISTS]
        for trial in sorted(good, key=lambda each: (self._power(each), each.saving), reverse=True)[:SUREST]:
            finalists += [] if trial in finalists else [trial]  # with which the tests begin
        if self.costs.is_timed and finalists:  # those that are close are told apart in the same rounds
            self._measure(finalists, MORE_ROUNDS)
        return [trial for trial in finalists if not trial.verdict]

    # -- confirming

    def _path(self, left: Sequence[Trial]) -> list[Trial]:
        """What is tested, in order: of settings that promise as much, those that save more; the likeliest to pass first."""
        path: list[Trial] = []
        for trial in sorted(left, key=lambda each: (-self._power(each), -each.saving)):
            if 1 - trial.saving < STEP * min((1 - other.saving for other in path), default=1.0) and self._power(trial) >= 0.02:
                path.append(trial)
        if len(path) > PATH:  # the first, and those of the greatest value
            best = sorted(path, key=self._value, reverse=True)[: PATH - 1]
            path = [trial for number, trial in enumerate(path) if number == 0 or trial in best]
        return path

    def _levels(self, number: int) -> list[float]:
        """At what level each of some tests is made of its own; together they have ``LEVEL``.

        The first gets half of it, where there are examples enough for that, and all of it where there are not.
        """
        first = 0.5 if number > 1 and len(self.confirmed) >= 2 * fewest(self.tolerance) else 1.0
        return [LEVEL * first, *[LEVEL * (1 - first) / max(1, number - 1)] * (number - 1)][:number]

    def _confirm(self, path: Sequence[Trial]) -> list[Trial]:
        """Test in order. What passes hands its level on to the next; what fails does not, and the next has its own alone."""
        accepted: list[Trial] = []
        held = 0.0
        for trial, own in zip(path, self._levels(len(path)), strict=True):
            trial.level = own + held
            held = 0.0
            if self._late() or not self.confirmed:
                trial.verdict = "not tested: the time was over"
            elif not trial.level:
                trial.verdict = "not tested: one before it failed"
            elif self._passes(trial):
                accepted.append(trial)
                held = trial.level
        return accepted

    def _passes(self, trial: Trial) -> bool:
        """The test of one setting. It ends early where it can no longer be passed."""
        seen: list[int] = []
        step = 4 * len(self.book.chunks[0])
        losses: Losses | None = None
        for begin in range(0, len(self.confirmed), step):
            seen += self.confirmed[begin : begin + step]
            self.tell(f"testing {trial.setting.label}: {len(seen)} of {len(self.confirmed)} examples")
            losses, trial.answered = self.book.losses(trial.setting.method, seen)
            if len(seen) < len(self.confirmed):
                if self._late():
                    trial.confirmed, trial.verdict = losses, f"not tested to the end: the time was over after {len(seen)} examples"
                    return False
                if hopeless(losses, self.tolerance, len(self.confirmed), trial.level):
                    break
        trial.confirmed = losses
        passed = losses is not None and len(seen) == len(self.confirmed) and p_value(losses, self.tolerance) <= trial.level
        trial.verdict = "accepted" if passed else f"failed the test on {len(seen)} examples"
        return passed

    # -- what came of it

    def _result(self, accepted: list[Trial], space: Space) -> Tuned:
        if accepted and self.costs.is_timed:
            self._measure(accepted[-3:], LAST_ROUNDS)
        saving = [trial for trial in accepted if trial.cost is not None and trial.cost.interval and trial.cost.interval[1] < 1]
        chosen = max(saving, key=lambda trial: trial.saving, default=None)
        for trial in accepted:
            trial.verdict = "chosen" if trial is chosen else "accepted"
        for trial in self.trials:
            trial.verdict = trial.verdict or "not tested: others save more, or are surer to pass"
        everything = [*self.searched, *self.confirmed]
        full = float(self.book.ask(None, everything).scores.mean())
        needed = None if chosen else self._needed()
        rank = {"chosen": 0, "accepted": 1, "failed": 2, "not": 3}
        trials = sorted(self.trials, key=lambda t: (rank.get(t.verdict.partition(" ")[0], 4), -self._seen(t), -self._value(t)))
        reason = self._reason(chosen, accepted, needed)
        return Tuned(
            self.tolerance, trials, chosen, reason, needed, self.searched, self.confirmed, full, self.seconds, space.impossible
        )

    @staticmethod
    def _seen(trial: Trial) -> int:
        return 0 if trial.losses is None else len(trial.losses.values)

    def _needed(self) -> int | None:
        """Examples in all with which the best candidate would probably be accepted: a third more than its test needs."""
        numbers = []
        for trial in self.trials:
            known = trial.confirmed or trial.losses
            if known is not None and trial.saving > 0.02 and len(known.values) >= len(self.searched):
                guess = trial.guess if trial.confirmed is None else Guess.of(known)
                number = None if guess is None else guess.needed(self.tolerance)
                numbers += [] if number is None else [number]
        if not numbers:
            return None
        return max(-(-4 * min(numbers) // 3), -(-5 * len(self.book.examples) // 4))

    def _reason(self, chosen: Trial | None, accepted: Sequence[Trial], needed: int | None) -> str:
        points, number = 100 * self.tolerance, len(self.confirmed)
        if chosen is not None:
            return f"of the {len(accepted)} settings that passed the test on {number} other examples it saves most"
        if accepted:
            return "what loses less than the tolerance saves nothing on this machine that is beyond noise"
        if not number:
            return "the time was over before anything could be tested. Give more minutes, or fewer examples"
        if number < fewest(self.tolerance):
            more = f"{fewest(self.tolerance)} examples that the search has not seen are needed for {points:g} points at the least"
            return f"{number} examples are too few for a test: {more}" + _enough(needed)
        return f"no setting was shown to lose less than {points:g} points on {number} examples" + _enough(needed)


def _enough(needed: int | None) -> str:
    if needed is None:
        return "; more examples would probably not change that. Allow a larger loss"
    return f"; about {needed} examples in all would probably do"


def _shown(trials: Sequence[Trial], what: str) -> str:
    return trials[int(what)].setting.label if what.isdigit() else what or "all tokens"
