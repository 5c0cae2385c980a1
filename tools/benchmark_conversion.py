#!/usr/bin/env python3
"""Memory and rate of tools/convert_checkpoint.py on a generated checkpoint, next to `cp` followed by `sync`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_longvila import config_io
from megatron_longvila.checkpoint.hf import rules
from megatron_longvila.checkpoint.hf_config import write_llm, write_vision
from megatron_longvila.checkpoint.tensor_files import SafetensorsWriter, TensorInfo, write_json
from megatron_longvila.config import Config

HELP = """
Generate a VILA folder with the sizes of a model file (random weights, bf16), copy it with cp and sync, import it, export it, and write
peak memory and rates to a JSON file.

  python tools/benchmark_conversion.py --model examples/models/qwen2_7b_siglip_448.yaml --work /data/scratch \\
    --output tools/benchmark_results/conversion_qwen2_7b.json

Needs room for three copies of the model in --work. Each step begins with an empty page cache if the program may empty it (root), and ends
with what it wrote on the disk. Memory is the largest RssAnon of the process: its own memory, mapped files not counted.
"""
TOOL = Path(__file__).parent / "convert_checkpoint.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FILE", help="YAML file with a model section")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the copies go; they are removed at the end")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    arguments = parser.parse_args()
    work = arguments.work / "benchmark_conversion"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        found = measure(config_io.parse(["--config", arguments.model]), work)
    finally:
        shutil.rmtree(work)
    found = {"model": Path(arguments.model).stem, "torch": torch.__version__, "cpus": os.cpu_count()} | found
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def measure(config: Config, work: Path) -> dict:
    """All steps on a model of the sizes of `config`."""
    num_bytes = generate(config, work / "vila")
    cached = not empty_page_cache()
    copy = step(["sh", "-c", f"cp -r {work / 'vila'} {work / 'copy'} && sync"], num_bytes)
    shutil.rmtree(work / "copy")
    empty_page_cache()
    bring_in = step([sys.executable, str(TOOL), "import", str(work / "vila"), str(work / "checkpoint")], num_bytes)
    empty_page_cache()
    command = [sys.executable, str(TOOL), "export", str(work / "checkpoint"), str(work / "out"), "--format", "vila"]
    bring_out = step(command, num_bytes)
    found = {"gib": num_bytes / 2**30, "input_in_page_cache": cached, "cp_and_sync": copy, "import": bring_in, "export": bring_out}
    for name in ("import", "export"):
        found[name]["rate_over_cp"] = round(found[name]["mib_per_s"] / copy["mib_per_s"], 2)
    return found


def generate(config: Config, folder: Path) -> int:
    """Write a VILA folder of random bf16 weights; returns its bytes."""
    infos: dict[str, dict[str, TensorInfo]] = {"llm": {}, "vision_tower": {}, "mm_projector": {}}
    for rule in rules(config):
        for name, shape in zip(rule.sources, rule.shapes, strict=True):
            part, local = name.split(".", 1)
            infos[part][local] = TensorInfo(tuple(shape), torch.bfloat16)
    configs = {
        "llm": write_llm(config.model.llm) | {"torch_dtype": "bfloat16"},
        "vision_tower": write_vision(config.model.vision) | {"torch_dtype": "bfloat16"},
        "mm_projector": {"mm_projector_type": config.model.projector.type, "model_type": "v2l_projector"},
    }
    noise = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(0, 0.02)
    for part, found in infos.items():
        (folder / part).mkdir(parents=True)
        write_json(folder / part / "config.json", configs[part])
        with SafetensorsWriter(folder / part, found, 5_000_000_000) as writer:
            for name, info in found.items():
                count = math.prod(info.shape)
                writer.write(name, noise.repeat(-(-count // len(noise)))[:count].view(info.shape))
    write_json(folder / "config.json", {"model_type": "llava_llama"} | {f"{part}_cfg": value for part, value in configs.items()})
    return sum(info.num_bytes for found in infos.values() for info in found.values())


def step(command: list[str], num_bytes: int) -> dict[str, float]:
    """Run a command; seconds, rate, the largest RssAnon seen, and the load of the machine at the end (1: nothing else ran)."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    seconds = time.perf_counter() - start
    rate, load = round(num_bytes / 2**20 / seconds, 1), round(os.getloadavg()[0], 1)
    return {"seconds": round(seconds, 2), "mib_per_s": rate, "peak_rss_anon_gib": round(peak / 2**30, 3), "load_average": load}


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def empty_page_cache() -> bool:
    """Write everything out and forget what was read; False if this user may not."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
