"""The batch that stopped a run is made again, and the broken sample and layer are named."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from avmae_fast.config import Config
from avmae_fast.train import pretrain as loop
from avmae_fast.train.guard import NonFiniteError
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.pretrain import pretrain
from avmae_fast.train.replay import replay
from avmae_fast.train.run_folder import RunFolderError

BAD_SAMPLES = {5, 9, 13}


@pytest.fixture
def bad_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples whose spectrogram is not a number, as if a file were so."""
    make = InputStage._make

    def broken(self: InputStage, batch: Any) -> dict[str, Any]:
        inputs = make(self, batch)
        for row, key in enumerate(batch.keys.tolist()):
            if key in BAD_SAMPLES:
                inputs["audio"][row] = math.nan
        return inputs

    monkeypatch.setattr(InputStage, "_make", broken)


def test_names_sample_and_layer(make_config: Callable[..., Config], bad_samples: None) -> None:
    config = make_config({"batch": 4, "steps": 10, "checkpoint_every": 100})
    with pytest.raises(NonFiniteError, match="at step 4"):
        pretrain(config)
    replayed = list(replay(config.train.out, "cpu"))
    assert [one.sample for one in replayed] == [12, 13, 14, 15]
    assert [one.sample for one in replayed if not one.finite] == [13]
    (broken,) = [one for one in replayed if not one.finite]
    assert broken.layer is not None and broken.layer.startswith("encoder.audio")
    assert "sample 13: loss nan, first not finite after encoder.audio" in str(broken)


def test_folder_without_a_failure(make_config: Callable[..., Config], monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out)
    config = make_config({"steps": 1})
    with pytest.raises(RunFolderError, match="not the folder of a run"):
        list(replay(config.train.out))
    pretrain(config)
    with pytest.raises(RunFolderError, match="no failed step"):
        list(replay(config.train.out))
