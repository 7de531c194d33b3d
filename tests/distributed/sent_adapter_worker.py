"""
Trains an adapter whose base is spread over two processes, and writes down what a colocated vLLM engine would get:
`sent_adapter_worker.py OUTPUT ENGINE`. Started by `test_sent_adapter.py`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from distributed.fsdp_worker import allow_fsdp_on_cpus
from trl.distributed import DistributedBackend

import trl_ext
from trl_ext.roles.critic import without_critic
from trl_ext.trainers.seams.engine import write_adapter


def main(output_dir: Path, engine: str) -> None:
    if engine == "fsdp2":
        allow_fsdp_on_cpus()
    arguments = {"peft_config": tiny.lora(target_modules="all-linear")}
    settings = {"num_iterations": 1, "critic": "adapter", "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    trainer = tiny.trainer(trl_ext.PPOTrainer, output_dir, tiny.hashed, arguments, **settings)
    trainer.train()
    backend = DistributedBackend(trainer.accelerator)
    assert (backend.is_zero3, backend.fsdp_version == 2) == (engine == "zero3", engine == "fsdp2")
    folder = output_dir / f"sent_{trainer.accelerator.process_index}"
    folder.mkdir()
    with without_critic(trainer.model):
        write_adapter(SimpleNamespace(model=trainer.model, _dist=backend), folder)
    trainer.save_model(str(output_dir / "saved"))
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
