"""Python imports this at the start of each process of a side, ours and theirs, because its folder is on PYTHONPATH."""

from benchmarks.precompute.events import watch_vllm

watch_vllm()
