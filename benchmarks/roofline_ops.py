"""Every operation of one pretraining step, with its arithmetic and its traffic, row by row.

Bytes are those an implementation moves through the card's memory if every tensor it reads or writes
passes once; FLOPs are useful ones, two for a multiplication and an addition. The rows are those of
`benchmarks.step`: A eager reference, B compiled, B+ the rival, C the engine as it is, and "C+" with
what is planned for it: GELU in the products' epilogues, every bias gradient inside another kernel,
nothing computed twice, bf16 weights kept by the optimiser, the step as a CUDA graph.

Letters: n tokens of all clips, D width, M MLP width, P values in a patch. The residual stream is
fp32, products and attention are bf16; a count of bytes below is for one element of [n, D].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from avmae_fast.config import Modality, ModelConfig, StackConfig
from avmae_fast.data.windows import waveform_samples
from avmae_fast.reference.masking import masked_count
from avmae_fast.reference.model import encoder_stacks

Name = Literal["A", "B", "B+", "C", "C+"]
NAMES: tuple[Name, ...] = ("A", "B", "B+", "C", "C+")
Kind = Literal["product", "attention", "pass", "reduction", "columns", "copy", "optimiser"]


@dataclass(frozen=True)
class Op:
    """Work of one kind in a step, all calls together.

    group: the part of the step it belongs to. depth: of a product, the length of its sums.
    keys, head_dim: of attention. calls: launches in a step.
    """

    name: str
    group: str
    kind: Kind
    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 1
    depth: int = 0
    keys: int = 0
    head_dim: int = 0
    backward: bool = False


@dataclass(frozen=True)
class Tokens:
    """Tokens of one modality in a clip."""

    total: int
    visible: int

    @property
    def masked(self) -> int:
        return self.total - self.visible


@dataclass(frozen=True)
class Sequences:
    """What one stack sees: `tokens` of a clip in each of its sequences, `finished` at its end."""

    stack: StackConfig
    layers: int
    lengths: tuple[int, ...]
    finished: tuple[int, ...]
    group: str


def tokens_of(model: ModelConfig, m: Modality) -> Tokens:
    spec = model.input(m)
    return Tokens(spec.tokens, spec.tokens - masked_count(spec.tokens, spec.mask_ratio))


def stacks(model: ModelConfig) -> Iterator[Sequences]:
    """The stacks of a step, encoder first, with every sequence a clip sends through them."""
    counts = {m: tokens_of(model, m) for m in model.modalities}
    visible = tuple(t.visible for t in counts.values())
    joint = () if model.fusion == "shared" else (sum(visible),)
    for name, (layers, _) in encoder_stacks(model).items():
        if name == "both":
            lengths = joint or visible
        else:
            lengths = tuple(t.visible for m, t in counts.items() if m == name)
        yield Sequences(model.encoder, layers, lengths, lengths, "encoder")
    full = tuple(t.total for t in counts.values())
    asked = tuple(t.masked for t in counts.values())
    decoder, layers = model.decoder, model.decoder.layers
    if model.decoding == "joint":
        yield Sequences(decoder, layers, (sum(full),), (sum(asked),), "decoder")
    elif model.decoding == "shared":
        yield Sequences(decoder, layers, full, asked, "decoder")
    else:
        for length, tail in zip(full, asked, strict=True):
            yield Sequences(decoder, layers, (length,), (tail,), "decoder")


def operations(model: ModelConfig, batch: int, name: Name) -> list[Op]:
    """Every operation of a step of `batch` clips, as row `name` does it."""
    ops = [*_inputs(model, batch, name)]
    for stack in stacks(model):
        ops += _stack(stack, batch, name)
    ops += _between(model, batch, name)
    ops += _head_and_loss(model, batch, name)
    ops += _weights(model, name)
    return ops


def parameters(model: ModelConfig) -> int:
    """Number of weights."""
    width, narrow = model.encoder.width, model.decoder.width
    patches = [model.input(m).patch_dim for m in model.modalities]
    total = sum((p + 1) * width + (narrow + 1) * p + narrow for p in patches)
    total += len(patches) * (width + model.projection_bias) * narrow
    blocks = [(model.encoder, layers) for layers, _ in encoder_stacks(model).values()]
    copies = len(patches) if model.decoding == "separate" else 1
    blocks += [(model.decoder, model.decoder.layers)] * copies
    for stack, layers in blocks:
        total += layers * _block_parameters(stack) + (2 * stack.width if model.encoder_norm else 0)
    return total


def _block_parameters(stack: StackConfig) -> int:
    D, M = stack.width, stack.mlp
    return 4 * D * D + 4 * D + 2 * D * M + M + D + 4 * D


def _product(name: str, group: str, n: float, wide: int, deep: int, calls: int) -> Iterator[Op]:
    """`[n, deep] @ [deep, wide]` and both its gradients, `calls` times."""
    flops, each = 2.0 * n * wide * deep, 2.0 * (n * deep + n * wide + wide * deep)
    for which, depth in ((name, deep), (f"{name} dX", wide), (f"{name} dW", int(n))):
        backward = which != name
        yield Op(
            which, group, "product", calls * flops, calls * each, calls, depth, backward=backward
        )


def _stack(seqs: Sequences, batch: int, name: Name) -> Iterator[Op]:
    g, stack = seqs.group, seqs.stack
    D, M, layers = stack.width, stack.mlp, seqs.layers
    n = float(batch * sum(seqs.lengths))
    # The engine finishes only the tail in the last block; everybody else finishes every token.
    tail = batch * sum(seqs.finished) if name in ("C", "C+") else n
    q = n * (layers - 1) + tail  # query tokens of all layers
    together = name in ("C", "C+")
    calls = layers * (1 if together else len(seqs.lengths))
    mean_q = q / layers
    yield from _product("q of qkv", g, mean_q, D, D, layers)
    yield from _product("kv of qkv", g, n, 2 * D, D, layers)
    yield from _product("proj", g, mean_q, D, D, layers)
    yield from _product("fc1", g, mean_q, M, D, layers)
    yield from _product("fc2", g, mean_q, D, M, layers)
    for i, length in enumerate(seqs.lengths):
        queries = batch * (length * (layers - 1) + (seqs.finished[i] if together else length))
        for backward, factor, passes in ((False, 4.0, 4), (True, 10.0, 8)):
            yield Op(
                f"attention over {length}" + " backward" * backward,
                g,
                "attention",
                factor * queries * length * D,
                2.0 * passes * batch * length * layers * D,
                layers * (2 if backward else 1),
                keys=length,
                head_dim=stack.head_dim,
                backward=backward,
            )
    yield from _passes(g, q * D, q * M, calls, name)


def _passes(g: str, nD: float, nM: float, calls: int, name: Name) -> Iterator[Op]:
    """What is not a product nor attention, over all layers: nD and nM elements."""

    def op(what: str, kind: Kind, nbytes: float, kernels: int, backward: bool = False) -> Op:
        return Op(what, g, kind, bytes=nbytes, calls=kernels * calls, backward=backward)

    if name == "A":
        yield op("LayerNorm", "reduction", 2 * 8 * nD, 2)
        yield op("casts to bf16", "pass", 2 * 6 * nD, 2)
        yield op("residual additions", "pass", 2 * 10 * nD, 2)
        yield op("GELU", "pass", 4 * nM, 1)
        yield op("GELU backward", "pass", 6 * nM, 1, True)
        yield op("casts of gradients", "pass", 4 * 6 * nD, 4, True)
        yield op("LayerNorm backward", "reduction", 2 * 12 * nD, 2, True)
        yield op("LayerNorm's weights", "columns", 2 * 8 * nD, 4, True)
        yield op("residual gradients", "pass", 2 * 12 * nD, 2, True)
        yield op("bias gradients", "columns", 10 * nD + 2 * nM, 4, True)
        yield op("gradients of q, k, v side by side", "pass", 12 * nD, 1, True)
        return
    yield op("residual and LayerNorm", "pass", 2 * 12 * nD, 2)
    yield op("residual and LayerNorm backward", "pass", 2 * 16 * nD, 2, True)
    if name == "C+":
        yield op("GELU in the epilogues", "pass", 2 * nM, 0)
        yield op("GELU's slope in the epilogues", "pass", 2 * nM, 0, True)
        return
    yield op("GELU", "pass", 4 * nM, 1)
    yield op("GELU backward", "pass", 6 * nM, 1, True)
    if name == "C":
        yield op("LayerNorm and GELU once more", "pass", 2 * 6 * nD + 4 * nM, 3, True)
        yield op("bias gradient of qkv", "columns", 6 * nD, 1, True)
        return
    yield op("LayerNorm's weights", "columns", 2 * 6 * nD, 4, True)
    yield op("bias gradients", "columns", 10 * nD + 2 * nM, 8, True)
    yield op("gradients of q, k, v side by side", "pass", 12 * nD, 1, True)


def _elements(model: ModelConfig, batch: int, which: str) -> float:
    """Values of a batch in the patches of all, visible or masked tokens."""
    return float(
        batch
        * sum(
            getattr(tokens_of(model, m), which) * model.input(m).patch_dim for m in model.modalities
        )
    )


def host_bytes(model: ModelConfig, batch: int, name: Name) -> float:
    """Bytes a step copies from the host: float for A and B, uint8 and int16 sound for C."""
    video, audio = model.video, model.audio
    pixels = float(batch * video.frames * video.height * video.width * 3) if video else 0.0
    mel = float(batch * audio.frames * audio.mel_bins) if audio else 0.0
    if name in ("A", "B"):
        return 4 * (pixels + mel)
    if name == "B+":
        return pixels + 4 * mel
    return pixels + (2.0 * batch * waveform_samples(audio.frames) if audio else 0.0)


def _inputs(model: ModelConfig, batch: int, name: Name) -> Iterator[Op]:
    """Copy, log-mel, masks, patch embedding."""
    g, D = "input", model.encoder.width
    yield Op("copy from the host", g, "copy", bytes=host_bytes(model, batch, name), calls=2)
    if name in ("C", "C+") and model.audio is not None:
        # Windows, spectrum and power, fp32, each written and read once or twice.
        yield Op("log-mel", g, "pass", bytes=30.0 * batch * model.audio.frames * 512, calls=24)
    every, seen = _elements(model, batch, "total"), _elements(model, batch, "visible")
    counts = {m: tokens_of(model, m) for m in model.modalities}
    n_all = float(batch * sum(t.total for t in counts.values()))
    n_seen = float(batch * sum(t.visible for t in counts.values()))
    dense = name in ("A", "B")
    if name == "A":
        yield Op("patchify and cast", g, "pass", bytes=14 * every, calls=4)
        yield Op("add positions, gather", g, "pass", bytes=(6 * n_all + 8 * n_seen) * D, calls=4)
        yield Op("scatter, cast", g, "pass", bytes=(10 * n_all + 12 * n_seen) * D, calls=6,
                 backward=True)  # fmt: skip
        yield Op("bias gradient", g, "columns", bytes=2 * n_all * D, calls=2, backward=True)
    elif name == "B":
        yield Op("patchify and cast", g, "pass", bytes=6 * every, calls=2)
        yield Op("add positions, gather", g, "pass", bytes=6 * n_seen * D, calls=2)
        yield Op("scatter", g, "pass", bytes=(2 * n_all + 6 * n_seen) * D, calls=4, backward=True)
        yield Op("bias gradient", g, "columns", bytes=2 * n_all * D, calls=4, backward=True)
    else:
        # Rows of 48 bytes of a uint8 frame: half as much again is fetched.
        yield Op("gather and normalise", g, "pass", bytes=3.5 * seen, calls=2)
        yield Op("add positions", g, "pass", bytes=6 * n_seen * D, calls=2)
        yield Op("bias gradient", g, "columns", bytes=2 * n_seen * D, calls=2, backward=True)
    for m, count in counts.items():
        n, P = batch * (count.total if dense else count.visible), model.input(m).patch_dim
        embed, _, weights = _product(f"embed {m}", g, n, D, P, 1)  # pixels want no gradient
        yield from (embed, weights)


def _between(model: ModelConfig, batch: int, name: Name) -> Iterator[Op]:
    """From the encoder's output to the decoder's input."""
    g, D, E = "decoder", model.encoder.width, model.decoder.width
    counts = [tokens_of(model, m) for m in model.modalities]
    n_all = float(batch * sum(t.total for t in counts))
    for count in counts:
        yield from _product("decoder embedding", g, float(batch * count.visible), E, D, 1)
    eager = name == "A"
    yield Op("assemble sequences", g, "pass", bytes=(22 if eager else 5) * n_all * E,
             calls=8 if eager else 2)  # fmt: skip
    yield Op("assemble backward", g, "pass", bytes=(14 if eager else 5) * n_all * E,
             calls=12 if eager else 4, backward=True)  # fmt: skip


def _head_and_loss(model: ModelConfig, batch: int, name: Name) -> Iterator[Op]:
    g, E = "loss", model.decoder.width
    dense = name in ("A", "B")
    scored = _elements(model, batch, "total" if dense else "masked")
    for m in model.modalities:
        count = tokens_of(model, m)
        n = float(batch * (count.total if dense else count.masked))
        yield from _product(f"head {m}", g, n, model.input(m).patch_dim, E, 1)
    yield Op("bias gradient of the heads", g, "columns", bytes=2 * scored, calls=2, backward=True)
    # Target, difference, square, sum; then their gradient, as one pass or one a function.
    forward = {"A": 30.0, "B": 10.0, "B+": 5.0}.get(name, 5.5)
    backward = {"A": 18.0, "B": 8.0, "B+": 5.0}.get(name, 4.0)
    yield Op("loss", g, "pass", bytes=forward * scored, calls=12 if name == "A" else 2)
    yield Op("loss backward", g, "pass", bytes=backward * scored, calls=12 if name == "A" else 2,
             backward=True)  # fmt: skip


def _weights(model: ModelConfig, name: Name) -> Iterator[Op]:
    """Optimiser, and the casts of weights and their gradients under autocast."""
    count = float(parameters(model))
    encoder_layers = sum(layers for layers, _ in encoder_stacks(model).values())
    tensors = 12 * (encoder_layers + model.decoder.layers)
    each = {"A": 80.0, "B": 80.0, "B+": 28.0, "C": 36.0, "C+": 30.0}[name]
    launches = {"A": 300, "B": 300}.get(name, 40)
    yield Op("AdamW", "optimiser", "optimiser", 15 * count, each * count, launches)
    if name != "C+":
        yield Op("casts of weights", "optimiser", "pass", bytes=6 * count, calls=tensors)
        yield Op("casts of their gradients", "optimiser", "pass", bytes=6 * count, calls=tensors,
                 backward=True)  # fmt: skip
