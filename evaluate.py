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
# World-model scorecard: is the dynamics right, and is it the action that makes it so?
# ----------------------------------------------------------------------------------------------
SCORECARD_SEED = 0       # of distractors, shuffled actions, refits and subsets, in all runs
FIT_LIMIT = 50_000       # training pairs, and training records, that the controls are fitted on
DISTRACTORS = 999        # records of other patients among which the true next state is looked for
MIN_POSITIVES = 10       # training positives that a class needs for a read-out
IRREVERSIBLE = ("I21",)  # an infarction does not go back to what was before: no reversal asked
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


def own_action(cohort: Cohort, pairs: np.ndarray, which: str) -> np.ndarray:
    """(P, K) int8, what a run trained with --action `which` is told about these pairs."""
    if which == "state":
        source, target = cohort.pair[pairs].T
        return cohort.state[target].astype(np.int8) - cohort.state[source].astype(np.int8)
    return cohort.action[pairs] * np.int8(which == "coded")


def shuffled_actions(a: np.ndarray, seed: int = SCORECARD_SEED) -> np.ndarray:
    """Actions (P, K) dealt anew among the pairs that have one; pairs without keep their zeros.

    One random cycle through the changed pairs: each gets the action of another pair, which may
    happen to be equal. As sparse as the true ones, so only the information is gone.
    """
    changed = np.random.default_rng(seed).permutation(np.flatnonzero(a.any(axis=1)))
    result = a.copy()
    result[changed] = a[np.roll(changed, 1)]
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


def one_step(model, z, a, no_action: str = "") -> dict:
    """What a frozen model predicts, (P, D) by name, or the reason why there is no prediction.

    Args: z (P, D); a (P, K) the model's own action input; no_action: why it has none, if so.
    """
    import torch
    with torch.no_grad():
        result = {"model": model.predict(z, a), "zero action": no_action, "persistence": z,
                  "shuffled action": no_action or "fewer than two test pairs have an action"}
        if not no_action:
            result["zero action"] = model.predict(z, torch.zeros_like(a))
            if (a != 0).any(dim=1).sum() > 1:
                shuffled = torch.from_numpy(shuffled_actions(a.cpu().numpy())).to(a)
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


def fit_readout(z, y, l2: float) -> tuple:
    """Linear read-out of K classes from z: the penalised maximum likelihood, by L-BFGS in float64.

    Minimises sum_n log(1 + exp(-s_nk logit_nk)) + l2 / 2 |w_k|^2 for each class k, s = 2 y - 1 and
    logit = z @ weight + bias; the bias is free. Convex and full batch: nothing random.

    Args: z (N, D), standardised by the caller; y (N, K) of 0/1, both in each class; l2 > 0.
    Returns: weight (D, K), bias (K,), float64.
    """
    import torch
    z, y = z.double(), y.double()
    weight = z.new_zeros(z.shape[1], y.shape[1], requires_grad=True)
    bias = torch.logit(y.mean(dim=0)).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=2000, max_eval=4000, history_size=20,
                                  tolerance_grad=1e-9, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(
            z @ weight + bias, y, reduction="sum")
        loss = (bce + l2 / 2 * weight.square().sum()) / len(z)
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()


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
    from prepare_data import SIGNATURE, simulate
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
    rows = [undefined(part, "sign rate", names[c], f"{int(positives[c])} training positives, "
                      f"{MIN_POSITIVES} are wanted") for c in (~enough).nonzero()[:, 0].tolist()]
    if not classes:
        return rows + [undefined(part, "sign rate", "all classes", "no class has a read-out")]
    mean, std = z.mean(dim=0), z.std(dim=0).clamp_min(1e-6)
    # l2 = D: a priori a logit has standard deviation 1, whatever the width of z
    weight, bias = fit_readout((z - mean) / std, y[:, classes], float(z.shape[1]))

    def readout(v):
        return ((v - mean) / std).double() @ weight + bias

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
    part, group = "reversal", f"action without {' '.join(IRREVERSIBLE)}"
    fixed = [c for c, name in enumerate(names) if name in IRREVERSIBLE]
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
    folders = [find_run(name) for name in names]
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"--runs: {folder} is given twice; name each run once")
    runs = []
    for folder in folders:
        model, checkpoint = load_world_model(folder)
        run = load_run(folder)
        action = run["config"]["args"].get("action") or "coded"
        why = ("the model has no action (--objective invariance)" if model.action_encoder is None
               else "trained on zero actions alone (--action none)" if action == "none" else "")
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
    result = {"mean": short or z[place["train"][:, 1]].mean(dim=0).expand_as(z_test)}
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
    predicted = one_step(model, source, a, run["no_action"])
    queries = {name: predicted[name] for name in ("model", "zero action", "persistence")}
    predicted |= fitted_controls(run, cohort, used, z, source)
    rows = error_rows({name: predicted[name] for name in PREDICTORS}, target, groups, patient,
                      n_boot)
    rows += retrieval_rows(queries, z_test, pair, groups, subject, n_boot)
    if run["no_action"]:
        rows.append(undefined("onset read-out", "sign rate", "all classes", run["no_action"]))
    else:
        y = torch.from_numpy(cohort.state if run["action"] == "state" else cohort.label)
        y = y.to(z.device)
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
    """`0.123 [-0.010, 0.240]`, without the bracket where there is no interval; `not defined`."""
    if row is None:
        return ""
    if row["value"] == "":
        return "not defined"
    text = f"{row['value']:.{digits}f}"
    return text if np.isnan(row["low"]) else (
        f"{text} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]")


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
    return [f"- {run}: {', '.join(quantities)} ({', '.join(groups)}) {note}."
            for (run, note), (quantities, groups) in reasons.items()] + [""] * bool(reasons)


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
             f"of shuffles, refits and distractors: {SCORECARD_SEED}. A pair is changed when its "
             "label set changes; a record without any code counts as having none, as in the "
             "papers.", ""]
    lines += markdown(["run", "method", "action", "frac", "seed"], [
        [run["label"], run["method"], "none" if run["no_action"] else run["action"],
         f"{run['frac']:g}", str(run["seed"])] for run in runs])
    lines += ["### 1 One-step error", "", "Mean over the pairs of mean_d (z_pred - z_next)^2.", ""]
    lines += [line for label in labels for line in error_table(rows, label)]
    lines += ["Gain = 1 - sum of errors / sum of the errors it is held against; 0 is none.", ""]
    lines += part_table(rows, "gain", labels, HEADLINE)
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
    axes.set_xticks(range(len(groups)), [f"{g}\nn = {n:,}" for g, n in zip(
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
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    if rule is not None:
        axes.axvline(rule, color="0.4", linewidth=0.8, linestyle="--", zorder=0)


def draw_scorecard(rows: list[dict], labels: list[str], title: str, silent: list[str]) -> bytes:
    """worldmodel.png: errors by group, gains, retrieval, onset read-out by class."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
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
    control = "; red: codes without signature, the negative control" if silent else ""
    figure.suptitle(f"World-model scorecard. {title}{control}", fontsize=11)
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
    title = scorecard_caption(cohort, used) + f", seed {', '.join(str(r['seed']) for r in runs)}"
    write_files(Path(args.out), {
        "worldmodel.md": text, "worldmodel.csv": [list(ROW)] + [
            ["" if isinstance(row[key], float) and np.isnan(row[key]) else row[key] for key in ROW]
            for row in rows],
        "worldmodel.png": draw_scorecard(rows, [run["label"] for run in runs], title,
                                         without_signature(cohort))})


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
                         bounds_text(*(np.nan, np.nan) if boot is None else _interval(boot[0]),
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


MODES = {"score": run_score, "worldmodel": run_worldmodel}

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
