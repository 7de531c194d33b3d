"""
Groups of different sizes in a generation batch of a fixed size.

A batch has a fixed number of *slots*, each of which holds `num_generations` completions of one prompt. A prompt
chooser may give several slots to one prompt; its *group* is then all its completions in the batch. How many it gets is
decided before they are generated, and must not depend on them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch


def prompts_of_slots(rows: Sequence[dict[str, Any]]) -> list[int]:
    """
    For each slot the number of its prompt, counted from 0. `rows` are the slots' data set rows; slots of one prompt
    are next to each other and have the same row, which is one object.
    """
    numbers: list[int] = []
    for slot, row in enumerate(rows):
        numbers.append(numbers[-1] + (row is not rows[slot - 1]) if slot else 0)
    return numbers


def share_out(gains: Sequence[Sequence[float]], slots: int, bars: Sequence[float]) -> list[int]:
    """
    Which prompts take the slots of a batch. They are passed in their order, and each takes the slots that add at least
    its bar to the worth of its group. If they take too few, the other slots follow, those that add most first.

    If all bars are 1, the sum of what the groups are worth is as large as it can be, as long as the gains of a prompt
    never rise from slot to slot. They don't where worth is the probability that the n completions of a group, with
    pass rate p, neither all pass nor all fail: the second difference of 1 − pⁿ − (1 − p)ⁿ in n, which is −pⁿ(1 − p)² −
    (1 − p)ⁿp², is never positive, and neither is its mean over any distribution of p.

    Args:
        gains (`Sequence[Sequence[float]]`):
            For each prompt, what its first slot adds, its second, and so on.
        slots (`int`):
            Number of slots.
        bars (`Sequence[float]`):
            For each prompt, the smallest gain that is taken at once, as a share of the largest gain of all.

    Returns:
        `list[int]`: the position of a prompt for each slot, ascending.
    """
    offers = [(gain, position) for position, of_prompt in enumerate(gains) for gain in of_prompt]
    largest = max((gain for gain, _ in offers), default=0.0)
    taken = [position for gain, position in offers if gain >= bars[position] * largest]
    passed_over = [(gain, position) for gain, position in offers if gain < bars[position] * largest]
    passed_over.sort(key=lambda offer: -offer[0])
    return sorted((taken + [position for _, position in passed_over])[:slots])


class Groups:
    """
    Which completions of a batch belong together.

    Args:
        prompts (`Sequence[int]`):
            For each slot, the number of its prompt.
        num_generations (`int`):
            Completions in a slot.

    Attributes:
        equal (`bool`):
            Whether every prompt has one slot.
        size (`int`):
            Completions of the largest group.
    """

    def __init__(self, prompts: Sequence[int], num_generations: int) -> None:
        slots = Counter(prompts)
        self.equal = len(slots) == len(prompts)
        self.size = num_generations * max(slots.values(), default=1)
        self._count = len(slots)
        # Of each completion, in the order of the batch
        self._places: list[int] = []
        self._weights: list[float] = []
        starts = {prompt: number * self.size for number, prompt in enumerate(slots)}
        for prompt in () if self.equal else prompts:
            self._places += range(starts[prompt], starts[prompt] + num_generations)
            self._weights += [len(prompts) / (len(slots) * slots[prompt])] * num_generations
            starts[prompt] += num_generations

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """
        Values of completions, group by group in the order of their first slots, each filled up to `size` with NaN. NaN
        means "not applicable" wherever rewards are read: what expects groups of one size leaves it out.

        Args:
            values (`torch.Tensor` of shape `(N, …)`):
                A value for each completion.

        Returns:
            `torch.Tensor` of shape `(P · size, …)` for P groups.
        """
        if self.equal:
            return values
        padded = values.new_full((self._count * self.size, *values.shape[1:]), torch.nan)
        padded[self._places] = values
        return padded

    def unpadded(self, values: torch.Tensor) -> torch.Tensor:
        """The reverse of [`padded`]."""
        return values if self.equal else values[self._places]

    def weighted(self, advantages: torch.Tensor) -> torch.Tensor:
        """
        Advantages with which every prompt counts the same in a mean over completions, however many it has: N / (P n)
        times the advantage, for N completions of P prompts of which this one has n. The mean of A ∇log π over the
        completions is then the mean over prompts of the mean over their completions. With leave-one-out advantages its
        expectation, before dead groups are replaced, is the mean over prompts of the gradient of their expected
        reward, whatever the n are.

        Args:
            advantages (`torch.Tensor` of shape `(N,)`):
                In the order of the batch.

        Returns:
            `torch.Tensor` of shape `(N,)`.
        """
        return advantages if self.equal else advantages * advantages.new_tensor(self._weights)
