"""The base of methods that leave out parts of a picture before the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from ..errors import InputError
from .base import FrontReducer


@dataclass(kw_only=True)
class PixelReducer(FrontReducer):
    """A method that leaves out cells of pictures, each what becomes one visual token, before the vision encoder; it implements
    ``sources``.

    For encoders that take pictures at their own size as a packed sequence of patches: these then get fewer patches, and so do all
    that follows. Cells that stay keep their (t, h, w) places.
    """

    stage: ClassVar[str] = "before the vision encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temporal is not None:
            raise InputError(f"{self.name}: temporal= compares features, and this acts before there are any. Leave it out.")

    def sources(self, cells: Tensor) -> Tensor:
        """For each cell of a picture or video the one that stands for it; a cell stays where that is itself.

        Parameters
        ----------
        cells : [N, P] pixels as the encoder gets them, frame by frame, row by row.

        Returns
        -------
        int64 [N].
        """
        raise TypeError(f"{type(self).__name__} does not implement sources(cells)")

    def with_share(self, share: float) -> Self:
        """Everything, or what its rule leaves: no share of the tokens can be asked for."""
        return self.with_budget(1.0 if share >= 1 else None)

    def layer_tokens(self, total: int, layers: int) -> Any:
        """Not known: it depends on the picture."""
        return [total] * layers if self.keeps_all else None
