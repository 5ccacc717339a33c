"""foveate: fewer visual tokens for vision-language models, on stock Hugging Face classes.

Public names are looked up when they are first used, so that ``import foveate`` and the command line start quickly.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import _moved

if TYPE_CHECKING:
    from .analysis.cost import cost as cost
    from .api import ModelInfo as ModelInfo
    from .api import attach as attach
    from .api import models as models
    from .cuts import Cut as Cut
    from .cuts import DecoderTap as DecoderTap
    from .cuts import Pattern as Pattern
    from .cuts import PromptTokens as PromptTokens
    from .engine.install import detach as detach
    from .engine.session import Session as Session
    from .errors import CacheError as CacheError
    from .errors import FoveateError as FoveateError
    from .errors import InputError as InputError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .methods.aim import AIM as AIM
    from .methods.ats import ATS as ATS
    from .methods.base import DecoderReducer as DecoderReducer
    from .methods.base import EncoderReducer as EncoderReducer
    from .methods.base import FrontReducer as FrontReducer
    from .methods.base import KeepAll as KeepAll
    from .methods.base import Method as Method
    from .methods.base import ProjectorReducer as ProjectorReducer
    from .methods.base import TokenReducer as TokenReducer
    from .methods.baselines import Pool as Pool
    from .methods.baselines import Random as Random
    from .methods.baselines import Sequential as Sequential
    from .methods.baselines import Spatial as Spatial
    from .methods.cdpruner import CDPruner as CDPruner
    from .methods.compose import Compose as Compose
    from .methods.crossget import CrossGET as CrossGET
    from .methods.crossget_plus import CrossGETPlus as CrossGETPlus
    from .methods.dart import DART as DART
    from .methods.divprune import DivPrune as DivPrune
    from .methods.dyvte import DyVTE as DyVTE
    from .methods.evit import EViT as EViT
    from .methods.evs import EVS as EVS
    from .methods.fastv import FastV as FastV
    from .methods.fewer_frames import FewerFrames as FewerFrames
    from .methods.flashvid import FlashVID as FlashVID
    from .methods.fovea import Fovea as Fovea
    from .methods.g_search import GSearch as GSearch
    from .methods.idpruner import IDPruner as IDPruner
    from .methods.inflection_cut import InflectionCut as InflectionCut
    from .methods.iti import ITI as ITI
    from .methods.p_sigmoid import PSigmoid as PSigmoid
    from .methods.pixelprune import PixelPrune as PixelPrune
    from .methods.pixels import PixelReducer as PixelReducer
    from .methods.prumerge import PruMerge as PruMerge
    from .methods.prumerge_plus import PruMergePlus as PruMergePlus
    from .methods.prunesid import PruneSID as PruneSID
    from .methods.pyramiddrop import PyramidDrop as PyramidDrop
    from .methods.quecc import QueCC as QueCC
    from .methods.random_cut import RandomCut as RandomCut
    from .methods.registry import MethodInfo as MethodInfo
    from .methods.registry import get as get
    from .methods.registry import methods as methods
    from .methods.resize import Resize as Resize
    from .methods.scope import Scope as Scope
    from .methods.setok import SeTok as SeTok
    from .methods.setok_mean import SeTokMean as SeTokMean
    from .methods.sparsevlm import SparseVLM as SparseVLM
    from .methods.text_relevance import TextRelevanceCut as TextRelevanceCut
    from .methods.tome import ToMe as ToMe
    from .methods.trained import ModelShape as ModelShape
    from .methods.trained import Trained as Trained
    from .methods.v_cast import VCast as VCast
    from .methods.vidcom2 import VidCom2 as VidCom2
    from .methods.visionselector import VisionSelector as VisionSelector
    from .methods.visionzip import VisionZip as VisionZip
    from .methods.vispruner import VisPruner as VisPruner
    from .methods.vistog import VisToG as VisToG
    from .methods.vtc_cls import FasterVLM as FasterVLM
    from .methods.vtc_cls import VTCCls as VTCCls
    from .methods.yopo import YOPO as YOPO
    from .pictures import Encoded as Encoded
    from .pictures import Pictures as Pictures
    from .pictures import encode as encode
    from .pocket import load_pocket as load_pocket
    from .report import ImageReport as ImageReport
    from .report import Report as Report
    from .tokens import BlockTokens as BlockTokens
    from .tokens import EncoderTap as EncoderTap
    from .tokens import Merge as Merge
    from .tokens import Question as Question
    from .tokens import Reduction as Reduction
    from .tokens import Regroup as Regroup
    from .tokens import VisualTokens as VisualTokens
    from .tuning.plan import load_plan as load_plan

_HOMES = {
    "api": "ModelInfo attach models",
    "pictures": "Encoded Pictures encode",
    "analysis.cost": "cost",
    "cuts": "Cut DecoderTap Pattern PromptTokens",
    "engine.install": "detach",
    "engine.session": "Session",
    "errors": "CacheError FoveateError InputError MissingExtraError UnsupportedModelError",
    "methods.aim": "AIM",
    "methods.ats": "ATS",
    "methods.base": "DecoderReducer EncoderReducer FrontReducer KeepAll Method ProjectorReducer TokenReducer",
    "methods.baselines": "Pool Random Sequential Spatial",
    "methods.cdpruner": "CDPruner",
    "methods.compose": "Compose",
    "methods.crossget": "CrossGET",
    "methods.dart": "DART",
    "methods.divprune": "DivPrune",
    "methods.evit": "EViT",
    "methods.evs": "EVS",
    "methods.fastv": "FastV",
    "methods.fewer_frames": "FewerFrames",
    "methods.flashvid": "FlashVID",
    "methods.g_search": "GSearch",
    "methods.inflection_cut": "InflectionCut",
    "methods.iti": "ITI",
    "methods.p_sigmoid": "PSigmoid",
    "methods.prumerge": "PruMerge",
    "methods.prumerge_plus": "PruMergePlus",
    "methods.pixelprune": "PixelPrune",
    "methods.pixels": "PixelReducer",
    "methods.prunesid": "PruneSID",
    "methods.pyramiddrop": "PyramidDrop",
    "methods.random_cut": "RandomCut",
    "methods.registry": "MethodInfo get methods",
    "methods.resize": "Resize",
    "methods.scope": "Scope",
    "methods.sparsevlm": "SparseVLM",
    "methods.text_relevance": "TextRelevanceCut",
    "methods.tome": "ToMe",
    "methods.trained": "ModelShape Trained",
    "methods.v_cast": "VCast",
    "methods.vidcom2": "VidCom2",
    "methods.visionzip": "VisionZip",
    "methods.vispruner": "VisPruner",
    "methods.vtc_cls": "FasterVLM VTCCls",
    "methods.yopo": "YOPO",
    "methods.crossget_plus": "CrossGETPlus",
    "methods.dyvte": "DyVTE",
    "methods.fovea": "Fovea",
    "methods.quecc": "QueCC",
    "methods.setok": "SeTok",
    "methods.setok_mean": "SeTokMean",
    "methods.vistog": "VisToG",
    "methods.idpruner": "IDPruner",
    "methods.visionselector": "VisionSelector",
    "pocket": "load_pocket",
    "report": "ImageReport Report",
    "tuning.plan": "load_plan",
    "tokens": "BlockTokens EncoderTap Merge Question Reduction Regroup VisualTokens",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AIM",
    "ATS",
    "DART",
    "EVS",
    "ITI",
    "YOPO",
    "BlockTokens",
    "CDPruner",
    "CacheError",
    "Compose",
    "CrossGET",
    "CrossGETPlus",
    "Cut",
    "DecoderReducer",
    "DecoderTap",
    "DivPrune",
    "DyVTE",
    "EViT",
    "Encoded",
    "EncoderReducer",
    "EncoderTap",
    "FastV",
    "FasterVLM",
    "FewerFrames",
    "FlashVID",
    "Fovea",
    "FoveateError",
    "FrontReducer",
    "GSearch",
    "IDPruner",
    "ImageReport",
    "InflectionCut",
    "InputError",
    "KeepAll",
    "Merge",
    "Method",
    "MethodInfo",
    "MissingExtraError",
    "ModelInfo",
    "ModelShape",
    "PSigmoid",
    "Pattern",
    "Pictures",
    "PixelPrune",
    "PixelReducer",
    "Pool",
    "ProjectorReducer",
    "PromptTokens",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "QueCC",
    "Question",
    "Random",
    "RandomCut",
    "Reduction",
    "Regroup",
    "Report",
    "Resize",
    "Scope",
    "SeTok",
    "SeTokMean",
    "Sequential",
    "Session",
    "SparseVLM",
    "Spatial",
    "TextRelevanceCut",
    "ToMe",
    "TokenReducer",
    "Trained",
    "UnsupportedModelError",
    "VCast",
    "VTCCls",
    "VidCom2",
    "VisPruner",
    "VisToG",
    "VisionSelector",
    "VisionZip",
    "VisualTokens",
    "attach",
    "cost",
    "detach",
    "encode",
    "get",
    "load_plan",
    "load_pocket",
    "methods",
    "models",
]

_moved.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME and name != "methods":  # which is the package of that name, and can be called
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif importlib.util.find_spec(f"{__name__}.{name}") is not None:  # a room, before anybody imports it
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("foveate")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
