"""From the bytes of an image to the pixels a model sees, and back from model coordinates to image coordinates.

In: file bytes. Out: an upright RGB image or BadImage with a reason; uint8 arrays of a model's input size; boxes in
pixels.
"""

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import ExifTags, Image

# Not around each call: warnings.catch_warnings is not safe in threads, and images are decoded in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 178_956_970
"""Larger images are left out (reason: too_large), as Pillow does: a small file may unpack to any amount of memory."""
MAX_ASPECT = 32
"""Longer strips are left out (reason: too_narrow): fitting the short side to a model's input would blow up the long."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Only these are tried, whatever the file's ending: Pillow would hand others (EPS) to programs of the machine."""

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
RESIZES = ("cover", "squash", "contain")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, one word that is counted."""


def decode(data: bytes) -> Image.Image:
    """Upright RGB image: EXIF rotation applied, first frame, transparency on white, 16 bit scaled to 8.

    Raises BadImage with the reason: empty, not_an_image, truncated, too_large, too_narrow or float_pixels.
    """
    if not data:
        raise BadImage("empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage("too_large")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage("too_narrow")
        image.load()
        turn = TURNS.get(_orientation(image))
        return _rgb(image if turn is None else image.transpose(turn))
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not_an_image") from None
    except Image.DecompressionBombError:
        raise BadImage("too_large") from None
    except Exception:  # decoders raise anything from OSError to struct.error on damaged files
        raise BadImage("truncated") from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) where there is none or the EXIF data is damaged: the pixels may still be good."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above: struct.error, SyntaxError, ...
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        array = np.asarray(image).astype(np.int64)
        return Image.fromarray((array.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("float_pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass
class Preprocess:
    """How a model wants its images: resize, centre crop to `size`, scale to [0, 1], normalise."""

    size: tuple[int, int] = (224, 224)
    """Height and width of the model's input."""
    resize_to: tuple[int, int] = (224, 224)
    """Height and width the resized image covers (cover), fits into (contain) or is stretched to (squash)."""
    resize: str = "cover"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, rounded as torchvision (square cover) or timm and open_clip (others)."""
        to_height, to_width = self.resize_to
        if self.resize == "squash":
            return to_width, to_height
        if self.resize == "cover" and to_width == to_height:
            if width < height:
                return to_width, int(to_width * height / width)
            return int(to_height * width / height), to_height
        ratio = (max if self.resize == "contain" else min)(height / to_height, width / to_width)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _offset(self, width: int, height: int) -> tuple[int, int]:
        """Left and upper edge of the centre crop inside the resized image, as torchvision rounds; negative: padding."""
        left, top = width - self.size[1], height - self.size[0]
        return round(left / 2) if left > 0 else -(-left // 2), round(top / 2) if top > 0 else -(-top // 2)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 [height, width, 3] of the model's input size."""
        width, height = self._resized(*image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = self._offset(width, height)
        if left or top or image.size != (self.size[1], self.size[0]):
            image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        return np.asarray(image)

    def normalise(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] as the model was trained on."""
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float().div_(255)
        mean, std = (_channels(tuple(values), x_BCHW.device) for values in (self.mean, self.std))
        return x_BCHW.sub_(mean).div_(std).contiguous()

    def to_image(self, boxes_N4: np.ndarray, widths_N: np.ndarray, heights_N: np.ndarray) -> np.ndarray:
        """Boxes x0, y0, x1, y1 as shares of the model's input -> pixels of images of these sizes, cut at the edges."""
        resized = np.array([self._resized(int(w), int(h)) for w, h in zip(widths_N, heights_N, strict=True)]).reshape(
            -1, 2
        )
        offset = np.array([self._offset(w, h) for w, h in resized]).reshape(-1, 2)
        scale = np.stack([widths_N, heights_N], 1) / resized
        pixels = boxes_N4.reshape(-1, 2, 2) * np.array([self.size[1], self.size[0]])
        pixels = (pixels + offset[:, None]) * scale[:, None]
        return pixels.clip(0, np.stack([widths_N, heights_N], 1)[:, None]).reshape(-1, 4)


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [1, C, 1, 1], copied once: a copy to a GPU waits for all that runs there."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
