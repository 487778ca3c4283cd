"""Mutates files and gives them to readers: the program that test_fuzz.py launches, so that a crash, a hang or memory
without bound shows as such.

    python tests/grounding/fuzzing.py TASK

TASK is JSON: "folder", with originals in KIND/; "counts": {KIND: how many mutants}; "seed"; "files", to be read as they
are; "seconds" of processor time allowed for a file. A mutant depends on its seed, kind and number alone.
"""

import contextlib
import gzip
import io
import json
import random
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

# Mutations. Each takes bytes and a random.Random, and returns other bytes.

EXTREMES = [b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\0\0", b"\xff\x7f", b"\0\x80", b"\xff" * 4, b"\0" * 4]
EXTREMES += [b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 8, b"\0" * 8]
HOSTILE = [b"NaN", b"-1", b"1e309", b"-1e309", b"9" * 400, b"", b"0", b"null", b"true", b'"x"', b"[]", b"{}", b"1e-320"]
HOSTILE += [b"Infinity", b"0.5", b"-0", b"9999999999", b"[[1]]", b"\xff\xfe", b"\0", b"&amp;", b"\xc3\x97", b"[" * 9000]


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(data, rng):
    value, data = rng.choice(EXTREMES), bytearray(data)
    at = min(int(len(data) * rng.random() ** 2), max(0, len(data) - len(value)))  # more often near the start
    data[at : at + len(value)] = value
    return bytes(data)


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def part(data, rng):
    start = rng.randrange(len(data))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 10)))


def remove(data, rng):
    start, end = part(data, rng)
    return data[:start] + data[end:]


def repeat(data, rng):
    start, end = part(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def insert(data, rng):
    start, _ = part(data, rng)
    return data[:start] + rng.randbytes(rng.randint(1, 64)) + data[start:]


def replace_number(data, rng):
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not numbers:
        return data
    found = rng.choice(numbers)
    return data[: found.start()] + rng.choice(HOSTILE) + data[found.end() :]


def swap_words(data, rng):
    words = re.split(rb"(\W+)", data)
    one, other = rng.randrange(len(words)), rng.randrange(len(words))
    words[one], words[other] = words[other], words[one]
    return b"".join(words)


def change_json(data, rng):
    """One value of a JSON text becomes another of any type, or disappears."""
    try:
        top = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = [(top, key) for key in keys(top)]
    for holder, key in places:  # grows while it is walked
        places += [(holder[key], inner) for inner in keys(holder[key])]
    if not places:
        return data
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice([None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**400, "", "x", [], {}, [[]]])
    return json.dumps(top).encode()


def keys(value):
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    12,
    16,
    17,
    32,
    64,
    255,
    32768,
    65535,
    [0, 0, 16],
    [65535, 65535, 8],
    [1, 0, 0],
    [4, 1, 64],
)
STRINGS = (
    "",
    "0",
    "-1",
    "1e309",
    "-1e309",
    "nan",
    "1e-320",
    "1000000000",
    "0.5\\nan",
    "RGB",
    "MONOCHROME1",
    "YBR_FULL",
)
STRINGS += ("PALETTE COLOR", "YBR_PARTIAL_420", "SIGMOID", "CT", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.2")


def change_element(data, rng):
    """One value of a DICOM file, or of its file meta, becomes another that its kind can hold, or disappears."""
    import pydicom

    file = io.BytesIO()
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        holder = dataset.file_meta if rng.random() < 0.1 else dataset
        element = rng.choice([element for element in holder if element.tag.group in (0x0002, 0x0008, 0x0028)])
        if rng.random() < 0.15:
            del holder[element.tag]
        else:
            element.value = rng.choice(NUMBERS if element.VR in ("US", "SS", "UL") else STRINGS)
        dataset.save_as(file)
    except Exception:  # pydicom will not read or write it
        return data
    return file.getvalue()


BINARY = (flip, overwrite, overwrite, overwrite, truncate, remove, repeat, insert)
TEXT = (replace_number,) * 4 + (swap_words, flip, truncate, remove, repeat, insert)
DICOM = (change_element,) * 4 + BINARY
JSON = (change_json,) * 8 + TEXT


def mutate(data, rng, operations):
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        data = rng.choice(operations)(data, rng) if data else data
    return data


# Readers of a mutated file: (folder to write in, original file, rng) -> None


def read_dicom(folder, original, rng):
    from grounding.images import read_image

    path = folder / "a.dcm"
    path.write_bytes(mutate(original.read_bytes(), rng, DICOM))
    read_image(f"{path}@frame:{rng.randrange(3)}" if rng.random() < 0.3 else path)


def read_nifti(folder, original, rng):
    from grounding.images import read_image

    data, path = original.read_bytes(), folder / rng.choice(("a.nii", "a.nii.gz"))
    if path.suffix == ".gz" and rng.random() < 0.5:
        data = mutate(gzip.compress(data), rng, BINARY)
    else:
        data = mutate(data, rng, BINARY)
        data = gzip.compress(data) if path.suffix == ".gz" else data
    path.write_bytes(data)
    read_image(f"{path}@{rng.choice(('axial', 'coronal', 'sagittal'))}:{rng.randrange(4)}")


def read_picture(folder, original, rng):
    from grounding.images import read_image

    read_image(mutate(original.read_bytes(), rng, BINARY) or b"\0")


def read_annotations(convert, folder, original, rng):
    """`original`: a folder with a source. One of its texts is mutated; all samples are read."""
    from grounding.convert.record import Skipped
    from grounding.types import GroundingSample

    texts = []
    for path in sorted(original.rglob("*.*")):
        copy = folder / original.name / path.relative_to(original)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        texts += [copy] if path.suffix != ".png" else []
    chosen = rng.choice(texts)
    chosen.write_bytes(mutate(chosen.read_bytes(), rng, JSON if chosen.suffix == ".json" else TEXT))
    for item in convert(folder / original.name, "fuzz", "CC0", "xray"):
        with contextlib.suppress(ValueError, OSError):
            assert all(isinstance(row, GroundingSample | Skipped) for row in item.read())


def read_voc(folder, original, rng):
    from grounding.convert.voc import voc

    read_annotations(voc, folder, original, rng)


def read_coco(folder, original, rng):
    from grounding.convert.coco import coco

    read_annotations(coco, folder, original, rng)


def read_yolo(folder, original, rng):
    from grounding.convert.yolo import yolo

    read_annotations(yolo, folder, original, rng)


READERS = {
    "dicom": read_dicom,
    "nifti": read_nifti,
    "picture": read_picture,
    "voc": read_voc,
    "coco": read_coco,
    "yolo": read_yolo,
}


# The program


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a broken file."""


def stop(*_):
    raise Hang


def attempt(call, allowed):
    """(how it ended, what went wrong or None, seconds of processor time)."""
    start, ended, wrong = time.process_time(), "read", None
    signal.setitimer(signal.ITIMER_PROF, allowed)
    try:
        call()
    except (ValueError, OSError):
        ended = "refused"
    except (Exception, Hang):
        ended, wrong = "failed", traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    if seconds > allowed and not wrong:  # in a decoder that no signal interrupts
        ended, wrong = "failed", f"{seconds:.1f} s"
    return ended, wrong, seconds


def program(task):
    """Runs `task` and prints what came out of it as JSON, once it is through."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # spares the machine; what is judged is resident memory
    signal.signal(signal.SIGPROF, stop)
    warnings.simplefilter("ignore")  # of pydicom, while files are mutated
    folder, counts, failures, slowest = Path(task["folder"]), Counter(), [], 0.0
    work = folder / "work"
    work.mkdir(exist_ok=True)
    jobs = [(kind, k) for kind, count in task["counts"].items() for k in range(count)]
    jobs += [("file", name) for name in task["files"]]
    for kind, k in jobs:
        (folder / "at").write_text(f"{kind} {k} of seed {task['seed']}")
        if kind == "file":
            call = partial(read_named, k)
        else:
            rng = random.Random(f"{task['seed']} {kind} {k}")
            call = partial(READERS[kind], work, rng.choice(sorted((folder / kind).iterdir())), rng)
        ended, wrong, seconds = attempt(call, task["seconds"])
        counts[f"{kind} {ended}"] += 1
        slowest = max(slowest, seconds)
        failures += [f"{kind} {k}: {wrong}"] if wrong else []
    # Not ru_maxrss: it starts at the size of the process that forked this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"counts": counts, "failures": failures, "slowest": slowest, "memory": memory}))


def read_named(name):
    from grounding.images import read_image

    read_image(name)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    program(json.loads(sys.argv[1]))
