"""
Keys of metrics that more than one file names: a trainer, ours or TRL's, logs them, and monitors, pipelines or reports
read them. A key that only one file needs is written in that file.
"""

# Logged by TRL's trainers, and so by ours
REWARD = "reward"
KL_PER_TOKEN = "kl"  # to the reference, mean over tokens
ENTROPY = "entropy"
MEAN_LENGTH = "completions/mean_length"
PREFERENCE_ACCURACY = "rewards/accuracies"  # DPO
REWARD_MODEL_ACCURACY = "accuracy"  # reward models
EVALUATION = "eval_"  # before the key of what is measured in evaluation

# Logged by PPO, under the names of TRL 1.12's PPO
KL_PER_COMPLETION = "objective/kl"  # to the reference, mean over completions
SCORES = "objective/scores"
NON_SCORE_REWARD = "objective/non_score_reward"
VALUE_LOSS = "loss/value_avg"
EXPLAINED_VARIANCE = "val/explained_variance"

# Logged by the engine
COMPUTE_SAVED = "compute/saved"
PREDICTION_TOKENS = "compute/prediction_tokens"  # of prompts that were read to predict their pass rates, in total
DROPPED_TOKENS = "trust_region/dropped"  # share of tokens
DIVERGENCE = "trust_region/divergence"  # mean over tokens
COMPLETION_LIMIT = "curriculum/completion_length"
RELIABILITY = "reliability/"  # before the number of a bin of predicted probabilities
SELECTION = "selection/"  # before the totals of a run, by their names in `Counters`
CALIBRATION_ERROR = f"{SELECTION}calibration_error"  # of predictions, over those bins
GENERATED_TOKENS = f"{SELECTION}generated_tokens"
TRAINED_TOKENS = f"{SELECTION}trained_tokens"
GROUPS = f"{SELECTION}groups_"  # before the counts of groups, by what became of them
GROUPS_GENERATED = f"{GROUPS}generated"
GROUPS_KEPT = f"{GROUPS}kept"
GROUPS_DUPLICATED = f"{GROUPS}duplicated"


def reward_mean(name: str) -> str:
    """The key of a reward function's mean."""
    return f"rewards/{name}/mean"
