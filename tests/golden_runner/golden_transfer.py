"""The golden case about transfer: which pretrained leaf the authors' conversion puts where."""

import json
from collections.abc import Iterator

from golden_cases import FUSION, Case, Comparison

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.scenic import SCENIC_MODALITY, entries_of
from avmae_fast.interop.scenic_classifier import classifier_entries
from avmae_fast.interop.transfer import transfer
from avmae_fast.models import AudiovisualMAE, Classifier

_FORGOTTEN = "patch_embed.audio"


def check_init_mapping(case: Case) -> Iterator[Comparison]:
    """Every leaf of every conversion: copied from the same leaf, new, or left behind as there."""
    for key, outcome in json.loads(str(case.arrays["mapping"])).items():
        strategy, modalities, variant = key.split("|")
        source = _source(strategy, _depth(case), _joint_layers(case, strategy))
        target = _target(source, modalities.split("+"))
        # As released the audio embedding is looked for under a wrong name: it stays new, or the
        # conversion stops there. Ours has it, unless told otherwise.
        forgets = variant == "as_released" and "audio" in target.modalities
        if "error" in outcome:
            missed = "embedding_spec" in outcome["error"] and forgets
            yield Comparison(f"{key} {outcome['error']}", 0.0 if missed else 1.0, 0.0)
            continue
        yield from _compare(key, outcome, source, target, forgets)


def _compare(
    key: str, outcome: dict, source: ModelConfig, target: ClassifierConfig, forgets: bool
) -> Iterator[Comparison]:
    pretrained, model = AudiovisualMAE(source), Classifier(target)
    report = transfer(pretrained.state_dict(), source, model, fresh=[_FORGOTTEN] if forgets else [])
    ours = {e.name: e.leaves for e in entries_of(source)}
    copied, left = {}, {leaf for name in report.left for leaf in ours[name]}
    for entry in classifier_entries(target):
        origin = report.copied.get(entry.name)
        leaves = ours[origin] if origin else [""] * len(entry.leaves)
        copied |= dict(zip(entry.leaves, leaves, strict=True))
    expected = {
        leaf.replace("embedding_spec/", "embedding_spectrogram/"): origin
        for leaf, origin in outcome["map"].items()
        # A model of one modality carries a bottleneck that nothing reads.
        if leaf != "bottleneck" or len(target.modalities) > 1
    }
    wrong = sorted(expected.items() ^ copied.items())
    yield Comparison(f"{key}: {wrong}", len(wrong), 0)
    wrong = sorted(left ^ set(outcome["unused_source"]))
    yield Comparison(f"{key}, left behind: {wrong}", len(wrong), 0)


def _depth(case: Case) -> int:
    return 1 + max(
        int(leaf.split("encoderblock_")[1].split("/")[0].removesuffix("_spec"))
        for outcome in json.loads(str(case.arrays["mapping"])).values()
        for leaf in outcome.get("map", {})
        if "encoderblock_" in leaf
    )


def _joint_layers(case: Case, strategy: str) -> int:
    """How many layers of a conversion come from a joint stack."""
    for key, outcome in json.loads(str(case.arrays["mapping"])).items():
        if key.startswith(f"{strategy}|") and "map" in outcome:
            origins = {o.split("/LayerNorm_0")[0] for o in outcome["map"].values()}
            joint = [o for o in origins if o.startswith("Transformer_concat/encoderblock")]
            return max(1, len({o.split("/")[1] for o in joint}))
    return 1


def _source(strategy: str, layers: int, joint: int) -> ModelConfig:
    return ModelConfig(
        encoder=StackConfig(width=4, layers=layers, heads=1, mlp=4),
        decoder=StackConfig(width=4, layers=1, heads=1, mlp=4),
        video=VideoConfig(frames=2, height=2, width=2, tubelet=(2, 2, 2)),
        audio=AudioConfig(frames=2, mel_bins=2, patch=(2, 2)),
        fusion=FUSION[strategy],
        fusion_layers=joint,
    )


def _target(source: ModelConfig, scenic: list[str]) -> ClassifierConfig:
    here = {m: source.input(m) if name in scenic else None for m, name in SCENIC_MODALITY.items()}
    return ClassifierConfig(encoder=source.encoder, classes=2, **here)
