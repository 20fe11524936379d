"""Hugging Face's ViT, ViTMAE and VideoMAE: layer, attention and MLP (transformers 5)."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from avmae_fast.acceleration.modules import Part, Swapped
from avmae_fast.acceleration.operations import (
    add_norm,
    gelu_kind,
    is_plain,
    is_unhooked,
    joint_projection,
    linear_gelu,
    say_once,
    self_attention,
    why_not_gelu,
    why_not_norm,
)
from avmae_fast.acceleration.report import ATTENTION, GELU, NORM
from avmae_kernels.gelu import Approximation

# Back ends that compute plain attention; a function that a user registered may not.
_BACK_ENDS = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
)  # fmt: skip
# Arguments of a model that reach its layers and are no business of attention.
_OF_THE_MODEL = ("output_hidden_states", "return_dict", "use_cache", "interpolate_pos_encoding")


class VitLayer(Swapped):
    """ViTLayer and ViTMAELayer; their class adds gradient checkpointing to our forward too."""

    reads = ("attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
    attention: nn.Module
    layernorm_before: nn.Module
    layernorm_after: nn.LayerNorm
    mlp: nn.Module
    dropout: nn.Module

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        yield Part(NORM, "layernorm_after", why_not_norm(module.layernorm_after))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if not is_unhooked(self.layernorm_after):
            return super().forward(hidden_states, attention_mask, **kwargs)
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        x, h = add_norm(hidden_states, self.dropout(update), self.layernorm_after)
        return self.dropout(self.mlp(h)) + x


class VideoMaeLayer(Swapped):
    """VideoMAELayer; its output module adds the residual stream."""

    reads = ("attention", "layernorm_before", "layernorm_after", "intermediate", "output")
    attention: nn.Module
    intermediate: nn.Module
    output: nn.Module
    layernorm_before: nn.Module
    layernorm_after: nn.LayerNorm

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        yield Part(NORM, "layernorm_after", why_not_norm(module.layernorm_after))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not is_unhooked(self.layernorm_after):
            return super().forward(hidden_states, **kwargs)
        update = self.attention(self.layernorm_before(hidden_states), **kwargs)
        x, h = add_norm(hidden_states, update, self.layernorm_after)
        return self.output(self.intermediate(h), x)


class _Attention(Swapped):
    """Attention with a product each for q, k and v; here one makes all three."""

    config: Any
    num_attention_heads: int
    # Names of the three layers, of the head's width and of the dropout probability.
    layers: tuple[str, str, str]
    width: str
    dropout_name: str

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        yield Part(ATTENTION, "", cls._reason(module), cls._condition(module))

    @classmethod
    def _reason(cls, module: Any) -> str | None:
        back_end = module.config._attn_implementation
        if back_end not in _BACK_ENDS:
            return f"attn_implementation {back_end!r} may compute something else"
        if module.scaling != getattr(module, cls.width) ** -0.5:
            return f"its scaling {module.scaling} is not head_dim ** -0.5"
        odd = [name for name in cls.layers if type(getattr(module, name)) is not nn.Linear]
        return f"{odd[0]} is no plain Linear" if odd else None

    @classmethod
    def _condition(cls, module: Any) -> str | None:
        drops = getattr(module, cls.dropout_name) > 0
        return "own code in training: attention dropout" if drops else None

    def _attend(self, x: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Attention before the output layer; None where the module's own code has to run."""
        linears = [getattr(self, name) for name in self.layers]
        obstacle = None
        if mask is not None:
            obstacle = "it is given a mask"
        elif other := [k for k, v in kwargs.items() if v and k not in _OF_THE_MODEL]:
            obstacle = f"it is given {other[0]}"
        elif self.config._attn_implementation == "eager" and self._forward_hooks:
            obstacle = "a hook may read its attention weights"
        elif not all(map(is_plain, linears)):
            obstacle = "a projection is no plain Linear any more"
        if obstacle is not None:
            say_once(f"accelerate: {type(self).__name__} runs its own code where {obstacle}")
            return None
        if self.training and getattr(self, self.dropout_name) > 0:
            return None
        return self_attention(joint_projection(x, linears), self.num_attention_heads)


class VitAttention(_Attention):
    """ViTAttention and ViTMAEAttention."""

    layers = ("q_proj", "k_proj", "v_proj")
    width, dropout_name = "head_dim", "attention_dropout"
    reads = (*layers, width, dropout_name, "scaling", "o_proj")
    o_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        out = self._attend(hidden_states, attention_mask, kwargs)
        if out is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.o_proj(out), None


class VideoMaeAttention(_Attention):
    """VideoMAESelfAttention: keys have no bias."""

    layers = ("query", "key", "value")
    width, dropout_name = "attention_head_size", "dropout_prob"
    reads = (*layers, width, dropout_name, "scaling")

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out = self._attend(hidden_states, None, kwargs)
        return super().forward(hidden_states, **kwargs) if out is None else (out, None)


class VitMlp(Swapped):
    """ViTMLP and ViTMAEMLP."""

    reads = ("fc1", "activation_fn", "fc2")
    gelu: Approximation
    fc1: nn.Linear
    fc2: nn.Module
    activation_fn: nn.Module

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        setting = ("gelu", gelu_kind(module.activation_fn))
        yield Part(GELU, "", why_not_gelu(module.fc1, module.activation_fn), settings=(setting,))

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (is_plain(self.fc1) and is_unhooked(self.activation_fn)):
            return super().forward(hidden_states)
        return self.fc2(linear_gelu(hidden_states, self.fc1, self.gelu))


class VideoMaeIntermediate(Swapped):
    """The first half of an MLP."""

    reads = ("dense", "intermediate_act_fn")
    gelu: Approximation
    dense: nn.Linear
    intermediate_act_fn: Any

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        activation = module.intermediate_act_fn
        setting = ("gelu", gelu_kind(activation))
        yield Part(GELU, "", why_not_gelu(module.dense, activation), settings=(setting,))

    def forward(self, hidden_states: Tensor) -> Tensor:
        activation = self.intermediate_act_fn
        watched = isinstance(activation, nn.Module) and not is_unhooked(activation)
        if watched or not is_plain(self.dense):
            return super().forward(hidden_states)
        return linear_gelu(hidden_states, self.dense, self.gelu)


_VIT, _MAE, _VIDEO = (
    f"transformers.models.{name}"
    for name in ("vit.modeling_vit", "vit_mae.modeling_vit_mae", "videomae.modeling_videomae")
)
MODULES: dict[str, type[Swapped]] = {
    f"{_VIT}.ViTLayer": VitLayer,
    f"{_VIT}.ViTAttention": VitAttention,
    f"{_VIT}.ViTMLP": VitMlp,
    f"{_MAE}.ViTMAELayer": VitLayer,
    f"{_MAE}.ViTMAEAttention": VitAttention,
    f"{_MAE}.ViTMAEMLP": VitMlp,
    f"{_VIDEO}.VideoMAELayer": VideoMaeLayer,
    f"{_VIDEO}.VideoMAESelfAttention": VideoMaeAttention,
    f"{_VIDEO}.VideoMAEIntermediate": VideoMaeIntermediate,
}
