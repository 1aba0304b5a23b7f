"""WFDB records and CSV labels -> one cohort file (HDF5): signals, labels, pairs, actions.

Papers: Action-Conditioned Cardiac World Models (A); World Model Augmentation for Imbalanced
Multi-Label ECG Classification (B). Data: MIMIC-IV-ECG 1.0 with MIMIC-IV-ECG-Ext-ICD 1.0.1,
PTB-XL 1.0.3, or the simulated demo cohort.

    python prepare_data.py --source demo
    python prepare_data.py --source ptbxl --root ptb-xl
    python prepare_data.py --source mimic --root mimic-iv-ecg --labels records_w_diag_icd10.csv
    python prepare_data.py --check data/ptbxl.h5

A build that is killed goes on where it stopped when the same command is given again, and ends in
the same bytes.
"""

from __future__ import annotations  # an older Python shall reach `run_script`, which names it

import argparse
import collections
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal as signals  # "signal" is the ECG in this project
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

if __name__ == "__main__":
    if signals.getsignal(signals.SIGINT) != signals.SIG_IGN:
        signals.signal(signals.SIGINT, signals.SIG_DFL)  # quiet, until `run_script` takes over
    # the products here are too small for threads, and idle ones spin; NumPy reads it at its start
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import h5py
import numpy as np

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SECONDS = 10  # every record is cut or padded to this length (both releases are 10 s throughout)
LIMIT_MV = 10.0  # beyond it a sample is no ECG; kept and flagged
LEAST_MV = 1e-3  # a record that moves less in all its leads is no ECG: its gain or unit is wrong
GAP_SECONDS = 0.1  # a run of missing samples up to this long is interpolated, a longer one set to 0
QUALITY = {  # bits of `quality`; judged in mV at the recorded rate, on the samples that are kept
    "NaN gap up to 100 ms, interpolated": 1,
    "NaN gap above 100 ms, set to 0": 2,
    "dead (constant) lead, set to 0": 4,
    "beyond 10 mV, kept": 8,
    "longer than 10 s, cut": 16,
    "shorter than 10 s, zero-padded": 32,
}
INTERPOLATED, ZEROED, DEAD, BEYOND, CUT, PADDED = QUALITY.values()
# Why a record is rejected. A checksum that differs tells of a flipped bit: such a signal is not
# silently learned from.
REASONS = ("signal file missing", "signal file truncated", "checksum differs", "unreadable",
           "lead missing or twice", "unit unknown", "fs not a multiple", "beyond float16",
           "within 1 uV", "header file missing")
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3, "nv": 1e-6}
FLOAT16_MAX = 65504.0
FORMAT_VERSION = 1
CRC_ROWS = 4096  # rows of `signal` under one checksum
SOURCES = ("mimic", "ptbxl", "demo")
SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """What the user did wrong: the message names the thing, what was found and wanted, the fix."""


def printable(text: str) -> str:
    """A file's own words, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


class Rejected(Exception):
    """One record cannot enter the cohort: `reason`, one of REASONS, and what was `found`."""

    def __init__(self, reason: str, found: str):
        self.reason, self.found = reason, printable(found[:200])
        super().__init__(f"{reason}: {self.found}")


class Progress:
    """Count, rate and time left on stderr, a line every 10 s.

    Args: total: what makes 100 %. unit: the word after the count. label: what stands before it.
    """

    def __init__(self, total: int, unit: str, label: str = ""):
        self.total, self.unit, self.label, self.count = total, unit, label, 0
        self.start = self.shown = time.monotonic()

    def update(self, n: int = 1, last: bool = False) -> None:
        """Count n more, and print if it is time to; the last line has the total time."""
        self.count += n
        now = time.monotonic()
        if now - self.shown < 10 and not last:
            return
        self.shown, passed = now, max(now - self.start, 1e-9)
        left = passed if last else (self.total - self.count) * passed / max(self.count, 1)
        line = (f"{self.label} {self.count:,}/{self.total:,} {self.unit} · "
                f"{self.count / passed:,.1f}/s · "
                f"{timedelta(seconds=round(left))} {'in all' if last else 'left'}")  # 0:02:05 left
        print(line.strip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last line."""
        self.update(0, last=True)


# ----------------------------------------------------------------------------------------------
# The machine: errors of the system, files written whole, locks, cores and memory, the outer frame
# ----------------------------------------------------------------------------------------------

SPIN_COUNT = 3_000  # turns that a waiting OpenMP thread spins before it sleeps: some 10 us
REMEDY = {code: text for text, codes in {  # what to do about an error of the system
    "free some space or choose another disk; the same command goes on": (
        errno.ENOSPC, errno.EDQUOT),
    "ask for the permission, or choose another place": (errno.EACCES, errno.EPERM, errno.EROFS),
    "check the name, and that its disk is mounted": (errno.ENOENT,),
    "name a folder": (errno.ENOTDIR, errno.EEXIST), "name a file": (errno.EISDIR,),
    "check the disk or the network mount; the same command goes on": (errno.EIO, errno.ESTALE),
    "raise `ulimit -n`, or close other programs": (errno.EMFILE, errno.ENFILE),
    "close other programs, or ask for more memory": (errno.ENOMEM,),
    "choose a shorter name": (errno.ENAMETOOLONG,)}.items() for code in codes}
SCARCE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}  # every record would fail


def system_error(error: OSError, what: str | Path = "") -> str:
    """`FILE: No space left on device; free some space ...`: an OSError by its errno, and the fix.

    what: the file or flag, where the error itself does not know it.
    """
    what, number_of = what or error.filename or "the system", error.errno
    if number_of is None and (told := re.search(r"errno = (\d+)", str(error))):  # h5py's
        number_of = int(told[1])
    if number_of is None:
        return f"{what}: {error}"
    remedy = REMEDY.get(number_of, "the same command goes on once that is mended")
    return f"{what}: {os.strerror(number_of)}; {remedy}"


def of_system(error: Exception) -> bool:
    """Whether an error at a file is one of the system, and no sign of what the file holds."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def system_errors(what: str | Path = "") -> Iterator[None]:
    """An OSError inside becomes an InputError that names it: `system_error`."""
    try:
        yield
    except OSError as error:
        raise InputError(system_error(error, what)) from error


def replace_file(path: Path, *content: bytes, sync: bool = True, keep: str = "") -> None:
    """Write a file whole or not at all; `sync` also outlives a power cut. InputError if it cannot.

    The one place where a file is put under its final name. keep: what the old one is called then.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with system_errors(path):
            with open(temporary, "wb") as handle:
                handle.writelines(content)
                handle.flush()
                if sync:
                    os.fsync(handle.fileno())
            if keep and path.exists():
                os.replace(path, path.with_name(keep))
            os.replace(temporary, path)
    except BaseException:  # of whatever kind: nothing half-written stays
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone; InputError(refusal) if another does.

    However the process ends, the system lets go. A file system without locks gets a note.
    """
    name = folder / "lock"
    with system_errors(name):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(name, "a")
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another process may have moved the folder aside meanwhile
            if not os.path.exists(name) or not os.path.samefile(name, handle.fileno()):
                raise BlockingIOError
        except BlockingIOError:
            raise InputError(refusal) from None
        except (ImportError, OSError) as error:  # ImportError: Windows has no such lock
            why = os.strerror(error.errno) if isinstance(error, OSError) else "no flock"
            print(f"note: {folder}: this file system has no locks ({why}): take care that no other "
                  "process works in that folder")
            handle.close()
        yield


def available_cores() -> int:
    """CPU cores that this process may use (taskset and SLURM allow some of the machine's)."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def available_memory() -> float:
    """Bytes of RAM that this process may still take, of the machine and of its container (Linux).

    0 where that is not known. A container is a control group; those above it have limits as well.
    """
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        free.append(1024 * int(text.split("MemAvailable:")[1].split()[0]))
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, version, own = line.split(":", 2)  # "" is version 2, "memory" of version 1
            if version not in ("", "memory"):
                continue
            limit, usage = ("limit_in_bytes", "usage_in_bytes") if version else ("max", "current")
            own = Path("/sys/fs/cgroup", version, own.lstrip("/"))
            for group in (own, *own.parents):
                most, used = (group / f"memory.{name}" for name in (limit, usage))
                if most.exists() and (text := most.read_text().strip()) != "max":
                    cache = (group / "memory.stat").read_text().split("inactive_file ")[1]
                    free.append(int(text) - int(used.read_text()) + int(cache.split()[0]))
    return max(0, min(free, default=0))


def start_script() -> None:
    """Under `if __name__ == "__main__"` alone, before torch is imported, which takes longest:
    Ctrl-C ends the process quietly until `run_script` takes over, and on Linux the script starts
    once more with OpenMP threads that sleep soon when they wait.

    Beside a busy process, threads that spin for each other take their own cores away. The user's
    own settings win, and torchrun's. The number of threads stays: results depend on it.
    """
    if signals.getsignal(signals.SIGINT) != signals.SIG_IGN:
        signals.signal(signals.SIGINT, signals.SIG_DFL)
    own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LOCAL_RANK"} & os.environ.keys()
    argv = getattr(sys, "orig_argv", ())  # Python 3.9 has none
    if sys.platform != "linux" or own or sys.gettrace() or sys.argv[0] not in argv:
        return  # the last two: a debugger, a notebook
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *argv[1:]], os.environ | {
            "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPIN_COUNT)})


class Lasting(io.FileIO):
    """An output that outlives its reader (`| head`): what comes after goes nowhere."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError as error:  # a pipe without a reader, or a log file on a full disk
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                print(f"note: {system_error(error, 'output')}; nothing more is printed there",
                      file=sys.stderr)
            return len(content)


class Stopped(BaseException):
    """A signal asked the process to end (SIGTERM: a scheduler, `kill`); the argument is its number.

    Like KeyboardInterrupt no Exception: whatever handles errors lets it through.
    """


def run_script(work: Callable[[], None], interrupted: str) -> int:
    """The frame of every `main`: run `work`; returns the exit code.

    0; 2 after one last line on stderr for an InputError or an error of the system; 130 and 143
    after Ctrl-C and SIGTERM, with the line `interrupted` or a text that the exception carries.
    Anything else is a bug: its traceback.
    """
    before, streams = None, (sys.stdout, sys.stderr)

    def stop(number_of: int, frame) -> None:
        raise Stopped(number_of)

    try:
        if sys.version_info < (3, 11):
            raise InputError(f"Python {sys.version_info[0]}.{sys.version_info[1]} runs this; "
                             "Python 3.11 or later is wanted")
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(  # a terminal may lack a letter
                Lasting(stream.fileno(), "w", closefd=False), stream.encoding, "backslashreplace",
                line_buffering=stream.line_buffering, write_through=stream.write_through)
            if stream and stream in (sys.__stdout__, sys.__stderr__) else stream
            for stream in streams)
        with contextlib.suppress(ValueError):  # not in the main thread
            before = signals.signal(signals.SIGTERM, stop)
            if signals.getsignal(signals.SIGINT) == signals.SIG_DFL:
                signals.signal(signals.SIGINT, signals.default_int_handler)
        with system_errors():
            work()
        return 0
    except (InputError, MemoryError) as error:
        if isinstance(error, MemoryError):
            error = f"memory: {str(error) or 'none left'}; {REMEDY[errno.ENOMEM]}"
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped) as error:
        told = [text for text in error.args if isinstance(text, str)]
        print(*told or [interrupted], file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 143
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = streams
        if before is not None:
            signals.signal(signals.SIGTERM, before)


def lack(found, wanted: dict | tuple, at: str = "") -> str:
    """The first thing that an object read from JSON lacks, with what was found; "" if nothing.

    wanted: {key, or "*" for all there are: its types, or what that object holds in its turn}.
    """
    kinds = (dict,) if isinstance(wanted, dict) else wanted
    if type(found) not in kinds:
        kind = "an object" if kinds == (dict,) else kinds[0].__name__
        return f"{at[:-1] or 'a line'} is {found!r}, {kind} wanted"
    if kinds is wanted:
        return ""
    for key, inner in wanted.items():
        for name in found if key == "*" else [key]:
            if why := lack(found.get(name), inner, f"{at}{name}."):
                return why
    return ""


def read_json(path: Path, wanted: dict, lines: bool = False) -> list[dict]:
    """The object in a JSON file, or one of each line; InputError unless it holds `wanted`.

    Numbers are finite: JSON knows no others.
    """
    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"a number {text}")
        return value

    try:
        with system_errors(path):
            content = path.read_bytes()
        objects = [json.loads(part, parse_float=finite, parse_constant=finite)
                   for part in (content.splitlines() if lines else [content])]
        why = next(filter(None, (lack(found, wanted) for found in objects)),
                   "" if objects else "it is empty")
    except InputError:  # of the system: the file may be sound
        raise
    except (ValueError, RecursionError) as error:
        why = str(error)
    if why:
        raise InputError(f"{path}: damaged, or of another program: {why[:200]}; move it aside and "
                         "make it anew (train.py: --overwrite)")
    return objects


def refuse_irregular(path: Path, wanted: str) -> None:
    """InputError for a pipe or a device: reading it might never end, and it is read twice."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: found a pipe or a device; {wanted}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------
# One WFDB record -> (12, T) millivolts (PhysioNet header(5), signal(5); MIMIC-IV-ECG, PTB-XL)
# ----------------------------------------------------------------------------------------------

MAX_HEADER = 2**20  # bytes; a header of MIMIC has some 700
MAX_SAMPLES = 2**26  # of all signals of a record: 12 leads at 500 Hz for three hours
MAX_FS = 100_000
FORMATS = {  # signal(5): bytes of 6 samples (None: compressed), the code of a missing sample
    8: (6, None), 16: (12, -2**15), 24: (18, -2**23), 32: (24, -2**31), 80: (6, -2**7),
    160: (12, -2**15), 212: (9, -2**11), 310: (8, -2**9), 311: (8, -2**9),
    508: (None, -2**7), 516: (None, -2**15), 524: (None, -2**23)}
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"  # one way to match: no search
RATE_FIELD = re.compile(rf"({NUMBER})(?:[/(].*)?", re.ASCII)
FORMAT_FIELD = re.compile(r"(\d{1,9})(?:x([1-9]\d{0,8}))?(?::(\d{1,9}))?(?:\+(\d{1,15}))?",
                          re.ASCII)
GAIN_FIELD = re.compile(rf"({NUMBER})?(?:\(({NUMBER})?\))?(?:/(.*))?", re.ASCII)
COMMENT = re.compile(r"(?:^|\s)#.*")

# A header's record line, then its signal lines by column; what a line lacks is None
Header = collections.namedtuple("Header", "fs samples file format gain resolution zero initial "
                                          "checksum block name")


def open_regular(folder: str, name: str, missing: str) -> io.FileIO:
    """Open a file in or below the record's folder; Rejected (`missing` if it is not there)."""
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise Rejected("unreadable", f"{name!r} is not in the record's folder")
    path = os.path.join(folder, name)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe might wait for ever
            raise Rejected("unreadable", f"{name} is no regular file")
        return open(path, "rb", buffering=0)
    except OSError as error:
        if error.errno in SCARCE:
            raise
        reason = missing if isinstance(error, FileNotFoundError) else "unreadable"
        raise Rejected(reason, f"{name}: {error.strerror}") from None


def read_header(folder: str, record: str) -> Header:
    """The one reader of headers. Fields that are not needed to read the signal are not looked at.

    Source: PhysioNet header(5). Differs: a line may end in a comment; names hold anything; a record
    in segments is rejected.
    """
    with open_regular(folder, record + ".hea", "header file missing") as handle:
        # no more than there is: room for the most would be taken, and given back, each time
        raw = handle.read(min(os.fstat(handle.fileno()).st_size, MAX_HEADER) + 1)
    if len(raw) > MAX_HEADER:
        raise Rejected("unreadable", f"{record}.hea: more than {MAX_HEADER:,} bytes")
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = COMMENT.sub("", text.replace("\r", "\n")) if "#" in text else text.replace("\r", "\n")
    first, *rows = [row for line in text.split("\n") if (row := line.split(None, 8))] or [[]]
    _, stated, rate, samples = [*first[:4], *("", "", "250", "0")[len(first):]]
    rate_of = RATE_FIELD.fullmatch(rate)
    if rate_of is None or not 0 < float(rate_of[1]) <= MAX_FS:
        raise Rejected("unreadable", f"sampling frequency {rate!r}")
    for what, field in (("number of signals", stated), ("number of samples", samples)):
        if not (field.isascii() and field.isdigit() and len(field) < 16):
            raise Rejected("unreadable", f"{what} {field!r}")
    if int(stated) != len(rows) or not rows:
        raise Rejected("unreadable", f"{stated} signals stated, {len(rows)} described")
    columns = zip(*(row + [None] * (9 - len(row)) for row in rows))
    return Header(float(rate_of[1]), int(samples), *columns)


@functools.lru_cache(maxsize=64)
def parse_signals(formats: tuple, gains: tuple, zeros: tuple, names: tuple
                  ) -> tuple[list[int], list[tuple], np.ndarray | None, np.ndarray]:
    """A header's columns -> order, layout, baseline, scale.

    Returns: positions of LEADS among the signals, whatever the case of the names; of each signal
    (format, samples per frame, skew, offset), format 0 if its text is none; baseline (12, 1) in ADC
    units, None where all are 0; scale (12, 1) mV per ADC unit.
    """
    found, names = names, [(name or "").strip().lower() for name in names]
    if wrong := [lead for lead in LEADS if names.count(lead.lower()) != 1]:
        raise Rejected("lead missing or twice", f"{', '.join(wrong)}; the header names "
                                                f"{', '.join(name or '-' for name in found)}")
    order, layout, baseline, scale = [names.index(lead.lower()) for lead in LEADS], [], [], []
    for text in formats:
        parts = FORMAT_FIELD.fullmatch(text or "")
        kind, frame, skew, offset = map(int, parts.groups("0")) if parts else [0] * 4
        layout.append((kind, frame or 1, skew, offset))
    for i in order:
        parts = GAIN_FIELD.fullmatch(gains[i] or "")
        gain, base, unit = parts.groups("") if parts else ["?"] * 3
        if (unit.lower() or "mv") not in MILLIVOLTS:
            raise Rejected("unit unknown", f"{gains[i]!r}")
        base = base or zeros[i] or "0"
        if not re.fullmatch(NUMBER, base, re.ASCII):
            raise Rejected("unreadable", f"ADC zero {base!r}")
        baseline.append(float(base))
        scale.append(MILLIVOLTS[unit.lower() or "mv"] / (float(gain or 0) or 200.0))
        if not (1e-30 < abs(scale[-1]) < 1e30 and abs(baseline[-1]) < 1e10):
            raise Rejected("unreadable", f"gain {gains[i]!r}, baseline {base}")
    baseline = np.array(baseline)[:, None] if any(baseline) else None
    return order, layout, baseline, np.array(scale, np.float32)[:, None]


def read_samples(folder: str, file: str, kind: int, offset: int, frame: int, samples: int,
                 width: int) -> tuple[int, bytes]:
    """The samples of a signal file: how many of each signal, and their bytes.

    frame: samples that all signals of the file have in one frame; width: those of the whole record.
    samples: as the header states, 0 = as many as are there. A damaged header may ask for any amount
    of memory: nothing is taken for what is not in the file.
    """
    with open_regular(folder, file, "signal file missing") as handle:
        per_six, size = FORMATS[kind][0], os.fstat(handle.fileno()).st_size
        if per_six is None:  # the offset is one of samples; the file's size tells nothing
            needed, offset = min(size, 4 * MAX_SAMPLES), 0
        else:
            samples = samples or max(size - offset, 0) * 6 // per_six // frame
            needed = -(-samples * frame * per_six // 6)
            needed += needed % 2 if kind == 310 else 0  # which ends with a whole word of 16 bits
            if offset + needed > size:
                raise Rejected("signal file truncated",
                               f"{file}: {size:,} of {offset + needed:,} bytes")
        if not 0 < samples * width <= MAX_SAMPLES:
            raise Rejected("unreadable", f"{samples:,} samples a signal")
        handle.seek(offset)
        return samples, handle.read(needed)


def verify(header: Header, signals_read: Iterable[int], sums: Iterable[int]) -> None:
    """Raise Rejected where the sum of a signal's own samples is not the header's, modulo 2^16."""
    for i, found in zip(signals_read, sums):
        stated = header.checksum[i]  # signed in MIMIC's, in others not; or not stated
        if stated not in (None, str(found)) and not (
                stated.lstrip("+-").isdecimal() and len(stated) < 19
                and (int(stated) ^ found) & 0xFFFF == 0):
            raise Rejected("checksum differs", f"{(header.name[i] or '?')}: {stated} "
                                               f"stated, {(found + 2**15) % 2**16 - 2**15} found")


def read_with_wfdb(folder: str, header: Header, order: list[int], layout: list) -> np.ndarray:
    """The leads by wfdb, whatever format, frames, skew and files: (leads, n) float64 ADC units.

    wfdb gets copies of the files and a header that we write: so a header has one meaning. Samples
    of one frame are averaged and cut to a whole number, as wfdb does.
    """
    import wfdb  # here alone: it takes a second to import, and the plain path has no need of it

    signals_read, lines, samples, copies = [], [], header.samples, {}
    width = sum(frame for _, frame, _, _ in layout)
    for k, file in enumerate(dict.fromkeys(header.file[i] for i in sorted(order))):
        own = [i for i, name in enumerate(header.file) if name == file]
        (kind, _, _, offset), frame = layout[own[0]], sum(layout[i][1] for i in own)
        if kind not in FORMATS or any(layout[i][0] != kind for i in own):
            formats = dict.fromkeys(str(header.format[i]) for i in own)
            raise Rejected("unreadable", f"{file}: format {' and '.join(formats)}")
        samples, copy = read_samples(folder, file, kind, offset, frame, samples, width)
        copies[f"{k}.dat"] = copy
        offset = offset if kind > 500 else 0  # the copy begins there
        for i in own:
            initial = int(header.initial[i] or 0) if kind == 8 else 0
            lines.append(f"{k}.dat {kind}x{layout[i][1]}+{offset} 200 16 0 {initial} 0 0 s")
        signals_read += own
    copies["r.hea"] = "\n".join([f"r {len(lines)} 500 {samples}", *lines, ""]).encode()
    # what the folder lacks is no fault of the record's
    with system_errors(f"TMPDIR {os.environ.get('TMPDIR', 'unset')}"), \
            tempfile.TemporaryDirectory() as there:
        for name, copy in copies.items():
            Path(there, name).write_bytes(copy)
        try:
            record = wfdb.rdrecord(f"{there}/r", physical=False, smooth_frames=False,
                                   ignore_skew=True, return_res=32)
        except Exception as error:  # wfdb lets whatever a bad file causes escape
            raise Rejected("unreadable", f"{type(error).__name__}: {error}".replace(
                there + os.sep, "")) from error
    verify(header, signals_read, (int(raw.sum(dtype=np.int64)) for raw in record.e_d_signal))
    x = np.full((len(order), samples), np.nan)
    for i, raw in zip(signals_read, record.e_d_signal):
        if i in order:
            kind, frame, skew, _ = layout[i]
            raw = raw.reshape(samples, frame)
            mean = np.trunc(raw.sum(axis=1, dtype=np.int64) / frame)
            mean[(raw == FORMATS[kind][1]).any(axis=1)] = np.nan
            x[order.index(i), :max(samples - skew, 0)] = mean[skew:]
    return x


def read_plain(folder: str, header: Header, order: list[int], offset: int) -> np.ndarray:
    """The leads of one format-16 file, a sample a frame: (leads, n) float32 ADC units."""
    width = len(header.file)
    samples, content = read_samples(folder, header.file[0], 16, offset, width, header.samples,
                                    width)
    raw = np.frombuffer(content, "<i2").reshape(samples, width)
    # The checksum is the sum in int16 that wraps. Two steps: first over rows of 50 samples, which
    # the CPU adds at full width.
    rows = 50 if samples % 50 == 0 else 1
    sums = raw.reshape(-1, rows * width).sum(axis=0, dtype=np.int16)
    verify(header, range(width), sums.reshape(rows, width).sum(axis=0, dtype=np.int16).tolist())
    x = raw.T[order].astype(np.float32)
    if raw.min() == -32768:  # format 16's code for a missing sample
        x[x == -32768] = np.nan
    return x


def read_signal(path: str | Path, plain: bool = True) -> tuple[np.ndarray, float]:
    """Read a record as stored: (12, n) float32 mV in the order of LEADS, NaN = missing; its fs.

    plain=False reads through wfdb what would not need it.
    """
    folder, record = os.path.split(path)
    header = read_header(folder, record)
    order, layout, baseline, scale = parse_signals(header.format, header.gain, header.zero,
                                                   header.name)
    alike = {*header.file} == {header.file[0]} and layout.count(layout[0]) == len(layout)
    if plain and alike and layout[0][:3] == (16, 1, 0):
        x = read_plain(folder, header, order, layout[0][3])
    else:
        x = read_with_wfdb(folder, header, order, layout)
    if baseline is not None:
        x -= baseline
    x = x.astype(np.float32, copy=False)
    x *= scale
    return x, header.fs


def mend(x: np.ndarray, fs: float) -> int:
    """Fill the NaN of x (leads, samples) in place; returns the QUALITY bits of what was done.

    A run up to 100 ms is interpolated linearly (at an end of the record its one neighbour is held),
    a longer one set to 0 mV. Differs: A's runs set every NaN to 0.
    """
    quality = 0
    for lead in x:
        bad = np.isnan(lead)
        edges = np.flatnonzero(np.diff(bad, prepend=False, append=False)).reshape(-1, 2)
        if bad.any() and not bad.all():
            lead[bad] = np.interp(np.flatnonzero(bad), np.flatnonzero(~bad), lead[~bad])
        for start, stop in edges:
            if stop - start > GAP_SECONDS * fs + 1e-6 or bad.all():
                lead[start:stop] = 0
                quality |= ZEROED
            else:
                quality |= INTERPOLATED
    return quality


@functools.lru_cache(maxsize=16)
def decimation_matrix(q: int) -> np.ndarray:
    """(20 q, 40): what a block adds to its own 20 outputs | to those of the block before it."""
    t = np.arange(-10 * q, 10 * q + 1)
    taps = np.sinc(t / q) * np.kaiser(t.size, 5.0)
    taps /= taps.sum()  # unit gain at 0 Hz
    band = np.zeros((40 * q, 20))
    for m in range(20):
        band[m * q:m * q + taps.size, m] = taps
    return np.hstack([band[:20 * q], band[20 * q:]]).astype(np.float32)


def decimate(x: np.ndarray, q: int) -> np.ndarray:
    """Low-pass and keep every q-th sample: (leads, n) -> (leads, ceil(n / q)) float32.

    Equals scipy.signal.resample_poly(x, 1, q) with its defaults: FIR of 20 q + 1 taps, Kaiser
    window (beta 5), zeros beyond the ends. Blocks of 20 q inputs give 20 outputs each; an output
    reaches into two blocks, so that a product of the blocks with one banded matrix does the work.
    """
    if q == 1:
        return x
    leads, n = x.shape
    outputs = -(-n // q)
    blocks = -(-outputs // 20)
    padded = np.zeros((leads, (blocks + 1) * 20 * q), np.float32)
    padded[:, 10 * q:10 * q + n] = x  # the filter reaches 10 q samples back
    padded = padded.reshape(leads, blocks + 1, 20 * q)
    y = np.empty((leads, blocks + 1, 40), np.float32)
    rows = max(1, 2**18 // (800 * q))  # of so small a product that BLAS takes one thread for it:
    for i in range(0, blocks + 1, rows):  # the bits may not depend on the number of threads
        part = slice(i, i + rows)
        np.matmul(padded[:, part], decimation_matrix(q), out=y[:, part])  # @ (20 q, 40)
    return (y[:, :-1, :20] + y[:, 1:, 20:]).reshape(leads, -1)[:, :outputs]


def read_record(path: str | Path, fs: int) -> tuple[np.ndarray, int]:
    """Read one record, mend it and bring it to fs.

    Args: path: without extension. fs: wanted, in Hz; the record's own must be a multiple of it.
    Returns: signal (12, 10 * fs) float16 mV, leads in the order of LEADS; its QUALITY bits.
    Raises: Rejected alone, whatever the files hold; InputError, OSError where the machine lacks
        room or file handles, for which no record is to blame.
    """
    try:
        with np.errstate(all="ignore"):  # what is not finite is judged below
            return mended(*read_signal(path), fs)
    except (Rejected, InputError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in SCARCE:
            raise
        raise Rejected("unreadable", f"{type(error).__name__}: {error}") from error


def mended(x: np.ndarray, recorded_fs: float, fs: int) -> tuple[np.ndarray, int]:
    """A record as stored, (12, n) mV, changed in place -> what `read_record` returns."""
    q, samples, quality = round(recorded_fs / fs), SECONDS * fs, 0
    if q < 1 or abs(recorded_fs - q * fs) > 1e-6 * recorded_fs:
        raise Rejected("fs not a multiple", f"{recorded_fs:g} Hz")
    if x.shape[1] > samples * q:
        quality |= CUT
        # as if cut after the filter, which reaches 10 output samples ahead
        x = x[:, :(samples + 10 * (q > 1)) * q]
    elif -(-x.shape[1] // q) < samples:
        quality |= PADDED
    low, high = x.min(axis=1).tolist(), x.max(axis=1).tolist()  # NaN where the lead holds one
    if any(map(math.isnan, low)):
        quality |= mend(x, recorded_fs)  # before the filter, which would smear a gap
        low, high = x.min(axis=1).tolist(), x.max(axis=1).tolist()
    if dead := [lead for lead in range(12) if low[lead] == high[lead]]:
        quality |= DEAD
        x[dead] = 0
    if 0 < max(b - a for a, b in zip(low, high)) < LEAST_MV:
        raise Rejected("within 1 uV", f"{min(low):.3g} to {max(high):.3g} mV")  # as above
    if max(*high, -min(low)) > LIMIT_MV:
        quality |= BEYOND
    x = decimate(x, q)[:, :samples]
    if quality & BEYOND and not (largest := np.abs(x).max()) <= FLOAT16_MAX:
        raise Rejected("beyond float16", f"{largest:.4g} mV")  # the gain or unit is wrong
    out = np.zeros((12, samples), "<f2")
    out[:, :x.shape[1]] = x
    return out, quality


# ----------------------------------------------------------------------------------------------
# CSV files -> the table of records: subjects, times, folds, labels (A, section 4.1; Ext-ICD 1.0.1)
# ----------------------------------------------------------------------------------------------

COLUMNS = {  # of a table and of the cohort file; the first three are the order of the rows
    "subject_id": np.int64,
    "ecg_time": np.int64,  # s since 1970, -1 missing
    "study_id": np.int64,
    "fold": np.int8,
    "split": np.int8,  # position in SPLITS
    "ecg_no_within_stay": np.int16,  # 0 first, -1 not in any stay
    "stay": np.int64,  # hospital, else ED stay id, else -1
    "age": np.float32,  # years, NaN missing
    "sex": np.int8,  # 0 F, 1 M, -1 missing
    "has_label": bool,  # the source gives this record any code at all, of whatever chapter
}
ROW = collections.namedtuple("ROW", [*COLUMNS, "codes", "path"])  # as a source lists a record
SEX = {"f": 0, "female": 0, "m": 1, "male": 1}


class Tally:
    """Reason -> count, of rows left out (`rejected`) and of what was found in rows that are kept
    (`flaws`); `rejected_examples`: reason -> where the first one stands and what was found there.
    """

    def __init__(self):
        self.rejected, self.flaws = collections.Counter(), collections.Counter()
        self.rejected_examples = {}

    def add(self, reason: str, example: str, kept: bool = False, n: int = 1) -> None:
        """Count n, and keep the example if it is the first."""
        (self.flaws if kept else self.rejected)[reason] += n
        self.rejected_examples.setdefault(reason, printable(example))

    def __str__(self) -> str:
        return "; ".join(f"{n:,} {reason} (e.g. {self.rejected_examples[reason]})"
                         for reason, n in self.rejected.items()) or "nothing"


WHOLE = re.compile(r"\s*[+-]?([0-9]{1,18}|[0-9]{1,15}\.0*)\s*")  # a float holds 15 digits
ROUNDED = re.compile(r"\s*[+-]?[0-9.,]+[eE][+-]?[0-9]+\s*")
DATE = re.compile(r"\d{4}-?\d\d-?\d\d([T _]|$)", re.ASCII)
UNKNOWN = {"", "nan", "na", "n/a", "none", "null", "<na>", "nat"}  # texts of a missing value


def number(text: str) -> int:
    """Whole number from `7` or `7.0`; ValueError, and InputError where it was rounded: `4.00E+07`,
    as a spreadsheet shows a long one: which one it was is lost, and would be another row's.
    """
    if WHOLE.fullmatch(text):
        return int(text.partition(".")[0])
    if ROUNDED.fullmatch(text):
        raise InputError("is a rounded number, as a spreadsheet writes a long one: rows can no "
                         "longer be told apart; take the original file, or format that column as "
                         "text before saving")
    raise ValueError(text)


def within(low: int, high: int, missing: int | None = None) -> Callable[[str], int]:
    """A converter to a whole number from low to high; empty text is `missing`, where given."""
    def convert(text: str) -> int:
        if missing is not None and text.strip().lower() in UNKNOWN:
            return missing
        if not low <= (value := number(text)) <= high:
            raise ValueError(text)
        return value
    return convert


def one_clock() -> Callable[[str], int]:
    """A converter of `2180-07-23 08:44:00` to s since 1970, as if UTC where no offset is given.

    For all time columns of a source: with offsets or without, for else no order holds.
    """
    first: dict[bool, str] = {}

    def seconds(text: str) -> int:
        if not DATE.match(text.strip()):  # Python takes `4541062950551` for a date and a time
            raise ValueError(text)
        when = datetime.fromisoformat(text.strip())
        first.setdefault(when.tzinfo is not None, text)
        if len(first) == 2:
            raise InputError(f"cannot be ordered: found {first[True]!r} with a UTC offset, "
                             f"{first[False]!r} without one; write all times of one kind")
        value = int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())
        if value < 0:  # which would mean "missing"
            raise ValueError(text)
        return value
    return seconds


def years(text: str) -> float:
    """Age from `63`, `63.5`; the 300 of PTB-XL, which means above 89, is 90."""
    value = float(text)
    if not (0 <= value <= 130 or value == 300):  # NaN fails as well
        raise ValueError(text)
    return 90.0 if value == 300 else value


def record_path(text: str) -> str:
    """A record's path below the root; ValueError for one that leads out of it, or none."""
    text = text.strip().replace("\\", "/")
    parts = text.split("/")
    if not parts[0] or ".." in parts or ":" in parts[0] or not text.isprintable():
        raise ValueError(text)
    return text


STRING = r"""(?:'([^'"\\]*)'|"([^'"\\]*)")"""
# a code of a list and a comma, or (NumPy) nothing at all; of a dict, with its number
ITEM = re.compile(rf"(?:np\.str_\(\s*{STRING}\s*\)|{STRING})\s*(?:,\s*|(?=['\"])|$)")
KEY = re.compile(rf"{STRING}\s*:\s*{NUMBER}\s*(?:,\s*|$)", re.ASCII)


@functools.lru_cache(maxsize=200_000)  # the records of a stay repeat one text
def icd10_codes(text: str) -> tuple[str, ...]:
    """parse_codes of a list, with one way to write a code: `i48.91` -> `I4891`"""
    if ":" in text:  # a dict, as PTB-XL's: are codes of value 0 there or not?
        raise ValueError(text)
    return tuple(code.upper().replace(".", "", 1) for code in parse_codes(text))


@functools.lru_cache(maxsize=200_000)
def category(code: str) -> str:
    """`I4891` -> `I48`; "" for what is no code of ICD-10 (ICD-9: digits alone, mostly)."""
    return code[:3] if re.fullmatch(r"[A-Z][0-9][0-9AB][0-9A-Z]{0,4}", code) else ""


def parse_codes(text: str) -> tuple[str, ...]:
    """Codes in the text of a list of strings, or of the keys of a dict of numbers.

    As Python, NumPy (with or without commas) and JSON write them; read as text, nothing is
    executed. ValueError for any other text, so that no code is lost or joined with another.
    """
    body, codes, at = text.strip(), [], 0
    if len(body) < 2 or body[0] + body[-1] not in ("[]", "{}", "()"):
        raise ValueError(text)
    entry = KEY if body[0] == "{" and ":" in body else ITEM
    body = body[1:-1].strip()
    while at < len(body):
        found = entry.match(body, at)
        code = found and next(filter(None, found.groups()), "").strip()
        if not code or re.search(r"[\s,;\[\]{}]", code):  # two codes in one string
            raise ValueError(text)
        codes.append(code)
        at = found.end()
    return tuple(codes)


def check_header(header: list[str], path: Path, required: dict, optional: dict,
                 wanted: str) -> None:
    """InputError where a required column lacks or one stands there twice."""
    lacking = [name for name in required if name and name not in header]
    if lacking or not header:
        raise InputError(f"{path}: no column {', '.join(lacking) or 'at all'}; found: "
                         f"{printable(', '.join(header)[:200]) or 'an empty file'}; {wanted}")
    if twice := [name for name in required | optional if name and header.count(name) > 1]:
        raise InputError(f"{path}: two columns {twice[0]}; wanted: one: delete the other")
    if absent := [name for name in optional if name not in header]:
        print(f"{path.name}: no column {', '.join(absent)}: stored as missing (-1, NaN)")


def csv_rows(handle) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
    """Of each row that is not blank its last line, the number of its lines, and its fields.

    A quote without end, which would give a row the fields of the next, is a csv.Error instead. No
    more than 1 MB is taken at a time, of a file that has no lines.
    """
    read = functools.partial(handle.readline, 2**20)
    reader, before = csv.reader(iter(read, ""), strict=True), 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        if row:
            yield reader.line_num, reader.line_num - before, row
        before = reader.line_num


def read_rows(path: Path, required: dict, optional: dict, what: str,
              tally: Tally) -> tuple[dict, int]:
    """{id: [id, *values]} of a CSV file, and its count of rows, blank lines left out.

    required: column -> converter of its text; the first column is the id. The name "" stands for
    the first column, whatever it is called. optional: column -> converter, value if missing. Of
    several rows with one id the first counts. A required text that cannot be converted costs the
    row: it is then None, and `tally` counts "WHAT malformed". An optional one is counted, too.
    Raises: InputError, of a converter for one that makes the column useless, or no such file.
    """
    wanted = f"wanted: a CSV file with the columns {', '.join(filter(None, required))}"
    rows, listed, line = {}, 0, 0
    refuse_irregular(path, wanted)
    with system_errors(path), open(path, "rb") as raw:
        start = raw.read(2)
    if start == b"PK":
        raise InputError(f"{path}: found a zip archive or a spreadsheet; {wanted}: unpack it, or "
                         "export it as CSV")
    opened = gzip.open if start == b"\x1f\x8b" else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as handle:
        try:
            read = csv_rows(handle)
            line, _, header = next(read, (0, 0, []))
            if isinstance(header, csv.Error):
                raise header
            header = [name.strip() for name in header]
            check_header(header, path, required, optional, wanted)
            columns = [(name, 0 if not name else header.index(name) if name in header
                        else len(header), *(optional.get(name) or (required[name], None)))
                       for name in required | optional]
            for line, taken, row in read:
                place, values = f"{path.name} line {line}", []
                if isinstance(row, csv.Error) or len(row) != len(header):
                    why = row if isinstance(row, csv.Error) else \
                        f"{len(row)} fields for {len(header)} columns"
                    listed += taken
                    tally.add(f"{what} malformed", f"{place}: {why}", n=taken)
                    continue
                listed += 1
                row.append("")  # of the optional columns that are not there
                for name, index, convert, missing in columns:
                    text = row[index]
                    try:
                        unknown = name in optional and text.strip().lower() in UNKNOWN
                        values.append(missing if unknown else convert(text))
                    except (ValueError, KeyError, OverflowError) as error:
                        found = f"{place}: {name} {text[:60]!r}"
                        if isinstance(error, InputError):
                            raise InputError(f"{found} {error}") from None
                        if name in required:
                            listed += taken - 1
                            tally.add(f"{what} malformed", found, n=taken)
                            break
                        tally.add(f"{name} unreadable, taken as missing", found, kept=True)
                        values.append(missing)
                if values and values[0] in rows:
                    other = " with other values" * (values != rows[values[0]])
                    tally.add(f"{what} duplicated{other}", f"{place}: {values[0]}")
                elif values:
                    rows[values[0]] = values if len(values) == len(columns) else None
        except (csv.Error, EOFError, OSError, zlib.error) as error:  # a gzip file's, mostly
            if of_system(error):
                raise InputError(system_error(error, path)) from error
            raise InputError(f"{path}: damaged after line {line:,}: {error}; "
                             f"{wanted}") from None
    return rows, listed


def make_table(root: Path, rows: list, class_name: list[str], class_of: Callable,
               patients: int | None, tally: Tally, **about) -> dict:
    """Rows, as ROW, sorted -> {column: array, "label", "path", ..., "about": attributes}.

    Leaves out rows without a header file, then all but the first `patients` by subject_id. Raises
    InputError where a patient lies in two folds, for then train and test would share a patient, and
    where no time could be read.
    """
    rows.sort(key=lambda row: row[:3])
    for a, b in zip(rows, rows[1:]):
        if a.subject_id == b.subject_id and a.fold != b.fold:
            raise InputError(f"patient {a.subject_id} lies in folds {a.fold} and {b.fold} "
                             f"(study_id {a.study_id}, {b.study_id}); a patient may be in one fold "
                             "only: correct the fold column")
    untimed = sum(row.ecg_time < 0 for row in rows)
    for name in ("ecg_time", "recording_date"):
        reason = f"{name} unreadable, taken as missing"
        if 2 * min(untimed, tally.flaws[reason]) > len(rows):
            raise InputError(f"{tally.rejected_examples[reason]} is no time, nor are most others "
                             "of that column; wanted: such as '2180-07-23 08:44:00'; without times "
                             "there are no pairs")
    found, path_of = [], collections.Counter(row.path for row in rows)
    for row in rows:
        if path_of[row.path] > 1:  # whose ECG it is cannot be known
            tally.add("path of another record, too", f"study_id {row.study_id}: {row.path}")
            continue
        try:
            os.stat(header := f"{root}/{row.path}.hea")
            found.append(row)
        except OSError as error:
            tally.add("header file missing", f"{header}: {error.strerror}")
    if not found:
        raise InputError(f"{root}: found none of the {len(rows):,} records that the CSV files list "
                         f"soundly; left out: {tally}; wanted: "
                         "ids in digits, folds as in the release, codes as a list or dict, such as "
                         "['I10', 'I4891'], and the files below --root")
    first = set(sorted({row.subject_id for row in found})[:patients])
    chosen = [row for row in found if row.subject_id in first]
    columns = dict(zip(ROW._fields, zip(*chosen)))
    table = {name: np.array(columns[name], dtype) for name, dtype in COLUMNS.items()}
    position = {name: k for k, name in enumerate(class_name)}
    table["label"] = np.zeros((len(chosen), len(class_name)), np.uint8)
    for label, own in zip(table["label"], columns["codes"]):
        label[[position[class_of(code)] for code in own if class_of(code) in position]] = 1
    about |= {"not_chosen": len(found) - len(chosen)}
    return table | dict(code_count=np.array(list(map(len, columns["codes"]))), about=about,
                        tally=tally, class_name=class_name, path=list(columns["path"]))


def check_codes(column: str, rows: list[tuple], classes: list[str], class_of: Callable,
                wanted: str, tally: Tally, most: float = 1.0) -> None:
    """InputError where the labels, (place, codes) of each row, are of another coding system.

    They would be zero for all patients or for some, without a word: fewer than 1 % of the rows have
    a code of a class, or more than `most` of them one that is foreign: class_of(code) is "". Those
    are counted.
    """
    usual, odd, strange, known = 0, 0, [], set(classes)
    for place, codes in rows:
        usual += any(class_of(code) in known for code in codes)
        foreign = [(place, code) for code in codes if not class_of(code)]
        odd += bool(foreign)
        strange += foreign
    for place, code in strange:
        tally.add(f"code that is not of {wanted.partition(',')[0]}", f"{place}: {code!r}", True)
    if rows and (usual < 0.01 * len(rows) or odd > most * len(rows)):
        shown = strange or [(place, code) for place, codes in rows for code in codes]
        shown = ", ".join(f"{code!r} ({place})" for place, code in shown[:3]) or "no code at all"
        raise InputError(f"{column}: {usual:,} of {len(rows):,} rows carry a code that makes a "
                         f"class, {odd:,} one that is not of the system; found: {shown}; wanted: "
                         f"codes of {wanted}; translate them first; rows left out: {tally}")


def read_mimic(root: Path, labels: Path, patients: int | None) -> dict:
    """Table of a folder in MIMIC-IV-ECG's layout, joined on study_id with the CSV of Ext-ICD.

    Labels: codes of `all_diag_all` that start with I (ICD-10 chapter IX), first three characters;
    the classes are those of the whole CSV, so that a partial download has them all. Folds 0 to 17
    train, 18 validates, 19 tests. Source: A, section 4.1 and Appendix A.
    """
    tally, rows, time_column = Tally(), [], {"ecg_time": (one_clock(), -1)}
    known, _ = read_rows(labels, {
        "study_id": number, "subject_id": number, "all_diag_all": icd10_codes,
        "fold": within(0, 19), "ecg_no_within_stay": within(-1, 2**15 - 1, missing=-1),
    }, {"hosp_hadm_id": (number, -1), "ed_stay_id": (number, -1), "age": (years, math.nan),
        "gender": (lambda text: SEX[text.strip().lower()], -1)} | time_column, "label row", tally)
    entries, listed = read_rows(
        root / "record_list.csv", {"study_id": number, "subject_id": number, "path": record_path},
        time_column, "record_list row", tally)
    for study_id in known.keys() - {study_id for study_id, entry in entries.items() if entry}:
        tally.add("label row without a listed record", f"study_id {study_id}")
    for study_id, subject_id, path, ecg_time in filter(None, entries.values()):
        if study_id not in known:
            tally.add("no label row", f"study_id {study_id}")
        elif known[study_id] is not None:  # None: counted as malformed already
            _, patient, codes, fold, ecg_no, hospital, ed, age, sex, at = known[study_id]
            if patient != subject_id:
                tally.add("subject_id differs between the CSV files",
                          f"study_id {study_id}: {subject_id} and {patient}")
                continue
            if min(ecg_time, at) >= 0 and ecg_time != at:
                tally.add("ecg_time differs between the CSV files, record_list.csv's taken",
                          f"study_id {study_id}", kept=True)
            rows.append(ROW(
                subject_id, ecg_time if ecg_time >= 0 else at, study_id, fold, max(fold - 17, 0),
                ecg_no, hospital if hospital >= 0 else ed, age, sex, len(codes) > 0, codes, path))
    told_of = [(f"study_id {row[0]}", row[2]) for row in known.values() if row]
    distinct = set().union(*(codes for _, codes in told_of))
    classes = sorted({category(code) for code in distinct if category(code)[:1] == "I"})
    check_codes(f"{labels.name}, all_diag_all", told_of, classes, category,
                "ICD-10, such as 'I4891' of chapter IX", tally, most=0.01)
    return make_table(root, rows, classes, category, patients, tally, listed=listed,
                      codes={"distinct": len(distinct)}, normal_codes=[])


# ----------------------------------------------------------------------------------------------
# Pairs and actions (A, section 3.1: a = y_next - y)
# ----------------------------------------------------------------------------------------------


def make_pairs(table: dict) -> dict:
    """Consecutive records of one patient as transitions; rows sorted by (subject, time, study).

    Without both times no order is known, and no pair is made.
    Returns: pair (P, 2) int32 rows; action (P, K) int8 in {-1, 0, 1}; gap_days (P,) float32;
    pair_kind (P,) uint8: 2 touches a record without any code, else 0 same
    stay (stable by construction: codes belong to a stay), else 1 between stays.
    """
    label, stay, time_s = table["label"].astype(np.int8), table["stay"], table["ecg_time"]
    same = table["subject_id"][1:] == table["subject_id"][:-1]
    a = np.flatnonzero(same & (time_s[:-1] >= 0) & (time_s[1:] >= 0))
    b = a + 1
    gap_days = (time_s[b] - time_s[a]) / 86400
    kind = np.where((stay[a] == stay[b]) & (stay[a] >= 0), 0, 1)
    kind[~(table["has_label"][a] & table["has_label"][b])] = 2
    return {"pair": np.stack([a, b], axis=1).astype(np.int32),  # (P, 2)
            "action": label[b] - label[a],  # (P, K)
            "gap_days": gap_days.astype(np.float32), "pair_kind": kind.astype(np.uint8)}


# ----------------------------------------------------------------------------------------------
# Build: worker processes write chunks of records, which are then compacted into the HDF5 file
# ----------------------------------------------------------------------------------------------

CHUNK = 256  # records that a worker reads at a time: what a kill can lose


def difference(found: dict, wanted: dict) -> str:
    """Name the first thing in which two identities differ; empty when they are equal."""
    then, now = ({key: part for name, value in identity.items()
                  for key, part in (value if isinstance(value, dict) else {name: value}).items()}
                 for identity in (found, wanted))
    return next((f"{key.replace('_', '-')} ({str(then.get(key))[:12]} there, "
                 f"{str(now.get(key))[:12]} now)"
                 for key in then | now if then.get(key) != now.get(key)), "")


@contextlib.contextmanager
def workspace(out: Path, paths: list[str], identity: dict) -> Iterator[Path]:
    """Hold OUT.partial, in which `out` grows, for this process, and yield it.

    However the process ends, the system lets go; the next one goes on with what is there. Raises
    InputError where the folder belongs to another build or process, or the disk is too small.
    """
    folder, n, fs = out.with_name(out.name + ".partial"), len(paths), identity["arguments"]["fs"]
    plan, identity = folder / "plan.json", identity | {"chunk": CHUNK}
    busy = f"--out {out}: another process is building it; wait for it"
    with locked(folder, busy), system_errors(f"--out {out}"):
        if plan.exists():
            if differs := difference(*read_json(plan, {}), identity):
                raise InputError(f"{folder} holds an unfinished build that differs in {differs}; "
                                 "repeat the command that began it, or delete that folder")
            for chunk in folder.glob("*.chunk"):  # what was rejected is tried again
                with open(chunk, "rb") as handle:
                    fates = json.loads(handle.readline())
                if not all(isinstance(fate, int) for fate in fates):
                    chunk.unlink()
            there = CHUNK * len(list(folder.glob("*.chunk")))
            print(f"{folder}: going on, {min(there, n):,} of {n:,} records are there")
        else:
            need = 2 * n * len(LEADS) * SECONDS * fs * 2  # twice: N is known only after reading
            free = shutil.disk_usage(folder).free
            disk = (f"{n:,} records at {fs} Hz need {need / 1e9:.2f} GB while building, half of it "
                    f"after; {free / 1e9:.2f} GB are free")
            print(f"{out}: {disk}")
            if need + 2**20 > free:
                shutil.rmtree(folder, ignore_errors=True)
                raise InputError(f"--out {out}: {disk}; free some, choose another disk, or take a "
                                 "lower --fs or fewer --patients")
            replace_file(plan, json.dumps(identity).encode())
        yield folder


def serve() -> None:
    """A worker process: do the jobs that stdin holds, while someone takes the answers."""
    answers = open(1, "wb", buffering=0, closefd=False)
    sys.stdout = sys.stderr  # what else is printed is no answer
    sys.modules["__main__"] = sys.modules[__name__]  # where a parent that is this file's main is
    with contextlib.suppress(EOFError, BrokenPipeError):
        call, jobs = pickle.load(sys.stdin.buffer)
        for job in jobs:
            try:
                answer = call(job)
            except (OSError, InputError, MemoryError) as error:
                answer = error
            answers.write(pickle.dumps(answer))


def in_workers(call: Callable, jobs: Sequence, workers: int) -> Iterator:
    """Yield call(job) of each job in order, by worker processes, or in this one if 1.

    A worker imports this module alone, not the script that called it. It has pipes of its own: no
    semaphores, which sandboxes without /dev/shm lack. Raises InputError where a worker is killed or
    cannot be started; OSError, InputError of a job as it is.
    """
    if workers == 1:
        yield from map(call, jobs)
        return
    import subprocess  # here alone: one worker has no need of it

    sys.modules.setdefault("prepare_data", sys.modules[__name__])  # whose errors they send
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    env = os.environ | threads | {"PYTHONPATH": os.pathsep.join(
        [os.path.dirname(os.path.abspath(__file__)), *filter(None, sys.path)])}
    command = [sys.executable, "-P", "-c", "import signal; signal.signal(2, signal.SIG_IGN); "
               "import prepare_data; prepare_data.serve()"]  # Ctrl-C is for the parent alone
    processes, n = [], min(workers, len(jobs))
    try:
        with system_errors(f"--workers {workers}"):
            while len(processes) < n:
                processes.append(subprocess.Popen(command, stdin=-1, stdout=-1, env=env))
        for k, process in enumerate(processes):
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pickle.dump((call, jobs[k::n]), pipe)
        for k in range(len(jobs)):
            process = processes[k % n]
            try:
                answer = pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                code = process.wait()
                why = f"ended early, exit code {code}" if code >= 0 else \
                    f"was killed by {signals.Signals(-code).name}"
                raise InputError(f"a worker {why}; where memory ran out, close other programs or "
                                 "take fewer --workers; the same command goes on") from None
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        for process in processes:
            process.kill()  # also one that does not react; its files are whole or not there
        for process in processes:
            with process:  # which closes its pipes and waits for it
                pass


def read_chunk(folder: Path, root: Path, fs: int, job: tuple[int, list[str]]) -> int:
    """Read some records into the file FIRST.chunk of the folder; returns their number.

    job: the position of the first, and their paths. The file: a line of JSON, of each record its
    QUALITY bits or [reason, what was found] where it is rejected; then the signals of the others.
    """
    first, paths = job
    signal, fates, kept = np.empty((len(paths), 12, SECONDS * fs), "<f2"), [], 0
    for path in paths:
        try:
            signal[kept], quality = read_record(f"{root}/{path}", fs)
            fates.append(quality)
            kept += 1
        except Rejected as error:
            fates.append([error.reason, f"{path}: {error.found}"])
    own = folder / f"{first}.{os.getpid()}"  # a worker of a killed build may still be at the same
    replace_file(own, json.dumps(fates).encode(), b"\n", signal[:kept])
    own.replace(folder / f"{first}.chunk")
    return len(paths)


def run_workers(folder: Path, root: Path, paths: list[str], fs: int, workers: int) -> None:
    """Read all chunks that are not there, with progress."""
    jobs = [(first, paths[first:first + CHUNK]) for first in range(0, len(paths), CHUNK)
            if not (folder / f"{first}.chunk").exists()]
    workers = max(1, min(workers, len(jobs)))
    progress = Progress(sum(len(some) for _, some in jobs), "records",
                        f"reading, {workers} workers:")
    call = functools.partial(read_chunk, folder, root, fs)
    with contextlib.closing(in_workers(call, jobs, workers)) as done:
        for n in done:
            progress.update(n)
    progress.close()


def write_cohort(folder: Path, out: Path, table: dict, identity: dict, fs: int,
                 synthetic: bool) -> None:
    """Compact the chunks of the workspace into `out`: written elsewhere, synced, renamed."""
    chunks = [folder / f"{first}.chunk" for first in range(0, len(table["path"]), CHUNK)]
    fates, tally, shape = [], table["tally"], (len(LEADS), SECONDS * fs)
    for chunk in chunks:
        with open(chunk, "rb") as handle:
            fates += json.loads(handle.readline())
    keep = [i for i, fate in enumerate(fates) if isinstance(fate, int)]
    for reason, found in (fate for fate in fates if isinstance(fate, list)):
        tally.add(reason, found)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)  # nothing in it is worth going on with
        raise InputError(f"{out}: no record could be read; left out: {tally}")
    rows = {name: table[name][keep] for name in (*COLUMNS, "label", "state") if name in table}
    rows |= make_pairs(rows) | {
        "quality": np.array([fates[i] for i in keep], "<u2"),
        "class_name": np.array([name.encode() for name in table["class_name"]])}
    about, mean = table["about"], float(table["code_count"][keep].mean())
    attributes = identity | about | vars(tally) | dict(
        fs=fs, synthetic=synthetic, unit="mV", leads=LEADS,
        codes=about["codes"] | {"per_record": mean})
    temporary = folder / "cohort.h5"
    h5py.File(temporary, "w", locking=False).close()  # the folder is held
    if hasattr(os, "posix_fallocate"):  # HDF5 itself may crash where the disk is full
        room = sum(array.nbytes for array in rows.values()) + len(keep) * 2 * math.prod(shape)
        with open(temporary, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, room + len(str(attributes)) + 2**20)
    with h5py.File(temporary, "r+", locking=False) as file:  # gives back what it does not need
        for name, array in rows.items():
            file[name] = array
        stored = file.create_dataset("signal", (len(keep), *shape), "<f2")  # contiguous
        crc, row = np.zeros(-(-len(keep) // CRC_ROWS), np.uint32), 0
        for chunk in chunks:
            with open(chunk, "rb") as handle:
                handle.readline()
                block = np.fromfile(handle, "<f2").reshape(-1, *shape)
            stored[row:row + len(block)] = block
            for signal in block:
                crc[row // CRC_ROWS] = zlib.crc32(signal, int(crc[row // CRC_ROWS]))
                row += 1
        file["signal_crc32"] = rows["signal_crc32"] = crc
        for name in (name for name in ATTRIBUTES if name in attributes):
            value = attributes[name]  # lists, dicts as JSON text: every HDF5 reader can show it
            file.attrs[name] = value if isinstance(value, (bool, int, float, str)) else \
                json.dumps(value, sort_keys=True)
        file.attrs["crc32"] = json.dumps(content_crc(rows, file))
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, out)
    # The cohort is whole. Network file systems keep files that are still open, under other names.
    shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------------------------
# Cohort: the reader of the file
# ----------------------------------------------------------------------------------------------

SHAPES = {  # dataset -> type, shape in N records, K classes, P pairs, C checksums, T samples
    **{name: (np.dtype(dtype), "N") for name, dtype in COLUMNS.items()},
    "label": (np.dtype("u1"), "NK"), "state": (np.dtype("u1"), "NK"),
    "quality": (np.dtype("<u2"), "N"), "class_name": (None, "K"),
    "pair": (np.dtype("<i4"), "P2"), "action": (np.dtype("i1"), "PK"),
    "gap_days": (np.dtype("<f4"), "P"), "pair_kind": (np.dtype("u1"), "P"),
    "signal": (np.dtype("<f2"), "NLT"), "signal_crc32": (np.dtype("<u4"), "C")}
ATTRIBUTES = {  # in this order in the file
    "format_version": int, "source": str, "arguments": dict, "csv_sha256": dict,
    "records_sha256": str, "fs": int, "synthetic": bool, "unit": str, "listed": int,
    "codes": {"distinct": (int,), "per_record": (float, int)}, "leads": list, "normal_codes": list,
    "rejected": {"*": (int,)}, "rejected_examples": {"*": (str,)}, "flaws": {"*": (int,)},
    "not_chosen": int, "crc32": dict}
# What an older file may lack, as what it then counts
LATER = {"state": None, "rejected_examples": {}, "flaws": {}, "not_chosen": 0, "crc32": None}
LIMITS = {"label": (0, 1), "state": (0, 1), "action": (-1, 1), "split": (0, 2), "sex": (-1, 1),
          "pair_kind": (0, 2), "fold": (0, 127), "ecg_no_within_stay": (-1, 2**15 - 1)}


def mapped(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset that lies in the file as one block, so that it is no larger than the file.

    Raises: InputError for links out of the file, data kept elsewhere, compressed or never written.
    """
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise InputError(f"{name} is no dataset of its own (a link, a group, kept elsewhere)")
    if dataset.chunks is not None or (dataset.size and dataset.id.get_offset() is None):
        raise InputError(f"{name} is compressed, chunked or empty, as in a repacked copy; wanted: "
                         "one block, to be memory-mapped: `h5repack -l CONTI -f NONE OLD NEW` "
                         "restores it")
    return dataset


def content_crc(arrays: dict[str, np.ndarray], file: h5py.File) -> dict[str, int]:
    """CRC-32 of every dataset but `signal`, which has its own, and of the attributes together."""
    crc = {name: zlib.crc32(np.ascontiguousarray(arrays[name])) for name in SHAPES
           if name in arrays}
    text = "".join(f"{name}={value!r};" for name, value in plain_attributes(file)
                   if name != "crc32")
    return crc | {"attributes": zlib.crc32(text.encode())}


def plain_attributes(file: h5py.File) -> list[tuple]:
    """(name, value) of the attributes in order, as Python's own types."""
    return [(name, value.item() if isinstance(value, np.generic) else value)
            for name, value in sorted(file.attrs.items())]


def refuse_endless(path: Path, size: int, extents: list[tuple[int, int]]) -> None:
    """InputError for a damaged heap of texts, in which the HDF5 library would search for ever.

    Between the datasets (offset, bytes); a heap is "GCOL", 4 bytes, its size, then entries of index
    (2 bytes), 6 bytes, length (8 bytes), and the text filled up to 8 bytes; index 0 is free space.
    Source: HDF5 file format specification, III.E.
    """
    ends = [0, *(offset + length for offset, length in extents)]
    with open(path, "rb") as handle:
        for start, stop in zip(ends, [*(offset for offset, _ in extents), size]):
            if stop - start > 2**26:
                raise InputError(f"damaged: {stop - start:,} bytes belong to no dataset")
            handle.seek(start)
            gap = handle.read(max(0, stop - start))
            for heap in re.finditer(b"GCOL", gap):
                at, end = heap.start() + 16, heap.start() + int.from_bytes(
                    gap[heap.start() + 8:heap.start() + 16], "little")
                while at + 16 <= min(end, len(gap)):
                    length = int.from_bytes(gap[at + 8:at + 16], "little")
                    free = gap[at:at + 2] == b"\0\0"
                    if free and length < 16:
                        raise InputError("damaged: a heap of its texts has no end")
                    at += length if free else 16 + -(-length // 8) * 8


class Cohort:
    """A cohort file. Every dataset and attribute is an attribute of the object, arrays in RAM.

    N records, T samples, K classes, P pairs. signal (N, 12, T) float16 mV, a read-only memory map;
    label (N, K) uint8; quality (N,) uint16, bits of QUALITY; pair (P, 2) int32 rows; action (P, K)
    int8; gap_days (P,) float32; pair_kind (P,) uint8; the (N,) columns of COLUMNS; state (N, K)
    uint8, what the simulator truly expressed, or None; class_name, leads, normal_codes lists of
    str; fs Hz; rejected, rejected_examples, flaws, arguments, csv_sha256, codes dicts. Beside them
    path, name (file stem), sha256 (hex, over all of it; the signal enters through its checksums, so
    this is quick), changed (names of what differs from its checksum;
    None: an older file has none).
    Raises: InputError for anything but a whole cohort file. Nothing outside the file is read, and
    no more memory is taken than the file is long.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), Path(path).stem
        wanted = "wanted: a cohort .h5, as prepare_data.py writes it"
        refuse_irregular(self.path, wanted)
        try:
            with open(path, "rb") as handle:
                start = handle.read(4)
        except OSError as error:
            raise InputError(f"{system_error(error, path)}; {wanted}") from None
        try:
            with h5py.File(self.path, "r", locking=False) as file:  # it is complete: no one writes
                self._read(file)
        except InputError as error:
            raise InputError(f"{path}: {error}; {wanted}") from None
        except Exception as error:  # h5py lets whatever a damaged file causes escape
            what = "is a checkpoint or another zip file" if start == b"PK\x03\x04" else \
                "is truncated or damaged" if start == b"\x89HDF" else "is no HDF5 file"
            raise InputError(f"{path} {what}; {wanted}") from error

    def _read(self, file: h5py.File) -> None:
        vars(self).update(LATER)
        content, size, digest = {*file, *file.attrs}, os.path.getsize(self.path), hashlib.sha256()
        if lacking := [name for name in (*SHAPES, *ATTRIBUTES) if name not in content | {*LATER}]:
            raise InputError(f"an HDF5 file without {', '.join(lacking[:4])}")
        datasets = {name: mapped(file, name) for name in sorted(SHAPES) if name in file}
        extents = sorted((d.id.get_offset(), d.nbytes) for d in datasets.values() if d.size)
        if extents and max(map(sum, extents)) > size:
            raise InputError("truncated: its datasets reach beyond its end")
        refuse_endless(self.path, size, extents)
        for name, value in plain_attributes(file):
            digest.update(f"{name}={value!r};".encode())
            with contextlib.suppress(ValueError, RecursionError):  # then it is no dict or list
                if isinstance(value, str) and value[:1] in ("[", "{"):
                    value = json.loads(value)
            wanted = ATTRIBUTES.get(name, type(value))
            if why := lack(value, wanted if isinstance(wanted, dict) else (wanted,), f"{name}."):
                raise InputError(f"attribute {why[:200]}")
            if name in ATTRIBUTES:
                setattr(self, name, value)
        if self.format_version != FORMAT_VERSION or not 0 < self.fs <= MAX_FS:
            raise InputError(f"format version {self.format_version}, fs {self.fs}; {FORMAT_VERSION}"
                             f" and 1 to {MAX_FS:,} Hz are read; build it anew")
        n, k, pairs = ((datasets[name].shape or (0,))[0]
                       for name in ("study_id", "class_name", "pair"))
        letters = {"N": n, "K": k, "P": pairs, "C": -(-n // CRC_ROWS), "L": len(LEADS), "2": 2,
                   "T": SECONDS * self.fs}
        arrays, limits = {}, LIMITS | {"pair": (0, n - 1)}
        for name, dataset in datasets.items():
            dtype, axes = SHAPES[name]
            shape, found = tuple(letters[axis] for axis in axes), (dataset.dtype, dataset.shape)
            if found != (dtype or dataset.dtype, shape) or dataset.dtype.hasobject:
                raise InputError(f"{name} is {found[0]} {found[1]}, not {dtype or 'strings'} "
                                 f"{shape} beside {n} study_id, {k} class_name, {pairs} pair")
            digest.update(f"{name}:{dataset.dtype}{dataset.shape};".encode())
            if name != "signal":
                arrays[name] = values = dataset[()]
                digest.update(np.ascontiguousarray(values).data)
            if name in limits:
                low, high = limits[name]
                if len(bad := np.argwhere((values < low) | (values > high))):
                    raise InputError(f"{name} holds {values[tuple(bad[0])]} in row {bad[0, 0]}, not"
                                     f" {low} to {high}; build it anew")
        vars(self).update(arrays)
        try:
            self.class_name = [name.decode() for name in self.class_name]
        except (AttributeError, UnicodeDecodeError):
            raise InputError("class_name holds what is no text") from None
        if len({"", *self.class_name}) <= k:
            raise InputError("class_name holds a name twice or an empty one; build it anew")
        if self.leads != list(LEADS) or self.unit != "mV" or n == 0:
            raise InputError(f"{n} records, leads {self.leads} in {self.unit}, not one or more of "
                             f"{' '.join(LEADS)} in mV; build it anew")
        self.sha256 = digest.hexdigest()
        self.changed = None if self.crc32 is None else [
            name for name, crc in content_crc(arrays, file).items() if self.crc32.get(name) != crc]
        signal = datasets["signal"]
        self.signal = np.memmap(self.path, mode="r", offset=signal.id.get_offset(),
                                shape=signal.shape, dtype=signal.dtype)

    def __len__(self) -> int:
        return len(self.study_id)

    def action_of(self, pairs: np.ndarray, which: str) -> np.ndarray:
        """What a model is told of pairs (P,), (P, K) int8 in {-1, 0, 1}, or sets, uint8.

        coded: the change of the label set, a = y_next - y (A, section 3.1); state: that of what is
        truly expressed, known of the demo cohort alone; none: zeros, the same architecture without
        information; sets: [y, y_next, has_label, has_label_next] (P, 2K + 2), of
        cardiowm.action_sets. Raises: InputError for state where the cohort has none.
        """
        if which in ("coded", "none"):
            return self.action[pairs] * np.int8(which == "coded")
        source, target = self.pair[pairs].T
        if which == "sets":
            known = self.has_label[self.pair[pairs]].astype(np.uint8)               # (P, 2)
            return np.concatenate([self.label[source], self.label[target], known], axis=1)
        if self.state is None:
            raise InputError(f"action state: {self.path} holds no true states, as only a demo "
                             "cohort does; take the action coded, sets or none")
        return self.state[target].astype(np.int8) - self.state[source].astype(np.int8)


def check_cohort(cohort: Cohort) -> None:
    """Verify a file against its checksums; InputError if one differs."""
    progress = Progress(len(cohort), "records", "checking:")
    faults = list(cohort.changed or ())
    for k, crc in enumerate(cohort.signal_crc32):
        block = np.array(cohort.signal[k * CRC_ROWS:(k + 1) * CRC_ROWS])
        if zlib.crc32(block) != crc:
            faults.append(f"signal, rows {k * CRC_ROWS} to {k * CRC_ROWS + len(block) - 1}")
        progress.update(len(block))
    progress.close()
    if faults:
        raise InputError(f"{cohort.path}: the checksum of {'; of '.join(faults[:3])} differs; "
                         "build it anew")


# ----------------------------------------------------------------------------------------------
# Counts, and those known of the full release (A, Appendix A and Figure 6; B, section 3)
# ----------------------------------------------------------------------------------------------

GOLDEN = {  # the full release of MIMIC-IV-ECG with the labels of Ext-ICD 1.0.1
    "records": 800_035, "patients": 161_352, "patients with one record": 57_344,
    "patients with two or more": 104_008, "records per patient, mean": 4.96,
    "records per patient, median": 2, "records per patient, max": 260,
    "pairs": 638_683, "stable pairs": 465_842, "changed pairs": 172_841,
    "patients with a changed pair": 55_808, "changed pairs per such patient": 3.10,
    **{f"|a|1 = {size}": pairs for size, pairs in enumerate(
        (56_271, 39_413, 31_217, 21_315, 12_732, 6_643, 3_110, 1_297, 518, 213), 1)},
    "|a|1 > 10": 112, "classes": 76, "classes per record, mean": 1.45,
    "codes in the source": 15_197, "codes per record, mean": 8.15,
    "unlabelled records": 332_030, "all-zero label rows in train": 389_309,
    "train records": 721_002, "val records": 39_464, "test records": 39_569,
    "val first in stay": 14_456, "test first in stay": 14_237,
    "train pairs": 575_784, "val pairs": 31_397, "test pairs": 31_502,
    "train changed pairs": 155_766, "val changed pairs": 8_644, "test changed pairs": 8_431,
    "records with I10": 181_341, "records with I25": 144_756, "records with I48": 123_899,
    "records with I50": 122_684, "records with I12": 70_871,
}
PAIR_KINDS = ("pairs within a stay", "pairs between stays", "pairs touching an unlabelled record")
SHARE_OF = {  # what these counts are shares of; the |a|1 are shares of the changed pairs
    "patients": ("patients with one record", "patients with two or more"),
    "records": ("labelled records", "unlabelled records"),
    "pairs": ("stable pairs", "changed pairs", *PAIR_KINDS)}


def count(cohort: Cohort) -> dict[str, float]:
    """All that summaries and figures tell of a cohort in numbers; A's and B's as in GOLDEN.

    Without stays, or by PTB-XL's dates, which may be interpolated, nothing is counted.
    """
    records = np.unique(cohort.subject_id, return_counts=True)[1]
    change = np.abs(cohort.action).sum(axis=1, dtype=np.int64)  # (P,) |a|1
    source = cohort.pair[:, 0]
    changing = np.unique(cohort.subject_id[source[change > 0]]).size
    positives = cohort.label.sum(axis=0, dtype=np.int64)  # (K,)
    counts = {
        "records": len(cohort),
        "patients": len(records),
        "patients with one record": (records == 1).sum(),
        "patients with two or more": (records > 1).sum(),
        "records per patient, mean": records.mean(),
        "records per patient, median": np.median(records),
        "records per patient, max": records.max(),
        "pairs": len(change),
        "no pair, for a time is missing": len(cohort) - len(records) - len(change),
        "stable pairs": (change == 0).sum(),
        "changed pairs": (change > 0).sum(),
        "patients with a changed pair": changing,
        "changed pairs per such patient": (change > 0).sum() / max(changing, 1),
        **{f"|a|1 = {size}": (change == size).sum() for size in range(1, 11)},
        "|a|1 > 10": (change > 10).sum(),
        "classes": len(positives),
        "classes per record, mean": positives.sum() / len(cohort),
        "codes in the source": cohort.codes["distinct"],
        "codes per record, mean": cohort.codes["per_record"],
        "labelled records": cohort.has_label.sum(),
        "unlabelled records": (~cohort.has_label).sum(),
    }
    for s, split in enumerate(SPLITS):
        inside, pairs = cohort.split == s, cohort.split[source] == s
        counts |= {
            f"{split} records": inside.sum(),
            f"{split} patients": np.unique(cohort.subject_id[inside]).size,
            f"{split} first in stay": (inside & (cohort.ecg_no_within_stay == 0)).sum(),
            f"{split} pairs": pairs.sum(),
            f"{split} changed pairs": (pairs & (change > 0)).sum(),
            f"all-zero label rows in {split}": (inside & ~cohort.label.any(axis=1)).sum(),
        }
    if (cohort.ecg_no_within_stay >= 0).any():
        counts |= {name: (cohort.pair_kind == kind).sum() for kind, name in enumerate(PAIR_KINDS)}
    if cohort.source != "ptbxl":
        counts["pairs of gap 0"] = (cohort.gap_days == 0).sum()
    counts |= {f"quality: {name}": ((cohort.quality & bit) > 0).sum()
               for name, bit in QUALITY.items()}
    counts |= {f"records with {name}": n for name, n in zip(cohort.class_name, positives)}
    return {name: np.asarray(value).item() for name, value in counts.items()}


def count_rows(counts: dict[str, float]) -> list[tuple[str, str, str]]:
    """Counts as text (name, number, share), for a terminal as for a table; classes left out."""
    of = {name: whole for whole, names in SHARE_OF.items() for name in names}
    of |= {name: "changed pairs" for name in counts if name.startswith("|a|1")}
    return [(name, f"{value:,.2f}" if isinstance(value, float) and value % 1 else f"{value:,.0f}",
             f"{value / counts[of[name]]:.1%}" if counts.get(of.get(name)) else "")
            for name, value in counts.items() if not name.startswith("records with ")]


def golden_lines(cohort: Cohort, counts: dict[str, float]) -> list[str]:
    """Verdict on the known counts and those that differ; they hold for the whole release only."""
    if cohort.source != "mimic":
        return []
    if cohort.listed != GOLDEN["records"] or cohort.arguments["patients"] is not None:
        return ["partial build: the known counts of the full release do not apply"]
    wrong = []
    for name, wanted in GOLDEN.items():
        found = counts.get(name, math.nan)
        tolerance = 0.005 + 1e-9 if isinstance(wanted, float) else 0  # a float was printed rounded
        if not abs(found - wanted) <= tolerance:  # a missing count is NaN: it differs
            wrong.append(f"{name}: {found:,.12g} found, {wanted:,} wanted")
    verdict = f"{len(wrong)} differ" if wrong else f"PASS, all {len(GOLDEN)} agree"
    return [f"known counts of the full release: {verdict}", *wrong]


# ----------------------------------------------------------------------------------------------
# Beyond the papers
# PTB-XL as a cohort (Wagner et al. 2020): future work of A, taken up now
# ----------------------------------------------------------------------------------------------


def read_ptbxl(root: Path, fs: int, patients: int | None) -> dict:
    """Table of a PTB-XL folder: classes are the SCP statements of scp_statements.csv, sorted.

    Every key of scp_codes is a label, whatever its likelihood. Folds 1 to 8 train, 9 validates, 10
    tests. Takes records100 or records500, whichever is there and nearest to fs. Stays are unknown
    (-1), so triage is not defined.
    """
    usable = [hz for hz in (100, 500) if hz % fs == 0 and (root / f"records{hz}").is_dir()]
    if not usable:
        found = ", ".join(path.name for path in root.glob("records*")) or "nothing"
        raise InputError(f"{root}: found: {found}; wanted: a folder records100 or records500 at a "
                         f"multiple of {fs} Hz")
    tally, database = Tally(), root / "ptbxl_database.csv"
    statements, _ = read_rows(root / "scp_statements.csv", {"": str.strip}, {}, "statement", tally)
    classes = sorted(filter(None, statements))
    known, listed = read_rows(database, {
        "ecg_id": number, "patient_id": number,
        "scp_codes": lambda text: tuple(map(str.upper, parse_codes(text))),
        "strat_fold": within(1, 10),
        "filename_lr" if min(usable) == 100 else "filename_hr": record_path,
    }, {"recording_date": (one_clock(), -1), "age": (years, math.nan),
        "sex": ({"0": 1, "1": 0, "0.0": 1, "1.0": 0}.__getitem__, -1)},  # the release: 0 male
        "label row", tally)
    rows = [ROW(patient_id, date, ecg_id, fold, max(fold - 8, 0), -1, -1, age, sex, len(codes) > 0,
                codes, path)
            for ecg_id, patient_id, codes, fold, path, date, age, sex in filter(None,
                                                                                known.values())]
    check_codes(f"{database.name}, scp_codes",
                [(f"ecg_id {row.study_id}", row.codes) for row in rows], classes,
                lambda code: code if code in classes else "",
                f"scp_statements.csv, {len(classes)} in its first column, such as "
                f"{printable(', '.join(classes[:3]))}", tally)
    distinct = set().union(*(row.codes for row in rows))
    return make_table(root, rows, classes, str, patients, tally, listed=listed,
                      codes={"distinct": len(distinct)},
                      normal_codes=[code for code in ("NORM", "SR") if code in classes])


# ----------------------------------------------------------------------------------------------
# Demo waveforms: a heart vector of Gaussian waves (McSharry et al. 2003; Sameni et al. 2007) seen
# through Dower's lead matrix (Dower et al. 1980). Frank's axes: x left, y down, z back
# ----------------------------------------------------------------------------------------------

NUISANCE = 1.0  # scale of what differs between recordings of one state

DOWER = np.array([[0.632, -0.235, 0.059], [0.235, 1.066, -0.132], [-0.515, 0.157, -0.917],
                  [0.044, 0.164, -1.387], [0.882, 0.098, -1.277], [1.213, 0.127, -0.601],
                  [1.125, 0.127, -0.086], [0.831, 0.076, 0.230]])  # I, II, V1 ... V6
TWELVE = np.zeros((12, 8), np.float32)  # LEADS from I, II, V1 ... V6, by Kirchhoff
TWELVE[:6, :2] = [[1, 0], [0, 1], [-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]]
TWELVE[6:, 2:] = np.eye(6)

# name: centre s from the R peak, width (one sigma) s, x y z mV; at RR 1 s, in a person of no code.
# Waves of amplitude 0 are places where a code may put one: PR segment, late QRS, early and late ST.
WAVES = {"Pr": (-0.150, 0.020, 0.02, 0.075, -0.055), "Pl": (-0.125, 0.020, 0.06, 0.055, 0.035),
         "PR": (-0.080, 0.026, 0, 0, 0), "Q": (-0.026, 0.008, -0.14, -0.08, -0.33),
         "R": (0, 0.011, 0.98, 0.62, 0.38), "S": (0.027, 0.011, -0.22, -0.14, 0.58),
         "L": (0.066, 0.016, 0, 0, 0), "J": (0.105, 0.032, 0, 0, 0), "K": (0.180, 0.045, 0, 0, 0),
         "T": (0.250, 0.050, 0.16, 0.09, -0.10), "U": (0.302, 0.032, 0.13, 0.075, -0.095)}
ATRIAL, QRS, REPOL = slice(0, 3), slice(3, 7), slice(7, 11)

# What a code does, each effect times the patient's severity (about 1): bpm added, s of PR added,
# fractions of QRS width and of voltage added, mV added to waves. Additive, so codes combine.
SIGNATURE = {
    "I10": {"R": (0.38, -0.05, 0.20), "Pl": (0.02, 0, 0.04), "T": (-0.10, -0.03, 0.06),
            "U": (-0.09, -0.02, 0.05)},
    "I12": {"R": (0.20, 0, 0.10), "T": (-0.10, -0.06, 0.06), "U": (0.14, 0.14, -0.20)},
    "I26": {"bpm": 28, "Q": (0.12, -0.30, 0), "S": (-0.45, 0.12, -0.10), "T": (0.04, -0.14, 0.16),
            "U": (0.04, -0.13, 0.16)},
    "I27": {"Pr": (0, 0.09, -0.05), "R": (-0.60, 0.10, -0.60), "S": (-0.30, 0.05, -0.15),
            "T": (0, -0.04, 0.12), "U": (0, -0.04, 0.12)},
    "I30": {"PR": (-0.05, -0.06, 0.01), "J": (0.17, 0.14, -0.06), "K": (0.15, 0.12, -0.06)},
    "I31": {"bpm": 12, "gain": -0.35},
    "I34": {"Pl": (0.12, 0.06, 0.17), "PR": (0.07, 0.04, 0.08)},
    "I35": {"R": (0.75, 0.05, 0.45), "J": (-0.08, -0.05, 0.05), "K": (-0.08, -0.04, 0.03),
            "T": (-0.26, -0.14, 0.10), "U": (-0.24, -0.12, 0.10)},
    "I42": {"width": 0.20, "Q": (0.12, 0.08, 0.30), "R": (-0.10, -0.15, 0.25),
            "T": (-0.16, -0.08, 0.02), "U": (-0.13, -0.07, 0.02)},
    "I45": {"S": (0.15, 0.05, -0.20), "L": (-0.62, 0.02, -0.62), "T": (0.06, 0.02, 0.18),
            "U": (0.05, 0, 0.16)},
    "I50": {"bpm": 12, "width": 0.10, "gain": -0.15, "Pl": (0.02, 0, 0.05),
            "T": (-0.10, -0.06, 0.03), "U": (-0.08, -0.05, 0.03)},
    "I95": {"bpm": 18},
    "I21": {"J": 0.36, "K": 0.36, "T": 0.24, "U": 0.06, "R": -0.08},  # mV towards the patient's
    "I25": {"Q": -0.42, "R": -0.20, "T": -0.22, "U": -0.20},  # coronary TERRITORY
    "I44": {"pr": 0.09},  # or LBBB, by patient
    "I47": {}, "I48": {}, "I49": {},  # rhythm: _rhythm, _heart_vector
    "I63": {}, "I73": {}, "I82": {}}
SILENT = ("I63", "I73", "I82")  # do not change the ECG, as in life
LBBB = {"width": 0.34, "Q": (0.28, 0.10, 0.42), "S": (0.95, 0.32, 0.30), "L": (0.25, 0.05, 0.35),
        "J": (-0.08, 0, -0.13), "K": (-0.13, -0.04, -0.13), "T": (-0.30, -0.13, -0.18),
        "U": (-0.23, -0.11, -0.13)}
# Where ischaemia points: front, below, left
TERRITORY = np.array([(0.25, 0.05, -1.0), (-0.20, 1.0, 0.25), (0.95, -0.22, 0.30)])


def _stream(component: str, *key: int) -> np.random.Generator:
    """A component's own random stream: (patient) for anatomy, (patient, seed) for a recording."""
    return np.random.default_rng([zlib.crc32(component.encode()), *key])


def _rotation(angle: np.ndarray) -> np.ndarray:
    """(3,) radians about x, y, z -> (3, 3)."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angle), np.sin(angle)
    return (np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
            @ np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
            @ np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]]))


def _waves(patient: int, codes: set, seed: int, nuisance: float) -> tuple[np.ndarray, float]:
    """A patient's sinus beat in a state, (waves, 5) as in WAVES, and the rate in bpm."""
    rng, beat = _stream("shape", patient), np.array(list(WAVES.values()), dtype=float)
    size = np.linalg.norm(beat[:, 2:], axis=1, keepdims=True)
    beat[:, 2:] += 0.24 * size * rng.standard_normal((len(beat), 3))
    beat[:, 1] *= np.exp(0.10 * rng.standard_normal(len(beat)))
    beat[ATRIAL, 0] += 0.015 * rng.standard_normal()
    beat[REPOL, :2] *= np.exp(0.06 * rng.standard_normal())
    beat[:, 2:] *= np.exp(0.18 * rng.standard_normal())
    width, wider, gain = np.exp(0.07 * rng.standard_normal()), 0.0, 1.0
    today = _stream("rate", patient, seed).standard_normal()
    bpm = 72 + 9 * rng.standard_normal() + 8 * nuisance * today
    axis = TERRITORY[_stream("territory", patient).choice(3, p=[0.45, 0.35, 0.2])]  # for life
    left = _stream("block", patient).random() < 0.6 and "I45" not in codes  # else a long PR
    for code in sorted(codes):
        own, today = _stream(code, patient), _stream(code, patient, seed)
        severity = np.exp(0.15 + 0.25 * own.standard_normal()
                          + 0.12 * nuisance * today.standard_normal())
        for what, value in (LBBB if code == "I44" and left else SIGNATURE[code]).items():
            if what == "bpm":
                bpm += severity * value
            elif what == "pr":
                beat[ATRIAL, 0] -= severity * value
            elif what == "width":
                wider += severity * value
            elif what == "gain":
                gain *= (1 + value) ** severity
            else:
                toward = axis if np.isscalar(value) else 1
                beat[list(WAVES).index(what), 2:] += severity * np.multiply(value, toward)
    wider = 0.5 * np.tanh(wider / 0.5)  # several codes at once saturate
    beat[QRS, :2] *= width * (1 + wider)
    beat[REPOL, 0] += 0.06 * wider  # a wide QRS pushes ST and T back
    beat[ATRIAL, 0] -= 0.03 * wider
    size = np.linalg.norm(beat[REPOL, 2:], axis=1, keepdims=True) / 0.5 + 1e-9
    beat[REPOL, 2:] *= gain * np.tanh(size) / size
    beat[:REPOL.start, 2:] *= gain
    return beat, float(np.clip(bpm, 42, 150))


def _rhythm(patient: int, codes: set, seed: int, bpm: float, seconds: float,
            ventricular: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R times s, the RR interval before each s, and whether each beat is ectopic."""
    rng, n = _stream("rr", patient, seed), int(seconds * 4) + 8
    phase, breath, jitter = rng.random(), rng.random(2), rng.standard_normal(n)
    if "I47" in codes:  # re-entry: fast and regular
        bpm = 168 + 14 * _stream("re-entry", patient).standard_normal() + 0.1 * (bpm - 72)
    elif "I48" in codes:
        bpm = 92 * np.exp(0.2 * _stream("conduction", patient).standard_normal()) + 0.6 * (bpm - 72)
    if "I48" in codes:  # conducted at random
        rr = 60 / max(bpm, 50) * (0.58 + 0.84 * _stream("fibrillation", patient, seed).random(n))
    else:  # sinus arrhythmia goes with breath
        angle = 2 * math.pi * ((0.2 + 0.1 * breath[0]) * np.arange(n) * 60 / bpm + breath[1])
        calm = 0.2 if "I47" in codes else 1
        rr = 60 / bpm * (1 + calm * (0.035 * np.sin(angle) + 0.012 * jitter))
    rr, ectopic = np.maximum(rr, 0.29), np.zeros(n, dtype=bool)
    if "I49" in codes:  # one early beat at least
        draw = _stream("early beats", patient, seed)
        inside = np.flatnonzero((np.cumsum(rr) > 1.2) & (np.cumsum(rr) < seconds - 1.2))[::2]
        early = draw.choice(inside, min(len(inside), 1 + draw.poisson(1.6)), replace=False)
        ectopic[early] = True
        pause = 2 - 0.62 if ventricular else 1.08  # compensatory, if ventricular
        rr[early], rr[early + 1] = 0.62 * rr[early], pause * rr[early + 1]
    return np.cumsum(rr) - (1 + phase) * rr[0], rr, ectopic


def _fibrillation(patient: int, seed: int, time: np.ndarray) -> np.ndarray:
    """f-waves (3, T) mV: 5-8 Hz, drifting in rate and size, largest in V1."""
    own, now = _stream("f-wave", patient), _stream("f-wave", patient, seed)
    hertz, phase = 6.3 + 0.7 * own.standard_normal(), 2 * math.pi * now.random(4)
    size = 0.075 * np.exp(0.3 * own.standard_normal())
    angle = (2 * math.pi * hertz * time + phase[1]
             + 2.6 * np.sin(2 * math.pi * 0.37 * time + phase[0])
             + 0.9 * np.sin(2 * math.pi * 1.3 * time))
    swell = 1 + 0.35 * np.sin(2 * math.pi * 0.7 * time + phase[2])
    wave = swell * (np.sin(angle) + 0.35 * np.sin(2 * angle + phase[3]))
    return (size * np.array([[-0.25], [0.5], [-0.5]]) * wave).astype(np.float32)


def _heart_vector(patient: int, codes: set, seed: int, nuisance: float,
                  time: np.ndarray) -> np.ndarray:
    """The heart vector (3, T) mV at `time` s."""
    beat, bpm = _waves(patient, codes, seed, nuisance)
    fs, ventricular = 1 / (time[1] - time[0]), _stream("ectopy", patient).random() < 0.65
    peak, rr, ectopic = _rhythm(patient, codes, seed, bpm, time[-1], ventricular)
    if codes & {"I47", "I48"}:
        beat[ATRIAL, 2:] = 0  # no P: hidden, or fibrillating
    beats = np.repeat(beat[None], len(peak), axis=0)  # (beats, waves, 5)
    beats[:, REPOL, :2] *= np.sqrt(np.clip(rr, 0.36, 1.3))[:, None, None]  # Bazett
    if "I31" in codes:  # alternans: the heart swings
        beats[::2, :, 2:] *= 0.72
    if not ventricular:  # the early beat has another P
        beats[ectopic, ATRIAL, 2:] *= (1, -0.6, 1)
    else:  # it is wide, without P, its T discordant
        rng = _stream("focus", patient)
        focus = rng.choice([-0.9, 0.9], 3) * np.exp(0.2 * rng.standard_normal(3))
        beats[ectopic, ATRIAL, 2:] = 0
        beats[ectopic, QRS, 2:] = np.array([0.25, 1, 0.75, 0.25])[:, None] * focus
        beats[ectopic, QRS, :2] = np.array(list(WAVES.values()))[QRS, :2] * (1.2, 1.65)
        beats[ectopic, REPOL, 0] += 0.03
        beats[ectopic, REPOL, 2:] = -np.array([0.12, 0.22, 0.3, 0.2])[:, None] * focus
    near = (peak > -0.8) & (peak < time[-1] + 0.6)
    peak, beats = peak[near], beats[near]
    start = np.round((peak - 0.48) * fs).astype(int)  # .48 s before R, .62 s after
    grid = start[:, None] + np.arange(int(1.1 * fs))  # (beats, window)
    offset = (grid / fs - peak[:, None]).astype(np.float32)
    beats = beats.astype(np.float32)[:, None]  # (beats, 1, waves, 5)
    sigmas = (offset[:, :, None] - beats[..., 0]) / beats[..., 1]  # (beats, window, waves)
    local = np.exp(np.square(sigmas) * -0.5) @ beats[:, 0, :, 2:]  # (beats, window, 3)
    pad = int(2 * fs)  # room for beats that begin outside
    out = np.zeros((len(time) + 2 * pad, 3), dtype=np.float32)
    for b, first in enumerate(start + pad):
        out[first:first + grid.shape[1]] += local[b]
    out = out[pad:-pad].T
    return out + _fibrillation(patient, seed, time) if "I48" in codes else out


def _leads(patient: int, seed: int, nuisance: float) -> np.ndarray:
    """The lead matrix (8, 3): the patient's heart and torso, this recording's electrodes."""
    own, now = _stream("torso", patient), _stream("electrodes", patient, seed)
    matrix = DOWER @ _rotation(np.array([0.22, 0.30, 0.33]) * own.standard_normal(3))
    matrix = matrix * np.exp(0.12 * own.standard_normal((8, 1)))
    matrix = matrix + 0.06 * own.standard_normal((8, 3))
    matrix = matrix @ _rotation(0.06 * nuisance * now.standard_normal(3))  # posture, breath
    chest = matrix[2:]
    toward = np.gradient(chest, axis=0)  # along the row V1 ... V6
    moved = chest + nuisance * 0.20 * now.standard_normal((6, 1)) * toward
    limb = matrix[:2] + nuisance * 0.03 * now.standard_normal((2, 3))
    matrix = np.concatenate([limb, moved]) * np.exp(0.05 * nuisance * now.standard_normal((8, 1)))
    return matrix.astype(np.float32)


def _noise(patient: int, seed: int, nuisance: float, time: np.ndarray) -> np.ndarray:
    """Baseline wander, mains and muscle on the eight independent leads, (8, T) mV."""
    rng = _stream("noise", patient, seed)
    level = nuisance * np.exp(0.3 * _stream("noise level", patient).standard_normal()
                              + 0.5 * rng.standard_normal(2))
    hertz = np.array([0.08, 0.17, 0.29, 0.45, 60])
    size = level[0] * np.array([0.05, 0.05, 0.05, 0.02, 0.004]) * rng.standard_normal((8, 2, 5))
    angle = (2 * math.pi * (hertz[:, None] * time + rng.random((5, 1)))).astype(np.float32)
    size = size.astype(np.float32)
    wander = size[:, 0] @ np.sin(angle) + size[:, 1] @ np.cos(angle)  # (8, 5) @ (5, T)
    muscle = rng.standard_normal((8, len(time) + 1), dtype=np.float32)
    return wander + np.float32(0.008 * level[1]) * (muscle[:, 1:] + muscle[:, :-1])


def simulate(patient: int, codes, seed: int, fs: float = 500, seconds: float = 10,
             nuisance: float = NUISANCE) -> np.ndarray:
    """One 12-lead ECG of a patient who truly has `codes`.

    Every component draws from a stream of its own: what is the patient's (anatomy, base rate,
    severity of a code) is keyed by (component, patient), what is the recording's (rate of the day,
    electrodes, RR, noise) by (component, patient, seed). So adding a code changes what the code
    changes and nothing else. A record of the demo cohort is simulate(subject_id, its state,
    study_id), but for rounding to 5 uV and planted defects.

    Args:
        patient, seed: integers >= 0. codes: three-character ICD-10 codes out of SIGNATURE.
        fs: Hz; below 250 the QRS aliases: simulate at 500 and decimate.
        nuisance: scale of the differences between recordings of one state, >= 0.
    Returns: (12, fs * seconds) float32 mV, LEADS order.
    Raises: InputError for an unknown code or a negative integer.
    """
    codes = {codes} if isinstance(codes, str) else set(codes)
    if unknown := sorted(codes - set(SIGNATURE)):
        raise InputError(f"codes: {', '.join(map(str, unknown))} cannot be simulated; "
                         f"known are {' '.join(sorted(SIGNATURE))}")
    if patient < 0 or seed < 0:
        raise InputError(f"patient {patient}, seed {seed}: integers >= 0 are wanted")
    patient, seed = int(patient), int(seed)
    time = np.arange(round(fs * seconds)) / fs
    eight = _leads(patient, seed, nuisance) @ _heart_vector(patient, codes, seed, nuisance, time)
    return TWELVE @ (eight + _noise(patient, seed, nuisance, time))  # (12, 8) @ (8, T)


def resimulate(cohort: Cohort, row: int, codes, other: int = 0) -> np.ndarray:
    """(12, T) float16 mV: what the demo cohort would store, had the patient of `row` had `codes`.

    `other` is added to the seed: another recording. Without planted defects and 5 uV steps.
    """
    x = simulate(cohort.subject_id[row], codes, cohort.study_id[row] + other,
                 nuisance=cohort.arguments["nuisance"])  # (12, 5000), 500 Hz
    return decimate(x, 500 // cohort.fs)[:, :SECONDS * cohort.fs].astype(np.float16)


def without_signature(cohort: Cohort) -> list[str]:
    """Classes of a synthetic cohort that do not change the ECG: negative controls of read-outs."""
    return [name for name in cohort.class_name if cohort.synthetic and name in SILENT]


# ----------------------------------------------------------------------------------------------
# Demo cohort: histories of patients, written as WFDB records in MIMIC-IV-ECG's layout
# ----------------------------------------------------------------------------------------------

DEMO_PATIENTS = 2400  # 10 % of the training patients then hold about 400 training pairs
FOLDS = "50/10/40"  # % of patients to train, validate, test; the last cost only being simulated
LABEL_FIDELITY = 0.85  # 1: coded = expressed; below: omitted, wrong and silent codes
MAX_RECORDS = 30  # of one patient; MIMIC: 260
SPACING = 100_000  # subject_ids set aside for one --seed, so that another has other people
STORED_LEADS = LEADS[:4] + ("aVF", "aVL") + LEADS[6:]  # MIMIC's order
GAIN, NAN_ADU = 200.0, -32768  # adu per mV; NaN in format 16

# code: how it behaves, prevalence in % of the stays at 62 years, log odds per 10 years, comorbidity
# (log odds added by an active code), subcodes. Long-tailed; a code comes after those it depends on.
COURSE = {
    "I10": ("chronic", 45, 0.35, {}, "I10"),
    "I12": ("chronic", 9, 0.25, {"I10": -1.5}, "I129 I120"),
    "I25": ("chronic", 20, 0.55, {"I10": 0.7, "I12": 0.7}, "I2510 I252 I255"),
    "I35": ("chronic", 4, 0.60, {"I10": 0.3}, "I350 I351"),
    "I42": ("chronic", 3.5, 0.05, {"I25": 0.9}, "I429 I420"),
    "I50": ("chronic", 9, 0.45, {"I25": 1.0, "I42": 2.2, "I35": 1.0, "I12": 1.0},
            "I5022 I5032 I509"),
    "I48": ("paroxysmal", 13, 0.60, {"I50": 1.1, "I35": 0.6, "I10": 0.3}, "I4891 I480 I482"),
    "I34": ("chronic", 4, 0.30, {"I50": 1.0, "I48": 0.8}, "I340 I348"),
    "I27": ("chronic", 4, 0.15, {"I50": 1.2}, "I2720 I2789"),
    "I44": ("chronic", 5, 0.45, {"I25": 0.7, "I42": 1.0, "I35": 0.6}, "I447 I440"),
    "I45": ("chronic", 4, 0.45, {"I25": 0.4, "I27": 0.4}, "I4510 I452"),
    "I47": ("paroxysmal", 3.5, 0.05, {"I42": 1.0, "I48": 0.5}, "I471 I472"),
    "I49": ("paroxysmal", 5, 0.20, {"I42": 1.0, "I25": 0.4, "I50": 0.4}, "I493 I491"),
    "I21": ("acute", 5, 0.30, {"I25": 0.8, "I10": 0.3}, "I214 I2109"),
    "I26": ("acute", 3.5, 0.10, {"I82": 2.5}, "I2699 I2692"),
    "I30": ("acute", 2.2, -0.25, {}, "I309 I308"),
    "I31": ("acute", 3, 0.05, {"I30": 2.5}, "I313 I319"),
    "I95": ("acute", 8, 0.20, {"I50": 0.5}, "I959 I9581"),
    "I63": ("acute", 2.5, 0.35, {"I48": 1.0, "I10": 0.4}, "I639 I6350"),
    "I73": ("chronic", 4, 0.35, {"I25": 0.9, "I10": 0.4}, "I739"),
    "I82": ("acute", 3, 0.10, {}, "I82409 I82402")}
OTHER_CODES = ("E785 E119 N179 K219 Z87891 F329 D649 J449 N189 E039 E871 J189 G4733 M109 R079 "
               "Z7901 F419 E669 N390 D62 Z794 Y929 E1165 K5900 J9601 R0789 G8929 R55").split()

DEMO_FILES = {  # name: columns; the first two as in the releases
    "record_list.csv": "subject_id study_id file_name ecg_time path",
    "records_w_diag_icd10.csv": "file_name study_id subject_id ecg_time ed_stay_id ed_hadm_id "
    "hosp_hadm_id ed_diag_ed ed_diag_hosp hosp_diag_hosp all_diag_hosp all_diag_all gender age "
    "anchor_year anchor_age dod ecg_no_within_stay ecg_taken_in_ed ecg_taken_in_hosp "
    "ecg_taken_in_ed_or_hosp fold strat_fold",
    "demo_state.csv": "study_id state"}


def _episode(rng: np.random.Generator, carried: dict, frailty: float, age: float,
             first: bool) -> set:
    """The codes active in the next episode; `carried` {code: burden} is updated in place."""
    active, draws = set(), rng.random((len(COURSE), 2))
    for (code, (kind, percent, slope, links, _)), (u, v) in zip(COURSE.items(), draws):
        logit = (math.log(percent / (100 - percent)) + slope * (age - 62) / 10 + frailty - 0.76
                 + sum(odds for other, odds in links.items() if other in active))
        p = 1 / (1 + math.exp(-logit))
        if kind == "acute":
            if u < p:
                active.add(code)
        elif code in carried:
            if kind == "chronic" and code not in ("I25", "I10") and v < 0.04:
                del carried[code]  # resolved
            elif kind == "chronic" or v < carried[code]:
                active.add(code)
        elif u < p * (1 if first else 0.08):
            carried[code] = 0.35 + 0.65 * v  # share of episodes, if paroxysmal
            active.add(code)
    if "I21" in active:
        carried["I25"] = 1.0  # irreversible: a scar from now on
    return active


def demo_history(subject_id: int, label_fidelity: float = LABEL_FIDELITY) -> list[dict]:
    """A patient's records without their signals: the columns of both CSVs, plus `state`.

    Codes belong to a stay and are the same for its records; records outside any stay carry none.
    `state` lists what the ECG truly expresses: an active code may be silent for life, a paroxysm
    over when the ECG is taken, both more often the lower `label_fidelity`.
    """
    rng, coding = _stream("history", subject_id), _stream("coding", subject_id)
    total = int(np.clip(math.ceil(math.exp(0.5 + 1.35 * rng.standard_normal())), 1, MAX_RECORDS))
    age = float(np.clip(62 + 17 * rng.standard_normal(), 18, 96))
    frailty = 0.7 * rng.standard_normal() + 0.25 * math.log(total)  # the sick: recorded more often
    outside = rng.choice([0.96, 0.14], p=[0.30, 0.70])  # most records of some are uncoded,
    frailty -= 0.5 * (outside > 0.5)  # of people in better health
    now = datetime(2110, 1, 1)
    now += timedelta(minutes=int(rng.integers(90 * 525_960)))
    person = dict(gender="M" if rng.random() < 0.51 else "F", anchor_year=now.year,
                  anchor_age=int(age), dod="", subject_id=subject_id)
    u = _stream("fold", subject_id).random()  # of its own: FOLDS move no history
    person["fold"] = person["strat_fold"] = int(36 * u) if u < 0.5 else 18 if u < 0.6 else 19
    doubt = 1 - label_fidelity
    silent = dict(zip(COURSE, coding.random(len(COURSE)) < 0.5 * doubt))
    other = rng.choice(OTHER_CODES, 12, replace=False).tolist()
    carried, rows = {}, []
    while len(rows) < total:
        years = now.year - person["anchor_year"]
        active = _episode(rng, carried, frailty, age + years, first=not rows)
        in_stay, in_ed, size = rng.random() >= outside, rng.random() < 0.45, rng.geometric(0.5)
        listed = []
        for (code, (_, percent, _, _, texts)), u in zip(COURSE.items(), coding.random(len(COURSE))):
            if u >= 0.28 * doubt if code in active else u < 0.35 * doubt * percent / 100:
                listed.append(texts.split()[subject_id % len(texts.split())])
        listed += [code for code in other if rng.random() < 0.65]
        if not in_stay or rng.random() < 0.04:  # a stay without any diagnosis
            listed = []
        ed, hosp = in_stay and in_ed, in_stay and not in_ed
        number_of_stay = 20_000_000 + 64 * (subject_id - 10_000_000) + len(rows)
        stay = dict(  # the same in all records of the stay
            ed_stay_id=number_of_stay + 10_000_000 if ed else "", ed_hadm_id="",
            hosp_hadm_id=number_of_stay if hosp else "", age=int(age) + years,
            ed_diag_ed=listed if ed else [], ed_diag_hosp=[], all_diag_all=listed,
            hosp_diag_hosp=listed if hosp else [], all_diag_hosp=listed if hosp else [],
            ecg_taken_in_ed=ed, ecg_taken_in_hosp=hosp, ecg_taken_in_ed_or_hosp=in_stay)
        for position in range(min(int(size) if in_stay else 1, total - len(rows))):
            over = coding.random(len(COURSE)) < 0.6 * doubt
            state = [c for c, gone in zip(COURSE, over) if c in active and not silent[c]
                     and not (gone and COURSE[c][0] == "paroxysmal")]
            study_id = 40_000_000 + 64 * (subject_id - 10_000_000) + len(rows)
            name = f"files/p{str(subject_id)[:4]}/p{subject_id}/s{study_id}/{study_id}"
            rows.append(dict(person, **stay, study_id=study_id, file_name=name, path=name,
                             ecg_time=str(now), ecg_no_within_stay=position if in_stay else -1,
                             state=state))
            now += timedelta(minutes=int(20 + 1440 * rng.exponential()))
        now += timedelta(minutes=int(1440 * math.exp(4.2 + 1.7 * rng.standard_normal())))
    for row in rows if rng.random() < 0.2 else ():
        row["dod"] = str((now + timedelta(days=1)).date())
    return rows


def _defect(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Defects at MIMIC's rates, in place: (12, T) int16 adu."""
    kind, lead, at = rng.random(), rng.integers(12), int(rng.integers(signal.shape[1] - 600))
    if kind < 0.0132:
        signal[lead, at:at + int(rng.choice([12, 40, 400]))] = NAN_ADU  # short gaps, long ones
    elif kind < 0.0132 + 0.0024:
        signal[lead] = 0
    elif kind < 0.0132 + 0.0024 + 0.0012:
        signal[lead, at:at + 60] = int(rng.choice([-1, 1])) * 12 * GAIN  # beyond 10 mV
    return signal


def _write_patient(root: Path, label_fidelity: float, nuisance: float, subject_id: int
                   ) -> list[dict]:
    """Write a patient's records, each file whole or not at all; returns the rows of the CSVs."""
    rows = demo_history(subject_id, label_fidelity)
    for row in rows:
        dat, hea = (root / f"{row['path']}{end}" for end in (".dat", ".hea"))
        if hea.exists() and dat.exists() and dat.stat().st_size == 24 * 5000:
            continue  # finished by an earlier run
        signal = simulate(subject_id, row["state"], row["study_id"], nuisance=nuisance)
        adu = np.clip(np.rint(signal * GAIN), -32767, 32767).astype("<i2")
        adu = _defect(adu, _stream("defect", subject_id, row["study_id"]))
        adu = adu[[LEADS.index(lead) for lead in STORED_LEADS]]
        lines = [f"{hea.stem} 12 500 {adu.shape[1]}", *(
            f"{dat.name} 16 {GAIN}(0)/mV 16 0 {own[0]} {own.sum(dtype=np.int16)} 0 {lead}"
            for lead, own in zip(STORED_LEADS, adu)), ""]
        dat.parent.mkdir(parents=True, exist_ok=True)
        # the signal first: a header says that its record is there
        replace_file(dat, adu.T.tobytes(), sync=False)
        replace_file(hea, "\n".join(lines).encode(), sync=False)
    return rows


def write_demo(root: str | Path, patients: int = DEMO_PATIENTS,
               label_fidelity: float = LABEL_FIDELITY, nuisance: float = NUISANCE, seed: int = 0,
               workers: int = 1) -> None:
    """Write the demo cohort under `root` as MIMIC-IV-ECG would lie there, plus demo_state.csv.

    Deterministic in (label_fidelity, nuisance, seed); patient i does not depend on `patients`.
    Records already there are kept, so a killed run goes on where it stopped. Raises: InputError
    where `root` holds a demo of other knobs, or anything else.
    """
    root, first = Path(root), 10_000_000 + SPACING * seed
    identity, own = root / "demo.json", json.dumps(dict(
        label_fidelity=float(label_fidelity), nuisance=float(nuisance), seed=int(seed),
        folds=FOLDS))
    others = root.is_dir() and {file.name for file in root.iterdir()} - {"lock", "demo.json.tmp"}
    there = identity.read_text(errors="replace") if identity.exists() else "other files"
    if others and there != own:
        raise InputError(f"--root {root}: found: a folder of {there[:200]}; wanted: an empty one, "
                         f"or the demo of {own}; nothing there was touched")
    write = functools.partial(_write_patient, root, label_fidelity, nuisance)
    histories, progress = [], Progress(patients, "patients", "simulating")
    with locked(root, f"--root {root}: another process writes the demo there; wait for it"):
        replace_file(identity, own.encode())
        with contextlib.closing(in_workers(write, range(first, first + patients), workers)) as done:
            for rows in done:
                histories += rows
                progress.update()
        progress.close()
        for name, columns in DEMO_FILES.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, columns.split(), extrasaction="ignore",
                                    lineterminator="\n")
            writer.writeheader()
            writer.writerows(histories)
            replace_file(root / name, text.getvalue().encode())


def notes(cohort: Cohort) -> list[str]:
    """What is to be said of a file beside its numbers: what of it changed, an older version."""
    if cohort.changed is None:
        return [f"{cohort.path}: an older file, where the signal alone has checksums"]
    if not cohort.changed:
        return []
    return [f"{cohort.path}: {', '.join(cohort.changed)} changed since it was built (checksum): "
            f"`python prepare_data.py --check {shlex.quote(str(cohort.path))}`"]


# ----------------------------------------------------------------------------------------------
# Command line: the three sources
# ----------------------------------------------------------------------------------------------


def summary(cohort: Cohort) -> str:
    """The cohort in numbers, as in A's Appendix A, as aligned lines for a terminal."""
    counts = count(cohort)
    arguments = ", ".join(f"{k} {v}" for k, v in cohort.arguments.items() if v is not None)
    out = [f"{cohort.path}: {cohort.source}{' (SYNTHETIC)' * cohort.synthetic}, {arguments}"]
    if (cohort.ecg_no_within_stay < 0).all():
        out.append("  no stays in this source: triage is not defined")
    if cohort.source == "ptbxl":
        out.append("  dates may be interpolated (see the data's README): nothing is shown by gap")
    rows = count_rows(counts)
    often = sorted((f"records with {name}" for name in cohort.class_name), key=lambda r: -counts[r])
    rows += [(k, f"{counts[k]:,}", f"{counts[k] / len(cohort):.1%}") for k in often[:10]]
    for name, number_text, share in rows:
        out.append(f"  {name:<54}{number_text:>11}{share:>8}".rstrip())
    left_out = cohort.flaws | cohort.rejected
    out += [f"  {reason}: {left_out.get(reason, 0):,}, e.g. {example}"
            for reason, example in sorted(cohort.rejected_examples.items())]
    out += golden_lines(cohort, counts) + notes(cohort)
    # What is lost, against the lines of the CSV file that lists the records; --patients loses none
    unread = sum(cohort.rejected.get(reason, 0) for reason in REASONS)
    tried = len(cohort) + unread
    lines = cohort.listed - cohort.not_chosen - tried  # lost before a record was looked at
    share = 1 - (1 - lines / max(1, cohort.listed)) * len(cohort) / tried
    if share > 0.05 + 1e-9:
        out.append(f"LOST: {share:.1%} of the listed records are not in {cohort.path} ({lines:,} "
                   f"of {cohort.listed:,} lines, {unread:,} of {tried:,} records tried); the "
                   "reasons stand above, each with an example")
    return "\n".join(out)


def refuse_other(out: Path, identity: dict) -> None:
    """Raise InputError unless the file `out` is a cohort with these entries of its identity."""
    stored = Cohort(out)
    if differs := difference({name: getattr(stored, name) for name in identity}, identity):
        raise InputError(f"--out {out} exists and differs in {differs}; it is never overwritten: "
                         "delete it, or name another --out")


def check_arguments(source, root, fs, labels, workers, patients, label_fidelity, nuisance,
                    seed) -> None:
    """Raise InputError for arguments that are out of range or mean nothing to the source."""
    if source not in SOURCES:
        raise InputError(f"--source {source}: wanted one of {', '.join(SOURCES)}")
    if source != "demo" and not (root and Path(root).is_dir()):
        raise InputError(f"--root: found {root or 'nothing'}; wanted: the folder that holds the "
                         f"CSV files of {source}")
    for name, value, low, high, owner in (
            ("fs", fs, 1, 10_000, source), ("workers", workers, 1, 10_000, source),
            ("patients", patients, 1, SPACING if source == "demo" else 10**9, source),
            ("label-fidelity", label_fidelity, 0, 1, "demo"), ("seed", seed, 0, 2**31, source),
            ("nuisance", nuisance, 0, 10, "demo")):
        if value is not None and source != owner:
            raise InputError(f"--{name}: of --source {owner} alone; leave it out for {source}")
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} {value}: a value from {low} to {high} is wanted")
    if labels is not None and source != "mimic":
        raise InputError(f"--labels: of --source mimic alone; leave it out for {source}")
    if source == "demo" and fs and 500 % fs:
        raise InputError(f"--fs {fs}: a divisor of the demo's 500 Hz is wanted, such as 100 or 50")


def build(source: str, root: str | Path | None = None, out: str | Path | None = None,
          fs: int | None = None, labels: str | Path | None = None, workers: int | None = None,
          patients: int | None = None, label_fidelity: float | None = None,
          nuisance: float | None = None, seed: int = 0) -> Path:
    """Build a cohort file and print its summary; None takes the command line's default.

    An `out` that these very arguments made of the same CSV files and records is left as it is, any
    other existing file is an InputError. Returns: out.
    """
    check_arguments(source, root, fs, labels, workers, patients, label_fidelity, nuisance, seed)
    fs, workers = fs or (500 if source == "mimic" else 100), workers or available_cores()
    root = Path(root or "data/demo")
    out = Path(out or ("data/cohort.h5" if source == "demo" else f"data/{source}.h5"))
    arguments = {"fs": fs, "patients": patients}
    if source == "demo":
        knobs = {"patients": DEMO_PATIENTS if patients is None else patients, "seed": seed,
                 "label_fidelity": LABEL_FIDELITY if label_fidelity is None else label_fidelity,
                 "nuisance": NUISANCE if nuisance is None else nuisance}
        arguments |= knobs | {"folds": FOLDS}
    if out.exists():  # before the demo's folder is touched
        refuse_other(out, {"source": source, "arguments": arguments})
    if source == "demo":
        write_demo(root, workers=workers, **knobs)
    print(f"{root}: reading the CSV files")
    if source == "ptbxl":
        files = [root / "ptbxl_database.csv", root / "scp_statements.csv"]
        table = read_ptbxl(root, fs, patients)
    else:
        files = [root / "record_list.csv", Path(labels or root / "records_w_diag_icd10.csv")]
        table = read_mimic(root, files[1], patients)
    if source == "demo":
        files.append(root / "demo_state.csv")
        state, _ = read_rows(files[2], {"study_id": number, "state": parse_codes}, {}, "state row",
                             Tally())
        if lacking := [study for study in table["study_id"].tolist() if not state.get(study)]:
            raise InputError(f"{files[2]}: no sound row of study_id {lacking[0]} and "
                             f"{len(lacking) - 1} more; delete {root} and simulate anew")
        table["state"] = np.array([[name in state[study_id][1] for name in table["class_name"]]
                                   for study_id in table["study_id"].tolist()], np.uint8)
    identity = {"format_version": FORMAT_VERSION, "source": source, "arguments": arguments,
                "csv_sha256": {file.name: sha256_of(file) for file in files},
                "records_sha256": hashlib.sha256("\n".join(table["path"]).encode()).hexdigest()}
    if out.exists():
        refuse_other(out, identity)
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)  # killed at its end
        print(f"{out}: complete already, built of the same files with the same arguments")
    else:
        synthetic = (root / "demo.json").exists()  # of the demo, whatever reads it
        with workspace(out, table["path"], identity) as folder:
            run_workers(folder, root, table["path"], fs, workers)
            write_cohort(folder, out, table, identity, fs, synthetic)
    print(summary(Cohort(out)))
    return out


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    add = parser.add_argument_group("what to do (one of the two)").add_argument
    add("--source", choices=SOURCES, help="build a cohort file from this source")
    add("--check", metavar="FILE.h5", help="verify a cohort file and print its summary")
    add = parser.add_argument_group("files (defaults in brackets)").add_argument
    add("--root", metavar="DIR", help="folder of the CSV files; of the demo [data/demo]")
    add("--labels", metavar="CSV", help="mimic: from Ext-ICD [ROOT/records_w_diag_icd10.csv]")
    add("--out", metavar="FILE.h5", help="never overwritten [data/SOURCE.h5; demo data/cohort.h5]")
    add("--workers", type=int, metavar="N", help="processes [one per CPU core]")
    add = parser.add_argument_group("content").add_argument
    add("--fs", type=int, metavar="HZ", help="the records' own is a multiple [mimic 500, else 100]")
    add("--patients", type=int, metavar="N",
        help=f"the first N by subject_id [all]; demo: how many to simulate [{DEMO_PATIENTS}]")
    add = parser.add_argument_group("demo cohort").add_argument
    add("--label-fidelity", type=float, metavar="F",
        help=f"0 to 1, how far codes follow the simulated state [{LABEL_FIDELITY}]")
    add("--nuisance", type=float, metavar="F",
        help=f"scale of what differs between recordings of one state [{NUISANCE}]")
    add("--seed", type=int, default=0, metavar="N", help="another has other people [%(default)s]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code of `run_script`."""
    args = vars(make_parser().parse_args(argv))
    check = args.pop("check")

    def work() -> None:
        if (check is None) == (args["source"] is None):
            raise InputError("give either --source (to build) or --check FILE.h5 (to verify)")
        if check is None:
            build(**args)
        else:
            check_cohort(cohort := Cohort(check))
            print("ok: every checksum agrees", summary(cohort), sep="\n")

    return run_script(work, "interrupted; the same command goes on where it stopped")


if __name__ == "__main__":
    sys.exit(main())
