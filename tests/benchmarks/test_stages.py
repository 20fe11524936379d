"""The campaign's stages: every job can be run, a finished one is not run again."""

import json
from pathlib import Path

import pytest

from benchmarks import ceilings, cpu, end_to_end, finetune, kernels, peers, stages, step

MODULES = {
    "ceilings": ceilings,
    "end_to_end": end_to_end,
    "finetune": finetune,
    "kernels": kernels,
    "peers": peers,
    "step": step,
}
TINY = ["--device", "cpu", "--tiny"]


def test_jobs_are_in_order_of_worth_and_have_names_of_their_own() -> None:
    order = [stages.STAGES.index(job.stage) for job in stages.JOBS]
    assert order == sorted(order) and set(order) == set(range(len(stages.STAGES)))
    names = [job.result for job in stages.JOBS if job.result]
    assert len(set(names)) == len(names)
    # `newest` and `results_of` find a result by the benchmark its name starts with.
    assert all(job.result.startswith(job.module) for job in stages.JOBS if job.result)


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("job", [job for job in stages.JOBS if job.result], ids=lambda j: j.result)
def test_every_command_is_understood(
    job: stages.Job, tiny: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = stages.command(job, tmp_path, "cpu", tiny, 100.0)
    module = MODULES[job.module]
    seen = []
    monkeypatch.setattr(module, "measure", lambda args, result, deadline: seen.append(args))
    assert words[1:3] == ["-m", f"benchmarks.{job.module}"]
    assert module.main(words[3:]) == 0
    assert seen[0].tiny == tiny
    assert stages.finished(job, tmp_path)


def test_a_finished_job_is_not_run_again(tmp_path: Path, capsys) -> None:
    for job in stages.JOBS:
        if job.stage == "peers":
            (tmp_path / f"{job.result}.json").write_text(json.dumps({"complete": True}))
    assert stages.main(["--stage", "peers", "--results", str(tmp_path), *TINY]) == 0
    assert capsys.readouterr().out.count("finished before") == 3


def test_half_a_result_is_not_finished(tmp_path: Path) -> None:
    job = stages.JOBS[1]
    assert not stages.finished(job, tmp_path)
    (tmp_path / f"{job.result}.json").write_text(json.dumps({"complete": False}))
    assert not stages.finished(job, tmp_path)
    (tmp_path / f"{job.result}.json").write_text("{")
    assert not stages.finished(job, tmp_path)


def test_a_stage_runs_and_keeps_its_log(tmp_path: Path, monkeypatch, capfd) -> None:
    job = stages.Job("rivals", "ceilings", "ceilings")
    monkeypatch.setattr(stages, "JOBS", (job,))
    assert stages.main(["--stage", "rivals", "--results", str(tmp_path), *TINY]) == 0
    found = json.loads((tmp_path / "ceilings.json").read_text())
    assert found["complete"] and found["rows"][0]["product"] == "encoder qkv forward"
    assert "encoder qkv forward" in (tmp_path / "logs" / "ceilings.log").read_text()


def test_a_job_past_its_time_is_ended(tmp_path: Path, capsys) -> None:
    job = stages.Job("step", "step-x", "step", tiny=("--model", "B"))
    assert not stages.run_job(job, tmp_path, "cpu", True, 0.2)
    assert "exit code -9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "match"),
    [(["--stage", "nothing"], "no stage nothing: choose from tests"), ([], "no CUDA device")],
)
def test_bad_input(options: list[str], match: str, tmp_path: Path, capsys) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert stages.main([*options, "--results", str(tmp_path)]) == 2
    assert match in capsys.readouterr().err


def test_peers_say_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert peers.main([*TINY, "--compiler", "eager", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    ours = [row for row in found["rows"] if row["candidate"] == "ours"]
    assert {row["contest"] for row in ours} == {"video", "image", "encoder"}
    assert len(found["rows"]) + len(found["not_run"]) == 9
    assert all("not installed or broken" in row["why"] for row in found["not_run"])


def test_from_files_to_weights(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="clips are read and written with PyAV")
    path = tmp_path / "end_to_end.json"
    options = ["--workers", "0", "--steps", "1", "--warm-up", "1", "--short-side", "40"]
    command = [*TINY, *options, "--compiler", "eager", "--json", str(path)]
    assert end_to_end.main(command) == 0
    found = json.loads(path.read_text())
    sources = {row["source"]: row for row in found["rows"]}
    assert {"B+, raw mp4", "C, raw mp4"} <= sources.keys()
    assert all(row["clips_per_s"] > 0 and 0 <= row["share_waiting"] < 1 for row in found["rows"])
    told = {row["source"]: row["why"] for row in found["not_run"]}
    assert sources.keys() | told.keys() >= {"C, packed h264", "C, packed mjpeg"}


def test_host_s_rows(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="clips are read and written with PyAV")
    path = tmp_path / "cpu.json"
    assert cpu.main(["--tiny", "--repeats", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    ours = {row["what"]: row["times_ours"] for row in found["rows"] if row["candidate"] == "ours"}
    assert ours == dict.fromkeys(cpu.PARTS, 1.0)
