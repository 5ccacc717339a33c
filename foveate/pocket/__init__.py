"""The pocket model: a small LLaVA, really trained, that comes with the package, and the world of pictures it knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = Path(__file__).with_name("weights")


def load_pocket(**options: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The pocket model and its processor: stock Hugging Face classes, no download.

    Parameters
    ----------
    **options : passed to ``from_pretrained``, for example ``attn_implementation="eager"``. Weights are loaded as float32 unless
        ``dtype`` says otherwise.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    options = {"dtype": "float32", **options}
    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, local_files_only=True, **options).eval()
    return model, AutoProcessor.from_pretrained(WEIGHTS, local_files_only=True)
