"""Two runs on one output, and files that are no pictures and have no end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foveate.errors import InputError
from foveate.serving.batch.results import Output
from foveate.serving.batch.rows import AnswerSettings, Source

from .asked import written

pytest.importorskip("fcntl")
SETTINGS = {"method": "full"}
ENDLESS = Path("/proc/self/pagemap")  # a regular file of no bytes, from which gigabytes can be read


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_of_two_names_is_written_by_one_run(tmp_path, link):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.touch()
    link(one, other)
    with Output(one, SETTINGS) as output:
        with pytest.raises(InputError, match="another run writes"):
            Output(other, SETTINGS)
        output.add([{"id": 1, "row": "a", "answer": "yes"}])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.jsonl", "one.jsonl.settings.json", "other.jsonl"]


def test_an_output_without_its_settings_is_still_held(tmp_path):
    place = tmp_path / "out.jsonl"
    with Output(place, SETTINGS) as output:
        output.add([{"id": 1, "row": "a", "error": {}}, {"id": 2, "row": "a", "answer": "yes"}])
        for rows in ([], [1]):  # also when it was written anew
            output.drop(rows)
            (tmp_path / "out.jsonl.settings.json").unlink()
            output.add([])
            with pytest.raises(InputError, match="another run writes"):
                Output(place, SETTINGS)
    with Output(place, SETTINGS) as output:
        assert list(output.answered) == [2]


@pytest.mark.skipif(not os.access(ENDLESS, os.R_OK), reason="of Linux")
def test_a_file_without_an_end_is_no_picture(tmp_path):
    source = Source(written(tmp_path, [{"image": str(ENDLESS), "question": "what color is the star ?"}]))
    assert source.read(source.lines()[0], AnswerSettings()).digest
