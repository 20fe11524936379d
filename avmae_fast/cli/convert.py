"""The command `avmae convert`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from avmae_fast.cli.training import add_overrides

if TYPE_CHECKING:
    from avmae_fast.interop.finetuned import FinetunedRun

_FORMATS = (
    "avmae (folder), scenic (Flax msgpack), timm (also DeiT, DINO), mae, mae-st, audiomae, "
    "videomae (also V2), cav-mae, hf-vit, hf-vitmae, hf-videomae (folders)"
)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command's arguments."""
    parser.description = (
        "Convert weights from one code base's names to another's. Only tensors are read: a pickle "
        "with code in it is refused. OUT must not exist; it appears whole or not at all."
    )
    parser.epilog = f"Formats: {_FORMATS}."
    parser.add_argument("source", metavar="IN", type=Path, help="a file, or a folder of a model")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument("--from", dest="read_as", metavar="FORMAT", help="told by names if absent")
    parser.add_argument("--to", dest="write_as", metavar="FORMAT", default="avmae")
    parser.add_argument(
        "--pixels",
        help="the normalisation that the other code's pixels have: imagenet, kinetics, unit "
        "([0, 1]) or signed ([-1, 1], ours); it becomes part of the patch embedding",
    )
    parser.add_argument("--heads", type=int, help="attention heads, where the width is unusual")
    parser.add_argument("--decoder-heads", type=int, help="the decoder's, likewise")
    parser.add_argument("--frames", type=int, help="frames of a clip, where no tensor tells")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the pictures")
    parser.add_argument("--audio-frames", type=int, default=1000, help="scenic: rows of sound")
    parser.add_argument("--fusion", choices=("early", "shared"), help="scenic: of a single stack")
    parser.add_argument("--decoding", choices=("shared", "joint"), default="shared", help="scenic")
    parser.add_argument(
        "--classifier",
        metavar="CONFIG",
        help="scenic: make a whole classifier of a fine-tuned checkpoint, which this preset or "
        "TOML file of a fine-tuning run describes, as audioset-ft-av; its data.manifest names "
        "the classes",
    )
    add_overrides(parser, "of --classifier: set one field, as in --set model.fusion_layer=16")
    parser.add_argument("--encoder-only", action="store_true", help="leave the decoder out")
    parser.add_argument(
        "--resize",
        type=int,
        nargs="+",
        metavar="N",
        help="frames, height and width (or rows of sound): interpolates learned positions",
    )
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from avmae_fast.interop.convert import Wishes, convert
    from avmae_fast.interop.entries import ConvertError
    from avmae_fast.interop.scenic_files import ScenicShape
    from avmae_fast.interop.vit import Shape

    size = tuple(args.size) if args.size else None
    wishes = Wishes(
        classifier=_finetuned_run(args),
        shape=Shape(
            heads=args.heads,
            decoder_heads=args.decoder_heads,
            frames=args.frames,
            size=size,
        ),
        scenic=ScenicShape(
            fusion=args.fusion,
            decoding=args.decoding,
            frames=args.frames or 16,
            size=size or (224, 224),
            audio_frames=args.audio_frames,
        ),
        pixels=args.pixels,
        encoder_only=args.encoder_only,
        resize_to=tuple(args.resize) if args.resize else None,
    )
    try:
        notes = convert(args.source, args.out, args.read_as, args.write_as, wishes)
    except FileNotFoundError as error:
        raise ConvertError(str(error)) from error
    print("\n".join(notes))
    print(f"{args.out}: {args.write_as}")
    return 0


def _finetuned_run(args: argparse.Namespace) -> "FinetunedRun | None":
    """What --classifier and --set say."""
    from avmae_fast.interop.entries import ConvertError

    if args.classifier is None:
        if args.overrides:
            raise ConvertError("--set belongs to --classifier CONFIG, which is absent")
        return None
    from avmae_fast.config_file import load_finetune_config
    from avmae_fast.data.manifest import load_manifest
    from avmae_fast.interop.finetuned import FinetunedRun
    from avmae_fast.train.targets import check_classes

    config = load_finetune_config(args.classifier, args.overrides)
    manifest = load_manifest(config.data.manifest)
    check_classes(manifest, config.model.heads)
    return FinetunedRun(config, manifest.classes)
