"""SmolLM2 at 4 bits, in little: stock mlx-lm gives our logits, and answers do not run in circles."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import eval_chat  # noqa: E402


@pytest.mark.parametrize(
    "tokens, wanted",
    [
        ([], False),
        (list(range(50)), False),
        ([1, 2, 3] * 3, False),  # nine tokens are a list of three, not a circle
        ([7] * 12, False),
        ([7] * 13, True),
        ([9, 8, *[1, 2, 3] * 5, 4, 5, 6], True),  # and in the middle too
        ([1, 2, 3, 4] * 3 + [1, 2, 3], False),
        (list(range(32)) * 3, True),
        (list(range(33)) * 3, False),
        (list(range(20)) * 2 + list(range(40, 60)), False),  # once more is not yet a circle
    ],
)
def test_a_circle_is_two_more_periods_and_twelve_tokens(tokens, wanted):
    assert eval_chat.repeats(tokens) is wanted


def test_every_prompt_is_asked_once_and_there_are_twenty():
    assert len(eval_chat.PROMPTS) == len(set(eval_chat.PROMPTS)) == 20


def test_smollm2_at_4_bits_loads_in_stock_mlx_lm_and_answers(tmp_path):
    import mlxq
    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.convert import convert

    try:
        gguf = embedded_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    convert(gguf, tmp_path / "q", bits=4, group_size=64, progress=False)
    # float32 sums of up to 1536 products, in two orders, through 30 blocks
    assert eval_chat.logits_error(tmp_path / "q", eval_chat.PROMPTS[0]) <= 2e-4
    model, tokenizer = mlxq.load(tmp_path / "q")
    given = [eval_chat.answer(model, tokenizer, prompt, 20) for prompt in eval_chat.PROMPTS[:2]]
    assert not any(map(eval_chat.repeats, given)) and all(given)
    assert "Paris" in tokenizer.decode(given[0])
