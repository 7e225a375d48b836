"""The implementation for GPUs, NVIDIA's and AMD's: the tiled driver with the Triton kernels of `dpo_kernels.kernels`.

Two paths, chosen by `kernels.tables.path`: "fused", in which the kernel that makes a block of logits folds it, and
"tiles", in which cuBLAS makes a tile of logits in float32 and a kernel folds it. On a CPU the same kernels run in
Triton's interpreter, to be tested: TRITON_INTERPRET=1 must be set before the first import of triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import tiled
from dpo_kernels.head import OPTIONAL_OUTPUTS, Call, Grads, Transform
from dpo_kernels.impls import torch_impl
from dpo_kernels.kernels import tables
from dpo_kernels.plan import FACTS, Facts, Plan, Sweep, aligned

DEVICES = ("cuda",)  # ROCm's devices have this name too
OLDEST_TRITON = (3, 5)
OLDEST_CAPABILITY = (8, 0)
# The frozen head's sum is rescaled where the maximum has grown by more than this; exp of it fits float16 20 times.
SHARE_TOLERANCE = 8.0
LARGEST_VOCABULARY = 2**24  # the first maximum's column is held in float32


def unavailable(device: torch.device) -> str | None:
    if device.type == "cpu":
        if not _asked_to_interpret():
            return "it runs on GPUs; on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    elif device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, not on {device.type}"
    elif not torch.cuda.is_available():
        return "torch finds no GPU (torch.cuda.is_available() is False)"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"compute capability {torch.cuda.get_device_capability(device)} is older than {OLDEST_CAPABILITY}"
    return _no_triton() or (_no_wide_products(device) if device.type == "cuda" else None)


cannot_run = unavailable  # nothing is built ahead, so there is nothing more to know


def facts(device: torch.device, tokens: int, features: int) -> Facts:
    """cuBLAS may sum a row in another order in a tile of another height: on its path kept tokens are whole tiles."""
    arch = _arch(device)
    known = FACTS[f"triton, {arch.kind}"]
    fused = tables.path(arch, tokens, features) == "fused"
    return replace(known, streams=fused, kept_step=known.kept_step if fused else None)


def hidden_forward(call: Call, tokens: int, index: Tensor | None) -> tiled.Forward:
    if not _fits(call):
        return torch_impl.hidden_forward(call, tokens, index)
    with _on(call.hidden.device):
        return tiled.forward(call, tokens, index, _facts(call, tokens), TritonFolds)


def hidden_backward(
    call: Call, wanted: Grads, index: Tensor | None, grads: tiled.RowGrads, saved: tiled.Forward
) -> tiled.InputGrads:
    """call: as forward got it; wanted: the gradients wanted now."""
    if not _fits(call):
        return torch_impl.hidden_backward(call, wanted, index, grads, saved)
    with _on(call.hidden.device):
        return tiled.backward(call, wanted, index, grads, saved, _facts(call, len(grads.labels)), TritonFolds)


def logits_forward(
    logits: Tensor, labels: Tensor, transform: Transform, index: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, maximum and log sum exp(z - maximum), (M,) each, of the rows that count of logits (..., V)."""
    matrix = tiled.as_matrix(logits)
    if matrix is None or matrix.shape[1] >= LARGEST_VOCABULARY:
        return torch_impl.logits_forward(logits, labels, transform, index, tokens)
    stats = TritonRowStats(labels, matrix.shape[1], ())
    if tokens:
        rows, columns, _ = tables.ROWS[_arch(logits.device).kind]
        strip = tables.strip(rows, columns, tokens, matrix.shape[1], matrix.shape[1])
        with _on(logits.device):
            _fold_rows(stats, slice(0, tokens), matrix, index, labels, None, transform, 0, strip)
    log_probs, maximum, log_sum, _ = torch_impl.join_label(stats.label_logit, stats.max, stats.sum)
    return log_probs, maximum, log_sum


def logits_backward(
    logits: Tensor, transform: Transform, index: Tensor | None, grads: tiled.RowGrads, out: Tensor
) -> None:
    """Writes d loss / d logits of the rows that count to out (..., V), which may be logits itself."""
    matrix, to = tiled.as_matrix(logits), tiled.as_matrix(out)
    if matrix is None or to is None:
        torch_impl.logits_backward(logits, transform, index, grads, out)
        return
    with _on(logits.device):
        _gradient(matrix, index, to, None, grads, transform, 0)


class TritonRowStats(torch_impl.TorchRowStats):
    """Running statistics of M rows, as states (VECTORS, M) float32 of kernels/online.py; `TorchRowStats` finishes them.

    share_base (M,): what the shares of a frozen head's sum are relative to.
    """

    def __init__(self, labels: Tensor, vocab_size: int, outputs: tuple[str, ...]) -> None:
        self.labels, self.vocab_size, self.outputs = labels, vocab_size, outputs
        vectors = _kernels("online").VECTORS.value
        self.states = torch.zeros((vectors, len(labels)), dtype=torch.float32, device=labels.device)
        self.max, self.sum, self.label_logit, self.sum_shifted, self.sum_squares, self.sum_logits, top = self.states
        self.top = top
        self.max.fill_(-torch.inf)
        self.label_logit.fill_(torch.nan)  # stays NaN where the label is not in the vocabulary
        self.share_base: Tensor | None = None

    def base(self, rows: slice) -> Tensor:
        if self.share_base is None:
            lowest = torch.finfo(torch.float32).min
            self.share_base = torch.full_like(self.max, lowest)
        return self.share_base[rows]


class TritonFolds(torch_impl.TorchFolds):
    """`tiled.Folds` of the Triton kernels; see there for what each method does."""

    def __init__(self, call: Call, plan: Plan) -> None:
        super().__init__(call, plan)
        self.plan = plan
        known = _facts(call, plan.tokens)
        self.rounds, self.fused = known.rounds, known.streams
        self.operand = torch.float32 if call.compute_dtype in known.widens else call.compute_dtype
        self._held: dict[str, Tensor] = {}

    def stats(self, labels: Tensor) -> TritonRowStats:
        return TritonRowStats(labels, self.call.weight.shape[0], self.call.outputs)

    def score(self, stats: Any, tile: tiled.Tile) -> None:
        if self.fused:
            self._forward(stats, tile, None)
        else:
            self._fold(stats, tile, self._multiplied(tile))

    def keep(self, stats: Any, tile: tiled.Tile, kept: tiled.Kept) -> None:
        if self.fused:
            self._forward(stats, tile, kept)
        else:
            self._fold(stats, tile, self._multiplied(tile), kept=kept)

    def jacobian(self, stats: Any, tile: tiled.Tile, total: Tensor) -> None:
        n, v = len(tile.hidden), len(tile.weight)
        if self.fused:
            kept = tiled.Kept(
                self._dz(n, v),
                self._scratch("bases", n, -(-v // self.plan.base_columns), torch.float32, self.plan.base_columns),
            )
            self._forward(stats, tile, kept)
            share = kept.exp
            _launch(
                "rows", "rebase_kernel", -(-n // self._rows.rows), self._rows.warps,
                exps=share, bases=kept.bases, labels=stats.labels[tile.rows], first=tile.columns.start,
                share_base=stats.base(tile.rows), total=total, n=n, V=v,
                D=total.shape[1], stride=share.stride(0), bases_stride=kept.bases.stride(0),
                slots=-(-v // self._bases["BASE_COLUMNS"]), total_stride=total.stride(0), tolerance=SHARE_TOLERANCE,
                **self._bases, ROWS=self._rows.rows, COLUMNS=self._rows.columns,
            )  # fmt: skip
        else:
            product = self._multiplied(tile)
            share = self._dz(n, v)
            self._fold(stats, tile, product, share=share, total=total)
        self.multiply(total, share, tile.weight, add=True)

    def finish_jacobian(self, stats: Any, rows: slice, total: Tensor, label_weight: Tensor) -> None:
        maximum = stats.max[rows].clamp(min=torch.finfo(torch.float32).min)
        total.mul_((stats.base(rows) - maximum).exp_()[:, None])
        super().finish_jacobian(stats, rows, total, label_weight)

    def dz(
        self, grads: tiled.RowGrads, tile: tiled.Tile, kept: tiled.Kept | None, wanted: Sweep, bias: Tensor | None
    ) -> tiled.Dz:
        n, v = len(tile.hidden), len(tile.weight)
        if kept is not None:
            dz = self._from_kept_exps(grads, kept, tile)
        elif self.fused:
            dz = self._dz(n, v)
            self._recompute(grads, tile, dz)
        else:
            product = self._multiplied(tile)
            dz = self._dz(n, v)
            _gradient(product, None, dz, self._bias(tile), grads, self.call.transform, tile.columns.start)
        if bias is not None:
            bias += dz.sum(0, dtype=bias.dtype)
        return tiled.Dz(dz, dz.T)

    @property
    def _rows(self) -> tables.Rows:
        return tables.ROWS[_arch(self.call.hidden.device).kind]

    def _scratch(self, name: str, rows: int, columns: int, dtype: torch.dtype, share: int = 1) -> Tensor:
        """A buffer (rows, columns) whose rows start aligned, from the first as large as a tile's (of every share-th
        column)."""
        if name not in self._held:
            room = self.plan.tile_tokens * aligned(-(-self.plan.tile_vocab // share))
            self._held[name] = torch.empty(room, dtype=dtype, device=self.call.hidden.device)
        return self._held[name][: rows * aligned(columns)].view(rows, aligned(columns))[:, :columns]

    def _tile(self, n: int, v: int) -> Tensor:
        return self._scratch("product", n, v, self.wide)

    def _dz(self, n: int, v: int) -> Tensor:
        """The left operand of the products that follow: the tile of logits itself, where it has that dtype."""
        return self._scratch("product" if self.operand == self.wide else "dz", n, v, self.operand)

    def _bias(self, tile: tiled.Tile) -> Tensor | None:
        return None if self.call.bias is None else self.call.bias[tile.columns].to(self.call.compute_dtype)

    def _multiplied(self, tile: tiled.Tile) -> Tensor:
        """h W^T of a tile in float32; the kernels add the bias."""
        product = self._tile(len(tile.hidden), len(tile.weight))
        self.multiply(product, tile.hidden, tile.weight.T, add=False)
        return product

    def _fold(
        self,
        stats: TritonRowStats,
        tile: tiled.Tile,
        product: Tensor,
        kept: tiled.Kept | None = None,
        share: Tensor | None = None,
        total: Tensor | None = None,
    ) -> None:
        """Folds a tile of products; then writes what is kept of it, or the share that will be added to total."""
        bias, labels, first = self._bias(tile), stats.labels[tile.rows], tile.columns.start
        (n, v), transform, rows = product.shape, self.call.transform, self._rows
        maxima = _fold_rows(stats, tile.rows, product, None, labels, bias, transform, first, strip=v)
        exps = share if kept is None else kept.exp
        if exps is None:
            return
        bases = exps if kept is None else kept.bases
        total = exps if total is None else total
        _launch(
            "rows", "exps_kernel", -(-n // rows.rows), rows.warps,
            a=product, labels=labels, bias=product if bias is None else bias, maxima=maxima, exps=exps, bases=bases,
            share_base=maxima if share is None else stats.base(tile.rows), total=total, n=n, V=v, D=total.shape[1],
            first=first, stride=product.stride(0), exps_stride=exps.stride(0), bases_stride=bases.stride(0),
            slots=bases.shape[1], total_stride=total.stride(0), tolerance=SHARE_TOLERANCE, **_transform(transform),
            KEPT=kept is not None, BIASED=bias is not None, ROWS=rows.rows, COLUMNS=rows.columns,
        )  # fmt: skip

    @property
    def _product_table(self) -> tables.Product:
        """Decided by the call alone, not by tile or mode: whoever scores the same call gets the same bits."""
        options = self.call.bias is not None or self.call.transform.softcap is not None or bool(self.call.outputs)
        return tables.product(_arch(self.call.hidden.device), self.operand, options)

    @property
    def _bases(self) -> dict[str, int]:
        """How many columns share a base, as many as forward folds at once, and how many of the plan's slots that is."""
        columns = self._product_table.columns if self.fused else self.plan.base_columns
        return {"BASE_COLUMNS": columns, "SLOTS": columns // self.plan.base_columns}

    def _product_arguments(self, tile: tiled.Tile) -> tuple[dict[str, Any], tables.Product]:
        """What forward_kernel and recompute_kernel both take: operands, sizes, transform and tiles."""
        hidden, weight = tile.hidden, tile.weight
        product = self._product_table
        if not (_describable(hidden) and _describable(weight)):
            product = product._replace(descriptors=False)
        bias = self._bias(tile)
        arguments = {
            "hidden": _descriptor(hidden, product.rows, product.depth) if product.descriptors else hidden,
            "weight": _descriptor(weight, product.columns, product.depth) if product.descriptors else weight,
            "bias": hidden if bias is None else bias,
            "n": len(hidden), "V": len(weight), "D": hidden.shape[1], "first": tile.columns.start,
            "hidden_stride": hidden.stride(0), "hidden_step": hidden.stride(1),
            "weight_stride": weight.stride(0), "weight_step": weight.stride(1),
            **_transform(self.call.transform),
            "BIASED": bias is not None, "DESCRIPTORS": product.descriptors,
            "WIDEN": _arch(hidden.device).kind == "interpreted",
            "PRECISION": product.precision, "EVEN": hidden.shape[1] % product.depth == 0,
            "ROWS": product.rows, "COLUMNS": product.columns, "DEPTH": product.depth, "GROUP": product.group,
        }  # fmt: skip
        return arguments, product

    def _forward(self, stats: TritonRowStats, tile: tiled.Tile, kept: tiled.Kept | None) -> None:
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        # Of the whole call, not of this tile: then neither tiles nor modes move the places where sums are cut.
        strip = tables.strip(
            product.rows, product.columns, self.plan.tokens, self.plan.vocab_size, self.plan.tile_vocab
        )
        strips = -(-v // strip)
        partials = stats.states.new_empty((strips, len(stats.states), n))
        labels = stats.labels[tile.rows]
        exps, bases = (partials, partials) if kept is None else kept
        exps_stride = exps.stride(0)
        if kept is not None and arguments["DESCRIPTORS"]:
            exps = _descriptor(exps, product.rows, product.columns)
        _launch(
            "fused", "forward_kernel", -(-n // product.rows) * strips, product.warps, product.stages,
            labels=labels, partials=partials, exps=exps, bases=bases, strip=strip, exps_stride=exps_stride,
            bases_stride=bases.stride(0), OUTPUTS=_bits(stats.outputs), KEEP=kept is not None,
            WIDE=kept is not None and kept.exp.dtype == torch.float32,
            BASE_COLUMNS=self.plan.base_columns, **arguments,
        )  # fmt: skip
        _merge(stats, tile.rows, partials, labels, strip, tile.columns.start, v)

    def _recompute(self, grads: tiled.RowGrads, tile: tiled.Tile, out: Tensor) -> None:
        arguments, product = self._product_arguments(tile)
        blocks = -(-len(tile.hidden) // product.rows) * -(-len(tile.weight) // product.columns)
        _launch(
            "fused", "recompute_kernel", blocks, product.warps, product.stages,
            out=_descriptor(out, product.rows, product.columns)
            if arguments["DESCRIPTORS"] else out,
            **_row_grads(grads), out_stride=out.stride(0), slope=self.call.transform.slope,
            OUTPUTS=_gradient_bits(grads), **arguments,
        )  # fmt: skip

    def _from_kept_exps(self, grads: tiled.RowGrads, kept: tiled.Kept, tile: tiled.Tile) -> Tensor:
        n, v = kept.exp.shape
        rows, out = self._rows, self._dz(n, v)
        arguments = _row_grads(grads)
        for unused in ("entropies", "grad_entropies"):
            del arguments[unused]
        _launch(
            "rows", "kept_kernel", -(-n // rows.rows) * -(-v // rows.columns), rows.warps,
            exps=kept.exp, bases=kept.bases, out=out, out_stride=out.stride(0), **arguments, n=n, V=v,
            first=tile.columns.start, stride=kept.exp.stride(0), bases_stride=kept.bases.stride(0),
            slope=self.call.transform.slope, CAPPED=self.call.transform.softcap is not None, **self._bases,
            ROWS=rows.rows, COLUMNS=rows.columns,
        )  # fmt: skip
        return out


def _fold_rows(
    stats: TritonRowStats,
    rows: slice,
    matrix: Tensor,
    index: Tensor | None,
    labels: Tensor,
    bias: Tensor | None,
    transform: Transform,
    first: int,
    strip: int,
) -> Tensor:
    """Folds products or logits (n, v), or rows `index`, into the statistics; the maxima (n,) of the first strip."""
    n, v = len(labels), matrix.shape[1]
    tile = tables.ROWS[_arch(matrix.device).kind]
    strips = -(-v // strip)
    partials = stats.states.new_empty((strips, len(stats.states), n))
    _launch(
        "rows", "fold_kernel", -(-n // tile.rows) * strips, tile.warps,
        a=matrix, index=labels if index is None else index, labels=labels, bias=matrix if bias is None else bias,
        partials=partials, n=n, V=v, first=first, strip=strip, stride=matrix.stride(0), **_transform(transform),
        INDEXED=index is not None, BIASED=bias is not None, OUTPUTS=_bits(stats.outputs), ROWS=tile.rows,
        COLUMNS=tile.columns,
    )  # fmt: skip
    _merge(stats, rows, partials, labels, strip, first, v)
    return partials[0, 0]


def _merge(
    stats: TritonRowStats, rows: slice, partials: Tensor, labels: Tensor, strip: int, first: int, width: int
) -> None:
    n, block = len(labels), 128
    _launch(
        "online", "merge_kernel", -(-n // block), 4,
        partials=partials, states=stats.states, labels=labels, n=n, M=stats.states.shape[1], row=rows.start,
        strips=len(partials), strip=strip, first=first, width=width, OUTPUTS=_bits(stats.outputs), ROWS=block,
    )  # fmt: skip


def _gradient(
    matrix: Tensor,
    index: Tensor | None,
    out: Tensor,
    bias: Tensor | None,
    grads: tiled.RowGrads,
    transform: Transform,
    first: int,
) -> None:
    """d loss / d a of a matrix of products or logits, (n, v) or its rows `index`, into out, which may be the matrix."""
    n, v = len(grads.labels), matrix.shape[1]
    if n == 0:
        return
    tile = tables.ROWS[_arch(matrix.device).kind]
    _launch(
        "rows", "gradient_kernel", -(-n // tile.rows) * -(-v // tile.columns), tile.warps,
        a=matrix, index=grads.labels if index is None else index, out=out, bias=matrix if bias is None else bias,
        **_row_grads(grads), n=n, V=v, first=first, stride=matrix.stride(0), out_stride=out.stride(0),
        **_transform(transform), slope=transform.slope, INDEXED=index is not None, BIASED=bias is not None,
        OUTPUTS=_gradient_bits(grads), ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip


def _row_grads(grads: tiled.RowGrads) -> dict[str, Tensor]:
    grad = grads.grad_log_probs.contiguous()
    entropy, grad_entropy = grads.entropy, grads.grad_entropy
    return {
        "labels": grads.labels, "log_probs": grads.log_probs, "maxima": grads.max, "log_sums": grads.log_sum,
        "grads": grad, "entropies": grad if entropy is None else entropy,
        "grad_entropies": grad if grad_entropy is None else grad_entropy.contiguous(),
    }  # fmt: skip


def _gradient_bits(grads: tiled.RowGrads) -> int:
    return _bits(()) if grads.grad_entropy is None else _bits(("entropy",))


def _bits(outputs: tuple[str, ...]) -> int:
    """OUTPUTS of kernels/online.py."""
    return sum(1 << i for i, name in enumerate(OPTIONAL_OUTPUTS) if name in outputs)


def _transform(transform: Transform) -> dict[str, Any]:
    if transform.softcap is None:
        return {"inner": 1.0, "outer": transform.slope, "CAPPED": False}
    return {
        "inner": transform.logit_scale / transform.softcap, "outer": transform.softcap / transform.temperature,
        "CAPPED": True,
    }  # fmt: skip


def _launch(module: str, name: str, programs: int, warps: int, stages: int | None = None, /, **arguments: Any) -> None:
    options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
    getattr(_kernels(module), name)[(programs,)](**arguments, **options)


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"dpo_kernels.kernels.{module}")


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can name the matrix: contiguous rows that start aligned."""
    step, last = matrix.stride()
    return last == 1 and step % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])


def _facts(call: Call, tokens: int) -> Facts:
    return facts(call.hidden.device, tokens, call.hidden.shape[-1])


def _fits(call: Call) -> bool:
    return call.weight.shape[0] < LARGEST_VOCABULARY


@functools.cache
def _arch(device: torch.device) -> tables.Arch:
    if device.type == "cpu":
        return tables.Arch("interpreted", 0)
    major, _ = torch.cuda.get_device_capability(device)
    return tables.Arch("cuda" if torch.version.hip is None else "hip", major)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def _asked_to_interpret() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); torch's own wheels for CUDA and ROCm bring it: pip install triton"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton is {triton.__version__}, and {'.'.join(map(str, OLDEST_TRITON))} or later is needed"
    return None


@functools.cache
def _no_wide_products(device: torch.device) -> str | None:
    """Older builds for ROCm cannot write a product of bfloat16 in float32."""
    try:
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        wide = torch.zeros(16, 16, dtype=torch.float32, device=device)
        torch.addmm(wide, ones, ones, out_dtype=torch.float32, out=wide)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "captur" in str(error):
            raise  # says nothing of the build
        return f"this build of torch cannot multiply bfloat16 into float32 ({error}); a later torch can"
    return None
