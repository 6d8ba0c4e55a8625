"""Where offsets live."""

from .plain import PlainStore


def make_store(checkpoints, layout, blocks, world, config, *, shared=None, progress=None):  # type: ignore
    return PlainStore(layout, blocks, len(checkpoints), world.device)
