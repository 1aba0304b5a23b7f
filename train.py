"""Train cardiac world models: pretrain, then finetune or probe. One command, one run folder.

    python train.py --mode pretrain --frac 0.1          # world model (and the demo cohort)
    python train.py --mode probe --frac 0.1             # paper A: linear probe on frozen h
    python train.py --mode probe --frac 0.1 --head mlp  # paper B: MLP probe on frozen z
    python train.py --mode finetune --frac 0.1          # paper A: finetuning
    python train.py --mode finetune --frac 0.1 --init scratch       # supervised baseline
    python train.py --mode pretrain --frac 0.1 --objective invariance   # naive patient invariance
    python train.py --mode pretrain --frac 0.1 --reg vicreg             # VICReg ablation
    python train.py --mode pretrain --recipe recommended    # a world model that needs its action
    python train.py --mode reproduce --quick            # both papers' whole matrix, and a report
    python train.py --mode bench                        # how fast each stage is here
    torchrun --nproc_per_node=8 -- train.py --mode pretrain     # on eight GPUs

Every run writes runs/NAME/{config.json, log.jsonl, last.pt, best.pt, predictions_{val,test}.npz};
evaluate.py turns those into tables. Defaults are the papers'; on a CPU or a synthetic cohort
epochs, batch size and rate take a laptop preset, which is printed (--paper keeps the papers').
Stopped by whatever, a run goes on when its command is given again, on a CPU to the same bytes;
previous.pt is the checkpoint before last.pt, lock keeps a second process out.
"""

from __future__ import annotations  # an older Python shall reach the line that names it

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # as always, but under `python -P`

import prepare_data

if __name__ == "__main__":
    prepare_data.start_script()

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed
from torch import Tensor, nn
from torch.nn import functional as F

import cardiowm
import evaluate
from evaluate import (CHECKPOINT_FORMAT, auroc, check_tensors, find_run, load_checkpoint,
                      macro_auroc, recalibrate)
from prepare_data import (Cohort, InputError, Progress, lack, locked, read_json, replace_file,
                          system_errors)

DEFAULT_DATA = Path("data/cohort.h5")
MIN_PAIRS = 64            # SIGReg tests a distribution: on fewer embeddings it says little
SYNTHETIC_WEIGHT = 0.3    # paper B: weight of a synthetic row in the probe's loss
SYNTHETIC_ROWS = 2_000_000, 721_002   # paper B: synthetic rows beside real rows
EMBED_BATCH = 256         # records per batch where nothing is learned
SYNTHESIS_BATCH = 2048    # synthetic rows per batch: few enough to stay in a CPU's cache
RECALIBRATE_BATCHES = 10  # batches from which batch norm's statistics are taken before validation
GRAPH_AFTER = 8           # first steps of a process, launched kernel by kernel, before a CUDA graph
SLOWER = 3                # times as long as at its start: a run says that its steps are slow
GRAD_RATIO_STEPS = 4      # first steps on which |grad pred| / |grad reg| is logged
PURPOSE = {"sigreg": 2, "windows": 6}  # of a draw: a part of its seed, with the step
UNTRAINED_DRAWS = 3       # untrained encoders that a study probes, over all its seeds

# The papers' settings by recipe; `laptop` and `quick` replace what they name. `steps`: a small
# cohort gets more epochs until it has so many, and `patience` does not stop it before. What trains
# end to end trains to a plateau on a laptop, where the papers' 1e-4 stays near chance for long.
PLATEAU = dict(epochs=40, batch_size=32, lr=1e-3, schedule="onecycle", patience=5, steps=400)
GLANCE = dict(epochs=1, batch_size=32, lr=1e-3, steps=20)
RECIPES = {
    "pretrain": dict(epochs=50, batch_size=512, lr=1e-3, weight_decay=5e-4, schedule="cosine",
                     warmup=0.05, final_lr=1e-5,
                     laptop=dict(epochs=8, batch_size=64, steps=40),
                     quick=dict(epochs=2, batch_size=64, steps=20)),
    "finetune": dict(epochs=30, batch_size=256, lr=1e-4, weight_decay=1e-4, schedule="onecycle",
                     clip=1.0, laptop=PLATEAU, quick=GLANCE),
    "supervised": dict(epochs=20, batch_size=512, lr=1e-4, weight_decay=1e-4, schedule="onecycle",
                       clip=1.0, laptop=PLATEAU, quick=GLANCE),
    "linear": dict(epochs=20, batch_size=1024, lr=1e-3, weight_decay=1e-4, schedule="constant",
                   laptop=dict(epochs=60, batch_size=128, steps=40),
                   quick=dict(epochs=10, batch_size=128, steps=20)),
    "mlp": dict(epochs=5000, batch_size=4096, lr=1e-4, weight_decay=1e-2, schedule="cosine",
                patience=50, laptop=dict(epochs=400, batch_size=256, steps=40),
                quick=dict(epochs=20, batch_size=256, steps=20)),
}

# ----------------------------------------------------------------------------------------------
# Data: which patients, which pairs, and batches of signals
# ----------------------------------------------------------------------------------------------


def training_rows(cohort: Cohort, frac: float, seed: int, labelled_only: bool) -> np.ndarray:
    """Rows of the first `frac` of the training patients in an order that depends on the seed alone.

    Nested: the patients of 1 % are among those of 10 %. At least one patient. Source: paper A,
    100/10/1 %; A's own draws are not nested.
    """
    patients = np.unique(cohort.subject_id[cohort.split == 0])
    chosen = np.random.default_rng(seed).permutation(patients)[:max(1, round(frac * len(patients)))]
    keep = (cohort.split == 0) & np.isin(cohort.subject_id, chosen)
    return np.flatnonzero(keep & (cohort.has_label | (not labelled_only)))


def judged_rows(cohort: Cohort) -> dict[str, np.ndarray]:
    """Rows of the validation and of the test records, by name: what every run predicts."""
    return {"val": np.flatnonzero(cohort.split == 1), "test": np.flatnonzero(cohort.split == 2)}


def select_pairs(cohort: Cohort, rows: np.ndarray, kinds: str, labelled_only: bool) -> np.ndarray:
    """Indices of the pairs whose two records are both in `rows` and of the kind asked for."""
    keep = np.isin(cohort.pair[:, 0], rows) & np.isin(cohort.pair[:, 1], rows)
    if kinds == "labelled" or labelled_only:
        keep &= cohort.pair_kind != 2
    if kinds == "between":
        keep &= cohort.pair_kind == 1
    return np.flatnonzero(keep)


def training_items(args: Namespace, cohort: Cohort
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows, pairs and single rows for training, and the number of those that --mode trains on.

    --self-pairs: a row that is in none of the pairs becomes one of two windows of itself.
    """
    rows = training_rows(cohort, args.frac, args.seed, args.labelled_only)
    pairs = select_pairs(cohort, rows, args.pairs, args.labelled_only)
    single = rows[~np.isin(rows, cohort.pair[pairs])] if args.self_pairs else rows[:0]
    return rows, pairs, single, len(pairs) + len(single) if args.mode == "pretrain" else len(rows)


def epoch_order(n: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Full batches of a permutation that depends on (seed, epoch) alone: (steps, batch_size)."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[:n // batch_size * batch_size].reshape(-1, batch_size)


class Signals:
    """Batches of normalised ECGs by row, from a memory map, RAM or the device itself."""

    def __init__(self, cohort: Cohort, device: torch.device, cache: str, how: str):
        self.device, self.how = device, how
        size = cohort.signal.nbytes
        if cache == "auto":
            # each process of this machine holds its own
            local = os.environ.get("LOCAL_WORLD_SIZE", "")
            ram = prepare_data.available_memory() / max(1, int(local) if local.isdecimal() else 1)
            torch.cuda.empty_cache()  # what an earlier run of this process left; no CUDA: nothing
            gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            cache = "gpu" if size < 0.7 * gpu else "ram" if size < 0.4 * ram else "disk"
        print(f"signals: {len(cohort.signal)} records, {size / 1e9:.2f} GB, held in {cache}")
        self.signal = cohort.signal
        if cache == "ram":
            self.signal = np.array(cohort.signal)
        elif cache == "gpu":
            self.signal = torch.empty(cohort.signal.shape, dtype=torch.float16, device=device)
            for i in range(0, len(cohort), 4096):  # no second copy in RAM
                self.signal[i:i + 4096] = torch.from_numpy(np.array(cohort.signal[i:i + 4096]))

    def read(self, rows: np.ndarray) -> Tensor:
        """(B,) rows -> (B, 12, T) float16 mV on the device, wherever they are held; thread-safe."""
        if isinstance(self.signal, Tensor):
            return self.signal[to_device(rows, self.device)]
        return to_device(self.signal[rows], self.device)  # half the bytes of float32 on the way

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The same on the host, as evaluate.embed takes them."""
        x = self.signal[rows]
        return x.cpu().numpy() if isinstance(x, Tensor) else x

    def ready(self, x: Tensor) -> Tensor:
        """float16 mV -> model input, float32 (B, 12, T)."""
        return cardiowm.normalize(x) if self.how == "zscore" else x.float()

    def windows(self, args: Namespace, generator: torch.Generator, *batch: Tensor) -> list[Tensor]:
        """The same for training, cut to --crop and with --noise."""
        if (args.crop, args.noise) == (1.0, 0.0):
            return [self.ready(x) for x in batch]
        return [cardiowm.crop_and_noise(self.ready(x), round(args.crop * x.shape[2]), args.noise,
                                        generator) for x in batch]


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory, so that neither the CPU nor the GPU waits for it."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def prefetch(read: Callable, items: Iterable) -> Iterator[tuple]:
    """Yields (item, read(item)); a thread reads the next item while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        jobs = ((item, pool.submit(read, item)) for item in items)
        ahead = next(jobs, None)
        while ahead is not None:
            (item, job), ahead = ahead, next(jobs, None)
            yield item, job.result()


# ----------------------------------------------------------------------------------------------
# Speed: cardiowm.py's encoder laid out as the hardware likes it, same weights, same mathematics
# ----------------------------------------------------------------------------------------------


class _Conv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:  # (B, C, 1, T)
        # (C_out, C_in, 1, k); flattened on the way, the gradient has the parameter's own strides
        weight = self.weight.flatten(1).view(*self.weight.shape[:2], 1, -1)
        return F.conv2d(x, weight, None, (1, *self.stride), (0, *self.padding))


class _AvgPool(nn.AvgPool1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (1, *self.kernel_size), (1, *self.stride), ceil_mode=self.ceil_mode)


class _MaxPool(nn.MaxPool1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, (1, self.kernel_size), (1, self.stride), (0, self.padding))


class _Encoder(cardiowm.XResNet1d50):
    def features(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # (B, C, 1, T)
        return super().features(x).squeeze(2)                             # (B, 256, T')


FAST = {nn.Conv1d: _Conv, nn.BatchNorm1d: nn.BatchNorm2d, nn.AvgPool1d: _AvgPool,
        nn.MaxPool1d: _MaxPool, cardiowm.XResNet1d50: _Encoder}


def fast_encoder(encoder: cardiowm.XResNet1d50) -> cardiowm.XResNet1d50:
    """Make an encoder run as 2-D convolutions in channels_last order, in place; returns it.

    Each module only changes its class, so parameters and state_dict keep their names and shapes.
    Outputs agree within float32 rounding.
    """
    for module in encoder.modules():
        module.__class__ = FAST.get(type(module), type(module))
    return encoder


class _BothEncoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both: "BothOnTwoThreads", x: Tensor, x_next: Tensor, *parameters: Tensor):
        ctx.both, ctx.parameters = both, parameters
        ctx.graphs = both.on_two_threads(both.encoded, zip(both.encoders, (x, x_next)))
        return tuple(h.detach() for h in ctx.graphs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        # kept for gradient_ratio, which goes through a graph twice; freed with ctx
        parts = ctx.both.on_two_threads(
            lambda h, grad: torch.autograd.grad(h, ctx.parameters, grad, retain_graph=True),
            zip(ctx.graphs, grads))
        return None, None, None, *(a + b for a, b in zip(*parts))


class BothOnTwoThreads:
    """encoder(x) and encoder(x_next) at once on a CPU, each on one thread and half of the cores.

    Faster than one after the other on all cores; and where another process takes a core, oneDNN's
    bf16 kernels, which spin until all their threads are there, do not wait for it in each layer.
    The second call goes through a twin: the same parameters, batch-norm statistics of its own.
    """

    def __init__(self, encoder: cardiowm.XResNet1d50):
        twin = copy.deepcopy(encoder)
        for module, own in zip(encoder.modules(), twin.modules()):
            own._parameters.update(module._parameters)
        self.encoders = encoder, twin
        half = torch.get_num_threads() // 2
        self.pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(half,))

    def on_two_threads(self, call: Callable, items: Iterable[tuple]) -> list:
        return [job.result() for job in [self.pool.submit(call, *item) for item in items]]

    @staticmethod
    def encoded(encoder: cardiowm.XResNet1d50, x: Tensor) -> Tensor:
        with torch.enable_grad(), autocast(x.device):  # both are settings of a thread
            return encoder(x)

    def __call__(self, x: Tensor, x_next: Tensor) -> tuple[Tensor, Tensor]:
        return _BothEncoded.apply(self, x, x_next, *self.encoders[0].parameters())


class _WorldModel(cardiowm.WorldModel):
    """Transition -> h, h_next (B, 256), z, z_pred, z_next (B, D): what a training step needs."""

    both: BothOnTwoThreads | None = None

    def forward(self, x: Tensor, x_next: Tensor, a: Tensor | None) -> tuple[Tensor, ...]:
        h, h_next = self.both(x, x_next) if self.both and torch.is_grad_enabled() else \
            (self.encode(x), self.encode(x_next))
        z, z_next = self.project(h), self.project(h_next)
        return h, h_next, z, self.predict(z, a), z_next


@functools.lru_cache
def has_bf16(device_type: str) -> bool:
    """Whether the device computes in bf16 (GPUs from Ampere on, CPUs with AVX512-BF16 or AMX)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device_type == "cpu" and any(getattr(torch.cpu, u, lambda: False)() for u in units)


def autocast(device: torch.device):
    """bf16 where the device has it, else float32; every loss of cardiowm.py switches it off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device.type))


# ----------------------------------------------------------------------------------------------
# Several devices: torchrun starts one process (rank) for each, on one machine or more
# ----------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number, 0 without torchrun; only rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of this run, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(args: Namespace) -> torch.device:
    """The device of --device; the other processes are met that torchrun started, if it did: over
    NCCL, where each takes the GPU of its local rank, else over gloo."""
    name, size = args.device, os.environ.get("WORLD_SIZE") or "1"
    if size != "1":
        if ":" in name or name == "mps":
            raise InputError(f"--device {name}: torchrun gives each process its own device; wanted "
                             "auto, cuda or cpu")
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        name = "cpu" if name == "auto" else name
    device = evaluate.pick_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for NCCL, and for the stream of a CUDA graph
    if size == "1":
        return device
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise InputError(f"WORLD_SIZE is {size!r}, but {error}: start several processes with "
                         "torchrun, or one after `unset WORLD_SIZE`") from error
    average.world_size = world_size()
    if args.mode not in ("pretrain", "finetune"):
        raise InputError(f"torchrun: --mode {args.mode} uses one device; run `python train.py` "
                         "instead")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    print(f"torchrun: {world_size()} ranks, {dist.get_backend()}")
    return device


def on_first_rank(make: Callable):
    """The result of make(), called on rank 0 alone and sent to all; so is what it refuses."""
    if world_size() == 1:
        return make()
    sent = [None]
    if rank() == 0:
        try:
            with system_errors():
                sent = [make()]
        except InputError as error:
            sent = [error]
    dist.broadcast_object_list(sent, src=0)
    if isinstance(sent[0], InputError):
        raise sent[0]
    return sent[0]


def average(x: Tensor) -> Tensor:
    """Mean over ranks, x itself on one: the MeanOverRanks of cardiowm.py, for the global batch.

    Differentiable. DDP averages the ranks' gradients afterwards: together, the gradient of the
    global loss.
    """
    return x if world_size() == 1 else distributed.all_reduce(x) / world_size()


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, or its DDP twin that averages gradients over ranks (same parameters).

    On CUDA, the batch norms inside the module become norms over the global batch.
    """
    if world_size() == 1:
        return module
    if device.type != "cuda":
        return nn.parallel.DistributedDataParallel(module)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # replaces its children, not itself
    return nn.parallel.DistributedDataParallel(module, device_ids=[device])


def gather(x: Tensor) -> Tensor:
    """Concatenate the ranks' tensors of one shape (m, ...)."""
    return x if world_size() == 1 else torch.cat(distributed.all_gather(x))


# ----------------------------------------------------------------------------------------------
# The training loop: one for pretraining, finetuning and probing
# ----------------------------------------------------------------------------------------------


def seed_of(*key: int) -> int:
    """A seed that depends on the whole key: random draws are functions of (seed, step, purpose)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def make_optimizer(modules: Iterable[nn.Module], lr: float,
                   weight_decay: float) -> torch.optim.AdamW:
    """AdamW; nothing with one dimension (bias, norm) is decayed (A's runs decayed BN's gamma)."""
    parameters = [p for m in modules for p in m.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def make_schedule(optimizer, name: str, lr: float, total: int, warmup: float = 0.0,
                  final_lr: float = 0.0):
    """`cosine`: linear warm-up from 1 % of the rate, then down to final_lr at the last step;
    `onecycle`: torch's defaults, as paper A's text; `constant`."""
    warm = round(warmup * total)

    def cosine(step: int) -> float:
        if step < warm:
            return 0.01 + 0.99 * step / warm
        progress = min(1.0, (step - warm) / max(1, total - 1 - warm))
        low = final_lr / lr
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

    if name == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total + 1)
    factor = cosine if name == "cosine" else (lambda step: 1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor:
    """One step down the gradient, whose norm is cut to `clip`; returns the norm before.

    Where the loss or the norm is not finite, no weight changes.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip) if clip is not None else \
        nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    bad = ~torch.isfinite(loss.detach() + norm)
    if optimizer.param_groups[0]["fused"]:  # it leaves out the step by itself: nobody waits
        optimizer.found_inf = bad.float()
    elif bad:
        return norm
    optimizer.step()
    return norm


def record(work: Callable, generators: Iterable[torch.Generator] = ()) -> tuple:
    """A CUDA graph of what work() launches, and its result, which lies in memory of the graph.

    Nothing is done yet: each replay does it. work() has been called before, so all is loaded.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    for generator in generators:  # a replay draws what its seed of that moment gives
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # `prefetch` goes on
            return graph, work()
    finally:
        torch.cuda.set_stream(stream)  # also where the capture broke off


class Step:
    """A training step: loss, gradient, `descend`. On one GPU it becomes a CUDA graph, replayed by a
    single launch, where a plain step at T=1000 waits for its launches half of the time.

    The first steps of a process are plain: the warm-up. A replay takes the batch and the learning
    rates from tensors filled before it, and draws from generators seeded before it, so that
    weights, curves and checkpoints are those of plain steps.
    """

    def __init__(self, loss_of: Callable, optimizer: torch.optim.Optimizer,
                 clip: float | None = None, generators: Iterable[torch.Generator] = ()):
        self.loss_of, self.optimizer, self.clip = loss_of, optimizer, clip
        self.generators, self.graph = list(generators), None
        device = optimizer.param_groups[0]["params"][0].device
        cuda = device.type == "cuda"
        why = "several ranks" if world_size() > 1 else \
            "a one-cycle schedule" if "base_momentum" in optimizer.param_groups[0] else ""
        graph = cuda and not why  # one-cycle moves beta1 too: a number, which a graph would keep
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups * graph]
        self.plain_left = GRAPH_AFTER if graph else math.inf
        if cuda and why:
            print(f"note: a step of {why} is launched kernel by kernel, not as a CUDA graph")

    def work(self, items: np.ndarray, batch: tuple, step: int) -> tuple[list, Tensor, dict]:
        """One step: names and values (n,) of its scalars, and the functions that give others."""
        groups = self.optimizer.param_groups
        kept = [{name: group[name] for name in ("lr", "capturable")} for group in groups]
        for group, rate in zip(groups, self.rates):
            group |= {"lr": rate, "capturable": True}
        try:
            loss, terms = self.loss_of(items, batch, step)
            norm = descend(loss, self.optimizer, self.clip)
        finally:  # plain numbers: what the schedule and a checkpoint hold
            for group, old in zip(groups, kept):
                group |= old
        later = {name: term for name, term in terms.items() if callable(term)}
        found = {"minimised": loss, "gradient norm": norm} | {
            name: term for name, term in terms.items() if name not in later}
        values = torch.stack([value.detach().to(loss) for value in found.values()])
        return list(found), values, later

    def __call__(self, items: np.ndarray, batch: tuple, step: int) -> dict:
        """Take one step; returns its scalars and the functions, to be called before the next."""
        for rate, group in zip(self.rates, self.optimizer.param_groups):
            rate.fill_(group["lr"])
        if self.graph is None and self.plain_left == 0:
            self._capture(items, batch, step)
        if self.graph is None:
            self.plain_left -= 1
            names, values, later = self.work(items, batch, step)
        else:
            for fixed, new in zip(self.batch, batch):
                fixed.copy_(new)
            self.graph.replay()
            names, values, later = self.found
        return dict(zip(names, values.clone().unbind())) | later

    def _capture(self, items: np.ndarray, batch: tuple, step: int) -> None:
        self.batch = tuple(x.clone() for x in batch)
        try:
            self.graph, self.found = record(lambda: self.work(items, self.batch, step),
                                            self.generators)
        except RuntimeError as error:  # it must wait for the GPU within, or memory is short
            self.plain_left = math.inf
            with contextlib.suppress(RuntimeError):  # frees the generators of the failed capture
                record(lambda: self.rates[0] + 1, self.generators)
            print("note: steps are launched kernel by kernel, not as a CUDA graph "
                  f"({str(error).strip().splitlines()[0]})")


def global_batch(args: Namespace, n: int) -> int:
    """Items of one step over all ranks: min(--batch-size, n), cut to a multiple of the ranks."""
    size = min(args.batch_size, n)
    return size - size % world_size()


def quoted(word: str | Path) -> str:
    """A word of a command line as a shell takes it."""
    return shlex.quote(str(word))


def blame(cohort: Cohort, rows: np.ndarray) -> str:
    """Which of these records made a loss, or a score, that is not finite, and what to do."""
    rows = np.unique(rows[rows >= 0])
    for row in rows:
        if not np.isfinite(cohort.signal[row]).all():
            return (f"study_id {cohort.study_id[row]} (row {row}) holds NaN or infinity: run "
                    f"`python prepare_data.py --check {quoted(cohort.path)}`")
    more = f" and {len(rows) - 8} more" * (len(rows) > 8)
    return (f"its records are finite (study_id {', '.join(map(str, cohort.study_id[rows[:8]]))}"
            f"{more}): give a lower --lr, with --overwrite")


class Task:
    """What `fit` trains and how it is judged: a class below for each mode.

    kind      of its checkpoints, which hold model_args and `more` besides
    modules   what is trained and stored, by name; "model" is the one users load
    rows      (n,) or (n, 2): rows of the records of each training item, -1 for a synthetic one; a
              batch is `args.batch_size` items, the remainder dropped
    read      (B,) items -> batch, a tuple of tensors on the device, in a thread
    loss_of   (items, batch, step) -> (scalar to minimise, terms to log: scalars, or functions that
              give one, called for logged steps only); of this rank
    draws     generators of loss_of, by PURPOSE, seeded for each step
    validate  () -> dict of val_ numbers; better = (key, sign): sign * value is maximised
    score     "val" or "test" -> probabilities (n, K) float32 of its records
    result    the checkpoint whose weights the modules hold in the end, in eval mode
    """

    kind, more, better, result = "", {}, ("val_macro_auroc", 1), "best.pt"

    def __init__(self, args: Namespace, cohort: Cohort, device: torch.device):
        self.args, self.cohort, self.device = args, cohort, device
        self.judged, self.draws = judged_rows(cohort), {}

    def read(self, items: np.ndarray) -> tuple[Tensor, ...]:
        return (to_device(items, self.device),)

    def take_norms(self, forward: Callable) -> None:
        """Batch norm's statistics from whole batches, on every rank those of a single process."""
        n = len(self.rows)
        order = epoch_order(n, global_batch(self.args, n), self.args.seed, 0)
        with autocast(self.device):
            recalibrate([self.modules["model"]], lambda read: forward(*read[1]),
                        prefetch(self.read, order[:RECALIBRATE_BATCHES]))
        self.modules["model"].eval()

    def validate(self) -> dict:
        y = self.cohort.label[self.judged["val"]]
        return {"val_macro_auroc": macro_auroc(y, self.score("val"))}


class Loop:
    """All the state of a training loop, which a checkpoint holds by name, and what it measures."""

    def __init__(self, run, args: Namespace, recipe: dict, task: Task):
        self.run, self.args, self.task = run, args, task
        self.batch_size = global_batch(args, len(task.rows))
        self.per_epoch = len(task.rows) // self.batch_size
        self.total = self.per_epoch * args.epochs
        self.patience, self.least = recipe.get("patience"), recipe.get("steps", 0)
        self.every = recipe.get("validate_every", 1)
        # at least 20 rows, even of a run that stops as early as it may
        sure = max(self.least, self.patience * self.every * self.per_epoch) if self.patience \
            else self.total
        self.log_every = max(1, min(self.total // 100, self.per_epoch, sure // 20))
        self.optimizer = make_optimizer(task.modules.values(), args.lr, recipe["weight_decay"])
        self.schedule = make_schedule(self.optimizer, args.schedule, args.lr, self.total,
                                      recipe.get("warmup", 0.0), recipe.get("final_lr", 0.0))
        self.parts = task.modules | {"optimizer": self.optimizer, "schedule": self.schedule}
        # bad_epochs: validations since the best one
        self.at = {"step": 0, "epoch": 0, "best": None, "bad_epochs": 0}
        run.begin({"kind": task.kind, "batch_size": self.batch_size}, self.parts)
        if run.state:
            self.at = {key: run.state[key] for key in self.at}
            step, epoch = self.at["step"], self.at["epoch"]
            there = 0 <= epoch * self.per_epoch <= step <= (epoch + 1) * self.per_epoch
            with run.usable():
                if not there or epoch > args.epochs or step != self.schedule.last_epoch:
                    raise InputError(
                        f"{run.found}: step {step}, epoch {epoch} and {self.schedule.last_epoch} "
                        f"steps of the schedule do not fit {self.per_epoch} an epoch")
        self.first, self.began, self.wait = self.at["step"], time.monotonic(), 0.0
        self.saved, self.unchecked, self.pace = self.began, [], []
        self.may_wait = not args.device.startswith("cuda")  # for the values of each step

    def save(self, name: str, epoch: int) -> None:
        """A checkpoint to go on from at this epoch, within it where its steps are not all done."""
        task, cohort = self.task, self.task.cohort
        self.run.save(name, task.more | self.at | {
            "format": CHECKPOINT_FORMAT, "kind": task.kind, "model_args": task.model_args,
            "class_name": list(cohort.class_name), "leads": list(cohort.leads),
            "fs": int(cohort.fs), "normalize": self.args.normalize, "cohort": cohort.name,
            "cohort_sha256": cohort.sha256, "args": dict(vars(self.args)), "epoch": epoch,
            "batch_size": self.batch_size,
            **{name: part.state_dict() for name, part in self.parts.items()}})
        self.saved = time.monotonic()

    def check_finite(self) -> None:
        """Raise for the first unchecked step whose loss or gradient is not finite.

        `descend` has left such a step out. On a GPU, which would have to wait, this is called
        before anything is logged or stored only; elsewhere after each step.
        """
        sums = [terms["minimised"] + terms["gradient norm"] for *_, terms in self.unchecked]
        for bad in (~torch.isfinite(torch.stack(sums))).nonzero()[:1, 0].tolist():
            step, items, terms = self.unchecked[bad]
            found = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
            raise InputError(f"step {step}: loss or gradient not finite ({found}); "
                             f"{blame(self.task.cohort, self.task.rows[items])}")
        self.unchecked.clear()

    def take(self, items: np.ndarray, terms: dict, epoch: int) -> None:
        """Count a step; its log row where one is due, and a checkpoint where the last one is old.

        A signal ends the run here; of several ranks, all at the same row of the log.
        """
        rate = self.schedule.get_last_lr()[0]
        self.unchecked.append((self.at["step"], items,
                               {k: v for k, v in terms.items() if not callable(v)}))
        self.schedule.step()
        self.at["step"] += 1
        step, stop = self.at["step"], self.run.asked if world_size() == 1 else 0
        save = stop or time.monotonic() - self.saved > 60 * self.args.checkpoint_minutes
        log = step % self.log_every == 0 or step == self.total or "grad_ratio" in terms
        if log or save or step % self.per_epoch == 0 or self.may_wait:
            self.check_finite()
        if log:
            loss, _, *found = [v() if callable(v) else v for v in terms.values()]
            found = [v.to(loss) for v in found] + [loss.new_tensor(self.run.asked)]
            *found, stop = average(torch.stack(found)).tolist()
            found = dict(zip(list(terms)[2:], found))
            elapsed = max(time.monotonic() - self.began, 1e-9)
            speed = (step - self.first) / elapsed
            self.run.log({"step": step, "epoch": epoch, **found, "lr": rate,
                          "items_per_second": speed * self.batch_size, "elapsed_seconds": elapsed,
                          "remaining_seconds": (self.total - step) / speed,
                          "wait_fraction": self.wait / elapsed})
        if save or stop:
            self.save("last.pt", epoch)
        if stop:
            self.run.end(step)

    def watch_pace(self, seconds: float) -> None:
        """Say, once a run, that the steps of a CPU take several times as long as at its start."""
        if self.pace is None or self.args.device != "cpu":
            return
        self.pace = [*self.pace[:15], *self.pace[15:][-9:], seconds]  # 5 to warm up, 10, the last
        first, now = (sorted(self.pace[i:i + 10])[-5:] for i in (5, 15))  # from the median on
        if len(self.pace) == 25 and now[0] > max(SLOWER * first[0], 0.01):
            self.pace = None
            print(f"note: a step takes {now[0]:.2g} s now, {first[0]:.2g} s when this run started: "
                  "another process keeps the cores busy (see `top`), or they are throttled; a new "
                  "run with OMP_NUM_THREADS=1 suffers less", flush=True)

    def judge(self, epoch: int) -> None:
        """Validate, log that; store the weights, and as the best ones if they are."""
        values = self.task.validate()
        values = on_first_rank(lambda: values)  # ranks may differ in the last bit: one decides
        self.run.log({"step": self.at["step"], "epoch": epoch, **values})
        key, sign = self.task.better
        score = sign * values[key]
        if not math.isnan(score) and (self.at["best"] is None or score > self.at["best"]):
            self.at |= {"best": score, "bad_epochs": 0}
            self.save("best.pt", epoch + 1)
        elif self.at["best"] is not None:
            self.at["bad_epochs"] += 1
        self.save("last.pt", epoch + 1)
        if average(torch.tensor(float(self.run.asked), device=self.args.device)):
            self.run.end(self.at["step"])


def fit(run, args: Namespace, recipe: dict, task: Task) -> None:
    """Batches -> loss -> step -> log -> validation -> checkpoint, until done.

    The modules then hold the weights of the task's result. run: a `Run`, which logs, saves, and
    holds the state to go on from.
    """
    loop = Loop(run, args, recipe, task)
    step = Step(task.loss_of, loop.optimizer, recipe.get("clip"), task.draws.values())
    at, size, n, key = loop.at, loop.batch_size, len(task.rows), task.better[0]
    mine = slice(rank() * size // world_size(), (rank() + 1) * size // world_size())
    print(f"{n} training items, batch {size}, {loop.per_epoch} steps an epoch, {args.epochs} "
          f"epochs, {loop.total} steps, log every {loop.log_every}")
    with run.noting_signals():
        for epoch in range(at["epoch"], args.epochs):
            # as it stood when this epoch began, also where a run goes on within it
            if loop.patience and epoch % loop.every == 0 and at["bad_epochs"] >= loop.patience \
                    and epoch * loop.per_epoch >= loop.least:
                print(f"stopped early: no better {key} in {loop.patience} validations")
                break
            for module in task.modules.values():
                module.train()
            order = epoch_order(n, size, args.seed, epoch)
            order = order[at["step"] - epoch * loop.per_epoch:, mine]
            asked = time.monotonic()
            for items, batch in prefetch(task.read, order):
                began = time.monotonic()
                loop.wait += began - asked
                # what a step draws is a function of (seed, step) alone: dropout, ...
                torch.manual_seed(seed_of(args.seed, at["step"], 1) + rank())
                for name, generator in task.draws.items():
                    own = rank() * (name != "sigreg")  # whose directions are alike on all ranks
                    generator.manual_seed(seed_of(args.seed, at["step"], PURPOSE[name]) + own)
                loop.take(items, step(items, batch, at["step"]), epoch)
                asked = time.monotonic()
                loop.watch_pace(asked - began)
            if (epoch + 1) % loop.every == 0 or epoch + 1 == args.epochs:
                loop.judge(epoch)
    if at["best"] is None:
        print(f"note: {key} was never defined (too few validation records or pairs); best.pt "
              "is the last epoch's")
        loop.save("best.pt", args.epochs)
    state = on_first_rank(lambda: load_checkpoint(run.path / task.result))
    for name, module in task.modules.items():
        module.load_state_dict(state[name])
        module.eval()


@torch.no_grad()
def scores_of(head: nn.Module, inputs: Tensor) -> np.ndarray:
    """Probabilities (n, K) float32 of a head, then in eval mode, on embeddings (n, dim)."""
    return head.eval()(inputs).sigmoid().float().cpu().numpy()


# ----------------------------------------------------------------------------------------------
# Pretraining: dynamics or invariance, SIGReg or VICReg (paper A)
# ----------------------------------------------------------------------------------------------


def gradient_ratio(pred: Tensor, reg: Tensor, model: nn.Module) -> float:
    """|grad pred| / |grad reg| over encoder and projector, unweighted: A's heuristic for lam."""
    parameters = [*model.encoder.parameters(), *model.projector.parameters()]
    norms = []
    for term in (pred, reg):
        grads = torch.autograd.grad(term, parameters, retain_graph=True)
        norms.append(average(torch.cat([g.float().ravel() for g in grads])).norm().item())
    return norms[0] / max(norms[1], 1e-30)


class Pretraining(Task):
    """World model, online probe, data and objective of a pretraining (A)."""

    kind, better = "worldmodel", ("val_loss", -1)
    result = "last.pt"  # which paper A probes

    def __init__(self, args: Namespace, cohort: Cohort, device: torch.device):
        super().__init__(args, cohort, device)
        self.draws = {name: torch.Generator(device) for name in PURPOSE}
        k, self.sets = len(cohort.class_name), args.action == "sets"
        self.model_args = {"num_classes": 2 * k + 2 if self.sets else k,
                           "in_leads": len(cohort.leads), "residual": args.residual,
                           "action": args.objective == "dynamics", "z_dim": args.z_dim}
        self.more = {"action_form": "sets" if self.sets else "difference"}
        self.model = _WorldModel(**self.model_args).to(device)
        fast_encoder(self.model.encoder)
        if device.type == "cpu" and torch.get_num_threads() > 1 and world_size() == 1:
            self.model.both = BothOnTwoThreads(self.model.encoder)
        self.modules = {"model": self.model}
        for name in ["online_probe", "supervised"][:1 + (args.supervise > 0)]:
            self.modules[name] = nn.Sequential(
                nn.LayerNorm(cardiowm.H_DIM), nn.Linear(cardiowm.H_DIM, k)).to(device)
        self.networks = {name: parallel(m, device) for name, m in self.modules.items()}
        self.sigreg = cardiowm.SIGReg(args.slices).to(device)
        self.signals = Signals(cohort, device, args.cache, args.normalize)
        # pairs, then single rows (--self-pairs), whose labels do not change
        _, pairs, single, _ = training_items(args, cohort)
        self.rows = np.concatenate([cohort.pair[pairs], np.stack([single] * 2, axis=1)])
        label, known = cohort.label[self.rows], cohort.has_label[self.rows]      # (n, 2, K), (n, 2)
        action = np.hstack([*label.swapaxes(0, 1), known]) if self.sets else np.concatenate([
            cohort.action_of(pairs, args.action), np.zeros((len(single), k), np.int8)])  # (n, A)
        self.label, self.known, self.action = (
            torch.from_numpy(part).to(device) for part in (label, known, action))

    def read(self, items: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) pairs -> both ECGs (B, 12, T) float16 mV and the index (B,), all on the device."""
        return *map(self.signals.read, self.rows[items].T), *super().read(items)

    def objective(self, z: Tensor, z_pred: Tensor, z_next: Tensor,
                  mean: Callable | None = None) -> dict[str, Tensor]:
        """The loss and its terms, of the global batch where `mean` is given."""
        if self.args.reg == "vicreg":
            return cardiowm.vicreg_loss(z_pred, z_next, mean)
        terms = cardiowm.dynamics_loss(z, z_pred, z_next, self.sigreg, self.args.lam,
                                       self.draws["sigreg"], mean)
        if self.args.objective == "labels":  # a control, whose predictor gets 0 for gradient
            terms["loss"] = self.args.lam * (terms["sigreg_t"] + terms["sigreg_next"]) \
                + 0 * terms["pred"]
        return terms

    def loss_of(self, items: np.ndarray, batch: tuple, step: int) -> tuple[Tensor, dict]:
        """The scalar to minimise and the terms to log, of this rank's part of the batch."""
        *both, at = batch
        x, x_next = self.signals.windows(self.args, self.draws["windows"], *both)
        with autocast(self.device):
            h, h_next, z, z_pred, z_next = self.networks["model"](x, x_next, self.action[at])
        # a problem of its own: nothing flows back
        logits = self.networks["online_probe"](h.detach().float())
        terms = self.objective(z, z_pred, z_next, average)
        if self.args.supervise:  # of both ends of the pairs, not detached
            ends = zip(self.networks["supervised"](torch.cat([h, h_next]).float()).chunk(2),
                       self.label[at].unbind(1), self.known[at].T)
            terms["supervised_bce"] = sum(cardiowm.known_bce(*end, average) for end in ends) / 2
            terms["loss"] = terms["loss"] + self.args.supervise * terms["supervised_bce"]
        terms["online_bce"] = F.binary_cross_entropy_with_logits(
            logits, self.label[at, 0].float())
        first_epoch = len(self.rows) // (len(items) * world_size())
        if step < min(GRAD_RATIO_STEPS, first_epoch):
            reg = terms["var"] + terms["cov"] if self.args.reg == "vicreg" else \
                terms["sigreg_t"] + terms["sigreg_next"]
            terms["grad_ratio"] = torch.tensor(gradient_ratio(terms["pred"], reg, self.model))
        z = z.detach()
        terms["z_std_min"] = lambda: gather(z.float()).std(dim=0).min()
        terms["z_rank"] = lambda: cardiowm.effective_rank(gather(z))  # an SVD: not always
        return terms["loss"] + terms["online_bce"], terms

    @torch.no_grad()
    def validate(self) -> dict:
        args, cohort, rows = self.args, self.cohort, self.judged["val"]
        self.take_norms(lambda x, x_next, at: self.model(
            self.signals.ready(x), self.signals.ready(x_next), self.action[at]))
        h, z = evaluate.embed(self.model, self.signals, rows, args.normalize)
        heads = {"": self.modules["online_probe"]}
        if args.supervise:
            heads["supervised_"] = self.modules["supervised"]
        values = {f"val_{name}macro_auroc": macro_auroc(cohort.label[rows], scores_of(head, h))
                  for name, head in heads.items()}
        pairs = select_pairs(cohort, rows, args.pairs, args.labelled_only)
        size = min(global_batch(args, len(self.rows)), len(pairs))  # the statistic scales with it
        source, target = np.searchsorted(rows, cohort.pair[pairs]).T
        a = torch.from_numpy(cohort.action_of(pairs, args.action)).to(self.device)
        terms: dict[str, list[float]] = {"loss": []}
        for i in range(len(pairs) // size if size > 1 else 0):  # one pair has no variance
            at = slice(i * size, (i + 1) * size)
            self.draws["sigreg"].manual_seed(seed_of(args.seed, i, 3))
            z_pred = self.model.predict(z[source[at]], a[at])
            for name, value in self.objective(z[source[at]], z_pred, z[target[at]]).items():
                terms.setdefault(name, []).append(float(value))
        values |= {f"val_{k}": float(np.mean(v)) if v else math.nan for k, v in terms.items()}
        if args.supervise:
            y, known = (torch.from_numpy(of[rows]).to(self.device)
                        for of in (cohort.label, cohort.has_label))
            values["val_supervised_bce"] = float(cardiowm.known_bce(
                heads["supervised_"](h), y, known))
            values["val_loss"] += args.supervise * values["val_supervised_bce"]
        return values | {"val_z_std_min": float(z.std(dim=0).min()),
                         "val_z_rank": float(cardiowm.effective_rank(z))}

    def score(self, split: str) -> np.ndarray:
        """Of the online probe, or of the supervised head where nothing else is learned."""
        head = self.modules["supervised" if self.args.objective == "labels" else "online_probe"]
        rows = self.judged[split]
        return scores_of(head, evaluate.embed(self.model, self.signals, rows,
                                              self.args.normalize)[0])


# ----------------------------------------------------------------------------------------------
# Downstream: finetuning, the supervised baseline, probes and augmentation (papers A and B)
# ----------------------------------------------------------------------------------------------


class Finetuning(Task):
    """Encoder and concat-pool head, end to end: from a pretraining, or from scratch."""

    kind = "classifier"

    def __init__(self, args: Namespace, cohort: Cohort, device: torch.device,
                 start: cardiowm.WorldModel | None):
        super().__init__(args, cohort, device)
        self.model_args = {"num_classes": len(cohort.class_name), "in_leads": len(cohort.leads)}
        encoder = cardiowm.XResNet1d50(len(cohort.leads)) if start is None else start.encoder
        self.model = cardiowm.Classifier(encoder, len(cohort.class_name)).to(device)
        fast_encoder(self.model.encoder)
        self.modules, self.network = {"model": self.model}, parallel(self.model, device)
        self.rows = training_items(args, cohort)[0]
        self.draws = {"windows": torch.Generator(device)}
        self.signals = Signals(cohort, device, args.cache, args.normalize)
        self.label = torch.from_numpy(cohort.label[self.rows]).to(device)

    def read(self, items: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.signals.read(self.rows[items]), *super().read(items)

    def loss_of(self, items: np.ndarray, batch: tuple, step: int) -> tuple[Tensor, dict]:
        x, at = batch
        with autocast(self.device):
            logits = self.network(*self.signals.windows(self.args, self.draws["windows"], x))
        loss = cardiowm.asymmetric_loss(logits, self.label[at])
        # a sum over the global batch, of which DDP takes the mean over ranks; logged per record
        return loss * world_size(), {"loss": loss.detach() / len(items)}

    @torch.no_grad()
    def score(self, split: str) -> np.ndarray:
        rows = self.judged[split]
        chunks = [rows[i:i + EMBED_BATCH] for i in range(0, len(rows), EMBED_BATCH)]
        scores = torch.cat([self.model(self.signals.ready(x)).sigmoid()
                            for _, x in prefetch(self.signals.read, chunks)]).cpu().numpy()
        bad = ~np.isfinite(scores).all(axis=1)
        if bad.any():
            raise InputError(f"scores of {bad.sum():,} records are not finite: "
                             f"{blame(self.cohort, rows[bad])}")
        return scores

    def validate(self) -> dict:
        self.take_norms(lambda x, at: self.model(self.signals.ready(x)))
        return super().validate()


def synthetic_rows(args, n: int) -> int:
    """--total, else paper B's number, or its number for one real row times n."""
    synthetic, real = SYNTHETIC_ROWS
    return args.total or (synthetic if args.preset == "paper" else round(synthetic / real * n))


def plan_augmentation(args, cohort: Cohort) -> tuple[Tensor, ...]:
    """Combinations (M, K), their counts (M,), which rows are normal and which carry codes (n,);
    sets args.total."""
    rows = training_items(args, cohort)[0]
    y = torch.from_numpy(cohort.label[rows])
    normal_code = torch.tensor([name in cohort.normal_codes for name in cohort.class_name])
    combinations, counts = cardiowm.label_combinations(y, min_count=args.min_count,
                                                       normal=normal_code)
    normal = (y[:, ~normal_code] == 0).all(dim=1)
    if len(counts) == 0:
        raise InputError(f"--min-count {args.min_count}: no combination of 1 to 4 classes is seen "
                         f"that often in {len(y)} training records; lower --min-count or raise "
                         "--frac")
    if args.augment == "dynamics" and not normal.any():
        raise InputError("--augment dynamics: found no normal record in the training folds to "
                         f"start from (label set within {cohort.normal_codes or 'none'})")
    args.total = synthetic_rows(args, len(y))
    print(f"augmentation ({args.augment}): {len(counts)} label combinations seen "
          f"{int(counts.min())} to {int(counts.max())} times, {args.total} synthetic rows beside "
          f"{len(y)} real ones, {int(normal.sum())} of them normal")
    return combinations, counts, normal, torch.from_numpy(cohort.has_label[rows])


def without_change(model: cardiowm.WorldModel, sets: bool) -> cardiowm.WorldModel:
    """A copy that takes every action for "no change" at the same source: the augmentor's control.

    In the first layer of the action encoder, the weights of y_next go over to y's, as if the target
    were the source; where the action is a difference, all are 0.
    """
    model = copy.deepcopy(model)
    weight = model.action_encoder[0].weight.data                            # (512, A)
    if not sets:
        weight.zero_()
        return model
    k = weight.shape[1] // 2 - 1
    weight[:, :k] += weight[:, k:2 * k]                                     # y and y_next
    weight[:, k:2 * k] = 0
    return model


def synthesise(args, model: cardiowm.WorldModel, plan: tuple, inputs: Tensor, y: Tensor) -> None:
    """Paper B's last args.total rows of inputs (n + total, dim) and y (n + total, K), made from the
    first n, the real ones."""
    combinations, counts, normal, known = plan
    n = len(inputs) - args.total
    generator = torch.Generator().manual_seed(seed_of(args.seed, 0, 4))
    if args.augment == "dynamics":
        sets = model.action_encoder[0].in_features != y.shape[1]
        model = without_change(model, sets) if args.augment_action == "zero" else model
        augmentor = (cardiowm.SetAugmentor if sets else cardiowm.Augmentor)(
            model, combinations, counts, args.total)
        at = normal.to(inputs.device)
        y_normal = y[:n][at] if y[:n][at].any() else None  # MIMIC: normal is no code
        source = {"known_normal": known[normal]} if sets else {}
        batches = augmentor.batches(inputs[:n][at], SYNTHESIS_BATCH, generator, y_normal, **source)
    else:
        batches = cardiowm.Interpolator(
            inputs[:n], y[:n], combinations, counts, args.total,
            neighbours=5 if args.augment == "smote" else 0).batches(SYNTHESIS_BATCH, generator)
    progress, at = Progress(args.total, "rows", "augmentation"), n
    for z, label in batches:
        if args.augment_action == "shuffled":  # of the batch, in which combinations are mixed
            label = label[torch.randperm(len(label), generator=generator)]
        inputs[at:at + len(z)], y[at:at + len(z)] = z, label
        at += len(z)
        progress.update(len(z))
    progress.close()


def probe_loss(head: nn.Module, inputs: Tensor, y: Tensor, n: int, pos_weight: Tensor) -> Callable:
    """`loss_of` for `fit`: A's loss for a linear head, B's for an MLP; n real rows come first."""
    def loss_of(items: np.ndarray, batch: tuple, step: int) -> tuple[Tensor, dict]:
        (at,) = batch
        logits = head(inputs[at].float())
        if isinstance(head, cardiowm.LinearProbe):
            loss = cardiowm.asymmetric_loss(logits, y[at])
            return loss, {"loss": loss.detach() / len(items)}  # logged per record
        weight = torch.where(at < n, 1.0, SYNTHETIC_WEIGHT)
        loss = cardiowm.weighted_bce(logits, y[at], weight, pos_weight)
        return loss, {"loss": loss}
    return loss_of


KEPT: dict[tuple, tuple[Tensor, Tensor]] = {}  # of the pretraining that this process probed last


class Probing(Task):
    """A linear (A) or an MLP (B) head on frozen h or z.

    init: what config.json says of the pretraining; None for an untrained encoder, whose batch norm
    takes its statistics from training records first, as that of every other model did.
    """

    kind = "probe"

    def __init__(self, args: Namespace, cohort: Cohort, device: torch.device,
                 model: cardiowm.WorldModel, plan: tuple | None, init: dict | None):
        super().__init__(args, cohort, device)
        fast_encoder(model.to(device).encoder)
        rows = training_items(args, cohort)[0]
        parts, n, total = [rows, *self.judged.values()], len(rows), args.total if plan else 0
        known = self.embed(model, np.concatenate(parts), n, init)[args.features == "z"]
        real, *judged = known.split([len(part) for part in parts])               # (n, dim) each
        self.known = dict(zip(self.judged, judged))
        # float16 with synthetic rows: at B's size, 2.7 million, that is 1.4 GB
        inputs = torch.empty((n + total, real.shape[1]), device=device,
                             dtype=torch.float16 if total else torch.float32)
        inputs[:n] = real
        y = torch.empty((n + total, len(cohort.class_name)), dtype=torch.uint8)
        y[:n] = torch.from_numpy(cohort.label[rows])
        limit = {"5": cardiowm.POS_WEIGHT_LIMIT, "full": math.inf}.get(args.class_weight)
        pos_weight = torch.ones(y.shape[1]) if limit is None else \
            cardiowm.positive_weight(y[:n], limit)
        y, pos_weight = y.to(device), pos_weight.to(device)
        if plan is not None:
            synthesise(args, model, plan, inputs, y)
        self.rows = np.concatenate([rows, np.full(total, -1)])
        self.model_args = {"dim": inputs.shape[1], "num_classes": y.shape[1]}
        self.more = {"head": args.head, "features": args.features}
        torch.manual_seed(args.seed)
        head = cardiowm.LinearProbe if args.head == "linear" else cardiowm.MLPProbe
        self.head = head(**self.model_args).to(device)
        self.modules = {"model": self.head}
        self.loss_of = probe_loss(self.head, inputs, y, n, pos_weight)

    def embed(self, model: cardiowm.WorldModel, rows: np.ndarray, n: int,
              init: dict | None) -> tuple[Tensor, Tensor]:
        """h and z of rows, the first n for training; a study probes one pretraining many times."""
        args, device = self.args, self.device
        key = init and (init["sha256"], self.cohort.sha256, args.normalize, str(device),
                        rows.tobytes())
        if key in KEPT:
            print("embeddings: those of the last probe, of the same pretraining and records")
            return KEPT[key]
        KEPT.clear()
        signals = Signals(self.cohort, device, args.cache, args.normalize)
        if init is None:
            first = rows[epoch_order(n, min(EMBED_BATCH, n), args.seed, 0)[:RECALIBRATE_BATCHES]]
            with autocast(device):
                recalibrate([model], lambda x: model.project(model.encode(signals.ready(x))),
                            (x for _, x in prefetch(signals.read, first)))
            model.eval()
        progress = Progress(len(rows), "records", "embedding")
        known = evaluate.embed(model, signals, rows, args.normalize, progress, EMBED_BATCH)
        progress.close()
        if key:
            KEPT[key] = known
        return known

    def score(self, split: str) -> np.ndarray:
        return scores_of(self.head, self.known[split])


# ----------------------------------------------------------------------------------------------
# Beyond the papers (nothing above calls what is below)
# Run folders: a run is new, unfinished or finished, and never overwritten
# ----------------------------------------------------------------------------------------------


def refuse(rules: list[tuple]) -> None:
    """Raises InputError for the first (broken, message) that is broken."""
    for broken, message in rules:
        if broken:
            raise InputError(message)


def folder_of(name: str) -> Path:
    """--run as a path: a mere name lies under runs/."""
    name = name.rstrip("/" + os.sep)
    return Path(name) if os.sep in name else Path("runs") / name


def is_finished(run: Path) -> bool:
    """Whether the last file of a run is there."""
    return (run / "predictions_test.npz").exists()


def config_of(run: Path) -> dict:
    """config.json of a run folder."""
    return read_json(run / "config.json", evaluate.CONFIG)[0]


def last_row(run: Path) -> dict:
    """The last row of a run's log: its last step and, once it is finished, its run_seconds."""
    return read_json(run / "log.jsonl", {"step": (int,)}, lines=True)[-1]


def describe(args: Namespace, cohort: Cohort, init: Path | None) -> dict:
    """The content of config.json: arguments, versions, code, cohort, and the run it starts from."""
    rows, pairs, single, _ = training_items(args, cohort)
    here = Path(__file__).resolve().parent
    commit = shutil.which("git") and subprocess.run(  # "" outside a repository
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    files = ("cardiowm.py", "prepare_data.py", "train.py", "evaluate.py")
    start = None
    if init is not None:
        last, old = last_row(init), config_of(init)
        start = {"run": init.name, "sha256": prepare_data.sha256_of(init / "last.pt"),
                 "steps": last["step"], "seconds": last.get("run_seconds"), "args": old["args"],
                 "cohort": old["cohort"], "transfer": old["cohort"]["sha256"] != cohort.sha256}
    return {
        "args": dict(vars(args)),
        "method": evaluate.method(vars(args), start),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "speed": {"ranks": world_size(), "threads": torch.get_num_threads(),
                  "bf16": has_bf16(args.device.split(":")[0])},
        "code": [{"git": (commit or "").strip() or None, "step": 0,  # it trained from this step on
                  "sha256": {f: prepare_data.sha256_of(here / f) for f in files}}],
        "cohort": {"name": cohort.name, "path": str(cohort.path), "source": cohort.source,
                   "synthetic": bool(cohort.synthetic), "sha256": cohort.sha256,
                   "fs": int(cohort.fs), "records": len(cohort.label),
                   "patients": len(np.unique(cohort.subject_id)),
                   "classes": len(cohort.class_name),
                   "frac_patients": len(np.unique(cohort.subject_id[rows])),
                   "frac_records": len(rows), "frac_pairs": len(pairs) + len(single)},
        "init": start,
    }


class Run:
    """A run folder: its life cycle (new, unfinished, finished), its log and its checkpoints."""

    def __init__(self, path: Path, config: dict, resume: bool, defaults: dict):
        """Decides what happens to `path`; raises InputError where nothing may be overwritten.

        defaults: value of each argument that the config.json of an older version may lack.
        """
        self.path, self.config, self.state, self.printed_at = path, config, None, 0.0
        self.began, self.asked = time.monotonic(), 0
        self.log_rows, self.log_lines = 0, []
        self.finished = is_finished(path)
        if not (path / "config.json").exists():
            if resume:
                print(f"{path}: nothing to resume there; starting at step 0")
            return
        old = config_of(path)
        why = lack(old, {"speed": {"threads": (int,)}, "code": (list,),
                         "init": (dict, type(None))}) or lack(
            (old["code"] or [None])[-1], {"sha256": (dict,)}, "code.")
        threads = why or old["speed"]["threads"]
        refuse([(why, f"{path / 'config.json'}: damaged, or of an older version: {why}; start anew "
                 "with --overwrite"),
                (not why and not 1 <= threads <= 1024, f"{path / 'config.json'}: damaged: found "
                 f"{threads} threads; start anew with --overwrite")])
        self._check_same(path, defaults | old["args"], old)
        refuse([(self.finished and not resume,
                 f"{path}: this run is finished; score it with `python evaluate.py --mode "
                 f"score --runs {quoted(path)}`, or start anew with --overwrite")])
        if self.finished:
            return
        self.found = path / "last.pt"
        if not self.found.exists():  # killed between the two renames
            self.found = path / "previous.pt"
        if not self.found.exists():
            print(f"{path}: found unfinished, without a checkpoint; starting at step 0")
            return
        log = path / "log.jsonl"
        with self.usable():
            self.state = load_checkpoint(self.found)
            why = lack(self.state, {
                **dict.fromkeys(("step", "epoch", "bad_epochs", "log_rows"), (int,)),
                "best": (float, int, type(None)), "args": {}, "optimizer": {"state": {}},
                "run_seconds": evaluate.NUMBER})
            refuse([(why, f"{self.found}: no checkpoint of this run ({why})")])
            self._check_same(self.found, self.state["args"], config)
            # only the rows that the checkpoint has seen stay in the log: no step is logged twice
            wanted = self.state["log_rows"]
            if log.exists():
                self.log_lines = log.read_bytes().splitlines(keepends=True)[:max(0, wanted)]
            whole = sum(line.endswith(b"\n") for line in self.log_lines)
            refuse([(whole != wanted, f"{log}: found {whole} whole rows, {self.found} counts "
                     f"{wanted}: lines of the log are lost")])
        print(f"RESUMING {path} at step {self.state['step']} (epoch {self.state['epoch']}) of "
              f"{self.found.name}: found unfinished, same configuration, same cohort")
        self.began -= self.state["run_seconds"]
        code, (new,) = old["code"], config["code"]
        if code[-1]["sha256"] != new["sha256"]:  # the code of each part, the first one first
            print("note: the code changed since this run began")
            code.append(new | {"step": self.state["step"]})
        config["code"] = code
        if config["args"]["device"] == "cpu":  # where the last digits depend on it
            config["speed"]["threads"] = old["speed"]["threads"]

    def _check_same(self, where: Path, args: dict, config: dict) -> None:
        """InputError if a folder or a checkpoint is one of another run."""
        def content(args: dict, config: dict) -> dict:
            init = config["init"] or {}
            return {k: v for k, v in args.items() if k not in HOW_FLAGS} | {
                "cohort": config["cohort"]["sha256"][:12], "init": init.get("run"),
                "the weights of init": init.get("sha256")}

        now = {"decoys": 0.0} | content(self.config["args"], self.config)  # a switch of before
        refuse([(value != now.get(key),
                 f"{where}: holds a run with {key} = {prepare_data.printable(str(value)[:80])}, "
                 f"asked for {now.get(key)}; choose another --run, or move the old one aside with "
                 "--overwrite")
                for key, value in content(args, config).items()])

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """InputError where this run cannot go on from the checkpoint found, and what to do then."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            text = str(error) if isinstance(error, InputError) else \
                f"{self.found}: no checkpoint of this run ({type(error).__name__}: " \
                + f"{str(error)[:200].splitlines()[0]})"
            previous = self.path / "previous.pt"
            advice = "No other checkpoint is there: start anew with --overwrite"
            with contextlib.suppress(InputError, KeyError):
                step = load_checkpoint(previous)["step"]
                if self.found != previous:
                    advice = (f"The checkpoint before it is whole, at step {step}: run `mv "
                              f"{quoted(previous)} {quoted(self.found)}`, then the same command")
            raise InputError(f"{text}. {advice}") from None

    def _restore(self, wanted: dict, parts: dict) -> None:
        state = self.state
        refuse([(state[name] != value, f"{self.found}: {name} is {state[name]}, {value} wanted: of "
                 "another run, or of another number of processes")
                for name, value in wanted.items()])
        modules = {k: part for k, part in parts.items() if isinstance(part, nn.Module)}
        for name, module in modules.items():
            check_tensors(module.state_dict(), state[name], f"{self.found}: {name}")
        parameters = [p for group in parts["optimizer"].param_groups for p in group["params"]]
        refuse([(state["step"] > 0 and len(state["optimizer"]["state"]) != len(parameters),
                 f"{self.found}: the optimizer holds {len(state['optimizer']['state'])} of "
                 f"{len(parameters)} parameters")])
        for i, moments in state["optimizer"]["state"].items():
            like = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[i])
            check_tensors(like | {"step": torch.tensor(0.0)}, moments,
                          f"{self.found}: optimizer, parameter {i}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        n = sum(len(module.state_dict()) for module in modules.values())
        print(f"{n} of {n} tensors loaded from {self.found}, and the optimizer's")

    def begin(self, wanted: dict, parts: dict) -> None:
        """Put the checkpoint found, if it holds what is `wanted`, into the parts of a loop, all or
        nothing; open the folder."""
        if self.state:
            with self.usable():
                self._restore(wanted, parts)
        if self.state and self.state["best"] is not None:  # which the end of the training needs
            best = self.path / "best.pt"
            try:
                state = load_checkpoint(best)
                for name, module in parts.items():
                    if isinstance(module, nn.Module):
                        check_tensors(module.state_dict(), state.get(name, {}), f"{best}: {name}")
            except InputError as error:
                raise InputError(f"{error}; {self.found} alone cannot go on: start anew with "
                                 "--overwrite") from None
        if rank() > 0:
            return
        for left in self.path.glob("*.tmp"):  # by a process that was killed
            left.unlink()
        replace_file(self.path / "config.json", json.dumps(self.config, indent=2).encode())
        self.log_rows = len(self.log_lines)
        replace_file(self.path / "log.jsonl", b"".join(self.log_lines))

    def seconds(self) -> float:
        """Time spent in this run, the parts before each interruption included."""
        return time.monotonic() - self.began

    def log(self, row: dict) -> None:
        """Append a row to log.jsonl, without NaN and infinity; print some rows."""
        if rank() > 0:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v
               for k, v in row.items()}
        log = self.path / "log.jsonl"
        with system_errors(log), open(log, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.log_rows += 1
        # every validation, else one row a second
        if any(k.startswith("val_") for k in row) or time.monotonic() - self.printed_at > 1:
            self.printed_at = time.monotonic()
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items()), flush=True)

    def save(self, name: str, checkpoint: dict) -> None:
        """Write a checkpoint whole or not at all; the last.pt before it becomes previous.pt."""
        if rank() == 0:
            log, content = self.path / "log.jsonl", io.BytesIO()
            torch.save(checkpoint | {"log_rows": self.log_rows, "run_seconds": self.seconds()},
                       content)
            with system_errors(log), open(log, "a") as f:  # the rows that it counts come first
                os.fsync(f.fileno())
            replace_file(self.path / name, content.getbuffer(),
                         keep="previous.pt" * (name == "last.pt"))

    @contextlib.contextmanager
    def noting_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM set `asked`, for the loop to end; Ctrl-C once more ends at once."""
        def note(number: int, frame) -> None:
            # torchrun passes on to its ranks what the terminal has sent them already
            if self.asked and number == signal.SIGINT and world_size() == 1:
                raise KeyboardInterrupt
            self.asked = number

        with contextlib.ExitStack() as until:
            with contextlib.suppress(ValueError):  # not in the main thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    if signal.getsignal(number) != signal.SIG_IGN:  # `&` in a script: ignored
                        until.callback(signal.signal, number, signal.signal(number, note))
            yield

    def end(self, step: int) -> None:
        """End the process as the signal asked that `noting_signals` noted, here or on a rank."""
        number = signal.Signals(self.asked or signal.SIGTERM)
        again = " without --overwrite" * self.config["args"]["overwrite"]
        line = (f"{number.name}: stopped at step {step}, which {self.path / 'last.pt'} holds; the "
                f"same command{again} goes on from there")
        raise KeyboardInterrupt(line) if number == signal.SIGINT else \
            prepare_data.Stopped(number, line)


def hold(path: Path, overwrite: bool, until: contextlib.ExitStack) -> None:
    """Lock a run folder, unless it is finished; --overwrite moves the old one aside first."""
    is_run, refusal = (path / "config.json").exists(), (
        f"{path}: another process trains in that folder; wait until it ends, or choose another "
        "--run")
    own = {"lock", "config.json.tmp"}  # of a run that has just begun
    refuse([(path.is_dir() and not is_run and {file.name for file in path.iterdir()} - own,
             f"{path}: found a folder that is no run (no config.json); choose another --run")])
    if is_run and overwrite:
        with locked(path, refusal):
            numbered = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
            aside = path.rename(next(p for p in numbered if not p.exists()))
        print(f"--overwrite: {path} moved aside to {aside}")
    if not is_finished(path):
        until.enter_context(locked(path, refusal))


def write_predictions(run: Run, cohort: Cohort, scores: dict[str, np.ndarray]) -> None:
    """predictions_{val,test}.npz, test last: its presence says that the run is finished."""
    for name, rows in judged_rows(cohort).items():
        content = io.BytesIO()
        np.savez(content, y_true=cohort.label[rows], y_score=scores[name].astype(np.float32),
                 study_id=cohort.study_id[rows], subject_id=cohort.subject_id[rows],
                 class_name=np.array(cohort.class_name),
                 pair_first=np.isin(rows, cohort.pair[:, 0]),
                 first_in_stay=cohort.ecg_no_within_stay[rows] == 0,
                 has_label=cohort.has_label[rows])
        replace_file(run.path / f"predictions_{name}.npz", content.getbuffer())


def summarise(run: Run, args, cohort: Cohort, scores: dict[str, np.ndarray]) -> None:
    """What came out, and what to run next."""
    what = "online probe" if args.mode == "pretrain" else args.mode
    print(f"\n{run.path}: done in {run.seconds():.0f} s on {args.device} "
          f"({'SYNTHETIC demo' if cohort.synthetic else 'real'} cohort {cohort.name}, seed "
          f"{args.seed}, {run.config['cohort']['frac_patients']} training patients)")
    for name, rows in judged_rows(cohort).items():
        values = auroc(cohort.label[rows], scores[name])
        print(f"  {name:<4} macro-AUROC ({what}, all {len(rows)} records of "
              f"{len(np.unique(cohort.subject_id[rows]))} patients, {np.isfinite(values).sum()} of "
              f"{len(values)} classes): {macro_auroc(cohort.label[rows], scores[name]):.3f}")
    print("next:")
    if args.mode == "pretrain":
        for mode in ("probe", "finetune"):
            print(f"  python train.py --mode {mode} --init {quoted(run.path)} --data "
                  f"{quoted(cohort.path)} --frac {args.frac:g} --seed {args.seed}")
    print(f"  python evaluate.py --mode score --runs {quoted(run.path)}")


# ----------------------------------------------------------------------------------------------
# Where a run starts, and how long it takes
# ----------------------------------------------------------------------------------------------


def untrained_draw(init: str | None) -> int | None:
    """0 for --init random, D for random:D; None where --init names something else."""
    word, _, draw = (init or "").partition(":")
    return int(draw or 0) if word == "random" and (draw or "0").isdecimal() else None


def finished_run(name: str | Path, flag: str) -> Path:
    """The folder of a run; InputError where there is none, or it is not finished."""
    run = find_run(name)
    refuse([(not is_finished(run), f"{flag} {run}: that run is unfinished; finish it first by "
             "running its command again")])
    return run


def find_init(args, cohort: Cohort) -> Path | None:
    """The pretraining to start from: --init, or that of the same cohort, recipe, fraction, seed."""
    if args.mode == "pretrain" or args.init == "scratch" or untrained_draw(args.init) is not None:
        return None
    if args.init is not None:
        return finished_run(args.init, "--init")
    chosen = sorted({("frac", f"{args.frac:g}"), ("recipe", args.recipe), ("seed", args.seed)}
                    - {("frac", "1"), ("recipe", "papers"), ("seed", 0)})
    path = Path("runs", f"{cohort.name}-pretrain" + "".join(f"-{name}{of}" for name, of in chosen))
    old = config_of(path) if (path / "config.json").exists() else None
    refuse([(old is None or (cohort.sha256, args.frac, args.seed, args.recipe) != (
        old["cohort"]["sha256"], old["args"]["frac"], old["args"]["seed"],
        old["args"].get("recipe", "papers")),
        f"--init: no pretraining of {cohort.name}, of this fraction and seed, at {path}; run "
        f"`python train.py --mode pretrain --data {quoted(cohort.path)}"
        + "".join(f" --{name} {of}" for name, of in chosen)
        + "` first, or name one with --init RUN")])
    print(f"init: {path} (pretraining of the same cohort, fraction and seed)")
    return finished_run(path, "--init")


def load_start(init: Path | None, args, cohort: Cohort) -> cardiowm.WorldModel | None:
    """The start: None from scratch, an untrained model, or last.pt of a pretraining run, checked.

    A probe takes over the input scaling of its encoder: args.normalize is set.
    """
    if args.mode == "pretrain" or args.init == "scratch":
        return None
    if init is None:
        draw = untrained_draw(args.init)
        torch.manual_seed(seed_of(args.seed, draw, 5) if draw else args.seed)
        return cardiowm.WorldModel(len(cohort.class_name), len(cohort.leads)).eval()
    model, state = evaluate.load_world_model(init)
    print(f"init: {len(state['model'])} of {len(model.state_dict())} tensors loaded from "
          f"{init / 'last.pt'}")
    if args.mode == "probe":
        args.normalize = state["normalize"]
    same_classes = list(state["class_name"]) == list(cohort.class_name)
    refuse([
        (list(state["leads"]) != list(cohort.leads),
         f"--init {init}: was trained on leads {state['leads']}, the cohort has {cohort.leads}"),
        (state["normalize"] != args.normalize,
         f"--init {init}: was trained with --normalize {state['normalize']}, asked for "
         f"{args.normalize}; give --normalize {state['normalize']}"),
        (args.augment == "dynamics" and (not same_classes or model.action_encoder is None),
         f"--augment dynamics: {init} has no action encoder (--objective invariance), or one of "
         "another vocabulary; pretrain on this cohort")])
    if state["fs"] != cohort.fs:
        print(f"note: {init} was trained at {state['fs']} Hz, the cohort has {cohort.fs} Hz")
    if not same_classes:
        print(f"note: {init} knows other classes ({' '.join(state['class_name'])}) than the cohort "
              f"({' '.join(cohort.class_name)}): the encoder goes over")
    return model


def compute_of(name: str) -> int:
    """Records that a finished finetuning and its pretraining sent forward and back, by its name."""
    run = finished_run(name, "--compute-of")
    config = config_of(run)
    init, mode = config["init"], config["args"]["mode"]
    refuse([(mode != "finetune" or "steps" not in (init or {}),
             f"--compute-of {name}: found a {mode} run from {config['args'].get('init')}; wanted "
             "the finetuning of a pretraining")])
    passes = 0
    for part, steps in ((config, last_row(run)["step"]), (init, init["steps"])):
        pairs = part["args"]["mode"] == "pretrain"  # of two records each
        n = part["cohort"]["frac_pairs" if pairs else "frac_records"]
        passes += steps * min(part["args"]["batch_size"], n) * (2 if pairs else 1)
    return passes


def usual_switches(args: Namespace) -> dict:
    """What --recipe sets where a flag is unset; of the objective, so of a pretraining alone."""
    usual = dict(evaluate.SWITCHES[args.recipe if args.mode == "pretrain" else "papers"])
    if args.objective != "dynamics":  # it takes no action
        usual["action"] = "coded"
    if args.lam is not None or args.reg != "sigreg":
        usual["sigreg_ratio"] = None
    return usual


def settle(args: Namespace) -> Namespace:
    """Fill the switches left unset from --recipe; returns args."""
    for name, value in usual_switches(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def resolve(args: Namespace, cohort: Cohort, device: torch.device, n: int,
            passes: int | None = None) -> dict:
    """Fill what was left unset from the recipe, for n training items; returns the recipe.

    passes: records to send forward and back in all, as --compute-of asks.
    """
    # what the recipe sets may differ between the seeds of one method, what was given may not
    args.given = {name: getattr(args, name) for name in (
        "epochs", "batch_size", "lr", "schedule", "total") if getattr(args, name) is not None}
    supervised = args.mode == "finetune" and args.init == "scratch"
    recipe = dict(RECIPES[args.head if args.mode == "probe" else
                          "supervised" if supervised else args.mode])
    laptop = not args.paper and (cohort.synthetic or device.type == "cpu")
    args.preset = "quick" if args.quick else "laptop" if laptop else "paper"
    recipe |= recipe.get(args.preset, {})
    per_epoch = max(1, n // min(args.batch_size or recipe["batch_size"], n))
    epochs = max(recipe["epochs"], math.ceil(recipe.get("steps", 1) / per_epoch))
    # where epochs are short, a validation after each would take longer than the training
    every = math.ceil(epochs / recipe["epochs"]) if "patience" in recipe else 1
    if passes is not None:
        epochs = max(1, round(passes / n))
        every = math.ceil(epochs / PLATEAU["epochs"])
    if passes is not None or args.epochs is not None:  # exactly so many, whatever validation says
        recipe["patience"] = None
    recipe |= {"epochs": epochs, "validate_every": every if args.epochs is None else 1}
    for name in ("epochs", "batch_size", "lr", "schedule"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    if args.sigreg_ratio is not None:
        args.lam = cardiowm.ratio_to_lam(args.sigreg_ratio, global_batch(args, n))
    if args.mode == "probe":
        args.features = args.features or {"linear": "h", "mlp": "z"}[args.head]
        args.class_weight = args.class_weight or ("5" if args.head == "mlp" else None)
    args.patience, args.device = recipe.get("patience"), str(device)
    return recipe


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------

# flags that say where or how a run executes, not what it computes: in no run name, free to differ
HOW_FLAGS = {"data", "cache", "run", "device", "resume", "overwrite", "checkpoint_minutes",
             "compile"}
# flags with a meaning in some modes only; given elsewhere they are refused, not ignored
MODE_FLAGS = {
    "pretrain": {"pairs", "objective", "action", "residual", "z_dim", "reg", "lam", "slices",
                 "sigreg_ratio", "crop", "noise", "supervise", "self_pairs", "allow_tiny",
                 "normalize"},
    "finetune": {"init", "normalize", "compute_of", "crop", "noise"},
    "probe": {"init", "head", "features", "augment", "augment_action", "class_weight", "min_count",
              "total"},
}
OWN_FLAGS = {  # modes that compose runs of their own take these flags only
    "bench": {"run", "seed", "device", "compile", "quick"},
    "reproduce": {"data", "cache", "labelled_only", "min_count", "total", "paper", "quick", "run",
                  "seed", "device", "compile", "deterministic", "resume", "checkpoint_minutes"},
}


def flag_of(name: str) -> str:
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")


def check_arguments(args: Namespace, parser: ArgumentParser) -> None:
    """Raises InputError where a flag is out of range, or means nothing beside the others.

    args.seed becomes a list in --mode reproduce, one number elsewhere.
    """
    mode, seeds = args.mode, args.seed if isinstance(args.seed, list) else [args.seed]
    given = sorted(k for k, v in vars(args).items() if k != "mode" and v != parser.get_default(k))
    rules = [
        (len(set(seeds)) < len(seeds) or (len(seeds) > 1 and mode != "reproduce"),
         f"--seed: found {' '.join(map(str, seeds))}, wanted one seed (--mode reproduce takes "
         "several, each once)")]
    rules += [({one, other} <= {*given}, f"{flag_of(one)} and {flag_of(other)} exclude each other: "
               "give one") for one, other in (
        ("paper", "quick"), ("resume", "overwrite"), ("lam", "sigreg_ratio"))]
    for name, (low, high) in parser.within.items():
        values = seeds if name == "seed" else [getattr(args, name)]
        rules += [(value is not None and not low <= value <= high,  # NaN fails as well
                   f"{flag_of(name)}: found {value}, wanted {low:,} to {high:,}")
                  for value in values]
    for name in given:
        modes = [m for m, flags in MODE_FLAGS.items() if name in flags] or list(MODE_FLAGS)
        modes += [m for m, flags in OWN_FLAGS.items() if name in flags]
        rules.append((mode not in modes, f"{flag_of(name)}: means nothing in --mode {mode}; it "
                      f"belongs to --mode {' or '.join(modes)}"))
    refuse(rules + contradictions(args, given))
    args.seed = seeds if mode == "reproduce" else seeds[0]


def contradictions(args: Namespace, given: list[str]) -> list[tuple]:
    """Flags of a run that contradict each other: (broken, message)."""
    scratch, augments = args.init == "scratch", args.augment != "none"
    switch = vars(settle(copy.copy(args)))
    idle = [(name, "reg") for name in ("lam", "sigreg_ratio", "slices")
            if args.reg != "sigreg"] + [
        (name, "augment") for name in ("min_count", "total")
        if args.mode == "probe" and not augments]
    return [
        *((name in given, f"{flag_of(name)}: means nothing with {flag_of(owner)} "
           f"{getattr(args, owner)}; leave it out") for name, owner in idle),
        (args.objective != "dynamics" and args.action not in (None, "coded"),
         f"--action {args.action}: the {args.objective} objective takes no action; leave it out"),
        (args.objective == "labels" and (not switch["supervise"] or args.reg != "sigreg"),
         "--objective labels: learns labels, with SIGReg or nothing beside: give --supervise W and "
         "leave --reg out"),
        (switch["self_pairs"] and switch["crop"] == 1,
         "--self-pairs: pairs two windows of a record, and without --crop they are one: add --crop "
         "0.8"),
        (args.mode != "pretrain" and args.init is not None and args.recipe != "papers",
         f"--recipe {args.recipe}: chooses the pretraining to start from, and so does --init "
         f"{args.init}; leave one out"),
        (args.augment_action != "true" and args.augment != "dynamics",
         f"--augment-action {args.augment_action}: a control of --augment dynamics; add that"),
        (args.head == "linear" and (augments or args.class_weight is not None),
         "--augment and --class-weight belong to paper B's probe: add --head mlp"),
        (args.augment == "dynamics" and args.features == "h",
         "--augment dynamics: the predictor works in z; leave --features out"),
        (args.compute_of is not None and (not scratch or args.epochs is not None),
         "--compute-of: trains a supervised baseline as long as a finetuned run: give --init "
         "scratch, and leave --epochs out"),
        (scratch if args.mode == "probe" else untrained_draw(args.init) is not None,
         f"--init {args.init}: means nothing in --mode {args.mode}: a finetuning takes a run or "
         "scratch, a probe a run or random")]


def run_name(args: Namespace, parser: ArgumentParser, stem: str) -> str:
    """<cohort stem>-<mode> and every flag that differs from its default, in the parser's order."""
    parts, usual = [stem, args.mode], usual_switches(args)
    for action in parser._actions:
        name, value = action.dest, getattr(args, action.dest, None)
        # compile stays in a name: so an older command finds its run
        if name in HOW_FLAGS - {"compile"} | {"mode", "help"} \
                or value in (action.default, usual.get(name, "")):
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if name in ("init", "compute_of"):
            text = Path(text).name.removeprefix(stem + "-")
        parts.append("no-" * (value is False) + name.replace("_", "-")
                     + ("" if isinstance(value, bool) else text))
    return "-".join(parts)


def build_parser() -> ArgumentParser:
    """The command line: flags, grouped, no abbreviations."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.within = {}  # lowest and highest value of a flag

    def add(flag: str, default, text: str, choices: str = "", within: tuple = (), **how) -> None:
        """A flag of the current group; its default, or its type where it is unset by default."""
        if default is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif default is False:
            how["action"] = "store_true"
        elif isinstance(default, type):
            how["type"] = default
        else:
            how |= {"default": default, "type": type(default)}
            text += f" (default: {default})"
        how |= {"choices": choices.split()} if choices else {}
        name = group.add_argument(flag, help=text, **how).dest
        parser.within |= {name: within} if within else {}

    group = parser.add_argument_group("what to do")
    add("--mode", str, "reproduce: the papers' whole matrix and a report; bench: time every stage",
        "pretrain finetune probe reproduce bench", required=True)
    group = parser.add_argument_group("data")
    add("--data", str, "cohort .h5 (unset: data/cohort.h5, else the demo is built)")
    add("--frac", 1.0, "fraction of the training patients, nested", within=(1e-9, 1.0))
    add("--labelled-only", False, "leave unlabelled records out of training")
    add("--pairs", "all", "pretrain on all, on those of two labelled records, or between stays",
        "all labelled between")
    add("--cache", "auto", "where the signals are held", "auto disk ram gpu")
    group = parser.add_argument_group("model")
    add("--recipe", "papers", "unset --action to --self-pairs, or the pretraining to start from",
        " ".join(evaluate.SWITCHES))
    add("--objective", "dynamics", "predict with the action, without it, or not at all (control)",
        "dynamics invariance labels")
    add("--action", str, "label change, true change (demo only), zeros, or both label sets",
        "coded state none sets")
    add("--self-pairs", bool, "records in no pair become pairs of two windows of themselves")
    add("--residual", False, "z_pred = z + MLP (paper A's text)")
    add("--z-dim", 256, "width of z", within=(2, 65_536))
    add("--normalize", "zscore", "none keeps mV (a probe takes its encoder's)", "zscore none")
    add("--init", str, "RUN (unset: the pretraining of the same cohort, fraction and seed), "
        "scratch (finetune: supervised), random or random:D (probe: the D-th untrained encoder)")
    add("--compute-of", str, "train from scratch as long as this finetuned run and its pretraining",
        metavar="RUN")
    add("--head", "linear", "probe of paper A or of B", "linear mlp")
    add("--features", str, "what is probed (unset: linear h, mlp z)", "h z")
    add("--augment", "none", "synthetic rows for the mlp head", "none dynamics smote oversample")
    add("--augment-action", "true", "controls of dynamics: other rows' labels, no change",
        "true shuffled zero")
    add("--class-weight", str, "cap on neg/pos weights of the mlp head (unset: 5)", "none 5 full")
    add("--min-count", 50, "rarest label combination synthesised", within=(1, 10**9))
    add("--total", int, "synthetic rows (unset: 2,000,000; laptop preset: 2.77 a real row)",
        within=(1, 10**9))
    group = parser.add_argument_group("loss")
    add("--reg", "sigreg", "against collapse", "sigreg vicreg")
    add("--lam", float, "weight of SIGReg (papers: 0.1)", within=(0.0, 1.0))
    add("--sigreg-ratio", float, "lam from lam N / (1 - lam) at the batch size N",
        within=(0.0, 1e6))
    add("--slices", 256, "random directions of SIGReg", within=(1, 1_000_000))
    add("--crop", float, "train on a random window of this part of each record", within=(0.1, 1.0))
    add("--noise", float, "and on noise of this standard deviation", within=(0.0, 100.0))
    add("--supervise", float, "weight of a linear head on h that learns the coded labels",
        within=(0.0, 1e6))
    group = parser.add_argument_group("optimisation (unset: the papers' recipe or the preset)")
    add("--epochs", int, "passes over the training items: exactly so many", within=(1, 1_000_000))
    add("--batch-size", int, "pairs (pretrain) or records a step", within=(2, 10_000_000))
    add("--lr", float, "peak learning rate", within=(1e-12, 100.0))
    add("--schedule", str, "learning-rate schedule", "cosine onecycle")
    add("--paper", False, "the papers' epochs and batch size, wherever it runs")
    add("--quick", False, "a smoke run: very few epochs")
    group = parser.add_argument_group("run")
    add("--run", str, "name under runs/, or a path (unset: made from the flags)")
    add("--seed", 0, "of patients, weights, batches and directions; reproduce takes several",
        within=(0, 2**31 - 1), nargs="+", metavar="SEED")
    add("--device", "auto", "auto, cpu, cuda, cuda:N, mps")
    add("--compile", False, argparse.SUPPRESS)  # of older commands, without effect
    add("--deterministic", False, "deterministic kernels only")
    add("--resume", False, "finished runs: say so and exit 0")
    add("--overwrite", False, "move an old run folder aside and start anew")
    add("--allow-tiny", False, f"pretrain on fewer than {MIN_PAIRS} pairs")
    add("--checkpoint-minutes", 10.0, "between checkpoints in an epoch", within=(0.0, 1e6))
    return parser


def open_cohort(path: str | None) -> Cohort:
    """--data; else data/cohort.h5; else the demo cohort, built there."""
    if path is None and not DEFAULT_DATA.exists():
        print(f"NO --data AND NO {DEFAULT_DATA}: building the SYNTHETIC demo cohort there. Nothing "
              "learned from it says anything about real patients.", flush=True)
        prepare_data.build("demo", out=DEFAULT_DATA)
    return Cohort(path or DEFAULT_DATA)


def cohort_lines(cohort: Cohort, device: torch.device) -> str:
    """What a cohort is, and what is to be said of its file."""
    return "\n".join([
        f"cohort: {cohort.path} ({'SYNTHETIC' if cohort.synthetic else 'real'}, {cohort.source}), "
        f"{len(cohort):,} records, {len(cohort.class_name)} classes, {cohort.fs} Hz; device "
        f"{device}",
        *(f"note: {note}" for note in prepare_data.notes(cohort))])


def prepare(args: Namespace, parser: ArgumentParser, cohort: Cohort, device: torch.device) -> tuple:
    """Everything that can be wrong with the input, found before a run folder is touched."""
    patient = np.unique(np.stack([cohort.subject_id, cohort.split], axis=1), axis=0)[:, 0]
    refuse([
        *((True, f"{cohort.path}: patient {twice} lies in two of train, val and test, wanted in "
           f"one fold alone; see `python prepare_data.py --check {quoted(cohort.path)}`, and build "
           "the cohort anew") for twice in patient[1:][patient[1:] == patient[:-1]]),
        *((len(which) == 0, f"{cohort.path}: found no {name} record; every run is judged on them: "
           "prepare a cohort with more patients") for name, which in judged_rows(cohort).items())])
    path = folder_of(args.run or run_name(args, parser, cohort.name))
    init = find_init(args, cohort)
    torch.manual_seed(args.seed)
    start = load_start(init, args, cohort)
    n = training_items(settle(args), cohort)[3]
    pretraining = args.mode == "pretrain"
    strict = pretraining and not args.allow_tiny
    least = MIN_PAIRS if strict else 2
    refuse([(n < least, f"--frac {args.frac:g}: found {n} training "
             f"{'pairs' if pretraining else 'records'}, wanted at least {least}"
             f"{' for SIGReg to mean anything' * strict}; raise --frac or prepare more patients"
             f"{', or give --allow-tiny' * strict}")])
    passes = None if args.compute_of is None else compute_of(args.compute_of)
    recipe = resolve(args, cohort, device, n, passes)
    size = global_batch(args, n)
    refuse([(size < 2 * world_size(),
             f"--batch-size: found {min(args.batch_size, n)} items for {world_size()} ranks, "
             "wanted at least 2 for each; raise it or start fewer processes")])
    print_training(args, cohort)
    if passes is not None:
        print(f"compute of {args.compute_of} and its pretraining: {passes:,} records forward and "
              f"back, {args.epochs} epochs of {n}")
    plan = plan_augmentation(args, cohort) if args.augment != "none" else None
    return path, init, start, recipe, plan


def print_training(args: Namespace, cohort: Cohort) -> None:
    """Print what a resolved run is trained on, with which settings, and why."""
    rows, pairs, single, n = training_items(args, cohort)
    found = training_rows(cohort, args.frac, args.seed, labelled_only=False)
    everyone = np.unique(cohort.subject_id[cohort.split == 0])
    print(f"training: {len(np.unique(cohort.subject_id[found]))} of {len(everyone)} patients, "
          f"{len(found)} records, of which {int((~cohort.has_label[found]).sum())} unlabelled "
          f"({'left out' if args.labelled_only else 'kept as all-zero labels'})")
    if args.mode == "pretrain":
        told = "coded" if args.action == "sets" else args.action
        changed = int(cohort.action_of(pairs, told).any(axis=1).sum())
        print(f"pairs: {len(pairs)} for training, {changed} of them with an action"
              + f"; and {len(single)} single records" * args.self_pairs)
        val = judged_rows(cohort)["val"]
        judged = len(select_pairs(cohort, val, args.pairs, args.labelled_only))
        size = min(global_batch(args, n), judged)
        print(f"validation: {len(val)} records, {judged} pairs, SIGReg at N = {size} (fixed)")
        print(f"recipe: {evaluate.recipe_words(vars(args))[2:] or 'papers'}")
    positive = cohort.label[rows].sum(axis=0, dtype=np.int64)
    constant = [name for name, n in zip(cohort.class_name, positive) if n in (0, len(rows))]
    if constant:
        print(f"note: {len(constant)} of {len(positive)} classes are constant among the training "
              f"records, nothing is learned of them: {', '.join(constant)}")
    cause = "synthetic cohort" if cohort.synthetic else "CPU"
    why = {"quick": "--quick", "paper": "the papers' settings",
           "laptop": f"{cause}; --paper for the papers'"}[args.preset]
    until = f" at most ({args.patience} validations without a better one end it)"
    print(f"preset: {args.preset} ({why}): {args.epochs} epochs{until * bool(args.patience)}, "
          f"batch size {args.batch_size}, lr {args.lr:g}, {args.schedule}")


def train(args: Namespace, parser: ArgumentParser) -> None:
    """One run: config -> data -> run folder -> train -> predictions -> summary."""
    check_arguments(args, parser)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    torch.use_deterministic_algorithms(args.deterministic)
    device = join_ranks(args)
    on_first_rank(lambda: open_cohort(args.data).sha256)  # builds the demo cohort if there is none
    cohort = open_cohort(args.data)
    print(cohort_lines(cohort, device))
    path, init, start, recipe, plan = prepare(args, parser, cohort, device)
    config = describe(args, cohort, init)
    defaults = vars(settle(parser.parse_args(["--mode", args.mode])))
    with contextlib.ExitStack() as until:
        on_first_rank(lambda: hold(path, args.overwrite, until))
        run = on_first_rank(lambda: Run(path, config, args.resume, defaults))
        if run.finished:
            print(f"{path}: finished already; results: {path / 'predictions_test.npz'}")
            return
        threads, now = run.config["speed"]["threads"], torch.get_num_threads()
        if threads != now:
            print(f"threads: {threads}, as when this run began, not the {now} of this start")
            until.callback(torch.set_num_threads, now)
            torch.set_num_threads(threads)
        if args.mode == "pretrain":
            task = Pretraining(args, cohort, device)
        elif args.mode == "finetune":
            task = Finetuning(args, cohort, device, start)
        else:
            task = Probing(args, cohort, device, start, plan, config["init"])
        fit(run, args, recipe, task)
        scores = {split: task.score(split) for split in task.judged}
        if rank() == 0:
            last = last_row(path)
            run.log({"step": last["step"], "epoch": last["epoch"], "run_seconds": run.seconds()})
            write_predictions(run, cohort, scores)
    summarise(run, args, cohort, scores)


# ----------------------------------------------------------------------------------------------
# Bench: every stage against what users do today, in one run
# ----------------------------------------------------------------------------------------------

BATCH_PAIRS = 512         # paper A's batch
MIMIC_PAIRS = 638_683     # of MIMIC-IV-ECG
MOVED_BYTES = 33_000      # that an eager bf16 training step moves per record and sample
BENCH_COLUMNS = ("stage", "today", "today_seconds", "here", "here_seconds", "ratio", "wanted")


def compare(stage: str, today: tuple, here: tuple, wanted: str, repeats: int, scale: float = 1.0,
            clock: Callable = time.perf_counter) -> list[str]:
    """A row of the bench: median seconds of two calls that take turns, the first turn left out.

    today, here: what it is, and a call that does it. scale: today's call is only this part of what
    is done here, so its time is multiplied.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        for (_, call), found in zip((today, here), seconds):
            began = clock()
            call()
            if torch.cuda.is_available():  # which the call only gave something to do
                torch.cuda.synchronize()
            found.append(clock() - began)
    before, now = scale * np.median(seconds[0][1:]), np.median(seconds[1][1:])
    return [stage, today[0], f"{before:.3g}", here[0], f"{now:.3g}", f"{before / now:.1f}×",
            wanted]


def bench_reading(root: Path, quick: bool) -> Iterator[list[str]]:
    """WFDB record -> 100 Hz float16: one core, the whole build, two workers."""
    import wfdb
    from scipy.signal import resample_poly
    paths, fs = [str(p)[:-4] for p in sorted(root.glob("files/**/*.hea"))], 100
    some = paths[:20 if quick else 200]

    def today() -> None:
        for path in some:
            x = np.nan_to_num(wfdb.rdsamp(path)[0].T)                    # (12, 5000) float64 mV
            resample_poly(x, 1, 5, axis=1).astype(np.float16)

    def here() -> None:
        for path in some:
            with contextlib.suppress(prepare_data.Rejected):  # a planted defect
                prepare_data.read_record(path, fs)

    def build() -> None:
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            subprocess.run([sys.executable, prepare_data.__file__, "--source", "mimic", "--root",
                            root, "--out", f"{folder}/cohort.h5", "--fs", str(fs), "--workers",
                            "1"], check=True, capture_output=True)

    def read(workers: int) -> None:
        with tempfile.TemporaryDirectory(dir=root.parent) as folder, prepare_data.workspace(
                Path(folder, "cohort.h5"), many, {"arguments": {"fs": fs}}) as work:
            prepare_data.run_workers(work, root, many, fs, workers)

    def cpu_seconds() -> float:  # of this process and of those it started
        return sum(os.times()[:4])

    many = [os.path.relpath(path, root) for path in paths] * (1 if quick else 4)
    repeats = 1 if quick else 3
    yield compare(f"read {len(some)} records, one core", ("wfdb.rdsamp + resample_poly", today),
                  ("read_record", here), "≥ 15×", 1 if quick else 5, clock=time.process_time)
    yield compare(f"build a cohort of {len(paths):,} records", ("wfdb.rdsamp + resample_poly",
                  today), ("one worker, whole process", build), "≥ 10×", repeats,
                  scale=len(paths) / len(some), clock=cpu_seconds)
    yield compare(f"read {len(many):,} records", ("one worker", lambda: read(1)),
                  ("two workers", lambda: read(2)), "≥ 1.7×", repeats)


def bench_batches(cohort: Cohort, quick: bool) -> Iterator[list[str]]:
    """A batch of 512 pairs, (1024, 12, T) float16, in random order, from the page cache."""
    rows = np.random.default_rng(0).integers(0, len(cohort), 2 * BATCH_PAIRS)
    disk, ram = (Signals(cohort, torch.device("cpu"), cache, "zscore") for cache in ("disk", "ram"))
    stage, here = f"read a batch of {BATCH_PAIRS} pairs", ("memory map", lambda: disk.read(rows))
    with prepare_data.h5py.File(cohort.path, "r") as file:
        signal = file["signal"]
        yield compare(stage, ("h5py rows", lambda: np.stack([signal[row] for row in rows])), here,
                      "≥ 5×", 1 if quick else 5)
    yield compare(stage, ("from RAM", lambda: ram.read(rows)), here, "≥ 0.83× (1.2 times RAM)",
                  1 if quick else 25)


def bench_encoder(args: Namespace, device: torch.device) -> Iterator[list[str]]:
    """The encoder forward and back: as cardiowm.py has it, laid out anew, and in bf16."""
    pairs = 8 if args.quick else 64 if device.type == "cpu" else BATCH_PAIRS
    repeats = 1 if args.quick else 7
    for samples, n in ((1000, 2 * pairs), (5000, max(4, pairs // 2))):
        x, plain = torch.randn(n, 12, samples, device=device), cardiowm.XResNet1d50().to(device)
        fast = fast_encoder(copy.deepcopy(plain))

        def step(encoder: nn.Module, low: bool) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                h = encoder(x)
            h.float().square().mean().backward()
            encoder.zero_grad()

        def move() -> None:  # what an eager step cannot do without
            block = torch.empty(2**28, dtype=torch.uint8, device=device)
            for _ in range(round(MOVED_BYTES * samples * n / (2 * len(block)))):
                block.clone()  # reads and writes it

        stage = f"encoder step, {n} records, T={samples}"
        today = "Conv1d, float32", lambda: step(plain, False)
        low = "channels_last, bf16", lambda: step(fast, True)
        yield compare(stage, today, ("channels_last, float32", lambda: step(fast, False)),
                      "≥ 1.3×", repeats)
        if has_bf16(device.type):
            yield compare(stage, today, low, "≥ 2.5×", repeats)
        if device.type == "cuda":
            yield compare(stage, ("moving its bytes", move), low, "≥ 0.5×", repeats)


def complex_sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """SIGReg as the formula is usually typed: complex exponentials over (N, S, Q)."""
    t = torch.linspace(0, 3, 17, device=z.device)
    phi = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * 3 / 16)
    weight[0] = weight[-1] = 3 / 16
    u = z @ directions                                              # (N, S)
    error = torch.exp(1j * u[..., None] * t).mean(dim=0) - phi      # (N, S, Q) -> (S, Q)
    return len(z) * (error.abs().square() * phi * weight).sum(dim=1).mean()


def bench_training(args: Namespace, cohort: Cohort, device: torch.device) -> Iterator[list[str]]:
    """SIGReg against its formula, and whole pretraining steps against the SIGReg in them; on CUDA
    the steps as a graph against the same steps launched kernel by kernel."""
    cuda = device.type == "cuda"
    batch, steps = (8, 2) if args.quick else (64, 5) if not cuda else (BATCH_PAIRS, 25)
    task = Pretraining(args, cohort, device)
    optimizer = make_optimizer(task.modules.values(), 1e-3, 5e-4)
    order = np.random.default_rng(0).integers(0, len(task.rows), (steps, batch))
    directions = task.sigreg.draw_directions(256, None, device)
    z, part = (torch.randn(n, 256, device=device, requires_grad=True) for n in (BATCH_PAIRS, batch))
    calls = [lambda: complex_sigreg(z, directions).backward(),
             lambda: task.sigreg(z, directions).backward(),
             lambda: task.sigreg(part, directions).backward()]
    if cuda:  # replays of their graphs, whose time is that of the kernels alone
        for call in calls:
            call()
        calls = [record(call)[0].replay for call in calls]
    typed, ours, in_step = calls
    repeats = 1 if args.quick else 5
    yield compare(f"SIGReg with gradient, N={BATCH_PAIRS}", ("complex exponential", typed),
                  ("SIGReg", ours), "≥ 3×" if cuda else "≥ 10×", 10 * repeats)

    def train_steps(step: Step) -> None:
        for items, loaded in prefetch(task.read, order):
            step(items, loaded, GRAD_RATIO_STEPS)  # past the steps that also compare gradients

    def sigreg_in_them() -> None:
        for _ in range(2 * steps):
            in_step()

    for samples in (1000, 5000)[:1 + cuda]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if samples == 5000:  # a step's time depends on the length alone
            task.signals.signal = torch.randn(len(cohort), 12, samples, device=device).half()
        plain, graph = (Step(task.loss_of, optimizer, None, task.draws.values()) for _ in range(2))
        plain.plain_left = math.inf
        stage = f"{steps} pretraining steps, {batch} pairs, T={samples}"
        rows = [compare(stage, ("the steps", functools.partial(train_steps, graph)),
                        ("SIGReg in them", sigreg_in_them), "≥ 50× (2 %)", repeats)]
        if cuda:
            rows.append(compare(stage, ("kernel by kernel", functools.partial(train_steps, plain)),
                                ("a CUDA graph", functools.partial(train_steps, graph)),
                                "≥ 1.1×", repeats))
        speed = order.size / float(rows[0][2])
        epochs = timedelta(seconds=round(50 * MIMIC_PAIRS / speed))
        rows[0][0] += (f" ({speed:,.0f} pairs/s; 50 epochs of {MIMIC_PAIRS:,} pairs: {epochs}"
                       + f"; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" * cuda + ")")
        yield from rows


def bench_bootstrap(quick: bool) -> Iterator[list[str]]:
    """Macro-AUROC with 1,000 replicates of 80,000 records and 76 classes."""
    n, k, replicates = (2000, 8, 50) if quick else (80_000, 76, 1000)
    rng = np.random.default_rng(0)
    y = (rng.random((n, k)) < np.geomspace(0.002, 0.25, k)).astype(np.uint8)
    score = (rng.normal(size=(n, k)) + y).astype(np.float32)
    rows = rng.integers(0, n, n)  # one replicate
    try:
        from sklearn.metrics import roc_auc_score as today
    except ImportError:
        today = auroc
    yield compare(f"AUROC and {replicates:,} bootstraps, {n:,} × {k}",
                  (f"{today.__name__} in a loop (from one replicate)",
                   lambda: today(y[rows], score[rows])),
                  ("bootstrap_auroc", lambda: evaluate.bootstrap_auroc(y, score, replicates)),
                  "≥ 150× roc_auc_score", 1 if quick else 3, scale=replicates)


def bench_augmentation(args: Namespace, device: torch.device) -> Iterator[list[str]]:
    """Paper B's 2,000,000 synthetic rows beside 721,002 real ones: making them, one probe epoch."""
    total, n = (20_000, 7210) if args.quick else SYNTHETIC_ROWS
    rng = np.random.default_rng(0)
    combinations = (rng.random((300, 76)).argsort(axis=1) < 3).astype(np.int64)  # 3 classes
    plan = (torch.from_numpy(combinations), torch.from_numpy(rng.integers(50, 13_000, 300)),
            torch.from_numpy(rng.random(n) < 0.54), None)  # as many normal rows as MIMIC has
    model, head = cardiowm.WorldModel(76).to(device), cardiowm.MLPProbe(256, 76).to(device)
    args = Namespace(**vars(args) | {"total": total, "augment": "dynamics"})
    inputs = torch.randn(n + total, 256, device=device).half()
    y = torch.zeros(n + total, 76, dtype=torch.uint8, device=device)
    loss_of = probe_loss(head, inputs, y, n, torch.ones(76, device=device))
    step = Step(loss_of, make_optimizer([head], 1e-4, 1e-2))
    order = rng.integers(0, n + total, (4 if args.quick else 40, 4096))

    def train_steps() -> None:
        for items, batch in prefetch(lambda items: (to_device(items, device),), order):
            step(items, batch, 0)

    yield compare(f"{total:,} synthetic rows beside {n:,} real",
                  ("one epoch of the MLP probe", train_steps),
                  ("making them", lambda: synthesise(args, model, plan, inputs, y)),
                  "≥ 6.7× (15 % of an epoch)", 1, scale=len(y) / order.size)


def bench(args: Namespace, parser: ArgumentParser) -> None:
    """--mode bench: print each row when it is there; write bench.md and bench.csv."""
    device, quick = join_ranks(args), settle(args).quick
    torch.manual_seed(args.seed)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    flags = " --quick (too small to mean anything)" * quick
    title = (f"python train.py --mode bench{flags}: {hardware}; torch {torch.__version__}, numpy "
             f"{np.__version__}; medians of repeats that take turns, seed {args.seed}")
    print(title, flush=True)
    rows, out, folder = [], sys.stdout, folder_of(args.run or "bench")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, \
            contextlib.redirect_stdout(io.StringIO()):  # of the stages
        root, data = Path(scratch) / "demo", Path(scratch) / "cohort.h5"
        prepare_data.write_demo(root, 40 if quick else 920, workers=prepare_data.available_cores())
        prepare_data.build("mimic", root, data, 100, root / "records_w_diag_icd10.csv")
        cohort = Cohort(data)
        for row in itertools.chain(
                bench_reading(root, quick), bench_batches(cohort, quick),
                bench_encoder(args, device), bench_training(args, cohort, device),
                bench_bootstrap(quick), bench_augmentation(args, device)):
            rows.append(row)
            print("{}: {} {} s, {} {} s: {}, wanted {}".format(*row), file=out, flush=True)
    evaluate.publish(folder, "bench", [title, "", *evaluate.markdown(BENCH_COLUMNS, rows)],
                     {"bench.csv": [BENCH_COLUMNS, *rows]})


# ----------------------------------------------------------------------------------------------
# Reproduce: both papers' matrix for one cohort, composed of this script's own commands
# ----------------------------------------------------------------------------------------------


# Of both papers, what begins from the recommended recipe, and controls: a run's name, the fractions
# at which it stands, its flags; --init and --compute-of name a run before it. Probes of one
# pretraining share its embeddings, so they stand one after the other.
MLP = "--mode probe --head mlp"
STUDY = f"""
pretrain-dynamics       | 1 0.1 0.01| --mode pretrain
probe-dynamics          | 1 0.1 0.01| --mode probe --init pretrain-dynamics
mlp-z                   | 1 0.1     | {MLP} --init pretrain-dynamics
mlp-h                   | 1         | {MLP} --features h --init pretrain-dynamics
mlp-full-weights        | 1         | {MLP} --class-weight full --init pretrain-dynamics
mlp-dynamics            | 1 0.1     | {MLP} --augment dynamics --init pretrain-dynamics
mlp-smote               | 1         | {MLP} --augment smote --init pretrain-dynamics
mlp-oversample          | 1         | {MLP} --augment oversample --init pretrain-dynamics
finetune-dynamics       | 1 0.1 0.01| --mode finetune --init pretrain-dynamics
supervised-compute      | 1 0.1 0.01| --mode finetune --init scratch --compute-of finetune-dynamics
supervised              | 1 0.1 0.01| --mode finetune --init scratch
probe-untrained         | 1 0.1 0.01| --mode probe --init random
probe-untrained-draw1   | 1 0.1 0.01| --mode probe --init random:1
probe-untrained-draw2   | 1 0.1 0.01| --mode probe --init random:2
pretrain-recommended    | 1 0.1     | --mode pretrain --recipe recommended
probe-recommended       | 1 0.1     | --mode probe --init pretrain-recommended
mlp-recommended         | 1 0.1     | {MLP} --init pretrain-recommended
mlp-recommended-dynamics| 1 0.1     | {MLP} --augment dynamics --init pretrain-recommended
finetune-recommended    | 1 0.1     | --mode finetune --init pretrain-recommended
pretrain-invariance     | 1         | --mode pretrain --objective invariance
probe-invariance        | 1         | --mode probe --init pretrain-invariance
finetune-invariance     | 1         | --mode finetune --init pretrain-invariance
pretrain-vicreg         | 1         | --mode pretrain --reg vicreg
probe-vicreg            | 1         | --mode probe --init pretrain-vicreg
finetune-vicreg         | 1         | --mode finetune --init pretrain-vicreg
pretrain-state          | 1         | --mode pretrain --action state
mlp-state               | 1         | {MLP} --augment dynamics --init pretrain-state
"""


def study_runs(args: Namespace, cohort: Cohort, folder: Path) -> dict[str, list[str]]:
    """Name and command line of every run of a study, in order; all lie under `folder`."""
    rare = ["--min-count", str(args.min_count)] + ["--total", str(args.total)] * bool(args.total)
    shared = ["--data", str(cohort.path), "--device", args.device, "--cache", args.cache,
              "--checkpoint-minutes", f"{args.checkpoint_minutes:g}", "--resume"]
    for name in ("paper", "quick", "labelled_only", "deterministic"):
        shared += [flag_of(name)] * getattr(args, name)
    draws, runs = -(-UNTRAINED_DRAWS // len(args.seed)), {}
    matrix = [map(str.strip, line.split("|")) for line in STUDY.strip().splitlines()]
    for seed, frac, (name, fracs, flags) in itertools.product(
            args.seed, ("1", "0.1", "0.01"), map(tuple, matrix)):
        if frac not in fracs.split() or int(name.partition("-draw")[2] or 0) >= draws \
                or (name.endswith("-state") and cohort.state is None):
            continue
        at = f"-frac{frac}" * (frac != "1") + f"-seed{seed}" * (seed > 0)
        words = [str(folder / (word + at)) if word.startswith(("pretrain-", "finetune-")) else word
                 for word in flags.split()] + rare * ("--augment" in flags)
        words += ["--frac", frac] * (frac != "1") + ["--seed", str(seed)] * (seed > 0)
        runs[name + at] = [*words, "--run", str(folder / (name + at)), *shared]
    return runs


def plan_study(runs: dict[str, list[str]], parser: ArgumentParser, cohort: Cohort,
               device: torch.device) -> dict[str, dict]:
    """What study.json says of each run before it is done.

    `work` is what `time_left` goes by: records sent through the encoder, or rows through a probe's
    head, at most.
    """
    plan: dict[str, dict] = {}
    for name, argv in runs.items():
        args = parser.parse_args(argv)
        check_arguments(args, parser)
        n = training_items(settle(args), cohort)[3]
        unit = "pairs" if args.mode == "pretrain" else "records"
        start = Path(args.compute_of or args.init or "").name
        start, passes, init = start if start in runs else None, None, None
        if args.compute_of:
            passes = plan[start]["work"] + plan[plan[start]["start"]]["work"]
        elif start:
            init = {"args": vars(settle(parser.parse_args(runs[start]))),
                    "cohort": {"name": cohort.name, "sha256": cohort.sha256}}
        resolve(args, cohort, device, max(n, 1), passes)
        if args.head == "mlp":
            n, unit = n + (0 if args.augment == "none" else synthetic_rows(args, n)), "rows"
        plan[name] = {
            "command": ["python", "train.py", *argv], "mode": args.mode,
            "method": evaluate.method(vars(args), init), "frac": args.frac,
            "seed": args.seed, "start": start, "seconds": None, "reason": "not reached",
            "what": f"{n:,} {unit}, " + "at most " * bool(args.patience) + f"{args.epochs} epochs",
            "kind": args.head if args.mode == "probe" else "encoder",
            "work": n * args.epochs * (2 if args.mode == "pretrain" else 1)}
    return plan


def time_left(done: list[dict], rest: list[dict]) -> float | None:
    """Seconds for the rest, at the speed of the runs done; None where that is unknown."""
    left = 0.0
    for run in rest:
        same = [other for other in done if other["kind"] == run["kind"] and other["seconds"]]
        if not same:
            return None
        speed = sum(other["seconds"] for other in same) / sum(other["work"] for other in same)
        left += speed * run["work"]
    return left


def reproduce(args: Namespace, parser: ArgumentParser) -> None:
    """--mode reproduce: one study in a folder of its own."""
    device, began = join_ranks(args), time.monotonic()
    cohort = open_cohort(args.data)
    args.paper |= device.type == "cuda" and not args.quick
    study = {"cohort": cohort.sha256} | {name: getattr(args, name) for name in (
        "paper", "quick", "labelled_only", "min_count", "total", "deterministic")}
    changed = [flag_of(name)[1:] for name in ("paper", "quick", "labelled_only") if study[name]]
    folder = folder_of(args.run or f"{cohort.name}-reproduce{''.join(changed)}")
    refuse([((folder / "config.json").exists(),
             f"--run {folder}: found a training run there; choose another --run")])
    with locked(folder, f"{folder}: another process works in that folder; wait until it ends, or "
                "choose another --run"):
        old = study | {"runs": {}}
        if (folder / "study.json").exists():
            old = read_json(folder / "study.json", {"runs": {"*": {"frac": evaluate.NUMBER}}})[0]
        refuse([(old.get(name) != value, f"--run {folder}: holds a study with {name} = "
                 f"{old.get(name)}, asked for {value}; choose another --run")
                for name, value in study.items()])
        run_study(args, parser, cohort, device, folder, old)
        study_report(args, cohort, folder)
    runs, took = old["runs"], timedelta(seconds=round(time.monotonic() - began))
    failed = [f"  {name}: {run['reason']}" for name, run in runs.items() if run["reason"]]
    print(f"\n{folder}: {len(runs) - len(failed)} of {len(runs)} runs complete, in {took}; report: "
          f"{folder / 'report' / 'report.md'}", *failed, sep="\n")


def run_study(args: Namespace, parser: ArgumentParser, cohort: Cohort,
              device: torch.device, folder: Path, study: dict) -> None:
    """Plan, then every run that is not yet complete; study.json keeps what became of them."""
    commands, runs = study_runs(args, cohort, folder), study["runs"]
    print(f"{cohort_lines(cohort, device)}\nstudy {folder}: {len(commands)} runs, seeds "
          f"{' '.join(map(str, args.seed))}")
    for name, entry in plan_study(commands, parser, cohort, device).items():
        entry["seconds"] = runs.get(name, {}).get("seconds")
        entry["reason"] = "" if is_finished(folder / name) else entry["reason"]
        runs[name] = entry
        print(f"  {name:<32} {'' if entry['reason'] else 'complete':>10}  {entry['what']}")
    for i, (name, argv) in enumerate(commands.items()):
        entry = runs[name]
        planned = [runs[each] for each in commands]
        left = time_left([run for run in planned if not run["reason"]],
                         [run for run in planned[i:] if run["reason"]])
        print(f"\nrun {i + 1} of {len(commands)}: {name}"
              + ("" if left is None else f"; about {timedelta(seconds=round(left))} left")
              + f"\n  python train.py {shlex.join(argv)}", flush=True)
        # what starts from a run that could not be done cannot be done for the same reason
        entry["reason"] = runs[entry["start"]]["reason"] if entry["start"] else ""
        if not entry["reason"]:
            try:
                train(parser.parse_args(argv), parser)
                entry["seconds"] = last_row(folder / name).get("run_seconds")
            except (InputError, torch.OutOfMemoryError) as error:
                if isinstance(error.__cause__, OSError):  # a full disk: the next run fails as well
                    raise
                entry["reason"] = str(error).splitlines()[0]
        if entry["reason"]:
            print(f"not done: {entry['reason']}")
        replace_file(folder / "study.json", json.dumps(study, indent=1).encode())


def report_pages(args: Namespace, cohort: Cohort, folder: Path) -> list[tuple]:
    """(mode of evaluate.py, its flags) of every page of a study's report, in order."""
    models = {kind: [str(path) for seed in args.seed if is_finished(
        path := folder / (f"pretrain-{kind}" + f"-seed{seed}" * bool(seed)))]
        for kind in ("dynamics", "state", "recommended")}
    test = cohort.split == 2
    begins = (cohort.action == 1)[test[cohort.pair[:, 0]]].sum(axis=0)
    begins[np.isin(cohort.class_name, cohort.normal_codes)] = 0
    onset = int(begins.argmax())  # the class that begins most often among the test pairs
    asked = ["--onset", cohort.class_name[onset]]
    pages = [("score", ["--runs", str(folder), *["--labelled-only"] * args.labelled_only])]
    if models["dynamics"]:
        pages.append(("worldmodel", ["--runs", str(folder)]))  # all its pretrainings and seeds
        if cohort.state is not None:
            pages.append(("counterfactual", ["--runs", *itertools.chain(*models.values())]))
        patients = np.flatnonzero(test & (cohort.label[:, onset] == 0) & cohort.has_label
                                  & (cohort.quality == 0) & begins.any())
        one = ["--runs", models["dynamics"][0]]
        pages += [("counterfactual", [*one, "--study-id", str(cohort.study_id[row]), *asked])
                  for row in patients[:1]]
        pages.append(("embedding", one))
    return pages + [("transitions", asked)] * bool(begins.any()) + [("cohort", [])]


def study_report(args: Namespace, cohort: Cohort, folder: Path) -> None:
    """Every table and figure of evaluate.py for a study, and report.md, which holds them all."""
    report = folder / "report"
    report.mkdir(exist_ok=True)
    text = [f"# Study of {'SYNTHETIC' if cohort.synthetic else 'real'} cohort {cohort.name}\n"]
    for i, (mode, flags) in enumerate(report_pages(args, cohort, folder), 1):
        out = report / f"{i}-{mode}"
        argv = ["--mode", mode, *flags, "--data", str(cohort.path), "--out", str(out)]
        command = f"python evaluate.py {shlex.join(argv)}"
        print(f"\n{command}", flush=True)
        shutil.rmtree(out, ignore_errors=True)  # of an earlier report, made anew
        code = evaluate.main(argv)
        if code in (130, 143):
            raise KeyboardInterrupt if code == 130 else prepare_data.Stopped(signal.SIGTERM)
        if code != 0:
            text.append(f"`{command}` was not done: see its message.\n")
        pages = "".join(page.read_text(encoding="utf-8") for page in sorted(out.glob("*.md")))
        pictures = [f"![]({picture.name})\n" for picture in sorted(out.glob("*.png"))
                    if f"({picture.name})" not in pages]
        text.append("\n".join([pages, *pictures]).replace("![](", f"![]({out.name}/"))
    replace_file(report / "report.md", "\n".join(text).encode())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code of `run_script`."""
    parser = build_parser()
    args = parser.parse_args(argv)

    def work() -> None:
        try:
            check_arguments(args, parser)
            if args.compile:
                print("note: --compile has no effect any more: on a GPU, a step is a CUDA graph")
            {"bench": bench, "reproduce": reproduce}.get(args.mode, train)(args, parser)
        except InputError as error:
            raise InputError(f"rank {rank()}: {error}" if rank() else str(error)) from error

    try:
        return prepare_data.run_script(
            work, "interrupted; the same command" + " without --overwrite" * args.overwrite
            + " goes on from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
