"""What the names of a large data set cost: memory of the main process and of each loader worker, and time.

    maefast bench names [--count 1000000 10000000] [--json FILE]

Two ways to keep them: "tuple", of str, as before; "buffer", `maefast.data.images.files.Names`, one buffer with offsets.
Each is measured in a fresh process, which sorts the names as a search does, forks one worker as a loader does, and lets
it look at every name: its private memory then grows by what reference counts write to. Measured are also the
fingerprint of the list and, once, a search of a real folder (`--files`).
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from maefast.bench import environment, results
from maefast.data.images.files import find_images
from maefast.data.records import Names, Paths

WAYS = ("tuple", "buffer")


def synthetic(count: int) -> Iterator[str]:
    """Names as ImageNet has them: 1000 folders, 26 to 28 bytes a name."""
    for i in range(count):
        yield f"n{i * 1000 // count:08d}/n{i * 1000 // count:08d}_{i}.JPEG"


def memory(field: str) -> int:
    """Bytes of this process: a field of smaps_rollup. `Private_Dirty` is what it has for itself."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"smaps_rollup has no field {field}")


def measure(way: str, count: int) -> dict:
    """One way at one count, in this process: bytes and seconds."""
    before, began = memory("Rss"), time.perf_counter()
    names = sorted(synthetic(count))
    files = tuple(names) if way == "tuple" else Names(names)
    del names
    record = {"way": way, "count": count, "build_s": time.perf_counter() - began}
    record["main_bytes"] = memory("Rss") - before
    record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    images = Paths("synthetic", "/synthetic", files)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_touch, args=(images, theirs))
    worker.start()
    theirs.close()
    record.update(ours.recv())
    worker.join()
    began = time.perf_counter()
    record["fingerprint"] = images.fingerprint() if way == "buffer" else _fingerprint(files)
    record["fingerprint_s"] = time.perf_counter() - began
    return record


def _fingerprint(files: tuple[str, ...]) -> str:
    """As it was before: one text of all names."""
    text = "\n".join(os.path.basename(name) if os.path.isabs(name) else name for name in files)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _touch(images: Paths, pipe) -> None:
    before, began = memory("Private_Dirty"), time.perf_counter()
    total = 0
    for index in range(len(images)):
        total += len(images.files[index])
    seconds = time.perf_counter() - began
    pipe.send({"worker_bytes": memory("Private_Dirty") - before, "touch_s": seconds, "characters": total})


def search(count: int) -> dict:
    """Time to find `count` empty files in 100 folders."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(100):
            os.mkdir(f"{folder}/{i:03d}")
        for i in range(count):
            os.close(os.open(f"{folder}/{i % 100:03d}/{i}.jpg", os.O_CREAT))
        before, began = memory("Rss"), time.perf_counter()
        found = len(find_images(folder))
        return {"files": found, "find_s": time.perf_counter() - began, "main_bytes": memory("Rss") - before}


def _measured(way: str, count: int) -> dict:
    """`measure` in a process of its own, so that nothing is left of an earlier one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its processes may have workers
        return pool.submit(measure, way, count).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--files", type=int, default=200_000, help="real files to search for; 0: none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = []
    for count in options.count:
        for way in WAYS:
            record = _measured(way, count)
            records.append(record)
            print(
                f"{count:>11,} {way:<7} main {record['main_bytes'] / 2**20:8.1f} MiB "
                f"(peak {record['peak_bytes'] / 2**20:8.1f})   "
                f"worker +{record['worker_bytes'] / 2**20:8.1f} MiB   build {record['build_s']:6.2f} s   "
                f"touch {record['touch_s']:6.2f} s   fingerprint {record['fingerprint_s']:6.2f} s",
                flush=True,
            )
        if len({record["fingerprint"] for record in records[-len(WAYS) :]}) > 1:
            raise SystemExit("the two ways have different fingerprints")
    found = search(options.files) if options.files else None
    if found:
        print(f"{found['files']:,} real files found in {found['find_s']:.2f} s")
    if options.json:
        document = {"environment": environment.describe("cpu"), "records": records, "search": found}
        results.save(options.json, document)


if __name__ == "__main__":
    main()
