"""Tiny backbones with random weights, and data that they can learn, for the tests of training and of the command
line."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

GOOD = ["good", "great", "witty", "lovely", "bright", "warm"]
BAD = ["bad", "dull", "sour", "awful", "grey", "cold"]
FILLER = ["the", "a", "movie", "book", "was", "is", "and", "very", "plot", "actor", "one", "two", "three", "day"]
NAMES, PLACES = ["anna", "bert", "carla", "dimitri"], ["paris", "oslo", "lima", "quito"]
LETTERS = list("abcdefghij")
WORDS = [*GOOD, *BAD, *FILLER, *NAMES, *PLACES, *LETTERS, "user", "assistant", "system", ":", "|"]

CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT_MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} {{ eos_token }}"
    "{% endgeneration %} {% else %}{{ m['content'] }} {{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; kind "bert" frames a text with [CLS] and [SEP], "end" closes it, "plain" leaves
    it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = [("[CLS]", 2), ("[SEP]", 3), ("</s>", 5)]
    if kind == "bert":
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    if kind == "end":
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", ids)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)


def backbone(kind: str, folder: Path, chat: str | None = None, **config: Any) -> Path:
    """Write a tiny random model of a kind (bert, llama, mixtral, t5, vit, resnet) with its tokenizer to a folder."""
    torch.manual_seed(0)
    vocabulary = len(WORDS) + 6
    if kind == "bert":
        given = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3, **config}
        made = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            **given,
        )
        model: Any = transformers.BertForMaskedLM(made)
        with torch.no_grad():  # words count for more than places, as in a trained model
            model.bert.embeddings.position_embeddings.weight.mul_(0.2)
    elif kind in ("llama", "mixtral"):
        kinds = {"llama": transformers.LlamaConfig, "mixtral": transformers.MixtralConfig}
        made = kinds[kind](
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=5,
            initializer_range=0.2,
            **config,
        )
        model = transformers.AutoModelForCausalLM.from_config(made)
    elif kind == "t5":
        made = transformers.T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=5,
            decoder_start_token_id=0,
            **config,
        )
        model = transformers.T5ForConditionalGeneration(made)
    elif kind == "resnet":
        made = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **config
        )
        model = transformers.ResNetModel(made)
    else:
        size = {"image_size": 8, "patch_size": 2, "initializer_range": 0.2, **config}
        made = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **size
        )
        model = transformers.ViTModel(made, add_pooling_layer=False)
    model.save_pretrained(folder)
    if kind in ("vit", "resnet"):
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        words = tokenizer({"bert": "bert", "llama": "plain", "mixtral": "plain", "t5": "end"}[kind])
        words.chat_template = chat
        words.save_pretrained(folder)
    return folder


def feelings(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose label is told by one word."""
    draw = random.Random(seed)
    out = []
    for i in range(rows):
        words = draw.choices(FILLER, k=draw.randint(3, 8))
        words.insert(draw.randrange(len(words)), draw.choice(BAD if i % 2 else GOOD))
        out.append({"text": " ".join(words), "label": "negative" if i % 2 else "positive"})
    draw.shuffle(out)
    return out


def pairs(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two sentences that agree or not."""
    draw = random.Random(seed)
    out = []
    for i in range(rows):
        one, two = draw.choice(GOOD + BAD), draw.choice(GOOD if i % 2 else BAD)
        label = "same" if (one in GOOD) == (two in GOOD) else "other"
        out.append({"premise": f"the movie was {one}", "hypothesis": f"it is {two}", "label": label})
    return out


def balances(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with a number: good words minus bad ones, and a half."""
    draw = random.Random(seed)
    out = []
    for _ in range(rows):
        words = draw.choices(GOOD + BAD + FILLER, k=6)
        out.append(
            {"text": " ".join(words), "score": sum(w in GOOD for w in words) - sum(w in BAD for w in words) + 0.5}
        )
    return out


def entities(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words with tags: people of two names, places, the rest."""
    draw = random.Random(seed)
    out = []
    for _ in range(rows):
        words, tags = [], []
        for _ in range(4):
            kind = draw.randrange(4)
            if kind == 0:
                words += [draw.choice(NAMES[:2]), draw.choice(NAMES[2:])]
                tags += ["B-PER", "I-PER"]
            else:
                words.append(draw.choice(PLACES if kind == 1 else FILLER))
                tags.append("B-LOC" if kind == 1 else "O")
        out.append({"tokens": words, "ner_tags": tags})
    return out


def pictures(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """8 x 8 grey values, bright on the left or on the right."""
    draw = random.Random(seed)
    out = []
    for i in range(rows):
        bright = range(4) if i % 2 else range(4, 8)
        image = [[draw.randrange(90) + 150 * (x in bright) for x in range(8)] for _ in range(8)]
        out.append({"image": image, "label": "left" if i % 2 else "right"})
    return out


def alphabets(rows: int, seed: int = 0, repeat: bool = False) -> list[dict[str, Any]]:
    """Letters that go on in their order, or one letter again and again."""
    draw = random.Random(seed)
    starts = [draw.randrange(10) for _ in range(rows)]
    return [{"text": " ".join(LETTERS[s if repeat else (s + j) % 10] for j in range(8))} for s in starts]


def ciphers(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two letters of the first half of the alphabet, and those of the second half that stand for them."""
    draw = random.Random(seed)
    chosen = [draw.choices(range(5), k=2) for _ in range(rows)]
    return [{"source": " ".join(LETTERS[i] for i in c), "target": " ".join(LETTERS[i + 5] for i in c)} for c in chosen]


def chats(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """A letter is asked for, the next one is the answer."""
    draw = random.Random(seed)
    letters = [draw.randrange(10) for _ in range(rows)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"the {LETTERS[i]}"},
                {"role": "assistant", "content": LETTERS[(i + 1) % 10]},
            ]
        }
        for i in letters
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]], separator: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes: to see that nothing changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
