"""Folders with the configs of models of their real sizes, and without weights."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import CLIPConfig, CLIPTextConfig, Gemma2Config, Qwen3Config

__all__ = ["clip_l", "klein", "sana", "sdxl", "z_image"]


def sdxl(folder: Path) -> Path:
    """Write the configs of Stable Diffusion XL base 1.0; neither weights nor tokenizers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    unet.save_config(folder / "unet")
    _save_vae(folder, latent_channels=4, scaling_factor=0.13025)
    _text(768, 12, 12, "quick_gelu", 768).save_pretrained(folder / "text_encoder")
    _text(1280, 32, 20, "gelu", 1280).save_pretrained(folder / "text_encoder_2")
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    ).save_config(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _qwen3_4b() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def z_image(folder: Path) -> Path:
    """Write the configs of Z-Image, whose transformer has diffusers' default sizes."""
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel()
    transformer.save_config(folder / "transformer")
    without = {"use_quant_conv": False, "use_post_quant_conv": False}
    _save_vae(folder, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **without)
    _qwen3_4b().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_config(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def klein(folder: Path) -> Path:
    """Write the configs of FLUX.2-klein-base-4B."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(decoder_block_out_channels=None)
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    _qwen3_4b().save_pretrained(folder / "text_encoder")
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    dynamic.save_config(folder / "scheduler")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def sana(folder: Path) -> Path:
    """Write the configs of SANA 1.6B, whose parts have their classes' default sizes."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with torch.device("meta"):
        transformer = SanaTransformer2DModel()
        vae = AutoencoderDC(
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    Gemma2Config().save_pretrained(folder / "text_encoder")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    DPMSolverMultistepScheduler(**flow).save_config(folder / "scheduler")
    index = {
        "_class_name": "SanaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def clip_l(folder: Path) -> Path:
    """Write the config of CLIP ViT-L/14."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    text = _text(768, 12, 12, "quick_gelu", 768).to_dict()
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=768).save_pretrained(folder)
    return folder


def _save_vae(folder: Path, **settings: Any) -> None:
    """Write the config of an autoencoder with eight pixels per latent."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=1024,
            force_upcast=True,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **settings,
        )
    vae.save_config(folder / "vae")


def _text(width: int, layers: int, heads: int, act: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=projection,
        max_position_embeddings=77,
    )
