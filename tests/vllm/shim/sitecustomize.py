"""Lets the torchvision of PyPI, built for CUDA, be imported beside a torch for the CPU. Only on the path of tests of the plugin."""

from __future__ import annotations

import sys
from typing import Any

DECLARED: list[Any] = []  # a library that is collected takes its operators with it


class Declaring:
    """torchvision registers kernels for operators that its library for CUDA could not define: this defines them before."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and not DECLARED:
            import torch

            DECLARED.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declaring)  # type: ignore[arg-type]
