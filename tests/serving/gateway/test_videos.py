"""Videos over HTTP: the engine gets what the whole model would read; what cannot be read is refused, and disturbs nobody."""

from __future__ import annotations

import base64
import functools
import io
import struct
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Response
from PIL import Image

import foveate
from foveate.chat import as_sampled
from foveate.errors import InputError
from foveate.films import Bounds
from foveate.loading import load_encoder
from foveate.pocket.native.clips import RATE, draw_clip
from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.gateway.limits import Limits
from foveate.video import Video, open_video, video_in, video_of
from tests.serving_fakes import FakeEngine, data_url, metric, parts_of, served, shown, tensor

from .asked import ASKED, picture, pocket, post, said, started

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def encoder() -> PictureEncoder:
    return PictureEncoder(load_encoder("pocket-qwen"))


@pytest.fixture
def gateway(engine: FakeEngine, encoder: PictureEncoder) -> Iterator[str]:
    with started(engine, encoder, method="full") as url:
        yield url


@functools.cache
def frames(number: int = 0, patches: int = 6, size: tuple[int, int] = (144, 96)) -> np.ndarray:
    return draw_clip(Random(number), (patches, *size), split="test").frames


@functools.cache
def film(number: int = 0, kind: str = "mp4", **shape: Any) -> bytes:
    codec = {"mp4": "libx264", "webm": "libvpx-vp9", "mkv": "ffv1"}[kind]
    written = io.BytesIO()
    with av.open(written, "w", format="matroska" if kind == "mkv" else kind) as file:
        stream = file.add_stream(codec, rate=int(RATE))
        stream.height, stream.width = frames(number, **shape).shape[1:3]
        stream.pix_fmt = "yuv420p"
        for each in frames(number, **shape):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        file.mux(stream.encode())
    return written.getvalue()


def gif(number: int = 0) -> bytes:
    written = io.BytesIO()
    first, *others = map(Image.fromarray, frames(number))
    first.save(written, "GIF", save_all=True, append_images=others, duration=250)
    return written.getvalue()


def clip(data: bytes, kind: str = "video/mp4") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def asked(*parts: dict[str, Any], text: str = ASKED, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, said(text)]}], **options}


def whole(method: str, budget: Any, *media: Video | Image.Image) -> Any:
    """What foveate.encode gives for the whole model."""
    model, processor = pocket("pocket-qwen")
    videos = [medium for medium in media if isinstance(medium, Video)]
    content = [
        {"type": "video", "video": [*medium.frames]} if isinstance(medium, Video) else {"type": "image", "image": medium}
        for medium in media
    ]
    told = [as_sampled(video) for video in videos]
    options = {"video_metadata": [each["video_metadata"][0] for each in told], "do_sample_frames": False}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, said(ASKED)]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"videos_kwargs": options},
    )
    return foveate.encode(model, method_of(method, budget), **inputs)


def check(engine: FakeEngine, answer: Any, true: Any) -> list[dict[str, Any]]:
    """The tokens that the engine got are those of the whole model, in their places."""
    assert answer.status_code == 200, answer.text
    sent = [part["image_embeds"] for part in parts_of(engine.seen[-1]["messages"]) if part["type"] == "image_embeds"]
    positions, ids = true.inputs["position_ids"][1:, 0], true.inputs["input_ids"][0].tolist()
    marks, begin = (6, 7), 0  # <|image_pad|>, <|video_pad|>
    for part, embeds in zip(sent, true.embeds, strict=True):
        found = {name: tensor(value) for name, value in part.items()}
        torch.testing.assert_close(found["image_embeds"], embeds, atol=2e-5, rtol=1e-4)
        begin = next(place for place in range(begin, len(ids)) if ids[place] in marks)
        end = begin + len(embeds)
        start = int(positions[0, begin - 1]) + 1
        assert torch.equal(found["image_positions"].T + start, positions[:, begin:end])
        assert int(found["image_extents"]) + start == int(positions[0, end])
        begin = end
    usage = answer.json()["usage"]
    assert usage["foveate"]["visual_tokens"] == sum(map(len, true.embeds))
    assert usage["prompt_tokens"] == len(ids)
    return usage["foveate"].get("videos", [])


@pytest.mark.parametrize("kind", ["mp4", "webm"])
@pytest.mark.parametrize(
    ("method", "budget"),
    [("evs", 0.3), ("vidcom2", 0.3), ("v-cast", 0.2), ("flashvid", 0.2), ("divprune", 20), ("prumerge", None), ("full", None)],
)
def test_the_engine_gets_what_the_whole_model_would_read(
    gateway: str, engine: FakeEngine, tmp_path: Any, method: str, budget: Any, kind: str
) -> None:
    (tmp_path / f"a.{kind}").write_bytes(film(kind=kind))
    video = open_video(tmp_path / f"a.{kind}", 10)
    true = whole(method, budget, video)
    sent = asked(clip(film(kind=kind), f"video/{kind}"), foveate={"method": method, "budget": budget, "frames": 10})
    (told,) = check(engine, post(gateway, sent), true)
    by_frame = torch.bincount(true.report.items[0].part, minlength=5).tolist()  # two frames are one temporal patch
    assert told == {"visual_tokens": sum(by_frame), "visual_tokens_before": true.report.before[0], "frames": by_frame}


def test_pictures_and_videos_in_one_request(gateway: str, engine: FakeEngine, tmp_path: Any) -> None:
    (tmp_path / "a.mp4").write_bytes(film())
    (tmp_path / "a.gif").write_bytes(gif(1))
    media = picture(1, (160, 200)), open_video(tmp_path / "a.mp4", 8), open_video(tmp_path / "a.gif", 8)
    true = whole("divprune", 0.2, *media)
    parts = shown(data_url(media[0])), clip(film()), clip(gif(1), "image/gif")
    told = check(engine, post(gateway, asked(*parts, foveate={"method": "divprune", "budget": 0.2, "frames": 8})), true)
    assert [each["visual_tokens_before"] for each in told] == true.report.before[1:]


def test_lists_of_frames(gateway: str, engine: FakeEngine) -> None:
    """As Qwen's messages have them, and as vLLM's."""
    shots = [Image.fromarray(each) for each in frames()[:6]]
    listed = {"type": "video", "video": [data_url(shot) for shot in shots], "fps": 4}
    check(engine, post(gateway, asked(listed)), whole("full", None, video_of(shots, 4, "a")))
    slower = {**listed, "fps": 1}
    check(engine, post(gateway, asked(slower)), whole("full", None, video_of(shots, 1, "a")))
    jpegs = [data_url(shot, "JPEG", quality=95).partition(",")[2] for shot in shots]
    url = "data:video/jpeg;base64," + ",".join(jpegs)
    opened = [Image.open(io.BytesIO(base64.b64decode(jpeg))) for jpeg in jpegs]
    check(
        engine,
        post(gateway, asked({"type": "video_url", "video_url": {"url": url}})),
        whole("full", None, video_of(opened, 2, "a")),
    )
    assert metric(gateway, "foveate_pictures_remembered_total") == 0  # what they show is the same, but not when


def test_what_is_remembered_of_a_video(gateway: str) -> None:
    """Its contents and how many frames are taken; a GIF is a picture and a video."""
    data = gif()
    several = {"method": "divprune", "budget": 9, "frames": 8}
    requests = [
        (asked(clip(data, "image/gif"), foveate=several), 1),
        (asked(clip(data, "image/gif"), foveate=several), 1),
        (asked(clip(data, "image/gif"), foveate={**several, "frames": 4}), 2),
        (asked(shown(f"data:image/gif;base64,{base64.b64encode(data).decode()}"), foveate=several), 3),
        (asked(clip(data, "image/gif"), foveate={**several, "method": "random"}), 4),
    ]
    for sent, batches in requests:
        answer = post(gateway, sent)
        assert answer.status_code == 200, answer.text
        assert metric(gateway, "foveate_encoder_batch_count") == batches


def test_hosts(engine: FakeEngine, encoder: PictureEncoder) -> None:
    host = FastAPI()
    host.get("/a.mp4")(lambda: Response(film(), media_type="video/mp4"))
    with served(host) as there:
        part = {"type": "video_url", "video_url": {"url": f"{there}/a.mp4"}}
        with started(engine, encoder, method="full", hosts={there.removeprefix("http://")}) as url:
            assert post(url, asked(part)).status_code == 200
        with started(engine, encoder, method="full") as url:
            refused = post(url, asked(part))
            assert (refused.status_code, "data URLs" in refused.text) == (400, True)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"


def bad() -> dict[str, tuple[dict[str, Any], str]]:
    noise = Random(0).randbytes(3000)
    frame = data_url(picture(1))
    listed = {"type": "video", "video": [frame, frame]}
    return {
        "noise": (clip(noise), "damaged or no video"),
        "half": (clip(film()[: len(film()) // 3]), "video 1"),
        "a picture": (clip(base64.b64decode(frame.partition(",")[2])), "single picture"),
        "a playlist": (clip(PLAYLIST), "video 1"),
        "a list of files": (clip(CONCAT), "video 1"),
        "another decoder": (clip(film(kind="mkv"), "video/x-matroska"), "ffv1"),
        "text": (clip(b"hello", "text/plain"), "none of a video"),
        "nothing": (clip(b""), "video 1"),
        "no text": ({"type": "video_url", "video_url": {"url": 3}}, "must be a text"),
        "a field": ({"type": "video_url", "video_url": {"url": "data:", "fps": 3}}, "unknown field"),
        "a path": ({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}, "cannot be loaded"),
        "no frames": ({**listed, "video": []}, "list of URLs"),
        "a frame that is none": ({**listed, "video": [frame, 3]}, "list of URLs"),
        "a file as frames": ({**listed, "video": frame}, "list of URLs"),
        "too many frames": ({**listed, "video": [frame] * 33}, "at most 32"),
        "thin frames": ({**listed, "video": [data_url(Image.new("RGB", (4, 2000)))] * 2}, "200"),
        "a damaged frame": ({**listed, "video": [frame, frame[:-400] + "A" * 12]}, "frame 2 of video 1"),
        "no rate": ({**listed, "fps": 0}, "fps"),
        "a rate that is none": ({**listed, "fps": "fast"}, "fps"),
        "a rate that is true": ({**listed, "fps": True}, "fps"),
    }


@pytest.mark.parametrize("name", bad())
def test_what_cannot_be_read_is_refused(gateway: str, engine: FakeEngine, name: str) -> None:
    part, why = bad()[name]
    answer = post(gateway, asked(part))
    assert (answer.status_code, why in answer.json()["error"]["message"]) == (400, True), answer.text
    assert len(engine.seen) <= 1  # what it was tried with
    assert metric(gateway, "foveate_requests_running") == 0


def test_requests_are_refused_by_what_they_ask_for(gateway: str) -> None:
    for foveate_ in ({"frames": 0}, {"frames": 33}, {"frames": 2.5}, {"frames": "all"}, {"frames": True}):
        answer = post(gateway, asked(clip(film()), foveate=foveate_))
        assert (answer.status_code, "foveate.frames" in answer.text) == (400, True)
    early = {"messages": [{"role": "assistant", "content": [clip(film())]}, {"role": "user", "content": "and ?"}]}
    assert "messages of the user" in post(gateway, early).text


def test_limits(engine: FakeEngine, encoder: PictureEncoder) -> None:
    size = frames().shape[1] * frames().shape[2]
    for limits, why in (
        (Limits(pixels=size - 1), "pixels"),
        (Limits(video_pixels=12 * size - 1), "together"),
        (Limits(film=11), "more than 11 frames"),
        (Limits(decoding=0.0), "longer than 0 s"),
        (Limits(body_bytes=len(film())), "larger than"),
    ):
        with started(engine, encoder, method="full", limits=limits) as url:
            answer = post(url, asked(clip(film()), foveate={"frames": 12}))
            assert (answer.status_code // 100, why in answer.text) == (4, True), answer.text
            listed = {"type": "video", "video": [data_url(Image.fromarray(each)) for each in frames()]}
            if "video_pixels" in repr(why) or why == "together":
                assert "together" in post(url, asked(listed)).text


def test_frames_count_in_the_size_that_they_are_brought_to(engine: FakeEngine, encoder: PictureEncoder) -> None:
    """Which is that of the first: small ones after a large one are as large as that."""
    large, small = data_url(picture(1, (100, 100))), data_url(picture(2, (10, 10)))
    for frames_, status in (([large, *[small] * 4], 400), ([small, large, *[small] * 3], 200)):
        with started(engine, encoder, method="full", limits=Limits(video_pixels=40_000)) as url:
            answer = post(url, asked({"type": "video", "video": frames_}))
            assert answer.status_code == status, answer.text
            assert status == 200 or "50000 pixels together" in answer.text


def grown(kind: str) -> bytes:
    """A video whose first frame is small, with larger ones after it."""
    written = io.BytesIO()
    if kind == "gif":
        Image.new("P", (8, 8)).save(written, "GIF")
        large = io.BytesIO()
        Image.new("P", (300, 300)).save(large, "GIF")
        data = large.getvalue()
        return written.getvalue()[:-1] + data[data.index(b",\0\0\0\0") : -1] * 3 + b";"
    with av.open(written, "w", format="matroska") as file:
        stream = file.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "yuvj420p"
        for number in range(4):
            shot = io.BytesIO()
            picture(number, (300, 300) if number else (8, 8)).save(shot, "JPEG")
            packet = av.Packet(shot.getvalue())
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 4), number, number
            packet.is_keyframe = True
            file.mux(packet)
    return written.getvalue()


def test_frames_of_a_film_that_grow(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are brought to the size of the first one by one."""
    earlier = []
    alike = Bounds.alike
    monkeypatch.setattr(Bounds, "alike", lambda *given: earlier.append([each.size for each in given[3]]) or alike(*given))
    assert {frame.size for frame in video_in(grown("mkv"), "a", 4, Bounds()).frames} == {(8, 8)}
    assert {size for sizes in earlier for size in sizes} == {(8, 8)}
    assert len(earlier) == 4
    assert post(gateway, asked(clip(grown("mkv"), "video/x-matroska"))).status_code == 200


def test_a_moving_picture_that_grows(gateway: str) -> None:
    """Its head says 8 x 8 pixels, by which its memory was counted; Pillow makes all frames as large as the largest."""
    answer = post(gateway, asked(clip(grown("gif"), "image/gif")))
    assert (answer.status_code, "larger frames than its head says" in answer.text) == (400, True), answer.text


@pytest.mark.parametrize("kind", ["gif", "mkv"])
def test_no_frame_is_larger_than_it_may_be(kind: str) -> None:
    with pytest.raises(InputError, match="300 x 300 pixels"):
        video_in(grown(kind), "a", 4, Bounds(pixels=10_000))


def test_a_model_without_videos_says_so(engine: FakeEngine) -> None:
    with started(engine, PictureEncoder(load_encoder("pocket"))) as url:
        answer = post(url, asked(clip(film())))
        assert (answer.status_code, "frames as pictures" in answer.text) == (400, True)


def test_without_pyav(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = film()
    monkeypatch.setitem(sys.modules, "av", None)
    answer = post(gateway, asked(clip(data)))
    assert (answer.status_code, "extra 'video'" in answer.text) == (501, True)
    assert post(gateway, asked(clip(gif(), "image/gif"))).status_code == 200


def test_bombs_end_in_time() -> None:
    """A GIF of very many frames, and a film whose packets are too many."""
    first, *others = [Image.new("P", (8, 8), number) for number in range(3)]
    written = io.BytesIO()
    first.save(written, "GIF", save_all=True, append_images=others, duration=10)
    data = written.getvalue()
    block = data[data.rindex(b"\x2c") : -1]
    bomb = data[:-1] + block * 300_000 + b";"
    begin = time.monotonic()
    with pytest.raises(InputError, match="more than 1000 frames"):
        video_in(bomb, "bomb", 8, Bounds(frames=1000))
    with pytest.raises(InputError, match=r"longer than 0.2 s"):
        video_in(bomb, "bomb", 8, Bounds(seconds=0.2))
    assert time.monotonic() - begin < 10
    with pytest.raises(InputError, match="more than 5 frames"):
        video_in(film(), "a", 8, Bounds(frames=5))
    wide = bytearray(gif())
    wide[6:10] = struct.pack("<HH", 60000, 60000)
    with pytest.raises(InputError, match="pixels"):
        video_in(bytes(wide), "wide", 8, Bounds(pixels=10**6))


def test_good_requests_among_bad_ones(gateway: str, engine: FakeEngine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    works = [asked(part) for part, _ in bad().values()] + [asked(clip(film())), asked(shown(data_url(picture(1))))] * 3
    Random(0).shuffle(works)
    with ThreadPoolExecutor(6) as pool:
        found = [*pool.map(lambda sent: post(gateway, sent).status_code, works)]
    assert sorted(found) == [200] * 6 + [400] * len(bad())
    assert metric(gateway, "foveate_requests_running") == 0
    assert metric(gateway, "foveate_held_bytes") == 0
