"""How fast it goes, and how long it takes yet: sums over a sliding window, with time given by the caller."""

from collections import deque

WINDOW_S = 60.0
"""Tokens come by whole rows, so a shorter window would jump."""
LEAST_S = 1.0
"""What came in less time than this tells no speed."""


class Rate:
    """Amounts a second over the last `window_s` seconds.

    Args:
        now: when it begins to count, in seconds of any clock that never goes back; what is asked before a whole window
            has passed is told of the time since then.
    """

    def __init__(self, now: float, window_s: float = WINDOW_S) -> None:
        self._began, self._window_s = now, window_s
        self._events: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, now: float, amount: float) -> None:
        """So much was done at this moment."""
        self._events.append((now, amount))
        self._sum += amount
        self._forget(now)

    def per_s(self, now: float) -> float | None:
        """The mean over the window; None while there is too little time to tell."""
        self._forget(now)
        seconds = min(now - self._began, self._window_s)
        if seconds < LEAST_S:
            return None
        return self._sum / seconds if self._events else 0.0

    def _forget(self, now: float) -> None:
        while self._events and self._events[0][0] <= now - self._window_s:
            self._sum -= self._events.popleft()[1]


def eta_s(left: int, per_s: float | None) -> float | None:
    """Seconds until `left` rows are done at so many a second; None until that is known."""
    if left <= 0:
        return 0.0
    return left / per_s if per_s else None


def cost_of(seconds: float, price_per_hour: float | None) -> float | None:
    """What a box has cost in so many seconds, in the currency of its price; None without one."""
    return None if price_per_hour is None else seconds / 3600 * price_per_hour
