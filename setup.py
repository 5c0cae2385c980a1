"""Package description. torch is installed first by tools/install.sh, at one exact version; here stands the range that is tested."""

from setuptools import find_packages, setup

setup(
    name="megatron-longvila",
    version="0.1.0",
    description="LongVILA on Megatron-Core: train vision-language models on long videos, one sequence spread over many GPUs",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_longvila", "megatron_longvila.*"]),
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",  # the last release for Python 3.11; platform/mcore_fixes.py repairs exactly this source
        "psutil",  # megatron-core needs these two and does not declare them
        "einops",
        "numpy",
        "pyyaml",
        "jsonargparse[signatures]>=4.53,<5",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "zstandard",
        "webdataset",
        "av>=17,<19",
        "pillow",
        "tqdm",
        "matplotlib",
    ],
    # Never a hard requirement: transformer-engine breaks megatron-core's import on a machine without CUDA, and the package named apex
    # on the index is not NVIDIA's.
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "parquet": ["pyarrow"],
        "hf": ["transformers>=5,<6"],
        "logging": ["tensorboard", "wandb"],
        "long_video": ["scenedetect-headless>=0.7,<0.8", "py3langid>=0.4"],  # shot boundaries; languages
        "dev": [
            "pytest>=8",
            "ruff>=0.17,<0.18",
            "peft",
            "py-spy",
            "py3langid>=0.4",
            "scenedetect-headless>=0.7,<0.8",
            "pyarrow",
            "tensorboard",
            "transformers[serving]>=5,<6",  # a real server to ask
            "triton; platform_system == 'Linux'",
            "ring-flash-attn==0.1.8",  # peers of the attention benchmark, which brings them a flash-attn made of torch's kernels
            "yunchang==0.6.4",
        ],
    },
)
