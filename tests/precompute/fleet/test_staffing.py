"""Which slots get a replica, when the work that is left is not for everybody."""

from collections.abc import Sequence

from precompute.config import Fleet
from precompute.fleet.messages import Job, State, Want
from precompute.fleet.replica import Slot
from precompute.fleet.supervisor import Supervisor
from precompute.fleet.tally import Tally
from tests.precompute.fleet.test_member import Silent
from tests.precompute.fleet.test_shards import ignore, queue_of, see

JOB = Job(phase="rollouts", section={}, plan={}, model="m", folder="m", max_model_len=8, window=4)
FIRST, SECOND = Slot("0", (0,)), Slot("1", (1,))


class TwoGpus:
    """A launcher of replicas that say nothing."""

    def __init__(self) -> None:
        self.started: list[Slot] = []

    def slots(self) -> Sequence[Slot]:
        return FIRST, SECOND

    def start(self, slot: Slot) -> Silent:
        self.started.append(slot)
        replica = Silent()
        replica.slot = slot
        return replica

    def wait(self, replicas: Sequence[object], seconds: float) -> None:
        pass


def with_one_shard_that_comes_again(*, died_on: Slot) -> tuple[Supervisor, TwoGpus]:
    """One shard, whose engine died on a slot; the first slot has a replica that waits for work, the second none."""
    queue, launcher, fleet = queue_of(set(), 1), TwoGpus(), Fleet()
    see(queue, set())
    tally = Tally("rollouts", "url", "id", 1, fleet, queue)
    supervisor = Supervisor(JOB, fleet, queue, launcher, tally, show=lambda: None, say=ignore)
    supervisor._staff()
    assert launcher.started == [FIRST], "one shard needs one engine"
    for message in (State(state="idle"), Want(idle=True)):
        supervisor._members[FIRST].hear(message)
    assert queue.take() == 0
    supervisor._suspects.died({"r": 0}, died_on, elsewhere=True)
    queue.put_back(0)
    return supervisor, launcher


def test_a_shard_that_who_waits_for_work_may_not_have_is_worth_a_replica_on_another_slot() -> None:
    supervisor, launcher = with_one_shard_that_comes_again(died_on=FIRST)
    supervisor._serve()
    assert supervisor._members[FIRST].wants is not None, "its engine died there: the shard is for another"
    assert supervisor._is_wanted(SECOND) and not supervisor._is_wanted(FIRST)
    supervisor._staff()
    assert launcher.started == [FIRST, SECOND]


def test_a_shard_that_who_waits_for_work_may_have_is_worth_no_other_replica() -> None:
    supervisor, launcher = with_one_shard_that_comes_again(died_on=SECOND)
    supervisor._staff()
    assert launcher.started == [FIRST]
    supervisor._serve()
    assert supervisor._members[FIRST].shards == {0}
