"""What happened in a call: counts, kept tokens, where dropped ones went, times, warnings."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import MissingExtraError
from .notebook import report_html
from .tokens import Reduction

COLUMNS = ("item", "part", "row", "modality", "grid_rows", "grid_columns", "before", "after", "share", "threshold")
log = logging.getLogger("foveate")


@functools.lru_cache(maxsize=256)
def _log_once(warning: str) -> None:
    log.warning("%s", warning)


class Clock:
    """Wall time of named parts in seconds; on a GPU by events, which are only waited for when somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str) -> None:
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        """End what ``start`` began; without a beginning nothing is recorded."""
        if name in self._open:
            self._spans.append((name, self._open.pop(name), self._now()))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, begin, end in self._spans:
            if self._cuda:
                end.synchronize()
                span = begin.elapsed_time(end) / 1000
            else:
                span = end - begin
            totals[name] = totals.get(name, 0.0) + span
        return totals


@dataclass(frozen=True)
class CutRecord:
    """What was left before one decoder layer.

    Attributes
    ----------
    layer : the layer.
    image, column : [B, M] the image of its row and the column of its prompt of each token that is left; image -1 = no visual token.
    seen_image, seen_column, scores : [B, S] the same, and the importance, of the tokens that were there before; scores may be None.
    """

    layer: int
    image: Tensor
    column: Tensor
    seen_image: Tensor
    seen_column: Tensor
    scores: Tensor | None


@dataclass(frozen=True)
class StageReport:
    """One image from a decoder layer on: ``kept`` grid cells, and the ``scores`` of the cells that came that far."""

    layer: int
    kept: list[int]
    scores: dict[int, float] | None


@dataclass(frozen=True)
class Item:
    """A picture or video: one run of placeholders in a prompt.

    Attributes
    ----------
    row : its prompt in the batch.
    modality : "image" or "video".
    before : placeholders.
    kept : [m] those that stay, in the order of the features.
    part, cell : [m] the grid (picture, tile or frame) that each of them belongs to, and its cell there; -1 = none, as a newline.
    grids : rows and columns of each grid.
    """

    row: int
    modality: str
    before: int
    kept: Tensor
    part: Tensor
    cell: Tensor
    grids: list[tuple[int, int]]


@dataclass(frozen=True)
class ImageReport:
    """One grid of visual tokens: a picture, a tile of one, or a frame of a video.

    Attributes
    ----------
    row : its prompt in the batch.
    before, after : visual tokens in the prompt.
    grid : rows and columns of visual tokens.
    kept : grid cell of each output token, in output order.
    source : [rows * columns] the output token (index into ``kept``) that each cell went to, -1 = dropped, -2 = merged into
        a token of another frame.
    scores : [rows * columns] importance, where the method has one.
    threshold : the score from which tokens were kept, where the method has such a value.
    stages : what was left of it from a decoder layer on, for each cut inside the decoder.
    item, part : the picture or video it belongs to, and its number within that.
    modality : "image" or "video".
    made : whether the method made new tokens, such as learnt ones. ``kept`` then says at which cells they stand.
    """

    row: int
    before: int
    after: int
    grid: tuple[int, int]
    kept: list[int]
    source: list[int]
    scores: list[float] | None
    threshold: float | None
    stages: list[StageReport] = field(default_factory=list)
    item: int = 0
    part: int = 0
    modality: str = "image"
    made: bool = False


@dataclass(repr=False)
class Report:
    """What a call did. ``str(report)`` is a summary, ``to_dict()`` is JSON-able.

    Tensors stay on the device until somebody asks for ``images``.

    Attributes
    ----------
    items : pictures and videos in the order of the prompts.
    reduction : of all their grids, in the same order.
    """

    method: dict[str, Any]
    decoder_layers: int
    clock: Clock
    items: list[Item] = field(default_factory=list)
    reduction: Reduction | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cuts: list[CutRecord] = field(default_factory=list)
    placeholders: Tensor | None = None  # [B, S] image of its row that each column of the prompt belongs to, -1 = none
    encoder_counts: list[Tensor] = field(default_factory=list)  # per encoder layer [grids]
    copies: int = 1  # rows of the decoder for each row of the prompt (beams)
    question_tokens: int = 0  # of the whole batch, which the decoder read alone for the method

    def __post_init__(self) -> None:
        for warning in self.warnings:
            _log_once(warning)

    def warn(self, text: str) -> None:
        """Add a warning, which is also logged the first time that any report has it."""
        if text not in self.warnings:
            self.warnings.append(text)
            _log_once(text)

    def begin(self, placeholders: Tensor, copies: int) -> None:
        """A decoder with cuts starts to read the prompt."""
        self.cuts, self.placeholders, self.copies = [], placeholders, copies

    @property
    def rows(self) -> list[int]:
        """The prompt of each picture or video."""
        return [item.row for item in self.items]

    @property
    def before(self) -> list[int]:
        """Visual tokens of each picture or video."""
        return [item.before for item in self.items]

    @property
    def after(self) -> list[int]:
        """Visual tokens that are left of each picture or video, before the decoder."""
        return [len(item.kept) for item in self.items]

    @property
    def kept(self) -> list[list[int]]:
        """The placeholders of each picture or video that stay, in the order of its features."""
        return [item.kept.tolist() for item in self.items]

    @property
    def images(self) -> list[ImageReport]:
        """One entry per picture, tile or frame, in the order of the prompts."""
        reduction = self.reduction
        if reduction is None:
            return []
        grids = [(i, part, grid) for i, item in enumerate(self.items) for part, grid in enumerate(item.grids)]
        sources, valid = reduction.source_map(max(r * c for *_, (r, c) in grids)).tolist(), reduction.mask()
        found, stages, made = [], [self._stages(i) for i in range(len(self.items))], reduction.are_made().tolist()
        for n, (i, part, grid) in enumerate(grids):
            item, cells = self.items[i], grid[0] * grid[1]
            single, kept = len(item.grids) == 1, reduction.index[n][valid[n]]
            found.append(
                ImageReport(
                    row=item.row,
                    before=item.before if single else cells,
                    after=len(item.kept) if single else len(kept),
                    grid=grid,
                    kept=kept.tolist(),
                    source=_renumbered(sources[n][:cells], valid[n]),
                    scores=None if reduction.scores is None else reduction.scores[n][:cells].tolist(),
                    threshold=None if reduction.threshold is None else float(reduction.threshold[n]),
                    stages=stages[i][part],
                    item=i,
                    part=part,
                    modality=item.modality,
                    made=made[n],
                )
            )
        return found

    def _stages(self, number: int) -> list[list[StageReport]]:
        """What each cut left of each grid of an item."""
        item = self.items[number]
        found: list[list[StageReport]] = [[] for _ in item.grids]
        cells = list(zip(item.part.tolist(), item.cell.tolist(), strict=True))
        if self.placeholders is None or not self.cuts:
            for cut in self.cuts:
                for part, reports in enumerate(found):
                    reports.append(StageReport(cut.layer, [cell for mine, cell in cells if mine == part], None))
            return found
        of_row, line = self.rows[:number].count(item.row), item.row * self.copies  # number of the item in its row
        places = (self.placeholders[item.row] == of_row).nonzero().flatten().tolist()
        cell_of = {place: cells[i] for i, place in enumerate(places)}
        for cut in self.cuts:
            left, scores = self._left(cut, line, of_row, cell_of, len(found))
            for part, reports in enumerate(found):
                reports.append(StageReport(cut.layer, left[part], None if cut.scores is None else scores[part]))
        return found

    def _left(
        self, cut: CutRecord, line: int, of_row: int, cell_of: dict[int, tuple[int, int]], parts: int
    ) -> tuple[list[list[int]], list[dict[int, float]]]:
        """For each grid of an item the cells that a cut left, and the scores of those that came so far."""
        left: list[list[int]] = [[] for _ in range(parts)]
        scores: list[dict[int, float]] = [{} for _ in range(parts)]
        for column in cut.column[line][cut.image[line] == of_row].tolist():
            part, cell = cell_of[column]
            if part >= 0:
                left[part].append(cell)
        if cut.scores is not None:
            seen = cut.seen_image[line] == of_row
            for column, score in zip(cut.seen_column[line][seen].tolist(), cut.scores[line][seen].tolist(), strict=True):
                part, cell = cell_of[column]
                if part >= 0:
                    scores[part][cell] = score
        return left, scores

    @property
    def layers(self) -> list[int]:
        """Visual tokens of the whole batch that each decoder layer processed."""
        counts, cuts = [sum(self.after)] * self.decoder_layers, sorted(self.cuts, key=lambda cut: cut.layer)
        for cut in cuts:
            left = int((cut.image[:: self.copies] >= 0).sum())
            counts[cut.layer :] = [left] * (self.decoder_layers - cut.layer)
        return counts

    @property
    def encoder_layers(self) -> list[list[int]]:
        """Visual tokens of each image that leave each layer of the vision encoder, up to the one that makes the features; empty
        where the encoder runs in full.
        """
        return [counts.tolist() for counts in self.encoder_counts]

    @property
    def mean_tokens(self) -> float:
        """Visual tokens per image, averaged over decoder layers."""
        return sum(self.layers) / max(1, len(self.layers) * len(self.after))

    @property
    def seconds(self) -> dict[str, float]:
        """Time of vision, selection, prefill and decode, as far as they ran."""
        return self.clock.seconds()

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "items": [
                {"row": item.row, "modality": item.modality, "before": item.before, "after": len(item.kept)} for item in self.items
            ],
            "images": [asdict(image) for image in self.images],
            "encoder_layers": self.encoder_layers,
            "layers": self.layers,
            "question_tokens": self.question_tokens,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "notes": self.notes,
        }

    def to_json(self, **options: Any) -> str:
        return json.dumps(self.to_dict(), **options)

    def __repr__(self) -> str:
        counts = f"{sum(self.before)} -> {sum(self.after)} visual tokens" if self.before else "no image"
        told = f", {len(self.warnings)} warnings" if self.warnings else ""
        return f"<Report of {self.method['name']}: {counts}{told}>"

    def _repr_html_(self) -> str:
        """For notebooks: a table of what each picture had and kept, and a map of the kept tokens."""
        return report_html(self)

    def to_pandas(self) -> Any:
        """A table with one row for each picture, tile or frame.

        Returns
        -------
        pandas.DataFrame
            Columns: ``item``, ``part``, ``row``, ``modality``, ``grid_rows``, ``grid_columns``, visual tokens ``before`` and
            ``after``, their ratio ``share``, ``threshold``, and ``from_layer_K`` for each cut before decoder layer K.

        Raises
        ------
        MissingExtraError : pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "pandas") from error
        return pandas.DataFrame([_flat(image) for image in self.images], columns=None if self.items else list(COLUMNS))

    def __str__(self) -> str:
        name = self.method["name"]
        if not self.before:
            return f"{name}: no image in the last call"
        each = ", ".join(f"{b} -> {a}" for b, a in zip(self.before, self.after, strict=True))
        total = f" ({100 * sum(self.after) / sum(self.before):.1f} % kept)"
        times = ", ".join(f"{part} {1000 * span:.1f} ms" for part, span in self.seconds.items())
        layers = self.layers
        steps = [(layer, count) for layer, count in enumerate(layers) if layer and count != layers[layer - 1]]
        inner = self.encoder_layers
        encoder = "; in the encoder, after each layer: " + _runs([sum(counts) for counts in inner]) if inner else ""
        inside = "".join(f", {count} from decoder layer {layer} on" for layer, count in steps)
        inside += f", {self.mean_tokens:.1f} per image on average over layers" if steps else ""
        noted = "".join(f"\nwarning: {warning}" for warning in self.warnings) + "".join(f"\nnote: {note}" for note in self.notes)
        return f"{name}: visual tokens {each}{total} in {self.decoder_layers} decoder layers{inside}{encoder}; {times}{noted}"


def _runs(counts: list[int]) -> str:
    """Numbers in a row, repeated ones once: "6 x 576, 364"."""
    groups = [(count, len(list(group))) for count, group in itertools.groupby(counts)]
    return ", ".join(f"{times} x {count}" if times > 1 else str(count) for count, times in groups)


def _flat(image: ImageReport) -> dict[str, Any]:
    """A row of the table of a report."""
    share = image.after / image.before
    values = (image.item, image.part, image.row, image.modality, *image.grid, image.before, image.after, share, image.threshold)
    return dict(zip(COLUMNS, values, strict=True)) | {f"from_layer_{stage.layer}": len(stage.kept) for stage in image.stages}


def _renumbered(source: list[int], valid: Tensor) -> list[int]:
    """Output numbers without the invalid outputs."""
    number = (valid.cumsum(0) - 1).tolist()
    return [number[output] if output >= 0 else output for output in source]
