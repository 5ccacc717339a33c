"""foveate: fewer visual tokens for vision-language models, on stock Hugging Face classes."""

from importlib.metadata import PackageNotFoundError, version

from .analysis.cost import cost
from .api import Encoded, MethodInfo, ModelInfo, attach, encode, methods, models
from .cuts import Cut, DecoderTap, Pattern, PromptTokens
from .engine.session import Session, detach
from .errors import CacheError, FoveateError, InputError, MissingExtraError, UnsupportedModelError
from .methods.aim import AIM
from .methods.ats import ATS
from .methods.base import Compose, DecoderReducer, EncoderReducer, FrontReducer, Method, TokenReducer, get
from .methods.baselines import Pool, Random, Resize, Sequential, Spatial
from .methods.cdpruner import CDPruner
from .methods.crossget import CrossGET
from .methods.dart import DART
from .methods.divprune import DivPrune
from .methods.evit import EViT
from .methods.fastv import FastV
from .methods.g_search import GSearch
from .methods.inflection_cut import InflectionCut
from .methods.iti import ITI
from .methods.p_sigmoid import PSigmoid
from .methods.prumerge import PruMerge
from .methods.prumerge_plus import PruMergePlus
from .methods.pyramiddrop import PyramidDrop
from .methods.scope import Scope
from .methods.sparsevlm import SparseVLM
from .methods.text_relevance import TextRelevanceCut
from .methods.tome import ToMe
from .methods.visionzip import VisionZip
from .methods.vispruner import VisPruner
from .methods.vtc_cls import FasterVLM, VTCCls
from .methods.yopo import YOPO
from .pocket import load_pocket
from .report import ImageReport, Report
from .tokens import BlockTokens, EncoderTap, Merge, Question, Reduction, VisualTokens

try:
    __version__ = version("foveate")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AIM",
    "ATS",
    "DART",
    "ITI",
    "YOPO",
    "BlockTokens",
    "CDPruner",
    "CacheError",
    "Compose",
    "CrossGET",
    "Cut",
    "DecoderReducer",
    "DecoderTap",
    "DivPrune",
    "EViT",
    "Encoded",
    "EncoderReducer",
    "EncoderTap",
    "FastV",
    "FasterVLM",
    "FoveateError",
    "FrontReducer",
    "GSearch",
    "ImageReport",
    "InflectionCut",
    "InputError",
    "Merge",
    "Method",
    "MethodInfo",
    "MissingExtraError",
    "ModelInfo",
    "PSigmoid",
    "Pattern",
    "Pool",
    "PromptTokens",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Question",
    "Random",
    "Reduction",
    "Report",
    "Resize",
    "Scope",
    "Sequential",
    "Session",
    "SparseVLM",
    "Spatial",
    "TextRelevanceCut",
    "ToMe",
    "TokenReducer",
    "UnsupportedModelError",
    "VTCCls",
    "VisPruner",
    "VisionZip",
    "VisualTokens",
    "attach",
    "cost",
    "detach",
    "encode",
    "get",
    "load_pocket",
    "methods",
    "models",
]
