"""
One batch of our PPO is one of TRL 1.12's, number for number: `record_trl_1_12_ppo.py` recorded it.

Both have the same weights, settings and completions. From there on everything is computed: log-probabilities of policy
and reference, scores, KL, values, token rewards, advantages, returns, both losses of two epochs, the weights after
them, and what is logged under names that both know.
"""

from typing import Any

import pytest
import torch
from datasets import Dataset
from upstream import record_trl_1_12_ppo as recording

from trl_ext import PPOConfig, PPOTrainer
from trl_ext.objectives import credit
from trl_ext.objectives.values import value_loss


TOLERANCE = 1e-5
RECORDED = recording.recorded()
# What 1.12 logs and ours doesn't, or not under that name
LOGGED_BY_THEM_ALONE = {
    "objective/entropy",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "val/ratio_var",
    "val/num_eos_tokens",
    "lr",
    "episode",
    "epoch",
}


class Watched(PPOTrainer):
    """Keeps what it computes, under 1.12's names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.of_batch: dict[str, torch.Tensor] = {}
        self.of_epochs: list[dict[str, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def _estimate(self, output: dict[str, Any], state_values: torch.Tensor, training: bool) -> torch.Tensor:
        self.of_batch |= {
            "logprobs": output["old_per_token_logps"],
            "ref_logprobs": output["ref_per_token_logps"],
            "scores": output["token_rewards"].sum(dim=1),  # with the penalty that 1.12 counts among them
        }
        result = super()._estimate(output, state_values, training)
        self.of_batch |= {
            "queries": output["prompt_ids"],
            "responses": output["completion_ids"],
            "values": output["old_values"],
            "returns": output["returns"],
            "advantages": output["advantages"],
        }
        return result

    def _kl_to_reference(self, *args: Any) -> torch.Tensor:
        kl = super()._kl_to_reference(*args)
        assert kl is not None
        self.of_batch["kl"] = kl
        return kl

    def added_loss(self, loss: torch.Tensor, model: Any, inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Any:
        total = super().added_loss(loss, model, inputs, outputs)
        logprobs, values = outputs[0], outputs[3][:, :-1]
        order = [inputs["completion_ids"].tolist().index(row) for row in self.of_batch["responses"].tolist()]
        self.of_epochs.append(
            {
                "new_logprobs": logprobs.detach()[order],
                "vpred": values.detach()[order],
                "pg_loss": loss.detach(),
                "vf_loss": ((total - loss) / self.args.vf_coef).detach(),
            }
        )
        by_token, _ = value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        torch.testing.assert_close(by_token.mean(), self.of_epochs[-1]["vf_loss"])  # nothing else was added
        return total


class Completions:
    """A `rollout_func`: to each prompt, the completion that 1.12 sampled."""

    def __init__(self, queries: torch.Tensor, responses: torch.Tensor) -> None:
        rows = zip(queries.tolist(), responses.tolist(), strict=True)
        self.of_prompt = {tuple(token for token in query if token != recording.PAD): ids for query, ids in rows}

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        ids = [prompt.input_ids for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [self.of_prompt[tuple(row)] for row in ids], "logprobs": None}


class Run:
    """A run of ours on a recorded case."""

    def __init__(self, case: str, directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.theirs = RECORDED.cases[case]
        models = {role: recording.restored(role, weights) for role, weights in RECORDED.weights.items()}
        seen: dict[str, torch.Tensor] = {}

        def watched_gae(rewards: torch.Tensor, *args: Any) -> Any:
            advantages, returns = gae(rewards, *args)
            seen.update(rewards=rewards, raw_advantages=advantages)
            return advantages, returns

        gae = credit.gae
        monkeypatch.setattr(credit, "gae", watched_gae)
        self.trainer = Watched(
            args=PPOConfig(
                output_dir=str(directory),
                logging_steps=recording.EPOCHS,
                critic_learning_rate=recording.SETTINGS["learning_rate"],
                **recording.SETTINGS,
                **recording.CASES[case],
            ),
            processing_class=recording.tokenizer(),
            model=models["policy"],
            ref_model=models["reference"],
            reward_model=models["reward"],
            value_model=models["value"],
            train_dataset=Dataset.from_dict({"input_ids": recording.prompts()}),
            rollout_func=Completions(self.theirs["queries"], self.theirs["responses"]),
        )
        self.trainer.train()
        of_batch, of_epochs = {**self.trainer.of_batch, **seen}, self.trainer.of_epochs
        # Both shuffle: 1.12's rows are looked up among ours
        order = [of_batch["responses"].tolist().index(row) for row in self.theirs["responses"].tolist()]
        self.ours = {name: value[order] for name, value in of_batch.items()}
        for name in recording.OF_EPOCH:
            values = torch.stack([epoch[name] for epoch in of_epochs])
            self.ours[name] = values[:, order] if values.dim() > 1 else values
        critic = {
            f"model.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name: value
            for name, value in self.trainer.critic.state_dict().items()
        }
        policy = {
            name: value
            for name, value in recording.weights_of(self.trainer.model).items()
            if not name.startswith("critic.")
        }
        for role, weights in (("policy", policy), ("value", critic)):
            self.ours |= {f"{role}_after/{name}": tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=recording.CASES)
def run(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Run(request.param, tmp_path_factory.mktemp("ppo"), monkeypatch)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.train
def test_prompts_and_completions_are_the_recorded_ones(run):
    assert torch.equal(run.ours["queries"], run.theirs["queries"])
    assert torch.equal(run.ours["responses"], run.theirs["responses"])


@pytest.mark.train
@pytest.mark.parametrize(
    "name",
    [
        "logprobs",
        "ref_logprobs",
        "scores",
        "kl",
        "values",
        "rewards",
        "raw_advantages",
        "advantages",
        "returns",
        "new_logprobs",
        "vpred",
        "pg_loss",
        "vf_loss",
    ],
)
def test_a_batch_has_the_numbers_of_trl_1_12(run, name):
    close(run.ours[name], run.theirs[name])


@pytest.mark.train
def test_the_weights_after_two_epochs_are_those_of_trl_1_12(run):
    for role in ("policy", "value"):
        names = {name for name in run.theirs if name.startswith(f"{role}_after/")}
        assert names == {name for name in run.ours if name.startswith(f"{role}_after/")}
        for name in names:
            close(run.ours[name], run.theirs[name])


@pytest.mark.train
def test_the_weights_moved_by_more_than_the_tolerance(run):
    """Each tensor of them; otherwise the test above would say nothing."""
    for role in ("policy", "value"):
        moved = [
            (run.theirs[f"{role}_after/{name}"] - before).abs().max().item()
            for name, before in RECORDED.weights[role].items()
        ]
        assert min(moved) > 10 * TOLERANCE


@pytest.mark.parametrize("case", recording.CASES)
def test_a_recorded_batch_could_tell_a_difference(case):
    """References that differ from the policy, ratios and values that are clipped and some that aren't."""
    theirs = RECORDED.cases[case]
    assert theirs["kl"].abs().mean() > 0.01
    log_ratio = theirs["new_logprobs"][1] - theirs["logprobs"]
    outside = ((log_ratio.exp() - 1).abs() > recording.SETTINGS["cliprange"]).float().mean()
    assert 0 < outside < 1
    moved = ((theirs["vpred"][1] - theirs["values"]).abs() > recording.SETTINGS["cliprange_value"]).float().mean()
    assert 0 < moved < 1
    assert theirs["pg_loss"][1].abs() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def logged(run):
    (ours,) = [entry for entry in run.trainer.state.log_history if "loss/value_avg" in entry]
    return ours


@pytest.mark.train
def test_logs_agree_where_they_have_the_same_name(run, logged, request):
    case = request.node.callspec.params["run"]
    theirs = dict(RECORDED.rest["logged"][case])
    for name in ("objective/scores", "objective/rlhf_reward"):  # 1.12 logs them less the penalty, ours as they came
        theirs[name] += recording.CASES[case].get("missing_eos_penalty", 0.0)
    assert theirs.keys() - logged.keys() <= LOGGED_BY_THEM_ALONE
    for name in theirs.keys() & logged.keys() - LOGGED_BY_THEM_ALONE:
        assert logged[name] == pytest.approx(theirs[name], abs=TOLERANCE, rel=TOLERANCE), name
