"""Input pipelines side by side on the same images, for 2 x 224 + 8 x 96 px views.

    python -m benchmarks.input_pipeline              # on CPU add: taskset -c 1, for a core of its own
    python -m benchmarks.input_pipeline --folder=PHOTOS --step_batch_size=64 --dtype=bfloat16    # on a GPU

(a) classical: two worker processes decode and make ten views with Pillow; (b) ours in the first epoch: threads decode to
canvases, which go to the device; (c) ours from the cache. The three take turns for `--rounds` rounds; the best of each counts.
Then how fast batches of `--gather_batch_size` images are copied out of the cache by 1, 2, 4, ... threads, and how fast as many
threads copy as many bytes from array to array (the ceiling of the machine); these take turns too. Then the
share of the train step (ViT-S/16, `configs/cub.py`) that the views take on the device: seconds on a GPU, CPU seconds on a CPU.
Without --folder the images are 500 x 375 px parts of a photograph with grain, as large as CUB-200-2011's.
Prints a table, and JSON as the last line: host_cost_ratio is CPU seconds an image of (a) over (c), images_per_s_ratio is (b)
over (a), gather_ratio is the rate of the most threads over that of one, gather_copy_ratio the rate of the most threads over
that of the plain copy.
"""

import argparse
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from benchmarks import classical
from cmd_jax.config import ConfigDict
from cmd_jax.config.presets import fine_grained
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.cache import Batch
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.loader import CanvasCache, Prefetch, batches
from cmd_jax.data.sources import NO_BOXES, Record
from cmd_jax.training.run import build_run
from cmd_jax.training.sharding import all_hardware

IMAGE, GRAIN, QUALITY = (500, 375), 6.0, 95
CACHED_EPOCHS = 10


class Images:
    """Encoded images in memory, as a source."""

    class_names, files = (), ()

    def __init__(self, encoded: list[bytes]):
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Record:
        return Record(self.encoded[index], -1, str(index), NO_BOXES)


class Cost(NamedTuple):
    """What a pipeline took: images a second of wall time, and CPU milliseconds of the host an image."""

    images_per_s: float
    cpu_ms: float


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """JPEGs like those of CUB-200-2011: parts of a photograph that matplotlib carries, with the grain of a camera."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB")
    rng, encoded = np.random.default_rng(seed), []
    for _ in range(count):
        width = int(rng.integers(300, photo.width))
        height = width * IMAGE[1] // IMAGE[0]
        left, top = int(rng.integers(0, photo.width - width)), int(rng.integers(0, photo.height - height))
        part = photo.resize(IMAGE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        pixels = np.asarray(part) + rng.normal(0, GRAIN, (*IMAGE[::-1], 3))
        out = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "jpeg", quality=QUALITY)
        encoded.append(out.getvalue())
    return encoded


def encoded_images(folder: str | None, count: int) -> list[bytes]:
    """The first training images of a folder, at most `count`; without one, `photographs`."""
    if not folder:
        return photographs(count)
    source = FolderSource(folder, "train")
    return [source[index].encoded for index in range(min(count, len(source)))]


def measure(images: int, work: Callable[[], float]) -> Cost:
    """Cost of work on a number of images; it returns the CPU seconds of other processes."""
    cpu, wall = time.process_time(), time.perf_counter()
    others = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu + others
    return Cost(images / wall, 1e3 * cpu / images)


def read(cache: CanvasCache, images: int, batch_size: int, threads: int, epochs: int) -> Cost:
    """(b) of an empty cache, (c) of a full one: batches on the device."""
    stream = Prefetch(batches(cache, images, batch_size, 0, 0, threads), jax.device_put, 2)
    steps = epochs * images // batch_size

    def consume() -> float:
        for _ in range(steps):
            jax.block_until_ready(next(stream))
        return 0.0

    cost = measure(steps * batch_size, consume)
    stream.close()
    return cost


def pipelines(arguments: argparse.Namespace, encoded: list[bytes], config: ConfigDict) -> tuple[dict[str, Cost], CanvasCache]:
    """The best cost of every pipeline, and a full cache."""
    images, size, workers = len(encoded), arguments.batch_size, arguments.workers
    found: dict[str, list[Cost]] = {"classical": [], "first_epoch": [], "cached": []}
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX threads may hang
    with ProcessPoolExecutor(workers, context, classical.start_worker, (encoded,)) as pool:
        list(pool.map(classical.make_batch, [[0]] * 8 * workers, range(8 * workers)))  # start and warm up
        for seed in range(arguments.rounds):
            order = np.random.default_rng(seed).permutation(images)
            jobs = [order[start : start + size].tolist() for start in range(0, images, size)]
            classic = lambda jobs=jobs: sum(pool.map(classical.make_batch, jobs, range(len(jobs))))
            found["classical"].append(measure(images, classic))
            cache = CanvasCache(Images(encoded), config.data)
            found["first_epoch"].append(read(cache, images, size, workers, 1))
            for index in range(images):  # those that the look-ahead had not reached
                cache.load(index)
            found["cached"].append(read(cache, images, size, workers, CACHED_EPOCHS))
    best = lambda costs: Cost(max(cost.images_per_s for cost in costs), min(cost.cpu_ms for cost in costs))
    return {name: best(costs) for name, costs in found.items()}, cache


def gathers(cache: CanvasCache, images: int, batch_size: int, threads: int, rounds: int) -> dict[int, tuple[float, float]]:
    """Images a second copied out of the cache, and between two arrays, by 1, 2, 4, ... threads up to a number."""
    counts = [2**power for power in range(threads.bit_length()) if 2**power < threads] + [threads]
    order = np.random.default_rng(0).integers(0, images, batch_size)
    source = cache.gather(order, None, ThreadPoolExecutor(1), 1).canvas
    target = source.copy()
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(time.sleep, [0.01] * count))  # start the threads
                started = time.perf_counter()
                cache.gather(order, None, pool, count)
                gathered = time.perf_counter()
                list(pool.map(np.copyto, np.array_split(target, count), np.array_split(source, count)))
                found[count].append((gathered - started, time.perf_counter() - gathered))
    return {count: tuple(batch_size / min(times) for times in zip(*rows, strict=True)) for count, rows in found.items()}


def augmentation(config: ConfigDict, cache: CanvasCache, rounds: int) -> tuple[float, float]:
    """Seconds an image of the views alone and of the whole train step; CPU seconds on a CPU."""
    size = config.train.batch_size
    run = build_run(config, range(5994), all_hardware())  # of CUB-200-2011: their number alone counts
    config, state = run.config, run.first_state()
    rows = [cache.load(index) for index in range(size)]
    batch = run.place(Batch(*map(np.stack, zip(*rows, strict=True)), np.arange(size, dtype=np.int32)))
    views = jax.jit(lambda key, *batch: multi_crop(key, *batch, views=config.views, normalization=config.data.normalization))
    step = run.compile()
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + rounds):  # the first one compiles
        started = clock()
        jax.block_until_ready(views(jax.random.key(0), *batch))
        between = clock()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds[0].append(between - started)
        seconds[1].append(clock() - between)
    return min(seconds[0][1:]) / size, min(seconds[1][1:]) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="photos to read, instead of those that are made")
    parser.add_argument("--images", type=int, default=128, help="how many images")
    parser.add_argument("--batch_size", type=int, default=32, help="of the pipelines")
    parser.add_argument("--workers", type=int, default=2, help="processes of (a), decoding threads of (b) and (c)")
    parser.add_argument("--gather_batch_size", type=int, default=256, help="images that are copied out of the cache at a time")
    parser.add_argument("--gather_threads", type=int, default=os.cpu_count(), help="most threads that copy")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--step_batch_size", type=int, default=2, help="of the train step; 0 leaves it out")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model and of the views")
    arguments = parser.parse_args()
    encoded = encoded_images(arguments.folder, arguments.images)
    if arguments.images % arguments.batch_size or len(encoded) < arguments.images:
        parser.error(f"{len(encoded)} images and --images={arguments.images} must fill batches of {arguments.batch_size}")
    config = fine_grained("cub", "vit_s16")
    config.data.cache = "ram"
    config.model.dtype = config.views.dtype = arguments.dtype
    costs, cache = pipelines(arguments, encoded, config)
    device = jax.devices()[0].device_kind
    result = {
        "device": device,
        "pictures": len(encoded),
        "picture_kbytes": round(float(np.mean([len(image) for image in encoded])) / 1e3, 1),
        "canvas_px": config.data.canvas_px,
        "workers": arguments.workers,
    }
    for name, cost in costs.items():
        print(f"{name:12}{cost.images_per_s:10.1f} images/s{cost.cpu_ms:10.3f} CPU ms an image", flush=True)
        result |= {f"{name}_images_per_s": round(cost.images_per_s, 1), f"{name}_cpu_ms_per_image": round(cost.cpu_ms, 3)}
    rates = gathers(cache, len(encoded), arguments.gather_batch_size, arguments.gather_threads, arguments.rounds)
    for threads, (gather, copy) in rates.items():
        print(f"gather by {threads} threads {gather:10.1f} images/s, plain copy {copy:10.1f}")
        result[f"gather_{threads}_threads_images_per_s"] = round(gather, 1)
        result[f"copy_{threads}_threads_images_per_s"] = round(copy, 1)
    if arguments.step_batch_size:
        config.train.batch_size = arguments.step_batch_size
        views, step = augmentation(config, cache, arguments.rounds)
        unit = "CPU ms" if jax.default_backend() == "cpu" else "ms"
        print(f"views {1e3 * views:.1f} of {1e3 * step:.1f} {unit} an image of the ViT-S/16 step on {device}", flush=True)
        result |= {
            "augmentation_ms_per_image": round(1e3 * views, 2),
            "step_ms_per_image": round(1e3 * step, 2),
            "augmentation_share_percent": round(100 * views / step, 2),
        }
    result["host_cost_ratio"] = round(costs["classical"].cpu_ms / costs["cached"].cpu_ms, 1)
    result["images_per_s_ratio"] = round(costs["first_epoch"].images_per_s / costs["classical"].images_per_s, 2)
    most = rates[arguments.gather_threads]
    result["gather_ratio"] = round(most[0] / rates[1][0], 2)
    result["gather_copy_ratio"] = round(most[0] / most[1], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
