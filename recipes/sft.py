"""
Supervised fine-tuning, with TRL's own trainer: where a policy usually starts.

```shell
accelerate launch recipes/sft.py --config recipes/configs/quickstart_sft.yaml
```

Data: `prompt` and `completion`, `messages`, or `text`, as [`~trl.SFTTrainer`] takes them. All arguments of
[`~trl.SFTConfig`] and [`~trl.ModelConfig`] work on the command line and in the yaml file.
"""

from common import DataArguments, fit, load_data, parse_arguments, publish, trainer_arguments
from trl import SFTConfig, SFTTrainer


def main() -> None:
    script_args, training_args, model_args, mixture_args = parse_arguments(DataArguments, SFTConfig)
    data = load_data(script_args, mixture_args)
    trainer = SFTTrainer(**trainer_arguments(script_args, training_args, model_args, data))
    fit(trainer)
    publish(trainer, script_args.dataset_name)


if __name__ == "__main__":
    main()
