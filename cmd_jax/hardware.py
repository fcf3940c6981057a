"""What a run is on, and the batch that suits it."""

from typing import NamedTuple

# Of an open train.batch_size. DINO trains with 64 images on each of 16 GPUs; with more in all its learning rate is untested.
IMAGES_PER_DEVICE = 64
MAX_BATCH_SIZE = 1024
MIN_STEPS_PER_EPOCH = 5
# What a step needs for an image, at most: of Swin-T at K = 65,536, in bfloat16 on a TPU, the compiler says 0.40 GiB
# (docs/performance.md); a ViT-S/16 needs less.
BYTES_PER_IMAGE = int(0.45 * 2**30)


class Hardware(NamedTuple):
    """What the open values of precision, batch and speed depend on.

    Attributes:
        platform: of the devices: "cpu", "gpu" or "tpu".
        devices: of all processes together.
        memory_bytes: of the device that has the least; None where it does not say.
        cuda: whether the devices are NVIDIA's; other GPUs are "gpu" too.
    """

    platform: str
    devices: int = 1
    memory_bytes: int | None = None
    cuda: bool = False


ONE_CPU = Hardware("cpu")


def default_batch_size(train_images: int, hardware: Hardware, accumulate: int = 1) -> int:
    """The batch of a run that names none, of all devices together.

    On CPUs 64 images. On accelerators 64 for each device, or the power of two that its memory holds; at most 1,024, and no more
    than leaves five steps in an epoch unless that is fewer than 64.

    Args:
        train_images: number of training images; 0 where it is not known. The batch is not larger.
        hardware: that the run is on.
        accumulate: parts of the batch that go through one after the other. They make no batch larger, so that they save memory;
            devices x accumulate divides it.
    """
    if hardware.platform == "cpu":
        batch = IMAGES_PER_DEVICE
    else:
        fits = hardware.memory_bytes // BYTES_PER_IMAGE if hardware.memory_bytes else IMAGES_PER_DEVICE
        on_device = min(IMAGES_PER_DEVICE, 2 ** (max(1, fits).bit_length() - 1))  # the power of two that fits
        batch = min(on_device * hardware.devices, MAX_BATCH_SIZE)
        if train_images:
            batch = min(batch, max(IMAGES_PER_DEVICE, train_images // MIN_STEPS_PER_EPOCH))
    if train_images:
        batch = min(batch, train_images)
    unit = hardware.devices * accumulate
    return max(1, batch // unit) * unit
