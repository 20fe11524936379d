"""Models on packed tokens: `AudiovisualMAE` pretrains, `Encoder` is what it leaves behind."""

from avmae_fast.models.autoencoder import AudiovisualMAE, Reconstruction
from avmae_fast.models.encoder import Encoder
from avmae_fast.models.layout import TokenLayout, TokenMask

__all__ = ["AudiovisualMAE", "Encoder", "Reconstruction", "TokenLayout", "TokenMask"]
