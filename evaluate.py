"""Evaluation of cardiac world models: tables, figures, and a scorecard of the world model itself.

Papers, as cited below:
  A  Action-Conditioned Cardiac World Models, also circulated as Beyond Patient Invariance: Learning
     Cardiac Dynamics via Action-Conditioned JEPAs (ICLR 2026 World Models workshop)
  B  World Model Augmentation for Imbalanced Multi-Label ECG Classification

    python evaluate.py --mode score --runs RUN [RUN ...]      # the papers' tables, Figure 4 of A
    python evaluate.py --mode worldmodel --runs PRETRAINING [...]     # are the dynamics real?
    python evaluate.py --mode counterfactual --runs PRETRAINING       # against the demo's truth
    python evaluate.py --mode counterfactual --runs PRETRAINING --study-id ID --onset I48
    python evaluate.py --mode embedding --runs PRETRAINING    # B, Figure 2
    python evaluate.py --mode transitions --onset I44         # A, Figures 2 and 3
    python evaluate.py --mode cohort                          # A, Figures 5 and 6

RUN is a name under runs/, a folder, or a study of train.py --mode reproduce, which stands for all
of its runs. Tables (.md, .csv) and figures (.png) go to --out; nothing is trained and no run is
changed.
"""

import argparse
import csv
import difflib
import hashlib
import io
import json
import os
import pickle
import re
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path

import numpy as np

from prepare_data import (LEADS, QUALITY, SECONDS, SIGNATURE, Cohort, InputError, Progress, count,
                          decimate, golden_lines, replace_file, simulate)

CHECKPOINT_FORMAT = "cardiowm-1"  # "<project>-<version>", the "format" key of every checkpoint
BOOTSTRAP_SEED = 0  # of every table: two runs are judged on the same resamples
CHECKPOINT_KEYS = ("kind", "model_args", "model", "class_name", "leads", "fs", "normalize")

# The mask in predictions_test.npz that selects a task's records; monitoring takes the whole fold.
# `pairs` is what paper A's code calls monitoring: first records of test pairs.
TASKS = {"triage": "first_in_stay", "monitoring": None, "pairs": "pair_first"}
UNDEFINED = {"triage": "the cohort has no stays", "monitoring": "no test record",
             "pairs": "no test patient has two records"}
TEST_FOLD = {"mimic": 19, "demo": 19, "ptbxl": 10}

# Macro-AUROC [95 % CI] as printed in the papers, all on MIMIC-IV-ECG, fold 19. Key: the text of
# `method` below and the fraction of training patients. A: Tables 1 (100 %), 2 (1 %), 3 (VICReg) and
# Figure 4 (10 %, read off the plot). B: Table 1, no intervals given.
PAPER = {
    ("supervised", 1.0): {"triage": "A 0.735 [0.727-0.751]",
                          "monitoring": "A 0.786 [0.776-0.797], B 0.772"},
    ("linear probe, invariance", 1.0): {"triage": "A 0.666 [0.656-0.682]",
                                        "monitoring": "A 0.698 [0.689-0.709]"},
    ("finetuned, invariance", 1.0): {"triage": "A 0.679 [0.668-0.697]",
                                     "monitoring": "A 0.726 [0.715-0.737]"},
    ("linear probe, dynamics", 1.0): {"triage": "A 0.725 [0.714-0.742]",
                                      "monitoring": "A 0.744 [0.734-0.755]"},
    ("finetuned, dynamics", 1.0): {"triage": "A 0.742 [0.733-0.756]",
                                   "monitoring": "A 0.786 [0.777-0.794], B 0.789"},
    ("finetuned, dynamics, vicreg", 1.0): {"triage": "A 0.720 [0.710-0.738]",
                                           "monitoring": "A 0.770 [0.759-0.780]"},
    ("supervised", 0.01): {"triage": "A 0.515 [0.500-0.526]",
                           "monitoring": "A 0.503 [0.491-0.514]"},
    ("linear probe, dynamics", 0.01): {"triage": "A 0.563 [0.551-0.575]",
                                       "monitoring": "A 0.575 [0.560-0.591]"},
    ("finetuned, dynamics", 0.01): {"triage": "A 0.510 [0.498-0.525]",
                                    "monitoring": "A 0.507 [0.497-0.519]"},
    ("supervised", 0.1): {"triage": "A 0.64"},
    ("finetuned, dynamics", 0.1): {"triage": "A 0.69"},
    ("mlp probe on z, dynamics", 1.0): {"monitoring": "B 0.687"},
    ("mlp probe on z + dynamics augmentation, dynamics", 1.0): {"monitoring": "B 0.743"},
}

# Tables of the papers: title, fraction, tasks, rows by the text of `method`
PAPER_TABLES = (
    ("Paper A, Table 1: all patients", 1.0, ("triage", "monitoring"), (
        "supervised", "linear probe, invariance", "finetuned, invariance",
        "linear probe, dynamics", "finetuned, dynamics")),
    ("Paper A, Figure 4: 10 % of the patients", 0.1, ("triage", "monitoring"), (
        "supervised", "linear probe, dynamics", "finetuned, dynamics")),
    ("Paper A, Table 2: 1 % of the patients", 0.01, ("triage", "monitoring"), (
        "supervised", "linear probe, dynamics", "finetuned, dynamics")),
    ("Paper A, Table 3: SIGReg or VICReg", 1.0, ("triage", "monitoring"), (
        "finetuned, dynamics", "finetuned, dynamics, vicreg", "linear probe, dynamics",
        "linear probe, dynamics, vicreg")),
    ("Paper B, Table 1: augmentation by the world model", 1.0, ("monitoring",), (
        "supervised", "finetuned, dynamics", "mlp probe on z, dynamics",
        "mlp probe on z + dynamics augmentation, dynamics",
        "mlp probe on z + smote augmentation, dynamics", "mlp probe on h, dynamics")))
CONTROL_METHODS = ("linear probe, untrained encoder",)  # in every table
EXTRA_METHODS = (                                       # and in B's, beside any augmentation
    "mlp probe on z + oversample augmentation, dynamics",
    "mlp probe on z, dynamics, --class-weight full",
    "mlp probe on z + dynamics augmentation, dynamics, --action state")
GAP_FROM, GAP_TO = "mlp probe on z, dynamics", "finetuned, dynamics"  # B recovers 55 % of this gap

# What the papers conclude: text, paper, task, the method said to be better, the other, fraction
CLAIMS = (
    *((f"dynamics >= naive, {how}", "A, Table 1", task, f"{how}, dynamics", f"{how}, invariance",
       1.0) for how in ("linear probe", "finetuned") for task in ("triage", "monitoring")),
    ("finetuned > supervised", "A, Table 1", "triage", "finetuned, dynamics", "supervised", 1.0),
    ("finetuned > supervised", "A, Figure 4", "triage", "finetuned, dynamics", "supervised", 0.1),
    *(("SIGReg > VICReg", "A, Table 3", task, "finetuned, dynamics", "finetuned, dynamics, vicreg",
       1.0) for task in ("triage", "monitoring")),
    *(("probe > finetuned", "A, Table 2", task, "linear probe, dynamics", "finetuned, dynamics",
       0.01) for task in ("triage", "monitoring")),
    ("augmented > real rows only", "B, Table 1", "monitoring",
     "mlp probe on z + dynamics augmentation, dynamics", "mlp probe on z, dynamics", 1.0),
    ("finetuned > supervised", "B, Table 1", "monitoring", "finetuned, dynamics", "supervised",
     1.0))
# Arguments in which two runs of one method may differ: those that say where, not what
FREE_SETTINGS = {"seed", "run", "init", "data", "cache", "device", "resume", "overwrite",
                 "checkpoint_minutes", "compile", "allow_tiny"}
# Rows of the per-class table, the sub-groups and the forest plot, where they are among the runs
MAIN_METHODS = ("supervised", "finetuned, dynamics", "linear probe, dynamics",
                "linear probe, untrained encoder")

# ----------------------------------------------------------------------------------------------
# AUROC by midranks and its bootstrap (A and B report macro-AUROC with 95 % bootstrap intervals)
# ----------------------------------------------------------------------------------------------


def _checked(y_true, y_score) -> tuple[np.ndarray, np.ndarray]:
    """Both as (N, K) arrays, labels as bool; ValueError for what has no AUROC."""
    y_true, y_score = np.asarray(y_true), np.asarray(y_score)
    if y_true.shape != y_score.shape or y_true.ndim not in (1, 2) or y_true.size == 0:
        raise ValueError("y_true and y_score must be two non-empty arrays of one shape (N, K) or "
                         f"(N,), found {y_true.shape} and {y_score.shape}")
    if not ((y_true == 0) | (y_true == 1)).all():
        raise ValueError("y_true must hold 0 and 1 only")
    if y_score.dtype.kind not in "fiub":
        raise ValueError(f"y_score must be real numbers, found dtype {y_score.dtype}")
    if np.isnan(y_score).any():
        raise ValueError(f"y_score holds {np.isnan(y_score).sum():,} NaN")
    n = len(y_true)
    return y_true.reshape(n, -1).astype(bool), y_score.reshape(n, -1)


def _tie_groups(y: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sort one class: the order (N,), and of each group of tied scores start, size, positives."""
    order = np.argsort(score)  # not stable: within a tie the order is of no consequence
    ranked = score[order]
    start = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    size = np.diff(start, append=len(order))
    positives = np.add.reduceat(y[order], start, dtype=np.int64)
    return order, start, size, positives


def auroc(y_true: np.ndarray, y_score: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class, ties by midranks.

    Args: y_true (N, K) or (N,) of 0 and 1, any dtype; y_score of the same shape, any real score.
    Returns: (K,) float64 in [0, 1]; NaN for a class without positives or without negatives.
    Raises: ValueError for NaN scores, other labels than 0 and 1, shapes that differ.
    Source: AUROC = (sum of the positives' midranks - P (P + 1) / 2) / (P N) (Hanley & McNeil 1982).
    """
    y_true, y_score = _checked(y_true, y_score)
    result = np.full(y_true.shape[1], np.nan)
    for k in range(y_true.shape[1]):
        _, start, size, positives = _tie_groups(y_true[:, k], y_score[:, k])
        n_pos = int(positives.sum())
        n_neg = len(y_true) - n_pos
        if n_pos and n_neg:
            midrank = start + (size + 1) / 2  # the group holds the ranks start + 1 .. start + size
            result[k] = (positives @ midrank - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    return result


def macro_auroc(y_true: np.ndarray, y_score: np.ndarray) -> float:
    """Mean of `auroc` over the classes where it is defined; NaN when it is defined for none."""
    return float(_mean_defined(auroc(y_true, y_score)[None])[0])


def _mean_defined(values: np.ndarray) -> np.ndarray:
    """(R, K) -> (R,): mean over K without the NaN; NaN for a row of NaN."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is wanted
        return np.where(defined, values, 0).sum(axis=1) / defined.sum(axis=1)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the values that are not NaN."""
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (np.nan, np.nan)


def _rank_plan(y: np.ndarray, score: np.ndarray, row_unit: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a weighted AUROC of one class needs, so that the sort is paid once, not per replicate.

    The sorted records are cut into S steps, in each of which every negative lies below every
    positive, or all are tied: between two positives of different rank nothing is to be told apart,
    so S is near the number of the rarer kind. Returns units (N,) int32, negatives first; offsets
    (2 S,) of the S negative and the S positive bags in it; tied (S, 1) float32, 0.5 where tied.
    """
    order, _, size, positives = _tie_groups(y, score)
    has_pos, has_neg = positives > 0, positives < size
    mixed = has_pos & has_neg
    new = mixed.copy()
    new[0] = True
    new[1:] |= mixed[:-1] | (has_neg[1:] & has_pos[:-1])
    step = np.repeat(np.cumsum(new) - 1, size)  # (N,) of each sorted record
    steps = int(step[-1]) + 1
    order_y = y[order]
    units = np.concatenate([row_unit[order[~order_y]], row_unit[order[order_y]]])
    bag = np.concatenate([step[~order_y], steps + step[order_y]])  # non-decreasing
    offsets = np.searchsorted(bag, np.arange(2 * steps))
    return (units.astype(np.int32), offsets.astype(np.int32),
            0.5 * mixed[new, None].astype(np.float32))


def _weighted_auroc(plans: list, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
    """AUROC (R, K) when unit i of size[i] records occurs counts[i, r] times; NaN if undefined."""
    import torch
    weight = torch.from_numpy(counts)  # (units, R)
    result, records = np.empty((counts.shape[1], len(plans))), size @ counts  # (R, K), (R,)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the calls are short: on a busy machine threads made them 30x slower
    try:
        for k, (units, offsets, tied) in enumerate(plans):
            # A row of `sums` is one bag's number of records in every replicate: whole numbers.
            sums = torch.nn.functional.embedding_bag(
                torch.from_numpy(units), weight, torch.from_numpy(offsets), mode="sum").numpy()
            negative, positive = sums[:len(tied)], sums[len(tied):]  # (S, R) each
            below = np.cumsum(negative, axis=0)
            n_neg = below[-1].astype(np.float64)
            below -= tied * negative  # a tie counts one half
            wins = np.einsum("sr,sr->r", positive, below, dtype=np.float64)
            with np.errstate(invalid="ignore"):  # 0 / 0: a replicate without either kind
                result[:, k] = wins / (n_neg * (records - n_neg))
    finally:
        torch.set_num_threads(threads)
    return result


def bootstrap_auroc(y_true: np.ndarray, y_score: np.ndarray, n_boot: int = 1000, seed: int = 0,
                    unit: np.ndarray | None = None, block: int = 64) -> dict:
    """Macro- and per-class AUROC with percentile 95 % bootstrap intervals.

    Args: y_true, y_score as `auroc`, (N, K). unit: None resamples records, as the papers; (N,) ids,
        e.g. subject_id, resample whole patients, numbered in the order of np.unique(unit).
        Replicate r takes the r-th draw of np.random.default_rng(seed).integers(0, n, n), n records
        or n patients. block: replicates at a time (memory: 4 n block bytes), without effect on the
        result.
    Returns: dict(point, low, high: float; replicates: (n_boot,) macro-AUROC; class_replicates:
        (n_boot, K), NaN where undefined; per_class: (K, 3) point, low, high). A class undefined in
        a replicate leaves that replicate's mean.
    Raises: ValueError as `auroc`, for n_boot < 1 and for a unit that is not (N,).
    """
    y_true, y_score = _checked(y_true, y_score)
    unit = np.arange(len(y_true)) if unit is None else np.asarray(unit)
    if unit.shape != (len(y_true),) or n_boot < 1:
        raise ValueError(f"unit must be ({len(y_true)},) and n_boot at least 1, "
                         f"found {unit.shape} and {n_boot}")
    _, row_unit, size = np.unique(unit, return_inverse=True, return_counts=True)
    n = len(size)
    plans = [_rank_plan(y_true[:, k], y_score[:, k], row_unit) for k in range(y_true.shape[1])]
    # float32 holds the half-integers of `below` exactly up to 2**23 records in a replicate.
    dtype = np.float32 if n * int(size.max()) < 2**23 else np.float64
    point = _weighted_auroc(plans, np.ones((n, 1), dtype), size)[0]
    rng = np.random.default_rng(seed)
    classes = np.empty((n_boot, len(plans)))
    for start in range(0, n_boot, block):
        counts = np.empty((min(block, n_boot - start), n), dtype)
        for row in counts:
            row[:] = np.bincount(rng.integers(0, n, n), minlength=n)
        classes[start:start + block] = _weighted_auroc(
            plans, np.ascontiguousarray(counts.T), size)
    replicates = _mean_defined(classes)
    low, high = _interval(replicates)
    intervals = [_interval(column) for column in classes.T]
    return {"point": float(_mean_defined(point[None])[0]), "low": low, "high": high,
            "replicates": replicates, "class_replicates": classes,
            "per_class": np.column_stack([point, intervals])}


# ----------------------------------------------------------------------------------------------
# Checkpoints and runs, as train.py writes them
# ----------------------------------------------------------------------------------------------


def file_kind(path: str | Path) -> str:
    """What a file is, in words, judged by its first bytes and never by its name."""
    path = Path(path)
    if path.is_dir():
        return "a run folder" if (path / "config.json").is_file() else "a folder"
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, as cohorts are"
    if head.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError):
            return "a truncated zip file (checkpoint or npz)"
        if any(name.endswith("data.pkl") for name in names):
            return "a PyTorch file"
        return "an npz file" if any(n.endswith(".npy") for n in names) else "a zip file"
    try:
        head[:-4].decode("utf-8")  # less the bytes of a character that the cut may have split
        return "a text file" if b"\0" not in head else "a binary file of another kind"
    except UnicodeDecodeError:
        return "a binary file of another kind"


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of train.py onto the CPU; tensors and plain values only, no code runs.

    Returns: dict with at least format, kind ("worldmodel", "classifier", "probe"), model_args,
        model (state dict), class_name, leads, fs (Hz), normalize; step, epoch and more beside.
    Raises: InputError naming what was found when it is not a checkpoint of this format.
    """
    import torch
    path, wanted = Path(path), f"a checkpoint ({CHECKPOINT_FORMAT}, e.g. RUN/last.pt) is wanted"
    if not path.exists():
        raise InputError(f"{path}: no such file; {wanted}")
    kind = file_kind(path)
    if kind != "a PyTorch file":
        raise InputError(f"{path} is {kind}; {wanted}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} is a PyTorch file that holds more than tensors and plain values, "
                         f"and is not unpickled; {wanted}") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path} is a damaged PyTorch file ({type(error).__name__}); "
                         f"{wanted}") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if not isinstance(found, str) or not found.startswith("cardiowm-"):
        raise InputError(f"{path} is a PyTorch file of another project (no format key); {wanted}")
    if found != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is a checkpoint of format {found}; {CHECKPOINT_FORMAT} is wanted:"
                         " train again, or use the version of the code that wrote it")
    missing = [key for key in CHECKPOINT_KEYS if key not in checkpoint]
    if missing:
        raise InputError(f"{path} is a checkpoint without {', '.join(missing)}; {wanted}")
    return checkpoint


def find_run(name: str | Path, root: str | Path = "runs") -> Path:
    """The folder of a run, given its name under `root` or a path; InputError when there is none."""
    for folder in (Path(root) / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    found = [folder for folder in (Path(root) / name, Path(name)) if folder.exists()]
    runs = sorted((path.parent.name for path in Path(root).glob("*/config.json")), key=lambda run: (
        -difflib.SequenceMatcher(None, run, str(name)).ratio(), run))
    what = f"{found[0]} is {file_kind(found[0])}, not a run folder" if found else "no such run"
    known = ", ".join(runs[:10]) + (f" and {len(runs) - 10} more" if len(runs) > 10 else "")
    raise InputError(f"run {str(name)!r}: {what}; wanted is a name under {root}/ or the path of a "
                     f"folder with config.json; runs there, closest first: {known or 'none'}")


def load_run(folder: Path) -> dict:
    """A finished run: name, path, config, method, frac, seed and the arrays of its predictions."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        args, cohort = config["args"], config["cohort"]
        run = {"name": folder.name, "path": folder, "config": config, "mode": args["mode"],
               "method": method(config), "frac": float(args["frac"]),
               "seed": args["seed"], "preset": args.get("preset"), "source": cohort["source"],
               "sha256": cohort["sha256"],
               "cohort": cohort["name"], "synthetic": bool(cohort["synthetic"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is damaged or not of train.py ({error!r}); "
                         "train the run again with --overwrite") from None
    path = folder / "predictions_test.npz"
    if not path.is_file():
        raise InputError(f"run {folder}: unfinished, there is no {path.name}; repeat the train.py "
                         "command that began it with --resume (its flags are in config.json)")
    try:
        with np.load(path, allow_pickle=False) as file:
            run |= {key: file[key] for key in (
                "y_true", "y_score", "study_id", "subject_id", "class_name", "first_in_stay",
                "pair_first", "has_label")}
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}; predictions of train.py are wanted") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and "
                         "repeat the train.py command with --resume") from None
    shape, vectors = run["y_true"].shape, ("study_id", "subject_id", "first_in_stay", "pair_first",
                                           "has_label")
    if (len(shape) != 2 or 0 in shape or run["y_score"].shape != shape
            or run["class_name"].shape != shape[1:]
            or any(run[key].shape != shape[:1] for key in vectors)):
        raise InputError(f"{path}: the arrays do not fit together: "
                         + ", ".join(f"{key} {run[key].shape}" for key in (
                             "y_true", "y_score", "class_name", *vectors)))
    if np.isnan(run["y_score"]).any():
        raise InputError(f"{path}: y_score holds {np.isnan(run['y_score']).sum():,} NaN: the "
                         "training diverged; train again, e.g. with a lower --lr")
    return run


def method(config: dict) -> str:
    """What a run does, in the words of PAPER; whatever departs from the papers is appended.

    Objective, regulariser and the like belong to the pretraining, whose arguments config["init"]
    holds.
    """
    args = config["args"]
    source = config["init"]["args"] if config["init"] else args
    mlp = args["mode"] == "probe" and args.get("head") == "mlp"
    words = {"pretrain": "online probe", "finetune": "finetuned",
             "probe": "mlp probe" if mlp else "linear probe"}[args["mode"]]
    if args["mode"] == "probe":
        features, augment = args.get("features") or "h", args.get("augment") or "none"
        words += " on z" if features == "z" else " on h" if mlp else ""  # A probes h, B probes z
        words += "" if augment == "none" else f" + {augment} augmentation"
    usual = {"normalize": "zscore", "labelled_only": False}
    usual |= {"class_weight": "5"} if mlp else {}  # B: pos_weight = min(negatives / positives, 5)
    changed = [(key, args.get(key), value) for key, value in usual.items()]
    if args["mode"] != "pretrain" and args.get("init") in ("scratch", "random"):
        words = "supervised" if args["init"] == "scratch" else f"{words}, untrained encoder"
    else:
        objective, reg = source.get("objective", "dynamics"), source.get("reg", "sigreg")
        words += f", {objective}" + ("" if reg == "sigreg" else f", {reg}")
        usual = {"residual": False, "z_dim": 256, "pairs": "all"}
        usual |= {"action": "coded"} if objective == "dynamics" else {}
        usual |= {"lam": 0.1, "slices": 256} if reg == "sigreg" else {}
        changed += [(key, source.get(key), value) for key, value in usual.items()]
        if config["init"]:
            frac = float(source.get("frac", 1.0))
            other = config["init"].get("cohort", {})
            words += f", pretrained on {frac:.0%}" * (frac != float(args.get("frac", 1.0)))
            words += f", pretrained on cohort {other.get('name')}" * (
                bool(other) and other["sha256"] != config["cohort"]["sha256"])
            words += ", pretrained on labelled records" * (
                bool(source.get("labelled_only")) > bool(args.get("labelled_only")))
    return words + "".join(
        f", --{key.replace('_', '-')}" + ("" if found is True else f" {found}")
        for key, found, value in changed if found is not None and str(found) != str(value))


def planned_args(runs: dict, name: str) -> dict:
    """The flags of a study's run as {name: text, or True}, from its command line."""
    words = runs[name]["command"]
    return {word[2:].replace("-", "_"): True if value.startswith("--") else value
            for word, value in zip(words, words[1:] + ["--"]) if word.startswith("--")}


def planned(runs: dict, name: str) -> tuple[str, float]:
    """(method, frac) of a run that a study did not do."""
    args = planned_args(runs, name)
    start = Path(args.get("init", "")).name
    init = {"args": planned_args(runs, start)} if start in runs else None
    if args["mode"] == "probe":
        args.setdefault("features", "z" if args.get("head") == "mlp" else "h")
    return method({"args": args, "init": init}), float(args.get("frac", 1.0))


def find_runs(names: list[str], only: str = "") -> tuple[list[Path], dict[str, dict]]:
    """Folders of finished runs; a study of train.py --mode reproduce stands for all of its own.

    Args: only, the mode of train.py that a study's runs are restricted to.
    Returns: folders, and {sha256 of a cohort: {(method, frac): what a study could not run, why}}.
    """
    folders, reasons = [], {}
    for name in names:
        folder = next((folder for folder in (Path("runs") / name, Path(name))
                       if (folder / "study.json").is_file()), None)
        if folder is None:
            folders.append(find_run(name))
            continue
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        runs, why = study["runs"], reasons.setdefault(study["cohort"], {})
        finished = [n for n in runs if (folder / n / "predictions_test.npz").is_file()]
        chosen = [n for n in finished if only in ("", planned_args(runs, n)["mode"])]
        folders += [folder / n for n in chosen]
        for n in runs:
            if n not in finished:
                why[planned(runs, n)] = runs[n]["reason"] or "not finished"
        if not chosen:
            raise InputError(f"--runs {name}: no {only or 'run'} of that study is finished; go on "
                             "with the command that began it")
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"--runs: {folder} is given twice; name each run once")
    return folders, reasons


# ----------------------------------------------------------------------------------------------
# Frozen models, embeddings, and what every output says of itself
# ----------------------------------------------------------------------------------------------


def pick_device():
    """CUDA if there is one, else the CPU: a torch.device."""
    import torch
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_world_model(folder: Path) -> tuple:
    """(model in eval mode on the device, checkpoint) of a finished pretraining: its last.pt, as A.

    Raises: InputError for a run of another kind.
    """
    import cardiowm
    checkpoint = load_checkpoint(folder / "last.pt")
    if checkpoint["kind"] != "worldmodel":
        raise InputError(f"run {folder}: is a {checkpoint['kind']}; a pretraining (train.py --mode "
                         "pretrain) is wanted")
    model = cardiowm.WorldModel(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    return model.eval().to(pick_device()), checkpoint


def why_no_action(model, checkpoint: dict) -> str:
    """Why a model's answer to an action means nothing; "" where it means something."""
    if model.action_encoder is None:
        return "the model has no action (--objective invariance)"
    none = checkpoint.get("args", {}).get("action") == "none"
    return "trained on zero actions alone (--action none)" if none else ""


def cohort_of(folder: Path, data: str | None) -> Cohort:
    """The cohort that a run was trained on: --data, else where its config.json says it was.

    Raises: InputError for another cohort (sha256 differs) or an unreadable one.
    """
    wanted = json.loads((folder / "config.json").read_text(encoding="utf-8"))["cohort"]
    cohort = Cohort(data or wanted["path"])
    if cohort.sha256 != wanted["sha256"]:
        raise InputError(f"{'--data: ' if data else ''}{cohort.path} is not the cohort that "
                         f"{folder} was trained on ({wanted['name']}, sha256 "
                         f"{wanted['sha256'][:8]}, found {cohort.sha256[:8]}); give that one")
    return cohort


def one_world_model(args: argparse.Namespace) -> tuple:
    """(folder, model, checkpoint, cohort) of the one pretraining named, that has learnt actions.

    Raises: InputError for several runs, or one that has not learnt what an action does.
    """
    if len(args.runs) > 1:
        raise InputError(f"--runs: {len(args.runs)} given; --mode {args.mode} wants one "
                         "pretraining")
    folder = find_run(args.runs[0])
    model, checkpoint = load_world_model(folder)
    if why := why_no_action(model, checkpoint):
        raise InputError(f"run {folder}: {why}, so no state follows from one; give a pretraining "
                         "with --objective dynamics and --action coded or state")
    return folder, model, checkpoint, cohort_of(folder, args.data)


def own_action(cohort: Cohort, pairs: np.ndarray, which: str) -> np.ndarray:
    """(P, K) int8 of pairs (P,): what a run trained with --action `which` is told about them.

    coded: the change of the label set, a = y_next - y (A, section 3.1); state: that of the true
    states, which the demo cohort holds; none: zeros, the same architecture without information.
    """
    if which == "state":
        source, target = cohort.pair[pairs].T
        return cohort.state[target].astype(np.int8) - cohort.state[source].astype(np.int8)
    return cohort.action[pairs] * np.int8(which == "coded")


def embed(model, signal: np.ndarray, rows: np.ndarray, normalize: str = "zscore",
          progress: Progress | None = None, batch: int = 256) -> tuple:
    """Frozen h (n, 256) and z (n, D), float32 tensors on the device, of the rows (n,) in order.

    Args: signal (N, 12, T) mV, any float dtype, e.g. Cohort.signal; normalize "zscore" or "none",
        as the checkpoint says.
    """
    import torch

    import cardiowm
    device = next(model.parameters()).device
    h, z = [], []
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            x = torch.from_numpy(np.asarray(signal[rows[start:start + batch]])).to(device)
            x = cardiowm.normalize(x) if normalize == "zscore" else x.float()
            h.append(model.encode(x))
            z.append(model.project(h[-1]))
            if progress is not None:
                progress.update(len(x))
    return torch.cat(h), torch.cat(z)


def cohort_text(cohort: Cohort) -> str:
    """`SYNTHETIC cohort demo`; a file that is itself called cohort.h5 is not named twice."""
    name = cohort.name if "cohort" in cohort.name else f"cohort {cohort.name}"
    return f"{'SYNTHETIC' if cohort.synthetic else 'real'} {name}"


def caption(cohort: Cohort, rows: np.ndarray, what: str, seed: int | None = None) -> str:
    """`SYNTHETIC cohort demo, test fold 19: 227 records of 66 patients, 21 classes, seed 0`."""
    return (f"{cohort_text(cohort)}, {what}: {len(rows):,} records of "
            f"{len(np.unique(cohort.subject_id[rows])):,} patients, {len(cohort.class_name)} "
            "classes" + ("" if seed is None else f", seed {seed}"))


def write_files(out: Path, files: dict[str, str | list | bytes]) -> None:
    """Write text, CSV rows (a list of lists) or bytes under `out`, each whole or not at all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; name another folder") from None
    older = [name for name in files if (out / name).exists()]
    for name, content in files.items():
        if isinstance(content, list):
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerows(content)
            content = buffer.getvalue()
        replace_file(out / name, content if isinstance(content, bytes) else content.encode())
    note = f" (replaced: {', '.join(older)})" if older else ""
    print(f"written: {out}/{', '.join(files)}{note}")


def file_stem(*parts: str) -> str:
    """The parts of a file's name joined by `-`, without what has no place in one (LAO/LAE)."""
    return "-".join(re.sub(r"\W", "", part) for part in parts)


def plotter():
    """pyplot, drawing into files only."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def png(figure, dpi: int = 150) -> bytes:
    """A matplotlib figure as the bytes of a PNG file; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plotter().close(figure)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------
# Score: macro-AUROC of runs on triage, monitoring and pairs (A, Tables 1-3; B, Table 1)
# ----------------------------------------------------------------------------------------------


def score(run: dict, task: str, labelled_only: bool = False, n_boot: int = 1000,
          units: tuple = ("record", "patient")) -> dict:
    """One cell of the tables: a run on a task, with the counts it rests on.

    Returns: counts (records of the task, labelled among them, scored, patients, positives of each
        class), auroc macro, classes (K,) with NaN where undefined, left_out their names, and
        boot[unit] = (macro (n_boot,), classes (n_boot, K) float32), the bootstrap replicates over
        records and over patients; None where a single one leaves no spread to resample.
    """
    mask = np.ones(len(run["y_true"]), bool) if TASKS[task] is None else run[TASKS[task]] > 0
    labelled = run["has_label"] > 0
    rows = np.flatnonzero(mask & labelled if labelled_only else mask)
    y_true, subject = run["y_true"][rows], run["subject_id"][rows]
    names = [str(name) for name in run["class_name"]]
    cell = {"task": task, "records": int(mask.sum()), "labelled": int((mask & labelled).sum()),
            "scored": len(rows), "patients": len(np.unique(subject)),
            "positives": y_true.sum(axis=0, dtype=np.int64), "auroc": np.nan,
            "classes": np.full(len(names), np.nan), "boot": {}}
    for unit in units:
        cell["boot"][unit] = None
        if len(rows):
            boot = bootstrap_auroc(y_true, run["y_score"][rows], n_boot, BOOTSTRAP_SEED,
                                   subject if unit == "patient" else None)
            cell |= {"auroc": boot["point"], "classes": boot["per_class"][:, 0]}
            if (len(rows) if unit == "record" else cell["patients"]) > 1:
                cell["boot"][unit] = (boot["replicates"],
                                      boot["class_replicates"].astype(np.float32))
    cell["left_out"] = [name for name, value in zip(names, cell["classes"]) if np.isnan(value)]
    return cell


def mean_cell(cells: list[dict]) -> dict:
    """The same method with several training seeds: means of values and of replicates.

    All cells are of the same records and resamples, so the replicates of the mean are the mean of
    the replicates. Its interval is of the test sample alone; the seeds are listed beside it.
    """
    boot = {unit: None if first is None else tuple(
        np.mean([cell["boot"][unit][i] for cell in cells], axis=0) for i in (0, 1))
        for unit, first in cells[0]["boot"].items()}
    return cells[0] | {"auroc": float(np.mean([cell["auroc"] for cell in cells])), "boot": boot,
                       "classes": np.mean([cell["classes"] for cell in cells], axis=0)}


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """95 % interval and two-sided p of a - b, from replicates (n_boot,) on the same resamples.

    p = 2 (1 + the replicates on the rarer side of 0) / (1 + n_boot), at most 1 (Davison & Hinkley
    1997, section 4.4.1: a replicate is counted for the sample itself). NaN where undefined.
    """
    d = a.astype(np.float64) - b
    d = d[~np.isnan(d)]
    if not len(d):
        return np.nan, np.nan, np.nan
    rarer = min(np.count_nonzero(d <= 0), np.count_nonzero(d >= 0))
    return *_interval(d), min(1.0, 2 * (1 + rarer) / (1 + len(d)))


def difference(a: dict, b: dict, unit: str) -> dict:
    """Macro-AUROC of cell a less that of cell b: point, low, high, p."""
    found = dict(zip(("low", "high", "p"), (np.nan,) * 3))
    if a["boot"][unit] is not None:
        found = dict(zip(found, paired_difference(a["boot"][unit][0], b["boot"][unit][0])))
    return {"point": a["auroc"] - b["auroc"]} | found


def by_method(runs: list[dict], cells: list[dict[str, dict]]) -> dict[tuple, dict]:
    """Runs that differ in their seed alone become one row: {(method, frac): row}.

    A row holds method, frac, seeds, runs (names) and cells {task: mean_cell}. Runs of one method
    and fraction that differ in more than the seed (other epochs, say) are kept apart by name.
    """
    def settings(run: dict) -> list:
        # below 100 % the laptop preset's epochs and rows follow the number of records drawn
        free = FREE_SETTINGS | (set() if run["frac"] == 1 else {"epochs", "total"})
        parts = [run["config"]["args"], (run["config"]["init"] or {}).get("args", {})]
        return [{k: v for k, v in part.items() if k not in free} for part in parts]

    rows: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        key = run["method"], run["frac"]
        if any(runs[j]["seed"] == run["seed"] or settings(runs[j]) != settings(run)
               for j in rows.get(key, [])):
            key = f"{run['method']} ({run['name']})", run["frac"]
        rows.setdefault(key, []).append(i)
    return {key: {"method": key[0], "frac": key[1], "seeds": [runs[i]["seed"] for i in where],
                  "runs": [runs[i]["name"] for i in where],
                  "each": [cells[i] for i in where],
                  "cells": {task: mean_cell([cells[i][task] for i in where])
                            for task in cells[where[0]]}}
            for key, where in rows.items()}


def bounds_text(low: float, high: float, unit: str = "") -> str:
    """`[0.733-0.756]`, or why there is none."""
    return f"[one {unit}]" if np.isnan(low) else f"[{low:.3f}-{high:.3f}]"


def cell_text(cell: dict, unit: str) -> str:
    """`0.742 [0.733-0.756]`, or that the score is not defined."""
    if np.isnan(cell["auroc"]):
        return "not defined"
    boot = cell["boot"][unit]
    low, high = (np.nan, np.nan) if boot is None else _interval(boot[0])
    return f"{cell['auroc']:.3f} {bounds_text(low, high, unit)}"


def with_interval(values, digits: int = 3, sign: str = "") -> str:
    """`0.42 [-0.03..0.46]` of point, low, high; no interval where it is not defined."""
    point, low, high = (f"{value:{sign}.{digits}f}" for value in values)
    if "nan" in point:
        return "not defined"
    return point if "nan" in low else f"{point} [{low}..{high}]"


def difference_text(d: dict) -> str:
    """`+0.012 [-0.003..+0.027]`, or that it is not defined."""
    return "not defined" if np.isnan(d["low"]) else with_interval(
        (d["point"], d["low"], d["high"]), sign="+")


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table in padded columns, a blank line after it."""
    width = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, width, strict=True)) + " |"
             for row in [head, *body]]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:], ""]


def head_lines(runs: list[dict], cells: list[dict], labelled_only: bool, n_boot: int) -> list[str]:
    """What every table below it rests on: cohort, fold, counts of each task, what is left out."""
    first = runs[0]
    seeds = sorted({run["seed"] for run in runs if run["seed"] is not None})
    fold = TEST_FOLD.get(first["source"])
    lines = [f"## {first['cohort']}: {'SYNTHETIC' if first['synthetic'] else 'real'} records, test "
             f"{'split' if fold is None else f'fold {fold}'}, seed {', '.join(map(str, seeds))}",
             "", f"{len(first['y_true']):,} records of {len(np.unique(first['subject_id'])):,} "
             f"patients, {first['y_true'].shape[1]} classes; macro-AUROC [95 % interval of "
             f"{n_boot:,} bootstraps, seed {BOOTSTRAP_SEED}]"
             + ("; labelled records only" if labelled_only else ""), "",
             "trained with: " + ", ".join(sorted({f"preset {run['preset']}" for run in runs
                                                  if run["preset"]})) + "; epochs and patients of "
             "each run are in the table of all runs." if any(run["preset"] for run in runs) else "",
             ""]
    # Truth and masks are the same for all runs of the group, so the counts are given once.
    lines += markdown(["task", "records", "labelled", "scored", "patients", "positives", "classes"],
                      [[task, *(f"{cell[key]:,}" for key in (
                          "records", "labelled", "scored", "patients")),
                        f"{cell['positives'].sum():,}",
                        f"{len(cell['classes']) - len(cell['left_out'])} of "
                        f"{len(cell['classes'])}"] for task, cell in cells[0].items()])
    for task, cell in cells[0].items():
        if not cell["records"]:
            lines.append(f"- {task}: not defined, {UNDEFINED[task]}.")
        elif not cell["scored"]:
            lines.append(f"- {task}: not defined, no record of it is labelled.")
        elif cell["left_out"]:
            lines.append(f"- {task}: left out, without positives or without negatives: "
                         f"{', '.join(cell['left_out'])}.")
    return lines + [""]


def paper_tables(rows: dict[tuple, dict], unit: str, reasons: dict[tuple, str]) -> list[str]:
    """A's Tables 1-3 and Figure 4 and B's Table 1 beside what was found here, controls below.

    A table appears when one of its own rows was run; a row when it was run, or when `reasons`
    {(method, frac): text} says why a study could not run it.
    """
    lines = []
    for title, frac, tasks, methods in PAPER_TABLES:
        present = [(m, frac) for m in methods if (m, frac) in rows or (m, frac) in reasons]
        if not any(key in rows for key in present):
            continue
        extra = [(m, frac) for m in CONTROL_METHODS + EXTRA_METHODS * title.startswith("Paper B")
                 if (m, frac) in rows or (m, frac) in reasons] \
            + [key for key in rows if key[1] is None]
        tasks = [task for task in tasks if task in next(iter(rows.values()))["cells"]]
        if not tasks:
            continue
        head = ["method", "seeds"]
        head += [text for task in tasks for text in (f"{task}: paper", "here")]
        body = []
        for key in present + extra:
            seeds = rows[key]["seeds"] if key in rows else []
            failed = f" ({reasons[key]})" if seeds and key in reasons else ""
            body.append([key[0], " ".join(str(n) for n in seeds if n is not None) + failed])
            for task in tasks:
                printed = PAPER.get(key, {}).get(task, "").split(", ")
                body[-1] += [", ".join(text[2:] for text in printed if text[:1] == title[6]) or "-",
                             cell_text(rows[key]["cells"][task], unit) if key in rows
                             else f"not run: {reasons[key]}"]
        note = []
        if title.startswith("Paper B"):
            shares, note = gap_shares(rows, present + extra, unit)
            head.append("share of the gap")
            body = [line + [share] for line, share in zip(body, shares, strict=True)]
        lines += [f"### {title}", "", *markdown(head, body), *note]
    if lines:
        lines += ["- paper: as printed in A and B, on MIMIC-IV-ECG, fold 19: another cohort, "
                  "schedule or sampling rate is no replication. A's code took `pairs` for its "
                  "monitoring.", f"- here: [95 % interval over {unit}s].", ""]
    return lines


def gap_shares(rows: dict[tuple, dict], keys: list[tuple], unit: str) -> tuple[list, list[str]]:
    """B: how much of the way from the probe on real rows to the finetuned model each key goes.

    Returns: a text for each key, and a note. Without a gap whose interval lies above 0 there is
    nothing to share out.
    """
    ends = [rows.get((method, 1.0)) for method in (GAP_FROM, GAP_TO)]
    if None in ends:
        return ["-"] * len(keys), []
    low, high = (row["cells"]["monitoring"] for row in ends)
    gap = difference(high, low, unit)
    what = f"- share of the gap: from {GAP_FROM!r} to {GAP_TO!r}, {difference_text(gap)}; paper " \
        "B 55 %."
    if not gap["low"] > 0:
        return ["-"] * len(keys), [what + " It is not above 0 here, so there are no shares.", ""]
    shares = []
    for key in keys:
        if key not in rows or not key[0].startswith("mlp") or key[0] == GAP_FROM:
            shares.append("-")
            continue
        value = rows[key]["cells"]["monitoring"]
        a, b, c = (cell["boot"][unit][0] for cell in (low, high, value))
        share = (value["auroc"] - low["auroc"]) / gap["point"]
        shares.append("{:.0%} [{:.0%}..{:.0%}]".format(share, *_interval((c - a) / (b - a))))
    return shares, [what, ""]


# ----------------------------------------------------------------------------------------------
# The papers' ordering claims, each answered by a paired interval
# ----------------------------------------------------------------------------------------------


def claim_lines(rows: dict[tuple, dict], reasons: dict[tuple, str]) -> tuple[list[str], list]:
    """Markdown and CSV of CLAIMS: holds, does not hold, or undecided on this cohort.

    A claim holds when the 95 % intervals of the difference over records and over patients both
    lie above 0 and every training seed agrees in sign; it does not hold when all lie below.
    """
    tasks = next(iter(rows.values()))["cells"]
    body, table = [], [["claim", "paper", "task", "frac", "difference", "record_low", "record_high",
                        "record_p", "patient_low", "patient_high", "patient_p", "per_seed",
                        "answer"]]
    for text, paper, task, better, worse, frac in CLAIMS:
        keys = (better, frac), (worse, frac)
        if task not in tasks or not any(key in rows or key in reasons for key in keys):
            continue
        missing = [key for key in keys if key not in rows]
        if missing:
            why = reasons.get(missing[0], "not among the runs")
            answer = f"not run: {missing[0][0]} ({why})"
            body.append([text, paper, task, f"{frac:g}", *["-"] * 4, answer])
            table.append([text, paper, task, frac, *[""] * 8, answer])
            continue
        a, b = (rows[key] for key in keys)
        shared = [seed for seed in a["seeds"] if seed in b["seeds"]]
        if not shared:
            answer = "undecided: no seed in common"
            body.append([text, paper, task, f"{frac:g}", *["-"] * 4, answer])
            table.append([text, paper, task, frac, *[""] * 8, answer])
            continue
        pairs = [[row["each"][row["seeds"].index(seed)][task] for seed in shared] for row in (a, b)]
        per_seed = [one["auroc"] - other["auroc"] for one, other in zip(*pairs, strict=True)]
        found = {unit: difference(*map(mean_cell, pairs), unit) for unit in ("record", "patient")}
        answer = "undecided"
        if any(np.isnan(d["low"]) for d in found.values()):
            answer = "not defined"
        elif min(*(d["low"] for d in found.values()), *per_seed) > 0:
            answer = "holds"
        elif max(*(d["high"] for d in found.values()), *per_seed) < 0:
            answer = "does not hold"
        seeds = " ".join(f"{seed}: {d:+.3f}" for seed, d in zip(shared, per_seed, strict=True)
                         if not np.isnan(d)) or "-"
        p = found["patient"]["p"]
        body.append([text, paper, task, f"{frac:g}", difference_text(found["record"]),
                     difference_text(found["patient"]), "-" if np.isnan(p) else f"{p:.3f}", seeds,
                     answer])
        table.append([text, paper, task, frac, found["record"]["point"],
                      *(found[unit][key] for unit in found for key in ("low", "high", "p")),
                      seeds, answer])
    if not body:
        return [], table
    head = ["claim", "paper", "task", "frac", "difference [records]", "[patients]", "p (patients)",
            "per seed", "on this cohort"]
    return ["### The papers' ordering claims", "", *markdown(head, body),
            "- difference of macro-AUROC, paired on the same resamples. Intervals are of the test "
            "sample; the training seeds are listed. No correction for the number of claims.",
            ""], table


# ----------------------------------------------------------------------------------------------
# Figures: transitions (A, Figures 2, 3), the cohort (A, Figures 5, 6), embeddings (B, Figure 2)
# ----------------------------------------------------------------------------------------------
FIGURE_SEED = 0  # of every draw in a figure
PRINTED = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",))
MM_PER_S, MM_PER_MV, MM_PER_INCH = 25, 10, 25.4  # ECG paper
MARGIN_MM, PULSE_MM, PAGE_MM = 5, 10, 280  # page edge; left of the traces, the calibration pulse
MM_DPI = 254  # 10 pixels to the mm, so that every grid line lies on a pixel
ICD_NAME = {
    "I10": "hypertension", "I12": "hypertensive kidney disease", "I21": "acute infarction",
    "I25": "chronic ischaemic heart disease", "I26": "pulmonary embolism",
    "I27": "pulmonary heart disease", "I30": "acute pericarditis", "I31": "pericardial disease",
    "I34": "mitral valve disorder", "I35": "aortic valve disorder", "I42": "cardiomyopathy",
    "I44": "AV or left bundle branch block", "I45": "other conduction disorder",
    "I47": "paroxysmal tachycardia", "I48": "atrial fibrillation or flutter",
    "I49": "other arrhythmia", "I50": "heart failure", "I63": "cerebral infarction",
    "I73": "peripheral vascular disease", "I82": "venous thrombosis", "I95": "hypotension"}
POINT_COLOUR = {"real normal": "#56B4E9", "real abnormal": "#D55E00", "synthetic": "#222222"}
POINTS = 7000  # B, Figure 2


def known_gap_days(cohort: Cohort) -> np.ndarray:
    """(P,) float32 days between the records of a pair; NaN where a date is missing.

    All NaN for PTB-XL, part of whose dates are interpolated.
    """
    return cohort.gap_days * np.nan if cohort.source == "ptbxl" else cohort.gap_days


def transition_masks(cohort: Cohort, onset=(), resolve=(), stable=(), study_id=None) -> dict:
    """What is asked of a pair, one condition at a time: `I44 begins` -> (P,) bool.

    Raises: InputError for a class that the cohort lacks, and when nothing is asked.
    """
    asked = {"begins": onset, "ends": resolve, "stays": stable}
    names = [name for group in asked.values() for name in group]
    if not names and study_id is None:
        raise InputError("--mode transitions: no transition is described; give at least one of "
                         "--onset, --resolve, --stable, --study-id")
    if unknown := sorted(set(names) - set(cohort.class_name)):
        raise InputError(f"--onset, --resolve, --stable: no class of the cohort {cohort.name}: "
                         f"{', '.join(unknown)}; known are {', '.join(cohort.class_name)}")
    source, target = cohort.pair.T
    masks = {}
    for word, group in asked.items():
        for name in group:
            k = cohort.class_name.index(name)
            masks[f"{name} {word}"] = {
                "begins": cohort.action[:, k] == 1, "ends": cohort.action[:, k] == -1,
                "stays": (cohort.label[source, k] > 0) & (cohort.label[target, k] > 0)}[word]
    if study_id is not None:
        masks[f"study_id {study_id} is the source"] = cohort.study_id[source] == study_id
    return masks


def find_transition(cohort: Cohort, onset=(), resolve=(), stable=(), study_id=None) -> int:
    """Index of the pair that shows best what is asked: A, Figures 2 and 3.

    Args: onset, resolve, stable: class names whose action is +1, is -1, that both records carry;
        study_id: of the source record. At least one is wanted.
    Returns: among the pairs that meet every condition, the first in this order: neither record has
        a quality flag; both are labelled; fewest changes, |a|_1; shortest gap (unknown last);
        lowest index.
    Raises: InputError for an unknown class, and for no such pair with how many meet each condition.
    """
    masks = transition_masks(cohort, onset, resolve, stable, study_id)
    found = np.flatnonzero(np.logical_and.reduce(list(masks.values())))
    if not len(found):
        counts = "; ".join(f"{name}: {mask.sum():,}" for name, mask in masks.items())
        raise InputError(f"--mode transitions: none of the {len(cohort.pair):,} pairs of the "
                         f"cohort {cohort.name} meets all conditions; each alone: {counts}; ask "
                         "for less")
    rows = cohort.pair[found]  # (F, 2)
    flagged = (cohort.quality[rows] > 0).any(axis=1)
    unlabelled = ~cohort.has_label[rows].all(axis=1)
    change = np.abs(cohort.action[found]).sum(axis=1, dtype=np.int64)
    order = np.lexsort((found, known_gap_days(cohort)[found], change, unlabelled, flagged))
    return int(found[order[0]])  # lexsort: the last key decides first; NaN sorts last


def transition_words(cohort: Cohort, index: int) -> list[str]:
    """Three lines: what began, ended, stayed; whose records; what the codes can and cannot say."""
    source, target = cohort.pair[index]
    action, label = cohort.action[index], cohort.label[source]

    def names(mask):
        codes = [cohort.class_name[k] for k in np.flatnonzero(mask)]
        named = [f"{c} {ICD_NAME[c]}" if c in ICD_NAME else c for c in codes]
        return ", ".join(named if len(named) <= 3 else codes) or "none"

    gap = float(known_gap_days(cohort)[index])
    between = f"{gap:,.{2 if gap < 10 else 0}f} days apart"
    if np.isnan(gap):
        between = ("dates partly interpolated" if cohort.source == "ptbxl"
                   else "gap unknown, a date is missing")
    note = ("Labels are the SCP statements of each record's report." if cohort.source == "ptbxl"
            else "Codes belong to a stay and were assigned after it: when anything began or ended "
            "they do not say.")
    if lacking := [name for name, row in (("source", source), ("target", target))
                   if not cohort.has_label[row]]:
        note += f" Without any code, which is not normal: {' and '.join(lacking)}."
    return [f"began: {names(action > 0)} · ended: {names(action < 0)} · "
            f"stayed: {names((label > 0) & (action == 0))}",
            f"{cohort_text(cohort)}, subject_id "
            f"{cohort.subject_id[source]}, study_id {cohort.study_id[source]} \u2192 "
            f"{cohort.study_id[target]}, {between}", note]


def record_words(cohort: Cohort, row: int) -> str:
    """One record in words: study_id, labels, quality flags."""
    labels = " ".join(np.array(cohort.class_name)[cohort.label[row] > 0]) or (
        "no class" if cohort.has_label[row] else "unlabelled")
    flags = ", ".join(name for name, bit in QUALITY.items() if cohort.quality[row] & bit)
    return f"study_id {cohort.study_id[row]}: {labels}" + (f" (quality: {flags})" if flags else "")


def printed_rows(signal: np.ndarray, leads: list[str], fs: float) -> list[list[tuple]]:
    """An ECG (12, T) mV as printed: 3 rows of 4 leads x 2.5 s, and lead II for 10 s.

    Returns: per row its traces (lead, x mm, y mm, height mm of the lead's name), y about the median
        of the whole lead.
    """
    x_mm = np.arange(signal.shape[1]) / fs * MM_PER_S
    y_mm = np.asarray(signal, np.float64) * MM_PER_MV
    y_mm = y_mm - np.median(y_mm, axis=1, keepdims=True)
    rows = []
    for names in PRINTED:
        rows.append([])
        pieces = np.array_split(np.arange(len(x_mm)), len(names))
        for name, piece in zip(names, pieces, strict=True):
            x, y = x_mm[piece], y_mm[leads.index(name), piece]
            rows[-1].append((name, x, y, max(4, y[x < x[0] + 8].max() + 1.5)))  # above its start
    return rows


def row_limits(ecgs: list[list]) -> list[tuple[int, int]]:
    """Per printed row mm (above, below) its baseline, whole 5 mm: no trace of any ECG is cut."""
    limits = []
    for rows in zip(*ecgs, strict=True):
        traces = sum(rows, [])
        high = max(max(y.max(), name + 3) for _, _, y, name in traces)  # 3 mm: letters
        low = -min(y.min() for _, _, y, _ in traces)
        limits.append((5 * max(3, int(np.ceil((high + 0.5) / 5))),  # the pulse wants 10 mm
                       5 * max(1, int(np.ceil((low + 0.5) / 5)))))
    return limits


def draw_ecg(axes, rows: list[list], limits: list[tuple], top: float) -> None:
    """Draw `printed_rows` on ECG paper whose upper edge is at `top`; the axes' unit is 1 mm."""
    from matplotlib.collections import LineCollection
    left, right = MARGIN_MM, PAGE_MM - MARGIN_MM
    bottom = top - np.sum(limits)
    for step, width, colour in ((1, 0.3, "#f7d5d5"), (5, 0.7, "#eda9a9")):
        lines = [((x, bottom), (x, top)) for x in np.arange(left, right + 1, step)]
        lines += [((left, y), (right, y)) for y in np.arange(bottom, top + 0.5, step)]
        axes.add_collection(LineCollection(lines, linewidths=width, colors=colour))
    start = left + PULSE_MM
    for traces, (up, down) in zip(rows, limits, strict=True):
        zero, top = top - up, top - up - down
        pulse = np.array([(1, 0), (2, 0), (2, 1), (7, 1), (7, 0), (8, 0)]) * (1, MM_PER_MV)
        axes.plot(left + pulse[:, 0], zero + pulse[:, 1], color="black", linewidth=0.9)  # 0.2 s
        for lead, x, y, name in traces:
            axes.plot(start + x, zero + y, color="black", linewidth=0.8, solid_joinstyle="round")
            axes.text(start + x[0] + 0.8, zero + name, lead, fontsize=9, weight="bold")
            if x[0] > 0:  # where the strip changes to another lead
                axes.plot([start + x[0]] * 2, [zero - 3, zero + 3], color="black", linewidth=0.8)


def transition_figure(cohort: Cohort, index: int):
    """Source and target ECG of a pair on one page, 1 mm of paper = 1 mm of figure."""
    plt = plotter()
    ecgs = [printed_rows(cohort.signal[row], cohort.leads, cohort.fs) for row in cohort.pair[index]]
    limits = row_limits(ecgs)  # of both, so that the two are laid out alike
    title, *small = [textwrap.wrap(line, width) for line, width in zip(
        transition_words(cohort, index), (125, 140, 140), strict=True)]
    small = sum(small, [])
    head_mm = MARGIN_MM + 6 * len(title) + 5 * len(small) + 2
    height = float(head_mm + 2 * (8 + np.sum(limits)) + 10)
    figure = plt.figure(figsize=(PAGE_MM / MM_PER_INCH, height / MM_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, PAGE_MM), ylim=(0, height))
    axes.axis("off")
    y = height - MARGIN_MM
    for lines, size, step, weight in ((title, 11, 6, "bold"), (small, 9.5, 5, "normal")):
        for line in lines:
            axes.text(MARGIN_MM, y, line, fontsize=size, va="top", weight=weight)
            y -= step
    y = height - head_mm
    for name, row, rows in zip(("source", "target"), cohort.pair[index], ecgs, strict=True):
        axes.text(MARGIN_MM, y - 2.5, f"{name}, {record_words(cohort, row)}", fontsize=10,
                  va="top")
        draw_ecg(axes, rows, limits, y - 8)
        y -= 8 + np.sum(limits)
    axes.text(MARGIN_MM, y - 3, f"25 mm/s  10 mm/mV  (shown at {cohort.fs:g} Hz, each lead about "
              "its median)", fontsize=9, va="top")
    return figure


def run_transitions(args: argparse.Namespace) -> None:
    """`--mode transitions`: the ECG pair of A's Figures 2 and 3, transitions-*.png and .md."""
    cohort = Cohort(args.data or "data/cohort.h5")
    asked = {"onset": args.onset or [], "resolve": args.resolve or [], "stable": args.stable or []}
    index = find_transition(cohort, **asked, study_id=args.study_id)
    masks = transition_masks(cohort, **asked, study_id=args.study_id)
    matching = int(np.logical_and.reduce(list(masks.values())).sum())
    parts = [text for word, names in asked.items() if names for text in (word, *names)]
    parts += [] if args.study_id is None else ["study", str(args.study_id)]
    name = file_stem("transitions", *parts)
    title, *lines = transition_words(cohort, index)
    lines += [f"{word}: {record_words(cohort, row)}" for word, row in zip(
        ("source", "target"), cohort.pair[index], strict=True)]
    lines.append(f"asked: {', '.join(masks)}; {matching:,} of {len(cohort.pair):,} pairs meet it, "
                 "of which this one comes first by: no quality flag, both labelled, fewest "
                 "changes, shortest gap, lowest index")
    lines.append(caption(cohort, np.arange(len(cohort)), "all records"))
    text = "\n".join([f"## {title}", "", f"![]({name}.png)", "", *(f"- {t}" for t in lines), ""])
    print(text)
    write_files(Path(args.out), {f"{name}.png": png(transition_figure(cohort, index), MM_DPI),
                                 f"{name}.md": text})


# The cohort (A, Figures 5 and 6)


def jaccard(y: np.ndarray, y_next: np.ndarray) -> np.ndarray:
    """|y and y_next| / |y or y_next| of label sets (P, K) of 0 and 1: (P,) float64 in [0, 1].

    Two empty sets are equal: 1.
    """
    y, y_next = np.asarray(y) > 0, np.asarray(y_next) > 0
    union = (y | y_next).sum(axis=1)
    return np.where(union == 0, 1.0, (y & y_next).sum(axis=1) / np.maximum(union, 1))


def class_table(cohort: Cohort) -> list[list]:
    """Lines of cohort.csv, most frequent class first: what each class counts."""
    lines = []
    for k, name in enumerate(cohort.class_name):
        has = cohort.label[:, k] > 0
        lines.append([name, int(has.sum()), len(np.unique(cohort.subject_id[has])),
                      has.sum() / len(cohort), int((cohort.action[:, k] == 1).sum()),
                      int((cohort.action[:, k] == -1).sum())])
    head = ["class", "records", "patients", "prevalence", "onsets", "resolutions"]
    return [head, *sorted(lines, key=lambda line: (-line[1], line[0]))]


def cohort_numbers(cohort: Cohort) -> list[list[str]]:
    """Rows (what, number, share) of cohort.md: `prepare_data.count`, pair kinds, Jaccard, gaps."""
    counts = {name: value for name, value in count(cohort).items()
              if not name.startswith("records with ")}
    share = {"patients with one record": "patients", "patients with two or more": "patients",
             "stable pairs": "pairs", "changed pairs": "pairs", "labelled records": "records",
             "unlabelled records": "records"}
    share |= {name: "changed pairs" for name in counts if name.startswith("|a|1")}
    of = {name: counts[whole] for name, whole in share.items()}
    source, target = cohort.pair.T
    similarity = jaccard(cohort.label[source], cohort.label[target])
    empty = ~(cohort.label[source] | cohort.label[target]).any(axis=1)
    kinds = ("within a stay", "between stays", "touching an unlabelled record")
    if (cohort.stay < 0).all():
        kinds = (None, "between labelled records (no stays known)", kinds[2])
    more = {f"pairs {name}": int((cohort.pair_kind == kind).sum())
            for kind, name in enumerate(kinds) if name}
    more |= {"pairs of Jaccard 1": int((similarity == 1).sum()),
             "pairs of Jaccard 1, both sets empty": int(empty.sum()),
             "pairs of Jaccard 0": int((similarity == 0).sum())}
    counts |= more
    of |= {name: len(similarity) for name in more}
    if len(similarity):
        counts["Jaccard, mean"] = float(similarity.mean())
    gap = known_gap_days(cohort)
    if cohort.source != "ptbxl" and (~np.isnan(gap)).any():
        counts |= {"gap in days, median": float(np.nanmedian(gap)),
                   "pairs of gap 0": int((gap == 0).sum()),
                   "pairs of unknown gap": int(np.isnan(gap).sum())}
    body = []
    for name, value in counts.items():
        text = f"{value:,.2f}" if isinstance(value, float) and value % 1 else f"{value:,.0f}"
        body.append([name.replace("|a|1", "\\|a\\|_1"), text,
                     f"{value / of[name]:.1%}" if of.get(name) else ""])
    return body


def draw_counts(axes, records: np.ndarray) -> None:
    """Patients by their number of records (patients,), on linear and on logarithmic axes."""
    size, patients = np.unique(records, return_counts=True)
    edge = max(40, int(np.percentile(records, 99)))
    beyond = int(patients[size > edge].sum())
    axes["linear"].bar(size[size <= edge], patients[size <= edge], width=0.9)
    axes["linear"].xaxis.get_major_locator().set_params(integer=True)
    axes["linear"].set(title="records per patient", xlabel="records" + (
        f" (beyond {edge}: {beyond:,} patients, see log axes)" if beyond else ""),
        ylabel="patients")
    axes["loglog"].loglog(size, patients, "o", markersize=4)
    ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n <= records.max()]
    axes["loglog"].minorticks_off()
    axes["loglog"].set_xticks(ticks, [str(n) for n in ticks])
    axes["loglog"].set(title=f"records per patient, log axes\nmean {records.mean():.2f}, median "
                       f"{np.median(records):g}, max {records.max()}", xlabel="records",
                       ylabel="patients")


def draw_pairs(axes, cohort: Cohort) -> None:
    """Jaccard similarity of consecutive label sets and |a|_1 of the changed pairs."""
    source, target = cohort.pair.T
    similarity = jaccard(cohort.label[source], cohort.label[target])
    if not len(similarity):
        for name in ("jaccard", "change"):
            axes[name].text(0.5, 0.5, "not defined: no pair", ha="center")
        return
    axes["jaccard"].hist(similarity, bins=np.linspace(0, 1, 21), log=True)
    axes["jaccard"].set(title=f"Jaccard of consecutive label sets: {(similarity == 1).mean():.1%} "
                        "at exactly 1", xlabel="Jaccard (two empty sets: 1)",
                        ylabel="pairs (log axis)")
    change = np.abs(cohort.action).sum(axis=1, dtype=np.int64)
    size, pairs = np.unique(np.minimum(change[change > 0], 11), return_counts=True)
    axes["change"].bar_label(axes["change"].bar(size, pairs), [f"{n:,}" for n in pairs], fontsize=8)
    axes["change"].set_xticks(range(1, 12), [*map(str, range(1, 11)), "> 10"])
    axes["change"].margins(y=0.1)
    axes["change"].set(title=f"labels that change, $|a|_1$, of the {(change > 0).sum():,} changed "
                       f"pairs ({(change > 0).mean():.1%})", xlabel="$|a|_1$", ylabel="pairs")


def draw_gaps(axis, gap: np.ndarray) -> None:
    """Days between consecutive records (P,), on a logarithmic axis."""
    positive = gap[gap > 0]
    left_out = f"{(gap == 0).sum():,} of gap 0, {np.isnan(gap).sum():,} unknown: not drawn"
    if len(positive):
        axis.hist(positive, bins=np.geomspace(positive.min(), positive.max() * 1.001, 31))
        axis.set_xscale("log")
    axis.set(title="time between consecutive records", xlabel=f"days (log axis; {left_out})",
             ylabel="pairs")


def cohort_figure(cohort: Cohort, classes: list[list]):
    """The panels of cohort.png; `classes` are the lines of `class_table`."""
    plt = plotter()
    gaps = cohort.source != "ptbxl"  # part of PTB-XL's dates are interpolated
    first = ["linear"] * 2 + ["loglog"] * 2 + ["gap"] * 2 if gaps else (
        ["linear"] * 3 + ["loglog"] * 3)
    figure, axes = plt.subplot_mosaic(
        [first, ["jaccard"] * 3 + ["change"] * 3, ["class"] * 6], figsize=(13, 11))
    draw_counts(axes, np.unique(cohort.subject_id, return_counts=True)[1])
    draw_pairs(axes, cohort)
    if gaps:
        draw_gaps(axes["gap"], known_gap_days(cohort))
    present = [line for line in classes[1:] if line[1]]
    absent = [line[0] for line in classes[1:] if not line[1]]
    axis = axes["class"]
    bars = axis.bar(range(len(present)), [line[1] / len(cohort) for line in present], log=True)
    axis.bar_label(bars, [f"{line[1]:,}" for line in present], fontsize=7,
                   rotation=90 if len(present) > 30 else 0, padding=2)
    axis.set_xticks(range(len(present)), [line[0] for line in present], fontsize=8,
                    rotation=90 if len(present) > 30 else 0)
    axis.margins(x=0.01, y=0.25)
    axis.set(title="prevalence of each class, number of records on the bars"
             + (f"; without a record: {', '.join(absent)}" if absent else ""),
             ylabel="share of records (log axis)")
    for axis in axes.values():
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption(cohort, np.arange(len(cohort)), "all records")
                    + f", {len(cohort.pair):,} pairs"
                    + ("" if gaps else "; no panel by time, dates partly interpolated"))
    figure.tight_layout()
    return figure


def run_cohort(args: argparse.Namespace) -> None:
    """`--mode cohort`: A's Figures 5 and 6 and Appendix A: cohort.png, cohort.md, cohort.csv."""
    cohort = Cohort(args.data or "data/cohort.h5")
    classes = class_table(cohort)
    shown = [[name, f"{records:,}", f"{patients:,}", f"{prevalence:.2%}", f"{onsets:,}",
              f"{resolutions:,}"]
             for name, records, patients, prevalence, onsets, resolutions in classes[1:]]
    lines = [f"## {caption(cohort, np.arange(len(cohort)), 'all records')}", "",
             *markdown(["what", "number", "share"], cohort_numbers(cohort)),
             *markdown(classes[0], shown),
             "- Jaccard: of the label sets of consecutive records; two empty sets give 1."]
    if cohort.source == "ptbxl":
        lines.append("- dates partly interpolated: nothing is shown by the time between records.")
    if (cohort.ecg_no_within_stay < 0).all():
        lines.append("- first in stay: not defined, the cohort has no stays.")
    lines += [f"- {line}" for line in golden_lines(cohort, count(cohort))]
    text = "\n".join(lines) + "\n"
    print(text)
    write_files(Path(args.out), {"cohort.png": png(cohort_figure(cohort, classes)),
                                 "cohort.md": text, "cohort.csv": classes})


# Embeddings, real and synthetic, by t-SNE (B, Figure 2; van der Maaten & Hinton 2008)


def row_blocks(n: int, device) -> list[slice]:
    """Rows 0 .. n-1 in blocks whose (rows, n) float32 stays in a CPU's cache."""
    rows = max(1, (2**18 if device.type == "cpu" else 2**26) // n)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def affinities(x, perplexity: float):
    """Symmetric p_ij (n, n) of t-SNE: Gaussian neighbourhoods of the asked perplexity.

    p_j|i = exp(-beta_i |x_i - x_j|^2) / sum_k of the same, p_i|i = 0, beta_i by bisection so that
    exp(entropy of row i) = perplexity; p_ij = (p_j|i + p_i|j) / 2n, which sum to 1.
    Args: x (n, D) float tensor; perplexity in [1, n - 1).
    """
    import torch
    n, wanted = len(x), np.log(perplexity)
    result = torch.empty(n, n, dtype=x.dtype, device=x.device)
    for rows in row_blocks(n, x.device):
        own = torch.arange(rows.start, rows.stop, device=x.device)
        d2 = torch.cdist(x[rows], x).square_()  # (rows, n)
        d2[own - rows.start, own] = torch.inf
        d2 -= d2.amin(dim=1, keepdim=True)  # leaves p as it is; exp cannot underflow in a whole row
        d2[own - rows.start, own] = 0
        low, high = torch.zeros_like(d2[:, :1]), torch.full_like(d2[:, :1], torch.inf)
        beta = 1 / d2.mean(dim=1, keepdim=True).clamp_min(1e-12)
        for _ in range(64):
            p = torch.exp(-beta * d2)
            p[own - rows.start, own] = 0
            total = p.sum(dim=1, keepdim=True)
            error = total.log() + beta * (d2 * p).sum(dim=1, keepdim=True) / total - wanted
            if error.abs().max() < 1e-5:
                break
            low, high = torch.where(error > 0, beta, low), torch.where(error > 0, high, beta)
            beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
        result[rows] = p / total
    return (result + result.T).div_(2 * n)


def tsne_gradient(p, y, exaggeration: float = 1.0):
    """Gradient (n, 2) of KL(P || Q) at y (n, 2), P multiplied by `exaggeration`.

    4 sum_j (p_ij - q_ij) w_ij (y_i - y_j), w_ij = 1 / (1 + |y_i - y_j|^2), q_ij = w_ij / sum w.
    Written as row sums times y_i minus products with y, so that no (n, n, 2) is formed.
    """
    import torch
    n, square = len(y), y.square().sum(dim=1, keepdim=True)
    one = torch.ones_like(square)
    left = torch.cat([-2 * y, square + 1, one], dim=1)    # left_i . right_j = 1 + |y_i - y_j|^2
    right = torch.cat([y, one, square], dim=1).T.contiguous()  # (4, n)
    y_one = torch.cat([y, one], dim=1)
    attract, repel, total = torch.empty_like(y_one), torch.empty_like(y_one), 0
    for rows in row_blocks(n, y.device):
        w = (left[rows] @ right).reciprocal_()            # (rows, n)
        total = total + w.sum().double()
        attract[rows] = (p[rows] * w) @ y_one             # sum_j p_ij w_ij (y_j, 1)
        repel[rows] = w.square_() @ y_one
    total = (total - n).to(y.dtype)                       # without the diagonal, where w = 1
    force = exaggeration * attract - repel / total
    return 4 * (y * force[:, 2:] - force[:, :2])


def tsne(x, perplexity: float = 30, iterations: int = 500, seed: int = 0, progress=None):
    """Exact t-SNE of x (n, D) -> (n, 2) float32, on the device of x; memory 8 n^2 bytes.

    Gradient descent with gains from the first two principal components (standard deviation 1e-4,
    and a seeded 1e-6 that parts equal rows): exaggeration 12 and momentum 0.5 for 100 iterations,
    then 1 and 0.8; learning rate n / 12, at least 50. progress: one `update()` each iteration.
    Raises: ValueError for fewer than 3 rows, or a perplexity outside [1, n - 1).
    Assumed: all of this; B names t-SNE alone.
    """
    import torch
    x, n = x.detach().float(), len(x)
    if n < 3 or not 1 <= perplexity < n - 1:
        raise ValueError(f"tsne: found {n} rows and perplexity {perplexity}, wanted at least 3 "
                         f"rows and 1 <= perplexity < rows - 1")
    p = affinities(x, perplexity)
    centred = x - x.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)  # (D, 2)
    axes *= axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # else an arbitrary sign
    y = centred @ axes
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(y)
    y = 1e-4 * y / y[:, 0].std().clamp_min(1e-12) + 1e-6 * noise
    rate, step, gain = max(n / 12, 50), torch.zeros_like(y), torch.ones_like(y)
    for i in range(iterations):
        early = i < 100
        gradient = tsne_gradient(p, y, 12.0 if early else 1.0)
        same = gradient.sign() == step.sign()  # step points downhill: same sign is an overshoot
        gain = torch.where(same, gain * 0.8, gain + 0.2).clamp_min_(0.01)
        step = (0.5 if early else 0.8) * step - rate * gain * gradient
        y = y + step
        y -= y.mean(dim=0)
        if progress is not None:
            progress.update()
    return y


def nearest(z, n: int, group, k: int = 10):
    """For every row of z (N, D) its k nearest of the first n rows: (N, k).

    group (N,) integer tensor: rows of its own group, itself among them, are left out, so that
    another record of the same patient is no neighbour.
    """
    import torch
    found = []
    for start in range(0, len(z), 1024):
        distance = torch.cdist(z[start:start + 1024], z[:n])
        distance[group[start:start + 1024, None] == group[None, :n]] = torch.inf
        found.append(distance.topk(min(k, n), largest=False).indices)
    return torch.cat(found)


def mixing(kind: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """(kinds, 2) of kind (N,) = 0, 1, ... and neighbours (N, k), rows: per kind the mean share of
    neighbours of the same kind, and its share of all points: what mixed kinds would give."""
    same = (kind[neighbours] == kind[:, None]).mean(axis=1)
    return np.array([(same[kind == i].mean(), (kind == i).mean()) for i in range(kind.max() + 1)])


def embedding_points(model, cohort: Cohort, normalize: str, seed: int = FIGURE_SEED) -> dict:
    """What B's Figure 2 shows: embeddings of normal, abnormal and synthetic records.

    Of each kind at most POINTS // 3, drawn from the training records; the synthetic ones start from
    the normal records shown, their combinations are those of all training records.
    Returns: z (N, D) tensor, kind (N,) place in POINT_COLOUR, y (N, K) label sets, rows of the real
        records, combinations (M, K), counts (M,), min_count.
    Raises: InputError when the training records hold no normal or no abnormal one.
    """
    import torch

    import cardiowm
    rng, train = np.random.default_rng(seed), cohort.split == 0
    means_normal = np.isin(cohort.class_name, cohort.normal_codes)  # (K,)
    is_normal = ~cohort.label[:, ~means_normal].any(axis=1)
    rows = []
    for name, mask in (("normal", train & is_normal), ("abnormal", train & ~is_normal)):
        if not mask.any():
            raise InputError(f"--data {cohort.path}: no {name} training record (normal: no label "
                             f"but {', '.join(cohort.normal_codes) or 'none'}); a cohort with both "
                             "is wanted")
        found = np.flatnonzero(mask)
        rows.append(np.sort(rng.permutation(found)[:POINTS // 3]))
    labels, min_count = torch.from_numpy(cohort.label[train]), 50  # B: seen at least 50 times
    while not len((found := cardiowm.label_combinations(
            labels, min_count=min_count, normal=torch.from_numpy(means_normal)))[0]):
        if min_count == 1:
            raise InputError(f"--data {cohort.path}: no training record has 1 to 4 classes, so "
                             "there is no combination to synthesise")
        min_count //= 2
    real = np.concatenate(rows)
    progress = Progress(len(real), "records", "embed")
    z = embed(model, cohort.signal, real, normalize, progress)[1]
    progress.close()
    n = len(rows[0])
    synthetic = cardiowm.Augmentor(model, *found, total=POINTS // 3).batches(
        z[:n], 4096, torch.Generator().manual_seed(seed), torch.from_numpy(cohort.label[rows[0]]))
    z_new, y_new = (torch.cat(parts) for parts in zip(*synthetic, strict=True))
    return {"z": torch.cat([z, z_new]), "rows": real, "min_count": min_count,
            "kind": np.repeat([0, 1, 2], [n, len(real) - n, len(z_new)]),
            "y": np.concatenate([cohort.label[real], y_new.cpu().numpy().astype(np.uint8)]),
            "combinations": found[0].numpy(), "counts": found[1].numpy()}


def embedding_table(points: dict, cohort: Cohort) -> tuple[list[str], list[str]]:
    """Two tables of embedding.md, who the ten nearest neighbours in z are: by kind, by label set.

    A patient's own records are no neighbours; a synthetic row is of no patient.
    """
    import torch
    z, kind, y, n = points["z"], points["kind"], points["y"], len(points["rows"])
    patient = torch.from_numpy(cohort.subject_id[points["rows"]])
    group = torch.cat([patient, -1 - torch.arange(len(z) - n)]).to(z.device)
    shares = mixing(kind, nearest(z, len(z), group).cpu().numpy())
    length = z.norm(dim=1).cpu().numpy()
    kinds = [[name, f"{(kind == i).sum():,}", f"{share:.1%}", f"{chance:.1%}",
              f"{length[kind == i].mean():.2f}"]
             for i, (name, (share, chance)) in enumerate(zip(POINT_COLOUR, shares, strict=True))]
    neighbours = nearest(z, n, group).cpu().numpy()  # real ones only
    sets = []
    for combination, times in list(zip(points["combinations"], points["counts"], strict=True))[:12]:
        has = (y == combination).all(axis=1)
        share = has[neighbours].mean(axis=1)  # (N,)
        cells = [f"{share[mask].mean():.1%} of {mask.sum():,}" if mask.any() else "none shown"
                 for mask in (has & (kind == 2), has & (kind == 1), kind == 0)]
        sets.append(["+".join(np.array(cohort.class_name)[combination > 0]), f"{times:,}", *cells,
                     f"{has[:n].mean():.1%}"])
    return (markdown(["kind", "points", "of the same kind", "chance", "mean length of z"], kinds),
            markdown(["label set", "training records", "from synthetic", "from real of this set",
                      "from real normal", "chance"], sets))


def draw_embedding(points: dict, y_plot: np.ndarray, cohort: Cohort, text: str):
    """Two panels of the t-SNE y_plot (N, 2): by kind, and by the most frequent label sets."""
    plt = plotter()
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 8))
    kind, order = points["kind"], np.random.default_rng(FIGURE_SEED).permutation(len(y_plot))
    colours = np.array(list(POINT_COLOUR.values()))
    left.scatter(*y_plot[order].T, s=5, c=colours[kind[order]], linewidths=0, alpha=0.7)
    for i, name in enumerate(POINT_COLOUR):
        left.scatter([], [], s=30, c=colours[i], label=f"{name} ({(kind == i).sum():,})")
    left.set_title("kind of embedding")
    right.scatter(*y_plot.T, s=3, c="#dddddd", linewidths=0)
    for i, combination in enumerate(points["combinations"][:6]):
        has = (points["y"] == combination).all(axis=1)
        name = "+".join(np.array(cohort.class_name)[combination > 0])
        for mask, marker, size, word in ((has & (kind < 2), "o", 12, "real"),
                                         (has & (kind == 2), "x", 9, "synthetic")):
            right.scatter(*y_plot[mask].T, s=size, marker=marker, color=f"C{i}", alpha=0.8,
                          linewidths=0.6 if marker == "x" else 0,
                          label=f"{name}, {word} ({mask.sum():,})")
    right.scatter([], [], s=30, c="#dddddd", label="all other points")
    right.set_title("most frequent label sets, real (dots) and synthetic (crosses)")
    for axis, columns in ((left, 3), (right, min(4, 1 + len(points["combinations"])))):
        axis.set(xticks=[], yticks=[])
        axis.set_aspect("equal", "datalim")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=columns, fontsize=7.5,
                    frameon=False, columnspacing=0.8, handletextpad=0.2)
    figure.suptitle(text, fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.12, top=0.89, wspace=0.03)
    return figure


def run_embedding(args: argparse.Namespace) -> None:
    """`--mode embedding`: B's Figure 2 for one pretraining: embedding.png and embedding.md."""
    folder, model, checkpoint, cohort = one_world_model(args)
    points = embedding_points(model, cohort, checkpoint["normalize"])
    n, rows = len(points["kind"]), points["rows"]
    perplexity, iterations = min(30, (n - 1) / 3), 500
    progress = Progress(iterations, "iterations", f"t-SNE of {n:,} points")
    y_plot = tsne(points["z"], perplexity, iterations, FIGURE_SEED, progress).cpu().numpy()
    progress.close()
    head = (f"{caption(cohort, rows, 'training folds', FIGURE_SEED)}, and {n - len(rows):,} "
            f"synthetic embeddings; z of {folder.name}")
    normal = rows[points["kind"][:len(rows)] == 0]
    unlabelled = int((~cohort.has_label[normal]).sum())
    kinds, sets = embedding_table(points, cohort)
    lines = [f"## {head}", "", "![](embedding.png)", "",
             "Share of the 10 nearest neighbours in z (Euclidean; not in the plot) that are of the "
             "same kind; chance: the kind's share of all points. No record counts as neighbour of "
             "its own patient's records; synthetic rows of one source do.", "", *kinds,
             "Share of the 10 nearest real neighbours in z with exactly this label set, seen from "
             "its synthetic embeddings, from its real ones, and from normal records; chance: its "
             "share of the real points.", "", *sets]
    lines += [f"- normal: no label but {', '.join(cohort.normal_codes) or 'none'}; of the "
              f"{len(normal):,} shown {unlabelled:,} have no code at all"
              + (", which is not the same as healthy." if unlabelled else "."),
              "- synthetic: r([z; p(y_C - y)]) of the normal records shown, z often several times; "
              f"{len(points['counts'])} label sets C of 1 to 4 classes seen at least "
              f"{points['min_count']} times in training (B: 50), rows in proportion to 1/count.",
              f"- plot: exact t-SNE, perplexity {perplexity:.3g}, {iterations} iterations, seed "
              f"{FIGURE_SEED}; its distances between groups mean little. B shows 7,000 points."]
    text = "\n".join(lines) + "\n"
    print(text)
    title = f"{head}\nt-SNE of z, perplexity {perplexity:.3g}; label sets seen at least " \
            f"{points['min_count']} times"
    figure = draw_embedding(points, y_plot, cohort, title)
    write_files(Path(args.out), {"embedding.png": png(figure), "embedding.md": text})


# ----------------------------------------------------------------------------------------------
# Beyond the papers
# ----------------------------------------------------------------------------------------------
# Controls of every table: what a score is worth against knowing no ECG at all


def carry_forward(cohort: Cohort, rows: np.ndarray) -> np.ndarray:
    """Score (n, K) float32 of cohort rows (n,): the label of the patient's previous record, else 0.

    Strong in monitoring, since codes belong to a stay and the records of a stay share them.
    """
    previous = rows - 1  # a cohort is sorted by patient, then time; row 0 looks at row -1, refused
    known = (previous >= 0) & (cohort.subject_id[previous] == cohort.subject_id[rows])
    return np.where(known[:, None], cohort.label[previous], 0).astype(np.float32)


def age_and_sex(cohort: Cohort, rows: np.ndarray) -> np.ndarray:
    """Probability (n, K) float32 by logistic regression on age, age squared and sex alone.

    Fitted on all training records, each coefficient under a standard normal prior around the
    class's log odds. Missing age: the mean and a flag; unknown sex: a flag.
    """
    train = cohort.split == 0
    missing = np.isnan(cohort.age)
    known = cohort.age[train & ~missing].astype(np.float64)
    mean, std = (known.mean(), known.std() or 1.0) if len(known) else (0.0, 1.0)
    age = np.where(missing, 0, (cohort.age - mean) / std)
    feature = np.column_stack([np.ones(len(age)), age, age**2, cohort.sex == 1, cohort.sex < 0,
                               missing])  # (N, D), D = 6
    # Records of one age and sex are one binomial row: the fit is exact and does not grow with N.
    x, group, size = np.unique(feature[train], axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    start = np.cumsum(size) - size
    positives = np.add.reduceat(cohort.label[train][order], start, axis=0, dtype=np.float64)
    prior = np.log((positives.sum(axis=0) + 0.5) / ((size[:, None] - positives).sum(axis=0) + 0.5))
    beta = np.zeros((x.shape[1], positives.shape[1]))  # (D, K)
    for _ in range(100):  # Newton, steps of at most 1: rare classes would overshoot
        p = 1 / (1 + np.exp(-(prior + x @ beta)))  # (G, D) @ (D, K) -> (G, K)
        gradient = x.T @ (positives - size[:, None] * p) - beta
        weight = size[:, None] * p * (1 - p)
        hessian = np.einsum("gd,gk,ge->kde", x, weight, x, optimize=True) + np.eye(x.shape[1])
        step = np.linalg.solve(hessian, gradient.T[..., None])[..., 0].T
        step /= np.maximum(1, np.abs(step).max(axis=0))
        beta += step
        if np.abs(step).max() < 1e-8:
            break
    return (1 / (1 + np.exp(-(prior + feature[rows] @ beta)))).astype(np.float32)


def cohort_rows(run: dict, cohort: Cohort) -> np.ndarray:
    """Rows (n,) of the cohort that hold the test records of a run, in the run's order."""
    order = np.argsort(cohort.study_id, kind="stable")
    place = np.searchsorted(cohort.study_id[order], run["study_id"]).clip(max=len(order) - 1)
    rows = order[place]
    if (list(cohort.class_name) != run["class_name"].tolist()
            or (cohort.study_id[rows] != run["study_id"]).any()
            or (cohort.label[rows] != run["y_true"]).any()):
        raise InputError(f"run {run['path']}: classes, study_id or labels of its predictions are "
                         f"not those of the cohort {cohort.name}; train the run again")
    return rows


def controls(run: dict, cohort: Cohort) -> list[dict]:
    """Two rows for the table, shaped as runs, of the test records of `run` in its cohort."""
    rows = cohort_rows(run, cohort)
    both = (("carry-forward", "control: label of the previous record", carry_forward),
            ("age and sex", "control: logistic regression on all training patients, no ECG",
             age_and_sex))
    return [run | {"name": name, "mode": "control", "method": text, "frac": None, "seed": None,
                   "preset": None, "path": None, "y_score": function(cohort, rows)}
            for name, text, function in both]


def control_rows(runs: list[dict], data: Cohort | None) -> tuple[list[dict], str, Cohort | None]:
    """Control rows of one cohort's table, what there is to say about absent ones, the cohort."""
    run, cohort, note = runs[0], data, ""
    if cohort is None or cohort.sha256 != run["sha256"]:
        path, cohort = run["config"]["cohort"].get("path", ""), None
        try:
            cohort = Cohort(path)
            if cohort.sha256 != run["sha256"]:
                note, cohort = f"{path} has changed since the runs (sha256 differs)", None
        except InputError as error:
            note = str(error)
    rows, lines = [], []
    if cohort is None:
        lines = [f"- left out, carry-forward, age and sex and the sub-groups: {note}; give --data."]
    else:
        rows = controls(run, cohort)
    if not any("untrained encoder" in run["method"] for run in runs):
        lines.append("- control not among the runs: the probe on an untrained encoder "
                     "(train.py --mode probe --init random).")
    return rows, "\n".join(lines), cohort


# ----------------------------------------------------------------------------------------------
# Every pair of runs, every class, sub-groups of the test records
# ----------------------------------------------------------------------------------------------


def main_rows(rows: dict[tuple, dict]) -> list[dict]:
    """At most four rows for what would be too wide with all: MAIN_METHODS, else the first ones."""
    chosen = [rows[method, 1.0] for method in MAIN_METHODS if (method, 1.0) in rows]
    return chosen if len(chosen) > 1 else [row for row in rows.values() if row["frac"]][:4]


def row_name(row: dict) -> str:
    """Method and, below all patients, the fraction."""
    return row["method"] + (f", {100 * row['frac']:g} %" if row["frac"] not in (None, 1.0) else "")


def all_differences(rows: dict[tuple, dict]) -> list[list]:
    """CSV lines: the paired difference of any two rows, on each task, over either unit."""
    lines = [["method", "against", "task", "unit", "difference", "low", "high", "p"]]
    names = list(rows.values())
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            for task in a["cells"]:
                for unit in ("record", "patient"):
                    d = difference(a["cells"][task], b["cells"][task], unit)
                    lines.append([row_name(a), row_name(b), task, unit,
                                  *(d[key] for key in ("point", "low", "high", "p"))])
    return lines


def difference_lines(rows: dict[tuple, dict], unit: str) -> list[str]:
    """Markdown: every row less the first one; all other pairs are in differences.csv."""
    first, *others = rows.values()
    if not others:
        return []
    body = [[row_name(row)] + [text for task in row["cells"] for d in [
        difference(row["cells"][task], first["cells"][task], unit)]
        for text in (difference_text(d), "-" if np.isnan(d["p"]) else f"{d['p']:.3f}")]
        for row in others]
    head = [f"less {row_name(first)}"] + [text for task in first["cells"] for text in (task, "p")]
    return ["### Paired differences", "", *markdown(head, body),
            f"- [95 % interval over {unit}s], two-sided p by the same resamples; any two rows: "
            "differences.csv.", ""]


def class_lines(rows: dict[tuple, dict], task: str, names: list[str], unit: str) -> list[str]:
    """Markdown: every class of one task, most frequent first, of the first two main rows."""
    shown = main_rows(rows)[:2]
    cells = [row["cells"][task] for row in shown]
    if not cells or not cells[0]["scored"]:
        return []
    body = []
    for k in np.argsort(-cells[0]["positives"], kind="stable"):
        n = cells[0]["positives"][k]
        body.append([names[k], f"{n:,}", f"{n / cells[0]['scored']:.1%}"])
        both = [None if cell["boot"][unit] is None else cell["boot"][unit][1][:, k]
                for cell in cells]
        for cell, boot in zip(cells, both, strict=True):
            value = cell["classes"][k]
            body[-1].append("not defined" if np.isnan(value) else f"{value:.3f} " + bounds_text(
                *((np.nan, np.nan) if boot is None else _interval(boot)), unit))
        if len(cells) == 2:
            d = (np.nan,) * 3 if both[0] is None else paired_difference(*both[::-1])
            body[-1].append(difference_text({"point": np.diff([c["classes"][k] for c in cells])[0],
                                             "low": d[0], "high": d[1]}))
    head = ["class", "positives", "prevalence", *map(row_name, shown)] \
        + ["second less first"] * (len(shown) == 2)
    return [f"### Classes, {task}", "", *markdown(head, body),
            f"- [95 % interval over {unit}s], one class at a time; with a handful of positives it "
            "is too narrow, since resamples know no others. Every run: per_class.csv.", ""]


def subgroups(cohort: Cohort, rows: np.ndarray) -> dict[str, np.ndarray]:
    """{name: mask (n,)} of cohort rows: sex, age band, labelled, and the pair that ends here."""
    age, sex = cohort.age[rows], cohort.sex[rows]
    kind = np.full(len(cohort.study_id), -1)
    kind[cohort.pair[:, 1]] = cohort.pair_kind
    kind = kind[rows]
    other = "after a record of another stay" if (cohort.stay >= 0).any() else \
        "after a labelled record"  # no stays are known
    return {"all": np.ones(len(rows), bool), "female": sex == 0, "male": sex == 1,
            "sex unknown": sex < 0, "age < 50": age < 50, "age 50-64": (age >= 50) & (age < 65),
            "age 65-79": (age >= 65) & (age < 80), "age >= 80": age >= 80,
            "age unknown": np.isnan(age), "labelled": cohort.has_label[rows],
            "unlabelled": ~cohort.has_label[rows], "first record of the patient": kind < 0,
            "after a record of the same stay": kind == 0,
            other: kind == 1, "pair touches unlabelled": kind == 2}


def subgroup_table(runs: list[dict], rows: dict[tuple, dict], cohort: Cohort, where: np.ndarray,
                   unit: str, n_boot: int) -> tuple[list[str], list[list]]:
    """Markdown and CSV: macro-AUROC of the main rows in each sub-group of all test records."""
    shown, by_name = main_rows(rows), {run["name"]: run for run in runs}
    table = [["subgroup", "method", "frac", "records", "patients", "positives", "classes", "auroc",
              "low", "high", "unit"]]
    body = []
    for name, mask in subgroups(cohort, where).items():
        if not mask.any():
            continue
        line = []
        for row in shown:
            cells = []
            for run in (by_name[r] for r in row["runs"]):
                part = run | {key: run[key][mask] for key in (
                    "y_true", "y_score", "subject_id", "has_label", "first_in_stay", "pair_first")}
                cells.append(score(part, "monitoring", False, n_boot, (unit,)))
            cell = mean_cell(cells)
            classes = len(cell["classes"]) - len(cell["left_out"])
            line.append(cell_text(cell, unit))
            boot = cell["boot"][unit]
            table.append([name, row["method"], row["frac"], cell["scored"], cell["patients"],
                          cell["positives"].sum(), classes, cell["auroc"],
                          *((np.nan, np.nan) if boot is None else _interval(boot[0])), unit])
        body.append([name, f"{cell['scored']:,}", f"{cell['patients']:,}",
                     f"{cell['positives'].sum():,}", f"{classes}", *line])
    head = ["sub-group", "records", "patients", "positives", "classes", *map(row_name, shown)]
    return ["### Sub-groups of all test records", "", *markdown(head, body),
            f"- [95 % interval over {unit}s]. Sub-groups differ in the classes that have positives "
            "and negatives: compare methods within a line, not lines.", ""], table


# ----------------------------------------------------------------------------------------------
# Figures of the score: fewer patients (A, Figure 4), classes, training curves
# ----------------------------------------------------------------------------------------------


def draw_fractions(rows: dict[tuple, dict], unit: str, title: str):
    """A, Figure 4: macro-AUROC against the fraction of the training patients; None if all is 1."""
    plt = plotter()
    methods = [m for m in MAIN_METHODS if sum(m == row["method"] for row in rows.values()) > 1]
    tasks = [t for t in ("triage", "monitoring") if t in next(iter(rows.values()))["cells"]]
    if not methods or not tasks:
        return None
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.2), sharey=True,
                                squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for i, name in enumerate(methods):
            found = sorted((row["frac"], row["cells"][task]) for row in rows.values()
                           if row["method"] == name and not np.isnan(row["cells"][task]["auroc"]))
            x = np.array([frac for frac, _ in found]) * 1.06 ** (i - (len(methods) - 1) / 2)
            y = np.array([cell["auroc"] for _, cell in found])
            bounds = [(v, v) if cell["boot"][unit] is None else _interval(cell["boot"][unit][0])
                      for v, (_, cell) in zip(y, found)]
            low, high = np.array(bounds).reshape(-1, 2).T
            axis.errorbar(x, y, np.clip([y - low, high - y], 0, None), fmt="o-", color=f"C{i}",
                          capsize=3, label=name)
            paper = [(f, PAPER[name, f][task]) for f in (0.01, 0.1, 1.0)
                     if task in PAPER.get((name, f), {})]
            if paper:
                x, text = zip(*paper)  # "A 0.742 [0.733-0.756]", ...
                axis.plot(x, [float(t.split()[1].rstrip(",")) for t in text], "D", color=f"C{i}",
                          markerfacecolor="none", markersize=7)
        axis.plot([], [], "kD", markerfacecolor="none", label="paper A (MIMIC-IV-ECG)")
        axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="fraction of the training patients", title=task)
        axis.set_xticks([0.01, 0.1, 1.0], ["1 %", "10 %", "100 %"])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel(f"macro-AUROC [95 % over {unit}s]")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8,
                  frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    return figure


def draw_forest(rows: dict[tuple, dict], task: str, names: list[str], unit: str, title: str):
    """Per-class AUROC of the main rows with intervals, and the second less the first beside it."""
    plt = plotter()
    shown = main_rows(rows)
    cells = [row["cells"][task] for row in shown]
    if not cells or cells[0]["boot"][unit] is None:
        return None
    order = [k for k in np.argsort(cells[0]["positives"], kind="stable")
             if not np.isnan(cells[0]["classes"][k])]
    if not order:
        return None
    y = np.arange(len(order))
    panels = 1 + (len(cells) > 1)
    figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 1.6 + 0.3 * len(order)),
                                sharey=True, squeeze=False)
    for i, (row, cell) in enumerate(zip(shown, cells)):
        at = y + 0.18 * ((len(cells) - 1) / 2 - i)
        bounds = np.array([_interval(cell["boot"][unit][1][:, k]) for k in order])
        axes[0][0].hlines(at, *bounds.T, color=f"C{i}", linewidth=1.2)
        axes[0][0].plot(cell["classes"][order], at, "o", color=f"C{i}", markersize=3.5,
                        label=row_name(row))
    axes[0][0].axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[0][0].set(xlabel=f"AUROC [95 % over {unit}s]", ylim=(-0.7, len(order) - 0.3))
    axes[0][0].set_yticks(y, [f"{names[k]}  ({cells[0]['positives'][k]:,})" for k in order],
                          fontsize=8)
    if panels > 1:
        a, b = (cell["boot"][unit][1][:, order] for cell in cells[:2])
        bounds = np.array([paired_difference(b[:, j], a[:, j])[:2] for j in range(len(order))])
        clear = (bounds[:, 0] > 0) | (bounds[:, 1] < 0)
        axes[0][1].hlines(y, *bounds.T, color=np.where(clear, "black", "gray"))
        axes[0][1].scatter(cells[1]["classes"][order] - cells[0]["classes"][order], y, s=14,
                           color=np.where(clear, "black", "gray"), zorder=3)
        axes[0][1].axvline(0, color="gray", linewidth=0.8, linestyle=":")
        axes[0][1].set(xlabel=f"{row_name(shown[1])}\nless {row_name(shown[0])}, paired")
    for axis in axes[0]:
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title}\n{task}, classes by number of positives", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8,
                  frameon=False)
    figure.tight_layout(rect=(0, 0.5 / (1.6 + 0.3 * len(order)), 1, 1))
    return figure


def draw_curves(runs: list[dict], title: str):
    """log.jsonl of the runs: training loss of pretrainings, validation AUROC of all others."""
    plt = plotter()
    logs = {}
    for run in runs:
        if run["path"] is not None and (run["path"] / "log.jsonl").is_file():
            lines = (run["path"] / "log.jsonl").read_text(encoding="utf-8").splitlines()
            logs[run["name"]] = run["mode"], [json.loads(line) for line in lines]
    panels = {"pretrain": (("loss", "loss in training"), ("pred", "prediction error in training"),
                           ("val_pred", "prediction error, validation pairs")),
              "finetune": (("loss", "loss in training"), ("val_macro_auroc", "macro-AUROC, val")),
              "probe": (("val_macro_auroc", "macro-AUROC, val"),)}
    wanted = [(mode, key, text) for mode, keys in panels.items()
              if any(m == mode for m, _ in logs.values()) for key, text in keys]
    if not wanted:
        return None
    figure, axes = plt.subplots(-(-len(wanted) // 2), min(2, len(wanted)), squeeze=False,
                                figsize=(11, 0.4 + 3.5 * -(-len(wanted) // 2)))
    for axis, (mode, key, text) in zip(axes.flat, wanted):
        for i, (name, rows) in enumerate((n, r) for n, (m, r) in logs.items() if m == mode):
            seen = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if seen:
                axis.plot(*zip(*seen), label=name, linewidth=1.1, color=f"C{i % 10}",
                          linestyle=("-", "--", ":")[i // 10 % 3])
        axis.set(title=f"{mode}: {text}", xlabel="step")
        axis.set_xscale("log")
        if mode == "pretrain":
            axis.set_yscale("log")  # VICReg's loss is on another scale than SIGReg's
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis in axes.flat[len(wanted):]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


# ----------------------------------------------------------------------------------------------
# World-model scorecard: is the dynamics right, and is it the action that makes it so?
# ----------------------------------------------------------------------------------------------
SCORECARD_SEED = 0       # of distractors, shuffled actions, refits and subsets, in all runs
FIT_LIMIT = 50_000       # training pairs, and training records, that the controls are fitted on
DISTRACTORS = 999        # records of other patients among which the true next state is looked for
READOUT_L2 = 10.0        # of 1, 10 .. 10,000 that of the lowest validation BCE on the demo
MIN_POSITIVES = 10       # training positives that a class needs for a read-out
# An infarction does not go back to what was before, so no reversal is asked: ICD-10, PTB-XL
IRREVERSIBLE = ("I21", "IMI", "ASMI", "AMI", "ALMI", "ILMI", "LMI", "IPMI", "IPLMI", "PMI")
GAPS = {"gap < 1 day": (0, 1), "gap 1-30 days": (1, 30), "gap 30-365 days": (30, 365),
        "gap > 1 year": (365, np.inf)}  # days, the lower bound included
KINDS = {"within stay": 0, "between stays": 1, "touches unlabelled": 2}  # codes of pair_kind
PREDICTORS = ("model", "zero action", "shuffled action", "persistence", "mean",
              "refit with action", "refit without action", "refit with state change")
GAINS = {  # name: (predictor, what it is held against); 1 - sum of errors / sum of errors
    "skill against persistence": ("model", "persistence"),
    "gain over zero action": ("model", "zero action"),
    "gain over shuffled action": ("model", "shuffled action"),
    "gain of refit with over without action": ("refit with action", "refit without action"),
    "gain of refit with state change over without": ("refit with state change",
                                                     "refit without action")}
HEADLINE = ("all", "changed", "state changed")  # groups in the tables of gains and of retrieval
ROW = ("run", "part", "quantity", "group", "value", "low", "high", "pairs", "records", "patients",
       "note")  # columns of worldmodel.csv


def _patient_counts(n: int, n_boot: int, seed: int) -> np.ndarray:
    """(1 + n_boot, n): how often each patient occurs; row 0 is the cohort itself, once each."""
    rng = np.random.default_rng(seed)
    return np.stack([np.ones(n)] + [np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
                                    for _ in range(n_boot)])


def ratio_replicates(numerator: np.ndarray, denominator: np.ndarray, unit: np.ndarray,
                     n_boot: int, seed: int) -> np.ndarray:
    """sum(numerator) / sum(denominator) by column, (n, K) -> (1 + n_boot, K); row 0 is of all.

    Patients, numbered as np.unique(unit), are resampled: replicate r takes the r-th draw of
    np.random.default_rng(seed).integers(0, n, n). NaN where a denominator sums to 0.
    """
    ids, index = np.unique(unit, return_inverse=True)
    sums = np.zeros((2, len(ids), numerator.shape[1]))
    np.add.at(sums[0], index, numerator)
    np.add.at(sums[1], index, denominator)
    counts = _patient_counts(len(ids), n_boot, seed)  # (1 + n_boot, patients)
    above, below = counts @ sums[0], counts @ sums[1]
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def mean_interval(replicates: np.ndarray, patients: int) -> tuple[float, float, float]:
    """(1 + n_boot, K) -> value, low, high of the mean over K; one patient has no interval."""
    mean = _mean_defined(replicates)
    low, high = _interval(mean[1:]) if patients > 1 else (np.nan, np.nan)
    return float(mean[0]), low, high


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, unit: np.ndarray,
                   n_boot: int = 1000, seed: int = BOOTSTRAP_SEED) -> tuple[float, float, float]:
    """A ratio of sums with its percentile 95 % interval over patients: (value, low, high).

    Args: numerator, denominator, unit (n,); see `ratio_replicates`. Gains are
        numerator = e_base - e_model and denominator = e_base, means have denominator 1.
    """
    columns = [np.asarray(x, np.float64)[:, None] for x in (numerator, denominator)]
    return mean_interval(ratio_replicates(*columns, unit, n_boot, seed), len(np.unique(unit)))


# One-step error


def shuffled_actions(a: np.ndarray, y: np.ndarray, seed: int = SCORECARD_SEED) -> np.ndarray:
    """Actions (P, K) dealt anew among the pairs that have one; pairs without keep their zeros.

    Each changed pair gets the action of another, drawn among those that its source label set
    y (P, K) allows (no code begins that is there, none ends that is not) and that differ from its
    own. Where there is none it gets no action.
    """
    rng, result = np.random.default_rng(seed), np.zeros_like(a)
    changed = np.flatnonzero(a.any(axis=1))
    for p in changed:
        after = y[p].astype(np.int8) + a[changed]  # (changed, K)
        fits = ((after == 0) | (after == 1)).all(axis=1) & (a[changed] != a[p]).any(axis=1)
        if fits.any():
            result[p] = a[rng.choice(changed[fits])]
    return result


def pair_groups(cohort: Cohort, pairs: np.ndarray) -> dict[str, np.ndarray | str]:
    """Group name -> mask (P,) over these pairs, or the reason why the group is not defined."""
    changed = cohort.action[pairs].any(axis=1)
    groups = {"all": np.ones(len(pairs), bool), "changed": changed, "unchanged": ~changed}
    if cohort.state is not None:
        groups["state changed"] = own_action(cohort, pairs, "state").any(axis=1)
    for name, kind in KINDS.items():
        groups[name] = cohort.pair_kind[pairs] == kind
        if kind < 2 and not (cohort.stay >= 0).any():
            groups[name] = "the cohort has no stays"
    for name, (low, high) in GAPS.items():
        gap = cohort.gap_days[pairs]  # NaN, a time is missing: in none
        groups[name] = (gap >= low) & (gap < high)
        if cohort.source == "ptbxl":
            groups[name] = "part of PTB-XL's dates are interpolated"
    return groups


def pair_error(z_pred, z_next) -> np.ndarray:
    """Mean over D of (z_pred - z_next)^2, tensors (P, D) -> (P,) float64."""
    return (z_pred - z_next).double().square().mean(dim=1).cpu().numpy()


def one_step(model, z, a, y: np.ndarray, no_action: str = "") -> dict:
    """What a frozen model predicts, (P, D) by name, or the reason why there is no prediction.

    Args: z (P, D); a (P, K) the model's own action input; y (P, K) the source's codes that `a`
        starts from; no_action: why the model has none, if so.
    """
    import torch
    with torch.no_grad():
        result = {"model": model.predict(z, a), "zero action": no_action, "persistence": z,
                  "shuffled action": no_action or "fewer than two test pairs have an action"}
        if not no_action:
            result["zero action"] = model.predict(z, torch.zeros_like(a))
            if (a != 0).any(dim=1).sum() > 1:
                shuffled = torch.from_numpy(shuffled_actions(
                    a.cpu().numpy().astype(np.int8), y)).to(a)
                result["shuffled action"] = model.predict(z, shuffled)
    return result


def refit_predictor(model_args: dict, train: tuple, val: tuple, seed: int = SCORECARD_SEED,
                    patience: int = 10, checks: int = 200):
    """The model's predictor (and action encoder), fitted anew on frozen z.

    Trained beside the encoder, a predictor could make zero action bad by never having seen it on a
    changed pair; refits with and without the action get one recipe: AdamW at the pretraining's rate
    and decay, batches of 256, and the weights of the lowest validation error, looked at once per
    epoch (but every 20 steps at least), until it has not fallen for `patience` looks.

    Args: model_args of cardiowm.WorldModel; train, val: (z (P, D), a (P, K) float or None for a
        predictor without action, z_next (P, D)) on one device.
    Returns: WorldModel in eval mode whose `predict` alone is of use.
    """
    import torch

    import cardiowm
    z, a, z_next = train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cardiowm.WorldModel(**model_args | {"action": a is not None})
    model.encoder = model.projector = None
    model = model.to(z.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-4},
         {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}], lr=1e-3)
    generator, size = torch.Generator().manual_seed(seed), min(256, len(z))
    best, best_error, best_check = None, np.inf, 0
    for check in range(checks):
        model.train()
        for _ in range(max(len(z) // size, 20)):
            i = torch.randperm(len(z), generator=generator)[:size].to(z.device)
            z_pred = model.predict(z[i], None if a is None else a[i])
            optimizer.zero_grad()
            (z_pred - z_next[i]).square().mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            error = (model.predict(*val[:2]) - val[2]).square().mean().item()
        if error < best_error:
            best_error, best_check = error, check
            best = {name: value.clone() for name, value in model.state_dict().items()}
        elif check - best_check >= patience:
            break
    model.load_state_dict(best)
    return model


# Retrieval of the true next state


def retrieval(query: np.ndarray, target: np.ndarray, candidates: np.ndarray,
              distractors: list[np.ndarray]) -> np.ndarray:
    """Rank of the target among itself and the distractors by Euclidean distance to the query.

    Args: query, target (P, D); candidates (N, D); distractors: for each pair rows of candidates.
    Returns: (P,) float64, 1 is the nearest; ties take the mean of their ranks, so a collapsed
        latent space gains nothing.
    """
    rank = np.empty(len(query))
    for p, rows in enumerate(distractors):
        others = np.concatenate([target[p:p + 1], candidates[rows]]) - query[p]  # (1 + n, D)
        distance = np.einsum("nd,nd->n", others, others)
        own, rest = distance[0], distance[1:]
        rank[p] = 1 + (rest < own).sum() + (rest == own).sum() / 2
    return rank


def retrieval_scores(rank: np.ndarray) -> dict[str, np.ndarray]:
    """(P,) ranks -> hit@1, hit@10 and reciprocal rank of each pair."""
    return {"hit@1": (rank <= 1) * 1.0, "hit@10": (rank <= 10) * 1.0, "MRR": 1 / rank}


def retrieval_chance(n: np.ndarray) -> dict[str, np.ndarray]:
    """What a random order of n (P,) candidates, the target among them, is expected to score."""
    harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, n.max(initial=0) + 1))])
    return {"hit@1": 1 / n, "hit@10": np.minimum(n, 10) / n, "MRR": harmonic[n] / n}


def distractor_sets(subject: np.ndarray, pair: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Rows of the test records (N,) that stand beside the target of each pair (P, 2).

    Other patients: the first DISTRACTORS of them in one random order, the same for all pairs. Same
    patient: the patient's other records without source and target; may be none.
    """
    order = np.random.default_rng(SCORECARD_SEED).permutation(len(subject))
    order = order[:DISTRACTORS + np.unique(subject, return_counts=True)[1].max()]  # as many suffice
    others, same = [], []
    for source, target in pair:
        others.append(order[subject[order] != subject[source]][:DISTRACTORS])
        rows = np.flatnonzero(subject == subject[source])
        same.append(rows[(rows != source) & (rows != target)])
    return {"other patients": others, "same patient": same}


# Onset read-out


def fit_readout(z, y, l2: float = READOUT_L2) -> tuple:
    """L2-regularised logistic regression of each class on z, deterministic.

    Minimises sum of BCE + l2 / 2 |coefficients|^2 per class, on z standardised over the records,
    around the class's log odds (with half a record of each kind, so that none is infinite).
    Args: z (N, D) tensor; y (N, K) of 0 and 1, array or tensor.
    Returns: weight (D, K) and bias (K,), for logits z @ weight + bias of raw z; dtype and device
        of z.
    """
    import torch
    from torch.nn import functional
    y = torch.as_tensor(y).to(z.device, torch.float64)
    mean, std = z.double().mean(dim=0), z.double().std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    x = functional.pad((z.double() - mean) / std, (0, 1), value=1.0)     # (N, D + 1)
    positives = y.sum(dim=0)
    prior = ((positives + 0.5) / (len(y) - positives + 0.5)).log()       # (K,)
    beta = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([beta], max_iter=1000, history_size=20, tolerance_grad=1e-7,
                               tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = functional.binary_cross_entropy_with_logits(prior + x @ beta, y, reduction="sum")
        value = (value + l2 / 2 * beta.square().sum()) / len(y)
        value.backward()
        return value

    solver.step(loss)
    weight = beta.detach()[:-1] / std[:, None]
    bias = prior + beta.detach()[-1] - mean @ weight
    return weight.to(z.dtype), bias.to(z.dtype)


def onset_rises(model, z, y, readout, classes: list[int]) -> tuple[np.ndarray, ...]:
    """How the logit of class c moves when c begins, and when other classes begin instead.

    Args: z (N, D); y (N, K) of 0/1; readout: z -> logits (N, len(classes)) of these classes.
    Returns: three (N, len(classes)) arrays. zero: logit_c(r(z, 0)). own: logit_c(r(z, e_c)) - zero,
        NaN for a record that has c. others: the mean of logit_c(r(z, e_j)) - zero over the classes
        j != c that the record lacks, NaN if it lacks none.
    """
    import torch
    with torch.no_grad():
        none = torch.zeros(y.shape, device=z.device)
        zero = readout(model.predict(z, none))
        own, total = torch.full_like(zero, np.nan), torch.zeros_like(zero)
        count = torch.zeros_like(zero)
        for k, c in enumerate(classes):
            a = none.clone()
            a[:, c] = 1
            rise = readout(model.predict(z, a)) - zero
            lacks = y[:, c] == 0
            own[lacks, k] = rise[lacks, k]
            other = torch.arange(len(classes), device=z.device) != k
            counted = lacks[:, None] & other  # (N, classes)
            total += torch.where(counted, rise, 0)
            count += counted
        return tuple(x.cpu().numpy() for x in (zero, own, total / count))


def share_above(x: np.ndarray) -> np.ndarray:
    """1 where x > 0, 0.5 where x = 0, else 0; NaN becomes 0, count it in the denominator."""
    return (x > 0) + 0.5 * (x == 0)


def onset_auroc(zero: np.ndarray, own: np.ndarray, unit: np.ndarray, n_boot: int, seed: int,
                block: int = 64) -> np.ndarray:
    """AUROC of the logit after onset against after zero action, (N, K) -> (1 + n_boot, K).

    Replicates are those of `ratio_replicates`: patients are drawn from all N records. A patient
    drawn twice meets itself more often, so the interval lies a little high in a small cohort.
    """
    ids, index = np.unique(unit, return_inverse=True)
    counts = np.ascontiguousarray(_patient_counts(len(ids), n_boot, seed).T)  # (patients, R)
    result = np.full((counts.shape[1], own.shape[1]), np.nan)
    for k in range(own.shape[1]):
        keep = ~np.isnan(own[:, k])
        if keep.any():
            score = np.concatenate([zero[keep, k] + own[keep, k], zero[keep, k]])
            row_unit = np.tile(index[keep], 2)
            plan = _rank_plan(np.arange(len(score)) < keep.sum(), score, row_unit)
            size = np.bincount(row_unit, minlength=len(ids))
            result[:, k] = np.concatenate([_weighted_auroc(
                [plan], np.ascontiguousarray(counts[:, start:start + block]), size)[:, 0]
                for start in range(0, counts.shape[1], block)])
    return result


def without_signature(cohort: Cohort) -> list[str]:
    """Classes of a synthetic cohort that do not change the ECG: negative controls of any read-out.

    Found by simulating: an empty entry of SIGNATURE is not enough, since some codes act elsewhere
    (on the rhythm, or by the patient's coronary territory).
    """
    if not cohort.synthetic:
        return []
    plain = simulate(0, (), 0)
    return [name for name in cohort.class_name
            if name in SIGNATURE and (simulate(0, name, 0) == plain).all()]


# Reversal, latent space, patient re-identification


def reversal(model, z, a, z_next) -> dict[str, np.ndarray]:
    """Mean over D of the squared distance to z (P, D) after two steps, (P,) float64 each."""
    import torch
    with torch.no_grad():
        none = torch.zeros_like(a)
        there = model.predict(z, a)
        return {"there and back: r(r(z, a), -a)": pair_error(model.predict(there, -a), z),
                "wrong sign: r(r(z, a), a)": pair_error(model.predict(there, a), z),
                "two zero steps: r(r(z, 0), 0)": pair_error(
                    model.predict(model.predict(z, none), none), z),
                "scale: z_next": pair_error(z_next, z)}


def latent_state(z) -> dict[str, float]:
    """Collapse and shape of z (N, D), N >= 2: effective rank, std by dimension, SIGReg, mean norm.

    SIGReg scales with N: taken on min(512, N) records and 256 directions, both of a fixed seed; its
    expectation is 1.052 under N(0, I).
    """
    import torch

    import cardiowm
    z = z.float().cpu()
    std = z.std(dim=0)  # (D,)
    generator = torch.Generator().manual_seed(SCORECARD_SEED)
    some = z[torch.randperm(len(z), generator=generator)[:512]]
    return {"effective rank": float(cardiowm.effective_rank(z)), "std, min": float(std.min()),
            "std, median": float(std.median()), "std, max": float(std.max()),
            "SIGReg": float(cardiowm.SIGReg()(some, generator=generator)),
            "mean norm": float(z.norm(dim=1).mean())}


def reidentification(h, subject: np.ndarray, block: int = 1024) -> tuple[np.ndarray, ...]:
    """Is the nearest other record, by cosine of h (N, 256), of the same patient?

    Returns: rows (n,) of the records whose patient has another one; hit (n,) in [0, 1], the share
        of the same patient among the nearest when several tie; chance (n,).
    """
    import torch
    unit = torch.nn.functional.normalize(h.double(), dim=1)
    patient = torch.from_numpy(np.unique(subject, return_inverse=True)[1]).to(h.device)
    hit, chance = [], []
    for start in range(0, len(unit), block):
        i = torch.arange(start, min(start + block, len(unit)), device=h.device)
        cosine = unit[i] @ unit.T                                   # (block, N)
        same = patient[i, None] == patient
        cosine[i - start, i], same[i - start, i] = -np.inf, False   # not itself
        nearest = cosine >= cosine.amax(dim=1, keepdim=True) - 1e-12  # ties, but for rounding
        hit.append((nearest & same).sum(dim=1) / nearest.sum(dim=1))
        chance.append(same.sum(dim=1) / (len(unit) - 1))
    hit, chance = (torch.cat(x).double().cpu().numpy() for x in (hit, chance))
    rows = np.flatnonzero(chance > 0)
    return rows, hit[rows], chance[rows]


# Rows of worldmodel.csv, part by part


def undefined(part: str, quantity: str, group: str, why: str) -> dict:
    """A row that has no value, and why."""
    return dict.fromkeys(ROW, "") | {"part": part, "quantity": quantity, "group": group,
                                     "note": f"not defined: {why}"}


def measured(part: str, quantity: str, group: str, interval: tuple, subject: np.ndarray,
             counted: str = "pairs") -> dict:
    """A row with (value, low, high); `counted` names what subject (n,) has one entry for."""
    if np.isnan(interval[0]):
        return undefined(part, quantity, group, f"no such {counted[:-1]}" if not len(subject)
                         else "0 / 0")
    value = dict(zip(("value", "low", "high"), interval, strict=True))
    return undefined(part, quantity, group, "") | value | {
        counted: len(subject), "patients": len(np.unique(subject)), "note": ""}


def error_rows(predicted: dict, z_next, groups: dict, subject: np.ndarray, n_boot: int) -> list:
    """Part 1. predicted: name -> z_pred (P, D) or the reason why there is none."""
    rows, part = [], "one-step error"
    errors = {name: p if isinstance(p, str) else pair_error(p, z_next)
              for name, p in predicted.items()}

    def add(part, quantity, above, below, why=""):
        for group, mask in groups.items():
            if why or isinstance(mask, str):
                rows.append(undefined(part, quantity, group, why or mask))
            elif not mask.any():
                rows.append(undefined(part, quantity, group, "no such pair"))
            else:
                rows.append(measured(part, quantity, group, ratio_interval(
                    above[mask], below[mask], subject[mask], n_boot), subject[mask]))

    for name, error in errors.items():
        why = error if isinstance(error, str) else ""
        add(part, name, error, None if why else np.ones(len(error)), why)
    for name, (better, base) in GAINS.items():
        pair = [errors.get(key, "no such predictor") for key in (better, base)]
        why = next((e for e in pair if isinstance(e, str)), "")
        add("gain", name, None if why else pair[1] - pair[0], pair[1], why)
    return rows


def retrieval_rows(queries: dict, z, pair: np.ndarray, groups: dict, subject: np.ndarray,
                   n_boot: int) -> list:
    """Part 2. queries: name -> (P, D) or a reason; z (N, D), subject (N,) of the test records."""
    rows, z = [], z.float().cpu().numpy()
    patient = subject[pair[:, 0]]
    for among, sets in distractor_sets(subject, pair).items():
        part, n = f"retrieval among {among}", np.array([1 + len(s) for s in sets])
        scores = {name: q if isinstance(q, str) else retrieval_scores(retrieval(
            q.float().cpu().numpy(), z[pair[:, 1]], z, sets)) for name, q in queries.items()}
        scores["chance"] = retrieval_chance(n)
        for group in (g for g in HEADLINE if g in groups):
            mask = groups[group] & (n > 1)
            for name, score in scores.items():
                for metric in ("hit@1", "hit@10", "MRR"):
                    if isinstance(score, str) or not mask.any():
                        why = score if isinstance(score, str) else "no pair with a distractor"
                        rows.append(undefined(part, f"{metric}, {name}", group, why))
                        continue
                    value, low, high = ratio_interval(score[metric][mask], np.ones(mask.sum()),
                                                      patient[mask], n_boot)
                    if name == "chance":
                        low = high = np.nan
                    rows.append(measured(part, f"{metric}, {name}", group, (value, low, high),
                                         patient[mask]))
            if mask.any():
                mean = float((n[mask] - 1).mean())
                rows.append(measured(part, "distractors per pair", group, (mean, np.nan, np.nan),
                                     patient[mask]))
    return rows


def onset_rows(model, fit: tuple, test: tuple, subject: np.ndarray, names: list[str],
               silent: list[str], n_boot: int) -> list:
    """Part 3. fit, test: (z (N, D), y (N, K) tensors); silent: names without signature."""
    (z, y), (z_test, y_test), part = fit, test, "onset read-out"
    positives = y.sum(dim=0)
    enough = (positives >= MIN_POSITIVES) & (positives < len(y))
    classes = enough.nonzero()[:, 0].tolist()
    rows = [undefined(part, "sign rate", names[c], f"fewer than {MIN_POSITIVES} training positives "
                      "or no negatives") for c in (~enough).nonzero()[:, 0].tolist()]
    if not classes:
        return rows + [undefined(part, "sign rate", "all classes", "no class has a read-out")]
    weight, bias = fit_readout(z, y[:, classes])

    def readout(v):
        return v @ weight + bias

    zero, own, others = onset_rises(model, z_test, y_test, readout, classes)
    lacks, both = ~np.isnan(own), ~np.isnan(own - others)
    replicates = {  # of each class, all on the same draws of patients
        "sign rate": ratio_replicates(share_above(own), lacks, subject, n_boot, BOOTSTRAP_SEED),
        "own onset above the other onsets": ratio_replicates(
            share_above(own - others), both, subject, n_boot, BOOTSTRAP_SEED),
        "AUROC after onset": onset_auroc(zero, own, subject, n_boot, BOOTSTRAP_SEED),
        "mean rise (logits)": ratio_replicates(np.nan_to_num(own), lacks, subject, n_boot,
                                               BOOTSTRAP_SEED)}
    tested = np.array([names[c] for c in classes])
    control, patients = np.isin(tested, silent), len(np.unique(subject))
    sets = {"all classes": np.ones(len(tested), bool)}
    if control.any() and not control.all():
        sets |= {"with signature": ~control, "without signature (control)": control}
    for quantity, value in replicates.items():
        for group, mask in sets.items():
            of = subject[lacks[:, mask].any(axis=1)]
            rows.append(measured(part, quantity, group, mean_interval(value[:, mask], patients), of,
                                 "records"))
        if len(sets) > 1:
            contrast = _mean_defined(value[:, ~control]) - _mean_defined(value[:, control])
            rows.append(measured(part, quantity, "with - without signature",
                                 mean_interval(contrast[:, None], patients), subject, "records"))
        rows += [measured(part, quantity, name, mean_interval(value[:, k:k + 1], patients),
                          subject[lacks[:, k]], "records") for k, name in enumerate(tested)]
    truth = auroc(y_test[:, classes].cpu().numpy(), readout(z_test).cpu().numpy())
    for name, value in [("all classes", _mean_defined(truth[None])[0]), *zip(tested, truth)]:
        quantity = "AUROC of the read-out on z"
        rows.append(undefined(part, quantity, name, "no test record with it, or none without")
                    if np.isnan(value) else measured(
                        part, quantity, name, (value, np.nan, np.nan), subject, "records"))
    return rows


def reversal_rows(model, z, a, z_next, names: list[str], subject: np.ndarray, no_action: str,
                  n_boot: int) -> list:
    """Part 4, on the pairs with an action that changes no irreversible class."""
    fixed = [c for c, name in enumerate(names) if name in IRREVERSIBLE]
    part, group = "reversal", " ".join(["action without", *(names[c] for c in fixed)])
    keep = (a != 0).any(dim=1) & ~(a[:, fixed] != 0).any(dim=1)
    if no_action or not keep.any():
        return [undefined(part, "there and back: r(r(z, a), -a)", group,
                          no_action or "no such pair")]
    errors = reversal(model, z[keep], a[keep], z_next[keep])
    subject = subject[keep.cpu().numpy()]
    rows = [measured(part, name, group, ratio_interval(error, np.ones(len(error)), subject, n_boot),
                     subject) for name, error in errors.items()]
    back, wrong = list(errors.values())[:2]
    return rows + [measured(part, "gain of -a over the wrong sign", group, ratio_interval(
        wrong - back, wrong, subject, n_boot), subject)]


def latent_rows(h, z, subject: np.ndarray, n_boot: int) -> list:
    """Parts 5 and 6: the latent space of the test records, and whose record it is."""
    rows = [measured("latent space", f"{key} of {name}", "test records", (value, np.nan, np.nan),
                     subject, "records")
            for name, x in (("z", z), ("h", h)) for key, value in latent_state(x).items()
            if name == "z" or key not in ("SIGReg", "mean norm")]
    part, group = "re-identification", "records with another of the patient"
    which, hit, chance = reidentification(h, subject)
    if not len(which):
        return rows + [undefined(part, "hit@1", group, "no patient has two test records")]
    subject = subject[which]
    return rows + [measured(part, "hit@1", group, ratio_interval(
        hit, np.ones(len(hit)), subject, n_boot), subject, "records"), measured(
        part, "chance", group, (float(chance.mean()), np.nan, np.nan), subject, "records")]


# The mode: embed, call the parts, write


def scorecard_runs(names: list[str]) -> list[dict]:
    """Finished pretrainings of one cohort, as load_run gives them, with `label` and `action`."""
    runs = []
    for folder in find_runs(names, "pretrain")[0]:
        model, checkpoint = load_world_model(folder)
        run = load_run(folder)
        action = run["config"]["args"].get("action") or "coded"
        why = why_no_action(model, checkpoint)
        label = run["name"] if run["name"] not in [r["label"] for r in runs] else str(folder)
        runs.append(run | {"model": model, "checkpoint": checkpoint, "label": label,
                           "action": action, "no_action": why,
                           "method": run["method"].removeprefix("online probe, ")})
    cohorts = {run["sha256"]: f"{run['label']} of {run['cohort']} ({run['sha256'][:8]})"
               for run in runs}
    if len(cohorts) > 1:
        raise InputError(f"--runs: {', '.join(cohorts.values())} are of different cohorts, which "
                         "cannot stand in one table; give the runs of one cohort")
    return runs


def scorecard_rows(cohort: Cohort) -> dict[str, np.ndarray]:
    """Which pairs and records are used: test all of them, training at most FIT_LIMIT of each."""
    split, rng = cohort.split[cohort.pair[:, 0]], np.random.default_rng(SCORECARD_SEED)
    if not (split == 2).any():
        raise InputError(f"{cohort.path}: no test patient has two records; a cohort with test "
                         "pairs is wanted")
    used = {"test pairs": np.flatnonzero(split == 2), "val pairs": np.flatnonzero(split == 1),
            "test": np.flatnonzero(cohort.split == 2)}
    for name, all_of in (("train pairs", np.flatnonzero(split == 0)),
                         ("train", np.flatnonzero(cohort.split == 0))):
        used[name] = np.sort(rng.permutation(all_of)[:FIT_LIMIT])
    used["rows"] = np.unique(np.concatenate([used["test"], used["train"], *(
        cohort.pair[used[f"{name} pairs"]].ravel() for name in ("val", "train"))]))
    return used


def fitted_controls(run: dict, cohort: Cohort, used: dict, z, z_test) -> dict:
    """Predictions (P, D) of the training mean and of the refits for the test pairs, or reasons.

    z (rows, D) of used["rows"]; z_test (P, D) of the test pairs' sources.
    """
    import torch
    place = {name: torch.from_numpy(np.searchsorted(used["rows"], cohort.pair[
        used[f"{name} pairs"]])).to(z.device) for name in ("train", "val")}  # (P, 2)
    short = "" if len(place["train"]) > 1 and len(place["val"]) else (
        f"{len(place['train'])} training and {len(place['val'])} validation pairs")
    result = {"mean": z[place["train"][:, 1]].mean(dim=0).expand_as(z_test)
              if len(place["train"]) else "no training pairs"}
    for name, which in (("refit with action", "coded"), ("refit without action", None),
                        ("refit with state change", "state")):
        if which == "state" and cohort.state is None:
            result[name] = "the true states are known in the demo cohort alone"
        elif short:
            result[name] = short
        else:
            action = {part: None if which is None else torch.from_numpy(own_action(
                cohort, used[f"{part} pairs"], which)).to(z) for part in ("train", "val", "test")}
            data = [(z[place[part][:, 0]], action[part], z[place[part][:, 1]])
                    for part in ("train", "val")]
            model = refit_predictor(run["checkpoint"]["model_args"], *data)
            with torch.no_grad():
                result[name] = model.predict(z_test, action["test"])
    return result


def training_fit_rows(run: dict, cohort: Cohort, used: dict, z, n_boot: int) -> list[dict]:
    """The model's error on training pairs: where it is far below that on test pairs, the encoder
    has learnt them by heart, and what is refitted on its training z inherits that."""
    import torch
    told = run["checkpoint"]["args"]
    if run["frac"] != 1 or told.get("pairs", "all") != "all" or told.get("labelled_only"):
        return [undefined("training fit", "model", "training pairs",
                          "the run was trained on a part of these pairs")]
    pairs = used["train pairs"]
    source, target = (z[torch.from_numpy(np.searchsorted(used["rows"], rows)).to(z.device)]
                      for rows in cohort.pair[pairs].T)
    a = torch.from_numpy(own_action(cohort, pairs, run["action"])).to(z)
    with torch.no_grad():
        predicted = {"model": run["model"].predict(source, a), "persistence": source}
    subject = cohort.subject_id[cohort.pair[pairs, 0]]
    return [measured("training fit", name, "training pairs", ratio_interval(
        pair_error(z_pred, target), np.ones(len(pairs)), subject, n_boot), subject)
        for name, z_pred in predicted.items()]


def scorecard(run: dict, cohort: Cohort, used: dict, n_boot: int, progress: Progress) -> list[dict]:
    """All rows of one run."""
    import torch
    model, silent = run["model"], without_signature(cohort)
    h, z = embed(model, cohort.signal, used["rows"], run["checkpoint"]["normalize"], progress)

    def at(rows):  # positions in z
        return torch.from_numpy(np.searchsorted(used["rows"], rows)).to(z.device)

    pairs, subject = used["test pairs"], cohort.subject_id[used["test"]]
    pair = np.searchsorted(used["test"], cohort.pair[pairs])  # (P, 2) rows of the test records
    z_test, patient = z[at(used["test"])], subject[pair[:, 0]]
    source, target = z_test[pair[:, 0]], z_test[pair[:, 1]]
    a = torch.from_numpy(own_action(cohort, pairs, run["action"])).to(z)  # (P, K)
    groups = pair_groups(cohort, pairs)
    known = cohort.state if run["action"] == "state" else cohort.label
    predicted = one_step(model, source, a, known[cohort.pair[pairs, 0]], run["no_action"])
    queries = {name: predicted[name] for name in ("model", "zero action", "persistence")}
    predicted |= fitted_controls(run, cohort, used, z, source)
    rows = error_rows({name: predicted[name] for name in PREDICTORS}, target, groups, patient,
                      n_boot)
    rows += training_fit_rows(run, cohort, used, z, n_boot)
    rows += retrieval_rows(queries, z_test, pair, groups, subject, n_boot)
    if run["no_action"]:
        rows.append(undefined("onset read-out", "sign rate", "all classes", run["no_action"]))
    else:
        y = torch.from_numpy(known).to(z.device)
        rows += onset_rows(model, (z[at(used["train"])], y[used["train"]]),
                           (z_test, y[used["test"]]), subject, cohort.class_name, silent, n_boot)
    rows += reversal_rows(model, source, a, target, cohort.class_name, patient, run["no_action"],
                          n_boot)
    rows += latent_rows(h[at(used["test"])], z_test, subject, n_boot)
    return [row | {"run": run["label"]} for row in rows]


def untrained_rows(run: dict, cohort: Cohort, used: dict, n_boot: int, progress: Progress) -> list:
    """Parts 5 and 6 of an untrained model: what architecture and signal give without learning."""
    import torch

    import cardiowm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SCORECARD_SEED)
        model = cardiowm.WorldModel(**run["checkpoint"]["model_args"]).eval().to(pick_device())
    h, z = embed(model, cohort.signal, used["test"], run["checkpoint"]["normalize"], progress)
    return [row | {"run": "untrained encoder"}
            for row in latent_rows(h, z, cohort.subject_id[used["test"]], n_boot)]


def interval_text(row: dict | None, digits: int = 3) -> str:
    """`0.123 [-0.010..0.240]` of a row, without the bracket where there is no interval."""
    if row is None:
        return ""
    return "not defined" if row["value"] == "" else with_interval(
        (row["value"], row["low"], row["high"]), digits)


def counts_text(rows: list[dict | None]) -> list[str]:
    """n (pairs or records) and patients of the rows of one line; several where the runs differ."""
    found = [row for row in rows if row and row["value"] != ""]
    return [" / ".join(dict.fromkeys(f"{n:,}" for n in numbers)) or "0" for numbers in (
        [row["pairs"] or row["records"] for row in found], [row["patients"] for row in found])]


def part_table(rows: list[dict], part: str, labels: list[str], groups: tuple = (),
               skip: tuple = ()) -> list[str]:
    """One part as Markdown: quantities and groups down, runs across; then what is not defined."""
    of_part = [row for row in rows if row["part"] == part and row["group"] not in skip
               and (not groups or row["group"] in groups)]
    cells = {(row["quantity"], row["group"], row["run"]): row for row in of_part}
    keys = list(dict.fromkeys((row["quantity"], row["group"]) for row in of_part))
    body = []
    for quantity, group in keys:
        line = [cells.get((quantity, group, label)) for label in labels]
        if any(row and row["value"] != "" for row in line):
            body.append([quantity, group, *counts_text(line), *map(interval_text, line)])
    unit = "records" if any(row["records"] for row in of_part) else "pairs"
    lines = markdown(["quantity", "group", unit, "patients", *labels], body) if body else []
    return lines + not_defined([row for row in rows if row["part"] == part])


def not_defined(rows: list[dict]) -> list[str]:
    """One line for each reason: what is not defined, in which run."""
    reasons = {}
    for row in rows:
        if row["note"]:
            what = reasons.setdefault((row["run"], row["note"]), ({}, {}))
            what[0][row["quantity"]] = what[1][row["group"]] = None
    lines = []
    for (run, note), (quantities, groups) in reasons.items():
        of = "every group" if {"all", "unchanged"} <= set(groups) else ", ".join(groups)
        lines.append(f"- {run}: {', '.join(quantities)} ({of}) {note}.")
    return lines + [""] * bool(lines)


def error_table(rows: list[dict], label: str) -> list[str]:
    """Part 1 of one run: groups down, predictors across."""
    mine = [row for row in rows if row["run"] == label and row["part"] == "one-step error"]
    cells = {(row["group"], row["quantity"]): row for row in mine}
    body = []
    for group in dict.fromkeys(row["group"] for row in mine):
        line = [cells[group, name] for name in PREDICTORS]
        if any(row["value"] != "" for row in line):
            body.append([group, *counts_text(line),
                         *(interval_text(row | {"low": np.nan}) for row in line)])
    return [f"**{label}**", "", *markdown(["group", "pairs", "patients", *PREDICTORS], body),
            *not_defined(mine)]


def retrieval_table(rows: list[dict], label: str) -> list[str]:
    """Part 2 of one run: queries down, scores across."""
    mine = [row for row in rows if row["run"] == label and row["part"].startswith("retrieval")]
    body = []
    for part, group in dict.fromkeys((row["part"], row["group"]) for row in mine):
        cells = {row["quantity"]: row for row in mine
                 if (row["part"], row["group"]) == (part, group)}
        if "distractors per pair" not in cells:
            continue
        size = f"{cells['distractors per pair']['value']:,.1f}"
        for name in ("model", "zero action", "persistence", "chance"):
            line = [cells[f"{metric}, {name}"] for metric in ("hit@1", "hit@10", "MRR")]
            if line[0]["value"] != "":
                body.append([part.removeprefix("retrieval among "), group, *counts_text(line), size,
                             name, *map(interval_text, line)])
    head = ["among", "group", "pairs", "patients", "distractors", "query", "hit@1", "hit@10", "MRR"]
    return [f"**{label}**", "", *(markdown(head, body) if body else []), *not_defined(mine)]


def scorecard_text(runs: list[dict], cohort: Cohort, used: dict, rows: list[dict],
                   n_boot: int) -> str:
    """worldmodel.md."""
    labels = [run["label"] for run in runs]
    cut = [f"{len(used[name]):,} of {total:,} training {what}" for name, what, total in (
        ("train pairs", "pairs", int((cohort.split[cohort.pair[:, 0]] == 0).sum())),
        ("train", "records", int((cohort.split == 0).sum())))]
    silent = without_signature(cohort)
    lines = [f"## World-model scorecard: {scorecard_caption(cohort, used)}", "",
             f"95 % intervals: {n_boot:,} bootstraps of patients, seed {BOOTSTRAP_SEED}. Controls "
             f"are fitted on {cut[0]} and {cut[1]}, whatever fraction a run was trained on. Seed "
             f"of shuffles, refits and distractors: {SCORECARD_SEED}. Errors of two runs have no "
             "common unit, since each has a z of its own: compare them within a run, and gains, "
             "retrieval and read-outs between runs. A run with --action state is told, and its "
             "read-out learns, the true state instead of the codes. A shuffled action is that of "
             "another changed pair that the source's codes allow. A pair is changed when its "
             "label set changes; a record without any code counts as having none, as in the "
             "papers.", ""]
    lines += markdown(["run", "method", "action", "frac", "seed"], [
        [run["label"], run["method"], "none" if run["no_action"] else run["action"],
         f"{run['frac']:g}", str(run["seed"])] for run in runs])
    lines += ["### 1 One-step error", "", "Mean over the pairs of mean_d (z_pred - z_next)^2.", ""]
    lines += [line for label in labels for line in error_table(rows, label)]
    lines += ["Gain = 1 - sum of errors / sum of the errors it is held against; 0 is none.", ""]
    lines += part_table(rows, "gain", labels, HEADLINE)
    lines += ["Error on training pairs: where it is far below that on test pairs, the encoder has "
              "learnt them by heart, and the refits, fitted on its training z, inherit that.", ""]
    lines += part_table(rows, "training fit", labels)
    lines += ["### 2 Retrieval of the true next state", "",
              "By Euclidean distance to the query, ties by mean rank; at most "
              f"{DISTRACTORS} distractors.", ""]
    lines += [line for label in labels for line in retrieval_table(rows, label)]
    lines += ["### 3 Onset read-out", "",
              "Means over the classes of a linear read-out's answer to the onset of the class, on "
              "test records without it; single classes are in worldmodel.csv. A read-out also "
              "moves for a code that does not show in the ECG"
              + (f" (control: {', '.join(silent)}), so the contrast is the honest number."
                 if silent else "; this cohort has no such control."), ""]
    lines += part_table(rows, "onset read-out", labels, skip=tuple(cohort.class_name))
    lines += ["### 4 Reversal", "", "Mean over D of the squared distance to z.", ""]
    lines += part_table(rows, "reversal", labels)
    labels = [*labels, "untrained encoder"]
    lines += ["### 5 Latent space", "", "Effective rank is at most the records - 1 and the width; "
              "SIGReg, on min(512, records), is 1.052 under N(0, I).", ""]
    lines += part_table(rows, "latent space", labels)
    lines += ["### 6 Patient re-identification", "",
              "Nearest other test record by cosine of h.", ""]
    lines += part_table(rows, "re-identification", labels)
    return "\n".join(lines).rstrip() + "\n"


def scorecard_caption(cohort: Cohort, used: dict) -> str:
    """What the numbers rest on, for table and figure."""
    fold = TEST_FOLD.get(cohort.source)
    patients = len(np.unique(cohort.subject_id[cohort.pair[used["test pairs"], 0]]))
    return (caption(cohort, used["test"], "test split" if fold is None else f"test fold {fold}")
            + f"; {len(used['test pairs']):,} pairs of {patients:,} patients")


def draw_errors(axes, rows: list[dict], label: str) -> None:
    """Error by group, one mark per predictor."""
    mine = {(row["group"], row["quantity"]): row for row in rows if row["run"] == label
            and row["part"] == "one-step error" and row["value"] != ""}
    groups = list(dict.fromkeys(group for group, _ in mine))
    shown = [name for name in PREDICTORS if any((group, name) in mine for group in groups)]
    colors, markers = ("C0", "C1", "C3", "0.45", "0.2", "C2", "C4", "C5"), "osXD_^vP"
    for i, name in enumerate(shown):
        k = PREDICTORS.index(name)
        at = [g for g, group in enumerate(groups) if (group, name) in mine]
        axes.plot([g + 0.75 * ((i + 0.5) / len(shown) - 0.5) for g in at],
                  [mine[groups[g], name]["value"] for g in at], markers[k], color=colors[k],
                  markersize=5, markeredgewidth=1.3, linestyle="none", label=name)
    for g in range(1, len(groups)):
        axes.axvline(g - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    pairs = [next(row["pairs"] for (of, _), row in mine.items() if of == g) for g in groups]
    axes.set_xticks(range(len(groups)), [f"{g}\n{n:,} pairs" for g, n in zip(
        groups, pairs, strict=True)], rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set_yscale("log")  # the mean lies far above the others
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.2g}")
    axes.tick_params(axis="y", which="both", labelsize=7.5)
    axes.set_ylabel("mean squared error of z")
    axes.set_title(f"One-step error: {label}", loc="left", fontsize=11)


def draw_lines(axes, name: str, lines: list[tuple], labels: list[str], rule: float | None = None,
               silent: tuple = ()) -> None:
    """Dots with intervals, one line per (name, {run: row}); runs side by side in their colours."""
    axes.set_title(name, loc="left", fontsize=11)
    if not lines:
        axes.text(0.5, 0.5, "not defined, see worldmodel.md", ha="center", va="center",
                  transform=axes.transAxes)
        axes.set_axis_off()
        return
    for i, (_, cells) in enumerate(lines):
        for r, label in enumerate(labels):
            row = cells.get(label)
            if row is None or row["value"] == "":
                continue
            y = i + 0.6 * ((r + 0.5) / len(labels) - 0.5)
            axes.plot(row["value"], y, "o", color=f"C{r}", markersize=4.5)
            if not np.isnan(row["low"]):
                axes.plot([row["low"], row["high"]], [y, y], color=f"C{r}", linewidth=1.3)
    axes.set_yticks(range(len(lines)), [line for line, _ in lines], fontsize=7.5)
    for tick, (line, _) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_color("C3" if line in silent else "black")  # negative controls
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    if rule is not None:
        axes.axvline(rule, color="0.4", linewidth=0.8, linestyle="--", zorder=0)


def draw_scorecard(rows: list[dict], labels: list[str], title: str, silent: list[str]) -> bytes:
    """worldmodel.png: errors by group, gains, retrieval, onset read-out by class."""
    plt = plotter()
    cells = {}
    for row in rows:
        cells.setdefault((row["part"], row["quantity"], row["group"]), {})[row["run"]] = row

    def some(lines):  # (text, key) where at least one run has a value
        lines = [(text, cells.get(key, {})) for text, key in lines]
        return [line for line in lines if any(row["value"] != "" for row in line[1].values())]

    means = ("all classes", "with signature", "without signature (control)")
    difference = "with - without signature"
    classes = list(dict.fromkeys(group for part, _, group in cells if part == "onset read-out"
                                 and group not in (*means, difference)))
    classes = [*means, *sorted(classes, key=lambda name: (name in silent, name))]
    onset = [some([(group, ("onset read-out", quantity, group)) for group in classes])
             for quantity in ("sign rate", "AUROC after onset")]
    gains = some([(f"{name},\n{group}", ("gain", name, group))
                  for name in GAINS for group in HEADLINE])
    found = some([(f"{among}, {group}:\n{name}",
                   (f"retrieval among {among}", f"MRR, {name}", group))
                  for among in ("other patients", "same patient") for group in ("all", "changed")
                  for name in ("model", "zero action", "persistence", "chance")])
    heights = [3.4] * len(labels) + [max(6.0, 0.17 * len(onset[0]) + 1 - 3.4 * len(labels))]
    figure = plt.figure(figsize=(15, sum(heights) + 1), layout="constrained")
    grid = figure.add_gridspec(len(heights), 4, width_ratios=(1, 1, 0.45, 0.45),
                               height_ratios=heights)
    for r, label in enumerate(labels):
        axes = figure.add_subplot(grid[r, :2])
        draw_errors(axes, rows, label)
        if r == 0:
            axes.legend(ncols=4, fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 1.1),
                        borderaxespad=0, frameon=False)
    draw_lines(figure.add_subplot(grid[-1, 0]), "Gain: 1 - error / error held against", gains,
               labels, 0)
    draw_lines(figure.add_subplot(grid[-1, 1]), "Retrieval of the true next state: MRR", found,
               labels)
    marked = (*silent, means[2])
    for column, name, lines in ((2, "Onset: sign rate", onset[0]), (3, "Onset: AUROC", onset[1])):
        axes = figure.add_subplot(grid[:, column])
        draw_lines(axes, name, lines, labels, 0.5, marked)
        axes.axhline(sum(line in means for line, _ in lines) - 0.5, color="0.4", linewidth=0.8)
        if column == 3:
            axes.set_yticklabels([])
    if len(labels) > 1:
        handles = [plt.Line2D([], [], marker="o", color=f"C{r}") for r in range(len(labels))]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    control = "red: codes without signature, the negative control" if silent else ""
    figure.suptitle(f"World-model scorecard. {title}\n"
                    f"bars: 95 % intervals over patients{'; ' * bool(control)}{control}",
                    fontsize=11)
    return png(figure)


def run_worldmodel(args: argparse.Namespace) -> None:
    """`--mode worldmodel`: worldmodel.md, .csv and .png under --out."""
    runs = scorecard_runs(args.runs)
    cohort = cohort_of(runs[0]["path"], args.data)
    used = scorecard_rows(cohort)
    progress = Progress(len(runs) * len(used["rows"]) + len(used["test"]), "records", "embedding")
    rows = []
    for run in runs:
        rows += scorecard(run, cohort, used, args.n_boot, progress)
    rows += untrained_rows(runs[0], cohort, used, args.n_boot, progress)
    progress.close()
    text = scorecard_text(runs, cohort, used, rows, args.n_boot)
    print(text)
    seeds = ", ".join(sorted({str(run["seed"]) for run in runs}))
    title = f"{scorecard_caption(cohort, used)}, seed {seeds}"
    write_files(Path(args.out), {
        "worldmodel.md": text, "worldmodel.csv": [list(ROW)] + [
            ["" if isinstance(row[key], float) and np.isnan(row[key]) else row[key] for key in ROW]
            for row in rows],
        "worldmodel.png": draw_scorecard(rows, [run["label"] for run in runs], title,
                                         without_signature(cohort))})


# ----------------------------------------------------------------------------------------------
# Counterfactuals: one patient under an action; on the demo cohort, against the simulated truth
# ----------------------------------------------------------------------------------------------

CASES = 500            # (record, code) wanted of the ground truth, else more records of a patient
CASE_PATIENTS = 200    # at most, so that a large cohort stays quick
ONSET_PAIRS = 5        # a mean onset vector of fewer training pairs is not defined
OTHER_RECORDING = 10**9     # added to the seed: the same patient and state, recorded once more
REPRODUCED_MV = 0.02   # between a stored record and the simulation: 5 uV steps, float16, filter
SHOWN_CLASSES = 25     # bars on a page
MEASURES = ("cosine", "length_ratio", "right_code", "nearest", "error")
CLASS_VECTOR, ONSET_VECTOR = "mean class vector", "mean onset vector"
MODEL, CEILING = "model, r(z, a) - r(z, 0)", "other recording, its true change"
PERSISTENCE = "no change (persistence)"


def run_counterfactual(args: argparse.Namespace) -> None:
    """`--mode counterfactual`: one record's page with --study-id, else the demo's ground truth."""
    folder, model, checkpoint, cohort = one_world_model(args)
    onset = class_columns(cohort, args.onset, "--onset")
    resolve = class_columns(cohort, args.resolve, "--resolve")
    if args.study_id is not None:
        return one_patient(args, folder, model, checkpoint, cohort, onset, resolve)
    if cohort.state is None:
        raise InputError(f"cohort {cohort.name}: no record of it has a known counterfactual; give "
                         "--study-id and --onset or --resolve for the page of one patient")
    if resolve:
        raise InputError("--resolve: the ground truth is of onsets; leave it out, or give "
                         "--study-id for the page of one patient")
    ground_truth(args, folder, model, checkpoint, cohort, onset)


def class_columns(cohort: Cohort, names: list[str] | None, flag: str) -> list[int]:
    """Columns of the named classes, each once; InputError for an unknown one."""
    unknown = [name for name in names or () if name not in cohort.class_name]
    if unknown:
        raise InputError(f"{flag} {' '.join(unknown)}: no class of the cohort {cohort.name}; its "
                         f"classes are {' '.join(cohort.class_name)}")
    return [cohort.class_name.index(name) for name in dict.fromkeys(names or ())]


def codes_of(cohort: Cohort, row: np.ndarray) -> str:
    """`I10 I48` of a row (K,) of labels or states; `none` of an empty one."""
    return " ".join(cohort.class_name[k] for k in np.flatnonzero(row)) or "none"


def resimulate(cohort: Cohort, row: int, codes: set[str], other: int = 0) -> np.ndarray:
    """(12, T) float16 mV: what the demo cohort would store, had the patient of `row` had `codes`.

    `other` is added to the seed: another recording. Planted defects and 5 uV steps are left out.
    """
    x = simulate(cohort.subject_id[row], codes, cohort.study_id[row] + other,
                 nuisance=cohort.arguments["nuisance"])  # (12, 5000), at 500 Hz
    return decimate(x, 500 // cohort.fs)[:, :SECONDS * cohort.fs].astype(np.float16)


# The ground truth: every code put on test patients, by the model and by the simulator


def choose_records(cohort: Cohort, columns: list[int], seed: int = BOOTSTRAP_SEED) -> np.ndarray:
    """Rows of test records: the first of each patient, or so many as give CASES cases.

    A case is a record and a class of `columns` that is not in its true state. At most
    CASE_PATIENTS patients, drawn with the seed.
    """
    test = np.flatnonzero(cohort.split == 2)
    patients = np.unique(cohort.subject_id[test])
    if len(patients) > CASE_PATIENTS:
        patients = np.random.default_rng(seed).choice(patients, CASE_PATIENTS, replace=False)
    test = test[np.isin(cohort.subject_id[test], patients)]
    subject = cohort.subject_id[test]  # sorted, as the rows of a cohort are
    position = np.arange(len(test)) - np.searchsorted(subject, subject)  # 0: the patient's first
    rows = test
    for depth in range(1, position.max(initial=0) + 2):
        rows = test[position < depth]
        if (cohort.state[rows][:, columns] == 0).sum() >= CASES:
            break
    return rows


def simulate_cases(model, normalize: str, cohort: Cohort, rows: np.ndarray,
                   columns: list[int]) -> tuple[np.ndarray, ...]:
    """Simulate each record without and with each absent class of `columns`, twice, and embed.

    Returns: z (2, R, D), the state in the record and in another recording of it; z_true
        (2, R, K, D), the state with the class, NaN where it is no case; changed (R, K) bool: the
        class changes the signal at all; same (R,) bool: the simulation is the stored record, or
        the record carries a planted defect.
    """
    names, z, z_true = cohort.class_name, [], []
    changed, same = np.zeros((len(rows), len(names)), bool), np.ones(len(rows), bool)
    progress = Progress(len(rows), "records", "simulating")
    for i, row in enumerate(rows):
        state = {names[k] for k in np.flatnonzero(cohort.state[row])}
        absent = [k for k in columns if names[k] not in state]
        for other in (0, OTHER_RECORDING):
            x = np.stack([resimulate(cohort, row, codes, other) for codes in
                          (state, *(state | {names[k]} for k in absent))])  # (1 + cases, 12, T)
            states = embed(model, x, np.arange(len(x)), normalize)[1].double().cpu().numpy()
            z.append(states[0])
            z_true.append(np.full((len(names), states.shape[1]), np.nan))
            z_true[-1][absent] = states[1:]
            if not other:
                changed[i, absent] = (x[1:] != x[0]).any(axis=(1, 2))
                gap = np.abs(x[0].astype(np.float32) - cohort.signal[row]).max()
                same[i] = cohort.quality[row] != 0 or gap <= REPRODUCED_MV
        progress.update()
    progress.close()
    z, z_true = np.stack(z), np.stack(z_true)  # (2 R, D), (2 R, K, D), the recordings in turn
    return np.stack([z[::2], z[1::2]]), np.stack([z_true[::2], z_true[1::2]]), changed, same


def predicted_states(model, z: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """r(z, 0) (R, 1, D) and r(z, e_c) (R, K, D), the onset of each of k classes alone; z (R, D)."""
    import torch
    z = torch.from_numpy(z).float().to(next(model.parameters()).device)
    actions = torch.cat([torch.zeros(1, k), torch.eye(k)]).to(z)  # (1 + K, K)
    with torch.no_grad():
        states = [model.predict(z, a.expand(len(z), -1)).double().cpu().numpy() for a in actions]
    states = np.stack(states, axis=1)  # (R, 1 + K, D)
    return states[:, :1], states[:, 1:]


def class_vectors(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(K, D): mean z (N, D) of records with a class minus mean of those without; NaN lacking one.

    y (N, K) of 0 and 1.
    """
    y = y.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0: no record of the one kind
        return y.T @ z / y.sum(axis=0)[:, None] - (1 - y).T @ z / (1 - y).sum(axis=0)[:, None]


def onset_vectors(step: np.ndarray, action: np.ndarray, least: int = ONSET_PAIRS) -> np.ndarray:
    """(K, D): mean step z_next - z of pairs in which a class begins minus that of unchanged pairs.

    Args: step (P, D); action (P, K). NaN for a class that begins in fewer than `least` pairs.
    """
    begins, unchanged = (action > 0).astype(np.float64), ~action.any(axis=1)
    count = begins.sum(axis=0)[:, None]  # (K, 1)
    rest = step[unchanged].mean(axis=0) if unchanged.any() else np.nan
    return np.where(count >= least, begins.T @ step / np.maximum(count, 1) - rest, np.nan)


def judge_change(z: np.ndarray, z_true: np.ndarray, candidate: np.ndarray,
                 changed: np.ndarray) -> dict[str, np.ndarray]:
    """How well candidate changes of the state fit the true ones, case by case.

    Args: z (R, D) states; z_true (R, K, D) true counterfactual states; changed (R, K) bool, the
        cases; candidate (R, K, D), or (1, K, D) the same for every record, or (R, 1, D) for every
        class; NaN where it is not defined.
    Returns: (R, K) each, NaN where there is no case or no candidate: cosine to the true change, 0
        for a candidate of length 0; length_ratio; right_code, 1 where among the record's cases it
        is this class's candidate that has the largest cosine to the true change; nearest, 1 where
        among the record's true states it is this class's that lies nearest to z + candidate; error
        |z + candidate - z_true|^2 / D; chance of both choices, 1 / number of the record's cases;
        and chosen (R, K) int, the class of the largest cosine, -1 where there is none. A choice
        takes two cases, right_code also candidates that differ by class.
    """
    change = np.where(changed[..., None], z_true - z[:, None], 0)           # (R, K, D)
    case = changed & ~np.isnan(candidate).any(axis=2)                       # (R, K)
    full = np.where(case[..., None], candidate, 0)                          # (R, K, D)
    length, true_length = np.linalg.norm(full, axis=2), np.linalg.norm(change, axis=2)
    inner = change @ full.transpose(0, 2, 1)                                # (R, K true, K)
    scale = true_length[:, :, None] * length[:, None, :]
    cosine = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)
    distance = (length[:, :, None]**2 + true_length[:, None, :]**2
                - 2 * inner.transpose(0, 2, 1))                             # (R, K, K true)
    chosen = np.where(case[:, None], cosine, -np.inf).argmax(axis=2)        # (R, K true)
    nearest = np.where(case[:, None], distance, np.inf).argmin(axis=2)      # (R, K)
    options, column = case.sum(axis=1, keepdims=True), np.arange(case.shape[1])
    choice = case & (options > 1)
    differ = choice if candidate.shape[1] > 1 else np.zeros_like(choice)

    def where(mask, values):
        return np.where(mask, values, np.nan)

    return {"cosine": where(case, np.einsum("rkk->rk", cosine)),
            "length_ratio": where(case, length / np.where(true_length > 0, true_length, np.nan)),
            "right_code": where(differ, chosen == column),
            "nearest": where(choice, nearest == column),
            "error": where(case, ((full - change)**2).mean(axis=2)),
            "chance": where(choice, 1 / np.maximum(options, 1)),
            "chosen": np.where(differ, chosen, -1)}


def mean_by_code(values: np.ndarray) -> np.ndarray:
    """(R, K) -> (K,): mean over R without the NaN."""
    return _mean_defined(values.T)


def median_by_code(values: np.ndarray) -> np.ndarray:
    """(R, K) -> (K,): median over R without the NaN; NaN for a column of NaN."""
    n, ranked = (~np.isnan(values)).sum(axis=0), np.sort(values, axis=0)  # NaN go last
    middle = np.stack([np.maximum(n - 1, 0) // 2, n // 2])  # (2, K), the same where n is odd
    return np.take_along_axis(ranked, middle, axis=0).mean(axis=0)


def bootstrap_codes(values: np.ndarray, unit: np.ndarray, n_boot: int, seed: int,
                    statistic=mean_by_code) -> dict:
    """A statistic of each code over its cases, its mean over codes, and 95 % intervals.

    Args: values (R, K), NaN where there is no case; unit (R,) patient; statistic (R, K) -> (K,).
        Replicate r takes the r-th draw of default_rng(seed).integers(0, n, n), n patients in the
        order of np.unique(unit), each with all of its records.
    Returns: dict(point, low, high: float, the mean over codes; per_code (K, 3) point, low, high).
        One patient has no interval.
    """
    _, number = np.unique(unit, return_inverse=True)
    records = [np.flatnonzero(number == i) for i in range(number.max() + 1)]
    n, rng = len(records), np.random.default_rng(seed)
    replicates = np.full((n_boot, values.shape[1]), np.nan)
    for r in range(n_boot if n > 1 else 0):
        replicates[r] = statistic(values[np.concatenate([records[i] for i in
                                                         rng.integers(0, n, n)])])
    point, (low, high) = statistic(values), _interval(_mean_defined(replicates))
    return {"point": float(_mean_defined(point[None])[0]), "low": low, "high": high,
            "per_code": np.column_stack([point, [_interval(code) for code in replicates.T]])}


def ground_truth(args: argparse.Namespace, folder: Path, model, checkpoint: dict, cohort: Cohort,
                 onset: list[int]) -> None:
    """Judge predicted onsets by simulated ones: counterfactual.md, .csv and .png."""
    names, normalize = cohort.class_name, checkpoint["normalize"]
    columns = onset or [k for k, name in enumerate(names) if name in SIGNATURE]
    rows = choose_records(cohort, columns)
    z, z_true, changed, same = simulate_cases(model, normalize, cohort, rows, columns)
    rows, z, z_true, changed = rows[same], z[:, same], z_true[:, same], changed[same]
    if not changed.any():
        raise InputError(f"cohort {cohort.name}: no test record that the onset of "
                         f"{' '.join(names[k] for k in columns)} changes; name other --onset, or "
                         "build a larger cohort")
    train = np.flatnonzero(cohort.split == 0)
    progress = Progress(len(train), "training records", "embedding")
    z_train = embed(model, cohort.signal, train, normalize, progress)[1].double().cpu().numpy()
    progress.close()
    pair = np.flatnonzero(cohort.split[cohort.pair[:, 0]] == 0)
    source, target = np.searchsorted(train, cohort.pair[pair]).T
    # the vectors are told what the model was told: its codes, or the true states
    told = checkpoint["args"].get("action", "coded")
    known = cohort.state if told == "state" else cohort.label
    zero, with_code = predicted_states(model, z[0], len(names))
    candidates = {  # changes of z: (R, K, D), or 1 where all records or all classes share one
        PERSISTENCE: np.zeros_like(zero),
        CLASS_VECTOR: class_vectors(z_train, known[train])[None],
        ONSET_VECTOR: onset_vectors(z_train[target] - z_train[source],
                                    own_action(cohort, pair, told))[None],
        MODEL: with_code - zero,
        "model, r(z, a) - z": with_code - z[0, :, None],
        "zero action, r(z, 0) - z": zero - z[0, :, None],
        CEILING: z_true[1] - z[1, :, None],
        "other recording itself": z_true[1] - z[0, :, None]}
    judged = {name: judge_change(z[0], z_true[0], candidate, changed)
              for name, candidate in candidates.items()}
    cases = ~np.isnan(z_true[0]).any(axis=2)
    length = {name: mean_by_code(np.where(cases, np.linalg.norm(candidate, axis=2), np.nan))
              for name, candidate in candidates.items()}
    unit = cohort.subject_id[rows]
    result = {name: {measure: bootstrap_codes(
        values[measure], unit, args.n_boot, BOOTSTRAP_SEED,
        median_by_code if measure == "length_ratio" else mean_by_code) for measure in MEASURES}
        for name, values in judged.items()}
    head = truth_head(folder, cohort, rows, cases, changed, int((~same).sum()), args.n_boot)
    chance = mean_by_code(judged[MODEL]["chance"])
    luck = {name: _mean_defined(mean_by_code(values["chance"])[None])[0]
            for name, values in judged.items()}
    text = "\n".join([*head, *overall_table(result, luck, names),
                      *code_tables(result, chance, length, names, cases, changed)])
    print(text)
    figure = truth_figure(result, judged[MODEL]["chosen"], chance, names,
                          f"{folder.name}\n" + head[2].replace("; ", ";\n"))
    write_files(Path(args.out), {
        "counterfactual.md": text + "\n", "counterfactual.png": png(figure),
        "counterfactual.csv": truth_csv(result, length, names, cases, changed, unit)})


def truth_head(folder: Path, cohort: Cohort, rows: np.ndarray, cases: np.ndarray,
               changed: np.ndarray, left_out: int, n_boot: int) -> list[str]:
    """Title, an empty line, the caption, and what was done, as lines of Markdown."""
    fold, patients = TEST_FOLD.get(cohort.source), len(np.unique(cohort.subject_id[rows]))
    what = f"test {'split' if fold is None else f'fold {fold}'}"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = [f"## Counterfactual onsets against their simulation: {folder.name}", "",
             f"{caption(cohort, rows, what, BOOTSTRAP_SEED)}; {cases.sum():,} cases "
             f"(record, code not in its true state), {changed.sum():,} of them with a signal that "
             "the code changes", "",
             f"Run {folder.name}: {method(config).removeprefix('online probe, ')}, trained on "
             f"{100 * config['args']['frac']:g} % of the training patients, seed "
             f"{config['args']['seed']}. Truth: the simulator's ECG of the same patient and "
             "recording with the code added. Means over the cases of a code, "
             f"then over codes; 95 % intervals of {n_boot:,} bootstraps of {patients:,} patients, "
             f"seed {BOOTSTRAP_SEED}. Mean vectors are of all training records of the cohort."]
    if len(rows) > patients:
        lines.append(f"One record of each patient gives fewer than {CASES} cases: further records "
                     f"were taken, {len(rows):,} in all"
                     + (f"; the cases remain fewer than {CASES}" if cases.sum() < CASES else "")
                     + ".")
    if left_out:
        lines.append(f"Left out: {left_out:,} records that the simulator does not reproduce from "
                     "their state (a code that is no class of the cohort, or another version).")
    return [*lines, ""]


def overall_table(result: dict, luck: dict[str, float], names: list[str]) -> list[str]:
    """Markdown of all candidates, means over codes, and what is to be said of undefined ones."""
    head = ["change of z", "cosine to the true change", "length ratio (median)",
            "right code by cosine", "right code by nearest state", "squared error / D", "chance"]
    body = [[name, *(with_interval([row[m][key] for key in ("point", "low", "high")])
                     for m in MEASURES), with_interval([luck[name], np.nan, np.nan])]
            for name, row in result.items()]
    lines = markdown(head, body)
    signed = ~np.isnan(result[PERSISTENCE]["cosine"]["per_code"][:, 0])
    for name, row in result.items():
        lacking = signed & np.isnan(row["cosine"]["per_code"][:, 0])
        if lacking.any():
            lines.append(f"- {name}: not defined for {codes_text(names, lacking)} (too few training"
                         f" records, or fewer than {ONSET_PAIRS} training pairs with an onset); "
                         "its means are over the other codes.")
    return [
        *lines, "- right code by cosine: whether, of all codes absent in the record that change "
        "its signal, it is the added one whose candidate lies nearest in direction to the true "
        "change; not defined for a change that is the same for all codes. By nearest state: "
        "whether the simulated state nearest to z + change is the one with the added code.",
        "- r(z, a) - z and r(z, 0) - z hold whatever the predictor does without an action, e.g. "
        "regression to the mean; the difference of the two isolates the action.",
        "- other recording: the same patient and states simulated with another seed (rate, "
        "electrodes, noise): how far the true change is the patient's and not the recording's. A "
        "reference, not a bound: the one recording has noise of its own.", ""]


def codes_text(names: list[str], mask: np.ndarray) -> str:
    """Names of the marked classes, in order."""
    return " ".join(name for name, marked in zip(names, mask, strict=True) if marked)


def code_tables(result: dict, chance: np.ndarray, length: dict, names: list[str],
                cases: np.ndarray, changed: np.ndarray) -> list[str]:
    """Markdown by code: those with a signature, then those without as negative control."""
    signed, control = changed.any(axis=0), cases.any(axis=0) & ~changed.any(axis=0)
    shown = {"model": MODEL, "class vector": CLASS_VECTOR, "onset vector": ONSET_VECTOR,
             "other recording": CEILING}
    head = ["code", "cases", "changed", *(f"cosine: {text}" for text in shown),
            "length ratio: model", "right code: model", "chance"]
    order = sorted(np.flatnonzero(signed), key=lambda k: -result[MODEL]["cosine"]["per_code"][k, 0])
    lines = markdown(head, [
        [names[k], str(cases[:, k].sum()), str(changed[:, k].sum()),
         *(with_interval(result[name]["cosine"]["per_code"][k]) for name in shown.values()),
         *(with_interval(result[MODEL][m]["per_code"][k]) for m in ("length_ratio", "right_code")),
         with_interval([chance[k], np.nan, np.nan])] for k in order])
    if not control.any():
        return [*lines, "Negative control: not defined, no code without signature is among them."]
    text = "Negative control, codes without signature: their true change is exactly 0 and no cosine"
    base = {name: np.nanmean(length[name][signed]) for name in (MODEL, CLASS_VECTOR)}
    return [*lines, f"{text} is defined. Length of the change that is predicted all the same, "
            f"relative to its mean over the codes with signature (model {base[MODEL]:.2f}, "
            f"class vector {base[CLASS_VECTOR]:.2f}):", "", *markdown(
                ["code", "cases", "model", "class vector"],
                [[names[k], str(cases[:, k].sum()),
                  *(with_interval([length[name][k] / base[name], np.nan, np.nan])
                    for name in base)] for k in np.flatnonzero(control)])]


def truth_csv(result: dict, length: dict, names: list[str], cases: np.ndarray,
              changed: np.ndarray, unit: np.ndarray) -> list[list]:
    """Rows by code and candidate: every measure with its interval; empty where not defined."""
    lines = [["code", "candidate", "signature", "cases", "changed", "patients", "length",
              *(text for m in MEASURES for text in (m, f"{m}_low", f"{m}_high"))]]
    for k in np.flatnonzero(cases.any(axis=0)):
        for name, row in result.items():
            values = [length[name][k], *(v for m in MEASURES for v in row[m]["per_code"][k])]
            lines.append([names[k], name, bool(changed[:, k].any()), cases[:, k].sum(),
                          changed[:, k].sum(), len(np.unique(unit[cases[:, k]])),
                          *("" if np.isnan(value) else float(value) for value in values)])
    return lines


def truth_figure(result: dict, chosen: np.ndarray, chance: np.ndarray, names: list[str],
                 text: str):
    """Cosine by code, sorted by the other recording's, and which code the model's vector names."""
    plt = plotter()
    cosine = {name: result[name]["cosine"]["per_code"] for name in (MODEL, CLASS_VECTOR, CEILING)}
    signed = np.flatnonzero(~np.isnan(cosine[CEILING][:, 0]))
    order = signed[np.argsort(cosine[CEILING][signed, 0])]  # the highest on top
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.9 + 0.3 * max(len(order), 12)),
                                         layout="constrained", width_ratios=(1, 1.15))
    for name, colour, marker, shift in ((CEILING, "0.45", "d", 0.22), (CLASS_VECTOR, "C0", "s", 0),
                                        (MODEL, "C3", "o", -0.22)):
        point, low, high = cosine[name][order].T
        y = np.arange(len(order)) + shift
        left.hlines(y, low, high, color=colour, linewidth=1.2)
        left.plot(point, y, marker, color=colour, markersize=5, label=name, linestyle="none")
    left.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    left.set_yticks(np.arange(len(order)), [names[k] for k in order])
    left.set_ylim(-0.7, len(order) - 0.3)
    left.set_xlabel("cosine to the true change of z (mean over cases, 95 % interval by patients)")
    left.grid(axis="y", color="0.93")
    left.set_axisbelow(True)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)
    order = order[::-1]  # rows from the top, as in the left panel
    counts = np.array([[(chosen[:, a] == b).sum() for b in order] for a in order], float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = right.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for a, b in np.argwhere(share >= 0.095):
        right.text(b, a, f"{100 * share[a, b]:.0f}", ha="center", va="center", fontsize=7,
                   color="white" if share[a, b] > 0.5 else "black")
    ticks = np.arange(len(order)), [names[k] for k in order]
    right.set_xticks(*ticks, rotation=90)
    right.set_yticks(*ticks)
    right.set_xlabel("code whose predicted change has the largest cosine to the true change")
    right.set_ylabel("code added by the simulator")
    accuracy = result[MODEL]["right_code"]
    right.set_title("right code: " + with_interval([accuracy[key] for key in (
        "point", "low", "high")]) + f", chance {_mean_defined(chance[None])[0]:.2f}", fontsize=10)
    figure.colorbar(image, ax=right, label="share of the row (numbers: %, from 10 %)", shrink=0.8)
    figure.suptitle(text, fontsize=9)
    return figure


# One patient: the predicted next state, its neighbours among real ECGs, and what a read-out says


def patient_row(cohort: Cohort, study_id: int, onset: list[int], resolve: list[int]) -> int:
    """The row of a study that can undergo the action; InputError for one that cannot."""
    rows = np.flatnonzero(cohort.study_id == study_id)
    if not len(rows):
        known = ", ".join(map(str, cohort.study_id[np.flatnonzero(cohort.split == 2)[:5]]))
        raise InputError(f"--study-id {study_id}: no record of the cohort {cohort.name}; known "
                         f"are, of the test split, {known}, ...")
    if not onset and not resolve:
        raise InputError("--study-id: an action is wanted; give --onset or --resolve with classes "
                         f"of the cohort: {' '.join(cohort.class_name)}")
    name, label = cohort.class_name, cohort.label[rows[0]]
    if both := [name[k] for k in onset if k in resolve]:
        raise InputError(f"--onset and --resolve: {' '.join(both)} in both; name it in one")
    carried = f"the record carries {codes_of(cohort, label)}"
    if wrong := [name[k] for k in onset if label[k]]:
        raise InputError(f"--onset {' '.join(wrong)}: already there, {carried}; name others")
    if wrong := [name[k] for k in resolve if not label[k]]:
        raise InputError(f"--resolve {' '.join(wrong)}: not there, {carried}; name one of these")
    return int(rows[0])


def one_patient(args: argparse.Namespace, folder: Path, model, checkpoint: dict, cohort: Cohort,
                onset: list[int], resolve: list[int]) -> None:
    """The page of one record under an action: counterfactual-STUDY-ACTION.png and .md."""
    import torch
    row, n, names = patient_row(cohort, args.study_id, onset, resolve), len(cohort), {}
    names["onset"], names["resolve"] = ([cohort.class_name[k] for k in columns]
                                        for columns in (onset, resolve))
    progress = Progress(n, "records", "embedding")
    z = embed(model, cohort.signal, np.arange(n), checkpoint["normalize"], progress)[1]
    progress.close()
    action = torch.zeros(2, len(cohort.class_name), device=z.device)  # none, and the asked one
    action[1, onset], action[1, resolve] = 1, -1
    with torch.no_grad():
        z_zero, z_cf = model.predict(z[[row, row]], action)
    train = np.flatnonzero(cohort.split == 0)
    if len(train) > FIT_LIMIT:
        train = np.sort(np.random.default_rng(SCORECARD_SEED).permutation(train)[:FIT_LIMIT])
    weight, bias = fit_readout(z[torch.from_numpy(train).to(z.device)], cohort.label[train])
    scores = torch.sigmoid(torch.stack([z[row], z_zero, z_cf]) @ weight + bias).cpu().numpy()
    change = ", ".join(f"{what} of {' '.join(of)}" for what, of in (
        ("onset", names["onset"]), ("resolution", names["resolve"])) if of)
    title = f"Study {args.study_id}, patient {cohort.subject_id[row]}: the state after {change}, " \
        "as predicted by the model"
    panels = [(f"The record: study {args.study_id}, label {codes_of(cohort, cohort.label[row])}",
               cohort.signal[row]), *neighbours(cohort, row, z, z_cf, onset, resolve)]
    lines = patient_lines(cohort, row, z, z_zero, z_cf, change, folder)
    if cohort.state is not None:
        panel, line = true_counterfactual(model, checkpoint["normalize"], cohort, row, names,
                                          z[row], z_zero, z_cf)
        panels.append(panel)
        lines.append(line)
    text = [f"## {title}", "", *(f"- {line}" for line in lines), "", "ECGs of the page:", "",
            *(f"- {heading}" for heading, _ in panels), "", *score_table(cohort, scores),
            f"Scores: L2 logistic regression on frozen z of the {len(train):,} training records, "
            f"l2 {READOUT_L2:g}. A read-out also moves for codes that change nothing in an ECG, "
            "and a nearest ECG is an illustration: --mode counterfactual without --study-id "
            "measures predicted changes on the demo cohort's simulated truth.", ""]
    print("\n".join(text))
    figure = patient_figure(cohort, panels, scores, onset, resolve, title, lines)
    stem = file_stem("counterfactual", str(args.study_id), *(
        part for what, of in names.items() if of for part in (what, *of)))
    write_files(Path(args.out), {f"{stem}.png": png(figure), f"{stem}.md": "\n".join(text)})


def neighbours(cohort: Cohort, row: int, z, z_cf, onset: list[int],
               resolve: list[int]) -> list[tuple]:
    """(heading, signal (12, T) or None) of the records of other patients nearest to z_cf (D,).

    First of those with the resulting label, every onset class and no resolved one, then of all.
    """
    distance = (z - z_cf).norm(dim=1).cpu().numpy()
    others = cohort.subject_id != cohort.subject_id[row]
    like = others & cohort.label[:, onset].all(axis=1) & ~cohort.label[:, resolve].any(axis=1)
    kind, panels = "SYNTHETIC" if cohort.synthetic else "real", []
    for words, mask in ((" with the resulting label", like), ("", others)):
        heading = f"Nearest to r(z, a) among {mask.sum():,} {kind} ECGs of other patients{words}"
        if not mask.any():
            panels.append((f"{heading}: not defined", None))
            continue
        found = int(np.where(mask, distance, np.inf).argmin())
        panels.append((f"{heading}: distance {distance[found]:.1f}, study "
                       f"{cohort.study_id[found]}, label {codes_of(cohort, cohort.label[found])}",
                       cohort.signal[found]))
    return panels


def patient_lines(cohort: Cohort, row: int, z, z_zero, z_cf, change: str,
                  folder: Path) -> list[str]:
    """What the page says: cohort, record, change, distances beside those of real pairs."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = [caption(cohort, np.arange(len(cohort)), "all splits", config["args"]["seed"]),
             f"run {folder.name}: {method(config).removeprefix('online probe, ')}",
             f"record: {('training', 'validation', 'test')[cohort.split[row]]} split, label "
             f"{codes_of(cohort, cohort.label[row])}"
             + ("" if cohort.has_label[row] else ", a record without any diagnosis")
             + ("" if cohort.state is None else
                f", true state {codes_of(cohort, cohort.state[row])}"),
             f"change: {change}; predicted by the model, not observed"]
    pair = cohort.pair[cohort.split[cohort.pair[:, 0]] == 2]
    step = (z[pair[:, 1].tolist()] - z[pair[:, 0].tolist()]).norm(dim=1).cpu().numpy()  # (P,)
    for words, distance in (("|r(z, a) - z|", z_cf - z[row]), ("|r(z, 0) - z|", z_zero - z[row]),
                            ("|r(z, a) - r(z, 0)|", z_cf - z_zero)):
        distance = float(distance.norm())
        lines.append(f"{words} {distance:.1f}" + (
            f": above {100 * (step < distance).mean():.0f} % of the distances of {len(step):,} "
            "consecutive test records" if len(step) else "; no consecutive test records beside it"))
    return lines


def true_counterfactual(model, normalize: str, cohort: Cohort, row: int, names: dict[str, list],
                        z, z_zero, z_cf) -> tuple[tuple, str]:
    """Of the demo cohort: ((heading, the simulated ECG), its distance and direction in words)."""
    state = {cohort.class_name[k] for k in np.flatnonzero(cohort.state[row])}
    after = (state | set(names["onset"])) - set(names["resolve"])
    x = np.stack([resimulate(cohort, row, state), resimulate(cohort, row, after)])
    before, truth = embed(model, x, np.arange(2), normalize)[1]
    heading = f"The true counterfactual, simulated: state {' '.join(sorted(after)) or 'none'}"
    distances = (f"true counterfactual, simulated: |r(z, a) - z_true| {(z_cf - truth).norm():.1f}, "
                 f"|z - z_true| {(z - truth).norm():.1f}; cosine of r(z, a) - r(z, 0) to the true "
                 "change of z ")
    if (x[0] == x[1]).all():
        return (heading, x[1]), distances + "not defined, the action changes nothing in this ECG"
    a, b = z_cf - z_zero, truth - before
    return (heading, x[1]), distances + f"{float(a @ b / (a.norm() * b.norm())):.2f}"


def score_table(cohort: Cohort, scores: np.ndarray) -> list[str]:
    """Markdown of the read-out's scores (3, K) at z, r(z, 0) and r(z, a), largest change first."""
    order = np.argsort(-np.abs(scores[2] - scores[1]), kind="stable")
    return markdown(["class", "score at z", "at r(z, 0)", "at r(z, a)", "change by the action"],
                    [[cohort.class_name[k], *(f"{score:.3f}" for score in scores[:, k]),
                      f"{scores[2, k] - scores[1, k]:+.3f}"] for k in order])


def patient_figure(cohort: Cohort, panels: list[tuple], scores: np.ndarray, onset: list[int],
                   resolve: list[int], title: str, lines: list[str]):
    """The page: ECGs on the left, change of the scores (3, K) and the text on the right."""
    import textwrap

    plt = plotter()
    drawn = np.stack([signal for _, signal in panels if signal is not None]).astype(np.float32)
    # (panels, 12, T) -> 3 rows; each as high as its largest and smallest sample ask for
    top = drawn.reshape(len(drawn), 4, 3, -1).max(axis=(0, 1, 3))
    bottom = drawn.reshape(len(drawn), 4, 3, -1).min(axis=(0, 1, 3))
    base = -np.cumsum(top - np.append(0, bottom[:2]) + 0.2)
    limits = np.floor(2 * (base[2] + bottom[2] - 0.2)) / 2, 0.5
    inches = min((limits[1] - limits[0]) * 0.8 / 2.54, 3.6)  # 8 mm/mV; flatter where huge
    figure = plt.figure(figsize=(14.5, 1 + len(panels) * (inches + 0.55)))
    height = figure.get_figheight()
    for i, (heading, signal) in enumerate(panels):
        axes = figure.add_axes((0.02, 1 - (0.95 + i * (inches + 0.55) + inches) / height, 0.55,
                                inches / height))
        axes.set_title(textwrap.fill(heading, 112), fontsize=9, loc="left")
        draw_leads(axes, signal, cohort.fs, base, base + top, limits)
    change = scores[2] - scores[1]
    asked = np.isin(np.arange(len(change)), [*onset, *resolve])  # on top, then the largest changes
    order = np.lexsort((-np.abs(change), ~asked))[:max(SHOWN_CLASSES, asked.sum())]
    bars = 0.3 * len(order) / height
    axes = figure.add_axes((0.64, 1 - 0.95 / height - bars, 0.34, bars))
    colours = ["C3" if k in onset else "C0" if k in resolve else "0.6" for k in order]
    axes.barh(np.arange(len(order)), change[order], color=colours)
    axes.set_yticks(np.arange(len(order)), [cohort.class_name[k] for k in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    for i, k in enumerate(order):
        axes.annotate(f"{scores[1, k]:.2f} to {scores[2, k]:.2f}", (max(change[k], 0), i), (4, 0),
                      textcoords="offset points", va="center", fontsize=7)
    axes.axvline(0, color="0.3", linewidth=0.8)
    low, high = min(change.min(), 0), max(change.max(), 0)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.25 * (high - low))  # room for the numbers
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    shown = "" if len(order) == len(change) else f"; {len(order)} of {len(change)} shown"
    axes.set_title("Change of each class's score from r(z, 0) to r(z, a)\n(linear read-out of z; "
                   f"red: onset, blue: resolution{shown})", fontsize=9, loc="left")
    text = "\n".join(textwrap.fill(line, 78, subsequent_indent="    ") for line in lines)
    figure.text(0.6, 1 - 1.55 / height - bars, text, fontsize=9, va="top", linespacing=1.4)
    figure.suptitle(title, fontsize=12, x=0.02, y=1 - 0.2 / height, ha="left")
    return figure


def draw_leads(axes, signal: np.ndarray | None, fs: int, base: np.ndarray, top: np.ndarray,
             limits: tuple) -> None:
    """A record (12, T) mV, 2.5 s of each lead, in 3 rows of 4: baselines and upper ends in mV."""
    axes.set(xlim=(0, SECONDS), ylim=limits, xticks=np.arange(0, SECONDS + 0.1, 0.2),
             yticks=np.arange(*limits, 0.5))
    axes.grid(color="#f2c4c4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    for spine in axes.spines.values():
        spine.set_color("#e0a0a0")
    if signal is None:
        axes.text(SECONDS / 2, sum(limits) / 2, "no record of another patient carries this label",
                  ha="center", bbox={"color": "white"})
        return
    quarter = SECONDS * fs // 4
    for j, lead in enumerate(LEADS):
        first = j // 3 * quarter
        x = signal[j, first:first + quarter].astype(np.float32) + base[j % 3]
        axes.plot(np.arange(first, first + len(x)) / fs, x, color="black", linewidth=0.7)
        y = min(top[j % 3] + 0.1, base[j % 3] + 1)
        axes.text(first / fs + 0.05, y, lead, fontsize=7, weight="bold", va="top", zorder=1.5,
                  bbox={"color": "white", "pad": 0.6})  # over the grid, under the curve
    axes.text(SECONDS - 0.05, limits[0] + 0.08, "square: 0.2 s, 0.5 mV", fontsize=6.5, ha="right")


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def run_score(args: argparse.Namespace) -> None:
    """`--mode score`: tables and figures of each cohort and test set, on stdout and in --out."""
    folders, reasons = find_runs(args.runs)
    groups = {}  # runs share a table only when the truth they are judged by is the same
    loaded = [load_run(folder) for folder in folders]
    for run in loaded:
        if sum(other["path"].name == run["path"].name for other in loaded) > 1:
            run["name"] = str(run["path"])  # two studies name their runs alike
        digest = hashlib.sha256(repr(run["class_name"].tolist()).encode())
        for key in ("study_id", "subject_id", "y_true", "first_in_stay", "pair_first", "has_label"):
            digest.update(np.ascontiguousarray(run[key]).tobytes())
        groups.setdefault((run["sha256"], digest.hexdigest()), []).append(run)
    data = Cohort(args.data) if args.data else None
    if data and data.sha256 not in [sha256 for sha256, _ in groups]:
        wanted = sorted({f"{group[0]['cohort']} ({sha256[:8]})"
                         for (sha256, _), group in groups.items()})
        raise InputError(f"--data: {args.data} is the cohort {data.name} ({data.sha256[:8]}), the "
                         f"runs are of {', '.join(wanted)}; give the cohort they were trained on")
    # What is wrong with the input shows before the waiting.
    extras = [control_rows(group, data) for group in groups.values()]
    tasks = list(TASKS) if args.task == "all" else [args.task]
    progress = Progress(len(tasks) * sum(len(group) + len(extra) for group, (extra, _, _) in zip(
        groups.values(), extras)), "cells", "score")
    texts, files = [], {}
    tables = {"score.csv": [], "per_class.csv": [], "differences.csv": [], "claims.csv": [],
              "subgroups.csv": []}
    for i, (group, (extra, note, cohort)) in enumerate(zip(groups.values(), extras, strict=True)):
        cells = []
        for run in group + extra:
            cells.append({})
            for task in tasks:
                cells[-1][task] = score(run, task, args.labelled_only, args.n_boot)
                progress.update()
        text, found, figures = report(group + extra, cells, cohort, args,
                                      dict(reasons.get(group[0]["sha256"], {})))
        texts.append(text + ("\n" + note if note else ""))
        for name, lines in found.items():
            tables[name] += lines if not tables[name] else lines[1:]
        files |= {name if i == 0 else name.replace(".png", f"-{i + 1}.png"): figure
                  for name, figure in figures.items()}
    progress.close()
    text = "\n\n".join(texts) + "\n"
    print(text)
    files = {name: png(figure) for name, figure in files.items() if figure is not None}
    write_files(Path(args.out), {"score.md": text} | {
        name: lines for name, lines in tables.items() if len(lines) > 1} | files)


def report(runs: list[dict], cells: list[dict[str, dict]], cohort: Cohort | None,
           args: argparse.Namespace, reasons: dict[tuple, str]) -> tuple[str, dict, dict]:
    """Text, CSV tables and figures of the runs of one test set; cells[run][task]."""
    clean, suffix = "", ", --labelled-only"
    if all(run["method"].endswith(suffix) for run in runs if run["mode"] != "control"):
        clean = "Every run was trained on labelled records only."
        runs = [run | {"method": run["method"].removesuffix(suffix)} for run in runs]
        reasons = {(m.removesuffix(suffix), frac): why for (m, frac), why in reasons.items()}
    rows, unit = by_method(runs, cells), args.unit
    names = [str(name) for name in runs[0]["class_name"]]
    title = head_lines(runs, cells, args.labelled_only, args.n_boot)[0].lstrip("# ")
    main_task = "monitoring" if "monitoring" in cells[0] else next(iter(cells[0]))
    claims, claims_csv = claim_lines(rows, reasons)
    lines = head_lines(runs, cells, args.labelled_only, args.n_boot) + [clean, ""] * bool(clean)
    lines += paper_tables(rows, unit, reasons) + claims + run_lines(runs, cells)
    lines += difference_lines(rows, unit) + class_lines(rows, main_task, names, unit)
    tables = {"score.csv": score_csv(runs, cells, args), "claims.csv": claims_csv,
              "per_class.csv": per_class_csv(runs, cells, names),
              "differences.csv": all_differences(rows)}
    if args.labelled_only:
        lines += ["- left out with --labelled-only: the sub-groups, one of which it is.", ""]
    elif cohort is not None and "monitoring" in cells[0]:
        where = cohort_rows(runs[0], cohort)
        text, tables["subgroups.csv"] = subgroup_table(runs, rows, cohort, where, unit, args.n_boot)
        lines += text
    n = cells[0][main_task]["scored"]
    title += f"; {n:,} records, {cells[0][main_task]['patients']:,} patients"
    figures = {"figure4.png": draw_fractions(rows, unit, title),
               "forest.png": draw_forest(rows, main_task, names, unit, title),
               "curves.png": draw_curves(runs, title)}
    return "\n".join(lines).rstrip(), tables, figures


def training_of(run: dict) -> list[str]:
    """Training patients, preset and epochs of a run, from its config.json."""
    found = run["config"]["cohort"].get("frac_patients"), run["preset"], \
        run["config"]["args"].get("epochs")
    return ["" if value is None else str(value) for value in found]


def run_lines(runs: list[dict], cells: list[dict[str, dict]]) -> list[str]:
    """Markdown: every run by itself, intervals over records and over patients side by side."""
    head = ["run", "method", "frac", "patients", "preset", "epochs", "seed"]
    head += [text for task in cells[0] for text in (f"{task} [records]", "[patients]")]
    body = []
    for run, row in zip(runs, cells, strict=True):
        trained = ["", "", "", "", ""] if run["mode"] == "control" else [
            f"{run['frac']:g}", *training_of(run), str(run["seed"])]
        body.append([run["name"], run["method"], *trained])
        for cell in row.values():
            boot = cell["boot"]["patient"]
            body[-1] += [cell_text(cell, "record"), "-" if np.isnan(cell["auroc"]) else
                         bounds_text(*(np.nan, np.nan) if boot is None else _interval(boot[0]),
                                       "patient")]
    return ["### All runs", "", *markdown(head, body)]


def score_csv(runs: list[dict], cells: list[dict[str, dict]], args) -> list[list]:
    """One line per run and task, with everything that the tables say of it."""
    lines = [["run", "method", "mode", "frac", "seed", "frac_patients", "preset", "epochs",
              "cohort", "synthetic", "sha256", "task",
              "labelled_only", "n_boot", "bootstrap_seed", "auroc", "record_low", "record_high",
              "patient_low", "patient_high", "records", "labelled", "scored", "patients",
              "positives", "classes", "classes_of", "left_out", "paper"]]
    for run, row in zip(runs, cells, strict=True):
        for task, cell in row.items():
            bounds = [value for boot in cell["boot"].values()
                      for value in ((np.nan, np.nan) if boot is None else _interval(boot[0]))]
            trained = [""] * 3 if run["mode"] == "control" else training_of(run)
            lines.append([*(run[key] for key in ("name", "method", "mode", "frac", "seed")),
                          *trained, *(run[key] for key in ("cohort", "synthetic", "sha256")),
                          task, args.labelled_only,
                          args.n_boot, BOOTSTRAP_SEED, cell["auroc"], *bounds,
                          *(cell[key] for key in ("records", "labelled", "scored", "patients")),
                          cell["positives"].sum(), len(cell["classes"]) - len(cell["left_out"]),
                          len(cell["classes"]), " ".join(cell["left_out"]),
                          PAPER.get((run["method"], run["frac"]), {}).get(task, "")])
    return lines


def per_class_csv(runs: list[dict], cells: list[dict[str, dict]], names: list[str]) -> list[list]:
    """One line per run, task and class; the difference is to the first run, paired."""
    lines = [["run", "method", "frac", "seed", "cohort", "task", "class", "records", "positives",
              "prevalence", "auroc", "record_low", "record_high", "patient_low", "patient_high",
              "difference", "difference_record_low", "difference_record_high",
              "difference_record_p"]]
    for run, row in zip(runs, cells, strict=True):
        for task, cell in row.items():
            first = cells[0][task]
            for k, name in enumerate(names):
                bounds = [value for boot in cell["boot"].values() for value in (
                    (np.nan, np.nan) if boot is None else _interval(boot[1][:, k]))]
                two = [c["boot"]["record"] for c in (cell, first)]
                d = paired_difference(*(boot[1][:, k] for boot in two)) if two[0] else (np.nan,) * 3
                lines.append([*(run[key] for key in ("name", "method", "frac", "seed", "cohort")),
                              task, name, cell["scored"], cell["positives"][k],
                              cell["positives"][k] / max(cell["scored"], 1), cell["classes"][k],
                              *bounds, cell["classes"][k] - first["classes"][k], *d])
    return lines


MODES = {"score": run_score, "worldmodel": run_worldmodel, "counterfactual": run_counterfactual,
         "embedding": run_embedding, "transitions": run_transitions, "cohort": run_cohort}

# flags with a meaning in some modes only; given elsewhere they are refused, not ignored
MODE_FLAGS = {
    "score": {"runs", "task", "labelled_only", "unit", "n_boot"},
    "worldmodel": {"runs", "n_boot"},
    "counterfactual": {"runs", "n_boot", "study_id", "onset", "resolve"},
    "embedding": {"runs"},
    "transitions": {"study_id", "onset", "resolve", "stable"},
    "cohort": set(),
}


def parser() -> argparse.ArgumentParser:
    """The command line of DESIGN section 7: flags, grouped, no abbreviations."""
    p = argparse.ArgumentParser(
        prog="evaluate.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mode", default="score", choices=tuple(MODE_FLAGS),
                   help="what to make (default: %(default)s)")
    group = p.add_argument_group("what is evaluated")
    group.add_argument("--runs", nargs="+", metavar="RUN", help="names under runs/, or folders")
    group.add_argument("--data", metavar="FILE.h5", help="the cohort (default: the runs' own, "
                       "where config.json says it was; without runs data/cohort.h5)")
    group.add_argument("--task", choices=(*TASKS, "all"), default="all",
                       help="triage: first record of a stay; monitoring: all records; pairs: first "
                       "records of pairs (default: %(default)s)")
    group.add_argument("--labelled-only", action="store_true",
                       help="only records with a diagnosis of any chapter; otherwise, as in the "
                       "papers, a record without one counts as having none of the classes")
    group = p.add_argument_group("transitions and counterfactuals")
    group.add_argument("--onset", metavar="CLASS", nargs="+", help="classes that begin")
    group.add_argument("--resolve", metavar="CLASS", nargs="+", help="classes that end")
    group.add_argument("--stable", metavar="CLASS", nargs="+", help="classes present before and "
                       "after")
    group.add_argument("--study-id", metavar="ID", type=int, help="the record to start from")
    group = p.add_argument_group("intervals")
    group.add_argument("--unit", choices=("record", "patient"), default="record",
                       help="what the intervals of score's tables resample; its table of all runs "
                       "has both (default: %(default)s, as the papers)")
    group.add_argument("--n-boot", type=int, default=1000, help="(default: %(default)s)")
    group = p.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="folder of tables and figures (default: "
                       "runs/MODE)")
    return p


def check_arguments(args: argparse.Namespace, p: argparse.ArgumentParser) -> None:
    """Raises InputError for a flag out of range or of no use in this mode, and a bad --out."""
    for name in sorted(set.union(*MODE_FLAGS.values()) - MODE_FLAGS[args.mode]):
        if getattr(args, name) != p.get_default(name):
            modes = " or ".join(m for m, flags in MODE_FLAGS.items() if name in flags)
            raise InputError(f"--{name.replace('_', '-')}: of no use to --mode {args.mode}; it "
                             f"belongs to --mode {modes}")
    if args.study_id is not None and args.n_boot != p.get_default("n_boot"):
        raise InputError("--n-boot: of no use to the page of one patient; leave it out")
    if "runs" in MODE_FLAGS[args.mode] and not args.runs:
        raise InputError("--runs: none given; name at least one finished run of train.py")
    if args.n_boot < 2:
        raise InputError(f"--n-boot {args.n_boot}: at least 2 are wanted for an interval")
    args.out = args.out or f"runs/{args.mode}"
    out = next(p for p in (Path(args.out), *Path(args.out).absolute().parents) if p.exists())
    if not out.is_dir():
        raise InputError(f"--out {args.out}: {out} is {file_kind(out)}; a folder is wanted")
    if (Path(args.out) / "config.json").exists():
        raise InputError(f"--out {args.out}: is a run folder; name another")
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {args.out}: {out} cannot be written to; name another")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line on stderr for what the user can mend."""
    p = parser()
    args = p.parse_args(argv)
    try:
        check_arguments(args, p)
        MODES[args.mode](args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
