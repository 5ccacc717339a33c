"""The bar of studies."""

from foveate.lab.progress import bar


def test_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(bar([3, 1, 2], "merging")) == [3, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "merging" in err
    assert "\x1b[2K" in err, "it is gone in the end"


def test_elsewhere(capsys):
    assert list(bar(["a"], "merging")) == ["a"]
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "")
