"""Prompts and tensors as the processor of each family makes them, written from what the processors do and not with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import zoo

IMAGE, VIDEO = zoo.IMAGE, 6
START, END, BREAK, TILE, GLOBAL, NEWLINE = 7, 8, 9, 10, 11, 12  # what stands around placeholders; all of it is text
INDICATORS = (13, 14, 15, 16, 17)  # Ovis2: begin of a picture, end, end of the small picture, between tiles, between rows of them
FIRST_WORD = 20


@dataclass(frozen=True)
class Medium:
    """A picture, or a video of ``frames`` frames.

    ``size`` is in pixels (LLaVA-NeXT, OneVision, Mistral 3), patches (Qwen, GLM) or tiles (the others), high and wide.
    """

    size: tuple[int, int] = (1, 1)
    frames: int = 0

    @property
    def kind(self) -> Literal["image", "video"]:
        return "video" if self.frames else "image"

    @property
    def token(self) -> int:
        return VIDEO if self.frames else IMAGE


class Place(NamedTuple):
    """What a placeholder stands for: a cell of a grid, a token in front of one, the newline of a line, the end of an item."""

    kind: Literal["cell", "lead", "newline", "end"]
    line: int = 0


class Laid(NamedTuple):
    """Token ids of a medium, and what the placeholders of each of its items stand for."""

    ids: list[int]
    items: list[list[Place]]


Lay = Callable[[Medium, int], Laid]  # of a medium, in a row of so many pictures
Pixels = Sequence[tuple[Medium, Tensor]]  # of a row
Collate = Callable[[Sequence[Pixels]], dict[str, Tensor]]


def cells(rows: int, columns: int, line: int = 0) -> list[Place]:
    return [Place("cell", line + row) for row in range(rows) for _ in range(columns)]


def plain(side: int, before: Sequence[int] = (), after: Sequence[int] = (), lead: int = 0) -> Lay:
    """A square grid, or one for each frame of a video with ``lead`` tokens in front."""

    def lay(medium: Medium, _: int) -> Laid:
        places = cells(side, side)
        for frame in range(medium.frames):
            places = [] if frame == 0 else places
            places += [Place("lead")] * lead + cells(side, side, frame * side)
        return Laid([*before, *[medium.token] * len(places), *after], [places])

    return lay


def fitting(size: tuple[int, int], tile: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the shapes, in tiles, the one on which most of a picture's pixels survive; then the one with the least left over."""
    height, width = size

    def worth(shape: tuple[int, int]) -> tuple[int, int]:
        scale = min(shape[1] * tile / width, shape[0] * tile / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        return useful, useful - shape[0] * shape[1] * tile * tile

    return max(shapes, key=worth)


def unpadded(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that show the picture; what is above and below, or left and right of it, was padding."""
    height, width = size
    if width / height > columns / rows:
        return rows - (rows - int(round(height * columns / width, 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * rows / height, 7))) // 2 * 2


@dataclass(frozen=True)
class Anyres:
    """LLaVA-NEXT and OneVision: the whole picture in small, then its tiles side by side, each line of them with a newline.

    ``most`` is from which number of tiles on OneVision shrinks them; its rows of several pictures have no tiles.
    """

    side: int
    shapes: tuple[tuple[int, int], ...]
    frame: int = 0
    most: int = 0

    @property
    def pixels(self) -> int:
        return self.side * zoo.PATCH

    @property
    def pinpoints(self) -> list[list[int]]:
        return [[high * self.pixels, wide * self.pixels] for high, wide in self.shapes]

    def lay(self, medium: Medium, pictures: int) -> Laid:
        if medium.frames:
            places = [place for f in range(medium.frames) for place in cells(self.frame, self.frame, f * self.frame)]
            places += [Place("end")] * bool(self.most)
        elif self.most and pictures > 1:
            places = [*cells(self.side, self.side), Place("end")]
        else:
            rows, columns = self.large(medium)
            places = cells(self.side, self.side)
            for line in range(self.side, self.side + rows):
                places += [Place("cell", line)] * columns + [Place("newline", line)]
        return Laid([medium.token] * len(places), [places])

    def large(self, medium: Medium) -> tuple[int, int]:
        """Rows and columns of the tiles together."""
        high, wide = fitting(medium.size, self.pixels, self.shapes)
        rows, columns = unpadded(medium.size, high * self.side, wide * self.side)
        ratio = math.sqrt(rows * columns / (self.most * self.side**2)) if self.most else 0
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def shape(self, medium: Medium) -> tuple[int, ...]:
        """Of the pixels; for a picture of a row of several, OneVision takes the first tile of it."""
        if medium.frames:
            return (medium.frames, 3, self.pixels, self.pixels)
        high, wide = fitting(medium.size, self.pixels, self.shapes)
        return (1 + high * wide, 3, self.pixels, self.pixels)

    def collate(self, rows: Sequence[Pixels]) -> dict[str, Tensor]:
        inputs, counts, tiles, sizes = {}, [], [], []
        for row in rows:
            mine = [(medium, tensor) for medium, tensor in row if not medium.frames]
            counts += [len(mine)] * bool(mine)
            tiles += [tensor[:1] if self.most and len(mine) > 1 else tensor for _, tensor in mine]
            sizes += [medium.size for medium, _ in mine]
        if tiles:
            inputs = {"pixel_values": torch.nn.utils.rnn.pad_sequence(tiles, True), "image_sizes": torch.tensor(sizes)}
            if self.most:
                inputs["batch_num_images"] = torch.tensor(counts)
        return inputs | stacked_videos(rows)


def tiles_in_one_run(side: int) -> Lay:
    """InternVL: the tiles of a picture follow each other without anything between them."""

    def lay(medium: Medium, _: int) -> Laid:
        number = math.prod(medium.size)
        places = [place for tile in range(number) for place in cells(side, side, tile * side)]
        return Laid([START, *[IMAGE] * len(places), END], [places])

    return lay


def tiles_apart(side: int, *, breaks: bool) -> Lay:
    """Idefics 3 and Aya Vision: text in front of each tile, the whole picture last; Idefics 3 ends lines of tiles with a break."""

    def lay(medium: Medium, _: int) -> Laid:
        (rows, columns), tile = medium.size, [IMAGE] * side**2
        split = rows * columns > 1
        ids = [] if breaks else [START]
        for _ in range(rows if split else 0):
            for _ in range(columns):
                ids += ([START] if breaks else []) + [TILE, *tile]
            ids += [NEWLINE] * breaks
        ids += [NEWLINE] * (breaks and split) + [START] * breaks + [GLOBAL, *tile, END]
        return Laid(ids, [cells(side, side)] * (rows * columns * split + 1))

    return lay


def tiles_with_breaks(side: int) -> Lay:
    """Cohere2 Vision: a break after each tile, the whole picture last."""

    def lay(medium: Medium, _: int) -> Laid:
        tiles = tiles_of(medium, whole=True)
        return Laid([START, *([IMAGE] * side**2 + [BREAK]) * tiles, END], [cells(side, side)] * tiles)

    return lay


def tiles_with_separators(side: int) -> Lay:
    """Llama 4: a mark between tiles of a line, another after each line, the whole picture last, after a mark of its own."""

    def lay(medium: Medium, _: int) -> Laid:
        (rows, columns), tile = medium.size, [IMAGE] * side**2
        split, ids = rows * columns > 1, [START]
        for _ in range(rows if split else 0):
            ids += [*([*tile, TILE] * columns)[:-1], BREAK]
        return Laid([*ids, GLOBAL, *tile, END], [cells(side, side)] * (rows * columns * split + 1))

    return lay


def tiles_with_indicators(side: int) -> Lay:
    """Ovis2: the whole picture first, and tokens of the model's own between tiles."""
    begin, end, small, column, row = INDICATORS

    def lay(medium: Medium, _: int) -> Laid:
        (rows, columns), tile = medium.size, [IMAGE] * side**2
        ids = [begin, *tile, small]
        for at in range(rows * columns if rows * columns > 1 else 0):
            ids += [*tile, column if (at + 1) % columns else row]
        return Laid([*(ids[:-1] if rows * columns > 1 else ids), end], [cells(side, side)] * tiles_of(medium, whole=True))

    return lay


def tiles_of(medium: Medium, *, whole: bool) -> int:
    """Pictures that a medium is for the encoder; with ``whole``, one more where there are several."""
    number = math.prod(medium.size)
    return number + (whole and number > 1)


def lines(merged: int) -> Lay:
    """Mistral 3: each line of placeholders ends with a token of text, and the last one with another."""

    def lay(medium: Medium, _: int) -> Laid:
        rows, columns = medium.size[0] // merged, medium.size[1] // merged
        ids = ([IMAGE] * columns + [BREAK]) * rows
        return Laid([*ids[:-1], END], [cells(rows, columns)])

    return lay


def in_pixels(merged: int) -> Lay:
    """LightOnOCR, and LFM2-VL in patches: the lines of a picture follow each other without anything between them."""

    def lay(medium: Medium, _: int) -> Laid:
        rows, columns = medium.size[0] // merged, medium.size[1] // merged
        return Laid([START, *[IMAGE] * (rows * columns), END], [cells(rows, columns)])

    return lay


def packed(*, timestamps: bool = False) -> Lay:
    """Qwen and GLM: four patches to a token; Qwen 3 writes the time in front of each frame, and the frames apart."""

    def lay(medium: Medium, _: int) -> Laid:
        rows, columns = medium.size[0] // 2, medium.size[1] // 2
        frames = max(1, medium.frames)
        places = [place for frame in range(frames) for place in cells(rows, columns, frame * rows)]
        if not (timestamps and medium.frames):
            return Laid([START, *[medium.token] * len(places), END], [places])
        ids: list[int] = []
        for frame in range(frames):
            ids += [FIRST_WORD + frame, FIRST_WORD, START, *[VIDEO] * (rows * columns), END]
        return Laid(ids, [places])

    return lay


def framed() -> Lay:
    """GLM: pictures as Qwen has them; each frame of a video as a picture, with its time behind it."""

    def lay(medium: Medium, _: int) -> Laid:
        rows, columns = medium.size[0] // 2, medium.size[1] // 2
        frame, number = [START, *[IMAGE] * (rows * columns), END], max(1, medium.frames)
        places = [place for at in range(number) for place in cells(rows, columns, at * rows)]
        if not medium.frames:
            return Laid(frame, [places])
        return Laid([BREAK, *(token for at in range(number) for token in (*frame, FIRST_WORD + at)), BREAK], [places])

    return lay


def stacked_videos(rows: Sequence[Pixels]) -> dict[str, Tensor]:
    videos = [tensor for row in rows for medium, tensor in row if medium.frames]
    return {"pixel_values_videos": torch.stack(videos)} if videos else {}


def stacked(rows: Sequence[Pixels]) -> dict[str, Tensor]:
    """Pictures of one size, or tiles of pictures, one behind the other."""
    pictures = [tensor if tensor.ndim == 4 else tensor[None] for row in rows for medium, tensor in row if not medium.frames]
    return ({"pixel_values": torch.cat(pictures)} if pictures else {}) | stacked_videos(rows)


def padded_rows(rows: Sequence[Pixels]) -> dict[str, Tensor]:
    """Idefics 3: the tiles of each row, and tiles of zeros up to the longest one."""
    tiles = [[tile for _, tensor in row for tile in tensor] for row in rows]
    most, like = max(map(len, tiles)), next(tile for row in tiles for tile in row)
    filled = [torch.stack([*row, *[torch.zeros_like(like)] * (most - len(row))]) for row in tiles]
    real = torch.tensor([[number < len(row) for number in range(most)] for row in tiles])
    mask = real[..., None, None].expand(-1, -1, *like.shape[-2:]).long()
    return {"pixel_values": torch.stack(filled), "pixel_attention_mask": mask}


def padded_pictures(rows: Sequence[Pixels]) -> dict[str, Tensor]:
    """Mistral 3: pictures of different sizes, padded below and on the right."""
    pairs = [pair for row in rows for pair in row]
    high, wide = (max(medium.size[axis] for medium, _ in pairs) for axis in (0, 1))
    pads = [(0, wide - medium.size[1], 0, high - medium.size[0]) for medium, _ in pairs]
    pictures = [torch.nn.functional.pad(tensor, pad) for (_, tensor), pad in zip(pairs, pads, strict=True)]
    return {"pixel_values": torch.stack(pictures), "image_sizes": torch.tensor([medium.size for medium, _ in pairs])}


def padded_patches(rows: Sequence[Pixels]) -> dict[str, Tensor]:
    """LFM2-VL: the patches of each picture, padded to the longest."""
    pairs = [pair for row in rows for pair in row]
    pixels = torch.nn.utils.rnn.pad_sequence([tensor for _, tensor in pairs], batch_first=True)
    real = torch.tensor([[at < len(tensor) for at in range(pixels.shape[1])] for _, tensor in pairs])
    shapes = torch.tensor([medium.size for medium, _ in pairs])
    return {"pixel_values": pixels, "pixel_attention_mask": real.long(), "spatial_shapes": shapes}


def apart(merged: int) -> Lay:
    """Gemma 4: the lines of a picture follow each other; each frame of a video is a picture after its time."""

    def lay(medium: Medium, _: int) -> Laid:
        rows, columns = medium.size[0] // merged, medium.size[1] // merged
        places = [place for frame in range(max(1, medium.frames)) for place in cells(rows, columns, frame * rows)]
        if not medium.frames:
            return Laid([START, *[IMAGE] * (rows * columns), END], [places])
        ids: list[int] = []
        for frame in range(medium.frames):
            ids += [FIRST_WORD + frame, START, *[VIDEO] * (rows * columns), END]
        return Laid(ids, [places])

    return lay


def placed_patches(rows: Sequence[Pixels]) -> dict[str, Tensor]:
    """Gemma 4: the patches of each picture, and of each frame of a video, padded to the longest; each says its column and row."""
    inputs: dict[str, Tensor] = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pairs = [pair for row in rows for pair in row if pair[0].kind == kind]
        frames = [(medium.size, frame) for medium, tensor in pairs for frame in tensor]
        if not frames:
            continue
        inputs[name] = torch.nn.utils.rnn.pad_sequence([frame for _, frame in frames], batch_first=True)
        places = torch.full((*inputs[name].shape[:2], 2), -1)
        for own, ((high, wide), _) in zip(places, frames, strict=True):
            own[: high * wide] = torch.tensor([[column, row] for row in range(high) for column in range(wide)])
        inputs[f"{kind}_position_ids"] = places
        if kind == "video":
            inputs["num_frames_per_video"] = torch.tensor([medium.frames for medium, _ in pairs])
    return inputs


def packed_patches(seconds: float | None = None) -> Collate:
    """Qwen and GLM: the patches of all pictures in one sequence, and of all videos in another; ``seconds`` from frame to frame."""

    def collate(rows: Sequence[Pixels]) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pairs = [pair for row in rows for pair in row if pair[0].kind == kind]
            if pairs:
                inputs[pixels] = torch.cat([tensor for _, tensor in pairs])
                inputs[f"{kind}_grid_thw"] = torch.tensor([[max(1, medium.frames), *medium.size] for medium, _ in pairs])
        if seconds is not None and "video_grid_thw" in inputs:
            inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), seconds)
        return inputs

    return collate
