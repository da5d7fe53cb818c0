"""The names that pretrained models give to their parts. Data only: names of leaves, never of model types.

`anatomy` takes a name as a proposal and checks it against shapes and surroundings. All names are lower case.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# -- attention -------------------------------------
Q = _words(
    "q q_proj query wq q_lin linear_q query_proj to_q q_linear proj_q w_q project_q projection_query "
    "receptance queries to_query query_global layout_query w2e_query e2w_query e2e_query query_key "
    "q_a_proj q_b_proj wq_a wq_b"
)
K = _words(
    "k k_proj key wk k_lin linear_k key_proj to_k k_linear proj_k w_k project_k projection_key keys "
    "to_key key_global layout_key"
)
V = _words(
    "v v_proj value wv v_lin linear_v value_proj to_v v_linear proj_v w_v project_v projection_value "
    "values to_value value_global layout_value v_proj_current v_proj_delayed values_vision_proj "
    "values_text_proj"
)
QKV = _words(
    "qkv qkv_proj c_attn wqkv query_key_value w_pack to_qkv qkv_lin att_proj queries_keys_values "
    "in_proj_qkv in_proj_qkvz"
)
KV = _words(
    "kv kv_proj to_kv key_value wkv kv_linear keys_values kv_a_proj_with_mqa kv_b_proj kv_a_proj wkv_a "
    "wkv_b k_b_proj v_b_proj"
)
# Names that speak of attention only within a module that calls itself one.
Q_INSIDE = _words("vision_proj sampling_offsets attention_weights")
K_INSIDE = _words("text_proj")
QKV_INSIDE = _words("in_proj")
O = _words(
    "o o_proj out_proj wo out_lin linear_out dense c_proj proj to_out output_proj output out o_linear "
    "proj_o attn_out projection attention_output attention_out fc_out out_linear final_linear final post "
    "proj_out projection_layer layout_output out_vision_proj out_text_proj o_a_proj o_b_proj"
)
ATTENTION = re.compile(r"attention|attn|^att$|^attns?$")
CROSS = re.compile(r"cross|encoder_?att|encdec|multihead_attn|enc_attn|bimultihead|perceiver.*att|src_attn")

# How the rows of a packed weight are laid out. Known to be blocks [q | k | v]:
CONTIGUOUS = _words("qkv c_attn wqkv w_pack att_proj to_qkv qkv_lin in_proj_qkv")
# ... and blocks where the module has an attribute that speaks of grouped keys (else per head, [heads, 3, d]):
CONTIGUOUS_IF_GROUPED = _words("qkv_proj")
GROUPED = ("num_key_value_groups", "num_key_value_heads")
# A module with this flag switched off interleaves its heads.
BLOCKS_FLAG = "multi_query"

# -- feed-forward ----------------------------------------------------------------------------------------------
UP = _words(
    "up_proj fc1 wi c_fc dense_h_to_4h lin1 linear1 fc_in wi_1 w3 intermediate_dense ffn linear_1 dense1 "
    "ffn_1 up intermediate w_1 ff_1 fc_1 linear_fc1 proj_up linear_up linear_in layer_1 conv_1 conv1 "
    "ffw_layer_1 input_linear intermediate_query layout_intermediate lang_inter visn_inter proj_in "
    "in_proj layer1 key"
)
GATE = _words("gate_proj wi_0 w1 gate linear_gate w_0")
GATE_UP = _words("gate_up_proj w12 weights_in gate_up wi_packed proj_up_gate")
DOWN = _words(
    "down_proj fc2 wo c_proj dense_4h_to_h lin2 linear2 fc_out w2 output_dense ffn_output linear_2 dense2 "
    "ffn_2 down weights_out w_2 ff_2 fc_2 output linear_fc2 proj_down linear_down linear_out layer_2 "
    "conv_2 conv2 ffw_layer_2 output_linear output_query layout_output lang_output visn_output proj_out "
    "out_proj w_out layer2 value"
)
MLP = re.compile(r"mlp|ffn|feed_?forward|intermediate|densereludense|ffw|^ff$")
EXPERT = re.compile(r"expert")
ROUTERS = _words("gate router shared_expert_gate wg classifier")

# A leaf called one of these says nothing; its parent's name does.
GENERIC = _words("dense linear proj projection fc layer conv convolution 0 1 2 3 4 5")

# -- norms -------------------------------------
_ANY_NORM = "layer_norm ln norm layernorm"
ATTN_NORMS = (
    "input_layernorm layernorm_before norm1 ln_1 ln1 layer_norm1 layer_norm_1 self_attn_layer_norm attention_norm "
    "attn_norm sa_layer_norm attention_layernorm input_layer_norm pre_attention_layernorm norm_1 self_attn_norm "
    "ln_attn norm_attn attention_layer_norm attn_layer_norm operator_norm pre_attn_norm pre_attention_norm " + _ANY_NORM
).split()
CROSS_NORMS = (
    "encoder_attn_layer_norm ln_cross_attn cross_attn_layer_norm cross_attention_layer_norm cross_attn_norm norm_cross "
    "cross_attention_norm cross_attn_layernorm norm2 layer_norm2 input_layernorm " + _ANY_NORM
).split()
MLP_NORMS = (
    "pre_feedforward_layernorm pre_mlp_layernorm pre_ff_layernorm post_attention_layernorm layernorm_after norm3 norm2 "
    "ln_2 ln2 layer_norm2 layer_norm_2 final_layer_norm ffn_norm mlp_norm output_layer_norm full_layer_layer_norm "
    "feed_forward_layernorm post_attention_layer_norm norm_2 ff_norm feedforward_norm ln_mlp norm_mlp ffn_layer_norm "
    "ffn_layernorm mlp_layer_norm " + _ANY_NORM
).split()

# -- heads and poolers -------------------------------------
LM_HEAD = _words(
    "lm_head embed_out predictions generator_predictions generator_lm_head output_projection "
    "lm_projection logits_proj vocab_head pred_layer vocab_projector vocab_transform vocab_layer_norm "
    "lm_loss mlm_head codebook_heads"
)
POOLER = _words("pooler sequence_summary attention_pool attn_pool")
HEAD = _words(
    "classifier score qa_outputs classification_head seq_relationship class_labels_classifier "
    "bbox_predictor class_embed bbox_embed multiple_choice_head multi_choice_head "
    "discriminator_predictions qa_classifier logits_head decode_head auxiliary_head cls_classifier "
    "distillation_classifier start_logits end_logits answer_class pre_classifier regression_head "
    "seq_summary mc_head head heads class_predictor mask_embed mask_embedder"
)
HEAD_NAME = re.compile(r"_heads?$|(bbox|class|score)_embed$")
HEAD_CLASS = re.compile(r"classificationhead|predictionhead")
LM_HEAD_CLASS = re.compile(r"lmhead|lmpredictionhead|maskedlmhead")
POOLER_CLASS = re.compile(r"poolinghead|pooler$")

# -- towers -------------------------------------
MODALITY = {
    "vision": _words(
        "image_model vision visual vision_model vision_tower vision_encoder "
        "image image_encoder img vision_backbone image_tower"
    ),
    "text": _words(
        "text text_model language_model language text_encoder text_decoder llm text_branch text_backbone "
        "language_backbone"
    ),
    "audio": _words("audio audio_model audio_tower audio_encoder speech speech_encoder audio_branch"),
    "video": _words("video video_model video_encoder"),
}
# Names of containers, which do not tell one tower from another.
CONTAINERS = _words("model layers layer blocks block stages encoder decoder transformer module")
SIDE = {"encoder": re.compile(r"(^|_)encoder$"), "decoder": re.compile(r"(^|_)decoder$")}
