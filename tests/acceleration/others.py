"""Tiny models of other libraries, with random weights, and how to run them."""

from collections.abc import Callable
from typing import Any

import torch
from libraries import library
from torch import Tensor, nn

_HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 16,
    "patch_size": 8,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
}


def timm_vit(**fields: Any) -> nn.Module:
    # Imported for what it registers; a model of one's own size needs its class alone.
    vision_transformer = library("timm").models.vision_transformer
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return vision_transformer.VisionTransformer(**size, num_classes=7, **fields)


def hf_vit(**fields: Any) -> nn.Module:
    transformers = library("transformers")
    return transformers.ViTModel(transformers.ViTConfig(**_HF, **fields), add_pooling_layer=False)


def vit_mae(**fields: Any) -> nn.Module:
    transformers = library("transformers")
    config = transformers.ViTMAEConfig(**_HF, **fields)
    return transformers.ViTMAEForPreTraining(config)


def video_mae(**fields: Any) -> nn.Module:
    transformers = library("transformers")
    config = transformers.VideoMAEConfig(**_HF, num_frames=4, **fields)
    return transformers.VideoMAEForPreTraining(config)


def torch_layers(**fields: Any) -> nn.Module:
    base = {"d_model": 48, "nhead": 3, "dim_feedforward": 80, "dropout": 0.0, "activation": "gelu"}
    layer = nn.TransformerEncoderLayer(**(base | {"batch_first": True} | fields))
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm, layer scale": lambda: timm_vit(init_values=0.5, qkv_bias=False),
    "ViT": hf_vit,
    "ViT, tanh": lambda: hf_vit(hidden_act="gelu_pytorch_tanh", qkv_bias=False),
    "ViTMAE": vit_mae,
    "VideoMAE": video_mae,
    "torch, norm first": lambda: torch_layers(norm_first=True),
    "torch, norm last": torch_layers,
    "torch, sequence first": lambda: torch_layers(batch_first=False),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A model whose every parameter is random, in training mode."""
    torch.manual_seed(seed)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.train()


def inputs_for(name: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Arguments of a model of that name, float32."""
    draw = torch.Generator().manual_seed(1)
    if name.startswith("torch"):
        return (torch.randn(2, 5, 48, generator=draw),), {}
    if name == "VideoMAE":
        masked = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 1]] * 2).bool()
        return (torch.randn(2, 4, 3, 16, 16, generator=draw),), {"bool_masked_pos": masked}
    pixels = torch.randn(2, 3, 16, 16, generator=draw)
    if name == "ViTMAE":
        return (pixels,), {"noise": torch.rand(2, 4, generator=draw)}
    return (pixels,), {}


def output_of(result: Any) -> Tensor:
    """The tensor to look at in what a model returned."""
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Output and all gradients as vectors of float64, for inputs of `dtype`."""
    args, kwargs = inputs_for(name)
    model.zero_grad()
    out = output_of(model(*(x.to(dtype) for x in args), **kwargs))
    weight = (torch.arange(out.numel()) % 7 - 3).view(out.shape)
    (out * weight.to(out)).sum().backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return out.detach().double().flatten(), torch.cat(grads)
