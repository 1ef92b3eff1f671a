"""How much sooner is a JPEG a 256×256 square than by webdataset's own decoding, and is it the same picture?

python benchmarks/jpeg_decode.py      (scikit-learn's two photographs, one thread; half a minute)

Against webdataset's image handler (Pillow, whole) and the same antialiased bicubic.  Both are timed in pairs, in an
order drawn anew each time; a figure is the median of the pairs' ratios.  The control is ours against ours.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from webdataset.autodecode import ImageHandler

from pipeline.data import images

SIZE = 256
BOUNDS = {(683, 512): 0.97, (1024, 768): 2.5, (2048, 1536): 4.0}
PAIRS, REPEATS = 60, 3  # pairs per photograph; decodes in one timing
Decode = Callable[[bytes], NDArray[np.uint8]]

handler = ImageHandler("pilrgb")


def ours(data: bytes) -> NDArray[np.uint8]:
    """As the programs decode it."""
    return images.decode(data, SIZE)


def webdatasets(data: bytes) -> NDArray[np.uint8]:
    """What `.decode("pilrgb")` gives, centre cut and scaled in one step."""
    image = handler("jpg", data)
    assert image is not None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def seconds(decode: Decode, data: bytes) -> float:
    """Of this process, for REPEATS decodes."""
    start = time.process_time()
    for _ in range(REPEATS):
        decode(data)
    return time.process_time() - start


def ratios(one: Decode, other: Decode, data: bytes, rng: random.Random) -> list[float]:
    """Time of `one` over that of `other`, for each pair."""
    found: list[float] = []
    for _ in range(PAIRS):
        took: dict[int, float] = {}
        for which in rng.sample((0, 1), 2):
            took[which] = seconds((one, other)[which], data)
        found.append(took[0] / took[1])
    return found


def psnr_db(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Of 8-bit images; 99 where they are equal."""
    error = np.square(one.astype(np.float64) - other).mean()
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-12))))


def say(figure: str, value: float, bound: str, holds: bool, unit: str) -> None:
    """One line of the result."""
    print(json.dumps({"figure": figure, "value": round(value, 3), "bound": bound, "holds": holds, "unit": unit}))


def main() -> None:
    """Time the photographs at every size, then compare pixels."""
    rng = random.Random(0)
    for (width, height), least in BOUNDS.items():
        encoded: list[bytes] = []
        for pixels in load_sample_images().images:
            buffer = io.BytesIO()
            photograph = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            photograph.save(buffer, format="JPEG", quality=90)
            encoded.append(buffer.getvalue())
        for data in encoded:  # warm
            seconds(ours, data), seconds(webdatasets, data)
        faster, control = (
            statistics.median(ratio for data in encoded for ratio in ratios(other, ours, data, rng))
            for other in (webdatasets, ours)
        )
        worst = min(psnr_db(ours(data), webdatasets(data)) for data in encoded)
        name = f"JPEG {width}×{height} to {SIZE}"
        say(f"{name}: webdataset's time over ours", faster, f">= {least}", faster >= least, "ratio")
        same = abs(control - 1) <= 0.03
        say(f"{name}: control, our time over ours", control, "0.97 to 1.03", same, "ratio")
        say(f"{name}: PSNR to the full decode, the lower of two photographs", worst, ">= 40", worst >= 40, "dB")


if __name__ == "__main__":
    main()
