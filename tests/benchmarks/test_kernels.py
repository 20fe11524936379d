"""Every operation's row runs on tiny shapes; wrong or absent candidates are told, not timed."""

import json
from pathlib import Path

import pytest
import torch

from avmae_kernels import attention_backends
from benchmarks import kernels
from benchmarks.attention_cases import attention_cases, dense
from benchmarks.kernel_cases import memory_cases, unavailable_call
from benchmarks.results import Result

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--tiny", "--no-compile"]


def test_every_operation(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert kernels.main([*QUICK, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["benchmark"] == "kernels" and found["complete"]
    timed = {(row["op"], row["candidate"], row["direction"]) for row in found["rows"]}
    for op in {case.op for case in [*memory_cases(CPU, True), *attention_cases(CPU, True)]}:
        for direction in kernels.DIRECTIONS:
            assert {(op, "ours", direction), (op, "eager", direction)} <= timed
    for row in found["rows"]:
        assert row["relative_error"] <= row["allowed"] < 1e-5
        assert (row["tflops"] is None) == (row["share_of_matmul_ceiling"] is None)
    missing = {row["candidate"]: row["why"] for row in found["not_run"]}
    assert "not installed" in missing["liger"] and "cannot run" in missing["sdpa-cudnn"]


def _one(case, capsys) -> Result:
    result = Result("kernels", CPU, None)
    result.extra |= {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    found = kernels._checked(case, result, {"op": case.op}, no_compile=True)
    result.extra["right"] = found
    return result


@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "reconstruction_loss"])
def test_a_wrong_candidate_is_not_timed(op: str, capsys) -> None:
    (case, *_) = [c for c in [*attention_cases(CPU, True), *memory_cases(CPU, True)] if c.op == op]
    right = case.calls["ours"]

    def off(*args):
        out = right(*args)
        return tuple(1.0001 * x for x in out) if isinstance(out, tuple) else 1.0001 * out

    def nan(*args):
        out = right(*args)
        return (
            tuple(x * float("nan") for x in out) if isinstance(out, tuple) else out * float("nan")
        )

    case.calls.update(off=off, nan=nan, absent=unavailable_call("it is not there"))
    result = _one(case, capsys)
    why = {row["candidate"]: row["why"] for row in result.not_run}
    assert why["off"].startswith("wrong") and why["nan"].startswith("wrong: relative error nan")
    assert why["absent"] == "it is not there"
    assert "ours" in result.extra["right"] and "off" not in result.extra["right"]


def test_dense_attention_of_varying_lengths() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(9 + 5 + 5, 3, 2, 8, dtype=torch.float64)
    whole = dense(qkv, [9, 5, 5])
    parts = [dense(part, [len(part)]) for part in qkv.split([9, 5, 5])]
    torch.testing.assert_close(whole, torch.cat(parts))


def _row(candidate: str, lengths: list[int], us: float, direction: str = "training") -> dict:
    return {"op": "attention", "candidate": candidate, "lengths": lengths, "us": us,
            "head_dim": 64, "direction": direction, "shape": str(lengths)}  # fmt: skip


ROWS = [
    _row("ours", [157], 10.0), _row("sdpa-cudnn", [157], 9.0), _row("eager", [157], 1.0),
    _row("ours", [306], 10.0), _row("sdpa-cudnn", [306], 12.0),
    _row("ours", [2064], 10.0), _row("sdpa-flash", [2064], 11.0), _row("sdpa-cudnn", [2064], 7.0),
    # Quick, but not right (or not there) at every length of its class.
    _row("ours", [1568], 10.0), _row("sdpa-cudnn", [1568], 8.0), _row("xformers", [1568], 1.0),
    _row("ours", [157, 149], 10.0), _row("torch-varlen", [157, 149], 9.0),
    _row("ours", [157], 5.0, "forward"),
]  # fmt: skip


def test_the_table_names_the_fastest_of_each_class() -> None:
    found = {
        (e["arch"], e["length"], e["head_dim"], e["direction"]): e["impl"]
        for e in kernels.choices(ROWS, 90)
    }
    assert found == {
        (90, "short", 64, "training"): "triton",  # 100 against 108: the geometric mean
        (90, "long", 64, "training"): "sdpa-cudnn",
        (90, "varying", 64, "training"): "torch-varlen",
        (90, "short", 64, "forward"): "triton",
    }


def test_the_table_is_one_that_auto_can_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "attention.json"
    path.write_text(attention_backends.TABLE.read_text())
    other = {"arch": 80, "length": "short", "head_dim": 64, "direction": "forward", "impl": "sdpa"}
    old = {**other, "arch": 90}
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "choices": [other, old]}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    result = Result("kernels", CPU, None)
    result.rows = ROWS
    kernels.write_table(path, result)
    monkeypatch.setattr(attention_backends, "TABLE", path)
    table = attention_backends.table.__wrapped__()
    assert table["choices"][0] == other and old not in table["choices"]
    assert len(table["choices"]) == 5 and "cpu" in table["measured_on"]
    assert table["proven"] == before["proven"] and table["format"] == before["format"]
    assert result.extra["attention_table"] == table


def test_a_cpu_writes_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([*QUICK, "--write-table"]) == 2
    assert "wants --device cuda" in capsys.readouterr().err
