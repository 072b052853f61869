"""Models and rows that the benchmark of the alignment stages makes, and pairs of a file."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.data.formats import read_rows
from posttrain.data.rows import Chat, Message, Preference, plain_messages
from posttrain.recipe.datasets import DatasetSpec

VOCABULARY = 2_048
"""Of the random model."""
MOST_PROMPT_TOKENS = 256


def make_model(folder: Path) -> None:
    """A random Llama of 1.6 million parameters that never ends an answer, with a byte tokenizer.

    Its vocabulary is larger than the tokenizer's, so that the head has as large a share of the work
    as in a real small model. It writes printable ASCII alone, so that an answer that is read as
    text has the same tokens: the first component of every embedding is large, and the head's rows
    of all other tokens, the end token among them, lie against it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    written = string.ascii_letters + string.digits + string.punctuation
    others = set(range(VOCABULARY)) - set(tokenizer.convert_tokens_to_ids(list(written)))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_output_embeddings().weight[sorted(others), 0] = -2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A token a byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: own for own, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def make_reward_model(like: Path, folder: Path) -> None:
    """As large as the model in a folder, with a scalar head, and what a `reward` stage adds."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from posttrain.train.reward_model import RewardRecord

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        like, num_labels=1, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    RewardRecord(max_length=1024, mean=0.0, std=1.0, pairs=1).write(folder)


def parameters(model: Path) -> int:
    """Numbers in a model's weights."""
    from safetensors import safe_open

    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "np") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping
                count = 1
                for size in weights.get_slice(name).get_shape():
                    count *= size
                total += count
    return total


def made_prompts(kind: str, model: Path, count: int) -> list[Chat]:
    """Questions of random letters, of one length or of lengths as preference data has them.

    Of the prompts of dpo_en_demo.json, counted by the tokens of SmolLM2, those of up to 256 have a
    median of some 70; their logarithms spread by 1.
    """
    from transformers import AutoTokenizer

    tokenizer, draw = AutoTokenizer.from_pretrained(model), random.Random(0)
    empty = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=True
    )
    around = len(empty["input_ids"])
    prompts: list[Chat] = []
    while len(prompts) < count:
        length = 96 if kind == "equal" else int(70 * draw.lognormvariate(0, 1))
        if not around < length <= MOST_PROMPT_TOKENS:
            continue
        row = len(prompts)
        text = "".join(draw.choices(string.ascii_letters, k=length - around))
        messages = (Message("user", text),)
        prompts.append(Chat(id=f"{row:016x}", file="prompts.json", row=row + 1, messages=messages))
    return prompts


def short_pairs(file: Path | None, model: Path, max_length: int, count: int) -> list[Preference]:
    """The first pairs of which neither answer, with its prompt, is longer than `max_length`.

    So nothing is cut, which each side would do in its own way.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if file is None:
        pairs: Sequence[Any] = made_pairs(4 * count)
    else:
        pairs = list(read_rows(DatasetSpec(source=str(file), format="preference")))

    def length(pair: Preference, answer: tuple[Message, ...]) -> int:
        chat = plain_messages(pair.prompt + answer)
        return len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])

    short = [
        pair
        for pair in pairs
        if max(length(pair, pair.chosen), length(pair, pair.rejected)) <= max_length
    ]
    return short[:count]


def made_pairs(count: int) -> list[Preference]:
    """Questions and answers of random words, of varied lengths."""
    draw = random.Random(0)
    words = string.__doc__.split()

    def turn(role: Any, least: int, most: int) -> tuple[Message]:
        return (Message(role, " ".join(draw.choices(words, k=draw.randint(least, most)))),)

    return [
        Preference(
            id=f"{row:016x}",
            file="pairs.json",
            row=row + 1,
            prompt=turn("user", 3, 10),
            chosen=turn("assistant", 3, 20),
            rejected=turn("assistant", 3, 20),
        )
        for row in range(count)
    ]
