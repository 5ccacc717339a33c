"""What ``foveate batch`` does with files: those it is given by mistake, those that change under it, and a full disk."""

from __future__ import annotations

import base64
import itertools
import json
import os
import resource
import signal
from io import BytesIO
from random import Random

import pytest
from PIL import EpsImagePlugin, Image

from foveate.errors import InputError
from foveate.serving.batch import engines
from foveate.serving.batch.results import Output, OutputError
from foveate.serving.batch.rows import AnswerSettings, Source, opened
from tests.cli.test_main import invoke
from tests.test_images import EPS

from .asked import alone, answers, mixed, written


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*arguments):
        code, out, err = invoke(capsys, monkeypatch, "batch", *map(str, arguments))
        return code, out + err

    return run


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(engines, "load", lambda name: pytest.fail("nothing is to be loaded"))


def document(number, **fields):
    return {"id": number, "row": f"digest {number}", **(fields or {"answer": "yes"})}


# -- the same file twice


LINKS = {"symbolic": os.symlink, "hard": os.link, "none": None}


@pytest.mark.parametrize("kind", LINKS)
def test_two_places_that_are_one_file(unloaded, run, tmp_path, pictures, kind):
    """Questions, answers, and the settings beside the answers, by whatever names."""
    link = LINKS[kind]
    text = written(tmp_path, mixed(pictures, 2)).read_text()
    for number, (asked, told) in enumerate(itertools.permutations(("x", "x.settings.json"), 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x").write_text(text) if asked == "x" or link else None
        (folder / "x.settings.json").write_text(text) if asked != "x" and not link else None
        if link:
            link(folder / "x", folder / "x.settings.json")
            link(folder / "x", folder / "y")
        before = {file.name: file.read_text() for file in folder.iterdir()}
        pairs = [(asked, told)] if asked != "x" else []
        pairs += [("x", "y"), ("y", "x"), ("x", "x")] if link else []
        for questions, out in pairs:
            code, said = run(folder / questions, folder / out)
            assert code == 2
            assert "are the same file" in said
            assert {file.name: file.read_text() for file in folder.iterdir()} == before


def test_settings_that_lead_to_the_questions(unloaded, run, tmp_path, pictures):
    path = written(tmp_path, mixed(pictures, 2))
    before = path.read_text()
    (tmp_path / "out.jsonl.settings.json").symlink_to(path)
    code, said = run(path, tmp_path / "out.jsonl")
    assert (code, path.read_text(), (tmp_path / "out.jsonl").exists()) == (2, before, False)
    assert "questions and the settings of the answers are the same file" in said
    # and to answers that are not there yet
    (tmp_path / "a.jsonl.settings.json").symlink_to(tmp_path / "a.jsonl")
    assert "answers and the settings of the answers are the same file" in run(path, tmp_path / "a.jsonl")[1]
    assert not (tmp_path / "a.jsonl").exists()


# -- what is no file of questions, and no place for answers


def test_files_that_hold_no_rows(unloaded, run, tmp_path, pictures):
    """One error, not a failed row for each piece between two newlines."""
    binary = tmp_path / "photo.jsonl"
    Image.frombytes("RGB", (200, 200), Random(0).randbytes(120_000)).save(binary, "PNG")
    text = "".join(json.dumps(row) + "\n" for row in mixed(pictures, 3))
    (tmp_path / "wide.jsonl").write_bytes(text.encode("utf-16"))
    (tmp_path / "list.jsonl").write_text(json.dumps(mixed(pictures, 3), indent=1))
    (tmp_path / "words.txt").write_text("what color is it ?\n" * 3)
    (tmp_path / "random.bin").write_bytes(Random(1).randbytes(50_000))
    for name in ("photo.jsonl", "wide.jsonl", "list.jsonl", "words.txt", "random.bin"):
        code, said = run(tmp_path / name, tmp_path / "out.jsonl")
        assert code == 2, name
        assert "is no file of JSON lines: none of its" in said
        assert len(said) < 600
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "marked.jsonl").write_bytes(text.encode("utf-8-sig"))  # as some editors save
    assert [line.id for line in Source(tmp_path / "marked.jsonl").lines()] == ["r0", "r1", "r2"]


def test_pipes_and_devices(unloaded, run, tmp_path, pictures):
    os.mkfifo(tmp_path / "pipe")
    path = written(tmp_path, mixed(pictures, 2))
    for questions, out in ((tmp_path / "pipe", tmp_path / "out"), ("/dev/zero", tmp_path / "out"), (path, tmp_path / "pipe")):
        code, said = run(questions, out)
        assert code == 2
        assert "is a pipe, a device or a socket" in said
    (tmp_path / "a.settings.json").symlink_to(tmp_path / "pipe")
    assert "is a pipe, a device or a socket" in run(path, tmp_path / "a")[1]
    assert not (tmp_path / "out.settings.json").exists()


def test_folders(unloaded, run, tmp_path, pictures, monkeypatch):
    path = written(tmp_path, mixed(pictures, 2))
    monkeypatch.chdir(tmp_path)
    for out in (".", "", "/", "..", tmp_path):
        code, said = run(path, out)
        assert (code, "is a folder. Give a file for the answers." in said) == (2, True)
    code, said = run(tmp_path, tmp_path / "out.jsonl")
    assert (code, "cannot be read" in said) == (2, True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_output_leaves_nothing(run, tmp_path, pictures, monkeypatch):
    path = written(tmp_path, mixed(pictures, 2))
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "no" / "out.jsonl")  # a link that leads nowhere
    before = sorted(tmp_path.iterdir())
    for name in ("folder.jsonl", "lost.jsonl", "no/out.jsonl"):
        assert run(path, tmp_path / name)[0] == 2
        assert sorted(tmp_path.iterdir()) == before, name

    def broken(*_):
        raise InputError("the model cannot be loaded")

    monkeypatch.setattr(engines, "load", broken)
    code, said = run(path, tmp_path / "out.jsonl")
    assert (code, "the model cannot be loaded" in said) == (2, True)
    assert sorted(tmp_path.iterdir()) == before
    # what was there stays
    (tmp_path / "out.jsonl").touch()
    assert run(path, tmp_path / "out.jsonl")[0] == 2
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out.jsonl"])


# -- an output that goes away, and a full disk


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
@pytest.mark.parametrize("when", ["before a batch", "after the last one"])
def test_an_output_that_goes_away(shared, run, engine, pictures, tmp_path, monkeypatch, how, when):
    """Rows that are in no file are not said to be there; the same command asks them again."""
    path, out = written(tmp_path, mixed(pictures, 4)), tmp_path / "out.jsonl"
    wanted, calls = alone(engine, Source(path)), []
    whole = engine.__class__.answer

    def answer(self, rows):
        calls.append(1)
        if when == "before a batch" and len(calls) == 2:
            spoil()
        return whole(self, rows)

    def spoil():
        if how == "removed":
            out.unlink()
        elif how == "moved":
            out.rename(tmp_path / "elsewhere.jsonl")
        else:
            (tmp_path / "other").write_text("")
            (tmp_path / "other").replace(out)

    close = Output.__exit__
    with monkeypatch.context() as patch:
        patch.setattr(engines.TransformersEngine, "answer", answer)
        if when != "before a batch":
            patch.setattr(Output, "__exit__", lambda self, *error: (spoil(), close(self, *error)))
        patch.setattr(engines, "load", lambda name: engine.loaded)
        code, said = run(path, out, "--batch-size", "1")
    assert code == 2
    assert "was removed or replaced while answers were written to it" in said
    assert "4 answered" not in said
    assert run(path, out)[0] == 0
    assert answers(out) == wanted


def test_settings_that_go_away_are_written_again(tmp_path):
    out, settings = tmp_path / "out.jsonl", {"method": "full"}
    with Output(out, settings) as output:
        output.add([document(1)])
        (tmp_path / "out.jsonl.settings.json").unlink()
        output.add([document(2)])
    with Output(out, settings) as output:
        assert output.answered == {1: "digest 1", 2: "digest 2"}


@pytest.fixture
def small_disk():
    """No file grows beyond some bytes: writing fails as it does on a full disk, with the number of another error."""

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield limit
    limit(soft)
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk(small_disk, tmp_path):
    """Our own error, also when the file is closed; and whole rows stay."""
    out, settings = tmp_path / "out.jsonl", {"method": "full"}

    def fill():
        with Output(out, settings) as output:
            for number in range(100):
                output.add([document(number, answer="word " * 20)])
                if number == 1:
                    small_disk(1000)

    with pytest.raises(OutputError, match=r"cannot be written: .* Make room; the same command goes on from there"):
        fill()
    small_disk(resource.RLIM_INFINITY)
    with Output(out, settings) as output:
        assert 2 <= len(output.answered) < 100
        there = len(output.answered)
        output.add([document(number) for number in range(100)])
    assert len(answers(out)) == 100
    assert sum("word" in row["answer"] for row in answers(out).values()) == there


def test_a_disk_that_is_full_at_the_beginning(small_disk, tmp_path):
    small_disk(3)
    with pytest.raises(InputError, match="cannot be written"):
        Output(tmp_path / "out.jsonl", {"method": "full"})
    assert not list(tmp_path.iterdir())


# -- rows that are taken out


def test_answering_again_keeps_links_mode_and_owner(tmp_path):
    real, link, hard = tmp_path / "real.jsonl", tmp_path / "link.jsonl", tmp_path / "hard.jsonl"
    settings = {"method": "full"}
    for name in (link, hard):
        for rows in ([document(1), document(2, error={})], [document(3)]):
            with Output(real, settings) as output:
                output.add(rows)
        real.chmod(0o600)
        name.symlink_to(real) if name is link else os.link(real, name)
        os.link(tmp_path / "real.jsonl.settings.json", tmp_path / f"{name.name}.settings.json")
        with Output(name, settings, retry_failed=True) as output:
            assert (sorted(output.answered), output.failed) == ([1, 3], {})
            output.add([document(2)])
        assert [json.loads(line)["id"] for line in real.read_text().splitlines()] == [1, 3, 2]
        assert name.read_text() == real.read_text()
        assert name.is_symlink() == (name is link)
        assert os.path.samefile(name, real)
        assert real.stat().st_mode & 0o777 == 0o600
        assert not list(tmp_path.glob(".*"))
        for path in tmp_path.iterdir():
            path.unlink()


def test_taking_rows_out_touches_no_other_file(tmp_path):
    """Nor one that has the name of a file that is made on the way."""
    out, settings = tmp_path / "out.jsonl", {"method": "full"}
    others = [tmp_path / name for name in (".out.jsonl.new", "out.jsonl.new", "out.jsonl.tmp")]
    for other in others:
        other.write_text("precious")
    with Output(out, settings) as output:
        output.add([document(1), document(2, error={})])
    with Output(out, settings, retry_failed=True) as output:
        assert list(output.answered) == [1]
    assert [other.read_text() for other in others] == ["precious"] * 3


def test_rows_stay_where_they_cannot_be_taken_out(tmp_path, small_disk):
    out, settings = tmp_path / "out.jsonl", {"method": "full"}
    with Output(out, settings) as output:
        output.add([document(1), document(2, error={}), document(3)])
    before = out.read_text()
    small_disk(20)
    with pytest.raises(OutputError, match=r"cannot be written anew: .* It is as it was"):
        Output(out, settings, retry_failed=True)
    assert out.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


@pytest.mark.parametrize("place", ["out.jsonl", "out.jsonl.settings.json"])
def test_deep_json_in_an_output(tmp_path, place):
    out, settings = tmp_path / "out.jsonl", {"method": "full"}
    with Output(out, settings) as output:
        output.add([document(1)])
    (tmp_path / place).write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"is no row of a batch|does not say which settings"):
        Output(out, settings)


# -- rows whose pictures are something else


def thin():
    buffer = BytesIO()
    Image.new("RGB", (4, 40_000)).save(buffer, "PNG")
    return buffer.getvalue()


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_pictures_that_are_something_else(engine, pictures, tmp_path, monkeypatch):
    """Each a failed row with a short error; rows beside it are answered."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "eps.png").write_bytes(EPS)
    (tmp_path / "thin.png").write_bytes(thin())
    noise = BytesIO()
    Image.frombytes("RGB", (200, 200), Random(0).randbytes(120_000)).save(noise, "PNG")
    bare = base64.b64encode(noise.getvalue()).decode()
    image_url = [{"type": "image_url", "image_url": {"url": bare}}, {"type": "text", "text": "q"}]
    bad = {
        "pipe": ({"image": "pipe.png"}, "is a pipe, a device or a socket"),
        "device": ({"image": "/dev/zero"}, "is a pipe, a device or a socket"),
        "EPS": ({"image": "eps.png"}, "not a picture that Pillow can read"),
        "EPS in a URL": ({"image": url(EPS)}, "not a picture that Pillow can read"),
        "thin": ({"image": "thin.png"}, "picture 1 is 4 x 40000 pixels"),
        "thin in a URL": ({"images": [str(pictures / "0.png"), url(thin())]}, "picture 2 is 4 x 40000 pixels"),
        "bare": ({"image": bare}, "data:image/png;base64, comes in front"),
        "bare in a body": (
            {"body": {"messages": [{"role": "user", "content": image_url}]}},
            "data:image/png;base64, comes in front",
        ),
        "half a URL": ({"image": f"image/png;base64,{bare}"}, "data:image/png;base64, comes in front"),
        "long": ({"image": "a, b" * 10**5}, "there is no file"),
        "host": ({"image": f"file://otherhost{pictures / '0.png'}"}, "a file of another machine, otherhost"),
        "hostless": ({"image": "file://["}, "is no URL of a file"),
        "address": ({"image": "https://example.org/" + "a" * 10**5}, "is not loaded"),
        "no data": ({"image": "data:text/plain;base64," + "a" * 10**5}, "none of a picture"),
        "method": ({"method": "m" * 10**5}, "unknown method"),
        "preset": ({"method": "prumerge:" + "m" * 10**5}, "has no preset"),
        "value": ({"max_new_tokens": "n" * 10**5}, "is no whole number"),
        "name": ({"body": {"messages": [], "n" * 10**5: 1}}, "which a batch does not know"),
        "choices": ({"body": {"messages": [], "n": ["n" * 10**5]}}, "which a batch does not do"),
        "place": ({"url": "u" * 10**5, "body": {}}, "chat completions are answered"),
    }
    rows = [{"id": name, "question": "what color is the star ?", **row} for name, (row, _) in bad.items()]
    good = {"id": "good", "image": (pictures / "0.png").as_uri(), "question": "what color is the star ?"}
    good_too = {**good, "id": "good too", "image": f"file://localhost{pictures / '0.png'}"}
    found = alone(engine, Source(written(tmp_path, [*rows, good, good_too])))
    for name, (_, said) in bad.items():
        message = found[name]["error"]["message"]
        assert said in message, name
        assert len(message) < 700, name
        assert bare[200:260] not in message
    assert found["good"]["answer"] == found["good too"]["answer"]


def test_a_base64_name_that_is_a_file_is_one(tmp_path, pictures):
    name = "a" * 100
    (tmp_path / name).write_bytes((pictures / "0.png").read_bytes())
    source = Source(written(tmp_path, [{"image": name, "question": "q"}]))
    prompt = opened(source.read(source.lines()[0], AnswerSettings()), [])
    assert prompt.images[0].size == (192, 192)
    message = None
    try:
        written(tmp_path, [{"id": "x" * 10**5, "question": "q"}] * 2, "two.jsonl")
        Source(tmp_path / "two.jsonl").lines()
    except InputError as error:
        message = str(error)
    assert message is not None
    assert len(message) < 500
