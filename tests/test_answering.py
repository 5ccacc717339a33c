"""Questions about videos: what the model is given, what the command line says, and the strip of frames."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate import answering, chat
from foveate.report import ImageReport, StageReport
from foveate.video import Video, open_video
from foveate.viz import frames as frames_module
from foveate.viz import question as question_module
from foveate.viz.frames import by_frame, first_as_seen, frames_as_seen, save_strip, strips
from foveate.viz.overlay import overlay, save_figure
from foveate.viz.question import Way, save_question

from .cli.test_main import invoke

QUESTION = "how many objects are there ?"
AS_PICTURES = "this model takes no videos; the frames are given to it as pictures, in their order"


def scenes(count):
    """Pictures that the pocket model knows."""
    from random import Random

    from foveate.pocket.scenes import draw_scene

    return [draw_scene(Random(number), split="test", level=1).image for number in range(count)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A film of 9 scenes, a second each; 3 frames of it are the first, the fifth and the last."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 192, 192, "yuv420p", 4_000_000
        for scene in scenes(9):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(scene))))
        file.mux(stream.encode())
    return path


def test_ask_about_a_film(capsys, monkeypatch, clip, tmp_path):
    arguments = ("ask", str(clip), QUESTION, "--frames", "3", "--save", str(tmp_path / "strip.png"))
    code, out, err = invoke(capsys, monkeypatch, *arguments)
    assert code == 0, err
    assert len(out.split()) > 0
    assert f"note: {AS_PICTURES}" in err
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--json")
    document = json.loads(out)
    frames = document["video"]["frames"]
    assert document["video"]["fps"] == 1
    assert document["video"]["duration"] == 9
    assert [frame["seconds"] for frame in frames] == [0, 4, 8]
    assert [frame["before"] for frame in frames] == [576] * 3
    assert [frame["after"] for frame in frames] == [len(image["kept"]) for image in document["kept"]]
    total = document["visual_tokens"]["prumerge+"]
    assert 0 < total == sum(frame["after"] for frame in frames) < document["visual_tokens_before"] == 3 * 576
    each = ", ".join(f"{frame['seconds']:.2f} s {frame['after']} of 576" for frame in frames)
    assert f"visual tokens of the video 1728 -> {total}; frame by frame: {each}" in err
    assert document["notes"] == [AS_PICTURES]
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width == round(150 * (3 * 2.08 + 0.08))


def test_ask_about_a_film_equals_the_library(capsys, monkeypatch, clip):
    """The prompt is written by hand here: the frames in their order, then the question."""
    _, out, _ = invoke(capsys, monkeypatch, "ask", str(clip), QUESTION, "--frames", "3", "--budget", "100", "--json")
    document = json.loads(out)
    model, processor = foveate.load_pocket()
    prompt = f"<s> user: <image> <image> <image> {QUESTION} assistant:"
    frames = [*open_video(clip, 3).frames]
    for frame, number in zip(frames, (0, 4, 8), strict=True):
        assert np.abs(np.asarray(frame, float) - scenes(9)[number]).mean() < 6
    inputs = processor(text=prompt, images=frames, return_tensors="pt", add_special_tokens=False)
    with foveate.PruMergePlus(budget=100)(model) as session:
        out = model.generate(**inputs)
    assert document["answer"] == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert [image["kept"] for image in document["kept"]] == [image.kept for image in session.report.images]


def test_compare_at_the_same_cost(capsys, monkeypatch, clip):
    """The baselines keep in each frame what the method keeps in a frame on average."""
    arguments = ("ask", str(clip), QUESTION, "--frames", "2", "--method", "iti", "--compare", "--max-new-tokens", "2")
    document = json.loads(invoke(capsys, monkeypatch, *arguments, "--json")[1])
    tokens, layers = document["visual_tokens"], document["layers"]["iti"]
    assert tokens["full"] == 2 * 576
    assert tokens["spatial"] == tokens["random"] == 2 * round(sum(layers) / len(layers) / 2)


def test_moving_pictures_are_videos_where_frames_are_asked_for(capsys, monkeypatch, tmp_path):
    path = tmp_path / "move.gif"
    images = [Image.fromarray(scene) for scene in scenes(4)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=500)
    document = json.loads(invoke(capsys, monkeypatch, "ask", str(path), QUESTION, "--json")[1])
    assert document["video"] is None
    assert document["visual_tokens_before"] == 576
    assert document["notes"] == ["move.gif has 4 frames; the first one is used"]
    monkeypatch.setitem(sys.modules, "av", None)  # which it does not need
    document = json.loads(invoke(capsys, monkeypatch, "ask", str(path), QUESTION, "--frames", "2", "--json")[1])
    assert [frame["seconds"] for frame in document["video"]["frames"]] == [0, 1.5]
    assert document["visual_tokens_before"] == 2 * 576


def test_what_cannot_be_asked_about(capsys, monkeypatch, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("no picture")
    cases = [
        (("nowhere.mp4",), "there is no file nowhere.mp4"),
        ((str(tmp_path / "broken.mp4"),), "is damaged or no video"),
        ((str(tmp_path / "notes.txt"),), "is not a picture that Pillow can read"),
        ((str(tmp_path / "notes.txt"), "--frames", "4"), "is damaged or no video"),
        ((str(clip), "--frames", "0"), "frames"),
    ]
    for (file, *options), message in cases:
        code, out, err = invoke(capsys, monkeypatch, "ask", file, QUESTION, *options)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.strip().splitlines()) <= 2
    monkeypatch.setitem(sys.modules, "av", None)
    code, out, err = invoke(capsys, monkeypatch, "ask", str(clip), QUESTION)
    assert (code, out) == (2, "")
    assert "PyAV is not installed. Install it with: pip install 'foveate[video]'" in err


def test_prompts_that_are_too_long_are_named():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
    answers = {"iti": SimpleNamespace(prompt=4096), "full": SimpleNamespace(prompt=4620)}
    notes = answering.limits(SimpleNamespace(config=config), answers)
    assert notes == ["all tokens: the prompt has 4620 tokens, and the model was made for 4096"]


FILM = Video(tuple(Image.new("RGB", (56, 56), (20 * number, 0, 0)) for number in range(4)), (0.0, 0.4, 1.1, 1.5), 10.0, 2.0, ())


class VideoProcessor:
    """Takes videos, has no chat template, and remembers what it was given."""

    image_token, video_token, chat_template, video_processor = "<image>", "<video>", None, "one"

    def __call__(self, **given):
        from transformers import BatchFeature

        self.given = given
        return BatchFeature({"input_ids": torch.zeros(1, 3), "pixel_values_videos": torch.zeros(1, 4, 3, 8, 8)})


def as_model(kind):
    return SimpleNamespace(config=SimpleNamespace(model_type=kind), device="cpu", dtype=torch.bfloat16)


def test_families_with_videos_are_given_one():
    processor = VideoProcessor()
    inputs, _ = chat.make_inputs(processor, as_model("video_llava"), FILM, "what is it ?")
    given = processor.given
    assert given["text"] == ["USER: <video>\nwhat is it ? ASSISTANT:"]
    np.testing.assert_array_equal(given["videos"][0], [np.asarray(frame) for frame in FILM.frames])
    assert given["videos_kwargs"]["do_sample_frames"] is False
    metadata = given["videos_kwargs"]["video_metadata"][0]
    assert metadata["frames_indices"] == [0, 4, 11, 15]
    assert (metadata["total_num_frames"], metadata["fps"], metadata["duration"]) == (20, 10.0, 2.0)
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    with pytest.raises(foveate.InputError, match="'<video>', which stands for"):
        chat.make_inputs(processor, as_model("video_llava"), FILM, "what is <video> ?")


def test_other_families_are_given_pictures():
    """Also one whose processor takes videos where the engine does not."""
    processor = VideoProcessor()
    assert chat.takes_videos(processor, as_model("qwen2_vl"))
    assert not chat.takes_videos(processor, as_model("paddleocr_vl"))
    assert not chat.takes_videos(SimpleNamespace(), as_model("video_llava"))
    chat.make_inputs(processor, as_model("paddleocr_vl"), FILM, "what is it ?")
    assert processor.given["text"] == ["USER: <image>\n<image>\n<image>\n<image>\nwhat is it ? ASSISTANT:"]
    assert processor.given["images"] == [[*FILM.frames]]


@pytest.fixture
def video_llava(tmp_path):
    """A random Video-LLaVA and its processor, in a folder."""
    pytest.importorskip("torchvision", reason="transformers' video processors need it")
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaProcessor
    from transformers import VideoLlavaForConditionalGeneration as Model
    from transformers.models.video_llava.video_processing_video_llava import VideoLlavaVideoProcessor

    from foveate.pocket.vocabulary import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    image, film = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(tokenizer))
    config = VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=image, video_token_index=film)
    Model(config).eval().save_pretrained(tmp_path)
    sizes = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    parts = dict(image_processor=CLIPImageProcessor(**sizes), video_processor=VideoLlavaVideoProcessor(**sizes))
    options = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    VideoLlavaProcessor(tokenizer=tokenizer, **parts, **options).save_pretrained(tmp_path)
    return tmp_path


def test_ask_video_llava(capsys, monkeypatch, clip, video_llava, tmp_path):
    arguments = ("ask", str(clip), "what is it ?", "--frames", "3", "--model", str(video_llava), "--max-new-tokens", "2")
    code, out, err = invoke(capsys, monkeypatch, *arguments, "--save", str(tmp_path / "strip.png"), "--budget", "15", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["visual_tokens_before"] == 3 * 17  # each frame has a [CLS]
    assert document["visual_tokens"]["prumerge+"] == 15 + 3
    assert [frame["before"] for frame in document["video"]["frames"]] == [16] * 3
    assert sum(frame["after"] for frame in document["video"]["frames"]) == 15
    assert AS_PICTURES not in document["notes"]
    assert (tmp_path / "strip.png").exists()


def report_of(kept, grid=(2, 2), stages=()):
    cells = grid[0] * grid[1]
    source = [kept.index(cell) if cell in kept else -1 for cell in range(cells)]
    stages = [StageReport(layer, [*left], None) for layer, left in stages]
    return ImageReport(0, cells, len(kept), grid, [*kept], source, None, None, stages)


def test_strips_show_each_frame_and_its_count():
    reports = [report_of([number]) for number in range(3)] + [report_of([0, 1, 2, 3])]
    ((label, panels),) = strips("mine", reports, FILM.frames, FILM.seconds).items()
    assert label == "mine: 7 of 16 tokens"
    assert [below for _, below in panels] == ["0.00 s\n1 of 4", "0.40 s\n1 of 4", "1.10 s\n1 of 4", "1.50 s\n4 of 4"]
    for (image, _), frame, report in zip(panels, FILM.frames, reports, strict=True):
        np.testing.assert_array_equal(image, overlay(frame, report))
    bright = np.asarray(
        strips("mine", [report_of([1])] * 4, [Image.new("RGB", (56, 56), (90, 90, 90))] * 4, FILM.seconds).popitem()[1][0][0]
    )
    half = bright.shape[0] // 2
    assert bright[half // 2, half + half // 2].tolist() == [90] * 3
    assert bright[half + half // 2, half // 2].max() < 30


def test_strips_of_cuts_inside_the_decoder():
    """A strip for each cut; frames that a cut did not touch keep what they had."""
    reports = [report_of([0, 1], stages=[(2, [1])]), report_of([0, 1, 2, 3], stages=[(2, [0, 3])])]
    found = strips("mine", reports, FILM.frames[:2], FILM.seconds[:2])
    assert {label: [below.splitlines()[1] for _, below in panels] for label, panels in found.items()} == {
        "mine: 6 of 8 tokens": ["2 of 4", "4 of 4"],
        "mine, decoder layer 2: 3 of 8 tokens": ["1 of 4", "2 of 4"],
    }


def test_grids_of_several_frames_and_frames_of_several_grids():
    assert by_frame("abcdef", 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert by_frame("ab", 4) == [["a"], ["b"]]
    pairs = strips("mine", [report_of([0]), report_of([1, 2])], FILM.frames, FILM.seconds)["mine: 3 of 8 tokens"]
    assert [below for _, below in pairs] == ["0.00 - 0.40 s\n1 of 4", "1.10 - 1.50 s\n2 of 4"]
    np.testing.assert_array_equal(pairs[1][0], overlay(FILM.frames[2], report_of([1, 2])))
    tiles = strips("mine", [report_of([cell % 4]) for cell in range(8)], FILM.frames, FILM.seconds)["mine: 8 of 32 tokens"]
    assert [below for _, below in tiles] == [f"{second:.2f} s\n2 of 8" for second in FILM.seconds]
    assert [image for image, _ in tiles] == [*FILM.frames]
    film = SimpleNamespace(frames=FILM.frames, seconds=FILM.seconds)
    counts = answering.frame_counts(film, SimpleNamespace(images=[report_of([0]), report_of([1, 2])]))
    assert counts == [dict(seconds=0.0, before=4, after=1), dict(seconds=1.1, before=4, after=2)]


@pytest.mark.parametrize(("count", "columns", "lines"), [(1, 1, 1), (3, 3, 1), (8, 8, 1), (9, 5, 2), (10, 5, 2), (17, 6, 3)])
def test_long_strips_go_on_in_further_rows(tmp_path, count, columns, lines):
    frames = [Image.new("RGB", (40, 20), (number, 0, 0)) for number in range(count)]
    save_strip(frames, range(count), {"mine": [report_of([0])] * count}, tmp_path / "strip.png", "what is $x$ ? " * 30)
    with Image.open(tmp_path / "strip.png") as picture:
        width, height = max(columns * 2.08 + 0.08, 5), 0.35 + 2 * (0.3 + lines * (2 + 0.42)) + 0.3
        np.testing.assert_allclose(picture.size, (150 * width, 150 * height), atol=1)


def test_pictures_say_what_pale_means_where_there_is_such(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(frames_module, "write_figure", lambda figure, *_: said.append(" ".join(t.get_text() for t in figure.texts)))
    monkeypatch.setattr(question_module, "write_figure", lambda figure, *_: said.append(figure.get_supxlabel()))
    merged = replace(report_of([0]), source=[0, -2, -1, -1])
    for images in ([report_of([0])] * 4, [report_of([0])] * 3 + [merged]):
        save_strip(FILM.frames, FILM.seconds, {"mine": images}, tmp_path / "strip.png")
        ways = [Way("all tokens", "yes", "16 of 16", None), Way("mine", "yes", "4 of 16", images)]
        save_question("what moves ?", FILM.frames, FILM.seconds, ways, tmp_path / "question.png")
    assert ["another frame" in text for text in said] == [False, False, True, True]


def test_frames_as_the_encoder_saw_them():
    settings = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor = SimpleNamespace(image_processor=settings)
    values = torch.tensor([-2.0, 0.0, 1.0, 2.0]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 6, 6)
    for inputs in ({"pixel_values_videos": values}, {"pixel_values": values[0]}):
        seen = frames_as_seen(inputs, processor, FILM.frames)
        assert [image.getpixel((2, 2))[0] for image in seen] == [0, 128, 191, 255]
    patches = {"pixel_values_videos": torch.zeros(16, 588)}
    assert frames_as_seen(patches, processor, FILM.frames) == [*FILM.frames]
    tiled = {"pixel_values": values.repeat(4, 1, 1, 1, 1)}
    assert frames_as_seen(tiled, processor, FILM.frames) == [*FILM.frames]
    assert first_as_seen(tiled, processor, FILM.frames[0]).size == (6, 6)
    assert first_as_seen({"pixel_values": torch.zeros(16, 588)}, processor, FILM.frames[1]) is FILM.frames[1]


def test_ask_about_what_is_no_file(capsys, monkeypatch, tmp_path):
    """One sentence that says what to do, before a model is loaded."""
    monkeypatch.setattr("foveate.loading._read", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    os.mkfifo(tmp_path / "pipe.png")
    for place, said in (
        (
            "https://example.org/a.png",
            "https://example.org/a.png is an address, and a file is read here: nothing is loaded from the",
        ),
        (
            "https://example.org/a.mp4",
            "https://example.org/a.mp4 is an address, and a file is read here: nothing is loaded from the",
        ),
        ("data:image/png;base64," + "iVBORw0K" * 1000, "is a data URL, and a file is read here. Save the picture as a file"),
        ("iVBORw0K" * 1000, "A picture in base64 is no path"),
        (str(tmp_path / "pipe.png"), "is a pipe, a device or a socket. Give a picture that is saved as a file."),
        (str(tmp_path / "none.png"), f"there is no file {tmp_path / 'none.png'}"),
    ):
        code, _, err = invoke(capsys, monkeypatch, "ask", place, QUESTION)
        assert code == 2
        assert said in err
        assert len(err) < 400


@pytest.mark.parametrize("options", [(), ("--frames", "1")])
def test_ask_about_a_picture_that_would_be_blown_up(capsys, monkeypatch, tmp_path, options):
    Image.new("RGB", (4, 40_000)).save(tmp_path / "thin.png")
    code, _, err = invoke(capsys, monkeypatch, "ask", str(tmp_path / "thin.png"), QUESTION, *options)
    assert code == 2
    assert "picture 1 is 4 x 40000 pixels, and the processor of this model would make 192 x 1920000 of it" in err


def test_frames_that_are_too_large(tmp_path, monkeypatch):
    """Several frames are in memory at once; of a film, the size is known before one is decoded."""
    frames = [Image.new("P", (8000, 8000), number) for number in range(3)]
    frames[0].save(tmp_path / "bomb.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(foveate.InputError, match=r"a frame of .*bomb.gif is 8000 x 8000 pixels; at most 50000000 are read"):
        open_video(tmp_path / "bomb.gif")


def test_frames_of_a_film_that_are_too_large(clip, monkeypatch):
    monkeypatch.setattr("foveate.films.FRAME", 192 * 192 - 1)
    with pytest.raises(foveate.InputError, match="is 192 x 192 pixels; at most"):
        open_video(clip)


def test_frames_that_a_video_processor_would_blow_up():
    frames = tuple(Image.new("RGB", (4, 40_000)) for _ in range(2))
    video = Video(frames, (0.0, 1.0), 1.0, 2.0, ())
    prompt = chat.Prompt([], "", [], [video])
    scaler = SimpleNamespace(video_processor=SimpleNamespace(size={"shortest_edge": 224}))
    with pytest.raises(foveate.InputError, match=r"a frame of video 1 is 4 x 40000 pixels.*224 x 2240000"):
        chat._inputs(scaler, None, [prompt], "")


def test_curves_of_scores_say_whose_they_are(tmp_path, monkeypatch):
    """Models without [CLS] have scores, too."""
    from matplotlib.axes import Axes

    titles, original = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axis, label, *a, **k: (titles.append(label), original(axis, label, *a, **k)))
    scores = [float(number) for number in range(1, 5)]
    report = ImageReport(0, 4, 2, (2, 2), [2, 3], [-1, -1, 0, 1], scores, 2.5)
    save_figure(FILM.frames[0], {"vidcom2": report}, tmp_path / "kept.png", "what is it ?")
    assert "scores of vidcom2" in titles
    assert not any("CLS" in title for title in titles)
