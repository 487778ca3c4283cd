"""Tiny random checkpoints of every zero-shot family and of SAM, saved to disk as a hub checkpoint would be."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTokenizer,
    DetrImageProcessorPil,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    OmDetTurboConfig,
    OmDetTurboForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    Sam2Config,
    Sam2Model,
    Sam2VisionConfig,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
    SwinConfig,
)

from grounding.text import PhraseEncoder

SIDE = 96  # of the network input


def wordpiece():
    """The BERT tokenizer of the embedded text encoder, as Grounding DINO has it."""
    return AutoTokenizer.from_pretrained(PhraseEncoder().path, model_max_length=512)


def byte_pairs(folder: Path) -> CLIPTokenizer:
    """Letters, and the letters that end a word; no merges."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["left</w>", "lesion</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def swin(**changes) -> SwinConfig:
    return SwinConfig(
        image_size=SIDE, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=3, **changes
    )


def grounding_dino(folder: Path, family: str = "grounding-dino", **changes) -> Path:
    tokenizer = wordpiece()
    config_class, model_class = {
        "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
        "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
    }[family]
    text = {"model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "intermediate_size": 64}
    settings = dict(d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    settings |= dict(encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20, num_feature_levels=3)
    config = config_class(text_config=text, backbone_config=swin(out_indices=[2, 3]), **settings | changes)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": SIDE * 2})
    GroundingDinoProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def owl(folder: Path, family: str = "owlv2") -> Path:
    config_class, model_class, processor_class = {
        "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil),
        "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
    }[family]
    tokenizer = byte_pairs(folder)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 48}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**size, "image_size": SIDE, "patch_size": 16}
    torch.manual_seed(0)
    model_class(config_class(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor_class(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def omdet(folder: Path, **changes) -> Path:
    tokenizer = byte_pairs(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    settings = dict(text_projection_in_dim=48, text_projection_out_dim=48, class_embed_dim=48)
    settings |= dict(task_encoder_hidden_dim=64)
    settings |= dict(encoder_hidden_dim=32, decoder_hidden_dim=32, vision_features_channels=[32, 32, 32])
    settings |= dict(encoder_in_channels=[32, 64, 128], encoder_dim_feedforward=64, encoder_attention_heads=2)
    settings |= dict(decoder_num_heads=2, decoder_num_layers=2, decoder_dim_feedforward=64, num_queries=20)
    settings |= dict(apply_layernorm_after_vision_backbone=False)  # meant for timm's Swin, channels last
    config = OmDetTurboConfig(
        text_config=text, backbone_config=swin(out_indices=[2, 3, 4]), image_size=SIDE, **settings | changes
    )
    torch.manual_seed(0)
    OmDetTurboForObjectDetection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DetrImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def build_detector(family: str, folder: Path) -> Path:
    if family.endswith("dino"):
        return grounding_dino(folder, family)
    return omdet(folder) if family == "omdet-turbo" else owl(folder, family)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def sam(folder: Path, family: str = "sam") -> Path:
    """SAM, SAM-HQ ("sam_hq") or SAM 2 ("sam2")."""
    side, width = 64, 32
    prompts = {"hidden_size": width, "image_size": side, "patch_size": 16}
    decoder = {"hidden_size": width, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    torch.manual_seed(0)
    if family == "sam2":
        hiera = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [side, side]}
        hiera |= {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64]}
        hiera |= {"num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 4, 4]}
        hiera |= {"global_attention_blocks": [3]}
        vision = Sam2VisionConfig(
            backbone_config=hiera,
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=width,
        )
        config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
        Sam2Model(config).save_pretrained(folder)
        return folder
    vision = {"hidden_size": 32, "output_channels": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": side, "patch_size": 16, "mlp_dim": 64, "num_pos_feats": width // 2, "window_size": 2}
    vision |= {"global_attn_indexes": [1]}
    if family == "sam_hq":
        decoder |= {"vit_dim": 32}
        SamHQModel(
            SamHQConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
        ).save_pretrained(folder)
    else:
        SamModel(
            SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
        ).save_pretrained(folder)
    return folder
