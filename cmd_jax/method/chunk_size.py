"""The default number of prototypes in a chunk of the objective; apart from the loops, which need jax."""

SMALLEST = 256  # products with fewer columns no longer fill the arithmetic units
CPU_WHOLE_BYTES = 2**27  # up to here one chunk, which computes no logits twice, is faster than tiles that stay in the cache
CPU_TILE_BYTES = 2**20  # a core's cache
TPU_TILE_BYTES = 96 * 2**20  # on-chip memory
GPU_SHARE = 32  # of its memory


def default_chunk(rows: int, prototypes: int, platform: str, memory_bytes: int | None = None) -> int:
    """Number of prototypes in a chunk: as many as keep one float32 tile of logits [rows, chunk] in the memory at hand.

    The sizes are measured on a CPU (docs/performance.md); those of GPUs and TPUs are not.

    Args:
        rows: region rows of student and teacher together on one device.
        prototypes: K on one device.
        platform: "cpu", "tpu" or a GPU's name.
        memory_bytes: of the device; None where it does not say, then a GPU counts as one of 16 GiB.

    Returns:
        A power of two of at least 256, or K where that is less.
    """
    if platform == "cpu":
        tile = CPU_WHOLE_BYTES if 4 * rows * prototypes <= CPU_WHOLE_BYTES else CPU_TILE_BYTES
    elif platform == "tpu":
        tile = TPU_TILE_BYTES
    else:
        tile = (memory_bytes or 2**34) // GPU_SHARE
    if 4 * rows * prototypes <= tile:
        return prototypes
    fitting = max(SMALLEST, tile // (4 * rows))
    return min(prototypes, 1 << (fitting.bit_length() - 1))
