"""A run's configuration from a TOML file or a preset, with `key=value` overrides, and back.

The tables of a file are the fields of `avmae_fast.config`, which says what each means. Two words
are added: `[model] size = "L"` fills in the encoder and the decoder of a named size, and
`video = false` or `audio = false` in `[model]` makes a model of one modality.
"""

import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from avmae_fast.config import (
    DECODER_SIZES,
    ENCODER_SIZES,
    Config,
    ConfigError,
    ModelConfig,
    StackConfig,
)
from avmae_fast.finetune_config import FUSION_LAYER, ClassifierConfig, FinetuneConfig

T = TypeVar("T")
RunT = TypeVar("RunT", Config, FinetuneConfig)

_HELP = {
    "model.classes": "how many the manifest names; give it with --set model.classes=N",
    "data.manifest": "no preset holds one; give yours with --set data.manifest=FILE",
    "train.out": "the folder of the run; give it with --set train.out=FOLDER",
    "model.encoder": 'set size = "B" in [model], or write the table [model.encoder]',
    "model.decoder": 'set size = "B" in [model], or write the table [model.decoder]',
}

# How an optional field is left out: TOML has no null.
_ABSENT = "none"

# Of each pair a run has one: an override of either takes the place of the other in the file.
_ALTERNATIVES = (("train.steps", "train.epochs"), ("train.warmup_steps", "train.warmup_epochs"))


def presets() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = files("avmae_fast") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith("toml"))


def load_config(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a TOML file, or of a preset, with overrides applied.

    Args:
        path_or_preset: name of a preset, else path of a file.
        overrides: `key=value` with a dotted key; the value as TOML writes it, where a bare word
            is a string and `none` leaves an optional field out. Later ones win.

    Returns:
        The checked configuration; the paths in it are absolute, seen from the current folder.

    Raises:
        ConfigError: no such file, not TOML, or a field that is unknown, missing or not valid.
    """
    return _with_absolute_paths(from_dict(_table(path_or_preset, overrides)))


def load_finetune_config(
    path_or_preset: str | Path, overrides: Sequence[str] = ()
) -> FinetuneConfig:
    """The fine-tuning run of a TOML file or a preset; all as in `load_config`."""
    config = finetune_from_dict(_table(path_or_preset, overrides))
    if config.finetune.init is not None:
        recipe = replace(config.finetune, init=_absolute(config.finetune.init))
        config = replace(config, finetune=recipe)
    return _with_absolute_paths(config)


def _table(path_or_preset: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    table = _read(path_or_preset)
    for override in overrides:
        _override(table, override)
    return table


def _with_absolute_paths(config: RunT) -> RunT:
    data = replace(config.data, manifest=_absolute(config.data.manifest))
    if data.val_manifest is not None:
        data = replace(data, val_manifest=_absolute(data.val_manifest))
    return replace(config, data=data, train=replace(config.train, out=_absolute(config.train.out)))


def from_dict(table: Mapping[str, Any]) -> Config:
    """The configuration that nested tables hold, as a TOML file or `to_dict` gives them."""
    expanded = dict(table)
    if "finetune" in expanded:
        raise ConfigError("[finetune] belongs to a fine-tuning run: use avmae finetune")
    if isinstance(expanded.get("model"), Mapping):
        expanded["model"] = _expand_model(expanded["model"])
    return _build(Config, expanded, "")


def finetune_from_dict(table: Mapping[str, Any]) -> FinetuneConfig:
    """The fine-tuning run that nested tables hold."""
    expanded = dict(table)
    if "finetune" not in expanded:
        raise ConfigError("there is no table [finetune]: a fine-tuning run has one")
    if isinstance(expanded.get("model"), Mapping):
        expanded["model"] = _expand_classifier(expanded["model"])
    return _build(FinetuneConfig, expanded, "")


def classifier_from_dict(table: Mapping[str, Any]) -> ClassifierConfig:
    """The classifier that a [model] table holds."""
    return _build(ClassifierConfig, _expand_classifier(table), "model")


def model_from_dict(table: Mapping[str, Any]) -> ModelConfig:
    """The model that a [model] table holds."""
    return _build(ModelConfig, _expand_model(table), "model")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, or a part of one, as JSON can hold it; `from_dict` undoes it."""
    return json.loads(json.dumps(asdict(config), default=str))


def differing_fields(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two `to_dict` tables differ, as "train.batch: 16, now 32" in the order of `b`."""
    found = []
    for name in [*b, *(name for name in a if name not in b)]:
        field = f"{prefix}{name}"
        left, right = a.get(name), b.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differing_fields(left, right, f"{field}.")
        elif left != right:
            found.append(f"{field}: {_show(left)}, now {_show(right)}")
    return found


def _show(value: object) -> str:
    return "a table" if isinstance(value, Mapping) else repr(value)


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{str(path)!r} is not valid: there is no such user") from error


def _read(path_or_preset: str | Path) -> dict[str, Any]:
    name = str(path_or_preset)
    try:
        if name in presets():
            return tomllib.loads((files("avmae_fast") / "presets" / f"{name}.toml").read_text())
        return tomllib.loads(Path(path_or_preset).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        known = ", ".join(presets())
        raise ConfigError(
            f"{name!r} is neither a configuration file nor a preset{_nearest(name, presets())}; "
            f"the presets are {known}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, lists 1000 deep
        raise ConfigError(f"{name!r} is not a TOML file: {error}") from error


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `key=value` in nested tables."""
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"override {override!r} is not valid: it must be key=value with a dotted key, "
            "as in train.batch=16"
        )
    for pair in _ALTERNATIVES:
        if key in pair and text != _ABSENT:
            section, other = pair[1 - pair.index(key)].split(".")
            if isinstance(table.get(section), dict):
                table[section].pop(other, None)
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            name = ".".join(parts[: depth + 1])
            raise ConfigError(
                f"override {override!r} is not valid: {name} is {table!r}, not a table"
            )
    table[parts[-1]] = _value(text)


def _value(text: str) -> Any:
    """A TOML value; else the text itself, so that words need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _expand_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """[model] with `size` replaced by the stacks it stands for, and `false` by None."""
    return _expand(model, {"encoder": ENCODER_SIZES, "decoder": DECODER_SIZES})[0]


def _expand_classifier(model: Mapping[str, Any]) -> dict[str, Any]:
    """[model] of a classifier, whose size also says where its modalities meet."""
    expanded, size = _expand(model, {"encoder": ENCODER_SIZES})
    return expanded if size is None else {"fusion_layer": FUSION_LAYER[size], **expanded}


def _expand(
    model: Mapping[str, Any], stacks: Mapping[str, Mapping[str, StackConfig]]
) -> tuple[dict[str, Any], str | None]:
    expanded = dict(model)
    size = expanded.pop("size", None)
    if size is not None:
        if not isinstance(size, str) or size not in ENCODER_SIZES:
            known = ", ".join(map(repr, ENCODER_SIZES))
            raise ConfigError(f"model.size = {size!r} is not valid: it must be one of {known}")
        for name, sizes in stacks.items():
            given = expanded.get(name, {})
            if isinstance(given, Mapping):
                expanded[name] = {**asdict(sizes[size]), **given}
    for name in ("video", "audio"):
        if expanded.get(name) is False:
            expanded[name] = None
    return expanded, size


def _build(cls: type[T], table: Mapping[str, Any], path: str) -> T:
    """An instance of a dataclass from a table; `path` is the table's dotted name."""
    known: dict[str, Field] = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    words = [*known, "size"] if path == "model" else list(known)
    for name in table:
        if name not in known:
            raise ConfigError(
                f"unknown field {_dotted(path, name)}{_nearest(name, words)}; "
                f"{path or 'a configuration'} has {', '.join(words)}"
            )
    hints = get_type_hints(cls)
    values = {}
    for name, field in known.items():
        dotted = _dotted(path, name)
        if name in table:
            values[name] = _convert(table[name], hints[name], dotted)
        elif is_dataclass(hints[name]) and field.default_factory is MISSING and dotted not in _HELP:
            # An absent [data] is an empty one, so that the field it lacks is what gets named.
            values[name] = _build(hints[name], {}, dotted)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{dotted} is not set: {_HELP.get(dotted, 'it has no default')}")
    try:
        return cls(**values)
    except ConfigError as error:
        # A stack, say, does not know whether it is the encoder's or the decoder's.
        raise ConfigError(f"in [{path}]: {error}" if path else str(error)) from error


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type of field `name`, or ConfigError with what was wanted and what came."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in args and value in (None, _ABSENT):
            return None
        choices = [a for a in args if a is not type(None)]
        tables = [a for a in choices if get_origin(a) is Mapping]
        fits = tables if isinstance(value, Mapping) and tables else choices
        return _convert(value, fits[0], name)
    if origin is Mapping:
        return {key: _convert(v, args[1], f"{name}.{key}") for key, v in value.items()}
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        valid = "one of " + ", ".join(map(repr, args))
        near = _nearest(value, args) if isinstance(value, str) else ""
        raise ConfigError(f"{name} = {value!r} is not valid: it must be {valid}{near}")
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(hint, value, name)  # type: ignore[arg-type]
        raise _wrong_type(name, value, "a table")
    if origin is tuple and args[-1] is Ellipsis:
        if isinstance(value, list | tuple):
            return tuple(_convert(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))
        raise _wrong_type(name, value, "a list")
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(args):
            return tuple(
                _convert(v, a, f"{name}[{i}]")
                for i, (v, a) in enumerate(zip(value, args, strict=True))
            )
        raise _wrong_type(name, value, f"a list of {len(args)}")
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < (math.inf if isinstance(value, float) else _MOST):
            raise ConfigError(
                f"{name} = {str(value)[:40]} is not valid: it must be finite, and a "
                "whole number below 2**64"
            )
        value = hint(value) if hint is float else value
    if hint is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    # bool is a subclass of int, and a switch is no number.
    if type(value) is hint:
        return value
    raise _wrong_type(name, value, _TYPE_NAMES[hint])


# Every whole number fits into an unsigned 64-bit word, as a seed does.
_MOST = 2**64

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path (a string)",
}


def _wrong_type(name: str, value: object, wanted: str) -> ConfigError:
    got = "a table" if isinstance(value, Mapping) else f"{type(value).__name__} {value!r}"
    return ConfigError(f"{name} must be {wanted}, got {got}")


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where something known is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
