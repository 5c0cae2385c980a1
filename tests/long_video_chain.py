"""The long-video tool in this process, with the flags that the tests of its stages share."""

from pathlib import Path

from programs import ROOT, load_script

TOOL = load_script(ROOT / "tools" / "build_long_video_sft.py")
STAGES = ("segment", "caption", "summarize", "qa", "filter", "export", "stats")


def words(stage: str, work: Path, films: Path, url: str) -> list[str]:
    asking = ["--endpoint", url, "--model", "scripted", "--timeout_s", "20", "--backoff_s", "0.01", "--concurrency", "4"]
    flags = {
        "segment": ["--videos", films, "--boundaries", "shots", "--num_workers", 2],
        "caption": [*asking, "--num_frames", 4, "--image_size", 96],
        "summarize": [*asking, "--price_prompt", "2", "--price_completion", "10"],
        "qa": asking,
        "filter": [],
        "export": ["--questions", "each"],
        "stats": [],
        "images": [*asking, "--images", films.parent / "images"],
    }
    return ["caption" if stage == "images" else stage, "--work", str(work), *map(str, flags[stage])]


def build(work: Path, films: Path, url: str, stages=STAGES) -> None:
    for stage in stages:
        assert TOOL.main(words(stage, work, films, url)) == 0, stage
