"""Networks of transformers, diffusers and monai, small and with random weights, against PyTorch.

`make zoo` prints a table; ZOO="unet resnet" takes those whose names hold one of the words.
"""
import copy
import functools
import sys
import warnings
from typing import NamedTuple

import numpy as np
import torch

import flashconv
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

ZOO = {}  # name -> function that makes (network, positional example, example by name)


def image(*shape, seed=1): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_transformers(name, inputs, **settings):
    "A model of transformers by the name of its class."
    def make():
        import transformers
        cls = getattr(transformers, name)
        config = cls.config_class(**settings)
        return cls(config), (), {key: shape() if callable(shape) else image(*shape)
                                 for key, shape in inputs.items()}
    return make


def from_package(package, name, *inputs, **settings):
    "A network of diffusers or monai."
    def make():
        module = __import__(package, fromlist=["x"])
        tensors = tuple(i() if callable(i) else image(*i) for i in inputs)
        return getattr(module, name)(**settings), tensors, {}
    return make


monai = functools.partial(from_package, "monai.networks.nets")
diffusers = functools.partial(from_package, "diffusers")
PIXELS = {"pixel_values": (2, 3, 32, 32)}
LARGER = {"pixel_values": (2, 3, 64, 64)}
LARGEST = {"pixel_values": (2, 3, 128, 128)}  # for norms whose batches would have too few values
TIME = lambda: torch.tensor([3, 7])
SMALL = dict(hidden_sizes=[8, 16], depths=[1, 1])

ZOO |= {
    "resnet": from_transformers("ResNetForImageClassification", PIXELS, embedding_size=8,
                                hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    "resnet-bottleneck": from_transformers("ResNetModel", PIXELS, embedding_size=8, depths=[1, 1],
                                           hidden_sizes=[16, 32]),
    "regnet": from_transformers("RegNetModel", PIXELS, embedding_size=8, hidden_sizes=[8, 16],
                                depths=[1, 1], groups_width=4),
    "convnext": from_transformers("ConvNextForImageClassification", PIXELS, num_stages=2,
                                  drop_path_rate=0.0, **SMALL),
    "convnextv2": from_transformers("ConvNextV2Model", PIXELS, num_stages=2, **SMALL),
    "mobilenet-v1": from_transformers("MobileNetV1Model", PIXELS, depth_multiplier=0.25,
                                      min_depth=4),
    "mobilenet-v2": from_transformers("MobileNetV2ForImageClassification", PIXELS, min_depth=4,
                                      depth_multiplier=0.25),
    "mobilevit": from_transformers("MobileViTModel", LARGEST, hidden_sizes=[12, 16, 20],
                                   neck_hidden_sizes=[4, 8, 8, 8, 8, 8, 24], num_attention_heads=2,
                                   expand_ratio=2.0, hidden_dropout_prob=0.0),
    "mobilevitv2": from_transformers("MobileViTV2Model", LARGEST, width_multiplier=0.25),
    "efficientnet": from_transformers(
        "EfficientNetModel", LARGER, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320,
        drop_connect_rate=0.0, dropout_rate=0.0),
    "bit": from_transformers("BitModel", PIXELS, embedding_size=8, hidden_sizes=[8, 16],
                             depths=[1, 1], num_groups=2),
    "levit": from_transformers("LevitModel", LARGEST, image_size=128, hidden_sizes=[16, 24, 32],
                               num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
                               drop_path_rate=0),
    "cvt": from_transformers("CvtModel", PIXELS, embed_dim=[8, 16, 16], num_heads=[1, 2, 2],
                             depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0]),
    "segformer": from_transformers(
        "SegformerForSemanticSegmentation", LARGER, num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[4, 2], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        hidden_dropout_prob=0.0, drop_path_rate=0.0, classifier_dropout_prob=0.0),
    "poolformer": from_transformers("PoolFormerModel", LARGER, hidden_sizes=[8, 16, 16, 16],
                                    depths=[1, 1, 1, 1], drop_path_rate=0.0),
    "focalnet": from_transformers("FocalNetModel", PIXELS, image_size=32, embed_dim=8,
                                  depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3],
                                  drop_path_rate=0.0),
    "swin": from_transformers("SwinModel", PIXELS, image_size=32, embed_dim=8, depths=[2, 2],
                              num_heads=[1, 2], window_size=4, drop_path_rate=0.0),
    "swinv2": from_transformers("Swinv2Model", PIXELS, image_size=32, embed_dim=8, depths=[2, 2],
                                num_heads=[1, 2], window_size=4, drop_path_rate=0.0),
    "pvt": from_transformers("PvtModel", PIXELS, image_size=32, hidden_sizes=[8, 16, 16, 16],
                             depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
                             hidden_dropout_prob=0.0, drop_path_rate=0.0),
    "pvt-v2": from_transformers("PvtV2Model", PIXELS, hidden_sizes=[8, 16, 16, 16],
                                depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
                                drop_path_rate=0.0),
    "vit": from_transformers("ViTModel", PIXELS, image_size=32, patch_size=8, hidden_size=16,
                             num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
    "dpt": from_transformers("DPTForDepthEstimation", PIXELS, image_size=32, patch_size=8,
                             hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                             intermediate_size=32, backbone_out_indices=[0, 1, 2, 3],
                             neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
                             reassemble_factors=[4, 2, 1, 0.5]),
    "swin2sr": from_transformers("Swin2SRForImageSuperResolution", {"pixel_values": (1, 3, 16, 16)},
                                 image_size=16, embed_dim=16, depths=[2], num_heads=[2],
                                 window_size=4, drop_path_rate=0.0),
    "clip-vision": from_transformers("CLIPVisionModel", PIXELS, image_size=32, patch_size=8,
                                       hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                       intermediate_size=32),
    "wav2vec2": from_transformers(
        "Wav2Vec2Model", {"input_values": (1, 800)}, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8], conv_stride=[5, 2],
        conv_kernel=[10, 3], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2, hidden_dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        feat_proj_dropout=0.0, mask_time_prob=0.0, activation_dropout=0.0),
    "encodec": from_transformers("EncodecModel", {"input_values": (1, 1, 640)}, num_filters=4,
                                 hidden_size=8, codebook_size=16, upsampling_ratios=[4, 2],
                                 codebook_dim=8, num_lstm_layers=1),
    "hifigan": from_transformers("SpeechT5HifiGan", {"spectrogram": (8, 10)}, model_in_dim=10,
                                 upsample_initial_channel=16, upsample_rates=[2, 2],
                                 upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
                                 resblock_dilation_sizes=[[1, 3]]),
    "univnet": from_transformers("UnivNetModel", {
        "input_features": (1, 6, 20), "noise_sequence": (1, 6, 8)}, model_in_channels=8,
        model_hidden_channels=8, num_mel_bins=20, kernel_predictor_hidden_channels=8,
        resblock_kernel_sizes=[3, 3], resblock_stride_sizes=[2, 2],
        resblock_dilation_sizes=[[1, 3], [1, 3]]),
    "vivit": from_transformers(
        "VivitModel", {"pixel_values": (1, 4, 3, 16, 16)}, image_size=16, num_frames=4,
        tubelet_size=[2, 8, 8], hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32),
    "whisper-encoder": lambda: _whisper(),
    "dinov2": from_transformers(
        "Dinov2Model", PIXELS, image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2),
    "upernet": lambda: _upernet(),
    "squeezebert": from_transformers(
        "SqueezeBertModel", {"input_ids": lambda: torch.arange(12).reshape(2, 6)}, vocab_size=30,
        hidden_size=16, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2,
        output_groups=2),
}


def _whisper():
    import transformers
    config = transformers.WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2,
                                        encoder_ffn_dim=32, num_mel_bins=8,
                                        max_source_positions=20)
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    return WhisperEncoder(config), (image(1, 8, 40),), {}


def _upernet():
    import transformers
    backbone = transformers.ConvNextConfig(num_stages=4, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4,
                                           out_features=["stage1", "stage2", "stage3", "stage4"],
                                           drop_path_rate=0.0)
    config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=8, num_labels=3,
                                        auxiliary_in_channels=8, auxiliary_channels=8,
                                        pool_scales=[1, 2])
    return transformers.UperNetForSemanticSegmentation(config), (), {
        "pixel_values": image(2, 3, 64, 64)}


ZOO |= {
    "unet2d": diffusers("UNet2DModel", (2, 3, 16, 16), TIME, sample_size=16, norm_num_groups=2,
                        block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=4,
                        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                        up_block_types=("AttnUpBlock2D", "UpBlock2D")),
    "unet2d-condition": diffusers(
        "UNet2DConditionModel", (2, 4, 16, 16), TIME, (2, 5, 8), sample_size=16,
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    "unet3d": diffusers("UNet3DConditionModel", (1, 4, 2, 8, 8), lambda: torch.tensor([3]),
                        (1, 5, 8), sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
                        norm_num_groups=2, cross_attention_dim=8, attention_head_dim=4,
                        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
    "vae": diffusers("AutoencoderKL", (1, 3, 16, 16), block_out_channels=(8, 16),
                     norm_num_groups=2, layers_per_block=1, latent_channels=4,
                     down_block_types=("DownEncoderBlock2D",) * 2,
                     up_block_types=("UpDecoderBlock2D",) * 2),
    "vq": diffusers("VQModel", (1, 3, 16, 16), block_out_channels=(8,), norm_num_groups=2,
                    num_vq_embeddings=16),
    "dit": diffusers("DiTTransformer2DModel", (2, 4, 8, 8), TIME, lambda: torch.tensor([1, 2]),
                     sample_size=8, num_attention_heads=2, attention_head_dim=8, num_layers=1,
                     num_embeds_ada_norm=1000, dropout=0.0),
    "controlnet": diffusers(
        "ControlNetModel", (1, 4, 8, 8), lambda: torch.tensor([3]), (1, 5, 8), (1, 3, 64, 64),
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8, 8, 8)),
    "vae-temporal": diffusers(
        "AutoencoderKLTemporalDecoder", (2, 3, 16, 16), block_out_channels=(32,),
        layers_per_block=1, latent_channels=4, down_block_types=("DownEncoderBlock2D",)),
}

VOLUME = (2, 1, 16, 16, 16)
ZOO |= {
    "monai-unet": monai("UNet", VOLUME, spatial_dims=3, in_channels=1, out_channels=2,
                        channels=(4, 8, 16), strides=(2, 2), num_res_units=1),
    "monai-basicunet": monai("BasicUNet", (2, 1, 32, 32), spatial_dims=2, in_channels=1,
                             features=(4, 4, 8, 8, 8, 4)),
    "unet++": monai("BasicUNetPlusPlus", (2, 1, 32, 32), spatial_dims=2, in_channels=1,
                    features=(4, 4, 8, 8, 8, 4)),
    "dynunet": monai("DynUNet", (2, 1, 16, 16), spatial_dims=2, in_channels=1, out_channels=2,
                     kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
                     filters=[4, 8, 8], res_block=True),
    "segresnet": monai("SegResNet", VOLUME, spatial_dims=3, init_filters=8, in_channels=1,
                       out_channels=2, blocks_down=(1, 1), blocks_up=(1,)),
    "segresnet-ds": monai("SegResNetDS", (2, 1, 16, 16), spatial_dims=2, init_filters=8,
                          in_channels=1, out_channels=2, blocks_down=(1, 1)),
    "vnet": monai("VNet", (2, 1, 32, 32), spatial_dims=2, in_channels=1, out_channels=2,
                  dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0)),
    "attention-unet": monai("AttentionUnet", (2, 1, 16, 16), spatial_dims=2, in_channels=1,
                            out_channels=2, channels=(4, 8, 16), strides=(2, 2)),
    "unetr": monai("UNETR", (1, 1, 32, 32), in_channels=1, out_channels=2, img_size=(32, 32),
                   feature_size=4, hidden_size=16, mlp_dim=32, num_heads=2, spatial_dims=2),
    "swin-unetr": monai("SwinUNETR", (1, 1, 64, 64), in_channels=1, out_channels=2, feature_size=12,
                        depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), spatial_dims=2),
    "densenet3d": monai("DenseNet", VOLUME, spatial_dims=3, in_channels=1, out_channels=2,
                        init_features=8, growth_rate=4, block_config=(2, 2)),
    "monai-resnet": monai("ResNet", VOLUME, block="basic", layers=[1, 1, 1, 1],
                          block_inplanes=[4, 8, 8, 8], n_input_channels=1, num_classes=2),
    "senet": monai("SENet", (2, 3, 64, 64), spatial_dims=2, in_channels=3, block="se_resnet_bottleneck",
                   layers=(1, 1, 1, 1), groups=1, reduction=16, num_classes=2, dropout_prob=None),
    "highresnet": monai("HighResNet", (2, 1, 16, 16), spatial_dims=2, in_channels=1,
                        out_channels=2),
    "monai-autoencoder": monai("AutoEncoder", (2, 1, 16, 16), spatial_dims=2, in_channels=1,
                               out_channels=1, channels=(4, 8), strides=(2, 2)),
    "monai-vit": monai("ViT", (2, 1, 16, 16), in_channels=1, img_size=(16, 16), patch_size=(8, 8),
                       hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2, spatial_dims=2),
    "flexible-unet": monai("FlexibleUNet", (2, 3, 64, 64), in_channels=3, out_channels=2,
                           backbone="efficientnet-b0", decoder_channels=(16, 8, 8, 8, 8)),
    "monai-efficientnet": monai("EfficientNetBN", (2, 3, 64, 64), model_name="efficientnet-b0",
                                pretrained=False, num_classes=2),
    "ahnet": monai("AHNet", (2, 1, 64, 64), spatial_dims=2, in_channels=1, out_channels=2,
                   psp_block_num=0),
    "milmodel-generator": monai("Generator", (2, 8), latent_shape=(8,), start_shape=(4, 4, 4),
                                channels=(4, 2), strides=(2, 2)),
    "discriminator": monai("Discriminator", (2, 1, 16, 16), in_shape=(1, 16, 16), channels=(4, 8),
                           strides=(2, 2)),
    "monai-diffusion": monai("DiffusionModelUNet", (2, 1, 16, 16), TIME, spatial_dims=2,
                             in_channels=1, out_channels=1, channels=(8, 16), norm_num_groups=4,
                             attention_levels=(False, True), num_res_blocks=1,
                             num_head_channels=8),
    "spade": monai("SPADENet", lambda: torch.nn.functional.one_hot(
        torch.arange(256).reshape(1, 16, 16) % 3, 3).permute(0, 3, 1, 2).float(),
        spatial_dims=2, in_channels=1, out_channels=1, label_nc=3, input_shape=[16, 16],
        channels=[8, 8], is_vae=False),
}


# Judging -------------------------------------------------------------------------------------


def doubled(value):
    "Tensors of reals as float64, so that a difference is a fault."
    return torch.utils._pytree.tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, value)


def arrays(value):
    return torch.utils._pytree.tree_map(
        lambda v: flashconv.convert.layers._as_array(v) if isinstance(v, torch.Tensor) else v, value)


def flat(output):
    "The reals of a result, in order."
    if isinstance(output, dict): output = list(output.values())
    if isinstance(output, (tuple, list)): return [leaf for item in output for leaf in flat(item)]
    is_real = isinstance(output, torch.Tensor) and output.is_floating_point() or isinstance(
        output, mx.array) and mx.issubdtype(output.dtype, mx.floating)
    return [output] if is_real else []


def factors(outputs):
    "What outputs are multiplied with before they are summed to a loss."
    return [np.random.default_rng(i).normal(size=tuple(y.shape)) for i, y in enumerate(outputs)]


class Run(NamedTuple):
    "What a network gives and what it is afterwards."
    outputs: dict  # number -> array
    gradients: dict  # name -> array
    state: dict  # name -> array: parameters and buffers of reals


class Errors(NamedTuple):
    "Differences of two runs, by the largest value of each array."
    outputs: dict
    gradients: dict
    state: dict

    def worst(self): return [max(part.values(), default=0.0) for part in self]


def as_numpy(tensors): return {name: v.detach().numpy().astype(np.float64) for name, v in tensors.items()
                               if v.is_floating_point()}


def ran(theirs, args, kwargs):
    "PyTorch's outputs, gradients of their weighted sum, and state."
    theirs.zero_grad()
    outputs = flat(theirs(*args, **kwargs))
    trained = [y for y in outputs if y.requires_grad]
    if trained: sum((y * torch.tensor(w)).sum() for y, w in zip(outputs, factors(outputs))).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    return Run(as_numpy(dict(enumerate(outputs))), as_numpy(gradients), as_numpy(theirs.state_dict()))


def ran_here(ours, args, kwargs):
    "The same of ours."
    def loss(model):
        outputs = flat(model(*arrays(args), **arrays(kwargs)))
        return sum((y * mx.array(w)).sum() for y, w in zip(outputs, factors(outputs))), outputs
    (_, outputs), gradients = nn.value_and_grad(ours, loss)(ours)
    gradients = gradients_by_name(ours, gradients)
    return Run({i: np.array(y, np.float64) for i, y in enumerate(outputs)},
               {name: np.array(g, np.float64) for name, g in gradients.items()},
               as_numpy(flashconv.to_torch_state(ours)))


def errors(run, right):
    "Differences; infinite where something is missing, nothing where PyTorch's is no number."
    def each(ours, theirs, floor):
        found = {}
        for name, b in theirs.items():
            a = ours.get(name)
            if a is None or a.shape != b.shape: found[name] = np.inf
            elif not b.size or not np.isfinite(b).all(): found[name] = 0.0
            else: found[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), floor))
        return found
    steepest = max((float(np.abs(g).max()) for g in right.gradients.values() if g.size), default=1.0)
    outputs = each(run.outputs, right.outputs, 1e-8)
    if len(run.outputs) != len(right.outputs): outputs["count"] = np.inf
    return Errors(outputs, each(run.gradients, right.gradients, max(1e-6 * steepest, 1e-300)),
                  each(run.state, right.state, 1e-8))


def compared(theirs, ours, args, kwargs):
    "The largest errors of outputs, of all gradients and of the state afterwards."
    right = ran(theirs, args, kwargs)
    return errors(ran_here(ours, args, kwargs), right).worst()


def gradients_by_name(ours, gradients):
    "Gradients under PyTorch's names."
    places = flashconv.base._state_places(ours)
    by_place = {(id(place.holder), place.key): name for name, place in places.items()}
    found = {}

    def walk(holder, gradient):
        pairs = enumerate(gradient) if isinstance(gradient, list) else gradient.items()
        for key, value in pairs:
            if isinstance(value, (dict, list)): walk(holder[key], value)
            elif (id(holder), key) in by_place: found[by_place[id(holder), key]] = value
    walk(ours, gradients)
    return {name: found[by_place[id(place.holder), place.key]] for name, place in places.items()
            if by_place[id(place.holder), place.key] in found}


def without_chance(model):
    "Dropout would draw other numbers."
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd): module.p = 0.0
        for name in ("drop_connect_rate", "dropout_prob"):
            if getattr(module, name, None): setattr(module, name, 0.0)
    return model


def made(name):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    return without_chance(model).double(), doubled(args), doubled(kwargs)


def halved(value):
    return torch.utils._pytree.tree_map(
        lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, value)


BOUND = 5e-6  # sigmoid, exp and erf of MLX have the precision of float32 in float64
SHARE = 2  # of the error that PyTorch itself makes in float32: so much depth explains


class Verdict(NamedTuple):
    "The largest errors, and the largest as a share of what it may be."
    outputs: float
    gradients: float
    state: float
    share: float


def judged(theirs, ours, args, kwargs):
    """How far ours is off, with PyTorch's float64 as the judge.

    An error may be `BOUND`, or where rounding grows through depth, `SHARE` times that of PyTorch's
    float32 on the same array.
    """
    single = copy.deepcopy(theirs).float()
    right = ran(theirs, args, kwargs)
    found = errors(ran_here(ours, args, kwargs), right)
    share = max(found.worst()) / BOUND
    if share >= 1:
        rounding = errors(ran(single, halved(args), halved(kwargs)), right)
        share = max(error / max(BOUND, SHARE * part.get(name, 0.0)) for part, other in zip(
            rounding, found) for name, error in other.items())
    return Verdict(*found.worst(), share)


STEPS, RATE, MOMENTUM = 3, 1e-3, 0.9  # of fine-tuning


def learned(theirs, args, kwargs, goals):
    "PyTorch's losses in a few steps."
    moves, losses = torch.optim.SGD(theirs.parameters(), RATE, MOMENTUM), []
    for _ in range(STEPS):
        moves.zero_grad()
        outputs = flat(theirs(*args, **kwargs))
        loss = sum((y - torch.tensor(goal)).square().mean() for y, goal in zip(outputs, goals))
        loss.backward()
        moves.step()
        losses.append(loss.item())
    assert len(set(losses)) == STEPS, "nothing was learned"
    return np.array(losses)


def learned_here(ours, args, kwargs, goals):
    "The same of ours."
    def loss(model):
        outputs = flat(model(*arrays(args), **arrays(kwargs)))
        return sum(mx.square(y - mx.array(goal)).mean() for y, goal in zip(outputs, goals))
    moves, losses = optim.SGD(RATE, MOMENTUM), []
    for _ in range(STEPS):
        value, gradients = nn.value_and_grad(ours, loss)(ours)
        moves.update(ours, gradients)
        mx.eval(ours.state, moves.state)
        losses.append(value.item())
    return np.array(losses)


def tuned(theirs, ours, args, kwargs):
    "The largest difference of the losses of a few steps, and as a share of what it may be."
    theirs.train()
    ours.train()
    goals, single = factors(flat(theirs(*args, **kwargs))), copy.deepcopy(theirs).float()
    flashconv.load_torch_state(ours, theirs.state_dict())
    right = learned(theirs, args, kwargs, goals)
    worst = float((np.abs(learned_here(ours, args, kwargs, goals) - right) / right).max())
    if worst < BOUND: return worst, worst / BOUND
    rounding = np.abs(learned(single, halved(args), halved(kwargs), goals) - right) / right
    return worst, worst / max(BOUND, SHARE * float(rounding.max()))


def tried(name, dynamic_shapes=None):
    "The verdicts in evaluation and in training, and how far the losses of three steps are off."
    theirs, args, kwargs = made(name)
    ours = flashconv.convert_model(theirs, args, kwargs, dynamic_shapes=dynamic_shapes)
    results = []
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        try: results.append(judged(theirs, ours, args, kwargs))
        except Exception as problem: results.append(f"{type(problem).__name__}: {problem}"[:300])
    try: results.append(tuned(theirs, ours, args, kwargs))
    except Exception as problem: results.append(f"{type(problem).__name__}: {problem}"[:300])
    return results


def main(words):
    warnings.simplefilter("ignore")
    names = [name for name in ZOO if not words or any(word in name for word in words)]
    good = 0
    print(f"{'network':24}{'evaluation':>12}{'gradients':>12}{'training':>12}{'gradients':>12}"
          f"{'statistics':>12}{'three steps':>12}{'of bound':>12}")
    for name in names:
        try: results = tried(name)
        except Exception as problem:
            print(f"{name:24}{type(problem).__name__}: {str(problem)[:400]}", flush=True)
            continue
        if any(isinstance(result, str) for result in results):
            print(f"{name:24}" + " | ".join(map(str, results)), flush=True)
            continue
        evaluation, training, steps = results
        share = max(result[-1] for result in results)
        good += share < 1
        shown = *evaluation[:2], *training[:3], steps[0], share
        print(f"{name:24}" + "".join(f"{e:12.1e}" for e in shown), flush=True)
    print(f"{good} of {len(names)} equal PyTorch in both modes, with all gradients and three steps")


if __name__ == "__main__": main(sys.argv[1:])
