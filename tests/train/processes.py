"""Runs a function in several processes at once, as torchrun would start them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PATIENCE_S = 240


def run_processes(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank, or the exception it raises.

    `function` is importable, and what it returns can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once, and not by every process.
    context.set_forkserver_preload(["avmae_fast.train.pretrain"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in world.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        # Not daemonic: a loader's workers are children of its own.
        process = context.Process(target=_run, args=(theirs, environment, function, args))
        process.start()
        processes.append(process)
        ends.append(ours)
    try:
        return [_result(end, rank) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _result(end: Connection, rank: int) -> Any:
    if not end.poll(PATIENCE_S):
        raise TimeoutError(f"rank {rank} has not come to an end in {PATIENCE_S} s")
    result, text = end.recv()
    if text is not None and not isinstance(result, Exception):
        raise RuntimeError(f"rank {rank}: {text}")
    return result


def _run(
    end: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        end.send((function(*args), None))
    except Exception as error:
        try:
            end.send((error, traceback.format_exc()))
        except Exception:
            end.send((None, traceback.format_exc()))
