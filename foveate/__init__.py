"""foveate: fewer visual tokens for vision-language models, on stock Hugging Face classes."""

from importlib.metadata import PackageNotFoundError, version

from .api import Encoded, MethodInfo, attach, encode, methods
from .engine.session import Session, detach
from .errors import CacheError, FoveateError, InputError, MissingExtraError, UnsupportedModelError
from .methods.base import TokenReducer, get
from .methods.baselines import Pool, Random, Sequential, Spatial
from .methods.prumerge import PruMerge
from .methods.prumerge_plus import PruMergePlus
from .pocket import load_pocket
from .report import ImageReport, Report
from .tokens import EncoderTap, Reduction, VisualTokens

try:
    __version__ = version("foveate")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CacheError",
    "Encoded",
    "EncoderTap",
    "FoveateError",
    "ImageReport",
    "InputError",
    "MethodInfo",
    "MissingExtraError",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "Random",
    "Reduction",
    "Report",
    "Sequential",
    "Session",
    "Spatial",
    "TokenReducer",
    "UnsupportedModelError",
    "VisualTokens",
    "attach",
    "detach",
    "encode",
    "get",
    "load_pocket",
    "methods",
]
