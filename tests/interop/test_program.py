"""Exported programs compute what the encoder computes, for any number of clips."""

from pathlib import Path

import pytest
import torch
from tiny import randomise, tiny_config

from avmae_fast.interop.program import export_program
from avmae_fast.models import Encoder


@pytest.mark.parametrize("fields", [{"prefix_tokens": 1}, {"video": None}], ids=str)
def test_any_number_of_clips(fields: dict, tmp_path: Path) -> None:
    encoder = Encoder(tiny_config(**fields))
    randomise(encoder)
    torch.export.save(export_program(encoder), tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for clips in (1, 2, 5):
        inputs = {"audio": torch.randn(clips, 26, 16)}
        if encoder.config.video is not None:
            inputs["video"] = torch.randint(0, 256, (clips, 4, 16, 8, 3), dtype=torch.uint8)
        got, wanted = program(**inputs), encoder(**inputs)
        assert got.keys() == wanted.keys()
        for m in wanted:
            # The same operations on the same numbers, only traced.
            torch.testing.assert_close(got[m], wanted[m], rtol=1e-6, atol=1e-6)
