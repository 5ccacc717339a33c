"""What settings cost on this machine beside the model as it is: times of paired rounds, or counted bytes and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from ..errors import InputError
from ..measuring.noise import Ratio, paired
from ..measuring.runs import TimedRunner
from ..methods.base import Method

OBJECTIVES = ("prefill", "end-to-end", "kv-bytes", "tokens")
PARTS = {"prefill": ("selection", "prefill"), "end-to-end": ("end to end",)}  # of ``measuring.runs.PARTS``
Tell = Callable[[str], None]


class Costs:
    """Measures one objective on a few prompts.

    Parameters
    ----------
    model : without a method attached.
    prompts : inputs of ``generate``, each of one prompt, with pixels.
    objective : one of ``OBJECTIVES``. "prefill" is choosing tokens, and the decoder reading the prompt; "end-to-end" is all of
        ``generate``, the vision encoder included; "kv-bytes" what the cache holds after the answer; "tokens" visual tokens on
        average over decoder layers.
    new_tokens : of an answer, as many as the model's own have.

    Raises
    ------
    InputError : the objective is unknown.
    """

    def __init__(self, model: Any, prompts: Sequence[Mapping[str, Any]], objective: str, new_tokens: int) -> None:
        if objective not in OBJECTIVES:
            raise InputError(f"unknown objective {objective!r}; available: {', '.join(OBJECTIVES)}")
        self.objective = objective
        self.runners = [TimedRunner(model, inputs, max(2, new_tokens)) for inputs in prompts]

    @property
    def is_timed(self) -> bool:
        """Whether time is what counts, which varies from run to run."""
        return self.objective in PARTS

    def measure(self, methods: Mapping[str, Method], rounds: int, tell: Tell = lambda _: None, seed: int = 0) -> dict[str, Ratio]:
        """Cost of each method over that of all tokens, on the prompts together.

        Parameters
        ----------
        methods : by name.
        rounds : of timed runs, each in another order, after one of warm-up; 6 are needed for an interval.
        """
        ways: dict[str, Method | None] = {"": None, **methods}
        if not self.is_timed:
            totals = {}
            for name, method in ways.items():
                tell(name)
                totals[name] = sum(self._counted(runner, method) for runner in self.runners)
            return {name: _counted_ratio(totals[name] / totals[""]) for name in methods}
        for name, method in ways.items():
            tell(name)
            for runner in self.runners:
                runner(method)
        times: dict[str, list[float]] = {name: [] for name in ways}
        random = Random(seed)
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            held = dict.fromkeys(ways, 0.0)
            for runner in self.runners:
                order = [*ways]
                random.shuffle(order)
                for name in order:
                    seconds = runner(ways[name]).seconds
                    held[name] += sum(seconds.get(part, 0.0) for part in PARTS[self.objective])
            for name, value in held.items():
                times[name].append(value)
        ratios = {name: paired(times[name], times[""]) for name in methods}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def _counted(self, runner: TimedRunner, method: Method | None) -> float:
        seen = runner.inspect(method)
        if self.objective == "kv-bytes":
            return float(sum(seen.cache))
        layers = [int(runner.parts.visual(runner.inputs["input_ids"]).sum())] if seen.report is None else seen.report.layers
        return sum(layers) / len(layers)


def _counted_ratio(value: float) -> Ratio:
    return Ratio(value, (value, value))
