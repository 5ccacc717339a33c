"""Peak arithmetic and memory bandwidth of processors, as their vendors publish them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..errors import InputError


@dataclass(frozen=True)
class Hardware:
    """A processor as the roofline sees it; everything per second.

    Parameters
    ----------
    name : for tables and pictures.
    bandwidth : bytes between its memory and its units.
    fp16 : operations in float16 or bfloat16 matrices, dense.
    fp32 : operations in float32 without tensor cores; what is not a matrix product runs at this rate, too.
    int8, int4 : operations in 8- and 4-bit matrices, dense; None where it has no such units: the next wider ones are used.

    Raises
    ------
    InputError : a number is not positive and finite.
    """

    name: str
    bandwidth: float
    fp16: float
    fp32: float
    int8: float | None = None
    int4: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{field.name}={value} of hardware {self.name!r} is not a rate; give a positive number per second")

    def peak(self, bits: float | None) -> float:
        """Operations per second on matrices of ``bits`` wide numbers; None = not a matrix product."""
        if bits is None or bits > 16:
            return self.fp32
        if bits <= 4 and self.int4:
            return self.int4
        return self.int8 if bits <= 8 and self.int8 else self.fp16


_ROWS = (
    Hardware("V100", 900e9, 112e12, 14e12),
    Hardware("A100", 2039e9, 312e12, 19.5e12, 624e12, 1248e12),
    Hardware("H100", 3.35e12, 989.5e12, 67e12, 1979e12),
    Hardware("H200", 4.8e12, 989.5e12, 67e12, 1979e12),
    Hardware("L4", 300e9, 121e12, 30.3e12, 242.5e12, 485e12),
    Hardware("RTX-4090", 1008e9, 165.2e12, 82.6e12, 660.6e12, 1321.2e12),
    Hardware("CPU", 89.6e9, 1.3824e12, 1.3824e12),
    Hardware("V100-LLM-Viewer", 900e9, 112e12, 14e12, 62e12),
)

HARDWARE = {row.name.lower(): row for row in _ROWS}
"""The table, by lower-case name. Dense peaks: where a datasheet prints the figure with sparsity, half of it. What each was
checked against is in ``docs/cost.md``.

- ``v100``: NVIDIA V100 Tensor Core GPU datasheet, column PCIe: 112 TFLOPS tensor, 14 TFLOPS single precision, 900 GB/s. Its tensor
  cores know no integers.
- ``a100``: NVIDIA A100 datasheet, column 80GB SXM: 312 TFLOPS FP16, 624 TOPS INT8, 19.5 TFLOPS FP32, 2,039 GB/s; 1,248 TOPS INT4
  from the datasheet of the 40GB model, which has the same processor.
- ``h100``: NVIDIA H100 datasheet, column SXM: 1,979 TFLOPS FP16 and 3,958 TOPS INT8 with sparsity, 67 TFLOPS FP32, 3.35 TB/s.
- ``h200``: NVIDIA H200 datasheet, column SXM: the same arithmetic, 4.8 TB/s.
- ``l4``: NVIDIA L4 datasheet: 242 TFLOPS FP16 and 485 TOPS INT8 with sparsity, 30.3 TFLOPS FP32, 300 GB/s. It
  prints no INT4; its tensor cores are those of the RTX 4090, where INT4 is twice INT8.
- ``rtx-4090``: NVIDIA Ada GPU Architecture whitepaper, appendix A: 165.2 TFLOPS FP16 with FP32 accumulation (what PyTorch uses),
  660.6 TOPS INT8, 1,321.2 TOPS INT4, 82.6 TFLOPS FP32, 1,008 GB/s.
- ``cpu``: Intel Core i9-13900K, product specification: 89.6 GB/s, 8 performance cores at 5.4 GHz with AVX2, which is 32 float32
  operations a cycle and core (two units, 8 lanes, multiply and add). Its 16 efficient cores are left out: with them, arithmetic may
  be faster than this. It has no float16 arithmetic: float16 runs as float32.
- ``v100-llm-viewer``: the V100 as LLM-Viewer lists it, with 62 TOPS INT8: a number of that tool and not of the datasheet, needed
  for Table 2 of LLaVA-PruMerge.
"""


def get_hardware(hardware: str | Hardware) -> Hardware:
    """A row of the table by its name, whatever the case.

    Raises
    ------
    InputError : there is none of that name.
    """
    if isinstance(hardware, Hardware):
        return hardware
    found = HARDWARE.get(str(hardware).lower().replace("_", "-").replace(" ", "-"))
    if found is None:
        raise InputError(
            f"unknown hardware {hardware!r}; the table has {', '.join(HARDWARE)}. "
            "Describe another by its bandwidth and peak: foveate.analysis.hardware.Hardware, or --bandwidth and --peak."
        )
    return found
