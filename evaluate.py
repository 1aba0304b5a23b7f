"""Evaluation of cardiac world models: AUROC by ranks, bootstrap intervals, tables of runs.

Papers, as cited below:
  A  Action-Conditioned Cardiac World Models, also circulated as Beyond Patient Invariance: Learning
     Cardiac Dynamics via Action-Conditioned JEPAs (ICLR 2026 World Models workshop)
  B  World Model Augmentation for Imbalanced Multi-Label ECG Classification

    python evaluate.py --mode score --runs RUN [RUN ...]
    python evaluate.py --mode score --runs RUN --task triage --unit patient --data data/cohort.h5

Reads runs/NAME/{config.json,predictions_test.npz} of finished runs and writes score.md, score.csv
and per_class.csv; it trains nothing and changes no run.
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
    Returns: dict(point, low, high: float; replicates: (n_boot,) macro-AUROC; per_class: (K, 3)
        point, low, high). A class undefined in a replicate leaves that replicate's mean.
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
            "replicates": replicates, "per_class": np.column_stack([point, intervals])}


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
               "seed": args["seed"], "source": cohort["source"], "sha256": cohort["sha256"],
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


def score(run: dict, task: str, labelled_only: bool = False, unit: str = "record",
          n_boot: int = 1000, seed: int = 0) -> dict:
    """One cell of the table: `bootstrap_auroc` of a run on a task, with the counts it rests on.

    Returns: counts (records of the task, labelled among them, scored, patients, positives), auroc,
        low, high (NaN when undefined), left_out (class names without positives or negatives) and
        per_class: list of (class, positives, prevalence, auroc, low, high).
    """
    mask = np.ones(len(run["y_true"]), bool) if TASKS[task] is None else run[TASKS[task]] > 0
    labelled = run["has_label"] > 0
    rows = np.flatnonzero(mask & labelled if labelled_only else mask)
    y_true, subject = run["y_true"][rows], run["subject_id"][rows]
    cell = {"task": task, "records": int(mask.sum()), "labelled": int((mask & labelled).sum()),
            "scored": len(rows), "patients": len(np.unique(subject)),
            "positives": int(y_true.sum()), "classes_of": y_true.shape[1]}
    names = [str(name) for name in run["class_name"]]
    if len(rows):
        boot = bootstrap_auroc(y_true, run["y_score"][rows], n_boot, seed,
                               subject if unit == "patient" else None)
    else:
        boot = {"point": np.nan, "low": np.nan, "high": np.nan,
                "per_class": np.full((len(names), 3), np.nan)}
    if (len(rows) if unit == "record" else cell["patients"]) < 2:  # no spread to resample
        boot |= {"low": np.nan, "high": np.nan}
    cell |= {"auroc": boot["point"], "low": boot["low"], "high": boot["high"], "unit": unit}
    cell["per_class"] = [(name, int(positives), positives / max(len(rows), 1), *values)
                         for name, positives, values in zip(
                             names, y_true.sum(axis=0, dtype=np.int64),
                             boot["per_class"].tolist(), strict=True)]
    cell["left_out"] = [row[0] for row in cell["per_class"] if np.isnan(row[3])]
    cell["paper"] = PAPER.get((run["method"], run["frac"]), {}).get(task, "")
    return cell


def table(runs: list[dict], cells: list[list[dict]], labelled_only: bool, unit: str, n_boot: int,
          seed: int) -> str:
    """Markdown of the runs of one cohort, `cells[run][task]`: header, scores, counts, left out."""
    first, tasks = runs[0], [cell["task"] for cell in cells[0]]
    seeds = sorted({str(run["seed"]) for run in runs if run["seed"] is not None})
    fold = TEST_FOLD.get(first["source"])
    lines = [f"## {first['cohort']}: {'SYNTHETIC' if first['synthetic'] else 'real'} records, test "
             f"{'split' if fold is None else f'fold {fold}'}, seed {', '.join(seeds)}", "",
             f"{len(first['y_true']):,} records of {len(np.unique(first['subject_id'])):,} "
             f"patients, {first['y_true'].shape[1]} classes; macro-AUROC [95 % interval of "
             f"{n_boot:,} bootstraps of {unit}s, seed {seed}]"
             + ("; labelled records only" if labelled_only else ""), ""]
    head = ["run", "method", "frac", "seed"] + [text for task in tasks for text in (task, "paper")]
    body = [[run["name"], run["method"], "" if run["frac"] is None else f"{run['frac']:g}",
             "" if run["seed"] is None else str(run["seed"])]
            + [text for cell in row for text in (cell_text(cell), cell["paper"])]
            for run, row in zip(runs, cells, strict=True)]
    lines += markdown(head, body)
    # Truth and masks are the same for all runs of the group, so the counts are given once.
    lines += markdown(["task", "records", "labelled", "scored", "patients", "positives", "classes"],
                      [[cell["task"], *(f"{cell[key]:,}" for key in (
                          "records", "labelled", "scored", "patients", "positives")),
                        f"{cell['classes_of'] - len(cell['left_out'])} of {cell['classes_of']}"]
                       for cell in cells[0]])
    for cell in cells[0]:
        if not cell["records"]:
            lines.append(f"- {cell['task']}: not defined, {UNDEFINED[cell['task']]}.")
        elif not cell["scored"]:
            lines.append(f"- {cell['task']}: not defined, no record of it is labelled.")
        elif cell["left_out"]:
            lines.append(f"- {cell['task']}: left out, without positives or without negatives: "
                         f"{', '.join(cell['left_out'])}.")
    if any(cell["paper"] for row in cells for cell in row):
        lines.append("- paper: macro-AUROC printed in A (Tables 1-3, Figure 4) and B (Table 1) for "
                     "this method and fraction, on MIMIC-IV-ECG, fold 19: another cohort, "
                     "schedule or sampling rate is no replication. A's code took `pairs` for "
                     "its monitoring.")
    return "\n".join(lines)


def cell_text(cell: dict) -> str:
    """`0.742 [0.733-0.756]`, or that the score is not defined."""
    if np.isnan(cell["auroc"]):
        return "not defined"
    if np.isnan(cell["low"]):
        return f"{cell['auroc']:.3f} [one {cell['unit']}]"
    return f"{cell['auroc']:.3f} [{cell['low']:.3f}-{cell['high']:.3f}]"


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table in padded columns, a blank line after it."""
    width = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, width, strict=True)) + " |"
             for row in [head, *body]]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:], ""]


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


def controls(run: dict, cohort: Cohort) -> list[dict]:
    """Two rows for the table, shaped as runs, of the test records of `run` in its cohort."""
    order = np.argsort(cohort.study_id, kind="stable")
    place = np.searchsorted(cohort.study_id[order], run["study_id"]).clip(max=len(order) - 1)
    rows = order[place]
    if (list(cohort.class_name) != run["class_name"].tolist()
            or (cohort.study_id[rows] != run["study_id"]).any()
            or (cohort.label[rows] != run["y_true"]).any()):
        raise InputError(f"run {run['path']}: classes, study_id or labels of its predictions are "
                         f"not those of the cohort {cohort.name}; train the run again")
    both = (("carry-forward", "control: label of the previous record", carry_forward),
            ("age and sex", "control: logistic regression, no ECG", age_and_sex))
    return [run | {"name": name, "mode": "control", "method": text, "frac": None, "seed": None,
                   "y_score": function(cohort, rows)} for name, text, function in both]


def control_rows(runs: list[dict], data: Cohort | None) -> tuple[list[dict], str]:
    """Control rows of one cohort's table and what there is to say about absent ones."""
    run, cohort, note = runs[0], data, ""
    if cohort is None or cohort.sha256 != run["sha256"]:
        path = run["config"]["cohort"].get("path", "")
        try:
            cohort = Cohort(path)
            if cohort.sha256 != run["sha256"]:
                note = f"{path} has changed since the runs (sha256 differs)"
        except InputError as error:
            note = str(error)
    rows, lines = [], []
    if note:
        lines = [f"- controls left out, carry-forward and age and sex: {note}; give --data."]
    else:
        rows = controls(run, cohort)
    if not any("untrained encoder" in run["method"] for run in runs):
        lines.append("- control not among the runs: the probe on an untrained encoder "
                     "(train.py --mode probe --init random).")
    return rows, "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def run_score(args: argparse.Namespace) -> None:
    """`--mode score`: one table for each cohort and test set, on stdout and under --out."""
    folders = [find_run(name) for name in args.runs]
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"--runs: {folder} is given twice; name each run once")
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
    tasks = list(TASKS) if args.task == "all" else [args.task]
    settings = (args.labelled_only, args.unit, args.n_boot, BOOTSTRAP_SEED)
    # Rows first, then the bootstraps: what is wrong with the input shows before the waiting.
    rows = [(group, *control_rows(group, data)) for group in groups.values()]
    progress = Progress(sum(len(g) + len(c) for g, c, _ in rows) * len(tasks), "cells", "score")
    texts, scored = [], []
    for group, extra, note in rows:
        cells = []
        for run in group + extra:
            cells.append([])
            for task in tasks:
                cells[-1].append(score(run, task, *settings))
                progress.update()
        texts.append(table(group + extra, cells, *settings) + ("\n" + note if note else ""))
        scored += list(zip(group + extra, cells, strict=True))
    progress.close()
    text = "\n\n".join(texts) + "\n"
    print(text)
    write_scores(Path(args.out), text, scored, settings)


def write_scores(out: Path, text: str, scored: list, settings: tuple) -> None:
    """score.md as printed, score.csv (one line per run and task), per_class.csv."""
    lines = [["run", "method", "mode", "frac", "seed", "cohort", "synthetic", "sha256", "task",
              "labelled_only", "unit", "n_boot", "bootstrap_seed", "auroc", "low", "high",
              "records", "labelled", "scored", "patients", "positives", "classes", "classes_of",
              "left_out", "paper"]]
    classes = [["run", "cohort", "task", "class", "positives", "prevalence", "auroc", "low",
                "high"]]
    for run, cells in scored:
        for cell in cells:
            lines.append([*(run[key] for key in ("name", "method", "mode", "frac", "seed", "cohort",
                                                 "synthetic", "sha256")), cell["task"], *settings,
                          *(cell[key] for key in ("auroc", "low", "high", "records", "labelled",
                                                  "scored", "patients", "positives")),
                          cell["classes_of"] - len(cell["left_out"]), cell["classes_of"],
                          " ".join(cell["left_out"]), cell["paper"]])
            classes += [[run["name"], run["cohort"], cell["task"], *row]
                        for row in cell["per_class"]]
    write_files(out, {"score.md": text, "score.csv": lines, "per_class.csv": classes})


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
    group.add_argument("--data", metavar="FILE.h5", help="the cohort (default: the runs' own, where "
                       "config.json says it was; without runs data/cohort.h5)")
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
