"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate.cli import common
from foveate.cli import main as cli
from foveate.pocket.scenes import draw_scene
from foveate.pocket.vocabulary import build_tokenizer

from .. import zoo


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "foveate", *arguments], capture_output=True, text=True, timeout=300, check=False)


def invoke(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    """The entry point in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["foveate", *arguments])
    for name in ("out", "err"):
        monkeypatch.setattr(getattr(common, name), "_width", 160)
    monkeypatch.setitem(cli._state, "debug", False)
    code = 0
    try:
        cli.run()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def scene(tmp_path):
    from random import Random

    Image.fromarray(draw_scene(Random(4), split="test", level=1).image).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_version_and_help():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.output.strip() == f"foveate {foveate.__version__}"
    top = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(command in top for command in ("demo", "ask", "methods", "search"))
    assert all(
        "Example" in CliRunner().invoke(cli.app, [*command, "--help"]).output for command in ([], ["ask"], ["demo"], ["search"])
    )


def test_methods(capsys, monkeypatch):
    code, out, _ = invoke(capsys, monkeypatch, "methods")
    assert code == 0
    assert all(name in out for name in ("prumerge+", "spatial", "[CLS]", "paper, released", "2403.15388"))
    code, out, _ = invoke(capsys, monkeypatch, "methods", "--json")
    assert {row["name"] for row in json.loads(out)} == {info.name for info in foveate.methods()}


def test_demo(capsys, monkeypatch, tmp_path):
    code, out, _ = invoke(capsys, monkeypatch, "demo", "--folder", str(tmp_path), "--json")
    assert code == 0
    scenes = json.loads(out)["scenes"]
    assert [s["level"] for s in scenes] == ["plain", "medium", "crowded"]
    for each in scenes:
        assert set(each["answers"]) == set(each["visual_tokens"]) == {"full", "prumerge+", "prumerge"}
        tokens = each["visual_tokens"]
        assert 576 == tokens["full"] > tokens["prumerge+"] > tokens["prumerge"] > 0
        assert each["prefill_flops"]["full"] > each["prefill_flops"]["prumerge+"]
        with Image.open(each["picture"]) as picture, Image.open(each["scene"]) as scene:
            assert picture.width > picture.height > 300
            assert scene.size == (192, 192)
    code, out, _ = invoke(capsys, monkeypatch, "demo", "--folder", str(tmp_path))
    assert code == 0
    assert out.count("what they keep:") == 3
    assert "Ask about one yourself:" in out


def test_demo_of_methods_inside_the_encoder_and_without_a_rule(capsys, monkeypatch, tmp_path):
    arguments = ("demo", "--folder", str(tmp_path), "--method", "tome", "--method", "resize", "--method", "evit", "--json")
    code, out, _ = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    for scene in json.loads(out)["scenes"]:
        assert scene["visual_tokens"] == {"full": 576, "tome": 144, "resize": 144, "evit": 201}
        assert Path(scene["picture"]).stat().st_size > 50_000
    assert invoke(capsys, monkeypatch, "demo", "--method", "dance")[0] == 2


def test_demo_and_ask_show_both_stages(capsys, monkeypatch, scene, tmp_path):
    code, out, _ = invoke(capsys, monkeypatch, "demo", "--folder", str(tmp_path / "demo"), "--method", "iti", "--json")
    assert code == 0
    for each in json.loads(out)["scenes"]:
        layers = each["layers"]["iti"]
        assert layers[0] == layers[1] == each["visual_tokens"]["iti"] > layers[2] == layers[5] > 0
        assert each["layers"]["full"] == [576] * 6
        assert each["prefill_flops"]["full"] > each["prefill_flops"]["iti"]
    kept = tmp_path / "kept.png"
    arguments = ("ask", str(scene), "how many objects are there ?", "--method", "iti", "--save", str(kept))
    code, out, err = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    assert "from decoder layer 2 on" in err
    assert "reconstruction" in err
    with Image.open(kept) as picture:
        assert picture.width == 5 * 396  # the picture, two stages, the scores, and tokens per layer; 3.6 inches each
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--json", "--compare")
    document = json.loads(out)
    image = document["kept"][0]
    assert len(image["kept"]) == document["layers"]["iti"][0]
    assert len(image["stages"][0]["kept"]) == document["layers"]["iti"][5]
    assert document["visual_tokens"]["spatial"] == round(sum(document["layers"]["iti"]) / 6)


def test_ask(capsys, monkeypatch, scene, tmp_path):
    kept = tmp_path / "kept.png"
    arguments = ("ask", str(scene), "How many objects are there?", "--save", str(kept))
    code, out, err = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    assert out.strip()
    assert "visual tokens 576 ->" in err
    with Image.open(kept) as picture:
        assert picture.width > 500
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--budget", "0.25", "--method", "prumerge:released", "--json")
    document = json.loads(out)
    assert document["visual_tokens"]["prumerge"] == 144
    assert document["visual_tokens_before"] == 576
    assert document["method"]["attn_mode"] == "fused"
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--budget", "36", "--compare")
    assert all(name in out for name in ("prumerge+", "all tokens", "spatial", "random"))


def test_ask_equals_the_library(capsys, monkeypatch, scene):
    _, out, _ = invoke(capsys, monkeypatch, "ask", str(scene), "how many objects are there ?", "--json", "--compare")
    document = json.loads(out)
    model, processor = foveate.load_pocket()
    prompt = "<s> user: <image> how many objects are there ? assistant:"
    inputs = processor(text=prompt, images=Image.open(scene), return_tensors="pt", add_special_tokens=False)
    start = inputs["input_ids"].shape[1]
    plain = processor.decode(model.generate(**inputs)[0, start:], skip_special_tokens=True).strip()
    with foveate.PruMergePlus()(model):
        reduced = processor.decode(model.generate(**inputs)[0, start:], skip_special_tokens=True).strip()
    assert document["answers"]["full"] == plain
    assert document["answer"] == reduced


def test_ask_another_model(capsys, monkeypatch, scene, tmp_path):
    """A folder with a model of another kind: loaded by the auto classes, prompted by its own chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder = tmp_path / "model"
    model = zoo.load(decoder="qwen2")
    tokenizer = build_tokenizer()
    model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": zoo.SIDE}, crop_size={"height": zoo.SIDE, "width": zoo.SIDE})
    options = dict(patch_size=zoo.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, **options).save_pretrained(folder)
    code, out, err = invoke(
        capsys, monkeypatch, "ask", str(scene), "what is it ?", "--model", str(folder), "--max-new-tokens", "3", "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["visual_tokens_before"] == zoo.TOKENS
    assert document["visual_tokens"]["prumerge+"] < zoo.TOKENS
    assert document["notes"] == ["the processor has no chat template; the prompt of LLaVA-1.5 is used"]


def test_words_the_pocket_model_does_not_know(capsys, monkeypatch, scene):
    _, _, err = invoke(capsys, monkeypatch, "ask", str(scene), "Please describe the weather")
    assert "has never seen 'please', 'describe', 'weather'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "none.png", "what is it ?"), "there is no file none.png"),
        (("ask", "{scene}", "what is it ?", "--method", "magic"), "unknown method 'magic'; available:"),
        (("ask", "{scene}", "what is it ?", "--budget", "lots"), "budget 'lots' is not a number"),
        (("ask", "{scene}", "what is it ?", "--budget", "0"), "budget=0 would keep no visual token"),
        (("ask", "{scene}", "what is it ?", "--budget", "1.5"), "budget=1.5 is not a fraction"),
        (("ask", "{scene}", "what is it ?", "--method", "random"), "no rule of its own"),
        (("ask", "{scene}", " "), "the question is empty"),
        (("ask", "{scene}", "what is it ?", "--model", "{folder}"), "cannot be loaded"),
        (("ask", "{scene}", "what is it ?", "--model", "./nowhere"), "there is no folder ./nowhere"),
        (("ask", "{scene}", "what is <image> ?"), "which stands for the picture"),
    ],
)
def test_errors_are_two_lines_and_exit_code_2(capsys, monkeypatch, scene, arguments, message):
    filled = [a.format(scene=scene, folder=scene.parent) for a in arguments]
    code, out, err = invoke(capsys, monkeypatch, *filled)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


def test_wrong_usage_exits_with_2(capsys, monkeypatch):
    for arguments in (("ask",), ("dance",), ("ask", "a.png", "why", "--max-new-tokens", "0"), ("demo", "--seed", "x")):
        code, _, err = invoke(capsys, monkeypatch, *arguments)
        assert code == 2
        assert len(err.strip().splitlines()) == 1


def test_markup_in_what_the_user_writes_is_text(capsys, monkeypatch, scene):
    code, _, err = invoke(capsys, monkeypatch, "ask", str(scene), "[bold]what[/bold] is [/x] it ?")
    assert code == 0
    assert "'[bold]what[/bold]'" in err


def test_saving(capsys, monkeypatch, scene, tmp_path):
    """Checked before the model runs; formulas in a question are text."""
    inside = tmp_path / "new" / "kept"
    code, out, _ = invoke(capsys, monkeypatch, "ask", str(scene), r"what color is $\foo$ ?", "--save", str(inside), "--json")
    assert code == 0
    assert json.loads(out)["picture"] == str(inside.with_suffix(".png"))
    assert inside.with_suffix(".png").exists()
    for path, message in (
        ("kept.xyz", "cannot be saved as '.xyz'"),
        (str(tmp_path), "is a folder"),
        ("/proc/no/k.png", "cannot be written"),
    ):
        code, out, err = invoke(capsys, monkeypatch, "ask", str(scene), "what is it ?", "--save", path)
        assert (code, out) == (2, "")
        assert message in err
    assert invoke(capsys, monkeypatch, "demo", "--folder", str(scene))[0] == 2


def test_a_template_that_writes_the_first_token(scene, tmp_path):
    """The tokenizer must not add another one."""
    from tokenizers.processors import TemplateProcessing

    from foveate.chat import make_inputs

    model, processor = foveate.load_pocket()
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inputs, note = make_inputs(processor, model, Image.open(scene), "what is it ?")
    assert note is None
    assert (inputs["input_ids"] == 1).sum() == 1


def test_what_nobody_expected_is_one_line(capsys, monkeypatch, scene):
    def fail(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("foveate.answering.ask", fail)
    code, _, err = invoke(capsys, monkeypatch, "ask", str(scene), "what is it ?")
    assert code == 1
    assert err.strip() == "error: ZeroDivisionError: by zero (foveate --debug with the same command shows where)"


def test_a_checkpoint_with_missing_weights(capsys, monkeypatch, scene, tmp_path):
    from safetensors.torch import load_file, save_file

    from foveate.pocket import WEIGHTS

    folder = tmp_path / "half"
    shutil.copytree(WEIGHTS, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "projector" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, err = invoke(capsys, monkeypatch, "ask", str(scene), "what is it ?", "--model", str(folder))
    assert (code, out) == (2, "")
    assert "is incomplete: 1 weights are missing" in err


def test_debug_shows_the_traceback(capsys, monkeypatch):
    with pytest.raises(foveate.InputError):
        invoke(capsys, monkeypatch, "--debug", "ask", "none.png", "what is it ?")


def test_as_a_module_in_a_process_of_its_own():
    result = run("ask", "none.png", "what is it ?")
    assert result.returncode == 2
    assert result.stdout == ""
    *others, last = result.stderr.strip().splitlines()
    assert last == "error: there is no file none.png"
    assert all("torchao" in line or "pytree" in line for line in others), "torchao complains of missing kernels"
