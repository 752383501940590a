"""How many members the requests of a queue get, and how many requests a queue may hold. No threads, no clock."""
import numpy as np

# Share of the latency target that is planned with; the rest is for what no plan foresees.
_MARGIN = 0.8


class MemberPolicy:
    """Chooses the number of members of a batch from the state of the queue, and foresees how long a request waits.

    A number of members fits if the oldest request of the batch would be answered in time, if at this pace so would be
    the oldest of those behind it, and if all that wait or arrive during the batch would be done within the target from
    now. The largest that fits is taken.

    Args:
        latency_target: Seconds within which a request is to be answered.
        seconds: Measured seconds of a batch, per number of members, then per batch size. The batch sizes are the same
            for every number of members; between two of them the seconds are interpolated.
    """

    def __init__(self, latency_target: float, seconds: dict[int, dict[int, float]]):
        self.latency_target = latency_target
        self.seconds = seconds
        self.schedule = tuple(sorted(seconds))
        self.batch_sizes = tuple(sorted(seconds[self.schedule[0]]))
        # Time of recent batches over the measured one: the machine may be slower now than it was.
        self.slowdown = 1.

    def measured(self, num_members: int, batch_size: int) -> float:
        """Return the seconds that a batch of at most the largest measured size took when that was measured."""
        row = self.seconds[num_members]
        return float(np.interp(batch_size, self.batch_sizes, [row[size] for size in self.batch_sizes]))

    def expected(self, num_members: int, batch_size: int) -> float:
        """Return the seconds that such a batch is expected to take now."""
        return self.measured(num_members, batch_size) * self.slowdown

    def choose(
            self,
            batch_size: int,
            waiting: int,
            oldest_age: float,
            waiting_age: float,
            arrival_rate: float,
    ) -> int:
        """Return the number of members for a batch.

        Args:
            batch_size: Number of requests in the batch.
            waiting: Number of requests behind it.
            oldest_age: Seconds since the oldest request of the batch was made.
            waiting_age: Seconds since the oldest request behind it was made, 0 if there is none.
            arrival_rate: Requests per second that are arriving.
        """
        budget = _MARGIN * self.latency_target
        largest = self.batch_sizes[-1]
        for num_members in reversed(self.schedule[1:]):
            duration = self.expected(num_members, batch_size)
            behind = waiting + arrival_rate * duration
            full, rest = divmod(round(behind), largest)
            rounds = full * self.expected(num_members, largest)
            rounds += self.expected(num_members, rest) if rest else 0.
            ends = [oldest_age + duration]
            if waiting:
                ends.append(waiting_age + duration + self.expected(num_members, min(waiting, largest)))
            if rounds:  # else nobody but the batch itself, whose deadline may be longer, has to wait
                ends.append(duration + rounds)
            if max(ends) <= budget:
                return num_members
        return self.schedule[0]

    def head_start(self, left: float) -> float:
        """Return how many seconds before now a request would have been made if it had all of the target.

        Args:
            left: Seconds that it may take from now on.
        """
        return _MARGIN * (self.latency_target - left)

    def would_be_late(self, waiting: int, busy: float | None, left: float | None = None) -> bool:
        """Whether a new request would be answered too late even if all got the fewest members from now on.

        Where nothing runs or waits, the machine counts as fast as it was measured: that it was slow once, nobody would
        else find out to be over.

        Args:
            waiting: Number of requests before it.
            busy: Seconds until the batch that is being computed is done, None if there is none.
            left: Seconds that it may take from now on; the target if None.
        """
        fewest, largest = self.schedule[0], self.batch_sizes[-1]
        full, rest = divmod(waiting, largest)
        if not waiting and busy is None:
            seconds = self.measured(fewest, 1)
        else:
            seconds = (busy or 0.) + full * self.expected(fewest, largest) + self.expected(fewest, rest + 1)
        return seconds > _MARGIN * (self.latency_target if left is None else left)

    def record(self, num_members: int, batch_size: int, duration: float) -> None:
        """Learn from a batch that took `duration` seconds."""
        ratio = duration / self.measured(num_members, batch_size)
        self.slowdown += 0.2 * (ratio - self.slowdown)
