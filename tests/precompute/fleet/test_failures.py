"""What a worker ended of, as its supervisor tells it."""

from precompute.fleet.failures import last_line


def test_an_error_counts_for_more_than_what_is_written_after_it() -> None:
    assert last_line("loading\nerror: it died\nresource_tracker: something leaked\n") == "error: it died"
    assert last_line("one\ntwo") == "two"
    assert last_line("") == ""
