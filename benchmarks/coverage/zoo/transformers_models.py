"""Networks of transformers with two small layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member, tokens

_TEXT: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DECODER: dict[str, Any] = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_IMAGE: dict[str, Any] = _TEXT | {"image_size": 32, "patch_size": 8}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]}


def _entry(
    name: str,
    model: str,
    config: str,
    inputs: Callable[[], tuple[Any, ...]],
    vocabulary: int | None = None,
    **fields: Any,
) -> Entry:
    if vocabulary:
        fields["vocab_size"] = vocabulary

    def build() -> nn.Module:
        made = member("transformers", config)(**fields)
        made.use_cache = False
        network: nn.Module = member("transformers", model)(made)
        return network

    return Entry(f"transformers/{name}", "transformers", build, inputs)


def _text(name: str, model: str, config: str, **fields: Any) -> Entry:
    return _entry(name, model, config, tokens(), 256, **fields)


def _image(name: str, model: str, config: str, size: int = 64, **fields: Any) -> Entry:
    return _entry(name, model, config, images(size), **fields)


def _sound(length: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, length),)


_WAVE: dict[str, Any] = _TEXT | {
    "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
}  # fmt: skip
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENTRIES = [
    _text("bert", "BertForSequenceClassification", "BertConfig", **_TEXT),
    _text("roberta", "RobertaModel", "RobertaConfig", **_TEXT),
    _text("electra", "ElectraModel", "ElectraConfig", embedding_size=64, **_TEXT),
    _text("albert", "AlbertModel", "AlbertConfig", embedding_size=32, **_TEXT),
    _text("deberta_v2", "DebertaV2Model", "DebertaV2Config", **_TEXT),
    _text("distilbert", "DistilBertModel", "DistilBertConfig", dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    _text("gpt2", "GPT2LMHeadModel", "GPT2Config", **_GPT2),
    _text("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", max_position_embeddings=64, **_TEXT),
    _text("opt", "OPTForCausalLM", "OPTConfig", ffn_dim=128, hidden_size=64, num_hidden_layers=2,
          num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64),
    _text("llama", "LlamaForCausalLM", "LlamaConfig", **_DECODER),
    _text("mistral", "MistralForCausalLM", "MistralConfig", **_DECODER),
    _text("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **_DECODER),
    _text("gemma", "GemmaForCausalLM", "GemmaConfig", head_dim=16, **_DECODER),
    _text("phi", "PhiForCausalLM", "PhiConfig", **(_DECODER | {"num_key_value_heads": 4})),
    _text("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **_DECODER),
    _text("t5_encoder", "T5EncoderModel", "T5Config", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    _image("vit", "ViTForImageClassification", "ViTConfig", 32, **_IMAGE),
    _image("deit", "DeiTModel", "DeiTConfig", 32, **_IMAGE),
    _image("beit", "BeitModel", "BeitConfig", 32, **_IMAGE),
    _image("dinov2", "Dinov2Model", "Dinov2Config", 32, **_IMAGE),
    _image("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", 32, **_IMAGE),
    _image("swin", "SwinModel", "SwinConfig", 32, image_size=32, patch_size=2, embed_dim=32, depths=[1, 2],
           num_heads=[2, 4], window_size=4),
    _image("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", 64, hidden_sizes=[16, 32, 64, 64],
           depths=[1, 1, 1, 1], decoder_hidden_size=32),
    _image("convnext", "ConvNextForImageClassification", "ConvNextConfig", **_STAGES),
    _image("resnet", "ResNetForImageClassification", "ResNetConfig", embedding_size=16, layer_type="basic", **_STAGES),
    _image("mobilevit", "MobileViTModel", "MobileViTConfig", 64),
    _entry("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _sound(2000), **_WAVE),
    _entry("hubert", "HubertModel", "HubertConfig", _sound(2000), **_WAVE),
]  # fmt: skip
