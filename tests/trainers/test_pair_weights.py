"""Weights of pairs, and pairs of a prompt that are trained on together."""

import pytest
import tiny
import torch
from datasets import Dataset
from distributed.dpo_worker import pairs, recorded, settings

import trl_ext
from trl_ext.curriculum.schedule import DifficultyCurriculum


WEIGHTS = [0.5, 0.0, 2.0, 1.25]


def trainer(tmp_path, rows, **overrides):
    return trl_ext.DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(1),
        args=trl_ext.DPOConfig(**settings(tmp_path, per_device_train_batch_size=4, **overrides)),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )


def gradient(trainer, rows):
    """Of the loss on these rows of the training set as one micro-batch, and the loss."""
    trainer.model.zero_grad()
    columns = trainer._signature_columns or trainer._set_signature_columns_if_needed() or trainer._signature_columns
    examples = [
        {name: row[name] for name in columns if name in row} for row in (trainer.train_dataset[i] for i in rows)
    ]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]), float(
        loss.detach()
    )


def test_the_gradient_is_that_of_a_weighted_mean(tmp_path, subtests):
    rows = pairs(4, w=WEIGHTS)
    for name, overrides in {
        "sigmoid": {},
        "precomputed": {"precompute_ref_log_probs": True},
        "two_losses_shared": {"loss_type": ["sigmoid", "ipo"], "share_prefixes": "always"},
    }.items():
        with subtests.test(name):
            plain = trainer(tmp_path, rows, **{**overrides, "share_prefixes": False})
            alone = [gradient(plain, [i])[0] for i in range(4)]
            expected = sum(w * g for w, g in zip(WEIGHTS, alone, strict=True)) / 4
            weighed = trainer(tmp_path, rows, weight_column="w", **overrides)
            found, loss = gradient(weighed, range(4))
            assert (found - expected).norm() < 1e-5 * expected.norm()
            assert loss == pytest.approx(gradient(plain, range(4))[1], rel=1e-5)  # TRL's, without weights


@pytest.mark.train
def test_weights_reach_training_and_evaluation_needs_none(tmp_path):
    """A pair of weight 0 alone: nothing moves."""
    rows = pairs(8, w=[0.0] * 7 + [1.0])
    arguments = {"train_sampling_strategy": "sequential", "max_steps": 1, "gradient_accumulation_steps": 1}
    run = trainer(tmp_path, rows, weight_column="w", **arguments)
    before = tiny.weights(run.model)
    run.train()
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.weights(run.model).items())
    assert run.evaluate(pairs(4))["eval_loss"] > 0


def groups() -> Dataset:
    """16 pairs of four prompts; those of a prompt have three different completions."""
    rows = pairs(16)
    prompts = [rows["prompt"][i % 4] for i in range(16)]
    chosen = [rows["chosen"][i % 4] for i in range(16)]
    rejected = [rows["rejected"][i % 4 + 4 * (i // 8)] for i in range(16)]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def test_pairs_of_a_prompt_follow_each_other_in_every_epoch(tmp_path):
    run = recorded(tmp_path, groups(), group_by_prompt=True)
    orders = [run.row_order()(epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(16))
        for start in range(0, 16, 4):
            assert len({row % 4 for row in order[start : start + 4]}) == 1
    assert orders[0] != orders[1] and orders[0] == run.row_order()(0)
    prompts = [tuple(dict.fromkeys(row % 4 for row in order)) for order in orders]
    assert len(set(prompts)) > 1


def test_a_completion_of_several_pairs_is_computed_once(tmp_path):
    run = trainer(tmp_path, groups(), share_prefixes="always", group_by_prompt=True)
    plain = trainer(tmp_path, groups(), share_prefixes=False)
    rows = run.row_order()(0)[:4]  # of one prompt: 8 rows, of which 3 differ
    expected, loss = gradient(plain, rows)
    found, shared = gradient(run, rows)
    assert (found - expected).norm() < 1e-5 * expected.norm() and shared == pytest.approx(loss, rel=1e-5)
    assert run.sharing.token_slots < 0.3 * run.sharing.token_slots_unshared


@pytest.mark.parametrize(
    ("overrides", "rows", "curriculum", "message"),
    [
        ({"weight_column": "v"}, pairs(4), None, r"weight_column='v', and train_dataset has \['prompt'"),
        ({"weight_column": "w"}, pairs(4, w=[1, -1, 1, 1]), None, "a number of at least 0 in each row"),
        ({"weight_column": "w"}, pairs(4, w=[0.0] * 4), None, "not 0 in all of them"),
        ({"weight_column": "w"}, pairs(4, w=[1.0] * 4).to_iterable_dataset(), None, "weight_column needs the rows"),
        ({"group_by_prompt": True}, pairs(4).to_iterable_dataset(), None, "group_by_prompt needs the rows"),
        (
            {"group_by_prompt": True},
            pairs(4, hard=[1, 2, 3, 4]),
            DifficultyCurriculum("easy_to_hard", "hard"),
            "both set the order",
        ),
    ],
)
def test_what_cannot_be_weighed_or_grouped(overrides, rows, curriculum, message, tmp_path):
    config = trl_ext.DPOConfig(**settings(tmp_path, **overrides))
    with pytest.raises(ValueError, match=message):
        trl_ext.DPOTrainer("no/such/model", args=config, train_dataset=rows, curriculum=curriculum)


def test_settings_that_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="compares sorted batches"):
        trl_ext.DPOConfig(**settings(tmp_path, weight_column="w", loss_type=["sigmoid", "aot"]))
    with pytest.raises(ValueError, match="both set the order"):
        trl_ext.DPOConfig(**settings(tmp_path, group_by_prompt=True, train_sampling_strategy="sequential"))
