"""Models on packed tokens.

`AudiovisualMAE` pretrains, `Encoder` is what it leaves behind, `Classifier` is fine-tuned.
"""

from avmae_fast.models.autoencoder import AudiovisualMAE, Reconstruction
from avmae_fast.models.classifier import Classifier, Prediction
from avmae_fast.models.classifier_training import Classification, TrainedClassifier
from avmae_fast.models.drop_path import DropPath, draw_dropped
from avmae_fast.models.encoder import Encoder
from avmae_fast.models.layout import TokenLayout, TokenMask
from avmae_fast.models.masked_encoder import MaskedEncoder
from avmae_fast.models.packed_tokens import PackedTokens

__all__ = [
    "AudiovisualMAE",
    "Classification",
    "Classifier",
    "DropPath",
    "Encoder",
    "MaskedEncoder",
    "PackedTokens",
    "Prediction",
    "Reconstruction",
    "TokenLayout",
    "TokenMask",
    "TrainedClassifier",
    "draw_dropped",
]
