"""Small random models of many kinds and a batch for each, shared by the attention, prompt and side-network tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

BERT = TINY | NO_DROPOUT | SPECIAL
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (T.BertModel, T.BertConfig, BERT),
    "bert-classifier": (T.BertForSequenceClassification, T.BertConfig, BERT),
    "bert-tagger": (T.BertForTokenClassification, T.BertConfig, BERT),
    "roberta": (
        T.RobertaForSequenceClassification,
        T.RobertaConfig,
        BERT | {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 60},
    ),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, TINY | SPECIAL | {"num_key_value_heads": 2}),
    "mixtral": (
        T.MixtralForCausalLM,
        T.MixtralConfig,
        TINY | SPECIAL | {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "gpt2": (
        T.GPT2LMHeadModel,
        T.GPT2Config,
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 99,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        | SPECIAL,
    ),
    "t5": (
        T.T5ForConditionalGeneration,
        T.T5Config,
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "bart": (T.BartForConditionalGeneration, T.BartConfig, SEQ2SEQ),
    "whisper": (
        T.WhisperForConditionalGeneration,
        T.WhisperConfig,
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10},
    ),
    "wav2vec2": (
        T.Wav2Vec2ForSequenceClassification,
        T.Wav2Vec2Config,
        {k: v for k, v in TINY.items() if k != "vocab_size"}
        | {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 8}
        | {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "mask_time_prob": 0.0, "layerdrop": 0.0}
        | {f"{where}_dropout": 0.0 for where in ("hidden", "attention", "activation", "feat_proj")},
    ),
    "vit": (
        T.ViTForImageClassification,
        T.ViTConfig,
        {k: v for k, v in TINY.items() if k != "vocab_size"} | NO_DROPOUT | {"image_size": 16, "patch_size": 8},
    ),
    "falcon": (
        T.FalconForCausalLM,
        T.FalconConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99} | SPECIAL,
    ),
}


def make(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode, float32, random weights from `seed`. changes: config values that differ."""
    torch.manual_seed(seed)
    made = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
        if name == "torch"
        else MODELS[name][0](MODELS[name][1](**MODELS[name][2] | changes))
    )
    with torch.no_grad():  # larger than the usual initial values, so that attention is far from uniform and errors show
        for key, p in made.named_parameters():
            if p.dim() > 1:
                p.mul_(2.0 if name not in ("t5", "torch", "vit") else 1.0)
            elif "bias" in key:
                p.normal_(0.0, 0.1)
    return made.eval()


def batch(name: str, rows: int = 2, length: int = 6, pad: int = 2, side: str = "left", seed: int = 1) -> dict[str, Any]:
    """Inputs of a model; the last row of a text batch has `pad` padding positions on that side."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(3, 99, (rows, n), generator=generator)

    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    if name == "wav2vec2":
        return {"input_values": torch.randn(rows, 400, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 20, generator=generator), "decoder_input_ids": tokens(5)}
    if name == "torch":
        hidden = torch.zeros(rows, length, dtype=torch.bool)
        hidden[-1, length - pad :] = pad > 0
        return {"src": torch.randn(rows, length, 32, generator=generator), "src_key_padding_mask": hidden}
    ids, mask = tokens(length), torch.ones(rows, length, dtype=torch.long)
    if pad:
        gone = slice(0, pad) if side == "left" else slice(length - pad, length)
        mask[-1, gone] = 0
        ids[-1, gone] = 1 if name == "roberta" else 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name in ("t5", "bart"):
        given["decoder_input_ids"] = tokens(5)
    return given


def run(model: nn.Module, given: dict[str, Any], grad: bool = False) -> torch.Tensor:
    """The model's first output. grad: keep the graph (an attention kernel may be another one then, and round
    otherwise)."""
    with torch.set_grad_enabled(grad):
        out = model(**given)
    return out if isinstance(out, torch.Tensor) else out[0]


def decode(model: Any, given: dict[str, Any], steps: int = 6, **how: Any) -> torch.Tensor:
    """Logits [steps, batch, vocab] of greedy generation. Nothing ends early."""
    given = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    out = model.generate(
        **given,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **how,
    )
    assert len(out.logits) == steps
    return torch.stack(out.logits)


def scatter(adapter: Any, std: float = 0.3, seed: int = 5) -> None:
    """Give every parameter of an adapter random values, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
