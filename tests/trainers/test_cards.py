"""What a model card says where there is no Hub id."""

from trl.trainer.utils import generate_model_card

from trl_ext.trainers.cards import name_what_has_no_hub_id


def card(base_model: str | None, hub_id: str | None) -> str:
    text = generate_model_card(base_model, "tiny", hub_id, None, [], None, None, "GRPO", trainer_citation="")
    return name_what_has_no_hub_id(str(text), "tiny")


def test_no_none_is_left():
    text = card(None, None)
    assert "None" not in text
    assert "fine-tuned version of a model without a Hub id." in text and 'model="tiny"' in text


def test_hub_ids_stay():
    text = card("org/base", "me/mine")
    assert "[org/base](https://huggingface.co/org/base)" in text and 'model="me/mine"' in text
