"""Accelerated models compiled, checkpointed, replicated and sharded: as before, before or after."""

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from others import inputs_for, make, output_of, run
from test_swap import classes, distance
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from avmae_fast import accelerate, restore
from avmae_fast.acceleration import operations

COMPILED = [
    "timm",
    pytest.param("ViT", marks=pytest.mark.slow),
    pytest.param("VideoMAE", marks=pytest.mark.slow),
    "torch, norm last",
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    model = make(name).double()
    want = run(model, name, torch.float64)
    accelerate(model)
    # VideoMAE counts masked tokens on the host.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name != "VideoMAE")
    for got, exact in zip(run(compiled, name, torch.float64), want, strict=True):
        assert distance(got, exact) < 1e-12


def test_compiled_for_any_number_of_tokens() -> None:
    model = make("torch, norm first").double().layers[0]
    twin = copy.deepcopy(model)
    accelerate(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 6, 9, 12):
        x = torch.randn(2, length, 48, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-12, atol=1e-12)
    # Not once for each; the first trace may fix more than it has to.
    assert counter.frame_count <= 2


def test_a_mask_under_compile() -> None:
    model = make("torch, norm last").double()
    (x,), _ = inputs_for("torch, norm last")
    mask = nn.Transformer.generate_square_subsequent_mask(5).double()
    want = model(x.double(), mask=mask)
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x.double(), mask=mask), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["timm", "ViT", "VideoMAE"])
def test_activation_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs again in the backward pass, on our operations."""
    model = make(name).double()
    want = run(model, name, torch.float64)
    calls = []
    attention = operations.packed_attention
    monkeypatch.setattr(
        operations, "packed_attention", lambda *args: calls.append(1) or attention(*args)
    )
    accelerate(model)
    run(model, name, torch.float64)
    once = len(calls)
    if name == "timm":
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for got, exact in zip(run(model, name, torch.float64), want, strict=True):
        assert distance(got, exact) < 1e-12
    assert len(calls) == once + 2 * once


@pytest.fixture
def one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        _join(folder, rank=0, world=1)
        yield
        distributed.destroy_process_group()


def _join(folder: str, rank: int, world: int) -> None:
    store = distributed.FileStore(str(Path(folder) / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)


def _layers(model: nn.Module) -> list[nn.Module]:
    for path in ("blocks", "layers", "encoder.layer"):
        try:
            return list(model.get_submodule(path))
        except AttributeError:
            continue
    raise AssertionError("no layers")


@pytest.mark.parametrize("name", ["timm", "ViT"])
def test_replicated(name: str, one_process: None) -> None:
    model = make(name).double()
    want = run(model, name, torch.float64)
    accelerate(model)
    replicated = DistributedDataParallel(model)
    for got, exact in zip(run(replicated, name, torch.float64), want, strict=True):
        assert distance(got, exact) < 1e-12


def _shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _sharded_distance(model: nn.Module, twin: nn.Module, name: str) -> float:
    """How far the gradients of a sharded model are from those of its whole twin."""
    args, kwargs = inputs_for(name)
    for each in (model, twin):
        output_of(each(*(x.double() for x in args), **kwargs)).square().sum().backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    found = [(p.grad.full_tensor(), q.grad) for p, q in pairs if q.grad is not None]
    got, exact = (
        torch.cat([grad.flatten() for grad in grads]) for grads in zip(*found, strict=True)
    )
    return distance(got, exact)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["timm", "ViT", "torch, norm last"])
def test_sharded(name: str, order: str, one_process: None) -> None:
    model, twin = make(name).double(), make(name).double()
    if order == "before":
        accelerate(model)
        _shard(model)
    else:
        _shard(model)
        before = classes(model)
        accelerate(model)
        assert classes(model) != before
    assert _sharded_distance(model, twin, name) < 1e-12
    restore(model)
    if order == "after":
        assert classes(model) == before
    # What is left is what sharding alone makes of the model.
    pairs = list(zip(classes(model), classes(twin), strict=True))
    assert all(cls is own or cls.__mro__[2] is own for cls, own in pairs)
    assert [cls.__name__ for cls, _ in pairs] == [
        own.__name__ if cls is own else f"FSDP{own.__name__}" for cls, own in pairs
    ]
    twin.zero_grad()
    model.zero_grad()
    assert _sharded_distance(model, twin, name) < 1e-12


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    _join(folder, rank, world=2)
    for name in ("timm", "ViT"):
        model, twin = make(name).double(), make(name).double()
        accelerate(model)
        _shard(model)
        assert _sharded_distance(model, twin, name) < 1e-12
        replicated = DistributedDataParallel(copy.deepcopy(twin))
        accelerate(replicated)
        for got, want in zip(
            run(replicated, name, torch.float64), run(twin, name, torch.float64), strict=True
        ):
            assert distance(got, want) < 1e-12
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *paths])
    torch.multiprocessing.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)
