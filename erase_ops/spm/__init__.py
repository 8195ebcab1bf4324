"""SPM (one-dimensional adapters, arXiv 2312.16145): adapters, their concepts, training and a PEFT tuner."""

from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.spm.adapter import SPMAdapter
from expunge.erase_ops.spm.concepts import Concept

__all__ = ["Concept", "Factors", "SPMAdapter"]
