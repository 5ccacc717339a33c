"""Videos for Qwen's processors without torchvision: against loops, transformers' own processors, and through foveate's answers."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import string

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import foveate
from foveate import chat, frames
from foveate.loading import load
from foveate.video import Video, open_video

from . import families, zoo
from .cli.test_main import invoke
from .family_prompts import END, START, VIDEO

SMALL = dict(patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
NAMED = {zoo.PAD: "<pad>", 1: "<s>", zoo.EOS: "</s>", zoo.IMAGE: "<image>"}
NAMED |= {VIDEO: "<video>", START: "<|vision_start|>", END: "<|vision_end|>"}
# as Qwen's templates do; Qwen3's processor writes the same marks around each patch in time
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><video><|vision_end|>{% elif part['type'] == 'image' %}<|vision_start|><image><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
KINDS = {
    "qwen2_vl": (transformers.Qwen2VLProcessor, "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor"),
    "qwen3_vl": (transformers.Qwen3VLProcessor, "Qwen3VLVideoProcessor"),
}


@pytest.fixture(autouse=True)
def without_torchvision(monkeypatch):
    """Also where it is installed."""
    monkeypatch.setattr(frames, "is_torchvision_available", lambda: False)


def clip(count, height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def film(count=3, fps=4.0, **shape):
    """A video, every other frame of which is taken."""
    pictures = tuple(Image.fromarray(frame) for frame in clip(count, **shape))
    return Video(pictures, tuple(2 * number / fps for number in range(count)), fps, 2 * count / fps, ())


def tokenizer():
    """Writes letters, so that what it is given can be read again."""
    words = [NAMED.get(number, f"[{number}]") for number in range(zoo.VOCABULARY)]
    words[20 : 20 + len(string.printable)] = string.printable
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[10]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    marks = {"image_token": "<image>", "video_token": "<video>"}
    marks |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=marks, **special)


def processor(family="qwen2_5_vl", **settings):
    kind, stock = KINDS[family]
    return frames.build_processor(
        kind,
        image_processor=transformers.Qwen2VLImageProcessorPil(**SMALL),
        tokenizer=tokenizer(),
        video_processor=frames.build_video_processor(stock, **SMALL | settings),
        chat_template=TEMPLATE,
    )


@pytest.fixture(params=list(KINDS))
def folder(request, tmp_path):
    """A random model and its processor, saved."""
    shutil.copytree(families.saved(request.param), tmp_path / request.param)
    processor(request.param).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def slow_patches(video, side, depth, group, mean, std):
    """Patches [count, values] of frames [F, H, W, 3], written from the documented order."""
    shown = [*video]
    while len(shown) % depth:
        shown.append(shown[-1])
    rows, columns = video.shape[1] // side, video.shape[2] // side
    patches = []
    for t in range(len(shown) // depth):
        for high in range(rows // group):
            for wide in range(columns // group):
                for down in range(group):
                    for right in range(group):
                        top, left = (high * group + down) * side, (wide * group + right) * side
                        patches.append(
                            [
                                (shown[t * depth + frame][top + y, left + x, channel] / 255 - mean[channel]) / std[channel]
                                for channel in range(3)
                                for frame in range(depth)
                                for y in range(side)
                                for x in range(side)
                            ]
                        )
    return np.array(patches), (len(shown) // depth, rows, columns)


@pytest.mark.parametrize(
    ("count", "side", "depth", "group"), [(4, 4, 2, 2), (3, 4, 2, 2), (1, 2, 3, 1), (5, 2, 2, 4), (4, 8, 1, 1)]
)
def test_patches_in_the_documented_order(count, side, depth, group):
    video, mean, std = clip(count), [0.1, 0.5, 0.9], [0.2, 0.25, 0.3]
    settings = dict(patch_size=side, temporal_patch_size=depth, merge_size=group, image_mean=mean, image_std=std)
    expected, grid = slow_patches(video, side, depth, group, mean, std)
    for stock in frames.STAND_INS:
        made = frames.build_video_processor(stock, **settings)(video, do_resize=False, do_sample_frames=False, return_tensors="pt")
        assert made["video_grid_thw"].tolist() == [[*grid]]
        np.testing.assert_allclose(made["pixel_values_videos"], expected, atol=1e-5)


@pytest.mark.parametrize(("size", "levels"), [((24, 40), 0), ((50, 35), 2), ((120, 90), 2), ((7, 9), 2)])
def test_two_equal_frames_are_a_picture(size, levels):
    """As transformers' own processor of pictures cuts it, up to rounding where it is scaled."""
    picture = Image.fromarray(clip(1, *size)[0])
    expected = transformers.Qwen2VLImageProcessorPil(**SMALL)(picture, return_tensors="pt")
    made = frames.build_video_processor(**SMALL)([picture, picture], return_tensors="pt")
    assert torch.equal(made["video_grid_thw"], expected["image_grid_thw"])
    atol = 1e-5 + levels / 255 / 0.26
    torch.testing.assert_close(made["pixel_values_videos"], expected["pixel_values"], atol=atol, rtol=0)


def test_videos_of_several_sizes_in_one_call():
    processor = frames.build_video_processor(**SMALL)
    videos = [clip(3, 40, 56), clip(2, 33, 20, seed=1), clip(4, 40, 56, seed=2)]
    together = processor(videos, return_tensors="pt")
    alone = [processor(video, return_tensors="pt") for video in videos]
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(together[name], torch.cat([each[name] for each in alone]))
    assert together["video_grid_thw"][:, 0].tolist() == [2, 1, 2]


def test_frames_may_be_arrays_tensors_or_pictures():
    made = frames.build_video_processor(**SMALL)
    video = clip(3, 30, 44)
    expected = made(video)["pixel_values_videos"]
    pictures = [Image.fromarray(frame) for frame in video]
    first = video.transpose(0, 3, 1, 2)
    flat = np.broadcast_to(np.uint8([[[[255, 0, 0]]]]), (2, 4, 16, 3))  # 4 pixels high are no 4 channels
    assert torch.equal(made(flat)["pixel_values_videos"], made(flat, input_data_format="channels_last")["pixel_values_videos"])
    for given in (pictures, [pictures], [*video], [video], first, torch.tensor(video), torch.tensor(first.copy()), [[pictures]]):
        assert torch.equal(made(given)["pixel_values_videos"], expected)
    assert made(video, return_tensors="np")["pixel_values_videos"].shape == expected.shape
    torch.testing.assert_close(made(video.astype(np.int64))["pixel_values_videos"], expected, atol=0.4, rtol=0)  # not cut off
    numbers = dict(do_rescale=False, do_normalize=False, do_resize=False)
    assert made(clip(2), **numbers)["pixel_values_videos"].unique().tolist() == np.unique(clip(2)).tolist()


def test_grey_and_transparent_frames():
    made = frames.build_video_processor(**SMALL)
    grey = clip(2, 16, 16)[..., :1]
    expected = made(grey.repeat(3, 3))["pixel_values_videos"]
    pictures = [Image.fromarray(frame[..., 0]) for frame in grey]
    assert all(torch.equal(made(given)["pixel_values_videos"], expected) for given in (grey, pictures))
    clear = np.concatenate([clip(2, 16, 16), np.zeros((2, 16, 16, 1), np.uint8)], 3)
    white = made(np.full((2, 16, 16, 3), 255, np.uint8))["pixel_values_videos"]
    for given in (clear, [Image.fromarray(frame) for frame in clear]):
        torch.testing.assert_close(made(given)["pixel_values_videos"], white)


def test_sizes_by_the_rules_of_transformers():
    """Which are in files that need no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as of_a_frame
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_a_video

    chance = random.Random(0)
    for _ in range(60):
        side, step = chance.choice([1, 2]) * chance.choice([4, 14]), chance.choice([1, 2])
        count, height, width = chance.randint(step, 9), chance.randint(3, 150), chance.randint(3, 150)
        least = side * side * chance.randint(1, 40)
        most = least + side * side * chance.randint(1, 400)
        settings = dict(patch_size=side, merge_size=1, temporal_patch_size=step)
        settings |= dict(size={"shortest_edge": least, "longest_edge": most}, do_sample_frames=False)
        sizes = of_a_frame(height, width, side, least, most), of_a_video(count, height, width, step, side, least, most)
        for stock, size in zip(frames.STAND_INS, sizes, strict=True):
            grid = frames.build_video_processor(stock, **settings)(clip(count, height, width))["video_grid_thw"].tolist()
            assert grid == [[-(-count // step), size[0] // side, size[1] // side]]


@pytest.mark.parametrize(
    ("stock", "options", "expected"),
    [
        ("Qwen2VLVideoProcessor", {"num_frames": 4}, [0, 2, 5, 7]),
        ("Qwen2VLVideoProcessor", {"num_frames": 3}, [0, 2, 5, 7]),  # whole patches in time
        ("Qwen2VLVideoProcessor", {"fps": 5}, [0, 1, 3, 5, 6, 8]),  # of 10 frames at 8 a second
        ("Qwen2VLVideoProcessor", {"fps": 1}, [0, 2, 5, 7]),  # not fewer than 4
        ("Qwen3VLVideoProcessor", {"num_frames": 4}, [0, 3, 6, 9]),
        ("Qwen3VLVideoProcessor", {"fps": 5}, [0, 2, 4, 5, 7, 9]),
        ("Qwen3VLVideoProcessor", {}, [0, 3, 6, 9]),
    ],
)
def test_frames_are_chosen(stock, options, expected):
    made, video = frames.build_video_processor(stock, **SMALL), clip(10)
    known = {"video_metadata": [{"total_num_frames": 10, "fps": 8.0, "duration": 1.25}], "return_metadata": True}
    chosen = made(video, do_sample_frames=True, **options, **known)
    assert [int(number) for number in chosen["video_metadata"][0].frames_indices] == expected
    plain = made(video[expected], do_sample_frames=False)
    assert torch.equal(chosen["pixel_values_videos"], plain["pixel_values_videos"])


def test_bounds_for_densely_sampled_videos():
    """``cap_pixels_per_frame``: many frames share a number of pixels."""
    for stock in frames.STAND_INS:
        made = frames.build_video_processor(stock, **SMALL, max_video_tokens=1, do_sample_frames=False)
        free, capped = (made(clip(8, 64, 64), cap_pixels_per_frame=cap)["video_grid_thw"] for cap in (False, True))
        assert 0 < capped.prod() < free.prod()


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        ("clip.mp4", {}, r"a video is its frames, \[F, H, W, 3\] or a list of pictures"),
        ([["a.png", "b.png"]], {}, "a video is its frames"),
        ([], {}, "this is no video"),
        (None, {}, "this is no video"),
        (7, {}, "this is no video"),
        (clip(0), {}, "a video is its frames"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], {}, "Give its frames, all of one size"),
        (np.zeros((2, 16, 16, 5), np.uint8), {}, r"have no channels: \(2, 16, 16, 5\)"),
        (clip(2, 2, 500), {}, "too long and thin"),
        (clip(2, 10, 16), {"do_resize": False}, "16 x 10 pixels have no whole groups of 8"),
        (clip(2), {"size": {"height": 8, "width": 8}}, "the least and the most pixels"),
        (clip(2), {"resample": Image.Resampling.LANCZOS}, "BICUBIC or BILINEAR"),
        (clip(2), {"colour": 1}, "no setting 'colour'"),
        (clip(2), {"video_metadata": [{"total_num_frames": 2}] * 2}, "no metadata of 1 videos"),
        (clip(2), {"video_metadata": [{"frames": 2}]}, "no metadata of 1 videos"),
        (clip(2), {"do_sample_frames": True}, "give one of num_frames and fps"),
        (clip(2), {"do_sample_frames": True, "fps": 1, "num_frames": 2}, "give one of num_frames and fps"),
        (clip(2), {"do_sample_frames": True, "fps": 1}, "fps needs the metadata"),
        (clip(2), {"do_sample_frames": True, "num_frames": 4}, "4 frames cannot be chosen from a video of 2"),
        (clip(2), {"do_sample_frames": True, "num_frames": 4, "video_metadata": [{"total_num_frames": 9}]}, "and 2 are given"),
    ],
)
def test_what_is_no_video(videos, options, message):
    with pytest.raises(foveate.InputError, match=message):
        frames.build_video_processor(**SMALL)(videos, **options)


def test_what_is_too_short_for_qwen3():
    made = frames.build_video_processor("Qwen3VLVideoProcessor", **SMALL)
    with pytest.raises(foveate.InputError, match="at least 2 frames of a video, not 1"):
        made(clip(1), do_sample_frames=False)
    with pytest.raises(foveate.InputError, match="give one of num_frames and fps"):
        made(clip(4), num_frames=2, fps=1)


# -- whole processors


def test_the_processor_is_transformers_own(folder):
    kind, stock = KINDS[folder.name]
    loaded = load(str(folder))
    assert type(loaded.processor) is kind
    assert type(loaded.processor.video_processor) is frames.STAND_INS[stock]
    assert loaded.processor.chat_template == TEMPLATE
    again = pickle.loads(pickle.dumps(loaded.processor))  # noqa: S301
    assert again.to_dict() == loaded.processor.to_dict() == processor(folder.name).to_dict()
    assert loaded.weights == load(str(folder)).weights


def test_saved_under_the_name_of_transformers_class(folder, tmp_path):
    """With settings of its own, which come back."""
    made = processor(folder.name, image_mean=[0.5] * 3, image_std=[0.25] * 3, temporal_patch_size=3, do_sample_frames=False)
    made.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert written["processor_class"] == type(made).__name__
    assert written["video_processor"]["video_processor_type"] == KINDS[folder.name][1]
    again = frames.load_processor(tmp_path / "saved", local_files_only=True)
    assert again.to_dict() == made.to_dict()
    video = clip(4, 30, 50)
    before, after = (each.video_processor(video)["pixel_values_videos"] for each in (made, again))
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_files_as_they_are_on_the_hub(folder, kind):
    """Settings for pictures and videos in one file, with older names; the class of the processor is in the model's config."""
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").rename(folder / "template")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": (folder / "template").read_text()}))
    shared = dict(patch_size=4, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    written = shared | dict(min_pixels=64, max_pixels=4096, image_processor_type=kind)
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    loaded = frames.load_processor(folder)
    assert type(loaded) is KINDS[folder.name][0]
    assert loaded.chat_template == TEMPLATE
    videos = loaded.video_processor
    assert dict(videos.size) == SMALL["size"]
    assert (videos.patch_size, [*videos.image_std], videos.fps) == (4, [0.25] * 3, 2 if folder.name == "qwen3_vl" else None)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(SMALL | dict(do_sample_frames=False, max_frames=8)))
    videos = frames.load_processor(folder).video_processor
    assert (videos.max_frames, videos.do_sample_frames) == (8, False)
    assert [*videos.image_std] != [0.25] * 3  # the first of the two files counts


def test_other_processors_are_loaded_as_before(monkeypatch, folder):
    from foveate.pocket import WEIGHTS

    assert type(frames.load_processor(WEIGHTS)) is transformers.LlavaProcessor
    with pytest.raises(OSError, match="nowhere"):
        frames.load_processor(folder / "nowhere")
    calls = []
    monkeypatch.setattr(frames, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *given, **options: calls.append((given, options)))
    frames.load_processor(folder, local_files_only=True)
    assert calls == [((folder,), {"local_files_only": True})]
    monkeypatch.setattr(transformers, "Qwen2VLVideoProcessor", dict)
    assert frames.build_video_processor(patch_size=8) == {"patch_size": 8}
    assert frames.build_processor(dict, tokenizer=None) == {"tokenizer": None}


def test_other_parts_are_checked_as_before():
    parts = dict(image_processor=tokenizer(), tokenizer=tokenizer(), video_processor=frames.build_video_processor())
    with pytest.raises(TypeError, match="for argument image_processor"):
        frames.build_processor(transformers.Qwen2_5_VLProcessor, **parts)


def test_seconds_of_a_patch():
    made = processor()
    text = "a<video>b<video>"
    videos = [clip(4, 32, 32), clip(3, 32, 32)]
    metadata = [{"total_num_frames": 16, "fps": 8.0, "frames_indices": [0, 4, 8, 12]}, {"total_num_frames": 3, "fps": 1.0}]
    inputs = made(text=[text], videos=videos, video_metadata=metadata, return_metadata=True, return_tensors="pt")
    assert inputs["second_per_grid_ts"].tolist() == [1.0, 2.0]  # 4 of 16 frames at 8 a second are 2 a second
    assert [data.fps for data in inputs["video_metadata"]] == [8.0, 1.0]
    assert (inputs["input_ids"] == VIDEO).sum() == inputs["video_grid_thw"].prod(1).sum() // 4
    inputs = made(text=[text], videos=videos, return_tensors="pt")
    np.testing.assert_allclose(inputs["second_per_grid_ts"], 2 / 24)  # where nobody knows
    assert "video_metadata" not in inputs


def test_frames_that_are_chosen_already(folder):
    """As foveate hands them over: all are used, and the prompt has their times."""
    loaded, video = load(str(folder)), film(3, height=40, width=56)
    inputs, note = chat.make_inputs(loaded.processor, loaded.model, video, "what?")
    assert note is None
    grid = inputs["video_grid_thw"][0]
    assert grid.tolist()[0] == 2
    expected = loaded.processor.video_processor([*video.frames], do_sample_frames=False)
    torch.testing.assert_close(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    prompt = loaded.processor.decode(inputs["input_ids"][0])
    if folder.name == "qwen3_vl":
        frame = "<|vision_start|>" + "<video>" * int(grid[1:].prod() // 4) + "<|vision_end|>"
        assert prompt == f"<|vision_start|><0.2 seconds>{frame}<1.0 seconds>{frame}<|vision_end|>what?"
    else:
        assert prompt == "<|vision_start|>" + "<video>" * int(grid.prod() // 4) + "<|vision_end|>what?"
    if folder.name == "qwen2_5_vl":
        assert inputs["second_per_grid_ts"].tolist() == [1.0]  # 2 frames a second, 2 in a patch


def test_answers_about_videos(folder, capsys, monkeypatch, tmp_path):
    """The command line, with a method that shortens the prompt, and a batch of two videos."""
    pictures = [frame.resize((48, 40)) for frame in film(4).frames]
    pictures[0].save(tmp_path / "move.gif", save_all=True, append_images=pictures[1:], duration=500)
    command = ("ask", str(tmp_path / "move.gif"), "what?", "--frames", "4", "--model", str(folder), "--max-new-tokens", "3")
    code, out, err = invoke(capsys, monkeypatch, *command, "--method", "divprune", "--budget", "7", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert chat.AS_PICTURES not in document["notes"]
    before = 24 if folder.name == "qwen3_vl" else 60  # 4096 pixels are the most for a video there, here for a frame
    assert document["visual_tokens_before"] == before
    assert document["visual_tokens"]["divprune"] == 7
    assert [frame["seconds"] for frame in document["video"]["frames"]] == [0, 1.0]
    loaded = load(str(folder))
    video = open_video(tmp_path / "move.gif", 4)
    prompts = [chat.question_about(loaded.processor, loaded.model, video, text) for text in ("what?", "where is it?")]
    inputs = chat.collate(loaded, prompts)
    assert (inputs["video_grid_thw"].prod(1) // 4).tolist() == [before] * 2
    options = dict(max_new_tokens=3, do_sample=False)
    together = loaded.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        single = chat.collate(loaded, [prompt])
        alone = loaded.model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()


def test_as_transformers_with_torchvision(folder):
    """The same numbers and settings, and files that both read."""
    pytest.importorskip("torchvision")
    stock = getattr(transformers, KINDS[folder.name][1])
    theirs, ours = stock.from_pretrained(folder), frames.load_processor(folder).video_processor
    assert type(transformers.AutoProcessor.from_pretrained(folder).video_processor) is stock
    assert theirs.to_dict() == ours.to_dict()
    chance = random.Random(0)
    for _ in range(20):
        videos = [clip(chance.randint(2, 7), chance.randint(20, 90), chance.randint(20, 90)) for _ in range(chance.randint(1, 3))]
        options = dict(do_sample_frames=False, return_metadata=True, cap_pixels_per_frame=chance.random() < 0.5)
        options |= dict(patch_size=chance.choice([4, 7]), merge_size=chance.choice([1, 2]))
        options |= dict(resample=chance.choice([2, 3]), do_rescale=chance.random() < 0.8, do_normalize=chance.random() < 0.8)
        expected, made = theirs(videos, **options), ours(videos, **options)
        for name in ("pixel_values_videos", "video_grid_thw"):
            assert torch.equal(expected[name], made[name])
        assert expected["video_metadata"] == made["video_metadata"]
