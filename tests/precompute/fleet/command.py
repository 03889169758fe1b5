"""`lopd` as it is, with puppets for workers: `python -m tests.precompute.fleet.command precompute run ...`."""

from functools import partial

from common import cli
from precompute import phases
from precompute.fleet.local import Box

if __name__ == "__main__":
    phases.Box = partial(Box, program="tests.precompute.fleet.puppet")  # pyright: ignore[reportAttributeAccessIssue]
    cli.main()
