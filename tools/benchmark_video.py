#!/usr/bin/env python3
"""Read frames spread over a long video with this project's reader and with decord, torchcodec and OpenCV: time, memory, exactness."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

HELP = """
Read frames spread over a long video with this project's reader and with decord, torchcodec and OpenCV: time, memory, exactness.

  pip install decord opencv-python-headless torchcodec      (any of them, in versions that fit the torch that is installed)
  python tools/benchmark_video.py --work /tmp/videos --output tools/benchmark_results/video.json

The videos are made first (H.264, 854 x 480, 30 frames per second, 10 minutes; kept in --work): `web` as x264 makes them by default
(keyframes up to 250 frames apart, B-frames), `prepared` with a keyframe every 2 seconds as tools/prepare_video.py makes them, `plain`
without B-frames, where every frame is needed by the next. Each frame shows its number in 20 black and white cells; a reader is exact when
every picture it gives shows the number that was asked for.

Every reading is a process of its own and gives all frames as RGB pictures of full size. Counted are wall-clock and processor seconds from
opening the file, and the peak of memory beyond what the process held before, less the pictures themselves. With --threads N the peers use
their own N threads, and this reader cuts the frames into N runs, as context-parallel ranks and loader threads do. The readers take turns
in every round, and of the rounds the least times and the most memory count: other work on the machine only ever adds. --output is
written anew after each round; where it is there already with the same versions and videos, further rounds are added to it. It has the
command of each round, and with each row the number of rounds it comes from.

Readers: ours; ours_listed (with the packet list that a dataset stores); ours_squares (what training calls: listed, and each picture is
scaled to 384 x 384 at once, the rest of it is let go); decord; torchcodec; torchcodec_approximate (trusts the header's frame rate); opencv
(steps over frames); opencv_seek (sets the position).
"""
EPILOG = "Exit status: 0 done, 1 this project's reader was not exact or a video could not be made, 2 wrong usage."
WIDTH, HEIGHT, RATE, CELL, NUM_CELLS = 854, 480, 30, 40, 20
KINDS = {
    "web": {"g": "250", "bf": "3"},
    "prepared": {"x264-params": "keyint=60:min-keyint=60:scenecut=0:open-gop=0"},
    "plain": {"g": "250", "bf": "0"},
}
SQUARE = 384


# ------------------------------------------------------------------------------------------------ videos


def make_video(path: Path, options: dict[str, str], num_frames: int) -> None:
    """A moving texture with the frame's number on top. Written under another name first, so that a video that is there is whole."""
    import av
    from PIL import Image
    from tqdm import tqdm

    grey = np.random.default_rng(0).integers(60, 200, (HEIGHT // 8 + 32, WIDTH // 8 + 72), dtype=np.uint8)
    texture = np.array(Image.fromarray(grey).resize((grey.shape[1] * 8, grey.shape[0] * 8), Image.Resampling.BICUBIC))
    partial = path.with_name(path.name + ".partial")
    with av.open(str(partial), "w", format="mp4") as output:
        video = output.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "26"} | options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
        for number in tqdm(range(num_frames), desc=path.name, unit="frame"):
            x, y = number * 3 % 512, number // 5 % 256
            planes[:HEIGHT] = texture[y : y + HEIGHT, x : x + WIDTH]
            for cell in range(NUM_CELLS):
                planes[_cell(cell)] = 235 if number >> cell & 1 else 16
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    os.replace(partial, path)


def _cell(cell: int) -> tuple[slice, slice]:
    row, column = divmod(cell, 10)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def painted_number(picture_HW3: np.ndarray) -> int:
    """What a full-size picture shows."""
    number = 0
    for cell in range(NUM_CELLS):
        rows, columns = _cell(cell)
        inner = picture_HW3[rows.start + 10 : rows.stop - 10, columns.start + 10 : columns.stop - 10]
        number |= int(inner.mean() > 127) << cell
    return number


# ------------------------------------------------------------------------------------------------ readers


def read_ours(path: str, indices: list[int], threads: int, listed: bool = False) -> list[np.ndarray]:
    """Like all readers: the pictures of sorted frame numbers, uint8 [H, W, 3] each, read with so many threads."""
    from megatron_longvila.data.media import DEFAULT_LIMITS, Deadline
    from megatron_longvila.data.stream import VideoStream
    from megatron_longvila.data.timeline import unpack

    def read(run: list[int]) -> list[np.ndarray]:
        with VideoStream(path, Deadline(None), DEFAULT_LIMITS, unpack(packet_list(path)) if listed else None) as stream:
            found = stream.read(run, stream.to_rgb)
            return [found[index] for index in run]

    return _in_runs(read, indices, threads)


def read_ours_listed(path: str, indices: list[int], threads: int) -> list[np.ndarray]:
    return read_ours(path, indices, threads, listed=True)


def read_ours_squares(path: str, indices: list[int], threads: int) -> list[np.ndarray]:
    from megatron_longvila.data.video import decode_frames

    return _in_runs(lambda run: list(decode_frames(path, run, image_size=SQUARE, timeline=packet_list(path))[0]), indices, threads)


@functools.cache
def packet_list(path: str) -> bytes:
    """What preprocessing stores; made before the clock starts, by the first reading that is not counted."""
    from megatron_longvila.data.video import probe

    return probe(path).timeline


def _in_runs(read: Callable[[list[int]], list[np.ndarray]], indices: list[int], threads: int) -> list[np.ndarray]:
    runs = [run.tolist() for run in np.array_split(indices, threads) if len(run)]
    with ThreadPoolExecutor(threads) as pool:
        return [picture for pictures in pool.map(read, runs) for picture in pictures]


def read_decord(path: str, indices: list[int], threads: int) -> list[np.ndarray]:
    import decord

    return list(decord.VideoReader(path, num_threads=threads).get_batch(indices).asnumpy())


def read_torchcodec(path: str, indices: list[int], threads: int, mode: str = "exact") -> list[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=threads, dimension_order="NHWC")
    return list(decoder.get_frames_at(indices).data.numpy())


def read_torchcodec_approximate(path: str, indices: list[int], threads: int) -> list[np.ndarray]:
    return read_torchcodec(path, indices, threads, "approximate")


def read_opencv(path: str, indices: list[int], threads: int) -> list[np.ndarray]:
    import cv2

    video, position, pictures = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads]), 0, []
    for index in indices:
        while position < index:
            video.grab()
            position += 1
        pictures.append(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB))
        position += 1
    return pictures


def read_opencv_seek(path: str, indices: list[int], threads: int) -> list[np.ndarray]:
    import cv2

    video, pictures = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads]), []
    for index in indices:
        video.set(cv2.CAP_PROP_POS_FRAMES, index)
        pictures.append(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB))
    return pictures


READERS = {
    "ours": read_ours,
    "ours_listed": read_ours_listed,
    "ours_squares": read_ours_squares,
    "decord": read_decord,
    "torchcodec": read_torchcodec,
    "torchcodec_approximate": read_torchcodec_approximate,
    "opencv": read_opencv,
    "opencv_seek": read_opencv_seek,
}
OURS = ("ours", "ours_listed", "ours_squares")
PACKAGES = {"ours": "av", "decord": "decord", "torchcodec": "torchcodec", "opencv": "opencv-python-headless"}


def measure(reader: str, path: str, num_wanted: int, num_frames: int, threads: int) -> dict:
    """One reading in this process. A few frames are read before, so that importing and first calls are not counted."""
    indices = np.linspace(0, num_frames - 1, num_wanted).round().astype(int).tolist()
    try:
        READERS[reader](path, indices[:2], threads)
    except (ImportError, OSError, RuntimeError) as error:
        return {"missing": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, wall, processor = _memory("VmRSS"), time.perf_counter(), time.process_time()
    pictures = READERS[reader](path, indices, threads)
    found = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    kept = sum(picture.nbytes for picture in pictures) / 2**20
    found |= {"pictures_mib": kept, "other_memory_mib": _memory("VmHWM") - before - kept}
    shown = [painted_number(picture) if picture.shape[:2] == (HEIGHT, WIDTH) else None for picture in pictures]
    if reader != "ours_squares":
        found["exact"] = sum(number == index for number, index in zip(shown, indices, strict=True))
    return {name: round(value, 3) for name, value in found.items()}


def _memory(name: str) -> float:
    """MiB."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


# ------------------------------------------------------------------------------------------------ the benchmark


def run(arguments: argparse.Namespace) -> dict:
    """Every reader on every video, in rounds, so that a busy minute of the machine does not fall on one reader alone."""
    num_frames = round(arguments.duration_s * RATE)
    paths = {}
    arguments.work.mkdir(parents=True, exist_ok=True)
    for kind in arguments.videos:
        paths[kind] = arguments.work / f"{kind}_{num_frames}.mp4"
        if not paths[kind].exists():
            make_video(paths[kind], KINDS[kind], num_frames)
    samples, loads, commands = earlier_readings(arguments, num_frames)
    for _ in range(arguments.repeats):
        loads.append(round(os.getloadavg()[0], 1))
        commands.append(arguments.command)
        for kind, threads, reader in itertools.product(paths, arguments.threads, arguments.readers):
            known = samples.setdefault((kind, threads, reader), [])
            if not any("missing" in one for one in known):
                known.append(read_apart(reader, paths[kind], arguments.num_frames, num_frames, threads))
        found = describe(arguments, num_frames, samples, loads, commands)
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return found


def read_apart(reader: str, path: Path, num_wanted: int, num_frames: int, threads: int) -> dict:
    """`measure` in a process of its own. A peer that crashes is a result; this project's reader must not."""
    words = [sys.executable, __file__, "--child", reader, path, num_wanted, num_frames, threads]
    child = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if not child.returncode:
        return json.loads(child.stdout.splitlines()[-1])
    if reader in OURS:
        raise RuntimeError(f"{reader} on {path} failed with status {child.returncode}: {child.stderr[-2000:]}")
    return {"missing": f"ended with status {child.returncode}: {child.stderr.strip()[-200:]}"}


def circumstances(arguments: argparse.Namespace, num_frames: int) -> dict:
    """What must be the same for readings to be compared."""
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "frames": arguments.num_frames,
        "of": num_frames,
        "size": [WIDTH, HEIGHT],
        "versions": {name: _version(package) for name, package in PACKAGES.items()},
    }


def earlier_readings(arguments: argparse.Namespace, num_frames: int) -> tuple[dict[tuple, list[dict]], list[float], list[str]]:
    """Readings by video, threads and reader, and the loads and commands of the rounds that --output holds. RuntimeError if they do not
    compare."""
    if not (arguments.output and arguments.output.exists()):
        return {}, [], []
    found = json.loads(arguments.output.read_text())
    for name, value in circumstances(arguments, num_frames).items():
        if found[name] != value:
            raise RuntimeError(f"{arguments.output} has {name}={found[name]}, here it is {value}; give another --output")
    return {tuple(key): readings for key, readings in found["readings"]}, found["load_at_each_round"], found["command_of_each_round"]


def describe(
    arguments: argparse.Namespace, num_frames: int, samples: dict[tuple, list[dict]], loads: list[float], commands: list[str]
) -> dict:
    """The file of results."""
    rows = []
    for (kind, threads, reader), found in samples.items():
        row = {"video": kind, "threads": threads, "reader": reader}
        broken = next((one for one in found if "missing" in one), None)
        pick = {name: max if name.endswith("_mib") else min for name in found[0]}
        counted = broken or {name: pick[name](one[name] for one in found) for name in found[0]}
        rows.append(row | counted | {"rounds": len(found)})
    return {
        "command_of_each_round": commands,
        **circumstances(arguments, num_frames),
        "load_at_each_round": loads,
        "rows": rows,
        "fastest_exact_peer": compare(rows, arguments.num_frames),
        "readings": list(samples.items()),
    }


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def compare(rows: list[dict], num_wanted: int) -> list[dict]:
    """For each video and number of threads: the quickest peer all of whose frames are right, and its time over ours (above 1: we lead)."""
    found = []
    for video, threads in dict.fromkeys((row["video"], row["threads"]) for row in rows):
        here = {row["reader"]: row for row in rows if (row["video"], row["threads"]) == (video, threads) and row.get("exact") == num_wanted}
        ours, peers = here.get("ours"), [row for reader, row in here.items() if reader not in OURS]
        if ours and peers:
            peer = min(peers, key=lambda row: row["wall_s"])
            ratios = {name: round(peer[name] / ours[name], 2) for name in ("wall_s", "processor_s")}
            found.append({"video": video, "threads": threads, "peer": peer["reader"]} | {f"{name}_ratio": ratios[name] for name in ratios})
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        print(json.dumps(measure(argv[1], argv[2], *map(int, argv[3:]))))
        return 0
    arguments = parse(argv)
    try:
        found = run(arguments)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in found["rows"]:
        where = f"{row['video']:9} {row['threads']} threads {row['reader']:23}"
        if "missing" in row:
            print(f"{where} cannot run here: {row['missing']}")
            continue
        exact = f", {row['exact']:g} of {found['frames']} exact" if "exact" in row else ""
        memory = f"{row['other_memory_mib']:.0f} MiB beside {row['pictures_mib']:.0f}"
        print(f"{where} {row['wall_s']:7.2f} s ({row['processor_s']:.2f} s of processor), {memory}{exact}")
    for one in found["fastest_exact_peer"]:
        slower = "; this reader is not the quickest here" if one["wall_s_ratio"] < 1 else ""
        print(f"{one['video']}, {one['threads']} threads: {one['peer']} takes {one['wall_s_ratio']} x our time{slower}")
    inexact = [row for row in found["rows"] if row["reader"] in OURS and row.get("exact", arguments.num_frames) != arguments.num_frames]
    if inexact:
        print(f"error: this project's reader gave {inexact[0]['exact']:g} right frames of {arguments.num_frames}", file=sys.stderr)
    return 1 if inexact else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpus = os.cpu_count() or 1
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="where the videos are made and kept (about 12 MB each)")
    add("--output", type=Path, metavar="FILE", help="JSON file to write")
    add("--duration_s", type=float, default=600.0, metavar="S", help="of each video [%(default)s]")
    add("--num_frames", type=int, default=256, metavar="N", help="frames to read, evenly spread [%(default)s]")
    add("--videos", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds [all]")
    add("--readers", nargs="+", choices=READERS, default=list(READERS), help="which readers [all]")
    add("--threads", nargs="+", type=int, default=sorted({1, cpus}), metavar="N", help="[1 and all processors]")
    add("--repeats", type=int, default=3, metavar="N", help="rounds; the least times of them count [%(default)s]")
    return parser.parse_args(argv, argparse.Namespace(command=spell(argv)))


def spell(argv: list[str]) -> str:
    """The command as it was given; folders of this machine, which say nothing to others, as their last names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return shlex.join(["python", "tools/benchmark_video.py", *words])


if __name__ == "__main__":
    sys.exit(main())
