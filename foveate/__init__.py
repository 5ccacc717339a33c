"""foveate: fewer visual tokens for vision-language models, on stock Hugging Face classes."""

from importlib.metadata import PackageNotFoundError, version

from .api import Encoded, MethodInfo, attach, encode, methods
from .cuts import Cut, DecoderTap, Pattern, PromptTokens
from .engine.session import Session, detach
from .errors import CacheError, FoveateError, InputError, MissingExtraError, UnsupportedModelError
from .methods.aim import AIM
from .methods.base import Compose, DecoderReducer, Method, TokenReducer, get
from .methods.baselines import Pool, Random, Sequential, Spatial
from .methods.fastv import FastV
from .methods.g_search import GSearch
from .methods.inflection_cut import InflectionCut
from .methods.iti import ITI
from .methods.p_sigmoid import PSigmoid
from .methods.prumerge import PruMerge
from .methods.prumerge_plus import PruMergePlus
from .methods.pyramiddrop import PyramidDrop
from .methods.sparsevlm import SparseVLM
from .methods.text_relevance import TextRelevanceCut
from .methods.vtc_cls import FasterVLM, VTCCls
from .methods.yopo import YOPO
from .pocket import load_pocket
from .report import ImageReport, Report
from .tokens import EncoderTap, Reduction, VisualTokens

try:
    __version__ = version("foveate")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AIM",
    "ITI",
    "YOPO",
    "CacheError",
    "Compose",
    "Cut",
    "DecoderReducer",
    "DecoderTap",
    "Encoded",
    "EncoderTap",
    "FastV",
    "FasterVLM",
    "FoveateError",
    "GSearch",
    "ImageReport",
    "InflectionCut",
    "InputError",
    "Method",
    "MethodInfo",
    "MissingExtraError",
    "PSigmoid",
    "Pattern",
    "Pool",
    "PromptTokens",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "Reduction",
    "Report",
    "Sequential",
    "Session",
    "SparseVLM",
    "Spatial",
    "TextRelevanceCut",
    "TokenReducer",
    "UnsupportedModelError",
    "VTCCls",
    "VisualTokens",
    "attach",
    "detach",
    "encode",
    "get",
    "load_pocket",
    "methods",
]
