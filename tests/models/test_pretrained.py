"""Folders of models: what is written comes back, and what cannot be used says why."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import randomise, tiny_batch, tiny_config

from avmae_fast.models import AudiovisualMAE, Encoder
from avmae_fast.models.pretrained import PretrainedError


def _saved(folder: Path) -> AudiovisualMAE:
    model = AudiovisualMAE(tiny_config(prefix_tokens=1))
    randomise(model)
    model.save_pretrained(folder, {"step": 3})
    return model


def test_there_and_back(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model")
    back = AudiovisualMAE.from_pretrained(tmp_path / "model")
    assert back.config == model.config and not back.training
    for name, x in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], x), name
    record = json.loads((tmp_path / "model/config.json").read_text())
    assert record["architecture"] == "AudiovisualMAE" and record["step"] == 3


def test_encoder_of_an_autoencoder(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model")
    encoder = Encoder.from_pretrained(str(tmp_path / "model"))
    batch = tiny_batch(model.config)
    inputs = {"video": batch["video"], "audio": batch["audio"].float()}
    got, wanted = encoder.encode(inputs, None), model.encode(inputs, None)
    assert all(torch.equal(got[m], wanted[m]) for m in wanted)


def test_an_encoder_is_no_autoencoder(tmp_path: Path) -> None:
    Encoder(tiny_config()).save_pretrained(tmp_path / "encoder")
    with pytest.raises(PretrainedError, match="holds no AudiovisualMAE: it is the Encoder"):
        AudiovisualMAE.from_pretrained(tmp_path / "encoder")


def test_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    _saved(tmp_path / "model")
    model = _saved(tmp_path / "model")
    assert torch.equal(
        AudiovisualMAE.from_pretrained(tmp_path / "model").mask_token["video"],
        model.mask_token["video"],
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(PretrainedError, match="in the way"):
        model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other/thesis.tex").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Encoder.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        Encoder.from_pretrained(tmp_path / "empty")
    _saved(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PretrainedError, match="holds no model"):
        Encoder.from_pretrained(tmp_path / "model")
    weights.write_bytes(whole)
    config = tmp_path / "model/config.json"
    record = json.loads(config.read_text())
    record["model"]["fusion"] = "late"
    config.write_text(json.dumps(record))
    with pytest.raises(PretrainedError, match="model.fusion = 'late'"):
        Encoder.from_pretrained(tmp_path / "model")
    record["model"] |= {"fusion": "mid", "encoder": {**record["model"]["encoder"], "mlp": 8}}
    config.write_text(json.dumps(record))
    with pytest.raises(PretrainedError, match="do not fit config.json"):
        Encoder.from_pretrained(tmp_path / "model")


def test_hub_names_the_package_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        Encoder.from_pretrained("someone/some-model")


def test_a_configuration_that_no_model_has(tmp_path: Path) -> None:
    Encoder(tiny_config()).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    record = json.loads(path.read_text())
    record["model"]["audio"]["frames"] = record["model"]["audio"]["patch"][0] * 2**60
    path.write_text(json.dumps(record))
    with pytest.raises(PretrainedError, match="config.json asks for a model that cannot be made"):
        Encoder.from_pretrained(tmp_path / "model")
