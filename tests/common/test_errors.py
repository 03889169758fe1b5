import pickle

from common.errors import DataError


def test_an_error_says_the_same_in_another_process() -> None:
    error = DataError("a shard is missing", where="s3://bucket/run", fix="Copy it again", detail="  key  there  here")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is DataError
    assert str(arrived) == str(error)
    assert (arrived.what, arrived.where, arrived.fix, arrived.exit_code) == (error.what, error.where, error.fix, 65)
