"""
Moves rollouts to the ranks that train on them: only rows that a rank needs and doesn't have travel.
"""

from accelerate.utils import gather_object

from .rollout import Rollout, ScoredRound


# (round, global row of that round)
RowKey = tuple[int, int]


class RolloutExchange:
    """
    Fetches rows of the rounds of one generation batch.

    Args:
        rounds (`list[ScoredRound]`):
            The rounds, each with the rollouts of this rank.
        process_index, num_processes (`int`):
            This rank, and how many there are.
    """

    def __init__(self, rounds: list[ScoredRound], process_index: int, num_processes: int) -> None:
        self.rounds = rounds
        self.process_index = process_index
        self.num_processes = num_processes

    def _owner(self, key: RowKey) -> int:
        return key[1] // len(self.rounds[key[0]].rollouts)

    def _own(self, key: RowKey) -> Rollout:
        rollouts = self.rounds[key[0]].rollouts
        return rollouts[key[1] % len(rollouts)]

    def fetch(self, rows: list[RowKey]) -> list[Rollout]:
        """
        Rollouts for the rows of this rank. Called on every rank with the same argument.

        Args:
            rows (`list[RowKey]`):
                The rows of all ranks in global order, equally many for each.

        Returns:
            `list[Rollout]`: this rank's part, in order.
        """
        per_rank = len(rows) // self.num_processes
        travelling = {key for i, key in enumerate(rows) if self._owner(key) != i // per_rank}
        received: dict[RowKey, Rollout] = {}
        if travelling:  # alike on every rank, so that all take part or none
            mine = sorted(key for key in travelling if self._owner(key) == self.process_index)
            received = dict(gather_object([(key, self._own(key)) for key in mine]))
        local = rows[self.process_index * per_rank : (self.process_index + 1) * per_rank]
        return [self._own(key) if self._owner(key) == self.process_index else received[key] for key in local]
