"""The pocket models: small, really trained, in the package, with the worlds of pictures and clips that they know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

NAME, QWEN = "pocket", "pocket-qwen"  # the names of the models, where one is asked for
WEIGHTS = Path(__file__).with_name("weights")
MODELS = {NAME: WEIGHTS, QWEN: Path(__file__).parent / "native/weights"}
SHORT = {"qwen": QWEN}
ADAPTERS = Path(__file__).with_name("adapters")  # one folder for each method that the first model was fine-tuned with


def load_pocket(
    folder: str | Path = NAME, **options: Any
) -> tuple[LlavaForConditionalGeneration | Qwen2_5_VLForConditionalGeneration, LlavaProcessor | Qwen2_5_VLProcessor]:
    """A pocket model and its processor: stock Hugging Face classes, no download.

    Parameters
    ----------
    folder : "pocket", a LLaVA with [CLS] and 576 visual tokens, the default; "qwen" or "pocket-qwen", a Qwen2.5-VL for pictures of
        any size and clips; or the folder of another one, for example of your own training.
    **options : passed to ``from_pretrained``, for example ``attn_implementation="eager"``. Weights are loaded as float32 unless
        ``dtype`` says otherwise.

    Raises
    ------
    InputError : the folder holds no readable model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    from ..frames import load_processor

    options = {"dtype": "float32", **options}
    source = MODELS.get(SHORT.get(str(folder), str(folder)), folder)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(source, local_files_only=True, **options)
        return model.eval(), load_processor(source, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable pocket model: {error}") from error
