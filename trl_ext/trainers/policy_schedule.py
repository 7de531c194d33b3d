"""
The policy's learning rate where a critic is warmed up first: its schedule begins with its first step.

In the warm-up the rate is 0. After that it is what the schedule says of a run that has as many optimizer steps as are
left. So a linear warm-up of the learning rate isn't used up while the policy waits, and a decay ends with the run. The
critic's schedule is that of the whole run.
"""

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from ..errors import require


Factor = Callable[[int], float]


def check_warmup(critic_warmup_steps: int, steps: int) -> None:
    """Raises `ValueError` if a run of so many optimizer steps would be over before its policy learns."""
    require(
        critic_warmup_steps < steps or not critic_warmup_steps,
        f"critic_warmup_steps={critic_warmup_steps} leaves none of the {steps} optimizer steps to the policy. Raise "
        "max_steps or num_train_epochs, or lower critic_warmup_steps.",
    )


def with_policy_waiting(
    scheduler: LambdaLR, args: TrainingArguments, steps: int, warmup_steps: Callable[[], int]
) -> LambdaLR:
    """
    A schedule like `scheduler`, but that the policy's waits for the warm-up of the critic.

    Args:
        scheduler (`LambdaLR`):
            Result of `create_scheduler`, in its first step.
        args ([`~transformers.TrainingArguments`]):
            Say which schedule it is.
        steps (`int`):
            Optimizer steps of the run.
        warmup_steps (`Callable`):
            Length of the warm-up, which may turn out to be shorter than planned.
    """
    by_warmup: dict[int, Factor] = {}

    def waiting(step: int) -> float:
        waited = warmup_steps()
        if step < waited:
            return 0.0
        if waited not in by_warmup:
            by_warmup[waited] = _factor(args, steps - waited)
        return by_warmup[waited](step - waited)

    # Of plain functions, a scheduler's state in a checkpoint holds nothing
    factors = [
        factor if group.get("is_critic") else waiting
        for factor, group in zip(scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
    ]
    return LambdaLR(scheduler.optimizer, factors)


def _factor(args: TrainingArguments, steps: int) -> Factor:
    """What a schedule multiplies the learning rate by in each of so many steps."""
    assert not isinstance(args.lr_scheduler_kwargs, str)  # transformers has read it
    nothing = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=nothing,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    assert isinstance(scheduler, LambdaLR)
    factor: Factor = scheduler.lr_lambdas[0]
    return factor
