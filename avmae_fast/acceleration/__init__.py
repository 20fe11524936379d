"""Run a model that others wrote on our operations: `accelerate(model)`, undone by `restore(model)`.

Known are the blocks of timm's VisionTransformer, the layers of ViT, ViTMAE and VideoMAE of Hugging
Face and torch.nn.TransformerEncoderLayer. What is swapped in them:

attention             by packed attention on sequences of one length
residual + LayerNorm  where the addition and the LayerNorm after it are in one layer
GELU + bias           the activation, with the bias of the product before it

Each module keeps its parameters, buffers, children and hooks; only its class changes, to one of
the same name derived from it. So `state_dict`, optimisers, DDP, FSDP2, torch.compile and activation
checkpointing see what they saw before. Our operations have no second derivative.
"""

from avmae_fast.acceleration.report import Report
from avmae_fast.acceleration.swap import NothingToSwapError, accelerate, restore

__all__ = ["NothingToSwapError", "Report", "accelerate", "restore"]
