"""Datasets in memory whose media are lists of one-colour PNG frames: real decoding without an encoder."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

from PIL import Image

from megatron_longvila.config import Config, DataConfig, LLMConfig, ModelConfig, ProjectorConfig, TrainingConfig, VideoConfig, VisionConfig
from megatron_longvila.data.media import DEFAULT_LIMITS, MediaError
from megatron_longvila.data.shards import Media, Sample

SIZE = 4  # pixels; with patches of 2 and the 2 x 2 merge a frame is one visual token

# Videos of several lengths (the rule takes at most 6 frames), images, two media in one sample, text alone.
SHAPES = [[3], [9], [], [0], [6, 0], [2], [], [1], [4], [0, 0], [12], [5]]
FRAMES = [3, 6, 0, 1, 7, 2, 0, 1, 4, 2, 6, 5]  # what the rule takes of each sample


def colour(medium: int, frame: int) -> tuple[int, int, int]:
    """The colour of a frame; no two frames of a test share one, and none is black."""
    return (10 + medium, 20 + frame, 200)


def png(rgb: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), rgb).save(data, "PNG")
    return data.getvalue()


class TinyDataset:
    """`shapes` lists for each sample the frame counts of its media (0: an image). Medium m of the set is named f"{m:064x}"."""

    limits = DEFAULT_LIMITS

    def __init__(self, shapes: list[list[int]], path: Path | str = "/nonexistent/dataset", words: str = "What colour is the square?"):
        self.path = path
        self.samples: list[Sample] = []
        self.media: dict[str, Media] = {}
        self.broken: set[str] = set()  # media that cannot be read
        self.bad_frames: set[tuple[str, int]] = set()  # frames of a medium that do not decode
        self.reads: Counter = Counter()
        for number, frames in enumerate(shapes):
            names = []
            for count in frames:
                name = f"{len(self.media):064x}"
                kind = "frames" if count else "image"
                self.media[name] = Media(name, kind, max(1, count), count / 2, 2.0, SIZE, SIZE, 0, "png")
                names.append(name)
            marks = "".join("<video>" if count else "<image>" for count in frames)
            answer = " ".join(["red"] * (1 + number % 5))
            turns = ({"from": "human", "value": f"{marks}\n{words}"}, {"from": "gpt", "value": answer})
            self.samples.append(Sample(f"sample-{number}", turns, tuple(names)))

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(self.samples).encode()).hexdigest()

    def medium_of(self, number: int, place: int = 0) -> str:
        return self.samples[number].media[place]

    def read(self, media: Media):
        self.reads[media.sha256] += 1
        if media.sha256 in self.broken:
            raise MediaError("is broken on purpose")
        medium = int(media.sha256, 16)
        good = [png(colour(medium, frame)) for frame in range(media.num_frames)]
        frames = [b"no picture" if (media.sha256, number) in self.bad_frames else frame for number, frame in enumerate(good)]
        return frames[0] if media.kind == "image" else frames

    def timeline(self, media: Media) -> bytes:
        return b""


def tiny_config(**data) -> Config:
    """One visual token per frame; `data` overrides fields of DataConfig, VideoConfig and TrainingConfig by their names."""
    training = {name: data.pop(name) for name in ("steps", "epochs", "seed", "evaluation_rows") if name in data}
    video = VideoConfig(num_frames=data.pop("num_frames", 6), on_bad_frame=data.pop("on_bad_frame", "nearest"))
    vision = VisionConfig(image_size=SIZE, patch_size=2, hidden_size=8, ffn_hidden_size=16, num_layers=2, num_attention_heads=2)
    model = ModelConfig(vision=vision, projector=ProjectorConfig(), llm=LLMConfig(vocab_size=1024))
    settings = {"template": "plain", "context_length": 64, "global_batch_size": 2, "num_workers": 2, "max_bad_fraction": 0.5} | data
    return Config(model=model, data=DataConfig(video=video, **settings), training=TrainingConfig(**training))
