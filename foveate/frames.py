"""Videos for Qwen's processors where torchvision is not installed, which transformers' own video processors need.

The two classes here make the same patches, grids and metadata from frames. They read and write the same files. Where torchvision is
installed, nothing here is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import VideosKwargs
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata, make_batched_videos

from .errors import InputError, first_line
from .images import as_rgb

MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}  # what torch can do
CHANNELS = (1, 3, 4)  # grey, RGB, RGB and how opaque


class _Settings(VideosKwargs, total=False):
    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool
    max_video_tokens: int


class Qwen2Frames(BaseVideoProcessor):
    """Stands in for ``Qwen2VLVideoProcessor``. Takes frames as arrays, tensors or pictures, no files."""

    stock = "Qwen2VLVideoProcessor"
    valid_kwargs: Any = _Settings
    model_input_names = ["pixel_values_videos", "video_grid_thw"]  # noqa: RUF012, as in the base
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    do_sample_frames = False
    resample = Image.Resampling.BICUBIC
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}  # noqa: RUF012
    image_mean, image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    patch_size, temporal_patch_size, merge_size = 14, 2, 2
    min_frames, max_frames = 4, 768
    cap_pixels_per_frame = None
    max_video_tokens = 128000

    def __init__(self, **settings: Any) -> None:
        # old files write the bounds of a frame under other names
        bounds = {"shortest_edge": settings.pop("min_pixels", None), "longest_edge": settings.pop("max_pixels", None)}
        size = dict(settings.pop("size", None) or self.size)
        super().__init__(size=size | {name: pixels for name, pixels in bounds.items() if pixels is not None}, **settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings, under the name of the class that reads them where torchvision is installed."""
        return super().to_dict() | {"video_processor_type": self.stock}

    def preprocess(self, videos: Any, **options: Any) -> transformers.BatchFeature:
        """Patches of videos.

        Parameters
        ----------
        videos : frames of one video or of several: arrays or tensors [F, H, W, 3] or [F, 3, H, W], or lists of pictures.
        **options : settings for this call.

        Returns
        -------
        BatchFeature : ``pixel_values_videos`` [patches, 3 * temporal_patch_size * patch_size^2] and ``video_grid_thw`` [videos, 3],
            with ``return_metadata`` also ``video_metadata``.

        Raises
        ------
        InputError : these are no frames, or the settings do not fit them.
        """
        names = self.valid_kwargs.__annotations__.keys()
        tensors = options.pop("return_tensors", None)
        if unknown := sorted(options.keys() - names):
            raise InputError(f"a video processor has no setting {unknown[0]!r}. It has: {', '.join(sorted(names))}.")
        given = {name: value for name, value in options.items() if value is not None}
        settings = SimpleNamespace(**{name: getattr(self, name, None) for name in names} | given)
        if ("fps" in given) != ("num_frames" in given):  # the one that is given replaces the other one of the processor
            settings.fps, settings.num_frames = given.get("fps"), given.get("num_frames")
        clips = [_channels_first(clip, settings.input_data_format) for clip in _clips(videos)]
        metadata = _metadata(clips, settings.video_metadata)
        made = [self._patches(clip, data, settings) for clip, data in zip(clips, metadata, strict=True)]
        values = {"pixel_values_videos": torch.cat([patches for patches, _ in made])}
        features = transformers.BatchFeature(values | {"video_grid_thw": torch.tensor([grid for _, grid in made])}, tensors)
        if settings.return_metadata:
            features["video_metadata"] = metadata
        return features

    def _patches(self, frames: Tensor, metadata: Any, settings: SimpleNamespace) -> tuple[Tensor, list[int]]:
        """Patches of one video, and how many there are in time, height and width; its metadata note the frames that are chosen."""
        if settings.do_sample_frames:
            index = self.chosen(metadata, settings)
            if index[-1] >= len(frames):
                raise InputError(f"by its metadata a video has {metadata.total_num_frames} frames, and {len(frames)} are given.")
            metadata.frames_indices, frames = index, frames[torch.as_tensor(index).long()]
        frames = frames if settings.device is None else frames.to(settings.device)
        if settings.do_resize:
            mode = MODES.get(Image.Resampling.BICUBIC if settings.resample is None else settings.resample)
            if mode is None:
                raise InputError("without torchvision, frames are scaled by BICUBIC or BILINEAR. Set resample to one of them.")
            target = self.target(len(frames), frames.shape[2], frames.shape[3], settings)
            frames = frames if target == frames.shape[2:] else interpolate(frames, target, mode=mode, antialias=True)
        return _cut(_normalised(frames, settings), settings)

    def target(self, frames: int, height: int, width: int, settings: SimpleNamespace) -> tuple[int, int]:
        """Height and width that frames are scaled to: whole groups of patches, with a number of pixels within bounds."""
        side, (least, most) = settings.patch_size * settings.merge_size, _bounds(settings)
        if settings.cap_pixels_per_frame:
            total = int(settings.max_video_tokens * side**2 * 0.9)
            most = max(min(most, total * settings.temporal_patch_size // frames), int(least * 1.05))
        return _rounded(height, width, side, least, most)

    def chosen(self, metadata: VideoMetadata, settings: SimpleNamespace) -> Any:
        """Numbers of the frames that are used of a video, evenly spread."""
        total, step, count = metadata.total_num_frames, settings.temporal_patch_size, settings.num_frames
        if settings.fps is not None and count is None:
            if metadata.fps is None:
                raise InputError("fps needs the metadata of the video, which say how many frames a second it has. Use num_frames.")
            most = math.floor(min(settings.max_frames, total) / step) * step
            count = min(max(total / metadata.fps * settings.fps, settings.min_frames), most, total)
            count = math.floor(count / step) * step
        elif count is not None and settings.fps is None:
            count = round(count / step) * step
        else:
            raise InputError("to choose frames, give one of num_frames and fps. Without a choice: do_sample_frames=False.")
        if not 0 < count <= total:
            raise InputError(f"{count} frames cannot be chosen from a video of {total}. Change num_frames or fps.")
        return torch.arange(0, total, total / count).int()


class Qwen3Frames(Qwen2Frames):
    """Stands in for ``Qwen3VLVideoProcessor``: bounds are for the pixels of a whole video, and frames are chosen by default."""

    stock = "Qwen3VLVideoProcessor"
    do_sample_frames = True
    size = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}  # noqa: RUF012
    image_mean, image_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    patch_size = 16
    fps = 2
    max_video_tokens = 768

    def target(self, frames: int, height: int, width: int, settings: SimpleNamespace) -> tuple[int, int]:
        side, step, (least, most) = settings.patch_size * settings.merge_size, settings.temporal_patch_size, _bounds(settings)
        if frames < step:
            raise InputError(f"this model needs at least {step} frames of a video, not {frames}.")
        if settings.cap_pixels_per_frame:
            most = frames * max(min(settings.max_video_tokens * side**2, most // frames), int(least * 1.05))
        if min(height, width) < side:
            scale = max(side / height, side / width)
            height, width = int(height * scale), int(width * scale)
        return _rounded(height, width, side, least, most, frames, round(frames / step) * step)

    def chosen(self, metadata: VideoMetadata, settings: SimpleNamespace) -> Any:
        total, count = metadata.total_num_frames, settings.num_frames
        if count is not None and settings.fps is not None:
            raise InputError("to choose frames, give one of num_frames and fps.")
        if count is None:
            metadata.fps = 24 if metadata.fps is None else metadata.fps
            count = total if settings.fps is None else int(total / metadata.fps * settings.fps)
            count = min(max(count, settings.min_frames), settings.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int)


STAND_INS = {kind.stock: kind for kind in (Qwen2Frames, Qwen3Frames)}
PROCESSORS = {"Qwen2VLProcessor": Qwen2Frames, "Qwen2_5_VLProcessor": Qwen2Frames, "Qwen3VLProcessor": Qwen3Frames}


def build_video_processor(stock: str = Qwen2Frames.stock, **settings: Any) -> Any:
    """A video processor: transformers' own where torchvision is installed, else what stands in for it.

    Parameters
    ----------
    stock : the name of transformers' class: ``Qwen2VLVideoProcessor`` or ``Qwen3VLVideoProcessor``.
    **settings : of that class, such as ``patch_size`` and ``size``.
    """
    kind = getattr(transformers, stock) if is_torchvision_available() else STAND_INS[stock]
    return kind(**settings)


def build_processor(kind: Any, **parts: Any) -> Any:
    """A processor of a class of transformers, whose video processor may be one that stands in.

    Parameters
    ----------
    kind : the class, such as ``Qwen2_5_VLProcessor``.
    **parts : ``image_processor``, ``tokenizer``, ``video_processor``, ``chat_template``.
    """
    if is_torchvision_available():
        return kind(**parts)

    def check(self: Any, name: str, part: Any) -> Any:
        return isinstance(part, Qwen2Frames) or kind.check_argument_for_proper_class(self, name, part)

    # without torchvision, the class itself would refuse any video processor; once it is made, it does not ask again
    made = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})(**parts)
    made.__class__ = kind
    return made


def load_processor(source: str | Path, **options: Any) -> Any:
    """The processor of a model, with videos also where torchvision is not installed.

    Parameters
    ----------
    source : folder or Hub id.
    **options : for ``from_pretrained``, such as ``local_files_only``.
    """
    name = None if is_torchvision_available() else _class_name(source, options)
    if name not in PROCESSORS:
        return transformers.AutoProcessor.from_pretrained(source, **options)
    kind = getattr(transformers, name)
    parts = {
        "image_processor": transformers.AutoImageProcessor.from_pretrained(source, **options),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(source, **options),
        "video_processor": PROCESSORS[name].from_pretrained(source, **options),
        "chat_template": kind.get_processor_dict(source, **options)[0].get("chat_template"),
    }
    return build_processor(kind, **parts)


def _class_name(source: str | Path, options: dict[str, Any]) -> str | None:
    """Name of the class of a processor, from its own file or else by its model; None where neither says."""
    try:
        if name := transformers.ProcessorMixin.get_processor_dict(source, **options)[0].get("processor_class"):
            return name
        kind = PROCESSOR_MAPPING.get(type(transformers.AutoConfig.from_pretrained(source, **options)), None)
    except (OSError, ValueError):
        return None
    return getattr(kind, "__name__", None)


def _clips(videos: Any) -> list[Any]:
    """Each video as an array or a tensor with four dimensions."""
    try:
        clips = make_batched_videos(_as_rgb(videos))
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"this is no video: {first_line(error)}. Give its frames, all of one size.") from error
    for clip in clips:
        if not isinstance(clip, np.ndarray | Tensor) or clip.ndim != 4 or 0 in clip.shape:
            raise InputError(
                "a video is its frames, [F, H, W, 3] or a list of pictures. A file: foveate.video.open_video(FILE).frames."
            )
    if not clips:
        raise InputError("there is no video. Give the frames of at least one.")
    return clips


def _metadata(clips: list[Tensor], given: Any) -> list[VideoMetadata]:
    try:
        made = make_batched_metadata(clips, given)
        if len(made) != len(clips):
            raise ValueError(f"there are {len(made)}")
        return made
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"these are no metadata of {len(clips)} videos: {first_line(error)}.") from error


def _as_rgb(videos: Any) -> Any:
    if isinstance(videos, Image.Image):
        return as_rgb(videos)
    return [_as_rgb(video) for video in videos] if isinstance(videos, list | tuple) else videos


def _channels_first(clip: Any, layout: Any) -> Tensor:
    """Frames [F, 3, H, W]; grey ones are repeated, and what is transparent is laid on white."""
    frames = clip if isinstance(clip, Tensor) else torch.tensor(clip)
    if layout == "channels_last" or (layout is None and frames.shape[1] not in (1, 3) and frames.shape[3] in CHANNELS):
        frames = frames.permute(0, 3, 1, 2)
    if frames.shape[1] not in CHANNELS:
        raise InputError(f"frames of a video have no channels: {tuple(clip.shape)}. Give arrays [F, H, W, 3] or [F, 3, H, W].")
    if frames.dtype not in (torch.uint8, torch.float32, torch.float64):
        frames = frames.float()  # what else there is cannot be scaled
    if frames.shape[1] == 4:
        opaque = frames[:, 3:] / 255
        frames = (1 - opaque) * 255 + opaque * frames[:, :3]
    return frames.expand(-1, 3, -1, -1).contiguous()


def _bounds(settings: SimpleNamespace) -> tuple[int, int]:
    """The least and the most pixels."""
    least, most = settings.size.get("shortest_edge"), settings.size.get("longest_edge")
    least, most = settings.min_pixels or least, settings.max_pixels or most  # of a call, where old code says so
    if not least or not most:
        raise InputError("the size of a video is {'shortest_edge': PIXELS, 'longest_edge': PIXELS}, the least and the most pixels.")
    return least, most


def _rounded(height: int, width: int, side: int, least: int, most: int, frames: int = 1, counted: int = 1) -> tuple[int, int]:
    """Height and width in multiples of ``side``, such that ``counted`` frames of that size have ``least`` to ``most`` pixels."""
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"frames of {width} x {height} pixels are too long and thin: one side is more than 200 times the other.")
    sides = round(height / side) * side, round(width / side) * side
    pixels, area = frames * height * width, counted * sides[0] * sides[1]
    if area > most:
        scale = math.sqrt(pixels / most)
        return max(side, math.floor(height / scale / side) * side), max(side, math.floor(width / scale / side) * side)
    if area < least:
        scale = math.sqrt(least / pixels)
        return math.ceil(height * scale / side) * side, math.ceil(width * scale / side) * side
    return sides


def _normalised(frames: Tensor, settings: SimpleNamespace) -> Tensor:
    """Pixels times the factor, less the mean, by the standard deviation, as far as the settings ask for it."""
    if not settings.do_normalize:
        return frames * settings.rescale_factor if settings.do_rescale else frames
    scale = 1.0 / settings.rescale_factor if settings.do_rescale else 1.0
    mean, std = (torch.tensor(value, device=frames.device) * scale for value in (settings.image_mean, settings.image_std))
    return (frames.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _cut(frames: Tensor, settings: SimpleNamespace) -> tuple[Tensor, list[int]]:
    """Frames [F, 3, H, W] as patches, and their grid.

    The last frame is repeated until the last patch is full. Patches are in the order of time, then of groups of ``merge_size`` by
    ``merge_size`` in rows and columns, then within a group; a patch holds its channels, each with its frames, rows and columns.
    """
    depth, side, group = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % depth, -1, -1, -1)])
    count, channels, height, width = frames.shape
    if height % (side * group) or width % (side * group):
        raise InputError(f"frames of {width} x {height} pixels have no whole groups of {side * group}. Use do_resize=True.")
    t, h, w = count // depth, height // side, width // side
    parts = frames.reshape(t, depth, channels, h // group, group, side, w // group, group, side)
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * depth * side * side), [t, h, w]
