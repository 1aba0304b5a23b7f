"""Evaluation of cardiac world models: tables, figures, and a scorecard of the world model itself.

Papers, as cited below:
  A  Action-Conditioned Cardiac World Models, also circulated as Beyond Patient Invariance: Learning
     Cardiac Dynamics via Action-Conditioned JEPAs (ICLR 2026 World Models workshop)
  B  World Model Augmentation for Imbalanced Multi-Label ECG Classification

    python evaluate.py --mode score --runs RUN [RUN ...]      # the papers' tables, Figure 4 of A
    python evaluate.py --mode worldmodel --runs PRETRAINING [...]     # does the action matter?
    python evaluate.py --mode counterfactual --runs PRETRAINING [...]   # against the demo's truth
    python evaluate.py --mode counterfactual --runs PRETRAINING --study-id ID --onset I48
    python evaluate.py --mode embedding --runs PRETRAINING    # B, Figure 2
    python evaluate.py --mode transitions --onset I44         # A, Figures 2 and 3
    python evaluate.py --mode cohort                          # A, Figures 5 and 6

RUN is a name under runs/, a folder, or a study of train.py --mode reproduce, which stands for all
of its runs. Tables (.md, .csv) and figures (.png) go to --out; no run is changed, and nothing is
trained but the linear read-outs and ridges that a model is judged against.
"""

from __future__ import annotations  # an older Python shall reach the line that names it

import argparse
import csv
import difflib
import io
import itertools
import math
import os
import pickle
import re
import shlex
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # as always, but under `python -P`

from prepare_data import (QUALITY, SIGNATURE, SPLITS, Cohort, InputError, Progress, count,
                          count_rows, golden_lines, lack, of_system, read_json, refuse_irregular,
                          replace_file, resimulate, run_script, start_script, system_error,
                          system_errors, without_signature)

CHECKPOINT_FORMAT = "cardiowm-1"  # "<project>-<version>", the "format" key of every checkpoint
CHECKPOINT_KEYS = ("kind", "model_args", "model", "class_name", "leads", "fs", "normalize")
SEED = 0  # of every bootstrap, permutation and draw below: all models are judged on the same ones

# The mask in predictions_*.npz that selects a task's records; monitoring takes the whole fold.
# `pairs` is what paper A's code calls monitoring: first records of the fold's pairs.
TASKS = {"triage": "first_in_stay", "monitoring": None, "pairs": "pair_first"}
TRUTH = ("class_name", "study_id", "subject_id", "y_true", "first_in_stay", "pair_first",
         "has_label")  # what runs of one table share
UNDEFINED = {"triage": "the cohort has no stays", "monitoring": "no record in this fold",
             "pairs": "no patient of this fold has two records"}

# ----------------------------------------------------------------------------------------------
# AUROC by midranks (A and B report macro-AUROC)
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
    return float(mean_defined(auroc(y_true, y_score)))


def mean_defined(values: np.ndarray) -> np.ndarray:
    """(..., K) -> (...): mean over K without the NaN; NaN where all are."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is wanted
        return np.where(defined, values, 0).sum(axis=-1) / defined.sum(axis=-1)


# ----------------------------------------------------------------------------------------------
# One bootstrap for every statistic: AUROC, ratios and means on the same draws of units
# ----------------------------------------------------------------------------------------------


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the replicates that are not NaN (percentile bootstrap)."""
    values = replicates[~np.isnan(replicates)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (np.nan, np.nan)


class Bootstrap:
    """Draws of units (patients, or records as the papers) with replacement.

    Every statistic below returns its replicates: element 0 is the sample itself, element r takes
    the r-th draw of np.random.default_rng(seed).integers(0, n, n), n units in the order of
    np.unique. Statistics of one Bootstrap are paired: their difference is that of the same draws.
    """

    def __init__(self, unit: np.ndarray, n_boot: int = 1000, seed: int = SEED):
        """unit: (N,) id of each row's unit."""
        ids, index, self.size = np.unique(unit, return_inverse=True, return_counts=True)
        self.index, n = index.reshape(-1), len(ids)
        rng = np.random.default_rng(seed)
        self.counts = np.ones((1 + n_boot, n), np.uint16)  # how often each unit occurs
        for row in self.counts[1:]:
            row[:] = np.bincount(rng.integers(0, n, n), minlength=n)

    def ratio(self, above: np.ndarray, below: np.ndarray | float = 1.0) -> np.ndarray:
        """sum(above) / sum(below) over the rows, (N, ...) -> (1 + n_boot, ...).

        A row counts where both are finite. NaN where the denominator sums to 0.
        """
        above = np.asarray(above, np.float64)
        below = np.broadcast_to(np.asarray(below, np.float64), above.shape)
        use = np.isfinite(above) & np.isfinite(below)
        sums = np.zeros((2, self.counts.shape[1], *above.shape[1:]))  # of each unit
        np.add.at(sums[0], self.index, np.where(use, above, 0))
        np.add.at(sums[1], self.index, np.where(use, below, 0))
        above, below = (np.tensordot(self.counts.astype(np.float64), s, 1) for s in sums)
        return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)

    def auroc(self, y_true: np.ndarray, y_score: np.ndarray, block: int = 64) -> np.ndarray:
        """(1 + n_boot, K) AUROC of each class, NaN where undefined; y_true, y_score as `auroc`.

        block: replicates at a time (memory: 4 n block bytes), without effect on the result.
        """
        y_true, y_score = _checked(y_true, y_score)
        plans = [_rank_plan(y, s, self.index) for y, s in zip(y_true.T, y_score.T, strict=True)]
        # float32 holds the half-integers of `below` exactly up to 2**23 records in a replicate
        exact = len(self.size) * int(self.size.max()) < 2**23
        dtype = np.float32 if exact else np.float64
        return np.concatenate([_weighted_auroc(
            plans, self.counts[i:i + block].T.astype(dtype, order="C"), self.size)
            for i in range(0, len(self.counts), block)])


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


def bootstrap_auroc(y_true: np.ndarray, y_score: np.ndarray, n_boot: int = 1000, seed: int = SEED,
                    unit: np.ndarray | None = None) -> dict:
    """Macro- and per-class AUROC with percentile 95 % bootstrap intervals.

    Args: y_true, y_score as `auroc`, (N, K). unit: None resamples records, as the papers; (N,) ids,
        e.g. subject_id, resample whole patients.
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
    classes = Bootstrap(unit, n_boot, seed).auroc(y_true, y_score)
    macro = mean_defined(classes)
    low, high = interval(macro[1:])
    per_class = [(column[0], *interval(column[1:])) for column in classes.T]
    return {"point": float(macro[0]), "low": low, "high": high, "replicates": macro[1:],
            "class_replicates": classes[1:], "per_class": np.array(per_class)}


# ----------------------------------------------------------------------------------------------
# Entries: what every table is made of, as Markdown and as CSV
# ----------------------------------------------------------------------------------------------


def entry(table: str, row: str, column: str, value=np.nan, why: str = "", **more) -> dict:
    """One cell of one table: value, 95 % interval, and what stands beside.

    value: replicates (1 + n_boot,) with the value itself first, a number, or (value, low, high).
    why: the reason, kept where the value is NaN. more: columns of the CSV and of `pivot`'s
    `beside`; `text` is shown in place of the value.
    """
    if isinstance(value, tuple):
        value, low, high = (*value, np.nan, np.nan)[:3]
    else:
        replicates = np.atleast_1d(np.asarray(value, np.float64))
        value, (low, high) = float(replicates[0]), interval(replicates[1:])
    return {"table": table, "row": row, "column": column, "value": value, "low": low, "high": high,
            "why": why if np.isnan(value) else ""} | more


def value_text(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """`0.742 [0.733..0.756]`; no bracket without an interval, `not defined` without a value."""
    if np.isnan(value):
        return "not defined"
    return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} [{low:.3f}..{high:.3f}]"


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table in padded columns, a blank line after it."""
    width = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, width, strict=True)) + " |"
             for row in [head, *body]]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:], ""]


def pivot(entries: list[dict], corner: str, title: str, beside: tuple = ()) -> list[str]:
    """One table as Markdown: rows down, columns across, both in order of appearance.

    beside: keys whose values, alike in a row, stand between its name and its cells.
    What is not defined is said below the table, once for each reason. No entries, no lines.
    """
    if not entries:
        return []
    cells = {(e["row"], e["column"]): e for e in entries}
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def told(line: list[dict], key: str) -> str:
        v = next((e[key] for e in line if e.get(key, "") == e.get(key, "") != ""), "")  # no NaN
        return f"{v:,}" if isinstance(v, int) else f"{v:.3g}" if isinstance(v, float) else str(v)

    body = []
    for row in rows:
        line = [cells.get((row, column), {"text": "-"}) for column in columns]
        body.append([row, *(told(line, key) for key in beside), *(
            e.get("text") or value_text(e["value"], e["low"], e["high"]) for e in line)])
    lines = [f"### {title}", "", *markdown([corner, *beside, *columns], body)]
    reasons: dict[str, list[str]] = {}
    for e in entries:
        if e["why"]:
            reasons.setdefault(f"- {e.get('text', 'not defined')}, {e['why']}", []).append(
                f"{e['row']}, {e['column']}")
    return lines + [f"{why}: {'; '.join(where)}." for why, where in reasons.items()] \
        + [""] * bool(reasons)


def csv_lines(entries: list[dict]) -> list[list]:
    """All entries as lines of a CSV, columns in order of appearance; NaN and absent ones empty."""
    columns = list(dict.fromkeys(key for e in entries for key in e))
    return [columns] + [["" if isinstance(v, float) and np.isnan(v) else v
                         for v in (e.get(c, "") for c in columns)] for e in entries]


def publish(out: str | Path, name: str, lines: list[str], files: dict[str, list | bytes]) -> None:
    """Print a page; write it as NAME.md, and `files` beside it, each whole or not at all.

    files: CSV lines (a list of lists) or bytes, by name.
    """
    out, text = Path(out), "\n".join(lines).rstrip() + "\n"
    print(text)
    with system_errors(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.md": text.encode()} | files
    for name, content in files.items():
        if isinstance(content, list):
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerows(content)
            content = buffer.getvalue().encode()
        replace_file(out / name, content)
    print(f"written: {out}/{', '.join(files)}")


def caption(cohort: Cohort, rows: np.ndarray | None = None, what: str = "all records",
            seeds=()) -> str:
    """`SYNTHETIC cohort demo, test split: 227 records of 66 patients, 21 classes, seed 0`."""
    name = cohort.name if "cohort" in cohort.name else f"cohort {cohort.name}"
    subject = cohort.subject_id if rows is None else cohort.subject_id[rows]
    return (f"{'SYNTHETIC' if cohort.synthetic else 'real'} {name}, {what}: {len(subject):,} "
            f"records of {len(np.unique(subject)):,} patients, {len(cohort.class_name)} classes"
            + (f", seed {' '.join(sorted({str(seed) for seed in seeds}))}" if seeds else ""))


# ----------------------------------------------------------------------------------------------
# Figures: what all of them share
# ----------------------------------------------------------------------------------------------


def plotter():
    """pyplot, drawing into files only."""
    os.environ["MPLBACKEND"] = "Agg"  # read on import: a notebook's means nothing here
    from matplotlib import pyplot
    return pyplot


def png(figure, dpi: int = 150) -> bytes:
    """A matplotlib figure as the bytes of a PNG file; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plotter().close(figure)
    return buffer.getvalue()


def intervals_figure(entries: list[dict], rule: float, title: str) -> bytes:
    """Dots with 95 % intervals: rows of the entries down, their columns side by side in colour.

    rule: where nothing is gained. Returns: a PNG.
    """
    rows, columns = (list(dict.fromkeys(e[key] for e in entries)) for key in ("row", "column"))
    figure, axes = plotter().subplots(
        figsize=(10, 1.6 + len(rows) * max(0.32, 0.11 * len(columns))), layout="constrained")
    for c, column in enumerate(columns):
        shown = [e for e in entries if e["column"] == column and not np.isnan(e["value"])]
        y = [rows.index(e["row"]) + 0.7 * ((c + 0.5) / len(columns) - 0.5) for e in shown]
        value, low, high = ([e[key] for e in shown] for key in ("value", "low", "high"))
        axes.hlines(y, low, high, color=f"C{c}", linewidth=1.3)
        axes.plot(value, y, "osD^v<>PX*ph"[c % 12], color=f"C{c}", markersize=4.5, label=column)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.axvline(rule, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    if len(columns) > 1:
        beside = max(1, min(3, 120 // max(map(len, columns))))  # that fit into the width
        axes.legend(fontsize=8, frameon=False, ncols=beside, loc="lower left",
                    bbox_to_anchor=(0, 1), borderaxespad=0.2)
    figure.suptitle(textwrap.fill(title, 140), fontsize=8)
    return png(figure)


# ----------------------------------------------------------------------------------------------
# Checkpoints and runs, as train.py writes them
# ----------------------------------------------------------------------------------------------


def file_kind(path: Path) -> str:
    """What lies at a path, in words, judged by its first bytes and never by its name."""
    if not path.exists():
        return "no such file"
    if not path.is_file():  # reading a pipe might never end
        return "a folder" if path.is_dir() else "a pipe or a device"
    with path.open("rb") as file:
        head = file.read(8)
    return "a zip file" if head.startswith(b"PK") else "an HDF5 file, as cohorts are" \
        if head.startswith(b"\x89HDF") else f"a file that begins with {head!r}"


def zip_fault(path: Path) -> str:
    """What is wrong with a zip file whose members are stored plainly, as torch does; "" if whole.

    No member is unpacked before their claimed sizes are known to fit into the file.
    """
    with zipfile.ZipFile(path) as file:
        claimed, size = sum(member.file_size for member in file.infolist()), path.stat().st_size
        if claimed > size:
            return f"a zip file of {size:,} bytes whose members claim {claimed:,}, so not unpacked"
        # torch looks at no checksum, and leaves the memory of what is marked as a folder as it is
        marked = [member.filename for member in file.infolist() if member.external_attr & 0x10]
        bad = marked[0] if marked else file.testzip()
    return bad and f"a damaged PyTorch file (checksum or kind of {bad})"


def check_tensors(wanted: dict, state: dict, where: str) -> None:
    """InputError unless a state dict holds exactly the wanted tensors, none of them with a NaN.

    It says how many fit and what is wrong with the first that does not.
    """
    faults = []
    for name in {**wanted, **state}:
        new, old = state.get(name), wanted.get(name)
        if old is None or new is None:
            faults.append(f"{name} is {'not wanted' if old is None else 'missing'}")
        elif (new.shape, new.dtype) != (old.shape, old.dtype):
            faults.append(f"{name} is {tuple(new.shape)} {new.dtype}, wanted {tuple(old.shape)} "
                          f"{old.dtype}")
        elif not new.isfinite().all():
            faults.append(f"{name} holds a NaN or infinity")
    if faults:
        fit = len(wanted.keys() | state.keys()) - len(faults)
        raise InputError(f"{where}: {fit} of {len(wanted)} tensors fit; {faults[0]}"
                         + f", and {len(faults) - 1} more do not" * (len(faults) > 1))


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of train.py onto the CPU; tensors and plain values only, no code runs.

    Returns: dict with at least format, kind ("worldmodel", "classifier", "probe"), model_args,
        model (state dict), class_name, leads, fs (Hz), normalize; step, epoch and more beside.
    Raises: InputError naming what was found when it is not a checkpoint of this format.
    """
    import torch
    path, checkpoint = Path(path), None
    found = file_kind(path)
    if found == "a zip file":
        try:
            found = zip_fault(path)
            if not found:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                found = "a PyTorch file of another project (no format key)"
        except pickle.UnpicklingError:
            found = "a PyTorch file that holds more than tensors and plain values, so not unpickled"
        except Exception as error:  # a file made to harm may end in any
            if of_system(error):
                raise
            found = f"a zip file that is no whole checkpoint ({type(error).__name__})"
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        missing = [key for key in CHECKPOINT_KEYS if key not in checkpoint]
        if checkpoint["format"] == CHECKPOINT_FORMAT and not missing:
            return checkpoint
        found = f"a checkpoint of format {checkpoint['format']}" \
            + f" without {', '.join(missing)}" * bool(missing)
    raise InputError(f"{path}: {found}; a checkpoint of format {CHECKPOINT_FORMAT} (e.g. "
                     "RUN/last.pt) is wanted")


def find_run(name: str | Path, root: str | Path = "runs") -> Path:
    """The folder of a run, given its name under `root` or a path; InputError when there is none."""
    folders = Path(root) / name, Path(name)
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    what = next((f"{folder} is {file_kind(folder)} without config.json" for folder in folders
                 if folder.exists()), "no such run")
    runs = [path.parent.name for path in sorted(Path(root).glob("*/config.json"))]
    runs = difflib.get_close_matches(str(name), runs, 10, cutoff=0)
    raise InputError(f"run {str(name)!r}: {what}; wanted is a name under {root}/ or the path of a "
                     "folder with config.json; runs there, closest first: "
                     + (", ".join(runs) or "none"))


NUMBER = (float, int)
CONFIG = {  # what is read of a config.json, and of the `init` in it
    "args": {"mode": (str,), "frac": NUMBER, "seed": (int,)},
    "cohort": {"name": (str,), "path": (str,), "source": (str,), "synthetic": (bool,),
               "sha256": (str,)}}
INIT = {"args": {"mode": (str,)}, "sha256": (str,), "cohort": {"name": (str,), "sha256": (str,)},
        "transfer": (bool,), "seconds": (*NUMBER, type(None))}


def find_runs(names: list[str], mode: str = "") -> tuple[list[Path], dict]:
    """Folders of the runs named; a study stands for all of its own, or those of one `mode`.

    Returns: folders, and {(method, frac): why a study could not run it}.
    """
    folders, reasons = [], {}
    for name in names:
        study = next((folder for folder in (Path("runs") / name, Path(name))
                      if (folder / "study.json").is_file()), None)
        if study is None:
            folders.append(find_run(name))
            continue
        before = len(folders)
        (told,) = read_json(study / "study.json", {"runs": {"*": {"frac": NUMBER}}})
        for n, run in told["runs"].items():
            if not (study / n / "predictions_test.npz").is_file():
                if "method" in run:
                    reasons[run["method"], run["frac"]] = run.get("reason") or "not finished"
            elif mode in ("", read_json(study / n / "config.json", CONFIG)[0]["args"]["mode"]):
                folders.append(study / n)
        if len(folders) == before:
            raise InputError(f"--runs {name}: no {mode or 'run'} of that study is finished; go on "
                             "with the command that began it")
    resolved = [folder.resolve() for folder in folders]
    if twice := [f for f, real in zip(folders, resolved) if resolved.count(real) > 1]:
        raise InputError(f"--runs: {twice[0]} is given twice; name each run once")
    return folders, reasons


# What --recipe sets of a pretraining's objective where a flag is unset; a recipe of the papers' own
# has lam, any other the ratio that lam follows from.
PAPERS = dict(action="coded", lam=0.1, sigreg_ratio=None, crop=1.0, noise=0.0, supervise=0.0,
              self_pairs=False)
SWITCHES = {
    "papers": PAPERS,
    "recommended": PAPERS | dict(action="sets", lam=None, sigreg_ratio=5.0, crop=0.8, noise=0.05,
                                 supervise=0.3)}


def recipe_words(args: dict) -> str:
    """`, recommended`, or the switches in which a pretraining departs from the papers' recipe.

    args: of its config.json; a key that is absent or None has the papers' value.
    """
    usual, better = SWITCHES["papers"], SWITCHES["recommended"]
    names = [name for name in usual if name != "lam" and (  # other objectives have no action
        name != "action" or args.get("objective", "dynamics") == "dynamics")]
    used = {name: usual[name] if args.get(name) is None else args[name] for name in names}
    if all(used[name] == better[name] for name in names):
        return ", recommended"
    words = {"action": "sets" if used.get("action") == "sets" else "--action {}",
             "sigreg_ratio": "ratio {:g}", "self_pairs": "self-pairs"}
    return "".join(", " + words.get(name, f"{name} {{:g}}").format(used[name])
                   for name in names if used[name] != usual[name])


def method(args: dict, init: dict | None) -> str:
    """What a run does, in the words of PAPER; whatever departs from the papers is appended.

    Args: args, the arguments of config.json; init, its `init`: the pretraining that the run began
        from, with `args` and `cohort`, to which objective, regulariser and the like belong.
    """
    source, mode = init["args"] if init else args, args["mode"]
    mlp, start = mode == "probe" and args.get("head") == "mlp", str(args.get("init") or "")
    usual = {"normalize": "zscore", "labelled_only": False}
    if mode == "pretrain":
        start = ""
        words = "supervised head" if args.get("objective") == "labels" else "online probe"
    else:
        usual |= {"crop": 1.0, "noise": 0.0}
        words = "finetuned" if mode == "finetune" else "mlp probe" if mlp else "linear probe"
    if mlp:  # B: pos_weight = min(negatives / positives, 5)
        usual |= {"class_weight": "5", "augment_action": "true"}
    if mode == "probe":  # A probes h, B probes z
        features, augment = args.get("features") or "h", args.get("augment") or "none"
        words += " on z" if features == "z" else " on h" * mlp
        words += f" + {augment} augmentation" * (augment != "none")
    changed = [(args, usual)]
    if start == "scratch":
        words = "supervised" + ", equal compute" * bool(args.get("compute_of"))
    elif start.startswith("random"):
        words += ", untrained encoder"
    else:
        objective, reg = source.get("objective", "dynamics"), source.get("reg", "sigreg")
        words += f", {objective}" + f", {reg}" * (reg != "sigreg") + recipe_words(source)
        usual = {"residual": False, "z_dim": 256, "pairs": "all"}
        usual |= {"slices": 256} if reg == "sigreg" else {}
        usual |= {"lam": 0.1} if reg == "sigreg" and source.get("sigreg_ratio") is None else {}
        changed.append((source, usual))
        if init:
            frac = float(source.get("frac", 1.0))
            words += f", pretrained on {frac:.0%}" * (frac != float(args.get("frac", 1.0)))
            if init.get("transfer"):
                words += f", pretrained on cohort {init['cohort']['name']}"
            words += ", pretrained on labelled records" * (
                bool(source.get("labelled_only")) > bool(args.get("labelled_only")))
    return words + "".join(
        f", --{key.replace('_', '-')}" + f" {of[key]}" * (of[key] is not True)
        for of, usual in changed for key, value in usual.items()
        if of.get(key) is not None and str(of[key]) != str(value))


def load_run(folder: Path, split: str = "test") -> dict:
    """A finished run: its config, cohort, log and cost, and its predictions of that split.

    minutes: of the run and the pretraining it began from; "" where one of them is not known.
    """
    (config,) = read_json(folder / "config.json", CONFIG)
    args, cohort, init = config["args"], config["cohort"], config.get("init")
    if init and (why := lack(init, INIT)):
        raise InputError(f"{folder / 'config.json'}: init.{why}; train the run again with "
                         "--overwrite")
    rows = read_json(folder / "log.jsonl", {"step": (int,)}, lines=True)
    seconds = [next((row["run_seconds"] for row in rows[::-1] if "run_seconds" in row), None),
               init.get("seconds") if init else 0.0]
    try:
        words = config.get("method") or method(args, init)
        return {"name": folder.name, "path": folder, "config": config, "args": args, "init": init,
                "method": words, "frac": float(args["frac"]), "seed": args["seed"],
                "sha256": cohort["sha256"], "cohort": cohort["name"],
                "source": cohort["source"], "synthetic": cohort["synthetic"], "log": rows,
                "minutes": "" if None in seconds else f"{sum(seconds) / 60:.1f}"
                } | load_predictions(folder / f"predictions_{split}.npz")
    except (KeyError, TypeError) as error:
        raise InputError(f"run {folder}: config.json or log.jsonl holds {error!r}; train the run "
                         "again with --overwrite") from None


def load_predictions(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a predictions_*.npz of train.py; InputError where they cannot be scored."""
    kinds = {"y_true": "bui", "y_score": "f", "class_name": "U", "study_id": "iu",
             "subject_id": "iu", "first_in_stay": "bui", "pair_first": "bui", "has_label": "bui"}
    refuse_irregular(path, "predictions of train.py are wanted")
    try:
        if fault := zip_fault(path):
            raise ValueError(fault)
        with np.load(path, allow_pickle=False) as file:
            for member in file.zip.infolist():  # nothing is taken for what is not there
                with file.zip.open(member) as part:
                    np.lib.format.read_magic(part)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(part)
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename} claims the shape {shape}")
            found = {key: file[key] for key in kinds}
    except FileNotFoundError:
        raise InputError(f"run {path.parent}: unfinished, there is no {path.name}; repeat the "
                         "train.py command that began it with --resume (its flags are in "
                         "config.json)") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, MemoryError, KeyError,
            NotImplementedError, RuntimeError) as error:  # whatever a bad zip file may cause
        if of_system(error):
            raise InputError(system_error(error, path)) from error
        raise InputError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); delete "
                         "it and repeat the train.py command with --resume") from None
    shape = found["y_true"].shape
    shapes = dict.fromkeys(kinds, shape[:1]) | {
        "y_true": shape, "y_score": shape, "class_name": shape[1:]}
    wrong = [f"{key} holds {found[key].dtype}" for key, kind in kinds.items()
             if found[key].dtype.kind not in kind]
    if len(shape) != 2 or 0 in shape or any(found[k].shape != s for k, s in shapes.items()):
        wrong.append("the arrays do not fit together: "
                     + ", ".join(f"{key} {found[key].shape}" for key in kinds))
    for key in ("y_true", "y_score") if not wrong else ():
        if n := np.count_nonzero(~((found[key] >= 0) & (found[key] <= 1))):  # NaN among them
            wrong.append(f"{key} holds {n:,} values outside 0 to 1")
    wrong += [f"{key} holds one twice" for key in ("study_id", "class_name")
              if len(np.unique(found[key])) < len(found[key])]
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}; predictions of train.py are wanted: if the "
                         "training diverged train again, e.g. with a lower --lr")
    return found


# ----------------------------------------------------------------------------------------------
# Frozen models and their embeddings
# ----------------------------------------------------------------------------------------------


def pick_device(name: str = "auto"):
    """A torch.device; `auto`: CUDA, else Apple's MPS, else CPU. InputError if it is not there."""
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"a device of type {device.type}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); wanted "
                         "auto, cpu, cuda, cuda:N or mps") from None
    return device


def load_world_model(folder: Path) -> tuple:
    """(frozen model on the device, checkpoint) of a pretraining: last.pt, as A; or InputError."""
    import cardiowm
    import torch
    checkpoint = load_checkpoint(folder / "last.pt")
    try:
        if checkpoint["kind"] != "worldmodel":
            raise TypeError(f"it is a {checkpoint['kind']}")
        with torch.device("meta"):  # where absurd sizes cost nothing
            wanted = cardiowm.WorldModel(**checkpoint["model_args"]).state_dict()
        check_tensors(wanted, checkpoint["model"], "the model")
        model = cardiowm.WorldModel(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"run {folder}: last.pt holds another architecture "
                         f"({str(error).splitlines()[0]}); a pretraining (train.py --mode "
                         "pretrain) is wanted") from None
    return model.eval().requires_grad_(False).to(pick_device()), checkpoint


def predict(run: dict, z, y, y_next, known, known_next):
    """r(z, y -> y_next) of one of `world_models`, in the form in which it is told of a change.

    Args: z (N, D) tensor; y, y_next (N, K) arrays of 0 and 1; known, known_next (N,) bool, whether
        the record carries, will carry any code. No change is y_next = y, the way back is all four
        exchanged.
    """
    import torch
    import cardiowm
    y, y_next = (torch.from_numpy(np.asarray(of, np.float32)) for of in (y, y_next))
    told = y_next - y if run["form"] == "difference" else cardiowm.action_sets(
        y, y_next, *(torch.from_numpy(np.array(of, bool)) for of in (known, known_next)))
    return run["model"].predict(z, told.to(z))


def cohort_of(runs: list[dict], data: str | None) -> Cohort:
    """The cohort of these runs, at --data or where the first one's config says; else InputError."""
    cohort = Cohort(data or runs[0]["config"]["cohort"]["path"])
    for run in runs:
        if cohort.sha256 != run["sha256"]:
            raise InputError(f"{'--data: ' if data else ''}{cohort.path} is not the cohort that "
                             f"{run['path']} was trained on ({run['cohort']}, sha256 "
                             f"{run['sha256'][:8]}, found {cohort.sha256[:8]}); give that one, and "
                             "the runs of one cohort")
    return cohort


def embed(model, signal: np.ndarray, rows: np.ndarray, normalize: str = "zscore",
          progress: Progress | None = None, batch: int = 256) -> tuple:
    """Frozen h (n, 256) and z (n, D), float32 tensors on the device, of the rows (n,) in order.

    Args: signal (N, 12, T) mV, any float dtype, e.g. Cohort.signal; normalize "zscore" or "none",
        as the checkpoint says. No autocast: bf16 has 257 values between two powers of 2, which
        makes ties.
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
    h, z = torch.cat(h), torch.cat(z)
    if not (good := h.isfinite().all(dim=1).cpu().numpy()).all():
        bad, path = np.asarray(rows)[~good], getattr(signal, "filename", None)  # of a memory map
        which = f"rows {bad[:5].tolist()}" if path is None else \
            f"{path}: study_id {Cohort(path).study_id[bad[:5]].tolist()}"
        raise InputError(f"{which}: {len(bad):,} records have no finite embedding, for a sample of "
                         "theirs is NaN or infinite, or a weight is; `python prepare_data.py "
                         f"--check {shlex.quote(str(path or 'FILE.h5'))}` tells which")
    return h, z


def recalibrate(modules, forward, batches) -> None:
    """Set batch norm's running statistics to the plain average over `batches` of training data.

    After few steps the moving average still remembers the initial weights (z std 0.49 in eval
    mode). Training itself never reads these statistics. Modules are left in train mode.
    """
    import torch
    norms = [m for module in modules for m in module.modules()
             if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for module in modules:
        module.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative average
    with torch.no_grad():
        for batch in batches:
            forward(batch)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


def fit_logistic(x, y, l2: float, weight=None) -> tuple:
    """L2-regularised logistic regression of each class, deterministic: the one fit of this file.

    Minimises sum_n weight_n BCE + l2 / 2 |coefficients|^2 per class, on x standardised over the
    rows, around the class's log odds (with half a row of each kind, so that none is infinite).
    Args: x (N, D) tensor; y (N, K) in [0, 1], array or tensor; weight (N,), 1 unless given.
    Returns: coefficients (D, K) and bias (K,), for logits x @ coefficients + bias of raw x; dtype
        and device of x.
    """
    import torch
    from torch.nn import functional
    y = torch.as_tensor(y).to(x.device, torch.float64)
    weight = torch.as_tensor(np.ones(len(y)) if weight is None else weight).to(y)[:, None]
    mean = (weight * x.double()).sum(dim=0) / weight.sum()
    std = ((weight * (x.double() - mean).square()).sum(dim=0) / weight.sum()).sqrt()
    std = torch.where(std > 0, std, torch.ones_like(std))
    standard = functional.pad((x.double() - mean) / std, (0, 1), value=1.0)   # (N, D + 1)
    positives = (weight * y).sum(dim=0)
    prior = ((positives + 0.5) / (weight.sum() - positives + 0.5)).log()      # (K,)
    beta = torch.zeros(standard.shape[1], y.shape[1], dtype=y.dtype, device=y.device,
                       requires_grad=True)
    solver = torch.optim.LBFGS([beta], max_iter=1000, history_size=20, tolerance_grad=1e-7,
                               tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = functional.binary_cross_entropy_with_logits(prior + standard @ beta, y, weight,
                                                            reduction="sum")
        value = (value + l2 / 2 * beta.square().sum()) / weight.sum()
        value.backward()
        return value

    solver.step(loss)
    coefficients = beta.detach()[:-1] / std[:, None]
    bias = prior + beta.detach()[-1] - mean @ coefficients
    return coefficients.to(x.dtype), bias.to(x.dtype)


def distance_ranks(query, keys, own, allowed, block: int = 1024) -> tuple:
    """The one neighbour ranking: how near is a query's own key among those allowed to it?

    Args: query (Q, D), keys (N, D) tensors; own, allowed: (slice of queries) -> (q, N) bool tensors
        of the keys that are the query's own (the nearest of them counts) and that compete with it.
    Returns: rank (Q,) float64 of the nearest own key, 1 is the nearest of all, ties take the mean
        of their ranks (so a collapsed latent space gains nothing); and candidates (Q,) int64, own
        and competing.
    """
    import torch
    ranks, sizes = [], []
    for start in range(0, len(query), block):
        rows = slice(start, min(start + block, len(query)))
        distance = torch.cdist(query[rows].double(), keys.double(),            # (q, N)
                               compute_mode="donot_use_mm_for_euclid_dist")    # equal stays equal
        is_own, rival = own(rows), allowed(rows)
        mine = torch.where(is_own, distance, torch.inf).amin(dim=1, keepdim=True)
        tied = (distance - mine).abs() <= 1e-9 * (1 + mine)                    # but for rounding
        ranks.append(1 + (rival & ~tied & (distance < mine)).sum(dim=1)
                     + (rival & tied).sum(dim=1) / 2)
        sizes.append((is_own | rival).sum(dim=1))
    return torch.cat(ranks).double().cpu().numpy(), torch.cat(sizes).cpu().numpy()


# ----------------------------------------------------------------------------------------------
# Score: macro-AUROC of runs on triage, monitoring and pairs (A, Tables 1-3; B, Table 1)
# ----------------------------------------------------------------------------------------------

# The words of `method` for what the papers compare
SUPERVISED, PROBE, FINETUNED = "supervised", "linear probe, dynamics", "finetuned, dynamics"
VICREG, MLP = "finetuned, dynamics, vicreg", "mlp probe on z, dynamics"
AUGMENTED = "mlp probe on z + dynamics augmentation, dynamics"
OVERSAMPLED = "mlp probe on z + oversample augmentation, dynamics"
EQUAL, UNTRAINED, OURS = "supervised, equal compute", "linear probe, untrained encoder", \
    ", recommended"  # appended to a method

# Tables of the papers: title, fraction of the training patients, tasks, and of each method the
# macro-AUROC (value, low, high) printed for these tasks, all on MIMIC-IV-ECG, fold 19. Figure 4 is
# read off the plot; B gives no intervals.
BOTH = "triage", "monitoring"
PAPER_TABLES = (
    ("Paper A, Table 1: all patients", 1.0, BOTH, {
        SUPERVISED: ((0.735, 0.727, 0.751), (0.786, 0.776, 0.797)),
        "linear probe, invariance": ((0.666, 0.656, 0.682), (0.698, 0.689, 0.709)),
        "finetuned, invariance": ((0.679, 0.668, 0.697), (0.726, 0.715, 0.737)),
        PROBE: ((0.725, 0.714, 0.742), (0.744, 0.734, 0.755)),
        FINETUNED: ((0.742, 0.733, 0.756), (0.786, 0.777, 0.794))}),
    ("Paper A, Figure 4: 10 % of the patients", 0.1, BOTH, {
        SUPERVISED: ((0.64,),), PROBE: (), FINETUNED: ((0.69,),)}),
    ("Paper A, Table 2: 1 % of the patients", 0.01, BOTH, {
        SUPERVISED: ((0.515, 0.500, 0.526), (0.503, 0.491, 0.514)),
        PROBE: ((0.563, 0.551, 0.575), (0.575, 0.560, 0.591)),
        FINETUNED: ((0.510, 0.498, 0.525), (0.507, 0.497, 0.519))}),
    ("Paper A, Table 3: SIGReg or VICReg", 1.0, BOTH, {
        FINETUNED: ((0.742, 0.733, 0.756), (0.786, 0.777, 0.794)),
        VICREG: ((0.720, 0.710, 0.738), (0.770, 0.759, 0.780)),
        PROBE: ((0.725, 0.714, 0.742), (0.744, 0.734, 0.755)), f"{PROBE}, vicreg": ()}),
    ("Paper B, Table 1: augmentation by the world model", 1.0, ("monitoring",), {
        SUPERVISED: ((0.772,),), FINETUNED: ((0.789,),), MLP: ((0.687,),), AUGMENTED: ((0.743,),),
        "mlp probe on z + smote augmentation, dynamics": (), "mlp probe on h, dynamics": ()}))
CONTROL_METHODS = EQUAL, UNTRAINED, PROBE + OURS, FINETUNED + OURS  # in every table
EXTRA_METHODS = (OVERSAMPLED, f"{MLP}, --class-weight full",  # and in B's, beside any augmentation
                 f"{AUGMENTED}, --action state", MLP + OURS, AUGMENTED + OURS)
MAIN_METHODS = SUPERVISED, FINETUNED, PROBE, PROBE + OURS, UNTRAINED  # by class, sub-group, plotted
RARE = 0.05         # of the scored records; a class below it is rare
LEAST_PATIENTS = 2  # with a class, and without it, that its AUROC needs to enter a macro mean

# Arguments in which two runs of one method may differ: those that say where, not what. Of the
# settings that the preset derives from the number of records drawn, only those given are compared.
FREE_SETTINGS = {"seed", "run", "init", "compute_of", "data", "cache", "device", "resume",
                 "overwrite", "checkpoint_minutes", "compile", "allow_tiny", "recipe"}
DERIVED_SETTINGS = {"epochs", "batch_size", "lr", "schedule", "total"}


def select_task(run: dict, task: str, args: argparse.Namespace, among=True) -> dict:
    """What a task asks of every run judged on these records: chosen once, from the truth alone.

    among: mask of a sub-group. Returns: rows of the predictions, y_true, counts of records and
    patients, positives (K,), eligible (K,) the classes of the macro mean, and boot, the Bootstrap
    over `--unit` (no draws of one unit alone).
    """
    labelled = run["has_label"] > 0
    mask = among & (run[TASKS[task]] > 0 if TASKS[task] else np.ones(len(labelled), bool))
    rows = np.flatnonzero(mask & labelled if args.labelled_only else mask)
    y_true = run["y_true"][rows]
    patient = np.unique(run["subject_id"][rows], return_inverse=True)[1]
    both = np.zeros((2, patient.max(initial=-1) + 1, y_true.shape[1]), bool)
    for value in (0, 1):  # which patients are without, with the class
        np.logical_or.at(both[value], patient, y_true == value)
    unit = patient if args.unit == "patient" else np.arange(len(rows))
    return {"rows": rows, "y_true": y_true, "records": int(mask.sum()),
            "labelled": int((mask & labelled).sum()), "scored": len(rows),
            "unit": args.unit, "patients": both.shape[1],
            "positives": y_true.sum(axis=0, dtype=np.int64),
            "eligible": (both.sum(axis=1) >= LEAST_PATIENTS).all(axis=0),
            "boot": Bootstrap(unit, args.n_boot if len(np.unique(unit)) > 1 else 0)}


def class_replicates(run: dict, chosen: dict) -> np.ndarray:
    """(1 + n_boot, K) float32 AUROC of a run on a task; one row where there is one unit alone."""
    scores = run["y_score"][chosen["rows"]]
    return chosen["boot"].auroc(chosen["y_true"], scores).astype(np.float32)


def by_method(runs: list[dict]) -> tuple[dict[tuple, dict], dict[tuple, str]]:
    """Runs that differ in their seed alone become one row: {(method, frac): row}.

    A row holds method, frac, runs and seeds {seed: its runs}: one, or the draws of an untrained
    encoder. Two versions of one method (other epochs, say, or one seed twice) become rows by their
    names, and neither stands for the method.
    Returns: rows, and {(method, frac): why no row stands for it}.
    """
    def version(run: dict) -> list[dict]:  # without what may differ between seeds
        parts = [run["args"].get("given", {})]
        for args in (run["args"], (run["init"] or {}).get("args", {})):
            free = FREE_SETTINGS | DERIVED_SETTINGS
            free |= {"lam"} if args.get("sigreg_ratio") else set()  # it follows from the batch size
            parts.append({key: value for key, value in args.items() if key not in free})
        return parts

    found: dict[tuple, list[dict]] = {}
    for run in runs:
        found.setdefault((run["method"], run["frac"]), []).append(run)
    rows, ambiguous = {}, {}
    for (name, frac), group in found.items():
        draws = {(run["seed"], run["args"].get("init") if "untrained" in name else "")
                 for run in group}
        one = len(draws) == len(group) and all(version(run) == version(group[0]) for run in group)
        for part in [group] if one else [[run] for run in group]:
            key, seeds = name if one else f"{name} ({part[0]['path']})", {}
            for run in part:
                seeds.setdefault(run["seed"], []).append(run)
            rows[key, frac] = {"method": key, "frac": frac, "runs": part, "seeds": seeds}
        if not one:
            ambiguous[name, frac] = "several versions of it: " + ", ".join(
                str(run["path"]) for run in group) + "; name one in --runs"
    return rows, ambiguous


def row_replicates(row: dict, task: str, seeds=None) -> np.ndarray:
    """(1 + n_boot, K): mean over the row's seeds (all, or those named) and over a seed's draws.

    All runs of a task are judged on the same draws: replicates of the mean are means of replicates.
    """
    return np.mean([np.mean([run["classes"][task] for run in row["seeds"][seed]], axis=0)
                    for seed in (row["seeds"] if seeds is None else seeds)], axis=0)


def macro(row: dict, task: str, chosen: dict, seeds=None) -> np.ndarray:
    """(1 + n_boot,) `row_replicates`, averaged over the classes of the task's macro mean."""
    classes = row_replicates(row, task, seeds)
    return mean_defined(classes[:, chosen["eligible"]].astype(np.float64))


def paired(a: dict, b: dict, task: str, chosen: dict) -> np.ndarray:
    """(1 + n_boot,) macro-AUROC of row a less that of row b, over the seeds they share.

    Where they share none, and a control has none, over all of each.
    """
    shared = [seed for seed in a["seeds"] if seed in b["seeds"]] or None
    return macro(a, task, chosen, shared) - macro(b, task, chosen, shared)


def row_name(row: dict, count: bool = False) -> str:
    """Method and, below all patients, the fraction; if asked, the number of seeds, if several."""
    part = "" if row["frac"] in (None, 1.0) else f", {100 * row['frac']:g} %"
    several = count and len(row["seeds"]) > 1
    return row["method"] + part + f", {len(row['seeds'])} seeds" * several


def row_entry(table: str, row: dict, task: str, chosen: dict, column: str = "", value=None,
              **more) -> dict:
    """The score of a method on a task, or another value, with everything that it rests on."""
    minutes = [float(run["minutes"]) for run in row["runs"] if run["minutes"]]
    return entry(table, row_name(row), column or task,
                 macro(row, task, chosen) if value is None else value, **{
                     "why": "no class with enough patients",
                     "seeds": " ".join(str(seed) for seed in row["seeds"] if seed is not None),
                     "minutes": f"{np.mean(minutes):.1f}" if minutes else "",
                     "records": chosen["scored"], "patients": chosen["patients"],
                     "classes": int(chosen["eligible"].sum()), "all_class_value": float(
                         mean_defined(row_replicates(row, task)[0].astype(np.float64)))} | more)


def paper_entries(rows: dict, tasks: dict, reasons: dict[tuple, str]) -> list[dict]:
    """A's Tables 1-3 and Figure 4, B's Table 1, beside what was found.

    A table appears when one of its own rows was run; a row when it was run, or when `reasons`
    {(method, frac): text} says why it was not.
    """
    entries = []
    for title, frac, wanted, methods in PAPER_TABLES:
        if not any((name, frac) in rows for name in methods):
            continue
        keys = [(name, frac) for name in (
            *methods, *CONTROL_METHODS, *EXTRA_METHODS * (title[6] == "B"))]
        keys += [key for key in rows if key[1] is None]  # controls without training patients
        for i, task in enumerate(wanted):
            for key in keys if task in tasks else ():
                printed, here = methods.get(key[0], ())[i:i + 1], f"{task}: here"
                if printed and (key in rows or key in reasons):
                    entries.append(entry(title, key[0], f"{task}: paper {title[6]}", *printed))
                if key in rows:
                    entries.append(row_entry(title, rows[key], task, tasks[task], here)
                                   | {"row": key[0]})  # the title has the fraction
                elif key in reasons:
                    entries.append(entry(title, key[0], here, why=reasons[key], text="not run"))
        if title[6] == "B" and "monitoring" in tasks:
            entries += gap_shares(title, rows, keys, tasks["monitoring"])
    return entries


def gap_shares(title: str, rows: dict, keys: list[tuple], chosen: dict) -> list[dict]:
    """B: how much of the gap from the probe on real rows to the finetuned model each row closes."""
    low, high = (rows.get((name, 1.0)) for name in (MLP, FINETUNED))
    if low is None or high is None:
        return []
    gap = paired(high, low, "monitoring", chosen)
    gap = gap if interval(gap[1:])[0] > 0 else gap * np.nan
    return [row_entry(title, rows[key], "monitoring", chosen, "share of the gap; paper B: 55 %",
                      paired(rows[key], low, "monitoring", chosen) / gap,
                      why=f"the gap from {MLP!r} to {FINETUNED!r} is not above 0")
            for key in keys if key in rows and key[0].startswith("mlp") and key[0] != MLP]


# ----------------------------------------------------------------------------------------------
# Transitions: two consecutive ECGs of one patient, as printed (A, Figures 2, 3)
# ----------------------------------------------------------------------------------------------
PRINTED = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",))
MM_PER_S, MM_PER_MV, MM_PER_INCH = 25, 10, 25.4  # ECG paper
MARGIN_MM, PAGE_MM = 5, 280
PULSE_MM, NAME_MM = 10, 4.5  # left of the traces the calibration pulse, above them the lead's name
MM_DPI = 254  # 10 pixels to the mm, so that every grid line lies on a pixel


def class_columns(cohort: Cohort, names: list[str] | None, flag: str) -> list[int]:
    """Columns of the named classes, each once; InputError for an unknown one."""
    if unknown := [name for name in names or () if name not in cohort.class_name]:
        raise InputError(f"{flag} {' '.join(unknown)}: no class of the cohort {cohort.name}; its "
                         f"classes are {' '.join(cohort.class_name)}")
    return [cohort.class_name.index(name) for name in dict.fromkeys(names or ())]


def find_transition(cohort: Cohort, onset=(), resolve=(), stable=()) -> tuple[int, int, float]:
    """The pair that shows best what is asked: A, Figures 2 and 3.

    Args: onset, resolve, stable: class names whose action is +1, is -1, that both records carry.
    Returns: index of the pair, of those that meet every condition the first in this order: neither
        record has a quality flag; both are labelled; fewest changes, |a|_1; shortest gap (unknown
        last); lowest index. How many pairs meet them, and the days between its two records, NaN
        where a date is missing, and for PTB-XL, which interpolates.
    Raises: InputError for an unknown class, for no condition, and for no such pair.
    """
    masks = {f"{cohort.class_name[k]} {word}": mask[:, k] for word, names, flag, mask in (
        ("begins", onset, "--onset", cohort.action == 1),
        ("ends", resolve, "--resolve", cohort.action == -1),
        ("stays", stable, "--stable", (cohort.label[cohort.pair] > 0).all(axis=1)))
        for k in class_columns(cohort, names, flag)}
    if not masks:
        raise InputError("--mode transitions: no transition is described; give at least one of "
                         "--onset, --resolve, --stable")
    found = np.flatnonzero(np.logical_and.reduce(list(masks.values())))
    if not len(found):
        each = "; ".join(f"{name}: {mask.sum():,}" for name, mask in masks.items())
        raise InputError(f"--mode transitions, cohort {cohort.name}: none of {len(cohort.pair):,} "
                         f"pairs meets what is asked; each alone: {each}; ask for less")
    rows = cohort.pair[found]                                                   # (F, 2)
    flagged = (cohort.quality[rows] > 0).any(axis=1)
    unlabelled = ~cohort.has_label[rows].all(axis=1)
    change = np.abs(cohort.action[found]).sum(axis=1, dtype=np.int64)
    gap = cohort.gap_days[found] * (np.nan if cohort.source == "ptbxl" else 1)
    first = np.lexsort((found, gap, change, unlabelled, flagged))[0]  # the last key decides first
    return int(found[first]), len(found), gap[first]


def codes_of(cohort: Cohort, row: np.ndarray) -> str:
    """`I10 I48` of a row (K,) of labels or states; `none` of an empty one."""
    return " ".join(np.array(cohort.class_name)[row > 0]) or "none"


def record_words(cohort: Cohort, row: int) -> str:
    """One record in words: study_id, labels, quality flags."""
    labels = codes_of(cohort, cohort.label[row]) if cohort.has_label[row] else "unlabelled"
    flags = ", ".join(name for name, bit in QUALITY.items() if cohort.quality[row] & bit)
    return f"study_id {cohort.study_id[row]}: {labels}" + (f" (quality: {flags})" if flags else "")


def draw_ecg(axes, y_mm: np.ndarray, cohort: Cohort, limits: list[tuple], top: float) -> None:
    """Draw an ECG as printed, 3 rows of 4 leads x 2.5 s and lead II for 10 s, on ECG paper.

    axes: 1 unit is 1 mm; y_mm (12, T) about each lead's median; limits: mm (above, below) the
    baseline of each row; top: the upper edge of the paper.
    """
    from matplotlib.collections import LineCollection
    left, right, bottom = MARGIN_MM, PAGE_MM - MARGIN_MM, top - np.sum(limits)
    for step, width, colour in ((1, 0.3, "#f7d5d5"), (5, 0.7, "#eda9a9")):
        lines = [((x, bottom), (x, top)) for x in np.arange(left, right + 1, step)]
        lines += [((left, y), (right, y)) for y in np.arange(bottom, top + 0.5, step)]
        axes.add_collection(LineCollection(lines, linewidths=width, colors=colour))
    x_mm = left + PULSE_MM + np.arange(y_mm.shape[1]) / cohort.fs * MM_PER_S
    pulse = np.array([(1, 0), (2, 0), (2, 1), (7, 1), (7, 0), (8, 0)]) * (1, MM_PER_MV)  # 0.2 s
    for names, (up, down) in zip(PRINTED, limits, strict=True):
        zero = top - up
        axes.plot(left + pulse[:, 0], zero + pulse[:, 1], color="black", linewidth=0.9)
        for name, piece in zip(names, np.array_split(np.arange(len(x_mm)), len(names)),
                               strict=True):
            axes.plot(x_mm[piece], zero + y_mm[cohort.leads.index(name), piece], color="black",
                      linewidth=0.8, solid_joinstyle="round")
            axes.text(x_mm[piece[0]] + 0.8, top - NAME_MM, name, fontsize=9, weight="bold")
            if piece[0] > 0:  # where the strip changes to another lead
                axes.plot([x_mm[piece[0]]] * 2, [zero - 3, zero + 3], color="black", linewidth=0.8)
        top -= up + down


def ecg_figure(cohort: Cohort, ecgs: list[tuple], head: list[str]):
    """ECGs (heading, signal (12, T) mV) below the lines `head`, 1 mm of paper = 1 mm."""
    signals = np.stack([signal for _, signal in ecgs]).astype(np.float64)       # (ECGs, 12, T)
    y_mm = MM_PER_MV * (signals - np.median(signals, axis=2, keepdims=True))
    limits = []  # whole 5 mm, the same for all ECGs, no trace of any is cut; the pulse wants 10 mm
    for names in PRINTED:
        y = y_mm[:, [cohort.leads.index(name) for name in names]]
        limits.append((5 * max(3, int(np.ceil((y.max() + NAME_MM) / 5))),
                       5 * max(1, int(np.ceil((0.5 - y.min()) / 5)))))
    lines = [line for text in head for line in textwrap.wrap(text, 130)]
    each, top = 8 + float(np.sum(limits)), MARGIN_MM + 5 * len(lines) + 2
    height = top + len(ecgs) * each + 10
    figure = plotter().figure(figsize=(PAGE_MM / MM_PER_INCH, height / MM_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, PAGE_MM), ylim=(0, height))
    axes.axis("off")
    for i, line in enumerate(lines):
        axes.text(MARGIN_MM, height - MARGIN_MM - 5 * i, line, fontsize=10, va="top")
    y = height - top
    for (heading, _), traces in zip(ecgs, y_mm, strict=True):
        axes.text(MARGIN_MM, y - 2.5, heading, fontsize=10, va="top")
        draw_ecg(axes, traces, cohort, limits, y - 8)
        y -= each
    axes.text(MARGIN_MM, y - 3, f"25 mm/s  10 mm/mV  (shown at {cohort.fs:g} Hz, each lead about "
              "its median)", fontsize=9, va="top")
    return figure


def publish_ecgs(out: str, parts: list[str], cohort: Cohort, ecgs: list[tuple], head: list[str],
                 lines: list[str] | tuple = ()) -> None:
    """A page of ECGs: a title and lines, `head`, and the headings; more `lines` in the Markdown."""
    # a class may hold what has no place in a file's name (LAO/LAE)
    name = "-".join(re.sub(r"\W", "", part) for part in parts)
    told = [f"- {line}" for line in (*head[1:], *(heading for heading, _ in ecgs))]
    publish(out, name, [f"## {head[0]}", "", f"![]({name}.png)", "", *told, "", *lines],
            {f"{name}.png": png(ecg_figure(cohort, ecgs, head), MM_DPI)})


def run_transitions(args: argparse.Namespace) -> None:
    """`--mode transitions`: the ECG pair of A's Figures 2 and 3, transitions-*.png and .md."""
    cohort = Cohort(args.data or "data/cohort.h5")
    asked = {"onset": args.onset, "resolve": args.resolve, "stable": args.stable}
    index, found, gap = find_transition(cohort, **asked)
    (source, target), action = cohort.pair[index], cohort.action[index]
    head = " · ".join(f"{word}: {codes_of(cohort, mask)}" for word, mask in (
        ("began", action > 0), ("ended", action < 0),
        ("stayed", (cohort.label[source] > 0) & (action == 0))))
    between = "time between them unknown" if np.isnan(gap) else f"{gap:,.2f} days apart"
    head = [head, f"{caption(cohort)}; subject_id {cohort.subject_id[source]}, {between}",
            f"{found:,} of {len(cohort.pair):,} pairs meet what is asked"]
    ecgs = [(f"{word}, {record_words(cohort, row)}", cohort.signal[row])
            for word, row in (("source", source), ("target", target))]
    parts = [text for word, names in asked.items() if names for text in (word, *names)]
    publish_ecgs(args.out, ["transitions", *parts], cohort, ecgs, head)


# ----------------------------------------------------------------------------------------------
# The cohort: records per patient, how far label sets change (A, Figures 5, 6)
# ----------------------------------------------------------------------------------------------


def jaccard(y: np.ndarray, y_next: np.ndarray) -> np.ndarray:
    """|y and y_next| / |y or y_next| of label sets (P, K): (P,) in [0, 1]; of two empty ones 1."""
    y, y_next = np.asarray(y) > 0, np.asarray(y_next) > 0
    union = (y | y_next).sum(axis=1)
    return np.where(union == 0, 1.0, (y & y_next).sum(axis=1) / np.maximum(union, 1))


def cohort_figure(cohort: Cohort):
    """Records per patient, linear and log, Jaccard and |a|_1: the panels of A's Figures 5 and 6."""
    figure, axes = plotter().subplots(2, 2, figsize=(11, 8), layout="constrained")
    (linear, loglog), (sets, changes) = axes
    records = np.unique(cohort.subject_id, return_counts=True)[1]
    size, patients = np.unique(records, return_counts=True)
    linear.bar(size, patients, width=0.9)
    linear.set_xlim(0, 1 + min(records.max(), max(40, np.percentile(records, 99))))  # tail: right
    linear.set(title="records per patient", xlabel="records", ylabel="patients")
    loglog.loglog(size, patients, "o", markersize=4)
    loglog.set(title=f"the same, log axes: mean {records.mean():.2f}, median "
               f"{np.median(records):g}, max {records.max()}", xlabel="records", ylabel="patients")
    similarity = jaccard(*(cohort.label[rows] for rows in cohort.pair.T))
    change = np.abs(cohort.action).sum(axis=1, dtype=np.int64)
    if len(change):
        sets.hist(similarity, bins=np.linspace(0, 1, 21), log=True)
        sets.set(title=f"Jaccard of consecutive label sets: {(similarity == 1).mean():.1%} at "
                 "exactly 1", xlabel="Jaccard (two empty sets: 1)", ylabel="pairs (log axis)")
        size, pairs = np.unique(np.minimum(change[change > 0], 11), return_counts=True)
        changes.bar_label(changes.bar(size, pairs), [f"{n:,}" for n in pairs], fontsize=8)
        changes.set_xticks(range(1, 12), [*map(str, range(1, 11)), "> 10"])
        changes.margins(y=0.1)
    changes.set(title=f"labels that change, of {(change > 0).sum():,} changed pairs in "
                f"{len(change):,}", xlabel="$|a|_1$", ylabel="pairs")
    figure.suptitle(caption(cohort), fontsize=11)
    return figure


def run_cohort(args: argparse.Namespace) -> None:
    """`--mode cohort`: A's Figures 5 and 6 and Appendix A: cohort.png, cohort.md, cohort.csv."""
    cohort, classes = Cohort(args.data or "data/cohort.h5"), []
    for k, name in enumerate(cohort.class_name):
        has, action = cohort.label[:, k] > 0, cohort.action[:, k]
        classes.append([name, int(has.sum()), len(np.unique(cohort.subject_id[has])), has.mean(),
                        int((action == 1).sum()), int((action == -1).sum())])
    classes.sort(key=lambda line: (-line[1], line[0]))
    head = ["class", "records", "patients", "prevalence", "onsets", "resolutions"]
    counts = count(cohort)
    numbers = [[name.replace("|a|1", "\\|a\\|_1"), *more] for name, *more in count_rows(counts)]
    shown = [[line[0], *(f"{v:.2%}" if isinstance(v, float) else f"{v:,}" for v in line[1:])]
             for line in classes]
    publish(args.out, "cohort", [
        f"## {caption(cohort)}", "", *markdown(["what", "number", "share"], numbers),
        *markdown(head, shown), *(f"- {line}" for line in golden_lines(cohort, counts))],
        {"cohort.png": png(cohort_figure(cohort)), "cohort.csv": [head, *classes]})


# ----------------------------------------------------------------------------------------------
# Embeddings, real and synthetic, by exact t-SNE (B, Figure 2; van der Maaten & Hinton 2008)
# ----------------------------------------------------------------------------------------------
POINT_COLOUR = {"real normal": "#56B4E9", "real abnormal": "#D55E00", "synthetic": "#222222"}
POINTS = 7000  # B, Figure 2


def affinities(x, perplexity: float, block: int = 256):
    """Symmetric p_ij (n, n) of t-SNE: Gaussian neighbourhoods of the asked perplexity.

    p_j|i = exp(-beta_i |x_i - x_j|^2) / sum_k of the same, p_i|i = 0, beta_i by bisection so that
    exp(entropy of row i) = perplexity; p_ij = (p_j|i + p_i|j) / 2n, which sum to 1.
    Args: x (n, D) float tensor; perplexity in [1, n - 1); block: rows at a time.
    """
    import torch
    parts = []
    for own in torch.arange(len(x), device=x.device).split(block):
        d2 = torch.cdist(x[own], x).square()                                    # (rows, n)
        log_beta = -(d2.mean(dim=1, keepdim=True) + 1e-12).log()
        d2[torch.arange(len(own)), own] = torch.inf
        step = 16.0
        for _ in range(40):
            p = torch.softmax(-log_beta.exp() * d2, dim=1)
            entropy = -torch.xlogy(p, p).sum(dim=1, keepdim=True)
            log_beta += torch.where(entropy > np.log(perplexity), step, -step)
            step /= 2
        parts.append(p)
    p = torch.cat(parts)
    return (p + p.T) / (2 * len(x))


def tsne_gradient(p, y, block: int = 64):
    """Gradient (n, 2) of KL(P || Q) at y (n, 2); of an exaggerated P where p (n, n) sums to more.

    4 sum_j (p_ij - q_ij) w_ij (y_i - y_j), w_ij = 1 / (1 + |y_i - y_j|^2), q_ij = w_ij / sum w.
    Written as row sums times y_i minus products with y, so that no (n, n, 2) is formed; in blocks
    of rows that stay in a CPU's cache.
    """
    import torch
    square = y.square().sum(dim=1, keepdim=True)                                # (n, 1)
    y_one, forces, total = torch.cat([y, torch.ones_like(square)], dim=1), [], -len(y)
    for part, own, size in zip(p.split(block), y.split(block), square.split(block)):
        w = torch.addmm(1 + square.T, own, y.T, alpha=-2).add_(size).reciprocal_()
        total = total + w.sum().double()                  # less n: w = 1 on the diagonal
        forces.append(((part * w) @ y_one, w.square_() @ y_one))  # sum_j p_ij w_ij (y_j, 1)
    attract, repel = (torch.cat(of) for of in zip(*forces))                     # (n, 3) each
    force = attract - repel / total.to(y.dtype)
    return 4 * (y * force[:, 2:] - force[:, :2])


def tsne(x, perplexity: float = 30, iterations: int = 500, seed: int = SEED, progress=None):
    """Exact t-SNE of x (n, D) -> (n, 2) float32, on the device of x; memory 12 n^2 bytes.

    Gradient descent with gains from the first two principal components (standard deviation 1e-4,
    and a seeded 1e-6 that parts equal rows): exaggeration 12 and momentum 0.5 for 100 iterations,
    then 1 and 0.8; learning rate n / 12, at least 50. Assumed: all of this; B names t-SNE alone.
    perplexity: in [1, n - 1).
    """
    import torch
    x, n = x.detach().float(), len(x)
    p = 12 * affinities(x, perplexity)
    centred = x - x.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)  # (D, 2)
    axes *= axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # else an arbitrary sign
    y = centred @ axes
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(y)
    y = 1e-4 * y / y[:, 0].std().clamp_min(1e-12) + 1e-6 * noise
    step, gain = torch.zeros_like(y), torch.ones_like(y)
    for i in range(iterations):
        if i == 100:
            p /= 12
        gradient = tsne_gradient(p, y)
        same = gradient.sign() == step.sign()  # step points downhill: same sign is an overshoot
        gain = torch.where(same, gain * 0.8, gain + 0.2).clamp_min_(0.01)
        step = (0.5 if i < 100 else 0.8) * step - max(n / 12, 50) * gain * gradient
        y = y + step - (y + step).mean(dim=0)
        if progress is not None:
            progress.update()
    return y


def embedding_points(model, cohort: Cohort, normalize: str, form: str) -> dict:
    """What B's Figure 2 shows: normal, abnormal and synthetic records, POINTS // 3 of each at most.

    Returns: z (N, D) tensor, kind (N,) place in POINT_COLOUR, rows of the real records, y (S, K)
        label sets of the synthetic ones, number of sets to synthesise, min_count (B: 50, halved
        until one is found).
    """
    import torch
    import cardiowm
    rng, train, rows = np.random.default_rng(SEED), cohort.split == 0, []
    means_normal = np.isin(cohort.class_name, cohort.normal_codes)              # (K,)
    is_normal = ~cohort.label[:, ~means_normal].any(axis=1)
    for name, mask in (("normal", train & is_normal), ("abnormal", train & ~is_normal)):
        if not mask.any():
            raise InputError(f"--data {cohort.path}: no {name} training record (normal: no label "
                             f"but {' '.join(cohort.normal_codes) or 'none'}); a cohort with both "
                             "is wanted")
        rows.append(np.sort(rng.permutation(np.flatnonzero(mask))[:POINTS // 3]))
    labels = torch.from_numpy(cohort.label[train])
    for min_count in (50, 25, 12, 6, 3, 1):
        combinations, counts = cardiowm.label_combinations(
            labels, min_count=min_count, normal=torch.from_numpy(means_normal))
        if len(combinations):
            break
    else:
        raise InputError(f"--data {cohort.path}: no training record has 1 to 4 classes, so there "
                         "is no combination to synthesise")
    real, n = np.concatenate(rows), len(rows[0])
    progress = Progress(len(real), "records", "embed")
    z = embed(model, cohort.signal, real, normalize, progress)[1]
    progress.close()
    augmentor, told = cardiowm.Augmentor, [cohort.label[rows[0]]]
    if form == "sets":
        augmentor, told = cardiowm.SetAugmentor, [*told, cohort.has_label[rows[0]]]
    synthetic = augmentor(model, combinations, counts, total=POINTS // 3).batches(
        z[:n], 4096, torch.Generator().manual_seed(SEED), *map(torch.from_numpy, told))
    z_new, y_new = (torch.cat(parts) for parts in zip(*synthetic, strict=True))
    return {"z": torch.cat([z, z_new]), "rows": real, "min_count": min_count,
            "kind": np.repeat([0, 1, 2], [n, len(real) - n, len(z_new)]),
            "y": y_new.cpu().numpy().astype(np.uint8), "sets": len(counts)}


def world_models(args: argparse.Namespace) -> tuple[dict, list[dict], Cohort]:
    """The pretrainings of --runs: rows of `by_method`, the runs, and their one cohort.

    Each run gains model, in eval mode on the device, its model_args, normalize, form of its action
    (see `predict`), told (the action it was trained on) and no_action: why its answers to an action
    mean nothing, or "".
    """
    runs = [load_run(folder, args.split) for folder in find_runs(args.runs, "pretrain")[0]]
    for run in runs:
        run["model"], checkpoint = load_world_model(run["path"])
        run["method"] = run["method"].partition(", ")[2]
        run |= {key: checkpoint[key] for key in ("model_args", "normalize")}
        run["form"] = checkpoint.get("action_form", "difference")  # as older ones are
        run["told"] = checkpoint.get("args", {}).get("action") or "coded"
        run["no_action"] = "the model has no action (--objective invariance)" \
            if run["model"].action_encoder is None else \
            "trained on zero actions alone (--action none)" if run["told"] == "none" else ""
    return by_method(runs)[0], runs, cohort_of(runs, args.data)


def need_actions(runs: list[dict]) -> None:
    """InputError where none of these runs has learnt what an action does."""
    if all(run["no_action"] for run in runs):
        raise InputError(f"--runs: {runs[0]['name']}: {runs[0]['no_action']}; a pretraining with "
                         "--objective dynamics and --action coded, sets or state is wanted")


def one_model(args: argparse.Namespace) -> tuple[dict, Cohort]:
    """The one pretraining of --runs, with actions, and its cohort; else InputError."""
    _, runs, cohort = world_models(args)
    if len(runs) > 1:
        raise InputError(f"--runs: {len(runs)} given; one pretraining is wanted")
    need_actions(runs)
    return runs[0], cohort


def run_embedding(args: argparse.Namespace) -> None:
    """`--mode embedding`: B's Figure 2 for one pretraining: embedding.png and embedding.md."""
    run, cohort = one_model(args)
    points = embedding_points(run["model"], cohort, run["normalize"], run["form"])
    kind, rows, n = points["kind"], points["rows"], len(points["kind"])
    perplexity = min(30, (n - 1) / 3)
    progress = Progress(500, "iterations", f"t-SNE of {n:,} points")
    y_plot = tsne(points["z"], perplexity, progress=progress).cpu().numpy()
    progress.close()
    head = (f"{caption(cohort, rows, 'training folds', [SEED])}, and {n - len(rows):,} "
            f"synthetic embeddings; z of {run['name']}")
    figure, axes = plotter().subplots(figsize=(9, 9), layout="constrained")
    colours, order = np.array([*POINT_COLOUR.values()]), np.random.default_rng(SEED).permutation(n)
    axes.scatter(*y_plot[order].T, s=6, c=colours[kind[order]], linewidths=0, alpha=0.7)
    for i, name in enumerate(POINT_COLOUR):
        axes.scatter([], [], s=30, c=colours[i], label=f"{name} ({(kind == i).sum():,})")
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", "datalim")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(textwrap.fill(f"{head}; t-SNE, perplexity {perplexity:.3g}", 100), fontsize=10)
    normal = rows[kind[:len(rows)] == 0]
    publish(args.out, "embedding", [
        f"## {head}", "", "![](embedding.png)", "",
        f"- normal: no label but {' '.join(cohort.normal_codes) or 'none'}; of the {len(normal):,} "
        f"shown {(~cohort.has_label[normal]).sum():,} have no code at all, and may be ill.",
        f"- synthetic: r(z, y -> y_C) of the normal records shown; {points['sets']} "
        f"label sets C of 1 to 4 classes seen at least {points['min_count']} times in training "
        "(B: 50), rows in proportion to 1/count."], {"embedding.png": png(figure)})


# ----------------------------------------------------------------------------------------------
# Beyond the papers
# ----------------------------------------------------------------------------------------------
# Verdicts: do the papers' ordering claims hold here, over patients and over training seeds?

# text, where from, task, the method said to be better, the other, fraction, margin of a ">="
CLAIMS = (
    *((f"dynamics >= naive, {how}", "A, Table 1", task, f"{how}, dynamics", f"{how}, invariance",
       1.0, 0.01) for how in ("linear probe", "finetuned") for task in BOTH),
    ("finetuned > supervised", "A, Table 1", "triage", FINETUNED, SUPERVISED, 1.0, 0),
    ("finetuned > supervised", "A, Figure 4", "triage", FINETUNED, SUPERVISED, 0.1, 0),
    *(("SIGReg > VICReg", "A, Table 3", task, FINETUNED, VICREG, 1.0, 0) for task in BOTH),
    *(("probe > finetuned", "A, Table 2", task, PROBE, FINETUNED, 0.01, 0) for task in BOTH),
    ("augmented > real rows only", "B, Table 1", "monitoring", AUGMENTED, MLP, 1.0, 0),
    ("finetuned > supervised", "B, Table 1", "monitoring", FINETUNED, SUPERVISED, 1.0, 0),
    # asked by us: is it the world model, or only more steps?
    ("augmented > oversampled, equal steps", "control", "monitoring", AUGMENTED, OVERSAMPLED, 1.0,
     0),
    *(("finetuned > supervised, equal compute", "control", "monitoring", FINETUNED, EQUAL, frac, 0)
      for frac in (1.0, 0.1)),
    # and: does the recipe under which the action counts (SWITCHES) score better?
    *((f"{how.partition(',')[0]}, recommended > papers", "ours", "monitoring", how + OURS, how,
       frac, 0) for how in (PROBE, FINETUNED) for frac in (1.0, 0.1)),
    ("finetuned, recommended > supervised, equal compute", "ours", "monitoring", FINETUNED + OURS,
     EQUAL, 0.1, 0),
    ("recommended, augmented > real rows only", "ours", "monitoring", AUGMENTED + OURS, MLP + OURS,
     1.0, 0),
    ("augmented, recommended > papers", "ours", "monitoring", AUGMENTED + OURS, AUGMENTED, 1.0, 0))
LEAST_SEEDS = 3


def student_p(t: float, df: float) -> float:
    """P(|T| > |t|) of Student's t with df > 1 degrees of freedom.

    With t = sqrt(df) tan(angle) the density becomes cos(angle)^(df - 1), integrated by
    Gauss-Legendre over the part that holds all of the tail's mass.
    """
    start = math.atan(abs(t) / math.sqrt(df))
    stop = min(math.pi / 2, start + 40 / math.sqrt(df))
    node, weight = np.polynomial.legendre.leggauss(200)
    angle = start + (stop - start) * (node + 1) / 2
    tail = (weight * np.cos(angle) ** (df - 1)).sum() * (stop - start) / 2
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    return min(1.0, 2 * float(tail) / whole)


def seed_test(difference: np.ndarray, replicates: np.ndarray, patients: int,
              margin: float = 0.0) -> tuple[float, float, float]:
    """Is the mean difference of two methods, over patients and training seeds, not -margin?

    T = mean_s(d_s + margin) / sqrt(V_p + s^2 / S), df = (V_p + s^2/S)^2 / (V_p^2 / (P - 1)
    + (s^2/S)^2 / (S - 1)): Satterthwaite 1946, for the sum of two estimated variances.
    Args: difference (S,) of each seed; replicates (n_boot,) of their mean, patients resampled, one
        draw for all runs: V_p is its variance; patients P. s^2: variance of d_s, ddof 1.
    Returns: T, df, two-sided p; NaN without spread or with fewer than two seeds or patients.
    """
    seeds, replicates = len(difference), replicates[~np.isnan(replicates)]
    if seeds < 2 or patients < 2 or len(replicates) < 2:
        return np.nan, np.nan, np.nan
    parts = np.array([replicates.var(ddof=1), difference.var(ddof=1) / seeds])
    if not parts.sum() > 0:
        return np.nan, np.nan, np.nan
    t = (difference.mean() + margin) / math.sqrt(parts.sum())
    df = parts.sum() ** 2 / (parts**2 / (patients - 1, seeds - 1)).sum()
    return float(t), float(df), student_p(t, df)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values (M,) adjusted by Holm 1979, NaN left out: below .05 is rejected at level .05."""
    adjusted, tested = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    stepped = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(stepped))
    return adjusted


def claim_entries(rows: dict, tasks: dict, reasons: dict[tuple, str]) -> list[dict]:
    """Each claim on these records and seeds: its verdict by Holm's p, or why it is undecided."""
    entries = []
    for text, source, task, better, worse, frac, margin in CLAIMS:
        keys = [(better, frac), (worse, frac)]
        if task not in tasks or not any(key in rows or key in reasons for key in keys):
            continue
        chosen, missing = tasks[task], [name for name, _ in keys if (name, frac) not in rows]
        a, b = (rows.get(key, {"seeds": ()}) for key in keys)
        each = {seed: macro(a, task, chosen, [seed]) - macro(b, task, chosen, [seed])
                for seed in a["seeds"] if seed in b["seeds"]}
        mean = np.mean(list(each.values()), axis=0) if each else np.array([np.nan])
        t, df, p = seed_test(np.array([d[0] for d in each.values()]), mean[1:],
                             chosen["patients"], margin)
        starts = [{run["init"]["sha256"] for seed in each for run in row["seeds"][seed]
                   if run.get("init")} for row in (a, b)]
        verdict = next((words for met, words in (
            (missing, f"not run: {', '.join(missing[:1])}"),
            (any(len(found) not in (0, len(each)) for found in starts),
             "undecided: seeds of one pretraining, each wants its own"),
            (chosen["unit"] != "patient",  # resampled records would make V_p too small
             "undecided: asked of patients alone, --unit patient"),
            (len(each) < LEAST_SEEDS, f"undecided: {len(each)} seed{'s' * (len(each) != 1)}, at "
                                      f"least {LEAST_SEEDS} are wanted"),
            (np.isnan(p), "undecided: no spread to judge by")) if met), "")
        t, df, p = (np.nan,) * 3 if verdict else (t, df, p)
        entries.append(entry(
            "claims", f"{text} ({source}), {task}" + f", {100 * frac:g} %" * (frac != 1),
            "difference", mean, verdict=verdict, margin=margin, t=t, df=df, p=p,
            seeds=" ".join(f"{seed}: {d[0]:+.3f}" for seed, d in each.items())))
    for e, p in zip(entries, holm(np.array([e["p"] for e in entries]))):
        clear = "holds" if e["t"] > 0 else "does not hold"
        e |= {"p_holm": p, "verdict": e["verdict"] or (clear if p < 0.05 else "undecided")}
    return entries


# Controls of every table: what a score is worth against knowing no ECG at all


def carry_forward(cohort: Cohort, rows: np.ndarray) -> np.ndarray:
    """Score (n, K) of cohort rows (n,): the label of the patient's previous record, else 0."""
    previous = rows - 1  # a cohort is sorted by patient, then time; row 0 looks at row -1, refused
    known = (previous >= 0) & (cohort.subject_id[previous] == cohort.subject_id[rows])
    return np.where(known[:, None], cohort.label[previous], 0).astype(np.float32)


def age_and_sex(cohort: Cohort, rows: np.ndarray) -> np.ndarray:
    """Probability (n, K) by logistic regression of all training records on age, age^2, sex."""
    import torch
    train, missing = cohort.split == 0, np.isnan(cohort.age)
    mean = cohort.age[train & ~missing].mean(dtype=np.float64) if (train & ~missing).any() else 0.0
    age = np.where(missing, 0, cohort.age - mean) / 20  # years: of order 1
    x = np.column_stack([age, age**2, cohort.sex == 1, cohort.sex < 0, missing]).astype(np.float64)
    # records of one age and sex are one row of the fit, which so does not grow with their number
    distinct, group, size = np.unique(x[train], axis=0, return_inverse=True, return_counts=True)
    share = np.zeros((len(size), cohort.label.shape[1]))
    np.add.at(share, group.reshape(-1), cohort.label[train])
    weight, bias = fit_logistic(torch.from_numpy(distinct), share / size[:, None], 1.0, size)
    return torch.sigmoid(torch.from_numpy(x[rows]) @ weight + bias).float().numpy()


def controls(run: dict, cohort: Cohort) -> list[dict]:
    """Two rows for the table, shaped as runs, of the test records of `run` in its cohort."""
    rows = cohort_rows(run, cohort)
    return [run | {"method": f"control: {text}", "frac": None, "seed": None, "args": {},
                   "init": None, "minutes": "", "y_score": function(cohort, rows)}
            for text, function in (
                ("label of the previous record", carry_forward),
                ("logistic regression on all training patients, no ECG", age_and_sex))]


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


# Differences of all rows, classes, sub-groups of the test records

def with_rare(tasks: dict) -> list[tuple]:
    """(task, column, chosen): each task over its classes, and over the rare ones among them."""
    result = [(task, task, chosen) for task, chosen in tasks.items()]
    for task, chosen in tasks.items():  # B is about them
        rare = chosen["eligible"] & (chosen["positives"] < RARE * chosen["scored"])
        if rare.any() and (rare != chosen["eligible"]).any():
            result.append((task, f"{task}, classes below {RARE:.0%}", chosen | {"eligible": rare}))
    return result


def subgroups(cohort: Cohort, rows: np.ndarray) -> dict[str, np.ndarray]:
    """{name: mask (n,)} of cohort rows: sex, age band, labelled, and the pair that ends here."""
    age, sex = cohort.age[rows], cohort.sex[rows]
    kind = np.full(len(cohort.study_id), -1)
    kind[cohort.pair[:, 1]] = cohort.pair_kind
    kind = kind[rows]
    return {"female": sex == 0, "male": sex == 1, "age < 50": age < 50,
            "age 50-64": (age >= 50) & (age < 65), "age 65-79": (age >= 65) & (age < 80),
            "age >= 80": age >= 80, "labelled": cohort.has_label[rows],
            "first record of the patient": kind < 0, "after a record of the same stay": kind == 0,
            "after a labelled record of another or no stay": kind == 1,
            "pair touches unlabelled": kind == 2}


def subgroup_entries(rows: list[dict], cohort: Cohort, args: argparse.Namespace) -> list[dict]:
    """Macro-AUROC of the main rows in each sub-group of all test records."""
    run, entries = rows[0]["runs"][0], []
    for name, mask in subgroups(cohort, cohort_rows(run, cohort)).items():
        if not mask.any():
            continue
        chosen = select_task(run, "monitoring", args, mask)
        for row in rows:
            for one in row["runs"]:
                one["classes"][name] = class_replicates(one, chosen)
            entries.append(row_entry("sub-groups of all test records", row, name, chosen,
                                     column=row_name(row)) | {"row": name})
    return entries


def fractions_figure(rows: dict, tasks: dict, title: str):
    """A, Figure 4: macro-AUROC against the fraction of the training patients; None if all is 1."""
    methods = [m for m in MAIN_METHODS if sum(m == row["method"] for row in rows.values()) > 1]
    wanted = [task for task in BOTH if task in tasks]
    if not methods or not wanted:
        return None
    figure, axes = plotter().subplots(1, len(wanted), figsize=(4.6 * len(wanted), 4.2),
                                      sharey=True, squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], wanted, strict=True):
        for i, name in enumerate(methods):
            found = {frac: macro(rows[name, frac], task, tasks[task])
                     for frac in sorted(frac for method, frac in rows if method == name)}
            x = np.array(list(found)) * 1.06 ** (i - (len(methods) - 1) / 2)
            low, high = zip(*(interval(m[1:]) for m in found.values()))
            axis.plot(x, [m[0] for m in found.values()], "o-", color=f"C{i}", label=name)
            axis.vlines(x, low, high, color=f"C{i}")
            for _, frac, of, printed in PAPER_TABLES[:-1]:  # paper A's
                for value, *_ in printed.get(name, ())[of.index(task):of.index(task) + 1]:
                    axis.plot(frac, value, "D", color=f"C{i}", markerfacecolor="none")
        axis.plot([], [], "kD", markerfacecolor="none", label="paper A (MIMIC-IV-ECG)")
        axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="fraction of the training patients", title=task)
        axis.set_xticks([0.01, 0.1, 1.0], ["1 %", "10 %", "100 %"])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("macro-AUROC [95 %]")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, 100), fontsize=8)
    return png(figure)


# The mode, in the order in which it runs


def run_score(args: argparse.Namespace) -> None:
    """`--mode score`: tables and figures of runs judged on the same records, score.md and .csv."""
    folders, reasons = find_runs(args.runs)
    runs = [load_run(folder, args.split) for folder in folders]
    for run in runs:  # they share a table only when the truth they are judged by is the same
        if run["sha256"] != runs[0]["sha256"] or not all(
                np.array_equal(run[key], runs[0][key]) for key in TRUTH):
            found = " and ".join(f"{one['path']} ({one['cohort']}, {len(one['y_true']):,} records)"
                                 for one in (runs[0], run))
            raise InputError(f"--runs: {found} are not judged on the same records; give the runs "
                             "of one cohort in each call")
    cohort, left_out = None, ""
    try:
        cohort = cohort_of(runs, args.data)
    except InputError as error:
        if args.data:
            raise
        left_out = str(error)
    runs += controls(runs[0], cohort) if cohort is not None else []
    asked = {task: select_task(runs[0], task, args)
             for task in (TASKS if args.task == "all" else (args.task,))}
    tasks = {task: chosen for task, chosen in asked.items() if chosen["scored"]}
    undefined = [f"{task}: not defined, " + ("no record is labelled" if chosen["records"] else
                                             UNDEFINED[task])
                 for task, chosen in asked.items() if task not in tasks]
    if not tasks:
        raise InputError(f"--task {args.task}: {'; '.join(undefined)}; choose another")
    progress = Progress(len(tasks) * len(runs), "cells", "score")
    for run in runs:
        run["classes"] = {}
        for task, chosen in tasks.items():
            run["classes"][task] = class_replicates(run, chosen)
            progress.update()
    progress.close()
    rows, ambiguous = by_method(runs)
    reasons |= ambiguous
    main = tasks.get("monitoring") or next(iter(tasks.values()))
    seeds = sorted({run["seed"] for run in runs if run["seed"] is not None})
    kind = "SYNTHETIC" if runs[0]["synthetic"] else "real"
    title = f"{runs[0]['cohort']}: {kind} records, {args.split} split, {main['scored']:,} " \
        f"records of {main['patients']:,} patients, seed {' '.join(map(str, seeds))}"
    entries, lines, figures = score_tables(rows, tasks, title, cohort, args, reasons)
    claims = claim_entries(rows, tasks, reasons)
    tested = sum(not np.isnan(e["p"]) for e in claims)
    lines += pivot(claims, "claim", f"Claims, Holm over the {tested} tested; >=: margin 0.01",
                   ("seeds", "t", "df", "p_holm", "verdict"))
    for e in (*entries, *claims):
        e |= {"cohort": runs[0]["cohort"], "synthetic": runs[0]["synthetic"]}
    if left_out:
        undefined.append(f"left out, carry-forward, age and sex and the sub-groups: {left_out}")
    publish(args.out, "score", score_head(title, runs[0], tasks, undefined, args) + lines,
            {"score.csv": csv_lines(entries + claims)} | figures)


def score_head(title: str, run: dict, tasks: dict, left_out: list[str],
               args: argparse.Namespace) -> list[str]:
    """What the tables of a test set rest on: records and classes of each task, what is left out."""
    names = run["class_name"].tolist()
    lines = [f"## {title}", "", f"Macro-AUROC [95 % percentile interval of {args.n_boot:,} "
             f"bootstraps over {args.unit}s, seed {SEED}] of the classes with at least "
             f"{LEAST_PATIENTS} patients with and without them"
             + "; labelled records only" * args.labelled_only + ". Rows are means over their "
             "seeds, minutes those of the run and its pretraining.", ""]
    counted = ("records", "labelled", "scored", "patients")
    lines += markdown(["task", *counted, "classes"], [
        [task, *(f"{chosen[key]:,}" for key in counted),
         f"{chosen['eligible'].sum()} of {len(names)}"] for task, chosen in tasks.items()])
    for task, chosen in tasks.items():
        out = [name for name, kept in zip(names, chosen["eligible"], strict=True) if not kept]
        lines.append(f"- {task}: left out of the macro mean: {', '.join(out) or 'none'}.")
    return [*lines, *(f"- {reason}." for reason in left_out), ""]


def score_tables(rows: dict, tasks: dict, title: str, cohort: Cohort | None,
                 args: argparse.Namespace, reasons: dict) -> tuple[list[dict], list[str], dict]:
    """Entries, Markdown and figures of all rows."""
    run = next(iter(rows.values()))["runs"][0]
    main = [rows[name, 1.0] for name in MAIN_METHODS if (name, 1.0) in rows]
    if len(main) < 2:
        main = [row for row in rows.values() if row["frac"]][:4]  # all would be too wide
    shown = [row_name(row) for row in main]
    entries = paper_entries(rows, tasks, reasons)
    lines = [line for title in dict.fromkeys(e["table"] for e in entries) for line in pivot(
        [e for e in entries if e["table"] == title], "method", title, ("seeds", "minutes"))]
    methods = [row_entry("all methods", row, task, chosen, column) for row in rows.values()
               for task, column, chosen in with_rare(tasks)]
    # any two rows, paired on the same draws; seeds are averaged, not tested
    differences = [row_entry("differences", rows[a], task, chosen, column, paired(
        rows[a], rows[b], task, chosen), against=row_name(rows[b]))
        for b, a in itertools.combinations(rows, 2) for task, column, chosen in with_rare(tasks)]
    first = row_name(next(iter(rows.values())))
    task = "monitoring" if "monitoring" in tasks else next(iter(tasks))
    chosen, groups = tasks[task], []
    of_class = {row_name(row): row_replicates(row, task) for row in rows.values()}
    columns = shown[:2]
    if len(columns) == 2:
        columns = [*columns, " less ".join(columns[::-1])]
        of_class[columns[2]] = of_class[columns[1]] - of_class[columns[0]]
    classes = [entry(f"classes, {task}", run["class_name"][k], column, replicates[:, k],
                     "no positive or no negative", positives=int(chosen["positives"][k]),
                     in_macro=bool(chosen["eligible"][k]))
               for k in np.argsort(-chosen["positives"], kind="stable")  # most frequent first
               for column, replicates in of_class.items()]
    if cohort is not None and "monitoring" in tasks and not args.labelled_only:
        groups = subgroup_entries(main, cohort, args)
    lines += pivot(methods, "method", "All methods", ("seeds", "minutes"))
    lines += pivot([e for e in differences if e["against"] == first], f"less {first}",
                   "Paired differences")
    lines += pivot([e for e in classes if e["column"] in columns], "class", f"Classes, {task}",
                   ("positives",))
    lines += pivot(groups, "sub-group", "Sub-groups of all test records",
                   ("records", "patients", "classes"))
    forest = [e | {"row": f"{e['row']} ({e['positives']:,})"} for e in classes
              if e["in_macro"] and e["column"] in shown]
    figures = {"figure4.png": fractions_figure(rows, tasks, title)}
    figures["forest.png"] = forest and intervals_figure(
        forest, 0.5, f"{title}, {task}: AUROC by class (positives)")
    return [*entries, *methods, *differences, *classes, *groups], lines, {
        name: content for name, content in figures.items() if content}


# ----------------------------------------------------------------------------------------------
# Does the action matter? AG: what an action explains of the change of z beyond all else known
# ----------------------------------------------------------------------------------------------
PENALTIES = 10.0 ** np.arange(6)
FOLDS = 5            # of patients, that choose a penalty
PERMUTATIONS = 199   # of actions among pairs, for p


class Ridge:
    """Least squares with an L2 penalty: columns centred, not scaled; the intercept is free."""

    def __init__(self, x: np.ndarray, y: np.ndarray, penalty: float, gram=None):
        """x (N, D), y (N, E) float64; gram: the centred x.T @ x, where it is known already."""
        self.penalty, self.mean, self.level = penalty, x.mean(axis=0), y.mean(axis=0)
        centred = x - self.mean
        gram = centred.T @ centred if gram is None else gram
        self.weight = np.linalg.solve(gram + penalty * np.eye(len(gram)),
                                      centred.T @ (y - self.level))            # (D, E)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, E)."""
        return self.level + (x - self.mean) @ self.weight


def ridge(x: np.ndarray, y: np.ndarray, patient: np.ndarray) -> Ridge:
    """Ridge of y (N, E) on x (N, D); the penalty of the lowest squared error on held-out patients.

    5-fold cross-validation over patients (N,); the largest penalty where there is but one patient.
    """
    ids, index = np.unique(patient, return_inverse=True)
    fold = (np.random.default_rng(SEED).permutation(len(ids)) % FOLDS)[index.reshape(-1)]
    error = np.zeros(len(PENALTIES))
    for f in range(min(FOLDS, len(ids)) if len(ids) > 1 else 0):
        train, test = fold != f, fold == f
        centred = x[train] - x[train].mean(axis=0)
        gram = centred.T @ centred
        for i, penalty in enumerate(PENALTIES):
            fitted = Ridge(x[train], y[train], penalty, gram)
            error[i] += ((y[test] - fitted.predict(x[test]))**2).sum()
    best = error.argmin() if len(ids) > 1 else -1
    return Ridge(x, y, PENALTIES[best])


def known_without_action(cohort: Cohort, pairs: np.ndarray) -> np.ndarray:
    """(P, 5): what u holds beside z: 1[a != 0] of the coded action, pair kind, log(1 + days)."""
    gap = np.log1p(np.nan_to_num(np.maximum(cohort.gap_days[pairs], 0)))  # unknown: 0
    kind = cohort.pair_kind[pairs][:, None] == np.arange(3)
    return np.column_stack([cohort.action[pairs].any(axis=1), kind, gap]).astype(np.float64)


def action_gain(train: dict, test: dict,
                permutations: int = PERMUTATIONS) -> tuple[np.ndarray, ...]:
    """The errors of which AG = 1 - sum |r - f1(a~)|^2 / sum |r|^2, and AG of permuted actions.

    u = (z, known): f0 is the ridge of z_next - z on u, r its residual; a~ = a - (ridge of a on u);
    f1 is the ridge of r on a~. All fits on the training pairs, residuals there in-sample;
    penalties: see `ridge`.
    Args: train, test: dicts of float64 arrays z, z_next (P, D), known (P, E), a (P, K), and of
        patient, stratum (P,); test holds the pairs that are judged.
    Returns: |r - f1(a~)|^2 and |r|^2 of the test pairs (P,); (permutations,) AG with a permuted
        within strata, training and test separately, the penalties kept and everything refitted.
    """
    u, u_test = (np.column_stack([part["z"], part["known"]]) for part in (train, test))
    step, step_test = (part["z_next"] - part["z"] for part in (train, test))
    f0 = ridge(u, step, train["patient"])
    r, r_test = step - f0.predict(u), step_test - f0.predict(u_test)
    of_a = ridge(u, train["a"], train["patient"])
    penalty = ridge(train["a"] - of_a.predict(u), r, train["patient"]).penalty
    u, u_test = u - of_a.mean, u_test - of_a.mean
    on_u = np.linalg.solve(u.T @ u + of_a.penalty * np.eye(u.shape[1]), u.T)    # (E, P): once

    def error(a: np.ndarray, a_test: np.ndarray) -> np.ndarray:
        weight, level = on_u @ a, a.mean(axis=0)                                # (E, K), (K,)
        f1 = Ridge(a - level - u @ weight, r, penalty)
        return ((r_test - f1.predict(a_test - level - u_test @ weight))**2).sum(axis=1)

    without = (r_test**2).sum(axis=1)
    rng, null = np.random.default_rng(SEED), np.empty(permutations)
    for i in range(permutations):
        a, a_test = (part["a"][permuted_within(part["stratum"], rng)] for part in (train, test))
        null[i] = 1 - error(a, a_test).sum() / without.sum()
    return error(train["a"], test["a"]), without, null


def permuted_within(stratum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation (P,) that exchanges positions of the same stratum (P,) only."""
    by_stratum = np.argsort(stratum, kind="stable")
    order = np.empty(len(stratum), np.int64)
    order[by_stratum] = by_stratum[np.lexsort((rng.random(len(stratum)), stratum[by_stratum]))]
    return order


# ----------------------------------------------------------------------------------------------
# World-model scorecard: is the dynamics right, and is it the action that makes it so?
# ----------------------------------------------------------------------------------------------
FIT_LIMIT = 50_000   # training records that a read-out is fitted on
READOUT_L2 = 10.0    # of 1, 10 .. 10,000 that of the lowest validation BCE on the demo
MIN_POSITIVES = 10   # training positives that a class needs for a read-out
SHUFFLES = 50        # dealings of the actions whose mean prediction is the shuffled one
# An infarction does not go back to what was before, so no reversal is asked: ICD-10, PTB-XL
IRREVERSIBLE = ("I21", "IMI", "ASMI", "AMI", "ALMI", "ILMI", "LMI", "IPMI", "IPLMI", "PMI")
GAPS = {"gap < 1 day": (0, 1), "gap 1-30 days": (1, 30), "gap 30-365 days": (30, 365),
        "gap > 1 year": (365, np.inf)}  # days, the lower bound included
HEADLINE = "changed, labelled"  # the label set changes, and both records carry a code
GAINS = {  # name: (A, B, C): (sum of B's errors - sum of A's) / sum of C's
    "skill of the model against persistence": ("model", "persistence", "persistence"),
    "skill of ridge on z alone against persistence": (
        "ridge on z alone", "persistence", "persistence"),
    "skill of the model less that of ridge on z": ("model", "ridge on z alone", "persistence"),
    "gain of the model over a zero action": ("model", "zero action", "zero action"),
    "gain of the model over shuffled actions": ("model", "shuffled actions", "shuffled actions")}
AG = {"coded": "AG of the coded action", "state": "AG of the true state change"}
OWN_ONSET = "own onset moves the logit further than others, {}"
SAME_PATIENT = "same patient nearest in h (cosine)"
# Groups of the page begin so; all are in the CSV
SHOWN = "changed", "state changed", "test", "records", "all classes", "with "
TABLES = MATTER, ERRORS, RETRIEVAL, REVERSAL, ONSET, LATENT, DIFFERENCE = (
    "1 Does the action matter?", "2 One-step error", "3 Retrieval of the true next state",
    "4 Reversal", "5 Onset read-out", "6 Latent space and re-identification",
    "7 Less the first model")


def pair_groups(cohort: Cohort, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Group name -> mask (P,) over these pairs; what a cohort cannot tell is not a group."""
    changed, kind = cohort.action[pairs].any(axis=1), cohort.pair_kind[pairs]
    labelled = kind != 2
    groups = {HEADLINE: changed & labelled, "unchanged, labelled": ~changed & labelled,
              "all, labelled": labelled}
    if cohort.state is not None:
        groups["state changed, labelled"] = cohort.action_of(pairs, "state").any(axis=1) & labelled
    if (cohort.stay >= 0).any():
        groups |= {"within stay": kind == 0, "between stays": kind == 1}
    groups |= {"touches unlabelled": kind == 2, "all": np.ones(len(pairs), bool)}
    if cohort.source != "ptbxl":  # part of its dates are interpolated
        gap = cohort.gap_days[pairs]  # NaN, a time is missing: in none
        groups |= {name: (gap >= low) & (gap < high) for name, (low, high) in GAPS.items()}
    return groups


def shuffled_actions(a: np.ndarray, y: np.ndarray, times: int = SHUFFLES) -> np.ndarray:
    """Actions (P, K) dealt anew `times` among the pairs that have one: (times, P, K).

    Each changed pair gets the action of another, drawn among those that its source label set
    y (P, K) allows (no code begins that is there, none ends that is not) and that differ from its
    own; where there is none it gets no action. Pairs without an action keep their zeros.
    """
    rng = np.random.default_rng(SEED)
    result = np.zeros((times, *a.shape), a.dtype)
    changed = np.flatnonzero(a.any(axis=1))
    for p in changed:
        after = y[p].astype(np.int8) + a[changed]  # (changed, K)
        fits = changed[((after == 0) | (after == 1)).all(axis=1) & (a[changed] != a[p]).any(axis=1)]
        if len(fits):
            result[:, p] = a[rng.choice(fits, times)]
    return result


def pair_error(z_pred, z_next) -> np.ndarray:
    """Mean over D of (z_pred - z_next)^2, tensors (P, D) -> (P,) float64."""
    return (z_pred - z_next).double().square().mean(dim=1).cpu().numpy()


def class_vectors(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(K, D): mean z (N, D) of records with a class in y (N, K) less that of those without."""
    y = y.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0: no record of the one kind
        return y.T @ z / y.sum(axis=0)[:, None] - (1 - y).T @ z / (1 - y).sum(axis=0)[:, None]


class Embedded:
    """One frozen world model and a cohort in its z: what the scorecard's parts ask.

    z of the test pairs' source and target (P, D), and their change as `predict` takes it.
    """

    def __init__(self, run: dict, cohort: Cohort, used: dict, progress: Progress):
        self.run, self.cohort, self.used, self.no_action = run, cohort, used, run["no_action"]
        self.h, self.z = embed(run["model"], cohort.signal, used["rows"], run["normalize"],
                               progress)
        self.label = cohort.state if run["told"] == "state" else cohort.label  # what a is about
        source, target = cohort.pair[used["test pairs"]].T
        self.source, self.target = self.z[self.at(source)], self.z[self.at(target)]
        self.y = self.label[source]  # with --action none the model was told of no change
        self.y_next = self.y if run["told"] == "none" else self.label[target]
        self.known = cohort.has_label[source], cohort.has_label[target]

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Positions in self.z of cohort rows."""
        return np.searchsorted(self.used["rows"], rows)


def by_group(table: str, name: str, boot: Bootstrap, groups: dict, above, below=1.0) -> dict:
    """{(table, name, group): sum(above) / sum(below), (P,), over its pairs}, of groups with any."""
    mask = np.stack(list(groups.values()), axis=1)                              # (P, G)
    values = boot.ratio(np.where(mask, above[:, None], np.nan),
                        np.broadcast_to(below, len(mask))[:, None])
    return {(table, name, group): values[:, g] for g, group in enumerate(groups)
            if mask[:, g].any()}


def matter_results(e: Embedded, boot: Bootstrap, group: np.ndarray, permutations: int) -> dict:
    """AG of the coded action and of the true state change on the pairs of `group` (P,)."""
    cohort, result, parts = e.cohort, {}, {}
    pairs = {"train": e.used["train pairs"], "test": e.used["test pairs"][group]}
    if not group.any() or len(pairs["train"]) < 2:
        return {}
    for part, p in pairs.items():
        z, z_next = (e.z[e.at(rows)].double().cpu().numpy() for rows in cohort.pair[p].T)
        known = known_without_action(cohort, p)
        parts[part] = {"z": z, "z_next": z_next, "known": known,
                       "patient": cohort.subject_id[cohort.pair[p, 0]],
                       "stratum": 2 * cohort.pair_kind[p].astype(int) + known[:, 0].astype(int)}
    for which, name in AG.items() if cohort.state is not None else [*AG.items()][:1]:
        for part, p in pairs.items():
            parts[part]["a"] = cohort.action_of(p, which).astype(np.float64)
        errors = np.full((2, len(group)), np.nan)  # outside the group: no part of any sum
        errors[0, group], errors[1, group], null = action_gain(
            parts["train"], parts["test"], permutations)
        gain = result[MATTER, name, HEADLINE] = 1 - boot.ratio(*errors)
        result[MATTER, f"p of {name}, {len(null)} permutations", HEADLINE] = \
            permutation_p, np.append(gain[0], null)
    if cohort.state is not None:
        result[MATTER, "share of AG, coded of true state", HEADLINE] = share_of_second, np.stack(
            [result[MATTER, name, HEADLINE] for name in AG.values()])
    return result


def error_results(e: Embedded, boot: Bootstrap, groups: dict[str, np.ndarray]) -> dict:
    """Part 2, and the gains: every predictor of the next state on every group of test pairs."""
    import torch
    cohort, train, result = e.cohort, e.used["train pairs"], {}
    z, z_next = (e.z[e.at(rows)].double().cpu().numpy() for rows in cohort.pair[train].T)
    source = e.source.double().cpu().numpy()
    alone = ridge(z, z_next - z, cohort.subject_id[cohort.pair[train, 0]]).predict(source)
    predicted = {"model": predict(e.run, e.source, e.y, e.y_next, *e.known)}
    if not e.no_action:
        predicted["zero action"] = predict(e.run, e.source, e.y, e.y, *e.known)
        dealt = shuffled_actions(e.y_next.astype(np.int8) - e.y, e.y)  # the source's half is kept
        predicted["shuffled actions"] = sum(
            predict(e.run, e.source, e.y, e.y + a, *e.known) for a in dealt) / len(dealt)
    predicted |= {"ridge on z alone": torch.from_numpy(source + alone).to(e.z),
                  "persistence": e.source,
                  "mean": torch.from_numpy(z_next.mean(axis=0)).to(e.z).expand_as(e.source)}
    errors = {name: pair_error(p, e.target) for name, p in predicted.items()}
    for name, error in errors.items():
        result |= by_group(ERRORS, name, boot, groups, error)
    for name, (better, base, below) in GAINS.items():
        if base in errors:
            result |= by_group(MATTER, name, boot, groups, errors[base] - errors[better],
                               errors[below])
    return result


def retrieval_results(e: Embedded, boot: Bootstrap, group: np.ndarray) -> dict:
    """Part 3: is the true next state nearer to r(z, a) than to r(z, 0), among other states?"""
    import torch
    if e.no_action or not group.any():
        return {}
    z, rows, result = e.z[e.at(e.used["test"])], e.used["test"], {}
    y, y_next, *known = (of[group] for of in (e.y, e.y_next, *e.known))
    source, target = (torch.from_numpy(np.searchsorted(rows, of)).to(z.device)
                      for of in e.cohort.pair[e.used["test pairs"][group]].T)
    patient = torch.from_numpy(np.unique(e.cohort.subject_id[rows], return_inverse=True)[1])
    patient, every = patient.to(z.device), torch.arange(len(z), device=z.device)
    for among in ("other patients", "the same patient's"):

        def allowed(part: slice):
            same = patient[source[part], None] == patient
            return ~same if among == "other patients" else \
                same & (every != source[part, None]) & (every != target[part, None])
        (model, candidates), (zero, _) = (distance_ranks(
            predict(e.run, e.source[group], y, then, *known), z,
            lambda part: every == target[part, None], allowed) for then in (y_next, y))
        gain = np.full(len(group), np.nan)  # NaN also where there is nothing to be told apart
        gain[group] = np.where(candidates > 1, 1 / model - 1 / zero, np.nan)
        result |= by_group(RETRIEVAL, f"reciprocal rank, model - zero action, among {among}", boot,
                           {HEADLINE: np.isfinite(gain)}, gain)
    return result


def reversal_results(e: Embedded, boot: Bootstrap, group: np.ndarray) -> dict:
    """Part 4: from z_next, does the undone action lead nearer to z than no action does?"""
    if e.no_action:
        return {}
    fixed = [c for c, name in enumerate(e.cohort.class_name) if name in IRREVERSIBLE]
    without = " ".join([", without", *(e.cohort.class_name[c] for c in fixed)]) * bool(fixed)
    use = {HEADLINE: group & (e.y == e.y_next)[:, fixed].all(axis=1)}
    back, none = (pair_error(predict(e.run, e.target, e.y_next, then, *e.known[::-1]), e.source)
                  for then in (e.y, e.y_next))
    return by_group(REVERSAL, f"gain of r(z_next, -a) over r(z_next, 0) towards z{without}", boot,
                    use, none - back, none)


def onset_results(e: Embedded, boot: Bootstrap) -> dict:
    """Part 5: how a linear read-out of z moves when a class begins: by the model, by its vector.

    The logit of class c moves by w_c (r(z, e_c) - r(z, 0)), or by w_c v_c, v_c its class vector:
    on test records without the class, how often further up than by other classes' onsets?
    """
    import torch
    names, train, test = np.array(e.cohort.class_name), e.used["train"], e.used["test"]
    y, y_test, silent = e.label[train], e.label[test], without_signature(e.cohort)
    positives = y.sum(axis=0, dtype=np.int64)
    classes = np.flatnonzero((positives >= MIN_POSITIVES) & (positives < len(y)))
    if not len(classes):
        return {}
    result, shown = {}, ~np.isin(names[classes], silent)                        # (C,)
    for space, of in (("h", e.h), ("z", e.z)):  # a z that forgot the ECG could have a large AG
        weight, bias = fit_logistic(of[e.at(train)], y[:, classes], READOUT_L2)  # (D, C), (C,)
        scores = (of[e.at(test)] @ weight + bias).cpu().numpy()
        for what, truth, use in (("codes", e.cohort.label, shown | True),
                                 ("true state, codes with signature", e.cohort.state, shown)):
            if truth is not None and use.any():
                value = boot.auroc(truth[test][:, classes[use]], scores[:, use])
                result[MATTER, f"macro-AUROC of a read-out of {space}, {what}", "test records"] = \
                    mean_defined(value)
    z, z_test = e.z[e.at(train)], e.z[e.at(test)]
    vectors = torch.from_numpy(class_vectors(z.double().cpu().numpy(), y)[classes]).to(z)
    rises = {"class vector": (vectors @ weight).T.expand(len(test), -1, -1).cpu().numpy()}
    if not e.no_action:  # (N, C read out, C begun)
        known = e.cohort.has_label[test], np.ones(len(test), bool)  # what begins is coded
        zero = predict(e.run, z_test, y_test, y_test, *known) @ weight
        rises["model"] = np.empty((len(test), len(classes), len(classes)), np.float32)
        for j, c in enumerate(classes):
            begun = y_test.copy()
            begun[:, c] = 1
            onset = predict(e.run, z_test, y_test, begun, *known) @ weight
            rises["model"][:, :, j] = (onset - zero).cpu().numpy()
    lacks = y_test[:, classes] == 0                                              # (N, C)
    counted = lacks[:, None, :] & ~np.eye(len(classes), dtype=bool)              # (N, C, C begun)
    for by, rise in rises.items():
        others = np.where(counted, rise, 0).sum(axis=2) / np.maximum(counted.sum(axis=2), 1)
        further = np.einsum("ncc->nc", rise) - others
        share = np.where(lacks, (further > 0) + 0.5 * (further == 0), np.nan)
        result |= onset_means(OWN_ONSET.format(by), boot.ratio(share), names[classes], silent)
    return result


def onset_means(name: str, values: np.ndarray, codes: np.ndarray, silent: list[str]) -> dict:
    """Values (1 + R, C) by code, their mean, and by how much codes with a signature are above."""
    result = {(ONSET, name, "all classes"): mean_defined(values)}
    result |= {(ONSET, name, code): of for code, of in zip(codes.tolist(), values.T)}
    rng, control, means = np.random.default_rng(SEED), np.isin(codes, silent), []
    for columns in map(np.flatnonzero, (~control, control)):
        if not len(columns):
            return result
        # the control codes are few, so the contrast resamples codes as well as patients
        pick = rng.choice(columns, (len(values), len(columns)))
        pick[0] = columns  # the sample itself
        means.append(mean_defined(np.take_along_axis(values, pick, axis=1)))
    result[ONSET, name, "with - without signature (classes resampled)"] = means[0] - means[1]
    return result


def latent_results(h, z, subject: np.ndarray, boot: Bootstrap) -> dict:
    """Part 6, of test records: collapse and shape of z, and whether h tells whose record it is."""
    import torch
    import cardiowm
    std, generator = z.std(dim=0), torch.Generator().manual_seed(SEED)
    # SIGReg's expectation under N(0, I) holds for any N, but elsewhere it grows with N
    some = z[torch.randperm(len(z), generator=generator)[:512].to(z.device)].float().cpu()
    values = {"effective rank of z": cardiowm.effective_rank(z), "std of z, min": std.min(),
              "std of z, median": std.median(),
              "SIGReg of z, 1.052 under N(0, I)": cardiowm.SIGReg()(some, generator=generator)}
    result = {(LATENT, name, "test records"): float(value) for name, value in values.items()}
    unit = torch.nn.functional.normalize(h.double(), dim=1)  # nearest in distance: in cosine
    patient = torch.from_numpy(np.unique(subject, return_inverse=True)[1]).to(h.device)
    every = torch.arange(len(h), device=h.device)
    rank, _ = distance_ranks(
        unit, unit, lambda rows: (patient[rows, None] == patient) & (every != every[rows, None]),
        lambda rows: patient[rows, None] != patient)
    several = np.bincount(patient.cpu().numpy())[patient.cpu().numpy()] - 1      # (N,)
    group = "records with another of the patient"
    if not several.any():
        return result
    found = np.where(several > 0, (rank <= 1) * 1.0, np.nan)
    result[LATENT, SAME_PATIENT, group] = boot.ratio(found)
    result[LATENT, "chance of that", group] = float((several / (len(h) - 1))[several > 0].mean())
    return result


def untrained_model(run: dict, cohort: Cohort, draw: int):
    """An untrained model like that of a run, in eval mode."""
    import torch
    import cardiowm
    train = np.flatnonzero(cohort.split == 0)
    rows = np.random.default_rng([SEED, draw]).permutation(train)[:2560]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        model = cardiowm.WorldModel(**run["model_args"]).to(pick_device()).train()
    # as every trained model it knows the training records; the initial statistics are a handicap
    recalibrate([model], lambda part: embed(model, cohort.signal, part, run["normalize"]),
                [part for part in np.array_split(rows, 10) if len(part) > 1])
    return model.eval().requires_grad_(False)


# The mode: embed each model, call the parts, mean over seeds, write


def permutation_p(values: np.ndarray) -> float:
    """p of a statistic that stands before those of permuted data, (1 + permutations,)."""
    return (1 + (values[1:] >= values[0] - 1e-12).sum()) / len(values)


def share_of_second(values: np.ndarray) -> np.ndarray:
    """The first of two, (2, 1 + n_boot), by the second; NaN where that is not clearly above 0."""
    return values[0] / values[1] if interval(values[1, 1:])[0] > 0 else np.array([np.nan])


def study_entries(results: dict[str, dict], cell, compared, patients: int) -> list[dict]:
    """Means over seeds, every seed's own values, and each method less the first of the call.

    Args: results: {label: {seed: {key: replicates}}}; (function, values) in their place tell the
        function of the values' mean over seeds; cell: (key, label, value) -> entry; compared:
        whether a key's values do not depend on a model's own z.
    Returns: entries of the tables NAME, "NAME, by seed", DIFFERENCE (means over the seeds that both
        have, on the same draws, with t, df, p of `seed_test`), and "DIFFERENCE, by seed".
    """
    def told(key: tuple, label: str, values: dict, **more) -> list[dict]:
        cells = [cell(key, label, of) | more for of in (
            np.mean(list(values.values()), axis=0), *values.values())]
        for seed, e in zip(values, cells[1:], strict=True):
            e |= {"table": f"{e['table']}, by seed", "seed": seed}
        return cells

    entries, first = [], next(iter(results))
    for label, seeds in results.items():
        for key, value in next(iter(seeds.values())).items():
            values = {seed: one[key] for seed, one in seeds.items()}
            if isinstance(value, tuple):
                mean = np.mean([of for _, of in values.values()], axis=0)
                entries.append(cell(key, label, value[0](mean)))
                continue
            entries += told(key, label, values)
            less = {seed: of - results[first][seed][key] for seed, of in values.items()
                    if key in results[first].get(seed, ())}
            if label != first and compared(key) and less:
                each = np.array(list(less.values()))                            # (S, 1 + n_boot)
                cells = told(key, label, less, table=DIFFERENCE, against=first, seeds=len(less))
                cells[0] |= zip(("t", "df", "p"), seed_test(
                    each[:, 0], each.mean(axis=0)[1:], patients))
                entries += cells
    return entries


def scorecard_entries(results: dict[str, dict], counts: dict[str, tuple]) -> list[dict]:
    """worldmodel.csv, of {label: {seed: results}}; counts: {group: (how many, patients)}."""
    def cell(key: tuple, label: str, value) -> dict:
        table, name, group = key
        n, patients = counts.get(group, ("", ""))
        return entry(table, f"{name} ({group})", label, value, "a share of what is not above 0",
                     quantity=name, group=group, n=n, patients=patients, seeds=len(results[label]))

    return study_entries(results, cell, lambda key: key[1] == SAME_PATIENT or (
        key[0] == MATTER and key[2] in (HEADLINE, "test records")),
        counts.get(HEADLINE, (0, 0))[1])


def run_worldmodel(args: argparse.Namespace) -> None:
    """`--mode worldmodel`: worldmodel.md, .csv and .png under --out."""
    rows, runs, cohort = world_models(args)
    used, pair_split = {}, cohort.split[cohort.pair[:, 0]]
    for part, fold in (("train", 0), ("test", SPLITS.index(args.split))):  # "test": what is judged
        used[part] = np.flatnonzero(cohort.split == fold)
        used[f"{part} pairs"] = np.flatnonzero(pair_split == fold)
    if not (len(used["train pairs"]) and len(used["test pairs"])):
        raise InputError(f"{cohort.path}: found {len(used['train pairs'])} training and "
                         f"{len(used['test pairs'])} {args.split} pairs; a cohort with both is "
                         "wanted")
    used["train"] = np.sort(np.random.default_rng(SEED).permutation(used["train"])[:FIT_LIMIT])
    used["rows"] = np.unique(np.concatenate([used["test"], used["train"],
                                             cohort.pair[used["train pairs"]].ravel()]))
    subject = cohort.subject_id[used["test"]]
    patient = cohort.subject_id[cohort.pair[used["test pairs"], 0]]
    pairs, records = Bootstrap(patient, args.n_boot), Bootstrap(subject, args.n_boot)
    groups = pair_groups(cohort, used["test pairs"])
    headline = groups[HEADLINE]
    labels = {row_name(row, count=True): {run["seed"]: run for run in row["runs"]}
              for row in rows.values()}
    labels["untrained encoder, 3 draws"] = {f"draw {draw}": runs[0] | {  # nothing was learnt
        "model": untrained_model(runs[0], cohort, draw), "no_action": "untrained", "told": "coded"}
        for draw in range(3)}
    progress = Progress((len(runs) + 3) * len(used["rows"]), "records", "embedding")
    results = {}
    for label, seeds in labels.items():
        for seed, run in seeds.items():
            e = Embedded(run, cohort, used, progress)
            results.setdefault(label, {})[seed] = (
                matter_results(e, pairs, headline, args.permutations)
                | error_results(e, pairs, groups) | retrieval_results(e, pairs, headline)
                | reversal_results(e, pairs, headline) | onset_results(e, records)
                | latent_results(e.h[e.at(used["test"])], e.z[e.at(used["test"])], subject,
                                 records))
    progress.close()
    counts = {name: (int(mask.sum()), len(np.unique(patient[mask])))
              for name, mask in groups.items()}
    counts["test records"] = len(subject), len(np.unique(subject))
    entries = scorecard_entries(results, counts)
    title = caption(cohort, used["test"], f"{args.split} split", {run["seed"] for run in runs})
    title += f"; {len(patient):,} pairs of {len(np.unique(patient)):,} patients"
    shown = [e | {"row": e["quantity"]} for e in entries if e["group"] == HEADLINE
             and e["table"] in (MATTER, RETRIEVAL, REVERSAL)
             and not e["quantity"].startswith(("p of", "share of"))]
    lines = [f"## World-model scorecard: {title}", "",
             f"[95 % percentile interval of {args.n_boot:,} bootstraps over patients, seed {SEED}];"
             f" means over seeds. {HEADLINE}: the label set changes and both records carry a code. "
             "Models have a z each: compare gains, not errors.", ""]
    for table in TABLES:  # of groups and classes what fits a page, all are in the CSV
        lines += pivot([e for e in entries if e["table"] == table and e["group"].startswith(SHOWN)],
                       "quantity (group)", table, ("n", "patients"))
    publish(args.out, "worldmodel", lines, {
        "worldmodel.csv": csv_lines(entries), "worldmodel.png": intervals_figure(
            shown, 0, f"World-model scorecard, AG, skill and gain; {HEADLINE}; {title}")})


# ----------------------------------------------------------------------------------------------
# Counterfactuals: one patient under an action; on the demo cohort, against the simulated truth
# ----------------------------------------------------------------------------------------------
CASE_PATIENTS = 200         # at most, some 4,000 cases of 20 codes: a large cohort stays quick
OTHER_RECORDING = 10**9     # added to the seed: the same patient and state, recorded once more
REPRODUCED_MV = 0.02        # of a stored record and its simulation: 5 uV steps, float16, filter
PAGE_RECORDS = 5000         # training records at most behind the read-out and neighbours of a page
CLASS_VECTOR, RIDGE = "mean class vector", "joint ridge of z on all codes"
LEFT_OUT, MODEL = "left-out constant of the code", "model, r(z, a) - r(z, 0)"
STATE = "model, its source told by the true state"
WRONG, CEILING = "model, the record's wrong codes", "another recording of the truth"
BY_CODE = MODEL, STATE, CLASS_VECTOR, RIDGE, CEILING
MEASURES = {"cosine": "cosine to the true change", "length_ratio": "length ratio (median)",
            "right_code": "right code by cosine", "chance": "its chance"}


def choose_records(cohort: Cohort, split: str = "test", seed: int = SEED) -> np.ndarray:
    """Rows of that split: the first record of each patient, of CASE_PATIENTS at most."""
    rows = np.flatnonzero(cohort.split == SPLITS.index(split))
    patients, first = np.unique(cohort.subject_id[rows], return_index=True)
    return np.sort(rows[first[np.random.default_rng(seed).permutation(len(patients))]]
                   [:CASE_PATIENTS])


def simulate_cases(models: list[dict], cohort: Cohort, rows: np.ndarray,
                   columns: list[int]) -> tuple[np.ndarray, ...]:
    """Simulate each record without and with each absent class of `columns`, twice, and embed.

    Returns: (R, K) cases, and those of them whose class changes the signal; (R,) same: the
        simulation is the stored record, or that carries a planted defect; others have no case. Each
        model gains z (R, D), and change and other (R, K, D), the true changes of the record and of
        another recording of it, NaN where there is no case.
    """
    names = cohort.class_name
    cases = (cohort.state[rows] == 0) & np.isin(np.arange(len(names)), columns)
    changed, same = np.zeros_like(cases), np.ones(len(rows), bool)
    for model in models:
        model |= {"z": [], "change": []}
    progress = Progress(len(rows), "records", "simulate and embed")
    for i, row in enumerate(rows):
        state, absent = {names[k] for k in np.flatnonzero(cohort.state[row])}, cases[i].nonzero()[0]
        for seed in (0, OTHER_RECORDING):
            x = np.stack([resimulate(cohort, row, codes, seed) for codes in
                          (state, *(state | {names[k]} for k in absent))])      # (1 + k, 12, T)
            for model in models:
                z = embed(model["model"], x, np.arange(len(x)), model["normalize"])[1].cpu().numpy()
                model["z"].append(z[0])
                model["change"].append(np.full((len(names), z.shape[1]), np.nan))
                model["change"][-1][absent] = z[1:] - z[0]
            if seed == 0:
                changed[i, absent] = (x[1:] != x[0]).any(axis=(1, 2))
                gap = np.abs(x[0].astype(np.float32) - cohort.signal[row]).max()
                same[i] = cohort.quality[row] != 0 or gap <= REPRODUCED_MV
        progress.update()
    progress.close()
    for model in models:  # the two recordings take turns
        z, change = np.stack(model["z"]), np.stack(model["change"])
        model |= {"z": z[::2], "change": change[::2], "other": change[1::2]}
    return cases & same[:, None], changed & same[:, None], same


def left_out_constants(change: np.ndarray, changed: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """(R, K, D): mean true change of the code in other patients' cases, (R, K); NaN without."""
    others = (patient[:, None] != patient).astype(np.float64)                   # (R, R)
    with np.errstate(invalid="ignore"):  # 0 / 0: no other case
        return (np.tensordot(others, np.where(changed[..., None], change, 0), 1)
                / (others @ changed)[..., None])


def model_changes(run: dict, z: np.ndarray, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """r(z, y without c -> y with c) - r(z, y without c), (R, K, D), of each class c alone.

    The difference of two predictions isolates the action: r(z, e_c) - z also holds whatever the
    predictor does without one, e.g. regression to the mean. The next record is coded in both.
    Args: z (R, D); y (R, K), known (R,) of the records.
    """
    import torch
    z, changes = torch.from_numpy(z).float().to(next(run["model"].parameters()).device), []
    for k in range(y.shape[1]):
        without, begun = y.copy(), y.copy()
        without[:, k], begun[:, k] = 0, 1  # a code that is not in the true state may be coded
        zero, onset = (predict(run, z, without, y_next, known, known | True).double()
                       for y_next in (without, begun))
        changes.append((onset - zero).cpu().numpy())
    return np.stack(changes, axis=1)


def judge_change(change: np.ndarray, candidate: np.ndarray,
                 changed: np.ndarray) -> dict[str, np.ndarray]:
    """How well candidate changes of the state fit the true ones, case by case.

    Args: change (R, K, D) true changes of z; changed (R, K) bool, the cases; candidate (R, K, D),
        or (1, K, D) the same for every record; NaN: not defined.
    Returns: (R, K) each, NaN where there is no case or no candidate: cosine to the true change, 0
        for a candidate of length 0; length_ratio; right_code, 1 where among the record's cases it
        is this class's candidate that has the largest cosine to the true change, and its chance, 1
        / number of them (both take two cases); and cosines (R, K true, K candidate).
    """
    case = changed & ~np.isnan(candidate).any(axis=2)                           # (R, K)
    true, full = (np.where(case[..., None], values, 0) for values in (change, candidate))
    length, true_length = np.linalg.norm(full, axis=2), np.linalg.norm(true, axis=2)
    scale = true_length[:, :, None] * length[:, None, :]
    inner = true @ full.transpose(0, 2, 1)                                      # (R, K true, K)
    cosines = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)
    cosines[~(case[:, :, None] & case[:, None, :])] = np.nan
    chosen = np.where(case[:, None], cosines, -np.inf).argmax(axis=2)           # (R, K true)
    options, column = case.sum(axis=1, keepdims=True), np.arange(case.shape[1])
    choice = case & (options > 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"cosine": np.einsum("rkk->rk", cosines), "cosines": cosines,
                "length_ratio": np.where(case, length / true_length, np.nan),
                "right_code": np.where(choice, chosen == column, np.nan),
                "chance": np.where(choice, 1 / options, np.nan)}


def code_permutations(cosines: np.ndarray, permutations: int) -> np.ndarray:
    """(1 + permutations,) mean cosine: of the codes, then with them permuted within each record.

    Args: cosines (R, K true, K candidate), NaN off the cases. One permutation of the codes serves
        all records, each follows it on to the first code that is a case of its own: a model's
        change for one code is alike in all records, so if each were dealt its own permutation, any
        K constant vectors would look significant or worse than chance.
    """
    case, rng = ~np.isnan(np.einsum("rkk->rk", cosines)), np.random.default_rng(SEED)
    (record, code), k = case.nonzero(), case.shape[1]
    result = []
    for order in (np.arange(k), *(rng.permutation(k) for _ in range(permutations))):
        other = order[code]
        while (out := ~case[record, other]).any():
            other[out] = order[other[out]]
        sums = np.bincount(code, cosines[record, code, other], k)
        result.append((sums[case.any(axis=0)] / case.sum(axis=0)[case.any(axis=0)]).mean())
    return np.array(result)


def judge_model(model: dict, cohort: Cohort, rows: np.ndarray, changed: np.ndarray) -> dict:
    """{row of the table: `judge_change`} of a model that `simulate_cases` filled, in its own z."""
    train, z, change = np.flatnonzero(cohort.split == 0), model["z"], model["change"]
    progress = Progress(len(train), "training records", f"embed by {model['name']}")
    z_train = embed(model["model"], cohort.signal, train, model["normalize"], progress)[1]
    progress.close()
    z_train = z_train.double().cpu().numpy()
    # the vectors are told what the model was told: its codes, or the true states
    y = (cohort.state if model["told"] == "state" else cohort.label)[train].astype(np.float64)
    vectors = class_vectors(z_train, y)                                         # (K, D)
    weight = ridge(y, z_train, cohort.subject_id[train]).weight                 # (K, D)
    told = {MODEL: (cohort.label[rows], cohort.has_label[rows])}
    if model["form"] == "sets":
        told[STATE] = cohort.state[rows], np.ones(len(rows), bool)
    candidates = {name: model_changes(model, z, *of) for name, of in told.items()}
    candidates |= {CLASS_VECTOR: vectors[None],
                   RIDGE: np.where(np.isnan(vectors), np.nan, weight)[None],
                   LEFT_OUT: left_out_constants(change, changed, cohort.subject_id[rows]),
                   CEILING: model["other"]}
    judged = {name: judge_change(change, candidate, changed)
              for name, candidate in candidates.items()}
    wrong = judged[MODEL]["cosines"].copy()
    np.einsum("rkk->rk", wrong)[:] = np.nan  # a view of the diagonal: the code itself is left out
    judged[WRONG] = {"cosine": mean_defined(wrong)}
    for name in (MODEL, CLASS_VECTOR, RIDGE):
        length = np.broadcast_to(np.linalg.norm(candidates[name], axis=2), changed.shape)
        judged[name]["length"] = length / np.nanmean(length[changed])
    return judged


def truth_results(judged: dict, names: list[str], cases: np.ndarray, changed: np.ndarray,
                  boot: Bootstrap, permutations: int) -> dict:
    """{(table, row, column): replicates} of one model, `judged` by `judge_model`."""
    result, silent = {}, cases & ~changed.any(axis=0)
    for row, values in judged.items():
        for measure, column in MEASURES.items():
            if measure not in values or np.isnan(values[measure]).all():
                continue
            mean = mean_defined(boot.ratio(values[measure]))
            if measure == "length_ratio":
                of = values[measure][:, ~np.isnan(values[measure]).all(axis=0)]
                mean = np.nanmedian(of, axis=0).mean(keepdims=True)
            result["truth", row, column] = mean[:1] if measure == "chance" else mean
        for table, key, mask in (("cosine by code", "cosine", changed),
                                 ("negative control", "length", silent)):
            if key in values and row in BY_CODE:
                of_code = boot.ratio(np.where(mask, values[key], np.nan))
                result |= {(table, names[k], row): of_code[:, k]
                           for k in np.flatnonzero(mask.any(axis=0))}
        for other in (CLASS_VECTOR, RIDGE, LEFT_OUT, WRONG) if row in (MODEL, STATE) else ():
            less = values["cosine"] - judged[other]["cosine"]
            if not np.isnan(less).all():
                result["difference", row, f"less {other}"] = mean_defined(boot.ratio(less))
        if row in (MODEL, STATE) and changed.sum(axis=1).max() > 1:  # else nothing to permute
            result["difference", row, "p of permuted codes"] = permutation_p, code_permutations(
                values["cosines"], permutations)
    return result


def run_counterfactual(args: argparse.Namespace) -> None:
    """`--mode counterfactual`: onsets against the demo's ground truth."""
    methods, runs, cohort = world_models(args)
    need_actions(runs)
    models = [run for run in runs if not run["no_action"]]
    left_out = [f"{run['name']}: {run['no_action']}" for run in runs if run["no_action"]]
    if cohort.state is None:
        raise InputError(f"cohort {cohort.name}: counterfactuals are known of a demo cohort alone; "
                         "give --study-id for the page of one patient")
    columns = class_columns(cohort, args.onset, "--onset") or [
        k for k, name in enumerate(cohort.class_name) if name in SIGNATURE]
    rows = choose_records(cohort, args.split)
    cases, changed, same = simulate_cases(models, cohort, rows, columns)
    if not changed.any():
        raise InputError(f"cohort {cohort.name}: no {args.split} record that the onset of "
                         f"{' '.join(cohort.class_name[k] for k in columns)} changes; name other "
                         "--onset, or build a larger cohort")
    patients, names = len(np.unique(cohort.subject_id[rows])), cohort.class_name
    boot = Bootstrap(cohort.subject_id[rows], args.n_boot if patients > 1 else 0)
    results = {row_name(method, count=True): {run["seed"]: truth_results(
        judge_model(run, cohort, rows, changed), names, cases, changed, boot, args.permutations)
        for run in method["runs"]} for method in methods.values()
        if not method["runs"][0]["no_action"]}
    counts = np.where(changed.any(axis=0), changed.sum(axis=0), cases.sum(axis=0)).tolist()

    def cell(key: tuple, method: str, value) -> dict:
        table, row, column = key
        more = {"cases": counts[names.index(row)]} if row in names else {}
        if table == "difference":
            row = method + row.removeprefix("model") * (row == STATE)
        return entry(table, row, column, value, "too few records with it", method=method,
                     patients=patients, **more)

    entries = study_entries(results, cell, lambda key: key[:2] == ("difference", MODEL), patients)
    head = caption(cohort, rows[same], f"{args.split} split", {model["seed"] for model in models})
    title = (f"{head}; {cases.sum():,} cases (record, code not in its true state), "
             f"{changed.sum():,} of them with a signal that the code changes")
    if not same.all():
        left_out.append(f"{(~same).sum():,} records that the simulator does not reproduce from "
                        "their state (a code that is no class, or another version)")
    by_code = [e for e in entries if e["table"] == "cosine by code"
               and e["method"] == entries[0]["method"]]
    publish(args.out, "counterfactual", truth_lines(entries, title, left_out, args), {
        "counterfactual.csv": csv_lines(entries), "counterfactual.png": intervals_figure(
            by_code, 0, f"Cosine to the true change of z: {entries[0]['method']}; {title}")})


def truth_lines(entries: list[dict], title: str, left_out: list[str],
                args: argparse.Namespace) -> list[str]:
    """counterfactual.md: the methods against the controls, then the codes of the first method."""
    methods = list(dict.fromkeys(e["method"] for e in entries))

    def table(name: str, corner: str, title: str, method: str = "", beside=()) -> list[str]:
        return pivot([e for e in entries if e["table"] == name and method in ("", e["method"])],
                     corner, title, beside)

    lines = [f"## Counterfactual onsets against their simulation: {title}", "",
             "Means over the cases of a code, then over codes; [95 % interval of "
             f"{args.n_boot:,} bootstraps over patients, seed {SEED}]; p of {args.permutations:,} "
             "permutations of a record's codes. Models have a z each: compare differences, not "
             "cosines.", "", *(f"- left out, {reason}." for reason in left_out), ""]
    lines += table("difference", "method", "Cosine of the model less that of other rows")
    lines += table(DIFFERENCE, "method", "The same, less the first method's, paired")
    for method in methods:
        lines += table("truth", "change of z", method, method)
    lines += table("cosine by code", "code", f"Cosine by code: {methods[0]}", methods[0],
                   ("cases",))
    return lines + table(
        "negative control", "code", "Negative control: length of the change predicted for codes "
        f"without signature, relative to the mean of codes with one: {methods[0]}", methods[0],
        ("cases",))


# One patient: the predicted next state, its nearest real ECG, and what a read-out says


def patient_action(cohort: Cohort, args: argparse.Namespace) -> tuple[int, np.ndarray]:
    """Row of --study-id and the action (K,) asked of it; InputError where it cannot undergo it."""
    rows = np.flatnonzero(cohort.study_id == args.study_id)
    if not len(rows):
        known = ", ".join(map(str, cohort.study_id[np.flatnonzero(cohort.split == 2)[:5]]))
        raise InputError(f"--study-id {args.study_id}: no record of the cohort {cohort.name}; "
                         f"known are, of the test split, {known}, ...")
    action, label = np.zeros(len(cohort.class_name), np.int8), cohort.label[rows[0]]
    for flag, names, sign in (("--onset", args.onset, 1), ("--resolve", args.resolve, -1)):
        for k in class_columns(cohort, names, flag):
            if action[k] or (label[k] > 0) == (sign > 0):
                raise InputError(f"{flag} {cohort.class_name[k]}: the record carries "
                                 f"{codes_of(cohort, label)}; begin what is not there, end what is")
            action[k] = sign
    if not action.any():
        raise InputError("--study-id: an action is wanted; give --onset or --resolve with classes "
                         f"of the cohort: {' '.join(cohort.class_name)}")
    return int(rows[0]), action


def run_one_patient(args: argparse.Namespace) -> None:
    """`--mode counterfactual --study-id`: a page, counterfactual-STUDY-ACTION.png and .md."""
    import torch
    run, cohort = one_model(args)
    row, action = patient_action(cohort, args)
    train = np.random.default_rng(SEED).permutation(np.flatnonzero(cohort.split == 0))
    train = np.sort(train[:PAGE_RECORDS])
    progress = Progress(1 + len(train), "records", "embedding")
    z = embed(run["model"], cohort.signal, np.append(row, train), run["normalize"], progress)[1]
    progress.close()
    y, known, label = cohort.label[[row, row]], cohort.has_label[[row, row]], cohort.label[train]
    predicted = predict(run, z[[0, 0]], y, y + np.stack([0 * action, action]), known, known | True)
    weight, bias = fit_logistic(z[1:], label, READOUT_L2)
    scores = torch.sigmoid(torch.cat([z[:1], predicted]) @ weight + bias).cpu().numpy()
    change = predicted[1] - predicted[0]
    onset, zero, effect = torch.stack([*(predicted.flip(0) - z[0]), change]).norm(dim=1).tolist()

    ecgs, words = [(f"The record, {record_words(cohort, row)}", cohort.signal[row])], []
    if cohort.state is not None:
        state = np.where(action == 0, cohort.state[row], action > 0)
        x = np.stack([resimulate(cohort, row, set(np.array(cohort.class_name)[of > 0].tolist()))
                      for of in (cohort.state[row], state)])
        true = embed(run["model"], x, np.arange(2), run["normalize"])[1].diff(dim=0)[0]
        cosine = torch.cosine_similarity(change, true, dim=0)
        ecgs.append((f"The true counterfactual, simulated: state {codes_of(cohort, state)}", x[1]))
        words.append(f"true change: |z_true - z| {true.norm():.1f}, cosine of r(z, a) - r(z, 0) to "
                     f"it {cosine:.2f}" if (x[0] != x[1]).any() else
                     "the action changes nothing in this ECG")
    like = (cohort.subject_id[train] != cohort.subject_id[row]) \
        & (label[:, action > 0] > 0).all(axis=1) & (label[:, action < 0] == 0).all(axis=1)
    if like.any():
        distance = (z[1:] - predicted[1]).norm(dim=1).cpu().numpy()
        found = np.where(like, distance, np.inf).argmin()
        ecgs.append((f"Nearest to r(z, a) of {like.sum():,} training records of other patients with"
                     f" the resulting label: distance {distance[found]:.1f}, "
                     f"{record_words(cohort, train[found])}", cohort.signal[train[found]]))
    else:
        words.append("no training record used here has the resulting label: none is shown")

    parts = [part for word, names in (("onset", args.onset), ("resolve", args.resolve)) if names
             for part in (word, *names)]
    head = [f"Study {args.study_id}, {' '.join(parts)}: predicted by the model, not observed",
            f"{caption(cohort, train, 'training records used')}; run {run['name']}",
            f"patient {cohort.subject_id[row]}, {SPLITS[cohort.split[row]]} split; |r(z, a) - z| "
            f"{onset:.1f}, |r(z, 0) - z| {zero:.1f}, |r(z, a) - r(z, 0)| {effect:.1f}",
            *words]
    moved = scores[2] - scores[1]
    table = markdown(["class", "score at z", "at r(z, 0)", "at r(z, a)", "change by the action"], [
        [cohort.class_name[k], *(f"{score:.3f}" for score in scores[:, k]), f"{moved[k]:+.3f}"]
        for k in np.argsort(-np.abs(moved))])
    publish_ecgs(args.out, ["counterfactual", str(args.study_id), *parts], cohort, ecgs, head,
                 [*table, f"Scores: logistic regression on frozen z, l2 {READOUT_L2:g}."])


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


MODES = {  # what runs, and the flags with a meaning there; elsewhere they are refused, not ignored
    "score": (run_score, {"runs", "split", "task", "labelled_only", "unit", "n_boot"}),
    "worldmodel": (run_worldmodel, {"runs", "split", "n_boot", "permutations"}),
    "counterfactual": (run_counterfactual, {"runs", "split", "n_boot", "permutations", "onset"}),
    "counterfactual --study-id": (run_one_patient, {"runs", "study_id", "onset", "resolve"}),
    "embedding": (run_embedding, {"runs"}),
    "transitions": (run_transitions, {"onset", "resolve", "stable"}),
    "cohort": (run_cohort, set())}


def parser() -> argparse.ArgumentParser:
    """The command line: flags, grouped, no abbreviations."""
    p = argparse.ArgumentParser(
        prog="evaluate.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mode", default="score", choices=[mode for mode in MODES if " " not in mode],
                   help="(default: %(default)s)")
    group = p.add_argument_group("what is evaluated")
    group.add_argument("--runs", nargs="+", metavar="RUN", help="names under runs/, or folders")
    group.add_argument("--data", metavar="FILE.h5", help="the cohort (default: the runs' own, "
                       "where config.json says it was; without runs data/cohort.h5)")
    group.add_argument("--split", choices=SPLITS[:0:-1], default="test",
                       help="the fold that is judged; val is for choosing (default: %(default)s)")
    group.add_argument("--task", choices=(*TASKS, "all"), default="all",
                       help="triage: first record of a stay; monitoring: all records; pairs: first "
                       "records of pairs (default: %(default)s)")
    group.add_argument("--labelled-only", action="store_true",
                       help="only records with a diagnosis of any chapter; otherwise, as in the "
                       "papers, a record without one counts as having none of the classes")
    group = p.add_argument_group("transitions and counterfactuals")
    group.add_argument("--onset", metavar="CLASS", nargs="+", help="classes that begin")
    group.add_argument("--resolve", metavar="CLASS", nargs="+", help="classes that end")
    group.add_argument("--stable", metavar="CLASS", nargs="+", help="classes in both records")
    group.add_argument("--study-id", metavar="ID", type=int, help="the record to start from")
    group = p.add_argument_group("intervals")
    group.add_argument("--unit", choices=("patient", "record"), default="patient",
                       help="what the intervals of score resample; the papers took records, whose "
                       "intervals are too narrow (default: %(default)s)")
    group.add_argument("--n-boot", type=int, default=1000, help="(default: %(default)s)")
    group.add_argument("--permutations", type=int, default=PERMUTATIONS,
                       help="of the actions, for p (default: %(default)s)")
    group = p.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="of tables and figures (default: runs/MODE)")
    return p


def check_arguments(args: argparse.Namespace, p: argparse.ArgumentParser) -> str:
    """The key in MODES; InputError for a flag out of range or of no use there, and a bad --out."""
    page = args.mode == "counterfactual" and args.study_id is not None
    mode = args.mode + " --study-id" * page
    for name in sorted(set.union(*(flags for _, flags in MODES.values())) - MODES[mode][1]):
        if getattr(args, name) != p.get_default(name):
            modes = " or ".join(m for m, (_, flags) in MODES.items() if name in flags)
            raise InputError(f"--{name.replace('_', '-')}: of no use to --mode {mode}; it belongs "
                             f"to --mode {modes}")
    if "runs" in MODES[mode][1] and not args.runs:
        raise InputError("--runs: none given; name at least one finished run of train.py")
    for name, least in (("n_boot", 2), ("permutations", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least} "
                             "are wanted")
    args.out = args.out or f"runs/{args.mode}"
    parent = next(p for p in (Path(args.out), *Path(args.out).absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {args.out}: {parent} is no folder that can be written to; name "
                         "another")
    return mode


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code of `run_script`."""
    p = parser()
    args = p.parse_args(argv)
    return run_script(lambda: MODES[check_arguments(args, p)][0](args),
                      "interrupted; no file is half-written: run the same command again")


if __name__ == "__main__":
    start_script()
    sys.exit(main())
