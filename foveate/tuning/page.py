"""The page of a tuning: one HTML file that needs no network, with the front, what was tried, and answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..chat import collate
from ..errors import MissingExtraError
from ..places import write_text
from ..viz.canvas import new_figure, plain
from ..viz.frames import by_frame, frames_as_seen
from ..viz.overlay import overlay
from ..viz.page import figure, paragraph, picture, table, text
from ..viz.page import page as whole_page
from .run import Found
from .trial import Trial, Tuned

CHANGED = 6  # examples that are shown
FRAMES = 4  # of a video


def write_page(found: Found, path: Path) -> None:
    """Write the page.

    Raises
    ------
    FoveateError : it cannot be written.
    """
    write_text(path, page(found))


def page(found: Found) -> str:
    """The page as one text. Without matplotlib it has no picture of the front, and says so."""
    tuned, about = found.tuned, found.plan.about
    points = 100 * tuned.tolerance
    title = f"{found.loaded.name}: at most {points:g} points, as cheap as possible"
    parts = [_result(found), *(paragraph(f"{note}.", "dim") for note in found.notes)]
    parts += ["<h2>Accuracy against cost</h2>", _front(tuned, found.plan.saving["objective"])]
    parts += ["<h2>What was tried</h2>", _table(tuned)]
    parts += [paragraph(f"{name} was not tried: {reason}", "dim") for name, reason in tuned.impossible.items()]
    parts += _examples(found)
    data = about["data"]
    told = (
        f"{data['examples']} examples of {data['name']}; right are {about['right']}, by {about['score']}. The search saw "
        f"{about['searched']} of them, the test the other {about['confirmed']}. {about['seconds']:.0f} s on "
        f"{about['machine']['processor']}, {about['date']}."
    )
    parts += ["<h2>How this was made</h2>", paragraph(told), f"<pre>{text(about['command'])}</pre>"]
    return whole_page(title, parts)


def _result(found: Found) -> str:
    tuned, saving = found.tuned, found.plan.saving
    if tuned.chosen is None:
        return paragraph(f"All tokens are kept: {tuned.reason}.", "result kept")
    low, high = saving["interval"]
    told = (
        f"{tuned.chosen.setting.label} saves {saving['saving']:.0%} [{low:.0%}, {high:.0%}] of {saving['objective']}. It loses "
        f"less than {100 * (tuned.bound or 0):.2f} points with 95 % confidence; on the examples of the test it lost "
        f"{100 * found.plan.loss:+.2f}."
    )
    return paragraph(told, "result") + paragraph(f"{tuned.reason.capitalize()}.", "dim")


def _front(tuned: Tuned, objective: str) -> str:
    """Loss against cost of everything that was measured, as a picture."""
    try:
        drawn = new_figure(figsize=(9, 4.6), layout="constrained")
    except MissingExtraError as error:
        return paragraph(f"No picture: {error}", "dim")
    axis = drawn.subplots()
    axis.axhline(0, color="#999", linewidth=0.8)
    axis.axhline(100 * tuned.tolerance, color="#b7791f", linestyle="--", linewidth=1, label="tolerance")
    groups = {"not tested": [], "tested, not accepted": [], "accepted": [], "chosen": []}  # type: dict[str, list[Trial]]
    for trial in tuned.trials:
        if trial.losses is not None and trial.cost is not None:
            first = trial.verdict.partition(" ")[0]
            name = {"chosen": "chosen", "accepted": "accepted", "failed": "tested, not accepted"}.get(first, "not tested")
            groups[name].append(trial)
    styles = {"not tested": ("#999", "o"), "tested, not accepted": ("#c0392b", "x"), "accepted": ("#3a7d44", "o")}
    for name, trials in groups.items():
        color, marker = styles.get(name, ("#1a5fb4", "*"))
        cost = [1 - trial.saving for trial in trials]
        loss = [100 * (trial.confirmed or trial.losses).mean for trial in trials]  # type: ignore[union-attr]
        size = {"chosen": 160, "not tested": 14}.get(name, 36)
        axis.scatter(cost, loss, s=size, c=color, marker=marker, label=f"{name} ({len(trials)})" if trials else None)
    for number, trial in enumerate(groups["chosen"] + groups["accepted"][:3]):
        place = (1 - trial.saving, 100 * (trial.confirmed or trial.losses).mean)  # type: ignore[union-attr]
        axis.annotate(plain(trial.setting.label), place, textcoords="offset points", xytext=(7, (9, -12)[number % 2]), fontsize=8)
    worst = max(4 * 100 * tuned.tolerance, 4.0)
    shown = [trial for trials in groups.values() for trial in trials]
    bottom = min([0.0, *(100 * (trial.confirmed or trial.losses).mean for trial in shown)])  # type: ignore[union-attr]
    axis.set(xlabel=f"{objective}, all tokens = 1", ylabel="points lost")
    axis.set_ylim(bottom - 1, worst)
    axis.legend(fontsize=8, loc="upper right")
    early = sum(trial.losses is not None and trial.cost is None for trial in tuned.trials)
    told = paragraph(f"{early} settings were dropped before their cost was measured.", "dim") if early else ""
    return figure(drawn, "points lost against cost") + told


def _table(tuned: Tuned) -> str:
    heads = ("setting", "tokens", "cost", "loss in the search", "on", "loss in the test", "on", "verdict")
    rows = []
    for trial in tuned.trials:
        cells = [trial.setting.label, "" if trial.losses is None else f"{trial.share:.0%}"]
        cells.append("" if trial.cost is None else f"{trial.cost.median:.2f}")
        for losses in (trial.losses, trial.confirmed):
            cells += ["", ""] if losses is None else [f"{100 * losses.mean:+.1f}", str(len(losses.values))]
        rows.append([*cells, trial.verdict])
    chosen = next((number for number, trial in enumerate(tuned.trials) if trial is tuned.chosen), None)
    return table(heads, rows, left=(len(heads) - 1,), chosen=chosen)


def _examples(found: Found) -> list[str]:
    """Answers that are other ones with fewer tokens, worse ones first, with the tokens that stayed."""
    tuned, book = found.tuned, found.book
    shown = tuned.chosen or next((trial for trial in tuned.trials if trial.answered is not None), None)
    if shown is None or shown.answered is None:
        return []
    numbers = tuned.confirmed[: len(shown.answered.texts)]
    full = book.ask(None, numbers)
    changed = [i for i in range(len(numbers)) if full.texts[i] != shown.answered.texts[i]]
    changed.sort(key=lambda i: shown.answered.scores[i] - full.scores[i])  # type: ignore[union-attr]
    heading = f"Answers that changed with {shown.setting.label}: {len(changed)} of {len(numbers)}"
    parts = [f"<h2>{text(heading)}</h2>", '<div class="examples">']
    for i in changed[:CHANGED]:
        example = book.examples[numbers[i]]
        right = f" (right: {' / '.join(example.answers)})" if example.answers else ""
        parts += ["<div>", *(picture(image, "what stayed") for image in _kept(found, shown, numbers[i]))]
        parts.append(f"<p><b>{text(_question(found, numbers[i]))}</b></p>")
        parts.append(f"<p>all tokens: {text(full.texts[i])}{text(right)}</p>")
        parts.append(f"<p>{text(shown.setting.label)}: {text(shown.answered.texts[i])}</p></div>")
    return [*parts, "</div>"]


def _question(found: Found, number: int) -> str:
    return found.book.examples[number].prompt().text[-300:]


def _kept(found: Found, trial: Trial, number: int) -> Sequence[Image.Image]:
    """The pictures of an example, or some frames of its video, with the tokens that enter the decoder."""
    model, prompt = found.loaded.model, found.book.examples[number].prompt()
    inputs = collate(found.loaded, [prompt])
    with trial.setting.method(model) as session:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        images = session.report.images
    seen = [frame for video in prompt.videos for frame in video.frames] or prompt.images
    frames = frames_as_seen(inputs, found.loaded.processor, seen)
    grids = by_frame(images, len(frames))
    every = -(-len(frames) // len(grids))
    pairs = list(zip(frames[::every], grids, strict=False))[:FRAMES]
    return [overlay(frame, grid[0], 300) for frame, grid in pairs]
