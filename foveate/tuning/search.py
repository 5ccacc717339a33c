"""Searches on a calibration set: keep rates per decoder layer (G-Search, P-Sigmoid) and head masks (YOPO).

G-Search (arXiv 2412.00556) goes from shallow to deep layers and takes for each the least keep rate that costs no accuracy. The
paper uses Bayesian optimisation for each layer. Under its own assumption, that a deeper layer needs a subset of what a shallower
one needs, feasibility is monotone in the rate, and bisection finds the same with a handful of evaluations.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from ..methods.base import DecoderReducer, Method
from ..methods.g_search import GSearch
from ..methods.p_sigmoid import PSigmoid
from ..methods.registry import look_up, registered
from ..methods.tools.scoring import prompt_attention
from ..places import write_text
from .calibration import Calibration

Evaluate = Callable[[Method], float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a search found; ``save`` writes it for ``GSearch(plan=...)``.

    Attributes
    ----------
    method : "g-search" or "p-sigmoid".
    rates : keep rate of each decoder layer.
    full, accuracy : on the calibration set, with all tokens and with the plan.
    evaluations : how often the set was evaluated.
    settings : of the search.
    fields : of the method, where they are what was found; with them the file is one of ``Method.load``.
    """

    method: str
    rates: tuple[float, ...]
    full: float
    accuracy: float
    evaluations: int
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] | None = None

    @property
    def mean(self) -> float:
        """Keep rate on average over layers."""
        return sum(self.rates) / len(self.rates)

    def to_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "mean": self.mean}
        return {name: value for name, value in found.items() if name != "fields" or value is not None}

    def save(self, path: str | Path) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def g_search(
    evaluate: Evaluate, layers: int, *, first: int = 2, epsilon: float = 0.002, steps: int = 16, progress: Progress = lambda _: None
) -> Plan:
    """The least keep rate of each layer, from ``first`` to the last, that costs at most ``epsilon`` of the accuracy.

    Parameters
    ----------
    evaluate : accuracy in [0, 1] of a method on the calibration set.
    layers : of the decoder.
    first : the first layer that may keep less.
    epsilon : accuracy that may be lost, absolute; 0.002 is the 0.2 points of the paper.
    steps : rates are multiples of ``1 / steps``, 0 among them.
    progress : is told what was found.

    Raises
    ------
    InputError : a parameter is out of range.
    """
    if not 1 <= first < layers or steps < 1 or not epsilon >= 0:
        raise InputError(
            f"first={first}, steps={steps}, epsilon={epsilon}; expected 1 <= first < {layers}, steps >= 1, epsilon >= 0"
        )
    full = evaluate(GSearch(budget=1.0))
    rates, count, best = [1.0] * layers, 1, full
    most = steps
    for layer in range(first, layers):
        feasible, refused = most, -1
        while feasible - refused > 1:
            middle = (feasible + refused) // 2
            tried = (*rates[:layer], *[middle / steps] * (layers - layer))
            accuracy, count = evaluate(GSearch(rates=tried)), count + 1
            if accuracy >= full - epsilon:
                feasible, best = middle, accuracy
            else:
                refused = middle
        most = feasible
        rates[layer:] = [most / steps] * (layers - layer)
        progress(f"layer {layer}: {most / steps:.1%} (accuracy {best:.1%} of {full:.1%})")
    settings = {"first": first, "epsilon": epsilon, "steps": steps}
    return Plan("g-search", tuple(rates), full, best, count, settings)


def p_sigmoid_search(
    evaluate: Evaluate, layers: int, budget: float, *, first: int = 2, progress: Progress = lambda _: None
) -> Plan:
    """The sigmoid of mean ``budget`` over layers with the best accuracy, over a grid of steepness and lower end.

    Parameters
    ----------
    evaluate, layers, first, progress : as for ``g_search``.
    budget : mean keep rate over all layers.

    Raises
    ------
    InputError : the budget is below what the first layers run.
    """
    if budget < first / layers:
        raise InputError(f"budget={budget}; the first {first} of {layers} layers run all tokens, which is {first / layers:.1%}")
    full, found, count = evaluate(GSearch(budget=1.0)), [], 1
    for steep, low in itertools.product((4, 8, 16, 32, 64), (0.0, 0.05, 0.1, 0.2)):
        if (first + (layers - first) * low) / layers > budget:
            continue
        method = PSigmoid(budget=budget, steepness=steep / layers, low=low, first=first)
        accuracy, count = evaluate(method), count + 1
        found.append((accuracy, steep / layers, low, method.keep_rates(layers, None)))
        progress(f"steepness {steep / layers:.2f}, low {low:.2f}: {accuracy:.1%} of {full:.1%}")
    accuracy, steepness, low, rates = max(found, key=lambda entry: entry[0])
    fields = {"budget": budget, "first": first, "steepness": steepness, "low": low}
    return Plan("p-sigmoid", rates, full, accuracy, count, dict(fields), fields)


# -- head masks


class _HeadRatios(DecoderReducer):
    """Keeps everything, and notes for each key head how much attention goes to visual tokens per unit that goes to text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ratios: list[Tensor] = []  # one [B, layers - 1, G] per prompt read
        self._layers: list[Tensor] = []

    def cuts(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def cut(self, tokens: PromptTokens) -> Cut:
        visual, text = (part[:, None, None].float() for part in (tokens.visual, tokens.valid & ~tokens.visual))
        seen = torch.zeros(2, 1)
        for rows in torch.arange(tokens.valid.shape[1], device=tokens.valid.device).split(128):
            weights = prompt_attention(tokens, rows.expand(len(tokens.valid), -1)) * tokens.valid[:, None, rows, None]
            seen = seen.to(weights.device) + torch.stack([(weights * part).sum((2, 3)) for part in (visual, text)]).flatten(1)
        groups = tokens.tap.keys.shape[1] if tokens.tap is not None else 1
        on_visual, on_text = seen.view(2, len(tokens.valid), groups, -1).sum(-1)
        if tokens.layer == 1:
            self._layers.clear()
        self._layers.append((on_visual / on_text.clamp(min=1e-9)).cpu())
        if tokens.layer == tokens.layers - 1:
            self.ratios.append(torch.stack(self._layers, 1))
        return Cut(torch.ones_like(tokens.valid))


def head_mask(model: Any, prompts: Iterable[dict[str, Any]], share: float = 0.5, votes: float = 0.4) -> list[list[bool]]:
    """YOPO's head mask: a head takes part in visual tokens if in enough prompts their share of its attention is above a threshold.

    Parameters
    ----------
    model : to calibrate on.
    prompts : inputs with pictures, as the processor returns them; about 100.
    share : of the heads that stay on average; the threshold follows from it. The first two layers and the last keep all of theirs
        and do not count.
    votes : share of the prompts that have to agree; 40 of 100 in the released code.

    Returns
    -------
    For each decoder layer, which key heads stay.

    Raises
    ------
    InputError : there are no prompts with pictures, or a share is out of range.
    """
    if not 0 < share <= 1 or not 0 <= votes < 1:
        raise InputError(f"share={share}, votes={votes}; expected shares of 1")
    watch = _HeadRatios()
    with watch(model) as session, torch.no_grad():
        for inputs in prompts:
            session.model(**inputs, logits_to_keep=1)
    if not watch.ratios:
        raise InputError("no prompt with a picture was given; head masks are calibrated on pictures with questions")
    ratios = torch.cat(watch.ratios)
    needed = int(votes * len(ratios))
    agreed = ratios.sort(dim=0, descending=True).values[needed]  # a head stays if more than ``needed`` are above the threshold
    free = agreed[2:]
    threshold = torch.quantile(free, 1 - share) if free.numel() else agreed.amin() - 1
    stays = agreed >= threshold
    stays[:2] = True
    return [*(layer.tolist() for layer in stays), [True] * ratios.shape[-1]]


# -- by the kind that a method names


@dataclass(frozen=True)
class Search:
    """One kind of search.

    Attributes
    ----------
    options : that it reads, of those of the command line.
    run : from a calibration set, the options and what is told on the way, to the document to write and what was found in a line.
    """

    options: tuple[str, ...]
    run: Callable[[Calibration, dict[str, Any], Progress], tuple[dict[str, Any], str]]


def _plan_found(plan: Plan, calibration: Calibration) -> tuple[dict[str, Any], str]:
    plan.settings["data"] = calibration.name
    rates = " ".join(f"{rate:.0%}" for rate in plan.rates)
    return plan.to_dict(), f"keep rates {rates}: {plan.mean:.1%} on average, accuracy {plan.accuracy:.1%} of {plan.full:.1%}"


def _rates(calibration: Calibration, options: dict[str, Any], progress: Progress) -> tuple[dict[str, Any], str]:
    return _plan_found(g_search(calibration.accuracy, calibration.layers, progress=progress, **options), calibration)


def _sigmoid(calibration: Calibration, options: dict[str, Any], progress: Progress) -> tuple[dict[str, Any], str]:
    return _plan_found(p_sigmoid_search(calibration.accuracy, calibration.layers, progress=progress, **options), calibration)


def _heads(calibration: Calibration, options: dict[str, Any], progress: Progress) -> tuple[dict[str, Any], str]:
    mask = head_mask(calibration.loaded.model, calibration.prompts(), **options)
    kept = sum(map(sum, mask)) / sum(map(len, mask))
    return {"data": calibration.name, "heads": mask}, f"{kept:.0%} of the heads take part in visual tokens"


SEARCHES = {
    "rates": Search(("epsilon", "steps"), _rates),
    "sigmoid": Search(("budget",), _sigmoid),
    "heads": Search(("share",), _heads),
}


def search_of(method: str) -> Search:
    """The search that finds a setting of a method.

    Raises
    ------
    InputError : there is no such method, or none for it.
    """
    known = [name for name, cls in registered().items() if cls.searched]
    cls, _ = look_up(method)
    if not cls.searched:
        raise InputError(f"there is no search for {method!r}; choose {', '.join(known)}")
    return SEARCHES[cls.searched]
