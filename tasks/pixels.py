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
import torch.nn.functional as F
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
FILTERS = {
    "bilinear": (1, lambda x: (1 - x).clip(0)),
    "bicubic": (2, lambda x: np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)),
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}
"""What `resize` can do: how far a filter reaches, and its value at a distance within that. The cubic is Keys' with
a = -0.5 (IEEE Transactions on Acoustics, Speech and Signal Processing, 1981)."""
WEIGHT_BITS = 22
"""Pillow's weights are whole multiples of 2^-22."""
CUT_PIXELS = 2**24
"""Pixels resized at once: bounds the memory."""
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


def distinct_shapes(sizes_N2: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The different widths and heights among images, and int [N], which of them each has."""
    widths, heights = sizes_N2.astype(np.int64).T
    keys, shape_N = np.unique(widths << 32 | heights, return_inverse=True)
    return [(key >> 32, key & 0xFFFFFFFF) for key in keys.tolist()], shape_N


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

    def cut(self, photo_HWC: torch.Tensor, boxes_N4: np.ndarray) -> torch.Tensor:
        """uint8 [N, height, width, 3] on the device of a uint8 photo: `pixels` of each box cut out of it, to the bit
        where box and `size` are square.

        Boxes x0, y0, x1, y1 are whole pixels inside the photo. All of one size go through together.
        """
        shapes, shape_N = distinct_shapes(boxes_N4[:, 2:] - boxes_N4[:, :2])
        corners_N2 = to_device(boxes_N4[:, :2].astype(np.int64), photo_HWC.device)
        found_NHWC = torch.empty(len(boxes_N4), *self.size, 3, dtype=torch.uint8, device=photo_HWC.device)
        for i, (width, height) in enumerate(shapes):
            windows = photo_HWC.permute(2, 0, 1).unfold(1, height, 1).unfold(2, width, 1)
            rows = to_device(np.flatnonzero(shape_N == i), photo_HWC.device)
            for few in rows.split(max(1, CUT_PIXELS // (width * height))):
                x_CNHW = windows[:, corners_N2[few, 1], corners_N2[few, 0]]
                to_width, to_height = self._resized(width, height)
                x_CNHW = resize(x_CNHW, to_width, to_height, self.interpolation)
                left, top = self._offset(to_width, to_height)
                edges = (-left, self.size[1] + left - to_width, -top, self.size[0] + top - to_height)
                found_NHWC[few] = F.pad(x_CNHW, edges).permute(1, 2, 3, 0)
        return found_NHWC

    def normalise(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] as the model was trained on; it stays channels last in memory."""
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float().div_(255)
        mean, std = (_channels(tuple(values), x_BCHW.device) for values in (self.mean, self.std))
        return x_BCHW.sub_(mean).div_(std)

    def to_image(self, boxes_N4: np.ndarray, widths_N: np.ndarray, heights_N: np.ndarray) -> np.ndarray:
        """Boxes x0, y0, x1, y1 as shares of the model's input -> pixels of images of these sizes, cut at the edges."""
        sizes_N2 = np.stack([widths_N, heights_N], 1)
        shapes, shape_N = distinct_shapes(sizes_N2)
        resized = [self._resized(*shape) for shape in shapes]
        offset_N2 = np.array([self._offset(*size) for size in resized]).reshape(-1, 2)[shape_N]
        scale_N2 = sizes_N2 / np.array(resized).reshape(-1, 2)[shape_N]
        pixels = boxes_N4.reshape(-1, 2, 2) * np.array([self.size[1], self.size[0]])
        pixels = (pixels + offset_N2[:, None]) * scale_N2[:, None]
        return pixels.clip(0, sizes_N2[:, None]).reshape(-1, 4)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor there: on a CPU the same memory, on a GPU a copy that does not wait for what runs on it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache(maxsize=64)
def _weights(length: int, out: int, interpolation: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 [length, out], upper and lower half of what each pixel of a resized line takes from each of the line.

    As Pillow resizes: pixel i looks at (i + 0.5) length / out, with the filter stretched by length / out where that is
    above 1 and cut off at the line's ends; its weights sum to 1 and are rounded to whole multiples of 2^-22.
    """
    reach, shape = FILTERS[interpolation]
    scale = length / out
    stretch, place_L = max(scale, 1.0), np.arange(length)
    centre_O1 = ((np.arange(out) + 0.5) * scale)[:, None]
    first_O1 = np.trunc(centre_O1 - reach * stretch + 0.5)
    stop_O1 = np.trunc(centre_O1 + reach * stretch + 0.5)
    distance_OL = np.abs(place_L - centre_O1 + 0.5) * (1 / stretch)
    inside_OL = (place_L >= first_O1) & (place_L < stop_O1) & (distance_OL < reach)
    share_OL = np.where(inside_OL, shape(distance_OL), 0)
    whole_OL = share_OL / share_OL.cumsum(1)[:, -1:] * 2**WEIGHT_BITS  # summed one by one, as Pillow does
    whole_OL = np.trunc(whole_OL + np.copysign(0.5, whole_OL)).astype(np.int64)
    upper_OL = whole_OL + 2 ** (WEIGHT_BITS // 2 - 1) >> WEIGHT_BITS // 2
    halves = upper_OL, whole_OL - (upper_OL << WEIGHT_BITS // 2)
    upper_LO, lower_LO = (torch.from_numpy(half.T.astype(np.float32)).to(device) for half in halves)
    return upper_LO, lower_LO


def resize(x_CNHW: torch.Tensor, width: int, height: int, interpolation: str) -> torch.Tensor:
    """uint8 images, any number of axes in front, resized on their device: where a square becomes a square, to the bits
    of Pillow's resize.

    Pillow goes along rows, then along columns, in whole numbers of 2^-22, and rounds in between. (For other shapes it
    may begin with the columns, which rounds otherwise; that is not imitated.) Each way is two matrix products, one by
    half of the weights' 22 bits: with 8 bits of a pixel and 11 of a weight all sums stay below 2^24 and float32 is
    exact, whatever the order, for images up to 15 times as large as what they become (beyond that a pixel may be off by
    1). `interpolation` is a key of FILTERS.
    """
    for out, turned in ((width, False), (height, True)):
        x_CNHW = x_CNHW.mT if turned else x_CNHW
        if x_CNHW.shape[-1] != out:
            pixels = x_CNHW.float()
            upper, lower = (
                (pixels @ half).int() for half in _weights(x_CNHW.shape[-1], out, interpolation, x_CNHW.device)
            )
            sums = (upper << WEIGHT_BITS // 2) + lower + 2 ** (WEIGHT_BITS - 1)
            x_CNHW = (sums >> WEIGHT_BITS).clamp(0, 255).to(torch.uint8)
        x_CNHW = x_CNHW.mT if turned else x_CNHW
    return x_CNHW


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [1, C, 1, 1], copied once: a copy to a GPU waits for all that runs there."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
