"""When is a replica taken for hung? By what it does, and by when it was last heard of."""

from precompute.config import Fleet
from precompute.fleet.member import LEAVE_S, STORE_S, Member
from precompute.fleet.messages import Beat, Failed, FromWorker, State, ToWorker, Want, Work
from precompute.fleet.replica import Slot

FLEET = Fleet(hang_s=10, startup_s=100, storage_patience_s=1000)


class Silent:
    """A replica that says nothing."""

    slot = Slot("0", ())
    lost = False

    def __init__(self) -> None:
        self.told: list[ToWorker] = []

    def send(self, message: ToWorker) -> None:
        self.told.append(message)

    def receive(self) -> list[FromWorker]:
        return []

    def ended(self) -> str | None:
        return None

    def last_words(self) -> str:
        return ""

    def kill(self) -> None:
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def member_at(clock: Clock, *said: FromWorker) -> Member:
    member = Member(Silent(), 8, clock)
    for message in said:
        member.hear(message)
    return member


def test_a_replica_that_waits_for_work_is_never_hung_and_one_that_got_some_must_be_heard_of() -> None:
    clock = Clock()
    member = member_at(clock, State(state="idle"), Want(idle=True))
    clock.now = 5000
    assert not member.hung(FLEET)
    member.give(Work(shard=3))
    assert (member.shards, member.wants) == ({3}, None)
    clock.now += 10
    assert not member.hung(FLEET)
    clock.now += 1
    assert member.hung(FLEET)


def test_a_replica_that_waits_for_the_store_must_be_heard_of_and_does_not_wait_for_ever() -> None:
    clock = Clock()
    member = member_at(clock, State(state="storing"))
    while clock.now < FLEET.storage_patience_s + STORE_S + FLEET.hang_s:
        assert not member.hung(FLEET)
        clock.now += 5
        member.hear(Beat())
    clock.now += 5
    assert member.hung(FLEET)

    stopped = member_at(clock, State(state="storing"))
    clock.now += 11
    assert stopped.hung(FLEET)


def test_a_replica_that_verifies_is_not_hung_as_long_as_it_gets_on() -> None:
    clock = Clock()
    member = member_at(clock, State(state="storing"))
    for verdicts in range(100):
        for _ in range(480 // 8):  # the longest that a completion may take
            clock.now += 8
            member.hear(Beat())
        assert not member.hung(FLEET)
        member.hear(State(state="storing", detail=f"{verdicts} completions verified"))
    assert clock.now > 10 * (FLEET.storage_patience_s + STORE_S + FLEET.hang_s)

    stuck, began = member_at(clock, State(state="storing", detail="7 completions verified")), clock.now
    while not stuck.hung(FLEET):
        clock.now += 8
        stuck.hear(Beat())
        assert clock.now < began + 480 * 100, "it would be waited for as long as the one that gets on"


def test_a_replica_that_loads_its_model_has_longer() -> None:
    clock = Clock()
    member = member_at(clock, State(state="loading"))
    clock.now = 99
    assert not member.hung(FLEET)
    member.hear(State(state="running"))
    clock.now += 11
    assert member.hung(FLEET)


def test_a_worker_that_said_why_it_ends_must_go_soon_whatever_it_was_doing() -> None:
    clock = Clock()
    failed = Failed(exit_code=75, text="no memory left to load the model", engine=True)
    leaving = [member_at(clock, state, failed) for state in (State(state="loading"), State(state="idle"))]
    clock.now = LEAVE_S
    assert not any(member.hung(FLEET) for member in leaving)
    clock.now += 1
    assert all(member.hung(FLEET) for member in leaving)
