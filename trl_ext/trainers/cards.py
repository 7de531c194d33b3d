"""TRL's model card of a model that has no Hub id."""


def name_what_has_no_hub_id(card: str, name: str) -> str:
    """
    Says what the model is called where TRL's template says `None`.

    Args:
        card (`str`):
            The card: TRL's template names the Hub ids of base model and result, and says `None` where there are none.
        name (`str`):
            What to call the model.

    Returns:
        `str`: the card.
    """
    card = card.replace("[None](https://huggingface.co/None)", "a model without a Hub id")
    return card.replace('model="None"', f'model="{name}"')
