"""Workers that are killed, on a store that fails: does a dataset survive them? `python -m tests.chaos --help`."""
