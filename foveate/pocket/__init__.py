"""The pocket model: a small LLaVA, really trained, that comes with the package, and the world of pictures it knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

NAME = "pocket"  # the name of the model, where one is asked for
WEIGHTS = Path(__file__).with_name("weights")
ADAPTERS = Path(__file__).with_name("adapters")  # one folder for each method that the model was fine-tuned with


def load_pocket(folder: str | Path = WEIGHTS, **options: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The pocket model and its processor: stock Hugging Face classes, no download.

    Parameters
    ----------
    folder : another pocket model, for example one of your own training; the shipped one by default.
    **options : passed to ``from_pretrained``, for example ``attn_implementation="eager"``. Weights are loaded as float32 unless
        ``dtype`` says otherwise.

    Raises
    ------
    InputError : the folder holds no readable model.
    """
    from safetensors import SafetensorError
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    options = {"dtype": "float32", **options}
    try:
        model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True, **options).eval()
        return model, AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable pocket model: {error}") from error
