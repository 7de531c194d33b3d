"""
Training with `vllm serve`: one server for all tests of this file, which gets the weights of one trainer after another.
"""

import pytest
import tiny
import torch
from engines.test_vllm import DIFFERENCE, built
from trl.generation.vllm_client import VLLMClient
from vllm_engine.gloo_weights import client_over_gloo, free_port, server

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer, PPOTrainer


pytestmark = pytest.mark.train

TRLS_OWN = VLLMClient.init_communicator

METHODS = {
    "GRPO, LoRA": (GRPOTrainer, {}, lambda: {"peft_config": tiny.lora()}),
    "DAPO": (DAPOTrainer, {"rewards_in_flight": 2, "generation_chunks": 2}, dict),
    "DUPO": (DUPOTrainer, {}, dict),
    "PPO, head": (PPOTrainer, {"num_iterations": 1}, dict),
    "PPO, adapter": (PPOTrainer, {"num_iterations": 1, "critic": "adapter"}, lambda: {"peft_config": tiny.lora()}),
}


@pytest.fixture(scope="module")
def address(policy, tmp_path_factory):
    with client_over_gloo(), server(policy, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training(method, address, policy, tmp_path):
    trainer_class, settings, arguments = METHODS[method]
    given = {"vllm_mode": "server", "vllm_server_base_url": address, "vllm_group_port": free_port()}
    trainer = built(trainer_class, tmp_path, policy, arguments(), **{**given, **settings})
    synchronise, syncs = trainer.vllm_generation.sync_weights, []

    def counted() -> None:
        syncs.append(trainer.state.global_step)
        synchronise()

    trainer.vllm_generation.sync_weights = counted
    before = tiny.weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer.model).items())
    # Once for a batch, also if it has several rounds and chunks
    assert syncs == [0, 1] and len(trainer.batches) == 2
    # What the server samples has the log-probabilities of the policy, before the first step and after it
    logs = tiny.history(trainer)
    assert len(logs) == 2 and all(log[DIFFERENCE] < 1e-4 for log in logs)
    if trainer_class is DAPOTrainer:
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which TRL's own weight transfer needs")
def test_trls_own_weight_transfer_needs_a_gpu(address):
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        TRLS_OWN(VLLMClient(base_url=address), device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TRL's own weight transfer (NCCL) needs a GPU")
def test_trls_own_weight_transfer():
    pytest.skip("it needs a second GPU for the server: run a recipe with vllm_mode='server'")
