"""
Moves rollouts to the ranks that train on them. A rollout is sent only if its rank is not the one that needs it.
"""

from accelerate.utils import gather_object

from .rollout import Rollout, ScoredRound


# Where a rollout comes from: the round, and its number among all ranks' rollouts of that round
RowKey = tuple[int, int]


class RolloutExchange:
    """
    Fetches rollouts of the rounds of one generation batch.

    Args:
        rounds (`list[ScoredRound]`):
            The rounds, each with the rollouts of this rank.
        process_index, num_processes (`int`):
            This rank, and the number of ranks.
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
        The rollouts for this rank's rows. Must be called on every rank with the same argument.

        Args:
            rows (`list[RowKey]`):
                The rows of all ranks in global order, the same number for each rank.

        Returns:
            `list[Rollout]`: those of this rank's rows, in order.
        """
        per_rank = len(rows) // self.num_processes
        sent = {key for i, key in enumerate(rows) if self._owner(key) != i // per_rank}
        received: dict[RowKey, Rollout] = {}
        if sent:  # the same on every rank, so that all ranks take part in the collective or none does
            mine = sorted(key for key in sent if self._owner(key) == self.process_index)
            received = dict(gather_object([(key, self._own(key)) for key in mine]))
        local = rows[self.process_index * per_rank : (self.process_index + 1) * per_rank]
        return [self._own(key) if self._owner(key) == self.process_index else received[key] for key in local]
