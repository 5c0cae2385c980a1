#!/usr/bin/env python3
"""Build an instruction dataset from a folder of long videos: clips, captions, summaries, questions, filters, rows, statistics."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from megatron_longvila.data.long_video.asking import Asker, Sampling
from megatron_longvila.data.long_video.endpoint import Endpoint
from megatron_longvila.data.long_video.export import ExportOptions, export
from megatron_longvila.data.long_video.filters import FilterOptions, filter_all
from megatron_longvila.data.long_video.pictures import PictureOptions
from megatron_longvila.data.long_video.prompts import load_prompt
from megatron_longvila.data.long_video.records import WorkError, work_folder
from megatron_longvila.data.long_video.segments import SegmentOptions, segment
from megatron_longvila.data.long_video.stages import Incomplete, Prices, Service, caption, caption_images, qa, summarize
from megatron_longvila.data.long_video.statistics import statistics

PROMPTS = Path(__file__).parent / "prompts"
UNITS = {"caption": "clip", "images": "image", "stats": "row"}  # of the bars; else videos
HELP = """
Build an instruction dataset from a folder of long videos. Each stage is a subcommand over one work folder:

  W="--work /data/build"; VLM="--endpoint http://localhost:8000/v1 --model my-vlm"; LLM="--endpoint http://localhost:8001/v1 --model my-llm"
  build_long_video_sft.py segment   $W --videos /data/films     clips of about 10 s (spans of the originals, nothing is copied)
  build_long_video_sft.py caption   $W $VLM                     a caption per clip, by a vision-language model
  build_long_video_sft.py summarize $W $LLM                     a summary and a domain per video, by a text model over its captions
  build_long_video_sft.py qa        $W $LLM                     questions of seven types, each with the span its answer rests on
  build_long_video_sft.py filter    $W                          rules, and how many records each of them refused
  build_long_video_sft.py export    $W                          rows for preprocess_video.py: /data/build/export.jsonl
  build_long_video_sft.py stats     $W                          stats.json and stats.png
  preprocess_video.py --input /data/build/export.jsonl --media_root /data/films --output /data/longvila/train

`caption --images DIR` captions pictures instead: /data/build/images.jsonl.

Any endpoint that speaks OpenAI's chat completions will do. Its key is read from the environment (OPENAI_API_KEY, or --key_env NAME), and
is written nowhere. Every answer is stored before it is looked at (/data/build/answers) and never asked for again, however often a stage is
stopped, killed or repeated; another prompt, model or sampling setting is another question. What a stage refuses is in STAGE.rejects.jsonl
(also what the endpoint refuses), what got no answer yet in STAGE.pending.jsonl, what it cost and which faults the endpoint had in
STAGE.report.json.
"""
EPILOG = """
Exit status: 0 done; 1 the stage cannot run, the message says why; 2 wrong usage; 3 questions are left open, the same command goes on.
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        with work_folder(arguments.work) as work:
            report = arguments.run(arguments, work)
    except Incomplete as error:
        return _fail(str(error), 3)
    except (WorkError, ValueError) as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or arguments.work}; once that is solved, the same command goes on", 1)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was", 3)
    for name, value in report.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------ stages


def _segment(arguments: argparse.Namespace, work: Path) -> dict:
    options = SegmentOptions(
        videos=arguments.videos,
        listing=arguments.list,
        clip_s=arguments.clip_s,
        boundaries=arguments.boundaries,
        threshold=arguments.threshold,
        min_video_s=arguments.min_video_s,
        num_workers=arguments.num_workers,
        timeout_s=arguments.timeout_s,
    )
    return segment(options, work, _bar)


def _caption(arguments: argparse.Namespace, work: Path) -> dict:
    pictures = PictureOptions(arguments.num_frames, arguments.image_size, arguments.jpeg_quality, arguments.decode_timeout_s)
    if arguments.images is None:
        return caption(_service(arguments, "caption"), pictures, arguments.videos, work)
    return caption_images(_service(arguments, "image"), pictures, arguments.images, arguments.media_root, work)


def _summarize(arguments: argparse.Namespace, work: Path) -> dict:
    return summarize(_service(arguments, "summarize"), work)


def _qa(arguments: argparse.Namespace, work: Path) -> dict:
    return qa(_service(arguments, "qa"), arguments.num_questions, work)


def _filter(arguments: argparse.Namespace, work: Path) -> dict:
    names = [name for name in FilterOptions.__dataclass_fields__ if name != "language"]
    language = None if arguments.language == "any" else arguments.language
    return filter_all(FilterOptions(language=language, **{name: getattr(arguments, name) for name in names}), work, _bar)


def _export(arguments: argparse.Namespace, work: Path) -> dict:
    return export(ExportOptions(arguments.questions, arguments.max_per_type, not arguments.no_summaries), work, _bar)


def _stats(arguments: argparse.Namespace, work: Path) -> dict:
    return statistics(work, arguments.tokenizer, _bar)


def _service(arguments: argparse.Namespace, stage: str) -> Service:
    endpoint = Endpoint(
        url=arguments.endpoint,
        key=_key(arguments.key_env),
        timeout_s=arguments.timeout_s,
        max_tries=arguments.max_tries,
        backoff_s=arguments.backoff_s,
        requests_per_minute=arguments.requests_per_minute,
    )
    prompt = load_prompt(arguments.prompt or PROMPTS / f"{stage}_v1.md", stage)
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.max_tokens, arguments.seed)
    asker = Asker(arguments.model, prompt, sampling, arguments.max_answers, arguments.concurrency, arguments.limit_field)
    return Service(endpoint, asker, Prices(arguments.price_prompt, arguments.price_completion), _bar, arguments.give_up)


def _key(variable: str | None) -> str | None:
    """The key in the variable that was named, which must hold one, or in OPENAI_API_KEY, which may not."""
    key = os.environ.get(variable or "OPENAI_API_KEY") or None
    if variable and key is None:
        raise ValueError(f"--key_env {variable}: that environment variable is not set or empty; export it, or leave the flag out")
    return key


def _bar(iterable: Iterable, total: int, name: str) -> Iterable:
    return tqdm(iterable, total=total, unit=UNITS.get(name, "video"), desc=name, smoothing=0.1, disable=not total)


# ------------------------------------------------------------------------------------------------ flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    _add_segment(stages)
    _add_asking(stages)
    _add_finishing(stages)
    return parser


def _stage(stages, name: str, run, text: str):
    parser = stages.add_parser(name, help=text, description=text, epilog=EPILOG)
    parser.set_defaults(run=run)

    def add(flag: str, **settings) -> None:
        parser.add_argument(*dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}")), dest=flag, **settings)

    add("work", type=Path, required=True, metavar="DIR", help="work folder of all stages; made if missing")
    return add


def _add_segment(stages) -> None:
    add = _stage(
        stages, "segment", _segment, "Cut every video of a folder into clips: spans of the original, nothing is copied or re-encoded."
    )
    add("videos", type=Path, required=True, metavar="DIR", help="folder of videos, searched through; links may not lead out of it")
    add("list", type=Path, metavar="FILE", help="only these videos: paths below --videos, one a line")
    add("clip_s", type=_above_zero, default=10.0, metavar="S", help="length that clips aim at [%(default)s]")
    add(
        "boundaries",
        choices=("fixed", "shots"),
        default="fixed",
        help="equal clips, or cuts where PySceneDetect sees a new shot [%(default)s]",
    )
    add("threshold", type=_above_zero, default=27.0, metavar="X", help="of the shot detector; lower finds more [%(default)s]")
    add("min_video_s", type=float, default=0.0, metavar="S", help="refuse shorter videos [%(default)s]")
    add("num_workers", type=_positive, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read videos [%(default)s]")
    add("timeout_s", type=_above_zero, default=3600.0, metavar="S", help="a video that takes longer is refused [%(default)s]")


def _add_asking(stages) -> None:
    pictures, sampling = PictureOptions(), Sampling()
    add = _stage(stages, "caption", _caption, "Caption every clip (or, with --images, every picture) with a vision-language model.")
    _add_endpoint(add)
    add("num_frames", type=_positive, default=pictures.num_frames, metavar="N", help="frames shown of each clip [%(default)s]")
    add("image_size", type=_positive, default=pictures.image_size, metavar="PX", help="longer side of a picture that is sent [%(default)s]")
    add("jpeg_quality", type=int, choices=range(1, 101), default=pictures.jpeg_quality, metavar="1..100", help="[%(default)s]")
    text = "for a clip's frames; a clip that takes longer is refused [%(default)s]"
    add("decode_timeout_s", type=_above_zero, default=pictures.timeout_s, metavar="S", help=text)
    add("videos", type=Path, metavar="DIR", help="where the videos are, if they have moved since `segment`")
    add("images", type=Path, metavar="SOURCE", help="caption these instead: a folder, or a file of rows with `id` and `image`")
    add("media_root", type=Path, metavar="DIR", help="where the paths in the rows of --images start")
    text = "Write a summary and choose a domain for each video with a text model over its captions."
    _add_endpoint(_stage(stages, "summarize", _summarize, text))
    add = _stage(stages, "qa", _qa, "Write questions of seven types about each video with a text model over its captions.")
    _add_endpoint(add, max_tokens=4 * sampling.max_tokens)
    add("num_questions", type=_positive, default=14, metavar="N", help="questions asked for per video [%(default)s]")


def _add_endpoint(add, max_tokens: int = Sampling().max_tokens) -> None:
    add("endpoint", required=True, metavar="URL", help="base address, such as http://localhost:8000/v1")
    add("model", required=True, metavar="NAME", help="as the endpoint names it; stands in every record")
    add(
        "key_env",
        metavar="NAME",
        help="environment variable that holds the key [OPENAI_API_KEY, or no key where that is not set]",
    )
    add("prompt", type=Path, metavar="FILE", help="another prompt than that of tools/prompts; its hash stands in every record")
    add("temperature", type=float, default=Sampling().temperature, metavar="X", help="[%(default)s]")
    add("top_p", type=float, default=Sampling().top_p, metavar="X", help="[%(default)s]")
    add("max_tokens", type=_positive, default=max_tokens, metavar="N", help="longest answer; one that is cut is asked anew [%(default)s]")
    add("limit_field", choices=("max_tokens", "max_completion_tokens"), default="max_tokens", help="its name there [%(default)s]")
    add("seed", type=int, default=0, metavar="N", help="of the first try; later ones add to it [%(default)s]")
    add("max_answers", type=_positive, default=3, metavar="N", help="useless answers to a question before it is given up [%(default)s]")
    add("concurrency", type=_positive, default=8, metavar="N", help="requests on the way at once [%(default)s]")
    add("requests_per_minute", type=_above_zero, metavar="N", help="of all of them together [no limit]")
    add("timeout_s", type=_above_zero, default=120.0, metavar="S", help="for one try, up to the last byte [%(default)s]")
    add("max_tries", type=_positive, default=6, metavar="N", help="tries of a request before it is left for the next run [%(default)s]")
    add("give_up", action="store_true", help="refuse what got no answer in all tries, and finish without it")
    add("backoff_s", type=_above_zero, default=1.0, metavar="S", help="wait before the second try; doubles up to a minute [%(default)s]")
    add("price_prompt", type=float, default=0.0, metavar="USD", help="for a million tokens [%(default)s]")
    add("price_completion", type=float, default=0.0, metavar="USD", help="for a million tokens [%(default)s]")


def _add_finishing(stages) -> None:
    limits = FilterOptions()
    add = _stage(stages, "filter", _filter, "Refuse what breaks a rule: form, refusals, marks, length, language, spans, leaks, duplicates.")
    add("language", default=limits.language, metavar="CODE", help="two letters, or `any` [%(default)s]")
    parts = "[%(default)s]; in scripts without spaces every character is one"
    for name in ("min_question_words", "max_question_words", "max_answer_words", "min_summary_words", "max_summary_words"):
        add(name, type=_positive, default=getattr(limits, name), metavar="N", help=parts)
    add("max_similarity", type=_above_zero, default=limits.max_similarity, metavar="X", help="shared word triples, 0 to 1 [%(default)s]")
    add = _stage(stages, "export", _export, "Write the rows that preprocess_video.py reads.")
    add(
        "questions",
        choices=("one", "each", "all"),
        default="one",
        help="per video: one of the rarest type, a row each, or one row of all [%(default)s]",
    )
    add(
        "max_per_type", type=_not_negative, default=0, metavar="N", help="questions of one type in the whole set, 0: no limit [%(default)s]"
    )
    add("no_summaries", action="store_true", help="questions alone")
    add = _stage(stages, "stats", _stats, "Count domains, question types, durations, lengths and costs; draw them.")
    add("tokenizer", type=Path, metavar="PATH", help="count tokens instead of words: SentencePiece model or tokenizer folder")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
