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
