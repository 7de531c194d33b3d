"""Every recipe's smoke configuration, in the order in which they can run: some need what others leave behind."""

from trl_ext.run.catalogue import list_recipes


# The data and the untrained model of all, made first
TASK = ["--output_dir", "runs/smoke", "--sft_size", "512", "--train_size", "128", "--test_size", "32"]
TASK += ["--pairs_size", "128"]
FIRST = ("sft", "reward")
# One process, one device. Values that aren't given are guessed, with a warning
LAUNCHER = [
    "--quiet",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
LAUNCHER += ["--cpu"]


def smoke_configs() -> dict[str, str]:
    """The name of the configuration by the name of the recipe."""
    found = {
        recipe.name: config
        for recipe in list_recipes()
        for config in recipe.configs
        if config.startswith("smoke_") and recipe.file.parent.name != "tasks"
    }
    return {name: found[name] for name in sorted(found, key=lambda name: (name not in FIRST, name != "sft", name))}
