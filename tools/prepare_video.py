#!/usr/bin/env python3
"""Re-encode videos so that single frames read quickly: H.264, upright, constant frame rate, a keyframe every two seconds."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megatron_longvila.data.media import MediaLimits
from megatron_longvila.data.output import PreprocessError, write_atomically
from megatron_longvila.data.reencode import Options, Report, Settings, prepare

HELP = """
Re-encode videos so that single frames read quickly: H.264, upright, constant frame rate, a keyframe every two seconds.

This is optional: tools/preprocess_video.py takes videos as they are. It pays where frames are picked from long videos, because a decoder
starts at a keyframe, and downloaded videos have them up to 10 seconds apart:

  python tools/prepare_video.py --input /data/media --output /data/media480 --height 480
  python tools/preprocess_video.py --input rows.jsonl --media_root /data/media480 --output /data/longvila/train

Every file keeps its name and folder, so rows stay as they are; only --media_root changes. (Content decides how a file is read, so that a
copy named .mkv holds MP4.) Originals are only read. Colours stay, sound is left out: nothing here listens. Pictures, and videos that are
as wanted already, are hard links where both folders lie on one file system: one file with two names, so that a program that writes into
such a copy writes into the original. Elsewhere they are copied.

The command can be stopped or killed at any time: the same command goes on where it was, and does nothing once all is done. Other settings
into the same folder make all copies anew. A copy is removed when its original changes into something that is rejected; copies whose
original is gone stay and are listed. OUTPUT/report.json has these, what was rejected and why, and the gain: bytes before and after, and
the processor seconds that picking the same frames takes before and after.
"""
EPILOG = "Exit status: 0 done, 1 nothing could be prepared or the run failed, 2 wrong usage."


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    settings = Settings(arguments.height, arguments.fps, arguments.keyframe_s, arguments.crf, arguments.preset)
    options = Options(arguments.input, arguments.output, settings, arguments.num_workers, arguments.timeout_s, MediaLimits())
    try:
        report = prepare(options, _bar)
        write_atomically(options.output / "report.json", json.dumps(asdict(report) | gain(report), indent=1).encode() + b"\n")
    except PreprocessError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or options.output}; once that is solved, the same command goes on")
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was")
    _summarise(report, options)
    return 0 if report.prepared + report.kept else _fail("nothing could be prepared")


def gain(report: Report) -> dict[str, float]:
    """Bytes of a copy as a share of the original, and how many times quicker its frames decode; nothing where nothing was re-encoded."""
    if not report.prepared:
        return {}
    return {
        "size_ratio": round(report.bytes_after / report.bytes_before, 3),
        "decode_speedup": round(report.decode_s_before / report.decode_s_after, 2),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    default, presets = Settings(), ("ultrafast", "veryfast", "fast", "medium", "slow")
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="folder of videos, with all below it; never written to")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the copies; made if missing, continued if started")
    add("--height", type=_number(int, 2, 8192), default=default.height, metavar="N", help="of the upright picture, at most [%(default)s]")
    add("--fps", type=_number(float, 0, 1000), default=default.fps, metavar="N", help="frames per second; 0: the video's mean rate [0]")
    add("--keyframe_s", type=_number(float, 0.01, 3600), default=default.keyframe_s, metavar="S", help="between keyframes [%(default)s]")
    add("--crf", type=_number(int, 0, 51), default=default.crf, metavar="N", help="x264's quality, lower is better [%(default)s]")
    add("--preset", choices=presets, default=default.preset, help="x264's effort [%(default)s]")
    add("--num_workers", type=_number(int, 1, 1024), default=2, metavar="N", help="videos at a time [%(default)s]")
    add("--timeout_s", type=_number(float, 1, 1e7), default=14_400.0, metavar="S", help="a file that takes longer is refused [%(default)s]")
    return parser


def _number(kind: type, least: float, most: float):
    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    return parse


def _bar(iterable, total: int, unit: str):
    return tqdm(iterable, total=total, unit=unit, desc="preparing videos", disable=not total)


def _summarise(report: Report, options: Options) -> None:
    for row in report.rejected[:10]:
        print(f"rejected {row['path']!r}: {row['reason']}")
    if len(report.rejected) > 10:
        print(f"... and {len(report.rejected) - 10} more rejected")
    if report.without_original:
        first = report.without_original[0]
        print(f"{len(report.without_original)} files below {options.output} have no usable original any more, such as {first!r}")
    print(f"{report.prepared} videos re-encoded, {report.kept} files kept as they are, {len(report.rejected)} rejected")
    if report.prepared:
        sizes = f"{report.bytes_before / 2**20:.1f} MiB became {report.bytes_after / 2**20:.1f}"
        print(f"{sizes}; the same frames decode {gain(report)['decode_speedup']:g} times as fast")
    state = "written to" if report.changed else "nothing to do:"
    print(f"{state} {options.output}; all rejected files are in {options.output / 'report.json'}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
