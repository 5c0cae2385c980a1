"""preprocess_video over a hundred thousand rows: every row is accounted for, in memory that grows with the rows and not with the media."""

import json
import os
import subprocess
import sys
from pathlib import Path

from media import image_bytes, video_bytes

from megatron_longvila.data.shards import open_dataset

ROOT = Path(__file__).parents[2]
ROWS = 100_000
MEASURE = """
import sys, time
from pathlib import Path
from megatron_longvila.data.preprocess import Options, preprocess

if __name__ == "__main__":
    source, media, output = map(Path, sys.argv[1:])
    start = time.perf_counter()
    preprocess(Options(source, media, output, num_workers=1))
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak, time.perf_counter() - start)
"""


def row(number: int) -> dict:
    """One in ten shows a picture or a video that many share; of each thousand, one name leads out, one is nowhere and one id is used."""
    place = number % 1000
    shown = {3: ("image", "../outside.png"), 13: ("image", "gone.png"), 23: ("video", "with space \u00fc.mp4")}
    kind, name = shown.get(place, ("image", f"{number % 7}.png") if number % 10 == 3 else ("", ""))
    question = f"<{kind}>\nQuestion {number}?" if kind else f"Question {number}?"
    identity = "r0" if place == 999 else f"r{number}"
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"The answer is {number}."}]
    return {"id": identity, "conversations": talk} | ({kind: name} if kind else {})


def measure(folder: Path, count: int) -> tuple[float, float]:
    """Peak memory in MiB and seconds of a run over `count` rows in a process of its own."""
    (folder / f"rows{count}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)))
    (folder / "measure.py").write_text(MEASURE)
    words = [sys.executable, folder / "measure.py", folder / f"rows{count}.jsonl", folder / "media", folder / f"out{count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=True)
    peak, seconds = done.stdout.split()
    return int(peak) / 1024, float(seconds)


def test_a_hundred_thousand_rows(tmp_path):
    (tmp_path / "media").mkdir()
    for number in range(7):
        (tmp_path / "media" / f"{number}.png").write_bytes(image_bytes(number))
    (tmp_path / "media" / "with space \u00fc.mp4").write_bytes(video_bytes(range(8)))
    (tmp_path / "outside.png").write_bytes(image_bytes(9))
    little, _ = measure(tmp_path, 100)
    much, seconds = measure(tmp_path, ROWS)
    print(f"{ROWS} rows: {seconds:.1f} s, {much - little:.0f} MiB more than 100 rows")
    report = json.loads((tmp_path / f"out{ROWS}" / "report.json").read_text())
    assert report["accepted"] + report["rejected"] == ROWS and report["rejected"] == 3 * ROWS // 1000
    for reason in ("leads out of the media root", "is not in the media root", "was used before"):
        assert sum(reason in one["reason"] for one in report["rows"]) == ROWS // 1000
    dataset = open_dataset(tmp_path / f"out{ROWS}")
    assert len(dataset) == report["accepted"] and len(dataset.media) == 8
    assert dataset.samples[-1].id == f"r{ROWS - 2}"  # the last row's id was used before
    assert much - little < 2048 * ROWS / 2**20  # the rows as Python objects; nothing of them is kept twice
