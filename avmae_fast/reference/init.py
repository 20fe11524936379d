"""Initial weights, drawn from the distributions of the authors' code."""

import math

from torch import Tensor, nn

# Standard deviation of a standard normal cut at +-2; LeCun-normal divides by it to stay unbiased.
_CUT_NORMAL_STD = 0.87962566103423978

_NORMAL = ("bottleneck", "query")


def init_parameter(name: str, parameter: Tensor) -> None:
    """Draw the parameter of this state-dict name.

    Patch embeddings are LeCun-normal (cut at two standard deviations), the matrices inside a
    block and the decoder embedding Xavier-uniform, with q, k and v each a matrix of its own.
    MLP biases are N(0, 1e-6), learned positions, prefix tokens, bottlenecks and queries N(0, 0.02),
    LayerNorms the identity. Zero are the heads, mask, modality and class tokens and all other
    biases.
    """
    owner, _, leaf = name.rpartition(".")
    if owner.startswith("patch_embed") and leaf == "weight":
        std = math.sqrt(1.0 / parameter.shape[1]) / _CUT_NORMAL_STD
        nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
    elif owner.endswith((".qkv", ".kv")) and leaf == "weight":
        for matrix in parameter.detach().split(parameter.shape[1]):
            nn.init.xavier_uniform_(matrix)
    elif leaf == "weight" and (
        owner.startswith(("decoder_embed", "pool.", "pre_logits"))
        or owner.endswith(("attn.proj", "mlp.fc1", "mlp.fc2"))
    ):
        nn.init.xavier_uniform_(parameter)
    elif owner.endswith(("mlp.fc1", "mlp.fc2")):
        nn.init.normal_(parameter, std=1e-6)
    elif owner in ("pos_embed", "decoder_pos_embed", "prefix_token") or leaf in _NORMAL:
        nn.init.normal_(parameter, std=0.02)
    elif "norm" in owner and leaf == "weight":
        nn.init.ones_(parameter)
    else:
        nn.init.zeros_(parameter)
