"""How fast does the index scan the headers of a warm shard on one core?

python benchmarks/index_scan.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

from webdataset.writer import TarWriter

from pipeline.data.tar import scan

NUM_SAMPLES = 20_000
PARTS = {"jpg": b"j" * 400, "json": b'{"width": 256}', "txt": b"a caption"}  # as img2dataset: three parts a key
REPEATS = 15
BOUND = 80_000  # members/s of processor time


def main() -> None:
    """Scan one shard many times, its headers only and the whole of it; print members per second of processor time."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "00000.tar"
        with shard.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for row in range(NUM_SAMPLES):
                writer.write({"__key__": f"{row:09d}"} | PARTS)
        num_members = len(PARTS) * len(scan(shard).keys)  # and the shard is in memory now
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(REPEATS):
            for whole, measured in rates.items():
                begin = time.process_time()
                scan(shard, whole)
                measured.append(num_members / (time.process_time() - begin))
    for whole, name in ((False, "headers of a warm shard"), (True, "headers and SHA-256 of a warm shard")):
        value = round(statistics.median(rates[whole]))
        figure = {"figure": name, "value": value, "bound": f">= {BOUND}", "holds": value >= BOUND, "unit": "members/s"}
        print(json.dumps(figure))


if __name__ == "__main__":
    main()
