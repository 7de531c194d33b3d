"""
Which sources of TRL, transformers, accelerate and PEFT `trl_ext` is built on, and what they looked like when they were
read.

    python tests/upstream/record.py

writes `sources.json` anew. Do that after reading what changed upstream, never before: the record is the only thing
that says somebody has.
"""

import ast
import difflib
import hashlib
import importlib
import inspect
import json
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
import trl

import trl_ext
import trl_ext.trainers


RECORD = Path(__file__).with_name("sources.json")
PACKAGES = ("trl", "transformers", "accelerate", "peft")
COMMAND = "python tests/upstream/record.py"

# Sources that we don't override, but whose behaviour something of ours relies on. Found by introspection and therefore
# not here: what is overridden, what is imported from a submodule of TRL, and private methods that are called.
LEANED_ON = {
    "torch._subclasses.fake_tensor.FakeTensor": "stands for weights and activations when the planner measures passes",
    "torch._subclasses.fake_tensor.FakeTensorMode": "computes sizes without numbers, for the planner",
    "torch.utils._python_dispatch.TorchDispatchMode": "shows the planner every operation's results",
    "trl.kernels.chunked_logprob._forward_tile": "makes float32 copies of a tile on a CPU, as a GPU's kernel doesn't",
    "trl.kernels.chunked_logprob._backward_tile": "makes float32 copies of a tile on a CPU, as a GPU's kernel doesn't",
    "trl.kernels.chunked_logprob._addmm_fp32": "copies both factors to float32 on a CPU, and neither on a GPU",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn": (
        "takes the number of generations from `num_generations` or `num_generations_eval`, which `roll_out` sets"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._log_completion_extra": (
        "fills `_pending_extra_logs`, which are taken apart by row and put together again for what was selected"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._log_metric": "fills `_pending_metrics`, which `roll_out` puts back",
    "trl.trainer.grpo_trainer.GRPOTrainer._set_signature_columns_if_needed": (
        "says which columns the refill stream may drop, so that its rows look like those of the main loader"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._tokenize_prompts": (
        "reads `_batch_environments`, which must name the environments of the selected rows"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._tool_call_loop": (
        "says what a `tool_mask` masks, and runs the tools of row i for row i: selection happens after it"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.compute_loss": "goes through `_compute_loss` with the micro-batch itself",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_gamma_weights": (
        "sums importance ratios over padding too, where they must be 1; looks at one row at a time"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.get_high_entropy_mask": (
        "takes a quantile over a micro-batch and all ranks: no regrouping with it"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.get_off_policy_mask": (
        "measures drift from `sampling_per_token_logps`, which stay the real ones when the old ones are replaced"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.get_train_dataloader": (
        "asks `_get_train_sampler` for the order, and deals whole generation batches"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.get_eval_dataloader": (
        "deals the rows of `_get_eval_sampler`, each of which stands for a completion; here to processes alike"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.log": (
        "averages the lists in `_metrics`, to which ours are added, and clears them; writes the table of `_logs` to "
        "`completions/completions_<step>.parquet`, from where an evaluation's is moved"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.prediction_step": (
        "evaluates through `_prepare_inputs` and `compute_loss`, where nothing may be selected"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer.training_step": (
        "counts `_step` up once a micro-batch, after the loss: what a checkpoint stores of it depends on that"
    ),
    "trl.trainer.rloo_config.RLOOConfig": "`RLOOConfig` has every argument by its name and with its default",
    "trl.trainer.rloo_trainer.RLOOTrainer.__init__": (
        "says which arguments a script may pass, that `epsilon_high` is `epsilon` by default, what the reference is"
    ),
    "trl.trainer.rloo_trainer.RLOOTrainer._compute_loss": (
        "is a mean over completions, with the clipped ratio of a whole one: `sequence_product` and `loss_type='grpo'`"
    ),
    "trl.trainer.rloo_trainer.RLOOTrainer._generate_and_score_completions": (
        "clips rewards, subtracts the KL of a completion, leaves one out, and normalises, in this order; logs `kl`"
    ),
    "trl.trainer.dpo_trainer.DataCollatorForPreference": (
        "puts all chosen rows of a micro-batch before all rejected ones, with padding on the right"
    ),
    "trl.trainer.dpo_trainer.DPOTrainer._compute_loss": (
        "logs `rewards/accuracies`, in training and in evaluation, with ties counted as wrong; its loss and reference "
        "are what the implicit reward is measured against; says which losses are a mean over pairs"
    ),
    "trl.trainer.dpo_trainer.DPOTrainer.evaluate": "calls `Trainer.evaluate` for each of several sets",
    "trl.trainer.dpo_trainer.DPOTrainer.log": "adds what is in `_metrics` with the prefix `eval_`, whatever the set",
    "trl.trainer.dpo_trainer.DPOTrainer.prediction_step": "evaluates through `_compute_loss`, with `_metrics`",
    "trl.trainer.dpo_trainer.DPOTrainer._prepare_dataset": (
        "drops rows whose prompt is too long, and keeps the column of difficulties with the others"
    ),
    "trl.trainer.dpo_trainer.DPOTrainer.compute_ref_log_probs": (
        "says which adapter is the reference: `ref` if there is one, none otherwise"
    ),
    "trl.trainer.utils.RepeatSampler": (
        "`EpochSampler` reseeds its `generator` and draws one permutation of `num_samples` for each epoch gone by"
    ),
    "trl.trainer.utils.shuffle_sequence_dict": (
        "deals rows to micro-batches: one permutation of the global generator for every tensor of the batch"
    ),
    "trl.trainer.utils.split_tensor_dict": (
        "makes the micro-batches that `on_new_buffer` deals anew; scalars such as `num_items_in_batch` go into each"
    ),
    "trl.data_utils._tokenize": "`token_ids` makes the same ids of the same text, by public methods of transformers",
    "trl.rewards.other_rewards._SoftOverlongPunishment": (
        "its `__name__` is how the shaping reward is told from outcome rewards, its arguments are DAPO's eq. 13"
    ),
    "transformers.configuration_utils.PreTrainedConfig._attn_implementation": (
        "a reference that is loaded gets the attention of a policy in memory"
    ),
    "transformers.trainer.Trainer._inner_training_loop": (
        "loads `state` before `_load_optimizer_and_scheduler`, and builds the loader once, not once an epoch"
    ),
    "transformers.trainer.Trainer._load_optimizer_and_scheduler": "called with a checkpoint's directory, or `None`",
    "transformers.trainer.Trainer._load_rng_state": "what a resumed run samples is restored after skipped batches",
    "transformers.trainer.Trainer._maybe_log_save_evaluate": (
        "logs, then evaluates, then saves: a checkpoint is written between two steps, after the metrics are cleared"
    ),
    "transformers.trainer.Trainer._run_epoch": (
        "sets `current_gradient_accumulation_steps` to the window's length before its first micro-batch; "
        "opens the loader's iterator while `state.epoch` is the epoch about to be walked, skips batches on resuming, "
        "and prefetches an accumulation window before its first micro-batch"
    ),
    "transformers.trainer.Trainer._save_checkpoint": (
        "writes `checkpoint-<global_step>` under `_get_output_dir`, where ours is already"
    ),
    "transformers.modeling_rope_utils.dynamic_rope_update": (
        "says from which width on the angles of `dynamic` and `longrope` depend on it, and reads it off the positions"
    ),
    "transformers.generation.utils.GenerationMixin._prepare_generation_config": (
        "fills in what TRL leaves open from the model's `generation_config`, which is an empty one meanwhile"
    ),
    "transformers.generation.continuous_batching.cb_logits_processors.ContinuousBatchingLogitsProcessorList": (
        "leaves processors out that don't support it, among them the repetition penalty"
    ),
    "trl.generation.vllm_generation.VLLMGeneration.generate": (
        "hands `generation_kwargs` to the engine, where ids of tokens are called `stop_token_ids`"
    ),
    "accelerate.state.AcceleratorState._reset_state": (
        "clears what all accelerators of a process share, and leaves the process group alone"
    ),
    "torch.distributed.distributed_c10d._get_default_store": (
        "returns the store of the process group, through which a process says which reward function it is in"
    ),
    "torch.distributed.distributed_c10d._set_pg_timeout": (
        "limits how long a group of gloo waits: transformers doesn't pass `ddp_timeout` on under `use_cpu`"
    ),
    "peft.tuners.tuners_utils.BaseTunerLayer": (
        "computes with `_active_adapter`, or with none if `_disable_adapters` says so, and reads both in every forward"
    ),
    "peft.utils.other.AuxiliaryTrainingWrapper": (
        "uses `original_module` if `_disable_adapters` says so, or `_active_adapter` is empty"
    ),
    "transformers.modeling_layers.GradientCheckpointingLayer": (
        "hands what is recomputed to its own `_gradient_checkpointing_func`, as the first argument"
    ),
    "accelerate.utils.operations.gather_object": "flattens one list a process, in the order of the processes",
}


def our_modules(package: Any = trl_ext.trainers) -> list[Any]:
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [importlib.import_module(name) for name in names]


@cache
def our_classes() -> list[type]:
    """Every trainer and configuration of ours, those that nobody exports included."""
    found = {
        value
        for module in our_modules()
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and issubclass(value, transformers.Trainer | transformers.TrainingArguments)
    }
    return sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__))


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "trl_ext"


def upstream_classes(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if not is_ours(base) and base is not object]


def function_of(attribute: Any) -> Callable[..., Any] | None:
    """The function behind a class attribute, if it is a method, a property or one of their relatives."""
    if isinstance(attribute, staticmethod | classmethod):
        attribute = attribute.__func__
    if isinstance(attribute, property):
        attribute = attribute.fget
    return inspect.unwrap(attribute) if inspect.isfunction(attribute) else None


# Our class, the name, our function, the class it overrides, and that class's function
Override = tuple[type, str, Callable[..., Any], type, Callable[..., Any]]


@cache
def overrides(of_upstream: bool = True) -> list[Override]:
    """
    Everything that a class of ours overrides, against the next class that defines it: the next of upstream's, or
    whichever comes first (`of_upstream=False`).
    """
    found = []
    for cls in our_classes():
        for name, attribute in vars(cls).items():
            function = function_of(attribute)
            # What `@dataclass` generates has no file
            if function is None or function.__code__.co_filename != inspect.getfile(cls):
                continue
            for parent in upstream_classes(cls) if of_upstream else cls.__mro__[1:-1]:
                overridden = function_of(vars(parent).get(name))
                if overridden is not None:
                    found.append((cls, name, function, parent, overridden))
                    break
    return found


def path_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def resolve(path: str) -> Any:
    """The reverse of `path_of`, with class attributes as they stand in the class."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = inspect.getattr_static(found, part)
        return found
    raise ModuleNotFoundError(path)


def trees() -> Iterator[tuple[str, ast.Module]]:
    """All of our modules, also those that need a package that isn't installed."""
    root = Path(trl_ext.__path__[0])
    for file in sorted(root.rglob("*.py")):
        yield str(file.relative_to(root.parent)), ast.parse(file.read_text("utf-8"))


def overridden() -> dict[str, str]:
    return {
        path_of(function): f"overridden by {cls.__module__}.{cls.__name__}" for cls, _, _, _, function in overrides()
    }


def imported() -> dict[str, str]:
    """Functions and classes from submodules of TRL; what `trl` itself exports is its public interface."""
    found = {}
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("trl."):
                for alias in node.names:
                    thing = getattr(importlib.import_module(node.module), alias.name)
                    if inspect.isfunction(thing) or inspect.isclass(thing):
                        found[path_of(thing)] = f"imported by {file}"
    return found


def called() -> dict[str, str]:
    """Private methods of upstream's trainers that are called (or wrapped) anywhere in `trl_ext`."""
    found = {}
    parents = {parent for cls in our_classes() for parent in upstream_classes(cls)}
    for file, tree in trees():
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for name in sorted(name for name in names if name.startswith("_") and not name.startswith("__")):
            for cls in (trl.GRPOTrainer, *sorted(parents, key=path_of)):
                owner = next((base for base in cls.__mro__ if name in vars(base)), None)
                function = function_of(vars(owner)[name]) if owner else None
                if function is not None and not is_ours(owner):
                    found[path_of(function)] = f"called in {file}"
                    break
    return found


@cache
def watched() -> dict[str, str]:
    """Every source whose change somebody has to read, with the reason."""
    return dict(sorted({**imported(), **called(), **overridden(), **LEANED_ON}.items()))


def digest(path: str) -> str:
    thing = resolve(path)
    source = inspect.getsource(thing if inspect.isclass(thing) else function_of(thing))
    return hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()


def installed() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text("utf-8"))


def main() -> None:
    before = RECORD.read_text("utf-8") if RECORD.exists() else ""
    record = {"versions": installed(), "sources": {path: digest(path) for path in watched()}}
    after = json.dumps(record, indent=2) + "\n"
    RECORD.write_text(after, "utf-8")
    print("\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)) or "No change.")


if __name__ == "__main__":
    main()
