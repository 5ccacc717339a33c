"""Which processors have bfloat16 units, by what Linux says of them."""

import pytest

from foveate import precision


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("processor : 0\nflags\t\t: fpu avx avx2 fma\n", False),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("processor : 0\nFeatures\t: fp asimd i8mm bf16 sve\n", True),
        ("processor : 0\nFeatures\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_processors(tmp_path, monkeypatch, text, fast):
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    precision.has_bfloat16.cache_clear()
    assert precision.has_bfloat16() is fast
    precision.has_bfloat16.cache_clear()
    assert precision.has_bfloat16("mps")
