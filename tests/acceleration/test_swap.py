"""Accelerated models compute what they computed, with the same parameters, and can be restored."""

import copy
import io
import logging
from typing import Any

import pytest
import torch
from libraries import library
from others import MAKERS, hf_vit, inputs_for, make, output_of, run, timm_vit, torch_layers
from torch import Tensor, nn

import avmae_fast
from avmae_fast.acceleration import NothingToSwapError, operations, restore
from avmae_fast.acceleration.report import ATTENTION, GELU, NORM

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def forget_what_was_said() -> None:
    operations._warn.cache_clear()
    torch._dynamo.reset()


def accelerate(model: nn.Module) -> Any:
    return avmae_fast.accelerate(model)


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", MAKERS)
def test_equal_in_float64(name: str) -> None:
    model = make(name).double()
    twin = copy.deepcopy(model)
    report = accelerate(model)
    # Each model has two or three layers, and in each all three operations are swapped.
    assert {found.operation for found in report.swapped} == {ATTENTION, NORM, GELU}
    for got, want in zip(
        run(model, name, torch.float64), run(twin, name, torch.float64), strict=True
    ):
        assert distance(got, want) < 1e-12


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("name", MAKERS)
def test_within_bf16_rounding(name: str, autocast: bool) -> None:
    """As near to float64 as the original in the same precision, which is one draw of its error."""
    model = make(name) if autocast else make(name).to(BF16)
    twin = copy.deepcopy(model)
    exact = run(copy.deepcopy(model).double(), name, torch.float64)
    accelerate(model)
    dtype = torch.float32 if autocast else BF16
    with torch.autocast("cpu", BF16, enabled=autocast):
        ours, plain = run(model, name, dtype), run(twin, name, dtype)
        args, kwargs = inputs_for(name)
        args = tuple(x.to(dtype) for x in args)
        assert output_of(model(*args, **kwargs)).dtype == output_of(twin(*args, **kwargs)).dtype
    for got, low, want in zip(ours, plain, exact, strict=True):
        assert distance(got, want) <= 2 * distance(low, want) + torch.finfo(BF16).eps


@pytest.mark.parametrize("name", MAKERS)
def test_same_parameters_and_exact_restore(name: str) -> None:
    model = make(name)
    before, names = classes(model), list(model.state_dict())
    parameters = dict(model.named_parameters())
    dictionaries = [dict(module.__dict__) for module in model.modules()]
    accelerate(model)
    assert classes(model) != before
    assert list(model.state_dict()) == names
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [type(m).__name__ for m in model.modules()] == [cls.__name__ for cls in before]
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), before, strict=True))
    restore(model)
    assert classes(model) == before
    assert [dict(module.__dict__) for module in model.modules()] == dictionaries


def test_twice_is_once() -> None:
    model = make("timm")
    accelerate(model)
    before = classes(model)
    accelerate(model)
    assert classes(model) == before


@pytest.mark.parametrize("name", ["timm", "ViT", "torch, norm last"])
def test_copies_and_pickles(name: str) -> None:
    model = make(name)
    accelerate(model)
    want = run(model, name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert classes(twin) == classes(model)
        assert torch.equal(run(twin, name)[1], want[1])


def test_nothing_to_swap() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = classes(model)
    with pytest.raises(NothingToSwapError, match="Sequential has no layer .* TransformerEncoderLa"):
        accelerate(model)
    assert classes(model) == before
    decoder = nn.TransformerDecoderLayer(16, 2)
    with pytest.raises(NothingToSwapError, match="TransformerDecoderLayer is not known"):
        accelerate(decoder)
    with pytest.raises(TypeError, match="got str"):
        accelerate("a model")


def test_nothing_is_half_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while a later module is examined leaves the earlier ones as they were."""
    model = make("timm")
    before = classes(model)
    model.blocks[1].attn.scale = "broken"
    model.blocks[1].attn.attn_drop.p = None
    with pytest.raises(TypeError):
        accelerate(model)
    assert classes(model) == before


def test_prints_what_was_swapped_and_what_not(capsys: pytest.CaptureFixture[str]) -> None:
    report = accelerate(timm_vit(qk_norm=True, act_layer=nn.ReLU))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert "swapped residual + LayerNorm   2  blocks.*.norm2" in printed
    assert "left    attention              2  blocks.*.attn: qk_norm" in printed
    assert "blocks.*.mlp: its activation is ReLU" in printed
    assert "blocks.*.norm1, " in printed and "no addition of the same layer" in printed


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: torch_layers(activation="relu"), "its activation is relu"),
        (lambda: torch_layers(bias=False), "it has no bias"),
        (lambda: torch_layers(dropout=0.1), "own code in training: attention dropout"),
        (lambda: hf_vit(hidden_act="quick_gelu"), "its activation is QuickGELUActivation"),
        (lambda: timm_vit(attn_drop_rate=0.1), "own code in training: attention dropout"),
    ],
)
def test_reasons(model: Any, reason: str) -> None:
    assert reason in str(accelerate(model()))


def test_relative_position_bias_is_named() -> None:
    beit = library("timm").models.beit.Beit
    model = beit(16, 8, embed_dim=48, depth=1, num_heads=3, use_rel_pos_bias=True)
    assert "relative position bias" in str(accelerate(model))


class OtherBlock(nn.TransformerEncoderLayer):
    """A block that computes something else."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


def test_a_derived_class_with_code_of_its_own_is_left() -> None:
    layer = OtherBlock(48, 3, 80, dropout=0.0, activation="gelu")
    with pytest.raises(NothingToSwapError, match="it overrides TransformerEncoderLayer"):
        accelerate(layer)


@pytest.mark.parametrize("kind", ["mask", "padding"])
@pytest.mark.parametrize("training", [True, False])
def test_torch_masks_are_obeyed(
    kind: str, training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("torch, norm last").double().train(training)
    (x,), _ = inputs_for("torch, norm last")
    x = x.double()
    causal = nn.Transformer.generate_square_subsequent_mask(5).double()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    given = {"mask": causal} if kind == "mask" else {"src_key_padding_mask": padding}
    want, unmasked = model(x, **given), model(x)
    accelerate(model)
    torch.testing.assert_close(model(x, **given), want, rtol=1e-12, atol=1e-12)
    # The mask makes a difference, and only it sends calls to the layer's own code.
    assert (model(x) - want).abs().max() > 1e-3
    torch.testing.assert_close(model(x), unmasked, rtol=1e-12, atol=1e-12)
    said = [r.message for r in caplog.records if "gets a mask" in r.message]
    assert len(said) == 1


def test_timm_masks_are_obeyed(caplog: pytest.LogCaptureFixture) -> None:
    block = make("timm").double().blocks[0]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    want = block(x, attn_mask=mask), block(x, is_causal=True)
    accelerate(block)
    torch.testing.assert_close(block(x, attn_mask=mask), want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x, is_causal=True), want[1], rtol=1e-12, atol=1e-12)
    assert len([r for r in caplog.records if "given a mask" in r.message]) == 1


def test_huggingface_masks_are_obeyed(caplog: pytest.LogCaptureFixture) -> None:
    model = make("ViT").double()
    (pixels,), _ = inputs_for("ViT")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = {"pixel_values": pixels.double(), "attention_mask": mask}
    want = model(**call).last_hidden_state
    accelerate(model)
    got = model(**call).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (model(pixels.double()).last_hidden_state - want).abs().max() > 1e-3
    assert len([r for r in caplog.records if "given a mask" in r.message]) == 1


@pytest.mark.parametrize("name", ["timm", "ViT", "torch"])
def test_dropout_is_drawn_as_before(name: str) -> None:
    """The same random numbers in the same order, whoever computes attention."""
    makers = {
        "timm": lambda: timm_vit(attn_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.3),
        "ViT": lambda: hf_vit(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2),
        "torch": lambda: torch_layers(dropout=0.2),
    }
    torch.manual_seed(0)
    model = makers[name]().double().train()
    twin = copy.deepcopy(model)
    accelerate(model)
    results = []
    for each in (model, twin):
        torch.manual_seed(1)
        results.append(run(each, name, torch.float64))
    assert distance(results[0][1], results[1][1]) < 1e-12


def test_hooks_and_adapters_still_see_their_modules() -> None:
    model = make("timm").double()
    want = run(model, "timm", torch.float64)
    accelerate(model)
    seen = []
    for child in ("norm2", "mlp.fc1", "attn", "mlp.act"):
        module = model.blocks[0].get_submodule(child)
        module.register_forward_hook(lambda *_, child=child: seen.append(child))
    # An adapter that is put in after the fact.
    doubled = nn.utils.parametrize
    doubled.register_parametrization(model.blocks[1].mlp.fc1, "weight", nn.Identity())
    got = run(model, "timm", torch.float64)
    assert sorted(seen) == ["attn", "mlp.act", "mlp.fc1", "norm2"]
    assert distance(got[0], want[0]) < 1e-12


def test_attention_weights_can_still_be_had() -> None:
    model = make("ViT")
    model.set_attn_implementation("eager")
    (pixels,), _ = inputs_for("ViT")
    want = model(pixels, output_attentions=True).attentions
    accelerate(model)
    got = model(pixels, output_attentions=True).attentions
    assert len(got) == 2
    torch.testing.assert_close(got, want)


def test_many_lengths_do_not_compile_kernels_for_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_lengths", set())
    model = make("torch, norm last").double()
    twin = copy.deepcopy(model)
    accelerate(model)
    for length in range(1, 20):
        x = torch.randn(2, length, 48, dtype=torch.float64)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    assert len(operations._lengths) == 16
    assert len([r for r in caplog.records if "varying lengths" in r.message]) == 1


def test_empty_batch() -> None:
    model = make("torch, norm last")
    accelerate(model)
    assert model(torch.zeros(0, 5, 48)).shape == (0, 5, 48)


def test_says_nothing_where_nothing_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for name in MAKERS:
            model = make(name)
            accelerate(model)
            run(model, name)
    assert not [r for r in caplog.records if r.name.startswith("avmae_fast")]
