"""What a row with a photograph costs before the model sees it, beside the way LLaVA's own code prepares it.

The pictures are photographs' size (1600 x 1200), drawn from a seed; 336 pixels a side go to the tower. Seconds are of
one core's time, the least of several rounds. LLaVA's way: the whole JPEG decoded, a square of the mean colour made
around it (`image_aspect_ratio: pad`), CLIP's image processor on it in PIL.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from benchmarks.store import store
from mllm.data.images import fit_image, open_image, picture_side

SIDE, PICTURES, ROUNDS = 336, 8, 7
THIN = ((1, 2000), (1, 9000), (9000, 1))
SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def photograph(seed: int) -> Image.Image:
    """Colours that change at many scales, with some grain, as in a photograph."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (3 * 2**k, 4 * 2**k, 3), dtype=np.uint8)).resize(
                (1600, 1200), Image.Resampling.BICUBIC
            ),
            dtype=np.float32,
        )
        * 2.0**-k
        for k in range(8)
    ]
    return Image.fromarray((sum(layers) / 2).clip(0, 255).astype(np.uint8))


def ours(path: Path, processor: CLIPImageProcessor) -> torch.Tensor:
    image = open_image(path, where="benchmark", at_least=picture_side(processor))
    return processor([fit_image(image, processor, where="benchmark")], return_tensors="pt")["pixel_values"]


def whole(path: Path, processor: CLIPImageProcessor) -> torch.Tensor:
    """Ours, with every JPEG decoded at its full size."""
    image = open_image(path, where="benchmark")
    return processor([fit_image(image, processor, where="benchmark")], return_tensors="pt")["pixel_values"]


def llava(path: Path, processor: CLIPImageProcessorPil) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    square = Image.new("RGB", (max(image.size),) * 2, tuple(int(255 * mean) for mean in processor.image_mean))
    square.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
    return torch.as_tensor(np.array(processor([square])["pixel_values"]))


def core_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def thin_memory(size: tuple[int, int]) -> int:
    """MiB that a process needs more for one thin picture."""
    program = (
        "import resource; from PIL import Image; from transformers import CLIPImageProcessor;"
        "from mllm.data.images import fit_image;"
        f"processor = CLIPImageProcessor(**{SIZES});"
        "processor([Image.new('RGB', (40, 40))], return_tensors='pt');"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        f"processor([fit_image(Image.new('RGB', {size}), processor, where='x')], return_tensors='pt');"
        "print((peak() - before) // 1024)"
    )
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    torch.set_num_threads(1)
    processor, in_pil = CLIPImageProcessor(**SIZES), CLIPImageProcessorPil(**SIZES)
    with TemporaryDirectory() as folder:
        paths = [Path(folder, f"{k}.jpg") for k in range(PICTURES)]
        for seed, path in enumerate(paths):
            photograph(seed).save(path, quality=90)
        ways = {"ours": (ours, processor), "ours, whole JPEG": (whole, processor), "LLaVA": (llava, in_pil)}
        rates = {
            name: PICTURES / core_seconds(lambda way=way: [way[0](path, way[1]) for path in paths])
            for name, way in ways.items()
        }
        std = torch.tensor(processor.image_std)[:, None, None] * 255
        apart = torch.cat([(ours(path, processor) - whole(path, processor)).abs() * std for path in paths])
    figures = {
        "rows_per_second_per_core": {name: round(rate, 1) for name, rate in rates.items()},
        "of_255_by_which_a_smaller_decoded_jpeg_differs": {
            "mean": round(float(apart.mean()), 3),
            "99.9%": round(float(np.quantile(apart.numpy(), 0.999)), 2),
        },
        "mib_for_a_thin_picture": {f"{width} x {height}": thin_memory((width, height)) for width, height in THIN},
    }
    print(json.dumps(figures, indent=2))
    store("data", figures)


if __name__ == "__main__":
    main()
