"""
Share of completions whose token ids are exactly those of the reference. Ids are compared and not text, because
decoding without special tokens hides a stray special token inside an answer.
"""

from collections.abc import Sequence

import datasets
import evaluate


DESCRIPTION = "Share of predictions whose token ids equal those of their reference."
INPUTS = """
Args:
    predictions (`list[list[int]]`): token ids of completions, without padding.
    references (`list[list[int]]`): the correct ids.
    ignore (`list[int]`, *optional*): ids that are removed from both before they are compared, such as the end of
        sequence.
Returns:
    `exact_match` (`float`): in [0, 1].
Raises:
    ValueError: without predictions.
"""


class ExactMatchIds(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),  # type: ignore[arg-type]
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], ignore: Sequence[int] = ()
    ) -> dict[str, float]:
        if not len(predictions):
            raise ValueError("exact_match_ids needs at least one prediction.")
        left_out = set(ignore)
        same = [
            [i for i in one if i not in left_out] == [i for i in other if i not in left_out]
            for one, other in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(same) / len(same)}
