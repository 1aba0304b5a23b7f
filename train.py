"""Train cardiac world models: pretrain, then finetune or probe. One command, one run folder.

    python train.py --mode pretrain --frac 0.1          # world model (and the demo cohort)
    python train.py --mode probe --frac 0.1             # paper A: linear probe on frozen h
    python train.py --mode probe --frac 0.1 --head mlp  # paper B: MLP probe on frozen z
    python train.py --mode finetune --frac 0.1          # paper A: finetuning
    python train.py --mode finetune --frac 0.1 --init scratch       # supervised baseline
    python train.py --mode pretrain --frac 0.1 --objective invariance   # naive patient invariance
    python train.py --mode pretrain --frac 0.1 --reg vicreg             # VICReg ablation
    python train.py --mode reproduce --quick            # both papers' whole matrix, and a report
    python train.py --mode bench                        # how fast each stage is here
    torchrun --nproc_per_node=8 -- train.py --mode pretrain     # on eight GPUs

Every run writes runs/NAME/{config.json, log.jsonl, last.pt, best.pt, predictions_{val,test}.npz};
evaluate.py turns those into tables. Defaults are the papers'; on a CPU or a synthetic cohort
epochs, batch size and rate take a laptop preset, which is printed (--paper keeps the papers').
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import functools
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import cardiowm
import evaluate
import prepare_data
from evaluate import CHECKPOINT_FORMAT, auroc, find_run, load_checkpoint, macro_auroc
from prepare_data import Cohort, InputError, Progress, replace_file

DEFAULT_DATA = Path("data/cohort.h5")
MIN_PAIRS = 64            # SIGReg tests a distribution: on fewer embeddings it says little
SYNTHETIC_WEIGHT = 0.3    # paper B: weight of a synthetic row in the probe's loss
SYNTHETIC_ROWS = 2_000_000, 721_002   # paper B: synthetic rows beside real rows
PATIENCE = 50             # paper B: epochs without a better validation macro-AUROC
EMBED_BATCH = 256         # records per batch where nothing is learned
SYNTHESIS_BATCH = 2048    # synthetic rows per batch: few enough to stay in a CPU's cache
RECALIBRATE_BATCHES = 10  # batches from which batch norm's statistics are taken before validation
MIN_STEPS = {"laptop": 40, "quick": 20}  # a small cohort gets more epochs until it has these
GRAD_RATIO_STEPS = 4      # first steps on which |grad pred| / |grad reg| is logged

# The papers' settings by recipe. `laptop` and `quick` replace (epochs, batch size, lr): the papers'
# 1e-4 end to end leaves a few hundred steps near chance.
RECIPES = {
    "pretrain": dict(epochs=50, batch_size=512, lr=1e-3, weight_decay=5e-4, schedule="cosine",
                     warmup=0.05, final_lr=1e-5, laptop=(8, 64, 1e-3), quick=(2, 64, 1e-3)),
    "finetune": dict(epochs=30, batch_size=256, lr=1e-4, weight_decay=1e-4, schedule="onecycle",
                     clip=1.0, laptop=(8, 32, 1e-3), quick=(1, 32, 1e-3)),
    "supervised": dict(epochs=20, batch_size=512, lr=1e-4, weight_decay=1e-4, schedule="onecycle",
                       clip=1.0, laptop=(8, 32, 1e-3), quick=(1, 32, 1e-3)),
    "linear": dict(epochs=20, batch_size=1024, lr=1e-3, weight_decay=1e-4, schedule="constant",
                   laptop=(60, 128, 1e-3), quick=(10, 128, 1e-3)),
    "mlp": dict(epochs=5000, batch_size=4096, lr=1e-4, weight_decay=1e-2, schedule="cosine",
                laptop=(400, 256, 1e-4), quick=(20, 256, 1e-4)),
}

# ----------------------------------------------------------------------------------------------
# Configuration: which recipe, which run folder, what is stored before step 0
# ----------------------------------------------------------------------------------------------

# flags that say where or how a run executes, not what it computes: in no run name, free to differ
HOW_FLAGS = {"data", "cache", "run", "device", "resume", "overwrite", "checkpoint_minutes"}
# flags with a meaning in some modes only; given elsewhere they are refused, not ignored
MODE_FLAGS = {
    "pretrain": {"pairs", "objective", "action", "residual", "z_dim", "reg", "lam", "slices",
                 "allow_tiny", "normalize"},
    "finetune": {"init", "normalize"},
    "probe": {"init", "head", "features", "augment", "class_weight", "min_count", "total"},
}
# modes that compose runs of their own take these flags only
OWN_FLAGS = {
    "bench": {"run", "seed", "device", "compile", "quick"},
    "reproduce": {"data", "cache", "labelled_only", "min_count", "total", "paper", "quick", "run",
                  "seed", "device", "compile", "deterministic", "resume", "checkpoint_minutes"},
}


def recipe_name(args: argparse.Namespace) -> str:
    """Which row of RECIPES the arguments ask for."""
    if args.mode == "probe":
        return args.head
    return "supervised" if args.mode == "finetune" and args.init == "scratch" else args.mode


def check_ranges(args: argparse.Namespace, seeds: list[int]) -> None:
    """Raises InputError where a number is out of range."""
    ranges = {  # name: (lowest, highest) allowed
        "frac": (1e-9, 1.0), "lam": (0.0, 1.0), "slices": (1, 1_000_000), "z_dim": (2, 65_536),
        "epochs": (1, 1_000_000), "batch_size": (2, 10_000_000), "lr": (1e-12, 100.0),
        "min_count": (1, 10**9), "total": (1, 10**9),
        "checkpoint_minutes": (0.0, 1e6)}
    found = [(name, getattr(args, name), *ranges[name]) for name in ranges]
    for name, value, low, high in found + [("seed", seed, 0, 2**31 - 1) for seed in seeds]:
        if value is not None and not low <= value <= high:  # NaN fails as well
            wanted = "a fraction of the training patients, 0 < frac <= 1" if name == "frac" else \
                f"{low:,} to {high:,}"
            raise InputError(f"--{name.replace('_', '-')}: found {value}, wanted {wanted}")


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises InputError where a flag is out of range, or means nothing in this mode."""
    seeds = args.seed if isinstance(args.seed, list) else [args.seed]
    if len(set(seeds)) < len(seeds) or (len(seeds) > 1 and args.mode != "reproduce"):
        raise InputError(f"--seed: found {' '.join(map(str, seeds))}, wanted one seed (--mode "
                         "reproduce takes several, each once)")
    args.seed = seeds if args.mode == "reproduce" else seeds[0]
    for one, other in (("paper", "quick"), ("resume", "overwrite")):
        if getattr(args, one) and getattr(args, other):
            raise InputError(f"--{one} and --{other} exclude each other: give one")
    check_ranges(args, seeds)
    if args.mode in OWN_FLAGS:
        for name in sorted(vars(args).keys() - OWN_FLAGS[args.mode] - {"mode", "seed"}):
            if getattr(args, name) != parser.get_default(name):
                flags = " ".join("--" + n.replace("_", "-") for n in sorted(OWN_FLAGS[args.mode]))
                raise InputError(f"--{name.replace('_', '-')}: means nothing in --mode {args.mode},"
                                 f" which sets it by itself; it takes {flags}")
        return
    everywhere = set.union(*MODE_FLAGS.values())
    for name in sorted(everywhere - MODE_FLAGS[args.mode]):
        if getattr(args, name) != parser.get_default(name):
            modes = " or ".join(m for m, flags in MODE_FLAGS.items() if name in flags)
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: means nothing in --mode {args.mode}; it belongs to --mode "
                             f"{modes}")
    if args.objective == "invariance" and args.action != "coded":
        raise InputError(f"--action {args.action}: the invariance objective takes no action; leave "
                         "--action out, or use --objective dynamics")
    idle = [("reg", "sigreg", ("lam", "slices")), ("augment", None, ("min_count", "total"))]
    for owner, wanted, names in idle:
        value = getattr(args, owner)
        on = value == wanted if wanted else value != "none"
        for name in names:
            if not on and getattr(args, name) != parser.get_default(name):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: means nothing with --{owner} {value}; leave it out")
    if args.compile and args.mode == "probe":
        raise InputError("--compile: a probe trains no encoder; leave it out")
    if args.head == "linear" and (args.augment != "none" or args.class_weight is not None):
        raise InputError("--augment and --class-weight belong to paper B's probe: add --head mlp")
    if args.augment == "dynamics" and args.features == "h":
        raise InputError("--augment dynamics: the predictor works in z; leave --features out")
    if args.mode == "finetune" and args.init == "random":
        raise InputError("--init random: a finetuned untrained encoder is the supervised baseline: "
                         "give --init scratch")
    if args.mode == "probe" and args.init == "scratch":
        raise InputError("--init scratch: a probe needs a frozen encoder: give a pretraining run, "
                         "or --init random for an untrained one")


def resolve(args: argparse.Namespace, cohort: Cohort, device: torch.device, n: int) -> dict:
    """Fill what was left unset from the recipe, for n training items; returns the recipe."""
    recipe = dict(RECIPES[recipe_name(args)])
    laptop = not args.paper and (cohort.synthetic or device.type == "cpu")
    preset = "quick" if args.quick else "laptop" if laptop else "paper"
    if preset != "paper":
        epochs, batch_size, recipe["lr"] = recipe[preset]
        per_epoch = max(1, n // min(args.batch_size or batch_size, n))
        recipe["epochs"] = max(epochs, math.ceil(MIN_STEPS[preset] / per_epoch))
        recipe["batch_size"] = batch_size
    cause = "synthetic cohort" if cohort.synthetic else "CPU"
    why = {"quick": "--quick", "paper": "the papers' settings",
           "laptop": f"{cause}; --paper for the papers'"}[preset]
    for name in ("epochs", "batch_size", "lr", "schedule"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    print(f"preset: {preset} ({why}): {args.epochs} epochs, batch size {args.batch_size}, "
          f"lr {args.lr:g}, {args.schedule}")
    args.preset, args.device = preset, str(device)
    return recipe


def run_name(args: argparse.Namespace, parser: argparse.ArgumentParser, stem: str) -> str:
    """<cohort stem>-<mode> and every flag that differs from its default, in the parser's order."""
    parts = [stem, args.mode]
    for action in parser._actions:
        name = action.dest
        value = getattr(args, name, None)
        if name in HOW_FLAGS | {"mode", "help", "preset"} or value == action.default:
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if name == "init":
            text = Path(text).name.removeprefix(stem + "-")
        flag = name.replace("_", "-")
        parts.append(flag if value is True else flag + text)
    return "-".join(parts)


def git_commit(folder: Path) -> str | None:
    """The commit checked out in the folder; None without git, or outside a repository."""
    try:
        git = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True,
                             text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def describe(args: argparse.Namespace, cohort: Cohort, rows: np.ndarray, pairs: np.ndarray,
             init: Path | None) -> dict:
    """The content of config.json: arguments, versions, code, cohort, and the run it starts from."""
    here = Path(__file__).resolve().parent
    files = ("cardiowm.py", "prepare_data.py", "train.py", "evaluate.py")
    return {
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "speed": {"ranks": world_size(), "threads": torch.get_num_threads(),
                  "bf16": has_bf16(args.device.split(":")[0])},
        "git": git_commit(here),
        "sha256": {f: prepare_data.sha256_of(here / f) for f in files},
        "cohort": {"name": cohort.name, "path": str(cohort.path), "source": cohort.source,
                   "synthetic": bool(cohort.synthetic), "sha256": cohort.sha256,
                   "fs": int(cohort.fs), "records": len(cohort.label),
                   "patients": len(np.unique(cohort.subject_id)),
                   "classes": len(cohort.class_name),
                   "frac_patients": len(np.unique(cohort.subject_id[rows])),
                   "frac_records": len(rows), "frac_pairs": len(pairs)},
        "init": None if init is None else {
            "run": init.name, "sha256": prepare_data.sha256_of(init / "last.pt"),
            **{key: json.loads((init / "config.json").read_text())[key]
               for key in ("args", "cohort")}},
    }


def default_pretraining(stem: str, args: argparse.Namespace) -> str:
    """Name of the pretraining that probes and finetunings of this fraction and seed start from."""
    return f"{stem}-pretrain" + (f"-frac{args.frac:g}" if args.frac != 1 else "") \
        + (f"-seed{args.seed}" if args.seed else "")


class Diverged(RuntimeError):
    """A loss that is no longer finite."""


class Run:
    """A run folder: its life cycle (new, unfinished, finished), its log and its checkpoints."""

    def __init__(self, path: Path, config: dict, resume: bool, overwrite: bool):
        """Decides what happens to `path`; raises InputError where nothing may be overwritten."""
        self.path, self.config, self.state, self.printed_at = path, config, None, 0.0
        if path.exists() and not path.is_dir():
            raise InputError(f"--run {path}: found a file; wanted: the name of a run folder")
        is_run = (path / "config.json").exists()
        if path.exists() and any(path.iterdir()) and not is_run:
            raise InputError(f"{path}: found a folder that is no run (no config.json); choose "
                             "another --run")
        if is_run and overwrite:
            n = 1
            while (aside := path.with_name(f"{path.name}.old-{n}")).exists():
                n += 1
            path.rename(aside)
            is_run = False
            print(f"--overwrite: {path} moved aside to {aside}")
        self.finished = (path / "predictions_test.npz").exists()
        if is_run:
            self._check_same(json.loads((path / "config.json").read_text()))
            if self.finished and not resume:
                raise InputError(f"{path}: this run is finished; score it with `python evaluate.py "
                                 f"--mode score --runs {path}`, or start anew with --overwrite")
        if self.finished:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--run {path}: {error.strerror}; name a folder that can be made") \
                from None
        if (path / "last.pt").exists():
            self.state = load_checkpoint(path / "last.pt")
            print(f"RESUMING {path} at step {self.state['step']} (epoch {self.state['epoch']}): "
                  "found unfinished, same configuration, same cohort")
        elif is_run:
            print(f"{path}: found unfinished, without a checkpoint; starting at step 0")
        elif resume:
            print(f"--resume: nothing to resume in {path}; starting at step 0")
        replace_file(path / "config.json", json.dumps(config, indent=2).encode())
        # only the rows that the checkpoint has seen stay in the log: no step is logged twice
        log = path / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        self.log_rows = self.state["log_rows"] if self.state else 0
        replace_file(log, "".join(lines[:self.log_rows]).encode())

    def _check_same(self, old: dict) -> None:
        def content(config):
            found = {k: v for k, v in config["args"].items() if k not in HOW_FLAGS}
            init = config["init"] or {"run": None, "sha256": None}
            return found | {"cohort": config["cohort"]["sha256"][:12], "init": init["run"],
                            "the weights of init": init["sha256"]}
        was, now = content(old), content(self.config)
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                raise InputError(
                    f"{self.path}: holds a run with {key} = {was.get(key)}, asked for "
                    f"{now.get(key)}; choose another --run, or move the old one aside with "
                    "--overwrite")
        if old["sha256"] != self.config["sha256"]:
            changed = [f for f, s in self.config["sha256"].items() if old["sha256"].get(f) != s]
            print(f"note: {', '.join(changed)} changed since this run began")

    def log(self, row: dict) -> None:
        """Append a row to log.jsonl (NaN as null); print it, training rows once a second."""
        if rank() > 0:
            return
        row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.log_rows += 1
        if any(k.startswith("val_") for k in row) or time.monotonic() - self.printed_at > 1:
            self.printed_at = time.monotonic()
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items()), flush=True)

    def save(self, name: str, checkpoint: dict) -> None:
        """Write a checkpoint: temporary name, fsync, rename. A killed run keeps the old one."""
        if rank() > 0:
            return
        temporary = self.path / (name + ".tmp")
        with open(temporary, "wb") as f:
            torch.save(checkpoint | {"log_rows": self.log_rows}, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.path / name)


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
    unlabelled = int((keep & ~cohort.has_label).sum())
    print(f"training: {len(chosen)} of {len(patients)} patients, {int(keep.sum())} records, of "
          f"which {unlabelled} unlabelled "
          f"({'left out' if labelled_only else 'kept as all-zero labels'})")
    return np.flatnonzero(keep & (cohort.has_label | (not labelled_only)))


def select_pairs(cohort: Cohort, rows: np.ndarray, kinds: str, labelled_only: bool) -> np.ndarray:
    """Indices of the pairs whose two records are both in `rows` and of the kind asked for."""
    keep = np.isin(cohort.pair[:, 0], rows) & np.isin(cohort.pair[:, 1], rows)
    if kinds == "labelled" or labelled_only:
        keep &= cohort.pair_kind != 2
    if kinds == "between":
        keep &= cohort.pair_kind == 1
    return np.flatnonzero(keep)


def epoch_order(n: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Full batches of a permutation that depends on (seed, epoch) alone: (steps, batch_size)."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[:n // batch_size * batch_size].reshape(-1, batch_size)


class Signals:
    """Batches of normalised ECGs by row, from a memory map, RAM or the device itself."""

    def __init__(self, cohort: Cohort, device: torch.device, cache: str, how: str):
        self.device, self.how = device, how
        size = cohort.signal.nbytes
        if isinstance(cohort.signal, Tensor):  # a random cohort, made on the device
            cache = "gpu"
        elif cache == "auto":
            ram = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") \
                if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}) else 0  # not on macOS
            ram /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process holds its own
            gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            cache = "gpu" if size < 0.7 * gpu else "ram" if size < 0.4 * ram else "disk"
        print(f"signals: {len(cohort.signal)} records, {size / 1e9:.2f} GB, held in {cache}")
        self.signal = cohort.signal
        if cache == "ram":
            self.signal = np.array(cohort.signal)
        elif cache == "gpu" and not isinstance(self.signal, Tensor):
            self.signal = torch.empty(cohort.signal.shape, dtype=torch.float16, device=device)
            for i in range(0, len(cohort), 4096):  # no second copy in RAM
                self.signal[i:i + 4096] = torch.from_numpy(np.array(cohort.signal[i:i + 4096]))

    def read(self, rows: np.ndarray) -> Tensor:
        """(B,) rows -> (B, 12, T) float16 mV on the device, wherever they are held; thread-safe."""
        if isinstance(self.signal, Tensor):
            return self.signal[to_device(rows, self.device)]
        return to_device(self.signal[rows], self.device)  # half the bytes of float32 on the way

    def ready(self, x: Tensor) -> Tensor:
        """float16 mV -> model input, float32 (B, 12, T)."""
        return cardiowm.normalize(x) if self.how == "zscore" else x.float()

    def batches(self, rows: np.ndarray, batch_size: int = EMBED_BATCH) -> Iterator[Tensor]:
        """All `rows` in order, ready for the model."""
        chunks = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        return (self.ready(x) for _, x in prefetch(self.read, chunks))


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory, so that neither the CPU nor the GPU waits for it."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def prefetch(read: Callable, items: Iterable) -> Iterator[tuple]:
    """Yields (item, read(item)); a thread reads the next item while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for item in items:
            job = item, pool.submit(read, item)
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = job
        if ahead is not None:
            yield ahead[0], ahead[1].result()


# ----------------------------------------------------------------------------------------------
# Speed: cardiowm.py's encoder laid out as the hardware likes it, same weights, same mathematics
# ----------------------------------------------------------------------------------------------


class _Conv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:  # (B, C, 1, T)
        # (C_out, C_in, 1, k); flattened on the way, the gradient has the parameter's own strides
        weight = self.weight.flatten(1).view(*self.weight.shape[:2], 1, -1)
        return F.conv2d(x, weight, None, (1, *self.stride), (0, *self.padding))


class _BatchNorm(nn.BatchNorm1d):
    def _check_input_dim(self, x: Tensor) -> None:
        """Statistics over all but the channel dimension: 4-D input is as good as 3-D."""


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


FAST = {nn.Conv1d: _Conv, nn.BatchNorm1d: _BatchNorm, nn.AvgPool1d: _AvgPool,
        nn.MaxPool1d: _MaxPool, cardiowm.XResNet1d50: _Encoder}


def fast_encoder(encoder: cardiowm.XResNet1d50) -> cardiowm.XResNet1d50:
    """Make an encoder run as 2-D convolutions in channels_last order, in place; returns it.

    Each module only changes its class, so parameters and state_dict stay what cardiowm.py made
    them: plain Conv1d keys and shapes. Outputs agree within float32 rounding.
    """
    for module in encoder.modules():
        module.__class__ = FAST.get(type(module), type(module))
    return encoder


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


def join_ranks(device: torch.device) -> None:
    """Meet the other processes that torchrun started, if it did: NCCL on CUDA, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    norms = "over all ranks (SyncBatchNorm)" if device.type == "cuda" else \
        "of each rank by itself (torch has SyncBatchNorm on CUDA only)"
    print(f"torchrun: {world_size()} ranks, {dist.get_backend()}; batch norm takes the statistics "
          f"{norms}")


def on_first_rank(make: Callable):
    """The result of make(), called on rank 0 alone and sent to all; so is an InputError."""
    if world_size() == 1:
        return make()
    sent = [None, None]
    if rank() == 0:
        try:
            sent[0] = make()
        except InputError as error:
            sent[1] = str(error)
    dist.broadcast_object_list(sent, src=0)
    if sent[1] is not None:
        raise InputError(sent[1])
    return sent[0]


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return average(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # DDP averages the ranks' gradients afterwards: together, the gradient of the global loss
        return average(grad)


def average(x: Tensor) -> Tensor:
    """Mean over ranks, without gradient."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def mean_over_ranks() -> Callable | None:
    """What SIGReg and VICReg take to see the global batch; None for one process."""
    if world_size() == 1:
        return None
    mean = functools.partial(_MeanOverRanks.apply)
    mean.world_size = world_size()
    return mean


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, or its DDP twin that averages gradients over ranks (same parameters)."""
    if world_size() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids)


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch norm over the global batch where torch can: on CUDA, with several ranks."""
    if world_size() == 1 or device.type != "cuda":
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def share(rows: np.ndarray) -> np.ndarray:
    """This rank's part of (n,) rows: ceil(n / ranks) of them, at the end filled up from the top."""
    size = -(-len(rows) // world_size())
    return np.resize(rows, size * world_size())[rank() * size:(rank() + 1) * size]


def gather(x: Tensor, n: int | None = None) -> Tensor:
    """Concatenate the ranks' (m, ...) tensors; n cuts what `share` filled up."""
    if world_size() > 1:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        x = torch.cat(parts)
    return x[:n]


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


@torch.no_grad()
def recalibrate(modules: Iterable[nn.Module], forward: Callable, batches: Iterable) -> None:
    """Set batch norm's running statistics to the plain average over `batches` of training data.

    After few steps the moving average still remembers the initial weights (z std 0.49 in eval
    mode). Training itself never reads these statistics.
    """
    norms = [m for module in modules for m in module.modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for module in modules:
        module.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative average
    for batch in batches:
        forward(batch)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None = None) -> None:
    """One step down the gradient, whose norm is cut to `clip`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()


def global_batch(args: argparse.Namespace, n: int) -> int:
    """Items of one step over all ranks: min(--batch-size, n), cut to a multiple of the ranks."""
    size = min(args.batch_size, n)
    return size - size % world_size()


def check_finite(unchecked: list[tuple], records_of: Callable) -> None:
    """Raise for the first step whose loss is not finite, else empty the list.

    Called before anything is logged or stored, not at each step: that would make a GPU wait.
    """
    losses = torch.stack([terms["minimised"] for _, _, terms in unchecked])
    for bad in (~torch.isfinite(losses)).nonzero()[:1, 0].tolist():
        step, items, terms = unchecked[bad]
        found = {k: v.item() for k, v in terms.items()}
        raise Diverged(f"step {step}: loss is {found.pop('minimised')}; terms {found}; record "
                           f"rows {sorted(set(records_of(items).ravel().tolist()))}")
    unchecked.clear()


def fit(run: Run, args: argparse.Namespace, recipe: dict, modules: dict[str, nn.Module],
        header: dict, n: int, read: Callable, loss_of: Callable, validate: Callable,
        better: tuple[str, int], records_of: Callable, patience: int | None = None) -> None:
    """Config -> batches -> loss -> step -> log -> validation -> checkpoint, until done.

    Args:    modules     what is trained and stored, by name; "model" is the one users load
             header      model_args, class_name, leads, ...: what a checkpoint holds besides weights
             n           training items; a batch is `args.batch_size` of them, the remainder dropped
             read        (B,) items -> batch on the host, in a thread
             loss_of     (items, batch, step) -> (scalar to minimise, terms to log: scalars, or
                         functions that give one, called for logged steps only); of this rank
             validate    () -> dict of val_ numbers; better = (key, sign): sign * value is maximised
             records_of  (B,) items -> record rows, to name what made a loss non-finite
    """
    batch_size = global_batch(args, n)
    mine = slice(rank() * batch_size // world_size(), (rank() + 1) * batch_size // world_size())
    per_epoch = n // batch_size
    total = per_epoch * args.epochs
    log_every = max(1, min(total // 100, per_epoch))
    optimizer = make_optimizer(modules.values(), args.lr, recipe["weight_decay"])
    schedule = make_schedule(optimizer, args.schedule, args.lr, total, recipe.get("warmup", 0.0),
                             recipe.get("final_lr", 0.0))
    stored = modules | {"optimizer": optimizer, "schedule": schedule}
    step, first_epoch, best, bad_epochs = 0, 0, None, 0
    if run.state:
        for name, part in stored.items():
            part.load_state_dict(run.state[name])
        step, first_epoch = run.state["step"], run.state["epoch"]
        best, bad_epochs = run.state["best"], run.state["bad_epochs"]

    def checkpoint(epoch: int) -> dict:
        return header | {"format": CHECKPOINT_FORMAT, "step": step, "epoch": epoch, "best": best,
                         "bad_epochs": bad_epochs, "batch_size": batch_size} \
            | {name: part.state_dict() for name, part in stored.items()}

    print(f"{n} training items, batch {batch_size}, {per_epoch} steps an epoch, {args.epochs} "
          f"epochs, {total} steps, log every {log_every}")
    unchecked: list[tuple] = []
    began, saved, begun_at, wait = time.monotonic(), time.monotonic(), step, 0.0
    for epoch in range(first_epoch, args.epochs):
        if patience is not None and bad_epochs >= patience:
            print(f"stopped early: no better {better[0]} for {patience} epochs")
            break
        for module in modules.values():
            module.train()
        order = epoch_order(n, batch_size, args.seed, epoch)[step - epoch * per_epoch:, mine]
        waited = time.monotonic()
        for items, batch in prefetch(read, order):
            wait += time.monotonic() - waited
            torch.manual_seed(seed_of(args.seed, step, 1) + rank())  # dropout: (seed, step) alone
            loss, terms = loss_of(items, batch, step)
            unchecked.append((step, items, {"minimised": loss.detach()} | {
                k: v.detach() for k, v in terms.items() if not callable(v)}))
            rate = schedule.get_last_lr()[0]
            descend(loss, optimizer, recipe.get("clip"))
            schedule.step()
            step += 1
            save_now = time.monotonic() - saved > 60 * args.checkpoint_minutes
            log_now = step % log_every == 0 or step == total or "grad_ratio" in terms
            if log_now or save_now or step % per_epoch == 0:
                check_finite(unchecked, records_of)
            if log_now:
                found = [(v() if callable(v) else v).detach().to(loss) for v in terms.values()]
                found = dict(zip(terms, average(torch.stack(found)).tolist()))
                elapsed = max(time.monotonic() - began, 1e-9)
                speed = (step - begun_at) / elapsed
                run.log({"step": step, "epoch": epoch, **found,
                         "lr": rate, "items_per_second": speed * batch_size,
                         "elapsed_seconds": elapsed, "remaining_seconds": (total - step) / speed,
                         "wait_fraction": wait / elapsed})
            if save_now:
                run.save("last.pt", checkpoint(epoch))
                saved = time.monotonic()
            waited = time.monotonic()
        values = validate()
        values = on_first_rank(lambda: values)  # ranks may differ in the last bit: one decides
        run.log({"step": step, "epoch": epoch, **values})
        score = better[1] * values[better[0]]
        if not math.isnan(score) and (best is None or score > best):
            best, bad_epochs = score, 0
            run.save("best.pt", checkpoint(epoch + 1))
        elif best is not None:
            bad_epochs += 1
        run.save("last.pt", checkpoint(epoch + 1))
        saved = time.monotonic()
    if best is None:
        print(f"note: {better[0]} was never defined (too few validation records or pairs); best.pt "
              "is the last epoch's")
        run.save("best.pt", checkpoint(args.epochs))


def load_best(run: Run, modules: dict[str, nn.Module], name: str = "best.pt") -> None:
    """Load the stored weights back into the modules, strictly, and switch them to eval mode."""
    state = on_first_rank(lambda: load_checkpoint(run.path / name))  # which has just written it
    for key, module in modules.items():
        module.load_state_dict(state[key])
        module.eval()


def checkpoint_header(args, cohort: Cohort) -> dict:
    """What every checkpoint says of its input: plain values only."""
    return {"class_name": list(cohort.class_name), "leads": list(cohort.leads),
            "fs": int(cohort.fs), "normalize": args.normalize, "cohort": cohort.name,
            "cohort_sha256": cohort.sha256,
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}


@torch.no_grad()
def embed(model: cardiowm.WorldModel, signals: Signals, rows: np.ndarray, features: str,
          device: torch.device, progress: Progress | None = None,
          out: Tensor | None = None) -> Tensor:
    """Frozen h or z of the rows, in order: (n,) -> (n, 256) or (n, D) float32 on the device.

    out: (n, dim) to write into, of any float dtype. No autocast here and in scoring: bf16 has 257
    values between two powers of 2, which makes ties.
    """
    done, mine = 0, share(rows)
    for x in signals.batches(mine):
        h = model.encode(x)
        v = model.project(h) if features == "z" else h
        out = v.new_empty((len(mine), v.shape[1])) if out is None else out
        out[done:done + len(v)] = v
        done += len(v)
        if progress is not None:
            progress.update(len(x))
    return gather(out, len(rows))


@torch.no_grad()
def scores_of(head: nn.Module, inputs: Tensor) -> np.ndarray:
    """Probabilities (n, K) float32 of a head in eval mode on embeddings (n, dim)."""
    return head(inputs).sigmoid().float().cpu().numpy()


# ----------------------------------------------------------------------------------------------
# Pretraining: dynamics or invariance, SIGReg or VICReg (paper A)
# ----------------------------------------------------------------------------------------------


def action_of(cohort: Cohort, pairs: np.ndarray, which: str) -> Tensor:
    """(P,) pair indices -> (P, K) int8: the label change, the true state change, or zeros."""
    if which == "state" and cohort.state is None:
        raise InputError(f"--action state: {cohort.path} holds no true states (only the demo "
                         "cohort does); leave --action out")
    return torch.from_numpy(evaluate.own_action(cohort, pairs, which))


def gradient_ratio(pred: Tensor, reg: Tensor, model: nn.Module) -> float:
    """|grad pred| / |grad reg| over encoder and projector, unweighted: A's heuristic for lam."""
    parameters = [*model.encoder.parameters(), *model.projector.parameters()]
    norms = []
    for term in (pred, reg):
        grads = torch.autograd.grad(term, parameters, retain_graph=True)
        norms.append(average(torch.cat([g.float().ravel() for g in grads])).norm().item())
    return norms[0] / max(norms[1], 1e-30)


class Transition(nn.Module):
    """World model and online probe as one module: two ECGs and an action -> all that is learned."""

    def __init__(self, model: cardiowm.WorldModel, online_probe: nn.Module):
        super().__init__()
        self.model, self.online_probe = model, online_probe

    def forward(self, x: Tensor, x_next: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        with autocast(x.device):
            h, z, z_pred, z_next = self.model(x, x_next, a)
        return h, z, z_pred, z_next, self.online_probe(h.detach().float())  # two separate problems


class Pretraining:
    """World model, online probe, data and objective of a pretraining: what a step needs (A)."""

    def __init__(self, args, cohort: Cohort, pairs: np.ndarray, device: torch.device):
        self.args, self.device, self.seed = args, device, args.seed
        self.model_args = {"num_classes": len(cohort.class_name), "in_leads": len(cohort.leads),
                           "residual": args.residual, "action": args.objective == "dynamics",
                           "z_dim": args.z_dim}
        model = sync_batch_norm(cardiowm.WorldModel(**self.model_args).to(device), device)
        fast_encoder(model.encoder)
        online = nn.Sequential(nn.LayerNorm(cardiowm.H_DIM),
                               nn.Linear(cardiowm.H_DIM, len(cohort.class_name))).to(device)
        self.model, self.modules = model, {"model": model, "online_probe": online}
        self.network = parallel(Transition(model, online), device)
        self.sigreg = cardiowm.SIGReg(args.slices).to(device)
        if args.compile:
            from torch._functorch import config
            config.donated_buffer = False  # gradient_ratio goes through a graph twice
            model.encoder.compile()
            self.sigreg.compile()
        self.signals = Signals(cohort, device, args.cache, args.normalize)
        self.pair = cohort.pair[pairs]                                           # (P, 2) rows
        self.action = action_of(cohort, pairs, args.action).to(device)           # (P, K) int8
        self.label = torch.from_numpy(cohort.label[self.pair[:, 0]]).to(device)  # (P, K) uint8

    def read(self, items: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) pairs -> both ECGs (B, 12, T) float16 mV and the index (B,), all on the device."""
        source, target = self.pair[items].T
        return self.signals.read(source), self.signals.read(target), to_device(items, self.device)

    def forward(self, batch: tuple) -> tuple[Tensor, ...]:
        """h, z, z_pred, z_next and the online probe's logits of what `read` returned."""
        x, x_next, at = batch
        return self.network(self.signals.ready(x), self.signals.ready(x_next), self.action[at])

    def objective(self, z: Tensor, z_pred: Tensor, z_next: Tensor, seed: int,
                  mean: Callable | None = None) -> dict[str, Tensor]:
        """The loss and its terms, of the global batch where `mean` is given."""
        if self.args.reg == "vicreg":
            return cardiowm.vicreg_loss(z_pred, z_next, mean)
        generator = torch.Generator(z.device).manual_seed(seed)  # of each kind of device its own
        return cardiowm.dynamics_loss(z, z_pred, z_next, self.sigreg, self.args.lam, generator,
                                      mean)

    def loss_of(self, items: np.ndarray, batch: tuple, step: int) -> tuple[Tensor, dict]:
        """The scalar to minimise and the terms to log, of this rank's part of the batch."""
        h, z, z_pred, z_next, logits = self.forward(batch)
        seed = seed_of(self.seed, step, 2)  # the same directions on all ranks
        terms = self.objective(z, z_pred, z_next, seed, mean_over_ranks())
        terms["online_bce"] = F.binary_cross_entropy_with_logits(
            logits, self.label[batch[2]].float())
        first_epoch = len(self.pair) // (len(items) * world_size())
        if step < min(GRAD_RATIO_STEPS, first_epoch):
            reg = terms["var"] + terms["cov"] if self.args.reg == "vicreg" else \
                terms["sigreg_t"] + terms["sigreg_next"]
            terms["grad_ratio"] = torch.tensor(gradient_ratio(terms["pred"], reg, self.model))
        terms["z_std_min"] = lambda: gather(z.detach().float()).std(dim=0).min()
        terms["z_rank"] = lambda: cardiowm.effective_rank(gather(z.detach()))  # an SVD: not always
        return terms["loss"] + terms["online_bce"], terms


def pretrain(run: Run, args, recipe: dict, cohort: Cohort, pairs: np.ndarray,
             device: torch.device) -> dict[str, np.ndarray]:
    """Train the world model on pairs; returns the online probe's scores of val and test records."""
    task = Pretraining(args, cohort, pairs, device)
    model, online = task.model, task.modules["online_probe"]
    # every rank takes the whole batches, so that the statistics are those of a single process
    batch_size = global_batch(args, len(pairs))
    fixed = epoch_order(len(pairs), batch_size, args.seed, 0)[:RECALIBRATE_BATCHES]
    val_rows = np.flatnonzero(cohort.split == 1)
    val_pairs = select_pairs(cohort, val_rows, args.pairs, args.labelled_only)
    val_n = min(batch_size, len(val_pairs))
    print(f"validation: {len(val_rows)} records, {len(val_pairs)} pairs, SIGReg at N = {val_n} "
          "(fixed)")

    def forward(batch: tuple) -> None:
        x, x_next, at = batch
        with autocast(device):
            model(task.signals.ready(x), task.signals.ready(x_next), task.action[at])

    @torch.no_grad()
    def validate() -> dict:
        recalibrate([model], forward, (b for _, b in prefetch(task.read, fixed)))
        model.eval()
        online.eval()
        h = embed(model, task.signals, val_rows, "h", device)
        z = model.project(h)
        values = {"val_macro_auroc": macro_auroc(cohort.label[val_rows], scores_of(online, h))}
        source, target = np.searchsorted(val_rows, cohort.pair[val_pairs]).T
        a = action_of(cohort, val_pairs, args.action).to(device)
        terms: dict[str, list[float]] = {}
        for i in range(len(val_pairs) // val_n if val_n > 1 else 0):  # one pair has no variance
            at = slice(i * val_n, (i + 1) * val_n)
            out = task.objective(z[source[at]], model.predict(z[source[at]], a[at]), z[target[at]],
                                 seed_of(args.seed, i, 3))
            for name, value in out.items():
                terms.setdefault(name, []).append(float(value))
        values |= {f"val_{k}": float(np.mean(v)) for k, v in terms.items()}
        values.setdefault("val_loss", math.nan)
        return values | {"val_z_std_min": float(z.std(dim=0).min()),
                         "val_z_rank": float(cardiowm.effective_rank(z))}

    header = {"kind": "worldmodel", "model_args": task.model_args} | checkpoint_header(args, cohort)
    fit(run, args, recipe, task.modules, header, len(pairs), task.read, task.loss_of, validate,
        ("val_loss", -1), lambda items: task.pair[items])
    load_best(run, task.modules, "last.pt")  # as downstream: paper A probes the last epoch
    return {name: scores_of(online, embed(model, task.signals, which, "h", device))
            for name, which in (("val", val_rows), ("test", np.flatnonzero(cohort.split == 2)))}


# ----------------------------------------------------------------------------------------------
# Downstream: finetuning, the supervised baseline, probes and augmentation (papers A and B)
# ----------------------------------------------------------------------------------------------


def find_init(args, cohort: Cohort) -> Path | None:
    """The pretraining to start from: --init, or the one of the same cohort, fraction and seed."""
    if args.mode == "pretrain" or args.init in ("scratch", "random"):
        return None
    if args.init is not None:
        path = find_run(args.init)
    else:
        wanted = {"mode": "pretrain", "frac": args.frac, "seed": args.seed}
        found = []
        for config in sorted(Path("runs").glob("*/config.json")):
            try:
                old = json.loads(config.read_text())
                same = old["cohort"]["sha256"] == cohort.sha256 and \
                    all(old["args"][k] == v for k, v in wanted.items())
            except (ValueError, KeyError, TypeError):
                continue  # not a run of ours
            if same and ".old-" not in config.parent.name:
                found.append(config.parent)
        if not found:
            raise InputError(
                f"--init: no pretraining of {cohort.name} with frac {args.frac:g} and seed "
                f"{args.seed} under runs/; run `python train.py --mode pretrain --data "
                f"{cohort.path} --frac {args.frac:g} --seed {args.seed}` first, or name one with "
                "--init RUN")
        path = Path("runs") / default_pretraining(cohort.name, args)
        if path not in found:
            raise InputError(f"--init: {path} is not there; name one of the pretrainings that are: "
                             + ", ".join(p.name for p in found))
        print(f"init: {path} (pretraining of the same cohort, fraction and seed)")
    if not (path / "predictions_test.npz").exists():
        raise InputError(f"--init {path}: that run is unfinished; finish it first by running its "
                         "command again")
    return path


def load_start(init: Path | None, args, cohort: Cohort) -> cardiowm.WorldModel | None:
    """The start: None from scratch, an untrained model, or last.pt of a pretraining run, checked.

    A probe takes over the input scaling of its encoder: args.normalize is set.
    """
    if args.mode == "pretrain" or args.init == "scratch":
        return None
    if init is None:
        return cardiowm.WorldModel(len(cohort.class_name), len(cohort.leads)).eval()
    state = load_checkpoint(init / "last.pt")
    if state["kind"] != "worldmodel":
        raise InputError(f"--init {init}: found a {state['kind']}, a pretraining run is wanted")
    if list(state["leads"]) != list(cohort.leads):
        raise InputError(f"--init {init}: was trained on leads {state['leads']}, the cohort has "
                         f"{cohort.leads}")
    if args.mode == "probe":
        args.normalize = state["normalize"]
    elif state["normalize"] != args.normalize:
        raise InputError(f"--init {init}: was trained with --normalize {state['normalize']}, asked "
                         f"for {args.normalize}; give --normalize {state['normalize']}")
    if state["fs"] != cohort.fs:
        print(f"note: {init} was trained at {state['fs']} Hz, the cohort has {cohort.fs} Hz")
    same_classes = list(state["class_name"]) == list(cohort.class_name)
    if not same_classes:
        print(f"note: {init} knows {len(state['class_name'])} classes "
              f"({' '.join(state['class_name'])}), the cohort has {len(cohort.class_name)} "
              f"({' '.join(cohort.class_name)}): the encoder goes over")
    try:
        model = cardiowm.WorldModel(**state["model_args"])
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:
        raise InputError(f"--init {init}: last.pt holds another architecture: "
                         f"{str(error).splitlines()[0]}") from None
    if args.augment == "dynamics" and not same_classes:
        raise InputError(f"--augment dynamics: the action encoder of {init} has another "
                         "vocabulary; pretrain on this cohort")
    if args.augment == "dynamics" and model.action_encoder is None:
        raise InputError(f"--augment dynamics: {init} is an invariance model, which has no action "
                         "encoder; give --init with a dynamics pretraining")
    return model.eval()


def finetune(run: Run, args, recipe: dict, cohort: Cohort, rows: np.ndarray,
             start: cardiowm.WorldModel | None, device: torch.device) -> dict[str, np.ndarray]:
    """Train encoder and concat-pool head end to end; returns scores of val and test records."""
    encoder = cardiowm.XResNet1d50(len(cohort.leads)) if start is None else start.encoder
    model = cardiowm.Classifier(encoder, len(cohort.class_name)).to(device)
    model = sync_batch_norm(model, device)
    fast_encoder(model.encoder)
    network = parallel(model, device)
    signals = Signals(cohort, device, args.cache, args.normalize)
    if args.compile:
        model.compile()
    label = torch.from_numpy(cohort.label[rows]).to(device)
    val_rows = np.flatnonzero(cohort.split == 1)
    fixed = epoch_order(len(rows), global_batch(args, len(rows)), args.seed, 0)

    def read(items: np.ndarray) -> tuple[Tensor, Tensor]:
        return signals.read(rows[items]), to_device(items, device)

    def loss_of(items: np.ndarray, batch: tuple, step: int) -> tuple[Tensor, dict]:
        x, at = batch
        with autocast(device):
            logits = network(signals.ready(x))
        loss = cardiowm.asymmetric_loss(logits, label[at])
        # a sum over the global batch, of which DDP takes the mean over ranks; logged per record
        return loss * world_size(), {"loss": loss.detach() / len(items)}

    @torch.no_grad()
    def score(which: np.ndarray) -> np.ndarray:
        scores = torch.cat([model(x).sigmoid() for x in signals.batches(share(which))])
        return gather(scores, len(which)).cpu().numpy()

    def validate() -> dict:
        with autocast(device):
            recalibrate([model], lambda x: model(signals.ready(x)),
                        (x for _, (x, _) in prefetch(read, fixed[:RECALIBRATE_BATCHES])))
        model.eval()
        return {"val_macro_auroc": macro_auroc(cohort.label[val_rows], score(val_rows))}

    header = {"kind": "classifier", "model_args": {"num_classes": len(cohort.class_name),
                                                   "in_leads": len(cohort.leads)}}
    fit(run, args, recipe, {"model": model}, header | checkpoint_header(args, cohort), len(rows),
        read, loss_of, validate, ("val_macro_auroc", 1), lambda items: rows[items])
    load_best(run, {"model": model})
    return {"val": score(val_rows), "test": score(np.flatnonzero(cohort.split == 2))}


def plan_augmentation(args, cohort: Cohort, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Combinations (M, K), their counts (M,) and which rows are normal (n,); sets args.total."""
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
    if args.total is None:
        synthetic, real = SYNTHETIC_ROWS
        args.total = synthetic if args.preset == "paper" else round(synthetic / real * len(y))
    print(f"augmentation ({args.augment}): {len(counts)} label combinations seen "
          f"{int(counts.min())} to {int(counts.max())} times, {args.total} synthetic rows beside "
          f"{len(y)} real ones, {int(normal.sum())} of them normal")
    return combinations, counts, normal


def synthesise(args, model: cardiowm.WorldModel, plan: tuple, inputs: Tensor, y: Tensor) -> None:
    """Fill the last args.total rows of inputs (n + total, dim) and y (n + total, K) as in paper B.

    They are made from the first n rows, the real ones.
    """
    combinations, counts, normal = plan
    n = len(inputs) - args.total
    generator = torch.Generator().manual_seed(seed_of(args.seed, 0, 4))
    if args.augment == "dynamics":
        augmentor = cardiowm.Augmentor(model, combinations, counts, args.total)
        normal = normal.to(inputs.device)
        y_normal = y[:n][normal] if y[:n][normal].any() else None  # MIMIC: normal is no code
        batches = augmentor.batches(inputs[:n][normal], SYNTHESIS_BATCH, generator, y_normal)
    else:
        batches = cardiowm.Interpolator(
            inputs[:n], y[:n], combinations, counts, args.total,
            neighbours=5 if args.augment == "smote" else 0).batches(SYNTHESIS_BATCH, generator)
    progress, at = Progress(args.total, "rows", "augmentation"), n
    for z, label in batches:
        inputs[at:at + len(z)], y[at:at + len(z)] = z, label
        at += len(z)
        progress.update(len(z))
    progress.close()


def probe_loss(head: nn.Module, inputs: Tensor, y: Tensor, n: int, pos_weight: Tensor) -> Callable:
    """`loss_of` for `fit`: A's loss for a linear head, B's for an MLP; n real rows come first."""
    def loss_of(items: np.ndarray, at: Tensor, step: int) -> tuple[Tensor, dict]:
        logits = head(inputs[at].float())
        if isinstance(head, cardiowm.LinearProbe):
            loss = cardiowm.asymmetric_loss(logits, y[at])
            return loss, {"loss": loss.detach() / len(items)}  # logged per record
        weight = torch.where(at < n, 1.0, SYNTHETIC_WEIGHT)
        loss = cardiowm.weighted_bce(logits, y[at], weight, pos_weight)
        return loss, {"loss": loss}
    return loss_of


def probe(run: Run, args, recipe: dict, cohort: Cohort, rows: np.ndarray,
          start: cardiowm.WorldModel, plan: tuple | None,
          device: torch.device) -> dict[str, np.ndarray]:
    """Train a linear (A) or MLP (B) head on frozen h or z; returns scores of val and test."""
    model = start.to(device)
    fast_encoder(model.encoder)
    signals = Signals(cohort, device, args.cache, args.normalize)
    val_rows, test_rows = (np.flatnonzero(cohort.split == k) for k in (1, 2))
    n, total = len(rows), 0 if plan is None else args.total
    dim = cardiowm.H_DIM if args.features == "h" else model.projector[-1].num_features
    # float16 with synthetic rows: at B's size, 2.7 million, that is 1.4 GB; nothing is held twice
    inputs = torch.empty((n + total, dim), device=device,
                         dtype=torch.float16 if total else torch.float32)
    progress = Progress(n + len(val_rows) + len(test_rows), "records", "embedding")
    embed(model, signals, rows, args.features, device, progress, inputs[:n])
    val, test = (embed(model, signals, r, args.features, device, progress)
                 for r in (val_rows, test_rows))
    progress.close()
    y = torch.empty((n + total, len(cohort.class_name)), dtype=torch.uint8)
    y[:n] = torch.from_numpy(cohort.label[rows])
    limit = {"none": None, "5": cardiowm.POS_WEIGHT_LIMIT, "full": math.inf}.get(args.class_weight)
    pos_weight = torch.ones(y.shape[1]) if limit is None else \
        cardiowm.positive_weight(y[:n], limit)
    y, pos_weight = y.to(device), pos_weight.to(device)
    if plan is not None:
        synthesise(args, model, plan, inputs, y)

    head_class = cardiowm.LinearProbe if args.head == "linear" else cardiowm.MLPProbe
    head_args = {"dim": inputs.shape[1], "num_classes": y.shape[1]}
    torch.manual_seed(args.seed)
    head = head_class(**head_args).to(device)

    def validate() -> dict:
        head.eval()
        return {"val_macro_auroc": macro_auroc(cohort.label[val_rows], scores_of(head, val))}

    header = {"kind": "probe", "model_args": head_args, "head": args.head,
              "features": args.features}
    fit(run, args, recipe, {"model": head}, header | checkpoint_header(args, cohort), len(y),
        lambda items: to_device(items, device), probe_loss(head, inputs, y, n, pos_weight),
        validate, ("val_macro_auroc", 1),
        lambda items: rows[items[items < len(rows)]], PATIENCE if args.head == "mlp" else None)
    load_best(run, {"model": head})
    return {"val": scores_of(head, val), "test": scores_of(head, test)}


# ----------------------------------------------------------------------------------------------
# Beyond the papers: predictions, summary, the cohort and the device of a run
# ----------------------------------------------------------------------------------------------


def write_predictions(run: Run, cohort: Cohort, scores: dict[str, np.ndarray]) -> None:
    """predictions_{val,test}.npz, test last: its presence says that the run is finished."""
    pair_first = np.zeros(len(cohort.label), bool)
    pair_first[cohort.pair[:, 0]] = True
    for name, split in (("val", 1), ("test", 2)):
        rows = np.flatnonzero(cohort.split == split)
        path = run.path / f"predictions_{name}.npz"
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as f:
            np.savez(f, y_true=cohort.label[rows], y_score=scores[name].astype(np.float32),
                     study_id=cohort.study_id[rows], subject_id=cohort.subject_id[rows],
                     class_name=np.array(cohort.class_name), pair_first=pair_first[rows],
                     first_in_stay=cohort.ecg_no_within_stay[rows] == 0,
                     has_label=cohort.has_label[rows])
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)


def summarise(run: Run, args, cohort: Cohort, scores: dict[str, np.ndarray],
              seconds: float) -> None:
    """What came out, and what to run next."""
    kind = "SYNTHETIC demo" if cohort.synthetic else "real"
    what = "online probe" if args.mode == "pretrain" else f"{args.mode}"
    print(f"\n{run.path}: done in {seconds:.0f} s on {args.device} ({kind} cohort {cohort.name}, "
          f"seed {args.seed}, {run.config['cohort']['frac_patients']} training patients)")
    for name, split in (("val", 1), ("test", 2)):
        rows = np.flatnonzero(cohort.split == split)
        values = auroc(cohort.label[rows], scores[name])
        print(f"  {name:<4} macro-AUROC ({what}, all {len(rows)} records of "
              f"{len(np.unique(cohort.subject_id[rows]))} patients, "
              f"{np.isfinite(values).sum()} of {len(values)} classes): {np.nanmean(values):.3f}"
              if np.isfinite(values).any() else f"  {name:<4} macro-AUROC: not defined")
    print("  files: config.json log.jsonl last.pt best.pt predictions_val.npz predictions_test.npz")
    data = "" if cohort.path == DEFAULT_DATA else f" --data {cohort.path}"
    frac = "" if args.frac == 1 else f" --frac {args.frac:g}"
    seed = f" --seed {args.seed}" if args.seed else ""
    default = default_pretraining(cohort.name, args)
    scaling = f" --normalize {args.normalize}" if args.normalize != "zscore" else ""
    print("next:")
    if args.mode == "pretrain":
        for more in ("--mode probe", "--mode probe --head mlp", "--mode finetune",
                     "--mode finetune --init scratch"):
            init = "" if "scratch" in more or run.path == Path("runs") / default else \
                f" --init {run.path}"
            init += scaling if "finetune" in more else ""
            print(f"  python train.py {more}{data}{frac}{seed}{init}")
    print(f"  python evaluate.py --mode score --runs {run.path}")


def open_cohort(path: Path | None) -> Cohort:
    """--data; else data/cohort.h5; else the demo cohort, built there."""
    if path is None and not DEFAULT_DATA.exists():
        print(f"NO --data AND NO {DEFAULT_DATA}: building the SYNTHETIC demo cohort there. Nothing "
              "learned from it says anything about real patients.", flush=True)
        prepare_data.build("demo", out=DEFAULT_DATA)
    return Cohort(path or DEFAULT_DATA)


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else CPU. A device that is not there is an InputError.

    Under torchrun, each process of a machine takes the CUDA device of its local rank.
    """
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if ":" in name or name == "mps":
            raise InputError(f"--device {name}: torchrun gives each process its own device; wanted "
                             "auto, cuda or cpu")
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        name = "cpu" if name == "auto" else name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); wanted "
                         "auto, cpu, cuda, cuda:N or mps") from None
    return device


# ----------------------------------------------------------------------------------------------
# Bench: every stage against what users do today and against its floor, in one run
# ----------------------------------------------------------------------------------------------

BATCH_PAIRS = 512              # paper A's batch
MIMIC_SIZE = 800_035, 638_683  # records and pairs of MIMIC-IV-ECG
MOVED_BYTES = 33_000           # that an eager bf16 training step moves per record and sample
BENCH_DISK = 6e9               # demo records, and a cohort of 16 times as many while it is built
BENCH_COLUMNS = ("stage", "today", "here", "ratio", "wanted", "floor", "of the floor", "held")


def held_bytes() -> int:
    """Memory of this process and what it started, without mapped files; 0 where /proc is not."""
    total, pids = 0, ["self"]
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            total += 1024 * int(status.partition("RssAnon:")[2].split()[0])
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += (task / "children").read_text().split()
        except (OSError, IndexError):
            pass  # not Linux, or a process that has just ended
    return total


def peak_bytes(call: Callable) -> int:
    """How much more memory is held while `call` runs than before, sampled every 10 ms."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)  # memory kept for reuse would hide what the call takes
    before, samples, done = held_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            samples.append(held_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        samples.append(held_bytes() - before)
        done.set()
        watcher.join()
    return max(samples)


def race(calls: dict[str, Callable], repeats: int, clock: Callable = time.perf_counter
         ) -> dict[str, float]:
    """Median seconds of each call; they take turns, forth and back, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in list(calls.items())[::1 if turn % 2 else -1]:
            began = clock()
            call()
            if turn:
                seconds[name].append(clock() - began)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / race({"": lambda: (a @ a, wait_for(device))}, 5)[""]


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy in the device's memory reads and writes."""
    a = torch.empty(2**26 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    return 2 * len(a) / race({"": lambda: (a.clone(), wait_for(device))}, 5)[""]


def wait_for(device: torch.device) -> None:
    """Until the device has done what was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The table as it grows: each row is printed when it is there, and stored in bench.md, .csv."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title, self.rows, self.out = folder, title, [], sys.stdout
        print(f"\n{title}\n\n| " + " | ".join(BENCH_COLUMNS) + " |\n" + "|---" * 8 + "|")

    def add(self, stage: str, today: tuple[str, float] | None, here: tuple[str, float],
            wanted: str = "", floor: tuple[str, float] | None = None,
            held: int | None = None) -> None:
        """today, here, floor: (what, seconds); wanted: the ratio asked for, in words."""
        cells = ["–" if part is None else f"{part[0]}: {duration(part[1])}"
                 for part in (today, here, floor)]
        ratio = "–" if today is None else f"{today[1] / here[1]:.1f}×"
        share = "–" if floor is None else f"{100 * floor[1] / here[1]:.0f} %"
        memory = "–" if held is None else f"{held / 1e6:,.0f} MB"
        self.rows.append((stage, *cells[:2], ratio, wanted or "–", cells[2], share, memory))
        print("| " + " | ".join(self.rows[-1]) + " |", file=self.out, flush=True)

    def save(self) -> None:
        """Write bench.md and bench.csv."""
        lines = [BENCH_COLUMNS, ("---",) * 8, *self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        replace_file(self.folder / "bench.md", f"{self.title}\n\n{text}\n".encode())
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([BENCH_COLUMNS, *self.rows])
        replace_file(self.folder / "bench.csv", table.getvalue().encode())


def duration(seconds: float) -> str:
    """A duration with three digits, in a unit that suits it."""
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        value = seconds / scale
        if value < (120 if unit in ("s", "min") else 1000):
            break
    return f"{value:.3g} {unit}"


def bench_reading(bench: Bench, root: Path, quick: bool) -> None:
    """WFDB record -> 100 Hz float16: one core, then two workers that fill one memory map."""
    import wfdb
    from scipy.signal import resample_poly
    paths = [str(p)[:-4] for p in sorted(root.glob("files/**/*.hea"))]
    some, fs = paths[:20 if quick else 200], 100

    def today() -> None:
        for path in some:
            x, fields = wfdb.rdsamp(path)                                # (5000, 12) float64 mV
            order = [fields["sig_name"].index(lead) for lead in prepare_data.LEADS]
            resample_poly(np.nan_to_num(x[:, order].T), 1, 5, axis=1).astype(np.float16)

    def here() -> None:
        for path in some:
            try:
                prepare_data.read_record(path, fs)
            except prepare_data.Rejected:
                pass  # a planted defect

    def floor() -> None:
        for path in some:
            Path(path + ".dat").read_bytes()
    got = race({"today": today, "here": here, "floor": floor}, 1 if quick else 5,
               time.process_time)  # CPU time: one core's, whatever BLAS does with the other
    each = {name: seconds / len(some) for name, seconds in got.items()}
    bench.add("read a record, one core", ("wfdb.rdsamp + resample_poly", each["today"]),
              ("read_record", each["here"]), "≥ 15×", ("read the file", each["floor"]),
              peak_bytes(here))
    if (os.cpu_count() or 1) < 2:
        return
    listed = paths if quick else paths * 4

    def read_all(workers: int) -> None:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            relative = [os.path.relpath(path, root) for path in listed]
            prepare_data.allocate(Path(folder), relative, prepare_data.SECONDS * fs)
            status = np.load(Path(folder) / "status.npy", mmap_mode="r+")
            prepare_data.run_workers(Path(folder), root, fs, status, workers)
    got = race({"one": lambda: read_all(1), "two": lambda: read_all(2)}, 1 if quick else 3)
    bench.add(f"read {len(listed):,} records", ("one worker", got["one"]),
              ("two workers, one map", got["two"]), "≥ 1.7×", ("half of one", got["one"] / 2),
              peak_bytes(lambda: read_all(2)))


class H5Rows(torch.utils.data.Dataset):
    """What users do today: one h5py read a record."""

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, row: int) -> Tensor:
        self.file = self.file or prepare_data.h5py.File(self.path, "r")  # each worker its own
        return torch.from_numpy(self.file["signal"][row])


def bench_batches(bench: Bench, cohort: Cohort, quick: bool) -> None:
    """A batch of 512 pairs, (2, 512, 12, T) float16, in random order, from the page cache."""
    rng, dataset, cpu = np.random.default_rng(0), H5Rows(cohort.path), torch.device("cpu")
    batches = 2 if quick else 8
    draws = [rng.integers(0, len(cohort), 2 * BATCH_PAIRS) for _ in range(batches)]
    disk, ram = (Signals(cohort, cpu, cache, "zscore") for cache in ("disk", "ram"))

    def each_batch(read: Callable) -> Callable:
        def call() -> None:
            for rows in draws:
                read(rows)
        return call

    def loader() -> None:
        for _ in torch.utils.data.DataLoader(dataset, 2 * BATCH_PAIRS, num_workers=2,
                                             sampler=np.concatenate(draws)):
            pass
    block = np.zeros((2 * BATCH_PAIRS, *cohort.signal.shape[1:]), np.float16)
    calls = {"h5py": each_batch(lambda rows: torch.stack([dataset[int(row)] for row in rows])),
             "loader": loader}
    fast = {"disk": each_batch(disk.read), "ram": each_batch(ram.read),
            "floor": each_batch(lambda rows: block.copy())}
    got = race(calls, 1 if quick else 5) | race(fast, 3 if quick else 25)
    each = {name: seconds / batches for name, seconds in got.items()}
    size, here = f"read a batch of {BATCH_PAIRS} pairs", ("memory map", each["disk"])
    floor = "copy as many bytes", each["floor"]
    bench.add(size, ("h5py rows", each["h5py"]), here, "≥ 5×", floor,
              peak_bytes(fast["disk"]))
    bench.add(size, ("DataLoader, 2 workers", each["loader"]), here, "≥ 5×", floor,
              peak_bytes(loader))
    bench.add(size, ("from RAM", each["ram"]), here, "≥ 0.83× (1.2 times RAM)", floor)


def random_cohort(n: int, samples: int, pairs: int, device: torch.device) -> types.SimpleNamespace:
    """A cohort of n random records of MIMIC's 76 classes, the signal made on the device."""
    signal = torch.empty(n, 12, samples, dtype=torch.float16, device=device)
    for part in signal.split(8192):
        part.normal_()
    rng = np.random.default_rng(0)
    label = (rng.random((n, 76), np.float32) < 0.02).astype(np.uint8)
    pair = rng.integers(0, n, (pairs, 2)).astype(np.int32)
    action = label[pair[:, 1]].astype(np.int8) - label[pair[:, 0]].astype(np.int8)
    return types.SimpleNamespace(
        signal=signal if device.type == "cuda" else signal.numpy(), label=label, pair=pair,
        action=action, class_name=[f"I{k:02}" for k in range(76)], leads=prepare_data.LEADS)


def steady_steps(task: Pretraining, optimizer: torch.optim.Optimizer, order: np.ndarray
                 ) -> tuple[float, float]:
    """Run a pretraining step on each row of `order`: median seconds of one, share spent waiting."""
    times, wait, began = [], 0.0, time.perf_counter()
    waited = began
    for step, (items, batch) in enumerate(prefetch(task.read, order)):
        wait += time.perf_counter() - waited
        loss, _ = task.loss_of(items, batch, GRAD_RATIO_STEPS + step)  # past the first, longer ones
        descend(loss, optimizer)
        if task.device.type == "cpu" or step % 20 == 0:  # a GPU runs ahead
            wait_for(task.device)
            times.append((step, time.perf_counter()))
        waited = time.perf_counter()
    wait_for(task.device)
    times.append((step, time.perf_counter()))
    first = len(times) // 10  # the first steps warm up
    each = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(times[first:], times[first + 1:])
            if b[0] > a[0]]
    return float(np.median(each or [math.nan])), wait / (time.perf_counter() - began)


def bench_step(bench: Bench, args: argparse.Namespace, quick: bool) -> None:
    """The encoder forward and backward, the whole step at its size, and SIGReg's share of it."""
    device = torch.device(args.device)
    pairs, repeats = (8, 1) if quick else (64 if device.type == "cpu" else BATCH_PAIRS, 7)
    for samples in (1000, 5000):
        if samples > 1000:
            pairs = max(4, pairs // 4)
        x = torch.randn(2 * pairs, 12, samples, device=device)
        plain = cardiowm.XResNet1d50().to(device)
        fast = fast_encoder(copy.deepcopy(plain))
        if args.compile:
            fast.compile()

        def step(encoder: nn.Module, low: bool) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                h = encoder(x)
            h.float().square().mean().backward()
            encoder.zero_grad()
            wait_for(device)
        calls = {"plain": lambda: step(plain, False), "fast": lambda: step(fast, False)}
        low = has_bf16(device.type)
        if low:
            calls["bf16"] = lambda: step(fast, True)
        got = race(calls, repeats)
        name = f"encoder step, {2 * pairs} records, T={samples}"
        how = "channels_last" + (" + compile" if args.compile else "")
        flops = 3 * 210.07e6 * samples / 1000 * len(x)  # forward, and twice that backward
        for key, dtype, wanted in (("fast", torch.float32, "≥ 1.3×"),
                                   ("bf16", torch.bfloat16, "≥ 2.5×")):
            if key in got:
                floor = ("arithmetic at the peak of a product", flops / peak_flops(dtype, device)) \
                    if device.type == "cpu" else \
                    ("memory traffic", MOVED_BYTES * samples * len(x) / bandwidth(device))
                bench.add(name, ("Conv1d, float32", got["plain"]),
                          (f"{how}, {str(dtype)[6:]}", got[key]), wanted, floor,
                          peak_bytes(calls[key]) if device.type == "cpu" else None)


def complex_sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """SIGReg as the formula is usually typed: complex exponentials over (N, S, Q)."""
    t = torch.linspace(0, 3, 17, device=z.device)
    phi = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * 3 / 16)
    weight[[0, -1]] = 3 / 16
    u = z @ directions                                              # (N, S)
    error = torch.exp(1j * u[..., None] * t).mean(dim=0) - phi      # (N, S, Q) -> (S, Q)
    return len(z) * (error.abs().square() * phi * weight).sum(dim=1).mean()


def bench_sigreg(bench: Bench, args: argparse.Namespace, quick: bool) -> None:
    """SIGReg forward and backward, then its share of a pretraining step and the wait for data."""
    device = torch.device(args.device)
    z = torch.randn(BATCH_PAIRS, 256, device=device, requires_grad=True)
    sigreg = cardiowm.SIGReg().to(device)
    directions = sigreg.draw_directions(256, None, device)

    def gradient(function: Callable) -> Callable:
        def call() -> None:
            z.grad = None
            function(z, directions).backward()
            wait_for(device)
        return call
    calls = {"complex": gradient(complex_sigreg), "here": gradient(sigreg),
             "floor": gradient(lambda z, d: (z @ d).sum())}
    every = torch.get_num_threads()
    for threads in sorted({1, every}) if device.type == "cpu" else (every,):
        torch.set_num_threads(threads)
        got = race(calls, 3 if quick else 50)
        where = f", threads: {threads}" if device.type == "cpu" else ""
        bench.add(f"SIGReg with gradient, N={BATCH_PAIRS}{where}",
                  ("complex exponential", got["complex"]), ("SIGReg", got["here"]), "≥ 10×",
                  ("its matrix products", got["floor"]),
                  peak_bytes(calls["here"]) if device.type == "cpu" else None)
    torch.set_num_threads(every)


def bench_training(bench: Bench, args: argparse.Namespace, quick: bool) -> None:
    """Pretraining steps on random cohorts: on a GPU of MIMIC's full size, on a CPU of 1 % of it."""
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    batch, steps = (8, 4) if quick else (BATCH_PAIRS, 240) if gpu else (64, 20)
    for samples in (1000, 5000):
        n = MIMIC_SIZE[0] if gpu else 512 if quick else 8000
        if gpu:  # what fits beside the activations; said in the row
            n = min(n, int(0.7 * torch.cuda.mem_get_info(device)[0] / (24 * samples)))
        elif samples > 1000:
            batch, n = max(2, batch // 4), n // 5
        cohort = random_cohort(n, samples, min(MIMIC_SIZE[1], 80 * n // 100), device)
        task = Pretraining(args, cohort, np.arange(len(cohort.pair)), device)
        optimizer = make_optimizer(task.modules.values(), 1e-3, 5e-4)
        order = np.random.default_rng(0).integers(0, len(cohort.pair), (steps, batch))
        steady_steps(task, optimizer, order[:steps // 10 + 1])
        seconds, wait = steady_steps(task, optimizer, order)
        z = torch.randn(2, batch, 256, device=device, requires_grad=True)

        def regularise() -> None:
            (task.sigreg(z[0]) + task.sigreg(z[1])).backward()
            wait_for(device)
        share = race({"": regularise}, 3 if quick else 30)[""] / seconds
        floor = MOVED_BYTES * samples * 2 * batch / bandwidth(device) if gpu else \
            3 * 210.07e6 * samples / 1000 * 2 * batch / peak_flops(
                torch.bfloat16 if has_bf16("cpu") else torch.float32, device)
        what = "memory traffic of the encoder" if gpu else "arithmetic of the encoder"
        epochs = 50 * (MIMIC_SIZE[1] // BATCH_PAIRS) * seconds * BATCH_PAIRS / batch
        bench.add(f"pretraining step, {batch} pairs of {n:,} records, T={samples}", None,
                  (f"SIGReg {100 * share:.1f} %, waiting for data {100 * wait:.1f} %; 50 epochs of "
                   f"{MIMIC_SIZE[1]:,} pairs in {duration(epochs)}", seconds),
                  "≥ 50 % of the floor; SIGReg, waiting ≤ 2 %" if gpu else
                  "SIGReg, waiting ≤ 2 %", (what, floor),
                  torch.cuda.max_memory_allocated(device) if gpu else None)
        del cohort, task, optimizer


def rank_auroc(y: np.ndarray, score: np.ndarray) -> float:
    """AUROC of one class by its formula, as one would type it."""
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    midrank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    positives = int(y.sum())
    return (midrank[y > 0].sum() - positives * (positives + 1) / 2) / (
        positives * (len(y) - positives))


def bench_bootstrap(bench: Bench, quick: bool) -> None:
    """Macro-AUROC with 1,000 replicates of 80,000 records and 76 classes."""
    n, k, replicates = (2000, 8, 50) if quick else (80_000, 76, 1000)
    rng = np.random.default_rng(0)
    y = (rng.random((n, k)) < np.geomspace(0.002, 0.25, k)).astype(np.uint8)
    score = (rng.normal(size=(n, k)) + y).astype(np.float32)
    patient = rng.integers(0, n // 5, n)
    rows = rng.integers(0, n, n)  # one replicate, the same for all

    def loop(function: Callable) -> Callable:
        return lambda: [function(y[rows, c], score[rows, c]) for c in range(k)]
    calls = {"rank": loop(rank_auroc)}
    try:
        from sklearn.metrics import roc_auc_score
        calls["sklearn"] = loop(roc_auc_score)
    except ImportError:
        print("scikit-learn is not installed: its row is left out", file=sys.stderr)
    one = race(calls, 1 if quick else 3)
    ours = {"records": lambda: evaluate.bootstrap_auroc(y, score, replicates),
            "patients": lambda: evaluate.bootstrap_auroc(y, score, replicates, unit=patient)}
    got = race(ours, 1 if quick else 3)
    counts = torch.ones(n, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as bootstrap_auroc
    floor = race({"": lambda: counts.sum(dim=0)}, 5)[""] / 64 * replicates * k
    torch.set_num_threads(threads)
    size = f"AUROC and {replicates:,} bootstraps, {n:,} × {k}"
    for name, text in (("sklearn", "scikit-learn loop"), ("rank", "rank formula in a loop")):
        if name in one:
            bench.add(size, (f"{text} (extrapolated from one replicate)", one[name] * replicates),
                      ("bootstrap_auroc", got["records"]), "≥ 150×" if name == "sklearn" else "",
                      ("adding up the counts", floor), peak_bytes(ours["records"]))
    bench.add(size, ("of records", got["records"]), ("of patients", got["patients"]),
              "≥ 1×", None, peak_bytes(ours["patients"]))


def bench_augmentation(bench: Bench, args: argparse.Namespace, quick: bool) -> None:
    """Paper B's 2,000,000 synthetic rows beside 721,002 real ones: making them, one probe epoch."""
    device = torch.device(args.device)
    total, n = (20_000, 7210) if quick else SYNTHETIC_ROWS
    rng = np.random.default_rng(0)
    combinations = np.zeros((300, 76), np.int64)
    for row in combinations:
        row[rng.choice(76, rng.integers(1, 5), replace=False)] = 1
    plan = (torch.from_numpy(combinations), torch.from_numpy(rng.integers(50, 13_000, 300)),
            torch.from_numpy(rng.random(n) < 0.54))  # as many normal rows as MIMIC has
    model = cardiowm.WorldModel(76).to(device)
    args = argparse.Namespace(**vars(args) | {"total": total, "augment": "dynamics"})
    made = {}

    def make() -> None:
        inputs = torch.zeros(n + total, 256, dtype=torch.float16, device=device)
        inputs[:n].normal_()
        y = torch.zeros(n + total, 76, dtype=torch.uint8, device=device)
        synthesise(args, model, plan, inputs, y)
        made.update(inputs=inputs, y=y)
    held = peak_bytes(make)
    inputs, y = made["inputs"], made["y"]
    generation = race({"": lambda: (synthesise(args, model, plan, inputs, y), wait_for(device))},
                      1)[""]
    head = cardiowm.MLPProbe(256, 76).to(device)
    optimizer = make_optimizer([head], 1e-4, 1e-2)
    loss_of = probe_loss(head, inputs, y, n, torch.ones(76, device=device))
    batch = min(RECIPES["mlp"]["batch_size"], n)
    order = rng.integers(0, n + total, (4 if quick else 40 if device.type == "cpu" else 600, batch))

    def train_steps() -> None:
        for items, at in prefetch(lambda items: to_device(items, device), order):
            descend(loss_of(items, at, 0)[0], optimizer)
        wait_for(device)
    epoch = race({"": train_steps}, 1)[""] / len(order) * ((n + total) // batch)
    flops = 2 * total * sum(p.numel() for m in (model.predictor, model.action_encoder)
                            for p in m.parameters())
    bench.add(f"{total:,} synthetic rows beside {n:,} real",
              ("one epoch of the MLP probe", epoch), ("making them", generation),
              "≥ 6.7× (15 % of an epoch), ≤ 2,000 MB",
              ("arithmetic at the peak of a product", flops / peak_flops(torch.float32, device)),
              held)


def bench_growth(folder: Path, root: Path, args: argparse.Namespace, quick: bool) -> None:
    """Preparation, epoch and bootstrap at 1, 4 and 16 times the demo cohort: growth.csv and .png.

    The larger cohorts list the same records again, as other patients.
    """
    device, times = torch.device(args.device), (1, 2, 4) if quick else (1, 4, 16)
    batch = 8 if quick else 64 if device.type == "cpu" else BATCH_PAIRS
    rows = []
    for factor in times:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            listing, out = Path(scratch) / "listing", Path(scratch) / "cohort.h5"
            list_again(root, listing, factor)
            seconds, held = {}, {}

            def prepare_cohort() -> None:
                subprocess.run([sys.executable, prepare_data.__file__, "--source", "mimic",
                                "--root", listing, "--labels", listing / "records_w_diag_icd10.csv",
                                "--fs", "100", "--out", out], check=True, capture_output=True)

            def timed(name: str, call: Callable) -> None:
                began = time.perf_counter()
                held[name] = peak_bytes(call)
                seconds[name] = time.perf_counter() - began
            timed("preparation", prepare_cohort)
            cohort = Cohort(out)
            pairs = select_pairs(cohort, np.flatnonzero(cohort.split == 0), "all", False)
            order = epoch_order(len(pairs), batch, args.seed, 0)

            def some_steps() -> None:
                task = Pretraining(args, cohort, pairs, device)
                optimizer = make_optimizer(task.modules.values(), 1e-3, 5e-4)
                spread = np.linspace(0, len(order) - 1, 4 if quick else 15).astype(int)
                seconds["epoch"] = steady_steps(task, optimizer, order[spread])[0] * len(order)
            held["epoch"] = peak_bytes(some_steps)
            score = np.random.default_rng(0).random(cohort.label.shape, np.float32)
            timed("bootstrap", lambda: evaluate.bootstrap_auroc(cohort.label, score,
                                                                20 if quick else 1000))
            for name in ("preparation", "epoch", "bootstrap"):
                rows.append((name, factor, len(cohort), seconds[name], held[name]))
                print(f"{factor:>3} × demo, {len(cohort):,} records: {name} "
                      f"{duration(seconds[name])}, {held[name] / 1e6:,.0f} MB held", flush=True)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [("stage", "times the demo", "records", "seconds", "bytes held"), *rows])
    replace_file(folder / "growth.csv", table.getvalue().encode())
    draw_growth(rows, folder / "growth.png")


def list_again(root: Path, listing: Path, factor: int) -> None:
    """A folder in MIMIC's layout that lists the records under `root` `factor` times."""
    listing.mkdir()
    (listing / "files").symlink_to((root / "files").resolve())
    replace_file(listing / "demo.json", (root / "demo.json").read_bytes())  # marks it synthetic
    for name in ("record_list.csv", "records_w_diag_icd10.csv"):
        with open(root / name, newline="") as file:
            rows = list(csv.DictReader(file))
        with open(listing / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for again in range(factor):
                for row in rows:
                    ids = {key: int(row[key]) + again * 10**8 for key in ("subject_id", "study_id")
                           if row[key].isdigit()}
                    writer.writerow(row | ids)


def draw_growth(rows: list[tuple], path: Path) -> None:
    """Time and memory against the number of records, beside the line of proportional growth."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for name in ("preparation", "epoch", "bootstrap"):
        _, _, records, seconds, held = zip(*(row for row in rows if row[0] == name))
        label = {"preparation": "preparation (WFDB to cohort)", "epoch": "epoch of pretraining",
                 "bootstrap": "1,000 bootstraps"}[name]
        (line,) = axes[0].loglog(records, seconds, "o-", label=label)
        ideal = [seconds[0] * n / records[0] for n in records]
        axes[0].loglog(records, ideal, ":", color=line.get_color(), linewidth=1)
        axes[1].loglog(records, [max(b, 1) / 1e6 for b in held], "o-", label=label)
    axes[0].set(xlabel="records", ylabel="seconds", title="time (dotted: proportional)")
    axes[1].set(xlabel="records", ylabel="MB", title="memory held, without mapped files")
    for axis in axes:
        axis.grid(True, which="both", alpha=0.2)
        axis.set_xticks(records, [f"{n:,}" for n in records])
        axis.minorticks_off()
    figure.suptitle("Cost of growth, SYNTHETIC demo records listed again", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bench_all(args: argparse.Namespace) -> None:
    """--mode bench: all stages, then growth; writes bench.md, bench.csv, growth.csv, growth.png."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun: --mode bench measures one device; run `python train.py` "
                         "instead")
    device = pick_device(args.device)
    args.device, quick = str(device), args.quick
    folder = Path(args.run or "bench")
    folder = folder if len(folder.parts) > 1 else Path("runs") / folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run {folder}: {error.strerror}; name a folder that can be made") \
            from None
    if (folder / "config.json").exists():
        raise InputError(f"--run {folder}: found a training run there; choose another --run")
    free = shutil.disk_usage(folder).free
    if not quick and free < BENCH_DISK:
        raise InputError(f"--run {folder}: {free / 1e9:.1f} GB of disk are free, the bench needs "
                         f"{BENCH_DISK / 1e9:.0f} GB for a while; name another folder")
    torch.manual_seed(args.seed)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    flags = " --compile" * args.compile + " --quick (too small to mean anything)" * quick
    title = (f"python train.py --mode bench{flags}: {hardware}; {cpu_name()}, "
             f"{torch.get_num_threads()} threads; torch {torch.__version__}, numpy "
             f"{np.__version__}; medians of repeats that take turns, seed {args.seed}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch) / "demo"
        prepare_data.write_demo(root, 40 if quick else prepare_data.DEMO_PATIENTS,
                                workers=os.cpu_count() or 1)
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_data.build("mimic", root, Path(scratch) / "cohort.h5", 100,
                               root / "records_w_diag_icd10.csv")
        bench = Bench(folder, title)
        cohort = Cohort(Path(scratch) / "cohort.h5")
        stages = {"reading records": lambda: bench_reading(bench, root, quick),
                  "batches": lambda: bench_batches(bench, cohort, quick),
                  "the encoder": lambda: bench_step(bench, args, quick),
                  "SIGReg": lambda: bench_sigreg(bench, args, quick),
                  "training": lambda: bench_training(bench, args, quick),
                  "the bootstrap": lambda: bench_bootstrap(bench, quick),
                  "augmentation": lambda: bench_augmentation(bench, args, quick)}
        for name, stage in stages.items():
            print(f"bench: {name}", file=sys.stderr)
            with contextlib.redirect_stdout(io.StringIO()):  # only rows of the table
                stage()
            bench.save()
        print("\nCost of growth", flush=True)
        bench_growth(folder, root, args, quick)
    print(f"\n{folder}: bench.md bench.csv growth.csv growth.png")


def cpu_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return text.partition("model name")[2].splitlines()[0].lstrip("\t :")
    except (OSError, IndexError):
        return platform.processor() or "CPU"


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line of DESIGN section 7: flags, grouped, no abbreviations."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows defaults, but neither None nor False, and keeps the docstring's lines."""

        def _get_help_string(self, action: argparse.Action) -> str | None:
            plain = action.default is None or action.default is False
            return action.help if plain else super()._get_help_string(action)

    class OneOrMore(argparse.Action):
        """Stores one value as itself, several as a list."""

        def __call__(self, parser, namespace, values, option_string=None) -> None:
            setattr(namespace, self.dest, values[0] if len(values) == 1 else values)

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--mode", required=True,
                        choices=["pretrain", "finetune", "probe", "reproduce", "bench"],
                        help="what to do; reproduce does the papers' whole matrix and reports, "
                             "bench measures every stage")
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, help="cohort .h5 (unset: data/cohort.h5, else the "
                                                 "demo is built)")
    group.add_argument("--frac", type=float, default=1.0, help="fraction of the training "
                                                               "patients, nested")
    group.add_argument("--labelled-only", action="store_true", help="leave unlabelled records out "
                                                                    "of training")
    group.add_argument("--pairs", choices=["all", "labelled", "between"], default="all",
                       help="pretrain on all pairs, on those of two labelled records, or between "
                            "stays")
    group.add_argument("--cache", choices=["auto", "disk", "ram", "gpu"], default="auto",
                       help="where the signals are held")
    group = parser.add_argument_group("model")
    group.add_argument("--objective", choices=["dynamics", "invariance"], default="dynamics",
                       help="predict the next state from state and action, or from the state alone")
    group.add_argument("--action", choices=["coded", "state", "none"], default="coded",
                       help="label change, true state change (demo only), or zeros")
    group.add_argument("--residual", action="store_true", help="z_pred = z + MLP (paper A's text)")
    group.add_argument("--z-dim", type=int, default=256, help="width of z")
    group.add_argument("--normalize", choices=["zscore", "none"], default="zscore",
                       help="input scaling; none keeps mV (a probe takes its encoder's)")
    group.add_argument("--init", help="RUN, scratch (finetune: the supervised baseline) or random "
                                      "(probe: an untrained encoder); unset: the pretraining of "
                                      "the same cohort, fraction and seed")
    group.add_argument("--head", choices=["linear", "mlp"], default="linear", help="probe of "
                                                                                   "paper A or of "
                                                                                   "B")
    group.add_argument("--features", choices=["h", "z"], help="what is probed (unset: linear h, "
                                                              "mlp z)")
    group.add_argument("--augment", choices=["none", "dynamics", "smote", "oversample"],
                       default="none", help="synthetic rows for the mlp head")
    group.add_argument("--class-weight", choices=["none", "5", "full"],
                       help="cap on neg/pos weights of the mlp head (unset: 5)")
    group.add_argument("--min-count", type=int, default=50, help="rarest label combination "
                                                                 "synthesised")
    group.add_argument("--total", type=int, help="synthetic rows (unset: 2,000,000; laptop "
                                                 "preset: 2.77 a real row)")
    group = parser.add_argument_group("loss")
    group.add_argument("--reg", choices=["sigreg", "vicreg"], default="sigreg",
                       help="against collapse")
    group.add_argument("--lam", type=float, default=0.1, help="weight of SIGReg")
    group.add_argument("--slices", type=int, default=256, help="random directions of SIGReg")
    group = parser.add_argument_group("optimisation (unset: the papers' recipe or the laptop "
                                      "preset)")
    group.add_argument("--epochs", type=int, help="passes over the training items")
    group.add_argument("--batch-size", type=int, help="pairs (pretrain) or records a step")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--schedule", choices=["cosine", "onecycle"], help="learning-rate schedule")
    group.add_argument("--paper", action="store_true", help="the papers' epochs and batch size, "
                                                            "wherever it runs")
    group.add_argument("--quick", action="store_true", help="a smoke run: very few epochs")
    group = parser.add_argument_group("run")
    group.add_argument("--run", help="name under runs/, or a path (unset: made from the flags)")
    group.add_argument("--seed", type=int, nargs="+", default=0, metavar="SEED", action=OneOrMore,
                       help="of patients, weights, batches and directions; reproduce takes several")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    group.add_argument("--deterministic", action="store_true", help="deterministic kernels only")
    group.add_argument("--resume", action="store_true", help="finished runs: say so and exit 0")
    group.add_argument("--overwrite", action="store_true", help="move an old run folder aside and "
                                                                "start anew")
    group.add_argument("--allow-tiny", action="store_true", help="pretrain on fewer than "
                                                                 f"{MIN_PAIRS} pairs")
    group.add_argument("--checkpoint-minutes", type=float, default=10.0, help="between "
                                                                              "checkpoints in an "
                                                                              "epoch")
    return parser


def prepare(args: argparse.Namespace, parser: argparse.ArgumentParser, cohort: Cohort,
            device: torch.device) -> tuple:
    """Everything that can be wrong with the input, found before a run folder is touched."""
    if args.cache == "gpu" and device.type == "cpu":
        raise InputError("--cache gpu: the device is the CPU; leave --cache out")
    for split, name in ((1, "validation"), (2, "test")):
        if not (cohort.split == split).any():
            raise InputError(f"{cohort.path}: found no {name} record; every run is judged on them: "
                             "prepare a cohort with more patients")
    name = (args.run or run_name(args, parser, cohort.name)).rstrip("/" + os.sep)
    path = Path(name) if os.sep in name else Path("runs") / name
    init = find_init(args, cohort)
    torch.manual_seed(args.seed)
    start = load_start(init, args, cohort)
    if args.mode == "probe":
        args.features = args.features or {"linear": "h", "mlp": "z"}[args.head]
        args.class_weight = args.class_weight or ("5" if args.head == "mlp" else None)
    rows = training_rows(cohort, args.frac, args.seed, args.labelled_only)
    pairs = select_pairs(cohort, rows, args.pairs, args.labelled_only)
    if args.mode == "pretrain":
        changed = int((action_of(cohort, pairs, args.action) != 0).any(dim=1).sum())
        print(f"pairs: {len(pairs)} for training, {changed} of them with an action")
        least, force = (2, "") if args.allow_tiny else (MIN_PAIRS, ", or give --allow-tiny")
        if len(pairs) < least:
            raise InputError(f"--frac {args.frac:g}: found {len(pairs)} training pairs, wanted at "
                             f"least {least} for SIGReg to mean anything; raise --frac or prepare "
                             f"more patients{force}")
    elif len(rows) < 2:
        raise InputError(f"--frac {args.frac:g}: found {len(rows)} training records, wanted at "
                         "least 2; raise --frac or prepare more patients")
    n = len(pairs) if args.mode == "pretrain" else len(rows)
    recipe = resolve(args, cohort, device, n)
    batch_size = global_batch(args, n)
    if batch_size < 2 * world_size():
        raise InputError(f"--batch-size: found {min(args.batch_size, n)} items for {world_size()} "
                         "ranks, wanted at least 2 for each; raise it or start fewer processes")
    if batch_size < min(args.batch_size, n):
        print(f"batch size: {batch_size}, the largest multiple of {world_size()} ranks")
    plan = plan_augmentation(args, cohort, rows) if args.augment != "none" else None
    return path, init, start, recipe, rows, pairs, plan


def train(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """One run: config -> data -> run folder -> train -> predictions -> summary."""
    began = time.monotonic()
    check_arguments(args, parser)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    torch.use_deterministic_algorithms(args.deterministic)
    device = pick_device(args.device)
    join_ranks(device)
    if world_size() > 1 and args.mode == "probe":
        raise InputError("torchrun: a probe trains on one device; run `python train.py` instead")
    on_first_rank(lambda: open_cohort(args.data).sha256)  # builds the demo cohort if there is none
    cohort = open_cohort(args.data)
    print(f"cohort: {cohort.path} ({'SYNTHETIC' if cohort.synthetic else 'real'}, "
          f"{cohort.source}), {len(cohort)} records, {len(cohort.class_name)} classes, {cohort.fs} "
          f"Hz; device {device}")
    path, init, start, recipe, rows, pairs, plan = prepare(args, parser, cohort, device)
    config = describe(args, cohort, rows, pairs, init)
    run = on_first_rank(lambda: Run(path, config, args.resume, args.overwrite))
    if run.finished:
        print(f"{path}: finished already; results: {path / 'predictions_test.npz'}")
        return
    if args.mode == "pretrain":
        scores = pretrain(run, args, recipe, cohort, pairs, device)
    elif args.mode == "finetune":
        scores = finetune(run, args, recipe, cohort, rows, start, device)
    else:
        scores = probe(run, args, recipe, cohort, rows, start, plan, device)
    if rank() == 0:
        write_predictions(run, cohort, scores)
    summarise(run, args, cohort, scores, time.monotonic() - began)


# ----------------------------------------------------------------------------------------------
# Reproduce: both papers' matrix for one cohort, composed of this script's own commands
# ----------------------------------------------------------------------------------------------


def study_runs(args: argparse.Namespace, cohort: Cohort, folder: Path) -> dict[str, list[str]]:
    """Name and command line of every run of a study, in order; all lie under `folder`.

    Paper A: five pretrainings, linear probe and finetuning of each, supervised at each fraction.
    Paper B: the MLP probe on z and on h, with dynamics and with SMOTE-style rows. Controls: an
    untrained encoder, oversampling, full class weights and, where it is known, the true state
    change as action.
    """
    runs: dict[str, list[str]] = {}
    shared = ["--data", str(cohort.path), "--device", args.device, "--cache", args.cache,
              "--checkpoint-minutes", f"{args.checkpoint_minutes:g}", "--resume"]
    for name in ("paper", "quick", "labelled_only", "deterministic"):
        shared += ["--" + name.replace("_", "-")] * getattr(args, name)
    augment = ["--min-count", str(args.min_count)]
    augment += ["--total", str(args.total)] if args.total else []
    mlp = ["--mode", "probe", "--head", "mlp"]
    for seed in args.seed:
        def add(name: str, flags: list[str], start: str | None = None, frac: float = 1.0) -> None:
            at = (f"-frac{frac:g}" if frac != 1 else "") + (f"-seed{seed}" if seed else "")
            own = ["--frac", f"{frac:g}"] if frac != 1 else []
            own += ["--seed", str(seed)] if seed else []
            own += ["--init", str(folder / (start + at))] if start else []
            own += ["--compile"] if args.compile and "probe" not in flags else []
            runs[name + at] = [*flags, *own, "--run", str(folder / (name + at)), *shared]

        def pretrained(name: str, flags: list[str], frac: float = 1.0) -> None:
            add(f"pretrain-{name}", ["--mode", "pretrain", *flags], None, frac)
            add(f"probe-{name}", ["--mode", "probe"], f"pretrain-{name}", frac)
            add(f"finetune-{name}", ["--mode", "finetune"], f"pretrain-{name}", frac)

        for frac in (1.0, 0.1, 0.01):
            pretrained("dynamics", [], frac)
            add("supervised", ["--mode", "finetune", "--init", "scratch"], None, frac)
            add("probe-untrained", ["--mode", "probe", "--init", "random"], None, frac)
            if frac == 1:
                add("mlp-z", mlp, "pretrain-dynamics")
                add("mlp-h", [*mlp, "--features", "h"], "pretrain-dynamics")
                add("mlp-full-weights", [*mlp, "--class-weight", "full"], "pretrain-dynamics")
                for kind in ("dynamics", "smote", "oversample"):
                    add(f"mlp-{kind}", [*mlp, "--augment", kind, *augment], "pretrain-dynamics")
        pretrained("invariance", ["--objective", "invariance"])
        pretrained("vicreg", ["--reg", "vicreg"])
        if cohort.state is not None:
            add("pretrain-state", ["--mode", "pretrain", "--action", "state"])
            add("mlp-state", [*mlp, "--augment", "dynamics", *augment], "pretrain-state")
    return runs


def pace(cohort: Cohort, device: torch.device) -> dict[str, float]:
    """Seconds for a record in training, a record embedded and a row of the MLP probe, as of now."""
    encoder = fast_encoder(cardiowm.XResNet1d50(len(cohort.leads)).to(device))
    head = cardiowm.MLPProbe(cardiowm.H_DIM, len(cohort.class_name)).to(device)
    x = torch.randn(64, len(cohort.leads), cohort.signal.shape[2], device=device)
    z = torch.randn(256, cardiowm.H_DIM, device=device)

    def train_step() -> None:
        with autocast(device):
            encoder(x).sum().backward()

    @torch.no_grad()
    def embed_step() -> None:
        encoder(x)

    optimizer = make_optimizer([head], 1e-4, 0.0)
    steps = {"train": (train_step, len(x)), "embed": (embed_step, len(x)),
             "row": (lambda: descend(head(z).square().mean(), optimizer), len(z))}
    found = {}
    for name, (step, items) in steps.items():
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            step()
            wait_for(device)
            seconds.append(time.perf_counter() - began)
        found[name] = min(seconds[1:]) / items
    return found


def expect(argv: list[str], parser: argparse.ArgumentParser, cohort: Cohort, device: torch.device,
           speed: dict[str, float]) -> tuple[float, str]:
    """Seconds that a run will take, roughly, and what it works on; prints nothing.

    Encoder and MLP probe are counted, an early stop and all that is small beside them are not.
    """
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        check_arguments(args, parser)
        rows = training_rows(cohort, args.frac, args.seed, args.labelled_only)
        pairs = select_pairs(cohort, rows, args.pairs, args.labelled_only)
        n = len(pairs) if args.mode == "pretrain" else len(rows)
        resolve(args, cohort, device, max(n, 1))
    val, test = (int((cohort.split == k).sum()) for k in (1, 2))
    size = max(1, min(args.batch_size, n))
    if args.mode == "pretrain":
        if n < MIN_PAIRS:
            return 0.0, f"{n} pairs: too few, wanted {MIN_PAIRS}"
        again = 2 * min(RECALIBRATE_BATCHES, n // size) * size
        seconds = args.epochs * (2 * n * speed["train"] + (again + val) * speed["embed"])
        return seconds + (val + test) * speed["embed"], f"{n:,} pairs, {args.epochs} epochs"
    if args.mode == "finetune":
        again = min(RECALIBRATE_BATCHES, n // size) * size
        seconds = args.epochs * (n * speed["train"] + (again + val) * speed["embed"])
        return seconds + test * speed["embed"], f"{n:,} records, {args.epochs} epochs"
    synthetic, real = SYNTHETIC_ROWS
    total = 0 if args.augment == "none" else args.total or (
        synthetic if args.preset == "paper" else round(synthetic / real * n))
    seconds = (n + val + test) * speed["embed"]
    seconds += args.epochs * (n + total) * speed["row"] * (args.head == "mlp")
    return seconds, f"{n + total:,} rows, at most {args.epochs} epochs"


def open_study(args: argparse.Namespace, cohort: Cohort) -> tuple[Path, dict]:
    """The folder of a study and what study.json says of it; InputError if it is of another kind."""
    changed = "".join(f"-{name.replace('_', '-')}" for name in ("paper", "quick", "labelled_only")
                      if getattr(args, name))
    folder = Path(args.run or f"{cohort.name}-reproduce{changed}")
    folder = folder if len(folder.parts) > 1 else Path("runs") / folder
    if (folder / "config.json").exists():
        raise InputError(f"--run {folder}: found a training run there; choose another --run")
    kept = ("paper", "quick", "labelled_only", "min_count", "total", "deterministic")
    study = {"cohort": cohort.sha256} | {name: getattr(args, name) for name in kept}
    old = study | {"runs": {}}
    if (folder / "study.json").exists():
        old = json.loads((folder / "study.json").read_text())
        for name, value in study.items():
            if old.get(name) != value:
                raise InputError(f"--run {folder}: holds a study with {name} = {old.get(name)}, "
                                 f"asked for {value}; choose another --run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run {folder}: {error.strerror}; name a folder that can be made") \
            from None
    return folder, old


def reproduce(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """--mode reproduce: plan, every run that is not yet complete, then the report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun: --mode reproduce runs on one device; run `python train.py` "
                         "instead, or its commands (study.json lists them) under torchrun")
    device = pick_device(args.device)
    cohort = open_cohort(args.data)
    args.paper |= device.type == "cuda" and not args.quick
    folder, study = open_study(args, cohort)
    runs = study_runs(args, cohort, folder)
    kind = "SYNTHETIC" if cohort.synthetic else "real"
    print(f"study {folder}: {len(runs)} runs of the {kind} cohort {cohort.name}, {len(cohort):,} "
          f"records, seeds {' '.join(map(str, args.seed))}, on {device}")
    speed = pace(cohort, device)
    plan = {name: expect(argv, parser, cohort, device, speed) for name, argv in runs.items()}
    done = {name for name in runs if (folder / name / "predictions_test.npz").exists()}
    for name, (seconds, what) in plan.items():
        cost = "-" if "too few" in what else f"~ {duration(seconds)}"
        print(f"  {name:<32} {'complete' if name in done else cost:>10}  {what}")
    left = sum(plan[name][0] for name in runs if name not in done)
    print(f"  {len(runs) - len(done)} to do: about {duration(left)} at the speed measured just "
          "now, then the report", flush=True)
    for name, argv in runs.items():
        study["runs"].setdefault(name, {"command": ["python", "train.py", *argv], "seconds": None,
                                        "reason": "not reached", "what": plan[name][1]})
    began, expected = time.monotonic(), 0.0
    for i, (name, argv) in enumerate(runs.items(), 1):
        took = time.monotonic()
        remaining = (left - expected) * (took - began) / expected if expected else left
        print(f"\nrun {i} of {len(runs)}: {name}; about {duration(remaining)} left\n"
              f"  python train.py {' '.join(argv)}", flush=True)
        start = parser.parse_args(argv).init
        start = Path(start).name if start not in (None, "scratch", "random") else None
        if "too few" in plan[name][1]:
            reason = plan[name][1]
        elif start and study["runs"][start]["reason"]:
            reason = f"{start} has {study['runs'][start]['reason']}"
        else:
            reason = study_run(argv, parser)
        if reason:
            print(f"not done: {reason}")
        study["runs"][name]["reason"] = reason
        if name not in done:
            study["runs"][name]["seconds"] = round(time.monotonic() - took, 1)
        replace_file(folder / "study.json", json.dumps(study, indent=1).encode())
        expected += 0.0 if name in done else plan[name][0]
    study_report(args, cohort, folder)
    failed = {name: run["reason"] for name, run in study["runs"].items() if run["reason"]}
    print(f"\n{folder}: {len(study['runs']) - len(failed)} of {len(study['runs'])} runs complete, "
          f"in {duration(time.monotonic() - began)}; report: {folder / 'report' / 'report.md'}")
    for name, reason in failed.items():
        print(f"  {name}: {reason}")


def study_run(argv: list[str], parser: argparse.ArgumentParser) -> str:
    """Do one run of a study; returns why it could not be done, "" if it was."""
    if "--compile" in argv:
        torch._dynamo.reset()  # what was compiled for another run is of no use to this one
    try:
        train(parser.parse_args(argv), parser)
        return ""
    except (InputError, Diverged, torch.OutOfMemoryError) as error:
        return str(error).splitlines()[0]


def study_report(args: argparse.Namespace, cohort: Cohort, folder: Path) -> None:
    """Every table and figure of evaluate.py for a study, and report.md, which holds them all."""
    report, first = folder / "report", f"-seed{args.seed[0]}" if args.seed[0] else ""
    finished = {path.parent.name for path in folder.glob("*/predictions_test.npz")}
    models = {kind: str(folder / f"pretrain-{kind}{first}")
              for kind in ("dynamics", "invariance", "vicreg", "state")
              if f"pretrain-{kind}{first}" in finished}
    test = cohort.split == 2
    begins = (cohort.action == 1)[test[cohort.pair[:, 0]]].sum(axis=0)
    begins[np.isin(cohort.class_name, cohort.normal_codes)] = 0
    onset = int(begins.argmax())  # the class that begins most often among the test pairs
    asked = ["--onset", cohort.class_name[onset]]
    pages = [("score", ["--runs", str(folder), *["--labelled-only"] * args.labelled_only])]
    if models:
        pages.append(("worldmodel", ["--runs", *models.values()]))
    if cohort.state is not None:
        pages += [("counterfactual", ["--runs", models[kind]]) for kind in ("dynamics", "state")
                  if kind in models]
    if "dynamics" in models:
        one = np.flatnonzero(test & (cohort.label[:, onset] == 0) & cohort.has_label
                             & (cohort.quality == 0) & begins.any())[:1]
        pages += [("counterfactual", ["--runs", models["dynamics"], "--study-id",
                                      str(cohort.study_id[row]), *asked]) for row in one]
        pages.append(("embedding", ["--runs", models["dynamics"]]))
    pages += [("transitions", asked)] * bool(begins.any()) + [("cohort", [])]
    text = [f"# Study of {'SYNTHETIC' if cohort.synthetic else 'real'} cohort {cohort.name}", ""]
    for i, (mode, flags) in enumerate(pages, 1):
        out = report / f"{i}-{mode}"
        argv = ["--mode", mode, *flags, "--data", str(cohort.path), "--out", str(out)]
        print(f"\npython evaluate.py {' '.join(argv)}", flush=True)
        shutil.rmtree(out, ignore_errors=True)  # of an earlier report, made anew
        code = evaluate.main(argv)
        if code == 130:
            raise KeyboardInterrupt
        if code != 0:
            text += [f"`python evaluate.py {' '.join(argv)}` was not done: see its message.", ""]
            continue
        for page in sorted(out.glob("*.md")):
            text += [page.read_text(encoding="utf-8").rstrip().replace("![](", f"![]({out.name}/"),
                     ""]
        shown = "\n".join(text)
        text += [f"![]({out.name}/{picture.name})\n" for picture in sorted(out.glob("*.png"))
                 if f"({out.name}/{picture.name})" not in shown]
    report.mkdir(exist_ok=True)
    replace_file(report / "report.md", "\n".join(text).encode())


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 after one line for bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_arguments(args, parser)
        if args.mode == "bench":
            bench_all(args)
        elif args.mode == "reproduce":
            reproduce(args, parser)
        else:
            train(args, parser)
    except InputError as error:
        where = f" (rank {rank()})" if rank() else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
