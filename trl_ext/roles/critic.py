"""
Critics: the value V of a state, from the forward pass that gives the log-probabilities.

[`Critic`] is the contract: a kind of critic is one subclass and one entry of [`CRITICS`].

- [`HeadCritic`]: a head on the actor's last hidden state.
- [`AdapterCritic`]: an adapter and a head of its own on the base model that the actor's adapter is on.
- [`ModelCritic`]: a model of its own.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from ..errors import require, require_one_of, require_type
from .adapter_critic import AdapterCritic
from .critic_contract import (
    CONFIG_FILE,
    CRITIC,
    WEIGHTS_FILE,
    Critic,
    ValueHead,
    base_model_of,
    critic_of,
    without_critic,
)
from .head_critic import HeadCritic
from .model_critic import ModelCritic


__all__ = [
    "CONFIG_FILE",
    "CRITIC",
    "CRITICS",
    "WEIGHTS_FILE",
    "AdapterCritic",
    "Critic",
    "HeadCritic",
    "ModelCritic",
    "ValueHead",
    "base_model_of",
    "critic_class",
    "critic_of",
    "load_critic",
    "logps_and_values",
    "without_critic",
]

# Every kind of critic. A further one is a subclass of [`Critic`] and an entry here.
CRITICS: dict[str, type[Critic]] = {cls.kind: cls for cls in (HeadCritic, AdapterCritic, ModelCritic)}


def critic_class(kind: str) -> type[Critic]:
    """The class behind the name of a kind. Raises `ValueError` if there is none, or it goes by a different name."""
    require_one_of("critic", kind, CRITICS)
    found = CRITICS[kind]
    own = getattr(found, "kind", None)
    require(
        own == kind,
        f"CRITICS[{kind!r}] is {found.__name__}, whose `kind` is {own!r}: what it saves could not be loaded. Use one "
        "name for both.",
    )
    return found


def load_critic(directory: str | Path, actor: nn.Module, temperature: float = 1.0) -> Critic:
    """
    Load the critic that a trainer saved in `<output_dir>/critic`, and attach it to a policy.

    ```python
    policy = AutoModelForCausalLM.from_pretrained("out")  # or a PEFT model
    critic = load_critic("out/critic", policy)
    logps, values = logps_and_values(policy, input_ids, attention_mask)
    ```

    Args:
        directory (`str` or `Path`):
            The folder of the critic, or of the model with which it was saved; or the Hub id of that model.
        actor (`PreTrainedModel` or `PeftModel`):
            The policy that was saved with it.
        temperature (`float`):
            Divisor of the logits. With the trainer's, log-probabilities are the trainer's.

    Raises:
        FileNotFoundError: if there is no critic.
        ValueError: if its kind is unknown, or it is a head for hidden states of a different size.
    """
    require_type("directory", directory, str | Path, "Pass the folder of a critic, such as 'out/critic'.")
    require_type("actor", actor, nn.Module, "Pass the loaded policy that was saved with the critic.")
    directory = _find_critic(directory)
    description = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    base = base_model_of(actor)
    try:
        critic = critic_class(description["critic"]).from_description(description, actor)
        critic.load(directory)
    except ValueError as error:
        raise ValueError(f"The critic in {directory} can't be loaded. {error}") from error
    critic.to(base.device).train(base.training)
    add_fused_lm_head(base, temperature)
    critic.attach(base)
    return critic


def _find_critic(name: str | Path) -> Path:
    """The folder of a critic, of which the name may be that of the model's folder or its Hub id."""
    for folder in (Path(name), Path(name) / CRITIC):
        if (folder / CONFIG_FILE).exists():
            return folder
    why = ""
    if isinstance(name, str) and not Path(name).exists() and name.count("/") == 1:
        try:
            found = Path(snapshot_download(name, allow_patterns=[f"{CRITIC}/*"])) / CRITIC
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            why = f" As a Hub id it is of no use: {error}"
        else:
            if (found / CONFIG_FILE).exists():
                return found
    raise FileNotFoundError(
        f"No critic in directory={str(name)!r}: {CONFIG_FILE} is missing. Pass the folder `critic` in the "
        f"output_dir of a trainer, or the Hub id of a model that was pushed with its critic.{why}"
    )


def logps_and_values(
    actor: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens, and values of states, in one forward pass.

    Args:
        actor (`PreTrainedModel` or `PeftModel`):
            A policy to which [`load_critic`] attached its critic.
        input_ids, attention_mask (`torch.Tensor` of shape `(B, S)`):
            Prompts and completions.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: log-probabilities `(B, S − 1)` of tokens 1 to S − 1, and values `(B, S)`
        of the states after each token.
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    output = actor(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return output.log_probs, output.state_values
