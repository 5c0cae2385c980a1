"""Still pictures: opening them safely and turning any picture into the square the vision tower takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_longvila.data.media import DEFAULT_LIMITS, SNIFF_BYTES, ByteRange, MediaError, MediaLimits, open_source, sniff

MEAN_COLOUR = (127, 127, 127)  # int(255 * 0.5): SigLIP's mean, the colour that normalises to zero
_BACKGROUND = (255, 255, 255)  # transparent drawings are made for white pages; dropping alpha would show what was never meant to be seen
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> (clockwise degrees, Pillow's transpose, which turns counter-clockwise); 1 is upright
    2: (0, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (180, Image.Transpose.ROTATE_180),
    4: (180, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (90, Image.Transpose.TRANSPOSE),
    6: (90, Image.Transpose.ROTATE_270),
    7: (270, Image.Transpose.TRANSVERSE),
    8: (270, Image.Transpose.ROTATE_90),
}


def open_image(source: bytes | str | Path | ByteRange, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[Image.Image, int]:
    """Decode a picture (JPEG, PNG, WebP, BMP, first frame of a GIF) to RGB, upright by its EXIF orientation.

    Returns:
        The image and the clockwise rotation in degrees that was applied.

    Raises:
        MediaError: it is no picture, it is damaged, or it has more pixels than `limits` or Pillow's MAX_IMAGE_PIXELS allow.
    """
    with open_source(source, limits) as file:
        found = sniff(file.read(SNIFF_BYTES))
        if not found.is_image:
            raise MediaError(f"is a video ({found.extension}), not an image")
        file.seek(0)
        try:
            with Image.open(file, formats=[found.reader]) as image:
                allowed = {"max_pixels": limits.max_pixels, "Pillow's MAX_IMAGE_PIXELS": Image.MAX_IMAGE_PIXELS or limits.max_pixels}
                limit = min(allowed, key=allowed.get)
                if image.width * image.height > allowed[limit]:
                    raise MediaError(f"has {image.width} x {image.height} pixels, more than {limit}={allowed[limit]}")
                image.load()
                rotation, transpose = _UPRIGHT.get(_orientation(image), (0, None))
                # Neither transpose nor convert where there is nothing to do: both copy, which takes longer than decoding a JPEG. Pillow's
                # exif_transpose would write all of EXIF anew, and fail on one field of another kind than the standard says.
                return _to_rgb(image if transpose is None else image.transpose(transpose)), rotation
        except MediaError:
            raise
        except Image.DecompressionBombError:
            raise MediaError("has more pixels than a picture may have (decompression bomb)") from None
        except UnidentifiedImageError:  # its message holds a memory address
            raise MediaError(f"is a damaged {found.reader} image: its header cannot be read") from None
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
            raise MediaError(f"is a damaged {found.reader} image: {error}") from error


def _orientation(image: Image.Image) -> int | None:
    """By EXIF; None where that says nothing or is damaged, which a whole picture may have: Pillow forgives it in JPEG only."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # SyntaxError, struct.error, ValueError, ...
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency laid over white, 16-bit grey scaled down (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, np.float32) / 257.0).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_square(picture: Image.Image | np.ndarray, image_size: int, preprocess: str) -> np.ndarray:
    """uint8 [S, S, 3] of an RGB picture (uint8 [H, W, 3]) by Pillow's bicubic filter: stretched (`resize`), or padded to a square first
    (`pad`). An array that has the size already is returned as it is."""
    if isinstance(picture, np.ndarray):
        if picture.shape[:2] == (image_size, image_size):
            return picture
        picture = Image.fromarray(picture)
    image = picture
    if preprocess == "pad":
        image = pad_to_square(image)
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.array(image)  # a copy that owns its memory: torch.from_numpy needs it writable


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of the mean colour (an odd rest goes to the right or the bottom)."""
    side = max(image.size)
    if image.width == image.height:
        return image
    canvas = Image.new("RGB", (side, side), MEAN_COLOUR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas
