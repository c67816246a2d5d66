"""Tiny random models of the real classes, one maker per family."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.conftest import TOKENIZER

__all__ = ["MAKERS", "tiny"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
_WIDTH = 32
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The layout of Qwen3's chats, which leaves room for thoughts unless they are forbidden."""


def _clip(kind: type, **settings: Any) -> tuple[nn.Module, CLIPTokenizer]:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=_WIDTH,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return kind(config), tokenizer


def _t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    pieces = [(letter, -3.0) for letter in _LETTERS] + [("▁" + c, -2.5) for c in _LETTERS]
    tokenizer = T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer


def _qwen3(
    kind: type[PreTrainedModel] = Qwen3Model, layers: int = 3
) -> tuple[PreTrainedModel, Qwen2Tokenizer]:
    """Return a decoder of text and a tokenizer of bytes, with the layout of Qwen3's chats."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokens = (*sorted(ByteLevel.alphabet()), *special)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    tokenizer.chat_template = _CHAT
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    return kind(config), tokenizer


def _gemma2() -> tuple[Gemma2Model, GemmaTokenizer]:
    """Return a decoder of text and a tokenizer of letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    letters = sorted({*_LETTERS, *_LETTERS.upper(), *':;>"\n'})
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=4096)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        sliding_window=4096,
    )
    return Gemma2Model(config), tokenizer


def _vae(channels: int, kind: Any = AutoencoderKL, **settings: Any) -> Any:
    """Return an autoencoder with two pixels per latent."""
    return kind(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )


def _flow_vae(**settings: float) -> AutoencoderKL:
    """Return the autoencoder of a flow model: more channels, no convolutions around latents."""
    return _vae(16, use_quant_conv=False, use_post_quant_conv=False, **settings)


def sd(prediction_type: str = "epsilon") -> DiffusionPipeline:
    """Return Stable Diffusion 1.5's kind, 16 pixels; or 2.1's, which predicts v."""
    encoder, tokenizer = _clip(CLIPTextModel)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=_WIDTH,
        use_linear_projection=prediction_type == "v_prediction",
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(turbo: bool = False) -> DiffusionPipeline:
    """Return Stable Diffusion XL, 16 pixels; or its Turbo's scheduler and settings."""
    first, tokenizer = _clip(CLIPTextModel)
    second, tokenizer_2 = _clip(CLIPTextModelWithProjection, hidden_act="gelu")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * _WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
    )
    kind = EulerAncestralDiscreteScheduler if turbo else EulerDiscreteScheduler
    scheduler = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="trailing" if turbo else "leading",
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=not turbo,
        add_watermarker=False,
    )


def sd3(first_version: bool = False) -> DiffusionPipeline:
    """Return Stable Diffusion 3.5 medium's kind, 32 pixels; or 3's, which has plain attention."""
    attention: dict[str, Any] = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    first, tokenizer = _clip(CLIPTextModelWithProjection)
    second, tokenizer_2 = _clip(CLIPTextModelWithProjection, hidden_act="gelu")
    third, tokenizer_3 = _t5(2 * _WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * _WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=24,
        **({} if first_version else attention),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


def flux(schnell: bool = False) -> DiffusionPipeline:
    """Return FLUX.1-dev, or FLUX.1-schnell without its guidance input and its dynamic shift."""
    first, tokenizer = _clip(CLIPTextModel)
    second, tokenizer_2 = _t5(_WIDTH)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=not schnell,
    )
    dynamic = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=1.0)
        if schnell
        else FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **dynamic)
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
    )


def zimage() -> DiffusionPipeline:
    """Return Z-Image, 32 pixels or more; its pad tokens are not zeros, as in a trained model."""
    encoder, tokenizer = _qwen3()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 512, 512],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def klein(distilled: bool = False) -> DiffusionPipeline:
    """Return FLUX.2-klein, 32 pixels or more, whose latents have other statistics than 0 and 1."""
    encoder, tokenizer = _qwen3(Qwen3ForCausalLM, layers=27)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = _vae(4, AutoencoderKLFlux2)
    nn.init.normal_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    dynamic = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **dynamic),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        is_distilled=distilled,
    )


def sana() -> DiffusionPipeline:
    """Return Sana with eight pixels per latent instead of 32; sizes are multiples of 32 pixels."""
    encoder, tokenizer = _gemma2()
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        timestep_scale=0.5,
    )
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


MAKERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": sd,
    "sd2": lambda: sd("v_prediction"),
    "sdxl": sdxl,
    "sdxl_turbo": lambda: sdxl(turbo=True),
    "sd3": sd3,
    "sd3_first": lambda: sd3(first_version=True),
    "flux_dev": flux,
    "flux_schnell": lambda: flux(schnell=True),
    "klein": klein,
    "klein_distilled": lambda: klein(distilled=True),
    "zimage": zimage,
    "sana": sana,
}


def tiny(name: str, seed: int = 0) -> DiffusionPipeline:
    """Return a tiny model with seeded weights, in evaluation mode and without progress bars."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = MAKERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
