"""A model of what a Gluon kernel for Hopper does, on CPU tensors: the kernel's own source runs, on these stand-ins.

Each group of warps is a thread of Python, of which one runs at a time; which one goes on, when a copy arrives and when
a product is computed is drawn at random, as late as the waits allow. Barriers count arrivals and bytes as mbarriers do,
by the parity of their phase. So a buffer that is filled too early, a wait that is missing and a wait for each other
show, whatever a GPU would have made of it. Layouts and registers do not exist here: the compiler checks those.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeadlockError(Exception):
    """All wait, and nothing is under way."""


class Machine:
    """One program of the grid, and what is under way in it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.workers: list[Worker] = []
        self.running: Worker | None = None

    def run(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.workers = [Worker(self, function, arguments) for function, arguments in parts]
        while any(not worker.done for worker in self.workers):
            ready = [worker for worker in self.workers if not worker.done and worker.may_go_on()]
            choices: list[Any] = ready + self.copies
            if not choices:
                for worker in self.workers:
                    worker.give_up()
                raise DeadlockError
            chosen = self.random.choice(choices)
            if isinstance(chosen, Worker):
                chosen.go_on()
                if chosen.error is not None:
                    raise chosen.error
            else:
                self.copies.remove(chosen)
                chosen()
        assert not self.copies

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on, and itself when `until` holds."""
        assert self.running is not None
        self.running.pause(until)


class Worker:
    def __init__(self, machine: Machine, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.machine, self.done, self.error = machine, False, None
        self.until: Callable[[], bool] = lambda: True
        self.abandoned = False
        self.mine, self.back = threading.Semaphore(0), threading.Semaphore(0)

        def body() -> None:
            self.mine.acquire()
            try:
                function(*arguments)
            except SystemExit:
                pass
            except BaseException as error:  # is raised where the test is
                self.error = error
            self.done = True
            self.back.release()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()

    def may_go_on(self) -> bool:
        return self.until()

    def go_on(self) -> None:
        self.machine.running = self
        self.mine.release()
        self.back.acquire()

    def pause(self, until: Callable[[], bool]) -> None:
        self.until = until
        self.back.release()
        self.mine.acquire()
        if self.abandoned:
            raise SystemExit

    def give_up(self) -> None:
        self.abandoned = True
        if not self.done:
            self.mine.release()


class Barrier:
    def __init__(self) -> None:
        self.count, self.arrived, self.bytes, self.phase = 0, 0, 0, 0

    def settle(self) -> None:
        assert self.arrived <= self.count, "more arrivals than the barrier counts"
        if self.arrived == self.count and self.bytes == 0:
            self.arrived, self.phase = 0, self.phase + 1


class Buffer:
    """A slice of shared memory; a view of rows of it, transposed or not."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def slice(self, start: int, size: int) -> Buffer:
        return Buffer(self.values[start : start + size])

    def permute(self, order: tuple[int, int]) -> Buffer:
        return Buffer(self.values.permute(order))


class Buffers:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def index(self, i: int) -> Any:
        return self.items[i]


class Pointer:
    """Into a contiguous tensor, at one offset or a tensor of them."""

    def __init__(self, to: Tensor, at: Any = 0) -> None:
        self.to_tensor, self.at = to.view(-1), at
        self.dtype = types.SimpleNamespace(element_ty=to.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.to_tensor, self.at + offset)


class Descriptor:
    layout = None

    def __init__(self, matrix: Tensor, rows: int, columns: int) -> None:
        self.matrix, self.block, self.dtype = matrix, (rows, columns), matrix.dtype
        self.block_type = types.SimpleNamespace(nbytes=rows * columns * matrix.element_size())

    def read(self, row: int, column: int) -> Tensor:
        """What lies beyond the matrix is 0."""
        out = torch.zeros(self.block, dtype=self.dtype)
        part = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


class Sums:
    """An accumulator with products that were asked for and are not computed yet."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.products = values, []


class Whole(int):
    """A number that is a scalar tensor to the compiler."""

    def to(self, _: Any) -> Whole:
        return self


def language(machine: Machine, program: int, programs: int) -> types.SimpleNamespace:
    """Stands for `gl`."""

    def allocate(dtype: torch.dtype, shape: list[int], _: Any) -> Buffers:
        if dtype == torch.int64:
            return Buffers([Barrier() for _ in range(shape[0])])
        return Buffers([Buffer(torch.full(shape[1:], torch.nan, dtype=dtype)) for _ in range(shape[0])])

    def load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        at = torch.where(mask, pointer.at, 0)
        return torch.where(mask, pointer.to_tensor[at], torch.tensor(other, dtype=pointer.to_tensor.dtype))

    def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        at, value, mask = torch.broadcast_tensors(pointer.at, value, mask)
        pointer.to_tensor[at[mask]] = value[mask]

    def specialize(parts: Any, warps: list[int], registers: list[int]) -> None:
        assert len(parts) == len(warps) + 1
        assert 128 * 240 + sum(32 * max(4, w) * r for w, r in zip(warps, registers, strict=True)) <= 65536
        machine.run(parts)

    def full(shape: list[int], value: float, dtype: torch.dtype, _: Any) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    return types.SimpleNamespace(
        int32=torch.int32, int64=torch.int64, float32=torch.float32, cdiv=lambda a, b: -(-a // b),
        program_id=lambda _: program, num_programs=lambda _: programs, static_range=range,
        NVMMADistributedLayout=lambda **_: None, SliceLayout=lambda *_: None, allocate_shared_memory=allocate,
        arange=lambda start, end, _: torch.arange(start, end), full=full, load=load, store=store,
        zeros=lambda shape, dtype, layout: full(shape, 0, dtype, layout), where=torch.where, exp=torch.exp,
        exp2=torch.exp2, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        maximum=lambda a, b: torch.maximum(*(torch.as_tensor(x, dtype=torch.float32) for x in (a, b))),
        warp_specialize=specialize,
    )  # fmt: skip


def barriers(machine: Machine) -> types.SimpleNamespace:
    """Stands for `mbarrier`."""

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = count

    def expect(barrier: Barrier, size: int) -> None:
        barrier.arrived += 1
        barrier.bytes += size

    def arrive(barrier: Barrier, pred: bool = True) -> None:
        if pred:
            barrier.arrived += 1
            barrier.settle()
        machine.pause()

    def wait(barrier: Barrier, parity: int) -> None:
        machine.pause(lambda: barrier.phase & 1 != parity)

    return types.SimpleNamespace(init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: None)


def copies(machine: Machine) -> types.SimpleNamespace:
    """Stands for `tma`."""

    def copy(descriptor: Descriptor, at: list[int], barrier: Barrier, to: Buffer) -> None:
        to.values.fill_(torch.nan)  # while it comes it is neither

        def arrives() -> None:
            to.values.copy_(descriptor.read(*at))
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.settle()

        machine.copies.append(arrives)

    return types.SimpleNamespace(async_copy_global_to_shared=copy)


def products(machine: Machine, kept: int = 0) -> dict[str, Callable[..., Any]]:
    """Stand for the products of a group of warps. kept: waits leave so many more under way (a fault to be found)."""

    def multiply(a: Buffer, b: Buffer, sums: Sums, use_acc: bool, is_async: bool) -> Sums:
        assert is_async
        sums.products.append((a, b, use_acc))
        machine.pause()
        return sums

    def wait(outstanding: int, deps: list[Sums]) -> Any:
        (sums,) = deps
        left = machine.random.randint(0, outstanding) if kept == 0 else outstanding + kept
        while len(sums.products) > left:
            a, b, use_acc = sums.products.pop(0)
            product = a.values.float() @ b.values.float()
            sums.values = sums.values + product if use_acc else product
        return sums.values if outstanding == 0 else sums

    def init(values: Any) -> Sums:
        return values if isinstance(values, Sums) else Sums(values)

    return {"warpgroup_mma": multiply, "warpgroup_mma_wait": wait, "warpgroup_mma_init": init}


def run(
    monkeypatch: Any,
    module: Any,
    kernel: str,
    programs: int,
    arguments: dict[str, Any],
    seed: int,
    kept: int = 0,
    changes: dict[str, Callable[..., Any]] | None = None,
):
    """Runs a kernel of the module, its programs one after the other. changes: of mbarrier's functions, each from the
    right one to another (a fault to be found)."""
    constants = {name: value.value for name, value in vars(module).items() if type(value).__name__ == "constexpr"}
    functions = {name: value.fn for name, value in vars(module).items() if hasattr(value, "fn")}
    place = functions["place"]
    with monkeypatch.context() as patched:
        for name, value in (constants | functions).items():
            patched.setattr(module, name, value)
        patched.setattr(module, "place", lambda *what: tuple(map(Whole, place(*what))))
        for program in range(programs):
            machine = Machine(seed + program)
            patched.setattr(module, "gl", language(machine, program, programs))
            right = barriers(machine)
            for name, change in (changes or {}).items():
                setattr(right, name, change(getattr(right, name)))
            patched.setattr(module, "mbarrier", right)
            patched.setattr(module, "tma", copies(machine))
            for name, value in products(machine, kept).items():
                patched.setattr(module, name, value)
            functions[kernel](**arguments)
