"""Run by torchrun in the tests: rank 1 fails alone; every rank writes what it was told.

torchrun ... tests/trainer/failing_rank.py FOLDER
"""

import sys
from pathlib import Path

from common.errors import DataError, LopdError
from trainer.world import World, joined


def read(world: World) -> int:
    """What rank 1 cannot."""
    if world.rank == 1:
        raise DataError("rank 1 cannot read", where="a shard", fix="Mend it")
    return world.rank


if __name__ == "__main__":
    with joined("cpu") as this_world:
        assert this_world.together(lambda: this_world.rank) == this_world.rank
        try:
            this_world.together(lambda: read(this_world))
        except LopdError as error:
            (Path(sys.argv[1]) / f"rank-{this_world.rank}").write_text(f"{type(error).__name__}: {error}")
