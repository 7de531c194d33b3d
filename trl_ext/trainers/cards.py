"""
What is wrong in TRL's model cards, put right: the example runs, the metadata are the Hub's, and nothing is called
`None`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from peft import PeftModel


CARD = "README.md"
PLAIN_EXAMPLE = "The capital of France is"
# TRL's cards ask this
CHAT_EXAMPLE = (
    "If you had a time machine, but could only go to the past or the future once and never return, which would you "
    "choose and why?"
)
_EXAMPLE = re.compile(r"```python\n.*?\n```", re.DOTALL)  # the first one is how the model is used
_NO_BASE = "[None](https://huggingface.co/None)"

_CHAT = """
from transformers import pipeline

question = {question}
generator = pipeline("text-generation", {model}, device_map="auto")
output = generator([{{"role": "user", "content": question}}], max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
"""
_TEXT = """
from transformers import pipeline

generator = pipeline("text-generation", {model}, device_map="auto")
output = generator({example}, max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
"""
_SCORE = """
from transformers import pipeline

rewarder = pipeline("text-classification", {model}, device_map="auto", function_to_apply="none")
print(rewarder({example})[0]["score"])
"""
_SCORE_OF_ADAPTER = """
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained({name}, num_labels=1)
tokenizer = AutoTokenizer.from_pretrained({name})
print(model(**tokenizer({example}, return_tensors="pt")).logits.item())
"""


@dataclass
class CardFacts:
    """
    What a card has to say of a model, and TRL's template doesn't know.

    Args:
        model (`str`):
            How the model is loaded: its Hub id or its folder.
        adapter (`bool`):
            Whether it is a PEFT adapter.
        chat (`bool`):
            Whether its tokenizer has a chat template.
        scores (`bool`, *optional*, defaults to `False`):
            Whether it is a reward model.
        example (`str`, *optional*):
            A text that it can be tried on.
        base_model (`str`, *optional*):
            Hub id of the model that it was trained from.
        metrics (`Mapping[str, float]`, *optional*):
            Held-out results, for the metadata.
        intervals (`Mapping[str, str]`, *optional*):
            How certain they are, in words, by the same names.
    """

    model: str
    adapter: bool
    chat: bool
    scores: bool = False
    example: str = PLAIN_EXAMPLE
    base_model: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, str] = field(default_factory=dict)


def completed(text: str, facts: CardFacts) -> str:
    """
    A card of TRL's with what `facts` say.

    Args:
        text (`str`):
            TRL's card.
        facts ([`CardFacts`]):
            Of the model.

    Returns:
        `str`: the card. `licence: license` is left out: nobody has said what the licence is.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    body = card.text.lstrip("\n")
    data.pop("licence")
    data.library_name = "peft" if facts.adapter else "transformers"
    data.pipeline_tag = "text-classification" if facts.scores else "text-generation"
    data.base_model = data.base_model or facts.base_model
    if facts.metrics:
        data.model_name = data.model_name or facts.model
        data.eval_results = _results(facts, data.datasets)
    base = data.base_model
    link = f"[{base}](https://huggingface.co/{base})" if base else "a model without a Hub id"
    body = _EXAMPLE.sub(lambda _: f"```python{_usage(facts)}```", body.replace(_NO_BASE, link), count=1)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _results(facts: CardFacts, datasets: Any) -> list[EvalResult]:
    """The metrics as the metadata that the Hub calls `model-index`."""
    dataset = datasets[0] if isinstance(datasets, list) and datasets else datasets
    return [
        EvalResult(
            task_type="text-classification" if facts.scores else "text-generation",
            dataset_type=dataset or "held-out",
            dataset_name=dataset or "held-out prompts",
            metric_type=name,
            metric_name=f"{name} ({facts.intervals[name]})" if name in facts.intervals else name,
            metric_value=value,
        )
        for name, value in facts.metrics.items()
    ]


def _usage(facts: CardFacts) -> str:
    scoring = _SCORE_OF_ADAPTER if facts.adapter else _SCORE
    template = scoring if facts.scores else _CHAT if facts.chat else _TEXT
    name = json.dumps(facts.model)
    # Of an adapter, a pipeline takes the tokenizer of the base model, which may lack the chat template
    model = f"model={name}, tokenizer={name}" if facts.adapter else f"model={name}"
    question = CHAT_EXAMPLE if facts.example == PLAIN_EXAMPLE else facts.example
    written = {"example": facts.example, "question": question}
    texts = {key: json.dumps(text, ensure_ascii=False) for key, text in written.items()}
    return template.format(model=model, name=name, **texts)


@dataclass
class CardAdditions:
    """
    What a run adds to the card that its trainer writes at every save.

    Args:
        sections (`list[Callable]`, *optional*):
            Each returns Markdown that follows TRL's.
        metrics (`dict[str, float]`, *optional*):
            Held-out results, for the metadata.
        intervals (`dict[str, str]`, *optional*):
            How certain they are, in words.
        papers (`list[Mapping[str, str]]`, *optional*):
            What is cited beside the trainer's own paper, each in the form of `_paper` of TRL's trainers.
    """

    sections: list[Callable[[], str]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, str] = field(default_factory=dict)
    papers: list[Mapping[str, str]] = field(default_factory=list)


def papers_section(papers: Sequence[Mapping[str, str]]) -> str:
    """Links and citations of papers."""
    links = "\n".join(f"- [{paper['title']}](https://huggingface.co/papers/{paper['id']})" for paper in papers)
    citations = "\n\n".join(paper["citation"] for paper in papers)
    return f"## Methods\n\nThe run also uses the methods of\n\n{links}\n\n```bibtex\n{citations}\n```"


def complete_card(trainer: Any, additions: CardAdditions) -> None:
    """Completes the card that a trainer has just written with `create_model_card`, on the main process."""
    if not trainer.is_world_process_zero():
        return
    file = Path(str(trainer.args.output_dir)) / CARD
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    started_from = getattr(model.config, "name_or_path", "")
    facts = CardFacts(
        trainer.hub_model_id or as_written(file.parent),
        adapter=isinstance(model, PeftModel),
        chat=getattr(tokenizer, "chat_template", None) is not None,
        scores=type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__.endswith(
            "ForSequenceClassification"
        ),
        example=example_of(trainer.train_dataset, tokenizer),
        base_model=base_of(started_from),
        metrics=additions.metrics,
        intervals=additions.intervals,
    )
    parts = [completed(file.read_text(encoding="utf-8"), facts).rstrip()]
    if additions.papers:
        parts.append(papers_section(additions.papers))
    file.write_text("\n\n".join([*parts, *(section() for section in additions.sections)]) + "\n", encoding="utf-8")


def as_written(folder: Path) -> str:
    """A folder's path from the working directory, or its name where that would lead out of it."""
    try:
        return folder.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return folder.name


def base_of(folder: str) -> str | None:
    """The Hub id from which the model in a folder was trained, if the folder's card says so."""
    file = Path(folder or os.devnull) / CARD
    if not file.is_file():
        return None
    found = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("base_model")
    return found if isinstance(found, str) else None


def example_of(dataset: Any, tokenizer: Any) -> str:
    """
    The first prompt of a data set: its text, its ids in words, or of a conversation that is one message its content;
    otherwise [`PLAIN_EXAMPLE`].
    """
    row = dataset[0] if isinstance(dataset, Dataset) and len(dataset) else {}
    prompt, ids = row.get("prompt"), row.get("prompt_ids")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0].get("content"), str):
        return str(prompt[0]["content"])
    return str(tokenizer.decode(ids)) if ids else PLAIN_EXAMPLE
