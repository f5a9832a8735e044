"""How many images are sampled together where nobody says."""

import math

import torch

from cedm_ray.diffusion.blocks import Block
from cedm_ray.diffusion.precond import EDMPrecond

CPU_BATCH = 64
MOST_PIXELS = 1024 * 32 * 32  # of a batch: more do not make a GPU faster that has enough to do with these
MEMORY_SHARE = 0.5  # of what is free; the rest is for the workspaces of convolutions and for the caller
WIDEST_AT_ONCE = 8  # values that live at once beside the kept ones, in layers of the widest kind


def fitting_batch(net: EDMPrecond, device: torch.device | str) -> int:
    """Images that fill the device when the network is called without gradients.

    Args:
        net: The network.
        device: Where it is called.

    Returns:
        On a GPU a power of two: 1,024 images of 32x32 pixels, 256 of 64x64 and so on, fewer where they might not fit
        into half of the memory that is free now. Elsewhere 64.
    """
    where = torch.device(device)
    if where.type != "cuda":
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(where)
    # What torch holds and does not use is free, too.
    free += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return batch_for(free, image_bytes(net), net.img_resolution)


def batch_for(free_bytes: int, bytes_per_image: int, img_resolution: int) -> int:
    """The largest power of two that :func:`fitting_batch` allows, at least 1."""
    fits = min(int(free_bytes * MEMORY_SHARE) // bytes_per_image, MOST_PIXELS // img_resolution**2)
    return 1 << max(fits, 1).bit_length() - 1


def image_bytes(net: EDMPrecond) -> int:
    """Memory that one image takes in a call without gradients, in bytes, estimated from above.

    Counted are the outputs of the encoder, which are all kept for the decoder, and some layers of the widest kind,
    in float32. The scores of attention are not: no kernel that is worth having on a GPU stores them.
    """
    side = net.img_resolution
    kept = [net.model.first_conv.out_channels * side**2]
    for block in net.model.encoder.values():
        assert isinstance(block, Block)
        side = side // 2 if block.resample == "down" else side
        kept.append(block.out_channels * side**2)
    return 4 * (sum(kept) + WIDEST_AT_ONCE * max(kept))


def even_batch(total: int, most: int) -> int:
    """Size of as few batches of at most ``most`` images as hold ``total``, with the last one hardly smaller."""
    return max(math.ceil(total / max(math.ceil(total / most), 1)), 1)
