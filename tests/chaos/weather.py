"""Which requests of a run go wrong, and how likely."""

from tests.common.faults import Fault, Faults, Kind

LATE_S = 1.5


def weather(seed: int) -> Faults:
    """About one request in six fails, every kind of request in every way that it can."""
    return Faults(
        Fault(Kind.DROP, chance=0.02),
        Fault(Kind.LOSE, chance=0.03),
        Fault(Kind.STALL, chance=0.01, seconds=LATE_S),
        Fault(Kind.HANG, chance=0.01, seconds=LATE_S),
        Fault(Kind.REFUSE, chance=0.02, status=503, code="SlowDown"),
        Fault(Kind.REFUSE, chance=0.01, status=500, code="InternalError"),
        Fault(Kind.REFUSE, "PUT", "/commits/", chance=0.03, status=409, code="ConditionalRequestConflict"),
        Fault(Kind.REFUSE, chance=0.002, status=400, code="ExpiredToken"),
        Fault(Kind.REFUSE, chance=0.002, status=403, code="RequestTimeTooSkewed"),
        Fault(Kind.ALTER, chance=0.03),
        Fault(Kind.CUT, chance=0.03),
        Fault(Kind.SHORTEN, chance=0.02),
        Fault(Kind.FLIP, chance=0.01, checksums=True),
        Fault(Kind.FLIP, chance=0.03),
        seed=seed,
    )
