"""The paper in plain dense PyTorch: what the engine must compute, written to be read.

No packing, no kernels, no speed: masks are gathers and scatters on [B, N, D] tensors. It is the
oracle of the tests and a baseline of the benchmarks, and is itself held against numbers of the
authors' code. The engine never imports it.
Source: Georgescu et al., "Audiovisual Masked Autoencoders", ICCV 2023, arXiv:2212.05922.
"""

from avmae_fast.reference.classifier import ReferenceClassifier, ReferenceLogits
from avmae_fast.reference.masking import Mask, draw_mask, masked_count
from avmae_fast.reference.model import ReferenceMAE, ReferenceOutput

__all__ = [
    "Mask",
    "ReferenceClassifier",
    "ReferenceLogits",
    "ReferenceMAE",
    "ReferenceOutput",
    "draw_mask",
    "masked_count",
]
