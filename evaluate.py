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
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

from prepare_data import Cohort, InputError, Progress, replace_file

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
    return words + "".join(
        f", --{key.replace('_', '-')}" + ("" if found is True else f" {found}")
        for key, found, value in changed if found is not None and str(found) != str(value))


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


def caption(cohort: Cohort, rows: np.ndarray, what: str, seed: int | None = None) -> str:
    """`SYNTHETIC cohort demo, test fold 19: 227 records of 66 patients, 21 classes, seed 0`."""
    kind = "SYNTHETIC" if cohort.synthetic else "real"
    return (f"{kind} cohort {cohort.name}, {what}: {len(rows):,} records of "
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


def png(figure) -> bytes:
    """A matplotlib figure as the bytes of a PNG file; the figure is closed."""
    from matplotlib import pyplot as plt
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
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

    A row holds method, frac, seeds, runs (names) and cells {task: mean_cell}. Two runs of one
    method, fraction and seed (other epochs, say) are kept apart by their names.
    """
    rows: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        key = run["method"], run["frac"]
        if any(runs[j]["seed"] == run["seed"] or runs[j]["preset"] != run["preset"]
               for j in rows.get(key, [])):
            key = f"{run['method']} ({run['name']})", run["frac"]
        rows.setdefault(key, []).append(i)
    return {key: {"method": key[0], "frac": key[1], "seeds": [runs[i]["seed"] for i in where],
                  "runs": [runs[i]["name"] for i in where],
                  "each": [cells[i] for i in where],
                  "cells": {task: mean_cell([cells[i][task] for i in where])
                            for task in cells[where[0]]}}
            for key, where in rows.items()}


def interval_text(low: float, high: float, unit: str = "") -> str:
    """`[0.733-0.756]`, or why there is none."""
    return f"[one {unit}]" if np.isnan(low) else f"[{low:.3f}-{high:.3f}]"


def cell_text(cell: dict, unit: str) -> str:
    """`0.742 [0.733-0.756]`, or that the score is not defined."""
    if np.isnan(cell["auroc"]):
        return "not defined"
    boot = cell["boot"][unit]
    low, high = (np.nan, np.nan) if boot is None else _interval(boot[0])
    return f"{cell['auroc']:.3f} {interval_text(low, high, unit)}"


def difference_text(d: dict) -> str:
    """`+0.012 [-0.003..+0.027]`, or that it is not defined."""
    if np.isnan(d["low"]):
        return "not defined"
    return f"{d['point']:+.3f} [{d['low']:+.3f}..{d['high']:+.3f}]"


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
             + ("; labelled records only" if labelled_only else ""), ""]
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
                 if (m, frac) in rows] + [key for key in rows if key[1] is None]
        tasks = [task for task in tasks if task in next(iter(rows.values()))["cells"]]
        if not tasks:
            continue
        head = ["method"] + [text for task in tasks for text in (f"{task}: paper", "here")]
        body = []
        for key in present + extra:
            body.append([key[0]])
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
        return ["-"] * len(keys), [what + " The gap is not above 0 here: no shares.", ""]
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
            body.append([text, paper, task, f"{frac:g}", *["-"] * 4, f"not run: {missing[0][0]} "
                                                                   f"({why})"])
            continue
        a, b = (rows[key] for key in keys)
        found = {unit: difference(a["cells"][task], b["cells"][task], unit)
                 for unit in ("record", "patient")}
        shared = [seed for seed in a["seeds"] if seed in b["seeds"]]
        per_seed = [a["each"][a["seeds"].index(seed)][task]["auroc"]
                    - b["each"][b["seeds"].index(seed)][task]["auroc"] for seed in shared]
        low = min(d["low"] for d in found.values()), min(per_seed, default=np.nan)
        high = max(d["high"] for d in found.values()), max(per_seed, default=np.nan)
        answer = "holds" if min(low) > 0 else "does not hold" if max(high) < 0 else "undecided"
        if np.isnan(found["record"]["low"]):
            answer = "not defined"
        seeds = " ".join(f"{seed}: {d:+.3f}" for seed, d in zip(shared, per_seed, strict=True))
        body.append([text, paper, task, f"{frac:g}", difference_text(found["record"]),
                     difference_text(found["patient"]), f"{found['patient']['p']:.3f}", seeds,
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
            ("age and sex", "control: logistic regression, no ECG", age_and_sex))
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
    return row["method"] + (f", {row['frac']:.0%}" if row["frac"] not in (None, 1.0) else "")


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
            body[-1].append("not defined" if np.isnan(value) else f"{value:.3f} " + interval_text(
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
    return {"all": np.ones(len(rows), bool), "female": sex == 0, "male": sex == 1,
            "sex unknown": sex < 0, "age < 50": age < 50, "age 50-64": (age >= 50) & (age < 65),
            "age 65-79": (age >= 65) & (age < 80), "age >= 80": age >= 80,
            "age unknown": np.isnan(age), "labelled": cohort.has_label[rows],
            "unlabelled": ~cohort.has_label[rows], "first record of the patient": kind < 0,
            "after a record of the same stay": kind == 0,
            "after a record of another stay": kind == 1, "pair touches unlabelled": kind == 2}


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


def plotter():
    """pyplot, drawing into files only."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


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
# Command line
# ----------------------------------------------------------------------------------------------


def find_runs(names: list[str]) -> tuple[list[Path], dict[tuple, str]]:
    """Folders of finished runs; a study of train.py --mode reproduce stands for all of its own.

    Returns: folders, and {(method, frac): reason} of what a study could not run.
    """
    folders, reasons = [], {}
    for name in names:
        study = next((folder for folder in (Path("runs") / name, Path(name))
                      if (folder / "study.json").is_file()), None)
        if study is None:
            folders.append(find_run(name))
            continue
        runs = json.loads((study / "study.json").read_text(encoding="utf-8"))["runs"]
        finished = [n for n in runs if (study / n / "predictions_test.npz").is_file()]
        folders += [study / n for n in finished]
        for n in runs.keys() - set(finished):
            reasons[planned(runs, n)] = runs[n]["reason"] or "not finished"
        if not finished:
            raise InputError(f"--runs {name}: no run of that study is finished; go on with the "
                             "command that began it")
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"--runs: {folder} is given twice; name each run once")
    return folders, reasons


def planned(runs: dict, name: str) -> tuple[str, float]:
    """(method, frac) of a run that a study did not do, from its command line."""
    def parse(words: list[str]) -> dict:
        pairs = zip(words, words[1:] + ["--"])
        return {word[2:].replace("-", "_"): True if value.startswith("--") else value
                for word, value in pairs if word.startswith("--")}
    args = parse(runs[name]["command"])
    start = Path(args.get("init", "")).name
    init = {"args": parse(runs[start]["command"])} if start in runs else None
    if args["mode"] == "probe":
        args.setdefault("features", "z" if args.get("head") == "mlp" else "h")
    return method({"args": args, "init": init}), float(args.get("frac", 1.0))


def run_score(args: argparse.Namespace) -> None:
    """`--mode score`: tables and figures of each cohort and test set, on stdout and in --out."""
    folders, reasons = find_runs(args.runs)
    groups = {}  # runs share a table only when the truth they are judged by is the same
    for run in map(load_run, folders):
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
        text, found, figures = report(group + extra, cells, cohort, args, reasons)
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
    rows, unit = by_method(runs, cells), args.unit
    names = [str(name) for name in runs[0]["class_name"]]
    title = head_lines(runs, cells, args.labelled_only, args.n_boot)[0].lstrip("# ")
    main_task = "monitoring" if "monitoring" in cells[0] else next(iter(cells[0]))
    claims, claims_csv = claim_lines(rows, reasons)
    lines = head_lines(runs, cells, args.labelled_only, args.n_boot)
    lines += paper_tables(rows, unit, reasons) + claims + run_lines(runs, cells)
    lines += difference_lines(rows, unit) + class_lines(rows, main_task, names, unit)
    tables = {"score.csv": score_csv(runs, cells, args), "claims.csv": claims_csv,
              "per_class.csv": per_class_csv(runs, cells, names),
              "differences.csv": all_differences(rows)}
    if cohort is not None and "monitoring" in cells[0] and not args.labelled_only:
        where = cohort_rows(runs[0], cohort)
        text, tables["subgroups.csv"] = subgroup_table(runs, rows, cohort, where, unit, args.n_boot)
        lines += text
    n = cells[0][main_task]["scored"]
    title += f"; {n:,} records, {cells[0][main_task]['patients']:,} patients"
    figures = {"figure4.png": draw_fractions(rows, unit, title),
               "forest.png": draw_forest(rows, main_task, names, unit, title),
               "curves.png": draw_curves(runs, title)}
    return "\n".join(lines).rstrip(), tables, figures


def run_lines(runs: list[dict], cells: list[dict[str, dict]]) -> list[str]:
    """Markdown: every run by itself, intervals over records and over patients side by side."""
    head = ["run", "method", "frac", "seed"]
    head += [text for task in cells[0] for text in (f"{task} [records]", "[patients]")]
    body = []
    for run, row in zip(runs, cells, strict=True):
        body.append([run["name"], run["method"], "" if run["frac"] is None else f"{run['frac']:g}",
                     "" if run["seed"] is None else str(run["seed"])])
        for cell in row.values():
            boot = cell["boot"]["patient"]
            body[-1] += [cell_text(cell, "record"), "-" if np.isnan(cell["auroc"]) else
                         interval_text(*(np.nan, np.nan) if boot is None else _interval(boot[0]),
                                       "patient")]
    return ["### All runs", "", *markdown(head, body)]


def score_csv(runs: list[dict], cells: list[dict[str, dict]], args) -> list[list]:
    """One line per run and task, with everything that the tables say of it."""
    lines = [["run", "method", "mode", "frac", "seed", "cohort", "synthetic", "sha256", "task",
              "labelled_only", "n_boot", "bootstrap_seed", "auroc", "record_low", "record_high",
              "patient_low", "patient_high", "records", "labelled", "scored", "patients",
              "positives", "classes", "classes_of", "left_out", "paper"]]
    for run, row in zip(runs, cells, strict=True):
        for task, cell in row.items():
            bounds = [value for boot in cell["boot"].values()
                      for value in ((np.nan, np.nan) if boot is None else _interval(boot[0]))]
            lines.append([*(run[key] for key in ("name", "method", "mode", "frac", "seed", "cohort",
                                                 "synthetic", "sha256")), task, args.labelled_only,
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
              "difference", "difference_low", "difference_high", "difference_p"]]
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


MODES = {"score": run_score}

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
                       help="what the bootstrap resamples (default: %(default)s, as the papers)")
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
        if args.mode not in MODES:
            raise InputError(f"--mode {args.mode}: not in this version")
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
